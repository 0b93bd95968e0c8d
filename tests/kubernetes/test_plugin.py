# SPDX-License-Identifier: Apache-2.0
"""`kubectl nvmesh` on the real cluster: what is broken here is named first, and a bundle has no secret."""

from __future__ import annotations

import base64
import json
import tarfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from csi_driver.local.bundle import Secrets
from tests.kubernetes.conftest import Run, first_problem
from tests.kubernetes.driver import NAME, NAMESPACE, Driver
from tests.kubernetes.kubectl import Cluster, Document, KubectlFailed
from tests.kubernetes.load import claim, user_of
from tests.kubernetes.stage import Stage
from tests.kubernetes.storage import Storage
from tests.kubernetes.test_life import storage_class


def static(name: str, handle: str) -> Document:
    return {
        "apiVersion": "v1", "kind": "PersistentVolume", "metadata": {"name": name},
        "spec": {
            "capacity": {"storage": "1Gi"}, "accessModes": ["ReadWriteOnce"], "storageClassName": "",
            "persistentVolumeReclaimPolicy": "Retain", "csi": {"driver": NAME, "volumeHandle": handle},
        },
    }  # fmt: skip


SECRET = {
    "csi.storage.k8s.io/node-stage-secret-name": "no-such-secret",
    "csi.storage.k8s.io/node-stage-secret-namespace": "default",
}
BROKEN: dict[str, tuple[list[Document], str]] = {
    "no-class": ([claim("no-class", "1Gi", "nvmehs")], "its StorageClass nvmehs does not exist"),
    "no-pod": ([claim("no-pod", "1Gi", "nvmesh-xfs")], "no pod uses it"),
    "wrong-driver": (
        [
            {**storage_class("wrong-driver", {}), "provisioner": "nvmesh-csi.exelero.com"},
            claim("wrong-driver", "1Gi", "wrong-driver"),
        ],
        "no driver of the name nvmesh-csi.exelero.com is installed",
    ),
    "wrong-group": (
        [storage_class("wrong-group", {"vpg": "no-such-group"}), claim("wrong-group", "1Gi", "wrong-group")],
        "an existing volume provisioning group",
    ),
    "wrong-key": (
        [
            storage_class("wrong-key", {"raidlevel": "concatenated"}, "WaitForFirstConsumer"),
            claim("wrong-key", "1Gi", "wrong-key"),
            user_of("wrong-key"),
        ],
        "parameter 'raidlevel' is not known",
    ),
    "too-large": ([claim("too-large", "900Ti", "nvmesh-xfs"), user_of("too-large")], "900Ti are requested of class"),
    "no-source": (
        [
            {
                **claim("no-source"),
                "spec": {
                    **claim("no-source")["spec"],
                    "dataSource": {"kind": "PersistentVolumeClaim", "name": "gone"},
                },
            },
            user_of("no-source"),
        ],
        "its source, PersistentVolumeClaim default/gone, does not exist",
    ),
    "no-secret": (
        [
            storage_class("no-secret", {"raidLevel": "concatenated", **SECRET}, "WaitForFirstConsumer"),
            claim("no-secret", "1Gi", "no-secret"),
            user_of("no-secret"),
        ],
        'secrets "no-such-secret" not found',
    ),
}


@pytest.mark.parametrize("name", BROKEN)
def test_what_is_broken_is_named_first(stage: Stage, cluster: Cluster, nvmesh: Run, name: str) -> None:
    documents, words = BROKEN[name]
    stage.apply(documents)
    first_problem(cluster, nvmesh, name, words)


def test_a_static_volume_that_does_not_exist_is_named(stage: Stage, cluster: Cluster, nvmesh: Run) -> None:
    bound = claim("nowhere", "1Gi", "")
    bound["spec"]["volumeName"] = "nowhere"
    stage.apply([static("nowhere", "single-zone-cluster:nowhere"), bound])
    first_problem(cluster, nvmesh, "nowhere", "does not exist")


def test_a_claim_that_a_used_up_quota_refused_is_explained(stage: Stage, cluster: Cluster, nvmesh: Run) -> None:
    hard = {"nvmesh-xfs.storageclass.storage.k8s.io/persistentvolumeclaims": "0"}
    quota = {
        "apiVersion": "v1", "kind": "ResourceQuota", "metadata": {"name": "full"}, "spec": {"hard": hard},
    }  # fmt: skip
    stage.apply([quota])
    cluster.wait_for(lambda: cluster.there("resourcequota", "full").get("status", {}).get("used"), "the quota's use")
    with pytest.raises(KubectlFailed, match="exceeded quota: full"):
        stage.apply([claim("refused", storage_class="nvmesh-xfs")])
    first_problem(cluster, nvmesh, "refused", "quota full is used up")


