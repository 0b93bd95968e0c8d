"""The file that describes several storage clusters: zone, management servers, how to log in there.

It is YAML or JSON, or one of the forms that older drivers of this name had (see `old_clusters`). What a zone does not
say is taken from the defaults, which are the command line's. Everything wrong with it is found in one go. What is
reported names keys and places; a value that may be a password is never quoted.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from csi_driver.errors import InvalidRequest, shown
from csi_driver.management.settings import ManagementSettings
from csi_driver.model import is_zone_name

_MOST_BYTES = 1 << 20
_DEFAULT_PORT = 4000

Source = str | Mapping[str, str]
"""What was read: the text of a file, or the files of a directory (a mounted ConfigMap) by name."""
Entry = Mapping[str, object]


class ClustersFileUnusable(InvalidRequest):
    """The description of the clusters cannot be used. `problems`: a sentence each."""

    def __init__(self, problems: Sequence[str]) -> None:
        self.problems = tuple(problems)
        super().__init__("; ".join(problems))


@dataclass(frozen=True, slots=True)
class OldSettings:
    """What an older driver's configuration says besides its clusters; None = nothing."""

    attach_wait_s: float | None = None
    detach_wait_s: float | None = None
    force_detach: bool | None = None
    use_preempt: bool | None = None
    log_level: str | None = None


@dataclass(frozen=True, slots=True)
class ClustersFile:
    """The clusters by zone, in the order of the file."""

    zones: Mapping[str, ManagementSettings]
    topology_key: str | None = None
    zone_policy: str | None = None
    old: OldSettings = field(default_factory=OldSettings)
    warnings: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Defaults:
    """What the command line says. `tls_is_decided`: it says whether certificates are verified."""

    management: ManagementSettings
    zone: str
    tls_is_decided: bool = False


@dataclass
class Findings:
    """What is wrong, and what an operator should know."""

    problems: list[str] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)


# --- reading --------------------------------------------------------------------------------------------------


def read_source(path: Path) -> Source:
    """Read a file, or all files of a directory. Raises `ClustersFileUnusable`."""
    try:
        if not path.is_dir():
            return _text(path)
        # A mounted ConfigMap is exchanged as a whole, by the link ..data: through it nothing old and new is mixed.
        version = path / "..data"
        directory = version.resolve() if version.is_dir() else path
        names = sorted(entry for entry in directory.iterdir() if not entry.name.startswith("..") and entry.is_file())
        return {entry.name: _text(entry) for entry in names}
    except OSError as error:
        raise ClustersFileUnusable([f"{path} cannot be read: {error.strerror}"]) from error


def _text(path: Path) -> str:
    content = path.read_bytes()
    if len(content) > _MOST_BYTES:
        raise ClustersFileUnusable([f"{path}: expected at most {_MOST_BYTES} bytes, got {len(content)}"])
    try:
        return content.decode()
    except UnicodeDecodeError:
        raise ClustersFileUnusable([f"{path}: expected UTF-8 text, got other bytes"]) from None


def document_in(text: str, what: str) -> Entry:
    """Decode JSON or YAML that must be a mapping. Raises `ClustersFileUnusable` with a place, never with a value."""
    document = _decoded(text, what)
    if not isinstance(document, dict) or not all(isinstance(key, str) for key in document):
        raise ClustersFileUnusable([f"{what}: expected a mapping of keys to values"])
    return document


def _decoded(text: str, what: str) -> object:
    try:
        return json.loads(text, object_pairs_hook=_once_each)
    except _Twice as twice:
        raise ClustersFileUnusable([f"{what}: key {shown(twice.key)} is given twice; remove one"]) from None
    except ValueError as error:
        try:
            return _decoded_yaml(text, what)
        except ClustersFileUnusable:
            if text.lstrip()[:1] == "{" and isinstance(error, json.JSONDecodeError):
                raise ClustersFileUnusable(
                    [f"{what}: expected JSON, got an error in line {error.lineno}: {error.msg}"]
                ) from None
            raise


