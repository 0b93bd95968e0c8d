# SPDX-License-Identifier: Apache-2.0
"""The three services over a real socket: capabilities and responses."""

from __future__ import annotations

import re
import threading
from datetime import UTC
from functools import partial
from pathlib import Path

import grpc
import pytest

from csi_driver.deadline import Deadline
from csi_driver.errors import PreconditionFailed, StorageUnavailable
from csi_driver.rpc.identity import ManagementReadiness, is_equipped
from csi_driver.rpc.pb import csi_pb2
from csi_driver.storage_model import Features
from tests.unit.rpc.fakes import (
    CUT_AT,
    VOLUME_ID,
    ZONE,
    Endpoint,
    capability,
    code_of,
    create,
    node_publish,
    serving,
    stage,
)

Plugin = csi_pb2.PluginCapability


def test_plugin_info_has_name_and_version(endpoint: Endpoint) -> None:
    info = endpoint.identity.GetPluginInfo(csi_pb2.GetPluginInfoRequest())
    assert re.fullmatch(r"[a-zA-Z][A-Za-z0-9-._]{0,61}[a-zA-Z]", info.name)
    assert info.vendor_version == "1.2.3"


def test_the_plugin_capabilities_are_these(endpoint: Endpoint) -> None:
    found = endpoint.identity.GetPluginCapabilities(csi_pb2.GetPluginCapabilitiesRequest()).capabilities
    assert [c.service.type for c in found if c.HasField("service")] == [
        Plugin.Service.CONTROLLER_SERVICE,
        Plugin.Service.VOLUME_ACCESSIBILITY_CONSTRAINTS,
    ]
    assert [c.volume_expansion.type for c in found if c.HasField("volume_expansion")] == [Plugin.VolumeExpansion.ONLINE]


def test_the_controller_capabilities_are_these(endpoint: Endpoint) -> None:
    found = endpoint.controller.ControllerGetCapabilities(csi_pb2.ControllerGetCapabilitiesRequest()).capabilities
    names = {csi_pb2.ControllerServiceCapability.RPC.Type.Name(c.rpc.type) for c in found}
    assert names == {
        "CREATE_DELETE_VOLUME", "PUBLISH_UNPUBLISH_VOLUME", "PUBLISH_READONLY", "LIST_VOLUMES",
        "LIST_VOLUMES_PUBLISHED_NODES", "GET_CAPACITY", "EXPAND_VOLUME", "GET_VOLUME", "MODIFY_VOLUME",
        "SINGLE_NODE_MULTI_WRITER", "GET_VOLUME_HEALTH", "LIST_VOLUME_HEALTH",
    }  # fmt: skip


def test_a_controller_without_attaching_lacks_its_capabilities(tmp_path: Path) -> None:
    with serving(tmp_path / "s", attaches=False, volume_health=False) as endpoint:
        found = endpoint.controller.ControllerGetCapabilities(csi_pb2.ControllerGetCapabilitiesRequest()).capabilities
        names = {csi_pb2.ControllerServiceCapability.RPC.Type.Name(c.rpc.type) for c in found}
        assert names == {
            "CREATE_DELETE_VOLUME", "LIST_VOLUMES", "GET_CAPACITY", "EXPAND_VOLUME", "GET_VOLUME", "MODIFY_VOLUME",
            "SINGLE_NODE_MULTI_WRITER",
        }  # fmt: skip
        publish = csi_pb2.ControllerPublishVolumeRequest(
            volume_id=VOLUME_ID, node_id="n", volume_capability=capability()
        )
        assert code_of(lambda: endpoint.controller.ControllerPublishVolume(publish)) is grpc.StatusCode.UNIMPLEMENTED
        unpublish = csi_pb2.ControllerUnpublishVolumeRequest(volume_id=VOLUME_ID)
        assert (
            code_of(lambda: endpoint.controller.ControllerUnpublishVolume(unpublish)) is grpc.StatusCode.UNIMPLEMENTED
        )


