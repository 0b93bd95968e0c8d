# SPDX-License-Identifier: Apache-2.0
"""A controller over several zones: zone selection, one volume for each name, and unreachable zones."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import replace

import pytest

from csi_driver.controller.capacity import ZoneSelection, by_free_space
from csi_driver.controller.delete_volume import DeleteVolume
from csi_driver.controller.ports import CreateRequest, TopologyRequirement
from csi_driver.errors import (
    Exhausted,
    ExistsDifferently,
    InvalidRequest,
    OutcomeUnknown,
    PreconditionFailed,
    StorageUnavailable,
)
from csi_driver.model import DEFAULT_TOPOLOGY_KEY, GIB, CapacityRange
from csi_driver.parameters.storage_class import parse
from csi_driver.settings import ControllerSettings, ZonePolicy
from csi_driver.storage_model import Layout, Volume, Vpg
from tests.fakes.management import FakeManagement
from tests.unit.controller.world import CLAIM, NODE_1, RWO, World

OLD = Volume(
    "csi-old", "99999999-0000-0000-0000-000000000000", GIB // 4096, 4096, 1.1, "online", "none",
    metadata={"csi_name": "pvc-old", "zone": "single-zone-cluster", "csi-storage-k8s-io/pvc/namespace": "team-a"},
)  # fmt: skip
TIB = 1 << 40
SKIPPING = ControllerSettings(allow_zone_skip=True)


def within(*zones: str) -> TopologyRequirement:
    return TopologyRequirement(*(tuple({DEFAULT_TOPOLOGY_KEY: zone} for zone in zones),) * 2)


def two(settings: ControllerSettings | None = None) -> World:
    return World(settings, zones=("a", "b"))


def volumes(world: World) -> dict[str, list[str]]:
    return {zone: [volume.uuid for volume in each.all_volumes()] for zone, each in world.zones.items()}


def duplicate(world: World, source: str, target: str, **changes: object) -> Volume:
    """Put a second volume of the same CSI name where a controller that died would have left it."""
    (volume,) = world.zones[source].all_volumes()
    copy = replace(volume, uuid="22222222-0000-0000-0000-000000000000", **changes)  # type: ignore[arg-type]
    world.zones[target].add_volume(copy)
    return copy


# --- zone selection -------------------------------------------------------------------------------------------


def order(policy: ZonePolicy, zones: Sequence[str], calls: int, world: World | None = None) -> list[list[str]]:
    world = world or World(zones=("a", "b", "c"))
    selection = ZoneSelection(world.clusters, ControllerSettings(zone_policy=policy))
    request = CreateRequest("any", CapacityRange(GIB), (RWO,))
    return [
        selection.order(zones, request, name=f"v{number}", parameters=parse({}), deadline=world.deadline())
        for number in range(calls)
    ]


def test_round_robin_begins_with_each_zone_in_turn() -> None:
    assert [each[0] for each in order(ZonePolicy.ROUND_ROBIN, ("b", "a", "c"), 4)] == ["a", "b", "c", "a"]


def test_random_begins_with_any_zone() -> None:
    first = Counter(each[0] for each in order(ZonePolicy.RANDOM, ("a", "b", "c"), 300))
    assert set(first) == {"a", "b", "c"}


def test_volumes_spread_in_proportion_to_free_space() -> None:
    world = two()
    world.zones["a"].raw_bytes, world.zones["b"].raw_bytes = 30 * TIB, 10 * TIB
    first = Counter(each[0] for each in order(ZonePolicy.FREE_SPACE, ("a", "b"), 2000, world))
    assert 0.70 < first["a"] / 2000 < 0.80


def test_free_space_is_asked_for_once_in_a_while() -> None:
    world = two()
    order(ZonePolicy.FREE_SPACE, ("a", "b"), 100, world)
    assert world.management.requests.count("raw_space") == 1


def test_a_repeated_call_meets_the_same_zone_although_space_has_changed_a_little() -> None:
    before = {"a": 40 * TIB, "b": 42 * TIB}
    after = {"a": 40 * TIB - 10 * GIB, "b": 42 * TIB}
    moved = [n for n in range(1000) if by_free_space(before, f"v{n}", 1) != by_free_space(after, f"v{n}", 1)]
    assert len(moved) < 5


def test_zones_without_room_come_last() -> None:
    assert all(by_free_space({"a": GIB, "b": 9 * GIB}, f"v{n}", 5 * GIB) == ["b", "a"] for n in range(20))


def test_the_preference_of_the_request_comes_before_the_policy() -> None:
    world = two()
    world.zones["b"].raw_bytes = GIB * 2
    for number in range(5):
        world.zones["b"].raw_bytes += 2 * GIB
        made = world.create(f"v{number}", topology=within("b", "a"))
        assert made.topology == ({DEFAULT_TOPOLOGY_KEY: "b"},)


def test_a_group_that_one_zone_lacks_is_used_in_another() -> None:
    world = two()
    world.zones["b"].add_vpg(Vpg("gold", Layout(), 0, allow_overflow=True))
    assert world.create(parameters={"vpg": "gold"}, topology=within("a", "b")).topology[0][DEFAULT_TOPOLOGY_KEY] == "b"


def test_a_group_that_no_zone_has_is_refused_by_name() -> None:
    with pytest.raises(InvalidRequest, match=r"zone a.*gold.*zone b"):
        two().create(parameters={"vpg": "gold"})


def test_all_zones_full_names_each() -> None:
    world = two()
    for management in world.zones.values():
        management.raw_bytes = 0
    with pytest.raises(Exhausted, match=r"zone a: .*zone b: |zone b: .*zone a: "):
        world.create()


def test_an_existing_volume_is_not_created_elsewhere_when_its_zone_fills_up() -> None:
    world = two()

    def comes_out_short(request: str) -> None:
        if request == "create_volume":
            (volume,) = world.zones["a"].all_volumes()
            world.zones["a"].change(volume.name, blocks=volume.blocks - 1024)
            world.zones["a"].raw_bytes = 0

    world.zones["a"].after = comes_out_short
    with pytest.raises(StorageUnavailable, match="has no room"):  # a final error would leak it
        world.create(topology=within("a", "b"))
    assert [len(each) for each in volumes(world).values()] == [1, 0]


# --- one volume in one zone -----------------------------------------------------------------------------------


def test_after_a_restart_the_volume_is_found_again() -> None:
    world = two()
    made = world.create(topology=within("a", "b"))
    assert World(zones=("a", "b"), beside=world).create(topology=within("b", "a")) == made
    assert volumes(world)["b"] == []


def test_two_volumes_that_were_created_at_the_same_time_are_both_named_and_both_kept() -> None:
    world = two()

    def create_elsewhere(request: str) -> None:
        if request == "create_volume":
            world.zones["a"].after = lambda _: None
            duplicate(world, "a", "b")

    world.zones["a"].after = create_elsewhere
    for _ in range(2):
        with pytest.raises(PreconditionFailed) as refused:
            world.create(topology=within("a", "b"))
        assert all(uuid in str(refused.value) for uuids in volumes(world).values() for uuid in uuids)
    assert [len(each) for each in volumes(world).values()] == [1, 1]


def test_a_found_volume_is_returned_only_after_the_other_zones_were_asked_again() -> None:
    world = two()
    world.create(topology=within("b"))

    def appear(request: str) -> None:
        if request == "volume" and not volumes(world)["a"]:
            world.zones["b"].before = lambda _: None
            duplicate(world, "b", "a")

    world.zones["b"].before = appear  # zone a has answered by then, or will show the second volume already
    with pytest.raises(PreconditionFailed):
        world.create(topology=within("a", "b"))


def test_after_a_crash_nothing_is_made_while_the_zone_of_the_volume_is_down() -> None:
    world = two()
    world.create(topology=within("a", "b"))
    world.zones["a"].is_reachable = False
    with pytest.raises(StorageUnavailable):
        World(zones=("a", "b"), beside=world).create(topology=within("b", "a"))
    assert volumes(world)["b"] == []


def test_a_zone_that_is_not_allowed_is_asked_but_not_waited_for() -> None:
    world = two()
    world.zones["a"].is_reachable = False
    assert world.create(topology=within("b")).topology == ({DEFAULT_TOPOLOGY_KEY: "b"},)
    with pytest.raises(StorageUnavailable):
        world.create(topology=within("a"))
    world.zones["a"].is_reachable = True
    world.clock.sleep(60)
    with pytest.raises(ExistsDifferently, match=r"zone: expected a, got zone b"):
        World(zones=("a", "b"), beside=world).create(topology=within("a"))


def test_after_a_lost_answer_no_volume_is_created_in_the_next_zone() -> None:
    world = two()

    def lose(request: str) -> None:
        if request == "create_volume":
            raise OutcomeUnknown("server", "POST /volumes/save", "reset")

    world.zones["a"].after = lose
    with pytest.raises(OutcomeUnknown):
        world.create(topology=within("a", "b"))
    assert [len(each) for each in volumes(world).values()] == [1, 0]


def test_the_retry_after_a_lost_answer_finds_the_volume() -> None:
    world = two()

    def lose(request: str) -> None:
        if request == "create_volume":
            raise OutcomeUnknown("server", "POST /volumes/save", "reset")

    world.zones["a"].after = lose
    with pytest.raises(OutcomeUnknown):
        world.create(topology=within("a", "b"))
    world.zones["a"].after = lambda _: None
    looked = world.zones["b"].requests.count("volume")
    assert world.create(topology=within("a", "b")).topology == ({DEFAULT_TOPOLOGY_KEY: "a"},)
    assert world.zones["b"].requests.count("volume") == looked + 2  # before it was believed, and after


def test_a_zone_may_be_skipped_and_duplicates_are_logged_once(caplog: pytest.LogCaptureFixture) -> None:
    world = two(SKIPPING)
    world.zones["a"].is_reachable = False
    made = world.create(topology=within("a", "b"))
    assert made.topology == ({DEFAULT_TOPOLOGY_KEY: "b"},)
    world.zones["a"].is_reachable = True
    orphan = duplicate(world, "b", "a")
    for _ in range(2):
        listed, _ = world.listed()
        assert len(listed) == 2
    reports = [record.getMessage() for record in caplog.records if "exists in several zones" in record.getMessage()]
    assert len(reports) == 1
    assert all(uuid in reports[0] for uuid in (orphan.uuid, made.volume_id.split(":")[2]))
    assert [len(each) for each in volumes(world).values()] == [1, 1]


def test_a_skip_needs_one_zone_that_answers() -> None:
    world = two(SKIPPING)
    for management in world.zones.values():
        management.is_reachable = False
    with pytest.raises(StorageUnavailable):
        world.create()


def test_of_two_left_by_a_crash_the_one_that_was_used_is_answered() -> None:
    world = two()
    made = world.create(topology=within("a", "b"), parameters=CLAIM)
    duplicate(world, "a", "b")
    world.clock.sleep(60)
    restarted = World(zones=("a", "b"), beside=world)
    with pytest.raises(PreconditionFailed, match=r"zone a .* and in zone b"):
        restarted.create(topology=within("a", "b"), parameters=CLAIM)
    world.publish(made.volume_id, capability=RWO)
    assert restarted.create(topology=within("a", "b"), parameters=CLAIM) == made


def test_another_volume_of_that_short_name_is_refused_in_any_zone() -> None:
    world = two()
    world.create(topology=within("b"))
    (volume,) = world.zones["b"].all_volumes()
    world.zones["b"].change(volume.name, metadata={"csi_name": "another claim's"})
    with pytest.raises(ExistsDifferently, match="another claim"):
        World(zones=("a", "b"), beside=world).create(topology=within("a", "b"))
    assert volumes(world)["a"] == []


# --- unreachable zones ----------------------------------------------------------------------------------------


def test_a_list_fails_while_a_zone_is_unreachable() -> None:
    world = two()
    world.create()
    world.zones["b"].is_reachable = False
    with pytest.raises(StorageUnavailable):
        world.listed()


def test_a_dead_zone_has_no_capacity(caplog: pytest.LogCaptureFixture) -> None:
    world = two()
    world.zones["a"].raw_bytes = world.zones["b"].raw_bytes = 8 * GIB
    world.zones["b"].is_reachable = False

    def free(zone: str | None) -> int:
        segments = None if zone is None else {DEFAULT_TOPOLOGY_KEY: zone}
        return world.free.capacity((), {}, segments, deadline=world.deadline()).available_bytes

    assert (free("a"), free("b"), free(None)) == (8 * GIB, 0, 8 * GIB)
    assert "the capacity of zone b counts as 0" in caplog.text


def test_no_capacity_is_told_when_nobody_answers() -> None:
    for zones in (("a",), ("a", "b")):
        world = World(zones=zones)
        for management in world.zones.values():
            management.is_reachable = False
        with pytest.raises(StorageUnavailable):
            world.free.capacity((), {}, None, deadline=world.deadline())


def test_a_dead_zone_leaves_the_volumes_of_others_usable() -> None:
    world = two()
    made = world.create(topology=within("a"))
    world.zones["b"].is_reachable = False
    world.publish(made.volume_id)
    assert world.listing.volume(made.volume_id, deadline=world.deadline()).volume.volume_id == made.volume_id
    world.unpublish(made.volume_id)
    world.delete(made.volume_id)
    assert volumes(world)["a"] == []


def test_a_handle_without_zone_needs_every_zone() -> None:
    world = two()
    made = world.create(topology=within("a"))
    bare = made.volume_id.split(":")[1]
    world.zones["b"].is_reachable = False
    with pytest.raises(StorageUnavailable):
        world.delete(bare)
    assert len(volumes(world)["a"]) == 1


def test_one_zone_that_answers_makes_the_controller_ready() -> None:
    world = two()
    world.zones["a"].is_reachable = False
    assert world.readiness.any_answers(world.deadline())


def test_whether_a_management_answers_now_is_asked_anew_and_one_zone_is_enough() -> None:
    world = two()
    assert world.readiness.why_unreachable() == ""
    world.zones["a"].is_reachable = False
    assert world.readiness.why_unreachable() == ""
    world.zones["b"].is_reachable = False
    why = world.readiness.why_unreachable()
    assert all(f"zone {zone}: " in why for zone in "ab")
    world.zones["b"].is_reachable = True
    assert world.readiness.why_unreachable() == ""
    world.zones.clear()
    assert world.readiness.why_unreachable() == "no storage management is configured"


# --- zones that change their names, or go ---------------------------------------------------------------------


@pytest.mark.parametrize("form", ["{name}", "single-zone-cluster:{name}", "single-zone-cluster:{name}:{uuid}:team-a"])
def test_handles_from_before_the_only_zone_had_a_name_are_served_in_every_call(form: str) -> None:
    world = World(zones=("paris",))
    world.zones["paris"].add_volume(OLD)
    old = form.format(name=OLD.name, uuid=OLD.uuid)
    world.publish(old)
    listed, _ = world.listed()
    held = [(each.volume.volume_id, each.published_node_ids) for each in listed if each.published_node_ids]
    assert (old, (NODE_1,)) in held
    assert world.listing.volume(old, deadline=world.deadline()).volume.volume_id == old
    world.expand.expand(old, CapacityRange(2 * GIB), RWO, deadline=world.deadline())
    world.modify.modify(old, {"description": "x"}, deadline=world.deadline())
    world.unpublish(old)
    assert world.holders(OLD) == []
    world.delete(old)
    assert world.zones["paris"].all_volumes() == []


def test_among_several_zones_that_name_is_nobodys_unless_one_has_it() -> None:
    world = World(zones=("paris", "rome"))
    world.zones["paris"].add_volume(OLD)
    with pytest.raises(PreconditionFailed, match="which this driver does not serve"):
        world.delete(f"single-zone-cluster:{OLD.name}")
    world.publish(f"paris:{OLD.name}")
    with pytest.raises(PreconditionFailed, match="which this driver does not serve"):
        world.unpublish(f"single-zone-cluster:{OLD.name}")
    assert world.holders(OLD) == ["node-1"]
    named = World(zones=("rome", "single-zone-cluster"))
    named.zones["single-zone-cluster"].add_volume(OLD)
    named.delete(f"single-zone-cluster:{OLD.name}")
    assert named.zones["single-zone-cluster"].all_volumes() == []


@pytest.mark.parametrize("handle", ["a:{name}:{uuid}", "{name}"])
def test_a_zone_that_goes_while_a_call_looks_into_it_has_not_lost_its_volumes(handle: str) -> None:
    world = two()
    world.zones["a"].add_volume(OLD)
    asked = iter(range(10))

    class Going:
        """Serves zone a at the first question, and not at the next one."""

        def zones(self) -> Sequence[str]:
            return ("a", "b")

        def management(self, zone: str) -> FakeManagement | None:
            return None if zone == "a" and (handle == "{name}" or next(asked)) else world.zones[zone]

    deletion = DeleteVolume(Going(), world.settings)
    with pytest.raises(StorageUnavailable, match="zone a is no longer configured"):
        deletion.delete(handle.format(name=OLD.name, uuid=OLD.uuid), deadline=world.deadline())
