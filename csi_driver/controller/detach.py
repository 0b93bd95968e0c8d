"""ControllerUnpublishVolume."""

from __future__ import annotations

import logging

from csi_driver.controller.holding import BUSY, is_released, is_withdrawn, references
from csi_driver.controller.locate import Located, find_client, locate
from csi_driver.controller.ports import Clusters
from csi_driver.controller.requests import ControllerSettings
from csi_driver.controller.waiting import within
from csi_driver.deadline import Deadline
from csi_driver.errors import DeadlineReached, PreconditionFailed
from csi_driver.storage_model import Client, ClientStatus, DeviceReport

_log = logging.getLogger(__name__)

_BUSY_WAIT_S = 10.0
"""A device that was open for so long without a break is answered to be in use; the client goes on trying."""


class Detach:
    """Give volumes up on nodes. Keeps no state: several controllers may do the same at once."""

    def __init__(self, clusters: Clusters, settings: ControllerSettings) -> None:
        self._clusters = clusters
        self._settings = settings

    def unpublish(self, volume_id: str, node_id: str, *, deadline: Deadline) -> None:
        """Give up the handle's hold of the volume on the node (all nodes when `node_id` is empty), and wait for it.

        Success when volume, node or attachment do not exist (any more), and for a client that is down once the wish is
        recorded: by that wish `takeover` knows that the volume may be given to another node. Raises
        `PreconditionFailed` when the device stays open there, `DeadlineReached` otherwise; the wish stands in both
        cases.
        """
        located = locate(self._clusters, volume_id, deadline=deadline)
        if located is None:
            return
        if node_id:
            client = find_client(located.management, node_id, deadline=deadline)
            clients = [client] if client is not None else []
        else:
            clients = located.management.clients_holding(located.volume.uuid, deadline=deadline)
        for client in clients:
            self._withdraw(located, client, deadline=deadline)
        for client in clients:
            self._await_gone(located, client, deadline=deadline)

    def _withdraw(self, located: Located, client: Client, *, deadline: Deadline) -> None:
        volume = located.volume
        wish = client.wishes.get(volume.uuid)
        if wish is None and client.id in volume.reservation.attached:
            # The client's document may come from a server that has not yet heard of the attachment.
            named: str | None = located.reference
        elif wish is None or wish.is_detaching or located.reference not in references(wish, volume):
            return
        else:
            # Named, although it may be the default: without a name every reference would go.
            named = located.reference if located.reference in wish.reference_ids else None
        force = self._settings.force_detach
        located.management.detach(client, volume, reference_id=named, force=force, deadline=deadline)
        _log.info("detaching volume %s, uuid %s, from %s", volume.name, volume.uuid, client.id)

    def _await_gone(self, located: Located, client: Client, *, deadline: Deadline) -> None:
        volume = located.volume
        report: DeviceReport | None = None
        is_gone = False
        busy: Deadline | None = None

        def is_decided() -> bool:
            nonlocal report, is_gone, busy
            latest = located.management.client(client.id, deadline=deadline)
            if latest is None or latest.uuid != client.uuid:
                is_gone = True
                return True
            report = latest.devices.get(volume.uuid)
            is_down = latest.status is ClientStatus.DOWN
            is_gone = is_withdrawn(latest, located) if is_down else is_released(latest, located)
            if report is None or report.status not in BUSY:
                busy = None
            elif busy is None:
                busy = Deadline.after(_BUSY_WAIT_S, deadline.clock)
            return is_gone or (busy is not None and busy.expired())

        within(deadline, self._settings.detach_wait_s, margin_s=self._settings.answer_margin_s).wait_until(is_decided)
        if is_gone:
            return
        if report is not None and report.status in BUSY:
            raise PreconditionFailed(
                f"volume {volume.name} cannot be detached from node {client.id}: its device is open there "
                f"({report.status.name.lower()}); wanted it unmounted and closed"
            )
        state = "gone" if report is None else report.status.name.lower()
        raise DeadlineReached(f"volume {volume.name} to be detached from node {client.id} (device {state})")
