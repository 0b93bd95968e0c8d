# SPDX-License-Identifier: Apache-2.0
"""Processes: run a program to its end, keep child processes, and find the running role of this program.

The only module that starts processes: with a list of arguments, without a shell and without this environment.

A program that works on a device is never killed: while the device's I/O hangs, the kernel keeps the killed process and
its lock on the disk, and every later open of the device hangs too (seen on Linux 6.12 with blkid). The caller waits,
and the volume is busy until the program ends. When the driver is killed, the program keeps the lock of the device by
the descriptor that it inherited (`pass_fds`), so that nothing reads the device while it may be written. A parent-death
signal is no alternative: it is set after the fork and does not reach a process in uninterruptible sleep.
"""

from __future__ import annotations

import contextlib
import errno
import logging
import os
import select
import signal
import subprocess
import sys
import threading
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TextIO

from csi_driver.errors import CommandFailed, CommandTimedOut, HostFailure, SystemCallFailed, ToolMissing
from csi_driver.host import syscalls
from csi_driver.host.syscalls import closing, open_file, system_call
from csi_driver.host_model import RunningRole
from csi_driver.telemetry import tracing

logger = logging.getLogger(__name__)

SEARCH_PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
_ENVIRONMENT = {"PATH": SEARCH_PATH, "LC_ALL": "C"}
_GRACE_AFTER_KILL_S = 2.0
_PACKAGES = {  # of Debian
    "blkid": "util-linux",
    "cryptsetup": "cryptsetup-bin",
    "mkfs.ext4": "e2fsprogs",
    "e2fsck": "e2fsprogs",
    "resize2fs": "e2fsprogs",
    "mkfs.xfs": "xfsprogs",
    "mkfs.btrfs": "btrfs-progs",
}
_places: dict[str, str] = {}
"""Where programs to run were found. One that cannot be started there is forgotten, and looked for at its next run."""
_USUAL_OUTPUT_BYTES = 16 << 10


@dataclass(frozen=True, slots=True)
class Completed:
    status: int
    stdout: bytes
    stderr: str


def find_tool(program: str) -> str | None:
    """Return the absolute path of a program; None when it is not installed."""
    places = (f"{directory}/{program}" for directory in SEARCH_PATH.split(":"))
    return next((place for place in places if os.access(place, os.X_OK) and not os.path.isdir(place)), None)


def package_of(program: str) -> str:
    return _PACKAGES.get(program, "")


def _require_tool(program: str) -> str:
    path = _places.get(program) or find_tool(program)
    if path is None:
        raise ToolMissing(program, package_of(program))
    _places[program] = path
    return path


def run(
    argv: Sequence[str],
    *,
    timeout_s: float,
    accept: Collection[int] = (0,),
    pass_fds: Sequence[int] = (),
    environment: Mapping[str, str] | None = None,
    on_device: bool = False,
) -> Completed:
    """Run a program and wait for its end. `pass_fds` keep their numbers; `environment` is added to PATH and LC_ALL.

    After `timeout_s` its process group is killed. With `on_device` it is never killed: after `timeout_s` that is
    logged. Raises `CommandFailed` for a status outside `accept`, `CommandTimedOut`, `ToolMissing`.
    """
    program, variables = _require_tool(argv[0]), {**_ENVIRONMENT, **(environment or {})}
    with (
        tracing.step(argv[0]),
        system_call(f"start {argv[0]}"),
        closing(os.memfd_create("stdout")) as stdout,
        closing(os.memfd_create("stderr")) as stderr,
    ):
        try:
            pid = syscalls.spawn(program, argv, variables, {stdout: 1, stderr: 2}, pass_fds)
        except SystemCallFailed as failure:
            if failure.errno in (errno.ENOENT, errno.EACCES):
                _places.pop(argv[0], None)
                raise ToolMissing(argv[0], package_of(argv[0])) from failure
            raise
        status = _wait_for(argv, pid, timeout_s, on_device=on_device)
        output, text = _content(stdout), _content(stderr).decode(errors="replace")
        if status not in accept:
            raise CommandFailed(argv, status, text or output.decode(errors="replace"))
    return Completed(status, output, text)


def run_here(argv: Sequence[str], *, timeout_s: float, stdin: bytes = b"") -> Completed:
    """Run a program of the person who called this one: with that environment, search path and directory.

    Any exit status is returned. Raises `CommandTimedOut`, `ToolMissing`.
    """
    try:
        done = subprocess.run(argv, input=stdin, capture_output=True, timeout=timeout_s, check=False)
    except subprocess.TimeoutExpired as late:
        raise CommandTimedOut(argv, timeout_s) from late
    except (FileNotFoundError, PermissionError) as failure:
        raise ToolMissing(argv[0], package_of(argv[0])) from failure
    return Completed(done.returncode, done.stdout, done.stderr.decode(errors="replace"))


