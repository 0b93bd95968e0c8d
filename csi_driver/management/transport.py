# SPDX-License-Identifier: Apache-2.0
"""Send one HTTP request to one management server, within a deadline.

The standard library's `HTTPConnection`, kept open between requests. No library above it: those follow redirects, keep
cookies, take proxies and passwords (netrc) from the environment, repeat requests, or limit each read only.
"""

from __future__ import annotations

import contextlib
import errno
import http.client
import io
import json
import re
import select
import socket
import ssl
import threading
from collections.abc import Iterator
from concurrent.futures import wait
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, cast
from urllib.parse import unquote, urlsplit

from csi_driver.background import run_detached
from csi_driver.deadline import Deadline
from csi_driver.errors import DeadlineReached, OutcomeUnknown, ServerUnreachable, StorageUnavailable, Unauthenticated
from csi_driver.management.settings import ManagementSettings
from csi_driver.telemetry import tracing

if TYPE_CHECKING:
    from _typeshed import WriteableBuffer as Buffer

_IP_ADDRESS = re.compile(r"[0-9.]+|.*:.*")
_CONNECT_TIMEOUT_S = 5.0
_LEAST_TIMEOUT_S = 0.001
"""A socket takes 0 for "do not wait"."""


@dataclass(frozen=True, slots=True)
class Request:
    """A request. `is_repeatable`: twice has the effect of once. `is_secret`: no text of the response is ever shown."""

    method: str
    path: str
    body: bytes | None = field(default=None, repr=False)
    is_repeatable: bool = True
    is_secret: bool = False

    @property
    def what(self) -> str:
        return f"{self.method} {self.path.partition('?')[0]}"


@dataclass(frozen=True, slots=True)
class Response:
    """A response; `is_json` is False, and `body` None, where it cannot be decoded. `cookie`: as a request sends it."""

    status: int
    body: object = field(repr=False)
    is_json: bool
    content: bytes = field(repr=False)
    location: str
    cookie: str = field(repr=False)


class BadCertificateFile(Exception):
    """A certificate file cannot be used. `what` names it."""

    def __init__(self, what: str, error: OSError) -> None:
        reason = getattr(error, "reason", None) or error.strerror or "it holds no certificate"
        super().__init__(f"{what} cannot be used: {reason}")


def _certificate_version(settings: ManagementSettings) -> list[tuple[int, int, int]]:
    version = []
    for path in (settings.ca_file, settings.client_certificate, settings.client_key):
        if path is not None:
            with contextlib.suppress(OSError):
                status = path.stat()
                version.append((status.st_ino, status.st_mtime_ns, status.st_size))
    return version


def tls_context(settings: ManagementSettings) -> ssl.SSLContext:
    """Load the certificate files. Raises `BadCertificateFile`."""
    if settings.ca_file is None:
        context = ssl.create_default_context()
    else:
        # Without the system's CA certificates: a named CA is the only one trusted.
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
        try:
            context.load_verify_locations(cafile=settings.ca_file)
        except OSError as error:
            raise BadCertificateFile(f"the CA file {settings.ca_file}", error) from error
    if not settings.tls_verify:
        context.check_hostname = False
        context.verify_mode = ssl.CERT_NONE
    if settings.client_certificate is not None:
        try:
            # The empty password keeps an encrypted key from asking for one at the terminal.
            context.load_cert_chain(settings.client_certificate, settings.client_key, password=b"")
        except OSError as error:
            key = f" with the key {settings.client_key}" if settings.client_key is not None else ""
            raise BadCertificateFile(f"the client certificate {settings.client_certificate}{key}", error) from error
    return context


class _NotConnected(Exception):
    """The connection failed before the request was sent."""


class _IncompleteResponse(Exception):
    """The connection ended within the response."""


class _ResponseReader(io.RawIOBase):
    """Reads a socket until a deadline: the socket's own timeout starts again with each byte of a slow response."""

    def __init__(self, connection: socket.socket, deadline: Deadline) -> None:
        self._connection = connection
        self._raw = connection.makefile("rb", buffering=0)
        self._deadline = deadline

    def makefile(self, mode: str) -> io.BufferedReader:
        """Return the stream that `HTTPResponse` reads."""
        return io.BufferedReader(self)

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Buffer) -> int | None:
        left_s = self._deadline.remaining_s()
        if left_s <= 0:
            raise TimeoutError("the response did not end in time")
        self._connection.settimeout(left_s)
        return self._raw.readinto(buffer)

    def close(self) -> None:
        self._raw.close()
        super().close()


