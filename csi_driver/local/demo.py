# SPDX-License-Identifier: Apache-2.0
"""`nvmesh-csi demo`: create, use, expand and delete volumes on this machine, step by step, and clean up.

It sends CSI requests to the roles of `nvmesh-csi local`; findmnt, lsblk and losetup show the effect of each.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from types import FrameType

from csi_driver.deadline import SYSTEM_CLOCK, Clock, Deadline
from csi_driver.errors import DriverError, HostFailure, PreconditionFailed
from csi_driver.host.processes import ChildProcesses, find_tool, run
from csi_driver.local.settings import DemoSettings, LocalSettings
from csi_driver.local.supervisor import TOOLS, Paths, Role, Supervisor, last_line, why_impossible
from csi_driver.model import GIB, MIB
from csi_driver.rpc.client import CallFailed, CsiClient
from csi_driver.rpc.pb import csi_pb2 as pb

_UNDO_S = 60.0
_TOOL_TIMEOUT_S = 20.0
_RETRIED = ("ABORTED", "UNAVAILABLE", "DEADLINE_EXCEEDED", "CANCELLED")
_NOTHING_FOUND = (0, 1, 32)
"""findmnt(8) and lsblk(8) exit with 1 when nothing matched, lsblk with 32 when no device was found."""
_FINDMNT = ("findmnt", "--output", "TARGET,SOURCE,FSTYPE,SIZE,USED,OPTIONS", "--mountpoint")
SIGNALS = (signal.SIGINT, signal.SIGTERM)
_LSBLK = ("lsblk", "--output", "NAME,MAJ:MIN,SIZE,RO,TYPE")


class Interrupted(BaseException):
    """SIGINT or SIGTERM came. Like KeyboardInterrupt it is no Exception: gRPC catches those around its callbacks."""


@dataclass(slots=True)
class Cleanup:
    """Requests that undo steps. Each is idempotent, so it is added before the step that it undoes."""

    clock: Clock = SYSTEM_CLOCK
    requests: dict[str, Callable[[], object]] = field(default_factory=dict)
    failures: list[str] = field(default_factory=list)

    def run(self, timeout_s: float = _UNDO_S) -> None:
        """Send all requests, the last first. One whose step still runs is retried until the time is up."""
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
        output = run([*argv, str(path)], timeout_s=_TOOL_TIMEOUT_S, accept=_NOTHING_FOUND).stdout
        for line in output.decode(errors="replace").splitlines():
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


def run_demo(settings: DemoSettings) -> int:
    """Run the demo; return the exit status: 0 when every step worked and nothing is left, 130 when interrupted."""
    start = time.monotonic()
    screen = Screen(lambda line: print(line, flush=True))
    try:
        if problem := why_impossible(("findmnt", "lsblk", "losetup", *TOOLS)):
            raise PreconditionFailed(problem)
        directory, is_new = prepare_directory(settings.directory)
    except DriverError as error:
        print(f"nvmesh-csi demo: {error}", file=sys.stderr, flush=True)
        return 1
    for each in SIGNALS:
        signal.signal(each, interrupt)
    status = _run(settings, directory, screen)
    left = _sweep(directory, is_new)
    for leftover in left:
        screen.write(f"left behind: {leftover}")
    if left:
        return 1
    screen.write(f"\nclean: no mount, loop device, process or file is left ({time.monotonic() - start:.1f} s in all)")
    return status


def prepare_directory(configured: Path | None) -> tuple[Path, bool]:
    """Return the directory to work in, and whether it is new. Raises `PreconditionFailed` when it is not empty."""
    if configured is None:
        return Path(tempfile.mkdtemp(prefix="nvmesh-csi-demo-", dir="/tmp")), True
    directory = Paths(configured).directory
    try:
        is_new = not directory.exists()
        directory.mkdir(parents=True, exist_ok=True)
        if os.listdir(directory):
            raise PreconditionFailed(f"--directory {directory} is not empty; the demo removes all files in it")
    except OSError as error:
        raise PreconditionFailed(f"--directory {directory} cannot be used: {error.strerror}") from error
    return directory, is_new


def _run(settings: DemoSettings, directory: Path, screen: Screen) -> int:
    local = LocalSettings(
        directory=directory,
        size_bytes=settings.size_bytes,
        overcommit=True,
        start_timeout_s=settings.start_timeout_s,
        program=settings.program,
    )
    defaults = ("ext4", "xfs") if find_tool("mkfs.xfs") is not None else ("ext4",)
    status, cleanup = 0, Cleanup()
    with closing(Supervisor(local, ChildProcesses(), screen.write)) as supervisor:
        try:
            screen.write(f"\n== storage manager, controller and node in {directory}")
            with screen.step("start") as words:
                supervisor.start()
                words.append(", ".join(f"{role} is process {supervisor.pid(role)}" for role in Role))
            limit_s = settings.step_timeout_s
            controller, node = (CsiClient(path, timeout_s=limit_s) for path in supervisor.paths.sockets.values())
            with controller, node:
                try:
                    on = Session(controller, node, directory, settings, screen, cleanup)
                    for fs_type in (*(settings.fs_types or defaults), ""):
                        show_life(on, fs_type)
                finally:
                    ignore_signals()
                    cleanup.run()
        except Interrupted:
            screen.write("\ninterrupted: cleaned up")
            status = 130
        except (DriverError, CallFailed, OSError) as error:
            screen.write(f"\nnvmesh-csi demo: {error}")
            for role, log in supervisor.paths.logs.items():
                screen.write(f"  {role}: {last_line(log)}")
            status = 1
        ignore_signals()
    for failure in cleanup.failures:
        screen.write(f"could not undo {failure}")
    return status


def _sweep(directory: Path, is_new: bool) -> list[str]:
    """Remove the files unless the kernel still uses some of them; return the leftovers, a sentence each."""
    # The pid file of a process is removed once it has ended.
    left = [f"process {file.read_text().strip()}" for file in directory.glob("*.pid")]
    try:
        real = directory.resolve()  # the kernel shows paths without links
        left += [f"mount {path}" for path in mounts_below(real)]
        left += [f"loop device {device}" for device in loops_below(real)]
        if not left:
            for child in directory.iterdir():
                shutil.rmtree(child) if child.is_dir() and not child.is_symlink() else child.unlink()
            if is_new:
                directory.rmdir()
            return []
    except (DriverError, OSError) as error:
        left.append(str(error))
    return [*left, f"directory {directory}"]


def mounts_below(directory: Path) -> list[str]:
    rows = _rows("filesystems", "findmnt", "--json", "--list", "--output", "TARGET")
    return [row["target"] for row in rows if Path(row["target"]).is_relative_to(directory)]


def loops_below(directory: Path) -> list[str]:
    rows = _rows("loopdevices", "losetup", "--json", "--list", "--output", "NAME,BACK-FILE")
    return [row["name"] for row in rows if Path(row["back-file"] or "").is_relative_to(directory)]


def _rows(table: str, *argv: str) -> list[dict[str, str]]:
    output = run(argv, timeout_s=_TOOL_TIMEOUT_S, accept=_NOTHING_FOUND).stdout
    return list(json.loads(output)[table]) if output.strip() else []


def size(size_bytes: int) -> str:
    return f"{size_bytes / GIB:.2f} GiB" if size_bytes >= GIB else f"{size_bytes / MIB:.1f} MiB"


def interrupt(number: int, frame: FrameType | None) -> None:
    """Handle a signal: raise `Interrupted`, and ignore further ones, so that the cleanup is not interrupted."""
    ignore_signals()
    raise Interrupted


def ignore_signals() -> None:
    for each in SIGNALS:
        signal.signal(each, signal.SIG_IGN)
