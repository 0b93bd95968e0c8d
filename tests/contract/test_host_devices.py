"""Devices are found by name, proven by identity, and proven again on the opened descriptor."""

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
from csi_driver.host import block_devices, ioctls
from csi_driver.host.connectors.loop import LoopDevices, ReadOnlyLoops
from csi_driver.host.devices import LinuxDevices
from csi_driver.host_model import DeviceNumber
from csi_driver.model import MIB
from tests.contract.host_machine import HostMachine, Volume, host_machine, shell, soon

pytestmark = pytest.mark.root

OTHER = "01234567-89ab-cdef-0123-456789abcdef"


class ManualClock:
    """Time that passes only while somebody sleeps; then `on_sleep` happens."""

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


def test_a_device_that_appears_while_it_is_awaited_is_found(machine: HostMachine) -> None:
    clock = ManualClock()
    made: list[Volume] = []

    def appear() -> None:
        if not made:
            made.append(machine.volume("csi-late"))

    clock.on_sleep = appear
    device = machine.devices.wait_for("csi-late", None, deadline=Deadline.after(30, clock))
    assert device.uuid == made[0].uuid


def test_waiting_for_a_device_ends_with_the_deadline(machine: HostMachine) -> None:
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


def test_a_file_in_the_place_of_the_device_is_no_device(machine: HostMachine) -> None:
    (machine.device_root / "csi-1").write_text("not a device")
    assert machine.devices.find("csi-1") is None


def test_another_volume_under_the_same_name_is_refused_at_once(machine: HostMachine) -> None:
    volume = machine.volume()
    clock = ManualClock()
    with pytest.raises(PreconditionFailed, match=f"claims {volume.uuid}, expected {OTHER}"):
        machine.devices.wait_for(volume.name, OTHER, deadline=Deadline.after(30, clock))
    assert clock.now_s == 0


def test_evidence_that_disagrees_with_itself_is_awaited(machine: HostMachine) -> None:
    """A status file of the volume before lingers for a moment; it is not taken for the truth, nor is the device."""
    volume = machine.volume()
    machine.write_status(volume.name, OTHER, 64 * MIB)
    clock = ManualClock()
    clock.on_sleep = lambda: machine.write_status(volume.name, volume.uuid, 64 * MIB)
    device = machine.devices.wait_for(volume.name, volume.uuid, deadline=Deadline.after(30, clock))
    assert device.uuid == volume.uuid
    assert clock.now_s > 0


def test_evidence_that_never_agrees_is_never_believed(machine: HostMachine) -> None:
    volume = machine.volume()
    machine.write_status(volume.name, OTHER, 64 * MIB)
    for uuid_asked in (volume.uuid, OTHER, None):
        with pytest.raises(DeadlineReached, match=f"claims {volume.uuid}, expected {OTHER}"):
            machine.devices.wait_for(volume.name, uuid_asked, deadline=Deadline.after(30, ManualClock()))


def test_a_torn_status_file_does_not_hide_what_the_device_proves(machine: HostMachine) -> None:
    volume = machine.volume()
    path = machine.status_root / "volumes" / volume.name / "status.json"
    path.write_text(path.read_text()[:40])
    assert machine.device(volume).uuid == volume.uuid


def test_a_device_that_does_not_write_data_is_refused(machine: HostMachine) -> None:
    volume = machine.volume()
    machine.write_status(volume.name, volume.uuid, 64 * MIB, debug_di=1)
    with pytest.raises(PreconditionFailed, match="debug_di"):
        machine.device(volume)


def test_udev_that_sends_no_event_delays_nothing_for_long(machine: HostMachine) -> None:
    """In a container's network namespace udev's events do not arrive; the device is found all the same."""
    control = machine.directory / "udev-control"
    control.touch()
    devices = LinuxDevices(machine.device_root, machine.status_root, udev_control=control)
    with pytest.raises(DeadlineReached):
        devices.wait_for("csi-none", None, deadline=soon(0.3))


# --- opening ----------------------------------------------------------------------------------------------------


def test_a_device_whose_number_is_now_another_volume_is_refused(machine: HostMachine) -> None:
    volume, other = machine.volume("csi-1"), machine.volume("csi-2")
    device = machine.device(volume)
    (machine.device_root / "csi-2").replace(machine.device_root / "csi-1")
    with pytest.raises(PreconditionFailed, match="claims"), machine.devices.open(device):
        pass
    assert other.uuid != volume.uuid


