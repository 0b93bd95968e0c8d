# SPDX-License-Identifier: Apache-2.0
"""The steps of `nvmesh-csi demo`: the life of a volume by CSI requests, and the requests that undo it."""

from __future__ import annotations

import errno
import hashlib
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

from csi_driver.deadline import SYSTEM_CLOCK, Clock, Deadline
from csi_driver.errors import HostFailure
from csi_driver.host.processes import run
from csi_driver.local.settings import DemoSettings
from csi_driver.model import GIB, MIB
from csi_driver.rpc.client import CallFailed, CsiClient
from csi_driver.rpc.pb import csi_pb2 as pb

_UNDO_S = 60.0
_TOOL_TIMEOUT_S = 20.0
_RETRIED = ("ABORTED", "UNAVAILABLE", "DEADLINE_EXCEEDED", "CANCELLED")
_NOTHING_FOUND = (0, 1, 32)
"""findmnt(8) and lsblk(8) exit with 1 when nothing matched, lsblk with 32 when no device was found."""
_FINDMNT = ("findmnt", "--output", "TARGET,SOURCE,FSTYPE,SIZE,USED,OPTIONS", "--mountpoint")
_LSBLK = ("lsblk", "--output", "NAME,MAJ:MIN,SIZE,RO,TYPE")


@dataclass(slots=True)
class Cleanup:
    """Requests that undo steps. Each is idempotent, so it is added before the step that it undoes."""

    clock: Clock = SYSTEM_CLOCK
    requests: dict[str, Callable[[], object]] = field(default_factory=dict)
    failures: list[str] = field(default_factory=list)

    def run(self, timeout_s: float = _UNDO_S) -> None:
        """Send all requests, the last first. While its step still runs, a request is retried until the time is up."""
        deadline = Deadline.after(timeout_s, self.clock)
        while self.requests:
            name, request = self.requests.popitem()
            if (failure := self._retry(request, deadline)) is not None:
                self.failures.append(f"{name}: {failure}")

    def _retry(self, request: Callable[[], object], deadline: Deadline) -> CallFailed | None:
        while True:
            try:
                request()
            except CallFailed as error:
                if error.code not in _RETRIED or deadline.expired():
                    return error
                self.clock.sleep(0.2)
            else:
                return None


@dataclass(slots=True)
class Screen:
    """Prints the steps, each line at once."""

    write: Callable[[str], None]
    monotonic: Callable[[], float] = time.monotonic

    @contextmanager
    def step(self, name: str) -> Iterator[list[str]]:
        """Print the name of a step and its duration; text appended to the list becomes part of the line."""
        words: list[str] = []
        start = self.monotonic()
        yield words
        self.write(f"{self.monotonic() - start:8.3f} s  {name:<26}{' '.join(words)}".rstrip())

    def show(self, argv: Sequence[str], path: Path) -> None:
        for line in output_of([*argv, str(path)]).splitlines():
            self.write(f"{'':12}| {line}")


@dataclass(slots=True)
class Session:
    """What all volumes of a demo share. Staging and target paths lie in `directory`."""

    controller: CsiClient
    node: CsiClient
    directory: Path
    settings: DemoSettings
    screen: Screen
    cleanup: Cleanup


