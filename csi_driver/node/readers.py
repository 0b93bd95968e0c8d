"""What a read-only device over a volume's own is known by: one for every read-only target of a volume."""

from __future__ import annotations

import hashlib
from pathlib import Path

from csi_driver.errors import PreconditionFailed
from csi_driver.host_model import Device
from csi_driver.node.ownership import NamedVolume
from csi_driver.node.ports import ReadOnlyDevices

_ID_LENGTH = 16


def reader_id(volume: NamedVolume, target: Path) -> str:
    """Return the id of the volume's reader at that target. It can be told without the device and without its uuid."""
    told = f"{volume.name}\0{target}"
    return hashlib.sha256(told.encode(errors="surrogateescape")).hexdigest()[:_ID_LENGTH]


def reader_over(devices: ReadOnlyDevices, volume: NamedVolume, device: Device, target: Path) -> Device:
    """Return the read-only device of one target, which claims the volume's uuid as the volume's own device does."""
    uuid = volume.uuid or device.uuid
    if uuid is None:
        raise PreconditionFailed(
            f"volume {volume} cannot be published read-only: neither its id nor the device tells its uuid"
        )
    return devices.over(device, uuid, reader_id(volume, target))
