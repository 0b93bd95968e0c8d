"""Health of volumes as the storage management knows it (CSI 1.13, alpha)."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from itertools import accumulate
from types import MappingProxyType
from typing import Protocol

from csi_driver.controller.locate import require
from csi_driver.controller.ports import Clusters
from csi_driver.controller.requests import ControllerSettings
from csi_driver.controller.tokens import PAGE_BYTES, health_bytes
from csi_driver.deadline import Deadline
from csi_driver.health import Reason, VolumeEntry, VolumeFault, VolumeHealth, each_once
from csi_driver.model import ListedVolume
from csi_driver.storage_model import Client, ClientStatus, DeviceStatus, Volume

_STATUSES: Mapping[str, tuple[VolumeFault, Reason]] = MappingProxyType(
    {
        "offline": (VolumeFault.INACCESSIBLE, Reason.VOLUME_OFFLINE),
        "unavailable": (VolumeFault.INACCESSIBLE, Reason.VOLUME_UNAVAILABLE),
        "degraded": (VolumeFault.DEGRADED, Reason.VOLUME_DEGRADED),
    }
)
_HEALTHS: Mapping[str, tuple[VolumeFault, Reason]] = MappingProxyType(
    {
        "alarm": (VolumeFault.DEGRADED, Reason.VOLUME_ALARM),
        "critical": (VolumeFault.DEGRADED, Reason.VOLUME_CRITICAL),
    }
)
_REBUILDING = frozenset({"rebuildRequired", "markedForRebuild", "rebuilding"})
_FAILED = frozenset({DeviceStatus.ATTACH_FAILED, DeviceStatus.RESERVATION_DENIED})


class Listing(Protocol):
    """Pages of volumes, as ListVolumes shows them."""

    def volumes(
        self, max_entries: int, starting_token: str, *, deadline: Deadline
    ) -> tuple[list[ListedVolume], str]: ...


class ControllerHealth:
    """ControllerGetVolumeHealth and ControllerListVolumeHealth."""

    def __init__(self, clusters: Clusters, listing: Listing, settings: ControllerSettings) -> None:
        self._clusters = clusters
        self._listing = listing
        self._settings = settings

    def volume(self, volume_id: str, *, deadline: Deadline) -> VolumeHealth:
        """Tell what is wrong with one volume; costs the same with any number of others. Raises `VolumeNotFound`."""
        located = require(self._clusters, volume_id, deadline=deadline)
        clients = located.management.clients_holding(located.volume.uuid, deadline=deadline)
        return VolumeHealth(volume_id, judge(located.volume, clients))

    def volumes(self, max_entries: int, starting_token: str, *, deadline: Deadline) -> tuple[list[VolumeHealth], str]:
        """Return the health of a page of volumes, healthy ones too, with the pages and tokens of ListVolumes."""
        listed, token = self._listing.volumes(max_entries, starting_token, deadline=deadline)
        holders: dict[str, Mapping[str, Sequence[Client]]] = {}
        found = []
        for entry in listed:
            zone = entry.volume.topology[0][self._settings.topology_key]
            if zone not in holders:
                holders[zone] = self._holders(zone, deadline=deadline)
            volume = entry.stored
            entries = () if volume is None else judge(volume, holders[zone].get(volume.uuid, ()))
            found.append(VolumeHealth(entry.volume.volume_id, entries))
        fitting = sum(size <= PAGE_BYTES for size in accumulate(map(health_bytes, found)))
        if fitting < len(found):
            # Where much is wrong this takes more than the list does.
            _, token = self._listing.volumes(max(fitting, 1), starting_token, deadline=deadline)
            found = found[: max(fitting, 1)]
        return found, token

    def _holders(self, zone: str, *, deadline: Deadline) -> Mapping[str, Sequence[Client]]:
        management = self._clusters.management(zone)
        holders: dict[str, list[Client]] = {}
        for client in management.clients(deadline=deadline) if management is not None else ():
            for uuid in client.desired:
                holders.setdefault(uuid, []).append(client)
        return holders


def judge(volume: Volume, clients: Sequence[Client]) -> tuple[VolumeEntry, ...]:
    """Tell what is wrong with a volume by its document and those of the clients that hold it."""
    found = list(_of_volume(volume))
    for client in clients:
        found.extend(_of_attachment(volume, client))
    return each_once(found)


def _of_volume(volume: Volume) -> Iterator[VolumeEntry]:
    if volume.is_being_made:
        return
    words = f"status {volume.status}, health {volume.health}, action {volume.action}"
    stands = _STATUSES.get(volume.status) or _HEALTHS.get(volume.health)
    if stands is not None:
        yield VolumeEntry(*stands, f"the storage management reports {words}")
    if volume.action in _REBUILDING:
        yield VolumeEntry(VolumeFault.DEGRADED, Reason.VOLUME_REBUILDING, f"the storage management reports {words}")


def _of_attachment(volume: Volume, client: Client) -> Iterator[VolumeEntry]:
    """Judge what is wanted there, against what the client reports; one that is being detached is no one's any more."""
    desired = client.desired.get(volume.uuid)
    if desired is None or desired.is_detaching:
        return
    report = client.devices.get(volume.uuid)
    if client.status is ClientStatus.DOWN:
        yield VolumeEntry(VolumeFault.INACCESSIBLE, Reason.NODE_DOWN, f"it is attached to {client.id}, which is down")
    elif report is not None and report.status in _FAILED:
        yield VolumeEntry(
            VolumeFault.INACCESSIBLE, Reason.ATTACH_FAILED, f"{client.id} reports {report.status.name} for it"
        )
    elif report is not None and report.status is DeviceStatus.ATTACHED and not report.io_enabled:
        yield VolumeEntry(VolumeFault.INACCESSIBLE, Reason.IO_DISABLED, f"{client.id} has I/O disabled for it")
