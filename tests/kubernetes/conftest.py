# SPDX-License-Identifier: Apache-2.0
"""Fixtures of every test on the cluster: the cluster, its driver and storage, and cleanup.

The cluster is the one that `make cluster-up` starts. Tests share it, one after the other; each removes its objects
and is wrong if it leaves a volume or a device behind.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Generator, Iterator

import pytest

from csi_driver.plugin import main as plugin
from csi_driver.plugin.kubectl import Kubectl
from tests.kubernetes.driver import Driver
from tests.kubernetes.kubectl import ENTER, Cluster
from tests.kubernetes.stage import Stage
from tests.kubernetes.storage import Storage

HOW_TO_START = "no cluster is up; run as root: make cluster-up, or make test-kubernetes, which does it by itself"

Run = Callable[..., tuple[int, str]]
"""The plugin, and its exit status and output."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark everything in this directory: it needs the cluster, and root to enter the cluster's namespaces."""
    for item in items:
        if item.path.is_relative_to(ENTER.parents[1]):
            item.add_marker(pytest.mark.kubernetes)


@pytest.fixture(scope="session")
def cluster() -> Cluster:
    """The cluster. Where none is up its tests are skipped; one that is up but does not answer is an error."""
    found = Cluster()
    if os.geteuid() != 0 or found.run("true").status != 0:
        pytest.skip(HOW_TO_START)
    found.wait_for(lambda: found.kubectl("get", "nodes", "--no-headers"), "the API server to answer")
    return found


@pytest.fixture(scope="session")
def driver(cluster: Cluster) -> Driver:
    """The driver, all of its pods ready."""
    deployed = Driver(cluster)
    deployed.wait_ready()
    return deployed


@pytest.fixture(scope="session")
def storage(driver: Driver) -> Storage:
    return driver.storage()


@pytest.fixture
def stage(cluster: Cluster, storage: Storage) -> Iterator[Stage]:
    """Make objects on it; afterwards they are deleted, and nothing of them may be left."""
    cluster.touched.clear()
    made = Stage(cluster, storage)
    yield made
    made.clear()


@pytest.fixture
def nvmesh(cluster: Cluster, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Run:
    """Run the plugin, and return its exit status and output."""
    monkeypatch.setattr(plugin, "Kubectl", lambda options: Kubectl(options, (*cluster.enter, "kubectl")))

    def run(*words: str) -> tuple[int, str]:
        status = plugin.main(words, version="test")
        shown = capsys.readouterr()
        return status, shown.out + shown.err

    return run


def first_problem(cluster: Cluster, nvmesh: Run, name: str, words: str) -> None:
    """Wait until the first thing that `why` says has the words."""

    def is_said() -> bool:
        status, shown = nvmesh("why", name, "-n", "default", "-o", "json")
        if status != 1:
            return False
        found = json.loads(shown)["findings"][0]
        return words in f"{found['subject']}: {found['problem']} {found['reason']}"

    cluster.wait_for(is_said, f"why {name} to say {words!r}: {nvmesh('why', name, '-n', 'default')[1]}")


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(
    item: pytest.Item,
) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """Add the state of the cluster to the report of a failed test, before the cleanup."""
    report = yield
    fixtures = getattr(item, "funcargs", {})
    if report.when == "call" and report.failed and isinstance(fixtures.get("cluster"), Cluster):
        report.sections.append(("cluster", fixtures["cluster"].explain()))
        if isinstance(fixtures.get("driver"), Driver):
            report.sections.append(("driver", fixtures["driver"].recent_log()))
    return report
