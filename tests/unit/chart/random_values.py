# SPDX-License-Identifier: Apache-2.0
"""Random values of the chart, a few at a time: of the shapes in its schema, with names that collide and odd words."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from typing import Any

from hypothesis import strategies as st
from hypothesis.strategies import SearchStrategy

from tests.unit.chart.rendering import CHART

Schema = Mapping[str, Any]
Path = tuple[str, ...]

_SCHEMA: Schema = json.loads((CHART / "values.schema.json").read_text())
_WORDS = ("a", "B.c_d", "x y", "-a", "", "true", "a" * 64, "é")
_KEYS = ("a", "example.com/a", "A.example.com/b", "_x", "a/b/c", "a" * 64, "app.kubernetes.io/name", "kubernetes.io/os")
_VOLUMES = ("data", "data", "more", "socket", "dev", "kubelet")
_OWN_NAMES: Mapping[str, SearchStrategy[Any]] = {
    "dnsLabel": st.sampled_from(_VOLUMES),
    "directory": st.sampled_from(("/data", "/data/more", "/run/csi", "/tmp", "/dev", "/var/lib/kubelet")),
    "quantity": st.sampled_from(("100m", "64Mi", "128Mi", "1Gi", "2", 1, "1e3", "0.5", "0", ".5Gi", "2000Ki")),
    "name": st.sampled_from(("a", "b", "example.com", "a-b.c")),
}
_NOT_VARIED: frozenset[Path] = frozenset({
    # What the rest depends on, and what only one cluster has: addresses of Services, namespaces.
    ("storage", "enabled"), ("storage", "nodeName"), ("management",), ("snapshots",), ("nodeComponentOnly",),
    ("storage", "service", "clusterIP"), ("rbac", "secrets", "namespaces"), ("global",), ("image",),
    # Kinds that only add-ons of a cluster have.
    ("monitoring",), ("openshift",), ("volumeSnapshotClasses",), ("volumeGroupSnapshotClasses",),
})  # fmt: skip


def values() -> SearchStrategy[dict[str, Any]]:
    """Return values that set one to three things."""
    one = st.sampled_from(sorted(_places(_SCHEMA, ()))).flatmap(_set)
    return st.lists(one, min_size=1, max_size=3).map(_merged)


def _places(schema: Schema, path: Path) -> Iterator[Path]:
    """Yield the paths of values that are set as a whole."""
    properties = schema.get("properties")
    if path in _NOT_VARIED:
        return
    if not properties or (len(path) >= 2 and "flags" in path):
        yield path
        return
    for name, inner in properties.items():
        if path and path[0] == "additionalDaemonSets":
            yield path
        else:
            yield from _places(_found(inner), (*path, name))


def _set(path: Path) -> SearchStrategy[dict[str, Any]]:
    schema = _SCHEMA
    for name in path:
        schema = _found(schema["properties"][name])
    nested = _of(schema)
    for name in reversed(path):
        nested = nested.map(lambda value, name=name: {name: value})  # type: ignore[misc]
    return nested


def _merged(parts: list[dict[str, Any]]) -> dict[str, Any]:
    whole: dict[str, Any] = {}
    for part in parts:
        _merge(whole, part)
    return whole


def _merge(into: dict[str, Any], part: Mapping[str, Any]) -> None:
    for key, value in part.items():
        if isinstance(value, dict) and isinstance(into.get(key), dict):
            _merge(into[key], value)
        else:
            into[key] = value


def _found(schema: Schema) -> Schema:
    while "$ref" in schema:
        found: Any = _SCHEMA
        for name in schema["$ref"].removeprefix("#/").split("/"):
            found = found[name]
        schema = {**found, **{key: value for key, value in schema.items() if key != "$ref"}}
    return schema


def _of(given: Schema) -> SearchStrategy[Any]:
    """Return values of a schema; Helm judges the conditions that are not followed here (if, not)."""
    own = _OWN_NAMES.get(given.get("$ref", "").rpartition("/")[2])
    schema = _found(given)
    kind = schema.get("type")
    if own is not None:
        return own
    if "enum" in schema:
        return st.sampled_from(schema["enum"])
    if "const" in schema:
        return st.just(schema["const"])
    if "anyOf" in schema:
        return st.one_of([_of(each) for each in schema["anyOf"]])
    if kind == "boolean":
        return st.booleans()
    if kind in ("integer", "number"):
        least = schema.get("minimum", schema.get("exclusiveMinimum", -1) + 1)
        return st.integers(least, min(schema.get("maximum", least + 2000), least + 2000))
    if kind == "array":
        few = min(schema.get("maxItems", 2), max(2, schema.get("minItems", 0)))
        return st.lists(_of(schema.get("items", {})), min_size=schema.get("minItems", 0), max_size=few)
    if kind == "object":
        return _object(schema)
    if "pattern" in schema:
        text = st.from_regex(
            schema["pattern"].replace("$", r"\Z"), fullmatch=True, alphabet=st.characters(max_codepoint=126)
        )
        return text.filter(lambda one: len(one) <= schema.get("maxLength", 300))
    return st.sampled_from([word for word in _WORDS if len(word) >= schema.get("minLength", 0)])


@st.composite
def _object(draw: st.DrawFn, schema: Schema) -> dict[str, Any]:
    properties, required = schema.get("properties", {}), list(schema.get("required", ()))
    if "oneOf" in schema:
        required += draw(st.sampled_from(schema["oneOf"]))["required"]
    optional = sorted(properties.keys() - set(required))
    most = schema.get("maxProperties", len(required) + 3) - len(required)
    least = max(0, schema.get("minProperties", 0) - len(required))
    chosen = draw(st.lists(st.sampled_from(optional), unique=True, min_size=least, max_size=most)) if optional else []
    made = {name: draw(_of(properties[name])) for name in (*required, *chosen)}
    others = schema.get("additionalProperties") or next(iter(schema.get("patternProperties", {}).values()), None)
    if others:
        few = st.lists(st.sampled_from(_KEYS), unique=True, min_size=least, max_size=max(least, min(most, 2)))
        made |= {name: draw(_of(others)) for name in draw(few)}
    return made
