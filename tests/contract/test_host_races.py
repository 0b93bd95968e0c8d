# SPDX-License-Identifier: Apache-2.0
"""A directory on the path is swapped for a link while the driver works: nothing outside the root is touched.

A thread exchanges the two all the time (renameat2(2), RENAME_EXCHANGE). Each operation may fail with an error of the
driver, and must succeed sometimes, or the test would prove nothing.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import random
import stat
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from csi_driver.errors import DriverError
from csi_driver.host.mounts import LinuxMounts
from csi_driver.host.paths import LinuxPaths
from csi_driver.host_model import Device
from csi_driver.model import MIB
from tests.contract.host_machine import HostMachine, host_machine, mounts_below, shell

pytestmark = pytest.mark.root

_AT_FDCWD, _RENAME_EXCHANGE = -100, 2
ROUNDS, MOST_ROUNDS = 600, 20_000


@dataclass
class Trap:
    """`way` alternates between a directory with "target" and "source" and a link to `outside`, which has both too."""

    machine: HostMachine
    root: Path
    outside: Path

    @property
    def way(self) -> Path:
        return self.root / "way"

    def __post_init__(self) -> None:
        self.paths = LinuxPaths([self.root])
        self.mounts = LinuxMounts(self.paths.open)

    @contextlib.contextmanager
    def swapping(self) -> Iterator[None]:
        """Exchange directory and link all the time; at the end the directory is in its place."""
        libc, done = ctypes.CDLL(None, use_errno=True), threading.Event()
        paths = os.fsencode(self.way), os.fsencode(self.root / "link")

        def swap() -> None:
            while not done.wait(random.random() * 0.0004):
                assert libc.renameat2(_AT_FDCWD, paths[0], _AT_FDCWD, paths[1], _RENAME_EXCHANGE) == 0

        thread = threading.Thread(target=swap)
        thread.start()
        try:
            yield
        finally:
            done.set()
            thread.join()
            if self.way.is_symlink():
                libc.renameat2(_AT_FDCWD, paths[0], _AT_FDCWD, paths[1], _RENAME_EXCHANGE)

    def keep_trying(self, operation: Callable[[], object], undo: Callable[[], object]) -> int:
        """Do and undo while the paths are swapped; return the number of successes."""
        worked = 0
        with self.swapping():
            for number in range(MOST_ROUNDS):
                if number >= ROUNDS and worked:
                    break
                for step in (operation, undo):
                    with contextlib.suppress(DriverError):
                        step()
                        worked += step is operation
        return worked


@pytest.fixture
def trap(tmp_path: Path) -> Iterator[Trap]:
    with host_machine(tmp_path) as machine:
        made = Trap(machine, tmp_path / "kubelet", tmp_path / "outside")
        for place in (made.root / "way", made.outside):
            (place / "target").mkdir(parents=True)
            (place / "source").mkdir()
        (made.outside / "source" / "secret").write_text("not yours")
        (made.root / "link").symlink_to(made.outside)
        yield made


def device(trap: Trap) -> Device:
    return trap.machine.formatted("ext4", 32 * MIB)[1]


def test_nothing_is_mounted_outside(trap: Trap) -> None:
    used, target = device(trap), trap.way / "target"
    worked = trap.keep_trying(
        lambda: trap.mounts.mount(used, target, "ext4", [], read_only=False), lambda: trap.mounts.unmount(target)
    )
    assert worked
    assert mounts_below(trap.outside) == []


def test_nothing_is_bound_onto_targets_outside(trap: Trap) -> None:
    used, target = device(trap), trap.way / "target"
    source = trap.root / "staging"
    source.mkdir()
    trap.mounts.mount(used, source, "ext4", [], read_only=False)
    worked = trap.keep_trying(
        lambda: trap.mounts.bind(source, target, read_only=False), lambda: trap.mounts.unmount(target)
    )
    assert worked
    assert mounts_below(trap.outside) == []


def test_nothing_outside_is_bound_into_a_pod(trap: Trap) -> None:
    target = trap.root / "target"
    target.mkdir()
    seen: list[str] = []

    def look_and_take_off() -> None:
        seen.extend(entry.name for entry in target.iterdir())
        trap.mounts.unmount(target)

    assert trap.keep_trying(lambda: trap.mounts.bind(trap.way / "source", target, read_only=False), look_and_take_off)
    assert seen == []


def test_nothing_outside_is_unmounted(trap: Trap) -> None:
    shell("mount", "-t", "tmpfs", "none", str(trap.outside / "target"))
    used, target = device(trap), trap.way / "target"
    assert trap.keep_trying(
        lambda: trap.mounts.unmount(target),
        lambda: trap.mounts.mount(used, target, "ext4", [], read_only=False),
    )
    assert mounts_below(trap.outside) == [str(trap.outside / "target")]


def test_nothing_outside_changes_its_mode(trap: Trap) -> None:
    target = trap.way / "target"
    before = stat.S_IMODE((trap.outside / "target").stat().st_mode)
    assert trap.keep_trying(lambda: trap.paths.set_mode(target, 0o777), lambda: trap.paths.set_mode(target, 0o700))
    assert stat.S_IMODE((trap.outside / "target").stat().st_mode) == before


@pytest.mark.parametrize("kind", ["directory", "file"])
def test_nothing_is_created_or_removed_outside(trap: Trap, kind: str) -> None:
    make = trap.paths.make_directory if kind == "directory" else trap.paths.make_file
    (trap.outside / "kept").mkdir()
    before = sorted(trap.outside.iterdir())
    assert trap.keep_trying(lambda: make(trap.way / "new"), lambda: trap.paths.remove(trap.way / "new"))
    assert trap.keep_trying(lambda: trap.paths.remove(trap.way / "kept"), lambda: make(trap.way / "kept"))
    assert sorted(trap.outside.iterdir()) == before
