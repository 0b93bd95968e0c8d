# SPDX-License-Identifier: Apache-2.0
"""A clock for tests."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass
class FakeClock:
    """Time that passes only in `sleep`, or when a test says so."""

    now_s: float = 0.0

    def monotonic(self) -> float:
        return self.now_s

    def sleep(self, seconds: float) -> None:
        self.now_s += seconds
