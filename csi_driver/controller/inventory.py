"""ListVolumes, ControllerGetVolume, GetCapacity, ValidateVolumeCapabilities and Probe."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Sequence
from functools import partial

from csi_driver.controller import access
from csi_driver.controller.handing import encryption_of
from csi_driver.controller.locate import Located, described, is_blank, issued_handle, require
from csi_driver.controller.naming import derived_spelling
from csi_driver.controller.placement import allowed_zones
from csi_driver.controller.ports import Clusters, Management
from csi_driver.controller.record import read_attachments, read_creation
from csi_driver.controller.requests import ControllerSettings, TopologyRequirement, ValidateRequest
from csi_driver.controller.room import Room, room
from csi_driver.controller.search import Found, doubles, report_double
from csi_driver.controller.tokens import LAST, PAGE_BYTES, Position, listed_bytes, mark, read_token
from csi_driver.controller.zones import CREW, Crew, any_says_yes, ask, unavailable
from csi_driver.deadline import Deadline
from csi_driver.errors import DriverError, Exhausted, InvalidRequest, StaleToken, shown
from csi_driver.model import Capability, Capacity, ListedVolume, Segments, VolumeHandle
from csi_driver.parameters import storage_class
from csi_driver.parameters.storage_class import VolumeParameters, check_use, is_compared, parse
from csi_driver.parameters.values import Problems
from csi_driver.publish_context import held_reference
from csi_driver.storage_model import Client, Layout, Volume

_Holders = Mapping[str, Mapping[str, tuple[str, ...]]]
"""Volume uuid, then reference id, to the node ids that hold it so."""
_Entry = tuple[Position, ListedVolume]
_JUDGED_AT_ONCE = 16
"""Names in several zones that one call looks into; the next call goes on."""
_REACHABLE_S = 2.0
_MOST_REFUSED = 256
"""Sets of refused parameters that are remembered, so that each is logged once."""

_log = logging.getLogger(__name__)


class Inventory:
    """Tell which volumes there are, who holds them, and what room is left."""

    def __init__(self, clusters: Clusters, settings: ControllerSettings, *, crew: Crew = CREW) -> None:
        self._clusters = clusters
        self._crew = crew
        self._settings = settings
        self._was_ready = False
        self._judged: set[str] = set()
        self._refused: set[frozenset[tuple[str, str]]] = set()

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

    def capacity(
        self,
        capabilities: Sequence[Capability],
        parameters: Mapping[str, str],
        segments: Segments | None,
        *,
        deadline: Deadline,
    ) -> Capacity:
        """Return the free capacity for volumes of this kind: an upper bound, as only an allocation shows what fits.

        Nothing is available for unsupported capabilities, nor in a zone that is not served. Of several zones one that
        cannot be asked counts as full, so that work goes where it can be done; where none can be asked this raises.

        Parameters that CreateVolume refuses in every zone get the capacity of all drives: a scheduler that sees none
        never lets CreateVolume be called, and nobody would see the reason.
        """
        wanted = TopologyRequirement(requisite=(segments,)) if segments else None
        try:
            access.check_all(capabilities)
            zones = allowed_zones(self._clusters.zones(), wanted, self._settings.topology_key)
        except (InvalidRequest, Exhausted):
            return Capacity(0, maximum_volume_bytes=0)
        rooms: Sequence[Room] = []
        try:
            read = parse(parameters)
        except InvalidRequest as problem:
            refusal = str(problem)
        else:
            try:
                parse(parameters, capabilities)
            except InvalidRequest:
                return Capacity(0, maximum_volume_bytes=0)
            rooms = self._rooms(zones, read, deadline=deadline)
            refusal = self._refusal(zones, rooms, read, deadline=deadline)
        if refusal:
            self._report_refusal(parameters, refusal)
            rooms = self._rooms(zones, VolumeParameters(layout=Layout()), deadline=deadline)
        least = [room.minimum_bytes for room in rooms if room.minimum_bytes is not None]
        return Capacity(
            available_bytes=sum(room.free_bytes for room in rooms),
            maximum_volume_bytes=max((room.free_bytes for room in rooms), default=0),
            minimum_volume_bytes=min(least) if least else None,
        )

    def _refusal(
        self, asked: Sequence[str], rooms: Sequence[Room], read: VolumeParameters, *, deadline: Deadline
    ) -> str:
        """Say why every zone refuses volumes of this kind; empty where one takes them, or may: it does not answer."""
        if len(rooms) < len(asked) or not all(room.refusal for room in rooms):
            return ""
        others = [zone for zone in self._clusters.zones() if zone not in asked]
        try:
            elsewhere = self._rooms(others, read, deadline=deadline) if others else []
        except DriverError:
            return ""
        if len(elsewhere) < len(others) or not all(room.refusal for room in elsewhere):
            return ""
        return rooms[0].refusal

    def _report_refusal(self, parameters: Mapping[str, str], refusal: str) -> None:
        """Log once for each set of parameters that CreateVolume will refuse them."""
        kind = frozenset(parameters.items())
        if kind in self._refused:
            return
        if len(self._refused) >= _MOST_REFUSED:
            self._refused.clear()
        self._refused.add(kind)
        _log.warning(
            "GetCapacity: CreateVolume will refuse volumes with these parameters: %s; "
            "the capacity of all drives is reported, so that CreateVolume is called and reports the reason",
            refusal,
        )

    def validate(self, request: ValidateRequest, *, deadline: Deadline) -> str | None:
        """Return None when the volume can be used so, else why not; `VolumeNotFound` when there is none."""
        located = require(self._clusters, request.volume_id, deadline=deadline)
        creation = located.creation
        try:
            access.check_all(request.capabilities)
            read = parse(request.parameters)
            fs_type = access.chosen_fs_type(request.capabilities, read.fs_type)
            storage_class.parse_changes(request.mutable_parameters)
            storage_class.check_changes(located.volume, request.mutable_parameters)
        except InvalidRequest as problem:
            return str(problem)
        if creation.is_block is not None and creation.is_block != (fs_type is None):
            return (
                f"access type: expected {'raw block' if creation.is_block else 'filesystem'}, as created, got the other"
            )
        issued = described(located.zone, located.volume, creation, self._settings.topology_key).context
        for key in sorted(issued.keys() & request.context.keys()):
            if issued[key] != request.context[key]:
                return f"volume_context {key}: expected {shown(issued[key])}, got {shown(request.context[key])}"
        for key, value in sorted(read.recorded.items()):
            if is_compared(key) and creation.parameters.get(key, value) != value:
                return f"parameter {key}: expected {shown(creation.parameters[key])}, got {shown(value)}"
        return _why_no_node_stages(located, request.capabilities, {**issued, **read.context, **request.context})

    def ready(self, *, deadline: Deadline) -> bool:
        """Tell whether a management has answered us once; then it stays true, as a restart would cure nothing.

        Raises why not, where that is known.
        """
        if not self._was_ready:
            zones = self._clusters.zones()
            self._was_ready = any_says_yes(
                zones, lambda zone: self._answers(zone, deadline=deadline), deadline=deadline, crew=self._crew
            )
        return self._was_ready

    def why_unreachable(self) -> str:
        """Say why no management answers just now; empty = one does. Asks them anew, and ends within seconds."""
        deadline = Deadline.after(_REACHABLE_S)
        try:
            answers = ask(
                self._clusters.zones(),
                lambda zone: self._answers(zone, deadline=deadline),
                deadline=deadline,
                crew=self._crew,
            )
        except DriverError as error:
            return str(error)
        if any(answers.given.values()):
            return ""
        return str(unavailable(answers.missing)) if answers.missing else "no storage management is configured"

    def _answers(self, zone: str, *, deadline: Deadline) -> bool:
        management = self._clusters.management(zone)
        if management is None:
            return False
        management.system_info(deadline=deadline)
        return True

    def _rooms(self, zones: Sequence[str], read: VolumeParameters, *, deadline: Deadline) -> Sequence[Room]:
        """Return what each of these zones has that answers."""

        def room_in(each: str) -> Room:
            management = self._clusters.management(each)
            return Room(0) if management is None else room(management, read, deadline=deadline)

        answers = ask(zones, room_in, deadline=deadline, crew=self._crew)
        if answers.missing and len(answers.missing) == len(self._clusters.zones()):
            raise unavailable(answers.missing)
        for each, reason in sorted(answers.missing.items()):
            _log.warning("the capacity of zone %s counts as 0: %s", each, reason)
        return list(answers.given.values())

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


def _why_no_node_stages(located: Located, capabilities: Sequence[Capability], context: Mapping[str, str]) -> str | None:
    problems = Problems()
    by = encryption_of(located.volume, located.creation, context)
    for capability in capabilities:
        problems.of(partial(check_use, capability, context, by=by, is_blank=is_blank(located)))
    try:
        problems.raise_any()
    except InvalidRequest as problem:
        return str(problem)
    return None


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
