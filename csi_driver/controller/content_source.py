# SPDX-License-Identifier: Apache-2.0
"""The source of a new volume: the snapshot or volume that it is a copy of (docs/data-safety.md, sentences 66 to 69)."""

from __future__ import annotations

from dataclasses import dataclass, replace

from csi_driver.controller.ports import Management
from csi_driver.controller.snapshots import Snapshots
from csi_driver.controller.volume_lookup import require
from csi_driver.controller.volume_metadata import Origin, descended, encryption_of, history_of, read_creation
from csi_driver.deadline import Deadline
from csi_driver.errors import CapacityOutOfRange, InvalidRequest, SnapshotNotFound
from csi_driver.model import MIB, CapacityRange, RequestedSource, VolumeHandle
from csi_driver.parameters.encryption import EncryptionRequest
from csi_driver.publish_context import Encryption, History
from csi_driver.storage_model import ContentSource, Snapshot, SourceKind, Volume

_ENCRYPTED = {
    Encryption.NONE: "not encrypted",
    Encryption.NATIVE: "encrypted by the storage",
    Encryption.LUKS: "encrypted by the nodes",
}


@dataclass(frozen=True, slots=True)
class Source:
    """A snapshot or volume that a volume can be made from. `origin`: for the records of that volume."""

    zone: str
    origin: Origin
    found: Snapshot | Volume
    encryption: Encryption

    @property
    def content(self) -> ContentSource:
        return ContentSource(self.origin.source.kind, self.found.name, self.found.uuid)

    def __str__(self) -> str:
        return f"{self.origin.source.kind} {self.found.name}"

    def capacity(self, asked: CapacityRange, reserved_bytes: int) -> CapacityRange:
        """Return the range for a copy, which is not smaller than its source. Raises `CapacityOutOfRange`."""
        least = self.found.size_bytes - reserved_bytes
        if 0 < asked.limit_bytes < least:
            raise CapacityOutOfRange(
                f"capacity_range: expected a limit of at least {least} bytes, the size of {self}, got "
                f"{asked.limit_bytes}; request more"
            )
        return replace(asked, required_bytes=max(asked.required_bytes, least))

    def check_encryption(self, asked: EncryptionRequest) -> None:
        """Refuse a copy that would be encrypted differently: its content could not be read. Raises `InvalidRequest`."""
        if asked.by is not self.encryption:
            action = "without the parameter encryption"
            if self.encryption is not Encryption.NONE:
                action = f"with the parameter encryption: {self.encryption}"
            raise InvalidRequest(
                f"volume_content_source: {self} is {_ENCRYPTED.get(self.encryption, 'of unknown encryption')}, and the "
                f"new volume would be {_ENCRYPTED[asked.by]}; use a StorageClass {action}"
            )
        header = self.found.encryption.header_bytes if self.found.encryption is not None else 0
        if header and asked.header_bytes != header:
            raise InvalidRequest(
                f"volume_content_source: {self} has an encryption header of {header // MIB} MiB, and the new volume "
                f"would have one of {asked.header_bytes // MIB} MiB; use a StorageClass with encryption/headerSize: "
                f"{header // MIB}"
            )


def find_source(snapshots: Snapshots, requested: RequestedSource, *, deadline: Deadline) -> Source:
    """Find a source by its CSI id. Raises `NotFound`, and the refusal of storage that offers no snapshots."""
    if requested.kind is SourceKind.SNAPSHOT:
        found = snapshots.find(requested.id, deadline=deadline)
        if found is None:
            raise SnapshotNotFound(requested.id)
        snapshot, metadata = found.snapshot, found.snapshot.source_metadata
        encryption = encryption_of(snapshot, read_creation(metadata), {})
        origin = descended(requested, snapshot.uuid, metadata, snapshot.volume_uuid)
        return Source(found.zone, replace(origin, history=history_of(metadata)), snapshot, encryption)
    located = require(snapshots.clusters, requested.id, deadline=deadline)
    snapshots.features.require(located.zone, "snapshots", deadline=deadline)
    volume = located.volume
    encryption = encryption_of(volume, located.creation, {})
    return Source(located.zone, descended(requested, volume.uuid, volume.metadata, volume.uuid), volume, encryption)


def history_after_copy(management: Management, origin: Origin, *, deadline: Deadline) -> History:
    """Return the history of the volume that was copied, as it is now; UNKNOWN if the volume is gone."""
    handle = VolumeHandle.parse(origin.source.id)
    volume = management.volume(handle.name, deadline=deadline) if handle is not None else None
    if volume is None or volume.uuid.lower() != origin.uuid:
        return History.UNKNOWN
    return history_of(volume.metadata)
