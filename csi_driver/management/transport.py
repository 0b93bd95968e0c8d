"""One HTTP exchange with one management server: bytes out, status and bytes in, within a deadline.

What the exchange means is decided in `csi_driver.management.session`. Redirects are never followed, proxies and
netrc of the environment are not used, and no cookie jar is kept: the session owns its cookie.

Requests are prepared by hand: `requests.Session.request` spends a third of a call on merging settings that never
change here.
"""

from __future__ import annotations

import ssl
import threading
from typing import NamedTuple

import requests
import urllib3
from requests.adapters import HTTPAdapter
from requests.structures import CaseInsensitiveDict

from csi_driver.deadline import Deadline
from csi_driver.errors import DeadlineReached, OutcomeUnknown, ServerUnreachable
from csi_driver.management.settings import ManagementSettings

_CONNECT_TIMEOUT_S = 5.0
_CHUNK_BYTES = 1 << 16


class Reply(NamedTuple):
    """What came back. `cookie` is what the server set with it, ready to be sent, or ''."""

    status: int
    location: str
    cookie: str
    content: bytes


class Transport:
    """A connection pool to one server. Thread-safe; at most `max_requests_in_flight` requests at once."""

    def __init__(self, server: str, settings: ManagementSettings) -> None:
        self.server = server.rstrip("/")
        self._timeout_s = settings.request_timeout_s
        self._verify = _verify(settings)
        self._certificate = _certificate(settings)
        self._adapter = HTTPAdapter(pool_connections=1, pool_maxsize=settings.max_requests_in_flight)
        self._slots = threading.BoundedSemaphore(settings.max_requests_in_flight)
        self._headers = {"Accept": "application/json", "User-Agent": settings.driver_name}
        if not settings.tls_verify:
            # Said once in our own log (`ManagementSettings.warnings`), not at every connection.
            urllib3.disable_warnings(urllib3.exceptions.InsecureRequestWarning)

    def close(self) -> None:
        """Close the idle connections."""
        self._adapter.close()

    def exchange(self, method: str, path: str, body: bytes | None, cookie: str | None, deadline: Deadline) -> Reply:
        """Send one request and read its whole answer.

        Raises `ServerUnreachable` where it cannot have been read by the server, `OutcomeUnknown` where it may have
        been, `DeadlineReached` where the time is up before anything is sent.
        """
        if not self._slots.acquire(timeout=deadline.remaining_s()):
            raise DeadlineReached(f"a free connection to management server {self.server}", deadline.elapsed_s())
        try:
            return self._exchange(method, path, self._prepared(method, path, body, cookie), deadline)
        finally:
            self._slots.release()

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

    def _exchange(self, method: str, path: str, request: requests.PreparedRequest, deadline: Deadline) -> Reply:
        left_s = min(deadline.remaining_s(), self._timeout_s)
        if left_s <= 0:
            raise DeadlineReached(f"an answer of management server {self.server}", deadline.elapsed_s())
        what = f"{method} {path.partition('?')[0]}"
        try:
            response = self._adapter.send(
                request,
                stream=True,
                timeout=(min(left_s, _CONNECT_TIMEOUT_S), left_s),
                verify=self._verify,
                cert=self._certificate,
                proxies={},
            )
        except requests.RequestException as error:
            raise self._failure(what, error) from error
        except OSError as error:  # a CA file or client certificate that is not there
            raise ServerUnreachable(self.server, str(error)) from error
        content = self._content(what, response, deadline)
        cookie = "; ".join(f"{part.name}={part.value}" for part in response.cookies) if response.cookies else ""
        return Reply(response.status_code, response.headers.get("Location", ""), cookie, content)

    def _content(self, what: str, response: requests.Response, deadline: Deadline) -> bytes:
        # Read piece by piece: the read time-out bounds each wait, only the deadline bounds their sum.
        raw: urllib3.HTTPResponse = response.raw
        pieces: list[bytes] = []
        try:
            while piece := raw.read1(_CHUNK_BYTES, decode_content=True):
                pieces.append(piece)
                if deadline.expired():
                    response.close()
                    raise OutcomeUnknown(self.server, what, "the answer did not end in time", timed_out=True)
        except (urllib3.exceptions.HTTPError, OSError) as error:
            response.close()
            raise self._failure(what, error) from error
        return b"".join(pieces)

    def _failure(self, what: str, error: Exception) -> ServerUnreachable | OutcomeUnknown:
        chain = _chain(error)
        if any(isinstance(link, _NOT_SENT) for link in chain):
            return ServerUnreachable(self.server, _reason(chain))
        timed_out = any(isinstance(link, _TIMED_OUT) for link in chain)
        return OutcomeUnknown(self.server, what, _reason(chain), timed_out=timed_out)


_NOT_SENT = (
    requests.exceptions.ConnectTimeout,
    requests.exceptions.InvalidURL,
    requests.exceptions.InvalidHeader,
    urllib3.exceptions.NewConnectionError,
    urllib3.exceptions.ConnectTimeoutError,
    ssl.SSLCertVerificationError,
)
_TIMED_OUT = (requests.exceptions.ReadTimeout, urllib3.exceptions.ReadTimeoutError, TimeoutError)


def _chain(error: BaseException) -> list[BaseException]:
    """Return the error with all that it wraps, outermost first: the libraries keep causes in several places."""
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
        if isinstance(link, OSError) and link.strerror:
            return f"{type(link).__name__}: {link.strerror}"
    return type(chain[-1]).__name__ if isinstance(chain[0], requests.RequestException) else type(chain[0]).__name__


def _verify(settings: ManagementSettings) -> bool | str:
    if not settings.tls_verify:
        return False
    return True if settings.ca_file is None else str(settings.ca_file)


def _certificate(settings: ManagementSettings) -> str | tuple[str, str] | None:
    if settings.client_certificate is None:
        return None
    if settings.client_key is None:
        return str(settings.client_certificate)
    return str(settings.client_certificate), str(settings.client_key)
