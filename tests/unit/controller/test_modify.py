# SPDX-License-Identifier: Apache-2.0
"""ControllerModifyVolume and mutable parameters over a storage management in memory."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from csi_driver.controller.ports import ValidateRequest
from csi_driver.errors import ExistsDifferently, InvalidRequest, OperationPending, VolumeNotFound
from csi_driver.parameters import storage_class
from csi_driver.storage_model import Layout, RaidLevel, VolumeChanges, Vpg
from tests.unit.controller.world import RWO, World


def modify(world: World, volume_id: str, **parameters: str) -> None:
    world.modify.modify(volume_id, parameters, deadline=world.deadline())


def test_a_volume_is_changed_in_what_is_named() -> None:
    world = World()
    made = world.create(parameters={"description": "old", "relativeRebuildPriority": "2"})
    modify(world, made.volume_id, description="new")
    assert (world.stored().description, world.stored().relative_rebuild_priority) == ("new", 2)


def test_a_check_is_switched_where_the_level_has_one() -> None:
    world = World()
    made = world.create(parameters={"raidLevel": "raid1"})
    modify(world, made.volume_id, enableCrcCheck="true")
    assert world.stored().layout.enable_crc_check is True


def test_an_attached_volume_is_changed_and_its_record_stays() -> None:
    world = World()
    made = world.create()
    world.publish(made.volume_id)
    before = world.stored().metadata
    modify(world, made.volume_id, relativeRebuildPriority="7")
    assert (world.stored().relative_rebuild_priority, world.stored().metadata) == (7, before)


def test_the_same_again_asks_nothing_of_the_storage() -> None:
    world = World()
    made = world.create()
    for _ in range(2):
        modify(world, made.volume_id, description="new", relativeRebuildPriority="7")
    assert world.management.requests.count("update_volume") == 1


def test_lists_are_set_whatever_the_volume_shows() -> None:
    world = World()
    made = world.create()
    for _ in range(2):
        modify(world, made.volume_id, limitByNodes="a, b")
    assert world.management.requests.count("update_volume") == 2


def test_nothing_to_change_is_success() -> None:
    world = World()
    modify(world, world.create().volume_id)
    assert "update_volume" not in world.management.requests


@pytest.mark.parametrize(
    ("parameters", "named"),
    [
        ({"color": "red"}, "color"),
        ({"isReadOnly": "true"}, "isReadOnly"),
        ({"raidLevel": "raid1"}, "raidLevel"),
        ({"metadata": "{}"}, "metadata"),
        ({"relativeRebuildPriority": "11"}, "relativeRebuildPriority"),
        ({"relativeRebuildPriority": ""}, "relativeRebuildPriority"),
        ({"enableCrcCheck": "yes"}, "enableCrcCheck"),
        ({"description": "x" * 1025}, "description"),
        ({"diskClasses": "a,,b"}, "diskClasses"),
        ({"diskClasses": "a", "limitByNodes": "b"}, "limitBy"),
        ({"description": "fine", "color": "red"}, "color"),
    ],
)
def test_what_no_volume_can_have_is_refused_by_name_before_any_request(parameters: dict[str, str], named: str) -> None:
    world = World()
    made = world.create()
    before = len(world.management.requests)
    with pytest.raises(InvalidRequest, match=named):
        modify(world, made.volume_id, **parameters)
    assert len(world.management.requests) == before


@pytest.mark.parametrize("key", ["enableCrcCheck", "diskClasses", "limitByNodes"])
def test_what_its_group_decides_is_refused_and_nothing_changes(key: str) -> None:
    world = World()
    world.management.add_vpg(Vpg("gold", Layout(RaidLevel.MIRRORED), 0, allow_overflow=True))
    made = world.create(parameters={"vpg": "gold"})
    with pytest.raises(InvalidRequest, match="gold"):
        modify(world, made.volume_id, **{key: "true", "description": "new"})
    assert world.stored().description == ""
    assert "update_volume" not in world.management.requests


def test_a_check_that_the_level_does_not_have_is_refused() -> None:
    world = World()
    with pytest.raises(InvalidRequest, match="Concatenated"):
        modify(world, world.create().volume_id, enableCrcCheck="true")


def test_an_unknown_volume_is_not_found_and_an_unknown_key_is_invalid_even_so() -> None:
    world = World()
    with pytest.raises(VolumeNotFound):
        modify(world, "nothing")
    with pytest.raises(InvalidRequest):
        modify(world, "nothing", color="red")


def test_a_volume_that_is_being_deleted_is_not_found() -> None:
    world = World()
    made = world.create()
    world.management.delete_s = 100.0
    with pytest.raises(OperationPending):
        world.delete(made.volume_id, seconds=5.0)
    with pytest.raises(VolumeNotFound):
        modify(world, made.volume_id, description="new")


# --- at creation ----------------------------------------------------------------------------------------------


def test_mutable_parameters_beat_the_others_at_creation() -> None:
    world = World()
    world.create(parameters={"relativeRebuildPriority": "1"}, mutable={"relativeRebuildPriority": "9"})
    assert world.stored().relative_rebuild_priority == 9


def test_a_key_that_cannot_change_later_is_no_mutable_parameter() -> None:
    world = World()
    with pytest.raises(InvalidRequest, match="raidLevel"):
        world.create(mutable={"raidLevel": "raid1"})
    assert world.management.requests == []


def test_what_a_group_decides_is_no_mutable_parameter_of_its_volumes() -> None:
    world = World()
    world.management.add_vpg(Vpg("gold", Layout(), 0, allow_overflow=True))
    with pytest.raises(InvalidRequest, match="gold"):
        world.create(parameters={"vpg": "gold"}, mutable={"diskClasses": "fast"})


def test_an_empty_list_names_nothing() -> None:
    assert storage_class.with_mutable({"diskClasses": "a"}, {"diskClasses": ""}) == {}
    assert storage_class.parse_changes({"limitByNodes": ""}) == VolumeChanges(limit_by_targets=())


def test_the_same_creation_with_other_mutable_parameters_is_another() -> None:
    world = World()
    world.create(mutable={"description": "one"})
    with pytest.raises(ExistsDifferently, match="description"):
        world.create(mutable={"description": "two"})


def test_a_creation_that_is_repeated_after_a_change_finds_its_volume() -> None:
    world = World()
    made = world.create(mutable={"description": "one"})
    modify(world, made.volume_id, description="two")
    assert world.create(mutable={"description": "one"}) == made
    assert world.stored().description == "two"


def test_capabilities_are_validated_with_what_can_change() -> None:
    world = World()
    made = world.create()

    def objection(**mutable: str) -> str | None:
        request = ValidateRequest(made.volume_id, (RWO,), mutable_parameters=mutable)
        return world.validation.validate(request, deadline=world.deadline())

    assert objection(description="new") is None
    assert "color" in (objection(color="red") or "")
    assert "Concatenated" in (objection(enableCrcCheck="true") or "")


@given(st.dictionaries(st.sampled_from(sorted(storage_class.MUTABLE_KEYS)) | st.text(max_size=9), st.text()))
def test_any_mutable_parameters_are_read_or_refused(parameters: dict[str, str]) -> None:
    try:
        storage_class.parse_changes(parameters)
    except InvalidRequest:
        return
    assert set(parameters) <= storage_class.MUTABLE_KEYS
