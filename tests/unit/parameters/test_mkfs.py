# SPDX-License-Identifier: Apache-2.0
"""The arguments of mkfs: defaults, keys of the StorageClass, free text, and refusals before a device is touched."""

from __future__ import annotations

from collections.abc import Mapping

import pytest

from csi_driver.errors import InvalidRequest
from csi_driver.model import EMPTY
from csi_driver.parameters.mkfs import MkfsRequest, mkfs_arguments

KIB = 1024
STRIPES = (128 * KIB, 1024 * KIB)
EXT4_DEFAULTS = "-m 0 -E nodiscard,lazy_itable_init=1,lazy_journal_init=1"


def told(
    fs_type: str,
    keys: Mapping[str, str] = EMPTY,
    *,
    free: str = "",
    stripes: tuple[int, int] = (0, 0),
    size_bytes: int = 1 << 30,
    page_bytes: int = 4096,
) -> str:
    """Return the words for mkfs; keys without their prefix, `free` is the free text."""
    context = {f"mkfs/{key}": value for key, value in keys.items()} | {"mkfsOptions": free}
    return " ".join(MkfsRequest(context, *stripes, size_bytes, page_bytes).arguments(fs_type).every)


@pytest.mark.parametrize(("fs_type", "words"), [("ext4", EXT4_DEFAULTS), ("xfs", "-K"), ("btrfs", "-K")])
def test_without_keys_mkfs_gets_the_defaults(fs_type: str, words: str) -> None:
    assert told(fs_type) == words


@pytest.mark.parametrize(
    ("fs_type", "keys", "words"),
    [
        ("ext4", {"blockSize": "4096"}, "-m 0 -b 4096"),
        ("ext4", {"inodeSize": "512"}, "-m 0 -I 512"),
        ("ext4", {"bytesPerInode": "65536"}, "-m 0 -i 65536"),
        ("ext4", {"reservedBlocksPercent": "5"}, "-m 0 -m 5"),
        ("xfs", {"blockSize": "4096", "inodeSize": "2048"}, "-K -b size=4096 -i size=2048"),
        ("btrfs", {"blockSize": "32768"}, "-K -n 32768"),
        ("xfs", {"discard": "true"}, ""),
        ("btrfs", {"discard": "true"}, ""),
    ],
)
def test_each_key_becomes_the_option_of_its_filesystem(fs_type: str, keys: dict[str, str], words: str) -> None:
    expected = f"{words} {EXT4_DEFAULTS.removeprefix('-m 0 ')}" if fs_type == "ext4" else words
    assert told(fs_type, keys) == expected


def test_discard_replaces_nodiscard() -> None:
    assert told("ext4", {"discard": "true"}) == EXT4_DEFAULTS.replace("nodiscard", "discard")
    assert told("ext4", free="-E discard") == "-m 0 -E lazy_itable_init=1,lazy_journal_init=1,discard"


@pytest.mark.parametrize("page_bytes", [16 * KIB, 64 * KIB])
def test_a_block_may_be_as_large_as_a_page_of_the_machine(page_bytes: int) -> None:
    assert f"-b {page_bytes}" in told("ext4", {"blockSize": str(page_bytes)}, page_bytes=page_bytes)


