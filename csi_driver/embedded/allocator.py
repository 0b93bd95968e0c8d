# SPDX-License-Identifier: Apache-2.0
"""The allocation of the pool's space.

Space is allocated in the change that records a volume, an extension or a snapshot, so it is never allocated twice. The
free capacity is the smaller of the unallocated bytes of the pool and of the free bytes of its filesystem, less the
reserve and less the allocated bytes that are not written yet. Blocks that a volume shares with a snapshot, or with its
source, count as not written.
"""

from __future__ import annotations

import math
import sys
import threading
from dataclasses import dataclass, replace

from csi_driver.deadline import SYSTEM_CLOCK, Clock
from csi_driver.embedded.layouts import BLOCK_SIZE, Layout
from csi_driver.embedded.model import FACTS, TOTALS, VOLUMES, Fact, Totals, Volume
from csi_driver.embedded.pool import Pool
from csi_driver.embedded.settings import StorageSettings
from csi_driver.embedded.store import Change, Store
from csi_driver.errors import HostFailure, InvalidRequest

_SIZE = "size_bytes"
_FEW = 256
"""Number of files that are scanned each time: it takes some milliseconds."""
_PAUSE_FACTOR = 19
_LONGEST_PAUSE_S = 10.0


class TotalsWrong(HostFailure):
    def __init__(self, kept: Totals, counted: Totals) -> None:
        super().__init__(
            f"the totals in the pool's database are {kept}, expected the sum of its volumes, {counted}: "
            "it was changed by hand or is damaged; restore manager.sqlite and manager.sqlite-wal from a backup"
        )


class PoolTooLarge(InvalidRequest):
    def __init__(self, wanted: int, had: int) -> None:
        super().__init__(
            f"--size: expected at most the {had} bytes that the pool's filesystem has for volumes (free and allocated "
            f"bytes less --reserve), got {wanted}; set a smaller --size, or --overcommit for tests and benchmarks"
        )


class NoSpace(Exception):
    """An allocation does not fit."""


@dataclass(frozen=True, slots=True)
class _Scan:
    """Bytes that the files of the volumes occupied, and free bytes, at the time of a scan."""

    held_bytes: int
    free_bytes: int
    until_s: float


