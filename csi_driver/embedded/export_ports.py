# SPDX-License-Identifier: Apache-2.0
"""TCP ports of the exports: each attachment to a node has one of its own, from the range of --export-ports."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

from csi_driver.embedded.documents import NO_FREE_PORT, ApiError, detail


@dataclass(eq=False)
class ExportPorts:
    """`limits`: first and last port. `assigned`: returns the ports of all records and exports."""

    limits: tuple[int, int]
    assigned: Callable[[], set[int]]
    leaving: set[int] = field(default_factory=set)
    """Ports of exports without a record that are withdrawn later."""
    _taken: set[int] = field(default_factory=set)
    """Not to be taken; also ports of attachments that ended without an export, until all ports are taken."""
    _next: int = 0

    def start(self) -> None:
        self._taken = self._in_use()

    def _in_use(self) -> set[int]:
        return self.assigned() | set(self.leaving)

    def take(self) -> int:
        """Return a port that was not taken for as long as possible: earlier nodes may still try it. Raises ApiError."""
        low, high = self.limits
        width = high - low + 1
        if len(self._taken) >= width:
            self._taken = self._in_use()
        for number in range(self._next, self._next + width):
            port = low + number % width
            if port not in self._taken:
                self._taken.add(port)
                self._next = port - low + 1
                return port
        reason = f"all ports from {low} to {high} are in use; raise --export-ports"
        raise ApiError(1694, "The volume is not attached", detail(NO_FREE_PORT, reason))

    def give_back(self, port: int) -> None:
        """Note that the export of a port has been withdrawn."""
        self._taken.discard(port)
        self.leaving.discard(port)

    def count_free(self) -> int:
        low, high = self.limits
        return high - low + 1 - sum(low <= port <= high for port in self._in_use())
