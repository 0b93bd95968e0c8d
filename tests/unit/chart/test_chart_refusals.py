# SPDX-License-Identifier: Apache-2.0
"""Values that cannot be used are refused before anything is installed, in words that say which and why."""

from __future__ import annotations

import subprocess
from typing import Any

import pytest

from tests.unit.chart.rendering import CHART, EMBEDDED, EXPORTED, NVMESH, SNAPSHOTS, Refused, helm, render

pytestmark = [pytest.mark.tool, pytest.mark.skipif(helm() is None, reason="needs helm: make helm")]


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"controler": {}}, "additional properties 'controler' not allowed"),
        ({"controller": {"replica": 3}}, "at '/controller': additional properties 'replica' not allowed"),
        ({"controller": {"replicas": 0}}, "at '/controller/replicas': minimum: got 0, want 1"),
        ({"controller": {"replicas": "two"}}, "at '/controller/replicas': got string, want integer"),
        ({"controller": {"flags": {"volumeUsableTime": 5}}}, "additional properties 'volumeUsableTime' not allowed"),
        ({"controller": {"flags": {"fencing": "maybe"}}}, "one of 'never', 'recorded', 'always'"),
        ({"controller": {"flags": {"endpoint": "/x"}}}, "additional properties 'endpoint' not allowed"),
        ({"node": {"flags": {"heavyOperations": 0}}}, "at '/node/flags/heavyOperations': minimum: got 0, want 1"),
        ({"node": {"flags": {"reconcileInterval": "5 min"}}}, "at '/node/flags/reconcileInterval'"),
        ({"node": {"updateStrategy": {"type": "Recreate"}}}, "one of 'RollingUpdate', 'OnDelete'"),
        ({"node": {"tolerations": [{"operator": "Exist"}]}}, "one of 'Exists', 'Equal'"),
        ({"node": {"extraPathRoots": ["srv"]}}, "at '/node/extraPathRoots/0': 'srv' does not match pattern"),
        ({"logLevel": "loud"}, "at '/logLevel': value must be one of 'debug', 'info', 'warning', 'error'"),
        ({"driverName": "Nvmesh.Example"}, "at '/driverName': 'Nvmesh.Example' does not match pattern"),
        ({"driverName": "a" * 64}, "at '/driverName'"),
        ({"image": {"digest": "sha256:beef"}}, "at '/image/digest'"),
        ({"image": {"pullPolicy": "Sometimes"}}, "one of 'Always', 'IfNotPresent', 'Never'"),
        ({"management": {"servers": ["mgmt:4000"]}}, "at '/management/servers/0'"),
        ({"management": {"password": "secret"}}, "additional properties 'password' not allowed"),
        ({"management": {"zones": {"a/b": {"servers": ["https://m"]}}}}, "a/b"),
        ({"management": {"zones": {"a": {}}}}, "missing property 'servers'"),
        ({"storage": {"size": "lots"}}, "at '/storage/size'"),
        ({"storage": {"flags": {"overcommit": "yes"}}}, "at '/storage/flags/overcommit': got string, want boolean"),
        ({"csiDriver": {"nodeAllocatableUpdatePeriodSeconds": 5}}, "nodeAllocatableUpdatePeriodSeconds"),
        ({"fullnameOverride": "a" * 41}, "at '/fullnameOverride'"),
        ({"image": {"repository": "example.com/csi:1.0"}}, "at '/image/repository'"),
        ({"image": {"repository": "https://example.com/csi"}}, "at '/image/repository'"),
        ({"global": {"imageRegistry": "https://mirror.example.com"}}, "at '/global/imageRegistry'"),
        ({"node": {"startupTaint": {"key": "example.com/a:NoSchedule"}}}, "at '/node/startupTaint/key'"),
    ],
    ids=lambda value: str(value)[:60],
)
def test_the_schema_says_which_value_is_wrong(values: dict[str, Any], words: str) -> None:
    with pytest.raises(Refused) as refused:
        render(*EMBEDDED, values=values)
    assert words in str(refused.value)


