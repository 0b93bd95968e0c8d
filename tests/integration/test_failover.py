# SPDX-License-Identifier: Apache-2.0
"""A node is lost and its pods start elsewhere: one writer at any time, and nothing of the lost node's reaches the
volume afterwards. Real processes, loop devices, filesystems; two controllers and three storage clients on one machine.
"""

from __future__ import annotations

import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from csi_driver.model import AccessMode
from csi_driver.rpc.client import CallFailed
from tests.integration.cluster import Cluster, ClusterVolume
from tests.integration.rig import MIB, digest, filesystem, fill, findmnt, in_parallel, raw_block, wait_for

pytestmark = pytest.mark.root

DETACHED, ATTACHED = 2, 4
"""vol_status of a client's report"""


@pytest.fixture(autouse=True)
def everybody_is_back(cluster: Cluster) -> Iterator[None]:
    yield
    for client in cluster.clients:
        cluster.find_again(client)


def lost_with(cluster: Cluster, volume: ClusterVolume) -> Path:
    """Let node-1 have the volume, with data on it and more on the way, and lose it; return where it has it still."""
    target = volume.up("node-1")
    cluster.lose("node-1")
    return target


def given_up(cluster: Cluster, volume: ClusterVolume) -> None:
    volume.detach("node-1")
    assert cluster.report(volume, "node-1")["vol_status"] == ATTACHED  # type: ignore[index]


def is_off(cluster: Cluster, volume: ClusterVolume) -> bool:
    """Return whether node-1's client has let go of the volume, and the management has heard of it."""
    report = cluster.report(volume, "node-1")
    return not volume.device("node-1").exists() and (report is None or report["vol_status"] == DETACHED)


def flush(root: Path) -> None:
    """Write out what the kernel has in memory of one filesystem; what becomes of it is another matter."""
    subprocess.run(["sync", "--file-system", str(root)], check=False, capture_output=True)


def written(path: Path, data: bytes) -> str:
    """Append to a file or overwrite a device's head, and sync; returns "kept" or "refused"."""
    flags = os.O_WRONLY | (0 if path.is_block_device() else os.O_CREAT | os.O_APPEND)
    try:
        descriptor = os.open(path, flags)
    except OSError:
        return "refused"
    try:
        os.write(descriptor, data)
        os.fsync(descriptor)
    except OSError:
        return "refused"
    finally:
        os.close(descriptor)
    return "kept"


@pytest.mark.parametrize("fs_type", ["ext4", "xfs"])
def test_a_pod_of_a_lost_node_goes_on_elsewhere_with_its_data(cluster: Cluster, fs_type: str) -> None:
    volume = cluster.volume(filesystem(fs_type))
    old = lost_with(cluster, volume)
    first = fill(old / "first", MIB)
    (old / "unwritten").write_bytes(os.urandom(MIB))
    given_up(cluster, volume)
    new = volume.up("node-2", controller=1)
    assert digest(new / "first", MIB) == first
    second = fill(new / "second", 4 * MIB)
    # The lost node goes on: its pod writes, and what it had in memory is flushed.
    assert written(old / "first", b"x" * MIB) == "refused"
    flush(old)
    cluster.find_again("node-1")
    volume.put_away("node-1")
    assert findmnt(volume.staging("node-1")) is None
    wait_for(lambda: is_off(cluster, volume), "the stale device to go")
    assert cluster.holders(volume) == ["node-2"]
    volume.down("node-2")
    again = volume.up("node-1")
    assert (digest(again / "first", MIB), digest(again / "second", 4 * MIB)) == (first, second)
    volume.down("node-1")
    check = {"ext4": ["e2fsck", "-fn"], "xfs": ["xfs_repair", "-n", "-f"]}[fs_type]
    assert subprocess.run([*check, str(volume.file)], capture_output=True, check=False).returncode == 0
    volume.delete()


