# SPDX-License-Identifier: Apache-2.0
"""Records of the embedded storage manager, their form in the database, and the rules of reservations."""

from __future__ import annotations

import hashlib
import json
import secrets
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any, Generic, TypeVar

from pydantic import TypeAdapter

from csi_driver.embedded.layouts import BLOCK_SIZE, Layout

Document = dict[str, object]
"""A decoded JSON object."""
compact_json = json.JSONEncoder(separators=(",", ":")).encode
"""`json.dumps` makes an encoder for each text that is not of the default form."""


class Part(Document):
    """A part of a document that never changes, and its text: encoded once for all answers that show it."""

    @cached_property
    def text(self) -> str:
        return compact_json(self)


NONE, SHARED_READ_ONLY, SHARED_READ_WRITE, EXCLUSIVE_READ_WRITE = range(4)
MODES = {
    "SHARED_READ_ONLY": SHARED_READ_ONLY,
    "SHARED_READ_WRITE": SHARED_READ_WRITE,
    "EXCLUSIVE_READ_WRITE": EXCLUSIVE_READ_WRITE,
}
MODE_NAMES = {NONE: "NONE", **{number: name for name, number in MODES.items()}}

DETACHED, ATTACHED, RESERVATION_DENIED = 2, 4, 17
"""block_devices[].vol_status"""
READY, DOWN = 1, 5
"""client_status"""


@dataclass(frozen=True, slots=True)
class Reservation:
    """Cluster-wide access to a volume. Each transition increments `version`."""

    mode: int = NONE
    version: int = 1
    reserved_by: str | None = None
    attached: tuple[str, ...] = ()

    def allows(self, client: str, mode: int) -> bool:
        """Return whether a client that attached in this mode may do I/O; False after a preemption."""
        return self.mode == mode and (mode != EXCLUSIVE_READ_WRITE or self.reserved_by == client)

    def covers(self, attachment: Attachment) -> bool:
        """Return whether nothing ended the access that this attachment got: a later reservation does not renew it."""
        is_same = attachment.reservation.get("version") == self.version
        return is_same and self.allows(attachment.client, attachment.mode)

    def released(self, client: str) -> Reservation:
        """Return the reservation without `client`; it ends with the last client."""
        left = tuple(name for name in self.attached if name != client)
        if left == self.attached:
            return self
        if left:
            return replace(self, attached=left)
        return Reservation(NONE, self.version + 1)


@dataclass(frozen=True, slots=True)
class Encryption:
    """Encryption of a volume by the storage. `command` is the latest command, as the API shows it."""

    header_mib: int = 16
    initialized: bool = False
    command: Document = field(default_factory=dict)

    @property
    def index(self) -> int:
        """Number of the latest command; 0 = none."""
        number = self.command.get("commandIndex")
        return number if isinstance(number, int) else 0


@dataclass(frozen=True, slots=True)
class Source:
    """The snapshot or volume that a volume was made from."""

    kind: str
    """snapshot or volume."""
    name: str
    uuid: str


UNHEALTHY = "unhealthy"
"""Mark of volumes that are not healthy."""


