# SPDX-License-Identifier: Apache-2.0
"""ControllerPublishVolume, and the attachments that a node makes for itself.

A node formats a fresh volume after a short check only if the publish context has `History.FIRST`. Three independent
facts must agree on it: by the metadata this driver created the volume blank, by the attachment record this is the first
attachment, and by the version of the reservation, which the storage itself keeps, no other client was attached before.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

from csi_driver import errors
from csi_driver.capacity import stripes_of
from csi_driver.controller.fencing import Preemption, UnpublishVolume, device_state, is_detaching, missing
from csi_driver.controller.ports import Clusters, PublishRequest
from csi_driver.controller.validate import check_capability, reservation_mode
from csi_driver.controller.volume_lookup import Located, find_client, must_record_handle, require, sole_management
from csi_driver.controller.volume_metadata import (
    AttachmentRecord,
    claim_of,
    encryption_of,
    history_of,
    next_number,
    read_attachments,
    read_creation,
    read_permission,
    with_attachments,
)
from csi_driver.deadline import Deadline
from csi_driver.model import BlockAccess, Capability, VolumeHandle
from csi_driver.parameters.storage_class import check_use
from csi_driver.publish_context import Encryption, History, PublishContext, reference_id
from csi_driver.reporting import SILENT, EventReason, Reporter, Subject
from csi_driver.settings import AttachSettings
from csi_driver.storage_model import (
    Client,
    ClientStatus,
    DesiredAttachment,
    ReservationMode,
    Volume,
    VolumeOnClient,
)

_log = logging.getLogger(__name__)

_READ_ONLY_VOLUME = 1716
"""The management's error: the volume is read-only and write access was requested."""


@dataclass(frozen=True, slots=True)
class PublishVolume:
    """ControllerPublishVolume. Keeps no state: several controllers may serve the same call at once."""

    clusters: Clusters
    settings: AttachSettings
    reporter: Reporter = SILENT

    def publish(self, request: PublishRequest, *, deadline: Deadline) -> PublishContext:
        """Attach the volume to the node and wait until its device is usable there.

        A volume that lost nodes hold is preempted, if `fencing` permits it. Errors name the holder, limit or obstacle.
        """
        check_capability(request.capability)
        mode = reservation_mode(request.capability, read_only=request.read_only)
        located, client = self._find(request, deadline)
        preemption = Preemption(self.settings.fencing)
        call = _Call(self.clusters, self.settings, self.reporter, request, mode, deadline, located, client, preemption)
        return call.publish()

    def _find(self, request: PublishRequest, deadline: Deadline) -> tuple[Located, Client]:
        """Find node and volume, the volume last: its attachment record must not be older than the node's state."""
        management = sole_management(self.clusters, request.volume_id)
        client = None
        if management is not None:
            handle = VolumeHandle.parse(request.volume_id)
            # The limit counts all volumes of the node.
            only = handle.uuid if handle is not None and not self.settings.max_volumes_per_node else None
            client = find_client(management, request.node_id, only=only, deadline=deadline)
        located = require(self.clusters, request.volume_id, deadline=deadline)
        if management is None:
            client = find_client(located.management, request.node_id, deadline=deadline)
            located = require(self.clusters, request.volume_id, deadline=deadline)
        if client is None:
            raise errors.NodeNotFound(request.node_id)
        return located, client


