# SPDX-License-Identifier: Apache-2.0
"""A device that went away under its mounts, and another one with its number."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from csi_driver.errors import PreconditionFailed, StorageUnavailable
from csi_driver.host_model import Device, DeviceNumber, Mount
from csi_driver.model import AccessMode
from tests.fakes.disks import FakeDisk
from tests.fakes.node import (
    BLOCK,
    KUBELET,
    NAME,
    OTHER_TARGET,
    OTHER_UUID,
    STAGING,
    TARGET,
    UUID,
    VOLUME_ID,
    FakeNode,
    publish_context,
)

OTHER = "csi-2"
OTHER_ID = f"single-zone-cluster:{OTHER}:{OTHER_UUID}"
OTHER_STAGING = KUBELET / "plugins/other/globalmount"
OTHER_CONTEXT = publish_context(name=OTHER, uuid=OTHER_UUID)
DEVICE = Device(NAME, Path("/dev/nvmesh") / NAME, DeviceNumber(240, 1), 1 << 20, False, UUID)
MOUNTED = Mount(STAGING, DEVICE.number, "ext4", str(DEVICE.path), "/", False, frozenset())


@pytest.fixture
def reused(node: FakeNode) -> FakeDisk:
    """A volume that went away while it was staged and published, and another one with its device's number."""
    disk = node.host.attach(NAME, UUID)
    node.stage()
    node.publish()
    node.host.write_file(TARGET, "a", b"of the first")
    node.host.detach(NAME)
    node.host.make_tree(OTHER_STAGING)
    return node.host.attach(OTHER, OTHER_UUID, number=disk.number)


def stage_other(node: FakeNode) -> None:
    node.stage(volume_id=OTHER_ID, staging=OTHER_STAGING, context=OTHER_CONTEXT)


def publish_other(node: FakeNode) -> None:
    node.publish(OTHER_TARGET, volume_id=OTHER_ID, staging=OTHER_STAGING, context=OTHER_CONTEXT)


@pytest.mark.parametrize(
    ("mounted", "can_be"),
    [
        (MOUNTED, True),
        (replace(MOUNTED, source="/dev/disk/by-id/another-name-of-it"), True),
        (replace(MOUNTED, source="/dev/nvmesh/csi-2"), False),
        (replace(MOUNTED, number=DeviceNumber(240, 2)), False),
        (replace(MOUNTED, number=DeviceNumber(0, 5), node_number=DEVICE.number, root="/nvmesh/csi-1"), True),
        (replace(MOUNTED, number=DeviceNumber(0, 5), node_number=DEVICE.number, root="/nvmesh/csi-1//deleted"), True),
        (replace(MOUNTED, number=DeviceNumber(0, 5), node_number=DEVICE.number, root="/loop7"), True),
        (replace(MOUNTED, number=DeviceNumber(0, 5), node_number=DEVICE.number, root="/nvmesh/csi-2"), False),
        (replace(MOUNTED, number=DeviceNumber(0, 5), node_number=DeviceNumber(240, 2), root="/nvmesh/csi-1"), False),
    ],
)
def test_a_mount_is_of_a_device_by_number_and_by_what_it_was_made_from(mounted: Mount, can_be: bool) -> None:
    assert mounted.can_be_of(DEVICE) is can_be


def test_orphaned_mounts_do_not_block_the_format_of_the_next_volume_of_the_number(
    node: FakeNode, reused: FakeDisk
) -> None:
    """The kernel keeps it from its mount until they are gone."""
    with pytest.raises(PreconditionFailed, match="had the number 240:1 before"):
        stage_other(node)
    assert node.host.formats == [UUID, OTHER_UUID]
    node.unpublish()
    node.unstage()
    stage_other(node)
    publish_other(node)
    assert node.host.formats == [UUID, OTHER_UUID]
    assert node.host.files_at(OTHER_TARGET) == {}


def test_what_was_left_behind_is_taken_off_and_the_next_volume_of_the_number_is_not(
    node: FakeNode, reused: FakeDisk
) -> None:
    staged = node.host.table
    node.host.table = []
    stage_other(node)
    publish_other(node)
    node.host.table = [*staged, *node.host.table]
    for entry in node.host.table:
        entry.in_use = True
    node.unpublish()
    node.unstage()
    left = {entry.path for entry in node.host.table}
    assert left == {OTHER_STAGING, OTHER_TARGET}


def test_a_left_over_mount_is_not_unmounted_as_the_next_volume_of_its_number(node: FakeNode) -> None:
    disk = node.host.attach(NAME, UUID)
    node.stage()
    node.host.make_tree(OTHER_STAGING)
    node.host.mounts.bind(STAGING, OTHER_STAGING, read_only=False)
    node.host.detach(NAME)
    node.host.attach(OTHER, OTHER_UUID, number=disk.number)
    node.unstage(OTHER_ID, OTHER_STAGING)
    assert node.host.mounts_at(OTHER_STAGING) == 1
    with pytest.raises(PreconditionFailed, match="got ext4 of /dev/nvmesh/csi-1"):
        stage_other(node)


def test_a_left_over_mount_has_no_statistics(node: FakeNode, reused: FakeDisk) -> None:
    with pytest.raises(StorageUnavailable, match="gone"):
        node.use.statistics.usage(VOLUME_ID, str(TARGET), "", deadline=node.soon())


def test_a_node_left_behind_is_no_publication_of_the_next_volume_of_the_number(node: FakeNode) -> None:
    disk, single = node.host.attach(NAME, UUID), AccessMode.SINGLE_NODE_SINGLE_WRITER
    node.stage(access=BLOCK)
    node.publish(access=BLOCK)
    node.host.detach(NAME)
    node.host.make_tree(OTHER_STAGING)
    node.host.attach(OTHER, OTHER_UUID, number=disk.number)
    node.stage(volume_id=OTHER_ID, staging=OTHER_STAGING, access=BLOCK, mode=single, context=OTHER_CONTEXT)
    node.publish(
        OTHER_TARGET, volume_id=OTHER_ID, staging=OTHER_STAGING, access=BLOCK, mode=single, context=OTHER_CONTEXT
    )
    assert node.host.mounts_at(OTHER_TARGET) == 1


def test_the_same_volume_that_is_back_under_its_number_is_staged_again(node: FakeNode) -> None:
    """All that tells them apart: a mount that is alive claims its device."""
    disk = node.host.attach(NAME, UUID)
    node.stage()
    node.host.write_file(STAGING, "a", b"precious")
    node.host.detach(NAME)
    back = node.host.attach(NAME, UUID, like=disk, number=disk.number)
    with pytest.raises(PreconditionFailed, match="got ext4"):
        node.publish()
    node.stage()
    assert [entry.disk for entry in node.host.table] == [back]
    node.publish()
    assert node.host.files_at(TARGET) == {"a": b"precious"}


def test_a_mount_left_behind_says_nothing_of_the_content_of_the_volume_that_is_back(node: FakeNode) -> None:
    disk = node.host.attach(NAME, UUID)
    node.stage()
    node.publish()
    node.host.mounts.unmount(STAGING)
    node.host.detach(NAME)
    node.host.attach(NAME, UUID, like=disk, number=disk.number).signature = "a partition table (gpt)"
    with pytest.raises(PreconditionFailed, match="gpt"):
        node.stage()
