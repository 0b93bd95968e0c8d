"""Translates CSI messages to the driver's types (`..._from`) and back (`..._to`).

`rpc.validation` has checked the requests: required fields are set, numbers are in range, enums are known.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from google.protobuf.wrappers_pb2 import Int64Value

from csi_driver.controller.ports import CreateRequest, PublishRequest, TopologyRequirement, ValidateRequest
from csi_driver.errors import InvalidRequest
from csi_driver.model import (
    Access,
    AccessMode,
    BlockAccess,
    Capability,
    Capacity,
    CapacityRange,
    ListedVolume,
    MountAccess,
    ProvisionedVolume,
    Segments,
    StorageEntry,
    Usage,
    VolumeHealth,
)
from csi_driver.node import NodeExpandRequest, NodePublishRequest, StageRequest
from csi_driver.rpc.pb import csi_pb2

_STRING_BYTES = 128


# --- parts of requests ------------------------------------------------------------------------------------------


def capability_from(message: csi_pb2.VolumeCapability) -> Capability:
    """Read a volume capability."""
    mode = csi_pb2.VolumeCapability.AccessMode.Mode.Name(message.access_mode.mode)
    return Capability(_access_from(message), AccessMode(mode))


def _access_from(message: csi_pb2.VolumeCapability) -> Access:
    if message.WhichOneof("access_type") == "block":
        return BlockAccess()
    mount = message.mount
    return MountAccess(mount.fs_type, tuple(mount.mount_flags), mount.volume_mount_group)


def capabilities_from(messages: Iterable[csi_pb2.VolumeCapability]) -> tuple[Capability, ...]:
    """Read volume capabilities."""
    return tuple(capability_from(message) for message in messages)


def range_from(message: csi_pb2.CapacityRange) -> CapacityRange:
    """Read a capacity range; unset and zero both mean "not said"."""
    return CapacityRange(message.required_bytes, message.limit_bytes)


def _topology_from(message: csi_pb2.CreateVolumeRequest) -> TopologyRequirement | None:
    if not message.HasField("accessibility_requirements"):
        return None
    wanted = message.accessibility_requirements
    return TopologyRequirement(_segments_from(wanted.requisite), _segments_from(wanted.preferred))


def _segments_from(messages: Iterable[csi_pb2.Topology]) -> tuple[Segments, ...]:
    return tuple(dict(message.segments) for message in messages)


# --- controller: requests ---------------------------------------------------------------------------------------


def create_from(message: csi_pb2.CreateVolumeRequest) -> CreateRequest:
    """Read CreateVolume. Raises `InvalidRequest` for what is only sent to plugins with capabilities we lack."""
    if message.HasField("volume_content_source"):
        raise InvalidRequest(
            "volume_content_source: expected none, as clones and snapshots are not supported; remove the data source"
        )
    return CreateRequest(
        name=message.name,
        capacity=range_from(message.capacity_range),
        capabilities=capabilities_from(message.volume_capabilities),
        parameters=dict(message.parameters),
        secrets=dict(message.secrets),
        topology=_topology_from(message),
        mutable_parameters=dict(message.mutable_parameters),
    )


def publish_from(message: csi_pb2.ControllerPublishVolumeRequest) -> PublishRequest:
    """Read ControllerPublishVolume."""
    return PublishRequest(
        volume_id=message.volume_id,
        node_id=message.node_id,
        capability=capability_from(message.volume_capability),
        read_only=message.readonly,
        context=dict(message.volume_context),
    )


def validate_from(message: csi_pb2.ValidateVolumeCapabilitiesRequest) -> ValidateRequest:
    """Read ValidateVolumeCapabilities."""
    return ValidateRequest(
        volume_id=message.volume_id,
        capabilities=capabilities_from(message.volume_capabilities),
        context=dict(message.volume_context),
        parameters=dict(message.parameters),
        mutable_parameters=dict(message.mutable_parameters),
    )


# --- controller: answers ----------------------------------------------------------------------------------------


def volume_to(volume: ProvisionedVolume) -> csi_pb2.Volume:
    """Write a volume."""
    return csi_pb2.Volume(
        capacity_bytes=volume.capacity_bytes,
        volume_id=volume.volume_id,
        volume_context=dict(volume.context),
        accessible_topology=[csi_pb2.Topology(segments=dict(segments)) for segments in volume.topology],
    )


def list_to(volumes: Sequence[ListedVolume], next_token: str) -> csi_pb2.ListVolumesResponse:
    """Write one page of volumes."""
    return csi_pb2.ListVolumesResponse(
        entries=[
            csi_pb2.ListVolumesResponse.Entry(
                volume=volume_to(listed.volume),
                status=csi_pb2.ListVolumesResponse.VolumeStatus(published_node_ids=listed.published_node_ids),
            )
            for listed in volumes
        ],
        next_token=next_token,
    )


def get_to(listed: ListedVolume) -> csi_pb2.ControllerGetVolumeResponse:
    """Write one volume with its nodes."""
    return csi_pb2.ControllerGetVolumeResponse(
        volume=volume_to(listed.volume),
        status=csi_pb2.ControllerGetVolumeResponse.VolumeStatus(published_node_ids=listed.published_node_ids),
    )


def capacity_to(capacity: Capacity) -> csi_pb2.GetCapacityResponse:
    """Write free space."""
    return csi_pb2.GetCapacityResponse(
        available_capacity=capacity.available_bytes,
        maximum_volume_size=_optional(capacity.maximum_volume_bytes),
        minimum_volume_size=_optional(capacity.minimum_volume_bytes),
    )


def _optional(value: int | None) -> Int64Value | None:
    return None if value is None else Int64Value(value=value)


def validated_to(
    message: csi_pb2.ValidateVolumeCapabilitiesRequest, objection: str | None
) -> csi_pb2.ValidateVolumeCapabilitiesResponse:
    """Confirm what was asked, or say what speaks against it."""
    if objection is not None:
        return csi_pb2.ValidateVolumeCapabilitiesResponse(message=cut(objection))
    return csi_pb2.ValidateVolumeCapabilitiesResponse(
        confirmed=csi_pb2.ValidateVolumeCapabilitiesResponse.Confirmed(
            volume_context=dict(message.volume_context),
            volume_capabilities=message.volume_capabilities,
            parameters=dict(message.parameters),
            mutable_parameters=dict(message.mutable_parameters),
        )
    )


def cut(text: str) -> str:
    """Shorten text to the 128 bytes that a CSI string may have."""
    encoded = text.encode("utf-8", "backslashreplace")
    if len(encoded) <= _STRING_BYTES:
        return encoded.decode()
    return encoded[: _STRING_BYTES - 3].decode("utf-8", "ignore") + "..."


# --- node: requests ---------------------------------------------------------------------------------------------


def stage_from(message: csi_pb2.NodeStageVolumeRequest) -> StageRequest:
    """Read NodeStageVolume."""
    return StageRequest(
        volume_id=message.volume_id,
        staging_target_path=message.staging_target_path,
        capability=capability_from(message.volume_capability),
        publish_context=dict(message.publish_context),
        volume_context=dict(message.volume_context),
        secrets=dict(message.secrets),
    )


def node_publish_from(message: csi_pb2.NodePublishVolumeRequest) -> NodePublishRequest:
    """Read NodePublishVolume."""
    return NodePublishRequest(
        volume_id=message.volume_id,
        staging_target_path=message.staging_target_path,
        target_path=message.target_path,
        capability=capability_from(message.volume_capability),
        read_only=message.readonly,
        publish_context=dict(message.publish_context),
        volume_context=dict(message.volume_context),
    )


def node_expand_from(message: csi_pb2.NodeExpandVolumeRequest) -> NodeExpandRequest:
    """Read NodeExpandVolume."""
    capability = capability_from(message.volume_capability) if message.HasField("volume_capability") else None
    return NodeExpandRequest(
        volume_id=message.volume_id,
        volume_path=message.volume_path,
        capacity=range_from(message.capacity_range),
        staging_target_path=message.staging_target_path,
        capability=capability,
        secrets=dict(message.secrets),
    )


# --- node: answers ----------------------------------------------------------------------------------------------


def usage_to(usage: Usage) -> csi_pb2.NodeGetVolumeStatsResponse:
    """Write the use of a volume: bytes always, inodes where they are counted."""
    measures = [
        csi_pb2.VolumeUsage(
            unit=csi_pb2.VolumeUsage.BYTES,
            total=usage.total_bytes,
            used=usage.used_bytes or 0,
            available=usage.available_bytes or 0,
        )
    ]
    if usage.total_inodes is not None:
        measures.append(
            csi_pb2.VolumeUsage(
                unit=csi_pb2.VolumeUsage.INODES,
                total=usage.total_inodes,
                used=usage.used_inodes or 0,
                available=usage.available_inodes or 0,
            )
        )
    return csi_pb2.NodeGetVolumeStatsResponse(usage=measures)


# --- health -----------------------------------------------------------------------------------------------------


def volume_health_to(health: VolumeHealth) -> csi_pb2.VolumeHealth:
    """Write the problems of a volume."""
    return csi_pb2.VolumeHealth(
        volume_id=health.volume_id,
        health_statuses=[
            csi_pb2.VolumeHealth.VolumeHealthEntry(
                status=entry.status.value, reason=entry.reason, message=cut(entry.message)
            )
            for entry in health.entries
        ],
    )


def storage_health_to(entries: Iterable[StorageEntry]) -> csi_pb2.NodeGetStorageHealthResponse:
    """Write the problems of a node's connection to the storage."""
    return csi_pb2.NodeGetStorageHealthResponse(
        backend_health=[
            csi_pb2.NodeGetStorageHealthResponse.StorageBackendHealth(
                status=entry.status.value, reason=entry.reason, message=cut(entry.message)
            )
            for entry in entries
        ]
    )
