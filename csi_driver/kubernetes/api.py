"""Requests of the API server: a node's labels and taints, and whether what stands for an attachment is still there.

Everything that a request needs is read for that request: the token, which the kubelet replaces every hour or so, and
the authorities, which are replaced with the cluster's. A request has a connection of its own; they are rare.
"""

from __future__ import annotations

import http.client
import json
import ssl
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from urllib.parse import quote

from csi_driver.errors import StorageUnavailable, shown
from csi_driver.kubernetes.objects import Node, node_in, plugins_in
from csi_driver.settings import ApiSettings

_ANSWER_LIMIT_BYTES = 16 << 20
# RFC 7386: a label that is null is taken away.
_MERGE_PATCH = "application/merge-patch+json"
# RFC 6902: all of it is done, or, where a test does not hold, nothing.
_JSON_PATCH = "application/json-patch+json"
_CONFLICT = frozenset({http.client.CONFLICT, http.client.UNPROCESSABLE_ENTITY})
# Any version that the server has at hand: it is answered from its cache, which lags by moments (API concepts,
# "resource versions").
_AT_HAND = "?resourceVersion=0"


class ApiFailed(StorageUnavailable):
    """The API server did not do what it was asked; `status` is its HTTP status where it answered."""

    def __init__(self, what: str, reason: str, status: int | None = None) -> None:
        self.status = status
        super().__init__(f"Kubernetes API server: cannot {what}: {reason}")


class TaintsChanged(ApiFailed):
    """Somebody else changed the taints of the node in between: nothing was changed; look again."""


@dataclass(frozen=True, slots=True)
class _Answer:
    status: int
    body: bytes

    def document(self) -> Mapping[str, object]:
        """Return the object of the body. Raises `ValueError`."""
        decoded = json.loads(self.body)
        if not isinstance(decoded, dict):
            raise ValueError("expected a JSON object")
        return decoded


class ApiServer:
    """The API server of the cluster that this pod runs in."""

    def __init__(self, settings: ApiSettings) -> None:
        self._settings = settings

    # --- nodes ---

    def node(self, name: str) -> Node | None:
        """Return what the server knows of a node, perhaps a moment old; None where there is none. Raises `ApiFailed`.

        Needs the right to get nodes.
        """
        found = self._found(f"{_path_of(name)}{_AT_HAND}", f"get node {shown(name)}")
        return node_in(found) if found is not None else None

    def label_node(self, name: str, labels: Mapping[str, str | None]) -> None:
        """Set the labels of a node, None = take away; what is so already is left alone. Raises `ApiFailed`.

        Needs the right to patch nodes.
        """
        change = {"metadata": {"labels": dict(labels)}}
        self._expect_ok(self._patch(name, change, _MERGE_PATCH, what := f"label node {shown(name)}"), what)

    def set_taints(self, node: Node, taints: Sequence[Mapping[str, object]]) -> None:
        """Replace the taints of a node, if they still are what they were when it was read.

        Raises `TaintsChanged`, `ApiFailed`. Needs the right to patch nodes.
        """
        what = f"change the taints of node {shown(node.name)}"
        change = [
            {"op": "test", "path": "/spec/taints", "value": [dict(taint) for taint in node.taints]},
            {"op": "replace", "path": "/spec/taints", "value": [dict(taint) for taint in taints]},
        ]
        answer = self._patch(node.name, change, _JSON_PATCH, what)
        if answer.status in _CONFLICT:
            raise TaintsChanged(what, f"HTTP status {answer.status}: {_reason(answer.body)}", answer.status)
        self._expect_ok(answer, what)

    # --- storage ---

    def node_id(self, node_name: str, driver_name: str) -> str | None:
        """Return under which id a driver is registered on a node; None where it is not. Raises `ApiFailed`.

        Needs the right to get csinodes.
        """
        path = f"/apis/storage.k8s.io/v1/csinodes/{quote(node_name, safe='')}{_AT_HAND}"
        found = self._found(path, f"get the CSINode of node {shown(node_name)}")
        return plugins_in(found).get(driver_name) if found is not None else None

    def node_ids(self, driver_name: str) -> Mapping[str, str]:
        """Return under which id a driver is registered on every node. Raises `ApiFailed`.

        Needs the right to list csinodes, which the driver itself has no use for.
        """
        path = f"/apis/storage.k8s.io/v1/csinodes{_AT_HAND}"
        found = self._found(path, "list the CSINodes") or {}
        items = found.get("items")
        ids: dict[str, str] = {}
        for item in items if isinstance(items, list) else []:
            metadata = item.get("metadata") if isinstance(item, dict) else None
            if isinstance(metadata, dict) and (node_id := plugins_in(item).get(driver_name)) is not None:
                ids[str(metadata.get("name"))] = node_id
        return ids

    def has_attachment(self, name: str) -> bool:
        """Tell whether there is a VolumeAttachment of that name. Raises `ApiFailed`.

        Needs the right to get volumeattachments; to list them, which would show every node's, is not needed.
        """
        path = f"/apis/storage.k8s.io/v1/volumeattachments/{quote(name, safe='')}"
        return self._found(path, f"get VolumeAttachment {shown(name)}") is not None

    # --- requests ---

    def _found(self, path: str, what: str) -> Mapping[str, object] | None:
        answer = self._request("GET", path, what)
        if answer.status == http.client.NOT_FOUND:
            return None
        self._expect_ok(answer, what)
        try:
            return answer.document()
        except (ValueError, RecursionError) as error:
            raise ApiFailed(what, f"invalid response: {error}", answer.status) from error

    def _expect_ok(self, answer: _Answer, what: str) -> None:
        if answer.status != http.client.OK:
            raise ApiFailed(what, f"HTTP status {answer.status}: {_reason(answer.body)}", answer.status)

    def _patch(self, node_name: str, change: object, kind: str, what: str) -> _Answer:
        return self._request("PATCH", _path_of(node_name), what, json.dumps(change).encode(), {"Content-Type": kind})

    def _request(
        self, method: str, path: str, what: str, body: bytes | None = None, headers: Mapping[str, str] | None = None
    ) -> _Answer:
        settings = self._settings
        try:
            token = (settings.account / "token").read_text().strip()
            context = ssl.create_default_context(cafile=str(settings.account / "ca.crt"))
            connection = http.client.HTTPSConnection(
                settings.host, settings.port, timeout=settings.timeout_s, context=context
            )
            own = {"Authorization": f"Bearer {token}", "Accept": "application/json", **(headers or {})}
            try:
                connection.request(method, path, body=body, headers=own)
                answer = connection.getresponse()
                return _Answer(answer.status, answer.read(_ANSWER_LIMIT_BYTES))
            finally:
                connection.close()
        except (OSError, http.client.HTTPException, ValueError) as error:
            raise ApiFailed(what, f"{type(error).__name__}: {error}") from error


def _path_of(node_name: str) -> str:
    return f"/api/v1/nodes/{quote(node_name, safe='')}"


def _reason(body: bytes) -> str:
    """Return the message of the server's Status object, else the beginning of whatever came."""
    try:
        document = json.loads(body)
    except (ValueError, RecursionError):
        return shown(body.decode(errors="replace"))
    message = document.get("message") if isinstance(document, dict) else None
    return shown(message if message is not None else document)
