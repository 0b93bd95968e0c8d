# SPDX-License-Identifier: Apache-2.0
"""What the kernel's NVMe target does while I/O is running: cuts that wait, hosts that stay, and held I/O."""

from __future__ import annotations

import contextlib
import fcntl
import mmap
import os
import struct
import threading
import uuid
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path

import pytest

from csi_driver.deadline import Deadline
from csi_driver.host.connectors.nvme import NvmeVolumes
from csi_driver.host.freeze import Freezer
from csi_driver.host.nvme_target import NvmeTarget
from csi_driver.nvme_model import ConnectedVolume, NvmeExport, TargetExport, host_nqn, subsystem_nqn
from tests.contract.host_machine import shell
from tests.contract.raw_nvme_host import BLOCK_BYTES, RawHost, block, in_file
from tests.reflink_pool import mounted

pytestmark = [pytest.mark.root, pytest.mark.device_mapper]

MIB = 1 << 20
NODE = "node-1"
ONE, OTHER = host_nqn(NODE), host_nqn("node-2")
SLOW_MS = 3000
HELD_MS = 600_000  # until it is made fast
FICLONE = 0x40049409


@dataclass
class Machine:
    directory: Path
    target: NvmeTarget
    volumes: NvmeVolumes
    stack: contextlib.ExitStack
    pool: str = field(default_factory=lambda: str(uuid.uuid4()))
    numbers: Iterator[int] = field(default_factory=lambda: iter(range(24001, 25000)))

    def export(self, directory: Path, *hosts: str) -> TargetExport:
        volume = str(uuid.uuid4())
        file = directory / volume
        with file.open("wb") as made:
            made.write(bytes(8 * MIB))
            os.fsync(made.fileno())
        nqn = subsystem_nqn(self.pool, volume, "1")
        return self.target.apply(TargetExport(nqn, volume, file, next(self.numbers), ("127.0.0.1",), frozenset(hosts)))

    def close(self) -> None:
        """Disconnect the hosts and withdraw the exports."""
        self.stack.close()
        withdraw_all(self.target, self.pool)

    def raw(self, export: TargetExport, host: str) -> RawHost:
        return self.stack.enter_context(RawHost("127.0.0.1", export.port, export.nqn, host))

    def writer(self, *exports: TargetExport) -> Writer:
        """Write to the volumes by the kernel's host."""
        writer = Writer(*(self.device(each) for each in exports))
        self.stack.callback(writer.end)
        return writer

    def device(self, export: TargetExport) -> Path:
        """Connect by the kernel; return the device."""
        name = f"csi-{export.port}"
        paths = NvmeExport(export.nqn, (f"127.0.0.1:{export.port}",))
        volume = ConnectedVolume(name, export.uuid, paths, 8 * MIB)
        self.volumes.connect(volume, "/stage", deadline=Deadline.after(60))
        self.stack.callback(self.volumes.disconnect, name, "/stage", deadline=Deadline.after(120))
        return self.directory / "dev" / name


@pytest.fixture
def machine(tmp_path: Path) -> Iterator[Machine]:
    shell("ip", "link", "set", "lo", "up")
    shell("modprobe", "nvme-tcp")
    target = NvmeTarget()
    assert target.why_not() == ""
    volumes = NvmeVolumes(lambda: NODE, tmp_path / "dev", tmp_path / "registry")
    assert volumes.why_not() == ""
    with contextlib.ExitStack() as stack:
        made = Machine(tmp_path, target, volumes, stack)
        yield made
        made.close()


def withdraw_all(target: NvmeTarget, pool: str) -> None:
    for each in target.exported(pool):
        target.withdraw(each)


@dataclass
class SlowPool:
    """A filesystem whose writes take a while once `slow` was called."""

    place: Path
    name: str
    sectors: int
    below: str

    def _load(self, table: str) -> None:
        shell("dmsetup", "suspend", "--nolockfs", self.name)  # its thaw writes
        shell("dmsetup", "reload", self.name, "--table", table)
        shell("dmsetup", "resume", self.name)

    def slow(self, delay_ms: int) -> None:
        self._load(f"0 {self.sectors} delay {self.below} 0 0 {self.below} 0 {delay_ms}")

    def fast(self) -> None:
        """Let the waiting writes go on, too."""
        self._load(f"0 {self.sectors} delay {self.below} 0 0 {self.below} 0 0")


