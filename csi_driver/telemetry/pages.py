# SPDX-License-Identifier: Apache-2.0
"""Health pages and metrics over HTTP/1.0, one request for each connection: `/healthz`, `/readyz` and `/metrics`.

/healthz fails when a restart of this process may help: an unavailable management, a missing tool or a stopped kubelet
must never restart the driver. /readyz fails while the driver cannot work. The standard library's server gets limits: of
time, size, connections, and one execution of a page at a time.
"""

from __future__ import annotations

import io
import logging
import socket
import socketserver
import threading
import time
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import Future
from contextlib import AbstractContextManager, nullcontext, suppress
from dataclasses import dataclass
from functools import partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Self
from urllib.parse import urlsplit

from csi_driver.background import run_detached
from csi_driver.errors import PreconditionFailed, one_line
from csi_driver.settings import HttpSettings
from csi_driver.telemetry.metrics import CONTENT_TYPE, Metric, exposition

_LOG = logging.getLogger(__name__)

HEALTHY, READY, METRICS = "/healthz", "/readyz", "/metrics"
TEXT = "text/plain; charset=utf-8"

MOST_CONNECTIONS = 64
REQUEST_TIME_S = 5.0
"""To receive a request, and again to send the response."""
REQUEST_LIMIT_BYTES = 8 << 10
_PAGE_TIME_S = 30.0  # far more than any page takes; the checks have limits of their own

Check = Callable[[], str]
"""Returns why it fails, "" when it does not; within a few seconds."""


@dataclass(frozen=True, slots=True)
class Page:
    """The content of a page. The text ends with a newline."""

    status: int
    text: str
    content_type: str = TEXT


Pages = Mapping[str, Callable[[], Page]]
"""Path to the function that makes the page, in a thread of its own."""


def serving(
    settings: HttpSettings | None,
    *,
    healthy: Mapping[str, Check],
    ready: Mapping[str, Check],
    measurements: Iterable[Metric],
) -> AbstractContextManager[object]:
    """Serve the pages inside a with-block; nothing where no address is configured."""
    if settings is None:
        return nullcontext()
    metrics = tuple(measurements)
    return PageServer(
        settings,
        {
            HEALTHY: partial(health, healthy),
            READY: partial(health, ready),
            METRICS: lambda: Page(200, exposition(metrics), CONTENT_TYPE),
        },
    )


def health(checks: Mapping[str, Check]) -> Page:
    results = {name: check() for name, check in checks.items()}
    lines = [f"{name}: {one_line(why) or 'ok'}\n" for name, why in results.items()]
    return Page(503 if any(results.values()) else 200, "".join(lines))


