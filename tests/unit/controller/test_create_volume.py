# SPDX-License-Identifier: Apache-2.0
"""CreateVolume and DeleteVolume over a storage management in memory."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest

from csi_driver.controller.ports import TopologyRequirement
from csi_driver.errors import (
    CapacityOutOfRange,
    DeadlineReached,
    Exhausted,
    ExistsDifferently,
    InvalidRequest,
    OperationPending,
    PreconditionFailed,
    StorageUnavailable,
)
from csi_driver.model import (
    DEFAULT_TOPOLOGY_KEY,
    DEFAULT_ZONE,
    GIB,
    Capability,
    CapacityRange,
    MountAccess,
    VolumeHandle,
    volume_name,
)
from csi_driver.storage_model import Layout, RaidLevel, Volume, Vpg
from tests.unit.controller.world import (
    BLOCK,
    CLAIM,
    NODE_1,
    PVC,
    ROX,
    RWO,
    RWX_BLOCK,
    RWX_MOUNT,
    World,
    other_reference,
)

KEY = DEFAULT_TOPOLOGY_KEY
EC_GROUP = Vpg("gold", Layout(RaidLevel.STRIPED_ERASURE_CODED, stripe_width=2, data_blocks=8, parity_blocks=2), 0, True)


def old_volume(name: str = PVC, *, size_bytes: int = GIB, **metadata: object) -> Volume:
    """Return a volume as the older drivers made it."""
    recorded = {
        "csi_name": name,
        "fsType": "xfs",
        "volumeMode": "mount",
        "zone": "single-zone-cluster",
        "csi-storage-k8s-io/pvc/namespace": "team-a",
        **metadata,
    }
    uuid = "11111111-2222-3333-4444-555555555555"
    short = volume_name(name)
    return Volume(short, uuid, size_bytes // 4096, 4096, size_bytes / 1e9, "online", "none", metadata=recorded)


# --- the good case --------------------------------------------------------------------------------------------


def test_a_volume_is_made_as_large_as_asked() -> None:
    world = World()
    answer = world.create(capacity=CapacityRange(10 * GIB, 10 * GIB))
    assert answer.capacity_bytes == 10 * GIB == world.stored().size_bytes


def test_a_volume_is_made_with_two_requests() -> None:
    world = World()
    world.create()
    assert world.management.requests == ["create_volume", "volume"]


def test_the_handle_names_zone_volume_uuid_and_namespace_of_the_claim() -> None:
    world = World()
    answer = world.create(parameters=CLAIM)
    assert answer.volume_id == f"single-zone-cluster:csi-01234567-89ab-cdef:{world.stored().uuid}:team-a"


def test_a_handle_without_namespace_has_three_parts() -> None:
    assert len(World().create().volume_id.split(":")) == 3


def test_a_namespace_that_makes_the_handle_too_long_is_left_out() -> None:
    zone = "z" * 50
    world = World(zones=(zone,))
    answer = world.create(parameters={**CLAIM, "csi.storage.k8s.io/pvc/namespace": "n" * 63})
    assert answer.volume_id == f"{zone}:{world.stored().name}:{world.stored().uuid}"
    world.delete(answer.volume_id)
    assert world.management.all_volumes() == []


def test_the_answer_names_the_zone_as_topology() -> None:
    assert World().create().topology == ({KEY: "single-zone-cluster"},)


def test_the_context_carries_what_the_node_needs() -> None:
    answer = World().create(parameters={"fsType": "xfs", "mkfsOptions": "-K -m reflink=0"})
    assert answer.context == {"zone": "single-zone-cluster", "fsType": "xfs", "mkfsOptions": "-K -m reflink=0"}


def test_the_context_carries_each_option_of_mkfs_under_its_own_key() -> None:
    options = {
        "mkfs/blockSize": "4096",
        "mkfs/inodeSize": "512",
        "mkfs/bytesPerInode": "65536",
        "mkfs/reservedBlocksPercent": "0",
        "mkfs/stripeGeometry": "true",
        "mkfs/discard": "false",
    }
    assert World().create(parameters=options).context == {"zone": "single-zone-cluster", "fsType": "ext4", **options}


def test_a_block_volume_has_no_filesystem_in_its_context() -> None:
    assert World().create(capabilities=(BLOCK,)).context == {"zone": "single-zone-cluster"}


def test_the_metadata_keeps_the_keys_of_earlier_drivers() -> None:
    world = World()
    world.create(parameters=CLAIM)
    metadata = world.stored().metadata
    assert metadata["csi_name"] == PVC
    assert (metadata["fsType"], metadata["volumeMode"], metadata["zone"]) == ("ext4", "mount", "single-zone-cluster")
    assert metadata["csi-storage-k8s-io/pvc/name"] == "claim"


def test_no_metadata_key_has_a_dot_or_a_leading_dollar() -> None:
    world = World()
    world.create(parameters={**CLAIM, "raidLevel": "raid10", "mkfsOptions": "-K"})
    world.publish(world.create(parameters={**CLAIM, "raidLevel": "raid10", "mkfsOptions": "-K"}).volume_id)

    def keys(value: object) -> list[str]:
        return [k for key, inner in value.items() for k in [key, *keys(inner)]] if isinstance(value, dict) else []

    found = keys(json.loads(json.dumps(world.stored().metadata)))
    assert [key for key in found if "." in key or key.startswith("$")] == []


def test_a_name_of_128_unicode_characters_is_accepted() -> None:
    world = World()
    world.create("ü" * 128)
    assert len(world.stored().name) == 22


def test_a_group_for_the_metadata_of_snapshots_is_refused() -> None:
    """The management makes a volume without a uuid in it, and never deletes that one."""
    world = World()
    world.management.add_vpg(replace(EC_GROUP, is_for_metadata=True))
    with pytest.raises(InvalidRequest, match="METADATA_VOLUME"):
        world.create(parameters={"vpg": EC_GROUP.name})
    assert "create_volume" not in world.management.requests


def test_a_provisioning_group_gives_the_layout_that_sizes_the_volume() -> None:
    world = World()
    world.management.add_vpg(EC_GROUP)
    answer = world.create(capacity=CapacityRange(GIB), parameters={"vpg": "gold"})
    assert answer.capacity_bytes == GIB
    assert world.stored().vpg == "gold"


def test_an_unknown_provisioning_group_is_invalid() -> None:
    with pytest.raises(InvalidRequest, match="gold"):
        World().create(parameters={"vpg": "gold"})


def test_what_a_group_decides_is_ignored_with_a_warning(caplog: pytest.LogCaptureFixture) -> None:
    world = World()
    world.management.add_vpg(EC_GROUP)
    world.create(parameters={"vpg": "gold", "raidLevel": "raid1"})
    assert world.stored().layout == EC_GROUP.layout
    assert [record.levelname for record in caplog.records if "raidLevel is ignored" in record.message] == ["WARNING"]


def test_a_group_whose_space_is_being_reclaimed_is_pending() -> None:
    world = World()
    world.management.add_vpg(EC_GROUP)
    world.management.reclaiming.add("gold")
    with pytest.raises(OperationPending):
        world.create(parameters={"vpg": "gold"})
    world.management.reclaiming.clear()
    world.create(parameters={"vpg": "gold"})


# --- retries -------------------------------------------------------------------------------------------------


def test_the_same_call_again_gives_the_same_answer() -> None:
    world = World()
    world.management.add_vpg(EC_GROUP)
    parameters = {**CLAIM, "vpg": "gold"}
    assert world.create(parameters=parameters) == world.create(parameters=parameters)
    assert len(world.management.all_volumes()) == 1


def test_a_volume_that_grew_is_still_the_answer_to_its_own_request() -> None:
    world = World()
    asked = CapacityRange(GIB, GIB)
    made = world.create(capacity=asked)
    world.expand.expand(made.volume_id, CapacityRange(2 * GIB), None, deadline=world.deadline())
    assert world.create(capacity=asked).capacity_bytes == 2 * GIB


def test_another_range_that_the_volume_fits_is_the_same_volume() -> None:
    world = World()
    made = world.create(capacity=CapacityRange(2 * GIB))
    assert world.create(capacity=CapacityRange(GIB, 3 * GIB)) == made


def test_the_handle_of_a_repeated_call_comes_from_the_metadata() -> None:
    world = World()
    made = world.create(parameters=CLAIM)
    again = world.create(parameters={**CLAIM, "csi.storage.k8s.io/pvc/namespace": "team-b"})
    assert again.volume_id == made.volume_id


def test_a_group_that_went_after_the_volume_was_made_does_not_hide_the_volume() -> None:
    world = World()
    world.management.add_vpg(EC_GROUP)
    made = world.create(parameters={"vpg": "gold"})
    world.management.remove_vpg("gold")
    assert world.create(parameters={"vpg": "gold"}) == made


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"capacity": CapacityRange(2 * GIB, 2 * GIB)}, "size: expected at least 2147483648 bytes, got 1073741824"),
        ({"capacity": CapacityRange(0, 1_050_000_000)}, "expected at most"),
        ({"capabilities": (BLOCK,)}, "access type: expected raw block, got filesystem"),
        ({"capabilities": (ROX,)}, "access modes: expected MULTI_NODE_READER_ONLY, got SINGLE_NODE_WRITER"),
        ({"capabilities": (replace(RWO, access=MountAccess("xfs")),)}, "filesystem: expected 'xfs', got 'ext4'"),
        ({"parameters": {"raidLevel": "raid0"}}, "parameter raidLevel: expected 'raid0', got 'raid1'"),
        ({"parameters": {}}, "parameter raidLevel: expected not set, got 'raid1'"),
    ],
)
def test_another_wish_under_the_same_name_is_refused_with_the_difference(change: dict[str, object], said: str) -> None:
    world = World()
    first: dict[str, object] = {"capacity": CapacityRange(GIB), "parameters": {"raidLevel": "raid1"}}
    world.create(**first)  # type: ignore[arg-type]
    with pytest.raises(ExistsDifferently, match=said):
        world.create(**{**first, **change})  # type: ignore[arg-type]


def test_every_difference_is_named() -> None:
    world = World()
    world.create()
    with pytest.raises(ExistsDifferently) as caught:
        world.create(capacity=CapacityRange(3 * GIB), capabilities=(BLOCK,), parameters={"raidLevel": "raid1"})
    assert len(caught.value.differences) == 3


def test_two_csi_names_behind_one_short_name_never_share_a_volume() -> None:
    world = World()
    world.create(PVC)
    with pytest.raises(ExistsDifferently, match="CSI name"):
        world.create(PVC[:-1] + "0")
    assert world.stored().metadata["csi_name"] == PVC


def test_a_foreign_volume_under_the_short_name_is_not_taken_over() -> None:
    world = World()
    world.management.add_volume(replace(old_volume(), metadata={}))
    with pytest.raises(ExistsDifferently, match=r"CSI name: expected .*, got none"):
        world.create()


def test_a_volume_being_deleted_is_waited_for() -> None:
    world = World()
    world.create()
    world.management.change(world.stored().name, action="markedForDeletion")
    with pytest.raises(OperationPending):
        world.create()


# --- across the upgrade ---------------------------------------------------------------------------------------


def test_a_volume_of_an_older_driver_answers_a_repeated_call() -> None:
    world = World()
    world.management.add_volume(old_volume())
    answer = world.create(capabilities=(replace(RWO, access=MountAccess("xfs")),), parameters=CLAIM)
    assert answer.volume_id.startswith("single-zone-cluster:csi-01234567-89ab-cdef:11111111")
    assert len(world.management.all_volumes()) == 1


def test_a_volume_of_an_older_driver_with_another_filesystem_is_refused() -> None:
    world = World()
    world.management.add_volume(old_volume())
    with pytest.raises(ExistsDifferently, match="filesystem: expected 'ext4', got 'xfs'"):
        world.create(parameters=CLAIM)


def test_a_parameter_that_an_older_driver_recorded_is_compared() -> None:
    world = World()
    world.management.add_volume(old_volume(fsType="ext4", raidLevel="raid1"))
    with pytest.raises(ExistsDifferently, match="raidLevel"):
        world.create(parameters={"raidLevel": "raid0"})


def test_what_an_older_driver_lost_to_rounding_is_added() -> None:
    world = World()
    world.management.add_volume(old_volume(fsType="ext4", size_bytes=GIB - (1 << 20)))
    assert world.create(capacity=CapacityRange(GIB)).capacity_bytes == GIB


def test_a_volume_of_an_older_driver_that_is_much_smaller_is_refused() -> None:
    world = World()
    world.management.add_volume(old_volume(fsType="ext4"))
    with pytest.raises(ExistsDifferently, match="expected at least"):
        world.create(capacity=CapacityRange(2 * GIB))


# --- waiting and refusing -------------------------------------------------------------------------------------


def test_a_slow_volume_is_waited_for() -> None:
    world = World()
    world.management.make_s = 20
    world.create()
    assert not world.stored().is_being_made


def test_the_wait_ends_before_the_caller_gives_up_and_says_for_what() -> None:
    world = World()
    world.management.make_s = 100
    before = world.clock.monotonic()
    with pytest.raises(DeadlineReached, match="action initializing"):
        world.create(seconds=10)
    assert 8 < world.clock.monotonic() - before < 10


def test_a_wait_that_ran_out_is_gone_on_with_by_the_same_call() -> None:
    world = World()
    world.management.make_s = 15
    with pytest.raises(DeadlineReached):
        world.create(seconds=10)
    world.create(seconds=10)
    assert len(world.management.all_volumes()) == 1


def test_a_full_pool_is_exhausted() -> None:
    world = World()
    world.management.raw_bytes = GIB
    with pytest.raises(Exhausted, match=r"a volume of 2147483648 bytes \(Concatenated\): [^;]*$"):
        world.create(capacity=CapacityRange(2 * GIB))


def test_a_refusal_for_lack_of_space_names_what_may_not_exist() -> None:
    world = World()
    world.management.raw_bytes = GIB
    limits = {"raidLevel": "raid1", "limitByDisks": "d1,d2", "limitByNodes": "t1", "domain": "rack"}
    names = "check limitByDisks 'd1', 'd2' and limitByNodes 't1' and domain 'rack'"
    with pytest.raises(Exhausted, match=names):
        world.create(parameters=limits)


def test_a_size_that_does_not_exist_is_out_of_range_and_nothing_is_made() -> None:
    world = World()
    with pytest.raises(CapacityOutOfRange):
        world.create(capacity=CapacityRange(GIB + 1, GIB + 2))
    assert world.management.requests == ["volume"]


@pytest.mark.parametrize(
    "capabilities", [(RWX_MOUNT,), (RWO, BLOCK), (Capability(MountAccess("ntfs"), RWO.mode),), (RWO, RWX_MOUNT)]
)
def test_impossible_capabilities_are_invalid_without_a_request(capabilities: tuple[Capability, ...]) -> None:
    world = World()
    with pytest.raises(InvalidRequest):
        world.create(capabilities=capabilities)
    assert world.management.requests == []


def test_raw_block_for_several_writers_is_allowed() -> None:
    World().create(capabilities=(RWX_BLOCK,))


# --- zones ----------------------------------------------------------------------------------------------------


def topology(*zones: str, preferred: tuple[str, ...] = ()) -> TopologyRequirement:
    return TopologyRequirement(tuple({KEY: z} for z in zones), tuple({KEY: z} for z in preferred))


@pytest.mark.parametrize(
    ("requisite", "named"),
    [
        ({KEY: "mars"}, "'mars'"),
        ({"topology.kubernetes.io/zone": "eu-1a"}, f"'topology.kubernetes.io/zone=eu-1a' without {KEY}"),
        ({}, "no topology segment"),
    ],
)
def test_a_zone_that_is_not_served_is_exhausted_and_both_sides_are_named(requisite: dict[str, str], named: str) -> None:
    with pytest.raises(Exhausted) as refusal:
        World().create(topology=TopologyRequirement((requisite,)))
    assert f"expected {KEY} with one of '{DEFAULT_ZONE}', got {named}" in str(refusal.value)


def test_the_preferred_zone_is_taken() -> None:
    world = World(zones=("a", "b"))
    assert world.create(topology=topology("a", "b", preferred=("b", "a"))).topology == ({KEY: "b"},)


def test_a_volume_in_any_allowed_zone_is_found_before_one_is_made() -> None:
    world = World(zones=("a", "b"))
    made = world.create(topology=topology("b"))
    assert world.create(topology=topology("a", "b", preferred=("a",))) == made
    assert world.zones["a"].all_volumes() == []


def test_a_full_zone_is_passed_over_for_the_next() -> None:
    world = World(zones=("a", "b"))
    world.zones["a"].raw_bytes = 0
    assert world.create().topology == ({KEY: "b"},)


def test_nothing_is_made_while_an_allowed_zone_cannot_be_asked() -> None:
    world = World(zones=("a", "b"))
    world.zones["b"].is_reachable = False
    with pytest.raises(StorageUnavailable):
        world.create()
    assert world.zones["a"].all_volumes() == []


# --- deleting -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("volume_id", ["fake-vol-id", "", "a/b", "x" * 300, "single-zone-cluster:none", "::::"])
def test_what_does_not_exist_is_deleted_already(volume_id: str) -> None:
    World().delete(volume_id)


def test_a_deleted_volume_is_gone() -> None:
    world = World()
    world.delete(world.create(parameters=CLAIM).volume_id)
    assert world.management.all_volumes() == []


@pytest.mark.parametrize("parts", [1, 2, 3])
def test_older_forms_of_the_handle_delete_too(parts: int) -> None:
    world = World()
    whole = world.create(parameters=CLAIM).volume_id.split(":")
    world.delete(whole[1] if parts == 1 else ":".join(whole[:parts]))
    assert world.management.all_volumes() == []


def test_a_copy_of_the_handle_for_another_namespace_never_deletes() -> None:
    world = World()
    made = world.create(parameters=CLAIM)
    with pytest.raises(PreconditionFailed, match="copy"):
        world.delete(other_reference(made.volume_id, "team-b"))
    assert len(world.management.all_volumes()) == 1


def test_a_volume_of_an_older_driver_is_deleted_under_its_own_namespace_only() -> None:
    world = World()
    volume = old_volume()
    world.management.add_volume(volume)
    handle = VolumeHandle(volume.name, "single-zone-cluster", volume.uuid, "team-b")
    with pytest.raises(PreconditionFailed):
        world.delete(handle.format())
    world.delete(replace(handle, reference="team-a").format())
    assert world.management.all_volumes() == []


def test_another_uuid_under_the_same_name_is_another_volume() -> None:
    world = World()
    made = world.create()
    world.delete(made.volume_id.replace(world.stored().uuid, "00000000-0000-0000-0000-000000000000"))
    assert len(world.management.all_volumes()) == 1


def test_an_attached_volume_is_not_deleted_and_its_holder_is_named() -> None:
    world = World()
    made = world.create()
    world.publish(made.volume_id, NODE_1)
    with pytest.raises(PreconditionFailed, match="node-1"):
        world.delete(made.volume_id)
    assert len(world.management.all_volumes()) == 1


def test_a_volume_that_is_still_being_detached_is_not_deleted() -> None:
    world = World()
    made = world.create()
    world.publish(made.volume_id)
    world.management.detach_s = 100
    with pytest.raises(DeadlineReached):
        world.unpublish(made.volume_id, seconds=5)
    with pytest.raises(PreconditionFailed, match="node-1"):
        world.delete(made.volume_id)


def test_a_slow_deletion_is_waited_for() -> None:
    world = World()
    world.management.delete_s = 20
    world.delete(world.create().volume_id)
    assert world.management.all_volumes() == []


def test_an_existing_volume_that_a_deletion_did_not_find_is_not_reported_deleted() -> None:
    world = World()
    made = world.create()
    world.management.pending.add(world.stored().name)
    with pytest.raises(OperationPending):
        world.delete(made.volume_id)
    world.management.pending.clear()
    world.delete(made.volume_id)
    assert world.management.all_volumes() == []


def test_a_deletion_that_takes_too_long_is_pending_and_gone_on_with() -> None:
    world = World()
    world.management.delete_s = 20
    made = world.create()
    with pytest.raises(OperationPending):
        world.delete(made.volume_id, seconds=10)
    world.delete(made.volume_id, seconds=30)
    assert world.management.all_volumes() == []


def test_a_handle_of_a_zone_that_is_not_served_is_not_declared_deleted() -> None:
    with pytest.raises(PreconditionFailed, match="mars"):
        World().delete("mars:csi-1")
