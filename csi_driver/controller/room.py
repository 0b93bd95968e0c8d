"""Free capacity of a zone for volumes of one kind (an upper bound: only an allocation shows what fits)."""

from __future__ import annotations

from dataclasses import dataclass

from csi_driver import capacity as sizes
from csi_driver.controller.ports import Management
from csi_driver.deadline import Deadline
from csi_driver.errors import InvalidRequest
from csi_driver.parameters.storage_class import VolumeParameters
from csi_driver.storage_model import AllowedDrives, Layout, RaidLevel, Vpg

_WITH_DOMAINS = (
    RaidLevel.MIRRORED,
    RaidLevel.STRIPED_MIRRORED,
    RaidLevel.ERASURE_CODED,
    RaidLevel.STRIPED_ERASURE_CODED,
)
"""The management drops the domain of a volume that keeps no redundancy."""


@dataclass(frozen=True, slots=True)
class Room:
    """What a zone has for volumes of one kind. `refusal`: why it refuses every such volume, whatever is free."""

    free_bytes: int
    minimum_bytes: int | None = None
    refusal: str = ""


def room(management: Management, read: VolumeParameters, *, deadline: Deadline) -> Room:
    """Return the usable bytes for volumes of this kind, and the size of the smallest. At most five requests.

    A provisioning group has the space that it reserved and, where it may overflow, that of its drives. What redundancy
    and encryption take is subtracted, and the rest is rounded down to a possible size.
    """
    layout, header, reserved, overflows = read.layout, read.encryption.header_bytes, 0, True
    group: Vpg | None = None
    if layout is None:
        name = read.vpg or ""
        group = management.vpg(name, deadline=deadline)
        if group is None:
            return Room(0, refusal=f"volume provisioning group {name} does not exist")
        if group.is_for_metadata:
            return Room(0, refusal=f"volume provisioning group {name} is for the metadata of snapshots")
        try:
            header = read.encryption.in_group(group).header_bytes
        except InvalidRequest as problem:
            return Room(0, refusal=str(problem))
        layout, overflows = group.layout, group.allow_overflow
        if not overflows or group.capacity_bytes:
            reserved = management.vpg_free_bytes(name, deadline=deadline)
    raw: int | None = 0
    if overflows:
        raw = management.raw_free_bytes(allowed_drives(read, group, layout), deadline=deadline)
    if raw is None:
        return Room(0, refusal="the classes, limitBy... or domain of the parameters do not exist")
    free = sizes.largest_size(reserved + sizes.usable_bytes(raw, layout), layout)
    least = sizes.minimum_bytes(layout)
    return Room(max(0, free - header) if free >= least else 0, least - header)


def allowed_drives(read: VolumeParameters, group: Vpg | None, layout: Layout) -> AllowedDrives:
    """Return the drives on which the management may allocate a volume of this kind."""
    source = read if group is None else group
    erasure_coded = layout.raid_level in (RaidLevel.ERASURE_CODED, RaidLevel.STRIPED_ERASURE_CODED)
    return AllowedDrives(
        drive_classes=source.drive_classes,
        target_classes=source.target_classes,
        drives=read.limit_by_drives,
        targets=read.limit_by_targets,
        domain=source.domain if layout.raid_level in _WITH_DOMAINS else None,
        with_metadata=erasure_coded or layout.enable_crc_check is True,
        with_offline=read.allow_offline_drives is True,
    )
