"""ControllerPublishVolume and ControllerUnpublishVolume."""

from __future__ import annotations

from csi_driver.controller.ports import Clusters
from csi_driver.controller.requests import ControllerSettings, PublishRequest
from csi_driver.deadline import Deadline
from csi_driver.model import PublishContext


class Attach:
    """Attach volumes to nodes and detach them."""

    def __init__(self, clusters: Clusters, settings: ControllerSettings) -> None:
        self._clusters = clusters
        self._settings = settings

    def publish(self, request: PublishRequest, *, deadline: Deadline) -> PublishContext:
        raise NotImplementedError

    def unpublish(self, volume_id: str, node_id: str, *, deadline: Deadline) -> None:
        raise NotImplementedError
