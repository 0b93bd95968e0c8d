"""Free capacity of a zone for volumes of one kind (an upper bound: only an allocation shows what fits)."""

from __future__ import annotations

import hashlib
import logging
import math
import random
import threading
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass, field

from csi_driver import capacity as sizes
from csi_driver.controller.ports import Clusters, Management, TopologyRequirement
from csi_driver.controller.validate import check_capabilities, check_capability
from csi_driver.controller.volume_lookup import require
from csi_driver.controller.volume_metadata import Creation, encryption_of, reserved_bytes
from csi_driver.controller.zones import CREW, Crew, allowed_zones, ask, rank_in, unavailable
from csi_driver.deadline import Deadline
from csi_driver.errors import (
    CapacityOutOfRange,
    DriverError,
    Exhausted,
    InvalidRequest,
    OperationPending,
    PreconditionFailed,
    VolumeNotFound,
)
from csi_driver.model import BlockAccess, Capability, Capacity, CapacityRange, Segments
from csi_driver.parameters.storage_class import StorageClassParameters, parse
from csi_driver.publish_context import Encryption
from csi_driver.settings import ControllerSettings, ZonePolicy
from csi_driver.storage_model import AllowedDrives, Layout, RaidLevel, Volume, VolumeSpec, Vpg

_log = logging.getLogger(__name__)

_WITH_DOMAINS = (
    RaidLevel.MIRRORED,
    RaidLevel.STRIPED_MIRRORED,
    RaidLevel.ERASURE_CODED,
    RaidLevel.STRIPED_ERASURE_CODED,
)
"""The management drops the domain of a volume that keeps no redundancy."""


@dataclass(frozen=True, slots=True)
class FreeCapacity:
    """What a zone has for volumes of one kind. `refusal`: why it refuses every such volume, whatever is free."""

    free_bytes: int
    minimum_bytes: int | None = None
    refusal: str = ""


def free_capacity(management: Management, read: StorageClassParameters, *, deadline: Deadline) -> FreeCapacity:
    """Return the usable bytes for volumes of this kind, and the size of the smallest. At most five requests.

    A provisioning group has the space that it reserved and, where it may overflow, that of its drives. What redundancy
    and encryption take is subtracted, and the rest is rounded down to a possible size.
    """
    layout, header, reserved, overflows = read.spec.layout, read.encryption.header_bytes, 0, True
    group: Vpg | None = None
    if layout is None:
        name = read.spec.vpg or ""
        group = management.vpg(name, deadline=deadline)
        if group is None:
            return FreeCapacity(0, refusal=f"volume provisioning group {name} does not exist")
        if group.is_for_metadata:
            return FreeCapacity(0, refusal=f"volume provisioning group {name} is for the metadata of snapshots")
        try:
            header = read.encryption.in_group(group).header_bytes
        except InvalidRequest as problem:
            return FreeCapacity(0, refusal=str(problem))
        layout, overflows = group.layout, group.allow_overflow
        if not overflows or group.capacity_bytes:
            reserved = management.vpg_free_bytes(name, deadline=deadline)
    raw: int | None = 0
    if overflows:
        raw = management.raw_free_bytes(allowed_drives(read.spec, group, layout), deadline=deadline)
    if raw is None:
        return FreeCapacity(0, refusal="the classes, limitBy... or domain of the parameters do not exist")
    free = sizes.largest_size(reserved + sizes.usable_bytes(raw, layout), layout)
    least = sizes.minimum_bytes(layout)
    return FreeCapacity(max(0, free - header) if free >= least else 0, least - header)


def allowed_drives(spec: VolumeSpec, group: Vpg | None, layout: Layout) -> AllowedDrives:
    """Return the drives on which the management may allocate a volume of this kind."""
    source = spec if group is None else group
    erasure_coded = layout.raid_level in (RaidLevel.ERASURE_CODED, RaidLevel.STRIPED_ERASURE_CODED)
    return AllowedDrives(
        drive_classes=source.drive_classes,
        target_classes=source.target_classes,
        drives=spec.limit_by_drives,
        targets=spec.limit_by_targets,
        domain=source.domain if layout.raid_level in _WITH_DOMAINS else None,
        with_metadata=erasure_coded or layout.enable_crc_check is True,
        with_offline=spec.allow_offline_drives is True,
    )


_MOST_ATTEMPTS = 3


