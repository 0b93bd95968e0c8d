# SPDX-License-Identifier: Apache-2.0
"""Send one HTTP request to one management server, within a deadline.

`requests` is used by its public interface: `Request.prepare` and `HTTPAdapter.send`. Not by `Session`, which follows
redirects, keeps cookies, and takes proxies and passwords (netrc) from the environment. Not with `Retry`: urllib3
repeats a request with its full timeout, and only `csi_driver.management.failover` knows which may be repeated.
"""

from __future__ import annotations

import contextlib
import errno
import http.client
import io
import json
import re
import socket
import ssl
import threading
from concurrent.futures import wait
from dataclasses import dataclass, field
from typing import TYPE_CHECKING
from urllib.parse import unquote, urlsplit

import requests
import urllib3
from requests.adapters import HTTPAdapter
from urllib3.connection import HTTPConnection, HTTPSConnection

from csi_driver.background import run_detached
from csi_driver.deadline import Deadline
from csi_driver.errors import DeadlineReached, OutcomeUnknown, ServerUnreachable, StorageUnavailable, Unauthenticated
from csi_driver.management.settings import ManagementSettings

if TYPE_CHECKING:
    from _typeshed import WriteableBuffer as Buffer

_IP_ADDRESS = re.compile(r"[0-9.]+|.*:.*")
_CONNECT_TIMEOUT_S = 5.0
_BUFFER_BYTES = 1 << 16


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


_local = threading.local()
"""Holds the `deadline` of the request that this thread sends."""


class _DeadlineReader(io.RawIOBase):
    """Reads a socket until a deadline: the socket's own timeout starts again with each byte of a slow response."""

    def __init__(self, connection: socket.socket, deadline: Deadline) -> None:
        self._connection = connection
        self._raw = connection.makefile("rb", buffering=0)
        self._deadline = deadline

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


class _TimedResponse(http.client.HTTPResponse):
    def __init__(
        self, sock: socket.socket, debuglevel: int = 0, method: str | None = None, url: str | None = None
    ) -> None:
        super().__init__(sock, debuglevel, method, url)
        self.fp.close()
        self.fp = io.BufferedReader(_DeadlineReader(sock, _local.deadline), _BUFFER_BYTES)


class _Connection(HTTPConnection):
    """A connection with a deadline for the whole response and for the name lookup.

    `_NotConnected` tells a failed connection (TLS handshake included) from a request that may have been executed.
    """

    response_class = _TimedResponse

    def connect(self) -> None:
        try:
            _resolve(self.host, self.port, self.timeout)
            super().connect()
        except (urllib3.exceptions.HTTPError, OSError, UnicodeError) as error:
            raise _NotConnected from error


class _TlsConnection(_Connection, HTTPSConnection):
    pass


class _Pool(urllib3.HTTPConnectionPool):
    ConnectionCls = _Connection


class _TlsPool(urllib3.HTTPSConnectionPool):
    ConnectionCls = _TlsConnection


def _content(response: urllib3.BaseHTTPResponse) -> bytes:
    """Read the whole body, which returns the connection to the pool.

    By single system calls: an incomplete `read` raises an exception with the content, which may quote a password.
    """
    pieces = []
    try:
        while piece := response.read1(_BUFFER_BYTES, decode_content=True):
            pieces.append(piece)
    except BaseException:
        response.close()
        raise
    response.release_conn()
    return b"".join(pieces)


def _resolve(host: str, port: int, timeout_s: object) -> None:
    """Look up the name for at most `timeout_s`; the resolver's own timeouts may be longer."""
    if _IP_ADDRESS.fullmatch(host) or not isinstance(timeout_s, int | float):
        return
    lookup = run_detached("name-lookup", lambda: socket.getaddrinfo(host, port, type=socket.SOCK_STREAM))
    if wait([lookup], timeout_s).not_done:  # the connection reports its error
        raise TimeoutError(errno.ETIMEDOUT, f"the name {host} could not be looked up in time")


class _Adapter(HTTPAdapter):
    """Connects with our TLS context only. Both methods are hooks of `requests` for subclasses."""

    def __init__(self, context: ssl.SSLContext | None, connections: int) -> None:
        self._context = context
        super().__init__(pool_connections=1, pool_maxsize=connections)

    def init_poolmanager(self, connections: int, maxsize: int, block: bool = False, **options: object) -> None:
        super().init_poolmanager(connections, maxsize, block, ssl_context=self._context, **options)
        self.poolmanager.pool_classes_by_scheme = {"http": _Pool, "https": _TlsPool}

    def cert_verify(self, *args: object, **options: object) -> None:
        """Add no CA certificates: `requests` would add those of certifi to the context."""


