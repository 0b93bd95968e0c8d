"""One HTTP exchange with one management server: bytes out, status and bytes in, within a deadline.

What the exchange means is decided in `csi_driver.management.session`. Redirects are never followed, proxies and
netrc of the environment are not used, and no cookie jar is kept: the server object owns its cookie.

Requests are prepared by hand and sent by an adapter: `requests.Session` would merge settings that never change here,
and take some from the environment.
"""

from __future__ import annotations

import errno
import http.client
import io
import re
import socket
import ssl
import threading
from concurrent.futures import wait
from functools import partial
from typing import TYPE_CHECKING, NamedTuple
from urllib.parse import urlsplit

import requests
import urllib3
from requests.adapters import HTTPAdapter
from requests.structures import CaseInsensitiveDict
from urllib3.connection import HTTPConnection, HTTPSConnection
from urllib3.connectionpool import ConnectionPool

from csi_driver.background import run_detached
from csi_driver.deadline import Deadline
from csi_driver.errors import DeadlineReached, OutcomeUnknown, ServerUnreachable, StorageUnavailable, Unauthenticated
from csi_driver.management import tls
from csi_driver.management.settings import ManagementSettings

if TYPE_CHECKING:
    from _typeshed import WriteableBuffer as Buffer

_ADDRESS = re.compile(r"[0-9.]+|.*:.*")  # of IPv4 or IPv6: nothing to look up
_CONNECT_TIMEOUT_S = 5.0
_CHUNK_BYTES = 1 << 16


class Reply(NamedTuple):
    """What came back. `cookie` is what the server set with it, ready to be sent, or ''."""

    status: int
    location: str
    cookie: str
    content: bytes


class _NotConnected(Exception):
    """No connection came about, whatever the cause: the request was not sent."""


class _Timed(io.RawIOBase):
    """What a server sends, up to a deadline: the socket's own time-out begins anew with every byte that drips in."""

    def __init__(self, connection: socket.socket, deadline: Deadline) -> None:
        self._connection = connection
        self._raw = connection.makefile("rb", buffering=0)
        self._deadline = deadline

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Buffer) -> int | None:
        left_s = self._deadline.remaining_s()
        if left_s <= 0:
            raise TimeoutError("the answer did not end in time")
        self._connection.settimeout(left_s)
        return self._raw.readinto(buffer)

    def close(self) -> None:
        self._raw.close()
        super().close()


_thread = threading.local()
"""Holds the `deadline` of the exchange that a thread is at."""


class _TimedResponse(http.client.HTTPResponse):
    def __init__(
        self, sock: socket.socket, debuglevel: int = 0, method: str | None = None, url: str | None = None
    ) -> None:
        super().__init__(sock, debuglevel, method, url)
        self.fp.close()
        self.fp = io.BufferedReader(_Timed(sock, _thread.deadline))


def _look_up(host: str, port: int, limit_s: object) -> None:
    """Wait until the name is looked up, no longer than a connection may take: the resolver has time-outs of its own.

    The connection then looks it up again, which a resolver that has just answered does at once.
    """
    if _ADDRESS.fullmatch(host) or not isinstance(limit_s, int | float):
        return
    look_up = partial(socket.getaddrinfo, host, port, type=socket.SOCK_STREAM)
    if wait([run_detached("name-lookup", look_up)], limit_s).not_done:  # the connection's own attempt raises its error
        raise TimeoutError(errno.ETIMEDOUT, f"the name {host} could not be looked up in time")


class _PlainConnection(HTTPConnection):
    response_class = _TimedResponse

    def connect(self) -> None:
        try:
            _look_up(self.host, self.port, self.timeout)
            super().connect()
        except (urllib3.exceptions.HTTPError, OSError, UnicodeError) as error:
            raise _NotConnected from error


class _TlsConnection(HTTPSConnection):
    response_class = _TimedResponse

    # The library tells a handshake that fails or hangs like an answer that does not come.
    def connect(self) -> None:
        try:
            _look_up(self.host, self.port, self.timeout)
            super().connect()
        except (urllib3.exceptions.HTTPError, OSError, UnicodeError) as error:
            raise _NotConnected from error


