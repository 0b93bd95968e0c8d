# SPDX-License-Identifier: Apache-2.0
"""The driver beside others that do the same, in alternating rounds: a shell script, and any other CSI driver."""

from __future__ import annotations

import shutil
import statistics
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from csi_driver.model import AccessMode, Capability, MountAccess
from csi_driver.rpc.pb import csi_pb2 as pb
from tests.bench.aims import PACE
from tests.bench.life import EXT4, XFS, Life, Script, Volume, life_on, new_volumes
from tests.bench.measure import Timing, timed
from tests.bench.report import Report, Table
from tests.bench.stack import Stack
from tests.client import CsiClient

MOUNT = Capability(MountAccess(), AccessMode.SINGLE_NODE_WRITER)
COMPARED = ("CreateVolume", "NodePublishVolume", "DeleteVolume")

Round = Callable[[str], Timing]
"""Makes one round of calls on volumes with this prefix of their names."""


def alternate(ways: Mapping[str, Round], rounds: int) -> dict[str, list[Timing]]:
    """Run each way in turn."""
    timings: dict[str, list[Timing]] = {name: [] for name in ways}
    for turn in range(rounds):
        for name, way in ways.items():
            timings[name].append(way(f"{name.replace(' ', '-')}-{turn}"))
    return timings


def median_rate(timings: Sequence[Timing]) -> float:
    return statistics.median(timing.per_second for timing in timings)


def median_ms(timings: Sequence[Timing]) -> float:
    return statistics.median(timing.median_ms for timing in timings)


def measure_life(stack: Stack, directory: Path, report: Report, rounds: int) -> None:
    """Print stage, publish, unpublish and unstage of a blank volume, and the same work by a script."""
    columns = ("", "at once", "p50 ms", "per second", "time ratio", "rate ratio")
    table = report.table("Node part of a life, beside a shell script", columns)
    for at_once, count in ((1, 10), (16, 48), (100, 100)):
        ours, script = _life_beside_script(stack, directory, "ext4", at_once, count, rounds, table)
        if at_once == 1:
            report.figure(PACE, median_ms(script))
            report.figure("life_ratio", median_ms(ours) / median_ms(script))
        else:
            report.figure(f"life_rate_ratio_{at_once}", median_rate(ours) / median_rate(script))
    if shutil.which("mkfs.xfs"):
        for at_once, count in ((1, 10), (16, 48)):
            _life_beside_script(stack, directory, "xfs", at_once, count, (rounds + 1) // 2, table)


def _life_beside_script(
    stack: Stack, directory: Path, fs: str, at_once: int, count: int, rounds: int, table: Table
) -> tuple[list[Timing], list[Timing]]:
    life = life_on(stack, XFS if fs == "xfs" else EXT4)

    def round_of(on_node: Callable[[Volume], None]) -> Round:
        def one(prefix: str) -> Timing:
            volumes = life.attached(directory, f"{prefix}-{at_once}", count)
            timing = timed(on_node, volumes, at_once=at_once)
            life.remove(volumes)
            return timing

        return one

    ways = {f"driver {fs}": round_of(life.on_node), f"script {fs}": round_of(Script(stack, fs).on_node)}
    timings = alternate(ways, rounds)
    ours, script = timings.values()
    for name, each in timings.items():
        ratios = (median_ms(each) / median_ms(script), median_rate(each) / median_rate(script))
        table.row(name, at_once, median_ms(each), median_rate(each), *ratios)
    return ours, script


def measure_peer(stack: Stack, directory: Path, report: Report, peer: Path, rounds: int) -> None:
    """Print CreateVolume, NodePublishVolume and DeleteVolume beside another CSI driver."""
    columns = ("", "at once", "p50 ms", "per second", "rate / peer's")
    table = report.table("Beside another driver", columns)
    with CsiClient(peer, timeout_s=300) as client:
        names = ("driver", client.plugin_name())
        lives = dict(zip(names, (life_on(stack, MOUNT), _life_of_peer(client)), strict=True))
        for at_once, count in ((1, 40), (16, 160), (100, 200)):
            found: dict[str, dict[str, list[Timing]]] = {name: {call: [] for call in COMPARED} for name in names}
            for turn in range(rounds):
                for name, life in lives.items():
                    volumes = new_volumes(directory, f"{name}-{at_once}-{turn}", count)
                    for step in life.steps():
                        timing = timed(step.call, volumes, at_once=at_once)
                        if step.name in COMPARED:
                            found[name][step.name].append(timing)
            for call in COMPARED:
                rates = {name: median_rate(found[name][call]) for name in names}
                for name in names:
                    p50_ms = median_ms(found[name][call])
                    table.row(f"{call}, {name}", at_once, p50_ms, rates[name], rates[name] / rates[names[1]])
                if (call, at_once) == ("CreateVolume", 16):
                    report.figure("create_rate_ratio_16", rates[names[0]] / rates[names[1]])


def _life_of_peer(client: CsiClient) -> Life:
    control = client.call(client.controller.ControllerGetCapabilities, pb.ControllerGetCapabilitiesRequest())
    node = client.call(client.node.NodeGetCapabilities, pb.NodeGetCapabilitiesRequest())
    attaches = pb.ControllerServiceCapability.RPC.PUBLISH_UNPUBLISH_VOLUME
    stages = pb.NodeServiceCapability.RPC.STAGE_UNSTAGE_VOLUME
    return Life(
        client,
        client,
        client.node_info().node_id,
        MOUNT,
        attaches=attaches in {each.rpc.type for each in control.capabilities},
        stages=stages in {each.rpc.type for each in node.capabilities},
    )
