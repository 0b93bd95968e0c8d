# SPDX-License-Identifier: Apache-2.0
"""The pool: a directory with a sparse file for each volume and snapshot."""

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

from csi_driver.embedded.layouts import BLOCK_SIZE
from csi_driver.embedded.model import client_hash
from csi_driver.embedded.settings import Reflinks
from csi_driver.errors import PreconditionFailed, SystemCallFailed

_FIGETBSZ = 2  # include/uapi/linux/fs.h
_SUFFIX = ".img"
_CUTTING = ".cutting"
"""Ends the name of a reflink that is not complete."""
NO_SPACE = frozenset((errno.ENOSPC, errno.EDQUOT, errno.EFBIG))
"""Errors of a filesystem without space."""


class PoolInUse(PreconditionFailed):
    def __init__(self, directory: Path) -> None:
        super().__init__(
            f"the pool {directory} is in use by another storage manager, which holds {directory}/lock; "
            "stop that one, or set another --pool"
        )


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
            with opened(self.path, os.O_RDONLY | os.O_DIRECTORY) as descriptor:
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
        self._syncs = {path: _DirectorySync(path) for path in (self.volumes, self.snapshots, self.private)}
        self._reflinks = reflinks
        self.why_no_reflinks = self._probed(reflinks)

    def _open(self, directory: Path) -> None:
        self.directory = directory.resolve()
        self.volumes = self.directory / "volumes"
        self.snapshots = self.directory / "snapshots"
        self.private = self.directory / "private"
        self.database = self.directory / "manager.sqlite"
        self.password = self.directory / "password"
        self.keys = self.directory / "keys"
        for path in (self.volumes, self.snapshots, self.private):
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

    def private_file(self, identity: str, client: str) -> Path:
        """Return the file of a reader's own copy of a volume."""
        return self.private / f"{identity}.{client_hash(client)}{_SUFFIX}"

    def free_bytes(self) -> int:
        with _named(f"look at the file system of {self.volumes}"):
            space = os.statvfs(self.volumes)
        return space.f_bavail * space.f_frsize

    def block_bytes(self) -> int:
        """Return the block size of the filesystem of the volumes; 0 where it has none of its own, as overlayfs.

        Exports have it. statvfs would return that of the filesystem below.
        """
        with (
            _named(f"look at the file system of {self.volumes}"),
            opened(self.volumes, os.O_RDONLY | os.O_DIRECTORY) as descriptor,
        ):
            try:
                return int.from_bytes(fcntl.ioctl(descriptor, _FIGETBSZ, bytes(4)), sys.byteorder)
            except OSError as problem:
                if problem.errno != errno.EINVAL:
                    raise
                return 0

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
        return _identities_in(self.volumes)

    def snapshot_identities(self) -> set[str]:
        return _identities_in(self.snapshots)

    def inode(self, file: Path) -> int:
        """Return the inode number of a file; 0 without one."""
        try:
            return os.stat(file).st_ino
        except FileNotFoundError:
            return 0
        except OSError as problem:
            raise SystemCallFailed(f"look at {file}", problem.errno or 0) from problem

    def occupied_bytes(self, file: Path) -> int:
        """Return a file's bytes on disk."""
        with _named(f"look at {file}"):
            return os.stat(file).st_blocks * 512

    def has(self, identity: str, size_bytes: int) -> bool:
        # A Path would cost ten times the call, and all files are checked.
        return self.has_file(f"{self.volumes}/{identity}{_SUFFIX}", size_bytes)

    def has_file(self, file: str | Path, size_bytes: int) -> bool:
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
            with opened(path, os.O_CREAT | os.O_RDWR) as descriptor:
                self._extend(descriptor, size_bytes)
                if synced:
                    os.fsync(descriptor)
            if synced:
                self._syncs[self.volumes].sync()

    def _extend(self, descriptor: int, size_bytes: int) -> None:
        if os.fstat(descriptor).st_size >= size_bytes:
            return
        if self._preallocate:
            os.posix_fallocate(descriptor, 0, size_bytes)
        else:
            os.ftruncate(descriptor, size_bytes)

    def remove(self, identity: str) -> None:
        """Remove the file; a missing one is success."""
        with _named(f"remove {self.file(identity)}"):
            self.file(identity).unlink(missing_ok=True)

    def private_files(self) -> list[Path]:
        with _named(f"list {self.private}"):
            return sorted(self.private.glob(f"*{_SUFFIX}"))

    def extend_private(self, file: Path, size_bytes: int) -> None:
        """Extend a reader's copy, if it exists. Its end takes no space, also where volumes are preallocated."""
        with _named(f"extend {file}"), contextlib.suppress(FileNotFoundError), opened(file, os.O_RDWR) as descriptor:
            os.ftruncate(descriptor, max(size_bytes, os.fstat(descriptor).st_size))

    def remove_private(self, file: Path) -> None:
        """Remove a reader's copy; a missing one is success."""
        with _named(f"remove {file}"):
            file.unlink(missing_ok=True)

    def remove_snapshot(self, identity: str) -> None:
        """Remove a snapshot's file, also an unfinished one; a missing one is success."""
        file = self.snapshot_file(identity)
        with _named(f"remove {file}"):
            for each in (file, _unfinished(file)):
                each.unlink(missing_ok=True)

    def remove_unfinished(self) -> None:
        """Remove the reflinks that a crash left unfinished. No other may be in progress."""
        for directory in self._syncs:
            with _named(f"list {directory}"):
                for file in directory.glob(f"*{_SUFFIX}{_CUTTING}"):
                    file.unlink(missing_ok=True)

    def sync(self, file: Path) -> None:
        """Write out what is cached of a file, so that a reflink of it, which holds up its writers, is short."""
        with _named(f"sync {file}"), opened(file, os.O_RDONLY) as descriptor:
            os.fsync(descriptor)

    def count_extents(self, file: Path) -> int:
        """Return how many extents a file has: a reflink takes time for each. Raises SystemCallFailed."""
        with _named(f"count the extents of {file}"), opened(file, os.O_RDONLY) as descriptor:
            return self._able().count_extents(descriptor)

    def reflink(self, source: Path, target: Path, size_bytes: int, *, mode: int = 0o600) -> int:
        """Make `target` a file of at least this length that shares the blocks of `source`; return its bytes on disk.

        The content is that of one moment. At any time `target` is absent, an older file, or complete and on disk. The
        caller holds the locks of both. Raises SystemCallFailed, also where reflinks are not possible.
        """
        self.begin_reflink(source, target)
        return self.complete_reflink(target, size_bytes, mode=mode)

    def begin_reflink(self, source: Path, target: Path) -> None:
        """Share the blocks with an unfinished file: what `complete_reflink` does to it delays no writer of `source`."""
        temporary, reflinks = _unfinished(target), self._able()
        with _named(f"reflink {source} to {target}"):
            temporary.unlink(missing_ok=True)  # of a crash
            with (
                _removed_on_failure(temporary),
                opened(source, os.O_RDONLY) as origin,
                opened(temporary, os.O_CREAT | os.O_EXCL | os.O_RDWR) as made,
            ):
                reflinks.clone(origin, made)

    def complete_reflink(self, target: Path, size_bytes: int, *, mode: int = 0o600) -> int:
        """Give an unfinished file its length and name, on disk; return its bytes there."""
        temporary = _unfinished(target)
        with _named(f"reflink to {target}"):
            with _removed_on_failure(temporary):
                with opened(temporary, os.O_RDWR) as made:
                    self._extend(made, size_bytes)
                    os.fchmod(made, mode)
                    os.fsync(made)
                    occupied_bytes = os.fstat(made).st_blocks * 512
                os.rename(temporary, target)
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
def opened(path: Path, flags: int = os.O_RDONLY) -> Iterator[int]:
    descriptor = os.open(path, flags | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
    try:
        yield descriptor
    finally:
        os.close(descriptor)


def _scratch(directory: Path) -> contextlib.AbstractContextManager[int]:
    """Open a file without a name."""
    return opened(directory, os.O_TMPFILE | os.O_RDWR)


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


@contextlib.contextmanager
def _removed_on_failure(file: Path) -> Iterator[None]:
    try:
        yield
    except BaseException:
        with contextlib.suppress(OSError):
            file.unlink()
        raise


def _unfinished(file: Path) -> Path:
    return file.with_name(f"{file.name}{_CUTTING}")


def _identities_in(directory: Path) -> set[str]:
    with _named(f"list {directory}"):
        return {name.removesuffix(_SUFFIX) for name in os.listdir(directory) if name.endswith(_SUFFIX)}
