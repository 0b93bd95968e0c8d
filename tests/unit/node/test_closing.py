# SPDX-License-Identifier: Apache-2.0
"""NodeUnstageVolume answers OK when the device is closed: an unmount leaves the mount table before it has ended."""

from __future__ import annotations

import pytest

from csi_driver.errors import StorageUnavailable
from csi_driver.host_model import VolumeStatus
from csi_driver.publish_context import Encryption
from tests.fakes.node import BLOCK, NAME, STAGING, TARGET, UUID, FakeNode, publish_context


@pytest.mark.parametrize("access", ["mount", "block"])
def test_a_volume_whose_device_is_still_open_is_not_unstaged(node: FakeNode, access: str) -> None:
    disk = node.host.attach(NAME, UUID)
    if access == "mount":
        node.stage()
    else:
        node.stage(access=BLOCK)
    disk.opened_by_others = 1
    for _ in range(2):
        with pytest.raises(StorageUnavailable, match=f"/dev/nvmesh/{NAME} is still open"):
            node.unstage()
        assert node.host.mounts_at(STAGING) == 0
    disk.opened_by_others = 0
    node.unstage()


def test_a_mount_that_left_the_table_and_is_still_written_back_is_waited_for(node: FakeNode) -> None:
    disk = node.host.attach(NAME, UUID)
    node.stage()
    node.host.table.clear()
    disk.opened_by_others = 1
    with pytest.raises(StorageUnavailable, match="the kernel is writing back data"):
        node.unstage()


def test_a_program_that_looks_at_the_device_for_a_moment_is_waited_for(
    node: FakeNode, monkeypatch: pytest.MonkeyPatch
) -> None:
    disk = node.host.attach(NAME, UUID)
    node.stage()
    disk.opened_by_others = 1
    monkeypatch.setattr(node.clock, "sleep", lambda seconds: setattr(disk, "opened_by_others", 0))
    node.unstage()


def test_another_mount_of_the_volume_keeps_its_device_open_and_unstage_from_nothing(node: FakeNode) -> None:
    node.host.attach(NAME, UUID)
    node.stage()
    node.publish()
    node.unstage()
    assert (node.host.mounts_at(STAGING), node.host.mounts_at(TARGET)) == (0, 1)


def test_a_dead_mount_of_the_volume_is_no_reason_for_its_device_to_be_open(node: FakeNode) -> None:
    disk = node.host.attach(NAME, UUID)
    node.stage()
    node.publish()
    node.host.detach(NAME)
    node.host.attach(NAME, UUID, like=disk, number=disk.number).opened_by_others = 1
    with pytest.raises(StorageUnavailable, match="is still open"):
        node.unstage()
    assert (node.host.mounts_at(STAGING), node.host.mounts_at(TARGET)) == (0, 1)


def test_a_raw_reader_does_not_block_the_unstage_of_another_handle(
    node: FakeNode,
) -> None:
    """Its publication is of a read-only device of its own, which has the volume's open."""
    disk = node.host.attach(NAME, UUID)
    node.stage(access=BLOCK)
    node.publish(access=BLOCK, read_only=True)
    disk.opened_by_others = 1
    node.unstage()
    node.host.table.clear()
    with pytest.raises(StorageUnavailable, match="is still open"):
        node.unstage()


def test_a_raw_reader_keeps_an_encrypted_volume_open_and_blocks_no_unstage(node: FakeNode) -> None:
    node.host.attach(NAME, UUID)
    context = publish_context(encryption=Encryption.LUKS)
    node.stage(access=BLOCK, context=context, secrets={"passphrase": "correct horse"})
    node.publish(access=BLOCK, read_only=True, context=context)
    node.unstage()
    assert list(node.host.mappers) == [NAME]
    node.unpublish()
    node.unstage()
    assert node.host.mappers == {}


def test_a_volume_that_was_taken_from_this_node_need_not_be_closed(node: FakeNode) -> None:
    disk = node.host.attach(NAME, UUID)
    node.stage()
    disk.status = VolumeStatus(NAME, UUID, disk.size_bytes, io_enabled=False, details="cut off")
    disk.references, disk.opened_by_others = (), 1
    node.unstage()
    assert node.host.mounts_at(STAGING) == 0


def test_a_volume_that_was_taken_only_for_a_moment_must_be_closed(
    node: FakeNode, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The client writes its files one after the other: a loss must be seen twice."""
    disk = node.host.attach(NAME, UUID)
    node.stage()
    held = disk.status, disk.references
    disk.status = VolumeStatus(NAME, UUID, disk.size_bytes, io_enabled=False, details="cut off")
    disk.references, disk.opened_by_others = (), 1
    sleep = node.clock.sleep

    def passes(seconds: float) -> None:
        sleep(seconds)
        disk.status, disk.references = held

    monkeypatch.setattr(node.clock, "sleep", passes)
    with pytest.raises(StorageUnavailable, match="is still open"):
        node.unstage()


def test_a_volume_that_is_not_attached_is_unstaged_at_once(node: FakeNode) -> None:
    node.unstage()
