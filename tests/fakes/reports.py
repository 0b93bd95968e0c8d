# SPDX-License-Identifier: Apache-2.0
"""A reporter that keeps what it is told."""

from __future__ import annotations

from dataclasses import dataclass, field

from csi_driver.reporting import EventReason, Subject


@dataclass
class Reports:
    found: list[tuple[Subject, EventReason, str]] = field(default_factory=list)

    def report(self, subject: Subject, reason: EventReason, note: str) -> None:
        self.found.append((subject, reason, note))

    def one(self) -> tuple[Subject, EventReason, str]:
        """Return the only finding, which may have been reported several times."""
        (found,) = set(self.found)
        return found
