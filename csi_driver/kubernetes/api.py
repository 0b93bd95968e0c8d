# SPDX-License-Identifier: Apache-2.0
"""Client of the Kubernetes API server: nodes, CSINodes, VolumeAttachments and Events.

Token and CA certificate are read for each request: kubelet replaces the token about once an hour. Each request has a
connection of its own, because requests are rare.
"""

from __future__ import annotations

import contextlib
import hashlib
import http.client
import json
import ssl
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from urllib.parse import quote

from csi_driver.errors import StorageUnavailable, shown
from csi_driver.settings import ApiSettings

_ANSWER_LIMIT_BYTES = 16 << 20
# RFC 7386: a label that is null is removed.
_MERGE_PATCH = "application/merge-patch+json"
# RFC 6902: all operations are applied, or none where a test fails.
_JSON_PATCH = "application/json-patch+json"
_CONFLICT = (http.client.CONFLICT, http.client.UNPROCESSABLE_ENTITY)
# Answered from the server's cache, which may lag (Kubernetes API concepts, "Resource versions").
_CACHED = "?resourceVersion=0"
_DRAIN_TAINTS = frozenset(
    {
        "node.kubernetes.io/unschedulable",  # cordoned
        "ToBeDeletedByClusterAutoscaler",
        "karpenter.sh/disrupted",
        "karpenter.sh/disruption",  # before its version 1
    }
)
# kubelet's condition message while the machine shuts down (pkg/kubelet/nodeshutdown).
_SHUTTING_DOWN = "node is shutting down"


class ApiFailed(StorageUnavailable):
    """A request to the API server failed; `status` is the HTTP status, None where no response came."""

    def __init__(self, what: str, reason: str, status: int | None = None) -> None:
        self.status = status
        super().__init__(f"Kubernetes API server: cannot {what}: {reason}")


class Conflict(ApiFailed):
    """The object was changed concurrently, or the change is invalid; nothing was written."""


@dataclass(frozen=True, slots=True)
class Node:
    """A Node. `taints` keep all their fields; `volumes` are names like `kubernetes.io/csi/DRIVER^HANDLE`."""

    name: str
    unschedulable: bool = False
    is_being_deleted: bool = False
    is_shutting_down: bool = False
    taints: tuple[Mapping[str, object], ...] = ()
    volumes: tuple[str, ...] = ()

    def has_taint(self, key: str) -> bool:
        return any(taint.get("key") == key for taint in self.taints)

    def why_draining(self) -> str:
        """Return why pods leave this node; "" where it is not being drained."""
        if self.is_being_deleted:
            return "it is being deleted"
        if self.unschedulable:
            return "it is cordoned"
        if self.is_shutting_down:
            return "it is shutting down"
        key = next((str(taint.get("key")) for taint in self.taints if taint.get("key") in _DRAIN_TAINTS), "")
        return f"it has the taint {key}" if key else ""

    def handles(self, driver_name: str) -> frozenset[str]:
        prefix = f"kubernetes.io/csi/{driver_name}^"
        return frozenset(name.removeprefix(prefix) for name in self.volumes if name.startswith(prefix))


def decode_node(document: Mapping[str, object]) -> Node:
    metadata, spec, status = (_mapping(document.get(key)) for key in ("metadata", "spec", "status"))
    attached = (_mapping(volume).get("name") for volume in _list(status.get("volumesAttached")))
    conditions = map(_mapping, _list(status.get("conditions")))
    messages = (str(condition.get("message")) for condition in conditions if condition.get("type") == "Ready")
    return Node(
        name=str(metadata.get("name", "")),
        unschedulable=spec.get("unschedulable") is True,
        is_being_deleted=metadata.get("deletionTimestamp") is not None,
        is_shutting_down=any(_SHUTTING_DOWN in message for message in messages),
        taints=tuple(map(_mapping, _list(spec.get("taints")))),
        volumes=tuple(dict.fromkeys(str(name) for name in (*attached, *_list(status.get("volumesInUse"))))),
    )


def decode_node_ids(document: Mapping[str, object]) -> Mapping[str, str]:
    drivers = map(_mapping, _list(_mapping(document.get("spec")).get("drivers")))
    pairs = ((driver.get("name"), driver.get("nodeID")) for driver in drivers)
    return {name: node_id for name, node_id in pairs if isinstance(name, str) and isinstance(node_id, str)}


def attachment_name(handle: str, driver_name: str, node_name: str) -> str:
    """Return the name of a volume's VolumeAttachment (pkg/volume/csi/csi_attacher.go, getAttachmentName)."""
    return "csi-" + hashlib.sha256(f"{handle}{driver_name}{node_name}".encode()).hexdigest()


def _mapping(value: object) -> Mapping[str, object]:
    return value if isinstance(value, dict) else {}


def _list(value: object) -> Sequence[object]:
    return value if isinstance(value, list) else ()


