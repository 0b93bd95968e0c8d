# SPDX-License-Identifier: Apache-2.0
"""NodeGetVolumeStats, health conditions (CSI 1.13, alpha), and counts for the metrics."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from enum import StrEnum
from pathlib import Path

from csi_driver.deadline import Deadline
from csi_driver.errors import NotFound, PreconditionFailed, StorageUnavailable, VolumeNotFound
from csi_driver.host_model import Device, DeviceNumber, Fault, FaultKind, Mount, StorageClient, VolumeStatus
from csi_driver.model import (
    Reason,
    StorageEntry,
    StorageFault,
    Usage,
    VolumeEntry,
    VolumeFault,
    VolumeHealth,
    each_once,
)
from csi_driver.node.concurrency import NotResponding, Watchdog
from csi_driver.node.expand import known_path
from csi_driver.node.mount_owner import NodeVolume, Owner, Ownership, is_same, number_of
from csi_driver.node.ports import Devices, Encryption, Filesystems, Mounts, Paths, Probes, ReadOnlyDevices, Tools
from csi_driver.node.reconcile import publication_record, staging_record
from csi_driver.node_settings import NodeSettings

COUNT_TIMEOUT_S = 5.0

CONDITIONS: Mapping[FaultKind, tuple[VolumeFault, Reason]] = {
    FaultKind.DEVICE_READ_ONLY: (VolumeFault.DEGRADED, Reason.DEVICE_READ_ONLY),
    FaultKind.BACKING_FILE_GONE: (VolumeFault.DEGRADED, Reason.BACKING_FILE_GONE),
    FaultKind.BACKING_FILE_CUT_SHORT: (VolumeFault.DATA_LOSS, Reason.BACKING_FILE_CUT_SHORT),
    FaultKind.SHUT_DOWN: (VolumeFault.INACCESSIBLE, Reason.FILESYSTEM_SHUT_DOWN),
    FaultKind.TURNED_READ_ONLY: (VolumeFault.DEGRADED, Reason.FILESYSTEM_READ_ONLY),
    FaultKind.ERRORS: (VolumeFault.DEGRADED, Reason.FILESYSTEM_ERRORS),
    FaultKind.IO_ERROR: (VolumeFault.INACCESSIBLE, Reason.IO_ERROR),
}


@dataclass(slots=True, kw_only=True)
class VolumeStatistics:
    """NodeGetVolumeStats."""

    devices: Devices
    mounts: Mounts
    filesystems: Filesystems
    paths: Paths
    probes: Probes
    ownership: Ownership
    settings: NodeSettings
    watchdog: Watchdog[Usage] = field(default_factory=lambda: Watchdog("volume-statistics"), init=False)

    def usage(self, volume_id: str, volume_path: str, staging_target_path: str, *, deadline: Deadline) -> Usage:
        """Return the usage of the volume; of a block volume only its size."""
        volume = NodeVolume.of_request(volume_id)
        path = known_path(self.paths, volume, volume_path)
        timeout_s = _timeout_s(self.settings, deadline)
        return self.watchdog.call(volume.name, str(path), lambda: self._read(volume, path), timeout_s)

    def _read(self, volume: NodeVolume, path: Path) -> Usage:
        mounted = self.mounts.at(path)
        owner = Owner.OTHER if mounted is None else self.ownership.owner_of(mounted, volume)
        if mounted is None or owner is Owner.OTHER:
            raise NotFound(f"volume {volume} is not mounted at {path}")
        number = number_of(mounted)
        size = self.devices.size_bytes(number) if number.major else None
        if owner is Owner.DEAD or (number.major and not size):
            raise StorageUnavailable(f"the device {number} of volume {volume} at {path} is gone")
        if mounted.node_number is not None and size:
            return Usage(total_bytes=size)
        dead = self.probes.dead(mounted)
        if dead is not None and dead.kind is FaultKind.SHUT_DOWN:
            raise PreconditionFailed(f"volume {volume} at {path} has no statistics: {dead.detail}")
        return self.filesystems.usage(path)


def _timeout_s(settings: NodeSettings, deadline: Deadline) -> float:
    return min(settings.statistics_timeout_s, max(0.0, deadline.remaining_s() - settings.answer_margin_s))


@dataclass(slots=True, kw_only=True)
class NodeHealth:
    """NodeGetVolumeHealth and NodeGetStorageHealth."""

    devices: Devices
    encryption: Encryption
    mounts: Mounts
    filesystems: Filesystems
    paths: Paths
    probes: Probes
    tools: Tools
    ownership: Ownership
    settings: NodeSettings
    watchdog: Watchdog[list[VolumeEntry]] = field(default_factory=lambda: Watchdog("volume-health"), init=False)

    def volume(
        self, volume_id: str, volume_publish_path: str, staging_target_path: str, *, deadline: Deadline
    ) -> VolumeHealth:
        """Return the faults of a volume at the given paths, otherwise at all of its mounts."""
        volume = NodeVolume.of_request(volume_id)
        texts = [text for text in (volume_publish_path, staging_target_path) if text]
        paths = [known_path(self.paths, volume, text) for text in texts]
        shown = list(_client_faults(self._status_of(volume)))
        about = " and ".join(map(str, paths)) or "its device"
        timeout_s = _timeout_s(self.settings, deadline)
        try:
            found = self.watchdog.call(volume.name, about, lambda: self._examine(volume, paths), timeout_s)
        except NotResponding as error:
            found = [VolumeEntry(VolumeFault.INACCESSIBLE, Reason.NOT_RESPONDING, str(error))]
        return VolumeHealth(volume_id, each_once(shown + found))

    def storage(self) -> tuple[StorageEntry, ...]:
        """Return the faults of this node's access to the storage, without touching a device."""
        client, problems = self.devices.client(), "; ".join(self.tools.problems())
        found: list[StorageEntry] = []
        if client.problem:
            what = "this node cannot connect volumes" if client.connects else "the storage client is unusable"
            message = f"{what}: {client.problem}"
            found.append(StorageEntry(StorageFault.STORAGE_UNREACHABLE, Reason.CLIENT_UNUSABLE, message))
        if client.uuid is None and not client.connects:
            found.append(_client_absent(client))
        if problems:
            found.append(StorageEntry(StorageFault.STORAGE_DEGRADED, Reason.NODE_NOT_EQUIPPED, problems))
        return tuple(found)

    def why_unusable(self) -> str:
        """Return why no volume can be used on this node; empty = they can."""
        return "; ".join(entry.message for entry in self.storage())

    def _status_of(self, volume: NodeVolume) -> VolumeStatus | None:
        status = self.devices.status(volume.name)
        return status if status is not None and is_same(status.uuid, volume.uuid) else None

    def _examine(self, volume: NodeVolume, paths: list[Path]) -> list[VolumeEntry]:
        """Examine the volume's mounts and devices. May hang."""
        mounts = self._mounts_at(volume, paths)
        devices = self._devices_of(volume)
        if not mounts:
            mounts = [mounted for device in devices for mounted in self.mounts.of_device(device)]
        if not mounts and not devices:
            if self._status_of(volume) is None:
                raise VolumeNotFound(volume.volume_id, "nothing of it is on this node")
            return [VolumeEntry(VolumeFault.INACCESSIBLE, Reason.DEVICE_GONE, f"the device of {volume} is not there")]
        numbers = dict.fromkeys((*map(number_of, mounts), *(device.number for device in devices)))
        return [entry for number in numbers for entry in self._device_faults(number, mounts)] + [
            entry for mounted in _one_per_filesystem(mounts) for entry in self._filesystem_faults(mounted)
        ]

    def _devices_of(self, volume: NodeVolume) -> list[Device]:
        device = self.ownership.device_of(volume)
        if device is None:
            return []
        mapping = self.encryption.mapping(volume.name)
        if mapping is None or mapping.below != device.number:
            return [device]
        return [device, replace(device, path=self.encryption.path_of(volume.name), number=mapping.number)]

    def _mounts_at(self, volume: NodeVolume, paths: list[Path]) -> list[Mount]:
        found = [mounted for path in paths if (mounted := self.mounts.at(path)) is not None]
        return [mounted for mounted in found if self.ownership.owner_of(mounted, volume) is not Owner.OTHER]

    def _device_faults(self, number: DeviceNumber, mounts: list[Mount]) -> Iterator[VolumeEntry]:
        if not number.major:
            return
        if not self.devices.size_bytes(number):
            yield VolumeEntry(VolumeFault.INACCESSIBLE, Reason.DEVICE_GONE, f"device {number} is gone")
            return
        is_written = any(number_of(mounted) == number and not mounted.read_only for mounted in mounts)
        for fault in self.probes.device(number):
            if is_written or fault.kind is not FaultKind.DEVICE_READ_ONLY:
                yield _entry(fault)

    def _filesystem_faults(self, mounted: Mount) -> Iterator[VolumeEntry]:
        faults = self.probes.filesystem(mounted)
        yield from map(_entry, faults)
        if any(fault.kind in (FaultKind.SHUT_DOWN, FaultKind.IO_ERROR) for fault in faults):
            return
        usage, full = self.filesystems.usage(mounted.path), VolumeFault.DEGRADED
        if usage.available_bytes == 0:
            yield VolumeEntry(full, Reason.FILESYSTEM_FULL, f"no byte of {usage.total_bytes} is available")
        if usage.total_inodes and usage.available_inodes == 0:
            yield VolumeEntry(full, Reason.INODES_EXHAUSTED, f"no inode of {usage.total_inodes} is available")


