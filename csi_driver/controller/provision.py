"""CreateVolume and DeleteVolume."""

from __future__ import annotations

from csi_driver.controller.ports import Clusters
from csi_driver.controller.requests import ControllerSettings, CreateRequest
from csi_driver.deadline import Deadline
from csi_driver.model import ProvisionedVolume


class Provision:
    """Make volumes and delete them."""

    def __init__(self, clusters: Clusters, settings: ControllerSettings) -> None:
        self._clusters = clusters
        self._settings = settings

    def create(self, request: CreateRequest, *, deadline: Deadline) -> ProvisionedVolume:
        raise NotImplementedError

    def delete(self, volume_id: str, *, deadline: Deadline) -> None:
        raise NotImplementedError
