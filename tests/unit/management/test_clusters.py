# SPDX-License-Identifier: Apache-2.0
"""Clusters of a file that changes; unchanged zones keep their clients."""

from __future__ import annotations

import logging
import os
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest

from csi_driver.errors import InvalidRequest
from csi_driver.management.client import ManagementClient
from csi_driver.management.clusters import FileClusters, open_clusters
from csi_driver.management.settings import ClusterDefaults, ManagementSettings
from csi_driver.telemetry.metrics import ManagementMetrics
from csi_driver.yaml_document import InvalidDocument
from tests.fakes.clock import FakeClock

DEFAULTS = ClusterDefaults(ManagementSettings((), username="u", password_file=Path("/p")), "single-zone-cluster")
TWO = "zones: {a: {servers: m1}, b: {servers: m2}}"


class Client(ManagementClient):
    """A client that records whether it was closed."""

    is_closed = False

    def close(self) -> None:
        super().close()
        self.is_closed = True


class Described:
    """A file, its clusters, and a clock."""

    def __init__(self, directory: Path, text: str = TWO) -> None:
        self.path = directory / "clusters.yaml"
        self.path.write_text(text)
        self.clock = FakeClock(1000.0)
        self.clusters = FileClusters(self.path, DEFAULTS, Client, clock=self.clock)

    def write(self, text: str, *, later_s: float = 2.0) -> None:
        self.path.write_text(text)
        self.clock.sleep(later_s)

    def client(self, zone: str) -> Client:
        found = self.clusters.management(zone)
        assert isinstance(found, Client)
        return found


def test_each_zone_of_the_file_has_a_client_and_no_other_zone(tmp_path: Path) -> None:
    described = Described(tmp_path)
    assert described.clusters.zones() == ("a", "b")
    assert described.client("a") is not described.client("b")
    assert described.clusters.management("c") is None


def test_servers_are_measured_under_the_name_of_their_zone(tmp_path: Path) -> None:
    (file := tmp_path / "clusters.yaml").write_text(TWO)
    one = ClusterDefaults(replace(DEFAULTS.management, servers=("https://m:4000",)), "north")
    metrics = ManagementMetrics()
    connect = partial(ManagementClient, metrics=metrics)
    clusters = [open_clusters(file, DEFAULTS, connect), open_clusters(None, one, connect)]
    assert sorted(metrics.up) == [("a", "https://m1:4000"), ("b", "https://m2:4000"), ("north", "https://m:4000")]
    for each in clusters:
        each.close()


def test_an_invalid_file_fails_the_start(tmp_path: Path) -> None:
    with pytest.raises(InvalidDocument):
        Described(tmp_path, "zones: {}")


def test_changed_zones_are_replaced_and_others_keep_their_sessions(tmp_path: Path) -> None:
    described = Described(tmp_path)
    a, b = described.client("a"), described.client("b")
    described.write("zones: {c: {servers: m3}, a: {servers: m1}, b: {servers: m2, requestTimeout: 9}}")
    assert described.clusters.zones() == ("c", "a", "b")
    assert described.client("a") is a
    assert described.client("b") is not b
    assert (a.is_closed, b.is_closed) == (False, True)
    described.write("zones: {c: {servers: m3}}")
    assert described.clusters.management("a") is None
    assert a.is_closed


def test_an_invalid_version_is_logged_once_and_the_last_valid_one_stays(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    described = Described(tmp_path)
    a = described.client("a")
    for text in ("zones: {a: {servers: m9, colour: red}}", "zones: {a: {servers: m9, colour: blue}}"):
        described.write(text)
        for _ in range(3):
            assert described.client("a") is a
            described.clock.sleep(2)
    told = [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING]
    assert len([text for text in told if "the last valid version remains in use" in text]) == 2
    described.write(TWO)
    assert described.client("a") is a


def test_a_file_that_is_missing_for_a_while_changes_nothing(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    described = Described(tmp_path)
    a = described.client("a")
    described.path.unlink()
    for _ in range(3):
        described.clock.sleep(2)
        assert described.client("a") is a
    assert caplog.text.count("cannot be read") == 1
    described.write(TWO)
    assert described.client("a") is a


def test_the_file_is_checked_once_a_second_at_most(tmp_path: Path) -> None:
    described = Described(tmp_path)
    described.write("zones: {c: {servers: m3}}", later_s=0.5)
    assert described.clusters.zones() == ("a", "b")
    described.clock.sleep(0.6)
    assert described.clusters.zones() == ("c",)


def test_a_config_map_that_is_replaced_by_its_link_is_noticed(tmp_path: Path) -> None:
    def version(name: str, servers: str) -> None:
        (tmp_path / name).mkdir()
        (tmp_path / name / "management.servers").write_text(servers)
        (tmp_path / name / "management.protocol").write_text("http")
        (tmp_path / "..new").symlink_to(name)
        os.replace(tmp_path / "..new", tmp_path / "..data")  # as kubelet does it

    version("..1", "m1")
    clock = FakeClock(1000.0)
    for key in ("management.servers", "management.protocol"):
        (tmp_path / key).symlink_to(f"..data/{key}")
    clusters = FileClusters(tmp_path, DEFAULTS, ManagementClient, clock=clock)
    before = clusters.management("single-zone-cluster")
    version("..2", "m2")
    clock.sleep(2)
    assert clusters.management("single-zone-cluster") is not before


def test_a_zone_without_a_valid_login_changes_nothing(tmp_path: Path) -> None:
    described = Described(tmp_path)

    def refuse(settings: ManagementSettings) -> ManagementClient:
        raise InvalidRequest("no such authority")

    described.clusters._connect = refuse
    described.write("zones: {c: {servers: m3}}")
    assert described.clusters.zones() == ("a", "b")