@dataclass(slots=True)
class _Call:
    clusters: Clusters
    settings: AttachSettings
    reporter: Reporter
    request: PublishRequest
    mode: ReservationMode
    deadline: Deadline
    located: Located
    client: Client
    preemption: Preemption

    def publish(self) -> PublishContext:
        self._check_volume()
        if self._is_detaching():
            self._await_detached()
            # The attachment record must be read after the wait.
            self.located = require(self.clusters, self.request.volume_id, deadline=self.deadline)
        volume = self.located.volume
        if self._desired() is None and volume.reservation.mode is not ReservationMode.NONE:
            # A client holds it by now; perhaps this one, through the same call to another controller.
            self._read_client()
            if self._is_detaching():
                raise errors.OperationPending(f"volume {volume.name} is being detached from {self.client.id}; retry")
        desired = self._desired()
        has_reference = desired is not None and self.located.reference in desired.references
        if self.request.is_again and not has_reference:
            raise errors.NotAttached(volume.name, self.client.id)
        preempted: int | None = None
        if desired is None:
            preempted = self._admit()
        elif desired.mode is not self.mode:
            raise self._held_in(desired.mode)
        record = self._record_attachment(is_new=desired is None)
        answered = None if has_reference else self._attach(preempted)
        return self._context(record, self._await_device(answered))

    def _check_volume(self) -> None:
        located, request = self.located, self.request
        if located.volume.is_snapshot:
            raise errors.PreconditionFailed(
                f"volume {located.volume.name} is a snapshot, which the storage client of a node cannot attach: "
                "only a client in user space can; publish the snapshot's source instead"
            )
        by = encryption_of(located.volume, located.creation, request.context)
        if by is Encryption.UNKNOWN:
            raise errors.PreconditionFailed(
                f"volume {located.volume.name}: expected encryption by the storage, got none in the management; it is "
                "not attached, because its data would be unencrypted"
            )
        is_blank = located.is_blank
        check_use(request.capability, request.context, by=by, read_only=request.read_only, is_blank=is_blank)

    def _await_detached(self) -> None:
        """Wait until an earlier detachment from this client ends: attach and detach of a volume never overlap."""
        if self.client.status is ClientStatus.DOWN and not self.client.connects_on_demand:
            raise _client_absent(self.client)

        def is_detached() -> bool:
            self._read_client()
            return not self._is_detaching()

        if not self._wait(is_detached):
            volume = self.located.volume
            raise errors.OperationPending(
                f"volume {volume.name} is still being detached from node {self.client.id} "
                f"({device_state(self.client, volume)})"
            )

    def _admit(self) -> int | None:
        """Refuse early, before the record changes; return the version of the reservation to preempt, if any."""
        client, reservation = self.client, self.located.volume.reservation
        if client.is_absent:
            raise _client_absent(client)
        limit = self.settings.max_volumes_per_node
        if limit and (held := sum(client.holds(uuid) for uuid in {*client.desired, *client.devices})) >= limit:
            raise errors.Exhausted(
                f"volumes of node {client.id}: expected fewer than its limit of {limit}, got {held}; use another node, "
                "or raise --max-volumes-per-node"
            )
        may_join = self.request.capability.mode.is_multi_node and reservation.mode is self.mode
        if reservation.mode is ReservationMode.NONE or may_join:
            return None
        return self.preemption.permit(self.located, client, deadline=self.deadline)

    def _record_attachment(self, *, is_new: bool) -> AttachmentRecord:
        """Write the attachment record before the node can use the device; no request if it is unchanged."""
        volume = self.located.volume
        known = record = read_attachments(volume.metadata)
        if is_new:
            record = record.counted(self.client.uuid, next_number(volume.reservation, self.mode))
        is_block = isinstance(self.request.capability.access, BlockAccess)
        if is_block and self.mode is not ReservationMode.SHARED_READ_ONLY and not record.written:
            record = replace(record, written=True)
        if must_record_handle(self.located, record):
            record = record.with_handle(self.located.volume_id)
        if record != known:
            metadata = with_attachments(volume.metadata, record)
            self.located.management.set_metadata(volume, metadata, deadline=self.deadline)
        return record

    def _attach(self, preempted: int | None) -> VolumeOnClient | None:
        volume, client = self.located.volume, self.client
        holders: list[str] = []
        if preempted is not None:
            holders = self.preemption.confirm(self.located, client, preempted, deadline=self.deadline)
        try:
            answered = self.located.management.attach(
                client,
                volume,
                mode=self.mode,
                reference_id=reference_id(self.located.handle),
                version=preempted,
                preempt=preempted is not None,
                detach_others=preempted is not None,
                deadline=self.deadline,
            )
        except errors.ReservationConflict as conflict:
            if conflict.management_id == _READ_ONLY_VOLUME:
                raise
            self._read_client()
            present = self._desired()
            if present is not None and not present.is_detaching:
                raise self._held_in(present.mode) from conflict
            raise self.preemption.refusal(self.located, client, deadline=self.deadline) from conflict
        for holder in holders:
            note = (
                f"volume {volume.name} was taken from node {holder} for node {client.id}: "
                f"the storage refuses the I/O of pods that still use it on {holder}"
            )
            self.reporter.report(Subject(claim_of(volume.metadata), holder), EventReason.TAKEN_OVER, note)
        mode = self.mode.name.lower()
        _log.info("attaching volume %s, uuid %s, to %s as %s", volume.name, volume.uuid, client.id, mode)
        return answered

    def _await_device(self, answered: VolumeOnClient | None) -> Volume:
        """Wait for the device and the desired attachment, and return the volume as it is then.

        Servers before 3.5 lose accepted attachments. `answered`: the state after the request to attach, if known.
        """
        if answered is not None:
            self.client = answered.client
            if not self._lacks():
                return answered.volume
        lacks, expected = "the attachment", self.located.volume

        def is_usable() -> bool:
            nonlocal lacks
            self._read_client()
            lacks = self._lacks()
            return not lacks

        if not self._wait(is_usable):
            raise errors.DeadlineReached(f"{lacks} of volume {expected.name} on node {self.client.id}")
        volume = self.located.management.volume(expected.name, deadline=self.deadline)
        if volume is None or volume.uuid != expected.uuid:
            raise errors.VolumeNotFound(expected.name, "it was deleted while it was being attached")
        return volume

    def _lacks(self) -> str:
        """Return the part that the attachment lacks to be used, "" if none."""
        desired = self._desired()
        if desired is None or desired.is_detaching or self.located.reference not in desired.references:
            name = self.located.volume.name
            raise errors.OperationPending(f"volume {name} was detached from {self.client.id} meanwhile; retry")
        return missing(self.client, self.located, self.mode)

    def _context(self, known: AttachmentRecord, volume: Volume) -> PublishContext:
        """Return the context; it promises nothing if the server still shows an earlier attachment than `known`."""
        creation, record = read_creation(volume.metadata), read_attachments(volume.metadata)
        desired, version = self.client.desired[volume.uuid], volume.reservation.version
        number = record.clients.get(self.client.uuid, 0)
        is_old = (
            number != known.clients.get(self.client.uuid, 0)
            or desired.version not in (0, version)
            or version < self.located.volume.reservation.version
        )
        if not is_old and desired.preempts and record.taken < desired.version:
            # This client has I/O, so the former holders have none: `was_preempted` needs it to delete the volume.
            taken = with_attachments(volume.metadata, replace(record, taken=desired.version))
            self.located.management.set_metadata(volume, taken, deadline=self.deadline)
        # A number that is not the storage's own (a client was attached in between, or the version was set back) could
        # be that of another attachment.
        if is_old or number != version - 1 or number < record.number:
            number = 0
        history, origin = history_of(volume.metadata), creation.origin
        if history is History.ATTACHED:
            if known.written:
                history = History.WRITTEN
            elif origin is None and number == 1 and self.mode is ReservationMode.EXCLUSIVE_READ_WRITE:
                history = History.FIRST
        unit_bytes, stripe_bytes = stripes_of(volume.layout)
        report = self.client.devices.get(volume.uuid)
        is_reader = self.mode is ReservationMode.SHARED_READ_ONLY
        return PublishContext(
            name=volume.name,
            uuid=volume.uuid,
            attachment=number,
            history=history,
            read_only=is_reader,
            size_bytes=volume.size_bytes,
            encryption=encryption_of(volume, creation, self.request.context),
            format_allowed=self._may_format(volume, number),
            stripe_unit_bytes=unit_bytes,
            stripe_bytes=stripe_bytes,
            populated=origin is not None,
            inherited_uuids=origin.ancestors if origin is not None else (),
            private_copy=is_reader and volume.has_private_readers,
            claim=claim_of(volume.metadata) if self.reporter is not SILENT else None,
            nvme=report.export if report is not None else None,
        )

    def _may_format(self, volume: Volume, number: int) -> bool:
        """Return whether an administrator allowed this attachment to format over old data; 0 is never allowed."""
        if self.mode is ReservationMode.SHARED_READ_ONLY or number == 0 or number != read_permission(volume.metadata):
            return False
        _log.warning(
            "attachment %d of volume %s may format over old data, as allowed by `nvmesh-csi volume allow-format`",
            *(number, volume.name),
        )
        return True

    def _desired(self) -> DesiredAttachment | None:
        return self.client.desired.get(self.located.volume.uuid)

    def _is_detaching(self) -> bool:
        return is_detaching(self.client, self.located.volume.uuid)

    def _held_in(self, mode: ReservationMode) -> errors.ExistsDifferently:
        what = f"the attachment of volume {self.located.volume.name} to node {self.client.id}"
        return errors.ExistsDifferently(what, [f"mode: expected {self.mode.name.lower()}, got {mode.name.lower()}"])

    def _read_client(self) -> None:
        only = None if self.settings.max_volumes_per_node else self.located.volume.uuid
        latest = self.located.management.client(self.client.id, only=only, deadline=self.deadline)
        if latest is None or latest.uuid != self.client.uuid:
            raise errors.NodeNotFound(self.client.uuid)
        self.client = latest

    def _wait(self, condition: Callable[[], bool]) -> bool:
        return self.settings.wait(self.deadline, self.settings.attach_wait_s).wait_until(condition)


def _client_absent(client: Client) -> errors.StorageUnavailable:
    return errors.StorageUnavailable(
        f"storage client of node {client.id}: expected ready, got {client.status.name.lower()}; "
        "check the client on that node"
    )


@dataclass(frozen=True, slots=True)
class NodeAttach:
    """The attachments that a node makes for itself. `node_id` is called each time: its client may start later."""

    publisher: PublishVolume
    unpublisher: UnpublishVolume
    node_id: Callable[[], str]

    def attach(
        self,
        volume_id: str,
        capability: Capability,
        volume_context: Mapping[str, str],
        *,
        is_again: bool = False,
        deadline: Deadline,
    ) -> Mapping[str, str]:
        node_id = self.node_id()
        request = PublishRequest(volume_id, node_id, capability, False, context=volume_context, is_again=is_again)
        return self.publisher.publish(request, deadline=deadline).as_map()

    def detach(self, volume_id: str, *, deadline: Deadline) -> None:
        self.unpublisher.unpublish(volume_id, self.node_id(), deadline=deadline)
