"""One volume in one zone, where several are served: found before it is made, looked for again afterwards."""

from __future__ import annotations

import hashlib
import logging
import threading
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import NoReturn, TypeVar
from uuid import uuid4

from csi_driver.controller.ports import Clusters, Management
from csi_driver.controller.volume_metadata import Creation, read_creation
from csi_driver.controller.waiting import within
from csi_driver.controller.zones import CREW, Crew, ask, served, unavailable
from csi_driver.deadline import Deadline
from csi_driver.errors import (
    ExistsDifferently,
    OperationPending,
    PreconditionFailed,
    shown,
)
from csi_driver.settings import ControllerSettings
from csi_driver.storage_model import Volume

T = TypeVar("T")
_log = logging.getLogger(__name__)
SETTLED_S = 30.0
WITHDRAW_S = 10.0
_GIVE_WAY_S = 3.0
_MOST_KNOWN = 4096


@dataclass(frozen=True, slots=True)
class Found:
    """A volume, and the zone that has it."""

    zone: str
    volume: Volume

    @property
    def creation(self) -> Creation:
        return read_creation(self.volume.metadata)

    def is_of(self, csi_name: str | None) -> bool:
        """Tell whether it was made for this CSI name and is there to stay."""
        return self.creation.csi_name == csi_name and not self.volume.is_being_deleted

    def __str__(self) -> str:
        return f"zone {self.zone} (uuid {self.volume.uuid})"


@dataclass
class DuplicateGuard:
    """Looks for volumes by their CSI name over zones. `wall_s` is the time since the epoch."""

    clusters: Clusters
    settings: ControllerSettings
    crew: Crew = field(default=CREW)
    wall_s: Callable[[], float] = time.time
    maker: str = field(default_factory=lambda: uuid4().hex)
    _confirmed: dict[str, None] = field(default_factory=dict)
    """Uuids of volumes that this process made and saw alone: it knows them to be settled."""
    _first_seen: dict[str, float] = field(default_factory=dict)
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def find(self, name: str, csi_name: str, allowed: Sequence[str], *, deadline: Deadline) -> Found | list[str]:
        """Return the volume that was made for this CSI name, or what else stands in its place.

        Where nobody has it: the allowed zones that said so, in which it may be made. Raises `OperationPending` while
        it may still be withdrawn, `ExistsDifferently` where a zone that is not allowed has it, `PreconditionFailed`
        where two have it and nothing tells which is in use, and what keeps an allowed zone from being asked.
        """
        asked_at_s = self.wall_s()
        here, elsewhere, silent = self._look(name, allowed, deadline=deadline)
        alive = [found for found in (*here, *elsewhere) if found.is_of(csi_name)]
        if len(alive) == 1 and self._is_own(alive[0]) and alive[0].zone in allowed:
            # The call that made it has ended: calls for one name exclude each other within a process.
            age_s = asked_at_s - (alive[0].creation.made_at_s or 0)
            self.confirm(alive[0], allowed, deadline.clock.monotonic() - age_s, deadline=deadline)
            return alive[0]
        the_one = self._the_one(alive, asked_at_s)
        if the_one is not None:
            if the_one.zone in allowed:
                return the_one
            place = f"zone: expected {' or '.join(allowed)}, got {the_one}"
            raise ExistsDifferently(f"volume {shown(csi_name)}", [place])
        if here:
            return here[0]
        return [zone for zone in allowed if zone not in silent]

    def _the_one(self, alive: Sequence[Found], asked_at_s: float) -> Found | None:
        """Return which of several is the volume that somebody may have been told of."""
        for found in alive:
            if found.volume.uuid in self._confirmed:
                return found
        for found in alive:
            self._refuse_unsettled(found, asked_at_s)
        if len(alive) < 2:
            return next(iter(alive), None)
        report_double(alive)
        used = [found for found in alive if found.volume.reservation.version > 1]
        if len(used) == 1:
            return used[0]
        raise PreconditionFailed(
            f"volume {alive[0].volume.name} exists in {' and in '.join(str(found) for found in alive)}, left by a "
            "controller that crashed; delete the one that no PersistentVolume names"
        )

    def _is_own(self, found: Found) -> bool:
        return found.creation.maker == self.maker and found.volume.uuid not in self._confirmed

    def _refuse_unsettled(self, found: Found, asked_at_s: float) -> None:
        """Raise `OperationPending` while the volume's maker may withdraw it.

        Its age is judged by what its maker wrote down; where that clock is ahead, by when it was first seen here.
        """
        made_at_s = found.creation.made_at_s
        if made_at_s is None:
            return
        uuid = found.volume.uuid
        with self._lock:
            _make_room(self._first_seen)
            seen_at_s = self._first_seen.setdefault(uuid, asked_at_s)
        if asked_at_s < min(made_at_s, seen_at_s) + SETTLED_S:
            raise OperationPending(
                f"volume {found.volume.name} has just been created in {found} by another request; "
                f"retry after {SETTLED_S:.0f} s"
            )

    def confirm(self, made: Found, allowed: Sequence[str], sent_at_s: float, *, deadline: Deadline) -> None:
        """Return when no other zone has the volume that we have just made.

        `sent_at_s`: when its creation was sent, by the deadline's clock. Otherwise withdraws it and raises
        `OperationPending`; the same call then finds the other's. Raises what keeps an allowed zone from being asked.
        """
        csi_name = made.creation.csi_name

        def others() -> list[Found]:
            here, elsewhere, _ = self._look(made.volume.name, allowed, but=made.zone, deadline=deadline)
            return [found for found in (*here, *elsewhere) if found.is_of(csi_name)]

        seen = others()
        if seen and _comes_first(made, seen):
            within(deadline, _GIVE_WAY_S, margin_s=self.settings.answer_margin_s).wait_until(lambda: not others())
            seen = others()
        if not seen:
            self._remember(made.volume.uuid)
            return
        self._withdraw(made, seen, sent_at_s, deadline=deadline)

    def _look(
        self, name: str, allowed: Sequence[str], *, but: str | None = None, deadline: Deadline
    ) -> tuple[list[Found], list[Found], set[str]]:
        """Return what has this name in the allowed zones and, as far as they answer at once, in all others.

        And the allowed zones that did not answer, where that is allowed.
        """
        zones = [zone for zone in allowed if zone != but]
        others = [zone for zone in self.clusters.zones() if zone not in allowed and zone != but]
        if not zones and not others:
            return [], [], set()
        answers = ask(
            zones, lambda zone: self._volume(zone, name, deadline=deadline), deadline=deadline, optional=others,
            crew=self.crew,
        )  # fmt: skip
        silent = {zone: reason for zone, reason in answers.missing.items() if zone in zones}
        if silent and not self.settings.allow_zone_skip:
            raise unavailable(silent)
        for zone, reason in sorted(silent.items()):
            _log.warning("zone %s is skipped although it may have volume %s: %s", zone, name, reason)
        found = {zone: Found(zone, volume) for zone, volume in answers.given.items() if volume is not None}
        here, elsewhere = ([found[zone] for zone in some if zone in found] for some in (zones, others))
        return here, elsewhere, set(silent)

    def _volume(self, zone: str, name: str, *, deadline: Deadline) -> Volume | None:
        return self._management(zone).volume(name, deadline=deadline)

    def _management(self, zone: str) -> Management:
        return served(self.clusters, zone)

    def _withdraw(self, made: Found, seen: Sequence[Found], sent_at_s: float, *, deadline: Deadline) -> NoReturn:
        """Delete the volume that we have just made, as another call made it elsewhere. Always raises."""
        clock = deadline.clock
        latest = Deadline(min(deadline.at_s, sent_at_s + WITHDRAW_S), sent_at_s, clock)
        management = self._management(made.zone)

        def is_gone() -> bool:
            present = management.volume(made.volume.name, deadline=deadline)
            if present is None or present.uuid != made.volume.uuid or present.is_being_deleted:
                return True
            if present.reservation.version != 1 or latest.expired():
                return False
            try:
                management.delete_volume(present, deadline=latest)
            except OperationPending:  # it is not ready to be deleted yet
                return False
            _log.info("deleted the duplicate of volume %s in %s: %s has it", made.volume.name, made, seen[0])
            return True

        if not latest.wait_until(is_gone):
            report_double([*seen, made])
        raise OperationPending(
            f"volume {made.volume.name} was created in {seen[0]} concurrently; retry to use that one"
        )

    def _remember(self, uuid: str) -> None:
        with self._lock:
            _make_room(self._confirmed)
            self._confirmed[uuid] = None


