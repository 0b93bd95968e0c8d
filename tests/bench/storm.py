# SPDX-License-Identifier: Apache-2.0
"""A node that has just booted: every volume is staged and published at once, as kubelet does it.

Each call has a connection of its own and two minutes, and is made again after half a second, then twice that and so
on, as kubelet's back-off does. For comparison the same by a shell script, one volume after the other, divided by the
machine's processors: the ideal.
"""

from __future__ import annotations

import collections
import os
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

from csi_driver.rpc.client import CallFailed
from tests.client import CsiClient

CALL_TIME_S = 300.0
FIRST_PAUSE_S = 0.5
LONGEST_PAUSE_S = 122.0


@dataclass
class Weather:
    """Results of a storm."""

    wall_s: float = 0.0
    calls: int = 0
    longest_s: float = 0.0
    refusals: collections.Counter[str] = field(default_factory=collections.Counter)

    def told(self) -> str:
        """Say which errors there were."""
        return ", ".join(f"{count} {code}" for code, count in sorted(self.refusals.items())) or "none"


def storm(socket: Path, jobs: Sequence[Sequence[Callable[[CsiClient], object]]], *, at_once: int) -> Weather:
    """Do all jobs at once, the calls of each in order; every call is repeated until it is done."""
    weather = Weather()
    lock = threading.Lock()

    def one(job: Sequence[Callable[[CsiClient], object]]) -> None:
        for call in job:
            pause_s = FIRST_PAUSE_S
            while (code := _called(socket, call, weather, lock)) is not None:
                with lock:
                    weather.refusals[code] += 1
                time.sleep(pause_s)
                pause_s = min(pause_s * 2, LONGEST_PAUSE_S)

    begun = time.perf_counter()
    with ThreadPoolExecutor(at_once) as pool:
        for _ in pool.map(one, jobs):
            pass
    weather.wall_s = time.perf_counter() - begun
    return weather


def _called(socket: Path, call: Callable[[CsiClient], object], weather: Weather, lock: threading.Lock) -> str | None:
    """Make a call by a connection of its own; return the code of its refusal."""
    begun = time.perf_counter()
    try:
        with CsiClient(socket, timeout_s=CALL_TIME_S) as client:
            call(client)
    except CallFailed as failure:
        return failure.code
    finally:
        with lock:
            weather.calls += 1
            weather.longest_s = max(weather.longest_s, time.perf_counter() - begun)
    return None


def ideal_s(alone_s: float, count: int) -> float:
    """Return what `count` volumes take at best when one alone takes so long: spread over the processors."""
    return alone_s * count / (os.cpu_count() or 1)
