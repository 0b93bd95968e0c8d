"""Who keeps a mount busy, for a message: mounts below it, loop devices over its files, and programs.

No file of the filesystem is touched, which may hang: what is read is /proc and /sys alone. A descriptor is of a mount
by the mount's id (`mnt_id` of proc_pid_fdinfo(5)), which every mount namespace numbers for itself. A container sees the
programs of its own process namespace alone.
"""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Iterator, Sequence
from itertools import islice
from pathlib import Path

from csi_driver.host import mount_table
from csi_driver.host_model import DeviceNumber

_PROC = Path("/proc")
_LOOPS = Path("/sys/block")
_MOST = 3
_LIMIT_S = 0.5
"""A node has some thousands of programs; to read what they have open takes about 20 microseconds a descriptor."""


def describe_holders(path: Path) -> str:
    """Name up to three holders of the mount at `path`; says so where none can be seen from here."""
    found = list(islice(_holders(path), _MOST))
    if not found:
        return f"by a program that is not visible here; see `fuser -vm {path}` on the node"
    return "by " + ", ".join(found)


def _holders(path: Path) -> Iterator[str]:
    ends_at_s = time.monotonic() + _LIMIT_S
    entries = _table("self")
    own = next((entry for entry in reversed(entries) if entry.path == path), None)
    if own is None:
        return
    yield from (f"the mount {entry.path}" for entry in entries if path in entry.path.parents)
    for file in _LOOPS.glob("loop*/loop/backing_file"):
        with contextlib.suppress(OSError):
            backing = Path(file.read_text(errors="surrogateescape").strip())
            if path in backing.parents:
                yield f"/dev/{file.parts[-3]} over {backing}"
    mounts_of: dict[str, frozenset[str]] = {}
    for process in _PROC.iterdir():
        if time.monotonic() > ends_at_s:
            return
        if process.name.isdigit() and _uses(process, path, own.number, mounts_of):
            yield f"pid {process.name} ({_name(process)})"


def _uses(process: Path, path: Path, number: DeviceNumber, mounts_of: dict[str, frozenset[str]]) -> bool:
    """Tell whether a program has something open in the mount, or works or runs in it."""
    try:
        namespace = os.readlink(process / "ns/mnt")
        if namespace not in mounts_of:
            same = (entry for entry in _table(process.name) if (entry.path, entry.number) == (path, number))
            mounts_of[namespace] = frozenset(str(entry.mount_id) for entry in same)
        ids = mounts_of[namespace]
        if not ids:
            return False
        links = (Path(os.readlink(process / name)) for name in ("cwd", "root", "exe"))
        if any(place == path or path in place.parents for place in links):
            return True
        return any(_mount_id(file) in ids for file in (process / "fdinfo").iterdir())
    except OSError:
        return False  # it has ended, or is none that may be looked at


def _mount_id(fdinfo: Path) -> str:
    with contextlib.suppress(OSError):
        for line in fdinfo.read_text().splitlines():
            if line.startswith("mnt_id:"):
                return line.split()[1]
    return ""


def _name(process: Path) -> str:
    with contextlib.suppress(OSError):
        return (process / "comm").read_text(errors="replace").strip()
    return "?"


def _table(process: str) -> Sequence[mount_table.Entry]:
    return mount_table.parse((_PROC / process / "mountinfo").read_text(errors="surrogateescape"))
