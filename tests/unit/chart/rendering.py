# SPDX-License-Identifier: Apache-2.0
"""Render the chart with Helm, and parse the result."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import yaml

ROOT = Path(__file__).parents[3]
CHART = ROOT / "deploy" / "helm" / "nvmesh-csi-driver"
NVMESH = ("management.servers={https://mgmt-1:4000}", "management.existingSecret=mgmt")
EMBEDDED = ("storage.enabled=true", "storage.nodeName=box")
EXPORTED = (
    *EMBEDDED,
    "storage.poolDirectory=/srv/pool",
    "storage.nvme.enabled=true",
    "storage.nvme.addresses={10.1.0.1,fd00::1}",
)
AUTHENTICATED = (*EXPORTED, "storage.nvme.authentication.enabled=true", "storage.tls.existingSecret=tls")
SNAPSHOTS = "snapshots.enabled=true"
Manifest = dict[str, Any]


class Refused(Exception):
    """Helm did not render the chart; the text has the reason."""


def helm() -> str | None:
    """Return where helm is: on PATH (make test puts it there), or where the cluster of the tests was built."""
    cluster = os.environ.get("NVMESH_CSI_CLUSTER_CACHE") or os.path.join(
        os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache"), "nvmesh-csi", "cluster"
    )
    return shutil.which("helm") or shutil.which("helm", path=os.path.join(cluster, "bin"))


@dataclass(frozen=True)
class Rendered:
    """The objects of a release."""

    manifests: Sequence[Manifest]

    def of(self, kind: str) -> list[Manifest]:
        """Return all objects of a kind."""
        return [manifest for manifest in self.manifests if manifest["kind"] == kind]

    def one(self, kind: str, name: str) -> Manifest:
        """Return an object by the end of its name."""
        found = [manifest for manifest in self.of(kind) if manifest["metadata"]["name"].endswith(name)]
        assert len(found) == 1, f"{len(found)} {kind} end in {name}, expected one"
        return found[0]

    def pods(self) -> dict[str, Manifest]:
        """Return the pods' specifications by role."""
        kinds = ("Deployment", "DaemonSet", "StatefulSet")
        return {
            manifest["metadata"]["name"].rpartition("-")[2]: manifest["spec"]["template"]["spec"]
            for kind in kinds
            for manifest in self.of(kind)
        }

    def containers(self) -> Iterator[tuple[str, Manifest]]:
        """Yield every container with its name as role/container."""
        for role, pod in self.pods().items():
            for container in [*pod.get("initContainers", ()), *pod["containers"]]:
                yield f"{role}/{container['name']}", container

    def container(self, name: str) -> Manifest:
        """Return a container by role/container."""
        return dict(self.containers())[name]

    def args(self, name: str) -> list[str]:
        """Return a container's arguments."""
        return [str(word) for word in self.container(name)["args"]]


def render(
    *sets: str,
    values: Mapping[str, Any] | None = None,
    release: str = "nvmesh-csi",
    namespace: str = "nvmesh-csi",
    kubernetes: str = "1.37.2",
    apis: tuple[str, ...] = (),
) -> Rendered:
    """Render with --set words and a mapping of values, as for a cluster that serves `apis` too.

    Raises `Refused` with Helm's words.
    """
    text = _template(sets, yaml.safe_dump(dict(values or {})), release, namespace, kubernetes, apis)
    return _read(text)


@cache
def _read(text: str) -> Rendered:
    # libyaml: the reader in Python takes longer than Helm does.
    return Rendered([manifest for manifest in yaml.load_all(text, Loader=yaml.CSafeLoader) if manifest])


@cache
def _template(
    sets: tuple[str, ...], values: str, release: str, namespace: str, kubernetes: str, apis: tuple[str, ...]
) -> str:
    program = helm()
    assert program is not None, "helm is not there: tests/tools/install-helm builds it"
    words = [word for one in sets for word in ("--set", one)]
    words += [word for one in apis for word in ("--api-versions", one)]
    done = subprocess.run(
        [program, "template", release, CHART, "-n", namespace, "--kube-version", kubernetes, "-f", "-", *words],
        input=values,
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode != 0:
        raise Refused(done.stderr)
    return done.stdout
