# SPDX-License-Identifier: Apache-2.0
"""NodeStageVolume on a machine in memory."""

from __future__ import annotations

import errno

import pytest

from csi_driver.errors import (
    DeadlineReached,
    Incompatible,
    InvalidField,
    InvalidRequest,
    PreconditionFailed,
    SystemCallFailed,
    VolumeNotFound,
)
from csi_driver.model import AccessMode, MountAccess
from csi_driver.node.usage_records import RAW, USED, UsageRecord
from csi_driver.publish_context import History
from tests.fakes.disks import MIB
from tests.fakes.node import (
    BLOCK,
    EXT4,
    NAME,
    OTHER_UUID,
    READER,
    STAGING,
    TARGET,
    UUID,
    VOLUME_ID,
    FakeNode,
    publish_context,
)
from tests.unit.node.staged import READ_ONLY_CONTEXT, STAGING_2, XFS, formatted


def test_an_id_of_no_form_of_ours_is_a_volume_that_does_not_exist(node: FakeNode) -> None:
    with pytest.raises(VolumeNotFound):
        node.stage(volume_id="no/such volume")


def test_another_volume_under_the_same_name_is_refused(node: FakeNode) -> None:
    node.host.attach(NAME, OTHER_UUID)
    with pytest.raises(PreconditionFailed, match="claims"):
        node.stage()
    assert node.host.formats == []


def test_an_id_and_a_publish_context_of_two_volumes_do_not_match(node: FakeNode) -> None:
    node.host.attach(NAME, OTHER_UUID)
    with pytest.raises(VolumeNotFound, match=OTHER_UUID):
        node.stage(context=publish_context(uuid=OTHER_UUID))


def test_a_publish_context_of_another_name_is_refused(node: FakeNode) -> None:
    with pytest.raises(PreconditionFailed, match="csi-2"):
        node.stage(context=publish_context(name="csi-2"))


@pytest.mark.parametrize("volume_id", [NAME, f"zone:{NAME}", f"zone:{NAME}:{UUID.upper()}", f"zone:{NAME}:{UUID}:ns"])
def test_every_form_of_an_id_is_staged(node: FakeNode, volume_id: str) -> None:
    node.host.attach(NAME, UUID)
    node.stage(volume_id=volume_id)
    assert node.host.mounts_at(STAGING) == 1


def test_a_device_that_never_comes_is_awaited_within_the_deadline(node: FakeNode) -> None:
    with pytest.raises(DeadlineReached):
        node.stage()
    assert node.clock.now_s < 60


@pytest.mark.parametrize("access", [MountAccess("xfs"), MountAccess("ext4", ("noexec",)), MountAccess("ext4", ("ro",))])
def test_staged_with_another_capability_is_incompatible(node: FakeNode, access: MountAccess) -> None:
    formatted(node)
    node.stage()
    with pytest.raises(Incompatible):
        node.stage(access=access)


def test_block_staging_where_a_filesystem_is_staged_is_incompatible(node: FakeNode) -> None:
    formatted(node)
    node.stage()
    with pytest.raises(Incompatible):
        node.stage(access=BLOCK)


def test_a_staging_path_that_holds_another_volume_is_refused_naming_it(node: FakeNode) -> None:
    node.host.attach("csi-2", OTHER_UUID)
    node.stage(volume_id=f"z:csi-2:{OTHER_UUID}", context=publish_context(name="csi-2", uuid=OTHER_UUID))
    formatted(node)
    with pytest.raises(PreconditionFailed, match="csi-2"):
        node.stage()


def test_a_mount_is_not_taken_for_a_volume_of_the_same_name_and_another_uuid(node: FakeNode) -> None:
    formatted(node)
    node.stage()
    with pytest.raises(PreconditionFailed, match=NAME):
        node.stage(volume_id=f"z:{NAME}:{OTHER_UUID}", context=publish_context(uuid=OTHER_UUID))


@pytest.mark.parametrize("in_use", [False, True])
def test_a_volume_that_returned_as_another_device_is_staged_over_the_dead_one(node: FakeNode, in_use: bool) -> None:
    formatted(node)
    node.stage()
    entry = node.host.topmost(STAGING)
    assert entry is not None
    entry.in_use = in_use
    back = node.host.attach(NAME, UUID, like=node.host.detach(NAME))
    node.stage()
    assert node.host.mounts_at(STAGING) == 1
    mounted = node.host.mounts.at(STAGING)
    assert mounted is not None
    assert mounted.number == back.number
    assert node.host.destroyed == []


