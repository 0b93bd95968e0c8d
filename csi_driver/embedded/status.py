# SPDX-License-Identifier: Apache-2.0
"""The status page's view of the embedded manager. A part of a list reads its own rows alone."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import TypeVar

from csi_driver.background import Background
from csi_driver.embedded.attacher import Attacher
from csi_driver.embedded.documents import VERSION
from csi_driver.embedded.layouts import BLOCK_SIZE
from csi_driver.embedded.model import (
    ATTACHED,
    ATTACHMENTS,
    CLIENTS,
    MODE_NAMES,
    NO_ACTION,
    REPORTS,
    RESERVATION_DENIED,
    SNAPSHOTS,
    UNHEALTHY,
    VOLUMES,
    Attachment,
    Report,
    Snapshot,
    Source,
    Table,
    Volume,
)
from csi_driver.embedded.pool import Pool
from csi_driver.embedded.sessions import Sessions
from csi_driver.embedded.settings import StorageSettings
from csi_driver.embedded.store import Store
from csi_driver.errors import HostFailure
from csi_driver.status_page import model as shown
from csi_driver.status_page.model import Part, Wanted, claim_in, numbered_part, place_in, readable

R = TypeVar("R")
Row = TypeVar("Row")

_ZONE = "storage"
_MOST_COPIES, _MOST_ANCESTORS = 20, 32


@dataclass(eq=False)
class EmbeddedStatus:
    settings: StorageSettings
    store: Store
    pool: Pool
    attacher: Attacher
    sessions: Sessions
    pool_bytes: Callable[[], Mapping[str, int]]
    loops: Sequence[Background]
    is_ordered: bool = True

    @property
    def title(self) -> str:
        return f"Storage manager on {self.settings.host_name}"

    def zones(self) -> Sequence[str]:
        return (_ZONE,)

    def accepts(self, zone: str, username: str, password: str) -> bool:
        return self.sessions.accepts(username, password)

    def overview(self, zone: str) -> shown.Overview:
        store, names = self.store, [client.name for client in self.store.all(CLIENTS)]
        has = self.pool_bytes()
        _, unhealthy = store.span(VOLUMES, "", UNHEALTHY)
        return shown.Overview(
            version=f"Version {VERSION}, pool {self.pool.directory}",
            capacity=shown.Capacity(has["capacity"], has["promised"], has["shared"], has["available"]),
            checks=list(self._checks(has["available"], unhealthy)),
            volumes=store.count(VOLUMES),
            unhealthy=unhealthy,
            attachments=sum(store.count(ATTACHMENTS, name) for name in names),
            snapshots=store.count(SNAPSHOTS),
        )

    def _checks(self, free_bytes: int, unhealthy: int) -> Iterable[shown.Check]:
        least = self.settings.reserve_bytes
        short = f"{free_bytes} bytes are free, expected at least {least} (--reserve); new volumes are refused"
        yield shown.Check("Pool", self.pool.why_unusable())
        yield shown.Check("Free space", "" if free_bytes >= least else short)
        why = f"{unhealthy} of {self.store.count(VOLUMES)} not healthy; the recent errors give the reasons"
        yield shown.Check("Volumes", why if unhealthy else "")
        for loop in self.loops:
            yield shown.Check(f"Background work: {loop.name}", loop.why_failing())

    def volumes(self, zone: str, wanted: Wanted) -> Part[shown.Volume]:
        index = UNHEALTHY if wanted.unhealthy else ""
        return self._part(VOLUMES, wanted, index, _volume)

    def snapshots(self, zone: str, wanted: Wanted) -> Part[shown.Snapshot]:
        return self._part(SNAPSHOTS, wanted, "", _snapshot)

    def _part(self, table: Table[R], wanted: Wanted, index: str, form: Callable[[R], Row]) -> Part[Row]:
        below, total = self.store.span(table, wanted.prefix, index)
        number, before, count = place_in(total, wanted.at)
        skip = total - before - count if wanted.descending else before
        rows = self.store.page(table, "", below + skip, count, index) if count else []
        return numbered_part([form(row) for row in (reversed(rows) if wanted.descending else rows)], number, total)

    def volume(self, zone: str, name: str, at: str) -> shown.VolumeDetails | None:
        volume = self.store.get(VOLUMES, name)
        if volume is None:
            return None
        _, total = self.store.span(SNAPSHOTS, "", volume.uuid)
        number, before, count = place_in(total, at)
        rows = self.store.page(SNAPSHOTS, "", before, count, volume.uuid) if count else []
        snapshots = [replace(_snapshot(row), copies=self._copies(row.uuid)) for row in rows]
        return shown.VolumeDetails(
            volume=_volume(volume),
            facts=list(self._facts(volume)),
            attachments=list(self._attachments_of(volume)),
            ancestors=self._ancestors(volume),
            snapshots=numbered_part(snapshots, number, total),
            copies=self._copies(volume.uuid),
        )

    def _copies(self, uuid: str) -> Sequence[str]:
        return [copy.name for copy in self.store.page(VOLUMES, "", 0, _MOST_COPIES, uuid)]

    def _ancestors(self, volume: Volume) -> Sequence[shown.Source]:
        """Return the chain of sources, the first one first; a link that was deleted ends it."""
        chain: list[shown.Source] = []
        source = volume.source
        while source is not None and len(chain) < _MOST_ANCESTORS:
            parent_name, parent_uuid = source.name, source.uuid
            snapshot = self.store.get(SNAPSHOTS, source.name) if source.kind == "snapshot" else None
            if snapshot is not None and snapshot.uuid == source.uuid:
                parent_name, parent_uuid = snapshot.volume, snapshot.volume_uuid
            parent = self.store.get(VOLUMES, parent_name)
            is_there = parent is not None and parent.uuid == parent_uuid
            if source.kind == "snapshot":
                chain.append(
                    shown.Source(source.kind, source.name, "" if is_there or snapshot is None else parent_name)
                )
            if parent is None or not is_there:
                if source.kind == "volume":
                    chain.append(shown.Source("deleted volume", source.name))
                break
            chain.append(shown.Source("volume", parent.name))
            source = parent.source
        return chain[::-1]

    def _facts(self, volume: Volume) -> Iterable[tuple[str, str]]:
        reservation, metadata = volume.reservation, volume.given.get("metadata")
        yield "UUID", volume.uuid
        name = metadata.get("csi_name") if isinstance(metadata, dict) else None
        if isinstance(name, str):
            yield "PersistentVolume", name
        if (claim := claim_in(metadata)) and claim != name:
            yield "Claim", claim
        yield "Requested", f"{volume.capacity:g} GB"
        yield "Provisioning group", volume.group or "none"
        held = f", by {reservation.reserved_by}" if reservation.reserved_by else ""
        yield "Reservation", f"{MODE_NAMES[reservation.mode]}{held}, version {reservation.version}"
        yield "Encryption", _encryption(volume)
        yield "File", str(self.pool.file(volume.uuid))
        with suppress(HostFailure):
            yield "Occupied on disk", readable(self.pool.occupied_bytes(self.pool.file(volume.uuid)))
        if volume.shared_blocks:
            yield "Kept for shared blocks", readable(volume.shared_blocks * BLOCK_SIZE)

    # --- nodes and attachments ---

    def nodes(self, zone: str) -> Sequence[shown.Node]:
        directories = {client.name: str(client.device_directory) for client in self.settings.clients}
        nodes = [
            shown.Node(
                client.name,
                "down" if self.attacher.is_down(client.name) else "ready",
                not self.attacher.is_down(client.name),
                self.store.count(ATTACHMENTS, client.name),
                directories.get(client.name, ""),
            )
            for client in self.store.all(CLIENTS)
        ]
        return sorted(nodes, key=lambda node: (node.is_up, node.name))

    def attachments(self, zone: str, node: str, at: str) -> Part[shown.Attachment]:
        total = self.store.count(ATTACHMENTS, node)
        number, before, count = place_in(total, at)
        rows = self.store.page(ATTACHMENTS, "", before, count, grouping=node) if count else []
        return numbered_part([self._attachment(row.volume, row.uuid, node, row) for row in rows], number, total)

    def _attachments_of(self, volume: Volume) -> Iterable[shown.Attachment]:
        clients = (client.name for client in self.store.all(CLIENTS))
        for client in dict.fromkeys((*clients, *self.attacher.holders(volume.uuid))):
            wanted = self.store.get(ATTACHMENTS, volume.uuid, client)
            if wanted is not None or self.attacher.hold(client, volume.uuid) is not None:
                yield self._attachment(volume.name, volume.uuid, client, wanted)

    def _attachment(self, name: str, uuid: str, client: str, wanted: Attachment | None) -> shown.Attachment:
        report, hold = self.store.get(REPORTS, uuid, client), self.attacher.hold(client, uuid)
        problem = self.attacher.why_down(client)
        if hold is not None and hold.is_cut:
            problem = problem or "the device is cut off from its file: another node has taken the volume over"
        if hold is not None and wanted is None:
            problem = problem or "its record is lost; it ends when its client does not use it"
        has_io = report is not None and bool(report.io_enabled) and (hold is None or not hold.is_cut)
        return shown.Attachment(
            volume=name,
            node=client,
            reservation=MODE_NAMES[wanted.mode] if wanted is not None else MODE_NAMES[0],
            state=_state_of(wanted, report),
            io="unknown" if report is None else "enabled" if has_io else "disabled",
            problem=problem,
            device="" if hold is None else hold.place,
            file="" if hold is None else str(hold.file),
        )


def _state_of(wanted: Attachment | None, report: Report | None) -> str:
    if wanted is None or not wanted.is_attaching:
        return "detaching"
    if report is not None and report.status == RESERVATION_DENIED:
        return "reservation denied"
    return "attached" if report is not None and report.status == ATTACHED else "attaching"


def _volume(volume: Volume) -> shown.Volume:
    return shown.Volume(
        name=volume.name,
        size_bytes=volume.bytes,
        state=volume.status if volume.action == NO_ACTION else f"{volume.status}, {volume.action}",
        health=volume.health,
        encryption=_encryption(volume),
        source=_source(volume.source),
        attached=volume.reservation.attached,
        claim=claim_in(volume.given.get("metadata")),
    )


def _encryption(volume: Volume) -> str:
    if volume.encryption is None:
        return "none"
    return "by the storage" if volume.encryption.initialized else "by the storage, not initialized yet"


def _source(source: Source | None) -> shown.Source | None:
    return None if source is None else shown.Source(source.kind, source.name)


def _snapshot(snapshot: Snapshot) -> shown.Snapshot:
    return shown.Snapshot(
        snapshot.name,
        snapshot.volume,
        snapshot.bytes,
        snapshot.created[:19].replace("T", " "),
        "ready" if snapshot.is_ready else snapshot.action,
        snapshot.group or "",
        snapshot.encryption is not None,
    )
