"""The configuration of older drivers of this name, taken as it is.

Three forms: the `topology` JSON of 1.4, with several clusters; the ConfigMap of 1.4 and 1.9, mounted as a directory
with a file per key, or the same keys in one file; and 1.9's `apiParams`. Those drivers never verified a certificate,
and logged in with an account of their own whatever the configuration said: what that left to chance is demanded here,
by the name of its key.
"""

from __future__ import annotations

from collections.abc import Mapping

from csi_driver.errors import shown
from csi_driver.management.clusters_file import (
    ZONE_KEYS,
    ClustersFile,
    ClustersFileUnusable,
    Defaults,
    Entry,
    Findings,
    OldSettings,
    Reader,
    document_in,
    finished,
    unknown_keys,
    zone_entries,
    zone_settings,
)
from csi_driver.management.settings import ManagementSettings

_MEANINGLESS: Mapping[str, str] = {
    "grpcMaxWorkers": "threads are started as needed",
    "zoneMaxDisabledTimeInSeconds": "the next request tries a failed zone again, and failed servers are probed",
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
_OWN_KEYS = (*ZONE_KEYS, "password")
_API_PARAMS = ("managementServers", "managementProtocol", "username", *_OWN_KEYS)
_MANAGEMENT = ("username", "ws_port", *_OWN_KEYS)
_ZONE = ("management", "nodes")
_TOPOLOGY = ("type", "topologyKey", "zoneSelectionPolicy", "zones")
_WHOLE_DRIVER = ("attachIOEnabledTimeout", "detachTimeout", "forceDetach", "usePreempt", "logLevel")
_CONFIG_MAP = (
    "management.servers", "management.protocol", "topology", "sdkHttpRequestTimeout", "tlsVerify",
    "allowIncompatibleVersions", "apiParams", *_WHOLE_DRIVER, *_MEANINGLESS,
    *(key for key in _OWN_KEYS if key not in ("servers", "protocol")), "username",
)  # fmt: skip
_LOG_LEVELS = {"DEBUG": "debug", "INFO": "info", "WARN": "warning", "WARNING": "warning", "ERROR": "error"}
_LOG_LEVELS |= {"CRITICAL": "error", "FATAL": "error"}


def is_old(document: Entry) -> bool:
    """Tell whether a file has one of the older forms."""
    zones = document.get("zones")
    entries = zones.values() if isinstance(zones, dict) else ()
    return (
        document.get("type") is not None
        or any(key in document for key in ("apiParams", "topology", "management.servers"))
        or any(isinstance(entry, dict) and "management" in entry for entry in entries)
    )


def understand_document(document: Entry, defaults: Defaults) -> ClustersFile:
    """Work out one file of an older form. Raises `ClustersFileUnusable` with every problem."""
    if "zones" not in document:
        return understand_config_map(document, defaults)
    findings = Findings()
    zones = _topology(document, {}, defaults, findings)
    return finished(zones, document, findings)


def understand_config_map(files: Mapping[str, object], defaults: Defaults) -> ClustersFile:
    """Work out the ConfigMap, whose values are texts. Raises `ClustersFileUnusable` with every problem."""
    findings = Findings()
    values = {
        key: value.strip() if isinstance(value, str) else value
        for key, value in files.items()
        if value not in ("", None)
    }
    findings.problems += unknown_keys("the ConfigMap", values, _CONFIG_MAP)
    _tell_meaningless("the ConfigMap", values, findings)
    old = _old_settings(values, findings)
    shared = {key: value for key, value in values.items() if key in _OWN_KEYS or key in ("username", *_RENAMED)}
    topology = _inner(values, "topology", findings)
    if topology is not None:
        cluster = {key: value for key, value in shared.items() if not key.startswith("management.")}
        return finished(_topology(topology, cluster, defaults, findings), topology, findings, old)
    params = _inner(values, "apiParams", findings)
    if params is not None:
        findings.problems += unknown_keys("apiParams", params, _API_PARAMS)
        shared |= params
    elif "management.servers" not in values:
        findings.problems.append("management.servers: expected HOST:PORT of each management server, got none")
    zones = {defaults.zone: _one(defaults.zone, shared, defaults, findings)}
    return finished(zones, {}, findings, old)


def _inner(values: Entry, key: str, findings: Findings) -> Entry | None:
    """Return the mapping that a key holds, as JSON or as it is; None where it holds none."""
    value = values.get(key)
    if isinstance(value, str):
        try:
            return document_in(value, key)
        except ClustersFileUnusable as unusable:
            findings.problems += unusable.problems
            return None
    if value is not None and not isinstance(value, dict):
        findings.problems.append(f"{key}: expected a mapping of keys to values")
    return value if isinstance(value, dict) else None


def _topology(
    document: Entry, shared: Entry, defaults: Defaults, findings: Findings
) -> Mapping[str, ManagementSettings]:
    findings.problems += unknown_keys("topology", document, _TOPOLOGY)
    zones = {}
    for zone, entry in zone_entries(document, findings):
        findings.problems += unknown_keys(f"zone {zone}", entry, _ZONE)
        _tell_meaningless(f"zone {zone}", entry, findings)
        management = _inner(entry, "management", findings)
        if management is None:
            findings.problems.append(f"zone {zone}: management: expected the servers of the zone, got none")
            continue
        findings.problems += unknown_keys(f"zone {zone}: management", management, _MANAGEMENT)
        _tell_meaningless(f"zone {zone}: management", management, findings)
        zones[zone] = _one(zone, {**shared, **management}, defaults, findings)
    return zones


def _one(zone: str, entry: Entry, defaults: Defaults, findings: Findings) -> ManagementSettings:
    """Read one zone, and demand what the older drivers left to chance."""
    renamed = {_RENAMED.get(key, key): value for key, value in entry.items()}
    own = defaults.management
    if not (renamed.get("clientCertificateFile") or own.client_certificate):
        has_user = any(renamed.get(key) for key in ("user", "userFile")) or own.has_user
        has_password = any(renamed.get(key) for key in ("password", "passwordFile")) or own.password_file is not None
        absent = [key for key, is_there in (("user", has_user), ("password", has_password)) if not is_there]
        if absent:
            findings.problems.append(
                f"zone {zone}: {' and '.join(absent)}: expected a value, got none; the account built into the older"
                " driver is no longer used: set it here, or with --management-user and --management-password-file"
            )
            renamed |= dict.fromkeys(absent, "?")  # said already, what else is wrong is to be found too
    settings = zone_settings(zone, renamed, defaults, findings)
    is_https = any(server.startswith("https:") for server in settings.servers)
    if is_https and "tlsVerify" not in renamed and not defaults.tls_is_decided:
        findings.problems.append(
            f"zone {zone}: tlsVerify: expected true or false, got none; the older driver never verified a certificate:"
            " set it (or --management-tls-verify) to true, with the CA certificate as caFile (or --management-ca-file)"
            " if the CA is private, or to false to connect without verification"
        )
    return settings


def _old_settings(values: Entry, findings: Findings) -> OldSettings:
    reader = Reader("the ConfigMap", values, findings)
    level = reader.text("logLevel").upper()
    if level and level not in _LOG_LEVELS:
        findings.problems.append(f"the ConfigMap: logLevel: expected DEBUG, INFO, WARNING or ERROR, got {shown(level)}")
    use_preempt = reader.boolean("usePreempt")
    if use_preempt:
        findings.warnings.append(
            "the ConfigMap: usePreempt takes volumes from nodes that use them (--fencing always); the older driver"
            " ignored it: remove it if this is not intended"
        )
    return OldSettings(
        attach_wait_s=reader.number("attachIOEnabledTimeout"),
        detach_wait_s=reader.number("detachTimeout"),
        force_detach=reader.boolean("forceDetach"),
        use_preempt=use_preempt,
        log_level=_LOG_LEVELS.get(level),
    )


def _tell_meaningless(what: str, entry: Entry, findings: Findings) -> None:
    findings.warnings.extend(
        f"{what}: {key} has no effect: {reason}; remove it" for key, reason in _MEANINGLESS.items() if key in entry
    )
