"""What a mount is that was just made, compared with what was asked; it is not visible to anybody yet."""

from __future__ import annotations

import os
from pathlib import Path

from csi_driver.errors import HostFailure, PreconditionFailed, SystemCallFailed
from csi_driver.host import block_devices, ioctls, mount_table
from csi_driver.host_model import Device, DeviceNumber


def verify(mount_fd: int, device: Device, fs_type: str, *, read_only: bool, what: str) -> None:
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
        return btrfs_device_of(root_fd)
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


def verify_read_only(mount_fd: int, what: str) -> None:
    if not os.fstatvfs(mount_fd).f_flag & os.ST_RDONLY:
        raise HostFailure(f"{what}: expected a read-only mount, got a writable one")


def btrfs_device_of(fd: int) -> DeviceNumber | None:
    try:
        devices = Path("/sys/fs/btrfs") / ioctls.btrfs_uuid(fd) / "devices"
        texts = [(device / "dev").read_text() for device in sorted(devices.iterdir())]
    except (SystemCallFailed, OSError):
        return None
    major, _, minor = texts[0].strip().partition(":") if len(texts) == 1 else ("", "", "")
    return DeviceNumber(int(major), int(minor)) if minor else None


# --- making -------------------------------------------------------------------------------------------------