def _decoded_yaml(text: str, what: str) -> object:
    import yaml  # only who describes clusters in YAML needs it

    class Loader(yaml.SafeLoader):
        """Refuses a key that comes twice, of which one would be lost silently."""

    def mapping(loader: Loader, node: yaml.MappingNode) -> dict[Any, Any]:
        loader.flatten_mapping(node)
        made = loader.construct_object
        return _once_each([(made(key, deep=True), made(value, deep=True)) for key, value in node.value])

    Loader.add_constructor(yaml.resolver.BaseResolver.DEFAULT_MAPPING_TAG, mapping)
    try:
        return yaml.load(text, Loader)  # noqa: S506 - a SafeLoader
    except _Twice as twice:
        raise ClustersFileUnusable([f"{what}: key {shown(twice.key)} is given twice; remove one"]) from None
    except yaml.MarkedYAMLError as error:
        line = error.problem_mark.line + 1 if error.problem_mark is not None else 0
        raise ClustersFileUnusable([f"{what}: expected JSON or YAML, got a syntax error in line {line}"]) from None
    except (yaml.YAMLError, ValueError, TypeError, RecursionError):
        raise ClustersFileUnusable([f"{what}: expected JSON or YAML, got a syntax error"]) from None


class _Twice(Exception):
    def __init__(self, key: object) -> None:
        self.key = key
        super().__init__()


def _once_each(pairs: Sequence[tuple[Any, Any]]) -> dict[Any, Any]:
    found: dict[Any, Any] = {}
    for key, value in pairs:
        if key in found:
            raise _Twice(key)
        found[key] = value
    return found


# --- understanding ----------------------------------------------------------------------------------------------

_TOP_KEYS = ("zones", "topologyKey", "zoneSelectionPolicy")


def understand(source: Source, defaults: Defaults) -> ClustersFile:
    """Work out the clusters. Raises `ClustersFileUnusable` with every problem."""
    from csi_driver.management import old_clusters

    if not isinstance(source, str):
        return old_clusters.understand_config_map(source, defaults)
    document = document_in(source, "the clusters file")
    if old_clusters.is_old(document):
        return old_clusters.understand_document(document, defaults)
    findings = Findings()
    findings.problems += unknown_keys("the clusters file", document, _TOP_KEYS)
    zones = dict(_zones(document, defaults, findings))
    return finished(zones, document, findings)


def _zones(document: Entry, defaults: Defaults, findings: Findings) -> Iterator[tuple[str, ManagementSettings]]:
    for zone, entry in zone_entries(document, findings):
        findings.problems += unknown_keys(f"zone {zone}", entry, ZONE_KEYS)
        if "password" in entry:
            findings.problems.append(
                f"zone {zone}: password: not accepted in this file; write it to a file of its own and set passwordFile"
            )
        yield zone, zone_settings(zone, entry, defaults, findings)


def zone_entries(document: Entry, findings: Findings) -> Iterator[tuple[str, Entry]]:
    """Yield the entries under `zones` that can be looked into."""
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


def finished(
    zones: Mapping[str, ManagementSettings], document: Entry, findings: Findings, old: OldSettings | None = None
) -> ClustersFile:
    """Return the result, or raise with what was found wrong."""
    findings.problems += _shared_servers(zones)
    words = {}
    for key in ("topologyKey", "zoneSelectionPolicy"):
        value = document.get(key)
        if value is not None and not isinstance(value, str):
            findings.problems.append(f"{key}: expected text, got another value")
        words[key] = value if isinstance(value, str) else None
    if findings.problems:
        raise ClustersFileUnusable(findings.problems)
    found = tuple(dict.fromkeys(findings.warnings))
    return ClustersFile(zones, words["topologyKey"], words["zoneSelectionPolicy"], old or OldSettings(), found)


def _shared_servers(zones: Mapping[str, ManagementSettings]) -> Iterator[str]:
    """Yield a problem for each server that two zones name: one cluster as two zones has every volume twice."""
    owners: dict[str, str] = {}
    for zone, settings in zones.items():
        for server in settings.servers:
            owner = owners.setdefault(server.rstrip("/").lower(), zone)
            if owner != zone:
                yield f"zone {zone}: server {server} is in zone {owner} too; describe each cluster as one zone"


