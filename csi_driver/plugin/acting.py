# SPDX-License-Identifier: Apache-2.0
"""Commands on one volume: its holders, the data that a format would destroy, whether its node is lost."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from csi_driver.errors import DriverError, NotFound, PreconditionFailed
from csi_driver.plugin.kubectl import Document, Driver, Kubectl, Objects, dig, name_of
from csi_driver.plugin.lost_nodes import Facts
from csi_driver.plugin.volumes import attachments_of, node_ids, pods_by_claim, size

_POD_OF_A_MOUNT = re.compile(r"/pods/([0-9a-f-]{36})/|/publish/[^/]+/([0-9a-f-]{36})")
_NODE_ID = "csi.alpha.kubernetes.io/node-id"


@dataclass(slots=True)
class Target:
    """A volume, and its objects."""

    kubectl: Kubectl
    driver: Driver
    objects: Objects
    handle: str
    pv: Document | None

    @classmethod
    def find(cls, kubectl: Kubectl, name: str, namespace: str) -> Target:
        """Find a volume by the name of a claim, else of a PersistentVolume, else by its handle."""
        objects = kubectl.get("persistentvolumes,volumeattachments,csinodes,nodes,csidrivers")
        objects += kubectl.get("persistentvolumeclaims,pods", "-n", namespace)
        claim = objects.one("PersistentVolumeClaim", name)
        pv = objects.one("PersistentVolume", dig(claim, "spec", "volumeName") or (name if claim is None else ""))
        if claim is not None and pv is None:
            raise NotFound(f"claim {namespace}/{name} has no PersistentVolume: kubectl nvmesh why {name} explains it")
        if pv is None:
            pv = next((each for each in objects.all("PersistentVolume") if _handle(each) == name), None)
        if pv is None and ":" not in name:
            reason = f"{name} is neither a claim in namespace {namespace}, nor a PersistentVolume, nor a handle"
            raise NotFound("; ".join([reason, *objects.gaps]))
        driver = Driver.find(kubectl)
        if pv is not None:
            driver = driver.named(str(dig(pv, "spec", "csi", "driver")))
            if not driver.pods:
                raise driver.none(f"the driver of PersistentVolume {name_of(pv)}")
            owner = str(dig(pv, "spec", "claimRef", "namespace") or namespace)
            objects += kubectl.get("pods", "-n", owner) if owner != namespace else Objects()
        return cls(kubectl, driver, objects, _handle(pv) or name, pv)

    @property
    def attachments(self) -> Sequence[Document]:
        return attachments_of(self.objects, self.pv)

    @property
    def pods(self) -> Sequence[Document]:
        """The pods that use the claim of the volume."""
        owner = dig(self.pv, "spec", "claimRef") or {}
        key = str(owner.get("namespace")), str(owner.get("name"))
        return pods_by_claim(self.objects.all("Pod")).get(key, [])

    def facts(self, node_name: str) -> Facts:
        ids = {name: node_id for node_id, name in node_ids(self.objects, self.driver.name()).items()}
        attachment = next((each for each in self.attachments if dig(each, "spec", "nodeName") == node_name), None)
        recorded = dig(attachment, "metadata", "annotations", _NODE_ID)
        csi_driver = self.objects.one("CSIDriver", self.driver.name())
        return Facts(
            node_name=node_name,
            node=self.objects.one("Node", node_name),
            attachment=attachment,
            volume=self.driver.volume("show", self.handle),
            node_id=ids.get(node_name) or str(recorded or ""),
            pods=self.pods,
            is_shared="ReadWriteMany" in (dig(self.pv, "spec", "accessModes") or ()),
            attach_required=dig(csi_driver, "spec", "attachRequired") is not False,
            is_complete=not self.objects.gaps,
        )


def _handle(pv: Document | None) -> str:
    return str(dig(pv, "spec", "csi", "volumeHandle") or "")


# --- holders ----------------------------------------------------------------------------------------------------


def holders(target: Target) -> dict[str, Any]:
    """Return who holds the volume: by the storage, by Kubernetes, and on each node what uses its device."""
    volume = target.driver.volume("show", target.handle)
    if "error" in volume:
        raise PreconditionFailed(str(volume["error"]))
    names = node_ids(target.objects, target.driver.name())
    nodes = {str(dig(each, "spec", "nodeName")) for each in target.attachments}
    nodes |= {names[each["nodeId"]] for each in volume["holders"] if each["nodeId"] in names}
    return {
        "handle": target.handle,
        "reservation": volume["reservation"],
        "storage": volume["holders"],
        "attachments": [
            {"node": dig(each, "spec", "nodeName"), "attached": bool(dig(each, "status", "attached"))}
            for each in target.attachments
        ],
        "nodes": {name: _on_node(target, name) for name in sorted(nodes)},
    }


def _on_node(target: Target, node: str) -> dict[str, Any]:
    try:
        found = target.driver.volume("holders", target.handle, component="node", node=node)
    except DriverError as error:
        return {"error": str(error)}
    pods = {str(dig(pod, "metadata", "uid")): f"{dig(pod, 'metadata', 'namespace')}/{name_of(pod)}"
            for pod in target.objects.all("Pod")}  # fmt: skip
    uids = [uid for path in found.get("mounts", ()) for match in _POD_OF_A_MOUNT.finditer(path)
            for uid in match.groups() if uid]  # fmt: skip
    return {**found, "pods": sorted({pods.get(uid, f"uid {uid} (of another namespace, or gone)") for uid in uids})}


def describe(found: Mapping[str, Any]) -> Iterator[str]:
    reservation = found["reservation"]
    owner = f" by {reservation['reservedBy']}" if reservation["reservedBy"] else ""
    yield f"volume {found['handle']}"
    yield f"reservation: {reservation['mode']}{owner}, version {reservation['version']}"
    for each in found["storage"]:
        state = f"client {each['clientStatus']}, to be {each['desired']}, device {each['device'] or 'not reported'}"
        yield f"storage: held by {each['client']}: {state}"
    for each in found["attachments"]:
        yield f"Kubernetes: {'attached' if each['attached'] else 'not attached'} to node {each['node']}"
    for name, users in found["nodes"].items():
        if "error" in users:
            yield f"node {name}: {users['error']}"
            continue
        opens = "unknown" if users["opens"] is None else users["opens"]
        yield f"node {name}: device {users['device'] or 'none'}, opened {opens} times"
        yield from (f"  pod {pod}" for pod in users["pods"])
        yield from (f"  mount {path}" for path in users["mounts"])
        yield from (f"  process {each['pid']} ({each['command']}): {each['file']}" for each in users["processes"])
        yield from (f"  client: {line}" for line in users["clientProcesses"])
    if not found["storage"] and not found["attachments"]:
        yield "no node holds it"


# --- allow-format -----------------------------------------------------------------------------------------------


def loss(target: Target, volume: Mapping[str, Any]) -> Iterator[str]:
    """Yield the data that a format would destroy. Raises `PreconditionFailed` while pods use the volume."""
    if "error" in volume:
        raise PreconditionFailed(str(volume["error"]))
    if target.pods:
        names = ", ".join(name_of(pod) for pod in target.pods)
        raise PreconditionFailed(f"pods use the volume: {names}; delete them first")
    unread = [gap for gap in target.objects.gaps if "pods" in gap or "persistentvolume" in gap]
    if unread:
        raise PreconditionFailed(f"it is unknown whether pods use the volume: {'; '.join(unread)}")
    owner = dig(target.pv, "spec", "claimRef") or {}
    yield f"claim {owner.get('namespace')}/{owner.get('name')}" if owner else "no claim"
    yield f"volume {volume['handle']}, {size(volume['usableBytes'])}, CSI name {volume['csiName'] or 'none'}"
    yield f"  made for {volume['madeFor'] or 'an unknown filesystem'}; attachments: {volume['attachments']}"
    yield f"  it is formatted {volume['formatting']}"
    yield "The next attachment may format it over ALL data that is on it now. Nothing brings it back."
