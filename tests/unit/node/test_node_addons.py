# SPDX-License-Identifier: Apache-2.0
"""Space given back, and passphrases changed, of volumes in use, on a machine in memory."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import replace

import pytest

from csi_driver.errors import (
    Denied,
    DriverError,
    InvalidRequest,
    MissingField,
    NotFound,
    NotOffered,
    PreconditionFailed,
    VolumeNotFound,
)
from csi_driver.host_model import Fault, FaultKind, Mount
from csi_driver.model import MountAccess
from csi_driver.node.addons import NodeAddons
from csi_driver.publish_context import Encryption
from tests.fakes.disks import MIB, FakeDisk
from tests.fakes.node import BLOCK, NAME, OTHER_UUID, READER, STAGING, TARGET, UUID, VOLUME_ID, FakeNode
from tests.unit.node.encrypted import ROTATION, SECRET, Died, Locked, dying_at

LUKS = {"encryption": "luks"}


def trim(node: FakeNode, *paths: str, volume_id: str = VOLUME_ID, is_block: bool = False) -> int:
    given = paths or ("", str(STAGING))
    return NodeAddons(node.use.expand).reclaim(volume_id, given, is_block=is_block, deadline=node.soon())


def staged(node: FakeNode, fs_type: str = "ext4") -> FakeDisk:
    disk = node.host.attach(NAME, UUID)
    node.stage(access=MountAccess(fs_type))
    return disk


def trims(disk: FakeDisk) -> int:
    assert disk.filesystem is not None
    return disk.filesystem.trims


# --- space ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("fs_type", ["ext4", "xfs", "btrfs"])
def test_a_staged_filesystem_gives_back_its_free_space(node: FakeNode, fs_type: str) -> None:
    disk = staged(node, fs_type)
    assert trim(node) == 64 * MIB
    assert trims(disk) == 1


def test_a_published_path_does_where_no_staging_path_is_given(node: FakeNode) -> None:
    disk = staged(node)
    node.publish()
    trim(node, str(TARGET), "")
    assert trims(disk) == 1


def test_no_path_is_refused(node: FakeNode) -> None:
    staged(node)
    with pytest.raises(MissingField, match="staging_target_path"):
        trim(node, "", "")


def test_a_handle_of_another_driver_has_no_volume(node: FakeNode) -> None:
    with pytest.raises(VolumeNotFound):
        trim(node, volume_id="not ours/at all")


def test_a_volume_that_is_not_staged_is_not_found(node: FakeNode) -> None:
    node.host.attach(NAME, UUID)
    with pytest.raises(NotFound, match="not mounted"):
        trim(node)


def test_the_filesystem_of_another_volume_is_not_trimmed(node: FakeNode) -> None:
    disk = staged(node)
    with pytest.raises(NotFound):
        trim(node, volume_id=VOLUME_ID.replace(UUID, OTHER_UUID).replace(NAME, "csi-2"))
    assert trims(disk) == 0


def test_another_volume_of_the_name_is_not_trimmed(node: FakeNode) -> None:
    disk = staged(node)
    with pytest.raises(DriverError):
        trim(node, volume_id=VOLUME_ID.replace(UUID, OTHER_UUID))
    assert trims(disk) == 0


def test_a_mount_whose_device_came_back_is_not_trimmed(node: FakeNode) -> None:
    disk = staged(node)
    back = node.host.attach(NAME, UUID, like=node.host.detach(NAME), number=disk.number)
    with pytest.raises(PreconditionFailed, match="stage it again"):
        trim(node)
    assert trims(back) == 0


@pytest.mark.parametrize("is_told", [True, False])
def test_a_raw_block_volume_is_never_discarded(node: FakeNode, is_told: bool) -> None:
    node.host.attach(NAME, UUID)
    node.stage(access=BLOCK)
    node.publish(access=BLOCK)
    with pytest.raises(NotOffered, match="raw block volume"):
        trim(node, str(TARGET), is_block=is_told)


def test_a_read_only_mount_gives_nothing_back(node: FakeNode) -> None:
    disk = staged(node)
    node.unstage()
    node.stage(mode=READER)
    with pytest.raises(PreconditionFailed, match="read-only"):
        trim(node)
    assert trims(disk) == 0


def test_a_filesystem_that_turned_read_only_gives_nothing_back(node: FakeNode) -> None:
    disk = staged(node)
    disk.superblock_read_only = True
    with pytest.raises(PreconditionFailed, match="read-only"):
        trim(node)
    assert trims(disk) == 0


def test_a_dead_filesystem_gives_nothing_back(node: FakeNode, monkeypatch: pytest.MonkeyPatch) -> None:
    disk = staged(node)

    def dead(_: Mount) -> Fault:
        return Fault(FaultKind.SHUT_DOWN, "xfs was shut down")

    monkeypatch.setattr(node.host.probes, "dead", dead)
    with pytest.raises(PreconditionFailed, match="was shut down"):
        trim(node)
    assert trims(disk) == 0


def test_a_device_without_discards_is_named(node: FakeNode) -> None:
    staged(node).takes_discards = False
    with pytest.raises(NotOffered, match="takes no discards"):
        trim(node)


def test_encryption_that_passes_no_discards_on_is_named(locked: Locked) -> None:
    locked.stage()
    with pytest.raises(NotOffered, match="encryption/allowDiscards"):
        trim(locked.node)


def test_an_encrypted_volume_that_passes_discards_on_is_trimmed(locked: Locked) -> None:
    locked.parameters = {"encryption/allowDiscards": "true"}
    locked.stage()
    trim(locked.node)
    assert locked.mapper is not None
    assert trims(locked.mapper) == 1


def test_a_trim_takes_a_slot_of_the_heavy_operations(node: FakeNode) -> None:
    staged(node)
    seen: list[tuple[int, int]] = []
    inner = node.host.filesystems.trim

    def counting(*arguments: object, **more: object) -> int:
        seen.append(node.use.heavy.running_and_waiting())
        return inner(*arguments, **more)  # type: ignore[arg-type]

    node.host.filesystems.trim = counting  # type: ignore[method-assign]
    trim(node)
    assert seen == [(1, 0)]


# --- passphrases ------------------------------------------------------------------------------------------------


def rotate(
    locked: Locked,
    secrets: Mapping[str, str] = ROTATION,
    *,
    context: Mapping[str, str] = LUKS,
    new: str = "",
    is_shared: bool = False,
) -> None:
    addons = NodeAddons(locked.node.use.expand)
    addons.rotate(VOLUME_ID, context, secrets, new_passphrase=new, is_shared=is_shared, deadline=locked.node.soon())


def test_the_passphrase_of_an_open_volume_is_replaced(locked: Locked) -> None:
    locked.up()
    locked.node.host.write_file(TARGET, "a", b"kept")
    rotate(locked)
    assert locked.luks.keys == ["new passphrase"]
    assert locked.node.host.files_at(TARGET) == {"a": b"kept"}


def test_a_repeated_change_succeeds_and_changes_nothing(locked: Locked) -> None:
    locked.up()
    rotate(locked)
    rotate(locked)
    assert locked.luks.keys == ["new passphrase"]


ROTATION_POINTS = ["before luksAddKey", "after luksAddKey", "before luksRemoveKey", "after luksRemoveKey"]


@pytest.mark.parametrize("point", ROTATION_POINTS)
def test_a_change_of_an_open_volume_cut_off_at_any_step_leaves_a_key_and_is_finished(
    locked: Locked, point: str
) -> None:
    locked.up()
    with dying_at(locked.node, point), pytest.raises(Died):
        rotate(locked)
    assert set(locked.luks.keys) & set(ROTATION.values())
    locked.node.restart()
    rotate(locked)
    assert locked.luks.keys == ["new passphrase"]


def test_a_key_that_does_not_open_the_volume_removes_none(locked: Locked, monkeypatch: pytest.MonkeyPatch) -> None:
    locked.up()
    monkeypatch.setattr(locked.node.host.encryption, "add_key", lambda *_: None)
    with pytest.raises(DriverError, match="the previous one still does"):
        rotate(locked)
    assert locked.luks.keys == ["correct horse"]


def test_without_a_previous_passphrase_nothing_is_claimed_to_have_changed(locked: Locked) -> None:
    locked.up()
    for secrets in (SECRET, {**SECRET, "previousPassphrase": SECRET["passphrase"]}):
        with pytest.raises(MissingField, match="previousPassphrase"):
            rotate(locked, secrets)
    assert locked.luks.keys == ["correct horse"]


def test_neither_passphrase_fitting_is_denied_and_changes_nothing(locked: Locked) -> None:
    locked.up()
    with pytest.raises(Denied) as refusal:
        rotate(locked, {"passphrase": "new passphrase", "previousPassphrase": "another horse"})
    assert "horse" not in str(refusal.value)
    assert locked.luks.keys == ["correct horse"]


def test_a_key_that_the_secret_does_not_have_is_refused_without_showing_it(locked: Locked) -> None:
    locked.up()
    with pytest.raises(InvalidRequest) as refusal:
        rotate(locked, new="a third horse")
    assert "horse" not in str(refusal.value)
    assert locked.luks.keys == ["correct horse"]


def test_the_key_of_the_secret_may_be_given_as_well(locked: Locked) -> None:
    locked.up()
    rotate(locked, new="new passphrase")
    assert locked.luks.keys == ["new passphrase"]


def test_a_closed_volume_is_left_to_its_next_stage(locked: Locked) -> None:
    locked.up()
    locked.down()
    with pytest.raises(PreconditionFailed, match="not open on this node"):
        rotate(locked)
    assert locked.luks.keys == ["correct horse"]


def test_a_header_under_another_opened_device_is_not_written(locked: Locked) -> None:
    locked.up()
    back = locked.node.host.attach(NAME, UUID, like=locked.node.host.detach(NAME), number=locked.disk.number)
    back.luks = locked.luks
    with pytest.raises(PreconditionFailed, match="not open on this node"):
        rotate(locked)
    assert locked.luks.keys == ["correct horse"]


def test_a_volume_that_is_not_on_this_node_is_refused(locked: Locked) -> None:
    locked.node.host.detach(NAME)
    with pytest.raises(PreconditionFailed, match="no device on this node"):
        rotate(locked)


def test_a_reader_writes_no_header(in_use: Locked) -> None:
    in_use.stage(read_only=True)
    with pytest.raises(PreconditionFailed, match="read-only"):
        rotate(in_use)
    assert in_use.luks.keys == ["correct horse"]


def test_the_header_of_a_volume_with_several_writing_nodes_is_not_written(locked: Locked) -> None:
    locked.up()
    with pytest.raises(PreconditionFailed, match="shared"):
        rotate(locked, is_shared=True)
    assert locked.luks.keys == ["correct horse"]


def test_a_header_that_the_storage_made_is_left_to_the_storage(native: Locked) -> None:
    native.up()
    with pytest.raises(PreconditionFailed, match="by the storage"):
        rotate(native, context={"encryption": "native"})
    assert native.luks.keys == ["correct horse"]


def test_a_volume_without_encryption_has_no_key(locked: Locked) -> None:
    locked.by = Encryption.NONE
    locked.up()
    with pytest.raises(PreconditionFailed, match="by nobody"):
        rotate(locked, context={})


def test_another_header_than_the_open_one_is_not_written(locked: Locked) -> None:
    locked.up()
    locked.disk.luks = replace(locked.luks, uuid="11111111-9d1b-4b7e-8f6b-3f1d2c5b7a90", keys=["correct horse"])
    with pytest.raises(PreconditionFailed, match="another LUKS header"):
        rotate(locked)
    assert locked.luks.keys == ["correct horse"]


def test_no_passphrase_is_logged(locked: Locked, caplog: pytest.LogCaptureFixture) -> None:
    locked.up()
    with caplog.at_level(logging.DEBUG):
        rotate(locked)
    assert "its previous passphrase was removed" in caplog.text
    assert not [word for word in ROTATION.values() if word in caplog.text]
