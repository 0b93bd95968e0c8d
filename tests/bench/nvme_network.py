# SPDX-License-Identifier: Apache-2.0
"""Measure volumes over NVMe/TCP on one machine beside their files on another: `make bench-nvme` runs it.

Two emulated machines with a processor each and a network between them, with the driver's roles. Their clocks are this
machine's, so other work here disturbs each rate: both sides are measured in turns, and a figure is the median of the
rounds' ratios. Needs root and a network namespace of its own.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
from pathlib import Path

from tests.bench.nvme_drives import DEPTHS, PATTERNS, SIZE_MIB, fio_rates, fio_script, job_lines
from tests.bench.nvme_guest import RESULT
from tests.bench.report import Report
from tests.integration.rig import MIB, raw_block
from tests.vm.machines import Machine
from tests.vm.nvme_cluster import NvmeCluster

GROUPS = ("rate / file's on the other machine", "rate / file's on the other machine, slow drive")
SLOW = (4 * MIB, 100)
"""Bytes and requests per second of a drive that is slower than emulated processors and their network."""
_EXPORTED = "cat /sys/kernel/config/nvmet/subsystems/*/namespaces/1/device_path"


def measure_network(cluster: NvmeCluster, report: Report, rounds: int, runtime_s: float) -> None:
    """Compare a volume of the node with its file on the storage machine."""
    node = cluster.nodes[0]
    volume = cluster.volume(node, raw_block(), SIZE_MIB * MIB)
    cluster.up(volume)
    file = Path(cluster.storage.run(_EXPORTED).strip('"'))
    node.machine.run(f"dd if=/dev/zero of={volume.target} bs=1M count={SIZE_MIB} oflag=direct status=none")
    places = ((cluster.storage, file), (node.machine, volume.target))
    for group, limits in zip(GROUPS, ((0, 0), SLOW), strict=True):
        cluster.storage.limit_drive(*limits)
        _compare(report, group, places, rounds, runtime_s)


def _compare(
    report: Report, group: str, places: tuple[tuple[Machine, Path], ...], rounds: int, runtime_s: float
) -> None:
    options = (f"size={SIZE_MIB}m", "time_based", f"runtime={int(runtime_s * 1000)}ms")

    def rate(machine: Machine, place: Path, pattern: str, depth: int) -> float:
        [found] = fio_rates(machine.run(fio_script([job_lines(place, PATTERNS[pattern], depth)], *options)))
        return found

    (storage, _), (node, _) = places
    table = report.table(group, ("", "depth", "file per s", "median", "lowest", "highest"))
    for pattern, depth in ((pattern, depth) for pattern in PATTERNS for depth in DEPTHS):
        files, ratios = [], []
        for number in range(rounds):
            in_turn = places if number % 2 == 0 else places[::-1]
            per_s = {machine.name: rate(machine, place, pattern, depth) for machine, place in in_turn}
            files.append(per_s[storage.name])
            ratios.append(per_s[node.name] / per_s[storage.name])
        middle = statistics.median(ratios)
        table.row(pattern, depth, round(statistics.median(files)), middle, min(ratios), max(ratios))
        report.point("queue depth", f"{group}: {pattern}", depth, middle)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("guest", type=Path, help="the guest that tests/vm/build-guest made")
    parser.add_argument("--quick", action="store_true")
    options = parser.parse_args()
    report = Report()
    with tempfile.TemporaryDirectory(prefix="nvmesh-csi-bench-") as directory:
        cluster = NvmeCluster(options.guest, Path(directory), addresses=("10.8.0.1",), nodes=("node-a",))
        try:
            cluster.start()
            measure_network(cluster, report, *((1, 1.0) if options.quick else (3, 2.0)))
        except BaseException:
            print(cluster.logs())
            raise
        finally:
            cluster.close()
    print(RESULT + json.dumps(report.curves))


if __name__ == "__main__":
    main()
