"""A very small HTTP server for a handful of pages that are asked for by probes and collectors.

Only GET and HEAD of known paths; a connection serves one request. One thread waits on all connections, so that a client
that sends slowly, or nothing, or endlessly, costs a socket for a few seconds and no thread; the oldest of too many is
dropped. A page is made in a thread of its own, once for all who ask for it meanwhile: nobody makes this process do a
thing twice at the same time. The standard library's server has a thread per connection, limits neither the whole time
of a request nor the number of threads, and loads an HTTP client.
"""

from __future__ import annotations

import contextlib
import errno
import logging
import queue
import selectors
import socket
import threading
import time
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from enum import Enum, auto
from types import TracebackType
from typing import Self

from csi_driver.errors import PreconditionFailed
from csi_driver.settings import HttpSettings

_LOG = logging.getLogger(__name__)

TEXT = "text/plain; charset=utf-8"

MOST_CONNECTIONS = 64
REQUEST_TIME_S = 5.0
"""For the whole head of a request, and again for a client to take the answer."""
_PAGE_TIME_S = 30.0  # far more than any page takes; its maker has limits of its own
_HEAD_LIMIT_BYTES = 8 << 10
_CHUNK_BYTES = 16 << 10
_BACKLOG = 128
_FULL_PAUSE_S = 0.1
_NO_IPV6 = (errno.EAFNOSUPPORT, errno.EADDRNOTAVAIL)  # where the kernel has none, or it is switched off

