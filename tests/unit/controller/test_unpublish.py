# SPDX-License-Identifier: Apache-2.0
"""ControllerUnpublishVolume over a storage management in memory."""

from __future__ import annotations

from dataclasses import replace

import pytest

from csi_driver.controller.fencing import UnpublishVolume
from csi_driver.errors import DeadlineReached, PreconditionFailed, StorageUnavailable
from csi_driver.model import DEFAULT_ZONE, Capability
from csi_driver.publish_context import History
from csi_driver.storage_model import ClientStatus, ReservationMode
from tests.unit.controller.world import BLOCK, NODE_1, NODE_2, ROX, RWO, World, created


def test_the_device_is_gone_when_unpublish_answers() -> None:
    world, volume_id = created()
    world.management.detach_s = 20
    world.publish(volume_id)
    world.unpublish(volume_id)
    assert world.holders() == []
    assert world.stored().reservation.mode is ReservationMode.NONE


@pytest.mark.parametrize("volume_id", ["none", "", "single-zone-cluster:none"])
def test_unpublishing_an_unknown_volume_succeeds(volume_id: str) -> None:
    World().unpublish(volume_id)


def test_unpublishing_from_an_unknown_node_succeeds() -> None:
    world, volume_id = created()
    world.unpublish(volume_id, "nobody")


def test_unpublishing_twice_succeeds() -> None:
    world, volume_id = created()
    world.publish(volume_id)
    world.unpublish(volume_id)
    world.unpublish(volume_id)


def test_no_node_means_all_nodes() -> None:
    world, volume_id = created()
    for node_id in (NODE_1, NODE_2):
        world.publish(volume_id, node_id, ROX)
    world.unpublish(volume_id, "")
    assert world.holders() == []


def test_another_volume_under_the_same_name_is_left_alone() -> None:
    world, volume_id = created()
    world.publish(volume_id)
    world.unpublish(volume_id.replace(world.stored().uuid, "00000000-0000-0000-0000-000000000000"))
    assert world.holders() == ["node-1"]


def test_an_open_device_stays_attached_and_the_error_names_how_to_find_the_program() -> None:
    world, volume_id = created()
    world.publish(volume_id)
    world.management.set_busy("node-1", world.stored())
    name = world.stored().name
    with pytest.raises(
        DeadlineReached,
        match=f"a program on that node may have it open: see `fuser .*/{name}` .*/volumes/{name}/client_processes",
    ):
        world.unpublish(volume_id, seconds=5)
    client = world.management.client("node-1", deadline=world.deadline())
    assert client is not None
    assert client.desired[world.stored().uuid].is_detaching
    world.management.set_busy("node-1", world.stored(), busy=False)
    world.unpublish(volume_id)
    assert world.holders() == []


def test_a_detachment_that_takes_long_says_that_the_volume_is_degraded() -> None:
    world, volume_id = created()
    world.publish(volume_id)
    world.management.set_busy("node-1", world.stored())
    world.management._volumes[world.stored().name] = replace(world.stored(), status="degraded")
    with pytest.raises(DeadlineReached, match="device attached, and the volume is degraded in the storage management"):
        world.unpublish(volume_id, seconds=5)


def test_a_volume_that_is_being_detached_is_not_attached_again_to_force_it() -> None:
    """Force applies to the last reference; another attachment would give the device back to the node."""
    world, volume_id = created()
    world.publish(volume_id)
    world.management.set_busy("node-1", world.stored())
    with pytest.raises(DeadlineReached):
        world.unpublish(volume_id, seconds=5)
    by_force = UnpublishVolume(world.clusters, replace(world.settings, force_detach=True))
    with pytest.raises(DeadlineReached, match="may have it open"):
        by_force.unpublish(volume_id, NODE_1, deadline=world.deadline(5))
    assert world.management.requests.count("attach") == 1
    assert world.holders() == ["node-1"]


def test_a_detachment_that_overtakes_the_attachment_waits_for_the_device() -> None:
    """The management forgets an attachment at once if no device was reported, while its message is under way."""
    world, volume_id = created()
    world.management.attach_s, world.management.detach_s = 40.0, 3.0
    with pytest.raises(DeadlineReached, match="the client reports no device"):
        world.publish(volume_id)
    world.unpublish(volume_id)
    world.clock.sleep(20)
    assert world.holders() == ["node-1"]
    with pytest.raises(PreconditionFailed, match="still attached to node-1"):
        world.delete(volume_id)
    world.management.attach_s = 0.0
    world.publish(volume_id)
    assert world.holders() == ["node-1"]
    world.unpublish(volume_id)
    world.delete(volume_id)
    assert world.management.all_volumes() == []


