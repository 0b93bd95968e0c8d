# SPDX-License-Identifier: Apache-2.0
"""The node's use cases over their ports, and attaching by the node itself (--attach-by node)."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass, replace

from csi_driver.deadline import Deadline
from csi_driver.errors import DriverError, NotAttached, OperationPending, StorageUnavailable
from csi_driver.node import NodePublishRequest, StageRequest, ports
from csi_driver.node.concurrency import HeavyOperations
from csi_driver.node.encryption import EncryptedVolumes
from csi_driver.node.expand import Expand
from csi_driver.node.format import Preparation
from csi_driver.node.mount_owner import Ownership
from csi_driver.node.node_info import NodeIdentity, NodeZone
from csi_driver.node.publish import Publish, SharedReaders
from csi_driver.node.reconcile import Reconcile
from csi_driver.node.stage import Stage
from csi_driver.node.stats import NodeHealth, VolumeCounts, VolumeStatistics
from csi_driver.node.usage_records import RecordCleanup, UsageRecords
from csi_driver.node_settings import NodeSettings
from csi_driver.reporting import SILENT, Reporter

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class NodeUseCases:
    """The node's use cases, for several threads, one call per volume at a time."""

    stage: Stage | AttachByNode
    publish: Publish | AttachByNode
    expand: Expand
    statistics: VolumeStatistics
    identity: NodeIdentity
    reconcile: Reconcile
    health: NodeHealth
    volume_counts: VolumeCounts
    heavy: HeavyOperations
    record_cleanup: RecordCleanup


def assemble(
    *,
    devices: ports.Devices,
    encryption: ports.Encryption,
    read_only_devices: ports.ReadOnlyDevices,
    mounts: ports.Mounts,
    filesystems: ports.Filesystems,
    paths: ports.Paths,
    probes: ports.Probes,
    tools: ports.Tools,
    settings: NodeSettings,
    records: UsageRecords | None = None,
    zone: NodeZone | None = None,
    reporter: Reporter = SILENT,
) -> NodeUseCases:
    """Build the use cases. `records` and `zone` default to those of the settings."""
    records, heavy = records or UsageRecords(settings.state_directory), HeavyOperations(settings.heavy_operations)
    ownership = Ownership(devices=devices, encryption=encryption, mounts=mounts, reporter=reporter)
    preparation = Preparation(devices=devices, mounts=mounts, filesystems=filesystems, records=records, heavy=heavy)
    encrypted = EncryptedVolumes(devices=devices, encryption=encryption, mounts=mounts, filesystems=filesystems,
                                 records=records, heavy=heavy, preparation=preparation)  # fmt: skip
    readers = SharedReaders(mounts=mounts, filesystems=filesystems, paths=paths, ownership=ownership,
                            preparation=preparation, records=records)  # fmt: skip
    return NodeUseCases(
        stage=Stage(devices=devices, read_only_devices=read_only_devices, mounts=mounts, filesystems=filesystems,
                    paths=paths, probes=probes, ownership=ownership, preparation=preparation, encrypted=encrypted,
                    shared_readers=readers, settings=settings, reporter=reporter),
        publish=Publish(devices=devices, read_only_devices=read_only_devices, mounts=mounts, paths=paths,
                        probes=probes, records=records, ownership=ownership, preparation=preparation,
                        encrypted=encrypted, shared_readers=readers, reporter=reporter),
        expand=Expand(read_only_devices=read_only_devices, mounts=mounts, filesystems=filesystems, paths=paths,
                      probes=probes, heavy=heavy, ownership=ownership, preparation=preparation, encrypted=encrypted,
                      settings=settings, reporter=reporter),
        statistics=VolumeStatistics(devices=devices, mounts=mounts, filesystems=filesystems, paths=paths,
                                    probes=probes, ownership=ownership, settings=settings),
        identity=NodeIdentity(devices=devices, tools=tools, records=records, settings=settings,
                              zone=zone or NodeZone(given=settings.zone, topology_key=settings.topology_key,
                                                    node_name=settings.node_name)),
        reconcile=Reconcile(read_only_devices=read_only_devices, mounts=mounts, paths=paths, encrypted=encrypted,
                            ownership=ownership, driver_name=settings.driver_name, reporter=reporter),
        health=NodeHealth(devices=devices, encryption=encryption, mounts=mounts, filesystems=filesystems, paths=paths,
                          probes=probes, tools=tools, ownership=ownership, settings=settings),
        volume_counts=VolumeCounts(mounts=mounts, read_only_devices=read_only_devices, ownership=ownership,
                                   driver_name=settings.driver_name),
        heavy=heavy,
        record_cleanup=RecordCleanup(records=records, devices=devices, mounts=mounts, ownership=ownership),
    )  # fmt: skip


