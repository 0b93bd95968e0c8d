# SPDX-License-Identifier: Apache-2.0
"""The files of the project fit together: hosted CI, the gate, the release, and licences."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml

ROOT = Path(__file__).parents[2]
SPDX = "SPDX-License-Identifier: Apache-2.0"
WORKFLOW = ROOT / ".github" / "workflows" / "ci.yml"


def jobs() -> dict[str, Any]:
    loaded: dict[str, Any] = yaml.safe_load(WORKFLOW.read_text())["jobs"]
    return loaded


def parts_of_the_gate() -> list[str]:
    return re.findall(r"(?m)^(\w+)\)", (ROOT / ".ci" / "run").read_text())


def test_each_hosted_job_runs_the_part_of_the_gate_with_its_name() -> None:
    run = {name: job["steps"][-1]["run"].split(".ci/run ")[-1] for name, job in jobs().items()}
    assert run == {part: part for part in parts_of_the_gate()}


def test_each_python_version_of_the_hosted_jobs_is_supported() -> None:
    minimum = re.search(r'requires-python = ">=3\.(\d+)"', (ROOT / "pyproject.toml").read_text())
    versions = jobs()["unit"]["strategy"]["matrix"]["python"]
    assert minimum is not None
    assert min(int(version.partition(".")[2]) for version in versions) == int(minimum[1])


@pytest.mark.tool
@pytest.mark.parametrize(
    ("arguments", "problem"),
    [
        ([".ci/run", "everything"], "unknown part 'everything'"),
        ([".ci/release", "prepare", "1.2"], "VERSION: expected MAJOR.MINOR.PATCH, got '1.2'"),
        ([".ci/release"], "usage: release prepare VERSION"),
    ],
)
def test_a_wrong_argument_of_a_script_is_refused(arguments: list[str], problem: str) -> None:
    done = subprocess.run([ROOT / arguments[0], *arguments[1:]], capture_output=True, text=True, check=False)
    assert done.returncode != 0
    assert problem in done.stderr


def test_every_source_file_names_its_license() -> None:
    trees = [ROOT / name for name in ("csi_driver", "proto", "tests")]
    sources = [path for tree in trees for path in tree.rglob("*.py") if "pb" not in path.parts]
    assert len(sources) > 200
    assert [str(path) for path in sources if SPDX not in "".join(path.read_text().splitlines(keepends=True)[:3])] == []