def start_script(script: Path, descriptors: Mapping[int, int]) -> int:
    """Start a script that needs nothing but Python's library, and return its process id; `collect` must follow."""
    argv = [sys.executable, "-I", "-S", str(script)]
    return syscalls.spawn(sys.executable, argv, _ENVIRONMENT, descriptors, ())


def collect(pid: int, within_s: float) -> bool:
    """Wait for the end of a child, and return whether it has ended; else a thread collects it when it ends."""
    with closing(os.pidfd_open(pid)) as process:
        has_ended = _ends(process, within_s)
    threading.Thread(target=os.waitpid, args=(pid, 0), daemon=True).start() if not has_ended else os.waitpid(pid, 0)
    return has_ended


def _wait_for(argv: Sequence[str], pid: int, timeout_s: float, *, on_device: bool) -> int:
    """Return the exit status, negative for a signal."""
    try:
        descriptor = os.pidfd_open(pid)
    except OSError:  # too many are open
        return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    with closing(descriptor) as process:
        try:
            has_ended = _ends(process, timeout_s)
        except BaseException:
            if not on_device:
                _kill_group(pid)
            raise
        if not has_ended and not on_device:
            _kill_group(pid)
            _ends(process, _GRACE_AFTER_KILL_S)
            threading.Thread(target=os.waitpid, args=(pid, 0), daemon=True).start()  # it may be blocked in the kernel
            raise CommandTimedOut(argv, timeout_s)
        if not has_ended:
            logger.warning(
                "%s (process %d) has not ended within %g s; it works on a device and is not killed: its volume is busy "
                "until it ends",
                argv,
                pid,
                timeout_s,
            )
            _ends(process, None)
        return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def _ends(process: int, within_s: float | None) -> bool:
    """Tell if the process of a descriptor has ended, or ends in that time."""
    waiting = select.poll()
    waiting.register(process, select.POLLIN)
    return bool(waiting.poll(None if within_s is None else within_s * 1000))


def _content(fd: int) -> bytes:
    content = os.pread(fd, _USUAL_OUTPUT_BYTES, 0)
    return content if len(content) < _USUAL_OUTPUT_BYTES else os.pread(fd, os.fstat(fd).st_size, 0)


def _kill_group(pid: int) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.killpg(pid, signal.SIGKILL)


@contextlib.contextmanager
def secret_fd(secret: str) -> Iterator[int]:
    """Give a file in memory with a secret for a program that inherits it: in no argument list and on no disk."""
    with closing(os.memfd_create("passphrase", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)) as fd:
        os.write(fd, secret.encode())
        yield fd


# A child's process group is killed when this process ends for any reason: a shell in the group reads a pipe that only
# this process can write, and kills the group at end of file. A parent-death signal would miss a parent that is killed
# before it is set, and is sent when the thread that forked ends. Programs that a child starts by `run` have their own
# sessions and finish.

_AFTER_KILL_S = 5.0
_KILL_WHEN_PARENT_ENDS = 'exec {0}<&0 </dev/null; (read -r _ <&{0}; kill -s KILL -- "-$$") & exec "$@" {0}<&-'
"""Standard input is the pipe; in the subshell `$$` is the process id of the child, which is its group's id too."""
_ONE_HEAP = {"MALLOC_ARENA_MAX": "1"}
"""As in the image: each thread of a role would get a heap of its own."""
_SHELL_FDS = range(3, 10)
"""Descriptors that a POSIX shell can redirect."""


@dataclass(slots=True)
class ChildProcess:
    process: subprocess.Popen[bytes]
    lifeline: int
    pid_file: Path
    _is_over: bool = field(default=False, init=False)

    @property
    def pid(self) -> int:
        return self.process.pid

    def poll(self) -> int | None:
        """Return the exit status, negative for a signal; None while it runs."""
        status = self.process.poll()
        if status is not None:
            self._clean_up()
        return status

    def stop(self, *, timeout_s: float) -> int:
        """End it by SIGTERM, after `timeout_s` by SIGKILL, then its group; return the exit status."""
        if self._is_over:
            return self.process.wait()  # another group may have its number
        if self.process.poll() is None:
            self.process.terminate()
            with contextlib.suppress(subprocess.TimeoutExpired):
                self.process.wait(timeout_s)
        _kill_group(self.pid)
        try:
            status = self.process.wait(_AFTER_KILL_S)
        except subprocess.TimeoutExpired as error:
            raise HostFailure(
                f"process {self.pid} is still running {_AFTER_KILL_S:g} s after SIGKILL: it waits in the kernel, "
                "usually for a device that does not answer"
            ) from error
        self._clean_up()
        return status

    def _clean_up(self) -> None:
        if self._is_over:
            return
        self._is_over = True
        _kill_group(self.pid)
        os.close(self.lifeline)
        with contextlib.suppress(FileNotFoundError):
            if self.pid_file.read_text().strip() == str(self.pid):
                self.pid_file.unlink(missing_ok=True)


