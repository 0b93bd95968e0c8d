# SPDX-License-Identifier: Apache-2.0
"""The mounts of `csi_driver.host` on the real kernel, judged by findmnt and /proc."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import stat
import struct
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from csi_driver.deadline import SystemClock
from csi_driver.errors import DriverError, HostFailure, InvalidField, PreconditionFailed, SystemCallFailed
from csi_driver.host import health, mount_table, mounts, syscalls
from csi_driver.host_model import DeviceNumber
from csi_driver.model import MIB, AccessMode, MountAccess
from csi_driver.parameters.mkfs import MkfsRequest
from csi_driver.parameters.mount_options import plan_mount
from tests.contract.host_machine import HostMachine, host_machine, mounts_below, shell

pytestmark = pytest.mark.root

SIZES = {"ext4": 32 * MIB, "xfs": 320 * MIB, "btrfs": 128 * MIB}


@pytest.fixture
def machine(tmp_path: Path) -> Iterator[HostMachine]:
    with host_machine(tmp_path) as made:
        yield made


@pytest.fixture(params=["new", "classic"])
def both_interfaces(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Bind with mount_setattr, and as on kernels that lack it."""
    if request.param == "classic":
        monkeypatch.setattr(syscalls, "has_mount_setattr", lambda: False)
    return str(request.param)


