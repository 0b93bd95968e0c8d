# SPDX-License-Identifier: Apache-2.0
"""The calls that Kubernetes makes after the out-of-service taint of a node, in their order (docs/fencing.md)."""

from __future__ import annotations

import pytest

from csi_driver.errors import DeadlineReached, PreconditionFailed
from csi_driver.settings import Fencing
from csi_driver.storage_model import ClientStatus
from tests.unit.controller.test_fencing import attaches, held
from tests.unit.controller.world import NODE_1, NODE_2

NODES = ["node-1"], ["node-2"]


def test_a_lost_node_is_noticed_released_and_its_volume_taken_over() -> None:
    world, volume_id = held()
    world.management.set_busy("node-1", world.stored())
    # Kubernetes releases the volume before the management misses the storage client.
    with pytest.raises(DeadlineReached):
        world.unpublish(volume_id, NODE_1, seconds=75)
    with pytest.raises(PreconditionFailed, match="is being detached there"):
        world.publish(volume_id, NODE_2)
    assert world.holders() == NODES[0]
    # The attacher repeats the call until the client is down: then it is answered without a wait.
    world.management.set_status("node-1", ClientStatus.DOWN)
    before_s = world.clock.monotonic()
    world.unpublish(volume_id, NODE_1)
    assert world.clock.monotonic() == before_s
    # The VolumeAttachment is gone, and the pod starts elsewhere.
    before = attaches(world)
    world.publish(volume_id, NODE_2)
    assert attaches(world) == before + 1
    assert NODES[1][0] in world.holders()


def test_a_repeated_release_of_a_lost_node_takes_nothing_from_the_new_one() -> None:
    world, volume_id = held()
    world.management.set_status("node-1", ClientStatus.DOWN)
    for _ in range(2):
        world.unpublish(volume_id, NODE_1)
    world.publish(volume_id, NODE_2)
    world.unpublish(volume_id, NODE_1)
    assert "node-2" in world.holders()


@pytest.mark.parametrize("fencing", [Fencing.NEVER, Fencing.RECORDED])
def test_a_node_that_was_tainted_by_mistake_keeps_what_it_uses(fencing: Fencing) -> None:
    """Kubernetes releases its volumes although they are mounted; the storage client is well."""
    world, volume_id = held(fencing)
    world.management.set_busy("node-1", world.stored())
    for _ in range(3):
        with pytest.raises(DeadlineReached):
            world.unpublish(volume_id, NODE_1, seconds=75)
        with pytest.raises(PreconditionFailed):
            world.publish(volume_id, NODE_2)
    assert world.holders() == NODES[0]
