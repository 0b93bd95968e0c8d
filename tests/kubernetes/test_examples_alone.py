# SPDX-License-Identifier: Apache-2.0
"""Examples in which one pod, or one set of pods, has its own volume, checked from inside the pod."""

from __future__ import annotations

import os
import struct

import pytest

from tests.conftest import has_device_mapper
from tests.kubernetes import examples
from tests.kubernetes.kubectl import Cluster, Document, status_of
from tests.kubernetes.stage import Stage
from tests.kubernetes.storage import Storage, loop_devices

GIB = 1 << 30
MIB = 1 << 20


def pod_of(documents: list[Document], name: str) -> Document:
    return next(each for each in documents if each["kind"] == "Pod" and each["metadata"]["name"] == name)


def mount_of(cluster: Cluster, pod: str, path: str, namespace: str = "default") -> tuple[str, str, set[str]]:
    """Return source, filesystem type and options of a mount, as the pod's kernel shows them."""
    for line in cluster.exec(pod, "cat", "/proc/mounts", namespace=namespace).splitlines():
        source, target, fs_type, options, *_ = line.split()
        if target == path:
            return source, fs_type, set(options.split(","))
    raise AssertionError(f"nothing is mounted on {path} in {pod}")


def bytes_in(cluster: Cluster, pod: str, path: str) -> int:
    """Return the size of the filesystem at a path, as the pod sees it."""
    return int(cluster.sh(pod, f"df -k {path} | tail -n 1 | awk '{{print $(NF-4)}}'")) * 1024


@pytest.mark.short
def test_a_pod_has_its_filesystem_and_finds_its_data_again(stage: Stage, cluster: Cluster) -> None:
    documents = stage.example("filesystem.yaml")
    cluster.wait_ready("filesystem")
    source, fs_type, options = mount_of(cluster, "filesystem", "/data")
    assert fs_type == "ext4"
    assert "rw" in options
    assert stage.volume("filesystem").name in source
    assert bytes_in(cluster, "filesystem", "/data") > 0.9 * 2 * GIB
    # A user that is not root writes, because kubelet gave the volume to its group.
    assert cluster.sh("filesystem", "id -u; stat -c %g /data").split() == ["1000", "1000"]
    wanted = cluster.sh(
        "filesystem", "dd if=/dev/urandom of=/data/file bs=1M count=16 2>/dev/null; sync; sha256sum /data/file"
    )
    stage.restart(pod_of(documents, "filesystem"))
    assert cluster.sh("filesystem", "sha256sum /data/file") == wanted
    assert len(cluster.sh("filesystem", "cat /data/started").splitlines()) == 2


@pytest.mark.short
def test_a_pod_has_its_raw_device_and_finds_its_data_again(stage: Stage, cluster: Cluster) -> None:
    documents = stage.example("block.yaml")
    cluster.wait_ready("block")
    assert cluster.sh("block", "blockdev --getsize64 /dev/data; blockdev --getss /dev/data").split() == [
        str(2 * GIB), "4096",
    ]  # fmt: skip
    # From the very first byte on it is the pod's: nothing was formatted.
    assert cluster.sh("block", "head -c 1048576 /dev/data | tr -d '\\0' | wc -c") == "0"
    write = "dd if=/tmp/data of=/dev/data bs=1M seek={} conv=fsync,notrunc 2>/dev/null"
    read = "dd if=/dev/data bs=1M skip={} count=4 2>/dev/null | sha256sum"
    cluster.sh("block", "dd if=/dev/urandom of=/tmp/data bs=1M count=4 2>/dev/null")
    wanted = [cluster.sh("block", f"{write.format(at)}; {read.format(at)}") for at in (0, 1024, 2044)]
    assert wanted == [cluster.sh("block", "sha256sum < /tmp/data")] * 3
    stage.restart(pod_of(documents, "block"))
    assert [cluster.sh("block", read.format(at)) for at in (0, 1024, 2044)] == wanted


def test_a_class_may_name_a_provisioning_group(stage: Stage, cluster: Cluster, storage: Storage) -> None:
    documents = stage.example("custom-vpg.yaml")
    # CreateVolume is called and explains the failure: a wrong class does not report a capacity of 0.
    cluster.wait_event("custom-vpg", "ProvisioningFailed", "training")
    # The embedded manager has the built-in groups only, so the class names one of them.
    cluster.delete(reversed(documents))
    for document in documents:
        if document["kind"] == "StorageClass":
            document["parameters"]["vpg"] = "DEFAULT_CONCATENATED_VPG"
    stage.apply(documents)
    cluster.wait_ready("custom-vpg")
    assert storage.volumes()[stage.volume("custom-vpg").name]["VPG"] == "DEFAULT_CONCATENATED_VPG"
    assert cluster.sh("custom-vpg", "cat /data/started") != ""


def test_a_class_decides_about_mkfs_and_mount(stage: Stage, cluster: Cluster) -> None:
    stage.example("xfs.yaml")
    cluster.wait_ready("xfs")
    _, fs_type, options = mount_of(cluster, "xfs", "/data")
    assert fs_type == "xfs"
    assert {"rw", "noatime", "logbsize=256k"} <= options
    assert cluster.sh("xfs", "stat -c %a /data; cat /data/started").startswith("1777\n")
    (device,) = loop_devices(stage.volume("xfs").uuid)
    descriptor = os.open(device, os.O_RDONLY | os.O_CLOEXEC)
    try:
        superblock = os.pread(descriptor, 512, 0)
    finally:
        os.close(descriptor)
    # Offsets of the kernel's fs/xfs/libxfs/xfs_format.h, struct xfs_dsb; bit 2 of the read-only features is reflink.
    assert superblock[:4] == b"XFSB"
    assert struct.unpack_from(">H", superblock, 104) == (1024,)
    assert struct.unpack_from(">I", superblock, 212)[0] & 0b100 == 0