class _Connection(http.client.HTTPConnection):
    """A connection with a deadline for the whole response and for the name lookup.

    `_NotConnected` tells a failed connection (TLS handshake included) from a request that may have been executed.
    """

    deadline: Deadline
    _pieces: list[bytes]

    def __init__(self, host: str, port: int, **options: ssl.SSLContext) -> None:
        # The dot that ends an absolute name is for the resolver only: certificates and servers know none.
        super().__init__(host.rstrip("."), port, **options)  # type: ignore[arg-type]
        self._name = host
        del self._create_connection  # the library's, in favour of that of the class

    def __del__(self) -> None:
        """Close a connection after its transport was dropped; a socket would only warn."""
        self.close()

    def connect(self) -> None:
        try:
            super().connect()
        except (OSError, UnicodeError) as error:
            raise _NotConnected from error

    def _create_connection(self, _address: object, timeout_s: float, *_: object) -> socket.socket:
        _resolve(self._name, self.port, timeout_s)
        return socket.create_connection((self._name, self.port), timeout_s)

    def response_class(self, sock: socket.socket, method: str | None) -> http.client.HTTPResponse:  # type: ignore[override]
        return http.client.HTTPResponse(cast("socket.socket", _ResponseReader(sock, self.deadline)), method=method)

    def send(self, data: bytes) -> None:  # type: ignore[override]
        """Collect the pieces of a request: one packet wakes the server once."""
        self._pieces.append(data)

    def is_quiet(self) -> bool:
        """Return whether nothing has arrived since the last response, neither bytes nor the end of the connection."""
        poll = select.poll()
        poll.register(self.sock, select.POLLIN)
        return not poll.poll(0)

    def exchange(
        self, request: Request, headers: dict[str, str], deadline: Deadline
    ) -> tuple[http.client.HTTPResponse, bytes]:
        """Connect if needed, send a request, and read its whole response."""
        self.deadline = deadline
        if self.sock is None:
            self.timeout = min(deadline.remaining_s(), _CONNECT_TIMEOUT_S)
            self.connect()
        self.sock.settimeout(max(deadline.remaining_s(), _LEAST_TIMEOUT_S))
        self._pieces = []
        self.request(request.method, request.path, request.body, headers)
        self.sock.sendall(b"".join(self._pieces))
        # It takes any length that a response has, and 102 and 103 for the response that follows them.
        unreadable = (http.client.IncompleteRead, MemoryError, OverflowError, ValueError)
        with self.getresponse() as response, contextlib.suppress(*unreadable):
            content = response.read()
            if response.status >= http.client.OK:
                return response, content
        # Without the cause, which may have the content: it may quote a password.
        raise _IncompleteResponse


class _TlsConnection(_Connection, http.client.HTTPSConnection):
    pass


def _resolve(host: str, port: int, timeout_s: float) -> None:
    """Look up the name for at most `timeout_s`; the resolver's own timeouts may be longer."""
    if _IP_ADDRESS.fullmatch(host):
        return
    lookup = run_detached("name-lookup", lambda: socket.getaddrinfo(host, port, type=socket.SOCK_STREAM))
    if wait([lookup], timeout_s).not_done:  # the connection reports its error
        raise TimeoutError(errno.ETIMEDOUT, f"the name {host} could not be looked up in time")


