# SPDX-License-Identifier: Apache-2.0
"""ListVolumes, ControllerGetVolume, and the volume health RPCs (CSI 1.13, alpha) that use the same pages."""

from __future__ import annotations

import base64
import binascii
import hashlib
import logging
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import accumulate

from csi_driver.controller.ports import Clusters, Management
from csi_driver.controller.volume_lookup import described, listed_handles, require
from csi_driver.controller.volume_metadata import read_creation
from csi_driver.controller.zones import Found, ask
from csi_driver.deadline import Deadline
from csi_driver.errors import StaleToken, shown
from csi_driver.model import ListedVolume, Reason, VolumeEntry, VolumeFault, VolumeHealth, each_once
from csi_driver.settings import ControllerSettings
from csi_driver.storage_model import Client, ClientStatus, DeviceStatus, Volume

_log = logging.getLogger(__name__)

_PAGE_BYTES = 3 << 20
"""Limit of a page, also without `max_entries`: gRPC clients accept 4 MiB by default, and external-attacher, which asks
for everything, follows tokens."""
_FIELD_BYTES = 6  # tag and length of a text or of a message within another, at most
_FIXED_BYTES = 64  # numbers, and the messages around

_VERSION = "v1."
_LAST = "~"
"""Sorts after the marks of all handles of a volume."""


@dataclass(frozen=True, slots=True)
class Position:
    """The last entry of a page: its zone (hashed, tokens are short), its volume, and which handle of the volume."""

    zone_mark: str
    name: str
    handle_mark: str = _LAST

    def token(self) -> str:
        text = f"{self.zone_mark}\n{self.name}\n{self.handle_mark}"
        return _VERSION + base64.urlsafe_b64encode(text.encode()).decode().rstrip("=")


def read_token(token: str) -> Position:
    encoded = token.removeprefix(_VERSION)
    try:
        if encoded == token:
            raise ValueError("another version")
        text = base64.b64decode(encoded + "=" * (-len(encoded) % 4), altchars=b"-_", validate=True).decode()
        zone_mark, name, handle_mark = text.split("\n")
    except (binascii.Error, ValueError) as error:
        raise StaleToken(f"starting_token {shown(token)} is not this driver's; start again without a token") from error
    return Position(zone_mark, name, handle_mark)


def _mark(text: str) -> str:
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()[:8]


_Holders = Mapping[str, Mapping[str, tuple[str, ...]]]
"""Volume uuid, then reference id, to the ids of the nodes with such an attachment."""
_Entry = tuple[Position, ListedVolume]


