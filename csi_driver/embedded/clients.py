# SPDX-License-Identifier: Apache-2.0
"""Clients: the desired attachments that requests record, and the reports of the clients. `attacher` attaches.

Methods that change a desired attachment return the pairs that the attacher must settle.
"""

from __future__ import annotations

import re
import uuid
from collections.abc import Callable
from dataclasses import dataclass, replace

from csi_driver.embedded.documents import CLIENT_NOT_FOUND, VOLUME_NOT_FOUND, ApiError, detail, export_document
from csi_driver.embedded.model import (
    ATTACHMENTS,
    CLIENTS,
    DETACHED,
    EXPORTS,
    MODE_NAMES,
    MODES,
    NONE,
    REPORTS,
    SHARED_READ_ONLY,
    VOLUMES,
    Attachment,
    Client,
    Document,
    Fact,
    Report,
    Reservation,
    Volume,
    new_token,
)
from csi_driver.embedded.requests import AttachedVolume, DetachedVolume, ReservationRequest
from csi_driver.embedded.store import Change, Store
from csi_driver.errors import HostFailure
from csi_driver.nvme_model import NvmeExport, host_uuid

_DETACHED_SHOWN = 100
"""Detached volumes in a client's document, plus the latest. The real server shows each until it is deleted."""
Pair = tuple[str, str]
"""A client's name and a volume's uuid."""
_NODE_NAME = re.compile(r"[a-z0-9](?:[a-z0-9._-]{0,251}[a-z0-9])?")
"""Of a node that connects by itself. Lower case alone: the names of its host follow from it in lower case."""


