# SPDX-License-Identifier: Apache-2.0
"""ControllerReclaimSpace of CSI-Addons: the storage gives back the blocks of a detached volume that hold only zeros."""

from __future__ import annotations

import logging
from dataclasses import dataclass

from csi_driver.controller.features import ZoneFeatures
from csi_driver.controller.ports import Clusters
from csi_driver.controller.volume_lookup import require
from csi_driver.deadline import Deadline
from csi_driver.errors import NotOffered

_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class ReclaimSpace:
    clusters: Clusters
    features: ZoneFeatures

    def reclaim(self, volume_id: str, *, deadline: Deadline) -> tuple[int, int] | None:
        """Return the bytes that the volume took before and after; None for a volume in use, which stays as it is.

        A volume that is attached meanwhile keeps its remaining zeros. Raises `NotOffered`, `VolumeNotFound`.
        """
        located = require(self.clusters, volume_id, deadline=deadline)
        management = self.features.find(located.zone, "reclaims_space", deadline=deadline)
        if management is None:
            raise NotOffered(f"the storage of zone {located.zone} gives back no space of volumes that are not attached")
        taken: list[int] = []
        offset: int | None = 0
        while offset is not None:
            step = management.reclaim_space(located.volume, offset, deadline=deadline)
            if step is None:
                _log.info("volume %s is in use: its node gives back its space", located.volume.name)
                break
            taken += (step.before_bytes, step.after_bytes)
            offset = step.next_offset
        return (taken[0], taken[-1]) if taken else None
