# SPDX-License-Identifier: Apache-2.0
"""The public conformance suite for CSI drivers, csi-sanity v5.6.0, against the real processes.

https://github.com/kubernetes-csi/csi-test. Nothing is skipped by us: the tests that the suite leaves out are exactly
those of capabilities that the driver does not offer on the filesystem below its pool.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import xml.etree.ElementTree as ET
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.integration.cluster import Cluster
from tests.integration.rig import REPOSITORY, START_TIMEOUT_S, Rig, loops_over, mounts_below, running
from tests.reflink_pool import BTRFS, EXT4, XFS, mounted

pytestmark = [
    pytest.mark.root,
    pytest.mark.skipif(os.geteuid() != 0, reason="makes loop devices and mounts: run `make test` as root"),
]

VOLUME_BYTES = 1 << 30
EXPANDED_BYTES = 2 << 30
ATTACH_LIMIT = 4

_CREATE = "Controller Service [Controller Server] CreateVolume should"

GROUPS = {"GROUP_CONTROLLER_SERVICE": ("GroupController Service ",)}
"""The suite asks the endpoint of the node for this capability, which has no connection to the storage that decides."""

NEVER_OFFERED: dict[str, tuple[str, ...]] = {
    "SNAPSHOT_ACCESSIBILITY_CONSTRAINTS": (
        "CreateSnapshot [Controller Server] should succeed when creating a snapshot with accessibility requirements",
    ),
}
"""Capabilities that the driver lacks: beginnings of the names of the tests that the suite skips for each."""

NOT_OFFERED: dict[str, tuple[str, ...]] = {
    "CREATE_DELETE_SNAPSHOT": (
        "CreateSnapshot ",
        "DeleteSnapshot ",
        f"{_CREATE} create volume from an existing source snapshot",
        f"{_CREATE} fail when the volume source snapshot is not found",
    ),
    "LIST_SNAPSHOTS": ("ListSnapshots ",),
    "GET_SNAPSHOT": ("GetSnapshot ",),
    "CLONE_VOLUME": (
        f"{_CREATE} create volume from an existing source volume",
        f"{_CREATE} fail when the volume source volume is not found",
    ),
    **GROUPS,
    **NEVER_OFFERED,
}
"""The same for a driver whose pool has no reflinks."""

_AT_LIMIT = (
    "Controller Service [Controller Server] ControllerPublishVolume"
    " should fail when publishing more volumes than the node max attach limit"
)
"""Run only with -csi.testnodevolumeattachlimit."""


@dataclass(frozen=True)
class Report:
    """Names of the suite's tests by outcome."""

    passed: frozenset[str]
    failed: frozenset[str]
    skipped: frozenset[str]
    output: str

    def of(self, capabilities: Mapping[str, tuple[str, ...]]) -> set[str]:
        """Return the tests of this version of the suite that need one of these capabilities."""
        beginnings = tuple(each for group in capabilities.values() for each in group)
        return {name for name in self.passed | self.failed | self.skipped if name.startswith(beginnings)}


def find_csi_sanity() -> str | None:
    """Return the suite's program: the one that `make test` installs, else on PATH, else in Go's own directory."""
    places = (
        REPOSITORY / ".cache/bin/csi-sanity-v5.6.0",
        REPOSITORY / ".cache/bin/csi-sanity",
        Path(shutil.which("csi-sanity") or "/nonexistent"),
        Path.home() / "go/bin/csi-sanity",
    )
    return next((str(place) for place in places if place.exists()), None)


@pytest.fixture(scope="module")
def csi_sanity() -> str:
    program = find_csi_sanity()
    if program is None:
        pytest.skip("csi-sanity is not installed: `make test` installs it")
    return program


@pytest.fixture
def sanity_rig(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Rig]:
    """A rig without volumes, as the suite counts them, and with the alpha RPCs, on a filesystem of its own."""
    make, *flags = getattr(request, "param", (EXT4,))
    with (
        mounted(tmp_path_factory.mktemp("sanity"), make, size_mib=4096) as place,
        running(place / "d", "--volume-health", *flags) as rig,
    ):
        yield rig


