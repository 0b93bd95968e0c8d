# SPDX-License-Identifier: Apache-2.0
"""Pools of threads: a job that hangs, fails or computes for long takes nothing from the others."""

from __future__ import annotations

import threading
import time
import uuid
from collections.abc import Callable

import pytest

from csi_driver import thread_pool
from csi_driver.deadline import Deadline
from csi_driver.thread_pool import Pool


@pytest.fixture
def name() -> str:
    """Of threads that no other test has: theirs may still be about to end."""
    return f"pool-{uuid.uuid4()}"


def fail() -> None:
    raise RuntimeError("bug")


def test_a_pool_starts_threads_up_to_its_limit(name: str) -> None:
    pool, go_on, begun = Pool(name, 2), threading.Event(), threading.Semaphore(0)

    def wait() -> bool:
        begun.release()
        return go_on.wait(60)

    futures = [pool.submit(wait) for _ in range(3)]
    assert begun.acquire(timeout=60)
    assert begun.acquire(timeout=60)
    assert [thread.daemon for thread in threading.enumerate() if thread.name.startswith(name)] == [True, True]
    assert futures[2].cancel()
    go_on.set()
    assert [future.result(60) for future in futures[:2]] == [True, True]


def test_a_thread_of_a_pool_survives_an_error(name: str) -> None:
    pool = Pool(name, 1)
    with pytest.raises(RuntimeError):
        pool.submit(fail).result(60)
    assert pool.submit(lambda: 1).result(60) == 1
    assert len(threads(name)) == 1


def threads(name: str) -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name == name]


def until(state: Callable[[], bool]) -> None:
    assert Deadline.after(60).wait_until(state, first_s=0.001)


