# SPDX-License-Identifier: Apache-2.0
"""Examples in which several pods have one volume: made by hand or by a claim, over namespaces, as files or device."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import yaml

from tests.kubernetes import examples
from tests.kubernetes.kubectl import Cluster, Document
from tests.kubernetes.stage import Stage
from tests.kubernetes.storage import Storage

NAME = "training-set"
ZONE = "single-zone-cluster"
GPUS = "nvidia.com/gpu"
FORMS: dict[str, Callable[[Document], str]] = {
    "name": lambda volume: NAME,
    "zone:name": lambda volume: f"{ZONE}:{NAME}",
    "zone:name:uuid": lambda volume: f"{ZONE}:{NAME}:{volume['uuid']}",
    "zone:name:uuid:reference": lambda volume: f"{ZONE}:{NAME}:{volume['uuid']}:readers",
}
# The storage's own numbers of the modes of a reservation.
SHARED_READ_ONLY, SHARED_READ_WRITE = 1, 2


def with_handle(documents: list[Document], handle_of: Callable[[Document], str]) -> list[Document]:
    """Name the volume of every PersistentVolume in another form."""
    for document in examples.of_kind("PersistentVolume", documents):
        document["spec"]["csi"]["volumeHandle"] = handle_of(document)
    return documents


def pods_of(cluster: Cluster, app: str, namespace: str) -> list[str]:
    """Wait until the pods of a Deployment are there, and return their names."""
    cluster.kubectl("rollout", "status", f"deployment/{app}", "-n", namespace, "--timeout=400s", timeout_s=420)
    return [pod["metadata"]["name"] for pod in cluster.all("pods", namespace, f"app={app}")]


def refusals(cluster: Cluster, pod: str, namespace: str) -> list[str]:
    """Try every way to change a data set, and return each error."""
    attempts = (
        "touch /data/new", "sh -c 'echo more >> /data/shard-0'", "mv /data/shard-0 /data/other", "rm /data/shard-0",
        "chmod 777 /data/shard-0", "truncate -s 0 /data/shard-0", "mkdir /data/directory",
    )  # fmt: skip
    answers = [cluster.try_exec(pod, "sh", "-c", f"{attempt} 2>&1", namespace=namespace) for attempt in attempts]
    return ["written" if answer.status == 0 else answer.stdout.strip() for answer in answers]


@pytest.mark.parametrize("form", FORMS)
def test_a_volume_made_by_hand_is_used_under_every_form_of_its_handle_and_kept(
    stage: Stage, cluster: Cluster, storage: Storage, form: str
) -> None:
    volume = stage.by_hand(NAME, 2.2)
    documents = with_handle(examples.written("static.yaml"), lambda _: FORMS[form](volume))
    stage.apply(documents)
    cluster.wait_ready(NAME)
    cluster.wait_for(lambda: cluster.try_exec(NAME, "test", "-s", "/data/sums").status == 0, "the writer to be done")
    mount = cluster.sh(NAME, "grep ' /data ' /proc/mounts")
    assert NAME in mount.split()[0]
    assert "noatime" in mount
    wanted = cluster.sh(NAME, "cd /data; sha256sum -c sums >/dev/null && cat sums")
    cluster.delete(documents)
    # Its PersistentVolume says Retain.
    assert storage.volumes()[NAME]["uuid"] == volume["uuid"]
    cluster.apply(documents)
    cluster.wait_ready(NAME)
    assert cluster.sh(NAME, "cd /data; sha256sum -c sums >/dev/null && cat sums") == wanted


@pytest.mark.parametrize("form", ["zone:name", "zone:name:uuid:reference"])
def test_many_pods_of_several_namespaces_read_one_volume(
    stage: Stage, cluster: Cluster, storage: Storage, form: str
) -> None:
    volume = stage.by_hand(NAME, 2.2)
    wanted = filled(stage, cluster)
    stage.apply(with_handle(examples.written("read-only-many.yaml"), lambda _: FORMS[form](volume)))
    for namespace in ("team-vision", "team-speech"):
        assert_many_read(cluster, namespace, wanted)
    assert storage.volumes()[NAME]["reservation"]["mode"] == SHARED_READ_ONLY


def test_copies_with_handles_of_their_own_leave_a_node_one_after_the_other(
    stage: Stage, cluster: Cluster, storage: Storage
) -> None:
    """One PersistentVolume for each namespace, with its name as the last part of the handle, as in older drivers."""
    volume = stage.by_hand(NAME, 2.2)
    wanted = filled(stage, cluster)

    def handle(document: Document) -> str:
        return f"{ZONE}:{NAME}:{volume['uuid']}:{document['spec']['claimRef']['namespace']}"

    readers = stage.apply(with_handle(examples.written("read-only-many.yaml"), handle))
    for namespace in ("team-vision", "team-speech"):
        assert_many_read(cluster, namespace, wanted)
    assert references(storage, volume) == {"team-vision", "team-speech"}
    for left, gone in (("team-speech", "team-vision"), ("", "team-speech")):
        cluster.delete(
            [each for each in examples.of_kind("Deployment", readers) if each["metadata"]["namespace"] == gone]
        )
        if left:
            assert_many_read(cluster, left, wanted)
    cluster.wait_for(lambda: references(storage, volume) == set(), "the volume to leave the node")


def references(storage: Storage, volume: Document) -> set[str]:
    """Return under which references the node is to hold the volume."""
    wishes = [client.get("attachments", {}).get(volume["uuid"], {}) for client in storage.clients().values()]
    return {reference for wish in wishes for reference in wish.get("referenceIDs", [])}


def filled(stage: Stage, cluster: Cluster) -> str:
    """Let the writer of static.yaml fill the volume and go; return the checksums of its files."""
    writer = stage.example("static.yaml")
    cluster.wait_ready(NAME)
    cluster.wait_for(lambda: cluster.try_exec(NAME, "test", "-s", "/data/sums").status == 0, "the writer to be done")
    sums = cluster.sh(NAME, "cat /data/sums")
    cluster.delete(writer)
    return sums


def assert_many_read(cluster: Cluster, namespace: str, wanted: str) -> None:
    pods = pods_of(cluster, "reader", namespace)
    assert len(pods) == 2
    for pod in pods:
        assert cluster.sh(pod, "cat /data/sums", namespace) == wanted
        assert cluster.sh(pod, "cd /data && sha256sum -c sums | grep -c OK", namespace) == "4"
        assert [text for text in refusals(cluster, pod, namespace) if "Read-only file system" not in text] == []


def test_two_pods_write_one_raw_device_as_a_migration_does(stage: Stage, cluster: Cluster, storage: Storage) -> None:
    stage.example("kubevirt-block.yaml")
    for pod in ("vm-source", "vm-target"):
        cluster.wait_ready(pod)
    write = "echo {} | dd of=/dev/vda bs=4096 seek={} conv=sync,fsync,notrunc 2>/dev/null"
    read = "dd if=/dev/vda bs=4096 skip={} count=1 2>/dev/null | head -n 1"
    cluster.sh("vm-source", write.format("from-source", 7))
    assert cluster.sh("vm-target", read.format(7)) == "from-source"
    cluster.sh("vm-target", write.format("from-target", 8))
    assert cluster.sh("vm-source", read.format(8)) == "from-target"
    name = stage.volume("vm-disk").name
    assert storage.volumes()[name]["reservation"]["mode"] == SHARED_READ_WRITE
    # The source is gone, the machine runs on at the target.
    cluster.kubectl("delete", "pod", "vm-source")
    cluster.wait_gone("pod", "vm-source")
    cluster.sh("vm-target", write.format("moved", 9))
    assert cluster.sh("vm-target", "; ".join(read.format(at) for at in (7, 8, 9))).split() == [
        "from-source", "from-target", "moved",
    ]  # fmt: skip


# --- build and train --------------------------------------------------------------------------------------------


@pytest.fixture
def gpus(cluster: Cluster) -> None:
    """Advertise GPUs again on nodes whose kubelet was restarted, as `up` and a device plugin do: no pod uses one."""
    change: Document = {"status": {place: {GPUS: "4"} for place in ("capacity", "allocatable")}}
    for node in cluster.all("nodes"):
        cluster.patch("node", node["metadata"]["name"], change, "default", "--subresource=status")


def shared(cluster: Cluster, claim: str, new: str) -> list[Document]:
    """Return what deploy/examples/share-claim.sh writes."""
    ended = cluster.run(str(examples.SHARE_CLAIM), claim, new)
    assert ended.status == 0, ended.stderr
    return list(yaml.safe_load_all(ended.stdout))


@pytest.mark.usefixtures("gpus")
def test_a_data_set_is_built_in_a_notebook_and_read_by_many_training_pods(stage: Stage, cluster: Cluster) -> None:
    build = stage.example("notebook.yaml")
    cluster.wait_ready("notebook", "research")
    wanted = cluster.sh("notebook", "cat /data/sums", "research")
    notebook = examples.of_kind("Pod", build)
    ended = cluster.run(str(examples.SHARE_CLAIM), "research/data-set", "research/data-set-readers")
    assert "still attached to node" in ended.stderr
    cluster.delete(notebook)
    volume = stage.volume("data-set", "research")
    assert volume.handle.endswith(":research")
    stage.apply(shared(cluster, "research/data-set", "research/data-set-readers"))
    readers = stage.volume("data-set-readers", "research")
    assert readers.uuid == volume.uuid
    assert readers.handle == ":".join([*volume.handle.split(":")[:3], "readers"])

    job = stage.example("training.yaml")
    cluster.kubectl(
        "wait", "--for=condition=Complete", "job/training", "-n", "research", "--timeout=400s", timeout_s=420
    )
    pods = cluster.all("pods", "research", "app=training")
    # The refusal to write goes to another stream, and may come before or after.
    lines = (line for pod in pods for line in cluster.logs(pod["metadata"]["name"], "research").splitlines())
    told = sorted(line for line in lines if line.startswith("pod "))
    assert told == [f"pod {number} has read 8 shards" for number in range(3)]
    cluster.delete(job)

    # Another namespace reads the same volume, with the data of the notebook.
    other: Document = {"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": "review"}}
    pod = {**notebook[0], "metadata": {"name": "reviewer", "namespace": "review"}}
    pod["spec"] = {
        **pod["spec"],
        "containers": [
            {"name": "reader", "image": examples.IMAGE, "command": ["sleep", "1000000"],
             "volumeMounts": [{"name": "data", "mountPath": "/data"}]},
        ],
        "volumes": [{"name": "data", "persistentVolumeClaim": {"claimName": "data-set", "readOnly": True}}],
    }  # fmt: skip
    stage.apply([other])
    stage.apply([*shared(cluster, "research/data-set", "review/data-set"), pod])
    cluster.wait_ready("reviewer", "review")
    assert cluster.sh("reviewer", "cat /data/sums", "review") == wanted
    assert [text for text in refusals(cluster, "reviewer", "review") if "Read-only file system" not in text] == []


def test_there_is_exactly_one_statement_of_capacity_for_each_node_and_class(stage: Stage, cluster: Cluster) -> None:
    stage.example("notebook.yaml")
    classes = [
        each["metadata"]["name"]
        for each in cluster.all("storageclasses")
        if each["provisioner"] == "nvmesh-csi.excelero.com" and each["volumeBindingMode"] == "WaitForFirstConsumer"
    ]
    assert "example-data-sets" in classes

    def stated() -> bool:
        return sorted(each["storageClassName"] for each in cluster.all("csistoragecapacities", None)) >= sorted(classes)

    cluster.wait_for(stated, "every class to have its capacity stated")
    nodes = cluster.all("nodes")
    capacities = cluster.all("csistoragecapacities", None)
    for storage_class in classes:
        of_class = [each for each in capacities if each["storageClassName"] == storage_class]
        for node in nodes:
            of_node = [each for each in of_class if selects(each["nodeTopology"], node["metadata"]["labels"])]
            assert len(of_node) == 1
            assert of_node[0]["capacity"] not in ("0", "")
            assert of_node[0]["maximumVolumeSize"]
    driver = cluster.there("csidriver", "nvmesh-csi.excelero.com")
    assert driver["spec"]["storageCapacity"] is True


def test_a_class_that_was_deleted_and_made_again_soon_has_one_statement_of_capacity(
    stage: Stage, cluster: Cluster
) -> None:
    again: Document = {
        "apiVersion": "storage.k8s.io/v1",
        "kind": "StorageClass",
        "metadata": {"name": "made-again"},
        "provisioner": "nvmesh-csi.excelero.com",
        "parameters": {"raidLevel": "concatenated"},
        "volumeBindingMode": "WaitForFirstConsumer",
    }

    def stated() -> int:
        found = cluster.all("csistoragecapacities", None)
        return sum(each["storageClassName"] == "made-again" for each in found)

    for _ in range(3):
        stage.apply([again])
        # The provisioner may state it twice where a class is changed at once, and then takes the second one back.
        for number in range(3):
            cluster.kubectl("label", "storageclass", "made-again", f"number={number}", "--overwrite")
        cluster.wait_for(lambda: stated() == 1, "the capacity of the class to be stated once")
        cluster.delete([again])
    cluster.wait_for(lambda: stated() == 0, "the capacity of the deleted class to be gone")


def selects(selector: Document, labels: dict[str, str]) -> bool:
    """Return whether a label selector picks a node."""
    assert set(selector) <= {"matchLabels"}
    return bool(selector["matchLabels"].items() <= labels.items())
