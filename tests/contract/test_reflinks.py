# SPDX-License-Identifier: Apache-2.0
"""Reflinks of this machine's filesystems, as the pool uses them, and the refusal where there are none."""

from __future__ import annotations

import errno
import os
import random
from collections.abc import Iterator
from contextlib import AbstractContextManager
from pathlib import Path

import pytest

from csi_driver.embedded.pool import Pool
from csi_driver.errors import SystemCallFailed
from csi_driver.host.reflink import ReflinkedFiles
from tests.property.test_embedded_content import NAMES, History
from tests.reflink_pool import EXT4, MIB, fill, in_memory, mounted

pytestmark = pytest.mark.root
IDENTITY = "11111111-1111-1111-1111-111111111111"


@pytest.fixture
def pool(tmp_path: Path) -> Iterator[Pool]:
    with mounted(tmp_path) as place:
        pool = Pool(place, reflinks=ReflinkedFiles())
        yield pool
        pool.close()


def write(file: Path, text: bytes, offset: int = 0) -> None:
    with file.open("r+b") as opened:
        opened.seek(offset)
        opened.write(text)


def test_a_reflink_has_the_content_of_its_source_and_shares_its_blocks(pool: Pool) -> None:
    pool.make(IDENTITY, 100 * MIB)
    source, target = pool.file(IDENTITY), pool.snapshot_file(IDENTITY)
    write(source, os.urandom(40 * MIB))
    pool.sync(source)
    free_bytes = pool.free_bytes()
    assert pool.reflink(source, target, 100 * MIB, mode=0o400) == 40 * MIB
    assert target.read_bytes() == source.read_bytes()
    assert target.stat().st_mode & 0o777 == 0o400
    assert free_bytes - pool.free_bytes() < MIB


def test_a_reflink_keeps_its_content_when_its_source_is_written_and_removed(pool: Pool) -> None:
    pool.make(IDENTITY, MIB)
    source, target = pool.file(IDENTITY), pool.snapshot_file(IDENTITY)
    write(source, b"before")
    pool.reflink(source, target, MIB)
    write(source, b"after!")
    assert (source.read_bytes()[:6], target.read_bytes()[:6]) == (b"after!", b"before")
    pool.remove(IDENTITY)
    assert target.read_bytes()[:6] == b"before"


def test_a_reflink_of_a_larger_size_ends_in_zeros(pool: Pool) -> None:
    pool.make(IDENTITY, MIB)
    write(pool.file(IDENTITY), b"x" * MIB)
    pool.reflink(pool.file(IDENTITY), pool.file("larger"), 3 * MIB)
    assert pool.file("larger").read_bytes() == b"x" * MIB + bytes(2 * MIB)


def test_the_extents_of_a_file_are_counted(pool: Pool) -> None:
    pool.make(IDENTITY, 4 * MIB)
    file = pool.file(IDENTITY)
    assert pool.count_extents(file) == 0
    for number in range(20):
        write(file, b"x" * 4096, number * 128 * 1024)
    assert pool.count_extents(file) == 20


def test_the_rest_of_a_crash_is_replaced(pool: Pool) -> None:
    pool.make(IDENTITY, MIB)
    target = pool.snapshot_file(IDENTITY)
    left = target.with_name(f"{target.name}.cutting")
    left.write_bytes(b"half")
    pool.reflink(pool.file(IDENTITY), target, MIB)
    assert target.stat().st_size == MIB
    assert list(pool.snapshots.iterdir()) == [target]


@pytest.mark.parametrize("place", [lambda path: mounted(path, EXT4), in_memory], ids=["ext4", "tmpfs"])
def test_a_filesystem_without_reflinks_is_found_out_and_nothing_is_copied(tmp_path: Path, place: object) -> None:
    assert callable(place)
    filesystem: AbstractContextManager[Path] = place(tmp_path)
    with filesystem as directory:
        pool = Pool(directory, reflinks=ReflinkedFiles())
        assert "has no reflinks" in pool.why_no_reflinks
        pool.make(IDENTITY, MIB)
        with pytest.raises(SystemCallFailed) as refusal:
            pool.reflink(pool.file(IDENTITY), pool.snapshot_file(IDENTITY), MIB)
        assert refusal.value.errno == errno.EOPNOTSUPP
        assert not list(pool.snapshots.iterdir())
        pool.close()


def test_reflinks_are_found_on_a_full_filesystem(tmp_path: Path) -> None:
    with mounted(tmp_path) as place:
        Pool(place).close()  # makes the directories, for which a full filesystem may have no space
        fill(place)
        pool = Pool(place, reflinks=ReflinkedFiles())
        assert pool.why_no_reflinks == ""
        pool.close()


def test_a_larger_reflink_is_preallocated_where_volumes_are(tmp_path: Path) -> None:
    with mounted(tmp_path) as place:
        pool = Pool(place, preallocate=True, reflinks=ReflinkedFiles())
        pool.make(IDENTITY, 10 * MIB)
        target = pool.snapshot_file(IDENTITY)
        pool.reflink(pool.file(IDENTITY), target, 30 * MIB)
        assert pool.occupied_bytes(target) == 30 * MIB
        pool.close()


def test_no_history_with_crashes_mixes_up_content_on_real_reflinks(tmp_path: Path) -> None:
    chance = random.Random(1)
    with mounted(tmp_path) as place:
        for number in range(8):
            directory = place / str(number)
            directory.mkdir()
            history = History(directory, ReflinkedFiles())
            for _ in range(60):
                crash = chance.choice([None, None, *range(5)])
                history.step(chance.randrange(10), chance.randrange(NAMES), chance.randrange(NAMES), crash)
                history.check()
            history.end()
