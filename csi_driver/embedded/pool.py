"""The pool on disk: a directory of sparse files, one per volume, with a lock so that one manager at a time uses it.

It promises nothing itself: who may have how much is decided in the store's totals. A file that no volume owns is
never removed here.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
from collections.abc import Iterator
from pathlib import Path

from csi_driver.errors import PreconditionFailed, SystemCallFailed

_ENDING = ".img"


class PoolInUse(PreconditionFailed):
    """Another manager holds the pool."""

    def __init__(self, directory: Path) -> None:
        super().__init__(
            f"the pool {directory} is in use by another storage manager, which holds {directory}/lock; "
            "stop that one, or give another --pool"
        )


class Pool:
    """The files of one pool directory."""

    def __init__(self, directory: Path, *, preallocate: bool = False) -> None:
        """Make the directory if it is missing and take its lock. Raises PoolInUse, SystemCallFailed."""
        try:
            self._open(directory)
        except OSError as problem:
            raise SystemCallFailed(
                f"open the pool {directory}", problem.errno or 0, problem.filename or ""
            ) from problem
        self._preallocate = preallocate

    def _open(self, directory: Path) -> None:
        self.directory = directory.resolve()
        self.volumes = self.directory / "volumes"
        self.database = self.directory / "manager.sqlite"
        self.password = self.directory / "password"
        self.volumes.mkdir(mode=0o700, parents=True, exist_ok=True)
        self._lock = os.open(self.directory / "lock", os.O_CREAT | os.O_RDWR | os.O_CLOEXEC, 0o600)
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as problem:
            os.close(self._lock)
            if isinstance(problem, BlockingIOError):
                raise PoolInUse(self.directory) from problem
            raise

    def close(self) -> None:
        """Give the lock back."""
        os.close(self._lock)

    def file(self, identity: str) -> Path:
        """Return where the volume with this uuid has its data."""
        return self.volumes / f"{identity}{_ENDING}"

    def free_bytes(self) -> int:
        """Return what the file system has left for us."""
        with _named(f"look at the file system of {self.volumes}"):
            space = os.statvfs(self.volumes)
        return space.f_bavail * space.f_frsize

    def allocated_bytes(self) -> dict[str, int]:
        """Return what each volume's file takes on disk, by the volume's uuid."""
        found = {}
        with _named(f"list {self.volumes}"), os.scandir(self.volumes) as entries:
            for entry in entries:
                if entry.name.endswith(_ENDING):
                    with contextlib.suppress(FileNotFoundError):  # it was removed meanwhile
                        status = entry.stat(follow_symlinks=False)
                        found[entry.name.removesuffix(_ENDING)] = status.st_blocks * 512
        return found

    def identities(self) -> set[str]:
        """Return the uuids for which there is a file."""
        with _named(f"list {self.volumes}"):
            return {name.removesuffix(_ENDING) for name in os.listdir(self.volumes) if name.endswith(_ENDING)}

    def has(self, identity: str, size_bytes: int) -> bool:
        """Tell whether the file is there and at least that long."""
        with _named(f"look at {self.file(identity)}"):
            try:
                return self.file(identity).stat().st_size >= size_bytes
            except FileNotFoundError:
                return False

    def make(self, identity: str, size_bytes: int, *, synced: bool = False) -> None:
        """Make the file, or make the one that is there at least `size_bytes` long. It never becomes shorter.

        `synced`: file and directory entry are on disk when this returns.
        """
        path = self.file(identity)
        with _named(f"make {path} of {size_bytes} bytes"):
            descriptor = os.open(path, os.O_CREAT | os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
            try:
                if os.fstat(descriptor).st_size < size_bytes:
                    if self._preallocate:
                        os.posix_fallocate(descriptor, 0, size_bytes)
                    else:
                        os.ftruncate(descriptor, size_bytes)
                if synced:
                    os.fsync(descriptor)
            finally:
                os.close(descriptor)
            if synced:
                self._sync_directory()

    def remove(self, identity: str) -> None:
        """Remove the file of a volume that is being deleted; gone already is fine."""
        with _named(f"remove {self.file(identity)}"):
            self.file(identity).unlink(missing_ok=True)

    def _sync_directory(self) -> None:
        descriptor = os.open(self.volumes, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


@contextlib.contextmanager
def _named(call: str) -> Iterator[None]:
    """Raise SystemCallFailed, with what was done, for an error of the system."""
    try:
        yield
    except OSError as problem:
        raise SystemCallFailed(call, problem.errno or 0) from problem
