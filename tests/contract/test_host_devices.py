# SPDX-License-Identifier: Apache-2.0
"""Devices: found by name, identified, and verified again on the open descriptor."""

from __future__ import annotations

import contextlib
import ctypes
import fcntl
import os
import stat
import struct
import subprocess
import sys
import uuid
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from csi_driver.deadline import Deadline
from csi_driver.errors import CommandFailed, DeadlineReached, OperationPending, PreconditionFailed
from csi_driver.host import block_devices, ioctls, mount_table, syscalls
from csi_driver.host.connectors.loop import LoopDevices, ReadOnlyLoops
from csi_driver.host.devices import LinuxDevices
from csi_driver.host_model import DeviceNumber
from csi_driver.model import MIB
from tests.contract.host_machine import HostMachine, Volume, host_machine, shell, soon

pytestmark = pytest.mark.root

OTHER = "01234567-89ab-cdef-0123-456789abcdef"


class ManualClock:
    """Time that passes only in `sleep`, which calls `on_sleep`."""

    def __init__(self) -> None:
        self.now_s = 0.0
        self.on_sleep: Callable[[], object] = lambda: None

    def monotonic(self) -> float:
        return self.now_s

    def sleep(self, seconds: float) -> None:
        self.now_s += seconds
        self.on_sleep()


@pytest.fixture
def machine(tmp_path: Path) -> Iterator[HostMachine]:
    with host_machine(tmp_path) as made:
        yield made


# --- finding ----------------------------------------------------------------------------------------------------


def test_a_device_is_described_as_the_kernel_shows_it(machine: HostMachine) -> None:
    volume = machine.volume(size_bytes=48 * MIB)
    device = machine.device(volume)
    shown = shell(
        "lsblk", "--bytes", "--noheadings", "--output", "MAJ:MIN,SIZE,RO,LOG-SEC", f"/dev/loop{volume.loop.number}"
    )
    described = [str(device.number), str(device.size_bytes), str(int(device.read_only)), str(device.block_bytes)]
    assert described == shown.split()
    assert device.uuid == volume.uuid


def test_wait_finds_a_device_that_appears(machine: HostMachine) -> None:
    clock = ManualClock()
    made: list[Volume] = []

    def appear() -> None:
        if not made:
            made.append(machine.volume("csi-late"))

    clock.on_sleep = appear
    device = machine.devices.wait_for("csi-late", None, deadline=Deadline.after(30, clock))
    assert device.uuid == made[0].uuid


def test_wait_ends_at_the_deadline(machine: HostMachine) -> None:
    with pytest.raises(DeadlineReached, match="csi-none"):
        machine.devices.wait_for("csi-none", None, deadline=Deadline.after(30, ManualClock()))


def test_a_device_without_size_is_not_ready(machine: HostMachine) -> None:
    volume = machine.volume()
    with volume.file.open("r+b") as file:
        file.truncate(0)
    machine.loops.grow(volume.loop)
    assert machine.devices.find(volume.name) is None
    with pytest.raises(DeadlineReached):
        machine.devices.wait_for(volume.name, volume.uuid, deadline=Deadline.after(1, ManualClock()))


def test_a_regular_file_is_no_device(machine: HostMachine) -> None:
    (machine.device_root / "csi-1").write_text("not a device")
    assert machine.devices.find("csi-1") is None


def test_wait_refuses_another_volume_at_once(machine: HostMachine) -> None:
    volume = machine.volume()
    clock = ManualClock()
    with pytest.raises(PreconditionFailed, match=f"claims {volume.uuid}, expected {OTHER}"):
        machine.devices.wait_for(volume.name, OTHER, deadline=Deadline.after(30, clock))
    assert clock.now_s == 0


def test_wait_continues_while_the_evidence_is_contradictory(machine: HostMachine) -> None:
    """The status file of an earlier volume remains for a moment."""
    volume = machine.volume()
    machine.write_status(volume.name, OTHER, 64 * MIB)
    clock = ManualClock()
    clock.on_sleep = lambda: machine.write_status(volume.name, volume.uuid, 64 * MIB)
    device = machine.devices.wait_for(volume.name, volume.uuid, deadline=Deadline.after(30, clock))
    assert device.uuid == volume.uuid
    assert clock.now_s > 0