@dataclass(slots=True)
class Volume:
    """One volume. Every request is printed as a step."""

    on: Session
    label: str
    capability: pb.VolumeCapability
    id: str = ""
    publish_context: Mapping[str, str] = field(default_factory=dict)

    def path(self, name: str) -> Path:
        return self.on.directory / f"{self.label}-{name}"

    def create(self) -> None:
        on, here, client = self.on, self.on.node.node_info(), self.on.controller
        topology = pb.TopologyRequirement(requisite=[here.accessible_topology])
        with on.screen.step("CreateVolume") as words:
            request = pb.CreateVolumeRequest(
                name=f"demo-{self.label}",
                capacity_range=pb.CapacityRange(required_bytes=on.settings.volume_bytes),
                volume_capabilities=[self.capability],
                accessibility_requirements=topology if here.accessible_topology.segments else None,
            )
            created = client.call(client.controller.CreateVolume, request).volume
            self.id = created.volume_id
            words += [size(created.capacity_bytes), f"as {self.id}"]
        undo, delete = on.cleanup.requests, pb.DeleteVolumeRequest(volume_id=self.id)
        undo["DeleteVolume"] = partial(client.call, client.controller.DeleteVolume, delete)
        detach = pb.ControllerUnpublishVolumeRequest(volume_id=self.id, node_id=here.node_id)
        undo["ControllerUnpublishVolume"] = partial(client.call, client.controller.ControllerUnpublishVolume, detach)
        with on.screen.step("ControllerPublishVolume") as words:
            attachment = pb.ControllerPublishVolumeRequest(
                volume_id=self.id,
                node_id=here.node_id,
                volume_capability=self.capability,
                volume_context=created.volume_context,
            )
            self.publish_context = client.call(client.controller.ControllerPublishVolume, attachment).publish_context
            words.append(f"on node {here.node_id}")
        on.screen.show(_LSBLK, on.directory / "dev" / self.id.split(":")[1])

    def stage(self) -> None:
        on, client, staging = self.on, self.on.node, self.path("staging")
        staging.mkdir(exist_ok=True)
        undo = pb.NodeUnstageVolumeRequest(volume_id=self.id, staging_target_path=str(staging))
        on.cleanup.requests["NodeUnstageVolume"] = partial(client.call, client.node.NodeUnstageVolume, undo)
        with on.screen.step("NodeStageVolume"):
            request = pb.NodeStageVolumeRequest(
                volume_id=self.id,
                staging_target_path=str(staging),
                volume_capability=self.capability,
                publish_context=self.publish_context,
            )
            client.call(client.node.NodeStageVolume, request)
        on.screen.show(_FINDMNT, staging)

    def publish(self, name: str, *, read_only: bool = False) -> Path:
        on, client, target = self.on, self.on.node, self.path(name)
        undo = pb.NodeUnpublishVolumeRequest(volume_id=self.id, target_path=str(target))
        name = f"NodeUnpublishVolume {target.name}"
        on.cleanup.requests[name] = partial(client.call, client.node.NodeUnpublishVolume, undo)
        with on.screen.step("NodePublishVolume") as words:
            request = pb.NodePublishVolumeRequest(
                volume_id=self.id,
                staging_target_path=str(self.path("staging")),
                target_path=str(target),
                volume_capability=self.capability,
                readonly=read_only,
                publish_context=self.publish_context,
            )
            client.call(client.node.NodePublishVolume, request)
            words.append(f"at {target.name}{', read-only' if read_only else ''}")
        on.screen.show(_FINDMNT, target)
        return target

    def expand(self, target: Path) -> bool:
        """Expand volume and filesystem; False when the filesystem grows at the next NodeStageVolume only."""
        on, controller, node = self.on, self.on.controller, self.on.node
        capacity = pb.CapacityRange(required_bytes=on.settings.expanded_bytes)
        with on.screen.step("ControllerExpandVolume") as words:
            request = pb.ControllerExpandVolumeRequest(
                volume_id=self.id, capacity_range=capacity, volume_capability=self.capability
            )
            expanded = controller.call(controller.controller.ControllerExpandVolume, request)
            words.append(f"to {size(expanded.capacity_bytes)}")
        if expanded.node_expansion_required:
            with on.screen.step("NodeExpandVolume") as words:
                growth = pb.NodeExpandVolumeRequest(
                    volume_id=self.id,
                    volume_path=str(target),
                    staging_target_path=str(self.path("staging")),
                    capacity_range=capacity,
                )
                try:
                    node.call(node.node.NodeExpandVolume, growth)
                except CallFailed as error:
                    if error.code != "FAILED_PRECONDITION":
                        raise
                    words.append(f"{error.code}: {error.message}")
                    return False
                words.append("while in use")
            on.screen.show(*((_FINDMNT, target) if target.is_dir() else (_LSBLK, target)))
        return True

    def show_stats(self, target: Path) -> None:
        with self.on.screen.step("NodeGetVolumeStats") as words:
            client = self.on.node
            request = pb.NodeGetVolumeStatsRequest(volume_id=self.id, volume_path=str(target))
            for usage in client.call(client.node.NodeGetVolumeStats, request).usage:
                if usage.unit == pb.VolumeUsage.BYTES:
                    words.append(f"{size(usage.used)} used of {size(usage.total)}")
                else:
                    words.append(f"and {usage.used} inodes of {usage.total}")

    def undo(self, *steps: str) -> None:
        for step in steps:
            with self.on.screen.step(step):
                self.on.cleanup.requests[step]()
            del self.on.cleanup.requests[step]


