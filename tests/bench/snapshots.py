# SPDX-License-Identifier: Apache-2.0
"""What snapshots and copies of volumes cost, on an xfs in a file of its own.

By extents and by size, beside cp(1) with and without reflinks on the same filesystem; how long a writer waits for a
cut, and what its writes cost afterwards; what many snapshots in one volume and in one pool cost.
"""

from __future__ import annotations

import itertools
import os
import statistics
import struct
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import requests

from csi_driver.model import GIB
from csi_driver.rpc.client import CallFailed
from csi_driver.rpc.pb import csi_pb2 as pb
from tests.bench.life import BLOCK
from tests.bench.measure import MIB, Timing, timed
from tests.bench.rate import controller_over
from tests.bench.report import Report
from tests.bench.stack import Stack, running_stack
from tests.client import CsiClient
from tests.reflink_pool import mounted

BLOCK_BYTES = 4096
POOL_MIB = 16 << 10
MOST_EXTENTS = 100_000
"""The manager refuses more."""
WRITING_S = 0.5
GROUPS = ("cut and copy, ms", "changed blocks, ms")
"""What a curve shows; its name is one of these, a colon and the series."""

WRITER = """
import mmap, os, random, struct, sys, time
device = os.open(sys.argv[1], os.O_RDWR | os.O_DIRECT)
stride, count = int(sys.argv[2]), int(sys.argv[3])
block = mmap.mmap(-1, 4096)
block.write(b"w" * 4096)
os.set_blocking(0, False)
while True:
    try:
        if not os.read(0, 1):
            break
    except BlockingIOError:
        pass
    begun = time.monotonic()
    os.pwrite(device, block, random.randrange(count) * stride)
    sys.stdout.buffer.write(struct.pack("=dd", begun, time.monotonic() - begun))
"""
"""Writes to random blocks that have data; tells begin and duration of each write. Ends with its input."""