def test_contradictory_evidence_is_never_accepted(machine: HostMachine) -> None:
    volume = machine.volume()
    machine.write_status(volume.name, OTHER, 64 * MIB)
    for uuid_asked in (volume.uuid, OTHER, None):
        with pytest.raises(DeadlineReached, match=f"claims {volume.uuid}, expected {OTHER}"):
            machine.devices.wait_for(volume.name, uuid_asked, deadline=Deadline.after(30, ManualClock()))


def test_a_torn_status_file_does_not_hide_the_label(machine: HostMachine) -> None:
    volume = machine.volume()
    path = machine.status_root / "volumes" / volume.name / "status.json"
    path.write_text(path.read_text()[:40])
    assert machine.device(volume).uuid == volume.uuid


def test_a_device_that_does_not_write_data_is_refused(machine: HostMachine) -> None:
    volume = machine.volume()
    machine.write_status(volume.name, volume.uuid, 64 * MIB, debug_di=1)
    with pytest.raises(PreconditionFailed, match="debug_di"):
        machine.device(volume)


def test_a_device_is_found_without_udev_events(machine: HostMachine) -> None:
    """In the network namespace of a container udev's events do not arrive."""
    control = machine.directory / "udev-control"
    control.touch()
    devices = LinuxDevices(machine.device_root, machine.status_root, udev_control=control)
    with pytest.raises(DeadlineReached):
        devices.wait_for("csi-none", None, deadline=soon(0.3))


# --- opening ----------------------------------------------------------------------------------------------------


def test_open_refuses_a_number_of_another_volume(machine: HostMachine) -> None:
    volume, other = machine.volume("csi-1"), machine.volume("csi-2")
    device = machine.device(volume)
    (machine.device_root / "csi-2").replace(machine.device_root / "csi-1")
    with pytest.raises(PreconditionFailed, match="claims"), machine.devices.open(device):
        pass
    assert other.uuid != volume.uuid


def test_open_checks_new_evidence(machine: HostMachine) -> None:
    volume = machine.volume()
    device = machine.device(volume)
    machine.write_status(volume.name, volume.uuid, 64 * MIB, debug_di=1)
    with pytest.raises(PreconditionFailed, match="debug_di"), machine.devices.open(device):
        pass


def test_open_refuses_a_reused_device_number(machine: HostMachine) -> None:
    """Node and number are the same, the file is another one."""
    volume = machine.volume(status=False)
    device = machine.device(volume)
    fd = os.open(f"/dev/loop{volume.loop.number}", os.O_RDONLY)
    status = ioctls.loop_status(fd)
    assert status is not None
    raw = bytearray(status.raw)
    raw[56 : 56 + 36] = OTHER.encode()
    ioctls.loop_set(fd, replace(status, raw=bytes(raw)))
    os.close(fd)
    expected = f"claims {OTHER}, expected {volume.uuid}"
    with pytest.raises(PreconditionFailed, match=expected), machine.devices.open(device):
        pass


def test_open_refuses_a_new_disk_with_the_same_number(machine: HostMachine) -> None:
    """Name, number, uuid and size are the same; the content may be another."""
    volume = machine.volume()
    device = machine.device(volume)
    assert machine.loops.detach(volume.loop)
    with volume.file.open("r+b") as file, open(f"/dev/loop{volume.loop.number}", "r+b", buffering=0) as node:
        ioctls.loop_configure(node.fileno(), file.fileno(), label=volume.loop.label, flags=0, block_bytes=4096)
    machine.loops.ensure_node(volume.loop, machine.device_root / volume.name)
    with pytest.raises(PreconditionFailed, match="disk sequence number"), machine.devices.open(device):
        pass
    with machine.devices.open(machine.device(volume)):
        pass


def test_open_refuses_a_device_with_another_size(machine: HostMachine) -> None:
    volume = machine.volume()
    device = machine.device(volume)
    machine.grow(volume, 128 * MIB)
    with pytest.raises(PreconditionFailed, match="size"), machine.devices.open(device):
        pass


def test_a_device_without_evidence_is_not_opened_for_writing(machine: HostMachine) -> None:
    volume = machine.volume(status=False)
    machine.loops.detach(volume.loop)
    machine.loops.attach(volume.file, machine.device_root / volume.name, label="unlabelled", read_only=False)
    machine.write_status(volume.name, volume.uuid, 64 * MIB)
    device = machine.devices.find(volume.name)
    assert device is not None
    with machine.devices.open(device):
        pass
    with pytest.raises(PreconditionFailed, match="proves"), machine.devices.open(device, write=True):
        pass


