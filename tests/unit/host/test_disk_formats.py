# SPDX-License-Identifier: Apache-2.0
"""Parsers of superblocks and of blkid's output, and the places of the quick probe."""

from __future__ import annotations

import struct

import pytest

from csi_driver.host import disk_formats, zero_scan
from csi_driver.host.disk_formats import parse_blkid
from csi_driver.model import GIB, MIB


def ext_head(
    blocks: int, *, log_block: int = 2, incompatible: int = 0, state: int = 1, mounted_s: int = 0, checked_s: int = 0
) -> bytes:
    """Build the head of a device with the fields of an ext4 superblock that are read."""
    raw = bytearray(disk_formats.HEAD_BYTES)
    struct.pack_into("<I", raw, 1024 + 4, blocks & 0xFFFFFFFF)
    struct.pack_into("<I", raw, 1024 + 24, log_block)
    struct.pack_into("<IIHhHH", raw, 1024 + 44, mounted_s, 0, 3, -1, 0xEF53, state)
    struct.pack_into("<II", raw, 1024 + 64, checked_s, 0)
    struct.pack_into("<I", raw, 1024 + 96, incompatible)
    struct.pack_into("<I", raw, 1024 + 0x150, blocks >> 32)
    return bytes(raw)


def found(head: bytes, fs_type: str) -> disk_formats.Superblock:
    parsed = disk_formats.parse_superblock(head, fs_type)
    assert parsed is not None
    return parsed


def test_an_ext4_has_more_than_32_bits_of_blocks() -> None:
    assert found(ext_head(5 << 32, incompatible=0x80), "ext4").size_bytes == (5 << 32) * 4096


def test_without_the_64bit_feature_the_upper_half_is_not_read() -> None:
    assert found(ext_head(5 << 32 | 7), "ext4").size_bytes == 7 * 4096


@pytest.mark.parametrize(("state", "incompatible", "well"), [(1, 0, True), (0, 0, False), (3, 0, False), (1, 4, False)])
def test_an_ext4_was_closed_well_only_without_error_and_recovery(state: int, incompatible: int, well: bool) -> None:
    assert found(ext_head(1000, state=state, incompatible=incompatible), "ext4").was_closed_well is well


def test_an_ext4_mounted_since_its_check_was_not_checked_since_use() -> None:
    assert not found(ext_head(1000, mounted_s=200, checked_s=100), "ext4").was_checked_since_use
    assert found(ext_head(1000, mounted_s=100, checked_s=200), "ext4").was_checked_since_use


def test_an_ext4_mounted_in_the_second_of_its_check_counts_as_used_since() -> None:
    assert not found(ext_head(1000, mounted_s=200, checked_s=200), "ext4").was_checked_since_use


def test_an_xfs_has_its_size() -> None:
    assert found(b"XFSB" + struct.pack(">IQ", 4096, 1 << 34) + bytes(600), "xfs").size_bytes == 1 << 46


def test_a_btrfs_has_its_size() -> None:
    raw = bytearray(disk_formats.HEAD_BYTES)
    raw[65536 + 64 : 65536 + 72] = b"_BHRfS_M"
    struct.pack_into("<Q", raw, 65536 + 112, 3 * GIB)
    assert found(bytes(raw), "btrfs").size_bytes == 3 * GIB


def test_an_unfinished_xfs_is_none() -> None:
    head = bytearray(b"XFSB" + struct.pack(">IQ", 4096, 1 << 20) + bytes(600))
    assert disk_formats.parse_superblock(bytes(head), "xfs") is not None
    head[126] = 1
    assert disk_formats.parse_superblock(bytes(head), "xfs") is None


@pytest.mark.parametrize(("fs_type", "offset"), [("ext4", 1024 + 104), ("xfs", 32), ("btrfs", 65536 + 32)])
def test_the_uuid_of_a_filesystem_is_read(fs_type: str, offset: int) -> None:
    """Offsets: the documents named in the module; the kernel's layouts do not change."""
    raw = bytearray(ext_head(1000))
    raw[:16] = b"XFSB" + struct.pack(">IQ", 4096, 1 << 20)
    raw[65536 + 64 : 65536 + 72] = b"_BHRfS_M"
    raw[offset : offset + 16] = bytes(range(16))
    assert found(bytes(raw), fs_type).uuid == "00010203-0405-0607-0809-0a0b0c0d0e0f"


@pytest.mark.parametrize("fs_type", ["ext4", "xfs", "btrfs", "ntfs", ""])
@pytest.mark.parametrize("head", [b"", bytes(4096), bytes(disk_formats.HEAD_BYTES)])
def test_other_data_are_no_superblock(head: bytes, fs_type: str) -> None:
    assert disk_formats.parse_superblock(head, fs_type) is None


def test_an_invalid_block_size_is_no_superblock() -> None:
    assert disk_formats.parse_superblock(ext_head(1000, log_block=40), "ext4") is None
    assert disk_formats.parse_superblock(b"XFSB" + struct.pack(">IQ", 3, 1) + bytes(600), "xfs") is None


