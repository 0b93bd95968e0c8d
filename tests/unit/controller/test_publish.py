"""ControllerPublishVolume and ControllerUnpublishVolume over a storage management in memory."""

from __future__ import annotations

from dataclasses import replace

import pytest

from csi_driver.controller import volume_metadata
from csi_driver.controller.fencing import UnpublishVolume
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
from csi_driver.model import DEFAULT_ZONE, AccessMode, Capability, MountAccess
from csi_driver.publish_context import History
from csi_driver.settings import ControllerSettings
from csi_driver.storage_model import ClientStatus, Reservation, ReservationMode, Volume
from tests.unit.controller.world import (
    BLOCK,
    CLAIM,
    NODE_1,
    NODE_2,
    ROX,
    RWO,
    RWX_BLOCK,
    RWX_MOUNT,
    World,
    other_reference,
)

READER = Capability(MountAccess(), AccessMode.SINGLE_NODE_READER_ONLY)
STATIC = Volume("golden", "99999999-0000-0000-0000-000000000000", 262144, 4096, 1.1, "online", "none")


def made(**settings: object) -> tuple[World, str]:
    world = World(ControllerSettings(**settings))  # type: ignore[arg-type]
    return world, world.create(parameters=CLAIM).volume_id


# --- the good case --------------------------------------------------------------------------------------------


def test_the_context_says_which_device_to_expect() -> None:
    world, volume_id = made()
    context = world.publish(volume_id)
    volume = world.stored()
    assert (context.name, context.uuid, context.size_bytes) == (volume.name, volume.uuid, volume.size_bytes)


@pytest.mark.parametrize("node_id", [NODE_1, "node-1", "node-1.example.com", NODE_1.upper()])
def test_a_node_is_found_by_uuid_id_and_full_name(node_id: str) -> None:
    world, volume_id = made()
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
    world, volume_id = made()
    world.management.add_client(client_id)
    world.publish(volume_id, node_id)
    assert world.holders() == [client_id]


@pytest.mark.parametrize("client_id", ["worker-1", "worker.other.com", "my-worker", "worker_mc", "worker_mc1x"])
def test_another_host_is_not_taken_for_the_node(client_id: str) -> None:
    world, volume_id = made()
    world.management.add_client(client_id)
    with pytest.raises(NodeNotFound):
        world.publish(volume_id, "worker.example.com")


def test_a_node_of_several_clients_is_not_guessed() -> None:
    world, volume_id = made()
    for client_id in ("worker_mc1", "worker_mc2"):
        world.management.add_client(client_id)
    with pytest.raises(PreconditionFailed, match=r"worker_mc1.*worker_mc2.*delete the stale client"):
        world.publish(volume_id, "worker")


def test_a_host_that_was_renamed_is_found_by_its_clients_uuid() -> None:
    world, volume_id = made()
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
    world, volume_id = made()
    context = world.publish(volume_id, capability=capability, read_only=read_only)
    assert world.stored().reservation.mode is mode
    assert context.read_only is (mode is ReservationMode.SHARED_READ_ONLY)


def test_publishing_again_is_the_same() -> None:
    world, volume_id = made()
    assert world.publish(volume_id) == world.publish(volume_id)


def test_a_slow_attachment_is_waited_for() -> None:
    world, volume_id = made()
    world.management.attach_s, world.management.io_s = 5, 5
    before = world.clock.monotonic()
    world.publish(volume_id)
    assert world.clock.monotonic() - before >= 10


def test_the_reference_is_the_last_part_of_the_handle() -> None:
    world, volume_id = made()
    world.publish(volume_id)
    client = world.management.client("node-1", deadline=world.deadline())
    assert client is not None
    assert client.desired[world.stored().uuid].reference_ids == {"team-a"}


def test_two_namespaces_on_one_node_hold_two_references() -> None:
    world, volume_id = made()
    world.publish(volume_id, capability=ROX)
    world.publish(other_reference(volume_id, "team-b"), capability=ROX)
    world.unpublish(volume_id)
    assert world.holders() == ["node-1"]
    world.unpublish(other_reference(volume_id, "team-b"))
    assert world.holders() == []


