"""What an administrator does by hand with one volume: allow that it be formatted over old data, and see how it stands.

Old data on a new volume is never formatted over by itself: the device may be another one, or the volume somebody's.
Whoever knows better allows it here, for one volume and one attachment. It is no parameter of a StorageClass,
which would allow it for every volume and for good.
"""

from __future__ import annotations

import logging

from csi_driver.controller.ports import Clusters
from csi_driver.controller.volume_lookup import Located, issued_handle, require
from csi_driver.controller.volume_metadata import (
    encryption_of,
    next_number,
    read_attachments,
    read_permission,
    reserved_bytes,
    with_permission,
)
from csi_driver.deadline import Deadline
from csi_driver.errors import OperationPending, PreconditionFailed
from csi_driver.storage_model import Client, ReservationMode, Volume

_log = logging.getLogger(__name__)


class VolumeAdmin:
    """Acts on one volume at an administrator's word."""

    def __init__(self, clusters: Clusters) -> None:
        self._clusters = clusters

    def allow_format(self, volume_id: str, *, deadline: Deadline) -> str:
        """Allow the next attachment of the volume to format over old data; return what was done, as a sentence.

        Raises `VolumeNotFound`, `PreconditionFailed` while anybody holds the volume, for a volume that is never
        formatted, and where it is allowed already; `OperationPending` where it is attached in this moment.
        """
        located = require(self._clusters, volume_id, deadline=deadline)
        volume = located.volume
        holders = located.management.clients_holding(volume.uuid, deadline=deadline)
        number = _permitted(located, holders)
        metadata = with_permission(volume.metadata, number)
        located.management.set_metadata(volume, metadata, deadline=deadline)
        after = require(self._clusters, volume_id, deadline=deadline).volume
        if after.reservation.version != number or read_permission(after.metadata) != number:
            # The permission is for an attachment that is under way without it, and no other ever has its number.
            raise OperationPending(f"volume {volume.name} was attached concurrently; detach it and retry")
        said = (
            f"allowed the next attachment of volume {volume.name}, uuid {volume.uuid}, zone {located.zone}, "
            f"to format over old data (attachment {number})"
        )
        _log.warning("%s", said)
        return said

    def show(self, volume_id: str, *, deadline: Deadline) -> list[tuple[str, str]]:
        """Return how the volume stands: pairs of what and how, in an order to be read."""
        located = require(self._clusters, volume_id, deadline=deadline)
        holders = located.management.clients_holding(located.volume.uuid, deadline=deadline)
        volume, creation = located.volume, located.creation
        made_by = "this driver" if creation.is_ours else "an earlier driver" if creation.csi_name else "another program"
        use = "raw block" if creation.is_block else creation.fs_type or "unknown"
        return [
            ("handle", issued_handle(located.zone, volume, creation).format()),
            ("CSI name", creation.csi_name or "none"),
            ("made by", made_by),
            ("made for", use),
            ("usable bytes", str(volume.size_bytes - reserved_bytes(volume, creation))),
            ("bytes", str(volume.size_bytes)),
            ("layout", f"{volume.layout.raid_level.value}, provisioning group {volume.vpg or 'none'}"),
            ("encryption", encryption_of(volume, creation, {}).value),
            ("state", f"{volume.status}, {volume.health or 'health unknown'}, action {volume.action}"),
            ("reservation", f"{volume.reservation.mode.name.lower()}, version {volume.reservation.version}"),
            ("held by", ", ".join(f"{client.id} ({client.uuid})" for client in holders) or "no node"),
            ("attachments", _attachments(volume)),
            ("formatting", _formatting(located)),
        ]


def _permitted(located: Located, holders: list[Client]) -> int:
    """Return the number that the next attachment will have, or say why none may format the volume."""
    volume = located.volume
    if holders or volume.reservation.mode is not ReservationMode.NONE:
        names = ", ".join(sorted(client.id for client in holders)) or "somebody"
        raise PreconditionFailed(f"volume {volume.name} is attached to {names}; detach it first")
    if volume.is_read_only:
        raise PreconditionFailed(f"volume {volume.name} is read-only and cannot be formatted")
    if located.creation.is_block:
        raise PreconditionFailed(f"volume {volume.name} is for raw block access and is never formatted")
    number = next_number(volume.reservation, ReservationMode.EXCLUSIVE_READ_WRITE)
    if read_permission(volume.metadata) == number:
        raise PreconditionFailed(
            f"volume {volume.name}: the next attachment is already allowed to format over old data"
        )
    return number


def _attachments(volume: Volume) -> str:
    known = read_attachments(volume.metadata)
    if known.is_broken:
        return "invalid record (changed by another program)"
    written = ", written to as a raw device" if known.written else ""
    return f"{'the latest has number ' + str(known.number) if known.number else 'none on record'}{written}"


def _formatting(located: Located) -> str:
    """Say under which condition the next attachment formats the device."""
    volume, creation = located.volume, located.creation
    known = read_attachments(volume.metadata)
    if creation.is_block:
        return "never: raw block access"
    number = next_number(volume.reservation, ReservationMode.EXCLUSIVE_READ_WRITE)
    if read_permission(volume.metadata) == number:
        return "allowed over old data, for the next attachment"
    if creation.is_ours and not known.is_broken and not known.number and volume.reservation.version == 1:
        return "if head, tail and all superblock locations are blank: never attached before"
    reason = "it was attached before" if known.number else "its history is unknown"
    return f"only if every block is zero: {reason} (nvmesh-csi volume allow-format lifts it once)"
