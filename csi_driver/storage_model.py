# SPDX-License-Identifier: Apache-2.0
"""Values of the storage management, with its own names and numbers. Sizes are int bytes, except `capacity_gb`: the
API's decimal gigabytes.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import datetime
from enum import IntEnum, StrEnum

from csi_driver.nvme_model import NvmeExport


class RaidLevel(StrEnum):
    CONCATENATED = "Concatenated"
    STRIPED = "Striped RAID-0"
    MIRRORED = "Mirrored RAID-1"
    STRIPED_MIRRORED = "Striped & Mirrored RAID-10"
    ERASURE_CODED = "Erasure Coding"
    STRIPED_ERASURE_CODED = "Striped Erasure Coding"


@dataclass(frozen=True, slots=True)
class Layout:
    raid_level: RaidLevel = RaidLevel.CONCATENATED
    stripe_width: int | None = None
    stripe_size_blocks: int | None = None
    data_blocks: int | None = None
    parity_blocks: int | None = None
    number_of_mirrors: int | None = None
    protection_level: str | None = None
    enable_crc_check: bool | None = None


@dataclass(frozen=True, slots=True)
class AllowedDrives:
    """The drives that a volume may use; nothing set = all. `with_offline`: also offline ones."""

    drive_classes: tuple[str, ...] = ()
    target_classes: tuple[str, ...] = ()
    drives: tuple[str, ...] = ()
    targets: tuple[str, ...] = ()
    domain: str | None = None
    with_metadata: bool = False
    with_offline: bool = False


ALL_DRIVES = AllowedDrives()


@dataclass(frozen=True, slots=True)
class RawSpace:
    """Bytes of drives, with redundancy: those that no volume has yet, and all."""

    free_bytes: int
    total_bytes: int


LUKS_HEADER_BYTES = 16 << 20
"""Size of a LUKS2 header: cryptsetup's default, and the default of the storage."""


class SourceKind(StrEnum):
    SNAPSHOT = "snapshot"
    VOLUME = "volume"


@dataclass(frozen=True, slots=True)
class ContentSource:
    """The snapshot or volume, by its names in the storage, that a new volume is a copy of."""

    kind: SourceKind
    name: str
    uuid: str


@dataclass(frozen=True, slots=True)
class VolumeSpec:
    """A volume to create, by a provisioning group or a layout. Parameters give it without name, capacity, metadata."""

    name: str = ""
    capacity_gb: float = 0.0
    metadata: Mapping[str, object] = field(default_factory=dict)
    vpg: str | None = None
    layout: Layout | None = None
    description: str | None = None
    relative_rebuild_priority: int | None = None
    drive_classes: tuple[str, ...] = ()
    target_classes: tuple[str, ...] = ()
    limit_by_drives: tuple[str, ...] = ()
    limit_by_targets: tuple[str, ...] = ()
    domain: str | None = None
    security_groups: tuple[str, ...] = ()
    allow_offline_drives: bool | None = None
    encrypted_header_bytes: int = 0
    """Header size if the storage encrypts the volume; a provisioning group has its own."""
    source: ContentSource | None = None


@dataclass(frozen=True, slots=True)
class VolumeChanges:
    """Changes of a volume; None = unchanged. Lists replace the former ones."""

    description: str | None = None
    relative_rebuild_priority: int | None = None
    enable_crc_check: bool | None = None
    drive_classes: tuple[str, ...] | None = None
    target_classes: tuple[str, ...] | None = None
    limit_by_drives: tuple[str, ...] | None = None
    limit_by_targets: tuple[str, ...] | None = None


class ReservationMode(IntEnum):
    NONE = 0
    SHARED_READ_ONLY = 1
    SHARED_READ_WRITE = 2
    EXCLUSIVE_READ_WRITE = 3


@dataclass(frozen=True, slots=True)
class Reservation:
    """The reservation of a volume. Every transition raises `version`, which starts at 1. `attached`: client ids."""

    mode: ReservationMode = ReservationMode.NONE
    version: int = 1
    reserved_by: str | None = None
    attached: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class StorageEncryption:
    """Encryption by the storage. `command_result` of the latest command: 1 = done, None = pending, else failed."""

    header_bytes: int
    is_initialized: bool = False
    command_index: int = 0
    command_result: int | None = None
    command_error: str = ""


@dataclass(frozen=True, slots=True)
class VolumeSummary:
    """The fields of a volume that lists have."""

    name: str
    uuid: str
    blocks: int
    block_size: int
    capacity_gb: float
    status: str
    action: str
    health: str = "healthy"
    is_reserved: bool = False
    encryption: StorageEncryption | None = None
    """None: not encrypted by the storage."""
    metadata: Mapping[str, object] = field(default_factory=dict)

    @property
    def size_bytes(self) -> int:
        return self.blocks * self.block_size

    @property
    def is_encrypted(self) -> bool:
        return self.encryption is not None

    @property
    def wants_passphrase(self) -> bool:
        return self.action == "initEncryptionRequired"

    @property
    def is_being_deleted(self) -> bool:
        return self.action in ("markedForDeletion", "deleting") or self.status == "toBeDeleted"

    @property
    def is_being_made(self) -> bool:
        return self.action == "initializing" or self.status == "pending"


@dataclass(frozen=True, slots=True)
class Volume(VolumeSummary):
    is_ready: bool = True
    is_read_only: bool = False
    is_snapshot: bool = False
    allows_offline_drives: bool = False
    layout: Layout = field(default_factory=Layout)
    vpg: str | None = None
    reservation: Reservation = field(default_factory=Reservation)
    description: str = ""
    relative_rebuild_priority: int | None = None
    has_private_readers: bool = False
    """Each SHARED_READ_ONLY client gets a writable copy of its own."""


