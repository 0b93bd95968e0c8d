# SPDX-License-Identifier: Apache-2.0
"""A small working model of this machine's loop devices: bound files, sizes, and who has a device open."""

from __future__ import annotations

import threading
from dataclasses import dataclass, field, replace
from pathlib import Path

from csi_driver.host_model import DeviceNumber, LoopDevice


@dataclass(slots=True)
class FakeLoopDevices:
    """Device nodes are plain files holding the device's number, so that no root is needed."""

    bound: dict[int, LoopDevice] = field(default_factory=dict)
    size_bytes: dict[int, int] = field(default_factory=dict)
    open: set[int] = field(default_factory=set)
    fences: bool = True
    """Whether this machine can cut off a device that is in use."""
    attached_ever: int = 0
    guard: threading.Lock = field(default_factory=threading.Lock)

    def attach(self, file: Path, node: Path, *, label: str, read_only: bool, block_size: int = 4096) -> LoopDevice:
        assert len(label.encode()) <= 63
        with self.guard:
            number = next(number for number in range(1000) if number not in self.bound)
            device = LoopDevice(
                number, DeviceNumber(7, number), file, label, read_only, node, identity=(0, file.stat().st_ino)
            )
            self.size_bytes[number] = file.stat().st_size
            node.write_text(str(number))
            self.bound[number] = device
            self.attached_ever += 1
            return device

    def ensure_node(self, device: LoopDevice, node: Path) -> LoopDevice:
        node.write_text(str(device.number))
        self.bound[device.number] = replace(self.bound[device.number], node=node)
        return self.bound[device.number]

    def bound_to(self, *directories: Path) -> tuple[LoopDevice, ...]:
        return tuple(device for device in self.bound.values() if device.file.parent in directories)

    def has_file(self, device: LoopDevice, file: Path) -> bool:
        return file.exists() and self.bound[device.number].identity == (0, file.stat().st_ino)

    def grow(self, device: LoopDevice) -> None:
        self.size_bytes[device.number] = device.file.stat().st_size

    def fence(self, device: LoopDevice) -> LoopDevice | None:
        if not self.fences:
            return None
        self.bound[device.number] = replace(self.bound[device.number], fenced=True)
        return self.bound[device.number]

    def writers(self, file: Path) -> list[int]:
        """Return the devices through which a file can be written now."""
        return [d.number for d in self.bound.values() if d.file == file and not d.read_only and not d.fenced]

    def detach(self, device: LoopDevice) -> bool:
        if device.number in self.open:
            return False
        self.bound.pop(device.number, None)
        if device.node is not None:
            device.node.unlink(missing_ok=True)
        return True

    def labels(self) -> list[str]:
        return sorted(device.label for device in self.bound.values())