def test_a_handle_without_reference_gives_up_only_its_own() -> None:
    world, volume_id = made()
    bare = ":".join(volume_id.split(":")[:2])
    world.publish(volume_id, capability=ROX)
    world.publish(bare, capability=ROX)
    world.unpublish(bare)
    assert world.holders() == ["node-1"]


def test_a_writers_volume_becomes_a_readers_volume() -> None:
    world, volume_id = made()
    world.publish(volume_id)
    world.unpublish(volume_id)
    for node_id in (NODE_1, NODE_2):
        world.publish(volume_id, node_id, ROX)
    assert world.holders() == ["node-1", "node-2"]


def test_what_the_oldest_driver_attached_without_a_reference_is_adopted_and_given_up() -> None:
    """Its pods go on after an upgrade: the orchestrator's first publish finds the attachment, its unpublish ends it."""
    world, volume_id = made()
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
    world, volume_id = made()
    with pytest.raises(NodeNotFound):
        world.publish(volume_id, "fake-node-id-1234")


def test_another_mode_on_the_same_node_already_exists() -> None:
    world, volume_id = made()
    world.publish(volume_id)
    with pytest.raises(ExistsDifferently, match="expected shared_read_only, got exclusive_read_write"):
        world.publish(volume_id, read_only=True)


@pytest.mark.parametrize(("first", "second"), [(RWO, RWO), (RWO, ROX), (ROX, RWO), (RWX_BLOCK, ROX), (READER, READER)])
def test_a_volume_held_elsewhere_is_refused_naming_the_holder(first: Capability, second: Capability) -> None:
    world, volume_id = made()
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
    world, volume_id = made()
    world.management.set_status("node-1", ClientStatus.DOWN)
    with pytest.raises(StorageUnavailable, match="down"):
        world.publish(volume_id)
    assert "attach" not in world.management.requests


@pytest.mark.parametrize(
    ("attach_s", "io_s", "missing"),
    [(1000, 0, "the client reports no device"), (1, 1000, "I/O on the attached device")],
)
def test_time_that_runs_out_names_what_is_missing(attach_s: float, io_s: float, missing: str) -> None:
    world, volume_id = made()
    world.management.attach_s, world.management.io_s = attach_s, io_s
    with pytest.raises(DeadlineReached, match=missing):
        world.publish(volume_id)


def test_an_attachment_that_is_taken_away_while_it_is_made_is_not_answered_as_made() -> None:
    world, volume_id = made()

    def detach_after_attach(request: str) -> None:
        if request == "attach":
            client = world.management.client("node-1", deadline=world.deadline())
            assert client is not None
            world.management.detach(client, world.stored(), reference_id=None, deadline=world.deadline())

    world.management.after = detach_after_attach
    with pytest.raises(OperationPending, match="detached"):
        world.publish(volume_id)


def test_an_attachment_waits_until_the_earlier_one_is_gone() -> None:
    world, volume_id = made()
    world.publish(volume_id)
    world.management.detach_s = 20
    with pytest.raises(DeadlineReached):
        world.unpublish(volume_id, seconds=5)
    assert world.publish(volume_id).attachment == 3


# --- history: the decision of a node before it formats --------------------------------------------------------


def test_the_first_attachment_of_a_new_volume_is_the_first() -> None:
    world, volume_id = made()
    context = world.publish(volume_id)
    assert (context.history, context.attachment) == (History.FIRST, 1)


def test_a_retried_call_is_not_another_attachment() -> None:
    world, volume_id = made()
    world.management.attach_s = 40
    with pytest.raises(DeadlineReached):
        world.publish(volume_id)
    context = world.publish(volume_id)
    assert (context.history, context.attachment) == (History.FIRST, 1)


def test_a_count_whose_attachment_never_came_about_is_used_again() -> None:
    world, volume_id = made()

    def fail(request: str) -> None:
        if request == "attach":
            raise StorageUnavailable("lost")

    world.management.before = fail
    for _ in range(3):
        with pytest.raises(StorageUnavailable):
            world.publish(volume_id)
    world.management.before = lambda request: None
    context = world.publish(volume_id, NODE_2)
    assert (context.history, context.attachment) == (History.FIRST, 1)