@pytest.mark.parametrize(
    ("sets", "words"),
    [
        ((), "no storage management is set: set management.servers"),
        (("management.servers={https://m:4000}",), "management.servers has no credentials"),
        ((*NVMESH, "management.existingClusters.secret=x"), "are both set: set only one"),
        (("management.existingClusters.secret=x", "management.existingClusters.configMap=y"), "more than one is set"),
        (("management.zones.a.servers={https://m}",), "management.zones.a has no credentials"),
        (("storage.enabled=true",), "storage.nodeName is empty: name the Kubernetes node that holds the pool"),
        ((*NVMESH, SNAPSHOTS), "NVMesh cluster, whose management API has no snapshots that CSI can use"),
        ((*EMBEDDED, "volumeSnapshotClasses[0].name=a"), "snapshots.enabled is false, so nothing serves them"),
        ((*EMBEDDED, "volumeGroupSnapshotClasses[0].name=a"), "snapshots.enabled is false, so nothing serves them"),
        (
            (*EMBEDDED, SNAPSHOTS, "sidecars.snapshotter.httpPort=9808"),
            "controller.http.port and sidecars.snapshotter.httpPort are both 9808",
        ),
        ((*NVMESH, "node.terminationGracePeriodSeconds=30"), "node.terminationGracePeriodSeconds: expected more than"),
        ((*NVMESH, "controller.flags.preShutdownDelay=40"), "expected more than the 70 seconds"),
        ((*NVMESH, r"commonLabels.app\.kubernetes\.io/name=x"), "commonLabels has the label app.kubernetes.io/name"),
        ((*NVMESH, r"node.podLabels.helm\.sh/chart=x"), "node.podLabels has the label helm.sh/chart"),
        (
            (*NVMESH, "statusPage.enabled=true", "statusPage.port=9808"),
            "controller.http.port and statusPage.port are both 9808",
        ),
        (
            (*NVMESH, "sidecars.resizer.httpPort=9808"),
            "controller.http.port and sidecars.resizer.httpPort are both 9808",
        ),
        (
            (*NVMESH, "sidecars.livenessprobe.enabled=true", "node.http.port=9819"),
            "node.http.port and sidecars.livenessprobe.nodePort are both 9819",
        ),
        (
            (*EMBEDDED, "storage.http.port=4000"),
            "storage.http.port and storage.service.port are both 4000",
        ),
        (
            (*NVMESH, "sidecars.leaderElection.renewDeadlineSeconds=15"),
            "leaseDurationSeconds: expected more than renewDeadlineSeconds (15), got 15",
        ),
        (
            (*NVMESH, "sidecars.leaderElection.retryPeriodSeconds=9"),
            "renewDeadlineSeconds: expected more than 1.2 times retryPeriodSeconds (9), got 10",
        ),
        ((*NVMESH, "controller.podDisruptionBudget.maxUnavailable=0%"), "maxUnavailable: expected at least 1, got 0%"),
        ((*NVMESH, "storageClasses[0].name=nvmesh-raid1"), "name nvmesh-raid1 is used twice"),
        ((*NVMESH, "storageClasses[0].name=a", "storageClasses[1].name=a"), "name a is used twice"),
        (
            (*NVMESH, "storage.nvme.enabled=true"),
            "volumes are exported by the embedded manager of this release",
        ),
        ((*EMBEDDED, "storage.nvme.enabled=true"), "storage.nvme.addresses is empty: name the addresses of box"),
        ((*EXPORTED, "storage.nvme.addresses={0.0.0.0}"), "expected an address of the storage network, got 0.0.0.0"),
        ((*EXPORTED, "storage.nvme.addresses={10.0.0.1,::}"), "expected an address of the storage network, got ::"),
        (
            (*EXPORTED, "storage.nvme.addresses={127.0.0.2}"),
            "of the storage network, got 127.0.0.2",
        ),
        ((*EXPORTED, "storage.poolDirectory="), "storage.drive and storage.poolDirectory are empty: name the drive"),
        (
            (*EXPORTED, "storage.drive=/dev/disk/by-id/nvme-1"),
            "storage.drive and storage.poolDirectory are both set",
        ),
        (
            (*EMBEDDED, "storage.drive=/dev/nvme0n1"),
            "storage.drive: expected a name that the drive keeps, got /dev/nvme0n1",
        ),
        ((*EMBEDDED, "storage.drive=/dev/dm-0"), "expected a name that the drive keeps, got /dev/dm-0"),
        ((*EMBEDDED, "storage.drive=pool"), "expected a name that the drive keeps, got pool"),
        (
            (*EMBEDDED, "storage.drive=/dev/disk/by-uuid/1f"),
            "expected a name that the drive keeps, got /dev/disk/by-uuid",
        ),
        ((*NVMESH, "storage.drive=/dev/disk/by-id/nvme-1"), "storage.drive is set and storage.enabled is false"),
        ((*EXPORTED, "storage.listenHost=[::]"), "storage.listenHost: expected an address of the node, got [::]"),
        ((*EXPORTED, "attachBy=node"), "a volume of a dead node could not be moved"),
        (
            (*EXPORTED, "storage.nvme.authentication.enabled=true"),
            "storage.tls.existingSecret is empty: nodes send their keys to the API",
        ),
        ((*EXPORTED, "storage.nvme.ports=24000-23000"), "expected LOW-HIGH, at most 65535 and 8192 ports"),
        ((*EXPORTED, "storage.nvme.ports=20000-29000"), "expected LOW-HIGH, at most 65535 and 8192 ports"),
        ((*EXPORTED, "storage.nvme.ports=60000-65536"), "expected LOW-HIGH, at most 65535 and 8192 ports"),
        ((*EXPORTED, "storage.nvme.ports=9000-9900"), "9000-9900 contains node.http.port, 9809"),
        ((*EXPORTED, "storage.nvme.ports=4000-4999"), "4000-4999 contains storage.service.port, 4000"),
        ((*EXPORTED, "storage.http.port=9809"), "node.http.port and storage.http.port are both 9809"),
        (
            (*EXPORTED, "monitoring.podMonitor.enabled=true", "node.http.host=0.0.0.0"),
            "pods of the storage serve their metrics on 127.0.0.1 alone",
        ),
        (
            (
                *EXPORTED,
                "networkPolicy.enabled=true",
                "networkPolicy.egress.enabled=true",
                "networkPolicy.egress.apiServer.cidrs={10.0.0.1/32}",
            ),
            "name the address of its node in networkPolicy.egress.management.cidrs",
        ),
        ((*EMBEDDED, "fullnameOverride=1st"), "got 1st-storage"),
        (
            (*EMBEDDED, "storageClasses[0].name=a", "storageClasses[0].isDefault=true"),
            "nvmesh-local, a: expected at most one default StorageClass",
        ),
    ],
    ids=lambda value: str(value)[:60],
)
def test_values_that_contradict_one_another_are_refused(sets: tuple[str, ...], words: str) -> None:
    with pytest.raises(Refused) as refused:
        render(*sets)
    assert words in str(refused.value)


def test_snapshots_are_refused_where_the_cluster_has_none() -> None:
    cluster = ("apiregistration.k8s.io/v1",)
    with pytest.raises(Refused, match="install the CRDs and the snapshot-controller"):
        render(*EMBEDDED, SNAPSHOTS, apis=cluster)
    assert render(*EMBEDDED, SNAPSHOTS, apis=(*cluster, "snapshot.storage.k8s.io/v1")).of("Deployment")


@pytest.mark.parametrize("sets", [NVMESH, EMBEDDED, ()], ids=["nvmesh", "embedded", "as it is"])
def test_helm_lint_finds_nothing(sets: tuple[str, ...]) -> None:
    words = [word for one in sets for word in ("--set", one)]
    done = subprocess.run([str(helm()), "lint", "--strict", CHART, *words], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
