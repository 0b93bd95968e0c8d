# SPDX-License-Identifier: Apache-2.0
"""Find volumes by CSI volume ids, storage clients by node ids, and the volume ids of volumes."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable
from dataclasses import dataclass

from csi_driver.controller.ports import Clusters, Management
from csi_driver.controller.volume_metadata import (
    AttachmentRecord,
    issued_place,
    read_handles,
    reserved_bytes,
    source_of,
    volume_context,
)
from csi_driver.controller.zones import Found, ask, find_in
from csi_driver.deadline import Deadline
from csi_driver.errors import PreconditionFailed, VolumeNotFound, shown
from csi_driver.model import DEFAULT_ZONE, ProvisionedVolume, Segments, VolumeHandle, is_uuid
from csi_driver.publish_context import held_reference
from csi_driver.storage_model import Client, VolumeSummary

_INSTANCE = re.compile(r"_(?:mc)?[0-9]+$")
_ANY_UUID = "00000000-0000-0000-0000-000000000000"


class ZoneNotServed(PreconditionFailed):
    def __init__(self, volume_id: str, handle: VolumeHandle, detail: str = "") -> None:
        self.handle = handle
        place = f"volume {shown(volume_id)} lies in zone {shown(handle.zone)}, which this driver does not serve"
        super().__init__(f"{place}: {detail}" if detail else place)


@dataclass(frozen=True, slots=True)
class Located(Found):
    volume_id: str
    handle: VolumeHandle

    @property
    def reference(self) -> str:
        return held_reference(self.handle, self.volume.uuid)


def locate(clusters: Clusters, volume_id: str, *, deadline: Deadline) -> Located | None:
    """Find the volume of a CSI volume id; None if it does not exist. Raises `ZoneNotServed`.

    For an id without a zone every zone must answer, and only one may have it: else `PreconditionFailed`.
    """
    handle = VolumeHandle.parse(volume_id)
    if handle is None:
        return None
    zones = zones_of(clusters, handle)
    if not zones:
        raise ZoneNotServed(volume_id, handle)

    def in_zone(zone: str) -> Located | None:
        found = find_in(clusters, zone, handle.name, deadline=deadline)
        if found is None or (handle.uuid is not None and found.volume.uuid.lower() != handle.uuid):
            return None
        return Located(zone, found.volume, found.creation, found.management, volume_id, handle)

    answers = ask(zones, in_zone, deadline=deadline).all()
    found = [located for zone in zones if (located := answers[zone]) is not None]
    if len(found) > 1:
        places = ", ".join(located.zone for located in found)
        raise PreconditionFailed(f"volume {shown(volume_id)} exists in zones {places}; use a handle with a zone")
    return found[0] if found else None


def require(clusters: Clusters, volume_id: str, *, deadline: Deadline) -> Located:
    try:
        located = locate(clusters, volume_id, deadline=deadline)
    except ZoneNotServed as problem:
        raise VolumeNotFound(volume_id, str(problem)) from problem
    if located is None:
        raise VolumeNotFound(volume_id)
    if located.volume.is_being_deleted:
        raise VolumeNotFound(volume_id, "it is being deleted")
    return located


def zones_of(clusters: Clusters, handle: VolumeHandle) -> list[str]:
    """Return the zones of a handle. With one zone, `single-zone-cluster` of older drivers means that zone."""
    zones = list(clusters.zones())
    if handle.zone is None or (handle.zone == DEFAULT_ZONE and len(zones) == 1):
        return zones
    return [handle.zone] if clusters.management(handle.zone) is not None else []


def sole_management(clusters: Clusters, volume_id: str) -> Management | None:
    handle = VolumeHandle.parse(volume_id)
    zones = zones_of(clusters, handle) if handle is not None else []
    return clusters.management(zones[0]) if len(zones) == 1 else None


def find_client(management: Management, node_id: str, *, only: str | None = None, deadline: Deadline) -> Client | None:
    """Find the storage client of a node by the client's uuid, its id, or the node's name.

    Short and qualified names match, also with an instance number, but not for a client that connects on demand: it has
    exactly the node's id. Raises `PreconditionFailed` if several match.
    `only`: without the client's volumes other than that of this uuid.
    """
    if is_uuid(node_id):
        return management.client_by_uuid(node_id.lower(), only=only, deadline=deadline)
    client = management.client(node_id, only=only, deadline=deadline)
    if client is not None:
        return client
    clients = [each for each in management.clients(deadline=deadline) if not each.connects_on_demand]
    same = [client for client in clients if _is_same_host(client.id, node_id)]
    if len(same) > 1:
        raise PreconditionFailed(
            f"node {shown(node_id)} matches several storage clients: {client_names(same)}; "
            "delete the stale client from the management"
        )
    return same[0] if same else None


def client_names(clients: Iterable[Client]) -> str:
    return ", ".join(sorted(f"{client.id} ({client.uuid})" for client in clients))


def _is_same_host(client_id: str, node_name: str) -> bool:
    """Return whether a client's id and a node's name can be one host: `a`, `a.example.com` and `a_mc1` can."""
    one, other = _INSTANCE.sub("", client_id).lower(), node_name.lower()
    return one == other or one == other.partition(".")[0] or other == one.partition(".")[0]


def issued_reference(zone: str, name: str, reference: str) -> str | None:
    """Return the last part of a new volume's handle; None if the handle would be too long with it."""
    if not reference:
        return None
    handle = VolumeHandle.parse(VolumeHandle(name, zone, _ANY_UUID, reference).format())
    return reference if handle is not None and handle.reference == reference else None


