# SPDX-License-Identifier: Apache-2.0
"""A management server in a thread with scripted responses and faults.

It keeps real sessions (login, cookie, expiry; with `opens_sessions` a request opens one) and a queue of responses for
each request; the last one stays. It has no volumes: the contract tests cover sequences of operations.
"""

from __future__ import annotations

import json
import socket
import struct
import threading
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import TypeVar
from urllib.parse import parse_qs, urlsplit

USER = "csi@example.com"
PASSWORD = "correct horse"


@dataclass(frozen=True)
class Says:
    """Answer with a status and a JSON body."""

    body: object
    status: int = 200


@dataclass(frozen=True)
class SaysRaw:
    """Respond with bytes; `promised`: the length in the header."""

    content: bytes
    status: int = 200
    content_type: str = "text/html"
    promised: int | None = None
    location: str = ""


@dataclass(frozen=True)
class Breaks:
    """Read the request, then reset the connection."""


@dataclass(frozen=True)
class Hangs:
    """Read the request, then wait for `until` without a response."""

    until: threading.Event = field(default_factory=threading.Event)


@dataclass(frozen=True)
class Waits:
    """Read the request, and respond with `then` when `until` is set."""

    then: Says
    until: threading.Event = field(default_factory=threading.Event)


@dataclass(frozen=True)
class Drips:
    """Send the beginning of a response, then one byte after each call of `more`, until it returns False."""

    more: Callable[[], bool]


Step = Says | SaysRaw | Breaks | Hangs | Waits | Drips


@dataclass(frozen=True)
class Received:
    """A request that was read completely."""

    method: str
    path: str
    query: dict[str, object]
    body: object
    headers: dict[str, str]


class ManagementDouble(ThreadingHTTPServer):
    """A scripted server. `received` lists the requests, except logins, which are in `logins`."""

    daemon_threads = True
    request_queue_size = 128

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.password = PASSWORD
        self.login_answer: Step | None = None
        self.opens_sessions = False
        self.received: list[Received] = []
        self.logins: list[object] = []
        self.sessions: set[str] = set()
        self.expires_as: Step = SaysRaw(b"Found. Redirecting to /login", 302, location="/login")
        self._steps: dict[tuple[str, str], list[Step]] = defaultdict(list)
        self._steps["GET", "/systemInfo"] = [Says(sample("system-info"))]
        self._lock = threading.Lock()
        self._hanging: list[threading.Event] = []

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"

    def on(self, method: str, path: str, *steps: Step) -> None:
        """Answer this request with these steps, one a request; the last one stays."""
        self._steps[method, path] = list(steps)
        self._hanging += [step.until for step in steps if isinstance(step, Hangs)]

    def expire_sessions(self) -> None:
        self.sessions.clear()

    def seen(self, path: str) -> list[Received]:
        return [request for request in self.received if request.path == path]

    def step_for(self, request: Received, cookie: str) -> Step:
        with self._lock:
            if cookie not in self.sessions and not self.opens_sessions:
                return self.expires_as
            self.received.append(request)
            steps = self._steps.get((request.method, request.path))
            if not steps:
                return Says({"success": False, "err": "404 (Not Found)"}, 404)
            return steps.pop(0) if len(steps) > 1 else steps[0]

    def opened_session(self, known: str) -> str:
        """Return the cookie of a session that this request opens, as with a client certificate."""
        if not self.opens_sessions or known in self.sessions:
            return ""
        with self._lock:
            self.sessions.add("connect.sid=opened")
        return "connect.sid=opened"

    def log_in(self, body: object) -> tuple[Step, str]:
        with self._lock:
            self.logins.append(body)
            if self.login_answer is not None:
                return self.login_answer, ""
            if not isinstance(body, dict) or body.get("username") != USER or body.get("password") != self.password:
                return Says({"_id": USER, "uuid": None, "success": False, "error": "no", "payload": None}, 401), ""
            cookie = f"connect.sid=s%3A{len(self.logins)}.secretcookie"
            self.sessions.add(cookie)
            return Says({"_id": USER, "uuid": None, "success": True, "error": None, "payload": {"id": 1265}}), cookie

    def handle_error(self, request: object, client_address: object) -> None:
        """A client that gave up is what some tests are about."""

    def stop(self) -> None:
        for event in self._hanging:
            event.set()
        self.shutdown()
        self.server_close()


def _decoded(text: str) -> object:
    try:
        return json.loads(text)
    except ValueError:
        return text


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: ManagementDouble
    wbufsize = -1
    disable_nagle_algorithm = True

    def log_message(self, format: str, *args: object) -> None:  # noqa: A002
        pass

    def do_GET(self) -> None:
        self._answer(None)

    def do_POST(self) -> None:
        self._answer(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))

    def _answer(self, body: object) -> None:
        url = urlsplit(self.path)
        if url.path == "/login" and self.command == "POST":
            step, cookie = self.server.log_in(body)
        else:
            query = {key: _decoded(values[0]) for key, values in parse_qs(url.query).items()}
            request = Received(self.command, url.path, query, body, dict(self.headers))
            known = self.headers.get("Cookie", "")
            step, cookie = self.server.step_for(request, known), self.server.opened_session(known)
        match step:
            case Says():
                self._send(SaysRaw(json.dumps(step.body).encode(), step.status, "application/json"), cookie)
            case SaysRaw():
                self._send(step, cookie)
            case Breaks():
                self._break()
            case Hangs():
                step.until.wait(30)
                self._break()
            case Waits():
                step.until.wait(30)
                self._send(SaysRaw(json.dumps(step.then.body).encode(), step.then.status, "application/json"), cookie)
            case Drips():
                self._send(SaysRaw(b"[", 200, "application/json", promised=1000), cookie)
                while step.more():
                    self.wfile.write(b" ")
                    self.wfile.flush()
                self._break()

    def _send(self, step: SaysRaw, cookie: str) -> None:
        self.send_response(step.status)
        self.send_header("Content-Type", step.content_type)
        self.send_header("Content-Length", str(len(step.content) if step.promised is None else step.promised))
        if cookie:
            self.send_header("Set-Cookie", f"{cookie}; Path=/; HttpOnly")
        if step.location:
            self.send_header("Location", step.location)
        self.end_headers()
        self.wfile.write(step.content)
        self.wfile.flush()
        if step.promised is not None and step.promised > len(step.content):
            self.close_connection = True

    def _break(self) -> None:
        self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.close_connection = True


Double = TypeVar("Double", bound=ManagementDouble)


def running() -> AbstractContextManager[ManagementDouble]:
    return serving(ManagementDouble())


@contextmanager
def serving(double: Double) -> Iterator[Double]:
    """Serve until the block ends."""
    thread = threading.Thread(target=double.serve_forever, args=(0.02,), daemon=True)
    thread.start()
    try:
        yield double
    finally:
        double.stop()
        thread.join(5)


def closed_port() -> int:
    """Return a port of this machine without a listener."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def sample(name: str) -> dict[str, object]:
    """Return a document of a real server (management 3.5), without message texts."""
    loaded = json.loads((Path(__file__).parent / "samples" / f"{name}.json").read_text())
    assert isinstance(loaded, dict)
    return loaded
