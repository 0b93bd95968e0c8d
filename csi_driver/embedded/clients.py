"""Clients: the desired attachments that requests record, and the reports of the clients. `attacher` attaches.

Methods that change a desired attachment return the pairs that the attacher must settle.
"""

from __future__ import annotations

import uuid
from collections.abc import Callable
from dataclasses import dataclass, replace

from csi_driver.embedded.documents import CLIENT_NOT_FOUND, ApiError, detail, volume_not_found
from csi_driver.embedded.model import (
    ATTACHMENTS,
    CLIENTS,
    DETACHED,
    MODE_NAMES,
    MODES,
    NONE,
    REPORTS,
    SHARED_READ_ONLY,
    VOLUMES,
    Attachment,
    Client,
    Document,
    Report,
    Reservation,
    Volume,
    now,
)
from csi_driver.embedded.requests import AttachedVolume, DetachedVolume, ReservationRequest
from csi_driver.embedded.store import Change, Store

Pair = tuple[str, str]
"""A client's name and a volume's uuid."""


@dataclass(eq=False)
class Clients:
    """The operations on clients."""

    store: Store
    names: tuple[str, ...]
    check_file: Callable[[str], str] = lambda name: ""
    """Returns why the file of a volume, by name, cannot be used; "" = it can."""

    def install(self) -> None:
        """Create the missing records of the configured clients. A client's uuid never changes."""

        def put(change: Change) -> None:
            for name in self.names:
                if change.get(CLIENTS, name) is None:
                    change.put(CLIENTS, name, Client(name, str(uuid.uuid4()), now()))

        self.store.write(put)

    # --- attach -----------------------------------------------------------------------------------------

    def attach(self, client: str, client_uuid: str, item: AttachedVolume) -> list[Pair]:
        """Record that the volume is to be attached. Raises ApiError."""
        lost = self.check_file(item.name)
        return self.store.write(lambda change: self._attach(change, client, client_uuid, item, lost))

    def _attach(self, change: Change, client: str, client_uuid: str, item: AttachedVolume, lost: str) -> list[Pair]:
        name, identity, request = item.name, item.uuid, item.reservation
        keys: Document = {"clientID": client, "clientUUID": client_uuid, "volumeID": name, "volumeUUID": identity}
        if change.get(CLIENTS, client) is None:
            known = ", ".join(self.names)
            raise ApiError(1621, f"Client {client} not found; this manager serves {known}", keys)
        volume = change.get(VOLUMES, name)
        if volume is None or volume.uuid != identity:
            raise volume_not_found(name, identity)
        inner: Document = {"volumeID": name, "volumeUUID": identity, "clientID": client}
        if volume.action == "markedForDeletion":
            raise _not_attached(keys, detail(11212, f"Volume {name} is being deleted", **inner), loses_uuid=True)
        if lost or not volume.ready:
            reason = lost or "Volume is not ready: its encryption has not been initialized"
            raise _not_attached(keys, detail(1569, reason, **inner), loses_uuid=True)
        mode = MODES[request.mode]
        if refused := _conflict(volume, client, mode, request):
            raise _not_attached(keys, {**refused, **inner})
        reservation = _acquired(volume.reservation, client, mode, request)
        pairs = [(client, volume.uuid)]
        if reservation != volume.reservation:
            change.put(VOLUMES, volume.name, replace(volume, reservation=reservation))
        if request.preempt:
            pairs[:0] = self._preempt(change, client, volume, detach=request.is_detach_others)
        shown: Document = {"mode": mode, "version": reservation.version, "preempt": 2 if request.preempt else 0}
        if "reservation" in item.model_fields_set:
            shown["isDetachOthers"] = request.is_detach_others
        self._put_attaching(change, client, volume, shown, item.reference)
        return pairs

    def _put_attaching(
        self, change: Change, client: str, volume: Volume, reservation: Document, reference: str
    ) -> None:
        old = change.get(ATTACHMENTS, volume.uuid, client)
        held = old.references if old is not None and old.is_attaching else ()
        references = held if reference in held else (*held, reference)
        attachment = Attachment(
            client=client,
            volume=volume.name,
            uuid=volume.uuid,
            action="attaching",
            reservation=reservation,
            references=references,
            attachments_version=self._next_version(change, client),
            version=1 if old is None else old.version + (references != held),
        )
        change.put(ATTACHMENTS, volume.uuid, attachment, client)

    def _preempt(self, change: Change, client: str, volume: Volume, *, detach: bool) -> list[Pair]:
        """Return the other clients, which may have lost the volume; with `detach` they are to detach it."""
        others = [other for other in volume.reservation.attached if other != client]
        for other in others if detach else ():
            theirs = change.get(ATTACHMENTS, volume.uuid, other)
            if theirs is not None and theirs.is_attaching:
                self._next_version(change, other)
                _put_detaching(change, theirs, force=False)
        return [(other, volume.uuid) for other in others]

    # --- detach -----------------------------------------------------------------------------------------

    def detach(self, client: str, item: DetachedVolume) -> list[Pair]:
        """Remove a reference; without the last one the volume is to be detached. Raises ApiError."""
        return self.store.write(lambda change: self._detach(change, client, item))

    def _detach(self, change: Change, client: str, item: DetachedVolume) -> list[Pair]:
        name, identity, reference = item.name, item.uuid, item.reference
        keys = {"volumeID": name, "volumeUUID": identity, "clientID": client, "attachmentReferenceID": reference}
        if change.get(CLIENTS, client) is None:
            raise ApiError(CLIENT_NOT_FOUND, f"Client {client} not found", keys)
        volume = change.get(VOLUMES, name)
        if volume is None or volume.uuid != identity:
            raise volume_not_found(name, identity)
        attachment = change.get(ATTACHMENTS, identity, client)
        if attachment is None:
            raise ApiError(162222, f"Volume {name} is not attached to client {client}", keys)
        if not attachment.is_attaching and not item.force:
            raise ApiError(1622, f"Volume {name} is being detached from client {client}", keys)
        if not attachment.is_attaching or reference not in attachment.references:
            raise ApiError(162223, f"referenceID {reference} is already detached from client {client}", keys)
        left = tuple(held for held in attachment.references if held != reference)
        report = change.get(REPORTS, identity, client)
        if left:
            version = self._next_version(change, client)
            kept = replace(attachment, references=left, version=attachment.version + 1, attachments_version=version)
            change.put(ATTACHMENTS, identity, kept, client)
        elif report is not None and report.status != DETACHED:
            version = self._next_version(change, client)
            _put_detaching(change, replace(attachment, references=(), attachments_version=version), force=item.force)
        else:
            # The client never reported the device, so there is nothing to wait for.
            _end_attachment(change, attachment)
        return [(client, identity)]

    def _next_version(self, change: Change, client: str) -> int:
        record = change.get(CLIENTS, client)
        if record is None:
            raise ApiError(CLIENT_NOT_FOUND, "Client not found", {"clientID": client})
        record = replace(record, attachments_version=record.attachments_version + 1)
        change.put(CLIENTS, client, record)
        return record.attachments_version

    # --- reports ----------------------------------------------------------------------------------------

    def report(self, attachment: Attachment, status: int, *, io_enabled: int) -> None:
        """Report the state of an attachment; an unchanged report is not written."""
        old = self.store.get(REPORTS, attachment.uuid, attachment.client)
        mode = attachment.reservation["mode"]
        new = (status, io_enabled, attachment.references, attachment.version, mode)
        if old is None or new != (
            old.status, old.io_enabled, old.references, old.version, old.reservation["mode"],
        ):  # fmt: skip
            self.store.write(lambda change: _put_report(change, attachment, status, io_enabled=io_enabled))

    def report_detached(self, attachment: Attachment) -> None:
        """Report the detach; the attachment ends unless the volume is to be attached again."""

        def end(change: Change) -> None:
            _put_report(change, attachment, DETACHED, io_enabled=1)
            current = change.get(ATTACHMENTS, attachment.uuid, attachment.client)
            if current is not None and not current.is_attaching:
                _end_attachment(change, attachment)

        self.store.write(end)

    def withdraw_report(self, client: str, identity: str) -> Report | None:
        """Report a volume as detached that has no attachment record; return the earlier report.

        The attachment ended before its report, or a crash left the report.
        """

        def detached(change: Change) -> None:
            report, record = change.get(REPORTS, identity, client), change.get(CLIENTS, client)
            if report is None or record is None or change.get(ATTACHMENTS, identity, client) is not None:
                return
            record = replace(record, report_id=record.report_id + 1)
            change.put(CLIENTS, client, record)
            change.put(REPORTS, identity, replace(report, status=DETACHED, report_id=record.report_id), client)

        report = self.store.get(REPORTS, identity, client)
        if report is None or report.status == DETACHED:
            return None
        self.store.write(detached)
        return report


