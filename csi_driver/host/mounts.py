# SPDX-License-Identifier: Apache-2.0
"""Mounts of this process's mount namespace: look them up, make them, unmount them.

Single paths are looked up by statx(2) and statmount(2), at a cost that does not depend on the number of mounts. The
text table is read for `of_device`, and where the kernel is too old or the filesystem shut down.
"""

from __future__ import annotations

import contextlib
import errno
import os
import re
import stat
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from csi_driver.deadline import SYSTEM_CLOCK, Clock, Deadline
from csi_driver.errors import HostFailure, PreconditionFailed, SystemCallFailed
from csi_driver.host import block_devices, ioctls, mount_table, syscalls
from csi_driver.host.health import shut_down
from csi_driver.host.mount_options import configure, mount_error, refused, shown_options, sort_options
from csi_driver.host.mount_table import describe_holders, read_table
from csi_driver.host.syscalls import closing, fd_path, open_file, system_call
from csi_driver.host_model import Device, DeviceNumber, Mount
from csi_driver.telemetry import tracing

_BUSY_GRACE_S = 1.0
_FIRST_PID_NAMESPACE = 0xEFFFFFFC
"""PROC_PID_INIT_INO of include/linux/proc_ns.h: in another pid namespace process 1 is not the machine's."""
_ABSENT = (errno.ENOENT, errno.ENOTDIR)
_HOLDS_NODES = frozenset({"devtmpfs", "tmpfs", "ext4", "xfs", "btrfs", "overlay"})
_UNMOUNT_NOW = syscalls.UMOUNT_NOFOLLOW | syscalls.MNT_DETACH


def open_target(path: Path) -> int:
    """Open a mount target (O_PATH); refuses a link as its last component."""
    fd = open_file(path, os.O_PATH | os.O_NOFOLLOW)
    if stat.S_ISLNK(os.fstat(fd).st_mode):
        os.close(fd)
        raise PreconditionFailed(f"{path}: expected a directory or a file to mount on, got a symbolic link")
    return fd


