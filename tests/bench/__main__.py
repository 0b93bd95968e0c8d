# SPDX-License-Identifier: Apache-2.0
"""Measure the driver on this machine: `make bench`, or `python -m tests.bench --help`. Needs root.

Starts `nvmesh-csi local` in a directory of its own, calls it over its Unix sockets, prints tables, and leaves
nothing behind. Figures are of the whole way: client, gRPC, driver, storage manager, kernel, all on this machine.
"""

from __future__ import annotations

import argparse
import contextlib
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from csi_driver.deadline import Deadline
from csi_driver.model import AccessMode, BlockAccess, Capability, MountAccess
from csi_driver.rpc.client import CallFailed
from tests.bench.measure import Timing, resident_mib, timed
from tests.bench.rate import measure_create_rate
from tests.bench.scan import measure_scan
from tests.bench.storm import Weather, ideal_s, storm
from tests.client import CsiClient

GIB = 1 << 30
PARTS = ("start", "memory", "rate", "calls", "mounts", "probe", "shell", "storm", "list", "scan")
ROLES = ("storage", "controller", "node")
EXT4 = Capability(MountAccess(fs_type="ext4"), AccessMode.SINGLE_NODE_WRITER)
XFS = Capability(MountAccess(fs_type="xfs"), AccessMode.SINGLE_NODE_WRITER)
BLOCK = Capability(BlockAccess(), AccessMode.SINGLE_NODE_WRITER)

SHELL_STAGE = 'mkfs.{fs} -q {options} "$1" && mount "$1" "$2" && mount --bind "$2" "$3"'
SHELL_UNDO = 'umount "$2" && umount "$1"'


@dataclass(frozen=True, slots=True)
class Stack:
    """The running roles."""

    directory: Path
    controller: CsiClient
    node: CsiClient
    node_id: str

    def pid(self, role: str) -> int:
        return int((self.directory / f"{role}.pid").read_text())

    @property
    def pids(self) -> tuple[int, ...]:
        return tuple(self.pid(role) for role in ROLES)


@dataclass(slots=True)
class Subject:
    """One volume under measurement."""

    name: str
    staging: Path
    target: Path
    volume_id: str = ""
    publish_context: dict[str, str] | None = None


@contextlib.contextmanager
def running_stack(directory: Path) -> Iterator[Stack]:
    """Start `nvmesh-csi local` and stop it again."""
    argv = [sys.executable, "-m", "csi_driver", "local", "--directory", str(directory / "local")]
    process = subprocess.Popen(
        [*argv, "--size", "40TiB", "--overcommit", "--log-level", "warning"],
        stdout=subprocess.DEVNULL,
    )
    try:
        with (
            CsiClient(directory / "local" / "controller.sock", timeout_s=300) as controller,
            CsiClient(directory / "local" / "node.sock", timeout_s=300) as node,
        ):
            for client in (controller, node):
                reason = client.wait_ready(Deadline.after(60), give_up=lambda: process.poll() is not None)
                if reason:
                    raise SystemExit(f"the driver did not become ready: {reason}")
            yield Stack(directory / "local", controller, node, node.node_info().node_id)
    finally:
        process.send_signal(signal.SIGTERM)
        process.wait(120)


class Table:
    """Prints rows as they are measured."""

    def __init__(self, title: str, columns: Sequence[str]) -> None:
        print(f"\n{title}\n" + "  ".join(f"{column:>12}" if n else f"{column:<34}" for n, column in enumerate(columns)))

    def row(self, name: str, *cells: object) -> None:
        shown = (f"{cell:>12.2f}" if isinstance(cell, float) else f"{cell!s:>12}" for cell in cells)
        print(f"{name:<34}  " + "  ".join(shown), flush=True)

    def timing(self, name: str, at_once: int, timing: Timing) -> None:
        self.row(
            name,
            at_once,
            timing.percentile_ms(50),
            timing.percentile_ms(99),
            timing.per_second,
            timing.cpu_ms_per_call,
        )


def subjects(directory: Path, prefix: str, count: int) -> list[Subject]:
    """Return volumes to be, with their staging directories made (the CO's duty)."""
    made = [
        Subject(f"{prefix}-{n}", directory / f"{prefix}-{n}-staging", directory / f"{prefix}-{n}-target")
        for n in range(count)
    ]
    for subject in made:
        subject.staging.mkdir()
    return made


