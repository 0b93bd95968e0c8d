"""Run a program of the machine to its end, and say plainly how it ended.

The only place, besides `supervise`, that starts a process. List argv, no shell, nothing of this process's
environment. A read takes its caller's remaining time; a write takes a generous limit of its own.

A driver that dies by SIGKILL leaves its helper running. A parent-death signal would not close that hole: it is set
after the fork, so there is a gap, it does nothing for a helper in uninterruptible sleep, and it costs another
program's start (1.6 ms) each time. Instead a helper that writes inherits the descriptor whose lock says "somebody
works on this device" (`pass_fds`, see `devices.LinuxDevices.open`): the lock lives as long as the helper, so nobody
judges the device while it may still be written.

A program that works on a device is never killed, however long it takes. One that is killed while the device's I/O is
held stays in the kernel with the disk's open mutex, and from then on every open of that device hangs, too (observed on
Linux 6.12 with blkid). Its caller waits on, in a thread that can be lost, and the volume is busy until it ends.
"""

from __future__ import annotations

import contextlib
import logging
import os
import shutil
import signal
import subprocess
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import TextIO

from csi_driver.errors import CommandFailed, CommandTimedOut, HostFailure, SystemCallFailed, ToolMissing
from csi_driver.host_model import RunningRole

logger = logging.getLogger(__name__)

SEARCH_PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
_ENVIRONMENT = {"PATH": SEARCH_PATH, "LC_ALL": "C"}
_NOTHING_MORE: Mapping[str, str] = MappingProxyType({})
_GRACE_AFTER_KILL_S = 2.0

_PACKAGES = {
    "blkid": "util-linux",
    "cryptsetup": "cryptsetup-bin",
    "mkfs.ext4": "e2fsprogs",
    "e2fsck": "e2fsprogs",
    "resize2fs": "e2fsprogs",
    "mkfs.xfs": "xfsprogs",
    "mkfs.btrfs": "btrfs-progs",
}
"""Debian's package of each program that the driver runs."""


@dataclass(frozen=True, slots=True)
class Completed:
    """How a program ended. `stdout` is raw: some answers are not text."""

    status: int
    stdout: bytes
    stderr: str


def find_tool(program: str) -> str | None:
    """Return the absolute path of a program; None when it is not installed."""
    return shutil.which(program, path=SEARCH_PATH)


def package_of(program: str) -> str:
    """Return the Debian package that holds the program; empty when the driver does not know."""
    return _PACKAGES.get(program, "")


def run(
    argv: Sequence[str],
    *,
    timeout_s: float,
    accept: Collection[int] = (0,),
    stdin: bytes | None = None,
    pass_fds: Sequence[int] = (),
    environment: Mapping[str, str] = _NOTHING_MORE,
    on_device: bool = False,
) -> Completed:
    """Run `argv` and wait for its end; a status outside `accept` raises `CommandFailed`.

    After `timeout_s` the whole process group is killed and `CommandTimedOut` raised, also where the process sits in
    uninterruptible sleep and outlives the signal. One that works on a device (`on_device`) is not killed and is waited
    for as long as it takes; after `timeout_s` the log says so. `pass_fds` stay open under their own numbers;
    `environment` is added to the little that it has. Raises `ToolMissing` naming the package.
    """
    program = find_tool(argv[0])
    if program is None:
        raise ToolMissing(argv[0], package_of(argv[0]))
    try:
        process = subprocess.Popen(
            list(argv),
            executable=program,
            stdin=subprocess.DEVNULL if stdin is None else subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            env={**_ENVIRONMENT, **environment},
            cwd="/",
            pass_fds=tuple(pass_fds),
            start_new_session=True,
        )
    except (FileNotFoundError, PermissionError) as error:
        raise ToolMissing(argv[0], package_of(argv[0])) from error
    try:
        if on_device:
            stdout, stderr = _wait_for(process, stdin, timeout_s)
        else:
            stdout, stderr = process.communicate(stdin, timeout=timeout_s)
    except subprocess.TimeoutExpired as error:
        _kill_group(process)
        raise CommandTimedOut(argv, timeout_s) from error
    except BaseException:
        if not on_device:
            _kill_group(process)
        raise
    text = stderr.decode(errors="replace")
    if process.returncode not in accept:
        raise CommandFailed(argv, process.returncode, text or stdout.decode(errors="replace"))
    return Completed(process.returncode, stdout, text)


