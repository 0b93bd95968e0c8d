# SPDX-License-Identifier: Apache-2.0
"""What a pod's I/O costs: fio(1) on published volumes beside a preallocated file of the pool's filesystem.

Every place is written once before it is measured: the first write of a block also allocates it. The places take turns,
in each round in the other direction, because a machine's pace changes within seconds.
"""

from __future__ import annotations

import json
import os
import shutil
import statistics
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from csi_driver.model import Capability
from tests.bench.life import BLOCK, EXT4, XFS, life_on, new_volumes
from tests.bench.report import Report
from tests.bench.stack import Stack

SIZE_BYTES = 512 << 20
"""Part of each place that is measured: it fits into every filesystem of a 1 GiB volume."""

FILE = "file of the pool's filesystem"

WORKLOADS: Mapping[str, tuple[str, ...]] = {
    "write 1 MiB, depth 16": ("--rw=write", "--bs=1m", "--iodepth=16"),
    "read 1 MiB, depth 16": ("--rw=read", "--bs=1m", "--iodepth=16"),
    "random read 4 KiB, depth 1": ("--rw=randread", "--bs=4k", "--iodepth=1"),
    "random write 4 KiB, depth 1": ("--rw=randwrite", "--bs=4k", "--iodepth=1"),
    "random read 4 KiB, depth 32": ("--rw=randread", "--bs=4k", "--iodepth=32"),
    "random write 4 KiB, depth 32": ("--rw=randwrite", "--bs=4k", "--iodepth=32"),
    "70 % read, 30 % write 4 KiB, depth 16": ("--rw=randrw", "--rwmixread=70", "--bs=4k", "--iodepth=16"),
    "write 4 KiB and fsync": ("--rw=randwrite", "--bs=4k", "--iodepth=1", "--fsync=1"),
}


class Result(NamedTuple):
    """Requests per second, and latencies of fsync where it is called, else of the reads, else of the writes.

    Latencies include the submission: a file's request is sent to the drive by the submitter, a volume's by the kernel.
    """

    per_s: float
    p10_us: float
    """Nine of ten requests take longer: it tells the cost of the way where other work disturbs the machine."""
    p50_us: float


def measure_data(
    stack: Stack, directory: Path, report: Report, rounds: int, seconds: int, drive: Path | None = None
) -> None:
    """Print rate and latency of each workload and place. A drive is only read."""
    if shutil.which("fio") is None:
        print("\nI/O of a pod: skipped, because there is no fio; install it, on Debian: apt-get install fio")
        return
    kinds: dict[str, Capability] = {"raw block volume": BLOCK, "ext4 volume": EXT4}
    if shutil.which("mkfs.xfs"):
        kinds["xfs volume"] = XFS
    lives = [life_on(stack, capability) for capability in kinds.values()]
    volumes = new_volumes(directory, "data", len(lives))
    places = {FILE: directory / "data-file"}
    with places[FILE].open("wb") as made:
        os.posix_fallocate(made.fileno(), 0, SIZE_BYTES)
    for name, life, volume in zip(kinds, lives, volumes, strict=True):
        for step in (life.create, life.attach, life.stage, life.publish):
            step(volume)
        places[name] = volume.target if life.capability is BLOCK else volume.target / "file"
    for place in places.values():
        fio(place, "--rw=write", "--bs=1m", "--iodepth=16", "--end_fsync=1")
    table = report.table("I/O of a pod (fio, direct)", ("", "per second", "p10 us", "p50 us", "rate / file"))
    timing = ("--time_based", f"--runtime={seconds}")
    for workload, arguments in WORKLOADS.items():
        only_reads = arguments[0].endswith("read")
        wanted = {**places, "drive": drive} if drive is not None and only_reads else places
        found = in_turn(wanted, rounds, (*arguments, *timing, *(("--readonly",) if only_reads else ())))
        for name, each in found.items():
            table.row(
                f"{workload}: {name}", round(each.per_s), each.p10_us, each.p50_us, each.per_s / found[FILE].per_s
            )
    for life, volume in zip(lives, volumes, strict=True):
        for step in (life.unpublish, life.unstage, life.detach, life.delete):
            step(volume)


def in_turn(places: Mapping[str, Path], rounds: int, arguments: Sequence[str]) -> dict[str, Result]:
    """Run fio on each place in turn; return the medians of the rounds."""
    found: dict[str, list[Result]] = {name: [] for name in places}
    for turn in range(rounds):
        for name, place in list(places.items())[:: -1 if turn % 2 else 1]:
            found[name].append(fio(place, *arguments))
    return {name: Result(*map(statistics.median, zip(*results, strict=True))) for name, results in found.items()}


def fio(place: Path, *arguments: str) -> Result:
    """Run fio with direct I/O on the first `SIZE_BYTES` of a file or device."""
    argv = ["fio", "--name=data", f"--filename={place}", f"--size={SIZE_BYTES}", "--direct=1", "--ioengine=libaio"]
    argv += ["--randrepeat=0", "--clat_percentiles=0", "--lat_percentiles=1", "--percentile_list=10:50"]
    argv += ["--output-format=json", *arguments]
    job = json.loads(subprocess.run(argv, check=True, capture_output=True, text=True).stdout)["jobs"][0]
    per_s = sum(job[kind]["iops"] for kind in ("read", "write"))
    timed = next(job[kind] for kind in ("sync", "read", "write") if job[kind]["total_ios"])
    percentiles = timed["lat_ns"]["percentile"]
    return Result(per_s, *(percentiles[f"{percent}.000000"] / 1000 for percent in (10, 50)))
