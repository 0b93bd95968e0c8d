# SPDX-License-Identifier: Apache-2.0
"""NodePublishVolume and NodeUnpublishVolume on a machine in memory."""

from __future__ import annotations

import pytest

from csi_driver.errors import (
    HostFailure,
    Incompatible,
    InvalidField,
    InvalidRequest,
    PreconditionFailed,
    VolumeNotFound,
)
from csi_driver.model import AccessMode, BlockAccess, MountAccess
from csi_driver.node.mount_owner import NodeVolume
from csi_driver.node.publish import read_only_device
from csi_driver.publish_context import History
from tests.fakes.disks import FakeFilesystem
from tests.fakes.node import (
    BLOCK,
    KUBELET,
    NAME,
    OTHER_TARGET,
    OTHER_UUID,
    READER,
    STAGING,
    TARGET,
    UUID,
    VOLUME_ID,
    FakeNode,
    publish_context,
)

SINGLE = AccessMode.SINGLE_NODE_SINGLE_WRITER
OTHER_ID = f"z:csi-2:{OTHER_UUID}"
OTHER_CONTEXT = publish_context(name="csi-2", uuid=OTHER_UUID)
OTHER_STAGING = KUBELET / "plugins/staging2/globalmount"


@pytest.fixture
def staged(node: FakeNode) -> FakeNode:
    """The volume staged as ext4."""
    node.host.attach(NAME, UUID)
    node.stage()
    return node


@pytest.fixture
def block(node: FakeNode) -> FakeNode:
    """The volume staged as a block device."""
    node.host.attach(NAME, UUID)
    node.stage(access=BLOCK)
    return node


def publish_other(node: FakeNode) -> None:
    """Publish another volume at the same target."""
    node.host.attach("csi-2", OTHER_UUID)
    node.host.make_tree(OTHER_STAGING)
    node.stage(volume_id=OTHER_ID, staging=OTHER_STAGING, context=OTHER_CONTEXT)
    node.publish(volume_id=OTHER_ID, staging=OTHER_STAGING, context=OTHER_CONTEXT)


# --- filesystem ---


def test_a_staged_filesystem_is_seen_at_the_target(staged: FakeNode) -> None:
    staged.publish()
    staged.host.write_file(TARGET, "a", b"x")
    assert staged.host.files_at(STAGING) == {"a": b"x"}


def test_publishing_again_leaves_exactly_one_mount(staged: FakeNode) -> None:
    for _ in range(3):
        staged.publish()
        staged.restart()
    assert staged.host.mounts_at(TARGET) == 1


def test_a_staging_path_replaced_during_a_publish_is_not_published(staged: FakeNode) -> None:
    staged.host.attach("csi-2", OTHER_UUID)
    staged.host.make_tree(OTHER_STAGING)
    staged.stage(volume_id=OTHER_ID, staging=OTHER_STAGING, context=OTHER_CONTEXT)

    def exchange(point: str) -> None:
        if point == "before create":
            for entry in staged.host.table:
                entry.path = {STAGING: OTHER_STAGING, OTHER_STAGING: STAGING}[entry.path]

    staged.host.step = exchange
    with pytest.raises(PreconditionFailed, match="changed while"):
        staged.publish()
    assert staged.host.mounts_at(TARGET) == 0


def test_publishing_without_a_staging_path_is_refused(staged: FakeNode) -> None:
    with pytest.raises(PreconditionFailed, match="staging_target_path"):
        staged.publish(staging="")


def test_an_unknown_volume_outranks_a_missing_staging_path(node: FakeNode) -> None:
    with pytest.raises(VolumeNotFound):
        node.publish(volume_id="no/such", staging="")


def test_publishing_what_is_not_staged_is_refused(node: FakeNode) -> None:
    node.host.attach(NAME, UUID)
    with pytest.raises(PreconditionFailed, match="not staged"):
        node.publish()


def test_publishing_what_is_not_attached_is_refused(node: FakeNode) -> None:
    with pytest.raises(PreconditionFailed, match="not attached"):
        node.publish()


def test_publishing_from_the_staging_of_another_volume_is_refused(staged: FakeNode) -> None:
    staged.host.attach("csi-2", OTHER_UUID)
    with pytest.raises(PreconditionFailed, match=NAME):
        staged.publish(volume_id=OTHER_ID, context=OTHER_CONTEXT)


def test_publishing_from_the_staging_of_a_dead_device_is_refused(staged: FakeNode) -> None:
    staged.host.attach(NAME, UUID, like=staged.host.detach(NAME))
    with pytest.raises(PreconditionFailed, match="gone"):
        staged.publish()