@contextlib.contextmanager
def secret_fd(passphrase: str) -> Iterator[int]:
    """Hold a passphrase in a file that exists in memory alone, has no name, and ends with the last who holds it."""
    fd = os.memfd_create("passphrase", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    try:
        os.write(fd, passphrase.encode())
        yield fd
    finally:
        os.close(fd)


def fd_path(fd: int) -> str:
    """Return the path under which the program that inherits a descriptor finds it."""
    return f"/proc/self/fd/{fd}"


def _wait_for(process: subprocess.Popen[bytes], stdin: bytes | None, patience_s: float) -> tuple[bytes, bytes]:
    """Wait until a program ends that works on a device; tell once that it takes long."""
    try:
        return process.communicate(stdin, timeout=patience_s)
    except subprocess.TimeoutExpired:
        logger.warning(
            "%s (process %d) has not ended within %g s; it works on a device and is not killed: its volume is busy "
            "until it ends",
            process.args,
            process.pid,
            patience_s,
        )
    return process.communicate()


def _kill_group(process: subprocess.Popen[bytes]) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.communicate(timeout=_GRACE_AFTER_KILL_S)


# --- supervise.py ---
# Long-lived child processes: started with a log and a pid file, stopped in order, never left behind.
#
# A child's process group is killed when this process ends, however it ends: a shell in the group reads a pipe whose
# only writer is this process; end of file is the signal. A parent-death signal (PR_SET_PDEATHSIG) is no substitute:
# it is set after the fork, so a parent that is killed before that leaves the child running, and it is sent when the
# *thread* that forked ends. Programs that a child has started in sessions of their own (mkfs) finish. The caller
# decides whether and when to start a child again.

_AFTER_KILL_S = 5.0
_UNTIL_WE_END = 'exec {0}<&0 </dev/null; (read -r _ <&{0}; kill -s KILL -- "-$$") & exec "$@" {0}<&-'
"""Standard input is the pipe. `$$` is the child's own process id, which is also its group's, in the subshell too."""
_DIGITS = range(3, 10)
"""Descriptors that a POSIX shell can redirect."""


class ChildProcess:
    """One child. Made by `ChildProcesses.start`."""

    def __init__(self, process: subprocess.Popen[bytes], lifeline: int, pid_file: Path) -> None:
        """`lifeline`: descriptor of the pipe's writing end, whose close kills the group."""
        self._process = process
        self._lifeline = lifeline
        self._pid_file = pid_file
        self._is_over = False

    @property
    def pid(self) -> int:
        """Its process id, which is also its group's and session's."""
        return self._process.pid

    def poll(self) -> int | None:
        """Return how it ended (a signal as a negative number), or None while it runs."""
        status = self._process.poll()
        if status is not None:
            self._clean_up()
        return status

    def stop(self, *, timeout_s: float) -> int:
        """End it with SIGTERM, after `timeout_s` with SIGKILL, and its group with it; return how it ended.

        Raises `HostFailure` when it does not even end after SIGKILL (uninterruptible sleep).
        """
        if self._is_over:
            return self._process.wait()  # its number may be another group's by now
        if self._process.poll() is None:
            self._process.terminate()
            with contextlib.suppress(subprocess.TimeoutExpired):
                self._process.wait(timeout_s)
        self._kill_group()
        try:
            status = self._process.wait(_AFTER_KILL_S)
        except subprocess.TimeoutExpired as error:
            raise HostFailure(
                f"process {self.pid} is still running {_AFTER_KILL_S:g} s after SIGKILL: it waits in the kernel, "
                "usually for a device that does not answer"
            ) from error
        self._clean_up()
        return status

    def _kill_group(self) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.pid, signal.SIGKILL)

    def _clean_up(self) -> None:
        if self._is_over:
            return
        self._is_over = True
        self._kill_group()
        os.close(self._lifeline)
        with contextlib.suppress(FileNotFoundError):
            if self._pid_file.read_text().strip() == str(self.pid):
                self._pid_file.unlink(missing_ok=True)


