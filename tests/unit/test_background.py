# SPDX-License-Identifier: Apache-2.0
"""Background threads: no exception ends them, and the health pages tell which is stuck or fails."""

from __future__ import annotations

import errno
import logging
import os
import threading
import uuid
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from csi_driver.background import STALE_S, Backoff, Periodic, SelfPaced, Worker, run_detached
from csi_driver.errors import HostFailure
from tests.fakes.clock import FakeClock

ERRORS = [HostFailure("no"), OSError(errno.EMFILE, os.strerror(errno.EMFILE)), RuntimeError("bug"), KeyError("bug")]


@pytest.fixture
def clock() -> FakeClock:
    return FakeClock()


@pytest.fixture
def name() -> str:
    """Of a thread that no other test has: theirs may still be about to end."""
    return f"loop-{uuid.uuid4()}"


def nothing() -> None:
    pass


def failing(errors: list[Exception], then: Callable[[], object] = nothing) -> Callable[[], Any]:
    """Return work that raises each of the errors once, and then does something else."""
    left: Iterator[Exception] = iter(errors)

    def work() -> object:
        error = next(left, None)
        if error is not None:
            raise error
        return then()

    return work


# --- periodic work ----------------------------------------------------------------------------------------------


def test_work_goes_on_in_its_thread_after_every_kind_of_exception(name: str) -> None:
    arrived = threading.Event()
    with Periodic(name, failing(ERRORS, arrived.set), 0.001) as loop:
        assert arrived.wait(60)
    assert loop.failures == len(ERRORS)


def test_an_interval_of_zero_never_runs(name: str) -> None:
    with Periodic(name, lambda: pytest.fail("it ran"), 0):
        assert not [thread for thread in threading.enumerate() if thread.name == name]


def test_no_run_begins_after_the_stop(name: str) -> None:
    begun = threading.Semaphore(0)
    with Periodic(name, begun.release, 3600):
        assert begun.acquire(timeout=60)
        (thread,) = [thread for thread in threading.enumerate() if thread.name == name]
        assert thread.daemon
    thread.join(60)
    assert not thread.is_alive()


def test_self_paced_work_returns_its_pause(clock: FakeClock) -> None:
    loop = SelfPaced("loop", failing([OSError("no")], lambda: 7.5), 60, clock=clock)
    assert [loop.run_once(), loop.run_once()] == [60, 7.5]


def test_periodic_work_returns_no_pause(clock: FakeClock) -> None:
    assert Periodic("loop", lambda: 0, 60, clock=clock).run_once() == 60


def test_only_unexpected_errors_are_logged_with_a_traceback(caplog: pytest.LogCaptureFixture, clock: FakeClock) -> None:
    loop = Periodic("sweep", failing([OSError("disk"), HostFailure("no tool")]), 60, clock=clock)
    loop.run_once()
    loop.run_once()
    unexpected, expected = caplog.records
    assert (unexpected.levelno, expected.levelno) == (logging.ERROR, logging.WARNING)
    assert unexpected.exc_info is not None
    assert unexpected.exc_info[1] is not None
    assert expected.exc_info is None
    assert expected.getMessage() == "sweep failed and will be retried: no tool"


def test_lasting_failures_are_reported_until_a_success(clock: FakeClock) -> None:
    loop = Periodic("sweep", failing([OSError("first"), OSError("second")]), 60, clock=clock)
    loop.run_once()
    clock.sleep(STALE_S)
    loop.run_once()
    assert loop.why_failing() == ""
    clock.sleep(1)
    assert loop.why_failing() == f"sweep has failed for {STALE_S + 1:.0f} s: OSError: second"
    assert loop.why_stuck() == ""
    assert loop.stalled_s() == STALE_S + 1
    loop.run_once()
    assert (loop.why_failing(), loop.stalled_s(), loop.failures) == ("", 0, 2)


def test_a_rare_loop_may_fail_for_three_intervals(clock: FakeClock) -> None:
    loop = Periodic("sweep", failing([OSError("no")]), 3600, clock=clock)
    loop.run_once()
    clock.sleep(3 * 3600)
    assert loop.why_failing() == ""
    clock.sleep(1)
    assert loop.why_failing()