@dataclass(slots=True)
class ListVolumes:
    clusters: Clusters
    settings: ControllerSettings
    _reported: set[str] = field(default_factory=set)

    def volumes(self, max_entries: int, starting_token: str, *, deadline: Deadline) -> tuple[list[ListedVolume], str]:
        """Return one page (0 = as much as a message can hold) and the token of the next, empty at the end.

        Every volume is listed with its issued handle, and again with each other handle that is attached now.
        """
        entries: list[ListedVolume] = []
        last: Position | None = None
        size = 0
        for position, entry in self._entries(starting_token, max_entries, deadline):
            size += listed_bytes(entry)
            if last is not None and (size > _PAGE_BYTES or len(entries) == max_entries):
                return entries, last.token()
            entries.append(entry)
            last = position
        return entries, ""

    def volume(self, volume_id: str, *, deadline: Deadline) -> ListedVolume:
        located = require(self.clusters, volume_id, deadline=deadline)
        holders = _holders(located.management.clients_holding(located.volume.uuid, deadline=deadline))
        return ListedVolume(
            described(located, self.settings.topology_key, volume_id),
            holders.get(located.volume.uuid, {}).get(located.reference, ()),
        )

    def _entries(self, starting_token: str, page: int, deadline: Deadline) -> Iterator[_Entry]:
        start = read_token(starting_token) if starting_token else None
        zones = sorted(self.clusters.zones())
        if start is not None:
            at = next((index for index, zone in enumerate(zones) if _mark(zone) == start.zone_mark), None)
            if at is None:
                raise StaleToken(
                    f"starting_token {shown(starting_token)} names a zone that is no longer configured; "
                    "start again without a token"
                )
            zones = zones[at:]

        def in_zone(zone: str) -> Iterator[_Entry]:
            management = self.clusters.management(zone)
            if management is None:
                return iter(())
            return self._entries_in(zone, management, start if zone == zones[0] else None, page, deadline)

        if page:
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
        volumes: dict[str, dict[str, Volume]] = {}
        for zone, entries in found.items() if len(found) > 1 else ():
            for _, entry in entries:
                if entry.stored is not None:
                    volumes.setdefault(entry.stored.name, {})[zone] = entry.stored
        for name, by_zone in volumes.items():
            if len(by_zone) == 1 or name in self._reported:
                continue
            self._reported.add(name)
            csi_names = {read_creation(volume.metadata).csi_name for volume in by_zone.values()}
            if len(csi_names) == 1 and None not in csi_names:
                places = ", ".join(f"zone {zone} (uuid {volume.uuid})" for zone, volume in sorted(by_zone.items()))
                _log.warning(
                    "volume %s of the CSI name %s exists in several zones: %s; a crash or a skipped zone has left one "
                    "of them, delete the one that no PersistentVolume names",
                    *(name, shown(csi_names.pop()), places),
                )

    def _entries_in(
        self, zone: str, management: Management, start: Position | None, page: int, deadline: Deadline
    ) -> Iterator[_Entry]:
        holders = _holders(management.clients(deadline=deadline))
        zone_mark = _mark(zone)
        for volume in _volumes_from(management, start, page, deadline=deadline):
            if volume.is_reserved or volume.is_being_deleted or volume.name.endswith("_MD"):
                continue
            after = start.handle_mark if start is not None and volume.name == start.name else ""
            found = Found(zone, management, volume, read_creation(volume.metadata))
            for handle_mark, entry in self._entries_of(found, holders.get(volume.uuid, {})):
                if handle_mark > after:
                    yield Position(zone_mark, volume.name, handle_mark), entry

    def _entries_of(self, found: Found, held: Mapping[str, tuple[str, ...]]) -> Iterator[tuple[str, ListedVolume]]:
        """Yield the entries of one volume, sorted by the marks of their handles; the last has the mark `_LAST`."""
        (issued, reference), *others = listed_handles(found, held)
        entries = [("!", issued, reference), *sorted((_mark(text), text, other) for text, other in others)]
        for number, (handle_mark, volume_id, reference) in enumerate(entries, 1):
            shape = described(found, self.settings.topology_key, volume_id)
            listed = ListedVolume(shape, held.get(reference, ()), found.volume)
            yield _LAST if number == len(entries) else handle_mark, listed


def _volumes_from(management: Management, start: Position | None, page: int, *, deadline: Deadline) -> Iterator[Volume]:
    """Yield volumes sorted by name, from the one in which the last page ended, if it has more handles."""
    after = start.name if start is not None else ""
    if start is not None and start.handle_mark != _LAST:
        unfinished = management.volume(start.name, deadline=deadline)
        if unfinished is not None:
            yield unfinished
    while True:
        # One more than the page shows whether there is a next one.
        chunk = management.volumes(after=after, limit=page + 1 if page else 0, deadline=deadline)
        yield from chunk
        if not page or len(chunk) <= page:
            return
        after = chunk[-1].name


def _holders(clients: Sequence[Client]) -> _Holders:
    holders: dict[str, dict[str, tuple[str, ...]]] = {}
    for client in clients:
        for uuid, desired in client.desired.items():
            for reference in () if desired.is_detaching else desired.references:
                nodes = holders.setdefault(uuid, {})
                nodes[reference] = (*nodes.get(reference, ()), client.uuid)
    return holders


