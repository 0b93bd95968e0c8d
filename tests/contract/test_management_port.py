# SPDX-License-Identifier: Apache-2.0
"""What the controller's use-cases rely on holds of the management that their tests run on, and of the client on the
embedded storage manager, alike. The two of the latter share no code: the written API binds them.
"""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import fields
from pathlib import Path

import pytest

from csi_driver.capacity import granule_bytes
from csi_driver.controller.fencing import was_preempted
from csi_driver.controller.volume_metadata import AttachmentRecord, with_attachments
from csi_driver.deadline import Deadline
from csi_driver.errors import (
    CapacityOutOfRange,
    Exhausted,
    InvalidRequest,
    NodeNotFound,
    OperationPending,
    PreconditionFailed,
    ReservationConflict,
    VolumeNotFound,
)
from csi_driver.storage_model import (
    AllowedDrives,
    Client,
    ClientStatus,
    DeviceStatus,
    Layout,
    RaidLevel,
    Volume,
    VolumeSpec,
    VolumeSummary,
)
from tests.contract.two_managements import (
    EXCLUSIVE,
    OTHER_UUID,
    POOL_BYTES,
    READ_ONLY,
    SHARED,
    Actor,
    FakeSide,
    Side,
    Work,
    embedded_side,
)


@pytest.fixture(params=["fake", "embedded"])
def side(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Side]:
    if request.param == "fake":
        yield FakeSide()
    else:
        with embedded_side(tmp_path) as real:
            yield real


@pytest.fixture
def actor(side: Side) -> Actor:
    return Actor(side.management, Deadline.after(20))


def test_the_server_states_its_version(actor: Actor) -> None:
    info = actor.management.system_info(deadline=actor.deadline)
    assert info.api_version.split(".")[0].isdigit()


# --- volumes ----------------------------------------------------------------------------------------------


def test_a_created_volume_is_found_with_its_attributes(actor: Actor) -> None:
    volume = actor.created()
    assert (volume.metadata, volume.layout.raid_level, volume.is_ready) == (
        {"csi_name": "pvc-v1"},
        RaidLevel.CONCATENATED,
        True,
    )


def test_a_volume_is_smaller_than_requested_by_less_than_a_granule(actor: Actor) -> None:
    volume = actor.created(capacity_gb=3.3)
    assert 0 <= 3_300_000_000 - volume.size_bytes < granule_bytes(volume.layout)


@pytest.mark.parametrize(
    "layout",
    [
        Layout(RaidLevel.STRIPED, stripe_width=2),
        Layout(RaidLevel.MIRRORED, number_of_mirrors=1),
        Layout(RaidLevel.STRIPED_MIRRORED, stripe_width=2, stripe_size_blocks=32, number_of_mirrors=1),
    ],
    ids=lambda layout: layout.raid_level.name,
)
def test_a_layout_comes_back_as_it_was_sent(actor: Actor, layout: Layout) -> None:
    found = actor.created(layout=layout).layout
    sent = {name: getattr(layout, name) for name in Layout.__slots__ if getattr(layout, name) is not None}
    assert {name: getattr(found, name) for name in sent} == sent


def test_a_group_lends_its_layout_to_its_volumes(actor: Actor) -> None:
    volume = actor.created(vpg="DEFAULT_RAID_1_VPG")
    assert (volume.vpg, volume.layout.raid_level) == ("DEFAULT_RAID_1_VPG", RaidLevel.MIRRORED)


def test_a_name_is_used_once(actor: Actor) -> None:
    actor.created()
    spec = VolumeSpec("v1", 2.0, {}, layout=Layout())
    assert actor.management.create_volume(spec, deadline=actor.deadline) is None


def test_one_of_parallel_creations_with_one_name_succeeds(actor: Actor) -> None:
    spec = VolumeSpec("v1", 2.0, {}, layout=Layout())
    with ThreadPoolExecutor(8) as pool:
        answers = list(pool.map(lambda _: actor.management.create_volume(spec, deadline=actor.deadline), range(8)))
    (made,) = [answer for answer in answers if answer is not None]
    assert (made.uuid if isinstance(made, Volume) else made) == actor.usable("v1").uuid