def test_publishing_another_volume_of_the_same_name_is_refused(node: FakeNode) -> None:
    node.host.attach(NAME, OTHER_UUID)
    with pytest.raises(PreconditionFailed, match="claims"):
        node.publish()


def test_another_filesystem_than_staged_is_refused(staged: FakeNode) -> None:
    with pytest.raises(PreconditionFailed, match="expected xfs, got ext4"):
        staged.publish(access=MountAccess("xfs"))


def test_a_read_only_publication_refuses_writes(staged: FakeNode) -> None:
    staged.publish(read_only=True)
    with pytest.raises(HostFailure):
        staged.host.write_file(TARGET, "a", b"x")


def test_writing_what_is_staged_read_only_is_refused(node: FakeNode) -> None:
    node.host.attach(NAME, UUID).filesystem = FakeFilesystem("ext4", 1)
    node.stage(mode=READER)
    with pytest.raises(PreconditionFailed, match="got a read-only mount"):
        node.publish()


@pytest.mark.parametrize(("first", "second"), [(False, True), (True, False)])
def test_published_there_with_another_access_is_incompatible(staged: FakeNode, first: bool, second: bool) -> None:
    staged.publish(read_only=first)
    with pytest.raises(Incompatible, match="access"):
        staged.publish(read_only=second)


def test_a_target_that_holds_another_volume_is_refused(staged: FakeNode) -> None:
    publish_other(staged)
    with pytest.raises(PreconditionFailed, match="csi-2"):
        staged.publish()


@pytest.mark.parametrize("mode", [AccessMode.SINGLE_NODE_WRITER, AccessMode.SINGLE_NODE_MULTI_WRITER])
def test_several_pods_of_a_node_share_the_volume(staged: FakeNode, mode: AccessMode) -> None:
    staged.publish(mode=mode)
    staged.publish(OTHER_TARGET, mode=mode)
    assert staged.host.mounts_at(OTHER_TARGET) == 1


def test_a_single_writer_has_one_target(staged: FakeNode) -> None:
    staged.publish(mode=SINGLE)
    staged.publish(mode=SINGLE)
    with pytest.raises(PreconditionFailed, match=str(TARGET)):
        staged.publish(OTHER_TARGET, mode=SINGLE)


def test_a_single_writer_may_move_to_another_target(staged: FakeNode) -> None:
    staged.publish(mode=SINGLE)
    staged.unpublish()
    staged.publish(OTHER_TARGET, mode=SINGLE)
    assert staged.host.mounts_at(OTHER_TARGET) == 1


def test_an_empty_file_at_the_target_gives_way_to_a_directory(staged: FakeNode) -> None:
    staged.host.tree[TARGET] = "file"
    staged.publish()
    assert staged.host.tree[TARGET] == "directory"


def test_a_group_for_the_files_is_refused_at_publishing_too(staged: FakeNode) -> None:
    with pytest.raises(InvalidRequest, match="volume_mount_group"):
        staged.publish(access=MountAccess("ext4", (), "2000"))


def test_a_dangerous_flag_is_refused_at_publishing_too(staged: FakeNode) -> None:
    with pytest.raises(InvalidRequest, match="remount"):
        staged.publish(access=MountAccess("ext4", ("remount",)))


@pytest.mark.parametrize("path", ["relative", "/etc/x", "/var/lib/kubelet/a/../../../../etc"])
def test_a_target_outside_the_roots_is_refused(staged: FakeNode, path: str) -> None:
    with pytest.raises(InvalidField, match="target_path"):
        staged.publish(path)


# --- block ---


def test_a_block_volume_is_written_at_its_target(block: FakeNode) -> None:
    block.publish(access=BLOCK)
    block.publish(access=BLOCK)
    block.host.write_raw(TARGET, 0, b"x")
    assert (block.host.disks[NAME].raw, block.host.mounts_at(TARGET)) == ({0: b"x"}, 1)


@pytest.mark.parametrize("mode", [AccessMode.SINGLE_NODE_WRITER, READER])
def test_a_read_only_block_publication_refuses_writes_in_fact(block: FakeNode, mode: AccessMode) -> None:
    block.publish(access=BLOCK, read_only=mode is not READER, mode=mode)
    with pytest.raises(HostFailure):
        block.host.write_raw(TARGET, 0, b"x")


def test_a_reader_leaves_the_writer_beside_it_alone(block: FakeNode) -> None:
    block.publish(access=BLOCK)
    block.publish(OTHER_TARGET, access=BLOCK, read_only=True)
    block.host.write_raw(TARGET, 0, b"x")
    assert block.host.disks[NAME].raw == {0: b"x"}


