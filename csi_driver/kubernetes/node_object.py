# SPDX-License-Identifier: Apache-2.0
"""Maintain the Node object of this node: label and start-up taint; and wait for a drain in the preStop hook."""

from __future__ import annotations

import http.client
import logging
import random
from collections.abc import Callable, Collection
from dataclasses import dataclass, field

from csi_driver.background import Backoff, SelfPaced
from csi_driver.deadline import SYSTEM_CLOCK, Clock, Deadline
from csi_driver.errors import DriverError
from csi_driver.kubernetes.api import ApiFailed, ApiServer, Conflict, Node, attachment_name

_LOG = logging.getLogger(__name__)

LABEL = "nvmesh-csi/client-status"
READY = "ready"
LABEL_INTERVAL_S = 10.0
"""Between two checks of the storage client, which use no network."""
_LONGEST_LABEL_PAUSE_S = 300.0
REAPPLY_S = 300.0
"""After this time the label is set again, in case it was removed."""
UNUSABLE_CHECKS = 3
"""Consecutive checks that must find the client unusable: an upgrade of the client takes a second or two."""


@dataclass(slots=True)
class ClientLabel:
    """Keeps the label `nvmesh-csi/client-status` at `ready` while `why_unusable` returns "", and absent otherwise.

    Workloads require the label by node affinity, as with older drivers. It stays when the driver ends: a driver update
    keeps no pods away.
    """

    server: ApiServer
    node_name: str
    why_unusable: Callable[[], str]
    clock: Clock = SYSTEM_CLOCK
    _value: str | None = None
    _was_set: bool = False
    _reapply_at_s: float = 0.0
    _unusable_checks: int = 0
    _last_reason: str = ""

    def loop(self) -> SelfPaced:
        return SelfPaced("node-label", self.check, LABEL_INTERVAL_S, backoff=Backoff(_LONGEST_LABEL_PAUSE_S))

    def check(self) -> float:
        value = self._wanted()
        if self._was_set and value == self._value and self.clock.monotonic() < self._reapply_at_s:
            return LABEL_INTERVAL_S
        self.server.label_node(self.node_name, {LABEL: value})
        if not self._was_set or value != self._value:
            _LOG.info("node %s: label %s is now %s", self.node_name, LABEL, value or "removed")
        self._was_set, self._value = True, value
        self._reapply_at_s = self.clock.monotonic() + REAPPLY_S
        return LABEL_INTERVAL_S

    def _wanted(self) -> str | None:
        """Return the label's value; a client that is unusable for a moment keeps the present one."""
        reason = self.why_unusable()
        if not reason:
            self._unusable_checks, self._last_reason = 0, ""
            return READY
        self._unusable_checks += 1
        if reason != self._last_reason:
            _LOG.warning("node %s cannot use volumes: %s", self.node_name, reason)
            self._last_reason = reason
        return None if self._unusable_checks >= UNUSABLE_CHECKS or not self._was_set else self._value


STARTING_INTERVAL_S = 2.0
"""Between two checks while pods wait for the driver."""
TAINT_INTERVAL_S = 60.0
"""Between two checks afterwards; the API server answers them from its cache."""
_CONFLICT_S = 0.2


@dataclass(slots=True)
class StartupTaint:
    """Removes the start-up taint when `why_not_ready` returns "" and the CSINode of this node lists the driver.

    An autoscaler sets the taint on a new node, so that no pod is placed before the scheduler knows how many volumes the
    node takes. A node that is recreated under the same name has it again, so the check goes on.
    """

    server: ApiServer
    node_name: str
    driver_name: str
    key: str
    why_not_ready: Callable[[], str]
    jitter: Callable[[], float] = random.random
    _logged: str = ""

    def loop(self) -> SelfPaced:
        return SelfPaced("startup-taint", self.check, TAINT_INTERVAL_S, backoff=Backoff(TAINT_INTERVAL_S))

    def check(self) -> float:
        if reason := self.why_not_ready():
            self._log(f"stays: {reason}")
            return STARTING_INTERVAL_S
        try:
            pause_s = self._try()
        except Conflict:
            return _CONFLICT_S * (1 + self.jitter())
        return pause_s * (0.5 + 0.5 * self.jitter())

    def _try(self) -> float:
        node = self.server.node(self.node_name)
        if node is None:
            self._log("is unknown: there is no such node object")
            return TAINT_INTERVAL_S
        if not node.has_taint(self.key):
            self._logged = ""
            return TAINT_INTERVAL_S
        if self.server.node_id(self.node_name, self.driver_name) is None:
            self._log(f"stays: kubelet has not registered {self.driver_name} yet")
            return STARTING_INTERVAL_S
        self.server.set_taints(node, [taint for taint in node.taints if taint.get("key") != self.key])
        _LOG.info("node %s: removed taint %s, the driver is ready", self.node_name, self.key)
        self._logged = ""
        return TAINT_INTERVAL_S

    def _log(self, state: str) -> None:
        if state != self._logged:
            _LOG.info("node %s: the taint %s %s", self.node_name, self.key, state)
            self._logged = state


