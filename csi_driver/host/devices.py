# SPDX-License-Identifier: Apache-2.0
"""Devices of volumes: found by name, identified by evidence, and opened with the identity verified.

The evidence is the client's `status.json`, a loop device's label, and the SCSI serial number; of a volume that this
node connected itself, the record of the connection and the device's identity in sysfs. udev's database may be
outdated and is not read. All evidence must agree; without any, nothing is written.

The client's status is read before a device is opened, because opening a device without I/O may hang forever. When I/O
is lost in between, the calling thread hangs, which the node's watchdog covers.
"""

from __future__ import annotations

import contextlib
import os
import stat
from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING

from csi_driver.deadline import SYSTEM_CLOCK, Clock, Deadline
from csi_driver.errors import DeadlineReached, IdentityNotProven, InvalidField, PreconditionFailed, SystemCallFailed
from csi_driver.host import block_devices, ioctls
from csi_driver.host.block_devices import NOT_READY, device_events
from csi_driver.host.connectors import device_mapper, loop, nvmesh
from csi_driver.host.connectors.nvmesh import DeviceEvidence
from csi_driver.host.mount_table import openers
from csi_driver.host.syscalls import closing, open_file, system_call
from csi_driver.host_model import Device, DeviceNumber, NvmeOrphan, OpenDevice, StorageClient, VolumeStatus
from csi_driver.model import CSI_NAME_PREFIX, is_uuid, is_volume_name
from csi_driver.nvme_model import ConnectedVolume

if TYPE_CHECKING:
    from csi_driver.host.connectors.nvme_paths import PathKeeper

NVME_VOLUME_LIMIT = 500
"""Volumes of one node; each takes a controller and its queues for every path."""


