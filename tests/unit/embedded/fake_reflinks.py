# SPDX-License-Identifier: Apache-2.0
"""Reflinks on any filesystem: the clone is a sparse copy, and an extent is a run of data."""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator
from dataclasses import dataclass

from csi_driver.errors import SystemCallFailed
from csi_driver.host_model import Extent


@dataclass(slots=True)
class FakeReflinks:
    """`refuses`: the error of the next clones, 0 = none."""

    refuses: int = 0

    def clone(self, source_fd: int, target_fd: int) -> None:
        if self.refuses:
            raise SystemCallFailed("FICLONE", self.refuses)
        os.ftruncate(target_fd, os.fstat(source_fd).st_size)
        for start, end in _data(source_fd):
            os.pwrite(target_fd, os.pread(source_fd, end - start, start), start)

    def count_extents(self, fd: int) -> int:
        return sum(1 for _ in _data(fd))

    def extents(self, fd: int, offset: int, most: int) -> list[Extent]:
        raise NotImplementedError

    def why_not_comparable(self, fd: int) -> str:
        return "the fake's extents have no addresses"


def _data(fd: int) -> Iterator[tuple[int, int]]:
    end, size = 0, os.fstat(fd).st_size
    while end < size:
        try:
            start = os.lseek(fd, end, os.SEEK_DATA)
        except OSError as problem:
            if problem.errno == errno.ENXIO:  # no more data
                return
            raise
        end = os.lseek(fd, start, os.SEEK_HOLE)
        yield start, end
