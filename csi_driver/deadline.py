# SPDX-License-Identifier: Apache-2.0
"""A clock that tests can replace, and the deadline of an RPC.

Every wait takes a `Deadline`, so that it ends before the caller's timeout, and a retry continues.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Protocol


class Clock(Protocol):
    """Monotonic time and sleeping; seconds."""

    def monotonic(self) -> float: ...

    def sleep(self, seconds: float) -> None: ...


class SystemClock:
    """The clock of the machine."""

    def monotonic(self) -> float:
        return time.monotonic()

    def sleep(self, seconds: float) -> None:
        time.sleep(seconds)


SYSTEM_CLOCK: Clock = SystemClock()


@dataclass(frozen=True, slots=True)
class Deadline:
    """A moment on a clock; made by `Deadline.after`."""

    at_s: float
    started_s: float
    clock: Clock = field(default=SYSTEM_CLOCK, compare=False)

    @classmethod
    def after(cls, seconds: float, clock: Clock = SYSTEM_CLOCK) -> Deadline:
        """Return the deadline `seconds` from now."""
        now = clock.monotonic()
        return cls(now + seconds, now, clock)

    def remaining_s(self) -> float:
        """Seconds left, never below zero."""
        return max(0.0, self.at_s - self.clock.monotonic())

    def elapsed_s(self) -> float:
        """Seconds since this deadline was made."""
        return self.clock.monotonic() - self.started_s

    def expired(self) -> bool:
        """Return whether no time is left."""
        return self.clock.monotonic() >= self.at_s

    def earlier(self, seconds: float) -> Deadline:
        """Return the deadline `seconds` before this one."""
        return Deadline(self.at_s - seconds, self.started_s, self.clock)

    def at_most(self, seconds: float) -> Deadline:
        """Return this deadline, or the moment `seconds` from now if that comes first."""
        return Deadline(min(self.at_s, self.clock.monotonic() + seconds), self.started_s, self.clock)

    def wait_until(self, ready: Callable[[], bool], *, first_s: float = 0.01, most_s: float = 0.5) -> bool:
        """Call `ready` at growing intervals, at least once, until it returns True or no time is left (False)."""
        pause_s = first_s
        while not ready():
            left_s = self.remaining_s()
            if left_s <= 0:
                return False
            self.clock.sleep(min(pause_s, left_s))
            pause_s = min(pause_s * 2, most_s)
        return True
