# SPDX-License-Identifier: Apache-2.0
"""A node's life in Kubernetes: its start-up taint, the stop of its driver while it is drained, a look at it."""

from __future__ import annotations

import json
from collections.abc import Iterator

import pytest

from tests.kubernetes.driver import NAME, NAMESPACE, Driver
from tests.kubernetes.kubectl import Cluster
from tests.kubernetes.load import claim, user_of
from tests.kubernetes.stage import Stage

TAINT, OTHER = f"{NAME}/agent-not-ready", "example.com/another"


def node_of(driver: Driver) -> tuple[str, str]:
    """Return the names of the node's pod and of its node."""
    (pod,) = driver.pods("node")[:1]
    return str(pod["metadata"]["name"]), str(pod["spec"]["nodeName"])


def taints(cluster: Cluster, node: str) -> set[str]:
    return {taint["key"] for taint in cluster.there("node", node)["spec"].get("taints", [])}


@pytest.fixture
def node(driver: Driver, cluster: Cluster) -> Iterator[str]:
    """A node with a foreign taint, which is uncordoned afterwards."""
    _, name = node_of(driver)
    cluster.kubectl("taint", "node", name, f"{OTHER}=x:PreferNoSchedule", "--overwrite")
    yield name
    cluster.kubectl("uncordon", name)
    cluster.kubectl("taint", "node", name, f"{OTHER}-")
    driver.wait_ready("node")


@pytest.mark.short
def test_a_startup_taint_goes_when_the_driver_is_registered_and_no_other_goes(
    driver: Driver, cluster: Cluster, node: str
) -> None:
    cluster.kubectl("taint", "node", node, f"{TAINT}=any:NoSchedule", f"{TAINT}=any:NoExecute", "--overwrite")
    driver.delete_pods("node")
    cluster.wait_for(lambda: TAINT not in taints(cluster, node), "the removal of the taint")
    assert OTHER in taints(cluster, node)
    registered = cluster.there("csinode", node)["spec"]["drivers"]
    assert NAME in {plugin["name"] for plugin in registered}


def test_an_update_of_a_node_in_use_waits_for_nothing(driver: Driver, cluster: Cluster, stage: Stage) -> None:
    stage.apply([claim("updated"), user_of("updated")])
    cluster.wait_ready("updated")
    pod, _ = node_of(driver)
    # Below the hook's time and the driver's own end.
    cluster.kubectl("delete", "pod", pod, "-n", NAMESPACE, "--timeout=60s", timeout_s=70)
    driver.wait_ready("node")


def test_the_driver_of_a_drained_node_stays_until_its_volumes_are_detached(
    driver: Driver, cluster: Cluster, stage: Stage, node: str
) -> None:
    stage.apply([claim("drained"), user_of("drained")])
    cluster.wait_ready("drained")
    handle = stage.volume("drained").handle
    pod, _ = node_of(driver)
    cluster.kubectl("cordon", node)
    cluster.kubectl("delete", "pod", pod, "-n", NAMESPACE, "--wait=false")
    cluster.wait_for(lambda: f"{handle} is mounted" in cluster.logs(pod, NAMESPACE), "the reason of the wait")
    cluster.kubectl("delete", "pod", "drained", "--wait=false")
    cluster.wait_gone("pod", pod, NAMESPACE)
    attached = [each["spec"]["source"] for each in cluster.all("volumeattachment", None)]
    assert attached == []
    assert cluster.there("node", node)["status"].get("volumesInUse") in (None, [])


@pytest.mark.short
def test_a_look_from_inside_finds_nothing_that_keeps_the_driver_from_work(driver: Driver, cluster: Cluster) -> None:
    for role in ("node", "controller"):
        (pod, *_) = driver.pods(role)
        name = pod["metadata"]["name"]
        told = cluster.try_exec(name, "nvmesh-csi", "doctor", "--json", namespace=NAMESPACE, container="driver")
        findings = json.loads(told.stdout)["findings"]
        assert [each for each in findings if each["severity"] == "error"] == []
        assert told.status == 0
        seen = {each["check"] for each in findings if each["severity"] == "ok"}
        wanted = {"node": {"driver", "registration", "propagation", "client"}, "controller": {"driver", "login"}}
        assert wanted[role] <= seen
