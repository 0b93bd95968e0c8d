# SPDX-License-Identifier: Apache-2.0
"""Devices that block, fail or lose their I/O, or return with the number of another, in a virtual machine.

A volume's device is a device-mapper table over a loop device, which can be suspended (processes that wait for its I/O
cannot be killed) and made to fail; or a null_blk in memory, which can be removed under a mount, and reuses the number
of the previous one.
"""

from __future__ import annotations

import contextlib
import os
import uuid
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from csi_driver.host import block_devices, ioctls
from csi_driver.host_model import DeviceNumber
from csi_driver.model import MIB
from csi_driver.publish_context import Encryption
from tests.contract.host_machine import Volume as LoopVolume
from tests.contract.host_machine import host_machine, shell
from tests.integration.fault_nodes import ServingNode, Subject, World, until_ok
from tests.integration.rig import wait_for
from tests.vm.test_encrypted_volumes import EXT4, Machine

pytestmark = [pytest.mark.root, pytest.mark.device_mapper]

SIZES = {"ext4": 64 * MIB, "xfs": 320 * MIB, "btrfs": 128 * MIB, "block": 64 * MIB}
SOON_S = 60.0
_NULL_BLOCKS = Path("/sys/kernel/config/nullb")


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    shell("modprobe", "null_blk", "nr_devices=0")
    if not _NULL_BLOCKS.exists():
        shell("mount", "-t", "configfs", "configfs", str(_NULL_BLOCKS.parent))
    directory = tmp_path_factory.mktemp("l")
    with host_machine(directory) as machine:
        yield World(machine, directory)


@pytest.fixture(scope="module")
def node(world: World) -> Iterator[ServingNode]:
    with contextlib.closing(ServingNode(world.directory, "node.sock", "--reconcile-interval", "0")) as node:
        yield node


@dataclass
class Disk:
    """The device of a volume, and faults of its storage."""

    world: World
    subject: Subject

    @property
    def node(self) -> Path:
        return self.world.directory / "dev" / self.subject.name

    @property
    def number(self) -> DeviceNumber:
        return ioctls.device_number(os.stat(self.node).st_rdev)

    @property
    def files(self) -> Path:
        return self.world.directory / "proc" / "volumes" / self.subject.name

    def tell_opens(self, opens: int) -> None:
        """Let the client count the opens of the device, as NVMesh's does."""
        (self.files / "client_processes").write_text(
            f"Processes holding handle:\nNum Processes={min(opens, 1)}, opens={opens}\n"
        )

    def tell(self, **more: object) -> None:
        self.world.machine.write_status(self.subject.name, self.subject.loop.uuid, self.subject.size_bytes, **more)

    def put_node(self, number: DeviceNumber) -> None:
        self.node.unlink(missing_ok=True)
        os.mknod(self.node, 0o60600, os.makedev(number.major, number.minor))


@contextlib.contextmanager
def mapped(world: World, kind: str) -> Iterator[Disk]:
    """Create a volume with a device-mapper table over a loop device."""
    subject = world.subject(kind)
    disk, name = Disk(world, subject), subject.name
    loop = f"/dev/loop{subject.loop.loop.number}"
    shell("dmsetup", "create", name, "--table", f"0 {subject.size_bytes // 512} linear {loop} 0")
    major, minor = shell("dmsetup", "info", "-c", "--noheadings", "-o", "major,minor", name).strip().split(":")
    disk.put_node(DeviceNumber(int(major), int(minor)))
    try:
        yield disk
    finally:
        shell("dmsetup", "resume", name)
        shell("udevadm", "settle")
        shell("dmsetup", "remove", "--retry", name)
        disk.node.unlink()


def hold(disk: Disk) -> None:
    """Let all I/O of the device wait; nothing that waits can be killed."""
    shell("dmsetup", "suspend", "--noflush", "--nolockfs", disk.subject.name)


def go_on(disk: Disk) -> None:
    shell("dmsetup", "resume", disk.subject.name)


def fail(disk: Disk) -> None:
    """Let every I/O fail from now on."""
    name = disk.subject.name
    shell("dmsetup", "suspend", "--noflush", "--nolockfs", name)
    shell("dmsetup", "load", name, "--table", f"0 {disk.subject.size_bytes // 512} error")
    shell("dmsetup", "resume", name)


@contextlib.contextmanager
def removable(world: World, kind: str) -> Iterator[Disk]:
    """Create a volume with a null_blk in memory, which can be removed while in use."""
    name, identity = f"csi-{uuid.uuid4().hex[:8]}", str(uuid.uuid4())
    size = SIZES[kind]
    number = null_block(name, size)
    file = world.directory / f"{name}.size"
    with file.open("wb") as made:
        made.truncate(size)
    loop = LoopVolume(name, identity, file, None)  # type: ignore[arg-type]
    subject = Subject(name, kind, loop, world.directory / "kubelet", fixed_size_bytes=size)
    subject.staging.mkdir()
    disk = Disk(world, subject)
    disk.put_node(number)
    disk.tell()
    try:
        yield disk
    finally:
        take_away(disk)


