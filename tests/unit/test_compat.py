# SPDX-License-Identifier: Apache-2.0
"""The list of what exists for older drivers names code that exists."""

from __future__ import annotations

import re
from importlib import import_module

import pytest

from csi_driver import compat


@pytest.mark.parametrize("name", sorted(set(re.findall(r"`(csi_driver[\w.]+)`", str(compat.__doc__)))))
def test_the_list_names_code_that_exists(name: str) -> None:
    module, _, attribute = name.rpartition(".")
    try:
        import_module(name)
    except ModuleNotFoundError:
        assert hasattr(import_module(module), attribute)
