# SPDX-License-Identifier: Apache-2.0
"""Nodes that connect over NVMe/TCP: the export in the publish context, and a client without a connection."""

from __future__ import annotations

import pytest

from csi_driver.controller.list_volumes import GetVolumeHealth
from csi_driver.errors import DeadlineReached, NodeNotFound, PreconditionFailed
from csi_driver.model import Capability, Reason
from csi_driver.nvme_model import is_nqn
from csi_driver.publish_context import PublishContext
from csi_driver.storage_model import ClientStatus
from tests.unit.controller.world import CLAIM, NODE_3, ROX, RWO, RWX_BLOCK, World

ONE, OTHER = "worker-1", "worker-2"


@pytest.fixture
def world() -> World:
    made = World()
    for node in (ONE, OTHER):
        made.management.add_node(node)
    made.create(parameters=CLAIM)
    return made


@pytest.fixture
def volume_id(world: World) -> str:
    (entry,) = world.listed()[0]
    return entry.volume.volume_id


def test_the_context_says_where_the_node_connects(world: World, volume_id: str) -> None:
    context = world.publish(volume_id, ONE)
    assert context.nvme is not None
    assert is_nqn(context.nvme.nqn)
    assert context.nvme.paths == ("10.0.0.1:23001", "10.0.1.1:23001")
    assert PublishContext.from_map(context.as_map()) == context


def test_a_client_with_a_device_of_its_own_connects_nowhere(world: World, volume_id: str) -> None:
    assert world.publish(volume_id, NODE_3).nvme is None


def test_an_export_costs_no_request(world: World, volume_id: str) -> None:
    counts = []
    for node in (ONE, "node-1"):
        before = len(world.management.requests)
        world.publish(volume_id, node)
        world.unpublish(volume_id, node)
        counts.append(len(world.management.requests) - before)
    assert counts[0] == counts[1]


def test_an_attachment_without_an_export_is_not_done(world: World, volume_id: str) -> None:
    world.management.exports_nothing = True
    with pytest.raises(DeadlineReached, match="the storage has not exported the volume yet"):
        world.publish(volume_id, ONE)


@pytest.mark.parametrize("capability", [RWO, ROX, RWX_BLOCK])
def test_a_node_without_a_connection_gets_a_volume(world: World, volume_id: str, capability: Capability) -> None:
    world.management.set_status(ONE, ClientStatus.DOWN)
    assert world.publish(volume_id, ONE, capability).nvme is not None


def test_a_node_without_a_connection_gets_the_volume_again_once_it_is_detached(world: World, volume_id: str) -> None:
    world.publish(volume_id, ONE)
    world.management.set_status(ONE, ClientStatus.DOWN)
    world.management.detach_s = 3.0
    world.unpublish(volume_id, ONE)
    assert world.publish(volume_id, ONE).nvme is not None


@pytest.mark.parametrize("node_id", ["Worker-1", "worker-1.example.com"])
def test_a_node_of_a_similar_name_is_not_this_one(world: World, volume_id: str, node_id: str) -> None:
    with pytest.raises(NodeNotFound):
        world.publish(volume_id, node_id)


def test_lists_name_the_node_as_kubernetes_does(world: World, volume_id: str) -> None:
    world.publish(volume_id, ONE, ROX)
    world.publish(volume_id, NODE_3, ROX)
    (entry,) = world.listed()[0]
    assert sorted(entry.published_node_ids) == sorted([ONE, NODE_3])


def test_a_connected_node_keeps_the_volume_and_the_error_names_how_to_find_the_program(
    world: World, volume_id: str
) -> None:
    world.publish(volume_id, ONE)
    world.management.set_busy(ONE, world.stored())
    with pytest.raises(DeadlineReached, match=r"the node is connected to it, .* `fuser -vam /dev/nvmesh/") as refused:
        world.unpublish(volume_id, ONE, seconds=5)
    assert "nvmeibc" not in str(refused.value)
    assert world.holders() == [ONE]


def test_a_volume_moves_when_it_is_released_and_the_node_has_no_connection(world: World, volume_id: str) -> None:
    world.publish(volume_id, ONE)
    world.management.detach_s = 600.0
    world.management.set_status(ONE, ClientStatus.DOWN)
    world.unpublish(volume_id, ONE)
    assert world.publish(volume_id, OTHER).nvme is not None
    assert world.stored().reservation.attached == (OTHER,)


@pytest.mark.parametrize(
    ("status", "released", "why"),
    [
        (ClientStatus.DOWN, False, "the NVMe connection of the node is down, but the volume was not released there"),
        (ClientStatus.READY, False, "the NVMe connection of the node is ready and the volume is attached there"),
        (ClientStatus.READY, True, "the NVMe connection of the node is ready and the volume is being detached there"),
    ],
)
def test_a_volume_stays_where_it_is_connected_or_was_not_released(
    world: World, volume_id: str, status: ClientStatus, released: bool, why: str
) -> None:
    world.publish(volume_id, ONE)
    world.management.set_busy(ONE, world.stored())
    if released:
        with pytest.raises(DeadlineReached):
            world.unpublish(volume_id, ONE, seconds=5)
    world.management.set_status(ONE, status)
    with pytest.raises(PreconditionFailed, match=why) as refused:
        world.publish(volume_id, OTHER)
    assert f"attached to node {ONE} (" in str(refused.value)


def test_health_names_the_connection_of_a_lost_node(world: World, volume_id: str) -> None:
    world.publish(volume_id, ONE)
    world.management.set_status(ONE, ClientStatus.DOWN)
    (entry,) = GetVolumeHealth(world.listing).volume(volume_id, deadline=world.deadline()).entries
    assert (entry.reason, entry.message) == (
        Reason.NODE_DOWN,
        f"it is attached to {ONE}, which has no connection to it",
    )


def test_the_way_to_delete_a_volume_of_a_lost_node_is_to_detach_it(world: World, volume_id: str) -> None:
    world.publish(volume_id, ONE)
    world.management.set_status(ONE, ClientStatus.DOWN)
    with pytest.raises(PreconditionFailed, match="detach it first") as refused:
        world.delete(volume_id)
    assert "/clients/delete" not in str(refused.value)
    world.unpublish(volume_id, ONE)
    world.delete(volume_id)
