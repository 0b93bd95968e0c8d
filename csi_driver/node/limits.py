"""How much work of each kind runs at once on this node: short heavy work, and the reading of whole volumes."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager

from csi_driver.deadline import Deadline
from csi_driver.errors import DeadlineReached


class HeavyWork:
    """A limited number of places; who finds none waits inside its RPC, so that a boot storm meets no errors.

    Formatting, checking and growing take seconds and have the places. To read a whole volume may take hours: who does
    that gives its place to others meanwhile, so that a few large old volumes do not hold up every other one. As many
    volumes are read at once as there are places.
    """

    def __init__(self, places: int) -> None:
        self.places = places
        self._places = threading.BoundedSemaphore(places)
        self._lock = threading.Lock()
        self._running = self._waiting = 0
        self._readers = threading.BoundedSemaphore(places)

    @contextmanager
    def place(self, what: str, *, deadline: Deadline) -> Iterator[None]:
        """Hold a place for the block. Raises `DeadlineReached` when none came free; `what` names the work."""
        with self._counted(waiting=1):
            is_in = self._places.acquire(timeout=deadline.remaining_s())
        if not is_in:
            raise DeadlineReached(f"a place among the heavy operations of this node to {what}")
        try:
            with self._counted(running=1):
                yield
        finally:
            self._places.release()

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
        self._places.release()
        try:
            with self._readers:
                yield
        finally:
            self._places.acquire()
