# SPDX-License-Identifier: Apache-2.0
"""What grows with volumes, attachments and mounts: each call alone, start-up and memory of the three processes."""

from __future__ import annotations

import contextlib
import socket
import subprocess
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

from csi_driver.local.settings import LocalSettings
from csi_driver.local.supervisor import Paths, Role, probe, role_argv
from tests.bench.calls import add_mounts
from tests.bench.life import BLOCK, Volume, life_on, new_volumes
from tests.bench.measure import resident_mib, timed
from tests.bench.report import Report
from tests.bench.stack import POOL_BYTES, Stack, running_stack

START_TIMEOUT_S = 120.0
GROUPS = ("controller, ms", "node, ms", "start to ready, s", "resident memory after start, MiB")
"""What a curve shows; its name is one of these, a colon and the series."""


@dataclass(slots=True)
class Growth:
    """One thing that grows on a stack of its own: `grow` makes so many of them present."""

    what: str
    counts: tuple[int, ...]
    grow: Callable[[Growth, Stack, int], None]
    directory: Path = Path()
    present: int = 0
    volumes: list[Volume] = field(default_factory=list)


def measure_scale(directory: Path, report: Report, samples: int, most: tuple[int, int, int]) -> None:
    """Print the curves: `most` volumes in the manager, attached on the node, mounts on the node."""
    growths = (
        Growth("volumes in the manager", _up_to(most[0], 10, 100, 1000, 10_000), _more_volumes),
        Growth("volumes attached on the node", _up_to(most[1], 10, 100, 500), _more_attached),
        Growth("mounts on the node", _up_to(most[2], 10, 500, 2000), _more_mounts),
    )
    for number, growth in enumerate(growths):
        growth.directory = directory / f"scale-{number}"
        growth.directory.mkdir()
        for count in growth.counts:
            with running_stack(growth.directory) as stack:
                growth.grow(growth, stack, count)
                growth.present = count
                points = _calls_ms(stack, growth.directory, count, samples)
            points |= _start_and_memory(growth.directory)
            for name, value in points.items():
                report.point(growth.what, name, count, value)
        with running_stack(growth.directory) as stack:
            timed(life_on(stack, BLOCK).detach, growth.volumes, at_once=16)
        _print_curves(report, growth)


def _up_to(most: int, *counts: int) -> tuple[int, ...]:
    return tuple(count for count in counts if count <= most)


def _more_volumes(growth: Growth, stack: Stack, count: int) -> None:
    volumes = [Volume(f"many-{n}") for n in range(growth.present, count)]
    timed(life_on(stack, BLOCK).create, volumes, at_once=16)


def _more_attached(growth: Growth, stack: Stack, count: int) -> None:
    life = life_on(stack, BLOCK)
    volumes = [Volume(f"many-{n}") for n in range(growth.present, count)]
    for call in (life.create, life.attach):
        timed(call, volumes, at_once=16)
    growth.volumes += volumes


def _more_mounts(growth: Growth, _stack: Stack, count: int) -> None:
    busy = growth.directory / "busy"
    busy.mkdir(exist_ok=True)
    add_mounts(busy, growth.present, count)


def _calls_ms(stack: Stack, directory: Path, count: int, samples: int) -> dict[str, float]:
    """Return the time of each call, one at a time: the lower quartile, as other work on the machine only adds."""
    life, found = life_on(stack), dict[str, float]()
    volumes = new_volumes(directory, f"one-of-{count}", samples)
    for step in life.steps():
        found[f"{step.role}, ms: {step.name}"] = timed(step.call, volumes, at_once=1).percentile_ms(25)
    kept = Volume(f"kept-{count}")
    life.create(kept)
    reads: dict[str, Callable[[int], object]] = {
        "controller, ms: ControllerGetVolume": lambda _: stack.controller.get_volume(kept.volume_id),
        "controller, ms: GetCapacity": lambda _: stack.controller.free_bytes(),
        "controller, ms: ListVolumes, first 100": lambda _: next(stack.controller.volumes(page=100)),
        "node, ms: Probe": lambda _: stack.node.is_ready(),
    }
    for name, call in reads.items():
        found[name] = timed(call, range(samples), at_once=1).percentile_ms(25)
    everything = timed(lambda _: list(stack.controller.volumes()), range(5), at_once=1)
    found["controller, ms: ListVolumes, all"] = everything.percentile_ms(25)
    life.delete(kept)
    return found


def _start_and_memory(directory: Path) -> dict[str, float]:
    """Start storage, controller and node one after the other and stop them."""
    settings = LocalSettings(directory / "local", size_bytes=POOL_BYTES, overcommit=True, log_level="error")
    found: dict[str, float] = {}
    with contextlib.ExitStack() as stack:
        listener = stack.enter_context(socket.socket(socket.AF_INET, socket.SOCK_STREAM))
        listener.bind(("127.0.0.1", 0))
        for role in Role:
            begun = time.perf_counter()
            process = stack.enter_context(_running(role, settings, listener))
            found[f"start to ready, s: {role}"] = time.perf_counter() - begun
            found[f"resident memory after start, MiB: {role}"] = resident_mib(process.pid)
    return found


@contextlib.contextmanager
def _running(role: Role, settings: LocalSettings, listener: socket.socket) -> Iterator[subprocess.Popen[bytes]]:
    """Start a role, wait until it is ready, and stop it."""
    port, paths = int(listener.getsockname()[1]), Paths(settings.directory)
    argv = role_argv(role, settings, paths, port, listener.fileno())
    process = subprocess.Popen(argv, pass_fds=[listener.fileno()], stdout=subprocess.DEVNULL)
    try:
        give_up_at = time.monotonic() + START_TIMEOUT_S
        while reason := probe(role, paths, port):
            if process.poll() is not None or time.monotonic() > give_up_at:
                raise SystemExit(f"{role} did not become ready: {reason}")
            time.sleep(0.005)
        yield process
    finally:
        process.terminate()
        process.wait(START_TIMEOUT_S)


def _print_curves(report: Report, growth: Growth) -> None:
    table = report.table(f"By {growth.what}", ("", *(str(count) for count in growth.counts)))
    for name, points in report.curves[growth.what].items():
        table.row(name, *(float(value) for _, value in points))
