# SPDX-License-Identifier: Apache-2.0
"""Measure the processor time of both machines for a volume over NVMe/TCP: `make bench-nvme` runs it.

Two emulated machines with a processor each and a network between them, with the driver's roles. The rates of such
machines depend on other work on this machine; the time that their processors work hardly does. It is that of the thread
that emulates the processor, without that of starting fio. Needs root and a network namespace of its own.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
from dataclasses import dataclass
from pathlib import Path

from tests.bench.nvme_drives import DEPTHS, PATTERNS, SIZE_MIB, Pattern, fio_script, job_lines
from tests.bench.nvme_guest import RESULT
from tests.bench.report import Report
from tests.integration.rig import MIB, raw_block
from tests.vm.machines import Machine
from tests.vm.nvme_cluster import NvmeCluster

GROUP = "the node's share"
FEW = 8
_EXPORTED = "cat /sys/kernel/config/nvmet/subsystems/*/namespaces/1/device_path"


def measure_network(cluster: NvmeCluster, report: Report, rounds: int, scale: int) -> None:
    """Tell what a request to a volume of the node takes in both machines, and one to its file."""
    node, storage = cluster.nodes[0].machine, cluster.storage
    volume = cluster.volume(cluster.nodes[0], raw_block(), SIZE_MIB * MIB)
    cluster.attach(volume)
    cluster.retried(lambda: cluster.mount(volume))  # a starved machine may not connect at the first attempt
    file = Path(storage.run(_EXPORTED).strip('"'))
    node.run(f"dd if=/dev/zero of={volume.target} bs=1M count={SIZE_MIB} oflag=direct status=none")
    for role in (cluster.manager, cluster.nodes[0].service):
        assert role is not None
        role.close()  # the kernels go on without them
    of_file, of_volume = Side(storage, file, (storage,), 20), Side(node, volume.target, (storage, node), 1)
    for side in (of_file, of_volume):
        side.used_s(PATTERNS["read 1 MiB"], 1, FEW)  # the first run reads fio from its disk
    columns = ("", "depth", "file us", "storage us", "node us", "node's share", "lowest", "highest")
    table = report.table("Processor time of a request", columns)
    for name, pattern in PATTERNS.items():
        for depth in DEPTHS:
            count = scale * (1 if pattern.size == "1m" else 8)
            found = [
                (*of_file.each_s(pattern, depth, count), *of_volume.each_s(pattern, depth, count))
                for _ in range(rounds)
            ]
            shares = [at_node / (at_storage + at_node) for _, at_storage, at_node in found]
            middle = statistics.median(shares)
            times_us = (statistics.median(each) * 1e6 for each in zip(*found, strict=True))
            table.row(name, depth, *times_us, middle, min(shares), max(shares))
            report.point("queue depth", f"{GROUP}: {name}", depth, middle)


@dataclass(frozen=True, slots=True)
class Side:
    """A place that fio uses in a machine, and the machines that work for it. `more`: so often it repeats requests."""

    runs_on: Machine
    place: Path
    measured: tuple[Machine, ...]
    more: int

    def each_s(self, pattern: Pattern, depth: int, count: int) -> list[float]:
        """Return the processor time of one request in each measured machine."""
        few, many = (self.used_s(pattern, depth, requests) for requests in (FEW, FEW + count * self.more))
        return [(more - less) / (count * self.more) for less, more in zip(few, many, strict=True)]

    def used_s(self, pattern: Pattern, depth: int, requests: int) -> list[float]:
        """Return the processor time of a run of fio."""
        threads = min(depth, 8) if pattern.flushes else 1
        size_kib = requests // threads * (1024 if pattern.size == "1m" else 4)
        lines = [*job_lines(self.place, pattern, depth), f"size={SIZE_MIB}m", f"io_size={size_kib}k"]
        before = [machine.processor_s() for machine in self.measured]
        self.runs_on.run(fio_script([lines]))
        return [machine.processor_s() - begin for machine, begin in zip(self.measured, before, strict=True)]


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
            measure_network(cluster, report, *((1, 16) if options.quick else (2, 128)))
        except BaseException:
            print(cluster.logs())
            raise
        finally:
            cluster.close()
    print(RESULT + json.dumps(report.curves))


if __name__ == "__main__":
    main()
