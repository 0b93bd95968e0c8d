"""Filesystems on volumes: what a device holds, making, checking, growing, and how full they are.

Decides nothing: whether a device may be formatted is the node's to say. Every tool gets the device as a descriptor
that was proven to be the volume's (`/proc/self/fd/N`), never as a path that may be another device by then, and holds
the device's lock by it for as long as it lives.
"""

from __future__ import annotations

import contextlib
import errno
import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from csi_driver.deadline import Deadline
from csi_driver.errors import CommandFailed, HostFailure, InvalidField, PreconditionFailed, SystemCallFailed
from csi_driver.host import disk_formats, ioctls, zero_scan
from csi_driver.host.devices import LinuxDevices
from csi_driver.host.luks import as_written
from csi_driver.host.processes import Completed, find_tool, run
from csi_driver.host_model import Blank, Content, Device, Filesystem, OpenDevice, OtherContent
from csi_driver.model import MIB, Usage

_WRITE_LIMIT_S = 30 * 60.0
_FULL_CHECK_LIMIT_S = 4 * 3600.0
_DRY_RUN_LIMIT_S = 60.0
_GROWTH_SLACK_BYTES = 16 * MIB
"""A filesystem may leave a rest of its device unused that is too small for a block group or allocation group."""

# -F, -f: because a half-made filesystem of ours is made again; the node decided that before. Never -F twice: it would
# format what is mounted.
_MAKE: dict[str, tuple[str, ...]] = {
    "ext4": ("mkfs.ext4", "-q", "-F"),
    "xfs": ("mkfs.xfs", "-q", "-f"),
    "btrfs": ("mkfs.btrfs", "-q", "-f"),
}
_WITH_UUID: dict[str, Callable[[str], tuple[str, str]]] = {
    "ext4": lambda uuid: ("-U", uuid),
    "xfs": lambda uuid: ("-m", f"uuid={uuid}"),
    "btrfs": lambda uuid: ("-U", uuid),
}
# Says what it would do, and does nothing. mkfs.btrfs has no such flag.
_MAKE_NOTHING = {"ext4": "-n", "xfs": "-N"}
_MAKE_OPTIONS = "mkfsOptions"
_BTRFS_SECTOR_BYTES = 4096
_SMALLEST_BYTES = {"ext4": 2 * MIB, "xfs": 300 * MIB, "btrfs": 109 * MIB}
"""Below these the mkfs of xfsprogs 6 and btrfs-progs 6 refuses; ext4 would have no journal."""
_NEEDS = {"ext4": ("mkfs.ext4", "e2fsck", "resize2fs"), "xfs": ("mkfs.xfs",), "btrfs": ("mkfs.btrfs",)}

# blkid(8), "RETURN CODE"
_BLKID_FOUND, _BLKID_NOTHING, _BLKID_AMBIVALENT = 0, 2, 8
# e2fsck(8), "EXIT CODE": a sum of these
_CORRECTED, _REBOOT, _UNCORRECTED, _OPERATIONAL = 1, 2, 4, 8