class LinuxDevices:
    """Devices of volumes on this machine. Methods as in `csi_driver.node.ports.Devices`.

    `keeper`: of the volumes that this machine connects by NVMe/TCP; None where it does not.
    """

    def __init__(
        self,
        device_root: Path = Path("/dev/nvmesh"),
        status_root: Path = Path("/proc/nvmeibc"),
        *,
        clock: Clock = SYSTEM_CLOCK,
        udev_control: Path = Path("/run/udev/control"),
        status_files: nvmesh.StatusFiles | None = None,
        keeper: PathKeeper | None = None,
    ) -> None:
        self._root = device_root
        self._keeper, self._nvme = keeper, keeper.volumes if keeper is not None else None
        self._status = status_files or nvmesh.StatusFiles(status_root, is_sign=keeper is None)
        self._clock = clock
        self._udev_control = udev_control

    def path_of(self, name: str) -> Path:
        if not is_volume_name(name):
            raise InvalidField("volume name", name, "the name of a volume")
        return self._root / name

    def find(self, name: str, uuid: str | None = None) -> Device | None:
        return self.device_at(name, self.path_of(name), uuid)

    def device_at(self, name: str, path: Path, uuid: str | None) -> Device | None:
        """Return the device at `path`, e.g. an opened encrypted one, as the volume's."""
        seen = self._look_at(name, path)
        return replace(seen[0], uuid=seen[1].uuid_for(uuid)) if seen is not None else None

    def wait_for(self, name: str, uuid: str | None, *, deadline: Deadline) -> Device:
        """Wait for the device; contradictory evidence and a restart of the client are waited for too."""
        expected = uuid.lower() if uuid else None
        path = self.path_of(name)
        with device_events(deadline.clock, self._udev_control) as pause:
            while True:
                device, missing = self._ready(name, expected)
                if device is not None:
                    return device
                left_s = deadline.remaining_s()
                if left_s <= 0:
                    raise DeadlineReached(f"the device {path} ({missing})")
                pause(left_s)

    def _ready(self, name: str, uuid: str | None) -> tuple[Device | None, str]:
        """Return the device when it is usable, else None and a description of the missing part."""
        seen = self._look_at(name, self.path_of(name))
        if seen is None:
            return None, self._absence(name)
        device, evidence = seen
        if unsettled := evidence.disagreement(name):
            return None, unsettled
        if refusal := evidence.refusal(name) or evidence.mismatch(name, uuid):
            raise PreconditionFailed(refusal)
        if not evidence.proves():
            return None, f"{self._silence()}: nothing on this machine says that it is {uuid or 'a volume at all'}"
        if unusable := evidence.unusable(name):
            return None, unusable
        return replace(device, uuid=evidence.uuid_for(uuid)), ""

    def _absence(self, name: str) -> str:
        status = self._volume(name)
        if status is None or os.path.lexists(self.path_of(name)):
            return "it is absent or has no size yet"
        return (
            f"the storage client shows the volume ({status.details}), but its device node is missing: it is not made "
            "yet, or was removed; if it stays so, detach the volume and attach it again"
        )

    def _silence(self) -> str:
        client = self.client()
        if client.is_upgrading:
            return "the storage client is being upgraded, or starts"
        if client.uuid is None:
            return "the storage client is not running yet (no status files)"
        return "the storage client runs"

    def _look_at(self, name: str, path: Path) -> tuple[Device, DeviceEvidence] | None:
        status = self._volume(name)
        try:
            with system_call(f"open {path}"):
                if status is not None and status.io_enabled is not True:
                    node = os.stat(path)
                    is_device = stat.S_ISBLK(node.st_mode)
                    number = ioctls.device_number(node.st_rdev)
                    return self._describe_unopened(name, path, number, status) if is_device else None
                fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
        except SystemCallFailed as failure:
            if failure.errno in NOT_READY:
                return None
            raise
        with closing(fd):
            return self._describe(name, path, fd, status)

    def _describe(
        self, name: str, path: Path, fd: int, status: VolumeStatus | None
    ) -> tuple[Device, DeviceEvidence] | None:
        opened = os.fstat(fd)
        if not stat.S_ISBLK(opened.st_mode):
            return None
        size = ioctls.size_bytes(fd)
        if size == 0:
            return None
        number = ioctls.device_number(opened.st_rdev)
        with self._identifying(fd, number) as (identifying, base):
            evidence = self._evidence(identifying, base, status)
        read_only, uuid, block_bytes = ioctls.is_read_only(fd), evidence.uuid(), ioctls.logical_block_bytes(fd)
        refusal, disk_sequence = evidence.write_refusal(), ioctls.disk_sequence(fd)
        return Device(name, path, number, size, read_only, uuid, block_bytes, refusal, disk_sequence), evidence

    def _evidence(self, fd: int, number: DeviceNumber, status: VolumeStatus | None) -> DeviceEvidence:
        if self._nvme is not None and status is not None and status.holders is not None:
            return DeviceEvidence(status, self._nvme.evidence_of(number), is_labelled=True)
        if number.major == loop.LOOP_MAJOR:
            return DeviceEvidence(status, loop.claimed_uuid(fd), is_labelled=True)
        return DeviceEvidence(status, serial=nvmesh.read_serial(fd))

    def _describe_unopened(
        self, name: str, path: Path, number: DeviceNumber, status: VolumeStatus
    ) -> tuple[Device, DeviceEvidence] | None:
        size = block_devices.size_bytes(number)
        if not size or self._is_left_behind(number, status):
            return None
        evidence = DeviceEvidence(status)
        read_only = block_devices.sys_number(number, "ro") == 1
        block_bytes = block_devices.sys_number(number, "queue/logical_block_size") or 4096
        refusal, disk_sequence = evidence.write_refusal(), block_devices.sys_number(number, "diskseq")
        return Device(name, path, number, size, read_only, status.uuid, block_bytes, refusal, disk_sequence), evidence

    def _is_left_behind(self, number: DeviceNumber, status: VolumeStatus) -> bool:
        """Return whether the node of a connected volume is of an earlier device; another one may have its number."""
        return self._nvme is not None and status.holders is not None and self._nvme.evidence_of(number) != status.uuid

    @contextlib.contextmanager
    def _identifying(self, fd: int, number: DeviceNumber) -> Iterator[tuple[int, DeviceNumber]]:
        """Give the device itself, or the one below an encrypted one."""
        below = device_mapper.below(number)
        if below is None:
            yield fd, number
            return
        with system_call(f"open the device {below} under {number}"):
            opened = self.open_number(below)
        with closing(opened):
            yield opened, below

    @contextlib.contextmanager
    def open(self, device: Device, *, write: bool = False, exclusive: bool = False) -> Iterator[OpenDevice]:
        """Open the device with O_DIRECT and verify its identity on the descriptor.

        `exclusive` locks it (flock, as udev does: systemd.io/BLOCK_DEVICE_LOCKING); programs that inherit the
        descriptor keep the lock. The claim itself (O_EXCL) is left to mkfs and fsck.
        """
        if unusable := DeviceEvidence(self.status(device.name)).unusable(device.name):
            raise PreconditionFailed(unusable)
        try:
            fd = open_file(device.path, (os.O_RDWR if write else os.O_RDONLY) | os.O_DIRECT)
        except SystemCallFailed as failure:
            if failure.errno in NOT_READY:
                raise PreconditionFailed(f"{device.path} is gone, expected {device.number}") from failure
            raise
        with closing(fd):
            if exclusive:
                block_devices.lock_unclaimed(fd, device.path, self._clock)
            yield OpenDevice(fd, self._verified(fd, device, write=write))

    def _verified(self, fd: int, device: Device, *, write: bool) -> Device:
        seen = self._describe(device.name, device.path, fd, self._volume(device.name))
        if seen is None:
            raise PreconditionFailed(f"{device.path} has no size now, expected {device.size_bytes} bytes")
        found, evidence = seen
        if against := evidence.against(device.name, device.uuid) or evidence.unusable(device.name):
            raise PreconditionFailed(against)
        for what, is_now, was in (
            ("the number", found.number, device.number),
            ("the disk sequence number", found.disk_sequence, device.disk_sequence or found.disk_sequence),
            ("the uuid", found.uuid or device.uuid, device.uuid or found.uuid),
            ("a size in bytes of", found.size_bytes, device.size_bytes),
        ):
            if is_now != was:
                raise PreconditionFailed(f"{device.path} claims {what} {is_now}, expected {was}")
        if write and not evidence.proves():
            if not evidence.is_labelled:
                raise IdentityNotProven(device.path, self._silence())
            raise PreconditionFailed(f"{device.path}: nothing on this machine proves which volume it is")
        return found if found.uuid is not None else device

    def is_claimed(self, device: Device) -> bool | None:
        status = self.status(device.name)
        if status is not None and status.io_enabled is not True:
            return None
        return block_devices.is_claimed(device.path)

    def is_open(self, device: Device) -> bool | None:
        """By `is_claimed` when the client counts no opens."""
        opens = self._status.opens(device.name)
        return opens > 0 if opens is not None else self.is_claimed(device)

    def describe_openers(self, device: Device) -> str:
        users = dict.fromkeys((*islice(openers(device.number, device.path), 3), *self._status.openers(device.name)))
        named = ", ".join(islice(users, 3))
        return f"by {named or f'a program that is not visible here; see `fuser -vam {device.path}` on the node'}"

    def set_read_only(self, device: Device) -> None:
        with self.open(device) as opened:
            ioctls.set_read_only(opened.fd, True)

    size_bytes = staticmethod(block_devices.size_bytes)

    def open_number(self, number: DeviceNumber) -> int:
        """Open a device read-only by its number. Raises OSError when it is gone."""
        return block_devices.open_number(number, self._root)

    def uuid_of(self, number: DeviceNumber) -> str | None:
        """Return the uuid that the device has; a serial number, a part of it, is completed by the client's status."""
        number = device_mapper.below(number) or number
        if self._nvme is not None and (uuid := self._nvme.evidence_of(number)) is not None:
            return uuid  # from sysfs, which does not wait for the storage
        status = self.status(self.name_of(number) or "")
        if status is not None and status.io_enabled is not True:
            return None
        try:
            fd = self.open_number(number)
        except OSError:
            return None
        with closing(fd):
            if number.major == loop.LOOP_MAJOR:
                return loop.claimed_uuid(fd)
            serial = nvmesh.read_serial(fd)
        status = self._status.volume(self.name_of(number) or "")
        return status.uuid if status is not None and nvmesh.serial_of(status.uuid) == serial else None

    def name_of(self, number: DeviceNumber) -> str | None:
        for name in sorted(self._nodes()):
            with contextlib.suppress(OSError):
                status = os.stat(self._root / name)
                if stat.S_ISBLK(status.st_mode) and ioctls.device_number(status.st_rdev) == number:
                    return name
        return None

    def _nodes(self) -> set[str]:
        try:
            return set(os.listdir(self._root))
        except OSError:
            return set()

    def _nodes_of_clients(self) -> set[str]:
        """Return the names of present device nodes that are of no connection, with a record or without."""
        nodes = self._nodes() - self.connected()
        if self._nvme is None:
            return nodes
        numbers = {name: block_devices.node_number(self._root / name) for name in nodes}
        present = {name: number for name, number in numbers.items() if number and block_devices.size_bytes(number)}
        return {name for name, number in present.items() if self._nvme.evidence_of(number) is None}

    def client(self) -> StorageClient:
        """Return the state of the storage client; hidden attachments, without a device, lower the limit of volumes."""
        client, devices = self._status.client(), self._nodes_of_clients()
        limit = client.volume_limit
        if limit:
            limit = max(1, limit - len(self._status.shown() - devices))
        client = replace(client, is_expected=client.is_expected or bool(devices), volume_limit=limit)
        if self._nvme is None or client.is_expected:
            return client
        return replace(client, connects=True, problem=self._nvme.why_not(), volume_limit=NVME_VOLUME_LIMIT)

    def unnamed(self) -> tuple[str, ...]:
        # This driver attaches under an id of the handle, other programs under the volume's uuid. So did the drivers up
        # to 1.4; their volumes are known by name.
        found = []
        for name in self._nodes() - self.connected():
            ids = self.reference_ids(name)
            if ids and all(map(is_uuid, ids)) and not name.startswith(CSI_NAME_PREFIX):
                found.append(self._status.volume(name))
        return tuple(status.uuid for status in found if status is not None)

    def present(self) -> dict[str, str] | None:
        client = self._status.client() if self._nvme is None else self.client()
        if (client.uuid is None and not client.connects) or client.is_upgrading or client.problem:
            return None
        nodes = self._nodes()
        found: dict[str, str] = {}
        for name in filter(is_volume_name, nodes | self._status.shown() | self.connected()):
            status = self._volume(name)
            device = self.find(name) if status is None and name in nodes else None
            uuid = status.uuid if status is not None else device.uuid if device is not None else None
            if uuid is not None:
                found[name] = uuid
            elif device is not None:
                return None
        return found

    def status(self, name: str) -> VolumeStatus | None:
        return self._volume(name) if is_volume_name(name) else None

    def _volume(self, name: str) -> VolumeStatus | None:
        return self.connection(name) or self._status.volume(name)

    def reference_ids(self, name: str) -> tuple[str, ...] | None:
        return self._status.reference_ids(name) if is_volume_name(name) else None

    def connect(self, volume: ConnectedVolume, holder: str, *, deadline: Deadline) -> None:
        self.path_of(volume.name)
        if self._nvme is None:
            raise PreconditionFailed(
                f"volume {volume.name} is exported over NVMe/TCP, and this node is not set up to connect it: expected"
                " the directory of --nvme-directory at the start of the driver; with Helm, set storage.nvme"
            )
        self._nvme.connect(volume, holder, deadline=deadline)

    def disconnect(self, name: str, holder: str, *, is_over: bool = False, deadline: Deadline) -> None:
        if self._nvme is not None:
            self._nvme.disconnect(name, holder, is_over=is_over, deadline=deadline)

    def connection(self, name: str) -> VolumeStatus | None:
        return self._nvme.volume(name) if self._nvme is not None else None

    def connected(self) -> frozenset[str]:
        return self._nvme.names() if self._nvme is not None else frozenset()

    def orphans(self) -> Sequence[NvmeOrphan]:
        return self._keeper.orphans() if self._keeper is not None else ()

    def remove_orphan(self, orphan: NvmeOrphan, *, deadline: Deadline) -> bool:
        name = self.name_of(orphan.number) if orphan.number is not None else None
        is_claimed = orphan.number is not None and block_devices.is_number_claimed(orphan.number, self._root)
        if self._nvme is None or is_claimed or not self._nvme.end_orphan(orphan.nqn, deadline):
            return False
        if name is not None:
            self.path_of(name).unlink(missing_ok=True)
        return True
