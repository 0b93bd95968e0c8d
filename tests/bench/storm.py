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
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path

from csi_driver.rpc.client import CallFailed
from tests.bench.life import Life, Script, Volume, life_on
from tests.bench.measure import timed
from tests.bench.report import Report, Table
from tests.bench.stack import Stack
from tests.client import CsiClient

CALL_TIME_S = 300.0
FIRST_PAUSE_S = 0.5
LONGEST_PAUSE_S = 122.0


@dataclass
class Weather:
    """Results of a storm."""

    wall_s: float = 0.0
    client_cpu_s: float = 0.0
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

    begun, cpu_before_s = time.perf_counter(), time.process_time()
    with ThreadPoolExecutor(at_once) as pool:
        for _ in pool.map(one, jobs):
            pass
    weather.wall_s, weather.client_cpu_s = time.perf_counter() - begun, time.process_time() - cpu_before_s
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


def measure_storm(stack: Stack, directory: Path, report: Report, count: int, publications: int) -> None:
    """Print how long many volumes take that are staged and published at once, blank and in use before."""
    columns = ("", "calls", "s", "ideal s", "ratio", "longest s", "client CPU s")
    table = report.table("Boot storm, beside a sequential shell script divided by the processors", columns)
    life = life_on(stack)
    volumes = life.attached(directory, "storm", count)
    alone_s = _script_alone_s(life, Script(stack), directory)
    at_boot = [_bring_up(life, volume) for volume in volumes]
    for what, key in (("blank", "storm_blank_ratio"), ("in use before", "storm_ratio")):
        weather = storm(stack.node.socket, at_boot, at_once=count)
        report.figure(key, _storm_row(table, f"{count} volumes, {what}", weather, ideal_s(alone_s[what], count)))
        if what == "blank":
            for step in (life.unpublish, life.unstage):
                timed(step, volumes, at_once=16)
    many = [replace(volumes[n % count], target=directory / f"storm-{n}-many") for n in range(publications)]
    weather = storm(stack.node.socket, [[partial(life.publish_by, volume=each)] for each in many], at_once=count)
    _storm_row(table, f"{publications} more publications", weather, ideal_s(alone_s["bind"], publications))
    timed(life.unpublish, many, at_once=16)
    for step in (life.unpublish, life.unstage):
        timed(step, volumes, at_once=16)
    life.remove(volumes)


def _bring_up(life: Life, volume: Volume) -> list[Callable[[CsiClient], object]]:
    return [partial(life.stage_by, volume=volume), partial(life.publish_by, volume=volume)]


def _storm_row(table: Table, name: str, weather: Weather, ideal: float) -> float:
    table.row(
        name, weather.calls, weather.wall_s, ideal, weather.wall_s / ideal, weather.longest_s, weather.client_cpu_s
    )
    print(f"  errors: {weather.told()}")
    return weather.wall_s / ideal


def _script_alone_s(life: Life, script: Script, directory: Path, count: int = 20) -> dict[str, float]:
    """Return the seconds that one volume alone takes a script: blank, in use before, one more publication."""
    volumes = life.attached(directory, "storm-script", count)
    found = {"blank": timed(script.format_and_mount, volumes, at_once=1).wall_s / count}
    timed(script.unmount, volumes, at_once=1)
    found["in use before"] = timed(script.mount, volumes, at_once=1).wall_s / count
    found["bind"] = timed(script.bind, volumes, at_once=1).wall_s / count
    timed(script.unbind, volumes, at_once=1)
    timed(script.unmount, volumes, at_once=1)
    life.remove(volumes)
    return found
