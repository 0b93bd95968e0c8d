# SPDX-License-Identifier: Apache-2.0
"""The reasons of health entries are a written promise."""

from __future__ import annotations

import re
from pathlib import Path

from csi_driver.model import Reason, StorageFault, VolumeEntry, VolumeFault, each_once

DOCUMENT = Path(__file__).parents[2] / "docs" / "health.md"


def test_every_reason_is_documented_and_no_other() -> None:
    rows = [line.split("|") for line in DOCUMENT.read_text().splitlines() if line.startswith("| ")]
    cells = [(row[1].strip(), row[2]) for row in rows if row[1].strip() != "status"]
    documented = {reason for _, text in cells for reason in re.findall(r"[A-Z]\w+", text)}
    assert documented == set(Reason)
    assert {status for status, _ in cells} == {*VolumeFault, *StorageFault}


def test_reasons_are_single_words_in_the_form_that_the_specification_wants() -> None:
    assert all(re.fullmatch(r"([A-Z][a-z]+)+", reason) for reason in Reason)


def test_entries_of_one_identity_are_put_together() -> None:
    first, same, second = (VolumeEntry(VolumeFault.DEGRADED, Reason.IO_ERROR, text) for text in ("a", "a", "b"))
    other = VolumeEntry(VolumeFault.DEGRADED, Reason.FILESYSTEM_FULL, "c")
    assert each_once([first, same]) == (first,)
    assert [entry.message for entry in each_once([first, second, other])] == ["a (and 1 more)", "c"]
