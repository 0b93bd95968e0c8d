"""Readers that join: one volume that several PersistentVolumes name, read under more than one of them on one node.

Kubelet does not take a volume off its staging path while the same filesystem is mounted at any path that it does not
count as that volume's own (pkg/volume/util/operationexecutor `GenerateUnmountDeviceFunc`, pkg/volume/util
`HasMountRefs`). Two staging paths over one device would keep each other there for good, and the volume on the node. So
a reader whose volume is mounted on this node already is staged without a mount, and each of its publications mounts
the filesystem for itself; the kernel makes one filesystem of them all.
"""

from __future__ import annotations

from pathlib import Path

from csi_driver.deadline import Deadline
from csi_driver.host_model import Mount
from csi_driver.model import MountAccess
from csi_driver.node.marks import Marks
from csi_driver.node.ownership import NamedVolume, Ownership
from csi_driver.node.ports import Filesystems, Mounts, Paths
from csi_driver.node.prepare import Preparation, Task
from csi_driver.node.requests import NodePublishRequest
from csi_driver.parameters.mkfs import MkfsRequest
from csi_driver.parameters.mount_options import FS_TYPE, MountPlan, plan_mount
from csi_driver.publish_context import PublishContext


class Joining:
    """Knows which readers join, and mounts the filesystem for their publications. Only read-only attachments do."""

    def __init__(
        self,
        *,
        mounts: Mounts,
        filesystems: Filesystems,
        paths: Paths,
        ownership: Ownership,
        preparation: Preparation,
        marks: Marks,
    ) -> None:
        self._mounts = mounts
        self._filesystems = filesystems
        self._paths = paths
        self._ownership = ownership
        self._preparation = preparation
        self._marks = marks

    def joins(self, task: Task) -> bool:
        """Tell whether a volume that is to be staged joins what is mounted of it on this node."""
        if task.uuid is None or not _is_for_readers(task.context):
            return False
        mounts = self._mounts.of_device(task.device)
        return any(found.node_number is None and self._ownership.is_live(found, task.device) for found in mounts)

    def has_joined(self, volume: NamedVolume, context: PublishContext | None, staging: Path) -> bool:
        """Tell whether it was staged as one that joins, and others still have it mounted; no device is touched."""
        if not self.is_staged(volume, context, staging):
            return False
        mounts = (found for found in self._mounts.table() if found.node_number is None)
        return any(self._ownership.name_of(found) == volume.name for found in mounts)

    def is_staged(self, volume: NamedVolume, context: PublishContext | None, staging: Path) -> bool:
        """Tell whether it was staged under its present attachment as one that joins.

        Nothing is mounted there then: the proof is the directory, and the record of use that staging leaves.
        """
        mark = self._marks.read(volume.uuid) if volume.uuid is not None else None
        if context is None or not _is_for_readers(context) or mark is None or mark.uncounted:
            return False
        return mark.tells_use and mark.is_of(context.attachment) and self._paths.kind(staging) == "directory"

    def plan(self, access: MountAccess, request: NodePublishRequest) -> MountPlan:
        """Return how such a publication is mounted: as its staging was asked for. Raises `InvalidField`."""
        return plan_mount(
            access,
            request.capability.mode,
            read_only=True,
            mkfs=MkfsRequest(request.volume_context),
            supported=self._filesystems.supported(),
            fs_type_of_class=request.volume_context.get(FS_TYPE, ""),
        )

    def mount(self, task: Task, target: Path, *, deadline: Deadline) -> Mount | None:
        """Mount the filesystem at the target, read-only, and return what is mounted there then."""
        prepared = self._preparation.prepare(task, deadline=deadline)
        options = task.plan.options_for(prepared.fs_type)
        self._mounts.mount(task.device, target, prepared.fs_type, options, read_only=True)
        return self._mounts.at(target)


def _is_for_readers(context: PublishContext | None) -> bool:
    return context is not None and context.read_only and context.attachment > 0
