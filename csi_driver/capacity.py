# SPDX-License-Identifier: Apache-2.0
"""Possible sizes of volumes, and the capacity to request for a volume of exactly one size. Pure.

The management takes decimal gigabytes as a float, divides them into whole stripes, multiplies these back into blocks,
and rounds each leg down to whole sets of 256 blocks. The product is often one block less than the stripes have, which
loses a whole set. `_leg_blocks` repeats this arithmetic (createRAID0, utils.js, github.com/NVIDIA/nvmesh-management). A
request is half a stripe above the desired number of stripes, so that no float error changes that number.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from csi_driver.errors import CapacityOutOfRange
from csi_driver.model import CapacityRange
from csi_driver.storage_model import Layout, RaidLevel, Volume

BLOCK_BYTES = 4096
BLOCKS_PER_SET = 256
GIGABYTE = 1_000_000_000
MINIMUM_BYTES = GIGABYTE
"""Smallest volume of the management."""
DEFAULT_BYTES = 5 * GIGABYTE
"""Size of a volume without a capacity range, as with the drivers 1.4 and 1.9."""
LARGEST_BYTES = 2**63 - 1
"""CSI carries sizes as int64."""

_DEFAULT_STRIPE_BLOCKS = 32
_DEFAULT_DATA_BLOCKS = 8
_DEFAULT_PARITY_BLOCKS = 2
_STRIPED = (RaidLevel.STRIPED, RaidLevel.STRIPED_MIRRORED, RaidLevel.STRIPED_ERASURE_CODED)
_ERASURE_CODED = (RaidLevel.ERASURE_CODED, RaidLevel.STRIPED_ERASURE_CODED)
_MIRRORED = (RaidLevel.MIRRORED, RaidLevel.STRIPED_MIRRORED)


@dataclass(frozen=True, slots=True)
class Extension:
    """An extension: the volume's size afterwards, and the total capacity to request."""

    size_bytes: int
    capacity_gb: float


def granule_bytes(layout: Layout) -> int:
    """Return the step between sizes with whole stripes and whole sets of blocks on each leg."""
    return _legs(layout) * math.lcm(_stripe_blocks(layout), _set_blocks(layout)) * BLOCK_BYTES


def least_extension_bytes(layout: Layout) -> int:
    """Return the smallest extension; below it the server searches endlessly for space of zero blocks."""
    return _legs(layout) * max(_stripe_blocks(layout), _set_blocks(layout)) * BLOCK_BYTES


def minimum_bytes(layout: Layout) -> int:
    return _size_of(_stripes_for(MINIMUM_BYTES, layout), layout)


