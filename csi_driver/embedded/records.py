"""What the manager keeps: volumes, clients, attachments, reports, VPGs. Each goes to and from one JSON object."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field, replace
from typing import Generic, TypeVar

from csi_driver.embedded.layouts import Layout
from csi_driver.embedded.refusals import Document

NONE, SHARED_READ_ONLY, SHARED_READ_WRITE, EXCLUSIVE_READ_WRITE = 0, 1, 2, 3
MODES = {
    "SHARED_READ_ONLY": SHARED_READ_ONLY,
    "SHARED_READ_WRITE": SHARED_READ_WRITE,
    "EXCLUSIVE_READ_WRITE": EXCLUSIVE_READ_WRITE,
}
MODE_NAMES = {NONE: "NONE", **{number: name for name, number in MODES.items()}}

DETACHED, ATTACHED = 2, 4
"""block_devices[].vol_status"""
READY, DOWN = 1, 5
"""client_status"""


@dataclass(frozen=True, slots=True)
class Reservation:
    """Who may use a volume and how, cluster-wide. Every transition adds one to `version`."""

    mode: int = NONE
    version: int = 1
    reserved_by: str | None = None
    attached: tuple[str, ...] = ()
    last_transition: str | None = None


@dataclass(frozen=True, slots=True)
class Encryption:
    """How far the storage is with encrypting a volume. `command` is the latest one, as the API shows it."""

    header_mib: int = 16
    initialized: bool = False
    command: Document = field(default_factory=dict)
    last_message: Document = field(default_factory=dict)

    @property
    def index(self) -> int:
        """Number of the latest command; 0 = there was none."""
        number = self.command.get("commandIndex")
        return number if isinstance(number, int) else 0


@dataclass(frozen=True, slots=True)
class Volume:
    name: str
    uuid: str
    capacity: float
    """Decimal gigabytes as asked for; the true size is `blocks`."""
    extents: tuple[int, ...]
    """Blocks of the first allocation and of every extension."""
    layout: Layout
    group: str | None
    """The VPG it was made from."""
    given: Document
    """Fields of the request that are only kept and shown."""
    created_by: str
    modified_by: str
    created: str
    modified: str
    version: int = 1
    action: str = "none"
    status: str = "online"
    health: str = "healthy"
    from_reserved: int = 0
    """Blocks of data taken from the VPG's reserved space."""
    made: bool = False
    """Its file is known to be on disk and may hold data: never to be made anew."""
    reservation: Reservation = field(default_factory=Reservation)
    encryption: Encryption | None = None

    @property
    def blocks(self) -> int:
        return sum(self.extents)

    @property
    def bytes(self) -> int:
        return self.blocks * 4096

    @property
    def least_bytes(self) -> int:
        """Length that its file, once made, never lacks: a crash may leave out the latest extension alone."""
        return sum(self.extents[:-1] or self.extents) * 4096

    @property
    def read_only(self) -> bool:
        return self.given.get("isReadOnly") is True

    @property
    def ready(self) -> bool:
        """Whether clients may have it: not before its encryption has begun."""
        return self.encryption is None or self.encryption.initialized


@dataclass(frozen=True, slots=True)
class Group:
    """A volume provisioning group (VPG): a named layout, with reserved space if `blocks` is not 0."""

    name: str
    uuid: str
    layout: Layout
    capacity: float = 0
    blocks: int = 0
    used: int = 0
    """Reserved blocks of data that volumes have taken."""
    overflow: bool = True
    built_in: bool = False
    given: Document = field(default_factory=dict)
    created: str = ""
    modified: str = ""
    version: int = 1
    encryption: Encryption | None = None
    """What its volumes begin with."""
    reclaiming: bool = False
    """Its unused reserve is being given back."""


@dataclass(frozen=True, slots=True)
class Client:
    name: str
    uuid: str
    created: str
    status: int = READY
    attachments_version: int = 0
    report_id: int = 0


@dataclass(frozen=True, slots=True)
class Attachment:
    """The wish that a volume be attached to a client, or detached from it."""

    client: str
    volume: str
    uuid: str
    action: str
    """attaching (as long as it is to be attached) or detaching."""
    reservation: Document
    references: tuple[str, ...]
    attachments_version: int
    version: int = 1
    force: bool | None = None

    @property
    def mode(self) -> int:
        mode = self.reservation.get("mode")
        return mode if isinstance(mode, int) else NONE

    @property
    def read_only(self) -> bool:
        return self.mode == SHARED_READ_ONLY


