# SPDX-License-Identifier: Apache-2.0
"""ControllerGetVolumeHealth and ControllerListVolumeHealth by the documents of volumes and clients."""

from __future__ import annotations

from dataclasses import replace

import pytest

from csi_driver.controller.list_volumes import GetVolumeHealth, find_faults
from csi_driver.errors import StaleToken, VolumeNotFound
from csi_driver.model import Reason, VolumeFault, VolumeHealth
from csi_driver.storage_model import (
    Client,
    ClientStatus,
    DesiredAttachment,
    DeviceReport,
    DeviceStatus,
    ReservationMode,
    Volume,
)
from tests.unit.controller.world import NODE_1, World, other_reference

INACCESSIBLE, DEGRADED = VolumeFault.INACCESSIBLE, VolumeFault.DEGRADED
UUID = "0a6f1c1e-9d1b-4b7e-8f6b-3f1d2c5b7a90"
WELL = Volume("csi-1", UUID, 262144, 4096, 1.0, "online", "none")
WISH = DesiredAttachment(UUID, "csi-1", "attaching", ReservationMode.EXCLUSIVE_READ_WRITE, frozenset())
REPORT = DeviceReport(UUID, "csi-1", DeviceStatus.ATTACHED, True, ReservationMode.EXCLUSIVE_READ_WRITE, None)
HOLDER = Client("node-1", NODE_1, ClientStatus.READY, {UUID: WISH}, {UUID: REPORT})

Found = set[tuple[VolumeFault, Reason]]


def found(volume: Volume = WELL, *clients: Client) -> Found:
    return {(entry.status, entry.reason) for entry in find_faults(volume, clients)}


@pytest.mark.parametrize(
    ("change", "entries"),
    [
        ({}, set()),
        ({"action": "extending"}, set()),
        ({"status": "unavailable", "action": "initializing"}, set()),
        ({"status": "pending", "action": "none"}, set()),
        ({"status": "offline", "health": "critical"}, {(INACCESSIBLE, Reason.VOLUME_OFFLINE)}),
        ({"status": "unavailable"}, {(INACCESSIBLE, Reason.VOLUME_UNAVAILABLE)}),
        ({"status": "degraded", "health": "alarm"}, {(DEGRADED, Reason.VOLUME_DEGRADED)}),
        ({"health": "alarm"}, {(DEGRADED, Reason.VOLUME_ALARM)}),
        ({"health": "critical"}, {(DEGRADED, Reason.VOLUME_CRITICAL)}),
        ({"action": "rebuilding"}, {(DEGRADED, Reason.VOLUME_REBUILDING)}),
        (
            {"status": "degraded", "action": "rebuildRequired"},
            {(DEGRADED, Reason.VOLUME_DEGRADED), (DEGRADED, Reason.VOLUME_REBUILDING)},
        ),
        ({"status": "a word of later versions", "health": "another"}, set()),
    ],
)
def test_a_volume_is_find_faultsd_by_its_document(change: dict[str, str], entries: Found) -> None:
    assert found(replace(WELL, **change), HOLDER) == entries  # type: ignore[arg-type]


def holder(
    *, client: ClientStatus = ClientStatus.READY, action: str = "attaching", report: DeviceReport | None = REPORT
) -> Client:
    devices = {UUID: report} if report is not None else {}
    return replace(HOLDER, status=client, desired={UUID: replace(WISH, action=action)}, devices=devices)


@pytest.mark.parametrize(
    ("client", "entries"),
    [
        (holder(), set()),
        (holder(client=ClientStatus.DOWN), {(INACCESSIBLE, Reason.NODE_DOWN)}),
        (holder(client=ClientStatus.DOWN, action="detaching"), set()),
        (holder(client=ClientStatus.UNKNOWN), set()),
        (holder(report=None), set()),
        (holder(report=replace(REPORT, io_enabled=False)), {(INACCESSIBLE, Reason.IO_DISABLED)}),
        (holder(action="detaching", report=replace(REPORT, io_enabled=False)), set()),
        (holder(report=replace(REPORT, status=DeviceStatus.ATTACHING, io_enabled=False)), set()),
        (holder(report=replace(REPORT, status=DeviceStatus.ATTACH_FAILED)), {(INACCESSIBLE, Reason.ATTACH_FAILED)}),
        (
            holder(report=replace(REPORT, status=DeviceStatus.RESERVATION_DENIED)),
            {(INACCESSIBLE, Reason.ATTACH_FAILED)},
        ),
        (replace(HOLDER, desired={}), set()),
    ],
)
def test_a_volume_is_find_faultsd_by_whoever_holds_it(client: Client, entries: Found) -> None:
    assert found(WELL, client) == entries


