# SPDX-License-Identifier: Apache-2.0
"""Watchdog that may never be answered take nothing from those that are."""

from __future__ import annotations

import sys
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager

import pytest

from csi_driver import thread_pool
from csi_driver.deadline import Deadline
from csi_driver.errors import HostFailure
from csi_driver.node import concurrency
from csi_driver.node.concurrency import NotResponding, Watchdog

SHORT_S = 0.02
PATIENT_S = 60.0


@pytest.fixture
def never() -> Iterator[threading.Event]:
    event = threading.Event()
    yield event
    event.set()


@pytest.fixture
def name() -> str:
    """Of threads that no other test has: theirs may still be there, waiting for the next question."""
    return f"questioning-{uuid.uuid4()}"


def threads(name: str) -> int:
    return sum(thread.name == name for thread in threading.enumerate())


def until(state: Callable[[], bool]) -> None:
    end_s = time.monotonic() + PATIENT_S
    while not state():
        assert time.monotonic() < end_s
        time.sleep(0.002)


@contextmanager
def asking(asked: Watchdog[bool], work: Callable[[], bool], name: str) -> Iterator[None]:
    """Ask patiently; inside the block a thread has taken the question up."""
    began = threading.Event()

    def noted() -> bool:
        began.set()
        return work()

    asker = threading.Thread(target=lambda: asked.call(name, "x", noted, PATIENT_S))
    asker.start()
    assert began.wait(PATIENT_S)
    yield
    asker.join(PATIENT_S)


def hang(asked: Watchdog[bool], never: threading.Event, name: str, stack: ExitStack) -> None:
    """Make a call that hangs, and time out once a thread runs it."""
    stack.enter_context(asking(asked, never.wait, name))
    with pytest.raises(NotResponding):
        asked.call(name, "x", never.wait, 0.0)  # shares the question


def test_more_volumes_than_threads_may_hang_and_the_others_are_answered(never: threading.Event) -> None:
    asked: Watchdog[bool] = Watchdog("questioning")
    with ExitStack() as stack:
        for number in range(concurrency.WORKERS + 5):
            hang(asked, never, f"dead-{number}", stack)
        assert asked.call("alive", "x", lambda: True, PATIENT_S)
        never.set()


def test_volumes_that_hang_all_at_once_leave_the_next_question_its_thread(never: threading.Event) -> None:
    asked: Watchdog[bool] = Watchdog("questioning")

    def ask(name: str) -> None:
        with pytest.raises(NotResponding):
            asked.call(name, "x", never.wait, SHORT_S)

    callers = [threading.Thread(target=ask, args=(f"dead-{number}",)) for number in range(2 * concurrency.WORKERS)]
    for caller in callers:
        caller.start()
    for caller in callers:
        caller.join(PATIENT_S)
    assert asked.call("alive", "x", lambda: True, PATIENT_S)


def test_threads_that_were_written_off_go_when_their_device_answers(never: threading.Event, name: str) -> None:
    asked: Watchdog[bool] = Watchdog(name)
    with ExitStack() as stack:
        for number in range(20):
            hang(asked, never, f"dead-{number}", stack)
        assert threads(name) == 20
        never.set()
    until(lambda: threads(name) == 0)
    assert asked.call("dead-1", "x", lambda: True, PATIENT_S)


