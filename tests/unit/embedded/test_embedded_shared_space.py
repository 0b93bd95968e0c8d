# SPDX-License-Identifier: Apache-2.0
"""What was promised to volumes can be written, also where their blocks are shared with snapshots and copies."""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from csi_driver.embedded.allocator import Allocator, NoSpace
from csi_driver.embedded.layouts import BUILT_IN_GROUPS
from csi_driver.embedded.model import VOLUMES, Source, Volume
from csi_driver.embedded.pool import Pool
from csi_driver.embedded.store import Change, Store
from tests.fakes.clock import FakeClock
from tests.unit.embedded.manager import GB, settings_in

UNIT = 1 << 30
FREE_UNITS = 40
LAYOUT = BUILT_IN_GROUPS["DEFAULT_CONCATENATED_VPG"]
File = list[int | None]
"""The block of each unit of a file; None = a hole."""


class SharedDisk(Pool):
    """A pool on a filesystem of 40 units whose files share blocks. Only the volumes are written."""

    def __init__(self, directory: Path, clock: FakeClock) -> None:
        super().__init__(directory)
        self.clock = clock
        self.files: dict[str, File] = {}
        self.frozen: dict[str, File] = {}
        self._new = itertools.count()

    def free_units(self) -> int:
        blocks = {block for file in (*self.files.values(), *self.frozen.values()) for block in file}
        return FREE_UNITS - len(blocks - {None})

    def free_bytes(self) -> int:
        return self.free_units() * UNIT

    def allocated_bytes(self) -> dict[str, int]:
        self.clock.sleep(0.1)
        return {name: self.occupied(name) for name in self.files}

    def occupied(self, name: str) -> int:
        return UNIT * sum(block is not None for block in self.files[name])

    def write(self, name: str, units: int) -> None:
        shared = Counter(block for file in (*self.files.values(), *self.frozen.values()) for block in file)
        for place, block in enumerate(self.files[name][:units]):
            if block is None or shared[block] > 1:
                self.files[name][place] = next(self._new)

    def trim(self, name: str, units: int) -> None:
        self.files[name][:units] = [None] * len(self.files[name][:units])

    def still_needed_units(self) -> int:
        """Return the blocks that the volumes need if everything is written, by the rules of copies on write."""
        users = Counter(block for file in self.files.values() for block in file)
        frozen = {block for file in self.frozen.values() for block in file}
        holes = users.pop(None, 0)
        return holes + sum(count if block in frozen else count - 1 for block, count in users.items())


class Account:
    def __init__(self, directory: Path) -> None:
        self.clock = FakeClock(1000.0)
        self.disk = SharedDisk(directory / "pool", self.clock)
        self.store = Store(self.disk.database)
        options = settings_in(directory, overcommit=False, size_bytes=FREE_UNITS * UNIT)
        self.allocator = Allocator(options, self.disk, self.store, self.clock)

    def close(self) -> None:
        self.store.close()
        self.disk.close()

    def make(self, name: str, units: int, source: File | None = None) -> None:
        occupied = sum(block is not None for block in source or ())

        def put(change: Change) -> None:
            blocks = self.allocator.allocate(change, LAYOUT, (units + 0.0001) * UNIT / GB)
            origin = Source("snapshot", "s", "s") if source is not None else None
            shared = occupied * UNIT // 4096
            made = Volume(name, name, 1, (blocks,), LAYOUT, None, {}, source=origin, shared_blocks=shared)
            self.allocator.record(change, made)

        if name not in self.disk.files and len(source or ()) <= units:
            self.store.write(put)
            self.disk.files[name] = [*(source or ()), *[None] * (units - len(source or ()))]

    def volume(self, change: Change, name: str) -> Volume:
        volume = change.get(VOLUMES, name)
        assert volume is not None
        return volume

    def cut(self, name: str, snapshot: str) -> None:
        if snapshot not in self.disk.frozen:
            occupied = self.disk.occupied(name)
            self.store.write(lambda change: self.allocator.reserve(change, self.volume(change, name), occupied))
            self.disk.frozen[snapshot] = list(self.disk.files[name])

    def delete(self, name: str) -> None:
        del self.disk.files[name]
        self.store.write(lambda change: self.allocator.record(change, None, self.volume(change, name)))

    def forget(self, snapshot: str) -> None:
        if self.disk.frozen.pop(snapshot, None) is not None and snapshot[0] in self.disk.files:
            volume = self.store.get(VOLUMES, snapshot[0])
            assert volume is not None
            if volume.snapshots:  # else it is a later volume of this name
                self.store.write(lambda change: self.allocator.release(change, self.volume(change, snapshot[0])))


