"""What a storage client's document says of one volume: held, leaving, gone, or what is still missing.

_log = logging.getLogger(__name__)

A desired is what the management wants, a report what the client says; nothing here trusts one for the other.
"""

from __future__ import annotations

import logging
from dataclasses import replace

from csi_driver.controller.volume_lookup import Located
from csi_driver.controller.volume_metadata import read_attachments
from csi_driver.deadline import Deadline
from csi_driver.errors import ExistsDifferently, OperationPending, PreconditionFailed, StorageUnavailable
from csi_driver.settings import Fencing
from csi_driver.storage_model import Client, ClientStatus, DesiredAttachment, DeviceStatus, ReservationMode, Volume

_log = logging.getLogger(__name__)

_NOT_THERE = (DeviceStatus.DETACHED, DeviceStatus.DETACHED_AFTER_SHUTDOWN)
_NEVER_CAME = (DeviceStatus.ATTACH_FAILED, DeviceStatus.RESERVATION_DENIED, DeviceStatus.UNKNOWN_VOLUME)
ABSENT = (ClientStatus.INITIALIZING, ClientStatus.EXITING, ClientStatus.REMOVAL_READY, ClientStatus.DOWN)


def references(desired: DesiredAttachment, volume: Volume) -> frozenset[str]:
    """Return the references of a desired; one that names none was made without, which is the volume's uuid."""
    return desired.reference_ids or frozenset({volume.uuid})


def is_leaving(client: Client, volume_uuid: str) -> bool:
    desired, report = client.desired.get(volume_uuid), client.devices.get(volume_uuid)
    if desired is not None:
        return desired.is_detaching
    return report is not None and report.status not in (*_NOT_THERE, *_NEVER_CAME)


def is_released(client: Client, located: Located) -> bool:
    """Tell whether the client no longer holds the volume under this handle's reference."""
    uuid, reference = located.volume.uuid, located.reference
    desired, report = client.desired.get(uuid), client.devices.get(uuid)
    if desired is None:
        return report is None or report.status in (*_NOT_THERE, *_NEVER_CAME)
    if desired.is_detaching or reference in references(desired, located.volume):
        return False
    # Others on the node still need the device. A report may lack its references.
    return report is None or report.reference_ids is None or reference not in report.reference_ids


def missing(client: Client, located: Located, mode: ReservationMode) -> str:
    """Name what a usable device lacks; empty when it lacks nothing."""
    report = client.devices.get(located.volume.uuid)
    if client.status is ClientStatus.DOWN:
        return "the attachment (the storage client is down)"
    if report is None:
        return "the attachment (the client reports no device)"
    if report.status is DeviceStatus.RESERVATION_DENIED or report.mode not in (mode, ReservationMode.NONE):
        return f"the reservation (device {report.status.name.lower()}, held as {report.mode.name.lower()})"
    if report.status is not DeviceStatus.ATTACHED:
        return f"the attachment (device {report.status.name.lower()})"
    if not report.io_enabled:
        return "I/O on the attached device (it is disabled)"
    if report.reference_ids is not None and located.reference not in report.reference_ids:
        return f"the reference {located.reference} on the attached device"
    return ""


def is_withdrawn(client: Client, located: Located) -> bool:
    """Tell whether the desired is recorded that the client give up the volume under this handle's reference."""
    desired = client.desired.get(located.volume.uuid)
    return desired is None or desired.is_detaching or located.reference not in references(desired, located.volume)


def device_state(client: Client, volume: Volume) -> str:
    """Describe the device of a detachment that takes long, and how to find what keeps it: the management cannot tell.

    It drops every report of a client that the device is busy, so that a busy one goes on to show as attached.
    """
    report = client.devices.get(volume.uuid)
    if report is None:
        return "device gone"
    state = f"device {report.status.name.lower()}"
    if report.status is not DeviceStatus.ATTACHED:
        return state
    name = volume.name
    if volume.status not in ("online", "unavailable"):
        state += f", and the volume is {volume.status} in the storage management, which may be the reason"
    return (
        f"{state}; a program on that node may have it open: see /proc/nvmeibc/volumes/{name}/client_processes "
        f"and `fuser -vam /dev/nvmesh/{name}` there"
    )


def others(located: Located, client: Client, *, deadline: Deadline) -> list[Client]:
    """Return the other clients that hold the volume or are not yet rid of it. Asks the management."""
    holders = located.management.clients_holding(located.volume.uuid, deadline=deadline)
    return [holder for holder in holders if holder.uuid != client.uuid]


def held_otherwise(volume: Volume, client: Client, held: ReservationMode, mode: ReservationMode) -> ExistsDifferently:
    what = f"the attachment of volume {volume.name} to node {client.id}"
    return ExistsDifferently(what, [f"mode: expected {mode.name.lower()}, got {held.name.lower()}"])


def client_absent(client: Client) -> StorageUnavailable:
    return StorageUnavailable(
        f"storage client of node {client.id}: expected ready, got {client.status.name.lower()}; "
        "check the client on that node"
    )


