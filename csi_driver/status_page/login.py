# SPDX-License-Identifier: Apache-2.0
"""Sessions, and the limit of failed logins. Both are in memory and bounded."""

from __future__ import annotations

import ipaddress
import secrets
import threading
from collections.abc import Hashable
from dataclasses import dataclass, field, replace

from csi_driver.deadline import SYSTEM_CLOCK, Clock

IDLE_S = 3600.0
_MOST_KEYS = 1024


@dataclass(frozen=True, slots=True)
class Session:
    """`zones`: those that accepted the user's login."""

    zones: frozenset[str]
    opened_s: float
    used_s: float


@dataclass(eq=False, slots=True)
class OpenSessions:
    """Sessions by their tokens. One ends after `idle_s` without a request, and `longest_s` after its login."""

    idle_s: float = IDLE_S
    clock: Clock = SYSTEM_CLOCK
    longest_s: float = 12 * 3600.0
    most: int = 256
    _guard: threading.Lock = field(default_factory=threading.Lock)
    _open: dict[str, Session] = field(default_factory=dict, repr=False)
    """By token, that without a request for longest first."""

    def open(self, zone: str = "", former: str | None = None) -> str:
        """Return the token of a new session, with the zones of `former`, which it replaces."""
        before, now_s = self.find(former), self.clock.monotonic()
        zones = frozenset({zone}) | (before.zones if before is not None else frozenset())
        token = secrets.token_urlsafe(32)
        with self._guard:
            self._open.pop(former or "", None)
            while len(self._open) >= self.most:
                del self._open[next(iter(self._open))]
            self._open[token] = Session(zones, before.opened_s if before is not None else now_s, now_s)
        return token

    def find(self, token: str | None) -> Session | None:
        """Return an open session, and restart its idle time."""
        with self._guard:
            session, now_s = self._open.pop(token or "", None), self.clock.monotonic()
            if session is None or token is None:
                return None
            if now_s - session.used_s > self.idle_s or now_s - session.opened_s > self.longest_s:
                return None
            self._open[token] = session = replace(session, used_s=now_s)
            return session

    def close(self, token: str | None) -> None:
        with self._guard:
            self._open.pop(token or "", None)


@dataclass(eq=False, slots=True)
class LoginLimit:
    """Slows guesses of a password down: after `free` failures in a row attempts of the same key need growing pauses.

    Attempts with one key wait for each other's pauses, others never. An attempt in a pause is not made, and does not
    make the pause longer.
    """

    free: int = 10
    first_s: float = 1.0
    longest_s: float = 60.0
    forget_s: float = 900.0
    clock: Clock = SYSTEM_CLOCK
    _guard: threading.Lock = field(default_factory=threading.Lock)
    _failures: dict[Hashable, tuple[int, float, float]] = field(default_factory=dict)
    """Failures in a row, when the next attempt may be made, and when they are forgotten; the oldest first."""

    def begin(self, key: Hashable) -> float:
        """Count an attempt as failed and return 0; or return the seconds until one may be made."""
        with self._guard:
            now_s = self.clock.monotonic()
            failures, next_s, forgotten_s = self._failures.get(key, (0, now_s, now_s))
            if now_s < next_s:
                return next_s - now_s
            failures = 1 if now_s >= forgotten_s else failures + 1
            over = failures - self.free
            pause_s = min(self.first_s * 2.0 ** min(over, 30), self.longest_s) if over >= 0 else 0.0
            self._failures.pop(key, None)
            while len(self._failures) >= _MOST_KEYS:
                del self._failures[next(iter(self._failures))]
            self._failures[key] = failures, now_s + pause_s, now_s + pause_s + self.forget_s
            return 0.0

    def succeeded(self, key: Hashable) -> None:
        with self._guard:
            self._failures.pop(key, None)


def network_of(peer: str) -> str:
    """Return the address of a client, of IPv6 its network: one client may have all its addresses."""
    try:
        address = ipaddress.ip_address(peer.partition("%")[0])
    except ValueError:
        return ""
    if isinstance(address, ipaddress.IPv6Address):
        if address.ipv4_mapped is not None:
            return str(address.ipv4_mapped)
        return str(ipaddress.ip_network((address, 64), strict=False))
    return str(address)
