# SPDX-License-Identifier: Apache-2.0
"""Our session on one management server: login, expiry, API version, and the meaning of an HTTP status.

Sessions belong to one server process, so each server has its own cookie.
"""

from __future__ import annotations

import contextlib
import json
import logging
import re
import threading
from dataclasses import replace
from urllib.parse import urlsplit

from csi_driver import errors
from csi_driver.deadline import Deadline
from csi_driver.errors import DriverError, shown
from csi_driver.management.failures import LOGIN_REQUIRED, PASSWORD_CHANGE_REQUIRED, SERVER_RETIRED, error_in
from csi_driver.management.settings import Credentials, ManagementSettings, read_credentials
from csi_driver.management.transport import Request, Response, Transport
from csi_driver.model import is_uuid
from csi_driver.telemetry.metrics import ServerMetrics

_LOG = logging.getLogger(__name__)

SYSTEM_INFO = "/systemInfo"
STATUS_PAGE_AGENT = "/status-page"
"""Ends the User-Agent of logins that the status page checks."""
NO_GATEWAY = frozenset({502, 503, 504})

_PROBE = Request("GET", "/volumes/count")
"""A server that works answers it or requires a login; a retired one answers 503."""
_PROBE_TIMEOUT_S = 5.0
_SHOWN_CHARACTERS = 256


class InvalidResponse(errors.StorageUnavailable):
    """A server's response is unusable; another server may give a valid one."""


def response_body(response: Response, server: str, request: Request) -> object:
    """Return the body of a successful response. Raises an error for any other HTTP status."""
    status = response.status
    if status == 200 and response.is_json:
        return _without_texts(response.body) if request.is_secret else response.body
    text = "a response that may hold a secret and is not shown"
    if not request.is_secret:
        text = shown(response.content[: 4 * _SHOWN_CHARACTERS].decode(errors="replace"), _SHOWN_CHARACTERS)
    if status in (401, 403):
        raise errors.Denied(
            f"management server {server} denies this user {request.what}: {text}; give the user the permission in the"
            " management"
        )
    if status in (400, 413, 422):
        error = error_in(response.body) if isinstance(response.body, dict) and not request.is_secret else None
        reason = error.text if error is not None else text
        raise errors.InvalidRequest(f"the management rejected {request.what} as invalid: {reason}")
    if 300 <= status < 400:
        target = "elsewhere" if request.is_secret else f"to {shown(response.location.partition('?')[0])}"
        raise errors.StorageUnavailable(
            f"management server {server} redirects {request.what} {target}; redirects are not followed: "
            "configure the final address"
        )
    reason = f"HTTP {status} with {text}"
    if status == 404:
        raise errors.StorageUnavailable(f"management server {server} answered {request.what} with {reason}")
    if request.is_repeatable:
        raise InvalidResponse(f"management server {server} answered {request.what} with {reason}")
    raise errors.OutcomeUnknown(server, request.what, reason)


def error_id(response: Response) -> int | None:
    error = error_in(response.body) if isinstance(response.body, dict) else None
    return error.main_id if error is not None else None


def is_retired(response: Response) -> bool:
    """Return whether the server is being upgraded or shut down, and did not look at the request."""
    return response.status == 503 and error_id(response) in SERVER_RETIRED


def _without_texts(body: object) -> object:
    match body:
        case dict():
            return {key: _without_texts(value) for key, value in body.items()}
        case list():
            return [_without_texts(value) for value in body]
        case str() if not is_uuid(body):
            return "(not shown)"
    return body


_VERSION = re.compile(r"[vV]?(\d{1,6}(?:\.\d{1,6}){0,5})(?:[-+].*)?")
_LOWEST = (15,)
"""The first version that stores `metadata` with a volume, which the driver needs to recognise its volumes."""
_NEWEST = (18,)
"""The newest version that the driver was tested with."""


class ManagementTooOld(errors.PreconditionFailed):
    """The API version of a server is below the lowest one that the driver supports."""


def _check_version(value: object, server: str, *, allow_incompatible: bool) -> tuple[str, str]:
    """Return a server's version for messages, and a warning or "". An unreadable version counts as newer."""
    text = "" if value is None else str(value).strip()
    version = f"API version {shown(text)}" if text else "an API without a version"
    match = _VERSION.fullmatch(text)
    if match is None and text:
        return version, "which is unreadable and treated as newer"
    numbers = tuple(map(int, match[1].split("."))) if match is not None else ()
    lowest = ".".join(map(str, _LOWEST))
    if numbers < _LOWEST and not allow_incompatible:
        raise ManagementTooOld(
            f"management server {server}: expected API version {lowest} or newer, got {version}; upgrade the"
            " management, or set --allow-incompatible-versions to continue at your own risk"
        )
    if numbers < _LOWEST:
        return version, f"older than the lowest supported ({lowest}); allowed by --allow-incompatible-versions"
    return version, f"newer than the newest tested ({_NEWEST[0]})" if numbers[:1] > _NEWEST else ""


