"""Whose is it: the volume that a request names, its device on this machine, and the mounts that belong to it.

A volume id names a volume, the kernel shows device numbers; everything in between is here, so that no use-case
compares paths or takes a device for another one's.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass
from enum import Enum
from pathlib import Path, PurePosixPath
from typing import Protocol

from csi_driver.errors import InvalidField, PreconditionFailed, VolumeNotFound
from csi_driver.host_model import Device, DeviceNumber, LuksMapping, Mount, StorageClient, VolumeStatus
from csi_driver.model import EMPTY, VolumeHandle
from csi_driver.node.ports import Devices, Encryption, Mounts
from csi_driver.publish_context import PublishContext, held_reference

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class NodeVolume:
    """The volume a request is about. `uuid` is None where neither id nor publish context tells it."""

    volume_id: str
    name: str
    uuid: str | None

    def __str__(self) -> str:
        return self.name


class Owner(Enum):
    """Whose a mount is."""

    OURS = "of this volume"
    DEAD = "of a device that is gone"
    OTHER = "of something else"


def node_volume(volume_id: str, publish_context: Mapping[str, str] = EMPTY) -> tuple[NodeVolume, PublishContext | None]:
    """Read which volume is meant. Raises `VolumeNotFound` for an id of no form of ours or of a volume that is gone."""
    handle = VolumeHandle.parse(volume_id)
    if handle is None:
        raise VolumeNotFound(volume_id)
    context = PublishContext.from_map(publish_context)
    if context is None:
        return NodeVolume(volume_id, handle.name, handle.uuid), None
    if context.name != handle.name:
        raise PreconditionFailed(f"publish_context: expected volume {handle.name} as in volume_id, got {context.name}")
    if handle.uuid is not None and handle.uuid != context.uuid:
        raise VolumeNotFound(volume_id, f"the volume of this name that is attached has the uuid {context.uuid}")
    return NodeVolume(volume_id, handle.name, context.uuid), context


class Ownership:
    """Answers by what the kernel and the devices themselves say now; nothing is remembered."""

    def __init__(self, *, devices: Devices, encryption: Encryption, mounts: Mounts) -> None:
        self._devices = devices
        self._encryption = encryption
        self._mounts = mounts

    def device_of(self, volume: NodeVolume) -> Device | None:
        """Return the volume's device as it is now; None when there is none, or what is there is another volume."""
        device = self._devices.find(volume.name, volume.uuid)
        return device if device is not None and is_same(device.uuid, volume.uuid) else None

    def owner_of(self, mounted: Mount, volume: NodeVolume) -> Owner:
        """Tell whose a mount is, for taking it off; a uuid that the device claims outranks the name of a filesystem.

        But for a bound device node: it is the volume's when it was made from the volume's path, even where the number
        has been given to another device since (nothing holds a device open that is only bound).
        """
        number = number_of(mounted)
        if mounted.node_number is not None and self._was_made_from(mounted, volume):
            return Owner.OURS
        if self._was_made_from_another(mounted, volume):
            return Owner.DEAD if self.is_gone(number) else Owner.OTHER
        device = self._devices.find(volume.name, volume.uuid)
        if device is not None and device.number in (number, self._encryption.below(number)):
            if mounted.node_number is None and self._devices.is_claimed(device) is False:
                return Owner.DEAD
            return Owner.OURS if is_same(device.uuid, volume.uuid) else Owner.OTHER
        claimed = self._devices.uuid_of(number)
        if claimed is not None and is_same(claimed, volume.uuid) and volume.uuid is not None:
            return Owner.OURS
        if self.is_gone(number) or self.is_left_behind(mounted, volume.name):
            return Owner.DEAD
        if (claimed is not None and volume.uuid is not None) or not self._was_made_from(mounted, volume):
            return Owner.OTHER
        mapping = self._mapping(volume.name, mounted)
        return Owner.DEAD if mapping is not None and mapping.below is None else Owner.OURS

    def is_left_behind(self, mounted: Mount, name: str) -> bool:
        """Tell whether the volume's device went away under a filesystem of it, and its number is another device's now.

        The mount holds on to the device that was. The mounts of another volume's name another path as their source; the
        volume's own, where it is back, is claimed by nothing.
        """
        if mounted.node_number is not None or mounted.source != str(self._devices.path_of(name)):
            return False
        device = self._devices.find(name)
        if device is not None and device.number == mounted.number:  # whatever other node has that number, too
            return self._devices.is_claimed(device) is False
        return self._devices.name_of(mounted.number) not in (None, name)

    def is_live(self, mounted: Mount, device: Device) -> bool:
        """Tell whether a mount is of the device as it is now, and not of one that had its number before.

        A mount that is alive claims its device for itself, or the encrypted device between them does; a bound node
        claims nothing. What cannot be told now is taken for so.
        """
        if mounted.node_number is None and self._devices.is_claimed(device) is False:
            return False
        return mounted.can_be_of(device)

    def at(self, path: Path, volume: NodeVolume) -> Mount | None:
        """Return what is mounted at a path; a filesystem of the volume's that is dead is taken off first.

        That is where the volume came back as another device: the old one's mounts are of no use to anybody.
        """
        while (mounted := self._mounts.at(path)) is not None and self._is_outlived(mounted, volume):
            logger.warning("volume %s: %s at %s is unmounted", volume, self.describe(mounted), path)
            self.take_off_one(mounted, path, volume)
        return mounted

    def _is_outlived(self, mounted: Mount, volume: NodeVolume) -> bool:
        is_its_filesystem = mounted.node_number is None and self._was_made_from(mounted, volume)
        is_back = is_its_filesystem and self.device_of(volume) is not None
        return is_back and self.owner_of(mounted, volume) is Owner.DEAD

    def take_off(self, path: Path, volume: NodeVolume) -> bool:
        """Unmount what is the volume's, or dead, at `path`, one by one; False when something else is mounted there.

        Raises `PreconditionFailed` when a mount is busy; only a dead device's is then detached lazily.
        """
        while (mounted := self._mounts.at(path)) is not None:
            if not self.take_off_one(mounted, path, volume):
                return False
        return True

    def take_off_one(self, mounted: Mount, path: Path, volume: NodeVolume) -> bool:
        """Unmount the topmost mount at `path`, which is `mounted`, when it is the volume's or dead; else False."""
        match self.owner_of(mounted, volume):
            case Owner.OTHER:
                return False
            case Owner.OURS:
                self._unmount(mounted, path, volume)
            case Owner.DEAD:
                try:
                    self._mounts.unmount(path)
                except PreconditionFailed:
                    self._mounts.unmount(path, lost=number_of(mounted))
        return True

    def _unmount(self, mounted: Mount, path: Path, volume: NodeVolume) -> None:
        """Unmount the volume at the path; lazily only where it is in use and the storage has taken it from this node.

        That is asked before and after: trying to unmount what is in use takes a moment.
        """
        was_fenced = self._is_fenced(volume)
        try:
            self._mounts.unmount(path)
        except PreconditionFailed:
            if not was_fenced or not self._is_fenced(volume):
                raise
            logger.warning("volume %s was taken from this node and is in use at %s: detached lazily", volume, path)
            self._mounts.unmount(path, lost=number_of(mounted))

    def is_lost(self, volume: NodeVolume) -> bool:
        """Tell whether the volume was certainly taken from this node: nothing that is held back can reach it."""
        return self._is_fenced(volume) or is_cut_off(self._devices, volume.name)

    def _is_fenced(self, volume: NodeVolume) -> bool:
        handle = VolumeHandle.parse(volume.volume_id)
        if handle is None or volume.uuid is None:
            return handle is not None and is_cut_off(self._devices, volume.name)
        return is_fenced(self._devices, handle, volume.uuid)

    def describe(self, mounted: Mount) -> str:
        """Say what is mounted, for a message."""
        number = number_of(mounted)
        gone = "" if self._devices.size_bytes(number) else ", which is gone"
        return f"{mounted.fs_type} of {mounted.source} (device {number}{gone})"

    def name_of(self, mounted: Mount) -> str | None:
        """Return the name of the volume from whose device's path a mount was made; None when from none of ours.

        Of an opened encrypted device the path proves little, others have theirs there too: it must lie over the
        volume's device now, or over one that is gone.
        """
        source = PurePosixPath(mounted.source if mounted.node_number is None else mounted.root_path)
        name = source.name
        try:
            if not self._was_made_from(mounted, NodeVolume(name, name, None)):
                return None
        except InvalidField:
            return None
        if source.parts[-2:] == self._devices.path_of(name).parts[-2:]:
            return name
        mapping = self._mapping(name, mounted)
        device = self._devices.find(name)
        is_ours = mapping is not None and (mapping.below is None or (device and device.number == mapping.below))
        return name if is_ours else None

    def is_dead(self, mounted: Mount, name: str) -> bool:
        """Tell whether nothing written through a mount can ever reach the volume.

        Its device is gone, or the one under it when it is the opened device of a volume, or was taken from this node.
        """
        number = number_of(mounted)
        if self.is_gone(number):
            return True
        mapping = self._mapping(name, mounted)
        if (mapping is not None and mapping.below is None) or self.is_left_behind(mounted, name):
            return True
        device = self._devices.find(name)
        is_its_number = device is not None and device.number in (number, self._encryption.below(number))
        if device is not None and is_its_number and self._devices.is_claimed(device) is False:
            return mounted.node_number is None
        return self.is_cut_off(name, number if mapping is None else mapping.below)

    def is_cut_off(self, name: str, number: DeviceNumber | None) -> bool:
        """Tell whether the volume's device, which has that number, was taken from this node."""
        if not is_cut_off(self._devices, name):
            return False
        device = self._devices.find(name)
        return device is not None and device.number == number

    def is_gone(self, number: DeviceNumber) -> bool:
        """Tell whether a device is no more: nothing can be read from it or written to it."""
        # Major number 0 is no block device (Documentation/admin-guide/devices.txt): tmpfs, overlay and the like.
        return bool(number.major) and not self._devices.size_bytes(number)

    def _mapping(self, name: str, mounted: Mount) -> LuksMapping | None:
        """Return the opened encrypted device that a mount is of."""
        mapping = self._encryption.mapping(name)
        is_it = mapping is not None and mapping.is_encryption and mapping.number == number_of(mounted)
        return mapping if is_it else None

    def name_at(self, path: Path) -> str | None:
        """Return the name of the volume whose device appears at that path; None when none of ours does."""
        try:
            paths = (self._devices.path_of(path.name), self._encryption.path_of(path.name))
            return path.name if path in paths else None
        except InvalidField:
            return None

    def _was_made_from(self, mounted: Mount, volume: NodeVolume) -> bool:
        paths = (self._devices.path_of(volume.name), self._encryption.path_of(volume.name))
        if mounted.node_number is None:
            return mounted.source in map(str, paths)
        return mounted.root_path.parts[-2:] in [path.parts[-2:] for path in paths]

    def _was_made_from_another(self, mounted: Mount, volume: NodeVolume) -> bool:
        """Tell whether a filesystem was mounted from the path of another volume's device."""
        source = PurePosixPath(mounted.source)
        is_beside = str(source.parent) == str(self._devices.path_of(volume.name).parent)
        return mounted.node_number is None and is_beside and source.name != volume.name


