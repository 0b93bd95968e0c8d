# SPDX-License-Identifier: Apache-2.0
"""Target and staging paths: checked, created and removed without following symbolic links.

A path lies below one of the configured roots, which may be links and are resolved once. In a path that begins with a
resolved root and has no `..` the kernel follows no link (openat2(2), RESOLVE_NO_SYMLINKS), so that no user with write
access there can lead the driver out of the root. A directory that is a link is replaced by its target only when that
lies below a root too; the rest of the path is again resolved without links.
"""

from __future__ import annotations

import contextlib
import errno
import itertools
import os
import stat
from collections.abc import Iterator, Sequence
from pathlib import Path, PurePosixPath

from csi_driver.errors import InvalidField, PreconditionFailed, SystemCallFailed, shown
from csi_driver.host import syscalls
from csi_driver.host.syscalls import closing, fd_path, system_call

_ABSENT = (errno.ENOENT, errno.ENOTDIR)
_LONGEST_PATH_BYTES = 4095
_MOST_COUNTED = 1000
_KINDS = {stat.S_IFDIR: "directory", stat.S_IFREG: "file", stat.S_IFBLK: "device"}


class LinuxPaths:
    """Paths below the configured roots. Methods as in `csi_driver.node.ports.Paths`."""

    def __init__(self, roots: Sequence[Path]) -> None:
        by_length = sorted(roots, key=lambda root: len(root.parts), reverse=True)
        self._roots = tuple((str(root), str(root.resolve())) for root in by_length)

    def check(self, path: str, field: str, *, takes_off: bool = False) -> Path:
        """Return the path with the links of its root resolved; refuses other links by `InvalidField`.

        A link to a directory below another root is followed; to unmount (`takes_off`), below the same root too.
        """
        plain = PurePosixPath(path)
        too_long = len(path.encode(errors="surrogatepass")) > _LONGEST_PATH_BYTES
        if not path.startswith("/") or "\0" in path or ".." in plain.parts or too_long:
            raise InvalidField(field, path, "an absolute path without `..`")
        for given, resolved in self._roots:
            for root in (given, resolved):
                if (below := _below(str(plain), root)) is not None:
                    found = Path(resolved, below)
                    return self._without_links(found, resolved, path, field, takes_off=takes_off)
        raise InvalidField(field, path, f"a path below {self._names()}")

    def _without_links(self, path: Path, root: str, given: str, field: str, *, takes_off: bool) -> Path:
        if not _has_link(path, given, field):
            return path
        place = Path(os.path.realpath(path.parent)) / path.name
        other = next((each for _, each in self._roots if _below(str(place), each) is not None), None)
        if other is None or (other == root and not takes_off) or _has_link(place, given, field):
            raise InvalidField(field, given, "a path without symbolic links below its root", self._about_link(path))
        return place

    def _about_link(self, path: Path) -> str:
        link = next((each for each in (*reversed(path.parents), path) if each.is_symlink()), path)
        return (
            f"{link} is a link to {os.path.realpath(link)}: bind mount that directory instead, or name it as a path "
            f"root of its own, in addition to {self._names()} (--path-root, in the chart node.extraPathRoots)"
        )

    def _names(self) -> str:
        return " or ".join(given for given, _ in self._roots)

    def open(self, path: Path) -> int:
        """Open the path (O_PATH), which may be a root, to mount on it or to unmount in it."""
        self._require_root(path, itself=True)
        return _open_without_links(path)

    def kind(self, path: Path) -> str:
        try:
            fd = self.open(path)
        except SystemCallFailed as failure:
            if failure.errno in _ABSENT:
                return "absent"
            if failure.errno == errno.ELOOP:
                return "other"
            raise
        with closing(fd):
            try:
                return _KINDS.get(stat.S_IFMT(os.fstat(fd).st_mode), "other")
            except OSError:
                return "other"  # the root of a filesystem that was shut down

    def make_directory(self, path: Path) -> None:
        with self._parent(path) as parent, system_call(f"make the directory {path}"):
            try:
                os.mkdir(path.name, 0o750, dir_fd=parent)
            except FileExistsError as error:
                if self.kind(path) != "directory":
                    raise PreconditionFailed(f"{path}: expected a directory, got something else") from error

    def make_file(self, path: Path) -> None:
        flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
        with self._parent(path) as parent, system_call(f"make the file {path}"):
            try:
                os.close(os.open(path.name, flags, 0o640, dir_fd=parent))
            except FileExistsError as error:
                if self.kind(path) not in ("file", "device"):
                    raise PreconditionFailed(f"{path}: expected a file, got something else") from error

    def set_mode(self, path: Path, mode: int) -> None:
        with closing(self.open(path)) as fd, system_call(f"change the mode of {path}"):
            # fchmod(2) refuses O_PATH descriptors; the path under /proc is always the same file.
            os.chmod(fd_path(fd), mode)

    def remove(self, path: Path) -> None:
        try:
            with self._parent(path) as parent:
                self._remove(path, parent)
        except PreconditionFailed as failure:
            if isinstance(failure.__cause__, SystemCallFailed) and failure.__cause__.errno in _ABSENT:
                return
            raise

    def _remove(self, path: Path, parent: int) -> None:
        try:
            status = os.stat(path.name, dir_fd=parent, follow_symlinks=False)
            if stat.S_ISDIR(status.st_mode):
                os.rmdir(path.name, dir_fd=parent)
            elif stat.S_ISREG(status.st_mode) and status.st_size == 0:
                os.unlink(path.name, dir_fd=parent)
            else:
                raise PreconditionFailed(
                    f"{path}: expected an empty directory or file, got something else; it is left in place"
                )
        except FileNotFoundError:
            return
        except OSError as error:
            if error.errno in (errno.ENOTEMPTY, errno.EEXIST):
                raise PreconditionFailed(
                    f"{path} is not empty: {_content(path.name, parent)}, written while nothing was mounted there; "
                    "move them away, then retry (they are never deleted)"
                ) from error
            if error.errno == errno.EBUSY:
                raise PreconditionFailed(f"{path} is a mount point: it is left in place") from error
            raise SystemCallFailed(f"remove {path}", error.errno or 0) from error

    @contextlib.contextmanager
    def _parent(self, path: Path) -> Iterator[int]:
        self._require_root(path)
        try:
            fd = _open_without_links(path.parent)
        except SystemCallFailed as failure:
            raise PreconditionFailed(f"the directory {path.parent} is absent or reached by a link") from failure
        with closing(fd):
            yield fd

    def _require_root(self, path: Path, *, itself: bool = False) -> None:
        text = str(path)
        is_below = any(_below(text, root) is not None or (itself and text == root) for _, root in self._roots)
        if not is_below or ".." in path.parts:
            raise PreconditionFailed(f"{path} is below no path root")


