# SPDX-License-Identifier: Apache-2.0
"""Group snapshots as the CSI specification has them, by the controller on the embedded storage manager."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest

from csi_driver.embedded.model import CUTTING, SNAPSHOT_GROUPS, SNAPSHOTS
from csi_driver.embedded.store import Change
from csi_driver.errors import (
    Incompatible,
    InvalidField,
    InvalidRequest,
    NotFound,
    NotOffered,
    PreconditionFailed,
    VolumeNotFound,
)
from csi_driver.model import CutGroup, VolumeHandle
from tests.contract.snapshot_zones import Kind, Zones, zones_of
from tests.contract.test_snapshots import MEANINGLESS, UUID


@pytest.fixture
def zones(tmp_path: Path) -> Iterator[Zones]:
    with zones_of(tmp_path, a=Kind.REFLINKS) as running:
        yield running


@pytest.fixture
def volumes(zones: Zones) -> list[str]:
    return [zones.volume(f"pvc-{number}").volume_id for number in range(3)]


def ids(group: CutGroup) -> list[str]:
    return [each.snapshot_id for each in group.snapshots]


def test_the_members_have_the_ids_of_their_volumes_and_of_the_group(zones: Zones, volumes: list[str]) -> None:
    group = zones.cut_group("g", *volumes[:2])
    assert {each.source_volume_id for each in group.snapshots} == set(volumes[:2])
    assert {each.group_snapshot_id for each in group.snapshots} == {group.group_snapshot_id}
    assert {each.created for each in group.snapshots} == {group.created}
    assert [zones.get(each) for each in ids(group)] == list(group.snapshots)
    assert sorted(zones.listed()) == sorted(ids(group))


def test_only_the_field_of_its_class_may_be_repeated_as_a_parameter(zones: Zones, volumes: list[str]) -> None:
    zones.groups.create("g", volumes, {"deletionPolicy": "Retain"}, deadline=zones.deadline())
    with pytest.raises(InvalidField, match="parameter freeze"):
        zones.groups.create("h", volumes, {"freeze": "true"}, deadline=zones.deadline())


def test_a_repeated_call_is_answered_as_the_first(zones: Zones, volumes: list[str]) -> None:
    first = zones.cut_group("g", *volumes)
    zones.restart_controller()
    assert zones.cut_group("g", *reversed(volumes)) == first


def test_a_repeated_call_is_answered_as_the_first_after_a_source_was_deleted(zones: Zones, volumes: list[str]) -> None:
    first = zones.cut_group("g", *volumes)
    zones.delete_volume(volumes[0])
    assert zones.cut_group("g", *volumes) == first


def test_a_group_whose_cut_a_crash_ended_is_cut_by_the_next_call(zones: Zones, volumes: list[str]) -> None:
    first = zones.cut_group("g", *volumes)
    store = zones.storages["a"].server.store
    for group in list(store.all(SNAPSHOT_GROUPS)):
        begun = replace(group, action=CUTTING)
        store.write(partial(Change.put, table=SNAPSHOT_GROUPS, key=group.name, record=begun))
    for member in list(store.all(SNAPSHOTS)):
        cutting = replace(member, action=CUTTING)
        store.write(partial(Change.put, table=SNAPSHOTS, key=member.name, record=cutting))
    with pytest.raises(NotFound):
        zones.get_group(first.group_snapshot_id, *ids(first))
    again = zones.cut_group("g", *volumes)
    assert sorted(zones.listed()) == sorted(ids(again))


@pytest.mark.parametrize("others", [slice(0, 1), slice(0, 3), slice(1, 3)])
def test_a_name_with_other_volumes_is_refused(zones: Zones, volumes: list[str], others: slice) -> None:
    zones.cut_group("g", *volumes[:2])
    with pytest.raises(Incompatible, match="already exists with different properties: source volumes"):
        zones.cut_group("g", *volumes[others])


@pytest.mark.parametrize("source", [*MEANINGLESS, f"a:csi-1:{UUID}", f"nowhere:csi-1:{UUID}"])
def test_a_group_with_a_volume_that_does_not_exist_is_not_cut(zones: Zones, volumes: list[str], source: str) -> None:
    with pytest.raises(VolumeNotFound):
        zones.cut_group("g", volumes[0], source)
    assert zones.listed() == []


def test_a_volume_that_is_named_twice_is_refused(zones: Zones, volumes: list[str]) -> None:
    spelled = volumes[0].rpartition(":")[0]
    with pytest.raises(InvalidField, match="each volume once"):
        zones.cut_group("g", volumes[0], spelled)


def test_the_list_of_snapshots_must_be_that_of_the_group(zones: Zones, volumes: list[str]) -> None:
    group = zones.cut_group("g", *volumes[:2])
    other = zones.cut("s", volumes[2]).snapshot_id
    for wrong in ([], ids(group)[:1], [*ids(group), other]):
        with pytest.raises(InvalidRequest, match="snapshot_ids"):
            zones.get_group(group.group_snapshot_id, *wrong)
        with pytest.raises(InvalidRequest, match="snapshot_ids"):
            zones.delete_group(group.group_snapshot_id, *wrong)
    assert zones.get_group(group.group_snapshot_id, *reversed(ids(group))) == group


def test_a_deleted_group_is_not_found_with_its_members_and_deleted_again(zones: Zones, volumes: list[str]) -> None:
    group = zones.cut_group("g", *volumes[:2])
    for _ in range(2):
        zones.delete_group(group.group_snapshot_id, *ids(group))
    with pytest.raises(NotFound):
        zones.get_group(group.group_snapshot_id, *ids(group))
    assert zones.listed() == []


def test_the_id_of_a_deleted_group_does_not_mean_the_next_one_of_its_name(zones: Zones, volumes: list[str]) -> None:
    first = zones.cut_group("g", *volumes)
    zones.delete_group(first.group_snapshot_id, *ids(first))
    second = zones.cut_group("g", *volumes)
    zones.delete_group(first.group_snapshot_id, *ids(first))
    with pytest.raises(NotFound):
        zones.get_group(first.group_snapshot_id, *ids(second))
    assert zones.get_group(second.group_snapshot_id, *ids(second)) == second


def test_a_member_is_not_deleted_alone(zones: Zones, volumes: list[str]) -> None:
    group = zones.cut_group("g", *volumes[:2])
    with pytest.raises(InvalidRequest, match="delete the group"):
        zones.delete(ids(group)[0])
    assert sorted(zones.listed()) == sorted(ids(group))


@pytest.mark.parametrize("group_id", [*MEANINGLESS, f"a:group-1:{UUID}"])
def test_an_id_without_a_group_is_deleted_already_and_not_found(zones: Zones, group_id: str) -> None:
    zones.delete_group(group_id, "a snapshot")
    with pytest.raises(NotFound):
        zones.get_group(group_id, "a snapshot")


def test_volumes_of_two_zones_are_no_group(tmp_path: Path) -> None:
    with zones_of(tmp_path, a=Kind.REFLINKS, b=Kind.REFLINKS) as zones:
        here, there = zones.volume(zone="a").volume_id, zones.volume("pvc-2", zone="b").volume_id
        with pytest.raises(InvalidField, match="volumes of one zone"):
            zones.cut_group("g", here, there)
        lost = f"c:group-1:{UUID}"
        with pytest.raises(PreconditionFailed, match="does not serve"):
            zones.delete_group(lost, "a snapshot")


def test_a_name_that_has_a_group_in_another_zone_is_refused_naming_both(tmp_path: Path) -> None:
    with zones_of(tmp_path, a=Kind.REFLINKS, b=Kind.REFLINKS, nvmesh=Kind.NVMESH) as zones:
        here, there = zones.volume(zone="a").volume_id, zones.volume("pvc-2", zone="b").volume_id
        zones.cut_group("g", here)
        with pytest.raises(Incompatible, match=f"expected {there}, got {here}"):
            zones.cut_group("g", there)


def test_without_reflinks_each_call_names_the_engine(tmp_path: Path) -> None:
    with zones_of(tmp_path, a=Kind.EMBEDDED_WITHOUT) as zones:
        group_id, source = f"a:group-1:{UUID}", zones.volume().volume_id
        refusal = pytest.raises(NotOffered, match="zone a offers no group snapshots: embedded storage manager")
        with refusal:
            zones.cut_group("g", source)
        with refusal:
            zones.get_group(group_id, "a snapshot")
        zones.delete_group(group_id, "a snapshot")


def test_no_name_of_a_snapshot_is_that_of_a_member_of_a_group(zones: Zones, volumes: list[str]) -> None:
    group = zones.cut_group("g", volumes[0])
    handle = VolumeHandle.parse(volumes[0])
    assert handle is not None
    assert zones.cut(f"g\n{handle.uuid}", volumes[0]).snapshot_id not in ids(group)