def test_a_volume_that_does_not_exist_is_none(actor: Actor) -> None:
    assert actor.management.volume("v1", deadline=actor.deadline) is None


@pytest.mark.parametrize("name", ["all", "ids", "count"])
def test_a_volume_named_like_a_route_is_an_ordinary_volume(actor: Actor, name: str) -> None:
    assert actor.management.volume(name, deadline=actor.deadline) is None
    assert actor.created(name).name == name


def test_a_volume_larger_than_the_pool_is_exhausted(actor: Actor) -> None:
    with pytest.raises(Exhausted):
        actor.created(capacity_gb=2 * POOL_BYTES / 1e9)


def test_an_unknown_group_is_a_bad_request(actor: Actor) -> None:
    with pytest.raises(InvalidRequest):
        actor.created(vpg="nope")


def test_a_name_that_the_api_does_not_allow_is_a_bad_request(actor: Actor) -> None:
    with pytest.raises(InvalidRequest):
        actor.created("x" * 23)


def test_metadata_is_replaced_as_a_whole(actor: Actor) -> None:
    volume = actor.created()
    actor.management.set_metadata(volume, {"other": {"nested": [1, "ü"]}}, deadline=actor.deadline)
    assert actor.usable("v1").metadata == {"other": {"nested": [1, "ü"]}}


def test_metadata_of_another_volume_with_the_name_is_not_changed(actor: Actor) -> None:
    volume = actor.created()
    stranger = Volume("v1", OTHER_UUID, volume.blocks, 4096, 2.0, "online", "none")
    with pytest.raises(VolumeNotFound):
        actor.management.set_metadata(stranger, {}, deadline=actor.deadline)
    assert actor.usable("v1").metadata == {"csi_name": "pvc-v1"}


# --- lists ------------------------------------------------------------------------------------------------


def test_pages_show_every_volume_once_in_order_of_names(actor: Actor) -> None:
    for name in ("b", "a", "d", "c", "B"):
        actor.created(name)
    pages = [actor.names(limit=2), actor.names("a", 2), actor.names("c", 2), actor.names("d", 2)]
    assert pages == [["B", "a"], ["b", "c"], ["d"], []]


def test_a_page_continues_after_a_deleted_volume(actor: Actor) -> None:
    for name in ("a", "b", "c"):
        actor.created(name)
    actor.management.delete_volume(actor.usable("a"), deadline=actor.deadline)
    assert actor.names("a", 2) == ["b", "c"]


def test_a_listed_volume_equals_the_volume_itself(actor: Actor) -> None:
    volume = actor.created()
    (listed,) = actor.management.volumes(after="", limit=0, deadline=actor.deadline)
    assert listed == VolumeSummary(*(getattr(volume, each.name) for each in fields(VolumeSummary)))


# --- extension --------------------------------------------------------------------------------------------


def test_an_extended_volume_is_larger(actor: Actor) -> None:
    volume = actor.created()
    actor.management.extend_volume(volume, 3.0005, deadline=actor.deadline)
    assert actor.usable("v1").size_bytes >= 3_000_000_000 - granule_bytes(volume.layout)


def test_an_extension_below_one_granule_is_out_of_range(actor: Actor) -> None:
    with pytest.raises(CapacityOutOfRange):
        actor.management.extend_volume(actor.created(), 2.001, deadline=actor.deadline)


def test_an_extension_beyond_the_pool_is_exhausted(actor: Actor) -> None:
    with pytest.raises(Exhausted):
        actor.management.extend_volume(actor.created(), 2 * POOL_BYTES / 1e9, deadline=actor.deadline)


def test_an_extension_from_an_old_state_of_the_volume_is_pending(actor: Actor) -> None:
    before = actor.created()
    actor.management.extend_volume(before, 3.0, deadline=actor.deadline)
    with pytest.raises(OperationPending):
        actor.management.extend_volume(before, 4.0, deadline=actor.deadline)


def test_a_volume_that_does_not_exist_is_not_extended(actor: Actor) -> None:
    volume = actor.created()
    actor.management.delete_volume(volume, deadline=actor.deadline)
    with pytest.raises((VolumeNotFound, OperationPending)):
        actor.management.extend_volume(volume, 4.0, deadline=actor.deadline)


