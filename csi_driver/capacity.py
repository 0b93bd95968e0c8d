"""Sizes of volumes: which are possible, and how to ask for them so that the server's rounding meets them exactly.

The management takes decimal gigabytes as a float and rounds down, per leg of the layout, to whole stripes and then to
whole sets of 256 blocks. Asking for half a granule more than is wanted lands in the middle between two
roundings, so that no error of the float arithmetic matters.

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
    """Return the step in which volumes of this layout grow; every size is a multiple of it."""
    return _legs(layout) * _leg_blocks(layout) * BLOCK_BYTES


def minimum_bytes(layout: Layout) -> int:
    """Return the smallest size that a volume of this layout can have."""
    return _round_up(MINIMUM_BYTES, granule_bytes(layout))


def size_to_create(capacity: CapacityRange, layout: Layout) -> int:
    """Choose the size of a new volume: never below `required_bytes`, never above `limit_bytes`.

    Raises `CapacityOutOfRange` where no possible size lies between the two.
    """
    required, limit = _checked(capacity)
    granule = granule_bytes(layout)
    size = _round_up(max(required or DEFAULT_BYTES, MINIMUM_BYTES), granule)
    if not required and limit and size > limit:
        size = limit // granule * granule
    if size < minimum_bytes(layout) or size > (limit or LARGEST_BYTES):
        raise _out_of_range(capacity, granule, minimum_bytes(layout))
    return size


def gigabytes_to_create(size_bytes: int, layout: Layout) -> float:
    """Return what to ask for so that a volume of exactly `size_bytes` (a multiple of the granule) is made."""
    return (size_bytes + _surplus_bytes(layout)) / GIGABYTE


def extension(volume: Volume, capacity: CapacityRange) -> Extension | None:
    """Work out the extension of a volume; None when it is large enough.

    Always at least one granule: the server does not survive less (it searches space for zero blocks without end).
    Raises `CapacityOutOfRange` where the range excludes the present size and every larger one that is possible.
    """
    required, limit = _checked(capacity)
    size = volume.size_bytes
    if size >= required:
        if limit and size > limit:
            raise CapacityOutOfRange(f"the volume has {size} bytes, wanted at most {limit}; volumes do not shrink")
        return None
    granule = granule_bytes(volume.layout)
    more = _round_up(required - size, granule)
    if size + more > (limit or LARGEST_BYTES):
        raise _out_of_range(capacity, granule, size)
    return Extension(size + more, volume.capacity_gb + (more + _surplus_bytes(volume.layout)) / GIGABYTE)


def with_reserved(capacity: CapacityRange, reserved_bytes: int) -> CapacityRange:
    """Return the range of whole sizes that leaves a range of bytes to the user beside what is reserved."""
    required, limit = capacity.required_bytes, capacity.limit_bytes
    return CapacityRange(required + reserved_bytes if required else 0, limit + reserved_bytes if limit else 0)


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
    granule = granule_bytes(layout)
    return max(0, usable) // granule * granule


def _checked(capacity: CapacityRange) -> tuple[int, int]:
    required, limit = capacity.required_bytes, capacity.limit_bytes
    if required < 0 or limit < 0:
        raise InvalidRequest(f"capacity_range is {required} to {limit} bytes, wanted no negative number")
    if max(required, limit) > LARGEST_BYTES or (limit and required > limit):
        raise CapacityOutOfRange(f"no volume has at least {required} and at most {limit} bytes")
    return required, limit


def _out_of_range(capacity: CapacityRange, granule: int, least: int) -> CapacityOutOfRange:
    return CapacityOutOfRange(
        f"no possible size lies between {capacity.required_bytes} and {capacity.limit_bytes or LARGEST_BYTES} bytes: "
        f"this volume has at least {least} bytes and grows in steps of {granule}"
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
    """Blocks in which a leg is cut; 1 where the layout has no stripes."""
    if layout.raid_level in (RaidLevel.CONCATENATED, RaidLevel.MIRRORED):
        return 1
    stripe = layout.stripe_size_blocks or _DEFAULT_STRIPE_BLOCKS
    if layout.raid_level is RaidLevel.STRIPED_ERASURE_CODED:
        return _round_up(stripe, _DEFAULT_STRIPE_BLOCKS * _data_blocks(layout))
    return stripe


def _leg_blocks(layout: Layout) -> int:
    return math.lcm(_stripe_blocks(layout), _set_blocks(layout))


def _surplus_bytes(layout: Layout) -> int:
    """Half a granule; less where stripes and sets do not divide each other, lest it be rounded up to more sets."""
    stripe, blocks = _stripe_blocks(layout), _set_blocks(layout)
    even = blocks % stripe == 0 or stripe % blocks == 0
    return _legs(layout) * (_leg_blocks(layout) if even else min(stripe, blocks)) * BLOCK_BYTES // 2
