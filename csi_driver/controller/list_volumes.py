"""ListVolumes, ControllerGetVolume, GetCapacity, ValidateVolumeCapabilities and Probe."""

from __future__ import annotations

import base64
import binascii
import hashlib
import logging
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import accumulate
from types import MappingProxyType
from typing import Protocol

from csi_driver.controller.duplicate_guard import Found, doubles, report_double
from csi_driver.controller.ports import Clusters, Management
from csi_driver.controller.volume_lookup import derived_spelling, described, issued_handle, require
from csi_driver.controller.volume_metadata import read_attachments, read_creation
from csi_driver.controller.zones import (
    CREW,
    Crew,
    ask,
)
from csi_driver.deadline import Deadline
from csi_driver.errors import StaleToken, shown
from csi_driver.model import ListedVolume, Reason, VolumeEntry, VolumeFault, VolumeHandle, VolumeHealth, each_once
from csi_driver.publish_context import held_reference
from csi_driver.settings import ControllerSettings
from csi_driver.storage_model import Client, ClientStatus, DeviceStatus, Volume

_VERSION = "v1."
LAST = "~"
"""The mark above every spelling of a volume's handle: the volume is done with."""

PAGE_BYTES = 3 << 20
"""A page ends below this, also where everything was asked for: gRPC's clients take 4 MiB unless told otherwise, and
external-attacher, which asks for everything, follows tokens."""
_FIELD_BYTES = 6  # tag and length of a text or of a message within another, at most
_FIXED_BYTES = 64  # numbers, and the messages around


@dataclass(frozen=True, slots=True)
class Position:
    """The last entry of a page: its zone (hashed, tokens are short), its volume, and which spelling of its handle."""

    zone_mark: str
    name: str
    spelling: str = LAST

    def token(self) -> str:
        """Write the token, at most 128 bytes."""
        text = f"{self.zone_mark}\n{self.name}\n{self.spelling}"
        return _VERSION + base64.urlsafe_b64encode(text.encode()).decode().rstrip("=")


def read_token(token: str) -> Position:
    """Read a token; `StaleToken` for what this driver did not issue."""
    try:
        if not token.startswith(_VERSION):
            raise StaleToken(
                f"starting_token {shown(token)} was not issued by this driver; start again without a token"
            )
        encoded = token.removeprefix(_VERSION)
        text = base64.b64decode(encoded + "=" * (-len(encoded) % 4), altchars=b"-_", validate=True).decode()
        zone_mark, name, spelling = text.split("\n")
    except (binascii.Error, ValueError) as problem:
        raise StaleToken(
            f"starting_token {shown(token)} was not issued by this driver; start again without a token"
        ) from problem
    return Position(zone_mark, name, spelling)


def mark(text: str) -> str:
    """Return a short stand-in for a zone or a spelling."""
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()[:8]


def listed_bytes(entry: ListedVolume) -> int:
    """Return an upper bound for the bytes that an entry of ListVolumes takes in a message."""
    volume = entry.volume
    size = _FIXED_BYTES + sum(map(_text_bytes, (volume.volume_id, *entry.published_node_ids)))
    for pairs in (volume.context, *volume.topology):
        size += _FIELD_BYTES + sum(_FIELD_BYTES + _text_bytes(key) + _text_bytes(pairs[key]) for key in pairs)
    return size


def health_bytes(health: VolumeHealth) -> int:
    """Return an upper bound for the bytes that an entry of ControllerListVolumeHealth takes in a message."""
    return _text_bytes(health.volume_id) + sum(
        _FIXED_BYTES + _text_bytes(entry.reason) + _text_bytes(entry.message) for entry in health.entries
    )


def _text_bytes(text: str) -> int:
    return _FIELD_BYTES + len(text.encode("utf-8", "surrogatepass"))


_Holders = Mapping[str, Mapping[str, tuple[str, ...]]]
"""Volume uuid, then reference id, to the node ids that hold it so."""
_Entry = tuple[Position, ListedVolume]
_JUDGED_AT_ONCE = 16
"""Names in several zones that one call looks into; the next call goes on."""
_REACHABLE_S = 2.0
_MOST_REFUSED = 256
"""Sets of refused parameters that are remembered, so that each is logged once."""

