"""What the superblocks of ext4, xfs and btrfs record: pure parsers of the first 128 KiB of a device.

Layouts: the kernel's fs/ext4/ext4.h (struct ext4_super_block, at byte 1024), fs/xfs/libxfs/xfs_format.h (struct
xfs_dsb, at 0) and include/uapi/linux/btrfs_tree.h (struct btrfs_super_block, at 65536).
"""

from __future__ import annotations

import struct
import uuid
from dataclasses import dataclass

HEAD_BYTES = 128 * 1024
"""How much of a device's head the parsers need."""

_EXT_AT, _BTRFS_AT = 1024, 65536
_EXT_MAGIC, _XFS_MAGIC, _BTRFS_MAGIC = 0xEF53, b"XFSB", b"_BHRfS_M"
_EXT_VALID = 1
_XFS_IN_PROGRESS_AT = 126
"""sb_inprogress: not zero from mkfs.xfs's first write to its last."""
_EXT_NEEDS_RECOVERY, _EXT_64BIT = 0x4, 0x80


@dataclass(frozen=True, slots=True)
class Superblock:
    """The recorded size, `blocks` of `block_bytes`, and the filesystem's own uuid.

    `was_closed_well`: cleanly unmounted, without a recorded error and not due for a check by count or time; says
    something for ext4 only. `was_checked_since_use`: a full check ran after the last mount (ext4 only).
    """

    fs_type: str
    block_bytes: int
    blocks: int
    uuid: str
    was_closed_well: bool = True
    was_checked_since_use: bool = True

    @property
    def size_bytes(self) -> int:
        """Size of the filesystem."""
        return self.block_bytes * self.blocks


def parse(head: bytes, fs_type: str) -> Superblock | None:
    """Read the superblock of that type (ext2 and ext3 count as ext4).

    None when there is none, when it is senseless, and when its own mkfs says in it that it did not finish.
    """
    match fs_type:
        case "ext2" | "ext3" | "ext4":
            return _ext(head)
        case "xfs":
            return _xfs(head)
        case "btrfs":
            return _btrfs(head)
    return None


def recognise(head: bytes) -> list[str]:
    """Return which of the three types have a superblock in this head; usually one or none."""
    return [fs_type for fs_type in ("ext4", "xfs", "btrfs") if parse(head, fs_type) is not None]


def _ext(head: bytes) -> Superblock | None:
    raw = head[_EXT_AT : _EXT_AT + 1024]
    if len(raw) < 1024 or struct.unpack_from("<H", raw, 56)[0] != _EXT_MAGIC:
        return None
    blocks, log_block = struct.unpack_from("<I", raw, 4)[0], struct.unpack_from("<I", raw, 24)[0]
    mounted_s, _written_s, mounts, most_mounts, _magic, state = struct.unpack_from("<IIHhHH", raw, 44)
    checked_s, interval_s = struct.unpack_from("<II", raw, 64)
    (incompatible,) = struct.unpack_from("<I", raw, 96)
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
        # Whole seconds: of a check and a mount in the same one, nothing tells which came first.
        was_checked_since_use=state == _EXT_VALID and checked_s > mounted_s,
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


def _uuid(raw: bytes, offset: int) -> str:
    return str(uuid.UUID(bytes=raw[offset : offset + 16]))
