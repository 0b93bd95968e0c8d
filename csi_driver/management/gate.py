"""Who may ask a management server now: a limit of requests at once, and rest for a server that failed.

A server that failed rests. While it does, nobody waits for it: those who stood in line are sent away, and a probe in
the background finds out when it answers again. Then one caller tries it with a request that may be repeated, and its
answer opens the gate for all. So a dead or hanging server costs time once, not once for each request.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator
from enum import Enum, auto

from csi_driver.deadline import Clock, Deadline
from csi_driver.errors import DeadlineReached, ServerUnreachable

_FIRST_REST_S = 0.5
_LONGEST_REST_S = 30.0
_VERDICT_WAIT_S = 1.0
_TRIAL_S = 6.0
"""Longer than the request of a trial may take; whoever took one and never came has lost it by then."""
_SLOW_S = 1.0
"""A failure that took longer is not one to have twice, whatever it was (a name server that hangs, say)."""


class _State(Enum):
    WORKS = auto()
    RESTS = auto()
    SHOWS_LIFE = auto()


class SentAway(ServerUnreachable):
    """The server failed while somebody stood in line for it."""


class Gate:
    """The way to one server. Thread-safe."""

    def __init__(self, url: str, limit: int, clock: Clock) -> None:
        self._url = url
        self._clock = clock
        self._free = limit
        lock = threading.Lock()
        self._changed = threading.Condition(lock)
        """Life or death."""
        self._place = threading.Condition(lock)
        """Somebody leaves, or all have to."""
        self._state = _State.WORKS
        self._is_slow = False
        self._failures = 0
        self._failed_at_s = float("-inf")
        self._slow_at_s = float("-inf")
        self._rests_until_s = float("-inf")
        self._probed_at_s = float("-inf")
        self._probing_since_s = float("-inf")
        self._is_probed = False
        self._tried_until_s = float("-inf")

    # --- whether to come here ---------------------------------------------------------------------------

    def is_open(self) -> bool:
        """Tell whether the server worked when it was last asked."""
        return self._state is _State.WORKS

    def is_quick(self) -> bool:
        """Tell whether asking it costs little, even if it does not work: its failures were quick ones."""
        return not self._is_slow

    def wasted(self, since_s: float) -> bool:
        """Tell whether the server has made somebody wait in vain since then."""
        return self._slow_at_s >= since_s

    def take_trial(self) -> bool:
        """Give one caller the trial of a server that shows life again."""
        with self._changed:
            now_s = self._clock.monotonic()
            if self._state is not _State.SHOWS_LIFE or now_s < self._tried_until_s:
                return False
            self._tried_until_s = now_s + _TRIAL_S
            return True

    @contextlib.contextmanager
    def entered(self, deadline: Deadline) -> Iterator[None]:
        """Hold one of the places at the server.

        Raises `SentAway` where the server fails while we wait for a place, `DeadlineReached` where none becomes free
        in time.
        """
        with self._changed:
            failed_at_s = self._failed_at_s
            while self._free == 0:
                if not self._place.wait(deadline.remaining_s()) and self._free == 0 and deadline.expired():
                    raise DeadlineReached(f"a free connection to management server {self._url}")
                if self._failed_at_s != failed_at_s:
                    raise SentAway(self._url, "it failed while this request waited for a free connection; retry")
            self._free -= 1
        try:
            yield
        finally:
            with self._changed:
                self._free += 1
                self._place.notify()

    # --- how it went ------------------------------------------------------------------------------------

    def answered(self) -> bool:
        """Note that the server works; tell whether that is news."""
        if self._state is _State.WORKS:
            return False
        with self._changed:
            is_news = self._failures > 0
            self._state = _State.WORKS
            self._failures = 0
            self._is_slow = False
            return is_news

    def failed(self, took_s: float, *, timed_out: bool) -> bool:
        """Note a failure: the server rests, twice as long at every failure in a row; those in line are sent away.

        What fails while it rests already is the same failure, met by several. Tell whether it worked until now.
        """
        with self._changed:
            was = self._state
            now_s = self._clock.monotonic()
            self._failed_at_s = now_s
            if timed_out or took_s > _SLOW_S:
                self._is_slow = True
                self._slow_at_s = now_s
            if self._state is not _State.RESTS or now_s >= self._rests_until_s:
                self._rest(now_s)
            self._changed.notify_all()
            self._place.notify_all()
            return was is _State.WORKS

    def _rest(self, now_s: float) -> None:
        self._state = _State.RESTS
        self._rests_until_s = now_s + min(_FIRST_REST_S * 2 ** min(self._failures, 10), _LONGEST_REST_S)
        self._failures += 1

    def closed(self) -> ServerUnreachable:
        """Return the failure for somebody who is not let in. No number in it changes while the server is down."""
        return ServerUnreachable(self._url, "it failed and has not answered a probe since", timed_out=self._is_slow)

    # --- probes -----------------------------------------------------------------------------------------

    def take_probe(self, *, urgent: bool = False) -> bool:
        """Tell one caller to see to a probe, when the rest is over; `urgent`: no other server works either."""
        with self._changed:
            now_s = self._clock.monotonic()
            due_s = min(self._rests_until_s, self._probed_at_s + _FIRST_REST_S) if urgent else self._rests_until_s
            if self._is_probed or self._state is not _State.RESTS or now_s < due_s:
                return False
            self._is_probed = True
            self._probing_since_s = now_s
            return True

    def probed(self, *, alive: bool) -> None:
        """Note how the probe ended."""
        with self._changed:
            now_s = self._clock.monotonic()
            self._is_probed = False
            self._probed_at_s = now_s
            if self._state is _State.RESTS:
                if alive:
                    self._state = _State.SHOWS_LIFE
                elif now_s >= self._rests_until_s:
                    self._rest(now_s)
            self._changed.notify_all()

    def shows_life(self, deadline: Deadline) -> bool:
        """Tell whether the server shows life, once the probe that is under way has ended.

        One that has been under way for a moment is not waited for any longer, whoever asks.
        """
        with self._changed:
            left_s = self._probing_since_s + _VERDICT_WAIT_S - self._clock.monotonic()
            self._changed.wait_for(
                lambda: not self._is_probed or self._state is not _State.RESTS,
                max(0.0, min(left_s, deadline.remaining_s())),
            )
            return self._state is not _State.RESTS
