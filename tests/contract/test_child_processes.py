# SPDX-License-Identifier: Apache-2.0
"""Long-lived child processes: started, stopped, and killed with their parent."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from csi_driver.deadline import Deadline
from csi_driver.errors import SystemCallFailed
from csi_driver.host.processes import ChildProcess, ChildProcesses

SLEEPER = (sys.executable, "-c", "import time; print('up', flush=True); time.sleep(600)")
STUBBORN = (
    sys.executable,
    "-c",
    "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); print('up', flush=True); time.sleep(600)",
)


def wait_until(ready: Callable[[], bool], what: str) -> None:
    """Wait for a condition; the limit is reached only by a failing test."""
    assert Deadline.after(120).wait_until(ready), what


class Starter:
    """Starts children in a directory and stops those left at the end."""

    def __init__(self, directory: Path) -> None:
        self.log = directory / "child.log"
        self.pid_file = directory / "child.pid"
        self._started: list[ChildProcess] = []

    def start(self, *argv: str) -> ChildProcess:
        child = ChildProcesses().start(argv, log=self.log, pid_file=self.pid_file)
        self._started.append(child)
        return child

    def await_line(self, text: str) -> None:
        """Wait until a child has written a line."""
        wait_until(lambda: text in (self.log.read_text() if self.log.exists() else ""), f"{text} in the log")

    def end_all(self) -> None:
        for child in self._started:
            child.stop(timeout_s=0)


@pytest.fixture
def starter(tmp_path: Path) -> Iterator[Starter]:
    made = Starter(tmp_path)
    yield made
    made.end_all()


def is_running(pid: int) -> bool:
    """Tell if a process runs; a zombie does not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] not in ("Z", "X")
    except OSError:
        return False


def group_of(pid: int) -> list[int]:
    """Return the processes of a group that still run."""
    found = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            state, _, group = stat.read_text().rsplit(")", 1)[1].split()[:3]
            found += [int(stat.parent.name)] if int(group) == pid and state not in "ZX" else []
    return found


def test_a_child_has_as_few_heaps_as_in_the_image(starter: Starter) -> None:
    starter.start(sys.executable, "-c", "import os; print(f'MALLOC_ARENA_MAX={os.environ[\"MALLOC_ARENA_MAX\"]} ok')")
    starter.await_line(" ok")
    (image,) = (
        line.strip() for line in (Path(__file__).parents[2] / "Dockerfile").read_text().splitlines() if "MALLOC" in line
    )
    assert starter.log.read_text().strip() == f"{image} ok"


def test_a_child_runs_with_its_pid_in_the_file_and_its_output_in_the_log(starter: Starter) -> None:
    child = starter.start(*SLEEPER)
    starter.await_line("up")
    assert child.poll() is None
    assert starter.pid_file.read_text() == f"{child.pid}\n"
    assert is_running(child.pid)


def test_sigterm_ends_a_child_and_removes_its_pid_file(starter: Starter) -> None:
    child = starter.start(*SLEEPER)
    starter.await_line("up")
    assert child.stop(timeout_s=120) == -signal.SIGTERM
    assert not is_running(child.pid)
    assert not starter.pid_file.exists()


def test_a_child_that_ignores_sigterm_is_killed(starter: Starter) -> None:
    child = starter.start(*STUBBORN)
    starter.await_line("up")
    assert child.stop(timeout_s=0.1) == -signal.SIGKILL


def test_the_children_of_a_child_end_with_it(starter: Starter) -> None:
    child = starter.start("/bin/sh", "-c", "sleep 600 & echo $! $!; wait")
    starter.await_line("\n")
    grandchild = int(starter.log.read_text().split()[0])
    child.stop(timeout_s=5)
    wait_until(lambda: not is_running(grandchild), "the child's child to end")


def test_the_exit_status_of_a_child_is_returned(starter: Starter) -> None:
    child = starter.start("/bin/sh", "-c", "exit 7")
    wait_until(lambda: child.poll() is not None, "the child to end")
    assert child.poll() == 7
    assert not starter.pid_file.exists()


