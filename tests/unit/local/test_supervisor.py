# SPDX-License-Identifier: Apache-2.0
"""How the three roles are started, restarted and stopped. Processes are fakes."""

from __future__ import annotations

import fcntl
import os
import signal
import socket
from collections.abc import Callable, Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path

import pytest

from csi_driver.errors import DeadlineReached, HostFailure, InvalidField, PreconditionFailed
from csi_driver.host.processes import ChildProcess, ChildProcesses
from csi_driver.local.settings import LocalSettings
from csi_driver.local.supervisor import (
    Paths,
    Role,
    Supervisor,
    last_line,
    role_argv,
    stop_on_signals,
)
from tests.fakes.clock import FakeClock

PROGRAM = ("program",)
LONGEST = 107 - len("/controller.sock")


class FakeProcess(ChildProcess):
    """A process that runs until it is stopped, or `status` is set."""

    def __init__(self, role: str, pid: int, events: list[str], status: int | None) -> None:
        self.role = role
        self.events = events
        self.status = status
        self.ends_with = 0
        self._number = pid

    @property
    def pid(self) -> int:
        return self._number

    def poll(self) -> int | None:
        return self.status

    def stop(self, *, timeout_s: float) -> int:
        self.events.append(f"stop {self.role}")
        self.status = self.ends_with if self.status is None else self.status
        return self.status


class FakeProcesses(ChildProcesses):
    """Starts fakes; the roles in `exits_at_start` exit at once. `addresses`: of every socket that was passed."""

    def __init__(self, exits_at_start: frozenset[str] = frozenset()) -> None:
        self.exits_at_start = exits_at_start
        self.events: list[str] = []
        self.running: dict[str, FakeProcess] = {}
        self.addresses: list[str] = []
        self.argvs: dict[str, Sequence[str]] = {}

    def start(self, argv: Sequence[str], *, log: Path, pid_file: Path, pass_fds: Sequence[int] = ()) -> FakeProcess:
        role = argv[1]
        for fd in pass_fds:
            with socket.socket(fileno=os.dup(fd)) as passed:
                self.addresses.append("{}:{}".format(*passed.getsockname()))
        self.argvs[role] = argv
        self.events.append(f"start {role}")
        log.write_text(f"{role} says hello\n\n")
        process = FakeProcess(role, 100 + len(self.events), self.events, 3 if role in self.exits_at_start else None)
        self.running[role] = process
        return process


@dataclass
class Bench:
    """A supervisor over fakes, and its reports."""

    supervisor: Supervisor
    processes: FakeProcesses
    clock: FakeClock
    reports: list[str]


def bench(
    directory: Path,
    *,
    exits_at_start: frozenset[str] = frozenset(),
    why_not_ready: Callable[[Role, Paths, int], str | None] = lambda *_: None,
    restart_limit: int = 5,
) -> Bench:
    clock, processes, reports = FakeClock(), FakeProcesses(exits_at_start), list[str]()
    settings = LocalSettings(directory, program=PROGRAM, restart_limit=restart_limit, restart_window_s=60)
    supervisor = Supervisor(settings, processes, reports.append, why_not_ready, clock)
    return Bench(supervisor, processes, clock, reports)


def test_storage_is_ready_before_the_others_are_started(tmp_path: Path) -> None:
    asked: list[str] = []
    it = bench(tmp_path, why_not_ready=lambda role, *_: asked.append(f"{role} {len(it.processes.events)}"))
    it.supervisor.start()
    assert asked == ["storage 1", "controller 3", "node 3"]
    it.supervisor.close()


def test_the_storage_manager_inherits_the_socket_that_the_controller_logs_in_to(tmp_path: Path) -> None:
    """Also when it is started again: no other process can take the port and receive the password."""
    it = bench(tmp_path)
    with closing(it.supervisor):
        it.supervisor.start()
        it.processes.running["storage"].status = -9
        it.supervisor.restart_exited()
        address = f"127.0.0.1:{it.supervisor.port}"
        assert f"http://{address}" in it.processes.argvs["controller"]
        host, port = address.split(":")
        with socket.socket() as thief, pytest.raises(OSError, match="in use"):
            thief.bind((host, int(port)))
        assert it.processes.addresses == [address, address]


