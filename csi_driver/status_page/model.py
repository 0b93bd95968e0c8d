# SPDX-License-Identifier: Apache-2.0
"""Values that the page shows, and the port to the storage: embedded manager and controller implement it.

Sizes are int bytes; None: the engine does not know the value. Texts come from users and programs: they are escaped
where they are shown, not here.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Generic, Protocol, TypeVar

from csi_driver.model import CSI_NAME_PREFIX, VolumeHandle, volume_name

PAGE_ROWS = 50
_KUBERNETES = "csi.storage.k8s.io/"
_UNITS = ("B", "KiB", "MiB", "GiB", "TiB", "PiB", "EiB")
Row = TypeVar("Row")
Item = TypeVar("Item")


@dataclass(frozen=True, slots=True)
class Wanted:
    """Which part of a list to show. `prefix`: how the names begin. `at`: `previous` or `next` of another part."""

    prefix: str = ""
    at: str = ""
    descending: bool = False
    unhealthy: bool = False


@dataclass(frozen=True, slots=True)
class Part(Generic[Row]):
    """A part of a list. `first`: number of its first row, from 1; 0 = unknown, as None in `total`."""

    rows: Sequence[Row]
    total: int | None = None
    first: int = 0
    previous: str | None = None
    next: str | None = None


@dataclass(frozen=True, slots=True)
class Capacity:
    """`promised`: to volumes; `shared`: kept for writes to volumes with snapshots; `available`: free now."""

    total: int | None = None
    promised: int | None = None
    shared: int | None = None
    available: int | None = None


@dataclass(frozen=True, slots=True)
class Check:
    """The health of a part of the storage; `problem`: "" = none."""

    name: str
    problem: str = ""


@dataclass(frozen=True, slots=True)
class Overview:
    version: str
    capacity: Capacity
    checks: Sequence[Check] = ()
    volumes: int | None = None
    unhealthy: int | None = None
    attachments: int | None = None
    snapshots: int | None = None
    nodes: int | None = None


@dataclass(frozen=True, slots=True)
class Source:
    """The volume or snapshot that a volume was made from; `volume`: that of a snapshot, where nothing else shows it."""

    kind: str
    name: str
    volume: str = ""


@dataclass(frozen=True, slots=True)
class Volume:
    name: str
    size_bytes: int
    state: str
    health: str
    encryption: str = "none"
    source: Source | None = None
    attached: Sequence[str] | None = None
    """Names of nodes."""
    claim: str = ""
    """The claim in Kubernetes, or the name of the PersistentVolume where only that is known."""

    @property
    def is_well(self) -> bool:
        return self.health == "healthy"


@dataclass(frozen=True, slots=True)
class Attachment:
    volume: str
    node: str
    reservation: str
    state: str
    io: str
    problem: str = ""
    device: str = ""
    file: str = ""

    @property
    def is_well(self) -> bool:
        return self.state == "attached" and self.io == "enabled"


@dataclass(frozen=True, slots=True)
class Node:
    name: str
    status: str
    is_up: bool
    attachments: int | None = None
    devices: str = ""
    """Directory of its device nodes."""


@dataclass(frozen=True, slots=True)
class Snapshot:
    name: str
    volume: str
    size_bytes: int
    created: str
    state: str
    group: str = ""
    is_encrypted: bool = False
    copies: Sequence[str] = ()
    """Volumes that were made from it; empty where a list does not have them."""


@dataclass(frozen=True, slots=True)
class VolumeDetails:
    """`facts`: pairs of a name and a text. `ancestors`: its source and the sources of that, the first one first."""

    volume: Volume
    facts: Sequence[tuple[str, str]]
    attachments: Sequence[Attachment]
    ancestors: Sequence[Source] = ()
    snapshots: Part[Snapshot] = field(default_factory=lambda: Part(()))
    copies: Sequence[str] = ()


class Storage(Protocol):
    """The storage as the page reads it. Each method may raise DriverError; its message is shown after a login only.

    `is_ordered`: lists also come in descending order, and of unhealthy volumes alone.
    """

    is_ordered: bool

    @property
    def title(self) -> str: ...

    def zones(self) -> Sequence[str]:
        """Return the names of the storage clusters, at least one; each has a login of its own."""

    def accepts(self, zone: str, username: str, password: str) -> bool:
        """Return whether the zone accepts the login. It keeps nothing of it."""

    def overview(self, zone: str) -> Overview: ...

    def volumes(self, zone: str, wanted: Wanted) -> Part[Volume]: ...

    def volume(self, zone: str, name: str, at: str) -> VolumeDetails | None:
        """Return a volume; `at`: which part of its snapshots."""

    def nodes(self, zone: str) -> Sequence[Node]: ...

    def attachments(self, zone: str, node: str, at: str) -> Part[Attachment]: ...

    def snapshots(self, zone: str, wanted: Wanted) -> Part[Snapshot]: ...


def claim_in(metadata: object) -> str:
    """Return the claim that a volume's metadata names, or the name of its PersistentVolume; "" = neither."""
    found = metadata if isinstance(metadata, Mapping) else {}
    texts = [found.get(key) for key in (f"{_KUBERNETES}pvc/namespace", f"{_KUBERNETES}pvc/name", "csi_name")]
    namespace, name, csi_name = (text if isinstance(text, str) else "" for text in texts)
    return f"{namespace}/{name}" if namespace and name else csi_name


def prefix_of(search: str) -> str:
    """Return how the names begin that a user looks for, who may have the name of a PersistentVolume or its handle."""
    text = search.strip()
    if ":" in text and (handle := VolumeHandle.parse(text)) is not None:
        return handle.name
    if text.startswith("pvc-"):
        whole = volume_name("pvc-00000000-0000-0000-0000-000000000000")
        return (CSI_NAME_PREFIX + text.removeprefix("pvc-"))[: len(whole)]
    return text


def part_of(rows: Sequence[Item], at: str, form: Callable[[Item], Row]) -> Part[Row]:
    """Return a part of a list that is at hand."""
    number, before, count = place_in(len(rows), at)
    return numbered_part([form(row) for row in rows[before : before + count]], number, len(rows))


def place_in(total: int, at: str) -> tuple[int, int, int]:
    """Return the number of a part, of how many rows it comes behind, and its rows; the first one for an unknown one."""
    number = int(at) if at.isascii() and at.isdigit() and len(at) < 10 and int(at) * PAGE_ROWS < total else 0
    before = number * PAGE_ROWS
    return number, before, min(PAGE_ROWS, total - before)


def numbered_part(rows: Sequence[Row], number: int, total: int) -> Part[Row]:
    following = str(number + 1) if (number + 1) * PAGE_ROWS < total else None
    return Part(rows, total, number * PAGE_ROWS + 1, str(number - 1) if number else None, following)


def readable(size_bytes: int) -> str:
    """Return a size in the largest unit of which it has at least one."""
    value, unit = float(size_bytes), 0
    while abs(value) >= 1024 and unit < len(_UNITS) - 1:
        value, unit = value / 1024, unit + 1
    return f"{value:.0f} {_UNITS[unit]}" if value == int(value) else f"{value:.1f} {_UNITS[unit]}"
