"""ControllerModifyVolume."""

from __future__ import annotations

import logging
from collections.abc import Mapping

from csi_driver.controller.locate import require
from csi_driver.controller.ports import Clusters
from csi_driver.deadline import Deadline
from csi_driver.parameters import storage_class

_log = logging.getLogger(__name__)


class Modify:
    """Change volumes that are there. Touches no metadata: several controllers write that, each for its attachments."""

    def __init__(self, clusters: Clusters) -> None:
        self._clusters = clusters

    def modify(self, volume_id: str, parameters: Mapping[str, str], *, deadline: Deadline) -> None:
        """Make the volume as the parameters say, all of them or none; done already is success.

        Raises `InvalidRequest` for what no volume, or not this one, can have, `VolumeNotFound`.
        """
        changes = storage_class.parse_changes(parameters)
        located = require(self._clusters, volume_id, deadline=deadline)
        volume = located.volume
        storage_class.check_changes(volume, parameters)
        if storage_class.is_applied(volume, changes):
            return
        located.management.update_volume(volume, changes, deadline=deadline)
        keys = ", ".join(sorted(parameters))
        _log.info("modified %s of volume %s, uuid %s, zone %s", keys, volume.name, volume.uuid, located.zone)
