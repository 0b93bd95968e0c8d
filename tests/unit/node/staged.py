# SPDX-License-Identifier: Apache-2.0
"""Contexts and filesystems for the tests of NodeStageVolume."""

from __future__ import annotations

from csi_driver.model import MountAccess
from csi_driver.node.usage_records import USED, UsageRecord
from csi_driver.publish_context import History
from tests.fakes.disks import MIB, FakeFilesystem
from tests.fakes.node import (
    KUBELET,
    NAME,
    UUID,
    FakeNode,
    publish_context,
)

STAGING_2 = KUBELET / "plugins/staging2/globalmount"
READ_ONLY_CONTEXT = publish_context(read_only=True, history=History.ATTACHED, attachment=2)
XFS = MountAccess("xfs")
IN_USE = {UUID: UsageRecord(UUID, 1, USED)}


def formatted(node: FakeNode, fs_type: str = "ext4", size_bytes: int = 64 * MIB) -> FakeFilesystem:
    """Attach the volume with a filesystem that holds a file."""
    disk = node.host.attach(NAME, UUID, size_bytes)
    disk.filesystem = FakeFilesystem(fs_type, size_bytes, files={"a": b"precious"})
    disk.was_used = True
    return disk.filesystem