@dataclass(frozen=True, slots=True)
class LinuxMounts:
    """Methods as in `csi_driver.node.ports.Mounts`. `open_at` opens a mount target, see `paths.LinuxPaths.open`."""

    open_at: Callable[[Path], int] = open_target
    clock: Clock = SYSTEM_CLOCK

    def at(self, path: Path) -> Mount | None:
        try:
            status = syscalls.statx(path)
        except OSError as error:
            if error.errno in _ABSENT:
                return None
            # The root of a filesystem that was shut down fails; the table still has the mount.
            return _from_table(path, None)
        if not status.is_mount_root:
            return None
        known = syscalls.statmount(status.unique_mount_id) if status.unique_mount_id is not None else None
        if known is None:
            return _from_table(path, status)
        number = DeviceNumber(*known.device)
        own = frozenset(known.options.split(",") if known.options else ()) - {"ro", "rw"}
        return Mount(
            path=path,
            number=_btrfs_device(path, number) if known.fs_type == "btrfs" else number,
            fs_type=known.fs_type,
            source=known.source,
            root=known.root,
            read_only=bool((known.attributes & syscalls.MOUNT_ATTR_RDONLY) | (known.superblock_flags & 1)),
            options=own | shown_options(known.attributes, known.superblock_flags),
            node_number=_node_number(status),
            turned_read_only=bool(known.superblock_flags & 1) and not known.attributes & syscalls.MOUNT_ATTR_RDONLY,
        )

    def table(self) -> list[Mount]:
        return [_mounted(entry, entry.path) for entry in read_table()]

    def of_device(self, device: Device) -> list[Mount]:
        # Of a table of thousands of lines only these are parsed: its number, a btrfs, and a root that may be a node.
        lines = re.compile(rf"\d+ \d+ (?:{device.number} |\S+ /\S)|.* - btrfs ")
        found = (_mounted(entry, entry.path) for entry in read_table(keep=lines.match))
        return [mounted for mounted in found if mounted.can_be_of(device)]

    def twins(self, path: Path) -> list[Path]:
        return mount_table.twins(read_table(), _canonical(path))

    def reaches_host(self, path: Path) -> bool:
        with contextlib.suppress(OSError):  # without CAP_SYS_PTRACE
            is_of_first = os.stat("/proc/self/ns/mnt").st_ino == os.stat("/proc/1/ns/mnt").st_ino
            if is_of_first and os.stat("/proc/self/ns/pid").st_ino == _FIRST_PID_NAMESPACE:
                return True
        return self.propagation_is_shared(path)

    def propagation_is_shared(self, path: Path) -> bool:
        """Tell if mounts made below `path` reach other mount namespaces."""
        with system_call(f"statx {path}"):
            status = syscalls.statx(path)
        if status.unique_mount_id is not None:
            known = syscalls.statmount(status.unique_mount_id)
            if known is not None:
                return bool(known.propagation & syscalls.MS_SHARED)
        entries = [e for e in read_table() if e.mount_id == status.mount_id or path.is_relative_to(e.path)]
        exact = [entry for entry in entries if entry.mount_id == status.mount_id]
        closest = exact or sorted(entries, key=lambda entry: len(entry.path.parts))
        return bool(closest) and closest[-1].shared

    def mount(self, device: Device, target: Path, fs_type: str, options: Sequence[str], *, read_only: bool) -> None:
        wanted = sort_options(options, read_only=read_only)
        with contextlib.ExitStack() as stack:
            target_fd = stack.enter_context(closing(self.open_at(target)))
            stack.enter_context(tracing.step("mount"))
            what = f"mount {device.path} at {target}"
            context = configure(stack, device, fs_type, wanted)
            try:
                syscalls.fsconfig_create(context)
            except SystemCallFailed as failure:
                raise mount_error(what, device, fs_type, wanted, context, failure) from failure
            mount_fd = stack.enter_context(closing(syscalls.fsmount(context, wanted.attributes)))
            _verify(mount_fd, device, fs_type, read_only=wanted.read_only, what=what)
            syscalls.move_mount(mount_fd, target_fd, what)

    def bind(self, source: Path, target: Path, *, read_only: bool) -> None:
        what = f"bind {source} at {target}"
        with (
            tracing.step("bind"),
            closing(self.open_at(target)) as target_fd,
            closing(self._open_source(source)) as source_fd,
        ):
            if read_only and not syscalls.has_mount_setattr():
                _bind_read_only(source_fd, target, target_fd, what)
                return
            with closing(syscalls.open_tree_clone(source_fd, what)) as mount_fd:
                if read_only:
                    syscalls.mount_setattr(mount_fd, syscalls.MOUNT_ATTR_RDONLY)
                    _verify_read_only(os.fstatvfs(mount_fd), what)
                syscalls.move_mount(mount_fd, target_fd, what)

    def _open_source(self, source: Path) -> int:
        """Open a bind source: a device node anywhere, a directory only where `open_at` allows."""
        with system_call(f"look at {source}"):
            is_node = stat.S_ISBLK(os.lstat(source).st_mode)
        return open_target(source) if is_node else self.open_at(source)

    def unmount(self, path: Path, *, lost: DeviceNumber | None = None) -> None:
        """Unmount the topmost mount at `path`. Its parent is held open, so that no link can lead elsewhere.

        The filesystem of a `lost` device is shut down first, so that cached writes never reach it when it returns. A
        busy mount is retried for 1 s: a process that another thread starts has all descriptors from fork to exec.
        """
        flags = _UNMOUNT_NOW if lost is not None else syscalls.UMOUNT_NOFOLLOW
        refusal: SystemCallFailed | None = None

        def settled() -> bool:
            nonlocal refusal
            try:
                syscalls.unmount(held_path, flags)
                refusal = None
            except SystemCallFailed as failure:
                refusal = None if failure.errno in (errno.EINVAL, *_ABSENT) else failure
            return refusal is None or refusal.errno != errno.EBUSY

        try:
            parent_fd = self.open_at(path.parent)
        except SystemCallFailed as failure:
            if failure.errno in _ABSENT:
                return
            raise
        with closing(parent_fd), tracing.step("unmount"):
            held_path = Path(fd_path(parent_fd), path.name)
            if lost is not None:
                shut_down(held_path, lost)
            Deadline.after(_BUSY_GRACE_S, self.clock).wait_until(settled, first_s=0.001, most_s=0.1)
        if refusal is not None and refusal.errno == errno.EBUSY:
            raise PreconditionFailed(f"unmount {path}: it is in use {describe_holders(_canonical(path))}") from refusal
        if refusal is not None:
            raise refused(f"unmount {path}", refusal.errno) from refusal