def _below(path: str, root: str) -> str | None:
    """Return the part of a plain path below a root; None when it is not below it."""
    root = root.rstrip("/") + "/"
    return path[len(root) :] or None if path.startswith(root) and not path.startswith("//") else None


def _content(name: str, parent: int) -> str:
    names: list[str] = []
    with contextlib.suppress(OSError):
        flags = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
        with closing(os.open(name, flags, dir_fd=parent)) as fd, os.scandir(fd) as entries:
            names = [entry.name for entry in itertools.islice(entries, _MOST_COUNTED)]
    many = "at least " * (len(names) == _MOST_COUNTED)
    return f"{many}{len(names)} {'entry' if len(names) == 1 else 'entries'}, the first {shown(min(names, default=''))}"


def _has_link(path: Path, given: str, field: str) -> bool:
    try:
        os.close(_open_without_links(path))
    except SystemCallFailed as failure:
        if failure.errno == errno.ENAMETOOLONG:
            raise InvalidField(field, given, "a path with at most 255 bytes in each part") from failure
        if failure.errno not in (errno.ELOOP, *_ABSENT):
            raise
        return failure.errno == errno.ELOOP
    return False


def _open_without_links(path: Path) -> int:
    """Open (O_PATH) an absolute path; fails with ELOOP at a link."""
    return syscalls.openat2(path, os.O_PATH, syscalls.RESOLVE_NO_SYMLINKS)
