# SPDX-License-Identifier: Apache-2.0
"""Volumes made from a snapshot or another volume: what is used, formatted and refused (docs/data-safety.md, 56 on)."""

from __future__ import annotations

import itertools
from dataclasses import replace

import pytest

from csi_driver.errors import Denied, DriverError, PreconditionFailed
from csi_driver.host_model import Blank, Content, Filesystem, OtherContent
from csi_driver.model import BlockAccess, MountAccess
from csi_driver.node.format_policy import Evidence, Format, FormatAgain, FormatOver, Refuse, Use, decide
from csi_driver.node.usage_records import RAW, USED, UsageRecord
from csi_driver.parameters.mount_options import FilesystemRequest
from csi_driver.publish_context import Encryption, History, PublishContext
from tests.fakes.disks import MIB, FakeDisk, FakeFilesystem
from tests.fakes.luks import HEADER_BYTES, FakeLuks
from tests.fakes.node import BLOCK, EXT4, READER, STAGING, TARGET, WRITER, FakeNode, publish_context
from tests.unit.node.encrypted import SECRET, Died, dying_at

SOURCE = ("csi-source", "aaaaaaaa-9d1b-4b7e-8f6b-3f1d2c5b7a90")
COPY = ("csi-copy", "bbbbbbbb-9d1b-4b7e-8f6b-3f1d2c5b7a90")
STRANGER = "77777777-9d1b-4b7e-8f6b-3f1d2c5b7a90"
FILESYSTEMS = ("ext4", "xfs", "btrfs")
WRITABLE = FilesystemRequest("", read_only=False)
READING = FilesystemRequest("", read_only=True)


# --- the decision -------------------------------------------------------------------------------------------------


def copied(
    history: History = History.ATTACHED,
    *,
    private: bool = False,
    record: UsageRecord | None = None,
    attachment: int = 1,
) -> Evidence:
    """Return what is known of a copy."""
    context = PublishContext(
        *COPY, attachment, history, populated=True, inherited_uuids=(SOURCE[1],), private_copy=private
    )
    return Evidence(context, record, COPY[1])


def verdict_of(content: Content, asked: FilesystemRequest, evidence: Evidence) -> object:
    return decide(content, asked, evidence, supported=FILESYSTEMS)


@pytest.mark.parametrize("history", list(History))
def test_a_populated_volume_has_no_first_attachment(history: History) -> None:
    assert verdict_of(Blank(), WRITABLE, copied(history)) == Format("ext4", prove_every_block=True)


@pytest.mark.parametrize("fs_type", FILESYSTEMS)
@pytest.mark.parametrize("history", list(History))
def test_an_inherited_filesystem_is_used_and_another_is_refused(fs_type: str, history: History) -> None:
    used = []
    for uuid in (COPY[1], SOURCE[1], STRANGER, ""):
        verdict = verdict_of(Filesystem(fs_type, uuid), WRITABLE, copied(history))
        used.append(isinstance(verdict, Use))
    may_be_others = history in (History.WRITTEN, History.UNKNOWN)
    assert used == [True, True, may_be_others, may_be_others]


def test_only_an_inherited_uuid_of_btrfs_is_changed() -> None:
    for fs_type, uuid in itertools.product(FILESYSTEMS, (COPY[1], SOURCE[1])):
        verdict = verdict_of(Filesystem(fs_type, uuid), WRITABLE, copied())
        is_changed = fs_type == "btrfs" and uuid != COPY[1]
        assert verdict == Use(fs_type, new_uuid=COPY[1] if is_changed else "")


def test_a_foreign_btrfs_gets_the_uuid_of_each_copy_too() -> None:
    """Two copies of it may meet on one node."""
    assert verdict_of(Filesystem("btrfs", STRANGER), WRITABLE, copied(History.WRITTEN)) == Use(
        "btrfs", new_uuid=COPY[1]
    )


def test_no_uuid_is_changed_on_a_volume_that_is_no_copy() -> None:
    evidence = Evidence(PublishContext(*COPY, 1, History.WRITTEN), own_uuid=COPY[1])
    assert verdict_of(Filesystem("btrfs", STRANGER), WRITABLE, evidence) == Use("btrfs")


