# SPDX-License-Identifier: Apache-2.0
"""The CSI services: a handler translates a request that `rpc.boundary` has checked, and calls a use case."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from csi_driver.deadline import Deadline
from csi_driver.errors import NotOffered
from csi_driver.rpc import wire
from csi_driver.rpc.boundary import Service
from csi_driver.rpc.pb import csi_pb2 as pb

if TYPE_CHECKING:
    from csi_driver.controller.capacity import ExpandVolume, GetCapacity
    from csi_driver.controller.changed_blocks import ChangedBlocks
    from csi_driver.controller.create_volume import CreateVolume
    from csi_driver.controller.delete_volume import DeleteVolume
    from csi_driver.controller.fencing import UnpublishVolume
    from csi_driver.controller.group_snapshots import GroupSnapshots
    from csi_driver.controller.list_volumes import GetVolumeHealth, ListVolumes
    from csi_driver.controller.publish import PublishVolume
    from csi_driver.controller.snapshots import Snapshots
    from csi_driver.controller.validate import ModifyVolume, ValidateVolume
    from csi_driver.model import CutSnapshot, VolumeHealth
    from csi_driver.node.service import NodeUseCases
    from csi_driver.rpc.identity import StorageFeatures

# Names of ControllerServiceCapability.RPC.Type and NodeServiceCapability.RPC.Type.
_ATTACH_CAPABILITIES = ("PUBLISH_UNPUBLISH_VOLUME", "PUBLISH_READONLY", "LIST_VOLUMES_PUBLISHED_NODES")
_VOLUME_CAPABILITIES = ("CREATE_DELETE_VOLUME", "EXPAND_VOLUME", "MODIFY_VOLUME", "SINGLE_NODE_MULTI_WRITER")
_LIST_CAPABILITIES = ("LIST_VOLUMES", "GET_VOLUME", "GET_CAPACITY")
_CONTROLLER_HEALTH_CAPABILITIES = ("GET_VOLUME_HEALTH", "LIST_VOLUME_HEALTH")
_SNAPSHOT_CAPABILITIES = ("CREATE_DELETE_SNAPSHOT", "LIST_SNAPSHOTS", "GET_SNAPSHOT", "CLONE_VOLUME")
_NODE_CAPABILITIES = ("STAGE_UNSTAGE_VOLUME", "GET_VOLUME_STATS", "EXPAND_VOLUME", "SINGLE_NODE_MULTI_WRITER")
_NODE_HEALTH_CAPABILITIES = ("GET_VOLUME_HEALTH", "GET_STORAGE_HEALTH")


@dataclass(frozen=True, slots=True)
class ControllerUseCases:
    """The use cases behind the controller service."""

    create: CreateVolume
    delete: DeleteVolume
    publish: PublishVolume
    unpublish: UnpublishVolume
    expand: ExpandVolume
    modify: ModifyVolume
    listing: ListVolumes
    capacity: GetCapacity
    validate: ValidateVolume
    health: GetVolumeHealth
    features: StorageFeatures
    snapshots: Snapshots
    groups: GroupSnapshots
    changed_blocks: ChangedBlocks


@dataclass(slots=True)
class ControllerService(Service):
    """Controller service. `attaches`: the controller attaches volumes, not each node its own."""

    name: ClassVar[str] = "Controller"
    at_once: ClassVar[int] = 16  # they wait for the management, for less than a tick of the thread pool

    do: ControllerUseCases
    volume_health: bool = False
    attaches: bool = True

    def ControllerGetCapabilities(
        self, request: pb.ControllerGetCapabilitiesRequest, deadline: Deadline
    ) -> pb.ControllerGetCapabilitiesResponse:
        attach = _ATTACH_CAPABILITIES if self.attaches else ()
        health = _CONTROLLER_HEALTH_CAPABILITIES if self.volume_health else ()
        capability = pb.ControllerServiceCapability
        snapshots = _SNAPSHOT_CAPABILITIES if self.do.features.offered(deadline=deadline).snapshots else ()
        names = (*_VOLUME_CAPABILITIES, *_LIST_CAPABILITIES, *snapshots, *attach, *health)
        return pb.ControllerGetCapabilitiesResponse(
            capabilities=[capability(rpc=capability.RPC(type=name)) for name in names]
        )

    def CreateVolume(self, request: pb.CreateVolumeRequest, deadline: Deadline) -> pb.CreateVolumeResponse:
        volume = self.do.create.create(wire.create_from(request), deadline=deadline)
        return pb.CreateVolumeResponse(volume=wire.volume_to(volume))

    def DeleteVolume(self, request: pb.DeleteVolumeRequest, deadline: Deadline) -> pb.DeleteVolumeResponse:
        self.do.delete.delete(request.volume_id, deadline=deadline)
        return pb.DeleteVolumeResponse()

    def ControllerPublishVolume(
        self, request: pb.ControllerPublishVolumeRequest, deadline: Deadline
    ) -> pb.ControllerPublishVolumeResponse:
        self._require_attaching()
        published = self.do.publish.publish(wire.publish_from(request), deadline=deadline)
        return pb.ControllerPublishVolumeResponse(publish_context=published.as_map())

    def ControllerUnpublishVolume(
        self, request: pb.ControllerUnpublishVolumeRequest, deadline: Deadline
    ) -> pb.ControllerUnpublishVolumeResponse:
        self._require_attaching()
        self.do.unpublish.unpublish(request.volume_id, request.node_id, deadline=deadline)
        return pb.ControllerUnpublishVolumeResponse()

    def _require_attaching(self) -> None:
        if not self.attaches:
            raise NotOffered("this controller attaches no volumes: with --attach-by node each node attaches its own")

    def ControllerExpandVolume(
        self, request: pb.ControllerExpandVolumeRequest, deadline: Deadline
    ) -> pb.ControllerExpandVolumeResponse:
        capacity, capability = wire.range_from(request.capacity_range), wire.optional_capability_from(request)
        size_bytes, on_node = self.do.expand.expand(request.volume_id, capacity, capability, deadline=deadline)
        return pb.ControllerExpandVolumeResponse(capacity_bytes=size_bytes, node_expansion_required=on_node)

    def ControllerModifyVolume(
        self, request: pb.ControllerModifyVolumeRequest, deadline: Deadline
    ) -> pb.ControllerModifyVolumeResponse:
        self.do.modify.modify(request.volume_id, dict(request.mutable_parameters), deadline=deadline)
        return pb.ControllerModifyVolumeResponse()

    def ValidateVolumeCapabilities(
        self, request: pb.ValidateVolumeCapabilitiesRequest, deadline: Deadline
    ) -> pb.ValidateVolumeCapabilitiesResponse:
        objection = self.do.validate.validate(wire.validate_from(request), deadline=deadline)
        return wire.validated_to(request, objection)

    def ControllerGetVolume(
        self, request: pb.ControllerGetVolumeRequest, deadline: Deadline
    ) -> pb.ControllerGetVolumeResponse:
        return wire.get_to(self.do.listing.volume(request.volume_id, deadline=deadline))

    def ListVolumes(self, request: pb.ListVolumesRequest, deadline: Deadline) -> pb.ListVolumesResponse:
        page, do = wire.VolumeList(), self.do.listing
        page.response.next_token = do.volumes(request.max_entries, request.starting_token, page.add, deadline=deadline)
        return page.response

    def GetCapacity(self, request: pb.GetCapacityRequest, deadline: Deadline) -> pb.GetCapacityResponse:
        capacity = self.do.capacity.capacity(
            wire.capabilities_from(request.volume_capabilities),
            dict(request.parameters),
            dict(request.accessible_topology.segments) if request.HasField("accessible_topology") else None,
            deadline=deadline,
        )
        return wire.capacity_to(capacity)

    def ControllerGetVolumeHealth(
        self, request: pb.ControllerGetVolumeHealthRequest, deadline: Deadline
    ) -> pb.ControllerGetVolumeHealthResponse:
        found = self.do.health.volume(request.volume_id, deadline=deadline)
        return pb.ControllerGetVolumeHealthResponse(volume_health=wire.volume_health_to(found))

    def ControllerListVolumeHealth(
        self, request: pb.ControllerListVolumeHealthRequest, deadline: Deadline
    ) -> pb.ControllerListVolumeHealthResponse:
        response = pb.ControllerListVolumeHealthResponse()

        def add(health: VolumeHealth) -> int:
            response.entries.append(wire.volume_health_to(health))
            return response.entries[-1].ByteSize()

        response.next_token = self.do.health.volumes(
            request.max_entries, request.starting_token, add, deadline=deadline
        )
        return response

    def CreateSnapshot(self, request: pb.CreateSnapshotRequest, deadline: Deadline) -> pb.CreateSnapshotResponse:
        cut = self.do.snapshots.create(
            request.name, request.source_volume_id, dict(request.parameters), deadline=deadline
        )
        return pb.CreateSnapshotResponse(snapshot=wire.snapshot_to(cut))

    def DeleteSnapshot(self, request: pb.DeleteSnapshotRequest, deadline: Deadline) -> pb.DeleteSnapshotResponse:
        self.do.snapshots.delete(request.snapshot_id, deadline=deadline)
        return pb.DeleteSnapshotResponse()

    def ListSnapshots(self, request: pb.ListSnapshotsRequest, deadline: Deadline) -> pb.ListSnapshotsResponse:
        response = pb.ListSnapshotsResponse()

        def add(snapshot: CutSnapshot) -> int:
            response.entries.append(pb.ListSnapshotsResponse.Entry(snapshot=wire.snapshot_to(snapshot)))
            return response.entries[-1].ByteSize()

        response.next_token = self.do.snapshots.page(
            request.max_entries,
            request.starting_token,
            add,
            source_volume_id=request.source_volume_id,
            snapshot_id=request.snapshot_id,
            deadline=deadline,
        )
        return response

    def GetSnapshot(self, request: pb.GetSnapshotRequest, deadline: Deadline) -> pb.GetSnapshotResponse:
        return pb.GetSnapshotResponse(
            snapshot=wire.snapshot_to(self.do.snapshots.get(request.snapshot_id, deadline=deadline))
        )


@dataclass(slots=True)
class GroupControllerService(Service):
    name: ClassVar[str] = "GroupController"

    do: ControllerUseCases

    def GroupControllerGetCapabilities(
        self, request: pb.GroupControllerGetCapabilitiesRequest, deadline: Deadline
    ) -> pb.GroupControllerGetCapabilitiesResponse:
        capability, response = pb.GroupControllerServiceCapability, pb.GroupControllerGetCapabilitiesResponse()
        if self.do.features.offered(deadline=deadline).group_snapshots:
            response.capabilities.append(
                capability(rpc=capability.RPC(type=capability.RPC.CREATE_DELETE_GET_VOLUME_GROUP_SNAPSHOT))
            )
        return response

    def CreateVolumeGroupSnapshot(
        self, request: pb.CreateVolumeGroupSnapshotRequest, deadline: Deadline
    ) -> pb.CreateVolumeGroupSnapshotResponse:
        cut = self.do.groups.create(
            request.name, tuple(request.source_volume_ids), dict(request.parameters), deadline=deadline
        )
        return pb.CreateVolumeGroupSnapshotResponse(group_snapshot=wire.group_to(cut))

    def DeleteVolumeGroupSnapshot(
        self, request: pb.DeleteVolumeGroupSnapshotRequest, deadline: Deadline
    ) -> pb.DeleteVolumeGroupSnapshotResponse:
        self.do.groups.delete(request.group_snapshot_id, tuple(request.snapshot_ids), deadline=deadline)
        return pb.DeleteVolumeGroupSnapshotResponse()

    def GetVolumeGroupSnapshot(
        self, request: pb.GetVolumeGroupSnapshotRequest, deadline: Deadline
    ) -> pb.GetVolumeGroupSnapshotResponse:
        found = self.do.groups.get(request.group_snapshot_id, tuple(request.snapshot_ids), deadline=deadline)
        return pb.GetVolumeGroupSnapshotResponse(group_snapshot=wire.group_to(found))


@dataclass(slots=True)
class SnapshotMetadataService(Service):
    """The first message of a stream has the size, also where nothing follows."""

    name: ClassVar[str] = "SnapshotMetadata"

    do: ControllerUseCases

    def GetMetadataAllocated(
        self, request: pb.GetMetadataAllocatedRequest, deadline: Deadline
    ) -> Iterator[pb.GetMetadataAllocatedResponse]:
        size_bytes, pages = self.do.changed_blocks.allocated(
            request.snapshot_id, request.starting_offset, request.max_results, deadline=deadline
        )
        yield from wire.ranges_to(pb.GetMetadataAllocatedResponse, size_bytes, pages)

    def GetMetadataDelta(
        self, request: pb.GetMetadataDeltaRequest, deadline: Deadline
    ) -> Iterator[pb.GetMetadataDeltaResponse]:
        size_bytes, pages = self.do.changed_blocks.delta(
            request.base_snapshot_id,
            request.target_snapshot_id,
            request.starting_offset,
            request.max_results,
            deadline=deadline,
        )
        yield from wire.ranges_to(pb.GetMetadataDeltaResponse, size_bytes, pages)


@dataclass(slots=True)
class NodeService(Service):
    name: ClassVar[str] = "Node"
    at_once: ClassVar[int] = 6  # they wait for disks and programs, mostly for less than a tick of the thread pool

    do: NodeUseCases
    volume_health: bool = False

    def NodeGetCapabilities(
        self, request: pb.NodeGetCapabilitiesRequest, deadline: Deadline
    ) -> pb.NodeGetCapabilitiesResponse:
        names = (*_NODE_CAPABILITIES, *(_NODE_HEALTH_CAPABILITIES if self.volume_health else ()))
        capability = pb.NodeServiceCapability
        return pb.NodeGetCapabilitiesResponse(
            capabilities=[capability(rpc=capability.RPC(type=name)) for name in names]
        )

    def NodeGetInfo(self, request: pb.NodeGetInfoRequest, deadline: Deadline) -> pb.NodeGetInfoResponse:
        info = self.do.identity.info()
        topology = wire.topology_to(info.topology)
        return pb.NodeGetInfoResponse(
            node_id=info.node_id, max_volumes_per_node=info.max_volumes, accessible_topology=topology
        )

    def NodeStageVolume(self, request: pb.NodeStageVolumeRequest, deadline: Deadline) -> pb.NodeStageVolumeResponse:
        self.do.stage.stage(wire.stage_from(request), deadline=deadline)
        return pb.NodeStageVolumeResponse()

    def NodeUnstageVolume(
        self, request: pb.NodeUnstageVolumeRequest, deadline: Deadline
    ) -> pb.NodeUnstageVolumeResponse:
        self.do.stage.unstage(request.volume_id, request.staging_target_path, deadline=deadline)
        return pb.NodeUnstageVolumeResponse()

    def NodePublishVolume(
        self, request: pb.NodePublishVolumeRequest, deadline: Deadline
    ) -> pb.NodePublishVolumeResponse:
        self.do.publish.publish(wire.node_publish_from(request), deadline=deadline)
        return pb.NodePublishVolumeResponse()

    def NodeUnpublishVolume(
        self, request: pb.NodeUnpublishVolumeRequest, deadline: Deadline
    ) -> pb.NodeUnpublishVolumeResponse:
        self.do.publish.unpublish(request.volume_id, request.target_path, deadline=deadline)
        return pb.NodeUnpublishVolumeResponse()

    def NodeExpandVolume(self, request: pb.NodeExpandVolumeRequest, deadline: Deadline) -> pb.NodeExpandVolumeResponse:
        capacity_bytes = self.do.expand.expand(wire.node_expand_from(request), deadline=deadline)
        return pb.NodeExpandVolumeResponse(capacity_bytes=capacity_bytes)

    def NodeGetVolumeStats(
        self, request: pb.NodeGetVolumeStatsRequest, deadline: Deadline
    ) -> pb.NodeGetVolumeStatsResponse:
        usage = self.do.statistics.usage(
            request.volume_id, request.volume_path, request.staging_target_path, deadline=deadline
        )
        return wire.usage_to(usage)

    def NodeGetVolumeHealth(
        self, request: pb.NodeGetVolumeHealthRequest, deadline: Deadline
    ) -> pb.NodeGetVolumeHealthResponse:
        found = self.do.health.volume(
            request.volume_id, request.volume_publish_path, request.staging_target_path, deadline=deadline
        )
        return pb.NodeGetVolumeHealthResponse(volume_health=wire.volume_health_to(found))

    def NodeGetStorageHealth(
        self, request: pb.NodeGetStorageHealthRequest, deadline: Deadline
    ) -> pb.NodeGetStorageHealthResponse:
        return wire.storage_health_to(self.do.health.storage())
