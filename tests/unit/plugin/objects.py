# SPDX-License-Identifier: Apache-2.0
"""Documents as Kubernetes 1.37 and `nvmesh-csi volume` give them, without fields that the plugin does not read."""

from __future__ import annotations

from typing import Any

from csi_driver.model import DEFAULT_DRIVER_NAME, DEFAULT_TOPOLOGY_KEY

Document = dict[str, Any]
DRIVER, ZONE_KEY = DEFAULT_DRIVER_NAME, DEFAULT_TOPOLOGY_KEY
UUID = "11111111-2222-3333-4444-555555555555"
HANDLE = f"zone-a:csi-1:{UUID}:default"
NODE_ID = "aaaaaaaa-2222-3333-4444-555555555555"


def made(kind: str, name: str, namespace: str = "", /, **more: Any) -> Document:
    metadata = {"name": name, "uid": f"uid-{name}", **({"namespace": namespace} if namespace else {})}
    return {"kind": kind, "metadata": {**metadata, **more.pop("metadata", {})}, **more}


def claim(name: str = "data", *, phase: str = "Bound", namespace: str = "default", **spec: Any) -> Document:
    own = {
        "accessModes": ["ReadWriteOnce"],
        "resources": {"requests": {"storage": "10Gi"}},
        "storageClassName": "nvmesh",
        "volumeMode": "Filesystem",
        **({"volumeName": "pvc-1"} if phase == "Bound" else {}),
        **spec,
    }
    status = {"phase": phase, **({"capacity": {"storage": "10Gi"}} if phase == "Bound" else {})}
    own = {key: value for key, value in own.items() if value is not None}
    return made("PersistentVolumeClaim", name, namespace, spec=own, status=status)


def volume_of_claim(name: str = "pvc-1", *, handle: str = HANDLE, claim_name: str = "data", **status: Any) -> Document:
    required = {
        "nodeSelectorTerms": [{"matchExpressions": [{"key": ZONE_KEY, "operator": "In", "values": ["zone-a"]}]}]
    }
    spec = {
        "csi": {"driver": DRIVER, "volumeHandle": handle, "fsType": "ext4"},
        "claimRef": {"namespace": "default", "name": claim_name, "uid": f"uid-{claim_name}"},
        "storageClassName": "nvmesh",
        "persistentVolumeReclaimPolicy": "Delete",
        "nodeAffinity": {"required": required},
    }
    return made("PersistentVolume", name, spec=spec, status={"phase": "Bound", **status})


def storage_class(
    name: str = "nvmesh", *, provisioner: str = DRIVER, binding: str = "Immediate", **more: Any
) -> Document:
    return made("StorageClass", name, provisioner=provisioner, volumeBindingMode=binding, parameters={}, **more)


def pod(
    name: str = "web", *, claim_name: str = "data", node: str = "node-1", phase: str = "Running", **status: Any
) -> Document:
    spec: Document = {
        "containers": [{"name": "main", "image": "busybox"}],
        "volumes": [{"name": "data", "persistentVolumeClaim": {"claimName": claim_name}}],
    }
    if node:
        spec["nodeName"] = node
    is_up = "True" if phase == "Running" else "False"
    conditions = [{"type": "PodScheduled", "status": "True" if node else "False"}, {"type": "Ready", "status": is_up}]
    return made("Pod", name, "default", spec=spec, status={"phase": phase, "conditions": conditions, **status})


def node(name: str = "node-1", *, ready: str = "True", **spec: Any) -> Document:
    labels = {"kubernetes.io/hostname": name, ZONE_KEY: "zone-a"}
    conditions = [{"type": "Ready", "status": ready, "message": "kubelet stopped posting node status."}]
    return made("Node", name, metadata={"labels": labels}, spec=spec, status={"conditions": conditions})


def csi_node(name: str = "node-1", node_id: str = NODE_ID, *, count: int | None = None, **more: Any) -> Document:
    entry: Document = {"name": DRIVER, "nodeID": node_id, "topologyKeys": [ZONE_KEY]}
    entry |= {"allocatable": {"count": count}} if count is not None else {}
    return made("CSINode", name, spec={"drivers": [entry]}, **more)


def attachment(node_name: str = "node-1", pv: str = "pvc-1", *, attached: bool = True, **more: Any) -> Document:
    spec = {"attacher": DRIVER, "nodeName": node_name, "source": {"persistentVolumeName": pv}}
    status = {"attached": attached, **more.pop("status", {})}
    return made("VolumeAttachment", f"csi-{node_name}-{pv}", spec=spec, status=status, **more)


def driver_pod(
    component: str, name: str = "", *, node_name: str = "node-1", ready: bool = True, **status: Any
) -> Document:
    labels = {"app.kubernetes.io/part-of": "nvmesh-csi", "app.kubernetes.io/component": component}
    labels["app.kubernetes.io/instance"] = "nvmesh-csi"
    containers = [{"name": "driver", "args": [component, f"--driver-name={DRIVER}"]}]
    conditions = [{"type": "Ready", "status": str(ready)}]
    return made(
        "Pod",
        name or f"nvmesh-csi-{component}-{node_name}",
        "nvmesh-csi",
        metadata={"labels": labels},
        spec={"nodeName": node_name, "containers": containers},
        status={"phase": "Running", "conditions": conditions, **status},
    )


def event(kind: str, name: str, reason: str, message: str, *, when: str = "2026-11-29T06:00:00Z") -> Document:
    involved = {"kind": kind, "name": name, "namespace": "default", "uid": f"uid-{name}"}
    return made(
        "Event", f"{name}.1", "default", involvedObject=involved, reason=reason, message=message, type="Warning",
        lastTimestamp=when,
    )  # fmt: skip


def stored(name: str = "csi-1", uuid: str = UUID, *, handle: str = HANDLE, **more: Any) -> Document:
    return {
        "handle": handle, "zone": "zone-a", "name": name, "uuid": uuid, "csiName": "pvc-1", "source": None,
        "bytes": 10 << 30, "usableBytes": 10 << 30, "status": "online", "health": "healthy", "action": "none",
        "faults": [], "holders": [], **more,
    }  # fmt: skip


def holder(
    client: str = "node-1",
    node_id: str = NODE_ID,
    *,
    status: str = "ready",
    desired: str = "attached",
    on_demand: bool = False,
) -> Document:
    return {
        "client": client, "nodeId": node_id, "clientStatus": status, "connectsOnDemand": on_demand, "desired": desired,
        "device": "attached", "ioEnabled": True,
    }  # fmt: skip


def cut(name: str, volume_uuid: str = UUID, **more: Any) -> Document:
    return {
        "id": f"zone-a:{name}:{UUID}", "zone": "zone-a", "name": name, "uuid": UUID, "volume": "csi-1",
        "volumeUuid": volume_uuid, "volumeHandle": HANDLE, "bytes": 10 << 30, "created": "2026-11-29T05:00:00+00:00",
        "ready": True, "group": "", **more,
    }  # fmt: skip