class LifeCycle:
    """The calls of a volume's life, one method each."""

    def __init__(self, stack: Stack, capability: Capability) -> None:
        self.stack = stack
        self.capability = capability

    def create(self, subject: Subject) -> None:
        made = self.stack.controller.create_volume(subject.name, required_bytes=GIB, capabilities=[self.capability])
        subject.volume_id = made.volume_id

    def attach(self, subject: Subject) -> None:
        subject.publish_context = self.stack.controller.attach(subject.volume_id, self.stack.node_id, self.capability)

    def stage(self, subject: Subject) -> None:
        context = subject.publish_context or {}
        self.stack.node.stage(subject.volume_id, subject.staging, self.capability, publish_context=context)

    def publish(self, subject: Subject) -> None:
        context = subject.publish_context or {}
        self.stack.node.publish(
            subject.volume_id, subject.staging, subject.target, self.capability, publish_context=context
        )

    def stats(self, subject: Subject) -> None:
        self.stack.node.stats(subject.volume_id, subject.target)

    def unpublish(self, subject: Subject) -> None:
        self.stack.node.unpublish(subject.volume_id, subject.target)

    def unstage(self, subject: Subject) -> None:
        self.stack.node.unstage(subject.volume_id, subject.staging)

    def detach(self, subject: Subject) -> None:
        self.stack.controller.detach(subject.volume_id, self.stack.node_id)

    def delete(self, subject: Subject) -> None:
        self.stack.controller.delete_volume(subject.volume_id)

    def steps(self) -> list[tuple[str, Callable[[Subject], None]]]:
        return [
            ("CreateVolume", self.create),
            ("ControllerPublishVolume", self.attach),
            ("NodeStageVolume ext4", self.stage),
            ("NodePublishVolume", self.publish),
            ("NodeGetVolumeStats", self.stats),
            ("NodeUnpublishVolume", self.unpublish),
            ("NodeUnstageVolume", self.unstage),
            ("ControllerUnpublishVolume", self.detach),
            ("DeleteVolume", self.delete),
        ]


def measure_calls(stack: Stack, directory: Path, counts: dict[int, int]) -> None:
    """Print the main table: each call at several concurrencies."""
    table = Table("Calls", ("call", "at once", "p50 ms", "p99 ms", "per second", "CPU ms/call"))
    life = LifeCycle(stack, EXT4)
    for at_once, count in counts.items():
        volumes = subjects(directory, f"calls-{at_once}", count)
        for name, step in life.steps():
            table.timing(name, at_once, timed(step, volumes, at_once=at_once, pids=stack.pids))


def measure_shell(stack: Stack, directory: Path, rounds: int) -> None:
    """Print stage and publish and the same work by a shell script, in turn, at several concurrencies."""
    table = Table(
        "Stage and publish of a blank volume, compared with a shell script", ("", "at once", "p50 ms", "per second")
    )
    kinds = [("ext4", EXT4, "-E nodiscard")] + ([("xfs", XFS, "-K")] if shutil.which("mkfs.xfs") else [])
    for fs, capability, options in kinds:
        life = LifeCycle(stack, capability)
        ways: dict[str, ByDriver | ByScript] = {
            f"driver {fs}": ByDriver(life),
            f"shell script {fs}": ByScript(stack, fs, options),
        }
        for at_once in (1, 16, 100):
            timings: dict[str, list[Timing]] = {name: [] for name in ways}
            for turn in range(1 if at_once == 100 else rounds):
                for name, way in ways.items():
                    prefix = f"{name.replace(' ', '-')}-{at_once}-{turn}"
                    timings[name].append(one_turn(life, way, subjects(directory, prefix, max(10, at_once)), at_once))
            for name, each in timings.items():
                p50_ms = statistics.median(timing.percentile_ms(50) for timing in each)
                table.row(name, at_once, p50_ms, statistics.median(timing.per_second for timing in each))


def one_turn(life: LifeCycle, way: ByDriver | ByScript, volumes: Sequence[Subject], at_once: int) -> Timing:
    """Time one way of staging and publishing fresh volumes, and take all of it down again."""
    timed(life.create, volumes, at_once=8)
    timed(life.attach, volumes, at_once=8)
    timing = timed(way.do, volumes, at_once=at_once)
    timed(way.undo, volumes, at_once=4)
    timed(life.detach, volumes, at_once=8)
    timed(life.delete, volumes, at_once=8)
    return timing


@dataclass(frozen=True, slots=True)
class ByDriver:
    """Stage and publish by the driver."""

    life: LifeCycle

    def do(self, subject: Subject) -> None:
        self.life.stage(subject)
        self.life.publish(subject)

    def undo(self, subject: Subject) -> None:
        self.life.unpublish(subject)
        self.life.unstage(subject)


