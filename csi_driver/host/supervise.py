"""Children that live long: started with a log and a pid file, ended in an orderly way, never left behind.

Each is asked of the kernel to be killed when the thread that started it ends (PR_SET_PDEATHSIG, by setpriv(1)): start
them from a thread that lives as long as they should, such as the main one. Whether and when to start a child again is
the caller's to decide.
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


class ChildProcess:
    """One child. Made by `ChildProcesses.start`."""

    def __init__(self, process: subprocess.Popen[bytes], pid_file: Path) -> None:
        self._process = process
        self._pid_file = pid_file

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
        if self._process.poll() is None:
            self._process.terminate()
            with contextlib.suppress(subprocess.TimeoutExpired):
                self._process.wait(timeout_s)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.pid, signal.SIGKILL)
        try:
            status = self._process.wait(_AFTER_KILL_S)
        except subprocess.TimeoutExpired as error:
            raise HostFailure(f"process {self.pid} does not end, not even by SIGKILL") from error
        self._clean_up()
        return status

    def _clean_up(self) -> None:
        with contextlib.suppress(FileNotFoundError):
            if self._pid_file.read_text().strip() == str(self.pid):
                self._pid_file.unlink(missing_ok=True)


class ChildProcesses:
    """Starts children. `environment` is all they get; None = a search path and the C locale."""

    def __init__(self, environment: Mapping[str, str] | None = None) -> None:
        self._environment = dict(environment or {"PATH": SEARCH_PATH, "LC_ALL": "C.UTF-8"})

    def start(self, argv: Sequence[str], *, log: Path, pid_file: Path) -> ChildProcess:
        """Start a process whose output is added to `log`; its pid stands in `pid_file` while it runs.

        It has a session of its own: a Ctrl-C at the terminal reaches this process alone, which then stops its
        children in its own order.
        """
        setpriv = find_tool("setpriv")
        if setpriv is None:
            raise ToolMissing("setpriv", package_of("setpriv"))
        try:
            log_fd = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o640)
        except OSError as error:
            raise SystemCallFailed(f"open {log}", error.errno or 0) from error
        try:
            process = subprocess.Popen(
                [setpriv, "--pdeathsig", "KILL", "--", *argv],
                stdin=subprocess.DEVNULL,
                stdout=log_fd,
                stderr=log_fd,
                env=self._environment,
                start_new_session=True,
            )
        except OSError as error:
            raise SystemCallFailed(f"start {argv[0]}", error.errno or 0) from error
        finally:
            os.close(log_fd)
        child = ChildProcess(process, pid_file)
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