def number_of(mounted: Mount) -> DeviceNumber:
    """Return the device that a mount stands for: the bound node's, else the filesystem's."""
    return mounted.number if mounted.node_number is None else mounted.node_number


def is_same(claimed: str | None, wanted: str | None) -> bool:
    """Tell whether two uuids may be of one volume; one that is not known contradicts nothing."""
    return claimed is None or wanted is None or claimed.lower() == wanted.lower()


class Shown(Protocol):
    """What the storage client of this machine shows; `csi_driver.node.ports.Devices` fits."""

    def client(self) -> StorageClient: ...

    def status(self, name: str) -> VolumeStatus | None: ...

    def reference_ids(self, name: str) -> tuple[str, ...] | None: ...

    def find(self, name: str, uuid: str | None = None) -> Device | None: ...


class AttachmentState(Enum):
    """How a volume is held on this node, under one reference.

    WITHDRAWN: under this reference no more, but its device may carry I/O: others here use it, or it was detached while
    it was in use, and waits for its last user. FENCED: no more, and no I/O reaches the storage: whatever is
    mounted is dead. UNKNOWN: nothing here tells it at this moment; not a reason to touch anything.
    """

    ATTACHED = "held"
    WITHDRAWN = "given up, but in use"
    FENCED = "taken by another node, or detached by force"
    UNKNOWN = "not known"