@dataclass(frozen=True, slots=True)
class ByScript:
    """The same by mkfs, mount and mount --bind."""

    stack: Stack
    fs: str
    options: str

    def do(self, subject: Subject) -> None:
        device = self.stack.directory / "dev" / subject.volume_id.split(":")[1]
        subject.target.mkdir(exist_ok=True)
        script = SHELL_STAGE.format(fs=self.fs, options=self.options)
        argv: list[str | Path] = ["bash", "-c", script, "bash", device, subject.staging, subject.target]
        subprocess.run(argv, check=True, stdout=subprocess.DEVNULL)

    def undo(self, subject: Subject) -> None:
        subprocess.run(["bash", "-c", SHELL_UNDO, "bash", subject.staging, subject.target], check=True)
        subject.target.rmdir()


def measure_mounts(stack: Stack, directory: Path, extra_mounts: Sequence[int], count: int) -> None:
    """Print publish and statistics with few and many other mounts present."""
    table = Table("With other mounts present", ("call", "mounts", "p50 ms", "p99 ms", "per second"))
    life = LifeCycle(stack, EXT4)
    volumes = subjects(directory, "mounts", 1)
    (volume,) = volumes
    for step in (life.create, life.attach, life.stage):
        step(volume)
    busy = directory / "busy"
    busy.mkdir()
    present = 0
    try:
        for wanted in extra_mounts:
            while present < wanted:
                place = busy / str(present)
                place.mkdir()
                subprocess.run(["mount", "--bind", busy, place], check=True)
                present += 1
            places = [directory / f"mounts-target-{wanted}-{n}" for n in range(count)]
            targets = [Subject("", volume.staging, place, volume.volume_id, volume.publish_context) for place in places]
            for name, call in (
                ("NodePublishVolume", life.publish),
                ("NodePublishVolume repeated", life.publish),
                ("NodeGetVolumeStats", life.stats),
                ("NodeUnpublishVolume", life.unpublish),
            ):
                timing = timed(call, targets, at_once=1)
                table.row(name, wanted, timing.percentile_ms(50), timing.percentile_ms(99), timing.per_second)
    finally:
        for n in range(present):
            subprocess.run(["umount", busy / str(n)], check=False)
    for step in (life.unstage, life.detach, life.delete):
        step(volume)


def measure_probe_during_stages(stack: Stack, directory: Path, stages: int) -> None:
    """Print how long Probe takes on the node while many volumes are being staged."""
    table = Table("Probe of the node", ("", "calls", "p50 ms", "p99 ms", "most ms"))
    idle = timed(lambda _: stack.node.is_ready(), range(200), at_once=1)
    table.row("alone", idle.calls, idle.percentile_ms(50), idle.percentile_ms(99), idle.percentile_ms(100))
    life = LifeCycle(stack, EXT4)
    volumes = subjects(directory, "probe", stages)
    timed(life.create, volumes, at_once=16)
    timed(life.attach, volumes, at_once=16)
    latencies: list[float] = []
    with ThreadPoolExecutor(stages) as pool:
        begun = time.perf_counter()
        running = [pool.submit(life.stage, volume) for volume in volumes]
        while not all(future.done() for future in running):
            asked = time.perf_counter()
            stack.node.is_ready(timeout_s=30)
            latencies.append(time.perf_counter() - asked)
            time.sleep(0.005)
        wall_s = time.perf_counter() - begun
        for future in running:
            future.result()
    probe = Timing(tuple(latencies), wall_s)
    table.row(
        f"during {stages} stages ({wall_s:.1f} s)",
        probe.calls,
        probe.percentile_ms(50),
        probe.percentile_ms(99),
        probe.percentile_ms(100),
    )
    for step in (life.unstage, life.detach, life.delete):
        timed(step, volumes, at_once=8)


SHELL_MOUNT = 'mount "$1" "$2" && mount --bind "$2" "$3"'


def measure_storm(stack: Stack, directory: Path, volumes: int, publications: int) -> None:
    """Print how long many volumes take that are staged and published at once, blank and in use before."""
    table = Table(
        "Boot storm, compared with a sequential shell script divided by the processors",
        ("", "calls", "s", "ideal s", "longest s"),
    )
    life = LifeCycle(stack, EXT4)
    subjects_of_it = subjects(directory, "storm", volumes)
    timed(life.create, subjects_of_it, at_once=16)
    timed(life.attach, subjects_of_it, at_once=16)
    alone = shell_alone(life, directory)
    for what in ("blank", "in use before"):
        weather = storm(stack.node.socket, [up(subject) for subject in subjects_of_it], at_once=volumes)
        storm_row(table, f"{volumes} volumes, {what}", weather, ideal_s(alone[what], volumes))
        if what == "blank":
            storm(stack.node.socket, [down(subject) for subject in subjects_of_it], at_once=16)
    many = [
        Subject("", one.staging, directory / f"storm-{n}-many", one.volume_id, one.publish_context)
        for n in range(publications)
        for one in [subjects_of_it[n % volumes]]
    ]
    weather = storm(stack.node.socket, [[publishing(each)] for each in many], at_once=min(publications, volumes))
    storm_row(table, f"{publications} more publications", weather, ideal_s(alone["bind"], publications))
    timed(life.unpublish, many, at_once=16)
    for step in (life.unpublish, life.unstage, life.detach, life.delete):
        timed(step, subjects_of_it, at_once=16)


