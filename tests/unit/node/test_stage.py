"""NodeStageVolume and NodeUnstageVolume on a machine in memory."""

from __future__ import annotations

import errno
from pathlib import Path

import pytest

from csi_driver.deadline import Deadline
from csi_driver.errors import (
    DeadlineReached,
    HostFailure,
    Incompatible,
    InvalidField,
    InvalidRequest,
    OperationPending,
    PreconditionFailed,
    SystemCallFailed,
    VolumeNotFound,
)
from csi_driver.host_model import VolumeStatus
from csi_driver.model import EMPTY, AccessMode, Capability, MountAccess
from csi_driver.node import StageRequest
from csi_driver.node.stage import Stage
from csi_driver.node.usage_records import RAW, USED, UsageRecord
from csi_driver.publish_context import History
from tests.fakes.host import MIB, FakeFilesystem
from tests.fakes.node import (
    BLOCK,
    EXT4,
    KUBELET,
    NAME,
    OTHER_TARGET,
    OTHER_UUID,
    READER,
    STAGING,
    TARGET,
    UUID,
    VOLUME_ID,
    WRITER,
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


# --- formatting ---


def test_a_blank_first_device_is_formatted_once_and_mounted(node: FakeNode) -> None:
    node.host.attach(NAME, UUID)
    node.stage()
    node.stage()
    assert (node.host.formats, node.host.mounts_at(STAGING)) == ([UUID], 1)


def test_a_format_ends_with_the_mark_of_a_volume_in_use(node: FakeNode) -> None:
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
def test_every_attachment_that_is_counted_leaves_its_mark(
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


def test_a_format_begun_under_an_attachment_that_nobody_counts_is_over_once_it_is_used(node: FakeNode) -> None:
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
    """Volume contexts cannot be changed, and older drivers took what this one refuses."""
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


def test_a_device_whose_uuid_nobody_knows_is_not_formatted(node: FakeNode) -> None:
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
def test_a_driver_that_dies_around_a_mark_goes_on_from_there(node: FakeNode, at: str, nth: int) -> None:
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


def test_an_old_mark_does_not_make_data_formattable(node: FakeNode) -> None:
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


def test_a_device_on_which_somebody_works_is_refused_for_now(node: FakeNode) -> None:
    """It may be what a killed driver left at work: an error that kubelet takes for final would give the volume up."""
    disk = node.host.attach(NAME, UUID)
    disk.claimed = 7
    with pytest.raises(OperationPending, match="in use"):
        node.stage()


def test_a_format_waits_for_a_place_no_longer_than_its_caller() -> None:
    node = FakeNode(heavy_operations=1)
    node.host.attach(NAME, UUID)
    stage = node.use.stage
    assert isinstance(stage, Stage)
    heavy = stage.preparation.heavy
    request = StageRequest(VOLUME_ID, str(STAGING), Capability(EXT4, AccessMode.SINGLE_NODE_WRITER), publish_context())
    with heavy.slot("occupy it", deadline=node.soon()), pytest.raises(DeadlineReached, match="slot"):
        node.use.stage.stage(request, deadline=Deadline.after(0, node.clock))
    assert node.host.formats == []


# --- whose device ---


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


# --- already staged ---


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
def test_a_volume_that_came_back_as_another_device_is_staged_in_place_of_the_dead_one(
    node: FakeNode, in_use: bool
) -> None:
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


# --- read-only ---


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


# --- growing ---


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


# --- root mode, options, paths ---


def test_a_filesystem_that_the_kernel_cannot_mount_is_the_fault_of_the_options_it_was_made_with(node: FakeNode) -> None:
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


# --- block ---


def test_a_block_volume_is_staged_without_a_mount_or_a_format(node: FakeNode) -> None:
    node.host.attach(NAME, UUID)
    node.stage(access=BLOCK)
    node.stage(access=BLOCK)
    assert (node.host.table, node.host.formats) == ([], [])


def test_what_was_handed_out_raw_under_its_first_attachment_is_read_whole_before_a_format(node: FakeNode) -> None:
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


def test_what_was_handed_out_raw_is_no_unfinished_format_of_ours(node: FakeNode) -> None:
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


# --- unstage ---


def test_unstage_leaves_the_directory_empty_and_may_be_repeated(node: FakeNode) -> None:
    formatted(node)
    node.stage()
    node.unstage()
    node.unstage()
    assert (node.host.mounts_at(STAGING), node.host.tree[STAGING]) == (0, "directory")


def test_unstage_of_another_volume_at_the_same_path_touches_nothing(node: FakeNode) -> None:
    formatted(node)
    node.stage()
    node.unstage(volume_id=f"z:csi-2:{OTHER_UUID}")
    assert node.host.mounts_at(STAGING) == 1


def test_unstage_of_a_volume_that_took_over_the_name_touches_nothing(node: FakeNode) -> None:
    formatted(node)
    node.stage()
    node.unstage(volume_id=f"z:{NAME}:{OTHER_UUID}")
    assert node.host.mounts_at(STAGING) == 1


@pytest.mark.parametrize("volume_id", ["", "no/such volume", "a:b:c:d:e", "x" * 300])
def test_unstage_of_an_id_that_is_none_succeeds(node: FakeNode, volume_id: str) -> None:
    node.unstage(volume_id=volume_id)


def test_unstage_of_a_missing_path_succeeds(node: FakeNode) -> None:
    node.unstage(staging=KUBELET / "nowhere/at/all")


@pytest.mark.parametrize("in_use", [False, True])
def test_a_dead_device_is_unstaged_even_in_use(node: FakeNode, in_use: bool) -> None:
    formatted(node)
    node.stage()
    node.host.table[0].in_use = in_use
    node.host.detach(NAME)
    node.unstage()
    assert node.host.mounts_at(STAGING) == 0


def test_a_living_mount_in_use_is_not_taken_off(node: FakeNode) -> None:
    formatted(node)
    node.stage()
    node.host.table[0].in_use = True
    with pytest.raises(PreconditionFailed, match="in use"):
        node.unstage()


def test_stacked_mounts_are_taken_off_one_by_one(node: FakeNode) -> None:
    formatted(node)
    node.stage()
    device = node.host.devices.find(NAME)
    assert device is not None
    node.host.mounts.mount(device, STAGING, "ext4", [], read_only=False)
    node.unstage()
    assert node.host.mounts_at(STAGING) == 0


def test_a_staging_path_outside_the_roots_is_not_unstaged(node: FakeNode) -> None:
    with pytest.raises(InvalidField):
        node.unstage(staging=Path("/etc"))


def test_what_another_process_staged_in_the_meantime_is_taken_and_not_mounted_again(
    node: FakeNode, monkeypatch: pytest.MonkeyPatch
) -> None:
    node.host.attach(NAME, UUID)
    remove, others = node.records.remove, [node.stage]

    def remove_while_another_stages(volume_uuid: str) -> None:
        remove(volume_uuid)
        if others:
            others.pop()()

    monkeypatch.setattr(node.records, "remove", remove_while_another_stages)
    node.stage()
    assert (node.host.formats, node.host.mounts_at(STAGING)) == ([UUID], 1)


def test_a_mount_whose_device_number_is_another_volumes_now_is_unstaged(node: FakeNode) -> None:
    formatted(node)
    node.stage()
    gone = node.host.detach(NAME)
    node.host.attach("csi-2", OTHER_UUID).number = gone.number
    node.unstage()
    assert node.host.mounts_at(STAGING) == 0


@pytest.mark.parametrize("is_renamed", [False, True])
def test_a_newer_volume_of_the_same_name_is_not_unstaged(node: FakeNode, is_renamed: bool) -> None:
    formatted(node)
    node.stage()
    if is_renamed:
        node.host.topmost(STAGING).source = "/dev/nvmesh/csi-2"  # type: ignore[union-attr]
    node.unstage(volume_id=f"z:{NAME}:{OTHER_UUID}")
    assert node.host.mounts_at(STAGING) == 1


def test_a_volume_is_staged_where_its_filesystem_is_mounted_dead_or_alive(node: FakeNode) -> None:
    formatted(node)
    is_staged = node.use.stage.is_staged
    assert not is_staged(VOLUME_ID, str(STAGING))
    node.stage()
    assert is_staged(VOLUME_ID, str(STAGING))
    assert not is_staged(f"z:{NAME}:{OTHER_UUID}", str(STAGING))
    node.host.detach(NAME)
    assert is_staged(VOLUME_ID, str(STAGING))
    node.unstage()
    assert not is_staged(VOLUME_ID, str(STAGING))


# --- what another node has taken over ---


def staged_under(node: FakeNode, attachment: int) -> dict[str, str]:
    """Stage and publish a volume under an attachment, and return the context of the next one."""
    formatted(node)
    given = publish_context(history=History.ATTACHED, attachment=attachment)
    node.stage(context=given)
    node.publish(context=given)
    return publish_context(history=History.ATTACHED, attachment=attachment + 2)


def test_what_was_mounted_under_an_earlier_attachment_is_not_published_under_the_present_one(node: FakeNode) -> None:
    """Another node had the volume in between: this kernel shows what was, and may hold back what it wrote then."""
    later = staged_under(node, 3)
    with pytest.raises(PreconditionFailed, match="under its attachment 3, and"):
        node.publish(OTHER_TARGET, context=later)
    assert node.host.mounts_at(OTHER_TARGET) == 0
    node.unpublish()
    node.unstage()
    node.stage(context=later)
    node.publish(OTHER_TARGET, context=later)


def test_what_was_mounted_under_an_earlier_attachment_is_mounted_anew_once_nobody_uses_it(node: FakeNode) -> None:
    later = staged_under(node, 3)
    with pytest.raises(PreconditionFailed, match="attachment 3, and this is attachment 5"):
        node.stage(context=later)
    node.unpublish()
    checked = node.host.disks[NAME].filesystem.checks  # type: ignore[union-attr]
    node.stage(context=later)
    assert node.host.mounts_at(STAGING) == 1
    assert node.host.disks[NAME].filesystem.checks > checked  # type: ignore[union-attr]


def test_what_was_mounted_under_an_attachment_that_nobody_counted_may_be_that_of_a_counted_one(node: FakeNode) -> None:
    """An earlier use is on record; the attachment of now was told without its number first, and with it later."""
    later = staged_under(node, 3)
    node.unpublish()
    node.unstage()
    node.stage(context=publish_context(history=History.ATTACHED, attachment=0))
    node.publish(context=later)
    node.unpublish()
    node.unstage()
    node.stage(context=later)
    with pytest.raises(PreconditionFailed, match="under its attachment 5, and"):
        node.publish(OTHER_TARGET, context=publish_context(history=History.ATTACHED, attachment=7))


@pytest.mark.parametrize("attachment", [0, 3, 2])
def test_an_attachment_that_is_not_known_to_be_later_is_the_same(node: FakeNode, attachment: int) -> None:
    staged_under(node, 3)
    again = publish_context(history=History.ATTACHED, attachment=attachment)
    node.stage(context=again)
    node.publish(OTHER_TARGET, context=again)
    assert node.host.mounts_at(OTHER_TARGET) == 1


@pytest.mark.parametrize("preempted", [False, True])
@pytest.mark.parametrize("references", [(), ("another",), (UUID,), None])
def test_a_volume_in_use_is_detached_lazily_only_once_it_was_taken_from_this_node(
    node: FakeNode, references: tuple[str, ...] | None, preempted: bool
) -> None:
    formatted(node)
    node.stage()
    entry = node.host.topmost(STAGING)
    assert entry is not None
    entry.in_use = True
    disk = node.host.disks[NAME]
    disk.status = VolumeStatus(NAME, UUID, io_enabled=False, preempted=preempted)
    disk.references = references
    if preempted or references in ((), ("another",)):
        node.unstage()
        assert (node.host.mounts_at(STAGING), node.host.lost) == (0, [disk.number])
    else:
        with pytest.raises(PreconditionFailed):
            node.unstage()
        assert node.host.mounts_at(STAGING) == 1


@pytest.mark.parametrize(("preempted", "references"), [(True, (UUID,)), (False, ()), (False, ("another",))])
def test_a_volume_whose_handle_holds_no_uuid_is_judged_by_its_name(
    node: FakeNode, references: tuple[str, ...], preempted: bool
) -> None:
    static = f"single-zone-cluster:{NAME}"
    formatted(node)
    node.stage(volume_id=static)
    entry = node.host.topmost(STAGING)
    assert entry is not None
    entry.in_use = True
    disk = node.host.disks[NAME]
    disk.status = VolumeStatus(NAME, UUID, io_enabled=False, preempted=preempted)
    disk.references = references
    if references == ("another",):
        with pytest.raises(PreconditionFailed):
            node.unstage(static)
    else:
        node.unstage(static)
    assert node.host.mounts_at(STAGING) == (references == ("another",))


@pytest.mark.parametrize("reaches_host", [True, False])
def test_mounts_that_do_not_reach_the_host_are_told_once(
    node: FakeNode, caplog: pytest.LogCaptureFixture, reaches_host: bool
) -> None:
    node.host.attach(NAME, UUID)
    node.host.mounts_reach_host = reaches_host
    for _ in range(2):
        node.stage()
        node.unstage()
    told = [
        record.getMessage() for record in caplog.records if "do not reach other mount namespaces" in record.getMessage()
    ]
    assert len(told) == (0 if reaches_host else 1)
    assert all(str(STAGING) in each for each in told)
