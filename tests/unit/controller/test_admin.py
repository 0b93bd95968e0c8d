# SPDX-License-Identifier: Apache-2.0
"""The commands `nvmesh-csi volume` over a storage management in memory."""

from __future__ import annotations

import logging

import pytest

from csi_driver.controller.admin import VolumeAdmin
from csi_driver.errors import OperationPending, PreconditionFailed, VolumeNotFound
from csi_driver.model import CapacityRange
from csi_driver.publish_context import History
from csi_driver.storage_model import ReservationMode, Volume
from tests.unit.controller.world import BLOCK, CLAIM, NODE_1, NODE_2, ROX, World, other_reference

UUID = "11111111-2222-3333-4444-555555555555"


def allow(world: World, volume_id: str) -> str:
    return VolumeAdmin(world.clusters).allow_format(volume_id, deadline=world.deadline())


def shown(world: World, volume_id: str) -> dict[str, str]:
    return dict(VolumeAdmin(world.clusters).show(volume_id, deadline=world.deadline()))


def test_nothing_is_allowed_unless_somebody_allows_it() -> None:
    world = World()
    assert not world.publish(world.create().volume_id).format_allowed


def test_one_attachment_may_format_and_the_next_may_not() -> None:
    world = World()
    made = world.create()
    allow(world, made.volume_id)
    assert world.publish(made.volume_id).format_allowed
    world.unpublish(made.volume_id)
    assert not world.publish(made.volume_id).format_allowed


def test_a_retry_of_that_attachment_may_format_too() -> None:
    world = World()
    made = world.create()
    allow(world, made.volume_id)
    assert [world.publish(made.volume_id).format_allowed for _ in range(3)] == [True] * 3
    assert World(beside=world).publish(made.volume_id).format_allowed


def test_an_attachment_that_never_came_about_does_not_use_it_up() -> None:
    world = World()
    made = world.create()
    allow(world, made.volume_id)

    def fail(request: str) -> None:
        if request == "attach":
            world.management.before = lambda request: None
            raise OperationPending("not now")

    world.management.before = fail
    with pytest.raises(OperationPending):
        world.publish(made.volume_id)
    assert world.publish(made.volume_id, NODE_2).format_allowed


def test_a_volume_that_was_in_use_gets_it_for_its_next_attachment() -> None:
    world = World()
    made = world.create()
    world.publish(made.volume_id)
    world.unpublish(made.volume_id)
    allow(world, made.volume_id)
    published = world.publish(made.volume_id)
    assert (published.format_allowed, published.history) == (True, History.ATTACHED)


def test_a_read_only_attachment_uses_it_up_without_having_it() -> None:
    world = World()
    made = world.create()
    allow(world, made.volume_id)
    assert not world.publish(made.volume_id, capability=ROX).format_allowed
    world.unpublish(made.volume_id)
    assert not world.publish(made.volume_id).format_allowed


def test_it_is_for_one_volume() -> None:
    world = World()
    one, other = world.create("one"), world.create("other")
    allow(world, one.volume_id)
    assert not world.publish(other.volume_id).format_allowed


def test_a_volume_of_somebody_else_may_be_allowed_too() -> None:
    world = World()
    world.management.add_volume(Volume("old", UUID, 1 << 20, 4096, 4.3, "online", "none"))
    allow(world, "old")
    assert world.publish("old").format_allowed


def test_it_says_and_logs_what_it_did(caplog: pytest.LogCaptureFixture) -> None:
    world = World()
    made = world.create()
    said = allow(world, made.volume_id)
    assert world.stored().uuid in said
    assert [record.levelno for record in caplog.records if record.message == said] == [logging.WARNING]


def test_nothing_else_of_the_metadata_changes() -> None:
    world = World()
    made = world.create(parameters=CLAIM)
    world.publish(made.volume_id)
    world.unpublish(made.volume_id)
    before = world.stored().metadata
    allow(world, made.volume_id)
    after = dict(world.stored().metadata)
    own = dict(after["nvmesh-csi"])  # type: ignore[call-overload]
    assert own.pop("formatAllowed") == world.stored().reservation.version
    assert {**after, "nvmesh-csi": own} == before
    assert world.create(parameters=CLAIM) == made


