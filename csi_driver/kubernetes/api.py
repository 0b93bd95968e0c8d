"""One request of the API server: change the labels of a node.

Everything that a request needs is read for that request: the token, which the kubelet replaces every hour or so, and
the authorities, which are replaced with the cluster's. A request has a connection of its own; they are rare.
"""

from __future__ import annotations

import http.client
import json
import ssl
from collections.abc import Mapping
from urllib.parse import quote

from csi_driver.errors import StorageUnavailable, shown
from csi_driver.kubernetes.settings import ApiSettings

_ANSWER_LIMIT_BYTES = 64 << 10
# RFC 7386: a label that is null is taken away.
_MERGE_PATCH = "application/merge-patch+json"


class ApiFailed(StorageUnavailable):
    """The API server did not do what it was asked; `status` is its HTTP status where it answered."""

    def __init__(self, what: str, reason: str, status: int | None = None) -> None:
        self.status = status
        super().__init__(f"the Kubernetes API server did not {what}: {reason}")


class ApiServer:
    """The API server of the cluster that this pod runs in."""

    def __init__(self, settings: ApiSettings) -> None:
        self._settings = settings

    def label_node(self, name: str, labels: Mapping[str, str | None]) -> None:
        """Set the labels of a node, None = take away; what is so already is left alone. Raises `ApiFailed`."""
        what = f"label the node {shown(name)}"
        try:
            status, body = self._patch(f"/api/v1/nodes/{quote(name, safe='')}", {"metadata": {"labels": dict(labels)}})
        except (OSError, http.client.HTTPException, ValueError) as error:
            raise ApiFailed(what, f"{type(error).__name__}: {error}") from error
        if status != http.client.OK:
            raise ApiFailed(what, f"HTTP status {status}: {_reason(body)}", status)

    def _patch(self, path: str, change: Mapping[str, object]) -> tuple[int, bytes]:
        settings = self._settings
        token = (settings.account / "token").read_text().strip()
        context = ssl.create_default_context(cafile=str(settings.account / "ca.crt"))
        connection = http.client.HTTPSConnection(
            settings.host, settings.port, timeout=settings.timeout_s, context=context
        )
        headers = {"Authorization": f"Bearer {token}", "Content-Type": _MERGE_PATCH, "Accept": "application/json"}
        try:
            connection.request("PATCH", path, body=json.dumps(change).encode(), headers=headers)
            answer = connection.getresponse()
            return answer.status, answer.read(_ANSWER_LIMIT_BYTES)
        finally:
            connection.close()


def _reason(body: bytes) -> str:
    """Return the message of the server's Status object, else the beginning of whatever came."""
    try:
        document = json.loads(body)
    except (ValueError, RecursionError):
        return shown(body.decode(errors="replace"))
    message = document.get("message") if isinstance(document, dict) else None
    return shown(message if message is not None else document)
