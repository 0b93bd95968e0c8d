"""The kernel's mounts: look at one, make one that is verified before it is visible, take one off.

Single paths are looked up by statx(2) and statmount(2), which cost the same with ten mounts or ten thousand; the text
table is read only where the kernel is too old or the filesystem too dead to answer, and for `of_device`.
"""

from __future__ import annotations

import contextlib
import errno
import os
import stat
from collections.abc import Callable, Sequence
from pathlib import Path

from csi_driver.deadline import SYSTEM_CLOCK, Clock, Deadline
from csi_driver.errors import HostFailure, InvalidField, PreconditionFailed, SystemCallFailed
from csi_driver.host import block_devices, ioctls, mount_table, syscalls
from csi_driver.host.health import shut_down
from csi_driver.host.mount_options import (
    FIELD,
    MountOptions,
    configure,
    keep_fd,
    mount_error,
    refused,
    shown_options,
    sort_options,
)
from csi_driver.host.mount_table import describe_holders, read_table
from csi_driver.host_model import Device, DeviceNumber, Mount

_BUSY_GRACE_S = 1.0
_FIRST_PID_NAMESPACE = 0xEFFFFFFC
"""PROC_PID_INIT_INO of the kernel's include/linux/proc_ns.h: in a container process 1 is not the machine's."""
_ABSENT = (errno.ENOENT, errno.ENOTDIR)
_HOLDS_NODES = frozenset({"devtmpfs", "tmpfs", "ext4", "xfs", "btrfs", "overlay"})


def open_target(path: Path) -> int:
    """Open a place to mount on; a link as the last component is refused."""
    try:
        fd = os.open(path, os.O_PATH | os.O_NOFOLLOW | os.O_CLOEXEC)
    except OSError as error:
        raise SystemCallFailed(f"open {path}", error.errno or 0) from error
    if stat.S_ISLNK(os.fstat(fd).st_mode):
        os.close(fd)
        raise PreconditionFailed(f"{path}: expected a directory or a file to mount on, got a symbolic link")
    return fd


