"""Asks this process over its own CSI socket, as kubelet and the sidecars do: what answers here answers them."""

from __future__ import annotations

from pathlib import Path

from csi_driver.errors import StorageUnavailable
from csi_driver.rpc.client import CallFailed, CsiClient

PROBE_TIMEOUT_S = 2.0
NODE_INFO_TIMEOUT_S = 5.0


class Itself:
    """The endpoint of this process. Every question takes a connection of its own, so that a lost socket shows."""

    def __init__(self, socket: Path) -> None:
        self._socket = socket

    def why_silent(self) -> str:
        """Say why no call is answered here; empty = they are.

        An answer is one also where it says that the driver is not ready, or that this machine lacks something: a
        restart would cure neither.
        """
        why, is_answered = self._probe()
        return "" if is_answered else why

    def why_not_ready(self) -> str:
        """Say why Probe does not answer that the driver is ready; empty = it does."""
        return self._probe()[0]

    def _probe(self) -> tuple[str, bool]:
        try:
            with CsiClient(self._socket) as client:
                is_ready = client.is_ready(timeout_s=PROBE_TIMEOUT_S)
        except CallFailed as failure:
            return str(failure), failure.code == "FAILED_PRECONDITION"
        return "" if is_ready else "Probe returns ready=false: the driver is still starting", True

    def check_node(self) -> None:
        """Return when NodeGetInfo is answered. Raises `StorageUnavailable` with what it says instead."""
        try:
            with CsiClient(self._socket, timeout_s=NODE_INFO_TIMEOUT_S) as client:
                client.node_info()
        except CallFailed as failure:
            raise StorageUnavailable(f"NodeGetInfo of this node failed: {failure}") from failure
