# SPDX-License-Identifier: Apache-2.0
"""The volume that a request names, its device on this machine, and the mounts that belong to it.

Volume IDs name volumes, the kernel shows device numbers. A number is reused when its device goes away, and a mount
outlives its device, so no other module decides by number or path alone to which volume a mount belongs.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass, replace
from enum import Enum
from pathlib import Path, PurePosixPath

from csi_driver.errors import InvalidField, PreconditionFailed, VolumeNotFound
from csi_driver.host_model import Device, DeviceNumber, LuksMapping, Mount, VolumeStatus
from csi_driver.model import EMPTY, VolumeHandle
from csi_driver.node.ports import Devices, Encryption, Mounts
from csi_driver.publish_context import PublishContext, held_reference
from csi_driver.reporting import SILENT, EventReason, Reporter, Subject

logger = logging.getLogger(__name__)


NO_CONTEXT = PublishContext("", "")


@dataclass(frozen=True, slots=True)
class NodeVolume:
    """A volume as a request names it; without context it is NO_CONTEXT."""

    volume_id: str
    name: str
    uuid: str | None
    context: PublishContext = NO_CONTEXT

    @classmethod
    def parse(cls, volume_id: str) -> NodeVolume | None:
        """Read a volume ID; None if it is none of this driver."""
        handle = VolumeHandle.parse(volume_id)
        return None if handle is None else cls(volume_id, handle.name, handle.uuid)

    @classmethod
    def of_request(cls, volume_id: str, publish_context: Mapping[str, str] = EMPTY) -> NodeVolume:
        """Read a volume ID and its context. Raises `VolumeNotFound`, `PreconditionFailed`."""
        volume = cls.parse(volume_id)
        if volume is None:
            raise VolumeNotFound(volume_id)
        context = PublishContext.from_map(publish_context)
        if context is None:
            return volume
        if context.name != volume.name:
            raise PreconditionFailed(f"publish_context: expected volume {volume.name} (volume_id), got {context.name}")
        if volume.uuid is not None and volume.uuid != context.uuid:
            raise VolumeNotFound(volume_id, f"the volume of this name that is attached has the uuid {context.uuid}")
        return replace(volume, uuid=context.uuid, context=context)

    @property
    def given_context(self) -> PublishContext | None:
        return None if self.context == NO_CONTEXT else self.context

    def __str__(self) -> str:
        return self.name


@dataclass(frozen=True, slots=True)
class VolumeDevice:
    """A volume with its own or opened device. `is_shared`: other nodes may write to it."""

    volume: NodeVolume
    device: Device
    read_only: bool
    is_shared: bool = False

    @property
    def uuid(self) -> str | None:
        """The volume's UUID; None where neither its ID nor its device has it."""
        return self.volume.uuid or self.device.uuid

    @property
    def takes_no_writes(self) -> bool:
        """Whether nothing may be written to the device; to a private copy a read-only mount writes the log."""
        return self.read_only and not self.volume.context.private_copy


class AttachmentState(Enum):
    """Whether a volume is attached to this node: by the client's status files, or by the kernel's own connections."""

    ATTACHED = "attached"
    WITHDRAWN = "detached, but its device may carry I/O"
    """Others on this node use the device, or it was detached while in use."""
    FENCED = "taken over by another node, or detached by force"
    UNKNOWN = "not known"
    """The client starts, is upgraded, or writes its files: no reason to act."""


def attachment_state(devices: Devices, handle: VolumeHandle, uuid: str) -> AttachmentState:
    """Return the state of the staged volume `uuid` under the reference ID of the handle."""
    connection = devices.connection(handle.name)
    if connection is not None:
        return _connection_state(connection, uuid)
    if not _is_conclusive(devices):
        return AttachmentState.UNKNOWN
    status, references = devices.status(handle.name), devices.reference_ids(handle.name)
    if status is None:
        # The client runs and shows its volumes. This one has neither status files nor a device.
        is_gone = references is None and devices.find(handle.name, uuid) is None
        return AttachmentState.FENCED if is_gone else AttachmentState.UNKNOWN
    if status.uuid != uuid.lower():
        return AttachmentState.WITHDRAWN  # another volume has the name; nothing tells about the staged one's device
    if status.preempted:
        return AttachmentState.FENCED  # although its references are still shown, while its device is open
    if references is None:
        return AttachmentState.UNKNOWN
    if held_reference(handle, uuid.lower()) in references:
        return AttachmentState.ATTACHED
    return AttachmentState.FENCED if status.io_enabled is False else AttachmentState.WITHDRAWN


def _connection_state(connection: VolumeStatus, uuid: str) -> AttachmentState:
    """Return the state of a volume that this node connected. Without a path it is still attached, and waits."""
    if connection.uuid != uuid.lower():
        return AttachmentState.WITHDRAWN
    return AttachmentState.FENCED if connection.preempted else AttachmentState.ATTACHED