def test_reading_changes_no_uuid_but_that_of_a_private_copy() -> None:
    content = Filesystem("btrfs", SOURCE[1])
    refusal = verdict_of(content, READING, copied())
    assert isinstance(refusal, Refuse)
    assert (SOURCE[1] in refusal.reason, "stage it writable once" in refusal.reason) == (True, True)
    verdict = verdict_of(content, READING, copied(private=True))
    assert isinstance(verdict, Use)
    assert verdict.new_uuid


def test_each_private_copy_has_a_uuid_of_its_own() -> None:
    """And keeps it. It inherits the volume's own uuid as well."""
    found = []
    for attachment in (1, 2):
        evidence = copied(private=True, attachment=attachment)
        first, second = (verdict_of(Filesystem("btrfs", uuid), READING, evidence) for uuid in (COPY[1], SOURCE[1]))
        assert isinstance(first, Use)
        assert first == second
        assert verdict_of(Filesystem("btrfs", first.new_uuid), READING, evidence) == Use("btrfs")
        found.append(first.new_uuid)
    assert len({*found, COPY[1], SOURCE[1]}) == 4


def test_no_evidence_of_a_copy_lets_content_be_formatted() -> None:
    """But a permission, and a format of its own that was begun and not finished."""
    contents: tuple[Content, ...] = (
        Filesystem("ext4", SOURCE[1]),
        Filesystem("btrfs", STRANGER),
        OtherContent("unrecognised data"),
    )
    records = (None, *(UsageRecord(COPY[1], number, word) for number in (1, 2) for word in (RAW, USED)))
    count = 0
    for content, asked, history, record, private in itertools.product(
        contents, (WRITABLE, READING), History, records, (False, True)
    ):
        verdict = verdict_of(content, asked, copied(history, private=private, record=record))
        assert not isinstance(verdict, Format | FormatAgain | FormatOver)
        count += 1
    assert count == 240


# --- the node ------------------------------------------------------------------------------------------------------


def volume_id(volume: tuple[str, str]) -> str:
    return f"zone:{volume[0]}:{volume[1]}"


class Copy:
    """A source on the node, and copies of it."""

    def __init__(self, node: FakeNode, history: History = History.ATTACHED) -> None:
        self.node, self.history = node, history
        self.source = node.host.attach(*SOURCE)
        self.disk = self.source

    def use_source(self, access: MountAccess | BlockAccess = EXT4) -> None:
        """Write to the source, which stays mounted or published."""
        name, uuid = SOURCE
        staging, target = STAGING.with_name("source"), TARGET.with_name("source")
        context = publish_context(name=name, uuid=uuid)
        self.node.host.make_tree(staging)
        self.node.stage(volume_id=volume_id(SOURCE), staging=staging, access=access, context=context)
        self.node.publish(target, volume_id=volume_id(SOURCE), staging=staging, access=access, context=context)
        if isinstance(access, BlockAccess):
            self.node.host.write_raw(target, 32 * MIB, b"precious")
        else:
            self.node.host.write_file(target, "a", b"precious")

    def cut(self) -> FakeDisk:
        """Attach a copy of the source as it is now."""
        self.disk = self.node.host.attach(*COPY, like=self.source.cut())
        return self.disk

    def context(
        self, *, private: bool = False, read_only: bool = False, by: Encryption = Encryption.NONE
    ) -> dict[str, str]:
        name, uuid = COPY
        return publish_context(
            name=name, uuid=uuid, history=self.history, inherited=(SOURCE[1],), private_copy=private,
            read_only=read_only or private, encryption=by,
        )  # fmt: skip

    def stage(
        self, access: MountAccess | BlockAccess = EXT4, *, private: bool = False, read_only: bool = False
    ) -> None:
        mode = READER if private or read_only else WRITER
        context = self.context(private=private, read_only=read_only)
        self.node.stage(volume_id=volume_id(COPY), access=access, mode=mode, context=context)

    def unstage(self) -> None:
        self.node.unstage(volume_id(COPY))


@pytest.fixture
def copy(node: FakeNode) -> Copy:
    return Copy(node)


