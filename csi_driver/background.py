# SPDX-License-Identifier: Apache-2.0
"""All long-lived threads but those of `thread_pool`: periodic work, a queue of retried jobs, and detached calls.

No exception ends `Periodic`, `SelfPaced` and `Worker`: it is logged, counted, and the work is retried. `why_stuck`
reports a run that does not return, which a restart may cure (`/healthz`); `why_failing` a lasting failure (`/readyz`).

Only this module, `thread_pool` and `csi_driver.rpc.boundary` may catch `Exception`. The threads are daemons: a call
that hangs must not keep the process from exiting.
"""

from __future__ import annotations

import heapq
import logging
import random
import threading
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import KW_ONLY, dataclass, field
from typing import Self, TypeVar

from csi_driver.deadline import SYSTEM_CLOCK, Clock
from csi_driver.errors import DriverError

_LOG = logging.getLogger(__name__)

T = TypeVar("T")

STALE_S = 600.0
"""Default limit of one run, and of a series of failures, before a health page reports it."""


@dataclass(slots=True)
class Backoff:
    """Pauses between retries: doubled up to `longest_s`, with jitter, so that nodes do not retry together."""

    longest_s: float
    jitter: Callable[[], float] = random.random
    first_s: float = 1.0
    _failures: int = 0

    def after_failure_s(self) -> float:
        """Count a failure and return the seconds until the retry."""
        pause_s = min(self.first_s * float(1 << min(self._failures, 16)), self.longest_s)
        self._failures += 1
        return pause_s * (0.5 + 0.5 * self.jitter())

    def succeeded(self) -> None:
        self._failures = 0


@dataclass(eq=False)
class Background:
    """A daemon thread that runs jobs one at a time, and the record of their failures. Base of the two kinds."""

    name: str
    _: KW_ONLY
    stale_s: float = STALE_S
    clock: Clock = SYSTEM_CLOCK
    failures: int = field(default=0, init=False)
    """Runs that raised an exception, since the start."""
    _record: threading.Lock = field(default_factory=threading.Lock, init=False)
    _running: tuple[str, float] | None = field(default=None, init=False)
    _failing: dict[str, tuple[float, str]] = field(default_factory=dict, init=False)
    _stopping: bool = field(default=False, init=False)
    _thread: threading.Thread | None = field(default=None, init=False)

    def start(self) -> None:
        thread = threading.Thread(target=self._run, name=self.name, daemon=True)
        thread.start()
        self._thread = thread

    def why_stuck(self) -> str:
        """Return why a restart of the process may help: a run does not return, or the thread has ended; else ""."""
        if self._thread is not None and not self._thread.is_alive() and not self._stopping:
            return f"the thread {self.name} has ended; restart the process"
        running = self._running  # read once: the thread sets it meanwhile
        if running is None or self._since_s(running[1]) <= self.stale_s:
            return ""
        key, began_s = running
        return f"{key} has been running for {self._since_s(began_s):.0f} s, expected at most {self.stale_s:.0f} s"

    def why_failing(self) -> str:
        """Return the job that is stuck or has failed for longer than the limit, and its error; else ""."""
        with self._record:
            oldest = min(((since_s, key, error) for key, (since_s, error) in self._failing.items()), default=None)
        if oldest is None or self._since_s(oldest[0]) <= self.stale_s:
            return self.why_stuck()
        return f"{oldest[1]} has failed for {self._since_s(oldest[0]):.0f} s: {oldest[2]}"

    def stalled_s(self) -> float:
        """Return for how long the oldest failing job has failed, or the present run has lasted; 0 when idle."""
        with self._record:
            moments = [since_s for since_s, _ in self._failing.values()]
        running = self._running
        if running is not None:
            moments.append(running[1])
        return self._since_s(min(moments)) if moments else 0.0

    def _since_s(self, moment_s: float) -> float:
        return self.clock.monotonic() - moment_s

    def _run(self) -> None:
        raise NotImplementedError

    def _attempt(self, key: str, job: Callable[[], T]) -> T | None:
        """Run a job and return its result; None after an exception, which is logged and recorded."""
        self._running = key, self.clock.monotonic()
        try:
            result = job()
        except DriverError as error:
            _LOG.warning("%s failed and will be retried: %s", key, error)
            why = str(error)
        except Exception as error:
            _LOG.exception("%s failed unexpectedly and will be retried", key)
            why = f"{type(error).__name__}: {error}"
        else:
            self._succeeded(key)
            return result
        finally:
            self._running = None
        with self._record:
            self.failures += 1
            self._failing[key] = self._failing.get(key, (self.clock.monotonic(), ""))[0], why
        return None

    def _succeeded(self, key: str) -> None:
        with self._record:
            self._failing.pop(key, None)


