# SPDX-License-Identifier: Apache-2.0
"""Files that give back nothing, and steps in which something happens."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from csi_driver.errors import PreconditionFailed


@dataclass
class FakeSparseFiles:
    """Gives back nothing; `during` runs inside each step."""

    reason: str = ""
    problem: str = ""
    following: list[int | None] = field(default_factory=list)
    steps: list[tuple[Path, int, int]] = field(default_factory=list)
    during: Callable[[], None] = lambda: None

    def why_not(self, directory: Path) -> str:
        return self.reason

    def give_back_zeros(self, file: Path, offset: int, most_bytes: int) -> int | None:
        self.steps.append((file, offset, most_bytes))
        self.during()
        if self.problem:
            raise PreconditionFailed(self.problem)
        return self.following.pop(0) if self.following else None
