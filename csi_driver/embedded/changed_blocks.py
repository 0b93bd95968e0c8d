# SPDX-License-Identifier: Apache-2.0
"""Changed blocks: differences of two snapshots of a volume, by the addresses of their extents. Nothing is read.

The files of snapshots are never written to. While both exist, a block with one address in both is one block, so it has
one content, and a part without a block reads as zeros. Everything else counts as changed: too much is reported rather
than too little. A remembered map of a deleted file would prove nothing, as its blocks may have got another content.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from csi_driver.embedded.documents import (
    NOT_SUPPORTED,
    SNAPSHOT_NOT_FOUND,
    SOURCE_BUSY,
    SOURCE_NOT_USABLE,
    ApiError,
)
from csi_driver.embedded.model import SNAPSHOTS, Document, Snapshot
from csi_driver.embedded.pool import Pool, opened
from csi_driver.embedded.requests import ChangesQuery
from csi_driver.embedded.settings import Reflinks
from csi_driver.embedded.store import Store
from csi_driver.host_model import Extent

_EXTENTS_AT_ONCE = 4096
_ATTEMPTS = 3
_EVERYTHING = 1 << 63
_Ranges = list[tuple[int, int]]


@dataclass(eq=False)
class ChangedBlocks:
    """`why_not`: why changes cannot be found here; "" when they can."""

    store: Store
    pool: Pool
    reflinks: Reflinks | None

    def __post_init__(self) -> None:
        self.why_not = self.pool.why_no_reflinks
        if self.reflinks is not None and not self.why_not:
            with opened(self.pool.snapshots) as directory:
                self.why_not = self.reflinks.why_not_comparable(directory)

    def page(self, name: str, query: ChangesQuery) -> Document:
        """Return up to `count` changed ranges from `offset` on, ascending; `next` is where the following page begins.

        Raises ApiError.
        """
        if self.why_not or self.reflinks is None:
            raise ApiError(NOT_SUPPORTED, self.why_not)
        with contextlib.ExitStack() as stack:
            target, target_fd = self._opened(stack, name, query.uuid)
            sides, shared_bytes = [target_fd], target.bytes
            if query.base_uuid is not None:
                base, base_fd = self._opened(stack, query.base, query.base_uuid)
                if base.volume_uuid != target.volume_uuid:
                    raise ApiError(
                        SOURCE_NOT_USABLE, f"snapshots {base.name} and {target.name} are not of the same volume"
                    )
                sides.append(base_fd)
                shared_bytes = min(base.bytes, target.bytes)
            ranges, end = _changes(self.reflinks, sides, shared_bytes, query.offset)
        # Behind the end of a smaller base the rest is new, whether or not it has data.
        if end >= shared_bytes and shared_bytes < target.bytes:
            begin = max(shared_bytes, query.offset)
            ranges = merged([*ranges, (begin, target.bytes - begin)] if begin < target.bytes else ranges)
            end = target.bytes
        if len(ranges) > query.count:
            end = ranges[query.count][0]
        following = end if end < target.bytes else None
        return {"ranges": [list(each) for each in ranges[: query.count]], "next": following, "bytes": target.bytes}

    def _opened(self, stack: contextlib.ExitStack, name: str, identity: str) -> tuple[Snapshot, int]:
        """Open the file of a snapshot. While it is open, its blocks keep their content, also when it is deleted."""
        self._require(name, identity)  # before, too: a cut that is made again replaces its file
        try:
            descriptor = stack.enter_context(opened(self.pool.snapshot_file(identity)))
        except FileNotFoundError as problem:
            raise ApiError(SNAPSHOT_NOT_FOUND, f"Snapshot not found: {name}") from problem
        return self._require(name, identity), descriptor

    def _require(self, name: str, identity: str) -> Snapshot:
        snapshot = self.store.get(SNAPSHOTS, name)
        if snapshot is None or snapshot.uuid != identity or not snapshot.is_ready:
            raise ApiError(SNAPSHOT_NOT_FOUND, f"Snapshot not found: {name}")
        return snapshot


def _changes(reflinks: Reflinks, sides: Sequence[int], until: int, offset: int) -> tuple[_Ranges, int]:
    """Return the changes from `offset`, and the offset up to which they are known.

    A program that moves blocks, as xfs_fsr does, can give one file a block that the other had when its map was read.
    So the first map is read again: if it is the same, both were true when the other one was read.
    """
    if offset >= until:
        return [], offset
    for _ in range(_ATTEMPTS):
        target, *others = maps = [reflinks.extents(fd, offset, _EXTENTS_AT_ONCE) for fd in sides]
        if not others or reflinks.extents(sides[0], offset, _EXTENTS_AT_ONCE) == target:
            end = min(until, *(known_until(each) for each in maps))
            return merged(differences(others[0] if others else (), target, offset, end)), end
    raise ApiError(SOURCE_BUSY, "another program moves the blocks of the snapshots now; retry")


def known_until(extents: Sequence[Extent]) -> int:
    """Return the offset up to which a list of extents describes its file."""
    return extents[-1].end if len(extents) >= _EXTENTS_AT_ONCE else _EVERYTHING


def differences(base: Sequence[Extent], target: Sequence[Extent], offset: int, end: int) -> Iterator[tuple[int, int]]:
    """Yield offset and length of parts that may differ from `offset` to `end`. Both lists are in ascending order."""
    lefts, rights = iter(base), iter(target)
    left, right = next(lefts, None), next(rights, None)
    while offset < end:
        while left is not None and left.end <= offset:
            left = next(lefts, None)
        while right is not None and right.end <= offset:
            right = next(rights, None)
        stop = min(end, _stop(left, offset), _stop(right, offset))
        if not _is_same(_address(left, offset), _address(right, offset)):
            yield offset, stop - offset
        offset = stop


def _stop(extent: Extent | None, offset: int) -> int:
    """Return where the next extent begins, or the one at `offset` ends."""
    if extent is None:
        return _EVERYTHING
    return extent.offset if offset < extent.offset else extent.end


_ZEROS, _UNKNOWN = -1, -2


def _address(extent: Extent | None, offset: int) -> int:
    if extent is None or offset < extent.offset:
        return _ZEROS
    return _UNKNOWN if extent.address is None else extent.address + offset - extent.offset


def _is_same(one: int, other: int) -> bool:
    return one == other and one != _UNKNOWN


def merged(ranges: Iterator[tuple[int, int]] | _Ranges) -> _Ranges:
    """Join ranges that touch each other."""
    joined: _Ranges = []
    for offset, length in ranges:
        if joined and joined[-1][0] + joined[-1][1] == offset:
            joined[-1] = joined[-1][0], joined[-1][1] + length
        else:
            joined.append((offset, length))
    return joined