def test_idle_threads_of_a_pool_end_and_later_jobs_get_new_ones(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(thread_pool, "IDLE_S", 0.001)
    nothing_queued, look = threading.Event(), Pool._look_at_jobs

    def look_and_tell(pool: Pool, now_s: float) -> None:
        look(pool, now_s)
        if not pool._queue:
            nothing_queued.set()

    monkeypatch.setattr(Pool, "_look_at_jobs", look_and_tell)
    pool = Pool(name, 8, 1)
    for _ in range(3):
        go_on = threading.Event()
        first = pool.submit(go_on.wait, 60)
        assert sorted(job.result(60) for job in [pool.submit(int, n) for n in range(20)]) == list(range(20))
        nothing_queued.clear()
        assert nothing_queued.wait(60)  # the timer has nothing to do any more while the first job still runs
        go_on.set()
        assert first.result(60)
        until(lambda: not threads(name) and not threads(f"{name}-timer"))
    assert pool._thread_count == 0


def test_a_thread_that_is_given_a_job_while_it_gives_up_waiting_takes_it(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(thread_pool, "IDLE_S", 0.0)
    pool = Pool(name, 1)
    assert [pool.submit(int, n).result(60) for n in range(1000)] == list(range(1000))


def test_jobs_that_would_compete_wait_without_a_thread(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(thread_pool, "TICK_S", 60.0)  # nobody finds out that the first ones do not compute
    pool, go_on, most = Pool(name, 100, 2), threading.Event(), 0

    def count() -> None:
        nonlocal most
        go_on.wait(60)
        most = max(most, len(threads(name)))

    jobs = [pool.submit(count) for _ in range(50)]
    go_on.set()
    for job in jobs:
        job.result(60)
    assert most == 2


def test_jobs_that_are_blocked_do_not_hold_up_others(name: str) -> None:
    pool, go_on = Pool(name, 100, 1), threading.Event()
    blocked = [pool.submit(go_on.wait, 60) for _ in range(5)]
    assert pool.submit(lambda: 1).result(60) == 1
    go_on.set()
    assert all(job.result(60) for job in blocked)


def test_a_job_that_computes_for_long_does_not_hold_up_others(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(thread_pool, "_processor_s", lambda _thread: time.monotonic())  # each job computes all the time
    pool, go_on = Pool(name, 100, 1), threading.Event()
    long = pool.submit(go_on.wait, 20)
    pool.submit(go_on.set)
    assert long.result(60)


def test_a_job_that_no_thread_was_left_for_is_looked_at_again_when_one_ends(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(thread_pool, "IDLE_S", 120.0)  # the timer does not find it by chance
    pool, end_first, end_second = Pool(name, 2, 1), threading.Event(), threading.Event()
    begun = threading.Event()

    def begin_and_wait() -> bool:
        begun.set()
        return end_second.wait(120)

    first, second = pool.submit(end_first.wait, 120), pool.submit(begin_and_wait)
    assert begun.wait(60)
    third = pool.submit(lambda: 3)  # both threads are taken
    end_first.set()
    assert first.result(60)
    assert third.result(60) == 3
    end_second.set()
    assert second.result(60)


@pytest.mark.parametrize("suffix", ["", "-timer"])
def test_a_thread_that_cannot_be_started_stops_nothing_for_ever(
    name: str, suffix: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    start, refused = threading.Thread.start, [f"{name}{suffix}"]

    def start_or_fail(thread: threading.Thread) -> None:
        if thread.name in refused:
            refused.remove(thread.name)
            raise RuntimeError("can't start new thread")
        start(thread)

    monkeypatch.setattr(threading.Thread, "start", start_or_fail)
    pool, go_on = Pool(name, 3, 1), threading.Event()
    jobs = [pool.submit(go_on.wait, 60), pool.submit(go_on.wait, 60)]
    assert not refused
    pool.submit(go_on.set).result(60)
    assert [job.result(60) for job in jobs] == [True, True]


def test_a_late_job_is_told_once_and_its_thread_is_replaced_and_ends_with_it(name: str) -> None:
    pool, go_on = Pool(name, 1), threading.Event()
    told: list[int] = []
    was_late: list[bool] = []

    def hang() -> int:
        has_been_late = pool.when_late(0.0, told.append)
        go_on.wait(60)
        was_late.extend([has_been_late(), has_been_late()])
        return threading.get_ident()

    late = pool.submit(hang)
    assert pool.submit(lambda: 1).result(60) == 1
    assert len(threads(name)) == 2
    go_on.set()
    assert told == [late.result(60)]
    assert was_late == [True, True]
    until(lambda: len(threads(name)) == 1)


def test_each_of_several_late_jobs_is_told_whatever_their_order(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(thread_pool, "IDLE_S", 3600.0)  # the timer does not find them by chance
    pool, go_on, told = Pool(name, 4), threading.Event(), threading.Semaphore(0)

    def hang(late_in_s: float) -> bool:
        pool.when_late(time.monotonic() + late_in_s, lambda _: told.release())
        return go_on.wait(60)

    jobs = [pool.submit(hang, late_in_s) for late_in_s in (3600.0, 0.1, 0.15, 0.2)]
    for _ in range(3):
        assert told.acquire(timeout=30)
    go_on.set()
    assert all(job.result(60) for job in jobs)


def test_a_job_is_written_off_once_and_not_after_its_end(name: str) -> None:
    pool, go_on = Pool(name, 1), threading.Event()
    hanging = pool.submit(go_on.wait, 60)
    until(hanging.running)
    pool.write_off(hanging)
    pool.write_off(hanging)
    ended = pool.submit(int)
    assert ended.result(60) == 0
    pool.write_off(ended)
    second, third = pool.submit(go_on.wait, 60), pool.submit(int)
    assert not third.done()
    assert (len(threads(name)), pool._lost) == (2, 1)
    go_on.set()
    assert (second.result(60), third.result(60)) == (True, 0)
    until(lambda: len(threads(name)) == 1)
    assert pool._lost == 0


def test_a_job_that_ends_in_time_is_not_late(name: str) -> None:
    pool = Pool(name, 1)
    told: list[int] = []

    def work() -> bool:
        was_late = pool.when_late(time.monotonic() + 3600, told.append)
        return was_late()

    assert pool.submit(work).result(60) is False
    assert told == []


def test_an_error_while_a_late_job_is_told_stops_no_other(name: str, caplog: pytest.LogCaptureFixture) -> None:
    pool, go_on = Pool(name, 1), threading.Event()

    def hang() -> bool:
        pool.when_late(0.0, lambda _: fail())
        return go_on.wait(60)

    jobs = [pool.submit(hang) for _ in range(3)]
    assert pool.submit(lambda: 1).result(60) == 1
    go_on.set()
    assert all(job.result(60) for job in jobs)
    assert "could not be reported" in caplog.text


def test_queued_jobs_are_dropped_at_the_end(name: str) -> None:
    pool, go_on, begun = Pool(name, 1), threading.Event(), threading.Event()

    def wait() -> bool:
        begun.set()
        return go_on.wait(60)

    running, queued = pool.submit(wait), pool.submit(pytest.fail)
    assert begun.wait(60)
    pool.shutdown()
    assert queued.cancelled()
    go_on.set()
    assert running.result(60)
