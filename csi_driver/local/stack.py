"""Storage, controller and node as three processes of one machine: started in order, watched, stopped in order.

Knows processes only through the `Processes` port and readiness only through Probe; prints nothing (it tells `report`).
"""

from __future__ import annotations

import errno
import fcntl
import http.client
import os
import signal
import socket
import threading
from collections import deque
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Protocol, Self

from csi_driver.deadline import SYSTEM_CLOCK, Clock, Deadline
from csi_driver.errors import DeadlineReached, HostFailure, PreconditionFailed
from csi_driver.local.places import Places, Role
from csi_driver.local.settings import LocalSettings
from csi_driver.rpc.client import CallFailed, CsiClient

_WATCH_INTERVAL_S = 0.1
_FIRST_PAUSE_S = 0.2
_LONGEST_PAUSE_S = 5.0
_LOOPBACK = "127.0.0.1"
_ANSWER_TIME_S = 2.0


class Process(Protocol):
    """One child."""

    @property
    def pid(self) -> int: ...

    def poll(self) -> int | None:
        """Return how it ended (a signal as a negative number), or None while it runs."""
        ...

    def stop(self, *, timeout_s: float) -> int:
        """End it with SIGTERM, after `timeout_s` with SIGKILL, and its children with it; return how it ended."""
        ...


class Processes(Protocol):
    """Starts children that live long and die with this process."""

    def start(self, argv: Sequence[str], *, log: Path, pid_file: Path, pass_fds: Sequence[int] = ()) -> Process:
        """Start a process whose output is appended to `log`; `pid_file` holds its pid while it runs.

        `pass_fds` stay open in it under their own numbers.
        """
        ...


class RoleKeepsDying(HostFailure):
    """A role died more often than it may."""

    def __init__(self, role: Role, times: int, window_s: float, log: Path) -> None:
        super().__init__(f"{role} died {times} times within {window_s:g} s; its log is {log}")


@dataclass(slots=True)
class _Watched:
    """A role, its process, and when it died lately."""

    role: Role
    process: Process | None = None
    deaths: deque[float] = field(default_factory=deque)
    start_again_at_s: float = 0.0


