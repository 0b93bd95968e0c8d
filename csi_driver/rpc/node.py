"""Node service: thin handlers over the node's use-cases."""

from __future__ import annotations

from typing import Protocol

import grpc

from csi_driver.deadline import Deadline
from csi_driver.health import StorageEntry, VolumeHealth
from csi_driver.model import Usage
from csi_driver.node.requests import NodeExpandRequest, NodeInfo, NodePublishRequest, StageRequest
from csi_driver.rpc import health, wire
from csi_driver.rpc.deadlines import Deadlines
from csi_driver.rpc.pb import csi_pb2, csi_pb2_grpc

_Rpc = csi_pb2.NodeServiceCapability.RPC

CAPABILITIES = (
    _Rpc.STAGE_UNSTAGE_VOLUME,
    _Rpc.GET_VOLUME_STATS,
    _Rpc.EXPAND_VOLUME,
    _Rpc.SINGLE_NODE_MULTI_WRITER,
)
HEALTH_CAPABILITIES = (_Rpc.GET_VOLUME_HEALTH, _Rpc.GET_STORAGE_HEALTH)


class Stage(Protocol):
    """A volume is made ready once per node, and put away."""

    def stage(self, request: StageRequest, *, deadline: Deadline) -> None: ...

    def unstage(self, volume_id: str, staging_target_path: str, *, deadline: Deadline) -> None: ...


class Publish(Protocol):
    """A staged volume is shown to one workload, and taken away."""

    def publish(self, request: NodePublishRequest, *, deadline: Deadline) -> None: ...

    def unpublish(self, volume_id: str, target_path: str, *, deadline: Deadline) -> None: ...


class Expand(Protocol):
    """What is on a grown volume grows too. The answer: bytes now."""

    def expand(self, request: NodeExpandRequest, *, deadline: Deadline) -> int: ...


class Statistics(Protocol):
    """How full a volume is."""

    def usage(self, volume_id: str, volume_path: str, staging_target_path: str, *, deadline: Deadline) -> Usage: ...


class Identity(Protocol):
    """Who this node is."""

    def info(self) -> NodeInfo: ...


class Health(Protocol):
    """What is wrong with a volume on this node, and with the node's way to the storage."""

    def volume(
        self, volume_id: str, volume_publish_path: str, staging_target_path: str, *, deadline: Deadline
    ) -> VolumeHealth: ...

    def storage(self) -> tuple[StorageEntry, ...]: ...


class NodeUseCases(Protocol):
    """All that the node service delegates to."""

    @property
    def stage(self) -> Stage: ...

    @property
    def publish(self) -> Publish: ...

    @property
    def expand(self) -> Expand: ...

    @property
    def statistics(self) -> Statistics: ...

    @property
    def identity(self) -> Identity: ...

    @property
    def health(self) -> Health: ...


class NodeServicer(csi_pb2_grpc.NodeServicer):
    """Translates, delegates, translates back."""

    def __init__(self, use_cases: NodeUseCases, deadlines: Deadlines, *, volume_health: bool = False) -> None:
        self._do = use_cases
        self._deadlines = deadlines
        self._capabilities = (*CAPABILITIES, *(HEALTH_CAPABILITIES if volume_health else ()))

    def NodeGetCapabilities(
        self, request: csi_pb2.NodeGetCapabilitiesRequest, context: grpc.ServicerContext
    ) -> csi_pb2.NodeGetCapabilitiesResponse:
        return csi_pb2.NodeGetCapabilitiesResponse(
            capabilities=[csi_pb2.NodeServiceCapability(rpc=_Rpc(type=kind)) for kind in self._capabilities]
        )

    def NodeGetInfo(
        self, request: csi_pb2.NodeGetInfoRequest, context: grpc.ServicerContext
    ) -> csi_pb2.NodeGetInfoResponse:
        return wire.info_to(self._do.identity.info())

    def NodeStageVolume(
        self, request: csi_pb2.NodeStageVolumeRequest, context: grpc.ServicerContext
    ) -> csi_pb2.NodeStageVolumeResponse:
        self._do.stage.stage(wire.stage_from(request), deadline=self._deadlines.of(context))
        return csi_pb2.NodeStageVolumeResponse()

    def NodeUnstageVolume(
        self, request: csi_pb2.NodeUnstageVolumeRequest, context: grpc.ServicerContext
    ) -> csi_pb2.NodeUnstageVolumeResponse:
        self._do.stage.unstage(request.volume_id, request.staging_target_path, deadline=self._deadlines.of(context))
        return csi_pb2.NodeUnstageVolumeResponse()

    def NodePublishVolume(
        self, request: csi_pb2.NodePublishVolumeRequest, context: grpc.ServicerContext
    ) -> csi_pb2.NodePublishVolumeResponse:
        self._do.publish.publish(wire.node_publish_from(request), deadline=self._deadlines.of(context))
        return csi_pb2.NodePublishVolumeResponse()

    def NodeUnpublishVolume(
        self, request: csi_pb2.NodeUnpublishVolumeRequest, context: grpc.ServicerContext
    ) -> csi_pb2.NodeUnpublishVolumeResponse:
        self._do.publish.unpublish(request.volume_id, request.target_path, deadline=self._deadlines.of(context))
        return csi_pb2.NodeUnpublishVolumeResponse()

    def NodeExpandVolume(
        self, request: csi_pb2.NodeExpandVolumeRequest, context: grpc.ServicerContext
    ) -> csi_pb2.NodeExpandVolumeResponse:
        capacity_bytes = self._do.expand.expand(wire.node_expand_from(request), deadline=self._deadlines.of(context))
        return csi_pb2.NodeExpandVolumeResponse(capacity_bytes=capacity_bytes)

    def NodeGetVolumeStats(
        self, request: csi_pb2.NodeGetVolumeStatsRequest, context: grpc.ServicerContext
    ) -> csi_pb2.NodeGetVolumeStatsResponse:
        usage = self._do.statistics.usage(
            request.volume_id,
            request.volume_path,
            request.staging_target_path,
            deadline=self._deadlines.of(context),
        )
        return wire.usage_to(usage)

    def NodeGetVolumeHealth(
        self, request: csi_pb2.NodeGetVolumeHealthRequest, context: grpc.ServicerContext
    ) -> csi_pb2.NodeGetVolumeHealthResponse:
        found = self._do.health.volume(
            request.volume_id,
            request.volume_publish_path,
            request.staging_target_path,
            deadline=self._deadlines.of(context),
        )
        return csi_pb2.NodeGetVolumeHealthResponse(volume_health=health.volume_to(found))

    def NodeGetStorageHealth(
        self, request: csi_pb2.NodeGetStorageHealthRequest, context: grpc.ServicerContext
    ) -> csi_pb2.NodeGetStorageHealthResponse:
        return health.storage_to(self._do.health.storage())
