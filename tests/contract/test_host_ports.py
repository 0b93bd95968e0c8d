# SPDX-License-Identifier: Apache-2.0
"""One contract for the fake machine of the node's tests and for this machine."""

from __future__ import annotations

import uuid
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from csi_driver.deadline import Deadline
from csi_driver.errors import DeadlineReached, HostFailure, InvalidField, OperationPending, PreconditionFailed
from csi_driver.host_model import Blank, DeviceNumber, FaultKind, Filesystem, OtherContent, ReadOnlyDevice
from csi_driver.model import MIB
from tests.contract.host_machine import soon
from tests.contract.two_hosts import Actor, FakeSide, Host, linux_side

OTHER_UUID = "01234567-89ab-cdef-0123-456789abcdef"
READER, OTHER_READER = uuid.uuid4().hex[:16], uuid.uuid4().hex[:16]
"""Unique on this machine: left over readers are searched among all loop devices."""
GONE = DeviceNumber(239, 9999)


@pytest.fixture(params=["fake", pytest.param("linux", marks=pytest.mark.root)])
def host(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Host]:
    if request.param == "fake":
        yield FakeSide()
    else:
        with linux_side(tmp_path) as real:
            yield real


@pytest.fixture
def actor(host: Host) -> Actor:
    return Actor(host)


# --- devices ----------------------------------------------------------------------------------------------------


def test_the_device_of_a_volume_is_found_as_it_is(host: Host) -> None:
    uuid = host.attach("csi-1", 64 * MIB)
    device = host.devices.find("csi-1")
    assert device is not None
    shown = (device.name, device.uuid, device.size_bytes, device.read_only, device.path)
    assert shown == ("csi-1", uuid, 64 * MIB, False, host.devices.path_of("csi-1"))
    assert host.devices.wait_for("csi-1", uuid, deadline=soon()) == device


def test_an_absent_device_is_not_found_and_the_wait_ends(host: Host) -> None:
    assert host.devices.find("csi-1") is None
    with pytest.raises(DeadlineReached):
        host.devices.wait_for("csi-1", None, deadline=Deadline.after(0.01))


def test_the_device_of_another_volume_is_not_waited_for(host: Host) -> None:
    host.attach("csi-1", 64 * MIB)
    with pytest.raises(PreconditionFailed, match=OTHER_UUID):
        host.devices.wait_for("csi-1", OTHER_UUID, deadline=soon())


