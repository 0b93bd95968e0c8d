"""`--clusters-file`: what a description of several clusters adds to the command line."""

from __future__ import annotations

from dataclasses import replace

from csi_driver.config import shared
from csi_driver.config import values as read
from csi_driver.config.flags import Flag, Values
from csi_driver.config.made import ClustersPlace
from csi_driver.config.shared import LOG_LEVEL, NO_PATH, TOPOLOGY_KEY
from csi_driver.errors import shown
from csi_driver.management.clusters import ClustersFile, parse_clusters
from csi_driver.telemetry.log import LogSettings
from csi_driver.yaml_document import InvalidDocument, read_source

CLUSTERS_FILE = Flag(
    "--clusters-file",
    read.path,
    NO_PATH,
    "none",
    "YAML or JSON file of the zones with their management servers and credentials; read again when it changes. Also"
    " accepted: the topology JSON of older drivers, or the mount directory of their ConfigMap.",
    metavar="FILE",
)
NO_CLUSTERS = ClustersFile({})


def read_clusters(values: Values, place: ClustersPlace) -> ClustersFile:
    """Read the description of the clusters; what is wrong with it is among the problems of the command line."""
    try:
        return parse_clusters(read_source(place.path), place.defaults)
    except InvalidDocument as unusable:
        values.problems.extend(f"{place.path}: {problem}" for problem in unusable.problems)
        return NO_CLUSTERS


def chosen_topology_key(values: Values, described: ClustersFile) -> str:
    """Return the flag's topology key where it is set, else the description's, else the default."""
    key = values.chosen(TOPOLOGY_KEY, described.topology_key)
    try:
        return read.topology_key(key)
    except ValueError as error:
        values.problems.append(f"topologyKey: expected {error}, got {shown(key)}")
        return TOPOLOGY_KEY.default


def chosen_log(values: Values, level: str | None) -> LogSettings:
    """Return the settings of the log, with the level of an older configuration where no flag sets one."""
    return replace(shared.log(values), level=values.chosen(LOG_LEVEL, level))