@dataclass(frozen=True, slots=True)
class Report:
    """What a client says of one volume: a row of its block_devices."""

    client: str
    volume: str
    uuid: str
    status: int
    io_enabled: int
    reservation: Document
    references: tuple[str, ...]
    attachments_version: int
    version: int
    report_id: int


@dataclass(frozen=True, slots=True)
class Totals:
    """Blocks promised, kept beside every change and verified at start."""

    volumes: int = 0
    data: int = 0
    redundancy: int = 0
    reserved: int = 0
    """Raw blocks set aside for VPGs."""
    from_reserved: int = 0
    """Raw blocks of volumes that came out of those."""

    @property
    def promised(self) -> int:
        return self.data + self.redundancy - self.from_reserved + self.reserved

    def with_volume(self, volume: Volume, sign: int = 1) -> Totals:
        """Return the totals with a volume added, or taken away for sign -1."""
        redundancy = volume.layout.redundancy_of(volume.blocks)
        taken = volume.from_reserved + volume.layout.redundancy_of(volume.from_reserved)
        return replace(
            self,
            volumes=self.volumes + sign,
            data=self.data + sign * volume.blocks,
            redundancy=self.redundancy + sign * redundancy,
            from_reserved=self.from_reserved + sign * taken,
        )

    def with_group(self, group: Group, sign: int = 1) -> Totals:
        """Return the totals with a VPG's reserved space added, or taken away for sign -1."""
        raw = group.blocks + group.layout.redundancy_of(group.blocks)
        return replace(self, reserved=self.reserved + sign * raw)


@dataclass(frozen=True, slots=True)
class Fact:
    """One value that belongs to the pool as a whole."""

    value: str


R = TypeVar("R")


@dataclass(frozen=True, slots=True)
class Table(Generic[R]):
    """A kind of record: its name in the database and how a record becomes text and back."""

    name: str
    decode: Callable[[Mapping[str, object]], R]

    def text(self, record: R) -> str:
        return json.dumps(asdict(record), separators=(",", ":"))  # type: ignore[call-overload]

    def record(self, text: str) -> R:
        return self.decode(json.loads(text))


def _kept(kind: Callable[..., R], *tuples: str) -> Callable[[Mapping[str, object]], R]:
    def decode(stored: Mapping[str, object]) -> R:
        fields = dict(stored)
        for name in tuples:
            fields[name] = tuple(fields[name])  # type: ignore[arg-type]
        return kind(**fields)

    return decode


def _volume(stored: Mapping[str, object]) -> Volume:
    layout = Layout(**stored["layout"])  # type: ignore[arg-type]
    reservation = _kept(Reservation, "attached")(stored["reservation"])  # type: ignore[arg-type]
    own = {"layout": layout, "reservation": reservation, "encryption": _encryption(stored)}
    return _kept(Volume, "extents")({**stored, **own})


def _group(stored: Mapping[str, object]) -> Group:
    own = {"layout": Layout(**stored["layout"]), "encryption": _encryption(stored)}  # type: ignore[arg-type]
    return _kept(Group)({**stored, **own})


def _encryption(stored: Mapping[str, object]) -> Encryption | None:
    kept = stored.get("encryption")
    return Encryption(**kept) if isinstance(kept, dict) else None


VOLUMES: Table[Volume] = Table("volumes", _volume)
GROUPS: Table[Group] = Table("groups", _group)
CLIENTS: Table[Client] = Table("clients", _kept(Client))
ATTACHMENTS: Table[Attachment] = Table("attachments", _kept(Attachment, "references"))
REPORTS: Table[Report] = Table("reports", _kept(Report, "references"))
TOTALS: Table[Totals] = Table("totals", _kept(Totals))
FACTS: Table[Fact] = Table("facts", _kept(Fact))
TABLES: tuple[Table[object], ...] = (VOLUMES, GROUPS, CLIENTS, ATTACHMENTS, REPORTS, TOTALS, FACTS)  # type: ignore[assignment]
