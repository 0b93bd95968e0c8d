"""Work that is done now and then: at once, again after a failure, and never after the end."""

from __future__ import annotations

import threading
import uuid

import pytest

from csi_driver.errors import HostFailure
from csi_driver.node.rounds import Rounds


@pytest.fixture
def name() -> str:
    """Of a thread that no other test has: theirs may still be about to end."""
    return f"rounds-{uuid.uuid4()}"


def test_work_is_done_at_once_and_again_even_after_a_failure(name: str) -> None:
    done: list[int] = []
    enough = threading.Event()

    def work() -> None:
        done.append(len(done))
        if len(done) == 3:
            enough.set()
        raise HostFailure("no")

    with Rounds(work, 0.001, name=name):
        assert enough.wait(10)


def test_an_interval_of_zero_is_never(name: str) -> None:
    with Rounds(lambda: pytest.fail("it ran"), 0, name=name):
        assert not [thread for thread in threading.enumerate() if thread.name == name]


def test_nothing_is_begun_after_the_end(name: str) -> None:
    begun = threading.Semaphore(0)
    with Rounds(begun.release, 3600, name=name):
        assert begun.acquire(timeout=10)
        (thread,) = [thread for thread in threading.enumerate() if thread.name == name]
        assert thread.daemon
    thread.join(10)
    assert not thread.is_alive()