def test_a_server_that_shows_an_earlier_attachment_of_this_node_is_not_believed() -> None:
    world, volume_id = made()
    world.publish(volume_id)
    before = world.stored()
    metadata = volume_metadata.with_permission(before.metadata, 1)  # the permission for then must not count now
    world.unpublish(volume_id)

    def show_old(request: str) -> None:
        if request == "attach":
            world.management.old_news[before.name] = replace(before, metadata=metadata)

    world.management.after = show_old
    context = world.publish(volume_id)
    assert (context.attachment, context.history, context.format_allowed) == (0, History.ATTACHED, False)
    world.management.old_news.clear()
    assert world.publish(volume_id).attachment == 3


def test_a_volume_that_a_server_shows_as_it_was_all_along_is_not_believed() -> None:
    world, volume_id = made()
    world.publish(volume_id)
    before = world.stored()
    world.unpublish(volume_id)
    world.publish(volume_id)
    world.management.old_news[before.name] = before
    context = world.publish(volume_id)
    assert (context.attachment, context.history) == (0, History.ATTACHED)


def test_a_raw_writer_is_not_forgotten_for_a_server_that_has_not_heard_of_it() -> None:
    world, volume_id = made()
    world.publish(volume_id)
    before = world.stored()
    world.unpublish(volume_id)

    def show_old(request: str) -> None:
        if request == "attach":
            world.management.old_news[before.name] = before

    world.management.after = show_old
    assert world.publish(volume_id, capability=BLOCK).history is History.WRITTEN


@pytest.mark.parametrize("handle", [CLAIM, {}])
def test_what_a_server_has_not_heard_of_is_detached_all_the_same(handle: dict[str, str]) -> None:
    world = World()
    volume_id = world.create(parameters=handle).volume_id
    world.publish(volume_id)
    world.management.unheard_of.add("node-1")
    world.unpublish(volume_id)
    world.management.unheard_of.clear()
    assert world.holders() == []


def test_what_a_server_has_not_heard_of_keeps_the_references_of_others() -> None:
    world, volume_id = made()
    world.publish(volume_id)
    world.publish(other_reference(volume_id, "team-b"))
    world.management.unheard_of.add("node-1")
    world.unpublish(volume_id)
    world.management.unheard_of.clear()
    assert world.holders() == ["node-1"]


def test_the_second_attachment_is_not_the_first() -> None:
    world, volume_id = made()
    world.publish(volume_id)
    world.unpublish(volume_id)
    context = world.publish(volume_id)
    assert (context.history, context.attachment) == (History.ATTACHED, 3)


def test_a_number_never_means_two_attachments() -> None:
    world, volume_id = made()
    numbers = []
    for node_id in (NODE_1, NODE_2, NODE_1):
        numbers.append(world.publish(volume_id, node_id).attachment)
        world.unpublish(volume_id, node_id)
        young = {**world.stored().metadata, "nvmesh-csi": {"format": 1, "created": True}}
        world.management.change(world.stored().name, metadata=young)
    assert numbers == [1, 3, 5]


@pytest.mark.parametrize("use", [RWO, ROX, RWX_BLOCK, BLOCK])
def test_a_refused_attachment_changes_nothing_for_the_holder(use: Capability) -> None:
    world, volume_id = made()
    first = world.publish(volume_id)
    before = world.stored()
    with pytest.raises(PreconditionFailed):
        world.publish(volume_id, NODE_2, use)
    assert world.stored() == before
    assert world.publish(volume_id) == first


def test_those_who_share_a_volume_share_the_number() -> None:
    world, volume_id = made()
    assert [world.publish(volume_id, node_id, RWX_BLOCK).attachment for node_id in (NODE_1, NODE_2, NODE_1)] == [
        1,
        1,
        1,
    ]


def test_a_reservation_that_was_set_back_does_not_make_the_volume_new() -> None:
    world, volume_id = made()
    for _ in range(2):
        world.publish(volume_id)
        world.unpublish(volume_id)
    world.management.change(world.stored().name, reservation=Reservation())
    context = world.publish(volume_id)
    assert (context.history, context.attachment) == (History.ATTACHED, 0)


