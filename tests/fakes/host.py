# SPDX-License-Identifier: Apache-2.0
"""A machine in memory that fits all ports of the node: block devices and their content, filesystems, mounts, paths.

A model, not a mock: it has the rules of the kernel that the node's use-cases rely on (one superblock per device,
exclusive claims, bind mounts that share a superblock, a bound node that keeps nothing open). `FakeHost.step` is called
between any two effects; a test may raise there to kill the driver. `FakeHost.destroyed` lists user data that a format
destroyed.
"""

from __future__ import annotations

import errno
import itertools
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from csi_driver.deadline import Deadline
from csi_driver.errors import (
    DeadlineReached,
    HostFailure,
    IdentityNotProven,
    InvalidField,
    OperationPending,
    PreconditionFailed,
    StorageUnavailable,
    SystemCallFailed,
)
from csi_driver.host_model import (
    Device,
    DeviceNumber,
    Fault,
    FaultKind,
    Mount,
    NvmeOrphan,
    OpenDevice,
    ReadOnlyDevice,
    StorageClient,
    VolumeStatus,
)
from csi_driver.nvme_model import ConnectedVolume
from tests.fakes.disks import MIB, FakeDisk, MountEntry
from tests.fakes.filesystems import FakeFilesystems, FakeMounts
from tests.fakes.luks import MAPPER_DIRECTORY, FakeEncryption

DEVICE_DIRECTORY = Path("/dev/nvmesh")


