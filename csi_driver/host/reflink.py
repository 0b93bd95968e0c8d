# SPDX-License-Identifier: Apache-2.0
"""Files that share their blocks: FICLONE of include/uapi/linux/fs.h, FIEMAP of include/uapi/linux/fiemap.h."""

from __future__ import annotations

import fcntl
import struct

from csi_driver.host.syscalls import system_call

_FICLONE, _FIEMAP = 0x40049409, 0xC020660B
_FIEMAP_REQUEST = struct.Struct("=QQIIII")
"""Start, length, flags, mapped extents, room for extents, reserved."""
_MOST_BYTES, _FLAG_SYNC = 2**64 - 1, 1


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
