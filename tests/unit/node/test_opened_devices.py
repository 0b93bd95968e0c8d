# SPDX-License-Identifier: Apache-2.0
"""Opened encrypted devices that exist already, and their growth."""

from __future__ import annotations

import pytest

from csi_driver.errors import (
    CapacityOutOfRange,
    Denied,
    ExistsDifferently,
    MissingField,
    PreconditionFailed,
)
from csi_driver.model import MountAccess
from csi_driver.publish_context import Encryption
from tests.fakes.disks import MIB
from tests.fakes.luks import HEADER_BYTES
from tests.fakes.node import BLOCK, KUBELET, NAME, OTHER_UUID, STAGING, TARGET, UUID
from tests.fakes.node import publish_context as plain_context
from tests.unit.node.encrypted import OPENED, SECRET, WRONG, Died, Locked, context, dying_at


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


def test_an_opened_device_of_a_lost_volume_is_closed_and_opened_again(locked: Locked) -> None:
    locked.up()
    locked.node.host.table.clear()
    locked.reattach()
    locked.up()
    assert locked.mapper is not None
    assert locked.mapper.below is locked.disk


def test_a_mount_over_the_opened_device_of_a_returned_volume_is_unmounted(locked: Locked) -> None:
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


def test_another_access_at_the_staging_path_is_refused(locked: Locked) -> None:
    locked.stage()
    locked.access = BLOCK
    with pytest.raises(ExistsDifferently):
        locked.stage()


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
def test_mkfs_gets_stripes_only_where_the_header_ends_with_one(
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
