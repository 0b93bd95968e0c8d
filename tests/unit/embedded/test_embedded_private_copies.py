# SPDX-License-Identifier: Apache-2.0
"""Readers of a volume that was made from another one: each has a writable copy, and the volume's file stays."""

from __future__ import annotations

import errno
from collections.abc import Iterator
from pathlib import Path

import pytest

from csi_driver.embedded.pool import Pool
from csi_driver.errors import SystemCallFailed
from csi_driver.host_model import LoopDevice
from tests.storage_switches import add_points
from tests.unit.embedded.fake_loops import FakeLoopDevices
from tests.unit.embedded.fake_reflinks import FakeReflinks
from tests.unit.embedded.manager import Manager, running, settings_in
from tests.unit.embedded.test_embedded_crashes import Crash, Fault

READER = "SHARED_READ_ONLY"


@pytest.fixture
def manager(tmp_path: Path, loops: FakeLoopDevices) -> Iterator[Manager]:
    """A manager with the volume `copy`, made from `data`."""
    with running(settings_in(tmp_path), loops, None, FakeReflinks()) as running_manager:
        prepare(running_manager)
        yield running_manager


def prepare(manager: Manager) -> None:
    manager.save("data")
    with manager.server.pool.file(manager.uuid("data")).open("r+b") as file:
        file.write(b"precious")
    manager.clone("data", "copy")


def copies(manager: Manager) -> list[Path]:
    return sorted(manager.server.pool.private.iterdir())


def content(file: Path) -> bytes:
    with file.open("rb") as opened:
        return opened.read(8)


def test_each_reader_has_a_writable_copy_and_nobody_has_the_volumes_file(
    manager: Manager, loops: FakeLoopDevices
) -> None:
    manager.attach("copy", "node-1", mode=READER)
    manager.attach("copy", "node-2", mode=READER)
    assert manager.report("copy", "node-2")["vol_status"] == 4
    assert sorted(device.file for device in loops.bound.values()) == copies(manager)
    assert len(copies(manager)) == 2
    assert [device.read_only for device in loops.bound.values()] == [False, False]
    assert not loops.writers(manager.server.pool.file(manager.uuid("copy")))
    for file in copies(manager):
        assert content(file) == b"precious"
        file.write_bytes(b"replayed")
    assert content(manager.server.pool.file(manager.uuid("copy"))) == b"precious"


def test_a_volume_tells_whether_its_readers_have_copies(manager: Manager) -> None:
    assert manager.volume("copy")["privateReaders"] is True
    assert "privateReaders" not in manager.volume("data")


def test_a_reader_of_another_volume_has_its_file_read_only(manager: Manager, loops: FakeLoopDevices) -> None:
    manager.attach("data", mode=READER)
    (device,) = loops.bound.values()
    assert (device.file, device.read_only) == (manager.server.pool.file(manager.uuid("data")), True)


def test_a_writer_has_the_volumes_file(manager: Manager, loops: FakeLoopDevices) -> None:
    manager.attach("copy")
    assert loops.writers(manager.server.pool.file(manager.uuid("copy"))) != []
    assert copies(manager) == []


def test_a_copy_ends_with_its_attachment(manager: Manager, loops: FakeLoopDevices) -> None:
    manager.attach("copy", "node-1", mode=READER)
    manager.attach("copy", "node-2", mode=READER)
    manager.detach("copy", "node-1")
    assert [device.file for device in loops.bound.values()] == copies(manager)
    manager.detach("copy", "node-2")
    assert (copies(manager), loops.bound) == ([], {})


def test_a_copy_in_use_stays(manager: Manager, loops: FakeLoopDevices) -> None:
    manager.attach("copy", mode=READER)
    loops.open = set(loops.bound)
    manager.detach("copy")
    assert len(copies(manager)) == 1
    loops.open.clear()
    manager.retry("node-1")
    assert copies(manager) == []


