"""One management server: our session on it, its expiry, what version of the API it speaks, and signs of life.

Sessions are per server and die with its process, so each server object keeps its own cookie.
"""

from __future__ import annotations

import json
import logging
import threading
from dataclasses import dataclass, field
from urllib.parse import unquote, urlsplit

from csi_driver.background import run_detached
from csi_driver.deadline import Clock, Deadline
from csi_driver.errors import (
    DriverError,
    OutcomeUnknown,
    ServerUnreachable,
    StorageUnavailable,
    Unauthenticated,
    same_again,
    shown,
)
from csi_driver.management.credentials import Credentials, read_credentials
from csi_driver.management.failures import LOGIN_REQUIRED, PASSWORD_CHANGE_REQUIRED, SERVER_RETIRED, refusal_in
from csi_driver.management.gate import Gate
from csi_driver.management.settings import ManagementSettings
from csi_driver.management.transport import Reply, Transport
from csi_driver.management.versions import ApiVersion, ManagementTooOld, VersionRule
from csi_driver.telemetry.metrics import ManagementMetrics

SYSTEM_INFO = "/systemInfo"

_log = logging.getLogger(__name__)

_PROBE = "/volumes/count"
"""Answered, or turned away to the login, by a server that works; 503 by one that is retired."""
_PROBE_S = 5.0
_NO_GATEWAY = frozenset({502, 503, 504})


@dataclass(frozen=True, slots=True)
class Request:
    """What is asked. `is_repeatable`: doing it twice does the same as once. `is_secret`: no answer is ever quoted."""

    method: str
    path: str
    body: bytes | None = field(default=None, repr=False)
    is_repeatable: bool = True
    is_secret: bool = False

    @property
    def what(self) -> str:
        """The request as messages name it."""
        return f"{self.method} {self.path.partition('?')[0]}"


@dataclass(frozen=True, slots=True)
class Answer:
    """A decoded answer; `decoded` is False where the body is no JSON, and `body` is None then."""

    status: int
    body: object
    decoded: bool
    content: bytes
    location: str

    @property
    def error_id(self) -> int | None:
        """The id of the envelope's error, where the body is an envelope with one."""
        if not isinstance(self.body, dict):
            return None
        refusal = refusal_in(self.body)
        return refusal.main_id if refusal is not None else None


