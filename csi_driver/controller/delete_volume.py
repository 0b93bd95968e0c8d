# SPDX-License-Identifier: Apache-2.0
"""DeleteVolume, and the deletion of a volume that CreateVolume cannot return."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass

from csi_driver.controller.fencing import was_preempted
from csi_driver.controller.ports import Clusters, Management
from csi_driver.controller.volume_lookup import Located, client_names, locate
from csi_driver.controller.volume_metadata import AttachmentRecord, read_attachments
from csi_driver.deadline import Deadline
from csi_driver.errors import OperationPending, PreconditionFailed, shown
from csi_driver.settings import ControllerSettings
from csi_driver.storage_model import Client, ClientStatus, Deletion, Reservation, Volume

_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class DeleteVolume:
    clusters: Clusters
    settings: ControllerSettings

    def delete(self, volume_id: str, *, deadline: Deadline) -> None:
        """Delete the volume and wait until it is gone; success if it does not exist.

        Raises `PreconditionFailed` while a client holds it that was not preempted, and for a changed copy of the
        handle.
        """
        located = locate(self.clusters, volume_id, deadline=deadline)
        if located is None:
            return
        management, volume = located.management, located.volume

        def is_gone() -> bool:
            present = management.volume(volume.name, deadline=deadline)
            return present is None or present.uuid != volume.uuid

        if not volume.is_being_deleted:
            _refuse_copy(located)
            _refuse_held(located, management.clients_holding(volume.uuid, deadline=deadline))
            deletion = management.delete_volume(volume, deadline=deadline)
            if deletion is not Deletion.NOT_FOUND:
                _log.info("deleted volume %s, uuid %s, zone %s", volume.name, volume.uuid, located.zone)
            if deletion is Deletion.DONE:
                return
            if deletion is Deletion.NOT_FOUND and not is_gone():
                # "Not found" does not prove that it is gone: the server also answers so during a pending operation.
                raise OperationPending(
                    f"volume {volume.name} exists, but the management did not find it to delete it: it has a pending "
                    "operation; retry"
                )
        if not self.settings.wait(deadline, self.settings.usable_wait_s).wait_until(is_gone):
            raise OperationPending(f"volume {volume.name} is still being deleted; retry")


def delete_unreturned(
    management: Management, volume: Volume, reason: str, *, wait: Deadline, deadline: Deadline
) -> None:
    """Delete a volume that no call returned. Raises `PreconditionFailed` if it was ever attached."""
    problem = f"volume {volume.name} has {volume.size_bytes} bytes: {reason}"

    def is_gone() -> bool:
        present = management.volume(volume.name, deadline=deadline)
        if present is None or present.uuid != volume.uuid or present.is_being_deleted:
            return True
        is_used = present.reservation != Reservation() or read_attachments(present.metadata) != AttachmentRecord()
        if is_used or management.clients_holding(present.uuid, deadline=deadline):
            raise PreconditionFailed(f"{problem}; it was attached and is kept")
        try:
            management.delete_volume(present, deadline=deadline)
        except OperationPending:  # not ready to be deleted yet
            return False
        return True

    if not wait.wait_until(is_gone):
        raise OperationPending(f"{problem}; it cannot be deleted yet; retry")
    _log.info(
        "deleted volume %s, uuid %s, which no call returned: its %d bytes are out of the requested range",
        *(volume.name, volume.uuid, volume.size_bytes),
    )


def _refuse_held(located: Located, holders: Sequence[Client]) -> None:
    volume = located.volume
    preempted = [client.id for client in holders if was_preempted(volume, client)]
    left = [client for client in holders if client.id not in preempted]
    if left:
        lost = [client.id for client in left if client.status is ClientStatus.DOWN and not client.connects_on_demand]
        down = ", ".join(sorted(lost))
        way_out = (
            f"; the storage client of {down} is down, so the volume cannot be detached there: if the node does not "
            "come back, delete its client from the management (POST /clients/delete)"
        )
        raise PreconditionFailed(
            f"volume {shown(located.volume_id)} is still attached to {client_names(left)}; detach it first"
            f"{way_out if down else ''}"
        )
    if preempted:
        _log.warning(
            "deleting volume %s, uuid %s, which is still in the document of %s: it was preempted there (version %d)",
            *(volume.name, volume.uuid, ", ".join(sorted(preempted)), volume.reservation.version),
        )


def _refuse_copy(located: Located) -> None:
    given, issued = located.handle.reference, located.creation.reference
    if given is None or given == issued:
        return
    raise PreconditionFailed(
        f"last part of volume handle {shown(located.volume_id)}: expected "
        f"{'none' if issued is None else shown(issued)}, as issued, got {shown(given)}; "
        "a changed copy of a handle cannot delete the volume: use the original handle"
    )
