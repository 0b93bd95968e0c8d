# SPDX-License-Identifier: Apache-2.0
"""A fresh manager with two clients and a model of the kernel's loop devices."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.unit.embedded.fake_loops import FakeLoopDevices
from tests.unit.embedded.manager import Manager, running, settings_in


@pytest.fixture
def loops() -> FakeLoopDevices:
    return FakeLoopDevices()


@pytest.fixture
def manager(tmp_path: Path, loops: FakeLoopDevices) -> Iterator[Manager]:
    with running(settings_in(tmp_path), loops) as running_manager:
        yield running_manager


@pytest.fixture
def redundant(tmp_path: Path, loops: FakeLoopDevices) -> Iterator[Manager]:
    """A manager that pretends to have ten storage targets."""
    with running(settings_in(tmp_path, pretend_targets=10), loops) as running_manager:
        yield running_manager