def test_a_pod_whose_node_lost_the_driver_is_explained(
    stage: Stage, cluster: Cluster, driver: Driver, nvmesh: Run
) -> None:
    stage.apply([claim("left"), user_of("left")])
    cluster.wait_ready("left")
    _, name = driver.workload("node").split("/")
    selector = "spec.template.spec.nodeSelector"
    before = cluster.there("daemonset", name, NAMESPACE)["spec"]["template"]["spec"].get("nodeSelector", {})
    cluster.patch("daemonset", name, _at(selector, {"no-such-label": "true"}), NAMESPACE)
    try:
        first_problem(cluster, nvmesh, "left", "is not registered there")
    finally:
        cluster.patch("daemonset", name, _at(selector, {**before, "no-such-label": None}), NAMESPACE)
        driver.wait_ready("node")


def _at(path: str, value: Document) -> Document:
    for key in reversed(path.split(".")):
        value = {key: value}
    return value


def test_a_healthy_volume_is_listed_held_and_not_released(
    stage: Stage, cluster: Cluster, storage: Storage, nvmesh: Run
) -> None:
    stage.apply([claim("well"), user_of("well")])
    node = cluster.wait_ready("well")["spec"]["nodeName"]
    volume = stage.volume("well")

    def is_well() -> bool:
        return nvmesh("why", "pod/well", "-n", "default")[0] == 0

    cluster.wait_for(is_well, f"nothing to be wrong: {nvmesh('why', 'well', '-n', 'default')[1]}")
    status, shown = nvmesh("volumes", "-n", "default")
    (row,) = (line.split() for line in shown.splitlines() if " well " in line)
    assert (status, row[:4], row[5:7]) == (0, ["default", "well", "well", node], [node, "healthy"])
    status, shown = nvmesh("holders", "well", "-n", "default")
    assert status == 0
    assert "pod default/well" in shown
    for name in (volume.volume, volume.handle):
        assert nvmesh("holders", name, "-n", "default")[1] == shown
    status, shown = nvmesh("release", "well", "-n", "default", "--node", node, "--yes")
    assert (status, shown.startswith(f"node {node} is Ready")) == (1, True)
    assert nvmesh("allow-format", "well", "-n", "default", "--yes")[0] == 2
    assert cluster.sh("well", "date > /data/still && cat /data/still")


def test_a_format_is_allowed_once_for_a_volume_without_pods(stage: Stage, cluster: Cluster, nvmesh: Run) -> None:
    stage.apply([claim("old"), user_of("old")])
    cluster.wait_ready("old")
    cluster.kubectl("delete", "pod", "old")
    said: list[str] = []

    def is_allowed() -> bool:
        status, shown = nvmesh("allow-format", "old", "-n", "default", "--yes")
        said.append(shown)
        return status == 0

    cluster.wait_for(is_allowed, "the volume to be detached and the format to be allowed")
    assert "allowed the next attachment" in said[-1]
    status, shown = nvmesh("allow-format", "old", "-n", "default", "--yes")
    assert (status, "already" in shown) == (1, True)


def secrets_of_the_driver(cluster: Cluster) -> Iterator[tuple[str, str]]:
    for secret in cluster.all("secret", NAMESPACE):
        for key, value in (secret.get("data") or {}).items():
            if not secret["type"].startswith("helm.sh"):
                yield f"{secret['metadata']['name']}/{key}", base64.b64decode(value).decode(errors="surrogateescape")


def test_a_bundle_has_no_secret_of_the_driver(cluster: Cluster, driver: Driver, nvmesh: Run, tmp_path: Path) -> None:
    target = tmp_path / "bundle.tar.gz"
    status, shown = nvmesh("doctor", "--bundle", str(target))
    assert "no secret of controller, storage, node is in it" in shown, shown
    with tarfile.open(target) as archive:
        names = archive.getnames()
        content = b"".join(each.read() for name in names if (each := archive.extractfile(name)) is not None)
    assert any(name.endswith("logs.txt") for name in names)
    secrets = dict(secrets_of_the_driver(cluster))
    assert secrets
    assert list(Secrets(secrets).find(content)) == []
    assert status in (0, 1)


@pytest.mark.parametrize(("component", "container"), [("controller", "driver"), ("storage", "storage")])
def test_the_search_in_a_pod_knows_its_password(
    cluster: Cluster, driver: Driver, component: str, container: str
) -> None:
    """Else a bundle would be searched for nothing."""
    pod = driver.pods(component)[0]["metadata"]["name"]
    known = []
    for name, secret in secrets_of_the_driver(cluster):
        where = ("exec", "-i", pod, "-n", NAMESPACE, "-c", container, "--", "nvmesh-csi", "doctor", "--scan")
        ended = cluster.run("kubectl", *where, stdin=f"it is {secret}.")
        assert secret not in ended.stdout + ended.stderr
        known += [name] if json.loads(ended.stdout)["found"] else []
    assert [name for name in known if "password" in name]
