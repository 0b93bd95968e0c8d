"""The RAID level of a StorageClass and what each level takes."""

from __future__ import annotations

from collections.abc import Mapping

from csi_driver.parameters import values as read
from csi_driver.storage_model import Layout, RaidLevel

RAID_LEVELS: Mapping[str, RaidLevel] = {
    **{level.value.lower(): level for level in RaidLevel},
    **dict.fromkeys(("concatenated", "lvm", "jbod", "lvm/jbod"), RaidLevel.CONCATENATED),
    **dict.fromkeys(("raid0", "raid-0", "striped"), RaidLevel.STRIPED),
    **dict.fromkeys(("raid1", "raid-1", "mirrored"), RaidLevel.MIRRORED),
    **dict.fromkeys(("raid10", "raid-10", "striped mirrored"), RaidLevel.STRIPED_MIRRORED),
    **dict.fromkeys(("ec", "erasure-coding"), RaidLevel.ERASURE_CODED),
    **dict.fromkeys(("sec", "raid60", "raid-60", "striped-ec"), RaidLevel.STRIPED_ERASURE_CODED),
}
"""The words of earlier drivers, of the management's own tools, and its API's names."""

_STRIPE = {"stripeWidth", "stripeSize"}
_MIRROR = {"numberOfMirrors", "protectionLevel", "enableCrcCheck"}
_ERASURE = {"dataBlocks", "parityBlocks", "protectionLevel", "enableCrcCheck"}
_TAKEN: Mapping[RaidLevel, set[str]] = {
    RaidLevel.CONCATENATED: set(),
    RaidLevel.STRIPED: _STRIPE,
    RaidLevel.MIRRORED: _MIRROR,
    RaidLevel.STRIPED_MIRRORED: _STRIPE | _MIRROR,
    RaidLevel.ERASURE_CODED: _STRIPE | _ERASURE,
    RaidLevel.STRIPED_ERASURE_CODED: _STRIPE | _ERASURE,
}
LAYOUT_KEYS = _STRIPE | _MIRROR | _ERASURE
_PROTECTION_LEVELS = ("Full Separation", "Minimal Separation", "Ignore Separation")


def takes(level: RaidLevel, key: str) -> bool:
    """Tell whether a RAID level has this property."""
    return key in _TAKEN[level]


def layout(own: Mapping[str, str]) -> Layout:
    """Read the layout; a key that its RAID level does not take is refused by name."""
    word = own.get("raidLevel", "concatenated")
    level = RAID_LEVELS.get(word.strip().lower())
    if level is None:
        raise read.InvalidParameter("raidLevel", word, f"one of {', '.join(sorted(RAID_LEVELS))}")
    read.refuse_keys(own, LAYOUT_KEYS - _TAKEN[level], f"raidLevel {word} has no such property")
    narrow, wide = (1, 1) if level is RaidLevel.ERASURE_CODED else (2, 300)
    protection = own.get("protectionLevel")
    if protection is not None and protection not in _PROTECTION_LEVELS:
        raise read.InvalidParameter("protectionLevel", protection, f"one of {', '.join(_PROTECTION_LEVELS)}")
    return Layout(
        raid_level=level,
        stripe_width=read.number(own, "stripeWidth", narrow, wide),
        stripe_size_blocks=read.number(own, "stripeSize", 32, 1 << 20),
        data_blocks=read.number(own, "dataBlocks", 1, 10),
        parity_blocks=read.number(own, "parityBlocks", 1, 2),
        number_of_mirrors=read.number(own, "numberOfMirrors", 1, 2),
        protection_level=protection,
        enable_crc_check=read.switch(own, "enableCrcCheck"),
    )
