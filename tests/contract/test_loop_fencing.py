# SPDX-License-Identifier: Apache-2.0
"""A fenced loop device: no write reaches its file any more."""

from __future__ import annotations

import hashlib
import mmap
import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from csi_driver.host.connectors.loop import LoopDevices
from csi_driver.host_model import LoopDevice

pytestmark = pytest.mark.root

LABEL = "11111111-2222-3333-4444-555555555555/0123456789abcdef"
SIZE = 512 << 20


@pytest.fixture
def loops() -> LoopDevices:
    return LoopDevices()


@pytest.fixture
def device(tmp_path: Path, loops: LoopDevices) -> Iterator[LoopDevice]:
    file = tmp_path / "file"
    with file.open("wb") as stream:
        stream.truncate(SIZE)
    bound = loops.attach(file, tmp_path / "node", label=LABEL, read_only=False)
    yield bound
    subprocess.run(["umount", "--lazy", str(tmp_path / "mnt")], check=False, capture_output=True)
    loops.detach(bound)


def node(device: LoopDevice) -> Path:
    assert device.node is not None
    return device.node


def mounted(device: LoopDevice, fs_type: str, at: Path) -> Path:
    subprocess.run([f"mkfs.{fs_type}", "-q", str(node(device))], check=True)
    at.mkdir()
    subprocess.run(["mount", "-t", fs_type, str(node(device)), str(at)], check=True)
    return at


def digest(file: Path) -> str:
    """Return the digest of a file, read with O_DIRECT; holes are skipped."""
    total = hashlib.sha256()
    with file.open("rb") as stream:
        while chunk := stream.read(4 << 20):
            total.update(chunk)
    return total.hexdigest()


def flush(root: Path) -> None:
    """Write the cache of a filesystem; errors are expected."""
    subprocess.run(["sync", "--file-system", str(root)], check=False, capture_output=True)


def tried(write: object) -> str:
    assert callable(write)
    try:
        write()
    except OSError:
        return "refused"
    return "taken"


@pytest.mark.parametrize("fs_type", ["ext4", "xfs", "btrfs"])
def test_no_write_of_a_mounted_filesystem_reaches_the_file(
    tmp_path: Path, loops: LoopDevices, device: LoopDevice, fs_type: str
) -> None:
    root = mounted(device, fs_type, tmp_path / "mnt")
    (root / "before").write_bytes(b"1" * 100_000)
    flush(root)
    # Not yet on its way to the device when the cut comes.
    (root / "unwritten").write_bytes(b"2" * 5_000_000)
    cut = loops.fence(device)
    assert cut is not None
    assert cut.fenced
    after = digest(device.file)

    def append() -> None:
        with (root / "before").open("ab") as stream:
            stream.write(b"3" * 100_000)
            stream.flush()
            os.fsync(stream.fileno())

    assert tried(append) == "refused"
    tried(lambda: (root / "new").write_bytes(b"4" * 8192))
    flush(root)
    subprocess.run(["umount", str(root)], check=True)
    assert digest(device.file) == after


def test_no_write_to_the_raw_device_reaches_the_file(loops: LoopDevices, device: LoopDevice) -> None:
    buffered = os.open(node(device), os.O_RDWR)
    direct = os.open(node(device), os.O_RDWR | os.O_DIRECT)
    view = mmap.mmap(buffered, 1 << 20)
    block = mmap.mmap(-1, 4096)
    block.write(b"x" * 4096)
    try:
        view[:8192] = b"m" * 8192
        assert loops.fence(device) is not None
        assert device.file.read_bytes()[:8192] == b"m" * 8192
        after = digest(device.file)
        for offset in (0, 4096, SIZE - 4096):
            assert tried(lambda offset=offset: os.pwritev(direct, [block], offset)) == "refused"
            tried(lambda offset=offset: os.pwrite(buffered, b"y" * 4096, offset))
            tried(lambda: os.fsync(buffered))
        assert digest(device.file) == after
    finally:
        os.close(direct)
        os.close(buffered)
        view.close()


def test_a_fenced_device_stays_fenced_until_unbound(tmp_path: Path, loops: LoopDevices, device: LoopDevice) -> None:
    holder = os.open(node(device), os.O_RDONLY)
    try:
        assert loops.fence(device) is not None
        assert not loops.detach(device)
        loops.grow(device)
        (found,) = loops.bound_to(tmp_path)
        assert found.fenced
    finally:
        os.close(holder)
    assert loops.detach(device)
    anew = loops.attach(device.file, node(device), label=LABEL, read_only=False)
    (found,) = loops.bound_to(tmp_path)
    assert not found.fenced
    assert loops.detach(anew)
