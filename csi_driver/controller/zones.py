"""Questions to several zones at once, so that a dead one costs its own answer and nobody else's time."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import Future, as_completed, wait
from dataclasses import dataclass
from typing import Generic, Protocol, TypeVar

from csi_driver.background import DaemonPool
from csi_driver.controller.ports import Clusters, Management, TopologyRequirement
from csi_driver.deadline import Deadline
from csi_driver.errors import (
    DeadlineReached,
    Denied,
    DriverError,
    Exhausted,
    StorageUnavailable,
    Unauthenticated,
    shown,
)
from csi_driver.model import Segments

_log = logging.getLogger(__name__)

_REACHABLE_S = 2.0
T = TypeVar("T")

UNANSWERED = (StorageUnavailable, Unauthenticated, Denied)
"""What a zone that cannot be asked answers; everything else is an answer, good or bad."""

_THREADS_PER_ZONE = 32
_LAST_WORD_S = 0.25
# A question ends by itself at its deadline; this much later its own reason has arrived.
_OPTIONAL_S = 0.5


class Crew(Protocol):
    """Who carries questions to zones."""

    def submit(self, zone: str, question: Callable[[], T]) -> Future[T]:
        """Begin to ask one zone."""
        ...


class Threads:
    """At most `per_zone` daemon threads for each zone: a zone that hangs keeps no other waiting."""

    def __init__(self, per_zone: int = _THREADS_PER_ZONE) -> None:
        self._per_zone = per_zone
        self._lock = threading.Lock()
        self._pools: dict[str, DaemonPool] = {}

    def submit(self, zone: str, question: Callable[[], T]) -> Future[T]:
        """Begin to ask one zone."""
        with self._lock:
            pool = self._pools.setdefault(zone, DaemonPool(f"zone-{zone}", self._per_zone))
        return pool.submit(question)


CREW: Crew = Threads()


@dataclass(frozen=True, slots=True)
class Answers(Generic[T]):
    """What the zones said: an answer each, or why there is none (only for what is in `UNANSWERED`)."""

    given: Mapping[str, T]
    missing: Mapping[str, DriverError]

    def all(self) -> Mapping[str, T]:
        """Return the answers of all zones. Raises `StorageUnavailable` naming every zone that gave none."""
        if self.missing:
            raise unavailable(self.missing)
        return self.given


def served(clusters: Clusters, zone: str) -> Management:
    """Return the management of a zone that a call has begun to ask.

    Raises `StorageUnavailable` for one that was taken out of the configuration since: its volumes are not gone.
    """
    management = clusters.management(zone)
    if management is None:
        raise StorageUnavailable(f"zone {zone} is no longer configured: it was removed from the clusters file")
    return management


def unavailable(missing: Mapping[str, DriverError]) -> DriverError:
    """Return the failure of a call that needed these zones: the only one's own, else one that names all."""
    if len(missing) == 1:
        return next(iter(missing.values()))
    return StorageUnavailable("; ".join(f"zone {zone}: {reason}" for zone, reason in sorted(missing.items())))


def ask(
    zones: Iterable[str],
    question: Callable[[str], T],
    *,
    deadline: Deadline,
    optional: Iterable[str] = (),
    crew: Crew = CREW,
) -> Answers[T]:
    """Ask all zones at once and wait until each has answered or the time is up.

    `optional` zones are asked too, but waited for only a moment longer than the others. What a question raises beyond
    `UNANSWERED` is raised here. A single zone is asked by the caller's own thread.
    """
    wanted, welcome = list(zones), list(optional)
    if len(wanted) == 1 and not welcome:
        return _asked_alone(wanted[0], question)
    asked = {zone: crew.submit(zone, lambda zone=zone: question(zone)) for zone in [*wanted, *welcome]}  # type: ignore[misc]
    wait([asked[zone] for zone in wanted], timeout=deadline.remaining_s() + _LAST_WORD_S)
    wait([asked[zone] for zone in welcome], timeout=min(_OPTIONAL_S, deadline.remaining_s()))
    given: dict[str, T] = {}
    missing: dict[str, DriverError] = {}
    for zone, future in asked.items():
        if not future.done():
            future.cancel()
            missing[zone] = DeadlineReached(f"a response of zone {zone}")
            continue
        try:
            given[zone] = future.result()
        except DriverError as problem:
            if zone in wanted and not isinstance(problem, UNANSWERED):
                raise
            missing[zone] = problem
    return Answers(given, missing)


def _asked_alone(zone: str, question: Callable[[str], T]) -> Answers[T]:
    try:
        return Answers({zone: question(zone)}, {})
    except UNANSWERED as problem:
        return Answers({}, {zone: problem})


def any_says_yes(
    zones: Iterable[str], question: Callable[[str], bool], *, deadline: Deadline, crew: Crew = CREW
) -> bool:
    """Tell whether any zone says yes, as soon as one does. Raises why, where none does and some fail."""
    asked = {crew.submit(zone, lambda zone=zone: question(zone)): zone for zone in zones}  # type: ignore[misc]
    missing: dict[str, DriverError] = {}
    try:
        for future in as_completed(asked, timeout=deadline.remaining_s() + _LAST_WORD_S):
            try:
                if future.result():
                    return True
            except DriverError as problem:
                missing[asked[future]] = problem
    except TimeoutError:
        late = [zone for future, zone in asked.items() if not future.done()]
        missing |= {zone: DeadlineReached(f"a response of zone {zone}") for zone in late}
    if missing:
        raise unavailable(missing)
    return False


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
    return sorted(allowed, key=rank_in(requirement, key))


def _named(segments: Segments, key: str) -> str:
    if key in segments:
        return shown(segments[key])
    others = ", ".join(shown(f"{other}={value}") for other, value in sorted(segments.items()))
    return f"{others} without {key}" if others else "no topology segment"


def rank_in(requirement: TopologyRequirement | None, key: str) -> Callable[[str], int]:
    """Return what ranks zones by the caller's preference; those that it does not name come last, all alike."""
    preferred = [segments.get(key) for segments in requirement.preferred] if requirement is not None else []
    return lambda zone: preferred.index(zone) if zone in preferred else len(preferred)


class Readiness:
    """Whether a management answers."""

    def __init__(self, clusters: Clusters, *, crew: Crew = CREW) -> None:
        self._clusters = clusters
        self._crew = crew
        self._was_ready = False

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
