# SPDX-License-Identifier: Apache-2.0
"""The chart's schema knows the program's flags, all of them, as they are now."""

from __future__ import annotations

import pytest

from tests.tools.chart_schema import OWN_VALUES, SCHEMA, flags_of, fresh, value_name


def test_schema_has_the_programs_flags_as_they_are() -> None:
    assert SCHEMA.read_text() == fresh(SCHEMA.read_text()), f"{SCHEMA} is stale: run `make chart`"


@pytest.mark.parametrize("role", OWN_VALUES)
def test_names_of_flags_are_told_apart_as_values(role: str) -> None:
    names = [value_name(flag) for flag in flags_of(role)]
    assert len(set(names)) == len(names)
