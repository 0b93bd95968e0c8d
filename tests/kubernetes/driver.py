# SPDX-License-Identifier: Apache-2.0
"""The driver as deployed by the chart: its pods, disturbances, health pages and metrics."""

from __future__ import annotations

import base64
import os
import re
from collections import Counter
from collections.abc import Iterator

from tests.kubernetes.kubectl import Cluster, Document, KubectlFailed, status_of
from tests.kubernetes.storage import Login, Storage

NAME = "nvmesh-csi.excelero.com"
NAMESPACE = os.environ.get("NVMESH_CSI_NAMESPACE", "nvmesh-csi")
_CHART = "app.kubernetes.io/name=nvmesh-csi-driver"
_SAMPLE = re.compile(r"^(nvmesh_csi_rpc_duration_seconds_(?:sum|count))\{([^}]*)\} (\S+)$", re.MULTILINE)
_METHOD = re.compile(r'method="(\w+)"')


class Driver:
    """The driver's pods in the cluster."""

    def __init__(self, cluster: Cluster) -> None:
        self.cluster = cluster

    def pods(self, component: str) -> list[Document]:
        """Return the pods of a role: controller, node or storage."""
        return self.cluster.all("pods", NAMESPACE, f"{_CHART},app.kubernetes.io/component={component}")

    def workload(self, component: str) -> str:
        """Return the name of what runs a role's pods, as kubectl takes it."""
        kind = {"controller": "deployment", "node": "daemonset", "storage": "statefulset"}[component]
        selector = f"{_CHART},app.kubernetes.io/component={component}"
        (found,) = self.cluster.all(kind, NAMESPACE, selector)
        return f"{kind}/{found['metadata']['name']}"

    def wait_ready(self, *components: str) -> None:
        """Wait until every pod of the roles (all, where none is named) is ready and none is going away."""

        def all_are_ready() -> bool:
            for component in components or ("controller", "node", "storage"):
                pods = self.pods(component)
                if not pods or any("deletionTimestamp" in pod["metadata"] for pod in pods):
                    return False
                if any(status_of(pod, "Ready") != "True" for pod in pods):
                    return False
            return True

        self.cluster.touched.add(NAMESPACE)
        self.cluster.wait_for(all_are_ready, "the driver's pods to be ready")

    def delete_pods(self, component: str, *, force: bool = False) -> None:
        """Delete the pods of a role; `force`: without waiting for them to end."""
        how = ("--grace-period=0", "--force") if force else ()
        selector = f"{_CHART},app.kubernetes.io/component={component}"
        self.cluster.kubectl("delete", "pods", "-n", NAMESPACE, "-l", selector, "--wait=false", *how)

    def kill(self, role: str) -> None:
        """Kill a role's processes with SIGKILL, as the kernel does when memory runs out."""
        assert self.cluster.has_processes_of_its_own(), "processes are killed in a cluster of its own only"
        ended = self.cluster.run("pkill", "-KILL", "-f", f"bin/nvmesh-csi {role} ")
        assert ended.status == 0, f"no process of the role {role}: {ended.stderr}"

    def restart(self, component: str) -> None:
        """Replace a role's pods one after the other, as an upgrade does, and wait for the end of it."""
        workload = self.workload(component)
        self.cluster.kubectl("rollout", "restart", workload, "-n", NAMESPACE)
        self.cluster.kubectl("rollout", "status", workload, "-n", NAMESPACE, "--timeout=400s", timeout_s=420)
        self.wait_ready(component)

    def storage(self) -> Storage:
        """Return the storage management, as its administrator."""
        (pod,) = self.pods("storage")
        name = pod["metadata"]["name"]
        arguments = dict(
            word.removeprefix("--").split("=", 1) for word in pod["spec"]["containers"][0]["args"] if "=" in word
        )
        port = arguments["listen"].rpartition(":")[2]
        (volume,) = (each for each in pod["spec"]["volumes"] if each["name"] == "password")
        secret = self.cluster.there("secret", volume["secret"]["secretName"], NAMESPACE)
        key = volume["secret"]["items"][0]["key"]
        password = base64.b64decode(secret["data"][key]).decode()

        def python(script: str, stdin: str) -> str:
            ended = self.cluster.run(
                "kubectl", "exec", "-i", name, "-n", NAMESPACE, "--", "python3", "-c", script, stdin=stdin
            )
            if ended.status:
                raise KubectlFailed(("storage", name), ended.status, ended.stderr)
            return ended.stdout

        return Storage(python, Login(f"http://127.0.0.1:{port}", arguments["user"], password))

    # --- health pages and metrics ---------------------------------------------------------------------------------

    def recent_log(self) -> str:
        """Return the ends of the logs of every role."""
        parts = []
        for component in ("controller", "node", "storage"):
            for pod in self.pods(component):
                name = pod["metadata"]["name"]
                ended = self.cluster.run("kubectl", "logs", name, "-n", NAMESPACE, "--tail=60", timeout_s=30)
                parts.append(f"--- {name}\n{ended.stdout}{ended.stderr}")
        return "\n".join(parts)

    def time_in_calls(self) -> Counter[str]:
        """Return the seconds that calls took so far, by method, summed over all pods: from their /metrics."""
        return Counter({method: seconds for method, (seconds, _) in self._calls().items()})

    def calls(self) -> Counter[str]:
        """Return how many calls there were so far, by method."""
        return Counter({method: int(count) for method, (_, count) in self._calls().items()})

    def _calls(self) -> dict[str, tuple[float, float]]:
        sums: Counter[str] = Counter()
        counts: Counter[str] = Counter()
        for text in self._metrics():
            for name, labels, value in _SAMPLE.findall(text):
                method = _METHOD.search(labels)
                assert method is not None, labels
                (sums if name.endswith("_sum") else counts)[method[1]] += float(value)  # type: ignore[assignment]
        return {method: (float(sums[method]), float(counts[method])) for method in counts}

    def _metrics(self) -> Iterator[str]:
        for component in ("controller", "node"):
            for pod in self.pods(component):
                name = pod["metadata"]["name"]
                (port,) = (
                    port["containerPort"]
                    for container in pod["spec"]["containers"]
                    for port in container.get("ports", [])
                    if container["name"] == "driver" and port["name"] == "http"
                )
                yield self.cluster.kubectl(
                    "get", "--raw", f"/api/v1/namespaces/{NAMESPACE}/pods/{name}:{port}/proxy/metrics"
                )
