"""What a node may read of the description of the clusters: hosts and nodes by zone, never a credential.

It takes every form that the controller takes, with or without what only the controller needs, and what the older
driver's controller wrote down of the nodes: `{zone: {"nodes": [name, ...]}}`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from urllib.parse import urlsplit

from csi_driver.management.clusters_file import (
    ClustersFileUnusable,
    Entry,
    Source,
    document_in,
    read_source,
    server_url,
)
from csi_driver.model import DEFAULT_ZONE, ClusterNames


def read_cluster_names(clusters_file: Path | None, nodes_file: Path | None) -> ClusterNames:
    """Read both descriptions; `nodes_file` may be absent. Raises `ClustersFileUnusable`."""
    described = names_in(read_source(clusters_file)) if clusters_file is not None else ClusterNames()
    if nodes_file is None or not nodes_file.exists():
        return described
    noted = names_in(read_source(nodes_file))
    return ClusterNames(
        {**noted.servers, **described.servers}, {**noted.nodes, **described.nodes}, described.topology_key
    )


def names_in(source: Source) -> ClusterNames:
    """Return what a description says of hosts and nodes. Raises `ClustersFileUnusable`."""
    document: Entry = source if not isinstance(source, str) else document_in(source, "the clusters file")
    inner = _inner(document.get("topology"), "topology")
    if inner:
        return _of_zones(inner.get("zones"), inner.get("topologyKey"))
    if "zones" in document:
        zones = document["zones"]
        inside = document_in(zones, "zones") if isinstance(zones, str) else zones
        return _of_zones(inside, document.get("topologyKey"))
    servers = document.get("management.servers") or _inner(document.get("apiParams"), "apiParams").get(
        "managementServers"
    )
    if servers is not None:
        return ClusterNames({DEFAULT_ZONE: _hosts(servers)})
    return _of_zones(document, None)


def _inner(value: object, what: str) -> Entry:
    if isinstance(value, str) and value.strip():
        return document_in(value, what)
    return value if isinstance(value, dict) else {}


def _of_zones(zones: object, key: object) -> ClusterNames:
    if not isinstance(zones, Mapping):
        raise ClustersFileUnusable(["clusters file: expected at least one zone under `zones`, got none"])
    servers: dict[str, Sequence[str]] = {}
    nodes: dict[str, Sequence[str]] = {}
    for zone, entry in zones.items():
        if not isinstance(entry, Mapping):
            raise ClustersFileUnusable([f"zone {zone}: expected a mapping of keys to values"])
        management = entry.get("management")
        own = entry.get("servers") or (management.get("servers") if isinstance(management, Mapping) else None)
        if own is not None:
            servers[str(zone)] = _hosts(own)
        listed = entry.get("nodes")
        if isinstance(listed, list):
            nodes[str(zone)] = tuple(str(node) for node in listed)
    return ClusterNames(servers, nodes, key if isinstance(key, str) else None)


def _hosts(servers: object) -> tuple[str, ...]:
    words = servers.split(",") if isinstance(servers, str) else servers if isinstance(servers, list) else []
    hosts = []
    for word in words:
        try:
            hosts.append(urlsplit(server_url(str(word).strip(), "https")).hostname or "")
        except ValueError:
            continue
    return tuple(host for host in hosts if host)
