# SPDX-License-Identifier: Apache-2.0
"""NodeStageVolume of a volume without a filesystem, and with one."""

from __future__ import annotations

import pytest

from csi_driver.deadline import Deadline
from csi_driver.errors import (
    DeadlineReached,
    HostFailure,
    InvalidRequest,
    OperationPending,
    PreconditionFailed,
)
from csi_driver.model import EMPTY, AccessMode, Capability, MountAccess
from csi_driver.node import StageRequest
from csi_driver.node.stage import Stage
from csi_driver.node.usage_records import USED, UsageRecord
from csi_driver.publish_context import History
from tests.fakes.disks import MIB, FakeFilesystem
from tests.fakes.node import (
    EXT4,
    NAME,
    READER,
    STAGING,
    UUID,
    VOLUME_ID,
    WRITER,
    FakeNode,
    publish_context,
)
from tests.unit.node.staged import IN_USE, formatted


def test_a_blank_first_device_is_formatted_once_and_mounted(node: FakeNode) -> None:
    node.host.attach(NAME, UUID)
    node.stage()
    node.stage()
    assert (node.host.formats, node.host.mounts_at(STAGING)) == ([UUID], 1)


def test_a_format_ends_with_a_record_of_use(node: FakeNode) -> None:
    node.host.attach(NAME, UUID)
    node.stage()
    assert node.records.kept == IN_USE


def test_a_volume_in_use_is_on_record_before_it_is_mounted(node: FakeNode) -> None:
    def look(point: str) -> None:
        if point == "before mount":
            assert node.records.kept == IN_USE
            looked.append(point)

    looked: list[str] = []
    node.host.attach(NAME, UUID)
    node.host.step = look
    node.stage()
    assert looked


@pytest.mark.parametrize(("attachment", "kept"), [(0, {}), (3, {UUID: UsageRecord(UUID, 3, USED)})])
def test_every_counted_attachment_leaves_a_record(
    node: FakeNode, attachment: int, kept: dict[str, UsageRecord]
) -> None:
    formatted(node)
    node.stage(context=publish_context(history=History.ATTACHED, attachment=attachment))
    assert node.records.kept == kept


@pytest.mark.parametrize(("attachment", "last"), [(0, 1), (1, 1), (3, 3)])
def test_a_volume_in_use_stays_on_record_under_later_attachments(node: FakeNode, attachment: int, last: int) -> None:
    formatted(node)
    node.records.kept[UUID] = UsageRecord(UUID, 1, USED)
    node.stage(context=publish_context(history=History.ATTACHED, attachment=attachment))
    assert node.records.kept == {UUID: UsageRecord(UUID, last, USED, uncounted=attachment == 0)}


def test_a_begun_format_without_attachment_number_ends_with_the_first_use(node: FakeNode) -> None:
    formatted(node)
    node.records.kept[UUID] = UsageRecord(UUID, 0, "ext4")
    node.stage(context=publish_context(history=History.ATTACHED, attachment=0))
    assert node.records.kept == {}


@pytest.mark.parametrize(("asked", "made"), [("", "ext4"), ("ext4", "ext4"), ("xfs", "xfs"), ("btrfs", "btrfs")])
def test_the_filesystem_asked_for_is_made_and_ext4_without_a_wish(node: FakeNode, asked: str, made: str) -> None:
    disk = node.host.attach(NAME, UUID)
    node.stage(access=MountAccess(asked))
    assert disk.filesystem is not None
    assert disk.filesystem.fs_type == made


def test_a_filesystem_is_used_as_it_is(node: FakeNode) -> None:
    held = formatted(node)
    node.stage()
    assert (node.host.formats, node.host.files_at(STAGING), held.checks) == ([], {"a": b"precious"}, 1)


@pytest.mark.parametrize("mode", [WRITER, READER])
def test_a_filesystem_is_used_whatever_its_maker_was_asked_for(node: FakeNode, mode: AccessMode) -> None:
    """Volume contexts cannot be changed, and older drivers accepted more."""
    held = formatted(node)
    context = publish_context(read_only=mode is READER, history=History.ATTACHED, attachment=2)
    node.stage(mode=mode, context=context, volume_context={"mkfsOptions": "-F", "mkfs/inodeSize": "8192"})
    assert (node.host.formats, node.host.files_at(STAGING), held.files) == ([], held.files, {"a": b"precious"})