def attaching_by_node(use_cases: NodeUseCases, attachments: ports.Attachments) -> NodeUseCases:
    """Return the use cases of a node that attaches its volumes itself."""
    attaching = AttachByNode(use_cases.stage, use_cases.publish, attachments)
    return replace(use_cases, stage=attaching, publish=attaching)


@dataclass(frozen=True, slots=True)
class AttachByNode:
    """Attaches a volume before it is staged, and detaches it after it was unstaged.

    An error in between is answered so that kubelet unstages: after most errors it takes the volume for not staged
    (pkg/volume/csi, csi_client.go `isFinalError`), and would never detach it. The volume is not detached here, as a
    retry depends on the number of the attachment, for example to repeat an unfinished format.
    """

    inner_stage: Stage | AttachByNode
    inner_publish: Publish | AttachByNode
    attachments: ports.Attachments

    def stage(self, request: StageRequest, *, deadline: Deadline) -> None:
        """Attach and stage the volume; a mount of an earlier attachment is unstaged first."""
        volume_id, path = request.volume_id, request.staging_target_path
        was_staged = self.inner_stage.is_staged(volume_id, path)
        try:
            context = self._attach(request, is_again=was_staged, deadline=deadline)
        except NotAttached as lost:
            if not was_staged:
                raise
            logger.warning("%s; it is unstaged now", lost)
            self.inner_stage.unstage(volume_id, path, deadline=deadline)
            context = self._attach(request, is_again=False, deadline=deadline)
        try:
            self.inner_stage.stage(replace(request, publish_context=context), deadline=deadline)
        except (OperationPending, StorageUnavailable):
            raise
        except DriverError as error:
            message = f"{error}; the volume stays attached to this node until it is unstaged here"
            raise StorageUnavailable(message) from error

    def unstage(self, volume_id: str, staging_target_path: str, *, deadline: Deadline) -> None:
        """Unstage the volume, then detach it, also if an earlier call or driver attached it."""
        self.inner_stage.unstage(volume_id, staging_target_path, deadline=deadline)
        self.attachments.detach(volume_id, deadline=deadline)

    def is_staged(self, volume_id: str, staging_target_path: str) -> bool:
        return self.inner_stage.is_staged(volume_id, staging_target_path)

    def publish(self, request: NodePublishRequest, *, deadline: Deadline) -> None:
        """Publish the staged volume. Raises `NotAttached` if it is not attached any more."""
        context = self._attach(request, is_again=True, deadline=deadline)
        self.inner_publish.publish(replace(request, publish_context=context), deadline=deadline)

    def unpublish(self, volume_id: str, target_path: str, *, deadline: Deadline) -> None:
        """Unpublish the volume; it stays attached until it is unstaged."""
        self.inner_publish.unpublish(volume_id, target_path, deadline=deadline)

    def _attach(
        self, request: StageRequest | NodePublishRequest, *, is_again: bool, deadline: Deadline
    ) -> Mapping[str, str]:
        volume_id, context = request.volume_id, request.volume_context
        return self.attachments.attach(volume_id, request.capability, context, is_again=is_again, deadline=deadline)