def test_roles_are_stopped_in_the_reverse_order(tmp_path: Path) -> None:
    it = bench(tmp_path)
    with closing(it.supervisor):
        it.supervisor.start()
    assert it.processes.events[3:] == ["stop node", "stop controller", "stop storage"]


def test_a_role_that_is_not_ready_in_time_is_named_with_the_reason_and_the_log(tmp_path: Path) -> None:
    it = bench(tmp_path, why_not_ready=lambda role, *_: "not ready" if role is Role.NODE else None)
    with (
        closing(it.supervisor),
        pytest.raises(DeadlineReached, match=rf"node \(not ready; .* {tmp_path}/node.log"),
    ):
        it.supervisor.start()


def test_a_role_that_exits_while_starting_fails_the_start_with_its_last_line(tmp_path: Path) -> None:
    it = bench(tmp_path, exits_at_start=frozenset({"controller"}))
    with (
        closing(it.supervisor),
        pytest.raises(HostFailure, match=r"controller exited .* 3 .*: controller says hello"),
    ):
        it.supervisor.start()


def test_an_exit_before_the_stop_is_not_reported_as_a_result_of_the_stop(tmp_path: Path) -> None:
    it = bench(tmp_path, exits_at_start=frozenset({"controller"}))
    with closing(it.supervisor), pytest.raises(HostFailure):
        it.supervisor.start()
    assert it.reports == []


def test_a_role_that_is_killed_by_the_stop_is_reported(tmp_path: Path) -> None:
    it = bench(tmp_path)
    with closing(it.supervisor):
        it.supervisor.start()
        it.processes.running["node"].ends_with = -9
    assert "node was killed by signal 9 when it was stopped" in it.reports[0]


def test_a_failed_start_stops_the_roles_that_were_started(tmp_path: Path) -> None:
    it = bench(tmp_path, exits_at_start=frozenset({"controller"}))
    with closing(it.supervisor), pytest.raises(HostFailure):
        it.supervisor.start()
    assert "stop storage" in it.processes.events


def test_a_role_that_exits_is_restarted_and_reported(tmp_path: Path) -> None:
    it = bench(tmp_path)
    with closing(it.supervisor):
        it.supervisor.start()
        it.processes.running["controller"].status = -9
        it.supervisor.restart_exited()
        assert it.processes.events[3:] == ["start controller"]
        assert "controller (process" in it.reports[0]
        assert "was killed by signal 9" in it.reports[0]


def test_a_second_exit_soon_after_delays_the_restart(tmp_path: Path) -> None:
    it = bench(tmp_path)
    with closing(it.supervisor):
        it.supervisor.start()
        for _ in range(2):
            it.processes.running["node"].status = 1
            it.supervisor.restart_exited()
        assert it.processes.events.count("start node") == 2
        it.clock.sleep(0.3)
        it.supervisor.restart_exited()
        assert it.processes.events.count("start node") == 3


def test_a_role_that_exits_more_often_than_the_limit_ends_the_run(tmp_path: Path) -> None:
    it = bench(tmp_path, restart_limit=1)
    with closing(it.supervisor):
        it.supervisor.start()
        it.processes.running["node"].status = 1
        it.supervisor.restart_exited()
        it.processes.running["node"].status = 1
        with pytest.raises(HostFailure, match="node exited 2 times within 60 s"):
            it.supervisor.restart_exited()


def test_exits_before_the_window_do_not_count(tmp_path: Path) -> None:
    it = bench(tmp_path, restart_limit=1)
    with closing(it.supervisor):
        it.supervisor.start()
        for _ in range(4):
            it.processes.running["node"].status = 1
            it.supervisor.restart_exited()
            it.clock.sleep(61)
        assert it.processes.events.count("start node") == 5


