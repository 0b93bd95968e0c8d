"""Use of a volume, answered in time whatever hangs (kubelet waits for it with everything else it measures)."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from enum import StrEnum
from pathlib import Path
from types import MappingProxyType

from csi_driver.deadline import Deadline
from csi_driver.errors import PreconditionFailed, StorageUnavailable, VolumeNotFound, VolumeNotMounted
from csi_driver.host_model import Device, DeviceNumber, Fault, FaultKind, Mount, VolumeStatus
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
from csi_driver.node.mount_owner import (
    NodeVolume,
    Owner,
    Ownership,
    is_same,
    node_volume,
    number_of,
    publication_record,
    staging_record,
)
from csi_driver.node.ports import Devices, Encryption, Filesystems, Mounts, Paths, Probes, ReadOnlyDevices, Tools
from csi_driver.settings import NodeSettings


class Statistics:
    """NodeGetVolumeStats."""

    def __init__(
        self,
        *,
        devices: Devices,
        mounts: Mounts,
        filesystems: Filesystems,
        paths: Paths,
        probes: Probes,
        ownership: Ownership,
        settings: NodeSettings,
    ) -> None:
        self._devices = devices
        self._mounts = mounts
        self._filesystems = filesystems
        self._paths = paths
        self._probes = probes
        self._ownership = ownership
        self._timeout_s = settings.statistics_timeout_s
        self._margin_s = settings.answer_margin_s
        self._questions: Watchdog[Usage] = Watchdog("volume-statistics")

    def usage(self, volume_id: str, volume_path: str, staging_target_path: str, *, deadline: Deadline) -> Usage:
        """Return the use of the volume at `volume_path`. A block volume has only its size.

        Raises `VolumeNotMounted`, `PreconditionFailed` when its filesystem was shut down, `StorageUnavailable` when its
        filesystem or device does not answer: after the settings' time the first time, at once while that question is
        still open.
        """
        volume, _ = node_volume(volume_id)
        path = known_path(self._paths, volume, volume_path)

        def ask() -> Usage:
            mounted = self._mounts.at(path)
            owner = Owner.OTHER if mounted is None else self._ownership.owner_of(mounted, volume)
            if mounted is None or owner is Owner.OTHER:
                raise VolumeNotMounted(volume, path)
            number = number_of(mounted)
            size = self._devices.size_bytes(number) if number.major else None
            if owner is Owner.DEAD or (number.major and not size):
                raise StorageUnavailable(f"the device {number} of volume {volume} at {path} is gone")
            if mounted.node_number is not None and size:
                return Usage(total_bytes=size)
            dead = self._probes.dead(mounted)
            if dead is not None and dead.kind is FaultKind.SHUT_DOWN:
                raise PreconditionFailed(f"volume {volume} at {path} has no statistics: {dead.detail}")
            return self._filesystems.usage(path)

        timeout_s = min(self._timeout_s, max(0.0, deadline.remaining_s() - self._margin_s))
        return self._questions.ask(volume.name, str(path), ask, timeout_s)


_MEANING: Mapping[FaultKind, tuple[VolumeFault, Reason]] = MappingProxyType(
    {
        FaultKind.DEVICE_READ_ONLY: (VolumeFault.DEGRADED, Reason.DEVICE_READ_ONLY),
        FaultKind.BACKING_FILE_GONE: (VolumeFault.DEGRADED, Reason.BACKING_FILE_GONE),
        FaultKind.BACKING_FILE_CUT_SHORT: (VolumeFault.DATA_LOSS, Reason.BACKING_FILE_CUT_SHORT),
        FaultKind.SHUT_DOWN: (VolumeFault.INACCESSIBLE, Reason.FILESYSTEM_SHUT_DOWN),
        FaultKind.TURNED_READ_ONLY: (VolumeFault.DEGRADED, Reason.FILESYSTEM_READ_ONLY),
        FaultKind.ERRORS: (VolumeFault.DEGRADED, Reason.FILESYSTEM_ERRORS),
        FaultKind.IO_ERROR: (VolumeFault.INACCESSIBLE, Reason.IO_ERROR),
    }
)


class NodeHealth:
    """NodeGetVolumeHealth and NodeGetStorageHealth."""

    def __init__(
        self,
        *,
        devices: Devices,
        encryption: Encryption,
        mounts: Mounts,
        filesystems: Filesystems,
        paths: Paths,
        probes: Probes,
        tools: Tools,
        ownership: Ownership,
        settings: NodeSettings,
    ) -> None:
        self._devices = devices
        self._encryption = encryption
        self._mounts = mounts
        self._filesystems = filesystems
        self._paths = paths
        self._probes = probes
        self._tools = tools
        self._ownership = ownership
        self._timeout_s = settings.statistics_timeout_s
        self._margin_s = settings.answer_margin_s
        self._questions: Watchdog[list[VolumeEntry]] = Watchdog("volume-health")

    def volume(
        self, volume_id: str, volume_publish_path: str, staging_target_path: str, *, deadline: Deadline
    ) -> VolumeHealth:
        """Tell what is wrong with a volume here, looking at the paths that are given, else at every mount of it.

        A filesystem or device that does not answer in time is an entry. Raises `VolumeNotFound` when nothing of the
        volume is on this node.
        """
        volume, _ = node_volume(volume_id)
        texts = [text for text in (volume_publish_path, staging_target_path) if text]
        paths = [known_path(self._paths, volume, text) for text in texts]
        told = list(_told(self._status_of(volume)))
        timeout_s = min(self._timeout_s, max(0.0, deadline.remaining_s() - self._margin_s))
        about = " and ".join(map(str, paths)) or "its device"
        try:
            seen = self._questions.ask(volume.name, about, lambda: self._seen(volume, paths), timeout_s)
        except NotResponding as silence:
            seen = [VolumeEntry(VolumeFault.INACCESSIBLE, Reason.NOT_RESPONDING, str(silence))]
        return VolumeHealth(volume_id, each_once(told + seen))

    def storage(self) -> tuple[StorageEntry, ...]:
        """Tell what is wrong with this node's way to the storage; touches no device."""
        return tuple(self._storage())

    def why_unusable(self) -> str:
        """Say why no volume can be used on this node now; empty = they can."""
        return "; ".join(entry.message for entry in self._storage())

    # --- the volume ---

    def _status_of(self, volume: NodeVolume) -> VolumeStatus | None:
        status = self._devices.status(volume.name)
        return status if status is not None and is_same(status.uuid, volume.uuid) else None

    def _seen(self, volume: NodeVolume, paths: list[Path]) -> list[VolumeEntry]:
        """Look at the volume's mounts and devices. May hang."""
        mounts = self._mounts_at(volume, paths)
        devices = self._devices_of(volume)
        if not mounts:
            mounts = [mounted for device in devices for mounted in self._mounts.of_device(device)]
        if not mounts and not devices:
            if self._status_of(volume) is None:
                raise VolumeNotFound(volume.volume_id, "nothing of it is on this node")
            return [VolumeEntry(VolumeFault.INACCESSIBLE, Reason.DEVICE_GONE, f"the device of {volume} is not there")]
        numbers = dict.fromkeys((*map(number_of, mounts), *(device.number for device in devices)))
        return [entry for number in numbers for entry in self._judge_device(number, mounts)] + [
            entry for mounted in _one_of_each(mounts) for entry in self._judge_filesystem(mounted)
        ]

    def _devices_of(self, volume: NodeVolume) -> list[Device]:
        """Return the volume's device as it is now, and the encrypted one opened over it."""
        device = self._ownership.device_of(volume)
        if device is None:
            return []
        mapping = self._encryption.mapping(volume.name)
        if mapping is None or mapping.below != device.number:
            return [device]
        return [device, replace(device, path=self._encryption.path_of(volume.name), number=mapping.number)]

    def _mounts_at(self, volume: NodeVolume, paths: list[Path]) -> list[Mount]:
        found = (self._mounts.at(path) for path in paths)
        return [
            mounted
            for mounted in found
            if mounted is not None and self._ownership.owner_of(mounted, volume) is not Owner.OTHER
        ]

    def _judge_device(self, number: DeviceNumber, mounts: list[Mount]) -> Iterator[VolumeEntry]:
        if not number.major:
            return
        if not self._devices.size_bytes(number):
            yield VolumeEntry(VolumeFault.INACCESSIBLE, Reason.DEVICE_GONE, f"device {number} is gone")
            return
        is_written = any(number_of(mounted) == number and not mounted.read_only for mounted in mounts)
        for fault in self._probes.device(number):
            if is_written or fault.kind is not FaultKind.DEVICE_READ_ONLY:
                yield _entry(fault)

    def _judge_filesystem(self, mounted: Mount) -> Iterator[VolumeEntry]:
        faults = self._probes.filesystem(mounted)
        yield from map(_entry, faults)
        if any(fault.kind in (FaultKind.SHUT_DOWN, FaultKind.IO_ERROR) for fault in faults):
            return
        usage = self._filesystems.usage(mounted.path)
        if usage.available_bytes == 0:
            yield VolumeEntry(
                VolumeFault.DEGRADED, Reason.FILESYSTEM_FULL, f"no byte of {usage.total_bytes} is available"
            )
        if usage.total_inodes and usage.available_inodes == 0:
            yield VolumeEntry(
                VolumeFault.DEGRADED, Reason.INODES_EXHAUSTED, f"no inode of {usage.total_inodes} is available"
            )

    # --- the storage ---

    def _storage(self) -> Iterator[StorageEntry]:
        unreachable, client = StorageFault.STORAGE_UNREACHABLE, self._devices.client()
        if client.problem:
            yield StorageEntry(unreachable, Reason.CLIENT_UNUSABLE, f"the storage client is unusable: {client.problem}")
        if client.uuid is None:
            yield _absence(is_expected=client.is_expected, is_upgrading=client.is_upgrading)
        problems = "; ".join(self._tools.problems())
        if problems:
            yield StorageEntry(StorageFault.STORAGE_DEGRADED, Reason.NODE_NOT_EQUIPPED, problems)