class FakeHost:
    """The machine, with one attribute per port, and the actions of a test or the CO."""

    def __init__(self, *, root: Path = Path("/var/lib/kubelet")) -> None:
        self.disks: dict[str, FakeDisk] = {}
        self.readers: list[FakeDisk] = []
        self.mappers: dict[str, FakeDisk] = {}
        self.table: list[MountEntry] = []
        self.tree: dict[Path, str] = {Path("/"): "directory"}
        self.root = root
        self.step: Callable[[str], None] = lambda point: None
        self.destroyed: list[str] = []
        self.formats: list[str] = []
        self.can_grow_mounted_ext4 = True
        self.modes: dict[Path, int] = {}
        self.lost: list[DeviceNumber] = []
        """Devices with filesystems to be shut down."""
        self.answers: threading.Event = threading.Event()
        self.answers.set()
        self.present_problems: list[str] = []
        self.mapper_problem = ""
        self.client: str | None = "1f0e8a52-0000-4000-8000-000000000001"
        self.client_is_expected = False
        self.client_problem = ""
        self.client_limit = 0
        self.unnamed_attachments: tuple[str, ...] = ()
        self.exports: dict[str, FakeDisk] = {}
        """Disks of the storage that this node may connect, by the NQN of its attachment."""
        self.connections: dict[str, FakeConnection] = {}
        """By the name of the volume."""
        self.orphans: list[NvmeOrphan] = []
        self.connects = False
        """It needs no storage client, as it connects volumes itself."""
        self._minors = itertools.count(1)
        self.devices = FakeDevices(self)
        self.encryption = FakeEncryption(self)
        self.read_only_devices = FakeReadOnlyDevices(self)
        self.mounts = FakeMounts(self)
        self.filesystems = FakeFilesystems(self)
        self.paths = FakePaths(self)
        self.probes = FakeProbes(self)
        self.wrong_devices: dict[DeviceNumber, list[Fault]] = {}
        self.wrong_filesystems: dict[DeviceNumber, list[Fault]] = {}
        self.tools = FakeTools(self)
        self.make_tree(root)

    # --- actions of the storage and the CO ---

    def make_tree(self, path: Path) -> Path:
        """Create a directory with its parents."""
        for part in (*reversed(path.parents), path):
            self.tree.setdefault(part, "directory")
        return path

    def attach(
        self,
        name: str,
        uuid: str,
        size_bytes: int = 64 * MIB,
        *,
        like: FakeDisk | None = None,
        number: DeviceNumber | None = None,
    ) -> FakeDisk:
        """Add the device of a volume; `like` gives the content of an earlier attachment.

        `number`: that of a device that is gone and may still be mounted.
        """
        number = number or DeviceNumber(240, next(self._minors))
        disk = FakeDisk(name, uuid, number, size_bytes, DEVICE_DIRECTORY / name)
        if like is not None:
            disk.filesystem, disk.signature, disk.raw = like.filesystem, like.signature, like.raw
            disk.was_used, disk.size_bytes = like.was_used, like.size_bytes
            disk.luks = like.luks
            if disk.luks is not None:
                disk.luks.inner.name, disk.luks.inner.uuid = name, uuid
                disk.luks.inner.path = MAPPER_DIRECTORY / name
        self.disks[name] = disk
        return disk

    def detach(self, name: str) -> FakeDisk:
        """Remove the device, also while it is used; its mounts stay and are dead."""
        disk = self.disks.pop(name)
        disk.is_gone = True
        return disk

    def upgrade_client(self) -> None:
        """Upgrade the storage client under its volumes: devices and mounts stay, the status files go."""
        self.client, self.client_is_expected = None, True
        for disk in self.disks.values():
            disk.claims_uuid, disk.status = False, None

    def finish_upgrade(self, client: str) -> None:
        """Show the status files of the new client."""
        self.client = client
        for disk in self.disks.values():
            disk.status = VolumeStatus(disk.name, disk.uuid, disk.size_bytes, io_enabled=True)

    def reboot(self) -> None:
        """Reboot: mounts, claims and read-only devices go; disks and directories stay."""
        self.table.clear()
        self.readers.clear()
        self.mappers.clear()
        for name in self.connections.keys() & self.disks.keys():
            self.detach(name).opened_by_others = 0
        self.connections.clear()
        for disk in self.disks.values():
            disk.claimed = None
            disk.read_only = False

    def die(self) -> None:
        """Kill the driver's process, which closes its devices."""
        for disk in (*self.disks.values(), *self.readers, *self.mappers.values()):
            disk.claimed = None

    def write_file(self, path: Path, name: str, data: bytes) -> None:
        """Write a file into the filesystem that is mounted at `path`."""
        entry = self.topmost(path)
        if entry is None or entry.disk is None or entry.disk.filesystem is None:
            raise AssertionError(f"nothing is mounted at {path}")
        if entry.read_only or entry.disk.superblock_read_only or entry.disk.read_only or entry.disk.is_gone:
            raise SystemCallFailed(f"write {path}/{name}", errno.EROFS)
        entry.disk.filesystem.files[name] = data
        entry.disk.was_used = True

    def write_raw(self, path: Path, offset: int, data: bytes) -> None:
        """Write to the block device that is published at `path`."""
        entry = self.topmost(path)
        if entry is None or entry.node is None:
            raise AssertionError(f"no device node is bound at {path}")
        if entry.node.read_only:
            raise SystemCallFailed(f"write {path}", errno.EPERM)
        ground = entry.node.ground
        if ground.luks is not None and offset < ground.luks.data_offset_bytes:
            self.destroyed.append(ground.uuid)
            ground.luks = None
        ground.raw[offset] = data
        ground.was_used = True

    def files_at(self, path: Path) -> dict[str, bytes]:
        entry = self.topmost(path)
        if entry is None or entry.disk is None or entry.disk.filesystem is None:
            raise AssertionError(f"nothing is mounted at {path}")
        return entry.disk.filesystem.files

    def mode_of(self, path: Path) -> int:
        """Return the permission bits at `path`."""
        entry = self.topmost(path)
        if entry is not None and entry.disk is not None and entry.disk.filesystem is not None:
            return entry.disk.filesystem.root_mode
        return self.modes.get(path, 0o750)

    def mounts_at(self, path: Path) -> int:
        """Count the mounts stacked at `path`."""
        return sum(entry.path == path for entry in self.table)

    # --- shared by the ports ---

    def topmost(self, path: Path) -> MountEntry | None:
        return next((entry for entry in reversed(self.table) if entry.path == path), None)

    def by_number(self, number: DeviceNumber) -> FakeDisk | None:
        present = (*self.disks.values(), *self.readers, *self.mappers.values())
        return next((disk for disk in present if disk.number == number and not disk.is_gone), None)

    def is_mounted(self, disk: FakeDisk) -> bool:
        return any(entry.disk is disk for entry in self.table)

    def inner_disk(self, disk: FakeDisk, header_bytes: int) -> FakeDisk:
        """Return the opened device of a new LUKS header on `disk`."""
        size, path = disk.size_bytes - header_bytes, MAPPER_DIRECTORY / disk.name
        return FakeDisk(disk.name, disk.uuid, disk.number, size, path, claims_uuid=disk.claims_uuid, is_gone=True)

    def is_mapped(self, disk: FakeDisk) -> bool:
        return any(mapper.below is disk for mapper in self.mappers.values())

    def next_number(self, major: int) -> DeviceNumber:
        return DeviceNumber(major, next(self._minors))


