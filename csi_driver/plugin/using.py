# SPDX-License-Identifier: Apache-2.0
"""Problems of a volume in use. Each function looks at the documents of a case alone."""

from __future__ import annotations

import re
from collections.abc import Iterator

from csi_driver.plugin.cases import (
    MOUNTING,
    Case,
    Finding,
    explained,
    is_running,
    is_unread,
    pod_state,
    quantity_bytes,
    statuses,
    waits_for_volume,
)
from csi_driver.plugin.kubectl import condition, dig, is_ready, is_terminating, name_of
from csi_driver.plugin.lost_nodes import OUT_OF_SERVICE
from csi_driver.plugin.volumes import node_ids

_OF_THE_VOLUME = re.compile(r'(?:failed for volume|for volume|volume) "([^"]+)"')
_MOUNT_EVENTS = ("FailedMount", "FailedMapVolume", "FailedAttachVolume")


# --- the storage -----------------------------------------------------------------------------------------------------


def storage_error(case: Case) -> Iterator[Finding]:
    if case.silence:
        yield Finding("storage", case.silence, "the state of the volume in the storage is unknown", is_wrong=False)
    if case.volume is not None and "error" in case.volume:
        handle = dig(case.pv, "spec", "csi", "volumeHandle")
        yield explained(f"volume {handle}", str(case.volume["error"]))


def storage_faults(case: Case) -> Iterator[Finding]:
    if case.volume is None or "error" in case.volume:
        return
    subject = f"volume {case.volume['name']}"
    for fault in case.volume["faults"]:
        if fault["reason"] == "NodeDown":
            continue  # `lost_node` has the action
        yield Finding(
            subject,
            f"{fault['reason']}: {fault['message']}",
            "docs/health.md explains the reason",
            "look at the volume in the management; for a lost file of the embedded manager see"
            " docs/troubleshooting.md#attaching",
        )


def lost_node(case: Case) -> Iterator[Finding]:
    """The storage client of a node that holds the volume is down."""
    names = node_ids(case.objects, case.driver_name)
    for each in (case.volume or {}).get("holders", ()):
        if each["clientStatus"] != "down":
            continue
        name = names.get(each["nodeId"], each["client"])
        node = case.node(name)
        is_up = node is not None and is_ready(node)
        state = "Ready" if is_up else "not Ready" if node else "not in the cluster"
        if node is None and is_unread(case, "node"):
            state = "unknown"
        lost, action = (
            "whose storage client is down",
            f"start the storage client on {name}: systemctl status nvmeshclient",
        )
        if each.get("connectsOnDemand"):
            lost, action = "which has no connection to it", "check the network to the storage: kubectl nvmesh doctor"
        if not is_up:
            action = f"if the node does not come back: kubectl nvmesh release {case.name or 'CLAIM'} --node {name}"
        yield Finding(
            f"volume {case.volume['name'] if case.volume else ''}",
            f"is held by node {name}, {lost}",
            f"the node is {state}; see docs/fencing.md",
            action,
        )


def held_by_hand(case: Case) -> Iterator[Finding]:
    """Held by a client for which Kubernetes has no VolumeAttachment, while a pod waits for the volume."""
    if not any(waits_for_volume(pod) for pod in case.pods) or "ReadWriteMany" in case.modes:
        return
    if is_unread(case, "volumeattachment"):
        return
    names = node_ids(case.objects, case.driver_name)
    attached = {str(dig(each, "spec", "nodeName")) for each in case.attachments}
    for each in (case.volume or {}).get("holders", ()):
        name = names.get(each["nodeId"], each["client"])
        if each["clientStatus"] != "down" and name not in attached:
            state = "being detached there" if each["desired"] == "detaching" else "attached outside of Kubernetes"
            yield Finding(
                f"volume {case.volume['name'] if case.volume else ''}",
                f"is held by {name}, and Kubernetes has no VolumeAttachment for it",
                f"it is {state}",
                f"kubectl nvmesh holders {case.name} shows what uses it there; end that, then detach it in the"
                " management",
            )


# --- attaching -------------------------------------------------------------------------------------------------------


def node_is_down(case: Case) -> Iterator[Finding]:
    for name in case.nodes():
        node = case.node(name)
        if node is None and not is_unread(case, "node"):
            yield Finding(
                f"node {name}",
                "does not exist any more, and pods of the claim are bound to it",
                action=f"kubectl delete pod of that node; then kubectl nvmesh release {case.name} --node {name}",
            )
        elif node is not None and not is_ready(node):
            ready = condition(node, "Ready")
            is_marked = any(each.get("key") == OUT_OF_SERVICE for each in dig(node, "spec", "taints") or ())
            yield Finding(
                f"node {name}",
                f"is not Ready: {ready.get('message') or ready.get('status')}",
                "it is marked out of service: its pods are deleted and its volumes detached"
                if is_marked
                else "its pods stay Terminating and its volumes attached until it is back or marked",
                "wait"
                if is_marked
                else f"if it is dead: kubectl nvmesh release {case.name or 'CLAIM'} --node {name}, which checks before"
                " it marks the node; see docs/fencing.md#steps-for-an-administrator",
            )