class Server:
    """A management server with our session on it. Thread-safe."""

    def __init__(
        self, url: str, settings: ManagementSettings, clock: Clock, metrics: ManagementMetrics | None = None
    ) -> None:
        self._settings = settings
        self._clock = clock
        self._transport = Transport(url, settings)
        self.url = self._transport.server
        self.gate = Gate(self.url, settings.max_requests_in_flight, clock)
        self._rule = VersionRule(self.url, allow_incompatible=settings.allow_incompatible_versions)
        self._cookie: str | None = None
        self._version: ApiVersion | None = None
        self._version_told: ApiVersion | None = None
        self._credentials: Credentials | None = None
        self._opening = threading.Lock()
        self._openings = 0
        self._opening_failure: DriverError | None = None
        self._is_closed = False
        self._metrics = ManagementMetrics() if metrics is None else metrics
        self._metrics.begin(self.url)

    @property
    def version(self) -> ApiVersion | None:
        """The version of the API that our session speaks; None before there is one."""
        return self._version

    def close(self) -> None:
        """Close the idle connections. The session on the server ends by its own expiry."""
        if not self._is_closed:
            self._metrics.end(self.url)
        self._is_closed = True
        self._transport.close()

    # --- asking -----------------------------------------------------------------------------------------

    def ask(self, request: Request, deadline: Deadline) -> Answer:
        """Send a request within our session; open one first, or again, where that is needed.

        Raises what `Transport.exchange` raises, `ServerUnreachable` too where the server turns requests away unread,
        `Unauthenticated` where the login is refused, `ManagementTooOld`.
        """
        with self.gate.entered(deadline):
            began_s, outcome = self._clock.monotonic(), "failed"
            try:
                answer = self._asked(request, deadline)
                if answer.status in _NO_GATEWAY and (request.is_repeatable or _is_retired(answer)):
                    raise ServerUnreachable(self.url, f"HTTP {answer.status}, management id {answer.error_id}")
                outcome = "answered"
            except (ServerUnreachable, OutcomeUnknown) as error:
                outcome = "unreachable" if isinstance(error, ServerUnreachable) else "unknown"
                self._failed(error, self._clock.monotonic() - began_s)
                raise
            except (Unauthenticated, ManagementTooOld):
                outcome = "refused"
                self._answered()  # whoever refuses works
                raise
            finally:
                self._metrics.asked(self.url, outcome, self._clock.monotonic() - began_s)
            self._answered()
            return answer

    def _failed(self, error: ServerUnreachable | OutcomeUnknown, took_s: float) -> None:
        self._metrics.works(self.url, False)
        if self.gate.failed(took_s, timed_out=error.timed_out):
            self._metrics.failures.labels(self.url).inc()
            _log.warning(
                "management server %s failed, requests go to other servers until a probe succeeds: %s", self.url, error
            )

    def _answered(self) -> None:
        self._metrics.works(self.url, True)
        if self.gate.answered():
            _log.info("management server %s works again", self.url)

    def _asked(self, request: Request, deadline: Deadline) -> Answer:
        self._open(request, None, deadline)
        cookie = self._cookie
        answer = self._exchange(request, cookie, deadline)
        if _wants_login(answer) or (answer.status == 401 and self._has_other_credentials()):
            # Turned away before it was looked at, so it may be sent again.
            self._open(request, cookie or "", deadline)
            answer = self._exchange(request, self._cookie, deadline)
            if _wants_login(answer):
                raise Unauthenticated(
                    f"management server {self.url} requires a login right after a successful one; "
                    "check its clock and sessions"
                )
        if answer.status == 401 and not self._settings.has_user and not _lacks_rights(answer):
            raise Unauthenticated(
                f"management server {self.url} has no user for the client certificate "
                f"{self._settings.client_certificate}: create a management user "
                "with the name in the OU of the certificate's subject"
            )
        if answer.error_id == PASSWORD_CHANGE_REQUIRED:
            self._cookie = None  # the session knows the old password
            raise Unauthenticated(
                f"management server {self.url} requires a new password for user {self._username()!r} "
                f"before any other request: change it in the management's interface or by POST /users/changePassword, "
                f"then write the new password to {self._settings.password_place}"
            )
        if request.path == SYSTEM_INFO and answer.status == 200 and isinstance(answer.body, dict):
            self._take_version(answer.body)
        return answer

    def _exchange(self, request: Request, cookie: str | None, deadline: Deadline) -> Answer:
        reply = self._transport.exchange(request.method, request.path, request.body, cookie, deadline)
        if reply.cookie and not self._settings.has_user and reply.cookie != self._cookie:
            # With a client certificate the first request of all opens the session.
            self._cookie = reply.cookie
        return _decoded(_without(cookie, reply))

    # --- session ----------------------------------------------------------------------------------------

    def _open(self, request: Request, stale: str | None, deadline: Deadline) -> None:
        """See to a session other than `stale`, of a version that will do. One thread opens it, all get its result."""
        needs_version = request.path != SYSTEM_INFO  # that very answer tells it
        if stale is None and self._is_complete(needs_version=needs_version):
            return
        seen = self._openings
        if not self._opening.acquire(timeout=deadline.remaining_s()):
            raise ServerUnreachable(self.url, "the login timed out", timed_out=True)
        try:
            if self._openings != seen and self._opening_failure is not None:
                raise same_again(self._opening_failure)
            self._opening_failure = None
            self._log_in_again(stale, deadline)
            if needs_version and self._version is None:
                self._ask_version(deadline)
        except (Unauthenticated, ServerUnreachable, ManagementTooOld) as error:
            self._opening_failure = same_again(error)
            raise
        finally:
            self._openings += 1
            self._opening.release()

    def _is_complete(self, *, needs_version: bool) -> bool:
        has_login = self._cookie is not None or not self._settings.has_user
        return has_login and (self._version is not None or not needs_version)

    def _log_in_again(self, stale: str | None, deadline: Deadline) -> None:
        if not self._settings.has_user:
            if stale is not None:
                raise Unauthenticated(
                    f"management server {self.url} does not accept the client certificate "
                    f"{self._settings.client_certificate} as a login; check --management-client-certificate"
                )
        elif self._cookie is None or self._cookie == stale:
            self._cookie = self._version = None
            self._cookie = self._new_login(deadline)

    def _new_login(self, deadline: Deadline) -> str:
        credentials = read_credentials(self._settings)
        body = json.dumps({"username": credentials.username, "password": credentials.password}).encode()
        try:
            reply = self._transport.exchange("POST", "/login", body, None, deadline)
        except OutcomeUnknown as error:
            # Only the login may have been carried out, the request behind it was not sent.
            raise ServerUnreachable(self.url, error.reason, timed_out=error.timed_out) from error
        answer = _decoded(reply)
        envelope = answer.body if isinstance(answer.body, dict) else {}
        if reply.status == 401 or (reply.status == 200 and envelope.get("success") is False):
            raise Unauthenticated(
                f"management server {self.url} does not accept user {credentials.username!r} "
                f"with the password in {self._settings.password_place}"
            )
        if reply.status in _NO_GATEWAY:
            raise ServerUnreachable(self.url, f"HTTP {reply.status} for a login")
        if reply.status != 200 or not envelope or not reply.cookie:
            # Not shown: an error page may quote what was sent.
            raise StorageUnavailable(
                f"management server {self.url}: expected HTTP 200 with a session cookie for a login, got HTTP "
                f"{reply.status} {'with' if reply.cookie else 'without'} one; check the address"
            )
        self._credentials = credentials
        self._metrics.logins.labels(self.url).inc()
        return reply.cookie

    def _has_other_credentials(self) -> bool:
        """Tell whether the files hold others than our session was opened with: those may be allowed more."""
        if not self._settings.has_user:
            return False
        try:
            return read_credentials(self._settings) != self._credentials
        except Unauthenticated:
            return False

    def _username(self) -> str:
        return self._credentials.username if self._credentials is not None else self._settings.username

    # --- version ----------------------------------------------------------------------------------------

    def _ask_version(self, deadline: Deadline) -> None:
        """Ask for the version, once a session. The request behind it was not sent, whatever happens here."""
        try:
            answer = self._exchange(Request("GET", SYSTEM_INFO), self._cookie, deadline)
        except OutcomeUnknown as error:
            raise ServerUnreachable(self.url, error.reason, timed_out=error.timed_out) from error
        if _wants_login(answer):
            if not self._settings.has_user:
                self._log_in_again("", deadline)
            return  # the request itself will be turned away likewise, and opens the next session
        if answer.error_id == PASSWORD_CHANGE_REQUIRED or answer.status in (401, 403):
            return  # likewise
        if answer.status != 200 or not isinstance(answer.body, dict):
            raise ServerUnreachable(self.url, f"HTTP {answer.status} for {SYSTEM_INFO}")
        self._take_version(answer.body)

    def _take_version(self, info: dict[str, object]) -> None:
        """Keep the version of our session, if it will do."""
        if "success" in info:
            return  # a refusal
        version = ApiVersion.read(info.get("APIVersion"))
        self._rule.judge(version)
        if version != self._version_told:
            self._version_told = version
            management = shown(info.get("version") or info.get("managementVersion"))
            _log.info("management server %s works: management %s, %s", self.url, management, version)
        self._version = version

    # --- signs of life ----------------------------------------------------------------------------------

    def probe(self, *, urgent: bool = False) -> None:
        """Look in the background whether a server that rests answers again, where that is due."""
        if not self._is_closed and self.gate.take_probe(urgent=urgent):
            run_detached("management-probe", self._probe)

    def _probe(self) -> None:
        alive = False
        try:
            reply = self._transport.exchange("GET", _PROBE, None, self._cookie, Deadline.after(_PROBE_S))
            alive = reply.status < 500
        except DriverError as error:
            _log.debug("probe failed: %s", error)
        finally:
            self.gate.probed(alive=alive)


