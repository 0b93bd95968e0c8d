# SPDX-License-Identifier: Apache-2.0
"""The official suite: results of runs, and definitions of the driver."""

from __future__ import annotations

import contextlib
import logging
from pathlib import Path
from typing import Any

import grpc
import pytest
import yaml

from csi_driver.model import DEFAULT_DRIVER_NAME, DEFAULT_TOPOLOGY_KEY
from csi_driver.telemetry.log import TextFormatter
from tests.kubernetes.suite import driver_log, results
from tests.kubernetes.suite.selections import HERE, NAMES, NOT_RUN, SELECTIONS
from tests.unit.rpc.fakes import create, serving, stage

DEFINITIONS = sorted((HERE / "definitions").glob("*.yaml"))
CLASSES = sorted((HERE / "classes").glob("*.yaml"))
# test/e2e/storage/external/external.go and test/e2e/storage/framework/testdriver.go of Kubernetes 1.37: the suite
# ignores keys that it does not know.
TOP_KEYS = {
    "StorageClass", "SnapshotClass", "GroupSnapshotClass", "VolumeAttributesClass", "DriverInfo", "InlineVolumes",
    "ClientNodeName", "NodeSelectors", "Timeouts",
}  # fmt: skip
INFO_KEYS = {
    "Name", "InTreePluginName", "TestTags", "MaxFileSize", "SupportedSizeRange", "SupportedFsType",
    "SupportedMountOption", "RequiredMountOption", "Capabilities", "RequiredAccessModes", "TopologyKeys",
    "NumAllowedTopologies",
    "StressTestOptions", "VolumeSnapshotStressTestOptions", "VolumeModifyStressTestOptions", "PerformanceTestOptions",
    "VolumeGroupSnapshotStressTestOptions",
}  # fmt: skip
CAPABILITIES = {
    "persistence", "block", "fsGroup", "volumeMountGroup", "exec", "snapshotDataSource", "offlineSnapshotClone",
    "pvcDataSource", "multipods", "RWX", "controllerExpansion", "nodeExpansion", "onlineExpansion", "offlineExpansion",
    "volumeLimits", "singleNodeVolume", "snapshotMetadata", "topology", "capacity", "capReadOnlyMany",
    "readWriteOncePod",
    "multiplePVsSameID", "FSResizeFromSourceNotSupported", "seLinuxMount", "groupSnapshot",
}  # fmt: skip
TIMEOUTS = {
    "PodStart", "PodStartShort", "PodStartSlow", "PodDelete", "ClaimProvision", "DataSourceProvision",
    "ClaimProvisionShort", "ClaimBound", "PVReclaim", "PVBound", "PVCreate", "PVDelete", "PVDeleteSlow",
}  # fmt: skip


def spec(name: str, state: str, reason: str = "", kind: str = "It") -> dict[str, Any]:
    """Return one entry of ginkgo's JSON report."""
    failure = {"Failure": {"Message": reason}} if reason else {}
    return {
        "ContainerHierarchyTexts": [f"External Storage [Driver: {DEFAULT_DRIVER_NAME}]", "[Testpattern: P] suite"],
        "LeafNodeText": name,
        "LeafNodeType": kind,
        "State": state,
        "RunTime": 2_000_000_000,
        **failure,
    }


def a_run(*tests: results.Outcome, selection: str = "fast", filtered: tuple[str, ...] = ()) -> results.Run:
    return results.Run(selection, "2026-01-02T03:04:05+00:00", 60, {"Kubernetes": "v1.2.3"}, tests, filtered)


# --- what ginkgo says ---------------------------------------------------------------------------------------------


def test_a_test_that_skips_itself_is_told_from_one_that_was_not_selected() -> None:
    specs = [spec("ran", "passed"), spec("cannot", "skipped", "no such thing"), spec("other time", "skipped")]
    tests, filtered = results.of_driver([{"SpecReports": specs}], DEFAULT_DRIVER_NAME)
    assert [(test.name, test.state, test.reason) for test in tests] == [
        ("[Testpattern: P] suite ran", "passed", ""),
        ("[Testpattern: P] suite cannot", "skipped", "no such thing"),
    ]
    assert filtered == ["[Testpattern: P] suite other time"]


def test_what_is_of_another_driver_or_no_test_does_not_count() -> None:
    specs = [spec("before", "passed", kind="BeforeSuite"), {**spec("x", "passed"), "ContainerHierarchyTexts": None}]
    assert results.of_driver([{"SpecReports": specs}], DEFAULT_DRIVER_NAME) == ([], [])


@pytest.mark.parametrize("state", ["failed", "panicked", "timedout", "interrupted", "aborted", "pending"])
def test_whatever_is_neither_passed_nor_skipped_has_failed(state: str) -> None:
    tests, _ = results.of_driver([{"SpecReports": [spec("x", state, "why")]}], DEFAULT_DRIVER_NAME)
    assert a_run(*tests).failed() == tests


