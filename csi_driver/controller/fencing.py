# SPDX-License-Identifier: Apache-2.0
"""ControllerUnpublishVolume, the state of attachments, and the decision behind every preemption.

A lost node may still write. An attachment that preempts the reservation makes the storage cut the I/O of all holders,
but a silent client does not prove a lost node: its cable may be broken. By default the orchestrator decides: it calls
ControllerUnpublish for the node (the pod is gone and the node is tainted out-of-service, or after a timeout). That
records the detachment, and the record, on a client that is down, permits to preempt it.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass, replace

from csi_driver.controller.ports import Clusters
from csi_driver.controller.volume_lookup import Located, ZoneNotServed, find_client, locate
from csi_driver.controller.volume_metadata import claim_of, read_attachments
from csi_driver.controller.zones import ask, served
from csi_driver.deadline import Deadline
from csi_driver.errors import DeadlineReached, OperationPending, PreconditionFailed, shown
from csi_driver.model import VolumeHandle
from csi_driver.reporting import SILENT, EventReason, Reporter, Subject
from csi_driver.settings import AttachSettings, Fencing
from csi_driver.storage_model import (
    Client,
    ClientStatus,
    DesiredAttachment,
    DeviceReport,
    DeviceStatus,
    ReservationMode,
    Volume,
)

_log = logging.getLogger(__name__)

_DETACHED = (DeviceStatus.DETACHED, DeviceStatus.DETACHED_AFTER_SHUTDOWN)
_NOT_ATTACHED = (
    *_DETACHED, DeviceStatus.ATTACH_FAILED, DeviceStatus.RESERVATION_DENIED, DeviceStatus.UNKNOWN_VOLUME,
)  # fmt: skip


def is_detaching(client: Client, volume_uuid: str) -> bool:
    desired, report = client.desired.get(volume_uuid), client.devices.get(volume_uuid)
    if desired is not None:
        return desired.is_detaching
    return report is not None and report.status not in _NOT_ATTACHED


def is_released(client: Client, located: Located) -> bool:
    uuid, reference = located.volume.uuid, located.reference
    desired, report = client.desired.get(uuid), client.devices.get(uuid)
    if desired is None:
        return report is None or report.status in _NOT_ATTACHED
    if desired.is_detaching or reference in desired.references:
        return False
    # Others on the node still need the device. A report may lack its references.
    return report is None or report.reference_ids is None or reference not in report.reference_ids


def is_release_recorded(client: Client, located: Located) -> bool:
    desired = client.desired.get(located.volume.uuid)
    return desired is None or desired.is_detaching or located.reference not in desired.references


def missing(client: Client, located: Located, mode: ReservationMode) -> str:
    report = client.devices.get(located.volume.uuid)
    if client.status is ClientStatus.DOWN and not client.connects_on_demand:
        return "the attachment (the storage client is down)"
    if report is None:
        return "the attachment (the client reports no device)"
    if report.status is DeviceStatus.RESERVATION_DENIED or report.mode not in (mode, ReservationMode.NONE):
        return f"the reservation (device {report.status.name.lower()}, held as {report.mode.name.lower()})"
    if report.status is not DeviceStatus.ATTACHED:
        return f"the attachment (device {report.status.name.lower()})"
    if client.connects_on_demand and report.export is None:
        return "the attachment (the storage has not exported the volume yet)"
    if not report.io_enabled:
        return "I/O on the attached device (it is disabled)"
    if report.reference_ids is not None and located.reference not in report.reference_ids:
        return f"the reference {located.reference} on the attached device"
    return ""


def device_state(client: Client, volume: Volume) -> str:
    """Describe a slow detachment. The management drops reports of a busy device, so it keeps showing as attached."""
    report = client.devices.get(volume.uuid)
    if report is None:
        return "device gone"
    state = f"device {report.status.name.lower()}"
    if report.status is not DeviceStatus.ATTACHED:
        return state
    if volume.status not in ("online", "unavailable"):
        state += f", and the volume is {volume.status} in the storage management, which may be the reason"
    shows_programs = f"`fuser -vam /dev/nvmesh/{volume.name}` there"
    if client.connects_on_demand:
        return f"{state}; the node is connected to it, and a program there may have it open: see {shows_programs}"
    return (
        f"{state}; a program on that node may have it open: see {shows_programs}, and with NVMesh "
        f"/proc/nvmeibc/volumes/{volume.name}/client_processes"
    )


def client_state(client: Client) -> str:
    status = client.status.name.lower()
    return (
        f"the NVMe connection of the node is {status}"
        if client.connects_on_demand
        else f"the storage client is {status}"
    )


@dataclass(frozen=True, slots=True)
class UnpublishVolume:
    clusters: Clusters
    settings: AttachSettings
    reporter: Reporter = SILENT

    def unpublish(self, volume_id: str, node_id: str, *, deadline: Deadline) -> None:
        """Detach the volume under this handle from the node (without `node_id`: from all), and wait for it.

        Success if there is nothing to detach, and for a client that is down as soon as the detachment is recorded.
        Raises `DeadlineReached` if the device is not released in time; the record remains. A volume that is being
        detached is not attached again in order to force it: that would give the device back to the node and remove the
        record.
        """
        try:
            located = locate(self.clusters, volume_id, deadline=deadline)
        except ZoneNotServed as problem:
            self._prove_never_attached(problem, volume_id, node_id, deadline)
            return
        if located is None:
            return
        if node_id:
            client = find_client(located.management, node_id, only=located.volume.uuid, deadline=deadline)
            clients = [client] if client is not None else []
        else:
            clients = located.management.clients_holding(located.volume.uuid, deadline=deadline)
        after = [self._detach(located, client, deadline) for client in clients]
        for client, known in zip(clients, after, strict=True):
            self._await_released(located, client, known, deadline)

    def _prove_never_attached(self, problem: ZoneNotServed, volume_id: str, node_id: str, deadline: Deadline) -> None:
        """Return if a volume of a zone that is not served cannot be attached to the node; else raise.

        A storage client belongs to one cluster: the client of a served zone never had a volume of another cluster. A
        zone may have been renamed: then the client's document shows the volume. Hosts may share a name, so uuids count.
        """
        clients = ask(
            self.clusters.zones(),
            lambda zone: served(self.clusters, zone).client_by_uuid(node_id, deadline=deadline),
            deadline=deadline,
        ).all()
        known = {zone: client for zone, client in clients.items() if client is not None}
        reasons = [
            f"node {client.id} has a volume of that name attached in zone {zone}; if that is the same cluster, "
            "give it its earlier name again, else retry when that volume is detached"
            for zone, client in known.items()
            if _holds(client, problem.handle)
        ]
        if not known:
            reasons.append(
                f"node {shown(node_id)} is in no configured zone, so the volume may still be attached; configure the "
                "zone again. If that cluster or node no longer exists, remove the finalizer of the VolumeAttachment"
            )
        if reasons:
            raise ZoneNotServed(volume_id, problem.handle, reasons[0]) from problem
        _log.warning("%s; it is not attached to %s, a node of %s", problem, node_id, ", ".join(sorted(known)))

    def _detach(self, located: Located, client: Client, deadline: Deadline) -> Client | None:
        """Ask for the detachment if it is not recorded yet. Return the client after it, None if that must be read."""
        volume = located.volume
        desired = client.desired.get(volume.uuid)
        if desired is None and client.id in volume.reservation.attached:
            # The client's document may come from a server that does not know of the attachment yet.
            reference: str | None = located.reference
        elif desired is None or is_release_recorded(client, located):
            return client
        else:
            # Named, although it may be the default: without a name every reference would be removed.
            reference = located.reference if located.reference in desired.reference_ids else None
        force = self.settings.force_detach
        answered = located.management.detach(client, volume, reference_id=reference, force=force, deadline=deadline)
        _log.info("detaching volume %s, uuid %s, from %s", volume.name, volume.uuid, client.id)
        return answered.client if answered is not None else None

    def _await_released(self, located: Located, client: Client, known: Client | None, deadline: Deadline) -> None:
        """Wait until the client has released the volume. `known`: its state after the request to detach."""
        latest = known

        def is_done() -> bool:
            if latest is None or latest.uuid != client.uuid:
                return True
            return (is_release_recorded if latest.status is ClientStatus.DOWN else is_released)(latest, located)

        def is_done_now() -> bool:
            nonlocal latest
            latest = located.management.client(client.id, only=located.volume.uuid, deadline=deadline)
            return is_done()

        if known is not None and is_done():
            return
        wait = self.settings.wait(deadline, self.settings.detach_wait_s)
        if not wait.wait_until(is_done_now) and latest is not None:
            volume, state = located.volume, device_state(latest, located.volume)
            note = f"volume {volume.name} is still attached to node {client.id} after its detachment began: {state}"
            self.reporter.report(Subject(claim_of(volume.metadata), client.id), EventReason.NOT_DETACHED, note)
            raise DeadlineReached(f"volume {volume.name} to be detached from node {client.id} ({state})")


def _holds(client: Client, handle: VolumeHandle) -> bool:
    """Return whether the client may hold the volume. A device reported without a name may be any volume."""
    entries: list[DesiredAttachment | DeviceReport] = [*client.desired.values(), *client.devices.values()]
    return any(
        (entry.volume_name in (handle.name, "") if handle.uuid is None else entry.volume_uuid.lower() == handle.uuid)
        and client.holds(entry.volume_uuid)
        for entry in entries
    )


@dataclass(frozen=True, slots=True)
class Preemption:
    """Decides whether a volume may be taken from the clients that hold it.

    Every decision is for one version of the reservation: the storage refuses an older one, so one of two controllers
    wins.
    """

    policy: Fencing

    def permit(self, located: Located, client: Client, *, deadline: Deadline) -> int:
        """Return the version of the reservation, as `located` has it, for which `client` may take the volume.

        Raises `PreconditionFailed` naming the holders and why they keep it, `OperationPending` if there is none.
        """
        volume = located.volume
        holders, reasons = self._judge(located, client, deadline)
        if any(reasons.values()):
            raise _held_elsewhere(volume, holders, reasons)
        if not holders and self.policy is Fencing.NEVER:
            raise OperationPending(f"volume {volume.name} was released just now; retry")
        if self.policy is Fencing.RECORDED:
            self._refuse_contradiction(located, {client.id, *(holder.id for holder in holders)}, deadline=deadline)
        return volume.reservation.version

    def confirm(self, located: Located, client: Client, version: int, *, deadline: Deadline) -> list[str]:
        """Decide again right before the preemption, and return the ids of the clients that hold the volume.

        Raises `OperationPending` if the reservation has changed.
        """
        volume = located.volume
        present = located.management.volume(volume.name, deadline=deadline)
        if present is None or present.uuid != volume.uuid or present.reservation.version != version:
            raise OperationPending(f"volume {volume.name} was attached or detached concurrently; retry")
        self.permit(replace(located, volume=present), client, deadline=deadline)
        reason = "--fencing always" if self.policy is Fencing.ALWAYS else "released there, and the client is down"
        _log.warning(
            "taking volume %s, uuid %s, version %d, from %s to %s: %s",
            *(present.name, present.uuid, version, present.reservation.reserved_by or "no client", client.id, reason),
        )
        return sorted({present.reservation.reserved_by or "", *present.reservation.attached} - {"", client.id})

    def refusal(self, located: Located, client: Client, *, deadline: Deadline) -> PreconditionFailed | OperationPending:
        holders, reasons = self._judge(located, client, deadline)
        if not holders:
            return OperationPending(f"volume {located.volume.name} was released just now; retry")
        return _held_elsewhere(located.volume, holders, reasons)

    def _judge(self, located: Located, client: Client, deadline: Deadline) -> tuple[list[Client], dict[str, str]]:
        """Return the other holders of the volume, and by their ids the reasons to keep it, empty if there is none."""
        found = located.management.clients_holding(located.volume.uuid, deadline=deadline)
        holders = [holder for holder in found if holder.uuid != client.uuid]
        reservation = located.volume.reservation
        owner = reservation.reserved_by if reservation.mode is ReservationMode.EXCLUSIVE_READ_WRITE else None
        if holders and owner is not None and owner not in {client.id, *(holder.id for holder in holders)}:
            # Unknown to the management, it may be the former id of a renamed holder.
            owner = owner if located.management.client(owner, deadline=deadline) is not None else None
        return holders, {holder.id: self._reason_to_keep(located.volume, holder, owner) for holder in holders}

    def _refuse_contradiction(self, located: Located, known: set[str], *, deadline: Deadline) -> None:
        """Raise `OperationPending` if the volume names another holder: clients' documents may be older."""
        volume = located.volume
        for name in volume.reservation.attached:
            if name in known:
                continue
            unseen = located.management.client(name, deadline=deadline)
            if unseen is not None and unseen.status is not ClientStatus.DOWN:
                raise OperationPending(
                    f"volume {volume.name} is attached to {name} by its own document and not by that client's; "
                    "retry (if this persists, attach it there and detach it again in the management)"
                )

    def _reason_to_keep(self, volume: Volume, holder: Client, owner: str | None) -> str:
        """Return why not to take the volume, or "". A preempted holder has no I/O, whether or not it has noticed."""
        desired = holder.desired.get(volume.uuid)
        is_released_there = desired is None or desired.is_detaching
        match self.policy:
            case Fencing.ALWAYS:
                return ""
            case Fencing.NEVER:
                return "volumes are never taken over (--fencing never)"
        if is_released_there and owner not in (None, holder.id):
            return ""
        if holder.status is not ClientStatus.DOWN:
            state = "is being detached there" if is_released_there else "is attached there"
            return f"{client_state(holder)} and the volume {state}"
        if not is_released_there:
            return (
                f"{client_state(holder)}, but the volume was not released there (no ControllerUnpublish; if the node"
                " is dead, taint it with node.kubernetes.io/out-of-service)"
            )
        return ""


def was_preempted(volume: Volume, holder: Client) -> bool:
    """Return whether a client that is down can no longer write to a volume that no client holds now.

    True if a node that preempted it after the client's own attachment had I/O (`AttachmentRecord.taken`): from then on
    the storage refuses the I/O of the former holder. A raised version alone proves nothing: the management raises it
    when it is asked to preempt, but the storage preempts when the new node attaches, which may never have happened.
    """
    desired, reservation = holder.desired.get(volume.uuid), volume.reservation
    if desired is None or not desired.is_detaching or holder.status is not ClientStatus.DOWN:
        return False
    record = read_attachments(volume.metadata)
    is_free = reservation.mode is ReservationMode.NONE and not reservation.attached
    return is_free and not record.is_broken and 0 < desired.version < record.taken < reservation.version


def _held_elsewhere(volume: Volume, holders: Sequence[Client], reasons: dict[str, str]) -> PreconditionFailed:
    names = ", ".join(
        f"{holder.node_id} ({holder.id}{f': {reasons[holder.id]}' if reasons.get(holder.id) else ''})"
        for holder in sorted(holders, key=lambda holder: holder.id)
    )
    return PreconditionFailed(f"volume {volume.name} is attached to node {names}; detach it there first")
