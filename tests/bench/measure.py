# SPDX-License-Identifier: Apache-2.0
"""Timing and counting for the benchmark: latencies, rates, CPU seconds and memory of processes."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

T = TypeVar("T")

_TICKS_PER_S = os.sysconf("SC_CLK_TCK")


@dataclass(frozen=True, slots=True)
class Timing:
    """Durations of calls. `cpu_s` is that of the driver's processes and of the tools they ran."""

    latencies_s: tuple[float, ...]
    wall_s: float
    cpu_s: float = 0.0

    @property
    def calls(self) -> int:
        return len(self.latencies_s)

    @property
    def per_second(self) -> float:
        return self.calls / self.wall_s if self.wall_s else 0.0

    def percentile_ms(self, percent: float) -> float:
        """Return a percentile of the latencies in milliseconds (nearest rank)."""
        ranked = sorted(self.latencies_s)
        return ranked[min(len(ranked) - 1, int(len(ranked) * percent / 100))] * 1000

    @property
    def cpu_ms_per_call(self) -> float:
        return self.cpu_s / self.calls * 1000


def cpu_seconds(pids: Iterable[int]) -> float:
    """Return user and system seconds of the processes and of their children that have ended (proc(5), stat)."""
    total = 0
    for pid in pids:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        total += sum(int(field) for field in fields[11:15])
    return total / _TICKS_PER_S


def resident_mib(pid: int) -> float:
    """Return the resident memory of a process in MiB (proc(5), status, VmRSS)."""
    for line in Path(f"/proc/{pid}/status").read_text().splitlines():
        if line.startswith("VmRSS:"):
            return int(line.split()[1]) / 1024
    raise LookupError(f"process {pid} shows no VmRSS")


def timed(call: Callable[[T], object], items: Sequence[T], *, at_once: int, pids: Sequence[int] = ()) -> Timing:
    """Call once per item, `at_once` calls at a time; the first failure ends the benchmark."""

    def one(item: T) -> float:
        begun = time.perf_counter()
        call(item)
        return time.perf_counter() - begun

    cpu_before = cpu_seconds(pids)
    begun = time.perf_counter()
    if at_once == 1:
        latencies = [one(item) for item in items]
    else:
        with ThreadPoolExecutor(at_once) as pool:
            latencies = list(pool.map(one, items))
    wall_s = time.perf_counter() - begun
    return Timing(tuple(latencies), wall_s, cpu_seconds(pids) - cpu_before)
