"""From the ids that CSI knows to the storage's own objects."""

from __future__ import annotations

import re
from dataclasses import dataclass

from csi_driver.controller.ports import Clusters, Management
from csi_driver.controller.volume_metadata import Creation, read_creation, reserved_bytes
from csi_driver.controller.zones import ask, served
from csi_driver.deadline import Deadline
from csi_driver.errors import PreconditionFailed, VolumeNotFound, shown
from csi_driver.model import DEFAULT_ZONE, ProvisionedVolume, VolumeHandle, is_uuid
from csi_driver.parameters.storage_class import CONTEXT_KEYS
from csi_driver.publish_context import held_reference
from csi_driver.storage_model import Client, Reservation, Volume

_INSTANCE = re.compile(r"_(?:mc)?[0-9]+$")


class ZoneNotServed(PreconditionFailed):
    """The handle names a zone that is not configured: what is there cannot be known, so nothing is claimed of it."""

    def __init__(self, volume_id: str, zone: str, detail: str = "") -> None:
        self.zone = zone
        super().__init__(
            f"volume {shown(volume_id)} lies in zone {shown(zone)}, which this driver does not serve"
            + (f": {detail}" if detail else "")
        )


@dataclass(frozen=True, slots=True)
class Located:
    """A volume that is there, with the way to it."""

    handle: VolumeHandle
    zone: str
    management: Management
    volume: Volume

    @property
    def creation(self) -> Creation:
        return read_creation(self.volume.metadata)

    @property
    def reference(self) -> str:
        """The reference id under which this handle's attachments show."""
        return held_reference(self.handle, self.volume.uuid)


def locate(clusters: Clusters, volume_id: str, *, deadline: Deadline) -> Located | None:
    """Find the volume that a CSI volume id means; None when there is no such volume (any more).

    Raises `ZoneNotServed`, and `PreconditionFailed` for an id without zone that fits volumes in several zones; such an
    id needs the answer of every zone, lest it mean another volume of that name.
    """
    handle = VolumeHandle.parse(volume_id)
    if handle is None:
        return None
    zones = zones_of(clusters, handle)
    if not zones:
        raise ZoneNotServed(volume_id, handle.zone or "")
    answers = ask(zones, lambda zone: _locate_in(clusters, zone, handle, deadline=deadline), deadline=deadline).all()
    found = [located for zone in zones if (located := answers[zone]) is not None]
    if len(found) > 1:
        places = ", ".join(located.zone for located in found)
        raise PreconditionFailed(
            f"volume {shown(volume_id)} exists in the zones {places}; use a handle that names the zone"
        )
    return found[0] if found else None


def zones_of(clusters: Clusters, handle: VolumeHandle) -> list[str]:
    """Return the zones that a handle may mean; none when it names one that is not served.

    Older drivers of one cluster wrote `single-zone-cluster`, a name that says no more than that there was one: where
    there still is one, it is meant, whatever it is called by now.
    """
    served = list(clusters.zones())
    if handle.zone is None or (handle.zone == DEFAULT_ZONE and len(served) == 1):
        return served
    return [handle.zone] if clusters.management(handle.zone) is not None else []


def _locate_in(clusters: Clusters, zone: str, handle: VolumeHandle, *, deadline: Deadline) -> Located | None:
    management = served(clusters, zone)
    volume = management.volume(handle.name, deadline=deadline)
    if volume is None or (handle.uuid is not None and volume.uuid.lower() != handle.uuid):
        return None
    return Located(handle, zone, management, volume)


def require(clusters: Clusters, volume_id: str, *, deadline: Deadline) -> Located:
    """Find the volume; `VolumeNotFound` when there is none, or when it is going."""
    try:
        located = locate(clusters, volume_id, deadline=deadline)
    except ZoneNotServed as problem:
        raise VolumeNotFound(volume_id, str(problem)) from problem
    if located is None:
        raise VolumeNotFound(volume_id)
    if located.volume.is_being_deleted:
        raise VolumeNotFound(volume_id, "it is being deleted")
    return located


def is_blank(located: Located) -> bool:
    """Tell whether no node can have written to the volume: this driver made it, and it was never attached."""
    return located.creation.is_ours and located.volume.reservation == Reservation()


def sole_management(clusters: Clusters, volume_id: str) -> Management | None:
    """Return the only management where the volume can be; None where several must be asked, or none has it."""
    handle = VolumeHandle.parse(volume_id)
    if handle is None:
        return None
    zones = zones_of(clusters, handle)
    return clusters.management(zones[0]) if len(zones) == 1 else None


def find_client(management: Management, node_id: str, *, deadline: Deadline) -> Client | None:
    """Find the storage client of a node by the client's uuid, by its id, or by the node's name.

    Clients are named by the host name that they saw themselves, which may be the short one where the node has the full
    one, or the other way round, and may have the number of an instance behind it. Raises `PreconditionFailed` where
    that leaves several.
    """
    if is_uuid(node_id):
        return management.client_by_uuid(node_id.lower(), deadline=deadline)
    client = management.client(node_id, deadline=deadline)
    if client is not None:
        return client
    same = [client for client in management.clients(deadline=deadline) if _is_same_host(client.id, node_id)]
    if len(same) > 1:
        names = ", ".join(sorted(f"{client.id} ({client.uuid})" for client in same))
        raise PreconditionFailed(
            f"node {shown(node_id)} matches several storage clients: {names}; "
            "delete the stale client from the management"
        )
    return same[0] if same else None


def _is_same_host(client_id: str, node_name: str) -> bool:
    """Tell whether a client's id and a node's name can be one host: `a`, `a.example.com` and `a_mc1` can."""
    one, other = _INSTANCE.sub("", client_id).lower(), node_name.lower()
    return one == other or one == other.partition(".")[0] or other == one.partition(".")[0]


def issued_handle(zone: str, volume: Volume, creation: Creation) -> VolumeHandle:
    """Return the handle under which a volume was issued; of volumes that we did not make, the one without reference."""
    reference = creation.reference if creation.is_ours else None
    return VolumeHandle(volume.name, (creation.zone if creation.is_ours else None) or zone, volume.uuid, reference)


def described(
    zone: str, volume: Volume, creation: Creation, topology_key: str, volume_id: str | None = None
) -> ProvisionedVolume:
    """Show a volume as CSI does: under the id that was asked for, else under the one that was issued."""
    context = {"zone": creation.zone or zone}
    if creation.fs_type is not None and not creation.is_block:
        context["fsType"] = creation.fs_type
    context.update({key: creation.parameters[key] for key in CONTEXT_KEYS if key in creation.parameters})
    return ProvisionedVolume(
        volume_id=volume_id or issued_handle(zone, volume, creation).format(),
        capacity_bytes=volume.size_bytes - reserved_bytes(volume, creation),
        context=context if creation.csi_name is not None else {},
        topology=({topology_key: zone},),
    )


_ANY_UUID = "00000000-0000-0000-0000-000000000000"


def issued_reference(zone: str, name: str, reference: str) -> str | None:
    """Return the last part of a new volume's handle; None where it must be left out.

    It is decided before the volume exists: the uuid, still unknown, has a fixed length.
    """
    if not reference:
        return None
    handle = VolumeHandle.parse(VolumeHandle(name, zone, _ANY_UUID, reference).format())
    return reference if handle is not None and handle.reference == reference else None


def derived_spelling(zone: str, volume: Volume, reference: str) -> str:
    """Return how a handle is spelled that holds a volume under this reference id, as far as the id tells."""
    named = None if reference == volume.uuid else reference
    return VolumeHandle(volume.name, zone, volume.uuid, named).format()
