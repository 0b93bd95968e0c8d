# SPDX-License-Identifier: Apache-2.0
"""A power cut at any step of a cut: a snapshot that is shown as ready has its data, and the same request succeeds."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.unit.embedded.fake_loops import FakeLoopDevices
from tests.unit.embedded.fake_reflinks import FakeReflinks
from tests.unit.embedded.manager import Json, Manager, settings_in
from tests.unit.embedded.test_embedded_power_cuts import Disk, PowerCut, Worst

DATA = b"precious"


class Machine:
    """A manager on disks that keep nothing but what was synced."""

    def __init__(self, directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.settings = settings_in(directory)
        pool = self.settings.pool_directory
        self.disks = {name: Disk(pool / name, Worst()) for name in ("volumes", "snapshots")}
        self.left: int | None = None
        """Points until the power is cut; None = it is not."""
        self.rename = os.rename
        monkeypatch.setattr(os, "fsync", self.synced)
        monkeypatch.setattr(os, "rename", self.renamed)
        self.start()

    def start(self) -> None:
        self.manager = Manager(self.settings, FakeLoopDevices(), reflinks=FakeReflinks())
        store = self.manager.server.store
        commit = store._write_rows

        def write_rows(*rows: Json) -> None:
            self.pass_point()
            commit(*rows)

        store._write_rows = write_rows  # type: ignore[method-assign, assignment]

    def pass_point(self) -> None:
        if self.left is not None:
            self.left -= 1
            if self.left < 0:
                raise PowerCut

    def synced(self, descriptor: int) -> None:
        self.pass_point()
        for disk in self.disks.values() if os.fstat(descriptor).st_nlink else ():  # else a file without a name
            disk.sync(descriptor)

    def renamed(self, source: Path, target: Path) -> None:
        self.pass_point()
        self.rename(source, target)
        disk = self.disks[source.parent.name]
        if source.name in disk.contents:
            disk.contents[target.name] = disk.contents.pop(source.name)

    def cut_power(self) -> None:
        self.left = None
        self.manager.die()
        for disk in self.disks.values():
            disk.cut()
        self.start()

    def content(self, name: str) -> tuple[int, bytes]:
        file = self.manager.server.pool.snapshot_file(self.manager.snapshot(name)["uuid"])
        return self.disks["snapshots"]._now(file)


@pytest.fixture
def machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Machine]:
    machine = Machine(tmp_path, monkeypatch)
    machine.manager.save("data")
    machine.manager.attach("data")
    machine.disks["volumes"].write(machine.manager.server.pool.file(machine.manager.uuid("data")), DATA)
    yield machine
    machine.manager.server.stop()


def whole(machine: Machine) -> tuple[int, bytes]:
    return machine.manager.volume("data")["blocks"] * 4096, DATA


POINTS = 6
"""Of a cut: a sync of the source, a commit, the sync and the rename of the file, a sync of the directory, a commit."""


def test_a_cut_has_the_points_that_are_tested(machine: Machine) -> None:
    machine.left = POINTS
    answer = machine.manager.cut("snap-1", "data")
    assert (answer["success"], machine.left) == (True, 0), answer


@pytest.mark.parametrize("left", range(POINTS + 1))
def test_a_ready_snapshot_has_its_data_and_the_same_request_succeeds(machine: Machine, left: int) -> None:
    machine.left = left
    try:
        is_acknowledged = machine.manager.cut("snap-1", "data")["success"]
    except PowerCut:
        is_acknowledged = False
    machine.cut_power()
    rows = machine.manager.get("/snapshots/all/0/0")
    assert [row["isReady"] for row in rows] == [True] * is_acknowledged
    assert is_acknowledged is (left == POINTS)
    assert {file.name for file in machine.disks["snapshots"].directory.iterdir()} == {f"{r['uuid']}.img" for r in rows}
    assert machine.manager.cut("snap-1", "data")["success"]
    assert machine.content("snap-1") == whole(machine)
    machine.cut_power()
    assert machine.content("snap-1") == whole(machine)


@pytest.mark.parametrize("left", range(3))
def test_a_snapshot_whose_deletion_was_interrupted_is_whole_or_gone(machine: Machine, left: int) -> None:
    machine.manager.cut("snap-1", "data")
    machine.left = left
    try:
        machine.manager.delete_snapshot("snap-1")
    except PowerCut:
        machine.cut_power()
    machine.cut_power()
    if machine.manager.snapshot("snap-1").get("isReady"):
        assert machine.content("snap-1") == whole(machine)
        assert machine.manager.delete_snapshot("snap-1")["success"]
    assert machine.manager.get("/snapshots/all/0/0") == []
    assert machine.manager.server.allocator.totals.shared == 0
