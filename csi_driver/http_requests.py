# SPDX-License-Identifier: Apache-2.0
"""HTTP/1.1 requests: the standard library's server, which refuses what two readers may read differently."""

from __future__ import annotations

import io
import logging
import re
import socket
import ssl
import sys
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from email.utils import formatdate
from http import HTTPStatus
from typing import Protocol
from urllib.parse import parse_qsl, unquote

from csi_driver.http_server import BoundedServer, LimitedHandler, LimitedReader

_log = logging.getLogger(__name__)

MAX_BODY_BYTES = 2 << 20
_MAX_REQUEST_BYTES = 4 << 20
_IDLE_S, _HANDSHAKE_S, _RECEIVE_S, _SEND_S = 600.0, 10.0, 30.0, 60.0

_REQUEST_LINE = re.compile(rb"\S+ \S+ HTTP/1\.[01]\r?\n")
_HEADER = re.compile(rb"[!-9;-~]+:[^\r\n\0]*\r?\n")
_LENGTH = re.compile(r"[0-9]{1,15}")


class Headers(Protocol):
    """Headers by name; the server's are found in any case."""

    def get(self, name: str, default: str, /) -> str: ...

    def items(self) -> Iterable[tuple[str, str]]: ...


@dataclass(frozen=True, slots=True)
class HttpRequest:
    """A request as it was received. `peer`: the client's address, without its port."""

    method: str
    path: str
    query: Mapping[str, str] = field(default_factory=dict)
    headers: Headers = field(default_factory=dict[str, str], repr=False)
    body: bytes = field(default=b"", repr=False)
    peer: str = ""

    @property
    def content_type(self) -> str:
        return self.headers.get("content-type", "")

    def cookie(self, name: str) -> str | None:
        pairs = (each.strip().partition("=") for each in self.headers.get("cookie", "").split(";"))
        return next((value for found, _, value in pairs if found == name), None)


@dataclass(frozen=True, slots=True)
class HttpResponse:
    status: int
    body: bytes = field(default=b"", repr=False)
    headers: tuple[tuple[str, str], ...] = ()


class HttpServer(BoundedServer):
    """Serves a bound socket, which another process may share."""

    request_queue_size = 2048
    most_connections = 512

    def __init__(
        self,
        listener: socket.socket,
        respond: Callable[[HttpRequest], HttpResponse],
        tls: ssl.SSLContext | None,
        failed: HttpResponse,
        thread_name: str,
    ) -> None:
        """`failed`: the response to a request that ends in an unexpected exception, which is logged."""
        super().__init__(listener.getsockname(), _Handler, is_bound=True)
        self.socket.close()
        # The handshake is made in the connection's thread.
        self.socket = tls.wrap_socket(listener, True, do_handshake_on_connect=False) if tls else listener
        self.socket.settimeout(self.poll_s)
        self.respond, self._failed, self.thread_name = respond, failed, thread_name
        self.is_ending = False
        """Accept no further connections; a signal handler may set it."""

    def serve(self) -> None:
        while not self.is_ending:
            self.handle_request()

    def handle_error(self, request: object, client_address: object) -> None:
        if isinstance(sys.exc_info()[1], OSError) or not isinstance(request, socket.socket):
            return super().handle_error(request, client_address)
        _log.exception("a request to the API failed unexpectedly")
        with suppress(OSError):
            request.sendall(_encoded(self._failed, is_last=True))
        return None


class _Lines(io.BufferedReader):
    """Keeps the lines of a request: the library's parser lets some through that are no headers."""

    def __init__(self, raw: io.RawIOBase) -> None:
        super().__init__(raw)
        self.lines: list[bytes] = []

    def readline(self, size: int | None = -1) -> bytes:
        line = super().readline(size)
        if not line.endswith(b"\n") and len(line) != size:
            raise ConnectionError("the connection ended within a request")
        self.lines.append(line)
        return line


class _Handler(LimitedHandler):
    server: HttpServer
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True

    def setup(self) -> None:
        super().setup()
        self._limits = LimitedReader(self.connection, _MAX_REQUEST_BYTES)
        self.rfile = self._input = _Lines(self._limits)
        if isinstance(self.connection, ssl.SSLSocket):
            self.connection.settimeout(_HANDSHAKE_S)
            self.connection.do_handshake()

    def handle_one_request(self) -> None:
        self._limits.begin(_IDLE_S)
        self.close_connection = True
        if self.server.awaits_request(self.connection) and self._input.peek(1):
            self._limits.begin(_RECEIVE_S)
            self._input.lines.clear()
            super().handle_one_request()

    def parse_request(self) -> bool:
        """Refuse also requests that the library accepts and another reader may read differently."""
        if not super().parse_request():
            return False
        first, *headers, _ = self._input.lines
        lengths = self.headers.get_all("Content-Length", ["0"])
        self._length = lengths[0].strip(" \t")
        if (
            len(lengths) != 1
            or len(self.headers.get_all("Host", [])) > 1
            or not (_REQUEST_LINE.fullmatch(first) and all(map(_HEADER.fullmatch, headers)))
        ):
            self.send_error(HTTPStatus.BAD_REQUEST)
        elif "Transfer-Encoding" in self.headers or not _LENGTH.fullmatch(self._length):
            self.send_error(HTTPStatus.LENGTH_REQUIRED)
        else:
            return True
        return False

    def do_GET(self) -> None:
        length = int(self._length)
        most = min(length, MAX_BODY_BYTES + 1)
        body = self.rfile.read(most)
        if len(body) < most or not self.server.begins_request(self.connection):
            self.close_connection = True
            return
        self.close_connection |= most < length
        path, _, query = self.path.partition("?")
        request = HttpRequest(
            "GET" if self.command == "HEAD" else self.command,
            unquote(path),
            dict(parse_qsl(query)),
            self.headers,
            body,
            str(self.client_address[0]),
        )
        self._send(_encoded(self.server.respond(request), has_body=self.command != "HEAD"))

    do_HEAD = do_POST = do_PUT = do_PATCH = do_DELETE = do_OPTIONS = do_GET

    def send_error(self, code: int, message: str | None = None, explain: str | None = None) -> None:
        """End the connection: where the next request begins is unknown."""
        self.close_connection = True
        self._send(_encoded(HttpResponse(code), is_last=True))

    def _send(self, response: bytes) -> None:
        self.connection.settimeout(_SEND_S)
        self.wfile.write(response)


def _encoded(response: HttpResponse, *, has_body: bool = True, is_last: bool = False) -> bytes:
    lines = [
        f"HTTP/1.1 {response.status} {HTTPStatus(response.status).phrase}",
        *(f"{name}: {value}" for name, value in response.headers),
        f"Date: {formatdate(usegmt=True)}",
        f"Content-Length: {len(response.body)}",
        *(["Connection: close"] if is_last else []),
        "\r\n",
    ]
    return "\r\n".join(lines).encode("latin-1") + (response.body if has_body else b"")
