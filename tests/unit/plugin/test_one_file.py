# SPDX-License-Identifier: Apache-2.0
"""The plugin as one file: it runs with the standard library alone."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from tests.documents import ROOT
from tests.tools.plugin_advice import ADVICE, written

pytestmark = pytest.mark.tool
BUILD = ROOT / "tests" / "tools" / "build-plugin"


@pytest.fixture(scope="module")
def plugin(tmp_path_factory: pytest.TempPathFactory) -> Path:
    target = tmp_path_factory.mktemp("plugin") / "kubectl-nvmesh"
    subprocess.run([sys.executable, str(BUILD), str(target)], check=True)
    return target


def test_one_file_runs_without_any_package(plugin: Path) -> None:
    done = subprocess.run([sys.executable, "-I", "-S", str(plugin), "--help"], capture_output=True, text=True, cwd="/")
    assert (done.returncode, done.stderr) == (0, "")
    assert "volumes" in done.stdout


def test_one_file_imports_all_that_it_needs(plugin: Path) -> None:
    """A lazy import of a module outside the standard library would fail in the middle of a bad night."""
    script = (
        "import sys, pkgutil, importlib, zipimport\n"
        f"sys.path.insert(0, {str(plugin)!r})\n"
        "import csi_driver\n"
        "for each in pkgutil.walk_packages(csi_driver.__path__, 'csi_driver.'):\n"
        "    importlib.import_module(each.name)\n"
        "known = set(sys.stdlib_module_names) | {'csi_driver', '__main__'}\n"
        "print(sorted({name.split('.')[0] for name in sys.modules} - known))\n"
    )
    done = subprocess.run([sys.executable, "-I", "-S", "-c", script], capture_output=True, text=True, cwd="/")
    assert (done.stdout.strip(), done.returncode) == ("[]", 0), done.stderr


def test_the_same_sources_make_the_same_file(plugin: Path, tmp_path: Path) -> None:
    subprocess.run([sys.executable, str(BUILD), str(tmp_path / "again")], check=True)
    assert (tmp_path / "again").read_bytes() == plugin.read_bytes()


def test_one_file_knows_its_version(plugin: Path) -> None:
    done = subprocess.run([str(plugin), "version"], capture_output=True, text=True)
    assert f'version = "{done.stdout.strip()}"' in (ROOT / "pyproject.toml").read_text()


def test_the_advice_is_that_of_the_documents() -> None:
    assert ADVICE.read_text() == written(), "run `make docs`"
