# SPDX-License-Identifier: Apache-2.0
"""Requests to several zones at once, and the guard that keeps a CSI name one volume across zones."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import Future, as_completed, wait
from dataclasses import dataclass, field
from typing import Generic, TypeVar

from csi_driver import errors
from csi_driver.controller.ports import Clusters, Management, TopologyRequirement
from csi_driver.controller.volume_metadata import Creation, read_creation, reserved_bytes
from csi_driver.deadline import Deadline
from csi_driver.model import Segments
from csi_driver.storage_model import Reservation, Volume
from csi_driver.telemetry import tracing
from csi_driver.thread_pool import Pool

T = TypeVar("T")
_log = logging.getLogger(__name__)

UNANSWERED = (errors.StorageUnavailable, errors.Unauthenticated, errors.Denied)
"""Errors of a zone that cannot be asked; every other error is an answer."""
_THREADS_PER_ZONE = 32
_ANSWER_MARGIN_S = 0.25
"""A request ends at its deadline, and its own error arrives a moment later."""
_OPTIONAL_S = 0.5


@dataclass(frozen=True, slots=True)
class ZonePool:
    """Daemon threads for each zone: a zone that does not respond blocks its own threads only."""

    per_zone: int = _THREADS_PER_ZONE
    _pools: dict[str, Pool] = field(default_factory=dict)

    def submit(self, zone: str, request: Callable[[], T]) -> Future[T]:
        return self._pools.setdefault(zone, Pool(f"zone-{zone}", self.per_zone)).submit(tracing.carried(request))


ZONE_POOL = ZonePool()


@dataclass(frozen=True, slots=True)
class Answers(Generic[T]):
    """The answers of zones; `missing`: the `UNANSWERED` errors of the others."""

    given: Mapping[str, T]
    missing: Mapping[str, errors.DriverError]

    def all(self) -> Mapping[str, T]:
        if self.missing:
            raise unavailable(self.missing)
        return self.given


def served(clusters: Clusters, zone: str) -> Management:
    management = clusters.management(zone)
    if management is None:
        raise errors.StorageUnavailable(f"zone {zone} is no longer configured: it was removed from the clusters file")
    return management


def unavailable(missing: Mapping[str, errors.DriverError]) -> errors.DriverError:
    if len(missing) == 1:
        return next(iter(missing.values()))
    return errors.StorageUnavailable("; ".join(f"zone {zone}: {reason}" for zone, reason in sorted(missing.items())))


def ask(
    zones: Iterable[str],
    request: Callable[[str], T],
    *,
    deadline: Deadline,
    optional: Iterable[str] = (),
    pool: ZonePool = ZONE_POOL,
) -> Answers[T]:
    """Send a request to all zones at once; wait until each has answered, or for the deadline.

    `optional` zones get `_OPTIONAL_S` more, and their errors are kept, as the `UNANSWERED` ones of the others.
    """
    required, others = list(zones), list(optional)
    if len(required) == 1 and not others:
        try:
            return Answers({required[0]: request(required[0])}, {})
        except UNANSWERED as error:
            return Answers({}, {required[0]: error})
    futures = {zone: pool.submit(zone, lambda zone=zone: request(zone)) for zone in [*required, *others]}  # type: ignore[misc]
    wait([futures[zone] for zone in required], timeout=deadline.remaining_s() + _ANSWER_MARGIN_S)
    wait([futures[zone] for zone in others], timeout=min(_OPTIONAL_S, deadline.remaining_s()))
    given: dict[str, T] = {}
    missing: dict[str, errors.DriverError] = {}
    for zone, future in futures.items():
        if not future.done():
            future.cancel()
            missing[zone] = errors.DeadlineReached(f"a response of zone {zone}")
            continue
        try:
            given[zone] = future.result()
        except errors.DriverError as error:
            if zone in required and not isinstance(error, UNANSWERED):
                raise
            missing[zone] = error
    return Answers(given, missing)


def any_of(zones: Iterable[str], request: Callable[[str], bool], *, deadline: Deadline, pool: ZonePool) -> bool:
    """Return true as soon as the request to any zone returns true. Raises the errors if none does and some fail."""
    futures = {pool.submit(zone, lambda zone=zone: request(zone)): zone for zone in zones}  # type: ignore[misc]
    missing: dict[str, errors.DriverError] = {}
    try:
        for future in as_completed(futures, timeout=deadline.remaining_s() + _ANSWER_MARGIN_S):
            try:
                if future.result():
                    return True
            except errors.DriverError as error:
                missing[futures[future]] = error
    except TimeoutError:
        late = [zone for future, zone in futures.items() if not future.done()]
        missing |= {zone: errors.DeadlineReached(f"a response of zone {zone}") for zone in late}
    if missing:
        raise unavailable(missing)
    return False


def allowed_zones(zones: Sequence[str], requirement: TopologyRequirement | None, key: str) -> list[str]:
    """Return the zones that satisfy the requirement, preferred ones first. Raises `Exhausted` if there is none."""
    if requirement is None:
        return list(zones)
    requisite = [segments.get(key) for segments in requirement.requisite]
    allowed = [zone for zone in zones if not requirement.requisite or zone in requisite]
    if not allowed:
        got = "; ".join(sorted({_named(segments, key) for segments in requirement.requisite}))
        raise errors.Exhausted(
            f"accessibility_requirements: expected {key} with one of {', '.join(map(errors.shown, zones))}, got {got}; "
            "correct allowedTopologies of the StorageClass"
        )
    return sorted(allowed, key=rank_in(requirement, key))


def rank_in(requirement: TopologyRequirement | None, key: str) -> Callable[[str], int]:
    """Return the function that ranks zones by `preferred`; zones that it does not name share the last rank."""
    preferred = [segments.get(key) for segments in requirement.preferred] if requirement is not None else []
    return lambda zone: preferred.index(zone) if zone in preferred else len(preferred)


def _named(segments: Segments, key: str) -> str:
    if key in segments:
        return errors.shown(segments[key])
    others = ", ".join(errors.shown(f"{other}={value}") for other, value in sorted(segments.items()))
    return f"{others} without {key}" if others else "no topology segment"


@dataclass(frozen=True, slots=True)
class Found:
    zone: str
    volume: Volume
    creation: Creation
    management: Management

    @property
    def reserved_bytes(self) -> int:
        return reserved_bytes(self.volume)

    @property
    def is_blank(self) -> bool:
        """Whether the volume has no content: this driver created it, without a source, and it was never attached."""
        creation = self.creation
        return creation.is_ours and creation.origin is None and self.volume.reservation == Reservation()

    def has_name(self, csi_name: str | None) -> bool:
        return self.creation.csi_name == csi_name and not self.volume.is_being_deleted

    def __str__(self) -> str:
        return f"zone {self.zone} (uuid {self.volume.uuid})"


def find_in(clusters: Clusters, zone: str, name: str, *, deadline: Deadline) -> Found | None:
    management = served(clusters, zone)
    volume = management.volume(name, deadline=deadline)
    return None if volume is None else Found(zone, volume, read_creation(volume.metadata), management)


@dataclass(frozen=True, slots=True)
class DuplicateGuard:
    """Finds the volume of a CSI name in several zones, and refuses two (docs/architecture.md, Topology)."""

    clusters: Clusters
    allow_zone_skip: bool = False
    pool: ZonePool = ZONE_POOL

    @property
    def is_single(self) -> bool:
        """Whether there is one zone, where the storage itself keeps every name unique: nothing is asked."""
        return len(self.clusters.zones()) == 1

    def existing(self, name: str, csi_name: str, allowed: Sequence[str], *, deadline: Deadline) -> Found | None:
        if self.is_single:
            return find_in(self.clusters, allowed[0], name, deadline=deadline)
        found = self.find(name, csi_name, allowed, deadline=deadline)
        return found if isinstance(found, Found) else None

    def find(self, name: str, csi_name: str, allowed: Sequence[str], *, deadline: Deadline) -> Found | list[str]:
        """Return the volume of the CSI name, else one that occupies its `name`, else the allowed zones that answered.

        Raises `ExistsDifferently` if a zone that is not allowed has the volume, and the errors of silent allowed zones.
        """
        if self.is_single:
            return list(allowed)
        here, elsewhere, silent = self._look(name, allowed, deadline=deadline)
        same = [found for found in (*here, *elsewhere) if found.has_name(csi_name)]
        if not same:
            return here[0] if here else [zone for zone in allowed if zone not in silent]
        found = _the_only(same)
        if found.zone not in allowed:
            place = f"zone: expected {' or '.join(allowed)}, got {found}"
            raise errors.ExistsDifferently(f"volume {errors.shown(csi_name)}", [place])
        self.confirm(found, allowed, deadline=deadline)
        return found

    def confirm(self, found: Found, allowed: Sequence[str], *, deadline: Deadline) -> None:
        """Ask all other zones, after `found` was seen. Raises `PreconditionFailed` naming both; nothing is deleted."""
        here, elsewhere, _ = self._look(found.volume.name, allowed, but=found.zone, deadline=deadline)
        others = [other for other in (*here, *elsewhere) if other.has_name(found.creation.csi_name)]
        if others and _the_only([found, *others]) is not found:
            name = found.volume.name
            raise errors.OperationPending(f"volume {name} exists in {others[0]} as well, and is used there; retry")

    def _look(
        self, name: str, allowed: Sequence[str], *, but: str | None = None, deadline: Deadline
    ) -> tuple[list[Found], list[Found], set[str]]:
        """Return the volumes in allowed zones, those in others that answer at once, and the silent allowed zones."""
        zones = [zone for zone in allowed if zone != but]
        others = [zone for zone in self.clusters.zones() if zone not in allowed and zone != but]
        if not zones and not others:
            return [], [], set()
        answers = ask(
            zones,
            lambda zone: find_in(self.clusters, zone, name, deadline=deadline),
            deadline=deadline,
            optional=others,
            pool=self.pool,
        )
        silent = {zone: reason for zone, reason in answers.missing.items() if zone in zones}
        if silent and not self.allow_zone_skip:
            raise unavailable(silent)
        for zone, reason in sorted(silent.items()):
            _log.warning("zone %s is skipped although it may have volume %s: %s", zone, name, reason)
        here, elsewhere = (
            [found for zone in some if (found := answers.given.get(zone)) is not None] for some in (zones, others)
        )
        return here, elsewhere, set(silent)


def _the_only(same: Sequence[Found]) -> Found:
    """Return the volume, of several the only one that was ever attached. Raises `PreconditionFailed` naming all."""
    if len(same) == 1:
        return same[0]
    used = [found for found in same if found.volume.reservation.version > 1]
    if len(used) == 1:
        return used[0]
    problem = f"volume {same[0].volume.name} exists in {' and in '.join(map(str, same))}"
    raise errors.PreconditionFailed(f"{problem}; delete the one that no PersistentVolume names")
