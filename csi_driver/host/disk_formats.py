# SPDX-License-Identifier: Apache-2.0
"""Parsers of superblocks and LUKS headers: pure functions of the first bytes of a device.

Layouts: the kernel's fs/ext4/ext4.h (struct ext4_super_block, at byte 1024), fs/xfs/libxfs/xfs_format.h (struct
xfs_dsb, at 0), include/uapi/linux/btrfs_tree.h (struct btrfs_super_block, at 65536); "LUKS2 On-Disk Format
Specification" 1.1 and "LUKS1 On-Disk Format Specification" 1.2.3.
"""

from __future__ import annotations

import hashlib
import json
import re
import struct
import uuid
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

from csi_driver.host_model import DamagedHeader, LuksHeader

HEAD_BYTES = 68 * 1024
"""Length of the head of a device that the superblock parsers need: to the end of that of btrfs."""

_EXT_AT, _BTRFS_AT = 1024, 65536
_EXT_MAGIC, _XFS_MAGIC, _BTRFS_MAGIC = 0xEF53, b"XFSB", b"_BHRfS_M"
_EXT_VALID, _EXT_NEEDS_RECOVERY, _EXT_64BIT = 1, 0x4, 0x80
_EXT_HAS_JOURNAL, _EXT_IS_JOURNAL, _EXT_EXTENTS = 0x4, 0x8, 0x40
_XFS_IN_PROGRESS_AT = 126
"""sb_inprogress: not zero while mkfs.xfs writes."""


@dataclass(frozen=True, slots=True)
class Superblock:
    """The recorded size, `blocks` of `block_bytes`, and the uuid of a filesystem.

    For ext4 only: `was_closed_well`: unmounted cleanly, without recorded errors, no check due by count or time;
    `was_checked_since_use`: a full check ran after the last mount; `is_certain`: no ext2 or ext3, with only zeroes
    before it.
    """

    fs_type: str
    block_bytes: int
    blocks: int
    uuid: str
    was_closed_well: bool = True
    was_checked_since_use: bool = True
    is_certain: bool = True

    @property
    def size_bytes(self) -> int:
        return self.block_bytes * self.blocks


def parse_superblock(head: bytes, fs_type: str) -> Superblock | None:
    """Read the superblock of that type, ext2 and ext3 as ext4; None when invalid or of an unfinished mkfs."""
    match fs_type:
        case "ext2" | "ext3" | "ext4":
            return _ext(head)
        case "xfs":
            return _xfs(head)
        case "btrfs":
            return _btrfs(head)
    return None


def superblock_types(head: bytes) -> list[str]:
    """Return which of ext4, xfs and btrfs have a superblock in this head."""
    return [fs_type for fs_type in ("ext4", "xfs", "btrfs") if parse_superblock(head, fs_type) is not None]


def _ext(head: bytes) -> Superblock | None:
    raw = head[_EXT_AT : _EXT_AT + 1024]
    if len(raw) < 1024 or struct.unpack_from("<H", raw, 56)[0] != _EXT_MAGIC:
        return None
    blocks, log_block = struct.unpack_from("<I", raw, 4)[0], struct.unpack_from("<I", raw, 24)[0]
    mounted_s, _written_s, mounts, most_mounts, _magic, state = struct.unpack_from("<IIHhHH", raw, 44)
    checked_s, interval_s = struct.unpack_from("<II", raw, 64)
    compatible, incompatible = struct.unpack_from("<II", raw, 92)
    if log_block > 6:
        return None
    if incompatible & _EXT_64BIT:
        blocks |= struct.unpack_from("<I", raw, 0x150)[0] << 32
    is_due = interval_s != 0 or 0 < most_mounts <= mounts
    return Superblock(
        fs_type="ext4",
        block_bytes=1024 << log_block,
        blocks=blocks,
        uuid=_uuid(raw, 0x68),
        was_closed_well=state == _EXT_VALID and not incompatible & _EXT_NEEDS_RECOVERY and not is_due,
        # In whole seconds: the order of a check and a mount within one second is unknown.
        was_checked_since_use=state == _EXT_VALID and checked_s > mounted_s,
        is_certain=bool(compatible & _EXT_HAS_JOURNAL and incompatible & _EXT_EXTENTS)
        and not (incompatible & _EXT_IS_JOURNAL or any(head[:_EXT_AT])),
    )


def _xfs(head: bytes) -> Superblock | None:
    if len(head) < 512 or head[:4] != _XFS_MAGIC:
        return None
    block_bytes, blocks = struct.unpack_from(">IQ", head, 4)
    if not 512 <= block_bytes <= 65536 or head[_XFS_IN_PROGRESS_AT]:
        return None
    return Superblock("xfs", block_bytes, blocks, _uuid(head, 32))


def _btrfs(head: bytes) -> Superblock | None:
    raw = head[_BTRFS_AT : _BTRFS_AT + 4096]
    if len(raw) < 4096 or raw[64:72] != _BTRFS_MAGIC:
        return None
    (total_bytes,) = struct.unpack_from("<Q", raw, 112)
    return Superblock("btrfs", 1, total_bytes, _uuid(raw, 32))


