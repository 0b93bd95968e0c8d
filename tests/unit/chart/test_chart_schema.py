# SPDX-License-Identifier: Apache-2.0
"""The chart's schema knows the program's flags, all of them, as they are now; its values are described."""

from __future__ import annotations

import json

import pytest

from tests.tools.chart_schema import OWN_VALUES, PARAMETERS, SCHEMA, flags_of, fresh, parameters, value_name
from tests.tools.chart_values import DOCUMENT, VALUES, document, values


def test_schema_has_the_programs_flags_as_they_are() -> None:
    assert SCHEMA.read_text() == fresh(SCHEMA.read_text()), f"{SCHEMA} is stale: run `make chart`"


def test_templates_have_the_parameters_that_the_driver_knows() -> None:
    assert PARAMETERS.read_text() == parameters(), f"{PARAMETERS} is stale: run `make chart`"


def test_every_value_is_described() -> None:
    assert [value.path for value in values(VALUES.read_text()) if not value.description] == []


def test_every_value_of_the_schema_has_a_default() -> None:
    known = {value.path for value in values(VALUES.read_text())}
    schema = json.loads(SCHEMA.read_text())
    assert [name for name in schema["properties"] if name not in known] == []
    for role in OWN_VALUES:
        assert [name for name in schema["properties"][role]["properties"] if f"{role}.{name}" not in known] == []


def test_the_document_of_the_values_is_that_of_the_chart() -> None:
    assert DOCUMENT.read_text() == document(VALUES.read_text()), f"{DOCUMENT} is stale: run `make chart`"


@pytest.mark.parametrize("role", OWN_VALUES)
def test_names_of_flags_are_told_apart_as_values(role: str) -> None:
    names = [value_name(flag) for flag in flags_of(role)]
    assert len(set(names)) == len(names)