@pytest.fixture(params=["statmount", "table"])
def every_way_to_look(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Use this kernel's calls, and those before statmount (6.8)."""
    if request.param != "statmount":
        real = syscalls.statx

        def old(path: Path) -> syscalls.PathStatus:
            return replace(real(path), unique_mount_id=None, mount_id=_mount_id_of(path))

        monkeypatch.setattr(syscalls, "statx", old)
    return str(request.param)


def _mount_id_of(path: Path) -> int:
    fd = os.open(path, os.O_PATH | os.O_NOFOLLOW)
    try:
        lines = Path(f"/proc/self/fdinfo/{fd}").read_text().splitlines()
    finally:
        os.close(fd)
    return next(int(line.split()[1]) for line in lines if line.startswith("mnt_id:"))


def findmnt(path: Path, columns: str) -> dict[str, str]:
    """Return findmnt's view of the topmost mount at a path."""
    text = shell("findmnt", "--json", "--output", columns, "--mountpoint", str(path))
    rows: list[dict[str, str]] = json.loads(text)["filesystems"]
    return rows[-1]


def rdev(path: Path) -> DeviceNumber:
    number = path.stat().st_rdev
    return DeviceNumber(os.major(number), os.minor(number))


# --- looking ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("fs_type", list(SIZES))
def test_a_mount_is_described_as_by_findmnt(machine: HostMachine, fs_type: str, every_way_to_look: str) -> None:
    _, device = machine.formatted(fs_type, SIZES[fs_type])
    target = machine.place()
    machine.mounts.mount(device, target, fs_type, ["noatime", "nodev"], read_only=False)
    seen = machine.mounts.at(target)
    shown = findmnt(target, "FSTYPE,SOURCE,OPTIONS")
    assert seen is not None
    assert (seen.fs_type, seen.source) == (fs_type, str(device.path))
    assert shown["source"].startswith(str(device.path))
    assert seen.number == rdev(device.path)
    assert seen.options == frozenset(shown["options"].split(",")) - {"rw"}
    assert not seen.read_only
    assert (seen.root, seen.path, seen.node_number) == ("/", target, None)


def test_a_directory_without_mount_has_none(machine: HostMachine, every_way_to_look: str) -> None:
    assert machine.mounts.at(machine.place()) is None


def test_an_absent_path_has_no_mount(machine: HostMachine) -> None:
    assert machine.mounts.at(machine.directory / "absent" / "below") is None


def test_a_directory_inside_a_mount_is_no_mount(machine: HostMachine, every_way_to_look: str) -> None:
    _, device = machine.formatted("ext4", SIZES["ext4"])
    target = machine.place()
    machine.mounts.mount(device, target, "ext4", [], read_only=False)
    assert machine.mounts.at(target / "lost+found") is None


def test_the_topmost_of_stacked_mounts_is_returned(machine: HostMachine, every_way_to_look: str) -> None:
    _, below = machine.formatted("ext4", SIZES["ext4"], "csi-1")
    _, above = machine.formatted("ext4", SIZES["ext4"], "csi-2")
    target = machine.place()
    machine.mounts.mount(below, target, "ext4", [], read_only=False)
    machine.mounts.mount(above, target, "ext4", [], read_only=False)
    first = machine.mounts.at(target)
    machine.mounts.unmount(target)
    second = machine.mounts.at(target)
    assert first is not None
    assert second is not None
    assert (first.number, second.number) == (above.number, below.number)


@pytest.mark.parametrize("fs_type", list(SIZES))
def test_every_mount_of_a_device_is_found(machine: HostMachine, fs_type: str) -> None:
    _, device = machine.formatted(fs_type, SIZES[fs_type])
    staged, published, node = machine.place("a b"), machine.place("c\nd"), machine.directory / "node"
    node.touch()
    machine.mounts.mount(device, staged, fs_type, [], read_only=False)
    machine.mounts.bind(staged, published, read_only=True)
    machine.mounts.bind(device.path, node, read_only=False)
    found = machine.mounts.of_device(device)
    assert {mounted.path for mounted in found} == {staged, published, node}


def test_a_mount_of_a_shut_down_filesystem_is_found(machine: HostMachine) -> None:
    _, device = machine.formatted("xfs", SIZES["xfs"])
    target = machine.place()
    machine.mounts.mount(device, target, "xfs", [], read_only=False)
    fd = os.open(target, os.O_RDONLY)
    fcntl.ioctl(fd, 0x8004587D, struct.pack("=I", 2))  # XFS_IOC_GOINGDOWN, without flushing the log
    os.close(fd)
    seen = machine.mounts.at(target)
    assert seen is not None
    assert seen.number == device.number
    machine.mounts.unmount(target)
    assert machine.mounts.at(target) is None


@pytest.mark.parametrize(
    ("propagation", "reaches_host"), [("private", "False"), ("slave", "False"), ("shared", "True")]
)
def test_mounts_of_another_namespace_reach_the_host_only_when_shared(
    machine: HostMachine, propagation: str, reaches_host: str
) -> None:
    place = machine.place()
    shell("mount", "--bind", str(place), str(place))
    shell("mount", "--make-shared", str(place))
    ask = "import sys; from pathlib import Path; from csi_driver.host.mounts import LinuxMounts;"
    ask += "print(LinuxMounts().reaches_host(Path(sys.argv[1])))"
    inside = ("unshare", "--mount", "--propagation", propagation, "--", sys.executable, "-c", ask, str(place))
    assert shell(*inside).strip() == reaches_host


def test_propagation_equals_findmnt(machine: HostMachine) -> None:
    target = machine.place()
    shell("mount", "-t", "tmpfs", "none", str(target))
    inside = target / "inside"
    inside.mkdir()
    answers = []
    for kind in ("--make-shared", "--make-private"):
        shell("mount", kind, str(target))
        answers.append(machine.mounts.propagation_is_shared(inside))
    assert answers == [True, False]


# --- mounting ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("fs_type", list(SIZES))
def test_a_read_only_mount_refuses_writes(machine: HostMachine, fs_type: str) -> None:
    _, device = machine.formatted(fs_type, SIZES[fs_type])
    target = machine.place()
    machine.mounts.mount(device, target, fs_type, [], read_only=True)
    with pytest.raises(OSError, match="Read-only file system"):
        (target / "file").touch()
    seen = machine.mounts.at(target)
    assert seen is not None
    assert seen.read_only


@pytest.mark.parametrize("fs_type", ["ext4", "xfs"])
def test_a_read_only_mount_does_not_replay_the_log(machine: HostMachine, fs_type: str) -> None:
    """The writer crashed, and this attachment is read-only: the log cannot be replayed."""
    _, device = machine.formatted(fs_type, SIZES[fs_type])
    target = machine.place()
    for name in ("older", "newer"):
        machine.mounts.mount(device, target, fs_type, [], read_only=False)
        with (target / name).open("wb") as file:
            os.fsync(file.fileno())
        assert name == "older" or health.shut_down(target, device.number)
        shell("umount", str(target))
    machine.devices.set_read_only(device)
    with pytest.raises(HostFailure):
        machine.mounts.mount(device, target, fs_type, [], read_only=True)
    reader = MountAccess(fs_type), AccessMode.MULTI_NODE_READER_ONLY
    plan = plan_mount(*reader, read_only=True, mkfs=MkfsRequest(), supported=(fs_type,))
    machine.mounts.mount(device, target, fs_type, plan.options_for(fs_type), read_only=True)
    assert (target / "older").is_file()


@pytest.mark.parametrize("fs_type", list(SIZES))
def test_an_option_that_the_kernel_refuses_is_named(machine: HostMachine, fs_type: str) -> None:
    _, device = machine.formatted(fs_type, SIZES[fs_type])
    target = machine.place()
    with pytest.raises(InvalidField, match="nonsense=7"):
        machine.mounts.mount(device, target, fs_type, ["noatime", "nonsense=7"], read_only=False)
    assert not mounts_below(machine.directory)


@pytest.mark.parametrize(
    ("fs_type", "option"), [("xfs", "logbsize=17k"), ("ext4", "journal_async_commit"), ("ext4", "data=x")]
)
def test_an_option_that_only_the_superblock_refuses_is_named(machine: HostMachine, fs_type: str, option: str) -> None:
    _, device = machine.formatted(fs_type, SIZES[fs_type])
    innocent = {"xfs": "inode64", "ext4": "nobarrier"}[fs_type]
    with pytest.raises(InvalidField, match=option) as caught:
        machine.mounts.mount(device, machine.place(), fs_type, [innocent, option], read_only=False)
    assert innocent not in str(caught.value)


def test_a_damaged_filesystem_is_not_blamed_on_options(machine: HostMachine) -> None:
    volume = machine.volume()
    device = machine.device(volume)
    with pytest.raises(SystemCallFailed):
        machine.mounts.mount(device, machine.place(), "ext4", ["noatime", "discard"], read_only=False)


@pytest.mark.parametrize("option", ["remount", "bind", "loop=/dev/loop0", "move", "shared"])
def test_words_that_are_no_mount_options_are_refused(machine: HostMachine, option: str) -> None:
    _, device = machine.formatted("ext4", SIZES["ext4"])
    with pytest.raises(InvalidField, match=option):
        machine.mounts.mount(device, machine.place(), "ext4", [option], read_only=False)


def test_a_mount_of_another_device_is_never_visible(machine: HostMachine) -> None:
    _, device = machine.formatted("ext4", SIZES["ext4"])
    wrong = replace(device, number=DeviceNumber(7, 4095))
    target = machine.place()
    with pytest.raises(PreconditionFailed, match="expected device 7:4095"):
        machine.mounts.mount(wrong, target, "ext4", [], read_only=False)
    assert not mounts_below(machine.directory)


def test_a_missing_filesystem_type_is_reported(machine: HostMachine) -> None:
    device = machine.device(machine.volume())
    with pytest.raises(HostFailure, match="nofs"):
        machine.mounts.mount(device, machine.place(), "nofs", [], read_only=False)


def test_nothing_is_mounted_onto_a_link(machine: HostMachine, both_interfaces: str) -> None:
    _, device = machine.formatted("ext4", SIZES["ext4"])
    link = machine.directory / "link"
    link.symlink_to(machine.place())
    with pytest.raises(DriverError):
        machine.mounts.mount(device, link, "ext4", [], read_only=False)
    assert not mounts_below(machine.directory)


# --- binding ----------------------------------------------------------------------------------------------------


def test_a_read_only_bind_refuses_writes(machine: HostMachine, both_interfaces: str) -> None:
    _, device = machine.formatted("ext4", SIZES["ext4"])
    staged, target = machine.place("staged"), machine.place("target")
    machine.mounts.mount(device, staged, "ext4", ["nosuid", "noexec"], read_only=False)
    machine.mounts.bind(staged, target, read_only=True)
    with pytest.raises(OSError, match="Read-only file system"):
        (target / "file").touch()
    (staged / "file").touch()
    seen = machine.mounts.at(target)
    assert seen is not None
    assert seen.read_only
    assert {"nosuid", "noexec"} <= seen.options


def test_a_device_node_is_bound_onto_a_file(machine: HostMachine, both_interfaces: str, every_way_to_look: str) -> None:
    device = machine.device(machine.volume())
    target = machine.directory / "node"
    target.touch()
    machine.mounts.bind(device.path, target, read_only=False)
    seen = machine.mounts.at(target)
    assert stat.S_ISBLK(target.stat().st_mode)
    assert seen is not None
    assert seen.node_number == rdev(device.path) == device.number


# --- unmounting -------------------------------------------------------------------------------------------------


def test_unmounting_where_nothing_is_mounted_is_success(machine: HostMachine) -> None:
    machine.mounts.unmount(machine.place())
    machine.mounts.unmount(machine.directory / "absent")


def test_a_busy_mount_is_refused_and_stays(machine: HostMachine) -> None:
    _, device = machine.formatted("ext4", SIZES["ext4"])
    target = machine.place()
    machine.mounts.mount(device, target, "ext4", [], read_only=False)
    with (target / "file").open("w"), pytest.raises(PreconditionFailed, match="in use"):
        machine.mounts.unmount(target)
    assert machine.mounts.at(target) is not None


def test_the_users_of_a_busy_mount_are_named(machine: HostMachine, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mount_table, "_HOLDERS_LIMIT_S", 60)  # a busy machine has many processes to look at
    _, device = machine.formatted("ext4", SIZES["ext4"])
    target = machine.place()
    machine.mounts.mount(device, target, "ext4", [], read_only=False)

    def refusal() -> str:
        with pytest.raises(PreconditionFailed) as refused:
            machine.mounts.unmount(target)
        return str(refused.value)

    with (target / "file").open("w"):
        assert f"pid {os.getpid()} (" in refusal()
    with subprocess.Popen(["sleep", "600"], cwd=target) as program:
        try:
            assert refusal() == f"unmount {target}: it is in use by pid {program.pid} (sleep)"
        finally:
            program.kill()
    (target / "below").mkdir()
    shell("mount", "-t", "tmpfs", "none", str(target / "below"))
    assert refusal() == f"unmount {target}: it is in use by the mount {target}/below"
    shell("umount", str(target / "below"))
    machine.mounts.unmount(target)


def test_a_mount_that_is_busy_for_a_moment_is_unmounted(machine: HostMachine) -> None:
    """As by the copied descriptors of a process between fork and exec."""
    _, device = machine.formatted("ext4", SIZES["ext4"])
    target = machine.place()
    machine.mounts.mount(device, target, "ext4", [], read_only=False)
    holder = os.open(target, os.O_PATH)

    class LetsGo(SystemClock):
        def sleep(self, seconds: float) -> None:
            nonlocal holder
            if holder >= 0:
                os.close(holder)
                holder = -1

    mounts.LinuxMounts(clock=LetsGo()).unmount(target)
    assert machine.mounts.at(target) is None


@pytest.mark.parametrize("fs_type", ["ext4", "xfs", "btrfs"])
def test_a_busy_mount_of_a_lost_device_is_detached(machine: HostMachine, fs_type: str) -> None:
    _, device = machine.formatted(fs_type, SIZES[fs_type])
    target = machine.place()
    machine.mounts.mount(device, target, fs_type, [], read_only=False)
    with (target / "file").open("w"):
        machine.mounts.unmount(target, lost=device.number)
        assert machine.mounts.at(target) is None


HELD_BACK = b"written to the cache of a lost device"


@pytest.mark.parametrize("fs_type", ["ext4", "xfs"])
def test_cached_writes_for_a_lost_device_are_never_written(machine: HostMachine, fs_type: str) -> None:
    """The device may return after another node has written to the volume."""
    volume, device = machine.formatted(fs_type, SIZES[fs_type])
    target = machine.place()
    machine.mounts.mount(device, target, fs_type, [], read_only=False)
    shell("sync", "--file-system", str(target))
    with (target / "file").open("wb", buffering=0) as file:
        file.write(HELD_BACK)
        machine.mounts.unmount(target, lost=device.number)
        with pytest.raises(OSError, match="rror"):
            os.fsync(file.fileno())
    shell("sync")
    assert HELD_BACK not in volume.file.read_bytes()


def test_only_the_filesystem_of_the_lost_device_is_shut_down(machine: HostMachine) -> None:
    _, device = machine.formatted("ext4", SIZES["ext4"])
    target = machine.place()
    machine.mounts.mount(device, target, "ext4", [], read_only=False)
    assert not health.shut_down(target, DeviceNumber(device.number.major, device.number.minor + 1))
    with (target / "file").open("wb", buffering=0) as file:
        file.write(HELD_BACK)
        os.fsync(file.fileno())
    assert not health.shut_down(machine.place("plain"), device.number)
    assert health.shut_down(target, device.number)
    with pytest.raises(OSError, match="rror"):
        (target / "other").write_bytes(HELD_BACK)


def test_looking_up_a_path_does_not_read_the_table(machine: HostMachine, monkeypatch: pytest.MonkeyPatch) -> None:
    """The cost must not depend on the number of mounts."""
    _, device = machine.formatted("ext4", SIZES["ext4"])
    staged, target = machine.place("staged"), machine.place("target")
    monkeypatch.setattr(mount_table, "_PROC", Path("/proc/is/not/read"))
    machine.mounts.mount(device, staged, "ext4", [], read_only=False)
    machine.mounts.bind(staged, target, read_only=True)
    seen = [machine.mounts.at(path) for path in (staged, target)]
    machine.mounts.unmount(target)
    machine.mounts.unmount(staged)
    assert all(seen)


def test_a_failed_system_call_names_its_reason() -> None:
    with pytest.raises(SystemCallFailed, match=r"bind nothing.*EBADF") as caught:
        syscalls.open_tree_clone(-1, "bind nothing")
    assert caught.value.errno == errno.EBADF


def test_an_unreadable_table_is_a_failure(machine: HostMachine, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mount_table, "_PROC", Path("/proc/is/not/read"))
    for look in (machine.mounts.table, lambda: machine.mounts.of_device(machine.device(machine.volume()))):
        with pytest.raises(SystemCallFailed, match="mountinfo"):
            look()
