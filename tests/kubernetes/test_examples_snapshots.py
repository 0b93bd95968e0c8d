# SPDX-License-Identifier: Apache-2.0
"""Examples of snapshots, copies and groups, checked from inside the pods that read them."""

from __future__ import annotations

import pytest

from tests.kubernetes.kubectl import Cluster, Document
from tests.kubernetes.load import VOLUME_SNAPSHOTS, claim, of_snapshot, user_of
from tests.kubernetes.stage import Stage
from tests.kubernetes.test_examples_alone import GIB, bytes_in, pod_of
from tests.kubernetes.test_examples_shared import refusals


def ready(cluster: Cluster, name: str, namespace: str = "default", kind: str = VOLUME_SNAPSHOTS) -> Document:
    """Wait until a snapshot can be used, and return it."""

    def found() -> Document | None:
        snapshot = cluster.get(kind, name, namespace)
        return snapshot if snapshot and snapshot.get("status", {}).get("readyToUse") else None

    return cluster.wait_for(found, f"snapshot {namespace}/{name} to be ready")


def group_ready(cluster: Cluster, name: str) -> dict[str, str]:
    """Wait until a group can be used; return the names of its snapshots by the claim that each is of."""
    ready(cluster, name, kind="volumegroupsnapshots.groupsnapshot.storage.k8s.io")
    members = [
        member
        for member in cluster.all(VOLUME_SNAPSHOTS)
        if member.get("status", {}).get("volumeGroupSnapshotName") == name
    ]
    return {
        member["spec"]["source"]["persistentVolumeClaimName"]: ready(cluster, member["metadata"]["name"])["metadata"][
            "name"
        ]
        for member in members
    }


@pytest.mark.short
def test_a_snapshot_holds_the_data_of_its_moment_and_is_restored_larger(stage: Stage, cluster: Cluster) -> None:
    stage.example("filesystem.yaml")
    cluster.wait_ready("filesystem")
    wanted = cluster.sh(
        "filesystem", "dd if=/dev/urandom of=/data/file bs=1M count=16 2>/dev/null; sync; sha256sum /data/file"
    )
    stage.example("snapshot.yaml")
    assert ready(cluster, "filesystem")["status"]["restoreSize"] == "2Gi"
    cluster.sh("filesystem", "date > /data/later; rm /data/file; sync")
    stage.example("restore.yaml")
    cluster.wait_ready("restored")
    assert cluster.sh("restored", "sha256sum /data/file") == wanted
    assert cluster.try_exec("restored", "test", "-e", "/data/later").status != 0
    assert len(cluster.sh("restored", "cat /data/started").splitlines()) == 2
    assert bytes_in(cluster, "restored", "/data") > 0.9 * 3 * GIB
    assert len(cluster.sh("filesystem", "cat /data/started").splitlines()) == 1


def test_a_claim_is_copied_while_it_is_used(stage: Stage, cluster: Cluster) -> None:
    documents = stage.example("filesystem.yaml")
    cluster.wait_ready("filesystem")
    wanted = cluster.sh(
        "filesystem", "dd if=/dev/urandom of=/data/file bs=1M count=16 2>/dev/null; sync; sha256sum < /data/file"
    )
    copy = stage.example("clone.yaml")
    cluster.wait_ready("cloned")
    assert cluster.sh("cloned", "sha256sum < /data/file") == wanted
    cluster.sh("cloned", "date >> /data/file; sync")
    assert cluster.sh("filesystem", "sha256sum < /data/file") == wanted
    assert stage.volume("cloned").uuid != stage.volume("filesystem").uuid
    # The source goes first.
    cluster.delete(reversed(documents))
    stage.restart(pod_of(copy, "cloned"))
    assert len(cluster.sh("cloned", "cat /data/started").splitlines()) == 3