@dataclass
class FakeConnection:
    """A volume that the node connected. `is_refused`: its storage does not let the node in any more."""

    nqn: str
    uuid: str
    holders: list[str] = field(default_factory=list)
    is_refused: bool = False
    has_path: bool = True
    disk: FakeDisk | None = None


class FakeDevices:
    def __init__(self, host: FakeHost) -> None:
        self._host = host
        self._fds = itertools.count(1000)

    def wait_for(self, name: str, uuid: str | None, *, deadline: Deadline) -> Device:
        def is_ready() -> bool:
            device, status = self.find(name), self.status(name)
            has_io = status is None or status.io_enabled is True
            return device is not None and device.uuid is not None and has_io

        if not deadline.wait_until(is_ready):
            raise DeadlineReached(f"the device of volume {name}")
        disk = self._host.disks[name]
        device = disk.as_device()
        if uuid is not None and device.uuid != uuid:
            raise PreconditionFailed(f"{name}: the device claims {device.uuid}, expected {uuid}")
        if disk.status is not None and disk.status.refusal:
            raise PreconditionFailed(f"{name} may not be used: {disk.status.refusal}")
        return device

    def find(self, name: str, uuid: str | None = None) -> Device | None:
        disk = self._host.disks.get(name)
        return disk.as_device() if disk is not None and disk.size_bytes else None

    @contextmanager
    def open(self, device: Device, *, write: bool = False, exclusive: bool = False) -> Iterator[OpenDevice]:
        disk = self._host.by_number(device.number)
        if disk is None or disk.name != device.name or (device.uuid is not None and disk.uuid != device.uuid):
            raise PreconditionFailed(f"{device.path} is not the device that was found")
        if disk.size_bytes != device.size_bytes:
            raise PreconditionFailed(f"{device.path} has {disk.size_bytes} bytes, expected {device.size_bytes}")
        if self.is_claimed(device) is None:
            raise PreconditionFailed(f"{device.path} carries no I/O")
        if write and disk.as_device().uuid is None:
            raise IdentityNotProven(device.path, "there is no evidence")
        if write and disk.read_only:
            raise SystemCallFailed(f"write {device.path}", errno.EPERM)
        fd = next(self._fds)
        if exclusive:
            self._seize(disk, fd)
        try:
            yield OpenDevice(fd, disk.as_device())
        finally:
            if disk.claimed == fd:
                disk.claimed = None

    def _seize(self, disk: FakeDisk, fd: int) -> None:
        if disk.busy_for:
            disk.busy_for -= 1
            raise PreconditionFailed(f"{disk.path} is busy")
        if disk.claimed is not None:
            raise OperationPending(f"{disk.path} is busy: its lock is held")
        if self._host.is_mounted(disk) or self._host.is_mapped(disk):
            raise PreconditionFailed(f"{disk.path} is in use")
        disk.claimed = fd

    def is_claimed(self, device: Device) -> bool | None:
        disk = self._host.by_number(device.number)
        if disk is None:
            return False
        connection = self.connection(device.name)
        if not disk.is_usable or (connection is not None and connection.io_enabled is not True):
            return None
        return disk.claimed is not None or self._host.is_mounted(disk) or self._host.is_mapped(disk)

    def is_open(self, device: Device) -> bool | None:
        disk = self._host.by_number(device.number)
        is_claimed = self.is_claimed(device)
        return is_claimed if disk is None or not disk.opened_by_others else True

    def describe_openers(self, device: Device) -> str:
        return "by pid 4711 (sh)"

    def size_bytes(self, number: DeviceNumber) -> int | None:
        disk = self._host.by_number(number)
        return disk.size_bytes if disk is not None else None

    def uuid_of(self, number: DeviceNumber) -> str | None:
        disk = self._host.by_number(number)
        # An opened encrypted device has the identity of the one below.
        is_mute = disk is None or not disk.claims_uuid or (disk.below is not None and disk.below.is_gone)
        return None if disk is None or is_mute else disk.uuid

    def set_read_only(self, device: Device) -> None:
        disk = self._host.by_number(device.number)
        if disk is None:
            raise SystemCallFailed(f"set {device.path} read-only", errno.ENXIO)
        self._host.step("before set_read_only")
        disk.read_only = True
        self._host.step("after set_read_only")

    def present(self) -> dict[str, str] | None:
        if self._host.client is None:
            return None
        return {name: disk.uuid for name, disk in self._host.disks.items()}

    def reference_ids(self, name: str) -> tuple[str, ...] | None:
        disk = self._host.disks.get(name)
        return disk.references if disk is not None else None

    def client(self) -> StorageClient:
        host = self._host
        return StorageClient(
            host.client,
            is_expected=host.client is not None or host.client_is_expected,
            is_upgrading=host.client is None and host.client_is_expected,
            problem=host.client_problem,
            volume_limit=host.client_limit if host.client is not None or host.connects else 0,
            connects=host.connects,
        )

    def unnamed(self) -> tuple[str, ...]:
        return self._host.unnamed_attachments

    def status(self, name: str) -> VolumeStatus | None:
        disk = self._host.disks.get(name)
        return self.connection(name) or (disk.status if disk is not None else None)

    def connect(self, volume: ConnectedVolume, holder: str, *, deadline: Deadline) -> None:
        host, name, uuid, export = self._host, volume.name, volume.uuid, volume.export
        host.step("before connect")
        found = host.connections.get(name)
        if found is not None and found.nqn != export.nqn:
            self._end(name)
            found = None
        found = host.connections.setdefault(name, found or FakeConnection(export.nqn, uuid))
        if holder not in found.holders:
            found.holders.append(holder)
        host.step("after the record of a connection")
        disk = host.exports.get(export.nqn)
        if disk is None:
            found.is_refused = True
            raise PreconditionFailed(f"connect volume {name}: the storage machine refuses this node")
        if name not in host.disks:
            host.disks[name] = disk
            disk.is_gone, disk.number = False, host.next_number(259)
        if disk.uuid != uuid:
            raise PreconditionFailed(f"{export.nqn}: expected the uuid {uuid}, got {disk.uuid}")
        host.step("after connect")

    def disconnect(self, name: str, holder: str, *, is_over: bool = False, deadline: Deadline) -> None:
        host = self._host
        host.step("before disconnect")
        found = host.connections.get(name)
        if found is not None:
            found.holders = [each for each in found.holders if each != holder]
            host.step("after the last holder")
            if not found.holders:
                self._end(name)
        host.step("after disconnect")

    def _end(self, name: str) -> None:
        """End all I/O, and the connection if nothing has its device open. One that carries I/O must not be in use."""
        host = self._host
        connection, disk = host.connections[name], host.disks.get(name)
        connection.disk = disk or connection.disk
        users = [each for each in host.table if connection.disk and connection.disk in (each.disk, each.node)]
        if disk is not None:
            is_over = connection.is_refused or connection.nqn not in host.exports
            if (users or disk.opened_by_others or disk.claimed) and not is_over:
                raise AssertionError(f"volume {name} is disconnected while it is used: {users}")
            host.detach(name)
        if any(each.disk is not None for each in users):  # a bound node keeps nothing open
            raise StorageUnavailable(f"the subsystem {connection.nqn} stays while its device is mounted")
        del host.connections[name]

    def connection(self, name: str) -> VolumeStatus | None:
        found = self._host.connections.get(name)
        if found is None:
            return None
        is_on = name in self._host.disks and found.has_path and not found.is_refused
        return VolumeStatus(
            name, found.uuid, io_enabled=is_on, preempted=found.is_refused, holders=tuple(found.holders), nqn=found.nqn
        )

    def connected(self) -> frozenset[str]:
        return frozenset(self._host.connections)

    def orphans(self) -> Sequence[NvmeOrphan]:
        return tuple(self._host.orphans)

    def remove_orphan(self, orphan: NvmeOrphan, *, deadline: Deadline) -> bool:
        self._host.step("before remove_orphan")
        self._host.orphans.remove(orphan)
        self._host.step("after remove_orphan")
        return True

    def name_of(self, number: DeviceNumber) -> str | None:
        return next((disk.name for disk in self._host.disks.values() if disk.number == number), None)

    def path_of(self, name: str) -> Path:
        return DEVICE_DIRECTORY / name