@pytest.mark.parametrize("fs_type", FILESYSTEMS)
def test_a_filesystem_is_used_on_a_populated_volume_by_its_own_or_an_inherited_uuid(copy: Copy, fs_type: str) -> None:
    """Beside its source, which is mounted."""
    copy.use_source(MountAccess(fs_type))
    copy.cut()
    for _ in range(2):
        copy.stage(MountAccess(fs_type))
        assert copy.node.host.files_at(STAGING) == {"a": b"precious"}
        copy.unstage()
    assert copy.disk.filesystem is not None
    assert copy.disk.filesystem.uuid == (COPY[1] if fs_type == "btrfs" else SOURCE[1])
    assert copy.node.host.formats == [SOURCE[1]]


def test_a_filesystem_of_a_stranger_is_refused_on_a_copy(copy: Copy) -> None:
    copy.source.filesystem = FakeFilesystem("ext4", 64 * MIB, uuid=STRANGER)
    copy.cut()
    with pytest.raises(PreconditionFailed, match=f"ext4 with the uuid {STRANGER}.*UUID mismatch"):
        copy.stage()


def test_a_copy_of_a_blank_volume_is_formatted_after_every_block_was_read(
    copy: Copy, caplog: pytest.LogCaptureFixture
) -> None:
    copy.cut()
    with caplog.at_level("INFO"):
        copy.stage()
    assert "reading every block of volume csi-copy" in caplog.text
    assert copy.node.host.formats == [COPY[1]]


@pytest.mark.parametrize("history", list(History))
def test_a_populated_volume_is_formatted_only_when_every_block_is_zero(copy: Copy, history: History) -> None:
    copy.history = history
    copy.source.raw[32 * MIB] = b"x"
    copy.cut()
    with pytest.raises(PreconditionFailed, match=f"the first at byte {32 * MIB}"):
        copy.stage()
    assert (copy.disk.raw, copy.node.host.formats) == ({32 * MIB: b"x"}, [])


@pytest.mark.parametrize("fs_type", FILESYSTEMS)
def test_a_copy_of_an_unfinished_filesystem_is_refused(copy: Copy, fs_type: str) -> None:
    """Also on the node that has the record of the source's format."""
    with dying_at(copy.node, "halfway make"), pytest.raises(Died):
        copy.use_source(MountAccess(fs_type))
    copy.node.restart()
    assert copy.node.records.kept[SOURCE[1]].filesystem == fs_type
    copy.cut()
    for access in (MountAccess(fs_type), EXT4):
        with pytest.raises(PreconditionFailed, match="nothing recognises"):
            copy.stage(access)
    assert copy.node.records.kept.keys() == {SOURCE[1]}
    copy.use_source(MountAccess(fs_type))


@pytest.mark.parametrize("point", ["before change of uuid", "after change of uuid", "before record", "before mount"])
def test_a_driver_that_dies_around_a_change_of_uuid_goes_on_from_there(copy: Copy, point: str) -> None:
    copy.use_source(MountAccess("btrfs"))
    copy.cut()
    with dying_at(copy.node, point), pytest.raises(Died):
        copy.stage(MountAccess("btrfs"))
    copy.node.restart()
    copy.stage(MountAccess("btrfs"))
    assert copy.node.host.files_at(STAGING) == {"a": b"precious"}
    assert copy.node.host.destroyed == []


@pytest.mark.parametrize("fs_type", FILESYSTEMS)
def test_the_device_of_a_private_copy_stays_writable(copy: Copy, fs_type: str) -> None:
    """Its log is replayed, and nobody can write to the mount."""
    copy.use_source(MountAccess(fs_type))
    copy.cut()
    for _ in range(2):  # the second time it is mounted already
        copy.stage(MountAccess(fs_type), private=True)
        entry = copy.node.host.topmost(STAGING)
        assert entry is not None
        assert (entry.read_only, copy.disk.read_only) == (True, False)
        assert copy.node.host.files_at(STAGING) == {"a": b"precious"}
    context = copy.context(private=True)
    copy.node.publish(
        volume_id=volume_id(COPY), access=MountAccess(fs_type), mode=READER, read_only=True, context=context
    )
    assert copy.node.host.files_at(TARGET) == {"a": b"precious"}


