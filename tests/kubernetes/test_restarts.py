# SPDX-License-Identifier: Apache-2.0
"""Driver, kubelet and storage manager are killed, replaced and upgraded under writing pods, without effect on them."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest

from tests.kubernetes.driver import NAME, NAMESPACE, Driver
from tests.kubernetes.kubectl import Cluster
from tests.kubernetes.load import Writer, claim, user_of
from tests.kubernetes.stage import Stage

REGISTRY = "/var/lib/kubelet/plugins_registry"


@pytest.fixture(autouse=True)
def driver_is_left_well(driver: Driver, cluster: Cluster) -> Iterator[None]:
    yield
    driver.wait_ready()
    cluster.wait_for(lambda: is_registered(cluster), "every node to know the driver")


def is_registered(cluster: Cluster) -> bool:
    """Return whether kubelet has the driver registered, on every node."""
    known = [[each["name"] for each in node["spec"].get("drivers") or []] for node in cluster.all("csinodes")]
    return bool(known) and all(NAME in names for names in known)


def assert_volumes_come_and_go(stage: Stage, cluster: Cluster, name: str) -> None:
    """Prove that a whole life of a volume, from the claim to its end, goes as ever."""
    pod = user_of(name, script="date > /data/file; sync; exec sleep 1000000")
    documents = [claim(name), pod]
    stage.apply(documents)
    cluster.wait_ready(name)
    assert cluster.sh(name, "cat /data/file") != ""
    volume = stage.volume(name)
    cluster.delete(documents)
    cluster.wait_gone("pv", volume.volume)


def test_the_node_plugin_is_upgraded_under_mounted_volumes(stage: Stage, cluster: Cluster, driver: Driver) -> None:
    writers = [Writer(stage, cluster, f"upgraded-{number}") for number in range(2)]
    before = {pod["metadata"]["uid"] for pod in driver.pods("node")}
    # Another annotation is another pod, as another image would be.
    change = {"spec": {"template": {"metadata": {"annotations": {"tests/upgraded": stage.unique()}}}}}
    kind, name = driver.workload("node").split("/")
    cluster.patch(kind, name, change, NAMESPACE)
    cluster.kubectl("rollout", "status", driver.workload("node"), "-n", NAMESPACE, "--timeout=400s", timeout_s=420)
    driver.wait_ready("node")
    assert before.isdisjoint({pod["metadata"]["uid"] for pod in driver.pods("node")})
    for writer in writers:
        writer.assert_goes_on()
    assert_volumes_come_and_go(stage, cluster, "after-the-upgrade")


def kubelet(cluster: Cluster, driver: Driver) -> None:
    assert cluster.has_processes_of_its_own()
    before = cluster.run("pgrep", "-x", "kubelet").stdout
    assert cluster.run("pkill", "-KILL", "-x", "kubelet").status == 0
    cluster.wait_for(lambda: cluster.run("pgrep", "-x", "kubelet").stdout not in ("", before), "a new kubelet")


DISTURBANCES: dict[str, Callable[[Cluster, Driver], None]] = {
    "kubelet is killed": kubelet,
    "the node plugin is killed": lambda cluster, driver: driver.kill("node"),
    "the node plugin's pod is deleted by force": lambda cluster, driver: driver.delete_pods("node", force=True),
    "every controller is killed": lambda cluster, driver: driver.kill("controller"),
    "every controller's pod is deleted": lambda cluster, driver: driver.delete_pods("controller"),
    "the storage manager is killed": lambda cluster, driver: driver.kill("storage"),
    "the storage manager's pod is deleted": lambda cluster, driver: driver.delete_pods("storage"),
}


@pytest.mark.parametrize("what", DISTURBANCES)
def test_writers_go_on_and_volumes_come_and_go_although(
    stage: Stage, cluster: Cluster, driver: Driver, what: str
) -> None:
    writer = Writer(stage, cluster, "undisturbed")
    DISTURBANCES[what](cluster, driver)
    # Immediately: the call must wait for a missing process, not fail.
    assert_volumes_come_and_go(stage, cluster, "meanwhile")
    driver.wait_ready()
    writer.assert_goes_on()


def test_everything_is_killed_at_once_while_volumes_come_and_go(stage: Stage, cluster: Cluster, driver: Driver) -> None:
    writer = Writer(stage, cluster, "undisturbed")
    names = [f"between-{number}" for number in range(3)]
    stage.apply([document for name in names for document in (claim(name), user_of(name))])
    for role in ("storage", "node", "controller"):
        driver.kill(role)
    kubelet(cluster, driver)
    for name in names:
        cluster.wait_ready(name)
        assert cluster.sh(name, "date > /data/file; sync; wc -l < /data/file") == "1"
    writer.assert_goes_on()


def test_a_registration_that_is_taken_away_comes_back(stage: Stage, cluster: Cluster, driver: Driver) -> None:
    sockets = cluster.run("sh", "-c", f"ls {REGISTRY}").stdout.split()
    (socket,) = (name for name in sockets if NAME in name)
    inode = cluster.run("stat", "-c", "%i", f"{REGISTRY}/{socket}").stdout
    assert cluster.run("rm", f"{REGISTRY}/{socket}").status == 0

    def is_back() -> bool:
        there = cluster.run("stat", "-c", "%i", f"{REGISTRY}/{socket}")
        return there.status == 0 and there.stdout != inode

    cluster.wait_for(is_back, "the registration socket to be back")
    cluster.wait_for(lambda: is_registered(cluster), "every node to know the driver again")
    assert_volumes_come_and_go(stage, cluster, "registered-again")
