# SPDX-License-Identifier: Apache-2.0
"""kill -9 between any two steps loses no acknowledged volume and leaves no device without an attachment."""

from __future__ import annotations

import os
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from csi_driver.embedded.pool import VolumeLocks
from csi_driver.embedded.settings import StorageSettings
from tests.storage_switches import add_points
from tests.unit.embedded.fake_freezes import FakeFreezes
from tests.unit.embedded.fake_loops import FakeLoopDevices
from tests.unit.embedded.fake_reflinks import FakeReflinks
from tests.unit.embedded.manager import GB, Manager, running, settings_in


class Crash(BaseException):
    """The process ends here."""


@dataclass(slots=True)
class Fault:
    """Notes the points that are passed once it is armed, and crashes at one of them."""

    number: int | None = None
    """Which of them, counted from 0; None = none."""
    armed: bool = False
    passed: list[str] = field(default_factory=list)

    def __call__(self, point: str) -> None:
        if self.armed:
            self.passed.append(point)
            if self.number is not None and len(self.passed) == self.number + 1:
                raise Crash

    @property
    def met(self) -> bool:
        return self.number is not None and len(self.passed) > self.number


def save(manager: Manager) -> None:
    manager.save("new", 2)


def clone(manager: Manager) -> None:
    manager.clone("attached", "new", 2)


def clone_of_a_volume_that_no_client_had(manager: Manager) -> None:
    manager.clone("old", "new", 2)


def extend(manager: Manager) -> None:
    manager.extend("old", 3)


def delete(manager: Manager) -> None:
    manager.delete("old")


def attach(manager: Manager) -> None:
    manager.attach("old")


def detach(manager: Manager) -> None:
    manager.detach("attached")


def cut(manager: Manager) -> None:
    manager.cut("new", "attached")


def delete_snapshot(manager: Manager) -> None:
    manager.delete_snapshot("kept")


def cut_group(manager: Manager) -> None:
    manager.cut_group("new-group", {"new-1": "attached", "new-2": "old"})


def delete_group(manager: Manager) -> None:
    manager.delete_group("kept-group")


POINTS: dict[Callable[[Manager], None], list[str]] = {
    save: ["store.write", "pool.make"],
    clone: ["store.write", "pool.begin_reflink", "pool.complete_reflink", "store.write"],
    clone_of_a_volume_that_no_client_had: [
        *("pool.make", "store.write", "pool.begin_reflink", "pool.complete_reflink", "store.write")
    ],
    extend: ["store.write", "pool.make", "store.write"],
    delete: ["store.write", "pool.remove", "store.write_later"],
    attach: ["pool.make", "store.write", "loops.attach", "files.show", "store.write_later"],
    detach: ["store.write", "loops.detach", "files.hide", "store.write_later"],
    cut: ["store.write", "pool.begin_reflink", "pool.complete_reflink", "store.write"],
    delete_snapshot: ["store.write", "pool.remove_snapshot", "store.write_later"],
    cut_group: [
        "pool.make", "store.write", "freezes.held", "pool.begin_reflink", "pool.begin_reflink", "freezes.end",
        "pool.complete_reflink", "pool.complete_reflink", "store.write",
    ],
    delete_group: ["store.write", "pool.remove_snapshot", "pool.remove_snapshot", "store.write"],
}  # fmt: skip
"""Changes that each request makes, in order; the manager is killed after each."""
STEPS = [(act, number) for act, points in POINTS.items() for number in range(len(points))]
after_every_step = pytest.mark.parametrize(
    ("act", "number"), STEPS, ids=[f"{act.__name__}-{number}-{POINTS[act][number]}" for act, number in STEPS]
)


def prepared(directory: Path, loops: FakeLoopDevices, fault: Fault) -> Manager:
    """Return a manager with the volumes old and attached and the snapshot kept, with points."""
    freezes = FakeFreezes(fault)
    manager = Manager(settings_in(directory), loops, reflinks=FakeReflinks(), freezes=freezes)
    manager.save("old")
    manager.save("attached")
    manager.attach("attached")
    with manager.server.pool.file(manager.uuid("attached")).open("r+b") as file:
        file.write(b"precious")
    manager.cut("kept", "attached")
    manager.cut_group("kept-group", {"kept-1": "attached", "kept-2": "old"})
    add_points(manager.server, fault)
    fault.armed = True
    return manager


