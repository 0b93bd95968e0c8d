"""One management server: login, its cookie and its expiry, and how long to leave it alone after a failure.

Sessions are per server and die with its process, so each server object keeps its own cookie.
"""

from __future__ import annotations

import json
import threading
from dataclasses import dataclass
from urllib.parse import urlsplit

from csi_driver.deadline import Clock, Deadline
from csi_driver.errors import (
    DeadlineReached,
    OutcomeUnknown,
    ServerUnreachable,
    StorageUnavailable,
    Unauthenticated,
)
from csi_driver.management.failures import LOGIN_REQUIRED, PASSWORD_CHANGE_REQUIRED, refusal_in
from csi_driver.management.settings import ManagementSettings
from csi_driver.management.transport import Reply, Transport

_FIRST_PAUSE_S = 0.5
_LONGEST_PAUSE_S = 30.0


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

    def __init__(self, url: str, settings: ManagementSettings, clock: Clock) -> None:
        self._settings = settings
        self._clock = clock
        self._transport = Transport(url, settings)
        self.url = self._transport.server
        self._cookie: str | None = None
        self._login = threading.Lock()
        self._logins = 0
        self._login_failure: Unauthenticated | ServerUnreachable | None = None
        self._health = threading.Lock()
        self._failures = 0
        self._rests_until_s = 0.0

    def close(self) -> None:
        """Close the idle connections. The session on the server ends by its own expiry."""
        self._transport.close()

    # --- rest after failures ----------------------------------------------------------------------------

    def is_due(self) -> bool:
        """Tell whether this server is to be asked before those that rest.

        When its pause is over, one caller is told so, as a probe; the others stay away until the probe's result.
        """
        if self._failures == 0:
            return True
        with self._health:
            now = self._clock.monotonic()
            if now < self._rests_until_s:
                return False
            self._rests_until_s = now + self._pause_s()
            return True

    def failed(self) -> None:
        """Note a failure: the server rests, twice as long at every failure in a row."""
        with self._health:
            self._failures += 1
            self._rests_until_s = self._clock.monotonic() + self._pause_s()

    def answered(self) -> None:
        """Note that the server works."""
        if self._failures:
            with self._health:
                self._failures = 0

    def _pause_s(self) -> float:
        return float(min(_FIRST_PAUSE_S * 2 ** min(self._failures - 1, 10), _LONGEST_PAUSE_S))

    # --- asking -----------------------------------------------------------------------------------------

    def ask(self, method: str, path: str, body: bytes | None, deadline: Deadline) -> Answer:
        """Send a request within our session; log in first, or again, where that is needed.

        Raises what `Transport.exchange` raises, `Unauthenticated` where the login is refused.
        """
        cookie = self._cookie
        if cookie is None and self._settings.username:
            cookie = self._log_in(None, deadline)
        answer = self._exchange(method, path, body, cookie, deadline)
        if _wants_login(answer):
            # Turned away before it was looked at, so it may be sent again.
            cookie = self._log_in(cookie, deadline)
            answer = self._exchange(method, path, body, cookie, deadline)
            if _wants_login(answer):
                raise Unauthenticated(f"management server {self.url} wants a login again right after it granted one")
        if answer.error_id == PASSWORD_CHANGE_REQUIRED:
            raise Unauthenticated(
                f"management server {self.url} wants the password of user {self._settings.username!r} to be changed "
                f"before anything else: change it in the management's user interface or by POST /users/changePassword, "
                f"then put the new one into {self._settings.password_file}"
            )
        return answer

    def _exchange(self, method: str, path: str, body: bytes | None, cookie: str | None, deadline: Deadline) -> Answer:
        reply = self._transport.exchange(method, path, body, cookie, deadline)
        if reply.cookie and not self._settings.username:
            # With a client certificate the first request of all opens the session.
            self._cookie = reply.cookie
        return _decoded(reply)

    # --- login ------------------------------------------------------------------------------------------

    def _log_in(self, stale: str | None, deadline: Deadline) -> str:
        """Return a cookie other than `stale`. However many threads ask, one logs in and all get its result."""
        if not self._settings.username:
            raise Unauthenticated(
                f"management server {self.url} does not take the client certificate "
                f"{self._settings.client_certificate} for a login"
            )
        seen = self._logins
        if not self._login.acquire(timeout=deadline.remaining_s()):
            raise DeadlineReached(f"the login to management server {self.url}", deadline.elapsed_s())
        try:
            if self._cookie is not None and self._cookie != stale:
                return self._cookie
            if self._logins != seen and self._login_failure is not None:
                raise _same_again(self._login_failure)
            self._cookie = None
            self._cookie = self._new_login(deadline)
            self._login_failure = None
            return self._cookie
        except (Unauthenticated, ServerUnreachable) as error:
            self._login_failure = _same_again(error)
            raise
        finally:
            self._logins += 1
            self._login.release()

    def _new_login(self, deadline: Deadline) -> str:
        body = json.dumps({"username": self._settings.username, "password": self._password()}).encode()
        try:
            reply = self._transport.exchange("POST", "/login", body, None, deadline)
        except OutcomeUnknown as error:
            # Only the login may have been carried out, the request behind it was not sent.
            raise ServerUnreachable(self.url, error.reason) from error
        answer = _decoded(reply)
        envelope = answer.body if isinstance(answer.body, dict) else {}
        if reply.status == 401 or (reply.status == 200 and envelope.get("success") is False):
            raise Unauthenticated(
                f"management server {self.url} does not accept user {self._settings.username!r} "
                f"with the password in {self._settings.password_file}"
            )
        if reply.status == 503:
            raise ServerUnreachable(self.url, "it answers a login with HTTP 503")
        if reply.status != 200 or not envelope or not reply.cookie:
            # Not shown: an error page may quote what was sent.
            raise StorageUnavailable(
                f"management server {self.url} answers a login with HTTP {reply.status} and "
                f"{'a' if reply.cookie else 'no'} session cookie, wanted 200 with one"
            )
        return reply.cookie

    def _password(self) -> str:
        path = self._settings.password_file
        if path is None:
            raise Unauthenticated(f"no password file is configured for user {self._settings.username!r}")
        try:
            password = path.read_text(encoding="utf-8").rstrip("\r\n")
        except OSError as error:
            raise Unauthenticated(f"the password file {path} cannot be read: {error.strerror}") from error
        except UnicodeDecodeError:
            # No cause: it would carry the file's bytes.
            raise Unauthenticated(f"the password file {path} is not UTF-8") from None
        if not password:
            raise Unauthenticated(f"the password file {path} is empty")
        return password


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


def _same_again(error: Unauthenticated | ServerUnreachable) -> Unauthenticated | ServerUnreachable:
    """Return a new exception that says the same: one object raised in several threads would mix their tracebacks."""
    if isinstance(error, ServerUnreachable):
        return ServerUnreachable(error.server, error.reason)
    return Unauthenticated(str(error))
