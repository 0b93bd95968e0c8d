"""The life of one volume through CSI calls, each shown as a step; what is half done when it ends is undone.

Speaks gRPC only through `csi_driver.rpc.client`; paths it makes lie below the directory it is given.
"""

from __future__ import annotations

import errno
import hashlib
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from csi_driver.deadline import SYSTEM_CLOCK, Clock, Deadline
from csi_driver.errors import HostFailure
from csi_driver.local.settings import DemoSettings
from csi_driver.local.show import Kernel, Screen, size
from csi_driver.model import AccessMode, BlockAccess, Capability, MountAccess
from csi_driver.rpc.client import CallFailed, CreatedVolume, CsiClient

UNDO_TIMEOUT_S = 60.0
_TRY_AGAIN = ("ABORTED", "UNAVAILABLE", "DEADLINE_EXCEEDED", "CANCELLED")


class Undo:
    """What must be called to take back what was begun. Every entry is idempotent, so it is noted before the step."""

    def __init__(self, clock: Clock = SYSTEM_CLOCK) -> None:
        self._clock = clock
        self._entries: dict[str, Callable[[], None]] = {}

    def note(self, name: str, call: Callable[[], None]) -> None:
        """Remember how to take a step back."""
        self._entries[name] = call

    def forget(self, name: str) -> None:
        """The step was taken back by itself."""
        self._entries.pop(name, None)

    def __len__(self) -> int:
        return len(self._entries)

    def run(self, timeout_s: float = UNDO_TIMEOUT_S) -> list[str]:
        """Take everything back, the last first; returns what could not be, a sentence each.

        A call that an interrupted step still keeps out (ABORTED) is repeated until the time is up.
        """
        deadline = Deadline.after(timeout_s, self._clock)
        problems: list[str] = []
        while self._entries:
            name, call = self._entries.popitem()
            problem = self._take_back(call, deadline)
            if problem is not None:
                problems.append(f"{name}: {problem}")
        return problems

    def _take_back(self, call: Callable[[], None], deadline: Deadline) -> str | None:
        while True:
            try:
                call()
            except CallFailed as error:
                if error.code not in _TRY_AGAIN or deadline.expired():
                    return str(error)
                self._clock.sleep(0.2)
            else:
                return None


@dataclass(frozen=True, slots=True)
class Stage:
    """Where the steps happen: endpoints, screen, kernel, and the directory that holds staging and target paths."""

    controller: CsiClient
    node: CsiClient
    node_id: str
    topology: dict[str, str]
    screen: Screen
    kernel: Kernel
    directory: Path
    settings: DemoSettings
    undo: Undo


class Volume:
    """One volume on its way; each method is one CSI call, shown."""

    def __init__(self, on: Stage, label: str, capability: Capability) -> None:
        self._on = on
        self._label = label
        self._capability = capability
        self._context: dict[str, str] = {}
        self._created: CreatedVolume | None = None
        self.staging = on.directory / f"{label}-staging"

    @property
    def id(self) -> str:
        """The volume's handle, once it is created."""
        if self._created is None:
            raise HostFailure(f"volume {self._label} is not created yet")
        return self._created.volume_id

    def target(self, name: str) -> Path:
        """Return a target path."""
        return self._on.directory / f"{self._label}-{name}"

    @property
    def device(self) -> Path:
        """Return where the volume's device appears."""
        return self._on.directory / "dev" / self.id.split(":")[1]

    def create(self) -> None:
        on = self._on
        with on.screen.step("CreateVolume") as words:
            requisite = [on.topology] if on.topology else []
            self._created = on.controller.create_volume(
                f"demo-{self._label}",
                required_bytes=on.settings.volume_bytes,
                capabilities=[self._capability],
                requisite=requisite,
            )
            words += [size(self._created.capacity_bytes), f"as {self.id}"]
        volume_id = self.id
        on.undo.note("DeleteVolume", lambda: on.controller.delete_volume(volume_id))

    def attach(self) -> None:
        on, volume_id = self._on, self.id
        on.undo.note("ControllerUnpublishVolume", lambda: on.controller.detach(volume_id, on.node_id))
        with on.screen.step("ControllerPublishVolume") as words:
            context = self._created.context if self._created is not None else {}
            self._context = on.controller.attach(volume_id, on.node_id, self._capability, volume_context=context)
            words.append(f"on node {on.node_id}")
        on.screen.detail(on.kernel.device(self.device))

    def stage(self) -> None:
        on, volume_id = self._on, self.id
        self.staging.mkdir(exist_ok=True)
        on.undo.note("NodeUnstageVolume", lambda: on.node.unstage(volume_id, self.staging))
        with on.screen.step("NodeStageVolume"):
            on.node.stage(volume_id, self.staging, self._capability, publish_context=self._context)
        on.screen.detail(on.kernel.mount(self.staging))

    def publish(self, name: str, *, read_only: bool = False) -> Path:
        on, volume_id, target = self._on, self.id, self.target(name)
        on.undo.note(f"NodeUnpublishVolume {name}", lambda: on.node.unpublish(volume_id, target))
        with on.screen.step("NodePublishVolume") as words:
            on.node.publish(
                volume_id,
                self.staging,
                target,
                self._capability,
                read_only=read_only,
                publish_context=self._context,
            )
            words.append(f"at {target.name}{', read-only' if read_only else ''}")
        on.screen.detail(on.kernel.mount(target))
        return target

    def expand(self, target: Path) -> bool:
        """Expand the volume and what is on it; False when it must be staged again to grow."""
        on = self._on
        with on.screen.step("ControllerExpandVolume") as words:
            capacity_bytes, needs_node = on.controller.expand_volume(
                self.id, on.settings.expanded_bytes, capability=self._capability
            )
            words.append(f"to {size(capacity_bytes)}")
        if not needs_node:
            return True
        with on.screen.step("NodeExpandVolume") as words:
            try:
                on.node.expand_on_node(self.id, target, required_bytes=on.settings.expanded_bytes, staging=self.staging)
            except CallFailed as error:
                if error.code != "FAILED_PRECONDITION":
                    raise
                words.append(f"{error.code}: {error.message}")
                return False
            words.append("while in use")
        on.screen.detail(on.kernel.mount(target) if target.is_dir() else on.kernel.device(target))
        return True

    def show_stats(self, target: Path) -> None:
        on = self._on
        with on.screen.step("NodeGetVolumeStats") as words:
            usage = on.node.stats(self.id, target)
            if "BYTES" in usage:
                words.append(f"{size(usage['BYTES'].used)} used of {size(usage['BYTES'].total)}")
            if "INODES" in usage:
                words.append(f"and {usage['INODES'].used} inodes of {usage['INODES'].total}")

    def unpublish(self, name: str) -> None:
        with self._on.screen.step("NodeUnpublishVolume") as words:
            self._on.node.unpublish(self.id, self.target(name))
            words.append(self.target(name).name)
        self._on.undo.forget(f"NodeUnpublishVolume {name}")

    def unstage(self) -> None:
        with self._on.screen.step("NodeUnstageVolume"):
            self._on.node.unstage(self.id, self.staging)
        self._on.undo.forget("NodeUnstageVolume")
        if self.staging.is_dir():
            self.staging.rmdir()

    def detach(self) -> None:
        with self._on.screen.step("ControllerUnpublishVolume"):
            self._on.controller.detach(self.id, self._on.node_id)
        self._on.undo.forget("ControllerUnpublishVolume")

    def delete(self) -> None:
        with self._on.screen.step("DeleteVolume"):
            self._on.controller.delete_volume(self.id)
        self._on.undo.forget("DeleteVolume")


