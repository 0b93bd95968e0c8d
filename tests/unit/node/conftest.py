# SPDX-License-Identifier: Apache-2.0
"""A fresh node for every test."""

from __future__ import annotations

import pytest

from csi_driver.publish_context import Encryption
from tests.fakes.node import BLOCK, TARGET, FakeNode
from tests.unit.node.encrypted import Locked


@pytest.fixture
def node() -> FakeNode:
    return FakeNode()


@pytest.fixture
def locked(node: FakeNode) -> Locked:
    return Locked(node)


@pytest.fixture
def native(node: FakeNode) -> Locked:
    return Locked(node, Encryption.NATIVE)


@pytest.fixture
def in_use(locked: Locked) -> Locked:
    """A volume with data, attached for the second time."""
    locked.up()
    locked.node.host.write_file(TARGET, "a", b"kept")
    locked.down()
    locked.reattach()
    return locked


@pytest.fixture
def block(locked: Locked) -> Locked:
    locked.access = BLOCK
    return locked
