# SPDX-License-Identifier: Apache-2.0
"""Freezes filesystems and exported namespaces, and thaws them also after a failure. A separate program.

`freeze` starts and commands it.

It needs nothing of this package, so that it starts in a moment. Commands are lines on standard input, the first one a
JSON object; reports are lines on standard output. It thaws on command, when its time is up, and when standard input
ends, as it does when the process that started it is killed. A freeze that the kernel does not answer keeps no other
filesystem frozen: it is thawed when it returns.

Descriptor 3 is the record. Its last bytes are the states of the filesystems; each is written before and after the call
that changes it. So the filesystems that a killed guard left frozen are known, and those that another program froze are
not thawed.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import fcntl
import json
import os
import select
import signal
import stat
import threading
import time
from collections.abc import Callable
from typing import Any

RECORD_FD = 3
PREPARE_S = 15.0
"""Limit for opening the filesystems and writing out cached data, before the first freeze."""
NOT_BEGUN, BEGUN, FROZEN, OVER = b".", b"?", b"F", b"-"
READY, ALL_FROZEN, THAWED, FAILED = "ready", "frozen", "thawed", "failed "
FREEZE_COMMAND, THAW_COMMAND = b"freeze\n", b"thaw\n"

HELD_GROUP, USED_GROUP = "127", "1"
"""ANA groups of a namespace: the kernel's target lets hosts use group 1 only, in others their I/O waits. It takes the
last one, 128, for 0, which holds nothing (Linux 6.12)."""

_FIFREEZE, _FITHAW = 0xC0045877, 0xC0045878  # include/uapi/linux/fs.h
_BTRFS_IOC_FS_INFO = 0x8400941F
_PR_SET_PDEATHSIG = 1


class Filesystem:
    """A mounted filesystem; `place`: of its state in the record."""

    def __init__(self, asked: dict[str, Any]) -> None:
        self.device: str = asked["device"]
        self.paths: list[str] = asked["paths"]
        self.place: int = asked["place"]
        self.fd = -1
        self.is_frozen = False

    def open(self, excluded: int) -> None:
        """Open the root of one of its mounts. `excluded`: a filesystem that must never be frozen, by st_dev."""
        failure: object = "another filesystem is mounted over it"
        for path in self.paths:
            try:
                held = os.open(path, os.O_PATH | os.O_NOFOLLOW | os.O_CLOEXEC)
                try:
                    mode = os.fstat(held).st_mode
                    if not (stat.S_ISDIR(mode) or stat.S_ISREG(mode)):
                        continue
                    fd = os.open(f"/proc/self/fd/{held}", os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
                finally:
                    os.close(held)
            except OSError as error:
                failure = error
                continue
            if self.device in devices_of(fd):
                if os.fstat(fd).st_dev == excluded:
                    raise ValueError(f"the filesystem at {path} holds the pool itself")
                self.fd = fd
                return
            os.close(fd)
        raise ValueError(f"no mount of device {self.device} can be opened, of {', '.join(self.paths)}: {failure}")

    def mark(self, state: bytes) -> None:
        os.pwrite(RECORD_FD, state, self.place)

    def freeze(self) -> None:
        self.mark(BEGUN)
        try:
            fcntl.ioctl(self.fd, _FIFREEZE, 0)
        except OSError as error:
            self.mark(OVER)
            why = "another program has frozen it already" if error.errno == errno.EBUSY else error
            raise ValueError(f"the filesystem of device {self.device} at {self.paths[0]}: {why}") from error

    def thaw(self) -> None:
        try:
            fcntl.ioctl(self.fd, _FITHAW, 0)
        except OSError as error:
            if error.errno != errno.EINVAL:  # it is not frozen
                raise
        self.mark(OVER)


class Namespace:
    """A namespace of the kernel's NVMe target; `path`: of the file with its ANA group, which is its whole state."""

    def __init__(self, path: str) -> None:
        self.path = path
        self.is_frozen = False

    def mark(self, state: bytes) -> None: ...

    def freeze(self) -> None:
        self._put(HELD_GROUP)

    def thaw(self) -> None:
        with contextlib.suppress(FileNotFoundError):  # the export has ended
            self._put(USED_GROUP)

    def _put(self, group: str) -> None:
        with open(self.path, "w") as file:
            file.write(group)


