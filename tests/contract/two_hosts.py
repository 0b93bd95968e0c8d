# SPDX-License-Identifier: Apache-2.0
"""One machine, two ways: the model that the node's tests run on, and this very machine over loop devices.

Each has the ports and actions of a test: attach, grow and remove a volume's device, write as a user.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import Protocol

from csi_driver.deadline import Deadline
from csi_driver.errors import HostFailure
from csi_driver.host.connectors.loop import ReadOnlyLoops
from csi_driver.host.health import LinuxProbes
from csi_driver.host.luks import LinuxEncryption
from csi_driver.host.mounts import LinuxMounts
from csi_driver.host.paths import LinuxPaths
from csi_driver.host_model import Content, Device
from csi_driver.model import MIB
from csi_driver.node import ports
from tests.contract.host_machine import HostMachine, Volume, host_machine, soon
from tests.fakes.host import FakeHost


class Host(Protocol):
    """The ports of a machine, and what its users and its storage do."""

    @property
    def root(self) -> Path: ...
    @property
    def devices(self) -> ports.Devices: ...
    @property
    def encryption(self) -> ports.Encryption: ...
    @property
    def read_only_devices(self) -> ports.ReadOnlyDevices: ...
    @property
    def mounts(self) -> ports.Mounts: ...
    @property
    def filesystems(self) -> ports.Filesystems: ...
    @property
    def paths(self) -> ports.Paths: ...
    @property
    def probes(self) -> ports.Probes: ...

    def attach(self, name: str, size_bytes: int) -> str:
        """Let the device of a new volume appear; return its uuid."""

    def replace(self, name: str) -> None:
        """Let another volume's device of the same name and size take the place of one."""

    def lose(self, name: str) -> None:
        """Remove the device of a volume while it is in use."""

    def grow(self, name: str, size_bytes: int) -> None: ...

    def copy(self, name: str, to: str) -> str:
        """Let the device of a new volume appear, with the content that another one has on disk; return its uuid."""

    def files(self, path: Path) -> list[str]:
        """Return the names that a user of the mount at `path` meets."""

    def put(self, device: Device, offset: int, data: bytes) -> None:
        """Write to a device, past every filesystem."""

    def write(self, path: Path) -> bool:
        """Write as a user of the mount at `path`; False when it is refused."""

    def in_use(self, path: Path) -> contextlib.AbstractContextManager[None]:
        """Use the mount at `path`."""

    def mode(self, path: Path) -> int:
        """Return the permission bits that a user of `path` meets."""


class FakeSide:
    """`FakeHost` behind `Host`."""

    def __init__(self) -> None:
        self._host = FakeHost()
        self.root = self._host.root
        self.devices: ports.Devices = self._host.devices
        self.encryption: ports.Encryption = self._host.encryption
        self.read_only_devices: ports.ReadOnlyDevices = self._host.read_only_devices
        self.mounts: ports.Mounts = self._host.mounts
        self.filesystems: ports.Filesystems = self._host.filesystems
        self.paths: ports.Paths = self._host.paths
        self.probes: ports.Probes = self._host.probes
        self._attached = 0

    def attach(self, name: str, size_bytes: int) -> str:
        self._attached += 1
        identity = f"aaaaaaaa-0000-4000-8000-{self._attached:012}"
        self._host.attach(name, identity, size_bytes)
        return identity

    def replace(self, name: str) -> None:
        gone = self._host.detach(name)
        self.attach(name, gone.size_bytes)

    def lose(self, name: str) -> None:
        self._host.detach(name)

    def grow(self, name: str, size_bytes: int) -> None:
        self._host.disks[name].size_bytes = size_bytes

    def copy(self, name: str, to: str) -> str:
        source = self._host.disks[name].cut()
        identity = self.attach(to, source.size_bytes)
        self._host.attach(to, identity, like=source)
        return identity

    def files(self, path: Path) -> list[str]:
        return sorted(self._host.files_at(path))

    def put(self, device: Device, offset: int, data: bytes) -> None:
        self._host.disks[device.name].raw[offset] = data

    def write(self, path: Path) -> bool:
        mounted = self._host.mounts.at(path)
        assert mounted is not None
        try:
            if mounted.node_number is None:
                self._host.write_file(path, "written", b"x")
            else:
                self._host.write_raw(path, 0, b"x")
        except HostFailure:
            return False
        return True

    @contextlib.contextmanager
    def in_use(self, path: Path) -> Iterator[None]:
        entry = self._host.topmost(path)
        assert entry is not None
        entry.in_use = True
        try:
            yield
        finally:
            entry.in_use = False

    def mode(self, path: Path) -> int:
        return self._host.mode_of(path)


