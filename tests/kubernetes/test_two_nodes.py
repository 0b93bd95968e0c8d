# SPDX-License-Identifier: Apache-2.0
"""A volume and two nodes: it moves with its pod, and off a node that is lost. Needs cluster/second-node."""

from __future__ import annotations

import contextlib
import subprocess
from collections.abc import Iterator

import pytest

from tests.kubernetes.conftest import Run, first_problem
from tests.kubernetes.driver import Driver
from tests.kubernetes.kubectl import HERE, Cluster, Document, status_of
from tests.kubernetes.load import claim, user_of
from tests.kubernetes.stage import Stage
from tests.kubernetes.storage import Storage

FIRST, SECOND = "node1", "node2"
OUT_OF_SERVICE = "node.kubernetes.io/out-of-service=nodeshutdown:NoExecute"
COUNT = """
i=$(cat /data/count || echo 0)
while :; do i=$((i + 1)); echo $i > /data/n && sync /data/n && mv /data/n /data/count; sleep 0.2; done
"""
"""Counts in a file, on from the number that is there."""
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


def taints(cluster: Cluster) -> str:
    return str(cluster.there("node", SECOND)["spec"].get("taints", []))


@contextlib.contextmanager
def lost(cluster: Cluster, storage: Storage, *, is_marked: bool = True) -> Iterator[None]:
    """Take the second node away: its storage client is down and its kubelet silent, while its containers run on."""
    storage.call("POST", "/tests/hold", {"kind": f"client:{SECOND}", "held": True})
    on_second("systemctl", "stop", "kubelet")
    try:
        cluster.wait_for(lambda: status_of(cluster.there("node", SECOND), "Ready") != "True", "node2 to be missed")
        if is_marked:
            cluster.kubectl("taint", "nodes", SECOND, OUT_OF_SERVICE)
        yield
    finally:
        storage.call("POST", "/tests/hold", {"kind": f"client:{SECOND}", "held": False})
        on_second("systemctl", "start", "kubelet")
        cluster.wait_for(lambda: status_of(cluster.there("node", SECOND), "Ready") == "True", "node2 to be back")
        if OUT_OF_SERVICE.partition("=")[0] in taints(cluster):
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
        assert cluster.get("pod", old) is None
        cluster.wait_for(lambda: count_in(cluster, new) > written, "the pod to count on from the last number")


# --- kubectl nvmesh, and events ---------------------------------------------------------------------------------------


@contextlib.contextmanager
def cordoned(cluster: Cluster, *nodes: str) -> Iterator[None]:
    try:
        cluster.kubectl("cordon", *nodes)
        yield
    finally:
        cluster.kubectl("uncordon", *nodes)


@contextlib.contextmanager
def open_on_second(path: str) -> Iterator[None]:
    """Have a program on the second node that uses a path."""
    hold = f"exec 9<{path} && echo $$ && exec sleep 1000"
    with subprocess.Popen(
        [str(HERE / "cluster" / "on-second"), "sh", "-c", hold], stdout=subprocess.PIPE, text=True
    ) as user:
        assert user.stdout is not None
        pid = user.stdout.readline().strip()
        try:
            yield
        finally:
            on_second("kill", pid)


def test_why_names_a_cordoned_node(stage: Stage, cluster: Cluster, nvmesh: Run) -> None:
    with cordoned(cluster, SECOND):
        stage.apply([claim("cordoned"), placed(user_of("cordoned"), SECOND)])
        first_problem(cluster, nvmesh, "cordoned", f"no pod may start on cordoned nodes: {SECOND}")
    cluster.wait_ready("cordoned")


def test_why_names_the_node_that_holds_a_volume_and_a_living_node_is_not_released(
    stage: Stage, cluster: Cluster, nvmesh: Run
) -> None:
    stage.apply([claim("elsewhere"), placed(user_of("elsewhere", "holder"), SECOND)])
    cluster.wait_ready("holder")
    stage.apply([placed(user_of("elsewhere", "waiting"), FIRST)])
    first_problem(cluster, nvmesh, "elsewhere", f"is attached to node {SECOND}, and its pod is on {FIRST}")
    status, shown = nvmesh("release", "elsewhere", "-n", "default", "--node", SECOND, "--yes")
    assert (status, shown.startswith(f"node {SECOND} is Ready")) == (1, True)
    assert OUT_OF_SERVICE.partition("=")[0] not in taints(cluster)


def test_a_volume_of_a_lost_node_is_released_and_its_events_say_so(
    stage: Stage, cluster: Cluster, storage: Storage, nvmesh: Run
) -> None:
    stage.apply([
        claim("released", storage_class="nvmesh-xfs"), deployment_of(user_of("released", script=COUNT), SECOND),
    ])  # fmt: skip
    old = cluster.wait_for(lambda: ready_on(cluster, "released", SECOND), "the pod to run on node2")
    cluster.sh(old, "echo mine > /data/owner && sync")
    mount = on_second("sh", "-c", "grep -o '/var/lib/kubelet/plugins[^ ]*globalmount' /proc/mounts").split()[-1]
    release = ("release", "released", "-n", "default", "--node", SECOND)
    with open_on_second(mount):
        with lost(cluster, storage, is_marked=False):
            first_problem(cluster, nvmesh, "released", f"node {SECOND}: is not Ready")
            status, shown = nvmesh(*release)
            assert (status, "nothing was changed" in shown) == (0, True), shown
            assert OUT_OF_SERVICE.partition("=")[0] not in taints(cluster)
            status, shown = nvmesh(*release, "--yes")
            assert status == 0, shown
            new = cluster.wait_for(lambda: ready_on(cluster, "released", FIRST), "the pod to run on node1")
            assert cluster.sh(new, "cat /data/owner") == "mine"
            cluster.wait_event("released", "VolumeTakenOver", f"from node {SECOND} for node {FIRST}")
            assert "VolumeTakenOver" in cluster.kubectl("describe", "node", SECOND)
        cluster.wait_event(SECOND, "VolumeMountLost")


def test_a_detachment_that_hangs_is_told_on_claim_and_node(stage: Stage, cluster: Cluster, storage: Storage) -> None:
    pod = placed(user_of("busy"), SECOND)
    stage.apply([claim("busy"), pod])
    cluster.wait_ready("busy")
    device = f"/run/nvmesh-csi/own/dev/{stage.volume('busy').name}"
    with open_on_second(device):
        cluster.delete([pod])
        cluster.wait_event("busy", "VolumeNotDetached", f"is still attached to node {SECOND}")
        assert "VolumeNotDetached" in cluster.kubectl("describe", "node", SECOND)