@pytest.mark.parametrize("act", POINTS, ids=lambda act: act.__name__)
def test_every_change_of_a_request_is_followed_by_a_point(
    tmp_path: Path, loops: FakeLoopDevices, act: Callable[[Manager], None]
) -> None:
    fault = Fault()
    manager = prepared(tmp_path, loops, fault)
    act(manager)
    manager.server.stop()
    assert fault.passed == POINTS[act]


def crashed(directory: Path, loops: FakeLoopDevices, act: Callable[[Manager], None], number: int) -> StorageSettings:
    """Crash a manager in `act` after this change; return settings for the next start."""
    fault = Fault(number)
    manager = prepared(directory, loops, fault)
    with pytest.raises(Crash):
        act(manager)
    manager.die()
    assert fault.met
    return manager.server.settings


def files_fit_rows(manager: Manager) -> bool:
    pool = manager.server.pool
    rows = {row["uuid"]: row["blocks"] * row["blockSize"] for row in manager.get("/volumes/all/0/0")}
    snapshots = {row["uuid"]: row["blocks"] * row["blockSize"] for row in manager.get("/snapshots/all/0/0")}
    return (rows, snapshots) == (sizes_in(pool.volumes), sizes_in(pool.snapshots))


def sizes_in(directory: Path) -> dict[str, int]:
    return {file.name.removesuffix(".img"): file.stat().st_size for file in directory.iterdir()}


def desired(manager: Manager) -> list[str]:
    return sorted(
        attachment["uuid"]
        for client in manager.get("/clients/all/0/0")
        for attachment in client["attachments"].values()
        if attachment["action"] == "attaching"
    )


@after_every_step
def test_after_a_crash_files_fit_the_rows(
    tmp_path: Path, loops: FakeLoopDevices, act: Callable[[Manager], None], number: int
) -> None:
    settings = crashed(tmp_path, loops, act, number)
    with running(settings, loops) as manager:
        assert files_fit_rows(manager)
        assert all(
            row["action"] == "none" for kind in ("volumes", "snapshots") for row in manager.get(f"/{kind}/all/0/0")
        )


@after_every_step
def test_after_a_crash_exactly_the_attached_devices_are_bound(
    tmp_path: Path, loops: FakeLoopDevices, act: Callable[[Manager], None], number: int
) -> None:
    settings = crashed(tmp_path, loops, act, number)
    with running(settings, loops) as manager:
        assert [label.partition("/")[0] for label in loops.labels()] == desired(manager)
        shown = {path.name for path in (tmp_path / "node-1" / "proc" / "volumes").iterdir()}
        assert shown == {path.name for path in (tmp_path / "node-1" / "dev").iterdir()}
        assert len(shown) == len(loops.bound)


@after_every_step
def test_after_a_crash_acknowledged_volumes_and_attachments_are_there(
    tmp_path: Path, loops: FakeLoopDevices, act: Callable[[Manager], None], number: int
) -> None:
    settings = crashed(tmp_path, loops, act, number)
    with running(settings, loops) as manager:
        assert manager.volume("attached")["status"] == "online"
        assert act is delete or manager.volume("old")["status"] == "online"
        assert act is detach or manager.report("attached")["vol_status"] == 4
        assert act is delete_snapshot or manager.snapshot("kept")["isReady"]


@pytest.mark.parametrize("number", range(len(POINTS[cut])))
def test_after_a_crash_the_same_cut_succeeds(tmp_path: Path, loops: FakeLoopDevices, number: int) -> None:
    settings = crashed(tmp_path, loops, cut, number)
    with running(settings, loops, reflinks=FakeReflinks()) as manager:
        cut(manager)
        assert manager.snapshot("new")["isReady"]
        assert files_fit_rows(manager)


@pytest.mark.parametrize("number", range(len(POINTS[cut_group])))
def test_after_a_crash_a_group_is_whole_or_absent_and_the_same_cut_succeeds(
    tmp_path: Path, loops: FakeLoopDevices, number: int
) -> None:
    settings, freezes = crashed(tmp_path, loops, cut_group, number), FakeFreezes()
    with running(settings, loops, reflinks=FakeReflinks(), freezes=freezes) as manager:
        names = {row["_id"] for row in manager.get("/snapshots/all/0/0")} & {"new-1", "new-2"}
        assert names in (set(), {"new-1", "new-2"})
        assert bool(names) == (manager.group("new-group").get("isReady") is True)
        cut_group(manager)
        assert manager.group("new-group")["isReady"]
        assert files_fit_rows(manager)


