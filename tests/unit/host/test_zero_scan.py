# SPDX-License-Identifier: Apache-2.0
"""The scan for blank devices, on plain files."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from csi_driver.errors import HostFailure
from csi_driver.host import zero_scan
from csi_driver.host_model import Device, DeviceNumber, OpenDevice
from csi_driver.model import GIB, MIB


@contextmanager
def opened(path: Path, size_bytes: int) -> Iterator[OpenDevice]:
    """Open a file as if it were a device of that size."""
    fd = os.open(path, os.O_RDONLY)
    try:
        yield OpenDevice(fd, Device("csi-1", path, DeviceNumber(7, 0), size_bytes, False, None))
    finally:
        os.close(fd)


def first_data(path: Path, size_bytes: int) -> int | None:
    with opened(path, size_bytes) as device:
        return zero_scan.first_data(device, deadline=None, progress=lambda _done, _total: None)


@pytest.mark.parametrize("offset", [0, 1, 511, 4095, 4096, MIB - 1, MIB, 4 * MIB - 1, 4 * MIB, 9 * MIB - 1])
def test_one_byte_is_found_at_its_offset(tmp_path: Path, offset: int) -> None:
    path = tmp_path / "device"
    with path.open("wb") as file:
        file.truncate(9 * MIB)
        file.seek(offset)
        file.write(b"\x01")
    assert first_data(path, 9 * MIB) == offset


def test_a_device_full_of_one_value_is_not_blank(tmp_path: Path) -> None:
    path = tmp_path / "device"
    path.write_bytes(b"\xff" * (5 * MIB))
    assert first_data(path, 5 * MIB) == 0


def test_zeroes_are_blank(tmp_path: Path) -> None:
    path = tmp_path / "device"
    path.write_bytes(bytes(5 * MIB + 512))
    assert first_data(path, 5 * MIB + 512) is None


@pytest.mark.parametrize("there_bytes", [0, 4096, 4 * MIB, 5 * MIB - 512])
def test_a_short_device_is_a_failure(tmp_path: Path, there_bytes: int) -> None:
    path = tmp_path / "device"
    path.write_bytes(bytes(there_bytes))
    with pytest.raises(HostFailure, match=f"ends at byte {there_bytes}, expected {5 * MIB}"):
        first_data(path, 5 * MIB)


@pytest.mark.parametrize(("size_bytes", "most"), [(GIB, 1), (5 * GIB, 5), (10 << 40, 20), ((10 << 40) + 4096, 20)])
def test_the_largest_volume_reports_progress_rarely(size_bytes: int, most: int) -> None:
    step = zero_scan.progress_step(size_bytes)
    assert (step >= GIB, -(-size_bytes // step)) == (True, most)
