"""Clients: the wishes that volumes be attached to them and detached. What carries them out is `attacher`."""

from __future__ import annotations

import uuid
from collections.abc import Callable, Mapping
from dataclasses import replace

from csi_driver.embedded.records import (
    ATTACHMENTS,
    CLIENTS,
    DETACHED,
    MODES,
    REPORTS,
    SHARED_READ_WRITE,
    VOLUMES,
    Attachment,
    Client,
    Reservation,
    Volume,
)
from csi_driver.embedded.refusals import CLIENT_NOT_FOUND, Document, Refusal, detail, volume_not_found
from csi_driver.embedded.reservations import ReservationRefused, Wanted, released, reserved
from csi_driver.embedded.settings import StorageSettings
from csi_driver.embedded.store import Change, Store
from csi_driver.embedded.volumes import now

Pair = tuple[str, str]
"""A client's name and a volume's uuid."""


class Clients:
    """The use-cases on clients. Each call changes wishes only and says which pairs the attacher has to settle."""

    def __init__(
        self, settings: StorageSettings, store: Store, why_lost: Callable[[str], str] = lambda name: ""
    ) -> None:
        """`why_lost` says why the file of a volume, given by its name, cannot be used; empty = it can."""
        self._store = store
        self._why_lost = why_lost
        self._names = tuple(client.name for client in settings.clients)
        self._fault = settings.test_switches.fault

    def install(self) -> None:
        """Make the documents of the configured clients that have none. Their uuids then never change."""

        def put(change: Change) -> None:
            for name in self._names:
                if change.get(CLIENTS, name) is None:
                    change.put(CLIENTS, name, Client(name, str(uuid.uuid4()), now()))

        self._store.write(put)

    # --- attach -----------------------------------------------------------------------------------------

    def attach(self, client: str, client_uuid: str, item: Mapping[str, object]) -> list[Pair]:
        """Record the wish. Raises Refusal."""
        name, identity = str(item["name"]), str(item["uuid"])
        keys: Document = {"clientID": client, "clientUUID": client_uuid, "volumeID": name, "volumeUUID": identity}
        reference = str(item.get("referenceID", identity))
        wanted = _wanted(item.get("reservation"))
        lost = self._why_lost(name)

        def wish(change: Change) -> list[Pair]:
            if change.get(CLIENTS, client) is None:
                known = ", ".join(self._names)
                raise Refusal(1621, f"Client {client} not found; this manager serves {known}", keys)
            volume = change.get(VOLUMES, name)
            if volume is None or volume.uuid != identity:
                raise volume_not_found(name, identity)
            inner: Document = {"volumeID": name, "volumeUUID": identity, "clientID": client}
            if volume.action == "markedForDeletion":
                raise _not_attached(keys, detail(11212, f"Volume {name} is being deleted", **inner), loses_uuid=True)
            if lost or not volume.ready:
                reason = lost or "Volume is not ready: its encryption has not been initialized"
                raise _not_attached(keys, detail(1569, reason, **inner), loses_uuid=True)
            try:
                reservation = reserved(
                    volume.reservation, client, wanted, read_only=volume.read_only, moment=now(), keys=inner
                )
            except ReservationRefused as refused:
                raise _not_attached(keys, refused.inner) from refused
            return self._wish(change, client, volume, reservation, wanted, reference)

        pairs = self._store.write(wish)
        self._fault("attach:wished")
        return pairs

    def _wish(
        self, change: Change, client: str, volume: Volume, reservation: Reservation, wanted: Wanted, reference: str
    ) -> list[Pair]:
        pairs = [(client, volume.uuid)]
        if reservation != volume.reservation:
            change.put(VOLUMES, volume.name, replace(volume, reservation=reservation))
        if wanted.preempt:
            pairs[:0] = self._preempted(change, client, volume, detach=wanted.detach_others)
        old = change.get(ATTACHMENTS, volume.uuid, client)
        held = old.references if old is not None and old.action == "attaching" else ()
        references = held if reference in held else (*held, reference)
        change.put(
            ATTACHMENTS,
            volume.uuid,
            Attachment(
                client=client,
                volume=volume.name,
                uuid=volume.uuid,
                action="attaching",
                reservation=_shown(wanted, reservation),
                references=references,
                attachments_version=self._next_version(change, client),
                version=1 if old is None else old.version + (references != held),
            ),
            client,
        )
        return pairs

    def _preempted(self, change: Change, client: str, volume: Volume, *, detach: bool) -> list[Pair]:
        """Send the others away where that is asked, and name them: they may have lost the volume."""
        others = [other for other in volume.reservation.attached if other != client]
        for other in others if detach else ():
            theirs = change.get(ATTACHMENTS, volume.uuid, other)
            if theirs is not None and theirs.action == "attaching":
                self._next_version(change, other)
                self._put_detaching(change, theirs, force=False)
        return [(other, volume.uuid) for other in others]

    # --- detach -----------------------------------------------------------------------------------------

    def detach(self, client: str, item: Mapping[str, object]) -> list[Pair]:
        """Take a reference away; with the last one, record the wish that the device go. Raises Refusal."""
        name, identity = str(item["name"]), str(item["uuid"])
        reference = str(item.get("referenceID", identity))
        force = bool(item.get("force", False))
        keys = {"volumeID": name, "volumeUUID": identity, "clientID": client, "attachmentReferenceID": reference}

        def wish(change: Change) -> list[Pair]:
            if change.get(CLIENTS, client) is None:
                raise Refusal(CLIENT_NOT_FOUND, f"Client {client} not found", keys)
            volume = change.get(VOLUMES, name)
            if volume is None or volume.uuid != identity:
                raise volume_not_found(name, identity)
            attachment = change.get(ATTACHMENTS, identity, client)
            if attachment is None:
                raise Refusal(162222, f"Volume {name} is not attached to client {client}", keys)
            if attachment.action == "detaching" and not force:
                raise Refusal(1622, f"Volume {name} is being detached from client {client}", keys)
            if attachment.action == "detaching" or reference not in attachment.references:
                raise Refusal(162223, f"referenceID {reference} is already detached from client {client}", keys)
            left = tuple(held for held in attachment.references if held != reference)
            if left:
                change.put(
                    ATTACHMENTS,
                    identity,
                    replace(
                        attachment,
                        references=left,
                        version=attachment.version + 1,
                        attachments_version=self._next_version(change, client),
                    ),
                    client,
                )
            else:
                self._detach_last(change, volume, attachment, force)
            return [(client, identity)]

        pairs = self._store.write(wish)
        self._fault("detach:wished")
        return pairs

    def _detach_last(self, change: Change, volume: Volume, attachment: Attachment, force: bool) -> None:
        report = change.get(REPORTS, volume.uuid, attachment.client)
        if report is not None and report.status != DETACHED:
            self._wish_detached(change, attachment, force=force)
            return
        # The client has never said that it has the device, so there is nothing to wait for.
        change.delete(ATTACHMENTS, volume.uuid, attachment.client)
        reservation = released(volume.reservation, attachment.client, now())
        change.put(VOLUMES, volume.name, replace(volume, reservation=reservation))

    def _wish_detached(self, change: Change, attachment: Attachment, *, force: bool) -> None:
        """Let the last reference go."""
        leaving = replace(attachment, references=(), attachments_version=self._next_version(change, attachment.client))
        self._put_detaching(change, leaving, force=force)

    def _put_detaching(self, change: Change, attachment: Attachment, *, force: bool) -> None:
        wish = replace(attachment, action="detaching", force=force, version=attachment.version + 1)
        change.put(ATTACHMENTS, wish.uuid, wish, wish.client)

    def _next_version(self, change: Change, client: str) -> int:
        record = change.get(CLIENTS, client)
        if record is None:
            raise Refusal(CLIENT_NOT_FOUND, "Client not found", {"clientID": client})
        record = replace(record, attachments_version=record.attachments_version + 1)
        change.put(CLIENTS, client, record)
        return record.attachments_version


def _wanted(reservation: object) -> Wanted:
    if not isinstance(reservation, dict):
        return Wanted(SHARED_READ_WRITE)
    return Wanted(
        mode=MODES[str(reservation.get("mode", "SHARED_READ_WRITE"))],
        version=reservation.get("version"),
        preempt=bool(reservation.get("preempt", False)),
        detach_others=bool(reservation.get("isDetachOthers", False)),
        given=True,
    )


def _shown(wanted: Wanted, reservation: Reservation) -> Document:
    shown: Document = {
        "mode": wanted.mode,
        "version": reservation.version,
        "preempt": 2 if wanted.preempt else 0,
    }
    if wanted.given:
        shown["isDetachOthers"] = wanted.detach_others
    return shown


def _not_attached(keys: Document, inner: Document, *, loses_uuid: bool = False) -> Refusal:
    return Refusal(1694, "The volume is not attached", keys, inner, loses_uuid=loses_uuid)