class LinuxMounts:
    """Mounts of this process's mount namespace.

    `open_at` opens the place to mount on (O_PATH) and may refuse it; see `paths.LinuxPaths.open`.
    """

    def __init__(self, open_at: Callable[[Path], int] = open_target, clock: Clock = SYSTEM_CLOCK) -> None:
        self._open_at = open_at
        self._clock = clock

    # --- looking ---

    def at(self, path: Path) -> Mount | None:
        """Return the topmost mount whose root is `path`; None when no mount begins there."""
        try:
            status = syscalls.statx(path)
        except OSError as error:
            if error.errno in _ABSENT:
                return None
            # A filesystem that was shut down refuses to say anything of its own root; the table still knows it.
            return _from_table(path, None)
        if status.is_mount_root is False:
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
        """Return every mount of the namespace, in the kernel's order. Costs time for each of them."""
        return [_mounted(entry, entry.path) for entry in read_table()]

    def of_device(self, device: Device) -> list[Mount]:
        """Return every mount of the filesystem on that device, and bind mount of its node. Reads the whole table.

        What has the device's number and was made from another volume's node is none (`Mount.can_be_of`).
        """
        found = []
        for entry in read_table():
            asks_path = entry.fs_type == "btrfs" or (entry.root != "/" and entry.fs_type in _HOLDS_NODES)
            if entry.number == device.number or asks_path:
                mounted = _mounted(entry, entry.path)
                if mounted.can_be_of(device):
                    found.append(mounted)
        return found

    def twins(self, path: Path) -> list[Path]:
        """Return where else the mount at `path` appears because the directory that it is on does. Reads the table."""
        return mount_table.twins(read_table(), _canonical(path))

    def reaches_host(self, path: Path) -> bool:
        """Tell whether a mount made at `path` is seen by the machine's first process, as far as can be told."""
        with contextlib.suppress(OSError):  # without CAP_SYS_PTRACE nobody is told
            is_of_first = os.stat("/proc/self/ns/mnt").st_ino == os.stat("/proc/1/ns/mnt").st_ino
            if is_of_first and os.stat("/proc/self/ns/pid").st_ino == _FIRST_PID_NAMESPACE:
                return True
        return self.propagation_is_shared(path)

    def propagation_is_shared(self, path: Path) -> bool:
        """Tell whether mounts made below `path` reach the other mount namespaces of the machine."""
        try:
            status = syscalls.statx(path)
        except OSError as error:
            raise SystemCallFailed(f"statx {path}", error.errno or 0) from error
        if status.unique_mount_id is not None:
            known = syscalls.statmount(status.unique_mount_id)
            if known is not None:
                return bool(known.propagation & syscalls.MS_SHARED)
        entries = [e for e in read_table() if e.mount_id == status.mount_id or path.is_relative_to(e.path)]
        exact = [entry for entry in entries if entry.mount_id == status.mount_id]
        closest = exact or sorted(entries, key=lambda entry: len(entry.path.parts))
        return bool(closest) and closest[-1].shared

    # --- making ---

    def mount(self, device: Device, target: Path, fs_type: str, options: Sequence[str], *, read_only: bool) -> None:
        """Mount the device's filesystem at `target`.

        Raises `InvalidField` naming an option that the kernel does not take, `PreconditionFailed` when the device is
        busy or turned out to be another one.
        """
        wanted = sort_options(options, read_only=read_only)
        with contextlib.ExitStack() as held:
            target_fd = keep_fd(held, self._open_at(target))
            what = f"mount {device.path} at {target}"
            if not syscalls.has_mount_api():
                self._mount_classic(device, target, target_fd, fs_type, wanted)
                return
            context = configure(held, device, fs_type, wanted)
            try:
                syscalls.fsconfig_create(context)
            except SystemCallFailed as failure:
                raise mount_error(what, device, fs_type, wanted, context, failure) from failure
            mount_fd = keep_fd(held, syscalls.fsmount(context, wanted.attributes))
            _verify(mount_fd, device, fs_type, read_only=_is_read_only(wanted), what=what)
            syscalls.move_mount(mount_fd, target_fd, what)

    def _mount_classic(self, device: Device, target: Path, target_fd: int, fs_type: str, wanted: MountOptions) -> None:
        """Mount by mount(2), which shows the mount before it can be verified: a wrong one is taken off again."""
        what = f"mount {device.path} at {target}"
        place = Path(f"/proc/self/fd/{target_fd}")
        try:
            syscalls.mount(str(device.path), place, fs_type, wanted.flags, wanted.data)
        except SystemCallFailed as failure:
            if failure.errno == errno.EINVAL and wanted.own:
                raise InvalidField(FIELD, ",".join(wanted.own), f"options that {fs_type} takes") from failure
            raise refused(what, failure.errno) from failure
        mount_fd = self._open_at(target)
        try:
            _verify(mount_fd, device, fs_type, read_only=_is_read_only(wanted), what=what)
        except BaseException:
            syscalls.unmount(target, syscalls.UMOUNT_NOFOLLOW | syscalls.MNT_DETACH)
            raise
        finally:
            os.close(mount_fd)

    def bind(self, source: Path, target: Path, *, read_only: bool) -> None:
        """Bind a directory, or a device node onto a file; read-only from the first moment where asked."""
        what = f"bind {source} at {target}"
        with contextlib.ExitStack() as held:
            target_fd = keep_fd(held, self._open_at(target))
            source_fd = keep_fd(held, self._open_source(source))
            if not syscalls.has_mount_api():
                _bind_classic(source_fd, target, target_fd, what, read_only=read_only)
                return
            mount_fd = keep_fd(held, syscalls.open_tree_clone(source_fd, what))
            if read_only:
                syscalls.mount_setattr(mount_fd, syscalls.MOUNT_ATTR_RDONLY)
                _verify_read_only(mount_fd, what)
            syscalls.move_mount(mount_fd, target_fd, what)

    def _open_source(self, source: Path) -> int:
        """Open what is to be bound: a device node wherever it is, a directory only where mounts may be made."""
        try:
            is_node = stat.S_ISBLK(os.lstat(source).st_mode)
        except OSError as error:
            raise SystemCallFailed(f"look at {source}", error.errno or 0) from error
        return open_target(source) if is_node else self._open_at(source)

    def unmount(self, path: Path, *, lost: DeviceNumber | None = None) -> None:
        """Take off the topmost mount at `path`; nothing mounted there is success.

        The directory that it lies in is held open, and its own name not followed, so that no link leads elsewhere.
        `lost`: the device it is of, which is gone or another node's by now. It is taken off the tree at once, whoever
        uses it, and its filesystem shut down first: what a user held back must never meet the device when it is back.
        A mount that is busy is tried again for a moment: a program that another thread starts holds a copy of every
        descriptor of this process, those that looked at the mount included, from its fork to its exec.
        """
        flags = syscalls.UMOUNT_NOFOLLOW | (syscalls.MNT_DETACH if lost is not None else 0)
        refusal: SystemCallFailed | None = None
        try:
            parent_fd = self._open_at(path.parent)
        except SystemCallFailed as failure:
            if failure.errno in _ABSENT:
                return
            raise
        held_path = Path(f"/proc/self/fd/{parent_fd}", path.name)
        if lost is not None:
            shut_down(held_path, lost)

        def settled() -> bool:
            nonlocal refusal
            refusal = _refusal_to_unmount(held_path, flags)
            return refusal is None or refusal.errno != errno.EBUSY

        try:
            Deadline.after(_BUSY_GRACE_S, self._clock).wait_until(settled, first_s=0.001, most_s=0.1)
        finally:
            os.close(parent_fd)
        if refusal is not None and refusal.errno == errno.EBUSY:
            raise PreconditionFailed(f"unmount {path}: it is in use {describe_holders(_canonical(path))}") from refusal
        if refusal is not None:
            raise refused(f"unmount {path}", refusal.errno) from refusal


