# SPDX-License-Identifier: Apache-2.0
"""The node's use-cases in this process, over real loop devices; and devices that go wrong in ways of their own."""

from __future__ import annotations

import contextlib
import os
import subprocess
import uuid
from collections.abc import Iterator
from pathlib import Path

from csi_driver.deadline import Deadline
from csi_driver.host.connectors.loop import LoopDevices, ReadOnlyLoops
from csi_driver.host.health import LinuxProbes
from csi_driver.host.luks import LinuxEncryption
from csi_driver.host.machine_checks import MachineTools
from csi_driver.host.mounts import LinuxMounts
from csi_driver.host.paths import LinuxPaths
from csi_driver.model import MIB, AccessMode, Capability, MountAccess
from csi_driver.node import NodePublishRequest, StageRequest
from csi_driver.node.service import assemble
from csi_driver.node.usage_records import UsageRecord, UsageRecords
from csi_driver.node_settings import NodeSettings
from csi_driver.publish_context import History, PublishContext
from tests.contract.host_machine import HostMachine, Volume, shell
from tests.reflink_pool import mount_file

SIZES = {"ext4": 64 * MIB, "xfs": 320 * MIB, "btrfs": 128 * MIB}


class RealNode:
    """Stages volumes of a machine as kubelet would; by default one that was made now and is attached first."""

    def __init__(self, machine: HostMachine) -> None:
        self.machine = machine
        self.root = machine.directory / "kubelet"
        self.root.mkdir()
        settings = NodeSettings(node_name="real", state_directory=machine.directory / "state")
        self.records = UsageRecords(machine.directory / "state")
        self.paths = LinuxPaths([self.root])
        self.use = assemble(
            devices=machine.devices,
            encryption=LinuxEncryption(machine.devices),
            read_only_devices=ReadOnlyLoops(LoopDevices()),
            mounts=LinuxMounts(self.paths.open),
            filesystems=machine.filesystems,
            paths=self.paths,
            probes=LinuxProbes(),
            tools=MachineTools([self.root]),
            settings=settings,
            records=self.records,
        )

    def staging(self, volume: Volume) -> Path:
        return self.root / f"{volume.name}.staging"

    def stage(
        self,
        volume: Volume,
        fs_type: str = "ext4",
        *,
        history: History = History.FIRST,
        attachment: int = 1,
        allowed: bool = False,
        flags: tuple[str, ...] = (),
        volume_context: dict[str, str] | None = None,
        mode: AccessMode = AccessMode.SINGLE_NODE_WRITER,
        within_s: float = 60.0,
        inherited: tuple[str, ...] | None = None,
        private: bool = False,
    ) -> Path:
        """Stage the volume; return where it is mounted. `inherited`: None = it is no copy of a volume."""
        context = PublishContext(
            volume.name, volume.uuid, attachment, history, private, format_allowed=allowed,
            populated=inherited is not None, inherited_uuids=inherited or (), private_copy=private,
        )  # fmt: skip
        capability = Capability(MountAccess(fs_type, flags), mode)
        request = StageRequest(
            volume_id(volume), str(self.staging(volume)), capability, context.as_map(),
            volume_context or {},
        )  # fmt: skip
        self.use.stage.stage(request, deadline=Deadline.after(within_s))
        return self.staging(volume)

    def unstage(self, volume: Volume) -> None:
        self.use.stage.unstage(volume_id(volume), str(self.staging(volume)), deadline=Deadline.after(60))

    def publish(
        self,
        volume: Volume,
        pod: str = "pod-1",
        fs_type: str = "ext4",
        *,
        mode: AccessMode = AccessMode.SINGLE_NODE_WRITER,
        read_only: bool = False,
    ) -> Path:
        """Publish the staged volume to a pod; return where it is mounted."""
        target = self.root / pod
        context = PublishContext(volume.name, volume.uuid, 1, History.FIRST)
        request = NodePublishRequest(
            volume_id(volume), str(self.staging(volume)), str(target),
            Capability(MountAccess(fs_type), mode), read_only, context.as_map(), {},
        )  # fmt: skip
        self.use.publish.publish(request, deadline=Deadline.after(60))
        return target

    def unpublish(self, volume: Volume, pod: str = "pod-1") -> None:
        self.use.publish.unpublish(volume_id(volume), str(self.root / pod), deadline=Deadline.after(60))

    def record(self, volume: Volume) -> UsageRecord | None:
        return self.records.read(volume.uuid)


