# SPDX-License-Identifier: Apache-2.0
"""Space of detached volumes that the storage gives back, step by step."""

from __future__ import annotations

import pytest

from csi_driver.controller.features import ZoneFeatures
from csi_driver.controller.reclaim_space import ReclaimSpace
from csi_driver.deadline import Deadline
from csi_driver.errors import NotOffered, StorageUnavailable, VolumeNotFound
from csi_driver.management.codec import NVMESH_FEATURES
from csi_driver.storage_model import Features, ReclaimedSpace
from tests.unit.controller.world import World

STEP = 256 << 20


@pytest.fixture
def world() -> World:
    made = World()
    made.management.features = Features(reclaims_space=True)
    return made


def reclaim(world: World, volume_id: str, seconds: float = 60.0) -> tuple[int, int] | None:
    addons = ReclaimSpace(world.clusters, ZoneFeatures(world.clusters))
    return addons.reclaim(volume_id, deadline=Deadline.after(seconds, world.clock))


def steps(world: World) -> list[str]:
    return [each for each in world.management.requests if each.startswith("reclaim_space")]


def test_all_steps_are_done_and_the_usage_is_that_of_the_first_and_the_last(world: World) -> None:
    volume_id = world.create().volume_id
    world.management.reclaimed = [ReclaimedSpace(900, 700, STEP), ReclaimedSpace(700, 300, None)]
    assert reclaim(world, volume_id) == (900, 300)
    assert steps(world) == ["reclaim_space 0", f"reclaim_space {STEP}"]


def test_a_volume_in_use_is_left_as_it_is(world: World) -> None:
    volume_id = world.create().volume_id
    world.management.reclaimed = [None]
    assert reclaim(world, volume_id) is None
    assert len(steps(world)) == 1


def test_a_volume_that_is_attached_meanwhile_keeps_the_rest(world: World) -> None:
    volume_id = world.create().volume_id
    world.management.reclaimed = [ReclaimedSpace(900, 700, STEP), None]
    assert reclaim(world, volume_id) == (900, 700)


def test_a_storage_without_it_is_not_asked_for_a_step(world: World) -> None:
    volume_id = world.create().volume_id
    world.management.features = NVMESH_FEATURES
    with pytest.raises(NotOffered, match="gives back no space"):
        reclaim(world, volume_id)
    assert steps(world) == []


def test_a_volume_that_is_not_there_is_not_found(world: World) -> None:
    with pytest.raises(VolumeNotFound):
        reclaim(world, "single-zone-cluster:csi-absent:01234567-89ab-cdef-0123-456789abcdef")


def test_it_ends_at_the_deadline(world: World) -> None:
    volume_id = world.create().volume_id
    world.management.reclaimed = [ReclaimedSpace(900, 700, STEP)]
    with pytest.raises(StorageUnavailable):
        reclaim(world, volume_id, seconds=0)
    assert steps(world) == []
