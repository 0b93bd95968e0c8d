"""Who may ask a server that failed, and when it is asked again."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor

import pytest

from csi_driver.deadline import Deadline
from csi_driver.errors import DeadlineReached
from csi_driver.management.gate import Gate, SentAway


class HandClock:
    """A clock that stands still until it is moved."""

    def __init__(self) -> None:
        self.now_s = 1000.0

    def monotonic(self) -> float:
        return self.now_s

    def sleep(self, seconds: float) -> None:
        self.now_s += seconds


@pytest.fixture
def clock() -> HandClock:
    return HandClock()


@pytest.fixture
def gate(clock: HandClock) -> Gate:
    """The gate of a server that has just refused a connection."""
    made = Gate("https://m1:4000", 1, clock)
    made.failed(0.001, timed_out=False)
    return made


def shows_life(gate: Gate, clock: HandClock) -> None:
    clock.sleep(60)
    assert gate.take_probe()
    gate.probed(alive=True)


def test_a_server_that_failed_rests(gate: Gate) -> None:
    assert not gate.is_open()
    assert not gate.take_probe()


def test_one_caller_sees_to_the_probe_of_a_rested_server(gate: Gate, clock: HandClock) -> None:
    clock.sleep(1)
    assert [gate.take_probe() for _ in range(3)] == [True, False, False]


def test_a_server_that_answers_a_probe_is_tried_by_one_caller(gate: Gate, clock: HandClock) -> None:
    shows_life(gate, clock)
    assert not gate.is_open()
    assert [gate.take_trial() for _ in range(3)] == [True, False, False]


def test_a_trial_that_nobody_made_is_given_to_another(gate: Gate, clock: HandClock) -> None:
    shows_life(gate, clock)
    gate.take_trial()
    clock.sleep(10)
    assert gate.take_trial()


def test_a_server_that_answers_is_open_to_all(gate: Gate, clock: HandClock) -> None:
    shows_life(gate, clock)
    gate.answered()
    assert gate.is_open()


def test_a_server_that_fails_its_trial_rests_again(gate: Gate, clock: HandClock) -> None:
    shows_life(gate, clock)
    gate.failed(0.001, timed_out=False)
    assert not gate.take_trial()
    assert not gate.take_probe()


def test_a_server_that_goes_on_failing_rests_longer_but_is_never_given_up(gate: Gate, clock: HandClock) -> None:
    for _ in range(50):
        clock.sleep(30)
        assert gate.take_probe()
        gate.probed(alive=False)
    clock.sleep(29)
    assert not gate.take_probe()
    clock.sleep(2)
    assert gate.take_probe()


def test_a_failure_that_many_meet_is_one(gate: Gate, clock: HandClock) -> None:
    for _ in range(100):
        gate.failed(0.001, timed_out=False)
    clock.sleep(0.6)
    assert gate.take_probe()


def test_where_no_other_server_works_a_probe_need_not_wait_for_the_end_of_the_rest(
    gate: Gate, clock: HandClock
) -> None:
    assert not gate.take_probe()
    assert gate.take_probe(urgent=True)
    gate.probed(alive=False)
    assert not gate.take_probe(urgent=True)
    clock.sleep(0.6)
    assert gate.take_probe(urgent=True)


@pytest.mark.parametrize(("took_s", "timed_out", "quick"), [(0.01, False, True), (0.2, True, False), (9, False, False)])
def test_a_failure_is_quick_unless_somebody_waited_for_it(
    clock: HandClock, took_s: float, timed_out: bool, quick: bool
) -> None:
    gate = Gate("https://m1:4000", 1, clock)
    before_s = clock.monotonic()
    gate.failed(took_s, timed_out=timed_out)
    assert gate.is_quick() is quick
    assert gate.wasted(before_s) is not quick


def test_a_call_that_began_later_was_not_made_to_wait(clock: HandClock) -> None:
    gate = Gate("https://m1:4000", 1, clock)
    gate.failed(30, timed_out=True)
    clock.sleep(1)
    assert not gate.wasted(clock.monotonic())


def test_the_verdict_of_a_probe_is_waited_for(gate: Gate, clock: HandClock) -> None:
    assert gate.take_probe(urgent=True)
    threading.Timer(0.05, lambda: gate.probed(alive=True)).start()
    assert gate.shows_life(Deadline.after(10))


def test_a_server_without_a_probe_under_way_shows_no_life(gate: Gate) -> None:
    assert not gate.shows_life(Deadline.after(10))


def test_whoever_stands_in_line_is_sent_away_when_the_server_fails(clock: HandClock) -> None:
    gate = Gate("https://m1:4000", 1, clock)
    deadline = Deadline.after(10)

    def stand_in_line() -> None:
        with gate.entered(deadline):
            pass

    with ThreadPoolExecutor(4) as pool, gate.entered(deadline):
        waiting = [pool.submit(stand_in_line) for _ in range(4)]
        assert deadline.wait_until(lambda: len(gate._place._waiters) == 4)  # type: ignore[attr-defined]
        gate.failed(0.2, timed_out=True)
        assert [type(one.exception(10)) for one in waiting] == [SentAway] * 4


def test_whoever_gets_no_place_in_time_is_told(clock: HandClock) -> None:
    gate = Gate("https://m1:4000", 1, clock)
    with gate.entered(Deadline.after(1)), pytest.raises(DeadlineReached), gate.entered(Deadline.after(0.05)):
        pytest.fail("two at once")


def test_more_callers_than_places_all_come_to_their_turn(clock: HandClock) -> None:
    gate = Gate("https://m1:4000", 2, clock)
    inside, most = [0], [0]
    lock = threading.Lock()

    def ask(_: int) -> None:
        with gate.entered(Deadline.after(20)):
            with lock:
                inside[0] += 1
                most[0] = max(most[0], inside[0])
            threading.Event().wait(0.001)
            with lock:
                inside[0] -= 1

    with ThreadPoolExecutor(32) as pool:
        list(pool.map(ask, range(320)))
    assert most == [2]


def test_a_place_is_given_back_when_a_request_fails(clock: HandClock) -> None:
    gate = Gate("https://m1:4000", 1, clock)
    with pytest.raises(ValueError, match="any"), gate.entered(Deadline.after(1)):
        raise ValueError("any")
    with gate.entered(Deadline.after(1)):
        pass
