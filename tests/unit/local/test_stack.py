"""How the three roles are started, watched and stopped; processes are small working models."""

from __future__ import annotations

import fcntl
import os
import signal
import socket
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from csi_driver.errors import DeadlineReached, HostFailure, PreconditionFailed
from csi_driver.host import processes
from csi_driver.local.local import Local
from csi_driver.local.places import Places, Role
from csi_driver.local.settings import LocalSettings
from csi_driver.local.stack import RoleKeepsDying, Stack, last_line, role_argv

PROGRAM = ("program",)


@dataclass
class FakeClock:
    """Time that passes only when somebody sleeps."""

    now: float = 0.0

    def monotonic(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        self.now += seconds


@dataclass
class FakeProcess:
    """A process that runs until it is stopped or told to die."""

    role: str
    pid: int
    events: list[str]
    status: int | None = None
    ends_with: int = 0

    def poll(self) -> int | None:
        return self.status

    def stop(self, *, timeout_s: float) -> int:
        self.events.append(f"stop {self.role}")
        self.status = self.ends_with if self.status is None else self.status
        return self.status


@dataclass
class FakeProcesses:
    """Starts models; `dies_at_start` names roles that end at once."""

    events: list[str] = field(default_factory=list)
    running: dict[str, FakeProcess] = field(default_factory=dict)
    dies_at_start: frozenset[str] = frozenset()

    addresses: list[str] = field(default_factory=list)
    """Of every socket that a process was given."""
    argvs: dict[str, Sequence[str]] = field(default_factory=dict)

    def start(self, argv: Sequence[str], *, log: Path, pid_file: Path, pass_fds: Sequence[int] = ()) -> FakeProcess:
        role = argv[1]
        for fd in pass_fds:
            with socket.socket(fileno=os.dup(fd)) as passed:
                self.addresses.append("{}:{}".format(*passed.getsockname()))
        self.argvs[role] = argv
        self.events.append(f"start {role}")
        log.write_text(f"{role} says hello\n\n")
        process = FakeProcess(role, 100 + len(self.events), self.events, 3 if role in self.dies_at_start else None)
        self.running[role] = process
        return process


@dataclass
class Bench:
    """A stack over fakes, and what it reported."""

    stack: Stack
    processes: FakeProcesses
    clock: FakeClock
    reports: list[str]


def bench(
    directory: Path,
    *,
    dies_at_start: frozenset[str] = frozenset(),
    why_not_ready: Callable[[Role, Places, int], str | None] = lambda *_: None,
    restart_limit: int = 5,
) -> Bench:
    clock, processes, reports = FakeClock(), FakeProcesses(dies_at_start=dies_at_start), list[str]()
    settings = LocalSettings(directory, program=PROGRAM, restart_limit=restart_limit, restart_window_s=60)
    stack = Stack(settings, processes, report=reports.append, why_not_ready=why_not_ready, clock=clock)
    return Bench(stack, processes, clock, reports)


def test_storage_is_ready_before_the_others_are_started(tmp_path: Path) -> None:
    asked: list[str] = []
    it = bench(tmp_path, why_not_ready=lambda role, *_: asked.append(f"{role} {len(it.processes.events)}"))
    it.stack.start()
    assert asked == ["storage 1", "controller 3", "node 3"]
    it.stack.close()


def test_the_storage_gets_the_very_socket_of_the_address_that_the_controller_logs_in_to(tmp_path: Path) -> None:
    """Also when it is started again: in between nobody else can take the port, and receive the password."""
    it = bench(tmp_path)
    with it.stack:
        it.stack.start()
        it.processes.running["storage"].status = -9
        it.stack.tend()
        address = it.stack.management_url.removeprefix("http://")
        assert f"http://{address}" in it.processes.argvs["controller"]
        host, port = address.split(":")
        with socket.socket() as thief, pytest.raises(OSError, match="in use"):
            thief.bind((host, int(port)))
        assert it.processes.addresses == [address, address]


def test_roles_are_stopped_in_the_reverse_order(tmp_path: Path) -> None:
    it = bench(tmp_path)
    with it.stack:
        it.stack.start()
    assert it.processes.events[3:] == ["stop node", "stop controller", "stop storage"]


def test_a_role_that_is_never_ready_is_named_with_the_reason_and_the_log(tmp_path: Path) -> None:
    it = bench(tmp_path, why_not_ready=lambda role, *_: "nobody home" if role is Role.NODE else None)
    with it.stack, pytest.raises(DeadlineReached, match=rf"node \(nobody home\), whose log is {tmp_path}/node.log"):
        it.stack.start()


def test_a_role_that_dies_while_starting_ends_the_start_with_its_last_words(tmp_path: Path) -> None:
    it = bench(tmp_path, dies_at_start=frozenset({"controller"}))
    with it.stack, pytest.raises(HostFailure, match=r"controller exited with status 3 .*: controller says hello"):
        it.stack.start()


def test_a_role_that_died_by_itself_is_not_said_to_have_died_of_the_stop(tmp_path: Path) -> None:
    it = bench(tmp_path, dies_at_start=frozenset({"controller"}))
    with it.stack, pytest.raises(HostFailure):
        it.stack.start()
    assert it.reports == []


def test_a_role_that_had_to_be_killed_at_the_stop_is_reported(tmp_path: Path) -> None:
    it = bench(tmp_path)
    with it.stack:
        it.stack.start()
        it.processes.running["node"].ends_with = -9
    assert "node was killed by signal 9 when it was stopped" in it.reports[0]


def test_a_failed_start_stops_what_was_started(tmp_path: Path) -> None:
    it = bench(tmp_path, dies_at_start=frozenset({"controller"}))
    with it.stack, pytest.raises(HostFailure):
        it.stack.start()
    assert "stop storage" in it.processes.events


def test_a_role_that_dies_is_started_again_and_reported(tmp_path: Path) -> None:
    it = bench(tmp_path)
    with it.stack:
        it.stack.start()
        it.processes.running["controller"].status = -9
        it.stack.tend()
        assert it.processes.events[3:] == ["start controller"]
        assert "controller (process" in it.reports[0]
        assert "was killed by signal 9" in it.reports[0]


def test_a_second_death_soon_after_waits_before_the_next_start(tmp_path: Path) -> None:
    it = bench(tmp_path)
    with it.stack:
        it.stack.start()
        for _ in range(2):
            it.processes.running["node"].status = 1
            it.stack.tend()
        assert it.processes.events.count("start node") == 2
        it.clock.sleep(0.3)
        it.stack.tend()
        assert it.processes.events.count("start node") == 3


def test_a_role_that_dies_more_often_than_the_limit_ends_the_run(tmp_path: Path) -> None:
    it = bench(tmp_path, restart_limit=1)
    with it.stack:
        it.stack.start()
        it.processes.running["node"].status = 1
        it.stack.tend()
        it.processes.running["node"].status = 1
        with pytest.raises(RoleKeepsDying, match="node died 2 times within 60 s"):
            it.stack.tend()


def test_deaths_long_ago_do_not_count(tmp_path: Path) -> None:
    it = bench(tmp_path, restart_limit=1)
    with it.stack:
        it.stack.start()
        for _ in range(4):
            it.processes.running["node"].status = 1
            it.stack.tend()
            it.clock.sleep(61)
        assert it.processes.events.count("start node") == 5


def test_a_directory_that_another_run_holds_is_refused_with_its_process_id(tmp_path: Path) -> None:
    other = os.open(tmp_path / "local.lock", os.O_RDWR | os.O_CREAT)
    fcntl.flock(other, fcntl.LOCK_EX)
    os.write(other, b"4711\n")
    it = bench(tmp_path)
    with it.stack, pytest.raises(PreconditionFailed, match=r"in use by another `nvmesh-csi local` \(process 4711\)"):
        it.stack.start()
    os.close(other)


def test_a_refused_start_starts_nothing(tmp_path: Path) -> None:
    with bench(tmp_path).stack as holder:
        holder.start()
        second = bench(tmp_path)
        with second.stack, pytest.raises(PreconditionFailed):
            second.stack.start()
        assert second.processes.events == []


def test_a_stopped_run_gives_its_directory_back(tmp_path: Path) -> None:
    for _ in range(2):
        with bench(tmp_path).stack as stack:
            stack.start()


def test_a_stop_asked_for_while_starting_ends_the_start(tmp_path: Path) -> None:
    def ready(role: Role, places: Places, port: int) -> str | None:
        it.stack.request_stop()
        return "not yet"

    it = bench(tmp_path, why_not_ready=ready)
    with it.stack:
        it.stack.start()
        assert it.stack.stopping
    assert it.clock.now < 5


def test_every_client_gets_its_own_directory_on_the_command_line_of_storage() -> None:
    settings = LocalSettings(Path("/d"), node_name="n1", extra_clients=(("n2", Path("/e")),), program=PROGRAM)
    argv = role_argv(Role.STORAGE, settings, Places(Path("/d")), 4000, 7)
    assert [argv[at + 1] for at, word in enumerate(argv) if word == "--client"] == ["n1=/d", "n2=/e"]


def test_the_last_line_of_a_log_skips_empty_lines(tmp_path: Path) -> None:
    (tmp_path / "log").write_text("first\nlast words\n\n\n")
    assert last_line(tmp_path / "log") == "last words"


def test_a_log_that_is_missing_is_said_to_be_so(tmp_path: Path) -> None:
    assert "cannot be read" in last_line(tmp_path / "none")


@pytest.mark.parametrize("is_ignored", [True, False])
def test_a_hangup_ends_the_run_unless_whoever_started_it_had_that_ignored(tmp_path: Path, is_ignored: bool) -> None:
    numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
    before = {number: signal.getsignal(number) for number in numbers}
    signal.signal(signal.SIGHUP, signal.SIG_IGN if is_ignored else signal.SIG_DFL)
    settings, children = LocalSettings(directory=tmp_path), FakeProcesses()
    try:
        with Stack(settings, children, report=print) as stack:
            Local(settings, children, processes, write=print, problems=tuple)._stop_on_signals(stack)
            signal.raise_signal(signal.SIGHUP)
            assert stack.stopping is not is_ignored
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
