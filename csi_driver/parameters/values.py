"""How the text of a parameter becomes a value. Every reader names the key, what it is and what was wanted."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from typing import TypeVar

from csi_driver.errors import InvalidField, InvalidRequest

_NUMBER = re.compile(r"[0-9]{1,9}")
T = TypeVar("T")


def number(own: Mapping[str, str], key: str, least: int, most: int) -> int | None:
    """Return a whole number within bounds; None where the key is absent."""

    given = own.get(key)
    if given is None:
        return None
    if not _NUMBER.fullmatch(given) or not least <= int(given) <= most:
        raise InvalidField(
            f"parameters.{key}", given, f"a whole number from {least} to {most}" if least != most else str(least)
        )
    return int(given)


def power_of_two(own: Mapping[str, str], key: str, least: int, most: int) -> int | None:
    """Return a power of two within bounds; None where the key is absent."""
    value = number(own, key, least, most)
    if value is not None and value & (value - 1):
        raise InvalidField(f"parameters.{key}", own[key], f"a power of two from {least} to {most}")
    return value


def switch(own: Mapping[str, str], key: str) -> bool | None:
    """Return whether the key says true; None where it is absent."""
    return _read(own, key, {"true": True, "false": False}.get, "true or false")


def chosen(own: Mapping[str, str], key: str, choices: Mapping[str, T]) -> T | None:
    """Return what the key's word, in any case, stands for; None where it is absent."""
    return _read(own, key, choices.get, f"one of {', '.join(sorted(choices))}")


def text(own: Mapping[str, str], key: str, pattern: re.Pattern[str], wanted: str) -> str | None:
    """Return text that has a form as a whole; None where the key is absent."""
    value = own.get(key)
    if value is not None and not pattern.fullmatch(value):
        raise InvalidField(f"parameters.{key}", value, wanted)
    return value


def names(own: Mapping[str, str], key: str) -> tuple[str, ...]:
    """Return names separated by commas; empty where the key is absent."""
    value = own.get(key)
    if value is None:
        return ()
    found = tuple(name.strip() for name in value.split(","))
    if not all(found):
        raise InvalidField(f"parameters.{key}", value, "names separated by commas")
    return found


def refuse_keys(own: Mapping[str, str], refused: set[str], reason: str) -> None:
    """Refuse the first of these keys that is present."""
    present = sorted(refused & own.keys())
    if present:
        raise InvalidRequest(f"parameter {present[0]} cannot be used: {reason}")


def _read(own: Mapping[str, str], key: str, read: Callable[[str], T | None], wanted: str) -> T | None:
    given = own.get(key)
    if given is None:
        return None
    value = read(given.strip().lower())
    if value is None:
        raise InvalidField(f"parameters.{key}", given, wanted)
    return value