class _PlainPool(urllib3.HTTPConnectionPool):
    ConnectionCls = _PlainConnection


class _TlsPool(urllib3.HTTPSConnectionPool):
    ConnectionCls = _TlsConnection


class _Adapter(HTTPAdapter):
    """The way to one server, on `terms` alone.

    What the library would do for `verify`, `cert` and `proxies` is left out: it would add the authorities that come
    with it (certifi) to those of `terms`.
    """

    def __init__(self, server: str, terms: ssl.SSLContext | None, most: int) -> None:
        url = urlsplit(server)
        self._place = (url.hostname, url.port, url.scheme)
        self._terms = terms
        super().__init__(pool_connections=1, pool_maxsize=most, max_retries=urllib3.Retry(total=False))

    def init_poolmanager(self, connections: int, maxsize: int, block: bool = False, **pool_kwargs: object) -> None:
        super().init_poolmanager(connections, maxsize, block, ssl_context=self._terms, **pool_kwargs)
        self.poolmanager.pool_classes_by_scheme = {"http": _PlainPool, "https": _TlsPool}

    def get_connection_with_tls_context(self, *_: object, **__: object) -> ConnectionPool:
        pool: ConnectionPool = self.poolmanager.connection_from_host(*self._place)
        return pool

    def cert_verify(self, *_: object) -> None:
        """Leave the connection's terms as they are."""

    def request_url(self, request: requests.PreparedRequest, _proxies: object) -> str:
        return request.path_url

    def build_response(self, req: requests.PreparedRequest, resp: urllib3.BaseHTTPResponse) -> requests.Response:
        """Hand over status and bytes: a jar for cookies and an encoding cost an eighth of a request, for nobody."""
        response = requests.Response()
        response.status_code = resp.status
        response.raw = resp
        response.request = req
        return response


