# SPDX-License-Identifier: Apache-2.0
"""Read the text of one parameter. Every reader names the key, the values that it takes and the value that it got."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import TypeVar

from csi_driver.errors import InvalidField, InvalidRequest

_NUMBER = re.compile(r"[0-9]{1,9}")
T = TypeVar("T")


class InvalidParameter(InvalidField):
    def __init__(self, key: str, value: object, expected: str, action: str = "") -> None:
        super().__init__(f"parameter {key}", value, expected, action)
        self.field = key


class SeveralProblems(InvalidRequest):
    def __init__(self, problems: Sequence[InvalidRequest]) -> None:
        self.problems = tuple(problems)
        super().__init__("; ".join(str(problem) for problem in problems))


@dataclass(slots=True)
class Problems:
    _found: dict[str, InvalidRequest] = field(default_factory=dict)

    def of(self, read: Callable[[], T]) -> T | None:
        """Return the result of `read`; None when it raises `InvalidRequest`, which is kept for `raise_any`."""
        try:
            return read()
        except InvalidRequest as problem:
            self.add(problem)
            return None

    def add(self, problem: InvalidRequest) -> None:
        for each in problem.problems if isinstance(problem, SeveralProblems) else (problem,):
            self._found.setdefault(str(each), each)

    def raise_any(self, also: InvalidRequest | None = None) -> None:
        """Raise the only problem as it is, several as `SeveralProblems`; `also` is added to others."""
        if also is not None and self._found:
            self.add(also)
        found = tuple(self._found.values())
        if found:
            raise found[0] if len(found) == 1 else SeveralProblems(found)


# The readers return None where the key is absent.


def number(
    own: Mapping[str, str], key: str, least: int, most: int, suffix: str = "", *, is_power: bool = False
) -> int | None:
    """Return a whole number, or power of two, within bounds. `suffix` completes the bounds in messages."""
    given = own.get(key)
    if given is None:
        return None
    value = int(given) if _NUMBER.fullmatch(given) else None
    if value is None or not least <= value <= most or (is_power and value & (value - 1)):
        kind = "a power of two" if is_power else "a whole number"
        bounds = f"{kind} from {least} to {most}" if least < most else f"{least}, the only possible value"
        raise InvalidParameter(key, given, bounds + suffix)
    return value


power_of_two = partial(number, is_power=True)


def switch(own: Mapping[str, str], key: str) -> bool | None:
    return _read(own, key, {"true": True, "false": False}.get, "true or false")


def chosen(own: Mapping[str, str], key: str, choices: Mapping[str, T]) -> T | None:
    return _read(own, key, choices.get, f"one of {', '.join(sorted(choices))}")


def _read(own: Mapping[str, str], key: str, read: Callable[[str], T | None], expected: str) -> T | None:
    given = own.get(key)
    value = read(given.strip().lower()) if given is not None else None
    if given is not None and value is None:
        raise InvalidParameter(key, given, expected)
    return value


def text(own: Mapping[str, str], key: str, pattern: re.Pattern[str], expected: str) -> str | None:
    value = own.get(key)
    if value is not None and not pattern.fullmatch(value):
        raise InvalidParameter(key, value, expected)
    return value


def names(own: Mapping[str, str], key: str) -> tuple[str, ...] | None:
    value = own.get(key)
    found = tuple(name.strip() for name in value.split(",")) if value is not None else None
    if found is not None and not all(found):
        raise InvalidParameter(key, value, "names separated by commas")
    return found


def refuse_keys(own: Mapping[str, str], refused: set[str], reason: str) -> None:
    present = sorted(refused & own.keys())
    if present:
        raise InvalidRequest(f"parameter {present[0]} cannot be used: {reason}")