# --- attachments ------------------------------------------------------------------------------------------


def test_a_client_is_found_by_id_and_by_uuid(actor: Actor) -> None:
    assert actor.management.client_by_uuid(actor.node().uuid, deadline=actor.deadline) == actor.node()


def test_an_unknown_client_is_none(actor: Actor) -> None:
    assert actor.management.client("nobody", deadline=actor.deadline) is None
    assert actor.management.client_by_uuid(OTHER_UUID, deadline=actor.deadline) is None


def test_all_clients_are_listed(actor: Actor) -> None:
    assert actor.management.clients(deadline=actor.deadline) == [actor.node(1), actor.node(2)]


def test_an_attached_volume_is_reported_with_io_and_reference(actor: Actor) -> None:
    volume = actor.created()
    actor.attach(volume, reference="ns")
    report = actor.node().devices[volume.uuid]
    assert (report.status, report.io_enabled, report.reference_ids, report.mode) == (
        DeviceStatus.ATTACHED,
        True,
        frozenset({"ns"}),
        EXCLUSIVE,
    )


def test_without_a_reference_the_uuid_is_the_reference(actor: Actor) -> None:
    volume = actor.created()
    actor.attach(volume)
    assert actor.node().desired[volume.uuid].reference_ids == {volume.uuid}


def test_attaching_again_in_the_same_mode_changes_nothing(actor: Actor) -> None:
    volume = actor.created()
    actor.attach(volume, reference="ns")
    before = actor.usable("v1").reservation
    actor.attach(volume, reference="ns")
    assert actor.usable("v1").reservation == before


def test_an_attached_volume_is_held_by_its_client_alone(actor: Actor) -> None:
    volume, other = actor.created(), actor.created("v2")
    actor.attach(volume, 2)
    assert (actor.holders(volume), actor.holders(other)) == (["node-2"], [])


def test_readers_hold_a_volume_together(actor: Actor) -> None:
    volume = actor.created()
    actor.attach(volume, 1, READ_ONLY)
    actor.attach(volume, 2, READ_ONLY)
    assert actor.holders(volume) == ["node-1", "node-2"]


def test_a_volume_held_exclusively_is_refused_to_others_with_its_version(actor: Actor) -> None:
    volume = actor.created()
    actor.attach(volume)
    with pytest.raises(ReservationConflict) as caught:
        actor.attach(volume, 2)
    assert caught.value.current_version == actor.usable("v1").reservation.version


def test_another_mode_on_the_same_client_is_a_conflict(actor: Actor) -> None:
    volume = actor.created()
    actor.attach(volume)
    with pytest.raises(ReservationConflict):
        actor.attach(volume, mode=SHARED)


def test_the_right_version_without_preempt_is_a_conflict(actor: Actor) -> None:
    volume = actor.created()
    actor.attach(volume)
    version = actor.usable("v1").reservation.version
    with pytest.raises(ReservationConflict) as caught:
        actor.management.attach(
            actor.node(2), volume, mode=EXCLUSIVE, reference_id=None, version=version, deadline=actor.deadline
        )
    assert caught.value.management_id == 1718


def test_a_takeover_detaches_the_others(actor: Actor) -> None:
    volume = actor.created()
    actor.attach(volume)
    actor.management.attach(
        actor.node(2),
        volume,
        mode=EXCLUSIVE,
        reference_id="ns",
        version=actor.usable("v1").reservation.version,
        preempt=True,
        detach_others=True,
        deadline=actor.deadline,
    )
    assert actor.deadline.wait_until(lambda: actor.holders(volume) == ["node-2"])
    assert actor.usable("v1").reservation.reserved_by == "node-2"


