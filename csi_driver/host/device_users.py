# SPDX-License-Identifier: Apache-2.0
"""`nvmesh-csi volume holders`: what uses the device of a volume on this node.

Only /proc, /sys and the device node are read: the device may hang. Processes of other pods are not visible in a pod;
the storage client counts their opens.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator, Sequence
from pathlib import Path

from csi_driver.errors import PreconditionFailed, SystemCallFailed, shown
from csi_driver.host.block_devices import SYS_DEV_BLOCK
from csi_driver.host.connectors.nvmesh import parse_opens
from csi_driver.host.mount_table import Entry, read_table, uses_mount
from csi_driver.host_model import DeviceNumber
from csi_driver.model import VolumeHandle

_PROC = Path("/proc")
_DEVICE_DIRECTORIES = ("/dev/", "/volumeDevices/")
"""Where device nodes are: the machine's, and those of kubelet."""


def device_users(devices: Path, status: Path, volume_id: str) -> dict[str, object]:
    """Return one document. Raises `PreconditionFailed` if `volume_id` is not a handle."""
    handle = VolumeHandle.parse(volume_id)
    if handle is None:
        raise PreconditionFailed(f"{shown(volume_id)} is no volume handle")
    device, processes = devices / handle.name, _text(status / "volumes" / handle.name / "client_processes")
    found: dict[str, object] = {
        "name": handle.name,
        "device": str(device),
        "opens": parse_opens(processes),
        "clientProcesses": processes.splitlines(),
        "mounts": [],
        "processes": [],
        "devices": [],
    }
    try:
        number = _number(os.stat(device).st_rdev)
    except OSError:
        return {**found, "device": ""}
    numbers = {number, *_above(number)}
    names = {Path(os.path.realpath(SYS_DEV_BLOCK / str(each))).name for each in numbers}
    # A btrfs has an anonymous number. Raw block volumes are bind mounts of a device node.
    sources = {str(device), *(f"/dev/{name}" for name in names)}
    nodes = {f"/{name}" for name in names}
    table = read_table()
    mounts = [entry for entry in table if entry.number in numbers or entry.source in sources]
    bound = [each for each in table if each.root in nodes or each.root.endswith(f"/{devices.name}/{handle.name}")]
    return {
        **found,
        "devices": [str(each) for each in sorted(numbers, key=str)],
        "mounts": sorted(str(entry.path) for entry in (*mounts, *bound)),
        "processes": list(_processes(numbers, mounts)),
    }


def _above(number: DeviceNumber) -> Iterator[DeviceNumber]:
    """Yield the devices that are made of this one, such as an opened LUKS volume."""
    with contextlib.suppress(OSError, SystemCallFailed):
        for name in os.listdir(SYS_DEV_BLOCK / str(number) / "holders"):
            text = _text(SYS_DEV_BLOCK / str(number) / "holders" / name / "dev").strip()
            if text:
                yield DeviceNumber.parse(text)
                yield from _above(DeviceNumber.parse(text))


def _processes(numbers: set[DeviceNumber], mounts: Sequence[Entry]) -> Iterator[dict[str, object]]:
    """Yield the processes that have the device open, or a file of one of its mounts."""
    caches: list[dict[str, frozenset[str]]] = [{} for _ in mounts]
    for process in _PROC.iterdir():
        if not process.name.isdigit():
            continue
        used = [
            str(mount.path)
            for mount, cache in zip(mounts, caches, strict=True)
            if uses_mount(process, mount.path, mount.number, cache)
        ]
        if file := next(_opened(process, numbers), "") or next(iter(used), ""):
            yield {"pid": int(process.name), "command": _text(process / "comm").strip(), "file": file}


def _opened(process: Path, numbers: set[DeviceNumber]) -> Iterator[str]:
    with contextlib.suppress(OSError):
        for fd in (process / "fd").iterdir():
            file = os.readlink(fd)
            # Other files may be on a filesystem that hangs.
            if any(part in file for part in _DEVICE_DIRECTORIES) and _number(fd.stat().st_rdev) in numbers:
                yield file


def _number(device: int) -> DeviceNumber:
    return DeviceNumber(os.major(device), os.minor(device))


def _text(path: Path) -> str:
    try:
        return path.read_text(errors="replace")
    except OSError:
        return ""
