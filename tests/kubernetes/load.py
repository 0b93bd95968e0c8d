# SPDX-License-Identifier: Apache-2.0
"""Claims, pods and snapshots; a pod that writes all the time, which disturbances of the driver do not affect."""

from __future__ import annotations

from tests.kubernetes import examples
from tests.kubernetes.driver import NAME
from tests.kubernetes.kubectl import Cluster, Document
from tests.kubernetes.stage import Stage

VOLUME_SNAPSHOTS = "volumesnapshots.snapshot.storage.k8s.io"

_SCRIPT = """
dd if=/dev/urandom of=/data/kept bs=1M count=32 2>/dev/null && sync
writes=0
while true; do
  if dd if=/dev/urandom of=/data/file bs=1M count=4 conv=fsync 2>/dev/null; then
    writes=$((writes + 1))
    echo $writes > /data/writes
  else
    echo "after $writes writes" >> /tmp/errors
  fi
  sleep 0.2
done
"""


def claim(name: str, size: str = "1Gi", storage_class: str = "nvmesh-concatenated", **spec: object) -> Document:
    """Return a claim for one writing node, unless `spec` says otherwise."""
    return {
        "apiVersion": "v1",
        "kind": "PersistentVolumeClaim",
        "metadata": {"name": name},
        "spec": {
            "storageClassName": storage_class,
            "accessModes": ["ReadWriteOnce"],
            "resources": {"requests": {"storage": size}},
            **spec,
        },
    }


def user_of(claim_name: str, name: str = "", script: str = "exec sleep 1000000") -> Document:
    """Return a pod that has the claim's filesystem at /data."""
    return {
        "apiVersion": "v1",
        "kind": "Pod",
        "metadata": {"name": name or claim_name},
        "spec": {
            "terminationGracePeriodSeconds": 1,
            "containers": [
                {
                    "name": "user",
                    "image": examples.IMAGE,
                    "command": ["sh", "-c", script],
                    "volumeMounts": [{"name": "data", "mountPath": "/data"}],
                }
            ],
            "volumes": [{"name": "data", "persistentVolumeClaim": {"claimName": claim_name}}],
        },
    }


def device_user_of(claim_name: str, name: str = "") -> Document:
    """Return a pod that has the claim's raw device at /dev/data."""
    pod = user_of(claim_name, name)
    container = pod["spec"]["containers"][0]
    del container["volumeMounts"]
    container["volumeDevices"] = [{"name": "data", "devicePath": "/dev/data"}]
    return pod


def snapshot_class(name: str = "snapshots", deletion_policy: str = "Delete") -> Document:
    """Return a class of snapshots."""
    return {
        "apiVersion": "snapshot.storage.k8s.io/v1",
        "kind": "VolumeSnapshotClass",
        "metadata": {"name": name},
        "driver": NAME,
        "deletionPolicy": deletion_policy,
    }


def snapshot(name: str, claim_name: str, class_name: str = "snapshots") -> Document:
    """Return a snapshot of a claim."""
    return {
        "apiVersion": "snapshot.storage.k8s.io/v1",
        "kind": "VolumeSnapshot",
        "metadata": {"name": name},
        "spec": {"volumeSnapshotClassName": class_name, "source": {"persistentVolumeClaimName": claim_name}},
    }


def of_snapshot(name: str) -> Document:
    """Return the data source of a claim that restores a snapshot."""
    return {"apiGroup": "snapshot.storage.k8s.io", "kind": "VolumeSnapshot", "name": name}


def of_claim(name: str) -> Document:
    """Return the data source of a claim that copies another."""
    return {"kind": "PersistentVolumeClaim", "name": name}


class Writer:
    """A pod that writes without end, with a second file that stays unchanged."""

    def __init__(self, stage: Stage, cluster: Cluster, name: str, storage_class: str = "nvmesh-concatenated") -> None:
        """Start it and wait until it writes."""
        self._cluster = cluster
        self.name = name
        stage.apply([claim(name, storage_class=storage_class), user_of(name, script=_SCRIPT)])
        cluster.wait_ready(name)
        cluster.wait_for(lambda: self.writes() > 0, f"{name} to write")
        self._kept = self._checksum()
        self._uid = self._pod()["metadata"]["uid"]

    def writes(self) -> int:
        """Return how many writes have reached the volume."""
        ended = self._cluster.try_exec(self.name, "cat", "/data/writes")
        return int(ended.stdout or "0") if ended.status == 0 else 0

    def assert_goes_on(self) -> None:
        """Check that it still writes, that no write failed, and that old data is intact."""
        seen = self.writes()
        self._cluster.wait_for(lambda: self.writes() > seen + 3, f"{self.name} to go on writing")
        errors = self._cluster.try_exec(self.name, "cat", "/tmp/errors")
        assert errors.status != 0, f"writes failed: {errors.stdout}"
        pod = self._pod()
        assert pod["metadata"]["uid"] == self._uid
        assert pod["status"]["containerStatuses"][0]["restartCount"] == 0
        # From the device, not from memory.
        self._cluster.sh(self.name, "sync")
        assert self._checksum() == self._kept

    def _checksum(self) -> str:
        # busybox' dd reads past the cache with a flag; a filesystem that refuses that is read as usual.
        return self._cluster.sh(
            self.name, "(dd if=/data/kept bs=1M iflag=direct 2>/dev/null || cat /data/kept) | sha256sum"
        )

    def _pod(self) -> Document:
        return self._cluster.there("pod", self.name)