def _bind_read_only(source_fd: int, target: Path, target_fd: int, what: str) -> None:
    """Bind by mount(2), before Linux 5.12: read-only needs a second call; when that fails, it is unmounted."""
    syscalls.mount(fd_path(source_fd), Path(fd_path(target_fd)), "none", syscalls.MS_BIND, "")
    # A remount without the present flags is refused; their numbers are those of statvfs(3).
    kept = os.statvfs(target).f_flag & (
        syscalls.MS_NOSUID | syscalls.MS_NODEV | syscalls.MS_NOEXEC | syscalls.MS_NOATIME | syscalls.MS_NODIRATIME
    )
    try:
        syscalls.mount("none", target, "none", syscalls.MS_BIND | syscalls.MS_REMOUNT | syscalls.MS_RDONLY | kept, "")
        _verify_read_only(os.statvfs(target), what)
    except BaseException:
        syscalls.unmount(target, _UNMOUNT_NOW)
        raise


def _from_table(path: Path, status: syscalls.PathStatus | None) -> Mount | None:
    if status is not None and status.mount_id is not None:
        found = [entry for entry in read_table() if entry.mount_id == status.mount_id]
    else:
        found = [entry for entry in read_table() if entry.path == _canonical(path)]
    return _mounted(found[-1], path) if found else None


def _canonical(path: Path) -> Path:
    """Resolve the links of the parent; the last component is not looked at, because its filesystem may be dead."""
    return path.parent.resolve() / path.name


def _mounted(entry: mount_table.Entry, path: Path) -> Mount:
    node = None
    if entry.root != "/" and entry.fs_type in _HOLDS_NODES:
        with contextlib.suppress(OSError):
            node = _node_number(syscalls.statx(path))
    number = _btrfs_device(path, entry.number) if entry.fs_type == "btrfs" and node is None else entry.number
    return replace(entry, path=path, number=number, node_number=node)


def _node_number(status: syscalls.PathStatus) -> DeviceNumber | None:
    return DeviceNumber(*status.node) if stat.S_ISBLK(status.mode) else None


def _btrfs_device(path: Path, shown: DeviceNumber) -> DeviceNumber:
    """Return the device of a btrfs mount; the number of the mount itself (`shown`) is anonymous."""
    try:
        with closing(open_file(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)) as fd:
            return _btrfs_device_of(fd) or shown
    except SystemCallFailed:
        return shown


def _btrfs_device_of(fd: int) -> DeviceNumber | None:
    try:
        devices = Path("/sys/fs/btrfs") / ioctls.btrfs_uuid(fd) / "devices"
        found = [DeviceNumber.parse((device / "dev").read_text()) for device in sorted(devices.iterdir())]
    except (SystemCallFailed, OSError, ValueError):
        return None
    return found[0] if len(found) == 1 else None


def _verify(mount_fd: int, device: Device, fs_type: str, *, read_only: bool, what: str) -> None:
    _verify_alive(device, what)
    with system_call(what):  # fails when the filesystem was shut down meanwhile
        number = _mounted_number(mount_fd, fs_type)
        is_read_only = bool(os.fstatvfs(mount_fd).f_flag & os.ST_RDONLY)
    if number != device.number:
        raise PreconditionFailed(f"{what}: expected device {device.number}, got {number} from the kernel")
    if is_read_only != read_only:
        expected, got = ("read-write", "read-only") if is_read_only else ("read-only", "read-write")
        raise HostFailure(f"{what}: expected a {expected} mount, got {got}")


def _mounted_number(mount_fd: int, fs_type: str) -> DeviceNumber | None:
    if fs_type != "btrfs":
        return ioctls.device_number(os.fstat(mount_fd).st_dev)
    with closing(os.open(".", os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC, dir_fd=mount_fd)) as root_fd:
        return _btrfs_device_of(root_fd)


def _verify_alive(device: Device, what: str) -> None:
    # The kernel finds a mounted filesystem by number before it opens the device (fs/super.c, sget_dev), so it may
    # return that of an earlier disk, which is gone. Only a filesystem of a present disk claims the device.
    if block_devices.is_claimed(device.path):
        return
    table = read_table()  # btrfs has anonymous numbers
    left = next((each.path for each in table if device.number == each.number or each.source == str(device.path)), None)
    by = "and is unmounted but in use: end the programs that use it"
    if left is not None:
        by = f"which is still mounted at {left}: unmount it"
    raise PreconditionFailed(
        f"{what}: the kernel gave the filesystem of a disk that is gone and had the number {device.number} before, "
        f"{by}, and retry"
    )


def _verify_read_only(status: os.statvfs_result, what: str) -> None:
    if not status.f_flag & os.ST_RDONLY:
        raise HostFailure(f"{what}: expected a read-only mount, got a writable one")