@after_every_step
def test_after_a_crash_the_pool_can_be_used_up_and_given_back_whole(
    tmp_path: Path, loops: FakeLoopDevices, act: Callable[[Manager], None], number: int
) -> None:
    settings = crashed(tmp_path, loops, act, number)
    with running(settings, loops) as manager:
        for client in ("node-1", "node-2"):
            for attachment in manager.get(f"/clients/{client}")["attachments"].values():
                manager.detach(attachment["name"], client)
        for row in manager.get("/volumes/all/0/0"):
            manager.delete(row["_id"])
        for group in {row["group"]["_id"] for row in manager.get("/snapshots/all/0/0") if row["group"]}:
            manager.delete_group(group)
        for row in manager.get("/snapshots/all/0/0"):
            manager.delete_snapshot(row["_id"])
        assert manager.server.allocator.totals.allocated == 0
        assert not manager.server.pool.identities()
        assert not list(manager.server.pool.snapshots.iterdir())


def test_after_a_reboot_every_attachment_is_made_again(tmp_path: Path) -> None:
    settings = settings_in(tmp_path)
    before = FakeLoopDevices()
    with running(settings, before) as manager:
        manager.save("data")
        manager.attach("data", "node-1", mode="SHARED_READ_WRITE")
        manager.attach("data", "node-2", mode="SHARED_READ_WRITE")
    after = FakeLoopDevices()
    with running(settings, after) as manager:
        assert after.labels() == before.labels()
        assert manager.report("data")["vol_status"] == 4


def test_a_file_without_a_row_is_kept(tmp_path: Path, loops: FakeLoopDevices) -> None:
    settings = settings_in(tmp_path)
    with running(settings, loops):
        pass
    stray = tmp_path / "pool" / "volumes" / "0f0e0d0c-0000-4000-8000-000000000000.img"
    stray.write_bytes(b"precious")
    with running(settings, loops) as manager:
        manager.save("other")
    assert stray.read_bytes() == b"precious"


def test_a_snapshots_file_without_a_row_is_kept_and_an_unfinished_one_removed(
    tmp_path: Path, loops: FakeLoopDevices
) -> None:
    settings = settings_in(tmp_path)
    with running(settings, loops) as manager:
        snapshots = manager.server.pool.snapshots
    stray = snapshots / "0f0e0d0c-0000-4000-8000-000000000000.img"
    stray.write_bytes(b"precious")
    (snapshots / f"{stray.name}.cutting").write_bytes(b"half")
    with running(settings, loops):
        assert list(snapshots.iterdir()) == [stray]


def test_a_lost_file_that_may_have_held_data_is_not_made_anew(tmp_path: Path, loops: FakeLoopDevices) -> None:
    settings = settings_in(tmp_path)
    with running(settings, loops) as manager:
        manager.save("data")
        manager.attach("data")
        manager.detach("data")
        file = manager.server.pool.file(manager.uuid("data"))
    file.unlink()
    with running(settings, loops) as manager:
        assert manager.volume("data")["status"] == "offline"
        assert manager.attach("data")["error"]["innerMessage"]["id"] == 1569
        assert manager.extend("data", 2)["error"]["id"] == 1674
        assert not file.exists()


def lose(manager: Manager) -> Path:
    """Have a volume that held data, and take its file away; return where it is now."""
    manager.save("data")
    manager.attach("data")
    manager.detach("data")
    file = manager.server.pool.file(manager.uuid("data"))
    return file.rename(file.with_suffix(".elsewhere"))


def test_a_file_that_is_lost_while_a_second_attachment_waits_is_not_made_anew(
    manager: Manager, monkeypatch: pytest.MonkeyPatch
) -> None:
    manager.save("data")
    identity = manager.uuid("data")
    hold, file = VolumeLocks.hold, manager.server.pool.file(identity)

    def held_meanwhile(locks: VolumeLocks, of: str) -> AbstractContextManager[None]:
        monkeypatch.undo()
        manager.attach("data")
        file.unlink()
        return hold(locks, of)

    monkeypatch.setattr(VolumeLocks, "hold", held_meanwhile)
    manager.attach("data", reference="other")
    assert not file.exists()