def test_the_output_of_the_next_child_is_appended(starter: Starter) -> None:
    for word in ("first", "second"):
        starter.start("/bin/sh", "-c", f"echo {word}")
        starter.await_line(word)
    assert starter.log.read_text().split() == ["first", "second"]


def test_an_unwritable_log_is_reported(tmp_path: Path) -> None:
    with pytest.raises(SystemCallFailed, match="absent"):
        ChildProcesses().start(SLEEPER, log=tmp_path / "absent" / "log", pid_file=tmp_path / "pid")


PARENT = (
    "import os, signal, sys, threading, time; from pathlib import Path\n"
    "from csi_driver.host.processes import ChildProcesses\n"
    "start = lambda: print(ChildProcesses().start("
    f"{STUBBORN!r}, log=Path(sys.argv[1], 'log'), pid_file=Path(sys.argv[1], 'pid')).pid, flush=True)\n"
)


def parent_that(does: str, directory: Path) -> tuple[subprocess.Popen[str], int]:
    """Start a process that starts a child and does something then; return it and the child's pid."""
    argv = [sys.executable, "-c", PARENT + does, str(directory)]
    parent = subprocess.Popen(argv, stdout=subprocess.PIPE, text=True, cwd=os.getcwd())
    assert parent.stdout is not None
    return parent, int(parent.stdout.readline())


def test_children_die_when_their_parent_is_killed(tmp_path: Path) -> None:
    parent, child = parent_that("start(); time.sleep(600)", tmp_path)
    wait_until(lambda: "up" in (tmp_path / "log").read_text(), "the child to run")
    parent.kill()
    parent.communicate()
    wait_until(lambda: not is_running(child), "the child to end")


def test_children_die_when_their_parent_is_killed_at_their_start(tmp_path: Path) -> None:
    parent, child = parent_that("start(); os.kill(os.getpid(), signal.SIGKILL)", tmp_path)
    parent.communicate()
    wait_until(lambda: not is_running(child), "the child to end")


def test_children_outlive_the_thread_that_started_them_but_not_its_process(tmp_path: Path) -> None:
    begin = "thread = threading.Thread(target=start); thread.start(); thread.join(); print('joined', flush=True)"
    parent, child = parent_that(f"{begin}; time.sleep(600)", tmp_path)
    assert parent.stdout is not None
    assert parent.stdout.readline() == "joined\n"
    wait_until(lambda: "up" in (tmp_path / "log").read_text(), "the child to run")
    assert is_running(child)
    parent.kill()
    parent.communicate()
    wait_until(lambda: not is_running(child), "the child to end")


def test_the_group_of_an_ended_child_is_killed(starter: Starter) -> None:
    child = starter.start("/bin/sh", "-c", "exit 7")
    wait_until(lambda: child.poll() == 7, "the child to end")
    wait_until(lambda: not group_of(child.pid), "its group to end")


def test_an_ended_child_gets_no_signal(starter: Starter, monkeypatch: pytest.MonkeyPatch) -> None:
    child = starter.start("/bin/sh", "-c", "exit 3")
    wait_until(lambda: child.poll() is not None, "the child to end")
    signalled: list[int] = []
    monkeypatch.setattr(os, "killpg", lambda group, number: signalled.append(group))
    assert child.stop(timeout_s=0) == 3
    assert signalled == []


def test_a_passed_descriptor_keeps_its_number(starter: Starter, tmp_path: Path) -> None:
    with (tmp_path / "passed").open("w") as passed:
        number = passed.fileno()
        argv = ("/bin/sh", "-c", f"echo through >/proc/self/fd/{number}")
        child = ChildProcesses().start(argv, log=starter.log, pid_file=starter.pid_file, pass_fds=[number])
        wait_until(lambda: child.poll() == 0, "the child to end")
    assert (tmp_path / "passed").read_text() == "through\n"
