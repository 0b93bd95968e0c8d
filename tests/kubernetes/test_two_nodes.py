# SPDX-License-Identifier: Apache-2.0
"""A volume and two nodes: it moves with its pod, and off a node that is lost. Needs cluster/second-node."""

from __future__ import annotations

import contextlib
import subprocess
from collections.abc import Iterator

import pytest

from tests.kubernetes.driver import Driver
from tests.kubernetes.kubectl import HERE, Cluster, Document, status_of
from tests.kubernetes.load import claim, user_of
from tests.kubernetes.stage import Stage
from tests.kubernetes.storage import Storage

FIRST, SECOND = "node1", "node2"
OUT_OF_SERVICE = "node.kubernetes.io/out-of-service=nodeshutdown:NoExecute"
COUNT = "i=0; while :; do i=$((i + 1)); echo $i > /data/n && sync /data/n && mv /data/n /data/count; sleep 0.2; done"
HOW_TO_START = (
    "the cluster has one node; run tests/kubernetes/cluster/second-node, then tests/kubernetes/cluster/install "
    "--values tests/kubernetes/cluster/values-two-nodes.yaml"
)


@pytest.fixture(autouse=True)
def _two_nodes(cluster: Cluster) -> None:
    if cluster.get("node", SECOND) is None:
        pytest.skip(HOW_TO_START)


def placed(pod: Document, node: str) -> Document:
    pod["spec"]["nodeSelector"] = {"kubernetes.io/hostname": node}
    return pod


def on_second(*argv: str) -> str:
    """Run a command on the second node."""
    return subprocess.run(
        [str(HERE / "cluster" / "on-second"), *argv], check=True, capture_output=True, text=True
    ).stdout


def deployment_of(pod: Document, node: str) -> Document:
    """Return a Deployment of one such pod, which prefers a node."""
    labels = {"app": pod["metadata"]["name"]}
    on_node = {"matchExpressions": [{"key": "kubernetes.io/hostname", "operator": "In", "values": [node]}]}
    preferred = {"preferredDuringSchedulingIgnoredDuringExecution": [{"weight": 100, "preference": on_node}]}
    return {
        "apiVersion": "apps/v1",
        "kind": "Deployment",
        "metadata": {"name": pod["metadata"]["name"]},
        "spec": {
            "selector": {"matchLabels": labels},
            "strategy": {"type": "Recreate"},
            "template": {
                "metadata": {"labels": labels},
                "spec": {**pod["spec"], "affinity": {"nodeAffinity": preferred}},
            },
        },
    }


def ready_on(cluster: Cluster, app: str, node: str) -> str | None:
    """Return the name of the app's pod if it is ready on that node."""
    pods = cluster.all("pod", selector=f"app={app}")
    here = (pod for pod in pods if pod["spec"].get("nodeName") == node and status_of(pod, "Ready") == "True")
    return next((str(pod["metadata"]["name"]) for pod in here), None)


def attached_nodes(cluster: Cluster, volume: str) -> set[str]:
    """Return the nodes for which a PersistentVolume has a VolumeAttachment."""
    attachments = cluster.all("volumeattachment", namespace=None)
    return {
        str(each["spec"]["nodeName"])
        for each in attachments
        if each["spec"]["source"].get("persistentVolumeName") == volume
    }


def count_in(cluster: Cluster, pod: str) -> int:
    return int(cluster.sh(pod, "cat /data/count"))


@contextlib.contextmanager
def lost(cluster: Cluster, storage: Storage) -> Iterator[None]:
    """Take the second node away: its storage client is down and its kubelet silent, while its containers run on."""
    storage.call("POST", "/tests/hold", {"kind": f"client:{SECOND}", "held": True})
    on_second("systemctl", "stop", "kubelet")
    try:
        cluster.wait_for(lambda: status_of(cluster.there("node", SECOND), "Ready") != "True", "node2 to be missed")
        cluster.kubectl("taint", "nodes", SECOND, OUT_OF_SERVICE)
        yield
    finally:
        storage.call("POST", "/tests/hold", {"kind": f"client:{SECOND}", "held": False})
        on_second("systemctl", "start", "kubelet")
        cluster.wait_for(lambda: status_of(cluster.there("node", SECOND), "Ready") == "True", "node2 to be back")
        cluster.kubectl("taint", "nodes", SECOND, OUT_OF_SERVICE + "-")


def test_after_a_rollout_the_controllers_are_on_two_nodes(driver: Driver) -> None:
    """The outgoing pods must not repel the new ones (matchLabelKeys): each new one would go where the other is."""
    for _ in range(2):
        driver.restart("controller")
        driver.wait_ready("controller")
        assert {pod["spec"]["nodeName"] for pod in driver.pods("controller")} == {FIRST, SECOND}


def test_a_volume_moves_to_the_other_node_with_its_pod(stage: Stage, cluster: Cluster) -> None:
    stage.apply([claim("moving", storage_class="nvmesh-xfs")])
    words: list[str] = []
    for node, text in ((SECOND, "one"), (FIRST, "two"), (SECOND, "three")):
        pod = placed(user_of("moving"), node)
        stage.apply([pod])
        cluster.wait_ready("moving")
        cluster.sh("moving", f"echo {text} >> /data/words && sync")
        words = cluster.sh("moving", "cat /data/words").split()
        cluster.delete([pod])
    assert words == ["one", "two", "three"]


def test_a_lost_nodes_volume_is_taken_over_and_what_still_runs_there_writes_no_more(
    stage: Stage, cluster: Cluster, storage: Storage
) -> None:
    old = placed(user_of("lost-node", "lost-node-old", COUNT), SECOND)
    stage.apply([claim("lost-node", storage_class="nvmesh-xfs"), old])
    cluster.wait_ready("lost-node-old")
    cluster.wait_for(lambda: count_in(cluster, "lost-node-old") > 5, "the pod to write")
    with lost(cluster, storage):
        cluster.wait_gone("pod", "lost-node-old")
        stage.apply([placed(user_of("lost-node", "lost-node-new"), FIRST)])
        cluster.wait_ready("lost-node-new")
        found = count_in(cluster, "lost-node-new")
        assert found > 5
        assert on_second("pgrep", "-f", "mv /data/n"), "nothing writes on the lost node: this would prove nothing"
        cluster.sh("lost-node-new", "echo taken > /data/owner && sync && sleep 3")
        assert count_in(cluster, "lost-node-new") == found
    assert cluster.sh("lost-node-new", "cat /data/owner") == "taken"


def test_after_the_taint_a_workload_leaves_a_lost_node_without_a_further_step(
    stage: Stage, cluster: Cluster, storage: Storage
) -> None:
    deployment = deployment_of(user_of("tainted", script=COUNT), SECOND)
    stage.apply([claim("tainted", storage_class="nvmesh-xfs"), deployment])
    old = cluster.wait_for(lambda: ready_on(cluster, "tainted", SECOND), "the pod to run on node2")
    cluster.wait_for(lambda: count_in(cluster, old) > 5, "the pod to write")
    volume = stage.volume("tainted").volume
    assert attached_nodes(cluster, volume) == {SECOND}
    written = count_in(cluster, old)
    with lost(cluster, storage):
        new = cluster.wait_for(lambda: ready_on(cluster, "tainted", FIRST), "the pod to run on node1")
        assert attached_nodes(cluster, volume) == {FIRST}
        assert int(cluster.sh(new, "cat /data/n")) > 0
        assert cluster.get("pod", old) is None
        cluster.wait_for(lambda: count_in(cluster, new) > 0, "the pod to write on node1")
    assert written > 5