class PageServer(ThreadingHTTPServer):
    """Serves pages inside a with-block. Raises `PreconditionFailed` when the address is not available."""

    block_on_close = False
    daemon_threads = True
    request_queue_size = 128
    poll_s = 0.5
    """Interval at which the server checks for its end."""

    def __init__(self, settings: HttpSettings, pages: Pages) -> None:
        self._pages = pages
        self._lock = threading.Lock()
        self._making: dict[str, Future[Page]] = {}
        self._open: dict[socket.socket, bool] = {}
        """Connections, the oldest first: whether the request has been received."""
        try:
            # For a string the resolver loads the tables of international names: 1 MiB.
            host = settings.host.encode() if settings.host.isascii() else settings.host
            self.address_family, _, _, _, address = _resolve(host, settings.port)
            super().__init__(address, _Handler)  # type: ignore[arg-type]
        except OSError as error:
            raise PreconditionFailed(f"cannot listen on {settings}: {error.strerror or error}") from error

    @property
    def address(self) -> HttpSettings:
        host, port, *_ = self.socket.getsockname()
        return HttpSettings(host, port)

    def __enter__(self) -> Self:
        run_detached("http", partial(self.serve_forever, self.poll_s))
        _LOG.info("serving %s over HTTP on %s", ", ".join(self._pages), self.address)
        return self

    def __exit__(self, *exception: object) -> None:
        self.shutdown()
        self.server_close()
        with self._lock:
            for connection in self._open:
                _hang_up(connection)

    def page(self, path: str) -> Page:
        """Return a page; requests for one page at the same time share its execution."""
        if path not in self._pages:
            return Page(404, f"not found; the pages are {', '.join(self._pages)}\n")
        with self._lock:
            future = self._making.get(path)
            if future is None or future.done():
                future = self._making[path] = run_detached(f"page {path}", self._pages[path])
        try:
            error = future.exception(_PAGE_TIME_S)
        except TimeoutError:
            return Page(503, f"the page took longer than {_PAGE_TIME_S:.0f} s\n")
        if error is not None:
            return Page(500, "internal error in the driver; its log has the details\n")
        return future.result()

    def request_received(self, connection: socket.socket) -> None:
        """Note that a connection sent its request, and so must not be dropped for others."""
        with self._lock:
            if connection in self._open:
                self._open[connection] = True

    def server_bind(self) -> None:
        """Bind without the reverse look-up of the host's name that `HTTPServer` does."""
        if self.address_family == socket.AF_INET6:
            self.socket.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 0)  # [::] includes IPv4
        socketserver.TCPServer.server_bind(self)

    def process_request(self, request: socket.socket, client_address: object) -> None:  # type: ignore[override]
        """Serve a connection in a thread; with too many, drop the oldest that has not sent its request."""
        with self._lock:
            if len(self._open) >= MOST_CONNECTIONS:
                oldest = next((each for each, is_received in self._open.items() if not is_received), None)
                _hang_up(request if oldest is None else oldest)
                self._open.pop(oldest or request, None)
            self._open[request] = False
        run_detached("http-request", partial(self.process_request_thread, request, client_address))

    def shutdown_request(self, request: socket.socket) -> None:  # type: ignore[override]
        with self._lock:
            self._open.pop(request, None)
        super().shutdown_request(request)

    def handle_error(self, request: object, client_address: object) -> None:
        _LOG.debug("an HTTP connection failed", exc_info=True)


class _Handler(BaseHTTPRequestHandler):
    server: PageServer
    server_version = sys_version = ""

    def setup(self) -> None:
        super().setup()
        self.connection.settimeout(REQUEST_TIME_S)
        self.rfile = io.BufferedReader(_Limited(self.connection, time.monotonic() + REQUEST_TIME_S))

    def parse_request(self) -> bool:
        is_valid = super().parse_request()
        self.server.request_received(self.connection)
        return is_valid

    def do_GET(self) -> None:
        page = self.server.page(urlsplit(self.path).path)
        body = page.text.encode()
        self.send_response_only(page.status)
        self.send_header("Content-Type", page.content_type)
        self.send_header("Content-Length", str(len(body)))
        self.send_header("Cache-Control", "no-store")
        self.send_header("Connection", "close")
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    do_HEAD = do_GET

    def log_message(self, format: str, *args: object) -> None:  # noqa: A002  # the library's name
        """Log nothing: probes come every few seconds."""


@dataclass(slots=True)
class _Limited(io.RawIOBase):
    """Reads a request from a socket, with a limit of time and of size."""

    connection: socket.socket
    until_s: float
    """On the monotonic clock."""
    left_bytes: int = REQUEST_LIMIT_BYTES

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: object) -> int:
        left_s = self.until_s - time.monotonic()
        if left_s <= 0 or not self.left_bytes:
            raise TimeoutError("the request took too long, or is too large")
        self.connection.settimeout(left_s)
        view = memoryview(buffer)[: self.left_bytes]  # type: ignore[arg-type]
        read = self.connection.recv_into(view)
        self.left_bytes -= read
        self.connection.settimeout(REQUEST_TIME_S)
        return read


def _resolve(host: bytes | str, port: int) -> tuple[socket.AddressFamily, int, int, str, tuple[object, ...]]:
    if not host:
        try:
            with socket.socket(socket.AF_INET6) as probe:
                probe.bind(("::", 0))
            host = b"::"
        except OSError:  # the kernel has no IPv6, or it is switched off
            host = b"0.0.0.0"
    return socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)[0]


def _hang_up(connection: socket.socket) -> None:
    """End a connection; the thread that serves it then closes it."""
    with suppress(OSError):
        connection.shutdown(socket.SHUT_RDWR)
