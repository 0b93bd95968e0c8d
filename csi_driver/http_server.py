# SPDX-License-Identifier: Apache-2.0
"""The standard library's HTTP server with bounds: of connections, and of the time and size of a request."""

from __future__ import annotations

import errno
import io
import logging
import socket
import threading
import time
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

from csi_driver.background import run_detached
from csi_driver.deadline import SYSTEM_CLOCK

_LOG = logging.getLogger(__name__)

_EXHAUSTED = frozenset((errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM))
_PAUSE_S = 0.1


class BoundedServer(ThreadingHTTPServer):
    """Serves each connection in a thread. With too many, it hangs up the one that has waited longest for a request."""

    block_on_close = False
    most_connections: int
    thread_name = "http-request"
    poll_s = 0.5
    """Interval at which the server checks for its end."""

    def __init__(self, address: object, handler: type[LimitedHandler], *, is_bound: bool = False) -> None:
        self._changed = threading.Condition()
        self._open: dict[socket.socket, bool] = {}
        """Connections, that without a request for longest first: whether a request is being carried out."""
        self._is_closing = False
        super().__init__(address, handler, bind_and_activate=not is_bound)  # type: ignore[arg-type]

    def awaits_request(self, connection: socket.socket) -> bool:
        """Note that a connection waits for a request. Returns whether it may."""
        with self._changed:
            if self._open.pop(connection, None) is None or self._is_closing:
                return False
            self._open[connection] = False
            return True

    def begins_request(self, connection: socket.socket) -> bool:
        """Note that a request is complete: its connection is not hung up. Returns whether it may be carried out."""
        with self._changed:
            if connection not in self._open or self._is_closing:
                return False
            self._open[connection] = True
            return True

    def hang_up(self, how: int, wait_s: float = 0) -> None:
        """Begin no other requests, shut the connections down, and wait for their threads. The server has ended."""
        with self._changed:
            self._is_closing = True
            for connection in self._open:
                _shut_down(connection, how)
            self._changed.wait_for(lambda: not self._open, wait_s)

    def get_request(self) -> tuple[socket.socket, object]:
        try:
            return super().get_request()
        except OSError as problem:
            if problem.errno in _EXHAUSTED:
                _pause(problem)
            raise

    def process_request(self, request: socket.socket, client_address: object) -> None:  # type: ignore[override]
        with self._changed:
            if len(self._open) >= self.most_connections:
                oldest = next((each for each, is_running in self._open.items() if not is_running), request)
                _shut_down(oldest, socket.SHUT_RDWR)  # its thread closes it
                self._open.pop(oldest, None)
                if oldest is request:
                    self.close_request(request)
                    return
            self._open[request] = False
        try:
            run_detached(self.thread_name, partial(self.process_request_thread, request, client_address))
        except RuntimeError as problem:  # the limit of threads is reached
            self.shutdown_request(request)
            _pause(problem)

    def shutdown_request(self, request: socket.socket) -> None:  # type: ignore[override]
        super().shutdown_request(request)
        with self._changed:
            self._open.pop(request, None)
            self._changed.notify_all()

    def handle_error(self, request: object, client_address: object) -> None:
        _LOG.debug("an HTTP connection failed", exc_info=True)


class LimitedHandler(BaseHTTPRequestHandler):
    server_version = sys_version = ""

    def log_message(self, format: str, *args: object) -> None:  # noqa: A002  # the library's name
        """Log nothing: requests come every few seconds."""


@dataclass(slots=True)
class LimitedReader(io.RawIOBase):
    """Reads a request from a socket, within a limit of time and of size. Set the socket's timeout before you send."""

    connection: socket.socket
    limit_bytes: int
    _until_s: float = 0
    _left_bytes: int = 0

    def begin(self, time_s: float) -> None:
        self._until_s, self._left_bytes = time.monotonic() + time_s, self.limit_bytes

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: object) -> int:
        left_s = self._until_s - time.monotonic()
        if left_s <= 0 or not self._left_bytes:
            raise TimeoutError("the request took too long, or is too large")
        self.connection.settimeout(left_s)
        read = self.connection.recv_into(memoryview(buffer)[: self._left_bytes])  # type: ignore[arg-type]
        self._left_bytes -= read
        return read


def _pause(problem: Exception) -> None:
    """Wait for connections to end: until then each attempt to accept one fails at once."""
    _LOG.error("an HTTP connection cannot be accepted: %s", problem)
    SYSTEM_CLOCK.sleep(_PAUSE_S)


def _shut_down(connection: socket.socket, how: int) -> None:
    with suppress(OSError):
        socket.socket.shutdown(connection, how)  # of TLS too: its own method lets a response be sent in plain text