def node_is_not_registered(case: Case) -> Iterator[Finding]:
    if case.claim is None or not case.driver.pods or is_unread(case, "csinode"):
        return
    registered = set(node_ids(case.objects, case.driver_name).values())
    for name in case.nodes():
        pods = list(case.driver.of("node", name))
        reason = "; ".join(f"{name_of(pod)}: {pod_state(pod)}" for pod in pods) or "no pod of the driver runs there"
        action = "see docs/troubleshooting.md#a-node-is-not-registered"
        if not pods:
            action = "check nodeSelector, affinity and tolerations of the DaemonSet (values of node); " + action
        if name not in registered:
            yield Finding(f"node {name}", f"driver {case.driver_name} is not registered there", reason, action)
        elif not any(is_ready(pod) for pod in pods):
            yield Finding(
                f"node {name}",
                "the driver's pod there is not ready: no volume can be mounted or unmounted",
                reason,
                f"kubectl -n {case.driver_namespace} logs POD -c driver; " + action,
            )


def volume_limit(case: Case) -> Iterator[Finding]:
    for name in case.nodes(waiting=True):
        drivers = dig(case.objects.one("CSINode", name), "spec", "drivers") or ()
        limit = next((dig(each, "allocatable", "count") for each in drivers if each["name"] == case.driver_name), None)
        used = [
            each
            for each in case.objects.all("VolumeAttachment")
            if dig(each, "spec", "nodeName") == name and dig(each, "spec", "attacher") == case.driver_name
        ]
        own = [each for each in case.attachments if dig(each, "spec", "nodeName") == name]
        if limit and len(used) - len(own) >= limit:
            yield Finding(
                f"node {name}",
                f"has its maximum of {limit} volumes",
                action="use another node, or raise maxVolumesPerNode",
            )


def attached_elsewhere(case: Case) -> Iterator[Finding]:
    if {"ReadWriteMany", "ReadOnlyMany"} & set(case.modes):
        return
    wanted = set(case.nodes(waiting=True))
    for each in case.attachments:
        name = str(dig(each, "spec", "nodeName"))
        if not wanted or name in wanted or dig(each, "status", "detachError"):
            continue
        users = [name_of(pod) for pod in case.users if dig(pod, "spec", "nodeName") == name]
        node = case.node(name)
        is_down = not is_ready(node) if node is not None else not is_unread(case, "node")
        action = f"end {', '.join(users)}" if users else "wait: Kubernetes detaches it when the pod there has ended"
        if is_down:
            action = f"kubectl nvmesh release {case.name} --node {name}"
        yield Finding(
            case.subject,
            f"is attached to node {name}, and its pod is on {', '.join(sorted(wanted))}",
            f"pods there: {', '.join(users) or 'none'}; the node is {'not Ready' if is_down else 'Ready'}",
            action,
        )


def attachment_errors(case: Case) -> Iterator[Finding]:
    for each in case.attachments:
        for kind, verb in (("attachError", "attach to"), ("detachError", "detach from")):
            message = dig(each, "status", kind, "message")
            if message and (kind == "detachError" or not dig(each, "status", "attached")):
                yield explained(f"{verb} node {dig(each, 'spec', 'nodeName')}", str(message))


def not_attached(case: Case) -> Iterator[Finding]:
    for pod in case.pods if not is_unread(case, "volumeattachment") else ():
        name = dig(pod, "spec", "nodeName")
        if case.pv is None or not name or not waits_for_volume(pod):
            continue
        own = [each for each in case.attachments if dig(each, "spec", "nodeName") == name]
        driver = case.objects.one("CSIDriver", case.driver_name)
        if not own and dig(driver, "spec", "attachRequired") is not False:
            event = case.event("Pod", pod, "FailedAttachVolume")
            reason = str(event.get("message")) if event is not None else ""
            yield Finding(
                f"pod {name_of(pod)}",
                f"its volume has no VolumeAttachment for node {name}",
                reason,
                "the attach-detach controller waits, usually for another node's detachment: see the lines"
                " above, and the pod's events",
            )
        elif own and not dig(own[0], "status", "attached") and not dig(own[0], "status", "attachError"):
            yield Finding(
                f"attach to node {name}",
                "the driver has not answered yet",
                action=f"kubectl -n {case.driver_namespace} logs deploy/nvmesh-csi-controller -c driver",
            )


# --- mounting --------------------------------------------------------------------------------------------------------


