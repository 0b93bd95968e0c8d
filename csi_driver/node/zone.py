"""Which storage cluster ("zone") this node belongs to, worked out without any credentials."""

from __future__ import annotations

import ipaddress
import logging
from collections.abc import Callable, Iterable, Mapping, Sequence

from csi_driver.errors import InvalidRequest, PreconditionFailed, shown
from csi_driver.model import DEFAULT_TOPOLOGY_KEY, DEFAULT_ZONE, ClusterNames, Segments

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