@dataclass(frozen=True, slots=True)
class Volume:
    name: str
    uuid: str
    capacity: int | float
    """Decimal gigabytes as requested; the exact size is `blocks`."""
    extents: tuple[int, ...]
    """Blocks of the first allocation and of each extension."""
    layout: Layout
    group: str | None
    """VPG that it was created from."""
    given: Document
    """Request fields that are only stored and shown."""
    action: str = "none"
    status: str = "online"
    health: str = "healthy"
    made: bool = False
    """Its file is on disk and may hold data: it must never be created again."""
    reservation: Reservation = field(default_factory=Reservation)
    encryption: Encryption | None = None
    source: Source | None = None
    """Its file is a reflink of the source's: an empty file must never be created for it."""
    shared_blocks: int = 0
    """Blocks that its file shared when it was made or cut last: writes to them take free space."""
    snapshots: int = 0
    """Snapshots of it in the pool."""

    @property
    def blocks(self) -> int:
        return sum(self.extents)

    @property
    def bytes(self) -> int:
        return self.blocks * BLOCK_SIZE

    @property
    def marks(self) -> tuple[str, ...]:
        """UNHEALTHY where it is so, and the uuid of its source."""
        unhealthy = () if self.health == "healthy" else (UNHEALTHY,)
        return unhealthy if self.source is None else (*unhealthy, self.source.uuid)

    @property
    def least_bytes(self) -> int:
        """Minimum length of its file: a crash can lose the latest extension only."""
        return sum(self.extents[:-1] or self.extents) * BLOCK_SIZE

    @property
    def read_only(self) -> bool:
        return self.given.get("isReadOnly") is True

    @property
    def has_private_readers(self) -> bool:
        """Each SHARED_READ_ONLY client has a writable copy: the log of a copied filesystem is not empty."""
        return self.source is not None

    @property
    def ready(self) -> bool:
        """False until its encryption is initialized, or its source is copied: no client may attach it."""
        if self.source is not None:
            return self.action != "initializing"
        return self.encryption is None or self.encryption.initialized


CUTTING, NO_ACTION, MARKED_FOR_DELETION = "cutting", "none", "markedForDeletion"
"""Actions of a snapshot or group: not cut yet (nothing was promised), ready, being deleted."""


@dataclass(frozen=True, slots=True)
class Snapshot:
    """A volume's content at one moment: an immutable file."""

    name: str
    uuid: str
    volume: str
    volume_uuid: str
    """The volume may be deleted."""
    blocks: int
    """Size of the volume at the cut."""
    layout: Layout
    given: Document
    """Request fields that are only stored and shown."""
    action: str = CUTTING
    created: str = ""
    """Time of the cut, RFC 3339 in UTC with microseconds; "" before it."""
    source_metadata: Document = field(default_factory=dict)
    """Metadata of the volume, read after the cut."""
    extents: int = 0
    """Extents of the volume's file at the cut."""
    group: str | None = None
    """Name of its group; `group_uuid` is that one's uuid."""
    group_uuid: str | None = None
    encryption: Encryption | None = None

    @property
    def bytes(self) -> int:
        return self.blocks * BLOCK_SIZE

    @property
    def is_ready(self) -> bool:
        return self.action == NO_ACTION


@dataclass(frozen=True, slots=True)
class SnapshotGroup:
    """Snapshots of several volumes at one moment."""

    name: str
    uuid: str
    members: tuple[str, ...]
    """Names of the snapshots."""
    given: Document
    action: str = CUTTING
    created: str = ""

    @property
    def is_ready(self) -> bool:
        return self.action == NO_ACTION


@dataclass(frozen=True, slots=True)
class Client:
    name: str
    uuid: str


def client_hash(name: str) -> str:
    """Return a replacement for a client's name where the name would be too long."""
    return hashlib.sha256(name.encode()).hexdigest()[:16]


def new_token() -> str:
    """Return a token that no attachment has had."""
    return secrets.token_hex(8)


@dataclass(frozen=True)
class Attachment:
    """The desired attachment of a volume to a client."""

    client: str
    volume: str
    uuid: str
    action: str
    """attaching (it stays so while the volume is attached) or detaching."""
    reservation: Document
    references: tuple[str, ...]
    force: bool | None = None
    token: str = ""
    """Part of the name under which a node connects to this attachment alone; no other attachment ever has it."""
    port: int = 0
    """TCP port of its export, which no other attachment has; 0 = a client of this machine."""
    inode: int = 0
    """Of the file that is exported; 0 = none."""
    size_bytes: int = 0
    """The latest size of the export."""

    @property
    def mode(self) -> int:
        mode = self.reservation.get("mode")
        return mode if isinstance(mode, int) else NONE

    @property
    def read_only(self) -> bool:
        return self.mode == SHARED_READ_ONLY

    @property
    def is_attaching(self) -> bool:
        return self.action == "attaching"

    @cached_property
    def part(self) -> Part:
        """Its value in the `attachments` of the client's document."""
        return Part(
            uuid=self.uuid,
            name=self.volume,
            action=self.action,
            reservation=self.reservation,
            referenceIDs=list(self.references),
        )


