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
from functools import partial
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler
from urllib.parse import parse_qsl, unquote, urlsplit

from csi_driver.background import run_detached
from csi_driver.deadline import SYSTEM_CLOCK
from csi_driver.embedded.requests import MAX_BODY_BYTES, HttpRequest, HttpResponse

_log = logging.getLogger(__name__)

COOKIE = "connect.sid"
_BACKLOG = 2048
_HANDSHAKE_S, _IDLE_S = 10.0, 600.0
_PAUSE_S = 0.1
"""After a connection that could not be accepted: there are too many open files."""


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
        except BlockingIOError:
            return
        except OSError as problem:
            _log.error("a connection to the API cannot be accepted: %s", problem)
            SYSTEM_CLOCK.sleep(_PAUSE_S)
            return
        run_detached("storage-connection", partial(self._serve, connection))

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


class _Handler(BaseHTTPRequestHandler):
    """Reads the requests of one connection and sends the responses, each in one piece."""

    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    wbufsize = -1
    timeout = _IDLE_S

    def __init__(self, connection: socket.socket, respond: Callable[[HttpRequest], HttpResponse]) -> None:
        self._respond = respond
        super().__init__(connection, None, None)  # type: ignore[arg-type]

    def _handle(self) -> None:
        headers, target = self.headers, urlsplit(self.path)
        length = headers.get("content-length", "0")
        if "transfer-encoding" in headers or not (length.isascii() and length.isdigit()):
            self.send_error(HTTPStatus.LENGTH_REQUIRED)
            return
        response = self._respond(
            HttpRequest(
                "GET" if self.command == "HEAD" else self.command,
                unquote(target.path),
                dict(parse_qsl(target.query)) if target.query else {},
                _session(headers.get("cookie", "")),
                headers.get("content-type", ""),
                self._body(int(length)),
            )
        )
        self.send_response_only(response.status)
        for name, value in response.headers:
            self.send_header(name, value)
        self.send_header("Date", self.date_time_string())
        self.send_header("Content-Length", str(len(response.body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(response.body)

    do_GET = do_HEAD = do_POST = do_PUT = do_PATCH = do_DELETE = do_OPTIONS = _handle

    def _body(self, length: int) -> bytes:
        """Return the body; of one that is too long the beginning, which is one byte longer than allowed."""
        body = self.rfile.read(min(length, MAX_BODY_BYTES + 1))
        left = length - len(body)
        while left > 0 and (part := self.rfile.read(min(left, 1 << 16))):
            left -= len(part)
        if left:
            raise ConnectionError("the connection ended within a request")
        return body

    def log_message(self, format: str, *args: object) -> None:  # noqa: A002  # the library's name
        """Log nothing: the driver logs its requests."""


def _session(cookies: str) -> str | None:
    pairs = (each.strip().partition("=") for each in cookies.split(";"))
    return next((value for name, _, value in pairs if name == COOKIE), None)