def unknown_keys(what: str, entry: Entry, known: Sequence[str]) -> list[str]:
    """Return a problem for each key that is not known.

    One without a value is not named: a slip of the pen makes such a key of what was meant to be a value.
    """
    expected = f"expected one of {', '.join(known)}"
    return [
        f"{what}: unknown key {'without a value' if value is None else shown(key)}; {expected}"
        for key, value in entry.items()
        if key not in known
    ]


# --- one zone -----------------------------------------------------------------------------------------------------

ZONE_KEYS = (
    "servers", "protocol", "user", "userFile", "passwordFile", "caFile", "tlsVerify", "clientCertificateFile",
    "clientKeyFile", "requestTimeout", "maxRequestsInFlight", "allowIncompatibleVersions",
)  # fmt: skip
_TOO_LARGE = 1e9
_TRUE, _FALSE = ("true", "yes", "on", "1"), ("false", "no", "off", "0")


@dataclass(frozen=True, slots=True)
class Reader:
    """Reads values, given as YAML has them or as text; what cannot be used is a finding, and reads as if not there."""

    what: str
    entry: Entry
    findings: Findings

    def text(self, key: str) -> str:
        """Return a text; '' where there is none."""
        value = self.entry.get(key)
        if value is not None and not isinstance(value, str):
            self._refuse(key, "text")
        return value if isinstance(value, str) else ""

    def path(self, key: str) -> Path | None:
        """Return a path; None where there is none."""
        text = self.text(key)
        return Path(text) if text else None

    def boolean(self, key: str) -> bool | None:
        """Return a switch; None where there is none."""
        value = self.entry.get(key)
        if value is None or isinstance(value, bool):
            return value
        word = value.strip().lower() if isinstance(value, str) else ""
        if word not in (*_TRUE, *_FALSE):
            self._refuse(key, "true or false")
            return None
        return word in _TRUE

    def number(self, key: str) -> float | None:
        """Return a number above 0; None where there is none."""
        value = self.entry.get(key)
        if value is None:
            return None
        try:
            number = float(value) if isinstance(value, int | float | str) and not isinstance(value, bool) else 0.0
        except ValueError:
            number = 0.0
        if not 0 < number < _TOO_LARGE:
            self._refuse(key, "a number above 0")
            return None
        return number

    def _refuse(self, key: str, expected: str) -> None:
        self.findings.problems.append(f"{self.what}: {key}: expected {expected}, got another value")


def zone_settings(zone: str, entry: Entry, defaults: Defaults, findings: Findings) -> ManagementSettings:
    """Read one zone, whose keys are those of this file's own form; what cannot be used is among the findings."""
    reader = Reader(f"zone {zone}", entry, findings)
    own = defaults.management
    tls_verify, allow_incompatible = reader.boolean("tlsVerify"), reader.boolean("allowIncompatibleVersions")
    settings = replace(
        _with_identity(reader, own),
        servers=_servers(reader),
        ca_file=reader.path("caFile") or own.ca_file,
        tls_verify=own.tls_verify if tls_verify is None else tls_verify,
        request_timeout_s=reader.number("requestTimeout") or own.request_timeout_s,
        max_requests_in_flight=int(reader.number("maxRequestsInFlight") or own.max_requests_in_flight),
        allow_incompatible_versions=(
            own.allow_incompatible_versions if allow_incompatible is None else allow_incompatible
        ),
    )
    findings.problems += [f"zone {zone}: {problem}" for problem in settings.problems()]
    return settings


def _with_identity(reader: Reader, own: ManagementSettings) -> ManagementSettings:
    """Return settings with the zone's user or certificate, with the default's where it names neither."""
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


def _servers(reader: Reader) -> tuple[str, ...]:
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
    """Return the URL of a server that is written as a URL, as HOST:PORT, or as HOST."""
    if _HAS_SCHEME.match(address):
        return address.rstrip("/")
    if address.count(":") > 1 and not address.startswith("["):
        address = f"[{address}]"
    return f"{protocol}://{address}" if _HAS_PORT.fullmatch(address) else f"{protocol}://{address}:{_DEFAULT_PORT}"
