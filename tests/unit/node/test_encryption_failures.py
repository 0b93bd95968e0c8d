# SPDX-License-Identifier: Apache-2.0
"""Failures and crashes while an encrypted volume is staged."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from csi_driver.errors import (
    Denied,
    ExistsDifferently,
    PreconditionFailed,
    StorageUnavailable,
    SystemCallFailed,
)
from csi_driver.model import BlockAccess, MountAccess
from csi_driver.node.usage_records import LUKS, UsageRecord
from csi_driver.publish_context import Encryption
from tests.fakes.disks import MIB, FakeFilesystem
from tests.fakes.node import BLOCK, EXT4, KUBELET, READER, TARGET, UUID, FakeNode
from tests.unit.node.encrypted import SECRET, WRONG, Died, Locked, context, dying_at, failing_at


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


def test_a_failed_cleanup_is_answered_so_that_kubelet_unstages(locked: Locked) -> None:
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


def test_a_filesystem_where_a_header_was_begun_is_not_ours(locked: Locked) -> None:
    with dying_at(locked.node, "halfway luksFormat"), pytest.raises(Died):
        locked.stage()
    locked.disk.luks = None
    locked.disk.filesystem = FakeFilesystem("xfs", locked.disk.size_bytes)
    with pytest.raises(PreconditionFailed, match="another program wrote"):
        locked.stage()
    assert locked.disk.filesystem.fs_type == "xfs"


def test_a_finished_header_with_a_record_is_not_made_again(locked: Locked) -> None:
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
