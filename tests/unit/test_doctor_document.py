# SPDX-License-Identifier: Apache-2.0
"""docs/doctor.md shows the severities that the program prints. Its table of checks is generated from the code."""

from __future__ import annotations

from csi_driver.local.doctor import Severity
from tests.documents import code, table, text_of

DOCUMENT = text_of("docs/doctor.md")


def test_the_words_for_each_severity_are_those_that_are_printed() -> None:
    words = [word for row in table(DOCUMENT, "printed") for word in code(row["printed"])]
    assert words == [severity.upper() for severity in Severity]
    for severity in Severity:
        assert severity.value in DOCUMENT