def test_publishing_a_reader_again_makes_no_second_device(block: FakeNode) -> None:
    for _ in range(3):
        block.publish(access=BLOCK, read_only=True)
    assert (len(block.host.readers), block.host.mounts_at(TARGET)) == (1, 1)


def test_a_device_that_refuses_writes_needs_no_other_for_readers(node: FakeNode) -> None:
    context = publish_context(read_only=True, history=History.ATTACHED)
    node.host.attach(NAME, UUID)
    node.stage(access=BLOCK, mode=READER, context=context)
    node.publish(access=BLOCK, mode=READER, context=context)
    node.publish(access=BLOCK, mode=READER, context=context)
    assert (node.host.readers, node.host.mounts_at(TARGET)) == ([], 1)


@pytest.mark.parametrize(("first", "second"), [(False, True), (True, False)])
def test_a_block_target_with_another_access_is_incompatible(block: FakeNode, first: bool, second: bool) -> None:
    block.publish(access=BLOCK, read_only=first)
    with pytest.raises(Incompatible):
        block.publish(access=BLOCK, read_only=second)
    assert len(block.host.readers) == int(first)


def test_a_filesystem_where_a_block_volume_is_published_is_refused(staged: FakeNode) -> None:
    staged.publish()
    with pytest.raises(PreconditionFailed, match="expected no mount"):
        staged.publish(access=BLOCK)


def test_a_block_volume_that_is_not_staged_is_refused(node: FakeNode) -> None:
    node.host.attach(NAME, UUID)
    with pytest.raises(PreconditionFailed, match="not staged"):
        node.publish(access=BLOCK, staging=KUBELET / "elsewhere")


def test_a_single_writer_of_a_block_volume_has_one_target(block: FakeNode) -> None:
    block.publish(access=BLOCK, mode=SINGLE)
    with pytest.raises(PreconditionFailed, match=str(TARGET)):
        block.publish(OTHER_TARGET, access=BLOCK, mode=SINGLE)


def test_several_writers_share_a_block_volume(block: FakeNode) -> None:
    block.publish(access=BLOCK, mode=AccessMode.MULTI_NODE_MULTI_WRITER)
    block.publish(OTHER_TARGET, access=BLOCK, mode=AccessMode.MULTI_NODE_MULTI_WRITER)
    assert block.host.mounts_at(OTHER_TARGET) == 1


def test_a_block_target_that_holds_another_volume_is_refused(block: FakeNode) -> None:
    publish_other(block)
    with pytest.raises(PreconditionFailed, match="csi-2"):
        block.publish(access=BLOCK)


# --- unpublish ---


def test_unpublish_removes_the_target_and_may_be_repeated(staged: FakeNode) -> None:
    staged.publish()
    staged.unpublish()
    staged.unpublish()
    assert (staged.host.mounts_at(TARGET), TARGET in staged.host.tree, staged.host.mounts_at(STAGING)) == (0, False, 1)


@pytest.mark.parametrize("read_only", [False, True])
def test_unpublish_of_a_block_volume_leaves_no_file_and_no_reader(block: FakeNode, read_only: bool) -> None:
    block.publish(access=BLOCK, read_only=read_only)
    block.unpublish()
    assert (block.host.table, TARGET in block.host.tree, block.host.readers) == ([], False, [])


def test_unpublish_of_one_reader_leaves_the_other(block: FakeNode) -> None:
    block.publish(access=BLOCK, read_only=True)
    block.publish(OTHER_TARGET, access=BLOCK, read_only=True)
    block.unpublish()
    assert (len(block.host.readers), block.host.mounts_at(OTHER_TARGET)) == (1, 1)


def test_unpublish_of_another_volume_at_the_same_target_touches_nothing(staged: FakeNode) -> None:
    publish_other(staged)
    staged.unpublish()
    assert staged.host.mounts_at(TARGET) == 1


def test_unpublish_of_another_block_volume_at_the_same_target_touches_nothing(block: FakeNode) -> None:
    block.publish(access=BLOCK)
    block.unpublish(volume_id=OTHER_ID)
    block.unpublish(volume_id="csi-2")
    assert block.host.mounts_at(TARGET) == 1


@pytest.mark.parametrize("read_only", [False, True])
def test_a_dead_block_device_is_unpublished(block: FakeNode, read_only: bool) -> None:
    block.publish(access=BLOCK, read_only=read_only)
    block.host.detach(NAME)
    block.unpublish()
    assert (block.host.mounts_at(TARGET), TARGET in block.host.tree, block.host.readers) == (0, False, [])


def test_a_bound_node_whose_number_another_volume_has_now_is_unpublished(block: FakeNode) -> None:
    block.publish(access=BLOCK)
    number = block.host.detach(NAME).number
    block.host.attach("csi-2", OTHER_UUID).number = number
    block.unpublish()
    assert block.host.mounts_at(TARGET) == 0


