# SPDX-License-Identifier: Apache-2.0
"""Sizes come out as the management's, and the pool is never allocated twice."""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from csi_driver.embedded.allocator import Allocator, NoSpace, PoolTooLarge
from csi_driver.embedded.layouts import BUILT_IN_GROUPS, Layout
from csi_driver.embedded.model import VOLUMES, Volume
from csi_driver.embedded.pool import Pool
from csi_driver.embedded.store import Change, Store
from tests.fakes.clock import FakeClock
from tests.unit.embedded.fake_loops import FakeLoopDevices
from tests.unit.embedded.manager import GB, Manager, running, settings_in

MIB = 1 << 20

# Sizes that the management server answered.
RECORDED = [
    ("DEFAULT_CONCATENATED_VPG", 10, 2441216),
    ("DEFAULT_CONCATENATED_VPG", 1, 243968),
    ("DEFAULT_RAID_1_VPG", 2.5, 610304),
    ("DEFAULT_RAID_10_VPG", 1, 243712),
    ("DEFAULT_RAID_1_VPG", 20, 4882688),
    ("DEFAULT_RAID_1_VPG", 5, 1220608),
]
# Granules in MiB: stripe width x data blocks, once more x data blocks for striped erasure coding.
GRANULES = {
    "DEFAULT_CONCATENATED_VPG": 1,
    "DEFAULT_RAID_0_VPG": 2,
    "DEFAULT_RAID_1_VPG": 1,
    "DEFAULT_RAID_10_VPG": 2,
    "DEFAULT_EC_DUAL_TARGET_REDUNDANCY_VPG": 8,
    "DEFAULT_EC_SINGLE_TARGET_REDUNDANCY_VPG": 8,
    "DEFAULT_STRIPED_EC_DUAL_TARGET_REDUNDANCY_VPG": 128,
    "DEFAULT_METADATA_RAID_1_VPG": 1,
}


@pytest.mark.parametrize(("group", "capacity", "blocks"), RECORDED)
def test_sizes_are_the_recorded_ones(group: str, capacity: float, blocks: int) -> None:
    assert BUILT_IN_GROUPS[group].blocks_of(capacity) == blocks


@pytest.mark.parametrize("group", BUILT_IN_GROUPS)
def test_granules_are_those_of_the_layouts(group: str) -> None:
    assert BUILT_IN_GROUPS[group].granule_blocks * 4096 == GRANULES[group] * MIB


@given(st.sampled_from(sorted(BUILT_IN_GROUPS)), st.integers(1 * GB, 10_000 * GB))
def test_half_a_granule_more_is_never_short_and_never_over(group: str, wanted: int) -> None:
    layout: Layout = BUILT_IN_GROUPS[group]
    granule = GRANULES[group] * MIB
    count = math.ceil(wanted / granule)
    assert layout.blocks_of((count * granule + granule / 2) / GB) * 4096 == count * granule


def test_an_extension_is_rounded_by_itself(manager: Manager) -> None:
    manager.save("data", 10)
    manager.extend("data", 12)
    concatenated = BUILT_IN_GROUPS["DEFAULT_CONCATENATED_VPG"]
    assert manager.volume("data")["blocks"] == 2441216 + concatenated.blocks_of(2)
    assert manager.volume("data")["capacity"] == 12


@pytest.mark.parametrize("capacity", [0.5, 1, 1.0005])
def test_an_extension_below_a_granule_is_refused(manager: Manager, capacity: float) -> None:
    manager.save("data", 1)
    answer = manager.extend("data", max(capacity, 1))
    assert answer["error"]["id"] == 1673


def test_a_volume_too_large_is_refused_as_not_allocated(manager: Manager) -> None:
    answer = manager.save("data", 101)
    assert (answer["error"]["id"], answer["error"]["innerMessage"]) == (1664, "Failed to allocate")
    assert not manager.server.pool.identities()


def test_an_extension_too_large_is_refused(manager: Manager) -> None:
    manager.save("data", 60)
    assert manager.extend("data", 110)["error"]["id"] == 1675
    assert manager.volume("data")["capacity"] == 60


@pytest.mark.parametrize(
    ("group", "targets"), [("DEFAULT_RAID_1_VPG", 2), ("DEFAULT_STRIPED_EC_DUAL_TARGET_REDUNDANCY_VPG", 10)]
)
def test_redundancy_is_refused_on_one_machine_with_the_reason(manager: Manager, group: str, targets: int) -> None:
    error = manager.save("data", VPG=group)["error"]
    assert (error["id"], error["innerMessage"]) == (1664, "Failed to allocate")
    assert error["message"].endswith(f"the layout needs {targets} targets, this pool has 1")


