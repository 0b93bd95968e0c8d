# SPDX-License-Identifier: Apache-2.0
"""Gives back the blocks of a file that hold only zeros, while no other program has the file open.

The kernel grants a write lease only to the one that has a file open alone, which a loop device counts for too. It makes
the next who opens the file wait until the lease is given up (fcntl(2), "Leases").
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import mmap
import os
import signal
from collections.abc import Iterator
from pathlib import Path

from csi_driver.errors import HostFailure, PreconditionFailed
from csi_driver.host.syscalls import closing, open_file, punch_hole, system_call
from csi_driver.model import MIB

_UNIT_BYTES = MIB
"""Smaller runs of zeros stay: each hole is an extent, and files with many are refused snapshots."""
_READ_BYTES = 4 * MIB
_BLOCK_BYTES = 4096
_ZEROS = bytes(_UNIT_BYTES)


class SparseFiles:
    """Methods as in `csi_driver.embedded.settings.SparseFiles`."""

    def why_not(self, directory: Path) -> str:
        try:
            with closing(open_file(directory, os.O_TMPFILE | os.O_RDWR | os.O_DIRECT)) as fd, _lease(fd, directory):
                with system_call(f"write a file in {directory}"):
                    os.posix_fallocate(fd, 0, _UNIT_BYTES)
                punch_hole(fd, 0, _UNIT_BYTES)
                if os.fstat(fd).st_blocks:
                    return f"the filesystem of {directory} does not give back a hole in a file"
        except (HostFailure, PreconditionFailed) as problem:
            return f"the filesystem of {directory} gives back no part of a file ({problem})"
        return ""

    def give_back_zeros(self, file: Path, offset: int, most_bytes: int) -> int | None:
        """Read past the page cache, and synced: zeros that are not on disk are no evidence."""
        with (
            closing(open_file(file, os.O_RDWR | os.O_NOFOLLOW | os.O_DIRECT)) as fd,
            _lease(fd, file),
            mmap.mmap(-1, _READ_BYTES, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS) as buffer,
            system_call(f"give back zeros of {file}"),
        ):
            os.fsync(fd)
            read_bytes = 0
            for start, end in _pieces(fd, offset):
                if read_bytes >= most_bytes or not _is_alone(fd):
                    return start
                count = os.preadv(fd, [memoryview(buffer)[: end - start]], start)
                if count < end - start:
                    raise OSError(errno.EIO, os.strerror(errno.EIO))
                read_bytes += count
                for at in range(0, count, _UNIT_BYTES):
                    size = min(_UNIT_BYTES, count - at)
                    # The lease is checked last: a write after the read needs an open file, which ends it.
                    if buffer[at : at + size] == _ZEROS[:size] and _is_alone(fd):
                        punch_hole(fd, start + at, size)
        return None


def _pieces(fd: int, offset: int) -> Iterator[tuple[int, int]]:
    """Yield the parts of a file with data, in whole units and at most a buffer long."""
    size_bytes, start = os.fstat(fd).st_size // _BLOCK_BYTES * _BLOCK_BYTES, offset // _UNIT_BYTES * _UNIT_BYTES
    while start < size_bytes:
        try:
            start = max(start, os.lseek(fd, start, os.SEEK_DATA) // _UNIT_BYTES * _UNIT_BYTES)
        except OSError as problem:
            if problem.errno == errno.ENXIO:  # no data follows
                return
            raise
        end = min(size_bytes, start + _READ_BYTES)
        yield start, end
        start = end


@contextlib.contextmanager
def _lease(fd: int, file: Path) -> Iterator[None]:
    with system_call(f"lease {file}"):
        # The default signal when someone else opens the file would end the process; this one is ignored.
        fcntl.fcntl(fd, fcntl.F_SETSIG, signal.SIGURG)
        try:
            fcntl.fcntl(fd, fcntl.F_SETLEASE, fcntl.F_WRLCK)
        except BlockingIOError as problem:
            raise PreconditionFailed(f"another program has {file} open") from problem
    yield  # closing the file gives the lease up


def _is_alone(fd: int) -> bool:
    """Return whether the lease holds: no other program waits to open the file, or has opened it after 45 s."""
    return fcntl.fcntl(fd, fcntl.F_GETLEASE) == fcntl.F_WRLCK
