# SPDX-License-Identifier: Apache-2.0
"""A second driver next to the first, and the life of a release: install, upgrade, roll back, uninstall."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import pytest

from tests.kubernetes.driver import NAME, NAMESPACE, Driver
from tests.kubernetes.kubectl import HERE, Cluster, Document, KubectlFailed
from tests.kubernetes.load import claim, user_of

CHART = HERE.parents[1] / "deploy" / "helm" / "nvmesh-csi-driver"
SECOND = "fast.example.com"
RELEASE = "fast"
# The node's file system below /run is the cluster's own, and its end looks for devices below the directory of the pool.
VALUES: dict[str, Any] = {
    "driverName": SECOND,
    "zone": "fast-zone",
    "controller": {"replicas": 1},
    "storage": {"poolDirectory": "/var/lib/nvmesh-csi/fast", "deviceDirectory": "/run/fast.example.com/devices"},
    "storageClasses": [{"name": "fast-xfs", "fsType": "xfs", "parameters": {"raidLevel": "concatenated"}}],
    "volumeAttributesClasses": [{"name": "fast-first", "parameters": {"relativeRebuildPriority": 9}}],
    "networkPolicy": {"enabled": True},
    "test": {"storageClass": "fast-xfs"},
}
THERE_BEFORE: Document = {
    "apiVersion": "storage.k8s.io/v1",
    "kind": "StorageClass",
    "metadata": {"name": f"{SECOND}-concatenated"},
    "provisioner": SECOND,
    "reclaimPolicy": "Retain",
    "volumeBindingMode": "WaitForFirstConsumer",
    "parameters": {"raidLevel": "concatenated"},
}


class Release:
    """The second driver's release."""

    def __init__(self, cluster: Cluster) -> None:
        self.cluster = cluster
        first = json.loads(self.helm("get", "values", "nvmesh-csi", "--output", "json", namespace=NAMESPACE))
        # Where the first one's directories are is no matter of the second one.
        first["storage"] = {key: value for key, value in first["storage"].items() if not key.endswith("Directory")}
        self._first: dict[str, Any] = first

    def helm(self, *words: str, stdin: str | None = None, namespace: str = RELEASE) -> str:
        ended = self.cluster.run("helm", *words, "--namespace", namespace, stdin=stdin, timeout_s=420)
        if ended.status:
            raise KubectlFailed(("helm", *words), ended.status, ended.stderr)
        return ended.stdout

    def put(self, *words: str, **changes: Any) -> None:
        """Install the release, or bring it to these values."""
        values = {**self._first, **VALUES, "storage": {**self._first["storage"], **VALUES["storage"]}, **changes}
        how = ("upgrade", "--install", RELEASE, str(CHART), "--create-namespace", "--values", "-", *words)
        self.helm(*how, stdin=json.dumps(values))

    def registered(self) -> dict[str, list[str]]:
        """Return the topology keys of the node's drivers by their names."""
        (node,) = self.cluster.all("csinodes")
        return {each["name"]: each.get("topologyKeys") or [] for each in node["spec"].get("drivers") or []}

    def wait_registered(self) -> None:
        self.cluster.wait_for(lambda: SECOND in self.registered(), f"the node to know {SECOND}")


@pytest.fixture(scope="module")
def second(cluster: Cluster, driver: Driver) -> Iterator[Release]:
    assert driver.pods("storage") != []
    cluster.touched.add(RELEASE)
    cluster.apply([THERE_BEFORE])
    made = Release(cluster)
    made.put("--wait", "--timeout", "5m")
    made.wait_registered()
    yield made
    made.helm("uninstall", RELEASE, "--wait", "--timeout", "5m")
    cluster.delete([THERE_BEFORE, {"kind": "Namespace", "metadata": {"name": RELEASE}}])


def class_of(cluster: Cluster, name: str) -> tuple[str, str, dict[str, str]]:
    """Return the immutable fields of a class."""
    found = cluster.there("storageclass", name)
    return found["reclaimPolicy"], found["volumeBindingMode"], found.get("parameters", {})


def test_a_class_that_others_made_is_left_alone(second: Release, cluster: Cluster) -> None:
    name = THERE_BEFORE["metadata"]["name"]
    assert class_of(cluster, name) == ("Retain", "WaitForFirstConsumer", {"raidLevel": "concatenated"})
    assert name not in second.helm("get", "manifest", RELEASE)
    assert cluster.there("storageclass", f"{SECOND}-local")["provisioner"] == SECOND