class Transport:
    """Connections to one server. Thread-safe. Certificate files are read again when they change."""

    def __init__(self, server: str, settings: ManagementSettings) -> None:
        self.server = server.rstrip("/")
        self._settings = settings
        self._is_tls = urlsplit(self.server).scheme == "https"
        self._headers = {"Accept": "application/json", "User-Agent": settings.driver_name}
        self._lock = threading.Lock()
        self._idle: list[_Connection] = []
        """Open connections without a request, as many as requests were sent at once."""
        self._context: ssl.SSLContext | None = None
        self._version: list[tuple[int, int, int]] | None = None
        self._is_closed = False

    def close(self) -> None:
        with self._lock:
            self._is_closed = True
            self._close_idle()

    def _close_idle(self) -> None:
        for connection in self._idle:
            connection.close()
        self._idle = []

    def exchange(self, request: Request, cookie: str | None, deadline: Deadline) -> Response:
        """Send one request and read its whole response.

        Raises `ServerUnreachable` where the server certainly did not execute the request, `OutcomeUnknown` where it
        may have, `Unauthenticated` where it rejects the client certificate, `DeadlineReached` where no time is left.
        """
        if deadline.expired():
            raise DeadlineReached(f"a response of management server {self.server}")
        headers = dict(self._headers)
        if cookie:
            headers["Cookie"] = cookie
        if request.body is not None:
            headers["Content-Type"] = "application/json"
        try:
            with tracing.sent(request.method, request.path, headers) as span, self._connection() as connection:
                response, content = connection.exchange(request, headers, deadline)
                if span is not None:
                    tracing.describe(span, server=self.server, status=response.status)
        except (_NotConnected, _IncompleteResponse, http.client.HTTPException, OSError) as error:
            raise self._failure(request, error) from error
        return _decode(
            response.status,
            content,
            response.headers.get("Location", ""),
            "; ".join(one.partition(";")[0].strip() for one in response.headers.get_all("Set-Cookie", ())),
            session_id=(cookie or "").partition("=")[2],
        )

    @contextlib.contextmanager
    def _connection(self) -> Iterator[_Connection]:
        """Lend a connection, and keep it for the next request unless an exception ends its use."""
        connection, idle = self._take()
        try:
            yield connection
        except BaseException:
            connection.close()
            raise
        with self._lock:
            if connection.sock is not None and idle is self._idle:
                idle.append(connection)
                return
        connection.close()

    def _take(self) -> tuple[_Connection, list[_Connection]]:
        """Return a connection, and the list that it belongs to: no old one after a change of the certificate files."""
        version = _certificate_version(self._settings) if self._is_tls else []
        with self._lock:
            if self._is_closed:
                # A new connection would never be closed.
                raise StorageUnavailable(
                    f"management server {self.server} is no longer used: the settings of its zone changed; retry"
                )
            if version != self._version:
                try:
                    self._context = tls_context(self._settings) if self._is_tls else None
                except BadCertificateFile as error:
                    raise ServerUnreachable(self.server, str(error)) from error
                self._close_idle()
                self._version = version
            idle = self._idle
            while idle:
                connection = idle.pop()
                if connection.is_quiet():
                    return connection, idle
                connection.close()
            return self._new_connection(), idle

    def _new_connection(self) -> _Connection:
        url = urlsplit(self.server)
        try:
            if self._context is None:
                return _Connection(url.hostname or "", url.port or http.client.HTTP_PORT)
            return _TlsConnection(url.hostname or "", url.port or http.client.HTTPS_PORT, context=self._context)
        except http.client.InvalidURL as error:  # a host that no name can have
            raise ServerUnreachable(self.server, str(error)) from error

    def _failure(self, request: Request, error: Exception) -> ServerUnreachable | OutcomeUnknown | Unauthenticated:
        chain = _causes(error)
        reason, timed_out = _reason(chain), any(isinstance(cause, TimeoutError) for cause in chain)
        certificate = self._settings.client_certificate
        if any(_rejects_certificate(cause) for cause in chain):
            return Unauthenticated(
                f"management server {self.server} does not accept the client certificate "
                f"{certificate or '(none is configured)'} ({reason})"
            )
        if any(isinstance(cause, _NotConnected) for cause in chain):
            return ServerUnreachable(self.server, reason, timed_out=timed_out)
        if certificate is not None and not timed_out:
            # In TLS 1.3 the client sends before the server has verified it, and a fast close loses the alert.
            reason += f"; it may not accept the client certificate {certificate}"
        is_read = request.method == "GET"
        return OutcomeUnknown(self.server, request.what, reason, timed_out=timed_out, is_read=is_read)


def _decode(status: int, content: bytes, location: str, cookie: str, session_id: str) -> Response:
    """Decode a response, without our session's id: an error page may quote it, and an error shows the page."""
    for secret in {session_id, unquote(session_id)} - {""}:
        content = content.replace(secret.encode(), b"(session)")
        location = location.replace(secret, "(session)")
    try:
        body, is_json = json.loads(content), True
    except (ValueError, RecursionError):
        body, is_json = None, False
    return Response(status, body, is_json, content, location, cookie)


_CERTIFICATE_ALERTS = ("CERTIFICATE", "UNKNOWN_CA", "ACCESS_DENIED")


def _rejects_certificate(error: BaseException) -> bool:
    reason = error.reason if isinstance(error, ssl.SSLError) else None
    return isinstance(reason, str) and "ALERT" in reason and any(word in reason for word in _CERTIFICATE_ALERTS)


def _causes(error: BaseException) -> list[BaseException]:
    """Return the exception and all its causes, outermost first."""
    causes: list[BaseException] = []
    pending: list[object] = [error]
    while pending:
        cause = pending.pop(0)
        if isinstance(cause, BaseException) and cause not in causes:
            causes.append(cause)
            pending += [cause.__cause__, cause.__context__]
    return causes


def _reason(causes: list[BaseException]) -> str:
    for cause in causes:
        if isinstance(cause, ssl.SSLCertVerificationError):
            return f"its certificate cannot be verified: {cause.verify_message}"
        if isinstance(cause, OSError) and cause.strerror:
            return f"{type(cause).__name__}: {cause.strerror}"
    return type(causes[-1]).__name__
