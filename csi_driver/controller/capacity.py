# SPDX-License-Identifier: Apache-2.0
"""GetCapacity, the selection of a zone by free capacity, and ControllerExpandVolume."""

from __future__ import annotations

import hashlib
import logging
import math
import random
import threading
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass, field, replace

from csi_driver import capacity as sizes
from csi_driver import errors
from csi_driver.controller.ports import Clusters, CreateRequest, Management, TopologyRequirement
from csi_driver.controller.validate import check_capabilities, check_capability
from csi_driver.controller.volume_lookup import Located, require
from csi_driver.controller.volume_metadata import encryption_of
from csi_driver.controller.zones import ZONE_POOL, Answers, ZonePool, allowed_zones, ask, rank_in, unavailable
from csi_driver.deadline import Deadline
from csi_driver.model import BlockAccess, Capability, Capacity, CapacityRange, Segments
from csi_driver.parameters.storage_class import StorageClassParameters, parse
from csi_driver.publish_context import Encryption
from csi_driver.reporting import SILENT, EventReason, Reporter, Subject
from csi_driver.settings import ControllerSettings, ZonePolicy
from csi_driver.storage_model import ALL_DRIVES, AllowedDrives, Layout, RaidLevel, RawSpace, Volume, VolumeSpec, Vpg

_log = logging.getLogger(__name__)

_WITH_DOMAINS = (
    RaidLevel.MIRRORED, RaidLevel.STRIPED_MIRRORED, RaidLevel.ERASURE_CODED, RaidLevel.STRIPED_ERASURE_CODED,
)  # fmt: skip
"""The management drops the domain of a volume without redundancy."""
_MOST_REFUSED = 256
_KNOWN_S = 10.0
"""Free capacity only orders zones, so one answer serves the calls of this many seconds."""
_KNOWN_WAIT_S = 5.0
_MOST_KNOWN = 1024
_MOST_EXTENSIONS = 3
_SCARCE_SHARE, _ENOUGH_SHARE = 0.10, 0.15
"""Free shares of a zone's space: below the first a report begins, above the second it ends."""


@dataclass(frozen=True, slots=True)
class FreeCapacity:
    """Free capacity of a zone for volumes of some parameters. `refusal`: why the zone refuses every such volume.

    `all_drives`: the space of the zone, if the parameters allow all drives.
    """

    free_bytes: int
    minimum_bytes: int | None = None
    refusal: str = ""
    all_drives: RawSpace | None = None


def free_capacity(management: Management, read: StorageClassParameters, *, deadline: Deadline) -> FreeCapacity:
    """Return the usable bytes of drives and reserved space, less redundancy and encryption. At most five requests."""
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
        except errors.InvalidRequest as problem:
            return FreeCapacity(0, refusal=str(problem))
        layout, overflows = group.layout, group.allow_overflow
        if not overflows or group.capacity_bytes:
            reserved = management.vpg_free_bytes(name, deadline=deadline)
    allowed = allowed_drives(read.spec, group, layout)
    space = management.raw_space(allowed, deadline=deadline) if overflows else RawSpace(0, 0)
    if space is None:
        return FreeCapacity(0, refusal="the classes, limitBy... or domain of the parameters do not exist")
    free = sizes.largest_size(reserved + sizes.usable_bytes(space.free_bytes, layout), layout)
    least = sizes.minimum_bytes(layout)
    all_drives = space if overflows and replace(allowed, with_metadata=False) == ALL_DRIVES else None
    return FreeCapacity(max(0, free - header) if free >= least else 0, least - header, all_drives=all_drives)


def allowed_drives(spec: VolumeSpec, group: Vpg | None, layout: Layout) -> AllowedDrives:
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


def _free_in(
    clusters: Clusters,
    zones: Sequence[str],
    read: StorageClassParameters,
    deadline: Deadline,
    pool: ZonePool = ZONE_POOL,
) -> Answers[FreeCapacity]:
    def in_zone(zone: str) -> FreeCapacity:
        management = clusters.management(zone)
        return FreeCapacity(0) if management is None else free_capacity(management, read, deadline=deadline)

    return ask(zones, in_zone, deadline=deadline, pool=pool)


