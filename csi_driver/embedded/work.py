"""Work that goes on after a request: what could not be done at once is tried again, and tests may hold it back."""

from __future__ import annotations

import heapq
import logging
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from csi_driver.deadline import SYSTEM_CLOCK, Clock
from csi_driver.errors import DriverError

_log = logging.getLogger(__name__)


class Locks:
    """One lock per name, made when needed and forgotten when free."""

    def __init__(self) -> None:
        self._guard = threading.Lock()
        self._locks: dict[str, tuple[threading.Lock, int]] = {}

    @contextmanager
    def hold(self, name: str) -> Iterator[None]:
        """Hold the lock of `name`, waiting for whoever has it."""
        with self._guard:
            lock, users = self._locks.get(name, (threading.Lock(), 0))
            self._locks[name] = (lock, users + 1)
        try:
            with lock:
                yield
        finally:
            with self._guard:
                lock, users = self._locks[name]
                if users == 1:
                    del self._locks[name]
                else:
                    self._locks[name] = (lock, users - 1)


class Worker:
    """A thread that does jobs at their time. A job is known by its key; one that returns False is tried again."""

    def __init__(self, first_s: float, most_s: float, clock: Clock = SYSTEM_CLOCK) -> None:
        self._first_s = first_s
        self._most_s = most_s
        self._clock = clock
        self._wake = threading.Condition()
        self._jobs: dict[str, tuple[float, Callable[[], bool]]] = {}
        self._times: list[tuple[float, str]] = []
        self._pauses: dict[str, float] = {}
        self._stopping = False
        self._thread = threading.Thread(target=self._run, name="storage-worker", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def stop(self) -> None:
        """Finish the job under way and end; the others are found again at the next start."""
        with self._wake:
            self._stopping = True
            self._wake.notify_all()
        if self._thread.is_alive():
            self._thread.join()

    def later(self, key: str, job: Callable[[], bool], delay_s: float | None = None) -> None:
        """Do `job` after `delay_s`, or after the next pause of this key. An earlier time for the key stands."""
        with self._wake:
            if delay_s is None:
                delay_s = self._pauses.get(key, self._first_s)
                self._pauses[key] = min(delay_s * 2, self._most_s)
            due = self._clock.monotonic() + delay_s
            if key in self._jobs:
                due = min(due, self._jobs[key][0])
            self._jobs[key] = (due, job)
            heapq.heappush(self._times, (due, key))
            self._wake.notify_all()

    def settled(self, key: str) -> None:
        """Forget how long this key has been tried."""
        with self._wake:
            self._pauses.pop(key, None)

    def run_due(self) -> int:
        """Do the jobs whose time has come; return how many. The thread's own step, and what tests call."""
        done = 0
        while (taken := self._take()) is not None:
            key, job = taken
            done += 1
            try:
                finished = job()
            except DriverError as problem:
                _log.warning("%s could not be done and is tried again: %s", key, problem)
                finished = False
            if finished:
                self.settled(key)
            else:
                self.later(key, job)
        return done

    def _take(self) -> tuple[str, Callable[[], bool]] | None:
        with self._wake:
            now = self._clock.monotonic()
            while self._times and self._times[0][0] <= now and not self._stopping:
                due, key = heapq.heappop(self._times)
                if key in self._jobs and self._jobs[key][0] == due:
                    return key, self._jobs.pop(key)[1]
            return None

    def _run(self) -> None:
        while True:
            self.run_due()
            with self._wake:
                if self._stopping:
                    return
                wait_s = self._times[0][0] - self._clock.monotonic() if self._times else None
                if wait_s is None or wait_s > 0:
                    self._wake.wait(wait_s)


class Holds:
    """Work that tests hold back: "initialize", "encrypt", "reclaim", "delete", "client:<name>" (it is DOWN),
    "slow:<name>" (it is not)."""

    def __init__(self) -> None:
        self._held: frozenset[str] = frozenset()

    def __contains__(self, kind: str) -> bool:
        return kind in self._held

    def set(self, kind: str, held: bool) -> None:
        self._held = self._held | {kind} if held else self._held - {kind}
