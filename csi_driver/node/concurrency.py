# SPDX-License-Identifier: Apache-2.0
"""Calls that may hang in the kernel, and the number of heavy operations that run at once.

A thread that waits for a dead device cannot be ended. `Watchdog` runs such calls in threads that it can abandon, so
that one dead volume delays no other; `rpc.boundary` runs every call that changes a volume in this way.
"""

from __future__ import annotations

import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Generic, TypeVar

from csi_driver.deadline import Deadline
from csi_driver.errors import DeadlineReached, DriverError, StorageUnavailable, same_again

WORKERS = 32
"""Threads of a watchdog, not counting those that hang and were replaced."""
LOST_LIMIT = 512  # threads that may be replaced because they hang; beyond it the working threads get fewer
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


@dataclass(slots=True)
class _Call(Generic[Result]):
    """A call in progress. `timed_out`: a caller gave up. `is_lost`: its thread was replaced."""

    about: str
    work: Callable[[], Result]
    done: threading.Event = field(default_factory=threading.Event)
    result: Result | None = None
    failure: DriverError | None = None
    interruption: BaseException | None = None
    has_result: bool = False
    timed_out: bool = False
    began: bool = False
    is_lost: bool = False
    thread: int = 0

    def run(self) -> None:
        try:
            self.result = self.work()
            self.has_result = True
        except DriverError as error:
            self.failure = error
        except BaseException as error:
            if isinstance(error, Exception):
                raise
            self.interruption = error  # ends the program: raised in the caller's thread

    def outcome(self) -> Result:
        if self.interruption is not None:
            raise self.interruption
        if self.failure is not None:
            raise same_again(self.failure) from self.failure
        if not self.has_result:
            raise RuntimeError(f"the call about {self.about} ended by a bug; see its traceback")
        return self.result  # type: ignore[return-value]  # None where that is the result

    def stack(self) -> str:
        """Name the innermost driver functions of the call's thread, outermost first."""
        found: list[str] = []
        frame = sys._current_frames().get(self.thread)
        while frame is not None and len(found) < _FRAMES_SHOWN:
            module, function = frame.f_globals.get("__name__", ""), frame.f_code.co_name
            if module.startswith(_PACKAGE) and module != __name__ and function.isidentifier():
                found.append(f"{module.removeprefix(_PACKAGE)}.{function}")
            frame = frame.f_back
        return " > ".join(reversed(found))


class Watchdog(Generic[Result]):
    """Runs one call per volume at a time, in daemon threads that are replaced when a call hangs."""

    def __init__(self, name: str, workers: int | None = None) -> None:
        self._name = name
        self._workers = workers or WORKERS
        self._changed = threading.Condition()
        self._open: dict[str, _Call[Result]] = {}
        self._waiting: deque[tuple[str, _Call[Result]]] = deque()
        self._threads = 0
        self._free = 0
        self._lost = 0

    def call(self, volume: str, about: str, work: Callable[[], Result], timeout_s: float) -> Result:
        """Run `work` in a thread and return its result; a running call about the same is shared.

        Raises `NotResponding` after `timeout_s`, or at once while a call of the volume that timed out still runs.
        """
        deadline = Deadline.after(timeout_s)
        while True:
            with self._changed:
                call = self._open.get(volume)
                if call is None:
                    call = _Call(about, work)
                    self._open[volume] = call
                    self._waiting.append((volume, call))
                    self._start_thread()
                elif call.timed_out:
                    raise NotResponding(f"{call.about} of volume {volume} is still blocked", call.stack())
            if not call.done.wait(deadline.remaining_s()):
                self._time_out(call)
                raise NotResponding(f"{call.about} of volume {volume} did not respond in time", call.stack())
            if call.about == about:
                return call.outcome()

    def _start_thread(self) -> None:
        """Wake a free thread for a waiting call, or start one. The lock is held."""
        if len(self._waiting) > self._free and self._threads < self._workers:
            # Not a DaemonPool: a thread that hangs in the kernel is written off and replaced.
            threading.Thread(target=self._serve, name=self._name, daemon=True).start()
            self._threads += 1
            self._free += 1
        self._changed.notify()

    def _time_out(self, call: _Call[Result]) -> None:
        with self._changed:
            call.timed_out = True
            if call.began and not call.is_lost and not call.done.is_set() and self._lost < LOST_LIMIT:
                call.is_lost = True
                self._lost += 1
                self._threads -= 1
                self._start_thread()

    def _serve(self) -> None:
        call: _Call[Result] | None = None
        try:
            while call is None or not call.is_lost:
                volume, call = self._next()
                self._run(volume, call)
        finally:
            with self._changed:
                if call is not None and call.is_lost:
                    self._lost -= 1
                else:  # ended by a bug: waiting calls get another thread
                    self._threads -= 1
                    self._free -= 1
                    self._start_thread()

    def _next(self) -> tuple[str, _Call[Result]]:
        with self._changed:
            while not self._waiting:
                self._changed.wait()
            volume, call = self._waiting.popleft()
            self._free -= 1
            call.began = True
            call.thread = threading.get_ident()
            return volume, call

    def _run(self, volume: str, call: _Call[Result]) -> None:
        try:
            if not call.timed_out:  # otherwise it has no caller any more
                call.run()
        finally:
            with self._changed:
                self._open.pop(volume, None)
                if not call.is_lost:
                    self._free += 1  # before `done`: the next caller can use this thread
                call.done.set()


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
            self._changed.notify_all()

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