def _put_detaching(change: Change, attachment: Attachment, *, force: bool) -> None:
    leaving = replace(attachment, action="detaching", force=force, version=attachment.version + 1)
    change.put(ATTACHMENTS, leaving.uuid, leaving, leaving.client)


def _end_attachment(change: Change, attachment: Attachment) -> None:
    change.delete(ATTACHMENTS, attachment.uuid, attachment.client)
    volume = change.get(VOLUMES, attachment.volume)
    if volume is not None and volume.uuid == attachment.uuid:
        reservation = volume.reservation.released(attachment.client)
        change.put(VOLUMES, volume.name, replace(volume, reservation=reservation))


def _put_report(change: Change, attachment: Attachment, status: int, *, io_enabled: int) -> None:
    client = change.get(CLIENTS, attachment.client)
    volume = change.get(VOLUMES, attachment.volume)
    if client is None or volume is None or volume.uuid != attachment.uuid:
        return
    client = replace(client, report_id=client.report_id + 1)
    change.put(CLIENTS, client.name, client)
    report = Report(
        client=attachment.client,
        volume=attachment.volume,
        uuid=attachment.uuid,
        status=status,
        io_enabled=io_enabled,
        reservation=attachment.reservation,
        references=attachment.references,
        attachments_version=attachment.attachments_version,
        version=attachment.version,
        report_id=client.report_id,
    )
    change.put(REPORTS, attachment.uuid, report, attachment.client)


