"""DeleteVolume."""

from __future__ import annotations

import logging
from collections.abc import Sequence

from csi_driver.controller.fencing import was_preempted
from csi_driver.controller.ports import Clusters
from csi_driver.controller.volume_lookup import locate
from csi_driver.controller.volume_metadata import Creation
from csi_driver.controller.waiting import within
from csi_driver.deadline import Deadline
from csi_driver.errors import OperationPending, PreconditionFailed, shown
from csi_driver.model import VolumeHandle
from csi_driver.settings import ControllerSettings
from csi_driver.storage_model import Client, ClientStatus, Volume

_log = logging.getLogger(__name__)


class DeleteVolume:
    """Delete volumes. Keeps no state: several controllers may do the same at once."""

    def __init__(self, clusters: Clusters, settings: ControllerSettings) -> None:
        self._clusters = clusters
        self._settings = settings

    def delete(self, volume_id: str, *, deadline: Deadline) -> None:
        """Delete the volume and wait until it is gone; success when it does not exist (any more).

        Raises `PreconditionFailed` while anybody holds it who was not preempted (`takeover.was_preempted`), and for a
        handle that was made from another one by changing its last part: a reader's copy never deletes the volume.
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
            _refuse_held(volume_id, volume, management.clients_holding(volume.uuid, deadline=deadline))
            if management.delete_volume(volume, deadline=deadline):
                _log.info("deleted volume %s, uuid %s, zone %s", volume.name, volume.uuid, located.zone)
            elif not is_gone():
                # "Not found" is no proof that it is gone: the server says it as well of what is pending.
                raise OperationPending(
                    f"volume {volume.name} exists, but the management did not find it to delete it: it has a pending "
                    "operation; retry"
                )
        wait = within(deadline, self._settings.usable_wait_s, margin_s=self._settings.answer_margin_s)
        if not wait.wait_until(is_gone):
            raise OperationPending(f"volume {volume.name} is still being deleted; retry")


def _refuse_held(volume_id: str, volume: Volume, holders: Sequence[Client]) -> None:
    """Raise `PreconditionFailed` naming the clients that have the volume; those that were preempted do not count."""
    preempted = [client.id for client in holders if was_preempted(volume, client)]
    left = sorted((client for client in holders if client.id not in preempted), key=lambda client: client.id)
    if left:
        names = ", ".join(f"{client.id} ({client.uuid})" for client in left)
        down = ", ".join(client.id for client in left if client.status is ClientStatus.DOWN)
        way_out = (
            f"; the storage client of {down} is down, so the volume cannot be detached there: if the node does not "
            "come back, delete its client from the management (POST /clients/delete)"
        )
        raise PreconditionFailed(
            f"volume {shown(volume_id)} is still attached to {names}; detach it first{way_out if down else ''}"
        )
    if preempted:
        _log.warning(
            "deleting volume %s, uuid %s, which is still in the document of %s: it was preempted there (version %d)",
            *(volume.name, volume.uuid, ", ".join(sorted(preempted)), volume.reservation.version),
        )


def _refuse_copy(volume_id: str, handle: VolumeHandle, creation: Creation) -> None:
    if handle.reference is None or handle.reference == creation.reference:
        return
    issued = "none" if creation.reference is None else shown(creation.reference)
    raise PreconditionFailed(
        f"last part of volume handle {shown(volume_id)}: expected {issued}, as issued, got {shown(handle.reference)}; "
        "a changed copy of a handle cannot delete the volume: use the original handle"
    )
