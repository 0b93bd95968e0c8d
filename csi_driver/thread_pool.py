# SPDX-License-Identifier: Apache-2.0
"""Threads for calls that may hang: they can be replaced, end when they are idle, and few compute at the same time."""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from functools import partial
from queue import Empty, SimpleQueue
from typing import Any, ParamSpec, TypeVar

_LOG = logging.getLogger(__name__)

T = TypeVar("T")
P = ParamSpec("P")

IDLE_S = 10.0
"""An idle thread of a pool ends after this time, and its timer's."""
LOST_LIMIT = 512
"""Threads of a pool that may be replaced because they hang; beyond it the working threads get fewer."""
TICK_S = 0.01
"""While jobs are queued, the running ones are checked at this interval."""
_BUSY_S = 0.0001  # a job that got less processor time since the last check is blocked
_LONG_S = 0.1  # a job that computes for longer does not delay others: the scan of a volume takes hours


class Job(Future[T]):
    """A job of a `Pool`, and its result."""

    def __init__(self, work: Callable[[], T]) -> None:
        super().__init__()
        self.thread = 0
        """Identifier of its thread; 0 while it is queued."""
        self.began_s, self.processor_s = 0.0, float("-inf")  # unknown before the first check
        self.late_s: float | None = None
        self.late: Callable[[int], object] = lambda _thread: None
        self.is_lost = False
        """Whether its thread was replaced because it hangs."""
        self._work = work

    def run(self) -> Callable[[], object]:
        """Run the job, and return what settles its future."""
        if not self.set_running_or_notify_cancel():
            return lambda: None
        try:
            result = self._work()
        except BaseException as error:
            return partial(self.set_exception, error)
        return partial(self.set_result, result)

    def is_busy(self, now_s: float) -> bool:
        """Return whether the job computes, so that another one would only compete with it."""
        if now_s - self.began_s < TICK_S:
            return True
        before_s, self.processor_s = self.processor_s, _processor_s(self.thread)
        return now_s - self.began_s < _LONG_S and self.processor_s - before_s >= _BUSY_S


def _processor_s(thread: int) -> float:
    """Return the processor time that a thread of this process, which has not ended, has taken."""
    return time.clock_gettime(time.pthread_getcpuclockid(thread))


class _Thread(threading.Thread):
    """A thread of a pool, and the queue that gives it its jobs."""

    def __init__(self, pool: Pool, name: str) -> None:
        super().__init__(name=name, daemon=True)
        self.jobs: SimpleQueue[Job[Any]] = SimpleQueue()
        self._pool = pool

    def run(self) -> None:
        while self._pool._run_next(self):
            pass