def storm_row(table: Table, name: str, weather: Weather, ideal: float) -> None:
    table.row(name, weather.calls, weather.wall_s, ideal, weather.longest_s)
    print(f"  errors: {weather.told()}")


def up(subject: Subject) -> list[Callable[[CsiClient], object]]:
    """Return what kubelet calls to bring a volume up."""
    context = subject.publish_context or {}
    return [
        lambda client: client.stage(subject.volume_id, subject.staging, EXT4, publish_context=context),
        publishing(subject),
    ]


def publishing(subject: Subject) -> Callable[[CsiClient], object]:
    context = subject.publish_context or {}
    return lambda client: client.publish(
        subject.volume_id, subject.staging, subject.target, EXT4, publish_context=context
    )


def down(subject: Subject) -> list[Callable[[CsiClient], object]]:
    """Return what kubelet calls to take a volume down."""
    return [
        lambda client: client.unpublish(subject.volume_id, subject.target),
        lambda client: client.unstage(subject.volume_id, subject.staging),
    ]


def shell_alone(life: LifeCycle, directory: Path, rounds: int = 20) -> dict[str, float]:
    """Return the seconds that one volume alone takes a shell script: blank, in use before, one more publication."""
    volumes = subjects(directory, "storm-shell", rounds)
    timed(life.create, volumes, at_once=8)
    timed(life.attach, volumes, at_once=8)
    by_script = ByScript(life.stack, "ext4", "-m 0 -E nodiscard,lazy_itable_init=1,lazy_journal_init=1")
    found = {"blank": timed(by_script.do, volumes, at_once=1).wall_s / rounds}
    timed(by_script.undo, volumes, at_once=1)

    def mount(subject: Subject) -> None:
        device = life.stack.directory / "dev" / subject.volume_id.split(":")[1]
        subject.target.mkdir()
        argv: list[str | Path] = ["bash", "-c", SHELL_MOUNT, "bash", device, subject.staging, subject.target]
        subprocess.run(argv, check=True)

    def bind(subject: Subject) -> None:
        subprocess.run(["bash", "-c", 'mount --bind "$1" "$2"', "bash", subject.staging, subject.target], check=True)

    found["in use before"] = timed(mount, volumes, at_once=1).wall_s / rounds
    found["bind"] = timed(bind, volumes, at_once=1).wall_s / rounds
    for volume in volumes:
        subprocess.run(["umount", volume.target], check=True)
    timed(by_script.undo, volumes, at_once=1)
    for step in (life.detach, life.delete):
        timed(step, volumes, at_once=8)
    return found


def measure_memory(stack: Stack, directory: Path, calls: int) -> None:
    """Print resident memory of the controller and the node, idle and after many calls."""
    table = Table("Resident memory, MiB", ("", "idle", f"{calls} calls", "growth"))
    life = LifeCycle(stack, EXT4)
    (volume,) = subjects(directory, "memory", 1)
    idle = {role: resident_mib(stack.pid(role)) for role in ("controller", "node")}
    for step in (life.create, life.attach, life.stage, life.publish):
        step(volume)
    timed(lambda _: life.stats(volume), range(200), at_once=4)
    timed(lambda _: stack.controller.get_volume(volume.volume_id), range(200), at_once=4)
    warm = {role: resident_mib(stack.pid(role)) for role in ("controller", "node")}
    timed(lambda _: life.stats(volume), range(calls), at_once=4)
    timed(lambda _: stack.controller.get_volume(volume.volume_id), range(calls), at_once=4)
    for role in ("controller", "node"):
        after = resident_mib(stack.pid(role))
        table.row(role, idle[role], after, after - warm[role])
    print("growth is since the first 200 calls")
    for step in (life.unpublish, life.unstage, life.detach, life.delete):
        step(volume)