def devices_of(fd: int) -> set[str]:
    """Return the devices of the filesystem of an open file; the number of a btrfs itself is anonymous."""
    number = os.fstat(fd).st_dev
    try:
        raw = bytearray(1024)
        fcntl.ioctl(fd, _BTRFS_IOC_FS_INFO, raw)
        text = raw[16:32].hex()
        uuid = "-".join((text[:8], text[8:12], text[12:16], text[16:20], text[20:]))
        root = f"/sys/fs/btrfs/{uuid}/devices"
        found = set()
        for name in os.listdir(root):
            with open(f"{root}/{name}/dev") as file:
                found.add(file.read().strip())
        return found
    except OSError:
        return {f"{os.major(number)}:{os.minor(number)}"}


class Guard:
    def __init__(self, asked: dict[str, Any]) -> None:
        self.limit_s: float = asked["limit_s"]
        self._excluded: int = asked["excluded"]
        self.filesystems = list(map(Filesystem, asked["filesystems"]))
        # They come last: a filesystem may take a while.
        self._all: list[Filesystem | Namespace] = [*self.filesystems, *map(Namespace, asked["namespaces"])]
        self._changing = threading.Lock()
        self._ending = threading.Event()

    def prepare(self) -> None:
        """Open the filesystems and write out most of the cached data, so that the freeze is short."""
        for each in self.filesystems:
            each.open(self._excluded)
        libc = ctypes.CDLL(None)
        for each in self.filesystems:
            libc.syncfs(each.fd)  # the freeze syncs again and reports errors
        report(READY)

    def freeze(self) -> None:
        for each in self._all:
            with self._changing:
                if self._ending.is_set():
                    return
            each.freeze()
            with self._changing:
                each.is_frozen = not self._ending.is_set()
                if each.is_frozen:
                    each.mark(FROZEN)
            if not each.is_frozen:  # all others were thawed meanwhile
                each.thaw()
                return
        report(ALL_FROZEN)

    def thaw(self) -> None:
        """Thaw all, each in a thread: a hanging device delays no other."""
        with self._changing:
            self._ending.set()
            frozen = [each for each in self._all if each.is_frozen]
        threads = [start(each.thaw) for each in reversed(frozen)]
        for thread in threads:
            thread.join()

    def thaw_recorded(self) -> None:
        for each in self.filesystems:
            try:
                each.open(-1)
                each.thaw()
            except (OSError, ValueError) as error:
                report(f"{FAILED}{error}")
        report(THAWED)


def start(act: Callable[[], None]) -> threading.Thread:
    def run() -> None:
        try:
            act()
        except (OSError, ValueError) as error:
            report(f"{FAILED}{error}")

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    return thread


def report(line: str) -> None:
    with contextlib.suppress(OSError):  # the reader may have ended
        os.write(1, line.replace("\n", " ").encode(errors="replace") + b"\n")


def command(until_s: float) -> bytes:
    """Return the next command; empty at the end of standard input, or when the time is up."""
    waiting = select.poll()
    waiting.register(0, select.POLLIN)
    left_ms = max(0.0, until_s - time.monotonic()) * 1000
    return os.read(0, 64) if waiting.poll(left_ms) else b""


def main() -> None:
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGPIPE):
        signal.signal(number, signal.SIG_IGN)
    # When the manager is killed, it must see that, also if another program has stopped it.
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGCONT)
    with open(0, "rb", buffering=0, closefd=False) as commands:
        guard = Guard(json.loads(commands.readline()))
    if not guard.limit_s:
        guard.thaw_recorded()
        return
    start(guard.prepare)
    if command(time.monotonic() + PREPARE_S) == FREEZE_COMMAND:
        until_s = time.monotonic() + guard.limit_s
        freezing = start(guard.freeze)
        asked = command(until_s)
        guard.thaw()
        if asked == THAW_COMMAND:
            report(THAWED)
        freezing.join()
    os._exit(0)  # a thread may be blocked in the kernel


if __name__ == "__main__":
    main()
