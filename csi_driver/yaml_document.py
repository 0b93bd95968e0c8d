# SPDX-License-Identifier: Apache-2.0
"""Read a JSON or YAML document with all its problems at once, without ever quoting a value that may be a password."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from csi_driver.errors import InvalidRequest, shown

_LARGEST_BYTES = 1 << 20

T = TypeVar("T")
Source = str | Mapping[str, str]
"""The text of a file, or the files of a directory (a mounted ConfigMap) by name."""
Entry = Mapping[str, object]


class InvalidDocument(InvalidRequest):
    """A document cannot be used. `problems` has one sentence for each problem."""

    def __init__(self, problems: Sequence[str]) -> None:
        self.problems = tuple(problems)
        super().__init__("; ".join(problems))


@dataclass(slots=True)
class Findings:
    """Problems, which make a document unusable, and warnings for its author."""

    problems: list[str] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)

    def unknown_keys(self, what: str, entry: Entry, known: Sequence[str]) -> None:
        """Add a problem for each unknown key; not quoted without a value, as it may be a mistyped password."""
        self.problems.extend(
            f"{what}: unknown key {'without a value' if value is None else shown(key)};"
            f" expected one of {', '.join(known)}"
            for key, value in entry.items()
            if key not in known
        )


def read_source(path: Path) -> Source:
    """Read a file, or all files of a directory. Raises `InvalidDocument`."""
    try:
        if not path.is_dir():
            return _read_text(path)
        # kubelet replaces a mounted ConfigMap through the link ..data: its target never mixes two versions.
        version = path / "..data"
        directory = version.resolve() if version.is_dir() else path
        files = sorted(entry for entry in directory.iterdir() if not entry.name.startswith("..") and entry.is_file())
        return {entry.name: _read_text(entry) for entry in files}
    except OSError as error:
        raise InvalidDocument([f"{path} cannot be read: {error.strerror}"]) from error


def _read_text(path: Path) -> str:
    content = path.read_bytes()
    if len(content) > _LARGEST_BYTES:
        raise InvalidDocument([f"{path}: expected at most {_LARGEST_BYTES} bytes, got {len(content)}"])
    try:
        return content.decode()
    except UnicodeDecodeError:
        raise InvalidDocument([f"{path}: expected UTF-8 text, got other bytes"]) from None


def decode_mapping(text: str, what: str) -> Entry:
    """Decode JSON or YAML that must be a mapping. Raises `InvalidDocument` with the line of a syntax error."""
    try:
        document = _decode(text, what)
    except _DuplicateKey as duplicate:
        raise InvalidDocument([f"{what}: key {shown(duplicate.key)} is given twice; remove one"]) from None
    if not isinstance(document, dict) or not all(isinstance(key, str) for key in document):
        raise InvalidDocument([f"{what}: expected a mapping of keys to values"])
    return document


def _decode(text: str, what: str) -> object:
    try:
        return json.loads(text, object_pairs_hook=_without_duplicates)
    except ValueError as error:
        try:
            return _decode_yaml(text, what)
        except InvalidDocument:
            if text.lstrip()[:1] == "{" and isinstance(error, json.JSONDecodeError):
                problem = f"{what}: expected JSON, got an error in line {error.lineno}: {error.msg}"
                raise InvalidDocument([problem]) from None
            raise


def _decode_yaml(text: str, what: str) -> object:
    import yaml  # costs start-up time, and JSON does not need it

    class Loader(yaml.SafeLoader):
        """Refuses duplicate keys: YAML keeps the last one silently."""

    def mapping(loader: Loader, node: yaml.MappingNode) -> dict[Any, Any]:
        loader.flatten_mapping(node)
        construct = loader.construct_object
        return _without_duplicates(
            [(construct(key, deep=True), construct(value, deep=True)) for key, value in node.value]
        )

    Loader.add_constructor(yaml.resolver.BaseResolver.DEFAULT_MAPPING_TAG, mapping)
    try:
        return yaml.load(text, Loader)  # noqa: S506 - a SafeLoader
    except yaml.MarkedYAMLError as error:
        line = error.problem_mark.line + 1 if error.problem_mark is not None else 0
        raise InvalidDocument([f"{what}: expected JSON or YAML, got a syntax error in line {line}"]) from None
    except (yaml.YAMLError, ValueError, TypeError, RecursionError):
        raise InvalidDocument([f"{what}: expected JSON or YAML, got a syntax error"]) from None


class _DuplicateKey(Exception):
    def __init__(self, key: object) -> None:
        self.key = key
        super().__init__()


def _without_duplicates(pairs: Sequence[tuple[Any, Any]]) -> dict[Any, Any]:
    found: dict[Any, Any] = {}
    for key, value in pairs:
        if key in found:
            raise _DuplicateKey(key)
        found[key] = value
    return found


@dataclass(frozen=True, slots=True)
class MappingReader:
    """Reads the values of a mapping. An invalid value becomes a problem and reads as absent."""

    what: str
    entry: Entry = field(repr=False)
    findings: Findings

    def text(self, key: str) -> str:
        """Return a text; "" where it is absent."""
        value = self.entry.get(key)
        if value is not None and not isinstance(value, str):
            self._refuse(key, "text")
        return value if isinstance(value, str) else ""

    def path(self, key: str) -> Path | None:
        """Return a path; None where it is absent."""
        text = self.text(key)
        return Path(text) if text else None

    def value(self, key: str, read: Callable[[str], T], default: T) -> T:
        """Return a value by the reader of its flag, from YAML's types or from text."""
        value = self.entry.get(key)
        try:
            return default if value is None else read(str(value).strip())
        except ValueError as error:
            self._refuse(key, str(error))
            return default

    def _refuse(self, key: str, expected: str) -> None:
        self.findings.problems.append(f"{self.what}: {key}: expected {expected}, got another value")
