"""A fresh node for every test."""

from __future__ import annotations

import pytest

from tests.fakes.node import FakeNode


@pytest.fixture
def node() -> FakeNode:
    return FakeNode()
