# SPDX-License-Identifier: Apache-2.0
"""One volume under several handles on one node, as readers of several namespaces have it."""

from __future__ import annotations

from pathlib import Path

import pytest

from csi_driver.errors import PreconditionFailed
from csi_driver.host_model import Fault, FaultKind
from csi_driver.node.usage_records import USED, UsageRecord
from csi_driver.publish_context import History
from tests.fakes.disks import FakeFilesystem
from tests.fakes.node import (
    KUBELET,
    NAME,
    OTHER_TARGET,
    READER,
    STAGING,
    TARGET,
    UUID,
    VOLUME_ID,
    FakeNode,
    publish_context,
)

FIRST, SECOND, THIRD = (f"{VOLUME_ID}:team-{letter}" for letter in "abc")
STAGING_2 = KUBELET / "plugins/staging2/globalmount"
STAGING_3 = KUBELET / "plugins/staging3/globalmount"
CONTEXT = publish_context(read_only=True, history=History.ATTACHED, attachment=2)
DATA = {"a": b"precious"}


@pytest.fixture
def readers(node: FakeNode) -> FakeNode:
    """A node where the volume, which holds data, is staged for readers under two handles."""
    disk = node.host.attach(NAME, UUID)
    disk.filesystem = FakeFilesystem("ext4", disk.size_bytes, files=dict(DATA))
    for path in (STAGING_2, STAGING_3):
        node.host.make_tree(path)
    join(node, FIRST, STAGING)
    join(node, SECOND, STAGING_2)
    return node


def join(node: FakeNode, handle: str, staging: Path) -> None:
    node.stage(volume_id=handle, staging=staging, mode=READER, context=CONTEXT)


def publish(node: FakeNode, handle: str, staging: Path, target: Path) -> None:
    node.publish(target, volume_id=handle, staging=staging, mode=READER, read_only=True, context=CONTEXT)


def held_for_good(node: FakeNode) -> list[Path]:
    """Return the staging paths that kubelet would never unmount: the filesystem has another one."""
    device = node.host.disks[NAME].as_device()
    staged = {found.path for found in node.host.mounts.of_device(device) if found.path.name == "globalmount"}
    return sorted(staged) if len(staged) > 1 else []


def test_no_two_staging_paths_of_one_volume_keep_each_other_on_the_node(readers: FakeNode) -> None:
    join(readers, THIRD, STAGING_3)
    assert held_for_good(readers) == []
    assert readers.host.files_at(STAGING) == DATA


def test_a_reader_that_joins_has_the_data_at_its_target_and_cannot_write(readers: FakeNode) -> None:
    publish(readers, SECOND, STAGING_2, TARGET)
    assert readers.host.files_at(TARGET) == DATA
    mounted = readers.host.mounts.at(TARGET)
    assert mounted is not None
    assert mounted.read_only


def test_calls_that_are_repeated_change_nothing(readers: FakeNode) -> None:
    for _ in range(3):
        join(readers, SECOND, STAGING_2)
        publish(readers, SECOND, STAGING_2, TARGET)
        readers.restart()
    assert readers.host.mounts_at(TARGET) == 1
    assert readers.host.mounts_at(STAGING_2) == 0


def test_a_reader_joins_in_a_filesystem_whose_root_is_a_subvolume(readers: FakeNode) -> None:
    filesystem = readers.host.disks[NAME].filesystem
    assert filesystem is not None
    filesystem.root = "/@/snapshot"
    for _ in range(2):
        publish(readers, SECOND, STAGING_2, TARGET)
    assert readers.host.mounts_at(TARGET) == 1


def test_the_first_reader_leaves_without_the_second(readers: FakeNode) -> None:
    publish(readers, FIRST, STAGING, OTHER_TARGET)
    publish(readers, SECOND, STAGING_2, TARGET)
    readers.unpublish(OTHER_TARGET, FIRST)
    readers.unstage(FIRST, STAGING)
    assert readers.host.files_at(TARGET) == DATA
    readers.unpublish(TARGET, SECOND)
    readers.unstage(SECOND, STAGING_2)
    assert not readers.host.is_mounted(readers.host.disks[NAME])


def test_a_reader_that_joined_publishes_although_the_first_has_left(readers: FakeNode) -> None:
    readers.unstage(FIRST, STAGING)
    publish(readers, SECOND, STAGING_2, TARGET)
    assert readers.host.files_at(TARGET) == DATA


def test_one_that_comes_back_alone_is_staged_with_a_mount(readers: FakeNode) -> None:
    readers.unstage(FIRST, STAGING)
    join(readers, SECOND, STAGING_2)
    assert readers.host.files_at(STAGING_2) == DATA


def test_what_was_not_staged_is_not_published(node: FakeNode) -> None:
    disk = node.host.attach(NAME, UUID)
    disk.filesystem = FakeFilesystem("ext4", disk.size_bytes, files=dict(DATA))
    with pytest.raises(PreconditionFailed, match="not staged"):
        publish(node, SECOND, STAGING, TARGET)
    assert node.host.mounts_at(TARGET) == 0


def test_what_was_staged_under_an_earlier_attachment_is_not_published(readers: FakeNode) -> None:
    later = publish_context(read_only=True, history=History.ATTACHED, attachment=3)
    with pytest.raises(PreconditionFailed, match="under its attachment 2, and this"):
        readers.publish(TARGET, volume_id=SECOND, staging=STAGING_2, mode=READER, read_only=True, context=later)


def test_a_staging_path_that_is_no_directory_is_no_proof(readers: FakeNode) -> None:
    readers.host.paths.remove(STAGING_2)
    with pytest.raises(PreconditionFailed, match="not staged"):
        publish(readers, SECOND, STAGING_2, TARGET)


@pytest.mark.parametrize("mark", [UsageRecord(UUID, 2, "ext4"), UsageRecord(UUID, 2, USED, uncounted=True)])
def test_no_other_record_than_that_of_this_use_is_proof(readers: FakeNode, mark: UsageRecord) -> None:
    readers.records.kept[UUID] = mark
    with pytest.raises(PreconditionFailed, match="not staged"):
        publish(readers, SECOND, STAGING_2, TARGET)


def test_a_shared_reader_of_a_shut_down_filesystem_gets_no_mount(readers: FakeNode) -> None:
    number = readers.host.disks[NAME].number
    readers.host.wrong_filesystems[number] = [Fault(FaultKind.SHUT_DOWN, "its ext4 was shut down")]
    with pytest.raises(PreconditionFailed, match="its ext4 was shut down"):
        publish(readers, SECOND, STAGING_2, TARGET)
    assert readers.host.mounts_at(TARGET) == 0
