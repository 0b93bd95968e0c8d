"""ControllerPublishVolume and ControllerUnpublishVolume.

What an attachment means for formatting is decided here: the node formats a fresh volume after a quick look only when
this module says that nobody ever had it (`History.FIRST`). Three independent facts must agree on that: the record
says that we made the volume, the count of attachments says that this is the first, and the reservation's version, kept
by the storage itself, says that nobody else was attached before or in between.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from dataclasses import replace

from csi_driver.controller.fencing import (
    ABSENT,
    Preemption,
    client_absent,
    device_state,
    held_otherwise,
    is_leaving,
    missing,
    references,
)
from csi_driver.controller.ports import Clusters, Management, PublishRequest
from csi_driver.controller.unpublish import UnpublishVolume
from csi_driver.controller.validate import check_capability, reservation_mode
from csi_driver.controller.volume_lookup import (
    Located,
    derived_spelling,
    find_client,
    is_blank,
    issued_handle,
    require,
    sole_management,
)
from csi_driver.controller.volume_metadata import (
    AttachmentRecord,
    check_encryption,
    completed,
    encryption_of,
    next_number,
    read_attachments,
    read_creation,
    with_attachments,
)
from csi_driver.controller.waiting import within
from csi_driver.deadline import Deadline
from csi_driver.errors import (
    DeadlineReached,
    Exhausted,
    NodeNotFound,
    NotAttached,
    OperationPending,
    PreconditionFailed,
    ReservationConflict,
    VolumeNotFound,
)
from csi_driver.model import BlockAccess, Capability, VolumeHandle
from csi_driver.parameters.storage_class import check_use
from csi_driver.publish_context import History, PublishContext, held_reference, reference_id
from csi_driver.settings import AttachSettings
from csi_driver.storage_model import Client, ClientStatus, ReservationMode, Volume

_log = logging.getLogger(__name__)


class PublishVolume:
    """Attach volumes to nodes and detach them. Keeps no state: several controllers may do the same at once."""

    def __init__(self, clusters: Clusters, settings: AttachSettings) -> None:
        self._clusters = clusters
        self._settings = settings
        self._take_over = Preemption(settings.fencing)

    def publish(self, request: PublishRequest, *, deadline: Deadline) -> PublishContext:
        """Attach the volume to the node and wait until its device can be used there.

        A volume that lost nodes hold is taken from them, where that is allowed (see `takeover`). Raises
        `ExistsDifferently` when the node holds it in another mode, `PreconditionFailed` naming the node that holds it,
        `Exhausted` at the node's limit, `DeadlineReached` naming what is missing.
        """
        check_capability(request.capability)
        mode = reservation_mode(request.capability, read_only=request.read_only)
        located, client = self._found(request, deadline=deadline)
        if located.volume.is_snapshot:
            raise PreconditionFailed(
                f"volume {located.volume.name} is a snapshot, which the storage client of a node cannot attach: "
                "only a client in user space can; publish the snapshot's source instead"
            )
        check_encryption(located.volume, request.context)
        by = encryption_of(located.volume, located.creation, request.context)
        check_use(request.capability, request.context, by=by, read_only=request.read_only, is_blank=is_blank(located))
        if is_leaving(client, located.volume.uuid):
            client = self._settled(located, client, deadline=deadline)
            # What is counted below must be read after the wait, not before it.
            located = require(self._clusters, request.volume_id, deadline=deadline)
        desired = client.desired.get(located.volume.uuid)
        if desired is None and located.volume.reservation.mode is not ReservationMode.NONE:
            # Somebody holds it by now; perhaps this very node, for the same call made of another controller.
            client = self._again(located.management, client, deadline=deadline)
            desired = client.desired.get(located.volume.uuid)
            if is_leaving(client, located.volume.uuid):
                raise OperationPending(f"volume {located.volume.name} is being detached from node {client.id}; retry")
        taken: int | None = None
        if request.is_again and (desired is None or located.reference not in references(desired, located.volume)):
            raise NotAttached(located.volume.name, client.id)
        if desired is None:
            taken = self._admit(located, client, request, deadline=deadline)
        elif desired.mode is not mode:
            raise held_otherwise(located.volume, client, desired.mode, mode)
        writes = isinstance(request.capability.access, BlockAccess) and mode is not ReservationMode.SHARED_READ_ONLY
        new = mode if desired is None else None
        known = self._remember(located, client, request.volume_id, new, writes=writes, deadline=deadline)
        if desired is None or located.reference not in references(desired, located.volume):
            self._attach(located, client, mode, taken, deadline=deadline)
        client = self._await_device(located, client, mode, deadline=deadline)
        return self._context(located, client, mode, known, request.context, deadline=deadline)

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
            return not is_leaving(latest, uuid)

        if client.status is ClientStatus.DOWN:
            raise client_absent(client)
        if not self._attach_wait(deadline).wait_until(is_settled):
            state = device_state(latest, located.volume)
            raise OperationPending(
                f"volume {located.volume.name} is still being detached from node {client.id} ({state})"
            )
        return latest

    def _admit(self, located: Located, client: Client, request: PublishRequest, *, deadline: Deadline) -> int | None:
        """Refuse an attachment that must not come about, before anything is written over what its holder counts on.

        Return the version of the reservation when the volume must be taken from whoever holds it, else None.
        """
        if client.status in ABSENT:
            raise client_absent(client)
        limit = self._settings.max_volumes_per_node
        if limit and (held := sum(client.holds(uuid) for uuid in {*client.desired, *client.devices})) >= limit:
            raise Exhausted(
                f"volumes of node {client.id}: expected fewer than its limit of {limit}, got {held}; use another node, "
                "or raise --max-volumes-per-node"
            )
        held_as = located.volume.reservation.mode
        mode = reservation_mode(request.capability, read_only=request.read_only)
        may_join = request.capability.mode.is_multi_node and held_as is mode
        if held_as is ReservationMode.NONE or may_join:
            return None
        return self._take_over.judge(located, client, deadline=deadline)

    def _remember(
        self,
        located: Located,
        client: Client,
        volume_id: str,
        new: ReservationMode | None,
        *,
        writes: bool,
        deadline: Deadline,
    ) -> AttachmentRecord:
        """Write what must be known for good before the node can touch the device; nothing where nothing changes.

        `new` is the mode of an attachment that is about to be made, and to be counted.
        """
        volume = located.volume
        known = read_attachments(volume.metadata)
        attachments = known
        if new is not None:
            attachments = known.counted(client.uuid, next_number(volume.reservation, new))
        if writes and not attachments.written:
            attachments = attachments.with_writer()
        if _needs_spelling(located, volume_id, attachments):
            attachments = attachments.with_handle(volume_id)
        if attachments != known:
            metadata = with_attachments(volume.metadata, attachments)
            located.management.set_metadata(volume, metadata, deadline=deadline)
        return attachments

    def _attach(
        self, located: Located, client: Client, mode: ReservationMode, taken: int | None, *, deadline: Deadline
    ) -> None:
        """Record the desired, preempting the reservation of version `taken`. Where the volume is held, say by whom."""
        volume = located.volume
        if taken is not None:
            self._take_over.confirm(located, client, taken, deadline=deadline)
        try:
            located.management.attach(
                client,
                volume,
                mode=mode,
                reference_id=reference_id(located.handle),
                version=taken,
                preempt=taken is not None,
                detach_others=taken is not None,
                deadline=deadline,
            )
        except ReservationConflict as conflict:
            if conflict.management_id == 1716:
                raise
            present = self._again(located.management, client, deadline=deadline).desired.get(volume.uuid)
            if present is not None and not present.is_detaching:
                raise held_otherwise(volume, client, present.mode, mode) from conflict
            raise self._take_over.refusal(located, client, deadline=deadline) from conflict
        _log.info("attaching volume %s, uuid %s, to %s as %s", volume.name, volume.uuid, client.id, mode.name.lower())

    def _await_device(self, located: Located, client: Client, mode: ReservationMode, *, deadline: Deadline) -> Client:
        """Wait until the client reports a usable device, and the desired still stands in that same answer: return it.

        The desired is looked at again because servers before 3.5 may lose one that was accepted.
        """
        lacks, latest = "the attachment", client

        def is_usable() -> bool:
            nonlocal lacks, latest
            latest = self._again(located.management, client, deadline=deadline)
            desired = latest.desired.get(located.volume.uuid)
            if desired is None or desired.is_detaching or located.reference not in references(desired, located.volume):
                raise OperationPending(
                    f"volume {located.volume.name} was detached from {client.id} while being attached; retry"
                )
            lacks = missing(latest, located, mode)
            return not lacks

        if not self._attach_wait(deadline).wait_until(is_usable):
            raise DeadlineReached(f"{lacks} of volume {located.volume.name} on node {client.id}")
        return latest

    def _context(
        self,
        located: Located,
        client: Client,
        mode: ReservationMode,
        known: AttachmentRecord,
        given: Mapping[str, str],
        *,
        deadline: Deadline,
    ) -> PublishContext:
        """Say what the node may believe, from the volume as it is now that it is attached.

        `known` is the record as this call left it, and `client` shows the attachment. The volume may come from a server
        that has not yet heard of either and shows an earlier attachment of the same node: then nothing is believed.
        """
        volume = located.management.volume(located.volume.name, deadline=deadline)
        if volume is None or volume.uuid != located.volume.uuid:
            raise VolumeNotFound(located.volume.name, "it was deleted while it was being attached")
        attachments = read_attachments(volume.metadata)
        number = attachments.clients.get(client.uuid, 0)
        # A number that is not the storage's own (somebody was attached in between, or the version was set back)
        # could have been another attachment's.
        is_old = (
            number != known.clients.get(client.uuid, 0)
            or client.desired[volume.uuid].version not in (0, volume.reservation.version)
            or volume.reservation.version < located.volume.reservation.version
        )
        if not is_old:
            self._remember_taken(located.management, volume, client, attachments, deadline=deadline)
        if is_old or number != volume.reservation.version - 1 or number < attachments.number:
            number = 0
        history = History.ATTACHED
        if not read_creation(volume.metadata).is_ours or attachments.is_broken:
            history = History.UNKNOWN
        elif attachments.written or known.written:
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
        return completed(context, volume, given)

    def _remember_taken(
        self, management: Management, volume: Volume, client: Client, known: AttachmentRecord, *, deadline: Deadline
    ) -> None:
        """Record that the client has I/O on a volume that it took: those who had it before have none any more.

        `takeover.was_preempted` needs it when the volume is deleted and a former holder is not back by then.
        """
        desired = client.desired[volume.uuid]
        if desired.preempts and known.taken < desired.version:
            metadata = with_attachments(volume.metadata, replace(known, taken=desired.version))
            management.set_metadata(volume, metadata, deadline=deadline)

    # --- both -----------------------------------------------------------------------------------------------

    def _again(self, management: Management, client: Client, *, deadline: Deadline) -> Client:
        latest = management.client(client.id, deadline=deadline)
        if latest is None or latest.uuid != client.uuid:
            raise NodeNotFound(client.uuid)
        return latest

    def _attach_wait(self, deadline: Deadline) -> Deadline:
        return within(deadline, self._settings.attach_wait_s, margin_s=self._settings.answer_margin_s)


def _needs_spelling(located: Located, volume_id: str, attachments: AttachmentRecord) -> bool:
    """Tell whether lists would not show this spelling of the handle while it is attached unless it is recorded."""
    uuid, reference = located.volume.uuid, located.reference
    if volume_id == issued_handle(located.zone, located.volume, located.creation).format():
        return False
    parsed = [handle for text in attachments.handles if (handle := VolumeHandle.parse(text)) is not None]
    recorded = any(held_reference(handle, uuid) == reference for handle in parsed)
    return recorded or volume_id != derived_spelling(located.zone, located.volume, reference)


class NodeAttach:
    """`node_id` tells who this node is, at each call: its storage client may come up after the driver."""

    def __init__(self, publish: PublishVolume, unpublish: UnpublishVolume, node_id: Callable[[], str]) -> None:
        self._publish = publish
        self._unpublish = unpublish
        self._node_id = node_id

    def attach(
        self,
        volume_id: str,
        capability: Capability,
        volume_context: Mapping[str, str],
        *,
        is_again: bool = False,
        deadline: Deadline,
    ) -> Mapping[str, str]:
        """Attach the volume to this node, or find it attached, and return its publish context."""
        node_id = self._node_id()
        request = PublishRequest(volume_id, node_id, capability, False, context=volume_context, is_again=is_again)
        return self._publish.publish(request, deadline=deadline).as_map()

    def detach(self, volume_id: str, *, deadline: Deadline) -> None:
        """Give up this handle's hold of the volume on this node."""
        self._unpublish.unpublish(volume_id, self._node_id(), deadline=deadline)
