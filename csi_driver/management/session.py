"""Requests to the management, whichever of its servers answers: order, fail-over, and what an HTTP status means.

A request that may have been carried out is repeated only where the caller says that repeating it changes nothing.
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
from csi_driver.management.failures import SERVER_RETIRED, refusal_in
from csi_driver.management.server import Answer, Server
from csi_driver.management.settings import ManagementSettings


class ManagementSession:
    """The servers of one management. Thread-safe."""

    def __init__(self, settings: ManagementSettings, clock: Clock = SYSTEM_CLOCK) -> None:
        self._request_timeout_s = settings.request_timeout_s
        self._servers = [Server(url, settings, clock) for url in settings.servers]

    def close(self) -> None:
        """Close the idle connections."""
        for server in self._servers:
            server.close()

    def get(self, path: str, *, deadline: Deadline) -> object:
        """Return the decoded answer to a GET. It is asked again elsewhere where no answer comes."""
        return self._request("GET", path, None, repeatable=True, deadline=deadline)

    def post(self, path: str, body: object, *, repeatable: bool, deadline: Deadline) -> object:
        """Return the decoded answer to a POST.

        `repeatable`: carrying it out twice does the same as once, so it may be sent again where no answer came.
        Otherwise raises `OutcomeUnknown` where it may have been carried out.
        """
        content = json.dumps(body, allow_nan=False).encode()
        return self._request("POST", path, content, repeatable=repeatable, deadline=deadline)

    def _request(self, method: str, path: str, body: bytes | None, *, repeatable: bool, deadline: Deadline) -> object:
        waiting = self._by_preference()
        repeated = False
        while True:
            server = waiting.pop(0)
            try:
                answer = server.ask(method, path, body, self._limit(deadline, others_wait=bool(waiting)))
                if _is_retired(answer) or (repeatable and answer.status == 503):
                    raise ServerUnreachable(server.url, f"HTTP 503, management id {answer.error_id}")
            except ServerUnreachable:
                server.failed()
                if not waiting or deadline.expired():
                    raise
            except OutcomeUnknown as error:
                server.failed()
                if not repeatable or deadline.expired():
                    raise
                if not waiting:
                    # A connection that broke may have been an old one; a server that hangs would hang again.
                    if error.timed_out or repeated:
                        raise
                    repeated = True
                    waiting.append(server)
            else:
                server.answered()
                return _body(answer, server.url, f"{method} {path.partition('?')[0]}", repeatable=repeatable)

    def _by_preference(self) -> list[Server]:
        """Return all servers: in their own order, those that rest after a failure last."""
        if len(self._servers) == 1:
            return list(self._servers)
        due = [(server, server.is_due()) for server in self._servers]
        return [server for server, is_due in due if is_due] + [server for server, is_due in due if not is_due]

    def _limit(self, deadline: Deadline, *, others_wait: bool) -> Deadline:
        """Return the time for one server: while others wait, a hanging one gets at most half of what is left."""
        left_s = deadline.remaining_s()
        if left_s <= 0:
            raise DeadlineReached("an answer of the management", deadline.elapsed_s())
        seconds = min(self._request_timeout_s, left_s / 2 if others_wait else left_s)
        return Deadline(deadline.clock.monotonic() + seconds, deadline.started_s, deadline.clock)


def _is_retired(answer: Answer) -> bool:
    return answer.status == 503 and answer.error_id in SERVER_RETIRED


def _body(answer: Answer, server: str, request: str, *, repeatable: bool) -> object:
    """Return the body of a good answer; raise what the HTTP status means otherwise."""
    if answer.status == 200 and answer.decoded:
        return answer.body
    if answer.status in (401, 403):
        raise Denied(f"management server {server} does not let this user do {request}: {_beginning(answer)}")
    if answer.status in (400, 413, 422):
        raise InvalidRequest(f"the management refuses {request} as malformed: {_complaint(answer)}")
    if 300 <= answer.status < 400:
        raise StorageUnavailable(
            f"management server {server} redirects {request} to {shown(answer.location)}; redirects are not followed, "
            "wanted the address that answers itself"
        )
    reason = f"HTTP {answer.status} with {_beginning(answer)}"
    if repeatable or answer.status == 404:
        raise StorageUnavailable(f"management server {server} answered {request} with {reason}")
    raise OutcomeUnknown(server, request, reason)


def _complaint(answer: Answer) -> str:
    refusal = refusal_in(answer.body) if isinstance(answer.body, dict) else None
    return refusal.text if refusal is not None else _beginning(answer)


def _beginning(answer: Answer) -> str:
    return shown(answer.content[: 4 * SHOWN_CHARACTERS].decode(errors="replace"), SHOWN_CHARACTERS)
