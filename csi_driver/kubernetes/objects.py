"""What this driver reads of the API server's objects: pure functions of decoded JSON. What is not there is empty."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

_DRAIN_TAINTS = frozenset(
    {
        "node.kubernetes.io/unschedulable",  # cordoned
        "ToBeDeletedByClusterAutoscaler",
        "karpenter.sh/disrupted",
        "karpenter.sh/disruption",  # before its version 1
    }
)
# kubelet's words while it ends the pods of a machine that shuts down (pkg/kubelet/nodeshutdown).
_SHUTTING_DOWN = "node is shutting down"


@dataclass(frozen=True, slots=True)
class Node:
    """A node object. `taints` are kept as they came, whatever fields they have.

    `volumes`: what the control plane attached to it, and what its kubelet uses, each once: `kubernetes.io/csi/...`.
    """

    name: str
    unschedulable: bool = False
    is_being_deleted: bool = False
    is_shutting_down: bool = False
    taints: tuple[Mapping[str, object], ...] = ()
    volumes: tuple[str, ...] = ()

    def has_taint(self, key: str) -> bool:
        """Tell whether it has a taint with this key, of any effect."""
        return any(taint.get("key") == key for taint in self.taints)

    def why_draining(self) -> str:
        """Tell why its pods leave it for good; empty where they do not."""
        if self.is_being_deleted:
            return "it is being deleted"
        if self.unschedulable:
            return "it is cordoned"
        if self.is_shutting_down:
            return "it is shutting down"
        key = next((str(taint.get("key")) for taint in self.taints if taint.get("key") in _DRAIN_TAINTS), "")
        return f"it has the taint {key}" if key else ""

    def handles(self, driver_name: str) -> frozenset[str]:
        """Return the handles of a driver's volumes that are attached to it or in use on it."""
        prefix = f"kubernetes.io/csi/{driver_name}^"
        return frozenset(name.removeprefix(prefix) for name in self.volumes if name.startswith(prefix))


def node_in(document: Mapping[str, object]) -> Node:
    """Read a Node."""
    metadata, spec, status = (_mapping(document.get(key)) for key in ("metadata", "spec", "status"))
    attached = (_mapping(volume).get("name") for volume in _list(status.get("volumesAttached")))
    conditions = map(_mapping, _list(status.get("conditions")))
    said = (str(condition.get("message")) for condition in conditions if condition.get("type") == "Ready")
    return Node(
        name=str(metadata.get("name", "")),
        unschedulable=spec.get("unschedulable") is True,
        is_being_deleted=metadata.get("deletionTimestamp") is not None,
        is_shutting_down=any(_SHUTTING_DOWN in message for message in said),
        taints=tuple(map(_mapping, _list(spec.get("taints")))),
        volumes=tuple(dict.fromkeys(str(name) for name in (*attached, *_list(status.get("volumesInUse"))))),
    )


def plugins_in(document: Mapping[str, object]) -> Mapping[str, str]:
    """Read a CSINode: the drivers that its kubelet has registered, each with the id it gave the node."""
    return dict(_plugins(document))


def _plugins(document: Mapping[str, object]) -> Iterator[tuple[str, str]]:
    for driver in map(_mapping, _list(_mapping(document.get("spec")).get("drivers"))):
        name, node_id = driver.get("name"), driver.get("nodeID")
        if isinstance(name, str) and isinstance(node_id, str):
            yield name, node_id


def attachment_name(handle: str, driver_name: str, node_name: str) -> str:
    """Return the name of the VolumeAttachment of a volume (pkg/volume/csi/csi_attacher.go, getAttachmentName)."""
    return "csi-" + hashlib.sha256(f"{handle}{driver_name}{node_name}".encode()).hexdigest()


def _mapping(value: object) -> Mapping[str, object]:
    return value if isinstance(value, dict) else {}


def _list(value: object) -> Sequence[object]:
    return value if isinstance(value, list) else ()
