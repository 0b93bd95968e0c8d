"""What the controller's use-cases need from the storage management.

`csi_driver.management` fits these structurally; nothing here knows HTTP. Every method takes the caller's
`Deadline` and raises `StorageUnavailable` (or `DeadlineReached`) when no answer can be had in time,
`Unauthenticated` / `Denied` for the credentials.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

from csi_driver.deadline import Deadline
from csi_driver.model import (
    Capability,
    CapacityRange,
    Segments,
)
from csi_driver.storage_model import (
    ALL_DRIVES,
    AllowedDrives,
    Client,
    Feature,
    ReservationMode,
    SystemInfo,
    Volume,
    VolumeChanges,
    VolumeSpec,
    Vpg,
)


class Management(Protocol):
    """The storage management of one cluster. One request of the API per method, unless it says otherwise."""

    def system_info(self, *, deadline: Deadline) -> SystemInfo:
        """Ask who answers; proves reachability and login."""
        ...

    def offers(self, feature: Feature, *, deadline: Deadline) -> bool:
        """Tell whether the management is new enough for this; no request where its version is known already."""
        ...

    def volume(self, name: str, *, deadline: Deadline) -> Volume | None:
        """Return the volume with this name, or None. Reservations of VPGs are not volumes."""
        ...

    def volumes(self, *, after: str, limit: int, deadline: Deadline) -> list[Volume]:
        """Return up to `limit` (0 = all) volumes with names above `after`, sorted by name, without their chunks."""
        ...

    def create_volume(self, spec: VolumeSpec, *, deadline: Deadline) -> str | None:
        """Create the volume and return its uuid; None when a volume (or a VPG's reservation) has that name.

        Raises `Exhausted` (no space), `InvalidRequest` (a parameter the server refuses), `OperationPending`
        (space being reclaimed), `PreconditionFailed` (cluster too old for the feature).
        """
        ...

    def extend_volume(self, volume: Volume, capacity_gb: float, *, deadline: Deadline) -> None:
        """Set a new total capacity.

        Raises `Exhausted`, `VolumeNotFound`, `OperationPending` (also when the volume has another capacity by now),
        `CapacityOutOfRange` (less than a granule more), `PreconditionFailed`.
        """
        ...

    def delete_volume(self, volume: Volume, *, deadline: Deadline) -> bool:
        """Mark the volume for deletion; False when it does not exist any more.

        Raises `PreconditionFailed` while it is in use (naming the clients) or is a snapshot's source.
        """
        ...

    def set_metadata(self, volume: Volume, metadata: Mapping[str, object], *, deadline: Deadline) -> None:
        """Replace the whole metadata of the volume. Raises `VolumeNotFound`."""
        ...

    def update_volume(self, volume: Volume, changes: VolumeChanges, *, deadline: Deadline) -> None:
        """Set what is named of the volume; its metadata stays as it is.

        Raises `InvalidRequest` (nothing that this volume can have), `VolumeNotFound`, `PreconditionFailed`.
        """
        ...

    def init_encryption(
        self, volume: Volume, passphrase: str, *, slot: int, key_size_bits: int, deadline: Deadline
    ) -> bool:
        """Have the storage initialise the encryption; False when that is done or under way already.

        True means the wish is recorded: the volume's document tells how it ends. Raises `InvalidRequest` for what the
        server does not take, `VolumeNotFound`, `StorageUnavailable`, and `OutcomeUnknown` where no answer came:
        look at the volume before asking again.
        """
        ...

    def client(self, client_id: str, *, deadline: Deadline) -> Client | None:
        """Return the client by its id (the host name that the management knows), or None."""
        ...

    def client_by_uuid(self, uuid: str, *, deadline: Deadline) -> Client | None:
        """Return the client by its uuid, or None."""
        ...

    def clients(self, *, deadline: Deadline) -> list[Client]:
        """Return all clients with their attachments. O(clients): for lists, not for per-volume calls."""
        ...

    def clients_holding(self, volume_uuid: str, *, deadline: Deadline) -> list[Client]:
        """Return the clients on which the volume is attached, wished for, or not yet gone."""
        ...

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
    ) -> None:
        """Record the wish that the volume be attached there. Idempotent for the same client and mode.

        Raises `ReservationConflict` (1716, 1717, 1718: held in another mode or by another client), `NodeNotFound`,
        `VolumeNotFound`, `OperationPending` (1719, 16303, being deleted), `PreconditionFailed` (not ready).
        """
        ...

    def detach(
        self, client: Client, volume: Volume, *, reference_id: str | None, force: bool = False, deadline: Deadline
    ) -> None:
        """Withdraw the wish; without an id, or with the last one, the device goes. "Already gone" returns."""
        ...

    def vpg(self, name: str, *, deadline: Deadline) -> Vpg | None:
        """Return the volume provisioning group, or None."""
        ...

    def vpg_free_bytes(self, name: str, *, deadline: Deadline) -> int:
        """Return the free bytes of a VPG's own reserved space; 0 where it has none."""
        ...

    def raw_free_bytes(self, allowed: AllowedDrives = ALL_DRIVES, *, deadline: Deadline) -> int | None:
        """Return the raw free bytes of the drives that a volume may use; redundancy not yet taken off.

        None where the restriction names what does not exist. At most three requests.
        """
        ...


class Clusters(Protocol):
    """The storage clusters ("zones") that this controller serves."""

    def zones(self) -> Sequence[str]:
        """Names of all zones, in order of preference. At least one."""
        ...

    def management(self, zone: str) -> Management | None:
        """Return the management of a zone, or None when no such zone is configured."""
        ...


@dataclass(frozen=True, slots=True)
class TopologyRequirement:
    """Where a volume must be reachable: at least one of `requisite`; `preferred` in order."""

    requisite: tuple[Segments, ...] = ()
    preferred: tuple[Segments, ...] = ()


@dataclass(frozen=True, slots=True)
class CreateRequest:
    """CreateVolume. `has_source`: a volume content source was given (not supported)."""

    name: str
    capacity: CapacityRange
    capabilities: tuple[Capability, ...]
    parameters: Mapping[str, str] = field(default_factory=dict)
    secrets: Mapping[str, str] = field(default_factory=dict, repr=False)
    topology: TopologyRequirement | None = None
    mutable_parameters: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class PublishRequest:
    """ControllerPublishVolume. `is_again`: only an attachment that is there already will do."""

    volume_id: str
    node_id: str
    capability: Capability
    read_only: bool
    context: Mapping[str, str] = field(default_factory=dict)
    is_again: bool = False


@dataclass(frozen=True, slots=True)
class ValidateRequest:
    """ValidateVolumeCapabilities."""

    volume_id: str
    capabilities: tuple[Capability, ...]
    context: Mapping[str, str] = field(default_factory=dict)
    parameters: Mapping[str, str] = field(default_factory=dict)
    mutable_parameters: Mapping[str, str] = field(default_factory=dict)
