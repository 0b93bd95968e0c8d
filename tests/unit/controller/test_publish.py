# SPDX-License-Identifier: Apache-2.0
"""ControllerPublishVolume over a storage management in memory."""

from __future__ import annotations

from dataclasses import replace

import pytest

from csi_driver.errors import (
    DeadlineReached,
    Exhausted,
    ExistsDifferently,
    InvalidRequest,
    NodeNotFound,
    OperationPending,
    PreconditionFailed,
    ReservationConflict,
    StorageUnavailable,
    VolumeNotFound,
)
from csi_driver.model import AccessMode, Capability, MountAccess
from csi_driver.publish_context import History
from csi_driver.settings import ControllerSettings
from csi_driver.storage_model import ClientStatus, ReservationMode, Volume
from tests.unit.controller.world import NODE_1, NODE_2, ROX, RWO, RWX_BLOCK, RWX_MOUNT, World, created, other_reference

READER = Capability(MountAccess(), AccessMode.SINGLE_NODE_READER_ONLY)
STATIC = Volume("golden", "99999999-0000-0000-0000-000000000000", 262144, 4096, 1.1, "online", "none")


# --- the good case --------------------------------------------------------------------------------------------


def test_the_context_says_which_device_to_expect() -> None:
    world, volume_id = created()
    context = world.publish(volume_id)
    volume = world.stored()
    assert (context.name, context.uuid, context.size_bytes) == (volume.name, volume.uuid, volume.size_bytes)


@pytest.mark.parametrize("node_id", [NODE_1, "node-1", "node-1.example.com", NODE_1.upper()])
def test_a_node_is_found_by_uuid_id_and_full_name(node_id: str) -> None:
    world, volume_id = created()
    world.publish(volume_id, node_id)
    assert world.holders() == ["node-1"]


@pytest.mark.parametrize(
    ("client_id", "node_id"),
    [
        ("worker.example.com", "worker"),
        ("worker", "worker.example.com"),
        ("Worker", "worker"),
        ("worker_mc1", "worker"),
        ("worker_2", "worker.example.com"),
        ("worker.example.com_mc1", "worker.example.com"),
    ],
)
def test_a_node_is_found_whichever_of_its_names_the_client_has(client_id: str, node_id: str) -> None:
    world, volume_id = created()
    world.management.add_client(client_id)
    world.publish(volume_id, node_id)
    assert world.holders() == [client_id]


@pytest.mark.parametrize("client_id", ["worker-1", "worker.other.com", "my-worker", "worker_mc", "worker_mc1x"])
def test_another_host_is_not_taken_for_the_node(client_id: str) -> None:
    world, volume_id = created()
    world.management.add_client(client_id)
    with pytest.raises(NodeNotFound):
        world.publish(volume_id, "worker.example.com")


def test_a_node_of_several_clients_is_not_guessed() -> None:
    world, volume_id = created()
    for client_id in ("worker_mc1", "worker_mc2"):
        world.management.add_client(client_id)
    with pytest.raises(PreconditionFailed, match=r"worker_mc1.*worker_mc2.*delete the stale client"):
        world.publish(volume_id, "worker")


def test_a_host_that_was_renamed_is_found_by_its_clients_uuid() -> None:
    world, volume_id = created()
    world.publish(volume_id)
    world.management.rename_client("node-1", "elsewhere")
    world.publish(volume_id)
    assert world.holders() == ["elsewhere"]
    world.unpublish(volume_id)
    assert world.holders() == []


@pytest.mark.parametrize(
    ("capability", "read_only", "mode"),
    [
        (RWO, False, ReservationMode.EXCLUSIVE_READ_WRITE),
        (RWO, True, ReservationMode.SHARED_READ_ONLY),
        (ROX, False, ReservationMode.SHARED_READ_ONLY),
        (READER, False, ReservationMode.SHARED_READ_ONLY),
        (RWX_BLOCK, False, ReservationMode.SHARED_READ_WRITE),
    ],
)
def test_the_capability_decides_the_reservation(capability: Capability, read_only: bool, mode: ReservationMode) -> None:
    world, volume_id = created()
    context = world.publish(volume_id, capability=capability, read_only=read_only)
    assert world.stored().reservation.mode is mode
    assert context.read_only is (mode is ReservationMode.SHARED_READ_ONLY)


def test_publishing_again_is_the_same() -> None:
    world, volume_id = created()
    assert world.publish(volume_id) == world.publish(volume_id)


def test_a_slow_attachment_is_waited_for() -> None:
    world, volume_id = created()
    world.management.attach_s, world.management.io_s = 5, 5
    before = world.clock.monotonic()
    world.publish(volume_id)
    assert world.clock.monotonic() - before >= 10


def test_the_reference_is_the_last_part_of_the_handle() -> None:
    world, volume_id = created()
    world.publish(volume_id)
    client = world.management.client("node-1", deadline=world.deadline())
    assert client is not None
    assert client.desired[world.stored().uuid].reference_ids == {"team-a"}


def test_two_namespaces_on_one_node_hold_two_references() -> None:
    world, volume_id = created()
    world.publish(volume_id, capability=ROX)
    world.publish(other_reference(volume_id, "team-b"), capability=ROX)
    world.unpublish(volume_id)
    assert world.holders() == ["node-1"]
    world.unpublish(other_reference(volume_id, "team-b"))
    assert world.holders() == []


