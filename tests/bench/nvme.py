# SPDX-License-Identifier: Apache-2.0
"""Measure NVMe over TCP in emulated machines: `make bench-nvme`, or `python -m tests.bench.nvme --help`. Needs root.

`network` runs on two machines with the clock of this machine: its ratios are those of alternating rounds. All other
parts run in one machine whose clock counts instructions (`tests.bench.nvme_guest`).
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path

from tests.bench import history
from tests.bench.history import Curves, Machine
from tests.bench.nvme_guest import DEPTHS, DEVICES, FILE, PATTERNS, RESULT, fio_script, rates_of
from tests.bench.report import Report
from tests.vm.machines import Machine as Guest
from tests.vm.machines import Machines, set_up_networks

RUN = Path(__file__).parents[1] / "vm" / "run"
ADDRESS = "10.8.0.1"
LIMIT_S = 1800.0
COUNTED = Machine("an emulated processor, 1 ns an instruction", 1, 3, "6.12", "xfs")

GROUPS: Mapping[str, Sequence[str]] = {
    "data": ("rate / file's",),
    "writes": ("limited, rate / file's", "rate / that of a written file"),
    "scale": ("ms", "memory, MiB"),
    "storm": ("ms a volume",),
    "network": ("two machines, rate / file's",),
}
"""What the curves of a part show."""


def counted(part: str, directory: Path, *, quick: bool) -> Curves:
    """Run a part in the machine that counts instructions; return its curves."""
    command = f"python -B -m tests.bench.nvme_guest {part}{' --quick' if quick else ''}"
    environment = {**os.environ, "NVMESH_CSI_VM_COUNTED": "1", "NVMESH_CSI_VM_COMMAND": command}
    process = subprocess.Popen([RUN, directory], env=environment, stdout=subprocess.PIPE, text=True, errors="replace")
    assert process.stdout is not None
    found: Curves = {}
    for line in process.stdout:
        if line.startswith(RESULT):
            found = json.loads(line.removeprefix(RESULT))
        elif not line.startswith("["):
            print(line, end="", flush=True)
    if process.wait() != 0 or not found:
        raise SystemExit(f"the guest's {part} failed")
    return found


def network(directory: Path, *, quick: bool) -> Curves:
    """Compare a file on the storage machine with its export on another machine."""
    set_up_networks()
    with tempfile.TemporaryDirectory(dir=directory) as place:
        machines = Machines((directory / "guest").resolve(), Path(place) / "machines")
        try:
            storage, node = machines.add("storage", "1G"), machines.add("node")
            for each in (storage, node):
                each.start()
            storage.run(f"python -B -m tests.bench.nvme_guest export --address {ADDRESS}")
            node.run(f"python -B -m tests.bench.nvme_guest connect --address {ADDRESS}")
            return _network_curves(storage, node, 1 if quick else 2, 0.5 if quick else 0.8)
        finally:
            machines.close()


def _network_curves(storage: Guest, node: Guest, rounds: int, runtime_s: float) -> Curves:
    report, every, large = Report(), list(PATTERNS), list(PATTERNS)[:2]
    fast = {FILE: (storage, "/drive/file"), "loop": (storage, "/run/bench-loop"), "nvmet": (node, f"{DEVICES}/file")}
    slow = {FILE: (storage, "/nullb0-pool/file"), "nvmet": (node, f"{DEVICES}/limited")}
    _network_table(report, "queue depth, two machines", fast, every, rounds, runtime_s)
    _network_table(report, "queue depth, two machines, drive of 20 MB/s", slow, large, rounds, runtime_s * 2)
    return report.curves


def _network_table(
    report: Report,
    grows: str,
    places: Mapping[str, tuple[Guest, str]],
    patterns: Sequence[str],
    rounds: int,
    runtime_s: float,
) -> None:
    found: dict[str, list[list[float]]] = {name: [] for name in places}
    for turn in range(rounds):
        for name, (machine, place) in list(places.items())[:: -1 if turn % 2 else 1]:
            found[name].append(_rates(machine, place, patterns, runtime_s))
    medians = {name: [statistics.median(each) for each in zip(*runs, strict=True)] for name, runs in found.items()}
    others = [name for name in places if name != FILE]
    table = report.table(f"Rate / file's, by {grows}", ("", "depth", "file per s", *others))
    for number, (pattern, depth) in enumerate((pattern, depth) for pattern in patterns for depth in DEPTHS):
        ratios = [medians[name][number] / medians[FILE][number] for name in others]
        table.row(pattern, depth, round(medians[FILE][number]), *ratios)
        for name, ratio in zip(others, ratios, strict=True):
            report.point(grows, f"two machines, rate / file's: {pattern}, {name}", depth, ratio)


def _rates(machine: Guest, place: str, patterns: Sequence[str], runtime_s: float) -> list[float]:
    jobs = [(Path(place), pattern, depth) for pattern in patterns for depth in DEPTHS]
    return rates_of(machine.run(fio_script(jobs, runtime_s), limit_s=LIMIT_S))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("directory", type=Path, help="where tests/vm/build-guest made the guest")
    parser.add_argument("--only", action="append", choices=GROUPS, help="measure only this part; repeatable")
    parser.add_argument("--quick", action="store_true", help="small numbers: shows that it works")
    parser.add_argument("--record", action="store_true", help=f"append the curves to {history.HISTORY.name}")
    options = parser.parse_args()
    if options.record and options.quick:
        parser.error("--record needs a whole run: leave out --quick")
    for part in options.only or GROUPS:
        measure = network if part == "network" else partial(counted, part)
        curves = measure(options.directory.resolve(), quick=options.quick)
        if options.record:
            history.append(history.HISTORY, history.new_entry(COUNTED, {}, curves))
    return 0


if __name__ == "__main__":
    sys.exit(main())