class Pool(ThreadPoolExecutor):
    """Runs jobs in at most `most` daemon threads, which end when they are idle.

    At most `at_once` jobs compute at the same time, and the others are queued without a thread: threads that alternate
    at the interpreter's lock take twice the processor time. A blocked job does not count, nor does one that runs for
    long: a job that hangs in the kernel delays others by two or three ticks, and keeps its thread, which is replaced
    once the job is late or written off.

    A `ThreadPoolExecutor`, because gRPC takes nothing else. Its own threads are never started: at exit the interpreter
    would wait for them.
    """

    def __init__(self, name: str, most: int, at_once: int | None = None) -> None:
        super().__init__(1)
        self._name = name
        self._most = most
        self._at_once = at_once or most
        self._lock = threading.Lock()
        self._queue: deque[Job[Any]] = deque()
        self._running: dict[int, Job[Any]] = {}
        self._busy: set[Job[Any]] = set()
        self._idle: list[_Thread] = []
        """The last one is used first, so that the others can end."""
        self._thread_count = self._lost = 0
        self._timer = threading.Condition(self._lock)
        self._timer_s: float | None = None
        """When the timer's thread looks at the jobs; None while it has no thread."""

    def submit(self, work: Callable[P, T], /, *args: P.args, **kwargs: P.kwargs) -> Job[T]:
        """Queue a job. Cancelling it drops it unless it has begun."""
        job = Job(partial(work, *args, **kwargs))
        with self._lock:
            self._queue.append(job)
            self._begin_jobs()
        return job

    def shutdown(self, wait: bool = True, *, cancel_futures: bool = False) -> None:
        """Drop the queued jobs; the running ones continue."""
        with self._lock:
            dropped = list(self._queue)
            self._queue.clear()
        for job in dropped:
            job.cancel()

    def write_off(self, job: Job[Any]) -> None:
        """Replace the thread of a job that hangs."""
        with self._lock:
            if self._running.get(job.thread) is job and not job.is_lost and self._lost < LOST_LIMIT:
                job.is_lost = True
                self._lost += 1
                self._begin_jobs()

    def when_late(self, at_s: float, late: Callable[[int], object]) -> Callable[[], bool]:
        """Write off the job that calls this, and call `late` with its thread, if it still runs at `at_s`.

        Return a function that ends this; it returns whether `late` was called.
        """
        with self._lock:
            job = self._running[threading.get_ident()]
            job.late_s, job.late = at_s, late
            self._wake_timer(at_s)

        def was_late() -> bool:
            with self._lock:
                late_s, job.late_s = job.late_s, None
                return late_s is None

        return was_late

    def _begin_jobs(self) -> None:
        """Give queued jobs to idle or new threads. The lock is held, as in all that follow."""
        while self._queue and (self._idle or self._thread_count - self._lost < self._most):
            if len(self._busy) >= self._at_once:
                self._wake_timer(time.monotonic() + TICK_S)
                return
            if not self._idle:
                thread = _Thread(self, self._name)
                if not self._is_started(thread):
                    return
                self._thread_count += 1
                self._idle.append(thread)
            thread, job = self._idle.pop(), self._queue.popleft()
            job.thread, job.began_s = thread.ident or 0, time.monotonic()
            self._running[job.thread] = job
            self._busy.add(job)
            thread.jobs.put(job)

    def _is_started(self, thread: threading.Thread) -> bool:
        """Start a thread; False at a limit of the machine, after which the next job that comes or ends tries again."""
        try:
            thread.start()
        except RuntimeError as error:
            _LOG.error("the thread %s cannot be started: %s", thread.name, error)
            return False
        return True

    def _run_next(self, thread: _Thread) -> bool:
        """Run the next job of a thread; False when none came or its thread was replaced: it ends."""
        job = self._wait_for_job(thread)
        if job is None:
            return False
        settle = job.run()
        with self._lock:
            del self._running[job.thread]
            self._busy.discard(job)
            if job.is_lost:
                self._lost -= 1
                self._thread_count -= 1
            else:
                self._idle.append(thread)
            self._begin_jobs()
        settle()
        return not job.is_lost

    def _wait_for_job(self, thread: _Thread) -> Job[Any] | None:
        with suppress(Empty):
            return thread.jobs.get(timeout=IDLE_S)
        with self._lock:
            if thread in self._idle:
                self._idle.remove(thread)
                self._thread_count -= 1
                return None
        return thread.jobs.get()

    def _wake_timer(self, at_s: float) -> None:
        """Let the timer look at the jobs at `at_s` at the latest."""
        if self._timer_s is None:
            timer = threading.Thread(target=self._keep_time, name=f"{self._name}-timer", daemon=True)
            self._timer_s = at_s if self._is_started(timer) else None
        elif at_s < self._timer_s:
            self._timer_s = at_s
            self._timer.notify()

    def _keep_time(self) -> None:
        with self._lock:
            while self._running or self._queue:
                wait_s = (self._timer_s or 0.0) - time.monotonic()
                if wait_s > 0:
                    self._timer.wait(wait_s)
                else:
                    self._timer_s = time.monotonic() + IDLE_S
                    self._look_at_jobs(time.monotonic())
            self._timer_s = None

    def _look_at_jobs(self, now_s: float) -> None:
        for job in list(self._running.values()):
            if job.late_s is not None and job.late_s <= now_s:
                self._tell_late(job)
            elif job.late_s is not None:
                self._wake_timer(job.late_s)
        if self._queue:
            self._busy = {job for job in self._running.values() if job.is_busy(now_s)}
            self._begin_jobs()

    def _tell_late(self, job: Job[Any]) -> None:
        job.late_s = None
        self._lock.release()
        try:
            self.write_off(job)
            job.late(job.thread)
        except Exception:
            _LOG.exception("a late job of the pool %s could not be reported", self._name)
        finally:
            self._lock.acquire()


class SharedJobs:
    """Jobs that run, by key: who starts one again gets the one that runs."""

    def __init__(self) -> None:
        self._lock = threading.RLock()  # a job that is done at once is forgotten in the thread that starts it
        self._jobs: dict[tuple[str, ...], Job[None]] = {}

    def start(self, pool: Pool, key: tuple[str, ...], work: Callable[[], None]) -> Job[None]:
        with self._lock:
            job = self._jobs.get(key)
            if job is None or job.done():
                job = self._jobs[key] = pool.submit(work)
                job.add_done_callback(partial(self._forget, key))
            return job

    def _forget(self, key: tuple[str, ...], job: Future[None]) -> None:
        with self._lock:
            if self._jobs.get(key) is job:
                del self._jobs[key]

    def running(self, *begin: str) -> list[Job[None]]:
        """Return the jobs with keys that begin with these words."""
        with self._lock:
            return [job for key, job in self._jobs.items() if key[: len(begin)] == begin]
