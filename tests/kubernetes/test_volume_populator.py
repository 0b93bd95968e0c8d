# SPDX-License-Identifier: Apache-2.0
"""What volume populators do with volumes of the driver, step by step as lib-volume-populator does it, by kubectl.

A populator fills a claim that names one of its objects as the data source: it makes another claim, lets a pod write
the data to that, and then gives the PersistentVolume to the claim of the user.
"""

from __future__ import annotations

from tests.kubernetes.kubectl import Cluster, Document
from tests.kubernetes.load import claim, user_of
from tests.kubernetes.stage import Stage
from tests.kubernetes.storage import Storage

GROUP = "populators.example.com"
SELECTED_NODE = "volume.kubernetes.io/selected-node"
XFS = "nvmesh-xfs"
SOURCES: Document = {
    "apiVersion": "apiextensions.k8s.io/v1",
    "kind": "CustomResourceDefinition",
    "metadata": {"name": f"buckets.{GROUP}"},
    "spec": {
        "group": GROUP,
        "scope": "Namespaced",
        "names": {"plural": "buckets", "singular": "bucket", "kind": "Bucket"},
        "versions": [
            {
                "name": "v1",
                "served": True,
                "storage": True,
                "schema": {"openAPIV3Schema": {"type": "object", "x-kubernetes-preserve-unknown-fields": True}},
            }
        ],
    },
}


def test_a_claim_is_filled_by_a_populator_and_is_the_users_from_then_on(
    stage: Stage, cluster: Cluster, storage: Storage
) -> None:
    stage.apply([SOURCES])
    cluster.kubectl("wait", "--for=condition=Established", f"crd/buckets.{GROUP}", "--timeout=60s")
    source = {"apiGroup": GROUP, "kind": "Bucket", "name": "data"}
    wanted = claim("filled", storage_class=XFS, dataSourceRef=source)
    stage.apply([wanted, user_of("filled")])

    # The provisioner leaves the claim to the populator; the scheduler still chooses the node of the pod.
    def placed() -> Document | None:
        found = cluster.there("pvc", "filled")
        return found if SELECTED_NODE in found["metadata"].get("annotations", {}) else None

    waiting = cluster.wait_for(placed, "the scheduler to choose a node")
    assert waiting["status"]["phase"] == "Pending"
    prime = claim("prime", storage_class=XFS)
    prime["metadata"]["annotations"] = {SELECTED_NODE: waiting["metadata"]["annotations"][SELECTED_NODE]}
    filler = user_of("prime", script="echo data > /data/file && sync && exec sleep 1000000")
    stage.apply([prime, filler])
    cluster.wait_ready("prime")
    cluster.wait_for(lambda: cluster.try_exec("prime", "test", "-s", "/data/file").status == 0, "the data")
    volume = stage.volume("prime")
    cluster.delete([filler])

    reference = {"namespace": "default", "name": "filled", "uid": waiting["metadata"]["uid"]}
    reference["resourceVersion"] = cluster.there("pvc", "filled")["metadata"]["resourceVersion"]
    cluster.patch("pv", volume.volume, {"spec": {"claimRef": reference}})
    assert stage.volume("filled") == volume
    cluster.wait_for(lambda: cluster.there("pvc", "prime")["status"]["phase"] == "Lost", "the other claim to be lost")
    # Its end takes nothing along.
    cluster.delete([prime])
    cluster.wait_ready("filled")
    assert cluster.sh("filled", "cat /data/file") == "data"
    assert storage.volumes()[volume.name]["uuid"] == volume.uuid

    cluster.patch("pvc", "filled", {"spec": {"resources": {"requests": {"storage": "2Gi"}}}})
    cluster.wait_for(
        lambda: cluster.there("pvc", "filled")["status"]["capacity"]["storage"] == "2Gi", "the claim to grow"
    )
    cluster.delete([user_of("filled"), wanted])
    cluster.wait_gone("pv", volume.volume)
    assert volume.name not in storage.volumes()