# Offsets in struct btrfs_super_block. The checksum covers all bytes behind it. Flags from bit 32 on: a seed, a dump of
# metadata, or a conversion that another program did not finish.
_BTRFS_SUM_BYTES, _BTRFS_DEVICES, _BTRFS_FEATURES, _BTRFS_SUM_TYPE, _BTRFS_METADATA_UUID = 32, 136, 188, 196, 571
_METADATA_UUID = 1 << 10
_BTRFS_SUMS: Mapping[int, Callable[[bytes], bytes]] = {
    0: lambda data: _crc32c(data).to_bytes(4, "little"),
    1: lambda data: _xxhash64(data).to_bytes(8, "little"),
    2: lambda data: hashlib.sha256(data).digest(),
    3: lambda data: hashlib.blake2b(data, digest_size=32).digest(),
}
BTRFS_COPIES = (_BTRFS_AT, 64 << 20, 256 << 30)
"""Where btrfs has a superblock, the one that is mounted first (fs/btrfs/disk-io.h, btrfs_sb_offset)."""
BTRFS_COPY_BYTES = 4096


def with_btrfs_uuid(copies: Mapping[int, bytes], new_uuid: str) -> dict[int, bytes]:
    """Return the copies of a btrfs superblock, by offset, with another uuid (feature METADATA_UUID, Linux 5.0).

    The blocks of metadata keep the former one. A copy that is invalid or of another filesystem is left out. Empty when
    the first one is invalid, of several devices, or of a kind that is not known.
    """
    changed, metadata_uuid = {}, _metadata_uuid(copies[_BTRFS_AT])
    for offset, copy in copies.items():
        checksum = _btrfs_checksum(copy, offset)
        if checksum is None or _metadata_uuid(copy) != metadata_uuid:
            continue
        made = bytearray(copy)
        (features,) = struct.unpack_from("<Q", made, _BTRFS_FEATURES)
        struct.pack_into("<Q", made, _BTRFS_FEATURES, features | _METADATA_UUID)
        struct.pack_into("<16s", made, _BTRFS_METADATA_UUID, metadata_uuid)
        struct.pack_into("<16s", made, _BTRFS_SUM_BYTES, uuid.UUID(new_uuid).bytes)
        made[:_BTRFS_SUM_BYTES] = checksum(bytes(made[_BTRFS_SUM_BYTES:])).ljust(_BTRFS_SUM_BYTES, b"\0")
        changed[offset] = bytes(made)
    return changed if _BTRFS_AT in changed else {}


def _metadata_uuid(copy: bytes) -> bytes:
    (features,) = struct.unpack_from("<Q", copy, _BTRFS_FEATURES)
    at = _BTRFS_METADATA_UUID if features & _METADATA_UUID else _BTRFS_SUM_BYTES
    return copy[at : at + 16]


def _btrfs_checksum(copy: bytes, offset: int) -> Callable[[bytes], bytes] | None:
    """Return the function of the checksum of a superblock that can be changed."""
    own_offset, flags, magic = struct.unpack_from("<QQ8s", copy, _BTRFS_SUM_BYTES + 16)
    (devices,) = struct.unpack_from("<Q", copy, _BTRFS_DEVICES)
    checksum = _BTRFS_SUMS.get(struct.unpack_from("<H", copy, _BTRFS_SUM_TYPE)[0])
    if checksum is None or (magic, own_offset, flags >> 32, devices) != (_BTRFS_MAGIC, offset, 0, 1):
        return None
    return checksum if copy.startswith(checksum(copy[_BTRFS_SUM_BYTES:])) else None


def _crc32c(data: bytes) -> int:
    """Return the checksum of RFC 3720, 12.1."""
    value = 0xFFFFFFFF
    for byte in data:
        value ^= byte
        for _ in range(8):
            value = value >> 1 ^ (0x82F63B78 if value & 1 else 0)
    return value ^ 0xFFFFFFFF


_XX_PRIMES = (0x9E3779B185EBCA87, 0xC2B2AE3D27D4EB4F, 0x165667B19E3779F9, 0x85EBCA77C2B2AE63)


def _xxhash64(data: bytes) -> int:
    """Return the XXH64 ("xxHash fast digest algorithm", 0.1.1) with seed 0 of a multiple of 32 bytes."""
    one, two, three, four = _XX_PRIMES
    most = (1 << 64) - 1

    def turned(value: int, bits: int) -> int:
        return (value << bits | (value & most) >> 64 - bits) & most

    def mixed(into: int, lane: int) -> int:
        return turned(into + lane * two & most, 31) * one & most

    lanes = [one + two & most, two, 0, -one & most]
    for at in range(0, len(data), 32):
        lanes = [mixed(lane, word) for lane, word in zip(lanes, struct.unpack_from("<4Q", data, at), strict=True)]
    value = sum(turned(lane, bits) for lane, bits in zip(lanes, (1, 7, 12, 18), strict=True)) & most
    for lane in lanes:
        value = (value ^ mixed(0, lane)) * one + four & most
    value = value + len(data) & most
    value = (value ^ value >> 33) * two & most
    value = (value ^ value >> 29) * three & most
    return value ^ value >> 32


