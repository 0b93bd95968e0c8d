# SPDX-License-Identifier: Apache-2.0
"""Snapshots, restores and clones on one node through all real processes, on a pool with reflinks."""

from __future__ import annotations

import subprocess
from collections.abc import Iterator

import pytest

from csi_driver.model import Capability
from csi_driver.rpc.pb import csi_pb2 as pb
from tests.client import capability_message
from tests.contract.host_machine import shell
from tests.integration.rig import GIB, MIB, Rig, Volume, digest, filesystem, filesystem_size, fill, raw_block, running

pytestmark = pytest.mark.root

FILESYSTEMS = pytest.mark.parametrize("fs_type", ["ext4", "xfs", "btrfs"])


@pytest.fixture(scope="module")
def rig(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Rig]:
    directory = tmp_path_factory.mktemp("reflink")
    image, pool = directory / "pool.img", directory / "pool"
    with image.open("wb") as made:
        made.truncate(40 * GIB)
    shell("mkfs.xfs", "-q", "-m", "reflink=1", str(image))
    pool.mkdir()
    shell("mount", "-o", "loop", str(image), str(pool))
    try:
        with running(pool / "d") as rig:
            yield rig
    finally:
        subprocess.run(["umount", "--lazy", str(pool)], check=False, capture_output=True)


def snapshot_of(volume: Volume) -> str:
    """Cut the volume as it is now; return the snapshot's id."""
    request = pb.CreateSnapshotRequest(name=f"{volume.name}-snapshot", source_volume_id=volume.id)
    found = volume.rig.controller.call(volume.rig.controller.controller.CreateSnapshot, request).snapshot
    assert (found.ready_to_use, found.size_bytes) == (True, GIB)
    return found.snapshot_id


def delete_snapshot(rig: Rig, snapshot_id: str) -> None:
    rig.controller.call(rig.controller.controller.DeleteSnapshot, pb.DeleteSnapshotRequest(snapshot_id=snapshot_id))


def made_from(source: Volume, name: str, capability: Capability, *, snapshot: str = "", size: int = GIB) -> Volume:
    """Create a volume from the snapshot, or from the volume."""
    content = pb.VolumeContentSource(volume=pb.VolumeContentSource.VolumeSource(volume_id=source.id))
    if snapshot:
        content = pb.VolumeContentSource(snapshot=pb.VolumeContentSource.SnapshotSource(snapshot_id=snapshot))
    request = pb.CreateVolumeRequest(
        name=f"{source.name}-{name}", volume_capabilities=[capability_message(capability)],
        capacity_range=pb.CapacityRange(required_bytes=size), volume_content_source=content,
    )  # fmt: skip
    made = source.rig.controller.call(source.rig.controller.controller.CreateVolume, request).volume
    return Volume(source.rig, request.name, made.volume_id, capability, source.paths, dict(made.volume_context))


@FILESYSTEMS
def test_a_volume_in_use_is_restored_and_cloned_on_its_own_node(rig: Rig, fs_type: str) -> None:
    volume = rig.volume(filesystem(fs_type))
    wanted = fill(volume.up() / "data", MIB)
    snapshot = snapshot_of(volume)
    (volume.target / "data").unlink()
    shell("sync", "--file-system", str(volume.target))
    restored = made_from(volume, "restored", filesystem(fs_type), snapshot=snapshot, size=2 * GIB)
    clone = made_from(volume, "clone", filesystem(fs_type))
    assert digest(restored.up() / "data", MIB) == wanted
    assert not (clone.up() / "data").exists()
    assert filesystem_size(restored.target) > 1.8 * GIB
    delete_snapshot(rig, snapshot)
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
    snapshot = snapshot_of(volume)
    read, written = made_from(volume, "read", raw_block(), snapshot=snapshot), rig.volume(raw_block())
    shell("dd", f"if={read.up()}", f"of={written.up()}", "bs=4M", "oflag=direct")
    read.end()
    restored = made_from(written, "restored", filesystem(fs_type))
    written.down()
    assert digest(restored.up() / "data", MIB) == wanted
    delete_snapshot(rig, snapshot)
    for each in (restored, volume):
        each.end()
    written.delete()
