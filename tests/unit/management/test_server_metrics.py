# SPDX-License-Identifier: Apache-2.0
"""Metrics of the management servers."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import pytest

from csi_driver.deadline import Deadline
from csi_driver.errors import DriverError
from csi_driver.telemetry.metrics import ManagementMetrics, exposition
from tests.unit.management.conftest import Connect
from tests.unit.management.double import PASSWORD, Breaks, Hangs, ManagementDouble, Says, sample

INFO = "/systemInfo"


@pytest.fixture
def metrics() -> ManagementMetrics:
    return ManagementMetrics()


@pytest.fixture(autouse=True)
def _info(server: ManagementDouble, other_server: ManagementDouble) -> None:
    for double in (server, other_server):
        double.on("GET", INFO, Says(sample("system-info")))


def value(metrics: ManagementMetrics, sample: str) -> float:
    """Return a sample by its name without the prefix, and its labels in alphabetical order."""
    for line in exposition(metrics.measurements()).splitlines():
        name, _, number = line.rpartition(" ")
        if name == f"nvmesh_csi_management_{sample}":
            return float(number)
    return 0


def test_requests_logins_and_durations_are_measured(
    server: ManagementDouble, connect: Connect, deadline: Deadline, metrics: ManagementMetrics
) -> None:
    client = connect(server.url, metrics=metrics, zone="east")
    for _ in range(3):
        client.system_info(deadline=deadline)
    assert value(metrics, f'requests_total{{outcome="answered",server="{server.url}",zone="east"}}') == 3
    assert value(metrics, f'request_duration_seconds_count{{server="{server.url}",zone="east"}}') == 3
    assert value(metrics, f'logins_total{{server="{server.url}",zone="east"}}') == 1
    assert value(metrics, f'server_up{{server="{server.url}",zone="east"}}') == 1
    assert value(metrics, f'server_failures_total{{server="{server.url}",zone="east"}}') == 0


def test_a_failed_server_is_down_and_the_other_is_used(
    server: ManagementDouble, other_server: ManagementDouble, connect: Connect, deadline: Deadline,
    metrics: ManagementMetrics,
) -> None:  # fmt: skip
    client = connect(server.url, other_server.url, metrics=metrics, zone="east")
    client.system_info(deadline=deadline)
    server.on("GET", INFO, Breaks())
    for _ in range(3):
        client.system_info(deadline=deadline)
    assert value(metrics, f'server_failures_total{{server="{server.url}",zone="east"}}') == 1
    assert value(metrics, f'server_up{{server="{server.url}",zone="east"}}') == 0
    assert value(metrics, f'server_up{{server="{other_server.url}",zone="east"}}') == 1
    assert value(metrics, f'requests_total{{outcome="answered",server="{other_server.url}",zone="east"}}') == 3


def test_refused_credentials_are_not_a_server_failure_and_not_shown(
    server: ManagementDouble, connect: Connect, deadline: Deadline, metrics: ManagementMetrics
) -> None:
    server.password = "another"
    with pytest.raises(DriverError):
        connect(server.url, metrics=metrics, zone="east").system_info(deadline=deadline)
    assert value(metrics, f'requests_total{{outcome="refused",server="{server.url}",zone="east"}}') == 1
    assert value(metrics, f'server_up{{server="{server.url}",zone="east"}}') == 1
    assert PASSWORD not in exposition(metrics.measurements())


def test_a_closed_client_removes_its_servers_from_the_metric(
    server: ManagementDouble, connect: Connect, metrics: ManagementMetrics
) -> None:
    client = connect(server.url, metrics=metrics, zone="east")
    assert value(metrics, f'server_up{{server="{server.url}",zone="east"}}') == 1
    client.close()
    assert "server_up{" not in exposition(metrics.measurements())


def test_a_server_keeps_its_metric_while_another_client_uses_it(
    server: ManagementDouble, connect: Connect, metrics: ManagementMetrics
) -> None:
    before = connect(server.url, metrics=metrics, zone="east")
    after = connect(server.url, metrics=metrics, zone="east")
    for _ in range(2):
        before.close()
        assert value(metrics, f'server_up{{server="{server.url}",zone="east"}}') == 1
    after.close()
    assert "server_up{" not in exposition(metrics.measurements())


def test_a_request_that_ends_after_the_close_adds_no_server_to_the_metric(
    server: ManagementDouble, connect: Connect, deadline: Deadline, metrics: ManagementMetrics
) -> None:
    client = connect(server.url, metrics=metrics, zone="east")
    hung = Hangs()
    server.on("GET", INFO, hung)
    with ThreadPoolExecutor() as pool:
        asked = pool.submit(client.system_info, deadline=deadline)
        assert deadline.wait_until(lambda: bool(server.seen(INFO)), most_s=0.05)
        client.close()
        hung.until.set()
        with pytest.raises(DriverError):
            asked.result()
    assert value(metrics, f'server_failures_total{{server="{server.url}",zone="east"}}') == 1
    assert "server_up{" not in exposition(metrics.measurements())
