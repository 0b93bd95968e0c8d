# SPDX-License-Identifier: Apache-2.0
"""Filesystems on volumes: recognise, make, check, grow, and measure their usage.

Whether a device may be formatted is decided in `csi_driver.node`. Each tool gets the device as an inherited, verified
descriptor (`/proc/self/fd/N`), because the path may be another device by then; it holds the device's lock that way.
"""

from __future__ import annotations

import contextlib
import errno
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from csi_driver.deadline import Deadline
from csi_driver.errors import (
    CommandFailed,
    ContentRefused,
    DeadlineReached,
    GrowsAtNextMount,
    HostFailure,
    InvalidField,
    PreconditionFailed,
    SystemCallFailed,
)
from csi_driver.host import disk_formats, ioctls, machine_checks, zero_scan
from csi_driver.host.devices import LinuxDevices
from csi_driver.host.luks import stored_content
from csi_driver.host.processes import Completed, find_tool, run
from csi_driver.host.syscalls import closing, fd_path, open_file, system_call
from csi_driver.host_model import (
    GROWTH_THRESHOLD_BYTES,
    UNUSABLE_TAIL_BYTES,
    Blank,
    Content,
    Device,
    Filesystem,
    OpenDevice,
    OtherContent,
)
from csi_driver.model import GIB, MIB, Usage

_WRITE_LIMIT_S = 30 * 60.0
_FULL_CHECK_LIMIT_S = 4 * 3600.0
_DRY_RUN_LIMIT_S = 60.0
_TRIM_PART_BYTES, _TO_THE_END = 32 * GIB, 2**64 - 1
_BTRFS_SECTOR_BYTES = _PAGE_BYTES = 4096
_EXT = ("ext2", "ext3", "ext4")
_FIELD = "mkfsOptions"


@dataclass(frozen=True, slots=True)
class _Kind:
    """How a filesystem is made. `dry_run` is the option that writes nothing, where mkfs has one."""

    mkfs: tuple[str, ...]
    uuid_options: tuple[str, str]
    dry_run: str | None
    least_bytes: int
    tools: tuple[str, ...]


# -F, -f: the node decided that the content goes, e.g. its own unfinished filesystem. Never -F twice: mke2fs would
# format a mounted device. Below least_bytes mkfs of xfsprogs 6 and btrfs-progs 6 refuses; ext4 would have no journal.
_KINDS = {
    "ext4": _Kind(("mkfs.ext4", "-q", "-F"), ("-U", ""), "-n", 2 * MIB, ("mkfs.ext4", "e2fsck", "resize2fs")),
    "xfs": _Kind(("mkfs.xfs", "-q", "-f"), ("-m", "uuid="), "-N", 300 * MIB, ("mkfs.xfs",)),
    "btrfs": _Kind(("mkfs.btrfs", "-q", "-f"), ("-U", ""), None, 109 * MIB, ("mkfs.btrfs",)),
}

_supported: set[str] = set()
"""Types that this machine could make and mount at an earlier look."""

# blkid(8), "RETURN CODE"; e2fsck(8), "EXIT CODE": a sum
_BLKID_FOUND, _BLKID_NOTHING, _BLKID_AMBIVALENT = 0, 2, 8
_CORRECTED, _REBOOT, _UNCORRECTED, _OPERATIONAL = 1, 2, 4, 8


