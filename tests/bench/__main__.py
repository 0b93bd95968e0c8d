# SPDX-License-Identifier: Apache-2.0
"""Measure the driver on this machine: `make bench`, or `python -m tests.bench --help`. Needs root.

Starts `nvmesh-csi local` in a directory of its own, calls it over its Unix sockets, prints tables, and leaves
nothing behind. Figures are of the whole way: client, gRPC, driver, storage manager, kernel, all on this machine.
"""

from __future__ import annotations

import argparse
import shutil
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from tests.bench import history
from tests.bench.aims import compare
from tests.bench.beside import measure_life, measure_peer
from tests.bench.calls import measure_calls, measure_list, measure_mounts, measure_readers
from tests.bench.data import measure_data
from tests.bench.memory import measure_memory, measure_start
from tests.bench.probe import measure_probe
from tests.bench.rate import measure_create_rate
from tests.bench.report import Report, print_comparison
from tests.bench.scale import measure_scale
from tests.bench.scan import measure_scan
from tests.bench.snapshots import measure_snapshot_scale, measure_snapshots
from tests.bench.stack import Stack, release, running_stack
from tests.bench.storm import measure_storm


@dataclass(frozen=True, slots=True)
class Run:
    """A run of the benchmark."""

    directory: Path
    report: Report
    quick: bool
    peer: Path | None
    drive: Path | None


ALONE: dict[str, Callable[[Run], None]] = {
    "start": lambda run: measure_start(run.directory, run.report, 2 if run.quick else 7),
    "rate": lambda run: measure_create_rate(
        run.directory, run.report, {1: 4, 16: 32} if run.quick else {1: 40, 16: 320, 100: 800}, (1, 2)
    ),
    "scale": lambda run: measure_scale(
        run.directory, run.report, *((3, (100, 10, 10)) if run.quick else (20, (10_000, 500, 2000)))
    ),
    "scan": lambda run: measure_scan(run.directory, run.report, (64 << 20) if run.quick else (4 << 30)),
    "snapshots": lambda run: measure_snapshots(
        run.directory, run.report, *((1, (1, 100), 64) if run.quick else (3, (1, 1000, 10_000, 50_000, 100_000), 2048))
    ),
    "snapshot-scale": lambda run: measure_snapshot_scale(
        run.directory, run.report, *((20, 50, 10) if run.quick else (512, 5000, 100))
    ),
}
"""The parts that start what they need."""

CURVES = ("scale", "snapshots")
"""The parts whose curves are recorded alone."""

ON_STACK: dict[str, Callable[[Stack, Run], None]] = {
    "memory": lambda stack, run: measure_memory(
        stack, run.directory, run.report, *((16, 300, 1.0) if run.quick else (100, 10_000, 30.0))
    ),
    "life": lambda stack, run: measure_life(stack, run.directory, run.report, "ext4", 1 if run.quick else 3),
    "calls": lambda stack, run: measure_calls(
        stack, run.directory, run.report, {1: 4, 16: 16} if run.quick else {1: 40, 16: 160, 100: 300}
    ),
    "readers": lambda stack, run: measure_readers(stack, run.directory, run.report, 2 if run.quick else 10),
    "peer": lambda stack, run: (
        measure_peer(stack, run.directory, run.report, run.peer, 1 if run.quick else 3) if run.peer else None
    ),
    "mounts": lambda stack, run: measure_mounts(
        stack, run.directory, run.report, *(((10, 100), 20) if run.quick else ((10, 2000), 100))
    ),
    "probe": lambda stack, run: measure_probe(
        stack, run.directory, run.report, *((10, 20) if run.quick else (100, 600))
    ),
    "storm": lambda stack, run: measure_storm(
        stack, run.directory, run.report, *((20, 50) if run.quick else (300, 1000))
    ),
    "xfs": lambda stack, run: measure_life(stack, run.directory, run.report, "xfs", 1 if run.quick else 2),
    "data": lambda stack, run: measure_data(
        stack, run.directory, run.report, *((1, 1) if run.quick else (5, 3)), run.drive
    ),
    "list": lambda stack, run: measure_list(stack, run.report, 200 if run.quick else 10_000),
}
"""The parts that share one running stack, in this order: memory needs a new one, and the list fills it."""


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="small numbers: shows that it works, not how fast it is")
    parser.add_argument(
        "--only",
        action="append",
        choices=(*ALONE, *ON_STACK),
        help="measure only this part; repeatable (default: all but scale, snapshot-scale and data)",
    )
    parser.add_argument("--peer", help="unix:///PATH of another CSI driver, measured beside this one")
    parser.add_argument("--directory", default="/tmp", help="where pool and state lie, e.g. on a drive of its own")
    parser.add_argument("--drive", type=Path, help="drive below the pool, read beside the volumes by --only data")
    parser.add_argument("--record", action="store_true", help=f"append the figures to {history.HISTORY.name}")
    parser.add_argument("--strict", action="store_true", help="exit status 1 when a figure is worse than recorded")
    options = parser.parse_args()
    if options.record and (options.quick or options.only not in (None, *([part] for part in CURVES))):
        parser.error(f"--record needs a whole run, or --only {' or '.join(CURVES)}: leave out --quick and other parts")
    directory = Path(tempfile.mkdtemp(prefix="csi-bench-", dir=options.directory))
    peer = Path(options.peer.removeprefix("unix://")) if options.peer else None
    run = Run(directory, Report(), options.quick, peer, options.drive)
    machine = history.this_machine(directory)
    print(f"Machine: {machine}")
    try:
        measure(run, set(options.only or (ALONE.keys() | ON_STACK.keys()) - {"scale", "snapshot-scale", "data"}))
    finally:
        release(directory)
        shutil.rmtree(directory)
    figures = run.report.figures
    entry = history.new_entry(machine, {} if options.only else figures, run.report.curves)
    before = history.latest_figures(history.read(history.HISTORY), machine)
    are_worse = print_comparison(list(compare(figures, before)))
    if options.record:
        history.append(history.HISTORY, entry)
    return 1 if options.strict and are_worse else 0


def measure(run: Run, wanted: set[str]) -> None:
    """Run the wanted parts."""
    for name, part in ALONE.items():
        if name in wanted:
            part(run)
    if wanted & ON_STACK.keys():
        with running_stack(run.directory) as stack:
            for name, on_stack in ON_STACK.items():
                if name in wanted:
                    on_stack(stack, run)


if __name__ == "__main__":
    raise SystemExit(main())
