# SPDX-License-Identifier: Apache-2.0
"""Formatting on a machine in memory: owners of filesystems, and permissions of an administrator.

Records, crashes and refusals are in test_stage_formats; the argument is in docs/data-safety.md.
"""

from __future__ import annotations

import logging
from contextlib import nullcontext

import pytest

from csi_driver.errors import HostFailure, OperationPending, PreconditionFailed, SystemCallFailed
from csi_driver.model import MountAccess
from csi_driver.node.usage_records import RAW, USED, UsageRecord
from csi_driver.publish_context import History
from tests.fakes.disks import MIB, FakeDisk, FakeFilesystem
from tests.fakes.filesystems import AT_END
from tests.fakes.node import (
    BLOCK,
    KUBELET,
    NAME,
    OTHER_UUID,
    READER,
    STAGING,
    TARGET,
    UUID,
    FakeNode,
    publish_context,
)

FIRST = publish_context()
ATTACHED = publish_context(history=History.ATTACHED, attachment=3)
WRITTEN = publish_context(history=History.WRITTEN, attachment=3)
UNKNOWN = publish_context(history=History.UNKNOWN, attachment=3)
ALLOWED = publish_context(history=History.ATTACHED, attachment=3, format_allowed=True)
LATER = publish_context(history=History.ATTACHED, attachment=5)
XFS = MountAccess("xfs")


def old(node: FakeNode, fs_type: str = "ext4", uuid: str = OTHER_UUID) -> FakeDisk:
    """Attach the volume with a used filesystem; by default of another volume, on reused space."""
    disk = node.host.attach(NAME, UUID)
    disk.filesystem = FakeFilesystem(fs_type, disk.size_bytes, files={"a": b"precious"}, uuid=uuid)
    disk.was_used = True
    return disk


# --- owners of filesystems -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("context", [FIRST, ATTACHED])
def test_old_data_of_another_volume_is_neither_published_nor_formatted(node: FakeNode, context: dict[str, str]) -> None:
    disk = old(node)
    with pytest.raises(PreconditionFailed, match=f"{OTHER_UUID}.*{UUID}.*allow-format"):
        node.stage(context=context)
    assert (node.host.formats, node.host.mounts_at(STAGING), disk.filesystem is not None) == ([], 0, True)


@pytest.mark.parametrize("context", [WRITTEN, UNKNOWN, {}])
def test_a_filesystem_that_others_made_is_used_where_they_may_have(node: FakeNode, context: dict[str, str]) -> None:
    old(node)
    node.stage(context=context)
    assert node.host.files_at(STAGING) == {"a": b"precious"}


def test_a_filesystem_of_ours_is_known_again_without_any_state_on_the_node(node: FakeNode) -> None:
    node.host.attach(NAME, UUID)
    node.stage()
    node.host.write_file(STAGING, "a", b"precious")
    node.unstage()
    node.records.kept.clear()
    node.stage()
    assert (node.host.formats, node.host.files_at(STAGING)) == ([UUID], {"a": b"precious"})


def test_a_filesystem_that_was_given_the_volumes_uuid_is_used(node: FakeNode) -> None:
    disk = old(node)
    assert disk.filesystem is not None
    disk.filesystem.uuid = UUID
    node.stage(context=ATTACHED)
    assert node.host.files_at(STAGING) == {"a": b"precious"}


# --- at most once under one attachment --------------------------------------------------------------------------


@pytest.mark.parametrize("context", [FIRST, ATTACHED])
def test_a_volume_in_use_that_turns_blank_is_not_formatted_again(node: FakeNode, context: dict[str, str]) -> None:
    """Storage that lost its data and answers zeroes: formatting would make the loss final."""
    disk = node.host.attach(NAME, UUID)
    node.stage(context=context)
    node.host.write_file(STAGING, "a", b"precious")
    node.unstage()
    disk.filesystem = None
    with pytest.raises(PreconditionFailed, match="blank now"):
        node.stage(context=context)
    assert node.host.formats == [UUID]


def test_a_volume_that_turned_blank_is_scanned_and_formatted_when_attached_again(node: FakeNode) -> None:
    disk = node.host.attach(NAME, UUID)
    node.stage()
    node.unstage()
    disk.filesystem, disk.was_used = None, False
    node.stage(context=ATTACHED)
    assert node.host.formats == [UUID, UUID]


def test_a_first_attachment_that_is_not_counted_proves_nothing(node: FakeNode) -> None:
    node.host.attach(NAME, UUID).raw[32 * MIB] = b"x"
    with pytest.raises(PreconditionFailed, match=f"byte {32 * MIB}"):
        node.stage(context=publish_context(attachment=0))


