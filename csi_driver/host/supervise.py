"""Long-lived child processes: started with a log and a pid file, stopped in order, never left behind.

A child's process group is killed when this process ends, however it ends: a shell in the group reads a pipe whose only
writer is this process, and its end of file is the signal. A parent-death signal (PR_SET_PDEATHSIG) is no substitute:
it is set after the fork, so a parent that is killed before that leaves the child running, and it is sent when the
*thread* that forked ends. Programs that a child has started in sessions of their own (mkfs, see
`csi_driver.host.command`) finish. The caller decides whether and when to start a child again.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path

from csi_driver.errors import HostFailure, SystemCallFailed, ToolMissing
from csi_driver.host.command import SEARCH_PATH, find_tool, package_of

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
