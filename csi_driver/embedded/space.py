"""How much of the pool is promised, and how much more can be.

A volume, an extension or a VPG's reserve is promised in the very change that records it, so the pool is never promised
twice. One account answers for new volumes and for the free capacity: the smaller of the unpromised bytes and of the
free bytes of the pool's file system, less the reserve and less the bytes that are promised and not yet allocated.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass

from csi_driver.embedded.layouts import BLOCK_SIZE, GIGABYTE, Layout
from csi_driver.embedded.pool import Pool
from csi_driver.embedded.records import FACTS, GROUPS, TOTALS, VOLUMES, Fact, Group, Totals, Volume
from csi_driver.embedded.settings import StorageSettings
from csi_driver.embedded.store import Change, Store
from csi_driver.errors import HostFailure, InvalidRequest

_SIZE = "size_bytes"


class TotalsWrong(HostFailure):
    """The totals in the database are not the sum of its volumes."""

    def __init__(self, kept: Totals, counted: Totals) -> None:
        super().__init__(
            f"the totals in the pool's database are {kept}, expected the sum of its volumes, {counted}: "
            "it was changed by hand or is damaged; restore manager.sqlite and manager.sqlite-wal from a backup"
        )


class PoolTooLarge(InvalidRequest):
    """A pool size was asked for that the file system does not have."""

    def __init__(self, wanted: int, had: int) -> None:
        super().__init__(
            f"--size is {wanted} bytes, and the pool's file system has {had} for volumes "
            "(free and allocated bytes less --reserve); give a smaller --size, or --overcommit for tests and benchmarks"
        )


class NoSpace(Exception):
    """An allocation does not fit, and why; the caller names the API's error for its own case."""


@dataclass(frozen=True, slots=True)
class Taken:
    """What an allocation got: blocks of data, and how many of them came out of the VPG's reserve."""

    blocks: int
    from_reserved: int


class Space:
    """The pool's account."""

    def __init__(self, settings: StorageSettings, pool: Pool, store: Store) -> None:
        """Fix the pool's size at its first start and verify the totals. Raises PoolTooLarge, TotalsWrong."""
        self._settings = settings
        self._pool = pool
        self._store = store
        counted = Totals()
        for volume in store.all(VOLUMES):
            counted = counted.with_volume(volume)
        for group in store.all(GROUPS):
            counted = counted.with_group(group)
        kept = store.get(TOTALS, "pool") or Totals()
        if kept != counted:
            raise TotalsWrong(kept, counted)
        self.size_bytes = self._fixed_size()

    def _fixed_size(self) -> int:
        known = self._store.get(FACTS, _SIZE)
        wanted = self._settings.size_bytes
        if known is not None and (wanted is None or wanted == int(known.value)):
            return int(known.value)
        had = max(
            0, self._pool.free_bytes() + sum(self._pool.allocated_bytes().values()) - self._settings.reserve_bytes
        )
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
        """Return the raw blocks that new volumes can have now: what `take` goes by."""
        return min(self._unpromised_blocks(self.totals), self._room_blocks(self._store))

    def reserve_left_blocks(self, group: Group) -> int:
        """Return the blocks of data of a VPG's reserve that volumes can have now."""
        return min(group.blocks - group.used, self._room_blocks(self._store, group))

    def missing_targets(self, layout: Layout) -> str:
        """Say that a layout needs more storage targets than there are; empty = there are enough."""
        targets = max(1, self._settings.pretend_targets)
        if layout.redundancy_of(layout.data_blocks) == 0 or targets >= layout.targets:
            return ""
        return f"the layout needs {layout.targets} targets, this pool has {targets}"

    def take(self, change: Change, layout: Layout, capacity: float | str, group: Group | None) -> Taken:
        """Find room for `capacity` (decimal GB or "MAX"). Raises NoSpace. Nothing is promised yet."""
        if reason := self.missing_targets(layout):
            raise NoSpace(reason)
        totals = change.get(TOTALS, "pool") or Totals()
        reserve = group.blocks - group.used if group else 0
        open_pool = 0 if group and not group.overflow else self._data_blocks_that_fit(layout, totals)
        unpromised, room = reserve + open_pool, self._room_blocks(change, group)
        fits = min(unpromised, room)
        if isinstance(capacity, str):
            blocks = fits // layout.granule_blocks * layout.granule_blocks
            least = GIGABYTE // BLOCK_SIZE - layout.granule_blocks
        else:
            blocks = least = layout.blocks_of(capacity)
            if blocks <= 0:
                step = layout.granule_blocks * BLOCK_SIZE
                raise NoSpace(f"asked {capacity:g} GB, and the layout is allocated in steps of {step} bytes")
        if blocks < least or blocks > fits:
            free = self._pool.free_bytes() if self._settings.overcommit else room * BLOCK_SIZE
            raise NoSpace(
                f"asked {max(blocks, least) * BLOCK_SIZE} bytes; {unpromised * BLOCK_SIZE} are unpromised in the pool, "
                f"{free} free in its file system: the smaller counts"
            )
        return Taken(blocks, min(blocks, reserve))

    def _unpromised_blocks(self, totals: Totals) -> int:
        return max(0, self.total_blocks - totals.promised)

    def _data_blocks_that_fit(self, layout: Layout, totals: Totals) -> int:
        granule = layout.granule_blocks
        return self._unpromised_blocks(totals) // (granule + layout.redundancy_of(granule)) * granule

    def _room_blocks(self, view: Change | Store, group: Group | None = None) -> int:
        """Return the blocks of data that the file system can still hold, the reserve of `group` included.

        Not counted: what other programs write there later. With `overcommit` only the reserve is kept free.
        """
        spare = self._pool.free_bytes() - self._settings.reserve_bytes
        if self._settings.overcommit:
            return sys.maxsize if spare >= 0 else 0
        own = (group.blocks - group.used) * BLOCK_SIZE if group else 0
        return max(0, spare - self._unallocated_bytes(view) + own) // BLOCK_SIZE

    def _unallocated_bytes(self, view: Change | Store) -> int:
        """Return the bytes that are promised to volumes and VPGs and take no space in the file system yet."""
        promised = (view.get(TOTALS, "pool") or Totals()).data
        for known in self._store.all(GROUPS):
            group = view.get(GROUPS, known.name)
            promised += group.blocks - group.used if group else 0
        # What a change has put and not committed has no file yet.
        allocated = self._pool.allocated_bytes()
        held = sum(min(allocated.get(volume.uuid, 0), volume.bytes) for volume in self._store.all(VOLUMES))
        return max(0, promised * BLOCK_SIZE - held)

    def record(self, change: Change, volume: Volume | None, before: Volume | None = None) -> None:
        """Put a volume (or remove `before`, for None) and promise or give back its space in the same change."""
        totals = change.get(TOTALS, "pool") or Totals()
        if before is not None:
            totals = totals.with_volume(before, -1)
        if volume is not None:
            totals = totals.with_volume(volume)
            change.put(VOLUMES, volume.name, volume)
        elif before is not None:
            change.delete(VOLUMES, before.name)
        change.put(TOTALS, "pool", totals)

    def record_group(self, change: Change, group: Group | None, before: Group | None = None) -> None:
        """Put a VPG (or remove `before`, for None) and account for its reserve in the same change."""
        totals = change.get(TOTALS, "pool") or Totals()
        if before is not None:
            totals = totals.with_group(before, -1)
        if group is not None:
            totals = totals.with_group(group)
            change.put(GROUPS, group.name, group)
        elif before is not None:
            change.delete(GROUPS, before.name)
        change.put(TOTALS, "pool", totals)
