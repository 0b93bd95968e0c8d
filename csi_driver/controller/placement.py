"""Which zones a volume may live in, and in which order they are tried."""

from __future__ import annotations

import hashlib
import math
import random
import threading
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass, field

from csi_driver.controller.ports import Clusters
from csi_driver.controller.requests import TopologyRequirement, ZonePolicy
from csi_driver.controller.room import allowed_drives, room
from csi_driver.controller.zones import CREW, Crew, ask
from csi_driver.deadline import Deadline
from csi_driver.errors import Exhausted, shown
from csi_driver.model import Segments
from csi_driver.parameters.storage_class import VolumeParameters

_ROOM_KNOWN_S = 10.0
"""Free space only orders zones, so an answer serves the calls of this many seconds."""
_ROOM_WAIT_S = 5.0
_MOST_KNOWN = 1024


def allowed_zones(zones: Sequence[str], requirement: TopologyRequirement | None, key: str) -> list[str]:
    """Return the zones that satisfy the requirement, best first (CSI specification, TopologyRequirement).

    Raises `Exhausted` where none does: nothing can be provisioned there.
    """
    if requirement is None:
        return list(zones)
    requisite = [segments.get(key) for segments in requirement.requisite]
    allowed = [zone for zone in zones if not requirement.requisite or zone in requisite]
    if not allowed:
        got = "; ".join(sorted({_named(segments, key) for segments in requirement.requisite}))
        raise Exhausted(
            f"accessibility_requirements: expected {key} with one of {', '.join(map(shown, zones))}, got {got}; "
            "correct allowedTopologies of the StorageClass"
        )
    return sorted(allowed, key=_rank_in(requirement, key))


def _named(segments: Segments, key: str) -> str:
    if key in segments:
        return shown(segments[key])
    others = ", ".join(shown(f"{other}={value}") for other, value in sorted(segments.items()))
    return f"{others} without {key}" if others else "no topology segment"


def _rank_in(requirement: TopologyRequirement | None, key: str) -> Callable[[str], int]:
    """Return what ranks zones by the caller's preference; those that it does not name come last, all alike."""
    preferred = [segments.get(key) for segments in requirement.preferred] if requirement is not None else []
    return lambda zone: preferred.index(zone) if zone in preferred else len(preferred)


@dataclass(frozen=True, slots=True)
class _Known:
    bytes: int
    at_s: float


@dataclass
class Placement:
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
        parameters: VolumeParameters,
        deadline: Deadline,
    ) -> list[str]:
        """Return the allowed zones in the order in which they are to be tried for this volume."""
        rank = _rank_in(requirement, key)
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

    def _free(self, zones: Sequence[str], parameters: VolumeParameters, *, deadline: Deadline) -> dict[str, int]:
        """Return the usable bytes of each zone; 0 for one that does not say."""
        now_s = deadline.clock.monotonic()
        layout = parameters.layout
        kind: Hashable = parameters.vpg if layout is None else (layout, allowed_drives(parameters, None, layout))
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

    def _room(self, zone: str, parameters: VolumeParameters, *, deadline: Deadline) -> int:
        management = self.clusters.management(zone)
        return 0 if management is None else room(management, parameters, deadline=deadline).free_bytes


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