class FakeReadOnlyDevices:
    def __init__(self, host: FakeHost) -> None:
        self._host = host

    def over(self, device: Device, uuid: str, reader: str) -> Device:
        label = f"{uuid}/ro-{reader}"
        if len(label) > 63:
            raise HostFailure(f"the label {label} is longer than 63 bytes")
        ground = self._host.by_number(device.number)
        if ground is None:
            raise SystemCallFailed(f"bind a loop device to {device.path}", errno.ENXIO)
        for made in self._host.readers:
            if made.label == label and made.backing is ground:
                made.size_bytes = ground.size_bytes
                return made.as_device()
        self._host.step("before over")
        number = self._host.next_number(7)
        made = FakeDisk(
            device.name,
            uuid,
            number,
            ground.size_bytes,
            Path(f"/dev/loop{number.minor}"),
            read_only=True,
            backing=ground,
            label=label,
        )
        self._host.readers.append(made)
        self._host.step("after over")
        return made.as_device()

    def release(self, number: DeviceNumber) -> bool:
        for reader in self._host.readers:
            in_use = reader.claimed is not None or any(
                entry.node is reader and entry.in_use for entry in self._host.table
            )
            if reader.number == number and not in_use:
                self._host.step("before release")
                reader.is_gone = True
                self._host.readers.remove(reader)
                self._host.step("after release")
                return True
        return False

    def present(self, name: str | None = None) -> Sequence[ReadOnlyDevice]:
        ours = (made for made in self._host.readers if name in (None, made.name))
        return [ReadOnlyDevice(made.number, made.ground.path) for made in ours]

    def release_left_over(self, reader: str, name: str) -> None:
        ours = [made for made in self._host.readers if made.name == name and made.label.endswith(f"/ro-{reader}")]
        for made in ours:
            self.release(made.number)


