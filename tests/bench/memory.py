# SPDX-License-Identifier: Apache-2.0
"""Memory and threads of controller and node: idle, after many calls at once, after thousands. Start-up time."""

from __future__ import annotations

import statistics
import subprocess
import sys
import time
from pathlib import Path

from csi_driver.rpc.client import CallFailed
from tests.bench.life import life_on, new_volumes
from tests.bench.measure import resident_mib, thread_count, timed
from tests.bench.report import Report
from tests.bench.stack import Stack
from tests.client import CsiClient

MEASURED = ("controller", "node")


def measure_memory(stack: Stack, directory: Path, report: Report, at_once: int, calls: int, rest_s: float) -> None:
    """Print memory and threads of a new stack: idle, after three times as many lives, after a rest, after calls."""
    columns = ("MiB and threads", "idle", f"{at_once} at once", f"{rest_s:.0f} s later", "threads", f"{calls} calls")
    table = report.table("Resident memory", columns)
    life = life_on(stack)
    idle = _resident(stack)
    volumes = new_volumes(directory, "memory", 3 * at_once)
    for step in life.steps():
        timed(step.call, volumes, at_once=at_once)
    busy = _resident(stack)
    time.sleep(rest_s)
    rested = _resident(stack)
    threads = {role: thread_count(stack.pid(role)) for role in MEASURED}
    (volume,) = new_volumes(directory, "memory-calls", 1)
    for call in (life.create, life.attach, life.stage, life.publish):
        call(volume)
    timed(lambda _: life.stats(volume), range(calls), at_once=4)
    timed(lambda _: stack.controller.get_volume(volume.volume_id), range(calls), at_once=4)
    after = _resident(stack)
    for call in (life.unpublish, life.unstage, life.detach, life.delete):
        call(volume)
    for role in MEASURED:
        table.row(role, idle[role], busy[role], rested[role], threads[role], after[role])
        report.figure(f"{role}_idle_mib", idle[role])
        report.figure(f"{role}_growth_mib", busy[role] - idle[role])
        report.figure(f"{role}_threads", threads[role])


def _resident(stack: Stack) -> dict[str, float]:
    return {role: resident_mib(stack.pid(role)) for role in MEASURED}


def measure_start(directory: Path, report: Report, rounds: int) -> None:
    """Print the time from starting a process to its first answer to Probe."""
    table = report.table("Start to first answered Probe, ms", ("", "least", "median", "most"))
    password = directory / "password"
    password.write_text("x")
    flags = {
        "node": ["--node-name", "bench", "--device-directory", str(directory), "--status-directory", str(directory),
                 "--state-directory", str(directory / "state"), "--path-root", "/"],
        "controller": ["--management-server", "http://127.0.0.1:1", "--management-user", "u",
                       "--management-password-file", str(password)],
    }  # fmt: skip
    for role, own in flags.items():
        took_ms: list[float] = []
        for turn in range(rounds):
            socket = directory / f"start-{role}-{turn}.sock"
            argv = [sys.executable, "-m", "csi_driver", role, "--endpoint", f"unix://{socket}", *own]
            begun = time.perf_counter()
            process = subprocess.Popen(argv, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
            try:
                with CsiClient(socket) as client:
                    _wait_for_any_answer(client, socket)
                    took_ms.append((time.perf_counter() - begun) * 1000)
            finally:
                process.terminate()
                process.wait(60)
        table.row(role, min(took_ms), statistics.median(took_ms), max(took_ms))


def _wait_for_any_answer(client: CsiClient, socket: Path) -> None:
    """Return when Probe was answered, with any answer."""
    give_up_at = time.monotonic() + 30
    while time.monotonic() < give_up_at:
        if socket.exists():
            try:
                client.is_ready()
            except CallFailed as error:
                if error.code != "UNAVAILABLE":
                    return
            else:
                return
        time.sleep(0.002)
    raise SystemExit(f"no answer on {socket} within 30 s")