_REASONS = {
    200: "OK", 400: "Bad Request", 404: "Not Found", 405: "Method Not Allowed", 408: "Request Timeout",
    431: "Request Header Fields Too Large", 500: "Internal Server Error", 503: "Service Unavailable",
    505: "HTTP Version Not Supported",
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class Answer:
    """A page, or why there is none. The text ends with a newline."""

    status: int
    text: str
    kind: str = TEXT


Pages = Mapping[str, Callable[[], Answer]]
"""Path to what makes the page. Called in a thread; must end by itself."""


class _State(Enum):
    """What is to happen next with a connection, from accepted to closed."""

    READING = auto()
    WAITING = auto()
    """Its page is being made."""
    WRITING = auto()
    ANSWERED = auto()
    """Nothing is left to send: what still comes is thrown away, as closing over it would take the answer back."""


@dataclass(slots=True, eq=False)
class _Client:
    """A connection. It is dropped at `until_s`."""

    connection: socket.socket
    until_s: float
    state: _State = _State.READING
    head: bytearray = field(default_factory=bytearray)
    wants_body: bool = True
    answer: memoryview = field(default_factory=lambda: memoryview(b""))


class HttpServer:
    """Serves pages inside a with-block. Raises `PreconditionFailed` where the address cannot be had."""

    def __init__(self, settings: HttpSettings, pages: Pages) -> None:
        self._pages = pages
        self._listener = _bound(settings)
        self._waker, self._wakes = socket.socketpair()
        self._selector = selectors.DefaultSelector()
        self._clients: dict[_Client, None] = {}
        self._waiting: dict[str, list[_Client]] = {}
        self._made: queue.SimpleQueue[tuple[str, Future[Answer]]] = queue.SimpleQueue()
        self._makers = ThreadPoolExecutor(max(1, len(pages)), thread_name_prefix="http-page")
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._run, name="http", daemon=True)

    @property
    def address(self) -> HttpSettings:
        """The address that it listens on."""
        host, port, *_ = self._listener.getsockname()
        return HttpSettings(host, port)

    def __enter__(self) -> Self:
        self._thread.start()
        _LOG.info("serving %s over HTTP on %s", ", ".join(self._pages), self.address)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._ended.set()
        self._wake()
        self._thread.join()
        self._makers.shutdown(wait=False, cancel_futures=True)
        for each in (self._listener, self._wakes, self._waker, *(client.connection for client in self._clients)):
            each.close()
        self._selector.close()

    def _wake(self) -> None:
        with contextlib.suppress(BlockingIOError):
            self._wakes.send(b"w")

    # --- the loop -----------------------------------------------------------------------------------------------

    def _run(self) -> None:
        for each in (self._listener, self._waker, self._wakes):
            each.setblocking(False)
        self._selector.register(self._listener, selectors.EVENT_READ, self._accept)
        self._selector.register(self._waker, selectors.EVENT_READ, self._take_pages)
        while not self._ended.is_set():
            for key, _ in self._selector.select(self._patience_s()):
                if isinstance(key.data, _Client):
                    self._serve(key.data)
                else:
                    key.data()
            self._drop_late()

    def _patience_s(self) -> float | None:
        """Return how long nothing may happen; without clients: for ever."""
        if not self._clients:
            return None
        return max(0.0, min(client.until_s for client in self._clients) - time.monotonic())

    def _drop_late(self) -> None:
        now_s = time.monotonic()
        for client in [client for client in self._clients if client.until_s <= now_s]:
            if client.state is _State.WAITING:
                self._answer(client, Answer(503, f"the page took longer than {_PAGE_TIME_S:.0f} s\n"))
            elif client.state is _State.READING and client.head:
                self._answer(client, Answer(408, f"the request was incomplete after {REQUEST_TIME_S:.0f} s\n"))
            else:
                self._drop(client)

    def _accept(self) -> None:
        try:
            connection, _ = self._listener.accept()
        except OSError:  # gone again, or no descriptor is left: the others get time to end
            self._ended.wait(_FULL_PAUSE_S)
            return
        connection.setblocking(False)
        if len(self._clients) >= MOST_CONNECTIONS:
            idle = (each for each in self._clients if each.state in (_State.READING, _State.ANSWERED))
            self._drop(next(idle, next(iter(self._clients))))
        client = _Client(connection, time.monotonic() + REQUEST_TIME_S)
        self._clients[client] = None
        self._selector.register(connection, selectors.EVENT_READ, client)

    def _drop(self, client: _Client) -> None:
        self._clients.pop(client, None)
        with contextlib.suppress(KeyError, ValueError):
            self._selector.unregister(client.connection)
        client.connection.close()

    # --- one connection -----------------------------------------------------------------------------------------

    def _serve(self, client: _Client) -> None:
        try:
            if client.state is _State.WRITING:
                self._send(client)
            elif self._receive(client):
                self._ask(client)
        except BlockingIOError:
            return
        except OSError:  # the client went away
            self._drop(client)

    def _receive(self, client: _Client) -> bool:
        """Take what came; tell whether it is a whole request now."""
        data = client.connection.recv(_CHUNK_BYTES)
        if not data:
            self._drop(client)
            return False
        if client.state is _State.ANSWERED:
            return False
        client.head += data
        if b"\r\n\r\n" in client.head or b"\n\n" in client.head:
            return True
        if len(client.head) > _HEAD_LIMIT_BYTES:
            self._answer(client, Answer(431, f"the request's head is longer than {_HEAD_LIMIT_BYTES} bytes\n"))
        return False

    def _ask(self, client: _Client) -> None:
        """Read the request, and have its page made, or wait for one that is being made."""
        refusal, path, client.wants_body = _understood(client.head, self._pages)
        if refusal is not None:
            self._answer(client, refusal)
            return
        self._selector.unregister(client.connection)
        client.state, client.until_s = _State.WAITING, time.monotonic() + _PAGE_TIME_S
        if path in self._waiting:
            self._waiting[path].append(client)
            return
        self._waiting[path] = [client]
        future = self._makers.submit(self._pages[path])
        future.add_done_callback(lambda done: self._hand_over(path, done))

    def _hand_over(self, path: str, done: Future[Answer]) -> None:
        """Give a page that is made to the loop. Called in the thread that made it."""
        self._made.put((path, done))
        if not self._ended.is_set():
            self._wake()

    def _take_pages(self) -> None:
        with contextlib.suppress(BlockingIOError):
            self._waker.recv(_CHUNK_BYTES)
        while not self._made.empty():
            path, done = self._made.get()
            answer = _result(path, done)
            for client in self._waiting.pop(path, ()):
                if client in self._clients and client.state is _State.WAITING:
                    self._answer(client, answer)

    def _answer(self, client: _Client, answer: Answer) -> None:
        body = answer.text.encode()
        allow = "Allow: GET, HEAD\r\n" if answer.status == 405 else ""
        head = (
            f"HTTP/1.1 {answer.status} {_REASONS[answer.status]}\r\nContent-Type: {answer.kind}\r\n"
            f"Content-Length: {len(body)}\r\n{allow}Cache-Control: no-store\r\nConnection: close\r\n\r\n"
        ).encode("ascii")
        client.answer = memoryview(head + body if client.wants_body else head)
        client.state, client.until_s = _State.WRITING, time.monotonic() + REQUEST_TIME_S
        with contextlib.suppress(KeyError):
            self._selector.unregister(client.connection)
        self._selector.register(client.connection, selectors.EVENT_WRITE, client)

    def _send(self, client: _Client) -> None:
        client.answer = client.answer[client.connection.send(client.answer) :]
        if client.answer:
            return
        client.state = _State.ANSWERED
        client.connection.shutdown(socket.SHUT_WR)
        self._selector.modify(client.connection, selectors.EVENT_READ, client)


