# SPDX-License-Identifier: Apache-2.0
"""The pool: a directory with a sparse file for each volume and snapshot, and the allocation of its space.

Space is allocated in the change that records a volume, an extension or a snapshot, so it is never allocated twice. The
free capacity is the smaller of the unallocated bytes of the pool and of the free bytes of its filesystem, less the
reserve and less the allocated bytes that are not written yet.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import sys
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from csi_driver.deadline import SYSTEM_CLOCK, Clock
from csi_driver.embedded.layouts import BLOCK_SIZE, Layout
from csi_driver.embedded.model import FACTS, TOTALS, VOLUMES, Fact, Totals, Volume
from csi_driver.embedded.settings import Reflinks, StorageSettings
from csi_driver.embedded.store import Change, Store
from csi_driver.errors import HostFailure, InvalidRequest, PreconditionFailed, SystemCallFailed

_SUFFIX = ".img"
_CUTTING = ".cutting"
"""Ends the name of a reflink that is not complete."""
NO_SPACE = frozenset((errno.ENOSPC, errno.EDQUOT, errno.EFBIG))
"""Errors of a filesystem without space."""
_SIZE = "size_bytes"
_FEW = 256
"""Number of files that are scanned each time: it takes some milliseconds."""
_PAUSE_FACTOR = 19
_LONGEST_PAUSE_S = 10.0


class PoolInUse(PreconditionFailed):
    def __init__(self, directory: Path) -> None:
        super().__init__(
            f"the pool {directory} is in use by another storage manager, which holds {directory}/lock; "
            "stop that one, or set another --pool"
        )


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


@dataclass(slots=True)
class _DirectorySync:
    path: Path
    asked: int = 0
    """Number of the last request to sync."""
    _synced: int = 0
    """Number of the last request that a sync did."""
    _asking: threading.Lock = field(default_factory=threading.Lock)
    _syncing: threading.Lock = field(default_factory=threading.Lock)

    def sync(self) -> None:
        """Sync the directory's entries of now; one fsync does for all that wait when it begins."""
        with self._asking:
            self.asked += 1
            mine = self.asked
        with self._syncing:
            if self._synced >= mine:
                return
            begun = self.asked
            with _opened(self.path, os.O_RDONLY | os.O_DIRECTORY) as descriptor:
                os.fsync(descriptor)
            self._synced = begun


