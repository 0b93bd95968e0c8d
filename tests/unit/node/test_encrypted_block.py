# SPDX-License-Identifier: Apache-2.0
"""Encrypted volumes as raw block devices."""

from __future__ import annotations

import pytest

from csi_driver.errors import (
    PreconditionFailed,
)
from csi_driver.publish_context import Encryption
from tests.fakes.disks import MIB
from tests.fakes.node import NAME, TARGET
from tests.unit.node.encrypted import OPENED, Locked


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


def test_a_read_only_publication_gets_a_read_only_device_over_the_opened_one(block: Locked) -> None:
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
