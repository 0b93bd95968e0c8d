"""Encrypted devices seen from below: the header under one, and whether anything was ever written through it.

What was never written decrypts to noise, so a fresh encrypted device does not look blank from above. From below it
does: behind the header, every byte is as it was when the volume was made.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator
from dataclasses import replace

from csi_driver.errors import HostFailure, SystemCallFailed
from csi_driver.host import blank, device_mapper, luks_header
from csi_driver.host_model import DamagedHeader, DeviceNumber, LuksHeader, OpenDevice


def read_header(device: OpenDevice) -> LuksHeader | DamagedHeader | None:
    """Return the LUKS header of an open device, which was opened past the page cache; None without a trace of one."""
    with blank.DirectReader(device, luks_header.LARGEST_READ_BYTES) as reader:
        return luks_header.find_header(reader.read, device.device.size_bytes)


@contextlib.contextmanager
def as_written(device: OpenDevice, open_number: Callable[[DeviceNumber], int]) -> Iterator[OpenDevice]:
    """Give the bytes of a device as they are kept: its own, or, of an encrypted one, those of the device below.

    Raises `HostFailure` when what is below cannot be read or has no header: then nothing is known.
    """
    below = device_mapper.below(device.device.number)
    if below is None:
        yield device
        return
    path = device.device.path
    with contextlib.ExitStack() as held:
        try:
            # What was written from above and is still in memory has to be seen below.
            os.fsync(device.fd)
            found = open_number(below)
            held.callback(os.close, found)
            fd = os.open(f"/proc/self/fd/{found}", os.O_RDONLY | os.O_DIRECT | os.O_CLOEXEC)
            held.callback(os.close, fd)
        except OSError as error:
            raise SystemCallFailed(f"open the device {below} under {path}", error.errno or 0) from error
        whole = OpenDevice(fd, replace(device.device, size_bytes=os.lseek(fd, 0, os.SEEK_END)))
        header = read_header(whole)
        if not isinstance(header, LuksHeader):
            raise HostFailure(f"the device {below} under {path} has no LUKS header: what it holds is not known")
        yield OpenDevice(fd, device.device, start_bytes=header.data_offset_bytes)
