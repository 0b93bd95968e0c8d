# SPDX-License-Identifier: Apache-2.0
"""Features that the storage of each zone offers in addition to volumes, and whether any management answers."""

from __future__ import annotations

from contextlib import suppress
from dataclasses import dataclass, field

from csi_driver.controller.ports import Clusters, Management
from csi_driver.controller.zones import ZONE_POOL, ZonePool, any_of, ask, served
from csi_driver.deadline import Deadline
from csi_driver.errors import DriverError, NotOffered, PreconditionFailed, StorageUnavailable
from csi_driver.storage_model import Features

_CAPABILITIES_S = 5.0
_REACHABLE_S = 2.0
_ALL = Features(snapshots=True, group_snapshots=True, changed_blocks=True, reclaims_space=True)
_NAMES = {
    "snapshots": "snapshots",
    "deletions": "snapshots",
    "group_snapshots": "group snapshots",
    "changed_blocks": "lists of changed blocks",
    "reclaims_space": "reclaim of space",
}


@dataclass(frozen=True, slots=True)
class ZoneFeatures:
    """The features of each zone, as its management told them last: at each health check, and on refusals."""

    clusters: Clusters
    pool: ZonePool = ZONE_POOL
    _told: dict[str, tuple[Management, Features]] = field(default_factory=dict)
    """A zone with changed settings has a new client, and maybe another engine, of which nothing is known yet."""

    def learn(self, zone: str, *, deadline: Deadline) -> tuple[Management, Features]:
        """Ask the management of a zone."""
        management = served(self.clusters, zone)
        told = self._told[zone] = management, management.system_info(deadline=deadline).features
        return told

    def _known(self, zone: str) -> tuple[Management, Features] | None:
        told = self._told.get(zone)
        return told if told is not None and told[0] is self.clusters.management(zone) else None

    def find(self, zone: str, feature: str, *, deadline: Deadline) -> Management | None:
        """Return the management of a zone if it has the feature."""
        management, features = self._known(zone) or self.learn(zone, deadline=deadline)
        return management if getattr(features, feature) else None

    def offered(self, *, deadline: Deadline) -> Features:
        """Return the features of all zones together, for the capabilities that sidecars ask for once at their start.

        A zone that never told and does not answer now may have all: each call to it finds out.
        """
        answers = self._answers(deadline.at_most(_CAPABILITIES_S))
        told = [answers[zone][1] if zone in answers else _ALL for zone in self.clusters.zones()]
        return Features(
            snapshots=any(each.snapshots for each in told),
            group_snapshots=any(each.group_snapshots for each in told),
            changed_blocks=any(each.changed_blocks for each in told),
            reclaims_space=any(each.reclaims_space for each in told),
        )

    def zones_with(self, feature: str, *, deadline: Deadline) -> dict[str, Management]:
        """Return the zones with a feature. Raises `NotOffered` if there is none, `StorageUnavailable` while unknown."""
        answers, zones = self._answers(deadline), sorted(self.clusters.zones())
        silent = [zone for zone in zones if zone not in answers]
        if silent:
            raise StorageUnavailable(f"features of the storage are unknown: no response of zone {', '.join(silent)}")
        found = {zone: answers[zone][0] for zone in zones if getattr(answers[zone][1], feature)}
        if not found:
            raise NotOffered("; ".join(_refusal(feature, zone, answers[zone][1]) for zone in zones))
        return found

    def require(self, zone: str, feature: str, *, deadline: Deadline) -> Management:
        """Return the management of a zone with the feature. Raises `PreconditionFailed` or, if no zone has it,
        `NotOffered`.
        """
        told = self._known(zone)
        if told is None or not getattr(told[1], feature):
            told = self.learn(zone, deadline=deadline)
        management, features = told
        if getattr(features, feature):
            return management
        others = [self._known(other) for other in self.clusters.zones()]
        may_be = any(each is None or getattr(each[1], feature) for each in others)
        raise (PreconditionFailed if may_be else NotOffered)(_refusal(feature, zone, features))

    def _answers(self, deadline: Deadline) -> dict[str, tuple[Management, Features]]:
        """Return the latest answers of the zones, without the zones that never answered."""
        zones = self.clusters.zones()

        def learn(zone: str) -> None:
            with suppress(DriverError):
                self.learn(zone, deadline=deadline)

        if unknown := [zone for zone in zones if self._known(zone) is None]:
            ask(unknown, learn, deadline=deadline, pool=self.pool)
        return {zone: told for zone in zones if (told := self._known(zone)) is not None}


def _refusal(feature: str, zone: str, has: Features) -> str:
    return f"the storage of zone {zone} offers no {_NAMES[feature]}: {has.reason}"


@dataclass(frozen=True, slots=True)
class Readiness:
    features: ZoneFeatures

    def why_unreachable(self) -> str:
        try:
            is_reachable = self.any_answers(Deadline.after(_REACHABLE_S))
        except DriverError as error:
            return str(error)
        return "" if is_reachable else "no storage management is configured"

    def any_answers(self, deadline: Deadline) -> bool:
        """Return whether any management answers. Raises the errors of the zones if none does and some fail."""
        clusters = self.features.clusters

        def answers(zone: str) -> bool:
            if clusters.management(zone) is None:
                return False
            self.features.learn(zone, deadline=deadline)
            return True

        return any_of(clusters.zones(), answers, deadline=deadline, pool=ZONE_POOL)
