"""ControllerPublishVolume and ControllerUnpublishVolume.

What an attachment means for formatting is decided here: the node formats a fresh volume after a quick look only when
this module says that nobody ever had it (`History.FIRST`). Three independent facts must agree on that: the record
says that we made the volume, the count of attachments says that this is the first, and the reservation's version, kept
by the storage itself, says that nobody else was attached before or in between.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping

from csi_driver.controller import access, handing, record
from csi_driver.controller.locate import Located, find_client, issued_handle, locate, require, sole_management
from csi_driver.controller.naming import held_reference, reference_id
from csi_driver.controller.ports import Clusters, Management
from csi_driver.controller.record import Attachments
from csi_driver.controller.requests import ControllerSettings, PublishRequest
from csi_driver.controller.waiting import within
from csi_driver.deadline import Deadline
from csi_driver.errors import (
    DeadlineReached,
    Exhausted,
    ExistsDifferently,
    NodeNotFound,
    OperationPending,
    PreconditionFailed,
    ReservationConflict,
    StorageUnavailable,
    VolumeNotFound,
)
from csi_driver.handover import History, PublishContext
from csi_driver.model import (
    AttachmentWish,
    BlockAccess,
    Client,
    ClientStatus,
    DeviceReport,
    DeviceStatus,
    ReservationMode,
    Volume,
    VolumeHandle,
)

_log = logging.getLogger(__name__)

_NOT_THERE = (DeviceStatus.DETACHED, DeviceStatus.DETACHED_AFTER_SHUTDOWN)
_NEVER_CAME = (DeviceStatus.ATTACH_FAILED, DeviceStatus.RESERVATION_DENIED, DeviceStatus.UNKNOWN_VOLUME)
_BUSY = (DeviceStatus.BUSY, DeviceStatus.DETACH_FAILED)
_BUSY_WAIT_S = 10.0
"""A device that was open for so long without a break is answered to be in use; the client goes on trying."""
_ABSENT = (ClientStatus.INITIALIZING, ClientStatus.EXITING, ClientStatus.REMOVAL_READY, ClientStatus.DOWN)


class Attach:
    """Attach volumes to nodes and detach them. Keeps no state: several controllers may do the same at once."""

    def __init__(self, clusters: Clusters, settings: ControllerSettings) -> None:
        self._clusters = clusters
        self._settings = settings

    def publish(self, request: PublishRequest, *, deadline: Deadline) -> PublishContext:
        """Attach the volume to the node and wait until its device can be used there.

        Raises `ExistsDifferently` when the node holds it in another mode, `PreconditionFailed` naming the node that
        holds it, `Exhausted` at the node's limit, `DeadlineReached` naming what is missing.
        """
        access.check(request.capability)
        mode = access.reservation_mode(request.capability, read_only=request.read_only)
        located, client = self._found(request, deadline=deadline)
        if _is_leaving(client, located.volume.uuid):
            client = self._settled(located, client, deadline=deadline)
            # What is counted below must be read after the wait, not before it.
            located = require(self._clusters, request.volume_id, deadline=deadline)
        wish = client.wishes.get(located.volume.uuid)
        if wish is None and located.volume.reservation.mode is not ReservationMode.NONE:
            # Somebody holds it by now; perhaps this very node, for the same call made of another controller.
            client = self._again(located.management, client, deadline=deadline)
            wish = client.wishes.get(located.volume.uuid)
            if _is_leaving(client, located.volume.uuid):
                raise OperationPending(f"volume {located.volume.name} is being detached from node {client.id}")
        if wish is None:
            self._refuse_new(located, client, request, deadline=deadline)
        elif wish.mode is not mode:
            raise _held_otherwise(located.volume, client, wish.mode, mode)
        writes = isinstance(request.capability.access, BlockAccess) and mode is not ReservationMode.SHARED_READ_ONLY
        new = mode if wish is None else None
        self._remember(located, client, request.volume_id, new, writes=writes, deadline=deadline)
        if wish is None or located.reference not in _references(wish, located.volume):
            self._attach(located, client, mode, deadline=deadline)
        self._await_device(located, client, mode, deadline=deadline)
        return self._context(located, client, mode, request.context, deadline=deadline)

    def unpublish(self, volume_id: str, node_id: str, *, deadline: Deadline) -> None:
        """Give up the handle's hold of the volume on the node (all nodes when `node_id` is empty), and wait for it.

        Success when volume, node or attachment do not exist (any more), and for a client that is down once the wish is
        recorded. Raises `PreconditionFailed` when the device stays open there, `DeadlineReached` otherwise; the wish
        stands in both cases.
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

    # --- publish ------------------------------------------------------------------------------------------

    def _found(self, request: PublishRequest, *, deadline: Deadline) -> tuple[Located, Client]:
        """Find node and volume; the volume last, so that what is counted in it is no older than the node's state."""
        management = sole_management(self._clusters, request.volume_id)
        client = None
        if management is not None:
            client = find_client(management, request.node_id, deadline=deadline)
        located = require(self._clusters, request.volume_id, deadline=deadline)
        if management is None:
            client = find_client(located.management, request.node_id, deadline=deadline)
            located = require(self._clusters, request.volume_id, deadline=deadline)
        if client is None:
            raise NodeNotFound(request.node_id)
        return located, client

    def _settled(self, located: Located, client: Client, *, deadline: Deadline) -> Client:
        """Wait until an earlier detachment on this client is over: attach and detach of one volume never overlap."""
        latest = client
        uuid = located.volume.uuid

        def is_settled() -> bool:
            nonlocal latest
            latest = self._again(located.management, latest, deadline=deadline)
            return not _is_leaving(latest, uuid)

        if client.status is ClientStatus.DOWN:
            raise _client_absent(client)
        if not self._attach_wait(deadline).wait_until(is_settled):
            report = latest.devices.get(uuid)
            raise OperationPending(
                f"volume {located.volume.name} is still being detached from node {client.id} "
                f"(device {'gone' if report is None else report.status.name.lower()})"
            )
        return latest

    def _refuse_new(self, located: Located, client: Client, request: PublishRequest, *, deadline: Deadline) -> None:
        """Refuse an attachment that must not come about, before anything is written over what its holder counts on."""
        if client.status in _ABSENT:
            raise _client_absent(client)
        limit = self._settings.max_volumes_per_node
        if limit and (held := sum(client.holds(uuid) for uuid in {*client.wishes, *client.devices})) >= limit:
            raise Exhausted(f"node {client.id} holds {held} volumes, wanted fewer than its limit of {limit}")
        held_as = located.volume.reservation.mode
        mode = access.reservation_mode(request.capability, read_only=request.read_only)
        may_join = request.capability.mode.is_multi_node and held_as is mode
        if held_as is ReservationMode.NONE or may_join:
            return
        holders = _others(located, client, deadline=deadline)
        if holders:
            raise _held_elsewhere(located.volume, holders)
        raise OperationPending(f"volume {located.volume.name} was held until just now; call again")

    def _remember(
        self,
        located: Located,
        client: Client,
        volume_id: str,
        new: ReservationMode | None,
        *,
        writes: bool,
        deadline: Deadline,
    ) -> None:
        """Write what must be known for good before the node can touch the device; nothing where nothing changes.

        `new` is the mode of an attachment that is about to be made, and to be counted.
        """
        volume = located.volume
        known = record.read_attachments(volume.metadata)
        attachments = known
        if new is not None:
            attachments = known.counted(client.uuid, record.next_number(volume.reservation, new))
        if writes and not attachments.written:
            attachments = attachments.with_writer()
        if _needs_spelling(located, volume_id, attachments):
            attachments = attachments.with_handle(volume_id)
        if attachments != known:
            metadata = record.with_attachments(volume.metadata, attachments)
            located.management.set_metadata(volume, metadata, deadline=deadline)

    def _attach(self, located: Located, client: Client, mode: ReservationMode, *, deadline: Deadline) -> None:
        """Record the wish. Where the volume is held otherwise, say by whom; taking it over would be decided here."""
        volume = located.volume
        try:
            located.management.attach(
                client, volume, mode=mode, reference_id=reference_id(located.handle), deadline=deadline
            )
        except ReservationConflict as conflict:
            if conflict.management_id == 1716:
                raise
            present = self._again(located.management, client, deadline=deadline).wishes.get(volume.uuid)
            if present is not None and not present.is_detaching:
                raise _held_otherwise(volume, client, present.mode, mode) from conflict
            holders = _others(located, client, deadline=deadline)
            if holders:
                raise _held_elsewhere(volume, holders) from conflict
            raise OperationPending(f"volume {volume.name} was held until just now; call again") from conflict
        _log.info("attaching volume %s, uuid %s, to %s as %s", volume.name, volume.uuid, client.id, mode.name.lower())

    def _await_device(self, located: Located, client: Client, mode: ReservationMode, *, deadline: Deadline) -> None:
        """Wait until the client reports a usable device, and the wish still stands in that same answer.

        The wish is looked at again because servers before 3.5 may lose one that was accepted.
        """
        missing = "the attachment"

        def is_usable() -> bool:
            nonlocal missing
            latest = self._again(located.management, client, deadline=deadline)
            wish = latest.wishes.get(located.volume.uuid)
            if wish is None or wish.is_detaching or located.reference not in _references(wish, located.volume):
                raise OperationPending(
                    f"volume {located.volume.name} was detached from {client.id} while being attached; call again"
                )
            missing = _missing(latest, located, mode)
            return not missing

        if not self._attach_wait(deadline).wait_until(is_usable):
            raise DeadlineReached(
                f"{missing} of volume {located.volume.name} on node {client.id}", deadline.elapsed_s()
            )

    def _context(
        self,
        located: Located,
        client: Client,
        mode: ReservationMode,
        given: Mapping[str, str],
        *,
        deadline: Deadline,
    ) -> PublishContext:
        """Say what the node may believe, from the volume as it is now that it is attached."""
        volume = located.management.volume(located.volume.name, deadline=deadline)
        if volume is None or volume.uuid != located.volume.uuid:
            raise VolumeNotFound(located.volume.name, "it was deleted while it was being attached")
        attachments = record.read_attachments(volume.metadata)
        number = attachments.clients.get(client.uuid, 0)
        # A number that is not the storage's own (somebody was attached in between, or the version was set back)
        # could have been another attachment's.
        if number != volume.reservation.version - 1 or number < attachments.number:
            number = 0
        history = History.ATTACHED
        if not record.read_creation(volume.metadata).is_ours or attachments.is_broken:
            history = History.UNKNOWN
        elif attachments.written:
            history = History.WRITTEN
        elif number == 1 and mode is ReservationMode.EXCLUSIVE_READ_WRITE:
            history = History.FIRST
        context = PublishContext(
            name=volume.name,
            uuid=volume.uuid,
            attachment=number,
            history=history,
            read_only=mode is ReservationMode.SHARED_READ_ONLY,
            size_bytes=volume.size_bytes,
        )
        return handing.completed(context, volume, given)

    # --- unpublish ----------------------------------------------------------------------------------------

    def _withdraw(self, located: Located, client: Client, *, deadline: Deadline) -> None:
        volume = located.volume
        wish = client.wishes.get(volume.uuid)
        if wish is None or wish.is_detaching or located.reference not in _references(wish, volume):
            return
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
            if latest is None or latest.uuid != client.uuid or latest.status is ClientStatus.DOWN:
                is_gone = True
                return True
            report = latest.devices.get(volume.uuid)
            is_gone = _is_released(latest, located)
            if report is None or report.status not in _BUSY:
                busy = None
            elif busy is None:
                busy = Deadline.after(_BUSY_WAIT_S, deadline.clock)
            return is_gone or (busy is not None and busy.expired())

        within(deadline, self._settings.detach_wait_s, margin_s=self._settings.answer_margin_s).wait_until(is_decided)
        if is_gone:
            return
        if report is not None and report.status in _BUSY:
            raise PreconditionFailed(
                f"volume {volume.name} cannot be detached from node {client.id}: its device is open there "
                f"({report.status.name.lower()}); wanted it unmounted and closed"
            )
        state = "gone" if report is None else report.status.name.lower()
        raise DeadlineReached(
            f"volume {volume.name} to be detached from node {client.id} (device {state})", deadline.elapsed_s()
        )

    # --- both -----------------------------------------------------------------------------------------------

    def _again(self, management: Management, client: Client, *, deadline: Deadline) -> Client:
        latest = management.client(client.id, deadline=deadline)
        if latest is None or latest.uuid != client.uuid:
            raise NodeNotFound(client.uuid)
        return latest

    def _attach_wait(self, deadline: Deadline) -> Deadline:
        return within(deadline, self._settings.attach_wait_s, margin_s=self._settings.answer_margin_s)


