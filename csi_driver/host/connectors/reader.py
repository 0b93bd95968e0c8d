"""Read-only loop devices over block devices that are writable elsewhere on this node.

A read-only bind mount of a device node does not keep a process from writing through it, and BLKROSET stops those who
are already writing; a loop device opened read-only does keep its readers from writing, and nobody else.
"""

from __future__ import annotations

import os
import threading
from pathlib import Path

from csi_driver.errors import PreconditionFailed
from csi_driver.host import ioctls
from csi_driver.host.connectors.loop import LoopDevice, LoopDevices
from csi_driver.machine import Device, DeviceNumber


class ReadOnlyLoops:
    """Fits `csi_driver.node.ports.ReadOnlyDevices`. Nodes are the machine's own, `/dev/loopN`."""

    def __init__(self, loops: LoopDevices, device_directory: Path = Path("/dev")) -> None:
        self._loops = loops
        self._directory = device_directory
        self._making = threading.Lock()

    def over(self, device: Device, label: str) -> Device:
        """Return a read-only device over `device`, made or found by its label (at most 63 characters)."""
        with self._making:
            loop = self._find(device, label)
            if loop is None:
                loop = self._loops.attach(device.path, None, label=label, read_only=True, block_size=device.block_bytes)
            return self._described(device, loop)

    def release(self, number: DeviceNumber) -> bool:
        """Take down such a device when nothing uses it; False when it is not one of ours or is in use."""
        for loop in self._loops.bound():
            if loop.device_number == number:
                return loop.read_only and loop.uuid is not None and self._loops.detach(loop)
        return False

    def _find(self, device: Device, label: str) -> LoopDevice | None:
        same = (loop for loop in self._loops.bound() if loop.label == label and loop.read_only)
        return next((loop for loop in same if loop.backing == device.number and not loop.file_is_gone), None)

    def _described(self, device: Device, loop: LoopDevice) -> Device:
        node = self._directory / f"loop{loop.number}"
        self._loops.ensure_node(loop, node)
        self._loops.grow(loop)
        fd = os.open(node, os.O_RDONLY | os.O_CLOEXEC)
        try:
            size = ioctls.size_bytes(fd)
            if not ioctls.is_read_only(fd):
                raise PreconditionFailed(f"{node} over {device.path} accepts writes, wanted read-only")
        finally:
            os.close(fd)
        return Device(device.name, node, loop.device_number, size, True, device.uuid, device.block_bytes)