_DRAIN_INTERVAL_S = 2.0


@dataclass(slots=True)
class PreStop:
    """The preStop hook: waits for the node's volumes while the node is being drained, else not at all.

    A volume that is unmounted after the driver has stopped stays attached to a node that may vanish, and its next user
    waits six minutes for the control plane's forced detach. Without an answer of `server` only the mounts count.
    """

    server: ApiServer | None
    node_name: str
    driver_name: str
    mounted: Callable[[], Collection[str]]
    _handles: set[str] = field(default_factory=set)
    _logged: str = ""
    _may_get_attachments: bool = True

    def wait(self, deadline: Deadline) -> str:
        """Wait until no volume is left or the deadline expires; return why the wait ended. Raises no `DriverError`."""
        end = ""

        def is_over() -> bool:
            nonlocal end
            end, remaining = self._check()
            if remaining and remaining != self._logged:
                _LOG.info("pre-stop waits, %.0f s at most: %s", deadline.remaining_s(), remaining)
                self._logged = remaining
            return not remaining

        if not deadline.wait_until(is_over, first_s=_DRAIN_INTERVAL_S, most_s=_DRAIN_INTERVAL_S):
            end = f"timed out: {self._logged}"
        return end

    def _check(self) -> tuple[str, str]:
        mounted = self._mounted()
        if self.server is None:
            return _judge_by_mounts(mounted, "no API server is configured")
        try:
            node = self.server.node(self.node_name)
        except DriverError as error:
            if isinstance(error, ApiFailed) and error.status == http.client.UNAUTHORIZED:
                # Only an uninstallation deletes the account, and the next installation waits for this pod's end.
                return f"the service account was deleted, so the driver is being uninstalled: {error}", ""
            return _judge_by_mounts(mounted, str(error))
        reason = node.why_draining() if node is not None else "the node object was deleted"
        if not reason:
            return f"node {self.node_name} is not being drained", ""
        remaining = self._remaining(self.server, node, mounted)
        return ("", f"{reason}, and {remaining}") if remaining else (f"{reason}, and no volume is left", "")

    def _mounted(self) -> frozenset[str]:
        try:
            return frozenset(self.mounted())
        except DriverError as error:
            _LOG.warning("cannot read the mounts, assuming that no volume is mounted: %s", error)
            return frozenset()

    def _remaining(self, server: ApiServer, node: Node | None, mounted: Collection[str]) -> str:
        in_use = node.handles(self.driver_name) if node is not None else frozenset()
        self._handles |= {*mounted, *in_use}
        if mounted:
            return f"{_listed(mounted)} mounted"
        if in_use:
            return f"{_listed(in_use)} attached"
        attached = next((handle for handle in sorted(self._handles) if self._is_attached(server, handle)), None)
        return f"{_listed([attached])} being detached" if attached is not None else ""

    def _is_attached(self, server: ApiServer, handle: str) -> bool:
        """Return whether the volume's VolumeAttachment exists; one that is gone is forgotten."""
        if not self._may_get_attachments:
            return False
        try:
            exists = server.has_attachment(attachment_name(handle, self.driver_name, self.node_name))
        except ApiFailed as error:
            if error.status == http.client.FORBIDDEN:
                _LOG.warning("%s; using the volumes of the node object only", error)
                self._may_get_attachments = False
                return False
            _LOG.warning("%s; assuming that it still exists", error)
            return True
        if not exists:
            self._handles.discard(handle)
        return exists


def _judge_by_mounts(mounted: Collection[str], reason: str) -> tuple[str, str]:
    """Judge without the API server: whether the node is being drained matters only while volumes are mounted."""
    if not mounted:
        return f"no volume is mounted; {reason}", ""
    return "", f"{_listed(mounted)} mounted, and whether the node is being drained is not known: {reason}"


def _listed(handles: Collection[str]) -> str:
    first = sorted(handles)[:3]
    more = f" and {len(handles) - 3} more are" if len(handles) > 3 else " is" if len(handles) == 1 else " are"
    return f"{', '.join(first)}{more}"