def test_a_handle_without_reference_gives_up_only_its_own() -> None:
    world, volume_id = created()
    bare = ":".join(volume_id.split(":")[:2])
    world.publish(volume_id, capability=ROX)
    world.publish(bare, capability=ROX)
    world.unpublish(bare)
    assert world.holders() == ["node-1"]


def test_a_writers_volume_becomes_a_readers_volume() -> None:
    world, volume_id = created()
    world.publish(volume_id)
    world.unpublish(volume_id)
    for node_id in (NODE_1, NODE_2):
        world.publish(volume_id, node_id, ROX)
    assert world.holders() == ["node-1", "node-2"]


def test_what_the_oldest_driver_attached_without_a_reference_is_adopted_and_given_up() -> None:
    """Its pods go on after an upgrade: the orchestrator's first publish finds the attachment, its unpublish ends it."""
    world, volume_id = created()
    bare = ":".join(volume_id.split(":")[:2])
    client = world.management.client("node-1", deadline=world.deadline())
    assert client is not None
    mode = ReservationMode.EXCLUSIVE_READ_WRITE
    world.management.attach(client, world.stored(), mode=mode, reference_id=None, deadline=world.deadline())
    version = world.stored().reservation.version
    context = world.publish(bare)
    assert (context.attachment, context.history is History.FIRST) == (0, False)
    assert world.stored().reservation.version == version
    world.unpublish(bare)
    assert world.holders() == []


# --- refusals, in the order of the specification --------------------------------------------------------------


def test_an_impossible_capability_is_invalid_before_anything_is_asked() -> None:
    world = World()
    with pytest.raises(InvalidRequest):
        world.publish("none", "none", RWX_MOUNT)
    assert world.management.requests == []


@pytest.mark.parametrize("volume_id", ["none", "", "a/b", "mars:csi-1", "single-zone-cluster:none"])
def test_an_unknown_volume_is_not_found(volume_id: str) -> None:
    with pytest.raises(VolumeNotFound):
        World().publish(volume_id)


def test_an_unknown_node_is_not_found() -> None:
    world, volume_id = created()
    with pytest.raises(NodeNotFound):
        world.publish(volume_id, "fake-node-id-1234")


def test_another_mode_on_the_same_node_already_exists() -> None:
    world, volume_id = created()
    world.publish(volume_id)
    with pytest.raises(ExistsDifferently, match="expected shared_read_only, got exclusive_read_write"):
        world.publish(volume_id, read_only=True)


@pytest.mark.parametrize(("first", "second"), [(RWO, RWO), (RWO, ROX), (ROX, RWO), (RWX_BLOCK, ROX), (READER, READER)])
def test_a_volume_held_elsewhere_is_refused_naming_the_holder(first: Capability, second: Capability) -> None:
    world, volume_id = created()
    world.publish(volume_id, NODE_1, first)
    with pytest.raises(PreconditionFailed, match=NODE_1):
        world.publish(volume_id, NODE_2, second)
    assert world.holders() == ["node-1"]


def test_a_volume_that_is_only_readable_is_not_attached_for_writing() -> None:
    world = World()
    world.management.add_volume(replace(STATIC, is_read_only=True))
    with pytest.raises(ReservationConflict):
        world.publish("golden")


def test_the_limit_of_a_node_is_kept() -> None:
    world = World(ControllerSettings(max_volumes_per_node=2))
    ids = [world.create(f"v{number}").volume_id for number in range(3)]
    for volume_id in ids[:2]:
        world.publish(volume_id)
    with pytest.raises(Exhausted, match="limit of 2"):
        world.publish(ids[2])


def test_a_full_node_still_answers_for_what_it_has() -> None:
    world = World(ControllerSettings(max_volumes_per_node=1))
    volume_id = world.create().volume_id
    assert world.publish(volume_id) == world.publish(volume_id)


def test_a_node_that_is_down_gets_nothing_new() -> None:
    world, volume_id = created()
    world.management.set_status("node-1", ClientStatus.DOWN)
    with pytest.raises(StorageUnavailable, match="down"):
        world.publish(volume_id)
    assert "attach" not in world.management.requests


@pytest.mark.parametrize(
    ("attach_s", "io_s", "missing"),
    [(1000, 0, "the client reports no device"), (1, 1000, "I/O on the attached device")],
)
def test_time_that_runs_out_names_what_is_missing(attach_s: float, io_s: float, missing: str) -> None:
    world, volume_id = created()
    world.management.attach_s, world.management.io_s = attach_s, io_s
    with pytest.raises(DeadlineReached, match=missing):
        world.publish(volume_id)


def test_an_attachment_that_is_taken_away_while_it_is_made_is_not_answered_as_made() -> None:
    world, volume_id = created()

    def detach_after_attach(request: str) -> None:
        if request == "attach":
            client = world.management.client("node-1", deadline=world.deadline())
            assert client is not None
            world.management.detach(client, world.stored(), reference_id=None, deadline=world.deadline())

    world.management.after = detach_after_attach
    with pytest.raises(OperationPending, match="detached"):
        world.publish(volume_id)


def test_an_attachment_waits_until_the_earlier_one_is_gone() -> None:
    world, volume_id = created()
    world.publish(volume_id)
    world.management.detach_s = 20
    with pytest.raises(DeadlineReached):
        world.unpublish(volume_id, seconds=5)
    assert world.publish(volume_id).attachment == 3
