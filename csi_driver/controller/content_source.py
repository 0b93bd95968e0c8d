# SPDX-License-Identifier: Apache-2.0
"""The source of a new volume: the snapshot or volume that it is a copy of (docs/data-safety.md, sentences 66 to 69)."""

from __future__ import annotations

from dataclasses import dataclass, replace

from csi_driver.controller.ports import Clusters, Management
from csi_driver.controller.volume_lookup import locate, require
from csi_driver.controller.volume_metadata import Origin, descended, encryption_of, history_of, read_creation
from csi_driver.deadline import Deadline
from csi_driver.errors import CapacityOutOfRange, InvalidRequest, OperationPending, PreconditionFailed, SnapshotNotFound
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
    management: Management
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


def find_source(clusters: Clusters, requested: RequestedSource, *, deadline: Deadline) -> Source:
    """Find a source by its CSI id. Raises `NotFound`, `OperationPending`, `PreconditionFailed` (no snapshots there)."""
    if requested.kind is SourceKind.SNAPSHOT:
        zone, management, snapshot = find_snapshot(clusters, requested.id, deadline=deadline)
        if not snapshot.is_ready:
            raise OperationPending(f"snapshot {snapshot.name} is not ready to use yet; retry")
        metadata = snapshot.source_metadata
        encryption = encryption_of(snapshot, read_creation(metadata), {})
        origin = descended(requested, snapshot.uuid, metadata, snapshot.volume_uuid)
        return Source(zone, management, replace(origin, history=history_of(metadata)), snapshot, encryption)
    located = require(clusters, requested.id, deadline=deadline)
    require_snapshots(located.management, located.zone, deadline=deadline)
    volume = located.volume
    encryption = encryption_of(volume, located.creation, {})
    origin = descended(requested, volume.uuid, volume.metadata, volume.uuid)
    return Source(located.zone, located.management, origin, volume, encryption)


def find_snapshot(clusters: Clusters, snapshot_id: str, *, deadline: Deadline) -> tuple[str, Management, Snapshot]:
    """Find a snapshot by its CSI id, in its zone. Raises `SnapshotNotFound`."""
    handle = VolumeHandle.parse(snapshot_id)
    management = clusters.management(handle.zone) if handle is not None and handle.zone is not None else None
    if handle is None or handle.zone is None or management is None:
        raise SnapshotNotFound(snapshot_id)
    require_snapshots(management, handle.zone, deadline=deadline)
    snapshot = management.snapshot(handle.name, deadline=deadline)
    if snapshot is None or snapshot.uuid.lower() != handle.uuid:
        raise SnapshotNotFound(snapshot_id)
    return handle.zone, management, snapshot


def require_snapshots(management: Management, zone: str, *, deadline: Deadline) -> None:
    features = management.system_info(deadline=deadline).features
    if not features.snapshots:
        raise PreconditionFailed(f"the storage of zone {zone} offers no snapshots: {features.reason}")


def history_after_copy(clusters: Clusters, origin: Origin, *, deadline: Deadline) -> History:
    """Return the history of the volume that was copied, as it is now; UNKNOWN if the volume is gone."""
    located = locate(clusters, origin.source.id, deadline=deadline)
    if located is None or located.volume.uuid.lower() != origin.uuid:
        return History.UNKNOWN
    return history_of(located.volume.metadata)
