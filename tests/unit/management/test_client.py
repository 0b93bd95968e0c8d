# SPDX-License-Identifier: Apache-2.0
"""Requests of each operation, and results of the responses."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest

from csi_driver.deadline import Deadline
from csi_driver.errors import (
    CapacityOutOfRange,
    Exhausted,
    OperationPending,
    OutcomeUnknown,
    PreconditionFailed,
    ReservationConflict,
    StorageUnavailable,
    VolumeNotFound,
)
from csi_driver.management.client import ManagementClient
from csi_driver.management.clusters import OneCluster
from csi_driver.management.codec import decode_client, decode_volume
from csi_driver.storage_model import AllowedDrives, Layout, RaidLevel, RawSpace, ReservationMode, VolumeSpec
from tests.unit.management.conftest import Connect
from tests.unit.management.double import Breaks, ManagementDouble, Says, sample

VOLUME = decode_volume(sample("volume"))
CLIENT = decode_client(sample("client"))
SPEC = VolumeSpec("v1", 10.000524288, {"csi_name": "pvc-1"}, vpg="gold")
SAVE, EXTEND, DELETE, UPDATE = (f"/volumes/{verb}" for verb in ("save", "extend", "delete", "update"))
ATTACH, DETACH = "/clients/attach", "/clients/detach"


def done(uuid: object = VOLUME.uuid) -> Says:
    return Says([{"_id": "v1", "uuid": uuid, "success": True, "error": None, "payload": None}])


def refused(*ids: int, inner: str | None = None, **details: object) -> Says:
    """Return an error for one object; ids from the outermost to the innermost."""
    error: dict[str, object] = {"id": ids[-1], **details}
    if inner is not None:
        error["innerMessage"] = inner
    for number in reversed(ids[:-1]):
        error = {"id": number, "innerMessage": error}
    return Says([{"_id": "undefined", "uuid": "undefined", "success": False, "error": error, "payload": None}])


def absent(number: int) -> Says:
    return Says({"_id": None, "uuid": None, "success": False, "error": {"id": number}, "payload": None})


def volume_row(**fields: object) -> dict[str, object]:
    return {**sample("volume"), **fields}


def test_one_cluster_serves_its_zone_alone(client: ManagementClient) -> None:
    clusters = OneCluster("a", client)
    assert (clusters.zones(), clusters.management("a"), clusters.management("b")) == (("a",), client, None)


# --- volumes ----------------------------------------------------------------------------------------------


def test_a_volume_is_found_by_its_name(server: ManagementDouble, client: ManagementClient, deadline: Deadline) -> None:
    server.on("GET", "/volumes/vol1", Says(sample("volume")))
    assert client.volume("vol1", deadline=deadline) == VOLUME


def test_an_absent_volume_is_none(server: ManagementDouble, client: ManagementClient, deadline: Deadline) -> None:
    server.on("GET", "/volumes/vol1", absent(1543))
    assert client.volume("vol1", deadline=deadline) is None


@pytest.mark.parametrize("path", ["volumes/vol1", "clients/vol1", "volumeProvisioningGroups/vol1"])
def test_an_empty_document_does_not_tell_that_an_object_is_absent(
    path: str, server: ManagementDouble, client: ManagementClient, deadline: Deadline
) -> None:
    server.on("GET", f"/{path}", Says({}))
    reads: dict[str, Callable[..., object]] = {"volumes": client.volume, "clients": client.client}
    read = reads.get(path.partition("/")[0], client.vpg)
    with pytest.raises(StorageUnavailable):
        read("vol1", deadline=deadline)


def test_a_vpg_reservation_is_not_a_volume(
    server: ManagementDouble, client: ManagementClient, deadline: Deadline
) -> None:
    server.on("GET", "/volumes/gold", Says({"_id": "gold", "isReserved": True}))
    assert client.volume("gold", deadline=deadline) is None


@pytest.mark.parametrize("name", ["", "..", "a/b", "a?b", "a\n", "x" * 65, "ü"])
def test_an_invalid_volume_name_sends_no_request(
    server: ManagementDouble, client: ManagementClient, deadline: Deadline, name: str
) -> None:
    assert client.volume(name, deadline=deadline) is None
    assert not server.logins


def test_a_volume_named_like_a_route_is_found_in_the_list(
    server: ManagementDouble, client: ManagementClient, deadline: Deadline
) -> None:
    server.on("GET", "/volumes/all/0/0", Says([volume_row(_id="count", name="count")]))
    found = client.volume("count", deadline=deadline)
    assert found is not None
    assert server.received[-1].query["filter"] == {"_id": "count"}


def test_a_page_begins_above_the_last_name(
    server: ManagementDouble, client: ManagementClient, deadline: Deadline
) -> None:
    server.on("GET", "/volumes/all/0/2", Says([volume_row()]))
    client.volumes(after="vol0", limit=2, deadline=deadline)
    query = server.received[-1].query
    assert (query["filter"], query["sort"]) == ({"_id": {"$gt": "vol0"}}, {"_id": 1})


def test_a_list_leaves_out_the_chunks(server: ManagementDouble, client: ManagementClient, deadline: Deadline) -> None:
    server.on("GET", "/volumes/all/0/0", Says([]))
    client.volumes(after="", limit=0, deadline=deadline)
    projection = server.received[-1].query["projection"]
    assert isinstance(projection, dict)
    assert "chunks" not in projection
    assert set(projection.values()) == {1}


def test_a_list_of_clients_has_their_devices_only_where_they_are_wanted(
    server: ManagementDouble, client: ManagementClient, deadline: Deadline
) -> None:
    server.on("GET", "/clients/all/0/0", Says([]))
    for with_devices in (True, False):
        client.clients(with_devices=with_devices, deadline=deadline)
        projection = server.received[-1].query["projection"]
        assert isinstance(projection, dict)
        assert ("block_devices" in projection) is with_devices
        assert "attachments" in projection


def test_a_failed_list_is_not_an_empty_list(
    server: ManagementDouble, client: ManagementClient, deadline: Deadline
) -> None:
    server.on("GET", "/volumes/all/0/0", Says({"success": False, "error": {"systemMessage": {"id": 16272}}}))
    with pytest.raises(StorageUnavailable, match="16272"):
        client.volumes(after="", limit=0, deadline=deadline)


def test_creation_returns_the_uuid(server: ManagementDouble, client: ManagementClient, deadline: Deadline) -> None:
    server.on("POST", SAVE, done())
    assert client.create_volume(SPEC, deadline=deadline) == VOLUME.uuid


def test_a_group_is_sent_without_a_layout(
    server: ManagementDouble, client: ManagementClient, deadline: Deadline
) -> None:
    server.on("POST", SAVE, done())
    client.create_volume(SPEC, deadline=deadline)
    assert server.received[-1].body == [
        {"name": "v1", "capacity": 10.000524288, "metadata": {"csi_name": "pvc-1"}, "VPG": "gold"}
    ]


def test_only_set_fields_of_a_layout_are_sent(
    server: ManagementDouble, client: ManagementClient, deadline: Deadline
) -> None:
    server.on("POST", SAVE, done())
    layout = Layout(RaidLevel.STRIPED_MIRRORED, stripe_width=2, number_of_mirrors=1)
    spec = VolumeSpec("v1", 2.0, {}, layout=layout, target_classes=("fast", "near"))
    client.create_volume(spec, deadline=deadline)
    assert server.received[-1].body == [
        {
            "name": "v1",
            "capacity": 2.0,
            "metadata": {},
            "RAIDLevel": "Striped & Mirrored RAID-10",
            "stripeWidth": 2,
            "numberOfMirrors": 1,
            "serverClasses": ["fast", "near"],
        }
    ]


def test_an_existing_name_returns_none(server: ManagementDouble, client: ManagementClient, deadline: Deadline) -> None:
    server.on("POST", SAVE, refused(1523))
    assert client.create_volume(SPEC, deadline=deadline) is None


def test_no_space_is_exhausted(server: ManagementDouble, client: ManagementClient, deadline: Deadline) -> None:
    server.on("POST", SAVE, refused(1664, inner="Failed to allocate"))
    with pytest.raises(Exhausted):
        client.create_volume(SPEC, deadline=deadline)


def test_a_volume_found_after_a_lost_response_counts_as_existing(
    server: ManagementDouble, client: ManagementClient, deadline: Deadline
) -> None:
    server.on("POST", SAVE, Breaks())
    server.on("GET", "/volumes/v1", Says(volume_row(_id="v1", name="v1")))
    assert client.create_volume(SPEC, deadline=deadline) is None


def test_a_lost_response_without_a_volume_has_an_unknown_outcome(
    server: ManagementDouble, client: ManagementClient, deadline: Deadline
) -> None:
    server.on("POST", SAVE, Breaks())
    server.on("GET", "/volumes/v1", absent(1543))
    with pytest.raises(OutcomeUnknown):
        client.create_volume(SPEC, deadline=deadline)
    assert len(server.seen(SAVE)) == 1


def test_a_creation_with_a_lost_response_is_sent_to_another_server(
    server: ManagementDouble, other_server: ManagementDouble, connect: Connect, deadline: Deadline
) -> None:
    server.on("POST", SAVE, Breaks())
    other_server.on("GET", "/volumes/v1", absent(1543))
    other_server.on("POST", SAVE, done())
    assert connect(server.url, other_server.url).create_volume(SPEC, deadline=deadline) == VOLUME.uuid
    assert (len(server.seen(SAVE)), len(other_server.seen(SAVE))) == (1, 1)


def test_a_creation_that_was_executed_is_sent_to_no_other_server(
    server: ManagementDouble, other_server: ManagementDouble, connect: Connect, deadline: Deadline
) -> None:
    server.on("POST", SAVE, Breaks())
    other_server.on("GET", "/volumes/v1", Says(volume_row(_id="v1", name="v1")))
    assert connect(server.url, other_server.url).create_volume(SPEC, deadline=deadline) is None
    assert not other_server.seen(SAVE)


@pytest.mark.parametrize("uuid", [None, "undefined", 7])
def test_a_creation_without_a_uuid_in_its_response_returns_none(
    server: ManagementDouble, client: ManagementClient, deadline: Deadline, uuid: object
) -> None:
    server.on("POST", SAVE, done(uuid))
    assert client.create_volume(SPEC, deadline=deadline) is None


@pytest.mark.parametrize("answer", [Says([]), Says({}), Says([7]), Says("ok"), Says([{"_id": "v1"}])])
def test_a_response_without_success_or_error_is_invalid(
    server: ManagementDouble, client: ManagementClient, deadline: Deadline, answer: Says
) -> None:
    server.on("POST", UPDATE, answer)
    with pytest.raises(StorageUnavailable):
        client.set_metadata(VOLUME, {}, deadline=deadline)


def test_extension_sends_the_new_total(server: ManagementDouble, client: ManagementClient, deadline: Deadline) -> None:
    server.on("GET", "/volumes/vol1", Says(sample("volume")))
    server.on("POST", EXTEND, done())
    client.extend_volume(VOLUME, 12.0, deadline=deadline)
    assert server.received[-1].body == [{"_id": "vol1", "uuid": VOLUME.uuid, "capacity": 12.0}]


def test_security_groups_and_offline_drives_have_the_apis_names(
    server: ManagementDouble, client: ManagementClient, deadline: Deadline
) -> None:
    server.on("POST", SAVE, done())
    client.create_volume(replace(SPEC, security_groups=("secret",), allow_offline_drives=True), deadline=deadline)
    sent = server.received[-1].body
    assert isinstance(sent, list)
    assert (sent[0]["VSGs"], sent[0]["allowAllocationOnOfflineDrives"]) == (["secret"], True)
    client.create_volume(SPEC, deadline=deadline)
    sent = server.received[-1].body
    assert isinstance(sent, list)
    assert not {"VSGs", "allowAllocationOnOfflineDrives"} & sent[0].keys()


def test_an_extension_may_use_offline_drives_like_its_volume(
    server: ManagementDouble, client: ManagementClient, deadline: Deadline
) -> None:
    server.on("GET", "/volumes/vol1", Says({**sample("volume"), "allowAllocationOnOfflineDrives": True}))
    server.on("POST", EXTEND, done())
    client.extend_volume(VOLUME, 12.0, deadline=deadline)
    assert server.received[-1].body == [
        {"_id": "vol1", "uuid": VOLUME.uuid, "capacity": 12.0, "allowAllocationOnOfflineDrives": True}
    ]


@pytest.mark.parametrize("capacity_gb", [10.0, 10.001, 10.00104, 9.0, 0.0, -1.0, float("nan")])
def test_an_extension_below_one_granule_is_never_sent(
    server: ManagementDouble, client: ManagementClient, deadline: Deadline, capacity_gb: float
) -> None:
    server.on("GET", "/volumes/vol1", Says(sample("volume")))
    with pytest.raises(CapacityOutOfRange):
        client.extend_volume(VOLUME, capacity_gb, deadline=deadline)
    assert not server.seen(EXTEND)


def test_an_extension_of_a_striped_volume_is_at_least_one_granule(
    server: ManagementDouble, client: ManagementClient, deadline: Deadline
) -> None:
    striped = volume_row(RAIDLevel="Striped RAID-0", stripeWidth=4, stripeSize=32)
    server.on("GET", "/volumes/vol1", Says(striped))
    with pytest.raises(CapacityOutOfRange):
        client.extend_volume(decode_volume(striped), 10.003, deadline=deadline)


def test_an_extension_from_an_old_capacity_is_never_sent(
    server: ManagementDouble, client: ManagementClient, deadline: Deadline
) -> None:
    # Somebody else has extended it meanwhile: the rest would be below one granule.
    server.on("GET", "/volumes/vol1", Says(volume_row(capacity=11.9995)))
    with pytest.raises(OperationPending):
        client.extend_volume(VOLUME, 12.0, deadline=deadline)
    assert not server.seen(EXTEND)


def test_an_extension_of_another_volume_with_the_name_is_never_sent(
    server: ManagementDouble, client: ManagementClient, deadline: Deadline
) -> None:
    server.on("GET", "/volumes/vol1", Says(sample("volume")))
    other = replace(VOLUME, uuid="00000000-0000-1000-8000-000000000000")
    with pytest.raises(VolumeNotFound):
        client.extend_volume(other, 12.0, deadline=deadline)
    assert not server.seen(EXTEND)


def test_a_concurrent_extension_counts_as_done(
    server: ManagementDouble, client: ManagementClient, deadline: Deadline
) -> None:
    server.on("GET", "/volumes/vol1", Says(sample("volume")), Says(volume_row(capacity=12.0)))
    server.on("POST", EXTEND, refused(1673, inner="12"))
    client.extend_volume(VOLUME, 12.0, deadline=deadline)


def test_an_extension_with_a_lost_response_is_verified(
    server: ManagementDouble, client: ManagementClient, deadline: Deadline
) -> None:
    server.on("GET", "/volumes/vol1", Says(sample("volume")), Says(volume_row(capacity=12.0)))
    server.on("POST", EXTEND, Breaks())
    client.extend_volume(VOLUME, 12.0, deadline=deadline)


def test_an_extension_without_response_and_effect_has_an_unknown_outcome(
    server: ManagementDouble, client: ManagementClient, deadline: Deadline
) -> None:
    server.on("GET", "/volumes/vol1", Says(sample("volume")))
    server.on("POST", EXTEND, Breaks())
    with pytest.raises(OutcomeUnknown):
        client.extend_volume(VOLUME, 12.0, deadline=deadline)


def test_deletion_names_the_uuid(server: ManagementDouble, client: ManagementClient, deadline: Deadline) -> None:
    server.on("POST", DELETE, done())
    assert client.delete_volume(VOLUME, deadline=deadline)
    assert server.received[-1].body == [{"_id": "vol1", "uuid": VOLUME.uuid}]


@pytest.mark.parametrize("number", [1543, 1682])
def test_deletion_of_an_absent_volume_returns_false(
    server: ManagementDouble, client: ManagementClient, deadline: Deadline, number: int
) -> None:
    server.on("POST", DELETE, refused(number))
    assert not client.delete_volume(VOLUME, deadline=deadline)


def test_deletion_of_a_volume_in_use_names_its_clients(
    server: ManagementDouble, client: ManagementClient, deadline: Deadline
) -> None:
    server.on("POST", DELETE, refused(1683, inner="used by node-1"))
    with pytest.raises(PreconditionFailed, match="node-1"):
        client.delete_volume(VOLUME, deadline=deadline)


def test_metadata_is_replaced_as_a_whole(
    server: ManagementDouble, client: ManagementClient, deadline: Deadline
) -> None:
    server.on("POST", UPDATE, done())
    client.set_metadata(VOLUME, {"csi_name": "pvc-2"}, deadline=deadline)
    assert server.received[-1].body == [{"_id": "vol1", "uuid": VOLUME.uuid, "metadata": {"csi_name": "pvc-2"}}]


def test_an_error_of_an_update_with_success_true_is_an_error(
    server: ManagementDouble, client: ManagementClient, deadline: Deadline
) -> None:
    server.on("POST", UPDATE, Says([{"_id": "v", "uuid": "u", "success": True, "error": {"id": 1603}}]))
    with pytest.raises(PreconditionFailed):
        client.set_metadata(VOLUME, {}, deadline=deadline)


# --- clients and attachments ------------------------------------------------------------------------------


def test_a_client_is_found_by_its_id(server: ManagementDouble, client: ManagementClient, deadline: Deadline) -> None:
    server.on("GET", "/clients/node-1", Says(sample("client")))
    assert client.client("node-1", deadline=deadline) == CLIENT


def test_an_absent_client_is_none(server: ManagementDouble, client: ManagementClient, deadline: Deadline) -> None:
    server.on("GET", "/clients/node-1", absent(1608))
    assert client.client("node-1", deadline=deadline) is None


@pytest.mark.parametrize("client_id", ["", ".", "..", "a/../b", "a b", "a\nb", "x" * 300])
def test_an_invalid_client_id_sends_no_request(
    server: ManagementDouble, client: ManagementClient, deadline: Deadline, client_id: str
) -> None:
    assert client.client(client_id, deadline=deadline) is None
    assert not server.logins


def test_a_client_is_found_by_its_uuid(server: ManagementDouble, client: ManagementClient, deadline: Deadline) -> None:
    server.on("GET", "/clients/all/0/0", Says([sample("client")]))
    assert client.client_by_uuid(CLIENT.uuid.upper(), deadline=deadline) == CLIENT
    assert server.received[-1].query["filter"] == {"uuid": CLIENT.uuid}


def test_an_invalid_uuid_sends_no_request(
    server: ManagementDouble, client: ManagementClient, deadline: Deadline
) -> None:
    assert client.client_by_uuid("node-1", deadline=deadline) is None
    assert not server.logins


def test_holders_have_a_desired_attachment_or_a_device(
    server: ManagementDouble, client: ManagementClient, deadline: Deadline
) -> None:
    wishing = {**sample("client"), "_id": "b", "block_devices": []}
    reporting = {**sample("client"), "_id": "a", "attachments": {}}
    server.on("GET", "/clients/all/0/0", Says([reporting, wishing]))
    assert [holder.id for holder in client.clients_holding(VOLUME.uuid, deadline=deadline)] == ["a", "b"]
    (asked,) = server.seen("/clients/all/0/0")
    uuid = VOLUME.uuid
    assert asked.query["filter"] == {"$or": [{f"attachments.{uuid}.uuid": uuid}, {"block_devices.uuid": uuid}]}


def test_a_client_whose_device_is_reported_detached_holds_nothing(
    server: ManagementDouble, client: ManagementClient, deadline: Deadline
) -> None:
    gone = {**sample("client"), "attachments": {}, "block_devices": [{"uuid": VOLUME.uuid, "vol_status": 2}]}
    server.on("GET", "/clients/all/0/0", Says([gone]))
    assert client.clients_holding(VOLUME.uuid, deadline=deadline) == []


def test_an_attachment_carries_mode_and_reference(
    server: ManagementDouble, client: ManagementClient, deadline: Deadline
) -> None:
    server.on("POST", ATTACH, done())
    client.attach(CLIENT, VOLUME, mode=ReservationMode.SHARED_READ_ONLY, reference_id="ns", deadline=deadline)
    assert server.received[-1].body == {
        "client": "node-1",
        "clientUUID": CLIENT.uuid,
        "volumes": [
            {
                "name": "vol1",
                "uuid": VOLUME.uuid,
                "reservation": {"mode": "SHARED_READ_ONLY"},
                "referenceID": "ns",
            }
        ],
    }


def test_a_takeover_carries_the_version_of_the_reservation(
    server: ManagementDouble, client: ManagementClient, deadline: Deadline
) -> None:
    server.on("POST", ATTACH, done())
    client.attach(
        CLIENT,
        VOLUME,
        mode=ReservationMode.EXCLUSIVE_READ_WRITE,
        reference_id=None,
        version=4,
        preempt=True,
        detach_others=True,
        deadline=deadline,
    )
    body = server.received[-1].body
    assert isinstance(body, dict)
    assert body["volumes"][0] == {
        "name": "vol1",
        "uuid": VOLUME.uuid,
        "reservation": {"mode": "EXCLUSIVE_READ_WRITE", "version": 4, "preempt": True, "isDetachOthers": True},
    }


def test_a_conflict_has_the_version_that_a_takeover_needs(
    server: ManagementDouble, client: ManagementClient, deadline: Deadline
) -> None:
    server.on("POST", ATTACH, refused(1694, 1717, volumeReservation=4))
    with pytest.raises(ReservationConflict) as caught:
        client.attach(CLIENT, VOLUME, mode=ReservationMode.EXCLUSIVE_READ_WRITE, reference_id=None, deadline=deadline)
    assert caught.value.current_version == 4


@pytest.mark.parametrize("number", [162222, 162223, 1622, 1608, 1543])
def test_detaching_an_absent_attachment_succeeds(
    server: ManagementDouble, client: ManagementClient, deadline: Deadline, number: int
) -> None:
    server.on("POST", DETACH, refused(number))
    client.detach(CLIENT, VOLUME, reference_id="ns", deadline=deadline)


@pytest.mark.parametrize("force", [True, False])
def test_force_is_sent_with_the_volume(
    server: ManagementDouble, client: ManagementClient, deadline: Deadline, force: bool
) -> None:
    server.on("POST", DETACH, done())
    client.detach(CLIENT, VOLUME, reference_id="ns", force=force, deadline=deadline)
    body = server.received[-1].body
    assert isinstance(body, dict)
    assert body["volumes"][0].get("force", False) is force


# --- groups and space -------------------------------------------------------------------------------------


def test_an_absent_group_is_none(server: ManagementDouble, client: ManagementClient, deadline: Deadline) -> None:
    server.on("GET", "/volumeProvisioningGroups/gold", absent(16220))
    assert client.vpg("gold", deadline=deadline) is None


@pytest.mark.parametrize(
    ("usage", "free_bytes"),
    [
        ({"allowOverflow": False, "freeCapacity": 15.000389632000001}, 15_000_389_632),
        ({"allowOverflow": False, "freeCapacity": 0}, 0),
        ({"allowOverflow": True, "freeCapacity": None, "totalCapacity": 0}, 0),
        ({"allowOverflow": True, "freeCapacity": None, "reservedBlocks": 2441216, "allocatedBlocks": 256}, 9998172160),
        ({"allowOverflow": True, "freeCapacity": None, "reservedBlocks": 256, "allocatedBlocks": 512}, 0),
        ({}, 0),
    ],
)
def test_free_bytes_of_a_group_are_the_rest_of_its_reserve(
    server: ManagementDouble,
    client: ManagementClient,
    deadline: Deadline,
    usage: dict[str, object],
    free_bytes: int,
) -> None:
    server.on("GET", "/volumeProvisioningGroups/getVolumesCapacityUsageByID/gold", Says(usage))
    assert client.vpg_free_bytes("gold", deadline=deadline) == free_bytes


def drive(name: str, **values: object) -> dict[str, object]:
    usual: dict[str, object] = {"diskID": name, "status": "Ok", "isExcluded": False, "isOutOfService": False}
    space = {"usableBlocks": 125_000, "availableBlocks": 125_000, "largestSegmentAvailable": {"blocks": 124_000}}
    return {**usual, "metadata_size": 8, **space, **values}


def target(name: str, *drives: dict[str, object], **values: object) -> dict[str, object]:
    return {"_id": name, "node_id": name, "node_status": 1, "isPending": False, "disks": [*drives], **values}


FREE = 124_000 * 4096
TARGETS = [
    target("t1", drive("d1"), drive("d2", metadata_size=0)),
    target("t2", drive("d3"), drive("d4", isExcluded=True), drive("d5", status="Missing")),
    target(
        "t3", drive("d6", isOutOfService=True), drive("d7", isPendingFormat=True), drive("d8", status="Initializing")
    ),
    target("t4", drive("d9"), node_status=2),
    target("t5", drive("d10"), isPending=True),
    target("t6", drive("d11"), node_status=5),
]
CLASSES: dict[str, list[dict[str, object]]] = {
    "diskClasses": [
        {
            "_id": "fast",
            "disks": [{"diskID": "d1"}, {"diskID": "d3"}],
            "domains": [{"scope": "rack", "identifier": "A"}],
        },
        {"_id": "by-model", "disks": [{"model": "M", "disks": [{"diskID": "d2"}]}]},
    ],
    "serverClasses": [
        {"_id": "left", "targetNodes": ["t1"], "domains": [{"scope": "rack", "identifier": "A"}]},
        {"_id": "right", "targetNodes": ["t2", "t3"]},
    ],
}


def found_classes(collection: str, names: tuple[str, ...], domain: str | None) -> list[dict[str, object]]:
    """Return the classes that the server finds by name, else by domain."""
    if names:
        return [row for row in CLASSES[collection] if row["_id"] in names]
    return [row for row in CLASSES[collection] if f"'{domain}'" in str(row.get("domains"))]


@pytest.mark.parametrize(
    ("allowed", "drives"),
    [
        (AllowedDrives(), 4),
        (AllowedDrives(with_metadata=True), 3),
        (AllowedDrives(with_offline=True), 6),
        (AllowedDrives(targets=("t1",)), 2),
        (AllowedDrives(targets=("t1", "unknown")), 2),
        (AllowedDrives(targets=("t4",)), 0),
        (AllowedDrives(drives=("d1", "d4")), 1),
        (AllowedDrives(drives=("d1", "d3"), targets=("t2",)), 1),
        (AllowedDrives(drive_classes=("fast",)), 2),
        (AllowedDrives(drive_classes=("by-model",)), 1),
        (AllowedDrives(drive_classes=("fast", "by-model")), 3),
        (AllowedDrives(target_classes=("right",)), 2),
        (AllowedDrives(drive_classes=("fast",), target_classes=("left",)), 1),
        (AllowedDrives(drive_classes=("by-model",), domain="rack"), 0),
        (AllowedDrives(domain="rack"), 1),
        (AllowedDrives(targets=("unknown",)), None),
        (AllowedDrives(drives=("unknown",)), None),
        (AllowedDrives(drive_classes=("fast", "unknown")), None),
        (AllowedDrives(target_classes=("unknown",)), None),
        (AllowedDrives(domain="unknown"), None),
    ],
)
def test_free_space_counts_the_drives_that_the_server_allocates_on(
    server: ManagementDouble, client: ManagementClient, deadline: Deadline, allowed: AllowedDrives, drives: int | None
) -> None:
    server.on("GET", "/servers/all/0/0", Says(TARGETS))
    names = {"diskClasses": allowed.drive_classes, "serverClasses": allowed.target_classes}
    for collection, some in names.items():
        server.on("GET", f"/{collection}/all/0/0", Says(found_classes(collection, some, allowed.domain)))
    space = client.raw_space(allowed, deadline=deadline)
    assert (space and space.free_bytes) == (None if drives is None else drives * FREE)
    filters = {request.path.split("/")[1]: request.query.get("filter") for request in server.received}
    by_name = {kind: {"_id": {"$in": list(some)}} for kind, some in names.items() if some}
    by_domain = {kind: {"domains.scope": allowed.domain} for kind in names} if allowed.domain and not by_name else {}
    assert {kind: condition for kind, condition in filters.items() if condition} == {**by_name, **by_domain}


@pytest.mark.parametrize(
    ("available", "largest", "blocks"),
    [(125_000, 124_000, 124_000), (60_000, 20_000, 59_000), (500, 400, 400), (500, None, 0), (0, 0, 0)],
)
def test_the_head_of_a_drive_is_not_free(
    server: ManagementDouble,
    client: ManagementClient,
    deadline: Deadline,
    available: int,
    largest: int | None,
    blocks: int,
) -> None:
    piece = None if largest is None else {"blocks": largest}
    row = drive("d1", availableBlocks=available, largestSegmentAvailable=piece)
    server.on("GET", "/servers/all/0/0", Says([target("t1", row)]))
    space = client.raw_space(deadline=deadline)
    assert space == RawSpace(blocks * 4096, 125_000 * 4096)


def test_a_drive_without_a_number_of_blocks_is_an_invalid_response(
    server: ManagementDouble, client: ManagementClient, deadline: Deadline
) -> None:
    server.on("GET", "/servers/all/0/0", Says([target("t1", drive("d1", availableBlocks="many"))]))
    with pytest.raises(StorageUnavailable):
        client.raw_space(deadline=deadline)


# --- "not found" ----------------------------------------------------------------------------------------


CHANGES: dict[str, Callable[[ManagementClient, Deadline], object]] = {
    EXTEND: lambda client, deadline: client.extend_volume(VOLUME, 12.0, deadline=deadline),
    UPDATE: lambda client, deadline: client.set_metadata(VOLUME, {}, deadline=deadline),
    ATTACH: lambda client, deadline: client.attach(
        CLIENT, VOLUME, mode=ReservationMode.SHARED_READ_WRITE, reference_id=None, deadline=deadline
    ),
}


@pytest.mark.parametrize("path", sorted(CHANGES))
def test_a_volume_that_exists_but_was_not_found_is_pending(
    server: ManagementDouble, client: ManagementClient, deadline: Deadline, path: str
) -> None:
    server.on("POST", path, refused(1543))
    server.on("GET", "/volumes/vol1", Says(sample("volume")))
    with pytest.raises(OperationPending):
        CHANGES[path](client, deadline)


@pytest.mark.parametrize("path", sorted(CHANGES))
def test_an_absent_volume_was_not_found(
    server: ManagementDouble, client: ManagementClient, deadline: Deadline, path: str
) -> None:
    server.on("POST", path, refused(1543))
    there = [Says(sample("volume"))] if path == EXTEND else []
    server.on("GET", "/volumes/vol1", *there, absent(1543))
    with pytest.raises(VolumeNotFound):
        CHANGES[path](client, deadline)


def test_another_volume_with_the_name_was_not_found(
    server: ManagementDouble, client: ManagementClient, deadline: Deadline
) -> None:
    server.on("POST", UPDATE, refused(1543))
    server.on("GET", "/volumes/vol1", Says(volume_row(uuid="00000000-0000-1000-8000-000000000000")))
    with pytest.raises(VolumeNotFound):
        client.set_metadata(VOLUME, {}, deadline=deadline)


def test_a_client_is_asked_for_without_its_other_volumes(
    server: ManagementDouble, client: ManagementClient, deadline: Deadline
) -> None:
    uuids = (VOLUME.uuid, "00000000-0000-1000-8000-000000000000")
    devices = [{"uuid": uuid, "vol_status": 4} for uuid in uuids]
    server.on("GET", "/clients/all/0/0", Says([{**sample("client"), "block_devices": devices}]))
    found = client.client_by_uuid(CLIENT.uuid, only=VOLUME.uuid, deadline=deadline)
    (asked,) = server.seen("/clients/all/0/0")
    assert isinstance(asked.query["projection"], dict)
    assert [key for key in asked.query["projection"] if "attachments" in key] == [f"attachments.{VOLUME.uuid}"]
    assert found is not None
    assert {*found.desired, *found.devices} == {VOLUME.uuid}