def test_open_refuses_a_device_that_is_gone(machine: HostMachine) -> None:
    volume = machine.volume()
    device = machine.device(volume)
    machine.loops.detach(volume.loop)
    with pytest.raises(PreconditionFailed, match="gone"), machine.devices.open(device):
        pass


def quick(machine: HostMachine) -> LinuxDevices:
    """Return devices with a clock that makes waits instant."""
    return LinuxDevices(machine.device_root, machine.status_root, clock=ManualClock())


def test_a_mounted_device_is_not_opened_exclusively(machine: HostMachine) -> None:
    _, device = machine.formatted("ext4", 32 * MIB)
    machine.mounts.mount(device, machine.place(), "ext4", [], read_only=False)
    with pytest.raises(PreconditionFailed, match="mounted"), quick(machine).open(device, write=True, exclusive=True):
        pass


def test_the_users_of_an_open_device_are_named(machine: HostMachine, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mount_table, "_HOLDERS_LIMIT_S", 60)  # a busy machine has many processes to look at
    _, device = machine.formatted("ext4", 32 * MIB)
    assert machine.devices.describe_openers(device).startswith("by a program that is not visible here; see `fuser")
    with device.path.open("rb") as opened:
        command = ("sleep", "600")
        with subprocess.Popen(command, stdin=opened) as program, contextlib.ExitStack() as end:
            end.callback(program.kill)
            named = machine.devices.describe_openers(device)
    assert f"pid {program.pid} (sleep)" in named
    assert f"pid {os.getpid()} (" in named
    place = machine.place()
    machine.mounts.mount(device, place, "ext4", [], read_only=False)
    assert machine.devices.describe_openers(device) == f"by the mount {place}"


