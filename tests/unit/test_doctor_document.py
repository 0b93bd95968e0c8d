"""docs/doctor.md and the program name the same checks, gravities and words."""

from __future__ import annotations

import re

from csi_driver.local import doctor_findings
from csi_driver.local.doctor_findings import Check, Gravity
from tests.documents import code, section, table, text_of

DOCUMENT = text_of("docs/doctor.md")


def test_every_check_has_its_section_and_every_section_its_check() -> None:
    headings = re.findall(r"(?m)^### `(.*)`$", DOCUMENT)
    assert sorted(headings) == sorted(check.value for check in Check)
    for heading in headings:
        assert "Mend: " in section(DOCUMENT, f"`{heading}`") or heading == Check.MARKS


def test_the_words_for_each_gravity_are_those_that_are_printed() -> None:
    words = [word for row in table(DOCUMENT, "it says") for word in code(row["it says"])]
    assert words == [doctor_findings.NAMES[gravity] for gravity in Gravity]
    for gravity in Gravity:
        assert gravity.value in DOCUMENT
