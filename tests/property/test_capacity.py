"""The capacity rule against a model of the server's rounding, written apart from it in the server's own floats.

`NVMESH_CSI_CAPACITY_EXAMPLES=N` tries N creations, and a fifth as many lives with extensions.
"""

from __future__ import annotations

import os
from dataclasses import replace

from hypothesis import assume, given, settings
from hypothesis import strategies as st

from csi_driver import capacity
from csi_driver.errors import CapacityOutOfRange
from csi_driver.model import CapacityRange
from csi_driver.storage_model import Layout, RaidLevel, Volume
from tests.fakes.management import server_blocks

EXAMPLES = int(os.environ.get("NVMESH_CSI_CAPACITY_EXAMPLES", "1500"))
MIB = 1 << 20
STRIPES = st.sampled_from([None, 32, 33, 48, 64, 100, 128, 200, 256, 300, 384, 512, 1024])
WIDTHS = st.integers(2, 24)
LAYOUTS = st.one_of(
    st.just(Layout(RaidLevel.CONCATENATED)),
    st.builds(Layout, st.just(RaidLevel.MIRRORED), number_of_mirrors=st.sampled_from([None, 1, 2])),
    st.builds(
        Layout,
        st.sampled_from([RaidLevel.STRIPED, RaidLevel.STRIPED_MIRRORED]),
        stripe_width=st.none() | WIDTHS,
        stripe_size_blocks=STRIPES,
    ),
    st.builds(
        Layout,
        st.just(RaidLevel.ERASURE_CODED),
        data_blocks=st.none() | st.integers(1, 10),
        parity_blocks=st.sampled_from([None, 1, 2]),
        stripe_size_blocks=STRIPES,
    ),
    st.builds(
        Layout,
        st.just(RaidLevel.STRIPED_ERASURE_CODED),
        stripe_width=st.none() | WIDTHS,
        data_blocks=st.none() | st.integers(1, 10),
        stripe_size_blocks=STRIPES,
    ),
)
SIZES = st.one_of(
    st.integers(0, 1 << 36),
    st.integers(0, 1 << 55),
    st.builds(lambda mib, off: max(0, mib * MIB + off), st.integers(0, 1 << 24), st.integers(-2, 2)),
)
RANGES = st.one_of(
    st.builds(CapacityRange, SIZES),
    st.builds(lambda low, more: CapacityRange(low, low + more), SIZES, SIZES),
    st.builds(lambda size: CapacityRange(size, size), SIZES),
    st.builds(lambda low, more: CapacityRange(low, low + more), SIZES, st.integers(0, 256 * MIB)),
)


def possible_sizes_between(low: int, high: int, layout: Layout) -> bool:
    """Say, in the plainest way, whether a multiple of the granule and of at least 1 GB lies in the range."""
    granule = capacity.granule_bytes(layout)
    low = max(low, 1_000_000_000)
    return (high // granule) * granule >= low


@settings(max_examples=EXAMPLES, deadline=None)
@given(layout=LAYOUTS, asked=RANGES)
def test_a_created_volume_is_never_short_and_never_over_the_limit(layout: Layout, asked: CapacityRange) -> None:
    limit = asked.limit_bytes or 2**63 - 1
    try:
        size = capacity.size_to_create(asked, layout)
    except CapacityOutOfRange:
        assert not possible_sizes_between(asked.required_bytes, limit, layout)
        return
    made = server_blocks(capacity.gigabytes_to_create(size, layout), layout) * 4096
    assert made == size
    assert asked.required_bytes <= made <= limit
    assert made - capacity.granule_bytes(layout) < max(asked.required_bytes or 5_000_000_000, 1_000_000_000)


@settings(max_examples=EXAMPLES // 5, deadline=None)
@given(layout=LAYOUTS, first=RANGES, steps=st.lists(RANGES, min_size=1, max_size=4))
def test_an_extended_volume_is_never_short_nor_over_nor_grown_by_less_than_a_granule(
    layout: Layout, first: CapacityRange, steps: list[CapacityRange]
) -> None:
    try:
        size = capacity.size_to_create(first, layout)
    except CapacityOutOfRange:
        assume(False)
        raise
    gigabytes = capacity.gigabytes_to_create(size, layout)
    volume = Volume("v", "u", server_blocks(gigabytes, layout), 4096, gigabytes, "online", "none", layout=layout)
    for asked in steps:
        try:
            more = capacity.extension(volume, asked)
        except CapacityOutOfRange:
            continue
        if more is None:
            assert volume.size_bytes >= asked.required_bytes
            continue
        added = server_blocks(more.capacity_gb - volume.capacity_gb, layout)
        assert added * 4096 >= capacity.granule_bytes(layout)
        volume = replace(volume, blocks=volume.blocks + added, capacity_gb=more.capacity_gb)
        assert volume.size_bytes == more.size_bytes
        assert asked.required_bytes <= volume.size_bytes <= (asked.limit_bytes or 2**63 - 1)
