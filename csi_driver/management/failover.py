# SPDX-License-Identifier: Apache-2.0
"""Send each request to one of a cluster's management servers: their order, failover, and a circuit breaker for each.

A request that may have been executed is repeated only if that changes nothing. After the first time-out of a server,
requests avoid it until a background probe succeeds.
"""

from __future__ import annotations

import contextlib
import logging
import threading
from collections.abc import Iterator
from enum import Enum, auto

from csi_driver.background import run_detached
from csi_driver.deadline import SYSTEM_CLOCK, Clock, Deadline
from csi_driver.errors import DeadlineReached, OutcomeUnknown, ServerUnreachable, Unauthenticated
from csi_driver.management.server_session import (
    NO_GATEWAY,
    InvalidResponse,
    ManagementTooOld,
    ServerSession,
    error_id,
    is_retired,
    response_body,
)
from csi_driver.management.settings import Credentials, ManagementSettings
from csi_driver.management.transport import Request, Response
from csi_driver.telemetry.metrics import ManagementMetrics

_LOG = logging.getLogger(__name__)

_FIRST_PAUSE_S = 0.5
_LONGEST_PAUSE_S = 30.0
_PROBE_WAIT_S = 1.0
"""How long a request waits for the result of a running probe."""
_TRIAL_LIMIT_S = 5.0
"""Time for a trial request while other servers could answer it."""
_TRIAL_S = 6.0
"""Lifetime of a trial, more than `_TRIAL_LIMIT_S`: then the request that took it was never sent."""
_SECOND_WAIT_S = 10.0
"""Time for a server that already made the same request wait."""
_SLOW_S = 1.0
"""A failure that took longer (a name server that hangs, say) is not worth a second attempt."""


class State(Enum):
    """State of a circuit breaker."""

    CLOSED = auto()
    """The server worked when it was last used."""
    OPEN = auto()
    """It failed, and no probe has succeeded since."""
    HALF_OPEN = auto()
    """A probe succeeded: one request at a time may try the server."""


class FailedWhileQueued(ServerUnreachable):
    """The server failed while the request waited for a free connection."""