def null_block(name: str, size_bytes: int) -> DeviceNumber:
    """Make a disk in memory, which keeps its data while it is off."""
    entry = _NULL_BLOCKS / name
    entry.mkdir()
    for key, value in (("memory_backed", 1), ("size", size_bytes // MIB), ("blocksize", 4096), ("power", 1)):
        (entry / key).write_text(str(value))
    index = (entry / "index").read_text().strip()
    shown = next(path for path in (Path("/sys/block", name), Path("/sys/block", f"nullb{index}")) if path.exists())
    major, minor = (shown / "dev").read_text().strip().split(":")
    return DeviceNumber(int(major), int(minor))


def take_away(disk: Disk) -> None:
    """Remove the disk while in use, with its status files; a missing one is fine."""
    entry = _NULL_BLOCKS / disk.subject.name
    if entry.exists():
        (entry / "power").write_text("0")
        entry.rmdir()
    disk.node.unlink(missing_ok=True)
    for file in disk.files.glob("*"):
        file.unlink()
    if disk.files.exists():
        disk.files.rmdir()


def call_all(node: ServingNode, subject: Subject, *verbs: str) -> None:
    for verb in verbs:
        assert node.call(verb, subject, timeout_s=SOON_S) == "ok", verb


# --- I/O that is held -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["ext4", "xfs"])
def test_an_unmount_with_suspended_io_is_reported_and_unstage_waits_for_the_close(
    world: World, node: ServingNode, kind: str
) -> None:
    """The mount leaves the table at once; a driver that is started then sees nothing mounted, and is not deceived."""
    with mapped(world, kind) as disk:
        subject, other = disk.subject, world.subject("ext4")
        call_all(node, subject, "stage", "publish")
        (subject.target / "data").write_bytes(os.urandom(MIB))
        disk.tell_opens(1)
        call_all(node, subject, "unpublish")
        hold(disk)
        try:
            told = node.call("unstage", subject, timeout_s=10.0)
            assert told.startswith("DEADLINE_EXCEEDED")
            assert "syscalls.unmount" in told
            assert node.call("unstage", subject, timeout_s=SOON_S).startswith("ABORTED")
            call_all(node, other, "stage", "publish", "unpublish", "unstage")
            assert node.client.is_ready()
            with contextlib.closing(ServingNode(world.directory, "next.sock", "--reconcile-interval", "0")) as new:
                assert world.mounted(subject.staging) == 0
                assert "is still open" in new.call("unstage", subject, timeout_s=SOON_S)
        finally:
            go_on(disk)
        wait_for(lambda: not block_devices.is_claimed(disk.node), "the device to be closed", SOON_S)
        disk.tell_opens(0)
        until_ok(node, "unstage", subject)
        (disk.files / "client_processes").unlink()
        world_end(world, other)


def world_end(world: World, subject: Subject) -> None:
    shell("udevadm", "settle")
    world.end(subject)


def test_a_suspended_device_blocks_no_other_volume(world: World, node: ServingNode) -> None:
    with mapped(world, "ext4") as disk:
        subject = disk.subject
        hold(disk)
        try:
            told = node.call("stage", subject, timeout_s=10.0)
            assert told.startswith("DEADLINE_EXCEEDED")
            assert "blocked in" in told
            assert node.call("unstage", subject, timeout_s=SOON_S).startswith("ABORTED")
            disk.tell(status="Live, no IO, partial Error (storage lost)", dbg="0x2a1")
            with contextlib.closing(ServingNode(world.directory, "next.sock", "--reconcile-interval", "0")) as new:
                assert "has not enabled I/O" in new.call("stage", subject, timeout_s=10.0)
                assert "not known whether" in new.call("unstage", subject, timeout_s=SOON_S)
        finally:
            disk.tell()
            go_on(disk)
        until_ok(node, "stage", subject)
        call_all(node, subject, "unstage")


# --- I/O that fails ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["ext4", "xfs", "block"])
def test_a_failing_device_in_use_is_released(world: World, node: ServingNode, kind: str) -> None:
    with mapped(world, kind) as disk:
        subject = disk.subject
        call_all(node, subject, "stage", "publish")
        fail(disk)
        if kind != "block":
            with contextlib.suppress(OSError):
                (subject.target / "data").write_bytes(os.urandom(MIB))
                os.sync()
        call_all(node, subject, "unpublish", "unstage")
        assert world.mounted(subject.target) == world.mounted(subject.staging) == 0


# --- devices that go, and numbers that come back ----------------------------------------------------------------


@pytest.mark.parametrize("kind", ["ext4", "xfs", "block"])
def test_a_number_reused_by_another_volume_is_not_confused(world: World, node: ServingNode, kind: str) -> None:
    with removable(world, kind) as first:
        call_all(node, first.subject, "stage", "publish")
        number = first.number
        with contextlib.ExitStack() as held:
            use = held.enter_context(using(first, kind))
            take_away(first)
            second = held.enter_context(removable(world, kind))
            assert second.number == number
            if kind != "block":
                told = node.call("stage", second.subject, timeout_s=SOON_S)
                assert "had the number" in told
                assert f"still mounted at {first.subject.staging}" in told
            else:
                call_all(node, second.subject, "stage", "publish")
            if kind == "block":  # who has it open keeps its publication: only the filesystem of a dead disk is detached
                os.close(use.pop())
            call_all(node, first.subject, "unpublish", "unstage")
            assert world.mounted(first.subject.target) == world.mounted(first.subject.staging) == 0
            if kind != "block":
                assert "end the programs that use it" in node.call("stage", second.subject, timeout_s=SOON_S)
                os.close(use.pop())
                until_ok(node, "stage", second.subject, passing=("FAILED_PRECONDITION",))
                call_all(node, second.subject, "publish")
                (second.subject.target / "data").write_text("of the second")
                assert not (second.subject.target / "used").exists()
            assert world.mounted(second.subject.target) == 1
            call_all(node, second.subject, "unpublish", "unstage")
            assert not block_devices.is_claimed(second.node)


@contextlib.contextmanager
def using(disk: Disk, kind: str) -> Iterator[list[int]]:
    """Open a file of the volume, or its device; the caller closes the descriptor."""
    place = disk.subject.target if kind == "block" else disk.subject.target / "used"
    fds = [os.open(place, os.O_RDWR | (0 if kind == "block" else os.O_CREAT))]
    try:
        yield fds
    finally:
        for fd in fds:
            os.close(fd)


@pytest.mark.parametrize("kind", ["ext4", "xfs", "btrfs"])
def test_the_same_volume_back_under_its_number_is_mounted_again(world: World, node: ServingNode, kind: str) -> None:
    """The old mount has number, name and source of the new disk, and fails every write."""
    with removable(world, kind) as disk:
        subject, number = disk.subject, disk.number
        call_all(node, subject, "stage", "publish")
        (subject.target / "data").write_text("kept")
        shell("sync", "--file-system", str(subject.target))
        with using(disk, kind) as use:
            entry = _NULL_BLOCKS / subject.name
            (entry / "power").write_text("0")
            (entry / "power").write_text("1")
            assert disk.number == number
            assert node.call("publish", subject, timeout_s=SOON_S).startswith("FAILED_PRECONDITION")
            assert f"still mounted at {subject.target}" in node.call("stage", subject, timeout_s=SOON_S)
            call_all(node, subject, "unpublish", "unstage")
            assert "end the programs that use it" in node.call("stage", subject, timeout_s=SOON_S)
            os.close(use.pop())
        until_ok(node, "stage", subject, passing=("FAILED_PRECONDITION",))
        call_all(node, subject, "publish")
        assert (subject.target / "data").read_text() == "kept"
        (subject.target / "more").write_text("written")
        shell("sync", "--file-system", str(subject.target))
        call_all(node, subject, "unpublish", "unstage")


def test_the_disk_sequence_number_distinguishes_disks_of_one_number(world: World) -> None:
    with removable(world, "block") as first:
        number, before = first.number, world.machine.devices.find(first.subject.name)
    with removable(world, "block") as second:
        after = world.machine.devices.find(second.subject.name)
        assert before is not None
        assert after is not None
        assert (second.number, after.number) == (number, before.number)
        assert before.disk_sequence is not None
        assert after.disk_sequence != before.disk_sequence


@pytest.mark.usefixtures("world")
def test_an_encrypted_volume_back_under_its_number_is_opened_again(tmp_path: Path) -> None:
    """The path in sysfs shows the earlier device over the new disk, which is wrong."""
    with host_machine(tmp_path) as machine:
        volume = Machine(machine, EXT4, Encryption.LUKS)
        name = volume.volume.name
        node, entry = machine.device_root / name, _NULL_BLOCKS / name
        wait_for(lambda: machine.loops.detach(volume.volume.loop), "udev to close the new loop device", SOON_S)
        number = null_block(name, volume.volume.file.stat().st_size)
        os.mknod(node, 0o60600, os.makedev(number.major, number.minor))
        try:
            volume.stage()
            (volume.staging / "data").write_text("kept")
            shell("sync", "--file-system", str(volume.staging))
            (entry / "power").write_text("0")
            (entry / "power").write_text("1")
            assert ioctls.device_number(os.stat(node).st_rdev) == number
            volume.up()
            assert (volume.target / "data").read_text() == "kept"
            (volume.target / "more").write_text("written")
            shell("sync", "--file-system", str(volume.target))
            volume.down()
        finally:
            (entry / "power").write_text("0")
            entry.rmdir()
