# SPDX-License-Identifier: Apache-2.0
"""Power cuts at any step of random histories: the next start shows what was shown before, and has the data."""

from __future__ import annotations

import os
import random
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from csi_driver.embedded.settings import StorageSettings
from tests.storage_switches import add_points
from tests.unit.embedded.fake_loops import FakeLoopDevices
from tests.unit.embedded.manager import Json, Manager, settings_in

CLIENTS = ("node-1", "node-2")
STEPS = 25
REFUSED = {1523, 1683, 1694, 162222}
"""Errors that the request may have had before: the name exists, it is in use, another client has it, or none."""


class PowerCut(BaseException):
    """The machine stops here."""


@dataclass(slots=True)
class Disk:
    """The files of a pool: what was synced stays, of everything else chance decides."""

    directory: Path
    chance: random.Random
    contents: dict[str, tuple[int, bytes]] = field(default_factory=dict)
    """Length and first bytes of each file, by name, when it was synced last."""
    entries: set[str] = field(default_factory=set)
    """Names when the directory was synced last."""

    def sync(self, descriptor: int) -> None:
        path = Path(os.readlink(f"/proc/self/fd/{descriptor}"))
        if path == self.directory:
            self.entries = set(os.listdir(path))
        elif path.parent == self.directory:
            self.contents[path.name] = self._now(path)

    def write(self, file: Path, data: bytes) -> None:
        """Write as a client does that syncs its data."""
        descriptor = os.open(file, os.O_RDWR)
        os.pwrite(descriptor, data, 0)
        self.sync(descriptor)
        os.close(descriptor)

    def cut(self) -> None:
        now = {name: self._now(self.directory / name) for name in os.listdir(self.directory)}
        for name in sorted(self.entries | set(now)):
            file = self.directory / name
            file.unlink(missing_ok=True)
            if (name in self.entries) == (name in now) or self.chance.random() < 0.5:
                synced = self.contents.get(name, (0, b""))
                length, data = self.chance.choice([synced, now.get(name, synced)])
                file.write_bytes(data)
                os.truncate(file, length)
        self.entries = set(os.listdir(self.directory))
        self.contents = {name: self._now(self.directory / name) for name in self.entries}

    def _now(self, file: Path) -> tuple[int, bytes]:
        with file.open("rb") as opened:
            return file.stat().st_size, opened.read(8)


class Machine:
    def __init__(self, settings: StorageSettings, chance: random.Random) -> None:
        self.settings, self.chance = settings, chance
        self.disk = Disk(settings.pool_directory / "volumes", chance)
        self.left: int | None = None
        """Points until the power is cut; None = it is not."""
        self.data: dict[str, bytes] = {}
        """What clients have written and synced, by the name of the file."""
        self.start()

    def start(self) -> None:
        self.loops = FakeLoopDevices()
        self.manager = Manager(self.settings, self.loops)
        add_points(self.manager.server, self.pass_point)
        store = self.manager.server.store
        commit = store._write_rows

        def write_rows(*rows: Json) -> None:
            self.pass_point("before a commit")
            commit(*rows)

        store._write_rows = write_rows  # type: ignore[method-assign, assignment]

    def pass_point(self, _: str) -> None:
        if self.left is not None:
            self.left -= 1
            if self.left < 0:
                raise PowerCut

    def sync(self, descriptor: int) -> None:
        self.pass_point("before a sync")
        self.disk.sync(descriptor)

    def cut(self) -> None:
        self.left = None
        self.manager.die()
        self.disk.cut()
        self.start()

    def do(self, act: str, name: str, client: str) -> Json:
        manager = self.manager
        match act:
            case "save":
                return manager.save(name)
            case "extend":
                return manager.extend(name, manager.volume(name)["capacity"] + 1)
            case "delete":
                return manager.delete(name)
            case "detach":
                return manager.detach(name, client)
        version = manager.volume(name)["reservation"]["version"]
        preempt = {"version": version, "preempt": True, "isDetachOthers": True} if act == "preempt" else {}
        return manager.attach(name, client, mode="EXCLUSIVE_READ_WRITE", **preempt)

    def write_data(self) -> None:
        for device in self.loops.bound.values():
            data = self.chance.randbytes(8)
            self.disk.write(device.file, data)
            self.data[device.file.name] = data

    def shown(self, name: str) -> Json:
        """Return all that a controller decides by; None for a volume that does not exist."""
        row = self.manager.volume(name)
        clients = [(self.manager.attachment(name, client), self.manager.report(name, client)) for client in CLIENTS]
        # A volume that was detached is shown as that, or no longer.
        held = [(desired, report if desired is not None else None) for desired, report in clients]
        return (row, held) if row["uuid"] else None

    def check_files(self, rows: Json) -> None:
        for row in rows:
            file = self.manager.server.pool.file(row["uuid"])
            length, data = self.disk._now(file)
            assert (row["status"], length) == ("online", row["blocks"] * 4096)
            assert data == self.data.get(file.name, data)
            assert len(self.loops.writers(file)) <= 1


@pytest.mark.parametrize("seed", range(8))
def test_a_power_cut_takes_nothing_back_that_was_shown(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, seed: int
) -> None:
    chance = random.Random(seed)
    machine = Machine(settings_in(tmp_path), chance)
    monkeypatch.setattr(os, "fsync", machine.sync)
    names, shown = ("a", "b"), dict[str, Json]()
    for _ in range(STEPS):
        name, client = chance.choice(names), chance.choice(CLIENTS)
        acts = ["extend", "delete", "attach", "attach", "preempt", "detach", "detach"] if shown.get(name) else ["save"]
        step = chance.choice(acts), name, client
        machine.left = chance.randrange(10)
        try:
            machine.do(*step)
            shown[name] = machine.shown(name)
            machine.cut()
        except PowerCut:
            machine.cut()
            assert {other: machine.shown(other) for other in names if other != name} == {
                other: shown.get(other) for other in names if other != name
            }
            if machine.shown(name) or step[0] == "save":
                again = machine.do(*step)
                assert again["success"] or again["error"]["id"] in REFUSED, f"{step} again: {again}"
            shown[name] = machine.shown(name)
        assert {each: machine.shown(each) for each in names} == {each: shown.get(each) for each in names}
        machine.check_files([held[0] for held in shown.values() if held])
        machine.write_data()
    machine.manager.server.stop()


class Worst(random.Random):
    """A disk that keeps nothing but what was synced."""

    def choice(self, seq: Json) -> Json:
        return seq[0]

    def random(self) -> float:
        return 1.0


def test_of_a_volume_in_use_only_the_latest_extension_may_be_missing_after_a_power_cut(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    machine = Machine(settings_in(tmp_path), Worst())
    monkeypatch.setattr(os, "fsync", machine.sync)
    for act in ("save", "attach", "extend", "extend"):
        assert machine.do(act, "data", "node-1")["success"]
    machine.cut()
    machine.check_files(machine.manager.get("/volumes/all/0/0"))
    machine.manager.server.stop()
