# SPDX-License-Identifier: Apache-2.0
"""Changed blocks on a real xfs: whatever is done to a volume, no block that differs between two cuts is left out."""

from __future__ import annotations

import fcntl
import os
import random
import struct
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from csi_driver.embedded.changed_blocks import ChangedBlocks
from csi_driver.embedded.documents import SNAPSHOT_NOT_FOUND, ApiError
from csi_driver.embedded.layouts import BLOCK_SIZE, CONCATENATED, Layout
from csi_driver.embedded.model import NO_ACTION, SNAPSHOTS, Snapshot
from csi_driver.embedded.pool import Pool
from csi_driver.embedded.requests import ChangesQuery
from csi_driver.embedded.store import Store
from csi_driver.host.reflink import ReflinkedFiles
from csi_driver.host.syscalls import libc
from tests.reflink_pool import MIB, mounted

pytestmark = pytest.mark.root

VOLUME = "11111111-1111-1111-1111-111111111111"
HISTORIES = int(os.environ.get("NVMESH_CSI_HISTORIES", "150"))
_CUTS, _FIRST_BLOCKS = 4, 48
_PUNCH, _ZERO, _PREALLOCATE, _KEEP_SIZE = 0x2, 0x10, 0x0, 0x1
_FIDEDUPERANGE, _DEDUPED = 0xC0189436, 0


