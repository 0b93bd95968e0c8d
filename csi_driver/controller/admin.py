# SPDX-License-Identifier: Apache-2.0
"""The commands `nvmesh-csi volume`: list and show volumes, and allow one format over old data.

The driver never does that by itself: the device may be the wrong one. A StorageClass parameter would allow it for every
volume and forever.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass

from csi_driver.controller import snapshots
from csi_driver.controller.list_volumes import find_faults
from csi_driver.controller.ports import Clusters, Management
from csi_driver.controller.volume_lookup import Located, client_names, issued_handle, require
from csi_driver.controller.volume_metadata import (
    AttachmentRecord,
    csi_name_of,
    encryption_of,
    next_number,
    read_attachments,
    read_permission,
    reserved_bytes,
    source_of,
    with_permission,
)
from csi_driver.controller.zones import ask, served
from csi_driver.deadline import Deadline
from csi_driver.errors import OperationPending, PreconditionFailed
from csi_driver.storage_model import Client, ReservationMode, Snapshot, VolumeSummary

Document = dict[str, object]

_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class VolumeAdmin:
    clusters: Clusters

    def allow_format(self, volume_id: str, *, deadline: Deadline) -> str:
        located = require(self.clusters, volume_id, deadline=deadline)
        volume = located.volume
        holders = located.management.clients_holding(volume.uuid, deadline=deadline)
        number = _permitted_number(located, holders)
        located.management.set_metadata(volume, with_permission(volume.metadata, number), deadline=deadline)
        after = require(self.clusters, volume_id, deadline=deadline).volume
        if after.reservation.version != number or read_permission(after.metadata) != number:
            # The permission is for an attachment that was made without it, and no other one ever has its number.
            raise OperationPending(f"volume {volume.name} was attached concurrently; detach it and retry")
        message = (
            f"allowed the next attachment of volume {volume.name}, uuid {volume.uuid}, zone {located.zone}, "
            f"to format over old data (attachment {number})"
        )
        _log.warning("%s", message)
        return message

    def show(self, volume_id: str, *, deadline: Deadline) -> list[tuple[str, str]]:
        located = require(self.clusters, volume_id, deadline=deadline)
        volume, creation = located.volume, located.creation
        holders = located.management.clients_holding(volume.uuid, deadline=deadline)
        record = read_attachments(volume.metadata)
        made_by = "this driver" if creation.is_ours else "an earlier driver" if creation.csi_name else "another program"
        return [
            ("handle", issued_handle(located.zone, volume).format()),
            ("CSI name", creation.csi_name or "none"),
            ("made by", made_by),
            *([("copy of", f"{origin.source.kind} {origin.source.id}")] if (origin := creation.origin) else []),
            ("made for", "raw block" if creation.is_block else creation.fs_type or "unknown"),
            ("usable bytes", str(volume.size_bytes - located.reserved_bytes)),
            ("bytes", str(volume.size_bytes)),
            ("layout", f"{volume.layout.raid_level.value}, provisioning group {volume.vpg or 'none'}"),
            ("encryption", encryption_of(volume, creation, {}).value),
            ("state", f"{volume.status}, {volume.health or 'health unknown'}, action {volume.action}"),
            ("reservation", f"{volume.reservation.mode.name.lower()}, version {volume.reservation.version}"),
            ("held by", client_names(holders) or "no node"),
            ("attachments", _attachments(record)),
            ("formatting", _formatting(located, record)),
        ]

    def document(self, volume_id: str, *, deadline: Deadline) -> Document:
        """Return the volume as one document, its keys as in docs/kubectl-plugin.md."""
        located = require(self.clusters, volume_id, deadline=deadline)
        volume, creation, reservation = located.volume, located.creation, located.volume.reservation
        holders = located.management.clients_holding(volume.uuid, deadline=deadline)
        record = read_attachments(volume.metadata)
        return {
            **_volume(located.zone, volume, holders),
            "layout": volume.layout.raid_level.value,
            "group": volume.vpg or "",
            "encryption": encryption_of(volume, creation, {}).value,
            "madeFor": "block" if creation.is_block else creation.fs_type or "",
            "readOnly": volume.is_read_only,
            "reservation": {
                "mode": reservation.mode.name.lower(),
                "version": reservation.version,
                "reservedBy": reservation.reserved_by or "",
                "attached": list(reservation.attached),
            },
            "attachments": _attachments(record),
            "formatting": _formatting(located, record),
        }

    def listing(self, *, deadline: Deadline) -> Document:
        """Return the volumes and snapshots of all zones; a zone that does not answer is named with the reason."""
        zones = self.clusters.zones()
        answers = ask(zones, lambda zone: _zone(zone, served(self.clusters, zone), deadline), deadline=deadline)
        found = [answers.given[zone] for zone in zones if zone in answers.given]
        return {
            "zones": [{"zone": zone, "error": str(answers.missing.get(zone, ""))} for zone in zones],
            "volumes": [volume for volumes, _ in found for volume in volumes],
            "snapshots": [snapshot for _, cut in found for snapshot in cut],
        }


def _zone(zone: str, management: Management, deadline: Deadline) -> tuple[list[Document], list[Document]]:
    holders: dict[str, list[Client]] = {}
    for client in management.clients(deadline=deadline):
        for uuid in {*client.desired, *client.devices}:
            if client.holds(uuid):
                holders.setdefault(uuid, []).append(client)
    volumes = [
        _volume(zone, volume, holders.get(volume.uuid, ()))
        for volume in management.volumes(after="", limit=0, deadline=deadline)
        if not volume.is_reserved and not volume.name.endswith("_MD")
    ]
    has_snapshots = management.system_info(deadline=deadline).features.deletions
    cut = management.snapshots(after="", limit=0, deadline=deadline) if has_snapshots else ()
    return volumes, [_snapshot(zone, snapshot) for snapshot in cut]


def _volume(zone: str, volume: VolumeSummary, holders: Sequence[Client]) -> Document:
    source = source_of(volume.metadata)
    return {
        "handle": issued_handle(zone, volume).format(),
        "zone": zone,
        "name": volume.name,
        "uuid": volume.uuid,
        "csiName": csi_name_of(volume.metadata) or "",
        "source": {"kind": source.kind.value, "id": source.id} if source is not None else None,
        "bytes": volume.size_bytes,
        "usableBytes": volume.size_bytes - reserved_bytes(volume),
        "status": volume.status,
        "health": volume.health,
        "action": volume.action,
        "faults": [
            {"fault": each.status.value, "reason": each.reason.value, "message": each.message}
            for each in find_faults(volume, holders)
        ],
        "holders": [_holder(client, volume.uuid) for client in holders],
    }


def _holder(client: Client, uuid: str) -> Document:
    desired, report = client.desired.get(uuid), client.devices.get(uuid)
    return {
        "client": client.id,
        "nodeId": client.node_id,
        "clientStatus": client.status.name.lower(),
        "connectsOnDemand": client.connects_on_demand,
        "desired": "detached" if desired is None else "detaching" if desired.is_detaching else "attached",
        "device": report.status.name.lower() if report is not None else "",
        "ioEnabled": report.io_enabled if report is not None else None,
    }


def _snapshot(zone: str, snapshot: Snapshot) -> Document:
    cut = snapshots.described(zone, snapshot)
    return {
        "id": cut.snapshot_id,
        "zone": zone,
        "name": snapshot.name,
        "uuid": snapshot.uuid,
        "volume": snapshot.volume_name,
        "volumeUuid": snapshot.volume_uuid,
        "volumeHandle": cut.source_volume_id,
        "bytes": cut.size_bytes,
        "created": snapshot.created.isoformat() if snapshot.is_ready else "",
        "ready": snapshot.is_ready,
        "group": cut.group_snapshot_id,
    }


def _permitted_number(located: Located, holders: Sequence[Client]) -> int:
    volume = located.volume
    if holders or volume.reservation.mode is not ReservationMode.NONE:
        names = ", ".join(sorted(client.id for client in holders)) or "an unknown client"
        raise PreconditionFailed(f"volume {volume.name} is attached to {names}; detach it first")
    if volume.is_read_only:
        raise PreconditionFailed(f"volume {volume.name} is read-only and cannot be formatted")
    if located.creation.is_block:
        raise PreconditionFailed(f"volume {volume.name} is for raw block access and is never formatted")
    number = next_number(volume.reservation, ReservationMode.EXCLUSIVE_READ_WRITE)
    if read_permission(volume.metadata) == number:
        raise PreconditionFailed(f"volume {volume.name}: the next attachment may already format over old data")
    return number


def _attachments(record: AttachmentRecord) -> str:
    if record.is_broken:
        return "invalid record (changed by another program)"
    written = ", written to as a raw device" if record.written else ""
    return f"{f'the latest has number {record.number}' if record.number else 'none on record'}{written}"


def _formatting(located: Located, record: AttachmentRecord) -> str:
    volume, creation = located.volume, located.creation
    if creation.is_block:
        return "never: raw block access"
    number = next_number(volume.reservation, ReservationMode.EXCLUSIVE_READ_WRITE)
    if read_permission(volume.metadata) == number:
        return "allowed over old data, for the next attachment"
    if located.is_blank and not record.is_broken and not record.number:
        return "if head, tail and all superblock locations are blank: never attached before"
    reason = "it was attached before" if record.number else "its history is unknown"
    if creation.origin is not None and not record.number:
        reason = "it has the content of its source"
    return f"only if every block is zero: {reason} (nvmesh-csi volume allow-format lifts it once)"
