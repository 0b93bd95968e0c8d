# SPDX-License-Identifier: Apache-2.0
"""Costs of single calls: all of a volume's life, with many mounts, for a second reader, of long lists."""

from __future__ import annotations

import subprocess
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from csi_driver.model import AccessMode, Capability, MountAccess
from csi_driver.rpc.pb import csi_pb2 as pb
from tests.bench.life import BLOCK, Volume, life_on, new_volumes
from tests.bench.measure import MIB, Timing, timed
from tests.bench.report import Report
from tests.bench.stack import Stack
from tests.client import CsiClient

READERS = Capability(MountAccess(fs_type="ext4"), AccessMode.MULTI_NODE_READER_ONLY)


def measure_calls(stack: Stack, directory: Path, report: Report, counts: dict[int, int]) -> None:
    """Print each call of a life at several concurrencies; `CPU ms` of all processes, `own` of the serving one."""
    columns = ("call", "at once", "p50 ms", "p99 ms", "per second", "CPU ms/call", "own CPU ms", "read MiB")
    table = report.table("Calls", columns)
    life = life_on(stack)
    found: dict[tuple[str, int], Timing] = {}
    for at_once, count in counts.items():
        volumes = new_volumes(directory, f"calls-{at_once}", count)
        for step in life.steps():
            timing = timed(step.call, volumes, at_once=at_once, pids=stack.pids, serving=stack.pid(step.role))
            found[step.name.split()[0], at_once] = timing
            used_ms = (timing.per_call_ms(timing.cpu_s), timing.per_call_ms(timing.own_cpu_s))
            latencies_ms = (timing.median_ms, timing.percentile_ms(99))
            read_mib = timing.read_bytes / count / MIB
            table.row(step.name, at_once, *latencies_ms, timing.per_second, *used_ms, read_mib)
    _figures_of_calls(report, found)


def _figures_of_calls(report: Report, found: dict[tuple[str, int], Timing]) -> None:
    attach, stage = found["ControllerPublishVolume", 1], found["NodeStageVolume", 16]
    report.figure("attach_ms", attach.median_ms)
    report.figure("attach_cpu_ms", attach.per_call_ms(attach.own_cpu_s))
    report.figure("delete_ms", found["DeleteVolume", 1].median_ms)
    report.figure("create_rate_16", found["CreateVolume", 16].per_second)
    report.figure("stage_cpu_ms", stage.per_call_ms(stage.own_cpu_s))
    report.figure("stage_read_mib", stage.read_bytes / stage.calls / MIB)
    if ("ControllerPublishVolume", 100) in found:
        report.figure("attach_rate_100", found["ControllerPublishVolume", 100].per_second)
        report.figure("detach_rate_100", found["ControllerUnpublishVolume", 100].per_second)


def measure_readers(stack: Stack, directory: Path, report: Report, count: int) -> None:
    """Print what a second reader of a volume on this node takes, beside the first."""
    table = report.table("Readers of one volume on one node", ("", "at once", "p50 ms", "p99 ms", "per second"))
    life, reading = life_on(stack), life_on(stack, READERS)
    firsts = life.attached(directory, "readers", count)
    for step in (life.on_node, life.detach, reading.attach):
        timed(step, firsts, at_once=8)
    seconds = new_volumes(directory, "second", count)
    for first, second in zip(firsts, seconds, strict=True):
        second.volume_id = f"{first.volume_id}:second"
        reading.attach(second)
    for which, volumes in (("first", firsts), ("second", seconds)):
        for name, call in (("stage", reading.stage), ("publish", reading.publish)):
            timing = timed(call, volumes, at_once=1)
            table.timing(f"{which} reader, {name}", 1, timing)
            if which == "second":
                report.figure(f"reader_{name}_ms", timing.median_ms)
    for volumes in (seconds, firsts):
        for step in (reading.unpublish, reading.unstage, reading.detach):
            timed(step, volumes, at_once=8)
    timed(reading.delete, firsts, at_once=8)


def measure_mounts(stack: Stack, directory: Path, report: Report, extra_mounts: Sequence[int], count: int) -> None:
    """Print publish and statistics with few and many other mounts present."""
    table = report.table("With other mounts present", ("call", "mounts", "p50 ms", "p99 ms", "per second"))
    life = life_on(stack)
    (volume,) = life.attached(directory, "mounts", 1)
    life.stage(volume)
    busy = directory / "busy"
    busy.mkdir()
    present = 0
    try:
        for wanted in extra_mounts:
            present = add_mounts(busy, present, wanted)
            targets = [replace(volume, target=directory / f"mounts-target-{wanted}-{n}") for n in range(count)]
            for name, call in (
                ("NodePublishVolume", life.publish),
                ("NodePublishVolume repeated", life.publish),
                ("NodeGetVolumeStats", life.stats),
                ("NodeUnpublishVolume", life.unpublish),
            ):
                table.timing(name, wanted, timed(call, targets, at_once=1))
    finally:
        for n in range(present):
            subprocess.run(["umount", busy / str(n)], check=False)
    life.unstage(volume)
    life.remove([volume])


def add_mounts(busy: Path, present: int, wanted: int) -> int:
    """Mount a directory below itself until so many mounts are present; return their number."""
    for n in range(present, wanted):
        (busy / str(n)).mkdir()
        subprocess.run(["mount", "--bind", busy, busy / str(n)], check=True)
    return max(present, wanted)


def measure_list(stack: Stack, report: Report, count: int) -> None:
    """Print ListVolumes of many volumes, in one answer and in pages."""
    table = report.table(f"ListVolumes of {count}", ("", "volumes", "ms"))
    made = timed(life_on(stack, BLOCK).create, [Volume(f"list-{n}") for n in range(count)], at_once=16)
    for name, key, page in (("in one answer", "list_whole_ms", 0), ("in pages of 500", "list_pages_ms", 500)):
        best_ms = float("inf")
        seen = 0
        for _ in range(5):
            begun = time.perf_counter()
            seen = _count_listed(stack.controller, page)
            best_ms = min(best_ms, (time.perf_counter() - begun) * 1000)
        table.row(name, seen, best_ms)
        report.figure(key, best_ms)
    print(f"(they were created at {made.per_second:.0f} per second, 16 at once)")


def _count_listed(client: CsiClient, page: int) -> int:
    """List to the end, without making objects of the entries: that would be a third of the time."""
    seen, token = 0, ""
    while True:
        request = pb.ListVolumesRequest(max_entries=page, starting_token=token)
        answer = client.call(client.controller.ListVolumes, request)
        seen, token = seen + len(answer.entries), answer.next_token
        if not token:
            return seen