def test_two_nodes_with_one_trouble_are_one_entry() -> None:
    down = holder(client=ClientStatus.DOWN)
    (entry,) = find_faults(WELL, [down, replace(down, id="node-2"), replace(down, id="node-3")])
    assert "node-1" in entry.message
    assert "2 more" in entry.message


# --- over a storage -------------------------------------------------------------------------------------------


def of(world: World) -> GetVolumeHealth:
    return GetVolumeHealth(world.listing)


def broken(world: World, name: str) -> None:
    volume = next(volume for volume in world.management.all_volumes() if volume.name == name)
    world.management.add_volume(replace(volume, status="offline"))


def test_one_volume_is_asked_for_by_its_handle_and_without_the_others() -> None:
    world = World()
    created = world.create()
    other_id = other_reference(created.volume_id, "team-b")
    world.publish(created.volume_id)
    assert of(world).volume(created.volume_id, deadline=world.deadline()).entries == ()
    broken(world, world.stored().name)
    world.management.requests.clear()
    health = of(world).volume(other_id, deadline=world.deadline())
    assert (health.volume_id, [entry.reason for entry in health.entries]) == (other_id, [Reason.VOLUME_OFFLINE])
    assert not {"volumes", "clients"} & set(world.management.requests)


@pytest.mark.parametrize("volume_id", ["no/such", "single-zone-cluster:csi-none", "elsewhere:csi-1"])
def test_a_volume_that_is_not_there_is_not_found(volume_id: str) -> None:
    world = World()
    with pytest.raises(VolumeNotFound):
        of(world).volume(volume_id, deadline=world.deadline())


def listed(world: World, page: int = 0, token: str = "") -> tuple[list[VolumeHealth], str]:
    found: list[VolumeHealth] = []

    def add(health: VolumeHealth) -> int:
        found.append(health)
        return 100

    return found, of(world).volumes(page, token, add, deadline=world.deadline())


def test_the_health_of_all_volumes_comes_in_the_pages_of_their_list() -> None:
    world = World(zones=("z1", "z2"))
    ids = [world.create(f"volume-{number}").volume_id for number in range(5)]
    world.publish(ids[1])
    client = world.management.client_by_uuid(NODE_1, deadline=world.deadline())
    assert client is not None
    broken(world, ids[3].split(":")[1])
    world.management.set_status("node-1", ClientStatus.DOWN)
    told: dict[str, list[Reason]] = {}
    token, pages = "", 0
    while pages == 0 or token:
        page, token = listed(world, 2, token)
        told |= {health.volume_id: [entry.reason for entry in health.entries] for health in page}
        pages += 1
    wrong = {ids[1]: [Reason.NODE_DOWN], ids[3]: [Reason.VOLUME_OFFLINE]}
    assert told == {volume_id: wrong.get(volume_id, []) for volume_id in ids}
    assert pages == 3
    everything, _ = listed(world)
    assert {health.volume_id for health in everything} == set(ids)


def test_a_page_of_health_has_what_the_clients_report_of_their_devices() -> None:
    world = World()
    made = world.create()
    client = world.management.client_by_uuid(NODE_1, deadline=world.deadline())
    assert client is not None
    world.management.io_s = 1000.0
    mode = ReservationMode.EXCLUSIVE_READ_WRITE
    world.management.attach(client, world.stored(), mode=mode, reference_id=None, deadline=world.deadline())
    world.clock.sleep(world.management.attach_s)
    (health,), _ = listed(world)
    assert (health.volume_id, [entry.reason for entry in health.entries]) == (made.volume_id, [Reason.IO_DISABLED])


def test_a_page_of_health_costs_the_requests_of_a_page_of_the_list() -> None:
    world = World()
    for number in range(3):
        world.create(f"volume-{number}")
    world.management.requests.clear()
    _, token = listed(world, 2)
    assert token
    assert world.management.requests == ["clients", "volumes"]


def test_a_token_of_nobody_is_stale() -> None:
    world = World()
    with pytest.raises(StaleToken):
        listed(world, 1, "what")
