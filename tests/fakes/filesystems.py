# SPDX-License-Identifier: Apache-2.0
"""Mounts and filesystems of the machine in memory: the rules of the kernel and of the tools."""

from __future__ import annotations

import errno
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from csi_driver.deadline import Deadline
from csi_driver.errors import (
    ContentRefused,
    DeadlineReached,
    GrowsAtNextMount,
    HostFailure,
    InvalidField,
    PreconditionFailed,
    SystemCallFailed,
)
from csi_driver.host_model import (
    Blank,
    Content,
    Device,
    DeviceNumber,
    Filesystem,
    Mount,
    OpenDevice,
    OtherContent,
)
from csi_driver.model import Usage
from tests.fakes.disks import MIB, FakeDisk, FakeFilesystem, MountEntry

if TYPE_CHECKING:
    from tests.fakes.host import FakeHost

PROBED_BYTES = MIB
"""The fake's probe reads this much at the head and at the tail."""

_NO_REPLAY = frozenset({"noload", "norecovery", "rescue=nologreplay"})
_ACCESS_TIMES = frozenset({"relatime", "noatime", "strictatime"})


class FakeMounts:
    def __init__(self, host: FakeHost) -> None:
        self._host = host

    def at(self, path: Path) -> Mount | None:
        entry = self._host.topmost(path)
        return _shown(entry) if entry is not None else None

    def table(self) -> list[Mount]:
        return [_shown(entry) for entry in self._host.table]

    def of_device(self, device: Device) -> list[Mount]:
        return [mounted for mounted in map(_shown, self._host.table) if mounted.can_be_of(device)]

    def twins(self, path: Path) -> Sequence[Path]:
        return ()

    def mount(self, device: Device, target: Path, fs_type: str, options: Sequence[str], *, read_only: bool) -> None:
        host = self._host
        disk = host.by_number(device.number)
        what = f"mount {device.path} at {target}"
        for option in options:
            if option.startswith("bogus"):
                raise InvalidField("mount_flags", option, f"an option that {fs_type} takes")
        if disk is None:
            raise SystemCallFailed(what, errno.ENXIO)
        if host.tree.get(target) != "directory":
            raise SystemCallFailed(what, errno.ENOTDIR)
        held = disk.filesystem
        if held is None or not held.complete or held.fs_type != fs_type or held.is_damaged:
            raise SystemCallFailed(what, errno.EINVAL, "wrong filesystem")
        if disk.read_only and not read_only:
            raise SystemCallFailed(what, errno.EACCES)
        if any(entry.disk and entry.disk.is_gone and entry.disk.number == disk.number for entry in host.table):
            raise PreconditionFailed(f"{what}: the kernel gave a filesystem that had the number {disk.number} before")
        if disk.claimed is not None or (host.is_mounted(disk) and disk.superblock_read_only != read_only):
            raise PreconditionFailed(f"{what}: the device is in use")
        self._refuse_second_of_a_uuid(disk, held, options, what)
        host.step("before mount")
        _replay(disk, held, options, what)
        disk.superblock_read_only = read_only
        disk.was_used = True
        shown = frozenset(options) | (frozenset() if _ACCESS_TIMES & set(options) else {"relatime"})
        host.table.append(MountEntry(target, disk, None, str(device.path), held.root, fs_type, read_only, shown))
        host.step("after mount")

    def _refuse_second_of_a_uuid(self, disk: FakeDisk, held: FakeFilesystem, options: Sequence[str], what: str) -> None:
        if held.fs_type == "ext4" or (held.fs_type == "xfs" and "nouuid" in options):
            return
        others = (entry.disk for entry in self._host.table if entry.disk is not None and entry.disk is not disk)
        if any(each.filesystem and _identity(each) == _identity(disk) for each in others):
            raise SystemCallFailed(what, errno.EEXIST, "another filesystem with this uuid is mounted")

    def bind(self, source: Path, target: Path, *, read_only: bool) -> None:
        host = self._host
        nodes = (*host.disks.values(), *host.readers, *host.mappers.values())
        node = next((disk for disk in nodes if disk.path == source), None)
        what = f"bind {source} at {target}"
        from_entry = host.topmost(source)
        wanted = "file" if node is not None else "directory"
        if host.tree.get(target) != wanted:
            raise SystemCallFailed(what, errno.ENOENT)
        host.step("before bind")
        if node is not None:
            root = "/" + str(source.relative_to("/dev"))
            entry = MountEntry(target, None, node, "devtmpfs", root, "devtmpfs", read_only, frozenset())
        elif from_entry is None:
            raise SystemCallFailed(what, errno.ENOENT)
        else:
            entry = replace(from_entry, path=target, read_only=read_only or from_entry.read_only, in_use=False)
        host.table.append(entry)
        host.step("after bind")

    def unmount(self, path: Path, *, lost: DeviceNumber | None = None) -> None:
        host = self._host
        entry = host.topmost(path)
        if entry is None:
            return
        is_last = sum(other.disk is entry.disk for other in host.table) == 1
        if entry.disk is not None and entry.disk.is_suspended and is_last:
            raise AssertionError(f"the unmount of {path} waits forever: its device is suspended")
        if entry.in_use and lost is None:
            raise PreconditionFailed(f"unmount {path}: it is in use")
        if lost is not None:
            host.lost.append(lost)
        host.step("before unmount")
        host.table.remove(entry)
        host.step("after unmount")