@pytest.mark.parametrize("context", [FIRST, ALLOWED])
def test_a_volume_that_was_published_raw_is_not_formatted_after_a_quick_probe(
    node: FakeNode, context: dict[str, str]
) -> None:
    node.host.attach(NAME, UUID)
    node.stage(access=BLOCK, context=context)
    node.publish(access=BLOCK, context=context)
    node.host.write_raw(TARGET, 32 * MIB, b"precious")
    node.unpublish()
    node.unstage()
    with pytest.raises(PreconditionFailed, match=f"byte {32 * MIB}"):
        node.stage(context=context)
    assert node.host.destroyed == []


@pytest.mark.parametrize("is_raw", [False, True])
def test_another_signature_beside_the_volumes_own_filesystem_is_looked_for_after_a_raw_publication(
    node: FakeNode, is_raw: bool
) -> None:
    disk = node.host.attach(NAME, UUID)
    node.stage(context=FIRST)
    node.unstage()
    if is_raw:
        node.stage(access=BLOCK, context=FIRST)
        node.publish(access=BLOCK, context=FIRST)
        node.unpublish()
        node.unstage()
    disk.signature = AT_END
    with pytest.raises(PreconditionFailed, match=AT_END) if is_raw else nullcontext():
        node.stage(context=FIRST)


@pytest.mark.parametrize("is_staged_first", [True, False])
@pytest.mark.parametrize("attachment", [1, 2])
def test_raw_data_of_one_handle_is_not_formatted_by_another_handles_first_attachment(
    node: FakeNode, attachment: int, is_staged_first: bool
) -> None:
    """Two handles of a volume share one attachment or follow one another, each with its own context."""
    disk = node.host.attach(NAME, UUID)
    if is_staged_first:
        node.stage(context=FIRST)
        node.unstage()
        disk.filesystem, disk.was_used = None, False
    raw = publish_context(attachment=attachment, history=History.WRITTEN)
    other = f"single-zone-cluster:{NAME}:{UUID}:other"
    node.stage(volume_id=other, access=BLOCK, context=raw)
    node.publish(volume_id=other, access=BLOCK, context=raw)
    node.host.write_raw(TARGET, 32 * MIB, b"precious")
    node.unpublish(volume_id=other)
    node.unstage(volume_id=other)
    formats = len(node.host.formats)
    with pytest.raises(PreconditionFailed, match=f"byte {32 * MIB}"):
        node.stage(context=FIRST)
    assert (node.host.destroyed, len(node.host.formats)) == ([], formats)


def test_a_begun_format_does_not_cover_later_raw_data(node: FakeNode) -> None:
    node.host.attach(NAME, UUID)
    node.records.kept[UUID] = UsageRecord(UUID, 3, "ext4")
    node.stage(access=BLOCK, context=ATTACHED)
    node.publish(access=BLOCK, context=ATTACHED)
    node.host.write_raw(TARGET, 0, b"precious")
    node.unpublish()
    node.unstage()
    with pytest.raises(PreconditionFailed):
        node.stage(context=ATTACHED)
    assert node.host.destroyed == []


# --- the permission ---------------------------------------------------------------------------------------------


def put_signature(disk: FakeDisk) -> None:
    disk.signature = "a partition table (gpt)"


def put_data_within(disk: FakeDisk) -> None:
    disk.raw[32 * MIB] = b"old"


def put_ntfs(disk: FakeDisk) -> None:
    disk.filesystem = FakeFilesystem("ntfs", disk.size_bytes, uuid="0123")


def put_another_volumes_ext4(disk: FakeDisk) -> None:
    disk.filesystem = FakeFilesystem("ext4", disk.size_bytes, uuid=OTHER_UUID)


def put_our_xfs(disk: FakeDisk) -> None:
    disk.filesystem = FakeFilesystem("xfs", disk.size_bytes)


OLD_DATA = [put_signature, put_data_within, put_ntfs, put_another_volumes_ext4, put_our_xfs]


@pytest.mark.parametrize("put", OLD_DATA)
def test_old_data_is_formatted_over_where_an_administrator_allowed_it(node: FakeNode, put: object) -> None:
    disk = node.host.attach(NAME, UUID)
    assert callable(put)
    put(disk)
    with pytest.raises(PreconditionFailed, match="allow-format"):
        node.stage(context=ATTACHED)
    node.stage(context=ALLOWED)
    assert (node.host.formats, disk.signature, node.records.kept[UUID]) == ([UUID], None, UsageRecord(UUID, 3, USED))


def test_what_was_formatted_over_is_in_the_log(node: FakeNode, caplog: pytest.LogCaptureFixture) -> None:
    old(node)
    with caplog.at_level(logging.INFO):
        node.stage(context=ALLOWED)
    said = [record.message for record in caplog.records if record.levelno == logging.WARNING]
    assert len(said) == 1
    assert NAME in said[0]
    assert f"attachment 3: making ext4 over ext4 with the uuid {OTHER_UUID}" in said[0]


