# SPDX-License-Identifier: Apache-2.0
"""Volumes that another node has taken over."""

from __future__ import annotations

import itertools
from pathlib import Path

import pytest

from csi_driver.errors import (
    PreconditionFailed,
)
from csi_driver.host_model import DeviceNumber, VolumeStatus
from csi_driver.publish_context import History
from tests.fakes.disks import FakeDisk
from tests.fakes.node import (
    NAME,
    OTHER_TARGET,
    STAGING,
    UUID,
    FakeNode,
    publish_context,
)
from tests.unit.node.staged import formatted


def staged_under(node: FakeNode, attachment: int) -> dict[str, str]:
    """Stage and publish a volume under an attachment, and return the context of the next one."""
    formatted(node)
    given = publish_context(history=History.ATTACHED, attachment=attachment)
    node.stage(context=given)
    node.publish(context=given)
    return publish_context(history=History.ATTACHED, attachment=attachment + 2)


def test_a_mount_of_an_earlier_attachment_is_not_published(node: FakeNode) -> None:
    """Another node had the volume in between: this kernel may have old data and pending writes."""
    later = staged_under(node, 3)
    with pytest.raises(PreconditionFailed, match="under its attachment 3, and"):
        node.publish(OTHER_TARGET, context=later)
    assert node.host.mounts_at(OTHER_TARGET) == 0
    node.unpublish()
    node.unstage()
    node.stage(context=later)
    node.publish(OTHER_TARGET, context=later)


def test_an_unused_mount_of_an_earlier_attachment_is_replaced(node: FakeNode) -> None:
    later = staged_under(node, 3)
    with pytest.raises(PreconditionFailed, match="attachment 3, and this is attachment 5"):
        node.stage(context=later)
    node.unpublish()
    checked = node.host.disks[NAME].filesystem.checks  # type: ignore[union-attr]
    node.stage(context=later)
    assert node.host.mounts_at(STAGING) == 1
    assert node.host.disks[NAME].filesystem.checks > checked  # type: ignore[union-attr]


def test_a_mount_of_an_uncounted_attachment_may_be_used(node: FakeNode) -> None:
    """An earlier use is on record; the present attachment had no number first, and later has one."""
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


def staged_in_use(node: FakeNode, *, preempted: bool) -> FakeDisk:
    """Stage the volume, let a program use its mount, and take its I/O away; return its disk."""
    formatted(node)
    node.stage()
    entry = node.host.topmost(STAGING)
    assert entry is not None
    entry.in_use = True
    disk = node.host.disks[NAME]
    disk.status = VolumeStatus(NAME, UUID, io_enabled=False, preempted=preempted)
    return disk


@pytest.mark.parametrize("preempted", [False, True])
@pytest.mark.parametrize("references", [(), ("another",), (UUID,), None])
def test_a_volume_in_use_is_detached_lazily_only_once_it_was_taken_from_this_node(
    node: FakeNode, references: tuple[str, ...] | None, preempted: bool
) -> None:
    disk = staged_in_use(node, preempted=preempted)
    disk.references = references
    if preempted or references in ((), ("another",)):
        node.unstage()
        assert (node.host.mounts_at(STAGING), node.host.lost) == (0, [disk.number])
    else:
        with pytest.raises(PreconditionFailed):
            node.unstage()
        assert node.host.mounts_at(STAGING) == 1


@pytest.mark.parametrize("attempt", [1, 2])
def test_a_volume_that_is_back_when_its_unmount_has_failed_is_not_detached_lazily(
    node: FakeNode, monkeypatch: pytest.MonkeyPatch, attempt: int
) -> None:
    disk = staged_in_use(node, preempted=True)
    unmount, attempts = node.host.mounts.unmount, itertools.count(1)

    def unmount_after_it_is_back(path: Path, *, lost: DeviceNumber | None = None) -> None:
        if next(attempts) == attempt:
            disk.status = VolumeStatus(NAME, UUID, io_enabled=True)
        unmount(path, lost=lost)

    monkeypatch.setattr(node.host.mounts, "unmount", unmount_after_it_is_back)
    with pytest.raises(PreconditionFailed, match="in use"):
        node.unstage()
    assert (node.host.mounts_at(STAGING), node.host.lost) == (1, [])


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