def test_a_staging_path_that_holds_a_dead_device_stays_while_the_volume_is_not_back(node: FakeNode) -> None:
    formatted(node)
    node.stage()
    node.host.detach(NAME)
    with pytest.raises(PreconditionFailed, match="gone"):
        node.stage()
    assert node.host.mounts_at(STAGING) == 1


def test_a_staging_path_that_holds_the_dead_device_of_another_volume_is_refused(node: FakeNode) -> None:
    formatted(node)
    node.stage()
    node.host.detach(NAME)
    node.host.attach("csi-2", OTHER_UUID)
    with pytest.raises(PreconditionFailed, match="gone"):
        node.stage(volume_id=f"z:csi-2:{OTHER_UUID}", context=publish_context(name="csi-2", uuid=OTHER_UUID))
    assert node.host.mounts_at(STAGING) == 1


def test_a_dead_mount_of_another_volume_is_refused_also_after_an_earlier_attachment(node: FakeNode) -> None:
    formatted(node)
    node.stage()
    node.host.detach(NAME)
    node.host.attach("csi-2", OTHER_UUID)
    node.records.kept[OTHER_UUID] = UsageRecord(OTHER_UUID, 1, USED)
    context = publish_context(name="csi-2", uuid=OTHER_UUID, attachment=3)
    with pytest.raises(PreconditionFailed, match="gone"):
        node.stage(volume_id=f"z:csi-2:{OTHER_UUID}", context=context)
    assert node.host.mounts_at(STAGING) == 1


def test_a_second_staging_path_shares_the_filesystem(node: FakeNode) -> None:
    formatted(node)
    node.host.make_tree(STAGING_2)
    node.stage()
    node.stage(staging=STAGING_2, volume_id=f"{VOLUME_ID}:other")
    assert node.host.files_at(STAGING_2) == {"a": b"precious"}


def test_a_reader_beside_a_writer_of_one_device_is_refused(node: FakeNode) -> None:
    formatted(node)
    node.host.make_tree(STAGING_2)
    node.stage()
    with pytest.raises(PreconditionFailed, match=f"read-write mount at {STAGING}"):
        node.stage(staging=STAGING_2, mode=READER)


def test_a_reader_gets_a_read_only_mount_that_is_neither_checked_nor_replayed(node: FakeNode) -> None:
    held = formatted(node)
    node.stage(mode=READER)
    mounted = node.host.mounts.at(STAGING)
    assert mounted is not None
    assert (mounted.read_only, "noload" in mounted.options, held.checks) == (True, True, 0)


def test_a_read_only_attachment_makes_the_device_refuse_writes(node: FakeNode) -> None:
    formatted(node)
    node.stage(mode=READER, context=READ_ONLY_CONTEXT)
    assert node.host.disks[NAME].read_only


def test_a_reader_of_a_writable_attachment_leaves_the_device_writable(node: FakeNode) -> None:
    formatted(node)
    node.stage(mode=READER)
    assert not node.host.disks[NAME].read_only


@pytest.mark.parametrize("mode", [READER, AccessMode.SINGLE_NODE_READER_ONLY])
def test_a_blank_volume_cannot_be_staged_for_reading(node: FakeNode, mode: AccessMode) -> None:
    node.host.attach(NAME, UUID)
    with pytest.raises(PreconditionFailed, match="blank"):
        node.stage(mode=mode)


@pytest.mark.parametrize("access", [EXT4, BLOCK])
def test_a_device_that_refuses_writes_is_not_staged_for_writing(node: FakeNode, access: MountAccess) -> None:
    formatted(node)
    node.host.disks[NAME].read_only = True
    with pytest.raises(PreconditionFailed, match="refuses writes"):
        node.stage(access=access)


def test_a_read_only_attachment_does_not_pull_the_device_from_a_writer(node: FakeNode) -> None:
    formatted(node)
    node.host.make_tree(STAGING_2)
    node.stage()
    with pytest.raises(PreconditionFailed, match="mounts it writable"):
        node.stage(staging=STAGING_2, mode=READER, context=READ_ONLY_CONTEXT)


