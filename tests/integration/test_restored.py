# SPDX-License-Identifier: Apache-2.0
"""Snapshots, restores and clones on one node through all real processes, on a pool with reflinks."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from csi_driver.model import AccessMode, Capability
from csi_driver.rpc.pb import csi_pb2 as pb
from tests.client import CsiClient, capability_message
from tests.contract.host_machine import shell
from tests.integration.cluster import ClusterVolume, clustered
from tests.integration.rig import GIB, MIB, Rig, Volume, digest, filesystem, filesystem_size, fill, raw_block, running
from tests.reflink_pool import mounted

pytestmark = pytest.mark.root

FILESYSTEMS = pytest.mark.parametrize("fs_type", ["ext4", "xfs", "btrfs"])


@pytest.fixture(scope="module")
def rig(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Rig]:
    with mounted(tmp_path_factory.mktemp("reflink"), size_mib=40 << 10) as pool, running(pool / "d") as rig:
        yield rig


def snapshot_of(controller: CsiClient, volume_id: str) -> str:
    """Cut the volume as it is now; return the snapshot's id."""
    request = pb.CreateSnapshotRequest(name=f"{volume_id}-snapshot", source_volume_id=volume_id)
    found = controller.call(controller.controller.CreateSnapshot, request).snapshot
    assert (found.ready_to_use, found.size_bytes) == (True, GIB)
    return found.snapshot_id


def delete_snapshot(controller: CsiClient, snapshot_id: str) -> None:
    controller.call(controller.controller.DeleteSnapshot, pb.DeleteSnapshotRequest(snapshot_id=snapshot_id))


def create_from(
    controller: CsiClient, name: str, capability: Capability, content: pb.VolumeContentSource, size: int = GIB
) -> pb.Volume:
    request = pb.CreateVolumeRequest(
        name=name, volume_capabilities=[capability_message(capability)],
        capacity_range=pb.CapacityRange(required_bytes=size), volume_content_source=content,
    )  # fmt: skip
    return controller.call(controller.controller.CreateVolume, request).volume


def made_from(source: Volume, name: str, capability: Capability, *, snapshot: str = "", size: int = GIB) -> Volume:
    """Create a volume from the snapshot, or from the volume."""
    content = pb.VolumeContentSource(volume=pb.VolumeContentSource.VolumeSource(volume_id=source.id))
    if snapshot:
        content = pb.VolumeContentSource(snapshot=pb.VolumeContentSource.SnapshotSource(snapshot_id=snapshot))
    made = create_from(source.rig.controller, f"{source.name}-{name}", capability, content, size)
    return Volume(
        source.rig, f"{source.name}-{name}", made.volume_id, capability, source.paths, dict(made.volume_context)
    )


@FILESYSTEMS
def test_a_volume_in_use_is_restored_and_cloned_on_its_own_node(rig: Rig, fs_type: str) -> None:
    volume = rig.volume(filesystem(fs_type))
    wanted = fill(volume.up() / "data", MIB)
    snapshot = snapshot_of(rig.controller, volume.id)
    (volume.target / "data").unlink()
    shell("sync", "--file-system", str(volume.target))
    restored = made_from(volume, "restored", filesystem(fs_type), snapshot=snapshot, size=2 * GIB)
    clone = made_from(volume, "clone", filesystem(fs_type))
    assert digest(restored.up() / "data", MIB) == wanted
    assert not (clone.up() / "data").exists()
    assert filesystem_size(restored.target) > 1.8 * GIB
    delete_snapshot(rig.controller, snapshot)
    for each in (volume, restored, clone):
        fill(each.target / "own", MIB)
    own = digest(restored.target / "own", MIB)
    volume.end()
    restored.down()
    assert digest(restored.up() / "own", MIB) == own
    restored.end()
    clone.end()


@FILESYSTEMS
def test_a_snapshot_is_backed_up_as_a_raw_device_and_restored_to_a_filesystem(rig: Rig, fs_type: str) -> None:
    """As backup programs do: filesystem to block, block to block, and block to filesystem."""
    volume = rig.volume(filesystem(fs_type))
    wanted = fill(volume.up() / "data", MIB)
    snapshot = snapshot_of(rig.controller, volume.id)
    read, written = made_from(volume, "read", raw_block(), snapshot=snapshot), rig.volume(raw_block())
    shell("dd", f"if={read.up()}", f"of={written.up()}", "bs=4M", "oflag=direct")
    read.end()
    restored = made_from(written, "restored", filesystem(fs_type))
    written.down()
    assert digest(restored.up() / "data", MIB) == wanted
    delete_snapshot(rig.controller, snapshot)
    for each in (restored, volume):
        each.end()
    written.delete()


