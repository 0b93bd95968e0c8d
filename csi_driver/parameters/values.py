"""Read the text of one parameter. Every reader names the key, the values that it takes and the value that it got."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from typing import TypeVar

from csi_driver.errors import InvalidField, InvalidRequest

_NUMBER = re.compile(r"[0-9]{1,9}")
T = TypeVar("T")


class InvalidParameter(InvalidField):
    """A parameter has a value that cannot be used. `expected` completes "expected ..."; `action` says what to do."""

    def __init__(self, key: str, value: object, expected: str, action: str = "") -> None:
        super().__init__(f"parameter {key}", value, expected, action)
        self.field = key


class RefusedParameter(InvalidRequest):
    """A parameter does not apply here, whatever its value."""

    def __init__(self, key: str, reason: str) -> None:
        self.field = key
        super().__init__(f"parameter {key} cannot be used: {reason}")


class SeveralProblems(InvalidRequest):
    """Several things are wrong with one request."""

    def __init__(self, problems: Sequence[InvalidRequest]) -> None:
        self.problems = tuple(problems)
        super().__init__("; ".join(str(problem) for problem in problems))


class Problems:
    """Collects the problems of one request, so that its author reads all of them at once."""

    def __init__(self) -> None:
        self._found: dict[str, InvalidRequest] = {}

    def of(self, read: Callable[[], T]) -> T | None:
        """Return the result of `read`; None when it raises `InvalidRequest`, which is kept for `raise_any`."""
        try:
            return read()
        except InvalidRequest as problem:
            self.add(problem)
            return None

    def add(self, problem: InvalidRequest) -> None:
        """Keep a problem; each message is kept once."""
        for each in problem.problems if isinstance(problem, SeveralProblems) else (problem,):
            self._found.setdefault(str(each), each)

    def raise_any(self, beside: InvalidRequest | None = None) -> None:
        """Raise the only problem as it is, and several as `SeveralProblems`; `beside` is reported with others alone."""
        if beside is not None and self._found:
            self.add(beside)
        found = tuple(self._found.values())
        if found:
            raise found[0] if len(found) == 1 else SeveralProblems(found)


def number(own: Mapping[str, str], key: str, least: int, most: int, suffix: str = "") -> int | None:
    """Return a whole number within bounds; None where the key is absent. `suffix` completes the bounds in messages."""
    given = own.get(key)
    if given is None:
        return None
    if not _NUMBER.fullmatch(given) or not least <= int(given) <= most:
        bounds = f"a whole number from {least} to {most}" if least < most else str(least)
        raise InvalidParameter(key, given, bounds + suffix)
    return int(given)


def power_of_two(own: Mapping[str, str], key: str, least: int, most: int, suffix: str = "") -> int | None:
    """Return a power of two within bounds; None where the key is absent."""
    given = own.get(key)
    if given is None:
        return None
    value = int(given) if _NUMBER.fullmatch(given) else 0
    if not least <= value <= most or value & (value - 1):
        bounds = f"a power of two from {least} to {most}" if least < most else f"{least}, the only possible value"
        raise InvalidParameter(key, given, bounds + suffix)
    return value


def switch(own: Mapping[str, str], key: str) -> bool | None:
    """Return True or False for `true` or `false` in any case; None where the key is absent."""
    return _read(own, key, {"true": True, "false": False}.get, "true or false")


def chosen(own: Mapping[str, str], key: str, choices: Mapping[str, T]) -> T | None:
    """Return the value that `choices` gives for the key's word, in any case; None where the key is absent."""
    return _read(own, key, choices.get, f"one of {', '.join(sorted(choices))}")


def text(own: Mapping[str, str], key: str, pattern: re.Pattern[str], expected: str) -> str | None:
    """Return text that matches the whole pattern; None where the key is absent."""
    value = own.get(key)
    if value is not None and not pattern.fullmatch(value):
        raise InvalidParameter(key, value, expected)
    return value


def names(own: Mapping[str, str], key: str) -> tuple[str, ...]:
    """Return names separated by commas; empty where the key is absent."""
    value = own.get(key)
    if value is None:
        return ()
    found = tuple(name.strip() for name in value.split(","))
    if not all(found):
        raise InvalidParameter(key, value, "names separated by commas")
    return found


def refuse_keys(own: Mapping[str, str], refused: set[str], reason: str) -> None:
    """Refuse the keys of `refused` that are present, the first by name."""
    present = sorted(refused & own.keys())
    if present:
        raise RefusedParameter(present[0], reason)


def _read(own: Mapping[str, str], key: str, read: Callable[[str], T | None], expected: str) -> T | None:
    given = own.get(key)
    if given is None:
        return None
    value = read(given.strip().lower())
    if value is None:
        raise InvalidParameter(key, given, expected)
    return value
