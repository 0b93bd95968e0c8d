# SPDX-License-Identifier: Apache-2.0
"""NodeUnstageVolume on a machine in memory."""

from __future__ import annotations

from pathlib import Path

import pytest

from csi_driver.errors import (
    InvalidField,
    PreconditionFailed,
)
from tests.fakes.node import (
    KUBELET,
    NAME,
    OTHER_UUID,
    STAGING,
    UUID,
    VOLUME_ID,
    FakeNode,
)
from tests.unit.node.staged import formatted


def test_unstage_leaves_the_directory_empty_and_may_be_repeated(node: FakeNode) -> None:
    formatted(node)
    node.stage()
    node.unstage()
    node.unstage()
    assert (node.host.mounts_at(STAGING), node.host.tree[STAGING]) == (0, "directory")


def test_unstage_of_another_volume_at_the_same_path_touches_nothing(node: FakeNode) -> None:
    formatted(node)
    node.stage()
    node.unstage(volume_id=f"z:csi-2:{OTHER_UUID}")
    assert node.host.mounts_at(STAGING) == 1


def test_unstage_of_a_volume_that_took_over_the_name_touches_nothing(node: FakeNode) -> None:
    formatted(node)
    node.stage()
    node.unstage(volume_id=f"z:{NAME}:{OTHER_UUID}")
    assert node.host.mounts_at(STAGING) == 1


@pytest.mark.parametrize("volume_id", ["", "no/such volume", "a:b:c:d:e", "x" * 300])
def test_unstage_of_an_id_that_is_none_succeeds(node: FakeNode, volume_id: str) -> None:
    node.unstage(volume_id=volume_id)


def test_unstage_of_a_missing_path_succeeds(node: FakeNode) -> None:
    node.unstage(staging=KUBELET / "nowhere/at/all")


@pytest.mark.parametrize("in_use", [False, True])
def test_a_dead_device_is_unstaged_even_in_use(node: FakeNode, in_use: bool) -> None:
    formatted(node)
    node.stage()
    node.host.table[0].in_use = in_use
    node.host.detach(NAME)
    node.unstage()
    assert node.host.mounts_at(STAGING) == 0


def test_a_living_mount_in_use_is_not_taken_off(node: FakeNode) -> None:
    formatted(node)
    node.stage()
    node.host.table[0].in_use = True
    with pytest.raises(PreconditionFailed, match="in use"):
        node.unstage()


def test_stacked_mounts_are_taken_off_one_by_one(node: FakeNode) -> None:
    formatted(node)
    node.stage()
    device = node.host.devices.find(NAME)
    assert device is not None
    node.host.mounts.mount(device, STAGING, "ext4", [], read_only=False)
    node.unstage()
    assert node.host.mounts_at(STAGING) == 0


def test_a_staging_path_outside_the_roots_is_not_unstaged(node: FakeNode) -> None:
    with pytest.raises(InvalidField):
        node.unstage(staging=Path("/etc"))


def test_what_another_process_staged_in_the_meantime_is_taken_and_not_mounted_again(
    node: FakeNode, monkeypatch: pytest.MonkeyPatch
) -> None:
    node.host.attach(NAME, UUID)
    remove, others = node.records.remove, [node.stage]

    def remove_while_another_stages(volume_uuid: str) -> None:
        remove(volume_uuid)
        if others:
            others.pop()()

    monkeypatch.setattr(node.records, "remove", remove_while_another_stages)
    node.stage()
    assert (node.host.formats, node.host.mounts_at(STAGING)) == ([UUID], 1)


def test_a_mount_whose_device_number_is_another_volumes_now_is_unstaged(node: FakeNode) -> None:
    formatted(node)
    node.stage()
    gone = node.host.detach(NAME)
    node.host.attach("csi-2", OTHER_UUID).number = gone.number
    node.unstage()
    assert node.host.mounts_at(STAGING) == 0


@pytest.mark.parametrize("is_renamed", [False, True])
def test_a_newer_volume_of_the_same_name_is_not_unstaged(node: FakeNode, is_renamed: bool) -> None:
    formatted(node)
    node.stage()
    if is_renamed:
        node.host.topmost(STAGING).source = "/dev/nvmesh/csi-2"  # type: ignore[union-attr]
    node.unstage(volume_id=f"z:{NAME}:{OTHER_UUID}")
    assert node.host.mounts_at(STAGING) == 1


def test_a_volume_is_staged_where_its_filesystem_is_mounted_dead_or_alive(node: FakeNode) -> None:
    formatted(node)
    is_staged = node.use.stage.is_staged
    assert not is_staged(VOLUME_ID, str(STAGING))
    node.stage()
    assert is_staged(VOLUME_ID, str(STAGING))
    assert not is_staged(f"z:{NAME}:{OTHER_UUID}", str(STAGING))
    node.host.detach(NAME)
    assert is_staged(VOLUME_ID, str(STAGING))
    node.unstage()
    assert not is_staged(VOLUME_ID, str(STAGING))
