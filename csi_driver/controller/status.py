# SPDX-License-Identifier: Apache-2.0
"""The status page's view of the storage clusters, read from their managements. A page costs up to four requests."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice, takewhile
from typing import Protocol, TypeVar

from csi_driver.controller.ports import Management
from csi_driver.controller.volume_metadata import csi_name_of, source_of
from csi_driver.deadline import Deadline
from csi_driver.errors import StorageUnavailable
from csi_driver.model import VolumeHandle, is_volume_name
from csi_driver.status_page import model as shown
from csi_driver.status_page.model import PAGE_ROWS, Part, Wanted
from csi_driver.storage_model import (
    Client,
    ClientStatus,
    DesiredAttachment,
    DeviceReport,
    DeviceStatus,
    Snapshot,
    StorageEncryption,
    Volume,
    VolumeSummary,
)

_REQUEST_S = 10.0
_MOST_SNAPSHOTS = 500
"""Of one volume; NVMesh has none."""

Named = TypeVar("Named", VolumeSummary, Snapshot)


class StatusManagement(Management, Protocol):
    """The storage management of one cluster, with the requests that only the status page sends."""

    def accepts(self, username: str, password: str, *, deadline: Deadline) -> bool:
        """Return whether a login with these credentials succeeds. One attempt; nothing of it is kept."""

    def volume_count(self, *, deadline: Deadline) -> int | None:
        """Return the number of volumes, None if the management does not give it."""

    def client_states(self, *, deadline: Deadline) -> list[Client]:
        """Return all clients without their attachments."""


class StatusClusters(Protocol):
    def zones(self) -> Sequence[str]: ...

    def management(self, zone: str) -> StatusManagement | None: ...


@dataclass(frozen=True, slots=True)
class ClusterStatus:
    clusters: StatusClusters
    driver_name: str
    is_ordered = False

    @property
    def title(self) -> str:
        return f"Storage of {self.driver_name}"

    def zones(self) -> Sequence[str]:
        return self.clusters.zones()

    def accepts(self, zone: str, username: str, password: str) -> bool:
        return self._in(zone).accepts(username, password, deadline=_deadline())

    def _in(self, zone: str) -> StatusManagement:
        management = self.clusters.management(zone)
        if management is None:
            raise StorageUnavailable(f"zone {zone} is no longer configured")
        return management

    def overview(self, zone: str) -> shown.Overview:
        management, deadline = self._in(zone), _deadline()
        info = management.system_info(deadline=deadline)
        space = management.raw_space(deadline=deadline)
        total, free = (None, None) if space is None else (space.total_bytes, space.free_bytes)
        why = "" if free else "no drive of a storage target that is up has free space"
        return shown.Overview(
            version=f"Zone {zone}, management {info.version}, API {info.api_version}",
            capacity=shown.Capacity(total=total, available=free),
            checks=[shown.Check("Management"), shown.Check("Free space", why)],
            volumes=management.volume_count(deadline=deadline),
        )

    def volumes(self, zone: str, wanted: Wanted) -> Part[shown.Volume]:
        management, deadline = self._in(zone), _deadline()

        def listed(after: str, limit: int) -> Iterator[VolumeSummary]:
            return management.volumes(after=after, limit=limit, deadline=deadline)

        rows, following = _rows(wanted, listed)
        visible = (row for row in rows if not row.is_reserved and not row.name.endswith("_MD"))
        return Part([_volume(row) for row in visible], next=following)

    def snapshots(self, zone: str, wanted: Wanted) -> Part[shown.Snapshot]:
        management, deadline = self._in(zone), _deadline()
        if not management.system_info(deadline=deadline).features.snapshots:
            return Part((), total=0)

        def listed(after: str, limit: int) -> Iterator[Snapshot]:
            return management.snapshots(after=after, limit=limit, deadline=deadline)

        rows, following = _rows(wanted, listed)
        return Part([_snapshot(row) for row in rows], next=following)

    def volume(self, zone: str, name: str, at: str) -> shown.VolumeDetails | None:
        management, deadline = self._in(zone), _deadline()
        volume = management.volume(name, deadline=deadline)
        if volume is None:
            return None
        clients = management.clients_holding(volume.uuid, deadline=deadline)
        snapshots: Iterable[Snapshot] = ()
        if management.system_info(deadline=deadline).features.snapshots:
            snapshots = management.snapshots(
                after="", limit=_MOST_SNAPSHOTS, volume_uuid=volume.uuid, deadline=deadline
            )
        rows, source = [_snapshot(row) for row in snapshots], _source(volume)
        return shown.VolumeDetails(
            volume=_volume(volume),
            facts=list(_facts(volume)),
            attachments=[_attachment(client, volume.uuid, volume.name) for client in clients],
            ancestors=() if source is None else (source,),
            snapshots=Part(rows, total=len(rows) if len(rows) < _MOST_SNAPSHOTS else None),
        )

    def nodes(self, zone: str) -> Sequence[shown.Node]:
        clients = self._in(zone).client_states(deadline=_deadline())
        rows = [shown.Node(each.id, _words(each.status.name), each.status is ClientStatus.READY) for each in clients]
        return sorted(rows, key=lambda node: (node.is_up, node.name))

    def attachments(self, zone: str, node: str, at: str) -> Part[shown.Attachment]:
        client = self._in(zone).client(node, deadline=_deadline())
        if client is None:
            return Part((), total=0)
        names = {uuid: report.volume_name for uuid, report in client.devices.items() if client.holds(uuid)}
        names |= {uuid: wanted.volume_name for uuid, wanted in client.desired.items()}
        ordered = sorted(names.items(), key=lambda item: (item[1], item[0]))
        return shown.part_of(ordered, at, lambda item: _attachment(client, *item))


def _deadline() -> Deadline:
    return Deadline.after(_REQUEST_S)


def _rows(wanted: Wanted, listed: Callable[[str, int], Iterator[Named]]) -> tuple[list[Named], str | None]:
    """Return the rows of a part of a list in the order of names, and where the next one begins."""
    prefix, below = wanted.prefix, ""
    if prefix:
        if not is_volume_name(prefix):
            return [], None  # no name begins so
        below = prefix[:-1] + chr(ord(prefix[-1]) - 1) + "\x7f"  # above it is the prefix, and what begins with it
    after = wanted.at if is_volume_name(wanted.at) else ""
    found = takewhile(lambda row: row.name.startswith(prefix), listed(max(below, after), PAGE_ROWS + 1))
    rows = list(islice(found, PAGE_ROWS + 1))
    return rows[:PAGE_ROWS], rows[PAGE_ROWS - 1].name if len(rows) > PAGE_ROWS else None


def _volume(volume: VolumeSummary) -> shown.Volume:
    return shown.Volume(
        name=volume.name,
        size_bytes=volume.size_bytes,
        state=volume.status if volume.action in ("", "none") else f"{volume.status}, {volume.action}",
        health=volume.health,
        encryption=_encryption(volume.encryption),
        source=_source(volume),
        attached=volume.reservation.attached if isinstance(volume, Volume) else None,
        claim=shown.claim_in(volume.metadata),
    )


def _encryption(encryption: StorageEncryption | None) -> str:
    if encryption is None:
        return "none"
    return "by the storage" if encryption.is_initialized else "by the storage, not initialized yet"


def _source(volume: VolumeSummary) -> shown.Source | None:
    source = source_of(volume.metadata)
    if source is None:
        return None
    handle = VolumeHandle.parse(source.id)
    return shown.Source(source.kind.value, handle.name if handle is not None else source.id)


def _facts(volume: Volume) -> Iterator[tuple[str, str]]:
    yield "UUID", volume.uuid
    if name := csi_name_of(volume.metadata):
        yield "PersistentVolume", name
    if (claim := shown.claim_in(volume.metadata)) and claim != name:
        yield "Claim", claim
    yield "Requested", f"{volume.capacity_gb:g} GB"
    yield "Provisioning group", volume.vpg or "none"
    yield "Layout", volume.layout.raid_level.value
    reservation = volume.reservation
    by = f", by {reservation.reserved_by}" if reservation.reserved_by else ""
    yield "Reservation", f"{reservation.mode.name}{by}, version {reservation.version}"
    yield "Encryption", _encryption(volume.encryption)
    if volume.description:
        yield "Description", volume.description


def _snapshot(snapshot: Snapshot) -> shown.Snapshot:
    return shown.Snapshot(
        name=snapshot.name,
        volume=snapshot.volume_name,
        size_bytes=snapshot.size_bytes,
        created=f"{snapshot.created:%Y-%m-%d %H:%M:%S}" if snapshot.is_ready else "",
        state="ready" if snapshot.is_ready else "being cut",
        group=snapshot.group_name or "",
        is_encrypted=snapshot.encryption is not None,
    )


def _attachment(client: Client, uuid: str, name: str) -> shown.Attachment:
    wanted, report = client.desired.get(uuid), client.devices.get(uuid)
    is_ready = client.status is ClientStatus.READY
    return shown.Attachment(
        volume=name,
        node=client.id,
        reservation=wanted.mode.name if wanted is not None else report.mode.name if report is not None else "NONE",
        state=_state(wanted, report),
        io="unknown" if report is None or not is_ready else "enabled" if report.io_enabled else "disabled",
        problem="" if is_ready else f"the storage client is {_words(client.status.name)}",
    )


def _state(wanted: DesiredAttachment | None, report: DeviceReport | None) -> str:
    if wanted is None or wanted.is_detaching:
        return "detaching"
    if report is None or report.status in (DeviceStatus.DETACHED, DeviceStatus.DETACHED_AFTER_SHUTDOWN):
        return "attaching"
    return _words(report.status.name)


def _words(name: str) -> str:
    return name.lower().replace("_", " ")
