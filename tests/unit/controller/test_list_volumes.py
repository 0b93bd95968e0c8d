"""ListVolumes, ControllerGetVolume, GetCapacity, ValidateVolumeCapabilities and Probe."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from csi_driver.controller.capacity import allowed_drives
from csi_driver.controller.list_volumes import GetVolumeHealth, health_bytes, listed_bytes
from csi_driver.controller.ports import TopologyRequirement, ValidateRequest
from csi_driver.controller.volume_metadata import OWN_KEY
from csi_driver.errors import Exhausted, StaleToken, StorageUnavailable, Unauthenticated, VolumeNotFound
from csi_driver.model import (
    DEFAULT_TOPOLOGY_KEY,
    GIB,
    MIB,
    Capability,
    CapacityRange,
    ListedVolume,
    ProvisionedVolume,
    Reason,
    Segments,
    VolumeEntry,
    VolumeFault,
    VolumeHealth,
)
from csi_driver.parameters.storage_class import parse
from csi_driver.rpc import wire
from csi_driver.rpc.pb import csi_pb2
from csi_driver.storage_model import AllowedDrives, ClientStatus, Layout, RaidLevel, Volume, Vpg
from tests.unit.controller.world import (
    BLOCK,
    CLAIM,
    NODE_1,
    NODE_2,
    ROX,
    RWO,
    RWX_MOUNT,
    World,
    other_reference,
)

STATIC = Volume("golden", "99999999-0000-0000-0000-000000000000", 262144, 4096, 1.1, "online", "none")


def listed(world: World, page: int = 0, token: str = "") -> tuple[list[ListedVolume], str]:
    return world.listing.volumes(page, token, deadline=world.deadline())


def all_pages(world: World, page: int) -> list[str]:
    found, token = listed(world, page)
    ids = [entry.volume.volume_id for entry in found]
    while token:
        assert len(token.encode()) <= 128
        found, token = listed(world, page, token)
        assert 0 < len(found) <= page
        ids += [entry.volume.volume_id for entry in found]
    return ids


def ids(world: World) -> list[str]:
    return [entry.volume.volume_id for entry in listed(world)[0]]


# --- lists ----------------------------------------------------------------------------------------------------


def test_a_volume_shows_as_it_was_created() -> None:
    world = World()
    made = world.create(parameters=CLAIM)
    assert listed(world) == ([ListedVolume(made, ())], "")


def test_a_volume_shows_the_nodes_it_is_published_to() -> None:
    world = World()
    made = world.create(parameters=CLAIM)
    world.publish(made.volume_id, "node-1", ROX)
    world.publish(made.volume_id, "node-2", ROX)
    (entry,) = listed(world)[0]
    assert sorted(entry.published_node_ids) == sorted([NODE_1, NODE_2])


def test_a_node_that_is_giving_the_volume_up_is_not_shown() -> None:
    world = World()
    made = world.create(parameters=CLAIM)
    world.publish(made.volume_id)
    world.management.set_status("node-1", ClientStatus.DOWN)
    world.unpublish(made.volume_id)
    assert listed(world)[0][0].published_node_ids == ()


def test_a_static_volume_shows_under_zone_name_and_uuid() -> None:
    world = World()
    world.management.add_volume(STATIC)
    assert ids(world) == [f"single-zone-cluster:golden:{STATIC.uuid}"]


@pytest.mark.parametrize(
    "spelling", ["golden", "single-zone-cluster:golden", f"single-zone-cluster:golden:{STATIC.uuid}:A b"]
)
def test_another_spelling_shows_while_it_is_attached(spelling: str) -> None:
    world = World()
    world.management.add_volume(STATIC)
    world.publish(spelling)
    shown = {entry.volume.volume_id: entry.published_node_ids for entry in listed(world)[0]}
    assert shown[spelling] == (NODE_1,)
    assert len(shown) == 2
    world.unpublish(spelling)
    assert len(ids(world)) == 1


def test_a_readers_copy_shows_beside_the_issued_handle() -> None:
    world = World()
    made = world.create(parameters=CLAIM)
    copy = other_reference(made.volume_id, "team-b")
    world.publish(made.volume_id, NODE_1, ROX)
    world.publish(copy, NODE_2, ROX)
    assert {e.volume.volume_id: e.published_node_ids for e in listed(world)[0]} == {
        made.volume_id: (NODE_1,),
        copy: (NODE_2,),
    }


def test_a_readers_copy_costs_no_write() -> None:
    world = World()
    made = world.create(parameters=CLAIM)
    world.publish(made.volume_id, NODE_1, ROX)
    world.management.requests.clear()
    world.publish(other_reference(made.volume_id, "team-b"), NODE_1, ROX)
    assert "set_metadata" not in world.management.requests


@pytest.mark.parametrize(
    "change", [{"action": "markedForDeletion"}, {"status": "toBeDeleted"}, {"is_reserved": True}, {"name": "golden_MD"}]
)
def test_what_is_no_volume_of_anybody_is_not_listed(change: dict[str, object]) -> None:
    world = World()
    world.management.add_volume(replace(STATIC, **change))  # type: ignore[arg-type]
    assert ids(world) == []


@pytest.mark.parametrize("page", [1, 2, 3, 5, 7, 100])
def test_pages_together_are_the_whole_list(page: int) -> None:
    world = World(zones=("b", "a"))
    for zone in world.zones.values():
        for number in range(5):
            zone.add_volume(replace(STATIC, name=f"v{number}", uuid=f"99999999-0000-0000-0000-00000000000{number}"))
    for reference in ("x", "y", "z"):
        world.publish(f"a:v2:99999999-0000-0000-0000-000000000002:{reference}", "node-1", ROX)
    assert all_pages(world, page) == ids(world)
    assert len(ids(world)) == 13


def test_a_page_resumes_where_it_ended_although_the_volume_there_is_gone() -> None:
    world = World()
    for number in range(4):
        world.management.add_volume(replace(STATIC, name=f"v{number}"))
    _, token = listed(world, 2)
    world.management.change("v1", is_reserved=True)
    assert [e.volume.volume_id.split(":")[1] for e in listed(world, 2, token)[0]] == ["v2", "v3"]


def test_the_last_page_has_no_token() -> None:
    world = World()
    for number in range(4):
        world.management.add_volume(replace(STATIC, name=f"v{number}"))
    _, token = listed(world, 2)
    assert listed(world, 2, token)[1] == ""


@pytest.mark.parametrize("token", ["invalid-token", "v1.", "v1.!!!!", "v1.YQ", "v1.YQpiCmM", "7", "v1.\u00fc"])
def test_a_token_that_was_not_issued_is_stale(token: str) -> None:
    with pytest.raises(StaleToken):
        listed(World(), 1, token)


def test_a_page_costs_the_same_wherever_it_lies() -> None:
    world = World()
    for number in range(50):
        world.management.add_volume(replace(STATIC, name=f"v{number:02}"))
    token = ""
    for _ in range(5):
        world.management.requests.clear()
        _, token = listed(world, 5, token)
        assert world.management.requests == ["clients", "volumes"]


# --- one volume -----------------------------------------------------------------------------------------------


def test_a_volume_is_shown_under_the_id_that_was_asked_for() -> None:
    world = World()
    made = world.create(parameters=CLAIM)
    world.publish(made.volume_id)
    name = world.stored().name
    shown = world.listing.volume(name, deadline=world.deadline())
    assert shown.volume.volume_id == name
    assert shown.published_node_ids == ()
    assert world.listing.volume(made.volume_id, deadline=world.deadline()).published_node_ids == (NODE_1,)


def test_an_unknown_volume_is_not_found() -> None:
    world = World()
    with pytest.raises(VolumeNotFound):
        world.listing.volume("none", deadline=world.deadline())


# --- capacity -------------------------------------------------------------------------------------------------


def room(
    world: World,
    parameters: dict[str, str] | None = None,
    segments: Segments | None = None,
    capabilities: tuple[Capability, ...] = (),
) -> int:
    answer = world.free.capacity(capabilities, parameters or {}, segments, deadline=world.deadline())
    assert answer.maximum_volume_bytes is not None
    return answer.available_bytes


@pytest.mark.parametrize(
    ("parameters", "share"),
    [
        ({}, 1.0),
        ({"raidLevel": "raid1"}, 0.5),
        ({"raidLevel": "raid10", "numberOfMirrors": "2"}, 1 / 3),
        ({"raidLevel": "ec"}, 0.8),
    ],
)
def test_redundancy_is_taken_off(parameters: dict[str, str], share: float) -> None:
    world = World()
    world.management.raw_bytes = 100 * GIB
    assert room(world, parameters) == pytest.approx(100 * GIB * share, rel=0.001)


def test_the_keys_of_the_sidecars_are_ignored() -> None:
    assert room(World(), {"csi.storage.k8s.io/fstype": "xfs", "csi.storage.k8s.io/node-stage-secret-name": "s"}) > 0


def test_a_group_with_space_of_its_own_tells_its_own() -> None:
    world = World()
    world.management.add_vpg(Vpg("gold", Layout(RaidLevel.MIRRORED), 10 * GIB, allow_overflow=False))
    world.create(capacity=CapacityRange(4 * GIB), parameters={"vpg": "gold"})
    assert room(world, {"vpg": "gold"}) == 6 * GIB


def test_a_group_that_may_overflow_has_its_reserve_and_the_drives() -> None:
    world = World()
    world.management.raw_bytes = 100 * GIB
    world.management.add_vpg(Vpg("gold", Layout(), 10 * GIB, allow_overflow=True))
    world.create(capacity=CapacityRange(4 * GIB), parameters={"vpg": "gold"})
    assert room(world, {"vpg": "gold"}) == 6 * GIB + 96 * GIB


@pytest.mark.parametrize(
    "parameters",
    [
        {"diskClasses": "fast"},
        {"serverClasses": "rack-1"},
        {"limitByDisks": "fast,unknown"},
        {"limitByNodes": "rack-1"},
        {"diskClasses": "wide", "serverClasses": "fast"},
        {"vpg": "fast-group"},
        {"raidLevel": "raid0", "limitByNodes": "fast", "domain": "any"},
    ],
)
def test_only_the_drives_that_the_parameters_allow_count(parameters: dict[str, str]) -> None:
    world = World()
    world.management.restricted = {"fast": 8 * GIB, "rack-1": 8 * GIB, "wide": 100 * GIB}
    world.management.add_vpg(Vpg("fast-group", Layout(), 0, allow_overflow=True, drive_classes=("fast",)))
    assert room(world, parameters) == 8 * GIB


def test_the_domain_counts_where_redundancy_is_kept() -> None:
    world = World()
    world.management.restricted = {"rack": 8 * GIB}
    assert room(world, {"raidLevel": "raid1", "domain": "rack"}) == 4 * GIB


def test_capacity_is_a_size_that_a_volume_can_have() -> None:
    world = World()
    world.management.raw_bytes = 100 * GIB + 12345
    assert room(world) == 100 * GIB
    assert room(world, {"raidLevel": "raid0", "stripeWidth": "3"}) == 100 * GIB // (3 * MIB) * 3 * MIB


def test_less_than_the_smallest_volume_is_no_room() -> None:
    world = World()
    world.management.raw_bytes = 1_000_341_503
    assert room(world) == 0
    world.management.raw_bytes = 1_000_341_504
    assert room(world) == 1_000_341_504


def test_unsupported_capabilities_have_no_room() -> None:
    world = World()
    assert world.free.capacity((RWX_MOUNT,), {}, None, deadline=world.deadline()).available_bytes == 0


@pytest.mark.parametrize("segments", [{DEFAULT_TOPOLOGY_KEY: "mars"}, {"topology.kubernetes.io/zone": "eu-1a"}])
def test_where_create_volume_finds_no_zone_there_is_no_room(segments: Segments) -> None:
    world = World()
    assert room(world, segments=segments) == 0
    with pytest.raises(Exhausted):
        world.create(topology=TopologyRequirement(requisite=(segments,)))


WRONG = [
    {"color": "red"},
    {"raidLevel": "raid7"},
    {"vpg": "none"},
    {"vpg": "plain", "encryption": "luks"},
    {"vpg": "metadata"},
    {"diskClasses": "none"},
    {"serverClasses": "none"},
    {"limitByNodes": "none"},
    {"limitByDisks": "none"},
    {"raidLevel": "raid1", "domain": "none"},
]


@pytest.mark.parametrize("zones", [("a",), ("a", "b")])
@pytest.mark.parametrize("parameters", WRONG)
def test_parameters_that_no_zone_accepts_get_the_capacity_of_all_drives(
    zones: tuple[str, ...], parameters: dict[str, str]
) -> None:
    world = World(zones=zones)
    for management in world.zones.values():
        management.raw_bytes = 8 * GIB
        management.add_vpg(Vpg("metadata", Layout(), 0, allow_overflow=True, is_for_metadata=True))
        management.add_vpg(
            Vpg("plain", Layout(), 2 * GIB, allow_overflow=False, is_encrypted=True, header_bytes=16 * MIB)
        )
    assert room(world, parameters, segments={DEFAULT_TOPOLOGY_KEY: "a"}) == 8 * GIB


@pytest.mark.parametrize("parameters", WRONG)
def test_wrong_parameters_are_logged_once(parameters: dict[str, str], caplog: pytest.LogCaptureFixture) -> None:
    world = World()
    world.management.add_vpg(Vpg("metadata", Layout(), 0, allow_overflow=True, is_for_metadata=True))
    world.management.add_vpg(
        Vpg("plain", Layout(), 2 * GIB, allow_overflow=False, is_encrypted=True, header_bytes=16 * MIB)
    )
    for _ in range(3):
        room(world, parameters)
    (line,) = [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]
    assert "CreateVolume will refuse" in line


@pytest.mark.parametrize(
    ("parameters", "allowed"),
    [
        ({"allowAllocationOnOfflineDrives": "true"}, AllowedDrives(with_offline=True)),
        ({"allowAllocationOnOfflineDrives": "false"}, AllowedDrives()),
        ({"raidLevel": "ec"}, AllowedDrives(with_metadata=True)),
        ({"raidLevel": "sec"}, AllowedDrives(with_metadata=True)),
        ({"raidLevel": "raid1", "enableCrcCheck": "true"}, AllowedDrives(with_metadata=True)),
        ({"raidLevel": "raid1", "domain": "rack"}, AllowedDrives(domain="rack")),
        ({"raidLevel": "raid0", "domain": "rack"}, AllowedDrives()),
        ({"diskClasses": "fast,slow", "serverClasses": "near"}, AllowedDrives(("fast", "slow"), ("near",))),
        ({"limitByDisks": "d1", "limitByNodes": "t1,t2"}, AllowedDrives(drives=("d1",), targets=("t1", "t2"))),
    ],
)
def test_free_space_is_counted_on_the_drives_that_the_parameters_allow(
    parameters: dict[str, str], allowed: AllowedDrives
) -> None:
    spec = parse(parameters).spec
    assert spec.layout is not None
    assert allowed_drives(spec, None, spec.layout) == allowed


def test_a_group_that_another_zone_has_is_not_wrong_but_has_no_room_here() -> None:
    world = World(zones=("a", "b"))
    world.zones["b"].add_vpg(Vpg("gold", Layout(), 2 * GIB, allow_overflow=False))
    assert room(world, {"vpg": "gold"}, segments={DEFAULT_TOPOLOGY_KEY: "a"}) == 0
    assert room(world, {"vpg": "gold"}, segments={DEFAULT_TOPOLOGY_KEY: "b"}) == 2 * GIB
    assert room(world, {"vpg": "gold"}) == 2 * GIB


def test_a_group_that_a_silent_zone_may_have_is_not_called_wrong() -> None:
    world = World(zones=("a", "b"))
    world.zones["b"].is_reachable = False
    assert room(world, {"vpg": "gold"}, segments={DEFAULT_TOPOLOGY_KEY: "a"}) == 0
    assert room(world, {"vpg": "gold"}) == 0


def test_capacity_takes_a_bounded_number_of_requests_however_many_volumes_there_are() -> None:
    world = World()
    world.management.add_vpg(Vpg("gold", Layout(), 2 * GIB, allow_overflow=True))
    for number in range(20):
        world.create(f"pvc-{number}")
    world.management.requests.clear()
    room(world, {"vpg": "gold"})
    assert world.management.requests == ["vpg", "vpg_free_bytes", "raw_free_bytes"]


@pytest.mark.parametrize("parameters", [{}, {"raidLevel": "raid1"}, {"raidLevel": "ec"}])
@pytest.mark.parametrize("short_bytes", [0, MIB])
def test_a_remainder_that_no_volume_fits_into_is_no_capacity(parameters: dict[str, str], short_bytes: int) -> None:
    world = World()
    least = world.free.capacity((), parameters, None, deadline=world.deadline()).minimum_volume_bytes
    assert least is not None
    share = {None: 1.0, "raid1": 2.0, "ec": 1.25}[parameters.get("raidLevel")]
    world.management.raw_bytes = round((least - short_bytes) * share)
    found = world.free.capacity((), parameters, None, deadline=world.deadline())
    fits = 0 if short_bytes else least
    assert (found.available_bytes, found.maximum_volume_bytes) == (fits, fits)


def test_zones_are_told_apart_and_summed() -> None:
    world = World(zones=("a", "b"))
    world.zones["a"].raw_bytes, world.zones["b"].raw_bytes = GIB, 2 * GIB
    assert room(world) == 3 * GIB
    assert room(world, segments={DEFAULT_TOPOLOGY_KEY: "b"}) == 2 * GIB
    assert world.free.capacity((), {}, None, deadline=world.deadline()).maximum_volume_bytes == 2 * GIB


# --- validate and ready ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({}, None),
        ({"capabilities": (ROX,)}, None),
        ({"capabilities": (RWX_MOUNT,)}, "not supported"),
        ({"capabilities": (BLOCK,)}, "expected filesystem"),
        ({"parameters": {"raidLevel": "raid1"}}, None),
        ({"parameters": {"raidLevel": "raid0"}}, "raidLevel"),
        ({"parameters": {"color": "red"}}, "color"),
        ({"context": {"fsType": "ext4", "storage.kubernetes.io/csiProvisionerIdentity": "x"}}, None),
        ({"context": {"fsType": "xfs"}}, "fsType"),
    ],
)
def test_a_volume_is_confirmed_or_the_reason_is_told(change: dict[str, object], said: str | None) -> None:
    world = World()
    made = world.create(parameters={"raidLevel": "raid1"})
    request = replace(ValidateRequest(made.volume_id, (RWO,)), **change)  # type: ignore[arg-type]
    message = world.validation.validate(request, deadline=world.deadline())
    assert (message is None) if said is None else (message is not None and said in message)


def test_validating_an_unknown_volume_is_not_found() -> None:
    world = World()
    with pytest.raises(VolumeNotFound):
        world.validation.validate(ValidateRequest("none", (RWX_MOUNT,)), deadline=world.deadline())


def test_a_management_that_lets_nobody_in_is_not_ready_for_the_reason_that_it_gives() -> None:
    world = World()

    def refuse(request: str) -> None:
        raise Unauthenticated("user 'csi' with the password in /secret is not accepted")

    world.management.before = refuse
    with pytest.raises(Unauthenticated, match="the password in /secret"):
        world.readiness.ready(deadline=world.deadline())


def test_several_zones_that_do_not_answer_are_named_each_with_its_reason() -> None:
    world = World(zones=("a", "b"))
    for zone in world.zones.values():
        zone.is_reachable = False
    with pytest.raises(StorageUnavailable, match=r"zone a: .*zone b: "):
        world.readiness.ready(deadline=world.deadline())


def test_ready_once_is_ready_for_good() -> None:
    world = World()
    world.management.is_reachable = False
    with pytest.raises(StorageUnavailable):
        world.readiness.ready(deadline=world.deadline())
    world.management.is_reachable = True
    assert world.readiness.ready(deadline=world.deadline())
    world.management.is_reachable = False
    assert world.readiness.ready(deadline=world.deadline())


# --- pages that a message can hold ----------------------------------------------------------------------------

GRPC_LIMIT = 4 << 20


def many(count: int, *, letters: int = 0) -> World:
    world = World()
    own = {"format": 1, "created": True}
    metadata = {"csi_name": "x", "mkfsOptions": "-O " + "a" * letters, OWN_KEY: own} if letters else {}
    for number in range(count):
        name = f"v{number:06d}"
        world.management.add_volume(
            replace(STATIC, name=name, uuid=f"00000000-0000-0000-0000-{number:012d}", metadata=metadata)
        )
    return world


@pytest.mark.parametrize("asked", [0, 1_000_000])
def test_however_much_is_asked_for_a_page_fits_into_a_message(asked: int) -> None:
    world = many(5_000, letters=900)
    pages, token, seen = 0, "", list[str]()
    while token or not pages:
        found, token = listed(world, asked, token)
        assert wire.list_to(found, token).ByteSize() < GRPC_LIMIT
        seen += [entry.volume.volume_id for entry in found]
        pages += 1
    assert pages == 2  # which are not smaller than they need be
    assert len(seen) == len(set(seen)) == 5_000


def test_a_page_of_what_is_wrong_fits_into_a_message_too() -> None:
    world = many(12_000)
    for volume in world.management.all_volumes():
        world.management.change(volume.name, status="degraded", health="alarm", action="rebuilding")
    health = GetVolumeHealth(world.clusters, world.listing, world.settings)
    pages, token, seen = 0, "", list[str]()
    while token or not pages:
        found, token = health.volumes(0, token, deadline=world.deadline())
        assert sum(wire.volume_health_to(each).ByteSize() + 8 for each in found) < GRPC_LIMIT
        assert all(each.entries for each in found)
        seen += [each.volume_id for each in found]
        pages += 1
    assert pages > 1
    assert len(seen) == len(set(seen)) == 12_000


@given(
    st.text(st.characters(exclude_categories=["Cs"]), max_size=300),
    st.dictionaries(
        st.text(st.characters(exclude_categories=["Cs"])), st.text(st.characters(exclude_categories=["Cs"]))
    ),
    st.lists(st.text(st.characters(exclude_categories=["Cs"]))),
)
def test_an_entry_is_never_larger_than_it_is_taken_for(text: str, pairs: dict[str, str], nodes: list[str]) -> None:
    entry = ListedVolume(ProvisionedVolume(text, 1 << 62, pairs, (pairs, pairs)), tuple(nodes))
    assert wire.list_to([entry], "").ByteSize() <= listed_bytes(entry)
    fault = VolumeEntry(VolumeFault.DATA_LOSS, Reason.VOLUME_ALARM, text)
    health = VolumeHealth(text, (fault,) * len(nodes))
    written = csi_pb2.ControllerListVolumeHealthResponse(entries=[wire.volume_health_to(health)])
    assert written.ByteSize() <= health_bytes(health) + 2