@dataclass(slots=True)
class SpaceWatch:
    """Reports a zone when most of its space is promised to volumes, and the end of that."""

    reporter: Reporter
    _scarce: set[str] = field(default_factory=set)

    def saw(self, zone: str, space: RawSpace) -> None:
        share = space.free_bytes / space.total_bytes if space.total_bytes else 1.0
        if share < _SCARCE_SHARE:
            self._scarce.add(zone)
            note = (
                f"zone {zone}: less than {_SCARCE_SHARE:.0%} of the space of its drives is free; delete volumes or "
                "snapshots, or add drives, before new volumes and expansions are refused"
            )
            self.reporter.report(Subject(), EventReason.SPACE_NEARLY_PROMISED, note)
        elif share > _ENOUGH_SHARE and zone in self._scarce:
            self._scarce.discard(zone)
            note = f"zone {zone}: more than {_ENOUGH_SHARE:.0%} of the space of its drives is free again"
            self.reporter.report(Subject(), EventReason.SPACE_AVAILABLE, note)


@dataclass(slots=True)
class GetCapacity:
    clusters: Clusters
    settings: ControllerSettings
    watch: SpaceWatch = field(default_factory=lambda: SpaceWatch(SILENT))
    _refused: set[frozenset[tuple[str, str]]] = field(default_factory=set)

    def capacity(
        self,
        capabilities: Sequence[Capability],
        parameters: Mapping[str, str],
        segments: Segments | None,
        *,
        deadline: Deadline,
    ) -> Capacity:
        """Return the free capacity for such volumes (an upper bound); of several zones, a silent one counts as full.

        Parameters that CreateVolume refuses in every zone get the capacity of all drives: with 0, a scheduler would
        never let CreateVolume be called, and no user would see its error.
        """
        requirement = TopologyRequirement(requisite=(segments,)) if segments else None
        try:
            check_capabilities(capabilities)
            zones = allowed_zones(self.clusters.zones(), requirement, self.settings.topology_key)
        except (errors.InvalidRequest, errors.Exhausted):
            return Capacity(0, maximum_volume_bytes=0)
        found: list[FreeCapacity] = []
        try:
            read = parse(parameters)
        except errors.InvalidRequest as problem:
            refusal = str(problem)
        else:
            try:
                parse(parameters, capabilities)
            except errors.InvalidRequest:
                return Capacity(0, maximum_volume_bytes=0)
            found = self._answers(zones, read, deadline)
            refusal = self._refusal(zones, found, read, deadline)
        if refusal:
            self._report_refusal(parameters, refusal)
            found = self._answers(zones, StorageClassParameters(VolumeSpec(layout=Layout())), deadline)
        least = [each.minimum_bytes for each in found if each.minimum_bytes is not None]
        return Capacity(
            available_bytes=sum(each.free_bytes for each in found),
            maximum_volume_bytes=max((each.free_bytes for each in found), default=0),
            minimum_volume_bytes=min(least) if least else None,
        )

    def _refusal(
        self, zones: Sequence[str], found: Sequence[FreeCapacity], read: StorageClassParameters, deadline: Deadline
    ) -> str:
        if len(found) < len(zones) or not all(each.refusal for each in found):
            return ""
        others = [zone for zone in self.clusters.zones() if zone not in zones]
        try:
            elsewhere = self._answers(others, read, deadline) if others else []
        except errors.DriverError:
            return ""
        if len(elsewhere) < len(others) or not all(each.refusal for each in elsewhere):
            return ""
        return found[0].refusal

    def _report_refusal(self, parameters: Mapping[str, str], refusal: str) -> None:
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

    def _answers(self, zones: Sequence[str], read: StorageClassParameters, deadline: Deadline) -> list[FreeCapacity]:
        answers = _free_in(self.clusters, zones, read, deadline)
        if answers.missing and len(answers.missing) == len(self.clusters.zones()):
            raise unavailable(answers.missing)
        for each, reason in sorted(answers.missing.items()):
            _log.warning("the capacity of zone %s counts as 0: %s", each, reason)
        for zone, free in answers.given.items():
            if free.all_drives is not None:
                self.watch.saw(zone, free.all_drives)
        return list(answers.given.values())


