# SPDX-License-Identifier: Apache-2.0
"""ioctl(2) of block devices, loop devices, SCSI devices and mounted filesystems. Errors are `SystemCallFailed`.

Numbers and structures from the kernel's include/uapi/linux/fs.h, loop.h, btrfs.h, fs/ext4/ext4.h and
fs/xfs/libxfs/xfs_fs.h, for architectures with the generic encoding (x86, arm64).
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import fcntl
import os
import struct
import uuid
from dataclasses import dataclass

from csi_driver.errors import SystemCallFailed
from csi_driver.host.syscalls import libc_in_memory, system_call
from csi_driver.host_model import DeviceNumber

_WRITE, _READ = 1, 2


def _io(direction: int, kind: int, number: int, size: int) -> int:
    return direction << 30 | size << 16 | kind << 8 | number


def _call(what: str, fd: int, request: int, argument: bytearray | int = 0) -> int:
    with system_call(what):
        return fcntl.ioctl(fd, request, argument)


_BLKROSET, _BLKROGET, _BLKSSZGET = 0x125D, 0x125E, 0x1268
_BLKGETSIZE64 = _io(_READ, 0x12, 114, 8)
_BLKGETDISKSEQ = _io(_READ, 0x12, 128, 8)


def _get(what: str, fd: int, request: int, value: ctypes.c_uint64 | ctypes.c_int) -> int:
    """Read a value that the block layer of the kernel has in memory: this never waits for the device."""
    if libc_in_memory().ioctl(fd, ctypes.c_ulong(request), ctypes.byref(value)) != 0:
        raise SystemCallFailed(what, ctypes.get_errno())
    return value.value


def size_bytes(fd: int) -> int:
    return _get("BLKGETSIZE64", fd, _BLKGETSIZE64, ctypes.c_uint64())


def disk_sequence(fd: int) -> int | None:
    """Return the sequence number of the disk of a block device; None before Linux 5.15."""
    with contextlib.suppress(SystemCallFailed):
        return _get("BLKGETDISKSEQ", fd, _BLKGETDISKSEQ, ctypes.c_uint64())
    return None


def logical_block_bytes(fd: int) -> int:
    return _get("BLKSSZGET", fd, _BLKSSZGET, ctypes.c_int())


def is_read_only(fd: int) -> bool:
    return bool(_get("BLKROGET", fd, _BLKROGET, ctypes.c_int()))


def set_read_only(fd: int, read_only: bool) -> None:
    """Make the kernel refuse or accept writes to a block device, also of those who have it open."""
    _call("BLKROSET", fd, _BLKROSET, bytearray(struct.pack("=i", int(read_only))))


_LOOP_CLR_FD, _LOOP_SET_STATUS64, _LOOP_GET_STATUS64 = 0x4C01, 0x4C04, 0x4C05
_LOOP_SET_CAPACITY, _LOOP_CONFIGURE, _LOOP_CTL_GET_FREE = 0x4C07, 0x4C0A, 0x4C82
LOOP_READ_ONLY, LOOP_AUTOCLEAR, LOOP_DIRECT_IO = 1, 4, 16
LOOP_LABEL_LIMIT = 63
_LOOP_INFO = struct.Struct("=QQQQQIIII64s64s32s16s")


@dataclass(frozen=True, slots=True)
class LoopStatus:
    """`file`: device and inode; `backing`: the device below, if any; `limit_bytes`: the visible part, 0 = all."""

    file: tuple[int, int]
    backing: DeviceNumber | None
    label: str
    flags: int
    limit_bytes: int
    raw: bytes


def loop_free_number(control_fd: int) -> int:
    """Return the number of a free loop device, which the kernel makes if all are bound. Another may bind it first."""
    return _call("LOOP_CTL_GET_FREE", control_fd, _LOOP_CTL_GET_FREE)


def loop_configure(fd: int, backing_fd: int, *, label: str, flags: int, block_bytes: int) -> None:
    info = _LOOP_INFO.pack(0, 0, 0, 0, 0, 0, 0, 0, flags, label.encode(), b"", b"", b"")
    argument = bytearray(struct.pack("=II", backing_fd, block_bytes) + info + bytes(64))
    _call(f"LOOP_CONFIGURE {label}", fd, _LOOP_CONFIGURE, argument)


def loop_status(fd: int) -> LoopStatus | None:
    """Return the status of a loop device; None when it is not bound."""
    raw = bytearray(_LOOP_INFO.size)
    try:
        _call("LOOP_GET_STATUS64", fd, _LOOP_GET_STATUS64, raw)
    except SystemCallFailed as failure:
        if failure.errno == errno.ENXIO:
            return None
        raise
    fields = _LOOP_INFO.unpack(raw)
    label = bytes(fields[9]).split(b"\0", 1)[0].decode(errors="replace")
    backing = device_number(fields[2]) if fields[2] else None
    return LoopStatus((fields[0], fields[1]), backing, label, fields[8], fields[4], bytes(raw))


def loop_set(fd: int, status: LoopStatus, *, flags: int | None = None, limit_bytes: int | None = None) -> None:
    """Set flags or limit of a loop device; the rest of its status stays as it was read.

    A limit to the first bytes of the file holds also for those who have the device open: the kernel syncs and waits for
    running requests, then refuses requests beyond it (drivers/block/loop.c, loop_set_status; bio_check_eod).
    """
    fields = list(_LOOP_INFO.unpack(status.raw))
    if flags is not None:
        fields[8] = flags
    if limit_bytes is not None:
        fields[4] = limit_bytes
    _call("LOOP_SET_STATUS64", fd, _LOOP_SET_STATUS64, bytearray(_LOOP_INFO.pack(*fields)))


def loop_set_capacity(fd: int) -> None:
    _call("LOOP_SET_CAPACITY", fd, _LOOP_SET_CAPACITY)


def loop_clear(fd: int) -> None:
    """Unbind a loop device; when others have it open, at their last close."""
    _call("LOOP_CLR_FD", fd, _LOOP_CLR_FD)


# EXT4_IOC_SHUTDOWN is the same as XFS_IOC_GOINGDOWN, and so are its flags.
_GOING_DOWN, _WITHOUT_LOG = _io(_READ, ord("X"), 125, 4), 2


def shut_down(fd: int) -> None:
    """Shut down the ext4 or xfs of an open directory: it writes nothing any more; unwritten data is lost."""
    _call("shut the filesystem down", fd, _GOING_DOWN, bytearray(struct.pack("=I", _WITHOUT_LOG)))


_EXT4_IOC_RESIZE_FS = _io(_WRITE, ord("f"), 16, 8)
_XFS_IOC_FSGROWFSDATA = _io(_WRITE, ord("X"), 110, 16)
_XFS_IOC_FSGEOMETRY_V1 = _io(_READ, ord("X"), 100, 112)
_XFS_GEOMETRY_V1 = struct.Struct("=8I4Q16s7I4x")
_BTRFS_IOC_RESIZE = _io(_WRITE, 0x94, 3, 4096)
_BTRFS_IOC_FS_INFO = _io(_READ, 0x94, 31, 1024)


def ext4_resize(fd: int, blocks: int) -> None:
    """Grow the mounted ext4 of `fd` to that many of its blocks; needs CAP_SYS_RESOURCE."""
    _call("EXT4_IOC_RESIZE_FS", fd, _EXT4_IOC_RESIZE_FS, bytearray(struct.pack("=Q", blocks)))


_FITRIM = _io(_READ | _WRITE, ord("X"), 121, 24)


def trim(fd: int, start: int, length: int) -> int:
    """Discard the free blocks in a part of the mounted filesystem of `fd`; return their bytes."""
    wanted = bytearray(struct.pack("=QQQ", start, length, 0))
    _call("FITRIM", fd, _FITRIM, wanted)
    return int(struct.unpack("=QQQ", wanted)[1])


def xfs_realtime_blocks(fd: int) -> int:
    """Return the blocks of the realtime device of the XFS that the file lies on; other filesystems refuse."""
    return int(_xfs_geometry(fd)[9])


def _xfs_geometry(fd: int) -> tuple[int, ...]:
    raw = bytearray(_XFS_GEOMETRY_V1.size)
    _call("XFS_IOC_FSGEOMETRY_V1", fd, _XFS_IOC_FSGEOMETRY_V1, raw)
    return _XFS_GEOMETRY_V1.unpack(raw)


def xfs_grow(fd: int, size_bytes: int) -> int:
    """Grow the mounted XFS of `fd` to that size; return its size before. It keeps its share of inodes."""
    fields = _xfs_geometry(fd)
    block_bytes, inode_percent, blocks = int(fields[0]), fields[7], int(fields[8])
    if size_bytes // block_bytes > blocks:
        wanted = bytearray(struct.pack("=QI4x", size_bytes // block_bytes, inode_percent))
        _call("XFS_IOC_FSGROWFSDATA", fd, _XFS_IOC_FSGROWFSDATA, wanted)
    return blocks * block_bytes


def btrfs_grow(fd: int) -> None:
    """Grow the mounted btrfs of `fd` to its first device."""
    _call("BTRFS_IOC_RESIZE max", fd, _BTRFS_IOC_RESIZE, bytearray(struct.pack("=q4088s", 0, b"max")))


def btrfs_uuid(fd: int) -> str:
    raw = bytearray(1024)
    _call("BTRFS_IOC_FS_INFO", fd, _BTRFS_IOC_FS_INFO, raw)
    return str(uuid.UUID(bytes=bytes(raw[16:32])))


_SG_IO, _SG_DXFER_FROM_DEV = 0x2285, -3
_SG_IO_HEADER = struct.Struct("iiBBHIPPPIIiPBBBBHHiII0P")
"""struct sg_io_hdr of include/scsi/sg.h; fields 13, 17 and 18 are status, host_status and driver_status."""
_INQUIRY, _INQUIRY_BYTES, _INQUIRY_TIMEOUT_MS = 0x12, 96, 5000


def scsi_inquiry(fd: int, page: int | None = None) -> bytes | None:
    """Return 96 bytes of the standard data or a vital product data page; None when it is no SCSI device or fails."""
    command = ctypes.create_string_buffer(bytes((_INQUIRY, page is not None, page or 0, 0, _INQUIRY_BYTES, 0)), 6)
    data, sense = ctypes.create_string_buffer(_INQUIRY_BYTES), ctypes.create_string_buffer(32)
    buffers = (ctypes.addressof(data), ctypes.addressof(command), ctypes.addressof(sense))
    sizes = (len(command), len(sense), 0, len(data))
    fields = (ord("S"), _SG_DXFER_FROM_DEV, *sizes, *buffers, _INQUIRY_TIMEOUT_MS, *[0] * 12)
    header = bytearray(_SG_IO_HEADER.pack(*fields))
    try:
        fcntl.ioctl(fd, _SG_IO, header)
    except OSError:
        return None
    answer = _SG_IO_HEADER.unpack(header)
    return None if answer[13] or answer[17] or answer[18] else data.raw


def device_number(rdev: int) -> DeviceNumber:
    return DeviceNumber(os.major(rdev), os.minor(rdev))
