"""Who this node is, and whether it can do its work."""

from __future__ import annotations

import ipaddress
import logging
from collections.abc import Callable, Iterable, Mapping, Sequence

from csi_driver.errors import DriverError, HostFailure, InvalidRequest, PreconditionFailed, StorageUnavailable, shown
from csi_driver.model import DEFAULT_TOPOLOGY_KEY, DEFAULT_ZONE, ClusterNames, Segments
from csi_driver.node import NodeInfo
from csi_driver.node.ports import Devices, Tools
from csi_driver.node.usage_records import UsageRecords
from csi_driver.settings import NodeSettings


class NodeIdentity:
    """NodeGetInfo, and the node's part of Probe."""

    def __init__(
        self, *, devices: Devices, tools: Tools, zone: NodeZone, records: UsageRecords, settings: NodeSettings
    ) -> None:
        self._devices = devices
        self._records = records
        self._zone = zone
        self._tools = tools
        self._settings = settings
        self._client_uuid: str | None = None
        self._client_limit = 0

    def info(self) -> NodeInfo:
        """Tell the node's id (its storage client's uuid, else its name), volume limit and topology.

        Raises `StorageUnavailable` while the id cannot be told: where a client belongs and has not shown itself since
        this process began; `PreconditionFailed` where it is not clear to which zone the node belongs.
        """
        settings = self._settings
        return NodeInfo(
            node_id=self._client_id() or settings.node_name,
            max_volumes=self._limit(),
            topology=self._zone.segments(),
        )

    def _client_id(self) -> str | None:
        """Return the client's uuid as it is or, during an upgrade, was; None where no client belongs.

        A node that changed its id for a moment would be another node for the CO: its volumes could not be detached.
        """
        client = self._devices.client()
        if client.uuid is not None:
            self._client_uuid, self._client_limit = client.uuid, client.volume_limit
        if self._client_uuid is None and client.is_expected:
            state = "is being upgraded, or starts" if client.is_upgrading else "is not running yet (no status files)"
            raise StorageUnavailable(f"the storage client of this node {state}: its uuid, the node's id, is not known")
        return self._client_uuid

    def _limit(self) -> int:
        """Return how many volumes of CSI this node takes: what was configured, at most what its client can; 0 = any.

        The orchestrator counts its own volumes alone against it, so what others attached is taken off. Full of those
        it says 1, as 0 means no limit; the controller then refuses.
        """
        limits = (self._settings.max_volumes_per_node, self._client_limit)
        limit = min((limit for limit in limits if limit), default=0)
        return max(1, limit - foreign_attachments(self._devices, self._records)) if limit else 0

    def why_not_ready(self) -> str:
        """Tell why this node could not be registered, or serve, now; empty = it could."""
        try:
            self.info()
        except DriverError as problem:
            return str(problem)
        return "; ".join(self.problems())

    def problems(self) -> Sequence[str]:
        """Tell what keeps this machine from serving volumes, a sentence each; empty = all well."""
        found = list(self._tools.problems())
        try:
            self._zone.segments()
        except DriverError as problem:
            found.append(str(problem))
        return found


def foreign_attachments(devices: Devices, records: UsageRecords) -> int:
    """Return how many volumes somebody else than CSI attached to this node.

    A static handle leaves nothing in the storage that tells it from a hand, but its use on this node is on record here.
    One whose record outlived its use counts as CSI's: a limit too high is refused by the controller, one too low keeps
    pods away for nothing.
    """
    return sum(not _was_used(records, uuid) for uuid in devices.unnamed())


def _was_used(records: UsageRecords, uuid: str) -> bool:
    try:
        return records.read(uuid) is not None
    except HostFailure:
        return True  # there is one, though it cannot be read, and nobody but this driver makes any


_log = logging.getLogger(__name__)


class NodeZone:
    """The topology of this node, found out when it is first asked for, and the same from then on.

    What is said outright counts; then the management servers that the storage client of this node uses, looked up in
    the description of the clusters; then what an older driver wrote down of the nodes; then the only zone there is.
    """

    def __init__(
        self,
        *,
        given: str | None,
        topology_key: str | None,
        node_name: str,
        client_servers: Callable[[], Sequence[str]],
        clusters: Callable[[], ClusterNames],
    ) -> None:
        self._given = given
        self._topology_key = topology_key
        self._node_name = node_name
        self._client_servers = client_servers
        self._clusters = clusters
        self._found: Segments | None = None

    def segments(self) -> Segments:
        """Return the topology segments. Raises `PreconditionFailed` where several zones may be meant, or none."""
        if self._found is None:
            try:
                clusters = self._clusters()
            except InvalidRequest as unusable:
                raise PreconditionFailed(f"the zone of this node is unknown: {unusable}") from unusable
            zone = self._given or zone_of(self._node_name, self._client_servers(), clusters)
            self._found = {self._topology_key or clusters.topology_key or DEFAULT_TOPOLOGY_KEY: zone}
            _log.info("this node belongs to the zone %s", zone)
        return self._found


def zone_of(node_name: str, client_servers: Sequence[str], clusters: ClusterNames) -> str:
    """Return the zone that the evidence names. Raises `PreconditionFailed` where it names several, or none."""
    by_servers = _zones_with(clusters.servers, client_servers)
    by_name = _zones_with(clusters.nodes, [node_name])
    for found, why in ((by_servers, "the storage client's management servers"), (by_name, "the name of this node")):
        if len(found) > 1:
            raise PreconditionFailed(
                f"zone of this node: expected one, got {', '.join(found)}: each matches {why}; set --zone"
            )
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
    """Tell whether two spellings mean one host: an address in another notation, a name with or without its domain.

    Names are not resolved: an answer that depends on a name server's health is none to place volumes by.
    """
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
