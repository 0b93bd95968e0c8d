"""Lists: filter, sort, projection and paging, as `GET /<collection>/all/:page/:count` takes them. Pure.

Understood in filters: equality, $in, $gt, dotted keys. Anything else is refused with the API's own error; a pattern
($regex) too, for a caller could keep the whole manager busy with one.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

from csi_driver.embedded.refusals import Document, SchemaRefusal

_MISSING = object()
Test = Callable[[object], bool]


class QueryRefused(Exception):
    """The list cannot be made. `mixed`: the projection both includes and excludes."""

    def __init__(self, message: str, *, mixed: bool = False) -> None:
        self.mixed = mixed
        super().__init__(message)


@dataclass(frozen=True, slots=True)
class Query:
    """What to list. Each of the three is a decoded JSON object; empty means all."""

    filter: Mapping[str, object]
    sort: Mapping[str, object]
    projection: Mapping[str, object]
    page: int = 0
    count: int = 0
    """Documents a page; 0 means all of them."""

    @classmethod
    def parse(cls, parameters: Mapping[str, str], page: str = "0", count: str = "0") -> Query:
        """Decode the query string. Raises SchemaRefusal."""
        numbers = []
        for name, text in (("page", page), ("count", count)):
            if not (text.isascii() and text.isdigit()):
                raise SchemaRefusal(f"data/params/{name} must be integer")
            numbers.append(int(text))
        return cls(
            _object(parameters, "filter"), _object(parameters, "sort"), _object(parameters, "projection"), *numbers
        )

    def wants(self, field: str) -> bool:
        """Tell whether a field is in the answer."""
        if not self.projection:
            return True
        return (field in self.projection) == (self._including() or not self.projection)

    def _including(self) -> bool:
        flags = {bool(value) for key, value in self.projection.items() if key != "_id"}
        if len(flags) > 1:
            raise QueryRefused("the projection both includes and excludes", mixed=True)
        return flags.pop() if flags else bool(self.projection.get("_id"))

    def select(self, documents: Iterable[Document]) -> list[Document]:
        """Return the filtered, sorted page, not yet projected. Raises QueryRefused."""
        tests = [(key.split("."), _test(wanted)) for key, wanted in self.filter.items()]
        self._including()
        selected = [document for document in documents if all(test(_reach(document, path)) for path, test in tests)]
        for key, direction in reversed(list(self.sort.items())):
            if direction not in (1, -1):
                raise QueryRefused(f"the sort direction of {key} is neither 1 nor -1")
            path = key.split(".")
            selected.sort(
                key=lambda document, path=path: _order(_reach(document, path)),  # type: ignore[misc]
                reverse=direction == -1,
            )
        if self.count:
            selected = selected[self.page * self.count : (self.page + 1) * self.count]
        return selected

    def project(self, documents: Sequence[Document]) -> list[Document]:
        """Return the documents with the projected fields only. Raises QueryRefused."""
        if not self.projection:
            return list(documents)
        including = self._including()
        if not including:
            return [_without(document, self.projection) for document in documents]
        names = [key for key, value in self.projection.items() if value]
        if self.projection.get("_id", 1) and "_id" not in names:
            names.append("_id")
        if any("." in name for name in names):
            return [_with(document, names) for document in documents]
        return [{name: document[name] for name in names if name in document} for document in documents]


def _object(parameters: Mapping[str, str], name: str) -> Mapping[str, object]:
    text = parameters.get(name)
    if not text:
        return {}
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as problem:
        raise SchemaRefusal(f'data/query/{name} must match format "json"') from problem
    if not isinstance(value, dict):
        raise SchemaRefusal(f"data/query/{name} must be object")
    return value


def _reach(document: object, path: Sequence[str]) -> object:
    for step in path:
        if not isinstance(document, dict) or step not in document:
            return _MISSING
        document = document[step]
    return document


def _test(wanted: object) -> Test:
    """Return the test that one filter entry stands for."""
    if not isinstance(wanted, dict) or not any(str(key).startswith("$") for key in wanted):
        return lambda value: _equal(value, wanted)
    tests = [_operator(str(name), operand) for name, operand in wanted.items()]
    return lambda value: all(test(value) for test in tests)


def _operator(name: str, operand: object) -> Test:
    if name == "$in" and isinstance(operand, list):
        return lambda value: any(_equal(value, item) for item in operand)
    if name == "$gt":
        return lambda value: _greater(value, operand)
    raise QueryRefused(f"the filter operator is {name}, expected $in with a list, $gt, or a plain value")


def _equal(value: object, wanted: object) -> bool:
    if value is _MISSING:
        return wanted is None
    if isinstance(value, bool) != isinstance(wanted, bool):
        return False
    if isinstance(value, list) and not isinstance(wanted, list):
        return wanted in value
    return value == wanted


def _greater(value: object, wanted: object) -> bool:
    if isinstance(value, str) and isinstance(wanted, str):
        return value > wanted
    numbers = (int, float)
    if isinstance(value, numbers) and isinstance(wanted, numbers) and not isinstance(value, bool):
        return value > wanted
    return False


def _order(value: object) -> tuple[int, float, str]:
    """Sort missing before numbers before text, as MongoDB does."""
    if value is _MISSING or value is None:
        return (0, 0.0, "")
    if isinstance(value, int | float):
        return (1, float(value), "")
    return (2, 0.0, value if isinstance(value, str) else json.dumps(value, sort_keys=True))


def _without(document: Document, projection: Mapping[str, object]) -> Document:
    kept = dict(document)
    for key in projection:
        head, _, rest = key.partition(".")
        inner = kept.get(head)
        if not rest:
            kept.pop(head, None)
        elif isinstance(inner, dict):
            kept[head] = _without(inner, {rest: 0})
    return kept


def _with(document: Document, names: Sequence[str]) -> Document:
    """Return what the names select; like MongoDB, a dotted name reaches into each element of a list."""
    rests: dict[str, list[str]] = {}
    for name in names:
        head, _, rest = name.partition(".")
        rests.setdefault(head, []).append(rest)
    kept: Document = {}
    for head, below in rests.items():
        value = document.get(head, _MISSING)
        if "" in below and value is not _MISSING:
            kept[head] = value
        elif isinstance(value, dict):
            if inner := _with(value, below):
                kept[head] = inner
        elif isinstance(value, list):
            kept[head] = [_with(element, below) for element in value if isinstance(element, dict)]
    return kept