def test_the_desired_attachment_of_a_dead_client_stays_with_its_old_version(actor: Actor, side: Side) -> None:
    """The proof by which DeleteVolume goes on: see docs/fencing.md."""
    volume = actor.created()
    actor.attach(volume, reference="ns")
    side.lose("node-1")
    actor.detach(volume, reference="ns")
    assert actor.deadline.wait_until(lambda: actor.node().status is ClientStatus.DOWN)
    assert not was_preempted(actor.usable("v1"), actor.node())
    version = actor.usable("v1").reservation.version
    actor.management.attach(
        actor.node(2), volume, mode=EXCLUSIVE, reference_id="ns", version=version, preempt=True, detach_others=True,
        deadline=actor.deadline,
    )  # fmt: skip
    assert actor.deadline.wait_until(lambda: volume.uuid in actor.node(2).devices)
    assert not was_preempted(actor.usable("v1"), actor.node())
    taker = actor.node(2).desired[volume.uuid]
    assert (taker.preempts, taker.version) == (True, version + 1)
    assert not actor.node().desired[volume.uuid].preempts
    record = with_attachments({}, AttachmentRecord(taken=taker.version))
    actor.management.set_metadata(actor.usable("v1"), record, deadline=actor.deadline)
    actor.detach(volume, 2, reference="ns")
    assert actor.deadline.wait_until(lambda: actor.holders(volume) == ["node-1"])
    assert actor.node().desired[volume.uuid].is_detaching
    assert was_preempted(actor.usable("v1"), actor.node())
    # The embedded manager waits with the file until the client is back and its device is gone.
    assert actor.management.delete_volume(volume, deadline=actor.deadline)
    going = actor.management.volume("v1", deadline=actor.deadline)
    assert going is None or going.is_being_deleted


def test_an_unknown_client_cannot_be_attached_to(actor: Actor) -> None:
    nobody = Client("nobody", OTHER_UUID, actor.node().status)
    with pytest.raises(NodeNotFound):
        actor.management.attach(nobody, actor.created(), mode=EXCLUSIVE, reference_id=None, deadline=actor.deadline)


def test_another_volume_with_the_name_is_not_attached(actor: Actor) -> None:
    volume = actor.created()
    stranger = Volume("v1", OTHER_UUID, volume.blocks, 4096, 2.0, "online", "none")
    with pytest.raises(VolumeNotFound):
        actor.attach(stranger)


def test_the_device_goes_with_the_last_reference(actor: Actor) -> None:
    volume = actor.created()
    actor.attach(volume, mode=READ_ONLY, reference="a")
    actor.attach(volume, mode=READ_ONLY, reference="b")
    actor.detach(volume, reference="a")
    assert actor.node().desired[volume.uuid].reference_ids == {"b"}
    actor.detach(volume, reference="b")
    assert actor.deadline.wait_until(lambda: not actor.node().holds(volume.uuid))


def test_a_volume_under_detach_is_still_held(actor: Actor, side: Side) -> None:
    volume = actor.created()
    actor.attach(volume)
    side.hold(Work.DETACHING)
    actor.detach(volume)
    assert actor.holders(volume) == ["node-1"]
    assert actor.node().desired[volume.uuid].is_detaching


@pytest.mark.parametrize("reference", [None, "ns"])
def test_detaching_a_detached_volume_succeeds(actor: Actor, reference: str | None) -> None:
    actor.detach(actor.created(), reference=reference)


def test_detaching_an_absent_reference_keeps_the_others(actor: Actor) -> None:
    volume = actor.created()
    actor.attach(volume, reference="a")
    actor.detach(volume, reference="b")
    assert actor.node().desired[volume.uuid].reference_ids == {"a"}


def test_detaching_from_an_absent_client_succeeds(actor: Actor) -> None:
    nobody = Client("nobody", OTHER_UUID, actor.node().status)
    actor.management.detach(nobody, actor.created(), reference_id=None, deadline=actor.deadline)


def test_detaching_an_absent_volume_succeeds(actor: Actor) -> None:
    actor.detach(Volume("gone", OTHER_UUID, 256, 4096, 2.0, "online", "none"))


# --- deletion ---------------------------------------------------------------------------------------------


def test_a_deleted_volume_is_gone(actor: Actor) -> None:
    assert actor.management.delete_volume(actor.created(), deadline=actor.deadline)
    assert actor.deadline.wait_until(lambda: actor.management.volume("v1", deadline=actor.deadline) is None)