@pytest.fixture
def slow_pool(tmp_path: Path) -> Iterator[SlowPool]:
    disk = tmp_path / "disk"
    with disk.open("wb") as made:
        made.truncate(64 * MIB)
    below = shell("losetup", "--find", "--show", "--direct-io=on", str(disk)).strip()
    name, place = f"slow-{uuid.uuid4().hex[:8]}", tmp_path / "slow"
    sectors = 64 * MIB // 512
    shell("dmsetup", "create", name, "--table", f"0 {sectors} delay {below} 0 0 {below} 0 0")
    device = Path(f"/dev/mapper/{name}")
    shell("mkfs.ext4", "-q", "-b", "4096", "-O", "^has_journal", str(device))  # so that nobody else writes
    place.mkdir()
    shell("mount", "-o", "lazytime", str(device), str(place))
    pool = SlowPool(place, name, sectors, below)
    try:
        yield pool
    finally:
        pool.fast()
        shell("umount", str(place))
        shell("dmsetup", "remove", "--retry", name)
        shell("losetup", "--detach", below)


def slow_write(machine: Machine, pool: SlowPool, *, delay_ms: int = SLOW_MS) -> TargetExport:
    """Return an export of two hosts, one of which has a write that is running: it began, and takes a while."""
    export = machine.export(pool.place, ONE, OTHER)
    host = machine.raw(export, OTHER)
    host.write(0, block(1))
    os.sync()
    pool.slow(delay_ms)
    host.begin_write(0, block(2))
    # The target takes the requests of a queue in order: the write is running when the read, which is fast, is answered.
    assert host.read(BLOCK_BYTES, BLOCK_BYTES) == bytes(BLOCK_BYTES)
    return export


@pytest.mark.parametrize("stays", [True, False], ids=["another host stays", "nobody stays"])
def test_a_cut_waits_for_the_requests_that_are_running(slow_pool: SlowPool, machine: Machine, stays: bool) -> None:
    export = slow_write(machine, slow_pool)
    machine.target.apply(replace(export, hosts=frozenset({ONE} if stays else ()), is_enabled=stays))
    assert in_file(export.file) == 2


def test_without_its_wait_the_cut_would_be_too_early(slow_pool: SlowPool, machine: Machine) -> None:
    export = slow_write(machine, slow_pool, delay_ms=HELD_MS)
    hasty = NvmeTarget(sockets=lambda ports: dict.fromkeys(ports, ()))
    hasty.apply(replace(export, hosts=frozenset({ONE})))
    assert in_file(export.file) == 1
    slow_pool.fast()
    assert Deadline.after(60).wait_until(lambda: in_file(export.file) == 2)


def test_the_kernel_shows_a_namespace_as_disabled_while_its_requests_run(slow_pool: SlowPool, machine: Machine) -> None:
    export = slow_write(machine, slow_pool, delay_ms=HELD_MS)
    enable, files = f"subsystems/{export.nqn}/namespaces/1/enable", machine.target.files
    disabling = threading.Thread(target=files.write, args=(enable, "0"), daemon=True)
    disabling.start()
    assert Deadline.after(60).wait_until(lambda: files.read(enable) == "0")
    assert disabling.is_alive()
    assert in_file(export.file) == 1
    slow_pool.fast()
    disabling.join(60)
    assert not disabling.is_alive()
    assert in_file(export.file) == 2


def test_a_cut_does_not_wait_for_data_that_never_comes(machine: Machine, tmp_path: Path) -> None:
    export = machine.export(tmp_path, OTHER)
    host = machine.raw(export, OTHER)
    host.write(0, block(1))
    host.begin_write(0, block(2), only_bytes=512)
    machine.target.apply(replace(export, hosts=frozenset()))
    assert in_file(export.file) == 1


class Writer:
    """Writes ascending numbers to block 0 of each device in turn: no device has a number that an earlier one lacks."""

    def __init__(self, *devices: Path) -> None:
        self.fds = [os.open(each, os.O_RDWR | os.O_DIRECT) for each in devices]
        self.written = 0
        self.error: OSError | None = None
        self._buffer = mmap.mmap(-1, BLOCK_BYTES)
        self._is_over = False
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def _run(self) -> None:
        try:
            while not self._is_over:
                self._buffer[:] = block(self.written + 1)
                for fd in self.fds:
                    os.pwrite(fd, self._buffer, 0)
                self.written += 1
        except OSError as error:
            self.error = error

    def goes_on(self) -> None:
        before = self.written
        assert Deadline.after(60).wait_until(lambda: self.written > before + 1 or self.error is not None)
        assert self.error is None

    def end(self) -> None:
        self._is_over = True
        self._thread.join(60)
        assert not self._thread.is_alive()
        while self.fds:
            os.close(self.fds.pop())


