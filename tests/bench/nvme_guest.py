# SPDX-License-Identifier: Apache-2.0
"""What NVMe/TCP costs, measured in a guest: `make bench-nvme` runs it there.

The guest has one processor that takes 1 ns for each instruction, and skips idle time: its clock does not depend on the
machine below, and two runs differ by 1 to 2 %. Drives are null_blk devices in memory that answer after `DRIVE_NS`. Pod,
host and target of a connection share the processor, so these figures are the worst case of the CPU's part.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import subprocess
import time
import uuid
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from csi_driver.deadline import Deadline
from csi_driver.host.connectors.loop import LoopDevices
from csi_driver.host.connectors.nvme import NvmeVolumes
from csi_driver.host.nvme_target import NvmeTarget
from csi_driver.nvme_model import ConnectedVolume, NvmeExport, TargetExport, host_nqn, subsystem_nqn
from tests.bench.life import BLOCK, Life, new_volumes
from tests.bench.measure import MIB, resident_mib, timed
from tests.bench.report import Report
from tests.vm.nvme_rig import NODE, NvmeRig, load_modules

RESULT = "result: "
"""The last line of a run begins so; JSON follows."""
DRIVE_NS = 80_000
SIZE_MIB = 64
ADDRESS = "127.0.0.1"
DEVICES = Path("/run/bench/dev")
FILE = "file"
DEPTHS = (1, 32)
CALLS = (
    *("CreateVolume", "ControllerPublishVolume", "NodeStageVolume, raw block", "NodeUnstageVolume"),
    *("ControllerUnpublishVolume", "DeleteVolume"),
)
PATTERNS: Mapping[str, tuple[str, str]] = {
    "write 1 MiB": ("write", "1m"),
    "read 1 MiB": ("read", "1m"),
    "random read 4 KiB": ("randread", "4k"),
    "random write 4 KiB": ("randwrite", "4k"),
    "write 4 KiB and fdatasync": ("randwrite", "4k"),
}


def shell(script: str) -> str:
    """Run a script of our own; its failure ends the benchmark."""
    done = subprocess.run(["bash", "-c", script], capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise SystemExit(f"{script}: {done.stdout}{done.stderr}")
    return done.stdout.strip()


# --- drives and places -----------------------------------------------------------------------------------------------


def drive(name: str, size_mib: int) -> Path:
    """Make a drive in memory."""
    place = Path("/sys/kernel/config/nullb") / name
    place.mkdir()
    wanted = {"size": size_mib, "memory_backed": 1, "irqmode": 2, "completion_nsec": DRIVE_NS, "queue_mode": 2}
    wanted |= {"hw_queue_depth": 256, "submit_queues": 1, "discard": 1, "power": 1}
    for attribute, value in wanted.items():
        (place / attribute).write_text(str(value))
    return Path("/dev") / name


def pool_on(device: Path) -> Path:
    """Make a pool's filesystem on a drive and mount it."""
    place = Path(f"/{device.name}-pool")
    place.mkdir()
    shell(f"mkfs.xfs -q -f -m reflink=1 {device} && mount {device} {place}")
    return place


def written(place: Path) -> Path:
    """Write a file or device once."""
    shell(f"dd if=/dev/zero of={place} bs=1M count={SIZE_MIB} oflag=direct status=none")
    return place


class Exports:
    """Files and devices, exported to this machine and connected as the driver does it."""

    def __init__(self) -> None:
        self.target = NvmeTarget()
        self.volumes = NvmeVolumes(lambda: NODE, DEVICES, Path("/run/bench/nvme"))
        for half in (self.target, self.volumes):
            if reason := half.why_not():
                raise SystemExit(reason)

    def connected(self, name: str, file: Path, number: int, *, block_bytes: int = 4096) -> Path:
        """Return the device of the connected export."""
        volume, port = str(uuid.UUID(int=number)), 23000 + number
        nqn = subsystem_nqn(str(uuid.UUID(int=1 << 100)), volume, "1")
        self.target.apply(TargetExport(nqn, volume, file, port, (ADDRESS,), frozenset({host_nqn(NODE)})))
        offered = NvmeExport(nqn, (f"{ADDRESS}:{port}",), block_bytes)
        self.volumes.connect(ConnectedVolume(name, volume, offered), "bench", deadline=Deadline.after(60))
        return DEVICES / name


def loop_over(file: Path) -> Path:
    device = LoopDevices().attach(file, None, label="bench", read_only=False)
    return Path(f"/dev/loop{device.number}")


# --- data path -------------------------------------------------------------------------------------------------------


def rates(jobs: Sequence[tuple[Path, str, int]], runtime_s: float) -> list[float]:
    """Return the requests per second of jobs (place, name of the pattern, depth), run by one fio one after another."""
    lines = ["[global]", "ioengine=libaio", "direct=1", "randrepeat=0", "thread", "group_reporting"]
    lines += [f"size={SIZE_MIB}m", "time_based", f"runtime={int(runtime_s * 1000)}ms"]
    for number, (place, pattern, depth) in enumerate(jobs):
        kind, size = PATTERNS[pattern]
        lines += [f"[job{number}]", "stonewall", f"filename={place}", f"rw={kind}", f"bs={size}"]
        # A thread waits for each flush.
        lines += ["fdatasync=1", f"numjobs={min(depth, 8)}"] if pattern.endswith("fdatasync") else [f"iodepth={depth}"]
    output = shell("\n".join(("fio --output-format=json - <<END", *lines, "END")))
    found = json.loads(output[output.index("{") : output.rindex("}") + 1])["jobs"]
    return [sum(job[kind]["iops"] for kind in ("read", "write")) for job in found]


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
    others = [name for name in places if name != FILE]
    table = report.table("Rate / file's", ("", "depth", "file per s", *others))
    wanted = [(pattern, depth) for pattern in PATTERNS for depth in DEPTHS]
    found = iter(rates([(place, *each) for each in wanted for place in places.values()], runtime_s))
    for pattern, depth in wanted:
        per_s = {name: next(found) for name in places}
        table.row(pattern, depth, round(per_s[FILE]), *(per_s[name] / per_s[FILE] for name in others))
        for name in others:
            report.point("queue depth", f"rate / file's: {pattern}, {name}", depth, per_s[name] / per_s[FILE])


# --- scale -----------------------------------------------------------------------------------------------------------


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


def free_kib() -> int:
    """Return free memory, without what only caches use."""
    shell("sync; echo 3 > /proc/sys/vm/drop_caches")
    fields = dict(line.split(":") for line in Path("/proc/meminfo").read_text().splitlines())
    return int(fields["MemFree"].split()[0])


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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("part", choices=("data", "scale"))
    parser.add_argument("--quick", action="store_true")
    options = parser.parse_args()
    load_modules()
    if not Path("/sys/kernel/config/nullb").exists():
        shell("modprobe null_blk nr_devices=0")
    report, begun = Report(), time.perf_counter()
    if options.part == "data":
        measure_data(report, 0.05 if options.quick else 0.1)
    else:
        measure_scale(report, (2, 4) if options.quick else (10, 30, 60))
    print(f"{options.part}: {time.perf_counter() - begun:.0f} s of the guest's clock")
    print(RESULT + json.dumps(report.curves))


if __name__ == "__main__":
    main()
