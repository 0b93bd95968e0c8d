"""The node's use-cases, put together over their ports."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Protocol

from csi_driver.deadline import Deadline
from csi_driver.errors import DriverError, NotAttached, OperationPending, StorageUnavailable
from csi_driver.model import ClusterNames
from csi_driver.node import NodePublishRequest, StageRequest
from csi_driver.node.concurrency import HeavyOperations
from csi_driver.node.encryption import EncryptedVolumes
from csi_driver.node.expand import Expand
from csi_driver.node.format import Preparation
from csi_driver.node.mount_owner import Ownership
from csi_driver.node.node_info import NodeIdentity, NodeZone
from csi_driver.node.ports import (
    Attachments,
    Devices,
    Encryption,
    Filesystems,
    Mounts,
    Paths,
    Probes,
    ReadOnlyDevices,
    Tools,
)
from csi_driver.node.publish import Publish, SharedReaders
from csi_driver.node.reconcile import Reconcile
from csi_driver.node.stage import Stage
from csi_driver.node.stats import NodeHealth, Statistics, VolumeCounts
from csi_driver.node.usage_records import RecordCleanup, UsageRecords
from csi_driver.settings import NodeSettings


@dataclass(frozen=True, slots=True)
class NodeUseCases:
    """One object per verb; all are safe to call from several threads, one call per volume at a time (see rpc)."""

    stage: Stage | AttachingStage
    publish: Publish | AttachingPublish
    expand: Expand
    statistics: Statistics
    identity: NodeIdentity
    reconcile: Reconcile
    health: NodeHealth
    census: VolumeCounts
    heavy: HeavyOperations
    records: RecordCleanup


def assemble(
    *,
    devices: Devices,
    encryption: Encryption,
    read_only_devices: ReadOnlyDevices,
    mounts: Mounts,
    filesystems: Filesystems,
    paths: Paths,
    probes: Probes,
    tools: Tools,
    settings: NodeSettings,
    records: UsageRecords | None = None,
    zone: NodeZone | None = None,
) -> NodeUseCases:
    """Build the use-cases over these ports. `records` and `zone` default to those of the settings."""
    records, heavy = records or UsageRecords(settings.state_directory), HeavyOperations(settings.heavy_operations)
    ownership = Ownership(devices=devices, encryption=encryption, mounts=mounts)
    preparation = Preparation(devices=devices, mounts=mounts, filesystems=filesystems, records=records, heavy=heavy)
    encrypted = EncryptedVolumes(devices=devices, encryption=encryption, mounts=mounts, filesystems=filesystems,
                                 records=records, heavy=heavy)  # fmt: skip
    joining = SharedReaders(mounts=mounts, filesystems=filesystems, paths=paths, ownership=ownership,
                      preparation=preparation, records=records)  # fmt: skip
    stage = Stage(devices=devices, read_only_devices=read_only_devices, mounts=mounts, filesystems=filesystems,
                  paths=paths, ownership=ownership, probes=probes, preparation=preparation, encrypted=encrypted,
                  joining=joining, settings=settings)  # fmt: skip
    publish = Publish(
        devices=devices, read_only_devices=read_only_devices, mounts=mounts, paths=paths, probes=probes,
        records=records, ownership=ownership, encrypted=encrypted, joining=joining
    )  # fmt: skip
    expand = Expand(
        read_only_devices=read_only_devices, mounts=mounts, filesystems=filesystems, paths=paths, probes=probes,
        heavy=heavy, ownership=ownership, encrypted=encrypted, settings=settings
    )  # fmt: skip
    statistics = Statistics(
        devices=devices, mounts=mounts, filesystems=filesystems, paths=paths, probes=probes, ownership=ownership,
        settings=settings
    )  # fmt: skip
    identity = NodeIdentity(devices=devices, tools=tools, zone=zone or _zone_given(settings), records=records,
                            settings=settings)  # fmt: skip
    reconcile = Reconcile(
        read_only_devices=read_only_devices, mounts=mounts, paths=paths, encrypted=encrypted, ownership=ownership,
        driver_name=settings.driver_name
    )  # fmt: skip
    health = NodeHealth(
        devices=devices, encryption=encryption, mounts=mounts, filesystems=filesystems, paths=paths, probes=probes,
        tools=tools, ownership=ownership, settings=settings
    )  # fmt: skip
    census = VolumeCounts(mounts, read_only_devices, ownership, driver_name=settings.driver_name)
    cleanup = RecordCleanup(records=records, devices=devices, mounts=mounts, ownership=ownership)
    return NodeUseCases(stage, publish, expand, statistics, identity, reconcile, health, census, heavy, cleanup)


def attaching_by_node(use_cases: NodeUseCases, attachments: Attachments) -> NodeUseCases:
    """Let the node attach for itself what it stages."""
    return replace(
        use_cases,
        stage=AttachingStage(use_cases.stage, attachments),
        publish=AttachingPublish(use_cases.publish, attachments),
    )


def _zone_given(settings: NodeSettings) -> NodeZone:
    return NodeZone(
        given=settings.zone,
        topology_key=settings.topology_key,
        node_name=settings.node_name,
        client_servers=tuple,
        clusters=ClusterNames,
    )


logger = logging.getLogger(__name__)


class Staging(Protocol):
    """What `stage.Stage` does."""

    def stage(self, request: StageRequest, *, deadline: Deadline) -> None: ...

    def unstage(self, volume_id: str, staging_target_path: str, *, deadline: Deadline) -> None: ...

    def is_staged(self, volume_id: str, staging_target_path: str) -> bool: ...


class Publishing(Protocol):
    """What `publish.Publish` does."""

    def publish(self, request: NodePublishRequest, *, deadline: Deadline) -> None: ...

    def unpublish(self, volume_id: str, target_path: str, *, deadline: Deadline) -> None: ...


class StillAttached(StorageUnavailable):
    """The volume is attached by this node and could not be staged; whoever gives it up for that must unstage it."""

    def __init__(self, reason: DriverError) -> None:
        super().__init__(f"{reason}; the volume stays attached to this node until it is unstaged here")


class AttachingStage:
    """Attaches before it stages, and detaches after it has unstaged.

    What fails in between is answered by an error after which kubelet unstages. After most others it takes the volume
    for not staged (pkg/volume/csi, csi_client.go `isFinalError`), and nobody would ever detach it. It is not detached
    here: what a retry may do goes by the attachment's number, such as to make a half-made filesystem again.
    """

    def __init__(self, stage: Staging, attachments: Attachments) -> None:
        self._stage = stage
        self._attachments = attachments

    def stage(self, request: StageRequest, *, deadline: Deadline) -> None:
        """Attach the volume and stage it. Raises what `Attachments.attach` raises, else `StorageUnavailable`."""
        context = self._attached(request, deadline=deadline)
        try:
            self._stage.stage(replace(request, publish_context=context), deadline=deadline)
        except (OperationPending, StorageUnavailable):
            raise
        except DriverError as error:
            raise StillAttached(error) from error

    def is_staged(self, volume_id: str, staging_target_path: str) -> bool:
        """Tell what `Stage.is_staged` tells."""
        return self._stage.is_staged(volume_id, staging_target_path)

    def _attached(self, request: StageRequest, *, deadline: Deadline) -> Mapping[str, str]:
        """Attach the volume, or find it attached. What is mounted already must not be met by a new attachment.

        It was taken from this node then, and another one may have written to it: what this kernel keeps of it in memory
        is of the time before, and is taken off first.
        """
        attach = self._attachments.attach
        volume_id, path = request.volume_id, request.staging_target_path
        if self._stage.is_staged(volume_id, path):
            try:
                return attach(volume_id, request.capability, request.volume_context, is_again=True, deadline=deadline)
            except NotAttached as lost:
                logger.warning("%s; that is done now", lost)
                self._stage.unstage(volume_id, path, deadline=deadline)
        return attach(volume_id, request.capability, request.volume_context, deadline=deadline)

    def unstage(self, volume_id: str, staging_target_path: str, *, deadline: Deadline) -> None:
        """Unstage the volume, then give it up: also what an earlier call, or an earlier driver, has left attached."""
        self._stage.unstage(volume_id, staging_target_path, deadline=deadline)
        self._attachments.detach(volume_id, deadline=deadline)


class AttachingPublish:
    """Publishes with the context of the attachment that is there."""

    def __init__(self, publish: Publishing, attachments: Attachments) -> None:
        self._publish = publish
        self._attachments = attachments

    def publish(self, request: NodePublishRequest, *, deadline: Deadline) -> None:
        """Publish the staged volume. Raises what `Publish.publish` raises, and `NotAttached`.

        It is never attached anew: what was staged belongs to the attachment that it was staged under.
        """
        context = self._attachments.attach(
            request.volume_id, request.capability, request.volume_context, is_again=True, deadline=deadline
        )
        self._publish.publish(replace(request, publish_context=context), deadline=deadline)

    def unpublish(self, volume_id: str, target_path: str, *, deadline: Deadline) -> None:
        """Take the volume off the target path; it stays attached until it is unstaged."""
        self._publish.unpublish(volume_id, target_path, deadline=deadline)
