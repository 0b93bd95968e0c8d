# SPDX-License-Identifier: Apache-2.0
"""Snapshots of volumes, with reflinks that are copies; those of the kernel are in tests/contract."""

from __future__ import annotations

import contextlib
import errno
import json
import sqlite3
from collections.abc import Iterator
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from urllib.parse import quote

import pytest

from csi_driver.embedded.store import Store
from csi_driver.telemetry.metrics import exposition
from tests.unit.embedded.fake_loops import FakeLoopDevices
from tests.unit.embedded.fake_luks import FakeLuksHeaders
from tests.unit.embedded.fake_reflinks import FakeReflinks
from tests.unit.embedded.manager import Json, Manager, calls_of, running, settings_in

MIB = 1 << 20
OTHER = "22222222-2222-2222-2222-222222222222"
EXISTS, NOT_FOUND, NOT_SUPPORTED, TOO_MANY, NO_SPACE, BUSY = 91001, 91002, 91003, 91004, 91005, 91006


@pytest.fixture
def reflinks() -> FakeReflinks:
    return FakeReflinks()


@pytest.fixture
def manager(tmp_path: Path, loops: FakeLoopDevices, reflinks: FakeReflinks) -> Iterator[Manager]:
    with running(settings_in(tmp_path), loops, FakeLuksHeaders(), reflinks) as running_manager:
        yield running_manager


def error(answer: Json) -> int:
    assert not answer["success"]
    return int(answer["error"]["id"])


def write(manager: Manager, volume: str, text: bytes, offset: int = 0) -> None:
    with manager.server.pool.file(manager.uuid(volume)).open("r+b") as file:
        file.seek(offset)
        file.write(text)


def read(manager: Manager, snapshot: str, count: int = 5) -> bytes:
    with manager.server.pool.snapshot_file(manager.snapshot(snapshot)["uuid"]).open("rb") as file:
        return file.read(count)


def listed(manager: Manager, page: int = 0, count: int = 0, **query: object) -> list[str]:
    texts = "&".join(f"{name}={quote(json.dumps(value))}" for name, value in {"sort": {"_id": 1}, **query}.items())
    return [row["_id"] for row in manager.get(f"/snapshots/all/{page}/{count}?{texts}")]


def disk_error() -> sqlite3.OperationalError:
    problem = sqlite3.OperationalError("refused")
    problem.sqlite_errorcode = sqlite3.SQLITE_READONLY
    return problem


def files(manager: Manager) -> set[str]:
    return {file.name for file in manager.server.pool.snapshots.iterdir()}


# --- cut and delete -----------------------------------------------------------------------------------------------


def test_a_snapshot_has_the_content_of_its_volume_at_the_cut(manager: Manager) -> None:
    manager.save("data", metadata={"a": 1})
    write(manager, "data", b"first")
    before = datetime.now(UTC)
    answer = manager.cut("snap-1", "data", metadata={"b": 2})
    write(manager, "data", b"later")
    shown, volume = manager.snapshot("snap-1"), manager.volume("data")
    assert (answer["success"], answer["uuid"], answer["payload"]["snapshot"]) == (True, shown["uuid"], shown)
    assert read(manager, "snap-1") == b"first"
    assert shown["volume"] == {"_id": "data", "uuid": volume["uuid"]}
    assert (shown["blocks"], shown["blockSize"]) == (volume["blocks"], 4096)
    assert (shown["metadata"], shown["sourceMetadata"]) == ({"b": 2}, {"a": 1})
    assert (shown["isReady"], shown["action"], shown["extents"], shown["group"]) == (True, "none", 1, None)
    assert before <= datetime.fromisoformat(shown["created"]) <= datetime.now(UTC)