def _replay(disk: FakeDisk, held: FakeFilesystem, options: Sequence[str], what: str) -> None:
    if _NO_REPLAY & set(options):
        return
    if held.log and disk.read_only:
        raise SystemCallFailed(what, errno.EROFS, "the log cannot be replayed")
    held.files |= held.log
    held.log.clear()


def _identity(disk: FakeDisk) -> tuple[str, str]:
    assert disk.filesystem is not None
    return disk.filesystem.fs_type, disk.filesystem.uuid or disk.uuid


def _shown(entry: MountEntry) -> Mount:
    number = entry.disk.number if entry.disk is not None else DeviceNumber(0, 5)
    superblock_read_only = entry.disk is not None and entry.disk.superblock_read_only
    return Mount(
        path=entry.path,
        number=number,
        fs_type=entry.fs_type,
        source=entry.source,
        root=entry.root,
        read_only=entry.read_only or superblock_read_only,
        options=entry.options,
        node_number=entry.node.number if entry.node is not None else None,
        turned_read_only=superblock_read_only and not entry.read_only,
    )


AT_END = "linux_raid_member"
"""A signature that a look at the head does not find."""


class FakeFilesystems:
    def __init__(self, host: FakeHost) -> None:
        self._host = host

    def supported(self, wanted: str = "") -> Sequence[str]:
        return ("ext4", "xfs", "btrfs")

    def probe(self, device: OpenDevice, *, deadline: Deadline, own_uuid: str | None = None) -> Content:
        disk = self._opened(device)
        own = disk.filesystem
        is_own = own is not None and own.complete and own_uuid == (own.uuid or disk.uuid)
        if own is not None and is_own and disk.signature in (None, AT_END):
            return Filesystem(own.fs_type, own.uuid or disk.uuid)
        if disk.signature is not None:
            return OtherContent(disk.signature)
        if disk.luks is not None:
            is_whole = disk.luks.is_complete
            return OtherContent("crypto_LUKS (crypto)" if is_whole else "data that nothing recognises")
        if disk.filesystem is not None:
            held = disk.filesystem
            return (
                Filesystem(held.fs_type, held.uuid or disk.uuid)
                if held.complete
                else OtherContent("data that nothing recognises")
            )
        tail = disk.size_bytes - PROBED_BYTES
        if any(offset < PROBED_BYTES or offset >= tail for offset in disk.raw):
            return OtherContent("data that nothing recognises")
        return Blank()

    def first_data(
        self, device: OpenDevice, *, deadline: Deadline | None, progress: Callable[[int, int], None]
    ) -> int | None:
        disk = self._opened(device)
        if deadline is not None and deadline.expired():
            raise DeadlineReached(f"every block of {disk.name}")
        progress(disk.size_bytes, disk.size_bytes)
        return min(disk.raw, default=None)

    def wipe(self, device: OpenDevice) -> None:
        disk = self._opened(device)
        if disk.claimed != device.fd:
            raise AssertionError("zeroes written to a device that was not claimed")
        self._host.step("before wipe")
        if disk.was_used or disk.signature is not None or disk.raw or (disk.luks is not None and disk.luks.is_used):
            self._host.destroyed.append(disk.uuid)
        tail = disk.size_bytes - PROBED_BYTES
        disk.filesystem = disk.signature = disk.luks = None
        disk.raw = {offset: data for offset, data in disk.raw.items() if PROBED_BYTES <= offset < tail}
        self._host.step("after wipe")

    def make(
        self, device: OpenDevice, fs_type: str, options: Sequence[str], *, uuid: str, asked: Sequence[str] = ()
    ) -> None:
        disk = self._opened(device)
        if disk.claimed != device.fd:
            raise AssertionError("mkfs on a device that was not claimed")
        self._host.step("before make")
        if disk.was_used or disk.signature is not None or disk.raw:
            self._host.destroyed.append(disk.uuid)
        disk.filesystem = FakeFilesystem(fs_type, disk.size_bytes, False, options=tuple(options), uuid=uuid)
        self._host.step("halfway make")
        disk.filesystem.complete = True
        self._host.formats.append(disk.uuid)
        self._host.step("after make")

    def change_btrfs_uuid(self, device: OpenDevice, uuid: str) -> None:
        disk = self._opened(device)
        if disk.claimed != device.fd or disk.filesystem is None or disk.filesystem.fs_type != "btrfs":
            raise AssertionError("a new uuid for a device that was not claimed, or holds no btrfs")
        self._host.step("before change of uuid")
        disk.filesystem.uuid = uuid
        self._host.step("after change of uuid")

    def check(self, device: Device, fs_type: str) -> int:
        held = self._idle(device, fs_type)
        self._host.step("before check")
        held.checks += 1
        if held.is_damaged:
            raise ContentRefused(f"the {fs_type} on {device.path} needs manual repair")
        self._host.step("after check")
        return held.size_bytes

    def recorded_bytes(self, device: Device, fs_type: str) -> int:
        return self._held(device, fs_type).size_bytes

    def grow_unmounted(self, device: Device, fs_type: str) -> bool:
        held = self._idle(device, fs_type)
        if fs_type != "ext4":
            return False
        self._host.step("before grow")
        held.size_bytes = device.size_bytes
        self._host.step("after grow")
        return True

    def grow_mounted(self, path: Path, device: Device, fs_type: str) -> None:
        entry = self._host.topmost(path)
        if entry is None or entry.disk is None or entry.read_only or entry.disk.superblock_read_only:
            raise HostFailure(f"{path} cannot be grown")
        if fs_type == "ext4" and not self._host.can_grow_mounted_ext4:
            raise GrowsAtNextMount("ext4 does not grow while mounted: CAP_SYS_RESOURCE is missing")
        held = self._held(device, fs_type)
        self._host.step("before grow")
        held.size_bytes = device.size_bytes
        self._host.step("after grow")

    def trim(self, path: Path, device: Device, fs_type: str, *, deadline: Deadline) -> int:
        entry = self._host.topmost(path)
        if entry is None or entry.disk is None:
            raise SystemCallFailed(f"open {path}", errno.ENOENT)
        held, disk = self._held(device, fs_type), entry.disk
        over = disk.below.luks if disk.below is not None else None
        if not disk.takes_discards or (over is not None and not over.opened_with_discards):
            raise SystemCallFailed("FITRIM", errno.EOPNOTSUPP)
        held.trims += 1
        return held.size_bytes - sum(len(data) for data in held.files.values())

    def usage(self, path: Path) -> Usage:
        self._host.answers.wait()
        entry = self._host.topmost(path)
        if entry is None or entry.disk is None or entry.disk.filesystem is None:
            raise SystemCallFailed(f"statfs {path}", errno.ENOENT)
        held = entry.disk.filesystem
        used = sum(len(data) for data in held.files.values())
        return Usage(held.size_bytes, used, held.size_bytes - used, 1000, len(held.files), 1000 - len(held.files))

    def _opened(self, device: OpenDevice) -> FakeDisk:
        disk = self._host.by_number(device.device.number)
        if disk is None or disk.ground.fails_reads:
            raise HostFailure(f"read {device.device.path}: Input/output error (EIO)")
        return disk

    def _held(self, device: Device, fs_type: str) -> FakeFilesystem:
        disk = self._host.by_number(device.number)
        if disk is None or disk.filesystem is None or disk.filesystem.fs_type != fs_type:
            raise PreconditionFailed(f"{device.path} holds no {fs_type}")
        return disk.filesystem

    def _idle(self, device: Device, fs_type: str) -> FakeFilesystem:
        held = self._held(device, fs_type)
        disk = self._host.by_number(device.number)
        if disk is None or self._host.is_mounted(disk) or disk.claimed is not None:
            raise PreconditionFailed(f"{device.path} is gone or in use")
        if disk.read_only:
            raise SystemCallFailed(f"open {device.path} for writing", errno.EACCES)
        return held