def test_an_attached_volume_is_refused_and_its_holder_is_named() -> None:
    world = World()
    made = world.create()
    world.publish(made.volume_id)
    with pytest.raises(PreconditionFailed, match="node-1"):
        allow(world, made.volume_id)
    assert not world.publish(made.volume_id).format_allowed


def test_a_volume_that_is_still_being_detached_is_refused() -> None:
    world = World()
    made = world.create()
    world.publish(made.volume_id)
    world.management.detach_s = 100.0
    world.management.detach(
        world.management.clients(deadline=world.deadline())[0],
        world.stored(),
        reference_id=None,
        deadline=world.deadline(),
    )
    with pytest.raises(PreconditionFailed, match="node-1"):
        allow(world, made.volume_id)


def test_allowing_it_twice_is_refused() -> None:
    world = World()
    made = world.create()
    allow(world, made.volume_id)
    with pytest.raises(PreconditionFailed, match="already"):
        allow(world, made.volume_id)


@pytest.mark.parametrize("volume_id", ["nothing", "a:b:c:d:e", ""])
def test_a_volume_that_does_not_exist_is_not_found(volume_id: str) -> None:
    with pytest.raises(VolumeNotFound):
        allow(World(), volume_id)


def test_another_volume_under_the_same_name_is_not_found() -> None:
    world = World()
    made = world.create()
    zone, name, *_ = made.volume_id.split(":")
    with pytest.raises(VolumeNotFound):
        allow(world, f"{zone}:{name}:{UUID}")


def test_a_raw_block_volume_is_refused() -> None:
    world = World()
    with pytest.raises(PreconditionFailed, match="raw block"):
        allow(world, world.create(capabilities=(BLOCK,)).volume_id)


def test_an_attachment_during_allow_format_gets_no_permission_and_fails_the_command() -> None:
    world = World()
    made = world.create()
    other = World(beside=world)

    def slip_in(request: str) -> None:
        if request == "set_metadata":
            world.management.before = lambda request: None
            assert not other.publish(made.volume_id).format_allowed

    world.management.before = slip_in
    with pytest.raises(OperationPending, match="attached"):
        allow(world, made.volume_id)
    assert not world.publish(made.volume_id).format_allowed
    world.unpublish(made.volume_id)
    assert not world.publish(made.volume_id).format_allowed


# --- show -----------------------------------------------------------------------------------------------------


def test_a_new_volume_is_shown_as_one_that_nobody_had() -> None:
    world = World()
    made = world.create(parameters=CLAIM, capacity=CapacityRange(2 << 30))
    told = shown(world, made.volume_id)
    assert (told["handle"], told["held by"], told["usable bytes"]) == (made.volume_id, "no node", str(2 << 30))
    assert "never attached before" in told["formatting"]


def test_a_volume_in_use_is_shown_with_who_holds_it() -> None:
    world = World()
    made = world.create(parameters=CLAIM)
    world.publish(made.volume_id)
    told = shown(world, other_reference(made.volume_id, "elsewhere"))
    assert (told["handle"], told["held by"]) == (made.volume_id, f"node-1 ({NODE_1})")
    assert "every block is zero" in told["formatting"]


def test_a_permission_is_shown_until_it_is_used() -> None:
    world = World()
    made = world.create()
    allow(world, made.volume_id)
    assert "allowed" in shown(world, made.volume_id)["formatting"]
    world.publish(made.volume_id)
    world.unpublish(made.volume_id)
    assert "every block is zero" in shown(world, made.volume_id)["formatting"]
    assert world.stored().reservation.mode is ReservationMode.NONE


def test_a_raw_block_volume_is_shown_as_never_formatted() -> None:
    world = World()
    assert shown(world, world.create(capabilities=(BLOCK,)).volume_id)["formatting"].startswith("never")