def _refusal_to_unmount(path: Path, flags: int) -> SystemCallFailed | None:
    try:
        syscalls.unmount(path, flags)
    except SystemCallFailed as failure:
        return None if failure.errno in (errno.EINVAL, *_ABSENT) else failure
    return None


# --- looking ------------------------------------------------------------------------------------------------


def _from_table(path: Path, status: syscalls.PathStatus | None) -> Mount | None:
    entries = read_table()
    if status is not None and status.mount_id is not None:
        found = [e for e in entries if e.mount_id == status.mount_id]
        if status.is_mount_root is None:
            found = [entry for entry in found if entry.path == _canonical(path)]
    else:
        found = [entry for entry in entries if entry.path == _canonical(path)]
    return _mounted(found[-1], path) if found else None


def _canonical(path: Path) -> Path:
    """Spell `path` as the table does; its last component is not looked at: it may be dead."""
    return path.parent.resolve() / path.name


def _mounted(entry: mount_table.Entry, path: Path) -> Mount:
    node = None
    if entry.root != "/" and entry.fs_type in _HOLDS_NODES:
        with contextlib.suppress(OSError):
            node = _node_number(syscalls.statx(path))
    return Mount(
        path=path,
        number=_btrfs_device(path, entry.number) if entry.fs_type == "btrfs" and node is None else entry.number,
        fs_type=entry.fs_type,
        source=entry.source,
        root=entry.root,
        read_only=entry.read_only,
        options=entry.options,
        node_number=node,
        turned_read_only=entry.turned_read_only,
    )


def _node_number(status: syscalls.PathStatus) -> DeviceNumber | None:
    return DeviceNumber(*status.node) if stat.S_ISBLK(status.mode) else None


def _btrfs_device(path: Path, shown: DeviceNumber) -> DeviceNumber:
    """Return the device under a btrfs mount, which itself shows an anonymous number (`shown`)."""
    try:
        fd = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC | os.O_NONBLOCK)
    except OSError:
        return shown
    try:
        return _btrfs_device_of(fd) or shown
    finally:
        os.close(fd)


def _is_read_only(wanted: MountOptions) -> bool:
    return bool(wanted.flags & syscalls.MS_RDONLY)


