# SPDX-License-Identifier: Apache-2.0
"""Problems of a claim until it has a volume. Each function looks at the documents of a case alone."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from csi_driver.plugin.cases import (
    Case,
    Finding,
    advice_on,
    close_name,
    explained,
    is_unread,
    pod_state,
    quantity_bytes,
)
from csi_driver.plugin.kubectl import Document, condition, dig, is_ready, is_terminating, name_of

_DEFAULT_CLASS = "storageclass.kubernetes.io/is-default-class"
_SELECTED_NODE = "volume.kubernetes.io/selected-node"
_NO_STORAGE = "did not have enough free storage"
_OTHER_ZONE = "volume node affinity conflict", "didn't match PersistentVolume's node affinity"


# --- the claim -------------------------------------------------------------------------------------------------------


def no_pod(case: Case) -> Iterator[Finding]:
    if case.pod_name and not case.pods and not is_unread(case, "pods"):
        names = [name_of(each) for each in case.objects.all("Pod")]
        yield Finding(
            f"pod {case.namespace}/{case.pod_name}",
            "does not exist",
            close_name(case.pod_name, names),
            "check name and namespace (-n); of a workload see 'kubectl describe' for FailedCreate",
        )


def no_claim(case: Case) -> Iterator[Finding]:
    if case.claim is not None or not case.name or is_unread(case, "persistentvolumeclaims"):
        return
    for event in case.objects.all("Event"):
        message = str(event.get("message"))
        if event.get("reason") == "FailedCreate" and "exceeded quota" in message and case.name in message:
            yield Finding(
                case.subject,
                message,
                "a ResourceQuota of the namespace refuses the claim",
                f"delete claims, or raise the quota: kubectl -n {case.namespace} describe resourcequota",
            )
            return
    full = [text for quota in case.objects.all("ResourceQuota") for text in _used_up(quota)]
    names = [name_of(each) for each in case.objects.all("PersistentVolumeClaim")]
    reason = "; ".join(each for each in (close_name(case.name, names), *full) if each)
    yield Finding(case.subject, "does not exist", reason, "check name and namespace (-n), or create it")


def _used_up(quota: Document) -> Iterator[str]:
    used, hard = dig(quota, "status", "used") or {}, dig(quota, "status", "hard") or {}
    for key, limit in hard.items():
        if ("storage" in key or "persistentvolumeclaims" in key) and quantity_bytes(used.get(key)) >= quantity_bytes(
            limit
        ):
            yield f"quota {name_of(quota)} is used up: {key} {used.get(key)} of {limit}"


def claim_is_lost(case: Case) -> Iterator[Finding]:
    wanted = dig(case.claim, "spec", "volumeName")
    if not wanted or case.pv is not None or is_unread(case, "persistentvolume"):
        return
    yield Finding(
        case.subject,
        f"its PersistentVolume {wanted} does not exist",
        "it was deleted while the claim was bound, or the claim names a volume that was never created",
        "if the volume is still in the storage ('kubectl nvmesh volumes'), make a PersistentVolume of that name with"
        " its handle; else delete the claim",
    )


def claim_is_terminating(case: Case) -> Iterator[Finding]:
    if not is_terminating(case.claim or {}):
        return
    users = ", ".join(name_of(pod) for pod in case.users)
    held = ", ".join(dig(case.claim, "metadata", "finalizers") or ())
    yield Finding(
        case.subject,
        "is being deleted",
        f"pods use it: {users}" if users else f"finalizers hold it: {held}",
        f"end the pods: {users}" if users else "wait for the controllers of the finalizers",
    )


# --- the StorageClass ------------------------------------------------------------------------------------------------


def no_class(case: Case) -> Iterator[Finding]:
    if not case.is_pending or case.storage_class is not None or is_unread(case, "storageclass"):
        return
    classes, wanted = case.objects.all("StorageClass"), dig(case.claim, "spec", "storageClassName")
    ours = [name_of(each) for each in classes if each.get("provisioner") == case.driver.name()]
    if wanted:
        yield Finding(
            case.subject,
            f"its StorageClass {wanted} does not exist",
            close_name(wanted, map(name_of, classes)),
            f"create the class, or delete the claim and use one of: {', '.join(ours) or 'none'}",
        )
    elif wanted is None and not any(_is_default(each) for each in classes):
        yield Finding(
            case.subject,
            "names no StorageClass, and no class is the default",
            action=f"set storageClassName to one of: {', '.join(ours) or 'none'}",
        )
    elif wanted == "" and not dig(case.claim, "spec", "volumeName"):
        yield Finding(
            case.subject,
            'has storageClassName "": it is bound to an existing PersistentVolume only',
            "no PersistentVolume without a class fits size, access modes and selector",
            "create such a PersistentVolume, or name a class",
        )


def _is_default(storage_class: Document) -> bool:
    return bool((dig(storage_class, "metadata", "annotations") or {}).get(_DEFAULT_CLASS) == "true")


def other_driver(case: Case) -> Iterator[Finding]:
    own, name = case.objects.all("CSIDriver"), case.driver_name
    if case.claim is None or not name or case.driver.pods or case.driver.gaps:
        return
    if case.storage_class is None and case.pv is None:
        return
    if case.pv is not None and not dig(case.pv, "spec", "csi"):
        yield Finding(case.subject, f"PersistentVolume {name_of(case.pv)} is not of a CSI driver", is_wrong=False)
    elif case.objects.one("CSIDriver", name) is None and not is_unread(case, "csidriver"):
        yield Finding(
            case.subject,
            f"no driver of the name {name} is installed",
            close_name(name, map(name_of, own)) or f"drivers here: {', '.join(map(name_of, own)) or 'none'}",
            "correct 'provisioner' of the class (delete it and create it again), or install the driver",
        )
    else:
        yield Finding(
            case.subject,
            f"its driver is {name}, and no pod of that name is one of this driver",
            "it is another driver, its pods are gone, or you may not see them",
            "ask that driver; else check the DaemonSet and Deployment of this one",
            is_wrong=False,
        )


def controller_is_down(case: Case) -> Iterator[Finding]:
    if not case.driver.pods or any(is_ready(pod) for pod in case.driver.of("controller")):
        return
    states = "; ".join(f"{name_of(pod)}: {pod_state(pod)}" for pod in case.driver.of("controller"))
    yield Finding(
        f"driver {case.driver_name}",
        "no pod of its controller is ready",
        states or "there is none",
        "see docs/troubleshooting.md#a-pod-of-the-driver-is-not-ready; /readyz and the log name the"
        " missing part: kubectl nvmesh doctor",
    )


# --- making the volume -----------------------------------------------------------------------------------------------


def data_source(case: Case) -> Iterator[Finding]:
    source = dig(case.claim, "spec", "dataSource") or {}
    if not case.is_pending or not source:
        return
    kind, name = str(source.get("kind")), str(source.get("name"))
    found, what = case.objects.one(kind, name), f"{kind} {case.namespace}/{name}"
    if kind not in ("VolumeSnapshot", "PersistentVolumeClaim"):
        return
    if found is None and not is_unread(case, kind.lower()):
        names = map(name_of, case.objects.all(kind))
        yield Finding(
            case.subject,
            f"its source, {what}, does not exist",
            close_name(name, names),
            "create the source, or delete the claim and name another",
        )
    elif kind == "PersistentVolumeClaim" and dig(found, "status", "phase") == "Pending":
        yield Finding(case.subject, f"its source, {what}, has no volume yet", action=f"kubectl nvmesh why {name}")
    elif found is not None and kind == "VolumeSnapshot" and not dig(found, "status", "readyToUse"):
        message = dig(found, "status", "error", "message")
        if message:
            yield explained(f"{what}, the source of {case.subject}", str(message))
        else:
            yield Finding(
                case.subject,
                f"its source, {what}, is not ready",
                action="see docs/troubleshooting.md#a-snapshot-is-not-ready",
            )


def no_consumer(case: Case) -> Iterator[Finding]:
    binding = (case.storage_class or {}).get("volumeBindingMode")
    if (
        case.is_pending
        and binding == "WaitForFirstConsumer"
        and not case.users
        and not is_unread(case, "pods")
        and not is_terminating(case.claim or {})
    ):
        yield Finding(
            case.subject,
            "no pod uses it, and its class waits for one (WaitForFirstConsumer)",
            "normal: the volume is created where the pod will run",
            "start the pod that uses the claim",
        )


def not_provisioned(case: Case) -> Iterator[Finding]:
    """A refusal of the driver or the provisioner."""
    if not case.is_pending or case.claim is None or case.storage_class is None:
        return
    event = case.event("PersistentVolumeClaim", case.claim, "ProvisioningFailed")
    if event is not None:
        yield explained(case.subject, _provisioning(str(event.get("message"))))


def _provisioning(message: str) -> str:
    return re.sub(r'^failed to provision volume with StorageClass "[^"]*": ', "", message)


def not_scheduled(case: Case) -> Iterator[Finding]:
    for pod in case.pods:
        scheduled = condition(pod, "PodScheduled")
        if dig(pod, "spec", "nodeName") or scheduled.get("status") != "False" or is_terminating(pod):
            continue
        subject, message = f"pod {case.namespace}/{name_of(pod)}", str(scheduled.get("message"))
        if scheduled.get("reason") == "SchedulingGated":
            gates = ", ".join(str(each.get("name")) for each in dig(pod, "spec", "schedulingGates") or ())
            yield Finding(
                subject, f"is held back by scheduling gates: {gates}", action="its owner, such as a queue, removes them"
            )
        elif _NO_STORAGE in message:
            yield explained(subject, message, reason=_capacity(case))
        elif any(words in message for words in _OTHER_ZONE):
            yield explained(subject, message, reason=_places(case))
        else:
            cordoned = [name_of(node) for node in case.objects.all("Node") if dig(node, "spec", "unschedulable")]
            reason = f"no pod may start on cordoned nodes: {', '.join(cordoned)}" if cordoned else ""
            action = f"when their maintenance is over: kubectl uncordon {' '.join(cordoned)}" if cordoned else ""
            yield explained(subject, message, reason=reason, action="" if advice_on(message) else action)


def _capacity(case: Case) -> str:
    """Describe the CSIStorageCapacity of the class."""
    if case.storage_class is None or is_unread(case, "csistoragecapacities"):
        return ""
    name, wanted = name_of(case.storage_class), dig(case.claim, "spec", "resources", "requests", "storage")
    own = [each for each in case.objects.all("CSIStorageCapacity") if each.get("storageClassName") == name]
    if not own:
        return f"there is no CSIStorageCapacity for class {name}: the provisioner has not made one"
    shown = []
    for each in own:
        labels = dig(each, "nodeTopology", "matchLabels") or {}
        most = each.get("maximumVolumeSize") or each.get("capacity")
        shown.append(f"{','.join(labels.values()) or 'everywhere'}: {each.get('capacity')}, one volume {most}")
    return f"{wanted} are requested of class {name}; capacity of {'; '.join(shown)}"


def _places(case: Case) -> str:
    terms = dig(case.pv, "spec", "nodeAffinity", "required", "nodeSelectorTerms") or ()
    wanted = [
        f"{each['key']} in {','.join(each.get('values') or ())}"
        for term in terms
        for each in term.get("matchExpressions") or ()
    ]
    keys = {each["key"] for term in terms for each in term.get("matchExpressions") or ()}
    have = sorted(
        f"{name_of(node)}: " + (",".join(str(labels[key]) for key in keys if key in labels) or "no such label")
        for node in case.objects.all("Node")
        for labels in [dig(node, "metadata", "labels") or {}]
    )
    return f"the volume requires {'; '.join(wanted) or 'nothing'}; nodes have {'; '.join(have)}"


def no_node_for_volume(case: Case) -> Iterator[Finding]:
    terms = dig(case.pv, "spec", "nodeAffinity", "required", "nodeSelectorTerms") or ()
    nodes = case.objects.all("Node")
    if case.pv is None or not terms or not nodes or any(_fits(node, terms) for node in nodes):
        return
    yield Finding(
        f"PersistentVolume {name_of(case.pv)}",
        "no node of the cluster is in its zone",
        _places(case),
        "register the driver on nodes of that zone (docs/troubleshooting.md#a-node-is-not-registered), or"
        " delete and recreate a PersistentVolume with a wrong zone",
    )


def _fits(node: Document, terms: Sequence[Mapping[str, Any]]) -> bool:
    labels = dig(node, "metadata", "labels") or {}
    return any(
        all(
            labels.get(each["key"]) in (each.get("values") or ())
            for each in term.get("matchExpressions") or ()
            if each.get("operator") == "In"
        )
        for term in terms
    )


def no_answer_yet(case: Case) -> Iterator[Finding]:
    """A claim that the provisioner should have answered, without an event that has a reason."""
    if not case.is_pending or case.claim is None or not case.driver.pods or dig(case.claim, "spec", "volumeName"):
        return
    if is_unread(case, "events"):
        return
    is_immediate = (case.storage_class or {}).get("volumeBindingMode") == "Immediate"
    is_chosen = _SELECTED_NODE in (dig(case.claim, "metadata", "annotations") or {})
    has_answer = case.event("PersistentVolumeClaim", case.claim, "ProvisioningFailed") is not None
    if (is_immediate or is_chosen) and not has_answer:
        yield Finding(
            case.subject,
            "the provisioner has not answered yet",
            "it works on it, or no sidecar 'provisioner' is the leader",
            f"wait a minute; then kubectl -n {case.driver_namespace} get leases, and the provisioner's log",
        )


# --- the PersistentVolume --------------------------------------------------------------------------------------------


def volume_of_another_claim(case: Case) -> Iterator[Finding]:
    if case.pv is None or case.claim is None or not case.is_pending:
        return
    owner = dig(case.pv, "spec", "claimRef") or {}
    phase, uid = dig(case.pv, "status", "phase"), owner.get("uid")
    if owner.get("name") and (owner.get("namespace"), owner["name"]) != (case.namespace, case.name):
        yield Finding(
            case.subject,
            f"PersistentVolume {name_of(case.pv)} is bound to claim {owner.get('namespace')}/{owner['name']}",
            action="name another volume, or delete that claim",
        )
    elif phase in ("Released", "Failed") or (uid and uid != dig(case.claim, "metadata", "uid")):
        yield Finding(
            case.subject,
            f"PersistentVolume {name_of(case.pv)} is {phase}: it belonged to a deleted claim",
            action=f"to use its data again: kubectl patch pv {name_of(case.pv)} --type=json"
            """ -p '[{"op":"remove","path":"/spec/claimRef/uid"}]'""",
        )


def volume_is_terminating(case: Case) -> Iterator[Finding]:
    if case.pv is None or not is_terminating(case.pv):
        return
    event = case.event("PersistentVolume", case.pv, "VolumeFailedDelete")
    subject = f"PersistentVolume {name_of(case.pv)}"
    if event is not None:
        yield explained(subject, str(event.get("message")))
    else:
        yield Finding(subject, "is being deleted", action="it ends with its claim; create another claim")