class Pool:
    """The files of a pool directory. It removes no file without a request.

    `why_no_reflinks`: why the filesystem cannot make reflinks, "" when it can.
    """

    def __init__(self, directory: Path, *, preallocate: bool = False, reflinks: Reflinks | None = None) -> None:
        """Create the directory if missing and take its lock. Raises PoolInUse, SystemCallFailed."""
        try:
            self._open(directory)
        except OSError as problem:
            what, file = f"open the pool {directory}", problem.filename or ""
            raise SystemCallFailed(what, problem.errno or 0, file) from problem
        self._preallocate = preallocate
        self._syncs = {path: _DirectorySync(path) for path in (self.volumes, self.snapshots)}
        self._reflinks = reflinks
        self.why_no_reflinks = self._probed(reflinks)

    def _open(self, directory: Path) -> None:
        self.directory = directory.resolve()
        self.volumes = self.directory / "volumes"
        self.snapshots = self.directory / "snapshots"
        self.database = self.directory / "manager.sqlite"
        self.password = self.directory / "password"
        for path in (self.volumes, self.snapshots):
            path.mkdir(mode=0o700, parents=True, exist_ok=True)
        self._lock = os.open(self.directory / "lock", os.O_CREAT | os.O_RDWR | os.O_CLOEXEC, 0o600)
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as problem:
            os.close(self._lock)
            if isinstance(problem, BlockingIOError):
                raise PoolInUse(self.directory) from problem
            raise

    def close(self) -> None:
        os.close(self._lock)

    def file(self, identity: str) -> Path:
        return self.volumes / f"{identity}{_SUFFIX}"

    def snapshot_file(self, identity: str) -> Path:
        return self.snapshots / f"{identity}{_SUFFIX}"

    def free_bytes(self) -> int:
        with _named(f"look at the file system of {self.volumes}"):
            space = os.statvfs(self.volumes)
        return space.f_bavail * space.f_frsize

    def why_unusable(self) -> str:
        """Return why the pool cannot be used; "" when it can."""
        try:
            self.free_bytes()
        except SystemCallFailed as error:
            return str(error)
        return ""

    def allocated_bytes(self) -> dict[str, int]:
        """Return the bytes on disk of each file, by uuid."""
        found = {}
        with _named(f"list {self.volumes}"), os.scandir(self.volumes) as entries:
            for entry in entries:
                if entry.name.endswith(_SUFFIX):
                    with contextlib.suppress(FileNotFoundError):  # removed meanwhile
                        status = entry.stat(follow_symlinks=False)
                        found[entry.name.removesuffix(_SUFFIX)] = status.st_blocks * 512
        return found

    def identities(self) -> set[str]:
        with _named(f"list {self.volumes}"):
            return {name.removesuffix(_SUFFIX) for name in os.listdir(self.volumes) if name.endswith(_SUFFIX)}

    def has(self, identity: str, size_bytes: int) -> bool:
        file = f"{self.volumes}/{identity}{_SUFFIX}"  # a Path would cost ten times the call, and all files are checked
        try:
            return os.stat(file).st_size >= size_bytes
        except FileNotFoundError:
            return False
        except OSError as problem:
            raise SystemCallFailed(f"look at {file}", problem.errno or 0) from problem

    def make(self, identity: str, size_bytes: int, *, synced: bool = False) -> None:
        """Create or extend the file to at least this length; it never becomes shorter.

        `synced`: file and directory entry are on disk when this returns.
        """
        path = self.file(identity)
        with _named(f"make {path} of {size_bytes} bytes"):
            with _opened(path, os.O_CREAT | os.O_RDWR) as descriptor:
                if os.fstat(descriptor).st_size < size_bytes:
                    if self._preallocate:
                        os.posix_fallocate(descriptor, 0, size_bytes)
                    else:
                        os.ftruncate(descriptor, size_bytes)
                if synced:
                    os.fsync(descriptor)
            if synced:
                self._syncs[self.volumes].sync()

    def remove(self, identity: str) -> None:
        """Remove the file; a missing one is success."""
        with _named(f"remove {self.file(identity)}"):
            self.file(identity).unlink(missing_ok=True)

    def sync(self, file: Path) -> None:
        """Write out what is cached of a file, so that a reflink of it, which holds up its writers, is short."""
        with _named(f"sync {file}"), _opened(file, os.O_RDONLY) as descriptor:
            os.fsync(descriptor)

    def count_extents(self, file: Path) -> int:
        """Return how many extents a file has: a reflink takes time for each. Raises SystemCallFailed."""
        with _named(f"count the extents of {file}"), _opened(file, os.O_RDONLY) as descriptor:
            return self._able().count_extents(descriptor)

    def reflink(self, source: Path, target: Path, size_bytes: int, *, mode: int = 0o600) -> int:
        """Make `target` a file of at least this length that shares the blocks of `source`; return its bytes on disk.

        The content is that of one moment. At any time `target` is absent, an older file, or complete and on disk. The
        caller holds the locks of both. Raises SystemCallFailed, also where reflinks are not possible.
        """
        temporary = target.with_name(f"{target.name}{_CUTTING}")
        reflinks = self._able()
        with _named(f"reflink {source} to {target}"):
            temporary.unlink(missing_ok=True)  # of a crash
            try:
                with (
                    _opened(source, os.O_RDONLY) as origin,
                    _opened(temporary, os.O_CREAT | os.O_EXCL | os.O_RDWR) as made,
                ):
                    reflinks.clone(origin, made)
                    if os.fstat(made).st_size < size_bytes:
                        os.ftruncate(made, size_bytes)
                    os.fchmod(made, mode)
                    os.fsync(made)
                    occupied_bytes = os.fstat(made).st_blocks * 512
                os.rename(temporary, target)
            except BaseException:
                with contextlib.suppress(OSError):
                    temporary.unlink()
                raise
            self._syncs[target.parent].sync()
        return occupied_bytes

    def _able(self) -> Reflinks:
        if self._reflinks is None or self.why_no_reflinks:
            raise SystemCallFailed(f"reflink in {self.directory}", errno.EOPNOTSUPP, self.why_no_reflinks)
        return self._reflinks

    def _probed(self, reflinks: Reflinks | None) -> str:
        """Return why two files in the pool cannot share blocks, or their extents cannot be told; "" when both work."""
        if reflinks is None:
            return "the storage manager runs without reflinks"
        try:
            with _scratch(self.snapshots) as source, _scratch(self.volumes) as target:
                has_data = _write_probe(source)
                reflinks.clone(source, target)
                if has_data:
                    os.pwrite(target, b"changed", 0)
                    is_right = os.pread(source, 7, 0) == _PROBE[:7] and os.pread(target, 7, 7) == _PROBE[7:14]
                    if not is_right or reflinks.count_extents(source) < 1:
                        return f"the filesystem of {self.directory} answers FICLONE or FIEMAP wrongly"
        except (OSError, SystemCallFailed) as problem:
            return (
                f"the filesystem of {self.directory} has no reflinks ({problem}); expected xfs with reflink=1 or btrfs"
            )
        return ""