def attachment_state(shown: Shown, handle: VolumeHandle, uuid: str) -> AttachmentState:
    """Tell how this node holds the volume `uuid` under the handle's reference.

    `uuid` is that of the volume that was staged. Where the name is another volume's by now, the staged one is held no
    more; what became of its device that does not tell.
    """
    client = shown.client()
    if client.uuid is None or client.is_upgrading or client.problem:
        return AttachmentState.UNKNOWN
    status, references = shown.status(handle.name), shown.reference_ids(handle.name)
    if status is None:
        # The client runs and shows its volumes; with neither files nor a device this one is no longer among them.
        is_gone = references is None and shown.find(handle.name, uuid) is None
        return AttachmentState.FENCED if is_gone else AttachmentState.UNKNOWN
    if status.uuid != uuid.lower():
        return AttachmentState.WITHDRAWN
    if status.preempted:
        return AttachmentState.FENCED
    if references is None:
        return AttachmentState.UNKNOWN
    if held_reference(handle, uuid.lower()) in references:
        return AttachmentState.ATTACHED
    return AttachmentState.FENCED if status.io_enabled is False else AttachmentState.WITHDRAWN


def is_cut_off(shown: Shown, name: str) -> bool:
    """Tell whether a volume of which only the name is known is certainly dead here: nobody's, and cut off.

    Whatever handle it was staged under: it was preempted, or no reference at all is left. Ask twice, as of `is_fenced`.
    """
    client = shown.client()
    if client.uuid is None or client.is_upgrading or client.problem:
        return False
    status = shown.status(name)
    if status is None or status.io_enabled is not False:
        return False
    return status.preempted or shown.reference_ids(name) == ()