@pytest.mark.parametrize(
    ("fs_type", "keys", "said"),
    [
        ("ext4", {"blockSize": "1024"}, "mkfs/blockSize: expected 4096, the only possible value for ext4, got '1024'"),
        ("ext4", {"blockSize": "65536"}, "expected 4096"),
        ("ext4", {"blockSize": "5000"}, "mkfs/blockSize"),
        ("ext4", {"blockSize": "4k"}, "mkfs/blockSize"),
        (
            "ext4",
            {"inodeSize": "8192"},
            "expected a power of two from 128 to 4096 for ext4, got '8192'",
        ),
        ("ext4", {"inodeSize": "300"}, "mkfs/inodeSize"),
        ("ext4", {"bytesPerInode": "1024"}, "mkfs/bytesPerInode: expected a whole number from 4096 to"),
        ("ext4", {"reservedBlocksPercent": "51"}, "expected a whole number from 0 to 50"),
        ("ext4", {"reservedBlocksPercent": "-1"}, "mkfs/reservedBlocksPercent"),
        ("xfs", {"inodeSize": "256"}, "from 512 to 2048 for xfs"),
        ("xfs", {"inodeSize": "4096"}, "from 512 to 2048 for xfs"),
        ("xfs", {"blockSize": "65536"}, "mkfs/blockSize"),
        ("xfs", {"bytesPerInode": "65536"}, "mkfs/bytesPerInode cannot be used: xfs has no such setting"),
        ("xfs", {"reservedBlocksPercent": "5"}, "xfs has no such setting"),
        ("btrfs", {"inodeSize": "512"}, "btrfs has no such setting"),
        ("btrfs", {"blockSize": "2048"}, "from 4096 to 65536 for btrfs"),
        ("ext4", {"discard": "yes"}, "mkfs/discard: expected true or false, got 'yes'"),
        ("xfs", {"stripeGeometry": "auto"}, "mkfs/stripeGeometry: expected true or false, got 'auto'"),
        ("btrfs", {"stripeGeometry": "auto"}, "true or false"),
        ("ext4", {"chunk": "1"}, "mkfs/chunk"),
    ],
)
def test_an_invalid_key_is_refused_with_the_possible_values(fs_type: str, keys: dict[str, str], said: str) -> None:
    with pytest.raises(InvalidRequest) as refusal:
        told(fs_type, keys)
    assert said in str(refusal.value)


@pytest.mark.parametrize(
    ("fs_type", "keys", "free"),
    [
        ("ext4", {"blockSize": "4096"}, "-b 4096"),
        ("ext4", {"inodeSize": "256"}, "-I 512"),
        ("ext4", {"bytesPerInode": "65536"}, "-i 8192"),
        ("ext4", {"reservedBlocksPercent": "1"}, "-m0"),
        ("xfs", {"inodeSize": "512"}, "-i maxpct=5,size=1024"),
        ("btrfs", {"blockSize": "16384"}, "--nodesize 32768"),
    ],
)
def test_a_setting_in_both_a_key_and_the_free_text_is_refused(fs_type: str, keys: dict[str, str], free: str) -> None:
    with pytest.raises(InvalidRequest, match="sets as well"):
        told(fs_type, keys, free=free)


# --- stripes ---


@pytest.mark.parametrize(
    ("fs_type", "words"),
    [
        ("ext4", "-m 0 -E nodiscard,lazy_itable_init=1,lazy_journal_init=1,stride=32,stripe_width=256"),
        ("xfs", "-K -d su=131072,sw=8"),
        ("btrfs", "-K"),
    ],
)
def test_mkfs_gets_the_stripes_of_the_volume(fs_type: str, words: str) -> None:
    assert told(fs_type, stripes=STRIPES) == words


@pytest.mark.parametrize(
    "stripes", [(0, 0), (6000, 12000), (128 * KIB, 0), (128 * KIB, 200 * KIB), (128 * KIB, 64 * KIB)]
)
def test_inconsistent_stripes_are_left_out(stripes: tuple[int, int]) -> None:
    assert (told("ext4", stripes=stripes), told("xfs", stripes=stripes)) == (EXT4_DEFAULTS, "-K")


@pytest.mark.parametrize(("keys", "free"), [({"blockSize": "0000"}, ""), ({}, "-b 0"), ({}, "-b size=0k")])
@pytest.mark.parametrize("fs_type", ["ext4", "xfs"])
def test_a_block_of_no_bytes_is_refused_with_stripes_too(fs_type: str, keys: dict[str, str], free: str) -> None:
    with pytest.raises(InvalidRequest, match=r"blockSize|-b"):
        told(fs_type, keys, free=free, stripes=STRIPES)


def test_a_small_xfs_gets_no_stripes() -> None:
    assert told("xfs", stripes=STRIPES, size_bytes=512 << 20) == "-K"
    assert "stride" in told("ext4", stripes=STRIPES, size_bytes=512 << 20)


def test_stripes_can_be_switched_off() -> None:
    assert told("xfs", {"stripeGeometry": "false"}, stripes=STRIPES) == "-K"


@pytest.mark.parametrize(
    ("fs_type", "free"), [("ext4", "-E stride=4"), ("xfs", "-d sunit=8,swidth=64"), ("xfs", "-d noalign")]
)
def test_stripes_of_the_free_text_replace_those_of_the_volume(fs_type: str, free: str) -> None:
    words = told(fs_type, free=free, stripes=STRIPES)
    assert (free.split()[1] in words, "su=" in words, "stripe_width" in words) == (True, False, False)