def test_an_attachment_by_somebody_else_before_ours_shows() -> None:
    world, volume_id = made()
    client = world.management.client("node-2", deadline=world.deadline())
    assert client is not None
    mode = ReservationMode.EXCLUSIVE_READ_WRITE
    world.management.attach(client, world.stored(), mode=mode, reference_id=None, deadline=world.deadline())
    world.management.detach(client, world.stored(), reference_id=None, deadline=world.deadline())
    assert world.publish(volume_id).history is History.ATTACHED


def test_an_attachment_by_somebody_else_between_count_and_attach_shows() -> None:
    world, volume_id = made()
    client = world.management.client("node-2", deadline=world.deadline())
    assert client is not None

    def intrude(request: str) -> None:
        if request == "set_metadata":
            world.management.after = lambda request: None
            mode, deadline = ReservationMode.EXCLUSIVE_READ_WRITE, world.deadline()
            world.management.attach(client, world.stored(), mode=mode, reference_id=None, deadline=deadline)
            world.management.detach(client, world.stored(), reference_id=None, deadline=deadline)

    world.management.after = intrude
    context = world.publish(volume_id)
    assert (context.history, context.attachment) == (History.ATTACHED, 0)


def test_a_record_set_back_to_an_older_state_does_not_make_the_volume_new() -> None:
    world, volume_id = made()
    young = world.stored().metadata
    world.publish(volume_id)
    world.unpublish(volume_id)
    world.management.change(world.stored().name, metadata=young)
    assert world.publish(volume_id).history is History.ATTACHED


def test_a_volume_that_was_a_raw_device_counts_as_written() -> None:
    world, volume_id = made()
    world.publish(volume_id, capability=BLOCK)
    assert world.publish(volume_id, capability=RWO).history is History.WRITTEN


def test_a_raw_device_on_an_attachment_that_was_counted_for_mounting_is_recorded() -> None:
    world, volume_id = made()
    world.publish(volume_id, capability=RWO)
    world.publish(volume_id, capability=BLOCK)
    assert world.publish(volume_id, capability=RWO).history is History.WRITTEN


def test_a_volume_that_is_not_ours_has_an_unknown_history() -> None:
    world = World()
    world.management.add_volume(STATIC)
    assert world.publish("golden").history is History.UNKNOWN


@pytest.mark.parametrize(
    "damage", ["x", {"number": "1"}, {"number": 1, "clients": {"a": "1"}, "written": False, "broken": False}]
)
def test_a_damaged_record_proves_nothing(damage: object) -> None:
    world, volume_id = made()
    volume = world.stored()
    own = volume.metadata["nvmesh-csi"]
    assert isinstance(own, dict)
    world.management.change(volume.name, metadata={**volume.metadata, "nvmesh-csi": {**own, "attachments": damage}})
    for _ in range(2):
        assert world.publish(volume_id).history is not History.FIRST
        world.unpublish(volume_id)


def test_publishing_changes_nothing_else_in_the_metadata() -> None:
    world, volume_id = made()
    world.management.change(world.stored().name, metadata={**world.stored().metadata, "owner": {"team": "x"}})
    before = dict(world.stored().metadata)
    world.publish(volume_id)
    after = dict(world.stored().metadata)
    assert {k: v for k, v in after.items() if k != "nvmesh-csi"} == {
        k: v for k, v in before.items() if k != "nvmesh-csi"
    }


# --- unpublish ------------------------------------------------------------------------------------------------


def test_the_device_is_gone_when_unpublish_answers() -> None:
    world, volume_id = made()
    world.management.detach_s = 20
    world.publish(volume_id)
    world.unpublish(volume_id)
    assert world.holders() == []
    assert world.stored().reservation.mode is ReservationMode.NONE


@pytest.mark.parametrize("volume_id", ["none", "", "single-zone-cluster:none"])
def test_unpublishing_an_unknown_volume_succeeds(volume_id: str) -> None:
    World().unpublish(volume_id)


def test_unpublishing_from_an_unknown_node_succeeds() -> None:
    world, volume_id = made()
    world.unpublish(volume_id, "nobody")


