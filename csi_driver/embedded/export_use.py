# SPDX-License-Identifier: Apache-2.0
"""Whether nodes use their exports, by the TCP connections to the exports' ports."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from enum import Enum

from csi_driver.deadline import Clock
from csi_driver.embedded.clients import Pair
from csi_driver.nvme_model import KEEP_ALIVE_S, Connection, SocketState

SILENT_S = 15.0
"""Time without a connection after which a node counts as dead or cut off. It reconnects every 2 s."""
_CLOSED_BY_TARGET = (SocketState.FIN_WAIT1, SocketState.FIN_WAIT2, SocketState.CLOSING)


class Use(Enum):
    CONNECTED = "connected, or perhaps about to connect again"
    ENDED = "the node has closed its connections"
    LOST = "the node has been dead or cut off for a while"


@dataclass(eq=False)
class ExportUse:
    """`connections`: as `NvmeTarget.connections`. Times are those of successful looks only."""

    connections: Callable[[Collection[int]], Mapping[int, tuple[Connection, ...]]]
    clock: Clock
    unproven: set[str] = field(default_factory=set)
    """NQNs of attachments from before the start: their nodes may not have connected again yet."""
    connected: int = 0
    """Live connections at the latest look."""
    _closing: dict[str, float] = field(default_factory=dict)
    """When the target closed the connections of an NQN, because it noticed no host that has not come back since."""
    _heard: dict[str, float] = field(default_factory=dict)
    """When the node of an NQN sent something last, by the latest look, which found a connection. The target leaves no
    trace of the connections that it ends: it resets them."""
    _silent: dict[str, float] = field(default_factory=dict)
    """When a client had a connection last, or got its first export."""

    def __post_init__(self) -> None:
        self._started_s = self._looked_s = self.clock.monotonic()

    def begin(self, client: str) -> None:
        self._silent.setdefault(client, self.clock.monotonic())

    def may_return(self, nqn: str) -> bool:
        """Return whether a node that has not been seen since the start has time left to connect again."""
        return nqn in self.unproven and self.clock.monotonic() - self._started_s < SILENT_S

    def is_down(self, client: str) -> bool:
        """Return whether no look has found a connection of a node with exports for a while."""
        return self._looked_s - self._silent.get(client, self._looked_s) >= SILENT_S

    def of(self, client: str, nqn: str, port: int) -> Use:
        """Look at the connections to one port now."""
        found = self.connections((port,)).get(port, ())
        if any(each.is_live for each in found):
            self._silent[client] = self.clock.monotonic()  # it may have returned since the last look
        return self._judge(nqn, found)

    def _judge(self, nqn: str, found: Collection[Connection]) -> Use:
        now_s = self.clock.monotonic()
        if any(each.is_live for each in found):
            self.unproven.discard(nqn)
            self._closing.pop(nqn, None)
            self._heard[nqn] = now_s - min(each.silent_s or 0.0 for each in found if each.is_live)
            return Use.CONNECTED
        was_silent = now_s - self._heard.pop(nqn, now_s) >= KEEP_ALIVE_S
        if was_silent or any(each.state in _CLOSED_BY_TARGET for each in found):
            self._closing.setdefault(nqn, now_s)
        since_s = self._closing.get(nqn, self._started_s if nqn in self.unproven else None)
        if since_s is None:
            return Use.ENDED
        return Use.LOST if now_s - since_s >= SILENT_S else Use.CONNECTED

    def look(self, exports: Mapping[Pair, tuple[str, int]]) -> list[Pair]:
        """Look at the connections to all exports, which are NQNs and ports; return those that no node uses."""
        found = self.connections([port for _, port in exports.values()]) if exports else {}
        now_s, live, unused = self.clock.monotonic(), set[str](), list[Pair]()
        for pair, (nqn, port) in exports.items():
            if any(each.is_live for each in found.get(port, ())):
                live.add(pair[0])
            if self._judge(nqn, found.get(port, ())) is not Use.CONNECTED:
                unused.append(pair)
        for nqn in (self._closing.keys() | self._heard.keys()) - {nqn for nqn, _ in exports.values()}:
            self._closing.pop(nqn, None)
            self._heard.pop(nqn, None)
        clients = {client for client, _ in exports}
        self._silent = {each: now_s if each in live else self._silent.get(each, now_s) for each in clients}
        self.connected = sum(each.is_live for connections in found.values() for each in connections)
        self._looked_s = now_s
        return unused