@FILESYSTEMS
def test_a_snapshot_is_read_while_the_volume_is_written_on_the_same_node(rig: Rig, fs_type: str) -> None:
    """Its reader has a copy of its own, whose log is replayed; what was restored stays as it was cut."""
    volume = rig.volume(filesystem(fs_type))
    wanted = fill(volume.up() / "data", MIB)
    snapshot = snapshot_of(rig.controller, volume.id)
    restored = made_from(volume, "read", filesystem(fs_type, AccessMode.MULTI_NODE_READER_ONLY), snapshot=snapshot)
    for _ in range(2):
        restored.attach(read_only=True)
        assert restored.publish_context["privateCopy"] == "true"
        restored.stage()
        restored.publish(read_only=True)
        fill(volume.target / "data", MIB)
        assert digest(restored.target / "data", MIB) == wanted
        with pytest.raises(OSError, match="Read-only file system"):
            (restored.target / "new").touch()
        assert "private" in str(restored.file)
        restored.down()
    delete_snapshot(rig.controller, snapshot)
    restored.delete()
    volume.end()


def test_a_snapshot_is_read_as_a_raw_device_that_takes_no_writes(rig: Rig) -> None:
    volume = rig.volume(raw_block())
    wanted = fill(volume.up(), MIB)
    snapshot = snapshot_of(rig.controller, volume.id)
    restored = made_from(volume, "read", raw_block(AccessMode.MULTI_NODE_READER_ONLY), snapshot=snapshot)
    restored.attach(read_only=True)
    restored.stage()
    restored.publish(read_only=True)
    fill(volume.target, MIB)
    assert digest(restored.target, MIB) == wanted
    with pytest.raises(OSError, match=r"not permitted|Read-only|denied"):
        fill(restored.target, MIB)
    restored.end()
    delete_snapshot(rig.controller, snapshot)
    volume.end()


def test_a_reader_of_a_snapshot_outlives_every_process(rig: Rig) -> None:
    volume = rig.volume(filesystem("xfs"))
    wanted = fill(volume.up() / "data", MIB)
    snapshot = snapshot_of(rig.controller, volume.id)
    restored = made_from(volume, "read", filesystem("xfs", AccessMode.MULTI_NODE_READER_ONLY), snapshot=snapshot)
    restored.attach(read_only=True)
    restored.stage()
    for role in ("node", "storage", "controller"):
        rig.kill(role)
        restored.attach(read_only=True)
        restored.stage()
        restored.publish(read_only=True)
        assert digest(restored.target / "data", MIB) == wanted
    restored.end()
    delete_snapshot(rig.controller, snapshot)
    volume.end()


@FILESYSTEMS
def test_several_nodes_read_one_snapshot_each_with_a_copy_of_its_own(tmp_path: Path, fs_type: str) -> None:
    with (
        mounted(tmp_path, size_mib=40 << 10) as pool,
        clustered(pool / "c", nodes=("node-1", "node-2", "node-3")) as cluster,
    ):
        controller = cluster.controllers[0]
        source = cluster.volume(filesystem(fs_type))
        wanted = fill(source.up("node-1") / "data", MIB)
        snapshot = snapshot_of(controller, source.id)
        content = pb.VolumeContentSource(snapshot=pb.VolumeContentSource.SnapshotSource(snapshot_id=snapshot))
        reading = filesystem(fs_type, AccessMode.MULTI_NODE_READER_ONLY)
        made = create_from(controller, "readers", reading, content)
        readers = ClusterVolume(cluster, made.volume_id, reading, dict(made.volume_context))
        for node in cluster.nodes:
            readers.up(node)
        fill(source.target("node-1") / "data", MIB)
        assert [digest(readers.target(node) / "data", MIB) for node in cluster.nodes] == [wanted] * 3
        for node in cluster.nodes:
            readers.down(node)
        readers.delete()
        source.down("node-1")
        source.delete()