CHANGES: dict[str, Callable[[Host], None]] = {
    "other": lambda host: host.replace("csi-1"),
    "lost": lambda host: host.lose("csi-1"),
    "grown": lambda host: host.grow("csi-1", 128 * MIB),
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_another_device_than_the_found_one_is_not_opened(
    host: Host, actor: Actor, change: Callable[[Host], None]
) -> None:
    device = actor.attached()
    change(host)
    with pytest.raises(PreconditionFailed), host.devices.open(device):
        pass


def test_a_mounted_device_is_not_opened_exclusively(host: Host, actor: Actor) -> None:
    actor.mounted()
    with host.devices.open(actor.device()), pytest.raises(PreconditionFailed):  # noqa: SIM117
        with host.devices.open(actor.device(), exclusive=True):
            pass


def test_a_device_is_opened_exclusively_by_one_at_a_time(host: Host, actor: Actor) -> None:
    device = actor.attached()
    with host.devices.open(device, exclusive=True), pytest.raises(OperationPending):  # noqa: SIM117
        with host.devices.open(device, exclusive=True):
            pass
    with host.devices.open(device, exclusive=True) as opened:
        assert opened.device.number == device.number


def test_size_and_uuid_are_returned_by_number(host: Host, actor: Actor) -> None:
    device = actor.attached()
    host.grow("csi-1", 128 * MIB)
    told = host.devices.size_bytes(device.number), host.devices.uuid_of(device.number)
    assert told == (128 * MIB, device.uuid)
    assert (host.devices.size_bytes(GONE), host.devices.uuid_of(GONE)) == (None, None)


def test_a_device_set_read_only_refuses_writes(host: Host, actor: Actor) -> None:
    device = actor.attached()
    host.devices.set_read_only(device)
    target = actor.bound_device(device)
    assert (actor.device().read_only, host.write(target)) == (True, False)


@pytest.mark.parametrize("read_only", [False, True])
def test_a_healthy_device_and_filesystem_have_no_fault(host: Host, actor: Actor, read_only: bool) -> None:
    found = host.mounts.at(actor.mounted(read_only=read_only))
    assert found is not None
    assert (list(host.probes.device(found.number)), list(host.probes.filesystem(found))) == ([], [])
    assert not found.turned_read_only


def test_a_device_set_read_only_is_a_fault(host: Host, actor: Actor) -> None:
    device = actor.attached()
    host.devices.set_read_only(device)
    assert [fault.kind for fault in host.probes.device(device.number)] == [FaultKind.DEVICE_READ_ONLY]


# --- read-only devices ------------------------------------------------------------------------------------------


def test_a_reader_refuses_writes_and_the_device_below_accepts_them(host: Host, actor: Actor) -> None:
    device = actor.attached()
    reader = host.read_only_devices.over(device, device.uuid or "", READER)
    target, below = actor.bound_device(reader), actor.bound_device(device, "below")
    assert (reader.read_only, host.write(target), host.write(below)) == (True, False, True)
    assert host.devices.uuid_of(reader.number) == device.uuid


def test_a_reader_has_one_device_with_the_current_size(host: Host, actor: Actor) -> None:
    first = host.read_only_devices.over(actor.attached(), OTHER_UUID, READER)
    host.grow("csi-1", 128 * MIB)
    again = host.read_only_devices.over(actor.device(), OTHER_UUID, READER)
    another = host.read_only_devices.over(actor.device(), OTHER_UUID, OTHER_READER)
    assert (again.number, again.size_bytes) == (first.number, 128 * MIB)
    assert another.number != first.number


def test_a_new_device_gets_a_new_reader(host: Host, actor: Actor) -> None:
    first = host.read_only_devices.over(actor.attached(), OTHER_UUID, READER)
    second = host.read_only_devices.over(actor.attached("csi-2"), OTHER_UUID, READER)
    assert first.number != second.number


def test_only_readers_are_released_and_once(host: Host, actor: Actor) -> None:
    device = actor.attached()
    reader = host.read_only_devices.over(device, OTHER_UUID, READER)
    numbers = (device.number, GONE, reader.number, reader.number)
    assert [host.read_only_devices.release(number) for number in numbers] == [False, False, True, False]
    assert ReadOnlyDevice(reader.number, device.path) not in host.read_only_devices.present()
    assert actor.device() == device


def test_a_reader_in_use_is_not_released(host: Host, actor: Actor) -> None:
    target = actor.bound_device(host.read_only_devices.over(actor.attached(), OTHER_UUID, READER))
    published = host.mounts.at(target)
    assert published is not None
    assert published.node_number is not None
    with host.in_use(target):
        assert not host.read_only_devices.release(published.node_number)
    assert host.read_only_devices.release(published.node_number)


def test_left_over_readers_of_a_lost_device_are_released(host: Host, actor: Actor) -> None:
    device, marked = actor.attached(), str(uuid.uuid4())
    left = host.read_only_devices.over(device, marked, READER)
    other = host.read_only_devices.over(device, marked, OTHER_READER)
    host.lose("csi-1")
    host.read_only_devices.release_left_over(READER, "csi-1")
    # By their label: the number of the released one may be reused by now.
    assert [host.devices.uuid_of(number) == marked for number in (left.number, other.number)] == [False, True]
    assert host.devices.size_bytes(other.number) == 64 * MIB


def test_readers_are_listed_with_the_device_below(host: Host, actor: Actor) -> None:
    device = actor.attached()
    made = host.read_only_devices.over(device, OTHER_UUID, READER)
    assert ReadOnlyDevice(made.number, device.path) in host.read_only_devices.present()
    host.read_only_devices.release(made.number)
    assert ReadOnlyDevice(made.number, device.path) not in host.read_only_devices.present()


def test_a_device_has_a_name_by_number(host: Host, actor: Actor) -> None:
    number = actor.attached().number
    assert host.devices.name_of(number) == "csi-1"
    assert host.devices.name_of(DeviceNumber(0, 1)) is None
    host.lose("csi-1")
    assert host.devices.name_of(number) is None


# --- what devices hold ------------------------------------------------------------------------------------------


def test_a_new_device_is_blank(actor: Actor) -> None:
    device = actor.attached()
    assert (actor.probed(device), actor.first_data(device)) == (Blank(), None)


def test_a_new_filesystem_has_the_size_of_its_device(host: Host, actor: Actor) -> None:
    device = actor.formatted()
    found = actor.probed(device)
    assert isinstance(found, Filesystem)
    assert found.fs_type == "ext4"
    assert host.filesystems.recorded_bytes(device, "ext4") == device.size_bytes


@pytest.mark.parametrize("offset", [0, 64 * MIB - 1])
def test_data_at_an_end_of_the_device_is_content(host: Host, actor: Actor, offset: int) -> None:
    device = actor.attached()
    host.put(device, offset, b"x")
    assert isinstance(actor.probed(device), OtherContent)


def test_data_in_the_middle_is_found_only_by_the_scan(host: Host, actor: Actor) -> None:
    device = actor.attached()
    host.put(device, 33 * MIB + 500_005, b"x")
    assert (actor.probed(device), actor.first_data(device)) == (Blank(), 33 * MIB + 500_005)


def test_the_scan_ends_at_the_deadline(actor: Actor) -> None:
    with pytest.raises(DeadlineReached):
        actor.first_data(actor.attached(), deadline=Deadline.after(0.0))


def test_a_device_without_filesystem_records_no_size(host: Host, actor: Actor) -> None:
    device = actor.formatted()
    with pytest.raises(PreconditionFailed):
        host.filesystems.recorded_bytes(device, "xfs")


def test_an_unmounted_ext4_grows(host: Host, actor: Actor) -> None:
    actor.formatted()
    host.grow("csi-1", 128 * MIB)
    host.filesystems.check(actor.device(), "ext4")
    assert host.filesystems.grow_unmounted(actor.device(), "ext4")
    assert host.filesystems.recorded_bytes(actor.device(), "ext4") == 128 * MIB


def test_a_mounted_filesystem_is_not_grown_as_an_unmounted_one(host: Host, actor: Actor) -> None:
    actor.mounted()
    with pytest.raises(PreconditionFailed):
        host.filesystems.grow_unmounted(actor.device(), "ext4")


def test_xfs_grows_only_mounted(host: Host, actor: Actor) -> None:
    actor.formatted(fs_type="xfs", size_bytes=320 * MIB)
    host.grow("csi-1", 512 * MIB)
    assert not host.filesystems.grow_unmounted(actor.device(), "xfs")
    path = actor.mount(actor.device(), actor.place(), "xfs")
    before = host.filesystems.usage(path).total_bytes
    host.filesystems.grow_mounted(path, actor.device(), "xfs")
    assert host.filesystems.usage(path).total_bytes == before + 192 * MIB


def test_usage_is_returned_for_a_mount(host: Host, actor: Actor) -> None:
    usage = host.filesystems.usage(actor.mounted())
    assert 0 < usage.total_bytes <= 64 * MIB
    assert 0 < (usage.available_bytes or 0) <= usage.total_bytes


# --- mounts -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("read_only", [False, True])
def test_a_mount_is_returned_as_made(host: Host, actor: Actor, read_only: bool) -> None:
    path, device = actor.mounted(read_only=read_only), actor.device()
    found = host.mounts.at(path)
    assert found is not None
    shown = (found.path, found.number, found.fs_type, found.source, found.root, found.read_only, found.node_number)
    assert shown == (path, device.number, "ext4", str(device.path), "/", read_only, None)
    assert host.write(path) is not read_only


def test_a_directory_is_no_mount(host: Host, actor: Actor) -> None:
    assert host.mounts.at(actor.place()) is None
    assert host.mounts.at(actor.mounted() / "below") is None
    assert host.mounts.at(host.root / "absent") is None


def test_options_of_a_mount_are_shown(host: Host, actor: Actor) -> None:
    host.mounts.mount(actor.formatted(), actor.place(), "ext4", ["noatime", "nodev"], read_only=False)
    found = host.mounts.at(host.root / "target")
    assert found is not None
    assert found.options >= {"noatime", "nodev"}
    assert not found.options & {"relatime", "nosuid", "ro", "rw"}


def test_an_option_that_the_kernel_does_not_know_is_named(host: Host, actor: Actor) -> None:
    with pytest.raises(InvalidField, match="bogus"):
        host.mounts.mount(actor.formatted(), actor.place(), "ext4", ["bogus=1"], read_only=False)
    assert host.mounts.at(host.root / "target") is None


@pytest.mark.parametrize("fs_type", ["xfs", "ext4"])
def test_a_missing_filesystem_is_not_mounted(host: Host, actor: Actor, fs_type: str) -> None:
    device = actor.formatted() if fs_type == "xfs" else actor.attached()
    with pytest.raises(HostFailure):
        actor.mount(device, actor.place(), fs_type)
    assert host.mounts.at(host.root / "target") is None


def test_a_mount_needs_a_directory(host: Host, actor: Actor) -> None:
    device, file = actor.formatted(), host.root / "file"
    host.paths.make_file(file)
    for target in (file, host.root / "absent"):
        with pytest.raises(HostFailure):
            actor.mount(device, target)


@pytest.mark.parametrize("read_only", [False, True])
def test_a_second_mount_with_other_access_is_refused(host: Host, actor: Actor, read_only: bool) -> None:
    actor.mounted(read_only=read_only)
    actor.mount(actor.device(), actor.place("again"), read_only=read_only)
    with pytest.raises(PreconditionFailed):
        actor.mount(actor.device(), actor.place(), read_only=not read_only)


def test_a_copy_of_a_mounted_xfs_is_mounted_beside_it_only_with_nouuid(host: Host, actor: Actor) -> None:
    actor.mount(actor.formatted(fs_type="xfs", size_bytes=320 * MIB), actor.place("source"), "xfs")
    host.copy("csi-1", "csi-2")
    with pytest.raises(HostFailure):
        actor.mount(actor.device("csi-2"), actor.place(), "xfs")
    host.mounts.mount(actor.device("csi-2"), host.root / "target", "xfs", ["nouuid"], read_only=False)


LOGGING = {"ext4": "noload", "xfs": "norecovery", "btrfs": "rescue=nologreplay"}


@pytest.mark.parametrize("fs_type", LOGGING)
def test_a_read_only_mount_replays_the_log_unless_its_options_leave_it_out(
    host: Host, actor: Actor, fs_type: str
) -> None:
    device = actor.formatted(fs_type=fs_type, size_bytes=320 * MIB)
    source = actor.mount(device, actor.place("source"), fs_type)
    assert host.write(source)
    host.copy("csi-1", "csi-2")
    host.mounts.unmount(source)
    options = ["nouuid"] if fs_type == "xfs" else []
    host.mounts.mount(
        actor.device("csi-2"), actor.place("unread"), fs_type, [*options, LOGGING[fs_type]], read_only=True
    )
    assert host.files(host.root / "unread") == []
    host.mounts.unmount(host.root / "unread")
    host.mounts.mount(actor.device("csi-2"), actor.place("read"), fs_type, options, read_only=True)
    assert host.files(host.root / "read") == ["written"]


@pytest.mark.parametrize("fs_type", LOGGING)
def test_a_log_on_a_read_only_device_is_not_replayed_but_refused(host: Host, actor: Actor, fs_type: str) -> None:
    device = actor.formatted(fs_type=fs_type, size_bytes=320 * MIB)
    source = actor.mount(device, actor.place("source"), fs_type)
    assert host.write(source)
    host.copy("csi-1", "csi-2")
    host.mounts.unmount(source)
    host.devices.set_read_only(actor.device("csi-2"))
    with pytest.raises(HostFailure):
        host.mounts.mount(
            actor.device("csi-2"), actor.place(), fs_type, ["nouuid"] if fs_type == "xfs" else [], read_only=True
        )


def test_a_btrfs_gets_another_uuid(host: Host, actor: Actor) -> None:
    device = actor.formatted(fs_type="btrfs", size_bytes=128 * MIB)
    with host.devices.open(device, write=True, exclusive=True) as opened:
        host.filesystems.change_btrfs_uuid(opened, OTHER_UUID)
    assert actor.probed(device) == Filesystem("btrfs", OTHER_UUID)
    actor.mount(device, actor.place(), "btrfs")


def test_a_read_only_device_is_mounted_only_read_only(host: Host, actor: Actor) -> None:
    device = actor.formatted()
    host.devices.set_read_only(device)
    with pytest.raises(HostFailure):
        actor.mount(actor.device(), actor.place())
    host.mounts.mount(actor.device(), host.root / "target", "ext4", ["noload"], read_only=True)


def test_stacked_mounts_are_unmounted_one_by_one(host: Host, actor: Actor) -> None:
    path, below = actor.mounted(), actor.device()
    actor.mount(actor.formatted("csi-2"), path)
    topmost = []
    while (found := host.mounts.at(path)) is not None:
        topmost.append(found.number)
        host.mounts.unmount(path)
    assert topmost == [actor.device("csi-2").number, below.number]


def test_unmounting_without_mount_is_success(host: Host, actor: Actor) -> None:
    host.mounts.unmount(actor.place())
    host.mounts.unmount(host.root / "absent")


def test_a_busy_mount_is_only_detached_lazily(host: Host, actor: Actor) -> None:
    path = actor.mounted()
    with host.in_use(path):
        with pytest.raises(PreconditionFailed):
            host.mounts.unmount(path)
        assert host.mounts.at(path) is not None
        found = host.mounts.at(path)
        assert found is not None
        host.mounts.unmount(path, lost=found.number)
        assert host.mounts.at(path) is None


def test_a_bind_shares_the_filesystem_and_may_be_narrower(host: Host, actor: Actor) -> None:
    staged, target = actor.mounted(), actor.place()
    host.mounts.bind(staged, target, read_only=True)
    found, origin = host.mounts.at(target), host.mounts.at(staged)
    assert found is not None
    assert origin is not None
    assert (found.number, found.root, found.read_only, origin.read_only) == (origin.number, "/", True, False)
    assert (host.write(target), host.write(staged)) == (False, True)


def test_a_bind_of_a_read_only_mount_is_read_only(host: Host, actor: Actor) -> None:
    staged, narrow, target = actor.mounted(), actor.place("narrow"), actor.place()
    host.mounts.bind(staged, narrow, read_only=True)
    host.mounts.bind(narrow, target, read_only=False)
    assert not host.write(target)


def test_a_bind_outlives_its_source(host: Host, actor: Actor) -> None:
    staged, target = actor.mounted(), actor.place()
    host.mounts.bind(staged, target, read_only=False)
    host.mounts.unmount(staged)
    assert host.write(target)


@pytest.mark.parametrize("read_only", [False, True])
def test_a_bound_device_is_returned_with_number_and_name(host: Host, actor: Actor, read_only: bool) -> None:
    device = actor.attached()
    target = actor.bound_device(device, read_only=read_only)
    found = host.mounts.at(target)
    assert found is not None
    assert (found.node_number, found.read_only, host.paths.kind(target)) == (device.number, read_only, "device")
    assert found.number != device.number
    assert Path(found.root).parts[-2:] == device.path.parts[-2:]


def test_a_bind_mount_of_a_device_does_not_claim_it(host: Host, actor: Actor) -> None:
    device = actor.attached()
    actor.bound_device(device)
    with host.devices.open(device, exclusive=True):
        pass


def test_a_device_is_bound_only_onto_a_file(host: Host, actor: Actor) -> None:
    device = actor.attached()
    for target in (actor.place(), host.root / "absent"):
        with pytest.raises(HostFailure):
            host.mounts.bind(device.path, target, read_only=False)


def test_all_mounts_of_a_device_are_found(host: Host, actor: Actor) -> None:
    staged, target = actor.mounted(), actor.place()
    host.mounts.bind(staged, target, read_only=True)
    node = actor.bound_device(actor.device(), "node")
    actor.mounted("elsewhere", "csi-2")
    assert all(found in host.mounts.table() for found in host.mounts.of_device(actor.device()))
    found = {mounted.path for mounted in host.mounts.of_device(actor.device())}
    # Another test may have bound a published device with a number that this one has now.
    assert {path for path in found if path.is_relative_to(host.root)} == {staged, target, node}


# --- paths ------------------------------------------------------------------------------------------------------


def test_a_plain_path_below_the_root_is_accepted(host: Host) -> None:
    path = host.root / "pods/1"
    assert host.paths.check(str(path), "target_path") == path


@pytest.mark.parametrize("path", ["", "pods/1", "{root}/../x", "{root}/a\0b", "/elsewhere", "{root}", "{root}-2/x"])
def test_other_paths_are_refused(host: Host, path: str) -> None:
    with pytest.raises(InvalidField, match="target_path"):
        host.paths.check(path.format(root=host.root), "target_path")


def test_directories_and_files_are_created_once(host: Host) -> None:
    directory, file = host.root / "directory", host.root / "file"
    for _ in range(2):
        host.paths.make_directory(directory)
        host.paths.make_file(file)
    kinds = [host.paths.kind(path) for path in (directory, file, host.root / "absent", file / "below")]
    assert kinds == ["directory", "file", "absent", "absent"]


def test_another_kind_of_file_is_not_accepted(host: Host, actor: Actor) -> None:
    host.paths.make_file(host.root / "file")
    with pytest.raises(PreconditionFailed):
        host.paths.make_directory(host.root / "file")
    with pytest.raises(PreconditionFailed):
        host.paths.make_file(actor.place())


def test_nothing_is_created_without_parent(host: Host) -> None:
    for make in (host.paths.make_directory, host.paths.make_file):
        with pytest.raises(PreconditionFailed):
            make(host.root / "absent/target")


def test_a_file_with_a_bound_device_exists(host: Host, actor: Actor) -> None:
    host.paths.make_file(actor.bound_device(actor.attached()))


def test_empty_directories_and_files_are_removed(host: Host, actor: Actor) -> None:
    file = host.root / "file"
    host.paths.make_file(file)
    for path in (actor.place(), file, file, host.root / "absent/target"):
        host.paths.remove(path)
        assert host.paths.kind(path) == "absent"


def test_non_empty_directories_and_mount_points_are_kept(host: Host, actor: Actor) -> None:
    host.paths.make_directory(actor.place("full") / "below")
    node = actor.bound_device(actor.attached("csi-2"), "node")
    for path in (host.root / "full", actor.mounted(), node):
        with pytest.raises(PreconditionFailed):
            host.paths.remove(path)
        assert host.paths.kind(path) != "absent"


def test_the_mode_of_a_mounted_directory_is_the_filesystems_own(host: Host, actor: Actor) -> None:
    staged, target = actor.mounted(), actor.place()
    host.mounts.bind(staged, target, read_only=False)
    host.paths.set_mode(staged, 0o2770)
    assert host.mode(target) == 0o2770
    host.mounts.unmount(target)
    assert host.mode(target) != 0o2770
