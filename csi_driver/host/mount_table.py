# SPDX-License-Identifier: Apache-2.0
"""The kernel's mount tables as text (proc_pid_mountinfo(5)): the parser, and what uses a busy mount.

The cost of reading a table grows with the number of mounts: `mounts.LinuxMounts.at` looks up single paths.
"""

from __future__ import annotations

import contextlib
import os
import re
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

from csi_driver.errors import SystemCallFailed
from csi_driver.host.block_devices import SYS_DEV_BLOCK, read_text
from csi_driver.host.syscalls import statx, system_call
from csi_driver.host_model import DeviceNumber, Mount

_PROC = Path("/proc")
_LOOPS = Path("/sys/block")
_OCTAL = re.compile(r"\\([0-7]{3})")
_PEER_GROUP = re.compile(r"(?:shared|master):(\d+)")
_ACCESS = frozenset({"ro", "rw"})
_MOST_HOLDERS = 3
_HOLDERS_LIMIT_S = 0.5
"""A node has thousands of processes; reading their descriptors takes about 20 microseconds each."""


@dataclass(frozen=True, slots=True)
class Entry(Mount):
    """A line of the table. `shared`: mounts below it propagate; `peers`: the peer groups to and from which they do.

    The number of a btrfs is anonymous here, and the node of a bind mount is not looked up.
    """

    mount_id: int = 0
    parent_id: int = 0
    shared: bool = False
    peers: frozenset[int] = frozenset()


def read_table(process: str = "self", keep: Callable[[str], object] = bool) -> list[Entry]:
    """Return a process's mount table; no filesystem is touched. `keep` chooses lines. Raises `SystemCallFailed`."""
    table = _PROC / process / "mountinfo"
    with system_call(f"read {table}"):
        return parse(os.fsdecode(table.read_bytes()), keep)  # a path may have "\r", which text mode changes


def parse(text: str, keep: Callable[[str], object] = bool) -> list[Entry]:
    """Read a table in the kernel's order: of mounts stacked at one path the later is on top."""
    found = []
    for line in filter(keep, text.split("\n")):  # a path may have other characters at which splitlines() splits
        before, separator, after = line.partition(" - ")
        left, right = before.split(" "), after.split(" ")
        if not separator or len(left) < 6 or len(right) < 3:
            continue
        mount_options, own_options = left[5].split(","), right[2].split(",")
        entry = Entry(
            mount_id=int(left[0]),
            parent_id=int(left[1]),
            number=DeviceNumber.parse(left[2]),
            root=unescape(left[3]),
            path=Path(unescape(left[4])),
            fs_type=unescape(right[0]),
            source=unescape(right[1]),
            read_only="ro" in mount_options or "ro" in own_options,
            options=frozenset(map(unescape, (*mount_options, *own_options))) - _ACCESS,
            shared=any(field.startswith("shared:") for field in left[6:]),
            peers=frozenset(int(group[1]) for field in left[6:] if (group := _PEER_GROUP.fullmatch(field))),
            turned_read_only="ro" in own_options and "ro" not in mount_options,
        )
        found.append(entry)
    return found


def unescape(text: str) -> str:
    r"""Undo the kernel's octal escapes, e.g. `\040` for a space."""
    return _OCTAL.sub(lambda match: chr(int(match[1], 8)), text) if "\\" in text else text


def twins(entries: Sequence[Entry], path: Path) -> list[Path]:
    """Return the other paths at which the mount at `path` appears, because its directory is mounted there too."""
    parents = {entry.mount_id: entry for entry in entries}
    own = next((entry for entry in reversed(entries) if entry.path == path), None)
    parent = parents.get(own.parent_id) if own is not None else None
    if own is None or parent is None:
        return []
    same = [entry for entry in entries if (entry.number, entry.root) == (own.number, own.root)]
    return [
        entry.path
        for entry in same
        if entry.path != own.path
        and (other := parents.get(entry.parent_id)) is not None
        and other.peers & parent.peers
        and _place_in(other, entry.path) == _place_in(parent, own.path)
    ]


def _place_in(parent: Entry, path: Path) -> tuple[DeviceNumber, Path]:
    """Identify the directory at a path below a mount by filesystem and path within it."""
    return parent.number, Path(parent.root) / path.relative_to(parent.path)


# Only /proc and /sys are read: the filesystem may hang. Processes of other process namespaces are not visible.


