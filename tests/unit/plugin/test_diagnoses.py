# SPDX-License-Identifier: Apache-2.0
"""`kubectl nvmesh why`: for each cause, documents as Kubernetes has them, and the first thing that is said."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import pytest

from csi_driver.controller.volume_lookup import client_names
from csi_driver.errors import DeadlineReached, InvalidField, VolumeNotFound
from csi_driver.model import DEFAULT_TOPOLOGY_KEY as ZONE_KEY
from csi_driver.plugin.cases import Case, Finding, advice_on
from csi_driver.plugin.diagnoses import CHECKS, diagnose
from csi_driver.plugin.kubectl import Driver, Kubectl, Objects
from csi_driver.plugin.support import cases
from csi_driver.plugin.why import document, story
from csi_driver.storage_model import Client, ClientStatus
from tests.tools.plugin_advice import advice
from tests.unit.plugin import objects as made
from tests.unit.plugin.objects import Document

OTHER_ID = "bbbbbbbb-2222-3333-4444-555555555555"
PODS = (made.driver_pod("controller"), made.driver_pod("node"), made.driver_pod("node", node_name="node-2"))
MACHINES = (made.node(), made.node("node-2"), made.csi_node(), made.csi_node("node-2", OTHER_ID))
CLUSTER = (made.storage_class(), made.made("CSIDriver", made.DRIVER, spec={"attachRequired": True}), *MACHINES)
BOUND = (made.claim(), made.volume_of_claim(), *CLUSTER)
HELD = made.stored(holders=[made.holder()])
RUNNING = (*BOUND, made.pod(), made.attachment())
STARTING = made.pod(
    phase="Pending", containerStatuses=[{"name": "main", "state": {"waiting": {"reason": "ContainerCreating"}}}]
)
TERMINATING = {"deletionTimestamp": "2026-11-29T05:00:00Z", "finalizers": ["kubernetes.io/pvc-protection"]}
LATE = made.storage_class(binding="WaitForFirstConsumer")


def case(
    *documents: Document,
    volume: Mapping[str, Any] | None = None,
    pods: tuple[Document, ...] = PODS,
    name: str = "data",
    pod_name: str = "",
    gaps: tuple[str, ...] = (),
    silence: str = "",
) -> Case:
    objects = Objects(documents, gaps)
    return Case(name, "default", objects, Driver(Kubectl(), pods), volume, silence=silence, pod_name=pod_name)


def instead(documents: tuple[Document, ...], *others: Document) -> tuple[Document, ...]:
    """Replace documents by those of the same kind and name, and add the rest."""
    keys = {(each["kind"], each["metadata"]["name"]) for each in others}
    return (*(each for each in documents if (each["kind"], each["metadata"]["name"]) not in keys), *others)


def first(*documents: Document, **more: Any) -> Finding:
    return diagnose(case(*documents, **more))[0]


def refused(code: str, desc: str) -> Document:
    message = f'failed to provision volume with StorageClass "nvmesh": rpc error: code = {code} desc = {desc}'
    return made.event("PersistentVolumeClaim", "data", "ProvisioningFailed", message)


def unscheduled(message: str, reason: str = "Unschedulable", **spec: Any) -> Document:
    pending = made.pod(node="", phase="Pending")
    pending["status"]["conditions"] = [
        {"type": "PodScheduled", "status": "False", "reason": reason, "message": message}
    ]
    pending["spec"] |= spec
    return pending


def room(capacity: str, storage_class: str = "nvmesh") -> Document:
    topology = {"matchLabels": {ZONE_KEY: "zone-a"}}
    return made.made(
        "CSIStorageCapacity", "csisc-1", "nvmesh-csi", storageClassName=storage_class, capacity=capacity,
        maximumVolumeSize=capacity, nodeTopology=topology,
    )  # fmt: skip


PENDING = made.claim(phase="Pending")
WAITING = (PENDING, LATE, *CLUSTER[1:])
FREE_STORAGE = "0/2 nodes are available: 2 node(s) did not have enough free storage. no new claims to deallocate"
NOT_READY = made.node(ready="Unknown")
UNKNOWN_PARAMETER = "parameter 'raidlevel' is not known; did you mean raidLevel?"
SNAPSHOT = {"apiGroup": "snapshot.storage.k8s.io", "kind": "VolumeSnapshot", "name": "monday"}
RESTORED = made.claim(phase="Pending", dataSource=SNAPSHOT)
CLONED = made.claim(phase="Pending", dataSource={"kind": "PersistentVolumeClaim", "name": "source"})
RWX = made.claim(accessModes=["ReadWriteMany"])
FAULT = {"fault": "INACCESSIBLE", "reason": "VolumeOffline", "message": "the storage management reports status offline"}
DOWN = client_names([Client("node-1", made.NODE_ID, ClientStatus.DOWN)])
BACK_OFF = {"name": "driver", "state": {"waiting": {"reason": "ImagePullBackOff", "message": "Back-off pulling image"}}}
CRASHES = {
    "name": "main",
    "state": {"waiting": {"reason": "CrashLoopBackOff"}},
    "lastState": {"terminated": {"exitCode": 1}},
}
FULL = {"requests.storage": "10Gi"}
QUOTA = made.made("ResourceQuota", "storage", "default", status={"hard": FULL, "used": FULL})
NO_GROUP = InvalidField("parameters.vpg", "no", "the name of an existing volume provisioning group")
NO_ROOM = (
    "no space for a volume of 10737418240 bytes (concatenated): asked 10737418240 bytes; 0 are unallocated in the "
    "pool, 1 free in its file system: the smaller counts"
)
NO_SECRET = (
    'MountVolume.MountDevice failed for volume "pvc-1" : fetching NodeStageSecretRef default/key failed: kubernetes.io/'
    'csi: failed to find the secret key in the namespace default with error: secrets "key" not found'
)
OLD_DATA = (
    'MountVolume.MountDevice failed for volume "pvc-1" : rpc error: code = FailedPrecondition desc = /dev/nvmesh/csi-1 '
    "holds unrecognised data, the first at byte 4096"
)
IN_USE = (
    "0/1 nodes are available: 1 node has pod using PersistentVolumeClaim with the same name and ReadWriteOncePod "
    "access mode, already in-use by another pod."
)
WRONG_ZONE = "volume 'z:csi-1' does not exist: volume 'z:csi-1' lies in zone 'z', which this driver does not serve"
OPEN = DeadlineReached(
    "volume csi-1 to be detached from node node-1 (device attached; a program on that node may have it open)"
)
STILL_ATTACHED = "rpc error: code = FailedPrecondition desc = volume csi-1 is still attached to node-1; detach it first"
FULL_POOL = "rpc error: code = OutOfRange desc = no space for a volume of 21474836480 bytes (concatenated): no"
FORBIDDEN = 'failed to get secrets: secrets "key" is forbidden'
UNKNOWN_NODE = "rpc error: code = FailedPrecondition desc = node 'node-1' is not registered in the storage management"
NO_CONFIG = 'MountVolume.SetUp failed for volume "config" : configmap "app" not found'
GROWN = made.claim(resources={"requests": {"storage": "20Gi"}})
MAY_GROW = made.storage_class(allowVolumeExpansion=True)


def of_claim(change: Document, base: Document = GROWN) -> Document:
    return {**base, "status": {**base["status"], **change}}


def failed_on(kind: str, message: str, **more: Any) -> Document:
    return made.attachment(attached=kind == "detachError", status={kind: {"message": message}}, **more)


CAUSES: dict[str, tuple[Case, str, str]] = {
    # The subject and problem, and the reason or action, in part.
    "the claim does not exist": (
        case(made.claim("date"), *CLUSTER),
        "claim default/data: does not exist",
        "did you mean date?",
    ),
    "the pod does not exist": (
        case(*RUNNING, name="", pod_name="wep"),
        "pod default/wep: does not exist",
        "did you mean web?",
    ),
    "the quota refuses the claim": (
        case(made.event("StatefulSet", "data", "FailedCreate", "create Claim data: exceeded quota: storage"), *CLUSTER),
        "exceeded quota: storage",
        "raise the quota",
    ),
    "the quota is used up": (case(QUOTA, *CLUSTER), "does not exist", "requests.storage 10Gi of 10Gi"),
    "the PersistentVolume was deleted": (
        case(made.claim(), *CLUSTER),
        "its PersistentVolume pvc-1 does not exist",
        "kubectl nvmesh volumes",
    ),
    "the claim is being deleted and used": (
        case(*instead(RUNNING, made.claim() | {"metadata": {"name": "data", **TERMINATING}}), volume=HELD),
        "is being deleted",
        "pods use it: web",
    ),
    "the claim is held by a finalizer": (
        case(*instead(BOUND, made.claim() | {"metadata": {"name": "data", **TERMINATING}})),
        "is being deleted",
        "kubernetes.io/pvc-protection",
    ),
    "the class does not exist": (
        case(made.claim(phase="Pending", storageClassName="nvmehs"), *CLUSTER),
        "its StorageClass nvmehs does not exist",
        "did you mean nvmesh?",
    ),
    "there is no default class": (
        case(made.claim(phase="Pending", storageClassName=None), *CLUSTER),
        "no class is the default",
        "one of: nvmesh",
    ),
    "the claim waits for a volume without a class": (
        case(made.claim(phase="Pending", storageClassName=""), *CLUSTER),
        'has storageClassName ""',
        "or name a class",
    ),
    "the provisioner is misspelt": (
        case(PENDING, made.storage_class(provisioner="nvmesh-csi.exelero.com"), *CLUSTER[1:], pods=()),
        "no driver of the name nvmesh-csi.exelero.com is installed",
        f"did you mean {made.DRIVER}?",
    ),
    "another driver serves the class": (
        case(PENDING, made.storage_class(provisioner="x.io"), made.made("CSIDriver", "x.io"), pods=()),
        "its driver is x.io",
        "ask that driver",
    ),
    "the controller is not ready": (
        case(
            PENDING,
            *CLUSTER,
            pods=(made.driver_pod("controller", ready=False, containerStatuses=[BACK_OFF]), *PODS[1:]),
        ),
        "no pod of its controller is ready",
        "ImagePullBackOff, Back-off pulling image",
    ),
    "the source snapshot does not exist": (
        case(RESTORED, *CLUSTER),
        "its source, VolumeSnapshot default/monday, does not exist",
        "create the source",
    ),
    "the source snapshot failed": (
        case(
            RESTORED,
            made.made(
                "VolumeSnapshot",
                "monday",
                "default",
                status={
                    "error": {"message": "the storage of zone a offers no snapshots: embedded storage manager: ext4"}
                },
            ),
            *CLUSTER,
        ),
        "offers no snapshots",
        "a pool on xfs",
    ),
    "the source snapshot is not ready": (
        case(RESTORED, made.made("VolumeSnapshot", "monday", "default", status={}), *CLUSTER),
        "is not ready",
        "a-snapshot-is-not-ready",
    ),
    "the source claim has no volume": (
        case(CLONED, made.claim("source", phase="Pending"), *CLUSTER),
        "has no volume yet",
        "kubectl nvmesh why source",
    ),
    "no pod uses the claim": (case(*WAITING), "no pod uses it", "start the pod"),
    "the class has an unknown parameter": (
        case(PENDING, refused("InvalidArgument", UNKNOWN_PARAMETER), *CLUSTER),
        UNKNOWN_PARAMETER,
        "delete the class and create it again",
    ),
    "the group of the class does not exist": (
        case(PENDING, refused("InvalidArgument", str(NO_GROUP)), *CLUSTER),
        "parameters.vpg",
        "its name in the management",
    ),
    "the pool is full": (
        case(PENDING, refused("ResourceExhausted", NO_ROOM), *CLUSTER),
        "no space for a volume",
        "delete volumes, free the disk",
    ),
    "the management is away": (
        case(PENDING, refused("Unavailable", "no response of any of the zones a, b"), *CLUSTER),
        "no response of any of the zones",
        "which of them failed",
    ),
    "the provisioner may not read the secret": (
        case(PENDING, made.event("PersistentVolumeClaim", "data", "ProvisioningFailed", FORBIDDEN), *CLUSTER),
        "is forbidden",
        "rbac.secrets",
    ),
    "the provisioner is silent": (
        case(PENDING, *CLUSTER),
        "the provisioner has not answered yet",
        "kubectl -n nvmesh-csi get leases",
    ),
    "no capacity is large enough": (
        case(*WAITING, unscheduled(FREE_STORAGE), room("1Gi")),
        "did not have enough free storage",
        "10Gi are requested of class nvmesh; capacity of zone-a: 1Gi, one volume 1Gi",
    ),
    "no capacity is published": (
        case(*WAITING, unscheduled(FREE_STORAGE)),
        "did not have enough free storage",
        "there is no CSIStorageCapacity",
    ),
    "the volume is in another zone": (
        case(*BOUND, unscheduled("0/2 nodes are available: 2 node(s) didn't match PersistentVolume's node affinity.")),
        "node affinity",
        "node-2: zone-a",
    ),
    "a node is cordoned": (
        case(*BOUND, made.node("node-2", unschedulable=True), unscheduled("0/2 nodes: 1 node(s) were unschedulable.")),
        "were unschedulable",
        "kubectl uncordon node-2",
    ),
    "every node has its maximum of volumes": (
        case(*BOUND, unscheduled("0/1 nodes are available: 1 node(s) exceed max volume count.")),
        "exceed max volume count",
        "maxVolumesPerNode",
    ),
    "another pod has the ReadWriteOncePod claim": (
        case(*BOUND, unscheduled(IN_USE)),
        "already in-use",
        "end the other pod",
    ),
    "a queue holds the pod back": (
        case(*BOUND, unscheduled("", "SchedulingGated", schedulingGates=[{"name": "kueue.x-k8s.io/admission"}])),
        "kueue.x-k8s.io/admission",
        "queue",
    ),
    "the volume belongs to another claim": (
        case(made.claim(phase="Pending", volumeName="pvc-1"), made.volume_of_claim(claim_name="other"), *CLUSTER),
        "is bound to claim default/other",
        "name another volume",
    ),
    "the volume is released": (
        case(made.claim(phase="Pending", volumeName="pvc-1"), made.volume_of_claim(phase="Released"), *CLUSTER),
        "is Released",
        "kubectl patch pv pvc-1",
    ),
    "the volume cannot be deleted": (
        case(
            *instead(BOUND, made.volume_of_claim() | {"metadata": {"name": "pvc-1", "uid": "u", **TERMINATING}}),
            made.event("PersistentVolume", "pvc-1", "VolumeFailedDelete", STILL_ATTACHED)
            | {"involvedObject": {"kind": "PersistentVolume", "name": "pvc-1", "uid": "u"}},
        ),
        "is still attached to",
        "detach it",
    ),
    "no node is in the zone of the volume": (
        case(
            *instead(
                BOUND,
                made.node() | {"metadata": {"name": "node-1"}},
                made.node("node-2") | {"metadata": {"name": "node-2"}},
            )
        ),
        "no node of the cluster is in its zone",
        "node-1: no such label",
    ),
    "the volume is gone from the storage": (
        case(*BOUND, volume={"error": str(VolumeNotFound("zone-a:csi-1")), "kind": "VolumeNotFound"}),
        "does not exist",
        "restore from a backup",
    ),
    "the zone of a static volume is misspelt": (
        case(*BOUND, volume={"error": WRONG_ZONE, "kind": "VolumeNotFound"}),
        "which this driver does not serve",
        "wrong zone",
    ),
    "the storage lost the volume's file": (
        case(*RUNNING, volume=made.stored(faults=[FAULT])),
        "VolumeOffline",
        "docs/health.md",
    ),
    "the node is gone from the cluster": (
        case(*(each for each in RUNNING if each["metadata"]["name"] != "node-1"), made.csi_node(), volume=HELD),
        "node node-1: does not exist any more",
        "kubectl nvmesh release data --node node-1",
    ),
    "the node is not ready": (
        case(*instead(RUNNING, NOT_READY), volume=HELD),
        "is not Ready: kubelet stopped posting",
        "kubectl nvmesh release data --node",
    ),
    "the storage client of the node is down": (
        case(*RUNNING, volume=made.stored(holders=[made.holder(status="down")])),
        "whose storage client is down",
        "systemctl status nvmeshclient",
    ),
    "a node has no connection to its volume over NVMe/TCP": (
        case(*RUNNING, volume=made.stored(holders=[made.holder(status="down", on_demand=True)])),
        "which has no connection to it",
        "check the network to the storage",
    ),
    "a lost node still holds the volume": (
        case(*instead(BOUND, NOT_READY), volume=made.stored(holders=[made.holder(status="down")])),
        "whose storage client is down",
        "kubectl nvmesh release data --node node-1",
    ),
    "the driver is not registered on the node": (
        case(*instead(RUNNING, made.csi_node() | {"spec": {"drivers": []}}), volume=HELD),
        f"driver {made.DRIVER} is not registered there",
        "nvmesh-csi-node-node-1: Running, ready",
    ),
    "no pod of the driver runs on the node": (
        case(*instead(RUNNING, made.csi_node() | {"spec": {"drivers": []}}), volume=HELD, pods=PODS[:1]),
        "is not registered there",
        "tolerations of the DaemonSet",
    ),
    "the driver's pod on the node is not ready": (
        case(*RUNNING, volume=HELD, pods=(PODS[0], made.driver_pod("node", ready=False))),
        "the driver's pod there is not ready",
        "logs POD -c driver",
    ),
    "the node has its maximum of volumes": (
        case(*instead(BOUND, made.csi_node(count=1)), STARTING, made.attachment(pv="pvc-2")),
        "has its maximum of 1 volumes",
        "maxVolumesPerNode",
    ),
    "the volume cannot be attached": (
        case(*BOUND, STARTING, failed_on("attachError", UNKNOWN_NODE)),
        "is not registered in the storage management",
        "is the NVMesh client running",
    ),
    "another node has the volume": (
        case(
            *BOUND,
            STARTING,
            failed_on(
                "attachError",
                f"rpc error: code = Internal desc = volume csi-1 is attached to node {DOWN}; detach it there first",
            ),
        ),
        "detach it there first",
        "multi-attach",
    ),
    "the volume cannot be detached": (
        case(
            *BOUND, failed_on("detachError", f"rpc error: code = DeadlineExceeded desc = {OPEN}", metadata=TERMINATING)
        ),
        "timed out waiting for",
        "client_processes",
    ),
    "a pod on another node has the volume": (
        case(*BOUND, STARTING, made.pod("old", node="node-2"), made.attachment("node-2")),
        "is attached to node node-2",
        "end old",
    ),
    "the pod moved off a dead node": (
        case(*instead(BOUND, made.node("node-2", ready="Unknown")), STARTING, made.attachment("node-2")),
        "is attached to node node-2",
        "kubectl nvmesh release data --node node-2",
    ),
    "somebody attached the volume by hand": (
        case(*BOUND, STARTING, volume=made.stored(holders=[made.holder("node-2", OTHER_ID)])),
        "is held by node-2, and Kubernetes has no VolumeAttachment for it",
        "kubectl nvmesh holders data",
    ),
    "the attach-detach controller waits": (
        case(*BOUND, STARTING, made.event("Pod", "web", "FailedAttachVolume", "Multi-Attach error")),
        "its volume has no VolumeAttachment for node node-1",
        "Multi-Attach error",
    ),
    "the driver has not attached the volume yet": (
        case(*BOUND, STARTING, made.attachment(attached=False)),
        "the driver has not answered yet",
        "-c driver",
    ),
    "the device holds old data": (
        case(*BOUND, STARTING, made.attachment(), made.event("Pod", "web", "FailedMount", OLD_DATA)),
        "holds unrecognised data",
        "docs/troubleshooting.md#refused-to-format",
    ),
    "the secret of the node does not exist": (
        case(*BOUND, STARTING, made.attachment(), made.event("Pod", "web", "FailedMount", NO_SECRET)),
        'secrets "key" not found',
        "docs/troubleshooting.md",
    ),
    "another volume of the pod is missing": (
        case(*BOUND, STARTING, made.attachment(), made.event("Pod", "web", "FailedMount", NO_CONFIG)),
        'configmap "app" not found',
        "this driver's is not the cause",
    ),
    "the container fails": (
        case(*instead(RUNNING, made.pod(containerStatuses=[CRASHES])), volume=HELD),
        "container main: CrashLoopBackOff",
        "its volumes are mounted",
    ),
    "the unmount hangs": (
        case(
            *instead(
                RUNNING,
                made.pod(containerStatuses=[{"name": "main", "state": {"terminated": {}}}])
                | {"metadata": {"name": "web", "uid": "u", "namespace": "default", **TERMINATING}},
            ),
            volume=HELD,
        ),
        "its containers have ended",
        "a-pod-or-claim-is-stuck-terminating",
    ),
    "the class allows no expansion": (
        case(*instead(RUNNING, GROWN), volume=HELD),
        "its class allows no expansion",
        "allowVolumeExpansion: true",
    ),
    "the expansion has no space": (
        case(
            *instead(RUNNING, GROWN, MAY_GROW),
            made.event("PersistentVolumeClaim", "data", "VolumeResizeFailed", FULL_POOL),
            volume=HELD,
        ),
        "no space for a volume",
        "expansion from 10Gi to 20Gi",
    ),
    "the filesystem grows at the next mount": (
        case(
            *instead(RUNNING, of_claim({"allocatedResourceStatuses": {"storage": "NodeResizePending"}}), MAY_GROW),
            volume=HELD,
        ),
        "its filesystem grows at the next mount",
        "start a pod",
    ),
    "the expansion has not begun": (
        case(*instead(RUNNING, GROWN, MAY_GROW), volume=HELD),
        "20Gi are requested, and it has 10Gi",
        "-c resizer",
    ),
    "the VolumeAttributesClass does not exist": (
        case(
            *instead(
                RUNNING,
                of_claim(
                    {"modifyVolumeStatus": {"targetVolumeAttributesClassName": "gold", "status": "Pending"}},
                    made.claim(),
                ),
            ),
            volume=HELD,
        ),
        "VolumeAttributesClass gold is not applied: Pending",
        "kubectl get volumeattributesclass gold",
    ),
    "the driver recorded a warning": (
        case(
            *RUNNING,
            made.event("PersistentVolumeClaim", "data", "PoolNearlyPromised", "the pool is nearly promised")
            | {"reportingComponent": made.DRIVER},
            volume=HELD,
        ),
        "the pool is nearly promised",
        "docs/troubleshooting.md",
    ),
    "a kind could not be read": (
        case(*RUNNING, volume=HELD, gaps=('nodes is forbidden: User "x" cannot list resource "nodes"',)),
        "nodes is forbidden",
        "could not be looked at",
    ),
    "the storage could not be asked": (
        case(*RUNNING, silence="nvmesh-csi volume show in pod x: exit status 2"),
        "exit status 2",
        "unknown",
    ),
}


@pytest.mark.parametrize("cause", CAUSES)
def test_the_first_finding_is_the_cause(cause: str) -> None:
    given, problem, more = CAUSES[cause]
    found = diagnose(given)
    assert found, "nothing was found"
    assert problem in f"{found[0].subject}: {found[0].problem}"
    assert more in f"{found[0].reason} {found[0].action}"


@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__)
def test_each_diagnosis_is_the_first_of_some_cause(check: Any) -> None:
    assert [name for name, (given, _, _) in CAUSES.items() if diagnose(given)[0] in list(check(given))]


@pytest.mark.parametrize(
    "healthy",
    [
        case(*RUNNING, volume=HELD),
        case(*RUNNING, volume=HELD, pod_name="web"),
        case(*BOUND, volume=made.stored()),
        case(
            *instead(RUNNING, RWX),
            made.pod("two", node="node-2"),
            made.attachment("node-2"),
            volume=made.stored(holders=[made.holder(), made.holder("node-2", OTHER_ID)]),
        ),
        case(*RUNNING, refused("Unavailable", "no response"), volume=HELD),
        case(*instead(RUNNING, made.pod(phase="Succeeded")), volume=HELD),
    ],
    ids=["running", "of a pod", "without a pod", "shared block", "an old event", "ended"],
)
def test_nothing_is_wrong_with_a_healthy_volume(healthy: Case) -> None:
    assert diagnose(healthy) == []


def test_what_cannot_be_told_comes_after_what_is_wrong() -> None:
    found = diagnose(case(*instead(RUNNING, NOT_READY), volume=HELD, gaps=("pods is forbidden",)))
    assert [each.is_wrong for each in found] == [True, False]


def test_a_denied_kind_is_not_taken_for_a_missing_object() -> None:
    found = diagnose(case(made.claim(), *CLUSTER, gaps=("persistentvolumes is forbidden",)))
    assert [each.is_wrong for each in found] == [False]


def test_an_event_of_an_earlier_object_of_that_name_is_ignored() -> None:
    old = refused("InvalidArgument", UNKNOWN_PARAMETER)
    old["involvedObject"]["uid"] = "another"
    assert "has not answered" in first(PENDING, old, *CLUSTER).problem


def test_of_two_events_the_newer_one_counts() -> None:
    old, new = (
        refused("InvalidArgument", UNKNOWN_PARAMETER),
        refused("Unavailable", "no response of any of the zones"),
    )
    new["lastTimestamp"] = "2026-11-29T06:30:00Z"
    assert "no response" in first(PENDING, new, old, *CLUSTER).problem


def test_text_of_others_cannot_control_the_terminal() -> None:
    found = first(PENDING, refused("Internal", "\x1b]0;x\x07 two\nlines"), *CLUSTER)
    assert all(line.isprintable() for line in found.lines())


def test_the_path_names_each_object() -> None:
    lines = list(story(case(*RUNNING, volume=HELD)))
    assert [line.split()[0] for line in lines] == ["claim", "class", "PV", "storage", "attachment", "pod"]
    assert '"certain": true' in document([case(*RUNNING)], [Finding("a", "b")])


def test_a_message_nobody_documents_has_no_advice() -> None:
    assert advice_on("an asteroid hit the rack") == {}


def test_each_message_of_the_documents_has_its_own_advice() -> None:
    for entry in advice():
        for quoted in entry["messages"]:
            assert quoted in advice_on(quoted.replace("...", "'x' 1"))["messages"]


def plural(kind: str) -> str:
    return f"{kind.lower()[:-1]}ies" if kind.endswith("y") else f"{kind.lower()}{'es' if kind.endswith('s') else 's'}"


def accusations(given: Case) -> set[tuple[str, str]]:
    return {(each.subject, each.problem) for each in diagnose(given) if each.is_wrong}


TRUE_ANYWAY = "is being deleted", "are requested, and it has", "claim default/data: does not exist", "MountVolume.SetUp"
"""Seen in the objects that are left; what could not be read explains them only."""
EVERY = {**{name: given for name, (given, _, _) in CAUSES.items()}, "nothing": case(*RUNNING, volume=HELD)}


@pytest.mark.parametrize("cause", EVERY)
def test_what_may_not_be_read_accuses_nothing_else(cause: str) -> None:
    given = EVERY[cause]
    for kind in {each["kind"] for each in given.objects.documents}:
        left = tuple(each for each in given.objects.documents if each["kind"] != kind)
        volume = given.volume if "PersistentVolume" not in kind else None
        blind = replace(given, objects=Objects(left, (f"{plural(kind)} is forbidden",)), volume=volume)
        told = accusations(blind) - accusations(given)
        new = {each for each in told if not any(fact in ": ".join(each) for fact in TRUE_ANYWAY)}
        assert not new, (kind, new)
        assert diagnose(blind)


class Counted(dict[str, Any]):
    """An object that counts how often it is looked at."""

    looks = 0

    def get(self, key: str, default: Any = None) -> Any:
        Counted.looks += 1
        return super().get(key, default)


def looks_of_a_bundle(claims: int) -> int:
    """Return how often the objects of so many claims are looked at to diagnose them all."""
    documents: list[Document] = [*CLUSTER]
    for number in range(claims):
        pv = made.volume_of_claim(f"pvc-{number}", claim_name=f"data-{number}")
        event = made.event("Pod", f"web-{number}", "FailedMount", "a message of the past")
        claim = made.claim(f"data-{number}", volumeName=f"pvc-{number}")
        pod, attached = made.pod(f"web-{number}", claim_name=f"data-{number}"), made.attachment(pv=f"pvc-{number}")
        documents += [claim, pv, pod, attached, event]
    Counted.looks = 0
    found = Objects(tuple(map(Counted, documents)))
    assert [case for case in cases(found, Driver(Kubectl(), PODS), {}) if diagnose(case)] == []
    return Counted.looks


def test_a_bundle_of_many_claims_looks_at_each_object_a_few_times() -> None:
    assert looks_of_a_bundle(400) < 2.2 * looks_of_a_bundle(200)
