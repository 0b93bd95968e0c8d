# SPDX-License-Identifier: Apache-2.0
"""Snapshots as the CSI specification has them, by the controller on the embedded storage manager."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, cast

import pytest

from csi_driver.controller.list_volumes import Position, read_token
from csi_driver.embedded.model import CUTTING, SNAPSHOTS
from csi_driver.embedded.store import Change
from csi_driver.errors import (
    ExistsDifferently,
    Incompatible,
    InvalidField,
    NotOffered,
    OperationPending,
    PreconditionFailed,
    SnapshotNotFound,
    StaleToken,
    StorageUnavailable,
    VolumeNotFound,
)
from csi_driver.model import DEFAULT_ZONE, GIB, VolumeHandle
from tests.contract.snapshot_zones import Kind, Zones, zones_of
from tests.fakes.management import FakeManagement

UUID = "01234567-89ab-4def-8123-456789abcdef"
MEANINGLESS = ["", "not an id", "csi-1", "a:csi-1", "a::", "a:snap-1:no-uuid", f"a:snap-1:{UUID}:reference", "x" * 400]
"""Ids that no call issued."""


@pytest.fixture
def one(tmp_path: Path) -> Iterator[Zones]:
    with zones_of(tmp_path, a=Kind.REFLINKS) as zones:
        yield zones


@pytest.fixture
def two(tmp_path: Path) -> Iterator[Zones]:
    with zones_of(tmp_path, a=Kind.REFLINKS, b=Kind.REFLINKS, nvmesh=Kind.NVMESH) as zones:
        yield zones


# --- CreateSnapshot -----------------------------------------------------------------------------------------


def test_a_snapshot_has_the_id_of_its_source_as_the_caller_wrote_it(one: Zones) -> None:
    source = one.volume().volume_id
    handle = VolumeHandle.parse(source)
    assert handle is not None
    spelled = f"{handle.zone}:{handle.name}"
    assert one.cut("s1", source).source_volume_id == source
    assert one.cut("s2", spelled).source_volume_id == spelled


def test_a_snapshot_has_the_size_that_its_user_sees(one: Zones) -> None:
    plain, encrypted = one.volume(), one.volume("pvc-2", parameters={"encryption": "luks"})
    assert one.cut("s1", plain.volume_id).size_bytes == plain.capacity_bytes >= GIB
    assert one.cut("s2", encrypted.volume_id).size_bytes == encrypted.capacity_bytes >= GIB


def test_a_repeated_call_is_answered_as_the_first(one: Zones) -> None:
    source = one.volume().volume_id
    first = one.cut("s1", source)
    one.restart_controller()
    assert one.cut("s1", source) == first
    assert one.listed() == [first.snapshot_id]


def test_a_repeated_call_is_answered_as_the_first_after_its_source_was_deleted(one: Zones) -> None:
    source = one.volume().volume_id
    first = one.cut("s1", source)
    one.delete_volume(source)
    assert one.cut("s1", source) == first


def test_a_name_whose_source_was_deleted_is_not_that_of_another_deleted_source(one: Zones) -> None:
    source = one.volume().volume_id
    one.cut("s1", source)
    one.delete_volume(source)
    with pytest.raises(VolumeNotFound):
        one.cut("s1", f"a:csi-1:{UUID}")


def test_a_cut_that_the_storage_has_only_begun_is_not_answered(one: Zones) -> None:
    source, management = one.volume().volume_id, cast("Any", one.managements["a"])
    for begun, cut in (("create_snapshot", one.cut), ("create_snapshot_group", one.cut_group)):
        act = getattr(management, begun)
        setattr(management, begun, lambda *what, act=act, **how: replace(act(*what, **how), is_ready=False))
        with pytest.raises(OperationPending, match="not cut yet; retry"):
            cut("s1", source)


def test_a_name_with_another_source_is_refused(one: Zones) -> None:
    source, other = one.volume().volume_id, one.volume("pvc-2").volume_id
    one.cut("s1", source)
    with pytest.raises(Incompatible, match="already exists"):
        one.cut("s1", other)


def test_a_name_with_a_source_in_another_zone_is_refused_naming_both(two: Zones) -> None:
    here, there = two.volume(zone="a").volume_id, two.volume("pvc-2", zone="b").volume_id
    two.cut("s1", here)
    with pytest.raises(ExistsDifferently) as refusal:
        two.cut("s1", there)
    assert here in str(refusal.value)
    assert there in str(refusal.value)


def test_a_new_volume_of_the_same_name_is_another_source(one: Zones) -> None:
    first = one.volume().volume_id
    one.cut("s1", first)
    one.delete_volume(first)
    with pytest.raises(Incompatible, match="already exists"):
        one.cut("s1", one.volume().volume_id)


@pytest.mark.parametrize("source", [*MEANINGLESS, f"a:csi-1:{UUID}", f"nowhere:csi-1:{UUID}"])
def test_a_source_that_does_not_exist_is_not_found(one: Zones, source: str) -> None:
    with pytest.raises(VolumeNotFound):
        one.cut("s1", source)


def test_a_parameter_that_has_no_meaning_is_refused(one: Zones) -> None:
    source = one.volume().volume_id
    one.cut("s1", source, {"csi.storage.k8s.io/volumesnapshot/name": "n"})
    with pytest.raises(InvalidField, match="parameter freeze"):
        one.cut("s2", source, {"freeze": "true"})


# --- DeleteSnapshot, GetSnapshot ----------------------------------------------------------------------------


def test_a_deleted_snapshot_is_not_found_and_deleted_again(one: Zones) -> None:
    snapshot = one.cut("s1", one.volume().volume_id)
    assert one.get(snapshot.snapshot_id) == snapshot
    one.delete(snapshot.snapshot_id)
    one.delete(snapshot.snapshot_id)
    with pytest.raises(SnapshotNotFound):
        one.get(snapshot.snapshot_id)


def test_the_id_of_a_deleted_snapshot_does_not_mean_the_next_one_of_its_name(one: Zones) -> None:
    source = one.volume().volume_id
    first = one.cut("s1", source)
    one.delete(first.snapshot_id)
    second = one.cut("s1", source)
    one.delete(first.snapshot_id)
    with pytest.raises(SnapshotNotFound):
        one.get(first.snapshot_id)
    assert one.get(second.snapshot_id) == second


@pytest.mark.parametrize("snapshot_id", [*MEANINGLESS, f"a:snap-1:{UUID}"])
def test_an_id_without_a_snapshot_is_deleted_already_and_not_found(one: Zones, snapshot_id: str) -> None:
    one.delete(snapshot_id)
    with pytest.raises(SnapshotNotFound):
        one.get(snapshot_id)


def test_a_snapshot_in_a_zone_that_is_not_served_now_is_not_taken_as_deleted(one: Zones) -> None:
    lost = f"b:snap-1:{UUID}"
    with pytest.raises(PreconditionFailed, match="zone 'b', which this driver does not serve"):
        one.delete(lost)
    with pytest.raises(SnapshotNotFound):
        one.get(lost)


def test_sources_and_snapshots_are_deleted_in_any_order(one: Zones) -> None:
    source = one.volume().volume_id
    snapshot = one.cut("s1", source)
    one.delete_volume(source)
    assert one.listed(source_volume_id=source) == [snapshot.snapshot_id]
    one.delete(snapshot.snapshot_id)
    assert one.listed() == []


# --- ListSnapshots ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [0, 1, 2, 3, 100])
def test_the_pages_over_all_zones_have_each_snapshot_once(two: Zones, size: int) -> None:
    cut = [
        two.cut(f"s{number}", two.volume(f"pvc-{number}", zone=zone).volume_id).snapshot_id
        for number, zone in enumerate("aabba")
    ]
    assert sorted(two.listed(size)) == sorted(cut)


def test_a_page_continues_behind_what_was_deleted_meanwhile(one: Zones) -> None:
    source = one.volume().volume_id
    cut = sorted(one.cut(f"s{number}", source).snapshot_id for number in range(4))
    (first, second), token = one.page(2)
    for snapshot_id in cut[:3]:
        one.delete(snapshot_id)
    assert [first.snapshot_id, second.snapshot_id] == cut[:2]
    assert [each.snapshot_id for each in one.page(2, token)[0]] == cut[3:]


@pytest.mark.parametrize("size", [0, 1, 2])
def test_what_is_not_cut_yet_is_not_listed_and_ends_no_page(one: Zones, size: int) -> None:
    source = one.volume().volume_id
    snapshot = one.cut("s1", source)
    store = one.storages["a"].server.store
    (ready,) = store.all(SNAPSHOTS)
    for number in range(5):
        name = f"{ready.name[:-1] if number < 4 else ready.name}+{number}"
        cutting = replace(ready, name=name, uuid=f"{number}{ready.uuid[1:]}", action=CUTTING, created="")
        store.write(partial(Change.put, table=SNAPSHOTS, key=name, record=cutting))
        with pytest.raises(SnapshotNotFound):
            one.get(f"a:{name}:{cutting.uuid}")
    assert one.listed(size) == [snapshot.snapshot_id]


def test_a_list_is_of_one_volume_or_of_one_snapshot(two: Zones) -> None:
    here, there = two.volume(zone="a").volume_id, two.volume("pvc-2", zone="b").volume_id
    mine, other = two.cut("s1", here).snapshot_id, two.cut("s2", there).snapshot_id
    assert two.listed(source_volume_id=here) == [mine]
    assert two.listed(snapshot_id=other) == [other]
    assert two.listed(snapshot_id=other, source_volume_id=there) == [other]
    assert two.listed(snapshot_id=other, source_volume_id=here) == []


@pytest.mark.parametrize("which", ["source_volume_id", "snapshot_id"])
@pytest.mark.parametrize("meaningless", [*MEANINGLESS[1:], f"nowhere:csi-1:{UUID}", f"a:csi-1:{UUID}"])
def test_an_id_without_meaning_lists_nothing(one: Zones, which: str, meaningless: str) -> None:
    one.cut("s1", one.volume().volume_id)
    assert one.listed(0, **{which: meaningless}) == []


def test_a_snapshot_is_listed_by_its_id_while_another_zone_never_answered(two: Zones) -> None:
    snapshot = two.cut("s1", two.volume(zone="a").volume_id)
    two.restart_controller()
    silent = two.managements["nvmesh"] = FakeManagement()
    silent.is_reachable = False
    assert two.page(snapshot_id=snapshot.snapshot_id) == ([snapshot], "")
    with pytest.raises(StorageUnavailable, match="no response of zone nvmesh"):
        two.page()


def test_the_id_of_a_snapshot_keeps_its_meaning_when_the_only_zone_gets_a_name(tmp_path: Path) -> None:
    with zones_of(tmp_path, **{DEFAULT_ZONE: Kind.REFLINKS}) as zones:
        source = zones.volume().volume_id
        snapshot, group = zones.cut("s1", source), zones.cut_group("g", source)
        zones.managements = {"a": zones.managements[DEFAULT_ZONE]}
        zones.restart_controller()
        assert zones.cut("s1", source) == zones.get(snapshot.snapshot_id) == snapshot
        assert zones.page(snapshot_id=snapshot.snapshot_id) == ([snapshot], "")
        assert zones.cut_group("g", source) == group
        members = [each.snapshot_id for each in group.snapshots]
        assert zones.get_group(group.group_snapshot_id, *members) == group
        zones.delete_group(group.group_snapshot_id, *members)
        zones.delete(snapshot.snapshot_id)
        assert zones.listed() == []


def test_tokens_of_other_lists_and_zones_that_are_gone_are_stale(two: Zones) -> None:
    source = two.volume(zone="b").volume_id
    two.cut("s1", source)
    two.cut("s2", source)
    _, token = two.page(1)
    for wrong in ("nonsense", "v1.YQpiCn4", Position("a", "b").token()):
        with pytest.raises(StaleToken):
            two.page(1, wrong)
    with pytest.raises(StaleToken):
        read_token(token)
    del two.managements["b"]
    two.restart_controller()
    with pytest.raises(StaleToken):
        two.page(1, token)


# --- where the storage has no snapshots ---------------------------------------------------------------------


def refusals(zones: Zones, source: str) -> list[Callable[[], object]]:
    snapshot_id = f"{source.partition(':')[0]}:snap-1:{UUID}"
    return [lambda: zones.cut("s1", source), lambda: zones.get(snapshot_id), lambda: zones.delete(snapshot_id)]


def test_without_any_reflinks_each_call_is_unimplemented_and_names_the_engine(tmp_path: Path) -> None:
    with zones_of(tmp_path, a=Kind.EMBEDDED_WITHOUT, b=Kind.NVMESH) as zones:
        zones.features.offered(deadline=zones.deadline())
        for zone, engine in (("a", "embedded storage manager"), ("b", "NVMesh")):
            source = zones.volume(f"pvc-{zone}", zone=zone).volume_id
            for call in refusals(zones, source)[:2]:
                with pytest.raises(NotOffered, match=f"storage of zone {zone} offers no snapshots: {engine}"):
                    call()
        with pytest.raises(NotOffered, match=re.compile("zone a .* zone b", re.DOTALL)):
            zones.page()


def test_snapshots_can_be_deleted_where_the_pool_has_lost_its_reflinks(one: Zones) -> None:
    source = one.volume().volume_id
    snapshot, group = one.cut("s1", source), one.cut_group("g", source)
    server = one.storages["a"].server
    server.pool.why_no_reflinks = "the pool was restored to ext4"
    one.restart_controller()
    with pytest.raises(NotOffered, match="restored to ext4"):
        one.cut("s2", source)
    one.delete(snapshot.snapshot_id)
    one.delete_group(group.group_snapshot_id, *(each.snapshot_id for each in group.snapshots))
    assert not list(server.store.all(SNAPSHOTS))


def test_beside_a_zone_with_reflinks_the_refusal_is_of_the_zone_alone(two: Zones) -> None:
    two.features.offered(deadline=two.deadline())
    source = two.volume(zone="nvmesh").volume_id
    for call in refusals(two, source):
        with pytest.raises(PreconditionFailed, match="storage of zone nvmesh offers no snapshots: NVMesh"):
            call()
    assert two.listed() == []