def describe_holders(path: Path) -> str:
    """Name up to three users of the mount at `path`: mounts below it, loop devices, processes."""
    found = list(islice(_holders(path), _MOST_HOLDERS))
    if not found:
        return f"by a program that is not visible here; see `fuser -vm {path}` on the node"
    return "by " + ", ".join(found)


def _holders(path: Path) -> Iterator[str]:
    ends_at_s = time.monotonic() + _HOLDERS_LIMIT_S
    entries = read_table()
    own = next((entry for entry in reversed(entries) if entry.path == path), None)
    if own is None:
        return
    yield from (f"the mount {entry.path}" for entry in entries if path in entry.path.parents)
    for file in _LOOPS.glob("loop*/loop/backing_file"):
        backing = Path(read_text(file))
        if path in backing.parents:
            yield f"/dev/{file.parts[-3]} over {backing}"
    mounts_of: dict[str, frozenset[str]] = {}
    for process in _PROC.iterdir():
        if time.monotonic() > ends_at_s:
            return
        if process.name.isdigit() and uses_mount(process, path, own.number, mounts_of):
            yield f"pid {process.name} ({_name(process)})"


def uses_mount(process: Path, path: Path, number: DeviceNumber, mounts_of: dict[str, frozenset[str]]) -> bool:
    """Return whether a process, a directory of /proc, has something of a mount open. `mounts_of`: a cache."""
    # Open files have the mount's id (`mnt_id` of proc_pid_fdinfo(5)), which differs between mount namespaces.
    try:
        namespace = os.readlink(process / "ns/mnt")
        if namespace not in mounts_of:
            same = (entry for entry in read_table(process.name) if (entry.path, entry.number) == (path, number))
            mounts_of[namespace] = frozenset(str(entry.mount_id) for entry in same)
        ids = mounts_of[namespace]
        if not ids:
            return False
        links = (Path(os.readlink(process / name)) for name in ("cwd", "root", "exe"))
        if any(place == path or path in place.parents for place in links):
            return True
        opened = map(read_text, (process / "fdinfo").iterdir())
        return any(text.partition("mnt_id:")[2].partition("\n")[0].strip() in ids for text in opened)
    except (OSError, SystemCallFailed):
        return False  # it has ended, or may not be read


def openers(number: DeviceNumber, own_path: Path) -> Iterator[str]:
    """Yield users of a device: devices over it, mounts in visible mount namespaces, processes. `own_path`: its node."""
    ends_at_s = time.monotonic() + _HOLDERS_LIMIT_S
    with contextlib.suppress(OSError):
        yield from (f"/dev/{name}" for name in sorted(os.listdir(SYS_DEV_BLOCK / str(number) / "holders")))
    for file in _LOOPS.glob("loop*/loop/backing_file"):
        if read_text(file) == str(own_path):
            yield f"/dev/{file.parts[-3]}"
    seen: set[str] = set()
    for process in (_PROC / "self", *_PROC.iterdir()):
        if time.monotonic() > ends_at_s:
            return
        if process.name == "self" or process.name.isdigit():
            with contextlib.suppress(OSError, SystemCallFailed):  # it has ended, or may not be read
                namespace = os.readlink(process / "ns/mnt")
                mounts = [] if namespace in seen else read_table(process.name, re.compile(rf"\d+ \d+ {number} ").match)
                seen.add(namespace)
                place = "" if process.name == "self" else f" seen by pid {process.name} ({_name(process)})"
                yield from (f"the mount {entry.path}{place}" for entry in mounts)
            # Other files may be on a filesystem that hangs.
            if process.name != "self" and number in opened_by(process, ("/dev/", str(own_path))):
                yield f"pid {process.name} ({_name(process)})"


def opened_by(process: Path, below: str | tuple[str, ...] = "/") -> set[DeviceNumber]:
    """Return the devices that a process has open by such paths; `process`: its directory in /proc."""
    found = set()
    with contextlib.suppress(OSError):  # it has ended, or may not be read
        for name in os.listdir(process / "fd"):
            link = process / "fd" / name
            # Only of files with a path: one without is no device.
            if os.readlink(link).startswith(below):
                found.add(DeviceNumber(*statx(link, follow=True).node))
    return found


def _name(process: Path) -> str:
    with contextlib.suppress(OSError):
        return (process / "comm").read_text(errors="replace").strip()
    return "?"
