# SPDX-License-Identifier: Apache-2.0
"""`kubectl nvmesh release`: move a volume off a node that is lost.

Nothing here takes a volume from a node: Kubernetes detaches it, and the controller hands it to another node only when
the storage management reports the client of the lost node as down (docs/fencing.md). So a wrong decision of a person,
or an outdated document, never leads to two writers of a volume that one node writes to. A volume that many nodes may
write to is not fenced: its pods are not started elsewhere by this program. The checks spare a living node the deletion
of its pods.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from csi_driver.plugin.kubectl import Document, condition, dig, is_ready, is_terminating, name_of

OUT_OF_SERVICE = "node.kubernetes.io/out-of-service"
_TAINT = f"{OUT_OF_SERVICE}=nodeshutdown:NoExecute"
_FENCING = "docs/fencing.md"


@dataclass(frozen=True, slots=True)
class Plan:
    """`commands` of kubectl release the volume; without any, `is_done` or a refusal. `effects`: what else they do."""

    reason: str
    commands: tuple[tuple[str, ...], ...] = ()
    is_done: bool = False
    effects: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Facts:
    """A volume and a node. `volume`: the document of `nvmesh-csi volume show`, perhaps an error. `node_id`: in CSI."""

    node_name: str
    node: Document | None
    attachment: Document | None
    volume: Mapping[str, Any]
    node_id: str
    pods: Sequence[Document]
    is_shared: bool = False
    attach_required: bool = True
    is_complete: bool = True


def plan(facts: Facts) -> Plan:
    """Decide how the volume is released, or why it is not."""
    if not facts.is_complete or "error" in facts.volume:
        why = facts.volume.get("error", "some objects could not be read")
        return Plan(f"it is unknown whether node {facts.node_name} is lost: {why}")
    if not facts.attach_required:
        return Plan(f"this driver attaches on the nodes (--attach-by node): see {_FENCING}#flags-of-the-controller")
    if facts.node is not None and is_ready(facts.node):
        return Plan(f"node {facts.node_name} is Ready: end the pods that use the volume there")
    holders = [each for each in facts.volume["holders"] if _is_of(each, facts)]
    if facts.attachment is None and not holders:
        return Plan(f"neither Kubernetes nor the storage has the volume on node {facts.node_name}", is_done=True)
    alive = next((each for each in holders if each["clientStatus"] != "down"), None)
    if alive is not None:
        return Plan(
            f"the storage client of node {facts.node_name} is {alive['clientStatus']}: the machine runs and may write."
            " Power it off; the management then reports its client as down"
        )
    if facts.attachment is None:
        return _without_attachment(facts, holders)
    if is_terminating(facts.attachment):
        return Plan("its VolumeAttachment is being deleted: wait for the driver; kubectl nvmesh why names the reason")
    if facts.node is None:
        return _delete_attachment(facts)
    if not holders:
        return Plan(f"the storage does not have the volume on node {facts.node_name}: Kubernetes detaches it by itself")
    return _taint(facts)


def _is_of(holder: Mapping[str, Any], facts: Facts) -> bool:
    """Return whether a holder may be the node: with an unknown id every one may."""
    return facts.node_id in ("", str(holder["nodeId"]))


def _without_attachment(facts: Facts, holders: Sequence[Mapping[str, Any]]) -> Plan:
    if all(each["desired"] != "attached" for each in holders):
        return Plan("it is released there, and the client is down: the next node that needs it gets it", is_done=True)
    return Plan(
        f"Kubernetes has no VolumeAttachment for node {facts.node_name}, and the driver was never asked to detach the"
        " volume there (its finalizer was removed, or it was attached outside of Kubernetes). If the machine is off for"
        f" ever, delete its client in the management: see {_FENCING}#deleting-a-volume-of-a-node-that-died"
    )


def _taint(facts: Facts) -> Plan:
    taints = dig(facts.node, "spec", "taints") or ()
    if any(each.get("key") == OUT_OF_SERVICE for each in taints):
        return Plan(f"node {facts.node_name} is marked out of service: Kubernetes deletes its pods and detaches; wait")
    if facts.is_shared:
        return Plan(
            "many nodes may write to the volume (ReadWriteMany), so the storage does not cut the lost one off:"
            f" {_FENCING}#guarantees. Power the machine off. Then: kubectl taint nodes {facts.node_name} {_TAINT}"
        )
    return Plan(
        f"node {facts.node_name} is not Ready ({condition(facts.node or {}, 'Ready').get('message')}), and its storage"
        " client is down",
        (("taint", "nodes", facts.node_name, _TAINT),),
        effects=(
            f"all pods of node {facts.node_name} are deleted, and all its volumes are detached, also of other drivers",
            "volumes of other drivers, and those of ReadWriteMany, may then have two writers if the machine still runs",
            "do it only if the machine is off; remove the taint when it is back:",
            f"  kubectl taint nodes {facts.node_name} {OUT_OF_SERVICE}-",
        ),
    )


def _delete_attachment(facts: Facts) -> Plan:
    left = [name_of(pod) for pod in facts.pods if dig(pod, "spec", "nodeName") == facts.node_name]
    if left:
        return Plan(
            f"node {facts.node_name} does not exist, but pods of it do: {', '.join(left)}. Delete them first:"
            f" kubectl delete pod {' '.join(left)}"
        )
    return Plan(
        f"node {facts.node_name} does not exist, no pod of it does, and its storage client is down or holds nothing",
        # Never the finalizer: the driver must be asked to detach, which is the record that permits a take-over.
        (("delete", "volumeattachment", name_of(facts.attachment or {}), "--wait=false"),),
    )


def show(found: Plan) -> Iterator[str]:
    yield found.reason
    yield from (f"  {effect}" for effect in found.effects)
    yield from (f"  kubectl {' '.join(command)}" for command in found.commands)
