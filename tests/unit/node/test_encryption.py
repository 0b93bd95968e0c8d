"""Encrypted volumes on a machine in memory: what is opened, over what, and that nothing is lost on the way."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager

import pytest

from csi_driver.errors import (
    CapacityOutOfRange,
    Denied,
    ExistsDifferently,
    InvalidField,
    InvalidRequest,
    MissingField,
    PreconditionFailed,
    StorageUnavailable,
    SystemCallFailed,
)
from csi_driver.model import AccessMode, BlockAccess, MountAccess
from csi_driver.node.usage_records import LUKS, UsageRecord
from csi_driver.publish_context import Encryption, History
from tests.fakes.host import MIB, FakeDisk, FakeFilesystem
from tests.fakes.luks import HEADER_BYTES, FakeLuks
from tests.fakes.node import BLOCK, EXT4, KUBELET, NAME, OTHER_UUID, READER, STAGING, TARGET, UUID, FakeNode
from tests.fakes.node import publish_context as plain_context

SECRET = {"passphrase": "correct horse"}
WRONG = {"passphrase": "another horse"}
OPENED = f"/dev/mapper/{NAME}"


def context(by: Encryption = Encryption.LUKS, *, attachment: int = 1, read_only: bool = False) -> dict[str, str]:
    history = History.FIRST if attachment == 1 else History.ATTACHED
    return plain_context(encryption=by, attachment=attachment, history=history, read_only=read_only)


class Locked:
    """A node with one volume, and its calls with the arguments of an encrypted one."""

    def __init__(self, node: FakeNode, by: Encryption = Encryption.LUKS) -> None:
        self.node, self.by, self.attachment = node, by, 1
        self.secrets: Mapping[str, str] = SECRET
        self.parameters: Mapping[str, str] = {}
        self.access: MountAccess | BlockAccess = EXT4
        self.disk = node.host.attach(NAME, UUID)
        if by is Encryption.NATIVE:
            self.make_native()

    def make_native(self) -> FakeLuks:
        """Make the header as the storage does: with its own label and the passphrase."""
        luks = FakeLuks(self.node.host.inner_disk(self.disk, HEADER_BYTES), "", ["correct horse"], subsystem="")
        self.disk.luks = luks
        return luks

    @property
    def luks(self) -> FakeLuks:
        assert self.disk.luks is not None
        return self.disk.luks

    @property
    def mapper(self) -> FakeDisk | None:
        return self.node.host.mappers.get(NAME)

    def stage(self, *, read_only: bool = False) -> None:
        given = context(self.by, attachment=self.attachment, read_only=read_only)
        self.node.stage(
            access=self.access,
            context=given,
            volume_context=self.parameters,
            secrets=self.secrets,
        )

    def publish(self, *, read_only: bool = False) -> None:
        given = context(self.by, attachment=self.attachment)
        self.node.publish(access=self.access, context=given, read_only=read_only)

    def up(self) -> None:
        self.stage()
        self.publish()

    def down(self) -> None:
        self.node.unpublish()
        self.node.unstage()

    def reattach(self) -> None:
        """Detach the volume and attach it again."""
        self.disk = self.node.host.attach(NAME, UUID, like=self.node.host.detach(NAME))
        self.attachment += 1

    def source(self) -> str:
        """Return what is mounted or bound at the target."""
        entry = self.node.host.topmost(TARGET)
        assert entry is not None
        return entry.source if entry.node is None else str(entry.node.path)


@pytest.fixture
def locked(node: FakeNode) -> Locked:
    return Locked(node)


@pytest.fixture
def native(node: FakeNode) -> Locked:
    return Locked(node, Encryption.NATIVE)


@pytest.mark.parametrize("access", [EXT4, BLOCK])
def test_no_header_is_made_where_nothing_can_open_it(locked: Locked, access: MountAccess | BlockAccess) -> None:
    locked.access = access
    locked.node.host.mapper_problem = "this kernel has no device-mapper; run `modprobe dm_crypt` on the node"
    with pytest.raises(PreconditionFailed, match=r"cannot be opened on this node: .* run `modprobe dm_crypt`"):
        locked.stage()
    assert (locked.disk.luks, locked.node.records.kept) == (None, {})
    locked.node.host.mapper_problem = ""
    locked.up()


@pytest.mark.parametrize("access", [EXT4, BLOCK])
@pytest.mark.parametrize("history", list(History))
def test_a_header_of_another_maker_is_opened_only_where_the_volume_is_another_makers_too(
    locked: Locked, access: MountAccess | BlockAccess, history: History
) -> None:
    """Volumes of one StorageClass may share a passphrase: it would open what another one left on reused space."""
    locked.make_native().inner.filesystem = FakeFilesystem("ext4", 48 * MIB, uuid=OTHER_UUID)
    given = plain_context(encryption=Encryption.LUKS, attachment=1, history=history)
    if history is History.UNKNOWN:
        locked.node.stage(access=access, context=given, secrets=SECRET)
        assert locked.mapper is not None
        return
    with pytest.raises(PreconditionFailed, match="not made for it"):
        locked.node.stage(access=access, context=given, secrets=SECRET)
    assert locked.mapper is None
    assert locked.disk.luks is not None


# --- what a failed call leaves ---------------------------------------------------------------------------------


def failing_at(node: FakeNode, point: str, failure: Exception) -> Callable[[str], None]:
    def step(passed: str) -> None:
        if passed == point:
            raise failure

    return step


@pytest.mark.parametrize(
    ("access", "point"),
    [
        (BLOCK, "after open"),
        (EXT4, "after open"),
        (EXT4, "before make"),
        (EXT4, "before mount"),
        (MountAccess("xfs"), "before grow"),
    ],
)
def test_a_stage_that_is_refused_leaves_nothing_mounted_and_nothing_open(
    locked: Locked, access: MountAccess | BlockAccess, point: str
) -> None:
    """After such an error kubelet takes the volume for not staged: it never unstages it, and lets it be detached."""
    locked.access = access
    if point == "before grow":
        locked.stage()
        locked.node.unstage()
        assert locked.luks.inner.filesystem is not None
        locked.luks.inner.filesystem.size_bytes -= 16 * MIB
    locked.node.host.step = failing_at(locked.node, point, SystemCallFailed(point, 5))
    with pytest.raises(SystemCallFailed, match=point):
        locked.stage()
    assert (locked.mapper, locked.node.host.table) == (None, [])
    locked.node.host.step = lambda point: None
    locked.up()


def test_a_stage_that_goes_on_with_the_same_call_keeps_the_volume_open(locked: Locked) -> None:
    locked.node.host.step = failing_at(locked.node, "before mount", StorageUnavailable("later"))
    with pytest.raises(StorageUnavailable, match="later"):
        locked.stage()
    assert locked.mapper is not None


def test_what_cannot_be_undone_is_told_so_that_it_is_unstaged(locked: Locked) -> None:
    def step(passed: str) -> None:
        if passed == "before mount":
            assert locked.mapper is not None
            locked.mapper.claimed = 99
            raise SystemCallFailed("mount", 5)

    locked.node.host.step = step
    with pytest.raises(StorageUnavailable, match=r"mount: .*the cleanup after it failed: .*busy"):
        locked.stage()


def test_a_stage_that_is_refused_leaves_alone_what_is_in_use(locked: Locked) -> None:
    locked.up()
    with pytest.raises(ExistsDifferently):
        locked.node.stage(access=MountAccess("ext4", ("noexec",)), context=context(), secrets=SECRET)
    with pytest.raises(Denied):
        locked.node.stage(staging=KUBELET / "plugins/staging", context=context(), secrets=WRONG)
    assert locked.mapper is not None
    assert locked.node.host.mounts_at(TARGET) == 1


# --- several nodes at once -------------------------------------------------------------------------------------


def shared(locked: Locked, given: Mapping[str, str] | None = None) -> None:
    locked.node.stage(
        access=BLOCK,
        mode=AccessMode.MULTI_NODE_MULTI_WRITER,
        context=given or context(attachment=2),
        secrets=locked.secrets,
    )


@pytest.mark.parametrize("format_allowed", [False, True])
def test_no_header_is_made_where_another_node_may_make_one_at_the_same_time(
    locked: Locked, format_allowed: bool
) -> None:
    """Each would prove it blank, and the later header would be the end of what was written under the earlier one."""
    given = plain_context(
        encryption=Encryption.LUKS, attachment=2, history=History.WRITTEN, format_allowed=format_allowed
    )
    with pytest.raises(PreconditionFailed, match="other nodes may write"):
        shared(locked, given)
    assert locked.disk.luks is None


def test_a_volume_with_a_header_is_opened_by_several_nodes(locked: Locked) -> None:
    locked.access = BLOCK
    locked.stage()
    locked.node.unstage()
    shared(locked)
    assert locked.mapper is not None


def test_no_key_is_changed_where_another_node_may_change_one_at_the_same_time(locked: Locked) -> None:
    locked.access = BLOCK
    locked.stage()
    locked.node.unstage()
    locked.secrets = {"passphrase": "new passphrase", "previousPassphrase": "correct horse"}
    shared(locked)
    assert (locked.luks.keys, locked.mapper is None) == (["correct horse"], False)


# --- luks: the node makes the header ------------------------------------------------------------------------------


def test_a_blank_volume_gets_a_header_with_its_uuid_and_a_filesystem_inside(locked: Locked) -> None:
    locked.up()
    assert (locked.luks.label, locked.luks.subsystem, locked.luks.keys) == (UUID, "nvmesh-csi", ["correct horse"])
    assert locked.disk.filesystem is None
    assert locked.luks.inner.filesystem is not None
    assert locked.source() == OPENED


def test_the_opened_device_is_smaller_than_the_volume_by_its_header_and_that_is_right(locked: Locked) -> None:
    locked.stage()
    assert locked.mapper is not None
    assert locked.mapper.size_bytes == locked.disk.size_bytes - HEADER_BYTES


def test_unstage_closes_the_volume(locked: Locked) -> None:
    locked.up()
    locked.down()
    assert locked.mapper is None
    locked.node.unstage()


def test_data_is_there_again_after_the_volume_was_attached_again(locked: Locked) -> None:
    locked.up()
    locked.node.host.write_file(TARGET, "a", b"kept")
    locked.down()
    locked.reattach()
    locked.up()
    assert locked.node.host.files_at(TARGET) == {"a": b"kept"}
    assert locked.node.host.formats == [UUID]


@pytest.mark.parametrize("change", ["filesystem", "signature", "raw"])
def test_a_volume_with_anything_on_it_gets_no_header(locked: Locked, change: str) -> None:
    disk = locked.disk
    if change == "filesystem":
        disk.filesystem = FakeFilesystem("ext4", disk.size_bytes, uuid=UUID)
    elif change == "signature":
        disk.signature = "LVM2_member (raid)"
    else:
        disk.raw[4096] = b"x"
    with pytest.raises(PreconditionFailed):
        locked.stage()
    assert disk.luks is None
    assert locked.node.host.destroyed == []


def test_a_volume_attached_before_gets_a_header_only_when_every_block_is_zero(locked: Locked) -> None:
    locked.attachment = 2
    locked.disk.raw[32 * MIB] = b"x"
    with pytest.raises(PreconditionFailed, match="throughout"):
        locked.stage()
    assert locked.disk.luks is None
    locked.disk.raw.clear()
    locked.stage()
    assert locked.luks.keys == ["correct horse"]


def test_a_device_smaller_than_its_volume_gets_no_header(locked: Locked) -> None:
    locked.disk.size_bytes = 63 * MIB
    with pytest.raises(PreconditionFailed, match="expected 67108864 bytes"):
        locked.stage()
    assert locked.disk.luks is None


def test_a_finished_header_has_no_mark(locked: Locked) -> None:
    locked.access = BLOCK
    locked.stage()
    assert locked.node.records.read(UUID) is None


def test_a_blank_volume_that_is_to_be_read_only_gets_no_header(locked: Locked) -> None:
    with pytest.raises(PreconditionFailed, match="blank"):
        locked.stage(read_only=True)
    assert locked.disk.luks is None


def test_a_short_passphrase_makes_no_header_and_opens_an_old_one(locked: Locked) -> None:
    locked.secrets = {"passphrase": "short"}
    with pytest.raises(InvalidRequest, match="got 5"):
        locked.stage()
    assert locked.disk.luks is None
    locked.secrets = SECRET
    locked.up()
    locked.down()
    locked.luks.keys = ["short"]
    locked.secrets = {"passphrase": "short"}
    locked.up()


def test_the_header_of_another_volume_is_refused(locked: Locked) -> None:
    locked.up()
    locked.down()
    locked.luks.label = OTHER_UUID
    with pytest.raises(PreconditionFailed, match=OTHER_UUID):
        locked.stage()
    assert locked.luks.keys == ["correct horse"]


@pytest.mark.parametrize("state", ["damaged", "no key"])
def test_a_header_that_nothing_opens_is_refused_and_never_made_again(locked: Locked, state: str) -> None:
    locked.up()
    locked.down()
    if state == "damaged":
        locked.luks.is_damaged = True
    else:
        locked.luks.keys.clear()
    before = locked.luks
    with pytest.raises(PreconditionFailed):
        locked.stage()
    assert locked.disk.luks is before
    assert locked.node.host.destroyed == []


def test_what_the_storage_class_says_of_the_header_is_done(locked: Locked) -> None:
    locked.parameters = {
        "encryption/cipher": "aes-cbc-essiv:sha256",
        "encryption/keySize": "256",
        "encryption/pbkdf": "argon2id",
        "encryption/pbkdfMemory": "32768",
        "encryption/allowDiscards": "true",
    }
    locked.stage()
    settings = locked.luks.settings
    shown = (settings.cipher, settings.key_bits, settings.pbkdf, settings.pbkdf_memory_kib)
    assert shown == ("aes-cbc-essiv:sha256", 256, "argon2id", 32768)
    assert locked.luks.opened_with_discards


def test_discards_stay_off_and_the_memory_bounded_unless_asked(locked: Locked) -> None:
    locked.stage()
    assert not locked.luks.opened_with_discards
    assert locked.luks.settings.pbkdf_memory_kib == 65536


# --- native: the storage made the header ----------------------------------------------------------------------------


def test_a_native_volume_is_only_opened(native: Locked) -> None:
    header = native.luks
    native.up()
    assert native.disk.luks is header
    assert (header.keys, native.source()) == (["correct horse"], OPENED)
    assert header.inner.filesystem is not None


def test_a_native_volume_without_its_header_gets_none_from_us(native: Locked) -> None:
    native.disk.luks = None
    with pytest.raises(PreconditionFailed, match="no LUKS header"):
        native.stage()
    assert native.disk.luks is None


def test_keys_of_a_native_volume_are_left_alone(native: Locked) -> None:
    native.secrets = {"passphrase": "new passphrase", "previousPassphrase": "correct horse"}
    native.up()
    assert native.luks.keys == ["correct horse"]


# --- passphrases --------------------------------------------------------------------------------------------------


def test_a_wrong_passphrase_is_denied_and_changes_nothing(locked: Locked) -> None:
    locked.up()
    locked.node.host.write_file(TARGET, "a", b"kept")
    locked.down()
    locked.reattach()
    locked.secrets = WRONG
    with pytest.raises(Denied):
        locked.stage()
    locked.secrets = SECRET
    locked.up()
    assert locked.node.host.files_at(TARGET) == {"a": b"kept"}
    assert locked.node.host.destroyed == []


def test_a_wrong_passphrase_is_denied_also_where_the_volume_is_open_already(locked: Locked) -> None:
    locked.stage()
    other = KUBELET / "plugins/staging2/globalmount"
    locked.node.host.make_tree(other)
    with pytest.raises(Denied):
        locked.node.stage(staging=other, context=context(), secrets=WRONG)


@pytest.mark.parametrize("access", [EXT4, BLOCK], ids=["mount", "block"])
def test_without_a_secret_the_message_names_its_keys(locked: Locked, access: MountAccess | BlockAccess) -> None:
    locked.secrets, locked.access = {}, access
    with pytest.raises(MissingField, match=r"passphrase.*dmcryptKey"):
        locked.stage()
    assert locked.disk.luks is None


def test_the_secret_of_the_older_driver_does(locked: Locked) -> None:
    locked.secrets = {"dmcryptKey": "correct horse"}
    locked.stage()
    assert locked.luks.keys == ["correct horse"]


@pytest.mark.parametrize("key", ["correct horse", "correct horse\n"])
def test_a_line_feed_at_the_end_of_the_secret_is_no_part_of_a_new_passphrase(locked: Locked, key: str) -> None:
    locked.secrets = {"dmcryptKey": key}
    locked.stage()
    assert locked.luks.keys == ["correct horse"]


@pytest.mark.parametrize(
    ("secret", "key"),
    [
        ("one line\n", "one line"),
        ("one line\n", "one line\n"),
        ("several\nlines\n", "several"),
        ("several\nlines\n", "several\nlines\n"),
    ],
)
def test_a_header_is_opened_however_its_maker_understood_the_secret(native: Locked, secret: str, key: str) -> None:
    native.luks.keys[:] = [key]
    native.secrets = {"dmcryptKey": secret}
    native.up()
    native.disk.size_bytes = 128 * MIB
    native.node.expand(required_bytes=112 * MIB, staging=STAGING, secrets=native.secrets)
    assert native.luks.keys == [key]


def test_two_passphrases_that_differ_are_refused_without_showing_them(locked: Locked) -> None:
    locked.secrets = {"dmcryptKey": "correct horse", "passphrase": "other horse"}
    with pytest.raises(InvalidRequest) as refusal:
        locked.stage()
    assert "horse" not in str(refusal.value)


def test_a_secret_for_a_volume_that_nobody_encrypts_warns(locked: Locked, caplog: pytest.LogCaptureFixture) -> None:
    locked.by = Encryption.NONE
    locked.stage()
    assert "has a passphrase" in caplog.text
    assert "horse" not in caplog.text
    assert locked.disk.filesystem is not None


# --- changing the passphrase -------------------------------------------------------------------------------------

ROTATION = {"passphrase": "new passphrase", "previousPassphrase": "correct horse"}


@pytest.fixture
def in_use(locked: Locked) -> Locked:
    """A volume with data, attached for the second time."""
    locked.up()
    locked.node.host.write_file(TARGET, "a", b"kept")
    locked.down()
    locked.reattach()
    return locked


def test_the_new_passphrase_takes_the_place_of_the_previous_one(in_use: Locked) -> None:
    in_use.secrets = ROTATION
    in_use.up()
    assert in_use.luks.keys == ["new passphrase"]
    assert in_use.node.host.files_at(TARGET) == {"a": b"kept"}


def test_neither_passphrase_fitting_is_denied(in_use: Locked) -> None:
    in_use.secrets = {"passphrase": "new passphrase", "previousPassphrase": "no horse"}
    with pytest.raises(Denied):
        in_use.stage()
    assert in_use.luks.keys == ["correct horse"]


def test_a_reader_opens_with_the_previous_passphrase_and_changes_no_key(in_use: Locked) -> None:
    in_use.secrets = ROTATION
    in_use.stage(read_only=True)
    assert in_use.luks.keys == ["correct horse"]


def test_a_previous_passphrase_left_in_the_secret_costs_nothing_after_the_change(in_use: Locked) -> None:
    in_use.secrets = ROTATION
    in_use.up()
    in_use.down()
    in_use.node.host.encryption.tried.clear()
    in_use.stage()
    assert in_use.node.host.encryption.tried == ["new passphrase"]


def test_a_key_that_nobody_named_stays(in_use: Locked) -> None:
    in_use.secrets = ROTATION
    in_use.luks.keys[:] = ["new passphrase", "for the safe"]
    in_use.up()
    assert in_use.luks.keys == ["new passphrase", "for the safe"]


ROTATION_POINTS = ["before luksAddKey", "after luksAddKey", "before luksRemoveKey", "after luksRemoveKey"]


@pytest.mark.parametrize("point", ROTATION_POINTS)
def test_a_change_of_passphrase_that_is_cut_off_leaves_one_that_opens_and_is_finished_next(
    in_use: Locked, point: str
) -> None:
    in_use.secrets = ROTATION
    with dying_at(in_use.node, point), pytest.raises(Died):
        in_use.stage()
    assert set(in_use.luks.keys) & set(ROTATION.values())
    in_use.node.restart()
    in_use.up()
    assert in_use.luks.keys == ["new passphrase"]
    assert in_use.node.host.files_at(TARGET) == {"a": b"kept"}


# --- raw block -----------------------------------------------------------------------------------------------------


@pytest.fixture
def block(locked: Locked) -> Locked:
    locked.access = BLOCK
    return locked


def test_an_encrypted_block_volume_publishes_the_opened_device(block: Locked) -> None:
    block.up()
    assert block.source() == OPENED
    block.node.host.write_raw(TARGET, 0, b"written")
    assert block.disk.raw == {}
    assert block.luks.inner.raw == {0: b"written"}


def test_an_encrypted_block_volume_that_is_not_open_is_not_published(block: Locked) -> None:
    block.stage()
    block.node.host.mappers.clear()
    with pytest.raises(PreconditionFailed, match="not open"):
        block.publish()
    assert block.node.host.topmost(TARGET) is None


def test_a_volume_with_our_header_is_not_staged_as_an_unencrypted_block_device(block: Locked) -> None:
    block.up()
    block.down()
    block.by = Encryption.NONE
    with pytest.raises(PreconditionFailed, match="holds a LUKS header of this driver"):
        block.stage()


def test_an_open_volume_is_not_published_as_an_unencrypted_one(block: Locked) -> None:
    block.stage()
    block.by = Encryption.NONE
    with pytest.raises(PreconditionFailed, match="not encrypted, but is open"):
        block.publish()


def test_what_a_user_encrypts_in_a_block_volume_is_the_users(block: Locked) -> None:
    block.by, block.secrets = Encryption.NONE, {}
    luks = block.make_native()
    block.up()
    assert block.disk.luks is luks
    assert block.source() == f"/dev/nvmesh/{NAME}"


def test_a_read_only_publication_beside_writers_gets_a_read_only_device_over_the_opened_one(block: Locked) -> None:
    block.stage()
    block.publish(read_only=True)
    entry = block.node.host.topmost(TARGET)
    assert entry is not None
    assert entry.node is not None
    assert (entry.node.read_only, entry.node.backing) == (True, block.mapper)
    block.down()
    assert block.mapper is None


def test_a_read_only_attachment_is_opened_read_only(block: Locked) -> None:
    block.up()
    block.down()
    block.reattach()
    block.stage(read_only=True)
    assert block.mapper is not None
    assert block.mapper.read_only


def test_a_block_volume_that_was_written_is_never_given_another_header(block: Locked) -> None:
    block.up()
    block.node.host.write_raw(TARGET, 0, b"written")
    block.down()
    block.disk.luks = None
    block.disk.raw[20 * MIB] = b"ciphertext"
    with pytest.raises(PreconditionFailed):
        block.stage()
    assert block.disk.luks is None


def test_other_readers_keep_the_volume_open(block: Locked) -> None:
    block.up()
    block.node.unstage()
    assert block.mapper is not None
    block.down()
    assert block.mapper is None


# --- what is there already -----------------------------------------------------------------------------------------


def test_staging_again_changes_nothing(locked: Locked) -> None:
    locked.stage()
    locked.stage()
    assert locked.node.host.mounts_at(STAGING) == 1
    assert locked.node.host.formats == [UUID]


def test_an_opened_device_over_another_volume_is_refused(locked: Locked) -> None:
    locked.stage()
    mapper = locked.mapper
    assert mapper is not None
    locked.node.host.table.clear()
    other = locked.node.host.attach("csi-2", OTHER_UUID)
    mapper.below = other
    with pytest.raises(PreconditionFailed, match="expected it over device"):
        locked.stage()


def test_an_opened_device_of_another_header_is_refused(locked: Locked) -> None:
    locked.stage()
    locked.node.host.table.clear()
    locked.luks.uuid = OTHER_UUID
    with pytest.raises(PreconditionFailed, match="another LUKS header"):
        locked.stage()


def test_what_is_open_over_another_device_is_not_published(block: Locked) -> None:
    block.stage()
    assert block.mapper is not None
    block.mapper.below = block.node.host.attach("csi-2", OTHER_UUID)
    with pytest.raises(PreconditionFailed, match="not open"):
        block.publish()
    assert block.node.host.topmost(TARGET) is None


def test_what_turns_out_to_be_open_over_another_device_is_not_used(locked: Locked) -> None:
    other = locked.node.host.attach("csi-2", OTHER_UUID)

    def step(reached: str) -> None:
        if reached == "after open" and locked.mapper is not None:
            locked.mapper.below = other

    locked.node.host.step = step
    with pytest.raises(PreconditionFailed, match=OPENED):
        locked.stage()
    assert locked.node.host.table == []


def test_a_suspended_device_is_resumed_before_it_is_used(locked: Locked) -> None:
    locked.stage()
    locked.node.host.table.clear()
    assert locked.mapper is not None
    locked.mapper.is_suspended = True
    locked.stage()
    assert not locked.mapper.is_suspended


def test_a_volume_open_read_only_and_in_use_is_not_opened_writable(locked: Locked) -> None:
    locked.up()
    locked.down()
    locked.stage(read_only=True)
    locked.disk.read_only = False
    other = KUBELET / "plugins/staging2/globalmount"
    locked.node.host.make_tree(other)
    with pytest.raises(PreconditionFailed, match="open read-only"):
        locked.node.stage(staging=other, context=context(attachment=2), secrets=SECRET)


def test_unstage_leaves_what_is_open_for_another_volume_of_the_name(locked: Locked) -> None:
    locked.stage()
    locked.node.host.table.clear()
    locked.node.unstage(volume_id=f"z:{NAME}:{OTHER_UUID}")
    assert locked.mapper is not None


def test_a_mapped_device_that_is_no_encryption_is_left_alone(locked: Locked) -> None:
    strange = locked.node.host.inner_disk(locked.disk, HEADER_BYTES)
    strange.is_gone = False
    locked.node.host.mappers[NAME] = strange
    with pytest.raises(PreconditionFailed, match="another mapped device"):
        locked.stage()
    locked.node.unstage()
    assert locked.mapper is strange


def test_an_opened_device_whose_volume_is_gone_is_closed_and_opened_anew(locked: Locked) -> None:
    locked.up()
    locked.node.host.table.clear()
    locked.reattach()
    locked.up()
    assert locked.mapper is not None
    assert locked.mapper.below is locked.disk


def test_a_mount_over_an_opened_device_whose_volume_came_back_is_taken_off(locked: Locked) -> None:
    locked.up()
    locked.node.host.write_file(TARGET, "a", b"kept")
    locked.reattach()
    with pytest.raises(PreconditionFailed, match="busy"):
        locked.stage()
    locked.node.unpublish()
    locked.up()
    assert locked.mapper is not None
    assert locked.mapper.below is locked.disk
    assert locked.node.host.mounts_at(STAGING) == 1
    assert locked.node.host.files_at(TARGET) == {"a": b"kept"}


def test_an_opened_device_that_is_held_hinders_unstage_unless_its_volume_is_gone(locked: Locked) -> None:
    locked.stage()
    assert locked.mapper is not None
    locked.mapper.claimed = 7
    with pytest.raises(PreconditionFailed, match="busy"):
        locked.node.unstage()
    locked.node.host.detach(NAME)
    locked.node.unstage()
    assert locked.mapper is not None


def test_a_volume_left_open_read_only_is_opened_writable(locked: Locked) -> None:
    locked.up()
    locked.down()
    locked.stage(read_only=True)
    locked.node.host.table.clear()
    locked.disk.read_only = False
    locked.up()
    assert locked.mapper is not None
    assert not locked.mapper.read_only


def test_the_plain_device_mounted_where_encryption_is_wanted_is_refused(locked: Locked) -> None:
    locked.by, locked.secrets = Encryption.NONE, {}
    locked.stage()
    locked.by, locked.secrets = Encryption.LUKS, SECRET
    with pytest.raises(PreconditionFailed):
        locked.stage()
    with pytest.raises(PreconditionFailed):
        locked.publish()


def test_an_unknown_kind_of_encryption_is_not_touched(locked: Locked) -> None:
    given = plain_context() | {"encryption": "quantum"}
    with pytest.raises(PreconditionFailed, match="unknown kind of encryption"):
        locked.node.stage(context=given, secrets=SECRET)
    with pytest.raises(PreconditionFailed, match="unknown kind of encryption"):
        locked.node.publish(context=given)


def test_another_access_at_the_staging_path_is_told_apart(locked: Locked) -> None:
    locked.stage()
    locked.access = BLOCK
    with pytest.raises(ExistsDifferently):
        locked.stage()


# --- without a word from the controller ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("parameters", "by"),
    [
        ({"encryption": "luks"}, Encryption.LUKS),
        ({"encryption": "dmcrypt", "dmcrypt/type": "luks2"}, Encryption.LUKS),
        ({"encryption": "dmcrypt", "dmcrypt/cipher": "aes-xts-plain64"}, Encryption.LUKS),
        ({"encryption": "dmcrypt"}, Encryption.NATIVE),
        ({"encryption": "native"}, Encryption.NATIVE),
    ],
)
def test_the_words_of_the_storage_class_count_where_there_is_no_context(
    node: FakeNode, parameters: Mapping[str, str], by: Encryption
) -> None:
    locked = Locked(node, Encryption.NATIVE)
    if by is Encryption.LUKS:
        locked.luks.subsystem, locked.luks.label = "nvmesh-csi", UUID
    locked.luks.inner.filesystem = FakeFilesystem("ext4", 48 * MIB, uuid=UUID)
    node.stage(context={}, volume_context=parameters, secrets=SECRET)
    node.publish(context={}, volume_context=parameters)
    assert locked.source() == OPENED


def test_an_encryption_that_nobody_knows_is_refused_by_name(locked: Locked) -> None:
    with pytest.raises(InvalidField, match="quantum"):
        locked.node.stage(context={}, volume_context={"encryption": "quantum"}, secrets=SECRET)


# --- growing ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("fs_type", ["ext4", "xfs"])
def test_an_encrypted_filesystem_grows_with_its_volume(locked: Locked, fs_type: str) -> None:
    locked.access = MountAccess(fs_type)
    locked.up()
    locked.disk.size_bytes = 128 * MIB
    assert locked.node.expand(required_bytes=128 * MIB, staging=STAGING, secrets=SECRET) == 128 * MIB
    assert locked.mapper is not None
    held = locked.mapper.filesystem
    assert held is not None
    assert (locked.mapper.size_bytes, held.size_bytes) == (112 * MIB, 112 * MIB)


def test_a_header_beside_the_volume_counts_neither_as_size_nor_against_the_limit(locked: Locked) -> None:
    locked.up()
    locked.disk.size_bytes = 144 * MIB
    size = 128 * MIB
    assert locked.node.expand(required_bytes=size, limit_bytes=size, staging=STAGING, secrets=SECRET) == size
    with pytest.raises(CapacityOutOfRange):
        locked.node.expand(limit_bytes=127 * MIB, staging=STAGING, secrets=SECRET)


@pytest.mark.parametrize(("stripe_bytes", "is_told"), [(512 << 10, True), (384 << 10, False)])
def test_stripes_are_told_to_mkfs_only_where_the_header_ends_with_one(
    locked: Locked, stripe_bytes: int, is_told: bool
) -> None:
    given = context() | {"stripeUnitBytes": str(128 << 10), "stripeBytes": str(stripe_bytes)}
    locked.node.stage(context=given, secrets=SECRET)
    held = locked.luks.inner.filesystem
    assert held is not None
    assert ("stride=32" in " ".join(held.options)) == is_told


def test_an_encrypted_block_volume_grows(block: Locked) -> None:
    block.up()
    block.disk.size_bytes = 128 * MIB
    block.node.expand(required_bytes=128 * MIB, secrets=SECRET)
    assert block.mapper is not None
    assert block.mapper.size_bytes == 112 * MIB


def test_growing_without_the_secret_names_it_and_the_next_stage_grows(locked: Locked) -> None:
    locked.up()
    locked.disk.size_bytes = 128 * MIB
    with pytest.raises(MissingField, match=r"passphrase.*node-expand"):
        locked.node.expand(required_bytes=128 * MIB, staging=STAGING)
    locked.down()
    locked.up()
    assert locked.luks.inner.filesystem is not None
    assert locked.luks.inner.filesystem.size_bytes == 112 * MIB


def test_a_reader_does_not_grow_what_it_reads(in_use: Locked) -> None:
    in_use.stage(read_only=True)
    in_use.publish(read_only=True)
    in_use.disk.size_bytes = 128 * MIB
    with pytest.raises(PreconditionFailed, match="read-only"):
        in_use.node.expand(required_bytes=128 * MIB, staging=STAGING)
    assert in_use.mapper is not None
    assert in_use.mapper.size_bytes == 48 * MIB


def test_growing_with_a_wrong_passphrase_is_denied(locked: Locked) -> None:
    locked.up()
    locked.disk.size_bytes = 128 * MIB
    with pytest.raises(Denied):
        locked.node.expand(required_bytes=128 * MIB, staging=STAGING, secrets=WRONG)


def test_a_volume_left_open_takes_its_new_size_at_the_next_stage(locked: Locked) -> None:
    locked.stage()
    locked.node.host.table.clear()
    locked.disk.size_bytes = 128 * MIB
    locked.stage()
    assert locked.mapper is not None
    assert locked.mapper.size_bytes == 112 * MIB


@pytest.mark.parametrize("call", ["expand", "unstage"])
def test_a_resize_that_is_cut_off_leaves_nothing_hanging(locked: Locked, call: str) -> None:
    locked.up()
    locked.disk.size_bytes = 128 * MIB
    with dying_at(locked.node, "halfway resize"), pytest.raises(Died):
        locked.node.expand(required_bytes=128 * MIB, staging=STAGING, secrets=SECRET)
    locked.node.restart()
    if call == "expand":
        locked.node.expand(required_bytes=128 * MIB, staging=STAGING, secrets=SECRET)
        assert locked.mapper is not None
        assert locked.mapper.size_bytes == 112 * MIB
    locked.down()
    assert locked.mapper is None


# --- what a StorageClass may say -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "parameters",
    [
        {"encryption/cipher": "aes xts"},
        {"encryption/cipher": "aes-xts-plain64", "dmcrypt/cipher": "aes-cbc-plain64"},
        {"encryption/keySize": "512 bits"},
        {"encryption/keySize": "384"},
        {"encryption/keySize": "64"},
        {"encryption/pbkdf": "scrypt"},
        {"encryption/pbkdfMemory": "0"},
        {"encryption/pbkdfMemory": "65536", "encryption/pbkdf": "pbkdf2"},
        {"encryption/pbkdfIterations": "1"},
        {"encryption/allowDiscards": "yes"},
        {"dmcrypt/type": "plain"},
    ],
    ids=str,
)
def test_what_makes_no_sense_is_refused_by_name_before_a_device_is_touched(
    locked: Locked, parameters: Mapping[str, str]
) -> None:
    locked.disk.fails_reads = True
    locked.parameters = parameters
    with pytest.raises(InvalidField) as refusal:
        locked.stage()
    assert refusal.value.field in parameters


# --- crashes -------------------------------------------------------------------------------------------------------


class Died(SystemCallFailed):
    """The driver's process is gone at a point between two effects."""