class LinuxFilesystems:
    """Fits `csi_driver.node.ports.Filesystems`."""

    def __init__(self, devices: LinuxDevices) -> None:
        self._devices = devices

    def supported(self) -> Sequence[str]:
        """Return the filesystem types that this machine can make and mount, "ext4" first."""
        return [
            fs_type for fs_type, tools in _NEEDS.items() if all(find_tool(t) for t in tools) and _in_kernel(fs_type)
        ]

    # --- what is there ---

    def probe(self, device: OpenDevice, *, deadline: Deadline) -> Content:
        """Tell what the device holds: blank only when all of `zero_scan.probe_places` was read and is zero.

        Raises `HostFailure` when any read fails or comes back short, `DeadlineReached`.
        """
        with as_written(device, self._devices.open_number) as kept, zero_scan.DirectReader(kept) as reader:
            found = zero_scan.first_data_in_places(reader, kept, deadline)
        if found is None:
            return Blank()
        with zero_scan.DirectReader(device) as reader:
            head = reader.read(0, min(disk_formats.HEAD_BYTES, device.device.size_bytes))
        return _name_content(device, found, head, deadline)

    def first_data(
        self, device: OpenDevice, *, deadline: Deadline | None, progress: Callable[[int, int], None]
    ) -> int | None:
        """Read every block; return the offset of the first byte that is not zero, or None when there is none."""
        with as_written(device, self._devices.open_number) as kept:
            return zero_scan.first_data(kept, deadline=deadline, progress=progress)

    def recorded_bytes(self, device: Device, fs_type: str) -> int:
        """Return the size of the filesystem as its superblock on the device records it."""
        with self._devices.open(device) as opened:
            return _superblock(opened, fs_type).size_bytes

    # --- making and repairing ---

    def wipe(self, device: OpenDevice) -> None:
        """Write zeroes over all that `probe` reads, so that nothing is recognised there any more."""
        with self._proven_again(device):
            zero_scan.wipe_places(device)

    def make(
        self, device: OpenDevice, fs_type: str, options: Sequence[str], *, uuid: str, asked: Sequence[str] = ()
    ) -> None:
        """Make a filesystem with that uuid, destroying what is there.

        `asked`: what of `options` the caller wanted, who is told when mkfs does not take it. Raises
        `PreconditionFailed` for a device too small for it, or that is no longer the one that was opened;
        `InvalidField` for options that mkfs does not take or that make another kind of filesystem than the one named.
        Has half an hour.
        """
        if fs_type not in _MAKE:
            raise InvalidField("fs_type", fs_type, f"one of {', '.join(_MAKE)}")
        argv = (*_MAKE[fs_type], *_WITH_UUID[fs_type](uuid))
        size, least = device.device.size_bytes, _SMALLEST_BYTES[fs_type]
        if size < least:
            raise PreconditionFailed(f"{device.device.path} has {size} bytes, {fs_type} needs at least {least}")
        try:
            with self._proven_again(device):
                _run_on(device, (*argv, *options), timeout_s=_WRITE_LIMIT_S)
                os.fsync(device.fd)
        except OSError as error:
            raise SystemCallFailed(f"sync {device.device.path}", error.errno or 0) from error
        except CommandFailed as failure:
            if asked and failure.status > 0 and _are_to_blame(device, argv, options, _MAKE_NOTHING.get(fs_type)):
                wanted = f"options that {argv[0]} takes here ({_first_reason(failure.stderr)})"
                raise InvalidField(_MAKE_OPTIONS, " ".join(asked), wanted) from failure
            raise
        if _superblock(device, fs_type).uuid != uuid:
            raise HostFailure(f"{argv[0]} left {device.device.path} without the uuid {uuid}")
        if asked:
            _require_kind(device, fs_type, asked)

    @contextlib.contextmanager
    def _proven_again(self, device: OpenDevice) -> Iterator[None]:
        """Hold the device open once more, proven anew: a program opens it by its number, which may be another's now.

        The reading before may have taken hours. While it is held open, nothing else gets its number.
        """
        with self._devices.open(device.device, write=True):
            yield

    def check(self, device: Device, fs_type: str) -> None:
        """Repair what can be repaired without a question. Raises `PreconditionFailed` when a person must decide.

        Only ext4 has anything to do: xfs and btrfs replay their logs when they are mounted, have no repair that is
        safe without a person (fsck.xfs(8), btrfs-check(8)), and refuse the mount where one is needed. An ext4 that
        was closed well is not checked, as e2fsck -p itself would not, and neither is a read-only device.
        """
        if fs_type not in ("ext2", "ext3", "ext4") or device.read_only:
            return
        with self._devices.open(device) as looked_at:
            if _superblock(looked_at, fs_type).was_closed_well:
                return
        with self._devices.open(device, write=True, exclusive=True) as opened:
            _e2fsck(opened, ("-p",), timeout_s=_WRITE_LIMIT_S)

    # --- growing ---

    def grow_unmounted(self, device: Device, fs_type: str) -> bool:
        """Grow an unmounted filesystem to its device. False when this type grows only mounted (xfs, btrfs)."""
        if fs_type not in ("ext2", "ext3", "ext4"):
            return False
        with self._devices.open(device, write=True, exclusive=True) as opened:
            before = _superblock(opened, fs_type)
            if not before.was_checked_since_use:
                _e2fsck(opened, ("-f", "-p"), timeout_s=_FULL_CHECK_LIMIT_S)
            _run_on(opened, ("resize2fs",), timeout_s=_WRITE_LIMIT_S)
            after = _superblock(opened, fs_type)
            _require_growth(device, opened.device.size_bytes, before.size_bytes, after.size_bytes)
        return True

    def grow_mounted(self, path: Path, device: Device, fs_type: str) -> None:
        """Grow a mounted filesystem to its device.

        Raises `PreconditionFailed` where this machine does not let ext4 grow while mounted (CAP_SYS_RESOURCE).
        """
        before = _statfs_bytes(path)
        recorded = before
        try:
            fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
        except OSError as error:
            raise SystemCallFailed(f"open {path}", error.errno or 0) from error
        try:
            mounted = ioctls.device_number(os.fstat(fd).st_dev)
            if fs_type != "btrfs" and mounted != device.number:  # btrfs shows a number of its own
                raise PreconditionFailed(f"{path} holds device {mounted}, expected {device.number}")
            match fs_type:
                case "ext2" | "ext3" | "ext4":
                    recorded = self._grow_mounted_ext4(fd, device, fs_type)
                case "xfs":
                    recorded = _grow_mounted_xfs(fd, device)
                case "btrfs":
                    _grow_mounted_btrfs(fd, device, before)
                case _:
                    raise InvalidField("fs_type", fs_type, f"one of {', '.join(_MAKE)}")
        finally:
            os.close(fd)
        if _statfs_bytes(path) <= before:
            _require_growth(device, device.size_bytes, recorded, recorded)

    def _grow_mounted_ext4(self, fd: int, device: Device, fs_type: str) -> int:
        with self._devices.open(device) as opened:
            now = _superblock(opened, fs_type)
        blocks = device.size_bytes // now.block_bytes
        if blocks > now.blocks:
            try:
                ioctls.ext4_resize(fd, blocks)
            except SystemCallFailed as failure:
                if failure.errno == errno.EPERM:
                    raise PreconditionFailed(
                        f"ext4 on {device.path} cannot grow while it is mounted: this process lacks CAP_SYS_RESOURCE; "
                        "the next NodeStageVolume grows it before it mounts it"
                    ) from failure
                raise
        return now.size_bytes

    def usage(self, path: Path) -> Usage:
        """Return the use of the filesystem at `path`; inodes are None where it counts none (btrfs)."""
        try:
            status = os.statvfs(path)
        except OSError as error:
            raise SystemCallFailed(f"statfs {path}", error.errno or 0) from error
        counts_inodes = status.f_files > 0
        return Usage(
            total_bytes=status.f_blocks * status.f_frsize,
            used_bytes=(status.f_blocks - status.f_bfree) * status.f_frsize,
            available_bytes=status.f_bavail * status.f_frsize,
            total_inodes=status.f_files if counts_inodes else None,
            used_inodes=status.f_files - status.f_ffree if counts_inodes else None,
            available_inodes=status.f_favail if counts_inodes else None,
        )


