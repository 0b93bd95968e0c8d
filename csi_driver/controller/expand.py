"""ControllerExpandVolume."""

from __future__ import annotations

import logging

from csi_driver import capacity as sizes
from csi_driver.controller import access
from csi_driver.controller.handing import encryption_of, reserved_bytes
from csi_driver.controller.locate import require
from csi_driver.controller.ports import Clusters
from csi_driver.controller.record import Creation
from csi_driver.controller.requests import ControllerSettings
from csi_driver.deadline import Deadline
from csi_driver.errors import CapacityOutOfRange, Exhausted, OperationPending, PreconditionFailed, VolumeNotFound
from csi_driver.model import BlockAccess, Capability, CapacityRange
from csi_driver.publish_context import Encryption
from csi_driver.storage_model import Volume

_log = logging.getLogger(__name__)
_MOST_ATTEMPTS = 3


class Expand:
    """Make volumes larger, attached or not."""

    def __init__(self, clusters: Clusters, settings: ControllerSettings) -> None:
        self._clusters = clusters
        self._settings = settings

    def expand(
        self, volume_id: str, capacity: CapacityRange, capability: Capability | None, *, deadline: Deadline
    ) -> tuple[int, bool]:
        """Return what the user has afterwards, and whether a node must grow what lies on the device.

        A header of encryption is not the user's: the volume has that much more.

        A volume that is large enough is left alone. Raises `CapacityOutOfRange`, also where there is no room: an
        orchestrator takes `Exhausted` for an expansion that may still go on, and lets nobody ask for less instead.
        `VolumeNotFound`.
        """
        if capability is not None:
            access.check(capability)
        located = require(self._clusters, volume_id, deadline=deadline)
        management, volume = located.management, located.volume
        reserved = reserved_bytes(volume, located.creation)
        for _ in range(_MOST_ATTEMPTS):
            more = sizes.extension(volume, capacity, reserved)
            if more is None:
                return volume.size_bytes - reserved, _node_has_work(volume, located.creation, capability)
            if volume.is_being_made:
                raise OperationPending(f"volume {volume.name} is still being created (action {volume.action}); retry")
            refusal: PreconditionFailed | OperationPending | CapacityOutOfRange | None = None
            try:
                management.extend_volume(volume, more.capacity_gb, deadline=deadline)
                _log.info("extended volume %s, uuid %s, to %d bytes", volume.name, volume.uuid, more.size_bytes)
            except (PreconditionFailed, OperationPending) as problem:
                # Another controller may have extended it since it was read; then the volume shows it.
                refusal = problem
            except Exhausted as problem:
                refusal = CapacityOutOfRange(
                    f"no space to extend volume {volume.name} from {volume.size_bytes} "
                    f"to {more.size_bytes} bytes: {problem}"
                )
                refusal.__cause__ = problem
            before = volume
            present = management.volume(before.name, deadline=deadline)
            if present is None or present.uuid != before.uuid:
                raise VolumeNotFound(volume_id, "it was deleted concurrently")
            volume = present
            if refusal is not None and volume.size_bytes == before.size_bytes:
                raise refusal
        if sizes.extension(volume, capacity, reserved) is not None:
            raise OperationPending(
                f"volume {volume.name} has {volume.size_bytes} bytes and is still being extended; retry"
            )
        return volume.size_bytes - reserved, _node_has_work(volume, located.creation, capability)


def _node_has_work(volume: Volume, creation: Creation, capability: Capability | None) -> bool:
    """Tell whether anything on the device must grow: a filesystem, or encryption; the device grows by itself."""
    is_block = capability is not None and isinstance(capability.access, BlockAccess)
    return not is_block or encryption_of(volume, creation, {}) is not Encryption.NONE
