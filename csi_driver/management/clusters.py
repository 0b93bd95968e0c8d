"""Which management serves which zone; fits `csi_driver.controller.ports.Clusters`."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from csi_driver.deadline import SYSTEM_CLOCK, Clock
from csi_driver.errors import InvalidRequest
from csi_driver.management.client import ManagementClient
from csi_driver.management.clusters_file import (
    ClustersFile,
    ClustersFileUnusable,
    Defaults,
    Source,
    read_source,
    understand,
)
from csi_driver.management.settings import ManagementSettings

_LOG = logging.getLogger(__name__)

_LOOK_EVERY_S = 1.0


class OneCluster:
    """A single storage cluster under its zone's name."""

    def __init__(self, zone: str, management: ManagementClient) -> None:
        self._zone = zone
        self._management = management

    def zones(self) -> Sequence[str]:
        """Return the one zone."""
        return (self._zone,)

    def management(self, zone: str) -> ManagementClient | None:
        """Return the management of this zone, None for every other name."""
        return self._management if zone == self._zone else None


@dataclass(frozen=True, slots=True)
class _Cluster:
    settings: ManagementSettings
    management: ManagementClient


class FileClusters:
    """The clusters that a file describes, followed as it changes. Thread-safe.

    The file is looked at when somebody asks for a zone, at most once a second, by content: a mounted ConfigMap is
    exchanged through links, and times of files say little about that. A version that cannot be used is reported once,
    and the last good one stays. A zone whose description did not change keeps its sessions.
    """

    def __init__(
        self,
        path: Path,
        defaults: Defaults,
        *,
        clock: Clock = SYSTEM_CLOCK,
        connect: Callable[[ManagementSettings], ManagementClient] = ManagementClient,
    ) -> None:
        self._path = path
        self._defaults = defaults
        self._clock = clock
        self._connect = connect
        self._looking = threading.Lock()
        self._seen: Source | str = read_source(path)
        self._file = understand(self._seen, defaults)
        self._clusters = self._connected(self._file, {})
        self._look_again_s = clock.monotonic() + _LOOK_EVERY_S
        self._report(self._file)

    def zones(self) -> Sequence[str]:
        """Return the zones in the file's order."""
        self._look()
        return tuple(self._clusters)

    def management(self, zone: str) -> ManagementClient | None:
        """Return the management of a zone, None for one that the file does not name (any more)."""
        self._look()
        cluster = self._clusters.get(zone)
        return cluster.management if cluster is not None else None

    def close(self) -> None:
        """Close the idle connections to all zones."""
        for cluster in self._clusters.values():
            cluster.management.close()

    def _look(self) -> None:
        # Whoever comes while another looks goes on with what there is.
        if self._clock.monotonic() < self._look_again_s or not self._looking.acquire(blocking=False):
            return
        try:
            self._take_changes()
        finally:
            self._look_again_s = self._clock.monotonic() + _LOOK_EVERY_S
            self._looking.release()

    def _take_changes(self) -> None:
        try:
            source: Source = read_source(self._path)
        except ClustersFileUnusable as problem:
            self._refuse(str(problem), problem.problems)
            return
        if source == self._seen:
            return
        try:
            changed = understand(source, self._defaults)
            clusters = self._connected(changed, self._clusters)
        except ClustersFileUnusable as problem:
            self._refuse(source, problem.problems)
            return
        except InvalidRequest as problem:
            self._refuse(source, [str(problem)])
            return
        before, self._seen, self._clusters = self._clusters, source, clusters
        self._report(changed)
        if changed.topology_key != self._file.topology_key or changed.zone_policy != self._file.zone_policy:
            _LOG.warning("%s: topologyKey or zoneSelectionPolicy changed; restart the driver to apply it", self._path)
        self._file = changed
        for zone, cluster in before.items():
            if clusters.get(zone) is not cluster:
                cluster.management.close()

    def _refuse(self, seen: Source, problems: Sequence[str]) -> None:
        if seen != self._seen:
            self._seen = seen
            _LOG.warning("%s is invalid, the last valid version remains in use: %s", self._path, "; ".join(problems))

    def _connected(self, file: ClustersFile, known: Mapping[str, _Cluster]) -> dict[str, _Cluster]:
        clusters = {}
        for zone, settings in file.zones.items():
            cluster = known.get(zone)
            if cluster is None or cluster.settings != settings:
                cluster = _Cluster(settings, self._connect(settings))
            clusters[zone] = cluster
        return clusters

    def _report(self, file: ClustersFile) -> None:
        for warning in file.warnings:
            _LOG.warning("%s: %s", self._path, warning)
        _LOG.info("%s describes the zones %s", self._path, ", ".join(file.zones))
