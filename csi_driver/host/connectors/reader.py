"""Read-only loop devices over block devices that are writable elsewhere on this node.

A read-only bind mount of a device node does not keep a process from writing through it, and BLKROSET stops those who
are already writing; a loop device opened read-only does keep its readers from writing, and nobody else.

Such a device is known by its label, `<volume uuid>/ro-<reader>`, and by standing over a block device, read-only: a
volume's own loop device stands over a file, and may be read-only too.
"""

from __future__ import annotations

import os
import re
import threading
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

from csi_driver.errors import HostFailure, PreconditionFailed
from csi_driver.host import ioctls
from csi_driver.host.connectors.loop import LoopDevice, LoopDevices
from csi_driver.host_model import Device, DeviceNumber, ReadOnlyDevice

_READER = re.compile(r"[0-9a-f]{16}")
_MARK = "ro-"


class ReadOnlyLoops:
    """Fits `csi_driver.node.ports.ReadOnlyDevices`. Nodes are the machine's own, `/dev/loopN`."""

    def __init__(self, loops: LoopDevices, device_directory: Path = Path("/dev")) -> None:
        self._loops = loops
        self._directory = device_directory
        self._making: dict[str, threading.Lock] = defaultdict(threading.Lock)

    def over(self, device: Device, uuid: str, reader: str) -> Device:
        """Return a read-only device over `device`, made, or found again by the volume's uuid and the reader's id."""
        if _READER.fullmatch(reader) is None:
            raise HostFailure(f"reader id: expected 16 hexadecimal digits, got {reader!r}")
        label = f"{uuid}/{_MARK}{reader}"
        with self._making[device.name]:
            loop = self._find(device, label)
            if loop is None:
                loop = self._loops.attach(device.path, None, label=label, read_only=True, block_size=device.block_bytes)
            return self._described(device, loop)

    def release(self, number: DeviceNumber) -> bool:
        """Take down such a device when nothing uses it; False when it is not one of ours or is in use."""
        loop = self._loops.bound_as(number)
        return loop is not None and _reader_of(loop) is not None and self._loops.detach(loop)

    def present(self, name: str | None = None) -> list[ReadOnlyDevice]:
        """Return every such device of this machine, also those over devices of others; with `name`, of one volume."""
        return [ReadOnlyDevice(loop.device_number, loop.file) for loop in self._ours(name)]

    def release_left_over(self, reader: str, name: str) -> None:
        """Take down each such device of the reader that nothing uses, whatever became of the one below.

        `name` is the volume's: devices over others are not looked at, as they may hang.
        """
        for loop in self._ours(name):
            if _reader_of(loop) == reader:
                self._loops.detach(loop)

    def _ours(self, name: str | None = None) -> Iterator[LoopDevice]:
        return (loop for loop in self._loops.bound(name) if _reader_of(loop) is not None)

    def _find(self, device: Device, label: str) -> LoopDevice | None:
        same = (loop for loop in self._ours(device.path.name) if loop.label == label)
        return next((loop for loop in same if loop.backing == device.number and not loop.file_is_gone), None)

    def _described(self, device: Device, loop: LoopDevice) -> Device:
        node = self._directory / f"loop{loop.number}"
        self._loops.ensure_node(loop, node)
        self._loops.grow(loop)
        fd = os.open(node, os.O_RDONLY | os.O_CLOEXEC)
        try:
            size = ioctls.size_bytes(fd)
            if not ioctls.is_read_only(fd):
                raise PreconditionFailed(
                    f"{node} over {device.path}: expected read-only, got a writable device; attach the volume again"
                )
        finally:
            os.close(fd)
        return Device(device.name, node, loop.device_number, size, True, device.uuid, device.block_bytes)


def _reader_of(loop: LoopDevice) -> str | None:
    """Return whose reader's device it is; None when it is no such device, whatever else it may be."""
    if not loop.read_only or loop.backing is None or loop.uuid is None:
        return None
    mark, _, reader = loop.label.partition("/")[2].partition(_MARK)
    return reader if not mark and _READER.fullmatch(reader) is not None else None
