# SPDX-License-Identifier: Apache-2.0
"""A proxy between a management client and server that injects faults of networks, gateways and overloaded servers.

The fault of a request is drawn from a seed, the request and its number of repetitions, so the same seed gives the same
faults in any order of threads. A request is executed at once or never: no client can handle one that arrives late.
"""

from __future__ import annotations

import http.client
import json
import random
import socket
import struct
import threading
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import urlsplit

STRANGE_UUID = "deadbeef-dead-11f1-8ead-deadbeefdead"
_HOP_BY_HOP = frozenset({"connection", "content-length", "transfer-encoding", "keep-alive", "date", "server"})


class Fault(StrEnum):
    """Fault of one request. BEFORE: the server never sees it; AFTER: the server has executed it."""

    DELAY = "answer late"
    HANG_BEFORE = "hang before"
    HANG_AFTER = "hang after"
    RESET_BEFORE = "reset before"
    RESET_AFTER = "reset after"
    RESET_MID_ANSWER = "reset in the middle of the answer"
    TRUNCATED = "answer cut short"
    NOT_JSON = "answer that is no JSON"
    LOGIN_WANTED = "302 to the login"
    SESSION_LOST = "session expired on the server"
    NOT_ADMIN = "401"
    MALFORMED = "422"
    ERROR_BEFORE = "500 before"
    ERROR_AFTER = "500 after"
    UPGRADING = "503 with 16268"
    SHUTTING_DOWN = "503 with 16269"
    GATEWAY_BEFORE = "502 before"
    GATEWAY_AFTER = "503 of a gateway after"
    OTHER_UUID_ASKED = "another uuid in the request"
    OTHER_UUID_ANSWERED = "another uuid in the answer"
    UNDEFINED = "ids that are undefined"


_CHANGES = frozenset({Fault.OTHER_UUID_ASKED, Fault.OTHER_UUID_ANSWERED})
"""Faults for changes only: a client cannot work with false reads."""


@dataclass(frozen=True)
class Seen:
    """A request in the proxy; `subject` names its object, as far as it is the same in every run."""

    method: str
    path: str
    subject: str
    nth: int

    @property
    def is_change(self) -> bool:
        return self.method == "POST" and self.path.startswith(("/volumes/", "/clients/"))


Choose = Callable[[Seen], Fault | None]


@dataclass
class Drawn:
    """Draws faults from a seed: `share` of all requests meet one, of the kinds given with their weights."""

    seed: int
    share: float
    weights: Mapping[Fault, float]
    dealt: Counter[Fault] = field(default_factory=Counter)
    is_calm: bool = False

    def __call__(self, request: Seen) -> Fault | None:
        drawn = random.Random(f"{self.seed} {request.method} {request.path} {request.subject} {request.nth}")
        if self.is_calm or drawn.random() >= self.share:
            return None
        fitting = {kind: weight for kind, weight in self.weights.items() if request.is_change or kind not in _CHANGES}
        fault = drawn.choices(list(fitting), list(fitting.values()))[0]
        self.dealt[fault] += 1
        return fault


@dataclass(frozen=True)
class _Answer:
    status: int
    headers: list[tuple[str, str]]
    content: bytes


def _json(body: object, status: int) -> _Answer:
    return _Answer(status, [("Content-Type", "application/json")], json.dumps(body).encode())


def _envelope(number: int, status: int) -> _Answer:
    return _json({"_id": None, "uuid": None, "success": False, "error": {"id": number}, "payload": None}, status)


_PAGE = [("Content-Type", "text/html")]
_INSTEAD: Mapping[Fault, _Answer] = {
    Fault.LOGIN_WANTED: _Answer(302, [("Location", "/login")], b"Found. Redirecting to /login"),
    Fault.NOT_ADMIN: _json({"message": "Operation not permitted.", "id": 401}, 401),
    Fault.MALFORMED: _envelope(422, 422),
    Fault.ERROR_BEFORE: _Answer(500, _PAGE, b"<pre>Internal Server Error</pre>"),
    Fault.UPGRADING: _envelope(16268, 503),
    Fault.SHUTTING_DOWN: _envelope(16269, 503),
    Fault.GATEWAY_BEFORE: _Answer(502, _PAGE, b"<html>Bad Gateway</html>"),
}
"""Answered by the proxy; the server never sees the request."""
_AFTERWARDS: Mapping[Fault, _Answer] = {
    Fault.NOT_JSON: _Answer(200, _PAGE, b"<html>Welcome to the hotel</html>"),
    Fault.ERROR_AFTER: _Answer(500, _PAGE, b"<pre>Internal Server Error</pre>"),
    Fault.GATEWAY_AFTER: _Answer(503, _PAGE, b"<html>Service Unavailable</html>"),
}
"""Sent instead of the server's answer."""