class ChildProcesses:
    """Starts children. `environment` is all they get; None = a search path and the C locale."""

    def __init__(self, environment: Mapping[str, str] | None = None) -> None:
        self._environment = dict(environment or {"PATH": SEARCH_PATH, "LC_ALL": "C.UTF-8"})

    def start(self, argv: Sequence[str], *, log: Path, pid_file: Path, pass_fds: Sequence[int] = ()) -> ChildProcess:
        """Start a process whose output is appended to `log`; `pid_file` holds its pid while it runs.

        `pass_fds` stay open in it under their own numbers. It has a session of its own: a Ctrl-C at the terminal
        reaches this process alone, which then stops its children in its own order.
        """
        shell = find_tool("sh")
        if shell is None:
            raise ToolMissing("sh", package_of("sh"))
        try:
            log_fd = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o640)
        except OSError as error:
            raise SystemCallFailed(f"open {log}", error.errno or 0) from error
        digit = next(digit for digit in _DIGITS if digit not in pass_fds)
        reading, writing = os.pipe()
        try:
            process = subprocess.Popen(
                [shell, "-c", _UNTIL_WE_END.format(digit), "sh", *argv],
                stdin=reading,
                stdout=log_fd,
                stderr=log_fd,
                env=self._environment,
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
            _write_whole(pid_file, f"{process.pid}\n")
        except OSError as error:
            child.stop(timeout_s=0)
            raise SystemCallFailed(f"write {pid_file}", error.errno or 0) from error
        return child


def _write_whole(path: Path, text: str) -> None:
    """Replace a file in one step, so that a reader never meets half a pid."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    temporary.write_text(text)
    temporary.replace(path)


# --- running.py ---
# The role of this program that runs in the same container, or on the same machine: what it was told, and its log.
#
# A command that is run beside it (kubectl exec, a hook) gets the container's environment but not the role's arguments.


_PROC = Path("/proc")
_PROGRAM = "nvmesh-csi"
_MODULE = ("-m", "csi_driver")
_PROGRAM_WITHIN = 4
"""Words: an interpreter and its own options may stand before the program."""


def find_running(roles: Sequence[str]) -> RunningRole | None:
    """Return the process of one of these roles; None where there is none, or one cannot be chosen.

    Only those that see the same mounts are meant, and that run as the same user: what one is told names files to read
    and servers to log in to. Of several the container's first process is.
    """
    found = list(_running(roles))
    first = [each for each in found if each.pid == 1]
    return first[0] if first else found[0] if len(found) == 1 else None


def _running(roles: Sequence[str]) -> Iterator[RunningRole]:
    own = _PROC / "self"
    namespace, users = _mount_namespace(own), _users(own)
    for directory in _PROC.iterdir():
        if not directory.name.isdecimal() or int(directory.name) == os.getpid():
            continue
        try:
            called = called_in(_words(directory / "cmdline"), roles)
            if not called or _mount_namespace(directory) != namespace or _users(directory) != users:
                continue
            environ = dict(word.partition("=")[::2] for word in _words(directory / "environ"))
        except OSError:
            continue  # it has ended, or is somebody else's
        role, *arguments = called
        yield RunningRole(int(directory.name), role, tuple(arguments), environ)


def called_in(argv: Sequence[str], roles: Sequence[str]) -> Sequence[str]:
    """Return the role that a command line starts and what it is told; empty where it starts none of these."""
    for place, word in enumerate(argv[:_PROGRAM_WITHIN]):
        is_module = word == _MODULE[1] and place > 0 and argv[place - 1] == _MODULE[0]
        if is_module or Path(word).name == _PROGRAM:
            called = argv[place + 1 :]
            return called if called and called[0] in roles else ()
    return ()


def log_of(role: RunningRole) -> TextIO | None:
    """Open the standard error of a running role; None where that cannot be: what a hook prints, nobody is shown."""
    flags = os.O_WRONLY | os.O_APPEND | os.O_CLOEXEC | os.O_NOCTTY | os.O_NONBLOCK
    try:
        # Without O_NONBLOCK a pipe that nobody reads would keep us here.
        fd = os.open(_PROC / str(role.pid) / "fd/2", flags)
        os.set_blocking(fd, True)
        return os.fdopen(fd, "w", encoding="utf-8")
    except OSError:
        return None


def _mount_namespace(directory: Path) -> str:
    return str((directory / "ns/mnt").readlink())


def _users(directory: Path) -> str:
    """Return the real, effective, saved and filesystem user: a program with set-user-ID is called by somebody else."""
    # A name of a process may hold every other end of a line that Python knows.
    lines = (directory / "status").read_bytes().decode(errors="replace").split("\n")
    return next((line for line in lines if line.startswith("Uid:")), "")


def _words(file: Path) -> list[str]:
    return file.read_bytes().decode(errors="surrogateescape").split("\0")[:-1]