def test_while_a_clients_reports_stay_unread_an_attachment_is_awaited_not_repeated() -> None:
    world, volume_id = created()
    world.management.unread.add("node-1")
    with pytest.raises(DeadlineReached, match="the client reports no device"):
        world.publish(volume_id)
    world.management.unread.clear()
    world.management.set_status("node-1", ClientStatus.READY)
    world.publish(volume_id)
    assert world.management.requests.count("attach") == 1


def test_a_snapshot_is_refused_by_its_name_before_anything_is_written() -> None:
    world, volume_id = created()
    world.management.change(world.stored().name, is_snapshot=True)
    with pytest.raises(PreconditionFailed, match="is a snapshot, which the storage client of a node cannot attach"):
        world.publish(volume_id)
    assert "set_metadata" not in world.management.requests


def test_forced_detachment_reaches_the_storage() -> None:
    world, volume_id = created(force_detach=True)
    world.publish(volume_id)
    world.management.set_busy("node-1", world.stored())
    world.unpublish(volume_id)
    assert world.holders() == []


def test_for_a_node_that_is_down_the_wish_is_recorded() -> None:
    world, volume_id = created()
    world.publish(volume_id)
    world.management.set_status("node-1", ClientStatus.DOWN)
    world.unpublish(volume_id)
    client = world.management.client("node-1", deadline=world.deadline())
    assert client is not None
    assert client.desired[world.stored().uuid].is_detaching


def test_a_node_whose_client_is_deleted_meanwhile_is_done_with() -> None:
    world, volume_id = created()
    world.publish(volume_id)
    world.management.detach_s = 1000
    world.management.after = lambda r: world.management.remove_client("node-1") if r == "detach" else None
    world.unpublish(volume_id)


def test_a_volume_of_an_unknown_zone_is_not_attached_to_a_node_of_a_known_one() -> None:
    """A storage client belongs to one cluster: the PersistentVolume names a wrong zone, and must be able to go."""
    world, volume_id = created()
    world.unpublish(volume_id.replace(DEFAULT_ZONE, "mars"))
    world.unpublish("mars:csi-1")


def test_a_zone_that_is_served_under_another_name_is_not_declared_detached() -> None:
    world, volume_id = created()
    world.publish(volume_id)
    for handle in (volume_id.replace(DEFAULT_ZONE, "mars"), f"mars:{world.stored().name}"):
        with pytest.raises(PreconditionFailed, match="has a volume of that name attached in zone single"):
            world.unpublish(handle)
    world.management.detach_s = 100.0
    with pytest.raises(DeadlineReached):
        world.unpublish(volume_id, seconds=5)
    with pytest.raises(PreconditionFailed, match="mars"):  # it is being detached, and not yet gone
        world.unpublish(volume_id.replace(DEFAULT_ZONE, "mars"))
    assert world.holders() == ["node-1"]


def test_a_device_without_a_name_may_be_of_a_zone_that_is_not_served() -> None:
    world, volume_id = created()
    world.publish(volume_id)
    volume = world.stored()
    client = world.management._clients["node-1"]
    client.devices[volume.uuid] = replace(client.devices[volume.uuid], volume_name="")
    del client.desired[volume.uuid]
    for handle in (volume_id.replace(DEFAULT_ZONE, "mars"), f"mars:{volume.name}"):
        with pytest.raises(PreconditionFailed, match="mars"):
            world.unpublish(handle)
    world.unpublish(f"mars:{volume.name}:00000000-0000-0000-0000-000000000000")


@pytest.mark.parametrize("node_id", ["node-of-mars", "node-1", "12345678-0000-0000-0000-000000000000", ""])
def test_a_volume_of_an_unserved_zone_stays_attached_to_an_unknown_node(node_id: str) -> None:
    with pytest.raises(PreconditionFailed, match=r"mars.*remove the finalizer of the VolumeAttachment"):
        World().unpublish("mars:csi-1", node_id)


def test_an_unreachable_zone_may_know_the_node_of_a_volume_in_an_unknown_zone() -> None:
    world = World(zones=("a", "b"))
    world.zones["b"].is_reachable = False
    with pytest.raises(StorageUnavailable):
        world.unpublish("mars:csi-1")


@pytest.mark.parametrize(("first", "second"), [(RWO, BLOCK), (BLOCK, RWO)], ids=["filesystem first", "block first"])
def test_an_attachment_serves_raw_block_and_filesystem_and_counts_as_written(
    first: Capability, second: Capability
) -> None:
    """See docs/decisions/0006-access-modes.md: the node gets the same device in both modes."""
    world, volume_id = created()
    number = world.publish(volume_id, capability=first).attachment
    again = world.publish(volume_id, capability=second)
    assert (again.attachment, again.history) == (number, History.WRITTEN)
    assert world.management.requests.count("attach") == 1
    world.unpublish(volume_id)
    assert world.publish(volume_id, capability=RWO).history is History.WRITTEN