def _make_room(known: dict[str, T]) -> None:
    """Forget the older half of what is known of single volumes when it is much."""
    if len(known) >= _MOST_KNOWN:
        for old in list(known)[: _MOST_KNOWN // 2]:
            del known[old]


def _comes_first(made: Found, others: Sequence[Found]) -> bool:
    """Tell whether this zone gives the others time to go: the same for everybody who compares them."""

    def rank(zone: str) -> bytes:
        return hashlib.sha256(f"{made.volume.name}\n{zone}".encode()).digest()

    return all(rank(made.zone) < rank(other.zone) for other in others)


def report_double(found: Sequence[Found]) -> None:
    """Tell an operator that a volume exists more than once. Nobody here can know which one is in use."""
    _log.warning(
        "volume %s of the CSI name %s exists in several zones: %s; a crash or a zone that was skipped has left one of "
        "them behind, delete the one that no PersistentVolume names",
        found[0].volume.name,
        shown(found[0].creation.csi_name or ""),
        ", ".join(str(each) for each in found),
    )


def doubles(volumes: Iterable[Found]) -> list[list[Found]]:
    """Return the volumes that several zones have under one name for one CSI name."""
    seen: dict[str, list[Found]] = {}
    for found in volumes:
        seen.setdefault(found.volume.name, []).append(found)
    groups = []
    for same in seen.values():
        csi_name = same[0].creation.csi_name if len(same) > 1 else None
        if csi_name is not None and all(found.is_of(csi_name) for found in same):
            groups.append(same)
    return groups
