"""docs/doctor.md and the program name the same checks, severities and fields."""

from __future__ import annotations

import re

from csi_driver.local.doctor_findings import Check, Severity
from tests.documents import code, section, table, text_of

DOCUMENT = text_of("docs/doctor.md")


def test_every_check_has_its_section_and_every_section_its_check() -> None:
    headings = re.findall(r"(?m)^### `(.*)`$", DOCUMENT)
    assert sorted(headings) == sorted(check.value for check in Check)
    for heading in headings:
        assert "Fix: " in section(DOCUMENT, f"`{heading}`") or heading == Check.MARKS


def test_the_words_for_each_severity_are_those_that_are_printed() -> None:
    words = [word for row in table(DOCUMENT, "printed") for word in code(row["printed"])]
    assert words == [severity.upper() for severity in Severity]
    for severity in Severity:
        assert severity.value in DOCUMENT