@dataclass(frozen=True)
class Report:
    """The state of a volume that a client reported: a row of its block_devices."""

    client: str
    volume: str
    uuid: str
    status: int
    io_enabled: int
    reservation: Document
    references: tuple[str, ...]
    export: Document = field(default_factory=dict)
    """Where the node connects for its device; empty: the manager makes the device."""

    @cached_property
    def part(self) -> Part:
        """Its row in the `block_devices` of the client's document."""
        part = Part(
            name=self.volume,
            uuid=self.uuid,
            ioEnabled=self.io_enabled,
            vol_status=self.status,
            reservation=self.reservation,
            referenceIDs=list(self.references),
        )
        if self.export:
            part["export"] = self.export
        return part


@dataclass(frozen=True, slots=True)
class Totals:
    """Allocated blocks of all volumes; updated with each change and verified at start."""

    volumes: int = 0
    data: int = 0
    redundancy: int = 0
    shared: int = 0
    """Blocks that volumes share with snapshots and sources: writes to them take free space."""

    @property
    def allocated(self) -> int:
        return self.data + self.redundancy

    def with_volume(self, volume: Volume, sign: int = 1) -> Totals:
        """Return the totals with the volume added, or removed for sign -1."""
        return replace(
            self,
            volumes=self.volumes + sign,
            data=self.data + sign * volume.blocks,
            redundancy=self.redundancy + sign * volume.layout.redundancy_of(volume.blocks),
            shared=self.shared + sign * volume.shared_blocks,
        )


@dataclass(frozen=True, slots=True)
class Fact:
    value: str


R = TypeVar("R")


@dataclass(frozen=True)
class Table(Generic[R]):
    """A kind of record and its name in the database.

    `former`: fields that have no reader any more, written for an earlier version that a rollback brings back. Fields
    that only earlier versions had are ignored. `index`: records can be listed by the value, or by each value, of this
    attribute; "" = none.
    """

    name: str
    kind: type[R]
    former: Document = field(default_factory=dict)
    index: str = ""

    @cached_property
    def _adapter(self) -> TypeAdapter[R]:
        return TypeAdapter(self.kind)

    def text(self, record: R) -> str:
        return compact_json({**self._adapter.dump_python(record), **self.former})

    def record(self, text: str) -> R:
        # Not `validate_json`, which refuses the half of a surrogate pair that a request may have in a text.
        return self._adapter.validate_python(json.loads(text))


_LONG_AGO = "1970-01-01T00:00:00.000Z"
_FORMER_OF_VOLUMES: Document = {"created_by": "", "modified_by": "", "created": _LONG_AGO, "modified": _LONG_AGO}
VOLUMES = Table("volumes", Volume, _FORMER_OF_VOLUMES, index="marks")
CLIENTS = Table("clients", Client, {"created": _LONG_AGO})
ATTACHMENTS = Table("attachments", Attachment, {"attachments_version": 1})
REPORTS = Table("reports", Report, {"attachments_version": 1, "version": 1, "report_id": 1})
TOTALS = Table("totals", Totals)
FACTS = Table("facts", Fact)
SNAPSHOTS = Table("snapshots", Snapshot, index="volume_uuid")
SNAPSHOT_GROUPS = Table("snapshotGroups", SnapshotGroup)
EXPORTS = Table("exports", Fact)
"""One for each attachment with a port: a version that knows no exports would give their volumes to second writers, and
refuses a pool with records of an unknown kind."""
TABLES: tuple[Table[Any], ...] = (
    VOLUMES, CLIENTS, ATTACHMENTS, REPORTS, TOTALS, FACTS, SNAPSHOTS, SNAPSHOT_GROUPS, EXPORTS,
)  # fmt: skip
