# SPDX-License-Identifier: Apache-2.0
"""Read whether a device is blank, with O_DIRECT, each read complete and without error.

`probe_places` are the places of the quick probe: head, tail, and all places of superblocks and their copies.
`first_data` reads the whole device.
"""

from __future__ import annotations

import ctypes
import errno
import functools
import mmap
import os
import re
from collections.abc import Callable, Iterator, Sequence
from typing import Self

from csi_driver.deadline import Deadline
from csi_driver.errors import DeadlineReached, HostFailure
from csi_driver.host.async_reads import READS_AT_ONCE, read_at_once
from csi_driver.host.syscalls import libc, system_call
from csi_driver.host_model import OpenDevice
from csi_driver.model import GIB, MIB

_ALIGNMENT = 4096
_WHOLE_BYTES, _ENDS_BYTES = 1 * MIB, 4 * MIB
_START_BYTES = 68 * 1024
"""From the start of a filesystem to the end of its superblock: that of btrfs is the last, 4 KiB at 64 KiB."""
_PROMISE_RAID_FROM_END = 3087 * 512
_SAMPLES = 64
_PLACE_BYTES = 4096
_AG_WINDOW_BYTES = 64 * 1024
_PROBE_BUFFER_BYTES = 1 * MIB
_SCAN_BUFFER_BYTES, _SCAN_READ_BYTES = 4 * MIB, 2 * MIB
_PROGRESS_EVERY_BYTES, _PROGRESS_STEPS = 1 * GIB, 20
_DATA = re.compile(rb"[^\0]")

Place = tuple[int, int]
"""Offset and length in bytes."""