def test_a_host_that_stays_goes_on_without_an_error(machine: Machine, tmp_path: Path) -> None:
    export = machine.export(tmp_path, ONE, OTHER)
    writer = machine.writer(export)
    other = machine.raw(export, OTHER)
    other.write(BLOCK_BYTES, block(7))
    writer.goes_on()
    machine.target.apply(replace(export, hosts=frozenset({ONE})))
    with pytest.raises(ConnectionError):
        other.write(BLOCK_BYTES, block(8))
    writer.goes_on()
    writer.end()
    assert in_file(export.file) == writer.written
    assert in_file(export.file, BLOCK_BYTES) == 7


def test_a_start_of_the_machine_makes_hosts_wait_and_refuses_nobody(machine: Machine, tmp_path: Path) -> None:
    """All exports are gone and come back one after the other; the writers only wait."""
    exports = [machine.export(tmp_path, ONE) for _ in range(3)]
    writers = [machine.writer(each) for each in exports]
    for each in exports:
        machine.target.withdraw(each)
    for each, writer in zip(exports, writers, strict=True):
        machine.target.apply(each)
        writer.goes_on()
    for each, writer in zip(exports, writers, strict=True):
        writer.end()
        assert in_file(each.file) == writer.written


def test_a_volume_grows_under_its_host(machine: Machine, tmp_path: Path) -> None:
    export = machine.export(tmp_path, ONE)
    device = machine.device(export)
    os.truncate(export.file, 16 * MIB)
    machine.target.grow(export)

    def size_bytes() -> int:
        fd = os.open(device, os.O_RDONLY)
        try:
            return os.lseek(fd, 0, os.SEEK_END)
        finally:
            os.close(fd)

    assert Deadline.after(60).wait_until(lambda: size_bytes() == 16 * MIB)


# --- snapshots of several exports ---


@pytest.fixture
def no_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    """The emulated machine is slow."""
    monkeypatch.setattr("csi_driver.host.freeze._EXPORT_LIMIT_S", 120.0)


def copies(machine: Machine, exports: list[TargetExport], directory: Path) -> list[int]:
    """Copy the exported files while the exports are held; return the numbers in their first blocks."""
    numbers = []
    with Freezer(directory).held([each.file for each in exports], [each.nqn for each in exports], limit_s=120.0) as end:
        for each in exports:
            with each.file.open("rb") as source, (directory / "copy").open("wb+") as target:
                fcntl.ioctl(target.fileno(), FICLONE, source.fileno())
                target.seek(0)
                numbers.append(struct.unpack("<Q", target.read(8))[0])
        end()
    return numbers


@pytest.mark.usefixtures("no_limit")
def test_no_cut_of_exports_has_a_write_without_the_one_that_it_depends_on(machine: Machine, tmp_path: Path) -> None:
    """And the writer, by the kernel's own host, only waits."""
    with mounted(tmp_path) as pool:
        exports = [machine.export(pool, ONE) for _ in range(3)]
        writer = machine.writer(*exports)
        try:
            for _ in range(8):
                writer.goes_on()
                numbers = copies(machine, exports, pool)
                assert numbers == sorted(numbers, reverse=True)
                assert numbers[0] - numbers[-1] <= 1
            writer.goes_on()
        finally:
            machine.close()


@pytest.mark.usefixtures("no_limit")
def test_held_exports_take_no_write(machine: Machine, tmp_path: Path) -> None:
    export = machine.export(tmp_path, ONE, OTHER)
    writer, other = machine.writer(export), machine.raw(export, OTHER)
    with Freezer(tmp_path).held([export.file], [export.nqn], limit_s=120.0) as end:
        with pytest.raises(OSError, match="status 0x"):
            other.write(BLOCK_BYTES, block(9))
        assert in_file(export.file, BLOCK_BYTES) == 0
        end()
    writer.goes_on()
    writer.end()
