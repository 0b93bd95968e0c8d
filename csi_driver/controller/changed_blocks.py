# SPDX-License-Identifier: Apache-2.0
"""GetMetadataAllocated and GetMetadataDelta: blocks that a snapshot holds, and that changed since an earlier one.

Offsets are those of the device that a pod sees: behind the LUKS header of an encrypted volume.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from csi_driver.controller.snapshots import FoundSnapshot, Snapshots, described
from csi_driver.deadline import Deadline
from csi_driver.errors import CapacityOutOfRange, InvalidRequest, SnapshotNotFound, shown

_MOST_RANGES = 4096
"""In one message, which may have 4 MiB."""
Ranges = list[tuple[int, int]]
"""Offset and length in bytes."""


@dataclass(frozen=True, slots=True)
class ChangedBlocks:
    snapshots: Snapshots

    def allocated(
        self, snapshot_id: str, offset: int, most: int, *, deadline: Deadline
    ) -> tuple[int, Iterator[Ranges]]:
        """Return the size of a snapshot, and the ranges from `offset` that hold data, at most `most` at a time."""
        return self._pages(self._require(snapshot_id, deadline), None, offset, most, deadline)

    def delta(
        self, base_id: str, target_id: str, offset: int, most: int, *, deadline: Deadline
    ) -> tuple[int, Iterator[Ranges]]:
        """Return the size of the target, and the ranges from `offset` in which it may differ from the base."""
        base, target = self._require(base_id, deadline), self._require(target_id, deadline)
        if base.snapshot.volume_uuid != target.snapshot.volume_uuid:
            raise InvalidRequest(
                f"base_snapshot_id: expected a snapshot of the same volume as {shown(target_id)}, got {shown(base_id)}"
            )
        return self._pages(target, base, offset, most, deadline)

    def _require(self, snapshot_id: str, deadline: Deadline) -> FoundSnapshot:
        found = self.snapshots.find(snapshot_id, deadline=deadline)
        if found is None:
            raise SnapshotNotFound(snapshot_id)
        self.snapshots.features.require(found.zone, "changed_blocks", deadline=deadline)
        return found

    def _pages(
        self, target: FoundSnapshot, base: FoundSnapshot | None, offset: int, most: int, deadline: Deadline
    ) -> tuple[int, Iterator[Ranges]]:
        size_bytes = described(target.zone, target.snapshot).size_bytes
        if offset > size_bytes:  # at the end, where a resumed stream may begin, nothing is left to tell
            raise CapacityOutOfRange(f"starting_offset: expected at most the size of {size_bytes} bytes, got {offset}")
        header_bytes, count = target.snapshot.size_bytes - size_bytes, min(most or _MOST_RANGES, _MOST_RANGES)
        old = None if base is None else base.snapshot

        def pages() -> Iterator[Ranges]:
            place: int | None = offset + header_bytes
            while place is not None:
                page = target.management.changed_ranges(
                    target.snapshot, old, offset=place, count=count, deadline=deadline
                )
                if page.ranges:
                    yield [(start - header_bytes, length) for start, length in page.ranges]
                place = page.next_offset

        return size_bytes, pages()
