# SPDX-License-Identifier: Apache-2.0
"""Recognising, making, checking and growing filesystems, on loop devices with real tools."""

from __future__ import annotations

import errno
import os
import shutil
import signal
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

from csi_driver.deadline import Deadline
from csi_driver.errors import (
    CommandFailed,
    CommandTimedOut,
    DeadlineReached,
    DriverError,
    HostFailure,
    InvalidField,
    PreconditionFailed,
    SystemCallFailed,
    ToolMissing,
)
from csi_driver.host import filesystem, ioctls, machine_checks, processes
from csi_driver.host.mounts import LinuxMounts
from csi_driver.host_model import Blank, Content, Device, Filesystem, OtherContent
from csi_driver.model import GIB, MIB
from tests.contract.host_machine import HostMachine, Volume, host_machine, shell, soon

pytestmark = pytest.mark.root

OWN_UUID = "0a6f1c1e-9d1b-4b7e-8f6b-3f1d2c5b7a90"
SIZES = {"ext4": 32 * MIB, "xfs": 320 * MIB, "btrfs": 128 * MIB}


@pytest.fixture
def machine(tmp_path: Path) -> Iterator[HostMachine]:
    with host_machine(tmp_path) as made:
        yield made


@pytest.fixture
def started(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Return the names of the programs that work on a filesystem from now on."""
    names: list[str] = []

    def run(argv: Sequence[str], **more: Any) -> processes.Completed:
        names.append(argv[0])
        return processes.run(argv, **more)

    monkeypatch.setattr(filesystem, "run", run)
    return names


def probed(machine: HostMachine, volume: Volume, own_uuid: str | None = None) -> Content:
    with machine.devices.open(machine.device(volume)) as opened:
        return machine.filesystems.probe(opened, deadline=soon(), own_uuid=own_uuid)


def write(volume: Volume, offset: int, data: bytes) -> None:
    fd = os.open(volume.loop.node or volume.file, os.O_RDWR | os.O_SYNC)
    try:
        os.pwrite(fd, data, offset)
    finally:
        os.close(fd)


def nothing(_done: int, _total: int) -> None:
    """Ignore progress."""


# --- blank or not -----------------------------------------------------------------------------------------------


def test_a_fresh_volume_is_blank(machine: HostMachine) -> None:
    assert probed(machine, machine.volume(size_bytes=GIB)) == Blank()


@pytest.mark.parametrize("size_bytes", [4096, 8192, 3 * MIB, 8 * MIB + 4096])
def test_a_volume_smaller_than_the_probed_places_is_read_completely(machine: HostMachine, size_bytes: int) -> None:
    volume = machine.volume(size_bytes=size_bytes)
    assert probed(machine, volume) == Blank()
    write(volume, size_bytes - 1, b"x")
    assert probed(machine, volume) == OtherContent(f"data at byte {size_bytes - 1} that nothing recognises")


@pytest.mark.parametrize("fs_type", list(SIZES))
def test_a_filesystem_is_named_with_its_uuid(machine: HostMachine, fs_type: str) -> None:
    volume, device = machine.formatted(fs_type, SIZES[fs_type])
    uuid = shell("blkid", "-p", "-s", "UUID", "-o", "value", str(device.path)).strip()
    assert probed(machine, volume) == Filesystem(fs_type, uuid, "")


@pytest.mark.parametrize("fs_type", list(SIZES))
def test_a_filesystem_is_ready_when_it_is_as_large_as_its_device(machine: HostMachine, fs_type: str) -> None:
    volume, _ = machine.formatted(fs_type, SIZES[fs_type])
    assert is_ready(machine, volume)
    machine.grow(volume, SIZES[fs_type] + 64 * MIB)
    assert not is_ready(machine, volume)


def test_an_ext4_that_was_not_closed_well_is_not_ready(machine: HostMachine) -> None:
    volume, _ = machine.formatted("ext4", SIZES["ext4"])
    broken(volume, badly=False)
    assert not is_ready(machine, volume)


@pytest.mark.parametrize("fs_type", list(SIZES))
def test_the_volumes_own_filesystem_is_known_without_a_program(
    machine: HostMachine, fs_type: str, started: list[str]
) -> None:
    volume, _ = machine.formatted(fs_type, SIZES[fs_type])
    started.clear()
    content = probed(machine, volume, own_uuid=volume.uuid)
    assert (content, isinstance(content, Filesystem) and content.is_ready) == (Filesystem(fs_type, volume.uuid), True)
    assert started == []


def ext3(volume: Volume) -> None:
    shell("mkfs.ext3", "-q", "-F", "-U", volume.uuid, str(volume.loop.node))


DOUBTS: dict[str, tuple[str, Callable[[Volume], object]]] = {
    "another uuid": ("ext4", lambda volume: shell("tune2fs", "-U", OWN_UUID, str(volume.loop.node))),
    "not closed well": ("ext4", lambda volume: broken(volume, badly=False)),
    "ext3": ("ext3", ext3),
    "a second superblock": ("", lambda volume: write(volume, 65536 + 64, b"_BHRfS_M")),
    "an LVM label": ("", lambda volume: write(volume, 512, b"LABELONE\0\0\0\0\0\0\0\0" + bytes(8) + b"LVM2 001")),
    "a boot sector": ("", lambda volume: write(volume, 510, b"\x55\xaa")),
    "no superblock": ("", lambda volume: write(volume, 1024, bytes(1024))),
}


@pytest.mark.parametrize("doubt", list(DOUBTS))
def test_what_is_not_surely_the_volumes_own_filesystem_is_looked_at_by_blkid(
    machine: HostMachine, doubt: str, started: list[str]
) -> None:
    volume, _ = machine.formatted("ext4", SIZES["ext4"])
    fs_type, raise_doubt = DOUBTS[doubt]
    raise_doubt(volume)
    started.clear()
    content = probed(machine, volume, own_uuid=volume.uuid)
    assert started == ["blkid"]
    assert content == probed(machine, volume)
    assert not fs_type or (isinstance(content, Filesystem) and content.fs_type == fs_type)


def test_a_superblock_that_differs_in_the_page_cache_is_looked_at_by_blkid(
    machine: HostMachine, started: list[str]
) -> None:
    """Another node mounted and unmounted the volume; a program kept this node's page cache."""
    volume, device = machine.formatted("ext4", SIZES["ext4"])
    held = os.open(device.path, os.O_RDONLY)
    os.pread(held, 8192, 0)
    with volume.file.open("r+b") as file:  # behind the loop device's back
        file.seek(1024 + 52)
        file.write(b"\x01")  # the count of mounts
        file.flush()
        os.fsync(file.fileno())
    started.clear()
    probed(machine, volume, own_uuid=volume.uuid)
    os.close(held)
    probed(machine, volume, own_uuid=volume.uuid)
    assert started == ["blkid"]  # the cache is gone with the last descriptor


def is_ready(machine: HostMachine, volume: Volume) -> bool:
    content = probed(machine, volume)
    return isinstance(content, Filesystem) and content.is_ready


@pytest.mark.parametrize("fs_type", list(SIZES))
def test_a_filesystem_without_head_is_not_blank(machine: HostMachine, fs_type: str) -> None:
    """A copy of the superblock is enough."""
    volume, _ = machine.formatted(fs_type, 2 * GIB)
    with volume.file.open("r+b") as file:
        file.write(bytes(8 * MIB))
        file.seek(-8 * MIB, os.SEEK_END)
        file.write(bytes(8 * MIB))
        file.flush()
        os.fsync(file.fileno())
    assert isinstance(probed(machine, volume), OtherContent)


@pytest.mark.parametrize("block_bytes", [1024, 2048, 4096])
def test_a_copy_of_an_ext4_superblock_is_found(machine: HostMachine, block_bytes: int) -> None:
    """Everything is wiped but the copies, as dumpe2fs lists them."""
    volume = machine.volume(size_bytes=GIB)
    shell("mkfs.ext4", "-q", "-F", "-b", str(block_bytes), str(volume.file))
    listing = shell("dumpe2fs", str(volume.file))
    blocks = [int(line.split(" at ")[1].split(",")[0]) for line in listing.splitlines() if "Backup superblock" in line]
    with volume.file.open("r+b", buffering=0) as file:
        copies = {block * block_bytes: os.pread(file.fileno(), 1024, block * block_bytes) for block in blocks}
        for offset, superblock in copies.items():
            file.truncate(0)
            file.truncate(GIB)
            os.pwrite(file.fileno(), superblock, offset)
            os.fsync(file.fileno())
            assert isinstance(probed(machine, volume), OtherContent), f"copy at byte {offset}"
    assert len(copies) >= 4


def test_a_partition_table_is_content(machine: HostMachine) -> None:
    volume = machine.volume()
    entry = bytes((0, 0, 2, 0, 0x83, 0, 0, 0)) + (8).to_bytes(4, "little") + (64).to_bytes(4, "little")
    write(volume, 446, entry.ljust(64, b"\0") + b"\x55\xaa")
    assert probed(machine, volume) == OtherContent("a partition table (dos)")


def test_the_copy_of_a_partition_table_is_content(machine: HostMachine) -> None:
    volume = machine.volume()
    write(volume, 64 * MIB - 4096, b"EFI PART")
    assert isinstance(probed(machine, volume), OtherContent)


def test_signatures_of_two_kinds_are_content(machine: HostMachine) -> None:
    """An ext4 does not use the first 1024 bytes, which here have the head of an xfs."""
    both, _ = machine.formatted("ext4", SIZES["xfs"])
    other, _ = machine.formatted("xfs", SIZES["xfs"], "csi-2")
    with other.file.open("rb") as file:
        write(both, 0, file.read(512))
    assert probed(machine, both) == OtherContent("signatures of several kinds of content")


def test_an_unreadable_device_is_never_blank(machine: HostMachine) -> None:
    """The backing file is truncated: the tail is unreadable."""
    volume = machine.volume()
    device = machine.device(volume)
    os.truncate(volume.file, 32 * MIB)
    with machine.devices.open(device) as opened, pytest.raises(HostFailure, match=r"cannot be read|ends at"):
        machine.filesystems.probe(opened, deadline=soon())


def test_a_probe_ends_with_its_deadline(machine: HostMachine) -> None:
    volume = machine.volume()
    with machine.devices.open(machine.device(volume)) as opened, pytest.raises(DeadlineReached):
        machine.filesystems.probe(opened, deadline=soon(0))


def test_the_probe_bypasses_the_page_cache(machine: HostMachine) -> None:
    """Another node wrote to the device; the page cache of this node is outdated."""
    volume, device = machine.formatted("ext4", SIZES["ext4"])
    held = os.open(device.path, os.O_RDONLY)  # keeps the cache alive
    os.pread(held, 1 * MIB, 0)
    with volume.file.open("r+b") as file:  # behind the loop device's back
        file.write(b"\0" * 8192)
        file.flush()
        os.fsync(file.fileno())
    content = probed(machine, volume)
    os.close(held)
    assert isinstance(content, OtherContent)


# --- every block ------------------------------------------------------------------------------------------------


def test_one_written_byte_in_the_middle_is_found(machine: HostMachine) -> None:
    volume = machine.volume(size_bytes=256 * MIB)
    write(volume, 131 * MIB + 513, b"x")
    assert probed(machine, volume) == Blank()
    with machine.devices.open(machine.device(volume)) as opened:
        assert machine.filesystems.first_data(opened, deadline=None, progress=nothing) == 131 * MIB + 513


def test_a_scan_of_a_blank_volume_reports_progress(machine: HostMachine) -> None:
    volume = machine.volume(size_bytes=3 * GIB)
    told: list[tuple[int, int]] = []
    with machine.devices.open(machine.device(volume)) as opened:
        found = machine.filesystems.first_data(opened, deadline=None, progress=lambda *step: told.append(step))
    assert found is None
    assert told == [(GIB, 3 * GIB), (2 * GIB, 3 * GIB), (3 * GIB, 3 * GIB)]


def test_a_scan_fails_at_an_unreadable_block(machine: HostMachine) -> None:
    volume = machine.volume()
    device = machine.device(volume)
    os.truncate(volume.file, 32 * MIB)
    with machine.devices.open(device) as opened, pytest.raises(HostFailure):
        machine.filesystems.first_data(opened, deadline=None, progress=nothing)


def test_a_scan_ends_with_its_deadline(machine: HostMachine) -> None:
    with machine.devices.open(machine.device(machine.volume())) as opened, pytest.raises(DeadlineReached):
        machine.filesystems.first_data(opened, deadline=soon(0), progress=nothing)


# --- making -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("fs_type", list(SIZES))
def test_a_filesystem_is_made_over_another(machine: HostMachine, fs_type: str) -> None:
    volume, device = machine.formatted("ext4", SIZES[fs_type])
    with machine.devices.open(device, write=True, exclusive=True) as opened:
        machine.filesystems.make(opened, fs_type, (), uuid=OWN_UUID)
    content = probed(machine, volume)
    assert isinstance(content, Filesystem)
    assert content.fs_type == fs_type


@pytest.mark.parametrize("fs_type", list(SIZES))
def test_a_new_filesystem_passes_fsck(machine: HostMachine, fs_type: str) -> None:
    _, device = machine.formatted(fs_type, SIZES[fs_type])
    checks = {"ext4": ("e2fsck", "-f", "-n"), "xfs": ("xfs_repair", "-n"), "btrfs": ("btrfs", "check")}
    shell(*checks[fs_type], str(device.path))


@pytest.mark.parametrize(("fs_type", "size_bytes"), [("ext4", MIB), ("xfs", 299 * MIB), ("btrfs", 64 * MIB)])
def test_a_volume_too_small_for_a_filesystem_is_refused(machine: HostMachine, fs_type: str, size_bytes: int) -> None:
    device = machine.device(machine.volume(size_bytes=size_bytes))
    with (
        machine.devices.open(device, write=True, exclusive=True) as opened,
        pytest.raises(PreconditionFailed, match="needs at least"),
    ):
        machine.filesystems.make(opened, fs_type, (), uuid=OWN_UUID)


@pytest.mark.parametrize(("fs_type", "size_bytes"), [("ext4", 2 * MIB), ("xfs", 300 * MIB), ("btrfs", 109 * MIB)])
def test_the_smallest_filesystem_can_be_made(machine: HostMachine, fs_type: str, size_bytes: int) -> None:
    machine.formatted(fs_type, size_bytes)


def test_a_filesystem_that_the_driver_cannot_make_is_refused(machine: HostMachine) -> None:
    device = machine.device(machine.volume())
    with machine.devices.open(device, write=True) as opened, pytest.raises(InvalidField, match="ntfs"):
        machine.filesystems.make(opened, "ntfs", (), uuid=OWN_UUID)


def test_ext4_is_the_first_supported_type(machine: HostMachine) -> None:
    installed = [fs_type for fs_type in SIZES if shutil.which(f"mkfs.{fs_type}", path=processes.SEARCH_PATH)]
    assert list(machine.filesystems.supported()) == installed


def test_a_filesystem_whose_programs_are_installed_later_is_supported(
    machine: HostMachine, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(filesystem, "_supported", set())
    monkeypatch.setattr(processes, "SEARCH_PATH", str(tmp_path))
    assert machine.filesystems.supported("ext4") == []
    for program in ("mkfs.ext4", "e2fsck", "resize2fs"):
        (tmp_path / program).symlink_to("/bin/true")
    assert machine.filesystems.supported("ext4") == ["ext4"]


def test_a_supported_filesystem_is_looked_up_once(machine: HostMachine, monkeypatch: pytest.MonkeyPatch) -> None:
    assert "ext4" in machine.filesystems.supported("ext4")
    monkeypatch.setattr(filesystem, "find_tool", lambda program: pytest.fail(f"{program} is looked up again"))
    assert list(machine.filesystems.supported("ext4")) == ["ext4"]


# --- checking ---------------------------------------------------------------------------------------------------


def broken(volume: Volume, *, badly: bool) -> None:
    """Damage an ext4: its free counts, or an inode table, which needs manual repair."""
    if not badly:
        shell("debugfs", "-w", "-R", "ssv free_blocks_count 1", str(volume.loop.node))
    else:
        shell("debugfs", "-w", "-R", "clri <2>", str(volume.loop.node))
    shell("debugfs", "-w", "-R", "ssv state 2", str(volume.loop.node))


def test_an_ext4_with_a_small_error_is_repaired(machine: HostMachine) -> None:
    volume, device = machine.formatted("ext4", SIZES["ext4"])
    broken(volume, badly=False)
    machine.filesystems.check(device, "ext4")
    shell("e2fsck", "-f", "-n", str(device.path))


def test_an_ext4_that_needs_manual_repair_is_refused_with_the_command(machine: HostMachine) -> None:
    volume, device = machine.formatted("ext4", SIZES["ext4"])
    broken(volume, badly=True)
    with pytest.raises(PreconditionFailed, match="e2fsck -f /"):
        machine.filesystems.check(device, "ext4")


@pytest.mark.parametrize("fs_type", list(SIZES))
def test_a_clean_filesystem_is_not_checked(machine: HostMachine, fs_type: str, monkeypatch: pytest.MonkeyPatch) -> None:
    _, device = machine.formatted(fs_type, SIZES[fs_type])
    monkeypatch.setattr("csi_driver.host.filesystem.run", lambda *_, **__: pytest.fail("a process was started"))
    machine.filesystems.check(device, fs_type)


def test_an_ext4_that_was_not_unmounted_is_checked(machine: HostMachine) -> None:
    """The check replays the journal."""
    volume, device = machine.formatted("ext4", SIZES["ext4"])
    target = machine.place()
    machine.mounts.mount(device, target, "ext4", [], read_only=False)
    (target / "file").write_text("data")
    os.sync()
    other = machine.volume("csi-2", SIZES["ext4"])
    shutil.copyfile(volume.file, other.file)
    copied = machine.device(other)
    machine.filesystems.check(copied, "ext4")
    assert "needs_recovery" not in shell("dumpe2fs", "-h", str(copied.path))


# --- growing ----------------------------------------------------------------------------------------------------


def total_bytes(path: Path) -> int:
    """Return the size of a filesystem as df does."""
    return int(shell("df", "--block-size=1", "--output=size", str(path)).splitlines()[-1])


@pytest.mark.parametrize("fs_type", ["xfs", "btrfs"])
def test_a_mounted_filesystem_grows_and_keeps_its_data(machine: HostMachine, fs_type: str) -> None:
    volume, device = machine.formatted(fs_type, SIZES[fs_type])
    target = machine.place()
    machine.mounts.mount(device, target, fs_type, [], read_only=False)
    (target / "file").write_text("data")
    before = total_bytes(target)
    grown = machine.grow(volume, SIZES[fs_type] + 256 * MIB)
    machine.filesystems.grow_mounted(target, grown, fs_type)
    assert total_bytes(target) - before >= 240 * MIB
    assert (target / "file").read_text() == "data"


@pytest.mark.parametrize("fs_type", ["xfs", "btrfs"])
def test_growing_a_mounted_filesystem_again_changes_nothing(machine: HostMachine, fs_type: str) -> None:
    _, device = machine.formatted(fs_type, SIZES[fs_type])
    target = machine.place()
    machine.mounts.mount(device, target, fs_type, [], read_only=False)
    before = total_bytes(target)
    machine.filesystems.grow_mounted(target, device, fs_type)
    assert total_bytes(target) == before


def test_a_mounted_ext4_grows_or_the_missing_capability_is_named(machine: HostMachine) -> None:
    volume, device = machine.formatted("ext4", SIZES["ext4"])
    target = machine.place()
    machine.mounts.mount(device, target, "ext4", [], read_only=False)
    before = total_bytes(target)
    grown = machine.grow(volume, 128 * MIB)
    if machine_checks.has_capability(machine_checks.CAP_SYS_RESOURCE):
        machine.filesystems.grow_mounted(target, grown, "ext4")
        assert total_bytes(target) > before
    else:
        with pytest.raises(PreconditionFailed, match="CAP_SYS_RESOURCE"):
            machine.filesystems.grow_mounted(target, grown, "ext4")


@pytest.mark.parametrize("fs_type", ["ext4", "xfs"])
def test_a_path_that_holds_another_device_is_not_grown(machine: HostMachine, fs_type: str) -> None:
    _, device = machine.formatted(fs_type, SIZES[fs_type])
    _, other = machine.formatted(fs_type, SIZES[fs_type], "csi-2")
    target = machine.place()
    machine.mounts.mount(other, target, fs_type, [], read_only=False)
    with pytest.raises(PreconditionFailed, match=f"holds device {other.number}, expected {device.number}"):
        machine.filesystems.grow_mounted(target, device, fs_type)


def test_an_unmounted_ext4_grows_and_keeps_its_data(machine: HostMachine) -> None:
    volume, device = machine.formatted("ext4", SIZES["ext4"])
    target = machine.place()
    machine.mounts.mount(device, target, "ext4", [], read_only=False)
    (target / "file").write_text("data")
    machine.mounts.unmount(target)
    shell("debugfs", "-w", "-R", "ssv lastcheck 20200101000000", str(device.path))  # resize2fs demands a full check
    grown = machine.grow(volume, 256 * MIB)
    assert machine.filesystems.grow_unmounted(grown, "ext4")
    assert machine.filesystems.recorded_bytes(grown, "ext4") == 256 * MIB
    machine.mounts.mount(grown, target, "ext4", [], read_only=False)
    assert (target / "file").read_text() == "data"


def test_growing_an_unmounted_ext4_again_changes_nothing(machine: HostMachine) -> None:
    _, device = machine.formatted("ext4", SIZES["ext4"])
    assert machine.filesystems.grow_unmounted(device, "ext4")
    assert machine.filesystems.recorded_bytes(device, "ext4") == SIZES["ext4"]


@pytest.mark.parametrize("fs_type", ["xfs", "btrfs"])
def test_xfs_and_btrfs_grow_only_while_mounted(machine: HostMachine, fs_type: str) -> None:
    _, device = machine.formatted(fs_type, SIZES[fs_type])
    assert not machine.filesystems.grow_unmounted(device, fs_type)


@pytest.mark.parametrize("fs_type", list(SIZES))
def test_the_superblock_records_the_size_of_the_volume(machine: HostMachine, fs_type: str) -> None:
    _, device = machine.formatted(fs_type, SIZES[fs_type])
    assert machine.filesystems.recorded_bytes(device, fs_type) == SIZES[fs_type]


# --- use --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("fs_type", list(SIZES))
def test_usage_equals_df(machine: HostMachine, fs_type: str) -> None:
    _, device = machine.formatted(fs_type, SIZES[fs_type])
    target = machine.place()
    machine.mounts.mount(device, target, fs_type, [], read_only=False)
    usage = machine.filesystems.usage(target)
    columns = "size,used,avail,itotal,iused,iavail"
    shown = [int(word) if word != "-" else 0 for word in
             shell("df", "--block-size=1", f"--output={columns}", str(target)).splitlines()[-1].split()]  # fmt: skip
    inodes = (usage.total_inodes, usage.used_inodes, usage.available_inodes)
    assert [usage.total_bytes, usage.used_bytes, usage.available_bytes] == shown[:3]
    assert [count or 0 for count in inodes] == shown[3:]
    assert (usage.total_inodes is None) == (fs_type == "btrfs")


# --- programs ---------------------------------------------------------------------------------------------------


def test_a_timeout_kills_the_process_group() -> None:
    with pytest.raises(CommandTimedOut):
        processes.run(("sh", "-c", f"sleep 600{os.getpid()} & sleep 600{os.getpid()}"), timeout_s=0.2)
    assert f"sleep 600{os.getpid()}" not in shell("ps", "-eo", "args")


def test_a_program_on_a_device_is_never_killed(caplog: pytest.LogCaptureFixture) -> None:
    """While the I/O of the device hangs, that would block every later open."""
    done = processes.run(("sh", "-c", "sleep 0.3; echo whole"), timeout_s=0.1, on_device=True)
    assert done.stdout == b"whole\n"
    assert "has not ended within 0.1 s; it works on a device and is not killed" in caplog.text


def test_an_unexpected_status_is_a_failure_with_the_output() -> None:
    with pytest.raises(CommandFailed, match="status 3: because") as caught:
        processes.run(("sh", "-c", "echo because >&2; exit 3"), timeout_s=60)
    assert caught.value.status == 3


def test_an_accepted_status_is_returned() -> None:
    assert processes.run(("sh", "-c", "printf out; exit 3"), timeout_s=60, accept=(0, 3)).stdout == b"out"


def test_a_missing_program_is_named_with_its_package(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(processes, "SEARCH_PATH", "/nowhere")
    monkeypatch.setattr(processes, "_places", {})
    with pytest.raises(ToolMissing, match=r"mkfs\.xfs is not installed; install the package xfsprogs"):
        processes.run(("mkfs.xfs",), timeout_s=60)


def test_a_program_that_is_installed_later_or_elsewhere_is_found(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    first, second = tmp_path / "first", tmp_path / "second"
    monkeypatch.setattr(processes, "SEARCH_PATH", f"{first}:{second}")
    for directory in (second, first):
        with pytest.raises(ToolMissing, match="later is not installed"):
            processes.run(("later",), timeout_s=60)
        directory.mkdir()
        (directory / "later").symlink_to("/bin/echo")
        assert processes.run(("later", directory.name), timeout_s=60).stdout.decode() == f"{directory.name}\n"
        (directory / "later").unlink()


def test_the_whole_of_a_long_output_is_returned() -> None:
    shown = processes.run(("seq", "100000"), timeout_s=60).stdout
    assert shown.endswith(b"\n100000\n")
    assert shown.count(b"\n") == 100000


def test_a_program_reads_nothing() -> None:
    assert processes.run(("cat",), timeout_s=60).stdout == b""


def test_a_program_does_not_inherit_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SECRET", "value")
    shown = processes.run(("env",), timeout_s=60).stdout.decode()
    assert "SECRET" not in shown
    assert "LC_ALL=C" in shown


def test_a_program_has_a_session_of_its_own_at_the_root() -> None:
    shown = processes.run(("sh", "-c", "pwd; echo $$; ps -o sid= -p $$"), timeout_s=60).stdout.split()
    assert (shown[0], shown[1]) == (b"/", shown[2])


def test_a_program_inherits_the_given_descriptors_alone(tmp_path: Path) -> None:
    with (tmp_path / "given").open("w") as given, (tmp_path / "own").open("w"), (tmp_path / "got").open("w") as got:
        os.set_inheritable(got.fileno(), True)  # as those are that this process got from the one that started it
        shown = processes.run(
            ("sh", "-c", "readlink /proc/$$/fd/*; true"), timeout_s=60, pass_fds=(given.fileno(),)
        ).stdout
    assert [line for line in shown.splitlines() if line.startswith(bytes(tmp_path))] == [bytes(tmp_path / "given")]


def test_a_program_gets_no_argument_with_a_null_byte() -> None:
    with pytest.raises(ValueError, match="null byte"):
        processes.run(("echo", "one\0two"), timeout_s=60)


def fail_for_too_many_files(_argument: object) -> int:
    raise OSError(errno.EMFILE, "too many")


def test_a_program_that_cannot_be_started_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "memfd_create", fail_for_too_many_files)
    with pytest.raises(SystemCallFailed, match="start echo: "):
        processes.run(("echo",), timeout_s=60)


def test_a_program_is_awaited_without_a_descriptor_for_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "pidfd_open", fail_for_too_many_files)
    assert processes.run(("sh", "-c", "sleep 0.1; echo whole"), timeout_s=60, on_device=True).stdout == b"whole\n"


def test_a_program_that_outlives_its_kill_leaves_no_zombie(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    killed: list[int] = []
    os.mkfifo(end := tmp_path / "end")
    monkeypatch.setattr(processes, "_kill_group", killed.append)
    monkeypatch.setattr(processes, "_GRACE_AFTER_KILL_S", 0)
    with pytest.raises(CommandTimedOut):
        processes.run(("cat", str(end)), timeout_s=0)
    end.write_text("")
    assert Deadline.after(60).wait_until(lambda: not os.path.exists(f"/proc/{killed[0]}"))


def test_a_program_is_ended_by_the_signals_that_python_ignores() -> None:
    ended = processes.run(("sh", "-c", "kill -s PIPE $$"), timeout_s=60, accept=(-signal.SIGPIPE,))
    assert ended.status == -signal.SIGPIPE


def test_missing_tools_and_path_roots_are_reported(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    assert machine_checks.MachineTools([tmp_path]).problems() == []
    monkeypatch.setattr(machine_checks, "find_tool", lambda tool: None if tool == "blkid" else "/usr/sbin/any")
    problems = machine_checks.MachineTools([tmp_path / "absent"]).problems()
    assert problems[0] == "blkid is not installed; install the package util-linux"
    assert "absent does not exist" in problems[1]


def test_a_hidden_sysfs_is_reported(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(machine_checks, "SYS_DEV_BLOCK", tmp_path / "absent")
    assert ["is not visible" in problem for problem in machine_checks.MachineTools([tmp_path]).problems()] == [True]


def test_failures_are_driver_errors(machine: HostMachine) -> None:
    gone = Device("csi-0", machine.device_root / "csi-0", machine.volume().loop.device_number, 4096, False, None)
    with pytest.raises(DriverError):
        machine.filesystems.recorded_bytes(gone, "ext4")


def test_mounts_that_do_not_reach_the_host_are_warned_of(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(LinuxMounts, "reaches_host", lambda _, path: path != tmp_path)
    warnings = machine_checks.MachineTools([Path("/"), tmp_path]).warnings()
    assert [f"mounts below {tmp_path} do" in each for each in warnings if "Bidirectional" in each] == [True]


# --- giving back free space -------------------------------------------------------------------------------------


def taken_bytes(volume: Volume) -> int:
    """Return what a volume's file takes on disk."""
    os.sync()
    return volume.file.stat().st_blocks * 512


@pytest.mark.parametrize("fs_type", list(SIZES))
@pytest.mark.parametrize("part_bytes", [GIB, 24 * MIB], ids=["at-once", "in-parts"])
def test_a_trim_returns_free_blocks_and_keeps_the_data(
    machine: HostMachine, fs_type: str, part_bytes: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(filesystem, "_TRIM_PART_BYTES", part_bytes)
    volume, device = machine.formatted(fs_type, SIZES[fs_type])
    target = machine.place()
    machine.mounts.mount(device, target, fs_type, [], read_only=False)
    kept = os.urandom(3 * MIB)
    (target / "kept").write_bytes(kept)
    (target / "removed").write_bytes(os.urandom(12 * MIB))
    os.sync()
    (target / "removed").unlink()
    # XFS frees the blocks of a removed file later, in the background; an unmount waits for that.
    machine.mounts.unmount(target)
    machine.mounts.mount(device, target, fs_type, [], read_only=False)
    before = taken_bytes(volume)
    assert machine.filesystems.trim(target, device, fs_type, deadline=soon()) >= 12 * MIB
    assert taken_bytes(volume) <= before - 11 * MIB
    machine.mounts.unmount(target)
    machine.mounts.mount(device, target, fs_type, [], read_only=False)
    assert (target / "kept").read_bytes() == kept


def test_a_filesystem_that_ends_before_its_device_is_trimmed_to_its_end(
    machine: HostMachine, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(filesystem, "_TRIM_PART_BYTES", 16 * MIB)
    volume, device = machine.formatted("ext4", SIZES["ext4"])
    target = machine.place()
    machine.mounts.mount(device, target, "ext4", [], read_only=False)
    grown = machine.grow(volume, 128 * MIB)
    assert 0 < machine.filesystems.trim(target, grown, "ext4", deadline=soon()) <= SIZES["ext4"]


@pytest.mark.parametrize("fs_type", ["ext4", "btrfs"])
def test_a_trim_is_of_the_whole_filesystem(machine: HostMachine, fs_type: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(filesystem, "_TRIM_PART_BYTES", 24 * MIB)
    _, device = machine.formatted(fs_type, SIZES[fs_type])
    target = machine.place()
    machine.mounts.mount(device, target, fs_type, [], read_only=False)
    parts: list[tuple[int, int]] = []

    def trim(fd: int, start: int, length: int) -> int:
        parts.append((start, length))
        return 0

    monkeypatch.setattr(ioctls, "trim", trim)
    machine.filesystems.trim(target, device, fs_type, deadline=soon())
    ends = [0, *(start + length for start, length in parts)]
    assert [start for start, _ in parts] == ends[:-1]
    assert ends[-1] == 2**64 - 1  # btrfs has addresses beyond the end of its device
    assert len(parts) == 1 or fs_type != "btrfs"  # each part would discard all space that has no address


def test_a_trim_ends_at_its_deadline(machine: HostMachine) -> None:
    _, device = machine.formatted("ext4", SIZES["ext4"])
    target = machine.place()
    machine.mounts.mount(device, target, "ext4", [], read_only=False)
    with pytest.raises(DeadlineReached, match="the trim of"):
        machine.filesystems.trim(target, device, "ext4", deadline=Deadline.after(0))


def test_a_path_that_holds_another_device_is_not_trimmed(machine: HostMachine) -> None:
    _, device = machine.formatted("ext4", SIZES["ext4"])
    _, other = machine.formatted("ext4", SIZES["ext4"], "csi-2")
    target = machine.place()
    machine.mounts.mount(other, target, "ext4", [], read_only=False)
    with pytest.raises(PreconditionFailed, match="holds device"):
        machine.filesystems.trim(target, device, "ext4", deadline=soon())