class LinuxSide:
    """`csi_driver.host` behind `Host`, below a temporary directory."""

    def __init__(self, machine: HostMachine) -> None:
        self._machine = machine
        self._volumes: dict[str, Volume] = {}
        self.root = machine.directory / "kubelet"
        self.root.mkdir()
        paths = LinuxPaths([self.root])
        self.devices: ports.Devices = machine.devices
        self.encryption: ports.Encryption = LinuxEncryption(machine.devices)
        self.read_only_devices: ports.ReadOnlyDevices = ReadOnlyLoops(machine.loops)
        self.mounts: ports.Mounts = LinuxMounts(paths.open)
        self.filesystems: ports.Filesystems = machine.filesystems
        self.paths: ports.Paths = paths
        self.probes: ports.Probes = LinuxProbes()

    def attach(self, name: str, size_bytes: int) -> str:
        self._volumes[name] = self._machine.volume(name, size_bytes)
        return self._volumes[name].uuid

    def replace(self, name: str) -> None:
        gone = self._volumes[name]
        assert self._machine.loops.detach(gone.loop)
        self.attach(name, gone.file.stat().st_size)

    def lose(self, name: str) -> None:
        (self._machine.device_root / name).unlink()

    def grow(self, name: str, size_bytes: int) -> None:
        self._machine.grow(self._volumes[name], size_bytes)

    def copy(self, name: str, to: str) -> str:
        source = self._volumes[name].file
        identity = self.attach(to, source.stat().st_size)
        shutil.copyfile(source, self._volumes[to].file)
        return identity

    def files(self, path: Path) -> list[str]:
        return sorted(set(os.listdir(path)) - {"lost+found"})

    def put(self, device: Device, offset: int, data: bytes) -> None:
        fd = os.open(device.path, os.O_RDWR | os.O_DSYNC | os.O_CLOEXEC)
        try:
            os.pwrite(fd, data, offset)
        finally:
            os.close(fd)

    def write(self, path: Path) -> bool:
        is_device = stat.S_ISBLK(path.stat().st_mode)
        file = path if is_device else path / "written"
        try:
            fd = os.open(file, os.O_RDWR | os.O_CLOEXEC | (0 if is_device else os.O_CREAT))
        except OSError:
            return False
        try:
            os.pwrite(fd, b"x", 0)
            os.fsync(fd)
        except OSError:
            return False
        finally:
            os.close(fd)
        return True

    @contextlib.contextmanager
    def in_use(self, path: Path) -> Iterator[None]:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        try:
            yield
        finally:
            os.close(fd)

    def mode(self, path: Path) -> int:
        return stat.S_IMODE(path.stat().st_mode)


@contextlib.contextmanager
def linux_side(directory: Path) -> Iterator[Host]:
    """Yield this machine, and clean up in any case."""
    with host_machine(directory) as machine:
        yield LinuxSide(machine)


class Actor:
    """Does the steps that most claims begin with."""

    def __init__(self, host: Host) -> None:
        self.host = host

    def attached(self, name: str = "csi-1", size_bytes: int = 64 * MIB) -> Device:
        self.host.attach(name, size_bytes)
        return self.device(name)

    def device(self, name: str = "csi-1") -> Device:
        device = self.host.devices.find(name)
        assert device is not None
        return device

    def formatted(self, name: str = "csi-1", fs_type: str = "ext4", size_bytes: int = 64 * MIB) -> Device:
        device = self.attached(name, size_bytes)
        with self.host.devices.open(device, write=True, exclusive=True) as opened:
            self.host.filesystems.make(opened, fs_type, (), uuid=device.uuid or "")
        return device

    def mounted(self, at: str = "staging", name: str = "csi-1", *, read_only: bool = False) -> Path:
        self.formatted(name)
        return self.mount(self.device(name), self.place(at), read_only=read_only)

    def mount(self, device: Device, path: Path, fs_type: str = "ext4", *, read_only: bool = False) -> Path:
        self.host.mounts.mount(device, path, fs_type, (), read_only=read_only)
        return path

    def bound_device(self, device: Device, at: str = "target", *, read_only: bool = False) -> Path:
        path = self.host.root / at
        self.host.paths.make_file(path)
        self.host.mounts.bind(device.path, path, read_only=read_only)
        return path

    def place(self, name: str = "target") -> Path:
        path = self.host.root / name
        self.host.paths.make_directory(path)
        return path

    def probed(self, device: Device) -> Content:
        with self.host.devices.open(device) as opened:
            return self.host.filesystems.probe(opened, deadline=soon())

    def first_data(self, device: Device, *, deadline: Deadline | None = None) -> int | None:
        with self.host.devices.open(device) as opened:
            return self.host.filesystems.first_data(opened, deadline=deadline, progress=lambda done, total: None)
