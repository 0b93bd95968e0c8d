# SPDX-License-Identifier: Apache-2.0
"""kill -9 and an I/O error at every point between two effects that the life of an encrypted volume passes."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.contract.host_machine import host_machine
from tests.integration.fault_nodes import ForkedNode, World
from tests.integration.test_fault_points import ENCRYPTED_STORIES, inject_at_each, require_points

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
def test_the_requests_pass_the_declared_points(world: World, forked: ForkedNode, name: str) -> None:
    require_points(world, forked, ENCRYPTED_STORIES[name])


@pytest.mark.parametrize("name", ENCRYPTED_STORIES)
def test_a_node_killed_at_any_point_continues_or_undoes(world: World, forked: ForkedNode, name: str) -> None:
    assert inject_at_each(world, forked, ENCRYPTED_STORIES[name], "kill", lambda outcome: outcome == "killed")


def test_an_error_at_any_point_is_returned_and_a_retry_succeeds(world: World, forked: ForkedNode) -> None:
    story = ENCRYPTED_STORIES["encrypted block"]
    assert inject_at_each(world, forked, story, "fail", lambda outcome: outcome.startswith("SystemCallFailed"))