_log = logging.getLogger(__name__)


class ListVolumes:
    """Tell which volumes there are, who holds them, and what room is left."""

    def __init__(self, clusters: Clusters, settings: ControllerSettings, *, crew: Crew = CREW) -> None:
        self._clusters = clusters
        self._crew = crew
        self._settings = settings
        self._judged: set[str] = set()

    def volumes(self, max_entries: int, starting_token: str, *, deadline: Deadline) -> tuple[list[ListedVolume], str]:
        """Return one page (0 = as much as a message may hold) and the token of the next, empty at the end.

        Every volume shows under its issued handle, and once more for each other spelling that is attached now.
        Costs what the page has and the clients there are, however many volumes lie before it. Raises `StaleToken`.
        """
        entries: list[ListedVolume] = []
        last: Position | None = None
        size = 0
        for position, entry in self._entries(starting_token, max_entries, deadline=deadline):
            size += listed_bytes(entry)
            if last is not None and (size > PAGE_BYTES or len(entries) == max_entries):
                return entries, last.token()
            entries.append(entry)
            last = position
        return entries, ""

    def volume(self, volume_id: str, *, deadline: Deadline) -> ListedVolume:
        """Return one volume under the id that was asked for; `VolumeNotFound` when there is none."""
        located = require(self._clusters, volume_id, deadline=deadline)
        holders = _holders(located.management.clients_holding(located.volume.uuid, deadline=deadline))
        key = self._settings.topology_key
        return ListedVolume(
            described(located.zone, located.volume, located.creation, key, volume_id),
            holders.get(located.volume.uuid, {}).get(located.reference, ()),
        )

    def _entries(self, starting_token: str, page: int, *, deadline: Deadline) -> Iterator[_Entry]:
        """Yield all entries behind the token, in the order of (zone, volume, spelling)."""
        start = read_token(starting_token) if starting_token else None
        zones = sorted(self._clusters.zones())
        if start is not None:
            at = next((index for index, zone in enumerate(zones) if mark(zone) == start.zone_mark), None)
            if at is None:
                raise StaleToken(
                    f"starting_token {shown(starting_token)} names a zone that is no longer configured; "
                    "start again without a token"
                )
            zones = zones[at:]

        def of_zone(zone: str) -> Iterator[_Entry]:
            management = self._clusters.management(zone)
            if management is None:
                return iter(())
            return self._entries_of_zone(zone, management, start if zone == zones[0] else None, page, deadline=deadline)

        if page:
            for zone in zones:
                yield from of_zone(zone)
            return
        # A zone that cannot be asked ends the call: a volume that is left out would look deleted.
        found = ask(zones, lambda zone: list(of_zone(zone)), deadline=deadline, crew=self._crew).all()
        self._report_doubles(found, deadline=deadline)
        for zone in zones:
            yield from found[zone]

    def _report_doubles(self, found: Mapping[str, Sequence[_Entry]], *, deadline: Deadline) -> None:
        """Tell of volumes that a crash or a skipped zone left in two zones, each once; nothing is ever deleted."""
        places: dict[str, list[str]] = {}
        for zone, entries in found.items() if len(found) > 1 else ():
            for name in {position.name for position, _ in entries}:
                places.setdefault(name, []).append(zone)
        new = [name for name, zones in places.items() if len(zones) > 1 and name not in self._judged]
        for name in new[:_JUDGED_AT_ONCE]:
            look = ask(places[name], partial(self._found, name, deadline), deadline=deadline, crew=self._crew)
            if look.missing:
                continue
            self._judged.add(name)
            for same in doubles(volume for volume in look.given.values() if volume is not None):
                report_double(same)

    def _found(self, name: str, deadline: Deadline, zone: str) -> Found | None:
        management = self._clusters.management(zone)
        volume = management.volume(name, deadline=deadline) if management is not None else None
        return None if volume is None else Found(zone, volume)

    def _entries_of_zone(
        self, zone: str, management: Management, start: Position | None, page: int, *, deadline: Deadline
    ) -> Iterator[_Entry]:
        holders = _holders(management.clients(deadline=deadline))
        zone_mark = mark(zone)
        for volume in _volumes_from(management, start, page, deadline=deadline):
            if volume.is_reserved or volume.is_being_deleted or volume.name.endswith("_MD"):
                continue
            seen = start.spelling if start is not None and volume.name == start.name else ""
            for order, entry in self._entries_of_volume(zone, volume, holders.get(volume.uuid, {})):
                if order > seen:
                    yield Position(zone_mark, volume.name, order), entry

    def _entries_of_volume(
        self, zone: str, volume: Volume, held: Mapping[str, tuple[str, ...]]
    ) -> Iterator[tuple[str, ListedVolume]]:
        """Yield the entries of one volume with what orders them; the last has the order `LAST`."""
        creation = read_creation(volume.metadata)
        issued = issued_handle(zone, volume, creation)
        key = self._settings.topology_key
        if not held:
            yield LAST, ListedVolume(described(zone, volume, creation, key, issued.format()), (), volume)
            return
        spellings = _spellings(zone, volume, issued, held)
        for order, volume_id in sorted(spellings.items()):
            shape = described(zone, volume, creation, key, volume_id)
            handle = VolumeHandle.parse(volume_id)
            nodes = held.get(held_reference(handle, volume.uuid), ()) if handle is not None else ()
            yield LAST if order == max(spellings) else order, ListedVolume(shape, nodes, volume)