class ServerSession:
    """A session on one management server. Thread-safe."""

    def __init__(self, url: str, settings: ManagementSettings, metrics: ServerMetrics) -> None:
        self._settings = settings
        self._metrics = metrics
        self._transport = Transport(url, settings)
        self.url = self._transport.server
        self._version: str | None = None
        self._logged_version = ""
        self._cookie: str | None = None
        self._credentials: Credentials | None = None
        self._opening = threading.Lock()
        self._openings = 0
        self._opening_failure: DriverError | None = None

    def close(self) -> None:
        self._transport.close()

    def probe(self) -> bool:
        """Return whether the server responds, by a request that needs no session."""
        try:
            response = self._transport.exchange(_PROBE, self._cookie, Deadline.after(_PROBE_TIMEOUT_S))
        except DriverError as error:
            _LOG.debug("probe failed: %s", error)
            return False
        return response.status < 500

    def send(self, request: Request, deadline: Deadline) -> Response:
        """Send a request; opens the session if needed. Raises also `Unauthenticated` and `ManagementTooOld`."""
        self._open(request, None, deadline)
        cookie = self._cookie
        response = self._exchange(request, cookie, deadline)
        if _requires_login(response) or (response.status == 401 and self._credentials_changed()):
            # The server rejected the request unread, so it may be sent again.
            self._open(request, cookie or "", deadline)
            response = self._exchange(request, self._cookie, deadline)
            if _requires_login(response):
                # Restarted again meanwhile, or it never keeps a session: either way nothing was executed.
                reason = "it requires a login right after a successful one; check its clock and sessions"
                raise errors.ServerUnreachable(self.url, reason)
        if response.status == 401 and not self._settings.has_user and not _lacks_permission(response):
            raise errors.Unauthenticated(
                f"management server {self.url} has no user for the client certificate "
                f"{self._settings.client_certificate}: create a management user "
                "with the name in the OU of the certificate's subject"
            )
        if error_id(response) == PASSWORD_CHANGE_REQUIRED:
            self._cookie = None  # the session was opened with the old password
            user = self._credentials.username if self._credentials is not None else self._settings.username
            raise errors.Unauthenticated(
                f"management server {self.url} requires a new password for user {user!r} "
                f"before any other request: change it in the management's interface or by POST /users/changePassword, "
                f"then write the new password to {self._settings.password_place}"
            )
        if request.path == SYSTEM_INFO and response.status == 200 and isinstance(response.body, dict):
            self._take_version(response.body)
        return response

    def _exchange(self, request: Request, cookie: str | None, deadline: Deadline) -> Response:
        response = self._transport.exchange(request, cookie, deadline)
        if response.cookie and not self._settings.has_user and response.cookie != self._cookie:
            self._cookie = response.cookie  # a client certificate opens the session with the first request
        return response

    def _open(self, request: Request, stale: str | None, deadline: Deadline) -> None:
        """Open a session other than `stale` and read its API version, in one thread; others wait for its result."""
        needs_version = request.path != SYSTEM_INFO  # the response has it
        has_login = self._cookie is not None or not self._settings.has_user
        if stale is None and has_login and (self._version is not None or not needs_version):
            return
        seen = self._openings
        if not self._opening.acquire(timeout=deadline.remaining_s()):
            raise errors.ServerUnreachable(self.url, "the login timed out", timed_out=True)
        try:
            if self._openings != seen and self._opening_failure is not None:
                raise errors.same_again(self._opening_failure)
            self._opening_failure = None
            self._log_in_again(stale, deadline)
            if needs_version and self._version is None:
                self._request_version(deadline)
        except (errors.Unauthenticated, errors.ServerUnreachable, ManagementTooOld) as error:
            self._opening_failure = errors.same_again(error)
            raise
        finally:
            self._openings += 1
            self._opening.release()

    def _log_in_again(self, stale: str | None, deadline: Deadline) -> None:
        if not self._settings.has_user:
            if stale is not None:
                raise errors.Unauthenticated(
                    f"management server {self.url} does not accept the client certificate "
                    f"{self._settings.client_certificate} as a login; check --management-client-certificate"
                )
        elif self._cookie is None or self._cookie == stale:
            self._cookie = self._version = None
            self._cookie = self._log_in(deadline)

    def accepts(self, credentials: Credentials, deadline: Deadline) -> bool:
        """Return whether the server accepts a login of another user than ours. Neither it nor its session is kept.

        Without our client certificate, which could be a login of its own. The server tells these logins from ours by
        their User-Agent: failed ones must not count as ours.
        """
        own, agent = self._settings, self._settings.driver_name + STATUS_PAGE_AGENT
        others = replace(own, driver_name=agent, client_certificate=None, client_key=None)
        with contextlib.closing(Transport(self.url, others)) as transport:
            return self._cookie_of_login(transport, credentials, deadline) is not None

    def _log_in(self, deadline: Deadline) -> str:
        credentials = read_credentials(self._settings)
        cookie = self._cookie_of_login(self._transport, credentials, deadline)
        if cookie is None:
            raise errors.Unauthenticated(
                f"management server {self.url} does not accept user {credentials.username!r} "
                f"with the password in {self._settings.password_place}"
            )
        self._credentials = credentials
        self._metrics.logged_in()
        return cookie

    def _cookie_of_login(self, transport: Transport, credentials: Credentials, deadline: Deadline) -> str | None:
        """Return the cookie of a new session; None where the server does not accept the credentials."""
        body = json.dumps({"username": credentials.username, "password": credentials.password}).encode()
        try:
            response = transport.exchange(Request("POST", "/login", body), None, deadline)
        except errors.OutcomeUnknown as error:
            # The request behind the login was not sent.
            raise errors.ServerUnreachable(self.url, error.reason, timed_out=error.timed_out) from error
        envelope = response.body if isinstance(response.body, dict) else {}
        if response.status == 401 or (response.status == 200 and envelope.get("success") is False):
            return None
        if response.status in NO_GATEWAY:
            raise errors.ServerUnreachable(self.url, f"HTTP {response.status} for a login")
        if response.status == 429:
            raise errors.StorageUnavailable(
                f"management server {self.url} refuses logins from here for some seconds, after failed ones; retry"
            )
        if response.status != 200 or not envelope or not response.cookie:
            # The body is not shown: an error page may quote the password.
            raise errors.StorageUnavailable(
                f"management server {self.url}: expected HTTP 200 with a session cookie for a login, got HTTP "
                f"{response.status} {'with' if response.cookie else 'without'} one; check the address"
            )
        return response.cookie

    def _credentials_changed(self) -> bool:
        """Return whether the files hold other credentials than the session's, which may have more permissions."""
        if not self._settings.has_user:
            return False
        try:
            return read_credentials(self._settings) != self._credentials
        except errors.Unauthenticated:
            return False

    def _request_version(self, deadline: Deadline) -> None:
        try:
            response = self._exchange(Request("GET", SYSTEM_INFO), self._cookie, deadline)
        except errors.OutcomeUnknown as error:
            # The request behind it was not sent.
            raise errors.ServerUnreachable(self.url, error.reason, timed_out=error.timed_out) from error
        if _requires_login(response):
            if not self._settings.has_user:
                self._log_in_again("", deadline)
            return  # the request itself gets the same answer, and opens the next session
        if error_id(response) == PASSWORD_CHANGE_REQUIRED or response.status in (401, 403):
            return  # the request itself gets the same answer
        if response.status != 200 or not isinstance(response.body, dict):
            raise errors.ServerUnreachable(self.url, f"HTTP {response.status} for {SYSTEM_INFO}")
        self._take_version(response.body)

    def _take_version(self, info: dict[str, object]) -> None:
        if "success" in info:
            return  # an error
        allow_incompatible = self._settings.allow_incompatible_versions
        version, warning = _check_version(info.get("APIVersion"), self.url, allow_incompatible=allow_incompatible)
        if version != self._logged_version:
            self._logged_version = version
            management = shown(info.get("version") or info.get("managementVersion"))
            _LOG.info("management server %s works: management %s, %s", self.url, management, version)
            if warning:
                _LOG.warning("management server %s has %s, %s", self.url, version, warning)
        self._version = version


def _requires_login(response: Response) -> bool:
    if response.status in (301, 302, 303, 307, 308):
        return urlsplit(response.location).path.rstrip("/") == "/login"
    return error_id(response) == LOGIN_REQUIRED


def _lacks_permission(response: Response) -> bool:
    """Return whether the server knows the user and refuses the request: only then the response has an id."""
    return isinstance(response.body, dict) and response.body.get("id") == 401
