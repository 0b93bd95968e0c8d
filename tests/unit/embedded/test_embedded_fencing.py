# SPDX-License-Identifier: Apache-2.0
"""A volume that is taken over has one writer: the previous client loses its device, or its I/O while it is in use."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from csi_driver.embedded.model import ATTACHMENTS, REPORTS, VOLUMES
from tests.storage_switches import add_points
from tests.unit.embedded.fake_loops import FakeLoopDevices
from tests.unit.embedded.manager import Json, Manager, running, settings_in
from tests.unit.embedded.test_embedded_crashes import Crash

EXCLUSIVE, SHARED, READ_ONLY = "EXCLUSIVE_READ_WRITE", "SHARED_READ_WRITE", "SHARED_READ_ONLY"
DETACHED, ATTACHED, DENIED = 2, 4, 17


def take_over(manager: Manager, mode: str = EXCLUSIVE, client: str = "node-2", *, detach: bool = True) -> None:
    version = manager.volume("data")["reservation"]["version"]
    answer = manager.attach(
        "data", client, reference="new", mode=mode, version=version, preempt=True, isDetachOthers=detach
    )
    assert answer["success"]


def in_use(manager: Manager, loops: FakeLoopDevices, mode: str = EXCLUSIVE) -> Path:
    """Attach the volume to node-1, with its device open there; return the volume's file."""
    manager.save("data")
    manager.attach("data", "node-1", reference="old", mode=mode)
    loops.open.add(0)
    return loops.bound[0].file


def lost(manager: Manager, loops: FakeLoopDevices, mode: str = EXCLUSIVE) -> Path:
    """As `in_use`; then node-1 is lost and is to detach the volume."""
    file = in_use(manager, loops, mode)
    manager.hold("client:node-1")
    assert manager.detach("data", "node-1", reference="old")["success"]
    return file


def status(manager: Manager, tmp_path: Path, client: str = "node-1") -> tuple[Json, list[str]]:
    files = tmp_path / client / "proc" / "volumes" / "data"
    return json.loads((files / "status.json").read_text()), (files / "blob.txt").read_text().splitlines()


@pytest.mark.parametrize(
    ("before", "mode"),
    [(EXCLUSIVE, EXCLUSIVE), (EXCLUSIVE, SHARED), (EXCLUSIVE, READ_ONLY), (SHARED, EXCLUSIVE), (SHARED, READ_ONLY)],
)
def test_a_lost_clients_device_in_use_carries_no_io_when_another_has_the_volume(
    manager: Manager, loops: FakeLoopDevices, before: str, mode: str
) -> None:
    file = lost(manager, loops, before)
    take_over(manager, mode)
    assert manager.report("data", "node-2")["vol_status"] == ATTACHED
    assert loops.bound[0].fenced
    assert loops.writers(file) == ([] if mode == READ_ONLY else [1])


def test_nobody_gets_a_volume_whose_last_writer_cannot_be_cut_off(manager: Manager, loops: FakeLoopDevices) -> None:
    file = lost(manager, loops)
    loops.fences = False
    take_over(manager)
    assert (manager.report("data", "node-2"), loops.writers(file)) == (None, [0])
    loops.open.clear()
    manager.retry("node-2")
    assert (manager.report("data", "node-2")["vol_status"], len(loops.writers(file))) == (ATTACHED, 1)


def test_a_client_that_returns_learns_that_it_holds_nothing_any_more(
    manager: Manager, loops: FakeLoopDevices, tmp_path: Path
) -> None:
    lost(manager, loops)
    take_over(manager)
    manager.release("client:node-1")
    report = manager.report("data", "node-1")
    assert (report["vol_status"], report["ioEnabled"]) == (ATTACHED, 0)
    shown, blob = status(manager, tmp_path)
    assert (shown["dbg"], shown["attach_status"], blob[1:]) == (0x1092, "Preempted", ["n_strings = 1", "old"])


def test_what_a_returning_client_still_has_open_goes_when_it_is_closed(
    manager: Manager, loops: FakeLoopDevices, tmp_path: Path
) -> None:
    file = lost(manager, loops)
    take_over(manager)
    manager.release("client:node-1")
    loops.open.clear()
    manager.retry("node-1")
    assert manager.attachment("data", "node-1") is None
    assert loops.writers(file) == list(loops.bound) == [1]
    assert not (tmp_path / "node-1" / "proc" / "volumes" / "data").exists()
    assert manager.report("data", "node-2")["vol_status"] == ATTACHED