def _spellings(zone: str, volume: Volume, issued: VolumeHandle, held: Mapping[str, tuple[str, ...]]) -> dict[str, str]:
    """Return the ids under which a volume shows, by what orders them: the issued one, and others attached now."""
    shown_as = {"!": issued.format()}
    recorded: dict[str, list[str]] = {}
    for text in read_attachments(volume.metadata).handles:
        handle = VolumeHandle.parse(text)
        if handle is not None:
            recorded.setdefault(held_reference(handle, volume.uuid), []).append(text)
    for reference in held:
        derived = (
            [] if reference == held_reference(issued, volume.uuid) else [derived_spelling(zone, volume, reference)]
        )
        for text in recorded.get(reference, derived):
            if text != shown_as["!"]:
                shown_as[mark(text)] = text
    return shown_as


def _volumes_from(management: Management, start: Position | None, page: int, *, deadline: Deadline) -> Iterator[Volume]:
    """Yield volumes sorted by name: the one that a page ended in, if it has more spellings, and all behind it."""
    after = start.name if start is not None else ""
    if start is not None and start.spelling != LAST:
        unfinished = management.volume(start.name, deadline=deadline)
        if unfinished is not None:
            yield unfinished
    while True:
        # One more than the page tells whether there is a next one.
        chunk = management.volumes(after=after, limit=page + 1 if page else 0, deadline=deadline)
        yield from chunk
        if not page or len(chunk) <= page:
            return
        after = chunk[-1].name


def _holders(clients: Sequence[Client]) -> _Holders:
    """Turn the clients' attachments round: who holds what. One that is being detached is not published any more."""
    holders: dict[str, dict[str, tuple[str, ...]]] = {}
    for client in clients:
        for uuid, desired in client.desired.items():
            if not desired.is_detaching:
                for reference in desired.reference_ids or {uuid}:
                    nodes = holders.setdefault(uuid, {})
                    nodes[reference] = (*nodes.get(reference, ()), client.uuid)
    return holders


_STATUSES: Mapping[str, tuple[VolumeFault, Reason]] = MappingProxyType(
    {
        "offline": (VolumeFault.INACCESSIBLE, Reason.VOLUME_OFFLINE),
        "unavailable": (VolumeFault.INACCESSIBLE, Reason.VOLUME_UNAVAILABLE),
        "degraded": (VolumeFault.DEGRADED, Reason.VOLUME_DEGRADED),
    }
)
_HEALTHS: Mapping[str, tuple[VolumeFault, Reason]] = MappingProxyType(
    {
        "alarm": (VolumeFault.DEGRADED, Reason.VOLUME_ALARM),
        "critical": (VolumeFault.DEGRADED, Reason.VOLUME_CRITICAL),
    }
)
_REBUILDING = frozenset({"rebuildRequired", "markedForRebuild", "rebuilding"})
_FAILED = frozenset({DeviceStatus.ATTACH_FAILED, DeviceStatus.RESERVATION_DENIED})