class CircuitBreaker:
    """Limits the concurrent requests to one server, and keeps requests from a failed one. Thread-safe."""

    def __init__(self, url: str, limit: int, clock: Clock) -> None:
        self.state = State.CLOSED
        self._url = url
        self._clock = clock
        self._free = limit
        lock = threading.Lock()
        self._state_changed = threading.Condition(lock)
        self._slot_freed = threading.Condition(lock)
        self.is_slow = False
        """Whether another attempt may cost time, as a failure since the last success did."""
        self._failures = 0
        self.slow_at_s = self._failed_at_s = self._pause_ends_s = float("-inf")
        """When a request last waited for the server without a response."""
        self._is_probing = False
        self._probe_began_s = self._probe_ended_s = self._trial_ends_s = float("-inf")

    def is_closed(self) -> bool:
        return self.state is State.CLOSED

    def take_trial(self) -> bool:
        with self._state_changed:
            now_s = self._clock.monotonic()
            if self.state is not State.HALF_OPEN or now_s < self._trial_ends_s:
                return False
            self._trial_ends_s = now_s + _TRIAL_S
            return True

    @contextlib.contextmanager
    def slot(self, deadline: Deadline) -> Iterator[None]:
        """Hold one of the connections. Raises `FailedWhileQueued`, or `DeadlineReached` where none becomes free."""
        with self._state_changed:
            failed_at_s = self._failed_at_s
            while self._free == 0:
                if not self._slot_freed.wait(deadline.remaining_s()) and self._free == 0 and deadline.expired():
                    raise DeadlineReached(f"a free connection to management server {self._url}")
                if self._failed_at_s != failed_at_s:
                    raise FailedWhileQueued(
                        self._url, "it failed while this request waited for a free connection; retry"
                    )
            self._free -= 1
        try:
            yield
        finally:
            with self._state_changed:
                self._free += 1
                self._slot_freed.notify()

    def succeeded(self) -> bool:
        """Close after a response; return whether the server had failed before."""
        if self.state is State.CLOSED:
            return False
        with self._state_changed:
            had_failed = self._failures > 0
            self.state = State.CLOSED
            self._failures = 0
            self.is_slow = False
            return had_failed

    def failed(self, took_s: float, *, timed_out: bool) -> bool:
        """Open after a failure and drop the queue; return whether the server had worked before.

        The pause doubles with each failure; those during the pause count as one, which several requests met.
        """
        with self._state_changed:
            was_closed = self.state is State.CLOSED
            now_s = self._clock.monotonic()
            self._failed_at_s = now_s
            if timed_out or took_s > _SLOW_S:
                self.is_slow = True
                self.slow_at_s = now_s
            if self.state is not State.OPEN or now_s >= self._pause_ends_s:
                self._open(now_s)
            self._state_changed.notify_all()
            self._slot_freed.notify_all()
            return was_closed

    def _open(self, now_s: float) -> None:
        self.state = State.OPEN
        self._pause_ends_s = now_s + min(_FIRST_PAUSE_S * 2 ** min(self._failures, 10), _LONGEST_PAUSE_S)
        self._failures += 1

    def take_probe(self, *, urgent: bool = False) -> bool:
        """Admit one probe at a time, after the pause; `urgent`: no other server works either."""
        with self._state_changed:
            now_s = self._clock.monotonic()
            due_s = self._pause_ends_s
            if urgent:
                due_s = min(due_s, self._probe_ended_s + _FIRST_PAUSE_S)
            if self._is_probing or self.state is not State.OPEN or now_s < due_s:
                return False
            self._is_probing = True
            self._probe_began_s = now_s
            return True

    def probe_ended(self, *, succeeded: bool) -> None:
        """Half-open after a successful probe; pause again after a failed one."""
        with self._state_changed:
            now_s = self._clock.monotonic()
            self._is_probing = False
            self._probe_ended_s = now_s
            if self.state is State.OPEN:
                if succeeded:
                    self.state = State.HALF_OPEN
                elif now_s >= self._pause_ends_s:
                    self._open(now_s)
            self._state_changed.notify_all()

    def wait_for_probe(self, deadline: Deadline) -> bool:
        """Wait for a running probe, at most `_PROBE_WAIT_S` since its start; return whether the breaker is not open."""
        with self._state_changed:
            left_s = self._probe_began_s + _PROBE_WAIT_S - self._clock.monotonic()
            self._state_changed.wait_for(
                lambda: not self._is_probing or self.state is not State.OPEN,
                max(0.0, min(left_s, deadline.remaining_s())),
            )
            return self.state is not State.OPEN


class Server:
    """One management server: our session there, its circuit breaker and its metrics. Thread-safe."""

    def __init__(self, url: str, settings: ManagementSettings, clock: Clock, metrics: ManagementMetrics) -> None:
        self.url = url.rstrip("/")
        self._metrics = metrics.begin(settings.zone, self.url)
        self.session = ServerSession(self.url, settings, self._metrics)
        self.breaker = CircuitBreaker(self.url, settings.max_requests_in_flight, clock)
        self._clock = clock
        self._is_closed = False

    def close(self) -> None:
        """Close the idle connections. The session on the server expires by itself."""
        if not self._is_closed:
            self._metrics.end()
        self._is_closed = True
        self.session.close()

    def send(self, request: Request, deadline: Deadline) -> Response:
        """Send a request. Raises the errors of the session, and `ServerUnreachable` where it was rejected unread."""
        with self.breaker.slot(deadline):
            began_s, outcome = self._clock.monotonic(), "failed"
            try:
                response = self.session.send(request, deadline)
                if response.status in NO_GATEWAY and (request.is_repeatable or is_retired(response)):
                    raise ServerUnreachable(self.url, f"HTTP {response.status}, management id {error_id(response)}")
                outcome = "answered"
            except (ServerUnreachable, OutcomeUnknown) as error:
                outcome = "unreachable" if isinstance(error, ServerUnreachable) else "unknown"
                self._failed(error, self._clock.monotonic() - began_s)
                raise
            except (Unauthenticated, ManagementTooOld):
                outcome = "refused"
                self._succeeded()  # a server that refuses a login works
                raise
            finally:
                self._metrics.asked(outcome, self._clock.monotonic() - began_s)
            self._succeeded()
            return response

    def _failed(self, error: ServerUnreachable | OutcomeUnknown, took_s: float) -> None:
        self._metrics.works(False)
        if self.breaker.failed(took_s, timed_out=error.timed_out):
            self._metrics.failed()
            _LOG.warning(
                "management server %s failed, requests go to other servers until a probe succeeds: %s", self.url, error
            )

    def _succeeded(self) -> None:
        self._metrics.works(True)
        if self.breaker.succeeded():
            _LOG.info("management server %s works again", self.url)

    def probe(self, *, urgent: bool = False) -> None:
        if not self._is_closed and self.breaker.take_probe(urgent=urgent):
            try:
                run_detached("management-probe", self._probe)
            except RuntimeError:  # no thread can be started
                self.breaker.probe_ended(succeeded=False)

    def _probe(self) -> None:
        succeeded = False
        try:
            succeeded = self.session.probe()
        finally:
            self.breaker.probe_ended(succeeded=succeeded)