@contextmanager
def dying_at(node: FakeNode, point: str) -> Iterator[None]:
    def step(reached: str) -> None:
        if reached == point:
            raise Died(point, 0)

    node.host.step = step
    try:
        yield
    finally:
        node.host.step = lambda reached: None


def lives_through(locked: Locked, at: int) -> bool:
    """Lead the volume through its life, dying once at the given step; True while there was such a step."""
    passed = 0

    def step(reached: str) -> None:
        nonlocal passed
        passed += 1
        if passed == at:
            raise Died(reached, 0)

    def call(do: Callable[[], None]) -> None:
        try:
            do()
        except Died:
            locked.node.restart()
            do()

    node = locked.node
    node.host.step = step
    call(locked.stage)
    call(locked.publish)
    if locked.access is BLOCK:
        node.host.write_raw(TARGET, 0, b"kept")
    else:
        node.host.write_file(TARGET, "a", b"kept")
    call(node.unpublish)
    call(node.unstage)
    locked.reattach()
    locked.disk.size_bytes = 128 * MIB
    call(locked.stage)
    call(locked.publish)
    if locked.access is BLOCK:
        assert locked.luks.inner.raw == {0: b"kept"}
    else:
        assert node.host.files_at(TARGET) == {"a": b"kept"}
    call(node.unpublish)
    call(node.unstage)
    assert locked.mapper is None
    assert node.host.destroyed == []
    assert node.host.table == []
    return passed >= at