class ChildProcesses:
    """Starts child processes."""

    def start(self, argv: Sequence[str], *, log: Path, pid_file: Path, pass_fds: Sequence[int] = ()) -> ChildProcess:
        """Start a process with output appended to `log`; `pid_file` holds its pid while it runs.

        It has its own session: Ctrl-C reaches only this process, which stops its children in order.
        """
        shell = _require_tool("sh")
        log_fd = open_file(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o640)
        shell_fd = next(fd for fd in _SHELL_FDS if fd not in pass_fds)
        reading, writing = os.pipe()
        try:
            process = subprocess.Popen(
                [shell, "-c", _KILL_WHEN_PARENT_ENDS.format(shell_fd), "sh", *argv],
                stdin=reading,
                stdout=log_fd,
                stderr=log_fd,
                env={"PATH": SEARCH_PATH, "LC_ALL": "C.UTF-8", **_ONE_HEAP},
                pass_fds=tuple(pass_fds),
                start_new_session=True,
            )
        except OSError as error:
            os.close(writing)
            raise SystemCallFailed(f"start {argv[0]}", error.errno or 0) from error
        finally:
            os.close(reading)
            os.close(log_fd)
        child = ChildProcess(process, writing, pid_file)
        try:
            draft = pid_file.with_name(f".{pid_file.name}.{os.getpid()}")
            draft.write_text(f"{process.pid}\n")
            draft.replace(pid_file)
        except OSError as error:
            child.stop(timeout_s=0)
            raise SystemCallFailed(f"write {pid_file}", error.errno or 0) from error
        return child


# A command in a role's container (kubectl exec, a hook) has the environment of the role, but not its arguments.

_PROC = Path("/proc")
_PROGRAM = "nvmesh-csi"
_MODULE = ("-m", "csi_driver")
_MOST_WORDS_BEFORE = 4
"""An interpreter and its options may precede the program."""


def find_running(roles: Sequence[str]) -> RunningRole | None:
    """Return the process of one of these roles in this mount namespace, of several process 1; else None.

    Processes of other users are ignored: their arguments name files to read and servers to log in to.
    """
    found = list(all_running(roles))
    first = [each for each in found if each.pid == 1]
    return first[0] if first else found[0] if len(found) == 1 else None


def all_running(roles: Sequence[str]) -> Iterator[RunningRole]:
    """Yield the processes of these roles in this mount namespace and of this user."""
    own = _PROC / "self"
    namespace, users = os.readlink(own / "ns/mnt"), _users(own)
    for directory in _PROC.iterdir():
        if not directory.name.isdecimal() or int(directory.name) == os.getpid():
            continue
        try:
            called = parse_role(_words(directory / "cmdline"), roles)
            if not called or os.readlink(directory / "ns/mnt") != namespace or _users(directory) != users:
                continue
            environ = dict(word.partition("=")[::2] for word in _words(directory / "environ"))
        except OSError:
            continue  # it has ended, or may not be read
        role, *arguments = called
        yield RunningRole(int(directory.name), role, tuple(arguments), environ)


def parse_role(argv: Sequence[str], roles: Sequence[str]) -> Sequence[str]:
    """Return the role and its arguments in a command line; empty when it starts none of these roles."""
    for place, word in enumerate(argv[:_MOST_WORDS_BEFORE]):
        is_module = word == _MODULE[1] and place > 0 and argv[place - 1] == _MODULE[0]
        if is_module or Path(word).name == _PROGRAM:
            called = argv[place + 1 :]
            return called if called and called[0] in roles else ()
    return ()


def log_of(role: RunningRole) -> TextIO | None:
    """Open the standard error of a running role, because the output of a hook is not shown; None when that fails."""
    flags = os.O_WRONLY | os.O_APPEND | os.O_CLOEXEC | os.O_NOCTTY | os.O_NONBLOCK
    try:
        # Without O_NONBLOCK the open of a pipe without reader would block.
        fd = os.open(_PROC / str(role.pid) / "fd/2", flags)
        os.set_blocking(fd, True)
        return os.fdopen(fd, "w", encoding="utf-8")
    except OSError:
        return None


def _users(directory: Path) -> str:
    """Return the real, effective, saved and filesystem user: another user may have started a set-user-ID program."""
    # The name of a process may have other characters at which splitlines() splits.
    lines = (directory / "status").read_bytes().decode(errors="replace").split("\n")
    return next((line for line in lines if line.startswith("Uid:")), "")


def _words(file: Path) -> list[str]:
    return file.read_bytes().decode(errors="surrogateescape").split("\0")[:-1]
