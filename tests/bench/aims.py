# SPDX-License-Identifier: Apache-2.0
"""The figures of a run that count, their aims, and when a figure is worse than before."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

WORSE_BY = 0.2
"""A figure is worse than before from this part on."""

PACE = "script_life_ms"
"""Times and rates of two runs are compared relative to this one: so fast was the machine."""


@dataclass(frozen=True, slots=True)
class Figure:
    """One figure. Differences below `grain` are noise."""

    name: str
    unit: str
    aim: float | None = None
    more_is_better: bool = False
    grain: float = 0.0

    def is_met(self, value: float) -> bool | None:
        """Return whether the aim is reached; None without an aim."""
        if self.aim is None:
            return None
        return value >= self.aim if self.more_is_better else value <= self.aim

    def expected(self, before: float, pace: float) -> float:
        """Return an earlier value on a machine that takes `pace` times as long now."""
        if self.unit == "per s":
            return before / pace
        return before * pace if self.unit == "ms" else before

    def is_worse(self, value: float, expected: float) -> bool:
        lost = expected - value if self.more_is_better else value - expected
        return lost > max(self.grain, abs(expected) * WORSE_BY)


FIGURES: Mapping[str, Figure] = {
    PACE: Figure("script: node part of a life, alone", "ms"),
    "life_ratio": Figure("node part of a life, alone: time / script's", "ratio", 1.1),
    "life_rate_ratio_16": Figure("the same, 16 at once: rate / script's", "ratio", 1.0, more_is_better=True),
    "life_rate_ratio_100": Figure("the same, 100 at once: rate / script's", "ratio", 1.0, more_is_better=True),
    "stage_cpu_ms": Figure("stage, 16 at once: CPU of the node process", "CPU ms", 4.0),
    "stage_read_mib": Figure("stage: read by node and mkfs", "MiB", grain=0.5),
    "create_rate_16": Figure("CreateVolume, 16 at once", "per s", more_is_better=True),
    "create_rate_ratio_16": Figure("CreateVolume, 16 at once: rate / peer's", "ratio", 0.5, more_is_better=True),
    "attach_ms": Figure("ControllerPublishVolume alone", "ms", 8.0),
    "attach_cpu_ms": Figure("ControllerPublishVolume alone: CPU of the controller", "CPU ms", 3.0),
    "attach_rate_100": Figure("ControllerPublishVolume, 100 at once", "per s", 200.0, more_is_better=True),
    "detach_rate_100": Figure("ControllerUnpublishVolume, 100 at once", "per s", 200.0, more_is_better=True),
    "delete_ms": Figure("DeleteVolume alone", "ms", 6.0),
    "list_whole_ms": Figure("ListVolumes of 10,000 in one answer", "ms", 150.0),
    "list_pages_ms": Figure("ListVolumes of 10,000 by 500", "ms", 300.0),
    "reader_stage_ms": Figure("second reader on a node: stage", "ms", 30.0, grain=1.0),
    "reader_publish_ms": Figure("second reader on a node: publish", "ms", 5.0, grain=1.0),
    "probe_p99_ms": Figure("Probe of the node while 100 stage, p99", "ms", 40.0, grain=5.0),
    "node_idle_mib": Figure("node: memory idle", "MiB", 48.0, grain=1.0),
    "controller_idle_mib": Figure("controller: memory idle", "MiB", 52.0, grain=1.0),
    "node_growth_mib": Figure("node: memory after 100 at once, above idle", "MiB", 10.0, grain=2.0),
    "controller_growth_mib": Figure("controller: memory after 100 at once, above idle", "MiB", 10.0, grain=2.0),
    "node_threads": Figure("node: threads 30 s after 100 at once", "threads", grain=4.0),
    "controller_threads": Figure("controller: threads 30 s after 100 at once", "threads", grain=4.0),
    "storm_ratio": Figure("300 volumes after a boot: time / ideal", "ratio", 1.3),
    "storm_blank_ratio": Figure("the same, blank volumes: time / ideal", "ratio", 1.3),
    "cut_ms": Figure("CreateSnapshot, one extent", "ms"),
    "cut_ratio": Figure("CreateSnapshot, 100,000 extents: time / cp --reflink's", "ratio", 1.5),
    "create_requests": Figure("CreateVolume: requests to the management", "requests", grain=0.2),
}


@dataclass(frozen=True, slots=True)
class Comparison:
    """A figure of a run, with the one expected from an earlier run, if there is one."""

    figure: Figure
    value: float
    expected: float | None

    @property
    def is_worse(self) -> bool:
        return self.expected is not None and self.figure.is_worse(self.value, self.expected)


def compare(now: Mapping[str, float], before: Mapping[str, float]) -> Iterator[Comparison]:
    """Compare the figures of a run with earlier ones.

    Times and rates are left out when the machine's pace is not known in both: they would tell of the machine.
    """
    pace = now[PACE] / before[PACE] if PACE in now and PACE in before else None
    for key, figure in FIGURES.items():
        if key in now:
            is_known = key in before and key != PACE and (pace is not None or figure.unit not in ("ms", "per s"))
            yield Comparison(figure, now[key], figure.expected(before[key], pace or 1.0) if is_known else None)
