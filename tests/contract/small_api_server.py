# SPDX-License-Identifier: Apache-2.0
"""A small API server over HTTPS: objects by path, GET, POST, and PATCH of RFC 7386 and RFC 6902."""

from __future__ import annotations

import contextlib
import json
import re
import ssl
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

from csi_driver.kubernetes.api import ApiServer
from csi_driver.settings import ApiSettings
from tests.contract.pki import Authority, Pair

Document = dict[str, Any]


@dataclass
class Cluster:
    """Objects, valid tokens, and the next faults.

    `forbidden`: beginnings of "METHOD path" that are refused. `before_patch` is called before a patch is looked at.
    """

    objects: dict[str, Document] = field(default_factory=dict)
    token: str = "first"
    faults: list[str] = field(default_factory=list)
    forbidden: tuple[str, ...] = ()
    requests: list[str] = field(default_factory=list)
    released: threading.Event = field(default_factory=threading.Event)
    before_patch: Callable[[], None] = lambda: None


class _Handler(BaseHTTPRequestHandler):
    cluster: Cluster

    def do_GET(self) -> None:
        self._serve(lambda found: found)

    def do_POST(self) -> None:
        made = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        path = f"{self.path}/{made['metadata']['name']}"
        if problems := why_invalid(made):
            self._answer(422, {"message": "; ".join(problems)})
            return
        if self._admitted(f"POST {self.path}"):
            self.cluster.objects[path] = made
            self._answer(201, made)

    def do_PATCH(self) -> None:
        change = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        kind = self.headers["Content-Type"]
        if kind not in _PATCHES:
            self._answer(415, {"message": "the body of the request was in an unknown format"})
            return
        self.cluster.before_patch()
        self._serve(lambda found: _PATCHES[kind](found, change))

    def _serve(self, work: Callable[[Document], Document]) -> None:
        path = self.path.partition("?")[0]
        if not self._admitted(f"{self.command} {path}"):
            return
        if path not in self.cluster.objects:
            self._answer(404, {"message": "nodes not found"})
            return
        try:
            self.cluster.objects[path] = work(self.cluster.objects[path])
        except _TestFailed as failed:
            self._answer(422, {"message": f"the server rejected our request: {failed}"})
        else:
            self._answer(200, self.cluster.objects[path])

    def _admitted(self, asked: str) -> bool:
        """Count a request, and answer it where it gets no further."""
        self.cluster.requests.append(asked)
        if self.cluster.faults:
            self._fail(self.cluster.faults.pop(0))
        elif self.headers["Authorization"] != f"Bearer {self.cluster.token}":
            self._answer(401, {"message": "Unauthorized"})
        elif asked.startswith(self.cluster.forbidden):
            self._answer(403, {"message": f"cannot {asked}"})
        else:
            return True
        return False

    def _fail(self, fault: str) -> None:
        if fault == "hang":
            self.cluster.released.wait(30)
        elif fault == "garbage":
            self.wfile.write(b"not HTTP at all\r\n\r\n")
        elif fault != "close":
            self._answer(int(fault), {"kind": "Status", "message": f"fault {fault}"})

    def _answer(self, status: int, body: Document) -> None:
        data = json.dumps(body).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, format: str, *args: object) -> None:  # noqa: A002  # the base class's name
        pass


class _TestFailed(Exception):
    pass


_MICRO_TIME = re.compile(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{6}Z")
_EVENT_TEXTS = {"reportingController": 253, "reportingInstance": 128, "action": 128, "reason": 128, "note": 1024}


def why_invalid(event: Document) -> list[str]:
    """Return what the API server refuses in an event (pkg/apis/core/validation/events.go); empty for another object."""
    if event.get("kind") != "Event":
        return []
    regarding = event["regarding"]
    problems = [] if _MICRO_TIME.fullmatch(event["eventTime"]) else ["eventTime"]
    problems += [key for key, most in _EVENT_TEXTS.items() if not 0 < len(event[key].encode()) <= most]
    problems += [] if event["type"] in ("Normal", "Warning") else ["type"]
    expected = regarding.get("namespace", "default")
    return problems + ([] if event["metadata"]["namespace"] == expected else ["regarding.namespace"])


def _merged(found: Any, change: Any) -> Any:
    if not isinstance(change, dict):
        return change
    result = dict(found) if isinstance(found, dict) else {}
    for key, value in change.items():
        if value is None:
            result.pop(key, None)
        else:
            result[key] = _merged(result.get(key), value)
    return result


def _patched(found: Document, change: list[Document]) -> Document:
    result: Document = json.loads(json.dumps(found))
    for step in change:
        *way, last = step["path"].strip("/").split("/")
        place = result
        for part in way:
            place = place[part]
        if step["op"] == "test":
            if place.get(last) != step["value"]:
                raise _TestFailed(f"testing path {step['path']} failed")
        else:
            assert (step["op"], last in place) == ("replace", True)
            place[last] = step["value"]
    return result


_PATCHES: dict[str, Callable[[Document, Any], Document]] = {
    "application/merge-patch+json": _merged,
    "application/json-patch+json": _patched,
}


class _Quiet(ThreadingHTTPServer):
    """Logs nothing about clients that reject it or disconnect."""

    def handle_error(self, request: object, client_address: object) -> None:
        pass


@dataclass
class Api:
    """A served cluster, with a service account's files to reach it."""

    cluster: Cluster
    account: Path
    port: int
    authority: Authority

    def settings(self, timeout_s: float = 10.0) -> ApiSettings:
        return ApiSettings("127.0.0.1", self.port, self.account, timeout_s)

    def client(self, timeout_s: float = 10.0) -> ApiServer:
        return ApiServer(self.settings(timeout_s))


@contextlib.contextmanager
def served(cluster: Cluster, authority: Authority, pair: Pair, account: Path) -> Iterator[Api]:
    """Serve the cluster, with a service account's files in `account`."""
    handler = type("Bound", (_Handler,), {"cluster": cluster})
    server = _Quiet(("127.0.0.1", 0), handler)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(pair.certificate, pair.key)
    server.socket = context.wrap_socket(server.socket, server_side=True)
    thread = threading.Thread(target=server.serve_forever, args=(0.05,))
    thread.start()
    (account / "token").write_text(f"{cluster.token}\n")
    (account / "ca.crt").write_bytes(authority.certificate.read_bytes())
    try:
        yield Api(cluster, account, server.server_address[1], authority)
    finally:
        cluster.released.set()
        server.shutdown()
        thread.join()
        server.server_close()