def volume_id(volume: Volume) -> str:
    return f"zone:{volume.name}:{volume.uuid}"


def write(volume: Volume, offset: int, data: bytes) -> None:
    """Write to the volume's device and see it on disk."""
    fd = os.open(volume.loop.node or volume.file, os.O_RDWR | os.O_SYNC)
    try:
        os.pwrite(fd, data, offset)
    finally:
        os.close(fd)


_PIECE_BYTES = 65536


def everything(volume: Volume) -> dict[int, bytes]:
    """Return all that is not zero on the device, in pieces of 64 KiB by their offset."""
    device = os.open(volume.loop.node or volume.file, os.O_RDONLY)
    os.fsync(device)
    os.close(device)
    found: dict[int, bytes] = {}
    with volume.file.open("rb", buffering=0) as file:
        at, size = 0, volume.file.stat().st_size
        while at < size:
            try:
                at = os.lseek(file.fileno(), at, os.SEEK_DATA) // _PIECE_BYTES * _PIECE_BYTES
            except OSError:  # nothing but holes from here on
                break
            piece = os.pread(file.fileno(), _PIECE_BYTES, at)
            if piece.strip(b"\0"):
                found[at] = piece
            at += _PIECE_BYTES
    return found


def clear(volume: Volume) -> None:
    """Make the volume blank again."""
    shell("blkdiscard", "--force", str(volume.loop.node))


@contextlib.contextmanager
def volumes_with_a_bad_block(machine: HostMachine, offsets: list[int], size_bytes: int) -> Iterator[dict[int, Volume]]:
    """Give a volume for each offset that is blank but for one block, there, which the kernel answers with EIO.

    Their files lie on a btrfs, which keeps a checksum of every block; the block's bytes are then changed below it.
    """
    image, ground = machine.directory / "ground.img", machine.directory / "ground"
    with image.open("wb") as made:
        made.truncate(512 * MIB)
    shell("mkfs.btrfs", "-q", str(image))
    ground.mkdir()
    patterns = {offset: os.urandom(4096) for offset in offsets}
    volumes: dict[int, Volume] = {}
    mount_file(image, ground)
    try:
        for offset, pattern in patterns.items():
            with (ground / f"{offset}.img").open("wb") as file:
                file.truncate(size_bytes)
                file.seek(offset)
                file.write(pattern)
        shell("umount", str(ground))
        spoil(image, list(patterns.values()))
        mount_file(image, ground)
        for offset in offsets:
            name, identity, image_file = f"csi-{offset}", str(uuid.uuid4()), ground / f"{offset}.img"
            loop = machine.loops.attach(
                image_file, machine.device_root / name, label=f"{identity}/test", read_only=False
            )
            machine.write_status(name, identity, size_bytes)
            volumes[offset] = Volume(name, identity, image_file, loop)
        yield volumes
    finally:
        for volume in volumes.values():
            machine.loops.detach(volume.loop)
        subprocess.run(["umount", str(ground)], check=False, capture_output=True)


def spoil(image: Path, patterns: list[bytes]) -> None:
    """Change the blocks that hold these patterns, wherever the filesystem put them."""
    data = image.read_bytes()
    with image.open("r+b") as file:
        for pattern in patterns:
            at = data.find(pattern)
            assert at >= 0
            file.seek(at)
            file.write(b"\0" * 4096)
        file.flush()
        os.fsync(file.fileno())