def issued_handle(zone: str, volume: VolumeSummary) -> VolumeHandle:
    """Return the handle that CreateVolume returned; for volumes of other origin, the one without a reference."""
    issued_zone, reference = issued_place(volume.metadata)
    return VolumeHandle(volume.name, issued_zone or zone, volume.uuid, reference)


def must_record_handle(located: Located, record: AttachmentRecord) -> bool:
    """Return whether `listed_handles` needs this handle in the attachment record while it is attached."""
    uuid, reference = located.volume.uuid, located.reference
    if located.volume_id == issued_handle(located.zone, located.volume).format():
        return False
    is_recorded = reference in _recorded_handles(record.handles, uuid)
    return is_recorded or located.volume_id != _derived_handle(located.zone, located.volume, reference)


def listed_handles(zone: str, volume: VolumeSummary, attached: Collection[str]) -> list[tuple[str, str]]:
    """Return the handles of a volume for ListVolumes, each with its reference id: the issued one first.

    external-attacher compares handles literally, so one that a person wrote is listed as it was attached: from the
    attachment record, as it cannot be derived from `attached`, the reference ids of the present attachments.
    """
    issued = issued_handle(zone, volume)
    own_reference = held_reference(issued, volume.uuid)
    handles = {issued.format(): own_reference}
    recorded = _recorded_handles(read_handles(volume.metadata), volume.uuid) if attached else {}
    for reference in attached:
        derived = [] if reference == own_reference else [_derived_handle(zone, volume, reference)]
        for text in recorded.get(reference, derived):
            handles.setdefault(text, reference)
    return list(handles.items())


def _recorded_handles(handles: Iterable[str], uuid: str) -> dict[str, list[str]]:
    recorded: dict[str, list[str]] = {}
    for text in handles:
        handle = VolumeHandle.parse(text)
        if handle is not None:
            recorded.setdefault(held_reference(handle, uuid), []).append(text)
    return recorded


def _derived_handle(zone: str, volume: VolumeSummary, reference: str) -> str:
    return VolumeHandle(volume.name, zone, volume.uuid, None if reference == volume.uuid else reference).format()


def described(
    zone: str, volume: VolumeSummary, topology: tuple[Segments, ...], volume_id: str | None = None
) -> ProvisionedVolume:
    """Return a volume as CreateVolume answers it; `volume_id`: with this handle in place of the issued one."""
    return ProvisionedVolume(
        volume_id or issued_handle(zone, volume).format(),
        volume.size_bytes - reserved_bytes(volume),
        volume_context(zone, volume.metadata),
        topology,
        source_of(volume.metadata),
    )