def test_unpublishing_twice_succeeds() -> None:
    world, volume_id = made()
    world.publish(volume_id)
    world.unpublish(volume_id)
    world.unpublish(volume_id)


def test_no_node_means_all_nodes() -> None:
    world, volume_id = made()
    for node_id in (NODE_1, NODE_2):
        world.publish(volume_id, node_id, ROX)
    world.unpublish(volume_id, "")
    assert world.holders() == []


def test_another_volume_under_the_same_name_is_left_alone() -> None:
    world, volume_id = made()
    world.publish(volume_id)
    world.unpublish(volume_id.replace(world.stored().uuid, "00000000-0000-0000-0000-000000000000"))
    assert world.holders() == ["node-1"]


def test_an_open_device_stays_attached_and_the_error_names_how_to_find_the_program() -> None:
    world, volume_id = made()
    world.publish(volume_id)
    world.management.set_busy("node-1", world.stored())
    name = world.stored().name
    with pytest.raises(
        DeadlineReached,
        match=f"a program on that node may have it open: .*/volumes/{name}/client_processes and `fuser .*/{name}`",
    ):
        world.unpublish(volume_id, seconds=5)
    client = world.management.client("node-1", deadline=world.deadline())
    assert client is not None
    assert client.desired[world.stored().uuid].is_detaching
    world.management.set_busy("node-1", world.stored(), busy=False)
    world.unpublish(volume_id)
    assert world.holders() == []


def test_a_detachment_that_takes_long_says_that_the_volume_is_degraded() -> None:
    world, volume_id = made()
    world.publish(volume_id)
    world.management.set_busy("node-1", world.stored())
    world.management._volumes[world.stored().name] = replace(world.stored(), status="degraded")
    with pytest.raises(DeadlineReached, match="device attached, and the volume is degraded in the storage management"):
        world.unpublish(volume_id, seconds=5)


def test_a_volume_that_is_being_detached_is_not_attached_again_to_force_it() -> None:
    """Force applies to the last reference; another attachment would give the device back to the node."""
    world, volume_id = made()
    world.publish(volume_id)
    world.management.set_busy("node-1", world.stored())
    with pytest.raises(DeadlineReached):
        world.unpublish(volume_id, seconds=5)
    by_force = UnpublishVolume(world.clusters, replace(world.settings, force_detach=True))
    with pytest.raises(DeadlineReached, match="may have it open"):
        by_force.unpublish(volume_id, NODE_1, deadline=world.deadline(5))
    assert world.management.requests.count("attach") == 1
    assert world.holders() == ["node-1"]


def test_a_detachment_that_overtakes_the_attachment_leaves_a_device_that_is_waited_for() -> None:
    """The management forgets an attachment at once if no device was reported, while its message is under way."""
    world, volume_id = made()
    world.management.attach_s, world.management.detach_s = 40.0, 3.0
    with pytest.raises(DeadlineReached, match="the client reports no device"):
        world.publish(volume_id)
    world.unpublish(volume_id)
    world.clock.sleep(20)
    assert world.holders() == ["node-1"]
    with pytest.raises(PreconditionFailed, match="still attached to node-1"):
        world.delete(volume_id)
    world.management.attach_s = 0.0
    world.publish(volume_id)
    assert world.holders() == ["node-1"]
    world.unpublish(volume_id)
    world.delete(volume_id)
    assert world.management.all_volumes() == []


def test_while_a_clients_reports_stay_unread_an_attachment_is_awaited_and_not_made_again() -> None:
    world, volume_id = made()
    world.management.unread.add("node-1")
    with pytest.raises(DeadlineReached, match="the client reports no device"):
        world.publish(volume_id)
    world.management.unread.clear()
    world.management.set_status("node-1", ClientStatus.READY)
    world.publish(volume_id)
    assert world.management.requests.count("attach") == 1


def test_a_snapshot_is_refused_by_its_name_before_anything_is_written() -> None:
    world, volume_id = made()
    world.management.change(world.stored().name, is_snapshot=True)
    with pytest.raises(PreconditionFailed, match="is a snapshot, which the storage client of a node cannot attach"):
        world.publish(volume_id)
    assert "set_metadata" not in world.management.requests