_PROBE = bytes(range(1, 129)) * (2 * BLOCK_SIZE // 128)


def _write_probe(descriptor: int) -> bool:
    """Write the file of the probe to disk; False on a full filesystem, where an empty file must do."""
    try:
        os.pwrite(descriptor, _PROBE, 0)
        os.fsync(descriptor)
    except OSError as problem:
        if problem.errno not in NO_SPACE:
            raise
        os.ftruncate(descriptor, 0)
        return False
    return True


@contextlib.contextmanager
def _opened(path: Path, flags: int) -> Iterator[int]:
    descriptor = os.open(path, flags | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
    try:
        yield descriptor
    finally:
        os.close(descriptor)


def _scratch(directory: Path) -> contextlib.AbstractContextManager[int]:
    """Open a file without a name."""
    return _opened(directory, os.O_TMPFILE | os.O_RDWR)


@contextlib.contextmanager
def _named(call: str) -> Iterator[None]:
    try:
        yield
    except OSError as problem:
        raise SystemCallFailed(call, problem.errno or 0) from problem


@dataclass(slots=True)
class VolumeLocks:
    """A lock for each volume, by uuid."""

    _guard: threading.Lock = field(default_factory=threading.Lock)
    _locks: dict[str, tuple[threading.Lock, int]] = field(default_factory=dict)

    @contextlib.contextmanager
    def hold(self, identity: str) -> Iterator[None]:
        """Hold the lock of a volume; wait for it."""
        with self._guard:
            lock, users = self._locks.get(identity, (threading.Lock(), 0))
            self._locks[identity] = (lock, users + 1)
        try:
            with lock:
                yield
        finally:
            with self._guard:
                lock, users = self._locks[identity]
                if users == 1:
                    del self._locks[identity]
                else:
                    self._locks[identity] = (lock, users - 1)


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
        if self.totals != counted:
            raise TotalsWrong(self.totals, counted)
        self.size_bytes = self._fixed_size()

    def _fixed_size(self) -> int:
        known = self._store.get(FACTS, _SIZE)
        wanted = self._settings.size_bytes
        if known is not None and (wanted is None or wanted == int(known.value)):
            return int(known.value)
        occupied = sum(self._pool.allocated_bytes().values())
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
        if volume is not None:
            totals = totals.with_volume(volume)
            change.put(VOLUMES, volume.name, volume)
        elif before is not None:
            change.delete(VOLUMES, before.name)
        change.put(TOTALS, "pool", totals)

    def _unallocated_blocks(self, totals: Totals) -> int:
        return max(0, self.total_blocks - totals.allocated)

    def _free_blocks(self, view: Change | Store, enough: int) -> int:
        """Return the blocks of data that the filesystem can still hold.

        If there are `enough` even when no allocated block is written yet, the files are not scanned, and the result
        may be too small. Later writes of other programs are not counted. With `overcommit` only the reserve is kept.
        """
        free = self._pool.free_bytes()
        spare = free - self._settings.reserve_bytes
        if self._settings.overcommit:
            return sys.maxsize if spare >= 0 else 0
        allocated = (view.get(TOTALS, "pool") or Totals()).data * BLOCK_SIZE
        least = max(0, spare - allocated) // BLOCK_SIZE
        if least >= enough:
            return least
        scan = self._scan_files()
        # Space that became free since may have come from the volumes.
        held = scan.held_bytes - max(0, free - scan.free_bytes)
        return max(0, spare - max(0, allocated - held)) // BLOCK_SIZE

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