class FaultProxy:
    """A proxy on a port of its own. Thread-safe; `stop` it in the end."""

    def __init__(self, choose: Choose, *, hang_s: float, delay_s: float = 0.02) -> None:
        self.choose = choose
        self.hang_s = hang_s
        self.delay_s = delay_s
        self.upstream: tuple[str, int] | None = None
        """Where the server is; None: it is dead, and every request ends with its connection."""
        self.asked: Counter[str] = Counter()
        """How often each method and path was asked for."""
        self.forwarded: Counter[str] = Counter()
        """How often each method and path reached the server."""
        self.on_forward: Callable[[Seen], None] = lambda seen: None
        self.lock = threading.Lock()
        self.held = threading.Event()
        self.held.set()
        self.stopping = threading.Event()
        self._counts: Counter[tuple[str, str, str]] = Counter()
        self._server = _Server(("127.0.0.1", 0), self)
        self.port = int(self._server.server_address[1])
        self._thread = self._serve()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def die(self) -> None:
        """End every connection and refuse new ones, as a server that was killed."""
        self._server.shutdown()
        self._server.server_close()
        self._server.break_all()
        self._thread.join(60)

    def revive(self) -> None:
        self._server = _Server(("127.0.0.1", self.port), self)
        self._thread = self._serve()

    def hang(self) -> None:
        """Accept connections and requests, and never answer."""
        self.held.clear()

    def go_on(self) -> None:
        self.held.set()

    def break_all(self) -> None:
        """End every connection."""
        self._server.break_all()

    def stop(self) -> None:
        self.stopping.set()
        self.held.set()
        self.die()

    def seen(self, method: str, path: str, body: object) -> Seen:
        subject = _subject(body)
        with self.lock:
            self.asked[f"{method} {path}"] += 1
            self._counts[method, path, subject] += 1
            return Seen(method, path, subject, self._counts[method, path, subject])

    def _serve(self) -> threading.Thread:
        thread = threading.Thread(target=self._server.serve_forever, args=(0.02,), daemon=True)
        thread.start()
        return thread