def _absence(*, is_expected: bool, is_upgrading: bool) -> StorageEntry:
    if is_upgrading:
        return StorageEntry(
            StorageFault.STORAGE_DEGRADED,
            Reason.CLIENT_UPGRADING,
            "the storage client is being upgraded, or starts; volumes in use stay",
        )
    if is_expected:
        return StorageEntry(
            StorageFault.STORAGE_UNREACHABLE,
            Reason.CLIENT_NOT_RUNNING,
            "the storage client is not running (no status files)",
        )
    return StorageEntry(StorageFault.STORAGE_UNREACHABLE, Reason.CLIENT_ABSENT, "this node has no storage client")


def _told(status: VolumeStatus | None) -> Iterator[VolumeEntry]:
    """Turn what the client says of the volume into entries."""
    if status is None:
        return
    if status.refusal:
        yield VolumeEntry(VolumeFault.DATA_LOSS, Reason.DATA_NOT_WRITTEN, status.refusal)
    if status.io_enabled is False:
        yield VolumeEntry(
            VolumeFault.INACCESSIBLE, Reason.IO_DISABLED, f"the client carries no I/O for it: {status.details}"
        )


def _one_of_each(mounts: list[Mount]) -> list[Mount]:
    """Choose one mount of each filesystem, one that was meant to be writable where there is one."""
    chosen: dict[DeviceNumber, Mount] = {}
    for mounted in sorted(mounts, key=lambda each: (not each.turned_read_only, each.read_only)):
        if mounted.node_number is None:
            chosen.setdefault(mounted.number, mounted)
    return list(chosen.values())


