"""Which of several nodes a command is run beside: real processes, in namespaces of their own."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.root

ROOT = Path(__file__).parents[2]
# Looks like a node to whoever reads its command line.
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
    """Return which node is found beside these; each is the words that it is started behind."""
    isolated = ["unshare", "--mount", "--pid", "--fork", "--mount-proc", "--kill-child", "--"]
    command = [*isolated, sys.executable, "-c", FIND % NODE, *nodes]
    environ = {"PATH": os.environ["PATH"], "PYTHONPATH": str(ROOT)}
    return subprocess.run(command, env=environ, check=True, capture_output=True, text=True, timeout=60).stdout.strip()


def test_the_only_node_is_found_with_its_arguments_and_its_environment() -> None:
    assert found("env TOLD=yes") == "--zone=env TOLD=yes yes"


def test_a_node_of_another_container_is_not_meant() -> None:
    assert found("", "unshare --mount") == "--zone=plain None"
    assert found("unshare --mount") == "None None"


def test_of_several_nodes_none_is_guessed() -> None:
    assert found("", "") == "None None"


@pytest.mark.parametrize("user", ["--reuid=65534", "--ruid=65534", "--euid=65534"])
def test_what_another_user_calls_a_node_is_believed_nothing(user: str) -> None:
    """A real user of its own is what a program with set-user-ID has, which anybody can call with any arguments."""
    assert found(f"setpriv {user}") == "None None"
    assert found("", f"setpriv {user}") == "--zone=plain None"
