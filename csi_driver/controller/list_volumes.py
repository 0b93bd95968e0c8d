# SPDX-License-Identifier: Apache-2.0
"""ListVolumes, ControllerGetVolume, and the volume health RPCs (CSI 1.13, alpha) that use the same pages."""

from __future__ import annotations

import base64
import binascii
import hashlib
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import TypeVar

from csi_driver.controller.ports import Clusters, Management
from csi_driver.controller.volume_lookup import described, listed_handles, require
from csi_driver.controller.volume_metadata import csi_name_of
from csi_driver.controller.zones import ask
from csi_driver.deadline import Deadline
from csi_driver.errors import StaleToken, shown
from csi_driver.model import ListedVolume, Reason, Segments, VolumeEntry, VolumeFault, VolumeHealth, each_once
from csi_driver.settings import ControllerSettings
from csi_driver.storage_model import Client, ClientStatus, DeviceStatus, Snapshot, VolumeSummary

T = TypeVar("T", VolumeSummary, Snapshot)
_log = logging.getLogger(__name__)

PAGE_BYTES = 3 << 20
"""The entry that exceeds it is the last of a page, also without `max_entries`: gRPC clients accept 4 MiB by default,
and external-attacher, which asks for everything, follows tokens."""

_VERSION = "v1."
"""Distinguishes tokens of volumes from those of other lists and versions."""
_LAST = "~"
"""Sorts after the marks of all handles of a volume."""


@dataclass(frozen=True, slots=True)
class Position:
    """The last entry of a page: its zone (hashed, tokens are short), its volume, and which handle of the volume."""

    zone_mark: str
    name: str
    handle_mark: str = _LAST

    def token(self, kind: str = _VERSION) -> str:
        text = f"{self.zone_mark}\n{self.name}\n{self.handle_mark}"
        return kind + base64.urlsafe_b64encode(text.encode()).decode().rstrip("=")


def read_token(token: str, kind: str = _VERSION) -> Position:
    encoded = token.removeprefix(kind)
    try:
        if encoded == token:
            raise ValueError("of another list or version")
        text = base64.b64decode(encoded + "=" * (-len(encoded) % 4), altchars=b"-_", validate=True).decode()
        zone_mark, name, handle_mark = text.split("\n")
    except (binascii.Error, ValueError) as error:
        raise StaleToken(f"starting_token {shown(token)} is not of this list; start again without a token") from error
    return Position(zone_mark, name, handle_mark)


def mark_of(text: str) -> str:
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()[:8]


def zones_from(zones: Sequence[str], start: Position | None, token: str) -> list[str]:
    """Return the zones in the order of lists, from that of the position on. Raises `StaleToken` if it is gone."""
    ordered = sorted(zones)
    if start is None:
        return ordered
    at = next((index for index, zone in enumerate(ordered) if mark_of(zone) == start.zone_mark), None)
    if at is None:
        raise StaleToken(
            f"starting_token {shown(token)} names a zone that is no longer configured; start again without a token"
        )
    return ordered[at:]


def each_after(after: str, page: int, listed: Callable[..., Iterator[T]]) -> Iterator[T]:
    """Yield the objects of a zone with names above `after`, sorted by name; with a size of pages, only those needed.

    `listed`: returns up to `limit` objects above `after`.
    """
    while True:
        # One more than the page shows whether there is a next one.
        count = 0
        for each in listed(after=after, limit=page + 1 if page else 0):
            yield each
            count, after = count + 1, each.name
        if not page or count <= page:
            return


_Entry = tuple[str, str, ListedVolume, VolumeSummary, Sequence[Client]]
"""The marks of zone and handle, and the clients that hold the volume."""


