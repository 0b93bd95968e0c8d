"""Work that is done now and then: at once, again after a failure, and never after the end."""

from __future__ import annotations

import threading

import pytest

from csi_driver.errors import HostFailure
from csi_driver.node.rounds import Rounds


def test_work_is_done_at_once_and_again_even_after_a_failure() -> None:
    done: list[int] = []
    enough = threading.Event()

    def work() -> None:
        done.append(len(done))
        if len(done) == 3:
            enough.set()
        raise HostFailure("no")

    with Rounds(work, 0.001, name="test"):
        assert enough.wait(10)


def test_an_interval_of_zero_is_never() -> None:
    with Rounds(lambda: pytest.fail("it ran"), 0, name="none"):
        assert not [thread for thread in threading.enumerate() if thread.name == "none"]


def test_nothing_is_begun_after_the_end() -> None:
    begun = threading.Semaphore(0)
    with Rounds(begun.release, 3600, name="never again"):
        assert begun.acquire(timeout=10)
        (thread,) = [thread for thread in threading.enumerate() if thread.name == "never again"]
        assert thread.daemon
    thread.join(10)
    assert not thread.is_alive()
