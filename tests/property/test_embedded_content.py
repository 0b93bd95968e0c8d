# SPDX-License-Identifier: Apache-2.0
"""Volumes, snapshots and copies of the embedded storage manager, in random histories: no content is ever mixed up.

A history has writes, cuts, copies, growth and deletions in any order. The manager is restarted in between, and killed
after any of the changes that a request makes. The model is a dictionary of blocks. What a killed manager had not
answered may have been done or not, but as a whole.

`NVMESH_CSI_CONTENT_EXAMPLES=N` tries N histories, others each time.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TypeAlias

from hypothesis import given, settings
from hypothesis import strategies as st

from csi_driver.embedded.settings import Reflinks
from tests.storage_switches import add_points
from tests.unit.embedded.fake_loops import FakeLoopDevices
from tests.unit.embedded.fake_reflinks import FakeReflinks
from tests.unit.embedded.manager import Json, Manager, settings_in
from tests.unit.embedded.test_embedded_crashes import Crash, Fault

EXAMPLES = os.environ.get("NVMESH_CSI_CONTENT_EXAMPLES")
NAMES = 4
BLOCK, PLACES = 4096, [place << 20 for place in (0, 1, 5, 900)]
"""Bytes of a block, and the offsets of those that are written."""
Blocks: TypeAlias = dict[int, int]
"""The byte that fills a block, by its offset; other blocks are zero."""


@dataclass
class Image:
    capacity: int
    blocks: Blocks = field(default_factory=dict)

    def copy(self, capacity: int | None = None) -> Image:
        return Image(self.capacity if capacity is None else capacity, dict(self.blocks))


class History:
    """A pool with its manager, and what must be in it."""

    def __init__(self, directory: Path, reflinks: Reflinks) -> None:
        self.directory, self.reflinks, self.loops = directory, reflinks, FakeLoopDevices()
        self.volumes: dict[str, Image] = {}
        self.cuts: dict[str, Image] = {}
        self.written = 0
        self.start()

    def start(self) -> None:
        self.manager = Manager(settings_in(self.directory), self.loops, reflinks=self.reflinks)
        self.fault = Fault()
        add_points(self.manager.server, self.fault)

    def restart(self) -> None:
        self.manager.server.stop()
        self.start()

    def step(self, act: int, a: int, b: int, crash: int | None) -> None:
        """Do one thing. `a`, `b`: which names; `crash`: after which change the manager is killed."""
        acts: Sequence[Callable[[str, str], None]] = (
            *(self.save, self.write, self.write, self.cut, self.copy_volume, self.copy_cut),
            *(self.extend, self.delete, self.delete_cut, lambda a, b: self.restart()),
        )
        self.fault.number, self.fault.armed, self.fault.passed = crash, True, []
        try:
            acts[act % len(acts)](f"v{a % NAMES}", f"v{b % NAMES}")
        except Crash:
            self.manager.die()
            self.start()
            self.reconcile()
        self.fault.armed = False

    def save(self, name: str, _: str) -> None:
        self._make(name, lambda: self.manager.save(name, 1), lambda: Image(1))

    def copy_volume(self, name: str, source: str) -> None:
        if source in self.volumes and source != name:
            image = self.volumes[source]
            self._make(name, lambda: self.manager.clone(source, name, image.capacity), image.copy)

    def copy_cut(self, name: str, source: str) -> None:
        if source in self.cuts:
            image, identity = self.cuts[source].copy(), self.manager.snapshot(source)["uuid"]
            image.capacity += 1  # larger than the snapshot
            self._make(
                name,
                lambda: self.manager.clone(source, name, image.capacity, kind="snapshot", uuid=identity),
                image.copy,
            )

    def _make(self, name: str, request: Callable[[], Json], made: Callable[[], Image]) -> None:
        if name in self.volumes:
            assert not request()["success"]
            return
        self.volumes[name] = made()
        assert request()["success"]

    def write(self, name: str, other: str) -> None:
        if name in self.volumes:
            self.written += 1
            offset = PLACES[int(other[1:]) % len(PLACES)]
            self.volumes[name].blocks[offset] = self.written % 255 + 1
            with self.file(name).open("r+b") as file:
                os.pwrite(file.fileno(), bytes([self.written % 255 + 1]) * BLOCK, offset)

    def cut(self, name: str, source: str) -> None:
        if source in self.volumes and name not in self.cuts:
            self.cuts[name] = self.volumes[source].copy()
            assert self.manager.cut(name, source)["success"]

    def extend(self, name: str, _: str) -> None:
        if name in self.volumes:
            self.volumes[name].capacity += 1
            assert self.manager.extend(name, self.volumes[name].capacity)["success"]

    def delete(self, name: str, _: str) -> None:
        if name in self.volumes:
            answer = self.manager.delete(name)
            del self.volumes[name]
            assert answer["success"]

    def delete_cut(self, name: str, _: str) -> None:
        if name in self.cuts:
            answer = self.manager.delete_snapshot(name)
            del self.cuts[name]
            assert answer["success"]

    def file(self, name: str) -> Path:
        return self.manager.server.pool.file(self.manager.uuid(name))

    def reconcile(self) -> None:
        """Take over whether the request was carried out that the killed manager had not answered."""
        rows = {str(row["_id"]): row for row in self.manager.get("/volumes/all/0/0")}
        self.volumes = {name: image for name, image in self.volumes.items() if name in rows}
        for name, image in self.volumes.items():
            image.capacity = rows[name]["capacity"]
        cuts = {str(row["_id"]) for row in self.manager.get("/snapshots/all/0/0")}
        self.cuts = {name: image for name, image in self.cuts.items() if name in cuts}

    def check(self) -> None:
        pool, rows = self.manager.server.pool, self.manager.get("/volumes/all/0/0")
        cuts = self.manager.get("/snapshots/all/0/0")
        assert {row["_id"] for row in rows} == self.volumes.keys()
        assert {row["_id"] for row in cuts} == self.cuts.keys()
        assert all((row["action"], row["status"]) == ("none", "online") for row in rows)
        assert all(row["isReady"] for row in cuts)
        for row in rows:
            compare(pool.file(row["uuid"]), row, self.volumes[row["_id"]].blocks)
        for row in cuts:
            compare(pool.snapshot_file(row["uuid"]), row, self.cuts[row["_id"]].blocks)
        files = {path.name for path in (*pool.volumes.iterdir(), *pool.snapshots.iterdir())}
        assert files == {f"{row['uuid']}.img" for row in (*rows, *cuts)}

    def end(self) -> None:
        """Delete everything: nothing is left, and nothing stays accounted."""
        for name in [*self.volumes]:
            self.delete(name, "")
        for name in [*self.cuts]:
            self.delete_cut(name, "")
        self.check()
        totals = self.manager.server.allocator.totals
        assert (totals.volumes, totals.allocated, totals.shared) == (0, 0, 0)
        self.manager.server.stop()


def compare(file: Path, row: Json, blocks: Blocks) -> None:
    assert file.stat().st_size == row["blocks"] * row["blockSize"]
    with file.open("rb") as opened:
        for offset in PLACES:
            found = os.pread(opened.fileno(), BLOCK, offset)
            assert found == bytes([blocks.get(offset, 0)]) * BLOCK, (row["_id"], offset)


STEP = st.tuples(st.integers(0, 9), st.integers(0, NAMES - 1), st.integers(0, NAMES - 1), st.none() | st.integers(0, 4))


@given(steps=st.lists(STEP, max_size=40))
@settings(max_examples=int(EXAMPLES or 60), deadline=None, derandomize=EXAMPLES is None)
def test_no_history_with_crashes_mixes_up_the_content_of_volumes_snapshots_and_copies(
    steps: list[tuple[int, int, int, int | None]],
) -> None:
    with TemporaryDirectory() as directory:
        history = History(Path(directory), FakeReflinks())
        for act, a, b, crash in steps:
            history.step(act, a, b, crash)
            history.check()
        history.restart()
        history.check()
        history.end()