def test_a_lost_file_is_seen_without_a_restart_and_without_an_attachment(manager: Manager) -> None:
    lose(manager)
    manager.server.attacher.check()
    assert (manager.volume("data")["status"], manager.volume("data")["health"]) == ("offline", "critical")


def test_attaching_a_lost_file_is_refused_with_the_reason_and_leaves_no_attachment(
    manager: Manager, loops: FakeLoopDevices
) -> None:
    lose(manager)
    inner = manager.attach("data")["error"]["innerMessage"]
    assert (inner["id"], manager.attachment("data"), loops.bound) == (1569, None, {})
    assert f"its file {manager.server.pool.file(manager.uuid('data'))} is gone or cut short" in inner["message"]
    assert manager.volume("data")["status"] == "offline"


def test_an_extension_of_a_lost_file_is_refused_with_the_reason(manager: Manager) -> None:
    lose(manager)
    error = manager.extend("data", 2)["error"]
    assert (error["id"], manager.volume("data")["status"]) == (1674, "offline")
    assert "gone or cut short, expected at least 999292928 bytes" in error["message"]


@pytest.mark.parametrize("by", ["look", "attach", "extend", "restart"])
def test_a_file_that_comes_back_makes_its_volume_usable_again(tmp_path: Path, loops: FakeLoopDevices, by: str) -> None:
    with running(settings_in(tmp_path), loops) as manager:
        elsewhere = lose(manager)
        manager.server.attacher.check()
        elsewhere.rename(elsewhere.with_suffix(".img"))
        if by == "look":
            manager.server.attacher.check()
        elif by == "attach":
            assert manager.attach("data")["success"]
        elif by == "extend":
            assert manager.extend("data", 2)["success"]
        assert by == "restart" or manager.volume("data")["status"] == "online"
    with running(settings_in(tmp_path), loops) as manager:
        assert (manager.volume("data")["status"], manager.volume("data")["health"]) == ("online", "healthy")
        assert manager.attach("data")["success"]
        assert manager.report("data")["vol_status"] == 4


def test_a_volume_whose_file_is_lost_under_its_device_is_degraded(manager: Manager, loops: FakeLoopDevices) -> None:
    """Its data is still there, through the device."""
    manager.save("data")
    manager.attach("data")
    manager.server.pool.file(manager.uuid("data")).unlink()
    manager.server.attacher.check()
    assert (manager.volume("data")["status"], len(loops.bound)) == ("degraded", 1)
    inner = manager.attach("data", "node-2", mode="SHARED_READ_WRITE")["error"]["innerMessage"]
    assert (inner["id"], "restore it from its attached device" in inner["message"]) == (1569, True)


@pytest.mark.parametrize("then", ["restored", "deleted"])
def test_a_device_that_holds_the_last_copy_of_its_data_stays_until_that_is_decided(
    tmp_path: Path, loops: FakeLoopDevices, then: str
) -> None:
    with running(settings_in(tmp_path), loops) as manager:
        manager.save("data")
        manager.attach("data")
        file = manager.server.pool.file(manager.uuid("data"))
        aside = file.rename(file.with_suffix(".aside"))
        assert manager.detach("data")["success"]
        assert (manager.attachment("data")["action"], len(loops.bound)) == ("detaching", 1)
    with running(settings_in(tmp_path), loops) as manager:
        assert (manager.volume("data")["status"], len(loops.bound)) == ("degraded", 1)
        if then == "restored":
            aside.rename(file)
        else:
            assert manager.delete("data")["success"]
        manager.retry("node-1")
        manager.server.attacher.check()
        assert not loops.bound
        assert manager.volume("data").get("status") == ("online" if then == "restored" else None)
        assert then == "deleted" or manager.attach("data")["success"]


