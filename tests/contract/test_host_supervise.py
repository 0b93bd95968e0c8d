"""Long-lived children: started, ended in order, and never left behind."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from csi_driver.errors import SystemCallFailed
from csi_driver.host.supervise import ChildProcess, ChildProcesses

SLEEPER = (sys.executable, "-c", "import time; print('up', flush=True); time.sleep(600)")
STUBBORN = (
    sys.executable,
    "-c",
    "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); print('up', flush=True); time.sleep(600)",
)


class Starter:
    """Starts children in a directory and ends those that a test leaves."""

    def __init__(self, directory: Path) -> None:
        self.log = directory / "child.log"
        self.pid_file = directory / "child.pid"
        self._started: list[ChildProcess] = []

    def start(self, *argv: str) -> ChildProcess:
        child = ChildProcesses().start(argv, log=self.log, pid_file=self.pid_file)
        self._started.append(child)
        return child

    def await_line(self, text: str) -> None:
        """Wait until a child has written a line, at most ten seconds."""
        end_s = time.monotonic() + 10
        while text not in (self.log.read_text() if self.log.exists() else ""):
            assert time.monotonic() < end_s, f"{text} never came"
            time.sleep(0.01)

    def end_all(self) -> None:
        for child in self._started:
            child.stop(timeout_s=0)


@pytest.fixture
def starter(tmp_path: Path) -> Iterator[Starter]:
    made = Starter(tmp_path)
    yield made
    made.end_all()


def is_running(pid: int) -> bool:
    """Tell whether a process runs; one that ended and was not waited for does not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] not in ("Z", "X")
    except OSError:
        return False


def test_a_child_runs_with_its_pid_in_the_file_and_its_output_in_the_log(starter: Starter) -> None:
    child = starter.start(*SLEEPER)
    starter.await_line("up")
    assert child.poll() is None
    assert starter.pid_file.read_text() == f"{child.pid}\n"
    assert is_running(child.pid)


def test_a_child_is_ended_by_sigterm_and_its_pid_file_goes(starter: Starter) -> None:
    child = starter.start(*SLEEPER)
    starter.await_line("up")
    assert child.stop(timeout_s=10) == -signal.SIGTERM
    assert not is_running(child.pid)
    assert not starter.pid_file.exists()


def test_a_child_that_does_not_hear_is_killed(starter: Starter) -> None:
    child = starter.start(*STUBBORN)
    starter.await_line("up")
    assert child.stop(timeout_s=0.1) == -signal.SIGKILL


def test_the_children_of_a_child_end_with_it(starter: Starter) -> None:
    child = starter.start("/bin/sh", "-c", "sleep 600 & echo $! $!; wait")
    starter.await_line("\n")
    grandchild = int(starter.log.read_text().split()[0])
    child.stop(timeout_s=5)
    end_s = time.monotonic() + 5
    while is_running(grandchild) and time.monotonic() < end_s:
        time.sleep(0.01)
    assert not is_running(grandchild)


def test_how_a_child_ended_is_told(starter: Starter) -> None:
    child = starter.start("/bin/sh", "-c", "exit 7")
    while child.poll() is None:
        time.sleep(0.01)
    assert child.poll() == 7
    assert not starter.pid_file.exists()


def test_the_output_of_the_next_child_is_added_to_the_log(starter: Starter) -> None:
    for word in ("first", "second"):
        starter.start("/bin/sh", "-c", f"echo {word}")
        starter.await_line(word)
    assert starter.log.read_text().split() == ["first", "second"]


def test_a_log_that_cannot_be_written_is_said_so(tmp_path: Path) -> None:
    with pytest.raises(SystemCallFailed, match="absent"):
        ChildProcesses().start(SLEEPER, log=tmp_path / "absent" / "log", pid_file=tmp_path / "pid")


def test_children_die_when_their_parent_is_killed(tmp_path: Path) -> None:
    program = (
        "import sys, time; from pathlib import Path; from csi_driver.host.supervise import ChildProcesses\n"
        f"child = ChildProcesses().start({STUBBORN!r}, log=Path({str(tmp_path)!r}, 'log'), "
        f"pid_file=Path({str(tmp_path)!r}, 'pid'))\n"
        "print(child.pid, flush=True); time.sleep(600)"
    )
    parent = subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, text=True, cwd=os.getcwd())
    assert parent.stdout is not None
    child = int(parent.stdout.readline())
    end_s = time.monotonic() + 10
    while "up" not in (tmp_path / "log").read_text() and time.monotonic() < end_s:
        time.sleep(0.01)
    parent.kill()
    parent.communicate()
    while is_running(child) and time.monotonic() < end_s:
        time.sleep(0.01)
    assert not is_running(child)
