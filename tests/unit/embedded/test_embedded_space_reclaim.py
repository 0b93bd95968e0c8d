# SPDX-License-Identifier: Apache-2.0
"""Space of detached volumes given back, and attachments at the same time."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from csi_driver.deadline import Deadline
from csi_driver.embedded.model import ATTACHMENTS, VOLUMES, Attachment
from tests.unit.embedded.fake_loops import FakeLoopDevices
from tests.unit.embedded.fake_sparse_files import FakeSparseFiles
from tests.unit.embedded.manager import Json, Manager, running, settings_in


@pytest.fixture
def files() -> FakeSparseFiles:
    return FakeSparseFiles()


@pytest.fixture
def manager(tmp_path: Path, loops: FakeLoopDevices, files: FakeSparseFiles) -> Iterator[Manager]:
    with running(settings_in(tmp_path), loops, sparse_files=files) as made:
        made.save("v1")
        yield made


def error(answer: Json) -> int:
    assert not answer["success"]
    return int(answer["error"]["id"])


def test_a_detached_volume_is_done_in_steps(manager: Manager, files: FakeSparseFiles) -> None:
    files.following = [256 << 20]
    first = manager.reclaim("v1")
    assert first["payload"]["reclaimed"]["next"] == 256 << 20
    assert manager.reclaim("v1", 256 << 20)["payload"]["reclaimed"]["next"] is None
    file = manager.server.pool.file(manager.uuid("v1"))
    assert [(place, offset) for place, offset, _ in files.steps] == [(file, 0), (file, 256 << 20)]


def test_the_answer_has_what_the_file_takes_before_and_after(manager: Manager, files: FakeSparseFiles) -> None:
    file = manager.server.pool.file(manager.uuid("v1"))
    file.write_bytes(b"x" * 8192)

    def shrink() -> None:
        file.write_bytes(b"")

    files.during = shrink
    done = manager.reclaim("v1")["payload"]["reclaimed"]
    assert (done["before"], done["after"]) == (8192, 0)


def test_an_attached_volume_is_refused(manager: Manager, files: FakeSparseFiles) -> None:
    manager.attach("v1")
    assert error(manager.reclaim("v1")) == 91013
    assert files.steps == []
    manager.detach("v1")
    assert manager.reclaim("v1")["success"]


def test_a_volume_whose_detachment_is_not_done_is_refused(manager: Manager, loops: FakeLoopDevices) -> None:
    manager.attach("v1")
    manager.hold("slow:node-1")
    manager.detach("v1")
    assert error(manager.reclaim("v1")) == 91013


def test_a_device_without_a_record_counts_as_use(manager: Manager, files: FakeSparseFiles) -> None:
    manager.attach("v1")
    identity = manager.uuid("v1")
    manager.server.store.write(lambda change: change.delete(ATTACHMENTS, identity, "node-1"))
    assert error(manager.reclaim("v1")) == 91013
    assert files.steps == []


@pytest.mark.parametrize("evidence", ["wanted", "reserved", "device"])
def test_each_sign_of_a_use_is_enough(
    manager: Manager, files: FakeSparseFiles, evidence: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    server = manager.server
    volume = server.store.get(VOLUMES, "v1")
    assert volume is not None
    wanted = Attachment("node-1", "v1", volume.uuid, "attaching", {}, ())
    reserved = replace(volume, reservation=replace(volume.reservation, attached=("node-1",)))
    if evidence == "wanted":
        server.store.write(lambda change: change.put(ATTACHMENTS, volume.uuid, wanted, "node-1"))
    elif evidence == "reserved":
        server.store.write(lambda change: change.put(VOLUMES, "v1", reserved))
    else:
        monkeypatch.setattr(server.volumes, "has_device", lambda identity: identity == volume.uuid)
    assert error(manager.reclaim("v1")) == 91013
    assert files.steps == []


def test_an_attachment_waits_for_the_step_and_ends_the_rest(manager: Manager, files: FakeSparseFiles) -> None:
    manager.attach("v1")
    manager.detach("v1")  # the first attachment waits before it is recorded
    files.following = [256 << 20]
    local, pair = manager.server.local, ("node-1", manager.uuid("v1"))
    attaching = threading.Thread(target=manager.attach, args=("v1",))
    had_device: list[bool] = []

    def attach_meanwhile() -> None:
        attaching.start()
        # Its record is made, its device is not.
        assert Deadline.after(30).wait_until(lambda: manager.attachment("v1") is not None)
        had_device.append(pair in local.devices)

    files.during = attach_meanwhile
    assert manager.reclaim("v1")["payload"]["reclaimed"]["next"] == 256 << 20
    attaching.join()
    assert had_device == [False]
    assert pair in local.devices
    assert error(manager.reclaim("v1", 256 << 20)) == 91013
    assert len(files.steps) == 1


def test_a_file_that_another_program_has_open_is_in_use(manager: Manager, files: FakeSparseFiles) -> None:
    files.problem = "another program has it open"
    assert error(manager.reclaim("v1")) == 91013


def test_a_volume_that_is_not_there_or_another_one_is_not_found(manager: Manager, files: FakeSparseFiles) -> None:
    item = {"_id": "v1", "uuid": "99999999-9999-9999-9999-999999999999"}
    (answer,) = manager.post("/volumes/reclaimSpace", [item])
    assert error(answer) == 1543
    assert files.steps == []


def test_a_volume_that_is_being_made_or_deleted_is_busy(tmp_path: Path, files: FakeSparseFiles) -> None:
    with running(settings_in(tmp_path), sparse_files=files) as manager:
        manager.save("v1")
        manager.hold("delete")
        manager.delete("v1")
        assert error(manager.reclaim("v1")) == 91006
    assert files.steps == []


def test_a_volume_whose_file_is_lost_is_not_touched(manager: Manager, files: FakeSparseFiles) -> None:
    manager.attach("v1")
    manager.detach("v1")
    manager.server.pool.file(manager.uuid("v1")).unlink()
    assert error(manager.reclaim("v1")) == 91006
    assert files.steps == []


@pytest.mark.parametrize("why", ["preallocate", "filesystem", "none"])
def test_where_no_space_can_be_given_back_it_is_not_offered(tmp_path: Path, why: str) -> None:
    files = None if why == "none" else FakeSparseFiles(reason="it is NFS" * (why == "filesystem"))
    with running(settings_in(tmp_path, preallocate=why == "preallocate"), sparse_files=files) as manager:
        manager.save("v1")
        assert manager.get("/systemInfo")["features"]["reclaimSpace"] is False
        assert error(manager.reclaim("v1")) == 91003


def test_it_is_offered_where_it_works(manager: Manager) -> None:
    assert manager.get("/systemInfo")["features"]["reclaimSpace"] is True
