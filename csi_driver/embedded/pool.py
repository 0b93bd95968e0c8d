"""The pool on disk: a directory of sparse files, one per volume, with a lock so that one manager at a time uses it.

It promises nothing itself: who may have how much is decided in the store's totals. A file that no volume owns is
never removed here.
"""

from __future__ import annotations

import fcntl
import os
from pathlib import Path

from csi_driver.errors import PreconditionFailed, SystemCallFailed


class PoolInUse(PreconditionFailed):
    """Another manager holds the pool."""

    def __init__(self, directory: Path) -> None:
        super().__init__(f"the pool {directory} is in use by another storage manager (it holds {directory}/lock)")


class Pool:
    """The files of one pool directory."""

    def __init__(self, directory: Path, *, preallocate: bool = False) -> None:
        """Make the directory if it is missing and take its lock. Raises PoolInUse."""
        self.directory = directory.resolve()
        self.volumes = self.directory / "volumes"
        self.database = self.directory / "manager.sqlite"
        self.password = self.directory / "password"
        self._preallocate = preallocate
        self.volumes.mkdir(mode=0o700, parents=True, exist_ok=True)
        self._lock = os.open(self.directory / "lock", os.O_CREAT | os.O_RDWR | os.O_CLOEXEC, 0o600)
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as problem:
            os.close(self._lock)
            raise PoolInUse(self.directory) from problem

    def close(self) -> None:
        """Give the lock back."""
        os.close(self._lock)

    def file(self, identity: str) -> Path:
        """Return where the volume with this uuid has its data."""
        return self.volumes / f"{identity}.img"

    def free_bytes(self) -> int:
        """Return what the file system has left for us."""
        space = os.statvfs(self.volumes)
        return space.f_bavail * space.f_frsize

    def used_bytes(self) -> int:
        """Return what the volume files take on disk."""
        with os.scandir(self.volumes) as entries:
            return sum(entry.stat(follow_symlinks=False).st_blocks * 512 for entry in entries)

    def identities(self) -> set[str]:
        """Return the uuids for which there is a file."""
        return {path.stem for path in self.volumes.glob("*.img")}

    def has(self, identity: str, size_bytes: int) -> bool:
        """Tell whether the file is there and at least that long."""
        try:
            return self.size_bytes(identity) >= size_bytes
        except FileNotFoundError:
            return False

    def size_bytes(self, identity: str) -> int:
        return self.file(identity).stat().st_size

    def make(self, identity: str, size_bytes: int, *, synced: bool = False) -> None:
        """Make the file, or make the one that is there at least `size_bytes` long. It never becomes shorter.

        `synced`: file and directory entry are on disk when this returns.
        """
        path = self.file(identity)
        try:
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
        except OSError as problem:
            raise SystemCallFailed(f"make {path} of {size_bytes} bytes", problem.errno or 0) from problem

    def remove(self, identity: str) -> None:
        """Remove the file of a volume that is being deleted; gone already is fine."""
        try:
            self.file(identity).unlink(missing_ok=True)
        except OSError as problem:
            raise SystemCallFailed(f"remove {self.file(identity)}", problem.errno or 0) from problem

    def _sync_directory(self) -> None:
        descriptor = os.open(self.volumes, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
