# SPDX-License-Identifier: Apache-2.0
"""Volumes made from a volume or a snapshot: content, refusals, and what a failure or a crash leaves."""

from __future__ import annotations

import errno
import os
import sqlite3
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import TypeAlias

import pytest

from csi_driver.embedded.model import TOTALS, VOLUMES
from csi_driver.embedded.store import Store
from tests.storage_switches import add_points
from tests.unit.embedded.fake_loops import FakeLoopDevices
from tests.unit.embedded.fake_luks import FakeLuksHeaders
from tests.unit.embedded.fake_reflinks import FakeReflinks
from tests.unit.embedded.manager import GB, Json, Manager, running, settings_in
from tests.unit.embedded.test_embedded_crashes import Crash

DATA = b"content of the source"


class Reflinks(FakeReflinks):
    """`clone` can be replaced."""


@pytest.fixture
def reflinks() -> Reflinks:
    return Reflinks()


@pytest.fixture
def manager(tmp_path: Path, loops: FakeLoopDevices, reflinks: Reflinks) -> Iterator[Manager]:
    with running(settings_in(tmp_path), loops, FakeLuksHeaders(), reflinks) as manager:
        manager.save("source", 2)
        write(manager, "source", DATA)
        yield manager


def write(manager: Manager, name: str, content: bytes, offset: int = 1 << 20) -> None:
    with manager.server.pool.file(manager.uuid(name)).open("r+b") as file:
        os.pwrite(file.fileno(), content, offset)


def read(manager: Manager, name: str, offset: int = 1 << 20) -> bytes:
    with manager.server.pool.file(manager.uuid(name)).open("rb") as file:
        return os.pread(file.fileno(), len(DATA), offset)


def number(answer: Json) -> int | None:
    return None if answer["success"] else int(answer["error"]["id"])


def names(manager: Manager) -> list[str]:
    return [str(row["_id"]) for row in manager.get("/volumes/all/0/0")]


def after_the_row(manager: Manager, act: Callable[[], object]) -> None:
    """Do something when the row of a copy has been written, before its source is locked."""
    waiting = [act]

    def at(point: str) -> None:
        if point == "store.write" and waiting:
            waiting.pop()()

    add_points(manager.server, at)


def only_the_source_is_left(manager: Manager) -> bool:
    files = {path.name for path in manager.server.pool.volumes.iterdir()}
    return names(manager) == ["source"] and files == {f"{manager.uuid('source')}.img"}


@pytest.mark.parametrize("is_attached", [False, True])
def test_a_copy_has_the_content_and_at_least_the_size_of_its_source(manager: Manager, *, is_attached: bool) -> None:
    if is_attached:
        manager.attach("source")
    for name, capacity in (("same", 2), ("larger", 3)):
        assert number(manager.clone("source", name, capacity)) is None
        row = manager.volume(name)
        assert (row["action"], row["status"], row["isReady"]) == ("none", "online", True)
        file = manager.server.pool.file(row["uuid"])
        assert file.stat().st_size == row["blocks"] * row["blockSize"]
        assert read(manager, name) == DATA
    assert number(manager.clone("source", "smaller", 1)) == 91011


def test_a_copy_has_no_file_of_its_own_before_it_is_complete(manager: Manager, reflinks: Reflinks) -> None:
    """Nothing can be done with the volume, and its name is taken."""
    clone, source = reflinks.clone, manager.server.pool.file(manager.uuid("source"))
    answers: dict[str, int | None] = {}

    def use_it_meanwhile(source_fd: int, target_fd: int) -> None:
        assert not manager.server.pool.file(manager.uuid("copy")).exists()
        assert manager.server.allocator.totals.shared == manager.server.pool.occupied_bytes(source) // 4096 > 0
        answers.update(
            attach=number(manager.attach("copy")),
            extend=number(manager.extend("copy", 9)),
            delete=number(manager.delete("copy")),
            copy=number(manager.clone("copy", "copy-of-it", 2)),
            again=number(manager.clone("source", "copy", 2)),
        )
        clone(source_fd, target_fd)

    reflinks.clone = use_it_meanwhile  # type: ignore[method-assign]
    assert number(manager.clone("source", "copy", 2)) is None
    assert answers == {"attach": 1694, "extend": 1572, "delete": 1571, "copy": 91006, "again": 1523}
    assert read(manager, "copy") == DATA