def _result(path: str, done: Future[Answer]) -> Answer:
    if done.cancelled():
        return Answer(503, "this process is shutting down\n")
    error = done.exception()
    if error is not None:
        _LOG.error("%s met a bug in the driver", path, exc_info=error)
        return Answer(500, "internal error in the driver; its log has the details\n")
    return done.result()


def _understood(head: bytes | bytearray, pages: Pages) -> tuple[Answer | None, str, bool]:
    """Read the request's first line: why it is refused, else None; its path; and whether a body is wanted."""
    words = bytes(head).split(b"\n", 1)[0].decode("latin-1").split()
    if len(words) != 3 or not words[2].startswith("HTTP/"):
        return Answer(400, "expected an HTTP request\n"), "", True
    method, target, version = words
    path = _path_of(target)
    wants_body = method != "HEAD"
    if not version.startswith("HTTP/1."):
        return Answer(505, "expected HTTP/1.0 or HTTP/1.1\n"), path, wants_body
    if path not in pages:
        return Answer(404, f"not found; the pages are {', '.join(pages)}\n"), path, wants_body
    if method not in ("GET", "HEAD"):
        return Answer(405, "expected GET or HEAD\n"), path, wants_body
    return None, path, wants_body


def _path_of(target: str) -> str:
    """Return the path of a request's target, which may be a whole URL (RFC 9112, section 3.2)."""
    if target.startswith("http://"):
        target = "/" + target.removeprefix("http://").partition("/")[2]
    return target.partition("?")[0]


def _bound(settings: HttpSettings) -> socket.socket:
    if settings.host:
        return _listening(settings)
    try:
        return _listening(HttpSettings("::", settings.port))
    except PreconditionFailed as error:
        if not isinstance(error.__cause__, OSError) or error.__cause__.errno not in _NO_IPV6:
            raise
        return _listening(HttpSettings("0.0.0.0", settings.port))


def _listening(settings: HttpSettings) -> socket.socket:
    try:
        # For text Python loads its tables of international names, 1 MiB, before it looks what the text is.
        host = settings.host.encode() if settings.host.isascii() else settings.host
        found = socket.getaddrinfo(host, settings.port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
        family, kind, protocol, _, address = found[0]
        listener = socket.socket(family, kind, protocol)
    except OSError as error:
        raise PreconditionFailed(f"cannot listen on {settings}: {error}") from error
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if family == socket.AF_INET6:
            # [::] is every address of the machine, also those of IPv4.
            listener.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 0)
        listener.bind(address)
        listener.listen(_BACKLOG)
    except OSError as error:
        listener.close()
        raise PreconditionFailed(f"cannot listen on {settings}: {error.strerror}") from error
    return listener
