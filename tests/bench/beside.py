# SPDX-License-Identifier: Apache-2.0
"""The driver beside others that do the same, in alternating rounds: a shell script, and any other CSI driver."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from pathlib import Path

from csi_driver.model import AccessMode, Capability, MountAccess
from csi_driver.rpc.pb import csi_pb2 as pb
from tests.bench.aims import PACE
from tests.bench.life import EXT4, XFS, Life, Script, life_on, new_volumes
from tests.bench.measure import Timing, timed
from tests.bench.report import Report
from tests.bench.stack import Stack
from tests.client import CsiClient

MOUNT = Capability(MountAccess(), AccessMode.SINGLE_NODE_WRITER)
_Rounds = dict[str, list[Timing]]
COMPARED = ("CreateVolume", "NodePublishVolume", "DeleteVolume")


def paired_ratio(figure: Callable[[Timing], float], ours: Sequence[Timing], others: Sequence[Timing]) -> float:
    """Return the median over the rounds of one figure by that of the others in the same round."""
    return statistics.median(figure(each) / figure(other) for each, other in zip(ours, others, strict=True))


def median_rate(timings: Sequence[Timing]) -> float:
    return statistics.median(timing.per_second for timing in timings)


def median_ms(timings: Sequence[Timing]) -> float:
    return statistics.median(timing.median_ms for timing in timings)


def measure_life(stack: Stack, directory: Path, report: Report, fs: str, rounds: int) -> None:
    """Print stage, publish, unpublish and unstage of a blank volume, and the same work by a script."""
    columns = ("", "at once", "p50 ms", "per second", "time ratio", "rate ratio")
    table = report.table(f"Node part of a life with {fs}, beside a shell script", columns)
    life, script = life_on(stack, XFS if fs == "xfs" else EXT4), Script(stack, fs)
    for at_once, count in ((1, 10), (16, 48), (100, 100)):
        timings: dict[str, list[Timing]] = {"driver": [], "script": []}
        for turn in range(rounds):
            for name, on_node in (("driver", life.on_node), ("script", script.on_node)):
                volumes = life.attached(directory, f"{name}-{fs}-{at_once}-{turn}", count)
                timings[name].append(timed(on_node, volumes, at_once=at_once))
                life.remove(volumes)
        ratio = paired_ratio(lambda each: each.median_ms, timings["driver"], timings["script"])
        rate_ratio = paired_ratio(lambda each: each.per_second, timings["driver"], timings["script"])
        table.row("driver", at_once, median_ms(timings["driver"]), median_rate(timings["driver"]), ratio, rate_ratio)
        table.row("script", at_once, median_ms(timings["script"]), median_rate(timings["script"]))
        if fs == "ext4" and at_once == 1:
            report.figure(PACE, median_ms(timings["script"]))
            report.figure("life_ratio", ratio)
        elif fs == "ext4":
            report.figure(f"life_rate_ratio_{at_once}", rate_ratio)


def measure_peer(stack: Stack, directory: Path, report: Report, peer: Path, rounds: int) -> None:
    """Print CreateVolume, NodePublishVolume and DeleteVolume beside another CSI driver."""
    columns = ("", "at once", "p50 ms", "per second", "rate / peer's")
    table = report.table("Beside another driver", columns)
    with CsiClient(peer, timeout_s=300) as client:
        lives = (life_on(stack, MOUNT), _life_of_peer(client))
        for at_once, count in ((1, 40), (16, 96)):
            found: tuple[_Rounds, _Rounds] = ({call: [] for call in COMPARED}, {call: [] for call in COMPARED})
            for turn in range(rounds):
                for number, life in enumerate(lives):
                    volumes = new_volumes(directory, f"peer-{at_once}-{turn}-{number}", count)
                    for step in life.steps():
                        timing = timed(step.call, volumes, at_once=at_once)
                        if step.name in COMPARED:
                            found[number][step.name].append(timing)
            for call in COMPARED:
                ours, theirs = found[0][call], found[1][call]
                ratio = paired_ratio(lambda each: each.per_second, ours, theirs)
                table.row(call, at_once, median_ms(ours), median_rate(ours), ratio)
                table.row(f"  {client.plugin_name()}", at_once, median_ms(theirs), median_rate(theirs))
                if (call, at_once) == ("CreateVolume", 16):
                    report.figure("create_rate_ratio_16", ratio)


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