@pytest.mark.parametrize("fs_type", FILESYSTEMS)
def test_a_reader_that_joined_leaves_no_log_of_a_private_copy_unread(copy: Copy, fs_type: str) -> None:
    """Nor is its device made read-only, although the first reader has left."""
    copy.use_source(MountAccess(fs_type))
    copy.cut()
    context, stagings = copy.context(private=True), (STAGING, STAGING.with_name("second"))
    handles = [f"{volume_id(COPY)}:team-{letter}" for letter in "ab"]
    copy.node.host.make_tree(stagings[1])
    access = MountAccess(fs_type)
    for handle, staging in zip(handles, stagings, strict=True):
        copy.node.stage(volume_id=handle, staging=staging, access=access, mode=READER, context=context)
    copy.node.unstage(handles[0], stagings[0])
    copy.node.publish(
        volume_id=handles[1], staging=stagings[1], access=access, mode=READER, read_only=True, context=context
    )
    entry = copy.node.host.topmost(TARGET)
    assert entry is not None
    assert not entry.options & {"noload", "norecovery", "rescue=nologreplay"}
    assert copy.disk.read_only is False


def test_the_device_of_another_reader_is_made_read_only(copy: Copy) -> None:
    copy.use_source()
    copy.cut()
    copy.stage(read_only=True)
    assert copy.disk.read_only


def test_a_blank_private_copy_is_not_formatted(copy: Copy) -> None:
    copy.cut()
    with pytest.raises(PreconditionFailed, match="never formatted"):
        copy.stage(private=True)
    assert not copy.disk.is_written


def test_a_private_copy_is_published_raw_through_a_read_only_device(copy: Copy) -> None:
    copy.use_source(BLOCK)
    copy.cut()
    copy.stage(BLOCK, private=True)
    context = copy.context(private=True)
    copy.node.publish(volume_id=volume_id(COPY), access=BLOCK, mode=READER, read_only=True, context=context)
    entry = copy.node.host.topmost(TARGET)
    assert entry is not None
    assert entry.node is not None
    assert (entry.node.read_only, entry.node.ground is copy.disk, copy.disk.read_only) == (True, True, False)


def test_a_larger_copy_grows_when_it_is_staged(copy: Copy) -> None:
    copy.use_source()
    copy.cut()
    copy.disk.size_bytes = 128 * MIB
    copy.stage()
    assert copy.disk.filesystem is not None
    assert copy.disk.filesystem.size_bytes == 128 * MIB


def test_a_filesystem_is_restored_to_a_block_volume_and_back(copy: Copy) -> None:
    """As backup programs do it."""
    copy.use_source()
    copy.cut()
    copy.stage(BLOCK)
    copy.node.publish(volume_id=volume_id(COPY), access=BLOCK, context=copy.context())
    copy.node.unpublish(volume_id=volume_id(COPY))
    copy.unstage()
    copy.source, copy.history = copy.disk, History.WRITTEN
    copy.cut()
    copy.stage()
    assert copy.node.host.files_at(STAGING) == {"a": b"precious"}


SOURCES = ("blank", "unfinished", "foreign filesystem", "partition table", "raw", "ext4", "xfs", "btrfs")


def fill(copy: Copy, what: str) -> None:
    disk = copy.source
    match what:
        case "unfinished":
            disk.filesystem = FakeFilesystem("ext4", 64 * MIB, complete=False)
        case "foreign filesystem":
            disk.filesystem = FakeFilesystem("ext4", 64 * MIB, uuid=STRANGER, files={"a": b"precious"})
        case "partition table":
            disk.signature = "a partition table (gpt)"
        case "raw":
            copy.use_source(BLOCK)
        case "ext4" | "xfs" | "btrfs":
            copy.use_source(MountAccess(what))