@dataclass(slots=True)
class ListVolumes:
    clusters: Clusters
    settings: ControllerSettings
    _reported: set[str] = field(default_factory=set)

    def volumes(
        self, max_entries: int, starting_token: str, add: Callable[[ListedVolume], int], *, deadline: Deadline
    ) -> str:
        """Add one page (0 = as much as a message can hold); return the token of the next, empty at the end.

        Every volume is listed with its issued handle, and again with each other handle that is attached now. `add`
        returns the bytes of the entry in the message.
        """
        return self.page(
            max_entries,
            starting_token,
            lambda listed, _volume, _clients: add(listed),
            with_devices=False,
            deadline=deadline,
        )

    def page(
        self,
        max_entries: int,
        starting_token: str,
        add: Callable[[ListedVolume, VolumeSummary, Sequence[Client]], int],
        *,
        with_devices: bool,
        deadline: Deadline,
    ) -> str:
        """Add one page; `with_devices`: of clients that have their reports of devices."""
        size, last = 0, ("", "", "")
        entries = self._entries(starting_token, max_entries, with_devices=with_devices, deadline=deadline)
        for count, (zone_mark, handle_mark, listed, volume, clients) in enumerate(entries):
            if count and (size > PAGE_BYTES or count == max_entries):
                return Position(*last).token()
            size += add(listed, volume, clients)
            last = zone_mark, volume.name, handle_mark
        return ""

    def volume(self, volume_id: str, *, deadline: Deadline) -> ListedVolume:
        located = require(self.clusters, volume_id, deadline=deadline)
        uuid = located.volume.uuid
        held = _held(located.management.clients_holding(uuid, deadline=deadline), uuid)
        topology = ({self.settings.topology_key: located.zone},)
        shape = described(located.zone, located.volume, topology, volume_id)
        return ListedVolume(shape, held.get(located.reference, ()))

    def _entries(self, starting_token: str, page: int, *, with_devices: bool, deadline: Deadline) -> Iterator[_Entry]:
        start = read_token(starting_token) if starting_token else None
        zones = zones_from(self.clusters.zones(), start, starting_token)

        def in_zone(zone: str) -> Iterator[_Entry]:
            management = self.clusters.management(zone)
            if management is None:
                return iter(())
            first = start if zone == zones[0] else None
            clients = management.clients(with_devices=with_devices, deadline=deadline)
            return self._entries_in(zone, clients, _volumes_from(management, first, page, deadline=deadline), first)

        if page or len(zones) == 1:
            for zone in zones:
                yield from in_zone(zone)
            return
        # A zone that cannot be asked fails the call: a volume that is left out would look deleted.
        found = ask(zones, lambda zone: list(in_zone(zone)), deadline=deadline).all()
        self._report_duplicates(found)
        for zone in zones:
            yield from found[zone]

    def _report_duplicates(self, found: Mapping[str, Sequence[_Entry]]) -> None:
        """Log, once each, the volumes that exist in two zones after a crash or a skipped zone; nothing is deleted."""
        volumes: dict[str, dict[str, VolumeSummary]] = {}
        for zone, entries in found.items():
            for *_, volume, _ in entries:
                volumes.setdefault(volume.name, {})[zone] = volume
        for name, by_zone in volumes.items():
            if len(by_zone) == 1 or name in self._reported:
                continue
            self._reported.add(name)
            csi_names = {csi_name_of(volume.metadata) for volume in by_zone.values()}
            if len(csi_names) == 1 and None not in csi_names:
                places = ", ".join(f"zone {zone} (uuid {volume.uuid})" for zone, volume in sorted(by_zone.items()))
                _log.warning(
                    "volume %s of the CSI name %s exists in several zones: %s; a crash or a skipped zone has left one "
                    "of them, delete the one that no PersistentVolume names",
                    *(name, shown(csi_names.pop()), places),
                )

    def _entries_in(
        self, zone: str, clients: Sequence[Client], volumes: Iterator[VolumeSummary], start: Position | None
    ) -> Iterator[_Entry]:
        holders: dict[str, list[Client]] = {}
        for client in clients:
            for uuid in client.desired:
                holders.setdefault(uuid, []).append(client)
        zone_mark, topology = mark_of(zone), ({self.settings.topology_key: zone},)
        for volume in volumes:
            if volume.is_reserved or volume.is_being_deleted or volume.name.endswith("_MD"):
                continue
            held_by = holders.get(volume.uuid)
            if held_by is None:
                yield zone_mark, _LAST, ListedVolume(described(zone, volume, topology), ()), volume, ()
                continue
            after = start.handle_mark if start is not None and volume.name == start.name else ""
            for handle_mark, listed in _handles(zone, volume, topology, held_by):
                if handle_mark > after:
                    yield zone_mark, handle_mark, listed, volume, held_by


def _handles(
    zone: str, volume: VolumeSummary, topology: tuple[Segments, ...], clients: Sequence[Client]
) -> Iterator[tuple[str, ListedVolume]]:
    """Yield the entries of one volume, sorted by the marks of their handles; the last has the mark `_LAST`."""
    held = _held(clients, volume.uuid)
    (issued, reference), *others = listed_handles(zone, volume, held)
    entries = [("!", issued, reference), *sorted((mark_of(text), text, other) for text, other in others)]
    for number, (handle_mark, volume_id, reference) in enumerate(entries, 1):
        shape = described(zone, volume, topology, volume_id)
        yield _LAST if number == len(entries) else handle_mark, ListedVolume(shape, held.get(reference, ()))


