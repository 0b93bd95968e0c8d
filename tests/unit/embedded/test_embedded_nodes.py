# SPDX-License-Identifier: Apache-2.0
"""Nodes that connect over NVMe/TCP: they are clients without a configuration, and every attachment has its own name."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from csi_driver.embedded.model import ATTACHMENTS, CLIENTS, VOLUMES, Attachment
from csi_driver.management.codec import decode_client
from csi_driver.nvme_model import NvmeExport, host_uuid, subsystem_nqn
from tests.unit.embedded.fake_loops import FakeLoopDevices
from tests.unit.embedded.manager import Manager, running, settings_in

NODE = "worker-1.example"
EXCLUSIVE, SHARED = "EXCLUSIVE_READ_WRITE", "SHARED_READ_WRITE"
EXPORT = NvmeExport(subsystem_nqn(host_uuid("pool"), host_uuid("volume"), "00aa"), ("10.0.0.1:23001",))


@pytest.fixture
def exporter(manager: Manager) -> Manager:
    """A manager that exports its volumes."""
    manager.server.clients.has_exports = True
    return manager


def row(manager: Manager, volume: str, client: str = NODE) -> Attachment:
    found = manager.server.store.get(ATTACHMENTS, manager.uuid(volume), client)
    assert found is not None
    return found


def test_a_node_is_a_client_before_its_first_volume(exporter: Manager) -> None:
    client = decode_client(exporter.get(f"/clients/{NODE}"))
    assert (client.id, client.uuid, client.connects_on_demand) == (NODE, host_uuid(NODE), True)
    assert not client.is_absent
    assert exporter.server.store.get(CLIENTS, NODE) is None


def test_a_node_has_a_record_from_its_first_attachment_on(exporter: Manager) -> None:
    exporter.save("data")
    assert exporter.attach("data", NODE)["success"]
    listed = {client["_id"]: client["uuid"] for client in exporter.get("/clients/all/0/0")}
    assert listed[NODE] == host_uuid(NODE)


def test_a_refused_attachment_leaves_no_record_of_the_node(exporter: Manager) -> None:
    exporter.save("data")
    exporter.attach("data", "node-1", mode=EXCLUSIVE)
    assert not exporter.attach("data", NODE, mode=EXCLUSIVE)["success"]
    assert exporter.server.store.get(CLIENTS, NODE) is None


@pytest.mark.parametrize("name", ["Worker-1", "-a", "a-", ".", "..", "a%20b", "é", "a" * 254])
def test_a_name_that_no_node_has_is_no_client(exporter: Manager, name: str) -> None:
    exporter.save("data")
    assert exporter.get(f"/clients/{name}")["error"]["id"] == 1608
    assert exporter.attach("data", name)["error"]["id"] == 1621


def test_without_exports_only_configured_clients_exist(manager: Manager) -> None:
    manager.save("data")
    assert manager.get(f"/clients/{NODE}")["error"]["id"] == 1608
    assert manager.attach("data", NODE)["error"]["id"] == 1621


def test_a_configured_client_keeps_its_devices_where_volumes_are_exported(exporter: Manager) -> None:
    client = decode_client(exporter.get("/clients/node-1"))
    assert not client.connects_on_demand
    assert client.uuid != host_uuid("node-1")


def test_the_document_shows_where_the_node_connects(exporter: Manager) -> None:
    exporter.save("data")
    exporter.attach("data", NODE)
    exporter.server.clients.report(row(exporter, "data"), 4, io_enabled=1, export=EXPORT)
    report = decode_client(exporter.get(f"/clients/{NODE}")).devices[exporter.uuid("data")]
    assert report.export == EXPORT


def test_an_export_at_another_place_is_reported_again(exporter: Manager) -> None:
    exporter.save("data")
    exporter.attach("data", NODE)
    moved = NvmeExport(EXPORT.nqn, ("10.0.0.2:23001",))
    for export in (EXPORT, moved):
        exporter.server.clients.report(row(exporter, "data"), 4, io_enabled=1, export=export)
    assert exporter.report("data", NODE)["export"]["paths"] == ["10.0.0.2:23001"]


def test_more_references_keep_the_name_of_an_attachment(exporter: Manager) -> None:
    exporter.save("data")
    exporter.attach("data", NODE, "ref-a", mode=EXCLUSIVE)
    first = row(exporter, "data")
    exporter.attach("data", NODE, "ref-b", mode=EXCLUSIVE)
    assert row(exporter, "data").token == first.token
    assert row(exporter, "data").references == ("ref-a", "ref-b")


def test_no_attachment_has_the_name_of_an_earlier_one_of_the_same_node(exporter: Manager) -> None:
    exporter.save("data")
    seen = set()
    for _ in range(3):
        exporter.attach("data", NODE, mode=EXCLUSIVE)
        seen.add(row(exporter, "data").token)
        exporter.detach("data", NODE)
    assert len(seen) == 3


def test_a_node_that_was_preempted_gets_another_name_when_it_takes_the_volume_back(exporter: Manager) -> None:
    exporter.save("data")
    exporter.attach("data", NODE, mode=EXCLUSIVE)
    first = row(exporter, "data")
    for number, node in enumerate(("worker-2", NODE), 2):
        exporter.attach("data", node, mode=EXCLUSIVE, version=number, preempt=True)
    assert row(exporter, "data").token != first.token


def test_a_reservation_of_the_same_mode_does_not_cover_a_preempted_attachment(exporter: Manager) -> None:
    exporter.save("data")
    exporter.attach("data", NODE, mode=SHARED)
    exporter.attach("data", "worker-2", mode=EXCLUSIVE, version=2, preempt=True)
    exporter.attach("data", "worker-3", mode=SHARED, version=3, preempt=True)
    volume = exporter.server.store.get(VOLUMES, "data")
    assert volume is not None
    assert volume.reservation.covers(row(exporter, "data", "worker-3"))
    assert volume.reservation.allows(NODE, row(exporter, "data").mode)
    assert not volume.reservation.covers(row(exporter, "data"))


def restarted(directory: Path) -> Iterator[Manager]:
    with running(settings_in(directory)) as manager:
        manager.server.clients.has_exports = True
        manager.server.clients.install()
        yield manager


def test_a_start_forgets_nodes_without_a_volume_and_no_others(tmp_path: Path, loops: FakeLoopDevices) -> None:
    with running(settings_in(tmp_path)) as manager:
        manager.server.clients.has_exports = True
        for volume, node in (("one", "worker-1"), ("two", "worker-2")):
            manager.save(volume)
            manager.attach(volume, node)
        manager.detach("two", "worker-2")
    for manager in restarted(tmp_path):
        assert {client.name for client in manager.server.store.all(CLIENTS)} == {"node-1", "node-2", "worker-1"}


def test_a_start_keeps_a_node_whose_device_is_not_reported_as_detached(exporter: Manager) -> None:
    exporter.save("data")
    exporter.attach("data", NODE)
    exporter.server.clients.report(row(exporter, "data"), 4, io_enabled=1, export=EXPORT)
    exporter.server.store.write(lambda change: change.delete(ATTACHMENTS, exporter.uuid("data"), NODE))
    exporter.server.clients.install()
    assert exporter.server.store.get(CLIENTS, NODE) is not None
    assert exporter.report("data", NODE)["vol_status"] == 4