def test_one_pod_has_volumes_of_both_drivers(second: Release, cluster: Cluster) -> None:
    drivers = second.registered()
    assert drivers == {NAME: [f"{NAME}/zone"], SECOND: [f"{SECOND}/zone"]}
    labels = cluster.all("nodes")[0]["metadata"]["labels"]
    assert (labels[f"{NAME}/zone"], labels[f"{SECOND}/zone"]) == ("single-zone-cluster", "fast-zone")
    pod = user_of("of-first", name="both", script="date > /data/f && date > /second/f && exec sleep 1000000")
    pod["spec"]["volumes"].append({"name": "second", "persistentVolumeClaim": {"claimName": "of-second"}})
    pod["spec"]["containers"][0]["volumeMounts"].append({"name": "second", "mountPath": "/second"})
    classes = {"storage_class": "fast-xfs", "volumeAttributesClassName": "fast-first"}
    documents = [claim("of-first"), claim("of-second", **classes), pod]
    cluster.apply(documents)
    cluster.wait_ready("both")
    volumes = [str(cluster.there("pvc", name)["spec"]["volumeName"]) for name in ("of-first", "of-second")]
    assert [cluster.there("pv", volume)["spec"]["csi"]["driver"] for volume in volumes] == [NAME, SECOND]
    assert cluster.sh("both", "cat /data/f /second/f").count("\n") == 1
    # An upgrade of one of them, and the way back, under the pod.
    second.put("--wait", "--timeout", "5m", logLevel="debug")
    second.helm("rollback", RELEASE, "--wait", "--timeout", "5m")
    second.wait_registered()
    assert cluster.sh("both", "date >> /data/f; date >> /second/f; cat /data/f /second/f").count("\n") == 3
    cluster.delete(documents)
    for volume in volumes:
        cluster.wait_gone("pv", volume)


def test_helm_tests_the_release_and_nothing_of_it_stays(second: Release, cluster: Cluster) -> None:
    said = second.helm("test", RELEASE, "--logs", "--timeout", "5m")
    assert "Succeeded" in said
    assert "/volume/data: OK" in said
    cluster.wait_for(
        lambda: not [pv for pv in cluster.all("pv") if pv["spec"]["csi"]["driver"] == SECOND], "the volume to be gone"
    )
    assert cluster.all("pvc", RELEASE) == []


def test_an_upgrade_keeps_what_cannot_be_changed_of_a_class(second: Release, cluster: Cluster) -> None:
    name = f"{SECOND}-local"
    older = cluster.there("storageclass", name)
    kept = {key: older["metadata"][key] for key in ("name", "labels", "annotations")}
    older |= {"metadata": kept, "reclaimPolicy": "Retain", "volumeBindingMode": "Immediate"}
    cluster.delete([older])
    cluster.kubectl("create", "-f", "-", stdin=json.dumps(older))
    second.put("--wait", "--timeout", "5m")
    assert class_of(cluster, name) == ("Retain", "Immediate", {"raidLevel": "concatenated"})


def test_an_upgrade_that_kubernetes_would_refuse_halfway_changes_nothing(second: Release, cluster: Cluster) -> None:
    """`attachRequired` stays as it is, so everything does: a release without attacher could attach nothing."""
    before = second.helm("get", "manifest", RELEASE)
    words = ("upgrade", RELEASE, str(CHART), "-n", RELEASE, "--reset-then-reuse-values", "--set", "attachBy=node")
    refused = cluster.run("helm", *words)
    assert refused.status != 0
    assert f"CSIDriver object {SECOND} of this cluster has attachRequired: true" in refused.stderr
    assert second.helm("get", "manifest", RELEASE) == before


def test_kubelet_refuses_a_second_driver_with_another_zone_under_the_same_key(
    second: Release, cluster: Cluster
) -> None:
    second.put(topologyKey=f"{NAME}/zone")

    def is_refused() -> bool:
        return "detected topology value collision" in cluster.kubectl(
            "logs", "--namespace", RELEASE, "--selector", "app.kubernetes.io/component=node", "--tail=50"
        )

    cluster.wait_for(is_refused, "the refusal of kubelet in the driver's log")
    assert SECOND not in second.registered()
    second.put("--wait", "--timeout", "5m")
    second.wait_registered()
    assert NAME in second.registered()
