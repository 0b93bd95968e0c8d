# SPDX-License-Identifier: Apache-2.0
"""Attach and detach: reservations, references, devices, files, and clients that are busy, slow or DOWN."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from csi_driver.embedded.model import ATTACHMENTS
from csi_driver.embedded.requests import DetachedVolume
from csi_driver.embedded.settings import StorageSettings
from tests.storage_switches import add_points
from tests.unit.embedded.fake_loops import FakeLoopDevices
from tests.unit.embedded.manager import Manager, running, settings_in

EXCLUSIVE = "EXCLUSIVE_READ_WRITE"


def take_over(manager: Manager, volume: str, client: str, version: int) -> None:
    answer = manager.attach(volume, client, mode=EXCLUSIVE, version=version, preempt=True, isDetachOthers=True)
    assert answer["success"]


def inner_id(answer: dict[str, dict[str, dict[str, int]]]) -> int:
    return answer["error"]["innerMessage"]["id"]


def test_an_attached_volume_has_a_device_and_says_so(manager: Manager, loops: FakeLoopDevices, tmp_path: Path) -> None:
    manager.save("data")
    manager.attach("data", reference="ref-a", mode=EXCLUSIVE)
    report = manager.report("data")
    assert (report["vol_status"], report["ioEnabled"], report["referenceIDs"]) == (4, 1, ["ref-a"])
    assert (tmp_path / "node-1" / "dev" / "data").exists()
    assert loops.size_bytes[0] == manager.volume("data")["blocks"] * 4096


def test_status_files_say_what_is_attached(manager: Manager, tmp_path: Path) -> None:
    manager.save("data")
    manager.attach("data", reference="ref-a")
    manager.attach("data", reference="ref-b")
    files = tmp_path / "node-1" / "proc" / "volumes" / "data"
    status = json.loads((files / "status.json").read_text())
    assert (status["name"], status["uuid"], status["dbg"]) == ("data", manager.uuid("data"), 0x200)
    assert status["size[blks]"] == manager.volume("data")["blocks"]
    assert (files / "blob.txt").read_text().splitlines()[-3:] == ["n_strings = 2", "ref-a", "ref-b"]


def test_status_files_are_those_of_a_newer_client(manager: Manager, tmp_path: Path) -> None:
    manager.save("data")
    manager.attach("data", mode=EXCLUSIVE)
    mine, real = tmp_path / "node-1/proc", Path(__file__).parents[2] / "recordings/nvmesh-client"
    shown, sample = (
        json.loads(path.read_text()) for path in (mine / "volumes/data/status.json", real / "volumes/B-rw-live.json")
    )
    differ = {key for key, value in shown.items() if sample[key] != value}
    assert differ == {"name", "uuid", "size[blks]", "short_id", "reservation_version"}
    assert [type(shown[key]) for key in differ] == [type(sample[key]) for key in differ]
    for name in ("status.json", "version"):
        shown, sample = (json.loads((root / name).read_text()) for root in (mine, real / "client"))
        assert shown.keys() <= sample.keys()
    assert (mine / "volumes/data/blob.txt").read_text().count(" = ") == 2


def test_the_client_files_name_the_client(manager: Manager, tmp_path: Path) -> None:
    status = json.loads((tmp_path / "node-1" / "proc" / "status.json").read_text())
    assert status["main"]["uuid"] == manager.get("/clients/node-1")["uuid"].upper()


def test_the_client_uuid_outlives_the_manager(tmp_path: Path) -> None:
    with running(settings_in(tmp_path)) as manager:
        first = manager.get("/clients/node-1")["uuid"]
    with running(settings_in(tmp_path)) as manager:
        assert manager.get("/clients/node-1")["uuid"] == first


def test_detach_removes_device_node_and_files(manager: Manager, loops: FakeLoopDevices, tmp_path: Path) -> None:
    manager.save("data")
    manager.attach("data")
    manager.detach("data")
    assert not loops.bound
    assert not list((tmp_path / "node-1" / "dev").iterdir())
    assert not list((tmp_path / "node-1" / "proc" / "volumes").iterdir())
    assert manager.attachment("data") is None
    assert manager.volume("data")["reservation"]["mode"] == 0


def test_the_device_stays_until_the_last_reference_goes(manager: Manager, loops: FakeLoopDevices) -> None:
    manager.save("data")
    manager.attach("data", reference="a")
    manager.attach("data", reference="b")
    manager.detach("data", reference="a")
    assert len(loops.bound) == 1
    manager.detach("data", reference="b")
    assert not loops.bound


def test_a_busy_device_stays_until_it_is_free(manager: Manager, loops: FakeLoopDevices) -> None:
    manager.save("data")
    manager.attach("data")
    loops.open.add(0)
    assert manager.detach("data")["success"]
    assert manager.attachment("data")["action"] == "detaching"
    assert (manager.report("data")["vol_status"], manager.report("data")["ioEnabled"]) == (4, 1)
    loops.open.clear()
    manager.retry("node-1")
    assert manager.attachment("data") is None


def test_force_does_not_take_a_device_in_use(manager: Manager, loops: FakeLoopDevices) -> None:
    manager.save("data")
    manager.attach("data")
    loops.open.add(0)
    manager.detach("data", force=True)
    assert len(loops.bound) == 1
    assert manager.attachment("data")["action"] == "detaching"


def test_a_client_shows_its_references_as_long_as_its_device_is_in_use(
    manager: Manager, loops: FakeLoopDevices, tmp_path: Path
) -> None:
    """They change only with a detachment that the client accepts."""
    manager.save("data")
    manager.attach("data", reference="ref-a")
    shown = (tmp_path / "node-1" / "proc" / "volumes" / "data" / "blob.txt").read_text()
    assert "ref-a" in shown
    loops.open.add(0)
    manager.detach("data", reference="ref-a")
    assert (manager.attachment("data")["referenceIDs"], manager.report("data")["referenceIDs"]) == ([], ["ref-a"])
    assert (tmp_path / "node-1" / "proc" / "volumes" / "data" / "blob.txt").read_text() == shown


def test_a_second_detachment_with_force_has_an_id_of_its_own(manager: Manager, loops: FakeLoopDevices) -> None:
    manager.save("data")
    manager.attach("data")
    loops.open.add(0)
    manager.detach("data")
    assert manager.detach("data")["error"]["id"] == 1622
    assert manager.detach("data", force=True)["error"]["id"] == 162223


def test_an_attach_while_detaching_reverses_it(manager: Manager, loops: FakeLoopDevices) -> None:
    manager.save("data")
    manager.attach("data", reference="a")
    loops.open.add(0)
    manager.detach("data", reference="a")
    manager.attach("data", reference="b")
    assert manager.attachment("data")["action"] == "attaching"
    assert manager.report("data")["vol_status"] == 4
    assert manager.report("data")["referenceIDs"] == ["b"]
    assert loops.attached_ever == 1


def test_a_read_only_attachment_is_a_read_only_device(manager: Manager, loops: FakeLoopDevices) -> None:
    manager.save("data")
    manager.attach("data", mode="SHARED_READ_ONLY")
    assert loops.bound[0].read_only


def test_a_read_only_volume_is_refused_for_writing(manager: Manager) -> None:
    manager.save("data", isReadOnly=True)
    assert inner_id(manager.attach("data")) == 1716


def test_another_exclusive_client_needs_version_and_preempt(manager: Manager) -> None:
    manager.save("data")
    manager.attach("data", "node-1", mode=EXCLUSIVE)
    assert inner_id(manager.attach("data", "node-2", mode=EXCLUSIVE)) == 1717
    assert manager.attach("data", "node-2", mode=EXCLUSIVE)["error"]["innerMessage"]["volumeReservation"] == 2
    assert inner_id(manager.attach("data", "node-2", mode=EXCLUSIVE, version=2)) == 1718
    assert manager.attach("data", "node-2", mode=EXCLUSIVE, version=2, preempt=True)["success"]


def test_taking_over_moves_the_device(manager: Manager, loops: FakeLoopDevices) -> None:
    manager.save("data")
    manager.attach("data", "node-1", mode=EXCLUSIVE)
    take_over(manager, "data", "node-2", 2)
    assert manager.report("data", "node-2")["vol_status"] == 4
    assert manager.attachment("data", "node-1") is None
    assert len(loops.bound) == 1


def test_taking_over_waits_for_a_device_in_use(manager: Manager, loops: FakeLoopDevices) -> None:
    manager.save("data")
    manager.attach("data", "node-1", mode=EXCLUSIVE)
    loops.open.add(0)
    take_over(manager, "data", "node-2", 2)
    assert len(loops.bound) == 1
    assert manager.report("data", "node-2") is None
    loops.open.clear()
    for client in ("node-1", "node-2"):
        manager.retry(client)
    assert manager.report("data", "node-2")["vol_status"] == 4


def test_taking_over_from_a_client_that_is_down_needs_no_answer_of_it(manager: Manager, loops: FakeLoopDevices) -> None:
    manager.save("data")
    manager.attach("data", "node-1", mode=EXCLUSIVE)
    manager.hold("client:node-1")
    assert manager.detach("data", "node-1")["success"]
    assert manager.attachment("data", "node-1")["action"] == "detaching"
    take_over(manager, "data", "node-2", 2)
    assert manager.report("data", "node-2")["vol_status"] == 4
    manager.release("client:node-1")
    assert manager.attachment("data", "node-1") is None
    assert len(loops.bound) == 1


def test_a_down_client_is_shown_down_and_its_attachments_wait(manager: Manager, loops: FakeLoopDevices) -> None:
    manager.save("data")
    manager.hold("client:node-1")
    assert manager.attach("data")["success"]
    assert manager.get("/clients/node-1")["client_status"] == 5
    assert manager.report("data") is None
    manager.release("client:node-1")
    assert manager.report("data")["vol_status"] == 4
    assert len(loops.bound) == 1


def test_a_detach_amid_the_attach_leaves_neither_device_nor_report(tmp_path: Path, loops: FakeLoopDevices) -> None:
    """The client had the device and had not said so when the detach was recorded."""
    desired = False

    def withdraw(point: str) -> None:
        nonlocal desired
        if point == "loops.attach" and not desired:
            desired = True
            manager.server.clients.detach("node-1", DetachedVolume(name="data", uuid=manager.uuid("data")))

    with running(settings_in(tmp_path), loops) as manager:
        add_points(manager.server, withdraw)
        manager.save("data")
        manager.attach("data")
        assert manager.attachment("data") is None
        assert manager.report("data")["vol_status"] == 2
        assert not loops.bound
        assert not (tmp_path / "node-1" / "dev" / "data").exists()


def test_a_report_that_a_crash_left_without_its_attachment_is_taken_back_at_start(
    tmp_path: Path, loops: FakeLoopDevices
) -> None:
    settings = settings_in(tmp_path)
    with running(settings, loops) as manager:
        manager.save("data")
        manager.attach("data")
        manager.server.store.write(lambda change: change.delete(ATTACHMENTS, manager.uuid("data"), "node-1"))
    loops.bound.clear()
    with running(settings, loops) as manager:
        assert manager.report("data")["vol_status"] == 2


def test_detaching_what_was_never_reported_ends_at_once(manager: Manager) -> None:
    manager.save("data")
    manager.hold("client:node-1")
    manager.attach("data")
    manager.detach("data")
    assert manager.attachment("data") is None
    assert manager.volume("data")["reservation"] == {
        **manager.volume("data")["reservation"], "mode": 0, "version": 3, "attachedClients": [],
    }  # fmt: skip


def test_attached_devices_grow_with_the_volume(manager: Manager, loops: FakeLoopDevices) -> None:
    manager.save("data", 1)
    manager.attach("data")
    manager.extend("data", 2)
    assert loops.size_bytes[0] == manager.volume("data")["blocks"] * 4096


def test_unknown_things_have_their_own_ids(manager: Manager) -> None:
    manager.save("data")
    assert manager.attach("data", "nobody")["error"]["id"] == 1621
    assert manager.detach("data", "nobody")["error"]["id"] == 1608
    assert manager.detach("data")["error"]["id"] == 162222
    manager.attach("data", reference="a")
    assert manager.detach("data", reference="b")["error"]["id"] == 162223


def test_a_stale_node_of_another_device_is_removed_at_start(tmp_path: Path, loops: FakeLoopDevices) -> None:
    settings: StorageSettings = settings_in(tmp_path)
    with running(settings, loops) as manager:
        manager.save("data")
        manager.attach("data")
        manager.hold("slow:node-1")
        manager.detach("data")
    with running(settings, loops):
        assert not list((tmp_path / "node-1" / "dev").iterdir())


def test_a_device_in_use_read_only_becomes_writable_when_it_is_free(manager: Manager, loops: FakeLoopDevices) -> None:
    manager.save("data")
    manager.attach("data", mode="SHARED_READ_ONLY")
    loops.open.add(0)
    take_over(manager, "data", "node-1", 2)
    assert [device.read_only for device in loops.bound.values()] == [True]
    assert manager.report("data")["reservation"]["mode"] == 1
    loops.open.clear()
    manager.retry("node-1")
    assert [device.read_only for device in loops.bound.values()] == [False]
    assert (manager.report("data")["vol_status"], manager.report("data")["reservation"]["mode"]) == (4, 3)


def test_taking_over_waits_for_a_slow_client(manager: Manager) -> None:
    manager.save("data")
    manager.attach("data", "node-1", mode=EXCLUSIVE)
    manager.hold("slow:node-1")
    take_over(manager, "data", "node-2", 2)
    assert manager.report("data", "node-2") is None
    manager.release("slow:node-1")
    manager.retry("node-2")
    assert manager.report("data", "node-2")["vol_status"] == 4


def test_a_preempted_client_does_not_get_its_device_back_after_a_reboot(tmp_path: Path) -> None:
    with running(settings_in(tmp_path)) as manager:
        manager.save("data")
        manager.attach("data", "node-1", mode=EXCLUSIVE)
        manager.attach("data", "node-2", mode=EXCLUSIVE, version=2, preempt=True)
    after = FakeLoopDevices()
    with running(settings_in(tmp_path), after) as manager:
        assert len(after.bound) == 1
        assert manager.report("data", "node-1")["vol_status"] == 17
        assert manager.report("data", "node-2")["vol_status"] == 4


def test_a_directory_that_cannot_be_written_is_tried_again(manager: Manager, tmp_path: Path) -> None:
    manager.save("data")
    shown = tmp_path / "node-1" / "proc" / "volumes"
    shown.rmdir()
    shown.write_text("in the way")
    assert manager.attach("data")["success"]
    assert manager.report("data") is None
    shown.unlink()
    manager.retry("node-1")
    assert manager.report("data")["vol_status"] == 4


@pytest.mark.parametrize(("left", "stays"), [(".status.json.new", []), (".blob.txt.new", []), ("other", ["other"])])
def test_the_status_files_of_a_detached_volume_go_with_what_a_crash_left(
    manager: Manager, tmp_path: Path, left: str, stays: list[str]
) -> None:
    manager.save("data")
    manager.attach("data")
    directory = tmp_path / "node-1" / "proc" / "volumes" / "data"
    (directory / left).write_text("half a file")
    manager.detach("data")
    assert [path.name for path in tmp_path.glob("node-1/proc/volumes/data/*")] == stays
    assert directory.exists() == bool(stays)


def test_a_status_file_has_a_line_for_each_field(manager: Manager, tmp_path: Path) -> None:
    manager.save("data")
    manager.attach("data")
    text = (tmp_path / "node-1" / "proc" / "volumes" / "data" / "status.json").read_text()
    assert text == json.dumps(json.loads(text), indent=1) + "\n"