class ExpandVolume:
    """Make volumes larger, attached or not."""

    def __init__(self, clusters: Clusters, settings: ControllerSettings) -> None:
        self._clusters = clusters
        self._settings = settings

    def expand(
        self, volume_id: str, capacity: CapacityRange, capability: Capability | None, *, deadline: Deadline
    ) -> tuple[int, bool]:
        """Return what the user has afterwards, and whether a node must grow what lies on the device.

        A header of encryption is not the user's: the volume has that much more.

        A volume that is large enough is left alone. Raises `CapacityOutOfRange`, also where there is no room: an
        orchestrator takes `Exhausted` for an expansion that may still go on, and lets nobody ask for less instead.
        `VolumeNotFound`.
        """
        if capability is not None:
            check_capability(capability)
        located = require(self._clusters, volume_id, deadline=deadline)
        management, volume = located.management, located.volume
        reserved = reserved_bytes(volume, located.creation)
        for _ in range(_MOST_ATTEMPTS):
            more = sizes.extension(volume, capacity, reserved)
            if more is None:
                return volume.size_bytes - reserved, _node_has_work(volume, located.creation, capability)
            if volume.is_being_made:
                raise OperationPending(f"volume {volume.name} is still being created (action {volume.action}); retry")
            refusal: PreconditionFailed | OperationPending | CapacityOutOfRange | None = None
            try:
                management.extend_volume(volume, more.capacity_gb, deadline=deadline)
                _log.info("extended volume %s, uuid %s, to %d bytes", volume.name, volume.uuid, more.size_bytes)
            except (PreconditionFailed, OperationPending) as problem:
                # Another controller may have extended it since it was read; then the volume shows it.
                refusal = problem
            except Exhausted as problem:
                refusal = CapacityOutOfRange(
                    f"no space to extend volume {volume.name} from {volume.size_bytes} "
                    f"to {more.size_bytes} bytes: {problem}"
                )
                refusal.__cause__ = problem
            before = volume
            present = management.volume(before.name, deadline=deadline)
            if present is None or present.uuid != before.uuid:
                raise VolumeNotFound(volume_id, "it was deleted concurrently")
            volume = present
            if refusal is not None and volume.size_bytes == before.size_bytes:
                raise refusal
        if sizes.extension(volume, capacity, reserved) is not None:
            raise OperationPending(
                f"volume {volume.name} has {volume.size_bytes} bytes and is still being extended; retry"
            )
        return volume.size_bytes - reserved, _node_has_work(volume, located.creation, capability)


def _node_has_work(volume: Volume, creation: Creation, capability: Capability | None) -> bool:
    """Tell whether anything on the device must grow: a filesystem, or encryption; the device grows by itself."""
    is_block = capability is not None and isinstance(capability.access, BlockAccess)
    return not is_block or encryption_of(volume, creation, {}) is not Encryption.NONE