@dataclass(frozen=True, slots=True)
class Data:
    """A volume's data: so many extents of `extent_bytes`, each but the last with a hole of a block behind it."""

    volume_bytes: int
    extents: int = 1
    extent_bytes: int = BLOCK_BYTES

    @property
    def stride(self) -> int:
        return self.extent_bytes + BLOCK_BYTES

    def places(self) -> tuple[str, str]:
        """Return the distance and the number of the blocks that a writer writes to: all have data."""
        if self.extents == 1:
            return str(BLOCK_BYTES), str(self.extent_bytes // BLOCK_BYTES)
        return str(self.stride), str(self.extents)

    def write(self, file: Path) -> None:
        """Write it to the file of a volume that is not attached."""
        content = os.urandom(min(self.extent_bytes, MIB))
        with file.open("r+b", buffering=0) as opened:
            for number in range(self.extents):
                for offset in range(0, self.extent_bytes, len(content)):
                    os.pwrite(opened.fileno(), content, number * self.stride + offset)
            os.fsync(opened.fileno())


@dataclass
class Manager:
    """The storage manager's own API: the driver's part is what a call takes longer."""

    stack: Stack
    session: requests.Session = field(default_factory=requests.Session)
    url: str = ""

    def log_in(self) -> None:
        words = Path(f"/proc/{self.stack.pid('controller')}/cmdline").read_bytes().decode().split("\0")
        self.url = next(word for word in words if word.startswith("http://"))
        password = (self.stack.directory / "pool" / "password").read_text().strip()
        self.session.headers["Accept"] = "application/json"
        self._post("/login", {"username": "admin@nvidia.com", "password": password})

    def _post(self, path: str, body: object) -> Any:
        answer = self.session.post(self.url + path, json=body, timeout=300)
        answer.raise_for_status()
        return answer.json()

    def cut(self, name: str, volume_id: str) -> str:
        """Cut a volume; return the snapshot's id in CSI."""
        zone, volume, uuid = volume_id.split(":")[:3]
        (answer,) = self._post("/snapshots/save", [{"name": name, "volume": {"_id": volume, "uuid": uuid}}])
        if not answer["success"]:
            raise SystemExit(f"the storage manager refused a cut: {answer['error']}")
        return f"{zone}:{name}:{answer['payload']['snapshot']['uuid']}"


@dataclass
class Bench:
    """A stack on the filesystem, and what is measured on it."""

    stack: Stack
    place: Path
    report: Report
    rounds: int
    manager: Manager
    _names: Iterator[int] = field(default_factory=itertools.count)

    def name(self, kind: str) -> str:
        return f"{kind}-{next(self._names)}"

    def volume(self, data: Data) -> str:
        """Create a volume with this data; return its id."""
        made = self.stack.controller.create_volume(
            self.name("volume"), required_bytes=data.volume_bytes, capabilities=[BLOCK]
        )
        data.write(self.file(made.volume_id))
        return made.volume_id

    def file(self, volume_id: str) -> Path:
        return self.stack.directory / "pool" / "volumes" / f"{volume_id.split(':')[2]}.img"

    def median_ms(self, call: Callable[[], object], undo: Callable[[], object], rounds: int) -> float:
        """Return the median time of a call; each is undone, outside of the time."""
        found = []
        for _ in range(rounds):
            begun = time.monotonic()
            call()
            found.append((time.monotonic() - begun) * 1000)
            undo()
        return statistics.median(found)

    def costs(self, volume_id: str, rounds: int) -> dict[str, float]:
        """Return the times of a cut and of a copy of a snapshot, by the driver, by its manager and by cp."""
        controller, file, made = self.stack.controller, self.file(volume_id), self.place / "copy"
        size_bytes, ids = file.stat().st_size, list[str]()

        def cp(*flags: str) -> None:
            subprocess.run(["cp", *flags, file, made], check=True)

        def cut() -> None:
            ids.append(controller.cut(self.name("cut"), volume_id).snapshot_id)

        def uncut() -> None:
            controller.delete_snapshot(ids.pop())

        def cut_by_manager() -> None:
            ids.append(self.manager.cut(f"snap-{next(self._names)}", volume_id))

        def clone() -> None:
            made = controller.create_volume(
                self.name("clone"), required_bytes=size_bytes, capabilities=[BLOCK], snapshot=ids[0]
            )
            ids.append(made.volume_id)

        found = {
            "cp --reflink=always": self.median_ms(lambda: cp("--reflink=always"), made.unlink, rounds),
            "CreateSnapshot": self.median_ms(cut, uncut, rounds),
            "the manager's part of it": self.median_ms(cut_by_manager, uncut, rounds),
        }
        cut()
        delete = controller.delete_volume
        found["CreateVolume from a snapshot"] = self.median_ms(clone, lambda: delete(ids.pop()), rounds)
        uncut()
        found["full copy, cp"] = self.median_ms(lambda: cp("--sparse=auto", "--reflink=never"), made.unlink, 1)
        return found


def measure_snapshots(directory: Path, report: Report, rounds: int, extents: tuple[int, ...], sizes_mib: int) -> None:
    """Print the costs by extents and by size (`sizes_mib`: the most data), and a writer's pause."""
    own = directory / "snapshots"
    own.mkdir()
    with mounted(own, size_mib=POOL_MIB) as place, running_stack(place) as stack:
        bench = Bench(stack, place, report, rounds, Manager(stack))
        bench.manager.log_in()
        _by_extents(bench, extents)
        _by_size(bench, sizes_mib)
        _by_writers(bench)


def _by_extents(bench: Bench, counts: tuple[int, ...]) -> None:
    grows, report = "extents of the volume", bench.report
    found: dict[int, dict[str, float]] = {}
    for count in counts:
        data = Data(GIB, count)
        volume_id, rounds = bench.volume(data), bench.rounds if count <= 1000 else 1
        points = {f"{GROUPS[0]}: {name}": value for name, value in bench.costs(volume_id, rounds).items()}
        base = bench.stack.controller.cut(bench.name("base"), volume_id).snapshot_id
        writes, target = _writes(bench, volume_id, data)
        points[f"{GROUPS[0]}: longest write during a cut"] = max(writes.during) * 1000
        points |= _changes(bench, base, target)
        for name, value in points.items():
            report.point(grows, name, count, value)
        found[count] = points
        for each in (base, target):
            bench.stack.controller.delete_snapshot(each)
        bench.stack.controller.delete_volume(volume_id)
    report.figure("cut_ms", found[counts[0]][f"{GROUPS[0]}: CreateSnapshot"])
    if counts[-1] == MOST_EXTENTS:
        cut, cp = (found[counts[-1]][f"{GROUPS[0]}: {name}"] for name in ("CreateSnapshot", "cp --reflink=always"))
        report.figure("cut_ratio", cut / cp)
    _print_curves(report, grows, counts)


def _changes(bench: Bench, base: str, target: str) -> dict[str, float]:
    """Return the time to tell all data of a snapshot, and what was written since another; {} where it is not told."""
    client, rounds = bench.stack.controller, bench.rounds
    try:
        if not client.changed(base, target):
            raise SystemExit("blocks were written, and none is told as changed")
    except CallFailed as failure:
        if failure.code != "UNIMPLEMENTED":
            raise
        return {}
    return {
        f"{GROUPS[1]}: GetMetadataAllocated": bench.median_ms(lambda: client.allocated(target), lambda: None, rounds),
        f"{GROUPS[1]}: GetMetadataDelta": bench.median_ms(lambda: client.changed(base, target), lambda: None, rounds),
    }


@dataclass(frozen=True, slots=True)
class Writes:
    """Durations of the writes that ended before a cut began, that waited for it, and that began after it."""

    before: Sequence[float]
    during: Sequence[float]
    after: Sequence[float]


def _writes(bench: Bench, volume_id: str, data: Data) -> tuple[Writes, str]:
    """Write to a volume all the time and cut it; return the writes and the snapshot's id."""
    controller, stack, told = bench.stack.controller, bench.stack, bench.place / "writes"
    controller.attach(volume_id, stack.node_id, BLOCK)
    argv = [sys.executable, "-c", WRITER, str(stack.device(volume_id)), *data.places()]
    with told.open("wb") as output, subprocess.Popen(argv, stdin=subprocess.PIPE, stdout=output) as writer:
        time.sleep(WRITING_S)
        begun = time.monotonic()
        cut = controller.cut(bench.name("pause"), volume_id).snapshot_id
        ended = time.monotonic()
        time.sleep(WRITING_S)
        writer.communicate()
    controller.detach(volume_id, stack.node_id)
    writes = list(struct.iter_unpack("=dd", told.read_bytes()))
    before = [took for at, took in writes if at + took < begun]
    during = [took for at, took in writes if at + took >= begun and at < ended]
    after = [took for at, took in writes if at >= ended]
    return Writes(before, during, after), cut


def _by_writers(bench: Bench) -> None:
    """Print the writes of 4 KiB to 256 MiB in one extent, which each write after a cut splits."""
    data = Data(GIB, 1, 256 * MIB)
    volume_id = bench.volume(data)
    writes, cut = _writes(bench, volume_id, data)
    table = bench.report.table("Writes of 4 KiB to 256 MiB", ("", "writes", "p50 us", "p99 us", "longest ms"))
    for name, each in (("before a cut", writes.before), ("during it", writes.during), ("after it", writes.after)):
        timing = Timing(tuple(each), 0.0)
        us = timing.median_ms * 1000, timing.percentile_ms(99) * 1000
        table.row(name, timing.calls, *us, max(each) * 1000)
    bench.stack.controller.delete_snapshot(cut)
    bench.stack.controller.delete_volume(volume_id)


def _by_size(bench: Bench, most_mib: int) -> None:
    for grows, sizes in (
        ("GiB of a volume with 64 KiB of data", {size: Data(size * GIB, 16) for size in (1, 16, 256)}),
        (
            "MiB of data, all written",
            {mib: Data(4 * GIB, 1, mib * MIB) for mib in (64, 512, 2048) if mib <= most_mib},
        ),
    ):
        for size, data in sizes.items():
            volume_id = bench.volume(data)
            for name, value in bench.costs(volume_id, bench.rounds).items():
                bench.report.point(grows, f"{GROUPS[0]}: {name}", size, value)
            bench.stack.controller.delete_volume(volume_id)
        _print_curves(bench.report, grows, tuple(sizes))


def _print_curves(report: Report, grows: str, counts: tuple[int, ...]) -> None:
    table = report.table(f"Snapshots by {grows}", ("", *(f"{count:,}" for count in counts)))
    for name, points in report.curves[grows].items():
        table.row(name, *(float(value) for _, value in points))


def measure_snapshot_scale(directory: Path, report: Report, of_one: int, in_pool: int, at_once: int) -> None:
    """Print what many snapshots cost: of one volume, in one pool, cut at once and copied at once."""
    own = directory / "snapshot-scale"
    own.mkdir()
    columns = ("", "calls", "at once", "p50 ms", "p99 ms", "per second", "requests", "flushes")
    with mounted(own, size_mib=POOL_MIB) as place, controller_over(place / "d", 1, 0.0) as (controller, (server,)):
        table = report.table(
            "Many snapshots: requests to the manager and flushes of the pool's drive per call", columns
        )

        def row(name: str, call: Callable[[int], object], count: int, at_once: int) -> None:
            server.reset()
            before = flushes(place)
            timing = timed(call, range(count), at_once=at_once)
            each = server.requests / count, (flushes(place) - before) / count
            table.row(name, count, at_once, timing.median_ms, timing.percentile_ms(99), timing.per_second, *each)

        pool = Path(next(place.rglob("volumes")))
        volumes = []
        for number in range(10):
            made = controller.create_volume(f"source-{number}", required_bytes=GIB, capabilities=[BLOCK])
            Data(GIB, 16).write(pool / f"{made.volume_id.split(':')[2]}.img")
            volumes.append(made.volume_id)
        ids: list[str] = []

        def cut(volume: str, name: str) -> None:
            ids.append(controller.cut(name, volume).snapshot_id)

        def clone(number: int) -> None:
            controller.create_volume(
                f"clone-{number}", required_bytes=GIB, capabilities=[BLOCK], snapshot=ids[number % len(ids)]
            )

        row("CreateSnapshot, alone", lambda number: cut(volumes[0], f"first-{number}"), of_one // 4, 1)
        row("CreateSnapshot, of 10 volumes", lambda n: cut(volumes[n % 10], f"wide-{n}"), at_once, at_once)
        row("CreateSnapshot, of one volume", lambda n: cut(volumes[1], f"deep-{n}"), at_once, at_once)
        row("CreateVolume from a snapshot", clone, at_once, at_once)
        left = of_one - of_one // 4 - sum(n % 10 == 0 for n in range(at_once))
        row(f"CreateSnapshot, up to {of_one} of a volume", lambda n: cut(volumes[0], f"most-{n}"), left, 16)
        left = in_pool - len(ids)
        row(f"CreateSnapshot, up to {in_pool} in the pool", lambda n: cut(volumes[2 + n % 8], f"more-{n}"), left, 16)
        row("CreateSnapshot, alone, with all of them", lambda n: cut(volumes[3], f"last-{n}"), 20, 1)
        row("ListSnapshots, all", lambda _: list(controller.snapshots()), 3, 1)
        row("ListSnapshots, all by 500", lambda _: list(controller.snapshots(page=500)), 3, 1)
        row("ListSnapshots, first 100", lambda _: next(controller.snapshots(page=100)), 20, 1)
        row("ListSnapshots of one volume", lambda _: _listed(controller, volumes[0]), 3, 1)
        row("DeleteSnapshot", lambda n: controller.delete_snapshot(ids[n]), len(ids), 16)


def _listed(controller: CsiClient, volume_id: str) -> int:
    answer = controller.call(controller.controller.ListSnapshots, pb.ListSnapshotsRequest(source_volume_id=volume_id))
    return len(answer.entries)


def flushes(place: Path) -> int:
    """Return how many flushes the drive below a mount point has completed (Documentation/block/stat.rst)."""
    number = os.stat(place).st_dev
    return int(Path(f"/sys/dev/block/{os.major(number)}:{os.minor(number)}/stat").read_text().split()[15])
