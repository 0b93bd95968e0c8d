# SPDX-License-Identifier: Apache-2.0
"""`nvmesh-csi volume holders`: what uses the device of a volume on this node.

Only /proc, /sys and the device node are read: the device may hang. Processes of other pods are not visible in a pod;
the storage client counts their opens.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path

from csi_driver.errors import PreconditionFailed, SystemCallFailed, shown
from csi_driver.host.block_devices import SYS_DEV_BLOCK
from csi_driver.host.connectors.nvmesh import parse_opens
from csi_driver.host.mount_table import read_table
from csi_driver.host_model import DeviceNumber
from csi_driver.model import VolumeHandle

_PROC = Path("/proc")


def device_users(devices: Path, status: Path, volume_id: str) -> dict[str, object]:
    """Return one document. Raises `PreconditionFailed` for what is no handle."""
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
    nodes = {f"/{name}" for name in names} | {f"/{devices.name}/{handle.name}"}
    mounts = [
        entry
        for entry in read_table()
        # A btrfs has an anonymous number. Raw block volumes are bind mounts of a device node.
        if entry.number in numbers or Path(entry.source).name in names or str(entry.root) in nodes
    ]
    return {
        **found,
        "devices": [str(each) for each in sorted(numbers, key=str)],
        "mounts": sorted(str(entry.path) for entry in mounts),
        "processes": list(_processes(numbers, {entry.number for entry in mounts} & numbers)),
    }


def _above(number: DeviceNumber) -> Iterator[DeviceNumber]:
    """Yield the devices that are made of this one, such as an opened LUKS volume."""
    with contextlib.suppress(OSError, SystemCallFailed):
        for name in os.listdir(SYS_DEV_BLOCK / str(number) / "holders"):
            text = _text(SYS_DEV_BLOCK / str(number) / "holders" / name / "dev").strip()
            if text:
                yield DeviceNumber.parse(text)
                yield from _above(DeviceNumber.parse(text))


def _processes(numbers: set[DeviceNumber], mounted: set[DeviceNumber]) -> Iterator[dict[str, object]]:
    for process in _PROC.iterdir():
        if not process.name.isdigit():
            continue
        with contextlib.suppress(OSError):
            for fd in (process / "fd").iterdir():
                state = fd.stat()
                if _number(state.st_rdev) in numbers or _number(state.st_dev) in mounted:
                    yield {
                        "pid": int(process.name),
                        "command": _text(process / "comm").strip(),
                        "file": os.readlink(fd),
                    }
                    break


def _number(device: int) -> DeviceNumber:
    return DeviceNumber(os.major(device), os.minor(device))


def _text(path: Path) -> str:
    try:
        return path.read_text(errors="replace")
    except OSError:
        return ""
