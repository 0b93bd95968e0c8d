# SPDX-License-Identifier: Apache-2.0
"""What the storage of each zone offers beside volumes, and whether any management answers."""

from __future__ import annotations

from dataclasses import dataclass, field

from csi_driver.controller.ports import Clusters, Management
from csi_driver.controller.zones import ZONE_POOL, ZonePool, any_of, ask, served
from csi_driver.deadline import Deadline
from csi_driver.errors import DriverError, NotOffered, PreconditionFailed, StorageUnavailable
from csi_driver.storage_model import Features

_CAPABILITIES_S = 5.0
_REACHABLE_S = 2.0
_ALL = Features(snapshots=True, group_snapshots=True, changed_blocks=True)
_NAMES = {"snapshots": "snapshots", "group_snapshots": "group snapshots", "changed_blocks": "lists of changed blocks"}


@dataclass(frozen=True, slots=True)
class ZoneFeatures:
    """The features of each zone, as its management told them last: at each health check, and on refusals."""

    clusters: Clusters
    pool: ZonePool = ZONE_POOL
    _told: dict[str, Features] = field(default_factory=dict)

    def learn(self, zone: str, *, deadline: Deadline) -> Features:
        """Ask the management of a zone."""
        features = served(self.clusters, zone).system_info(deadline=deadline).features
        self._told[zone] = features
        return features

    def has(self, zone: str, feature: str, *, deadline: Deadline) -> bool:
        known = self._told.get(zone)
        return getattr(known if known is not None else self.learn(zone, deadline=deadline), feature) is True

    def offered(self, *, deadline: Deadline) -> Features:
        """Return the features of all zones together, for the capabilities that sidecars ask for once at their start.

        A zone that never told and does not answer now may have all: each call to it finds out.
        """
        answers = self._answers(deadline.at_most(_CAPABILITIES_S))
        told = [answers.get(zone, _ALL) for zone in self.clusters.zones()]
        return Features(
            snapshots=any(each.snapshots for each in told),
            group_snapshots=any(each.group_snapshots for each in told),
            changed_blocks=any(each.changed_blocks for each in told),
        )

    def zones_with(self, feature: str, *, deadline: Deadline) -> list[str]:
        """Return the zones with a feature. Raises `NotOffered` if there is none, `StorageUnavailable` while unknown."""
        answers, zones = self._answers(deadline), sorted(self.clusters.zones())
        silent = [zone for zone in zones if zone not in answers]
        if silent:
            raise StorageUnavailable(f"unknown what the storage offers: no response of zone {', '.join(silent)}")
        found = [zone for zone in zones if getattr(answers[zone], feature)]
        if not found:
            raise NotOffered(_refusal(feature, {zone: answers[zone] for zone in zones}))
        return found

    def require(self, zone: str, feature: str, *, deadline: Deadline) -> Management:
        """Return the management of a zone with the feature. Raises `PreconditionFailed` or, if no zone has it,
        `NotOffered`.
        """
        known = self._told.get(zone)
        if known is None or not getattr(known, feature):
            known = self.learn(zone, deadline=deadline)
        if getattr(known, feature):
            return served(self.clusters, zone)
        others = [self._told.get(other) for other in self.clusters.zones()]
        family = PreconditionFailed if any(each is None or getattr(each, feature) for each in others) else NotOffered
        raise family(_refusal(feature, {zone: known}))

    def _answers(self, deadline: Deadline) -> dict[str, Features]:
        """Return what the zones told, now or before, without those that are silent."""
        unknown = [zone for zone in self.clusters.zones() if zone not in self._told]

        def told(zone: str) -> Features | None:
            try:
                return self.learn(zone, deadline=deadline)
            except DriverError:
                return None

        if unknown:
            ask(unknown, told, deadline=deadline, pool=self.pool)
        return dict(self._told)


def _refusal(feature: str, told: dict[str, Features]) -> str:
    reasons = (f"the storage of zone {zone} offers no {_NAMES[feature]}: {has.reason}" for zone, has in told.items())
    return "; ".join(reasons)


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