def _bind_classic(source_fd: int, target: Path, target_fd: int, what: str, *, read_only: bool) -> None:
    """Bind by mount(2): read-only needs a second call, and is taken off again where that one fails."""
    place = Path(f"/proc/self/fd/{target_fd}")
    syscalls.mount(f"/proc/self/fd/{source_fd}", place, "none", syscalls.MS_BIND, "")
    if not read_only:
        return
    kept = _flags_of(os.statvfs(target).f_flag)
    try:
        flags = syscalls.MS_BIND | syscalls.MS_REMOUNT | syscalls.MS_RDONLY | kept
        syscalls.mount("none", target, "none", flags, "")
        if not os.statvfs(target).f_flag & os.ST_RDONLY:
            raise HostFailure(f"{what}: expected a read-only mount, got a writable one")
    except BaseException:
        syscalls.unmount(target, syscalls.UMOUNT_NOFOLLOW | syscalls.MNT_DETACH)
        raise


def _flags_of(statvfs_flags: int) -> int:
    """Translate the flags that a remount must repeat, or the kernel refuses it; the numbers agree (statvfs(3))."""
    same = syscalls.MS_NOSUID | syscalls.MS_NODEV | syscalls.MS_NOEXEC | syscalls.MS_NOATIME | syscalls.MS_NODIRATIME
    return statvfs_flags & same


# --- py ---
# What a mount is that was just made, compared with what was asked; it is not visible to anybody yet.


def _verify(mount_fd: int, device: Device, fs_type: str, *, read_only: bool, what: str) -> None:
    """Compare what was made with what was wanted."""
    _verify_alive(device, what)
    try:
        number = _mounted_number(mount_fd, fs_type)
        is_read_only = bool(os.fstatvfs(mount_fd).f_flag & os.ST_RDONLY)
    except OSError as error:  # of a filesystem that died since
        raise SystemCallFailed(what, error.errno or 0) from error
    if number != device.number:
        raise PreconditionFailed(f"{what}: expected device {device.number}, got {number} from the kernel")
    if is_read_only != read_only:
        expected, got = ("read-write", "read-only") if is_read_only else ("read-only", "read-write")
        raise HostFailure(f"{what}: expected a {expected} mount, got {got}")


def _mounted_number(mount_fd: int, fs_type: str) -> DeviceNumber | None:
    if fs_type != "btrfs":
        return ioctls.device_number(os.fstat(mount_fd).st_dev)
    root_fd = os.open(".", os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC, dir_fd=mount_fd)
    try:
        return _btrfs_device_of(root_fd)
    finally:
        os.close(root_fd)


def _verify_alive(device: Device, what: str) -> None:
    """Refuse a filesystem of a disk that had the device's number before.

    The kernel looks for a mounted filesystem by number alone before it opens a device (fs/super.c, sget_dev), and hands
    out what is left of another disk as this one's. A filesystem that is alive claims its device.
    """
    if block_devices.is_claimed(device.path):
        return
    table = mount_table.read_table()  # a btrfs shows a number of its own
    left = next((each.path for each in table if device.number == each.number or each.source == str(device.path)), None)
    by = (
        f"which is still mounted at {left}: unmount it"
        if left
        else "and is unmounted but in use: end the programs that use it"
    )
    raise PreconditionFailed(
        f"{what}: the kernel gave the filesystem of a disk that is gone and had the number {device.number} before, "
        f"{by}, and retry"
    )


def _verify_read_only(mount_fd: int, what: str) -> None:
    if not os.fstatvfs(mount_fd).f_flag & os.ST_RDONLY:
        raise HostFailure(f"{what}: expected a read-only mount, got a writable one")


def _btrfs_device_of(fd: int) -> DeviceNumber | None:
    try:
        devices = Path("/sys/fs/btrfs") / ioctls.btrfs_uuid(fd) / "devices"
        texts = [(device / "dev").read_text() for device in sorted(devices.iterdir())]
    except (SystemCallFailed, OSError):
        return None
    major, _, minor = texts[0].strip().partition(":") if len(texts) == 1 else ("", "", "")
    return DeviceNumber(int(major), int(minor)) if minor else None