def test_forced_detachment_reaches_the_storage() -> None:
    world, volume_id = made(force_detach=True)
    world.publish(volume_id)
    world.management.set_busy("node-1", world.stored())
    world.unpublish(volume_id)
    assert world.holders() == []


def test_for_a_node_that_is_down_the_wish_is_recorded() -> None:
    world, volume_id = made()
    world.publish(volume_id)
    world.management.set_status("node-1", ClientStatus.DOWN)
    world.unpublish(volume_id)
    client = world.management.client("node-1", deadline=world.deadline())
    assert client is not None
    assert client.desired[world.stored().uuid].is_detaching


def test_a_node_whose_client_is_deleted_meanwhile_is_done_with() -> None:
    world, volume_id = made()
    world.publish(volume_id)
    world.management.detach_s = 1000
    world.management.after = lambda r: world.management.remove_client("node-1") if r == "detach" else None
    world.unpublish(volume_id)


def test_a_volume_of_an_unknown_zone_is_not_attached_to_a_node_of_a_known_one() -> None:
    """A storage client belongs to one cluster: the PersistentVolume names a wrong zone, and must be able to go."""
    world, volume_id = made()
    world.unpublish(volume_id.replace(DEFAULT_ZONE, "mars"))
    world.unpublish("mars:csi-1")


def test_a_zone_that_is_served_under_another_name_is_not_declared_detached() -> None:
    world, volume_id = made()
    world.publish(volume_id)
    for handle in (volume_id.replace(DEFAULT_ZONE, "mars"), f"mars:{world.stored().name}"):
        with pytest.raises(PreconditionFailed, match="has a volume of that name attached in zone single"):
            world.unpublish(handle)
    world.management.detach_s = 100.0
    with pytest.raises(DeadlineReached):
        world.unpublish(volume_id, seconds=5)
    with pytest.raises(PreconditionFailed, match="mars"):  # it is being detached, and not yet gone
        world.unpublish(volume_id.replace(DEFAULT_ZONE, "mars"))
    assert world.holders() == ["node-1"]


def test_a_device_without_a_name_may_be_of_a_zone_that_is_not_served() -> None:
    world, volume_id = made()
    world.publish(volume_id)
    volume = world.stored()
    client = world.management._clients["node-1"]
    client.devices[volume.uuid] = replace(client.devices[volume.uuid], volume_name="")
    del client.desired[volume.uuid]
    for handle in (volume_id.replace(DEFAULT_ZONE, "mars"), f"mars:{volume.name}"):
        with pytest.raises(PreconditionFailed, match="mars"):
            world.unpublish(handle)
    world.unpublish(f"mars:{volume.name}:00000000-0000-0000-0000-000000000000")


@pytest.mark.parametrize("node_id", ["node-of-mars", "node-1", "12345678-0000-0000-0000-000000000000", ""])
def test_a_volume_of_an_unserved_zone_stays_attached_to_an_unknown_node(node_id: str) -> None:
    with pytest.raises(PreconditionFailed, match=r"mars.*remove the finalizer of the VolumeAttachment"):
        World().unpublish("mars:csi-1", node_id)


def test_a_zone_that_does_not_answer_may_know_the_node_of_a_volume_in_an_unknown_zone() -> None:
    world = World(zones=("a", "b"))
    world.zones["b"].is_reachable = False
    with pytest.raises(StorageUnavailable):
        world.unpublish("mars:csi-1")


@pytest.mark.parametrize(("first", "second"), [(RWO, BLOCK), (BLOCK, RWO)], ids=["filesystem first", "block first"])
def test_an_attachment_serves_raw_block_and_filesystem_and_its_volume_counts_as_written(
    first: Capability, second: Capability
) -> None:
    """See docs/decisions/0006-access-modes.md: the node gets the same device in both modes."""
    world, volume_id = made()
    number = world.publish(volume_id, capability=first).attachment
    again = world.publish(volume_id, capability=second)
    assert (again.attachment, again.history) == (number, History.WRITTEN)
    assert world.management.requests.count("attach") == 1
    world.unpublish(volume_id)
    assert world.publish(volume_id, capability=RWO).history is History.WRITTEN