def is_fenced(shown: Shown, handle: VolumeHandle, uuid: str) -> bool:
    """Tell whether what is staged of the volume is certainly dead: held no more, and cut off from the storage.

    Then it may be unmounted lazily: nothing that is still to be written can be. Ask twice, with time in between, before
    acting: the client's files are written one after the other.
    """
    return attachment_state(shown, handle, uuid) is AttachmentState.FENCED


DATA_FILE = "vol_data.json"
_CSI = ("plugins", "kubernetes.io", "csi")


def staging_record(path: Path, driver_name: str) -> Path | None:
    """Return kubelet's file of what this driver staged at a path; None where the path is not of that layout.

    `.../plugins/kubernetes.io/csi/<driver>/<hash of the volume's handle>/globalmount`
    """
    parts = path.parts
    is_staging = len(parts) > 6 and parts[-6:-3] == _CSI and parts[-3] == driver_name and parts[-1] == "globalmount"
    return path.parent / DATA_FILE if is_staging else None


def publication_record(path: Path) -> Path | None:
    """Return kubelet's file of what is published at a path; None where the path is not of that layout.

    `.../pods/<uid>/volumes/kubernetes.io~csi/<pv>/mount`, and for a raw block volume
    `.../plugins/kubernetes.io/csi/volumeDevices/publish/<pv>/<pod uid>`.
    """
    parts = path.parts
    if len(parts) > 6 and parts[-6] == "pods" and parts[-4:-2] == ("volumes", "kubernetes.io~csi"):
        return path.parent / DATA_FILE if parts[-1] == "mount" else None
    if len(parts) > 7 and parts[-7:-4] == _CSI and parts[-4:-2] == ("volumeDevices", "publish"):
        return path.parents[2] / parts[-2] / "data" / DATA_FILE
    return None
