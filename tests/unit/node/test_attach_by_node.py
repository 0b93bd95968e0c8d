# SPDX-License-Identifier: Apache-2.0
"""Attaching by the node: the order of steps, and repeated calls."""

from __future__ import annotations

from typing import cast

import pytest

from csi_driver.controller.publish import NodeAttach
from csi_driver.deadline import Deadline
from csi_driver.errors import DeadlineReached, HostFailure, NotAttached, PreconditionFailed, StorageUnavailable
from csi_driver.model import EMPTY, Capability
from csi_driver.node import NodePublishRequest, StageRequest
from csi_driver.node.publish import Publish
from csi_driver.node.service import AttachByNode
from csi_driver.node.stage import Stage
from csi_driver.publish_context import History, PublishContext
from csi_driver.storage_model import ReservationMode
from tests.unit.controller.world import CLAIM, NODE_1, NODE_2, RWO, World


class Machine:
    """Lists the other steps of the node; `broken` lets the next one fail."""

    def __init__(self, world: World) -> None:
        self.world = world
        self.contexts: list[PublishContext | None] = []
        self.seen: list[str] = []
        self.broken = False
        self.mounted = False

    def _do(self, what: str) -> None:
        holders = ",".join(self.world.holders()) or "nobody"
        self.seen.append(f"{what} while {holders} holds it")
        if self.broken:
            raise HostFailure("the machine refuses")

    def stage(self, request: StageRequest, *, deadline: Deadline) -> None:
        self.contexts.append(PublishContext.from_map(request.publish_context))
        self._do("stage")
        self.mounted = True

    def unstage(self, volume_id: str, staging_target_path: str, *, deadline: Deadline) -> None:
        self._do("unstage")
        self.mounted = False

    def is_staged(self, volume_id: str, staging_target_path: str) -> bool:
        return self.mounted

    def publish(self, request: NodePublishRequest, *, deadline: Deadline) -> None:
        self.contexts.append(PublishContext.from_map(request.publish_context))
        self._do("publish")

    def unpublish(self, volume_id: str, target_path: str, *, deadline: Deadline) -> None:
        self._do("unpublish")


class Node:
    """A node that attaches for itself, over a storage in memory."""

    def __init__(self, node_id: str = NODE_1, world: World | None = None) -> None:
        self.world = world or World()
        self.volume_id = "" if world else self.world.create(parameters=CLAIM).volume_id
        self.machine = Machine(self.world)
        own = NodeAttach(self.world.publication, self.world.unpublication, lambda: node_id)
        self._use = AttachByNode(cast(Stage, self.machine), cast(Publish, self.machine), own)

    def stage(self, capability: Capability = RWO) -> None:
        request = StageRequest(self.volume_id, "/s", capability)
        self._use.stage(request, deadline=self.world.deadline())

    def publish(self) -> None:
        request = NodePublishRequest(self.volume_id, "/s", "/t", RWO, read_only=False, publish_context=EMPTY)
        self._use.publish(request, deadline=self.world.deadline())

    def unpublish(self) -> None:
        self._use.unpublish(self.volume_id, "/t", deadline=self.world.deadline())

    def unstage(self) -> None:
        self._use.unstage(self.volume_id, "/s", deadline=self.world.deadline())


def test_a_volume_is_attached_before_it_is_staged_and_detached_after_it_is_unstaged() -> None:
    node = Node()
    node.stage()
    node.publish()
    node.unpublish()
    node.unstage()
    assert node.machine.seen == [
        f"{step} while node-1 holds it" for step in ("stage", "publish", "unpublish", "unstage")
    ]
    assert node.world.holders() == []


def test_stage_and_publish_get_the_context_that_an_attacher_would_pass() -> None:
    node = Node()
    node.stage()
    node.publish()
    wanted = node.world.publish(node.volume_id, NODE_1)
    assert node.machine.contexts == [wanted, wanted]
    assert wanted.history is History.FIRST


def test_a_stage_that_failed_goes_on_under_the_same_attachment() -> None:
    node = Node()
    node.machine.broken = True
    with pytest.raises(StorageUnavailable):
        node.stage()
    node.machine.broken = False
    node.stage()
    first, second = node.machine.contexts
    assert first == second


def test_a_volume_that_could_not_be_staged_is_reported_as_attached() -> None:
    """By an error that leaves the outcome open: after any other one kubelet would never unstage it."""
    node = Node()
    node.machine.broken = True
    with pytest.raises(StorageUnavailable, match="the machine refuses; the volume stays attached"):
        node.stage()
    assert node.world.holders() == ["node-1"]
    node.machine.broken = False
    node.unstage()
    assert node.world.holders() == []


def test_what_cannot_be_unstaged_is_not_detached() -> None:
    node = Node()
    node.stage()
    node.machine.broken = True
    with pytest.raises(HostFailure):
        node.unstage()
    assert node.world.holders() == ["node-1"]


def test_an_unstage_that_is_repeated_detaches_what_the_first_one_left() -> None:
    node = Node()
    node.stage()
    node.world.management.set_busy("node-1", node.world.stored())
    with pytest.raises(DeadlineReached, match="open"):
        node.unstage()
    node.world.management.set_busy("node-1", node.world.stored(), busy=False)
    node.unstage()
    node.unstage()
    assert node.world.holders() == []


def test_a_volume_that_another_node_holds_is_not_staged() -> None:
    node = Node()
    node.stage()
    other = Node(NODE_2, node.world)
    other.volume_id = node.volume_id
    with pytest.raises(PreconditionFailed, match="node-1"):
        other.stage()
    assert other.machine.seen == []


def test_a_handle_of_the_oldest_driver_gives_up_what_that_driver_attached() -> None:
    """It named no reference, which the storage counts under the volume's uuid."""
    node = Node()
    volume = node.world.stored()
    node.volume_id = ":".join(node.volume_id.split(":")[:2])
    client = node.world.management.client("node-1", deadline=node.world.deadline())
    assert client is not None
    mode = ReservationMode.EXCLUSIVE_READ_WRITE
    node.world.management.attach(client, volume, mode=mode, reference_id=None, deadline=node.world.deadline())
    node.unstage()
    assert node.world.holders() == []


# --- the volume was taken from the node while it was staged ---------------------------------------------------------


def taken_away() -> Node:
    """Return a node that has staged a volume, which another node had meanwhile and gave up again."""
    node = Node()
    node.stage()
    node.world.unpublish(node.volume_id, NODE_1)
    other = Node(NODE_2, node.world)
    other.volume_id = node.volume_id
    other.stage()
    other.unstage()
    node.machine.seen.clear()
    return node


def test_a_volume_staged_under_an_ended_attachment_is_not_published() -> None:
    """The mount is of the time before the other node wrote."""
    node = taken_away()
    with pytest.raises(NotAttached, match="unstage the volume and stage it again"):
        node.publish()
    assert (node.machine.seen, node.world.holders()) == ([], [])


def test_a_volume_staged_under_an_ended_attachment_is_unstaged_before_it_is_attached() -> None:
    node = taken_away()
    node.stage()
    assert node.machine.seen == ["unstage while nobody holds it", "stage while node-1 holds it"]


def test_what_cannot_be_unstaged_is_not_attached_again() -> None:
    node = taken_away()
    node.machine.broken = True
    with pytest.raises(HostFailure):
        node.stage()
    assert node.world.holders() == []


def test_a_stage_that_is_repeated_leaves_the_mount_alone() -> None:
    node = Node()
    node.stage()
    node.stage()
    assert node.machine.seen == ["stage while node-1 holds it"] * 2
