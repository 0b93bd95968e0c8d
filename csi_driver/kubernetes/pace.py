"""When to look again, and the thread that does."""

from __future__ import annotations

import random
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from types import TracebackType
from typing import Self

_FIRST_PAUSE_S = 1.0


@dataclass(slots=True)
class Backoff:
    """Pauses after failures: doubled with every one, and never the same for a thousand nodes at once."""

    longest_s: float
    jitter: Callable[[], float] = random.random
    _failures: int = 0

    def after_failure_s(self) -> float:
        """Return how long to wait after one more failure."""
        longest_s = min(_FIRST_PAUSE_S * float(1 << min(self._failures, 16)), self.longest_s)
        self._failures += 1
        return longest_s * (0.5 + 0.5 * self.jitter())

    def succeeded(self) -> None:
        """Begin anew with the shortest pause."""
        self._failures = 0


@dataclass(slots=True)
class Tending:
    """Calls `tend` in a thread inside its block, again after as many seconds as each call returns.

    The thread is a daemon: a request that hangs must not keep the program from ending.
    """

    tend: Callable[[], float]
    name: str
    _ended: threading.Event = field(default_factory=threading.Event)

    def __enter__(self) -> Self:
        threading.Thread(target=self._run, name=self.name, daemon=True).start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._ended.set()

    def _run(self) -> None:
        while not self._ended.is_set():
            self._ended.wait(self.tend())