class ManagementServers:
    """The servers of one management cluster. Thread-safe."""

    def __init__(
        self, settings: ManagementSettings, clock: Clock = SYSTEM_CLOCK, metrics: ManagementMetrics | None = None
    ) -> None:
        self._request_timeout_s = settings.request_timeout_s
        metrics = ManagementMetrics() if metrics is None else metrics
        self._servers = [Server(url, settings, clock, metrics) for url in settings.servers]

    def close(self) -> None:
        for server in self._servers:
            server.close()

    def any_works(self) -> bool:
        return any(server.breaker.is_closed() for server in self._servers)

    def accepts(self, credentials: Credentials, deadline: Deadline) -> bool:
        """Return whether a server accepts a login: one attempt, which changes nothing for other requests."""
        server = next((each for each in self._servers if each.breaker.is_closed()), self._servers[0])
        return server.session.accepts(credentials, deadline.at_most(self._request_timeout_s))

    def send(self, request: Request, deadline: Deadline) -> object:
        """Return the first response that a server gives. Raises `OutcomeUnknown` unless a repeat is harmless."""
        waiting = self._in_order(request, deadline)
        is_repeated = False
        while True:
            server = waiting.pop(0)
            try:
                return self._send(server, request, deadline, has_others=bool(waiting))
            except (OutcomeUnknown, ServerUnreachable, DeadlineReached, InvalidResponse) as error:
                if deadline.expired() or (isinstance(error, OutcomeUnknown) and not request.is_repeatable):
                    raise
                if waiting:
                    continue
                if not isinstance(error, FailedWhileQueued):  # then a probe decides
                    # A broken connection may have been an old idle one; a server that hangs would hang again.
                    if is_repeated or not isinstance(error, OutcomeUnknown) or error.timed_out:
                        raise
                    is_repeated = True
                waiting.append(server)

    def _send(self, server: Server, request: Request, deadline: Deadline, *, has_others: bool) -> object:
        if not server.breaker.is_closed() and server.breaker.is_slow:
            server.probe(urgent=True)
            if not server.breaker.wait_for_probe(deadline):
                raise ServerUnreachable(server.url, "it failed and has not answered a probe since", timed_out=True)
        limit = self._limit(server, deadline, has_others=has_others)
        return response_body(server.send(request, limit), server.url, request)

    def _in_order(self, request: Request, deadline: Deadline) -> list[Server]:
        """Return all servers, failed ones last; one repeatable request at a time tries a half-open server first."""
        if not self.any_works():
            for server in self._servers:  # together, so that one request waits for all of them at once
                server.probe(urgent=True)
        if len(self._servers) == 1:
            return list(self._servers)
        first: list[Server] = []
        last: list[Server] = []
        for server in self._servers:
            if server.breaker.is_closed():
                first.append(server)
                continue
            server.probe()
            may_try = not first and request.is_repeatable and server.breaker.slow_at_s < deadline.started_s
            (first if may_try and server.breaker.take_trial() else last).append(server)
        return first + last

    def _limit(self, server: Server, deadline: Deadline, *, has_others: bool) -> Deadline:
        """Return the deadline for one server: at most half of the remaining time while others could answer."""
        left_s = deadline.remaining_s()
        if left_s <= 0:
            raise DeadlineReached("a response of the management")
        seconds = min(self._request_timeout_s, left_s / 2 if has_others else left_s)
        if server.breaker.slow_at_s >= deadline.started_s:
            seconds = min(seconds, _SECOND_WAIT_S)
        if has_others and not server.breaker.is_closed():
            seconds = min(seconds, _TRIAL_LIMIT_S)
        return Deadline(deadline.clock.monotonic() + seconds, deadline.started_s, deadline.clock)
