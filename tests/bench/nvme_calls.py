# SPDX-License-Identifier: Apache-2.0
"""The driver's calls over NVMe/TCP, measured in a guest with the three roles: alone, with many volumes, and at once."""

from __future__ import annotations

import contextlib
import shutil
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from csi_driver.nvme_model import host_nqn
from tests.bench.life import BLOCK, Life, Volume, new_volumes
from tests.bench.measure import resident_mib, timed
from tests.bench.nvme_drives import PATTERNS, drive, fio_rates, fio_script, free_kib, job_lines, pool_on, shell
from tests.bench.report import Report, Table
from tests.vm.nvme_rig import NODE, NvmeRig, disconnect_all, exports

CALLS = (
    *("CreateVolume", "ControllerPublishVolume", "NodeStageVolume, raw block", "NodeUnstageVolume"),
    *("ControllerUnpublishVolume", "DeleteVolume"),
)


@contextlib.contextmanager
def running(directory: Path) -> Iterator[NvmeRig]:
    """Run the three roles; every volume reaches the node over NVMe/TCP."""
    rig = NvmeRig(
        directory,
        storage_flags=("--size", "10TiB", "--export-ports", "23000-23999", "--log-level", "warning"),
        controller_flags=("--log-level", "warning"),
        node_flags=("--log-level", "warning"),
    )
    rig.nvme_directory.mkdir(parents=True)
    try:
        rig.start()
        yield rig
    except BaseException:
        print(rig.logs())
        raise
    finally:
        rig.close()


def measure_scale(report: Report, counts: Sequence[int]) -> None:
    """Time each call alone with so many volumes connected, and what memory they take."""
    directory, grows = pool_on(drive("nullb0", 4096)) / "bench", "volumes connected"
    with running(directory) as rig:
        life = Life(rig.controller, rig.node, NODE, BLOCK)
        steps = (life.create, life.attach, life.stage, life.unstage, life.detach, life.delete)
        warm = new_volumes(directory, "warm", 2)
        for step in steps:
            timed(step, warm, at_once=1)
        present, first_kib = 0, free_kib()
        for count in counts:
            more = new_volumes(directory, f"many-{count}", count - present)
            for step in steps[:3]:
                timed(step, more, at_once=4)
            present = count
            points = {"memory, MiB: kernel, for each volume": (first_kib - free_kib()) / count / 1024}
            for role in ("storage", "controller", "node"):
                points[f"memory, MiB: {role}"] = resident_mib(rig.pid(role))
            one = new_volumes(directory, f"one-of-{count}", 6)
            for name, step in zip(CALLS, steps, strict=True):
                points[f"ms: {name}"] = timed(step, one, at_once=1).median_ms
            table = report.table(f"{count} {grows}", ("", "now"))
            for name, value in points.items():
                table.row(name, value)
                report.point(grows, name, count, value)


def measure_storm(report: Report, attached: int, staged: int) -> None:
    """Time calls that are made at once, divided by the same calls one after another. The first error ends it."""
    directory = pool_on(drive("nullb0", 4096)) / "bench"
    with running(directory) as rig:
        life = Life(rig.controller, rig.node, NODE, BLOCK)
        few, many = new_volumes(directory, "alone", 6), new_volumes(directory, "storm", attached)
        for volumes in (few, many):
            timed(life.create, volumes, at_once=4)
        table = report.table("Calls at once", ("", "calls", "alone ms", "ms", "ratio"))

        def compare(name: str, step: Callable[[Volume], None], volumes: Sequence[Volume], alone_ms: float) -> None:
            each_ms = timed(step, volumes, at_once=len(volumes)).wall_s / len(volumes) * 1000
            table.row(name, len(volumes), alone_ms, each_ms, each_ms / alone_ms)
            report.point("calls at once", f"time / alone: {name}", len(volumes), each_ms / alone_ms)

        timed(life.attach, few[:1], at_once=1)  # the first one starts threads
        compare("ControllerPublishVolume", life.attach, many, timed(life.attach, few[1:], at_once=1).median_ms)
        timed(life.stage, few[:1], at_once=1)
        alone_ms = timed(life.stage, few[1:], at_once=1).median_ms
        rig.kill("node")
        compare("NodeStageVolume, the node service has started", life.stage, many[:staged], alone_ms)
        rig.end_role("node")
        disconnect_all(host_nqn(NODE))
        for kept_in_memory in (rig.nvme_directory, directory / "dev"):
            shutil.rmtree(kept_in_memory)
        rig.nvme_directory.mkdir()
        rig.begin("node")
        rig.await_ready("node")
        compare("NodeStageVolume, the node has started", life.stage, many[:staged], alone_ms)


# --- first writes ----------------------------------------------------------------------------------------------------


def measure_writes(report: Report, mib: int) -> None:
    """Compare the first write of each block with a later one, with sparse and with preallocated volumes."""
    directory = pool_on(drive("nullb0", 8192)) / "bench"
    with running(directory) as rig:
        life = Life(rig.controller, rig.node, NODE, BLOCK)
        table = report.table("First / later write", ("", "depth", "later per s", "ratio"))
        for kind in ("sparse", "preallocated"):
            if kind == "preallocated":
                rig.argv["storage"] += ("--preallocate",)
                rig.kill("storage")
            volumes = new_volumes(directory, kind, 2)
            for step in (life.create, life.attach, life.stage, life.publish):
                timed(step, volumes, at_once=1)
            file = exports()[volumes[0].publish_context["nvme.nqn"]]
            for name, place in ((f"file, {kind}", file), (f"nvmet, {kind}", volumes[1].target)):
                _compare_first(report, table, name, place, mib)
            print(f"extents of a {kind} file: {shell(f'filefrag {file}')}")


def _compare_first(report: Report, table: Table, name: str, place: Path, mib: int) -> None:
    """Write parts of a volume twice. fio writes each block once."""
    wanted = (("random write 4 KiB", 1), ("random write 4 KiB", 32), ("write 4 KiB and fdatasync", 1))
    jobs = []
    for part, (pattern, depth) in enumerate(wanted):
        jobs += [[*job_lines(place, PATTERNS[pattern], depth), f"offset={part * 64}m"]] * 2
    found = fio_rates(shell(fio_script(jobs, f"size={mib}m", "fallocate=none")))
    for number, (pattern, depth) in enumerate(wanted):
        first, later = found[2 * number : 2 * number + 2]
        table.row(f"{pattern}, {name}", depth, round(later), first / later)
        report.point("queue depth", f"first / later write: {pattern}, {name}", depth, first / later)