def test_a_device_stays_until_the_file_that_replaces_its_own_is_whole(manager: Manager, loops: FakeLoopDevices) -> None:
    """An administrator copies a backup to where the file was: that takes a while, and may not succeed."""
    manager.save("data")
    manager.attach("data")
    file = manager.server.pool.file(manager.uuid("data"))
    size_bytes = file.stat().st_size
    file.rename(file.with_suffix(".aside"))  # so that its inode's number is given to no other
    file.touch()
    manager.detach("data")
    assert len(loops.bound) == 1
    os.truncate(file, size_bytes - 4096)
    manager.retry("node-1")
    assert len(loops.bound) == 1
    os.truncate(file, size_bytes)
    manager.retry("node-1")
    assert not loops.bound


def test_a_device_whose_own_file_was_cut_short_goes_for_it_holds_nothing_more(
    manager: Manager, loops: FakeLoopDevices
) -> None:
    manager.save("data")
    manager.attach("data")
    os.truncate(manager.server.pool.file(manager.uuid("data")), 4096)
    assert manager.detach("data")["success"]
    assert not loops.bound


def test_a_lost_volume_can_be_deleted(manager: Manager) -> None:
    lose(manager)
    assert manager.delete("data")["success"]
    assert manager.volume("data")["error"]["id"] == 1543


def test_a_volume_that_never_held_data_is_made_again(manager: Manager) -> None:
    manager.save("data")
    manager.server.pool.file(manager.uuid("data")).unlink()
    assert manager.attach("data")["success"]
    assert (manager.volume("data")["status"], manager.report("data")["vol_status"]) == ("online", 4)


@pytest.mark.parametrize("left_bytes", [0, GB // 2])
def test_a_file_that_was_cut_short_is_not_made_longer_with_nothing(
    tmp_path: Path, loops: FakeLoopDevices, left_bytes: int
) -> None:
    settings = settings_in(tmp_path)
    with running(settings, loops) as manager:
        manager.save("data")
        manager.attach("data")
        manager.extend("data", 2)
        manager.detach("data")
        file = manager.server.pool.file(manager.uuid("data"))
        os.truncate(file, left_bytes)
        assert manager.extend("data", 3)["error"]["id"] == 1674
        manager.attach("data")
        assert not loops.bound
    with running(settings, loops) as manager:
        assert manager.volume("data")["status"] == "offline"
        assert manager.attach("data")["error"]["innerMessage"]["id"] == 1569
        assert file.stat().st_size == left_bytes


def test_a_latest_extension_that_a_crash_left_out_of_the_file_is_made_up_for(
    tmp_path: Path, loops: FakeLoopDevices
) -> None:
    settings = settings_in(tmp_path)
    with running(settings, loops) as manager:
        manager.save("data")
        manager.attach("data")
        file = manager.server.pool.file(manager.uuid("data"))
        before = file.stat().st_size
        manager.extend("data", 2)
        after = file.stat().st_size
        manager.detach("data")
        os.truncate(file, before)
        manager.attach("data")
        assert file.stat().st_size == after
        manager.detach("data")
    os.truncate(file, before)
    with running(settings, loops) as manager:
        assert manager.volume("data")["status"] == "online"
        assert file.stat().st_size == after


def test_a_device_of_an_ended_attachment_that_is_in_use_is_left_alone(tmp_path: Path, loops: FakeLoopDevices) -> None:
    settings = settings_in(tmp_path)
    with running(settings, loops) as manager:
        manager.save("data")
        manager.attach("data")
        manager.hold("slow:node-1")
        manager.detach("data")
    loops.open = set(loops.bound)
    with running(settings, loops) as manager:
        assert len(loops.bound) == 1
        assert manager.attachment("data")["action"] == "detaching"
        assert manager.delete("data")["success"]
        assert manager.volume("data")["action"] == "markedForDeletion"
        loops.open.clear()
        manager.release("slow:node-1")
        assert not loops.bound
        assert manager.volume("data")["error"]["id"] == 1543


def test_sizes_are_kept_over_a_restart(tmp_path: Path, loops: FakeLoopDevices) -> None:
    settings = settings_in(tmp_path)
    with running(settings, loops) as manager:
        manager.save("data", 1)
        manager.extend("data", 2.5)
        blocks = manager.volume("data")["blocks"]
    with running(settings, loops) as manager:
        assert manager.volume("data")["blocks"] == blocks
        assert manager.server.allocator.size_bytes == 100 * GB
