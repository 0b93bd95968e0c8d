# SPDX-License-Identifier: Apache-2.0
"""Asynchronous reads of a device, by the kernel's AIO."""

from __future__ import annotations

import ctypes
import os
import struct
from collections.abc import Sequence

from csi_driver.errors import SystemCallFailed
from csi_driver.host.syscalls import libc, syscall

_AIO_CALLS = {"x86_64": (206, 207, 208, 209), "aarch64": (0, 1, 4, 2)}
"""Numbers of io_setup, io_destroy, io_getevents and io_submit."""
_IOCB, _IO_EVENT = struct.Struct("=QIiHhIQQqQII"), struct.Struct("=QQqq")
"""struct iocb and struct io_event of include/uapi/linux/aio_abi.h (little endian)."""
READS_AT_ONCE = 128
_idle_contexts: list[bytes] = []
"""Contexts without a read in progress, kept because io_destroy takes 30 ms: as many as there were calls at once."""


def read_at_once(fd: int, address: int, pieces: Sequence[tuple[int, int]]) -> list[int]:
    """Read up to READS_AT_ONCE (offset, length) pieces at the same time, one behind the other, to a memory address.

    Return for each the number of bytes or, negative, of the error. 0: not read, as all are when the kernel has no
    asynchronous reads (no CONFIG_AIO), or too many (fs.aio-max-nr). When it returns, also by an exception, no read is
    in progress.
    """
    counts = [0] * len(pieces)
    if (calls := _AIO_CALLS.get(os.uname().machine)) is None:
        return counts
    setup, destroy, getevents, submit = calls
    requests = bytearray()
    for number, (offset, length) in enumerate(pieces):
        requests += _IOCB.pack(number, 0, 0, 0, 0, fd, address, length, offset, 0, 0, 0)
        address += length
    first = ctypes.addressof((ctypes.c_char * len(requests)).from_buffer(requests))
    pointers = struct.pack(f"={len(pieces)}Q", *range(first, first + len(requests), _IOCB.size))
    events = ctypes.create_string_buffer(_IO_EVENT.size * len(pieces))
    try:
        context = _idle_contexts.pop()
    except IndexError:
        made = ctypes.create_string_buffer(8)
        try:
            syscall("io_setup", setup, READS_AT_ONCE, made)
        except SystemCallFailed:
            return counts
        context = made.raw
    (handle,) = struct.unpack("=q", context)
    try:
        running = syscall("io_submit", submit, handle, len(pieces), pointers)
        while running:
            done = syscall("io_getevents", getevents, handle, running, running, events, None)
            for number, _, count, _ in _IO_EVENT.iter_unpack(events.raw[: done * _IO_EVENT.size]):
                counts[number] = count
            running -= done
    except BaseException as error:
        libc().syscall(ctypes.c_long(destroy), ctypes.c_long(handle))  # waits for the reads: the memory is theirs
        if isinstance(error, SystemCallFailed):
            return [0] * len(pieces)  # refused, or interrupted by a signal
        raise
    _idle_contexts.append(context)
    return counts
