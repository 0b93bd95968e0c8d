# SPDX-License-Identifier: Apache-2.0
"""A model of held writes: files that are frozen, also after the manager was killed."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from csi_driver.errors import NotFreezable


@dataclass(slots=True)
class FakeFreezes:
    """`at_point` is called after each change; an exception that is no Exception is the end of the process."""

    at_point: Callable[[str], None] = lambda point: None
    frozen: set[Path] = field(default_factory=set)
    refuses: str = ""
    """Why the next freezes fail."""
    written: bool = False
    """Whether a file is written while writes are held."""
    held_ever: list[list[str]] = field(default_factory=list)
    exports_ever: list[list[str]] = field(default_factory=list)

    @contextmanager
    def held(
        self, files: Sequence[Path], exports: Sequence[str] = (), *, limit_s: float
    ) -> Iterator[Callable[[], None]]:
        if self.refuses:
            raise NotFreezable(self.refuses)
        self.held_ever.append([file.name for file in files])
        self.exports_ever.append(list(exports))
        self.frozen |= set(files)

        def end() -> None:
            self.frozen.clear()
            self.at_point("freezes.end")
            if self.written:
                raise NotFreezable("a volume was written")

        try:
            self.at_point("freezes.held")
            yield end
        except Exception:
            self.frozen.clear()
            raise
        self.frozen.clear()

    def recover(self) -> bool:
        self.frozen.clear()
        return True
