# SPDX-License-Identifier: Apache-2.0
"""The reasons of events are a written promise."""

from __future__ import annotations

import re
from pathlib import Path

from csi_driver.reporting import EventReason

DOCUMENT = Path(__file__).parents[2] / "docs" / "events.md"


def test_every_reason_is_documented_and_no_other() -> None:
    rows = [line.split("|") for line in DOCUMENT.read_text().splitlines() if line.startswith("| `")]
    assert {row[1].strip(" `") for row in rows} == set(EventReason)
    assert all(cell.strip() for row in rows for cell in row[1:5])


def test_reasons_are_words_in_the_form_of_kubernetes() -> None:
    assert all(re.fullmatch(r"([A-Z][a-z]+){2,}", reason) for reason in EventReason)
