"""What the node's pod does before it is stopped: where the node is being drained, wait for its volumes to be gone.

A drain takes the workloads off a node and the driver with them, in any order. Whoever unmounts a volume after the
driver has gone does not: the volume stays attached to a node that is about to vanish, and its next user waits six
minutes for the control plane to give up on it. In every other case (an update, a restart) there is nothing to wait for.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Collection
from dataclasses import dataclass, field
from typing import Protocol

from csi_driver.deadline import Deadline
from csi_driver.errors import DriverError
from csi_driver.kubernetes.api import ApiFailed
from csi_driver.kubernetes.objects import Node, attachment_name

_LOG = logging.getLogger(__name__)

_LOOK_S = 2.0
_UNAUTHORIZED = 401
_FORBIDDEN = 403


class Cluster(Protocol):
    """The API server, as far as a drain goes (`csi_driver.kubernetes.api`)."""

    def node(self, name: str) -> Node | None: ...

    def has_attachment(self, name: str) -> bool: ...


@dataclass(slots=True)
class PreStop:
    """Waits for a node's volumes. `mounted` returns the handles of those that are mounted here by kubelet.

    `cluster` is None where no API server is configured. Then, and where it does not answer, only the mounts count.
    """

    cluster: Cluster | None
    node_name: str
    driver_name: str
    mounted: Callable[[], Collection[str]]
    _handles: set[str] = field(default_factory=set)
    _told: str = ""
    _may_ask_for_attachments: bool = True

    def wait(self, deadline: Deadline) -> str:
        """Wait, at most until the deadline; return why the wait is over. Raises no `DriverError`."""
        end = ""

        def is_over() -> bool:
            nonlocal end
            end, waits_for = self._look()
            if waits_for and waits_for != self._told:
                _LOG.info("pre-stop waits, %.0f s at most: %s", deadline.remaining_s(), waits_for)
                self._told = waits_for
            return not waits_for

        if not deadline.wait_until(is_over, first_s=_LOOK_S, most_s=_LOOK_S):
            end = f"timed out: {self._told}"
        return end

    def _look(self) -> tuple[str, str]:
        """Return why there is nothing to wait for, or "", and what is waited for, or ""."""
        mounted = self._mounted()
        try:
            node = self.cluster.node(self.node_name) if self.cluster is not None else None
        except DriverError as error:
            if isinstance(error, ApiFailed) and error.status == _UNAUTHORIZED:
                # Its account is gone, as only an uninstallation takes it; the next installation waits for this end.
                return f"the service account was deleted, so the driver is being uninstalled: {error}", ""
            return self._judged_by_mounts(mounted, str(error))
        if self.cluster is None:
            return self._judged_by_mounts(mounted, "no API server is configured")
        why = node.why_draining() if node is not None else "the node object was deleted"
        if not why:
            return f"node {self.node_name} is not being drained", ""
        self._handles |= mounted
        if node is not None:
            self._handles |= node.handles(self.driver_name)
        waits_for = self._rest(self.cluster, node, mounted)
        return ("" if waits_for else f"{why}, and no volume is left"), f"{why}, and {waits_for}" if waits_for else ""

    def _mounted(self) -> frozenset[str]:
        try:
            return frozenset(self.mounted())
        except DriverError as error:
            _LOG.warning("cannot read the mounts, assuming that no volume is mounted: %s", error)
            return frozenset()

    def _judged_by_mounts(self, mounted: Collection[str], reason: str) -> tuple[str, str]:
        """Judge where nobody says whether the node is being drained: with nothing mounted that does not matter."""
        if not mounted:
            return f"no volume is mounted; {reason}", ""
        return "", f"{_listed(mounted)} mounted, and whether the node is being drained is not known: {reason}"

    def _rest(self, cluster: Cluster, node: Node | None, mounted: Collection[str]) -> str:
        """Return what is left of the volumes that were ever seen here; empty when nothing is."""
        if mounted:
            return f"{_listed(mounted)} mounted"
        known = node.handles(self.driver_name) if node is not None else frozenset()
        if known:
            return f"{_listed(known)} attached"
        left = next((handle for handle in sorted(self._handles) if self._is_attached(cluster, handle)), None)
        return f"{_listed([left])} being detached" if left is not None else ""

    def _is_attached(self, cluster: Cluster, handle: str) -> bool:
        """Tell whether the volume's VolumeAttachment is there; one that is gone is not asked for again."""
        if not self._may_ask_for_attachments:
            return False
        try:
            is_there = cluster.has_attachment(attachment_name(handle, self.driver_name, self.node_name))
        except ApiFailed as error:
            if error.status == _FORBIDDEN:
                _LOG.warning("%s; using the volumes of the node object only", error)
                self._may_ask_for_attachments = False
                return False
            _LOG.warning("%s; assuming that it still exists", error)
            return True
        if not is_there:
            self._handles.discard(handle)
        return is_there


def _listed(handles: Collection[str]) -> str:
    """Name the volumes, the first three of many."""
    first = sorted(handles)[:3]
    more = f" and {len(handles) - 3} more are" if len(handles) > 3 else " is" if len(handles) == 1 else " are"
    return f"{', '.join(first)}{more}"
