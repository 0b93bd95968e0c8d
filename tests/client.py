# SPDX-License-Identifier: Apache-2.0
"""A client of a CSI endpoint with a typed method for each RPC that tests and benchmarks send."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path

from csi_driver.deadline import Deadline
from csi_driver.model import EMPTY, AccessMode, BlockAccess, Capability, ListedVolume, MountAccess, ProvisionedVolume
from csi_driver.rpc.client import CallFailed
from csi_driver.rpc.client import CsiClient as Connection
from csi_driver.rpc.pb import csi_pb2 as pb

FILESYSTEM = Capability(MountAccess(), AccessMode.SINGLE_NODE_WRITER)

_RETRY_PAUSE_S = 0.1
_PROBE_TIMEOUT_S = 5.0


class CsiClient(Connection):
    """Calls one CSI endpoint. A call that does not end with OK raises `CallFailed`."""

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
    ) -> ProvisionedVolume:
        """CreateVolume."""
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
        return _volume(self.call(self.controller.CreateVolume, request).volume)

    def delete_volume(self, volume_id: str) -> None:
        """DeleteVolume."""
        self.call(self.controller.DeleteVolume, pb.DeleteVolumeRequest(volume_id=volume_id))

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

    def modify_volume(self, volume_id: str, parameters: Mapping[str, str]) -> None:
        """ControllerModifyVolume."""
        request = pb.ControllerModifyVolumeRequest(volume_id=volume_id, mutable_parameters=dict(parameters))
        self.call(self.controller.ControllerModifyVolume, request)

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
