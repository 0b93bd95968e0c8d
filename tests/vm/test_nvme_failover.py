# SPDX-License-Identifier: Apache-2.0
"""Volumes over NVMe/TCP while machines die and cables are pulled: three emulated machines, started by run-machines.

A writer logs each write that the kernel has acknowledged. After a failover every acknowledged write is there, and
nothing that the lost node still had to write.
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import MappingProxyType

import pytest

from csi_driver.model import AccessMode
from csi_driver.rpc.client import CallFailed
from tests.integration.rig import filesystem, raw_block
from tests.vm.machines import Running, until
from tests.vm.nvme_cluster import DATA_NETWORKS, Node, NvmeCluster, Placed, acknowledged, errors, goes_on, newest

GUEST = os.environ.get("NVMESH_CSI_MACHINES", "")
pytestmark = pytest.mark.skipif(not GUEST, reason="starts several emulated machines; run: make test-vm")

AIM_S = 30.0
"""From the death of a node to the first write on another one, beyond Kubernetes' own delays: printed, not asserted."""
BLOCKS = 256


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[NvmeCluster]:
    cluster = NvmeCluster(Path(GUEST), tmp_path_factory.mktemp("cluster"))
    try:
        cluster.start()
        yield cluster
    except BaseException:
        print(cluster.logs())
        raise
    finally:
        cluster.close()


@pytest.fixture
def first(cluster: NvmeCluster) -> Node:
    return cluster.nodes[0]


@pytest.fixture
def second(cluster: NvmeCluster) -> Node:
    return cluster.nodes[1]


def say(what: str) -> None:
    print(f"  {what}", flush=True)


def file_of(volume: Placed) -> Path:
    """Make the file that a writer overwrites."""
    path = volume.target / "file"
    volume.node.machine.run(f"truncate -s {BLOCKS * 4096} {path}; sync {path}")
    return path


def assert_kept(
    found: Mapping[int, tuple[str, int]],
    writer: Running,
    name: str,
    before: Mapping[int, tuple[str, int]] = MappingProxyType({}),
) -> None:
    """Assert that each block holds its last acknowledged write or a later one; else what it had before.

    A killed machine takes with it the news of its last writes: those are there without a gap after the last that is
    known, and one more may have been under way.
    """
    written, last = newest(writer), acknowledged(writer)[-1][0]
    later = {block: sequence for block, (by, sequence) in found.items() if by == name and sequence > last}
    assert sorted(later.values()) == list(range(last + 1, last + 1 + len(later)))
    for block in set(range(BLOCKS)) - set(later):
        expected = (name, written[block]) if block in written else before.get(block)
        assert found.get(block) == expected, (block, found.get(block), expected, last)


# --- a node dies -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["block", "ext4", "xfs"])
def test_the_volume_of_a_dead_node_moves_with_every_acknowledged_write(
    cluster: NvmeCluster, first: Node, second: Node, kind: str
) -> None:
    volume = cluster.volume(first, raw_block() if kind == "block" else filesystem(kind), 512 << 20)
    cluster.up(volume)
    writer = first.write(volume.target if kind == "block" else file_of(volume))
    first.machine.kill()
    died_s = time.monotonic()
    cluster.move(volume, second)
    path = volume.target if kind == "block" else volume.target / "file"
    beside = f"{path} seek={BLOCKS}" if kind == "block" else f"{volume.target}/beside"
    second.machine.run(f"dd if=/dev/zero of={beside} bs=4096 count=1 oflag=direct,dsync conv=notrunc")
    say(f"{kind}: first write {time.monotonic() - died_s:.1f} s after the death of the node (aim: {AIM_S:.0f} s)")
    found = second.read(path)
    taken_over = second.write(path)
    assert_kept(found, writer, first.name)
    cluster.boot_node(first)
    goes_on(taken_over)
    taken_over.close()
    assert_kept(second.read(path), taken_over, second.name, found)
    cluster.end(volume)


def test_a_frozen_node_that_returns_writes_nothing_more(cluster: NvmeCluster, first: Node, second: Node) -> None:
    volume = cluster.volume(first, raw_block())
    cluster.up(volume)
    # The device stays open: the kernel writes back what is dirty when it is closed last.
    overwrite = f"dd if=/dev/zero of={volume.target} bs=4096 count={BLOCKS} conv=notrunc 2>/dev/null"
    first.machine.run("echo 0 >/proc/sys/vm/dirty_writeback_centisecs")
    user = first.machine.begin("bash", "-c", f"exec 9<>{volume.target}; {overwrite}; echo dirty; sleep infinity")
    until(lambda: user.lines, "the node to have dirty pages")
    first.machine.freeze()
    cluster.move(volume, second)
    taken_over = second.write(volume.target)
    goes_on(taken_over, BLOCKS)
    first.machine.thaw()
    until(lambda: first.machine.run("sync; echo awake") == "awake", "the frozen node to return")
    goes_on(taken_over, BLOCKS)
    taken_over.close()
    assert_kept(second.read(volume.target), taken_over, second.name)
    user.close()
    leave(cluster, volume, first)
    cluster.end(volume)