class Transport:
    """A connection pool to one server. Thread-safe. Certificate files are read again when they change."""

    def __init__(self, server: str, settings: ManagementSettings) -> None:
        self.server = server.rstrip("/")
        self._settings = settings
        self._is_tls = urlsplit(self.server).scheme == "https"
        self._headers = {"Accept": "application/json", "User-Agent": settings.driver_name}
        self._lock = threading.Lock()
        self._adapter: _Adapter | None = None
        self._version: list[tuple[int, int, int]] = []
        self._is_closed = False
        if not settings.tls_verify:
            # `ManagementSettings.warnings` warns once, urllib3 for each connection.
            urllib3.disable_warnings(urllib3.exceptions.InsecureRequestWarning)

    def close(self) -> None:
        with self._lock:
            self._is_closed = True
            if self._adapter is not None:
                self._adapter.close()
                self._adapter = None

    def exchange(self, request: Request, cookie: str | None, deadline: Deadline) -> Response:
        """Send one request and read its whole response.

        Raises `ServerUnreachable` where the server certainly did not execute the request, `OutcomeUnknown` where it
        may have, `Unauthenticated` where it rejects the client certificate, `DeadlineReached` where no time is left.
        """
        left_s = deadline.remaining_s()
        if left_s <= 0:
            raise DeadlineReached(f"a response of management server {self.server}")
        headers = dict(self._headers)
        if cookie:
            headers["Cookie"] = cookie
        if request.body is not None:
            headers["Content-Type"] = "application/json"
        _local.deadline = deadline
        try:
            prepared = requests.Request(
                request.method, self.server + request.path, headers, data=request.body
            ).prepare()
            response = self._current_adapter().send(
                prepared,
                stream=True,
                timeout=(min(left_s, _CONNECT_TIMEOUT_S), left_s),
                verify=self._settings.tls_verify,
            )
            content = _content(response.raw)
        except requests.exceptions.InvalidURL as error:  # a host that no name can have
            raise ServerUnreachable(self.server, str(error)) from error
        except (_NotConnected, urllib3.exceptions.HTTPError, OSError) as error:  # the latter has all of requests
            raise self._failure(request, error) from error
        cookies = response.raw.headers.getlist("Set-Cookie")
        return _decode(
            response.status_code,
            content,
            response.headers.get("Location", ""),
            "; ".join(set_cookie.partition(";")[0].strip() for set_cookie in cookies),
            session_id=(cookie or "").partition("=")[2],
        )

    def _current_adapter(self) -> _Adapter:
        """Return the adapter; a new one after a change of the certificate files, so that no old connection is used."""
        version = _certificate_version(self._settings) if self._is_tls else []
        with self._lock:
            if self._is_closed:
                # A new pool would never be closed.
                raise StorageUnavailable(
                    f"management server {self.server} is no longer used: the settings of its zone changed; retry"
                )
            if self._adapter is None or version != self._version:
                try:
                    context = tls_context(self._settings) if self._is_tls else None
                except BadCertificateFile as error:
                    raise ServerUnreachable(self.server, str(error)) from error
                if self._adapter is not None:
                    self._adapter.close()
                # One connection more than requests, for a probe.
                self._adapter = _Adapter(context, self._settings.max_requests_in_flight + 1)
                self._version = version
            return self._adapter

    def _failure(self, request: Request, error: Exception) -> ServerUnreachable | OutcomeUnknown | Unauthenticated:
        chain = _causes(error)
        reason, timed_out = _reason(chain), any(isinstance(cause, _TIMEOUTS) for cause in chain)
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


_TIMEOUTS = (urllib3.exceptions.TimeoutError, TimeoutError)
_CERTIFICATE_ALERTS = ("CERTIFICATE", "UNKNOWN_CA", "ACCESS_DENIED")


def _rejects_certificate(error: BaseException) -> bool:
    reason = error.reason if isinstance(error, ssl.SSLError) else None
    return isinstance(reason, str) and "ALERT" in reason and any(word in reason for word in _CERTIFICATE_ALERTS)


def _causes(error: BaseException) -> list[BaseException]:
    """Return the exception and all its causes, outermost first: the libraries keep them in several attributes."""
    causes: list[BaseException] = []
    pending: list[object] = [error]
    while pending:
        cause = pending.pop(0)
        if isinstance(cause, BaseException) and cause not in causes:
            causes.append(cause)
            pending += [getattr(cause, "reason", None), *cause.args, cause.__cause__, cause.__context__]
    return causes


def _reason(causes: list[BaseException]) -> str:
    for cause in causes:
        if isinstance(cause, ssl.SSLCertVerificationError):
            return f"its certificate cannot be verified: {cause.verify_message}"
        if isinstance(cause, OSError) and cause.strerror:
            return f"{type(cause).__name__}: {cause.strerror}"
    return type(causes[-1]).__name__
