"""Keeps the node's label `nvmesh-csi/client-status` true: `ready` while volumes can be used here, else absent.

Workloads are scheduled by it (required affinity to the value `ready`), as the older drivers of this name set it. It is
taken away rather than given another value: an affinity that only asks for the key must not match a node that is not
ready. At the driver's own end it stays: an update of the driver is no reason to keep pods away.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Protocol

from csi_driver.background import Backoff
from csi_driver.deadline import SYSTEM_CLOCK, Clock
from csi_driver.errors import DriverError

_LOG = logging.getLogger(__name__)

LABEL = "nvmesh-csi/client-status"
READY = "ready"

LOOK_S = 10.0
"""Time between two looks at the client; touches no network."""
ASSERT_S = 300.0
"""The label is set anew after this time, in case that somebody took it away; the server then changes nothing."""
PATIENCE = 3
"""Looks in a row that must find the client unusable: an upgrade of it under running volumes takes a second or two."""
_LONGEST_PAUSE_S = 300.0


class Nodes(Protocol):
    """What changes the labels of a node; None = take away."""

    def label_node(self, name: str, labels: Mapping[str, str | None]) -> None: ...


@dataclass(slots=True)
class ClientLabel:
    """The label of one node. `why_unusable` says why no volume can be used here; empty = they can.

    `tend` does what is due, never raises a `DriverError`, and returns the seconds until it is due again.
    """

    nodes: Nodes
    node_name: str
    why_unusable: Callable[[], str]
    clock: Clock = SYSTEM_CLOCK
    backoff: Backoff = field(default_factory=lambda: Backoff(_LONGEST_PAUSE_S))
    _set_to: str | None = None
    _was_set: bool = False
    _assert_at_s: float = 0.0
    _bad_looks: int = 0
    _last_reason: str = ""

    def tend(self) -> float:
        """Look at the client, change the label where that is due, and return the seconds until the next look."""
        wanted = self._wanted()
        if self._was_set and wanted == self._set_to and self.clock.monotonic() < self._assert_at_s:
            return LOOK_S
        try:
            self.nodes.label_node(self.node_name, {LABEL: wanted})
        except DriverError as error:
            pause_s = self.backoff.after_failure_s()
            _LOG.warning("%s; retrying in %.1f s", error, pause_s)
            return pause_s
        if not self._was_set or wanted != self._set_to:
            _LOG.info("node %s: label %s is now %s", self.node_name, LABEL, wanted or "removed")
        self.backoff.succeeded()
        self._was_set, self._set_to = True, wanted
        self._assert_at_s = self.clock.monotonic() + ASSERT_S
        return LOOK_S

    def _wanted(self) -> str | None:
        """Return the value that is true now; one that is bad for a moment only is still good."""
        reason = self.why_unusable()
        if not reason:
            self._bad_looks, self._last_reason = 0, ""
            return READY
        self._bad_looks += 1
        if reason != self._last_reason:
            _LOG.warning("node %s cannot use volumes: %s", self.node_name, reason)
            self._last_reason = reason
        is_settled = self._bad_looks >= PATIENCE or not self._was_set
        return None if is_settled else self._set_to
