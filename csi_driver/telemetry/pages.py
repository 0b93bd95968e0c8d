# SPDX-License-Identifier: Apache-2.0
"""Health pages and metrics over HTTP/1.0, one request for each connection: `/healthz`, `/readyz` and `/metrics`.

/healthz fails when a restart of this process may help: an unavailable management, a missing tool or a stopped kubelet
must never restart the driver. /readyz fails while the driver cannot work. A page has one execution at a time.
"""

from __future__ import annotations

import io
import logging
import socket
import socketserver
import threading
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import Future
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Self
from urllib.parse import urlsplit

from csi_driver.background import run_detached
from csi_driver.errors import PreconditionFailed, one_line
from csi_driver.http_server import BoundedServer, LimitedHandler, LimitedReader
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


class PageServer(BoundedServer):
    """Serves pages inside a with-block. Raises `PreconditionFailed` when the address is not available."""

    most_connections = MOST_CONNECTIONS
    request_queue_size = 128

    def __init__(self, settings: HttpSettings, pages: Pages) -> None:
        self._pages = pages
        self._lock = threading.Lock()
        self._making: dict[str, Future[Page]] = {}
        try:
            # For a string the resolver loads the tables of international names: 1 MiB.
            host = settings.host.encode() if settings.host.isascii() else settings.host
            self.address_family, _, _, _, address = _resolve(host, settings.port)
            super().__init__(address, _Handler)
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
        self.hang_up(socket.SHUT_RDWR)

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

    def server_bind(self) -> None:
        """Bind without the reverse look-up of the host's name that `HTTPServer` does."""
        if self.address_family == socket.AF_INET6:
            self.socket.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 0)  # [::] includes IPv4
        socketserver.TCPServer.server_bind(self)


class _Handler(LimitedHandler):
    server: PageServer

    def setup(self) -> None:
        super().setup()
        reader = LimitedReader(self.connection, REQUEST_LIMIT_BYTES)
        reader.begin(REQUEST_TIME_S)
        self.rfile = io.BufferedReader(reader)

    def parse_request(self) -> bool:
        return super().parse_request() and self.server.begins_request(self.connection)

    def do_GET(self) -> None:
        page = self.server.page(urlsplit(self.path).path)
        body = page.text.encode()
        self.connection.settimeout(REQUEST_TIME_S)
        self.send_response_only(page.status)
        self.send_header("Content-Type", page.content_type)
        self.send_header("Content-Length", str(len(body)))
        self.send_header("Cache-Control", "no-store")
        self.send_header("Connection", "close")
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    do_HEAD = do_GET


def _resolve(host: bytes | str, port: int) -> tuple[socket.AddressFamily, int, int, str, tuple[object, ...]]:
    if not host:
        try:
            with socket.socket(socket.AF_INET6) as probe:
                probe.bind(("::", 0))
            host = b"::"
        except OSError:  # the kernel has no IPv6, or it is switched off
            host = b"0.0.0.0"
    return socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)[0]
