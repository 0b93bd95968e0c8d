# SPDX-License-Identifier: Apache-2.0
"""Sizes at the edges; the rule itself is proven in tests/property/test_capacity.py."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from csi_driver import capacity
from csi_driver.embedded import layouts as embedded
from csi_driver.errors import CapacityOutOfRange
from csi_driver.model import GIB, MIB, CapacityRange
from csi_driver.storage_model import Layout, RaidLevel, Volume
from tests.fakes.management import server_blocks

PLAIN = Layout()
RAID_10 = Layout(RaidLevel.STRIPED_MIRRORED, stripe_width=2)
EC = Layout(RaidLevel.ERASURE_CODED, data_blocks=8, parity_blocks=2)
STRIPED_EC = Layout(RaidLevel.STRIPED_ERASURE_CODED, data_blocks=8, parity_blocks=2, stripe_width=2)


RECORDED = json.loads((Path(__file__).parents[1] / "recordings" / "sizes.json").read_text())
"""Volumes that the server of NVMesh 3.5 made: layout, requested GB, resulting blocks; `had`: before an extension."""


def layout_of(row: dict[str, Any]) -> Layout:
    numbers = {key: row[key] for key in ("width", "stripe", "data", "parity", "mirrors")}
    width, stripe, data, parity, mirrors = (value if isinstance(value, int) else None for value in numbers.values())
    return Layout(RaidLevel(str(row["level"])), width, stripe, data, parity, mirrors)


def volume_of(size_bytes: int, layout: Layout = PLAIN, capacity_gb: float | None = None) -> Volume:
    gb = capacity_gb if capacity_gb is not None else size_bytes / 1e9
    return Volume("v", "u", size_bytes // 4096, 4096, gb, "online", "none", layout=layout)


@pytest.mark.parametrize(
    ("layout", "granule"),
    [
        (PLAIN, MIB),
        (Layout(RaidLevel.MIRRORED), MIB),
        (Layout(RaidLevel.STRIPED, stripe_width=3), 3 * MIB),
        (Layout(RaidLevel.STRIPED), 2 * MIB),
        (RAID_10, 2 * MIB),
        (EC, 8 * MIB),
        (STRIPED_EC, 128 * MIB),
        (Layout(RaidLevel.STRIPED, stripe_width=2, stripe_size_blocks=1024), 8 * MIB),
        (Layout(RaidLevel.STRIPED, stripe_width=2, stripe_size_blocks=384), 6 * MIB),
    ],
)
def test_granule_follows_the_layout(layout: Layout, granule: int) -> None:
    assert capacity.granule_bytes(layout) == granule


def test_without_a_range_the_size_is_five_gigabytes_rounded_up() -> None:
    assert capacity.size_to_create(CapacityRange(), PLAIN) == -(-5_000_000_000 // MIB) * MIB


def test_only_a_low_limit_gives_the_largest_size_below_it() -> None:
    assert capacity.size_to_create(CapacityRange(0, 2_000_000_000), PLAIN) == 2_000_000_000 // MIB * MIB


def test_less_than_a_gigabyte_is_rounded_up_to_it() -> None:
    assert capacity.size_to_create(CapacityRange(1), PLAIN) == 954 * MIB


def test_an_exact_size_on_the_granule_is_met() -> None:
    assert capacity.size_to_create(CapacityRange(10 * GIB, 10 * GIB), RAID_10) == 10 * GIB


@pytest.mark.parametrize(
    "asked",
    [
        CapacityRange(10 * GIB + 1, 10 * GIB + 2),
        CapacityRange(0, 999_999_999),
        CapacityRange(1, 1_000_000_000),
        CapacityRange(2 * GIB, GIB),
        CapacityRange(2**63, 0),
        CapacityRange(2**63 - 1, 0),
    ],
)
def test_a_range_without_a_possible_size_is_out_of_range(asked: CapacityRange) -> None:
    with pytest.raises(CapacityOutOfRange):
        capacity.size_to_create(asked, PLAIN)


def test_a_volume_that_is_large_enough_is_not_extended() -> None:
    assert capacity.extension(volume_of(2 * GIB), CapacityRange(2 * GIB)) is None


def test_a_volume_above_the_limit_is_out_of_range() -> None:
    with pytest.raises(CapacityOutOfRange, match="cannot shrink"):
        capacity.extension(volume_of(2 * GIB), CapacityRange(GIB, GIB))


def test_one_byte_more_extends_by_a_whole_granule() -> None:
    more = capacity.extension(volume_of(2 * GIB, EC), CapacityRange(2 * GIB + 1))
    assert more is not None
    assert more.size_bytes == 2 * GIB + 8 * MIB


def test_a_volume_off_the_granule_is_still_extended_by_whole_granules() -> None:
    tail = 8192
    more = capacity.extension(volume_of(2 * GIB + tail, RAID_10), CapacityRange(2 * GIB + 2 * MIB))
    assert more is not None
    assert more.size_bytes == 2 * GIB + tail + 2 * MIB


@pytest.mark.parametrize(
    ("layout", "usable"),
    [
        (PLAIN, 90 * GIB),
        (Layout(RaidLevel.MIRRORED), 45 * GIB),
        (Layout(RaidLevel.MIRRORED, number_of_mirrors=2), 30 * GIB),
        (EC, 72 * GIB),
        (Layout(RaidLevel.ERASURE_CODED, data_blocks=2, parity_blocks=1), 60 * GIB),
    ],
)
def test_redundancy_reduces_the_usable_space(layout: Layout, usable: int) -> None:
    assert capacity.usable_bytes(90 * GIB, layout) == usable


def test_overcommitted_space_is_no_space() -> None:
    assert capacity.usable_bytes(-GIB, PLAIN) == 0


@pytest.mark.parametrize("row", RECORDED, ids=lambda row: f"{row['level']}-{row['stripe']}-{row['capacity']}")
def test_fake_and_embedded_manager_round_like_the_recorded_server(row: dict[str, Any]) -> None:
    layout = layout_of(row)
    same = embedded.Layout(
        str(row["level"]),
        layout.stripe_size_blocks or 32,
        layout.stripe_width or 1,
        data_blocks=layout.data_blocks or 1,
    )
    had_gb, had_blocks = row["had"] or (0, 0)
    more_gb = row["capacity"] - had_gb
    assert had_blocks + server_blocks(more_gb, layout) == row["blocks"]
    assert had_blocks + same.blocks_of(more_gb) == row["blocks"]


@pytest.mark.parametrize("row", RECORDED, ids=lambda row: f"{row['level']}-{row['stripe']}-{row['capacity']}")
def test_every_recorded_size_is_possible(row: dict[str, Any]) -> None:
    layout, size = layout_of(row), row["blocks"] * 4096
    if size < 1_000_000_000:
        return  # what exactly 1 GB is rounded down to; the driver makes no use of it
    if row["had"] is None:
        assert capacity.size_to_create(CapacityRange(size, size), layout) == size
    else:
        had_gb, had_blocks = row["had"]
        before = volume_of(had_blocks * 4096, layout, had_gb)
        more = capacity.extension(before, CapacityRange(size, size))
        assert more is not None
        assert more.size_bytes == size


def test_the_recorded_short_volume_is_requested_with_one_more_stripe() -> None:
    layout = Layout(RaidLevel.STRIPED, stripe_width=3, stripe_size_blocks=48)
    asked = CapacityRange(10739515392, 10739515392)
    assert server_blocks(10.739810304, layout) * 4096 == 10736369664
    assert capacity.size_to_create(asked, layout) == 10739515392
    assert server_blocks(capacity.gigabytes_to_create(10739515392, layout), layout) * 4096 == 10739515392


def test_the_message_names_the_possible_sizes_on_both_sides() -> None:
    with pytest.raises(CapacityOutOfRange, match=r"largest possible size below is 10737418240 bytes, .* 10738466816"):
        capacity.size_to_create(CapacityRange(10 * GIB + 1, 10 * GIB + 2), PLAIN)


def test_a_range_of_exactly_one_gigabyte_names_the_smallest_possible_size() -> None:
    with pytest.raises(CapacityOutOfRange, match="no smaller size is possible, the smallest above is 1000341504 bytes"):
        capacity.size_to_create(CapacityRange(1_000_000_000, 1_000_000_000), PLAIN)


def test_named_sizes_exclude_the_header() -> None:
    with pytest.raises(CapacityOutOfRange, match="below is 10720641024 bytes, the smallest above is 10721689600"):
        capacity.size_to_create(CapacityRange(10 * GIB - 16 * MIB + 1, 10 * GIB - 16 * MIB + 2), PLAIN, 16 * MIB)


def test_an_extension_out_of_range_names_the_sizes_on_both_sides() -> None:
    with pytest.raises(CapacityOutOfRange, match="below is 2155872256 bytes, the smallest above is 2164260864"):
        capacity.extension(volume_of(2 * GIB, EC), CapacityRange(2 * GIB + 8 * MIB + 1, 2 * GIB + 9 * MIB))