@dataclass(frozen=True, slots=True)
class LinuxFilesystems:
    """Filesystems by this machine's tools and kernel. Methods as in `csi_driver.node.ports.Filesystems`."""

    devices: LinuxDevices

    def supported(self, wanted: str = "") -> Sequence[str]:
        """A type found once is not looked up again: a program removed since is named when it cannot be started."""
        if wanted in _supported:
            return (wanted,)
        # The kernel is assumed to have a filesystem when its list of modules is not visible.
        mountable = machine_checks.mountable_filesystems()
        found = [
            fs_type
            for fs_type, kind in _KINDS.items()
            if all(map(find_tool, kind.tools))
            and (fs_type in mountable or machine_checks.can_be_loaded(fs_type) is not False)
        ]
        _supported.update(found)
        return found

    def probe(self, device: OpenDevice, *, deadline: Deadline, own_uuid: str | None = None) -> Content:
        """Return the content of the device: blank only when all of `zero_scan.probe_places` is zero."""
        own = _own_filesystem(device, own_uuid) if own_uuid is not None else None
        if own is not None:
            return own
        with stored_content(device, self.devices.open_number) as stored:
            found = zero_scan.first_data_in_places(stored, deadline)
        return Blank() if found is None else _name_content(device, found, deadline)

    def first_data(
        self, device: OpenDevice, *, deadline: Deadline | None, progress: Callable[[int, int], None]
    ) -> int | None:
        with stored_content(device, self.devices.open_number) as stored:
            return zero_scan.first_data(stored, deadline=deadline, progress=progress)

    def recorded_bytes(self, device: Device, fs_type: str) -> int:
        with self.devices.open(device) as opened:
            return _superblock(opened, fs_type).size_bytes

    def wipe(self, device: OpenDevice) -> None:
        with self.devices.open(device.device, write=True):
            zero_scan.wipe_places(device)

    def make(
        self, device: OpenDevice, fs_type: str, options: Sequence[str], *, uuid: str, asked: Sequence[str] = ()
    ) -> None:
        """Raises `PreconditionFailed` for a device that is too small or another one by now."""
        if fs_type not in _KINDS:
            raise InvalidField("fs_type", fs_type, f"one of {', '.join(_KINDS)}")
        kind = _KINDS[fs_type]
        uuid_option, prefix = kind.uuid_options
        argv = (*kind.mkfs, uuid_option, prefix + uuid)
        size = device.device.size_bytes
        if size < kind.least_bytes:
            least = kind.least_bytes
            raise PreconditionFailed(f"{device.device.path} has {size} bytes, {fs_type} needs at least {least}")
        try:
            # Verified again, because reading it before may have taken hours. A program opens the device by its number,
            # which no other device gets while it is open.
            with self.devices.open(device.device, write=True):
                _run_on(device, (*argv, *options), timeout_s=_WRITE_LIMIT_S)
                with system_call(f"sync {device.device.path}"):
                    os.fsync(device.fd)
        except CommandFailed as failure:
            if asked and failure.status > 0 and _options_are_refused(device, argv, options, kind.dry_run):
                expected = f"options that {argv[0]} takes here ({_first_reason(failure.stderr)})"
                raise InvalidField(_FIELD, " ".join(asked), expected) from failure
            raise
        if _superblock(device, fs_type).uuid != uuid:
            raise HostFailure(f"{argv[0]} left {device.device.path} without the uuid {uuid}")
        if asked:
            _require_type(device, fs_type, asked)

    def change_btrfs_uuid(self, device: OpenDevice, uuid: str) -> None:
        """The first superblock is the last to be written: when it has the new uuid, all have it."""
        path, length = device.device.path, disk_formats.BTRFS_COPY_BYTES
        offsets = [offset for offset in disk_formats.BTRFS_COPIES if offset + length <= device.device.size_bytes]
        with contextlib.ExitStack() as stack:
            # Verified again and claimed, as mkfs claims it: the device that is read must be the one that is written to.
            stack.enter_context(self.devices.open(device.device, write=True))
            stack.enter_context(closing(open_file(Path(fd_path(device.fd)), os.O_RDONLY | os.O_EXCL)))
            reader = stack.enter_context(zero_scan.DirectReader(device, length))
            changed = disk_formats.with_btrfs_uuid({offset: reader.read(offset, length) for offset in offsets}, uuid)
            if not changed:
                raise ContentRefused(
                    f"btrfs on {path}, a copy of a volume, cannot get a uuid of its own: its superblock is damaged, of "
                    "several devices, or of an unknown kind; restore from another snapshot"
                )
            for offset in sorted(changed, reverse=True):
                zero_scan.write_through(device, offset, changed[offset])

    def check(self, device: Device, fs_type: str) -> int:
        """Repair an unclean ext4 as far as e2fsck -p does.

        xfs and btrfs replay their logs when mounted and have no repair that is safe unattended (btrfs-check(8)).
        """
        with self.devices.open(device) as opened:
            found = _superblock(opened, fs_type)
        if fs_type not in _EXT or device.read_only or found.was_closed_well:
            return found.size_bytes
        with self.devices.open(device, write=True, exclusive=True) as opened:
            _e2fsck(opened, ("-p",), timeout_s=_WRITE_LIMIT_S)
            return _superblock(opened, fs_type).size_bytes

    def grow_unmounted(self, device: Device, fs_type: str) -> bool:
        if fs_type not in _EXT:
            return False
        with self.devices.open(device, write=True, exclusive=True) as opened:
            before = _superblock(opened, fs_type)
            if not before.was_checked_since_use:
                _e2fsck(opened, ("-f", "-p"), timeout_s=_FULL_CHECK_LIMIT_S)
            _run_on(opened, ("resize2fs",), timeout_s=_WRITE_LIMIT_S)
            after = _superblock(opened, fs_type)
            _require_growth(device, opened.device.size_bytes, before.size_bytes, after.size_bytes)
        return True

    def grow_mounted(self, path: Path, device: Device, fs_type: str) -> None:
        before = self.usage(path).total_bytes
        recorded = before
        with _mounted_directory(path, device, fs_type) as fd:
            if fs_type in _EXT:
                recorded = self._grow_mounted_ext4(fd, device, fs_type)
            elif fs_type == "xfs":
                recorded = ioctls.xfs_grow(fd, device.size_bytes)
            elif fs_type == "btrfs":
                # The kernel refuses sizes below 256 MiB, also the present one (fs/btrfs/ioctl.c).
                if device.size_bytes - before >= _BTRFS_SECTOR_BYTES:
                    ioctls.btrfs_grow(fd)
            else:
                raise InvalidField("fs_type", fs_type, f"one of {', '.join(_KINDS)}")
        if self.usage(path).total_bytes <= before:
            _require_growth(device, device.size_bytes, recorded, recorded)

    def _grow_mounted_ext4(self, fd: int, device: Device, fs_type: str) -> int:
        with self.devices.open(device) as opened:
            now = _superblock(opened, fs_type)
        blocks = device.size_bytes // now.block_bytes
        if blocks > now.blocks:
            try:
                ioctls.ext4_resize(fd, blocks)
            except SystemCallFailed as failure:
                if failure.errno == errno.EPERM:
                    raise GrowsAtNextMount(
                        f"ext4 on {device.path} cannot grow while it is mounted: this process lacks CAP_SYS_RESOURCE; "
                        "the next NodeStageVolume grows it before it mounts it"
                    ) from failure
                raise
        return now.size_bytes

    def trim(self, path: Path, device: Device, fs_type: str, *, deadline: Deadline) -> int:
        """Work in parts, between which the deadline is checked; addresses of btrfs are not those of its device."""
        size_bytes, trimmed_bytes, start = device.size_bytes, 0, 0
        part_bytes = size_bytes if fs_type == "btrfs" else _TRIM_PART_BYTES
        with _mounted_directory(path, device, fs_type) as fd:
            while start < size_bytes:
                if deadline.expired():
                    raise DeadlineReached(f"the trim of {path}, of which {start} of {size_bytes} bytes are done")
                is_last = start + part_bytes >= size_bytes
                try:
                    trimmed_bytes += ioctls.trim(fd, start, _TO_THE_END - start if is_last else part_bytes)
                except SystemCallFailed as failure:
                    if failure.errno != errno.EINVAL or not start:
                        raise
                    break  # the filesystem ends before its device
                start += part_bytes
        return trimmed_bytes

    def usage(self, path: Path) -> Usage:
        with system_call(f"statfs {path}"):
            status = os.statvfs(path)
        counts_inodes = status.f_files > 0
        return Usage(
            total_bytes=status.f_blocks * status.f_frsize,
            used_bytes=(status.f_blocks - status.f_bfree) * status.f_frsize,
            available_bytes=status.f_bavail * status.f_frsize,
            total_inodes=status.f_files if counts_inodes else None,
            used_inodes=status.f_files - status.f_ffree if counts_inodes else None,
            available_inodes=status.f_favail if counts_inodes else None,
        )