def run(program: str, rig: Rig | Cluster, *flags: str) -> Report:
    """Run the suite once over both endpoints."""
    report = rig.directory.with_name("junit.xml")
    attributes = rig.directory.with_name("attributes.yaml")
    attributes.write_text('description: "modified"\nrelativeRebuildPriority: "3"\n')
    argv = [
        program,
        f"--csi.endpoint=unix://{rig.directory}/node.sock",
        f"--csi.controllerendpoint=unix://{rig.directory}/controller.sock",
        f"--csi.mountdir={rig.directory}/mnt",
        f"--csi.stagingdir={rig.directory}/stage",
        f"--csi.testvolumesize={VOLUME_BYTES}",
        f"--csi.testvolumeexpandsize={EXPANDED_BYTES}",
        f"--csi.testvolumemutableparameters={attributes}",
        f"--ginkgo.junit-report={report}",
        "--ginkgo.no-color",
        *flags,
    ]
    done = subprocess.run(argv, capture_output=True, text=True, timeout=4 * START_TIMEOUT_S, check=False)
    return read(report, done.stdout + done.stderr)


def read(report: Path, output: str) -> Report:
    """Read the suite's JUnit report."""
    outcomes: dict[str, set[str]] = {"passed": set(), "failed": set(), "skipped": set()}
    for case in ET.parse(report).iter("testcase"):
        name = re.sub(r"^\[It\] ", "", case.get("name", ""))
        if name.startswith("["):
            continue
        status = case.get("status", "")
        if status == "pending":  # switched off in the suite itself
            continue
        outcomes[status if status in ("passed", "skipped") else "failed"].add(name)
    passed, failed, skipped = (frozenset(outcomes[each]) for each in ("passed", "failed", "skipped"))
    return Report(passed, failed, skipped, output)


def assert_all_that_apply_pass(report: Report, *, not_offered: Mapping[str, tuple[str, ...]], least: int) -> None:
    assert not report.failed, report.output[-20000:]
    assert report.skipped - {_AT_LIMIT} == report.of(not_offered)
    assert len(report.passed) >= least


REFLINKS = pytest.mark.parametrize("sanity_rig", [(XFS,)], indirect=True, ids=["xfs"])


@REFLINKS
@pytest.mark.parametrize("access", ["mount", "block"])
def test_the_suite_passes_and_leaves_nothing(csi_sanity: str, sanity_rig: Rig, access: str) -> None:
    report = run(csi_sanity, sanity_rig, f"--csi.testvolumeaccesstype={access}")
    assert_all_that_apply_pass(report, not_offered=GROUPS | NEVER_OFFERED, least=94)
    assert loops_over(sanity_rig.directory) == []
    assert mounts_below(sanity_rig.directory) == []
    assert list(sanity_rig.controller.volumes()) == []
    assert _files(sanity_rig) == []


@REFLINKS
def test_groups_pass_at_the_endpoint_of_the_controller(csi_sanity: str, sanity_rig: Rig) -> None:
    endpoint = f"--csi.endpoint=unix://{sanity_rig.directory}/controller.sock"
    report = run(csi_sanity, sanity_rig, endpoint, "--ginkgo.focus=GroupController")
    assert not report.failed, report.output[-20000:]
    assert report.passed == report.of(GROUPS) != set()


@pytest.mark.parametrize("sanity_rig", [(BTRFS,)], indirect=True, ids=["btrfs"])
def test_snapshots_and_clones_pass_on_btrfs(csi_sanity: str, sanity_rig: Rig) -> None:
    report = run(csi_sanity, sanity_rig, "--ginkgo.focus=Snapshot|source")
    assert not report.failed, report.output[-20000:]
    assert report.passed >= report.of(NOT_OFFERED) - report.of(GROUPS | NEVER_OFFERED)
    assert _files(sanity_rig) == []


@pytest.mark.parametrize(
    "sanity_rig", [(EXT4, "--max-volumes-per-node", str(ATTACH_LIMIT))], indirect=True, ids=["ext4"]
)
def test_the_suite_passes_at_the_attach_limit_and_without_reflinks(csi_sanity: str, sanity_rig: Rig) -> None:
    assert sanity_rig.node.node_info().max_volumes_per_node == ATTACH_LIMIT
    report = run(csi_sanity, sanity_rig, "--csi.testnodevolumeattachlimit")
    assert_all_that_apply_pass(report, not_offered=NOT_OFFERED, least=59)
    assert _AT_LIMIT in report.passed


def test_every_group_of_tests_left_out_exists_in_the_suite(csi_sanity: str, sanity_rig: Rig) -> None:
    report = run(csi_sanity, sanity_rig, "--ginkgo.dry-run")
    names = report.passed | report.failed | report.skipped
    for group in NOT_OFFERED.values():
        for beginning in group:
            assert any(name.startswith(beginning) for name in names), beginning


def _files(rig: Rig) -> list[str]:
    """Return the files of volumes and snapshots that are left in the pool."""
    pool = rig.directory / "pool"
    return [str(file) for place in ("volumes", "snapshots", "private") for file in (pool / place).glob("*")]