def show_life(on: Session, fs_type: str) -> None:
    """Show a volume from its creation to its deletion, its data checked after every change; no `fs_type`: raw block."""
    label = fs_type or "block"
    capability = pb.VolumeCapability(
        access_mode=pb.VolumeCapability.AccessMode(mode=pb.VolumeCapability.AccessMode.SINGLE_NODE_WRITER),
        mount=pb.VolumeCapability.MountVolume(fs_type=fs_type) if fs_type else None,
        block=None if fs_type else pb.VolumeCapability.BlockVolume(),
    )
    volume = Volume(on, label, capability)
    on.screen.write(f"\n== {f'a filesystem volume: {fs_type}' if fs_type else 'a raw block volume'}")
    volume.create()
    volume.stage()
    target = volume.publish("target")
    data = target / "data" if fs_type else target
    digest = _write(on, data)
    if not volume.expand(target) and fs_type:
        on.screen.write(f"{'':12}  the next NodeStageVolume grows it before it is mounted:")
        volume.undo(f"NodeUnpublishVolume {target.name}", "NodeUnstageVolume")
        volume.stage()
        volume.publish("target")
    _check(on, data, digest)
    reader = volume.publish("reader", read_only=True)
    read_only = reader / "data" if fs_type else reader
    _check(on, read_only, digest)
    _require_refusal(on, read_only)
    volume.show_stats(target)
    volume.undo(f"NodeUnpublishVolume {reader.name}", f"NodeUnpublishVolume {target.name}")
    volume.undo("NodeUnstageVolume", "ControllerUnpublishVolume", "DeleteVolume")


def _write(on: Session, path: Path) -> str:
    data = os.urandom(on.settings.write_bytes)
    flags = os.O_WRONLY | (0 if path.is_block_device() else os.O_CREAT)
    with on.screen.step("write") as words, os.fdopen(os.open(path, flags, 0o644), "wb") as stream:
        stream.write(data)
        stream.flush()
        os.fsync(stream.fileno())
        words.append(f"{size(len(data))} to {path.relative_to(on.directory)}")
    return hashlib.sha256(data).hexdigest()


def _check(on: Session, path: Path, digest: str) -> None:
    with on.screen.step("read back") as words, path.open("rb") as stream:
        found = hashlib.sha256(stream.read(on.settings.write_bytes)).hexdigest()
        if found != digest:
            raise HostFailure(f"{path}: expected the data that was written, sha256 {digest}, got {found}")
        words.append(f"{path.relative_to(on.directory)}: the same data")


def _require_refusal(on: Session, path: Path) -> None:
    with on.screen.step("write, read-only") as words:
        try:
            with path.open("r+b", buffering=0) as stream:
                stream.write(b"x")
                os.fsync(stream.fileno())
        except OSError as error:
            words.append(f"refused: {errno.errorcode.get(error.errno or 0, str(error.errno))}")
        else:
            raise HostFailure(f"{path}: expected a read-only volume to refuse the write, but it was accepted")


def size(size_bytes: int) -> str:
    return f"{size_bytes / GIB:.2f} GiB" if size_bytes >= GIB else f"{size_bytes / MIB:.1f} MiB"


def output_of(argv: Sequence[str]) -> str:
    """Run one of the tools that show mounts and devices."""
    return run(argv, timeout_s=_TOOL_TIMEOUT_S, accept=_NOTHING_FOUND).stdout.decode(errors="replace")