def _client_absent(client: StorageClient) -> StorageEntry:
    if client.is_upgrading:
        message = "the storage client is being upgraded, or starts; volumes in use stay"
        return StorageEntry(StorageFault.STORAGE_DEGRADED, Reason.CLIENT_UPGRADING, message)
    if client.is_expected:
        message = "the storage client is not running (no status files)"
        return StorageEntry(StorageFault.STORAGE_UNREACHABLE, Reason.CLIENT_NOT_RUNNING, message)
    return StorageEntry(StorageFault.STORAGE_UNREACHABLE, Reason.CLIENT_ABSENT, "this node has no storage client")


def _client_faults(status: VolumeStatus | None) -> Iterator[VolumeEntry]:
    if status is None:
        return
    if status.refusal:
        yield VolumeEntry(VolumeFault.DATA_LOSS, Reason.DATA_NOT_WRITTEN, status.refusal)
    if status.io_enabled is False:
        what = "the client has" if status.holders is None else "its connection carries"
        yield VolumeEntry(VolumeFault.INACCESSIBLE, Reason.IO_DISABLED, f"{what} no I/O: {status.details}")


def _one_per_filesystem(mounts: list[Mount]) -> list[Mount]:
    chosen: dict[DeviceNumber, Mount] = {}
    for mounted in sorted(mounts, key=lambda each: (not each.turned_read_only, each.read_only)):
        if mounted.node_number is None:
            chosen.setdefault(mounted.number, mounted)
    return list(chosen.values())


