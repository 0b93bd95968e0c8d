# SPDX-License-Identifier: Apache-2.0
"""Encrypted devices in the kernel's device-mapper: state, resume and removal, by its ioctls.

The ioctls (include/uapi/linux/dm-ioctl.h) also show a device without a table, which a killed cryptsetup leaves and
sysfs does not show. Changes name a device by its uuid, made of kind, LUKS uuid and name: a device that took over the
name since is not changed.
"""

from __future__ import annotations

import errno
import fcntl
import os
import struct
from pathlib import Path

from csi_driver.errors import SystemCallFailed
from csi_driver.host import ioctls
from csi_driver.host.block_devices import SECTOR_BYTES, SYS_DEV_BLOCK, read_text, sys_number
from csi_driver.host.connectors.loop import LOOP_MAJOR
from csi_driver.host.syscalls import closing, open_file, system_call
from csi_driver.host_model import DeviceNumber, LuksMapping

_CONTROL = Path("/dev/mapper/control")
# struct dm_ioctl: version[3], data_size, data_start, target_count, open_count, flags, event_nr, padding, dev,
# name[128], uuid[129], data[7].
_ARGUMENT = struct.Struct("=6Ii3IQ128s129s7x")
_VERSION = (4, 0, 0)
_DEV_REMOVE, _DEV_SUSPEND, _DEV_STATUS, _GET_TARGET_VERSION = 4, 6, 7, 17
_READ_ONLY, _SUSPENDED, _HAS_TABLE = 1 << 0, 1 << 1, 1 << 5
_CRYPT = "CRYPT-"
_ABSENT = (errno.ENOENT, errno.ENXIO, errno.ENODEV)


def why_unusable() -> str:
    """Return why this kernel cannot open encrypted devices; empty when it can. Loads dm_crypt."""
    fix = "run `modprobe dm_crypt` on the node"
    try:
        control = os.open(_CONTROL, os.O_RDWR | os.O_CLOEXEC)
    except OSError as error:
        reason = f"{_CONTROL}: {os.strerror(error.errno or 0)}"
        return f"this kernel has no device-mapper, or the host's /dev is not visible ({reason}); {fix}"
    with closing(control):
        try:
            _call(control, _GET_TARGET_VERSION, name="crypt")
        except OSError as error:
            if error.errno == errno.EINVAL:
                return f"the device-mapper of this kernel has no target `crypt`; {fix}"
    return ""


def mapping_named(name: str) -> LuksMapping | None:
    """Return the device of that name; None when there is none, or the kernel has no device-mapper."""
    answer = _ask("look at", _DEV_STATUS, name=name)
    if answer is None:
        return None
    number, flags, kernel_uuid = answer
    has_table = bool(flags & _HAS_TABLE)
    return LuksMapping(
        name=name,
        kernel_uuid=kernel_uuid,
        number=number,
        size_bytes=(sys_number(number, "size") or 0) * SECTOR_BYTES if has_table else 0,
        below=below(number) if has_table else None,
        read_only=bool(flags & _READ_ONLY),
        is_suspended=bool(flags & _SUSPENDED),
    )


def below(number: DeviceNumber) -> DeviceNumber | None:
    """Return the device below an encrypted device; None when `number` is not one, or the device below is gone."""
    if number.major == LOOP_MAJOR:  # a fixed number (Documentation/admin-guide/devices.txt)
        return None
    device = f"{SYS_DEV_BLOCK}/{number}"
    if not read_text(f"{device}/dm/uuid").startswith(_CRYPT):
        return None
    try:
        slaves = os.listdir(f"{device}/slaves")
        found = [DeviceNumber.parse(read_text(f"{device}/slaves/{slave}/dev")) for slave in slaves]
    except (OSError, ValueError):
        return None
    return found[0] if len(found) == 1 else None


def remove(mapping: LuksMapping) -> bool:
    """Remove an encrypted device; True also when it is gone already, False when it is in use."""
    try:
        _ask("remove", _DEV_REMOVE, uuid=mapping.kernel_uuid)
    except SystemCallFailed as failure:
        if failure.errno == errno.EBUSY:
            return False
        raise
    return True


def resume(mapping: LuksMapping) -> None:
    """Resume I/O of a suspended device. The kernel refuses when its key was wiped (EAGAIN)."""
    _ask("resume", _DEV_SUSPEND, uuid=mapping.kernel_uuid)


def _ask(what: str, command: int, *, name: str = "", uuid: str = "") -> tuple[DeviceNumber, int, str] | None:
    """Return number, flags and uuid of a device; None when it is absent."""
    try:
        with (
            closing(open_file(_CONTROL, os.O_RDWR)) as control,
            system_call(f"{what} the mapped device {name or uuid}"),
        ):
            argument = _call(control, command, name=name, uuid=uuid)
    except SystemCallFailed as failure:
        if failure.errno in _ABSENT:
            return None
        raise
    fields = _ARGUMENT.unpack(argument)
    found = bytes(fields[12]).split(b"\0", 1)[0].decode(errors="replace")
    return ioctls.device_number(fields[10]), fields[7], found


def _call(control: int, command: int, *, name: str = "", uuid: str = "") -> bytearray:
    argument = bytearray(_ARGUMENT.pack(*_VERSION, _ARGUMENT.size, 0, 0, 0, 0, 0, 0, 0, name.encode(), uuid.encode()))
    fcntl.ioctl(control, 3 << 30 | _ARGUMENT.size << 16 | 0xFD << 8 | command, argument)
    return argument
