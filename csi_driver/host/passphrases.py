"""A passphrase on its way to cryptsetup: a file in memory that it inherits.

It is in no argument list, no environment and on no disk.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator


@contextlib.contextmanager
def held(passphrase: str) -> Iterator[int]:
    """Hold a passphrase in a file that exists in memory alone, has no name, and ends with the last who holds it."""
    fd = os.memfd_create("passphrase", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    try:
        os.write(fd, passphrase.encode())
        yield fd
    finally:
        os.close(fd)


def path_of(fd: int) -> str:
    """Return the path under which the program that inherits a descriptor finds it."""
    return f"/proc/self/fd/{fd}"