@dataclass(eq=False)
class Clients:
    store: Store
    names: tuple[str, ...]
    check_file: Callable[[str], str] = lambda name: ""
    """Returns why the file of a volume, by name, cannot be used; "" = it can."""
    secure_file: Callable[[str, str], bool] = lambda name, identity: False
    """Syncs a volume's file, by name and uuid, before its first attachment; True when the row may say `made`."""
    why_refused: Callable[[str], str] = lambda client: ""
    """Returns why a node that connects by itself gets no volume; "" = it may."""
    holds: Callable[[str, str], bool] = lambda client, identity: False
    """Return whether a client, by name, has a volume, by uuid; set by the attacher."""
    place: Callable[[str], tuple[int, int]] = lambda identity: (0, 0)
    """Return port and inode of a new attachment of a volume to a node; set by the engine that exports."""
    has_exports: bool = False
    """Volumes are exported over NVMe: every node that is not one of `names` is a client, without a configuration."""

    def install(self) -> None:
        """Create the missing records of the configured clients, and remove those of nodes without a volume.

        The uuid of a configured client never changes; that of another node follows from its name.
        """
        others = self.store.all(CLIENTS) if self.has_exports else []
        idle = [client.name for client in others if client.name not in self.names and self._is_idle(client.name)]
        reports = [report for name in idle for report in self.store.all(REPORTS, name)]

        def put(change: Change) -> None:
            for name in self.names:
                if change.get(CLIENTS, name) is None:
                    change.put(CLIENTS, name, Client(name, str(uuid.uuid4())))
            for report in reports:
                change.delete(REPORTS, report.uuid, report.client)
            for name in idle:
                change.delete(CLIENTS, name)

        self.store.write(put)

    def _is_idle(self, name: str) -> bool:
        reports = self.store.all(REPORTS, name)
        return not self.store.count(ATTACHMENTS, name) and all(report.status == DETACHED for report in reports)

    def find(self, name: str) -> Client | None:
        """Return a client; a node that has had no volume yet has no record."""
        return self.store.get(CLIENTS, name) or self._node(name)

    def _node(self, name: str) -> Client | None:
        return Client(name, host_uuid(name)) if self.has_exports and _NODE_NAME.fullmatch(name) else None

    def connects_on_demand(self, client: Client) -> bool:
        """Return whether a client is the NVMe host of its node; one that was configured earlier is not."""
        return client.name not in self.names and client == self._node(client.name)

    def is_node(self, name: str) -> bool:
        """Return whether a recorded client is the NVMe host of its node, also where nothing is exported now."""
        client = self.store.get(CLIENTS, name)
        return client is not None and client.uuid == host_uuid(name)

    def attach(self, client: str, item: AttachedVolume) -> list[Pair]:
        """Record that the volume is to be attached. Raises ApiError."""
        lost = self.check_file(item.name) or ("" if client in self.names else self.why_refused(client))
        try:
            is_made = self.secure_file(item.name, item.uuid)
        except HostFailure:
            is_made = False  # the attacher retries it
        return self.store.write(lambda change: self._attach(change, client, item, lost, is_made=is_made))

    def _attach(self, change: Change, client: str, item: AttachedVolume, lost: str, *, is_made: bool) -> list[Pair]:
        name, identity, request = item.name, item.uuid, item.reservation
        stored = change.get(CLIENTS, client)
        known = stored or self._node(client)
        if known is None:
            others = ", and nodes by their names in lower case" if self.has_exports else ""
            raise ApiError(1621, f"Client {client} not found; this manager serves {', '.join(self.names)}{others}")
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
        self._put_attaching(change, client, volume, reservation, item)
        if stored is None:
            change.put(CLIENTS, client, known)
        return pairs

    def _put_attaching(
        self, change: Change, client: str, volume: Volume, reservation: Reservation, item: AttachedVolume
    ) -> None:
        """Record the attachment; one that holds already gets a reference more."""
        request, old = item.reservation, change.get(ATTACHMENTS, volume.uuid, client)
        preempt = 2 if request.preempt else 0
        shown: Document = {"mode": MODES[request.mode], "version": reservation.version, "preempt": preempt}
        if "reservation" in item.model_fields_set:
            shown["isDetachOthers"] = request.is_detach_others
        held = old.references if old is not None and old.is_attaching else ()
        references = held if item.reference in held else (*held, item.reference)
        if old is not None and old.is_attaching and reservation.covers(old):
            attachment = replace(old, reservation=shown, references=references)
        else:
            port, inode = (0, 0) if client in self.names else self.place(volume.uuid)
            fields = client, volume.name, volume.uuid, "attaching", shown, references
            attachment = Attachment(*fields, None, new_token(), port, inode, volume.bytes)
            if port:
                change.put(EXPORTS, volume.uuid, Fact(str(port)), client)
        change.put(ATTACHMENTS, volume.uuid, attachment, client)

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
        elif is_reported or not self._serves(change, client) or self.holds(client, identity):
            # A crash can lose the report of a device.
            _put_detaching(change, replace(attachment, references=()), force=item.force)
        else:
            _end_attachment(change, attachment)
        return [(client, identity)]

    def _serves(self, change: Change, name: str) -> bool:
        client = change.get(CLIENTS, name)
        return name in self.names or (client is not None and self.connects_on_demand(client))

    def report(self, attachment: Attachment, status: int, *, io_enabled: int, export: NvmeExport | None = None) -> None:
        """Report the state of an attachment; an unchanged report is not written."""
        old = self.store.get(REPORTS, attachment.uuid, attachment.client)
        shown = {} if export is None else export_document(export)
        new = (status, io_enabled, attachment.references, attachment.reservation["mode"], shown)
        if old is None or new != (old.status, old.io_enabled, old.references, old.reservation["mode"], old.export):
            # The next start settles every attachment, and so reports it again.
            self.store.write_later(lambda change: _put_report(change, attachment, status, shown, io_enabled=io_enabled))

    def report_detached(self, attachment: Attachment) -> None:
        """Report the detach; the attachment ends unless the volume is to be attached again.

        Its record says `detaching`, so the next start ends it if a crash does not keep this.
        """

        def end(change: Change) -> None:
            _put_report(change, attachment, DETACHED, {}, io_enabled=1)
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
    change.delete(EXPORTS, attachment.uuid, attachment.client)
    volume = change.get(VOLUMES, attachment.volume)
    if volume is not None and volume.uuid == attachment.uuid:
        reservation = volume.reservation.released(attachment.client)
        change.put(VOLUMES, volume.name, replace(volume, reservation=reservation))


def _put_report(change: Change, attachment: Attachment, status: int, export: Document, *, io_enabled: int) -> None:
    client, name, identity = attachment.client, attachment.volume, attachment.uuid
    volume = change.get(VOLUMES, name)
    if volume is not None and volume.uuid == identity:
        held = attachment.reservation, attachment.references
        report = Report(client, name, identity, status, io_enabled, *held, export)
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
