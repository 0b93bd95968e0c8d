# SPDX-License-Identifier: Apache-2.0
"""Calls that may hang in the kernel, and the number of heavy operations that run at once.

A thread that waits for a dead device cannot be ended. `Watchdog` runs such calls in threads that it can abandon, so
that one dead volume delays no other.
"""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import CancelledError
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Generic, TypeVar

from csi_driver.deadline import Deadline
from csi_driver.errors import DeadlineReached, DriverError, StorageUnavailable, same_again
from csi_driver.thread_pool import Job, Pool

WORKERS = 32
"""Threads of a watchdog, not counting those that hang and were replaced."""
SLOT_TIMEOUT_S = 10 * 60.0
"""Age at which an operation stops to count against the limit: its device may hang for days."""
SCAN_TIMEOUT_S = 4 * 3600.0  # the same for the read of a whole volume
_FRAMES_SHOWN = 3
_PACKAGE = __name__.partition(".")[0] + "."

Result = TypeVar("Result")


class NotResponding(StorageUnavailable):
    """A filesystem or device did not respond in time; `waits_in`: functions of its thread."""

    def __init__(self, message: str, waits_in: str) -> None:
        self.waits_in = waits_in
        super().__init__(message + f" (it waits in {waits_in})" * bool(waits_in))


def functions_of(thread: int) -> str:
    """Name the innermost driver functions that a thread is in, outermost first; empty for one that has ended."""
    found: list[str] = []
    frame = sys._current_frames().get(thread)
    while frame is not None and len(found) < _FRAMES_SHOWN:
        module, function = frame.f_globals.get("__name__", ""), frame.f_code.co_name
        if module.startswith(_PACKAGE) and module != __name__ and function.isidentifier():
            found.append(f"{module.removeprefix(_PACKAGE)}.{function}")
        frame = frame.f_back
    return " > ".join(reversed(found))


@dataclass(slots=True)
class _Call(Generic[Result]):
    """A call in progress. `has_timed_out`: a caller gave up."""

    about: str
    job: Job[Result]
    has_timed_out: bool = False


class Watchdog(Generic[Result]):
    """Runs one call per volume at a time, in threads that are replaced when a call hangs."""

    def __init__(self, name: str, workers: int | None = None) -> None:
        self._lock = threading.Lock()
        self._calls: dict[str, _Call[Result]] = {}
        self._pool = Pool(name, workers or WORKERS)

    def call(self, volume: str, about: str, work: Callable[[], Result], timeout_s: float) -> Result:
        """Run `work` in a thread and return its result; a running call about the same is shared.

        Raises `NotResponding` after `timeout_s`, or at once while a call of the volume that timed out still runs.
        """
        deadline = Deadline.after(timeout_s)
        while True:
            with self._lock:
                call = self._calls.get(volume)
                if call is None:
                    call = self._calls[volume] = _Call(about, self._pool.submit(self._run, volume, work))
                elif call.has_timed_out:
                    raise NotResponding(f"{call.about} of volume {volume} is still blocked", self._waits_in(call))
            try:
                failure = call.job.exception(deadline.remaining_s())
            except TimeoutError:
                self._time_out(volume, call)
                message = f"{call.about} of volume {volume} did not respond in time"
                raise NotResponding(message, self._waits_in(call)) from None
            except CancelledError:
                continue  # another caller gave up before it began
            if call.about == about:
                return self._outcome(call, failure)

    def _run(self, volume: str, work: Callable[[], Result]) -> Result:
        try:
            return work()
        finally:
            with self._lock:
                del self._calls[volume]

    def _time_out(self, volume: str, call: _Call[Result]) -> None:
        self._pool.write_off(call.job)
        with self._lock:
            call.has_timed_out = True
            if call.job.cancel() and self._calls.get(volume) is call:  # else another caller has cancelled it
                del self._calls[volume]

    @staticmethod
    def _waits_in(call: _Call[Result]) -> str:
        return functions_of(call.job.thread)

    @staticmethod
    def _outcome(call: _Call[Result], failure: BaseException | None) -> Result:
        if isinstance(failure, DriverError):
            raise same_again(failure) from failure
        if isinstance(failure, Exception):
            raise RuntimeError(f"the call about {call.about} ended by a bug") from failure
        return call.job.result()  # raises what ends the program


class _Slots:
    """A number of slots. One that is held for longer than `timeout_s` does not count any more."""

    def __init__(self, count: int, timeout_s: float) -> None:
        self._count = count
        self._timeout_s = timeout_s
        self._changed = threading.Condition()
        self.taken_s: dict[object, float] = {}
        self.waiting = 0

    def take(self, within_s: float | None = None) -> object | None:
        """Take a slot, waiting up to `within_s` (None: for ever); None if there was none."""
        end_s = None if within_s is None else time.monotonic() + within_s
        slot = object()
        with self._changed:
            self.waiting += 1
            try:
                while (free_in_s := self._free_in_s()) > 0:
                    left_s = free_in_s if end_s is None else min(free_in_s, end_s - time.monotonic())
                    if left_s <= 0:
                        return None
                    self._changed.wait(left_s)
                self.taken_s[slot] = time.monotonic()
            finally:
                self.waiting -= 1
        return slot

    def give_back(self, slot: object) -> None:
        with self._changed:
            del self.taken_s[slot]
            self._changed.notify()  # one is enough: who waits also wakes when a taken slot stops to count

    def _free_in_s(self) -> float:
        """Return the time until a slot is free at the latest; 0 = now. The lock is held."""
        counting = sorted(self._timeout_s - (time.monotonic() - began_s) for began_s in self.taken_s.values())
        return counting[len(counting) - self._count] if len(counting) >= self._count else 0.0


class HeavyOperations:
    """Limits how many volumes are formatted, checked, grown or opened at once (--heavy-operations).

    A call without a slot waits inside its RPC. The read of a whole volume takes hours, so it has slots of its own.
    """

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self._slots = _Slots(limit, SLOT_TIMEOUT_S)
        self._scans = _Slots(limit, SCAN_TIMEOUT_S)
        self._held = threading.local()

    @contextmanager
    def slot(self, operation: str, *, deadline: Deadline) -> Iterator[None]:
        """Hold a slot for the block. Raises `DeadlineReached` if none came free in time."""
        slot = self._slots.take(deadline.remaining_s())
        if slot is None:
            raise DeadlineReached(f"a free slot (--heavy-operations) to {operation}")
        self._held.slot = slot
        try:
            yield
        finally:
            self._slots.give_back(self._held.slot)

    @contextmanager
    def scan(self) -> Iterator[None]:
        """Exchange the held slot for a scan slot during the block; waits without limit for both."""
        self._slots.give_back(self._held.slot)
        try:
            scan = self._scans.take()
            try:
                yield
            finally:
                self._scans.give_back(scan)
        finally:
            self._held.slot = self._slots.take()

    def running_and_waiting(self) -> tuple[int, int]:
        """Return how many operations run, including scans, and how many wait for a slot."""
        slots = (self._slots, self._scans)
        return sum(len(each.taken_s) for each in slots), sum(each.waiting for each in slots)