def not_mounted(case: Case) -> Iterator[Finding]:
    for pod in case.pods:
        if not waits_for_volume(pod):
            continue
        event = case.event("Pod", pod, *_MOUNT_EVENTS)
        message = str(event.get("message")) if event is not None else ""
        named = _OF_THE_VOLUME.search(message)
        own = {name_of(case.pv)} if case.pv is not None else set()
        if named and named[1] not in own and own:
            yield Finding(
                f"pod {case.namespace}/{name_of(pod)}",
                message,
                "this is another volume of the pod",
                "correct that volume; this driver's is not the cause",
            )
        elif message:
            yield explained(f"mount for pod {case.namespace}/{name_of(pod)}", message)


def container_fails(case: Case) -> Iterator[Finding]:
    for pod in case.pods:
        if waits_for_volume(pod) or not dig(pod, "spec", "nodeName"):
            continue
        for each in statuses(pod):
            waiting = dig(each, "state", "waiting") or {}
            if waiting.get("reason", "") not in MOUNTING:
                yield Finding(
                    f"pod {case.namespace}/{name_of(pod)}",
                    f"container {each.get('name')}: {waiting['reason']}",
                    f"its volumes are mounted; {waiting.get('message', '')}",
                    f"kubectl -n {case.namespace} logs {name_of(pod)} -c {each.get('name')} --previous",
                )


def stuck_pod(case: Case) -> Iterator[Finding]:
    for pod in case.pods:
        name = dig(pod, "spec", "nodeName")
        if not is_terminating(pod) or not name or any(is_running(each) for each in statuses(pod)):
            continue
        node = case.node(str(name))
        if node is not None and is_ready(node):
            event = case.event("Pod", pod, "FailedKillPod", "FailedUnmount", "FailedUnMount", "FailedPreStopHook")
            yield Finding(
                f"pod {case.namespace}/{name_of(pod)}",
                "is being deleted, and its containers have ended",
                str(event.get("message")) if event is not None else "a mount may hang",
                f"see docs/troubleshooting.md#a-pod-or-claim-is-stuck-terminating, and the log of the driver's pod"
                f" on {name}",
            )


# --- changes of a bound claim ----------------------------------------------------------------------------------------


def not_expanded(case: Case) -> Iterator[Finding]:
    if case.claim is None or case.is_pending:
        return
    wanted, given = (
        dig(case.claim, "spec", "resources", "requests", "storage"),
        dig(case.claim, "status", "capacity", "storage"),
    )
    if quantity_bytes(wanted) <= quantity_bytes(given):
        return
    subject, event = (
        case.subject,
        case.event("PersistentVolumeClaim", case.claim, "VolumeResizeFailed", "FileSystemResizeFailed"),
    )
    state = (dig(case.claim, "status", "allocatedResourceStatuses") or {}).get("storage", "")
    if case.storage_class is not None and not case.storage_class.get("allowVolumeExpansion"):
        yield Finding(
            subject,
            f"{wanted} are requested, it has {given}, and its class allows no expansion",
            action="set allowVolumeExpansion: true in the class",
        )
    elif event is not None and state != "NodeResizePending":
        yield explained(subject, str(event.get("message")), reason=f"expansion from {given} to {wanted}")
    elif condition(case.claim, "FileSystemResizePending").get("status") == "True" or state == "NodeResizePending":
        yield Finding(
            subject,
            f"its volume has {wanted}, and its filesystem grows at the next mount",
            action="start a pod that uses it; a running pod's filesystem grows within minutes",
        )
    else:
        yield Finding(
            subject,
            f"{wanted} are requested, and it has {given}",
            f"state {state or 'not begun'}",
            f"wait; then see the resizer's log: kubectl -n {case.driver_namespace} logs deploy/nvmesh-csi-controller"
            " -c resizer",
        )


def not_modified(case: Case) -> Iterator[Finding]:
    modify = dig(case.claim, "status", "modifyVolumeStatus") or {}
    if not modify or case.claim is None:
        return
    event = case.event("PersistentVolumeClaim", case.claim, "VolumeModifyFailed")
    target, state = modify.get("targetVolumeAttributesClassName"), modify.get("status")
    text = f"VolumeAttributesClass {target} is not applied: {state}"
    if event is not None:
        yield explained(case.subject, str(event.get("message")), reason=text)
    else:
        yield Finding(case.subject, text, action=f"does the class exist? kubectl get volumeattributesclass {target}")


def told_by_the_driver(case: Case) -> Iterator[Finding]:
    """Warnings that the driver itself recorded on claim, pods or volume; the newest of each object."""
    if not case.driver.pods:
        return
    objects = [
        ("PersistentVolumeClaim", case.claim),
        ("PersistentVolume", case.pv),
        *(("Pod", pod) for pod in case.pods),
    ]
    for kind, document in objects:
        event = case.event(kind, document, by=case.driver_name) if document is not None else None
        if event is not None:
            yield explained(f"{kind} {name_of(document or {})} ({event.get('reason')})", str(event.get("message")))


def unread(case: Case) -> Iterator[Finding]:
    for gap in (*case.objects.gaps, *case.driver.gaps):
        yield Finding("kubectl", gap, "this part could not be looked at", is_wrong=False)
