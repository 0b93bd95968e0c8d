"""Requests to the management, whichever of its servers answers: order, fail-over, and what an HTTP status means.

A request that may have been carried out is repeated only where the caller says that repeating it changes nothing. No
call waits twice for a server that made it wait in vain.
"""

from __future__ import annotations

import json

from csi_driver.deadline import SYSTEM_CLOCK, Clock, Deadline
from csi_driver.errors import (
    DeadlineReached,
    Denied,
    InvalidRequest,
    OutcomeUnknown,
    ServerUnreachable,
    StorageUnavailable,
    shown,
)
from csi_driver.management.documents import SHOWN_CHARACTERS
from csi_driver.management.failures import refusal_in
from csi_driver.management.gate import SentAway
from csi_driver.management.server import SYSTEM_INFO, Answer, Request, Server
from csi_driver.management.settings import ManagementSettings
from csi_driver.management.versions import ApiVersion
from csi_driver.model import is_uuid
from csi_driver.telemetry.metrics import ManagementMetrics

_TRIAL_S = 5.0
"""What a server gets of the call that tries it after a failure, where others would answer."""
_SECOND_CHANCE_S = 10.0
"""What a server gets of a call that was under way when it made somebody wait in vain."""


class ManagementSession:
    """The servers of one management. Thread-safe."""

    def __init__(
        self, settings: ManagementSettings, clock: Clock = SYSTEM_CLOCK, metrics: ManagementMetrics | None = None
    ) -> None:
        self._request_timeout_s = settings.request_timeout_s
        self._servers = [Server(url, settings, clock, metrics) for url in settings.servers]

    def close(self) -> None:
        """Close the idle connections."""
        for server in self._servers:
            server.close()

    def is_served(self) -> bool:
        """Tell whether there is a server that has not failed when it was last asked."""
        return any(server.gate.is_open() for server in self._servers)

    def api_version(self, *, deadline: Deadline) -> ApiVersion:
        """Return the version of the server that is asked first; it is asked for once a session, not at every call."""
        for server in self._servers:
            if server.gate.is_open():
                if server.version is None:
                    break
                return server.version
        self.get(SYSTEM_INFO, deadline=deadline)
        known = [server.version for server in self._servers if server.version is not None]
        return known[0] if known else ApiVersion.read(None)

    def get(self, path: str, *, deadline: Deadline) -> object:
        """Return the decoded answer to a GET. It is asked again elsewhere where no answer comes."""
        return self._request(Request("GET", path), deadline)

    def post(self, path: str, body: object, *, repeatable: bool, deadline: Deadline, secret: bool = False) -> object:
        """Return the decoded answer to a POST.

        `repeatable`: carrying it out twice does the same as once, so it may be sent again where no answer came.
        Otherwise raises `OutcomeUnknown` where it may have been carried out. `secret`: the body holds one, which an
        answer may repeat: no text of the answer is kept but uuids.
        """
        content = json.dumps(body, allow_nan=False).encode()
        return self._request(Request("POST", path, content, is_repeatable=repeatable, is_secret=secret), deadline)

    def _request(self, request: Request, deadline: Deadline) -> object:
        waiting = self._in_order(request, deadline)
        is_repeated = False
        while True:
            server = waiting.pop(0)
            try:
                return self._asked(server, request, deadline, others_wait=bool(waiting))
            except (OutcomeUnknown, ServerUnreachable, DeadlineReached, UnusableAnswer) as error:
                if deadline.expired() or (isinstance(error, OutcomeUnknown) and not request.is_repeatable):
                    raise
                if waiting:
                    continue
                if not isinstance(error, SentAway):  # then a probe decides
                    # A connection that broke may have been an old one; a server that hangs would hang again.
                    if is_repeated or not isinstance(error, OutcomeUnknown) or error.timed_out:
                        raise
                    is_repeated = True
                waiting.append(server)

    def _asked(self, server: Server, request: Request, deadline: Deadline, *, others_wait: bool) -> object:
        if not server.gate.is_open() and not server.gate.is_quick():
            server.probe(urgent=True)
            if not server.gate.shows_life(deadline):
                raise server.gate.closed()
        limit = self._limit(server, deadline, others_wait=others_wait)
        return _body(server.ask(request, limit), server.url, request)

    def _in_order(self, request: Request, deadline: Deadline) -> list[Server]:
        """Return all servers: in their own order, those that rest after a failure last.

        One that shows life again is tried by one call at a time, with what may be repeated elsewhere.
        """
        if not self.is_served():
            # At once, so that a call waits for their answers together.
            for server in self._servers:
                server.probe(urgent=True)
        if len(self._servers) == 1:
            return list(self._servers)
        first: list[Server] = []
        last: list[Server] = []
        for server in self._servers:
            if server.gate.is_open():
                first.append(server)
                continue
            server.probe()
            may_try = not first and request.is_repeatable and not server.gate.wasted(deadline.started_s)
            (first if may_try and server.gate.take_trial() else last).append(server)
        return first + last

    def _limit(self, server: Server, deadline: Deadline, *, others_wait: bool) -> Deadline:
        """Return the time for one server: while others wait, a hanging one gets at most half of what is left."""
        left_s = deadline.remaining_s()
        if left_s <= 0:
            raise DeadlineReached("a response of the management")
        seconds = min(self._request_timeout_s, left_s / 2 if others_wait else left_s)
        if server.gate.wasted(deadline.started_s):
            seconds = min(seconds, _SECOND_CHANCE_S)
        if others_wait and not server.gate.is_open():
            seconds = min(seconds, _TRIAL_S)
        return Deadline(deadline.clock.monotonic() + seconds, deadline.started_s, deadline.clock)