def test_a_device_that_was_cut_off_is_never_used_again(manager: Manager, loops: FakeLoopDevices) -> None:
    lost(manager, loops)
    take_over(manager)
    manager.release("client:node-1")
    manager.detach("data", "node-2", reference="new")
    take_over(manager, client="node-1")
    report = manager.report("data", "node-1")
    assert (report["vol_status"], report["ioEnabled"]) == (ATTACHED, 0)
    loops.open.clear()
    manager.retry("node-1")
    assert manager.report("data", "node-1")["vol_status"] == ATTACHED
    assert [device.fenced for device in loops.bound.values()] == [False]


def test_a_client_that_is_preempted_but_not_sent_away_loses_its_io(
    manager: Manager, loops: FakeLoopDevices, tmp_path: Path
) -> None:
    file = in_use(manager, loops)
    take_over(manager, detach=False)
    assert manager.attachment("data", "node-1")["action"] == "attaching"
    report = manager.report("data", "node-1")
    assert (report["vol_status"], report["ioEnabled"]) == (DENIED, 0)
    assert loops.writers(file) == [1]
    shown, blob = status(manager, tmp_path)
    assert (shown["dbg"], blob[2:]) == (0x1092, ["old"])
    manager.extend("data", 2)
    assert status(manager, tmp_path)[0]["dbg"] == 0x1092


def test_a_client_that_is_sent_away_may_write_out_what_it_has_first(manager: Manager, loops: FakeLoopDevices) -> None:
    file = in_use(manager, loops)
    take_over(manager)
    assert not loops.bound[0].fenced
    assert (manager.report("data", "node-2"), loops.writers(file)) == (None, [0])


def test_a_sharer_that_takes_the_volume_for_itself_waits_for_the_others(
    manager: Manager, loops: FakeLoopDevices
) -> None:
    manager.save("data")
    for client in ("node-1", "node-2"):
        manager.attach("data", client, mode=SHARED)
    loops.open.add(0)
    take_over(manager)
    assert manager.report("data", "node-2")["vol_status"] == ATTACHED
    loops.open.clear()
    for client in ("node-1", "node-2"):
        manager.retry(client)
    assert manager.report("data", "node-2")["vol_status"] == ATTACHED


def test_nobody_gets_a_volume_while_a_client_that_is_told_of_no_more_has_its_device(
    manager: Manager, loops: FakeLoopDevices
) -> None:
    """As an earlier version left it, which ended an attachment whose device had not been reported."""
    file = in_use(manager, loops)
    identity = manager.uuid("data")

    def end(change: Json) -> None:
        volume = change.get(VOLUMES, "data")
        change.put(VOLUMES, "data", replace(volume, reservation=volume.reservation.released("node-1")))
        change.delete(ATTACHMENTS, identity, "node-1")
        change.delete(REPORTS, identity, "node-1")

    manager.server.store.write(end)
    assert manager.attach("data", "node-2", mode=EXCLUSIVE)["success"]
    assert (manager.report("data", "node-2"), loops.writers(file)) == (None, [0])
    loops.open.clear()
    manager.retry("node-1")
    manager.retry("node-2")
    assert (manager.report("data", "node-2")["vol_status"], loops.writers(file)) == (ATTACHED, list(loops.bound))


def test_a_manager_that_starts_again_knows_which_device_is_cut_off(tmp_path: Path, loops: FakeLoopDevices) -> None:
    with running(settings_in(tmp_path), loops) as manager:
        file = lost(manager, loops)
        take_over(manager)
    with running(settings_in(tmp_path), loops) as manager:
        assert loops.writers(file) == [1]
        assert manager.report("data", "node-1")["ioEnabled"] == 0
        assert manager.report("data", "node-2")["vol_status"] == ATTACHED


def test_a_crash_right_after_the_cut_is_mended_at_the_next_start(tmp_path: Path, loops: FakeLoopDevices) -> None:
    def die(point: str) -> None:
        if point == "loops.fence":
            raise Crash

    with running(settings_in(tmp_path), loops) as manager:
        add_points(manager.server, die)
        file = lost(manager, loops)
        with pytest.raises(Crash):
            take_over(manager)
        assert loops.writers(file) == []
    with running(settings_in(tmp_path), loops) as manager:
        assert loops.writers(file) == [1]
        assert manager.report("data", "node-2")["vol_status"] == ATTACHED
