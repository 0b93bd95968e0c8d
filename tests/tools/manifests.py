# SPDX-License-Identifier: Apache-2.0
"""Write deploy/kubernetes/*.yaml: the chart as plain manifests, one file for each file of values.

`make manifests` runs it. Each file contains a hash of chart and values, so that a test finds a stale
one also where helm is not at hand.
"""

from __future__ import annotations

import hashlib
import re
import subprocess
import sys
from pathlib import Path

from tests.unit.chart.rendering import CHART, ROOT, helm

DIRECTORY = ROOT / "deploy" / "kubernetes"
NAMES = sorted(path.stem for path in (DIRECTORY / "values").glob("*.yaml"))
RELEASE = NAMESPACE = "nvmesh-csi"
KUBERNETES = "1.34.0"
"""The manifests are for this version and newer ones."""

_HELM_ONLY = re.compile(
    r"^ *(helm\.sh/chart: .*|app\.kubernetes\.io/managed-by: Helm|helm\.sh/resource-policy: .*)\n", re.MULTILINE
)
_SOURCE = re.compile(r"^# Source: .*\n", re.MULTILINE)
_BLANKS = re.compile(r"\n(?: *\n)+(?=---\n|\Z)")
_CREDENTIALS = (
    "kubectl -n nvmesh-csi create secret generic nvmesh-csi-credentials"
    " --from-literal=username=... --from-literal=password=..."
)
_SERVERS = (
    "Name your management servers below (--management-server), apply this file, and make the Secret:\n"
    f"#   {_CREDENTIALS}"
)
_BEFORE = {
    "nvmesh": _SERVERS,
    "openshift": _SERVERS,
    "one-box": "Name the node below (node-1.example.com), apply this file, and make the Secret:\n"
    "#   kubectl -n nvmesh-csi create secret generic nvmesh-csi-storage"
    ' --from-literal=password="$(openssl rand -hex 16)"',
}
_HEADER = """\
# The CSI driver as plain manifests, for Kubernetes {kubernetes} and newer. `make manifests` makes them of the Helm
# chart and deploy/kubernetes/values/{name}.yaml: change it there, or with a kustomization.
#
# {before}
#
# state of chart and values: {digest}
apiVersion: v1
kind: Namespace
metadata:
  name: {namespace}
  labels:
    # The node's pods are privileged: they make mounts and devices. The controller would do with `restricted`.
    pod-security.kubernetes.io/enforce: privileged
"""


def path_of(name: str) -> Path:
    """Return the file of manifests that is made of a file of values."""
    return DIRECTORY / f"{name}.yaml"


def digest(name: str) -> str:
    """Return the state of everything that the manifests are made of."""
    state = hashlib.sha256()
    chart = sorted(path for path in CHART.rglob("*") if path.is_file())
    for path in (*chart, DIRECTORY / "values" / f"{name}.yaml", Path(__file__)):
        state.update(f"{path.relative_to(ROOT)}\0".encode() + path.read_bytes() + b"\0")
    return state.hexdigest()


def said_digest(text: str) -> str:
    """Return the hash in a file."""
    found = re.search(r"^# state of chart and values: ([0-9a-f]+)$", text, re.MULTILINE)
    return found[1] if found else ""


def manifests(name: str, program: str) -> str:
    """Render the manifests, with `program` as helm."""
    words = [
        program,
        "template",
        RELEASE,
        str(CHART),
        "--namespace",
        NAMESPACE,
        "--kube-version",
        KUBERNETES,
        "--skip-tests",
    ]
    values = DIRECTORY / "values" / f"{name}.yaml"
    done = subprocess.run([*words, "--values", str(values)], capture_output=True, text=True, check=True)
    rendered = _BLANKS.sub("\n", _HELM_ONLY.sub("", _SOURCE.sub("", done.stdout)))
    header = _HEADER.format(
        kubernetes=KUBERNETES.rpartition(".")[0],
        name=name,
        before=_BEFORE[name],
        digest=digest(name),
        namespace=NAMESPACE,
    )
    return header + rendered


def main() -> int:
    """Write all of them."""
    program = helm()
    if program is None:
        print("helm is not there: `make helm` builds it", file=sys.stderr)
        return 1
    for name in NAMES:
        path_of(name).write_text(manifests(name, program))
        print(f"wrote {path_of(name).relative_to(ROOT)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
