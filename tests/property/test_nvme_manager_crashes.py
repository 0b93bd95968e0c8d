# SPDX-License-Identifier: Apache-2.0
"""The manager is killed at every change of the kernel's target: never two writers, and the same requests succeed."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest

from csi_driver.embedded.export_use import SILENT_S
from csi_driver.embedded.nvme_engine import REFUSED_S
from csi_driver.nvme_model import host_nqn
from tests.unit.embedded.test_nvme_exports import BLOCK, EXCLUSIVE, Storage

FIRST, SECOND = host_nqn("first"), host_nqn("second")
Step = Callable[[Storage], object]


class Killed(BaseException):
    pass


@dataclass
class Watch:
    """Looks at each change of the kernel, and kills the manager at one of them."""

    storage: Storage
    left: int

    def __call__(self, change: str) -> None:
        kernel = self.storage.kernel
        linked = {nqn for port in kernel.ports.values() for nqn in port.subsystems}
        enabled = {nqn for nqn in kernel.subsystems if (found := kernel.namespace(nqn)) and found.is_enabled}
        able = {host for nqn in linked & enabled for host in kernel.subsystems[nqn].allowed_hosts}
        able |= {each.host for each in kernel.controllers if each.nqn in enabled}
        assert len(able) <= 1, f"before {change}: {able}"
        self.left -= 1
        if self.left == 0:
            raise Killed


def connect(node: str) -> Step:
    def step(storage: Storage) -> None:
        if not any(each.host == host_nqn(node) for each in storage.kernel.controllers):
            storage.connect(node)
        for each in storage.kernel.controllers:
            storage.kernel.write(each, 0, BLOCK)

    return step


def disconnect(storage: Storage) -> None:
    for each in list(storage.kernel.controllers):
        storage.kernel.disconnect(each)


def die(storage: Storage) -> None:
    for each in list(storage.kernel.controllers):
        each.running = 2
        storage.kernel.give_up(each)


def detach(node: str) -> Step:
    return lambda storage: storage.manager.attachment("data", node) and storage.manager.detach("data", node)


def attach(node: str) -> Step:
    return lambda storage: storage.manager.attach("data", node, mode=EXCLUSIVE)


def pass_time(seconds: float) -> Step:
    return lambda storage: storage.pass_time(seconds)


def forget_refused(storage: Storage) -> None:
    storage.clock.now_s += REFUSED_S
    storage.pass_time(4)


MOVE: tuple[Step, ...] = (
    *(attach("first"), connect("first"), detach("first"), disconnect, pass_time(SILENT_S + 4)),
    *(attach("second"), pass_time(2), connect("second"), disconnect, detach("second"), pass_time(SILENT_S + 4)),
)
DEATH: tuple[Step, ...] = (
    *(attach("first"), connect("first"), die, detach("first"), pass_time(SILENT_S + 4)),
    *(lambda storage: storage.take_over("second"), pass_time(SILENT_S + 4), connect("second")),
    *(disconnect, detach("second"), pass_time(SILENT_S + 4), forget_refused),
)
PREEMPTION: tuple[Step, ...] = (
    *(attach("first"), connect("first")),
    lambda storage: storage.take_over("second", detach=False),
    *(pass_time(SILENT_S + 4), connect("second"), disconnect),
    *(detach("first"), detach("second"), pass_time(SILENT_S + 4), forget_refused),
)


@pytest.mark.parametrize("steps", [MOVE, DEATH, PREEMPTION], ids=["move", "death", "preemption"])
def test_a_manager_that_is_killed_at_any_change_of_the_kernel_goes_on(tmp_path: Path, steps: tuple[Step, ...]) -> None:
    for killed_at in itertools.count(1):
        directory = tmp_path / str(killed_at)
        directory.mkdir()
        storage = Storage(directory)
        storage.manager.save("data")
        watch = storage.kernel.before_change = Watch(storage, killed_at)
        for step in steps:
            try:
                step(storage)
            except Killed:
                storage.manager.die()
                storage.manager = storage.started()
                step(storage)
        assert storage.manager.attachment("data", "first") is None
        assert storage.manager.attachment("data", "second") is None
        forget_refused(storage)
        assert (storage.kernel.subsystems, storage.kernel.ports) == ({}, {})
        with storage.file().open("rb") as file:
            assert file.read(len(BLOCK)) == BLOCK
        storage.manager.server.stop()
        if watch.left > 0:
            return


def test_a_manager_that_is_killed_while_it_makes_exports_again_gives_nodes_what_they_know(tmp_path: Path) -> None:
    for killed_at in itertools.count(1):
        directory = tmp_path / str(killed_at)
        directory.mkdir()
        storage = Storage(directory)
        storage.manager.save("data")
        storage.manager.attach("data", "first", mode=EXCLUSIVE)
        export = storage.export("first")
        storage.stop_machine()
        watch = storage.kernel.before_change = Watch(storage, killed_at)
        try:
            storage.manager = storage.started()
        except Killed:
            storage.manager = storage.started()
        storage.pass_time(4)
        assert storage.export("first") == export, f"killed at change {killed_at}"
        storage.kernel.write(storage.connect("first"), 0, BLOCK)
        storage.manager.server.stop()
        if watch.left > 0:
            return