def test_what_speaks_against_a_device_since_it_was_found_is_heard(machine: HostMachine) -> None:
    volume = machine.volume()
    device = machine.device(volume)
    machine.write_status(volume.name, volume.uuid, 64 * MIB, debug_di=1)
    with pytest.raises(PreconditionFailed, match="debug_di"), machine.devices.open(device):
        pass


def test_a_device_number_that_was_given_to_another_volume_is_refused(machine: HostMachine) -> None:
    """The node and its number are the same, the file behind it is not."""
    volume = machine.volume(status=False)
    device = machine.device(volume)
    fd = os.open(f"/dev/loop{volume.loop.number}", os.O_RDONLY)
    status = ioctls.loop_status(fd)
    assert status is not None
    raw = bytearray(status.raw)
    raw[56 : 56 + 36] = OTHER.encode()
    ioctls.loop_set_flags(fd, replace(status, raw=bytes(raw)), status.flags)
    os.close(fd)
    expected = f"claims {OTHER}, expected {volume.uuid}"
    with pytest.raises(PreconditionFailed, match=expected), machine.devices.open(device):
        pass


def test_a_disk_that_came_anew_under_the_same_number_is_not_opened(machine: HostMachine) -> None:
    """Name, number, uuid and size are the same; what was learnt of the disk before it went says nothing any more."""
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


def test_a_device_that_changed_its_size_is_refused(machine: HostMachine) -> None:
    volume = machine.volume()
    device = machine.device(volume)
    machine.grow(volume, 128 * MIB)
    with pytest.raises(PreconditionFailed, match="size"), machine.devices.open(device):
        pass


def test_a_device_that_nothing_proves_is_not_opened_for_writing(machine: HostMachine) -> None:
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


def test_a_device_that_is_gone_is_refused(machine: HostMachine) -> None:
    volume = machine.volume()
    device = machine.device(volume)
    machine.loops.detach(volume.loop)
    with pytest.raises(PreconditionFailed, match="gone"), machine.devices.open(device):
        pass


def quick(machine: HostMachine) -> LinuxDevices:
    """Return devices whose patience with busy ones takes no time."""
    return LinuxDevices(machine.device_root, machine.status_root, clock=ManualClock())


def test_a_mounted_device_is_not_opened_exclusively(machine: HostMachine) -> None:
    _, device = machine.formatted("ext4", 32 * MIB)
    machine.mounts.mount(device, machine.place(), "ext4", [], read_only=False)
    with pytest.raises(PreconditionFailed, match="mounted"), quick(machine).open(device, write=True, exclusive=True):
        pass


def test_a_device_opened_exclusively_is_not_opened_so_again(machine: HostMachine) -> None:
    device = machine.device(machine.volume())
    with (
        machine.devices.open(device, write=True, exclusive=True),
        pytest.raises(OperationPending, match="lock"),
        quick(machine).open(device, exclusive=True),
    ):
        pass


def test_a_helper_that_outlives_its_driver_keeps_the_device_locked(machine: HostMachine) -> None:
    """A driver killed with SIGKILL leaves mkfs running: nobody judges the device before that has ended."""
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


def test_the_tools_that_write_refuse_a_device_claimed_meanwhile(machine: HostMachine) -> None:
    """The lock is no claim: mkfs makes the kernel's own, and sees a mount that came in between."""
    volume, device = machine.formatted("ext4", 32 * MIB)
    target = machine.place()
    with machine.devices.open(device, write=True, exclusive=True) as opened:
        machine.mounts.mount(device, target, "ext4", [], read_only=False)
        with pytest.raises(CommandFailed):
            machine.filesystems.make(opened, "ext4", (), uuid=volume.uuid)


# --- facts by number --------------------------------------------------------------------------------------------


def test_size_and_uuid_are_known_by_number(machine: HostMachine) -> None:
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


def test_a_read_only_device_refuses_writers_that_were_there(machine: HostMachine) -> None:
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


def test_an_attached_file_is_found_again_from_the_kernel(machine: HostMachine) -> None:
    volume = machine.volume()
    found = LoopDevices().bound_to(machine.directory, machine.device_root)
    assert found == (volume.loop,)
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
    (found,) = machine.loops.bound_to(machine.directory, machine.device_root)
    assert found.node is None
    assert machine.loops.ensure_node(found, node) == volume.loop
    assert machine.device(volume).uuid == volume.uuid


