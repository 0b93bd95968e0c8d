# SPDX-License-Identifier: Apache-2.0
"""Clients: the desired attachments that requests record, and the reports of the clients. `attacher` attaches.

Methods that change a desired attachment return the pairs that the attacher must settle.
"""

from __future__ import annotations

import uuid
from collections.abc import Callable
from dataclasses import dataclass, replace

from csi_driver.embedded.documents import CLIENT_NOT_FOUND, VOLUME_NOT_FOUND, ApiError, detail
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
)
from csi_driver.embedded.requests import AttachedVolume, DetachedVolume, ReservationRequest
from csi_driver.embedded.store import Change, Store
from csi_driver.errors import HostFailure

_DETACHED_SHOWN = 100
"""Detached volumes in a client's document, besides the latest. The real server shows each until it is deleted."""
Pair = tuple[str, str]
"""A client's name and a volume's uuid."""


@dataclass(eq=False)
class Clients:
    store: Store
    names: tuple[str, ...]
    check_file: Callable[[str], str] = lambda name: ""
    """Returns why the file of a volume, by name, cannot be used; "" = it can."""
    secure_file: Callable[[str, str], bool] = lambda name, identity: False
    """Syncs a volume's file, by name and uuid, before its first attachment; True when the row may say `made`."""
    holds: Callable[[str, str], bool] = lambda client, identity: False
    """Return whether a client, by name, has a volume, by uuid; set by the attacher."""

    def install(self) -> None:
        """Create the missing records of the configured clients. A client's uuid never changes."""

        def put(change: Change) -> None:
            for name in self.names:
                if change.get(CLIENTS, name) is None:
                    change.put(CLIENTS, name, Client(name, str(uuid.uuid4())))

        self.store.write(put)

    def attach(self, client: str, item: AttachedVolume) -> list[Pair]:
        """Record that the volume is to be attached. Raises ApiError."""
        lost = self.check_file(item.name)
        try:
            is_made = self.secure_file(item.name, item.uuid)
        except HostFailure:
            is_made = False  # the attacher retries it
        return self.store.write(lambda change: self._attach(change, client, item, lost, is_made=is_made))

    def _attach(self, change: Change, client: str, item: AttachedVolume, lost: str, *, is_made: bool) -> list[Pair]:
        name, identity, request = item.name, item.uuid, item.reservation
        if change.get(CLIENTS, client) is None:
            raise ApiError(1621, f"Client {client} not found; this manager serves {', '.join(self.names)}")
        volume = change.get(VOLUMES, name)
        if volume is None or volume.uuid != identity:
            raise ApiError(VOLUME_NOT_FOUND, "Volume not found")
        if volume.action == "markedForDeletion":
            raise _not_attached(detail(11212, f"Volume {name} is being deleted"))
        if lost or not volume.ready:
            missing = "encryption has not been initialized" if volume.source is None else "content is being copied"
            reason = lost or f"Volume is not ready: its {missing}"
            raise _not_attached(detail(1569, reason))
        mode = MODES[request.mode]
        if refused := _conflict(volume, client, mode, request):
            raise _not_attached(refused)
        reservation = _acquired(volume.reservation, client, mode, request)
        pairs = [(client, volume.uuid)]
        reserved = replace(volume, reservation=reservation, made=volume.made or is_made)
        if reserved != volume:
            change.put(VOLUMES, volume.name, reserved)
        if request.preempt:
            pairs[:0] = self._preempt(change, client, volume, detach=request.is_detach_others)
        shown: Document = {"mode": mode, "version": reservation.version, "preempt": 2 if request.preempt else 0}
        if "reservation" in item.model_fields_set:
            shown["isDetachOthers"] = request.is_detach_others
        old = change.get(ATTACHMENTS, identity, client)
        held = old.references if old is not None and old.is_attaching else ()
        references = held if item.reference in held else (*held, item.reference)
        change.put(ATTACHMENTS, identity, Attachment(client, name, identity, "attaching", shown, references), client)
        return pairs

    def _preempt(self, change: Change, client: str, volume: Volume, *, detach: bool) -> list[Pair]:
        """Return the other clients, which may have lost the volume; with `detach` they are to detach it."""
        others = [other for other in volume.reservation.attached if other != client]
        for other in others if detach else ():
            theirs = change.get(ATTACHMENTS, volume.uuid, other)
            if theirs is not None and theirs.is_attaching:
                _put_detaching(change, theirs, force=False)
        return [(other, volume.uuid) for other in others]

    def detach(self, client: str, item: DetachedVolume) -> list[Pair]:
        """Remove a reference; without the last one the volume is to be detached. Raises ApiError."""
        return self.store.write(lambda change: self._detach(change, client, item))

    def _detach(self, change: Change, client: str, item: DetachedVolume) -> list[Pair]:
        name, identity, reference = item.name, item.uuid, item.reference
        if change.get(CLIENTS, client) is None:
            raise ApiError(CLIENT_NOT_FOUND, f"Client {client} not found")
        volume = change.get(VOLUMES, name)
        if volume is None or volume.uuid != identity:
            raise ApiError(VOLUME_NOT_FOUND, "Volume not found")
        attachment = change.get(ATTACHMENTS, identity, client)
        if attachment is None:
            raise ApiError(162222, f"Volume {name} is not attached to client {client}")
        if not attachment.is_attaching and not item.force:
            raise ApiError(1622, f"Volume {name} is being detached from client {client}")
        if not attachment.is_attaching or reference not in attachment.references:
            raise ApiError(162223, f"referenceID {reference} is already detached from client {client}")
        left = tuple(held for held in attachment.references if held != reference)
        report = change.get(REPORTS, identity, client)
        is_reported = report is not None and report.status != DETACHED
        if left:
            change.put(ATTACHMENTS, identity, replace(attachment, references=left), client)
        elif is_reported or client not in self.names or self.holds(client, identity):
            # A crash can lose the report of a device.
            _put_detaching(change, replace(attachment, references=()), force=item.force)
        else:
            _end_attachment(change, attachment)
        return [(client, identity)]

    def report(self, attachment: Attachment, status: int, *, io_enabled: int) -> None:
        """Report the state of an attachment; an unchanged report is not written."""
        old = self.store.get(REPORTS, attachment.uuid, attachment.client)
        new = (status, io_enabled, attachment.references, attachment.reservation["mode"])
        if old is None or new != (old.status, old.io_enabled, old.references, old.reservation["mode"]):
            # The next start settles every attachment, and so reports it again.
            self.store.write_later(lambda change: _put_report(change, attachment, status, io_enabled=io_enabled))

    def report_detached(self, attachment: Attachment) -> None:
        """Report the detach; the attachment ends unless the volume is to be attached again.

        Its record says `detaching`, so the next start ends it if a crash does not keep this.
        """

        def end(change: Change) -> None:
            _put_report(change, attachment, DETACHED, io_enabled=1)
            current = change.get(ATTACHMENTS, attachment.uuid, attachment.client)
            if current is not None and not current.is_attaching:
                _end_attachment(change, attachment)
            self._forget_detached(change, attachment.client)

        self.store.write_later(end)

    def _forget_detached(self, change: Change, client: str) -> None:
        """Forget the earliest reports of detached volumes: each request for a client shows all that are left."""
        ended = [report for report in self.store.all(REPORTS, client) if report.status == DETACHED]
        for report in ended[:-_DETACHED_SHOWN]:
            if change.get(ATTACHMENTS, report.uuid, client) is None:
                change.delete(REPORTS, report.uuid, client)

    def withdraw_report(self, client: str, identity: str) -> Report | None:
        """Report a volume as detached that has no attachment record; return the earlier report.

        The attachment ended before its report, or a crash left the report.
        """

        def detached(change: Change) -> None:
            report = change.get(REPORTS, identity, client)
            if report is not None and change.get(ATTACHMENTS, identity, client) is None:
                change.put(REPORTS, identity, replace(report, status=DETACHED), client)

        report = self.store.get(REPORTS, identity, client)
        if report is None or report.status == DETACHED:
            return None
        self.store.write(detached)
        return report


def _put_detaching(change: Change, attachment: Attachment, *, force: bool) -> None:
    leaving = replace(attachment, action="detaching", force=force)
    change.put(ATTACHMENTS, leaving.uuid, leaving, leaving.client)


def _end_attachment(change: Change, attachment: Attachment) -> None:
    change.delete(ATTACHMENTS, attachment.uuid, attachment.client)
    volume = change.get(VOLUMES, attachment.volume)
    if volume is not None and volume.uuid == attachment.uuid:
        reservation = volume.reservation.released(attachment.client)
        change.put(VOLUMES, volume.name, replace(volume, reservation=reservation))


def _put_report(change: Change, attachment: Attachment, status: int, *, io_enabled: int) -> None:
    client, name, identity = attachment.client, attachment.volume, attachment.uuid
    volume = change.get(VOLUMES, name)
    if volume is not None and volume.uuid == identity:
        report = Report(client, name, identity, status, io_enabled, attachment.reservation, attachment.references)
        change.put(REPORTS, identity, report, client)


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
    return Reservation(mode, present.version + 1, client, attached)


def _not_attached(inner: Document) -> ApiError:
    return ApiError(1694, "The volume is not attached", inner)