def _entry(fault: Fault) -> VolumeEntry:
    status, reason = CONDITIONS[fault.kind]
    return VolumeEntry(status, reason, fault.detail)


class MountState(StrEnum):
    """Where a volume is mounted. A raw block volume that is only staged has no mount."""

    STAGED = "staged"
    PUBLISHED = "published"
    ELSEWHERE = "elsewhere"
    """At another path than kubelet's: by another orchestrator or an administrator."""


@dataclass(slots=True, kw_only=True)
class VolumeCounts:
    """Number of volumes on this node by mount state, for the metrics."""

    mounts: Mounts
    read_only_devices: ReadOnlyDevices
    ownership: Ownership
    driver_name: str
    watchdog: Watchdog[Mapping[str, int]] = field(default_factory=lambda: Watchdog("volume-counts"), init=False)

    def volumes(self) -> Mapping[str, int]:
        """Return the number of volumes in each `MountState`; empty if a mount hangs."""
        try:
            return self.watchdog.call("any", "the mount table", self._count, COUNT_TIMEOUT_S)
        except NotResponding:
            return {}

    def _count(self) -> Mapping[str, int]:
        names: dict[MountState, set[str]] = {state: set() for state in MountState}
        over = {reader.number: reader.over for reader in self.read_only_devices.present()}
        for mounted in self.mounts.table():
            path = over.get(mounted.node_number) if mounted.node_number is not None else None
            name = self.ownership.name_at(path) if path is not None else self.ownership.name_of(mounted)
            if name is not None:
                names[self._state_of(mounted)].add(name)
        return {state: len(found) for state, found in names.items()}

    def _state_of(self, mounted: Mount) -> MountState:
        if staging_record(mounted.path, self.driver_name) is not None:
            return MountState.STAGED
        return MountState.PUBLISHED if publication_record(mounted.path) is not None else MountState.ELSEWHERE
