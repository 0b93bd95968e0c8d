# SPDX-License-Identifier: Apache-2.0
"""Translate the cluster configuration of the drivers 1.4 and 1.9 into the form of the clusters file.

Three forms: the `topology` JSON of 1.4; the ConfigMap of 1.4 and 1.9, as a directory or in one file; and `apiParams` of
1.9. The older drivers verified no certificate and had an account built in; the configuration must state both now.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from csi_driver.flags import read_boolean
from csi_driver.model import DEFAULT_ZONE
from csi_driver.yaml_document import Entry, Findings, InvalidDocument, MappingReader, Source, decode_mapping

Flags = dict[str, tuple[str, str]]
"""Key and text in the configuration that set a flag, by the name of the flag."""

_WITHOUT_EFFECT: Mapping[str, str] = {
    "grpcMaxWorkers": "threads are started as needed",
    "zoneMaxDisabledTimeInSeconds": "failed servers are probed, and the next request tries a failed zone again",
    "printStackTraces": "bugs are logged with their traceback, expected failures without",
    "sdkLogLevel": "there is one log level",
    "kubeClientLogLevel": "there is one log level",
    "topologyConfigMapName": "nodes detect their zone",
    "csiConfigMapName": "the file is watched where it is mounted",
    "ws_port": "no websocket is used",
    "nodes": "nodes detect their zone",
}
_RENAMED = {
    "managementServers": "servers",
    "managementProtocol": "protocol",
    "username": "user",
    "management.servers": "servers",
    "management.protocol": "protocol",
    "sdkHttpRequestTimeout": "requestTimeout",
}
_SAME_KEYS = (
    "servers", "protocol", "user", "userFile", "password", "passwordFile", "caFile", "tlsVerify",
    "clientCertificateFile", "clientKeyFile", "requestTimeout", "maxRequestsInFlight", "allowIncompatibleVersions",
)  # fmt: skip
"""Keys of a zone of the clusters file (and `password`), which the older forms accept as well."""
_MANAGEMENT_KEYS = ("username", "ws_port", *_SAME_KEYS)
_TOPOLOGY_KEYS = ("type", "topologyKey", "zoneSelectionPolicy", "zones")
_CONTROLLER_FLAGS = {
    "attachIOEnabledTimeout": "--attach-io-enabled-timeout", "detachTimeout": "--detach-timeout",
    "forceDetach": "--force-detach", "logLevel": "--log-level", "usePreempt": "--fencing",
}  # fmt: skip
API_PARAMS_KEYS = ("managementServers", "managementProtocol", "username", *_SAME_KEYS)
CONFIG_MAP_KEYS = (
    "management.servers", "management.protocol", "topology", "sdkHttpRequestTimeout", "tlsVerify",
    "allowIncompatibleVersions", "apiParams", *_CONTROLLER_FLAGS, *_WITHOUT_EFFECT,
    *(key for key in _SAME_KEYS if key not in ("servers", "protocol")), "username",
)  # fmt: skip
_LOG_LEVELS = {
    "DEBUG": "debug", "INFO": "info", "WARN": "warning", "WARNING": "warning", "ERROR": "error", "CRITICAL": "error",
    "FATAL": "error",
}  # fmt: skip


def is_old(document: Entry) -> bool:
    zones = document.get("zones")
    entries = zones.values() if isinstance(zones, dict) else ()
    return (
        document.get("type") is not None
        or any(key in document for key in ("apiParams", "topology", "management.servers"))
        or any(isinstance(entry, dict) and "management" in entry for entry in entries)
    )


def translate(
    source: Source, document: Entry, zone: str, given: frozenset[str], findings: Findings
) -> tuple[Entry, Flags]:
    """Translate `document`, decoded from `source`, into the form of the clusters file and the flags that it sets.

    `zone`: name of the only cluster where none is named. `given`: keys of a zone that the command line sets.
    """
    if isinstance(source, str) and "zones" in document:
        return _topology(document, {}, given, findings), {}
    return _config_map(document, zone, given, findings)


def _config_map(files: Entry, zone: str, given: frozenset[str], findings: Findings) -> tuple[Entry, Flags]:
    what = "the ConfigMap"
    values = {
        key: value.strip() if isinstance(value, str) else value
        for key, value in files.items()
        if value not in ("", None)
    }
    findings.unknown_keys(what, values, CONFIG_MAP_KEYS)
    _warn_without_effect(what, values, findings)
    flags = dict(_controller_flags(MappingReader(what, values, findings)))
    shared = {key: value for key, value in values.items() if key in _SAME_KEYS or key in _RENAMED}
    if (topology := _mapping(values, "topology", findings)) is not None:
        shared = {key: value for key, value in shared.items() if not key.startswith("management.")}
        return _topology(topology, shared, given, findings), flags
    if (params := _mapping(values, "apiParams", findings)) is not None:
        findings.unknown_keys("apiParams", params, API_PARAMS_KEYS)
        shared |= params
    elif "management.servers" not in values:
        findings.problems.append("management.servers: expected HOST:PORT of each management server, got none")
    return {"zones": {zone: _zone(zone, shared, given, findings)}}, flags


def _topology(document: Entry, shared: Entry, given: frozenset[str], findings: Findings) -> Entry:
    """Translate the topology; `shared`: keys of the ConfigMap that hold for every zone."""
    findings.unknown_keys("topology", document, _TOPOLOGY_KEYS)
    zones = document.get("zones")
    translated: dict[object, object] = {}
    for zone, entry in zones.items() if isinstance(zones, dict) else ():
        if not isinstance(entry, dict):
            translated[zone] = entry  # reported with the other forms' problems
            continue
        what = f"zone {zone}"
        findings.unknown_keys(what, entry, ("management", "nodes"))
        _warn_without_effect(what, entry, findings)
        management = _mapping(entry, "management", findings)
        if management is None:
            findings.problems.append(f"{what}: management: expected the servers of the zone, got none")
            continue
        findings.unknown_keys(f"{what}: management", management, _MANAGEMENT_KEYS)
        _warn_without_effect(f"{what}: management", management, findings)
        translated[zone] = _zone(str(zone), {**shared, **management}, given, findings)
    return {**document, "zones": translated}


def _zone(zone: str, entry: Entry, given: frozenset[str], findings: Findings) -> Entry:
    named = {_RENAMED.get(key, key): value for key, value in entry.items()}
    renamed = {key: value for key, value in named.items() if key in _SAME_KEYS}
    if not renamed.get("clientCertificateFile") and "clientCertificateFile" not in given:
        absent = [
            key for key in ("user", "password") if not (renamed.get(key) or renamed.get(f"{key}File") or key in given)
        ]
        if absent:
            findings.problems.append(
                f"zone {zone}: {' and '.join(absent)}: expected a value, got none; the account built into the older"
                " driver is no longer used: set it here, or with --management-user and --management-password-file"
            )
            renamed |= dict.fromkeys(absent, "?")  # reported; other problems of the zone are found as well
    if "tlsVerify" not in renamed and "tlsVerify" not in given and _has_https(renamed):
        findings.problems.append(
            f"zone {zone}: tlsVerify: expected true or false, got none; the older driver never verified a certificate:"
            " set it (or --management-tls-verify) to true, with the CA certificate as caFile (or --management-ca-file)"
            " if the CA is private, or to false to connect without verification"
        )
    return renamed


def _has_https(zone: Entry) -> bool:
    servers = zone.get("servers")
    words = servers.split(",") if isinstance(servers, str) else servers if isinstance(servers, list) else []
    is_plain = str(zone.get("protocol", "")).strip().lower() == "http"
    return any(word.startswith("https:") if "://" in word else not is_plain for word in map(str, words))


def _controller_flags(reader: MappingReader) -> Iterator[tuple[str, tuple[str, str]]]:
    """Yield each flag that the configuration sets, with its key and its text there."""
    for key, flag in _CONTROLLER_FLAGS.items():
        value = reader.entry.get(key)
        if key == "logLevel" and isinstance(value, str):
            value = _LOG_LEVELS.get(value.upper(), value)
        if key == "usePreempt":
            if not reader.value(key, read_boolean, False):
                continue
            value = "always"
            reader.findings.warnings.append(
                f"{reader.what}: usePreempt takes volumes from nodes that use them (--fencing always); the older driver"
                " ignored it: remove it if this is not intended"
            )
        if value is not None:
            yield flag, (key, str(value))


def _warn_without_effect(what: str, entry: Entry, findings: Findings) -> None:
    findings.warnings.extend(
        f"{what}: {key} has no effect: {reason}; remove it" for key, reason in _WITHOUT_EFFECT.items() if key in entry
    )


def _mapping(values: Entry, key: str, findings: Findings) -> Entry | None:
    """Return the mapping under a key, given as such or as JSON text; None where there is none."""
    value = values.get(key)
    if isinstance(value, str) and value.strip():
        try:
            return decode_mapping(value, key)
        except InvalidDocument as invalid:
            findings.problems += invalid.problems
            return None
    if value not in (None, "") and not isinstance(value, dict):
        findings.problems.append(f"{key}: expected a mapping of keys to values")
    return value if isinstance(value, dict) else None


def names_document(document: Entry) -> Entry:
    """Return `zones` (with `servers`, `nodes`) and `topologyKey` of any form. Raises `InvalidDocument`.

    One more form: the ConfigMap in which 1.4 lists the nodes of each zone, also as text under the key `zones`.
    """
    findings = Findings()
    document = _mapping(document, "topology", findings) or document
    zones: object = document
    if "zones" in document:
        zones = document["zones"]
        zones = decode_mapping(zones, "zones") if isinstance(zones, str) else zones
    else:
        params = _mapping(document, "apiParams", findings) or {}
        servers = document.get("management.servers") or params.get("managementServers")
        if servers is not None:
            zones = {DEFAULT_ZONE: {"servers": servers}}
    if findings.problems:
        raise InvalidDocument(findings.problems)
    if isinstance(zones, Mapping):
        zones = {zone: _flat(entry) for zone, entry in zones.items()}
    return {"zones": zones, "topologyKey": document.get("topologyKey")}


def _flat(entry: object) -> object:
    management = entry.get("management") if isinstance(entry, Mapping) else None
    return {**management, **entry} if isinstance(entry, Mapping) and isinstance(management, Mapping) else entry
