"""Sizes of volumes: which sizes are possible, and which request makes the server give exactly that size.

The management takes decimal gigabytes as a float. For striped layouts it divides them into whole stripes, multiplies
the stripes back into blocks, both in floats, and rounds down to whole sets of 256 blocks on each leg. The product is
often one block less than the stripes have, and the whole set is lost with it. `_leg_blocks` repeats this arithmetic
(createRAID0 in utils.js of github.com/NVIDIA/nvmesh-management), so the size is known before anything is sent. Requests
lie half a stripe above the wanted number of stripes: no float error changes that number.

Pure arithmetic on bytes; nothing here knows the API.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from csi_driver.errors import CapacityOutOfRange, InvalidRequest
from csi_driver.model import CapacityRange
from csi_driver.storage_model import Layout, RaidLevel, Volume

BLOCK_BYTES = 4096
BLOCKS_PER_SET = 256
GIGABYTE = 1_000_000_000
MINIMUM_BYTES = GIGABYTE
"""The management makes nothing smaller."""
DEFAULT_BYTES = 5 * GIGABYTE
"""Size of a volume for which nothing was asked; what earlier drivers of this name gave."""
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
    """A larger volume: its size afterwards, and the total that must be asked for."""

    size_bytes: int
    capacity_gb: float


def granule_bytes(layout: Layout) -> int:
    """Return the step of the sizes that have whole stripes and whole sets of blocks on each leg."""
    return _legs(layout) * math.lcm(_stripe_blocks(layout), _set_blocks(layout)) * BLOCK_BYTES


def least_extension_bytes(layout: Layout) -> int:
    """Return the least that may be sent as an extension; the server searches forever for space of zero blocks."""
    return _legs(layout) * max(_stripe_blocks(layout), _set_blocks(layout)) * BLOCK_BYTES


def minimum_bytes(layout: Layout) -> int:
    """Return the smallest size that a volume of this layout can have."""
    return _size_of(_stripes_for(MINIMUM_BYTES, layout), layout)


def size_to_create(capacity: CapacityRange, layout: Layout, reserved_bytes: int = 0) -> int:
    """Choose the size of a new volume: never below `required_bytes`, never above `limit_bytes`.

    `reserved_bytes` of the size are not the user's (a header of encryption); the range is what the user gets.
    Raises `CapacityOutOfRange` where no possible size lies in the range.
    """
    required, limit = _checked(capacity)
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
    """Return what to ask for so that a volume of exactly `size_bytes` (a size from `size_to_create`) is made."""
    return _gigabytes(_stripes_for(size_bytes, layout), layout)


def extension(volume: Volume, capacity: CapacityRange, reserved_bytes: int = 0) -> Extension | None:
    """Work out the extension of a volume; None when it is large enough.

    The server rounds what it adds separately, by the same arithmetic. The result is always at least one set of blocks
    for each leg: the server does not survive less (it searches for space of zero blocks without end).
    Raises `CapacityOutOfRange` where the range excludes the present size and every larger one that is possible.
    """
    required, limit = _checked(capacity)
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
    """Return the largest size of at most so many bytes that the server can make; 0 where there is none."""
    stripes = most_bytes // (_legs(layout) * _stripe_blocks(layout) * BLOCK_BYTES) + 1
    while stripes > 0 and _size_of(stripes, layout) > most_bytes:
        stripes -= 1
    return _size_of(stripes, layout)


def stripes_of(layout: Layout) -> tuple[int, int]:
    """Return what lies on one drive before the next one's turn, and the data of a whole stripe; (0, 0) = no stripes."""
    if layout.raid_level in (RaidLevel.CONCATENATED, RaidLevel.MIRRORED):
        return 0, 0
    unit = (layout.stripe_size_blocks or _DEFAULT_STRIPE_BLOCKS) * BLOCK_BYTES
    return unit, unit * _legs(layout)


def usable_bytes(raw_bytes: int, layout: Layout) -> int:
    """Return how much a volume of this layout can hold on so much raw space; an upper bound."""
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


def _checked(capacity: CapacityRange) -> tuple[int, int]:
    required, limit = capacity.required_bytes, capacity.limit_bytes
    if required < 0 or limit < 0:
        raise InvalidRequest(f"capacity_range: expected no negative number, got {required} to {limit} bytes")
    if max(required, limit) > LARGEST_BYTES or (limit and required > limit):
        raise CapacityOutOfRange(
            f"capacity_range: expected at least 0 and at most {LARGEST_BYTES} bytes, with the minimum below the limit, "
            f"got {required} to {limit} bytes"
        )
    return required, limit


def _out_of_range(capacity: CapacityRange, below: int, above: int) -> CapacityOutOfRange:
    """Return the failure that names the possible sizes on both sides of the range; 0 below = none."""
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
    """Blocks in which a leg is cut; where the layout has no stripes, the set to which it is rounded."""
    if layout.raid_level in (RaidLevel.CONCATENATED, RaidLevel.MIRRORED):
        return BLOCKS_PER_SET
    stripe = layout.stripe_size_blocks or _DEFAULT_STRIPE_BLOCKS
    if layout.raid_level is RaidLevel.STRIPED_ERASURE_CODED:
        return _round_up(stripe, _DEFAULT_STRIPE_BLOCKS * _data_blocks(layout))
    return stripe


def _leg_blocks(stripes: int, layout: Layout) -> int:
    """Return the blocks that the server gives each leg for so many stripes, by its float arithmetic."""
    stripe, per_set = _stripe_blocks(layout), _set_blocks(layout)
    if layout.raid_level in (RaidLevel.CONCATENATED, RaidLevel.MIRRORED):
        return stripes * stripe
    blocks = math.floor(stripe * BLOCK_BYTES / GIGABYTE * stripes / (BLOCK_BYTES / GIGABYTE))
    return blocks - blocks % per_set


def _size_of(stripes: int, layout: Layout) -> int:
    return _legs(layout) * _leg_blocks(stripes, layout) * BLOCK_BYTES


def _gigabytes(stripes: int, layout: Layout) -> float:
    """Return the capacity in the middle between so many stripes and one more."""
    stripe_bytes = _legs(layout) * _stripe_blocks(layout) * BLOCK_BYTES
    return (stripes * stripe_bytes + stripe_bytes // 2) / GIGABYTE


def _stripes_for(least_bytes: int, layout: Layout) -> int:
    """Return the lowest number of stripes for which the server gives at least so many bytes."""
    stripes = -(-least_bytes // (_legs(layout) * _stripe_blocks(layout) * BLOCK_BYTES))
    while _size_of(stripes, layout) < least_bytes:
        stripes += 1
    return stripes


def _stripes_between(least_bytes: int, most_bytes: int, layout: Layout) -> int | None:
    """Return a number of stripes for which the server gives a size in this range; None where there is none.

    The nearest multiple of the granule is preferred: sizes between two granules leave a part of a stripe at the end of
    each leg. Where the server does not make that one, or it exceeds the range, the next size is taken that it makes.
    """
    for least in (_round_up(least_bytes, granule_bytes(layout)), least_bytes):
        stripes = _stripes_for(least, layout)
        size = _size_of(stripes, layout)
        if size <= most_bytes and (size == least or least == least_bytes):
            return stripes
    return None