def probe_places(size_bytes: int) -> list[Place]:
    """Return (offset, length) of the places of the quick probe, sorted, merged, within the device.

    - The first and last MiB: all primary superblocks of filesystems, volume managers, RAID, encryption and partition
      tables, and the copies at the end (GPT; md 0.90 and 1.0; ZFS labels; LVM).
    - 68 KiB at each further MiB up to the fourth, from both ends: where partitions, the second headers of LUKS2, VMFS,
      bcachefs's second superblock, and LVM's second metadata begin.
    - ext2/3/4 copies: block groups 1, 2 and the powers of 3, 5 and 7, for block sizes from 1 to 64 KiB (a group has
      8 blocks for each byte of a block).
    - btrfs mirrors: 64 KiB, 64 MiB, 256 GiB.
    - XFS: the starts of allocation groups, 4, 8, 16 or 32 of a device, or one per TiB (mkfs.xfs).
    - A sample at each 64th of the device.
    """
    places = [*_ends(size_bytes), *_ext_copies(size_bytes), *_xfs_groups(size_bytes)]
    places += [(offset, _PLACE_BYTES) for offset in (64 * MIB, 256 * GIB)]
    places += [(size_bytes * part // _SAMPLES, _PLACE_BYTES) for part in range(_SAMPLES)]
    return _merged(places, size_bytes)


def _ends(size_bytes: int) -> Iterator[Place]:
    yield 0, _WHOLE_BYTES
    yield size_bytes - _WHOLE_BYTES, _WHOLE_BYTES
    yield size_bytes - _PROMISE_RAID_FROM_END, _PLACE_BYTES
    for distance in range(_WHOLE_BYTES, _ENDS_BYTES + 1, MIB):
        yield distance, _START_BYTES
        yield size_bytes - distance, _START_BYTES


def _ext_copies(size_bytes: int) -> Iterator[Place]:
    for log_block in range(10, 17):
        group_bytes = 8 << (2 * log_block)
        groups = size_bytes // group_bytes
        for group in sorted({1, 2, *_powers(3, groups), *_powers(5, groups), *_powers(7, groups), groups}):
            # With blocks of 1 KiB the first block group begins at block 1.
            yield group * group_bytes, _PLACE_BYTES


def _powers(base: int, limit: int) -> Iterator[int]:
    power = base
    while power <= limit:
        yield power
        power *= base


def _xfs_groups(size_bytes: int) -> Iterator[Place]:
    blocks = size_bytes // 4096
    for count in (4, 8, 16, 32):
        group_bytes = -(-blocks // count) * 4096
        for group in range(1, count):
            yield group * group_bytes - _AG_WINDOW_BYTES // 2, _AG_WINDOW_BYTES
    for start in range(1024 * GIB, min(size_bytes, 64 * 1024 * GIB), 1024 * GIB):
        yield start - _PLACE_BYTES, 2 * _PLACE_BYTES


def _merged(places: list[Place], size_bytes: int) -> list[Place]:
    merged: list[Place] = []
    for offset, length in sorted(places):
        start = max(0, offset) // _ALIGNMENT * _ALIGNMENT
        end = min(size_bytes, -(-(offset + length) // _ALIGNMENT) * _ALIGNMENT)
        if end <= start:
            continue
        if merged and start <= sum(merged[-1]):
            merged[-1] = (merged[-1][0], max(end, sum(merged[-1])) - merged[-1][0])
        else:
            merged.append((start, end - start))
    return merged


class DirectReader:
    """Reads an open device into an aligned buffer, which leaving the context frees."""

    def __init__(self, device: OpenDevice, buffer_bytes: int = _PROBE_BUFFER_BYTES) -> None:
        self._device = device
        # Private memory costs a third of shared memory; a program that is started meanwhile must not get its pages.
        self._buffer = mmap.mmap(-1, buffer_bytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        self._buffer.madvise(mmap.MADV_DONTFORK)
        self._view = memoryview(self._buffer)
        self._first = ctypes.c_char.from_buffer(self._buffer)
        self._address = ctypes.addressof(self._first)
        self._compare = libc().memcmp

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        del self._first
        self._view.release()
        self._buffer.close()

    def read(self, offset: int, length: int) -> bytes:
        """Return those bytes, at most a buffer full. Raises `HostFailure` when one cannot be read."""
        self._fill(0, offset, length)
        return bytes(self._view[:length])

    def first_data(self, pieces: Sequence[Place]) -> int | None:
        """Read the pieces, at most a buffer full, at the same time; return the offset of the first byte of data.

        Raises `HostFailure` when a byte cannot be read.
        """
        start = self._device.start_bytes
        moved = [(start + offset, length) for offset, length in pieces]
        counts = read_at_once(self._device.fd, self._address, moved) if len(pieces) > 1 else [0]
        total = 0
        for (offset, length), count in zip(pieces, counts, strict=True):
            if count < 0:
                raise self._unreadable(start + offset, -count)
            self._fill(total, offset, length, done=count)
            total += length
        if self._is_zero(total):
            return None
        data = _DATA.search(self._view, 0, total)
        at = data.start() if data is not None else 0
        for offset, length in pieces:
            if at < length:
                return offset + at
            at -= length
        return None

    def _is_zero(self, length: int) -> bool:
        # All bytes are zero when the first is and each equals the next; memcmp runs without the interpreter's lock.
        address = ctypes.c_void_p(self._address)
        following = ctypes.c_void_p(self._address + 1)
        return self._buffer[0] == 0 and self._compare(address, following, ctypes.c_size_t(length - 1)) == 0

    def _fill(self, place: int, offset: int, length: int, *, done: int = 0) -> None:
        """Read a piece to a place in the buffer, of which `done` bytes are there."""
        while done < length:
            at = self._device.start_bytes + offset + done
            try:
                count = os.preadv(self._device.fd, [self._view[place + done : place + length]], at)
            except OSError as error:
                raise self._unreadable(at, error.errno or 0) from error
            if count == 0:
                path, size = self._device.device.path, self._device.device.size_bytes
                raise HostFailure(f"{path} ends at byte {at}, expected {size}: its content is unknown")
            done += count

    def _unreadable(self, at: int, number: int) -> HostFailure:
        name = errno.errorcode.get(number, str(number))
        return HostFailure(f"{self._device.device.path} cannot be read at byte {at} ({name}): its content is unknown")


@functools.lru_cache(maxsize=8)  # a function of the size alone; volumes have few sizes
def _batches(size_bytes: int) -> Sequence[Sequence[Place]]:
    """Return the places of the quick probe in batches that fit into the buffer and can be read at the same time."""
    batches: list[list[Place]] = [[]]
    room = _PROBE_BUFFER_BYTES
    for start, length in probe_places(size_bytes):
        done = 0
        while done < length:
            if not room or len(batches[-1]) == READS_AT_ONCE:
                batches.append([])
                room = _PROBE_BUFFER_BYTES
            part = min(length - done, room)
            batches[-1].append((start + done, part))
            done, room = done + part, room - part
    return batches


def first_data_in_places(device: OpenDevice, deadline: Deadline) -> int | None:
    """Return the offset of the first byte that is not zero in the places of the quick probe."""
    with DirectReader(device) as reader:
        for batch in _batches(device.device.size_bytes):
            if deadline.expired():
                raise DeadlineReached(f"reading {device.device.path}")
            found = reader.first_data(batch)
            if found is not None:
                return found
    return None


def wipe_places(device: OpenDevice) -> None:
    """Write zeroes over the places of the quick probe and over the first and last 4 MiB, and sync."""
    size_bytes = device.device.size_bytes
    ends = [(0, _ENDS_BYTES), (size_bytes - _ENDS_BYTES, _ENDS_BYTES)]
    with mmap.mmap(-1, _PROBE_BUFFER_BYTES) as zeroes, memoryview(zeroes) as view:
        for offset, length in _merged([*ends, *probe_places(size_bytes)], size_bytes):
            done = 0
            while done < length:
                part = min(len(zeroes), length - done)
                with system_call(f"write zeroes to {device.device.path}"):
                    done += os.pwritev(device.fd, [view[:part]], offset + done)
    with system_call(f"sync {device.device.path}"):
        os.fsync(device.fd)


def write_through(device: OpenDevice, offset: int, data: bytes) -> None:
    """Write whole blocks at once, and sync."""
    with mmap.mmap(-1, len(data)) as aligned, system_call(f"write to {device.device.path}"):
        aligned[:] = data
        if os.pwrite(device.fd, aligned, device.start_bytes + offset) != len(data):
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        os.fsync(device.fd)


def progress_step(size_bytes: int) -> int:
    """Return after how many bytes a scan of a device of this size reports progress."""
    return max(_PROGRESS_EVERY_BYTES, -(-size_bytes // _PROGRESS_STEPS))


def first_data(device: OpenDevice, *, deadline: Deadline | None, progress: Callable[[int, int], None]) -> int | None:
    """Read the whole device; return the first offset of data. Calls `progress(done_bytes, total_bytes)`."""
    size = device.device.size_bytes
    reported, step = 0, progress_step(size)
    with DirectReader(device, _SCAN_BUFFER_BYTES) as reader:
        for offset in range(0, size, _SCAN_BUFFER_BYTES):
            if deadline is not None and deadline.expired():
                raise DeadlineReached(f"the reading of {device.device.path} ({size} bytes)")
            end = min(size, offset + _SCAN_BUFFER_BYTES)
            starts = range(offset, end, _SCAN_READ_BYTES)
            found = reader.first_data([(start, min(_SCAN_READ_BYTES, end - start)) for start in starts])
            if found is not None:
                return found
            if offset - reported >= step:
                reported = offset
                progress(offset, size)
    progress(size, size)
    return None
