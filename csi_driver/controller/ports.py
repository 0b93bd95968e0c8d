# SPDX-License-Identifier: Apache-2.0
"""Requests of the use cases, their shape checked in `csi_driver.rpc`, and the port to the storage management."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

from csi_driver.deadline import Deadline
from csi_driver.model import Capability, CapacityRange, RequestedSource, Segments
from csi_driver.storage_model import (
    ALL_DRIVES,
    AllowedDrives,
    ChangedRanges,
    Client,
    Deletion,
    NewMember,
    RawSpace,
    ReclaimedSpace,
    ReservationMode,
    Snapshot,
    SnapshotGroup,
    SystemInfo,
    Volume,
    VolumeChanges,
    VolumeOnClient,
    VolumeSpec,
    VolumeSummary,
    Vpg,
)


@dataclass(frozen=True, slots=True)
class TopologyRequirement:
    requisite: tuple[Segments, ...] = ()
    preferred: tuple[Segments, ...] = ()


@dataclass(frozen=True, slots=True)
class CreateRequest:
    name: str
    capacity: CapacityRange
    capabilities: tuple[Capability, ...]
    parameters: Mapping[str, str] = field(default_factory=dict)
    secrets: Mapping[str, str] = field(default_factory=dict, repr=False)
    topology: TopologyRequirement | None = None
    mutable_parameters: Mapping[str, str] = field(default_factory=dict)
    source: RequestedSource | None = None


@dataclass(frozen=True, slots=True)
class PublishRequest:
    """ControllerPublishVolume. `is_again`: accept only an attachment that exists already."""

    volume_id: str
    node_id: str
    capability: Capability
    read_only: bool
    context: Mapping[str, str] = field(default_factory=dict)
    is_again: bool = False


@dataclass(frozen=True, slots=True)
class ValidateRequest:
    volume_id: str
    capabilities: tuple[Capability, ...]
    context: Mapping[str, str] = field(default_factory=dict)
    parameters: Mapping[str, str] = field(default_factory=dict)
    mutable_parameters: Mapping[str, str] = field(default_factory=dict)


class Management(Protocol):
    """The storage management of one cluster. One request of its API per method, unless stated otherwise.

    The embedded manager's response to a change has the state after it, NVMesh's has not: then it must be read.
    Every method raises `StorageUnavailable` without an answer in time, and `Unauthenticated` or `Denied`.
    """

    def system_info(self, *, deadline: Deadline) -> SystemInfo:
        """Return version and identity; proves that the management is reachable and accepts the login."""

    def volume(self, name: str, *, deadline: Deadline) -> Volume | None:
        """Return the volume with this name, or None. Reservations of VPGs are not volumes."""

    def volumes(self, *, after: str, limit: int, deadline: Deadline) -> Iterator[VolumeSummary]:
        """Return up to `limit` (0 = all) volumes with names above `after`, sorted by name."""

    def create_volume(self, spec: VolumeSpec, *, deadline: Deadline) -> Volume | str | None:
        """Return the volume, or its uuid alone; None if the name is in use.

        Raises `Exhausted` without space, `OperationPending` while space is being reclaimed. With `spec.source` also
        `NotFound`, `CapacityOutOfRange` (smaller than its source), `PreconditionFailed`.
        """

    def extend_volume(self, volume: Volume, capacity_gb: float, *, deadline: Deadline) -> None:
        """Set a new total capacity. Raises `Exhausted`, `VolumeNotFound`, `PreconditionFailed`,
        `OperationPending` (also if the volume has another capacity by now), `CapacityOutOfRange` (too little more).
        """

    def delete_volume(self, volume: Volume, *, deadline: Deadline) -> Deletion:
        """Mark it for deletion. Raises `PreconditionFailed` while it is in use."""

    def set_metadata(self, volume: Volume, metadata: Mapping[str, object], *, deadline: Deadline) -> None:
        """Replace the whole metadata of the volume. Raises `VolumeNotFound`."""

    def update_volume(self, volume: Volume, changes: VolumeChanges, *, deadline: Deadline) -> None:
        """Change attributes of the volume, but not its metadata. Raises `InvalidRequest`, `PreconditionFailed`."""

    def init_encryption(
        self, volume: Volume, passphrase: str, *, slot: int, key_size_bits: int, deadline: Deadline
    ) -> bool:
        """Ask the storage to initialise the encryption; False if that is done or in progress already.

        Raises `InvalidRequest`, `VolumeNotFound`, and `OutcomeUnknown`: read the volume before a retry.
        """

    def client(self, client_id: str, *, only: str | None = None, deadline: Deadline) -> Client | None:
        """Return the client by its id (the host name that the management knows), or None.

        `only`: the uuid of a volume; without the client's other volumes, of which there may be hundreds.
        """

    def client_by_uuid(self, uuid: str, *, only: str | None = None, deadline: Deadline) -> Client | None:
        """Return the client, or None. `only`: as for `client`."""

    def clients(self, *, with_devices: bool = True, deadline: Deadline) -> list[Client]:
        """Return all clients with their attachments. O(attachments): for lists, not for calls about one volume.

        Their reports of devices are as much again, and cost a newer server a second query of its database.
        """

    def clients_holding(self, volume_uuid: str, *, deadline: Deadline) -> list[Client]:
        """Return the clients where the volume is attached, to be attached, or not yet detached; no other volumes."""

    def attach(
        self,
        client: Client,
        volume: Volume,
        *,
        mode: ReservationMode,
        reference_id: str | None,
        version: int | None = None,
        preempt: bool = False,
        detach_others: bool = False,
        deadline: Deadline,
    ) -> VolumeOnClient | None:
        """Record that the volume is to be attached to the client. Idempotent for the same client and mode.

        Raises `ReservationConflict`, `NodeNotFound`, `VolumeNotFound`, `OperationPending`, `PreconditionFailed`.
        """

    def detach(
        self, client: Client, volume: Volume, *, reference_id: str | None, force: bool = False, deadline: Deadline
    ) -> VolumeOnClient | None:
        """Remove one reference, or all without an id; the last one removes the device. None attached: returns."""

    def vpg(self, name: str, *, deadline: Deadline) -> Vpg | None:
        """Return the volume provisioning group, or None."""

    def vpg_free_bytes(self, name: str, *, deadline: Deadline) -> int:
        """Return the free bytes of a VPG's own reserved space; 0 without such space."""

    def raw_space(self, allowed: AllowedDrives = ALL_DRIVES, *, deadline: Deadline) -> RawSpace | None:
        """Return the space of the drives; None if `allowed` names unknown things. At most three requests."""

    # Only where `system_info` has the feature.

    def snapshot(self, name: str, *, deadline: Deadline) -> Snapshot | None:
        """Return the snapshot with this name, or None; one that is not ready is not cut yet."""

    def snapshots(
        self, *, after: str, limit: int, volume_uuid: str | None = None, deadline: Deadline
    ) -> Iterator[Snapshot]:
        """Return up to `limit` (0 = all) snapshots with names above `after`, sorted by name, of one volume or all."""

    def create_snapshot(
        self, name: str, volume: Volume, metadata: Mapping[str, object], *, deadline: Deadline
    ) -> Snapshot:
        """Cut a snapshot; the same name and volume again is the same snapshot.

        Raises `ExistsDifferently`, `VolumeNotFound`, `Exhausted`, `OperationPending`, `PreconditionFailed`.
        """

    def delete_snapshot(self, name: str, uuid: str, *, deadline: Deadline) -> None:
        """Delete the snapshot, if it exists. Raises `InvalidRequest` for a member of a group."""

    def snapshot_group(self, name: str, *, deadline: Deadline) -> SnapshotGroup | None:
        """Return the group with all its snapshots, or None."""

    def create_snapshot_group(
        self, name: str, members: Sequence[NewMember], metadata: Mapping[str, object], *, deadline: Deadline
    ) -> SnapshotGroup:
        """Cut snapshots of several volumes at one moment; repeated, and raising, as `create_snapshot`."""

    def delete_snapshot_group(self, name: str, uuid: str, *, deadline: Deadline) -> None:
        """Delete the group and its snapshots, if it exists."""

    def changed_ranges(
        self, target: Snapshot, base: Snapshot | None, *, offset: int, count: int, deadline: Deadline
    ) -> ChangedRanges:
        """Return up to `count` ranges from `offset` in which `target` differs from `base`, or holds data (None).

        Raises `NotFound` if either does not exist any more.
        """

    def reclaim_space(self, volume: Volume, offset: int, *, deadline: Deadline) -> ReclaimedSpace | None:
        """Give back the zeros in a part of the volume, from `offset`; None while it is attached or otherwise in use."""


class Clusters(Protocol):
    def zones(self) -> Sequence[str]:
        """Return the names of all zones, at least one, in order of preference."""

    def management(self, zone: str) -> Management | None:
        """Return the management of a zone, or None if no such zone is configured."""
