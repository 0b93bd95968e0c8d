# SPDX-License-Identifier: Apache-2.0
"""The publish context: the facts by which a node decides whether to format."""

from __future__ import annotations

from dataclasses import replace

import pytest

from csi_driver.controller import volume_metadata
from csi_driver.errors import DeadlineReached, PreconditionFailed, StorageUnavailable
from csi_driver.model import Capability
from csi_driver.publish_context import History
from csi_driver.storage_model import Reservation, ReservationMode, Volume
from tests.unit.controller.world import (
    BLOCK,
    CLAIM,
    NODE_1,
    NODE_2,
    ROX,
    RWO,
    RWX_BLOCK,
    World,
    created,
    other_reference,
)

STATIC = Volume("golden", "99999999-0000-0000-0000-000000000000", 262144, 4096, 1.1, "online", "none")


def test_the_first_attachment_of_a_new_volume_is_the_first() -> None:
    world, volume_id = created()
    context = world.publish(volume_id)
    assert (context.history, context.attachment) == (History.FIRST, 1)


def test_a_retried_call_is_not_another_attachment() -> None:
    world, volume_id = created()
    world.management.attach_s = 40
    with pytest.raises(DeadlineReached):
        world.publish(volume_id)
    context = world.publish(volume_id)
    assert (context.history, context.attachment) == (History.FIRST, 1)


def test_a_count_whose_attachment_never_came_about_is_used_again() -> None:
    world, volume_id = created()

    def fail(request: str) -> None:
        if request == "attach":
            raise StorageUnavailable("lost")

    world.management.before = fail
    for _ in range(3):
        with pytest.raises(StorageUnavailable):
            world.publish(volume_id)
    world.management.before = lambda request: None
    context = world.publish(volume_id, NODE_2)
    assert (context.history, context.attachment) == (History.FIRST, 1)


def test_a_server_that_shows_an_earlier_attachment_of_this_node_is_not_believed() -> None:
    world, volume_id = created()
    world.publish(volume_id)
    before = world.stored()
    metadata = volume_metadata.with_permission(before.metadata, 1)  # the permission for then must not count now
    world.unpublish(volume_id)

    def show_old(request: str) -> None:
        if request == "attach":
            world.management.old_news[before.name] = replace(before, metadata=metadata)

    world.management.after = show_old
    context = world.publish(volume_id)
    assert (context.attachment, context.history, context.format_allowed) == (0, History.ATTACHED, False)
    world.management.old_news.clear()
    assert world.publish(volume_id).attachment == 3


def test_a_volume_that_a_server_shows_as_it_was_all_along_is_not_believed() -> None:
    world, volume_id = created()
    world.publish(volume_id)
    before = world.stored()
    world.unpublish(volume_id)
    world.publish(volume_id)
    world.management.old_news[before.name] = before
    context = world.publish(volume_id)
    assert (context.attachment, context.history) == (0, History.ATTACHED)


def test_a_raw_writer_is_not_forgotten_for_a_server_that_has_not_heard_of_it() -> None:
    world, volume_id = created()
    world.publish(volume_id)
    before = world.stored()
    world.unpublish(volume_id)

    def show_old(request: str) -> None:
        if request == "attach":
            world.management.old_news[before.name] = before

    world.management.after = show_old
    assert world.publish(volume_id, capability=BLOCK).history is History.WRITTEN


@pytest.mark.parametrize("handle", [CLAIM, {}])
def test_what_a_server_has_not_heard_of_is_detached_all_the_same(handle: dict[str, str]) -> None:
    world = World()
    volume_id = world.create(parameters=handle).volume_id
    world.publish(volume_id)
    world.management.unheard_of.add("node-1")
    world.unpublish(volume_id)
    world.management.unheard_of.clear()
    assert world.holders() == []


def test_what_a_server_has_not_heard_of_keeps_the_references_of_others() -> None:
    world, volume_id = created()
    world.publish(volume_id)
    world.publish(other_reference(volume_id, "team-b"))
    world.management.unheard_of.add("node-1")
    world.unpublish(volume_id)
    world.management.unheard_of.clear()
    assert world.holders() == ["node-1"]


def test_the_second_attachment_is_not_the_first() -> None:
    world, volume_id = created()
    world.publish(volume_id)
    world.unpublish(volume_id)
    context = world.publish(volume_id)
    assert (context.history, context.attachment) == (History.ATTACHED, 3)


def test_a_number_never_means_two_attachments() -> None:
    world, volume_id = created()
    numbers = []
    for node_id in (NODE_1, NODE_2, NODE_1):
        numbers.append(world.publish(volume_id, node_id).attachment)
        world.unpublish(volume_id, node_id)
        young = {**world.stored().metadata, "nvmesh-csi": {"format": 1, "created": True}}
        world.management.change(world.stored().name, metadata=young)
    assert numbers == [1, 3, 5]


