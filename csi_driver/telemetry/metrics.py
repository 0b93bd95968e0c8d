"""Measurements and how they are written for Prometheus (text format 0.0.4, exposition_formats of its documentation).

prometheus_client was measured and costs a node 3.8 MiB and 20 ms at start, for what these lines do. Labels are few and
of few values: names of methods, codes, servers; never of volumes, nodes or paths.
"""

from __future__ import annotations

import threading
from bisect import bisect_left
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Protocol

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"

MOST_SERIES = 1000
"""Of one measurement. What comes beyond is counted under `OTHER`, so that nobody fills the memory by strange labels."""
OTHER = "other"

Labels = tuple[str, ...]
Sample = tuple[Labels, float]


class Kind(StrEnum):
    """What a measurement is."""

    COUNTER = "counter"
    GAUGE = "gauge"
    HISTOGRAM = "histogram"


@dataclass(frozen=True, slots=True)
class Description:
    """A measurement's name (with its unit), meaning and labels."""

    name: str
    help: str
    labels: tuple[str, ...] = ()


class Measurement(Protocol):
    """Something that can be written."""

    @property
    def description(self) -> Description: ...

    @property
    def kind(self) -> Kind: ...

    def lines(self) -> Iterable[str]:
        """Write the samples as they are now."""
        ...


@dataclass(slots=True)
class Counter:
    """Counts what happens. Thread-safe."""

    description: Description
    kind: Kind = field(default=Kind.COUNTER, init=False)
    _counts: dict[Labels, float] = field(default_factory=dict)
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def add(self, *labels: str, amount: float = 1) -> None:
        """Count once more, or `amount`; 0 makes a series that starts at nought."""
        with self._lock:
            key = _bounded(labels, self._counts)
            self._counts[key] = self._counts.get(key, 0) + amount

    def lines(self) -> Iterator[str]:
        """Write a line for each series."""
        with self._lock:
            counts = sorted(self._counts.items())
        for labels, count in counts:
            yield line(self.description.name, self.description.labels, labels, count)


@dataclass(slots=True)
class Histogram:
    """Sorts durations or sizes into buckets, whose upper bounds are given in order. Thread-safe."""

    description: Description
    bounds: tuple[float, ...]
    kind: Kind = field(default=Kind.HISTOGRAM, init=False)
    _series: dict[Labels, list[int]] = field(default_factory=dict)
    """For each bucket, and for what exceeds all of them."""
    _sums: dict[Labels, float] = field(default_factory=dict)
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def observe(self, value: float, *labels: str) -> None:
        """Note a value."""
        place = bisect_left(self.bounds, value)
        with self._lock:
            key = _bounded(labels, self._series)
            counts = self._series.setdefault(key, [0] * (len(self.bounds) + 1))
            counts[place] += 1
            self._sums[key] = self._sums.get(key, 0.0) + value

    def lines(self) -> Iterator[str]:
        """Write buckets (each counts what the smaller ones do, too), sum and count of each series."""
        with self._lock:
            series = sorted((labels, tuple(counts), self._sums[labels]) for labels, counts in self._series.items())
        name, names = self.description.name, self.description.labels
        bounds = (*map(_number, self.bounds), "+Inf")
        for labels, counts, total in series:
            so_far = 0
            for bound, count in zip(bounds, counts, strict=True):
                so_far += count
                yield line(f"{name}_bucket", (*names, "le"), (*labels, bound), so_far)
            yield line(f"{name}_sum", names, labels, total)
            yield line(f"{name}_count", names, labels, so_far)


@dataclass(frozen=True, slots=True)
class Reading:
    """Something that is looked up when it is asked for. `read` gives a sample for each series, and ends soon."""

    description: Description
    read: Callable[[], Iterable[Sample]]
    kind: Kind = Kind.GAUGE

    def lines(self) -> Iterator[str]:
        """Look it up and write it."""
        for labels, value in self.read():
            yield line(self.description.name, self.description.labels, labels, value)


def exposition(measurements: Iterable[Measurement]) -> str:
    """Write all measurements, each with its meaning and kind, also one that has no series yet."""
    written: list[str] = []
    for each in measurements:
        description = each.description
        text = description.help.replace("\\", "\\\\").replace("\n", "\\n")
        written += [f"# HELP {description.name} {text}", f"# TYPE {description.name} {each.kind}", *each.lines()]
    return "".join(f"{each}\n" for each in written)


def line(name: str, names: Sequence[str], values: Labels, value: float) -> str:
    """Write one sample."""
    shown = ",".join(f'{label}="{_escaped(text)}"' for label, text in zip(names, values, strict=True))
    return f"{name}{{{shown}}} {_number(value)}" if shown else f"{name} {_number(value)}"


def _escaped(text: str) -> str:
    return text.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n")


def _number(value: float) -> str:
    return str(int(value)) if value == int(value) and abs(value) < 1 << 53 else repr(float(value))


def _bounded(labels: Labels, known: Mapping[Labels, object]) -> Labels:
    return labels if labels in known or len(known) < MOST_SERIES else (OTHER,) * len(labels)
