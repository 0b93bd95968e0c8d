# SPDX-License-Identifier: Apache-2.0
"""The scripts of the test cluster: they parse, stop at the first error, and agree on the versions they build."""

from __future__ import annotations

import os
import re
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml

ROOT = Path(__file__).parents[2]
CLUSTER = ROOT / "tests" / "kubernetes" / "cluster"
SHELL_SCRIPTS = sorted(
    path
    for directory in (CLUSTER, ROOT / "tests" / "tools", ROOT / "tests" / "vm", ROOT / ".ci")
    for path in directory.rglob("*")
    if path.is_file() and path.read_bytes().startswith((b"#!/bin/bash\n", b"#!/bin/sh\n"))
)
NAMES = [str(path.relative_to(ROOT)) for path in SHELL_SCRIPTS]
MODULES = {
    "KUBERNETES_VERSION": ("kubernetes", "k8s.io/kubernetes"),
    "PROVISIONER_VERSION": ("kubernetes", "github.com/kubernetes-csi/external-provisioner/v6"),
    "ATTACHER_VERSION": ("kubernetes", "github.com/kubernetes-csi/external-attacher/v4"),
    "RESIZER_VERSION": ("kubernetes", "github.com/kubernetes-csi/external-resizer/v2"),
    "SNAPSHOTTER_VERSION": ("kubernetes", "github.com/kubernetes-csi/external-snapshotter/v8"),
    "HELM_VERSION": ("extras", "helm.sh/helm/v4"),
    "COREDNS_VERSION": ("extras", "github.com/coredns/coredns"),
}


def settings() -> dict[str, str]:
    return dict(re.findall(r"(?m)^(\w+)=([^ \n]+)", (CLUSTER / "settings").read_text()))


def go_module(name: str) -> str:
    return (CLUSTER / "modules" / name / "go.mod").read_text()


@pytest.mark.tool
@pytest.mark.parametrize("script", SHELL_SCRIPTS, ids=NAMES)
def test_a_script_parses_and_can_be_run(script: Path) -> None:
    shell = script.read_text().splitlines()[0].removeprefix("#!")
    done = subprocess.run([shell, "-n", script], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
    assert script.stat().st_mode & 0o111 == 0o111


@pytest.mark.parametrize("script", [path for path in SHELL_SCRIPTS if CLUSTER in path.parents], ids=lambda p: p.name)
def test_a_script_of_the_cluster_stops_at_the_first_error(script: Path) -> None:
    # Process 1 does so only until the daemons run, and uses unset variables.
    wanted = "set -e" if script.name == "init" else "set -euo pipefail"
    assert re.search(rf"(?m)^{wanted}$", script.read_text())


def test_the_scripts_of_the_cluster_are_those_that_were_found() -> None:
    assert {"build", "image", "up", "down", "in", "install"} <= {path.name for path in SHELL_SCRIPTS}


@pytest.mark.parametrize("setting", MODULES)
def test_a_version_is_the_one_that_is_compiled(setting: str) -> None:
    directory, module = MODULES[setting]
    (version,) = re.findall(rf"(?m)^(?:require)?\s{re.escape(module)} v(\S+)", go_module(directory))
    assert settings()[setting] == version


def test_every_library_of_kubernetes_has_the_version_of_kubernetes() -> None:
    libraries = re.findall(r"(?m)^\s(k8s\.io/\S+) => k8s\.io/\S+ v(\S+)$", go_module("kubernetes"))
    assert len(libraries) > 30
    assert {version for _, version in libraries} == {"0." + settings()["KUBERNETES_VERSION"].removeprefix("1.")}


@pytest.mark.parametrize("sidecar", ["provisioner", "attacher", "resizer", "snapshotter"])
def test_the_cluster_runs_the_sidecars_that_the_chart_pins(sidecar: str) -> None:
    def image(path: Path) -> Any:
        return yaml.safe_load(path.read_text())["sidecars"][sidecar]["image"]

    ours, chart = image(CLUSTER / "values.yaml"), image(ROOT / "deploy" / "helm" / "nvmesh-csi-driver" / "values.yaml")
    assert ours["tag"] == chart["tag"] == "v" + settings()[f"{sidecar.upper()}_VERSION"]


def test_no_module_is_compiled_without_its_sum() -> None:
    for directory in ("kubernetes", "extras"):
        required = dict(re.findall(r"(?m)^(?:require)?\s(\S+) v(\S+)(?: // indirect)?$", go_module(directory)))
        replaced = dict(re.findall(r"(?m)^\s(\S+) => \S+ v(\S+)$", go_module(directory)))
        wanted = {module: replaced.get(module, version) for module, version in required.items()}
        sums = (CLUSTER / "modules" / directory / "go.sum").read_text()
        missing = [module for module, version in wanted.items() if f"{module} v{version}/go.mod h1:" not in sums]
        assert len(wanted) > 100
        assert missing == []


@pytest.mark.tool
def test_the_short_form_compiles_nothing_and_says_what_it_leaves_out(tmp_path: Path) -> None:
    empty = tmp_path / "cluster"
    done = subprocess.run(
        [CLUSTER.parent / "run", "--short"],
        capture_output=True,
        text=True,
        env={**os.environ, "NVMESH_CSI_CLUSTER_CACHE": str(empty)},
    )
    assert done.returncode == 0
    assert "left out: the tests on a Kubernetes cluster" in done.stderr
    assert "make test-kubernetes" in done.stderr
    assert not empty.exists()


@pytest.mark.tool
def test_a_program_of_another_version_counts_as_missing(tmp_path: Path) -> None:
    for name in ("kubectl", "helm"):
        (tmp_path / "bin" / ".made").mkdir(parents=True, exist_ok=True)
        (tmp_path / "bin" / name).write_text("")
        (tmp_path / "bin" / name).chmod(0o755)
    (tmp_path / "bin" / ".made" / "helm").write_text("made of something else\n")
    done = subprocess.run(
        [CLUSTER / "build", "--check"],
        capture_output=True,
        text=True,
        env={**os.environ, "NVMESH_CSI_CLUSTER_CACHE": str(tmp_path)},
    )
    assert done.returncode == 1
    assert re.match(r"of (\d+) programs \1 are missing or of other versions in .*: kubectl .*helm", done.stdout)
