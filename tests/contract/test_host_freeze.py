# SPDX-License-Identifier: Apache-2.0
"""Writes to several volumes are held at once, and filesystems are thawed whatever happens."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from csi_driver.deadline import Deadline
from csi_driver.errors import HostFailure, NotFreezable, SystemCallFailed
from csi_driver.host import freeze as freeze_module
from csi_driver.host.block_devices import node_number
from csi_driver.host.connectors.loop import LoopDevices
from csi_driver.host.freeze import Freezer, _Mounted
from csi_driver.host.mount_table import opened_by
from csi_driver.host.syscalls import closing
from csi_driver.host_model import DeviceNumber, LoopDevice
from tests.integration.stalling_disk import stalling_disk
from tests.reflink_pool import MIB, mounted

pytestmark = pytest.mark.root
LABEL = "{0}1111111-2222-3333-4444-555555555555/0123456789abcdef"
FIFREEZE, FITHAW = 0xC0045877, 0xC0045878
LIMIT_S = 30.0


def run(*argv: object) -> str:
    done = subprocess.run([str(each) for each in argv], check=True, capture_output=True)
    return done.stdout.decode()


def freeze(place: Path) -> bool:
    """Freeze a filesystem; False: it is frozen already."""
    with closing(os.open(place, os.O_RDONLY)) as fd:
        try:
            fcntl.ioctl(fd, FIFREEZE, 0)
        except OSError as error:
            if error.errno != errno.EBUSY:
                raise
            return False
        return True


def thaw(place: Path) -> None:
    with closing(os.open(place, os.O_RDONLY)) as fd, contextlib.suppress(OSError):
        fcntl.ioctl(fd, FITHAW, 0)


def is_frozen(place: Path) -> bool:
    if freeze(place):
        thaw(place)
        return False
    return True


@dataclass(slots=True)
class Machine:
    """Volumes a, b, ... of a pool, each with a loop device, and filesystems on them."""

    directory: Path
    pool: Path
    stack: contextlib.ExitStack
    loops: LoopDevices = field(default_factory=LoopDevices)

    def volume(self, name: str) -> Path:
        """Make a volume with a device; return its file."""
        file = self.pool / f"{name}.img"
        with file.open("wb") as made:
            made.truncate(64 * MIB)
        device = self.loops.attach(file, self.device(name), label=LABEL.format(name), read_only=False)
        self.stack.callback(self.detach, device)
        return file

    def detach(self, device: LoopDevice) -> None:
        """Detach a device, which the kernel may still use for a moment."""
        assert Deadline.after(30).wait_until(lambda: self.loops.detach(device))

    def device(self, name: str) -> Path:
        return self.directory / f"device-{name}"

    def mount(self, name: str, *options: str, device: Path | None = None, make: str = "mkfs.ext4") -> Path:
        """Mount a new filesystem of the volume's device."""
        place = self.directory / f"mount-{name}"
        place.mkdir()
        run(make, "-q", device or self.device(name))
        run("mount", *options, device or self.device(name), place)
        self.stack.callback(subprocess.run, ["umount", "--lazy", str(place)], check=True)
        self.stack.callback(thaw, place)
        return place

    def mapped(self, name: str) -> Path:
        """Make a device of the device-mapper over a volume's."""
        device, node = self.device(name), f"freeze-{os.getpid()}-{name}"
        sectors = run("blockdev", "--getsz", device).strip()
        run("dmsetup", "create", node, "--table", f"0 {sectors} linear {device} 0")
        self.stack.callback(run, "dmsetup", "remove", "--retry", node)
        return Path("/dev/mapper", node)

    def freezer(self) -> Freezer:
        return Freezer(self.pool)

    def records(self) -> list[Path]:
        return list(self.pool.glob("*frozen*"))


@pytest.fixture
def machine(tmp_path: Path) -> Iterator[Machine]:
    with mounted(tmp_path) as pool, contextlib.ExitStack() as stack:
        yield Machine(tmp_path, pool, stack)


