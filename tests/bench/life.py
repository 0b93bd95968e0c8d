# SPDX-License-Identifier: Apache-2.0
"""A volume's life: by the driver, one method for each call, and its part on a node by a shell script."""

from __future__ import annotations

import subprocess
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from csi_driver.model import GIB, AccessMode, BlockAccess, Capability, MountAccess
from csi_driver.parameters.mkfs import MkfsRequest
from tests.bench.measure import timed
from tests.bench.stack import Stack
from tests.client import CsiClient

EXT4 = Capability(MountAccess(fs_type="ext4"), AccessMode.SINGLE_NODE_WRITER)
XFS = Capability(MountAccess(fs_type="xfs"), AccessMode.SINGLE_NODE_WRITER)
BLOCK = Capability(BlockAccess(), AccessMode.SINGLE_NODE_WRITER)

FORMAT = 'mkfs.{fs} -q {options} "$1"'
MOUNT = 'mount "$1" "$2" && mount --bind "$2" "$3"'
UNMOUNT = 'umount "$3" && umount "$2"'


@dataclass(slots=True)
class Volume:
    """One volume under measurement."""

    name: str
    staging: Path = Path()
    target: Path = Path()
    volume_id: str = ""
    publish_context: Mapping[str, str] = field(default_factory=dict)
    volume_context: Mapping[str, str] = field(default_factory=dict)


def new_volumes(directory: Path, prefix: str, count: int) -> list[Volume]:
    """Return volumes to be, with their staging directories made (the CO's duty)."""
    names = [f"{prefix}-{n}" for n in range(count)]
    for name in names:
        (directory / f"{name}-staging").mkdir()
    return [Volume(name, directory / f"{name}-staging", directory / f"{name}-target") for name in names]


@dataclass(frozen=True, slots=True)
class Step:
    """One call of a volume's life and the role that serves it."""

    name: str
    role: str
    call: Callable[[Volume], None]


@dataclass(frozen=True, slots=True)
class Life:
    """The calls of a volume's life, by any CSI driver. `attaches`, `stages`: whether it has these calls."""

    controller: CsiClient
    node: CsiClient
    node_id: str
    capability: Capability = EXT4
    attaches: bool = True
    stages: bool = True

    def create(self, volume: Volume) -> None:
        made = self.controller.create_volume(volume.name, required_bytes=GIB, capabilities=[self.capability])
        volume.volume_id, volume.volume_context = made.volume_id, made.context

    def attach(self, volume: Volume) -> None:
        if self.attaches:
            volume.publish_context = self.controller.attach(
                volume.volume_id, self.node_id, self.capability, volume_context=volume.volume_context
            )

    def stage(self, volume: Volume) -> None:
        if self.stages:
            self.stage_by(self.node, volume)

    def stage_by(self, client: CsiClient, volume: Volume) -> None:
        client.stage(
            volume.volume_id,
            volume.staging,
            self.capability,
            publish_context=volume.publish_context,
            volume_context=volume.volume_context,
        )

    def publish(self, volume: Volume) -> None:
        self.publish_by(self.node, volume)

    def publish_by(self, client: CsiClient, volume: Volume) -> None:
        client.publish(
            volume.volume_id,
            volume.staging,
            volume.target,
            self.capability,
            publish_context=volume.publish_context,
            volume_context=volume.volume_context,
        )

    def stats(self, volume: Volume) -> None:
        self.node.stats(volume.volume_id, volume.target)

    def unpublish(self, volume: Volume) -> None:
        self.node.unpublish(volume.volume_id, volume.target)

    def unstage(self, volume: Volume) -> None:
        if self.stages:
            self.node.unstage(volume.volume_id, volume.staging)

    def detach(self, volume: Volume) -> None:
        if self.attaches:
            self.controller.detach(volume.volume_id, self.node_id)

    def delete(self, volume: Volume) -> None:
        self.controller.delete_volume(volume.volume_id)

    def on_node(self, volume: Volume) -> None:
        """Stage, publish, unpublish and unstage."""
        for step in (self.stage, self.publish, self.unpublish, self.unstage):
            step(volume)

    def steps(self) -> tuple[Step, ...]:
        return (
            Step("CreateVolume", "controller", self.create),
            Step("ControllerPublishVolume", "controller", self.attach),
            Step("NodeStageVolume ext4", "node", self.stage),
            Step("NodePublishVolume", "node", self.publish),
            Step("NodeGetVolumeStats", "node", self.stats),
            Step("NodeUnpublishVolume", "node", self.unpublish),
            Step("NodeUnstageVolume", "node", self.unstage),
            Step("ControllerUnpublishVolume", "controller", self.detach),
            Step("DeleteVolume", "controller", self.delete),
        )

    def attached(self, directory: Path, prefix: str, count: int) -> list[Volume]:
        """Return new volumes, attached."""
        volumes = new_volumes(directory, prefix, count)
        timed(self.create, volumes, at_once=16)
        timed(self.attach, volumes, at_once=16)
        return volumes

    def remove(self, volumes: Sequence[Volume]) -> None:
        """Detach and delete."""
        timed(self.detach, volumes, at_once=16)
        timed(self.delete, volumes, at_once=16)


def life_on(stack: Stack, capability: Capability = EXT4) -> Life:
    return Life(stack.controller, stack.node, stack.node_id, capability)


@dataclass(frozen=True, slots=True)
class Script:
    """The part on the node as one run of bash: on an attached volume's device, with the driver's options of mkfs."""

    stack: Stack
    fs: str = "ext4"

    def on_node(self, volume: Volume) -> None:
        """Format, mount, mount --bind, unmount twice."""
        self._run(volume, FORMAT, MOUNT, UNMOUNT)
        volume.target.rmdir()

    def mount(self, volume: Volume) -> None:
        self._run(volume, MOUNT)

    def format_and_mount(self, volume: Volume) -> None:
        self._run(volume, FORMAT, MOUNT)

    def bind(self, volume: Volume) -> None:
        self._run(volume, 'mount --bind "$2" "$3"')

    def unbind(self, volume: Volume) -> None:
        self._run(volume, 'umount "$3"')

    def unmount(self, volume: Volume) -> None:
        self._run(volume, UNMOUNT)
        volume.target.rmdir()

    def _run(self, volume: Volume, *commands: str) -> None:
        volume.target.mkdir(exist_ok=True)
        options = " ".join(MkfsRequest().arguments(self.fs).every)
        script = " && ".join(commands).replace("{fs}", self.fs).replace("{options}", options)
        paths = (self.stack.device(volume.volume_id), volume.staging, volume.target)
        subprocess.run(["bash", "-c", script, "bash", *paths], check=True, stdout=subprocess.DEVNULL)