def free_blocks(manager: Manager) -> int:
    """Return the raw free blocks, from the drives of all targets."""
    return sum(drive["availableBlocks"] for target in manager.get("/servers/all/0/0") for drive in target["disks"])


def test_the_free_space_is_told_to_the_block(manager: Manager) -> None:
    assert free_blocks(manager) == 100 * GB // 4096


def test_targets_share_the_pool_and_have_drives_of_their_own(redundant: Manager) -> None:
    drives = [drive for target in redundant.get("/servers/all/0/0") for drive in target["disks"]]
    assert len({drive["diskID"] for drive in drives}) == 10
    assert {drive["usableBlocks"] for drive in drives} == {100 * GB // 4096 // 10}


def test_redundancy_is_allocated_with_pretended_targets(redundant: Manager) -> None:
    assert redundant.save("data", 10, VPG="DEFAULT_RAID_1_VPG")["success"]
    free = 100 * GB // 4096 - 2 * redundant.volume("data")["blocks"]
    assert free_blocks(redundant) == free // 10 * 10


def test_nothing_is_allocated_below_the_reserve(tmp_path: Path) -> None:
    with running(settings_in(tmp_path, reserve_bytes=1 << 60)) as manager:
        assert manager.save("data", 1)["error"]["innerMessage"] == "Failed to allocate"


def test_a_pool_larger_than_what_is_free_needs_overcommitment(tmp_path: Path) -> None:
    with pytest.raises(PoolTooLarge), running(settings_in(tmp_path, size_bytes=1 << 60, overcommit=False)):
        pass


def test_the_pool_is_what_was_free_at_first_start(tmp_path: Path) -> None:
    with running(settings_in(tmp_path, size_bytes=None, overcommit=False)) as manager:
        first = manager.server.allocator.size_bytes
        assert 0 < first <= manager.server.pool.free_bytes() + 64 * MIB
    (tmp_path / "ballast").write_bytes(b"x" * MIB)
    with running(settings_in(tmp_path, size_bytes=None, overcommit=False)) as manager:
        assert manager.server.allocator.size_bytes == first


# --- many files -------------------------------------------------------------------------------------------


class Disk(Pool):
    """A pool with the free bytes and the occupied bytes of each file as plain numbers."""

    def __init__(self, directory: Path, clock: FakeClock, free: int) -> None:
        super().__init__(directory)
        self.clock, self.free, self.given = clock, free, dict[str, int]()
        self.looks = 0

    def free_bytes(self) -> int:
        return self.free

    def allocated_bytes(self) -> dict[str, int]:
        self.looks += 1
        self.clock.sleep(0.1)
        return dict(self.given)

    def move(self, identity: str, size: int) -> None:
        """Write that many bytes to a volume, or trim them where it is negative."""
        self.given[identity] = self.given.get(identity, 0) + size
        self.free -= size


class Account:
    """An allocator on such a pool, of 100 GB, with volumes recorded as the manager does."""

    def __init__(self, directory: Path, free: int) -> None:
        self.clock = FakeClock(1000.0)
        self.disk = Disk(directory / "pool", self.clock, 100 * GB)
        self.store = Store(self.disk.database)
        self.allocator = Allocator(settings_in(directory, overcommit=False), self.disk, self.store, self.clock)
        self.disk.free = free
        self.disk.looks = 0

    def close(self) -> None:
        self.store.close()
        self.disk.close()

    def make(self, name: str, size_gb: float) -> bool:
        layout = BUILT_IN_GROUPS["DEFAULT_CONCATENATED_VPG"]

        def put(change: Change) -> None:
            blocks = self.allocator.allocate(change, layout, size_gb)
            volume = Volume(name, name, size_gb, (blocks,), layout, None, {})
            self.allocator.record(change, volume)

        try:
            self.store.write(put)
        except NoSpace:
            return False
        return True

    def delete(self, name: str) -> None:
        volume = self.store.get(VOLUMES, name)
        if volume is not None:
            self.disk.free += self.disk.given.pop(name, 0)
            self.store.write(lambda change: self.allocator.record(change, None, volume))


@pytest.fixture
def many(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Account]:
    monkeypatch.setattr("csi_driver.embedded.allocator._FEW", 0)
    account = Account(tmp_path, 40 * GB)
    yield account
    account.close()


def test_a_burst_looks_at_many_files_once(many: Account) -> None:
    assert many.make("written", 30)
    many.disk.move("written", 30 * GB)
    assert [many.make(f"v{number}", 1) for number in range(15)] == [True] * 10 + [False] * 5
    assert many.disk.looks == 1


def test_many_files_are_looked_at_again_after_a_while(many: Account) -> None:
    assert many.make("written", 30)
    assert not many.make("next", 11)
    many.disk.move("written", 30 * GB)
    assert not many.make("next", 8)
    many.clock.sleep(10)
    assert many.make("next", 8)
    assert many.disk.looks == 2


def test_what_others_write_between_two_looks_is_not_allocated(many: Account) -> None:
    assert many.make("written", 30)
    many.disk.move("written", 20 * GB)
    assert many.make("first", 5)
    many.disk.free -= 5 * GB
    assert not many.make("second", 1)
    assert many.disk.looks == 1


def test_what_a_file_has_beyond_its_volume_makes_no_room(many: Account) -> None:
    """An extension for which the space was not there leaves blocks behind: a file never becomes shorter."""
    assert many.make("first", 10)
    assert many.make("second", 10)
    many.disk.move("first", 30 * GB)
    many.clock.sleep(10)
    assert not many.make("third", 1)


@pytest.mark.parametrize("by", ["trim", "delete"])
def test_what_becomes_free_between_two_looks_is_counted_once(many: Account, by: str) -> None:
    assert many.make("written", 20)
    many.disk.move("written", 20 * GB)
    assert many.make("looked", 19)
    if by == "trim":
        many.disk.move("written", -20 * GB)
    else:
        many.delete("written")
    assert many.make("next", 18) is (by == "delete")
    assert many.disk.looks == 1


things = st.one_of(
    st.tuples(st.sampled_from(["make", "write", "trim", "delete"]), st.sampled_from("abcde"), st.integers(1, 20)),
    st.tuples(st.just("wait"), st.just(""), st.integers(1, 3)),
)


@settings(max_examples=40, deadline=None)
@given(st.lists(things, max_size=40), st.booleans())
def test_what_is_allocated_can_be_written_whatever_was_looked_at_when(
    tmp_path_factory: pytest.TempPathFactory, steps: list[tuple[str, str, int]], few: bool
) -> None:
    """Only the volumes are written here, so each allocated byte can be written."""
    account = Account(tmp_path_factory.mktemp("pool"), 40 * GB)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("csi_driver.embedded.allocator._FEW", 100 if few else 0)
        for verb, name, number in steps:
            volume, given = account.store.get(VOLUMES, name), account.disk.given.get(name, 0)
            if verb == "make" and volume is None:
                account.make(name, number)
            elif verb == "write" and volume is not None:
                account.disk.move(name, min(number * GB, volume.bytes - given))
            elif verb == "trim":
                account.disk.move(name, -min(number * GB, given))
            elif verb == "delete":
                account.delete(name)
            elif verb == "wait":
                account.clock.sleep(number)
            owed = sum(volume.bytes - account.disk.given.get(volume.name, 0) for volume in account.store.all(VOLUMES))
            assert owed <= account.disk.free
    account.close()


# --- any order of requests --------------------------------------------------------------------------------

names = st.sampled_from(["a", "b", "c", "d", "e"])
sizes = st.floats(1, 40, allow_nan=False)
groups = st.sampled_from(sorted(BUILT_IN_GROUPS))
actions = st.one_of(
    st.tuples(st.just("save"), names, sizes, groups),
    st.tuples(st.just("extend"), names, sizes, groups),
    st.tuples(st.just("delete"), names, sizes, groups),
)


@settings(max_examples=20, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(actions, max_size=25))
def test_the_pool_is_never_allocated_twice(
    tmp_path_factory: pytest.TempPathFactory, steps: list[tuple[str, str, float | str, str]]
) -> None:
    with running(settings_in(tmp_path_factory.mktemp("pool"), pretend_targets=10), FakeLoopDevices()) as manager:
        for verb, name, size, group in steps:
            there = "uuid" in manager.volume(name) and manager.volume(name)["uuid"] is not None
            if verb == "save":
                manager.save(name, size, VPG=group)
            elif there and verb == "extend":
                manager.extend(name, size)
            elif there:
                manager.delete(name)
            assert allocated_bytes_of(manager) <= 100 * GB
        for row in manager.get("/volumes/all/0/0"):
            manager.delete(row["_id"])
        assert manager.server.allocator.totals.allocated == 0


def allocated_bytes_of(manager: Manager) -> int:
    """Return the raw bytes of all volumes, from their documents alone."""
    owed = 0
    for row in manager.get("/volumes/all/0/0"):
        copies = 1 + row.get("numberOfMirrors", 0) + row.get("parityBlocks", 0) / row.get("dataBlocks", 1)
        owed += math.ceil(row["blocks"] * copies) * 4096
    return owed
