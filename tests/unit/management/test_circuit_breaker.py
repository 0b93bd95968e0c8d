# SPDX-License-Identifier: Apache-2.0
"""The circuit breaker of one server: admitted requests and probes."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor

import pytest

from csi_driver.deadline import Deadline
from csi_driver.errors import DeadlineReached
from csi_driver.management.failover import CircuitBreaker, FailedWhileQueued
from tests.fakes.clock import FakeClock


@pytest.fixture
def clock() -> FakeClock:
    return FakeClock(1000.0)


@pytest.fixture
def breaker(clock: FakeClock) -> CircuitBreaker:
    """The open breaker of a server that has just refused a connection."""
    made = CircuitBreaker("https://m1:4000", 1, clock)
    made.failed(0.001, timed_out=False)
    return made


def half_open(breaker: CircuitBreaker, clock: FakeClock) -> None:
    clock.sleep(60)
    assert breaker.take_probe()
    breaker.probe_ended(succeeded=True)


def test_a_failure_opens_the_breaker(breaker: CircuitBreaker) -> None:
    assert not breaker.is_closed()
    assert not breaker.take_probe()


def test_one_caller_starts_the_probe_after_the_pause(breaker: CircuitBreaker, clock: FakeClock) -> None:
    clock.sleep(1)
    assert [breaker.take_probe() for _ in range(3)] == [True, False, False]


def test_a_half_open_breaker_admits_one_trial(breaker: CircuitBreaker, clock: FakeClock) -> None:
    half_open(breaker, clock)
    assert not breaker.is_closed()
    assert [breaker.take_trial() for _ in range(3)] == [True, False, False]


def test_a_trial_that_was_not_used_is_granted_again(breaker: CircuitBreaker, clock: FakeClock) -> None:
    half_open(breaker, clock)
    breaker.take_trial()
    clock.sleep(10)
    assert breaker.take_trial()


def test_a_success_closes_the_breaker(breaker: CircuitBreaker, clock: FakeClock) -> None:
    half_open(breaker, clock)
    breaker.succeeded()
    assert breaker.is_closed()


def test_a_failed_trial_opens_the_breaker(breaker: CircuitBreaker, clock: FakeClock) -> None:
    half_open(breaker, clock)
    breaker.failed(0.001, timed_out=False)
    assert not breaker.take_trial()
    assert not breaker.take_probe()


def test_the_pause_grows_to_30_seconds(breaker: CircuitBreaker, clock: FakeClock) -> None:
    for _ in range(50):
        clock.sleep(30)
        assert breaker.take_probe()
        breaker.probe_ended(succeeded=False)
    clock.sleep(29)
    assert not breaker.take_probe()
    clock.sleep(2)
    assert breaker.take_probe()


def test_concurrent_failures_count_as_one(breaker: CircuitBreaker, clock: FakeClock) -> None:
    for _ in range(100):
        breaker.failed(0.001, timed_out=False)
    clock.sleep(0.6)
    assert breaker.take_probe()


def test_an_urgent_probe_does_not_wait_for_the_end_of_the_pause(breaker: CircuitBreaker, clock: FakeClock) -> None:
    assert not breaker.take_probe()
    assert breaker.take_probe(urgent=True)
    breaker.probe_ended(succeeded=False)
    assert not breaker.take_probe(urgent=True)
    clock.sleep(0.6)
    assert breaker.take_probe(urgent=True)


@pytest.mark.parametrize(("took_s", "timed_out", "fast"), [(0.01, False, True), (0.2, True, False), (9, False, False)])
def test_a_failure_is_fast_unless_a_request_waited_for_it(
    clock: FakeClock, took_s: float, timed_out: bool, fast: bool
) -> None:
    breaker = CircuitBreaker("https://m1:4000", 1, clock)
    before_s = clock.monotonic()
    breaker.failed(took_s, timed_out=timed_out)
    assert breaker.is_slow is not fast
    assert (breaker.slow_at_s >= before_s) is not fast


def test_a_later_request_did_not_wait(clock: FakeClock) -> None:
    breaker = CircuitBreaker("https://m1:4000", 1, clock)
    breaker.failed(30, timed_out=True)
    clock.sleep(1)
    assert breaker.slow_at_s < clock.monotonic()


def test_a_request_waits_for_a_running_probe(breaker: CircuitBreaker, clock: FakeClock) -> None:
    assert breaker.take_probe(urgent=True)
    threading.Timer(0.05, lambda: breaker.probe_ended(succeeded=True)).start()
    assert breaker.wait_for_probe(Deadline.after(10))


def test_without_a_running_probe_the_breaker_stays_open(breaker: CircuitBreaker) -> None:
    assert not breaker.wait_for_probe(Deadline.after(10))


def test_a_failure_drops_the_queue(clock: FakeClock) -> None:
    breaker = CircuitBreaker("https://m1:4000", 1, clock)
    deadline = Deadline.after(10)

    def queue() -> None:
        with breaker.slot(deadline):
            pass

    with ThreadPoolExecutor(4) as pool, breaker.slot(deadline):
        waiting = [pool.submit(queue) for _ in range(4)]
        assert deadline.wait_until(lambda: len(breaker._slot_freed._waiters) == 4)  # type: ignore[attr-defined]
        breaker.failed(0.2, timed_out=True)
        assert [type(one.exception(10)) for one in waiting] == [FailedWhileQueued] * 4


def test_the_wait_for_a_slot_ends_at_the_deadline(clock: FakeClock) -> None:
    breaker = CircuitBreaker("https://m1:4000", 1, clock)
    with breaker.slot(Deadline.after(1)), pytest.raises(DeadlineReached), breaker.slot(Deadline.after(0.05)):
        pytest.fail("two at once")


def test_no_more_requests_than_slots_run_at_once(clock: FakeClock) -> None:
    breaker = CircuitBreaker("https://m1:4000", 2, clock)
    inside, most = [0], [0]
    lock = threading.Lock()

    def ask(_: int) -> None:
        with breaker.slot(Deadline.after(20)):
            with lock:
                inside[0] += 1
                most[0] = max(most[0], inside[0])
            threading.Event().wait(0.001)
            with lock:
                inside[0] -= 1

    with ThreadPoolExecutor(32) as pool:
        list(pool.map(ask, range(320)))
    assert most == [2]


def test_a_failed_request_frees_its_slot(clock: FakeClock) -> None:
    breaker = CircuitBreaker("https://m1:4000", 1, clock)
    with pytest.raises(ValueError, match="any"), breaker.slot(Deadline.after(1)):
        raise ValueError("any")
    with breaker.slot(Deadline.after(1)):
        pass