def test_the_search_for_users_touches_no_file_that_may_be_on_a_filesystem_that_hangs(
    machine: HostMachine, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, device = machine.formatted("ext4", 32 * MIB)
    touched: list[str] = []

    def status(path: Path, *, follow: bool = False) -> syscalls.PathStatus:
        with contextlib.suppress(OSError):
            touched.append(os.readlink(path))
        return syscalls.statx(path, follow=follow)

    monkeypatch.setattr(mount_table, "statx", status)
    machine.devices.describe_openers(device)
    assert touched
    assert not [each for each in touched if not each.startswith(("/dev/", str(device.path)))]


def test_a_mount_that_another_mount_namespace_keeps_is_named_with_a_process_there(
    machine: HostMachine, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(mount_table, "_HOLDERS_LIMIT_S", 60)
    _, device = machine.formatted("ext4", 32 * MIB)
    place = machine.place()
    machine.mounts.mount(device, place, "ext4", [], read_only=False)
    command = ("unshare", "--mount", "--propagation", "private", "sh", "-c", "echo ready; exec sleep 600")
    with subprocess.Popen(command, stdout=subprocess.PIPE) as program, contextlib.ExitStack() as end:
        end.callback(program.kill)
        assert program.stdout is not None
        assert program.stdout.readline() == b"ready\n"
        comm = Path(f"/proc/{program.pid}/comm")
        assert soon(60).wait_until(lambda: comm.read_text() == "sleep\n")
        machine.mounts.unmount(place)
        named = machine.devices.describe_openers(device)
    assert named == f"by the mount {place} seen by pid {program.pid} (sleep)"


def test_two_exclusive_opens_exclude_each_other(machine: HostMachine) -> None:
    device = machine.device(machine.volume())
    with (
        machine.devices.open(device, write=True, exclusive=True),
        pytest.raises(OperationPending, match="lock"),
        quick(machine).open(device, exclusive=True),
    ):
        pass


def test_a_program_that_outlives_its_driver_keeps_the_device_locked(machine: HostMachine) -> None:
    """After SIGKILL of the driver, mkfs runs on with the lock."""
    device = machine.device(machine.volume())
    with machine.devices.open(device, write=True, exclusive=True) as opened:
        helper = subprocess.Popen(
            [sys.executable, "-c", "import sys; sys.stdin.read()"], stdin=subprocess.PIPE, pass_fds=(opened.fd,)
        )
    try:
        with pytest.raises(OperationPending, match="lock"), quick(machine).open(device, exclusive=True):
            pass
    finally:
        helper.communicate()
    with machine.devices.open(device, exclusive=True):
        pass


def test_mkfs_refuses_a_device_that_was_mounted_meanwhile(machine: HostMachine) -> None:
    """mkfs opens the device with O_EXCL, which a mount since the check prevents."""
    volume, device = machine.formatted("ext4", 32 * MIB)
    target = machine.place()
    with machine.devices.open(device, write=True, exclusive=True) as opened:
        machine.mounts.mount(device, target, "ext4", [], read_only=False)
        with pytest.raises(CommandFailed):
            machine.filesystems.make(opened, "ext4", (), uuid=volume.uuid)


# --- facts by number --------------------------------------------------------------------------------------------


def test_size_and_uuid_are_found_by_number(machine: HostMachine) -> None:
    volume = machine.volume(size_bytes=48 * MIB)
    number = machine.device(volume).number
    assert machine.devices.size_bytes(number) == 48 * MIB
    assert machine.devices.uuid_of(number) == volume.uuid
    assert machine.devices.name_of(number) == volume.name


def test_a_device_that_is_gone_has_neither_size_nor_uuid(machine: HostMachine) -> None:
    volume = machine.volume()
    number = machine.device(volume).number
    machine.loops.detach(volume.loop)
    assert machine.devices.size_bytes(number) is None
    assert machine.devices.uuid_of(number) is None
    assert machine.devices.size_bytes(DeviceNumber(240, 77)) is None
    assert machine.devices.uuid_of(DeviceNumber(240, 77)) is None


def test_a_device_set_read_only_refuses_existing_writers(machine: HostMachine) -> None:
    device = machine.device(machine.volume())
    fd = os.open(device.path, os.O_RDWR)
    try:
        machine.devices.set_read_only(device)
        with pytest.raises(OSError, match="not permitted"):
            os.pwrite(fd, b"x", 0)
    finally:
        os.close(fd)
    assert shell("blockdev", "--getro", str(device.path)).strip() == "1"


# --- loop devices of the embedded manager -----------------------------------------------------------------------


def test_a_bound_file_is_found_in_sysfs(machine: HostMachine) -> None:
    volume = machine.volume()
    assert LoopDevices().bound_to(machine.directory) == (replace(volume.loop, node=None),)
    assert stat.S_IMODE((machine.device_root / volume.name).lstat().st_mode) == 0o600


def test_a_file_that_was_deleted_while_bound_is_still_found(machine: HostMachine) -> None:
    volume = machine.volume()
    volume.file.unlink()
    (found,) = machine.loops.bound_to(machine.directory)
    assert (found.file, found.file_is_gone, found.label) == (volume.file, True, volume.loop.label)
    assert machine.loops.detach(found)


def test_a_device_without_its_node_is_found_and_gets_it_back(machine: HostMachine) -> None:
    volume = machine.volume()
    node = machine.device_root / volume.name
    node.unlink()
    (found,) = machine.loops.bound_to(machine.directory)
    assert machine.loops.ensure_node(found, node) == volume.loop
    assert machine.device(volume).uuid == volume.uuid


def test_a_node_of_another_device_is_replaced(machine: HostMachine) -> None:
    first, second = machine.volume("csi-1"), machine.volume("csi-2")
    node = machine.device_root / "csi-1"
    node.unlink()
    os.mknod(node, stat.S_IFBLK | 0o600, os.makedev(*second.loop.device))
    machine.loops.ensure_node(first.loop, node)
    assert machine.device(first).uuid == first.uuid


def test_detach_keeps_a_node_of_another_device(machine: HostMachine) -> None:
    first, second = machine.volume("csi-1"), machine.volume("csi-2")
    node = machine.device_root / "csi-1"
    node.unlink()
    os.mknod(node, stat.S_IFBLK | 0o600, os.makedev(*second.loop.device))
    assert machine.loops.detach(first.loop)
    assert node.is_block_device()


def test_detach_removes_device_and_node(machine: HostMachine) -> None:
    volume = machine.volume()
    assert machine.loops.detach(volume.loop)
    assert str(volume.file) not in shell("losetup", "--list", "--output", "BACK-FILE")
    assert not (machine.device_root / volume.name).exists()
    assert machine.loops.detach(volume.loop)


def test_an_open_device_is_not_detached_at_its_close(machine: HostMachine) -> None:
    """The kernel would unbind it at the last close."""
    volume = machine.volume()
    fd = os.open(machine.device_root / volume.name, os.O_RDONLY)
    refused = machine.loops.detach(volume.loop)
    os.close(fd)
    assert not refused
    listed = shell("losetup", "--list", "--noheadings", "--output", "AUTOCLEAR", f"/dev/loop{volume.loop.number}")
    assert listed.strip() == "0"
    assert machine.device(volume).uuid == volume.uuid


def test_a_mounted_device_is_not_detached(machine: HostMachine) -> None:
    volume, device = machine.formatted("ext4", 32 * MIB)
    target = machine.place()
    machine.mounts.mount(device, target, "ext4", [], read_only=False)
    assert not machine.loops.detach(volume.loop)
    machine.mounts.unmount(target)
    assert machine.loops.detach(volume.loop)


def test_detach_keeps_a_number_bound_to_another_file(machine: HostMachine) -> None:
    volume = machine.volume()
    stale = replace(volume.loop, label=f"{uuid.uuid4()}/test", node=None)
    assert machine.loops.detach(stale)
    assert machine.device(volume).uuid == volume.uuid


def test_concurrent_attaches_bind_different_devices(machine: HostMachine) -> None:
    from concurrent.futures import ThreadPoolExecutor

    with ThreadPoolExecutor(8) as pool:
        volumes = list(pool.map(lambda index: machine.volume(f"csi-{index}", MIB), range(24)))
    assert len({volume.loop.number for volume in volumes}) == 24
    assert {machine.device(volume).uuid for volume in volumes} == {volume.uuid for volume in volumes}


def test_a_loop_device_that_was_made_read_only_is_writable_for_the_next_file(machine: HostMachine) -> None:
    """The kernel keeps the BLKROSET state of an unbound loop device."""
    first = machine.volume("csi-1")
    machine.devices.set_read_only(machine.device(first))
    machine.loops.detach(first.loop)
    numbers = {first.loop.number: first}
    for index in range(2, 12):
        volume = machine.volume(f"csi-{index}")
        if volume.loop.number in numbers:
            assert not machine.device(volume).read_only
            return
    pytest.fail("the kernel never gave the same loop device again")


def test_loop_devices_work_where_their_nodes_are_missing(machine: HostMachine, monkeypatch: pytest.MonkeyPatch) -> None:
    """As in a container: /dev has no node of a device made after its start."""
    from csi_driver.host.connectors import loop

    real = block_devices.node_number
    monkeypatch.setattr(loop, "node_number", lambda node: None if node.parent == Path("/dev") else real(node))
    volume = machine.volume()
    assert machine.device(volume).uuid == volume.uuid
    assert machine.loops.detach(volume.loop)


# --- read-only devices over devices -----------------------------------------------------------------------------

READER = uuid.uuid4().hex[:16]
"""Unique on this machine: left over readers are searched among all loop devices."""


def test_a_read_only_loop_device_refuses_writes_and_the_device_below_accepts_them(machine: HostMachine) -> None:
    volume = machine.volume()
    device = machine.device(volume)
    readers = ReadOnlyLoops(machine.loops)
    reader = readers.over(device, volume.uuid, READER)
    fd = os.open(reader.path, os.O_RDWR)
    with pytest.raises(OSError, match="not permitted"):
        os.pwrite(fd, b"x", 0)
    os.close(fd)
    fd = os.open(device.path, os.O_RDWR | os.O_DSYNC)
    os.pwrite(fd, b"hello", 0)
    os.close(fd)
    with reader.path.open("rb") as file:
        assert file.read(5) == b"hello"
    assert machine.devices.uuid_of(reader.number) == volume.uuid


def test_a_read_only_device_is_made_once_and_follows_the_size(machine: HostMachine) -> None:
    volume = machine.volume()
    readers = ReadOnlyLoops(machine.loops)
    first = readers.over(machine.device(volume), volume.uuid, READER)
    second = readers.over(machine.grow(volume, 128 * MIB), volume.uuid, READER)
    assert first.number == second.number
    assert second.size_bytes == 128 * MIB


def test_only_unused_readers_of_this_driver_are_released(machine: HostMachine) -> None:
    volume = machine.volume()
    readers = ReadOnlyLoops(machine.loops)
    reader = readers.over(machine.device(volume), volume.uuid, READER)
    fd = os.open(reader.path, os.O_RDONLY)
    answers = [readers.release(volume.loop.device_number), readers.release(reader.number)]
    os.close(fd)
    answers += [readers.release(reader.number), readers.release(reader.number)]
    answers += [readers.release(volume.loop.device_number)]
    assert answers == [False, False, True, False, False]
    assert machine.device(volume).uuid == volume.uuid


@pytest.mark.parametrize("label", ["node-1", "ro-{reader}"])
def test_a_volume_that_is_attached_read_only_is_no_reader(machine: HostMachine, label: str) -> None:
    volume = machine.volume()
    shown = f"{volume.uuid}/{label.format(reader=READER)}"
    own = machine.loops.attach(volume.file, None, label=shown, read_only=True)
    readers = ReadOnlyLoops(machine.loops)
    assert not readers.release(own.device_number)
    readers.release_left_over(READER, volume.name)
    assert own.number in {loop.number for loop in machine.loops.bound()}


@pytest.mark.parametrize("label", ["{uuid}/node-1", "{uuid}/x/ro-{reader}", "{uuid}/ro-0123", "x/ro-{reader}"])
def test_a_read_only_device_over_a_volume_with_another_label_is_no_reader(machine: HostMachine, label: str) -> None:
    volume = machine.volume()
    shown = label.format(uuid=volume.uuid, reader=READER)
    other = machine.loops.attach(machine.device(volume).path, None, label=shown, read_only=True)
    try:
        assert not ReadOnlyLoops(machine.loops).release(other.device_number)
    finally:
        machine.loops.detach(other)


def test_a_writable_device_over_a_volume_is_no_reader(machine: HostMachine) -> None:
    volume = machine.volume()
    label = f"{volume.uuid}/ro-{READER}"
    other = machine.loops.attach(machine.device(volume).path, None, label=label, read_only=False)
    try:
        assert not ReadOnlyLoops(machine.loops).release(other.device_number)
    finally:
        machine.loops.detach(other)


def test_releasing_a_reader_opens_no_device_of_other_volumes(machine: HostMachine) -> None:
    """They may hang."""
    volume, other = machine.volume("csi-1"), machine.volume("csi-2")
    readers = ReadOnlyLoops(machine.loops)
    of_other = readers.over(machine.device(other), other.uuid, READER)
    seen = set[Path]()
    for _ in range(50):  # other programs of this machine may open the device now and then; the code would each time
        with opens_of(of_other.path, volume.loop.node or volume.file) as opened:
            readers.over(machine.device(volume), volume.uuid, READER)
            readers.release_left_over(READER, volume.name)
        seen = set(opened)
        if of_other.path not in seen:
            break
    assert seen == {volume.loop.node}
    assert readers.release(of_other.number)


@contextlib.contextmanager
def opens_of(*nodes: Path) -> Iterator[list[Path]]:
    """Record opens of these files in the block, by inotify(7)."""
    libc, opened = ctypes.CDLL(None, use_errno=True), list[Path]()
    watcher = libc.inotify_init1(os.O_NONBLOCK | os.O_CLOEXEC)
    watched = {libc.inotify_add_watch(watcher, os.fsencode(node), 0x20): node for node in nodes}
    assert min(watched) > 0
    try:
        yield opened
        with contextlib.suppress(BlockingIOError):
            while events := os.read(watcher, 4096):
                opened += [watched[number] for number, *_ in struct.iter_unpack("=iIII", events)]
    finally:
        os.close(watcher)


def test_a_reader_is_released_when_the_device_below_was_lost(machine: HostMachine) -> None:
    volume = machine.volume()
    readers = ReadOnlyLoops(machine.loops)
    reader = readers.over(machine.device(volume), volume.uuid, READER)
    machine.device(volume).path.unlink()
    readers.release_left_over("f" * 16, volume.name)
    kept = machine.devices.uuid_of(reader.number)
    readers.release_left_over(READER, volume.name)
    assert kept == volume.uuid
    assert machine.devices.uuid_of(reader.number) != volume.uuid  # the number may be reused by now


def test_open_waits_for_a_short_lock_of_udev(machine: HostMachine) -> None:
    """udev locks a device while it probes it."""
    device = machine.device(machine.volume())
    prober = os.open(device.path, os.O_RDONLY)
    fcntl.flock(prober, fcntl.LOCK_SH)
    clock = ManualClock()
    clock.on_sleep = lambda: fcntl.flock(prober, fcntl.LOCK_UN)
    with LinuxDevices(machine.device_root, machine.status_root, clock=clock).open(device, exclusive=True):
        pass
    os.close(prober)
