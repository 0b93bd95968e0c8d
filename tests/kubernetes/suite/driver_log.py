# SPDX-License-Identifier: Apache-2.0
"""Statistics of the driver's log during a run: calls, refusals, slow calls, warnings."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

_DONE = re.compile(r"boundary: (?P<call>\w+)#\d+ is done after (?P<seconds>[\d.]+) s$")
_REFUSED = re.compile(
    r"boundary: (?P<call>\w+)#\d+ answers (?P<code>\w+) after (?P<seconds>[\d.]+) s: (?P<message>.*)$"
)
_GRAVE = re.compile(r"^\S+ (?:WARNING|ERROR|CRITICAL) (?P<message>.*)$")
# What differs from one volume to the next, so that equal messages are counted together.
_VARYING = (
    (re.compile(r"[0-9a-f]{8}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{12}"), "<uuid>"),
    (re.compile(r"csi-[0-9a-f-]{15,18}"), "<volume>"),
    (re.compile(r"(?<=<uuid>:)[a-z0-9-]+"), "<namespace>"),
    (re.compile(r"/var/lib/kubelet/\S+"), "<path>"),
    (re.compile(r"\b\d+\b"), "<n>"),
)


@dataclass(frozen=True, slots=True)
class Refusals:
    """Equal answers other than OK."""

    call: str
    code: str
    message: str
    count: int


@dataclass(frozen=True, slots=True)
class Calls:
    """Calls that were answered OK and the slowest of each, those that were not, and other warnings with their count."""

    answered: Mapping[str, int] = field(default_factory=dict)
    slowest_s: Mapping[str, float] = field(default_factory=dict)
    refused: tuple[Refusals, ...] = ()
    warnings: Mapping[str, int] = field(default_factory=dict)

    @staticmethod
    def from_document(document: Mapping[str, Any]) -> Calls:
        """Read what `dataclasses.asdict` made."""
        return Calls(
            answered=document["answered"],
            slowest_s=document["slowest_s"],
            refused=tuple(Refusals(**entry) for entry in document["refused"]),
            warnings=document["warnings"],
        )


def read(lines: Iterable[str]) -> Calls:
    """Count lines of the driver's log (--log-level debug, --log-format text)."""
    answered: Counter[str] = Counter()
    slowest: dict[str, float] = {}
    refused: Counter[tuple[str, str, str]] = Counter()
    warnings: Counter[str] = Counter()
    for line in lines:
        if found := _DONE.search(line):
            answered[found["call"]] += 1
            slowest[found["call"]] = max(slowest.get(found["call"], 0.0), float(found["seconds"]))
        elif found := _REFUSED.search(line):
            refused[found["call"], found["code"], _alike(found["message"])] += 1
        elif found := _GRAVE.match(line):
            warnings[_alike(found["message"])] += 1
    return Calls(
        answered=dict(sorted(answered.items())),
        slowest_s=dict(sorted(slowest.items())),
        refused=tuple(Refusals(*key, count) for key, count in sorted(refused.items())),
        warnings=dict(sorted(warnings.items())),
    )


def _alike(message: str) -> str:
    for pattern, stand_in in _VARYING:
        message = pattern.sub(stand_in, message)
    return message