def _subject(body: object) -> str:
    """Name the object of a request without uuids, which differ in each run."""
    item = body[0] if isinstance(body, list) and body else body
    if not isinstance(item, dict):
        return ""
    volumes = item.get("volumes") or [{}]
    return " ".join(str(item[key]) for key in ("name", "_id", "client") if key in item) + str(
        volumes[0].get("name", "")
    )


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 128

    def __init__(self, address: tuple[str, int], proxy: FaultProxy) -> None:
        super().__init__(address, _Handler)
        self.proxy = proxy
        self.connections: set[socket.socket] = set()

    def break_all(self) -> None:
        for connection in list(self.connections):
            _break(connection)

    def handle_error(self, request: object, client_address: object) -> None:
        """Expect clients that closed the connection."""


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: _Server
    wbufsize = -1
    disable_nagle_algorithm = True

    def setup(self) -> None:
        super().setup()
        self.server.connections.add(self.connection)
        upstream = self.server.proxy.upstream
        self.up = http.client.HTTPConnection(*upstream, timeout=120) if upstream is not None else None

    def finish(self) -> None:
        self.server.connections.discard(self.connection)
        if self.up is not None:
            self.up.close()
        super().finish()

    def log_message(self, format: str, *args: object) -> None:  # noqa: A002
        pass

    def do_GET(self) -> None:
        self._handle(b"")

    def do_POST(self) -> None:
        self._handle(self.rfile.read(int(self.headers["Content-Length"])))

    def _handle(self, body: bytes) -> None:
        proxy = self.server.proxy
        decoded = json.loads(body) if body else None
        seen = proxy.seen(self.command, urlsplit(self.path).path, decoded)
        fault = proxy.choose(seen)
        proxy.held.wait()
        if _has_left(self.connection) or proxy.upstream is None:
            self._fall_silent(hang=False)
        elif fault in (Fault.RESET_BEFORE, Fault.HANG_BEFORE):
            self._fall_silent(fault is Fault.HANG_BEFORE)
        elif (instead := _INSTEAD.get(fault or Fault.DELAY)) is not None:
            self._send(instead)
        else:
            self._forward(seen, fault, body, decoded)

    def _forward(self, seen: Seen, fault: Fault | None, body: bytes, decoded: object) -> None:
        proxy = self.server.proxy
        if fault is Fault.SESSION_LOST:
            self._ask("GET", "/login/logout", b"")
        if fault is Fault.OTHER_UUID_ASKED:
            body = json.dumps(_with_uuids(decoded, STRANGE_UUID)).encode()
        with proxy.lock:
            proxy.forwarded[f"{seen.method} {seen.path}"] += 1
        proxy.on_forward(seen)
        try:
            answer = self._ask(self.command, self.path, body)
        except (OSError, http.client.HTTPException):
            self._fall_silent(hang=False)  # the server died
            return
        self._answer(seen, fault, answer)

    def _answer(self, seen: Seen, fault: Fault | None, answer: _Answer) -> None:
        if fault is Fault.DELAY:
            self.server.proxy.stopping.wait(self.server.proxy.delay_s)
        if fault in (Fault.RESET_AFTER, Fault.HANG_AFTER):
            self._fall_silent(fault is Fault.HANG_AFTER)
        elif fault is Fault.TRUNCATED:
            self._send(answer, promised=len(answer.content) + 100)
        elif fault is Fault.RESET_MID_ANSWER:
            self._send(answer, promised=len(answer.content) + 100)
            self._fall_silent(hang=False)
        elif (afterwards := _AFTERWARDS.get(fault or Fault.DELAY)) is not None:
            self._send(afterwards)
        elif fault is Fault.OTHER_UUID_ANSWERED:
            self._send(_changed(answer, STRANGE_UUID))
        elif fault is Fault.UNDEFINED:
            self._send(_changed(answer, "undefined"))
        else:
            self._send(answer)

    def _ask(self, method: str, path: str, body: bytes) -> _Answer:
        if self.up is None:
            raise ConnectionError("it is dead")
        headers = {key: value for key, value in self.headers.items() if key.lower() not in (*_HOP_BY_HOP, "host")}
        self.up.request(method, path, body or None, headers)
        response = self.up.getresponse()
        kept = [(key, value) for key, value in response.getheaders() if key.lower() not in _HOP_BY_HOP]
        return _Answer(response.status, kept, response.read())

    def _send(self, answer: _Answer, promised: int | None = None) -> None:
        self.send_response(answer.status)
        for key, value in answer.headers:
            self.send_header(key, value)
        self.send_header("Content-Length", str(len(answer.content) if promised is None else promised))
        self.end_headers()
        self.wfile.write(answer.content)
        self.wfile.flush()
        self.close_connection |= promised is not None

    def _fall_silent(self, hang: bool) -> None:
        if hang:
            self.server.proxy.stopping.wait(self.server.proxy.hang_s)
        self.close_connection = True
        _break(self.connection)


def _has_left(connection: socket.socket) -> bool:
    """Return whether the client has given up: then its request must not arrive any more."""
    try:
        return connection.recv(1, socket.MSG_PEEK | socket.MSG_DONTWAIT) == b""
    except BlockingIOError:
        return False
    except OSError:
        return True


def _break(connection: socket.socket) -> None:
    """End a connection with a reset; blocked readers are woken."""
    try:
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        connection.shutdown(socket.SHUT_RDWR)
    except OSError:
        pass  # it has ended already


def _changed(answer: _Answer, uuid: str) -> _Answer:
    """Return the answer with other ids, where it is one that has any."""
    try:
        body = json.loads(answer.content)
    except ValueError:
        return answer
    return _Answer(answer.status, answer.headers, json.dumps(_with_uuids(body, uuid)).encode())


def _with_uuids(body: object, uuid: str) -> object:
    if isinstance(body, list):
        return [_with_uuids(item, uuid) for item in body]
    if not isinstance(body, dict):
        return body
    changed = {key: uuid if key == "uuid" and value else value for key, value in body.items()}
    if uuid == "undefined" and "success" in changed:
        changed["_id"] = uuid
    if "volumes" in changed:
        changed["volumes"] = _with_uuids(changed["volumes"], uuid)
    return changed
