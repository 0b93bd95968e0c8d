"""What a LUKS header says of itself: pure parsers of the first bytes of a device. No secret is in what they return.

Layouts: "LUKS2 On-Disk Format Specification", version 1.1, and "LUKS1 On-Disk Format Specification", version 1.2.3.
LUKS2 keeps two copies, each with a checksum: a program that is cut off while it writes leaves one of them whole.
"""

from __future__ import annotations

import hashlib
import json
import struct
from collections.abc import Callable, Iterator, Mapping

from csi_driver.host_model import DamagedHeader, LuksHeader

_FIRST, _SECOND = b"LUKS\xba\xbe", b"SKUL\xba\xbe"
_BINARY_BYTES = 4096
_CHECKSUM_AT, _CHECKSUM_BYTES = 448, 64
# Sizes that a copy may have, binary part and JSON together (section 2.1); the second one follows the first.
_COPY_BYTES = tuple(16384 << step for step in range(9))
LARGEST_READ_BYTES = _COPY_BYTES[-1]
_LUKS1_SLOT_IN_USE = 0x00AC71F3
_SECTOR_BYTES = 512

Read = Callable[[int, int], bytes]
"""Returns that many bytes from that offset, both multiples of 4096."""


def find_header(read: Read, size_bytes: int) -> LuksHeader | DamagedHeader | None:
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
    """Yield each copy that a magic number announces, whole. Where the first tells no size, the second is searched."""
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
    """Return sequence number and content of one copy; None when its checksum or its JSON is wrong."""
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
    """Return the size of the volume key; 0 where no key slot holds it any more."""
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
