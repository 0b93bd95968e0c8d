# SPDX-License-Identifier: Apache-2.0
"""The scan for blank devices, on plain files."""

from __future__ import annotations

import ctypes
import errno
import mmap
import os
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest

from csi_driver.deadline import Deadline
from csi_driver.errors import HostFailure, SystemCallFailed
from csi_driver.host import async_reads, syscalls, zero_scan
from csi_driver.host_model import Device, DeviceNumber, OpenDevice
from csi_driver.model import GIB, MIB


@contextmanager
def opened(path: Path, size_bytes: int, flags: int = os.O_RDONLY, start_bytes: int = 0) -> Iterator[OpenDevice]:
    """Open a file as if it were a device of that size, after a header."""
    fd = os.open(path, flags)
    try:
        yield OpenDevice(fd, Device("csi-1", path, DeviceNumber(7, 0), size_bytes, False, None), start_bytes)
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


def quick(path: Path, size_bytes: int, flags: int = os.O_RDONLY) -> int | None:
    with opened(path, size_bytes, flags) as device:
        return zero_scan.first_data_in_places(device, Deadline.after(60))


def blank_file(path: Path, size_bytes: int) -> Path:
    with path.open("wb") as file:
        file.truncate(size_bytes)
    return path


def test_one_byte_at_any_place_of_the_quick_probe_is_found(tmp_path: Path) -> None:
    path, size = blank_file(tmp_path / "device", GIB), GIB
    assert quick(path, size) is None
    with path.open("r+b", buffering=0) as file:
        for start, length in zero_scan.probe_places(size):
            for offset in {start, start + length - 1}:
                os.pwrite(file.fileno(), b"\x01", offset)
                assert quick(path, size) == offset
                os.pwrite(file.fileno(), b"\0", offset)


