"""What a storage client's document says of one volume: held, leaving, gone, or what is still missing.

A desired is what the management wants, a report what the client says; nothing here trusts one for the other.
"""

from __future__ import annotations

from csi_driver.controller.locate import Located
from csi_driver.deadline import Deadline
from csi_driver.errors import ExistsDifferently, StorageUnavailable
from csi_driver.storage_model import Client, ClientStatus, DesiredAttachment, DeviceStatus, ReservationMode, Volume

_NOT_THERE = (DeviceStatus.DETACHED, DeviceStatus.DETACHED_AFTER_SHUTDOWN)
_NEVER_CAME = (DeviceStatus.ATTACH_FAILED, DeviceStatus.RESERVATION_DENIED, DeviceStatus.UNKNOWN_VOLUME)
ABSENT = (ClientStatus.INITIALIZING, ClientStatus.EXITING, ClientStatus.REMOVAL_READY, ClientStatus.DOWN)


def references(desired: DesiredAttachment, volume: Volume) -> frozenset[str]:
    """Return the references of a desired; one that names none was made without, which is the volume's uuid."""
    return desired.reference_ids or frozenset({volume.uuid})


def is_leaving(client: Client, volume_uuid: str) -> bool:
    desired, report = client.desired.get(volume_uuid), client.devices.get(volume_uuid)
    if desired is not None:
        return desired.is_detaching
    return report is not None and report.status not in (*_NOT_THERE, *_NEVER_CAME)


def is_released(client: Client, located: Located) -> bool:
    """Tell whether the client no longer holds the volume under this handle's reference."""
    uuid, reference = located.volume.uuid, located.reference
    desired, report = client.desired.get(uuid), client.devices.get(uuid)
    if desired is None:
        return report is None or report.status in (*_NOT_THERE, *_NEVER_CAME)
    if desired.is_detaching or reference in references(desired, located.volume):
        return False
    # Others on the node still need the device. A report may lack its references.
    return report is None or report.reference_ids is None or reference not in report.reference_ids


def missing(client: Client, located: Located, mode: ReservationMode) -> str:
    """Name what a usable device lacks; empty when it lacks nothing."""
    report = client.devices.get(located.volume.uuid)
    if client.status is ClientStatus.DOWN:
        return "the attachment (the storage client is down)"
    if report is None:
        return "the attachment (the client reports no device)"
    if report.status is DeviceStatus.RESERVATION_DENIED or report.mode not in (mode, ReservationMode.NONE):
        return f"the reservation (device {report.status.name.lower()}, held as {report.mode.name.lower()})"
    if report.status is not DeviceStatus.ATTACHED:
        return f"the attachment (device {report.status.name.lower()})"
    if not report.io_enabled:
        return "I/O on the attached device (it is disabled)"
    if report.reference_ids is not None and located.reference not in report.reference_ids:
        return f"the reference {located.reference} on the attached device"
    return ""


def is_withdrawn(client: Client, located: Located) -> bool:
    """Tell whether the desired is recorded that the client give up the volume under this handle's reference."""
    desired = client.desired.get(located.volume.uuid)
    return desired is None or desired.is_detaching or located.reference not in references(desired, located.volume)


def device_state(client: Client, volume: Volume) -> str:
    """Describe the device of a detachment that takes long, and how to find what keeps it: the management cannot tell.

    It drops every report of a client that the device is busy, so that a busy one goes on to show as attached.
    """
    report = client.devices.get(volume.uuid)
    if report is None:
        return "device gone"
    state = f"device {report.status.name.lower()}"
    if report.status is not DeviceStatus.ATTACHED:
        return state
    name = volume.name
    if volume.status not in ("online", "unavailable"):
        state += f", and the volume is {volume.status} in the storage management, which may be the reason"
    return (
        f"{state}; a program on that node may have it open: see /proc/nvmeibc/volumes/{name}/client_processes "
        f"and `fuser -vam /dev/nvmesh/{name}` there"
    )


def others(located: Located, client: Client, *, deadline: Deadline) -> list[Client]:
    """Return the other clients that hold the volume or are not yet rid of it. Asks the management."""
    holders = located.management.clients_holding(located.volume.uuid, deadline=deadline)
    return [holder for holder in holders if holder.uuid != client.uuid]


def held_otherwise(volume: Volume, client: Client, held: ReservationMode, mode: ReservationMode) -> ExistsDifferently:
    what = f"the attachment of volume {volume.name} to node {client.id}"
    return ExistsDifferently(what, [f"mode: expected {mode.name.lower()}, got {held.name.lower()}"])


def client_absent(client: Client) -> StorageUnavailable:
    return StorageUnavailable(
        f"storage client of node {client.id}: expected ready, got {client.status.name.lower()}; "
        "check the client on that node"
    )
