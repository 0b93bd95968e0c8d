# SPDX-License-Identifier: Apache-2.0
"""A client of a CSI endpoint with a typed method for each RPC that tests and benchmarks send."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import grpc

from csi_driver.deadline import Deadline
from csi_driver.model import EMPTY, AccessMode, BlockAccess, Capability, ListedVolume, MountAccess, ProvisionedVolume
from csi_driver.rpc.client import CallFailed
from csi_driver.rpc.client import CsiClient as Connection
from csi_driver.rpc.pb import csi_pb2 as pb
from csi_driver.rpc.pb import csi_pb2_grpc as stubs

FILESYSTEM = Capability(MountAccess(), AccessMode.SINGLE_NODE_WRITER)

_RETRY_PAUSE_S = 0.1
_PROBE_TIMEOUT_S = 5.0


class CsiClient(Connection):
    """Calls one CSI endpoint. A call that does not end with OK raises `CallFailed`."""

    def allocated(self, snapshot_id: str) -> list[tuple[int, int]]:
        """GetMetadataAllocated: offset and length of all data."""
        request = pb.GetMetadataAllocatedRequest(snapshot_id=snapshot_id)
        return self._ranges(stubs.SnapshotMetadataStub(self._channel).GetMetadataAllocated, request)

    def changed(self, base_id: str, target_id: str) -> list[tuple[int, int]]:
        """GetMetadataDelta: offset and length of all changes."""
        request = pb.GetMetadataDeltaRequest(base_snapshot_id=base_id, target_snapshot_id=target_id)
        return self._ranges(stubs.SnapshotMetadataStub(self._channel).GetMetadataDelta, request)

    def _ranges(self, method: Any, request: object) -> list[tuple[int, int]]:
        try:
            answers = method(request, timeout=self.timeout_s)
            return [(each.byte_offset, each.size_bytes) for answer in answers for each in answer.block_metadata]
        except grpc.RpcError as error:
            raise CallFailed(type(request).__name__, error.code().name, error.details() or "") from error

    @property
    def groups(self) -> stubs.GroupControllerStub:
        return stubs.GroupControllerStub(self._channel)

    def wait_ready(self, deadline: Deadline, *, give_up: Callable[[], bool] = lambda: False) -> str | None:
        """Probe until the endpoint is ready: None; or, once time is up or `give_up()`, the last reason why not."""
        while True:
            try:
                if self.is_ready(timeout_s=min(_PROBE_TIMEOUT_S, max(deadline.remaining_s(), _RETRY_PAUSE_S))):
                    return None
                reason = "Probe answers ready=false"
            except CallFailed as error:
                reason = str(error)
            if deadline.expired() or give_up():
                return reason
            deadline.clock.sleep(min(_RETRY_PAUSE_S, deadline.remaining_s()))

    def create_volume(
        self,
        name: str,
        *,
        required_bytes: int = 0,
        limit_bytes: int = 0,
        capabilities: Sequence[Capability] = (FILESYSTEM,),
        parameters: Mapping[str, str] = EMPTY,
        secrets: Mapping[str, str] = EMPTY,
        requisite: Sequence[Mapping[str, str]] = (),
        snapshot: str = "",
        source: str = "",
    ) -> ProvisionedVolume:
        """CreateVolume; from a snapshot or another volume, by their ids."""
        request = pb.CreateVolumeRequest(
            name=name,
            volume_capabilities=[capability_message(each) for each in capabilities],
            parameters=dict(parameters),
            secrets=dict(secrets),
        )
        if required_bytes or limit_bytes:
            request.capacity_range.CopyFrom(_range(required_bytes, limit_bytes))
        for segments in requisite:
            request.accessibility_requirements.requisite.add(segments=dict(segments))
        if snapshot:
            request.volume_content_source.snapshot.snapshot_id = snapshot
        elif source:
            request.volume_content_source.volume.volume_id = source
        return _volume(self.call(self.controller.CreateVolume, request).volume)

    def delete_volume(self, volume_id: str) -> None:
        """DeleteVolume."""
        self.call(self.controller.DeleteVolume, pb.DeleteVolumeRequest(volume_id=volume_id))

    def cut(self, name: str, volume_id: str) -> pb.Snapshot:
        """CreateSnapshot."""
        request = pb.CreateSnapshotRequest(name=name, source_volume_id=volume_id)
        return self.call(self.controller.CreateSnapshot, request).snapshot

    def delete_snapshot(self, snapshot_id: str) -> None:
        """DeleteSnapshot."""
        self.call(self.controller.DeleteSnapshot, pb.DeleteSnapshotRequest(snapshot_id=snapshot_id))

    def snapshots(self, *, page: int = 0) -> Iterator[pb.Snapshot]:
        """ListSnapshots to the end, `page` entries at a time (0: as many as the server gives)."""
        token = ""
        while True:
            request = pb.ListSnapshotsRequest(max_entries=page, starting_token=token)
            answer = self.call(self.controller.ListSnapshots, request)
            yield from (entry.snapshot for entry in answer.entries)
            token = answer.next_token
            if not token:
                return

    def cut_group(self, name: str, volume_ids: Sequence[str]) -> pb.VolumeGroupSnapshot:
        """CreateVolumeGroupSnapshot."""
        request = pb.CreateVolumeGroupSnapshotRequest(name=name, source_volume_ids=volume_ids)
        return self.call(self.groups.CreateVolumeGroupSnapshot, request).group_snapshot

    def delete_group(self, group: pb.VolumeGroupSnapshot) -> None:
        """DeleteVolumeGroupSnapshot."""
        request = pb.DeleteVolumeGroupSnapshotRequest(
            group_snapshot_id=group.group_snapshot_id, snapshot_ids=[each.snapshot_id for each in group.snapshots]
        )
        self.call(self.groups.DeleteVolumeGroupSnapshot, request)

    def attach(
        self,
        volume_id: str,
        node_id: str,
        capability: Capability = FILESYSTEM,
        *,
        read_only: bool = False,
        volume_context: Mapping[str, str] = EMPTY,
    ) -> dict[str, str]:
        """ControllerPublishVolume; returns the publish context."""
        request = pb.ControllerPublishVolumeRequest(
            volume_id=volume_id,
            node_id=node_id,
            volume_capability=capability_message(capability),
            readonly=read_only,
            volume_context=dict(volume_context),
        )
        return dict(self.call(self.controller.ControllerPublishVolume, request).publish_context)

    def detach(self, volume_id: str, node_id: str = "") -> None:
        """ControllerUnpublishVolume; without a node id, from every node."""
        request = pb.ControllerUnpublishVolumeRequest(volume_id=volume_id, node_id=node_id)
        self.call(self.controller.ControllerUnpublishVolume, request)

    def expand_volume(
        self, volume_id: str, required_bytes: int, *, limit_bytes: int = 0, capability: Capability | None = None
    ) -> tuple[int, bool]:
        """ControllerExpandVolume; returns the new capacity and whether the node has work to do."""
        request = pb.ControllerExpandVolumeRequest(
            volume_id=volume_id, capacity_range=_range(required_bytes, limit_bytes)
        )
        if capability is not None:
            request.volume_capability.CopyFrom(capability_message(capability))
        answer = self.call(self.controller.ControllerExpandVolume, request)
        return answer.capacity_bytes, answer.node_expansion_required

    def volumes(self, *, page: int = 0) -> Iterator[ListedVolume]:
        """ListVolumes to the end, `page` entries at a time (0: as many as the server gives)."""
        token = ""
        while True:
            request = pb.ListVolumesRequest(max_entries=page, starting_token=token)
            answer = self.call(self.controller.ListVolumes, request)
            yield from (_listed(entry.volume, entry.status.published_node_ids) for entry in answer.entries)
            token = answer.next_token
            if not token:
                return

    def get_volume(self, volume_id: str) -> ListedVolume:
        """ControllerGetVolume."""
        answer = self.call(self.controller.ControllerGetVolume, pb.ControllerGetVolumeRequest(volume_id=volume_id))
        return _listed(answer.volume, answer.status.published_node_ids)

    def free_bytes(self, parameters: Mapping[str, str] = EMPTY) -> int:
        """GetCapacity."""
        request = pb.GetCapacityRequest(parameters=dict(parameters))
        return self.call(self.controller.GetCapacity, request).available_capacity

    def stage(
        self,
        volume_id: str,
        staging: Path,
        capability: Capability = FILESYSTEM,
        *,
        publish_context: Mapping[str, str] = EMPTY,
        volume_context: Mapping[str, str] = EMPTY,
        secrets: Mapping[str, str] = EMPTY,
    ) -> None:
        """NodeStageVolume."""
        request = pb.NodeStageVolumeRequest(
            volume_id=volume_id,
            staging_target_path=str(staging),
            volume_capability=capability_message(capability),
            publish_context=dict(publish_context),
            volume_context=dict(volume_context),
            secrets=dict(secrets),
        )
        self.call(self.node.NodeStageVolume, request)

    def unstage(self, volume_id: str, staging: Path) -> None:
        """NodeUnstageVolume."""
        request = pb.NodeUnstageVolumeRequest(volume_id=volume_id, staging_target_path=str(staging))
        self.call(self.node.NodeUnstageVolume, request)

    def publish(
        self,
        volume_id: str,
        staging: Path,
        target: Path,
        capability: Capability = FILESYSTEM,
        *,
        read_only: bool = False,
        publish_context: Mapping[str, str] = EMPTY,
        volume_context: Mapping[str, str] = EMPTY,
    ) -> None:
        """NodePublishVolume."""
        request = pb.NodePublishVolumeRequest(
            volume_id=volume_id,
            staging_target_path=str(staging),
            target_path=str(target),
            volume_capability=capability_message(capability),
            readonly=read_only,
            publish_context=dict(publish_context),
            volume_context=dict(volume_context),
        )
        self.call(self.node.NodePublishVolume, request)

    def unpublish(self, volume_id: str, target: Path) -> None:
        """NodeUnpublishVolume."""
        request = pb.NodeUnpublishVolumeRequest(volume_id=volume_id, target_path=str(target))
        self.call(self.node.NodeUnpublishVolume, request)

    def expand_on_node(
        self, volume_id: str, path: Path, *, required_bytes: int = 0, staging: Path | None = None
    ) -> int:
        """NodeExpandVolume; returns the capacity that it reports."""
        request = pb.NodeExpandVolumeRequest(
            volume_id=volume_id, volume_path=str(path), staging_target_path="" if staging is None else str(staging)
        )
        if required_bytes:
            request.capacity_range.CopyFrom(_range(required_bytes, 0))
        return self.call(self.node.NodeExpandVolume, request).capacity_bytes

    def stats(self, volume_id: str, path: Path) -> dict[str, pb.VolumeUsage]:
        """NodeGetVolumeStats, by unit: BYTES and INODES."""
        request = pb.NodeGetVolumeStatsRequest(volume_id=volume_id, volume_path=str(path))
        answer = self.call(self.node.NodeGetVolumeStats, request)
        return {pb.VolumeUsage.Unit.Name(each.unit): each for each in answer.usage}


def capability_message(capability: Capability) -> pb.VolumeCapability:
    """Write a capability as CSI carries it."""
    mode = pb.VolumeCapability.AccessMode(mode=capability.mode.value)
    match capability.access:
        case MountAccess(fs_type, mount_flags, mount_group):
            mount = pb.VolumeCapability.MountVolume(
                fs_type=fs_type, mount_flags=list(mount_flags), volume_mount_group=mount_group
            )
            return pb.VolumeCapability(mount=mount, access_mode=mode)
        case BlockAccess():
            return pb.VolumeCapability(block=pb.VolumeCapability.BlockVolume(), access_mode=mode)


def _volume(volume: pb.Volume) -> ProvisionedVolume:
    topology = tuple(dict(each.segments) for each in volume.accessible_topology)
    return ProvisionedVolume(volume.volume_id, volume.capacity_bytes, dict(volume.volume_context), topology)


def _listed(volume: pb.Volume, node_ids: Iterable[str]) -> ListedVolume:
    return ListedVolume(_volume(volume), tuple(node_ids))


def _range(required_bytes: int, limit_bytes: int) -> pb.CapacityRange:
    return pb.CapacityRange(required_bytes=required_bytes, limit_bytes=limit_bytes)
