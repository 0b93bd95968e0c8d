# SPDX-License-Identifier: Apache-2.0
"""NodeExpandVolume: grow the opened device and the filesystem to the size of the device."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from csi_driver.deadline import Deadline
from csi_driver.errors import (
    CapacityOutOfRange,
    DeadlineReached,
    GrowsAtNextMount,
    InvalidField,
    MissingField,
    NotFound,
    PreconditionFailed,
    VolumeNotFound,
)
from csi_driver.host_model import Device, Mount
from csi_driver.model import BlockAccess
from csi_driver.node import NodeExpandRequest
from csi_driver.node.concurrency import HeavyOperations
from csi_driver.node.encryption import EncryptedVolumes
from csi_driver.node.format import Preparation
from csi_driver.node.mount_owner import NodeVolume, Owner, Ownership, number_of
from csi_driver.node.ports import Filesystems, Mounts, Paths, Probes, ReadOnlyDevices
from csi_driver.node.publish import read_only_device
from csi_driver.node_settings import NodeSettings
from csi_driver.reporting import SILENT, EventReason, Reporter, Subject

# A client shows a new size within seconds. kubelet also asks for sizes that never come: that of a static
# PersistentVolume which claims more than its volume has. Until the answer no pod with the volume can end.
_NEW_SIZE_TIMEOUT_S = 20.0


@dataclass(slots=True, kw_only=True)
class Expand:
    """Expands volumes that are mounted or published on this node."""

    read_only_devices: ReadOnlyDevices
    mounts: Mounts
    filesystems: Filesystems
    paths: Paths
    probes: Probes
    heavy: HeavyOperations
    ownership: Ownership
    preparation: Preparation
    encrypted: EncryptedVolumes
    settings: NodeSettings
    reporter: Reporter = SILENT

    def expand(self, request: NodeExpandRequest, *, deadline: Deadline) -> int:
        """Wait for the new size of the device, grow to it, and return the size without header."""
        try:
            return self._expand(request, deadline)
        except (GrowsAtNextMount, MissingField) as reason:  # MissingField: the passphrase of an encrypted volume
            subject = Subject(volume_id=request.volume_id)
            self.reporter.report(subject, EventReason.GROWS_AT_NEXT_MOUNT, str(reason))
            raise

    def _expand(self, request: NodeExpandRequest, deadline: Deadline) -> int:
        volume = NodeVolume.of_request(request.volume_id)
        mounted = self._mount_of(volume, request)
        device = self._grown_device(volume, request.capacity.required_bytes, deadline)
        used = self.encrypted.opened_over(volume, device) or device
        if mounted is not None:
            self._require_same(volume, used, mounted)
        header_bytes = self.encrypted.header_bytes(volume, device) if used.number != device.number else 0
        size_bytes = max(device.size_bytes - header_bytes, request.capacity.required_bytes)
        limit = request.capacity.limit_bytes
        if limit and size_bytes > limit:
            raise CapacityOutOfRange(f"volume {volume}: expected at most {limit} bytes, got {size_bytes}")
        used = self.encrypted.grow(volume, device, used, request.secrets)
        if mounted is not None and mounted.node_number is None:
            self._grow_filesystem(volume, used, mounted, deadline)
        return size_bytes

    def _mount_of(self, volume: NodeVolume, request: NodeExpandRequest) -> Mount | None:
        """Return the volume's mount, preferably the staged one; None for unpublished raw block."""
        at_volume_path = self.own_mount(volume, request.volume_path)
        at_staging = self.own_mount(volume, request.staging_target_path) if request.staging_target_path else None
        if at_volume_path is not None and at_volume_path.node_number is not None:
            return at_volume_path
        if at_volume_path is not None or at_staging is not None:
            return at_staging or at_volume_path
        is_block = request.capability is not None and isinstance(request.capability.access, BlockAccess)
        if is_block and self.paths.kind(known_path(self.paths, volume, request.volume_path)) != "absent":
            return None
        raise NotFound(f"volume {volume} is not mounted at {request.volume_path}")

    def own_mount(self, volume: NodeVolume, path: str) -> Mount | None:
        """Return the mount at a path if it is the volume's."""
        mounted = self.mounts.at(known_path(self.paths, volume, path))
        if mounted is None or self.ownership.owner_of(mounted, volume) is Owner.OTHER:
            return None
        return mounted

    def _grown_device(self, volume: NodeVolume, required_bytes: int, deadline: Deadline) -> Device:
        in_time = deadline.earlier(self.settings.answer_margin_s).at_most(_NEW_SIZE_TIMEOUT_S)
        found: list[Device] = []

        def is_large_enough() -> bool:
            found.clear()
            device = self.ownership.device_of(volume)
            if device is not None:
                found.append(device)
            return device is not None and device.size_bytes >= required_bytes

        if not in_time.wait_until(is_large_enough):
            have = f"has {found[0].size_bytes} bytes" if found else "is not there"
            raise DeadlineReached(f"the device of volume {volume} to have {required_bytes} bytes, it {have}")
        return found[0]

    def _require_same(self, volume: NodeVolume, device: Device, mounted: Mount) -> None:
        """Refuse a mount of another device than the grown one, or than a reader over it."""
        number = number_of(mounted)
        if mounted.node_number is not None and number != device.number:
            reader = read_only_device(self.read_only_devices, volume, device, mounted.path)
            if reader.number == number:
                return
            self.read_only_devices.release(reader.number)
        if not self.ownership.is_live(mounted, device):
            held = self.ownership.held_by_another(str(mounted.path), volume, mounted)
            raise PreconditionFailed(f"{held}; unstage it and stage it again")

    def _grow_filesystem(self, volume: NodeVolume, device: Device, mounted: Mount, deadline: Deadline) -> None:
        if not self.preparation.is_too_small(device, mounted.fs_type):
            return
        dead = self.probes.dead(mounted)
        if dead is not None:
            raise PreconditionFailed(f"volume {volume} cannot be expanded: {dead.detail}")
        writable = mounted if not mounted.read_only else self._writable_mount(volume, device)
        with self.heavy.slot(f"grow the {mounted.fs_type} of volume {volume}", deadline=deadline):
            self.filesystems.grow_mounted(writable.path, device, mounted.fs_type)

    def _writable_mount(self, volume: NodeVolume, device: Device) -> Mount:
        for found in self.mounts.of_device(device):
            if found.node_number is None and not found.read_only and self.ownership.is_live(found, device):
                return found
        raise GrowsAtNextMount(f"volume {volume} is mounted read-only; it grows when it is staged writable")


def known_path(paths: Paths, volume: NodeVolume, path: str) -> Path:
    """Check a volume path; an invalid one has no volume: raises `VolumeNotFound`."""
    try:
        return paths.check(path, "volume_path", takes_off=True)
    except InvalidField as error:
        raise VolumeNotFound(volume.volume_id, str(error)) from error
