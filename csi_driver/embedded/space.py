"""How much of the pool is promised. A volume, an extension or a VPG's reserve is promised in the very change that
records it, so the pool is never promised twice."""

from __future__ import annotations

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
        super().__init__(f"the database's totals are {kept}, its volumes add up to {counted}; it was changed by hand?")


class PoolTooLarge(InvalidRequest):
    """A pool size was asked for that the file system does not have."""

    def __init__(self, wanted: int, had: int) -> None:
        super().__init__(
            f"a pool of {wanted} bytes was asked for and {had} are there; "
            "give a smaller size, or allow overcommitment for tests and benchmarks"
        )


class NoSpace(Exception):
    """An allocation does not fit; the caller names the API's error for its own case."""


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
        had = max(0, self._pool.free_bytes() + self._pool.used_bytes() - self._settings.reserve_bytes)
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

    def free_blocks(self) -> int:
        """Return the raw blocks that are promised to nobody."""
        return max(0, self.total_blocks - self.totals.promised)

    def possible(self, layout: Layout) -> bool:
        """Tell whether there are enough storage targets and drives for a layout."""
        if layout.redundancy_of(layout.data_blocks) == 0:
            return True
        return max(1, self._settings.pretend_targets) >= layout.targets

    def take(self, change: Change, layout: Layout, capacity: float | str, group: Group | None) -> Taken:
        """Find room for `capacity` (decimal GB or "MAX"). Raises NoSpace. Nothing is promised yet."""
        if not self.possible(layout):
            raise NoSpace
        totals = change.get(TOTALS, "pool") or Totals()
        reserve = group.blocks - group.used if group else 0
        open_pool = 0 if group and not group.overflow else self._data_blocks_that_fit(layout, totals)
        if isinstance(capacity, str):
            blocks = (reserve + open_pool) // layout.granule_blocks * layout.granule_blocks
            if blocks * BLOCK_SIZE < GIGABYTE - layout.granule_blocks * BLOCK_SIZE:
                raise NoSpace
        else:
            blocks = layout.blocks_of(capacity)
        from_reserved = min(blocks, reserve)
        if blocks <= 0 or blocks - from_reserved > open_pool:
            raise NoSpace
        self._check_file_system(blocks * BLOCK_SIZE)
        return Taken(blocks, from_reserved)

    def _data_blocks_that_fit(self, layout: Layout, totals: Totals) -> int:
        raw = max(0, self.total_blocks - totals.promised)
        granule = layout.granule_blocks
        return raw // (granule + layout.redundancy_of(granule)) * granule

    def _check_file_system(self, size_bytes: int) -> None:
        needed = 0 if self._settings.overcommit else size_bytes
        if self._pool.free_bytes() < self._settings.reserve_bytes + needed:
            raise NoSpace

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
