# SPDX-License-Identifier: Apache-2.0
"""How the management is read and changed: single documents, lists, and changes with an envelope as their answer."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from urllib.parse import quote

from csi_driver.deadline import Deadline
from csi_driver.management import codec
from csi_driver.management.failover import ManagementServers
from csi_driver.management.failures import ApiError, Meaning, Operation, error_in, failure_of, meaning_of
from csi_driver.management.transport import Request


def quoted_json(value: object) -> str:
    return quote(json.dumps(value, separators=(",", ":")), safe="")


def projection(fields: tuple[str, ...]) -> str:
    return "projection=" + quoted_json(dict.fromkeys(fields, 1))


SORTED = "sort=" + quoted_json({"_id": 1})


@dataclass(frozen=True, slots=True)
class Change:
    """How an operation is sent. `accepted`: meaning of an error that is a result."""

    path: str
    accepted: Meaning | None = None
    is_repeatable: bool = False
    is_secret: bool = False


class Requests:
    """Requests to one storage cluster's management."""

    def __init__(self, servers: ManagementServers) -> None:
        self._servers = servers

    def _send(
        self, operation: Operation, change: Change, body: object, deadline: Deadline
    ) -> tuple[codec.Document, ApiError | None, Meaning]:
        """Send a change of one object; return its envelope, and the error if it failed, with the error's meaning."""
        content = json.dumps(body, allow_nan=False).encode()
        request = Request("POST", change.path, content, change.is_repeatable, change.is_secret)
        answer = self._servers.send(request, deadline)
        # A request that is rejected as a whole has one envelope as its answer, any other a list.
        first = answer[0] if isinstance(answer, list) and answer else answer
        envelope = codec.as_document(first, f"a request to {operation}")
        if "success" not in envelope and "error" not in envelope:
            raise codec.invalid_document(envelope, f"a request to {operation} with neither `success` nor `error`")
        error = error_in(envelope)
        meaning = Meaning.DONE if error is None else meaning_of(operation, error)[0]
        return envelope, None if meaning is Meaning.DONE else error, meaning

    def _read(self, path: str, deadline: Deadline, absent: Meaning | None = None) -> codec.Document:
        body = codec.as_document(self._servers.send(Request("GET", path), deadline), "a document")
        # A document may have a field `error` without being an envelope.
        error = error_in(body) if "success" in body or "systemMessage" in body else None
        if error is None:
            if absent is not None and not body:  # an object that is not found has an error instead
                raise codec.invalid_document(body, f"GET {path} with an empty document")
            return body
        if meaning_of(Operation.READ, error)[0] is absent:
            return {}
        raise failure_of(Operation.READ, error)

    def _list(
        self, collection: str, deadline: Deadline, options: str, condition: object = None, limit: int = 0
    ) -> list[codec.Document]:
        # Always page 0: a page begins after the last `_id` of the previous one, which concurrent changes do not shift.
        path = f"/{collection}/all/0/{limit}?{options}"
        if condition is not None:
            path += "&filter=" + quoted_json(condition)
        body = self._servers.send(Request("GET", path), deadline)
        if isinstance(body, dict) and (error := error_in(body)):
            raise failure_of(Operation.READ, error)
        return codec.as_documents(body, f"a list of {collection}")


def taken(rows: list[codec.Document]) -> Iterator[codec.Document]:
    """Yield the rows in order and drop each: a list of thousands is never in memory in two forms."""
    rows.reverse()
    while rows:
        yield rows.pop()


def payload_of(envelope: codec.Document) -> codec.Document:
    """Return the state after a change. NVMesh's responses have none; see `csi_driver.embedded.http`."""
    payload = envelope.get("payload")
    return payload if isinstance(payload, dict) else {}
