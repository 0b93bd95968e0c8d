"""How much of the pool is promised, and how much more can be.

A volume, an extension or a VPG's reserve is promised in the very change that records it, so the pool is never promised
twice. One account answers for new volumes and for the free capacity: the smaller of the unpromised bytes and of the
free bytes of the pool's file system, less the reserve and less the bytes that are promised and not yet allocated.
"""

from __future__ import annotations

import sys
import threading
from dataclasses import dataclass

from csi_driver.deadline import SYSTEM_CLOCK, Clock
from csi_driver.embedded.layouts import BLOCK_SIZE, GIGABYTE, Layout
from csi_driver.embedded.pool import Pool
from csi_driver.embedded.records import FACTS, GROUPS, TOTALS, VOLUMES, Fact, Group, Totals, Volume
from csi_driver.embedded.settings import StorageSettings
from csi_driver.embedded.store import Change, Store
from csi_driver.errors import HostFailure, InvalidRequest

_SIZE = "size_bytes"
_FEW = 256
"""Files that are looked at each time: that takes some milliseconds."""
_PAUSE_FACTOR = 19
_LONGEST_PAUSE_S = 10.0


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
            f"--size: expected at most the {had} bytes that the pool's filesystem has for volumes (free and allocated "
            f"bytes less --reserve), got {wanted}; set a smaller --size, or --overcommit for tests and benchmarks"
        )


class NoSpace(Exception):
    """An allocation does not fit, and why; the caller names the API's error for its own case."""


@dataclass(frozen=True, slots=True)
class Taken:
    """What an allocation got: blocks of data, and how many of them came out of the VPG's reserve."""

    blocks: int
    from_reserved: int


@dataclass(frozen=True, slots=True)
class _Look:
    """What the volumes' files held of what they are promised, and what was free, when they were looked at."""

    held_bytes: int
    free_bytes: int
    until_s: float


class Space:
    """The pool's account."""

    def __init__(self, settings: StorageSettings, pool: Pool, store: Store, clock: Clock = SYSTEM_CLOCK) -> None:
        """Fix the pool's size at its first start and verify the totals. Raises PoolTooLarge, TotalsWrong."""
        self._settings = settings
        self._clock = clock
        self._looking = threading.Lock()
        self._look: _Look | None = None
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
        unpromised = self._unpromised_blocks(self.totals)
        return min(unpromised, self._room_blocks(self._store, unpromised))

    def reserve_left_blocks(self, group: Group) -> int:
        """Return the blocks of data of a VPG's reserve that volumes can have now."""
        left = group.blocks - group.used
        return min(left, self._room_blocks(self._store, left, group))

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
        unpromised = reserve + open_pool
        if isinstance(capacity, str):
            fits = min(unpromised, self._room_blocks(change, unpromised, group))
            blocks = fits // layout.granule_blocks * layout.granule_blocks
            least = GIGABYTE // BLOCK_SIZE - layout.granule_blocks
        else:
            blocks = least = layout.blocks_of(capacity)
            if blocks <= 0:
                step = layout.granule_blocks * BLOCK_SIZE
                raise NoSpace(f"asked {capacity:g} GB, and the layout is allocated in steps of {step} bytes")
            fits = min(unpromised, self._room_blocks(change, blocks, group))
        if blocks < least or blocks > fits:
            room = self._room_blocks(change, sys.maxsize, group)
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

    def _room_blocks(self, view: Change | Store, enough: int, group: Group | None = None) -> int:
        """Return the blocks of data that the file system can still hold, the reserve of `group` included.

        Where there are `enough` even if nothing of what is promised were written yet, that is said without a look at
        the files, and less may be returned than there are. Not counted: what other programs write there later. With
        `overcommit` only the reserve is kept free.
        """
        free = self._pool.free_bytes()
        spare = free - self._settings.reserve_bytes
        if self._settings.overcommit:
            return sys.maxsize if spare >= 0 else 0
        spare += (group.blocks - group.used) * BLOCK_SIZE if group else 0
        promised = self._promised_bytes(view)
        least = max(0, spare - promised) // BLOCK_SIZE
        if least >= enough:
            return least
        look = self._look_at_files()
        # What has become free since may have been taken from what the volumes held.
        held = look.held_bytes - max(0, free - look.free_bytes)
        return max(0, spare - max(0, promised - held)) // BLOCK_SIZE

    def _promised_bytes(self, view: Change | Store) -> int:
        """Return the bytes of data that are promised to volumes and VPGs, written or not."""
        promised = (view.get(TOTALS, "pool") or Totals()).data
        for known in self._store.all(GROUPS):
            group = view.get(GROUPS, known.name)
            promised += group.blocks - group.used if group else 0
        return promised * BLOCK_SIZE

    def _look_at_files(self) -> _Look:
        """Return what the file system has given to the volumes, by a look of now or, of many files, a recent one.

        A look costs time with every file, so at most a twentieth of the time is spent on looks, however many calls
        come. An older look is as good: the sum of what is free and what the volumes hold is changed by other programs
        alone, for a block that a volume's user writes or trims goes from one to the other, and a deleted volume's
        blocks become free. Promises are those of now in any case. So with a look of some seconds ago the account is
        that of its moment, and what other programs wrote since is left out, as what they write later. Mostly it is
        not even left out: free bytes that are missing since are not looked for in the volumes.
        """
        with self._looking:
            before = self._clock.monotonic()
            if self._look is None or before >= self._look.until_s:
                allocated = self._pool.allocated_bytes()
                # What a change has put and not committed has no file yet.
                volumes = self._store.all(VOLUMES)
                held = sum(min(allocated.get(volume.uuid, 0), volume.bytes) for volume in volumes)
                # Read last: what is written meanwhile is free no more and is counted nowhere, rather than twice.
                free, after = self._pool.free_bytes(), self._clock.monotonic()
                pause_s = min((after - before) * _PAUSE_FACTOR, _LONGEST_PAUSE_S) if len(volumes) > _FEW else 0.0
                self._look = _Look(held, free, after + pause_s)
            return self._look

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
