# SPDX-License-Identifier: Apache-2.0
"""How fast every block of a device is read before it is formatted, against what dd(1) gets out of the same device."""

from __future__ import annotations

import os
import subprocess
import time
import uuid
from collections.abc import Callable
from pathlib import Path

from csi_driver.host import zero_scan
from csi_driver.host.connectors.loop import LoopDevices
from csi_driver.host.devices import LinuxDevices
from tests.bench.report import Report

PIECE_BYTES = 4 << 20


def measure_scan(directory: Path, report: Report, size_bytes: int) -> None:
    """Write zeroes to a file of that size, and read it through a loop device with direct I/O."""
    table = report.table("Scan of every block", ("reading before a format", "MiB", "GB/s"))
    file, root = directory / "scan.img", directory / "scan"
    root.mkdir()
    with file.open("wb") as made:
        for _ in range(size_bytes // PIECE_BYTES):
            made.write(bytes(PIECE_BYTES))
        made.flush()
        os.fsync(made.fileno())
    loops = LoopDevices()
    loop = loops.attach(file, root / "csi-scan", label=f"{uuid.uuid4()}/bench", read_only=False)
    try:
        devices = LinuxDevices(root, directory)
        for name, read in (("every block", _scan), ("dd, 4 MiB at a time", _dd)):
            best_s = min(_seconds(read, devices) for _ in range(3))
            table.row(name, size_bytes >> 20, size_bytes / best_s / 1e9)
    finally:
        loops.detach(loop)
        file.unlink()


def _scan(devices: LinuxDevices) -> None:
    device = devices.find("csi-scan")
    assert device is not None
    with devices.open(device) as opened:
        assert zero_scan.first_data(opened, deadline=None, progress=lambda _done, _total: None) is None


def _dd(devices: LinuxDevices) -> None:
    argv = ["dd", f"if={devices.path_of('csi-scan')}", "of=/dev/null", "bs=4M", "iflag=direct"]
    subprocess.run(argv, check=True, capture_output=True)


def _seconds(read: Callable[[LinuxDevices], None], devices: LinuxDevices) -> float:
    begun = time.perf_counter()
    read(devices)
    return time.perf_counter() - begun