def listed_bytes(entry: ListedVolume) -> int:
    volume = entry.volume
    size = _FIXED_BYTES + sum(map(_text_bytes, (volume.volume_id, *entry.published_node_ids)))
    for pairs in (volume.context, *volume.topology):
        size += _FIELD_BYTES + sum(_FIELD_BYTES + _text_bytes(key) + _text_bytes(pairs[key]) for key in pairs)
    return size


def _text_bytes(text: str) -> int:
    return _FIELD_BYTES + len(text.encode("utf-8", "surrogatepass"))


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

    def volumes(self, max_entries: int, starting_token: str, *, deadline: Deadline) -> tuple[list[VolumeHealth], str]:
        listed, token = self.listing.volumes(max_entries, starting_token, deadline=deadline)
        holders: dict[str, Mapping[str, Sequence[Client]]] = {}
        found = []
        for entry in listed:
            zone = entry.volume.topology[0][self.listing.settings.topology_key]
            if zone not in holders:
                holders[zone] = self._holders(zone, deadline)
            volume = entry.stored
            entries = () if volume is None else find_faults(volume, holders[zone].get(volume.uuid, ()))
            found.append(VolumeHealth(entry.volume.volume_id, entries))
        fitting = sum(size <= _PAGE_BYTES for size in accumulate(map(health_bytes, found)))
        if fitting < len(found):
            # The health of many faulty volumes is larger than their list.
            _, token = self.listing.volumes(max(fitting, 1), starting_token, deadline=deadline)
            found = found[: max(fitting, 1)]
        return found, token

    def _holders(self, zone: str, deadline: Deadline) -> Mapping[str, Sequence[Client]]:
        management = self.listing.clusters.management(zone)
        holders: dict[str, list[Client]] = {}
        for client in management.clients(deadline=deadline) if management is not None else ():
            for uuid in client.desired:
                holders.setdefault(uuid, []).append(client)
        return holders


def find_faults(volume: Volume, clients: Sequence[Client]) -> tuple[VolumeEntry, ...]:
    found = list(_faults_of(volume))
    for client in clients:
        found.extend(_faults_of_attachment(volume, client))
    return each_once(found)


def _faults_of(volume: Volume) -> Iterator[VolumeEntry]:
    if volume.is_being_made:
        return
    message = f"the storage management reports status {volume.status}, health {volume.health}, action {volume.action}"
    condition = next((_CONDITIONS[word] for word in (volume.status, volume.health) if word in _CONDITIONS), None)
    if condition is not None:
        yield VolumeEntry(*condition, message)
    if volume.action in _REBUILDING:
        yield VolumeEntry(VolumeFault.DEGRADED, Reason.VOLUME_REBUILDING, message)


def _faults_of_attachment(volume: Volume, client: Client) -> Iterator[VolumeEntry]:
    desired = client.desired.get(volume.uuid)
    if desired is None or desired.is_detaching:
        return
    report = client.devices.get(volume.uuid)
    if client.status is ClientStatus.DOWN:
        yield VolumeEntry(VolumeFault.INACCESSIBLE, Reason.NODE_DOWN, f"it is attached to {client.id}, which is down")
    elif report is not None and report.status in _FAILED:
        message = f"{client.id} reports {report.status.name} for it"
        yield VolumeEntry(VolumeFault.INACCESSIBLE, Reason.ATTACH_FAILED, message)
    elif report is not None and report.status is DeviceStatus.ATTACHED and not report.io_enabled:
        yield VolumeEntry(VolumeFault.INACCESSIBLE, Reason.IO_DISABLED, f"{client.id} has I/O disabled for it")


def health_bytes(health: VolumeHealth) -> int:
    return _text_bytes(health.volume_id) + sum(
        _FIXED_BYTES + _text_bytes(entry.reason) + _text_bytes(entry.message) for entry in health.entries
    )
