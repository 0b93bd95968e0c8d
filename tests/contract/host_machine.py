# SPDX-License-Identifier: Apache-2.0
"""Volumes on loop devices below a temporary directory, for tests of `csi_driver.host`."""

from __future__ import annotations

import contextlib
import json
import re
import subprocess
import uuid
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from csi_driver.deadline import Deadline
from csi_driver.host.connectors.loop import LoopDevices
from csi_driver.host.devices import LinuxDevices
from csi_driver.host.filesystem import LinuxFilesystems
from csi_driver.host.mounts import LinuxMounts
from csi_driver.host_model import Device, LoopDevice
from csi_driver.model import MIB

LIVE = {
    "debug_di": 0,
    "attach_status": "Attached",
    "reservation": "EXCLUSIVE_READ_WRITE",
    "status": "Live, with IO",
    "dbg": "0x200",
    "enforce_read_only": 1,
}
"""Status of a writable attachment of an older client (tests/recordings/nvmesh-client)."""


def shell(*argv: str, accept: tuple[int, ...] = (0,)) -> str:
    """Run a tool of the machine; return its output."""
    done = subprocess.run(argv, capture_output=True, text=True, check=False)
    assert done.returncode in accept, f"{argv}: {done.returncode} {done.stderr}"
    return done.stdout


def mounts_below(directory: Path) -> list[str]:
    """Return the mount points below a directory, deepest first."""
    found = []
    for line in Path("/proc/self/mountinfo").read_text().splitlines():
        point = re.sub(r"\\([0-7]{3})", lambda match: chr(int(match[1], 8)), line.split()[4])
        if Path(point).is_relative_to(directory):
            found.append(point)
    return sorted(found, key=len, reverse=True)


@dataclass
class Volume:
    """A volume of the test: its file, loop device and name."""

    name: str
    uuid: str
    file: Path
    loop: LoopDevice


class HostMachine:
    """The adapters of `csi_driver.host` over one directory."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.device_root = directory / "dev"
        self.status_root = directory / "proc"
        self.device_root.mkdir()
        self.loops = LoopDevices()
        self.devices = LinuxDevices(self.device_root, self.status_root)
        self.filesystems = LinuxFilesystems(self.devices)
        self.mounts = LinuxMounts()

    def volume(self, name: str = "csi-1", size_bytes: int = 64 * MIB, *, status: bool = True) -> Volume:
        """Make a volume: a sparse file, its loop device with its uuid, its node and its status file."""
        identity = str(uuid.uuid4())
        file = self.directory / f"{name}.{identity}.img"
        with file.open("wb") as made:
            made.truncate(size_bytes)
        loop = self.loops.attach(file, self.device_root / name, label=f"{identity}/test", read_only=False)
        if status:
            self.write_status(name, identity, size_bytes)
        return Volume(name, identity, file, loop)

    def write_status(self, name: str, identity: str, size_bytes: int, **more: object) -> None:
        """Write the client's status of a volume."""
        document = {
            "name": name,
            "uuid": identity,
            "type": "visible",
            "size[blks]": size_bytes // 4096,
            "block[b]": 4096,
        }
        path = self.status_root / "volumes" / name / "status.json"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(document | LIVE | more))

    def device(self, volume: Volume) -> Device:
        """Return the volume's device."""
        return self.devices.wait_for(volume.name, volume.uuid, deadline=soon())

    def formatted(self, fs_type: str, size_bytes: int, name: str = "csi-1") -> tuple[Volume, Device]:
        """Make a volume with a filesystem."""
        volume = self.volume(name, size_bytes)
        device = self.device(volume)
        with self.devices.open(device, write=True, exclusive=True) as opened:
            self.filesystems.make(opened, fs_type, (), uuid=volume.uuid)
        return volume, device

    def place(self, name: str = "target") -> Path:
        """Make a directory to mount on."""
        path = self.directory / name
        path.mkdir()
        return path

    def grow(self, volume: Volume, size_bytes: int) -> Device:
        """Enlarge the volume as the embedded manager does; return its device."""
        with volume.file.open("r+b") as file:
            file.truncate(size_bytes)
        self.loops.grow(volume.loop)
        return self.device(volume)

    def clean_up(self) -> None:
        """Remove all mounts and loop devices below the directory, by other tools than the tested ones."""
        for point in mounts_below(self.directory):
            subprocess.run(["umount", "--lazy", point], check=False, capture_output=True)
        self._close_encrypted()
        for entry in Path("/sys/block").glob("loop*/loop/backing_file"):
            with contextlib.suppress(OSError):
                if entry.read_text().startswith(f"{self.directory}/"):
                    subprocess.run(["losetup", "--detach", f"/dev/{entry.parts[3]}"], check=False, capture_output=True)

    def _close_encrypted(self) -> None:
        """Close every encrypted device over a loop device of this directory."""
        for slave in Path("/sys/block").glob("dm-*/slaves/loop*"):
            with contextlib.suppress(OSError):
                if (slave / "loop/backing_file").read_text().startswith(f"{self.directory}/"):
                    name = (slave.parents[1] / "dm/name").read_text().strip()
                    subprocess.run(["dmsetup", "resume", name], check=False, capture_output=True)
                    subprocess.run(["cryptsetup", "close", name], check=False, capture_output=True)


@contextlib.contextmanager
def host_machine(directory: Path) -> Iterator[HostMachine]:
    """Give a machine, and clean up."""
    machine = HostMachine(directory)
    try:
        yield machine
    finally:
        machine.clean_up()


def soon(seconds: float = 5.0) -> Deadline:
    """Return a long deadline."""
    return Deadline.after(seconds)
