# SPDX-License-Identifier: Apache-2.0
"""NodeGetInfo and the node's part of Probe."""

from __future__ import annotations

import uuid
from pathlib import Path

import pytest

from csi_driver.errors import PreconditionFailed
from csi_driver.model import BlockAccess, ClusterNames, MountAccess
from csi_driver.node import NodeInfo
from csi_driver.node.node_info import NodeIdentity, NodeZone
from csi_driver.node.usage_records import UsageRecords
from csi_driver.node_settings import NodeSettings
from tests.fakes.node import BLOCK, EXT4, NAME, OTHER_UUID, UUID, FakeNode

SETTINGS = NodeSettings("node-1", Path("/nowhere"), zone="z1", topology_key="example.com/zone", max_volumes_per_node=7)


def test_the_storage_clients_uuid_is_the_node_id() -> None:
    node = FakeNode(settings=SETTINGS)
    node.host.client = "client-uuid"
    assert node.use.identity.info() == NodeInfo("client-uuid", 7, {"example.com/zone": "z1"})


def test_the_node_name_is_the_node_id_where_there_is_no_storage_client() -> None:
    node = FakeNode(settings=SETTINGS)
    node.host.client = None
    assert node.use.identity.info().node_id == "node-1"


@pytest.mark.parametrize(
    ("configured", "of_client", "told"), [(0, 0, 0), (7, 0, 7), (0, 1024, 1024), (7, 1024, 7), (2000, 1024, 1024)]
)
def test_the_volume_limit_is_never_above_what_the_client_can(configured: int, of_client: int, told: int) -> None:
    node = FakeNode(settings=NodeSettings("node-1", Path("/nowhere"), max_volumes_per_node=configured))
    node.host.client_limit = of_client
    assert node.use.identity.info().max_volumes == told
    node.host.upgrade_client()
    assert node.use.identity.info().max_volumes == told


@pytest.mark.parametrize(
    ("configured", "of_client", "foreign", "told"),
    [(0, 1024, 24, 1000), (16, 1024, 6, 10), (16, 0, 16, 1), (16, 0, 40, 1), (0, 0, 5, 0)],
)
def test_what_others_attached_is_taken_off_the_limit_and_asked_for_each_time(
    configured: int, of_client: int, foreign: int, told: int
) -> None:
    node = FakeNode(settings=NodeSettings("node-1", Path("/nowhere"), max_volumes_per_node=configured))
    node.host.client_limit = of_client
    before = node.use.identity.info().max_volumes
    node.host.unnamed_attachments = tuple(str(uuid.uuid4()) for _ in range(foreign))
    assert node.use.identity.info().max_volumes == told
    node.host.unnamed_attachments = ()
    assert node.use.identity.info().max_volumes == before


@pytest.mark.parametrize("access", [BLOCK, EXT4])
def test_static_volumes_of_csi_are_not_subtracted_from_the_limit(
    access: BlockAccess | MountAccess,
) -> None:
    node = FakeNode(settings=SETTINGS)
    node.host.attach(NAME, UUID)
    node.host.unnamed_attachments = (UUID, OTHER_UUID)
    assert node.use.identity.info().max_volumes == 5
    node.stage(access=access)
    node.publish(access=access)
    assert node.use.identity.info().max_volumes == 6


def test_a_record_that_cannot_be_read_is_one_of_csi(tmp_path: Path) -> None:
    node = FakeNode(settings=SETTINGS)
    records = UsageRecords(tmp_path)
    records.path_of(UUID).parent.mkdir()
    records.path_of(UUID).write_text("torn")
    node.host.unnamed_attachments = (UUID, OTHER_UUID)
    zone = NodeZone(given="z", topology_key=None, node_name="n", client_servers=tuple, clusters=ClusterNames)
    identity = NodeIdentity(
        devices=node.host.devices, tools=node.host.tools, zone=zone, records=records, settings=SETTINGS
    )
    assert identity.info().max_volumes == 6


def test_the_problems_of_the_machine_are_passed_on() -> None:
    node = FakeNode(settings=SETTINGS)
    node.host.present_problems = ["mkfs.ext4 is not installed"]
    assert list(node.use.identity.problems()) == ["mkfs.ext4 is not installed"]


def test_an_ambiguous_zone_makes_the_node_unready_and_fails_probe() -> None:
    node = FakeNode(settings=SETTINGS)
    zone = NodeZone(
        given=None, topology_key=None, node_name="n", client_servers=tuple,
        clusters=lambda: ClusterNames({"a": ("m1",), "b": ("m2",)}),
    )  # fmt: skip
    identity = NodeIdentity(
        devices=node.host.devices, tools=node.host.tools, zone=zone, records=node.records, settings=SETTINGS
    )
    with pytest.raises(PreconditionFailed, match="expected one of a, b"):
        identity.info()
    (problem,) = identity.problems()
    assert "expected one of a, b" in problem