class Transport:
    """A connection pool to one server. Thread-safe. Certificate files are read again when they change."""

    def __init__(self, server: str, settings: ManagementSettings) -> None:
        self.server = server.rstrip("/")
        self._settings = settings
        self._is_tls = urlsplit(self.server).scheme == "https"
        self._headers = {"Accept": "application/json", "User-Agent": settings.driver_name}
        self._lock = threading.Lock()
        self._adapter: _Adapter | None = None
        self._stamp: tls.Stamp = ()
        self._is_closed = False
        if not settings.tls_verify:
            # Said once in our own log (`ManagementSettings.warnings`), not at every connection.
            urllib3.disable_warnings(urllib3.exceptions.InsecureRequestWarning)

    def close(self) -> None:
        """Close the idle connections; requests under way end, and no other one is sent."""
        with self._lock:
            self._is_closed = True
            if self._adapter is not None:
                self._adapter.close()
                self._adapter = None

    def exchange(
        self,
        method: str,
        path: str,
        body: bytes | None,
        cookie: str | None,
        deadline: Deadline,
    ) -> Reply:
        """Send one request and read its whole answer.

        Raises `ServerUnreachable` where it cannot have been read by the server, `OutcomeUnknown` where it may have
        been, `Unauthenticated` where the server refuses our certificate, `DeadlineReached` where the time is up before
        anything is sent.
        """
        left_s = deadline.remaining_s()
        if left_s <= 0:
            raise DeadlineReached(f"an answer of management server {self.server}")
        what = f"{method} {path.partition('?')[0]}"
        is_read = method == "GET"
        _thread.deadline = deadline
        try:
            response = self._current_adapter().send(
                self._prepared(method, path, body, cookie),
                stream=True,
                timeout=(min(left_s, _CONNECT_TIMEOUT_S), left_s),
            )
        except (_NotConnected, urllib3.exceptions.HTTPError, OSError) as error:  # the latter: all of requests' too
            raise self._failure(what, error, is_read=is_read) from error
        content = self._content(what, response.raw, is_read=is_read)
        cookies = response.raw.headers.getlist("Set-Cookie")
        cookie = "; ".join(set_cookie.partition(";")[0].strip() for set_cookie in cookies)
        return Reply(response.status_code, response.raw.headers.get("Location", ""), cookie, content)

    def _prepared(self, method: str, path: str, body: bytes | None, cookie: str | None) -> requests.PreparedRequest:
        headers: CaseInsensitiveDict[str] = CaseInsensitiveDict(self._headers)
        if cookie:
            headers["Cookie"] = cookie
        if body is not None:
            headers["Content-Type"] = "application/json"
            headers["Content-Length"] = str(len(body))
        request = requests.PreparedRequest()
        request.method = method
        request.url = self.server + path
        request.headers = headers
        request.body = body
        return request

    def _current_adapter(self) -> _Adapter:
        """Return the adapter; a new one where the certificate files have changed, so that no old connection is used."""
        stamp = tls.stamp(self._settings) if self._is_tls else ()
        with self._lock:
            if self._is_closed:
                # A new pool would be closed by nobody.
                raise StorageUnavailable(
                    f"management server {self.server} is no longer used: the description of its zone changed; retry"
                )
            if self._adapter is None or stamp != self._stamp:
                made = self._new_adapter()
                if self._adapter is not None:
                    self._adapter.close()
                self._adapter, self._stamp = made, stamp
            return self._adapter

    def _new_adapter(self) -> _Adapter:
        most = self._settings.max_requests_in_flight + 1  # a probe goes beside them
        try:
            terms = tls.context(self._settings) if self._is_tls else None
        except tls.BadCertificateFile as error:
            raise ServerUnreachable(self.server, str(error)) from error
        return _Adapter(self.server, terms, most)

    def _content(self, what: str, response: urllib3.BaseHTTPResponse, *, is_read: bool) -> bytes:
        pieces: list[bytes] = []
        try:
            while piece := response.read1(_CHUNK_BYTES, decode_content=True):
                pieces.append(piece)
        except (urllib3.exceptions.HTTPError, OSError) as error:
            response.close()
            raise self._failure(what, error, is_read=is_read) from error
        response.release_conn()
        return b"".join(pieces)

    def _failure(
        self, what: str, error: Exception, *, is_read: bool
    ) -> ServerUnreachable | OutcomeUnknown | Unauthenticated:
        chain = _chain(error)
        timed_out = any(isinstance(link, _TIMED_OUT) for link in chain)
        if any(_refuses_our_certificate(link) for link in chain):
            return Unauthenticated(
                f"management server {self.server} does not accept the client certificate "
                f"{self._settings.client_certificate or '(none is configured)'} ({_reason(chain)})"
            )
        if any(isinstance(link, (_NotConnected, urllib3.exceptions.NewConnectionError)) for link in chain):
            return ServerUnreachable(self.server, _reason(chain), timed_out=timed_out)
        reason = _reason(chain)
        if self._settings.client_certificate is not None and not timed_out:
            # TLS 1.3 lets the client send before the server has judged it, and a quick end loses the alert.
            reason += f"; it may not accept the client certificate {self._settings.client_certificate}"
        return OutcomeUnknown(self.server, what, reason, timed_out=timed_out, is_read=is_read)


_TIMED_OUT = (urllib3.exceptions.TimeoutError, TimeoutError)
_CERTIFICATE_ALERTS = ("CERTIFICATE", "UNKNOWN_CA", "ACCESS_DENIED")


def _refuses_our_certificate(error: BaseException) -> bool:
    """Tell whether the server said in an alert that our certificate will not do (RFC 8446, section 6)."""
    reason = error.reason if isinstance(error, ssl.SSLError) else None
    return isinstance(reason, str) and "ALERT" in reason and any(word in reason for word in _CERTIFICATE_ALERTS)


def _chain(error: BaseException) -> list[BaseException]:
    """Return the error with all that it wraps, outermost first: the library keeps causes in several places."""
    chain: list[BaseException] = []
    pending: list[object] = [error]
    while pending:
        link = pending.pop(0)
        if isinstance(link, BaseException) and link not in chain:
            chain.append(link)
            pending += [getattr(link, "reason", None), *link.args, link.__cause__, link.__context__]
    return chain


def _reason(chain: list[BaseException]) -> str:
    for link in chain:
        if isinstance(link, ssl.SSLCertVerificationError):
            return f"its certificate cannot be verified: {link.verify_message}"
        if isinstance(link, OSError) and link.strerror:
            return f"{type(link).__name__}: {link.strerror}"
    return type(chain[-1]).__name__
