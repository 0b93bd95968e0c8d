# SPDX-License-Identifier: Apache-2.0
"""What the controller relies on for nodes on NVMe/TCP holds of the management in memory and of the embedded one."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Protocol

import pytest

from csi_driver.controller.fencing import UnpublishVolume
from csi_driver.controller.ports import Management, PublishRequest
from csi_driver.controller.publish import PublishVolume
from csi_driver.deadline import Deadline
from csi_driver.model import DEFAULT_ZONE
from csi_driver.nvme_model import NvmeExport, host_uuid
from csi_driver.settings import AttachSettings
from csi_driver.storage_model import Client, ClientStatus, DeviceStatus, Volume
from tests.contract.direct_management import DirectClient
from tests.contract.two_managements import EXCLUSIVE, READ_ONLY, SHARED, Actor
from tests.fakes.clock import FakeClock
from tests.fakes.management import FakeClusters, FakeManagement
from tests.unit.controller.world import RWO
from tests.unit.embedded.test_nvme_exports import Storage

NODE, OTHER = "worker-1", "worker-2"


class Side(Protocol):
    """A management, and what nodes do."""

    @property
    def management(self) -> Management: ...

    def connect(self, node: str, volume: Volume) -> None: ...

    def lose(self, node: str) -> None:
        """Let a node be without a connection for long."""


class FakeSide:
    def __init__(self) -> None:
        self.management = FakeManagement(clock=FakeClock(1000.0))
        for node in (NODE, OTHER):
            self.management.add_node(node)

    def connect(self, node: str, volume: Volume) -> None:
        self.management.set_busy(node, volume)

    def lose(self, node: str) -> None:
        self.management.set_status(node, ClientStatus.DOWN)
        for volume in self.management.all_volumes():
            self.management.set_busy(node, volume, busy=False)


class EmbeddedSide:
    def __init__(self, directory: Path) -> None:
        self.storage = Storage(directory)
        self.management: Management = DirectClient(self.storage)

    def connect(self, node: str, volume: Volume) -> None:
        self.storage.connect(node, volume.name)

    def lose(self, node: str) -> None:
        for each in list(self.storage.kernel.controllers):
            self.storage.kernel.give_up(each)
        self.storage.pass_time(40.0)


@pytest.fixture(params=["fake", "embedded"])
def side(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Side]:
    if request.param == "fake":
        yield FakeSide()
        return
    embedded = EmbeddedSide(tmp_path)
    yield embedded
    embedded.storage.manager.server.stop()


@pytest.fixture
def actor(side: Side) -> Actor:
    return Actor(side.management, Deadline.after(20))


@pytest.fixture
def volume(actor: Actor) -> Volume:
    return actor.created()


def client(actor: Actor, node: str = NODE) -> Client:
    found = actor.management.client(node, deadline=actor.deadline)
    assert found is not None
    return found


def attach(actor: Actor, volume: Volume, node: str = NODE, *, shared: bool = False) -> NvmeExport:
    mode = SHARED if shared else EXCLUSIVE
    of = client(actor, node)
    after = actor.management.attach(of, volume, mode=mode, reference_id=None, deadline=actor.deadline)
    shown = after.client if after is not None else client(actor, node)
    report = shown.devices[volume.uuid]
    assert (report.status, report.io_enabled, report.mode) == (DeviceStatus.ATTACHED, True, mode)
    assert report.export is not None
    return report.export


def detach(actor: Actor, volume: Volume, node: str = NODE) -> None:
    actor.management.detach(client(actor, node), volume, reference_id=None, deadline=actor.deadline)


def test_a_node_without_a_volume_is_a_client_that_connects_on_demand(actor: Actor) -> None:
    found = client(actor)
    assert (found.id, found.node_id, found.uuid) == (NODE, NODE, host_uuid(NODE))
    assert (found.connects_on_demand, found.is_absent, found.desired, found.devices) == (True, False, {}, {})


def test_an_attachment_is_exported_when_the_request_is_answered(actor: Actor, volume: Volume) -> None:
    export = attach(actor, volume)
    assert export.problem == ""
    assert volume.uuid in export.nqn
    assert client(actor).devices[volume.uuid].export == export


def test_lists_show_which_clients_connect_on_demand(actor: Actor, volume: Volume) -> None:
    attach(actor, volume)
    for listed in (
        actor.management.clients(deadline=actor.deadline),
        actor.management.clients(with_devices=False, deadline=actor.deadline),
        actor.management.clients_holding(volume.uuid, deadline=actor.deadline),
    ):
        assert {each.connects_on_demand for each in listed if each.id == NODE} == {True}
        assert {each.connects_on_demand for each in listed if each.id not in (NODE, OTHER)} <= {False}


def test_a_volume_without_a_connection_is_detached_at_once(actor: Actor, volume: Volume) -> None:
    attach(actor, volume)
    detach(actor, volume)
    assert actor.holders(volume) == []


def test_a_connected_volume_stays_attached_to_the_node(side: Side, actor: Actor, volume: Volume) -> None:
    export = attach(actor, volume)
    side.connect(NODE, volume)
    detach(actor, volume)
    found = client(actor)
    assert found.status is ClientStatus.READY
    assert found.desired[volume.uuid].is_detaching
    assert found.devices[volume.uuid].export == export


def test_a_node_that_was_lost_is_down_and_its_volume_is_detached(side: Side, actor: Actor, volume: Volume) -> None:
    attach(actor, volume)
    side.connect(NODE, volume)
    side.lose(NODE)
    found = client(actor)
    assert (found.status, found.is_absent) == (ClientStatus.DOWN, False)
    assert found.desired[volume.uuid].action == "attaching"
    detach(actor, volume)
    assert actor.holders(volume) == []


def test_a_node_without_a_connection_gets_another_volume(side: Side, actor: Actor, volume: Volume) -> None:
    attach(actor, volume)
    side.lose(NODE)
    assert attach(actor, actor.created("v2")).problem == ""


def test_each_attachment_has_a_name_of_its_own(actor: Actor, volume: Volume) -> None:
    names = set()
    for node in (NODE, NODE, OTHER):
        names.add(attach(actor, volume, node).nqn)
        detach(actor, volume, node)
    assert len(names) == 3


def test_nodes_and_devices_of_this_machine_share_a_volume(actor: Actor, volume: Volume) -> None:
    attach(actor, volume, shared=True)
    actor.attach(volume, mode=SHARED)
    assert attach(actor, volume, OTHER, shared=True).problem == ""
    assert actor.holders(volume) == ["node-1", NODE, OTHER]
    assert actor.node().devices[volume.uuid].export is None


def test_readers_of_one_volume_connect_each_to_their_own_export(tmp_path: Path) -> None:
    embedded = EmbeddedSide(tmp_path)
    actor = Actor(embedded.management, Deadline.after(20))
    volume, exports = actor.created(), []
    for node in (NODE, OTHER):
        of = client(actor, node)
        after = actor.management.attach(of, volume, mode=READ_ONLY, reference_id=None, deadline=actor.deadline)
        assert after is not None
        exports.append(after.client.devices[volume.uuid].export)
    assert len({export.nqn for export in exports if export is not None}) == 2
    embedded.storage.manager.server.stop()


def test_an_export_costs_the_embedded_manager_no_request(tmp_path: Path) -> None:
    storage, requests = Storage(tmp_path), []
    clusters = FakeClusters(DirectClient(storage, lambda: requests.append("")))
    storage.manager.save("data")
    volume_id, counts = f"{DEFAULT_ZONE}:data:{storage.manager.uuid('data')}", []
    for node in ("node-1", NODE):
        requests.clear()
        wanted = PublishRequest(volume_id, node, RWO, False)
        PublishVolume(clusters, AttachSettings()).publish(wanted, deadline=Deadline.after(20))
        UnpublishVolume(clusters, AttachSettings()).unpublish(volume_id, node, deadline=Deadline.after(20))
        counts.append(len(requests))
    storage.manager.server.stop()
    assert counts[0] == counts[1] > 0
