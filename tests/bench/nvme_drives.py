# SPDX-License-Identifier: Apache-2.0
"""Drives in memory, exports over NVMe/TCP and fio: what the measurements in a guest are made with.

The guest has one processor that takes 1 ns for each instruction, and skips idle time: its clock does not depend on the
machine below, and two runs differ by 1 to 2 %. Drives are null_blk devices in memory. Pod, host and target of a
connection share the processor, so these figures are the worst case of the CPU's part.
"""

from __future__ import annotations

import json
import subprocess
import uuid
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from csi_driver.deadline import Deadline
from csi_driver.host.connectors.loop import LoopDevices
from csi_driver.host.connectors.nvme import NvmeVolumes
from csi_driver.host.nvme_target import NvmeTarget
from csi_driver.nvme_model import ConnectedVolume, NvmeExport, TargetExport, host_nqn, subsystem_nqn
from tests.vm.nvme_rig import NODE

DRIVE_NS = 80_000
SIZE_MIB = 64
ADDRESS = "127.0.0.1"
DEVICES = Path("/run/bench/dev")
NVMET = Path("/sys/kernel/config/nvmet")
DEPTHS = (1, 32)


class Pattern(NamedTuple):
    """Requests of one kind and size, in the words of fio."""

    rw: str
    size: str
    flushes: bool = False


PATTERNS: Mapping[str, Pattern] = {
    "write 1 MiB": Pattern("write", "1m"),
    "read 1 MiB": Pattern("read", "1m"),
    "random read 4 KiB": Pattern("randread", "4k"),
    "random write 4 KiB": Pattern("randwrite", "4k"),
    "write 4 KiB and fdatasync": Pattern("randwrite", "4k", flushes=True),
}


def shell(script: str) -> str:
    """Run a script of our own; its failure ends the benchmark."""
    done = subprocess.run(["bash", "-c", script], capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise SystemExit(f"{script}: {done.stdout}{done.stderr}")
    return done.stdout.strip()


def drive(name: str, size_mib: int, **other: int) -> Path:
    """Make a drive in memory that answers after `DRIVE_NS`, or as other attributes of null_blk tell."""
    place = Path("/sys/kernel/config/nullb") / name
    place.mkdir()
    wanted = {"size": size_mib, "memory_backed": 1, "irqmode": 2, "completion_nsec": DRIVE_NS, "queue_mode": 2}
    wanted |= {"hw_queue_depth": 256, "submit_queues": 1, "discard": 1, **other, "power": 1}
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


def loop_over(file: Path) -> Path:
    device = LoopDevices().attach(file, None, label="bench", read_only=False)
    return Path(f"/dev/loop{device.number}")


class Exports:
    """Files and devices, exported to this machine and connected as the driver does it."""

    def __init__(self) -> None:
        self.target = NvmeTarget()
        self.volumes = NvmeVolumes(lambda: NODE, DEVICES, Path("/run/bench/nvme"))
        for half in (self.target, self.volumes):
            if reason := half.why_not():
                raise SystemExit(reason)

    def connected(
        self, name: str, file: Path, number: int, *, block_bytes: int = 4096, inline_kib: int | None = None
    ) -> Path:
        """Return the device of the connected export. `inline_kib`: the data that a command carries, at most."""
        volume, port = str(uuid.UUID(int=number)), 23000 + number
        nqn = subsystem_nqn(str(uuid.UUID(int=1 << 100)), volume, "1")
        self.target.apply(TargetExport(nqn, volume, file, port, (ADDRESS,), frozenset({host_nqn(NODE)})))
        if inline_kib is not None:
            _relink(NVMET / "ports" / str(port), nqn, inline_kib)
        offered = NvmeExport(nqn, (f"{ADDRESS}:{port}",), block_bytes)
        self.volumes.connect(ConnectedVolume(name, volume, offered), "bench", deadline=Deadline.after(60))
        return DEVICES / name


def _relink(port: Path, nqn: str, inline_kib: int) -> None:
    """Change a port that no host has connected to: the kernel refuses it while the port is linked."""
    link = port / "subsystems" / nqn
    link.unlink()
    (port / "param_inline_data_size").write_text(str(inline_kib << 10))
    link.symlink_to(NVMET / "subsystems" / nqn)


def free_kib() -> int:
    """Return free memory, without what only caches use."""
    shell("sync; echo 3 > /proc/sys/vm/drop_caches")
    fields = dict(line.split(":") for line in Path("/proc/meminfo").read_text().splitlines())
    return int(fields["MemFree"].split()[0])


# --- fio -------------------------------------------------------------------------------------------------------------


def job_lines(place: Path, pattern: Pattern, depth: int) -> list[str]:
    """Return one job of fio. A thread waits for each of its flushes: their depth is a number of threads, at most 8."""
    lines = [f"filename={place}", f"rw={pattern.rw}", f"bs={pattern.size}"]
    return [*lines, "fdatasync=1", f"numjobs={min(depth, 8)}"] if pattern.flushes else [*lines, f"iodepth={depth}"]


def fio_script(jobs: Sequence[Sequence[str]], *options: str) -> str:
    """Return a shell script that runs the jobs by one fio, one after another."""
    lines = ["[global]", "ioengine=libaio", "direct=1", "randrepeat=0", "thread", "group_reporting", *options]
    for number, job in enumerate(jobs):
        lines += [f"[job{number}]", "stonewall", *job]
    return "\n".join(("fio --output-format=json - <<END", *lines, "END"))


def fio_rates(output: str) -> list[float]:
    """Return the requests per second of each job."""
    found = json.loads(output[output.index("{") : output.rindex("}") + 1])["jobs"]
    return [sum(job[kind]["iops"] for kind in ("read", "write")) for job in found]


def rates(jobs: Sequence[tuple[Path, Pattern, int]], runtime_s: float) -> list[float]:
    """Return the requests per second of jobs on files that were written before."""
    lines = [job_lines(*job) for job in jobs]
    return fio_rates(shell(fio_script(lines, f"size={SIZE_MIB}m", "time_based", f"runtime={int(runtime_s * 1000)}ms")))
