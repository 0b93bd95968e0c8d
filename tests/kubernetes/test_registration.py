# SPDX-License-Identifier: Apache-2.0
"""Health pages of the driver's pods, and their registration with a real kubelet."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.kubernetes.driver import NAME, NAMESPACE, Driver
from tests.kubernetes.kubectl import Cluster, Document
from tests.kubernetes.test_restarts import REGISTRY, is_registered, kubelet

_ASK = """
import sys, urllib.error, urllib.request
try:
    answer = urllib.request.urlopen(sys.argv[1], timeout=10)
except urllib.error.HTTPError as refused:
    answer = refused
print(answer.status, answer.read().decode(), end="")
"""


@pytest.fixture(autouse=True)
def driver_is_left_well(driver: Driver, cluster: Cluster) -> Iterator[None]:
    yield
    cluster.wait_for(lambda: is_registered(cluster), "the node to know the driver")
    driver.wait_ready()


def page(cluster: Cluster, pod: Document, path: str) -> tuple[int, str]:
    """Ask the driver's container of a pod, from within it: status and page."""
    (container,) = (each for each in pod["spec"]["containers"] if each["name"] in ("driver", "storage"))
    address = next(each.split("=", 1)[1] for each in container["args"] if each.startswith("--http-listen="))
    host = pod["status"]["podIP"] if address.startswith("$(") else address.rpartition(":")[0]
    host = {"0.0.0.0": "127.0.0.1", "": "127.0.0.1", "[::]": "127.0.0.1"}.get(host, host)
    url = f"http://{host}:{address.rpartition(':')[2]}{path}"
    name = pod["metadata"]["name"]
    said = cluster.exec(name, "python3", "-c", _ASK, url, namespace=NAMESPACE, container=str(container["name"]))
    status, _, text = said.partition(" ")
    return int(status), text


def node_pod(driver: Driver) -> Document:
    return driver.pods("node")[0]


def readiness(cluster: Cluster, driver: Driver) -> str:
    return page(cluster, node_pod(driver), "/readyz")[1]


@pytest.mark.parametrize("component", ["controller", "node"])
def test_every_pod_tells_that_it_is_well_and_what_it_measures(cluster: Cluster, driver: Driver, component: str) -> None:
    parser = pytest.importorskip("prometheus_client.parser", reason="run: make .venv/test")
    for pod in driver.pods(component):
        assert page(cluster, pod, "/healthz")[0] == 200
        assert page(cluster, pod, "/readyz")[0] == 200
        families = {
            each.name: each for each in parser.text_string_to_metric_families(page(cluster, pod, "/metrics")[1])
        }
        (build,) = families["nvmesh_csi_build_info"].samples
        assert (build.labels["role"], build.labels["driver_name"]) == (component, NAME)
        if component == "node":
            assert [each.value for each in families["nvmesh_csi_kubelet_registered"].samples] == [1]


def test_a_node_has_one_container(driver: Driver) -> None:
    assert [each["name"] for each in node_pod(driver)["spec"]["containers"]] == ["driver"]


def test_a_registry_that_is_removed_is_made_anew_and_found_by_the_next_kubelet(
    cluster: Cluster, driver: Driver
) -> None:
    assert cluster.run("rm", "-r", REGISTRY).status == 0
    cluster.wait_for(lambda: NAME in cluster.run("ls", REGISTRY).stdout, "the registration socket to be back")
    kubelet(cluster, driver)
    cluster.wait_for(lambda: is_registered(cluster), "the node to know the driver again")
    cluster.wait_for(lambda: "registration: ok" in readiness(cluster, driver), "the driver to know that it is known")


def test_a_refusal_of_kubelets_is_told_with_its_reason_and_mended_without_a_restart(
    cluster: Cluster, driver: Driver
) -> None:
    pod = node_pod(driver)
    (csinode,) = cluster.all("csinodes")
    node = csinode["metadata"]["name"]
    key = next(each for each in csinode["spec"]["drivers"] if each["name"] == NAME)["topologyKeys"][0]
    value = cluster.there("node", node)["metadata"]["labels"][key]
    cluster.kubectl("label", "node", node, f"{key}=elsewhere", "--overwrite")
    try:
        assert cluster.run("sh", "-c", f"rm {REGISTRY}/{NAME}-reg.sock").status == 0
        cluster.wait_for(
            lambda: "kubelet refuses the registration" in readiness(cluster, driver), "a refusal in the log"
        )
        assert key in readiness(cluster, driver)
        assert page(cluster, pod, "/healthz")[0] == 200
    finally:
        cluster.kubectl("label", "node", node, f"{key}={value}", "--overwrite")
    cluster.wait_for(lambda: "registration: ok" in readiness(cluster, driver), "the driver to be registered")
    now = node_pod(driver)
    assert now["metadata"]["uid"] == pod["metadata"]["uid"]
    assert [each["restartCount"] for each in now["status"]["containerStatuses"]] == [
        each["restartCount"] for each in pod["status"]["containerStatuses"]
    ]