@contextlib.contextmanager
def _mounted_directory(path: Path, device: Device, fs_type: str) -> Iterator[int]:
    """Open the root of the device's mounted filesystem. Raises `PreconditionFailed` for another device's."""
    with closing(open_file(path, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)) as fd:
        mounted = ioctls.device_number(os.fstat(fd).st_dev)
        if fs_type != "btrfs" and mounted != device.number:  # btrfs has anonymous numbers
            raise PreconditionFailed(f"{path} holds device {mounted}, expected {device.number}")
        yield fd


def _own_filesystem(device: OpenDevice, own_uuid: str) -> Filesystem | None:
    """Return the filesystem with that uuid if it is ready, certain, and the same in the page cache, as mounts read it.

    Starts no program. docs/data-safety.md, "A filesystem that is used again", gives the reasons.
    """
    head = _read_head(device)
    found = [disk_formats.parse_superblock(head, fs_type) for fs_type in disk_formats.superblock_types(head)]
    present = found[0] if len(found) == 1 else None
    if present is None or present.uuid != own_uuid or not (present.is_certain and _is_ready(present, device)):
        return None
    with system_call(f"read {device.device.path}"), closing(os.open(fd_path(device.fd), os.O_RDONLY)) as cached:
        offset = len(head) - _PAGE_BYTES if present.fs_type == "btrfs" else 0
        if os.pread(cached, _PAGE_BYTES, offset) != head[offset : offset + _PAGE_BYTES]:
            return None
    return Filesystem(present.fs_type, present.uuid, is_ready=True)


def _is_ready(present: disk_formats.Superblock, device: OpenDevice) -> bool:
    return present.was_closed_well and present.size_bytes + GROWTH_THRESHOLD_BYTES >= device.device.size_bytes