def test_the_metadata_of_the_volume_is_that_of_after_the_cut(manager: Manager, monkeypatch: pytest.MonkeyPatch) -> None:
    """A raw publication flags the volume before its first write, so the flag must come with the write."""
    manager.save("data")
    clone = FakeReflinks.clone

    def write_at_the_last_moment(self: FakeReflinks, source: int, target: int) -> None:
        manager.update("data", metadata={"written": True})
        write(manager, "data", b"late!")
        clone(self, source, target)

    monkeypatch.setattr(FakeReflinks, "clone", write_at_the_last_moment)
    manager.cut("snap-1", "data")
    assert read(manager, "snap-1") == b"late!"
    assert manager.snapshot("snap-1")["sourceMetadata"] == {"written": True}


def test_the_same_request_gives_the_same_snapshot(manager: Manager) -> None:
    manager.save("data")
    first, second = manager.cut("snap-1", "data"), manager.cut("snap-1", "data", metadata={"other": 1})
    assert first["payload"] == second["payload"]
    assert len(files(manager)) == 1


def test_a_name_with_another_source_is_refused(manager: Manager) -> None:
    manager.save("data")
    manager.save("other")
    manager.cut("snap-1", "data")
    assert error(manager.cut("snap-1", "other")) == EXISTS
    assert manager.snapshot("snap-1")["volume"]["_id"] == "data"


def test_a_snapshot_outlives_its_volume_and_the_volume_its_snapshot(manager: Manager) -> None:
    for name in ("data", "other"):
        manager.save(name)
        write(manager, name, b"first")
        manager.cut(f"snap-{name}", name)
    source = {"_id": "data", "uuid": manager.uuid("data")}
    assert manager.delete("data")["success"]
    assert manager.delete_snapshot("snap-other")["success"]
    assert read(manager, "snap-data") == b"first"
    assert manager.volume("other")["status"] == "online"
    again = manager.post("/snapshots/save", [{"name": "snap-data", "volume": source}])[0]
    assert again["payload"]["snapshot"]["isReady"]


def test_a_deleted_snapshot_leaves_nothing(manager: Manager) -> None:
    manager.save("data")
    write(manager, "data", b"x" * MIB)
    manager.cut("snap-1", "data")
    identity = manager.snapshot("snap-1")["uuid"]
    assert manager.server.allocator.totals.shared == MIB // 4096
    assert manager.delete_snapshot("snap-1")["success"]
    assert error(manager.snapshot("snap-1")) == NOT_FOUND
    assert error(manager.delete_snapshot("snap-1", identity)) == NOT_FOUND
    assert not files(manager)
    assert manager.server.allocator.totals.shared == 0


def test_a_snapshot_of_another_uuid_is_not_deleted(manager: Manager) -> None:
    manager.save("data")
    manager.cut("snap-1", "data")
    assert error(manager.delete_snapshot("snap-1", OTHER)) == NOT_FOUND
    assert manager.snapshot("snap-1")["isReady"]


def test_a_snapshot_is_as_large_as_its_volume_was_at_the_cut(manager: Manager) -> None:
    manager.save("data", 1)
    manager.cut("small", "data")
    manager.extend("data", 2)
    manager.cut("large", "data")
    for name in ("small", "large"):
        shown = manager.snapshot(name)
        assert manager.server.pool.snapshot_file(shown["uuid"]).stat().st_size == shown["blocks"] * 4096
    assert manager.snapshot("small")["blocks"] < manager.snapshot("large")["blocks"] == manager.volume("data")["blocks"]


def test_an_attached_volume_is_cut(manager: Manager) -> None:
    manager.save("data")
    manager.attach("data")
    write(manager, "data", b"first")
    assert manager.cut("snap-1", "data")["success"]
    assert read(manager, "snap-1") == b"first"


# --- refusals -----------------------------------------------------------------------------------------------------


def test_a_volume_that_is_absent_or_being_deleted_is_refused(manager: Manager, loops: FakeLoopDevices) -> None:
    request = [{"name": "snap-1", "volume": {"_id": "absent", "uuid": OTHER}}]
    assert error(manager.post("/snapshots/save", request)[0]) == 1543
    manager.save("data")
    manager.hold("delete")
    manager.delete("data")
    assert error(manager.cut("snap-1", "data")) == 91009
    assert not files(manager)