class Stack:
    """The three roles over one directory. A context manager: leaving it stops all.

    `start` returns when both endpoints are ready; `watch` keeps them so until told to stop.
    """

    def __init__(
        self,
        settings: LocalSettings,
        processes: Processes,
        *,
        report: Callable[[str], None],
        why_not_ready: Callable[[Role, Places, int], str | None] | None = None,
        clock: Clock = SYSTEM_CLOCK,
    ) -> None:
        self.settings = settings
        self.places = Places.below(settings.directory)
        self._processes = processes
        self._report = report
        self._why_not_ready = why_not_ready or ask
        self._clock = clock
        self._roles = {role: _Watched(role) for role in Role}
        self._stop = threading.Event()
        self._resources = ExitStack()
        self._listener: socket.socket | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    # --- starting -------------------------------------------------------------------------------------------

    def start(self) -> None:
        """Take the directory and start all roles; returns when both endpoints answer that they are ready.

        Raises `PreconditionFailed` when another local run has the directory, `HostFailure` when a role dies,
        `DeadlineReached` when one is not ready in time. Whatever was started is stopped by `close`.
        """
        deadline = Deadline.after(self.settings.start_timeout_s, self._clock)
        self._take_directory()
        self._bind()
        self._begin(Role.STORAGE)
        self._await(Role.STORAGE, deadline)
        self._begin(Role.CONTROLLER)
        self._begin(Role.NODE)
        self._await(Role.CONTROLLER, deadline)
        self._await(Role.NODE, deadline)

    def _take_directory(self) -> None:
        directory = self.places.directory
        try:
            directory.mkdir(mode=0o755, parents=True, exist_ok=True)
            descriptor = os.open(self.places.lock, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        except OSError as error:
            raise PreconditionFailed(f"{directory} cannot be used: {error.strerror}") from error
        self._resources.callback(os.close, descriptor)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno not in (errno.EWOULDBLOCK, errno.EACCES):
                raise PreconditionFailed(f"{self.places.lock} cannot be locked: {error.strerror}") from error
            holder = os.pread(descriptor, 32, 0).decode(errors="replace").strip() or "unknown"
            raise PreconditionFailed(
                f"{directory} is in use by another `nvmesh-csi local` (process {holder}); "
                "stop it or set another --directory"
            ) from error
        os.ftruncate(descriptor, 0)
        os.pwrite(descriptor, f"{os.getpid()}\n".encode(), 0)

    def _bind(self) -> None:
        """Bind the storage manager's address, for as long as this run lasts.

        The storage inherits the socket, also after a restart: no other process can take the port in between and
        receive the pool's password.
        """
        listener = socket.socket(socket.AF_INET, socket.SOCK_STREAM, socket.IPPROTO_TCP)
        self._resources.callback(listener.close)
        try:
            listener.bind((_LOOPBACK, 0))
        except OSError as error:
            raise HostFailure(f"cannot bind a TCP port of {_LOOPBACK}: {error.strerror}") from error
        self._listener = listener

    @property
    def _port(self) -> int:
        return int(self._listener.getsockname()[1]) if self._listener is not None else 0

    def _begin(self, role: Role) -> None:
        watched = self._roles[role]
        fd = self._listener.fileno() if self._listener is not None else -1
        watched.process = self._processes.start(
            role_argv(role, self.settings, self.places, self._port, fd),
            log=self.places.log(role),
            pid_file=self.places.pid_file(role),
            pass_fds=[fd] if role is Role.STORAGE else [],
        )

    def _await(self, role: Role, deadline: Deadline) -> None:
        reason: str | None = "not asked yet"

        def settled() -> bool:
            nonlocal reason
            if self._stop.is_set() or self._ending_of(role) is not None:
                return True
            reason = self._why_not_ready(role, self.places, self._port)
            return reason is None

        came = deadline.wait_until(settled, first_s=0.02, most_s=_WATCH_INTERVAL_S)
        ending = self._ending_of(role)
        if ending is not None:
            raise HostFailure(f"{role} {ended(ending)} while starting: {last_line(self.places.log(role))}")
        if not came:
            raise DeadlineReached(f"{role} ({reason}), whose log is {self.places.log(role)}")

    def _ending_of(self, role: Role) -> int | None:
        process = self._roles[role].process
        return None if process is None else process.poll()

    # --- running --------------------------------------------------------------------------------------------

    def pid(self, role: Role) -> int | None:
        """Return the process id of a role; None between its death and its next start."""
        process = self._roles[role].process
        return None if process is None else process.pid

    @property
    def management_url(self) -> str:
        """Where the storage manager listens."""
        return f"http://{_LOOPBACK}:{self._port}"

    def watch(self) -> None:
        """Start roles that die again, until `request_stop`. Raises `RoleKeepsDying` beyond the limit."""
        while not self._stop.wait(_WATCH_INTERVAL_S):
            self.tend()

    def tend(self) -> None:
        """Look at every role once: note a death, and start again what is due. Raises `RoleKeepsDying`."""
        now = self._clock.monotonic()
        for watched in self._roles.values():
            if watched.process is not None:
                ending = watched.process.poll()
                if ending is not None:
                    self._note_death(watched, ending, now)
            if watched.process is None and now >= watched.start_again_at_s:
                self._begin(watched.role)
                self._report(f"{watched.role} started again (process {self.pid(watched.role)})")

    def _note_death(self, watched: _Watched, ending: int, now: float) -> None:
        role, process = watched.role, watched.process
        pid = process.pid if process is not None else 0
        watched.process = None
        watched.deaths.append(now)
        while watched.deaths[0] < now - self.settings.restart_window_s:
            watched.deaths.popleft()
        times = len(watched.deaths)
        log = self.places.log(role)
        self._report(f"{role} (process {pid}) {ended(ending)}: {last_line(log)}")
        if times > self.settings.restart_limit:
            raise RoleKeepsDying(role, times, self.settings.restart_window_s, log)
        pause_s = 0.0 if times == 1 else min(_FIRST_PAUSE_S * 2 ** (times - 2), _LONGEST_PAUSE_S)
        watched.start_again_at_s = now + pause_s

    # --- stopping -------------------------------------------------------------------------------------------

    def request_stop(self) -> None:
        """Make `start` and `watch` return soon. Safe in a signal handler and from any thread."""
        self._stop.set()

    @property
    def stopping(self) -> bool:
        """Whether a stop was requested."""
        return self._stop.is_set()

    def close(self) -> None:
        """Stop node, controller and storage, in this order, and give the directory back. Idempotent."""
        self._stop.set()
        for role in reversed(Role):
            watched = self._roles[role]
            if watched.process is None:
                continue
            died_before = watched.process.poll() is not None
            ending = watched.process.stop(timeout_s=self.settings.stop_timeout_s)
            watched.process = None
            if not died_before and ending not in (0, -signal.SIGTERM):
                self._report(f"{role} {ended(ending)} when it was stopped: {last_line(self.places.log(role))}")
        self._resources.close()


def role_argv(role: Role, settings: LocalSettings, places: Places, port: int, listener: int) -> list[str]:
    """Return the command line of a role. `listener`: descriptor of the socket that is bound to `port`."""
    node_name = settings.node_name or socket.gethostname()
    management = f"http://{_LOOPBACK}:{port}"
    argv = [*settings.program, role.value, "--log-level", settings.log_level]
    match role:
        case Role.STORAGE:
            argv += ["--pool", str(places.pool)]
            argv += [] if settings.size_bytes is None else ["--size", str(settings.size_bytes)]
            argv += ["--listen", f"fd:{listener}"]
            for name, directory in ((node_name, places.directory), *settings.extra_clients):
                argv += ["--client", f"{name}={directory}"]
            argv += ["--overcommit"] if settings.overcommit else []
            argv += ["--preallocate"] if settings.preallocate else []
        case Role.CONTROLLER:
            argv += ["--endpoint", f"unix://{places.controller_socket}", "--driver-name", settings.driver_name]
            argv += ["--management-server", management]
            argv += ["--management-password-file", str(places.password)]
            argv += ["--max-volumes-per-node", str(settings.max_volumes_per_node)]
            argv += ["--volume-health"] if settings.volume_health else []
        case Role.NODE:
            argv += ["--endpoint", f"unix://{places.node_socket}", "--driver-name", settings.driver_name]
            argv += ["--node-name", node_name, "--state-directory", str(places.node_state)]
            argv += ["--device-directory", str(places.devices), "--status-directory", str(places.status_files)]
            argv += ["--max-volumes-per-node", str(settings.max_volumes_per_node)]
            argv += ["--volume-health"] if settings.volume_health else []
            for root in settings.path_roots:
                argv += ["--path-root", str(root)]
    return argv


def ask(role: Role, places: Places, port: int) -> str | None:
    """Ask a role once whether it is ready: None, or why not. The storage manager is, when it answers a request."""
    if role is Role.STORAGE:
        return _why_silent(port)
    endpoint = places.controller_socket if role is Role.CONTROLLER else places.node_socket
    if not endpoint.exists():
        return f"the socket {endpoint} does not exist yet"
    with CsiClient(endpoint) as client:
        try:
            return None if client.is_ready() else "Probe answers ready=false"
        except CallFailed as error:
            return str(error)


def _why_silent(port: int) -> str | None:
    connection = http.client.HTTPConnection(_LOOPBACK, port, timeout=_ANSWER_TIME_S)
    try:
        connection.request("GET", "/login")  # needs no session
        connection.getresponse()
    except (OSError, http.client.HTTPException) as error:
        return f"no answer on port {port}: {error}"
    finally:
        connection.close()
    return None


def ended(status: int) -> str:
    """Say how a process ended."""
    return f"was killed by signal {-status}" if status < 0 else f"exited with status {status}"


def last_line(log: Path, limit_bytes: int = 4096) -> str:
    """Return the last line of a log that is not empty, cut to a length that fits a message."""
    try:
        with log.open("rb") as stream:
            stream.seek(0, os.SEEK_END)
            stream.seek(max(0, stream.tell() - limit_bytes))
            lines = stream.read().decode(errors="replace").split("\n")
    except OSError as error:
        return f"its log {log} cannot be read: {error.strerror}"
    return next((line.strip()[-300:] for line in reversed(lines) if line.strip()), f"its log {log} is empty")