class FakePaths:
    def __init__(self, host: FakeHost) -> None:
        self._host = host

    def check(self, path: str, field: str, *, takes_off: bool = False) -> Path:
        plain, root = Path(path), self._host.root
        is_plain = path.startswith("/") and ".." not in plain.parts and "\0" not in path
        if not is_plain or root not in plain.parents:
            raise InvalidField(field, path, f"an absolute, plain path below {root}")
        return plain

    def kind(self, path: Path) -> str:
        entry = self._host.topmost(path)
        if entry is not None and entry.node is not None:
            return "device"
        return self._host.tree.get(path, "absent")

    def make_directory(self, path: Path) -> None:
        self._make(path, "directory")

    def make_file(self, path: Path) -> None:
        self._make(path, "file")

    def set_mode(self, path: Path, mode: int) -> None:
        self._host.step("before set_mode")
        entry = self._host.topmost(path)
        if entry is not None and entry.disk is not None and entry.disk.filesystem is not None:
            entry.disk.filesystem.root_mode = mode
        else:
            self._host.modes[path] = mode
        self._host.step("after set_mode")

    def remove(self, path: Path) -> None:
        kind = self._host.tree.get(path)
        if kind is None:
            return
        if self._host.topmost(path) is not None:
            raise PreconditionFailed(f"{path} is a mount point: it stays as it is")
        if kind not in ("directory", "file") or any(path in other.parents for other in self._host.tree):
            raise PreconditionFailed(f"{path} is not empty: it stays as it is")
        self._host.step("before remove")
        del self._host.tree[path]
        self._host.step("after remove")

    def _make(self, path: Path, kind: str) -> None:
        tree = self._host.tree
        if path in tree:
            if tree[path] != kind:
                raise PreconditionFailed(f"{path} is not a {kind}")
            return
        if tree.get(path.parent) != "directory":
            raise PreconditionFailed(f"the directory {path.parent} is absent")
        self._host.step("before create")
        tree[path] = kind
        self._host.step("after create")


class FakeProbes:
    def __init__(self, host: FakeHost) -> None:
        self._host = host

    def device(self, number: DeviceNumber) -> Sequence[Fault]:
        disk = self._host.by_number(number)
        read_only = [Fault(FaultKind.DEVICE_READ_ONLY, str(number))] if disk is not None and disk.read_only else []
        return [*read_only, *self._host.wrong_devices.get(number, [])]

    def dead(self, mounted: Mount) -> Fault | None:
        found = self._turned(mounted) + self._host.wrong_filesystems.get(mounted.number, [])
        return next((each for each in found if each.kind in (FaultKind.SHUT_DOWN, FaultKind.TURNED_READ_ONLY)), None)

    def _turned(self, mounted: Mount) -> list[Fault]:
        return [Fault(FaultKind.TURNED_READ_ONLY, mounted.source)] if mounted.turned_read_only else []

    def filesystem(self, mounted: Mount) -> Sequence[Fault]:
        self._host.answers.wait()
        return [*self._turned(mounted), *self._host.wrong_filesystems.get(mounted.number, [])]


class FakeTools:
    def __init__(self, host: FakeHost) -> None:
        self._host = host

    def problems(self) -> Sequence[str]:
        return tuple(self._host.present_problems)
