"""ListVolumes, ControllerGetVolume, GetCapacity, ValidateVolumeCapabilities and Probe."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from csi_driver.controller.ports import Clusters
from csi_driver.controller.requests import ControllerSettings, ValidateRequest
from csi_driver.deadline import Deadline
from csi_driver.model import Capability, Capacity, ListedVolume, Segments


class Inventory:
    """Tell which volumes there are, who holds them, and what room is left."""

    def __init__(self, clusters: Clusters, settings: ControllerSettings) -> None:
        self._clusters = clusters
        self._settings = settings

    def volumes(self, max_entries: int, starting_token: str, *, deadline: Deadline) -> tuple[list[ListedVolume], str]:
        raise NotImplementedError

    def volume(self, volume_id: str, *, deadline: Deadline) -> ListedVolume:
        raise NotImplementedError

    def capacity(
        self,
        capabilities: Sequence[Capability],
        parameters: Mapping[str, str],
        segments: Segments | None,
        *,
        deadline: Deadline,
    ) -> Capacity:
        raise NotImplementedError

    def validate(self, request: ValidateRequest, *, deadline: Deadline) -> str | None:
        raise NotImplementedError

    def ready(self, *, deadline: Deadline) -> bool:
        raise NotImplementedError
