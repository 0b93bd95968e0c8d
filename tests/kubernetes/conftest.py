# SPDX-License-Identifier: Apache-2.0
"""Fixtures of every test on the cluster: the cluster, its driver and storage, and cleanup.

The cluster is the one that `make cluster-up` starts. Tests share it, one after the other; each removes its objects
and is wrong if it leaves a volume or a device behind.
"""

from __future__ import annotations

import os
from collections.abc import Generator, Iterator

import pytest

from tests.kubernetes.driver import Driver
from tests.kubernetes.kubectl import ENTER, Cluster
from tests.kubernetes.stage import Stage
from tests.kubernetes.storage import Storage

HOW_TO_START = "no cluster is up; run as root: make cluster-up, or make test-kubernetes, which does it by itself"


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