def _references(wish: AttachmentWish, volume: Volume) -> frozenset[str]:
    """Return the references of a wish; one that names none was made without, which is the volume's uuid."""
    return wish.reference_ids or frozenset({volume.uuid})


def _is_leaving(client: Client, volume_uuid: str) -> bool:
    wish, report = client.wishes.get(volume_uuid), client.devices.get(volume_uuid)
    if wish is not None:
        return wish.is_detaching
    return report is not None and report.status not in (*_NOT_THERE, *_NEVER_CAME)


def _is_released(client: Client, located: Located) -> bool:
    """Tell whether the client no longer holds the volume under this handle's reference."""
    uuid, reference = located.volume.uuid, located.reference
    wish, report = client.wishes.get(uuid), client.devices.get(uuid)
    if wish is None:
        return report is None or report.status in (*_NOT_THERE, *_NEVER_CAME)
    if wish.is_detaching or reference in _references(wish, located.volume):
        return False
    # Others on the node still need the device. A report may lack its references.
    return report is None or report.reference_ids is None or reference not in report.reference_ids


def _missing(client: Client, located: Located, mode: ReservationMode) -> str:
    """Name what a usable device lacks; empty when it lacks nothing."""
    report = client.devices.get(located.volume.uuid)
    if client.status is ClientStatus.DOWN:
        return "a sign of life of the storage client (it is down): the attachment"
    if report is None:
        return "the attachment (the client reports no device)"
    if report.status is DeviceStatus.RESERVATION_DENIED or report.mode not in (mode, ReservationMode.NONE):
        return f"the reservation (device {report.status.name.lower()}, held as {report.mode.name.lower()})"
    if report.status is not DeviceStatus.ATTACHED:
        return f"the attachment (device {report.status.name.lower()})"
    if not report.io_enabled:
        return "I/O, which is not enabled on the attached device,"
    if report.reference_ids is not None and located.reference not in report.reference_ids:
        return f"the reference {located.reference} on the attached device"
    return ""