# --- what is there ------------------------------------------------------------------------------------------


def _name_content(device: OpenDevice, found: int, head: bytes, deadline: Deadline) -> Content:
    """Ask blkid what the data is. That it finds nothing proves nothing: there is data."""
    argv = ("blkid", "-p", "-o", "export")
    accept = (_BLKID_FOUND, _BLKID_NOTHING, _BLKID_AMBIVALENT)
    answer = _run_on(device, argv, timeout_s=max(1.0, deadline.remaining_s()), accept=accept)
    if answer.status == _BLKID_AMBIVALENT:
        return OtherContent("signatures of several kinds of content")
    values = parse_blkid(answer.stdout.decode(errors="replace"))
    fs_type, usage = values.get("TYPE", ""), values.get("USAGE", "")
    if "PTTYPE" in values:
        return OtherContent(f"a partition table ({values['PTTYPE']})")
    if not fs_type:
        return OtherContent(f"data at byte {found} that nothing recognises")
    if usage != "filesystem":
        return OtherContent(f"{fs_type} ({usage or 'of no known use'})")
    direct = disk_formats.recognise(head)
    cached = "ext4" if fs_type in ("ext2", "ext3", "ext4") else fs_type
    if (direct or cached in _MAKE) and direct != [cached]:
        found_as = f"as {', '.join(direct)}" if direct else "as no whole one"
        return OtherContent(f"what blkid takes for {fs_type} and reads, past the page cache, {found_as}")
    present = disk_formats.parse(head, fs_type)
    return Filesystem(fs_type, present.uuid if present else values.get("UUID", ""), values.get("LABEL", ""))


def parse_blkid(text: str) -> dict[str, str]:
    r"""Read blkid's export format: KEY=value lines, where a backslash quotes the character after it."""
    values = {}
    for line in text.split("\n"):  # a label may hold what splitlines() takes for the end of a line
        key, separator, value = line.partition("=")
        if separator:
            values[key] = _unquoted(value)
    return values


def _unquoted(value: str) -> str:
    parts, quoted = [], False
    for character in value:
        if character == "\\" and not quoted:
            quoted = True
            continue
        parts.append(character)
        quoted = False
    return "".join(parts)


