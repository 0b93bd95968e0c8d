# SPDX-License-Identifier: Apache-2.0
"""Nodes that attach for themselves, without an attacher: real processes, and a node that is killed in between."""

from __future__ import annotations

import re
import subprocess
from collections.abc import Iterator

import pytest

from csi_driver.model import AccessMode
from csi_driver.rpc.client import CallFailed
from tests.integration.cluster import Cluster, ClusterVolume, clustered
from tests.integration.rig import GIB, MIB, digest, filesystem, fill, findmnt, raw_block
from tests.sanity.test_csi_sanity import find_csi_sanity

pytestmark = pytest.mark.root


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    with clustered(tmp_path_factory.mktemp("own") / "d", clients=("node-1", "node-2"), attach_by_node=True) as running:
        yield running


def up(volume: ClusterVolume, node: str) -> None:
    volume.stage(node)
    volume.publish(node)


def test_a_pod_starts_moves_and_ends_with_nobody_to_attach(cluster: Cluster) -> None:
    volume = cluster.volume(filesystem("ext4"))
    up(volume, "node-1")
    wanted = fill(volume.target("node-1") / "data", MIB)
    assert cluster.holders(volume) == ["node-1"]
    with pytest.raises(CallFailed, match="FAILED_PRECONDITION"):
        volume.stage("node-2")
    volume.put_away("node-1")
    assert cluster.holders(volume) == []
    assert not volume.device("node-1").exists()
    up(volume, "node-2")
    assert digest(volume.target("node-2") / "data", MIB) == wanted
    volume.put_away("node-2")
    volume.delete()


def test_a_raw_device_is_attached_by_its_node(cluster: Cluster) -> None:
    volume = cluster.volume(raw_block())
    up(volume, "node-1")
    wanted = fill(volume.target("node-1"), MIB)
    volume.put_away("node-1")
    assert digest(volume.file, MIB) == wanted
    volume.delete()


def test_a_node_that_dies_in_between_goes_on(cluster: Cluster) -> None:
    volume = cluster.volume(filesystem("xfs"))
    volume.stage("node-1")
    cluster.kill_node("node-1")
    cluster.start_node("node-1")
    volume.stage("node-1")
    wanted = fill(volume.publish("node-1") / "data", MIB)
    cluster.nodes["node-1"].unpublish(volume.id, volume.target("node-1"))
    cluster.kill_node("node-1")
    # Unmounted and not yet detached: as if it had died between the two.

    subprocess.run(["umount", str(volume.staging("node-1"))], check=True)
    cluster.start_node("node-1")
    cluster.nodes["node-1"].unstage(volume.id, volume.staging("node-1"))
    assert cluster.holders(volume) == []
    up(volume, "node-2")
    assert digest(volume.target("node-2") / "data", MIB) == wanted
    volume.put_away("node-2")
    assert findmnt(volume.staging("node-2")) is None
    volume.delete()


def test_two_namespaces_of_one_node_hold_two_references(cluster: Cluster) -> None:
    volume = cluster.volume(filesystem("ext4"), namespace="team-a")
    up(volume, "node-1")
    volume.put_away("node-1")

    reader = filesystem("ext4", AccessMode.MULTI_NODE_READER_ONLY)
    first, second = volume.copy("team-b", reader), volume.copy("team-c", reader)
    up(first, "node-1")
    up(second, "node-1")
    first.put_away("node-1")
    assert cluster.holders(volume) == ["node-1"]
    second.put_away("node-1")
    assert cluster.holders(volume) == []
    volume.delete()


@pytest.mark.skipif(find_csi_sanity() is None, reason="csi-sanity is not installed: `make test` installs it")
def test_the_conformance_suite_passes_without_an_attacher(cluster: Cluster) -> None:
    paths = cluster.paths / "sanity"
    paths.mkdir()
    done = subprocess.run(
        [
            str(find_csi_sanity()),
            f"--csi.endpoint=unix://{cluster.directory}/node-1.sock",
            f"--csi.controllerendpoint=unix://{cluster.directory}/controller-1.sock",
            f"--csi.mountdir={paths}/mnt",
            f"--csi.stagingdir={paths}/stage",
            "--csi.testvolumeaccesstype=block",
            f"--csi.testvolumesize={GIB}",
            f"--csi.testvolumeexpandsize={2 * GIB}",
            "--ginkgo.no-color",
        ],
        capture_output=True,
        text=True,
        timeout=400,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-8000:]
    passed = re.search(r"SUCCESS! -- ([0-9]+) Passed \| 0 Failed", done.stdout)
    assert passed is not None
    assert int(passed[1]) >= 50
    assert list(cluster.controllers[0].volumes()) == []
    assert not list(cluster.directory.glob("node-*/dev/*"))
