"""How much heavy work (formatting, checking, growing) runs at once on this node."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager

from csi_driver.deadline import Deadline
from csi_driver.errors import DeadlineReached


class HeavyWork:
    """A limited number of places; who finds none waits inside its RPC, so that a boot storm meets no errors."""

    def __init__(self, places: int) -> None:
        self._places = threading.BoundedSemaphore(places)

    @contextmanager
    def place(self, what: str, *, deadline: Deadline) -> Iterator[None]:
        """Hold a place for the block. Raises `DeadlineReached` when none came free; `what` names the work."""
        if not self._places.acquire(timeout=deadline.remaining_s()):
            raise DeadlineReached(f"a place among the heavy operations of this node to {what}", deadline.elapsed_s())
        try:
            yield
        finally:
            self._places.release()