class Allocator:
    def __init__(self, settings: StorageSettings, pool: Pool, store: Store, clock: Clock = SYSTEM_CLOCK) -> None:
        """Set the pool's size at its first start and verify the totals. Raises PoolTooLarge, TotalsWrong."""
        self._settings = settings
        self._pool = pool
        self._store = store
        self._clock = clock
        self._scanning = threading.Lock()
        self._scan: _Scan | None = None
        counted = Totals()
        for volume in store.all(VOLUMES):
            counted = counted.with_volume(volume)
        # An earlier version counts no shared blocks, and drops their number.
        if replace(self.totals, shared=counted.shared) != counted:
            raise TotalsWrong(self.totals, counted)
        if self.totals != counted:
            store.write(lambda change: change.put(TOTALS, "pool", counted))
        self.size_bytes = self._fixed_size()

    def _fixed_size(self) -> int:
        known = self._store.get(FACTS, _SIZE)
        wanted = self._settings.size_bytes
        if known is not None and (wanted is None or wanted == int(known.value)):
            return int(known.value)
        occupied = max(0, sum(self._pool.allocated_bytes().values()) - self.totals.shared * BLOCK_SIZE)
        had = max(0, self._pool.free_bytes() + occupied - self._settings.reserve_bytes)
        if wanted is not None and wanted > had and not self._settings.overcommit:
            raise PoolTooLarge(wanted, had)
        size = had if wanted is None else wanted
        self._store.write(lambda change: change.put(FACTS, _SIZE, Fact(str(size))))
        return size

    @property
    def totals(self) -> Totals:
        return self._store.get(TOTALS, "pool") or Totals()

    @property
    def total_blocks(self) -> int:
        return self.size_bytes // BLOCK_SIZE

    def available_blocks(self) -> int:
        """Return the raw blocks that new volumes can have now, by the account of `allocate`."""
        unallocated = self._unallocated_blocks(self.totals)
        return min(unallocated, self._free_blocks(self._store, unallocated))

    def allocate(self, change: Change, layout: Layout, capacity_gb: float) -> int:
        """Return the blocks of data for a capacity; `record` allocates them. Raises NoSpace."""
        targets = max(1, self._settings.pretend_targets)
        if layout.redundancy_of(layout.data_blocks) and targets < layout.targets:
            raise NoSpace(f"the layout needs {layout.targets} targets, this pool has {targets}")
        granule = layout.granule_blocks
        raw = self._unallocated_blocks(change.get(TOTALS, "pool") or Totals())
        unallocated = raw // (granule + layout.redundancy_of(granule)) * granule
        blocks = layout.blocks_of(capacity_gb)
        if blocks <= 0:
            step = granule * BLOCK_SIZE
            raise NoSpace(f"asked {capacity_gb:g} GB, and the layout is allocated in steps of {step} bytes")
        if blocks > min(unallocated, self._free_blocks(change, blocks)):
            overcommit = self._settings.overcommit
            free = self._pool.free_bytes() if overcommit else self._free_blocks(change, sys.maxsize) * BLOCK_SIZE
            raise NoSpace(
                f"asked {blocks * BLOCK_SIZE} bytes; {unallocated * BLOCK_SIZE} are unallocated in the "
                f"pool, {free} free in its file system: the smaller counts"
            )
        return blocks

    def record(self, change: Change, volume: Volume | None, before: Volume | None = None) -> None:
        """Put a volume, or remove `before` for None, and account for its space in the same change."""
        totals = change.get(TOTALS, "pool") or Totals()
        if before is not None:
            totals = totals.with_volume(before, -1)
            if volume is None and before.shared_blocks:
                # Shared blocks did not become free with the file, so a scan that counted them is wrong.
                with self._scanning:
                    self._scan = None
        if volume is not None:
            totals = totals.with_volume(volume)
            change.put(VOLUMES, volume.name, volume)
        elif before is not None:
            change.delete(VOLUMES, before.name)
        change.put(TOTALS, "pool", totals)

    def reserve(self, change: Change, volume: Volume, occupied_bytes: int) -> None:
        """Keep space for a volume that is to be cut; its file has these bytes on disk. Raises NoSpace.

        The snapshot shares them, so the volume takes new ones when it writes there, at most that many until the next
        cut: what earlier snapshots alone hold is no longer free. The files of snapshots are never written to.
        """
        free, least = self._pool.free_bytes(), self._settings.reserve_bytes
        if free < least:
            raise NoSpace(f"{free} bytes are free in the pool's filesystem, expected at least {least} (--reserve)")
        shared_blocks = self._shared_blocks(occupied_bytes)
        more = shared_blocks - volume.shared_blocks
        # Also where nothing more is kept: its writes since the last cut took the space that was kept for them.
        missing_bytes = more * BLOCK_SIZE - self._unpromised_bytes(change, more * BLOCK_SIZE)
        if shared_blocks and missing_bytes > 0:
            raise NoSpace(
                f"the volume occupies {occupied_bytes} bytes; times --snapshot-overcommit "
                f"{self._settings.snapshot_overcommit:g} they must stay free for writes to it, and {missing_bytes} are "
                "missing in the pool's filesystem; delete volumes or snapshots"
            )
        cut = replace(volume, shared_blocks=shared_blocks, snapshots=volume.snapshots + 1)
        self.record(change, cut, volume)

    def share(self, change: Change, volume: Volume, occupied_bytes: int) -> None:
        """Account for a cut volume's writes since `reserve`: its snapshot has these bytes on disk."""
        self.record(change, replace(volume, shared_blocks=self._shared_blocks(occupied_bytes)), volume)

    def _shared_blocks(self, occupied_bytes: int) -> int:
        return math.ceil(occupied_bytes * self._settings.snapshot_overcommit / BLOCK_SIZE)

    def release(self, change: Change, volume: Volume) -> None:
        """Account for the removal of one of a volume's snapshots: without any its blocks are its own.

        A volume made from a source goes on sharing blocks with that.
        """
        left = volume.snapshots - 1
        shared_blocks = volume.shared_blocks if left or volume.source is not None else 0
        self.record(change, replace(volume, shared_blocks=shared_blocks, snapshots=left), volume)

    def _unallocated_blocks(self, totals: Totals) -> int:
        return max(0, self.total_blocks - totals.allocated)

    def _free_blocks(self, view: Change | Store, enough: int) -> int:
        """Return the blocks of data that the filesystem can still hold; see `_unpromised_bytes`."""
        return max(0, self._unpromised_bytes(view, enough * BLOCK_SIZE)) // BLOCK_SIZE

    def _unpromised_bytes(self, view: Change | Store, enough_bytes: int) -> int:
        """Return the free bytes less those that the volumes still need; negative when those are missing.

        If there are enough even when no allocated block is written yet, the files are not scanned, and the result may
        be too small. Later writes of other programs are not counted. With `overcommit` only the reserve is kept.
        """
        free = self._pool.free_bytes()
        spare = free - self._settings.reserve_bytes
        if self._settings.overcommit:
            return sys.maxsize if spare >= 0 else 0
        totals = view.get(TOTALS, "pool") or Totals()
        allocated = (totals.data + totals.shared) * BLOCK_SIZE
        if spare - allocated >= enough_bytes:
            return spare - allocated
        scan = self._scan_files()
        # Space that became free since may have come from the volumes.
        held = scan.held_bytes - max(0, free - scan.free_bytes)
        return spare - max(0, allocated - held)

    def _scan_files(self) -> _Scan:
        """Return the space that the volumes' files occupy; of many files the result may be some seconds old.

        A scan takes time for each file, so at most a twentieth of the time is spent on scans. An older scan is as
        good: the sum of free and occupied bytes is changed only by other programs, because a block that a volume
        writes, trims or frees goes from one to the other.
        """
        with self._scanning:
            before = self._clock.monotonic()
            if self._scan is None or before >= self._scan.until_s:
                occupied = self._pool.allocated_bytes()
                volumes = self._store.all(VOLUMES)
                held = sum(min(occupied.get(volume.uuid, 0), volume.bytes) for volume in volumes)
                # Read last: blocks written during the scan are then counted nowhere, rather than twice.
                free, after = self._pool.free_bytes(), self._clock.monotonic()
                pause_s = min((after - before) * _PAUSE_FACTOR, _LONGEST_PAUSE_S) if len(volumes) > _FEW else 0.0
                self._scan = _Scan(held, free, after + pause_s)
            return self._scan
