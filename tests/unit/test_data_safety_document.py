# SPDX-License-Identifier: Apache-2.0
"""The argument in docs/data-safety.md: every sentence has its tests, and every test that it names exists."""

from __future__ import annotations

import re
from pathlib import Path

TESTS = Path(__file__).parents[1]
DOCUMENT = TESTS.parent / "docs" / "data-safety.md"


def sentences() -> dict[int, list[str]]:
    """Return the tests that each numbered sentence names."""
    parts = re.split(r"(?m)^(\d+)\. ", DOCUMENT.read_text())
    bodies = [body.partition("\n\n")[0] for body in parts[2::2]]
    return {int(number): re.findall(r"`(test_\w+)`", body) for number, body in zip(parts[1::2], bodies, strict=True)}


def defined() -> set[str]:
    """Return the names of all tests that there are."""
    return {
        name
        for path in TESTS.rglob("test_*.py")
        for name in re.findall(r"(?m)^(?:    )?def (test_\w+)\(", path.read_text())
    }


def test_every_sentence_is_numbered_in_order_and_has_a_test() -> None:
    found = sentences()
    assert list(found) == list(range(1, len(found) + 1))
    assert len(found) > 30
    assert [number for number, named in found.items() if not named] == []


def test_every_test_that_is_named_exists() -> None:
    assert sorted({name for named in sentences().values() for name in named} - defined()) == []
