# SPDX-License-Identifier: Apache-2.0
"""Probe while many volumes are staged, asked by a process of its own as kubelet is one.

`python -m tests.bench.probe SOCKET` asks until its standard input ends, and prints the latencies in seconds.
"""

from __future__ import annotations

import contextlib
import json
import select
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

from csi_driver.rpc.client import CsiClient
from tests.bench.life import life_on
from tests.bench.measure import Timing, timed
from tests.bench.report import Report
from tests.bench.stack import Stack

PAUSE_S = 0.002
MOST_ROUNDS = 20


def measure_probe(stack: Stack, directory: Path, report: Report, stages: int, wanted: int) -> None:
    """Print how long Probe takes on the node, alone and while volumes are staged: at least `wanted` samples."""
    table = report.table("Probe of the node", ("", "calls", "p50 ms", "p99 ms", "most ms"))
    idle = timed(lambda _: stack.node.is_ready(), range(200), at_once=1)
    table.row("alone", idle.calls, idle.median_ms, idle.percentile_ms(99), idle.percentile_ms(100))
    life = life_on(stack)
    latencies_s: list[float] = []
    staging_s = 0.0
    for turn in range(MOST_ROUNDS):
        volumes = life.attached(directory, f"probe-{turn}", stages)
        with prober(stack.node.socket) as found:
            staging_s += timed(life.stage, volumes, at_once=stages).wall_s
        latencies_s += found
        timed(life.unstage, volumes, at_once=16)
        life.remove(volumes)
        if len(latencies_s) >= wanted:
            break
    probe = Timing(tuple(latencies_s), staging_s)
    p99_ms = probe.percentile_ms(99)
    table.row(f"while {stages} stage", probe.calls, probe.median_ms, p99_ms, probe.percentile_ms(100))
    report.figure("probe_p99_ms", p99_ms)


@contextlib.contextmanager
def prober(socket: Path) -> Iterator[list[float]]:
    """Probe meanwhile by another process; the list holds the latencies afterwards."""
    found: list[float] = []
    argv = [sys.executable, "-m", "tests.bench.probe", str(socket)]
    with subprocess.Popen(argv, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        process.stdout.readline()  # it is connected
        yield found
        found += json.loads(process.communicate()[0])


def _probe_until_end(socket: Path) -> None:
    latencies_s: list[float] = []
    with CsiClient(socket, timeout_s=30) as client:
        client.is_ready()
        print("ready", flush=True)
        while not select.select([sys.stdin], [], [], PAUSE_S)[0]:
            begun = time.perf_counter()
            client.is_ready(timeout_s=30)
            latencies_s.append(time.perf_counter() - begun)
    print(json.dumps(latencies_s))


if __name__ == "__main__":
    _probe_until_end(Path(sys.argv[1]))