def test_a_filesystem_is_used_whichever_it_is_when_none_is_asked_for(node: FakeNode) -> None:
    formatted(node, "xfs")
    node.stage(access=MountAccess(""))
    assert node.host.files_at(STAGING) == {"a": b"precious"}


def test_another_filesystem_than_asked_for_is_refused(node: FakeNode) -> None:
    formatted(node, "xfs")
    with pytest.raises(PreconditionFailed, match="holds xfs; expected ext4"):
        node.stage()


def test_a_partition_table_is_content(node: FakeNode) -> None:
    node.host.attach(NAME, UUID).signature = "a partition table (gpt)"
    with pytest.raises(PreconditionFailed, match="partition table"):
        node.stage()
    assert node.host.formats == []


def test_a_read_error_formats_nothing(node: FakeNode) -> None:
    node.host.attach(NAME, UUID).fails_reads = True
    with pytest.raises(HostFailure):
        node.stage()
    assert node.host.formats == []


@pytest.mark.parametrize(
    "context",
    [EMPTY, publish_context(history=History.ATTACHED), publish_context(history=History.UNKNOWN), {"history": "first"}],
)
def test_one_written_byte_in_the_middle_stops_a_format_of_a_volume_that_was_in_use(
    node: FakeNode, context: dict[str, str]
) -> None:
    node.host.attach(NAME, UUID).raw[32 * MIB + 5] = b"x"
    with pytest.raises(PreconditionFailed, match=f"byte {32 * MIB + 5}"):
        node.stage(context=context)
    assert node.host.formats == []


def test_a_volume_that_was_in_use_and_is_zero_throughout_is_formatted(node: FakeNode) -> None:
    node.host.attach(NAME, UUID)
    node.stage(context=publish_context(history=History.ATTACHED, attachment=5))
    assert node.host.formats == [UUID]


def test_a_device_smaller_than_the_volume_is_not_formatted(node: FakeNode) -> None:
    node.host.attach(NAME, UUID, 32 * MIB)
    with pytest.raises(PreconditionFailed, match="expected 67108864 bytes, got 33554432"):
        node.stage()
    assert node.host.formats == []


def test_a_device_without_known_uuid_is_not_formatted(node: FakeNode) -> None:
    node.host.attach(NAME, UUID).claims_uuid = False
    with pytest.raises(DeadlineReached):
        node.stage(volume_id=NAME, context=EMPTY)
    assert node.host.formats == []


def test_what_our_own_format_left_unfinished_is_made_again(node: FakeNode) -> None:
    disk = node.host.attach(NAME, UUID)
    disk.filesystem = FakeFilesystem("ext4", 64 * MIB, complete=False)
    node.records.kept[UUID] = UsageRecord(UUID, 1, "ext4")
    node.stage()
    assert (node.host.mounts_at(STAGING), node.records.kept) == (1, IN_USE)


class Died(BaseException):
    """The driver's process ends here."""


@pytest.mark.parametrize("at", ["before make", "halfway make", "after make"])
def test_a_driver_that_dies_around_its_format_goes_on_from_there(node: FakeNode, at: str) -> None:
    def die(point: str) -> None:
        if point == at:
            raise Died

    node.host.attach(NAME, UUID)
    node.host.step = die
    with pytest.raises(Died):
        node.stage()
    node.host.step = lambda point: None
    node.restart()
    node.stage()
    assert (node.host.mounts_at(STAGING), node.records.kept, node.host.destroyed) == (1, IN_USE, [])


@pytest.mark.parametrize("nth", [1, 2])
@pytest.mark.parametrize("at", ["before record", "after record"])
def test_a_driver_that_dies_around_a_record_goes_on_from_there(node: FakeNode, at: str, nth: int) -> None:
    """The first mark says that a format begins, the second that the volume is in use."""
    met: list[str] = []

    def die(point: str) -> None:
        met.extend([point] * (point == at))
        if len(met) == nth:
            raise Died

    node.host.attach(NAME, UUID)
    node.host.step = die
    with pytest.raises(Died):
        node.stage()
    node.host.step = lambda point: None
    node.restart()
    node.stage()
    assert (node.host.mounts_at(STAGING), node.records.kept, node.host.destroyed) == (1, IN_USE, [])


