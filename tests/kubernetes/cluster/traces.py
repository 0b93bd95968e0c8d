# SPDX-License-Identifier: Apache-2.0
"""Traces of a running cluster on this machine, seen from outside: all must be gone when it has stopped."""

from __future__ import annotations

import os
import re
import subprocess
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

# Where programs of a node leave things by themselves. Loop devices are looked at one by one, and /run by its top.
PLACES = ("/dev", "/run", "/var/lib", "/var/log", "/etc", "/opt", "/usr/local/sbin", "/sys/class/net", "/tmp")
# Comes and goes with others on the machine.
_OF_OTHERS = re.compile(r"^(/dev/(loop|ptmx|pts|tty)|(mount )?(/var)?/tmp/|/sys/class/net/veth)")
SETTINGS = ("vm/overcommit_memory", "vm/panic_on_oom", "kernel/panic", "kernel/panic_on_oops", "net/ipv4/ip_forward")


@dataclass(frozen=True, slots=True)
class Loop:
    """A loop device and the file behind it, by the numbers that stay right wherever the file is seen from."""

    device: str
    file_system: str
    inode: int


@dataclass(frozen=True, slots=True)
class Traces:
    """Traces of a running cluster."""

    processes: frozenset[tuple[int, int]]  # with the time of their start: numbers are given again
    groups: frozenset[Path]
    namespaces: frozenset[str]
    loops: frozenset[Loop]


def of_cluster(name: str, directory: Path) -> Traces:
    """Return the traces of the cluster on this machine; its files are in the directory."""
    group = f"nvmesh-csi-cluster-{name}"
    pids = [pid for pid in _pids() if re.search(rf"/{group}(/|$)", _read(f"/proc/{pid}/cgroup"), re.MULTILINE)]
    groups = {path for path in Path("/sys/fs/cgroup").rglob(group) if path.is_dir()}
    outside = {_link(f"/proc/self/ns/{kind}") for kind in ("mnt", "net", "pid", "ipc", "uts")}
    namespaces = {_link(f"/proc/{pid}/ns/{kind}") for pid in pids for kind in ("mnt", "net", "pid", "ipc", "uts")}
    return Traces(
        frozenset((pid, _start(pid)) for pid in pids),
        frozenset(groups),
        frozenset(namespaces - outside - {""}),
        frozenset(_loops_on(directory, _file_systems(pids) - _file_systems([os.getpid()]))),
    )


def left_of(before: Traces) -> Traces:
    """Return what of it is still there."""
    namespaces = {_link(f"/proc/{pid}/ns/{kind}") for pid in _pids() for kind in ("mnt", "net", "pid", "ipc", "uts")}
    return Traces(
        frozenset((pid, start) for pid, start in before.processes if _start(pid) == start),
        frozenset(path for path in before.groups if path.exists()),
        before.namespaces & namespaces,
        before.loops & frozenset(_all_loops()),
    )


def of_machine() -> dict[str, str]:
    """Return machine state that a cluster could change outside its namespaces: directories, settings, mounts."""
    found = {str(entry): "entry" for place in PLACES for entry in Path(place).iterdir()}
    found |= {setting: _read(f"/proc/sys/{setting}").strip() for setting in SETTINGS}
    found |= {f"mount {line.split()[4]}": "mounted" for line in _read("/proc/self/mountinfo").splitlines()}
    return {what: value for what, value in found.items() if not _OF_OTHERS.match(what)}


def _pids() -> list[int]:
    return [int(path.name) for path in Path("/proc").iterdir() if path.name.isdigit()]


def _start(pid: int) -> int:
    """Return when the process began, in ticks since boot; 0 where it is gone or nothing but its number is left."""
    fields = _read(f"/proc/{pid}/stat").rpartition(")")[2].split()
    return int(fields[19]) if fields and fields[0] not in ("Z", "X") else 0


def _loops_on(directory: Path, file_systems: set[str]) -> list[Loop]:
    """Return the loop devices on files below the directory, and on filesystems of no other namespace."""
    inodes = {path.stat().st_ino for path in directory.rglob("*") if path.is_file() and not path.is_symlink()}
    of_directory = f"{os.major(directory.stat().st_dev)}:{os.minor(directory.stat().st_dev)}"
    return [
        loop
        for loop in _all_loops()
        if loop.file_system in file_systems or (loop.file_system == of_directory and loop.inode in inodes)
    ]


def _file_systems(pids: Iterable[int]) -> set[str]:
    return {line.split()[2] for pid in pids for line in _read(f"/proc/{pid}/mountinfo").splitlines()}


def _all_loops() -> list[Loop]:
    columns = ("NAME", "BACK-MAJ:MIN", "BACK-INO")
    listed = subprocess.run(
        ["losetup", "--noheadings", "--list", "--output", ",".join(columns)], capture_output=True, text=True
    )
    # One whose file can no longer be asked, as on a FUSE filesystem that ended, has no numbers; no cluster has such.
    rows = (row for row in map(str.split, listed.stdout.splitlines()) if len(row) == len(columns))
    return [Loop(device, file_system, int(inode)) for device, file_system, inode in rows]


def _read(path: str) -> str:
    try:
        return Path(path).read_text()
    except OSError:
        return ""


def _link(path: str) -> str:
    try:
        return str(Path(path).readlink())
    except OSError:
        return ""
