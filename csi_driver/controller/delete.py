"""DeleteVolume."""

from __future__ import annotations

import logging

from csi_driver.controller.locate import locate
from csi_driver.controller.ports import Clusters
from csi_driver.controller.record import Creation
from csi_driver.controller.requests import ControllerSettings
from csi_driver.controller.waiting import within
from csi_driver.deadline import Deadline
from csi_driver.errors import OperationPending, PreconditionFailed, shown
from csi_driver.model import VolumeHandle

_log = logging.getLogger(__name__)


class Delete:
    """Delete volumes. Keeps no state: several controllers may do the same at once."""

    def __init__(self, clusters: Clusters, settings: ControllerSettings) -> None:
        self._clusters = clusters
        self._settings = settings

    def delete(self, volume_id: str, *, deadline: Deadline) -> None:
        """Delete the volume and wait until it is gone; success when it does not exist (any more).

        Raises `PreconditionFailed` while anybody holds it, and for a handle that was made from another one by
        changing its last part: a reader's copy of the volume never deletes it.
        """
        located = locate(self._clusters, volume_id, deadline=deadline)
        if located is None:
            return
        management, volume = located.management, located.volume

        def is_gone() -> bool:
            present = management.volume(volume.name, deadline=deadline)
            return present is None or present.uuid != volume.uuid

        if not volume.is_being_deleted:
            _refuse_copy(volume_id, located.handle, located.creation)
            holders = management.clients_holding(volume.uuid, deadline=deadline)
            if holders:
                names = ", ".join(sorted(f"{client.id} ({client.uuid})" for client in holders))
                raise PreconditionFailed(f"volume {shown(volume_id)} is still attached to {names}; wanted it detached")
            if management.delete_volume(volume, deadline=deadline):
                _log.info("deleted volume %s, uuid %s, zone %s", volume.name, volume.uuid, located.zone)
            elif not is_gone():
                # "Not found" is no proof that it is gone: the server says it as well of what is pending.
                raise OperationPending(f"volume {volume.name} is there, but was not found to be deleted; call again")
        wait = within(deadline, self._settings.usable_wait_s, margin_s=self._settings.answer_margin_s)
        if not wait.wait_until(is_gone):
            raise OperationPending(f"volume {volume.name} is being deleted; call again to learn that it is gone")


def _refuse_copy(volume_id: str, handle: VolumeHandle, creation: Creation) -> None:
    if handle.reference is None or handle.reference == creation.reference:
        return
    issued = "none" if creation.reference is None else shown(creation.reference)
    raise PreconditionFailed(
        f"volume {shown(volume_id)} was issued with another last part ({issued}): this is a copy of its handle, "
        "and deleting a copy does not delete the volume"
    )