def test_a_node_left_over_from_another_device_is_replaced(machine: HostMachine) -> None:
    first, second = machine.volume("csi-1"), machine.volume("csi-2")
    node = machine.device_root / "csi-1"
    node.unlink()
    os.mknod(node, stat.S_IFBLK | 0o600, os.makedev(*second.loop.device))
    machine.loops.ensure_node(first.loop, node)
    assert machine.device(first).uuid == first.uuid


def test_detaching_leaves_a_node_that_stands_for_another_device(machine: HostMachine) -> None:
    first, second = machine.volume("csi-1"), machine.volume("csi-2")
    node = machine.device_root / "csi-1"
    node.unlink()
    os.mknod(node, stat.S_IFBLK | 0o600, os.makedev(*second.loop.device))
    assert machine.loops.detach(first.loop)
    assert node.is_block_device()


def test_detaching_makes_device_and_node_disappear(machine: HostMachine) -> None:
    volume = machine.volume()
    assert machine.loops.detach(volume.loop)
    assert str(volume.file) not in shell("losetup", "--list", "--output", "BACK-FILE")
    assert not (machine.device_root / volume.name).exists()
    assert machine.loops.detach(volume.loop)


def test_a_device_that_somebody_has_open_is_not_detached_later(machine: HostMachine) -> None:
    """The kernel would unbind it at the last close, after we had said that it is busy."""
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


def test_a_number_that_was_bound_to_another_file_is_left_alone(machine: HostMachine) -> None:
    volume = machine.volume()
    stale = replace(volume.loop, label=f"{uuid.uuid4()}/test", node=None)
    assert machine.loops.detach(stale)
    assert machine.device(volume).uuid == volume.uuid


def test_many_files_are_attached_at_once_each_to_its_own_device(machine: HostMachine) -> None:
    from concurrent.futures import ThreadPoolExecutor

    with ThreadPoolExecutor(8) as pool:
        volumes = list(pool.map(lambda index: machine.volume(f"csi-{index}", MIB), range(24)))
    assert len({volume.loop.number for volume in volumes}) == 24
    assert {machine.device(volume).uuid for volume in volumes} == {volume.uuid for volume in volumes}


def test_a_loop_device_that_was_made_read_only_is_writable_for_the_next_file(machine: HostMachine) -> None:
    """The kernel keeps the mark of BLKROSET when a loop device is unbound."""
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
    """As in a container whose /dev has no node for a device made after its start."""
    from csi_driver.host.connectors import loop

    real = block_devices.node_number
    monkeypatch.setattr(loop, "node_number", lambda node: None if node.parent == Path("/dev") else real(node))
    volume = machine.volume()
    assert machine.device(volume).uuid == volume.uuid
    assert machine.loops.detach(volume.loop)


# --- read-only devices over devices -----------------------------------------------------------------------------

READER = uuid.uuid4().hex[:16]
"""Nobody else's on this machine: what is left of a reader is looked for among all loop devices."""


def test_a_read_only_device_refuses_writes_while_the_one_below_takes_them(machine: HostMachine) -> None:
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


def test_only_unused_read_only_devices_of_ours_are_released(machine: HostMachine) -> None:
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


def test_the_devices_of_other_volumes_are_not_opened_to_release_a_reader(machine: HostMachine) -> None:
    """They may hang, and take the time of a volume that has nothing to do with them."""
    volume, other = machine.volume("csi-1"), machine.volume("csi-2")
    readers = ReadOnlyLoops(machine.loops)
    of_other = readers.over(machine.device(other), other.uuid, READER)
    with opens_of(of_other.path, volume.loop.node or volume.file) as opened:
        readers.over(machine.device(volume), volume.uuid, READER)
        readers.release_left_over(READER, volume.name)
    assert set(opened) == {volume.loop.node}
    assert readers.release(of_other.number)


@contextlib.contextmanager
def opens_of(*nodes: Path) -> Iterator[list[Path]]:
    """Note which of these files are opened inside the block, as inotify(7) tells it."""
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
    assert machine.devices.uuid_of(reader.number) != volume.uuid  # the number may be somebody else's by now


def test_udev_may_look_at_a_device_that_is_being_opened(machine: HostMachine) -> None:
    """A lock held for a moment, as udev does while it probes, is waited for."""
    device = machine.device(machine.volume())
    prober = os.open(device.path, os.O_RDONLY)
    fcntl.flock(prober, fcntl.LOCK_SH)
    clock = ManualClock()
    clock.on_sleep = lambda: fcntl.flock(prober, fcntl.LOCK_UN)
    with LinuxDevices(machine.device_root, machine.status_root, clock=clock).open(device, exclusive=True):
        pass
    os.close(prober)
