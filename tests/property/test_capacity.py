# SPDX-License-Identifier: Apache-2.0
"""The choice of sizes against a model of the server's rounding, written apart from it in the server's own floats.

`NVMESH_CSI_CAPACITY_EXAMPLES=N` tries N sizes of each layout, and a tenth as many lives with extensions.
"""

from __future__ import annotations

import os
import random
from dataclasses import replace

import pytest

from csi_driver import capacity
from csi_driver.errors import CapacityOutOfRange
from csi_driver.model import CapacityRange
from csi_driver.storage_model import Layout, RaidLevel, Volume
from tests.fakes.management import server_blocks

EXAMPLES = int(os.environ.get("NVMESH_CSI_CAPACITY_EXAMPLES", "3000"))
MIB = 1 << 20
LARGEST = 2**63 - 1
STRIPES = (None, 32, 33, 48, 64, 96, 128, 200, 256, 384, 1000, 1024, 1 << 20)
LAYOUTS = [
    Layout(RaidLevel.CONCATENATED),
    Layout(RaidLevel.MIRRORED, number_of_mirrors=2),
    *(Layout(RaidLevel.STRIPED, stripe_width=3, stripe_size_blocks=stripe) for stripe in STRIPES),
    Layout(RaidLevel.STRIPED_MIRRORED),
    Layout(RaidLevel.STRIPED_MIRRORED, stripe_width=24, stripe_size_blocks=48),
    Layout(RaidLevel.STRIPED_MIRRORED, stripe_width=300, stripe_size_blocks=100),
    Layout(RaidLevel.ERASURE_CODED),
    Layout(RaidLevel.ERASURE_CODED, data_blocks=3, parity_blocks=1, stripe_size_blocks=48),
    Layout(RaidLevel.ERASURE_CODED, data_blocks=10, stripe_size_blocks=1000),
    Layout(RaidLevel.STRIPED_ERASURE_CODED),
    Layout(RaidLevel.STRIPED_ERASURE_CODED, data_blocks=3, stripe_width=3, stripe_size_blocks=33),
    Layout(RaidLevel.STRIPED_ERASURE_CODED, data_blocks=10, stripe_width=5, stripe_size_blocks=1000),
]
"""Every level, and every kind of stripe size: those that divide a set of blocks, are multiples of it, or neither."""


def name_of(layout: Layout) -> str:
    return f"{layout.raid_level}-w{layout.stripe_width}-d{layout.data_blocks}-s{layout.stripe_size_blocks}"


def ranges(seed: str, count: int) -> list[CapacityRange]:
    """Return ranges of all kinds: open, exact, narrow and wide, on and off whole MiB, from nothing to the largest."""
    chance = random.Random(seed)
    result = []
    for _ in range(count):
        size = chance.choice(
            (
                chance.randrange(1 << 34),
                chance.randrange(1 << chance.randrange(30, 56)),
                chance.randrange(1 << 20) * MIB,
            )
        )
        more = chance.choice((None, 0, chance.randrange(64 * MIB), chance.randrange(1 << 34)))
        required = size if chance.random() < 0.9 else 0
        result.append(CapacityRange(required, 0 if more is None else size + more))
    return result


def stripe_bytes(layout: Layout) -> int:
    """Return the data of one whole stripe, or the unit of a layout without stripes; as the server counts it."""
    if layout.raid_level in (RaidLevel.CONCATENATED, RaidLevel.MIRRORED):
        return MIB
    erasure = layout.raid_level in (RaidLevel.ERASURE_CODED, RaidLevel.STRIPED_ERASURE_CODED)
    data = (layout.data_blocks or 8) if erasure else 1
    width = 1 if layout.raid_level is RaidLevel.ERASURE_CODED else (layout.stripe_width or 2)
    stripe = layout.stripe_size_blocks or 32
    if layout.raid_level is RaidLevel.STRIPED_ERASURE_CODED:
        stripe = -(-stripe // (32 * data)) * 32 * data
    return stripe * data * width * 4096


def made_bytes(stripes: int, layout: Layout) -> int:
    """Return the server's size for this number of stripes and a half."""
    one = stripe_bytes(layout)
    return server_blocks((stripes * one + one // 2) / 1e9, layout) * 4096


def sizes_near(low: int, high: int, layout: Layout) -> list[int]:
    """Return all sizes that the server makes around the ends of a range, by asking the model for each."""
    one = stripe_bytes(layout)
    return [
        made_bytes(stripes, layout)
        for end in (low, high)
        for stripes in range(max(1, end // one - 3), end // one + 12)
    ]  # fmt: skip


@pytest.mark.parametrize("layout", LAYOUTS, ids=name_of)
def test_one_request_creates_a_volume_within_the_range_where_possible(layout: Layout) -> None:
    refused = 0
    for asked in ranges(name_of(layout), EXAMPLES):
        least, most = max(asked.required_bytes, 1_000_000_000), asked.limit_bytes or LARGEST
        try:
            size = capacity.size_to_create(asked, layout)
        except CapacityOutOfRange:
            refused += 1
            assert not [size for size in sizes_near(least, min(most, 1 << 56), layout) if least <= size <= most]
            continue
        made = server_blocks(capacity.gigabytes_to_create(size, layout), layout) * 4096
        assert made == size
        assert least <= made <= most
    assert 0 < refused < EXAMPLES


@pytest.mark.parametrize("layout", LAYOUTS, ids=name_of)
def test_a_volume_is_at_most_a_granule_and_a_stripe_larger_than_requested(layout: Layout) -> None:
    for asked in ranges(name_of(layout), EXAMPLES // 10):
        least = max(asked.required_bytes, 1_000_000_000)
        size = capacity.size_to_create(CapacityRange(least), layout)
        assert size - least <= capacity.granule_bytes(layout) + stripe_bytes(layout)


@pytest.mark.parametrize("layout", LAYOUTS, ids=name_of)
def test_one_request_extends_a_volume_into_the_range_where_possible(layout: Layout) -> None:
    for first in ranges(f"extend {name_of(layout)}", EXAMPLES // 10):
        try:
            size = capacity.size_to_create(first, layout)
        except CapacityOutOfRange:
            continue
        gigabytes = capacity.gigabytes_to_create(size, layout)
        volume = Volume("v", "u", server_blocks(gigabytes, layout), 4096, gigabytes, "online", "none", layout=layout)
        for more_asked in ranges(f"{first}", 4):
            asked = CapacityRange(
                size + more_asked.required_bytes, size + more_asked.limit_bytes if more_asked.limit_bytes else 0
            )
            missing, most = asked.required_bytes - volume.size_bytes, (asked.limit_bytes or LARGEST) - volume.size_bytes
            try:
                more = capacity.extension(volume, asked)
            except CapacityOutOfRange:
                possible = sizes_near(max(missing, 1), max(1, min(most, 1 << 56)), layout)
                assert not [size for size in possible if size > 0 and missing <= size <= most]
                continue
            if more is None:
                assert missing <= 0
                continue
            assert (more.capacity_gb - volume.capacity_gb) * 1e9 >= capacity.least_extension_bytes(layout)
            added = server_blocks(more.capacity_gb - volume.capacity_gb, layout)
            assert added >= 256
            volume = replace(volume, blocks=volume.blocks + added, capacity_gb=more.capacity_gb)
            assert volume.size_bytes == more.size_bytes
            assert asked.required_bytes <= volume.size_bytes <= (asked.limit_bytes or LARGEST)
