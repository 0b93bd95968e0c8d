# SPDX-License-Identifier: Apache-2.0
"""The life of snapshots and of the volumes made of them: filesystems and devices, any order of deletion, refusals."""

from __future__ import annotations

from typing import Any

import pytest

from tests.kubernetes.kubectl import Cluster
from tests.kubernetes.load import claim, device_user_of, of_claim, of_snapshot, snapshot, snapshot_class, user_of
from tests.kubernetes.stage import Stage
from tests.kubernetes.storage import Storage
from tests.kubernetes.test_examples_alone import GIB, bytes_in, mount_of
from tests.kubernetes.test_examples_snapshots import ready

WRITE = "echo {} | dd of=/dev/data bs=4096 seek=100000 conv=sync,fsync,notrunc 2>/dev/null"
READ = "dd if=/dev/data bs=4096 skip=100000 count=1 2>/dev/null | head -n 1"


def filled(stage: Stage, cluster: Cluster, name: str, **spec: Any) -> str:
    """Make a claim with a pod that has written to it; return what it wrote."""
    text = stage.unique()
    stage.apply([snapshot_class(), claim(name, **spec), user_of(name)])
    cluster.wait_ready(name)
    cluster.sh(name, f"echo {text} > /data/text; sync")
    return text


@pytest.mark.parametrize("storage_class", ["nvmesh-concatenated", "nvmesh-xfs"])
def test_a_snapshot_is_mounted_on_the_node_that_has_its_source_mounted(
    stage: Stage, cluster: Cluster, storage_class: str
) -> None:
    wanted = filled(stage, cluster, "source", storage_class=storage_class)
    stage.apply([snapshot("first", "source")])
    ready(cluster, "first")
    restored = claim("restored", "2Gi", storage_class, dataSource=of_snapshot("first"))
    stage.apply([restored, user_of("restored")])
    cluster.wait_ready("restored")
    assert cluster.sh("restored", "cat /data/text; echo more >> /data/text; sync") == wanted
    assert bytes_in(cluster, "restored", "/data") > 0.9 * 2 * GIB
    assert cluster.sh("source", "cat /data/text") == wanted
    assert mount_of(cluster, "source", "/data")[1] == mount_of(cluster, "restored", "/data")[1]
    # A snapshot of what was made of a snapshot.
    stage.apply([snapshot("second", "restored")])
    ready(cluster, "second")
    again = claim("again", "3Gi", storage_class, dataSource=of_snapshot("second"))
    stage.apply([again, user_of("again")])
    cluster.wait_ready("again")
    assert cluster.sh("again", "cat /data/text").split() == [wanted, "more"]
    assert bytes_in(cluster, "again", "/data") > 0.9 * 3 * GIB


def test_a_raw_device_has_the_data_of_the_snapshot_or_of_its_source(stage: Stage, cluster: Cluster) -> None:
    stage.apply([snapshot_class(), claim("source", volumeMode="Block"), device_user_of("source")])
    cluster.wait_ready("source")
    cluster.sh("source", WRITE.format("before"))
    stage.apply([snapshot("first", "source")])
    ready(cluster, "first")
    cluster.sh("source", WRITE.format("after"))
    for name, source in (("restored", of_snapshot("first")), ("copied", of_claim("source"))):
        stage.apply([claim(name, volumeMode="Block", dataSource=source), device_user_of(name)])
    found = {}
    for name in ("source", "restored", "copied"):
        cluster.wait_ready(name)
        found[name] = cluster.sh(name, READ)
    assert found == {"source": "after", "restored": "before", "copied": "after"}


@pytest.mark.parametrize("order", ["source first", "snapshot first", "restored first"])
def test_source_snapshot_and_restored_volume_go_in_any_order(
    stage: Stage, cluster: Cluster, storage: Storage, order: str
) -> None:
    wanted = filled(stage, cluster, "source")
    documents = {"snapshot": [snapshot("first", "source")]}
    documents["restored"] = [claim("restored", dataSource=of_snapshot("first")), user_of("restored")]
    documents["source"] = [claim("source"), user_of("source")]
    stage.apply(documents["snapshot"])
    ready(cluster, "first")
    stage.apply(documents["restored"])
    cluster.wait_ready("restored")
    volumes = {name: stage.volume(name).name for name in ("source", "restored")}
    first = order.partition(" ")[0]
    cluster.delete(documents[first])
    if first in volumes:
        cluster.wait_for(lambda: volumes[first] not in storage.volumes(), "the volume to be gone")
    rest = [each for each in ("source", "snapshot", "restored") if each != first]
    if first == "restored":
        # What is left is as good as before.
        stage.apply(documents["restored"])
        cluster.wait_ready("restored")
    assert cluster.sh("restored", "cat /data/text; date > /data/more; sync") == wanted
    if "source" in rest:
        assert cluster.sh("source", "cat /data/text; date > /data/more; sync") == wanted
    for each in rest:
        cluster.delete(documents[each])


