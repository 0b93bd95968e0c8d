# SPDX-License-Identifier: Apache-2.0
"""How a volume's device passes requests to the pool: direct I/O, block size, queue, and flushes."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from csi_driver.embedded.local_engine import label_of
from csi_driver.errors import HostFailure
from csi_driver.host import ioctls
from csi_driver.host.connectors import loop
from csi_driver.host.connectors.loop import LoopDevices
from csi_driver.host_model import LoopDevice
from tests.unit.embedded.manager import Manager, running, settings_in

pytestmark = pytest.mark.root

LABEL = "11111111-2222-3333-4444-555555555555/0123456789abcdef"
POOLS = {"ext4": ("-q",), "xfs": ("-q",)}


@pytest.fixture
def loops(tmp_path: Path) -> Iterator[LoopDevices]:
    devices = LoopDevices()
    yield devices
    for device in devices.bound_to(tmp_path):
        devices.detach(device)


def sparse(file: Path, size_bytes: int) -> Path:
    with file.open("wb") as stream:
        stream.truncate(size_bytes)
    return file


def setting(device: LoopDevice, name: str) -> str:
    return (Path(f"/sys/block/loop{device.number}") / name).read_text().strip()


def sequence(node: Path) -> int | None:
    fd = os.open(node, os.O_RDONLY)
    try:
        return ioctls.disk_sequence(fd)
    finally:
        os.close(fd)


@pytest.fixture(params=POOLS)
def drive(request: pytest.FixtureRequest, tmp_path: Path, loops: LoopDevices) -> Iterator[LoopDevice]:
    """A drive that nobody else uses, with a filesystem for volumes mounted at tmp_path/pool."""
    device = loops.attach(sparse(tmp_path / "drive", 512 << 20), tmp_path / "node", label=LABEL, read_only=False)
    mkfs = [f"mkfs.{request.param}", *POOLS[request.param], str(device.node)]
    subprocess.run(mkfs, check=True, stdout=subprocess.DEVNULL)
    (tmp_path / "pool").mkdir()
    subprocess.run(["mount", str(device.node), str(tmp_path / "pool")], check=True)
    yield device
    for bound in loops.bound_to(tmp_path / "pool"):
        assert loops.detach(bound)
    subprocess.run(["umount", str(tmp_path / "pool")], check=True)


@pytest.fixture
def volume(tmp_path: Path, drive: LoopDevice, loops: LoopDevices) -> LoopDevice:
    file = sparse(tmp_path / "pool" / "volume", 64 << 20)
    return loops.attach(file, tmp_path / "volume-node", label=LABEL, read_only=False)


def test_a_volume_has_direct_io(volume: LoopDevice) -> None:
    assert setting(volume, "loop/dio") == "1"


def test_a_volume_has_blocks_of_4096_bytes(volume: LoopDevice) -> None:
    assert setting(volume, "queue/logical_block_size") == "4096"


def test_a_volume_tells_filesystems_to_flush(volume: LoopDevice) -> None:
    assert setting(volume, "queue/write_cache") == "write back"


@pytest.mark.parametrize(("name", "left", "wanted"), [
    ("write_cache", "write through", "write back"), ("scheduler", "mq-deadline", "[none]"),
])  # fmt: skip
def test_a_setting_of_a_devices_previous_use_is_undone(
    name: str, left: str, wanted: str, tmp_path: Path, loops: LoopDevices, request: pytest.FixtureRequest
) -> None:
    file = sparse(tmp_path / "previous", 1 << 20)
    used = loops.attach(file, None, label=LABEL, read_only=False)
    if name == "scheduler" and left not in setting(used, "queue/scheduler"):
        pytest.skip(f"this kernel has no {left}")
    queue_file = Path(f"/sys/block/loop{used.number}/queue/{name}")
    request.addfinalizer(lambda: queue_file.write_text(wanted.strip("[]")) and None)
    queue_file.write_text(left)
    assert loops.detach(used)
    # Another program may bind the device first, or free one with a lower number.
    files = (sparse(tmp_path / f"{turn}", 1 << 20) for turn in range(64))
    again = (loops.attach(file, None, label=LABEL, read_only=False) for file in files)
    device = next(device for device in again if device.number == used.number)
    assert setting(device, f"queue/{name}").startswith(wanted)


def test_a_device_whose_settings_are_refused_is_free_again(
    tmp_path: Path, loops: LoopDevices, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_arguments: object, **_options: object) -> None:
        raise HostFailure("refused")

    monkeypatch.setattr(loop, "_prepare", refuse)
    with pytest.raises(HostFailure, match="refused"):
        loops.attach(sparse(tmp_path / "file", 1 << 20), None, label=LABEL, read_only=False)
    assert loops.bound_to(tmp_path) == ()


def flushes(device: LoopDevice) -> int:
    """Return how many flush requests a device has completed (Documentation/block/stat.rst, "flush I/Os")."""
    return int(setting(device, "stat").split()[15])


def sectors_written(device: LoopDevice) -> int:
    return int(setting(device, "stat").split()[6])


def by_fsync(node: Path, data: bytes) -> None:
    fd = os.open(node, os.O_RDWR)
    try:
        os.pwrite(fd, data, 0)
        os.fsync(fd)
    finally:
        os.close(fd)


def by_fua(node: Path, data: bytes) -> None:
    """Write through: the kernel sends a write that must be durable when it completes."""
    fd = os.open(node, os.O_RDWR | os.O_DSYNC)
    try:
        os.pwrite(fd, data, 0)
    finally:
        os.close(fd)


@pytest.mark.parametrize("write", [by_fsync, by_fua])
def test_a_durable_write_reaches_the_pools_drive_with_a_flush(
    write: Callable[[Path, bytes], None], drive: LoopDevice, volume: LoopDevice
) -> None:
    assert volume.node is not None
    flushed, written = flushes(drive), sectors_written(drive)
    write(volume.node, os.urandom(1 << 20))
    assert flushes(drive) > flushed
    assert sectors_written(drive) - written >= (1 << 20) // 512


def test_a_filesystem_without_direct_io_is_named_in_the_log(
    tmp_path: Path, loops: LoopDevices, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "pool").mkdir()
    subprocess.run(["mount", "-t", "ramfs", "none", str(tmp_path / "pool")], check=True)
    try:
        file = sparse(tmp_path / "pool" / "volume", 1 << 20)
        device = loops.attach(file, None, label=LABEL, read_only=False)
        found = setting(device, "loop/dio")
        assert loops.detach(device)
    finally:
        subprocess.run(["umount", str(tmp_path / "pool")], check=True)
    assert found == "0"
    assert f"loop{device.number} over {file}: expected direct I/O" in caplog.text


def test_nothing_is_logged_where_direct_io_is_effective(volume: LoopDevice, caplog: pytest.LogCaptureFixture) -> None:
    assert setting(volume, "loop/dio") == "1"
    assert "direct I/O" not in caplog.text


def attached(manager: Manager, directory: Path) -> Path:
    manager.save("data")
    manager.attach("data")
    return directory / "node-1" / "dev" / "data"


def test_a_restart_of_the_manager_leaves_an_attached_device_as_it_is(tmp_path: Path, loops: LoopDevices) -> None:
    settings = settings_in(tmp_path)
    with running(settings, loops) as manager:
        node = attached(manager, tmp_path)
        before = sequence(node)
    with running(settings, loops) as manager:
        assert sequence(node) == before
        manager.detach("data")


def test_a_device_with_another_block_size_keeps_it_while_it_is_attached(tmp_path: Path, loops: LoopDevices) -> None:
    settings = settings_in(tmp_path)
    with running(settings, loops) as manager:
        node = attached(manager, tmp_path)
        file, label = manager.server.pool.file(manager.uuid("data")), label_of(manager.uuid("data"), "node-1")
    (device,) = loops.bound_to(tmp_path)
    assert loops.detach(device)
    loops.attach(file, node, label=label, read_only=False, block_size=512)
    before = sequence(node)
    with running(settings, loops) as manager:
        (device,) = loops.bound_to(tmp_path)
        assert (sequence(node), setting(device, "queue/logical_block_size")) == (before, "512")
        manager.detach("data")
