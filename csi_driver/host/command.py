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
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType

from csi_driver.errors import CommandFailed, CommandTimedOut, ToolMissing

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