# --- free text ---


def test_extended_options_of_the_free_text_do_not_undo_the_defaults() -> None:
    """mke2fs takes only the last -E."""
    assert told("ext4", free="-E num_backup_sb=1") == f"{EXT4_DEFAULTS},num_backup_sb=1"
    assert told("ext4", free="-E lazy_itable_init=0").count("-E") == 1


def test_requested_arguments_are_kept_apart_from_the_defaults() -> None:
    wish = MkfsRequest({"mkfsOptions": "-E num_backup_sb=1", "mkfs/inodeSize": "512"}, 128 * KIB, 1024 * KIB)
    assert wish.arguments("ext4").asked == ("-I", "512", "-E", "num_backup_sb=1")
    assert MkfsRequest({}, 128 * KIB, 1024 * KIB).arguments("ext4").asked == ()


@pytest.mark.parametrize(
    ("text", "fs_type", "arguments"),
    [
        ("", "ext4", ()),
        ("-m0 -E nodiscard,lazy_itable_init=1", "ext4", ("-m", "0", "-E", "nodiscard,lazy_itable_init=1")),
        ("-b 4096 -I 256 -O ^has_journal,quota", "ext4", ("-b", "4096", "-I", "256", "-O", "^has_journal,quota")),
        ("-m reflink=1,crc=1 -K", "xfs", ("-m", "reflink=1,crc=1", "-K")),
        ("-d su=128k,sw=8", "xfs", ("-d", "su=128k,sw=8")),
        ("--csum xxhash -n 16k", "btrfs", ("--csum=xxhash", "-n", "16k")),
        ("--csum=xxhash", "btrfs", ("--csum=xxhash",)),
        ("'-L' \"data\"", "ext4", ("-L", "data")),
        ("-O ^no-holes,free-space-tree", "btrfs", ("-O", "^no-holes,free-space-tree")),
        ("--features block-group-tree", "btrfs", ("--features=block-group-tree",)),
        ("-R free-space-tree,quota", "btrfs", ("-R", "free-space-tree,quota")),
        ("-O none,FEATURE_C12", "ext4", ("-O", "none,FEATURE_C12")),
    ],
)
def test_known_options_of_mkfs_are_accepted(text: str, fs_type: str, arguments: tuple[str, ...]) -> None:
    assert mkfs_arguments(text, fs_type) == arguments


@pytest.mark.parametrize(
    ("text", "fs_type"),
    [
        ("-F", "ext4"), ("-n", "ext4"), ("-S", "ext4"), ("/dev/sda", "ext4"), ("-- /dev/sda", "ext4"),
        ("-d /etc", "ext4"), ("-J device=/dev/sda", "ext4"), ("-E offset=4096", "ext4"), ("-E root_owner=0:0", "ext4"),
        ("-b", "ext4"), ("-b 4096 1g", "ext4"), ("-m 0;reboot", "ext4"), ("-e panic", "ext4"), ("-K1", "ext4"),
        ("-q -q /dev/x", "ext4"), ("-m '", "ext4"), ("-L 'a b'", "ext4"), ("-f", "xfs"), ("-N", "xfs"),
        ("-p /etc/passwd", "xfs"),
        ("-l logdev=/dev/sda", "xfs"), ("-d name=/dev/sda", "xfs"), ("-d file", "xfs"), ("-d size=1m", "xfs"),
        ("-r rtdev=/dev/x", "xfs"), ("-c options=/x", "xfs"), ("-b 100m", "btrfs"), ("-r /etc", "btrfs"),
        ("--rootdir=/etc", "btrfs"), ("-O list-all", "btrfs"), ("-R quota,list-all", "btrfs"), ("-O -f", "btrfs"),
        ("-b 1024", "ext4"), ("-b size=1k", "xfs"), ("-s size=512", "xfs"), ("-n 2k", "btrfs"),
        ("-U clear", "btrfs"), ("-m0", "zfs"), ("-mé", "ext4"),
    ],
)  # fmt: skip
def test_other_options_of_mkfs_are_refused(text: str, fs_type: str) -> None:
    with pytest.raises(InvalidRequest, match="mkfsOptions"):
        mkfs_arguments(text, fs_type)