def test_the_node_capabilities_are_these(endpoint: Endpoint) -> None:
    found = endpoint.node.NodeGetCapabilities(csi_pb2.NodeGetCapabilitiesRequest()).capabilities
    names = {csi_pb2.NodeServiceCapability.RPC.Type.Name(c.rpc.type) for c in found}
    assert names == {
        "STAGE_UNSTAGE_VOLUME", "GET_VOLUME_STATS", "EXPAND_VOLUME", "SINGLE_NODE_MULTI_WRITER", "GET_VOLUME_HEALTH",
        "GET_STORAGE_HEALTH",
    }  # fmt: skip


def test_a_volume_lives_its_life_on_the_controller(endpoint: Endpoint) -> None:
    controller = endpoint.controller
    volume = controller.CreateVolume(create()).volume
    assert (volume.volume_id, volume.capacity_bytes) == (VOLUME_ID, 1 << 30)
    published = controller.ControllerPublishVolume(
        csi_pb2.ControllerPublishVolumeRequest(
            volume_id=VOLUME_ID, node_id="node-1", volume_capability=capability(), readonly=True
        )
    )
    assert published.publish_context["readOnly"] == "true"
    listed = controller.ListVolumes(csi_pb2.ListVolumesRequest()).entries
    assert [list(entry.status.published_node_ids) for entry in listed] == [["node-1"]]
    got = controller.ControllerGetVolume(csi_pb2.ControllerGetVolumeRequest(volume_id=VOLUME_ID))
    assert list(got.status.published_node_ids) == ["node-1"]
    grown = controller.ControllerExpandVolume(
        csi_pb2.ControllerExpandVolumeRequest(
            volume_id=VOLUME_ID, capacity_range=csi_pb2.CapacityRange(required_bytes=2 << 30)
        )
    )
    assert (grown.capacity_bytes, grown.node_expansion_required) == (2 << 30, True)
    controller.ControllerModifyVolume(
        csi_pb2.ControllerModifyVolumeRequest(volume_id=VOLUME_ID, mutable_parameters={"description": "new"})
    )
    assert endpoint.controller_fake.modified == [{"description": "new"}]
    controller.ControllerUnpublishVolume(
        csi_pb2.ControllerUnpublishVolumeRequest(volume_id=VOLUME_ID, node_id="node-1")
    )
    controller.DeleteVolume(csi_pb2.DeleteVolumeRequest(volume_id=VOLUME_ID))
    assert not controller.ListVolumes(csi_pb2.ListVolumesRequest()).entries


def test_capabilities_are_validated(endpoint: Endpoint) -> None:
    endpoint.controller.CreateVolume(create())
    request = csi_pb2.ValidateVolumeCapabilitiesRequest(volume_id=VOLUME_ID, volume_capabilities=[capability()])
    assert endpoint.controller.ValidateVolumeCapabilities(request).HasField("confirmed")
    endpoint.controller_fake.objection = "not that"
    assert endpoint.controller.ValidateVolumeCapabilities(request).message == "not that"


def test_capacity_is_limited_to_a_topology(endpoint: Endpoint) -> None:
    everywhere = endpoint.controller.GetCapacity(csi_pb2.GetCapacityRequest())
    assert not everywhere.HasField("maximum_volume_size")
    there = endpoint.controller.GetCapacity(
        csi_pb2.GetCapacityRequest(accessible_topology=csi_pb2.Topology(segments={"z": "1"}))
    )
    assert there.maximum_volume_size.value == 5 << 30


def test_a_volume_lives_its_life_on_the_node(endpoint: Endpoint) -> None:
    node, fake = endpoint.node, endpoint.node_fake
    node.NodeStageVolume(stage(path="/staging/1"))
    node.NodePublishVolume(node_publish(path="/mount/1"))
    assert set(fake.stage.staged) == {"/staging/1"}
    assert set(fake.publish.published) == {"/mount/1"}
    stats = csi_pb2.NodeGetVolumeStatsRequest(volume_id="csi-1", volume_path="/mount/1")
    assert len(node.NodeGetVolumeStats(stats).usage) == 2
    grown = node.NodeExpandVolume(
        csi_pb2.NodeExpandVolumeRequest(
            volume_id="csi-1", volume_path="/mount/1", capacity_range=csi_pb2.CapacityRange(required_bytes=9)
        )
    )
    assert grown.capacity_bytes == 9
    node.NodeUnpublishVolume(csi_pb2.NodeUnpublishVolumeRequest(volume_id="csi-1", target_path="/mount/1"))
    node.NodeUnstageVolume(csi_pb2.NodeUnstageVolumeRequest(volume_id="csi-1", staging_target_path="/staging/1"))
    assert not fake.stage.staged
    assert not fake.publish.published


