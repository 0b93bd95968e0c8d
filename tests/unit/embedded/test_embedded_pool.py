# SPDX-License-Identifier: Apache-2.0
"""The files of a pool."""

from __future__ import annotations

import errno
import os
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from csi_driver.embedded.pool import Pool
from csi_driver.errors import SystemCallFailed
from tests.unit.embedded.manager import running, settings_in

IDENTITY = "0f0e0d0c-0000-4000-8000-000000000000"
MIB = 1 << 20


def test_a_file_never_becomes_shorter(tmp_path: Path) -> None:
    pool = Pool(tmp_path)
    pool.make(IDENTITY, 4 * MIB)
    pool.make(IDENTITY, MIB)
    assert pool.file(IDENTITY).stat().st_size == 4 * MIB
    pool.close()


def test_a_file_is_sparse_unless_preallocated(tmp_path: Path) -> None:
    for preallocate, used in ((False, 0), (True, MIB)):
        pool = Pool(tmp_path / str(preallocate), preallocate=preallocate)
        pool.make(IDENTITY, MIB)
        assert pool.allocated_bytes() == {IDENTITY: used}
        pool.close()


def test_a_preallocated_file_keeps_its_data_when_it_grows(tmp_path: Path) -> None:
    pool = Pool(tmp_path, preallocate=True)
    pool.make(IDENTITY, MIB)
    with pool.file(IDENTITY).open("r+b") as file:
        file.write(b"precious")
    pool.make(IDENTITY, 2 * MIB)
    assert pool.file(IDENTITY).read_bytes()[:8] == b"precious"
    pool.close()


def test_a_link_in_place_of_a_file_is_not_followed(tmp_path: Path) -> None:
    pool = Pool(tmp_path)
    target = tmp_path / "elsewhere"
    target.write_bytes(b"x")
    pool.file(IDENTITY).symlink_to(target)
    with pytest.raises(Exception, match="ELOOP"):
        pool.make(IDENTITY, MIB)
    assert target.read_bytes() == b"x"
    pool.close()


def test_space_that_the_file_system_does_not_have_is_not_allocated(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(descriptor: int, start: int, length: int) -> None:
        raise OSError(errno.ENOSPC, "full")

    with running(settings_in(tmp_path, preallocate=True)) as manager:
        monkeypatch.setattr(os, "posix_fallocate", lambda descriptor, start, length: os.ftruncate(descriptor, length))
        manager.save("there")
        monkeypatch.setattr(os, "posix_fallocate", full)
        assert manager.save("data")["error"]["innerMessage"] == "Failed to allocate"
        assert manager.extend("there", 5)["error"]["id"] == 1675
        assert manager.volume("there")["capacity"] == 1
        assert manager.server.allocator.totals.volumes == 1
        assert len(manager.server.pool.identities()) == 1


def test_files_that_are_made_at_once_share_a_sync_of_their_directory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pool, others, began, go_on = Pool(tmp_path / "pool"), 8, threading.Event(), threading.Event()
    seen: list[set[str]] = []

    def sync(descriptor: int) -> None:
        if os.readlink(f"/proc/self/fd/{descriptor}").endswith("/volumes"):
            seen.append(pool.identities())
            began.set()
            assert go_on.wait(60)

    monkeypatch.setattr(os, "fsync", sync)
    with ThreadPoolExecutor(others + 1) as threads:
        first = threads.submit(pool.make, "first", MIB, synced=True)
        assert began.wait(60)
        rest = [threads.submit(pool.make, f"other-{number}", MIB, synced=True) for number in range(others)]
        while pool._syncs[pool.volumes].asked <= others:
            os.sched_yield()
        go_on.set()
        for each in (first, *rest):
            each.result(60)
    assert [len(files) for files in seen] == [1, others + 1]
    pool.close()


def test_a_directory_that_could_not_be_synced_is_synced_by_the_next(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pool, calls = Pool(tmp_path / "pool"), list[int]()

    def sync(descriptor: int) -> None:
        if os.readlink(f"/proc/self/fd/{descriptor}").endswith("/volumes"):
            calls.append(descriptor)
            if len(calls) == 1:
                raise OSError(errno.EIO, "refused")

    monkeypatch.setattr(os, "fsync", sync)
    with pytest.raises(SystemCallFailed):
        pool.make(IDENTITY, MIB, synced=True)
    pool.make(IDENTITY, MIB, synced=True)
    assert len(calls) == 2
    pool.close()