@dataclass(eq=False)
class Periodic(Background):
    """Runs `work` every `interval_s` (0: never) in a with-block. `stale_s` is at least three intervals by default."""

    work: Callable[[], object]
    interval_s: float
    _: KW_ONLY
    first_s: float = 0.0
    stale_s: float = 0.0
    _stopped: threading.Event = field(default_factory=threading.Event, init=False)

    def __post_init__(self) -> None:
        self.stale_s = self.stale_s or max(STALE_S, 3 * self.interval_s)

    def __enter__(self) -> Self:
        if self.interval_s > 0:
            self.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self.stop()

    def stop(self, *, wait_s: float = 0.0) -> None:
        """Begin no further run; wait at most `wait_s` for the present one."""
        self._stopping = True
        self._stopped.set()
        if self._thread is not None and wait_s:
            self._thread.join(wait_s)

    def run_once(self) -> float:
        """Run the work once, in the caller's thread, and return the seconds until it is due again."""
        self._attempt(self.name, self.work)
        return self.interval_s

    def _run(self) -> None:
        self._stopped.wait(self.first_s)
        while not self._stopped.is_set():
            self._stopped.wait(self.run_once())


@dataclass(eq=False)
class SelfPaced(Periodic):
    """Work that returns the seconds until its next run; after an exception `backoff` decides, else `interval_s`."""

    backoff: Backoff | None = None

    def run_once(self) -> float:
        pause_s = self._attempt(self.name, self.work)
        if not isinstance(pause_s, float | int):
            return self.interval_s if self.backoff is None else self.backoff.after_failure_s()
        if self.backoff is not None:
            self.backoff.succeeded()
        return pause_s


@dataclass(eq=False)
class Worker(Background):
    """Runs jobs when they are due. One that returns False or raises is retried after `first_s`, growing to `most_s`."""

    first_s: float
    most_s: float
    _wake: threading.Condition = field(default_factory=threading.Condition, init=False)
    _jobs: dict[str, tuple[float, Callable[[], bool]]] = field(default_factory=dict, init=False)
    _times: list[tuple[float, str]] = field(default_factory=list, init=False)
    _pauses: dict[str, float] = field(default_factory=dict, init=False)

    def stop(self, wait_s: float | None = None) -> None:
        """Finish the present job and end; the caller queues the others again after its next start.

        Waits for the job's end, at most `wait_s`.
        """
        with self._wake:
            self._stopping = True
            self._wake.notify_all()
        if self._thread is not None:
            self._thread.join(wait_s)

    def later(self, key: str, job: Callable[[], bool], delay_s: float | None = None) -> None:
        """Run `job` after `delay_s`, by default after the key's next pause. The earliest time of a key counts."""
        with self._wake:
            if delay_s is None:
                delay_s = self._pauses.get(key, self.first_s)
                self._pauses[key] = min(delay_s * 2, self.most_s)
            due = self.clock.monotonic() + delay_s
            if key in self._jobs:
                due = min(due, self._jobs[key][0])
            self._jobs[key] = (due, job)
            heapq.heappush(self._times, (due, key))
            self._wake.notify_all()

    def soon(self, key: str, job: Callable[[], bool], retry: Callable[[], bool] | None = None) -> None:
        """Run `job` in this thread; `retry` runs later, by default the same, if it fails or is not done."""
        try:
            if job():
                return
        except DriverError as error:
            _LOG.warning("%s failed and will be retried: %s", key, error)
        self.later(key, retry or job)

    def settled(self, key: str) -> None:
        self._succeeded(key)
        with self._wake:
            self._pauses.pop(key, None)

    def run_due(self) -> int:
        done = 0
        while (taken := self._take()) is not None:
            key, job = taken
            done += 1
            if self._attempt(key, job):
                self.settled(key)
            else:
                self.later(key, job)
        return done

    def _take(self) -> tuple[str, Callable[[], bool]] | None:
        with self._wake:
            now = self.clock.monotonic()
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
                wait_s = self._times[0][0] - self.clock.monotonic() if self._times else None
                if wait_s is None or wait_s > 0:
                    self._wake.wait(wait_s)


def run_detached(name: str, job: Callable[[], T]) -> Future[T]:
    """Run a job once in a daemon thread. Unexpected exceptions are logged, because the result may be unused."""
    future: Future[T] = Future()
    future.set_running_or_notify_cancel()

    def run() -> None:
        try:
            future.set_result(job())
        except BaseException as error:
            if not isinstance(error, (DriverError, OSError)):
                _LOG.exception("%s failed unexpectedly", name)
            future.set_exception(error)

    threading.Thread(target=run, name=name, daemon=True).start()
    return future
