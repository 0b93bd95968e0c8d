# SPDX-License-Identifier: Apache-2.0
"""The mount option `nvmesh:chmod` gives the root directory of a new filesystem its mode, once."""

from __future__ import annotations

import pytest

from csi_driver.errors import SystemCallFailed
from csi_driver.model import MountAccess
from csi_driver.node.usage_records import USED, UsageRecord
from tests.fakes.disks import MIB, FakeFilesystem
from tests.fakes.node import NAME, READER, STAGING, UUID, FakeNode, publish_context

OPEN = MountAccess("ext4", ("nvmesh:chmod=770",))


@pytest.fixture
def node() -> FakeNode:
    """Return a node that has a blank volume attached."""
    made = FakeNode()
    made.host.attach(NAME, UUID)
    return made


def user_changes_mode(node: FakeNode, mode: int) -> None:
    entry = node.host.topmost(STAGING)
    assert entry is not None
    assert entry.disk is not None
    assert entry.disk.filesystem is not None
    entry.disk.filesystem.root_mode = mode


def test_the_root_directory_of_a_new_filesystem_gets_the_mode_that_was_asked_for(node: FakeNode) -> None:
    node.stage(access=OPEN)
    assert node.host.mode_of(STAGING) == 0o770


def test_without_a_requested_mode_a_new_root_directory_keeps_its_own(node: FakeNode) -> None:
    node.stage()
    assert node.host.mode_of(STAGING) == 0o755


@pytest.mark.parametrize("mode", [0o2770, 0o700], ids=["kubelet's setgid for fsGroup", "a database's own directory"])
def test_a_mode_that_its_user_gave_stays(node: FakeNode, mode: int) -> None:
    node.stage(access=OPEN)
    user_changes_mode(node, mode)
    node.stage(access=OPEN)
    assert node.host.mode_of(STAGING) == mode
    node.restart()
    node.stage(access=OPEN)
    assert node.host.mode_of(STAGING) == mode
    node.unstage()
    node.stage(access=OPEN)
    assert node.host.mode_of(STAGING) == mode
    node.unstage()
    node.stage(access=OPEN, context=publish_context(attachment=2))
    assert node.host.mode_of(STAGING) == mode


def test_a_filesystem_that_was_there_keeps_its_mode(node: FakeNode) -> None:
    node.host.disks[NAME].filesystem = FakeFilesystem("ext4", 64 * MIB, files={"a": b"precious"})
    node.stage(access=OPEN)
    assert node.host.mode_of(STAGING) == 0o755


def test_an_option_that_comes_later_changes_nothing(node: FakeNode) -> None:
    node.stage()
    node.stage(access=OPEN)
    node.unstage()
    node.stage(access=OPEN)
    assert node.host.mode_of(STAGING) == 0o755


def test_a_mode_that_could_not_be_set_is_set_by_the_same_call_again(node: FakeNode) -> None:
    def refuse(reached: str) -> None:
        if reached == "before set_mode":
            raise SystemCallFailed(reached, 5)

    node.host.step = refuse
    with pytest.raises(SystemCallFailed):
        node.stage(access=OPEN)
    node.host.step = lambda reached: None
    node.stage(access=OPEN)
    assert node.host.mode_of(STAGING) == 0o770


class Killed(BaseException):
    """The driver's process is gone; nothing is taken back."""


def test_a_driver_that_dies_at_any_step_sets_the_mode_with_the_same_call() -> None:
    at = 0
    while True:
        at += 1
        node = FakeNode()
        passed: list[str] = []
        node.host.attach(NAME, UUID)

        def step(reached: str, at: int = at, passed: list[str] = passed) -> None:
            passed.append(reached)
            if len(passed) == at:
                raise Killed

        node.host.step = step
        try:
            node.stage(access=OPEN)
        except Killed:
            node.host.step = lambda reached: None
            node.restart()
            node.stage(access=OPEN)
        assert node.host.mode_of(STAGING) == 0o770, passed
        assert node.records.read(UUID) == UsageRecord(UUID, 1, USED), passed
        user_changes_mode(node, 0o700)
        node.stage(access=OPEN)
        assert node.host.mode_of(STAGING) == 0o700, passed
        if len(passed) < at:
            break
    assert {"after record", "after mount", "before set_mode", "after set_mode"} <= set(passed)


def test_a_mode_that_waited_is_not_set_when_the_volume_comes_back_from_elsewhere(node: FakeNode) -> None:
    """Between its attachments a pod of another node may have had it."""
    node.records.write(UsageRecord(UUID, 1, USED, root_mode_pending=True))
    node.host.disks[NAME].filesystem = FakeFilesystem("ext4", 64 * MIB, files={"a": b"precious"})
    node.stage(access=OPEN, context=publish_context(attachment=3))
    assert node.host.mode_of(STAGING) == 0o755


def test_a_reader_changes_no_mode(node: FakeNode) -> None:
    node.host.disks[NAME].filesystem = FakeFilesystem("ext4", 64 * MIB, files={"a": b"precious"})
    node.stage(access=OPEN, mode=READER)
    assert node.host.mode_of(STAGING) == 0o755