def _needs_spelling(located: Located, volume_id: str, attachments: Attachments) -> bool:
    """Tell whether lists would not show this spelling of the handle while it is attached unless it is recorded."""
    uuid, reference = located.volume.uuid, located.reference
    if volume_id == issued_handle(located.zone, located.volume, located.creation).format():
        return False
    parsed = [handle for text in attachments.handles if (handle := VolumeHandle.parse(text)) is not None]
    recorded = any(held_reference(handle, uuid) == reference for handle in parsed)
    return recorded or volume_id != derived_spelling(located.zone, located.volume, reference)


def derived_spelling(zone: str, volume: Volume, reference: str) -> str:
    """Return how a handle is spelled that holds a volume under this reference id, as far as the id tells."""
    named = None if reference == volume.uuid else reference
    return VolumeHandle(volume.name, zone, volume.uuid, named).format()


def _others(located: Located, client: Client, *, deadline: Deadline) -> list[Client]:
    holders = located.management.clients_holding(located.volume.uuid, deadline=deadline)
    return [holder for holder in holders if holder.uuid != client.uuid]


def _held_otherwise(volume: Volume, client: Client, held: ReservationMode, mode: ReservationMode) -> ExistsDifferently:
    what = f"the attachment of volume {volume.name} to node {client.id}"
    return ExistsDifferently(what, [f"its mode is {held.name.lower()}, wanted {mode.name.lower()}"])


def _held_elsewhere(volume: Volume, holders: list[Client]) -> PreconditionFailed:
    names = ", ".join(f"{holder.uuid} ({holder.id})" for holder in sorted(holders, key=lambda holder: holder.id))
    return PreconditionFailed(f"volume {volume.name} is attached to node {names}; wanted it detached from there")


def _client_absent(client: Client) -> StorageUnavailable:
    return StorageUnavailable(f"the storage client of node {client.id} is {client.status.name.lower()}, wanted ready")
