# SPDX-License-Identifier: Apache-2.0
"""Groups of snapshots, with models of the kernel's reflinks and freezes; the real ones are in tests/contract."""

from __future__ import annotations

import errno
from collections.abc import Iterator
from pathlib import Path

import pytest

from csi_driver.host.nvme_target import NvmeTarget
from tests.fakes.nvme_kernel import NvmeKernel
from tests.unit.embedded.fake_freezes import FakeFreezes
from tests.unit.embedded.fake_loops import FakeLoopDevices
from tests.unit.embedded.fake_reflinks import FakeReflinks
from tests.unit.embedded.manager import Json, Manager, running, settings_in

EXISTS, NOT_SUPPORTED, GROUP_MEMBER, NOT_FREEZABLE, GROUP_NOT_FOUND = 91001, 91003, 91007, 91008, 91010
MEMBERS = {"snap-a": "a", "snap-b": "b"}


@pytest.fixture
def freezes() -> FakeFreezes:
    return FakeFreezes()


@pytest.fixture
def reflinks() -> FakeReflinks:
    return FakeReflinks()


@pytest.fixture
def manager(tmp_path: Path, loops: FakeLoopDevices, reflinks: FakeReflinks, freezes: FakeFreezes) -> Iterator[Manager]:
    with running(settings_in(tmp_path), loops, None, reflinks, freezes) as running_manager:
        for volume in ("a", "b"):
            running_manager.save(volume, metadata={"of": volume})
        yield running_manager


def error(answer: Json) -> int:
    assert not answer["success"]
    return int(answer["error"]["id"])


def snapshots(manager: Manager) -> list[str]:
    return sorted(row["_id"] for row in manager.get("/snapshots/all/0/0"))


def is_empty(manager: Manager) -> bool:
    files = list(manager.server.pool.snapshots.iterdir())
    totals = manager.server.allocator.totals
    return (snapshots(manager), files, totals.shared) == ([], [], 0)


def test_the_members_of_a_group_are_snapshots_of_one_moment(manager: Manager, freezes: FakeFreezes) -> None:
    answer = manager.cut_group("group", MEMBERS, metadata={"x": 1})
    group = manager.group("group")
    assert (answer["success"], answer["uuid"], answer["payload"]) == (True, group["uuid"], {"snapshotGroup": group})
    assert (group["isReady"], group["metadata"]) == (True, {"x": 1})
    assert {member["_id"]: member["volume"]["_id"] for member in group["snapshots"]} == MEMBERS
    assert {member["created"] for member in group["snapshots"]} == {group["created"]}
    assert [member["sourceMetadata"] for member in group["snapshots"]] == [{"of": "a"}, {"of": "b"}]
    assert manager.snapshot("snap-a")["group"] == {"_id": "group", "uuid": group["uuid"]}
    assert freezes.held_ever == [[f"{manager.uuid(volume)}.img" for volume in ("a", "b")]]


def test_the_exports_of_the_members_are_held(
    tmp_path: Path, loops: FakeLoopDevices, reflinks: FakeReflinks, freezes: FakeFreezes
) -> None:
    """Of those that a host can write by: neither that of another volume, nor a reader's of a copy."""
    kernel = NvmeKernel()
    settings = settings_in(tmp_path, export="nvme-tcp", export_addresses=("127.0.0.1",))
    target = NvmeTarget(kernel.configfs, kernel.connections)
    with running(settings, loops, None, reflinks, freezes, None, target) as manager:
        for volume in ("a", "b", "c"):
            manager.save(volume)
        for volume, node in (("a", "node-a"), ("a", "node-b"), ("c", "node-a")):
            manager.attach(volume, node, mode="SHARED_READ_WRITE")
        assert manager.cut_group("group", MEMBERS)["success"]
        nqns = sorted(manager.report("a", node)["export"]["nqn"] for node in ("node-a", "node-b"))
    assert [sorted(each) for each in freezes.exports_ever] == [nqns]


def test_the_feature_is_shown(manager: Manager) -> None:
    assert manager.get("/systemInfo")["features"]["groupSnapshots"] is True


def test_a_manager_without_freezes_refuses(tmp_path: Path, loops: FakeLoopDevices, reflinks: FakeReflinks) -> None:
    with running(settings_in(tmp_path), loops, None, reflinks) as manager:
        manager.save("a")
        assert error(manager.cut_group("group", {"snap-a": "a"})) == NOT_SUPPORTED
        assert manager.get("/systemInfo")["features"]["groupSnapshots"] is False