def test_a_later_attachment_has_a_new_copy(manager: Manager) -> None:
    manager.attach("copy", mode=READER)
    copies(manager)[0].write_bytes(b"replayed")
    manager.detach("copy")
    manager.attach("copy", mode=READER)
    assert content(copies(manager)[0]) == b"precious"


def test_copies_are_found_again_and_left_over_ones_removed(tmp_path: Path, loops: FakeLoopDevices) -> None:
    with running(settings_in(tmp_path), loops, None, FakeReflinks()) as manager:
        prepare(manager)
        manager.attach("copy", mode=READER)
        before, (used,) = dict(loops.bound), copies(manager)
        used.with_name("11111111-1111-1111-1111-111111111111.0123456789abcdef.img").touch()
    with running(settings_in(tmp_path), loops, None, FakeReflinks()) as manager:
        assert (loops.bound, copies(manager)) == (before, [used])
        manager.detach("copy")
        assert (loops.bound, copies(manager)) == ({}, [])


def test_a_copy_that_could_not_be_removed_is_replaced(manager: Manager, monkeypatch: pytest.MonkeyPatch) -> None:
    manager.attach("copy", mode=READER)
    copies(manager)[0].write_bytes(b"replayed")
    with monkeypatch.context() as broken:
        broken.setattr(manager.server.pool, "remove_private", refuse)
        assert manager.detach("copy")["success"]
    assert (manager.attachment("copy"), len(copies(manager))) == (None, 1)
    manager.attach("copy", mode=READER)
    assert content(copies(manager)[0]) == b"precious"


def refuse(file: Path) -> None:
    raise SystemCallFailed(f"remove {file}", errno.EIO)


@pytest.mark.parametrize(
    "problem", [SystemCallFailed("LOOP_CTL_GET_FREE", errno.ENOSPC), OSError(errno.EROFS, "mknod")]
)
def test_no_copy_is_left_of_an_attachment_without_a_device(
    manager: Manager, loops: FakeLoopDevices, monkeypatch: pytest.MonkeyPatch, problem: Exception
) -> None:
    def no_device(*_: object, **__: object) -> None:
        raise problem

    with monkeypatch.context() as broken:
        broken.setattr(FakeLoopDevices, "attach", no_device)
        manager.attach("copy", mode=READER)
        assert (manager.report("copy"), loops.bound, copies(manager)) == (None, {}, [])
    manager.retry("node-1")
    assert content(copies(manager)[0]) == b"precious"


def test_a_start_looks_at_the_machines_devices_once(
    tmp_path: Path, loops: FakeLoopDevices, monkeypatch: pytest.MonkeyPatch
) -> None:
    looks: list[tuple[Path, ...]] = []
    look = FakeLoopDevices.bound_to

    def counted(self: FakeLoopDevices, *places: Path) -> tuple[LoopDevice, ...]:
        looks.append(places)
        return look(self, *places)

    monkeypatch.setattr(FakeLoopDevices, "bound_to", counted)
    with running(settings_in(tmp_path), loops, None, FakeReflinks()):
        assert len(looks) == 1


def test_what_a_copy_grows_by_takes_no_space(tmp_path: Path) -> None:
    pool = Pool(tmp_path / "pool", preallocate=True)
    file = pool.private_file("volume", "reader")
    file.write_bytes(b"data")
    pool.extend_private(file, 1 << 24)
    pool.extend_private(pool.private_file("volume", "another"), 1 << 24)
    assert (file.stat().st_size, len(pool.private_files())) == (1 << 24, 1)
    assert pool.occupied_bytes(file) < 1 << 20
    pool.extend_private(file, 1)
    assert file.stat().st_size == 1 << 24
    pool.close()


def test_a_copy_is_made_again_after_a_reboot(tmp_path: Path, loops: FakeLoopDevices) -> None:
    with running(settings_in(tmp_path), loops, None, FakeReflinks()) as manager:
        prepare(manager)
        manager.attach("copy", mode=READER)
        copies(manager)[0].write_bytes(b"torn")
    after = FakeLoopDevices()
    with running(settings_in(tmp_path), after, None, FakeReflinks()) as manager:
        assert [device.file for device in after.bound.values()] == copies(manager)
        assert content(copies(manager)[0]) == b"precious"


