# SPDX-License-Identifier: Apache-2.0
"""Passphrases of encrypted volumes, and their rotation."""

from __future__ import annotations

import pytest

from csi_driver.errors import (
    Denied,
    InvalidRequest,
    MissingField,
)
from csi_driver.model import BlockAccess, MountAccess
from csi_driver.publish_context import Encryption
from tests.fakes.disks import MIB
from tests.fakes.node import BLOCK, EXT4, KUBELET, STAGING, TARGET
from tests.unit.node.encrypted import ROTATION, SECRET, WRONG, Died, Locked, context, dying_at


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


def test_a_secret_for_an_unencrypted_volume_warns(locked: Locked, caplog: pytest.LogCaptureFixture) -> None:
    locked.by = Encryption.NONE
    locked.stage()
    assert "has a passphrase" in caplog.text
    assert "horse" not in caplog.text
    assert locked.disk.filesystem is not None


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


def test_other_keys_stay(in_use: Locked) -> None:
    in_use.secrets = ROTATION
    in_use.luks.keys[:] = ["new passphrase", "for the safe"]
    in_use.up()
    assert in_use.luks.keys == ["new passphrase", "for the safe"]


ROTATION_POINTS = ["before luksAddKey", "after luksAddKey", "before luksRemoveKey", "after luksRemoveKey"]


@pytest.mark.parametrize("point", ROTATION_POINTS)
def test_an_interrupted_passphrase_change_leaves_one_that_opens_and_is_finished(in_use: Locked, point: str) -> None:
    in_use.secrets = ROTATION
    with dying_at(in_use.node, point), pytest.raises(Died):
        in_use.stage()
    assert set(in_use.luks.keys) & set(ROTATION.values())
    in_use.node.restart()
    in_use.up()
    assert in_use.luks.keys == ["new passphrase"]
    assert in_use.node.host.files_at(TARGET) == {"a": b"kept"}


@pytest.mark.parametrize(("present", "previous"), [("a horse", "a horse\n"), ("a horse\n", "a horse")])
def test_a_passphrase_that_differs_in_a_line_feed_alone_is_not_removed(
    in_use: Locked, present: str, previous: str
) -> None:
    in_use.secrets = {"passphrase": present, "previousPassphrase": previous}
    in_use.luks.keys[:] = ["a horse", "for the safe"]
    in_use.up()
    assert in_use.luks.keys == ["a horse", "for the safe"]
