"""How much work of each kind runs at once on this node: short heavy work, and the reading of whole volumes."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

from csi_driver.deadline import Deadline
from csi_driver.errors import DeadlineReached

LENT_AFTER_S = 10 * 60.0
"""How long a place is held before it no longer counts: what hangs with its device keeps no other volume waiting."""
READING_LENT_AFTER_S = 4 * 3600.0


class _Places:
    """So many places; one that is held for longer than `lent_after_s` does not count any more."""

    def __init__(self, count: int, lent_after_s: float) -> None:
        self._count = count
        self._lent_after_s = lent_after_s
        self._changed = threading.Condition()
        self._taken_s: dict[object, float] = {}

    def take(self, timeout_s: float | None = None) -> object | None:
        """Return a place once there is one, None when there was none within the time; without a time, wait for it."""
        end_s = None if timeout_s is None else time.monotonic() + timeout_s
        place = object()
        with self._changed:
            while (free_in_s := self._free_in_s()) > 0:
                left_s = free_in_s if end_s is None else min(free_in_s, end_s - time.monotonic())
                if left_s <= 0:
                    return None
                self._changed.wait(left_s)
            self._taken_s[place] = time.monotonic()
        return place

    def give_back(self, place: object) -> None:
        """Let another have the place."""
        with self._changed:
            del self._taken_s[place]
            self._changed.notify_all()

    def _free_in_s(self) -> float:
        """Return when there is a place at the latest, 0 = now. The lock is held."""
        counting = sorted(self._lent_after_s - (time.monotonic() - began_s) for began_s in self._taken_s.values())
        return counting[len(counting) - self._count] if len(counting) >= self._count else 0.0


class HeavyWork:
    """A limited number of places; who finds none waits inside its RPC, so that a boot storm meets no errors.

    Formatting, checking and growing take seconds and have the places. To read a whole volume may take hours: who does
    that gives its place to others meanwhile, so that a few large old volumes do not hold up every other one. As many
    volumes are read at once as there are places. A place is lent to others when its work takes very long: the device
    may hang, and its tool is never killed (`host.command`).
    """

    def __init__(self, places: int) -> None:
        self.places = places
        self._places = _Places(places, LENT_AFTER_S)
        self._readers = _Places(places, READING_LENT_AFTER_S)
        self._held = threading.local()
        self._lock = threading.Lock()
        self._running = self._waiting = 0

    @contextmanager
    def place(self, what: str, *, deadline: Deadline) -> Iterator[None]:
        """Hold a place for the block. Raises `DeadlineReached` when none came free; `what` names the work."""
        with self._counted(waiting=1):
            place = self._places.take(deadline.remaining_s())
        if place is None:
            raise DeadlineReached(f"a place among the heavy operations of this node to {what}")
        self._held.place = place
        try:
            with self._counted(running=1):
                yield
        finally:
            self._places.give_back(self._held.place)

    def under_way(self) -> tuple[int, int]:
        """Return how many operations run, those that read a whole volume included, and how many wait for a place."""
        with self._lock:
            return self._running, self._waiting

    @contextmanager
    def _counted(self, *, running: int = 0, waiting: int = 0) -> Iterator[None]:
        with self._lock:
            self._running, self._waiting = self._running + running, self._waiting + waiting
        try:
            yield
        finally:
            with self._lock:
                self._running, self._waiting = self._running - running, self._waiting - waiting

    @contextmanager
    def reading(self) -> Iterator[None]:
        """Give up the place that is held, for a block that reads a whole volume, and take one again afterwards.

        Both are waited for as long as it takes: what was read must not have to be read again.
        """
        self._places.give_back(self._held.place)
        try:
            reader = self._readers.take()
            try:
                yield
            finally:
                self._readers.give_back(reader)
        finally:
            self._held.place = self._places.take()