def test_copies_grow_with_their_volume(manager: Manager, loops: FakeLoopDevices) -> None:
    manager.attach("copy", mode=READER)
    manager.extend("copy", 2)
    size_bytes = manager.volume("copy")["blocks"] * 4096
    assert (list(loops.size_bytes.values()), copies(manager)[0].stat().st_size) == ([size_bytes], size_bytes)


@pytest.mark.parametrize("is_open", [False, True])
def test_a_reader_that_is_preempted_loses_its_copy_or_its_io(
    manager: Manager, loops: FakeLoopDevices, is_open: bool
) -> None:
    manager.attach("copy", mode=READER)
    loops.open = set(loops.bound) if is_open else set()
    version = manager.volume("copy")["reservation"]["version"]
    manager.attach("copy", "node-2", mode="EXCLUSIVE_READ_WRITE", version=version, preempt=True)
    assert len(copies(manager)) == int(is_open)
    assert all(device.fenced for device in loops.bound.values() if device.file in copies(manager))
    assert len(loops.writers(manager.server.pool.file(manager.uuid("copy")))) == 1


def test_a_copy_is_made_when_no_writer_is_left(manager: Manager, loops: FakeLoopDevices) -> None:
    manager.attach("copy", "node-1")
    loops.open, loops.fences = set(loops.bound), False
    version = manager.volume("copy")["reservation"]["version"]
    manager.attach("copy", "node-2", mode=READER, version=version, preempt=True)
    assert copies(manager) == []
    loops.open.clear()
    manager.retry("node-2")
    assert len(copies(manager)) == 1


def test_a_client_that_becomes_a_reader_gets_a_copy(manager: Manager, loops: FakeLoopDevices) -> None:
    manager.attach("copy")
    version = manager.volume("copy")["reservation"]["version"]
    manager.attach("copy", mode=READER, version=version, preempt=True)
    assert [device.file for device in loops.bound.values()] == copies(manager)


def test_a_volume_is_deleted_with_its_copies(manager: Manager, loops: FakeLoopDevices) -> None:
    manager.attach("copy", mode=READER)
    loops.open = set(loops.bound)
    manager.detach("copy")
    assert manager.delete("copy")["success"]
    assert manager.volume("copy")["action"] == "markedForDeletion"
    loops.open.clear()
    manager.retry("node-1")
    assert (manager.volume("copy").get("error", {}).get("id"), copies(manager)) == (1543, [])


def test_the_last_copy_of_a_lost_volume_stays(manager: Manager, loops: FakeLoopDevices) -> None:
    manager.attach("copy", mode=READER)
    file = manager.server.pool.file(manager.uuid("copy"))
    aside = file.rename(file.with_suffix(".aside"))
    manager.detach("copy")
    assert (len(loops.bound), manager.volume("copy")["status"]) == (1, "degraded")
    aside.rename(file)
    manager.retry("node-1")
    assert (loops.bound, copies(manager)) == ({}, [])


@pytest.mark.parametrize("act", ["attach", "detach"])
@pytest.mark.parametrize("number", range(6))
def test_after_a_crash_the_copies_are_those_of_the_attached_readers(
    tmp_path: Path, loops: FakeLoopDevices, act: str, number: int
) -> None:
    fault = Fault(number)
    manager = Manager(settings_in(tmp_path), loops, reflinks=FakeReflinks())
    prepare(manager)
    if act == "detach":
        manager.attach("copy", mode=READER)
    add_points(manager.server, fault)
    fault.armed = True
    try:
        manager.detach("copy") if act == "detach" else manager.attach("copy", mode=READER)
    except Crash:
        manager.die()
    else:
        manager.server.stop()
    with running(settings_in(tmp_path), loops, None, FakeReflinks()) as manager:
        attached = manager.attachment("copy") is not None
        assert [device.file for device in loops.bound.values()] == copies(manager)
        assert len(copies(manager)) == int(attached)