def filesystem_life(on: Stage, fs_type: str) -> None:
    """Show a filesystem volume from its creation to its deletion, its data checked after every change."""
    capability = Capability(MountAccess(fs_type), AccessMode.SINGLE_NODE_WRITER)
    volume = Volume(on, fs_type, capability)
    on.screen.title(f"a filesystem volume: {fs_type}")
    volume.create()
    volume.attach()
    volume.stage()
    target = volume.publish("target")
    digest = _write(on, target / "data")
    if not volume.expand(target):
        on.screen.say(f"{'':12}  the next NodeStageVolume grows it before it is mounted:")
        volume.unpublish("target")
        volume.unstage()
        volume.stage()
        volume.publish("target")
    _check(on, target / "data", digest)
    reader = volume.publish("reader", read_only=True)
    _check(on, reader / "data", digest)
    _must_refuse(on, reader / "data")
    volume.show_stats(target)
    volume.unpublish("reader")
    volume.unpublish("target")
    volume.unstage()
    volume.detach()
    volume.delete()


def block_life(on: Stage) -> None:
    """Show a raw block volume from its creation to its deletion."""
    volume = Volume(on, "block", Capability(BlockAccess(), AccessMode.SINGLE_NODE_WRITER))
    on.screen.title("a raw block volume")
    volume.create()
    volume.attach()
    volume.stage()
    target = volume.publish("target")
    digest = _write(on, target)
    volume.expand(target)
    _check(on, target, digest)
    reader = volume.publish("reader", read_only=True)
    _check(on, reader, digest)
    _must_refuse(on, reader)
    volume.show_stats(target)
    volume.unpublish("reader")
    volume.unpublish("target")
    volume.unstage()
    volume.detach()
    volume.delete()


def _write(on: Stage, path: Path) -> str:
    data = os.urandom(on.settings.write_bytes)
    flags = os.O_WRONLY | (0 if path.is_block_device() else os.O_CREAT)
    with on.screen.step("write") as words:
        with os.fdopen(os.open(path, flags, 0o644), "wb") as stream:
            stream.write(data)
            stream.flush()
            os.fsync(stream.fileno())
        words.append(f"{size(len(data))} to {path.relative_to(on.directory)}")
    return hashlib.sha256(data).hexdigest()


def _check(on: Stage, path: Path, digest: str) -> None:
    with on.screen.step("read back") as words:
        with path.open("rb") as stream:
            found = hashlib.sha256(stream.read(on.settings.write_bytes)).hexdigest()
        if found != digest:
            raise HostFailure(f"{path}: expected the data that was written, sha256 {digest}, got {found}")
        words.append(f"{path.relative_to(on.directory)}: the same data")


def _must_refuse(on: Stage, path: Path) -> None:
    with on.screen.step("write, read-only") as words:
        try:
            descriptor = os.open(path, os.O_WRONLY)
            try:
                os.write(descriptor, b"x")
                os.fsync(descriptor)
            finally:
                os.close(descriptor)
        except OSError as error:
            words.append(f"refused: {errno.errorcode.get(error.errno or 0, str(error.errno))}")
        else:
            raise HostFailure(f"{path}: expected a read-only volume to refuse the write, but it was accepted")