def test_node_info_has_id_limit_and_topology(endpoint: Endpoint) -> None:
    info = endpoint.node.NodeGetInfo(csi_pb2.NodeGetInfoRequest())
    assert (info.node_id, info.max_volumes_per_node) == ("node-1", 7)
    assert dict(info.accessible_topology.segments) == {"nvmesh-csi.excelero.com/zone": ZONE}


# --- snapshots --------------------------------------------------------------------------------------------------

OFFERS = Features(snapshots=True, group_snapshots=True)


def controller_capabilities(endpoint: Endpoint) -> set[str]:
    found = endpoint.controller.ControllerGetCapabilities(csi_pb2.ControllerGetCapabilitiesRequest()).capabilities
    return {csi_pb2.ControllerServiceCapability.RPC.Type.Name(each.rpc.type) for each in found}


def offers_groups(endpoint: Endpoint) -> tuple[bool, bool]:
    """Return whether the plugin has the service of groups, and whether that service has its capability."""
    plugin = endpoint.identity.GetPluginCapabilities(csi_pb2.GetPluginCapabilitiesRequest()).capabilities
    request = csi_pb2.GroupControllerGetCapabilitiesRequest()
    service = Plugin.Service.GROUP_CONTROLLER_SERVICE
    is_plugin = service in [each.service.type for each in plugin]
    return is_plugin, bool(endpoint.groups.GroupControllerGetCapabilities(request).capabilities)


@pytest.mark.parametrize(
    ("offers", "snapshots", "groups"),
    [
        (Features(), False, False),
        (Features(snapshots=True), True, False),
        (OFFERS, True, True),
    ],
)
def test_snapshots_and_groups_are_offered_where_the_storage_has_them(
    tmp_path: Path, offers: Features, snapshots: bool, groups: bool
) -> None:
    with serving(tmp_path / "s", offers=offers) as endpoint:
        names = {"CREATE_DELETE_SNAPSHOT", "LIST_SNAPSHOTS", "GET_SNAPSHOT", "CLONE_VOLUME"}
        assert names & controller_capabilities(endpoint) == (names if snapshots else set())
        assert offers_groups(endpoint) == (groups, groups)


def test_a_snapshot_lives_its_life_on_the_controller(endpoint: Endpoint) -> None:
    controller = endpoint.controller
    snapshot = controller.CreateSnapshot(
        csi_pb2.CreateSnapshotRequest(name="s", source_volume_id=VOLUME_ID, secrets={"k": "v"})
    ).snapshot
    assert (snapshot.source_volume_id, snapshot.size_bytes, snapshot.ready_to_use) == (VOLUME_ID, 1 << 30, True)
    assert snapshot.creation_time.ToDatetime(UTC) == CUT_AT
    request = csi_pb2.GetSnapshotRequest(snapshot_id=snapshot.snapshot_id)
    assert controller.GetSnapshot(request).snapshot == snapshot
    listed = controller.ListSnapshots(csi_pb2.ListSnapshotsRequest(snapshot_id=snapshot.snapshot_id)).entries
    assert [each.snapshot for each in listed] == [snapshot]
    controller.DeleteSnapshot(csi_pb2.DeleteSnapshotRequest(snapshot_id=snapshot.snapshot_id))
    assert code_of(lambda: controller.GetSnapshot(request)) is grpc.StatusCode.NOT_FOUND


