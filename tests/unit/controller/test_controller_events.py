# SPDX-License-Identifier: Apache-2.0
"""What the controller reports for people beside its answers."""

from __future__ import annotations

from dataclasses import replace

import pytest

from csi_driver.controller.volume_metadata import claim_of
from csi_driver.errors import DeadlineReached
from csi_driver.model import Claim
from csi_driver.publish_context import PublishContext
from csi_driver.reporting import SILENT, EventReason, Subject
from csi_driver.storage_model import ClientStatus
from tests.unit.controller.world import NODE_1, NODE_2, PVC, World

UID = PVC.removeprefix("pvc-")
OF_CLAIM = {"csi.storage.k8s.io/pvc/name": "data", "csi.storage.k8s.io/pvc/namespace": "team-a"}
CLAIM = Claim("team-a", "data", UID)


def published() -> tuple[World, str]:
    world = World()
    volume_id = world.create(parameters=OF_CLAIM).volume_id
    world.publish(volume_id)
    return world, volume_id


def test_a_volume_that_is_taken_over_is_reported_on_its_claim_and_its_former_node() -> None:
    world, volume_id = published()
    world.management.set_status("node-1", ClientStatus.DOWN)
    world.unpublish(volume_id, NODE_1)
    assert not world.reports.found
    world.publish(volume_id, NODE_2)
    world.publish(volume_id, NODE_2)
    ((subject, reason, note),) = world.reports.found
    assert (subject, reason) == (Subject(CLAIM, "node-1"), EventReason.TAKEN_OVER)
    assert "from node node-1 for node node-2" in note


def test_the_node_that_takes_a_volume_over_is_no_former_node() -> None:
    world, volume_id = published()
    world.management.set_status("node-1", ClientStatus.DOWN)
    world.unpublish(volume_id, NODE_1)
    held = replace(world.stored().reservation, attached=("node-1", "node-2"))
    world.management.change(world.stored().name, reservation=held)
    world.publish(volume_id, NODE_2)
    assert [subject.node for subject, _, _ in world.reports.found] == ["node-1"]


def test_a_detachment_that_does_not_end_is_reported_with_equal_words() -> None:
    world, volume_id = published()
    world.management.set_busy("node-1", world.stored())
    for seconds in (5, 9):
        with pytest.raises(DeadlineReached):
            world.unpublish(volume_id, seconds=seconds)
    subject, reason, note = world.reports.one()
    assert (subject, reason) == (Subject(CLAIM, "node-1"), EventReason.NOT_DETACHED)
    assert "a program on that node may have it open" in note


def test_the_node_gets_the_claim_if_there_are_events_and_else_the_context_of_before() -> None:
    world, volume_id = published()
    context = world.publish(volume_id)
    assert PublishContext.from_map(context.as_map()) == context
    assert context.claim == CLAIM
    world.publication = replace(world.publication, reporter=SILENT)
    assert "claim" not in world.publish(volume_id).as_map()


@pytest.mark.parametrize(
    "metadata",
    [
        {},
        {"csi_name": PVC},
        {"csi_name": PVC, "csi-storage-k8s-io/pvc/name": "data"},
        {"csi_name": "other", "csi-storage-k8s-io/pvc/name": "data", "csi-storage-k8s-io/pvc/namespace": "team-a"},
        {"csi_name": PVC, "csi-storage-k8s-io/pvc/name": "a/b", "csi-storage-k8s-io/pvc/namespace": "team-a"},
        {"csi_name": PVC, "csi-storage-k8s-io/pvc/name": "data", "csi-storage-k8s-io/pvc/namespace": "../x"},
        {"csi_name": PVC, "csi-storage-k8s-io/pvc/name": "data", "csi-storage-k8s-io/pvc/namespace": ".."},
    ],
)
def test_a_volume_whose_claim_is_not_certain_has_none(metadata: dict[str, object]) -> None:
    assert claim_of(metadata) is None