def test_a_raw_device_of_a_lost_node_is_written_by_its_new_node_alone(cluster: Cluster) -> None:
    volume = cluster.volume(raw_block())
    old = lost_with(cluster, volume)
    held = os.open(old, os.O_RDWR)  # as kubelet does for as long as the pod is there
    os.pwrite(held, b"y" * MIB, 0)
    given_up(cluster, volume)
    new = volume.up("node-2")
    wanted = fill(new, MIB)
    assert written(old, b"x" * MIB) == "refused"
    cluster.find_again("node-1")
    assert written(old, b"x" * MIB) == "refused"
    os.close(held)
    assert digest(volume.file, MIB) == wanted
    volume.put_away("node-1")
    wait_for(lambda: is_off(cluster, volume), "the stale device to go")
    volume.down("node-2")
    assert digest(volume.file, MIB) == wanted
    volume.delete()


def test_a_pod_that_hangs_on_the_lost_node_does_not_keep_its_dead_mount(cluster: Cluster) -> None:
    volume = cluster.volume()
    old = lost_with(cluster, volume)
    fill(old / "data", MIB)
    with (old / "data").open("r+b", buffering=0) as hanging:
        given_up(cluster, volume)
        new = volume.up("node-2")
        wanted = fill(new / "data", MIB)
        cluster.find_again("node-1")
        wait_for(lambda: cluster.report(volume, "node-1")["ioEnabled"] == 0, "the client to be back")  # type: ignore[index]
        volume.put_away("node-1")
        assert findmnt(volume.staging("node-1")) is None
        with pytest.raises(OSError, match="Input/output error"):
            hanging.write(b"x" * MIB)  # its filesystem was shut down with the mount
    wait_for(lambda: is_off(cluster, volume), "the stale device to go")
    assert digest(new / "data", MIB) == wanted
    volume.down("node-2")
    assert digest(volume.up("node-2") / "data", MIB) == wanted
    volume.down("node-2")
    volume.delete()


def test_a_lost_node_keeps_its_volume_until_it_is_given_up(cluster: Cluster) -> None:
    volume = cluster.volume()
    old = lost_with(cluster, volume)
    with pytest.raises(CallFailed, match=r"FAILED_PRECONDITION.*the volume was not released there"):
        volume.attach("node-2")
    assert written(old / "file", b"data") == "kept"
    cluster.find_again("node-1")
    volume.down("node-1")
    volume.delete()


def test_two_controllers_give_a_lost_nodes_volume_to_one_node(cluster: Cluster) -> None:
    volume = cluster.volume()
    lost_with(cluster, volume)
    given_up(cluster, volume)

    def take(controller: int, node: str) -> str | None:
        try:
            cluster.controllers[controller].attach(
                volume.id, cluster.ids[node], volume.capability, volume_context=volume.context
            )
        except CallFailed:
            return None
        return node

    winners = [won for won in in_parallel([lambda: take(0, "node-2"), lambda: take(1, "node-3")]) if won is not None]
    assert winners == cluster.holders(volume)
    assert len(winners) == 1
    cluster.find_again("node-1")
    volume.put_away("node-1")
    volume.detach(str(winners[0]))
    wait_for(lambda: is_off(cluster, volume), "the stale device to go")
    volume.delete()


def test_a_writer_of_a_lost_node_makes_way_for_readers(cluster: Cluster) -> None:
    volume = cluster.volume()
    old = lost_with(cluster, volume)
    wanted = fill(old / "data", MIB)
    given_up(cluster, volume)
    volume.capability = filesystem("ext4", AccessMode.MULTI_NODE_READER_ONLY)
    new = volume.up("node-2")
    assert digest(new / "data", MIB) == wanted
    assert written(old / "data", b"x") == "refused"
    cluster.find_again("node-1")
    volume.put_away("node-1")
    wait_for(lambda: is_off(cluster, volume), "the stale device to go")
    assert digest(new / "data", MIB) == wanted
    volume.down("node-2")
    volume.delete()


def test_a_volume_of_a_lost_node_is_not_deleted(cluster: Cluster) -> None:
    volume = cluster.volume()
    lost_with(cluster, volume)
    given_up(cluster, volume)
    with pytest.raises(CallFailed, match=r"FAILED_PRECONDITION.*still attached"):
        volume.delete()
    cluster.find_again("node-1")
    volume.put_away("node-1")
    wait_for(lambda: is_off(cluster, volume), "the device to go")
    volume.delete()