def test_a_snapshot_outlives_its_object_where_the_class_says_so(
    stage: Stage, cluster: Cluster, storage: Storage
) -> None:
    wanted = filled(stage, cluster, "source")
    before = set(storage.snapshots())
    stage.apply([snapshot_class("kept", "Retain")])
    cluster.apply([snapshot("first", "source", "kept")])
    content = ready(cluster, "first")["status"]["boundVolumeSnapshotContentName"]
    handle = cluster.there("volumesnapshotcontents", content)["status"]["snapshotHandle"]
    cluster.delete([snapshot("first", "source", "kept")])
    (kept,) = set(storage.snapshots()) - before
    assert kept in handle
    cluster.kubectl("delete", "volumesnapshotcontents", content)
    # Another cluster's or namespace's administrator names it by its handle.
    by_hand = {
        "apiVersion": "snapshot.storage.k8s.io/v1",
        "kind": "VolumeSnapshotContent",
        "metadata": {"name": "by-hand"},
        "spec": {
            "driver": snapshot_class()["driver"],
            "deletionPolicy": "Delete",
            "source": {"snapshotHandle": handle},
            "volumeSnapshotRef": {"name": "by-hand", "namespace": "default"},
        },
    }
    of_content = snapshot("by-hand", "")
    of_content["spec"] = {"source": {"volumeSnapshotContentName": "by-hand"}}
    cluster.apply([by_hand])
    stage.apply([of_content])
    ready(cluster, "by-hand")
    stage.apply([claim("restored", dataSource=of_snapshot("by-hand")), user_of("restored")])
    cluster.wait_ready("restored")
    assert cluster.sh("restored", "cat /data/text") == wanted


def test_a_volume_that_was_never_used_is_copied_and_formatted(stage: Stage, cluster: Cluster) -> None:
    stage.apply([snapshot_class(), claim("source")])
    stage.volume("source")
    stage.apply([snapshot("first", "source")])
    ready(cluster, "first")
    stage.apply([claim("restored", dataSource=of_snapshot("first")), user_of("restored")])
    cluster.wait_ready("restored")
    assert cluster.sh("restored", "date > /data/text; wc -l < /data/text") == "1"


# --- refusals -----------------------------------------------------------------------------------------------------


def test_a_restored_volume_smaller_than_its_source_is_refused(stage: Stage, cluster: Cluster) -> None:
    stage.apply([snapshot_class(), claim("source", "2Gi")])
    stage.volume("source")
    stage.apply([snapshot("first", "source")])
    ready(cluster, "first")
    stage.apply([claim("restored", "1Gi", dataSource=of_snapshot("first"))])
    cluster.wait_event("restored", "ProvisioningFailed", "is less than the size")
    stage.apply([claim("copied", "1Gi", dataSource=of_claim("source"))])
    cluster.wait_event("copied", "ProvisioningFailed", "must be greater than or equal in size")


def test_a_filesystem_of_another_kind_is_not_made_of_a_source(stage: Stage, cluster: Cluster) -> None:
    """A class of xfs and a source with ext4: what the source has is used, never overwritten."""
    wanted = filled(stage, cluster, "source")
    stage.apply([claim("copied", storage_class="nvmesh-xfs", dataSource=of_claim("source")), user_of("copied")])
    cluster.wait_event("copied", "FailedMount", "ext4")
    stage.apply([claim("right", dataSource=of_claim("copied"))])
    stage.apply([user_of("right")])
    cluster.wait_ready("right")
    assert cluster.sh("right", "cat /data/text") == wanted


def test_a_group_with_a_raw_device_that_is_written_is_refused_with_the_reason(stage: Stage, cluster: Cluster) -> None:
    labels = {"database": "mixed"}
    claims = [claim("raw", volumeMode="Block"), claim("files")]
    for each in claims:
        each["metadata"]["labels"] = labels
    stage.apply([*claims, device_user_of("raw"), user_of("files")])
    for name in ("raw", "files"):
        cluster.wait_ready(name)
    # No filesystem that could be frozen.
    cluster.sh("raw", f"(while true; do {WRITE.format('x')}; done) >/dev/null 2>&1 </dev/null & true")
    group_class = {**snapshot_class("groups"), "kind": "VolumeGroupSnapshotClass"}
    group_class["apiVersion"] = "groupsnapshot.storage.k8s.io/v1"
    group = {
        "apiVersion": "groupsnapshot.storage.k8s.io/v1",
        "kind": "VolumeGroupSnapshot",
        "metadata": {"name": "mixed"},
        "spec": {"volumeGroupSnapshotClassName": "groups", "source": {"selector": {"matchLabels": labels}}},
    }
    stage.apply([group_class, group])

    def refused() -> str:
        status = cluster.there("volumegroupsnapshots.groupsnapshot.storage.k8s.io", "mixed").get("status", {})
        return str(status.get("error", {}).get("message", ""))

    text = cluster.wait_for(refused, "the group to be refused")
    assert "FailedPrecondition" in text
    cluster.sh("files", "date > /data/text; sync")