def test_only_so_many_threads_are_written_off(
    never: threading.Event, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(thread_pool, "LOST_LIMIT", 2)
    asked: Watchdog[bool] = Watchdog(name, 1)
    with ExitStack() as stack:
        for number in range(3):
            hang(asked, never, f"dead-{number}", stack)
        with pytest.raises(NotResponding):
            asked.call("late", "x", lambda: True, SHORT_S)
        assert threads(name) == 3
        never.set()
    assert asked.call("alive", "x", lambda: True, PATIENT_S)


def test_a_question_given_up_before_it_began_is_not_asked(
    never: threading.Event, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(concurrency, "WORKERS", 1)
    asked: Watchdog[bool] = Watchdog("questioning")
    late = threading.Event()

    def ask_late() -> bool:
        late.set()
        return True

    with asking(asked, never.wait, "slow"):
        with pytest.raises(NotResponding):
            asked.call("late", "x", ask_late, 0.0)
        never.set()
    assert asked.call("next", "x", lambda: True, PATIENT_S)
    assert not late.is_set()


def test_a_question_that_several_give_up_before_it_began_is_cancelled_once(
    never: threading.Event, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: Watchdog[bool] = Watchdog("questioning", 1)
    refused: list[str] = []
    both = threading.Barrier(2)
    monkeypatch.setattr(asked._pool, "write_off", lambda _job: both.wait(PATIENT_S))

    def give_up() -> None:
        with pytest.raises(NotResponding):
            asked.call("late", "x", lambda: True, SHORT_S)
        refused.append("late")

    with asking(asked, never.wait, "slow"):
        callers = [threading.Thread(target=give_up) for _ in range(2)]
        for caller in callers:
            caller.start()
        for caller in callers:
            caller.join(PATIENT_S)
        never.set()
    assert refused == ["late"] * 2
    assert asked.call("late", "x", lambda: True, PATIENT_S)


def test_a_bug_in_one_question_takes_no_thread_from_the_others(
    never: threading.Event, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(concurrency, "WORKERS", 1)
    ended: list[BaseException | None] = []
    monkeypatch.setattr(threading, "excepthook", lambda args: ended.append(args.exc_value))
    asked: Watchdog[bool] = Watchdog("questioning")

    def bug() -> bool:
        never.wait()
        raise ZeroDivisionError

    answers: list[bool] = []
    other = threading.Thread(target=lambda: answers.append(asked.call("right", "x", lambda: True, PATIENT_S)))
    with asking(asked, bug, "wrong"):
        other.start()
        until(lambda: bool(asked._pool._queue))
        never.set()
    other.join(PATIENT_S)
    assert answers == [True]
    until(lambda: bool(ended))  # the thread of the caller
    (error,) = ended
    assert isinstance(error, RuntimeError)
    assert isinstance(error.__cause__, ZeroDivisionError)


@pytest.fixture
def _hasty_threads() -> Iterator[None]:
    """Let threads be interrupted as often as they can."""
    before_s = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    yield
    sys.setswitchinterval(before_s)


@pytest.mark.usefixtures("_hasty_threads")
def test_one_thread_serves_questions_that_come_one_by_one(name: str) -> None:
    asked: Watchdog[int] = Watchdog(name)
    for number in range(2000):
        assert asked.call("v", "x", lambda number=number: number, PATIENT_S) == number  # type: ignore[misc]
    assert threads(name) == 1


def test_none_is_an_answer() -> None:
    asked: Watchdog[None] = Watchdog("questioning")
    assert asked.call("v", "x", lambda: None, PATIENT_S) is None


def test_each_of_those_who_wait_gets_a_failure_of_its_own(never: threading.Event) -> None:
    asked: Watchdog[bool] = Watchdog("questioning")
    failures: list[HostFailure] = []

    def fail() -> bool:
        never.wait()
        raise HostFailure("the same for all")

    def ask() -> None:
        try:
            asked.call("v", "x", fail, PATIENT_S)
        except HostFailure as failure:
            failures.append(failure)

    callers = [threading.Thread(target=ask) for _ in range(2)]
    for caller in callers:
        caller.start()
    never.set()
    for caller in callers:
        caller.join(PATIENT_S)
    assert [str(failure) for failure in failures] == ["the same for all"] * 2
    assert failures[0] is not failures[1]


def test_a_hanging_call_is_reported_with_its_functions(never: threading.Event) -> None:
    asked: Watchdog[bool] = Watchdog("questioning")
    began = threading.Event()

    def hang() -> bool:
        began.set()
        return Deadline.after(PATIENT_S).wait_until(never.is_set)

    asker = threading.Thread(target=lambda: asked.call("v", "x", hang, PATIENT_S))
    asker.start()
    assert began.wait(PATIENT_S)
    with pytest.raises(NotResponding, match=r"waits in .*deadline\.wait_until"):
        asked.call("v", "x", hang, 0.1)
    never.set()
    asker.join(PATIENT_S)