def test_a_run_that_does_not_return_is_reported_as_stuck(clock: FakeClock, name: str) -> None:
    begun, go_on = threading.Event(), threading.Event()

    def work() -> float:
        begun.set()
        assert go_on.wait(60)
        return 3600

    loop = Periodic(name, work, 60, clock=clock)
    with loop:
        assert begun.wait(60)
        clock.sleep(STALE_S)
        assert loop.why_stuck() == ""
        clock.sleep(1)
        stuck = f"{name} has been running for {STALE_S + 1:.0f} s, expected at most {STALE_S:.0f} s"
        assert (loop.why_stuck(), loop.why_failing(), loop.stalled_s()) == (stuck, stuck, STALE_S + 1)
        go_on.set()
    loop.stop(wait_s=60)
    assert (loop.why_stuck(), loop.why_failing()) == ("", "")


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_a_thread_that_has_ended_by_itself_is_reported(name: str) -> None:
    def end() -> float:
        raise SystemExit

    loop = Periodic(name, end, 60)
    loop.start()
    for thread in threading.enumerate():
        if thread.name == name:
            thread.join(60)
    assert "has ended" in loop.why_stuck()


# --- jobs -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("error", ERRORS, ids=lambda error: type(error).__name__)
def test_a_job_is_retried_after_every_kind_of_exception(clock: FakeClock, error: Exception) -> None:
    worker = Worker("worker", 1, 8, clock=clock)
    job = failing([error] * 5)
    worker.later("job", lambda: job() is None, 0)
    ran = []
    for _ in range(25):
        ran.append(worker.run_due())
        clock.sleep(1)
    assert [second for second, runs in enumerate(ran) if runs] == [0, 1, 3, 7, 15, 23]
    assert (worker.failures, worker.why_failing()) == (5, "")


def test_a_failing_job_does_not_delay_others(clock: FakeClock) -> None:
    worker = Worker("worker", 1, 8, clock=clock)
    good = threading.Event()

    def bad() -> bool:
        raise OSError("bad")

    def set_good() -> bool:
        good.set()
        return True

    worker.later("bad", bad, 0)
    worker.later("good", set_good, 0)
    assert (worker.run_due(), good.is_set()) == (2, True)


def test_a_lasting_failure_of_a_job_is_reported_until_it_is_settled(clock: FakeClock) -> None:
    worker = Worker("worker", 1, 8, clock=clock)

    def bad() -> bool:
        raise OSError("disk")

    worker.later("remove v1", bad, 0)
    worker.run_due()
    clock.sleep(STALE_S + 1)
    assert worker.why_failing() == f"remove v1 has failed for {STALE_S + 1:.0f} s: OSError: disk"
    worker.settled("remove v1")
    assert worker.why_failing() == ""


def test_a_job_that_returns_false_is_no_failure(clock: FakeClock) -> None:
    worker = Worker("worker", 1, 8, clock=clock)
    worker.later("wait", lambda: False, 0)
    worker.run_due()
    clock.sleep(STALE_S + 1)
    assert (worker.why_failing(), worker.failures) == ("", 0)


def test_a_worker_survives_errors_and_stops(name: str) -> None:
    worker = Worker(name, 0.001, 0.001)
    done = threading.Event()
    job = failing(list(ERRORS), done.set)
    worker.start()
    worker.later("job", lambda: job() is None)
    assert done.wait(60)
    worker.stop()
    assert not [thread for thread in threading.enumerate() if thread.name == name]
    assert worker.why_stuck() == ""


# --- pauses -----------------------------------------------------------------------------------------------------


def test_pauses_double_until_a_success() -> None:
    backoff = Backoff(5, jitter=lambda: 1.0)
    assert [backoff.after_failure_s() for _ in range(5)] == [1, 2, 4, 5, 5]
    backoff.succeeded()
    assert backoff.after_failure_s() == 1


def test_a_pause_is_at_least_half_of_its_length() -> None:
    assert Backoff(5, jitter=lambda: 0.0).after_failure_s() == 0.5


# --- calls that may hang ----------------------------------------------------------------------------------------


def test_a_detached_call_returns_its_result_or_its_error(name: str) -> None:
    assert run_detached(name, lambda: 7).result(60) == 7
    with pytest.raises(KeyError):
        run_detached(name, failing([KeyError("no")])).result(60)


def test_only_an_unexpected_error_of_a_detached_call_is_logged(name: str, caplog: pytest.LogCaptureFixture) -> None:
    for error in ERRORS:
        assert run_detached(name, failing([error])).exception(60) is error
    assert [type(record.exc_info[1]) for record in caplog.records if record.exc_info] == [RuntimeError, KeyError]


def test_a_detached_call_runs_in_a_daemon_thread_of_its_own(name: str) -> None:
    thread = run_detached(name, threading.current_thread).result(60)
    assert (thread.name, thread.daemon) == (name, True)
