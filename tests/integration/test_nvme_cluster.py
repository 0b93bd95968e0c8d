# SPDX-License-Identifier: Apache-2.0
"""Volumes of a cluster over NVMe/TCP, through manager, controllers and nodes; the suite csi-sanity over all of them."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from csi_driver.deadline import Deadline
from csi_driver.model import AccessMode
from csi_driver.rpc.client import CallFailed
from tests.contract.host_machine import mounts_below
from tests.integration.cluster import ClusterVolume
from tests.integration.nvme_cluster import NvmeCluster, nvme_cluster
from tests.integration.rig import MIB, digest, filesystem, fill, raw_block, until_done
from tests.reflink_pool import XFS, mounted
from tests.sanity.test_csi_sanity import GROUPS, NEVER_OFFERED, assert_all_that_apply_pass, find_csi_sanity, run

pytestmark = pytest.mark.root

READERS, WRITERS = AccessMode.MULTI_NODE_READER_ONLY, AccessMode.MULTI_NODE_MULTI_WRITER
UNKNOWN_NODE = "Controller Service [Controller Server] ControllerPublishVolume should fail when the node does not exist"
"""A node is known by its first attachment, and no other program tells the storage machine of nodes: the id is valid."""


@pytest.fixture
def cluster(tmp_path: Path) -> Iterator[NvmeCluster]:
    with nvme_cluster(tmp_path / "cluster") as made:
        yield made


def synced(target: Path) -> str:
    """Write data that is on the storage machine when this returns; return its digest."""
    wanted = fill(target if target.is_block_device() else target / "data", MIB)
    fd = os.open(target, os.O_RDONLY)
    os.fsync(fd)
    os.close(fd)
    os.sync()
    return wanted


def is_clean(cluster: NvmeCluster) -> bool:
    """Whether no node has anything of a volume."""
    machines = cluster.machines.values()
    return not mounts_below(cluster.paths) and not any(each.kernel.subsystems for each in machines)


def test_a_volume_moves_from_one_node_to_another_and_back(cluster: NvmeCluster) -> None:
    volume = cluster.volume()
    wanted = synced(volume.up("node-1"))
    for node, other in (("node-1", "node-2"), ("node-2", "node-1")):
        volume.down(node)
        assert is_clean(cluster)
        assert digest(volume.up(other) / "data", MIB) == wanted
    volume.down("node-1")
    volume.delete()
    assert not cluster.kernel.subsystems
    assert not cluster.kernel.ports


def test_each_call_may_be_repeated(cluster: NvmeCluster) -> None:
    volume = cluster.volume()
    for _ in range(2):
        volume.attach("node-1")
        volume.stage("node-1")
        volume.publish("node-1")
    assert len(cluster.machines["node-1"].kernel.subsystems) == 1
    for _ in range(2):
        volume.put_away("node-1")
    for _ in range(2):
        volume.detach("node-1")
    assert is_clean(cluster)


def test_a_staged_volume_is_not_detached(cluster: NvmeCluster) -> None:
    volume = cluster.volume()
    wanted = synced(volume.up("node-1"))
    with pytest.raises(CallFailed):
        volume.detach("node-1")
    with pytest.raises(CallFailed, match="FAILED_PRECONDITION"):
        volume.attach("node-2")
    assert digest(volume.target("node-1") / "data", MIB) == wanted
    volume.put_away("node-1")
    # The detachment has begun above; it continues when the manager sees that the connection is closed.
    assert Deadline.after(60).wait_until(lambda: is_detached(volume, "node-1"))
    volume.up("node-2")
    volume.down("node-2")


def is_detached(volume: ClusterVolume, node: str) -> bool:
    try:
        volume.detach(node)
    except CallFailed:
        return False
    return True


def test_a_raw_volume_is_used_on_two_nodes_at_once(cluster: NvmeCluster) -> None:
    volume = cluster.volume(raw_block(WRITERS))
    targets = [volume.up(node) for node in ("node-1", "node-2")]
    wanted = synced(targets[0])
    assert digest(targets[1], MIB) == wanted
    volume.down("node-1")
    assert digest(targets[1], MIB) == wanted
    volume.down("node-2")
    assert is_clean(cluster)


def test_a_volume_is_read_under_several_volumes_on_one_node_and_on_another(cluster: NvmeCluster) -> None:
    volume = cluster.volume(namespace="team-a")
    wanted = synced(volume.up("node-1"))
    volume.down("node-1")
    reader = filesystem("ext4", READERS, "ro")
    first, second = (volume.copy(namespace, reader) for namespace in ("team-b", "team-c"))
    placed = [(first, "node-1"), (second, "node-1"), (first, "node-2")]
    for each, node in placed:
        assert digest(each.up(node) / "data", MIB) == wanted
    assert [len(machine.kernel.subsystems) for machine in cluster.machines.values()] == [1, 1]
    for each, node in placed:
        each.down(node)
    assert is_clean(cluster)


def test_a_volume_grows_in_use(cluster: NvmeCluster) -> None:
    volume = cluster.volume(filesystem("xfs"))
    before = size_of(volume.up("node-1"))
    assert cluster.controllers[0].expand_volume(volume.id, 2 << 30) == (2 << 30, True)
    cluster.nodes["node-1"].expand_on_node(
        volume.id, volume.target("node-1"), required_bytes=2 << 30, staging=volume.staging("node-1")
    )
    assert size_of(volume.target("node-1")) >= before + (900 << 20)
    volume.down("node-1")
    volume.up("node-2")
    volume.down("node-2")


def size_of(path: Path) -> int:
    found = os.statvfs(path)
    return found.f_blocks * found.f_frsize


def test_the_volume_of_a_dead_node_moves_and_its_late_writes_do_not_arrive(cluster: NvmeCluster) -> None:
    volume = cluster.volume()
    wanted = synced(volume.up("node-1"))
    cluster.cut_off("node-1")
    # The administrator's taint makes the orchestrator detach; until the node is known to be lost, nobody gets it.
    with pytest.raises(CallFailed):
        volume.detach("node-1")
    with pytest.raises(CallFailed):
        volume.attach("node-2")
    cluster.pass_time(20)
    with contextlib.suppress(CallFailed):
        volume.detach("node-1")
    # The manager's own look may have released it between two reads of the controller, which then asks for a retry.
    until_done(lambda: volume.attach("node-2"))
    assert digest(volume.up("node-2") / "data", MIB) == wanted
    again = synced(volume.target("node-2"))
    cluster.reach_again("node-1")
    volume.put_away("node-1")
    assert not cluster.machines["node-1"].kernel.subsystems
    assert digest(volume.target("node-2") / "data", MIB) == again
    volume.down("node-2")
    assert is_clean(cluster)


def test_a_node_that_was_away_for_a_moment_goes_on(cluster: NvmeCluster) -> None:
    volume = cluster.volume()
    wanted = synced(volume.up("node-1"))
    cluster.cut_off("node-1")
    cluster.reach_again("node-1")
    assert digest(volume.target("node-1") / "data", MIB) == wanted
    synced(volume.target("node-1"))
    volume.down("node-1")
    assert is_clean(cluster)


@pytest.mark.parametrize("access", ["mount", "block"])
def test_the_suite_passes_over_nvme_tcp_and_leaves_nothing(tmp_path: Path, access: str) -> None:
    program = find_csi_sanity()
    if program is None:
        pytest.skip("csi-sanity is not installed: `make test` installs it")
    with mounted(tmp_path, XFS, size_mib=4096) as place, nvme_cluster(place / "d", nodes=("node",)) as cluster:
        (cluster.directory / "controller.sock").symlink_to(cluster.directory / "controller-1.sock")
        report = run(
            program,
            cluster,
            f"--csi.mountdir={cluster.paths}/mnt",
            f"--csi.stagingdir={cluster.paths}/stage",
            f"--csi.testvolumeaccesstype={access}",
            f"--ginkgo.skip={UNKNOWN_NODE.rpartition('] ')[2]}",
        )
        assert UNKNOWN_NODE not in report.passed
        skipped = replace(report, skipped=report.skipped - {UNKNOWN_NODE})
        assert_all_that_apply_pass(skipped, not_offered=GROUPS | NEVER_OFFERED, least=93)
        assert is_clean(cluster)
        assert list(cluster.controllers[0].volumes()) == []
        assert not cluster.kernel.subsystems
        assert not cluster.kernel.ports
