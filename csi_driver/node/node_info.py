# SPDX-License-Identifier: Apache-2.0
"""NodeGetInfo: node ID, volume limit and zone; and whether the node is ready."""

from __future__ import annotations

import ipaddress
import logging
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from csi_driver.errors import DriverError, HostFailure, InvalidRequest, PreconditionFailed, StorageUnavailable, shown
from csi_driver.model import DEFAULT_TOPOLOGY_KEY, DEFAULT_ZONE, ClusterNames, Segments
from csi_driver.node import NodeInfo
from csi_driver.node.ports import Devices, Tools
from csi_driver.node.usage_records import UsageRecords
from csi_driver.node_settings import NodeSettings

logger = logging.getLogger(__name__)


@dataclass(slots=True, kw_only=True)
class NodeIdentity:
    """NodeGetInfo, and the node's part of Probe."""

    devices: Devices
    tools: Tools
    zone: NodeZone
    records: UsageRecords
    settings: NodeSettings
    _client_uuid: str | None = field(default=None, init=False)
    _client_limit: int = field(default=0, init=False)

    def info(self) -> NodeInfo:
        """Return the node. Raises `StorageUnavailable`, `PreconditionFailed` while not known."""
        return NodeInfo(self._client_id() or self.settings.node_name, self._limit(), self.zone.segments())

    def _client_id(self) -> str | None:
        """Return the client's UUID, or its last one: a node must not change its ID."""
        client, name = self.devices.client(), self.settings.node_name
        if client.connects and name != name.lower():
            raise PreconditionFailed(
                f"node name {name}: expected no capital letters, as the storage knows this node by it; set --node-name"
            )
        if client.uuid is not None or client.connects:
            self._client_uuid, self._client_limit = client.uuid or self._client_uuid, client.volume_limit
        if self._client_uuid is None and client.is_expected:
            state = "is being upgraded, or starts" if client.is_upgrading else "is not running yet (no status files)"
            raise StorageUnavailable(f"the storage client of this node {state}: its uuid, the node's id, is not known")
        return self._client_uuid

    def _limit(self) -> int:
        """Return the limit for CSI volumes, at least 1 after those of others; 0 = no limit."""
        limits = (self.settings.max_volumes_per_node, self._client_limit)
        limit = min((limit for limit in limits if limit), default=0)
        return max(1, limit - foreign_attachments(self.devices, self.records)) if limit else 0

    def why_not_ready(self) -> str:
        """Return why this node cannot be registered or serve; empty = it can."""
        try:
            self.info()
        except DriverError as problem:
            return str(problem)
        return "; ".join(self.problems())

    def problems(self) -> Sequence[str]:
        """Return what keeps this machine from serving volumes, a sentence each."""
        found = list(self.tools.problems())
        try:
            self.zone.segments()
        except DriverError as problem:
            found.append(str(problem))
        return found


def foreign_attachments(devices: Devices, records: UsageRecords) -> int:
    """Return how many volumes have neither a CSI reference nor a usage record on this node."""
    return sum(not _has_record(records, uuid) for uuid in devices.unnamed())


def _has_record(records: UsageRecords, uuid: str) -> bool:
    try:
        return records.read(uuid) is not None
    except HostFailure:
        return True  # unreadable, but only this driver makes records


@dataclass(slots=True, kw_only=True)
class NodeZone:
    """The storage cluster ("zone") of this node, found without credentials and then kept.

    In this order: the configured zone (`given`); the storage client's management servers, looked up in the clusters
    file; the node's name in the topology file of older drivers; the only zone.
    """

    given: str | None
    topology_key: str | None
    node_name: str
    client_servers: Callable[[], Sequence[str]] = tuple
    clusters: Callable[[], ClusterNames] = ClusterNames
    _found: Segments | None = field(default=None, init=False)

    def segments(self) -> Segments:
        """Return the segments. Raises `PreconditionFailed` unless exactly one zone matches."""
        if self._found is None:
            try:
                clusters = self.clusters()
            except InvalidRequest as error:
                raise PreconditionFailed(f"the zone of this node is unknown: {error}") from error
            zone = self.given or zone_of(self.node_name, self.client_servers(), clusters)
            self._found = {self.topology_key or clusters.topology_key or DEFAULT_TOPOLOGY_KEY: zone}
            logger.info("this node belongs to the zone %s", zone)
        return self._found


def zone_of(node_name: str, client_servers: Sequence[str], clusters: ClusterNames) -> str:
    """Return the zone of a node. Raises `PreconditionFailed` when no zone or several match."""
    by_servers = _zones_with(clusters.servers, client_servers)
    by_name = _zones_with(clusters.nodes, [node_name])
    for found, why in ((by_servers, "the storage client's management servers"), (by_name, "the name of this node")):
        if len(found) > 1:
            raise PreconditionFailed(f"zone of this node: expected one, got {', '.join(found)} by {why}; set --zone")
        if found:
            return found[0]
    known = sorted({*clusters.servers, *clusters.nodes})
    if len(known) < 2:
        return known[0] if known else DEFAULT_ZONE
    servers = ", ".join(shown(server) for server in client_servers) or "none"
    raise PreconditionFailed(
        f"zone of node {node_name}: expected one of {', '.join(known)}, got no match: its storage client's management"
        f" servers are {servers}; match the names in --clusters-file, or set --zone"
    )


def _zones_with(zones: Mapping[str, Iterable[str]], hosts: Sequence[str]) -> list[str]:
    return sorted(
        zone for zone, theirs in zones.items() if any(same_host(one, other) for one in theirs for other in hosts)
    )


def same_host(one: str, other: str) -> bool:
    """Return whether two texts mean one host; names are not resolved."""
    addresses = _address(one), _address(other)
    if any(addresses):
        return addresses[0] == addresses[1]
    names = [text.strip().rstrip(".").lower() for text in (one, other)]
    if names[0] == names[1]:
        return names[0] != ""
    shorter, longer = sorted(names, key=len)
    return "." not in shorter and longer.partition(".")[0] == shorter != ""


def _address(text: str) -> ipaddress.IPv4Address | ipaddress.IPv6Address | None:
    try:
        address = ipaddress.ip_address(text.strip().strip("[]"))
    except ValueError:
        return None
    mapped = address.ipv4_mapped if isinstance(address, ipaddress.IPv6Address) else None
    return mapped or address
