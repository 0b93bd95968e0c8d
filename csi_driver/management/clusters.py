"""Which management serves which zone; fits `csi_driver.controller.ports.Clusters`."""

from __future__ import annotations

from collections.abc import Sequence

from csi_driver.management.client import ManagementClient


class OneCluster:
    """A single storage cluster under its zone's name."""

    def __init__(self, zone: str, management: ManagementClient) -> None:
        self._zone = zone
        self._management = management

    def zones(self) -> Sequence[str]:
        """Return the one zone."""
        return (self._zone,)

    def management(self, zone: str) -> ManagementClient | None:
        """Return the management of this zone, None for every other name."""
        return self._management if zone == self._zone else None