def test_every_replica_has_a_volume_of_its_own_and_keeps_it(stage: Stage, cluster: Cluster) -> None:
    documents = stage.example("statefulset.yaml")
    for number in (0, 1):
        stage.owns("PersistentVolumeClaim", f"data-example-{number}")
        cluster.wait_ready(f"example-{number}")
        assert cluster.sh(f"example-{number}", "cat /data/name") == f"example-{number}"
    volumes = {number: stage.volume(f"data-example-{number}") for number in (0, 1)}
    assert volumes[0].uuid != volumes[1].uuid
    cluster.kubectl("scale", "statefulset/example", "--replicas=1")
    cluster.wait_gone("pod", "example-1")
    cluster.kubectl("scale", "statefulset/example", "--replicas=2")
    cluster.wait_ready("example-1")
    assert stage.volume("data-example-1") == volumes[1]
    assert len(cluster.sh("example-1", "cat /data/started").splitlines()) == 2
    # Its retention policy takes the claims away, and so the volumes.
    cluster.delete(examples.of_kind("StatefulSet", documents))
    for number in (0, 1):
        cluster.wait_gone("pvc", f"data-example-{number}")


def test_an_encrypted_volume_is_opened_or_its_pod_says_what_is_missing(stage: Stage, cluster: Cluster) -> None:
    stage.example("encrypted.yaml")
    volume = stage.volume("encrypted")
    if has_device_mapper():
        cluster.wait_ready("encrypted")
        source, fs_type, _ = mount_of(cluster, "encrypted", "/data")
        assert source.startswith("/dev/mapper/")
        assert fs_type == "xfs"
        assert bytes_in(cluster, "encrypted", "/data") > 0.9 * 2 * GIB
        return
    cluster.wait_event("encrypted", "FailedMount", "device-mapper")
    # It was not overwritten by plaintext.
    (device,) = loop_devices(volume.uuid)
    with device.open("rb") as stream:
        start = stream.read(16 * MIB)
    assert b"XFSB" not in start
    assert b"replace-me-with" not in start


def test_a_volume_belongs_to_the_zone_that_its_class_allows(stage: Stage, cluster: Cluster) -> None:
    stage.example("topology.yaml")
    pod = cluster.wait_ready("topology")
    volume = cluster.there("pv", stage.volume("topology").volume)
    (term,) = volume["spec"]["nodeAffinity"]["required"]["nodeSelectorTerms"]
    assert term["matchExpressions"] == [
        {"key": "nvmesh-csi.excelero.com/zone", "operator": "In", "values": ["single-zone-cluster"]}
    ]
    node = cluster.there("node", pod["spec"]["nodeName"])
    assert node["metadata"]["labels"]["nvmesh-csi.excelero.com/zone"] == "single-zone-cluster"
    assert stage.volume("topology").handle.startswith("single-zone-cluster:")


def test_a_second_pod_waits_for_a_volume_of_one_pod(stage: Stage, cluster: Cluster) -> None:
    documents = stage.example("read-write-once-pod.yaml")
    names = ["one-pod-first", "one-pod-second"]

    def runs() -> list[str]:
        pods = [cluster.there("pod", name) for name in names]
        return [pod["metadata"]["name"] for pod in pods if pod["status"].get("phase") == "Running"]

    (winner,) = cluster.wait_for(runs, "one of the pods to run")
    (other,) = set(names) - {winner}
    cluster.wait_for(
        lambda: status_of(cluster.there("pod", other), "PodScheduled") == "False", f"{other} to be refused"
    )
    cluster.sh(winner, "sleep 10")
    assert runs() == [winner]
    cluster.delete([pod_of(documents, winner)])
    cluster.wait_ready(other)
    assert cluster.sh(other, "cat /data/writers").split() == [winner, other]


def test_scratch_space_comes_and_goes_with_its_pod(stage: Stage, cluster: Cluster, storage: Storage) -> None:
    documents = stage.example("ephemeral.yaml")
    pod = cluster.wait_ready("ephemeral")
    claim = cluster.there("pvc", "ephemeral-scratch")
    assert [owner["uid"] for owner in claim["metadata"]["ownerReferences"]] == [pod["metadata"]["uid"]]
    assert claim["metadata"]["labels"]["purpose"] == "scratch"
    assert cluster.sh("ephemeral", "stat -c %s /scratch/part") == str(8 * MIB)
    volume = stage.volume("ephemeral-scratch")
    cluster.delete([pod_of(documents, "ephemeral")])
    cluster.wait_gone("pvc", "ephemeral-scratch")
    cluster.wait_gone("pv", volume.volume)
    assert volume.name not in storage.volumes()


def test_a_property_changes_while_the_volume_is_used(stage: Stage, cluster: Cluster, storage: Storage) -> None:
    stage.example("volume-attributes.yaml")
    cluster.wait_ready("attributes")
    name = stage.volume("attributes").name
    assert storage.volumes()[name]["relativeRebuildPriority"] == 1
    cluster.patch("pvc", "attributes", {"spec": {"volumeAttributesClassName": "example-rebuild-first"}})
    cluster.wait_for(
        lambda: (
            cluster.there("pvc", "attributes")["status"].get("currentVolumeAttributesClassName")
            == "example-rebuild-first"
        ),
        "the claim to have its new attributes class",
    )
    assert storage.volumes()[name]["relativeRebuildPriority"] == 9
    assert cluster.sh("attributes", "date >> /data/started; wc -l < /data/started") == "2"