def test_a_node_that_was_cut_off_gives_up_its_writes_and_can_have_the_volume_again(
    cluster: NvmeCluster, first: Node, second: Node
) -> None:
    volume = cluster.volume(first, raw_block())
    cluster.up(volume)
    writer = first.write(volume.target)
    first.machine.pull(*DATA_NETWORKS)
    cluster.move(volume, second)
    before = second.read(volume.target)
    assert_kept(before, writer, first.name)
    taken_over = second.write(volume.target)
    first.machine.plug(*DATA_NETWORKS)
    until(writer.ended, "the writer on the node that was cut off to get an error")
    assert errors(writer)
    goes_on(taken_over)
    taken_over.close()
    found = second.read(volume.target)
    assert_kept(found, taken_over, second.name, before)
    leave(cluster, volume, first)
    cluster.unmount(volume)
    cluster.move(volume, first)
    assert first.read(volume.target) == found
    cluster.end(volume)


def leave(cluster: NvmeCluster, volume: Placed, node: Node) -> None:
    """Unmount a volume on a node that has lost it, as kubelet does after the node's return."""
    cluster.retried(lambda: node.client.unpublish(volume.id, volume.target))
    cluster.retried(lambda: node.client.unstage(volume.id, volume.staging))


# --- the storage machine and the network ---------------------------------------------------------------------------


def test_a_reboot_of_the_storage_machine_is_waited_for(cluster: NvmeCluster, first: Node, second: Node) -> None:
    volumes = [cluster.volume(node, raw_block()) for node in (first, second)]
    for volume in volumes:
        cluster.up(volume)
    writers = [volume.node.write(volume.target) for volume in volumes]
    cluster.storage.kill()
    cluster.boot_storage()
    for writer in writers:
        say(f"the first write {goes_on(writer, 1):.1f} s after the manager answers")
    for volume, writer in zip(volumes, writers, strict=True):
        goes_on(writer)
        writer.close()
        assert_kept(volume.node.read(volume.target), writer, volume.node.name)
        cluster.end(volume)


def test_a_pulled_cable_is_no_error_while_there_is_another(cluster: NvmeCluster, first: Node) -> None:
    volume = cluster.volume(first, raw_block())
    cluster.up(volume)
    writer = first.write(volume.target)
    for network in DATA_NETWORKS:
        first.machine.pull(network)
        say(f"network {network} pulled: 50 writes took {goes_on(writer):.1f} s")
        goes_on(writer, 500)
        first.machine.plug(network)
        until(lambda: live_paths(first) == 2, "both paths to be live")
    writer.close()
    assert_kept(first.read(volume.target), writer, first.name)
    cluster.end(volume)


def test_a_network_that_is_lost_and_found_is_waited_for(cluster: NvmeCluster, first: Node) -> None:
    volume = cluster.volume(first, raw_block())
    cluster.up(volume)
    writer = first.write(volume.target)
    first.machine.pull(*DATA_NETWORKS)
    until(lambda: live_paths(first) == 0, "the paths to be lost")
    first.machine.plug(*DATA_NETWORKS)
    goes_on(writer)
    writer.close()
    assert_kept(first.read(volume.target), writer, first.name)
    cluster.end(volume)


def live_paths(node: Node) -> int:
    script = "for each in /sys/class/nvme/*; do grep -q tcp $each/transport && cat $each/state; done; true"
    return node.machine.run(script).split().count("live")


# --- several nodes -------------------------------------------------------------------------------------------------


def test_two_nodes_write_one_shared_block_volume_and_a_third_writer_never_gets_an_exclusive_one(
    cluster: NvmeCluster, first: Node, second: Node
) -> None:
    shared = cluster.volume(first, raw_block(AccessMode.MULTI_NODE_MULTI_WRITER))
    other = Placed(shared.id, shared.capability, shared.context, second)
    for volume in (shared, other):
        cluster.up(volume)
    writers = [volume.node.write(volume.target) for volume in (shared, other)]
    for writer in writers:
        goes_on(writer)
        writer.close()
    assert first.read(shared.target) == second.read(other.target)
    cluster.unmount(other)
    cluster.retried(lambda: cluster.controller.detach(shared.id, second.name))
    cluster.end(shared)


def test_a_connected_writer_keeps_its_volume(cluster: NvmeCluster, first: Node, second: Node) -> None:
    volume = cluster.volume(first, raw_block())
    cluster.up(volume)
    writer = first.write(volume.target)
    with pytest.raises(CallFailed) as refusal:
        cluster.controller.attach(volume.id, second.name, volume.capability, volume_context=volume.context)
    assert refusal.value.code == "FAILED_PRECONDITION"
    goes_on(writer)
    writer.close()
    cluster.end(volume)
