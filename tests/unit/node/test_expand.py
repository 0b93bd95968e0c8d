# SPDX-License-Identifier: Apache-2.0
"""NodeExpandVolume on a machine in memory."""

from __future__ import annotations

import pytest

from csi_driver.errors import CapacityOutOfRange, DeadlineReached, NotFound, PreconditionFailed
from csi_driver.model import Capability, MountAccess
from tests.fakes.disks import MIB, FakeDisk
from tests.fakes.node import BLOCK, NAME, OTHER_UUID, READER, STAGING, TARGET, UUID, WRITER, FakeNode

LARGE = 128 * MIB


def published(node: FakeNode, fs_type: str = "ext4") -> FakeDisk:
    disk = node.host.attach(NAME, UUID)
    node.stage(access=MountAccess(fs_type))
    node.publish(access=MountAccess(fs_type))
    return disk


def filesystem_bytes(disk: FakeDisk) -> int:
    assert disk.filesystem is not None
    return disk.filesystem.size_bytes


@pytest.mark.parametrize("fs_type", ["ext4", "xfs", "btrfs"])
@pytest.mark.parametrize("path", [TARGET, STAGING])
def test_a_mounted_filesystem_grows_to_its_device(node: FakeNode, fs_type: str, path: str) -> None:
    disk = published(node, fs_type)
    disk.size_bytes = LARGE
    assert (node.expand(path, required_bytes=LARGE), filesystem_bytes(disk)) == (LARGE, LARGE)


def test_growing_again_answers_the_real_size(node: FakeNode) -> None:
    published(node).size_bytes = LARGE
    assert [node.expand(required_bytes=65 * MIB) for _ in range(2)] == [LARGE, LARGE]


def test_without_a_capacity_range_the_filesystem_takes_the_whole_device(node: FakeNode) -> None:
    disk = published(node)
    disk.size_bytes = LARGE
    node.expand()
    assert filesystem_bytes(disk) == LARGE


def test_a_device_that_does_not_grow_is_awaited_for_seconds_only(node: FakeNode) -> None:
    """kubelet asks so for a PersistentVolume that claims more than there is; until the answer no pod ends."""
    published(node)
    with pytest.raises(DeadlineReached, match="has 67108864 bytes"):
        node.expand(required_bytes=LARGE, seconds=120)
    assert 10 < node.clock.now_s < 30


def test_a_device_that_has_not_grown_is_awaited_within_the_deadline(node: FakeNode) -> None:
    published(node)
    with pytest.raises(DeadlineReached, match="has 67108864 bytes"):
        node.expand(required_bytes=LARGE, seconds=10)
    assert 9 < node.clock.now_s < 10


def test_a_device_that_grows_late_is_grown_into(node: FakeNode) -> None:
    disk = published(node)
    asleep = node.clock.sleep

    def sleep_and_grow(seconds: float) -> None:
        asleep(seconds)
        disk.size_bytes = LARGE if node.clock.now_s > 5 else disk.size_bytes

    node.clock.sleep = sleep_and_grow  # type: ignore[method-assign]
    assert node.expand(required_bytes=LARGE) == LARGE


def test_a_device_larger_than_the_limit_is_out_of_range(node: FakeNode) -> None:
    published(node).size_bytes = LARGE
    with pytest.raises(CapacityOutOfRange):
        node.expand(required_bytes=64 * MIB, limit_bytes=100 * MIB)


def test_ext4_that_may_not_grow_mounted_says_so(node: FakeNode) -> None:
    published(node).size_bytes = LARGE
    node.host.can_grow_mounted_ext4 = False
    with pytest.raises(PreconditionFailed, match="CAP_SYS_RESOURCE"):
        node.expand(required_bytes=LARGE)


def test_what_a_filesystem_leaves_at_the_end_of_its_device_is_no_reason_to_grow(node: FakeNode) -> None:
    published(node).size_bytes = 70 * MIB
    node.host.can_grow_mounted_ext4 = False
    assert node.expand(required_bytes=70 * MIB) == 70 * MIB


def test_a_read_only_publication_grows_through_the_staging_mount(node: FakeNode) -> None:
    disk = node.host.attach(NAME, UUID)
    node.stage()
    node.publish(read_only=True)
    disk.size_bytes = LARGE
    node.expand(required_bytes=LARGE)
    assert filesystem_bytes(disk) == LARGE


def test_a_volume_staged_read_only_does_not_grow(node: FakeNode) -> None:
    disk = published(node)
    node.unpublish()
    node.unstage()
    node.stage(mode=READER)
    disk.size_bytes = LARGE
    with pytest.raises(PreconditionFailed, match="read-only"):
        node.expand(STAGING, required_bytes=LARGE)


@pytest.mark.parametrize("read_only", [False, True])
def test_a_block_volume_only_reports_its_size(node: FakeNode, read_only: bool) -> None:
    disk = node.host.attach(NAME, UUID)
    node.stage(access=BLOCK)
    node.publish(access=BLOCK, read_only=read_only)
    disk.size_bytes = LARGE
    assert node.expand(required_bytes=LARGE) == LARGE
    assert node.usage().total_bytes == LARGE


def test_a_block_volume_that_is_only_staged_reports_its_size(node: FakeNode) -> None:
    node.host.attach(NAME, UUID, LARGE)
    node.stage(access=BLOCK)
    assert node.expand(STAGING, capability=Capability(BLOCK, WRITER)) == LARGE


@pytest.mark.parametrize("path", ["some/path", "/var/lib/kubelet/nowhere", "/etc", "/var/lib/kubelet/../../x"])
def test_a_path_without_the_volume_is_not_found(node: FakeNode, path: str) -> None:
    published(node)
    with pytest.raises(NotFound):
        node.expand(path)


@pytest.mark.parametrize("volume_id", ["no/such", "fake-vol", f"z:{NAME}:{OTHER_UUID}"])
def test_another_volume_is_not_found_at_the_path(node: FakeNode, volume_id: str) -> None:
    published(node)
    with pytest.raises(NotFound):
        node.expand(volume_id=volume_id)


def test_a_dead_mount_of_a_device_that_came_back_is_not_grown(node: FakeNode) -> None:
    published(node)
    node.host.attach(NAME, UUID, like=node.host.detach(NAME))
    with pytest.raises(PreconditionFailed, match="gone"):
        node.expand()


@pytest.mark.parametrize("read_only", [False, True])
def test_a_dead_block_publication_of_a_device_that_came_back_is_not_called_grown(
    node: FakeNode, read_only: bool
) -> None:
    node.host.attach(NAME, UUID)
    node.stage(access=BLOCK)
    node.publish(access=BLOCK, read_only=read_only)
    node.host.attach(NAME, UUID, like=node.host.detach(NAME))
    with pytest.raises(PreconditionFailed, match="unstage it and stage it again"):
        node.expand()
