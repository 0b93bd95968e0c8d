# SPDX-License-Identifier: Apache-2.0
"""The storage client is replaced under its volumes: its files are gone for a while, its devices and mounts are not.

It is never taken for a detach, and no device without proven identity is used.
"""

from __future__ import annotations

from pathlib import Path

import pytest

from csi_driver.errors import DeadlineReached, IdentityNotProven, PreconditionFailed, StorageUnavailable
from csi_driver.host_model import VolumeStatus
from csi_driver.node_settings import NodeSettings
from tests.fakes.disks import MIB, FakeDisk
from tests.fakes.node import (
    BLOCK,
    EXT4,
    NAME,
    OTHER_TARGET,
    OTHER_UUID,
    STAGING,
    TARGET,
    UUID,
    FakeNode,
    publish_context,
)

CLIENT, NEW_CLIENT = "1f0e8a52-0000-4000-8000-000000000001", "1f0e8a52-0000-4000-8000-000000000002"
ACCESS = pytest.mark.parametrize("access", [EXT4, BLOCK], ids=["mount", "block"])


@pytest.fixture
def attached(node: FakeNode) -> FakeNode:
    node.host.attach(NAME, UUID)
    return node


# --- the volume -------------------------------------------------------------------------------------------------


@ACCESS
def test_a_volume_is_not_staged_before_its_device_is_known_again(attached: FakeNode, access: object) -> None:
    attached.host.upgrade_client()
    with pytest.raises(DeadlineReached):
        attached.stage(access=access)  # type: ignore[arg-type]
    assert (attached.host.formats, attached.host.mounts_at(STAGING)) == ([], 0)
    attached.host.finish_upgrade(CLIENT)
    attached.stage(access=access)  # type: ignore[arg-type]


def test_a_client_that_is_back_while_a_volume_is_staged_is_waited_for(attached: FakeNode) -> None:
    attached.host.upgrade_client()
    sleep = attached.clock.sleep

    def passes(seconds: float) -> None:
        sleep(seconds)
        attached.host.finish_upgrade(CLIENT)

    attached.clock.sleep = passes  # type: ignore[method-assign]
    attached.stage()
    assert attached.host.mounts_at(STAGING) == 1


def test_a_device_that_is_not_known_any_more_is_not_formatted(attached: FakeNode) -> None:
    """The client goes between the device being found and being opened for mkfs."""
    wait_for = attached.host.devices.wait_for

    def then_upgrade(*args: object, **named: object) -> object:
        found = wait_for(*args, **named)  # type: ignore[arg-type]
        attached.host.upgrade_client()
        return found

    attached.host.devices.wait_for = then_upgrade  # type: ignore[method-assign,assignment]
    with pytest.raises(IdentityNotProven):
        attached.stage()
    assert attached.host.formats == []


def test_what_is_staged_is_published(attached: FakeNode) -> None:
    attached.stage()
    attached.host.upgrade_client()
    attached.publish()
    attached.stage()
    assert attached.host.mounts_at(TARGET) == 1


def test_a_raw_device_of_unknown_identity_is_not_published(attached: FakeNode) -> None:
    attached.stage(access=BLOCK)
    attached.publish(access=BLOCK)
    attached.host.upgrade_client()
    with pytest.raises(IdentityNotProven):
        attached.publish(OTHER_TARGET, access=BLOCK)
    assert attached.host.mounts_at(OTHER_TARGET) == 0
    attached.publish(access=BLOCK)  # published already


@ACCESS
def test_a_volume_is_taken_back_and_used_all_the_same(attached: FakeNode, access: object) -> None:
    attached.stage(access=access)  # type: ignore[arg-type]
    attached.publish(access=access)  # type: ignore[arg-type]
    attached.host.upgrade_client()
    assert attached.usage().total_bytes == 64 * MIB
    assert attached.expand(required_bytes=64 * MIB) == 64 * MIB
    attached.unpublish()
    attached.unstage()
    assert (attached.host.table, list(attached.host.disks)) == ([], [NAME])


# --- the node ---------------------------------------------------------------------------------------------------


def test_the_nodes_id_outlives_the_upgrade_and_follows_a_new_client() -> None:
    node = FakeNode()
    assert node.use.identity.info().node_id == CLIENT
    node.host.upgrade_client()
    assert node.use.identity.info().node_id == CLIENT
    node.host.finish_upgrade(NEW_CLIENT)
    assert node.use.identity.info().node_id == NEW_CLIENT


def test_a_driver_that_starts_during_an_upgrade_gives_no_other_id() -> None:
    node = FakeNode(settings=NodeSettings("node-1", Path("/nowhere")))
    node.host.upgrade_client()
    with pytest.raises(StorageUnavailable, match="uuid"):
        node.use.identity.info()
    node.host.finish_upgrade(CLIENT)
    assert node.use.identity.info().node_id == CLIENT


# --- status of the client ---------------------------------------------------------------------------------------


def shown(disk: FakeDisk, **says: object) -> None:
    disk.status = VolumeStatus(disk.name, disk.uuid, disk.size_bytes, **says)  # type: ignore[arg-type]


@ACCESS
def test_a_volume_without_io_is_waited_for(attached: FakeNode, access: object) -> None:
    shown(attached.host.disks[NAME], io_enabled=False)
    with pytest.raises(DeadlineReached):
        attached.stage(access=access)  # type: ignore[arg-type]
    assert attached.host.formats == []
    shown(attached.host.disks[NAME], io_enabled=True)
    attached.stage(access=access)  # type: ignore[arg-type]


@ACCESS
def test_a_volume_that_its_client_keeps_read_only_is_not_staged_for_writing(attached: FakeNode, access: object) -> None:
    shown(attached.host.disks[NAME], io_enabled=True, refuses_writes=True, details="it is degraded")
    with pytest.raises(PreconditionFailed, match=r"refuses writes \(it is degraded\)"):
        attached.stage(access=access)  # type: ignore[arg-type]
    assert attached.host.formats == []


def test_a_raw_volume_that_its_client_keeps_read_only_is_not_published_for_writing(attached: FakeNode) -> None:
    attached.stage(access=BLOCK)
    shown(attached.host.disks[NAME], io_enabled=True, refuses_writes=True, details="it is degraded")
    with pytest.raises(PreconditionFailed, match=r"refuses writes \(it is degraded\)"):
        attached.publish(access=BLOCK)


def test_a_device_that_may_not_be_used_is_not_staged(attached: FakeNode) -> None:
    shown(attached.host.disks[NAME], io_enabled=True, refusal="it does not write data")
    with pytest.raises(PreconditionFailed, match="does not write data"):
        attached.stage()


def test_a_new_volume_of_the_same_name_is_not_published_after_an_upgrade(attached: FakeNode) -> None:
    attached.stage(access=BLOCK)
    attached.host.detach(NAME)
    attached.host.attach(NAME, OTHER_UUID)
    with pytest.raises(PreconditionFailed, match=f"expected {UUID}"):
        attached.publish(access=BLOCK, context=publish_context())
