# SPDX-License-Identifier: Apache-2.0
"""Preemption of volumes on lost nodes: when it is permitted, when not, and the deletion of such volumes."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from csi_driver.controller.fencing import was_preempted
from csi_driver.controller.volume_metadata import read_attachments
from csi_driver.errors import DeadlineReached, OperationPending, PreconditionFailed
from csi_driver.model import Capability
from csi_driver.publish_context import History
from csi_driver.settings import ControllerSettings, Fencing
from csi_driver.storage_model import (
    Client,
    ClientStatus,
    DesiredAttachment,
    DeviceStatus,
    Reservation,
    ReservationMode,
    Volume,
)
from tests.fakes.management import client_uuid
from tests.unit.controller.world import BLOCK, CLAIM, NODE_1, NODE_2, ROX, RWO, RWX_BLOCK, World, other_reference

NODE_3 = client_uuid("node-3")
EXCLUSIVE = ReservationMode.EXCLUSIVE_READ_WRITE
STATES_OF_A_NODE_THAT_IS_THERE = [status for status in ClientStatus if status is not ClientStatus.DOWN]


def held(fencing: Fencing = Fencing.RECORDED, capability: Capability = RWO) -> tuple[World, str]:
    """Return a world in which node-1 holds the volume."""
    world = World(ControllerSettings(fencing=fencing))
    volume_id = world.create(parameters=CLAIM).volume_id
    world.publish(volume_id, NODE_1, capability)
    return world, volume_id


def lost(fencing: Fencing = Fencing.RECORDED, capability: Capability = RWO) -> tuple[World, str]:
    """Return a world in which node-1 held the volume and went down, and the volume was unpublished there."""
    world, volume_id = held(fencing, capability)
    world.management.set_status("node-1", ClientStatus.DOWN)
    world.unpublish(volume_id, NODE_1)
    return world, volume_id


def client(world: World, name: str = "node-1") -> Client:
    found = world.management.client(name, deadline=world.deadline())
    assert found is not None
    return found


def attaches(world: World) -> int:
    return world.management.requests.count("attach")


def at(world: World, request: str, act: Callable[[], object]) -> None:
    """Let something happen once, right before a request of this kind."""

    def before(name: str) -> None:
        if name == request:
            world.management.before = lambda _: None
            act()

    world.management.before = before


# --- by default: given up and down ----------------------------------------------------------------------------


@pytest.mark.parametrize("use", [RWO, BLOCK, ROX, RWX_BLOCK])
def test_a_lost_node_that_gave_the_volume_up_is_preempted(use: Capability) -> None:
    world, volume_id = lost()
    world.publish(volume_id, NODE_2, use)
    reservation = world.stored().reservation
    assert reservation.version == 3
    assert client(world, "node-2").devices[world.stored().uuid].status is DeviceStatus.ATTACHED
    assert client(world).desired[world.stored().uuid].is_detaching


def test_a_lost_reader_makes_way_for_a_writer() -> None:
    world, volume_id = lost(capability=ROX)
    world.publish(volume_id, NODE_2)
    assert world.stored().reservation.mode is EXCLUSIVE


def test_a_volume_that_was_taken_over_is_not_new() -> None:
    world, volume_id = held()
    assert world.publish(volume_id, NODE_1).history is History.FIRST
    world.management.set_status("node-1", ClientStatus.DOWN)
    world.unpublish(volume_id, NODE_1)
    context = world.publish(volume_id, NODE_2)
    assert (context.history, context.attachment) == (History.ATTACHED, 2)


def test_publishing_again_after_a_take_over_takes_nothing_more() -> None:
    world, volume_id = lost()
    first = world.publish(volume_id, NODE_2)
    version, written = world.stored().reservation.version, world.management.requests.count("set_metadata")
    assert world.publish(volume_id, NODE_2) == first
    assert world.stored().reservation.version == version
    assert world.management.requests.count("set_metadata") == written


def test_a_preemption_is_not_recorded_over_outdated_metadata() -> None:
    world, volume_id = lost()
    before = world.stored()

    def show_old(request: str) -> None:
        if request == "attach":
            world.management.old_news[before.name] = before

    world.management.after = show_old
    world.publish(volume_id, NODE_2)
    assert read_attachments(world.stored().metadata).number == 2
    world.management.old_news.clear()
    world.publish(volume_id, NODE_2)
    known = read_attachments(world.stored().metadata)
    assert (known.number, known.taken) == (2, 3)


def test_a_node_that_is_down_keeps_what_nobody_gave_up() -> None:
    world, volume_id = held()
    world.management.set_status("node-1", ClientStatus.DOWN)
    with pytest.raises(
        PreconditionFailed, match=r"node-1: the storage client is down, but the volume was not released"
    ):
        world.publish(volume_id, NODE_2)
    assert attaches(world) == 1


@pytest.mark.parametrize("status", STATES_OF_A_NODE_THAT_IS_THERE)
def test_a_node_that_is_there_keeps_what_it_is_still_giving_up(status: ClientStatus) -> None:
    world, volume_id = held()
    world.management.set_busy("node-1", world.stored())
    with pytest.raises(DeadlineReached):
        world.unpublish(volume_id, NODE_1)
    world.management.set_status("node-1", status)
    with pytest.raises(PreconditionFailed, match="is being detached there"):
        world.publish(volume_id, NODE_2)
    assert attaches(world) == 1


def test_one_reader_that_is_there_keeps_the_volume_from_a_writer() -> None:
    world, volume_id = held(capability=ROX)
    world.publish(volume_id, NODE_3, ROX)
    world.management.set_status("node-1", ClientStatus.DOWN)
    world.unpublish(volume_id, NODE_1)
    with pytest.raises(PreconditionFailed, match="node-3: the storage client is ready"):
        world.publish(volume_id, NODE_2)


def test_a_reference_that_is_left_on_a_lost_node_keeps_the_volume() -> None:
    world, volume_id = held(capability=ROX)
    world.publish(other_reference(volume_id, "team-b"), NODE_1, ROX)
    world.management.set_status("node-1", ClientStatus.DOWN)
    world.unpublish(volume_id, NODE_1)
    with pytest.raises(PreconditionFailed, match="was not released there"):
        world.publish(volume_id, NODE_2)
    world.unpublish(other_reference(volume_id, "team-b"), NODE_1)
    world.publish(volume_id, NODE_2)


def test_a_node_whose_client_was_deleted_with_the_volume_in_its_hands_keeps_nothing() -> None:
    world, volume_id = lost()
    world.management.remove_client("node-1")
    world.publish(volume_id, NODE_2)
    assert world.holders() == ["node-2"]


# --- what happens in between ----------------------------------------------------------------------------------


def test_a_node_that_comes_back_at_the_last_moment_is_not_preempted() -> None:
    world, volume_id = lost()
    world.management.detach_s = 1000
    world.management.set_busy("node-1", world.stored())
    at(world, "set_metadata", lambda: world.management.set_status("node-1", ClientStatus.READY))
    with pytest.raises((PreconditionFailed, OperationPending)):
        world.publish(volume_id, NODE_2)
    assert attaches(world) == 1


def test_a_volume_that_another_controller_took_first_is_not_taken_from_its_new_node() -> None:
    world, volume_id = lost()
    other = World(beside=world)
    at(world, "set_metadata", lambda: other.publish(volume_id, NODE_3))
    with pytest.raises(OperationPending, match="attached or detached concurrently"):
        world.publish(volume_id, NODE_2)
    with pytest.raises(PreconditionFailed, match="node-3"):
        world.publish(volume_id, NODE_2)
    assert world.stored().reservation.reserved_by == "node-3"


def test_the_storage_refuses_who_judged_an_older_reservation() -> None:
    world, volume_id = lost()
    other = World(beside=world)
    at(world, "attach", lambda: other.publish(volume_id, NODE_3))
    with pytest.raises(PreconditionFailed, match="node-3"):
        world.publish(volume_id, NODE_2)
    assert world.stored().reservation.reserved_by == "node-3"


# --- afterwards -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("use", [RWO, ROX])
def test_a_node_of_whose_attachment_a_server_has_not_heard_is_not_preempted(use: Capability) -> None:
    world, volume_id = held(capability=use)
    world.management.unheard_of.add("node-1")
    with pytest.raises(OperationPending, match="attached to node-1 by its own document"):
        world.publish(volume_id, NODE_2, BLOCK)
    assert attaches(world) == 1
    world.management.unheard_of.clear()
    with pytest.raises(PreconditionFailed, match="the storage client is ready and the volume is attached there"):
        world.publish(volume_id, NODE_2, BLOCK)


def test_a_node_that_was_given_another_name_while_it_lets_go_has_not_lost_the_volume() -> None:
    world, volume_id = held()
    world.management.set_busy("node-1", world.stored())
    with pytest.raises(DeadlineReached):
        world.unpublish(volume_id, NODE_1)
    reservation = world.stored().reservation
    world.management.rename_client("node-1", "node-1.example.com")
    world.management.change(world.stored().name, reservation=reservation)  # which was written under the old name
    with pytest.raises(PreconditionFailed, match=r"node-1\.example\.com: the storage client is ready .*being detached"):
        world.publish(volume_id, NODE_2)
    assert attaches(world) == 1


def test_a_holder_that_is_gone_from_the_management_is_no_contradiction() -> None:
    world, volume_id = lost()
    world.management.remove_client("node-1")
    assert world.stored().reservation.attached == ("node-1",)
    world.publish(volume_id, NODE_2)
    assert world.stored().reservation.attached == ("node-2",)


def test_what_a_lost_node_is_told_to_give_up_later_leaves_the_new_holder_alone() -> None:
    world, volume_id = lost()
    first = world.publish(volume_id, NODE_2)
    version = world.stored().reservation.version
    world.unpublish(volume_id, NODE_1)
    world.management.set_status("node-1", ClientStatus.READY)
    world.unpublish(volume_id, NODE_1)
    assert (world.publish(volume_id, NODE_2), world.stored().reservation.version) == (first, version)
    assert world.holders() == ["node-2"]


def test_a_node_that_returns_gives_up_what_was_taken_from_it() -> None:
    world, volume_id = lost()
    world.publish(volume_id, NODE_2)
    world.management.set_status("node-1", ClientStatus.READY)
    world.clock.sleep(5)
    assert world.holders() == ["node-2"]
    world.unpublish(volume_id, NODE_2)
    world.publish(volume_id, NODE_1)


def test_what_a_preempted_node_cannot_let_go_of_does_not_hinder_the_next_move() -> None:
    world, volume_id = lost()
    world.publish(volume_id, NODE_2)
    volume = world.stored()
    # It is back, and has the dead device open still.
    world.management.set_status("node-1", ClientStatus.READY)
    world.management.report("node-1", volume, DeviceStatus.BUSY)
    world.management.detach_s = 1000
    world.management.set_status("node-2", ClientStatus.DOWN)
    world.unpublish(volume_id, NODE_2)
    world.publish(volume_id, NODE_3)
    assert world.stored().reservation.reserved_by == "node-3"


def test_a_volume_does_not_return_to_a_node_before_that_is_rid_of_its_stale_device() -> None:
    world, volume_id = lost()
    world.publish(volume_id, NODE_2)
    world.unpublish(volume_id, NODE_2)
    before = attaches(world)
    with pytest.raises(Exception, match="down"):
        world.publish(volume_id, NODE_1)
    assert attaches(world) == before


# --- other policies -------------------------------------------------------------------------------------------


def test_never_means_never() -> None:
    world, volume_id = lost(Fencing.NEVER)
    with pytest.raises(PreconditionFailed, match="--fencing never"):
        world.publish(volume_id, NODE_2)
    assert attaches(world) == 1


def test_always_takes_it_from_a_node_that_is_well() -> None:
    world, volume_id = held(Fencing.ALWAYS)
    world.publish(volume_id, NODE_2)
    assert world.holders() == ["node-2"]


def test_always_takes_nothing_from_those_who_share() -> None:
    world, volume_id = held(Fencing.ALWAYS, ROX)
    world.publish(volume_id, NODE_2, ROX)
    assert world.holders() == ["node-1", "node-2"]


# --- the recorded release -------------------------------------------------------------------------------------


def test_for_a_lost_node_nothing_is_answered_before_the_wish_is_recorded() -> None:
    world, volume_id = held()
    world.management.set_status("node-1", ClientStatus.DOWN)
    volume = world.stored()

    def forget_the_detach(request: str) -> None:
        if request == "detach":
            world.management.attach(
                client(world), volume, mode=EXCLUSIVE, reference_id="team-a", deadline=world.deadline()
            )

    world.management.after = forget_the_detach
    with pytest.raises(DeadlineReached):
        world.unpublish(volume_id, NODE_1, seconds=5)


# --- deletion after the loss of a node ------------------------------------------------------------------------


def test_a_volume_that_was_taken_from_a_dead_node_can_be_deleted(caplog: pytest.LogCaptureFixture) -> None:
    world, volume_id = lost()
    world.publish(volume_id, NODE_2)
    with pytest.raises(PreconditionFailed, match=r"still attached to node-1 .*node-2"):
        world.delete(volume_id)
    world.unpublish(volume_id, NODE_2)
    assert world.holders() == ["node-1"]  # its document keeps both entries until it comes back
    with caplog.at_level("WARNING"):
        world.delete(volume_id)
    assert world.management.all_volumes() == []
    assert any("preempted" in record.getMessage() for record in caplog.records)


@pytest.mark.parametrize("use", [RWO, ROX])
def test_a_volume_still_attached_to_a_dead_node_is_not_deleted_and_the_fix_is_named(use: Capability) -> None:
    world, volume_id = lost(capability=use)
    if use is ROX:
        world.publish(volume_id, NODE_3, ROX)
        world.unpublish(volume_id, NODE_3)
    with pytest.raises(PreconditionFailed, match=r"node-1 is down.*delete its client .*POST /clients/delete"):
        world.delete(volume_id)
    world.management.remove_client("node-1")
    world.delete(volume_id)
    assert world.management.all_volumes() == []


@pytest.mark.parametrize("has_device", [False, True])
def test_a_preemption_that_no_target_heard_of_is_no_leave_to_delete(*, has_device: bool) -> None:
    """The management raises the version when it is asked; the storage cuts off the former holder later."""
    world, volume_id = lost()
    world.management.attach_s, world.management.io_s = (0, 1000) if has_device else (1000, 0)
    with pytest.raises(DeadlineReached):
        world.publish(volume_id, NODE_2)
    world.unpublish(volume_id, NODE_2)
    assert world.stored().reservation == Reservation(version=4)
    with pytest.raises(PreconditionFailed, match="still attached to node-1"):
        world.delete(volume_id)
    assert len(world.management.all_volumes()) == 1


def test_a_preemption_that_came_about_in_a_later_call_is_leave_to_delete() -> None:
    world, volume_id = lost()
    world.management.io_s = 100
    with pytest.raises(DeadlineReached):
        world.publish(volume_id, NODE_2)
    world.clock.sleep(100)
    world.publish(volume_id, NODE_2)
    world.unpublish(volume_id, NODE_2)
    world.delete(volume_id)
    assert world.management.all_volumes() == []


def test_a_node_that_was_attached_again_since_keeps_the_volume_from_deletion() -> None:
    world, volume_id = lost()
    world.publish(volume_id, NODE_2)
    world.unpublish(volume_id, NODE_2)
    world.management.set_status("node-1", ClientStatus.READY)
    world.clock.sleep(10)
    world.publish(volume_id, NODE_1)
    world.management.set_status("node-1", ClientStatus.DOWN)
    world.unpublish(volume_id, NODE_1)
    with pytest.raises(PreconditionFailed, match="still attached to node-1"):
        world.delete(volume_id)


def test_a_node_that_came_back_with_the_device_open_keeps_the_volume_from_deletion() -> None:
    world, volume_id = lost()
    world.management.set_busy("node-1", world.stored())
    world.publish(volume_id, NODE_2)
    world.unpublish(volume_id, NODE_2)
    world.management.set_status("node-1", ClientStatus.READY)
    with pytest.raises(PreconditionFailed, match="still attached to node-1"):
        world.delete(volume_id)


NOBODYS = Reservation(version=4)


def taken(version: object, *, broken: bool = False) -> dict[str, object]:
    """Return the metadata of a volume that a node took under this version of the reservation."""
    record = {"number": 2, "clients": {}, "written": False, "broken": broken, "handles": [], "taken": version}
    return {"nvmesh-csi": {"attachments": record}}


@pytest.mark.parametrize(
    ("version", "action", "status", "reservation", "metadata", "proven"),
    [
        (2, "detaching", ClientStatus.DOWN, NOBODYS, taken(3), True),
        (1, "detaching", ClientStatus.DOWN, NOBODYS, taken(3), True),
        (2, "detaching", ClientStatus.DOWN, NOBODYS, {}, False),
        (2, "detaching", ClientStatus.DOWN, NOBODYS, taken(2), False),
        (2, "detaching", ClientStatus.DOWN, NOBODYS, taken(4), False),
        (2, "detaching", ClientStatus.DOWN, NOBODYS, taken("3"), False),
        (2, "detaching", ClientStatus.DOWN, NOBODYS, taken(3, broken=True), False),
        (3, "detaching", ClientStatus.DOWN, NOBODYS, taken(3), False),
        (5, "detaching", ClientStatus.DOWN, NOBODYS, taken(3), False),
        (0, "detaching", ClientStatus.DOWN, NOBODYS, taken(3), False),
        (2, "attaching", ClientStatus.DOWN, NOBODYS, taken(3), False),
        (2, "detaching", ClientStatus.DOWN, Reservation(EXCLUSIVE, 4, "node-2", ("node-2",)), taken(3), False),
        (2, "detaching", ClientStatus.DOWN, Reservation(version=4, attached=("node-1",)), taken(3), False),
        *[(2, "detaching", status, NOBODYS, taken(3), False) for status in STATES_OF_A_NODE_THAT_IS_THERE],
    ],
)
def test_preemption_is_proven_by_record_and_versions_and_never_guessed(
    version: int,
    action: str,
    status: ClientStatus,
    reservation: Reservation,
    metadata: dict[str, object],
    *,
    proven: bool,
) -> None:
    volume = Volume("csi-1", "v", 256, 4096, 1.0, "online", "none", reservation=reservation, metadata=metadata)
    wish = DesiredAttachment("v", "csi-1", action, EXCLUSIVE, frozenset(), version)
    assert was_preempted(volume, Client("node-1", "c", status, {"v": wish})) is proven


def test_a_device_without_a_wish_proves_no_preemption() -> None:
    volume = Volume("csi-1", "v", 256, 4096, 1.0, "online", "none", reservation=NOBODYS, metadata=taken(3))
    assert not was_preempted(volume, Client("node-1", "c", ClientStatus.DOWN))
