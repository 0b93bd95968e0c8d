# SPDX-License-Identifier: Apache-2.0
"""What a backup program does with changed blocks, over the real processes: a full copy, and copies of what changed."""

from __future__ import annotations

import os
import random
from collections.abc import Iterator
from pathlib import Path

import grpc
import pytest

from csi_driver.rpc.pb import csi_pb2 as pb
from csi_driver.rpc.pb import csi_pb2_grpc
from tests.integration.rig import MIB, Rig, Volume, raw_block, running
from tests.reflink_pool import mounted

pytestmark = pytest.mark.root

SIZE = 64 * MIB
"""The first part of the volume, where all is written."""
NO_SNAPSHOT = "single-zone-cluster:snap-none:11111111-1111-1111-1111-111111111111"


@pytest.fixture(scope="module")
def rig(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Rig]:
    with mounted(tmp_path_factory.mktemp("changed"), size_mib=1024) as place, running(place / "d") as rig:
        yield rig


class Backup:
    """The calls of a backup program on one raw volume."""

    def __init__(self, rig: Rig, volume: Volume) -> None:
        self.volume = volume
        self.channel = grpc.insecure_channel(f"unix:{rig.directory}/controller.sock")
        self.controller = csi_pb2_grpc.ControllerStub(self.channel)
        self.metadata = csi_pb2_grpc.SnapshotMetadataStub(self.channel)
        self.identity = csi_pb2_grpc.IdentityStub(self.channel)

    def cut(self, name: str) -> str:
        request = pb.CreateSnapshotRequest(source_volume_id=self.volume.id, name=f"{self.volume.name}-{name}")
        return str(self.controller.CreateSnapshot(request, timeout=60).snapshot.snapshot_id)

    def delete(self, snapshot_id: str) -> None:
        self.controller.DeleteSnapshot(pb.DeleteSnapshotRequest(snapshot_id=snapshot_id), timeout=60)

    def allocated(self, snapshot_id: str, **more: int) -> list[pb.BlockMetadata]:
        request = pb.GetMetadataAllocatedRequest(snapshot_id=snapshot_id, **more)  # type: ignore[arg-type]
        return [
            block
            for answer in self.metadata.GetMetadataAllocated(request, timeout=60)
            for block in answer.block_metadata
        ]

    def delta(self, base_id: str, target_id: str, **more: int) -> list[pb.BlockMetadata]:
        request = pb.GetMetadataDeltaRequest(base_snapshot_id=base_id, target_snapshot_id=target_id, **more)  # type: ignore[arg-type]
        return [
            block for answer in self.metadata.GetMetadataDelta(request, timeout=60) for block in answer.block_metadata
        ]


@pytest.fixture
def backup(rig: Rig) -> Iterator[Backup]:
    volume = rig.volume(raw_block(), size=SIZE)
    volume.up()
    made = Backup(rig, volume)
    yield made
    made.channel.close()
    volume.end()


def write(device: Path, offset: int, data: bytes) -> None:
    fd = os.open(device, os.O_WRONLY)
    try:
        os.pwrite(fd, data, offset)
        os.fsync(fd)
    finally:
        os.close(fd)


def copy(source: Path, target: bytearray, blocks: list[pb.BlockMetadata]) -> None:
    """Bring a copy up to date, as a backup program does."""
    with source.open("rb") as file:
        for block in blocks:
            file.seek(block.byte_offset)
            target[block.byte_offset : block.byte_offset + block.size_bytes] = file.read(block.size_bytes)


def test_a_backup_of_what_changed_is_the_volume(backup: Backup) -> None:
    device, chance = backup.volume.target, random.Random(1)
    kept = bytearray(SIZE)
    before = ""
    for number in range(4):
        for _ in range(20):
            write(device, chance.randrange(SIZE // 4096) * 4096, os.urandom(4096 * chance.randrange(1, 40))[:65536])
        snapshot = backup.cut(str(number))
        # Nobody writes meanwhile, so the device has what the snapshot has.
        blocks = backup.delta(before, snapshot, max_results=3) if before else backup.allocated(snapshot)
        copy(device, kept, blocks)
        with device.open("rb") as file:
            is_equal = file.read(SIZE) == kept  # no text of both, if they differ
        assert is_equal
        assert sum(block.size_bytes for block in blocks) < SIZE
        before = snapshot


def test_an_interrupted_stream_goes_on_where_it_ended(backup: Backup) -> None:
    base = backup.cut("base")
    write(backup.volume.target, 1 * MIB, b"x" * MIB)
    write(backup.volume.target, 8 * MIB, b"x" * MIB)
    target = backup.cut("target")
    blocks = backup.delta(base, target, starting_offset=8 * MIB + 4096)
    assert [(block.byte_offset, block.size_bytes) for block in blocks] == [(8 * MIB + 4096, MIB - 4096)]


def refusal_of(backup: Backup, base_id: str, target_id: str, **more: int) -> grpc.StatusCode:
    with pytest.raises(grpc.RpcError) as refusal:
        backup.delta(base_id, target_id, **more)
    code = refusal.value.code()
    assert isinstance(code, grpc.StatusCode)
    return code


def test_refusals_have_the_codes_of_the_specification(rig: Rig, backup: Backup) -> None:
    base, target = backup.cut("base"), backup.cut("target")
    assert refusal_of(backup, base, target, starting_offset=1 << 40) is grpc.StatusCode.OUT_OF_RANGE
    assert refusal_of(backup, base, target, starting_offset=-1) is grpc.StatusCode.OUT_OF_RANGE
    assert refusal_of(backup, NO_SNAPSHOT, target) is grpc.StatusCode.NOT_FOUND
    assert refusal_of(backup, base, "nonsense") is grpc.StatusCode.NOT_FOUND
    other = Backup(rig, rig.volume(raw_block(), size=SIZE))
    assert refusal_of(backup, other.cut("other"), target) is grpc.StatusCode.INVALID_ARGUMENT
    backup.delete(base)
    assert refusal_of(backup, base, target) is grpc.StatusCode.NOT_FOUND
    other.channel.close()
    other.volume.end()


def test_the_driver_says_that_it_tells_changes(backup: Backup) -> None:
    answer = backup.identity.GetPluginCapabilities(pb.GetPluginCapabilitiesRequest(), timeout=60)
    kinds = {each.service.type for each in answer.capabilities}
    assert pb.PluginCapability.Service.SNAPSHOT_METADATA_SERVICE in kinds
