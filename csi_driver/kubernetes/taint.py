"""Takes the start-up taint off this node once the driver can serve it.

Who makes nodes (an autoscaler, kubelet's --register-with-taints) puts the taint there, so that no pod comes before the
driver: it would wait for its volumes, or be placed without regard to how many the node takes. It goes when NodeGetInfo
works and the node's CSINode object lists the driver, which is what the scheduler counts by. A node that is made anew
under the same name has it again, so it is looked for as long as the driver runs.
"""

from __future__ import annotations

import logging
import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

from csi_driver.background import Backoff
from csi_driver.errors import DriverError
from csi_driver.kubernetes.api import TaintsChanged
from csi_driver.kubernetes.objects import Node

_LOG = logging.getLogger(__name__)

WAIT_S = 2.0
"""Between two looks while pods wait for the driver."""
LOOK_S = 60.0
"""Between two looks afterwards; answered from the API server's cache."""
_CONFLICT_S = 0.2
_LONGEST_PAUSE_S = 60.0


class Nodes(Protocol):
    """The API server, as far as taints go (`csi_driver.kubernetes.api`)."""

    def node(self, name: str) -> Node | None: ...

    def node_id(self, node_name: str, driver_name: str) -> str | None: ...

    def set_taints(self, node: Node, taints: Sequence[Mapping[str, object]]) -> None: ...


@dataclass(slots=True)
class StartupTaint:
    """The start-up taint of one node. `why_not_ready` says why the driver cannot serve it; empty = it can.

    `tend` does what is due, never raises a `DriverError`, and returns the seconds until it is due again.
    """

    nodes: Nodes
    node_name: str
    driver_name: str
    key: str
    why_not_ready: Callable[[], str]
    jitter: Callable[[], float] = random.random
    _backoff: Backoff = field(default_factory=lambda: Backoff(_LONGEST_PAUSE_S))
    _told: str = ""

    def tend(self) -> float:
        """Take the taint off where that is due, and return the seconds until the next look."""
        reason = self.why_not_ready()
        if reason:
            self._tell(f"stays: {reason}")
            return WAIT_S
        try:
            pause_s = self._look()
        except TaintsChanged:
            return _CONFLICT_S * (1 + self.jitter())
        except DriverError as error:
            pause_s = self._backoff.after_failure_s()
            _LOG.warning("%s; retrying in %.1f s", error, pause_s)
            return pause_s
        self._backoff.succeeded()
        return pause_s * (0.5 + 0.5 * self.jitter())

    def _look(self) -> float:
        node = self.nodes.node(self.node_name)
        if node is None:
            self._tell("is unknown: there is no such node object")
            return LOOK_S
        if not node.has_taint(self.key):
            self._told = ""
            return LOOK_S
        if self.nodes.node_id(self.node_name, self.driver_name) is None:
            self._tell(f"stays: kubelet has not registered {self.driver_name} yet")
            return WAIT_S
        self.nodes.set_taints(node, [taint for taint in node.taints if taint.get("key") != self.key])
        _LOG.info("node %s: removed taint %s, the driver is ready", self.node_name, self.key)
        self._told = ""
        return LOOK_S

    def _tell(self, state: str) -> None:
        if state != self._told:
            _LOG.info("node %s: the taint %s %s", self.node_name, self.key, state)
            self._told = state