def test_deleting_an_absent_volume_returns_false(actor: Actor) -> None:
    gone = Volume("v1", OTHER_UUID, 256, 4096, 2.0, "online", "none")
    assert not actor.management.delete_volume(gone, deadline=actor.deadline)


def test_another_volume_with_the_name_is_not_deleted(actor: Actor) -> None:
    volume = actor.created()
    stranger = Volume("v1", OTHER_UUID, volume.blocks, 4096, 2.0, "online", "none")
    assert not actor.management.delete_volume(stranger, deadline=actor.deadline)
    assert actor.usable("v1") == volume


def test_an_attached_volume_is_not_deleted_and_its_client_is_named(actor: Actor) -> None:
    volume = actor.created()
    actor.attach(volume)
    with pytest.raises(PreconditionFailed, match="node-1"):
        actor.management.delete_volume(volume, deadline=actor.deadline)


def test_a_volume_that_is_being_deleted_keeps_its_name(actor: Actor, side: Side) -> None:
    volume = actor.created()
    side.hold(Work.DELETING)
    assert actor.management.delete_volume(volume, deadline=actor.deadline)
    assert actor.management.delete_volume(volume, deadline=actor.deadline)
    assert actor.usable("v1").is_being_deleted
    spec = VolumeSpec("v1", 2.0, {}, layout=Layout())
    assert actor.management.create_volume(spec, deadline=actor.deadline) is None


def test_a_volume_that_is_being_created_is_neither_extended_nor_deleted(actor: Actor, side: Side) -> None:
    side.hold(Work.MAKING)
    spec = VolumeSpec("v1", 2.0, {}, layout=Layout())
    actor.management.create_volume(spec, deadline=actor.deadline)
    volume = actor.management.volume("v1", deadline=actor.deadline)
    assert volume is not None
    assert volume.is_being_made
    with pytest.raises(OperationPending):
        actor.management.extend_volume(volume, 3.0, deadline=actor.deadline)
    with pytest.raises(OperationPending):
        actor.management.delete_volume(volume, deadline=actor.deadline)


# --- groups and space -------------------------------------------------------------------------------------


def test_a_built_in_group_is_found_with_its_layout(actor: Actor) -> None:
    group = actor.management.vpg("DEFAULT_RAID_10_VPG", deadline=actor.deadline)
    assert group is not None
    assert (group.layout.raid_level, group.allow_overflow) == (RaidLevel.STRIPED_MIRRORED, True)


def test_an_unknown_group_is_none(actor: Actor) -> None:
    assert actor.management.vpg("nope", deadline=actor.deadline) is None


def test_a_group_without_reserved_space_has_no_free_bytes(actor: Actor) -> None:
    assert actor.management.vpg_free_bytes("DEFAULT_RAID_1_VPG", deadline=actor.deadline) == 0


def test_an_empty_pool_offers_no_more_than_it_has(actor: Actor) -> None:
    space = actor.management.raw_space(deadline=actor.deadline)
    assert space is not None
    # Several targets share the pool, and what does not divide is left out.
    assert 0 <= POOL_BYTES - space.free_bytes < 100_000
    assert 0 <= POOL_BYTES - space.total_bytes < 100_000


def test_free_space_shrinks_by_the_created_size(actor: Actor) -> None:
    before = actor.management.raw_space(deadline=actor.deadline)
    volume = actor.created(capacity_gb=50.0)
    after = actor.management.raw_space(deadline=actor.deadline)
    assert before is not None
    assert after is not None
    # The pool may be spread over several targets, and what does not divide is left out.
    assert before.total_bytes == after.total_bytes
    assert before.free_bytes - after.free_bytes == pytest.approx(volume.size_bytes, abs=100_000)


@pytest.mark.parametrize(
    "allowed",
    [
        AllowedDrives(targets=("unknown",)),
        AllowedDrives(drives=("unknown",)),
        AllowedDrives(drive_classes=("unknown",)),
        AllowedDrives(target_classes=("unknown",)),
        AllowedDrives(domain="unknown"),
    ],
)
def test_free_space_of_an_absent_class_is_none(actor: Actor, allowed: AllowedDrives) -> None:
    assert actor.management.raw_space(allowed, deadline=actor.deadline) is None
