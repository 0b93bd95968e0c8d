# SPDX-License-Identifier: Apache-2.0
"""Finding the running node of a container: real processes in namespaces."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.root

ROOT = Path(__file__).parents[2]
# Has the command line of a node.
NODE = "import time; time.sleep(600)"
# Starts the nodes that it is given, each the words of a shell, and tells which is found.
FIND = """
import os, subprocess, sys, time
def start(words):
    node = [sys.executable, "-c", %r, "nvmesh-csi", "node", "--zone=" + (words or "plain")]
    return subprocess.Popen([*words.split(), *node])
started = [start(words) for words in sys.argv[1:]]
from csi_driver.host.processes import find_running
time.sleep(0.5)
found = find_running(["node"])
print(found and " ".join(found.arguments), found and found.environ.get("TOLD"))
for process in started:
    process.kill()
"""


def found(*nodes: str) -> str:
    """Start these processes, each behind a command prefix, and return the node that is found."""
    isolated = ["unshare", "--mount", "--pid", "--fork", "--mount-proc", "--kill-child", "--"]
    command = [*isolated, sys.executable, "-c", FIND % NODE, *nodes]
    environ = {"PATH": os.environ["PATH"], "PYTHONPATH": str(ROOT)}
    return subprocess.run(command, env=environ, check=True, capture_output=True, text=True, timeout=60).stdout.strip()


def test_the_only_node_is_found_with_arguments_and_environment() -> None:
    assert found("env TOLD=yes") == "--zone=env TOLD=yes yes"


def test_a_node_of_another_container_is_not_found() -> None:
    assert found("", "unshare --mount") == "--zone=plain None"
    assert found("unshare --mount") == "None None"


def test_several_nodes_are_ambiguous() -> None:
    assert found("", "") == "None None"


@pytest.mark.parametrize("user", ["--reuid=65534", "--ruid=65534", "--euid=65534"])
def test_a_process_of_another_user_is_not_found(user: str) -> None:
    """A set-user-ID program has another real user, who chose its arguments."""
    assert found(f"setpriv {user}") == "None None"
    assert found("", f"setpriv {user}") == "--zone=plain None"
