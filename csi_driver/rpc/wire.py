# SPDX-License-Identifier: Apache-2.0
"""Translates checked CSI messages to the driver's types (`..._from`) and back (`..._to`)."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from typing import TYPE_CHECKING, TypeVar

from google.protobuf.timestamp_pb2 import Timestamp
from google.protobuf.wrappers_pb2 import Int64Value

from csi_driver import model
from csi_driver.errors import MissingField
from csi_driver.model import Capability
from csi_driver.node import NodeExpandRequest, NodePublishRequest, StageRequest
from csi_driver.rpc.pb import csi_pb2 as pb
from csi_driver.storage_model import SourceKind

if TYPE_CHECKING:
    from csi_driver.controller.ports import CreateRequest, PublishRequest, ValidateRequest

_STRING_LIMIT_BYTES = 128


def capability_from(message: pb.VolumeCapability) -> Capability:
    mode = model.AccessMode(pb.VolumeCapability.AccessMode.Mode.Name(message.access_mode.mode))
    if message.WhichOneof("access_type") == "block":
        return Capability(model.BlockAccess(), mode)
    mount = message.mount
    return Capability(model.MountAccess(mount.fs_type, tuple(mount.mount_flags), mount.volume_mount_group), mode)


def capabilities_from(messages: Iterable[pb.VolumeCapability]) -> tuple[Capability, ...]:
    return tuple(capability_from(message) for message in messages)


def optional_capability_from(
    request: pb.ControllerExpandVolumeRequest | pb.NodeExpandVolumeRequest,
) -> Capability | None:
    return capability_from(request.volume_capability) if request.HasField("volume_capability") else None


def range_from(message: pb.CapacityRange) -> model.CapacityRange:
    """Read a capacity range; unset and zero both mean "no limit"."""
    return model.CapacityRange(message.required_bytes, message.limit_bytes)


def _segments_from(messages: Iterable[pb.Topology]) -> tuple[model.Segments, ...]:
    return tuple(dict(message.segments) for message in messages)


def create_from(message: pb.CreateVolumeRequest) -> CreateRequest:
    from csi_driver.controller.ports import CreateRequest, TopologyRequirement  # not loaded by a node

    topology = None
    if message.HasField("accessibility_requirements"):
        wanted = message.accessibility_requirements
        topology = TopologyRequirement(_segments_from(wanted.requisite), _segments_from(wanted.preferred))
    return CreateRequest(
        name=message.name,
        capacity=range_from(message.capacity_range),
        capabilities=capabilities_from(message.volume_capabilities),
        parameters=dict(message.parameters),
        secrets=dict(message.secrets),
        topology=topology,
        mutable_parameters=dict(message.mutable_parameters),
        source=_source_from(message),
    )


def _source_from(message: pb.CreateVolumeRequest) -> model.RequestedSource | None:
    if not message.HasField("volume_content_source"):
        return None
    source = message.volume_content_source
    match source.WhichOneof("type"):
        case "snapshot":
            kind, field_name, source_id = SourceKind.SNAPSHOT, "snapshot.snapshot_id", source.snapshot.snapshot_id
        case "volume":
            kind, field_name, source_id = SourceKind.VOLUME, "volume.volume_id", source.volume.volume_id
        case _:
            raise MissingField("volume_content_source.snapshot or volume_content_source.volume")
    if not source_id:
        raise MissingField(f"volume_content_source.{field_name}")
    return model.RequestedSource(kind, source_id)


def publish_from(message: pb.ControllerPublishVolumeRequest) -> PublishRequest:
    from csi_driver.controller.ports import PublishRequest

    return PublishRequest(
        volume_id=message.volume_id,
        node_id=message.node_id,
        capability=capability_from(message.volume_capability),
        read_only=message.readonly,
        context=dict(message.volume_context),
    )


def validate_from(message: pb.ValidateVolumeCapabilitiesRequest) -> ValidateRequest:
    from csi_driver.controller.ports import ValidateRequest

    return ValidateRequest(
        volume_id=message.volume_id,
        capabilities=capabilities_from(message.volume_capabilities),
        context=dict(message.volume_context),
        parameters=dict(message.parameters),
        mutable_parameters=dict(message.mutable_parameters),
    )


def topology_to(segments: Mapping[str, str]) -> pb.Topology:
    return pb.Topology(segments=dict(segments))


def volume_to(volume: model.ProvisionedVolume) -> pb.Volume:
    return pb.Volume(
        capacity_bytes=volume.capacity_bytes,
        volume_id=volume.volume_id,
        volume_context=dict(volume.context),
        accessible_topology=[topology_to(segments) for segments in volume.topology],
        content_source=_source_to(volume.source) if volume.source is not None else None,
    )


def _source_to(source: model.RequestedSource) -> pb.VolumeContentSource:
    kinds = pb.VolumeContentSource
    if source.kind is SourceKind.SNAPSHOT:
        return kinds(snapshot=kinds.SnapshotSource(snapshot_id=source.id))
    return kinds(volume=kinds.VolumeSource(volume_id=source.id))


@dataclass(slots=True)
class VolumeList:
    """A response of ListVolumes that is filled entry by entry.

    Thousands of volumes share a few contexts and topologies: a copied message costs a seventh of a new one.
    """

    response: pb.ListVolumesResponse = field(default_factory=pb.ListVolumesResponse)
    _models: dict[object, pb.ListVolumesResponse.Entry] = field(default_factory=dict)
    _topology: tuple[model.Segments, ...] = ()
    """That of the models."""

    def add(self, listed: model.ListedVolume) -> int:
        """Add an entry and return its bytes."""
        volume = listed.volume
        if volume.topology is not self._topology:
            self._topology = volume.topology
            self._models.clear()
        context = tuple(volume.context.items())
        entry = self._models.get(context)
        if entry is None:
            status = pb.ListVolumesResponse.VolumeStatus()
            shared = volume_to(volume._replace(source=None))
            entry = self._models[context] = pb.ListVolumesResponse.Entry(volume=shared, status=status)
        message = entry.volume
        message.volume_id, message.capacity_bytes = volume.volume_id, volume.capacity_bytes
        self.response.entries.append(entry)  # a copy
        if not listed.published_node_ids and volume.source is None:
            return entry.ByteSize()
        added = self.response.entries[-1]
        if volume.source is not None:
            added.volume.content_source.CopyFrom(_source_to(volume.source))
        added.status.published_node_ids.extend(listed.published_node_ids)
        return added.ByteSize()


def get_to(listed: model.ListedVolume) -> pb.ControllerGetVolumeResponse:
    status = pb.ControllerGetVolumeResponse.VolumeStatus(published_node_ids=listed.published_node_ids)
    return pb.ControllerGetVolumeResponse(volume=volume_to(listed.volume), status=status)


def capacity_to(capacity: model.Capacity) -> pb.GetCapacityResponse:
    """Write free space; a limit that is not known stays unset."""
    largest, smallest = capacity.maximum_volume_bytes, capacity.minimum_volume_bytes
    return pb.GetCapacityResponse(
        available_capacity=capacity.available_bytes,
        maximum_volume_size=None if largest is None else Int64Value(value=largest),
        minimum_volume_size=None if smallest is None else Int64Value(value=smallest),
    )


def validated_to(
    message: pb.ValidateVolumeCapabilitiesRequest, objection: str | None
) -> pb.ValidateVolumeCapabilitiesResponse:
    """Confirm everything that was asked, or write the objection."""
    if objection is not None:
        return pb.ValidateVolumeCapabilitiesResponse(message=cut(objection))
    return pb.ValidateVolumeCapabilitiesResponse(
        confirmed=pb.ValidateVolumeCapabilitiesResponse.Confirmed(
            volume_context=dict(message.volume_context),
            volume_capabilities=message.volume_capabilities,
            parameters=dict(message.parameters),
            mutable_parameters=dict(message.mutable_parameters),
        )
    )


def snapshot_to(snapshot: model.CutSnapshot) -> pb.Snapshot:
    return pb.Snapshot(
        size_bytes=snapshot.size_bytes,
        snapshot_id=snapshot.snapshot_id,
        source_volume_id=snapshot.source_volume_id,
        creation_time=_timestamp(snapshot.created),
        ready_to_use=True,
        group_snapshot_id=snapshot.group_snapshot_id,
    )


def group_to(group: model.CutGroup) -> pb.VolumeGroupSnapshot:
    return pb.VolumeGroupSnapshot(
        group_snapshot_id=group.group_snapshot_id,
        snapshots=[snapshot_to(each) for each in group.snapshots],
        creation_time=_timestamp(group.created),
        ready_to_use=True,
    )


def _timestamp(moment: datetime) -> Timestamp:
    stamp = Timestamp()
    stamp.FromDatetime(moment)
    return stamp


def cut(text: str) -> str:
    """Shorten text to the 128 bytes that a CSI string may have."""
    encoded = text.encode("utf-8", "backslashreplace")
    if len(encoded) <= _STRING_LIMIT_BYTES:
        return encoded.decode()
    return encoded[: _STRING_LIMIT_BYTES - 3].decode("utf-8", "ignore") + "..."


def stage_from(message: pb.NodeStageVolumeRequest) -> StageRequest:
    return StageRequest(
        volume_id=message.volume_id,
        staging_target_path=message.staging_target_path,
        capability=capability_from(message.volume_capability),
        publish_context=dict(message.publish_context),
        volume_context=dict(message.volume_context),
        secrets=dict(message.secrets),
    )


def node_publish_from(message: pb.NodePublishVolumeRequest) -> NodePublishRequest:
    return NodePublishRequest(
        volume_id=message.volume_id,
        staging_target_path=message.staging_target_path,
        target_path=message.target_path,
        capability=capability_from(message.volume_capability),
        read_only=message.readonly,
        publish_context=dict(message.publish_context),
        volume_context=dict(message.volume_context),
    )


def node_expand_from(message: pb.NodeExpandVolumeRequest) -> NodeExpandRequest:
    return NodeExpandRequest(
        volume_id=message.volume_id,
        volume_path=message.volume_path,
        capacity=range_from(message.capacity_range),
        staging_target_path=message.staging_target_path,
        capability=optional_capability_from(message),
        secrets=dict(message.secrets),
    )


def usage_to(usage: model.Usage) -> pb.NodeGetVolumeStatsResponse:
    """Write the usage of a volume: bytes, and inodes where the filesystem counts them."""
    unit, total, used, available = pb.VolumeUsage.BYTES, usage.total_bytes, usage.used_bytes, usage.available_bytes
    measures = [pb.VolumeUsage(unit=unit, total=total, used=used or 0, available=available or 0)]
    if usage.total_inodes is not None:
        unit, used, available = pb.VolumeUsage.INODES, usage.used_inodes, usage.available_inodes
        measures.append(pb.VolumeUsage(unit=unit, total=usage.total_inodes, used=used or 0, available=available or 0))
    return pb.NodeGetVolumeStatsResponse(usage=measures)


def volume_health_to(health: model.VolumeHealth) -> pb.VolumeHealth:
    entry = pb.VolumeHealth.VolumeHealthEntry
    return pb.VolumeHealth(
        volume_id=health.volume_id,
        health_statuses=[
            entry(status=each.status.value, reason=each.reason, message=cut(each.message)) for each in health.entries
        ],
    )


def storage_health_to(entries: Iterable[model.StorageEntry]) -> pb.NodeGetStorageHealthResponse:
    entry = pb.NodeGetStorageHealthResponse.StorageBackendHealth
    return pb.NodeGetStorageHealthResponse(
        backend_health=[
            entry(status=each.status.value, reason=each.reason, message=cut(each.message)) for each in entries
        ]
    )


Metadata = TypeVar("Metadata", pb.GetMetadataAllocatedResponse, pb.GetMetadataDeltaResponse)


def ranges_to(kind: type[Metadata], size_bytes: int, pages: Iterable[Sequence[tuple[int, int]]]) -> Iterator[Metadata]:
    """Return the messages of a stream of ranges: one at least, which tells the size."""
    shape = pb.BlockMetadataType.VARIABLE_LENGTH
    is_empty = True
    for page in pages:
        is_empty = False
        blocks = [pb.BlockMetadata(byte_offset=offset, size_bytes=length) for offset, length in page]
        yield kind(block_metadata_type=shape, volume_capacity_bytes=size_bytes, block_metadata=blocks)
    if is_empty:
        yield kind(block_metadata_type=shape, volume_capacity_bytes=size_bytes)