names = st.sampled_from("abc")
steps_of = st.one_of(
    st.tuples(st.sampled_from(["make", "write", "trim"]), names, st.integers(1, 12)),
    st.tuples(st.sampled_from(["cut", "forget", "copy"]), names, st.integers(1, 3)),
    st.tuples(st.sampled_from(["delete", "wait"]), names, st.integers(1, 3)),
)


@settings(max_examples=100, deadline=None)
@given(st.lists(steps_of, max_size=40), st.booleans())
def test_what_is_promised_can_be_written_whatever_is_shared(
    tmp_path_factory: pytest.TempPathFactory, steps: list[tuple[str, str, int]], few: bool
) -> None:
    account = Account(tmp_path_factory.mktemp("pool"))
    disk = account.disk
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("csi_driver.embedded.allocator._FEW", 100 if few else 0)
        for verb, name, number in steps:
            snapshot = f"{name}{number}"
            try:
                if verb == "make":
                    account.make(name, number)
                elif verb == "copy" and snapshot in disk.frozen:
                    other = next((each for each in "def" if each not in disk.files), "")
                    if other:
                        account.make(other, len(disk.frozen[snapshot]) + 1, list(disk.frozen[snapshot]))
                elif verb == "wait":
                    account.clock.sleep(number)
                elif verb == "forget":
                    account.forget(snapshot)
                elif name in disk.files:
                    act(account, verb, name, number)
            except NoSpace:
                pass
            assert disk.still_needed_units() <= disk.free_units(), (verb, name, number)
    account.close()


def act(account: Account, verb: str, name: str, number: int) -> None:
    match verb:
        case "write":
            account.disk.write(name, number)
        case "trim":
            account.disk.trim(name, number)
        case "cut":
            account.cut(name, f"{name}{number}")
        case "delete":
            account.delete(name)
            # Snapshots of a deleted volume stay; a later volume of this name has others.
            for snapshot in [each for each in account.disk.frozen if each[0] == name]:
                account.disk.frozen[f"_{name}{len(account.disk.frozen)}"] = account.disk.frozen.pop(snapshot)


@pytest.fixture
def account(tmp_path: Path) -> Iterator[Account]:
    account = Account(tmp_path)
    yield account
    account.close()


def test_a_full_volume_has_as_many_snapshots_as_fit_with_its_changes_between_them(account: Account) -> None:
    account.make("a", 10)
    account.disk.write("a", 10)
    for number in range(21):
        account.cut("a", f"a{number}")
        account.disk.write("a", 1)
    assert account.disk.free_units() == FREE_UNITS - 10 - 21
    with pytest.raises(NoSpace):
        account.cut("a", "a21")


def test_a_cut_without_room_for_the_writes_after_it_is_refused(account: Account) -> None:
    account.make("a", 25)
    account.disk.write("a", 25)
    with pytest.raises(NoSpace):
        account.cut("a", "a1")
    account.disk.trim("a", 10)
    account.cut("a", "a1")
    assert replace(account.allocator.totals, volumes=0, data=0).shared == 15 * UNIT // 4096


def test_blocks_that_a_deleted_volume_leaves_to_its_snapshot_are_not_promised_again(
    account: Account, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("csi_driver.embedded.allocator._FEW", 0)
    account.make("a", 10)
    account.disk.write("a", 10)
    account.cut("a", "a1")
    account.make("b", 15)  # looks at the files
    account.delete("a")
    with pytest.raises(NoSpace):
        account.make("c", 16)
    account.make("c", 15)


def test_a_copy_without_snapshots_still_shares_blocks_with_its_source(account: Account) -> None:
    account.make("a", 10)
    account.disk.write("a", 10)
    account.cut("a", "a1")
    account.make("c", 10, list(account.disk.frozen["a1"]))
    account.cut("c", "c1")
    account.forget("c1")
    assert account.allocator.totals.shared == 20 * UNIT // 4096
    account.forget("a1")
    assert account.allocator.totals.shared == 10 * UNIT // 4096
