# SPDX-License-Identifier: Apache-2.0
"""`nvmesh-csi local`: storage manager, controller and node as child processes: started in order, restarted, stopped."""

from __future__ import annotations

import errno
import fcntl
import http.client
import os
import signal
import socket
import sys
import threading
from collections import deque
from collections.abc import Callable, Sequence
from contextlib import ExitStack, closing
from dataclasses import dataclass, field
from enum import StrEnum
from functools import partial
from pathlib import Path
from types import FrameType

from csi_driver.deadline import SYSTEM_CLOCK, Clock, Deadline
from csi_driver.errors import DeadlineReached, DriverError, HostFailure, InvalidField, PreconditionFailed
from csi_driver.flags import SOCKET_PATH_LIMIT_BYTES
from csi_driver.host.machine_checks import MachineTools
from csi_driver.host.processes import ChildProcess, ChildProcesses, find_tool, package_of
from csi_driver.local.settings import LocalSettings
from csi_driver.rpc.client import CallFailed, CsiClient

_WATCH_INTERVAL_S = 0.1
_FIRST_PAUSE_S, _LONGEST_PAUSE_S = 0.2, 5.0
_LOOPBACK = "127.0.0.1"
_RESPONSE_S = 2.0
_SHOWN_BYTES = 4096

TOOLS = ("blkid", "mkfs.ext4", "e2fsck", "resize2fs")
_say = partial(print, flush=True)
_PACKAGES = {"findmnt": "util-linux", "lsblk": "util-linux", "losetup": "util-linux (on Debian: mount)"}


class Role(StrEnum):
    """The child processes, in the order in which they start."""

    STORAGE = "storage"
    CONTROLLER = "controller"
    NODE = "node"


class Paths:
    """The files of a local run, all below its directory, which is made absolute."""

    def __init__(self, directory: Path) -> None:
        """Raises `InvalidField` when the path of a socket would be too long."""
        self.directory = Path(os.path.normpath(directory.absolute()))
        self.sockets = {role: self.directory / f"{role}.sock" for role in (Role.CONTROLLER, Role.NODE)}
        self.pool = self.directory / "pool"
        self.password = self.pool / "password"
        self.devices = self.directory / "dev"
        self.lock = self.directory / "local.lock"
        self.logs = {role: self.directory / f"{role}.log" for role in Role}
        self.pid_files = {role: self.directory / f"{role}.pid" for role in Role}
        spare = SOCKET_PATH_LIMIT_BYTES - max(len(os.fsencode(each)) for each in self.sockets.values())
        if spare < 0:
            expected = f"a path of at most {len(os.fsencode(self.directory)) + spare} bytes"
            action = f"the paths of the sockets in it may have {SOCKET_PATH_LIMIT_BYTES} bytes"
            raise InvalidField("--directory", str(self.directory), expected, action)


@dataclass(slots=True)
class _Child:
    """A role, its process while it runs, and the times of its latest exits."""

    role: Role
    process: ChildProcess | None = None
    exits: deque[float] = field(default_factory=deque)
    restart_at_s: float = 0.0


