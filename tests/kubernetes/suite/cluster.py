# SPDX-License-Identifier: Apache-2.0
"""The test cluster as the runner needs it: run a command inside, ask for versions and for the driver's log."""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Mapping
from pathlib import Path
from typing import Any

REPOSITORY = Path(__file__).parents[3]
ENTER = REPOSITORY / "tests" / "kubernetes" / "cluster" / "in"


class NoCluster(Exception):
    """There is no cluster to run in."""


class Cluster:
    """Commands run through `enter`, a program that runs its arguments on the cluster's node, with kubectl on PATH."""

    def __init__(self, enter: Path = ENTER) -> None:
        self._enter = enter

    def command(self, *argv: str) -> list[str]:
        """Return what runs a command inside."""
        return [str(self._enter), *argv]

    def output(self, *argv: str, environment: Mapping[str, str] | None = None) -> str:
        """Run a command inside and return its output; raises `NoCluster` with its error otherwise."""
        done = subprocess.run(
            self.command(*argv),
            capture_output=True,
            text=True,
            env={**os.environ, **(environment or {})},
        )
        if done.returncode != 0:
            raise NoCluster(f"{' '.join(argv[:3])} ended with status {done.returncode}: {done.stderr.strip()[-1000:]}")
        return done.stdout

    def objects(self, *argv: str) -> list[dict[str, Any]]:
        """Return what `kubectl get` lists."""
        found: list[dict[str, Any]] = json.loads(self.output("kubectl", "get", *argv, "--output=json"))["items"]
        return found

    def driver_pods(self, namespace: str) -> list[dict[str, Any]]:
        """Return the pods of the driver's release."""
        return self.objects("pods", f"--namespace={namespace}")

    def log_since(self, namespace: str, began: str) -> dict[str, list[str]]:
        """Return the lines that each container of the driver's pods wrote since then, also before a restart."""
        found: dict[str, list[str]] = {}
        for pod in self.driver_pods(namespace):
            name = pod["metadata"]["name"]
            for status in pod["status"].get("containerStatuses", ()):
                container = status["name"]
                ask = (
                    "kubectl",
                    "logs",
                    f"--namespace={namespace}",
                    f"--since-time={began}",
                    f"--container={container}",
                    name,
                )
                lines = self.output(*ask).splitlines()
                if status["restartCount"]:
                    lines = [*self.output(*ask, "--previous").splitlines(), *lines]
                found[f"{name}.{container}"] = lines
        return found

    def nodes(self) -> list[dict[str, Any]]:
        """Return the nodes that take pods."""
        return [node for node in self.objects("nodes") if not node["spec"].get("unschedulable")]

    def login_key(self) -> str:
        """Make it possible to log in to the node and return the file of the key."""
        done = subprocess.run([str(self._enter.parent / "ssh-up")], stdout=subprocess.PIPE, text=True)
        if done.returncode != 0:
            raise NoCluster("no login to the node, which the tests that stop the kubelet need")
        return done.stdout.strip()

    def versions(self, namespace: str) -> dict[str, str]:
        """Return the versions of what takes part."""
        server = json.loads(self.output("kubectl", "version", "--output=json"))["serverVersion"]["gitVersion"]
        nodes = self.nodes()
        node = nodes[0]["status"]["nodeInfo"]
        found = {
            "Kubernetes": server,
            "container runtime": node["containerRuntimeVersion"],
            "kernel": node["kernelVersion"],
            "nodes": str(len(nodes)),
        }
        for pod in self.driver_pods(namespace):
            for container in pod["spec"]["containers"]:
                image = container["image"].rpartition("/")[2]
                if image.startswith("csi-"):
                    name, _, version = image.partition(":")
                    found[name] = version
        return dict(sorted(found.items()))


def revision() -> str:
    """Return the last commit that changed deployed files, marked if they have uncommitted changes."""
    what = ("--", "csi_driver", "deploy/helm", "Dockerfile")
    commit = subprocess.run(
        ["git", "-C", str(REPOSITORY), "log", "-1", "--format=%h", "--abbrev=12", *what], capture_output=True, text=True
    )
    changed = subprocess.run(["git", "-C", str(REPOSITORY), "diff", "--quiet", "HEAD", *what])
    return (commit.stdout.strip() or "unknown") + ("" if changed.returncode == 0 else " and changes")
