# SPDX-License-Identifier: Apache-2.0
"""Timing and counting for the benchmark: latencies, rates, and what processes use: CPU, memory, threads, reads."""

from __future__ import annotations

import os
import statistics
import time
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

T = TypeVar("T")

MIB = 1 << 20
_TICKS_PER_S = os.sysconf("SC_CLK_TCK")


@dataclass(frozen=True, slots=True)
class Timing:
    """Durations of calls, and what processes used for them.

    `cpu_s`: all processes of the driver and the tools they ran. `own_cpu_s`, `read_bytes`: the serving process, without
    its tools and with them.
    """

    latencies_s: tuple[float, ...]
    wall_s: float
    cpu_s: float = 0.0
    own_cpu_s: float = 0.0
    read_bytes: int = 0

    @property
    def calls(self) -> int:
        return len(self.latencies_s)

    @property
    def per_second(self) -> float:
        return self.calls / self.wall_s if self.wall_s else 0.0

    @property
    def median_ms(self) -> float:
        return statistics.median(self.latencies_s) * 1000

    def percentile_ms(self, percent: float) -> float:
        """Return a percentile of the latencies in milliseconds (nearest rank)."""
        ranked = sorted(self.latencies_s)
        return ranked[min(len(ranked) - 1, int(len(ranked) * percent / 100))] * 1000

    def per_call_ms(self, seconds: float) -> float:
        return seconds / self.calls * 1000


def timed(
    call: Callable[[T], object],
    items: Sequence[T],
    *,
    at_once: int,
    pids: Sequence[int] = (),
    serving: int | None = None,
) -> Timing:
    """Call once per item, `at_once` calls at a time; the first failure ends the benchmark."""

    def one(item: T) -> float:
        begun = time.perf_counter()
        call(item)
        return time.perf_counter() - begun

    cpu_before, own_before, read_before = cpu_s(pids), own_cpu_s(serving), read_bytes(serving)
    begun = time.perf_counter()
    if at_once == 1:
        latencies = [one(item) for item in items]
    else:
        with ThreadPoolExecutor(at_once) as pool:
            latencies = list(pool.map(one, items))
    wall_s = time.perf_counter() - begun
    used = (cpu_s(pids) - cpu_before, own_cpu_s(serving) - own_before, read_bytes(serving) - read_before)
    return Timing(tuple(latencies), wall_s, *used)


def cpu_s(pids: Iterable[int]) -> float:
    """Return user and system seconds of the processes and of their children that have ended (proc(5), stat)."""
    total = 0
    for pid in pids:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        total += sum(int(field) for field in fields[11:15])
    return total / _TICKS_PER_S


def own_cpu_s(pid: int | None) -> float:
    """Return user and system seconds of a process without its children, to the nanosecond.

    The clock is the one that clock_getcpuclockid(3) names, which Python does not have.
    """
    return 0.0 if pid is None else time.clock_gettime(~pid << 3 | 2)


def read_bytes(pid: int | None) -> int:
    """Return the bytes read by a process and by its children that have ended, also from memory (proc(5), io)."""
    return 0 if pid is None else int(_field(pid, "io", "rchar"))


def resident_mib(pid: int) -> float:
    """Return the resident memory of a process."""
    return int(_field(pid, "status", "VmRSS").split()[0]) / 1024


def thread_count(pid: int) -> int:
    return int(_field(pid, "status", "Threads"))


def _field(pid: int, file: str, name: str) -> str:
    for line in Path(f"/proc/{pid}/{file}").read_text().splitlines():
        found, _, value = line.partition(":")
        if found == name:
            return value.strip()
    raise LookupError(f"/proc/{pid}/{file} has no {name}")