def test_the_source_is_locked_while_it_is_copied(manager: Manager, reflinks: Reflinks) -> None:
    clone, held = reflinks.clone, []

    def look(source_fd: int, target_fd: int) -> None:
        held.append(set(manager.server.snapshots.locks._locks))
        clone(source_fd, target_fd)

    manager.cut("cut", "source")
    reflinks.clone = look  # type: ignore[method-assign]
    manager.clone("source", "copy", 2)
    clone_of_snapshot(manager, "another")
    assert held == [{manager.uuid("source")}, {"snapshot/cut"}]


def test_source_and_copies_are_deleted_in_any_order(manager: Manager) -> None:
    manager.clone("source", "copy", 2)
    manager.clone("copy", "copy-of-copy", 2)
    manager.delete("source")
    manager.delete("copy")
    assert names(manager) == ["copy-of-copy"]
    assert read(manager, "copy-of-copy") == DATA
    manager.delete("copy-of-copy")
    assert manager.server.allocator.totals.allocated == 0


# --- snapshots ------------------------------------------------------------------------------------------------


def clone_of_snapshot(manager: Manager, name: str = "copy", capacity: int = 2) -> Json:
    return manager.clone("cut", name, capacity, kind="snapshot", uuid=manager.snapshot("cut")["uuid"])


def test_a_volume_made_from_a_snapshot_has_the_content_of_the_cut(manager: Manager) -> None:
    manager.cut("cut", "source")
    write(manager, "source", b"CONTENT written after")
    manager.extend("source", 3)
    assert number(clone_of_snapshot(manager)) is None
    assert read(manager, "copy") == DATA
    assert number(clone_of_snapshot(manager, "smaller", 1)) == 91011
    manager.delete("source")
    assert number(clone_of_snapshot(manager, "another", 3)) is None
    manager.delete_snapshot("cut")
    assert read(manager, "copy") == read(manager, "another") == DATA


def test_a_snapshot_that_is_deleted_after_the_row_was_written_takes_the_row_along(manager: Manager) -> None:
    manager.cut("cut", "source")
    identity = manager.snapshot("cut")["uuid"]
    after_the_row(manager, lambda: manager.delete_snapshot("cut", identity))
    assert number(clone_of_snapshot(manager)) == 91002
    assert only_the_source_is_left(manager)


def test_a_snapshot_that_lost_its_file_makes_no_volume(manager: Manager) -> None:
    manager.cut("cut", "source")
    manager.server.pool.snapshot_file(manager.snapshot("cut")["uuid"]).unlink()
    assert number(clone_of_snapshot(manager)) == 91009
    assert only_the_source_is_left(manager)


# --- encryption -----------------------------------------------------------------------------------------------


def test_a_copy_inherits_the_header_of_its_source(manager: Manager) -> None:
    encrypted: dict[str, object] = {"VPG": None, "RAIDLevel": "Concatenated", "isEncrypted": True}
    manager.save("locked", 2, **encrypted)
    assert number(manager.clone("locked", "early", 2, **encrypted)) == 91006
    body = {"_id": "locked", "uuid": manager.uuid("locked"), "passphrase": "eight or more"}
    manager.post("/volumes/initEncryption", [body])
    manager.server.encryptions.worker.run_due()
    other = {**encrypted, "encryption": {"headerSize": 32}}
    assert number(manager.clone("locked", "copy", 2, **other)) == 91012
    assert number(manager.clone("locked", "copy", 2)) == 91012
    assert number(manager.clone("source", "copy", 2, **encrypted)) == 91012
    assert number(manager.clone("locked", "copy", 2, **encrypted)) is None
    assert manager.volume("copy")["encryption"] == {"headerSize": 16, "isInitialized": True}
    body = {"_id": "copy", "uuid": manager.uuid("copy"), "passphrase": "eight or more"}
    assert number(manager.post("/volumes/initEncryption", [body])[0]) == 14591


# --- refusals and failures ------------------------------------------------------------------------------------


def test_a_source_that_does_not_exist_is_told(manager: Manager) -> None:
    other = "00000000-0000-4000-8000-000000000000"
    assert number(manager.clone("gone", "copy", 2, uuid=other)) == 1543
    assert number(manager.clone("source", "copy", 2, uuid=other)) == 1543
    assert number(manager.clone("gone", "copy", 2, uuid=other, kind="snapshot")) == 91002
    assert only_the_source_is_left(manager)