class UnusableAnswer(StorageUnavailable):
    """A server answered what no other would: its own trouble, or what stands in front of it."""


def _body(answer: Answer, server: str, request: Request) -> object:
    """Return the body of a good answer; raise what the HTTP status means otherwise."""
    if answer.status == 200 and answer.decoded:
        return _without_texts(answer.body) if request.is_secret else answer.body
    if answer.status in (401, 403):
        raise Denied(
            f"management server {server} denies this user {request.what}: {_beginning(answer, request)}; "
            "give the user the permission in the management"
        )
    if answer.status in (400, 413, 422):
        raise InvalidRequest(f"the management rejected {request.what} as invalid: {_complaint(answer, request)}")
    if 300 <= answer.status < 400:
        where = "elsewhere" if request.is_secret else f"to {shown(answer.location.partition('?')[0])}"
        raise StorageUnavailable(
            f"management server {server} redirects {request.what} {where}; redirects are not followed: "
            "configure the final address"
        )
    reason = f"HTTP {answer.status} with {_beginning(answer, request)}"
    if answer.status == 404:
        raise StorageUnavailable(f"management server {server} answered {request.what} with {reason}")
    if request.is_repeatable:
        raise UnusableAnswer(f"management server {server} answered {request.what} with {reason}")
    raise OutcomeUnknown(server, request.what, reason)


def _without_texts(body: object) -> object:
    """Return a body whose texts are left out, but for uuids."""
    match body:
        case dict():
            return {key: _without_texts(value) for key, value in body.items()}
        case list():
            return [_without_texts(value) for value in body]
        case str() if not is_uuid(body):
            return "(not shown)"
    return body


def _complaint(answer: Answer, request: Request) -> str:
    refusal = refusal_in(answer.body) if isinstance(answer.body, dict) and not request.is_secret else None
    return refusal.text if refusal is not None else _beginning(answer, request)


def _beginning(answer: Answer, request: Request) -> str:
    if request.is_secret:
        return "an answer that may hold a secret and is not shown"
    return shown(answer.content[: 4 * SHOWN_CHARACTERS].decode(errors="replace"), SHOWN_CHARACTERS)
