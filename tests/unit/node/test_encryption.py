# SPDX-License-Identifier: Apache-2.0
"""Encrypted volumes: which get a LUKS header, and who makes it."""

from __future__ import annotations

from collections.abc import Mapping

import pytest

from csi_driver.errors import (
    HostFailure,
    InvalidField,
    InvalidRequest,
    PreconditionFailed,
)
from csi_driver.model import BlockAccess, MountAccess
from csi_driver.publish_context import Encryption, History
from tests.fakes.disks import MIB, FakeFilesystem
from tests.fakes.luks import HEADER_BYTES
from tests.fakes.node import BLOCK, EXT4, OTHER_UUID, TARGET, UUID, FakeNode
from tests.fakes.node import publish_context as plain_context
from tests.unit.node.encrypted import OPENED, SECRET, Locked, shared


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
def test_a_foreign_header_is_opened_only_on_a_foreign_volume(
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


@pytest.mark.parametrize("format_allowed", [False, True])
def test_no_header_is_made_where_another_node_may_make_one_at_the_same_time(
    locked: Locked, format_allowed: bool
) -> None:
    """Each node would prove it blank, and the second header would destroy data under the first."""
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


def test_a_previous_passphrase_stays_until_the_new_one_opens_the_volume(locked: Locked) -> None:
    locked.stage()
    locked.node.unstage()
    locked.secrets = {"passphrase": "new passphrase", "previousPassphrase": "correct horse"}

    def lose_the_new_key(reached: str) -> None:
        if reached == "after luksAddKey":
            locked.luks.keys.remove("new passphrase")

    locked.node.host.step = lose_the_new_key
    with pytest.raises(HostFailure, match="the previous one still does"):
        locked.stage()
    assert locked.luks.keys == ["correct horse"]


def test_a_blank_volume_gets_a_header_with_its_uuid_and_a_filesystem_inside(locked: Locked) -> None:
    locked.up()
    assert (locked.luks.label, locked.luks.subsystem, locked.luks.keys) == (UUID, "nvmesh-csi", ["correct horse"])
    assert locked.disk.filesystem is None
    assert locked.luks.inner.filesystem is not None
    assert locked.source() == OPENED


def test_the_opened_device_is_smaller_than_the_volume_by_its_header(locked: Locked) -> None:
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


def test_a_finished_header_has_no_record(locked: Locked) -> None:
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


def test_an_unknown_encryption_is_refused_by_name(locked: Locked) -> None:
    with pytest.raises(InvalidField, match="quantum"):
        locked.node.stage(context={}, volume_context={"encryption": "quantum"}, secrets=SECRET)


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
