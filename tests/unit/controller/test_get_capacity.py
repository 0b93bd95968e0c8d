# SPDX-License-Identifier: Apache-2.0
"""GetCapacity over a storage management in memory."""

from __future__ import annotations

import pytest

from csi_driver.controller.capacity import SpaceWatch, allowed_drives
from csi_driver.controller.ports import TopologyRequirement
from csi_driver.errors import Exhausted
from csi_driver.model import DEFAULT_TOPOLOGY_KEY, DEFAULT_ZONE, GIB, MIB, Capability, CapacityRange, Segments
from csi_driver.parameters.storage_class import parse
from csi_driver.reporting import EventReason, Subject
from csi_driver.storage_model import AllowedDrives, Layout, RaidLevel, RawSpace, Vpg
from tests.fakes.reports import Reports
from tests.unit.controller.world import RWX_MOUNT, World


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
def test_redundancy_is_subtracted(parameters: dict[str, str], share: float) -> None:
    world = World()
    world.management.raw_bytes = 100 * GIB
    assert room(world, parameters) == pytest.approx(100 * GIB * share, rel=0.001)


def test_the_keys_of_the_sidecars_are_ignored() -> None:
    assert room(World(), {"csi.storage.k8s.io/fstype": "xfs", "csi.storage.k8s.io/node-stage-secret-name": "s"}) > 0


def test_a_group_with_reserved_space_reports_that_space() -> None:
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


def test_less_space_than_the_smallest_volume_is_no_capacity() -> None:
    world = World()
    world.management.raw_bytes = 1_000_341_503
    assert room(world) == 0
    world.management.raw_bytes = 1_000_341_504
    assert room(world) == 1_000_341_504


def test_unsupported_capabilities_have_no_capacity() -> None:
    world = World()
    assert world.free.capacity((RWX_MOUNT,), {}, None, deadline=world.deadline()).available_bytes == 0


@pytest.mark.parametrize("segments", [{DEFAULT_TOPOLOGY_KEY: "mars"}, {"topology.kubernetes.io/zone": "eu-1a"}])
def test_a_topology_without_a_zone_has_no_capacity(segments: Segments) -> None:
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


def test_a_group_of_another_zone_has_no_capacity_here() -> None:
    world = World(zones=("a", "b"))
    world.zones["b"].add_vpg(Vpg("gold", Layout(), 2 * GIB, allow_overflow=False))
    assert room(world, {"vpg": "gold"}, segments={DEFAULT_TOPOLOGY_KEY: "a"}) == 0
    assert room(world, {"vpg": "gold"}, segments={DEFAULT_TOPOLOGY_KEY: "b"}) == 2 * GIB
    assert room(world, {"vpg": "gold"}) == 2 * GIB


def test_a_group_that_an_unreachable_zone_may_have_is_not_refused() -> None:
    world = World(zones=("a", "b"))
    world.zones["b"].is_reachable = False
    assert room(world, {"vpg": "gold"}, segments={DEFAULT_TOPOLOGY_KEY: "a"}) == 0
    assert room(world, {"vpg": "gold"}) == 0


def test_capacity_takes_a_bounded_number_of_requests() -> None:
    world = World()
    world.management.add_vpg(Vpg("gold", Layout(), 2 * GIB, allow_overflow=True))
    for number in range(20):
        world.create(f"pvc-{number}")
    world.management.requests.clear()
    room(world, {"vpg": "gold"})
    assert world.management.requests == ["vpg", "vpg_free_bytes", "raw_space"]


@pytest.mark.parametrize("parameters", [{}, {"raidLevel": "raid1"}, {"raidLevel": "ec"}])
@pytest.mark.parametrize("short_bytes", [0, MIB])
def test_a_remainder_below_the_smallest_volume_is_no_capacity(parameters: dict[str, str], short_bytes: int) -> None:
    world = World()
    least = world.free.capacity((), parameters, None, deadline=world.deadline()).minimum_volume_bytes
    assert least is not None
    share = {None: 1.0, "raid1": 2.0, "ec": 1.25}[parameters.get("raidLevel")]
    world.management.raw_bytes = round((least - short_bytes) * share)
    found = world.free.capacity((), parameters, None, deadline=world.deadline())
    fits = 0 if short_bytes else least
    assert (found.available_bytes, found.maximum_volume_bytes) == (fits, fits)


def test_the_capacities_of_zones_are_summed() -> None:
    world = World(zones=("a", "b"))
    world.zones["a"].raw_bytes, world.zones["b"].raw_bytes = GIB, 2 * GIB
    assert room(world) == 3 * GIB
    assert room(world, segments={DEFAULT_TOPOLOGY_KEY: "b"}) == 2 * GIB
    assert world.free.capacity((), {}, None, deadline=world.deadline()).maximum_volume_bytes == 2 * GIB


def test_a_zone_is_reported_when_little_space_is_left_and_not_at_each_volume_around_the_limit() -> None:
    reports = Reports()
    watch, reasons = SpaceWatch(reports), []
    for free_percent in (100, 11, 9, 12, 9, 14, 16, 12, 9):
        before = len(reports.found)
        watch.saw("east", RawSpace(free_percent * GIB, 100 * GIB))
        reasons.append([reason for _, reason, _ in reports.found[before:]])
    nearly, enough = [EventReason.SPACE_NEARLY_PROMISED], [EventReason.SPACE_AVAILABLE]
    assert reasons == [[], [], nearly, [], nearly, [], enough, [], nearly]
    assert len({note for _, reason, note in reports.found if reason in nearly}) == 1


def test_space_that_volumes_take_is_reported_with_its_zone() -> None:
    world = World()
    world.management.raw_bytes = 100 * GIB
    room(world)
    assert not world.reports.found
    world.create(capacity=CapacityRange(95 * GIB))
    room(world)
    subject, reason, note = world.reports.one()
    assert (subject, reason) == (Subject(), EventReason.SPACE_NEARLY_PROMISED)
    assert DEFAULT_ZONE in note


def test_space_of_a_class_that_may_use_some_drives_alone_is_not_reported() -> None:
    world = World()
    world.management.restricted["fast"] = 0
    assert room(world, {"diskClasses": "fast"}) == 0
    assert not world.reports.found