def test_a_dead_filesystem_in_use_is_unpublished(staged: FakeNode) -> None:
    staged.publish()
    staged.host.table[-1].in_use = True
    staged.host.detach(NAME)
    staged.unpublish()
    assert TARGET not in staged.host.tree


def test_a_living_target_in_use_is_not_taken_off(staged: FakeNode) -> None:
    staged.publish()
    staged.host.table[-1].in_use = True
    with pytest.raises(PreconditionFailed, match="in use"):
        staged.unpublish()


def test_unpublish_never_removes_a_directory_with_something_in_it(node: FakeNode) -> None:
    node.host.make_tree(TARGET / "data")
    with pytest.raises(PreconditionFailed, match="not empty"):
        node.unpublish()
    assert TARGET / "data" in node.host.tree


def test_something_else_at_the_target_is_left_alone(node: FakeNode) -> None:
    node.host.tree[TARGET] = "other"
    with pytest.raises(PreconditionFailed, match="got other"):
        node.unpublish()


@pytest.mark.parametrize("volume_id", ["", "no/such volume", VOLUME_ID, NAME])
def test_unpublish_where_nothing_is_succeeds(node: FakeNode, volume_id: str) -> None:
    node.unpublish(volume_id=volume_id)


def test_stacked_mounts_at_the_target_are_taken_off_one_by_one(staged: FakeNode) -> None:
    staged.publish()
    staged.host.mounts.bind(STAGING, TARGET, read_only=False)
    staged.unpublish()
    assert staged.host.mounts_at(TARGET) == 0


@pytest.mark.parametrize("access", [BLOCK, MountAccess("ext4")])
def test_a_reader_that_a_death_left_goes_when_the_target_is_published_otherwise(
    block: FakeNode, access: MountAccess | BlockAccess
) -> None:
    device = block.host.devices.find(NAME)
    assert device is not None
    block.host.paths.make_file(TARGET)
    read_only_device(block.host.read_only_devices, NodeVolume(VOLUME_ID, NAME, UUID), device, TARGET)
    if access != BLOCK:
        block.stage(access=access)
    block.publish(access=access)
    assert block.host.readers == []


def test_unpublish_takes_down_a_reader_that_was_never_bound(block: FakeNode) -> None:
    device = block.host.devices.find(NAME)
    assert device is not None
    block.host.paths.make_file(TARGET)
    read_only_device(block.host.read_only_devices, NodeVolume(VOLUME_ID, NAME, UUID), device, TARGET)
    block.unpublish()
    assert (block.host.readers, TARGET in block.host.tree) == ([], False)


def cut_off(node: FakeNode) -> None:
    """Leave the reader of a crash before its bind mount."""
    device = node.host.devices.find(NAME)
    assert device is not None
    node.host.paths.make_file(TARGET)
    read_only_device(node.host.read_only_devices, NodeVolume(VOLUME_ID, NAME, UUID), device, TARGET)


@pytest.mark.parametrize("volume_id", [VOLUME_ID, NAME])
def test_unpublish_removes_an_unbound_reader_of_a_lost_device(block: FakeNode, volume_id: str) -> None:
    cut_off(block)
    block.host.detach(NAME)
    block.unpublish(volume_id=volume_id)
    assert (block.host.readers, TARGET in block.host.tree) == ([], False)


def test_publish_removes_a_reader_of_an_earlier_attachment_before_it_makes_its_own(block: FakeNode) -> None:
    cut_off(block)
    block.host.attach(NAME, UUID, like=block.host.detach(NAME))
    block.publish(access=BLOCK, read_only=True)
    assert len(block.host.readers) == 1
    block.unpublish()
    assert block.host.readers == []


def test_unpublish_takes_down_a_reader_of_a_target_that_another_volume_has_now(block: FakeNode) -> None:
    cut_off(block)
    publish_other(block)
    block.unpublish()
    assert (block.host.readers, block.host.mounts_at(TARGET)) == ([], 1)


def test_unpublish_removes_a_reader_after_another_volume_had_its_target(block: FakeNode) -> None:
    cut_off(block)
    block.unpublish(volume_id=OTHER_ID)
    assert (len(block.host.readers), TARGET in block.host.tree) == (1, False)
    block.unpublish()
    assert block.host.readers == []


def test_unpublish_of_another_volume_leaves_the_reader_of_this_one(block: FakeNode) -> None:
    block.publish(access=BLOCK, read_only=True)
    block.unpublish(volume_id=OTHER_ID)
    assert (len(block.host.readers), block.host.mounts_at(TARGET)) == (1, 1)
