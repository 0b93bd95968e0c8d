"""How much more fits into a zone: an upper bound, as only allocating tells."""

from __future__ import annotations

from csi_driver import capacity as sizes
from csi_driver.controller.ports import Management
from csi_driver.deadline import Deadline
from csi_driver.errors import InvalidRequest
from csi_driver.parameters.storage_class import VolumeParameters
from csi_driver.storage_model import Layout


def room(management: Management, read: VolumeParameters, *, deadline: Deadline) -> tuple[int, int | None]:
    """Return the usable bytes for volumes of this kind, and the size of the smallest; 0 where the group is missing.

    A provisioning group that may not overflow has the space that it reserved; any other takes from the drives, and
    what redundancy takes is taken off. So is what encryption takes of a volume.
    """
    layout, header = read.layout, read.encryption.header_bytes
    if layout is None:
        name = read.vpg or ""
        vpg = management.vpg(name, deadline=deadline)
        if vpg is None:
            return 0, None
        layout = vpg.layout
        try:
            header = read.encryption.in_group(vpg).header_bytes
        except InvalidRequest:
            return 0, None  # no volume of this kind can ever be made here
        reserved = management.vpg_free_bytes(name, deadline=deadline)
        if reserved is not None:
            return _usable(sizes.largest_size(reserved, layout), layout, header)
    raw = management.raw_free_bytes(vpg=read.vpg, deadline=deadline)
    return _usable(sizes.usable_bytes(raw, layout), layout, header)


def _usable(free_bytes: int, layout: Layout, header_bytes: int) -> tuple[int, int]:
    """Return what of `free_bytes` volumes can have: nothing where not even the smallest fits, and its size."""
    least = sizes.minimum_bytes(layout)
    return (free_bytes if free_bytes >= least else header_bytes) - header_bytes, least - header_bytes