class ClientStatus(IntEnum):
    INITIALIZING = 0
    READY = 1
    PREPARING_REMOVAL = 2
    REMOVAL_READY = 3
    EXITING = 4
    DOWN = 5
    UNKNOWN = 6


_ABSENT = (ClientStatus.INITIALIZING, ClientStatus.EXITING, ClientStatus.REMOVAL_READY, ClientStatus.DOWN)


class DeviceStatus(IntEnum):
    BUSY = 1
    DETACHED = 2
    DETACH_FAILED = 3
    ATTACHED = 4
    ATTACH_FAILED = 5
    ATTACHING = 6
    DETACHING = 7
    DETACHED_AFTER_SHUTDOWN = 9
    RESERVATION_DENIED = 17
    UNKNOWN_VOLUME = 94
    OTHER = 0


@dataclass(frozen=True, slots=True)
class DesiredAttachment:
    """The attachment of a volume to a client that the management wants; `action`: "attaching" or "detaching..."."""

    volume_uuid: str
    volume_name: str
    action: str
    mode: ReservationMode
    reference_ids: frozenset[str]
    version: int = 0
    """The reservation's version of the attachment; 0 = unknown."""
    preempts: bool = False

    @property
    def is_detaching(self) -> bool:
        return self.action.startswith("detaching")

    @property
    def references(self) -> frozenset[str]:
        return self.reference_ids or frozenset({self.volume_uuid})


@dataclass(frozen=True, slots=True)
class DeviceReport:
    volume_uuid: str
    volume_name: str
    status: DeviceStatus
    io_enabled: bool
    mode: ReservationMode
    reference_ids: frozenset[str] | None
    export: NvmeExport | None = None
    """Where the node must connect for its device; None: its storage client makes the device."""


@dataclass(frozen=True, slots=True)
class Client:
    """A client of the storage, on a node. `connects_on_demand`: it is the kernel's NVMe host, and no daemon runs."""

    id: str
    uuid: str
    status: ClientStatus
    desired: Mapping[str, DesiredAttachment] = field(default_factory=dict)
    devices: Mapping[str, DeviceReport] = field(default_factory=dict)
    connects_on_demand: bool = False

    @property
    def is_absent(self) -> bool:
        """Whether it cannot attach a volume now. One that connects on demand is down while it has no connection."""
        return self.status in _ABSENT and not self.connects_on_demand

    @property
    def node_id(self) -> str:
        """The id of its node in CSI: such a node has no client's uuid to name itself by."""
        return self.id if self.connects_on_demand else self.uuid

    def holds(self, volume_uuid: str) -> bool:
        """Whether the volume is attached, to be attached, or not yet reported as detached."""
        report = self.devices.get(volume_uuid)
        gone = report is None or report.status in (DeviceStatus.DETACHED, DeviceStatus.DETACHED_AFTER_SHUTDOWN)
        return volume_uuid in self.desired or not gone


@dataclass(frozen=True, slots=True)
class VolumeOnClient:
    """A volume, and a client without its other volumes, after a change of the one on the other."""

    volume: Volume
    client: Client


class Deletion(IntEnum):
    """Result of a request to delete a volume. BEGUN: the volume is gone later."""

    NOT_FOUND = 0
    BEGUN = 1
    DONE = 2


@dataclass(frozen=True, slots=True)
class Vpg:
    name: str
    layout: Layout
    capacity_bytes: int
    allow_overflow: bool
    is_encrypted: bool = False
    header_bytes: int = 0
    is_for_metadata: bool = False
    """Its volumes hold the metadata of snapshots: they have no uuid and are never deleted."""
    drive_classes: tuple[str, ...] = ()
    target_classes: tuple[str, ...] = ()
    domain: str | None = None


@dataclass(frozen=True, slots=True)
class Snapshot:
    """A snapshot of a volume. `created`: when it was cut, in UTC; it means nothing before it `is_ready`. `size_bytes`:
    size of the volume at that time.
    """

    name: str
    uuid: str
    volume_name: str
    volume_uuid: str
    size_bytes: int
    created: datetime
    is_ready: bool = True
    group_name: str | None = None
    group_uuid: str | None = None
    source_metadata: Mapping[str, object] = field(default_factory=dict)
    """Metadata of the volume, read after the cut."""
    metadata: Mapping[str, object] = field(default_factory=dict)
    encryption: StorageEncryption | None = None


@dataclass(frozen=True, slots=True)
class SnapshotGroup:
    """Snapshots of several volumes, cut together."""

    name: str
    uuid: str
    created: datetime
    snapshots: tuple[Snapshot, ...]
    is_ready: bool = True


@dataclass(frozen=True, slots=True)
class NewMember:
    """A snapshot to be cut, alone or as a member of a group."""

    name: str
    volume: Volume
    metadata: Mapping[str, object] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class ChangedRanges:
    """Offset and length of ranges, ascending. `next_offset`: where the next page begins; None = this is the last."""

    ranges: tuple[tuple[int, int], ...]
    next_offset: int | None
    size_bytes: int


@dataclass(frozen=True, slots=True)
class ReclaimedSpace:
    """A step: the bytes that a volume took before and after. `next_offset`: where the next step begins; None = done."""

    before_bytes: int
    after_bytes: int
    next_offset: int | None


@dataclass(frozen=True, slots=True)
class Features:
    """Optional features of the storage. `reason`: why there are no snapshots; it names the engine."""

    snapshots: bool = False
    group_snapshots: bool = False
    changed_blocks: bool = False
    reason: str = ""
    deletions: bool = False
    """Of snapshots that were cut before, also where none can be cut any more."""
    reclaims_space: bool = False


@dataclass(frozen=True, slots=True)
class SystemInfo:
    version: str
    api_version: str
    features: Features = Features()
