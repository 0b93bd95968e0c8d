"""kill -9 and an I/O error at every point between two effects that the life of an encrypted volume passes."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.contract.host_machine import host_machine
from tests.integration.fault_nodes import ForkedNode, World
from tests.integration.test_fault_points import ENCRYPTED_STORIES, require_points, strike_each

pytestmark = [pytest.mark.root, pytest.mark.device_mapper]


@pytest.fixture
def world(tmp_path: Path) -> Iterator[World]:
    with host_machine(tmp_path) as machine:
        yield World(machine, tmp_path)


@pytest.fixture
def forked(world: World) -> Iterator[ForkedNode]:
    node = ForkedNode(world.directory)
    yield node
    node.close()


@pytest.mark.parametrize("name", ENCRYPTED_STORIES)
def test_the_calls_pass_the_points_that_they_are_said_to(world: World, forked: ForkedNode, name: str) -> None:
    require_points(world, forked, ENCRYPTED_STORIES[name])


@pytest.mark.parametrize("name", ENCRYPTED_STORIES)
def test_a_node_killed_at_any_point_goes_on_or_back(world: World, forked: ForkedNode, name: str) -> None:
    assert strike_each(world, forked, ENCRYPTED_STORIES[name], "kill", lambda outcome: outcome == "killed")


def test_an_error_at_any_point_is_told_and_the_next_call_goes_on(world: World, forked: ForkedNode) -> None:
    story = ENCRYPTED_STORIES["encrypted block"]
    assert strike_each(world, forked, story, "fail", lambda outcome: outcome.startswith("SystemCallFailed"))
