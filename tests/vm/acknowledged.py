# SPDX-License-Identifier: Apache-2.0
"""Write blocks that prove themselves, and read them back. Runs in a guest: only the standard library.

`write PATH WRITER BLOCKS` overwrites the blocks of a device or file in turn, each with direct, synced I/O, and prints
`sequence block` after the kernel has acknowledged it. `read PATH BLOCKS` prints `block writer sequence` for each block
that is whole, `block torn` for each other one that is not zero. An I/O error is printed as `error ERRNO`.
"""

from __future__ import annotations

import mmap
import os
import struct
import sys
import zlib

BLOCK_BYTES = 4096
_HEAD = struct.Struct("<16sQQI")


def sealed(writer: str, sequence: int, block: int) -> bytes:
    """Return a block that names its writer, number and place, with a checksum over all of it."""
    rest = (f"{writer} {sequence} ".encode() * BLOCK_BYTES)[: BLOCK_BYTES - _HEAD.size]
    name = writer.encode().ljust(16, b"\0")
    checksum = zlib.crc32(rest, zlib.crc32(_HEAD.pack(name, sequence, block, 0)))
    return _HEAD.pack(name, sequence, block, checksum) + rest


def shown(data: bytes, block: int) -> str:
    """Return what a block holds."""
    if not any(data):
        return ""
    name, sequence, _, _ = _HEAD.unpack_from(data)
    try:
        writer = name.rstrip(b"\0").decode("ascii")
    except UnicodeDecodeError:
        return f"{block} torn"
    return f"{block} {writer} {sequence}" if data == sealed(writer, sequence, block) else f"{block} torn"


def write(path: str, writer: str, blocks: int) -> None:
    """Write for ever."""
    descriptor = os.open(path, os.O_RDWR | os.O_DIRECT | os.O_DSYNC)
    buffer = mmap.mmap(-1, BLOCK_BYTES)
    sequence = 0
    while True:
        sequence += 1
        block = sequence % blocks
        buffer[:] = sealed(writer, sequence, block)
        os.pwrite(descriptor, buffer, block * BLOCK_BYTES)
        print(sequence, block, flush=True)


def read(path: str, blocks: int) -> None:
    """Read all blocks once, from the device itself."""
    descriptor = os.open(path, os.O_RDONLY | os.O_DIRECT)
    buffer = mmap.mmap(-1, BLOCK_BYTES)
    for block in range(blocks):
        if os.preadv(descriptor, [buffer], block * BLOCK_BYTES) < BLOCK_BYTES:
            return
        if line := shown(bytes(buffer), block):
            print(line)


def main() -> None:
    """Run the command of the arguments."""
    command, path, *rest = sys.argv[1:]
    try:
        if command == "write":
            write(path, rest[0], int(rest[1]))
        else:
            read(path, int(rest[0]))
    except OSError as error:
        print("error", error.errno, flush=True)
        sys.exit(1)


if __name__ == "__main__":
    main()