def test_a_repeated_request_answers_with_the_same_group(manager: Manager, freezes: FakeFreezes) -> None:
    first, again = (manager.cut_group("group", members) for members in (MEMBERS, dict(reversed(MEMBERS.items()))))
    assert first == again
    assert len(freezes.held_ever) == 1


@pytest.mark.parametrize(
    "members", [{"snap-a": "a"}, {"snap-a": "b", "snap-b": "a"}, {**MEMBERS, "snap-c": "c"}, {"other": "a"}]
)
def test_a_group_of_the_name_with_other_members_is_refused(manager: Manager, members: dict[str, str]) -> None:
    manager.save("c")
    manager.cut_group("group", MEMBERS)
    assert error(manager.cut_group("group", members)) == EXISTS
    assert snapshots(manager) == list(MEMBERS)


def test_a_snapshot_of_a_members_name_is_refused(manager: Manager) -> None:
    manager.cut("snap-b", "b")
    assert error(manager.cut_group("group", MEMBERS)) == EXISTS
    assert error(manager.cut_group("other", {"snap-b": "b"})) == EXISTS
    assert snapshots(manager) == ["snap-b"]


@pytest.mark.parametrize("members", [[], [("x", "a"), ("x", "b")], [("x", "a"), ("y", "a")]])
def test_a_member_is_named_once(manager: Manager, members: list[tuple[str, str]]) -> None:
    rows = [{"name": name, "volume": {"_id": of, "uuid": manager.uuid(of)}} for name, of in members]
    answer = manager.post("/snapshotGroups/save", [{"name": "group", "members": rows}])
    assert answer["error"]["id"] == 422


def test_a_member_alone_is_not_deleted(manager: Manager) -> None:
    manager.cut_group("group", MEMBERS)
    assert error(manager.delete_snapshot("snap-a")) == GROUP_MEMBER
    assert snapshots(manager) == list(MEMBERS)


def test_a_group_is_deleted_with_its_members(manager: Manager) -> None:
    manager.cut_group("group", MEMBERS)
    identity = manager.group("group")["uuid"]
    assert manager.delete_group("group")["success"]
    assert is_empty(manager)
    assert manager.group("group")["error"]["id"] == GROUP_NOT_FOUND
    assert error(manager.delete_group("group", identity)) == GROUP_NOT_FOUND


def test_another_group_of_the_name_is_not_deleted(manager: Manager) -> None:
    manager.cut_group("group", MEMBERS)
    assert error(manager.delete_group("group", "22222222-2222-2222-2222-222222222222")) == GROUP_NOT_FOUND
    assert snapshots(manager) == list(MEMBERS)


def test_a_group_outlives_its_sources(manager: Manager) -> None:
    manager.cut_group("group", MEMBERS)
    manager.delete("a")
    assert [member["_id"] for member in manager.group("group")["snapshots"]] == list(MEMBERS)
    assert manager.cut_group("group", MEMBERS | {"snap-b": "b"}) != {}


@pytest.mark.parametrize("failure", ["freeze", "written", "reflink", "space"])
def test_a_failure_leaves_nothing_and_the_retry_succeeds(
    manager: Manager, freezes: FakeFreezes, reflinks: FakeReflinks, failure: str
) -> None:
    if failure == "freeze":
        freezes.refuses = "it is open"
    elif failure == "written":
        freezes.written = True
    else:
        reflinks.refuses = errno.EIO if failure == "reflink" else errno.ENOSPC
    answer = manager.cut_group("group", MEMBERS)
    assert answer["error"]["id"] == {"reflink": 500, "space": 91005}.get(failure, NOT_FREEZABLE)
    assert is_empty(manager)
    assert not freezes.frozen
    freezes.refuses, freezes.written, reflinks.refuses = "", False, 0
    assert manager.cut_group("group", MEMBERS)["success"]


@pytest.mark.parametrize("state", ["deleting", "gone", "lost"])
def test_a_volume_that_cannot_be_cut_refuses_the_group(manager: Manager, state: str) -> None:
    rows = [{"name": f"snap-{of}", "volume": {"_id": of, "uuid": manager.uuid(of)}} for of in ("a", "b")]
    if state == "deleting":
        manager.hold("delete")
    if state == "lost":
        manager.attach("b")
        manager.server.pool.file(manager.uuid("b")).unlink()
    else:
        manager.delete("b")
    (answer,) = manager.post("/snapshotGroups/save", [{"name": "group", "members": rows}])
    assert answer["error"]["id"] == (1543 if state == "gone" else 91009)
    assert is_empty(manager)
    manager.release("delete")
