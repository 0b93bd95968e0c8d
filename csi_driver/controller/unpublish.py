"""ControllerUnpublishVolume."""

from __future__ import annotations

import logging

from csi_driver.controller.fencing import (
    device_state,
    is_released,
    is_withdrawn,
    references,
)
from csi_driver.controller.ports import Clusters
from csi_driver.controller.volume_lookup import (
    Located,
    ZoneNotServed,
    find_client,
    locate,
)
from csi_driver.controller.waiting import within
from csi_driver.controller.zones import ask, served
from csi_driver.deadline import Deadline
from csi_driver.errors import (
    DeadlineReached,
    shown,
)
from csi_driver.model import VolumeHandle
from csi_driver.settings import AttachSettings
from csi_driver.storage_model import Client, ClientStatus, DesiredAttachment, DeviceReport

_log = logging.getLogger(__name__)


class UnpublishVolume:
    """Give volumes up on nodes. Keeps no state: several controllers may do the same at once."""

    def __init__(self, clusters: Clusters, settings: AttachSettings) -> None:
        self._clusters = clusters
        self._settings = settings

    def unpublish(self, volume_id: str, node_id: str, *, deadline: Deadline) -> None:
        """Detach the volume from the node (from all nodes when `node_id` is empty) under this handle, and wait for it.

        Success when volume, node or attachment do not exist, and for a client that is down as soon as the detachment is
        recorded: `takeover` allows another node to take the volume because of that record. Raises `DeadlineReached`
        when the device is not released in time, for example because a program has it open; the record remains.

        `force_detach` counts when the last reference is withdrawn. A volume that is being detached is not attached
        again in order to force it: that would give the device back to the node and remove the record.
        """
        try:
            located = locate(self._clusters, volume_id, deadline=deadline)
        except ZoneNotServed as problem:
            self._prove_never_attached(problem, volume_id, node_id, deadline=deadline)
            return
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

    def _prove_never_attached(
        self, problem: ZoneNotServed, volume_id: str, node_id: str, *, deadline: Deadline
    ) -> None:
        """Return where a volume of a zone that is not served cannot be attached to the node; raise otherwise.

        A storage client belongs to one cluster. So no volume of another cluster was ever attached to a node whose
        client a served zone knows: the PersistentVolume names a wrong zone. The zone may also be the served one under
        an earlier name; then that client has the volume, or has it no longer. A client counts by its uuid alone: two
        clusters may have hosts of one name.
        """
        handle = VolumeHandle.parse(volume_id)
        clients = ask(
            self._clusters.zones(),
            lambda zone: served(self._clusters, zone).client_by_uuid(node_id, deadline=deadline),
            deadline=deadline,
        ).all()
        known = {zone: client for zone, client in clients.items() if client is not None}
        if not known:
            raise ZoneNotServed(
                volume_id, problem.zone,
                f"node {shown(node_id)} is in no configured zone, so the volume may still be attached; configure the "
                "zone again. If that cluster or node no longer exists, remove the finalizer of the VolumeAttachment",
            ) from problem  # fmt: skip
        for zone, client in known.items():
            if handle is None or _has(client, handle):
                raise ZoneNotServed(
                    volume_id, problem.zone,
                    f"node {client.id} has a volume of that name attached in zone {zone}; if that is the same cluster, "
                    "give it its earlier name again, else retry when that volume is detached",
                ) from problem  # fmt: skip
        _log.warning("%s; it is not attached to %s, a node of %s", problem, node_id, ", ".join(sorted(known)))

    def _withdraw(self, located: Located, client: Client, *, deadline: Deadline) -> None:
        volume = located.volume
        desired = client.desired.get(volume.uuid)
        if desired is None and client.id in volume.reservation.attached:
            # The client's document may come from a server that has not yet heard of the attachment.
            named: str | None = located.reference
        elif desired is None or desired.is_detaching or located.reference not in references(desired, volume):
            return
        else:
            # Named, although it may be the default: without a name every reference would go.
            named = located.reference if located.reference in desired.reference_ids else None
        force = self._settings.force_detach
        located.management.detach(client, volume, reference_id=named, force=force, deadline=deadline)
        _log.info("detaching volume %s, uuid %s, from %s", volume.name, volume.uuid, client.id)

    def _await_gone(self, located: Located, client: Client, *, deadline: Deadline) -> None:
        latest: Client | None = client

        def is_gone() -> bool:
            nonlocal latest
            latest = located.management.client(client.id, deadline=deadline)
            if latest is None or latest.uuid != client.uuid:
                return True
            return (is_withdrawn if latest.status is ClientStatus.DOWN else is_released)(latest, located)

        wait = within(deadline, self._settings.detach_wait_s, margin_s=self._settings.answer_margin_s)
        if not wait.wait_until(is_gone) and latest is not None:
            state = device_state(latest, located.volume)
            raise DeadlineReached(f"volume {located.volume.name} to be detached from node {client.id} ({state})")


def _has(client: Client, handle: VolumeHandle) -> bool:
    """Tell whether the client holds the volume of the handle's uuid; by its name where the handle has no uuid.

    A client may report a device without its name, which may be any volume's.
    """
    entries: list[DesiredAttachment | DeviceReport] = [*client.desired.values(), *client.devices.values()]
    return any(
        (entry.volume_name in (handle.name, "") if handle.uuid is None else entry.volume_uuid.lower() == handle.uuid)
        and client.holds(entry.volume_uuid)
        for entry in entries
    )