def _name_content(device: OpenDevice, found: int, deadline: Deadline) -> Filesystem | OtherContent:
    """Name the data at byte `found` by blkid; unrecognised data is `OtherContent`, never blank."""
    head = _read_head(device)
    argv = ("blkid", "-p", "-o", "export")
    accept = (_BLKID_FOUND, _BLKID_NOTHING, _BLKID_AMBIVALENT)
    answer = _run_on(device, argv, timeout_s=max(1.0, deadline.remaining_s()), accept=accept)
    if answer.status == _BLKID_AMBIVALENT:
        return OtherContent("signatures of several kinds of content")
    values = disk_formats.parse_blkid(answer.stdout.decode(errors="replace"))
    fs_type, usage = values.get("TYPE", ""), values.get("USAGE", "")
    if "PTTYPE" in values:
        return OtherContent(f"a partition table ({values['PTTYPE']})")
    if not fs_type:
        return OtherContent(f"data at byte {found} that nothing recognises", is_complete=False)
    if usage != "filesystem":
        return OtherContent(f"{fs_type} ({usage or 'of no known use'})")
    direct = disk_formats.superblock_types(head)
    cached = "ext4" if fs_type in _EXT else fs_type
    # blkid reads through the page cache, which may be older than the device.
    if (direct or cached in _KINDS) and direct != [cached]:
        read_as = ", ".join(direct) or "no intact superblock"
        is_complete = bool(direct) or fs_type != "xfs"  # mkfs.xfs completes its superblock at the end
        return OtherContent(f"{fs_type} by the page cache (blkid), {read_as} by a direct read", is_complete)
    label, present = values.get("LABEL", ""), disk_formats.parse_superblock(head, fs_type)
    if present is None:
        return Filesystem(fs_type, values.get("UUID", ""), label)
    return Filesystem(fs_type, present.uuid, label, _is_ready(present, device))


def _read_head(device: OpenDevice) -> bytes:
    with zero_scan.DirectReader(device, disk_formats.HEAD_BYTES) as reader:
        return reader.read(0, min(disk_formats.HEAD_BYTES, device.device.size_bytes))


def _superblock(device: OpenDevice, fs_type: str) -> disk_formats.Superblock:
    found = disk_formats.parse_superblock(_read_head(device), fs_type)
    if found is None:
        raise PreconditionFailed(f"{device.device.path} holds no superblock of {fs_type}")
    return found


def _run_on(device: OpenDevice, argv: Sequence[str], *, timeout_s: float, accept: Sequence[int] = (0,)) -> Completed:
    argv = (*argv, fd_path(device.fd))
    return run(argv, timeout_s=timeout_s, accept=accept, pass_fds=(device.fd,), on_device=True)


def _options_are_refused(device: OpenDevice, argv: Sequence[str], options: Sequence[str], dry_run: str | None) -> bool:
    """Tell if mkfs failed because of its options: then a dry run fails too."""
    if dry_run is None:
        return True
    try:
        _run_on(device, (*argv, dry_run, *options), timeout_s=_DRY_RUN_LIMIT_S)
    except CommandFailed as failure:
        return failure.status > 0
    return False


def _first_reason(stderr: str) -> str:
    """Return the line with the reason: mkfs.xfs prints its usage after it, mke2fs its version before it."""
    lines = [line.strip() for line in stderr.splitlines() if line.strip() and not line.startswith("mke2fs ")]
    return lines[0] if lines else "it printed no reason"


def _require_type(device: OpenDevice, fs_type: str, options: Sequence[str]) -> None:
    """Refuse a filesystem that its options made another type: ext4 without some features is ext3, ext2 or a journal."""
    made = _name_content(device, 0, Deadline.after(_DRY_RUN_LIMIT_S))
    what = made.fs_type if isinstance(made, Filesystem) else made.description
    if what != fs_type:
        raise InvalidField(_FIELD, " ".join(options), f"options that make {fs_type}, not {what}")


def _e2fsck(device: OpenDevice, options: Sequence[str], *, timeout_s: float) -> None:
    try:
        _run_on(device, ("e2fsck", *options), timeout_s=timeout_s, accept=(0, _CORRECTED, _CORRECTED | _REBOOT))
    except CommandFailed as failure:
        if failure.status > 0 and failure.status & (_UNCORRECTED | _OPERATIONAL):
            raise ContentRefused(
                f"ext4 on {device.device.path} needs manual repair: e2fsck {' '.join(options)} ended with status "
                f"{failure.status}; keep a copy of the volume, then run `e2fsck -f {device.device.path}`"
            ) from failure
        raise


def _require_growth(device: Device, device_bytes: int, before: int, after: int) -> None:
    if after <= before and device_bytes - before > UNUSABLE_TAIL_BYTES:
        raise HostFailure(f"the filesystem on {device.path} kept {after} bytes, expected about {device_bytes}")
