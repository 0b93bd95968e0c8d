# SPDX-License-Identifier: Apache-2.0
"""ListVolumes and ControllerGetVolume over a storage management in memory."""

from __future__ import annotations

from dataclasses import replace

import pytest

from csi_driver.controller.list_volumes import GetVolumeHealth
from csi_driver.controller.volume_metadata import OWN_KEY
from csi_driver.errors import StaleToken, VolumeNotFound
from csi_driver.model import ListedVolume, VolumeHealth
from csi_driver.rpc import wire
from csi_driver.storage_model import ClientStatus, Volume
from tests.unit.controller.world import CLAIM, NODE_1, NODE_2, ROX, World, other_reference

STATIC = Volume("golden", "99999999-0000-0000-0000-000000000000", 262144, 4096, 1.1, "online", "none")


def listed(world: World, page: int = 0, token: str = "") -> tuple[list[ListedVolume], str]:
    return world.listed(page, token)


def all_pages(world: World, page: int) -> list[str]:
    found, token = listed(world, page)
    ids = [entry.volume.volume_id for entry in found]
    while token:
        assert len(token.encode()) <= 128
        found, token = listed(world, page, token)
        assert 0 < len(found) <= page
        ids += [entry.volume.volume_id for entry in found]
    return ids


def ids(world: World) -> list[str]:
    return [entry.volume.volume_id for entry in listed(world)[0]]


# --- lists ----------------------------------------------------------------------------------------------------


def test_a_volume_shows_as_it_was_created() -> None:
    world = World()
    made = world.create(parameters=CLAIM)
    assert listed(world) == ([ListedVolume(made, ())], "")


def test_a_volume_shows_the_nodes_it_is_published_to() -> None:
    world = World()
    made = world.create(parameters=CLAIM)
    world.publish(made.volume_id, "node-1", ROX)
    world.publish(made.volume_id, "node-2", ROX)
    (entry,) = listed(world)[0]
    assert sorted(entry.published_node_ids) == sorted([NODE_1, NODE_2])


def test_a_node_that_detaches_the_volume_is_not_listed() -> None:
    world = World()
    made = world.create(parameters=CLAIM)
    world.publish(made.volume_id)
    world.management.set_status("node-1", ClientStatus.DOWN)
    world.unpublish(made.volume_id)
    assert listed(world)[0][0].published_node_ids == ()


def test_a_static_volume_shows_under_zone_name_and_uuid() -> None:
    world = World()
    world.management.add_volume(STATIC)
    assert ids(world) == [f"single-zone-cluster:golden:{STATIC.uuid}"]


@pytest.mark.parametrize(
    "spelling", ["golden", "single-zone-cluster:golden", f"single-zone-cluster:golden:{STATIC.uuid}:A b"]
)
def test_another_spelling_shows_while_it_is_attached(spelling: str) -> None:
    world = World()
    world.management.add_volume(STATIC)
    world.publish(spelling)
    shown = {entry.volume.volume_id: entry.published_node_ids for entry in listed(world)[0]}
    assert shown[spelling] == (NODE_1,)
    assert len(shown) == 2
    world.unpublish(spelling)
    assert len(ids(world)) == 1


def test_a_readers_copy_shows_beside_the_issued_handle() -> None:
    world = World()
    made = world.create(parameters=CLAIM)
    copy = other_reference(made.volume_id, "team-b")
    world.publish(made.volume_id, NODE_1, ROX)
    world.publish(copy, NODE_2, ROX)
    assert {e.volume.volume_id: e.published_node_ids for e in listed(world)[0]} == {
        made.volume_id: (NODE_1,),
        copy: (NODE_2,),
    }


def test_a_readers_copy_costs_no_write() -> None:
    world = World()
    made = world.create(parameters=CLAIM)
    world.publish(made.volume_id, NODE_1, ROX)
    world.management.requests.clear()
    world.publish(other_reference(made.volume_id, "team-b"), NODE_1, ROX)
    assert "set_metadata" not in world.management.requests


@pytest.mark.parametrize(
    "change", [{"action": "markedForDeletion"}, {"status": "toBeDeleted"}, {"is_reserved": True}, {"name": "golden_MD"}]
)
def test_internal_volumes_are_not_listed(change: dict[str, object]) -> None:
    world = World()
    world.management.add_volume(replace(STATIC, **change))  # type: ignore[arg-type]
    assert ids(world) == []