def test_a_directory_in_use_is_refused_with_the_process_id_of_its_user(tmp_path: Path) -> None:
    other = os.open(tmp_path / "local.lock", os.O_RDWR | os.O_CREAT)
    fcntl.flock(other, fcntl.LOCK_EX)
    os.write(other, b"4711\n")
    it = bench(tmp_path)
    with (
        closing(it.supervisor),
        pytest.raises(PreconditionFailed, match=r"in use by .* \(process 4711\)"),
    ):
        it.supervisor.start()
    os.close(other)


def test_a_refused_start_starts_nothing(tmp_path: Path) -> None:
    with closing(bench(tmp_path).supervisor) as holder:
        holder.start()
        second = bench(tmp_path)
        with closing(second.supervisor), pytest.raises(PreconditionFailed):
            second.supervisor.start()
        assert second.processes.events == []


def test_a_stopped_run_unlocks_its_directory(tmp_path: Path) -> None:
    for _ in range(2):
        with closing(bench(tmp_path).supervisor) as supervisor:
            supervisor.start()


def test_a_stop_requested_while_starting_ends_the_start(tmp_path: Path) -> None:
    def ready(role: Role, places: Paths, port: int) -> str | None:
        it.supervisor.stop.set()
        return "not yet"

    it = bench(tmp_path, why_not_ready=ready)
    with closing(it.supervisor):
        it.supervisor.start()
        assert it.supervisor.stop.is_set()
    assert it.clock.now_s < 5


def test_every_client_gets_its_own_directory_on_the_command_line_of_storage() -> None:
    settings = LocalSettings(Path("/d"), node_name="n1", extra_clients=(("n2", Path("/e")),), program=PROGRAM)
    argv = role_argv(Role.STORAGE, settings, Paths(Path("/d")), 4000, 7)
    assert [argv[at + 1] for at, word in enumerate(argv) if word == "--client"] == ["n1=/d", "n2=/e"]


def test_the_last_line_of_a_log_skips_empty_lines(tmp_path: Path) -> None:
    (tmp_path / "log").write_text("first\nlast words\n\n\n")
    assert last_line(tmp_path / "log") == "last words"


def test_a_missing_log_is_reported_as_such(tmp_path: Path) -> None:
    assert "cannot be read" in last_line(tmp_path / "none")


@pytest.mark.parametrize("is_ignored", [True, False])
def test_a_hangup_ends_the_run_unless_it_is_ignored(tmp_path: Path, is_ignored: bool) -> None:
    numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
    before = {number: signal.getsignal(number) for number in numbers}
    signal.signal(signal.SIGHUP, signal.SIG_IGN if is_ignored else signal.SIG_DFL)
    try:
        with closing(Supervisor(LocalSettings(directory=tmp_path), FakeProcesses(), print)) as supervisor:
            stop_on_signals(supervisor)
            signal.raise_signal(signal.SIGHUP)
            assert supervisor.stop.is_set() is not is_ignored
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


# --- paths ------------------------------------------------------------------------------------------------------


def directory_of(length: int) -> Path:
    return Path("/" + "d" * (length - 1))


def test_the_longest_directory_for_a_socket_is_accepted() -> None:
    assert len(str(Paths(directory_of(LONGEST)).sockets[Role.CONTROLLER])) == 107


@pytest.mark.parametrize("directory", [directory_of(LONGEST + 1), Path("/" + "ü" * (LONGEST // 2 + 1))])
def test_a_directory_with_too_many_bytes_is_refused_with_the_limit(directory: Path) -> None:
    with pytest.raises(InvalidField, match=rf"--directory: expected .* at most {LONGEST} bytes"):
        Paths(directory)


def test_a_relative_directory_becomes_absolute(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert Paths(Path("a/../b")).directory == tmp_path / "b"