def test_snapshots_are_listed_in_pages(endpoint: Endpoint) -> None:
    for name in ("s1", "s2", "s3"):
        endpoint.controller.CreateSnapshot(csi_pb2.CreateSnapshotRequest(name=name, source_volume_id=VOLUME_ID))
    page = endpoint.controller.ListSnapshots(csi_pb2.ListSnapshotsRequest(max_entries=2))
    assert (len(page.entries), page.next_token) == (2, "next")


def test_a_group_lives_its_life_on_the_controller(endpoint: Endpoint) -> None:
    groups = endpoint.groups
    create_group = csi_pb2.CreateVolumeGroupSnapshotRequest(name="g", source_volume_ids=[VOLUME_ID, "z:other"])
    group = groups.CreateVolumeGroupSnapshot(create_group).group_snapshot
    assert [each.source_volume_id for each in group.snapshots] == [VOLUME_ID, "z:other"]
    assert {each.group_snapshot_id for each in group.snapshots} == {group.group_snapshot_id}
    assert group.creation_time.ToDatetime(UTC) == CUT_AT
    group_id, members = group.group_snapshot_id, [each.snapshot_id for each in group.snapshots]
    request = csi_pb2.GetVolumeGroupSnapshotRequest(group_snapshot_id=group_id, snapshot_ids=members)
    assert groups.GetVolumeGroupSnapshot(request).group_snapshot == group
    groups.DeleteVolumeGroupSnapshot(
        csi_pb2.DeleteVolumeGroupSnapshotRequest(group_snapshot_id=group_id, snapshot_ids=members)
    )
    assert code_of(lambda: groups.GetVolumeGroupSnapshot(request)) is grpc.StatusCode.NOT_FOUND


def test_the_name_of_a_snapshot_has_no_control_characters(endpoint: Endpoint) -> None:
    request = csi_pb2.CreateSnapshotRequest(name="s\x01", source_volume_id=VOLUME_ID)
    assert code_of(lambda: endpoint.controller.CreateSnapshot(request)) is grpc.StatusCode.INVALID_ARGUMENT


# --- health of volumes ------------------------------------------------------------------------------------------


def test_disabled_volume_health_is_unimplemented(tmp_path: Path) -> None:
    with serving(tmp_path / "csi.sock", volume_health=False) as endpoint:
        offered = [
            *endpoint.controller.ControllerGetCapabilities(csi_pb2.ControllerGetCapabilitiesRequest()).capabilities,
            *endpoint.node.NodeGetCapabilities(csi_pb2.NodeGetCapabilitiesRequest()).capabilities,
        ]
        assert not [each for each in offered if "HEALTH" in str(each)]
        calls = [
            lambda: endpoint.controller.ControllerGetVolumeHealth(
                csi_pb2.ControllerGetVolumeHealthRequest(volume_id=VOLUME_ID)
            ),
            lambda: endpoint.controller.ControllerListVolumeHealth(csi_pb2.ControllerListVolumeHealthRequest()),
            lambda: endpoint.node.NodeGetVolumeHealth(csi_pb2.NodeGetVolumeHealthRequest(volume_id=VOLUME_ID)),
            lambda: endpoint.node.NodeGetStorageHealth(csi_pb2.NodeGetStorageHealthRequest()),
        ]
        assert [code_of(call) for call in calls] == [grpc.StatusCode.UNIMPLEMENTED] * 4


def test_volume_health_has_a_shortened_message(endpoint: Endpoint) -> None:
    request = csi_pb2.ControllerGetVolumeHealthRequest(volume_id=VOLUME_ID)
    health = endpoint.controller.ControllerGetVolumeHealth(request).volume_health
    (entry,) = health.health_statuses
    assert (health.volume_id, entry.status, entry.reason) == (VOLUME_ID, csi_pb2.DEGRADED, "FilesystemFull")
    assert len(entry.message) == 128
    absent = csi_pb2.ControllerGetVolumeHealthRequest(volume_id="z:none")
    call = endpoint.controller.ControllerGetVolumeHealth
    assert code_of(lambda: call(absent)) is grpc.StatusCode.NOT_FOUND
    assert code_of(lambda: call(csi_pb2.ControllerGetVolumeHealthRequest())) is grpc.StatusCode.INVALID_ARGUMENT


