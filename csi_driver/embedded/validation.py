"""Checks a decoded JSON value against a JSON Schema, as far as the schemas of this API go. Pure.

Understood: type, enum, const, properties, required, additionalProperties (false), items, minItems, minimum, maximum,
minLength, maxLength, pattern, anyOf, and `maxBytes` (the API's own: size of the value as JSON).
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from typing import cast

from csi_driver.embedded.refusals import SchemaRefusal

Schema = Mapping[str, object]

_TYPES: dict[str, tuple[type, ...]] = {
    "object": (dict,),
    "array": (list,),
    "string": (str,),
    "boolean": (bool,),
    "null": (type(None),),
    "number": (int, float),
    "integer": (int, float),
}


def validate(value: object, schema: Schema, at: str = "data/body") -> None:
    """Return if `value` fits. Raises SchemaRefusal with the first misfit."""
    choices = schema.get("anyOf")
    if isinstance(choices, list):
        _any_of(value, choices, at)
    if "type" in schema:
        _type(value, schema["type"], at)
    if "const" in schema and value != schema["const"]:
        raise SchemaRefusal(f"{at} must be equal to constant")
    allowed = schema.get("enum")
    if isinstance(allowed, list) and value not in allowed:
        raise SchemaRefusal(f"{at} must be equal to one of the allowed values")
    limit = schema.get("maxBytes")
    if isinstance(limit, int) and len(json.dumps(value).encode()) > limit:
        raise SchemaRefusal(f"{at} must NOT be larger than {limit} bytes")
    _contents(value, schema, at)


def _contents(value: object, schema: Schema, at: str) -> None:
    if isinstance(value, str):
        _string(value, schema, at)
    elif isinstance(value, bool):
        return
    elif isinstance(value, int | float):
        _number(value, schema, at)
    elif isinstance(value, list):
        _array(value, schema, at)
    elif isinstance(value, dict):
        _object(value, schema, at)


def _any_of(value: object, choices: list[Schema], at: str) -> None:
    problems = []
    for choice in choices:
        try:
            validate(value, choice, at)
        except SchemaRefusal as problem:
            problems.append(problem.detail)
        else:
            return
    raise SchemaRefusal(f"{', '.join(problems)}, {at} must match a schema in anyOf")


def _type(value: object, wanted: object, at: str) -> None:
    names = wanted if isinstance(wanted, list) else [wanted]
    for name in names:
        fits = isinstance(value, _TYPES[str(name)])
        if name in ("number", "integer"):
            fits = fits and not isinstance(value, bool)
        if name == "integer" and isinstance(value, float):
            fits = value.is_integer()
        if fits:
            return
    raise SchemaRefusal(f"{at} must be {','.join(str(name) for name in names)}")


def _string(value: str, schema: Schema, at: str) -> None:
    shortest, longest, pattern = schema.get("minLength"), schema.get("maxLength"), schema.get("pattern")
    if isinstance(shortest, int) and len(value) < shortest:
        raise SchemaRefusal(f"{at} must NOT have fewer than {shortest} characters")
    if isinstance(longest, int) and len(value) > longest:
        raise SchemaRefusal(f"{at} must NOT have more than {longest} characters")
    # JSON Schema's $ is the very end; Python's is also before a last newline.
    if isinstance(pattern, str) and re.search(re.sub(r"\$$", r"\\Z", pattern), value, re.ASCII) is None:
        raise SchemaRefusal(f'{at} must match pattern "{pattern}"')


def _number(value: float, schema: Schema, at: str) -> None:
    least, most = schema.get("minimum"), schema.get("maximum")
    if isinstance(least, int | float) and not value >= least:
        raise SchemaRefusal(f"{at} must be >= {least}")
    if isinstance(most, int | float) and not value <= most:
        raise SchemaRefusal(f"{at} must be <= {most}")


def _array(value: list[object], schema: Schema, at: str) -> None:
    least, items = schema.get("minItems"), schema.get("items")
    if isinstance(least, int) and len(value) < least:
        raise SchemaRefusal(f"{at} must NOT have fewer than {least} items")
    if isinstance(items, Mapping):
        for index, item in enumerate(value):
            validate(item, items, f"{at}/{index}")


def _object(value: dict[str, object], schema: Schema, at: str) -> None:
    required = cast("list[str]", schema.get("required", []))
    properties = cast("Mapping[str, Schema]", schema.get("properties", {}))
    if schema.get("additionalProperties") is False:
        for name in value:
            if name not in properties:
                raise SchemaRefusal(f'Error: Invalid property: "{name}"')
    for name in required:
        if name not in value:
            raise SchemaRefusal(f"{at} must have required property '{name}'")
    for name, inner in properties.items():
        if name in value:
            validate(value[name], inner, f"{at}/{name}")
