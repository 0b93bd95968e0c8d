# SPDX-License-Identifier: Apache-2.0
"""Measure a part of what NVMe/TCP costs, in a guest: `make bench-nvme` runs it there."""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable, Mapping
from pathlib import Path

from tests.bench.nvme_calls import measure_scale, measure_storm, measure_writes
from tests.bench.nvme_data import measure_data, measure_inline, measure_limited
from tests.bench.nvme_drives import shell
from tests.bench.report import Report
from tests.vm.nvme_rig import load_modules

RESULT = "result: "
"""The last line of a run begins so; JSON follows."""


PARTS: Mapping[str, Callable[[Report, bool], None]] = {
    "data": lambda report, quick: measure_data(report, 0.05 if quick else 0.1),
    "limited": lambda report, quick: measure_limited(report, 0.1 if quick else 2.0),
    "inline": lambda report, quick: measure_inline(report, 0.02 if quick else 0.2),
    "scale": lambda report, quick: measure_scale(report, (2, 4) if quick else (10, 30, 60)),
    "writes": lambda report, quick: measure_writes(report, 1 if quick else 8),
    "storm": lambda report, quick: measure_storm(report, *((6, 4) if quick else (100, 60))),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("part", choices=PARTS)
    parser.add_argument("--quick", action="store_true")
    options = parser.parse_args()
    load_modules()
    if not Path("/sys/kernel/config/nullb").exists():
        shell("modprobe null_blk nr_devices=0")
    report, begun = Report(), time.perf_counter()
    PARTS[options.part](report, options.quick)
    print(f"{options.part}: {time.perf_counter() - begun:.0f} s of the guest's clock")
    print(RESULT + json.dumps(report.curves))


if __name__ == "__main__":
    main()