class GetCapacity:
    """GetCapacity."""

    def __init__(self, clusters: Clusters, settings: ControllerSettings, *, crew: Crew = CREW) -> None:
        self._clusters = clusters
        self._crew = crew
        self._settings = settings
        self._refused: set[frozenset[tuple[str, str]]] = set()

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
            check_capabilities(capabilities)
            zones = allowed_zones(self._clusters.zones(), wanted, self._settings.topology_key)
        except (InvalidRequest, Exhausted):
            return Capacity(0, maximum_volume_bytes=0)
        rooms: Sequence[FreeCapacity] = []
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
            rooms = self._rooms(zones, StorageClassParameters(VolumeSpec(layout=Layout())), deadline=deadline)
        least = [room.minimum_bytes for room in rooms if room.minimum_bytes is not None]
        return Capacity(
            available_bytes=sum(room.free_bytes for room in rooms),
            maximum_volume_bytes=max((room.free_bytes for room in rooms), default=0),
            minimum_volume_bytes=min(least) if least else None,
        )

    def _refusal(
        self, asked: Sequence[str], rooms: Sequence[FreeCapacity], read: StorageClassParameters, *, deadline: Deadline
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

    def _rooms(
        self, zones: Sequence[str], read: StorageClassParameters, *, deadline: Deadline
    ) -> Sequence[FreeCapacity]:
        """Return what each of these zones has that answers."""

        def room_in(each: str) -> FreeCapacity:
            management = self._clusters.management(each)
            return FreeCapacity(0) if management is None else free_capacity(management, read, deadline=deadline)

        answers = ask(zones, room_in, deadline=deadline, crew=self._crew)
        if answers.missing and len(answers.missing) == len(self._clusters.zones()):
            raise unavailable(answers.missing)
        for each, reason in sorted(answers.missing.items()):
            _log.warning("the capacity of zone %s counts as 0: %s", each, reason)
        return list(answers.given.values())


_MOST_REFUSED = 256
_ROOM_KNOWN_S = 10.0
"""Free space only orders zones, so an answer serves the calls of this many seconds."""
_ROOM_WAIT_S = 5.0
_MOST_KNOWN = 1024


@dataclass(frozen=True, slots=True)
class _Known:
    bytes: int
    at_s: float


@dataclass
class ZoneSelection:
    """Orders zones: by the caller's preference, and by the policy among those that it prefers alike.

    `round-robin` counts in this process only: controllers share nothing, so two of them count separately.
    """

    clusters: Clusters
    policy: ZonePolicy
    crew: Crew = field(default=CREW)
    chance: random.Random = field(default_factory=random.Random)
    _turn: int = 0
    _known: dict[Hashable, _Known] = field(default_factory=dict)
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def order(
        self,
        allowed: Sequence[str],
        requirement: TopologyRequirement | None,
        key: str,
        *,
        name: str,
        size_bytes: int,
        parameters: StorageClassParameters,
        deadline: Deadline,
    ) -> list[str]:
        """Return the allowed zones in the order in which they are to be tried for this volume."""
        rank = rank_in(requirement, key)
        if len({rank(zone) for zone in allowed}) == len(allowed):
            return sorted(allowed, key=rank)
        zones = sorted(allowed)
        match self.policy:
            case ZonePolicy.RANDOM:
                zones = self.chance.sample(zones, len(zones))
            case ZonePolicy.ROUND_ROBIN:
                zones = self._in_turn(zones)
            case ZonePolicy.FREE_SPACE:
                zones = by_free_space(self._free(zones, parameters, deadline=deadline), name, size_bytes)
        return sorted(zones, key=rank)

    def _in_turn(self, zones: list[str]) -> list[str]:
        with self._lock:
            first = self._turn % len(zones)
            self._turn += 1
        return zones[first:] + zones[:first]

    def _free(self, zones: Sequence[str], parameters: StorageClassParameters, *, deadline: Deadline) -> dict[str, int]:
        """Return the usable bytes of each zone; 0 for one that does not say."""
        now_s = deadline.clock.monotonic()
        layout = parameters.spec.layout
        kind: Hashable = (
            parameters.spec.vpg if layout is None else (layout, allowed_drives(parameters.spec, None, layout))
        )
        with self._lock:
            if len(self._known) > _MOST_KNOWN:
                self._known.clear()
            known = {zone: self._known.get((zone, kind)) for zone in zones}
        found = {zone: entry.bytes for zone, entry in known.items() if entry and now_s - entry.at_s < _ROOM_KNOWN_S}
        unknown = [zone for zone in zones if zone not in found]
        if unknown:
            latest = Deadline(min(deadline.at_s, now_s + _ROOM_WAIT_S), deadline.started_s, deadline.clock)
            answers = ask(
                unknown, lambda zone: self._room(zone, parameters, deadline=latest), deadline=latest, crew=self.crew
            )
            with self._lock:
                self._known.update({(zone, kind): _Known(free, now_s) for zone, free in answers.given.items()})
            found.update(answers.given)
        return {zone: found.get(zone, 0) for zone in zones}

    def _room(self, zone: str, parameters: StorageClassParameters, *, deadline: Deadline) -> int:
        management = self.clusters.management(zone)
        return 0 if management is None else free_capacity(management, parameters, deadline=deadline).free_bytes


def by_free_space(free: Mapping[str, int], name: str, size_bytes: int) -> list[str]:
    """Order zones so that each comes first in proportion to its free space; those without room come last.

    Weighted rendezvous hashing: the name decides, so that a call that is repeated, or carried out by two controllers
    at once, meets the same zone although the free space has changed a little in between.
    """

    def score(zone: str) -> float:
        digest = hashlib.sha256(f"{name}\n{zone}".encode("utf-8", "surrogatepass")).digest()
        share = (int.from_bytes(digest[:7]) + 0.5) / 2**56
        return free[zone] / -math.log(share)

    return sorted(free, key=lambda zone: (free[zone] < size_bytes, -score(zone), zone))
