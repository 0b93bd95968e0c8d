# SPDX-License-Identifier: Apache-2.0
"""The storage clusters ("zones") that the driver serves: one from the command line, or several from a file.

`--clusters-file` is YAML, JSON, or a form of an older driver; the command line gives the defaults. All problems are
reported together, by key and line; a value that may be a password is never quoted.
"""

from __future__ import annotations

import logging
import re
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import urlsplit

from csi_driver.compat import clusters as compat
from csi_driver.deadline import SYSTEM_CLOCK, Clock
from csi_driver.errors import InvalidRequest, shown
from csi_driver.flags import read_boolean, read_positive_count, read_positive_duration
from csi_driver.management.settings import ClusterDefaults, ManagementSettings
from csi_driver.model import ClusterNames, is_zone_name
from csi_driver.yaml_document import (
    Entry,
    Findings,
    InvalidDocument,
    MappingReader,
    Source,
    decode_mapping,
    read_source,
)

if TYPE_CHECKING:  # a node reads names from this file and never loads the client
    from csi_driver.management.client import ManagementClient

_LOG = logging.getLogger(__name__)

_CHECK_INTERVAL_S = 1.0
_DEFAULT_PORT = 4000
_FLAGS = {"topologyKey": "--topology-key", "zoneSelectionPolicy": "--zone-selection-policy"}
_FILE_KEYS = ("zones", *_FLAGS)
ZONE_KEYS = (
    "servers", "protocol", "user", "userFile", "passwordFile", "caFile", "tlsVerify", "clientCertificateFile",
    "clientKeyFile", "requestTimeout", "maxRequestsInFlight", "allowIncompatibleVersions",
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class ClustersFile:
    """Zones in the order of the file, and the key and text that set a flag, by flag; the command line wins."""

    zones: Mapping[str, ManagementSettings]
    flags: Mapping[str, tuple[str, str]] = field(default_factory=dict)
    warnings: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class OneCluster:
    """A single storage cluster under the name of its zone."""

    zone: str
    client: ManagementClient

    def zones(self) -> Sequence[str]:
        return (self.zone,)

    def management(self, zone: str) -> ManagementClient | None:
        return self.client if zone == self.zone else None

    def close(self) -> None:
        self.client.close()


@dataclass(frozen=True, slots=True)
class _Cluster:
    settings: ManagementSettings
    client: ManagementClient


class FileClusters:
    """The clusters of a file, which is read again when it changes, at most once a second. Thread-safe.

    The last valid version stays in use. A zone with unchanged settings keeps its sessions.
    """

    def __init__(
        self,
        path: Path,
        defaults: ClusterDefaults,
        connect: Callable[[ManagementSettings], ManagementClient],
        *,
        clock: Clock = SYSTEM_CLOCK,
    ) -> None:
        self._path = path
        self._defaults = defaults
        self._clock = clock
        self._connect = connect
        self._checking = threading.Lock()
        self._seen: Source = read_source(path)
        self._file = parse_clusters(self._seen, defaults)
        self._clusters = self._connected(self._file, {})
        self._next_check_s = clock.monotonic() + _CHECK_INTERVAL_S
        self._log(self._file)

    def zones(self) -> Sequence[str]:
        self._check()
        return tuple(self._clusters)

    def management(self, zone: str) -> ManagementClient | None:
        """Return the client of a zone, None where the file does not name it (any more)."""
        self._check()
        cluster = self._clusters.get(zone)
        return cluster.client if cluster is not None else None

    def close(self) -> None:
        for cluster in self._clusters.values():
            cluster.client.close()

    def _check(self) -> None:
        # While one thread reads the file, others use the present clusters.
        if self._clock.monotonic() < self._next_check_s or not self._checking.acquire(blocking=False):
            return
        try:
            self._take_changes()
        finally:
            self._next_check_s = self._clock.monotonic() + _CHECK_INTERVAL_S
            self._checking.release()

    def _take_changes(self) -> None:
        source: Source = ""
        try:
            source = read_source(self._path)
            if source == self._seen:
                return
            changed = parse_clusters(source, self._defaults)
            clusters = self._connected(changed, self._clusters)
        except InvalidRequest as invalid:
            # An unreadable file is remembered by its message, an invalid one by its content.
            seen = source or str(invalid)
            if seen != self._seen:
                self._seen = seen
                _LOG.warning("%s is invalid, the last valid version remains in use: %s", self._path, invalid)
            return
        before, self._seen, self._clusters = self._clusters, source, clusters
        self._log(changed)
        keys = {key for key, _ in set(changed.flags.values()) ^ set(self._file.flags.values())}
        if keys:
            _LOG.warning("%s: %s changed; restart the driver to apply it", self._path, ", ".join(sorted(keys)))
        self._file = changed
        for zone, cluster in before.items():
            if clusters.get(zone) is not cluster:
                cluster.client.close()

    def _connected(self, file: ClustersFile, known: Mapping[str, _Cluster]) -> dict[str, _Cluster]:
        clusters = {}
        for zone, settings in file.zones.items():
            cluster = known.get(zone)
            if cluster is None or cluster.settings != settings:
                cluster = _Cluster(settings, self._connect(settings))
            clusters[zone] = cluster
        return clusters

    def _log(self, file: ClustersFile) -> None:
        for warning in file.warnings:
            _LOG.warning("%s: %s", self._path, warning)
        _LOG.info("%s describes the zones %s", self._path, ", ".join(file.zones))


def open_clusters(
    file: Path | None, defaults: ClusterDefaults, connect: Callable[[ManagementSettings], ManagementClient]
) -> OneCluster | FileClusters:
    if file is None:
        return OneCluster(defaults.zone, connect(replace(defaults.management, zone=defaults.zone)))
    return FileClusters(file, defaults, connect)


def parse_clusters(source: Source, defaults: ClusterDefaults) -> ClustersFile:
    """Parse a clusters file of any form. Raises `InvalidDocument` with every problem."""
    document = decode_mapping(source, "the clusters file") if isinstance(source, str) else source
    findings = Findings()
    flags: dict[str, tuple[str, str]] = {}
    is_old = not isinstance(source, str) or compat.is_old(document)
    if is_old:
        document, flags = compat.translate(source, document, defaults.zone, _given(defaults), findings)
    else:
        findings.unknown_keys("the clusters file", document, _FILE_KEYS)
    zones = {}
    for zone, entry in _zone_entries(document, findings):
        if not is_old:
            findings.unknown_keys(f"zone {zone}", entry, ZONE_KEYS)
            if "password" in entry:
                findings.problems.append(
                    f"zone {zone}: password: not accepted in this file; write it to a file of its own and set"
                    " passwordFile"
                )
        own = replace(defaults.management, zone=zone)
        zones[zone] = _zone_settings(MappingReader(f"zone {zone}", entry, findings), own)
    findings.problems += _shared_servers(zones)
    reader = MappingReader("the clusters file", document, findings)
    for key, flag in _FLAGS.items():
        if text := reader.text(key):
            flags[flag] = (key, text)
    if findings.problems:
        raise InvalidDocument(findings.problems)
    return ClustersFile(zones, flags, tuple(dict.fromkeys(findings.warnings)))


def _given(defaults: ClusterDefaults) -> frozenset[str]:
    own = defaults.management
    is_given = {
        "user": own.has_user,
        "password": own.password_file is not None,
        "clientCertificateFile": own.client_certificate is not None,
        "tlsVerify": defaults.tls_is_decided,
    }
    return frozenset(key for key, given in is_given.items() if given)


def _zone_entries(document: Entry, findings: Findings) -> Iterator[tuple[str, Entry]]:
    zones = document.get("zones")
    if not isinstance(zones, dict) or not zones:
        findings.problems.append("zones: expected at least one zone, got none")
        return
    for zone, entry in zones.items():
        if not isinstance(zone, str) or not is_zone_name(zone):
            findings.problems.append(
                f"zone name: expected at most 63 letters, digits, '-', '_' and '.', got {shown(zone)}"
            )
        elif not isinstance(entry, dict) or not all(isinstance(key, str) for key in entry):
            findings.problems.append(f"zone {zone}: expected a mapping of keys to values")
        else:
            yield zone, entry


def _shared_servers(zones: Mapping[str, ManagementSettings]) -> Iterator[str]:
    owners: dict[str, str] = {}
    for zone, settings in zones.items():
        for server in settings.servers:
            owner = owners.setdefault(server.rstrip("/").lower(), zone)
            if owner != zone:
                yield f"zone {zone}: server {server} is in zone {owner} too; describe each cluster as one zone"


def _zone_settings(reader: MappingReader, own: ManagementSettings) -> ManagementSettings:
    settings = replace(
        _with_login(reader, own),
        servers=_servers(reader),
        ca_file=reader.path("caFile") or own.ca_file,
        tls_verify=reader.value("tlsVerify", read_boolean, own.tls_verify),
        request_timeout_s=reader.value("requestTimeout", read_positive_duration, own.request_timeout_s),
        max_requests_in_flight=reader.value("maxRequestsInFlight", read_positive_count, own.max_requests_in_flight),
        allow_incompatible_versions=reader.value(
            "allowIncompatibleVersions", read_boolean, own.allow_incompatible_versions
        ),
    )
    reader.findings.problems += [f"{reader.what}: {problem}" for problem in settings.problems()]
    return settings


def _with_login(reader: MappingReader, own: ManagementSettings) -> ManagementSettings:
    """Return settings with the zone's user or certificate; with the command line's where the zone has neither."""
    user, user_file = reader.text("user"), reader.path("userFile")
    password, password_file = reader.text("password"), reader.path("passwordFile")
    certificate, key = reader.path("clientCertificateFile"), reader.path("clientKeyFile")
    if user or user_file or password or password_file:
        own = replace(
            own,
            username="" if user_file else user or own.username,
            username_file=user_file if user_file or user else own.username_file,
            password="" if password_file else password,
            password_file=password_file if password_file or password else own.password_file,
        )
    elif certificate:
        own = replace(own, username="", username_file=None, password="", password_file=None)
    if certificate or key:
        own = replace(own, client_certificate=certificate, client_key=key)
    return own


def _servers(reader: MappingReader) -> tuple[str, ...]:
    value = reader.entry.get("servers")
    words = value.split(",") if isinstance(value, str) else value
    if not isinstance(words, list) or not all(isinstance(word, str) for word in words):
        if value is not None:
            reader.findings.problems.append(
                f"{reader.what}: servers: expected a list of addresses, or one text with commas between them"
            )
        return ()
    protocol = reader.text("protocol").strip().lower() or "https"
    if protocol not in ("http", "https"):
        reader.findings.problems.append(f"{reader.what}: protocol: expected https or http, got {shown(protocol)}")
        protocol = "https"
    return tuple(server_url(word.strip(), protocol) for word in words if word.strip())


_HAS_SCHEME = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*://")
_HAS_PORT = re.compile(r"(\[[^\]]*\]|[^\[\]:]*):[0-9]+")


def server_url(address: str, protocol: str) -> str:
    """Return the URL of a server that is written as URL, HOST:PORT or HOST."""
    if _HAS_SCHEME.match(address):
        return address.rstrip("/")
    if address.count(":") > 1 and not address.startswith("["):
        address = f"[{address}]"
    return f"{protocol}://{address}" if _HAS_PORT.fullmatch(address) else f"{protocol}://{address}:{_DEFAULT_PORT}"


def read_cluster_names(clusters_file: Path | None, nodes_file: Path | None) -> ClusterNames:
    """Read hosts and nodes of each zone, never a credential; `nodes_file` may be absent. Raises `InvalidDocument`."""
    described = names_in(read_source(clusters_file)) if clusters_file is not None else ClusterNames()
    if nodes_file is None or not nodes_file.exists():
        return described
    noted = names_in(read_source(nodes_file))
    return ClusterNames(
        {**noted.servers, **described.servers}, {**noted.nodes, **described.nodes}, described.topology_key
    )


def names_in(source: Source) -> ClusterNames:
    """Return the hosts and nodes in a clusters file of any form, complete or not. Raises `InvalidDocument`."""
    document = compat.names_document(decode_mapping(source, "the clusters file") if isinstance(source, str) else source)
    zones, key = document["zones"], document["topologyKey"]
    if not isinstance(zones, Mapping):
        raise InvalidDocument(["clusters file: expected at least one zone under `zones`, got none"])
    servers: dict[str, Sequence[str]] = {}
    nodes: dict[str, Sequence[str]] = {}
    for zone, entry in zones.items():
        if not isinstance(entry, Mapping):
            raise InvalidDocument([f"zone {zone}: expected a mapping of keys to values"])
        if (addresses := entry.get("servers")) is not None:
            servers[str(zone)] = tuple(_hosts(addresses))
        if isinstance(listed := entry.get("nodes"), list):
            nodes[str(zone)] = tuple(map(str, listed))
    return ClusterNames(servers, nodes, key if isinstance(key, str) else None)


def _hosts(servers: object) -> Iterator[str]:
    words = servers.split(",") if isinstance(servers, str) else servers if isinstance(servers, list) else []
    for word in words:
        try:
            host = urlsplit(server_url(str(word).strip(), "https")).hostname
        except ValueError:
            continue
        if host:
            yield host