@dataclass(slots=True)
class Supervisor:
    """Starts the roles, restarts those that exit, and stops them in `close`. A signal handler may set `stop`.

    `report` gets a sentence for each exit and restart. `why_not_ready` returns None once a role is ready.
    """

    settings: LocalSettings
    processes: ChildProcesses
    report: Callable[[str], None]
    why_not_ready: Callable[[Role, Paths, int], str | None] = field(default_factory=lambda: probe)
    clock: Clock = SYSTEM_CLOCK
    paths: Paths = field(init=False)
    _children: dict[Role, _Child] = field(init=False)
    stop: threading.Event = field(init=False, default_factory=threading.Event)
    _resources: ExitStack = field(init=False, default_factory=ExitStack)
    _listener: socket.socket = field(init=False)

    def __post_init__(self) -> None:
        self.paths = Paths(self.settings.directory)
        self._children = {role: _Child(role) for role in Role}

    def start(self) -> None:
        """Lock the directory and start all roles; return when all are ready, or `stop` is set.

        Raises `PreconditionFailed` (directory in use), `HostFailure` (a role exits), `DeadlineReached` (not ready).
        """
        deadline = Deadline.after(self.settings.start_timeout_s, self.clock)
        self._lock_directory()
        self._listen()
        self._begin(Role.STORAGE)
        self._await(Role.STORAGE, deadline)
        self._begin(Role.CONTROLLER)
        self._begin(Role.NODE)
        self._await(Role.CONTROLLER, deadline)
        self._await(Role.NODE, deadline)

    def _lock_directory(self) -> None:
        directory = self.paths.directory
        try:
            directory.mkdir(mode=0o755, parents=True, exist_ok=True)
            descriptor = os.open(self.paths.lock, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        except OSError as error:
            raise PreconditionFailed(f"{directory} cannot be used: {error.strerror}") from error
        self._resources.callback(os.close, descriptor)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno not in (errno.EWOULDBLOCK, errno.EACCES):
                raise PreconditionFailed(f"{self.paths.lock} cannot be locked: {error.strerror}") from error
            holder = os.pread(descriptor, 32, 0).decode(errors="replace").strip() or "unknown"
            raise PreconditionFailed(
                f"{directory} is in use by another `nvmesh-csi local` (process {holder}); "
                "stop it or set another --directory"
            ) from error
        os.ftruncate(descriptor, 0)
        os.pwrite(descriptor, f"{os.getpid()}\n".encode(), 0)

    def _listen(self) -> None:
        """Bind the storage manager's address for this whole run: no other process can take it and get the password."""
        self._listener = self._resources.enter_context(socket.socket(socket.AF_INET, socket.SOCK_STREAM))
        try:
            self._listener.bind((_LOOPBACK, 0))
        except OSError as error:
            raise HostFailure(f"cannot bind a TCP port of {_LOOPBACK}: {error.strerror}") from error

    @property
    def port(self) -> int:
        return int(self._listener.getsockname()[1])

    def _begin(self, role: Role) -> None:
        fd = self._listener.fileno()
        self._children[role].process = self.processes.start(
            role_argv(role, self.settings, self.paths, self.port, fd),
            log=self.paths.logs[role],
            pid_file=self.paths.pid_files[role],
            pass_fds=[fd] if role is Role.STORAGE else [],
        )

    def _await(self, role: Role, deadline: Deadline) -> None:
        reason: str | None = "not asked yet"

        def is_settled() -> bool:
            nonlocal reason
            if self.stop.is_set() or self._exit_status(role) is not None:
                return True
            reason = self.why_not_ready(role, self.paths, self.port)
            return reason is None

        in_time = deadline.wait_until(is_settled, first_s=0.02, most_s=_WATCH_INTERVAL_S)
        status = self._exit_status(role)
        if status is not None:
            raise HostFailure(f"{role} {describe_exit(status)} while starting: {last_line(self.paths.logs[role])}")
        if not in_time:
            raise DeadlineReached(f"{role} ({reason}; see its log {self.paths.logs[role]})")

    def _exit_status(self, role: Role) -> int | None:
        process = self._children[role].process
        return None if process is None else process.poll()

    def pid(self, role: Role) -> int | None:
        process = self._children[role].process
        return None if process is None else process.pid

    def watch(self) -> None:
        while not self.stop.wait(_WATCH_INTERVAL_S):
            self.restart_exited()

    def restart_exited(self) -> None:
        now = self.clock.monotonic()
        for child in self._children.values():
            status = self._exit_status(child.role)
            if child.process is not None and status is not None:
                self._note_exit(child, child.process.pid, status, now)
            if child.process is None and now >= child.restart_at_s:
                self._begin(child.role)
                self.report(f"{child.role} started again (process {self.pid(child.role)})")

    def _note_exit(self, child: _Child, pid: int, status: int, now: float) -> None:
        child.process = None
        child.exits.append(now)
        while child.exits[0] < now - self.settings.restart_window_s:
            child.exits.popleft()
        times, log = len(child.exits), self.paths.logs[child.role]
        self.report(f"{child.role} (process {pid}) {describe_exit(status)}: {last_line(log)}")
        if times > self.settings.restart_limit:
            window_s = self.settings.restart_window_s
            raise HostFailure(f"{child.role} exited {times} times within {window_s:g} s; see its log {log}")
        pause_s = 0.0 if times == 1 else min(_FIRST_PAUSE_S * 2 ** (times - 2), _LONGEST_PAUSE_S)
        child.restart_at_s = now + pause_s

    def close(self) -> None:
        """Stop node, controller and storage, in this order, and unlock the directory. Idempotent."""
        self.stop.set()
        for child in reversed(self._children.values()):
            if child.process is None:
                continue
            had_exited = child.process.poll() is not None
            status = child.process.stop(timeout_s=self.settings.stop_timeout_s)
            child.process = None
            if not had_exited and status not in (0, -signal.SIGTERM):
                log = self.paths.logs[child.role]
                self.report(f"{child.role} {describe_exit(status)} when it was stopped: {last_line(log)}")
        self._resources.close()


def role_argv(role: Role, settings: LocalSettings, paths: Paths, port: int, listener: int) -> list[str]:
    node_name = settings.node_name or socket.gethostname()
    argv = [*settings.program, role.value, "--log-level", settings.log_level, "--driver-name", settings.driver_name]
    if role is Role.STORAGE:
        argv += ["--pool", str(paths.pool), "--listen", f"fd:{listener}"]
        argv += [] if settings.size_bytes is None else ["--size", str(settings.size_bytes)]
        for name, directory in ((node_name, paths.directory), *settings.extra_clients):
            argv += ["--client", f"{name}={directory}"]
        argv += ["--overcommit"] if settings.overcommit else []
        return [*argv, "--preallocate"] if settings.preallocate else argv
    argv += ["--endpoint", f"unix://{paths.sockets[role]}"]
    argv += ["--max-volumes-per-node", str(settings.max_volumes_per_node)]
    argv += ["--volume-health"] if settings.volume_health else []
    if role is Role.CONTROLLER:
        management = ["--management-server", f"http://{_LOOPBACK}:{port}"]
        return [*argv, *management, "--management-password-file", str(paths.password)]
    argv += ["--node-name", node_name, "--state-directory", str(paths.directory / "node")]
    argv += ["--device-directory", str(paths.devices), "--status-directory", str(paths.directory / "proc")]
    return [*argv, *(f"--path-root={root}" for root in settings.path_roots)]


def probe(role: Role, paths: Paths, port: int) -> str | None:
    """Ask a role once whether it is ready: None, or why not. The storage manager is ready once it responds."""
    if role is Role.STORAGE:
        with closing(http.client.HTTPConnection(_LOOPBACK, port, timeout=_RESPONSE_S)) as connection:
            try:
                connection.request("GET", "/login")  # needs no session
                connection.getresponse()
            except (OSError, http.client.HTTPException) as error:
                return f"no response on port {port}: {error}"
        return None
    endpoint = paths.sockets[role]
    if not endpoint.exists():
        return f"the socket {endpoint} does not exist yet"
    with CsiClient(endpoint) as client:
        try:
            return None if client.is_ready() else "Probe returns ready=false"
        except CallFailed as error:
            return str(error)


def describe_exit(status: int) -> str:
    return f"was killed by signal {-status}" if status < 0 else f"exited with status {status}"


def last_line(log: Path) -> str:
    """Return the last line of a log that is not empty, cut to a length that fits a message."""
    try:
        with log.open("rb") as stream:
            stream.seek(0, os.SEEK_END)
            stream.seek(max(0, stream.tell() - _SHOWN_BYTES))
            lines = stream.read().decode(errors="replace").split("\n")
    except OSError as error:
        return f"its log {log} cannot be read: {error.strerror}"
    return next((line.strip()[-300:] for line in reversed(lines) if line.strip()), f"its log {log} is empty")


def why_impossible(tools: Sequence[str], effective_uid: int | None = None) -> str:
    """Return why this machine cannot run the roles, in one line; "" when it can. `effective_uid`: default this user."""
    if (os.geteuid() if effective_uid is None else effective_uid) != 0:
        return "mounting filesystems and attaching loop devices requires root; run it as root, e.g. with sudo"
    absent = [tool for tool in tools if find_tool(tool) is None]
    packages = sorted({_PACKAGES.get(tool) or package_of(tool) or tool for tool in absent})
    if absent:
        return f"{', '.join(absent)} not found: install {', '.join(packages)}"
    return "; ".join(MachineTools().problems())


def stop_on_signals(supervisor: Supervisor) -> None:
    """Stop on SIGINT, SIGTERM and, unless it is ignored as nohup(1) leaves it, SIGHUP."""

    def stop(number: int, frame: FrameType | None) -> None:
        supervisor.stop.set()

    for each in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        if each is not signal.SIGHUP or signal.getsignal(each) is not signal.SIG_IGN:
            signal.signal(each, stop)


def run_local(settings: LocalSettings) -> int:
    problem = why_impossible(TOOLS)
    try:
        if problem:
            raise PreconditionFailed(problem)
        with closing(Supervisor(settings, ChildProcesses(), _say)) as supervisor:
            stop_on_signals(supervisor)
            supervisor.start()
            if not supervisor.stop.is_set():
                _greet(supervisor)
            supervisor.watch()
            _say("stopping: node, controller, storage")
    except DriverError as error:
        print(f"nvmesh-csi local: {error}", file=sys.stderr, flush=True)
        return 1
    _say("stopped; volumes and attachments are kept")
    return 0


def _greet(supervisor: Supervisor) -> None:
    paths, port = supervisor.paths, supervisor.port
    controller, node = paths.sockets.values()
    _say(f"ready in {paths.directory}")
    _say(f"  controller: unix://{controller}")
    _say(f"  node:       unix://{node}")
    _say(f"  storage:    http://{_LOOPBACK}:{port}, password in {paths.password}")
    _say(f"  devices:    {paths.devices}")
    for role in Role:
        _say(f"  {role:<11} process {supervisor.pid(role)}, log {paths.logs[role]}")
    _say(f"try:\n  csi-sanity --csi.endpoint=unix://{node} --csi.controllerendpoint=unix://{controller}"
         " --csi.testvolumesize=1073741824")  # fmt: skip
    _say("Ctrl-C stops all; volumes stay and are there at the next start")