def _conflict(volume: Volume, client: str, mode: int, request: ReservationRequest) -> Document | None:
    """Return the error of a request that the volume or its reservation does not allow."""
    present = volume.reservation
    if volume.read_only and mode != SHARED_READ_ONLY:
        reason = f"{request.mode} was requested and the volume is read-only; attach it as SHARED_READ_ONLY"
        return detail(1716, reason)
    if present.mode == NONE or present.allows(client, mode):
        return None
    held = f"the volume is reserved as {MODE_NAMES[present.mode]} for {', '.join(present.attached)}"
    if request.version != present.version:
        reason = f"{held}; expected reservation version {present.version}, got {request.version}"
        return detail(1717, reason, volumeReservation=present.version)
    return None if request.preempt else detail(1718, f"{held}; detach it there, or set preempt")


def _acquired(present: Reservation, client: str, mode: int, request: ReservationRequest) -> Reservation:
    """Return the reservation with the client; a new one has a new version.

    Clients that are to detach no longer count, even if they are down and still have a device: the last client that
    counts ends the reservation.
    """
    attached = present.attached if client in present.attached else (*present.attached, client)
    if present.allows(client, mode):
        return replace(present, attached=attached)
    if request.is_detach_others and present.mode != NONE:
        attached = (client,)
    return Reservation(mode, present.version + 1, client, attached, now())


def _not_attached(keys: Document, inner: Document, *, loses_uuid: bool = False) -> ApiError:
    return ApiError(1694, "The volume is not attached", keys, inner, loses_uuid=loses_uuid)