@pytest.mark.parametrize("use", [RWO, ROX, RWX_BLOCK, BLOCK])
def test_a_refused_attachment_changes_nothing_for_the_holder(use: Capability) -> None:
    world, volume_id = created()
    first = world.publish(volume_id)
    before = world.stored()
    with pytest.raises(PreconditionFailed):
        world.publish(volume_id, NODE_2, use)
    assert world.stored() == before
    assert world.publish(volume_id) == first


def test_those_who_share_a_volume_share_the_number() -> None:
    world, volume_id = created()
    assert [world.publish(volume_id, node_id, RWX_BLOCK).attachment for node_id in (NODE_1, NODE_2, NODE_1)] == [
        1,
        1,
        1,
    ]


def test_a_reservation_that_was_set_back_does_not_make_the_volume_new() -> None:
    world, volume_id = created()
    for _ in range(2):
        world.publish(volume_id)
        world.unpublish(volume_id)
    world.management.change(world.stored().name, reservation=Reservation())
    context = world.publish(volume_id)
    assert (context.history, context.attachment) == (History.ATTACHED, 0)


def test_an_attachment_by_somebody_else_before_ours_shows() -> None:
    world, volume_id = created()
    client = world.management.client("node-2", deadline=world.deadline())
    assert client is not None
    mode = ReservationMode.EXCLUSIVE_READ_WRITE
    world.management.attach(client, world.stored(), mode=mode, reference_id=None, deadline=world.deadline())
    world.management.detach(client, world.stored(), reference_id=None, deadline=world.deadline())
    assert world.publish(volume_id).history is History.ATTACHED


def test_an_attachment_by_somebody_else_between_count_and_attach_shows() -> None:
    world, volume_id = created()
    client = world.management.client("node-2", deadline=world.deadline())
    assert client is not None

    def intrude(request: str) -> None:
        if request == "set_metadata":
            world.management.after = lambda request: None
            mode, deadline = ReservationMode.EXCLUSIVE_READ_WRITE, world.deadline()
            world.management.attach(client, world.stored(), mode=mode, reference_id=None, deadline=deadline)
            world.management.detach(client, world.stored(), reference_id=None, deadline=deadline)

    world.management.after = intrude
    context = world.publish(volume_id)
    assert (context.history, context.attachment) == (History.ATTACHED, 0)


def test_a_record_set_back_to_an_older_state_does_not_make_the_volume_new() -> None:
    world, volume_id = created()
    young = world.stored().metadata
    world.publish(volume_id)
    world.unpublish(volume_id)
    world.management.change(world.stored().name, metadata=young)
    assert world.publish(volume_id).history is History.ATTACHED


def test_a_volume_that_was_a_raw_device_counts_as_written() -> None:
    world, volume_id = created()
    world.publish(volume_id, capability=BLOCK)
    assert world.publish(volume_id, capability=RWO).history is History.WRITTEN


def test_a_raw_device_on_an_attachment_that_was_counted_for_mounting_is_recorded() -> None:
    world, volume_id = created()
    world.publish(volume_id, capability=RWO)
    world.publish(volume_id, capability=BLOCK)
    assert world.publish(volume_id, capability=RWO).history is History.WRITTEN


def test_a_volume_that_is_not_ours_has_an_unknown_history() -> None:
    world = World()
    world.management.add_volume(STATIC)
    assert world.publish("golden").history is History.UNKNOWN


@pytest.mark.parametrize(
    "damage", ["x", {"number": "1"}, {"number": 1, "clients": {"a": "1"}, "written": False, "broken": False}]
)
def test_a_damaged_record_proves_nothing(damage: object) -> None:
    world, volume_id = created()
    volume = world.stored()
    own = volume.metadata["nvmesh-csi"]
    assert isinstance(own, dict)
    world.management.change(volume.name, metadata={**volume.metadata, "nvmesh-csi": {**own, "attachments": damage}})
    for _ in range(2):
        assert world.publish(volume_id).history is not History.FIRST
        world.unpublish(volume_id)


def test_publishing_changes_nothing_else_in_the_metadata() -> None:
    world, volume_id = created()
    world.management.change(world.stored().name, metadata={**world.stored().metadata, "owner": {"team": "x"}})
    before = dict(world.stored().metadata)
    world.publish(volume_id)
    after = dict(world.stored().metadata)
    assert {k: v for k, v in after.items() if k != "nvmesh-csi"} == {
        k: v for k, v in before.items() if k != "nvmesh-csi"
    }
