# SPDX-License-Identifier: Apache-2.0
"""Capabilities at the controller's socket follow the storage behind it: the embedded manager on pools with and without
reflinks, and NVMesh, in any mixture, and after a restart of the controller.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import fields
from pathlib import Path
from typing import Any, cast

import grpc
import pytest

from csi_driver.rpc.boundary import Boundary
from csi_driver.rpc.identity import IdentityService
from csi_driver.rpc.pb import csi_pb2 as pb
from csi_driver.rpc.pb import csi_pb2_grpc
from csi_driver.rpc.server import Server
from csi_driver.rpc.services import ControllerService, ControllerUseCases, GroupControllerService
from csi_driver.settings import EndpointSettings
from tests.contract.snapshot_zones import Kind, Zones, zones_of

SNAPSHOTS = {"CREATE_DELETE_SNAPSHOT", "LIST_SNAPSHOTS", "GET_SNAPSHOT", "CLONE_VOLUME"}


@contextmanager
def endpoint(socket: Path, zones: Zones) -> Iterator[grpc.Channel]:
    """Serve a controller that has just been started."""
    zones.restart_controller()
    own: dict[str, Any] = {"features": zones.features, "snapshots": zones.snapshots, "groups": zones.groups}
    use_cases = ControllerUseCases(
        **{each.name: cast("Any", own.get(each.name)) for each in fields(ControllerUseCases)}
    )
    identity = IdentityService("csi.example.com", lambda: "1", lambda: True, zones.features)
    services = (identity, ControllerService(use_cases), GroupControllerService(use_cases))
    server = Server(EndpointSettings(socket), Boundary(), services)
    server.start()
    options = [("grpc.default_authority", "localhost"), ("grpc.use_local_subchannel_pool", 1)]
    with grpc.insecure_channel(f"unix:{socket}", options=options) as channel:
        try:
            yield channel
        finally:
            server.drain()


def offered(channel: grpc.Channel) -> tuple[set[str], bool, bool]:
    """Return the capabilities of snapshots, and whether groups are one of the plugin and of their service."""
    controller, groups = csi_pb2_grpc.ControllerStub(channel), csi_pb2_grpc.GroupControllerStub(channel)
    rpcs = controller.ControllerGetCapabilities(pb.ControllerGetCapabilitiesRequest()).capabilities
    names = {pb.ControllerServiceCapability.RPC.Type.Name(each.rpc.type) for each in rpcs}
    plugin = csi_pb2_grpc.IdentityStub(channel).GetPluginCapabilities(pb.GetPluginCapabilitiesRequest()).capabilities
    service = pb.PluginCapability.Service.GROUP_CONTROLLER_SERVICE
    of_service = groups.GroupControllerGetCapabilities(pb.GroupControllerGetCapabilitiesRequest()).capabilities
    return names & SNAPSHOTS, service in [each.service.type for each in plugin], bool(of_service)


def code_of(call: Callable[[], object]) -> grpc.StatusCode:
    with pytest.raises(grpc.RpcError) as refused:
        call()
    return cast("grpc.Call", refused.value).code()


@pytest.mark.parametrize(
    ("kinds", "has_snapshots"),
    [
        ({"a": Kind.REFLINKS}, True),
        ({"a": Kind.NVMESH, "b": Kind.REFLINKS}, True),
        ({"a": Kind.EMBEDDED_WITHOUT, "b": Kind.NVMESH}, False),
    ],
    ids=["reflinks", "mixed", "none"],
)
def test_snapshots_and_groups_are_offered_where_a_zone_has_them_also_after_a_restart(
    tmp_path: Path, kinds: dict[str, Kind], has_snapshots: bool
) -> None:
    with zones_of(tmp_path, **kinds) as zones:
        for start in range(2):
            with endpoint(tmp_path / f"csi-{start}.sock", zones) as channel:
                assert offered(channel) == (SNAPSHOTS if has_snapshots else set(), has_snapshots, has_snapshots)


def test_in_a_mixture_the_zone_without_snapshots_refuses_and_the_other_one_cuts(tmp_path: Path) -> None:
    with (
        zones_of(tmp_path, a=Kind.NVMESH, b=Kind.REFLINKS) as zones,
        endpoint(tmp_path / "csi.sock", zones) as channel,
    ):
        controller, groups = csi_pb2_grpc.ControllerStub(channel), csi_pb2_grpc.GroupControllerStub(channel)
        offered(channel)
        here, there = zones.volume(zone="a").volume_id, zones.volume("pvc-2", zone="b").volume_id
        refused = pb.CreateSnapshotRequest(name="s1", source_volume_id=here)
        assert code_of(lambda: controller.CreateSnapshot(refused)) is grpc.StatusCode.FAILED_PRECONDITION
        refused_group = pb.CreateVolumeGroupSnapshotRequest(name="g", source_volume_ids=[here])
        assert code_of(lambda: groups.CreateVolumeGroupSnapshot(refused_group)) is grpc.StatusCode.FAILED_PRECONDITION
        cut = controller.CreateSnapshot(pb.CreateSnapshotRequest(name="s1", source_volume_id=there)).snapshot
        listed = controller.ListSnapshots(pb.ListSnapshotsRequest()).entries
        assert [each.snapshot for each in listed] == [cut]


def test_without_any_reflinks_snapshots_are_unimplemented(tmp_path: Path) -> None:
    with zones_of(tmp_path, a=Kind.NVMESH) as zones, endpoint(tmp_path / "csi.sock", zones) as channel:
        controller = csi_pb2_grpc.ControllerStub(channel)
        source = zones.volume().volume_id
        request = pb.CreateSnapshotRequest(name="s1", source_volume_id=source)
        assert code_of(lambda: controller.CreateSnapshot(request)) is grpc.StatusCode.UNIMPLEMENTED
        assert code_of(lambda: controller.ListSnapshots(pb.ListSnapshotsRequest())) is grpc.StatusCode.UNIMPLEMENTED