def test_filesystems_are_frozen_until_the_end_and_no_longer(machine: Machine) -> None:
    files = [machine.volume("a"), machine.volume("b")]
    places = [machine.mount("a"), machine.mount("b", make="mkfs.ext4")]
    with machine.freezer().held(files, limit_s=LIMIT_S) as end:
        assert [is_frozen(place) for place in places] == [True, True]
        assert len(machine.records()) == 1
        end()
        assert [is_frozen(place) for place in places] == [False, False]
    assert machine.records() == []


def test_filesystems_are_thawed_after_an_exception(machine: Machine) -> None:
    files, place = [machine.volume("a")], machine.mount("a")
    with pytest.raises(ZeroDivisionError), machine.freezer().held(files, limit_s=LIMIT_S):
        raise ZeroDivisionError
    assert not is_frozen(place)
    assert machine.records() == []


def test_filesystems_are_thawed_when_their_time_is_up_and_the_copies_are_not_taken_for_good(machine: Machine) -> None:
    files, place = [machine.volume("a")], machine.mount("a")
    with machine.freezer().held(files, limit_s=3.0) as end:
        assert Deadline.after(30).wait_until(lambda: not is_frozen(place))
        with pytest.raises(NotFreezable, match="more than 3 s"):
            end()
    assert machine.records() == []


def guard_of(parent: int) -> int:
    (child,) = Path(f"/proc/{parent}/task/{parent}/children").read_text().split()
    return int(child)


def test_a_guard_that_is_killed_is_replaced(machine: Machine) -> None:
    files, place = [machine.volume("a")], machine.mount("a")
    with machine.freezer().held(files, limit_s=LIMIT_S) as end:
        (record,) = machine.records()
        for pid in (int(each.name) for each in Path("/proc").iterdir() if each.name.isdigit()):
            with contextlib.suppress(OSError):
                if record.samefile(f"/proc/{pid}/fd/3") and pid != os.getpid():
                    os.kill(pid, signal.SIGKILL)
        with pytest.raises(NotFreezable):
            end()
        assert is_frozen(place)
    # On a busy machine the other guard may start too late to be waited for.
    assert Deadline.after(60).wait_until(lambda: not is_frozen(place))
    assert Deadline.after(60).wait_until(machine.freezer().recover)
    assert machine.records() == []


def test_a_guard_that_is_stopped_goes_on_at_the_end(machine: Machine) -> None:
    file, place = machine.volume("a"), machine.mount("a")
    with machine.freezer().held([file], limit_s=LIMIT_S) as end:
        os.kill(guard_of(os.getpid()), signal.SIGSTOP)
        with pytest.raises(NotFreezable):
            end()
    assert Deadline.after(30).wait_until(lambda: not is_frozen(place))
    assert machine.freezer().recover()
    assert machine.records() == []


def test_filesystems_are_thawed_when_the_guard_was_stopped_and_the_manager_is_killed(machine: Machine) -> None:
    file, place = machine.volume("a"), machine.mount("a")
    with holding(machine, file) as manager:
        os.kill(guard_of(manager.pid), signal.SIGSTOP)
        manager.kill()
    assert Deadline.after(30).wait_until(lambda: not is_frozen(place))
    assert Deadline.after(30).wait_until(machine.freezer().recover)
    assert machine.records() == []


HOLD = """
import sys
from pathlib import Path
from csi_driver.host.freeze import Freezer, _Mounted
with Freezer(Path(sys.argv[1])).held([Path(each) for each in sys.argv[2:]], limit_s=600.0):
    print("held", flush=True)
    sys.stdin.read()
"""