def test_volume_health_is_listed_in_pages(endpoint: Endpoint) -> None:
    ask = endpoint.controller.ControllerListVolumeHealth
    everything = ask(csi_pb2.ControllerListVolumeHealthRequest())
    assert [len(each.health_statuses) for each in everything.entries] == [1, 0]
    page = ask(csi_pb2.ControllerListVolumeHealthRequest(max_entries=1))
    assert (len(page.entries), page.next_token) == (1, "next")
    wrong = csi_pb2.ControllerListVolumeHealthRequest(max_entries=-1)
    assert code_of(lambda: ask(wrong)) is grpc.StatusCode.INVALID_ARGUMENT


def test_node_health_is_reported(endpoint: Endpoint) -> None:
    ask = endpoint.node.NodeGetVolumeHealth
    named = csi_pb2.NodeGetVolumeHealthRequest(volume_id=VOLUME_ID)
    published = csi_pb2.NodeGetVolumeHealthRequest(volume_id=VOLUME_ID, volume_publish_path="/a")
    staged = csi_pb2.NodeGetVolumeHealthRequest(volume_id=VOLUME_ID, staging_target_path="/a")
    found = [ask(request).volume_health for request in (named, published, staged)]
    assert [(each.volume_id, len(each.health_statuses)) for each in found] == [(VOLUME_ID, n) for n in (1, 0, 0)]
    assert code_of(lambda: ask(csi_pb2.NodeGetVolumeHealthRequest())) is grpc.StatusCode.INVALID_ARGUMENT
    (backend,) = endpoint.node.NodeGetStorageHealth(csi_pb2.NodeGetStorageHealthRequest()).backend_health
    shown = (backend.status, backend.reason, backend.message)
    assert shown == (csi_pb2.STORAGE_UNREACHABLE, "ClientAbsent", "none")


# --- health of the driver ---------------------------------------------------------------------------------------


def test_an_unhealthy_node_fails_its_probe_with_every_reason(tmp_path: Path) -> None:
    ready = partial(is_equipped, lambda: ["mkfs.ext4 is not installed", "no propagation"])
    with serving(tmp_path / "csi.sock", is_ready=ready) as endpoint:
        assert code_of(lambda: endpoint.identity.Probe(csi_pb2.ProbeRequest())) is grpc.StatusCode.FAILED_PRECONDITION


def test_probe_may_report_that_the_driver_is_not_ready(tmp_path: Path) -> None:
    with serving(tmp_path / "csi.sock", is_ready=lambda: False) as endpoint:
        answer = endpoint.identity.Probe(csi_pb2.ProbeRequest())
    assert answer.HasField("ready")
    assert not answer.ready.value


def test_a_healthy_node_is_ready() -> None:
    assert is_equipped(tuple)


def test_a_controller_is_not_ready_while_its_management_hangs() -> None:
    release = threading.Event()
    asked = []

    def check(deadline: Deadline) -> bool:
        asked.append(deadline)
        return release.wait(120)

    readiness = ManagementReadiness(check, wait_s=0.01)
    assert not readiness.is_ready()
    assert not readiness.is_ready()
    assert len(asked) == 1
    release.set()
    assert ManagementReadiness(lambda deadline: True, wait_s=5).is_ready()


def test_a_controller_stays_ready_after_the_first_answer() -> None:
    answers = [False, True]
    readiness = ManagementReadiness(lambda deadline: answers.pop(0), wait_s=5)
    assert [readiness.is_ready() for _ in range(4)] == [False, True, True, True]
    assert answers == []


def test_a_controller_is_not_ready_without_its_management() -> None:
    def check(deadline: Deadline) -> bool:
        raise StorageUnavailable("no response")

    assert not ManagementReadiness(check, wait_s=5).is_ready()


def test_every_problem_of_a_node_is_reported() -> None:
    with pytest.raises(PreconditionFailed, match="a; b"):
        is_equipped(lambda: ["a", "b"])