def test_the_quick_probe_waits_for_the_device_a_few_times(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = blank_file(tmp_path / "device", 10 * GIB)
    waits: list[str] = []
    one, many = os.preadv, async_reads.read_at_once

    def read_one(fd: int, buffers: list[memoryview], offset: int) -> int:
        waits.append("one")
        return one(fd, buffers, offset)

    def read_many(fd: int, address: int, pieces: Sequence[tuple[int, int]]) -> list[int]:
        waits.append("many")
        return many(fd, address, pieces)

    monkeypatch.setattr(os, "preadv", read_one)
    monkeypatch.setattr(zero_scan, "read_at_once", read_many)
    assert quick(path, 10 * GIB) is None
    assert len(waits) <= 6


def test_places_are_read_one_by_one_where_the_kernel_has_no_asynchronous_reads(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = blank_file(tmp_path / "device", GIB)
    monkeypatch.setattr(async_reads, "_AIO_CALLS", {})
    assert quick(path, GIB) is None
    with path.open("r+b") as file:
        file.seek(64 * MIB + 7)
        file.write(b"\x01")
    assert quick(path, GIB) == 64 * MIB + 7


def test_a_read_that_came_back_short_is_completed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = blank_file(tmp_path / "device", GIB)
    with path.open("r+b") as file:
        file.seek(64 * MIB + 4095)
        file.write(b"\x01")
    monkeypatch.setattr(zero_scan, "read_at_once", lambda _fd, _address, pieces: [512] * len(pieces))
    assert quick(path, GIB) == 64 * MIB + 4095


def test_a_failed_read_among_many_is_told_with_its_place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = blank_file(tmp_path / "device", GIB)
    failed = 8 * MIB
    monkeypatch.setattr(
        zero_scan,
        "read_at_once",
        lambda _fd, _address, pieces: [-errno.EIO if offset == failed else length for offset, length in pieces],
    )
    with pytest.raises(HostFailure, match=rf"cannot be read at byte {8 * MIB} \(EIO\)"):
        quick(path, GIB)


def test_a_descriptor_that_cannot_be_read_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(HostFailure, match=r"cannot be read at byte 0 \(EBADF\)"):
        quick(blank_file(tmp_path / "device", GIB), GIB, os.O_WRONLY)


@pytest.mark.parametrize("at_once", [True, False])
def test_what_is_stored_after_a_header_is_read_from_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, at_once: bool
) -> None:
    if not at_once:
        monkeypatch.setattr(async_reads, "_AIO_CALLS", {})
    path, size, start = tmp_path / "device", 32 * MIB, 16 * MIB
    path.write_bytes(b"\xff" * start + bytes(size))
    with opened(path, size, os.O_RDWR, start) as device:
        for offset in (None, 0, MIB, size - 1):
            if offset is not None:
                os.pwrite(device.fd, b"\x01", start + offset)
            quick_answer = zero_scan.first_data_in_places(device, Deadline.after(60))
            answer = zero_scan.first_data(device, deadline=None, progress=lambda _done, _total: None)
            assert (quick_answer, answer) == (offset, offset)
            os.pwrite(device.fd, b"\0", start + (offset or 0))


def test_a_process_that_is_forked_during_a_read_shares_none_of_its_memory(tmp_path: Path) -> None:
    path = blank_file(tmp_path / "device", MIB)
    with opened(path, MIB) as device, zero_scan.DirectReader(device) as reader:
        mappings = re.split(r"^(?=[0-9a-f]+-)", Path("/proc/self/smaps").read_text(), flags=re.MULTILINE)
        (own,) = (mapping for mapping in mappings if mapping.startswith(f"{reader._address:x}-"))
    assert "dc" in own.partition("VmFlags:")[2].split()


def test_reads_at_once_return_each_piece_in_its_place(tmp_path: Path) -> None:
    path = tmp_path / "device"
    path.write_bytes(b"".join(bytes([number]) * 4096 for number in range(8)))
    with opened(path, 8 * 4096) as device, mmap.mmap(-1, 16384) as memory:
        address = ctypes.addressof(first := ctypes.c_char.from_buffer(memory))
        counts = async_reads.read_at_once(device.fd, address, [(7 * 4096, 8192), (4096, 4096)])
        found = memory[:4096], memory[8192:12288]
        del first
    assert (counts, found) == ([4096, 4096], (b"\x07" * 4096, b"\x01" * 4096))


def test_calls_one_after_another_share_a_context(tmp_path: Path) -> None:
    path = blank_file(tmp_path / "device", GIB)
    quick(path, GIB)
    before = list(async_reads._idle_contexts)
    for _ in range(3):
        quick(path, GIB)
    assert async_reads._idle_contexts == before != []


@pytest.mark.parametrize("error", [SystemCallFailed("io_getevents", errno.EINTR), MemoryError()])
def test_reads_whose_results_cannot_be_fetched_are_over_before_their_memory_is_used_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    calls: list[tuple[int, ...]] = []
    real = syscalls.syscall

    def failing(what: str, *arguments: int) -> int:
        if what == "io_getevents":
            calls.append(arguments)
            raise error
        return real(what, *arguments)

    path = blank_file(tmp_path / "device", GIB)
    with monkeypatch.context() as patched:
        patched.setattr(async_reads, "syscall", failing)
        with suppress(MemoryError):
            assert quick(path, GIB, os.O_RDONLY | os.O_DIRECT) is None
    with pytest.raises(SystemCallFailed, match="Invalid argument"):
        real("a context that is gone", *calls[0][:2], 0, 0, None, None)
    assert quick(path, GIB) is None


def test_a_wipe_leaves_nothing_in_the_first_and_last_4_mib(tmp_path: Path) -> None:
    path = tmp_path / "device"
    path.write_bytes(b"\xff" * (16 * MIB))
    with opened(path, 16 * MIB, os.O_RDWR) as device:
        zero_scan.wipe_places(device)
    content = path.read_bytes()
    assert content[: 4 * MIB] + content[-4 * MIB :] == bytes(8 * MIB)
