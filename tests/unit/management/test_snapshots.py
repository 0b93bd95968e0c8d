# SPDX-License-Identifier: Apache-2.0
"""Requests of snapshots, groups and clones, and results of the responses."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import cast

import pytest

from csi_driver.deadline import Deadline
from csi_driver.errors import (
    CapacityOutOfRange,
    DriverError,
    Exhausted,
    Incompatible,
    InvalidRequest,
    OperationPending,
    PreconditionFailed,
    SnapshotNotFound,
    StorageUnavailable,
    VolumeNotFound,
)
from csi_driver.management.client import ManagementClient
from csi_driver.management.codec import NVMESH_FEATURES, decode_system_info, decode_volume
from csi_driver.management.snapshots import decode_group, decode_snapshot
from csi_driver.storage_model import ContentSource, Features, Layout, NewMember, SourceKind, VolumeSpec
from tests.unit.management.double import Breaks, ManagementDouble, Says, sample
from tests.unit.management.test_client import absent, refused

VOLUME = decode_volume(sample("volume"))
UUID = "11111111-2222-4333-8444-555555555555"
ROW = {
    "_id": "snap-1",
    "uuid": UUID,
    "volume": {"_id": VOLUME.name, "uuid": VOLUME.uuid},
    "sourceMetadata": {"csi_name": "pvc-1"},
    "blockSize": 4096,
    "blocks": 256,
    "created": "2026-11-29T02:42:00.123456Z",
    "isReady": True,
    "group": None,
    "isEncrypted": False,
    "metadata": {"csi_name": "snapshot-1"},
}
GROUP = {
    "_id": "group-1",
    "uuid": UUID,
    "created": "2026-11-29T02:42:00.000000Z",
    "isReady": True,
    "metadata": {},
    "snapshots": [{**ROW, "group": {"_id": "group-1", "uuid": UUID}}],
}
CUT_AT = datetime(2026, 11, 29, 2, 42, 0, 123456, UTC)


def after(**payload: object) -> Says:
    return Says([{"_id": "x", "uuid": UUID, "success": True, "error": None, "payload": payload}])


def test_a_snapshot_is_decoded_with_its_source_its_size_and_its_time() -> None:
    snapshot = decode_snapshot(ROW)
    assert (snapshot.volume_name, snapshot.volume_uuid) == (VOLUME.name, VOLUME.uuid)
    assert (snapshot.size_bytes, snapshot.created, snapshot.is_ready) == (1 << 20, CUT_AT, True)
    assert (snapshot.source_metadata, snapshot.metadata) == ({"csi_name": "pvc-1"}, {"csi_name": "snapshot-1"})


def test_a_snapshot_that_is_being_cut_has_no_time_yet() -> None:
    assert not decode_snapshot({**ROW, "isReady": False, "created": ""}).is_ready


@pytest.mark.parametrize(
    "change", [{"created": ""}, {"created": "2026-11-29T02:42:00"}, {"volume": {}}, {"blocks": -1}]
)
def test_a_snapshot_document_that_lacks_something_is_invalid(change: dict[str, object]) -> None:
    with pytest.raises(StorageUnavailable):
        decode_snapshot({**ROW, **change})


def test_a_group_is_decoded_with_its_snapshots() -> None:
    group = decode_group(GROUP)
    assert [(each.name, each.group_name, each.group_uuid) for each in group.snapshots] == [("snap-1", "group-1", UUID)]


def test_a_management_that_tells_no_features_has_none() -> None:
    assert decode_system_info({"version": "3.5.0"}).features == NVMESH_FEATURES
    assert "NVMesh" in NVMESH_FEATURES.reason


def test_the_features_are_those_that_the_management_tells() -> None:
    told = {"snapshots": True, "groupSnapshots": False, "changedBlocks": "yes", "reason": "no xfs"}
    features = decode_system_info({"version": "3.5.0", "features": told}).features
    assert features == Features(snapshots=True, deletions=True, reason="embedded storage manager: no xfs")


def test_a_snapshot_is_looked_up_by_its_name(
    server: ManagementDouble, client: ManagementClient, deadline: Deadline
) -> None:
    server.on("GET", "/snapshots/snap-1", Says(ROW))
    server.on("GET", "/snapshots/snap-2", absent(91002))
    assert client.snapshot("snap-1", deadline=deadline) == decode_snapshot(ROW)
    assert client.snapshot("snap-2", deadline=deadline) is None


def test_a_page_of_snapshots_names_the_volume_and_the_last_name(
    server: ManagementDouble, client: ManagementClient, deadline: Deadline
) -> None:
    server.on("GET", "/snapshots/all/0/3", Says([ROW]))
    found = client.snapshots(after="snap-0", limit=3, volume_uuid=VOLUME.uuid.upper(), deadline=deadline)
    assert [each.name for each in found] == ["snap-1"]
    query = server.received[-1].query
    assert query["filter"] == {"_id": {"$gt": "snap-0"}, "volume.uuid": VOLUME.uuid}
    assert query["sort"] == {"_id": 1}


def test_a_cut_names_the_volume_with_its_uuid(
    server: ManagementDouble, client: ManagementClient, deadline: Deadline
) -> None:
    server.on("POST", "/snapshots/save", after(snapshot=ROW))
    assert client.create_snapshot("snap-1", VOLUME, {"k": "v"}, deadline=deadline) == decode_snapshot(ROW)
    volume = {"_id": VOLUME.name, "uuid": VOLUME.uuid}
    assert server.received[-1].body == [{"name": "snap-1", "volume": volume, "metadata": {"k": "v"}}]


def test_a_cut_whose_answer_is_lost_is_sent_again(
    server: ManagementDouble, client: ManagementClient, deadline: Deadline
) -> None:
    server.on("POST", "/snapshots/save", Breaks(), after(snapshot=ROW))
    assert client.create_snapshot("snap-1", VOLUME, {}, deadline=deadline).name == "snap-1"
    assert len(server.seen("/snapshots/save")) == 2


@pytest.mark.parametrize(
    ("number", "family"),
    [
        (91001, Incompatible),
        (1543, VolumeNotFound),
        (91003, PreconditionFailed),
        (91004, PreconditionFailed),
        (91005, Exhausted),
        (91006, OperationPending),
        (91008, PreconditionFailed),
        (91009, PreconditionFailed),
        (99999, StorageUnavailable),
    ],
)
def test_each_refusal_of_a_cut_has_its_family(
    server: ManagementDouble, client: ManagementClient, deadline: Deadline, number: int, family: type[DriverError]
) -> None:
    server.on("POST", "/snapshots/save", refused(number, message="the reason"))
    with pytest.raises(family) as refusal:
        client.create_snapshot("snap-1", VOLUME, {}, deadline=deadline)
    expected = VOLUME.name if family is VolumeNotFound else "the reason"
    assert expected in str(refusal.value)


def test_a_deletion_names_the_uuid_and_takes_absence_as_done(
    server: ManagementDouble, client: ManagementClient, deadline: Deadline
) -> None:
    server.on("POST", "/snapshots/delete", after(snapshot=None), refused(91002))
    server.on("POST", "/snapshotGroups/delete", refused(91010))
    client.delete_snapshot("snap-1", UUID, deadline=deadline)
    client.delete_snapshot("snap-1", UUID, deadline=deadline)
    client.delete_snapshot_group("group-1", UUID, deadline=deadline)
    assert server.received[-2].body == [{"_id": "snap-1", "uuid": UUID}]
    assert server.received[-1].body == [{"_id": "group-1", "uuid": UUID}]


def test_a_member_of_a_group_is_not_deleted_alone(
    server: ManagementDouble, client: ManagementClient, deadline: Deadline
) -> None:
    server.on("POST", "/snapshots/delete", refused(91007, message="a member of group-1"))
    with pytest.raises(InvalidRequest, match="group-1"):
        client.delete_snapshot("snap-1", UUID, deadline=deadline)


def test_a_group_is_cut_with_all_its_members(
    server: ManagementDouble, client: ManagementClient, deadline: Deadline
) -> None:
    server.on("POST", "/snapshotGroups/save", after(snapshotGroup=GROUP))
    members = [NewMember("snap-1", VOLUME, {"a": 1})]
    assert client.create_snapshot_group("group-1", members, {"k": 1}, deadline=deadline) == decode_group(GROUP)
    volume = {"_id": VOLUME.name, "uuid": VOLUME.uuid}
    sent = {"name": "snap-1", "volume": volume, "metadata": {"a": 1}}
    assert server.received[-1].body == [{"name": "group-1", "metadata": {"k": 1}, "members": [sent]}]


def test_a_group_is_looked_up_by_its_name(
    server: ManagementDouble, client: ManagementClient, deadline: Deadline
) -> None:
    server.on("GET", "/snapshotGroups/group-1", Says(GROUP))
    server.on("GET", "/snapshotGroups/group-2", absent(91010))
    assert client.snapshot_group("group-1", deadline=deadline) == decode_group(GROUP)
    assert client.snapshot_group("group-2", deadline=deadline) is None


# --- volumes made from a source -----------------------------------------------------------------------------

CLONE = VolumeSpec("v2", 1.0, {}, layout=Layout(), source=ContentSource(SourceKind.SNAPSHOT, "snap-1", UUID))


def test_a_volume_with_a_source_is_made_by_the_route_of_clones(
    server: ManagementDouble, client: ManagementClient, deadline: Deadline
) -> None:
    server.on("POST", "/clones/save", after(volume=sample("volume")))
    assert client.create_volume(CLONE, deadline=deadline) == VOLUME
    body = cast("list[dict[str, object]]", server.received[-1].body)
    assert [item["source"] for item in body] == [{"kind": "snapshot", "_id": "snap-1", "uuid": UUID}]


@pytest.mark.parametrize(
    ("number", "family", "text"),
    [
        (91002, SnapshotNotFound, "snap-1"),
        (1543, VolumeNotFound, "snap-1"),
        (91011, CapacityOutOfRange, "reason"),
        (91012, PreconditionFailed, "reason"),
        (91003, PreconditionFailed, "reason"),
    ],
)
def test_each_refusal_of_a_clone_has_its_family(
    server: ManagementDouble,
    client: ManagementClient,
    deadline: Deadline,
    number: int,
    family: type[DriverError],
    text: str,
) -> None:
    server.on("POST", "/clones/save", refused(1664, number, message="the reason"))
    with pytest.raises(family, match=text):
        client.create_volume(CLONE, deadline=deadline)


# --- changed blocks -----------------------------------------------------------------------------------------


def test_changed_ranges_are_read_in_pages(
    server: ManagementDouble, client: ManagementClient, deadline: Deadline
) -> None:
    server.on(
        "GET", "/snapshots/changes/snap-1", Says({"ranges": [[0, 4096], [8192, 4096]], "next": 12288, "bytes": 1})
    )
    snapshot = decode_snapshot(ROW)
    found = client.changed_ranges(snapshot, snapshot, offset=0, count=2, deadline=deadline)
    assert (found.ranges, found.next_offset, found.size_bytes) == (((0, 4096), (8192, 4096)), 12288, 1)
    assert server.received[-1].query == {"uuid": UUID, "offset": 0, "count": 2, "base": "snap-1", "baseUuid": UUID}


def test_changes_of_a_deleted_snapshot_are_not_found(
    server: ManagementDouble, client: ManagementClient, deadline: Deadline
) -> None:
    server.on("GET", "/snapshots/changes/snap-1", absent(91002))
    with pytest.raises(SnapshotNotFound):
        client.changed_ranges(decode_snapshot(ROW), None, offset=0, count=2, deadline=deadline)