@dataclass
class World:
    """A pool whose volume is written to by hand."""

    pool: Pool
    store: Store
    cuts: list[Snapshot] = field(default_factory=list)

    @property
    def changed(self) -> ChangedBlocks:
        return ChangedBlocks(self.store, self.pool, ReflinkedFiles())

    def volume(self, size_bytes: int) -> Path:
        self.pool.remove(VOLUME)
        self.pool.make(VOLUME, size_bytes)
        return self.pool.file(VOLUME)

    def cut(self, volume: str = VOLUME) -> Snapshot:
        source, identity = self.pool.file(VOLUME), f"{len(self.cuts):08}-0000-0000-0000-000000000000"
        size_bytes = source.stat().st_size
        self.pool.reflink(source, self.pool.snapshot_file(identity), size_bytes, mode=0o400)
        layout = Layout(level=CONCATENATED)
        name = f"cut{len(self.cuts)}"
        snapshot = Snapshot(name, identity, "v", volume, size_bytes // BLOCK_SIZE, layout, {}, action=NO_ACTION)
        self.store.write(lambda change: change.put(SNAPSHOTS, name, snapshot))
        self.cuts.append(snapshot)
        return snapshot

    def forget(self) -> None:
        for cut in self.cuts:
            self.pool.snapshot_file(cut.uuid).unlink(missing_ok=True)
            self.store.write_later(lambda change, cut=cut: change.delete(SNAPSHOTS, cut.name))  # type: ignore[misc]
        self.cuts.clear()

    def ranges(
        self, target: Snapshot, base: Snapshot | None, *, offset: int = 0, count: int = 1000
    ) -> list[tuple[int, int]]:
        """Return all changes, page by page, and check what every answer promises."""
        found: list[tuple[int, int]] = []
        place: int | None = offset
        while place is not None:
            old = {} if base is None else {"base": base.name, "baseUuid": base.uuid}
            query = {"uuid": target.uuid, "offset": place, "count": min(count, 4096), **old}
            answer = self.changed.page(target.name, ChangesQuery.model_validate(query))
            ranges, following = answer["ranges"], answer["next"]
            assert isinstance(ranges, list)
            assert answer["bytes"] == target.bytes
            assert len(ranges) <= count
            for start, length in ranges:
                assert length > 0
                assert start >= max(place, found[-1][0] + found[-1][1] if found else 0)
                found.append((start, length))
            assert following is None or (isinstance(following, int) and place < following < target.bytes)
            assert following is None or not found or sum(found[-1]) <= following
            place = following
        assert not found or sum(found[-1]) <= target.bytes
        return found

    def content(self, cut: Snapshot) -> bytes:
        return self.pool.snapshot_file(cut.uuid).read_bytes()


@pytest.fixture(scope="module")
def worlds(tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    with mounted(tmp_path_factory.mktemp("changes")) as place:
        pool = Pool(place, reflinks=ReflinkedFiles())
        store = Store(pool.database)
        yield World(pool, store)
        store.close()
        pool.close()


@pytest.fixture
def world(worlds: World) -> Iterator[World]:
    yield worlds
    worlds.forget()


def allocate(fd: int, mode: int, offset: int, length: int) -> None:
    assert libc().fallocate(fd, mode, offset, length) == 0


def dedupe(fd: int, source: int, target: int) -> None:
    """Let two blocks of the file with equal content share one place on disk, as duperemove does."""
    request = struct.pack("=QQHHI", source, BLOCK_SIZE, 1, 0, 0) + struct.pack("=qQQiI", fd, target, 0, 0, 0)
    answer = bytearray(request)
    fcntl.ioctl(fd, _FIDEDUPERANGE, answer)
    assert struct.unpack_from("=i", answer, 24 + 24)[0] == _DEDUPED


def write_at_random(fd: int, chance: random.Random) -> None:
    """Do one thing to the volume that a user, a filesystem or an administrator does."""
    blocks = os.fstat(fd).st_size // BLOCK_SIZE
    first = chance.randrange(blocks)
    count = min(chance.choice((1, 1, 2, 7, 20)), blocks - first)
    offset, length = first * BLOCK_SIZE, count * BLOCK_SIZE
    match chance.choices(range(7), (50, 15, 10, 8, 8, 4, 5))[0]:
        case 0:
            os.pwrite(fd, os.urandom(length), offset)
        case 1:
            allocate(fd, _PUNCH | _KEEP_SIZE, offset, length)
        case 2:
            allocate(fd, _ZERO | _KEEP_SIZE, offset, length)
        case 3:
            allocate(fd, _PREALLOCATE, offset, length)
        case 4:
            os.pwrite(fd, bytes(length), offset)
        case 5:
            os.ftruncate(fd, (blocks + chance.randrange(1, 9)) * BLOCK_SIZE)
        case 6:
            other = chance.randrange(blocks) * BLOCK_SIZE
            os.pwrite(fd, os.pread(fd, BLOCK_SIZE, offset), other)
            os.fsync(fd)
            if other != offset:
                dedupe(fd, offset, other)


def differing(base: bytes, target: bytes) -> set[int]:
    """Return the numbers of the blocks that differ; those behind the end of the base do."""
    places = (slice(start, start + BLOCK_SIZE) for start in range(0, len(target), BLOCK_SIZE))
    return {place.start // BLOCK_SIZE for place in places if base[place] != target[place]}


def blocks_of(ranges: list[tuple[int, int]]) -> set[int]:
    return {
        block for offset, length in ranges for block in range(offset // BLOCK_SIZE, -(-(offset + length) // BLOCK_SIZE))
    }


def test_no_changed_block_is_left_out_in_any_history(world: World) -> None:
    reported = changed = 0
    for number in range(HISTORIES):
        chance = random.Random(number)
        file = world.volume(_FIRST_BLOCKS * BLOCK_SIZE)
        fd = os.open(file, os.O_RDWR)
        try:
            for _ in range(_CUTS):
                for _ in range(chance.randrange(12)):
                    write_at_random(fd, chance)
                world.cut()
        finally:
            os.close(fd)
        contents = [world.content(cut) for cut in world.cuts]
        for later in range(_CUTS):
            target, count = world.cuts[later], chance.choice((1, 3, 1000))
            data = blocks_of(world.ranges(target, None, count=count))
            assert differing(bytes(len(contents[later])), contents[later]) <= data, f"history {number}, cut {later}"
            for earlier in range(later):
                found = blocks_of(world.ranges(target, world.cuts[earlier], count=count))
                wanted = differing(contents[earlier], contents[later])
                assert wanted <= found, f"history {number}, from cut {earlier} to {later}: {sorted(wanted - found)}"
                reported, changed = reported + len(found), changed + len(wanted)
        world.forget()
    # Blocks that were written with what they had, and zeros over holes, are reported without need.
    assert changed <= reported < 1.6 * changed


def test_a_discarded_block_has_changed(world: World) -> None:
    with world.volume(16 * BLOCK_SIZE).open("r+b", buffering=0) as file:
        file.write(os.urandom(16 * BLOCK_SIZE))
        base = world.cut()
        allocate(file.fileno(), _PUNCH | _KEEP_SIZE, 4 * BLOCK_SIZE, 2 * BLOCK_SIZE)
        target = world.cut()
    assert world.ranges(target, base) == [(4 * BLOCK_SIZE, 2 * BLOCK_SIZE)]
    assert world.ranges(target, None) == [(0, 4 * BLOCK_SIZE), (6 * BLOCK_SIZE, 10 * BLOCK_SIZE)]


def test_the_tail_of_an_expanded_volume_has_changed(world: World) -> None:
    with world.volume(16 * BLOCK_SIZE).open("r+b", buffering=0) as file:
        file.write(os.urandom(16 * BLOCK_SIZE))
        base = world.cut()
        os.ftruncate(file.fileno(), 24 * BLOCK_SIZE)
        target = world.cut()
    assert world.ranges(target, base) == [(16 * BLOCK_SIZE, 8 * BLOCK_SIZE)]


def test_space_without_data_has_not_changed_and_is_not_data(world: World) -> None:
    with world.volume(16 * BLOCK_SIZE).open("r+b", buffering=0) as file:
        base = world.cut()
        allocate(file.fileno(), _PREALLOCATE, 0, 16 * BLOCK_SIZE)
        target = world.cut()
    assert world.ranges(target, base) == []
    assert world.ranges(target, None) == []


def test_a_page_begins_inside_of_an_extent(world: World) -> None:
    with world.volume(16 * BLOCK_SIZE).open("r+b", buffering=0) as file:
        base = world.cut()
        file.write(os.urandom(16 * BLOCK_SIZE))
        target = world.cut()
    assert world.ranges(target, base, offset=5 * BLOCK_SIZE) == [(5 * BLOCK_SIZE, 11 * BLOCK_SIZE)]
    assert world.ranges(target, None, offset=5 * BLOCK_SIZE) == [(5 * BLOCK_SIZE, 11 * BLOCK_SIZE)]


def test_maps_of_more_extents_than_a_page_are_complete(world: World) -> None:
    blocks = 2 * 5000
    with world.volume(blocks * BLOCK_SIZE).open("r+b", buffering=0) as file:
        for block in range(0, blocks, 2):
            os.pwrite(file.fileno(), b"x" * BLOCK_SIZE, block * BLOCK_SIZE)
        base = world.cut()
        for block in range(2, blocks, 6):
            os.pwrite(file.fileno(), b"y" * BLOCK_SIZE, block * BLOCK_SIZE)
        target = world.cut()
    assert blocks_of(world.ranges(target, base, count=blocks)) == set(range(2, blocks, 6))
    assert blocks_of(world.ranges(target, None, count=blocks)) == set(range(0, blocks, 2))


def test_the_rest_of_an_extent_that_was_written_to_has_not_changed(world: World) -> None:
    with world.volume(16 * BLOCK_SIZE).open("r+b", buffering=0) as file:
        file.write(os.urandom(16 * BLOCK_SIZE))
        base = world.cut()
        os.pwrite(file.fileno(), os.urandom(4 * BLOCK_SIZE), 0)
        os.fsync(file.fileno())
        target = world.cut()
    assert world.ranges(target, base) == [(0, 4 * BLOCK_SIZE)]


def test_the_same_cut_has_no_changes(world: World) -> None:
    with world.volume(16 * MIB).open("r+b", buffering=0) as file:
        file.write(os.urandom(MIB))
        cut = world.cut()
    assert world.ranges(cut, cut) == []


def test_a_base_that_was_deleted_is_not_guessed_at(world: World) -> None:
    world.volume(16 * BLOCK_SIZE)
    base, target = world.cut(), world.cut()
    world.store.write(lambda change: change.delete(SNAPSHOTS, base.name))
    with pytest.raises(ApiError) as refusal:
        world.ranges(target, base)
    assert refusal.value.error["id"] == SNAPSHOT_NOT_FOUND


def test_another_snapshot_of_the_name_of_the_base_is_not_the_base(world: World) -> None:
    world.volume(16 * BLOCK_SIZE)
    base, target = world.cut(), world.cut()
    with pytest.raises(ApiError) as refusal:
        world.changed.page(
            target.name, ChangesQuery.model_validate({"uuid": target.uuid, "base": base.name, "baseUuid": VOLUME})
        )
    assert refusal.value.error["id"] == SNAPSHOT_NOT_FOUND


def test_snapshots_of_two_volumes_are_not_compared(world: World) -> None:
    world.volume(16 * BLOCK_SIZE)
    base, target = world.cut(), world.cut(volume="22222222-2222-2222-2222-222222222222")
    with pytest.raises(ApiError, match="are not of the same volume"):
        world.ranges(target, base)