def test_a_volume_whose_file_is_lost_is_refused(manager: Manager) -> None:
    manager.save("data")
    manager.attach("data")
    manager.server.pool.file(manager.uuid("data")).unlink()
    assert error(manager.cut("snap-1", "data")) == 91009
    assert error(manager.snapshot("snap-1")) == NOT_FOUND


@pytest.mark.parametrize("is_other_container", [False, True])
def test_a_volume_whose_device_uses_another_file_is_refused(manager: Manager, *, is_other_container: bool) -> None:
    """What is written through the device is not in the file that would be cut."""
    manager.save("data")
    manager.attach("data")
    file = manager.server.pool.file(manager.uuid("data"))
    size_bytes = file.stat().st_size
    if is_other_container:  # the kernel shows the path in the container that bound the device
        for pair, device in manager.server.local.devices.items():
            manager.server.local.devices[pair] = replace(device, file=Path("/pool") / file.name)
    file.rename(file.with_suffix(".elsewhere"))
    manager.server.pool.make(manager.uuid("data"), size_bytes)
    assert error(manager.cut("snap-1", "data")) == 91009
    assert not files(manager)


def test_a_volume_that_is_to_be_encrypted_is_busy_and_then_cut_with_its_encryption(manager: Manager) -> None:
    manager.save("data", VPG=None, RAIDLevel="Concatenated", isEncrypted=True)
    assert error(manager.cut("snap-1", "data")) == BUSY
    request = {"_id": "data", "uuid": manager.uuid("data"), "passphrase": "a passphrase"}
    manager.post("/volumes/initEncryption", [request])
    manager.server.encryptions.worker.run_due()
    assert manager.cut("snap-1", "data")["success"]
    assert manager.snapshot("snap-1")["encryption"] == manager.volume("data")["encryption"]
    assert manager.snapshot("snap-1")["isEncrypted"]


def test_a_file_with_too_many_extents_is_refused_with_their_number(tmp_path: Path) -> None:
    with running(settings_in(tmp_path, snapshot_extent_limit=3), reflinks=FakeReflinks()) as manager:
        manager.save("data")
        for number in range(3):
            write(manager, "data", b"x" * 4096, number * MIB)
        assert manager.cut("snap-1", "data")["payload"]["snapshot"]["extents"] == 3
        write(manager, "data", b"x" * 4096, 3 * MIB)
        refusal = manager.cut("snap-2", "data")
        assert error(refusal) == TOO_MANY
        assert "has 4 extents, at most 3" in refusal["error"]["message"]
        assert len(files(manager)) == 1
        counted = exposition(manager.server.measurements())
        for result, count in {"done": 1, "extents": 1, "busy": 0, "space": 0, "unsupported": 0}.items():
            assert f'nvmesh_csi_storage_snapshot_cuts_total{{result="{result}"}} {count}.0\n' in counted
        assert "nvmesh_csi_storage_last_cut_extents 3.0\n" in counted


def test_a_pool_without_reflinks_says_so_and_refuses_to_copy(tmp_path: Path) -> None:
    with running(settings_in(tmp_path)) as manager:
        manager.save("data")
        features = manager.get("/systemInfo")["features"]
        assert (features["snapshots"], features["reason"]) == (False, "the storage manager runs without reflinks")
        refusal = manager.cut("snap-1", "data")
        assert error(refusal) == NOT_SUPPORTED
        assert features["reason"] in refusal["error"]["message"]
        assert not files(manager)


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EIO])
def test_a_cut_that_the_filesystem_refuses_leaves_nothing_and_can_be_repeated(
    manager: Manager, reflinks: FakeReflinks, number: int
) -> None:
    manager.save("data")
    reflinks.refuses = number
    refusal = manager.cut("snap-1", "data")
    assert error(refusal) == (NO_SPACE if number == errno.ENOSPC else 500)
    assert error(manager.snapshot("snap-1")) == NOT_FOUND
    assert not files(manager)
    assert manager.server.allocator.totals.shared == 0
    reflinks.refuses = 0
    assert manager.cut("snap-1", "data")["success"]