@dataclass(slots=True)
class ApiServer:
    """The API server of the cluster that this pod runs in. Each method raises `ApiFailed`."""

    settings: ApiSettings

    def node(self, name: str) -> Node | None:
        found = self._get(f"{_node_path(name)}{_CACHED}", f"get node {shown(name)}")
        return decode_node(found) if found is not None else None

    def label_node(self, name: str, labels: Mapping[str, str | None]) -> None:
        """Set labels of a node, or remove those with the value None. Needs the right to patch nodes."""
        change = {"metadata": {"labels": dict(labels)}}
        self._request("PATCH", _node_path(name), f"label node {shown(name)}", change, _MERGE_PATCH)

    def set_taints(self, node: Node, taints: Sequence[Mapping[str, object]]) -> None:
        """Replace the taints of a node. Raises `Conflict` where they are no longer those of `node`."""
        what = f"change the taints of node {shown(node.name)}"
        change = [
            {"op": "test", "path": "/spec/taints", "value": [dict(taint) for taint in node.taints]},
            {"op": "replace", "path": "/spec/taints", "value": [dict(taint) for taint in taints]},
        ]
        self._request("PATCH", _node_path(node.name), what, change, _JSON_PATCH)

    def node_id(self, node_name: str, driver_name: str) -> str | None:
        """Return the id that a driver registered on a node; None where it is not. Needs the right to get csinodes."""
        path = f"/apis/storage.k8s.io/v1/csinodes/{quote(node_name, safe='')}{_CACHED}"
        found = self._get(path, f"get the CSINode of node {shown(node_name)}")
        return decode_node_ids(found).get(driver_name) if found is not None else None

    def node_ids(self, driver_name: str) -> Mapping[str, str]:
        """Return by node the id that a driver registered. Needs the right to list csinodes, which only people have."""
        found = self._get(f"/apis/storage.k8s.io/v1/csinodes{_CACHED}", "list the CSINodes") or {}
        ids: dict[str, str] = {}
        for item in map(_mapping, _list(found.get("items"))):
            if (node_id := decode_node_ids(item).get(driver_name)) is not None:
                ids[str(_mapping(item.get("metadata")).get("name"))] = node_id
        return ids

    def has_attachment(self, name: str) -> bool:
        """Return whether a VolumeAttachment exists. Needs the right to get volumeattachments, not to list them."""
        path = f"/apis/storage.k8s.io/v1/volumeattachments/{quote(name, safe='')}"
        return self._get(path, f"get VolumeAttachment {shown(name)}") is not None

    def attachment_metadata(self, name: str) -> Mapping[str, str]:
        """Return the publish context of a VolumeAttachment; empty without one. Needs the right to get it."""
        path = f"/apis/storage.k8s.io/v1/volumeattachments/{quote(name, safe='')}"
        found = self._get(path, f"get VolumeAttachment {shown(name)}") or {}
        context = _mapping(_mapping(found.get("status")).get("attachmentMetadata"))
        return {key: text for key, text in context.items() if isinstance(text, str)}

    def driver_uid(self, driver_name: str) -> str:
        """Return the uid of a CSIDriver; "" without one. Needs the right to get it."""
        path = f"/apis/storage.k8s.io/v1/csidrivers/{quote(driver_name, safe='')}{_CACHED}"
        found = self._get(path, f"get CSIDriver {shown(driver_name)}") or {}
        return str(_mapping(found.get("metadata")).get("uid") or "")

    def create_event(self, namespace: str, event: Mapping[str, object]) -> None:
        """Create an event. Needs the right to create events of the group events.k8s.io in that namespace."""
        self._request("POST", _events_path(namespace), f"create an event in {namespace}", event, "application/json")

    def repeat_event(self, namespace: str, name: str, series: Mapping[str, object]) -> bool:
        """Set the series of an event; False where it has expired. Needs the right to patch events."""
        what = f"count event {name} in {namespace}"
        try:
            self._request("PATCH", f"{_events_path(namespace)}/{name}", what, {"series": series}, _MERGE_PATCH)
        except ApiFailed as error:
            if error.status == http.client.NOT_FOUND:
                return False
            raise
        return True

    def _get(self, path: str, what: str) -> Mapping[str, object] | None:
        try:
            document = json.loads(self._request("GET", path, what))
        except ApiFailed as error:
            if error.status == http.client.NOT_FOUND:
                return None
            raise
        except (ValueError, RecursionError) as error:
            raise ApiFailed(what, f"invalid response: {error}", http.client.OK) from error
        if not isinstance(document, dict):
            raise ApiFailed(what, "invalid response: expected a JSON object", http.client.OK)
        return document

    def _request(self, method: str, path: str, what: str, change: object = None, content_type: str = "") -> bytes:
        settings = self.settings
        try:
            token = (settings.account / "token").read_text().strip()
            headers = {"Authorization": f"Bearer {token}", "Accept": "application/json"}
            if content_type:
                headers["Content-Type"] = content_type
            context = ssl.create_default_context(cafile=str(settings.account / "ca.crt"))
            connection = http.client.HTTPSConnection(
                settings.host, settings.port, timeout=settings.timeout_s, context=context
            )
            with contextlib.closing(connection):
                body = None if change is None else json.dumps(change).encode()
                connection.request(method, path, body=body, headers=headers)
                response = connection.getresponse()
                status, content = response.status, response.read(_ANSWER_LIMIT_BYTES)
        except (OSError, http.client.HTTPException, ValueError) as error:
            raise ApiFailed(what, f"{type(error).__name__}: {error}") from error
        if status not in (http.client.OK, http.client.CREATED):
            family = Conflict if status in _CONFLICT else ApiFailed
            raise family(what, f"HTTP status {status}: {_reason(content)}", status)
        return content


def _node_path(node_name: str) -> str:
    return f"/api/v1/nodes/{quote(node_name, safe='')}"


def _events_path(namespace: str) -> str:
    return f"/apis/events.k8s.io/v1/namespaces/{namespace}/events"


def _reason(body: bytes) -> str:
    try:
        document = json.loads(body)
    except (ValueError, RecursionError):
        return shown(body.decode(errors="replace"))
    message = document.get("message") if isinstance(document, dict) else None
    return shown(message if message is not None else document)
