"""ControllerExpandVolume."""

from __future__ import annotations

from csi_driver.controller.ports import Clusters
from csi_driver.controller.requests import ControllerSettings
from csi_driver.deadline import Deadline
from csi_driver.model import Capability, CapacityRange


class Expand:
    """Make volumes larger."""

    def __init__(self, clusters: Clusters, settings: ControllerSettings) -> None:
        self._clusters = clusters
        self._settings = settings

    def expand(
        self, volume_id: str, capacity: CapacityRange, capability: Capability | None, *, deadline: Deadline
    ) -> tuple[int, bool]:
        raise NotImplementedError
