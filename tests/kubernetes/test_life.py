# SPDX-License-Identifier: Apache-2.0
"""The life of volumes that claims ask for: growing under a writer, waiting, refusing, never deleted too early."""

from __future__ import annotations

import pytest

from tests.kubernetes import examples
from tests.kubernetes.driver import NAME, Driver
from tests.kubernetes.kubectl import Cluster, Document, status_of
from tests.kubernetes.load import claim, device_user_of, user_of
from tests.kubernetes.stage import Stage
from tests.kubernetes.storage import Storage
from tests.kubernetes.test_examples_alone import GIB, bytes_in, pod_of


def grow(cluster: Cluster, name: str, size: str) -> None:
    cluster.patch("pvc", name, {"spec": {"resources": {"requests": {"storage": size}}}})


def capacity_of(cluster: Cluster, name: str) -> str:
    return str(cluster.there("pvc", name)["status"]["capacity"]["storage"])


@pytest.mark.short
def test_a_volume_grows_while_a_pod_writes_and_keeps_its_data_for_the_next_pod(stage: Stage, cluster: Cluster) -> None:
    documents = stage.example("expansion.yaml")
    cluster.wait_ready("expansion")
    before = bytes_in(cluster, "expansion", "/data")
    assert before < 2 * GIB
    wanted = cluster.sh(
        "expansion", "dd if=/dev/urandom of=/data/kept bs=1M count=32 2>/dev/null; sync; sha256sum /data/kept"
    )
    cluster.wait_for(lambda: cluster.try_exec("expansion", "test", "-s", "/data/writes").status == 0, "the first write")
    writes = int(cluster.sh("expansion", "wc -l < /data/writes"))
    grow(cluster, "expansion", "4Gi")
    cluster.wait_for(lambda: capacity_of(cluster, "expansion") == "4Gi", "the claim to be 4 GiB")
    assert bytes_in(cluster, "expansion", "/data") > 0.9 * 4 * GIB
    cluster.wait_for(lambda: int(cluster.sh("expansion", "wc -l < /data/writes")) > writes + 3, "the writer to go on")
    assert cluster.try_exec("expansion", "test", "-e", "/data/errors").status != 0
    assert cluster.there("pod", "expansion")["status"]["containerStatuses"][0]["restartCount"] == 0
    assert cluster.sh("expansion", "sha256sum /data/kept") == wanted
    stage.restart(pod_of(documents, "expansion"))
    assert cluster.sh("expansion", "sha256sum /data/kept") == wanted
    assert bytes_in(cluster, "expansion", "/data") > 0.9 * 4 * GIB


def test_a_raw_device_grows_while_a_pod_has_it(stage: Stage, cluster: Cluster) -> None:
    stage.example("block.yaml")
    cluster.wait_ready("block")
    grow(cluster, "block", "3Gi")
    cluster.wait_for(lambda: capacity_of(cluster, "block") == "3Gi", "the claim to be 3 GiB")
    assert cluster.sh("block", "blockdev --getsize64 /dev/data") == str(3 * GIB)


def test_an_ext4_grows_in_use_or_when_its_pod_is_started_anew(stage: Stage, cluster: Cluster, driver: Driver) -> None:
    """Growing a mounted ext4 takes CAP_SYS_RESOURCE, which the cluster's machine may not have."""
    documents = stage.example("filesystem.yaml")
    cluster.wait_ready("filesystem")
    wanted = cluster.sh("filesystem", "cat /data/started")
    tried = driver.calls()["NodeExpandVolume"]
    grow(cluster, "filesystem", "3Gi")
    cluster.wait_for(lambda: driver.calls()["NodeExpandVolume"] > tried, "the node to be asked to grow it")
    if capacity_of(cluster, "filesystem") != "3Gi":
        # Kubelet reports no reason, but waits for a restart of the pod, as the claim says.
        pending = status_of(cluster.there("pvc", "filesystem"), "FileSystemResizePending")
        assert pending == "True" or capacity_of(cluster, "filesystem") == "3Gi"
        stage.restart(pod_of(documents, "filesystem"))
    cluster.wait_for(lambda: capacity_of(cluster, "filesystem") == "3Gi", "the claim to be 3 GiB")
    assert bytes_in(cluster, "filesystem", "/data") > 0.9 * 3 * GIB
    assert cluster.sh("filesystem", "cat /data/started").startswith(wanted)