class Preemption:
    """Judges those who hold a volume. Every judgement is of one version of the reservation, which is passed on to the
    storage: it refuses whoever judged an older one, so that of two controllers at once one wins."""

    def __init__(self, fencing: Fencing) -> None:
        self._fencing = fencing

    def judge(self, located: Located, client: Client, *, deadline: Deadline) -> int:
        """Return the version of the reservation for which the volume may be taken to `client`.

        `located` must have been read before this is called: whoever comes to hold the volume later raises the version.
        Raises `PreconditionFailed` naming who holds it and why they keep it, `OperationPending` when nobody does.
        """
        volume = located.volume
        holders = others(located, client, deadline=deadline)
        owner = self._owner(located, client, holders, deadline=deadline)
        kept = {holder.id: reason for holder in holders if (reason := self._reason_to_keep(volume, holder, owner))}
        if kept:
            raise _held_elsewhere(volume, holders, kept)
        if not holders and self._fencing is Fencing.NEVER:
            raise OperationPending(f"volume {volume.name} was released just now; retry")
        if self._fencing is Fencing.RECORDED:
            self._refuse_contradiction(located, {client.id, *(holder.id for holder in holders)}, deadline=deadline)
        return volume.reservation.version

    def _refuse_contradiction(self, located: Located, judged: set[str], *, deadline: Deadline) -> None:
        """Raise `OperationPending` where the volume's document names one who has it and whom nobody has judged.

        The clients' documents may come from a server that has not yet heard of an attachment. Of a client that is down
        such an answer is new enough, or it would not say so; one that is gone has nothing any more.
        """
        volume = located.volume
        for name in volume.reservation.attached:
            if name in judged:
                continue
            unseen = located.management.client(name, deadline=deadline)
            if unseen is not None and unseen.status is not ClientStatus.DOWN:
                raise OperationPending(
                    f"volume {volume.name} is attached to {name} by its own document and not by that client's; "
                    "retry (if this persists, attach it there and detach it again in the management)"
                )

    def confirm(self, located: Located, client: Client, version: int, *, deadline: Deadline) -> None:
        """Judge again right before the volume is taken. Raises as `judge` does, and `OperationPending` when the
        reservation has another version by now."""
        volume = located.volume
        present = located.management.volume(volume.name, deadline=deadline)
        if present is None or present.uuid != volume.uuid or present.reservation.version != version:
            raise OperationPending(f"volume {volume.name} was attached or detached concurrently; retry")
        self.judge(replace(located, volume=present), client, deadline=deadline)
        holder = present.reservation.reserved_by or "nobody"
        _log.warning(
            "taking volume %s, uuid %s, version %d, from %s to %s: %s",
            *(present.name, present.uuid, version, holder, client.id, _LEAVES[self._fencing]),
        )

    def refusal(self, located: Located, client: Client, *, deadline: Deadline) -> PreconditionFailed | OperationPending:
        """Return the answer to a call that the storage refused because the volume is held."""
        volume = located.volume
        holders = others(located, client, deadline=deadline)
        if not holders:
            return OperationPending(f"volume {volume.name} was released just now; retry")
        owner = self._owner(located, client, holders, deadline=deadline)
        return _held_elsewhere(volume, holders, {h.id: self._reason_to_keep(volume, h, owner) for h in holders})

    def _owner(self, located: Located, client: Client, holders: list[Client], *, deadline: Deadline) -> str | None:
        """Return the id of the one client for whom the volume is reserved; None where it is nobody's alone.

        None as well for an id that no client has: it may be the old one of a holder that was given another name.
        """
        reservation = located.volume.reservation
        owner = reservation.reserved_by
        if not holders or owner is None or reservation.mode is not ReservationMode.EXCLUSIVE_READ_WRITE:
            return None
        is_known = owner in {client.id, *(holder.id for holder in holders)}
        return owner if is_known or located.management.client(owner, deadline=deadline) is not None else None

    def _reason_to_keep(self, volume: Volume, holder: Client, owner: str | None) -> str:
        """Say why the volume may not be taken from this holder; empty when it may.

        A holder that was preempted by the owner has no I/O any more, whether or not it has noticed.
        """
        desired = holder.desired.get(volume.uuid)
        is_given_up = desired is None or desired.is_detaching
        match self._fencing:
            case Fencing.ALWAYS:
                return ""
            case Fencing.NEVER:
                return "volumes are never taken over (--fencing never)"
        if is_given_up and owner not in (None, holder.id):
            return ""
        if holder.status is not ClientStatus.DOWN:
            state = "is being detached there" if is_given_up else "is attached there"
            return f"the storage client is {holder.status.name.lower()} and the volume {state}"
        if not is_given_up:
            return "the storage client is down, but the volume was not released there (no ControllerUnpublish)"
        return ""


def was_preempted(volume: Volume, holder: Client) -> bool:
    """Return whether a client that is down can no longer write to a volume that no client holds now.

    The desired attachment keeps the version of the reservation under which the client had the volume, and the volume's
    metadata the latest version under which another node took the volume and then had I/O on it
    (`AttachmentRecord.taken`). From then on the storage refuses the I/O of the former holder until it is detached and
    attached again. A raised version alone proves nothing: the management raises it when it is asked to preempt, but
    the storage preempts when the new node attaches, which may never have happened.
    """
    desired, held = holder.desired.get(volume.uuid), volume.reservation
    if desired is None or not desired.is_detaching or holder.status is not ClientStatus.DOWN:
        return False
    record = read_attachments(volume.metadata)
    is_nobodys = held.mode is ReservationMode.NONE and not held.attached
    return is_nobodys and not record.is_broken and 0 < desired.version < record.taken < held.version


_LEAVES = {
    Fencing.RECORDED: "it was released there, and the storage client is down",
    Fencing.ALWAYS: "--fencing always",
    Fencing.NEVER: "",
}


def _held_elsewhere(volume: Volume, holders: list[Client], kept: dict[str, str]) -> PreconditionFailed:
    names = ", ".join(
        f"{holder.uuid} ({holder.id}{f': {kept[holder.id]}' if kept.get(holder.id) else ''})"
        for holder in sorted(holders, key=lambda holder: holder.id)
    )
    return PreconditionFailed(f"volume {volume.name} is attached to node {names}; detach it there first")