@pytest.mark.parametrize("what", SOURCES)
@pytest.mark.parametrize("history", list(History))
@pytest.mark.parametrize("fs_type", FILESYSTEMS)
@pytest.mark.parametrize("private", [False, True])
def test_no_copy_loses_content_whatever_its_source_held(
    copy: Copy, what: str, history: History, fs_type: str, private: bool
) -> None:
    copy.history = history
    fill(copy, what)
    before = copy.cut().cut()
    for access in (MountAccess(fs_type), BLOCK, EXT4):
        try:
            copy.stage(access, private=private)
        except DriverError:
            continue
        copy.unstage()
    after = copy.disk.cut()
    assert copy.node.host.destroyed == []
    assert (after.raw, after.signature) == (before.raw, before.signature)
    if before.filesystem is not None:
        assert after.filesystem is not None
        kept = replace(after.filesystem, uuid=before.filesystem.uuid, checks=0)
        assert kept == replace(before.filesystem, checks=0)
    elif after.filesystem is not None:
        assert (what, private) == ("blank", False)


# --- encryption ----------------------------------------------------------------------------------------------------


def encrypted_copy(copy: Copy, label: str = SOURCE[1]) -> None:
    """Attach a copy of an encrypted source with a filesystem whose log is not empty."""
    inner = copy.node.host.inner_disk(copy.source, HEADER_BYTES)
    inner.filesystem = FakeFilesystem("xfs", inner.size_bytes, files={"a": b"precious"}, uuid=SOURCE[1])
    copy.source.luks = FakeLuks(inner, label, [SECRET["passphrase"]])
    copy.cut()


def stage_encrypted(copy: Copy, secrets: dict[str, str] = SECRET, *, private: bool = False) -> None:
    mode, context = READER if private else WRITER, copy.context(private=private, by=Encryption.LUKS)
    copy.node.stage(volume_id=volume_id(COPY), access=MountAccess("xfs"), mode=mode, context=context, secrets=secrets)


def test_an_inherited_luks_header_is_opened_and_another_is_refused(copy: Copy) -> None:
    encrypted_copy(copy)
    stage_encrypted(copy)
    assert copy.node.host.files_at(STAGING) == {"a": b"precious"}
    copy.unstage()
    assert copy.disk.luks is not None
    copy.disk.luks.label = STRANGER
    with pytest.raises(PreconditionFailed, match=f"the LUKS header of volume {STRANGER}"):
        stage_encrypted(copy)


def test_a_copy_is_opened_with_the_passphrase_of_its_source_and_gets_one_of_its_own(copy: Copy) -> None:
    encrypted_copy(copy)
    with pytest.raises(Denied, match="passphrase of its source: set that as previousPassphrase"):
        stage_encrypted(copy, {"passphrase": "of the copy"})
    stage_encrypted(copy, {"passphrase": "of the copy", "previousPassphrase": SECRET["passphrase"]})
    assert copy.disk.luks is not None
    assert copy.source.luks is not None
    assert (copy.disk.luks.keys, copy.source.luks.keys) == (["of the copy"], [SECRET["passphrase"]])


def test_the_log_of_an_encrypted_private_copy_is_replayed(copy: Copy) -> None:
    encrypted_copy(copy)
    for _ in range(2):
        stage_encrypted(copy, private=True)
        assert copy.node.host.files_at(STAGING) == {"a": b"precious"}
        entry, mapper = copy.node.host.topmost(STAGING), copy.node.host.mappers[COPY[0]]
        assert entry is not None
        assert (entry.read_only, mapper.read_only) == (True, False)
    copy.unstage()
    assert COPY[0] not in copy.node.host.mappers


def test_reading_a_private_copy_changes_no_passphrase(copy: Copy) -> None:
    encrypted_copy(copy)
    secrets = {"passphrase": "of the copy", "previousPassphrase": SECRET["passphrase"]}
    stage_encrypted(copy, secrets, private=True)
    assert copy.disk.luks is not None
    assert copy.disk.luks.keys == [SECRET["passphrase"]]


def test_an_encrypted_private_copy_that_an_older_driver_left_open_read_only_is_opened_again(copy: Copy) -> None:
    encrypted_copy(copy)
    stage_encrypted(copy, private=True)
    copy.node.host.table.clear()
    copy.node.host.mappers[COPY[0]].read_only = True
    assert copy.disk.luks is not None
    copy.disk.luks.inner.filesystem = FakeFilesystem("xfs", 48 * MIB, log={"a": b"precious"}, uuid=SOURCE[1])
    stage_encrypted(copy, private=True)
    assert copy.node.host.files_at(STAGING) == {"a": b"precious"}
