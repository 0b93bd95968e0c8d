"""Rigs for the end-to-end tests: one per module, as a start takes seconds; fresh ones where a test stops it."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.integration.rig import Rig, running


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Say how to run them where they cannot run."""
    if os.geteuid() == 0:
        return
    here = Path(__file__).parent
    for item in items:
        if here in item.path.parents:
            item.add_marker(pytest.mark.skip(reason="makes loop devices and mounts: run `make test` as root"))


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