def _without(cookie: str | None, reply: Reply) -> Reply:
    """Take the session's id out of an answer, which an error may quote: an error page can show what was sent."""
    session = (cookie or "").partition("=")[2]
    for secret in {session, unquote(session)} - {""}:
        reply = reply._replace(
            content=reply.content.replace(secret.encode(), b"(session)"),
            location=reply.location.replace(secret, "(session)"),
        )
    return reply


def _decoded(reply: Reply) -> Answer:
    try:
        body = json.loads(reply.content)
    except (ValueError, RecursionError):
        return Answer(reply.status, None, decoded=False, content=reply.content, location=reply.location)
    return Answer(reply.status, body, decoded=True, content=reply.content, location=reply.location)


def _wants_login(answer: Answer) -> bool:
    if answer.status in (301, 302, 303, 307, 308):
        return urlsplit(answer.location).path.rstrip("/") == "/login"
    return answer.error_id == LOGIN_REQUIRED


def _lacks_rights(answer: Answer) -> bool:
    """Tell whether the server knows who asks and refuses what is asked: it says so by an id, and only then."""
    return isinstance(answer.body, dict) and answer.body.get("id") == 401


def _is_retired(answer: Answer) -> bool:
    return answer.status == 503 and answer.error_id in SERVER_RETIRED
