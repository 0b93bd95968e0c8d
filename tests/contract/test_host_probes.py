# SPDX-License-Identifier: Apache-2.0
"""Faults of devices and filesystems are found, and hanging ones block no other.

The faults are real: an error of ext4, shut down filesystems, truncated backing files, a FUSE filesystem with a server
that never answers, a frozen filesystem.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import struct
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from csi_driver.deadline import Deadline
from csi_driver.errors import StorageUnavailable
from csi_driver.host import syscalls
from csi_driver.host.connectors.loop import LoopDevices, ReadOnlyLoops
from csi_driver.host.health import LinuxProbes
from csi_driver.host.luks import LinuxEncryption
from csi_driver.host.machine_checks import MachineTools
from csi_driver.host.paths import LinuxPaths
from csi_driver.host_model import FaultKind, Mount
from csi_driver.model import MIB, Reason
from csi_driver.node.service import NodeUseCases, assemble
from csi_driver.node_settings import NodeSettings
from tests.contract.host_machine import HostMachine, Volume, host_machine, shell

pytestmark = pytest.mark.root

_GOING_DOWN = 0x8004587D  # XFS_IOC_GOINGDOWN, which ext4 takes too (EXT4_IOC_SHUTDOWN)
_NO_LOG_FLUSH = 2
_FREEZE, _THAW = 0xC0045877, 0xC0045878  # FIFREEZE, FITHAW of linux/fs.h


@pytest.fixture
def machine(tmp_path: Path) -> Iterator[HostMachine]:
    with host_machine(tmp_path) as made:
        yield made


def mounted(machine: HostMachine, fs_type: str = "ext4", *options: str, read_only: bool = False) -> Mount:
    size_bytes = {"ext4": 32, "xfs": 320, "btrfs": 128}[fs_type] * MIB
    _, device = machine.formatted(fs_type, size_bytes)
    target = machine.place()
    machine.mounts.mount(device, target, fs_type, options, read_only=read_only)
    return seen(machine, target)


def seen(machine: HostMachine, path: Path) -> Mount:
    found = machine.mounts.at(path)
    assert found is not None
    return found


def kinds(of: Mount) -> set[FaultKind]:
    return {fault.kind for fault in LinuxProbes().filesystem(of)}


def sysfs(of: Mount) -> Path:
    return Path("/sys/dev/block") / str(of.number)


# --- filesystems ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("read_only", [False, True])
@pytest.mark.parametrize("fs_type", ["ext4", "xfs", "btrfs"])
def test_a_healthy_filesystem_has_no_fault(machine: HostMachine, fs_type: str, read_only: bool) -> None:
    if fs_type not in machine.filesystems.supported():
        pytest.skip(f"mkfs.{fs_type} is not installed")
    found = mounted(machine, fs_type, read_only=read_only)
    assert (kinds(found), found.turned_read_only, LinuxProbes().device(found.number)) == (set(), False, [])


def test_a_read_only_bind_is_no_fault(machine: HostMachine) -> None:
    staged = mounted(machine)
    target = machine.place("bind")
    machine.mounts.bind(staged.path, target, read_only=True)
    assert kinds(seen(machine, target)) == set()


@pytest.mark.parametrize(
    ("option", "expected"),
    [
        ("errors=continue", {FaultKind.ERRORS}),
        ("errors=remount-ro", {FaultKind.ERRORS, FaultKind.TURNED_READ_ONLY}),
    ],
)
def test_errors_of_ext4_are_found(machine: HostMachine, option: str, expected: set[FaultKind]) -> None:
    before = mounted(machine, "ext4", option)
    device = (Path("/sys/dev/block") / str(before.number)).resolve().name
    shown = Path("/sys/fs/ext4") / device
    (shown / "trigger_fs_error").write_text("made by a test")
    # The kernel counts an error after it has gone on, in a work item (fs/ext4/super.c, flush_stashed_error_work).
    assert Deadline.after(120).wait_until(lambda: int((shown / "errors_count").read_text()) > 0, most_s=0.01)
    target = machine.place("publication")
    machine.mounts.bind(before.path, target, read_only=False)
    for path in (before.path, target):
        assert kinds(seen(machine, path)) == expected


@pytest.mark.parametrize("fs_type", ["ext4", "xfs"])
def test_a_shut_down_filesystem_is_found(machine: HostMachine, fs_type: str) -> None:
    if fs_type not in machine.filesystems.supported():
        pytest.skip(f"mkfs.{fs_type} is not installed")
    path = mounted(machine, fs_type).path
    shut_down(path)
    found = kinds(seen(machine, path))
    assert found & {FaultKind.SHUT_DOWN, FaultKind.IO_ERROR}


def shut_down(path: Path) -> None:
    fd = os.open(path, os.O_RDONLY)
    try:
        fcntl.ioctl(fd, _GOING_DOWN, struct.pack("I", _NO_LOG_FLUSH))
    finally:
        os.close(fd)


def test_a_filesystem_turned_read_only_differs_from_a_read_only_mount(machine: HostMachine) -> None:
    """Only the superblock is read-only, as with errors=remount-ro before Linux 6.15."""
    before = mounted(machine)
    shell("mount", "-o", "remount,ro", str(before.path))
    shell("mount", "-o", "remount,bind,rw", str(before.path))
    now = seen(machine, before.path)
    assert now.turned_read_only
    assert FaultKind.TURNED_READ_ONLY in kinds(now)
    table = [entry for entry in machine.mounts.table() if entry.path == before.path]
    assert [entry.turned_read_only for entry in table] == [True]


# --- devices ----------------------------------------------------------------------------------------------------


def faults(machine: HostMachine, volume: Volume) -> set[FaultKind]:
    device = machine.devices.find(volume.name)
    assert device is not None
    return {fault.kind for fault in LinuxProbes().device(device.number)}


def test_a_device_that_refuses_writes_is_found(machine: HostMachine) -> None:
    volume = machine.volume()
    shell("blockdev", "--setro", str(machine.device_root / volume.name))
    assert faults(machine, volume) == {FaultKind.DEVICE_READ_ONLY}


def test_a_deleted_backing_file_is_found(machine: HostMachine) -> None:
    volume = machine.volume()
    volume.file.unlink()
    assert faults(machine, volume) == {FaultKind.BACKING_FILE_GONE}


def test_a_truncated_backing_file_is_found(machine: HostMachine) -> None:
    volume = machine.volume()
    os.truncate(volume.file, MIB)
    assert faults(machine, volume) == {FaultKind.BACKING_FILE_CUT_SHORT}


# --- what hangs, under the whole of the node --------------------------------------------------------------------


@pytest.fixture
def node(machine: HostMachine) -> NodeUseCases:
    paths = LinuxPaths([machine.directory])
    return assemble(
        devices=machine.devices,
        encryption=LinuxEncryption(machine.devices),
        read_only_devices=ReadOnlyLoops(LoopDevices()),
        mounts=machine.mounts,
        filesystems=machine.filesystems,
        paths=paths,
        probes=LinuxProbes(),
        tools=MachineTools(),
        settings=NodeSettings("n", machine.directory / "state", statistics_timeout_s=0.3),
    )


@contextlib.contextmanager
def dead_fuse(source: Path, target: Path) -> Iterator[None]:
    """Mount a FUSE filesystem with a server that never answers: every access hangs."""
    server = os.open("/dev/fuse", os.O_RDWR | os.O_CLOEXEC)
    try:
        syscalls.mount(str(source), target, "fuse", 0, f"fd={server},rootmode=40000,user_id=0,group_id=0")
        yield
    finally:
        os.close(server)  # ends all hanging accesses
        subprocess.run(["umount", "--lazy", str(target)], check=False, capture_output=True)


def reasons(node: NodeUseCases, volume_id: str, path: Path) -> set[Reason]:
    health = node.health.volume(volume_id, str(path), "", deadline=Deadline.after(120))
    return {entry.reason for entry in health.entries}


def test_a_hanging_filesystem_is_reported_and_blocks_no_other(machine: HostMachine, node: NodeUseCases) -> None:
    alive = mounted(machine)
    dead = machine.place("dead")
    with dead_fuse(machine.devices.path_of("csi-dead"), dead):
        for _ in range(2):
            with pytest.raises(StorageUnavailable, match=r"did not respond|still blocked"):
                node.statistics.usage("csi-dead", str(dead), "", deadline=Deadline.after(120))
            assert reasons(node, "csi-dead", dead) == {Reason.NOT_RESPONDING}
        use = node.statistics.usage("csi-1", str(alive.path), "", deadline=Deadline.after(120))
        assert use.total_bytes
        assert reasons(node, "csi-1", alive.path) == set()
    call = node.health.watchdog._calls.get("csi-dead")
    assert call is None or call.job.exception(120) is None


def test_a_frozen_filesystem_is_answered(machine: HostMachine, node: NodeUseCases) -> None:
    """fsfreeze stops only writers, and the probes do not write."""
    found = mounted(machine)
    fd = os.open(found.path, os.O_RDONLY)
    try:
        fcntl.ioctl(fd, _FREEZE, 0)
        try:
            use = node.statistics.usage("csi-1", str(found.path), "", deadline=Deadline.after(120))
            assert use.total_inodes
            assert reasons(node, "csi-1", found.path) == set()
        finally:
            fcntl.ioctl(fd, _THAW, 0)
    finally:
        os.close(fd)


def test_faults_reach_the_health_of_a_volume(machine: HostMachine, node: NodeUseCases) -> None:
    found = mounted(machine)
    assert reasons(node, "csi-1", found.path) == set()
    free = os.statvfs(found.path).f_bavail * os.statvfs(found.path).f_frsize
    with contextlib.suppress(OSError), (found.path / "big").open("wb") as file:
        file.write(bytes(free + MIB))
    use = node.statistics.usage("csi-1", str(found.path), "", deadline=Deadline.after(120))
    assert use.available_bytes == 0
    assert reasons(node, "csi-1", found.path) == {Reason.FILESYSTEM_FULL}
    shut_down(found.path)
    assert reasons(node, "csi-1", found.path) & {Reason.FILESYSTEM_SHUT_DOWN, Reason.IO_ERROR}


def test_exhausted_inodes_are_reported(machine: HostMachine, node: NodeUseCases) -> None:
    volume = machine.volume(size_bytes=16 * MIB)
    shell("mkfs.ext4", "-q", "-N", "16", str(machine.device_root / volume.name))
    target = machine.place()
    machine.mounts.mount(machine.device(volume), target, "ext4", [], read_only=False)
    with contextlib.suppress(OSError):
        for number in range(64):
            (target / str(number)).touch()
    assert reasons(node, volume.name, target) == {Reason.INODES_EXHAUSTED}
