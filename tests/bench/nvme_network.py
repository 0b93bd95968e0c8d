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
from pathlib import Path

from tests.bench.nvme_drives import DEPTHS, PATTERNS, SIZE_MIB, Pattern, fio_script, job_lines
from tests.bench.nvme_guest import RESULT
from tests.bench.report import Report
from tests.integration.rig import MIB, raw_block
from tests.vm.machines import Machine
from tests.vm.nvme_cluster import NvmeCluster

GROUP = "processor time / file's"
FEW = 8
_EXPORTED = "cat /sys/kernel/config/nvmet/subsystems/*/namespaces/1/device_path"


def measure_network(cluster: NvmeCluster, report: Report, rounds: int, mib: int, blocks: int) -> None:
    """Compare a request to a volume of the node with one to its file on the storage machine."""
    node, storage = cluster.nodes[0].machine, cluster.storage
    volume = cluster.volume(cluster.nodes[0], raw_block(), SIZE_MIB * MIB)
    cluster.attach(volume)
    cluster.retried(lambda: cluster.mount(volume))  # a starved machine may not connect at the first attempt
    file = Path(storage.run(_EXPORTED).strip('"'))
    node.run(f"dd if=/dev/zero of={volume.target} bs=1M count={SIZE_MIB} oflag=direct status=none")
    for role in (cluster.manager, cluster.nodes[0].service):
        assert role is not None
        role.close()  # the kernels go on without them
    places = {"file": (storage, file, (storage,)), "volume": (node, volume.target, (storage, node))}
    for runs_on, place, measured in places.values():  # the first run reads fio from its disk
        _each_s(runs_on, place, measured, PATTERNS["read 1 MiB"], 1, FEW)
    table = report.table(GROUP, ("", "depth", "file us", "storage", "node", "lowest", "highest"))
    for name, pattern in PATTERNS.items():
        for depth in DEPTHS:
            count, found = mib if pattern.size == "1m" else blocks, []
            for _ in range(rounds):
                [file_s] = _each_s(*places["file"], pattern, depth, count)
                found.append((file_s, *(each / file_s for each in _each_s(*places["volume"], pattern, depth, count))))
            file_s, at_storage, at_node = (statistics.median(each) for each in zip(*found, strict=True))
            sums = [at_storage + at_node for _, at_storage, at_node in found]
            table.row(name, depth, file_s * 1e6, at_storage, at_node, min(sums), max(sums))
            for machine, value in (("storage machine", at_storage), ("node", at_node)):
                report.point("queue depth", f"{GROUP}: {name}, {machine}", depth, value)


def _each_s(
    runs_on: Machine, place: Path, measured: tuple[Machine, ...], pattern: Pattern, depth: int, count: int
) -> list[float]:
    """Return the processor time of one request in each measured machine."""

    def used_s(requests: int) -> list[float]:
        lines = [*job_lines(place, pattern, depth), f"size={SIZE_MIB}m", f"number_ios={requests}"]
        before = [machine.processor_s() for machine in measured]
        runs_on.run(fio_script([lines]))
        return [machine.processor_s() - begin for machine, begin in zip(measured, before, strict=True)]

    threads = min(depth, 8) if pattern.flushes else 1
    few, many = used_s(FEW), used_s(FEW + count // threads)
    return [(more - less) / (count // threads * threads) for less, more in zip(few, many, strict=True)]


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
            measure_network(cluster, report, *((1, 16, 256) if options.quick else (3, 64, 2048)))
        except BaseException:
            print(cluster.logs())
            raise
        finally:
            cluster.close()
    print(RESULT + json.dumps(report.curves))


if __name__ == "__main__":
    main()
