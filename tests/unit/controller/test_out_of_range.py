# SPDX-License-Identifier: Apache-2.0
"""A volume that comes out outside its requested range is deleted by the call that made it, and no other ever is."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest

from csi_driver.errors import CapacityOutOfRange, OperationPending, StorageUnavailable
from csi_driver.model import GIB, MIB, CapacityRange
from csi_driver.storage_model import Reservation, ReservationMode, Volume
from tests.unit.controller.world import World

EXACT = CapacityRange(2 * GIB, 2 * GIB)
NEARLY = CapacityRange(2 * GIB, 2 * GIB + MIB - 1)


def comes_out(world: World, more_bytes: int, *, request: str = "create_volume") -> None:
    """Let the server round otherwise than the driver predicts."""

    def change(done: str) -> None:
        if done == request:
            volume = world.stored()
            world.management.change(volume.name, blocks=volume.blocks + more_bytes // 4096)

    for management in world.zones.values():
        management.after = change


def stored_size(world: World) -> int:
    return world.stored().size_bytes


@pytest.mark.parametrize("more_bytes", [MIB, -4096])
@pytest.mark.parametrize("zones", [("a",), ("a", "b")])
def test_a_volume_that_cannot_be_extended_into_the_range_is_deleted_in_the_same_call(
    zones: tuple[str, ...], more_bytes: int
) -> None:
    world = World(zones=zones)
    for zone, management in world.zones.items():
        management.raw_bytes = 10 * GIB if zone == "a" else 0
    comes_out(world, more_bytes)
    for _ in range(2):
        with pytest.raises(CapacityOutOfRange, match=r"created a volume of .* bytes, which was deleted"):
            world.create(capacity=EXACT)
        world.clock.sleep(10)
        assert [volume for management in world.zones.values() for volume in management.all_volumes()] == []


def test_a_volume_that_comes_out_short_is_lengthened_where_the_range_allows_it() -> None:
    world = World()
    comes_out(world, -MIB)
    assert world.create(capacity=EXACT).capacity_bytes == 2 * GIB
    assert stored_size(world) == 2 * GIB


def test_a_volume_whose_extension_leads_beyond_the_limit_is_deleted_in_the_same_call() -> None:
    world = World()
    comes_out(world, -MIB)
    create = world.management.after

    def change(done: str) -> None:
        create(done)
        if done == "extend_volume":
            world.management.change(world.stored().name, blocks=(2 * GIB + 2 * MIB) // 4096)

    world.management.after = change
    with pytest.raises(CapacityOutOfRange, match="expected at most"):
        world.create(capacity=EXACT)
    world.clock.sleep(10)
    assert world.management.all_volumes() == []


def test_a_short_volume_that_one_call_could_not_delete_is_deleted_by_the_next() -> None:
    world = World()
    comes_out(world, -4096)
    world.management.make_s = 100.0
    with pytest.raises(OperationPending, match="cannot be deleted yet; retry"):
        world.create(capacity=EXACT, seconds=10)
    assert stored_size(world) == 2 * GIB - 4096
    world.clock.sleep(100)
    with pytest.raises(CapacityOutOfRange, match="which was deleted"):
        world.create(capacity=EXACT)
    world.clock.sleep(10)
    assert world.management.all_volumes() == []


def attached_once(volume: Volume) -> Volume:
    return replace(volume, reservation=Reservation(ReservationMode.NONE, 3))


def attached_now(volume: Volume) -> Volume:
    return replace(volume, reservation=Reservation(ReservationMode.EXCLUSIVE_READ_WRITE, 2, "node-1", ("node-1",)))


def recorded(volume: Volume) -> Volume:
    own = {**volume.metadata["nvmesh-csi"], "attachments": {"number": 1, "clients": {}, "written": False}}  # type: ignore[dict-item]
    return replace(volume, metadata={**volume.metadata, "nvmesh-csi": own})


@pytest.mark.parametrize("used", [attached_once, attached_now, recorded])
def test_a_volume_that_was_ever_attached_is_kept(used: Callable[[Volume], Volume]) -> None:
    world = World()
    comes_out(world, -4096)
    shorten = world.management.after

    def use(done: str) -> None:
        shorten(done)
        if done == "create_volume":
            volume = used(world.stored())
            world.management.change(volume.name, reservation=volume.reservation, metadata=volume.metadata)

    world.management.after = use
    with pytest.raises(StorageUnavailable, match="it was attached and is kept"):
        world.create(capacity=EXACT)
    assert stored_size(world) == 2 * GIB - 4096


def test_a_volume_that_a_node_holds_is_kept() -> None:
    world = World()
    comes_out(world, -4096)
    shorten = world.management.after

    def use(done: str) -> None:
        shorten(done)
        if done == "create_volume":
            volume = world.stored()
            (client, *_) = world.management.clients(deadline=world.deadline())
            mode = ReservationMode.SHARED_READ_ONLY
            world.management.attach(client, volume, mode=mode, reference_id=None, deadline=world.deadline())
            world.management.change(volume.name, reservation=Reservation())

    world.management.after = use
    with pytest.raises(StorageUnavailable, match="it was attached and is kept"):
        world.create(capacity=EXACT)
    assert stored_size(world) == 2 * GIB - 4096


def test_a_volume_expanded_since_its_creation_is_not_judged_by_its_first_range() -> None:
    world = World()
    answer = world.create(capacity=EXACT)
    volume = world.stored()
    world.management.change(volume.name, blocks=volume.blocks * 2)
    assert world.create(capacity=EXACT).volume_id == answer.volume_id
    assert stored_size(world) == 4 * GIB


def test_a_short_volume_of_an_earlier_driver_is_never_deleted() -> None:
    world = World()
    world.create(capacity=NEARLY)
    volume = world.stored()
    old = {key: value for key, value in volume.metadata.items() if key != "nvmesh-csi"}
    world.management.change(volume.name, blocks=volume.blocks - 1, metadata=old)
    with pytest.raises(StorageUnavailable, match="not usable yet"):
        world.create(capacity=EXACT)
    assert stored_size(world) == 2 * GIB - 4096