def test_a_source_that_is_deleted_after_the_row_was_written_takes_the_row_along(manager: Manager) -> None:
    identity = manager.uuid("source")
    after_the_row(manager, lambda: manager.delete("source"))
    assert number(manager.clone("source", "copy", 2, uuid=identity)) == 1543
    assert names(manager) == []
    assert not manager.server.pool.identities()


def test_a_source_that_grew_after_the_row_was_written_is_no_longer_copied(manager: Manager) -> None:
    after_the_row(manager, lambda: manager.extend("source", 3))
    assert number(manager.clone("source", "copy", 2)) == 91011
    assert only_the_source_is_left(manager)


def test_what_was_written_to_the_source_before_it_was_locked_is_accounted_for(
    tmp_path: Path, loops: FakeLoopDevices, reflinks: Reflinks
) -> None:
    with running(settings_in(tmp_path), loops, reflinks=reflinks) as manager:
        manager.save("source", 2)
        after_the_row(manager, lambda: write(manager, "source", DATA))
        assert number(manager.clone("source", "copy", 2)) is None
    with running(settings_in(tmp_path), loops, reflinks=reflinks) as manager:  # it verifies the account
        assert read(manager, "copy") == DATA


@pytest.mark.parametrize(("refusal", "expected"), [(errno.EIO, None), (errno.ENOSPC, 91005)])
def test_a_copy_that_fails_is_removed_and_made_by_the_retry(
    manager: Manager, reflinks: FakeReflinks, refusal: int, expected: int | None
) -> None:
    reflinks.refuses = refusal
    answer = manager.clone("source", "copy", 2)
    assert not answer["success"]
    assert expected in (None, number(answer))
    assert only_the_source_is_left(manager)
    reflinks.refuses = 0
    assert number(manager.clone("source", "copy", 2)) is None
    assert read(manager, "copy") == DATA


def test_a_copy_that_cannot_be_removed_is_removed_by_a_retry_of_the_worker(
    manager: Manager, reflinks: FakeReflinks
) -> None:
    reflinks.refuses = errno.EIO
    manager.hold("delete")
    manager.clone("source", "copy", 2)
    assert manager.volume("copy")["action"] == "markedForDeletion"
    manager.release("delete")
    assert only_the_source_is_left(manager)


def test_a_source_whose_device_uses_another_file_is_not_copied(manager: Manager) -> None:
    manager.attach("source")
    file = manager.server.pool.file(manager.uuid("source"))
    size_bytes = file.stat().st_size
    aside = file.rename(file.with_suffix(".aside"))
    manager.server.pool.make(manager.uuid("source"), size_bytes)
    assert number(manager.clone("source", "copy", 2)) == 91009
    aside.rename(file)
    assert number(manager.clone("source", "copy", 2)) is None
    assert read(manager, "copy") == DATA


def test_a_source_with_too_many_extents_is_refused_with_their_number(
    tmp_path: Path, loops: FakeLoopDevices, reflinks: FakeReflinks
) -> None:
    with running(settings_in(tmp_path, snapshot_extent_limit=1), loops, reflinks=reflinks) as manager:
        manager.save("source", 2)
        write(manager, "source", DATA)
        assert number(manager.clone("source", "copy", 2)) is None
        write(manager, "source", DATA, 1 << 24)
        answer = manager.clone("source", "another", 2)
        assert number(answer) == 91004
        assert " 2 extents" in answer["error"]["message"]
        assert names(manager) == ["source", "copy"]
        # A snapshot has no writers that a reflink would hold up.
        settings = replace(manager.server.settings, snapshot_extent_limit=9)
    with running(settings, loops, reflinks=reflinks) as manager:
        manager.cut("cut", "source")
    with running(replace(settings, snapshot_extent_limit=1), loops, reflinks=reflinks) as manager:
        assert number(clone_of_snapshot(manager, "another")) is None


def test_a_pool_without_reflinks_copies_nothing(tmp_path: Path, loops: FakeLoopDevices) -> None:
    with running(settings_in(tmp_path), loops) as manager:
        manager.save("source", 2)
        assert number(manager.clone("source", "copy", 2)) == 91003
        assert only_the_source_is_left(manager)


def test_a_copy_needs_space_for_all_that_it_may_hold(tmp_path: Path, loops: FakeLoopDevices) -> None:
    with running(settings_in(tmp_path, size_bytes=5 * GB), loops, reflinks=FakeReflinks()) as manager:
        manager.save("source", 2)
        assert number(manager.clone("source", "copy", 2)) is None
        answer = manager.clone("source", "another", 2)
        assert (number(answer), answer["error"]["innerMessage"]) == (1664, "Failed to allocate")