# --- deletion in use ------------------------------------------------------------------------------


def test_a_claim_in_use_is_deleted_only_when_its_pod_has_gone(stage: Stage, cluster: Cluster, storage: Storage) -> None:
    stage.apply([claim("in-use"), user_of("in-use")])
    cluster.wait_ready("in-use")
    volume = stage.volume("in-use")
    cluster.kubectl("delete", "pvc", "in-use", "--wait=false")
    cluster.sh("in-use", "for n in 1 2 3 4 5; do date >> /data/file || exit 1; sleep 1; done")
    assert "deletionTimestamp" in cluster.there("pvc", "in-use")["metadata"]
    assert volume.name in storage.volumes()
    cluster.kubectl("delete", "pod", "in-use")
    cluster.wait_gone("pvc", "in-use")
    cluster.wait_gone("pv", volume.volume)
    assert volume.name not in storage.volumes()


def test_a_persistent_volume_in_use_is_not_deleted(stage: Stage, cluster: Cluster, storage: Storage) -> None:
    stage.apply([claim("held"), user_of("held")])
    cluster.wait_ready("held")
    volume = stage.volume("held")
    cluster.kubectl("delete", "pv", volume.volume, "--wait=false")
    cluster.sh("held", "for n in 1 2 3 4 5; do date >> /data/file || exit 1; sleep 1; done")
    assert volume.name in storage.volumes()


def test_a_pod_that_was_deleted_by_force_leaves_its_volume_to_the_next(stage: Stage, cluster: Cluster) -> None:
    stage.apply([claim("forced")])
    first = user_of("forced", script="date > /data/file; sync; exec sleep 1000000")
    stage.apply([first])
    cluster.wait_ready("forced")
    wanted = cluster.sh("forced", "cat /data/file")
    cluster.kubectl("delete", "pod", "forced", "--grace-period=0", "--force")
    second = user_of("forced", "next")
    stage.apply([second])
    cluster.wait_ready("next")
    assert cluster.sh("next", "cat /data/file; date >> /data/file") == wanted


# --- refusals ------------------------------------------------------------------------------------------


def storage_class(name: str, parameters: dict[str, str], binding_mode: str = "Immediate") -> Document:
    return {
        "apiVersion": "storage.k8s.io/v1",
        "kind": "StorageClass",
        "metadata": {"name": name},
        "provisioner": NAME,
        "parameters": parameters,
        "volumeBindingMode": binding_mode,
    }


TOO_LARGE = {
    "Immediate": ("ProvisioningFailed", "ResourceExhausted"),
    # The scheduler decides by the published capacity, and requests no volume.
    "WaitForFirstConsumer": ("FailedScheduling", "free storage"),
}


@pytest.mark.parametrize("binding_mode", TOO_LARGE)
def test_a_claim_that_no_storage_can_hold_says_so(stage: Stage, cluster: Cluster, binding_mode: str) -> None:
    name = f"too-large-{binding_mode.lower()}"
    stage.apply([storage_class(name, {"raidLevel": "concatenated"}, binding_mode)])
    stage.apply([claim(name, "900Ti", name), user_of(name)])
    cluster.wait_event(name, *TOO_LARGE[binding_mode])


WRONG_CLASSES = {
    "unknown-key": ({"raidlevel": "concatenated"}, "raidlevel"),
    "unknown-layout": ({"raidLevel": "raid7"}, "raid7"),
    "no-such-group": ({"vpg": "no-such-group"}, "no-such-group"),
    "no-redundancy-here": ({"vpg": "DEFAULT_RAID_1_VPG"}, ""),
}