def measure_list(stack: Stack, count: int) -> None:
    """Print ListVolumes of many volumes, in one answer and in pages."""
    table = Table(f"ListVolumes of {count}", ("", "volumes", "ms"))
    life = LifeCycle(stack, BLOCK)
    volumes = [Subject(f"list-{n}", Path(), Path()) for n in range(count)]
    made = timed(life.create, volumes, at_once=16)
    for name, page in (("in one answer", 0), ("in pages of 500", 500)):
        best_ms = float("inf")
        seen = 0
        for _ in range(3):
            begun = time.perf_counter()
            seen = sum(1 for _ in stack.controller.volumes(page=page))
            best_ms = min(best_ms, (time.perf_counter() - begun) * 1000)
        table.row(name, seen, best_ms)
    print(f"(they were created at {made.per_second:.0f} per second, 16 at once)")


def measure_start(directory: Path, rounds: int) -> None:
    """Print the time from starting the node's process to its first answer to Probe."""
    table = Table("Start to first answered Probe, ms", ("", "least", "median", "most"))
    for role in ("node", "controller"):
        took_ms: list[float] = []
        for turn in range(rounds):
            socket = directory / f"start-{role}-{turn}.sock"
            argv = [sys.executable, "-m", "csi_driver", role, "--endpoint", f"unix://{socket}"]
            if role == "node":
                argv += ["--node-name", "bench", "--device-directory", str(directory)]
                argv += ["--status-directory", str(directory)]
                argv += ["--state-directory", str(directory / "state"), "--path-root", "/"]
            else:
                password = directory / "password"
                password.write_text("x")
                argv += ["--management-server", "http://127.0.0.1:1", "--management-user", "u"]
                argv += ["--management-password-file", str(password)]
            begun = time.perf_counter()
            process = subprocess.Popen(argv, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
            try:
                with CsiClient(socket) as client:
                    wait_for_any_answer(client, socket)
                    took_ms.append((time.perf_counter() - begun) * 1000)
            finally:
                process.terminate()
                process.wait(60)
        table.row(role, min(took_ms), statistics.median(took_ms), max(took_ms))


def wait_for_any_answer(client: CsiClient, socket: Path) -> None:
    """Return when Probe was answered, with any answer."""
    give_up_at = time.monotonic() + 30
    while time.monotonic() < give_up_at:
        if socket.exists():
            try:
                client.is_ready()
            except CallFailed as error:
                if error.code != "UNAVAILABLE":
                    return
            else:
                return
        time.sleep(0.002)
    raise SystemExit(f"no answer on {socket} within 30 s")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="small numbers: shows that it works, not how fast it is")
    parser.add_argument("--only", action="append", choices=PARTS, help="measure only this part; repeatable")
    options = parser.parse_args()
    wanted: set[str] = set(options.only or PARTS)
    quick: bool = options.quick
    directory = Path(tempfile.mkdtemp(prefix="csi-bench-", dir="/tmp"))
    try:
        if "start" in wanted:
            measure_start(directory, 2 if quick else 7)
        if "rate" in wanted:
            columns = ("50 ms a request", "at once", "p50 ms", "p99 ms", "per second", "requests", "most at once")
            counts = {1: 4, 16: 32} if quick else {1: 40, 16: 320, 100: 800}
            measure_create_rate(directory, counts, (1, 2), Table("Rate on a slow management", columns).row)
        if "scan" in wanted:
            table = Table("Scan of every block", ("reading before a format", "MiB", "GB/s"))
            measure_scan(directory, (64 << 20) if quick else (4 << 30), table.row)
        if not wanted <= {"start", "rate", "scan"}:
            with running_stack(directory) as stack:
                measure_stack(stack, directory, wanted, quick=quick)
    finally:
        shutil.rmtree(directory)


def measure_stack(stack: Stack, directory: Path, wanted: set[str], *, quick: bool) -> None:
    """Run the selected measurements on one running stack."""
    if "memory" in wanted:
        measure_memory(stack, directory, 300 if quick else 10_000)
    if "calls" in wanted:
        measure_calls(stack, directory, {1: 4, 16: 16} if quick else {1: 40, 16: 160, 100: 300})
    if "mounts" in wanted:
        measure_mounts(stack, directory, (10, 100) if quick else (10, 2000), 20 if quick else 100)
    if "probe" in wanted:
        measure_probe_during_stages(stack, directory, 10 if quick else 100)
    if "shell" in wanted:
        measure_shell(stack, directory, 1 if quick else 5)
    if "storm" in wanted:
        measure_storm(stack, directory, *((20, 50) if quick else (300, 1000)))
    if "list" in wanted:
        measure_list(stack, 200 if quick else 10_000)


if __name__ == "__main__":
    main()