def test_a_copy_that_cannot_be_recorded_is_gone_as_soon_as_the_database_works_again(
    tmp_path: Path, loops: FakeLoopDevices, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(self: Store, puts: Json, deleted: Json) -> None:
        raise sqlite3.DatabaseError("refused")

    settings = settings_in(tmp_path, retry_first_s=0.0)
    with running(settings, loops, reflinks=FakeReflinks()) as manager:
        manager.save("source", 2)
        after_the_row(manager, lambda: monkeypatch.setattr(Store, "_write_rows", refuse))
        assert number(manager.clone("source", "copy", 2)) == 500
        assert manager.volume("copy")["action"] == "initializing"
        monkeypatch.undo()
        manager.server.worker.run_due()
        assert only_the_source_is_left(manager)
        assert number(manager.clone("source", "copy", 2)) is None


def test_a_pool_that_an_earlier_version_has_used_still_accounts_for_what_copies_share(
    tmp_path: Path, loops: FakeLoopDevices
) -> None:
    with running(settings_in(tmp_path), loops, reflinks=FakeReflinks()) as manager:
        manager.save("source", 2)
        write(manager, "source", DATA)
        manager.clone("source", "copy", 2)
        totals = manager.server.allocator.totals
        assert totals.shared
        # That version does not know the number of shared blocks, and writes the totals without it.
        manager.server.store.write(lambda change: change.put(TOTALS, "pool", replace(totals, shared=0)))
    with running(settings_in(tmp_path), loops, reflinks=FakeReflinks()) as manager:
        assert manager.server.allocator.totals == totals


# --- crashes --------------------------------------------------------------------------------------------------


Ends: TypeAlias = Callable[[Manager, Reflinks], None]
"""Arranges where the process ends."""


def crashed_at(directory: Path, loops: FakeLoopDevices, ends: Ends) -> None:
    reflinks = Reflinks()
    manager = Manager(settings_in(directory), loops, reflinks=reflinks)
    manager.save("source", 2)
    write(manager, "source", DATA)
    ends(manager, reflinks)
    with pytest.raises(Crash):
        manager.clone("source", "copy", 2)
    manager.die()


def end_of(point: str) -> Ends:
    def arrange(manager: Manager, reflinks: Reflinks) -> None:
        def at(passed: str) -> None:
            if passed == point and "copy" in names(manager):
                raise Crash

        add_points(manager.server, at)

    return arrange


def end_in_the_reflink(manager: Manager, reflinks: Reflinks) -> None:
    clone = reflinks.clone

    def half(source_fd: int, target_fd: int) -> None:
        clone(source_fd, target_fd)
        raise Crash

    reflinks.clone = half  # type: ignore[method-assign]


AFTER_THE_RENAME = end_of("pool.complete_reflink")
EVERY_STEP = pytest.mark.parametrize(
    "ends",
    [end_of("store.write"), end_in_the_reflink, AFTER_THE_RENAME],
    ids=["row written", "reflink made", "reflink renamed"],
)


@EVERY_STEP
def test_after_a_crash_an_interrupted_copy_is_gone_and_the_retry_makes_it(
    tmp_path: Path, loops: FakeLoopDevices, ends: Ends
) -> None:
    crashed_at(tmp_path, loops, ends)
    with running(settings_in(tmp_path), loops, reflinks=FakeReflinks()) as manager:
        assert only_the_source_is_left(manager)
        assert number(manager.clone("source", "copy", 2)) is None
        assert read(manager, "copy") == DATA


@EVERY_STEP
def test_an_earlier_manager_makes_no_empty_file_for_an_interrupted_copy(
    tmp_path: Path, loops: FakeLoopDevices, ends: Ends
) -> None:
    crashed_at(tmp_path, loops, ends)
    store = Store(tmp_path / "pool" / "manager.sqlite")
    copy = store.get(VOLUMES, "copy")
    assert copy is not None
    store.write(lambda change: change.put(VOLUMES, "copy", replace(copy, source=None)))  # as it reads the record
    store.close()
    with running(settings_in(tmp_path), loops) as manager:
        is_complete = ends is AFTER_THE_RENAME
        assert manager.volume("copy")["status"] == ("online" if is_complete else "offline")
        assert (copy.uuid in manager.server.pool.identities()) is is_complete