def test_quoted_characters_of_blkid_are_unquoted() -> None:
    text = "DEVNAME=/dev/sda\nLABEL=a\\ b\\\\c\\=d\nTYPE=ext4\n\nnothing\n"
    assert parse_blkid(text) == {"DEVNAME": "/dev/sda", "LABEL": "a b\\c=d", "TYPE": "ext4"}


# --- places -----------------------------------------------------------------------------------------------------


def is_read(offset: int, length: int, size: int) -> bool:
    return any(start <= offset and offset + length <= start + many for start, many in zero_scan.probe_places(size))


@pytest.mark.parametrize("size", [4096, MIB, 8 * MIB, GIB, 10 * GIB + 4096, 1 << 40, 10 << 40])
def test_places_are_sorted_aligned_and_disjoint(size: int) -> None:
    places = zero_scan.probe_places(size)
    ends = [0] + [start + length for start, length in places]
    assert all(start > end or start == 0 for (start, _), end in zip(places, ends, strict=False))
    assert all(start % 4096 == 0 and length > 0 for start, length in places)
    assert ends[-1] == size


@pytest.mark.parametrize(
    ("what", "offset", "length", "size"),
    [
        ("boot sector", 0, 512, GIB),
        ("LUKS2, second header at its farthest", 4 * MIB, 4096, GIB),
        *[(f"LUKS2, second header at {kib} KiB", kib * 1024, 4096, GIB) for kib in (16, 64, 512, 1024, 2048)],
        ("VMFS volume", MIB, 4096, GIB),
        ("VMFS", 2 * MIB, 4096, GIB),
        ("UDF, anchor with 4 KiB sectors", MIB, 4096, GIB),
        ("bcachefs, second superblock", MIB + 4096, 4096, GIB),
        ("bcachefs, superblock at the end", GIB - MIB, 4096, GIB),
        ("ext4 in a partition at 1 MiB", MIB + 1024, 1024, GIB),
        ("btrfs in a partition at 3 MiB", 3 * MIB + 65536, 4096, GIB),
        ("LVM, second metadata", GIB - 2 * MIB, 4096, GIB),
        ("LDM, database", GIB - MIB, MIB, GIB),
        ("Promise RAID, farthest", GIB - 3087 * 512, 512, GIB),
        ("DDF, anchor", GIB - 257 * 512, 512, GIB),
        (
            "ZFS, third label of an uneven size",
            (GIB + 200 * 4096) // 262144 * 262144 - 524288,
            262144,
            GIB + 200 * 4096,
        ),
        ("GPT copy", GIB - 512, 512, GIB),
        ("md 0.90", (GIB & ~65535) - 65536, 4096, GIB),
        ("md 1.0", GIB - 8192, 4096, GIB),
        ("ZFS, third label", GIB - 512 * 1024, 256 * 1024, GIB),
        ("btrfs, first mirror", 64 * MIB, 4096, GIB),
        ("btrfs, second mirror", 256 * GIB, 4096, 300 * GIB),
        ("ext4, 1 KiB blocks, group 1", 8193 * 1024, 1024, GIB),
        ("ext4, 2 KiB blocks, group 3", 3 * 16384 * 2048, 2048, 1000 * MIB),
        ("ext4, 4 KiB blocks, group 25", 25 * 32768 * 4096, 4096, 9 * GIB),
        ("ext4, 4 KiB blocks, group 49", 49 * 32768 * 4096, 4096, 10 * GIB),
        ("ext4, 4 KiB blocks, group 6561", 6561 * 32768 * 4096, 4096, 1 << 40),
        ("ext4, 64 KiB blocks, group 1", 8 << 32, 4096, 1000 * GIB),
        ("ext4, sparse_super2, last group", 79 * 32768 * 4096, 4096, 10 * GIB - MIB),
        ("xfs, second of four groups", 256 * MIB, 4096, GIB),
        *[  # of an uneven size: no sample has them
            (f"xfs, last of {groups} groups", (groups - 1) * -(-262151 // groups) * 4096, 4096, 262151 * 4096)
            for groups in (16, 32)
        ],
        ("xfs, seventh TiB", 7 << 40, 4096, 10 << 40),
    ],
)
def test_a_copy_of_a_superblock_is_among_the_places(what: str, offset: int, length: int, size: int) -> None:
    assert is_read(offset, length, size), what


def test_the_quick_probe_is_small_on_the_largest_volume() -> None:
    places = zero_scan.probe_places(64 << 40)
    assert sum(length for _, length in places) < 8 * MIB
    assert len(places) < 400


@pytest.mark.parametrize("size", [64 * MIB, GIB, 10 * GIB + 4096, 1 << 40])
def test_old_data_on_a_64th_of_the_volume_is_found(size: int) -> None:
    places = zero_scan.probe_places(size)
    ends = [0] + [start + length for start, length in places]
    unread = [start - end for (start, _), end in zip(places, ends, strict=False)]
    assert max(unread) < size // 64