def test_an_unfinished_filesystem_of_another_attachment_is_refused(node: FakeNode) -> None:
    disk = node.host.attach(NAME, UUID)
    disk.filesystem = FakeFilesystem("ext4", 64 * MIB, complete=False)
    node.records.kept[UUID] = UsageRecord(UUID, 1, "ext4")
    with pytest.raises(PreconditionFailed):
        node.stage(context=publish_context(attachment=2, history=History.ATTACHED))
    assert node.host.formats == []


def test_an_old_record_does_not_make_data_formattable(node: FakeNode) -> None:
    held = formatted(node)
    node.records.kept[UUID] = UsageRecord(UUID, 1, "ext4")
    node.stage(context=publish_context(attachment=3, history=History.ATTACHED))
    assert (node.host.formats, held.files) == ([], {"a": b"precious"})


def test_what_the_storage_class_and_the_volume_say_reaches_mkfs(node: FakeNode) -> None:
    disk = node.host.attach(NAME, UUID)
    context = {**publish_context(), "stripeUnitBytes": "131072", "stripeBytes": "1048576"}
    node.stage(context=context, volume_context={"mkfsOptions": "-O quota", "mkfs/inodeSize": "512"})
    assert disk.filesystem is not None
    words = " ".join(disk.filesystem.options)
    assert all(said in words for said in ("-O quota", "-I 512", "stride=32,stripe_width=256", "nodiscard"))


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("mkfs/inodeSize", "300"),
        ("mkfs/blockSize", "512"),
        ("mkfs/discard", "1"),
        ("mkfs/nothing", "1"),
        ("mkfsOptions", "/dev/sda"),
        ("mkfsOptions", "-F"),
    ],
)
@pytest.mark.parametrize("history", [History.FIRST, History.UNKNOWN])
def test_a_blank_device_is_left_as_it_is_where_mkfs_cannot_be_asked_so(
    node: FakeNode, history: History, key: str, value: str
) -> None:
    disk = node.host.attach(NAME, UUID)
    with pytest.raises(InvalidRequest, match=key):
        node.stage(context=publish_context(history=history), volume_context={key: value})
    assert (node.host.formats, node.records.kept, disk.filesystem, node.host.mounts_at(STAGING)) == ([], {}, None, 0)


@pytest.mark.parametrize(("asked", "made"), [("", "xfs"), ("btrfs", "btrfs")])
def test_the_filesystem_of_the_storage_class_counts_where_the_request_names_none(
    node: FakeNode, asked: str, made: str
) -> None:
    disk = node.host.attach(NAME, UUID)
    node.stage(access=MountAccess(asked), volume_context={"fsType": "xfs"})
    assert disk.filesystem is not None
    assert disk.filesystem.fs_type == made


def test_a_busy_moment_of_a_fresh_device_is_waited_out(node: FakeNode) -> None:
    node.host.attach(NAME, UUID).busy_for = 3
    node.stage()
    assert node.host.mounts_at(STAGING) == 1


def test_a_device_that_another_program_works_on_is_refused(node: FakeNode) -> None:
    """A killed driver may have left it: after a final error kubelet would not unstage."""
    disk = node.host.attach(NAME, UUID)
    disk.claimed = 7
    with pytest.raises(OperationPending, match="busy"):
        node.stage()


def test_a_format_waits_for_a_slot_until_its_deadline() -> None:
    node = FakeNode(heavy_operations=1)
    node.host.attach(NAME, UUID)
    stage = node.use.stage
    assert isinstance(stage, Stage)
    heavy = stage.preparation.heavy
    request = StageRequest(VOLUME_ID, str(STAGING), Capability(EXT4, AccessMode.SINGLE_NODE_WRITER), publish_context())
    with heavy.slot("occupy it", deadline=node.soon()), pytest.raises(DeadlineReached, match="slot"):
        node.use.stage.stage(request, deadline=Deadline.after(0, node.clock))
    assert node.host.formats == []