def _uuid(raw: bytes, offset: int) -> str:
    return str(uuid.UUID(bytes=raw[offset : offset + 16]))


def parse_blkid(text: str) -> dict[str, str]:
    r"""Read blkid's export format: KEY=value lines, in which a backslash quotes the next character."""
    values = {}
    for line in text.split("\n"):  # a label may hold other characters at which splitlines() splits
        key, separator, value = line.partition("=")
        if separator:
            values[key] = re.sub(r"\\(.?)", r"\1", value, flags=re.DOTALL)
    return values


# LUKS2 keeps two copies with checksums: an interrupted write leaves one intact.

_FIRST, _SECOND = b"LUKS\xba\xbe", b"SKUL\xba\xbe"
_BINARY_BYTES = 4096
_CHECKSUM_AT, _CHECKSUM_BYTES = 448, 64
# The lengths of a copy, binary part and JSON (section 2.1); the second copy follows the first.
_COPY_BYTES = tuple(16384 << step for step in range(9))
LUKS_READ_BYTES = _COPY_BYTES[-1]
"""The longest read of `find_luks_header`."""
_LUKS1_SLOT_IN_USE = 0x00AC71F3
_SECTOR_BYTES = 512

Read = Callable[[int, int], bytes]
"""Returns that many bytes from that offset, both multiples of 4096."""


def find_luks_header(read: Read, size_bytes: int) -> LuksHeader | DamagedHeader | None:
    """Return the header of a device of that size; None when there is no trace of one."""
    head = read(0, _BINARY_BYTES)
    version = int.from_bytes(head[6:8], "big") if head.startswith(_FIRST) else 0
    if version == 1:
        return _luks1(head)
    found, traces = None, version != 0
    for copy in _copies(read, head, size_bytes):
        traces = True
        header = _luks2(copy)
        if header is not None and (found is None or header[0] > found[0]):
            found = header
    if found is not None:
        return found[1]
    return DamagedHeader() if traces else None


def _copies(read: Read, head: bytes, size_bytes: int) -> Iterator[bytes]:
    """Yield each copy with a magic number. The second is searched when the first does not tell the length."""
    length = _length(head, _FIRST)
    if length and length <= size_bytes:
        yield read(0, length)
    for offset in (length,) if length else _COPY_BYTES:
        if offset + _BINARY_BYTES > size_bytes:
            return
        length = _length(read(offset, _BINARY_BYTES), _SECOND)
        if length and offset + length <= size_bytes:
            yield read(offset, length)


def _length(binary: bytes, magic: bytes) -> int:
    if not binary.startswith(magic):
        return 0
    (length,) = struct.unpack_from(">Q", binary, 8)
    return length if length in _COPY_BYTES else 0


def _luks2(copy: bytes) -> tuple[int, LuksHeader] | None:
    """Return the sequence number and header of a copy; None when the checksum or JSON is invalid."""
    stored = copy[_CHECKSUM_AT : _CHECKSUM_AT + _CHECKSUM_BYTES]
    blanked = copy[:_CHECKSUM_AT] + bytes(_CHECKSUM_BYTES) + copy[_CHECKSUM_AT + _CHECKSUM_BYTES :]
    try:
        digest = hashlib.new(_text(copy, 72, 32), blanked).digest()
        document = json.loads(copy[_BINARY_BYTES:].split(b"\0", 1)[0])
        segment = document["segments"]["0"]
        header = LuksHeader(
            version=2,
            uuid=_text(copy, 168, 40),
            label=_text(copy, 24, 48),
            subsystem=_text(copy, 208, 48),
            cipher=str(segment["encryption"]),
            key_bits=_key_bits(document),
            key_slots=len(document["keyslots"]),
            data_offset_bytes=int(segment["offset"]),
        )
    except (ValueError, KeyError, TypeError, AttributeError):
        return None
    if not stored.startswith(digest):
        return None
    (sequence,) = struct.unpack_from(">Q", copy, 16)
    return sequence, header


def _key_bits(document: Mapping[str, Mapping[str, Mapping[str, object]]]) -> int:
    sizes = [slot["key_size"] for slot in document["keyslots"].values()]
    return int(str(sizes[0])) * 8 if sizes else 0


def _luks1(head: bytes) -> LuksHeader:
    slots = (struct.unpack_from(">I", head, 208 + 48 * slot)[0] for slot in range(8))
    offset, key_bytes = struct.unpack_from(">2I", head, 104)
    return LuksHeader(
        version=1,
        uuid=_text(head, 168, 40),
        label="",
        subsystem="",
        cipher=f"{_text(head, 8, 32)}-{_text(head, 40, 32)}",
        key_bits=key_bytes * 8,
        key_slots=sum(slot == _LUKS1_SLOT_IN_USE for slot in slots),
        data_offset_bytes=offset * _SECTOR_BYTES,
    )


def _text(raw: bytes, offset: int, length: int) -> str:
    return raw[offset : offset + length].split(b"\0", 1)[0].decode("utf-8", errors="replace")