def test_a_cut_whose_row_cannot_be_completed_is_not_shown_as_ready_and_is_repeated(
    manager: Manager, monkeypatch: pytest.MonkeyPatch
) -> None:
    manager.save("data")
    write(manager, "data", b"first")
    writes = Store._write_rows

    def refuse_ready(self: Store, puts: Json, deleted: Json) -> None:
        if any('"action":"cutting"' not in text for kind, _, _, text in puts if kind == "snapshots"):
            raise disk_error()
        writes(self, puts, deleted)

    with monkeypatch.context() as patch:
        patch.setattr(Store, "_write_rows", refuse_ready)
        assert error(manager.cut("snap-1", "data")) == 500
        assert not manager.snapshot("snap-1")["isReady"]
    write(manager, "data", b"later")
    assert manager.cut("snap-1", "data")["payload"]["snapshot"]["isReady"]
    assert read(manager, "snap-1") == b"later"
    assert len(files(manager)) == 1


def test_a_commit_that_failed_and_is_on_disk_leaves_a_whole_snapshot(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = settings_in(tmp_path)
    manager = Manager(settings, FakeLoopDevices(), reflinks=FakeReflinks())
    manager.save("data")
    write(manager, "data", b"first")
    writes = Store._write_rows

    def write_and_fail(self: Store, puts: Json, deleted: Json) -> None:
        monkeypatch.setattr(Store, "_write_rows", refuse)
        writes(self, puts, deleted)
        raise disk_error()

    def refuse(self: Store, puts: Json, deleted: Json) -> None:
        raise disk_error()

    def first(self: Store, puts: Json, deleted: Json) -> None:
        monkeypatch.setattr(Store, "_write_rows", write_and_fail)
        writes(self, puts, deleted)

    monkeypatch.setattr(Store, "_write_rows", first)
    assert error(manager.cut("snap-1", "data")) == 500
    manager.die()
    monkeypatch.setattr(Store, "_write_rows", writes)
    with running(settings, reflinks=FakeReflinks()) as manager:
        assert manager.cut("snap-1", "data")["payload"]["snapshot"]["isReady"]
        assert read(manager, "snap-1") == b"first"


def test_the_same_request_for_a_snapshot_whose_file_is_lost_is_refused(manager: Manager) -> None:
    manager.save("data")
    manager.cut("snap-1", "data")
    manager.server.pool.snapshot_file(manager.snapshot("snap-1")["uuid"]).unlink()
    assert error(manager.cut("snap-1", "data")) == 91009


def test_a_version_without_snapshots_opens_the_database_after_all_are_deleted(tmp_path: Path) -> None:
    settings = settings_in(tmp_path)
    with running(settings, reflinks=FakeReflinks()) as manager:
        manager.save("data")
        manager.cut("snap-1", "data")
        manager.delete_snapshot("snap-1")
        database = manager.server.pool.database
    with contextlib.closing(sqlite3.connect(database)) as opened:
        kinds = {kind for (kind,) in opened.execute("SELECT DISTINCT kind FROM documents")}
    assert kinds <= {"volumes", "clients", "attachments", "reports", "totals", "facts"}


# --- space --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("factor", "kept"), [(1.0, 256), (0.5, 128), (0.0, 0), (2.0, 512)])
def test_what_a_volume_occupies_is_kept_free_for_its_writes_once_for_all_its_snapshots(
    tmp_path: Path, factor: float, kept: int
) -> None:
    with running(settings_in(tmp_path, snapshot_overcommit=factor), reflinks=FakeReflinks()) as manager:
        manager.save("data", 1)
        write(manager, "data", b"x" * MIB)
        for name in ("snap-1", "snap-2"):
            manager.cut(name, "data")
            assert manager.server.allocator.totals.shared == kept
        manager.delete_snapshot("snap-1")
        assert manager.server.allocator.totals.shared == kept
        manager.delete_snapshot("snap-2")
        assert manager.server.allocator.totals.shared == 0


def test_the_space_that_is_kept_free_is_that_of_the_last_cut_and_ends_with_the_volume(manager: Manager) -> None:
    manager.save("data", 1)
    write(manager, "data", b"x" * MIB)
    manager.cut("snap-1", "data")
    write(manager, "data", b"x" * MIB, MIB)
    assert manager.server.allocator.totals.shared == 256
    manager.cut("snap-2", "data")
    assert manager.server.allocator.totals.shared == 512
    manager.delete("data")
    assert manager.server.allocator.totals.shared == 0
    assert manager.delete_snapshot("snap-1")["success"]


def test_the_account_is_right_after_a_restart(tmp_path: Path) -> None:
    settings = settings_in(tmp_path)
    with running(settings, reflinks=FakeReflinks()) as manager:
        manager.save("data", 1)
        write(manager, "data", b"x" * MIB)
        manager.cut("snap-1", "data")
    with running(settings, reflinks=FakeReflinks()) as manager:
        assert manager.server.allocator.totals.shared == 256
        assert manager.snapshot("snap-1")["isReady"]


# --- lists --------------------------------------------------------------------------------------------------------


def test_snapshots_are_listed_by_page_and_by_volume(manager: Manager) -> None:
    for name in ("data", "other"):
        manager.save(name)
    for number in range(9):
        manager.cut(f"snap-{number}", ("data", "other")[number % 2])
    of_other = {"volume.uuid": manager.uuid("other")}
    assert listed(manager) == [f"snap-{number}" for number in range(9)]
    assert listed(manager, filter={"_id": {"$gt": "snap-3"}}, count=2) == ["snap-4", "snap-5"]
    assert listed(manager, filter=of_other) == ["snap-1", "snap-3", "snap-5", "snap-7"]
    assert listed(manager, filter={**of_other, "_id": {"$gt": "snap-3"}}, count=1) == ["snap-5"]
    assert listed(manager, 1, 2, filter=of_other) == ["snap-5", "snap-7"]
    assert listed(manager, filter={"volume.uuid": OTHER}) == []
    assert listed(manager, filter={"isReady": True}, sort={"_id": -1})[0] == "snap-8"
    manager.delete_snapshot("snap-5")
    manager.cut("snap-55", "other")
    assert listed(manager, filter=of_other) == ["snap-1", "snap-3", "snap-55", "snap-7"]
    assert listed(manager, filter={"_id": {"$gt": "snap-4"}}) == ["snap-55", "snap-6", "snap-7", "snap-8"]


def test_a_list_has_the_projected_fields_alone(manager: Manager) -> None:
    manager.save("data")
    manager.cut("snap-1", "data")
    (row,) = manager.get(f"/snapshots/all/0/10?projection={quote(json.dumps({'uuid': 1, 'volume.uuid': 1}))}")
    assert row == {
        "_id": "snap-1",
        "uuid": manager.snapshot("snap-1")["uuid"],
        "volume": {"uuid": manager.uuid("data")},
    }


def test_a_page_costs_its_snapshots_alone(manager: Manager) -> None:
    for name in ("data", "other"):
        manager.save(name)
        for number in range(60):
            manager.cut(f"snap-{name}-{number}", name)
    for query in ({}, {"volume.uuid": manager.uuid("data")}):
        listed(manager, filter=query, count=3)
        with calls_of("snapshot_document") as calls:
            assert len(listed(manager, filter=query, count=3)) == 3
        assert len(calls) == 3
