# SPDX-License-Identifier: Apache-2.0
"""Who may import whom, and who may touch the environment and the machine.

Imports are the contracts of import-linter in pyproject.toml; other uses are found in the syntax tree.
"""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PACKAGE = ROOT / "csi_driver"

# Places of the kernel's files. The configuration names some of them as defaults, to hand them to csi_driver.host.
MACHINE_PATH = re.compile(r"/(proc|sys|dev|run/udev)(/|$)")
KNOWS_MACHINE_PATHS = ("csi_driver.host", "csi_driver.settings", "csi_driver.node_settings", "csi_driver.__main__")

ENVIRONMENT = {"environ", "environb", "getenv", "getenvb", "putenv", "unsetenv"}
STARTS_A_PROCESS = re.compile(r"fork|forkpty|popen|posix_spawnp?|system|startfile|exec[lv]p?e?|spawn[lv]p?e?")

Finder = Callable[[ast.AST], Iterator[tuple[int, str]]]


def findings(find: Finder, *allowed: str) -> list[str]:
    """Return "module:line: what" for everything `find` yields outside the allowed packages and modules."""
    found = []
    for path in sorted(PACKAGE.rglob("*.py")):
        module = ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")
        if not any(module == name or module.startswith(f"{name}.") for name in (*allowed, "csi_driver.rpc.pb")):
            found += [f"{module}:{line}: {what}" for line, what in find(ast.parse(path.read_text()))]
    return found


def members_of_os(wanted: Callable[[str], object]) -> Finder:
    """Return a finder of `os.NAME` and `from os import NAME`, under any name of `os`."""

    def find(tree: ast.AST) -> Iterator[tuple[int, str]]:
        names = {"os"}
        for node in ast.walk(tree):
            if isinstance(node, ast.Import):
                names |= {alias.asname for alias in node.names if alias.name == "os" and alias.asname}
            if isinstance(node, ast.ImportFrom) and node.module == "os":
                yield from ((node.lineno, f"os.{alias.name}") for alias in node.names if wanted(alias.name))
        for node in ast.walk(tree):
            if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id in names:
                yield from [(node.lineno, f"os.{node.attr}")] if wanted(node.attr) else []

    return find


def machine_paths(tree: ast.AST) -> Iterator[tuple[int, str]]:
    """Yield string literals that name a file of the kernel; docstrings are excluded."""
    texts = {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Expr)}
    for node in ast.walk(tree):
        if isinstance(node, ast.Constant) and isinstance(node.value, str | bytes) and id(node) not in texts:
            text = node.value if isinstance(node.value, str) else node.value.decode("latin-1")
            yield from [(node.lineno, repr(text))] if MACHINE_PATH.match(text) else []


@pytest.mark.tool
def test_imports_keep_to_the_layers() -> None:
    lint = [sys.executable, "-c", "from importlinter.cli import lint_imports_command as run; run()", "--no-logo"]
    done = subprocess.run(lint, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


def test_environment_is_read_by_the_composition_root_alone() -> None:
    assert not findings(members_of_os(ENVIRONMENT.__contains__), "csi_driver.__main__")


def test_processes_are_started_by_the_host_adapter_alone() -> None:
    assert not findings(members_of_os(STARTS_A_PROCESS.fullmatch), "csi_driver.host.processes")


def test_files_of_the_kernel_are_named_by_the_host_adapter_alone() -> None:
    assert not findings(machine_paths, *KNOWS_MACHINE_PATHS)


@pytest.mark.parametrize(
    ("source", "found"),
    [
        ("import os as o\no.environ['A']", ["os.environ"]),
        ("from os import getenv", ["os.getenv"]),
        ("import os\nos.getpid()", []),
        ("import environ\nenviron.read()", []),
    ],
)
def test_finder_of_the_environment_finds_each_way_to_reach_it(source: str, found: list[str]) -> None:
    assert [what for _, what in members_of_os(ENVIRONMENT.__contains__)(ast.parse(source))] == found


@pytest.mark.parametrize(
    ("source", "found"),
    [
        ("Path('/proc/self/mountinfo')", True),
        ("f'/sys/block/{name}'", True),
        ("open(b'/dev/loop0')", True),
        ("'''Reads /proc/mounts.'''", False),
        ("'''/proc holds it.'''", False),
        ("'/device'", False),
        ("'volume at /dev/x'", False),
    ],
)
def test_finder_of_kernel_files_tells_paths_from_prose(source: str, found: bool) -> None:
    assert bool(list(machine_paths(ast.parse(source)))) is found