def _entry(fault: Fault) -> VolumeEntry:
    status, reason = _MEANING[fault.kind]
    return VolumeEntry(status, reason, fault.detail)


LOOK_LIMIT_S = 5.0


class State(StrEnum):
    """Where a volume is mounted. A raw block volume is mounted nowhere while it is only staged."""

    STAGED = "staged"
    PUBLISHED = "published"
    ELSEWHERE = "elsewhere"
    """Not where kubelet has its volumes: another orchestrator's, or an administrator's."""


class VolumeCounts:
    """Counts volumes by the mount table, in a thread that can be lost to a mount that hangs."""

    def __init__(
        self, mounts: Mounts, read_only_devices: ReadOnlyDevices, ownership: Ownership, *, driver_name: str
    ) -> None:
        self._mounts = mounts
        self._read_only_devices = read_only_devices
        self._ownership = ownership
        self._driver_name = driver_name
        self._looks: Watchdog[Mapping[str, int]] = Watchdog("census")

    def volumes(self) -> Mapping[str, int]:
        """Return the number of volumes in each `State`; empty where a mount does not let itself be looked at."""
        try:
            return self._looks.ask("any", "a look", self._count, LOOK_LIMIT_S)
        except NotResponding:
            return {}

    def _count(self) -> Mapping[str, int]:
        names: dict[State, set[str]] = {state: set() for state in State}
        over = {reader.number: reader.over for reader in self._read_only_devices.present()}
        for mounted in self._mounts.table():
            path = over.get(mounted.node_number) if mounted.node_number is not None else None
            name = self._ownership.name_at(path) if path is not None else self._ownership.name_of(mounted)
            if name is not None:
                names[self._state_of(mounted)].add(name)
        return {state: len(found) for state, found in names.items()}

    def _state_of(self, mounted: Mount) -> State:
        if staging_record(mounted.path, self._driver_name) is not None:
            return State.STAGED
        return State.PUBLISHED if publication_record(mounted.path) is not None else State.ELSEWHERE