@pytest.mark.parametrize("mistake", WRONG_CLASSES)
def test_a_class_that_cannot_be_served_is_explained_in_the_claims_events(
    stage: Stage, cluster: Cluster, mistake: str
) -> None:
    parameters, word = WRONG_CLASSES[mistake]
    name = f"wrong-{mistake}"
    stage.apply([storage_class(name, parameters), claim(name, storage_class=name)])
    text = cluster.wait_event(name, "ProvisioningFailed", word)
    assert "INTERNAL" not in text.upper()


@pytest.mark.parametrize("mistake", ["unknown-key", "unknown-layout", "no-such-group"])
def test_a_wrong_class_is_explained_where_the_scheduler_looks_at_capacity_first(
    stage: Stage, cluster: Cluster, mistake: str
) -> None:
    parameters, word = WRONG_CLASSES[mistake]
    name = f"late-{mistake}"
    stage.apply([storage_class(name, parameters, "WaitForFirstConsumer"), claim(name, storage_class=name)])
    stage.apply([user_of(name)])
    cluster.wait_event(name, "ProvisioningFailed", word)


def test_a_filesystem_for_several_writing_nodes_is_refused_with_the_reason(stage: Stage, cluster: Cluster) -> None:
    stage.apply([claim("shared", accessModes=["ReadWriteMany"]), user_of("shared")])
    cluster.wait_event("shared", "ProvisioningFailed", "two writing nodes")


def test_a_volume_that_does_not_exist_is_named_in_the_pods_events(stage: Stage, cluster: Cluster) -> None:
    documents = examples.written("static.yaml")
    stage.apply(documents)
    text = cluster.wait_event("training-set", "FailedAttachVolume", "training-set")
    assert "NotFound" in text or "not exist" in text or "no volume" in text


def test_old_data_on_a_new_volume_is_refused_and_kept(stage: Stage, cluster: Cluster) -> None:
    """Data of a raw device is never formatted by a later request for a filesystem."""
    raw = claim("raw", volumeMode="Block")
    writer = device_user_of("raw", "raw-writer")
    stage.apply([raw, writer])
    cluster.wait_ready("raw-writer")
    volume = stage.volume("raw")
    write = "echo precious | dd of=/dev/data bs=4096 seek=100000 conv=sync,fsync,notrunc 2>/dev/null"
    read = "dd if=/dev/data bs=4096 skip=100000 count=1 2>/dev/null | head -n 1"
    assert cluster.sh("raw-writer", f"{write}; {read}") == "precious"
    cluster.delete([writer])
    static = examples.written("static.yaml")
    for document in static:
        document["metadata"]["name"] = "second-look"
        if document["kind"] == "PersistentVolume":
            document["spec"]["csi"]["volumeHandle"] = ":".join(volume.handle.split(":")[:3])
            document["spec"]["claimRef"]["name"] = "second-look"
            document["spec"]["capacity"]["storage"] = "1Gi"
        elif document["kind"] == "PersistentVolumeClaim":
            document["spec"]["volumeName"] = "second-look"
            document["spec"]["resources"]["requests"]["storage"] = "1Gi"
        else:
            document["spec"]["volumes"][0]["persistentVolumeClaim"]["claimName"] = "second-look"
    stage.apply(static)
    cluster.wait_event("second-look", "FailedMount", "FailedPrecondition")
    cluster.delete(static)
    cluster.apply([writer])
    cluster.wait_ready("raw-writer")
    assert cluster.sh("raw-writer", read) == "precious"


def test_a_pod_starts_again_and_again_with_one_volume(stage: Stage, cluster: Cluster) -> None:
    pod = user_of("again", script="date >> /data/starts; sync; exec sleep 1000000")
    stage.apply([claim("again"), pod])
    cluster.wait_ready("again")
    for _ in range(3):
        stage.restart(pod)
    assert len(cluster.sh("again", "cat /data/starts").splitlines()) == 4