@pytest.mark.parametrize("by", [Encryption.LUKS, Encryption.NATIVE])
@pytest.mark.parametrize("access", [EXT4, BLOCK], ids=["mount", "block"])
def test_a_driver_that_dies_at_any_step_goes_on_with_the_same_call(
    by: Encryption, access: MountAccess | BlockAccess
) -> None:
    at = 1
    while True:
        locked = Locked(FakeNode(), by)
        locked.access = access
        if not lives_through(locked, at):
            break
        at += 1
    assert at > (20 if access is BLOCK else 24)


def test_a_header_left_unfinished_is_made_again_under_the_same_attachment_only(locked: Locked) -> None:
    with dying_at(locked.node, "halfway luksFormat"), pytest.raises(Died):
        locked.stage()
    assert locked.node.records.read(UUID) == UsageRecord(UUID, 1, LUKS)
    locked.node.restart()
    locked.reattach()
    with pytest.raises(PreconditionFailed):
        locked.stage()
    locked.attachment = 1
    locked.stage()
    assert locked.luks.keys == ["correct horse"]


def test_a_filesystem_found_where_a_header_was_begun_is_somebody_elses(locked: Locked) -> None:
    with dying_at(locked.node, "halfway luksFormat"), pytest.raises(Died):
        locked.stage()
    locked.disk.luks = None
    locked.disk.filesystem = FakeFilesystem("xfs", locked.disk.size_bytes)
    with pytest.raises(PreconditionFailed, match="another program wrote"):
        locked.stage()
    assert locked.disk.filesystem.fs_type == "xfs"


def test_a_finished_header_whose_mark_was_left_is_not_made_again(locked: Locked) -> None:
    with dying_at(locked.node, "after luksFormat"), pytest.raises(Died):
        locked.stage()
    made = locked.luks
    locked.node.restart()
    locked.secrets = WRONG
    with pytest.raises(Denied):
        locked.stage()
    assert locked.disk.luks is made


def test_reader_mode_is_opened_read_only(locked: Locked) -> None:
    locked.up()
    locked.down()
    locked.node.stage(mode=READER, context=context(attachment=2), secrets=SECRET)
    assert locked.mapper is not None
    assert locked.mapper.read_only