@pytest.mark.parametrize("fs_type", ["ext4", "xfs", "btrfs"])
def test_a_filesystem_smaller_than_its_device_is_grown_at_staging(node: FakeNode, fs_type: str) -> None:
    held = formatted(node, fs_type)
    node.host.disks[NAME].size_bytes = 128 * MIB
    node.host.can_grow_mounted_ext4 = False
    node.stage(access=MountAccess(fs_type))
    assert held.size_bytes == 128 * MIB


def test_a_growth_that_a_crash_cut_off_is_finished_by_the_repeated_call(node: FakeNode) -> None:
    held = formatted(node, "xfs")
    node.stage(access=XFS)
    node.host.disks[NAME].size_bytes = 128 * MIB
    node.stage(access=XFS)
    assert held.size_bytes == 128 * MIB


def test_a_staged_ext4_that_cannot_grow_mounted_stays_staged(node: FakeNode) -> None:
    held = formatted(node)
    node.stage()
    node.host.disks[NAME].size_bytes = 128 * MIB
    node.host.can_grow_mounted_ext4 = False
    node.stage()
    assert held.size_bytes == 64 * MIB


def test_a_damaged_filesystem_is_not_mounted(node: FakeNode) -> None:
    formatted(node).is_damaged = True
    with pytest.raises(PreconditionFailed, match="repair"):
        node.stage()
    assert node.host.mounts_at(STAGING) == 0


def test_a_filesystem_that_the_kernel_cannot_mount_is_blamed_on_its_mkfs_options(node: FakeNode) -> None:
    def refuse(reached: str) -> None:
        if reached == "before mount":
            raise SystemCallFailed("mount it", errno.EINVAL)

    node.host.attach(NAME, UUID)
    node.host.step = refuse
    with pytest.raises(InvalidRequest, match="this kernel cannot mount what mkfs made with -O casefold"):
        node.stage(volume_context={"mkfsOptions": "-O casefold"})
    with pytest.raises(SystemCallFailed, match="mount it"):
        node.stage()


def test_an_option_that_the_kernel_refuses_is_named(node: FakeNode) -> None:
    formatted(node)
    with pytest.raises(InvalidField, match="bogus"):
        node.stage(access=MountAccess("ext4", ("bogus",)))


@pytest.mark.parametrize("path", ["relative", "/etc", "/var/lib/kubelet/../../../etc"])
def test_a_staging_path_outside_the_roots_is_refused(node: FakeNode, path: str) -> None:
    node.host.attach(NAME, UUID)
    with pytest.raises(InvalidField, match="staging_target_path"):
        node.stage(staging=path)


def test_a_missing_staging_directory_is_made(node: FakeNode) -> None:
    formatted(node)
    node.stage(staging=STAGING.parent / "fresh")
    assert node.host.mounts_at(STAGING.parent / "fresh") == 1


def test_a_staging_path_that_is_a_file_is_refused(node: FakeNode) -> None:
    formatted(node)
    node.host.tree[STAGING] = "file"
    with pytest.raises(PreconditionFailed, match="got a file"):
        node.stage()


def test_a_block_volume_is_staged_without_a_mount_or_a_format(node: FakeNode) -> None:
    node.host.attach(NAME, UUID)
    node.stage(access=BLOCK)
    node.stage(access=BLOCK)
    assert (node.host.table, node.host.formats) == ([], [])


def test_a_volume_published_raw_in_its_first_attachment_is_scanned_before_a_format(node: FakeNode) -> None:
    node.host.attach(NAME, UUID)
    node.stage(access=BLOCK)
    node.publish(access=BLOCK)
    node.host.write_raw(TARGET, 32 * MIB, b"x")
    node.unpublish()
    node.unstage()
    assert node.records.kept[UUID].filesystem == RAW
    with pytest.raises(PreconditionFailed, match="holds unrecognised data"):
        node.stage()
    assert node.host.destroyed == []


def test_raw_data_is_no_unfinished_format(node: FakeNode) -> None:
    node.host.attach(NAME, UUID)
    node.records.kept[UUID] = UsageRecord(UUID, 2, "ext4")
    context = publish_context(attachment=2, history=History.ATTACHED)
    node.stage(access=BLOCK, context=context)
    node.publish(access=BLOCK, context=context)
    node.host.write_raw(TARGET, 0, b"x")
    node.unpublish()
    with pytest.raises(PreconditionFailed):
        node.stage(context=context)
    assert node.host.destroyed == []