class Listing(Protocol):
    """Pages of volumes, as ListVolumes shows them."""

    def volumes(
        self, max_entries: int, starting_token: str, *, deadline: Deadline
    ) -> tuple[list[ListedVolume], str]: ...


class GetVolumeHealth:
    """ControllerGetVolumeHealth and ControllerListVolumeHealth."""

    def __init__(self, clusters: Clusters, listing: Listing, settings: ControllerSettings) -> None:
        self._clusters = clusters
        self._listing = listing
        self._settings = settings

    def volume(self, volume_id: str, *, deadline: Deadline) -> VolumeHealth:
        """Tell what is wrong with one volume; costs the same with any number of others. Raises `VolumeNotFound`."""
        located = require(self._clusters, volume_id, deadline=deadline)
        clients = located.management.clients_holding(located.volume.uuid, deadline=deadline)
        return VolumeHealth(volume_id, find_faults(located.volume, clients))

    def volumes(self, max_entries: int, starting_token: str, *, deadline: Deadline) -> tuple[list[VolumeHealth], str]:
        """Return the health of a page of volumes, healthy ones too, with the pages and tokens of ListVolumes."""
        listed, token = self._listing.volumes(max_entries, starting_token, deadline=deadline)
        holders: dict[str, Mapping[str, Sequence[Client]]] = {}
        found = []
        for entry in listed:
            zone = entry.volume.topology[0][self._settings.topology_key]
            if zone not in holders:
                holders[zone] = self._holders(zone, deadline=deadline)
            volume = entry.stored
            entries = () if volume is None else find_faults(volume, holders[zone].get(volume.uuid, ()))
            found.append(VolumeHealth(entry.volume.volume_id, entries))
        fitting = sum(size <= PAGE_BYTES for size in accumulate(map(health_bytes, found)))
        if fitting < len(found):
            # Where much is wrong this takes more than the list does.
            _, token = self._listing.volumes(max(fitting, 1), starting_token, deadline=deadline)
            found = found[: max(fitting, 1)]
        return found, token

    def _holders(self, zone: str, *, deadline: Deadline) -> Mapping[str, Sequence[Client]]:
        management = self._clusters.management(zone)
        holders: dict[str, list[Client]] = {}
        for client in management.clients(deadline=deadline) if management is not None else ():
            for uuid in client.desired:
                holders.setdefault(uuid, []).append(client)
        return holders


def find_faults(volume: Volume, clients: Sequence[Client]) -> tuple[VolumeEntry, ...]:
    """Tell what is wrong with a volume by its document and those of the clients that hold it."""
    found = list(_of_volume(volume))
    for client in clients:
        found.extend(_of_attachment(volume, client))
    return each_once(found)


def _of_volume(volume: Volume) -> Iterator[VolumeEntry]:
    if volume.is_being_made:
        return
    words = f"status {volume.status}, health {volume.health}, action {volume.action}"
    stands = _STATUSES.get(volume.status) or _HEALTHS.get(volume.health)
    if stands is not None:
        yield VolumeEntry(*stands, f"the storage management reports {words}")
    if volume.action in _REBUILDING:
        yield VolumeEntry(VolumeFault.DEGRADED, Reason.VOLUME_REBUILDING, f"the storage management reports {words}")


def _of_attachment(volume: Volume, client: Client) -> Iterator[VolumeEntry]:
    """Judge what is wanted there, against what the client reports; one that is being detached is no one's any more."""
    desired = client.desired.get(volume.uuid)
    if desired is None or desired.is_detaching:
        return
    report = client.devices.get(volume.uuid)
    if client.status is ClientStatus.DOWN:
        yield VolumeEntry(VolumeFault.INACCESSIBLE, Reason.NODE_DOWN, f"it is attached to {client.id}, which is down")
    elif report is not None and report.status in _FAILED:
        yield VolumeEntry(
            VolumeFault.INACCESSIBLE, Reason.ATTACH_FAILED, f"{client.id} reports {report.status.name} for it"
        )
    elif report is not None and report.status is DeviceStatus.ATTACHED and not report.io_enabled:
        yield VolumeEntry(VolumeFault.INACCESSIBLE, Reason.IO_DISABLED, f"{client.id} has I/O disabled for it")