def _superblock(device: OpenDevice, fs_type: str) -> disk_formats.Superblock:
    length = min(disk_formats.HEAD_BYTES, device.device.size_bytes)
    with zero_scan.DirectReader(device, disk_formats.HEAD_BYTES) as reader:
        found = disk_formats.parse(reader.read(0, length), fs_type)
    if found is None:
        raise PreconditionFailed(f"{device.device.path} holds no superblock of {fs_type}")
    return found


def _in_kernel(fs_type: str) -> bool:
    """Tell whether the kernel has the filesystem, or may load it: without a list of modules, it may."""
    with contextlib.suppress(OSError):
        if fs_type in Path("/proc/filesystems").read_text().split():
            return True
    try:
        modules = Path("/lib/modules", os.uname().release, "modules.dep").read_text()
    except OSError:
        return True
    return f"/{fs_type}.ko" in modules


# --- tools --------------------------------------------------------------------------------------------------


def _run_on(device: OpenDevice, argv: Sequence[str], *, timeout_s: float, accept: Sequence[int] = (0,)) -> Completed:
    path = f"/proc/self/fd/{device.fd}"
    return run((*argv, path), timeout_s=timeout_s, accept=accept, pass_fds=(device.fd,), on_device=True)


def _are_to_blame(device: OpenDevice, argv: Sequence[str], options: Sequence[str], nothing: str | None) -> bool:
    """Tell whether mkfs failed by its options: then it refuses them also where it is to write nothing."""
    if nothing is None:
        return True
    try:
        _run_on(device, (*argv, nothing, *options), timeout_s=_DRY_RUN_LIMIT_S)
    except CommandFailed as failure:
        return failure.status > 0
    return False


def _first_reason(stderr: str) -> str:
    """Return the line that says why: mkfs.xfs prints its whole usage after it, mke2fs its version before it."""
    lines = [line.strip() for line in stderr.splitlines() if line.strip() and not line.startswith("mke2fs ")]
    return lines[0] if lines else "it printed no reason"


def _require_kind(device: OpenDevice, fs_type: str, options: Sequence[str]) -> None:
    """Refuse what options made of a filesystem, before it holds data: the next stage would not know it for its own.

    Features taken away turn ext4 into ext3 or ext2, or into a journal for another one.
    """
    with zero_scan.DirectReader(device, disk_formats.HEAD_BYTES) as reader:
        head = reader.read(0, min(disk_formats.HEAD_BYTES, device.device.size_bytes))
    made = _name_content(device, 0, head, Deadline.after(_DRY_RUN_LIMIT_S))
    what = "blank"
    if isinstance(made, Filesystem | OtherContent):
        what = made.fs_type if isinstance(made, Filesystem) else made.description
    if what != fs_type:
        raise InvalidField(_MAKE_OPTIONS, " ".join(options), f"options that leave {fs_type} what it is, not {what}")


def _e2fsck(device: OpenDevice, options: Sequence[str], *, timeout_s: float) -> None:
    try:
        _run_on(device, ("e2fsck", *options), timeout_s=timeout_s, accept=(0, _CORRECTED, _CORRECTED | _REBOOT))
    except CommandFailed as failure:
        if failure.status > 0 and failure.status & (_UNCORRECTED | _OPERATIONAL):
            raise PreconditionFailed(
                f"ext4 on {device.device.path} needs manual repair: e2fsck {' '.join(options)} ended with status "
                f"{failure.status}; keep a copy of the volume, then run `e2fsck -f {device.device.path}`"
            ) from failure
        raise


def _grow_mounted_xfs(fd: int, device: Device) -> int:
    now = ioctls.xfs_geometry(fd)
    blocks = device.size_bytes // now.block_bytes
    if blocks > now.blocks:
        ioctls.xfs_grow(fd, blocks, now.inode_percent)
    return now.blocks * now.block_bytes


def _grow_mounted_btrfs(fd: int, device: Device, total_bytes: int) -> None:
    # The kernel refuses any size below 256 MiB, also the one that the filesystem has (fs/btrfs/ioctl.c).
    if device.size_bytes - total_bytes >= _BTRFS_SECTOR_BYTES:
        ioctls.btrfs_grow(fd)


def _statfs_bytes(path: Path) -> int:
    try:
        status = os.statvfs(path)
    except OSError as error:
        raise SystemCallFailed(f"statfs {path}", error.errno or 0) from error
    return status.f_blocks * status.f_frsize


def _require_growth(device: Device, device_bytes: int, before: int, after: int) -> None:
    if after <= before and device_bytes - before > _GROWTH_SLACK_BYTES:
        raise HostFailure(f"the filesystem on {device.path} kept {after} bytes, expected about {device_bytes}")
