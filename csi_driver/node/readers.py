"""What a read-only device over a volume's own is called: one for every read-only target, found again by its label."""

from __future__ import annotations

import hashlib
from pathlib import Path

from csi_driver.errors import PreconditionFailed
from csi_driver.machine import Device
from csi_driver.node.ownership import NamedVolume


def reader_label(volume: NamedVolume, device: Device, target: Path) -> str:
    """Label the read-only device of one target: the volume's uuid first, by which it is known for its own."""
    uuid = volume.uuid or device.uuid
    if uuid is None:
        raise PreconditionFailed(
            f"volume {volume} cannot be published read-only: neither its id nor the device tells its uuid"
        )
    return f"{uuid}/ro-{hashlib.sha256(str(target).encode(errors='surrogateescape')).hexdigest()[:16]}"
