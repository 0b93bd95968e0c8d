# SPDX-License-Identifier: Apache-2.0
"""RAID levels and the arithmetic of sizes, as the management server does it.

Sizes come in as decimal gigabytes (a float) and leave as 4 KiB blocks, rounded down to whole granules. The order of
the floating-point operations is the server's: another order gives another block count for some sizes. Pure.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

BLOCK_SIZE = 4096
BLOCK_SET = 256
"""Blocks of one MiB: what every leg of a layout is rounded down to."""
GIGABYTE = 1_000_000_000
_BLOCK_GB = BLOCK_SIZE / GIGABYTE

CONCATENATED = "Concatenated"
RAID_0 = "Striped RAID-0"
RAID_1 = "Mirrored RAID-1"
RAID_10 = "Striped & Mirrored RAID-10"
EC = "Erasure Coding"
STRIPED_EC = "Striped Erasure Coding"
LEVELS = (CONCATENATED, RAID_0, RAID_1, RAID_10, EC, STRIPED_EC)

FULL_SEPARATION = "Full Separation"
MINIMAL_SEPARATION = "Minimal Separation"
IGNORE_SEPARATION = "Ignore Separation"

PARAMETERS: dict[str, tuple[str, ...]] = {
    CONCATENATED: (),
    RAID_0: ("stripeSize", "stripeWidth"),
    RAID_1: ("numberOfMirrors", "protectionLevel", "enableCrcCheck"),
    RAID_10: ("stripeSize", "stripeWidth", "numberOfMirrors", "protectionLevel", "enableCrcCheck"),
    EC: ("dataBlocks", "parityBlocks", "stripeSize", "stripeWidth", "protectionLevel", "enableCrcCheck"),
    STRIPED_EC: ("dataBlocks", "parityBlocks", "stripeSize", "stripeWidth", "protectionLevel", "enableCrcCheck"),
}
"""Layout parameters that each level takes; any other is a schema error."""


@dataclass(frozen=True, slots=True)
class Layout:
    """A RAID level with all its parameters filled in."""

    level: str = CONCATENATED
    stripe_size: int = 32
    """Blocks."""
    stripe_width: int = 1
    mirrors: int = 0
    data_blocks: int = 1
    parity_blocks: int = 0
    protection: str | None = None
    crc: bool | None = None

    @property
    def striped(self) -> bool:
        return self.level not in (CONCATENATED, RAID_1)

    @property
    def legs(self) -> int:
        """Drives that hold different data."""
        return self.stripe_width * self.data_blocks

    @property
    def leg_set(self) -> int:
        """Blocks that each leg is rounded down to."""
        return BLOCK_SET * (self.data_blocks if self.level == STRIPED_EC else 1)

    @property
    def granule_blocks(self) -> int:
        return self.leg_set * self.legs

    @property
    def whole_stripe(self) -> int:
        """The stripe's size as a volume has it, and a group does not: striped erasure coding rounds it up."""
        step = 32 * self.data_blocks if self.level == STRIPED_EC else 1
        return math.ceil(self.stripe_size / step) * step

    @property
    def targets(self) -> int:
        """Storage targets that the protection level asks for."""
        group = (self.data_blocks + self.parity_blocks) * (1 + self.mirrors)
        if group == 1 or self.protection == IGNORE_SEPARATION:
            return 1
        if self.protection == MINIMAL_SEPARATION and self.parity_blocks:
            return math.ceil(group / self.parity_blocks)
        return group

    def redundancy_of(self, blocks: int) -> int:
        """Return the blocks of redundancy that `blocks` of data need in addition."""
        return blocks * self.mirrors + math.ceil(blocks * self.parity_blocks / self.data_blocks)

    def blocks_of(self, capacity_gb: float) -> int:
        """Return the data blocks that an allocation of `capacity_gb` gets: whole granules, never more than asked."""
        if not self.striped:
            blocks = math.floor(capacity_gb / _BLOCK_GB)
            return blocks - blocks % BLOCK_SET
        stripe_gb = self.whole_stripe * BLOCK_SIZE / GIGABYTE
        stripes = math.floor((capacity_gb / self.legs) / stripe_gb)
        # The way back to blocks is by floats as well: it is often one block short, and then a whole set is lost.
        leg = math.floor(stripe_gb * stripes / _BLOCK_GB)
        return (leg - leg % self.leg_set) * self.legs

    def parameters(self) -> dict[str, object]:
        """Return the parameters as a volume or VPG document shows them."""
        values = {
            "stripeSize": self.stripe_size,
            "stripeWidth": self.stripe_width,
            "numberOfMirrors": self.mirrors,
            "dataBlocks": self.data_blocks,
            "parityBlocks": self.parity_blocks,
            "protectionLevel": self.protection,
            "enableCrcCheck": self.crc,
        }
        shown = {name: values[name] for name in PARAMETERS[self.level] if values[name] is not None}
        return {"RAIDLevel": self.level, **shown}


def _mirrored(level: str, width: int) -> Layout:
    return Layout(level, stripe_width=width, mirrors=1, protection=MINIMAL_SEPARATION, crc=False)


def _coded(level: str, width: int, protection: str) -> Layout:
    return Layout(level, stripe_width=width, data_blocks=8, parity_blocks=2, protection=protection, crc=True)


BUILT_IN_GROUPS: dict[str, Layout] = {
    "DEFAULT_CONCATENATED_VPG": Layout(CONCATENATED),
    "DEFAULT_RAID_0_VPG": Layout(RAID_0, stripe_width=2),
    "DEFAULT_RAID_1_VPG": _mirrored(RAID_1, 1),
    "DEFAULT_RAID_10_VPG": _mirrored(RAID_10, 2),
    "DEFAULT_EC_DUAL_TARGET_REDUNDANCY_VPG": _coded(EC, 1, FULL_SEPARATION),
    "DEFAULT_EC_SINGLE_TARGET_REDUNDANCY_VPG": _coded(EC, 1, MINIMAL_SEPARATION),
    "DEFAULT_STRIPED_EC_DUAL_TARGET_REDUNDANCY_VPG": _coded(STRIPED_EC, 2, FULL_SEPARATION),
    "DEFAULT_METADATA_RAID_1_VPG": _mirrored(RAID_1, 1),
}