def size_to_create(capacity: CapacityRange, layout: Layout, reserved_bytes: int = 0) -> int:
    """Return the size of a new volume, `reserved_bytes` (a LUKS header) included. Raises `CapacityOutOfRange`."""
    required, limit = capacity.required_bytes, capacity.limit_bytes
    most = limit + reserved_bytes if limit else LARGEST_BYTES
    granule = granule_bytes(layout)
    wanted = (
        [required + reserved_bytes]
        if required
        else [DEFAULT_BYTES + reserved_bytes, most // granule * granule, largest_size(most, layout)]
    )
    for least in wanted:
        stripes = _stripes_between(max(least, MINIMUM_BYTES), most, layout)
        if stripes is not None:
            return _size_of(stripes, layout)
    least = max(required + reserved_bytes, MINIMUM_BYTES)
    below = largest_size(least - 1, layout)
    above = _size_of(_stripes_for(least, layout), layout)
    raise _out_of_range(capacity, below - reserved_bytes if below >= MINIMUM_BYTES else 0, above - reserved_bytes)


def gigabytes_to_create(size_bytes: int, layout: Layout) -> float:
    """Return the capacity to request for a volume of exactly `size_bytes`, a size from `size_to_create`."""
    return _gigabytes(_stripes_for(size_bytes, layout), layout)


def extension(volume: Volume, capacity: CapacityRange, reserved_bytes: int = 0) -> Extension | None:
    """Return the extension of a volume; None where it is large enough. Raises `CapacityOutOfRange`."""
    required, limit = capacity.required_bytes, capacity.limit_bytes
    size = volume.size_bytes
    if size - reserved_bytes >= required:
        if limit and size - reserved_bytes > limit:
            raise CapacityOutOfRange(
                f"size: expected at most {limit} bytes, got {size - reserved_bytes}; volumes cannot shrink"
            )
        return None
    most = limit + reserved_bytes if limit else LARGEST_BYTES
    stripes = _stripes_between(required + reserved_bytes - size, most - size, volume.layout)
    if stripes is None:
        missing = required + reserved_bytes - size
        below = size - reserved_bytes + largest_size(missing - 1, volume.layout)
        above = size - reserved_bytes + _size_of(_stripes_for(missing, volume.layout), volume.layout)
        raise _out_of_range(capacity, below, above)
    more = _size_of(stripes, volume.layout)
    return Extension(size + more, volume.capacity_gb + _gigabytes(stripes, volume.layout))


def largest_size(most_bytes: int, layout: Layout) -> int:
    """Return the largest possible size of at most `most_bytes`; 0 where there is none."""
    stripes = most_bytes // (_legs(layout) * _stripe_blocks(layout) * BLOCK_BYTES) + 1
    while stripes > 0 and _size_of(stripes, layout) > most_bytes:
        stripes -= 1
    return _size_of(stripes, layout)


def stripes_of(layout: Layout) -> tuple[int, int]:
    """Return the bytes of a stripe on one drive, and of its data on all drives; (0, 0) without stripes."""
    if layout.raid_level in (RaidLevel.CONCATENATED, RaidLevel.MIRRORED):
        return 0, 0
    unit = (layout.stripe_size_blocks or _DEFAULT_STRIPE_BLOCKS) * BLOCK_BYTES
    return unit, unit * _legs(layout)


def usable_bytes(raw_bytes: int, layout: Layout) -> int:
    """Return an upper bound for the size of a volume on `raw_bytes` of free space."""
    if layout.raid_level in _MIRRORED:
        copies = 1 + (1 if layout.number_of_mirrors is None else layout.number_of_mirrors)
        usable = raw_bytes // copies
    elif layout.raid_level in _ERASURE_CODED:
        data = layout.data_blocks or _DEFAULT_DATA_BLOCKS
        parity = _DEFAULT_PARITY_BLOCKS if layout.parity_blocks is None else layout.parity_blocks
        usable = raw_bytes * data // (data + parity)
    else:
        usable = raw_bytes
    return largest_size(max(0, usable), layout)


def _out_of_range(capacity: CapacityRange, below: int, above: int) -> CapacityOutOfRange:
    """Return the error that names the nearest possible sizes; `below` 0 = none."""
    largest = f"the largest possible size below is {below} bytes" if below > 0 else "no smaller size is possible"
    smallest = f"the smallest above is {above} bytes" if above <= LARGEST_BYTES else "no larger size is possible"
    return CapacityOutOfRange(
        f"capacity_range: no volume of this layout has a size of {capacity.required_bytes} to "
        f"{capacity.limit_bytes or LARGEST_BYTES} bytes; {largest}, {smallest}; request such a size"
    )


def _round_up(size: int, step: int) -> int:
    return -(-size // step) * step


def _data_blocks(layout: Layout) -> int:
    return (layout.data_blocks or _DEFAULT_DATA_BLOCKS) if layout.raid_level in _ERASURE_CODED else 1


def _legs(layout: Layout) -> int:
    width = (layout.stripe_width or 2) if layout.raid_level in _STRIPED else 1
    return width * _data_blocks(layout)


def _set_blocks(layout: Layout) -> int:
    wide = layout.raid_level is RaidLevel.STRIPED_ERASURE_CODED
    return BLOCKS_PER_SET * (_data_blocks(layout) if wide else 1)


def _stripe_blocks(layout: Layout) -> int:
    if layout.raid_level in (RaidLevel.CONCATENATED, RaidLevel.MIRRORED):
        return BLOCKS_PER_SET
    stripe = layout.stripe_size_blocks or _DEFAULT_STRIPE_BLOCKS
    if layout.raid_level is RaidLevel.STRIPED_ERASURE_CODED:
        return _round_up(stripe, _DEFAULT_STRIPE_BLOCKS * _data_blocks(layout))
    return stripe


def _leg_blocks(stripes: int, layout: Layout) -> int:
    """Return the blocks of each leg for this number of stripes, by the server's float arithmetic."""
    stripe, per_set = _stripe_blocks(layout), _set_blocks(layout)
    if layout.raid_level in (RaidLevel.CONCATENATED, RaidLevel.MIRRORED):
        return stripes * stripe
    blocks = math.floor(stripe * BLOCK_BYTES / GIGABYTE * stripes / (BLOCK_BYTES / GIGABYTE))
    return blocks - blocks % per_set


def _size_of(stripes: int, layout: Layout) -> int:
    return _legs(layout) * _leg_blocks(stripes, layout) * BLOCK_BYTES


def _gigabytes(stripes: int, layout: Layout) -> float:
    stripe_bytes = _legs(layout) * _stripe_blocks(layout) * BLOCK_BYTES
    return (stripes * stripe_bytes + stripe_bytes // 2) / GIGABYTE


def _stripes_for(least_bytes: int, layout: Layout) -> int:
    stripes = -(-least_bytes // (_legs(layout) * _stripe_blocks(layout) * BLOCK_BYTES))
    while _size_of(stripes, layout) < least_bytes:
        stripes += 1
    return stripes


def _stripes_between(least_bytes: int, most_bytes: int, layout: Layout) -> int | None:
    """Return a number of stripes for a size in this range, best a multiple of the granule: no rest on the legs."""
    for least in (_round_up(least_bytes, granule_bytes(layout)), least_bytes):
        stripes = _stripes_for(least, layout)
        size = _size_of(stripes, layout)
        if size <= most_bytes and (size == least or least == least_bytes):
            return stripes
    return None
