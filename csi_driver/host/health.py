# SPDX-License-Identifier: Apache-2.0
"""Faults of devices and mounted filesystems, and the shutdown of filesystems on lost devices.

The kernel's own records (sysfs, mount options) come first: reading them never hangs. Asking the root of a filesystem
may hang, and is left to threads that can be abandoned.
"""

from __future__ import annotations

import contextlib
import errno
import os
import stat
from collections.abc import Iterator, Sequence
from pathlib import Path

from csi_driver.errors import SystemCallFailed
from csi_driver.host import ioctls, syscalls
from csi_driver.host.block_devices import SECTOR_BYTES, SYS_DEV_BLOCK, read_text, sys_number
from csi_driver.host.syscalls import closing, open_file, system_call
from csi_driver.host_model import DeviceNumber, Fault, FaultKind, Mount

_SYS_FS = Path("/sys/fs")
_SHUT_DOWN, _EMERGENCY = "shutdown", "emergency_ro"  # mount options; ext4_show_options
_SHUT_DOWN_ERRORS = (errno.EIO, errno.ESHUTDOWN)  # even for attributes, from an xfs (fs/xfs/xfs_iops.c)
_WAY_OUT = "it is checked and mounted again when no pod of this node uses the volume: delete these pods"


class LinuxProbes:
    """Methods as in `csi_driver.node.ports.Probes`."""

    @staticmethod
    def device(number: DeviceNumber) -> Sequence[Fault]:
        found = []
        if sys_number(number, "ro") == 1:
            found.append(Fault(FaultKind.DEVICE_READ_ONLY, f"device {number} refuses writes"))
        backing = read_text(SYS_DEV_BLOCK / str(number) / "loop/backing_file")
        if backing.endswith(" (deleted)"):
            file = backing.removesuffix(" (deleted)")
            found.append(Fault(FaultKind.BACKING_FILE_GONE, f"{file}: its data ends with it"))
        elif backing:
            found += _cut_short(number, backing)
        return found

    @staticmethod
    def dead(mounted: Mount) -> Fault | None:
        if mounted.node_number is not None:
            return None
        if _SHUT_DOWN in mounted.options or _root_is_dead(mounted.path):
            return Fault(FaultKind.SHUT_DOWN, f"its {mounted.fs_type} was shut down after an error; {_WAY_OUT}")
        if mounted.turned_read_only or _EMERGENCY in mounted.options:
            detail = f"its {mounted.fs_type} turned read-only after an error; {_WAY_OUT}"
            return Fault(FaultKind.TURNED_READ_ONLY, detail)
        return None

    def filesystem(self, mounted: Mount) -> Sequence[Fault]:
        dead = self.dead(mounted)
        counts = {"ext4": _ext4_errors, "btrfs": _btrfs_errors}.get(mounted.fs_type)
        found = [*([] if dead is None else [dead]), *(counts(mounted) if counts is not None else ())]
        answered = _ask_root(mounted.path)
        if answered is not None and all(fault.kind is not FaultKind.SHUT_DOWN for fault in found):
            found.append(answered)
        return found


def _ext4_errors(mounted: Mount) -> Iterator[Fault]:
    root = _SYS_FS / "ext4" / (SYS_DEV_BLOCK / str(mounted.number)).resolve().name
    count = read_text(root / "errors_count") or "0"
    if count != "0":
        function = read_text(root / "last_error_func") or "?"
        yield Fault(FaultKind.ERRORS, f"ext4 counts {count} errors since its last check, the last in {function}")


def _btrfs_errors(mounted: Mount) -> Iterator[Fault]:
    try:
        with closing(open_file(mounted.path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)) as fd:
            root = _SYS_FS / "btrfs" / ioctls.btrfs_uuid(fd) / "devinfo"
    except SystemCallFailed:
        return
    counts = [count for text in sorted(root.glob("*/error_stats")) for count in _btrfs_counts(read_text(text))]
    if counts:
        yield Fault(FaultKind.ERRORS, f"btrfs counts {', '.join(counts)}")


def _cut_short(number: DeviceNumber, backing: str) -> Iterator[Fault]:
    size_bytes = (sys_number(number, "size") or 0) * SECTOR_BYTES
    offset_bytes = sys_number(number, "loop/offset") or 0
    with contextlib.suppress(OSError):  # the path may be of another mount namespace
        status = os.stat(backing)
        if stat.S_ISREG(status.st_mode) and status.st_size < offset_bytes + size_bytes:
            detail = f"{backing} has {status.st_size} bytes, the device {size_bytes}"
            yield Fault(FaultKind.BACKING_FILE_CUT_SHORT, detail)


def shut_down(path: Path, number: DeviceNumber) -> bool:
    """Shut down the ext4 or xfs of that device mounted at `path`: it writes nothing any more, not even its log.

    False when another filesystem is mounted there, it was shut down before, or it has no such call (btrfs).
    """
    flags = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_NONBLOCK
    try:
        with closing(open_file(path, flags)) as fd, system_call(f"look at {path}"):
            if ioctls.device_number(os.fstat(fd).st_dev) != number:
                return False
            ioctls.shut_down(fd)
    except SystemCallFailed:
        return False
    return True


def _btrfs_counts(text: str) -> list[str]:
    pairs = (line.rpartition(" ") for line in text.splitlines())
    return [f"{name} {count}" for name, _, count in pairs if count.isdigit() and int(count)]


def _root_is_dead(path: Path) -> bool:
    try:  # the kernel has the attributes of the root in memory
        syscalls.statx(path)
    except OSError as error:
        return error.errno in _SHUT_DOWN_ERRORS
    return False


def _ask_root(path: Path) -> Fault | None:
    try:
        os.statvfs(path)
        with os.scandir(path) as entries:
            next(entries, None)
    except OSError as error:
        number = error.errno or 0
        name = errno.errorcode.get(number, str(number))
        kind = FaultKind.SHUT_DOWN if number == errno.ESHUTDOWN else FaultKind.IO_ERROR
        return Fault(kind, f"the root of the filesystem answers {os.strerror(number)} ({name})")
    return None
