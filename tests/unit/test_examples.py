# SPDX-License-Identifier: Apache-2.0
"""The examples without a cluster: they can be read, and ask for nothing that the driver or its chart does not have."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import yaml

from csi_driver.controller.validate import check_capability
from csi_driver.model import DEFAULT_DRIVER_NAME, AccessMode, BlockAccess, Capability, MountAccess, VolumeHandle
from csi_driver.parameters import storage_class
from csi_driver.parameters.mkfs import FILESYSTEMS, MkfsRequest
from csi_driver.parameters.mount_options import plan_mount
from csi_driver.parameters.storage_class import CONTEXT_KEYS
from tests.kubernetes import examples
from tests.kubernetes.cluster import images
from tests.kubernetes.examples import EXAMPLES, Document

ROOT = Path(__file__).parents[2]
NAMES = [path.name for path in examples.files()]
# What `kubectl api-resources` of Kubernetes 1.34 and newer lists, as far as examples use it.
KINDS = {
    "v1": {"Namespace", "PersistentVolume", "PersistentVolumeClaim", "Pod", "ResourceQuota", "Secret", "Service"},
    "apps/v1": {"Deployment", "StatefulSet"},
    "batch/v1": {"Job"},
    "storage.k8s.io/v1": {"StorageClass", "VolumeAttributesClass"},
    "snapshot.storage.k8s.io/v1": {"VolumeSnapshotClass", "VolumeSnapshot"},
    "groupsnapshot.storage.k8s.io/v1": {"VolumeGroupSnapshotClass", "VolumeGroupSnapshot"},
    "scheduling.run.ai/v2": {"Queue"},
    "velero.io/v1": {"Schedule"},
    "volsync.backube/v1alpha1": {"ReplicationSource", "ReplicationDestination"},
}
SNAPSHOT_CLASSES = ("VolumeSnapshotClass", "VolumeGroupSnapshotClass")
CLUSTER_WIDE = {"Namespace", "PersistentVolume", "StorageClass", "VolumeAttributesClass", *SNAPSHOT_CLASSES}
# Fields of programs that are not in the test cluster: the CRDs of KAI Scheduler 0.13, Velero 1.18 and VolSync 0.17.
_RESTIC = {
    "repository": str, "copyMethod": str, "cacheCapacity": str, "volumeSnapshotClassName": str, "storageClassName": str,
    "accessModes": list, "capacity": str,
}  # fmt: skip
_RCLONE = {
    "rcloneConfig": str, "rcloneConfigSection": str, "rcloneDestPath": str, "copyMethod": str,
    "volumeSnapshotClassName": str, "storageClassName": str, "accessModes": list, "capacity": str,
}  # fmt: skip
_SHARE = dict.fromkeys(("quota", "limit", "overQuotaWeight"), int)
_RETAIN = dict.fromkeys(("last", "hourly", "daily", "weekly", "monthly", "yearly"), int)
FIELDS: dict[str, dict[str, Any]] = {
    "Queue": {"parentQueue": str, "resources": dict.fromkeys(("gpu", "cpu", "memory"), _SHARE)},
    "Schedule": {
        "schedule": str,
        "template": {"includedNamespaces": list, "snapshotMoveData": bool, "csiSnapshotTimeout": str, "ttl": str},
    },
    "ReplicationSource": {
        "sourcePVC": str,
        "trigger": {"schedule": str, "manual": str},
        "restic": {**_RESTIC, "pruneIntervalDays": int, "retain": _RETAIN},
    },
    "ReplicationDestination": {
        "trigger": {"schedule": str, "manual": str},
        "restic": {**_RESTIC, "destinationPVC": str, "previous": int, "restoreAsOf": str},
        "rclone": _RCLONE,
    },
}
OF_PROGRAMS = {"kai-queues.yaml", "velero.yaml", "volsync.yaml", "volsync-populator.yaml"}
# Kubernetes' access modes as the provisioner translates them for a driver with SINGLE_NODE_MULTI_WRITER.
MODES = {
    "ReadWriteOnce": AccessMode.SINGLE_NODE_MULTI_WRITER,
    "ReadWriteOncePod": AccessMode.SINGLE_NODE_SINGLE_WRITER,
    "ReadOnlyMany": AccessMode.MULTI_NODE_READER_ONLY,
    "ReadWriteMany": AccessMode.MULTI_NODE_MULTI_WRITER,
}
LEAST_BYTES = 10**9
RESERVED = "csi.storage.k8s.io/"


def every(kind: str) -> Iterator[Document]:
    """Yield the documents of a kind in all examples, claims of templates included."""
    for name in NAMES:
        for document in examples.written(name):
            if document["kind"] == kind:
                yield document
            elif kind == "PersistentVolumeClaim":
                yield from claims_of_templates(document)


def claims_of_templates(document: Document) -> Iterator[Document]:
    for template in document.get("spec", {}).get("volumeClaimTemplates", []):
        yield {"kind": "PersistentVolumeClaim", **template}
    for spec in examples.pod_specs(document):
        for volume in spec.get("volumes", []):
            if "ephemeral" in volume:
                template = volume["ephemeral"]["volumeClaimTemplate"]
                yield {"kind": "PersistentVolumeClaim", "metadata": {"name": volume["name"]}, **template}


def bytes_of(size: str) -> int:
    number, unit = re.fullmatch(r"(\d+)(Mi|Gi|Ti)", size).groups()  # type: ignore[union-attr]  # the test fails with it
    return int(number) << {"Mi": 20, "Gi": 30, "Ti": 40}[unit]


def chart_classes() -> set[str]:
    manifests = sorted((ROOT / "deploy" / "kubernetes").glob("*.yaml"))
    found = (document for manifest in manifests for document in yaml.safe_load_all(manifest.read_text()) if document)
    return {document["metadata"]["name"] for document in found if document["kind"] == "StorageClass"}


# --- files ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", NAMES)
def test_an_example_holds_objects_that_kubernetes_knows(name: str) -> None:
    for document in examples.written(name):
        assert document["kind"] in KINDS[document["apiVersion"]]
        assert document["metadata"]["name"]
        assert ("namespace" in document["metadata"]) <= (document["kind"] not in CLUSTER_WIDE)


@pytest.mark.parametrize("name", NAMES)
def test_an_example_begins_with_what_it_is_for(name: str) -> None:
    first = (EXAMPLES / name).read_text().split("\napiVersion")[0]
    assert len(first) > 100
    assert all(line.startswith("#") for line in first.splitlines())


@pytest.mark.parametrize("name", NAMES)
def test_an_example_names_no_object_twice(name: str) -> None:
    known = [
        (document["kind"], document["metadata"].get("namespace"), document["metadata"]["name"])
        for document in examples.written(name)
    ]
    assert len(known) == len(set(known))


@pytest.mark.parametrize("name", NAMES)
def test_the_index_says_what_an_example_shows_and_where_to_look(name: str) -> None:
    rows = re.findall(rf"(?m)^\| \[.*\]\({re.escape(name)}\) \| (.+) \| (.+) \|$", (EXAMPLES / "README.md").read_text())
    assert len(rows) == 1


@pytest.mark.parametrize("name", [name for name in NAMES if name not in OF_PROGRAMS])
def test_an_example_is_tried_on_a_cluster(name: str) -> None:
    tests = "".join(path.read_text() for path in sorted((ROOT / "tests" / "kubernetes").glob("test_*.py")))
    assert f'"{name}"' in tests


def test_every_container_has_an_image_of_the_test_cluster() -> None:
    assert examples.IMAGE in images.BUSYBOX_NAMES
    for name in NAMES:
        for document in examples.written(name):
            for spec in examples.pod_specs(document):
                assert {container["image"] for container in spec["containers"]} == {examples.IMAGE}


def assert_known(given: Document, known: Mapping[str, Any]) -> None:
    for key, value in given.items():
        if isinstance(value, dict):
            assert_known(value, known[key])
        else:
            assert isinstance(value, known[key])


@pytest.mark.parametrize("kind", FIELDS)
def test_an_object_of_another_program_has_fields_that_it_knows(kind: str) -> None:
    found = list(every(kind))
    assert found
    for document in found:
        assert_known(document["spec"], FIELDS[kind])
        assert document["spec"].get("restic", {}).get("copyMethod", "Clone") in ("Clone", "Snapshot")


# --- references -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", NAMES)
def test_a_pod_mounts_claims_that_its_example_makes_or_says_where_they_come_from(name: str) -> None:
    made = {
        (document["metadata"].get("namespace", "default"), document["metadata"]["name"])
        for document in examples.of_kind("PersistentVolumeClaim", examples.written(name))
    }
    text = (EXAMPLES / name).read_text()
    for document in examples.written(name):
        namespace = document["metadata"].get("namespace", "default")
        for spec in examples.pod_specs(document):
            for volume in spec.get("volumes", []):
                claim = volume.get("persistentVolumeClaim", {}).get("claimName")
                assert claim is None or (namespace, claim) in made or f"share-claim.sh {namespace}/" in text


def test_claims_name_a_class_of_their_example_of_the_chart_or_none() -> None:
    own = {document["metadata"]["name"] for document in every("StorageClass")}
    asked = {claim["spec"]["storageClassName"] for claim in every("PersistentVolumeClaim")}
    assert asked - own - chart_classes() == {""}
    assert asked & chart_classes() != set()


def test_no_class_of_an_example_takes_the_place_of_one_of_the_chart() -> None:
    names = {
        document["metadata"]["name"]
        for kind in ("StorageClass", "VolumeAttributesClass", *SNAPSHOT_CLASSES)
        for document in every(kind)
    }
    assert names
    assert {name for name in names if not name.startswith("example-")} == set()


def test_everything_is_of_this_driver() -> None:
    provisioners = {document["provisioner"] for document in every("StorageClass")}
    drivers = {document["spec"]["csi"]["driver"] for document in every("PersistentVolume")}
    changers = {document["driverName"] for document in every("VolumeAttributesClass")}
    snapshotters = {document["driver"] for kind in SNAPSHOT_CLASSES for document in every(kind)}
    assert provisioners == drivers == changers == snapshotters == {DEFAULT_DRIVER_NAME}


def test_snapshots_and_copies_have_a_source_and_a_class_that_an_example_makes() -> None:
    def place(document: Document, name: str) -> tuple[str, str]:
        return document["metadata"].get("namespace", "default"), name

    def made(kind: str) -> set[tuple[str, str]]:
        return {place(document, document["metadata"].get("name", "")) for document in every(kind)} | of_replicas

    of_replicas = {
        place(replicas, f"{template['metadata']['name']}-{replicas['metadata']['name']}-0")
        for replicas in every("StatefulSet")
        for template in replicas["spec"]["volumeClaimTemplates"]
    }
    copies = [claim for claim in every("PersistentVolumeClaim") if "dataSource" in claim["spec"]]
    assert len(copies) >= 4
    for claim in copies:
        source = claim["spec"]["dataSource"]
        assert source.get("apiGroup", "") == ("snapshot.storage.k8s.io" if source["kind"] == "VolumeSnapshot" else "")
        assert place(claim, source["name"]) in made(source["kind"])
    for snapshot in every("VolumeSnapshot"):
        spec = snapshot["spec"]
        assert place(snapshot, spec["source"]["persistentVolumeClaimName"]) in made("PersistentVolumeClaim")
        assert ("default", spec["volumeSnapshotClassName"]) in made("VolumeSnapshotClass")
    for group in every("VolumeGroupSnapshot"):
        labels = group["spec"]["source"]["selector"]["matchLabels"].items()
        labelled = [each["metadata"].get("labels", {}).items() for each in every("PersistentVolumeClaim")]
        assert sum(labels <= each for each in labelled) > 1
        assert ("default", group["spec"]["volumeGroupSnapshotClassName"]) in made("VolumeGroupSnapshotClass")


# --- requests to the driver --------------------------------------------------------------------------------


def kept_parameters(storage_class: Document) -> dict[str, str]:
    """Return the parameters that reach CreateVolume: the provisioner keeps Secrets and filesystem for itself."""
    return {key: value for key, value in storage_class["parameters"].items() if not key.startswith(RESERVED)}


def test_the_driver_takes_the_parameters_of_every_class() -> None:
    for each in every("StorageClass"):
        given = kept_parameters(each)
        assert all(isinstance(value, str) for value in each["parameters"].values())
        assert storage_class.parse(given).ignored == ()


def test_the_driver_takes_the_parameters_of_every_attributes_class() -> None:
    for attributes_class in every("VolumeAttributesClass"):
        storage_class.parse_changes(attributes_class["parameters"])


def test_nodes_take_what_every_class_says_of_mkfs_and_mount() -> None:
    for each in every("StorageClass"):
        given: Mapping[str, str] = each["parameters"]
        context = {key: given[key] for key in CONTEXT_KEYS if key in given}
        mounted = MountAccess(given.get(f"{RESERVED}fstype", ""), tuple(each.get("mountOptions", ())))
        plan = plan_mount(
            mounted,
            AccessMode.SINGLE_NODE_WRITER,
            read_only=False,
            mkfs=MkfsRequest(context, size_bytes=2 << 30),
            supported=FILESYSTEMS,
        )
        assert "noatime" in plan.flags or not mounted.mount_flags


def test_every_claim_and_volume_asks_for_access_that_is_offered() -> None:
    asked: set[Any] = set()
    for kind in ("PersistentVolumeClaim", "PersistentVolume"):
        for document in every(kind):
            (mode,) = document["spec"]["accessModes"]
            block = document["spec"].get("volumeMode") == "Block"
            check_capability(Capability(BlockAccess() if block else MountAccess(), MODES[mode]))
            asked.add(mode)
    assert asked == set(MODES)


def test_no_claim_is_smaller_than_the_smallest_volume() -> None:
    sizes = [bytes_of(claim["spec"]["resources"]["requests"]["storage"]) for claim in every("PersistentVolumeClaim")]
    assert min(sizes) >= LEAST_BYTES


def test_every_handle_is_one_of_this_driver_and_is_explained() -> None:
    for document in every("PersistentVolume"):
        handle = VolumeHandle.parse(document["spec"]["csi"]["volumeHandle"])
        assert handle is not None
        assert handle.zone == "single-zone-cluster"
        assert document["spec"]["persistentVolumeReclaimPolicy"] == "Retain"
