"""The node's use-cases, put together over their ports."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

from csi_driver.model import ClusterNames
from csi_driver.node.attaching import AttachingPublish, AttachingStage
from csi_driver.node.census import Census
from csi_driver.node.encryption import EncryptedVolumes
from csi_driver.node.expand import Expand
from csi_driver.node.health import NodeHealth
from csi_driver.node.identity import Identity
from csi_driver.node.joining import Joining
from csi_driver.node.limits import HeavyWork
from csi_driver.node.marks import MarkFiles, Marks, mark_directory
from csi_driver.node.ownership import Ownership
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
from csi_driver.node.prepare import Preparation
from csi_driver.node.publish import Publish
from csi_driver.node.reconcile import Reconcile
from csi_driver.node.record_cleanup import RecordCleanup
from csi_driver.node.requests import NodeSettings
from csi_driver.node.stage import Stage
from csi_driver.node.stats import Statistics
from csi_driver.node.zone import NodeZone


@dataclass(frozen=True, slots=True)
class NodeUseCases:
    """One object per verb; all are safe to call from several threads, one call per volume at a time (see rpc)."""

    stage: Stage | AttachingStage
    publish: Publish | AttachingPublish
    expand: Expand
    statistics: Statistics
    identity: Identity
    reconcile: Reconcile
    health: NodeHealth
    census: Census
    heavy: HeavyWork
    records: RecordCleanup


def mark_files(settings: NodeSettings) -> MarkFiles:
    """Return the marks as files under the settings' state directory."""
    return MarkFiles(mark_directory(Path(settings.state_directory)))


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
    marks: Marks | None = None,
    zone: NodeZone | None = None,
) -> NodeUseCases:
    """Build the use-cases over these ports. `marks` defaults to `mark_files`, `zone` to what the settings say."""
    kept, heavy = marks or mark_files(settings), HeavyWork(settings.heavy_operations)
    ownership = Ownership(devices=devices, encryption=encryption, mounts=mounts)
    preparation = Preparation(devices=devices, mounts=mounts, filesystems=filesystems, marks=kept, heavy=heavy)
    encrypted = EncryptedVolumes(devices=devices, encryption=encryption, mounts=mounts, filesystems=filesystems,
                                 marks=kept, heavy=heavy)  # fmt: skip
    joining = Joining(mounts=mounts, filesystems=filesystems, paths=paths, ownership=ownership,
                      preparation=preparation, marks=kept)  # fmt: skip
    stage = Stage(devices=devices, read_only_devices=read_only_devices, mounts=mounts, filesystems=filesystems,
                  paths=paths, ownership=ownership, probes=probes, preparation=preparation, encrypted=encrypted,
                  joining=joining, settings=settings)  # fmt: skip
    publish = Publish(
        devices=devices, read_only_devices=read_only_devices, mounts=mounts, paths=paths, probes=probes, marks=kept,
        ownership=ownership, encrypted=encrypted, joining=joining
    )  # fmt: skip
    expand = Expand(
        read_only_devices=read_only_devices, mounts=mounts, filesystems=filesystems, paths=paths, probes=probes,
        heavy=heavy, ownership=ownership, encrypted=encrypted, settings=settings
    )  # fmt: skip
    statistics = Statistics(
        devices=devices, mounts=mounts, filesystems=filesystems, paths=paths, probes=probes, ownership=ownership,
        settings=settings
    )  # fmt: skip
    identity = Identity(devices=devices, tools=tools, zone=zone or _zone_given(settings), marks=kept, settings=settings)
    reconcile = Reconcile(
        read_only_devices=read_only_devices, mounts=mounts, paths=paths, encrypted=encrypted, ownership=ownership,
        driver_name=settings.driver_name
    )  # fmt: skip
    health = NodeHealth(
        devices=devices, encryption=encryption, mounts=mounts, filesystems=filesystems, paths=paths, probes=probes,
        tools=tools, ownership=ownership, settings=settings
    )  # fmt: skip
    census = Census(mounts, read_only_devices, ownership, driver_name=settings.driver_name)
    records = RecordCleanup(marks=kept, devices=devices, mounts=mounts, ownership=ownership)
    return NodeUseCases(stage, publish, expand, statistics, identity, reconcile, health, census, heavy, records)


def attaching(use_cases: NodeUseCases, attachments: Attachments) -> NodeUseCases:
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