def _volumes_from(
    management: Management, start: Position | None, page: int, *, deadline: Deadline
) -> Iterator[VolumeSummary]:
    """Yield volumes sorted by name, from the one in which the last page ended, if it has more handles."""
    after = start.name if start is not None else ""
    if start is not None and start.handle_mark != _LAST:
        unfinished = management.volume(start.name, deadline=deadline)
        if unfinished is not None:
            yield unfinished
    yield from each_after(after, page, partial(management.volumes, deadline=deadline))


def _held(clients: Sequence[Client], uuid: str) -> dict[str, tuple[str, ...]]:
    """Return the ids of the nodes with an attachment of the volume, by its reference id."""
    held: dict[str, tuple[str, ...]] = {}
    for client in clients:
        desired = client.desired.get(uuid)
        if desired is not None and not desired.is_detaching:
            for reference in desired.references:
                held[reference] = (*held.get(reference, ()), client.node_id)
    return held


_CONDITIONS: Mapping[str, tuple[VolumeFault, Reason]] = {
    "offline": (VolumeFault.INACCESSIBLE, Reason.VOLUME_OFFLINE),
    "unavailable": (VolumeFault.INACCESSIBLE, Reason.VOLUME_UNAVAILABLE),
    "degraded": (VolumeFault.DEGRADED, Reason.VOLUME_DEGRADED),
    "alarm": (VolumeFault.DEGRADED, Reason.VOLUME_ALARM),
    "critical": (VolumeFault.DEGRADED, Reason.VOLUME_CRITICAL),
}
"""By the volume's status, or else by its health."""
_REBUILDING = frozenset({"rebuildRequired", "markedForRebuild", "rebuilding"})
_FAILED = frozenset({DeviceStatus.ATTACH_FAILED, DeviceStatus.RESERVATION_DENIED})


@dataclass(frozen=True, slots=True)
class GetVolumeHealth:
    listing: ListVolumes

    def volume(self, volume_id: str, *, deadline: Deadline) -> VolumeHealth:
        located = require(self.listing.clusters, volume_id, deadline=deadline)
        clients = located.management.clients_holding(located.volume.uuid, deadline=deadline)
        return VolumeHealth(volume_id, find_faults(located.volume, clients))

    def volumes(
        self, max_entries: int, starting_token: str, add: Callable[[VolumeHealth], int], *, deadline: Deadline
    ) -> str:
        """Add one page, as `ListVolumes` does."""

        def added(listed: ListedVolume, volume: VolumeSummary, clients: Sequence[Client]) -> int:
            return add(VolumeHealth(listed.volume.volume_id, find_faults(volume, clients)))

        return self.listing.page(max_entries, starting_token, added, with_devices=True, deadline=deadline)


def find_faults(volume: VolumeSummary, clients: Sequence[Client]) -> tuple[VolumeEntry, ...]:
    found = list(_faults_of(volume))
    for client in clients:
        found.extend(_faults_of_attachment(volume, client))
    return each_once(found)


def _faults_of(volume: VolumeSummary) -> Iterator[VolumeEntry]:
    if volume.is_being_made:
        return
    message = f"the storage management reports status {volume.status}, health {volume.health}, action {volume.action}"
    condition = next((_CONDITIONS[word] for word in (volume.status, volume.health) if word in _CONDITIONS), None)
    if condition is not None:
        yield VolumeEntry(*condition, message)
    if volume.action in _REBUILDING:
        yield VolumeEntry(VolumeFault.DEGRADED, Reason.VOLUME_REBUILDING, message)


def _faults_of_attachment(volume: VolumeSummary, client: Client) -> Iterator[VolumeEntry]:
    desired = client.desired.get(volume.uuid)
    if desired is None or desired.is_detaching:
        return
    report = client.devices.get(volume.uuid)
    if client.status is ClientStatus.DOWN:
        lost = "has no connection to it" if client.connects_on_demand else "is down"
        yield VolumeEntry(VolumeFault.INACCESSIBLE, Reason.NODE_DOWN, f"it is attached to {client.id}, which {lost}")
    elif report is not None and report.status in _FAILED:
        message = f"{client.id} reports {report.status.name} for it"
        yield VolumeEntry(VolumeFault.INACCESSIBLE, Reason.ATTACH_FAILED, message)
    elif report is not None and report.status is DeviceStatus.ATTACHED and not report.io_enabled:
        yield VolumeEntry(VolumeFault.INACCESSIBLE, Reason.IO_DISABLED, f"{client.id} has I/O disabled for it")
