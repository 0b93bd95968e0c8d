"""Questions that may never be answered take nothing from those that are."""

from __future__ import annotations

import threading
import time

import pytest

from csi_driver.node import questions
from csi_driver.node.questions import NoAnswer, Questions

SHORT_S = 0.02


@pytest.fixture
def never() -> threading.Event:
    return threading.Event()


def threads(name: str) -> int:
    return sum(thread.name == name for thread in threading.enumerate())


def hang(asked: Questions[bool], never: threading.Event, name: str) -> None:
    with pytest.raises(NoAnswer):
        asked.ask(name, "x", never.wait, SHORT_S)


def test_more_volumes_than_threads_may_hang_and_the_others_are_answered(never: threading.Event) -> None:
    asked: Questions[bool] = Questions("questioning")
    for number in range(questions.WORKERS + 5):
        hang(asked, never, f"dead-{number}")
    assert asked.ask("alive", "x", lambda: True, 10.0)
    never.set()


def test_volumes_that_hang_all_at_once_leave_the_next_question_its_thread(never: threading.Event) -> None:
    asked: Questions[bool] = Questions("questioning")
    names = [f"dead-{number}" for number in range(2 * questions.WORKERS)]
    callers = [threading.Thread(target=hang, args=(asked, never, name)) for name in names]
    for caller in callers:
        caller.start()
    for caller in callers:
        caller.join(10)
    assert asked.ask("alive", "x", lambda: True, 10.0)
    never.set()


def test_threads_that_were_written_off_go_when_their_device_answers(never: threading.Event) -> None:
    asked: Questions[bool] = Questions("written-off")
    for number in range(20):
        hang(asked, never, f"dead-{number}")
    # Where the machine is busy, a question may be given up before its thread has begun with it: that one stays.
    assert threads("written-off") > 10
    never.set()
    until = time.monotonic() + 10
    while threads("written-off") > 1 and time.monotonic() < until:
        time.sleep(0.005)
    assert threads("written-off") <= 1
    assert asked.ask("dead-1", "x", lambda: True, 10.0)


def test_one_thread_serves_questions_that_come_one_by_one() -> None:
    asked: Questions[int] = Questions("one-by-one")
    assert [asked.ask("v", "x", lambda number=number: number, 10.0) for number in range(50)] == list(range(50))  # type: ignore[misc]
    assert threads("one-by-one") <= 2


def test_none_is_an_answer() -> None:
    asked: Questions[None] = Questions("questioning")
    assert asked.ask("v", "x", lambda: None, 10.0) is None
