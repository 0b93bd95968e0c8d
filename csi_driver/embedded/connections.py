# SPDX-License-Identifier: Apache-2.0
"""HTTP/1.1 over sockets: a thread for each connection, which reads requests and sends the responses of the API."""

from __future__ import annotations

import contextlib
import logging
import os
import selectors
import socket
import ssl
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from email.utils import formatdate
from functools import partial
from http import HTTPStatus
from socketserver import StreamRequestHandler
from urllib.parse import parse_qsl, unquote

from csi_driver.background import run_detached
from csi_driver.deadline import SYSTEM_CLOCK
from csi_driver.embedded.requests import MAX_BODY_BYTES, HttpRequest, HttpResponse

_log = logging.getLogger(__name__)

COOKIE = "connect.sid"
_BACKLOG = 2048
_HANDSHAKE_S, _IDLE_S = 10.0, 600.0
_LINE_BYTES, _MOST_HEADERS = 1 << 16, 100
_PAUSE_S = 0.1
"""After a connection that could not be accepted: there are too many open files or threads."""


@dataclass(eq=False)
class HttpServer:
    """Serves a bound socket, which stays open: another process may share it."""

    listener: socket.socket
    respond: Callable[[HttpRequest], HttpResponse]
    tls: ssl.SSLContext | None
    _wake: int = field(default_factory=lambda: os.eventfd(0, os.EFD_CLOEXEC))
    _changed: threading.Condition = field(default_factory=threading.Condition)
    _open: set[socket.socket] = field(default_factory=set)
    _is_ending: bool = False

    def listen(self) -> None:
        """Let clients connect; they are served by `serve`."""
        self.listener.setblocking(False)
        self.listener.listen(_BACKLOG)

    def serve(self) -> None:
        """Accept connections until `end`."""
        with selectors.DefaultSelector() as ready:
            for source in (self.listener, self._wake):
                ready.register(source, selectors.EVENT_READ)
            while not self._is_ending:
                ready.select()
                self._accept()

    def end(self) -> None:
        """Accept no more connections. A signal handler may call it."""
        self._is_ending = True
        os.eventfd_write(self._wake, 1)

    def close(self, wait_s: float) -> None:
        """Let each connection finish its present request; call it after `serve`."""
        with self._changed:
            for connection in self._open:
                with contextlib.suppress(OSError):
                    socket.socket.shutdown(connection, socket.SHUT_RD)  # of TLS too: its own method ends the writing
            self._changed.wait_for(lambda: not self._open, wait_s)
        os.close(self._wake)

    def _accept(self) -> None:
        try:
            connection, _ = self.listener.accept()
            run_detached("storage-connection", partial(self._serve, connection))
        except BlockingIOError:
            return
        except (OSError, RuntimeError) as problem:  # RuntimeError: the system has no more threads
            _log.error("a connection to the API cannot be accepted: %s", problem)
            SYSTEM_CLOCK.sleep(_PAUSE_S)

    def _serve(self, connection: socket.socket) -> None:
        try:
            with self._shaken(connection) as ready, self._counted(ready) as is_served:
                if is_served:
                    _Handler(ready, self.respond)
        except OSError as problem:
            _log.debug("a connection to the API failed: %s", problem)

    def _shaken(self, connection: socket.socket) -> socket.socket:
        """Return the connection after the TLS handshake, if any."""
        connection.settimeout(_HANDSHAKE_S)
        return connection if self.tls is None else self.tls.wrap_socket(connection, server_side=True)

    @contextlib.contextmanager
    def _counted(self, connection: socket.socket) -> Iterator[bool]:
        with self._changed:
            self._open.add(connection)
            is_served = not self._is_ending
        try:
            yield is_served
        finally:
            with self._changed:
                self._open.discard(connection)
                self._changed.notify_all()


class _Malformed(Exception):
    """The bytes are no request that is served here; the connection ends with this status."""


class _Handler(StreamRequestHandler):
    """Reads the requests of one connection and sends the responses, each in one piece."""

    disable_nagle_algorithm = True
    timeout = _IDLE_S

    def __init__(self, connection: socket.socket, respond: Callable[[HttpRequest], HttpResponse]) -> None:
        self._respond = respond
        super().__init__(connection, None, None)  # type: ignore[arg-type]

    def handle(self) -> None:
        try:
            while (line := self._line()) is not None:
                if line and not self._exchange(line):
                    return
        except _Malformed as problem:
            self._send(HttpResponse(problem.args[0], headers=(("Connection", "close"),)), has_body=True)

    def _exchange(self, line: str) -> bool:
        """Answer the request that begins with this line; return whether another one may follow."""
        method, target, version = parts if len(parts := line.split()) == 3 else ("", "", "")
        if version not in ("HTTP/1.1", "HTTP/1.0"):
            raise _Malformed(400)
        headers = self._headers()
        length = headers.get("content-length", "0")
        if "transfer-encoding" in headers or not (length.isascii() and length.isdigit() and len(length) < 16):
            raise _Malformed(411)
        if headers.get("expect", "").lower() == "100-continue":
            self.wfile.write(b"HTTP/1.1 100 Continue\r\n\r\n")
        path, _, query = target.partition("?")
        response = self._respond(
            HttpRequest(
                "GET" if method == "HEAD" else method,
                unquote(path),
                dict(parse_qsl(query)) if query else {},
                _session(headers.get("cookie", "")),
                headers.get("content-type", ""),
                self._body(int(length)),
            )
        )
        self._send(response, has_body=method != "HEAD")
        return version == "HTTP/1.1" and headers.get("connection", "").lower() != "close"

    def _line(self) -> str | None:
        """Return a line without its end; None at the end of the connection."""
        line = self.rfile.readline(_LINE_BYTES)
        if len(line) == _LINE_BYTES:
            raise _Malformed(431)
        return line.removesuffix(b"\n").removesuffix(b"\r").decode("latin-1") if line.endswith(b"\n") else None

    def _headers(self) -> dict[str, str]:
        """Return the headers by their names in lower case. Raises _Malformed for what two readers read differently."""
        headers: dict[str, str] = {}
        while line := self._line():
            name, colon, value = line.partition(":")
            name = name.lower()
            is_twice = name == "content-length" and name in headers
            if not colon or not name or name.split() != [name] or is_twice or len(headers) == _MOST_HEADERS:
                raise _Malformed(400)
            headers[name] = value.strip()
        if line is None:
            raise ConnectionError("the connection ended within a request")
        return headers

    def _body(self, length: int) -> bytes:
        """Return the body; of one that is too long the beginning, which is one byte longer than allowed."""
        body = self.rfile.read(min(length, MAX_BODY_BYTES + 1))
        left = length - len(body)
        while left > 0 and (part := self.rfile.read(min(left, 1 << 16))):
            left -= len(part)
        if left:
            raise ConnectionError("the connection ended within a request")
        return body

    def _send(self, response: HttpResponse, *, has_body: bool) -> None:
        lines = [
            f"HTTP/1.1 {response.status} {HTTPStatus(response.status).phrase}",
            *(f"{name}: {value}" for name, value in response.headers),
            f"Date: {formatdate(usegmt=True)}",
            f"Content-Length: {len(response.body)}",
            "\r\n",
        ]
        self.wfile.write("\r\n".join(lines).encode("latin-1") + (response.body if has_body else b""))


def _session(cookies: str) -> str | None:
    pairs = (each.strip().partition("=") for each in cookies.split(";"))
    return next((value for name, _, value in pairs if name == COOKIE), None)