def test_patterns_without_tests_are_read_once_each_and_for_this_driver_alone() -> None:
    line = "Skipping registration: [Testpattern: Inline (default fs)] volumes [Driver: {}] - it has none\n"
    said = line.format(DEFAULT_DRIVER_NAME) * 2 + line.format("other")
    assert results.undefined(said, DEFAULT_DRIVER_NAME) == [
        results.Undefined("Inline (default fs)", "volumes", "it has none")
    ]


def test_results_are_read_as_they_were_written(tmp_path: Path) -> None:
    calls = driver_log.read(["2026 INFO boundary: Probe#1 is done after 0.5 s", "2026 WARNING a: b"])
    run = results.Run("fast", "then", 1.5, {"a": "b"}, (results.Outcome("x", "passed"),), (), (), calls)
    run.save(tmp_path / "r")
    assert results.load(tmp_path / "r").calls == calls
    assert results.load(tmp_path / "r").tests == run.tests


# --- the driver's log ---------------------------------------------------------------------------------------


def test_calls_refusals_and_warnings_are_counted_and_equal_ones_are_counted_together() -> None:
    volume = "volume csi-{0}2345678-1234-1234 ({0}2345678-1234-1234-1234-123456789abc)"
    lines = [
        "2026-01-01T00:00:00.000Z DEBUG csi_driver.rpc.boundary: NodeStageVolume#1 is done after 0.250 s",
        "2026-01-01T00:00:00.000Z DEBUG csi_driver.rpc.boundary: NodeStageVolume#2 is done after 1.500 s",
        *(
            f"2026-01-01T00:00:00.000Z WARNING csi_driver.rpc.boundary: NodeExpandVolume#{n} answers UNAVAILABLE after"
            f" 20.0 s: waiting for {volume.format(n)}"
            for n in (3, 4)
        ),
        f"2026-01-01T00:00:00.000Z ERROR csi_driver.node: {volume.format(5)} is lost",
        "2026-01-01T00:00:00.000Z INFO csi_driver.node: all is well",
    ]
    calls = driver_log.read(lines)
    assert (calls.answered, calls.slowest_s) == ({"NodeStageVolume": 2}, {"NodeStageVolume": 1.5})
    assert calls.refused == (
        driver_log.Refusals("NodeExpandVolume", "UNAVAILABLE", "waiting for volume <volume> (<uuid>)", 2),
    )
    assert calls.warnings == {"csi_driver.node: volume <volume> (<uuid>) is lost": 1}


def test_lines_are_read_as_the_boundary_writes_them(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG, "csi_driver.rpc.boundary")
    with serving(tmp_path / "csi.sock") as endpoint:
        endpoint.controller.CreateVolume(create())
        with contextlib.suppress(grpc.RpcError):
            endpoint.node.NodeStageVolume(stage(volume_id=""))
    calls = driver_log.read(TextFormatter().format(record) for record in caplog.records)
    assert calls.answered == {"CreateVolume": 1}
    assert [(refusal.call, refusal.code, refusal.count) for refusal in calls.refused] == [
        ("NodeStageVolume", "INVALID_ARGUMENT", 1)
    ]


# --- the definitions ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", DEFINITIONS, ids=lambda path: path.stem)
def test_a_definition_has_no_key_that_the_suite_would_ignore(path: Path) -> None:
    definition = yaml.safe_load(path.read_text())
    info = definition["DriverInfo"]
    assert set(definition) <= TOP_KEYS
    assert set(info) <= INFO_KEYS
    assert set(info["Capabilities"]) <= CAPABILITIES
    assert set(definition["Timeouts"]) <= TIMEOUTS


@pytest.mark.parametrize("path", DEFINITIONS, ids=lambda path: path.stem)
def test_a_definition_speaks_of_this_driver_and_of_files_that_are_there(path: Path) -> None:
    definition = yaml.safe_load(path.read_text())
    assert definition["DriverInfo"]["Name"] == DEFAULT_DRIVER_NAME
    assert definition["DriverInfo"].get("TopologyKeys", [DEFAULT_TOPOLOGY_KEY]) == [DEFAULT_TOPOLOGY_KEY]
    for kind in ("StorageClass", "VolumeAttributesClass"):
        assert kind not in definition or (HERE / definition[kind]["FromFile"]).is_file()


@pytest.mark.parametrize("path", CLASSES, ids=lambda path: path.stem)
def test_a_class_is_of_this_driver(path: Path) -> None:
    document = yaml.safe_load(path.read_text())
    assert document.get("provisioner", document.get("driverName")) == DEFAULT_DRIVER_NAME


def test_every_definition_is_run_and_every_selection_has_one() -> None:
    assert {selection.definition_file for selection in SELECTIONS} == set(DEFINITIONS)
    assert len(set(NAMES)) == len(NAMES)


def test_what_is_left_out_of_a_definition_names_one_that_is_there() -> None:
    assert {name for entry in NOT_RUN for name in entry.definitions} <= {path.stem for path in DEFINITIONS}
