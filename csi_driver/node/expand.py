"""Grow what is used of a volume on this node to the volume's size."""

from __future__ import annotations

from pathlib import Path

from csi_driver.deadline import Deadline
from csi_driver.errors import (
    CapacityOutOfRange,
    DeadlineReached,
    InvalidField,
    PreconditionFailed,
    VolumeNotFound,
    VolumeNotMounted,
)
from csi_driver.host_model import Device, Mount
from csi_driver.model import BlockAccess
from csi_driver.node import NodeExpandRequest
from csi_driver.node.concurrency import HeavyOperations
from csi_driver.node.encryption import EncryptedVolumes
from csi_driver.node.format import GROWTH_SLACK_BYTES
from csi_driver.node.mount_owner import NodeVolume, Owner, Ownership, node_volume, number_of
from csi_driver.node.ports import Filesystems, Mounts, Paths, Probes, ReadOnlyDevices
from csi_driver.node.publish import read_only_device
from csi_driver.settings import NodeSettings

# Clients show a new size within seconds. kubelet asks for sizes that never come, too: that of a static PersistentVolume
# which claims more than its volume has. Until the answer, no pod with the volume can end.
_NEW_SIZE_WAIT_S = 20.0


class Expand:
    """NodeExpandVolume."""

    def __init__(
        self,
        *,
        read_only_devices: ReadOnlyDevices,
        mounts: Mounts,
        filesystems: Filesystems,
        paths: Paths,
        probes: Probes,
        heavy: HeavyOperations,
        ownership: Ownership,
        encrypted: EncryptedVolumes,
        settings: NodeSettings,
    ) -> None:
        self._read_only_devices = read_only_devices
        self._mounts = mounts
        self._filesystems = filesystems
        self._paths = paths
        self._probes = probes
        self._heavy = heavy
        self._ownership = ownership
        self._encrypted = encrypted
        self._settings = settings

    def expand(self, request: NodeExpandRequest, *, deadline: Deadline) -> int:
        """Wait until the device has the size asked for, grow its filesystem to it, and return the size in bytes.

        A header of encryption is not counted where it lies beside what was asked for.
        Raises `VolumeNotMounted` when the volume is not at the path, `CapacityOutOfRange` when it is larger than the
        limit, `PreconditionFailed` when its filesystem cannot grow as it is mounted, `DeadlineReached`.
        """
        volume, _ = node_volume(request.volume_id)
        mounted = self._mount_of(volume, request)
        device = self._device(volume, request.capacity.required_bytes, deadline)
        used = self._encrypted.opened_over(volume, device) or device
        if mounted is not None:
            self._require_same(volume, used, mounted)
        header_bytes = self._encrypted.header_bytes(volume, device) if used.number != device.number else 0
        size_bytes = max(device.size_bytes - header_bytes, request.capacity.required_bytes)
        limit = request.capacity.limit_bytes
        if limit and size_bytes > limit:
            raise CapacityOutOfRange(f"volume {volume}: expected at most {limit} bytes, got {size_bytes}")
        used = self._encrypted.grow(volume, device, used, request.secrets)
        if mounted is not None and mounted.node_number is None:
            self._grow(volume, used, mounted, deadline)
        return size_bytes

    def _mount_of(self, volume: NodeVolume, request: NodeExpandRequest) -> Mount | None:
        """Return the volume's mount, at the staging path if it is there; None for a block volume that has none yet."""
        at_volume_path = self._paths_mount(volume, request.volume_path)
        at_staging = self._paths_mount(volume, request.staging_target_path) if request.staging_target_path else None
        if at_volume_path is not None and at_volume_path.node_number is not None:
            return at_volume_path
        if at_volume_path is not None or at_staging is not None:
            return at_staging or at_volume_path
        is_block = request.capability is not None and isinstance(request.capability.access, BlockAccess)
        if is_block and self._paths.kind(self._path(volume, request.volume_path)) != "absent":
            return None
        raise VolumeNotMounted(volume, request.volume_path)

    def _paths_mount(self, volume: NodeVolume, text: str) -> Mount | None:
        mounted = self._mounts.at(self._path(volume, text))
        if mounted is None or self._ownership.owner_of(mounted, volume) is Owner.OTHER:
            return None
        return mounted

    def _path(self, volume: NodeVolume, text: str) -> Path:
        return known_path(self._paths, volume, text)

    def _device(self, volume: NodeVolume, required_bytes: int, deadline: Deadline) -> Device:
        """Wait a while until the device has `required_bytes`; clients announce no new size."""
        in_time = deadline.earlier(self._settings.answer_margin_s).at_most(_NEW_SIZE_WAIT_S)
        found: list[Device] = []

        def is_large_enough() -> bool:
            found.clear()
            device = self._ownership.device_of(volume)
            if device is not None:
                found.append(device)
            return device is not None and device.size_bytes >= required_bytes

        if not in_time.wait_until(is_large_enough):
            have = f"has {found[0].size_bytes} bytes" if found else "is not there"
            raise DeadlineReached(f"the device of volume {volume} to have {required_bytes} bytes, it {have}")
        return found[0]

    def _require_same(self, volume: NodeVolume, device: Device, mounted: Mount) -> None:
        """Refuse to call a device grown that is not the one in use; a read-only one over it grows with it."""
        number = number_of(mounted)
        if mounted.node_number is not None and number != device.number:
            reader = read_only_device(self._read_only_devices, volume, device, mounted.path)
            if reader.number == number:
                return
            self._read_only_devices.release(reader.number)
        if not self._ownership.is_live(mounted, device):
            raise PreconditionFailed(
                f"{mounted.path}: expected volume {volume} on device {device.number}, got "
                f"{self._ownership.describe(mounted)}; unstage it and stage it again"
            )

    def _grow(self, volume: NodeVolume, device: Device, mounted: Mount, deadline: Deadline) -> None:
        if self._filesystems.recorded_bytes(device, mounted.fs_type) + GROWTH_SLACK_BYTES >= device.size_bytes:
            return
        dead = self._probes.dead(mounted)
        if dead is not None:
            raise PreconditionFailed(f"volume {volume} cannot be expanded: {dead.detail}")
        writable = mounted if not mounted.read_only else self._writable(volume, device)
        with self._heavy.place(f"grow the {mounted.fs_type} of volume {volume}", deadline=deadline):
            self._filesystems.grow_mounted(writable.path, device, mounted.fs_type)

    def _writable(self, volume: NodeVolume, device: Device) -> Mount:
        """Return where the filesystem is mounted writable: a read-only publication is no place to grow it from."""
        for found in self._mounts.of_device(device):
            if found.node_number is None and not found.read_only and self._ownership.is_live(found, device):
                return found
        raise PreconditionFailed(
            f"volume {volume} is mounted read-only; its filesystem grows when it is staged writable"
        )


def known_path(paths: Paths, volume: NodeVolume, text: str) -> Path:
    """Return a volume path to look at. One that cannot be ours, such as a relative one, holds no volume of ours."""
    try:
        return paths.check(text, "volume_path", takes_off=True)
    except InvalidField as error:
        raise VolumeNotFound(volume.volume_id, str(error)) from error
