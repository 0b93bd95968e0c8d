"""Controller service: thin handlers over the controller's use-cases."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import grpc

from csi_driver.controller.ports import CreateRequest, PublishRequest, ValidateRequest
from csi_driver.deadline import Deadline
from csi_driver.errors import NotOffered
from csi_driver.health import VolumeHealth
from csi_driver.model import Capability, Capacity, CapacityRange, ListedVolume, ProvisionedVolume, Segments
from csi_driver.publish_context import PublishContext
from csi_driver.rpc import health, wire
from csi_driver.rpc.deadlines import Deadlines
from csi_driver.rpc.pb import csi_pb2, csi_pb2_grpc

_Rpc = csi_pb2.ControllerServiceCapability.RPC

CAPABILITIES = (
    _Rpc.CREATE_DELETE_VOLUME,
    _Rpc.PUBLISH_UNPUBLISH_VOLUME,
    _Rpc.PUBLISH_READONLY,
    _Rpc.LIST_VOLUMES,
    _Rpc.LIST_VOLUMES_PUBLISHED_NODES,
    _Rpc.GET_CAPACITY,
    _Rpc.EXPAND_VOLUME,
    _Rpc.GET_VOLUME,
    _Rpc.MODIFY_VOLUME,
    _Rpc.SINGLE_NODE_MULTI_WRITER,
)
HEALTH_CAPABILITIES = (_Rpc.GET_VOLUME_HEALTH, _Rpc.LIST_VOLUME_HEALTH)
_OF_ATTACHING = (_Rpc.PUBLISH_UNPUBLISH_VOLUME, _Rpc.PUBLISH_READONLY, _Rpc.LIST_VOLUMES_PUBLISHED_NODES)
"""What is offered only where the controller attaches volumes."""


class CreateVolume(Protocol):
    """CreateVolume."""

    def create(self, request: CreateRequest, *, deadline: Deadline) -> ProvisionedVolume: ...


class DeleteVolume(Protocol):
    """DeleteVolume."""

    def delete(self, volume_id: str, *, deadline: Deadline) -> None: ...


class PublishVolume(Protocol):
    """ControllerPublishVolume."""

    def publish(self, request: PublishRequest, *, deadline: Deadline) -> PublishContext: ...


class UnpublishVolume(Protocol):
    """ControllerUnpublishVolume. An empty node id means every node."""

    def unpublish(self, volume_id: str, node_id: str, *, deadline: Deadline) -> None: ...


class ExpandVolume(Protocol):
    """Volumes grow. The answer: bytes now, and whether the node has to grow something as well."""

    def expand(
        self, volume_id: str, capacity: CapacityRange, capability: Capability | None, *, deadline: Deadline
    ) -> tuple[int, bool]: ...


class ModifyVolume(Protocol):
    """Volumes change in what they can be changed in."""

    def modify(self, volume_id: str, parameters: Mapping[str, str], *, deadline: Deadline) -> None: ...


class ListVolumes(Protocol):
    """ListVolumes and ControllerGetVolume."""

    def volumes(
        self, max_entries: int, starting_token: str, *, deadline: Deadline
    ) -> tuple[list[ListedVolume], str]: ...

    def volume(self, volume_id: str, *, deadline: Deadline) -> ListedVolume: ...


class GetCapacity(Protocol):
    """GetCapacity."""

    def capacity(
        self,
        capabilities: Sequence[Capability],
        parameters: dict[str, str],
        segments: Segments | None,
        *,
        deadline: Deadline,
    ) -> Capacity: ...


class ValidateVolume(Protocol):
    """ValidateVolumeCapabilities. Returns why the volume cannot be used so, or None."""

    def validate(self, request: ValidateRequest, *, deadline: Deadline) -> str | None: ...


class Health(Protocol):
    """What is wrong with volumes."""

    def volume(self, volume_id: str, *, deadline: Deadline) -> VolumeHealth: ...

    def volumes(
        self, max_entries: int, starting_token: str, *, deadline: Deadline
    ) -> tuple[list[VolumeHealth], str]: ...


@dataclass(frozen=True, slots=True)
class ControllerUseCases:
    """All that the controller service delegates to."""

    create: CreateVolume
    delete: DeleteVolume
    publish: PublishVolume
    unpublish: UnpublishVolume
    expand: ExpandVolume
    modify: ModifyVolume
    listing: ListVolumes
    capacity: GetCapacity
    validate: ValidateVolume
    health: Health


class ControllerServicer(csi_pb2_grpc.ControllerServicer):
    """Translates, delegates, translates back."""

    def __init__(
        self, use_cases: ControllerUseCases, deadlines: Deadlines, *, volume_health: bool = False, attaches: bool = True
    ) -> None:
        """`attaches`: the controller attaches volumes, not each node for itself."""
        self._do = use_cases
        self._deadlines = deadlines
        self._attaches = attaches
        offered = (*CAPABILITIES, *(HEALTH_CAPABILITIES if volume_health else ()))
        self._capabilities = tuple(kind for kind in offered if attaches or kind not in _OF_ATTACHING)

    def ControllerGetCapabilities(
        self, request: csi_pb2.ControllerGetCapabilitiesRequest, context: grpc.ServicerContext
    ) -> csi_pb2.ControllerGetCapabilitiesResponse:
        return csi_pb2.ControllerGetCapabilitiesResponse(
            capabilities=[csi_pb2.ControllerServiceCapability(rpc=_Rpc(type=kind)) for kind in self._capabilities]
        )

    def CreateVolume(
        self, request: csi_pb2.CreateVolumeRequest, context: grpc.ServicerContext
    ) -> csi_pb2.CreateVolumeResponse:
        volume = self._do.create.create(wire.create_from(request), deadline=self._deadlines.of(context))
        return csi_pb2.CreateVolumeResponse(volume=wire.volume_to(volume))

    def DeleteVolume(
        self, request: csi_pb2.DeleteVolumeRequest, context: grpc.ServicerContext
    ) -> csi_pb2.DeleteVolumeResponse:
        self._do.delete.delete(request.volume_id, deadline=self._deadlines.of(context))
        return csi_pb2.DeleteVolumeResponse()

    def ControllerPublishVolume(
        self, request: csi_pb2.ControllerPublishVolumeRequest, context: grpc.ServicerContext
    ) -> csi_pb2.ControllerPublishVolumeResponse:
        self._require_attaching()
        published = self._do.publish.publish(wire.publish_from(request), deadline=self._deadlines.of(context))
        return csi_pb2.ControllerPublishVolumeResponse(publish_context=published.as_map())

    def ControllerUnpublishVolume(
        self, request: csi_pb2.ControllerUnpublishVolumeRequest, context: grpc.ServicerContext
    ) -> csi_pb2.ControllerUnpublishVolumeResponse:
        self._require_attaching()
        self._do.unpublish.unpublish(request.volume_id, request.node_id, deadline=self._deadlines.of(context))
        return csi_pb2.ControllerUnpublishVolumeResponse()

    def _require_attaching(self) -> None:
        if not self._attaches:
            raise NotOffered("this controller attaches no volumes: with --attach-by node each node attaches its own")

    def ControllerExpandVolume(
        self, request: csi_pb2.ControllerExpandVolumeRequest, context: grpc.ServicerContext
    ) -> csi_pb2.ControllerExpandVolumeResponse:
        capacity_bytes, node_expansion_required = self._do.expand.expand(
            request.volume_id,
            wire.range_from(request.capacity_range),
            wire.expansion_capability_from(request),
            deadline=self._deadlines.of(context),
        )
        return csi_pb2.ControllerExpandVolumeResponse(
            capacity_bytes=capacity_bytes, node_expansion_required=node_expansion_required
        )

    def ControllerModifyVolume(
        self, request: csi_pb2.ControllerModifyVolumeRequest, context: grpc.ServicerContext
    ) -> csi_pb2.ControllerModifyVolumeResponse:
        parameters = dict(request.mutable_parameters)
        self._do.modify.modify(request.volume_id, parameters, deadline=self._deadlines.of(context))
        return csi_pb2.ControllerModifyVolumeResponse()

    def ValidateVolumeCapabilities(
        self, request: csi_pb2.ValidateVolumeCapabilitiesRequest, context: grpc.ServicerContext
    ) -> csi_pb2.ValidateVolumeCapabilitiesResponse:
        objection = self._do.validate.validate(wire.validate_from(request), deadline=self._deadlines.of(context))
        return wire.validated_to(request, objection)

    def ControllerGetVolume(
        self, request: csi_pb2.ControllerGetVolumeRequest, context: grpc.ServicerContext
    ) -> csi_pb2.ControllerGetVolumeResponse:
        return wire.get_to(self._do.listing.volume(request.volume_id, deadline=self._deadlines.of(context)))

    def ListVolumes(
        self, request: csi_pb2.ListVolumesRequest, context: grpc.ServicerContext
    ) -> csi_pb2.ListVolumesResponse:
        volumes, next_token = self._do.listing.volumes(
            request.max_entries, request.starting_token, deadline=self._deadlines.of(context)
        )
        return wire.list_to(volumes, next_token)

    def GetCapacity(
        self, request: csi_pb2.GetCapacityRequest, context: grpc.ServicerContext
    ) -> csi_pb2.GetCapacityResponse:
        capacity = self._do.capacity.capacity(
            wire.capabilities_from(request.volume_capabilities),
            dict(request.parameters),
            wire.wanted_segments_from(request),
            deadline=self._deadlines.of(context),
        )
        return wire.capacity_to(capacity)

    def ControllerGetVolumeHealth(
        self, request: csi_pb2.ControllerGetVolumeHealthRequest, context: grpc.ServicerContext
    ) -> csi_pb2.ControllerGetVolumeHealthResponse:
        found = self._do.health.volume(request.volume_id, deadline=self._deadlines.of(context))
        return csi_pb2.ControllerGetVolumeHealthResponse(volume_health=health.volume_to(found))

    def ControllerListVolumeHealth(
        self, request: csi_pb2.ControllerListVolumeHealthRequest, context: grpc.ServicerContext
    ) -> csi_pb2.ControllerListVolumeHealthResponse:
        found, next_token = self._do.health.volumes(
            request.max_entries, request.starting_token, deadline=self._deadlines.of(context)
        )
        return csi_pb2.ControllerListVolumeHealthResponse(
            entries=[health.volume_to(each) for each in found], next_token=next_token
        )