@dataclass(slots=True)
class ZoneSelection:
    """Orders zones by the preference of the request, then by the policy. `round-robin` counts in this process only."""

    clusters: Clusters
    settings: ControllerSettings
    pool: ZonePool = ZONE_POOL
    generator: random.Random = field(default_factory=random.Random)
    _turn: int = 0
    _known: dict[Hashable, tuple[int, float]] = field(default_factory=dict)
    """Free bytes, and when they were read, by zone and kind of volume."""
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def order(
        self,
        allowed: Sequence[str],
        request: CreateRequest,
        *,
        name: str,
        parameters: StorageClassParameters,
        deadline: Deadline,
    ) -> list[str]:
        rank = rank_in(request.topology, self.settings.topology_key)
        if len({rank(zone) for zone in allowed}) == len(allowed):
            return sorted(allowed, key=rank)
        zones = sorted(allowed)
        match self.settings.zone_policy:
            case ZonePolicy.RANDOM:
                zones = self.generator.sample(zones, len(zones))
            case ZonePolicy.ROUND_ROBIN:
                with self._lock:
                    first = self._turn % len(zones)
                    self._turn += 1
                zones = zones[first:] + zones[:first]
            case ZonePolicy.FREE_SPACE:
                zones = by_free_space(self._free(zones, parameters, deadline), name, request.capacity.required_bytes)
        return sorted(zones, key=rank)

    def _free(self, zones: Sequence[str], parameters: StorageClassParameters, deadline: Deadline) -> dict[str, int]:
        now_s = deadline.clock.monotonic()
        spec = parameters.spec
        kind: Hashable = spec.vpg if spec.layout is None else (spec.layout, allowed_drives(spec, None, spec.layout))
        with self._lock:
            if len(self._known) > _MOST_KNOWN:
                self._known.clear()
            known = {zone: self._known[zone, kind] for zone in zones if (zone, kind) in self._known}
        found = {zone: free for zone, (free, at_s) in known.items() if now_s - at_s < _KNOWN_S}
        unknown = [zone for zone in zones if zone not in found]
        if unknown:
            latest = deadline.at_most(_KNOWN_WAIT_S)
            given = _free_in(self.clusters, unknown, parameters, latest, self.pool).given
            with self._lock:
                self._known.update({(zone, kind): (free.free_bytes, now_s) for zone, free in given.items()})
            found.update({zone: free.free_bytes for zone, free in given.items()})
        return {zone: found.get(zone, 0) for zone in zones}


def by_free_space(free: Mapping[str, int], name: str, size_bytes: int) -> list[str]:
    """Order zones so that each comes first in proportion to its free space; those without enough space come last.

    Weighted rendezvous hashing of the name: a retry gets the same zone although the free space has changed a little.
    """

    def score(zone: str) -> float:
        digest = hashlib.sha256(f"{name}\n{zone}".encode("utf-8", "surrogatepass")).digest()
        share = (int.from_bytes(digest[:7]) + 0.5) / 2**56
        return free[zone] / -math.log(share)

    return sorted(free, key=lambda zone: (free[zone] < size_bytes, -score(zone), zone))


@dataclass(frozen=True, slots=True)
class ExpandVolume:
    clusters: Clusters

    def expand(
        self, volume_id: str, capacity: CapacityRange, capability: Capability | None, *, deadline: Deadline
    ) -> tuple[int, bool]:
        """Return the user's bytes afterwards, and whether the node must expand a filesystem or encryption.

        Without space this raises `CapacityOutOfRange`: after `Exhausted` the orchestrator assumes that the expansion
        may continue, and does not let the user request less.
        """
        if capability is not None:
            check_capability(capability)
        located = require(self.clusters, volume_id, deadline=deadline)
        volume = located.volume
        reserved = located.reserved_bytes
        for _ in range(_MOST_EXTENSIONS):
            more = sizes.extension(volume, capacity, reserved)
            if more is None:
                break
            volume = self._extend(located, volume, more, deadline)
        if sizes.extension(volume, capacity, reserved) is not None:
            raise errors.OperationPending(f"volume {volume.name}, {volume.size_bytes} bytes, is being extended; retry")
        is_block = capability is not None and isinstance(capability.access, BlockAccess)
        is_encrypted = encryption_of(volume, located.creation, {}) is not Encryption.NONE
        return volume.size_bytes - reserved, not is_block or is_encrypted

    def _extend(self, located: Located, volume: Volume, more: sizes.Extension, deadline: Deadline) -> Volume:
        if volume.is_being_made:
            raise errors.OperationPending(f"volume {volume.name} is being created (action {volume.action}); retry")
        refusal: errors.DriverError | None = None
        try:
            located.management.extend_volume(volume, more.capacity_gb, deadline=deadline)
            _log.info("extended volume %s, uuid %s, to %d bytes", volume.name, volume.uuid, more.size_bytes)
        except (errors.PreconditionFailed, errors.OperationPending) as problem:
            refusal = problem
        except errors.Exhausted as problem:
            refusal = errors.CapacityOutOfRange(
                f"no space to extend volume {volume.name} from {volume.size_bytes} "
                f"to {more.size_bytes} bytes: {problem}"
            )
            refusal.__cause__ = problem
        present = located.management.volume(volume.name, deadline=deadline)
        if present is None or present.uuid != volume.uuid:
            raise errors.VolumeNotFound(located.volume_id, "it was deleted concurrently")
        if refusal is not None and present.size_bytes == volume.size_bytes:
            raise refusal
        return present