@contextlib.contextmanager
def holding(machine: Machine, *files: Path) -> Iterator[subprocess.Popen[bytes]]:
    """Hold the writes in a process of its own."""
    argv = [sys.executable, "-c", HOLD, str(machine.pool), *map(str, files)]
    with subprocess.Popen(argv, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == b"held\n"
        yield process


def test_filesystems_are_thawed_when_the_manager_is_killed(machine: Machine) -> None:
    file, place = machine.volume("a"), machine.mount("a")
    with holding(machine, file) as manager:
        assert is_frozen(place)
        manager.kill()
    assert Deadline.after(30).wait_until(lambda: not is_frozen(place))
    assert Deadline.after(30).wait_until(machine.freezer().recover)
    assert machine.records() == []


def test_a_start_thaws_what_was_frozen_when_manager_and_guard_were_killed(machine: Machine) -> None:
    files = [machine.volume("a"), machine.volume("b")]
    places = [machine.mount("a"), machine.mount("b")]
    with holding(machine, *files) as manager:
        guard = guard_of(manager.pid)
        os.kill(manager.pid, signal.SIGSTOP)  # so that it cannot see the guard's end
        os.kill(guard, signal.SIGKILL)
        manager.kill()
    assert [is_frozen(place) for place in places] == [True, True]
    assert Deadline.after(30).wait_until(machine.freezer().recover)
    assert [is_frozen(place) for place in places] == [False, False]
    assert machine.records() == []


def test_a_record_of_a_living_guard_is_left_to_it(machine: Machine) -> None:
    files, place = [machine.volume("a")], machine.mount("a")
    with machine.freezer().held(files, limit_s=LIMIT_S):
        assert not machine.freezer().recover()
        assert is_frozen(place)


def test_what_another_program_froze_is_refused_and_stays_frozen(machine: Machine) -> None:
    files = [machine.volume("a"), machine.volume("b")]
    first, second = machine.mount("a"), machine.mount("b")
    assert freeze(second)
    refused = pytest.raises(NotFreezable, match="another program has frozen it already")
    with refused, machine.freezer().held(files, limit_s=LIMIT_S):
        pass
    assert machine.freezer().recover()
    assert (is_frozen(first), is_frozen(second)) == (False, True)
    assert machine.records() == []


def number_of(device: Path) -> DeviceNumber:
    number = node_number(device)
    assert number is not None
    return number


def test_a_filesystem_that_does_not_answer_holds_up_nothing(machine: Machine) -> None:
    machine.volume("a")
    disk = machine.stack.enter_context(stalling_disk(machine.directory, 64 * MIB))
    device = machine.loops.attach(disk.path, machine.device("b"), label=LABEL.format("b"), read_only=False)
    machine.stack.callback(machine.detach, device)
    places = {"a": machine.mount("a"), "b": machine.mount("b", "-o", "nobarrier")}
    run("sync", "-f", places["b"])
    disk.stall()
    try:
        refused = pytest.raises(NotFreezable, match="did not answer")
        mounted = [_Mounted(number_of(machine.device(name)), (str(place),)) for name, place in places.items()]
        with refused, machine.freezer()._guarded(mounted, [], 1.0):
            pass
        assert not is_frozen(places["a"])
        assert len(machine.records()) == 1
        assert not machine.freezer().recover()
    finally:
        disk.go_on()
    assert Deadline.after(30).wait_until(machine.freezer().recover)
    assert not is_frozen(places["b"])
    assert machine.records() == []


def test_a_raw_device_that_is_open_is_refused(machine: Machine) -> None:
    files = [machine.volume("a"), machine.volume("b")]
    place = machine.mount("a")
    with machine.device("b").open("r+b") as device, subprocess.Popen(["sleep", "1000"], stdin=device) as reader:
        refused = pytest.raises(NotFreezable, match=rf"in use by process {reader.pid} \(sleep\)")
        with refused, machine.freezer().held(files, limit_s=LIMIT_S):
            pass
        reader.kill()
    assert not is_frozen(place)


def test_a_device_that_is_claimed_out_of_sight_is_refused(machine: Machine) -> None:
    file = machine.volume("a")
    refused = pytest.raises(NotFreezable, match="by a mount or a program that is not visible")
    claim = os.open(machine.device("a"), os.O_RDWR | os.O_EXCL)
    with closing(claim), refused, machine.freezer().held([file], limit_s=LIMIT_S):
        pass


def test_a_device_that_nobody_uses_needs_no_freeze(machine: Machine) -> None:
    with machine.freezer().held([machine.volume("a")], limit_s=LIMIT_S) as end:
        end()


def test_a_write_by_a_device_that_is_opened_meanwhile_is_found(machine: Machine) -> None:
    file = machine.volume("a")
    with machine.freezer().held([file], limit_s=LIMIT_S) as end:
        with machine.device("a").open("r+b") as device:
            device.write(b"x")
            os.fsync(device.fileno())
        with pytest.raises(NotFreezable, match="was written"):
            end()


def test_a_filesystem_that_is_mounted_meanwhile_is_found(machine: Machine) -> None:
    file = machine.volume("a")
    with machine.freezer().held([file], limit_s=LIMIT_S) as end:
        (machine.mount("a") / "file").write_text("x")
        run("sync", "-f", machine.directory / "mount-a")
        with pytest.raises(NotFreezable, match="was written"):
            end()


@pytest.mark.device_mapper
def test_a_filesystem_over_the_device_mapper_is_frozen(machine: Machine) -> None:
    file = machine.volume("a")
    place = machine.mount("a", device=machine.mapped("a"))
    with machine.freezer().held([file], limit_s=LIMIT_S) as end:
        assert is_frozen(place)
        end()
    assert not is_frozen(place)


@pytest.mark.parametrize("make", ["mkfs.xfs", "mkfs.btrfs"])
def test_a_filesystem_of_another_kind_is_frozen(machine: Machine, make: str) -> None:
    file = machine.pool / "a.img"
    with file.open("wb") as made:
        made.truncate(320 * MIB)
    device = machine.loops.attach(file, machine.device("a"), label=LABEL.format("a"), read_only=False)
    machine.stack.callback(machine.detach, device)
    place = machine.mount("a", make=make)
    with machine.freezer().held([file], limit_s=LIMIT_S) as end:
        assert is_frozen(place)
        end()
    assert not is_frozen(place)


def test_two_mounts_of_one_filesystem_are_frozen_once(machine: Machine) -> None:
    file, place = machine.volume("a"), machine.mount("a")
    (machine.directory / "again").mkdir()
    run("mount", "--bind", place, machine.directory / "again")
    machine.stack.callback(run, "umount", machine.directory / "again")
    with machine.freezer().held([file], limit_s=LIMIT_S) as end:
        assert is_frozen(place)
        end()
    assert not is_frozen(place)


def test_a_filesystem_under_another_mount_is_refused(machine: Machine) -> None:
    """Its root cannot be opened by its path, so that of the other one would be frozen."""
    file, place = machine.volume("a"), machine.mount("a")
    run("mount", "-t", "tmpfs", "none", place)
    refused = pytest.raises(NotFreezable, match="another filesystem is mounted over it")
    try:
        with refused, machine.freezer().held([file], limit_s=LIMIT_S):
            pass
    finally:
        run("umount", place)
    assert not is_frozen(place)


def test_a_read_only_mount_cannot_be_written_meanwhile(machine: Machine) -> None:
    file, place = machine.volume("a"), machine.mount("a")
    run("mount", "-o", "remount,ro", place)
    with machine.freezer().held([file], limit_s=LIMIT_S) as end:
        with pytest.raises(subprocess.CalledProcessError):
            run("mount", "-o", "remount,rw", place)
        end()


def test_a_read_only_device_is_left_alone(machine: Machine) -> None:
    file = machine.pool / "a.img"
    file.write_bytes(bytes(MIB))
    device = machine.loops.attach(file, machine.device("a"), label=LABEL.format("a"), read_only=True)
    machine.stack.callback(machine.detach, device)
    with machine.device("a").open("rb"), machine.freezer().held([file], limit_s=LIMIT_S) as end:
        end()


def test_a_mount_of_another_mount_namespace_is_frozen(machine: Machine) -> None:
    file = machine.volume("a")
    run("mkfs.ext4", "-q", machine.device("a"))
    place = machine.directory / "elsewhere"
    place.mkdir()
    script = f"mount {machine.device('a')} {place} && echo mounted && read -r _"
    argv = ["unshare", "--mount", "--propagation", "private", "sh", "-c", script]
    with subprocess.Popen(argv, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as other:
        assert other.stdout is not None
        assert other.stdout.readline() == b"mounted\n"
        with machine.freezer().held([file], limit_s=LIMIT_S) as end:
            assert is_frozen(Path(f"/proc/{other.pid}/root{place}"))
            end()
        assert not is_frozen(Path(f"/proc/{other.pid}/root{place}"))
        other.communicate(b"\n")


def test_the_filesystem_that_holds_the_pool_is_never_frozen(machine: Machine) -> None:
    file, place = machine.volume("a"), machine.mount("a")
    refused = pytest.raises(NotFreezable, match="holds the pool itself")
    with refused, Freezer(place).held([file], limit_s=LIMIT_S):
        pass
    assert not is_frozen(place)


def test_a_record_of_an_earlier_boot_thaws_nothing(machine: Machine) -> None:
    file, place = machine.volume("a"), machine.mount("a")
    with holding(machine, file) as manager:
        guard = guard_of(manager.pid)
        os.kill(manager.pid, signal.SIGSTOP)
        os.kill(guard, signal.SIGKILL)
        manager.kill()
    (record,) = machine.records()
    head, _, states = record.read_bytes().partition(b"\n")
    boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip().encode()
    record.write_bytes(head.replace(boot, b"0" * len(boot)) + b"\n" + states)
    assert Deadline.after(30).wait_until(machine.freezer().recover)
    assert is_frozen(place)
    assert machine.records() == []


def test_a_damaged_record_keeps_no_manager_from_its_start(machine: Machine) -> None:
    (machine.pool / "frozen.1").write_bytes(bytes(64))
    (machine.pool / "frozen.2").touch()
    assert machine.freezer().recover()
    assert machine.records() == []


def test_a_kill_before_the_record_has_its_name_leaves_no_file(
    machine: Machine, monkeypatch: pytest.MonkeyPatch
) -> None:
    file, _ = machine.volume("a"), machine.mount("a")
    seen: list[list[Path]] = []

    def note(fd: int) -> None:
        seen.append(machine.records())

    monkeypatch.setattr("csi_driver.host.freeze.os.fsync", note)
    with machine.freezer().held([file], limit_s=LIMIT_S) as end:
        end()
    assert seen == [[]]


def test_the_descriptors_of_each_process_are_read_once_for_all_devices(
    machine: Machine, monkeypatch: pytest.MonkeyPatch
) -> None:
    files, read = [machine.volume(name) for name in "abc"], list[str]()

    def note(process: Path) -> set[DeviceNumber]:
        read.append(process.name)
        return opened_by(process)

    monkeypatch.setattr(freeze_module, "opened_by", note)
    with machine.freezer().held(files, limit_s=LIMIT_S) as end:
        end()
    assert read
    assert len(read) == len(set(read))


def test_a_device_that_cannot_be_looked_at_is_not_left_out(machine: Machine, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its writes would not be held: e.g. too many files are open."""
    file = machine.volume("a")

    def refuse(number: int, flags: int = 0) -> contextlib.AbstractContextManager[int]:
        raise SystemCallFailed(f"open loop device {number}", errno.EMFILE)

    with monkeypatch.context() as patch:
        patch.setattr(LoopDevices, "_opened", staticmethod(refuse))
        with pytest.raises(HostFailure, match="cannot be opened"), machine.freezer().held([file], limit_s=LIMIT_S):
            pass