def test_a_permission_is_used_once(node: FakeNode) -> None:
    disk = old(node)
    node.stage(context=ALLOWED)
    node.host.write_file(STAGING, "b", b"new")
    node.unstage()
    node.stage(context=ALLOWED)
    assert (node.host.formats, node.host.files_at(STAGING)) == ([UUID], {"b": b"new"})
    node.unstage()
    disk.filesystem, disk.signature = None, "data that nothing recognises"
    with pytest.raises(PreconditionFailed):
        node.stage(context=ALLOWED)
    assert node.host.formats == [UUID]


def test_a_permission_that_was_used_is_known_without_any_state_on_the_node(node: FakeNode) -> None:
    old(node)
    node.stage(context=ALLOWED)
    node.host.write_file(STAGING, "b", b"new")
    node.unstage()
    node.records.kept.clear()
    node.stage(context=ALLOWED)
    assert (node.host.formats, node.host.files_at(STAGING)) == ([UUID], {"b": b"new"})


def test_a_permission_ends_with_its_attachment(node: FakeNode) -> None:
    old(node)
    with pytest.raises(PreconditionFailed):
        node.stage(context=LATER)
    assert node.host.formats == []


def test_a_permission_that_was_not_needed_is_used_up_all_the_same(node: FakeNode) -> None:
    """A usable filesystem was used; the data of its user is not old data."""
    disk = old(node, uuid=UUID)
    node.stage(context=ALLOWED)
    assert node.host.formats == []
    node.unstage()
    disk.filesystem, disk.signature = None, "data that nothing recognises"
    with pytest.raises(PreconditionFailed):
        node.stage(context=ALLOWED)
    assert node.host.formats == []


def test_a_permission_does_not_format_what_is_mounted(node: FakeNode) -> None:
    old(node, "xfs", UUID)
    node.stage(access=XFS, context=ATTACHED)
    other = node.host.make_tree(KUBELET / "plugins/staging2/globalmount")
    with pytest.raises(PreconditionFailed, match="got xfs at"):
        node.stage(staging=other, context=ALLOWED)
    assert node.host.formats == []


def test_a_permission_does_not_format_a_device_in_use(node: FakeNode) -> None:
    old(node).claimed = 7
    with pytest.raises(OperationPending, match="busy"):
        node.stage(context=ALLOWED)
    assert node.host.formats == []


def test_a_permission_does_not_format_another_volume_under_the_same_name(node: FakeNode) -> None:
    node.host.attach(NAME, OTHER_UUID).signature = "a partition table (gpt)"
    with pytest.raises(PreconditionFailed, match="claims"):
        node.stage(context=ALLOWED)
    assert node.host.formats == []


def test_a_permission_does_not_format_a_device_that_is_too_small(node: FakeNode) -> None:
    node.host.attach(NAME, UUID, 32 * MIB).signature = "a partition table (gpt)"
    with pytest.raises(PreconditionFailed, match="got 33554432"):
        node.stage(context=ALLOWED)
    assert node.host.formats == []


def test_a_permission_does_not_format_what_cannot_be_read(node: FakeNode) -> None:
    old(node).fails_reads = True
    with pytest.raises(HostFailure):
        node.stage(context=ALLOWED)
    assert node.host.formats == []


def test_a_permission_formats_nothing_for_a_reader(node: FakeNode) -> None:
    old(node)
    with pytest.raises(PreconditionFailed):
        node.stage(context=ALLOWED, mode=READER)
    assert node.host.formats == []


class Died(BaseException):
    """The driver's process ends here."""


@pytest.mark.parametrize(
    "at", ["before record", "after record", "before wipe", "after wipe", "before make", "halfway make", "after make"]
)
@pytest.mark.parametrize("put", OLD_DATA)
def test_a_driver_that_dies_while_it_formats_over_goes_on_from_there(node: FakeNode, at: str, put: object) -> None:
    def die(point: str) -> None:
        if point == at:
            raise Died

    disk = node.host.attach(NAME, UUID)
    assert callable(put)
    put(disk)
    node.host.step = die
    with pytest.raises(Died):
        node.stage(context=ALLOWED)
    node.host.step = lambda point: None
    node.restart()
    node.stage(context=ALLOWED)
    assert (node.host.mounts_at(STAGING), node.records.kept[UUID]) == (1, UsageRecord(UUID, 3, USED))


def test_a_raw_mark_of_the_attachment_outlives_a_permission(node: FakeNode) -> None:
    node.host.attach(NAME, UUID)
    node.stage(access=BLOCK, context=ALLOWED)
    node.publish(access=BLOCK, context=ALLOWED)
    assert node.records.kept == {UUID: UsageRecord(UUID, 3, RAW)}


def test_a_device_that_goes_while_it_is_formatted_is_formatted_when_it_is_back(node: FakeNode) -> None:
    disk = node.host.attach(NAME, UUID)

    def go(point: str) -> None:
        if point == "after record":
            node.host.detach(NAME)

    node.host.step = go
    with pytest.raises((PreconditionFailed, HostFailure, SystemCallFailed)):
        node.stage()
    node.host.step = lambda point: None
    node.host.attach(NAME, UUID, like=disk)
    node.stage()
    assert node.host.formats == [UUID]
