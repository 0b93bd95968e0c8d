# SPDX-License-Identifier: Apache-2.0
"""Drives of this machine that an administrator named, for the pool of the embedded storage manager.

The name is the evidence of which drive it is, so it must be one that always means the same drive. Number, size and disk
sequence number are verified on every descriptor, as those of volumes are.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from uuid import UUID

from csi_driver.deadline import Deadline
from csi_driver.errors import PreconditionFailed
from csi_driver.host import block_devices, zero_scan
from csi_driver.host.block_devices import SYS_DEV_BLOCK, read_text
from csi_driver.host.connectors import device_mapper
from csi_driver.host.connectors.nvmesh import DeviceEvidence
from csi_driver.host.devices import LinuxDevices
from csi_driver.host_model import Device, DeviceNumber, OpenDevice, VolumeStatus

_DEV = Path("/dev")
_STABLE = ("disk/by-id", "disk/by-path", "mapper", "md")
"""Directories of names that mean the same drive after a reboot. Those by uuid may mean a copy of it."""
_PAGE_BYTES = 4096


class NamedDrives(LinuxDevices):
    """Drives by stable names. `dev`: the directory of device nodes."""

    def __init__(self, dev: Path = _DEV) -> None:
        super().__init__(dev)
        self._dev = dev

    def named(self, path: Path) -> Device:
        """Return the drive. Raises `PreconditionFailed` for one that cannot be a pool."""
        drive = self.device_at(path.name, path, None)
        if drive is None:
            raise PreconditionFailed(f"drive {path}: expected a block device, got none; connect it, or correct --drive")
        if not self._is_stable(path, drive.number):
            names = ", ".join(map(str, self._stable_names(drive.number)))
            raise PreconditionFailed(
                f"drive {path}: expected a name that means the same drive after a reboot, got one that may not; "
                f"use {names or f'one below {self._dev}/disk/by-id'}"
            )
        if device_mapper.below(drive.number) is not None:
            raise PreconditionFailed(
                f"drive {path} is encrypted (LUKS): make and mount its filesystem yourself, and leave out --drive"
            )
        if drive.read_only:
            raise PreconditionFailed(f"drive {path} is read-only: expected a writable one; see `blockdev --setrw`")
        return drive

    def is_in_use(self, drive: Device) -> bool:
        return block_devices.is_claimed(drive.path)

    def first_data_is_of(self, drive: OpenDevice, uuid: str) -> bool:
        """Return whether the first data in the places of the quick check is metadata of the XFS with that uuid.

        Every block of metadata of XFS has the filesystem's uuid (xfs_format.h), within the page in which it begins.
        """
        found = zero_scan.first_data_in_places(drive, Deadline.after(60))
        if found is None:
            return False
        with zero_scan.DirectReader(drive, _PAGE_BYTES) as reader:
            return UUID(uuid).bytes in reader.read(found // _PAGE_BYTES * _PAGE_BYTES, _PAGE_BYTES)

    def _is_stable(self, path: Path, number: DeviceNumber) -> bool:
        if any(path.parent == self._dev / place for place in _STABLE):
            return True
        group, volume = (part.replace("-", "--") for part in path.parts[-2:])  # /dev/VG/LV of LVM
        name = read_text(SYS_DEV_BLOCK / str(number) / "dm/name")
        return path.parent.parent == self._dev and name == f"{group}-{volume}"

    def _stable_names(self, number: DeviceNumber) -> Iterator[Path]:
        for place in _STABLE:
            for name in sorted((self._dev / place).glob("*")):
                if block_devices.node_number(name.resolve()) == number:
                    yield name

    def _volume(self, name: str) -> VolumeStatus | None:
        return None  # a drive is no volume

    def _evidence(self, fd: int, number: DeviceNumber, status: VolumeStatus | None) -> DeviceEvidence:
        return DeviceEvidence(None, label_uuid="", is_labelled=True)  # it needs no uuid to be written to