def is_cut_off(devices: Devices, name: str) -> bool:
    """Return whether a volume was preempted or lost I/O and references. Check it twice."""
    connection = devices.connection(name)
    if connection is not None:
        return connection.preempted
    if not _is_conclusive(devices):
        return False
    status = devices.status(name)
    if status is None or status.io_enabled is not False:
        return False
    return status.preempted or devices.reference_ids(name) == ()


def _is_conclusive(devices: Devices) -> bool:
    client = devices.client()
    return client.uuid is not None and not client.is_upgrading and not client.problem


class Owner(Enum):
    """To which device a mount belongs."""

    OURS = "the volume's device"
    DEAD = "a device that is gone"
    OTHER = "another device"


@dataclass(slots=True, kw_only=True)
class Ownership:
    """Finds the owner of a mount from the present state of the kernel; keeps no state."""

    devices: Devices
    encryption: Encryption
    mounts: Mounts
    reporter: Reporter = SILENT

    def device_of(self, volume: NodeVolume) -> Device | None:
        """Return the volume's device as it is now; None if absent or another volume's."""
        device = self.devices.find(volume.name, volume.uuid)
        return device if device is not None and is_same(device.uuid, volume.uuid) else None

    def owner_of(self, mounted: Mount, volume: NodeVolume) -> Owner:
        """Return the owner of a mount; the device's UUID outranks the name of the source.

        A bound node is the volume's by its path alone: a bind mount keeps no device, so its number may be reused.
        """
        number = number_of(mounted)
        if mounted.node_number is not None and self._was_made_from(mounted, volume):
            return Owner.OURS
        if self.was_made_from_another(mounted, volume):
            return Owner.DEAD if self.is_gone(number) else Owner.OTHER
        device = self.devices.find(volume.name, volume.uuid)
        if device is not None and self._is_number_of(device, number):
            if mounted.node_number is None and self.devices.is_claimed(device) is False:
                return Owner.DEAD
            return Owner.OURS if is_same(device.uuid, volume.uuid) else Owner.OTHER
        claimed = self.devices.uuid_of(number)
        if claimed is not None and is_same(claimed, volume.uuid) and volume.uuid is not None:
            return Owner.OURS
        if self.is_gone(number) or self.is_left_behind(mounted, volume.name):
            return Owner.DEAD
        if (claimed is not None and volume.uuid is not None) or not self._was_made_from(mounted, volume):
            return Owner.OTHER
        mapping = self._mapping(volume.name, mounted)
        return Owner.DEAD if mapping is not None and mapping.below is None else Owner.OURS

    def is_left_behind(self, mounted: Mount, name: str) -> bool:
        """Return whether the device went away and another device has its number now."""
        if mounted.node_number is not None or mounted.source != str(self.devices.path_of(name)):
            return False
        device = self.devices.find(name)
        if device is not None and device.number == mounted.number:
            return self.devices.is_claimed(device) is False
        return self.devices.name_of(mounted.number) not in (None, name)

    def is_live(self, mounted: Mount, device: Device) -> bool:
        """Return whether a mount is of the present device, or not known: a live one claims it."""
        if mounted.node_number is None and self.devices.is_claimed(device) is False:
            return False
        return mounted.can_be_of(device)

    def at(self, path: Path, volume: NodeVolume) -> Mount | None:
        """Return the mount at a path, after unmounting dead ones of a volume that is back."""
        while (mounted := self.mounts.at(path)) is not None and self._is_superseded(mounted, volume):
            logger.warning("volume %s: %s at %s is unmounted", volume, self.describe(mounted), path)
            self.unmount_one(mounted, path, volume)
        return mounted

    def _is_superseded(self, mounted: Mount, volume: NodeVolume) -> bool:
        is_its_filesystem = mounted.node_number is None and self._was_made_from(mounted, volume)
        is_dead = is_its_filesystem and self.owner_of(mounted, volume) is Owner.DEAD
        return is_dead and self.device_of(volume) is not None

    def unmount(self, path: Path, volume: NodeVolume) -> bool:
        """Unmount all mounts at `path` that are the volume's or dead; False for another one."""
        while (mounted := self.mounts.at(path)) is not None:
            if not self.unmount_one(mounted, path, volume):
                return False
        return True

    def unmount_one(self, mounted: Mount, path: Path, volume: NodeVolume) -> bool:
        """Unmount the topmost mount if it is the volume's or dead; `PreconditionFailed` if busy."""
        owner = self.owner_of(mounted, volume)
        if owner is Owner.OTHER:
            return False
        # A busy mount of the volume is detached lazily only if the volume is fenced before and after a second attempt.
        for _ in range(2 if owner is Owner.OURS else 1):
            try:
                self.mounts.unmount(path)
            except PreconditionFailed:
                if owner is Owner.OURS and not self._is_fenced(volume):
                    raise
            else:
                return True
        if owner is Owner.OURS:
            note = f"volume {volume} was taken from this node and is busy at {path}: detached lazily"
            self.reporter.report(Subject(volume_id=volume.volume_id), EventReason.MOUNT_LOST, note)
            logger.warning("%s", note)
        self.mounts.unmount(path, lost=number_of(mounted))
        return True

    def is_lost(self, volume: NodeVolume) -> bool:
        """Return whether the volume was taken from this node: no pending write reaches it."""
        return self._is_fenced(volume) or is_cut_off(self.devices, volume.name)

    def _is_fenced(self, volume: NodeVolume) -> bool:
        handle = VolumeHandle.parse(volume.volume_id)
        if handle is None or volume.uuid is None:
            return handle is not None and is_cut_off(self.devices, volume.name)
        return attachment_state(self.devices, handle, volume.uuid) is AttachmentState.FENCED

    def describe(self, mounted: Mount) -> str:
        """Describe a mount for a message."""
        number = number_of(mounted)
        gone = "" if self.devices.size_bytes(number) else ", which is gone"
        return f"{mounted.fs_type} of {mounted.source} (device {number}{gone})"

    def held_by_another(self, path: str, volume: NodeVolume, mounted: Mount) -> PreconditionFailed:
        """Return the error for a path with a mount of another volume."""
        return PreconditionFailed(f"{path}: expected volume {volume}, got {self.describe(mounted)}")

    def name_of(self, mounted: Mount) -> str | None:
        """Return the volume of a mount by its source; its opened device must lie over its own."""
        source = PurePosixPath(mounted.source if mounted.node_number is None else mounted.root_path)
        name = source.name
        try:
            if not self._was_made_from(mounted, NodeVolume(name, name, None)):
                return None
        except InvalidField:
            return None
        if source.parts[-2:] == self.devices.path_of(name).parts[-2:]:
            return name
        mapping = self._mapping(name, mounted)
        device = self.devices.find(name)
        is_ours = mapping is not None and (mapping.below is None or (device and device.number == mapping.below))
        return name if is_ours else None

    def name_at(self, path: Path) -> str | None:
        """Return the name of the volume with that device path; None without one."""
        try:
            paths = (self.devices.path_of(path.name), self.encryption.path_of(path.name))
            return path.name if path in paths else None
        except InvalidField:
            return None

    def is_dead(self, mounted: Mount, name: str) -> bool:
        """Return whether nothing written through a mount can reach the volume."""
        number = number_of(mounted)
        if self.is_gone(number):
            return True
        mapping = self._mapping(name, mounted)
        if (mapping is not None and mapping.below is None) or self.is_left_behind(mounted, name):
            return True
        device = self.devices.find(name)
        if device is not None and self._is_number_of(device, number) and self.devices.is_claimed(device) is False:
            return mounted.node_number is None
        return self.is_cut_off(name, number if mapping is None else mapping.below)

    def is_cut_off(self, name: str, number: DeviceNumber | None) -> bool:
        """Return whether the volume's device, which has that number, was taken from this node."""
        if not is_cut_off(self.devices, name):
            return False
        device = self.devices.find(name)
        return device is not None and device.number == number

    def is_gone(self, number: DeviceNumber) -> bool:
        """Return whether a block device does not exist any more."""
        # Major number 0 is no block device (Documentation/admin-guide/devices.txt): tmpfs, overlay and the like.
        return bool(number.major) and not self.devices.size_bytes(number)

    def _is_number_of(self, device: Device, number: DeviceNumber) -> bool:
        """Return whether a number is the device's, or that of the encrypted device over it."""
        return device.number == number or device.number == self.encryption.below(number)

    def _mapping(self, name: str, mounted: Mount) -> LuksMapping | None:
        mapping = self.encryption.mapping(name)
        is_it = mapping is not None and mapping.is_encryption and mapping.number == number_of(mounted)
        return mapping if is_it else None

    def _was_made_from(self, mounted: Mount, volume: NodeVolume) -> bool:
        paths = (self.devices.path_of(volume.name), self.encryption.path_of(volume.name))
        if mounted.node_number is None:
            return mounted.source in map(str, paths)
        return mounted.root_path.parts[-2:] in [path.parts[-2:] for path in paths]

    def was_made_from_another(self, mounted: Mount, volume: NodeVolume) -> bool:
        """Return whether a mount was made from the device node of another volume."""
        source = PurePosixPath(mounted.source)
        is_beside = str(source.parent) == str(self.devices.path_of(volume.name).parent)
        return mounted.node_number is None and is_beside and source.name != volume.name


def number_of(mounted: Mount) -> DeviceNumber:
    """Return the device of a mount: the bound node's, otherwise the filesystem's."""
    return mounted.number if mounted.node_number is None else mounted.node_number


def is_same(claimed: str | None, wanted: str | None) -> bool:
    """Return whether two UUIDs may be of one volume; an unknown one contradicts nothing."""
    return claimed is None or wanted is None or claimed.lower() == wanted.lower()
