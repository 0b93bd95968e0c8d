# SPDX-License-Identifier: Apache-2.0
"""What NVMe/TCP costs in the data path, measured in a guest: rates of exports beside the file below."""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from pathlib import Path

from tests.bench.measure import MIB
from tests.bench.nvme_drives import (
    DEPTHS,
    PATTERNS,
    Exports,
    Pattern,
    drive,
    free_kib,
    loop_over,
    pool_on,
    rates,
    shell,
    written,
)
from tests.bench.report import Report

FILE = "file"
LIMITED = {"completion_nsec": 5_000_000, "hw_queue_depth": 8, "max_sectors": 256}
"""A drive that is slower than the processor: 8 requests at once take 5 ms, and have 128 KiB at most.

null_blk's own limit of bandwidth (mbps) is no choice: this measurement did not come to its end with it.
"""


def measure_data(report: Report, runtime_s: float) -> None:
    """Compare loop devices and exports with the file below, at depth 1 and 32."""
    pool, raw, other = pool_on(drive("nullb0", 700)), drive("nullb1", 200), drive("nullb2", 200)
    thick = Path("/dev/mapper/bench-thick")
    shell(f"dmsetup create {thick.name} --table '0 {150 * MIB // 512} linear {other} 2048'")
    exports = Exports()
    places = {
        FILE: written(pool / "file"),
        "drive": written(raw),
        "loop": loop_over(written(pool / "loop")),
        "nvmet, file": exports.connected("file", written(pool / "nvmet"), 1),
        "nvmet, drive": exports.connected("drive", raw, 2, block_bytes=512),
        "nvmet, LVM": exports.connected("lvm", written(thick), 3, block_bytes=512),
    }
    _compare(report, "rate / file's", places, PATTERNS, runtime_s)


def measure_limited(report: Report, runtime_s: float) -> None:
    """Compare them where the drive is the limit and not the processor."""
    pool = pool_on(drive("nullb0", 700, **LIMITED))
    places = {
        FILE: written(pool / "file"),
        "loop": loop_over(written(pool / "loop")),
        "nvmet": Exports().connected("file", written(pool / "nvmet"), 1),
    }
    _compare(report, "rate / file's on a slow drive", places, PATTERNS, runtime_s)


def _compare(
    report: Report,
    group: str,
    places: Mapping[str, Path],
    patterns: Mapping[str, Pattern],
    runtime_s: float,
) -> None:
    first, *others = places
    table = report.table(group, ("", "depth", f"{first} per s", *others))
    wanted = [(name, depth) for name in patterns for depth in DEPTHS]
    jobs = [(place, patterns[name], depth) for name, depth in wanted for place in places.values()]
    found = iter(rates(jobs, runtime_s))
    for name, depth in wanted:
        per_s = {place: next(found) for place in places}
        table.row(name, depth, round(per_s[first]), *(per_s[other] / per_s[first] for other in others))
        for other in others:
            report.point("queue depth", f"{group}: {name}, {other}", depth, per_s[other] / per_s[first])


# --- data in the command ---------------------------------------------------------------------------------------------


def measure_inline(report: Report, runtime_s: float) -> None:
    """Compare exports whose commands carry up to 64 KiB of data with those of the kernel's default, 16 KiB."""
    pool, exports = pool_on(drive("nullb0", 700)), Exports()
    numbers = itertools.count(1)
    places = {
        f"{kib} KiB a command": exports.connected(f"{kib}", written(pool / f"{kib}"), next(numbers), inline_kib=kib)
        for kib in (16, 64)
    }
    patterns = {f"random write {kib} KiB": Pattern("randwrite", f"{kib}k") for kib in (4, 16, 32, 64)}
    _compare(report, "rate / 16 KiB's", places, patterns, runtime_s)
    for kib in (16, 64) * 3:
        more = [(pool / f"more-{number}", number) for number in itertools.islice(numbers, 8)]
        for file, _ in more:
            shell(f"truncate -s 64M {file}")
        before_kib = free_kib()
        for file, number in more:
            exports.connected(file.name, file, number, inline_kib=kib)
        print(f"{kib} KiB: {(before_kib - free_kib()) / len(more):.0f} KiB of memory for each volume", flush=True)