@pytest.mark.parametrize("page", [1, 2, 3, 5, 7, 100])
def test_pages_together_are_the_whole_list(page: int) -> None:
    world = World(zones=("b", "a"))
    for zone in world.zones.values():
        for number in range(5):
            zone.add_volume(replace(STATIC, name=f"v{number}", uuid=f"99999999-0000-0000-0000-00000000000{number}"))
    for reference in ("x", "y", "z"):
        world.publish(f"a:v2:99999999-0000-0000-0000-000000000002:{reference}", "node-1", ROX)
    assert all_pages(world, page) == ids(world)
    assert len(ids(world)) == 13


def test_a_page_resumes_where_it_ended_although_the_volume_there_is_gone() -> None:
    world = World()
    for number in range(4):
        world.management.add_volume(replace(STATIC, name=f"v{number}"))
    _, token = listed(world, 2)
    world.management.change("v1", is_reserved=True)
    assert [e.volume.volume_id.split(":")[1] for e in listed(world, 2, token)[0]] == ["v2", "v3"]


def test_the_last_page_has_no_token() -> None:
    world = World()
    for number in range(4):
        world.management.add_volume(replace(STATIC, name=f"v{number}"))
    _, token = listed(world, 2)
    assert listed(world, 2, token)[1] == ""


@pytest.mark.parametrize("token", ["invalid-token", "v1.", "v1.!!!!", "v1.YQ", "v1.YQpiCmM", "7", "v1.\u00fc"])
def test_a_token_that_was_not_issued_is_stale(token: str) -> None:
    with pytest.raises(StaleToken):
        listed(World(), 1, token)


def test_a_page_costs_the_same_wherever_it_lies() -> None:
    world = World()
    for number in range(50):
        world.management.add_volume(replace(STATIC, name=f"v{number:02}"))
    token = ""
    for _ in range(5):
        world.management.requests.clear()
        _, token = listed(world, 5, token)
        assert world.management.requests == ["clients", "volumes"]


# --- one volume -----------------------------------------------------------------------------------------------


def test_a_volume_is_shown_with_the_requested_id() -> None:
    world = World()
    made = world.create(parameters=CLAIM)
    world.publish(made.volume_id)
    name = world.stored().name
    shown = world.listing.volume(name, deadline=world.deadline())
    assert shown.volume.volume_id == name
    assert shown.published_node_ids == ()
    assert world.listing.volume(made.volume_id, deadline=world.deadline()).published_node_ids == (NODE_1,)


def test_an_unknown_volume_is_not_found() -> None:
    world = World()
    with pytest.raises(VolumeNotFound):
        world.listing.volume("none", deadline=world.deadline())


# --- pages that a message can hold ----------------------------------------------------------------------------

GRPC_LIMIT = 4 << 20


def many(count: int, *, letters: int = 0) -> World:
    world = World()
    own = {"format": 1, "created": True}
    metadata = {"csi_name": "x", "mkfsOptions": "-O " + "a" * letters, OWN_KEY: own} if letters else {}
    for number in range(count):
        name = f"v{number:06d}"
        world.management.add_volume(
            replace(STATIC, name=name, uuid=f"00000000-0000-0000-0000-{number:012d}", metadata=metadata)
        )
    return world


@pytest.mark.parametrize("asked", [0, 1_000_000])
def test_a_page_fits_into_a_message(asked: int) -> None:
    world = many(5_000, letters=900)
    pages, token, seen = 0, "", list[str]()
    while token or not pages:
        message = wire.VolumeList()
        token = world.listing.volumes(asked, token, message.add, deadline=world.deadline())
        assert message.response.ByteSize() < GRPC_LIMIT
        seen += [entry.volume.volume_id for entry in message.response.entries]
        pages += 1
    assert pages == 2  # which are not smaller than they need be
    assert len(seen) == len(set(seen)) == 5_000


def test_a_page_of_health_fits_into_a_message() -> None:
    world = many(12_000)
    for volume in world.management.all_volumes():
        world.management.change(volume.name, status="degraded", health="alarm", action="rebuilding")
    health = GetVolumeHealth(world.listing)
    pages, token, seen = 0, "", list[str]()
    while token or not pages:
        found: list[VolumeHealth] = []
        sizes: list[int] = []

        def add(each: VolumeHealth) -> int:
            found.append(each)  # noqa: B023
            sizes.append(wire.volume_health_to(each).ByteSize() + 8)  # noqa: B023
            return sizes[-1]  # noqa: B023

        token = health.volumes(0, token, add, deadline=world.deadline())
        assert sum(sizes) < GRPC_LIMIT
        assert all(each.entries for each in found)
        seen += [each.volume_id for each in found]
        pages += 1
    assert pages > 1
    assert len(seen) == len(set(seen)) == 12_000
