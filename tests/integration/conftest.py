# SPDX-License-Identifier: Apache-2.0
"""Rigs for the end-to-end tests: one per module, as a start takes seconds; fresh ones where a test stops it."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.integration.cluster import Cluster, clustered
from tests.integration.rig import Rig, running


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Say how to run them where they cannot run."""
    here = Path(__file__).parent
    for item in items:
        reason = _reason_to_skip(item) if here in item.path.parents else None
        if reason is not None:
            item.add_marker(pytest.mark.skip(reason=reason))


def _reason_to_skip(item: pytest.Item) -> str | None:
    if os.geteuid() != 0:
        return "makes loop devices and mounts: run `make test` as root"
    for fs_type in ("xfs", "btrfs"):
        if fs_type in item.name and shutil.which(f"mkfs.{fs_type}") is None:
            return f"needs mkfs.{fs_type}: `make test` as root installs it"
    return None


@pytest.fixture(scope="module")
def rig(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Rig]:
    """A rig that the tests of a module share; each test has volumes of its own."""
    with running(tmp_path_factory.mktemp("rig") / "d") as rig:
        yield rig
    assert not list(rig.directory.glob("dev/*")), "a test left a volume attached"


@pytest.fixture
def fresh_rig(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Rig]:
    """A rig of the test's own, which may kill and stop it. Its roles may die often and are back at once."""
    with running(tmp_path_factory.mktemp("own") / "d", "--restart-window", "0.05") as rig:
        yield rig


@pytest.fixture(scope="session")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    """Three clients with their nodes, and two controllers, for all tests that need more than one of each."""
    three = ("node-1", "node-2", "node-3")
    with clustered(tmp_path_factory.mktemp("cluster") / "d", clients=three, nodes=three) as running:
        yield running
    assert not list(running.directory.glob("node-*/dev/*")), "a test left a volume attached"
