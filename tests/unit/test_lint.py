# SPDX-License-Identifier: Apache-2.0
"""The whole repository passes ruff, and keeps to the sizes and names of the house."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PACKAGE = ROOT / "csi_driver"
GENERATED = PACKAGE / "rpc" / "pb"

# "About 400 lines a module, 40 a function": beyond these it is no longer about.
MOST_MODULE_LINES = 430
MOST_FUNCTION_LINES = 50
NAMES_THAT_SAY_NOTHING = {"utils", "util", "common", "helpers", "helper", "base", "manager", "misc"}


def own_modules() -> Iterator[Path]:
    return (path for path in sorted(PACKAGE.rglob("*.py")) if GENERATED not in path.parents)


@pytest.mark.tool
@pytest.mark.parametrize("arguments", [("check",), ("format", "--check")], ids=" ".join)
def test_ruff_finds_nothing(arguments: tuple[str, ...]) -> None:
    done = subprocess.run([sys.executable, "-m", "ruff", *arguments, "."], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


def test_no_module_is_longer_than_a_reader_can_hold() -> None:
    lengths = {path: len(path.read_text().splitlines()) for path in own_modules()}
    assert not {str(path): length for path, length in lengths.items() if length > MOST_MODULE_LINES}


def test_no_function_is_longer_than_a_screen() -> None:
    long = [
        f"{path.relative_to(ROOT)}:{node.lineno} {node.name} has {length} lines"
        for path in own_modules()
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
        and (length := (node.end_lineno or node.lineno) - node.lineno + 1) > MOST_FUNCTION_LINES
    ]
    assert not long


def test_every_module_name_says_something() -> None:
    assert not [path for path in own_modules() if path.stem in NAMES_THAT_SAY_NOTHING]
