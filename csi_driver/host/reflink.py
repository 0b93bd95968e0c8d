# SPDX-License-Identifier: Apache-2.0
"""Files that share their blocks: FICLONE of include/uapi/linux/fs.h, FIEMAP of include/uapi/linux/fiemap.h."""

from __future__ import annotations

import fcntl
import struct
from collections.abc import Sequence

from csi_driver.errors import SystemCallFailed
from csi_driver.host import ioctls
from csi_driver.host.syscalls import system_call
from csi_driver.host_model import Extent

_FICLONE, _FIEMAP = 0x40049409, 0xC020660B
_FIEMAP_REQUEST = struct.Struct("=QQIIII")
"""Start, length, flags, mapped extents, room for extents, reserved."""
_FIEMAP_EXTENT = struct.Struct("=QQQ16xI12x")
"""Offset in the file, address on the device, length, flags."""
_MOST_BYTES, _FLAG_SYNC = 2**64 - 1, 1
_HARMLESS = 0x1 | 0x1000 | 0x2000
"""Flags of an extent: LAST, MERGED and SHARED. Any other one makes the address worthless."""


class ReflinkedFiles:
    """Methods as in `csi_driver.embedded.settings.Reflinks`."""

    def clone(self, source_fd: int, target_fd: int) -> None:
        with system_call("FICLONE"):
            fcntl.ioctl(target_fd, _FICLONE, source_fd)

    def count_extents(self, fd: int) -> int:
        request = bytearray(_FIEMAP_REQUEST.pack(0, _MOST_BYTES, _FLAG_SYNC, 0, 0, 0))
        with system_call("FIEMAP"):
            fcntl.ioctl(fd, _FIEMAP, request)
        return int(_FIEMAP_REQUEST.unpack(request)[3])

    def extents(self, fd: int, offset: int, most: int) -> Sequence[Extent]:
        request = bytearray(_FIEMAP_REQUEST.pack(offset, _MOST_BYTES - offset, _FLAG_SYNC, 0, most, 0))
        request += bytes(_FIEMAP_EXTENT.size * most)
        with system_call("FIEMAP"):
            fcntl.ioctl(fd, _FIEMAP, request)
        end = _FIEMAP_REQUEST.size + _FIEMAP_EXTENT.size * int(_FIEMAP_REQUEST.unpack_from(request)[3])
        rows = _FIEMAP_EXTENT.iter_unpack(memoryview(request)[_FIEMAP_REQUEST.size : end])
        return [Extent(start, length, None if flags & ~_HARMLESS else at) for start, at, length, flags in rows]

    def why_not_comparable(self, fd: int) -> str:
        try:
            if ioctls.xfs_realtime_blocks(fd) == 0:
                return ""
        except SystemCallFailed as problem:
            return f"the addresses of blocks tell changes only on xfs ({problem})"
        return "on xfs with a realtime device two blocks may have one address"
