# SPDX-License-Identifier: Apache-2.0
"""The whole program while its storage client is away, and the label that it keeps, on a node of its own."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path

import pytest

from csi_driver.rpc.client import CallFailed
from csi_driver.rpc.pb import csi_pb2 as pb
from tests.contract.pki import Authority
from tests.contract.small_api_server import Cluster, served
from tests.contract.test_kubernetes_api import LABEL, NODE
from tests.integration.rig import Rig, Volume, raw_block, running, wait_for


@pytest.fixture(scope="module")
def lone_rig(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Rig]:
    with running(tmp_path_factory.mktemp("evidence") / "d", "--volume-health", "--restart-window", "0.05") as rig:
        yield rig


@contextlib.contextmanager
def client_away(rig: Rig) -> Iterator[None]:
    """Take the storage client's files away, as an upgrade of it does, while its devices stay."""
    files = rig.directory / "proc"
    away = files.rename(rig.directory / "proc.away")
    try:
        yield
    finally:
        away.rename(files)


def reasons(volume: Volume) -> list[str]:
    request = pb.NodeGetVolumeHealthRequest(volume_id=volume.id)
    return [entry.reason for entry in volume.rig.node.node.NodeGetVolumeHealth(request).volume_health.health_statuses]


def storage_reasons(rig: Rig) -> list[str]:
    answer = rig.node.node.NodeGetStorageHealth(pb.NodeGetStorageHealthRequest())
    return [entry.reason for entry in answer.backend_health]


def test_a_node_outlives_the_upgrade_of_its_client(lone_rig: Rig) -> None:
    rig, volume = lone_rig, lone_rig.volume()
    volume.up()
    (volume.target / "file").write_text("kept")
    node_id = rig.node_id()
    assert (reasons(volume), storage_reasons(rig)) == ([], [])
    with client_away(rig):
        assert rig.node_id() == node_id
        assert len(storage_reasons(rig)) == 1
        rig.kill("node")
        with pytest.raises(CallFailed, match="UNAVAILABLE"):
            rig.node_id()
        other = volume.publish(volume.other_target("other"))
        assert (other / "file").read_text() == "kept"
        assert reasons(volume) == []
        volume.unpublish(other)
        volume.unpublish()
        volume.unstage()
    assert rig.node_id() == node_id
    volume.stage()
    volume.publish()
    assert (volume.target / "file").read_text() == "kept"
    volume.down()
    volume.delete()


def test_troubles_are_told_by_both_services(lone_rig: Rig) -> None:
    volume = lone_rig.volume(raw_block())
    volume.up()
    ask = lone_rig.controller.controller.ControllerGetVolumeHealth
    told = ask(pb.ControllerGetVolumeHealthRequest(volume_id=volume.id)).volume_health
    assert (told.volume_id, list(told.health_statuses), reasons(volume)) == (volume.id, [], [])
    listed = lone_rig.controller.controller.ControllerListVolumeHealth(pb.ControllerListVolumeHealthRequest())
    assert [entry.volume_id for entry in listed.entries] == [volume.id]
    size = volume.file.stat().st_size
    with volume.file.open("r+b") as file:
        file.truncate(size // 2)
        assert reasons(volume) == ["BackingFileCutShort"]
        file.truncate(size)
    assert reasons(volume) == []
    volume.down()
    volume.delete()


def test_a_node_labels_itself(lone_rig: Rig, tmp_path: Path) -> None:
    authority = Authority(tmp_path / "pki", "cluster")
    cluster = Cluster({NODE: {"metadata": {"labels": {}}}})
    with served(cluster, authority, authority.issue("apiserver"), tmp_path) as api:
        lone_rig.spawn(
            *lone_rig.role_argv("node"),
            *("--endpoint", str(tmp_path / "n.sock"), "--node-name", "node-1", "--node-label"),
            *("--kubernetes-host", "127.0.0.1", "--kubernetes-port", str(api.port)),
            *("--kubernetes-account", str(api.account)),
            log=tmp_path / "node.log",
        )
        wait_for(lambda: cluster.objects[NODE]["metadata"]["labels"].get(LABEL) == "ready", "the label of the node")