def test_a_snapshot_of_a_filesystem_is_read_as_a_device_by_those_who_may(stage: Stage, cluster: Cluster) -> None:
    stage.example("filesystem.yaml")
    cluster.wait_ready("filesystem")
    cluster.sh("filesystem", "until test -s /data/started; do sleep 0.1; done; sync")
    stage.example("snapshot.yaml")
    content = ready(cluster, "filesystem")["status"]["boundVolumeSnapshotContentName"]
    stage.example("restore-to-block.yaml")
    cluster.wait_event("restored-to-block", "ProvisioningFailed", "allow-volume-mode-change")
    cluster.kubectl(
        "annotate", "volumesnapshotcontent", content, "snapshot.storage.kubernetes.io/allow-volume-mode-change=true"
    )
    cluster.wait_ready("restored-to-block")
    # The magic number of ext4, and the name of a file of the source in its root directory.
    assert (
        cluster.sh("restored-to-block", "dd if=/dev/data bs=1 skip=1080 count=2 2>/dev/null | od -An -tx1") == "53 ef"
    )
    assert int(cluster.sh("restored-to-block", "head -c 200000000 /dev/data | grep -c started")) > 0


@pytest.mark.short
def test_a_group_holds_no_write_whose_predecessor_is_missing(stage: Stage, cluster: Cluster) -> None:
    stage.example("group.yaml")
    cluster.wait_ready("database")
    for path in ("/log", "/data"):
        cluster.wait_for(lambda path=path: cluster.sh("database", f"wc -l < {path}/numbers") > "0", "writes")  # type: ignore[misc]
    stage.example("group-snapshot.yaml")
    members = group_ready(cluster, "database")
    assert set(members) == {"database-log", "database-data"}
    for source, name in members.items():
        restored = f"restored-{source}"
        stage.apply([claim(restored, dataSource=of_snapshot(name)), user_of(restored)])
    last = {}
    for source in members:
        cluster.wait_ready(f"restored-{source}")
        last[source] = int(cluster.sh(f"restored-{source}", "tail -n 1 /data/numbers"))
    # Written to the log first, by a program that waits for each write.
    assert 0 <= last["database-log"] - last["database-data"] <= 1
    before = int(cluster.sh("database", "tail -n 1 /data/numbers"))
    cluster.wait_for(lambda: int(cluster.sh("database", "tail -n 1 /data/numbers")) > before, "the writer to go on")


def test_twenty_pods_train_on_a_snapshot_while_the_notebook_goes_on_writing(stage: Stage, cluster: Cluster) -> None:
    stage.example("notebook.yaml")
    cluster.wait_ready("notebook", "research")
    wanted = cluster.sh("notebook", "cat /data/sums", "research")
    change = "while true; do dd if=/dev/urandom of=/data/draft bs=1M count=4 conv=fsync; echo >> /data/rounds; done"
    cluster.sh("notebook", f"({change}) >/dev/null 2>&1 </dev/null & true", "research")
    stage.example("data-set-snapshot.yaml")
    ready(cluster, "data-set-1", "research")
    changed = stage.unique()
    cluster.sh("notebook", f"rm /data/shard-7; echo {changed} > /data/shard-7; sync", "research")
    cluster.kubectl(
        "wait", "--for=condition=Complete", "job/training-on-snapshot", "-n", "research", "--timeout=400s",
        timeout_s=420,
    )  # fmt: skip
    pods = cluster.all("pods", "research", "app=training-on-snapshot")
    lines = (line for pod in pods for line in cluster.logs(pod["metadata"]["name"], "research").splitlines())
    assert sorted(line for line in lines if line.startswith("pod ")) == sorted(
        f"pod {number} has read 8 shards" for number in range(20)
    )
    rounds = int(cluster.sh("notebook", "wc -l < /data/rounds", "research"))
    cluster.wait_for(
        lambda: int(cluster.sh("notebook", "wc -l < /data/rounds", "research")) > rounds, "the notebook to write"
    )
    assert cluster.sh("notebook", "cat /data/shard-7", "research") == changed
    # One more reader, by hand: the data of the snapshot, and no way to change it.
    reader = user_of("data-set-1", "reader")
    reader["metadata"]["namespace"] = "research"
    stage.apply([reader])
    cluster.wait_ready("reader", "research")
    assert cluster.sh("reader", "cat /data/sums", "research") == wanted
    assert [text for text in refusals(cluster, "reader", "research") if "Read-only file system" not in text] == []
    assert stage.volume("data-set-1", "research").uuid != stage.volume("data-set", "research").uuid
    cluster.delete([reader])
