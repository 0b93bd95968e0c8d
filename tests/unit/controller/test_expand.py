# SPDX-License-Identifier: Apache-2.0
"""ControllerExpandVolume over a storage management in memory."""

from __future__ import annotations

import pytest

from csi_driver.errors import CapacityOutOfRange, Exhausted, InvalidRequest, OperationPending, VolumeNotFound
from csi_driver.model import GIB, MIB, Capability, CapacityRange
from tests.unit.controller.world import BLOCK, RWO, RWX_MOUNT, World


def expand(
    world: World, volume_id: str, required: int, limit: int = 0, use: Capability | None = None
) -> tuple[int, bool]:
    return world.expand.expand(volume_id, CapacityRange(required, limit), use, deadline=world.deadline())


@pytest.mark.parametrize("parameters", [{}, {"raidLevel": "raid10"}, {"raidLevel": "ec"}, {"raidLevel": "sec"}])
def test_a_volume_grows_to_what_was_asked(parameters: dict[str, str]) -> None:
    world = World()
    made = world.create(capacity=CapacityRange(10 * GIB), parameters=parameters)
    assert expand(world, made.volume_id, 20 * GIB) == (20 * GIB, True)
    assert world.stored().size_bytes == 20 * GIB


def test_growing_again_by_a_byte_adds_one_step() -> None:
    world = World()
    made = world.create(capacity=CapacityRange(10 * GIB))
    assert expand(world, made.volume_id, 10 * GIB + 1)[0] == 10 * GIB + MIB


def test_a_volume_that_is_large_enough_is_left_alone() -> None:
    world = World()
    made = world.create(capacity=CapacityRange(10 * GIB))
    assert expand(world, made.volume_id, 5 * GIB)[0] == 10 * GIB
    assert "extend_volume" not in world.management.requests


@pytest.mark.parametrize(("use", "node_has_work"), [(None, True), (RWO, True), (BLOCK, False)])
def test_only_a_raw_device_leaves_the_node_nothing_to_do(use: Capability | None, node_has_work: bool) -> None:
    world = World()
    assert expand(world, world.create().volume_id, 2 * GIB, use=use)[1] is node_has_work


def test_an_attached_volume_grows() -> None:
    world = World()
    made = world.create()
    world.publish(made.volume_id)
    assert expand(world, made.volume_id, 2 * GIB)[0] == 2 * GIB


def test_another_controller_that_grew_it_first_is_no_failure() -> None:
    world = World()
    made = world.create(capacity=CapacityRange(GIB))

    def intrude(request: str) -> None:
        if request == "extend_volume":
            world.management.before = lambda request: None
            expand(world, made.volume_id, 2 * GIB)

    world.management.before = intrude
    assert expand(world, made.volume_id, 2 * GIB)[0] == 2 * GIB


def test_a_limit_below_the_present_size_is_out_of_range() -> None:
    world = World()
    made = world.create(capacity=CapacityRange(2 * GIB))
    with pytest.raises(CapacityOutOfRange):
        expand(world, made.volume_id, GIB, GIB)


def test_no_room_is_out_of_range_so_that_less_can_be_asked_for_instead() -> None:
    """csi-resizer 2.3 (util.IsFinalError) requests the same size until this error, or until the expansion is done."""
    world = World()
    made = world.create(capacity=CapacityRange(GIB))
    world.management.raw_bytes = 2 * GIB
    with pytest.raises(CapacityOutOfRange, match="3221225472") as refused:
        expand(world, made.volume_id, 3 * GIB)
    assert isinstance(refused.value.__cause__, Exhausted)
    assert world.stored().size_bytes == GIB
    assert expand(world, made.volume_id, 2 * GIB)[0] == 2 * GIB


def test_an_unknown_volume_is_not_found() -> None:
    with pytest.raises(VolumeNotFound):
        expand(World(), "none", GIB)


def test_an_impossible_capability_is_invalid() -> None:
    world = World()
    with pytest.raises(InvalidRequest):
        expand(world, world.create().volume_id, 2 * GIB, use=RWX_MOUNT)


def test_a_volume_that_is_still_being_made_is_pending() -> None:
    world = World()
    made = world.create()
    world.management.change(world.stored().name, action="initializing")
    with pytest.raises(OperationPending):
        expand(world, made.volume_id, 2 * GIB)
