# SPDX-License-Identifier: Apache-2.0
"""`nvmesh-csi storage --drive` on real devices: when a drive becomes a pool, and when it is refused.

The argument that these tests prove, sentence by sentence, is docs/data-safety.md.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import re
import struct
import subprocess
import sys
import uuid
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from csi_driver.deadline import Deadline
from csi_driver.embedded.pool import Pool
from csi_driver.errors import DriverError, OperationPending, PreconditionFailed
from csi_driver.host import block_devices, drives, ioctls
from csi_driver.host.drives import NamedDrives
from csi_driver.host.filesystem import LinuxFilesystems
from csi_driver.host.mounts import LinuxMounts
from csi_driver.host.reflink import ReflinkedFiles
from csi_driver.local.pool_drive import LABEL, LEAST_BYTES, PoolDrive
from csi_driver.model import MIB
from csi_driver.node.usage_records import USED, UsageRecord, UsageRecords
from tests.contract.cut_off import can_cut_off, run_until_write
from tests.contract.host_machine import HostMachine, Volume, host_machine, shell
from tests.integration.real_node import clear, everything, write
from tests.integration.test_data_safety import END, SIGNATURES

pytestmark = pytest.mark.root


class Machine:
    """A machine with one drive, and its directory for the pool."""

    def __init__(self, host: HostMachine) -> None:
        self.host = host
        self.pool = host.directory / "pool"
        self.dev = host.device_root
        (self.dev / "disk/by-id").mkdir(parents=True)
        self.drive = self.connect("drive")

    def connect(self, name: str, size_bytes: int = LEAST_BYTES) -> Volume:
        volume = self.host.volume(name, size_bytes, status=False)
        self.by_id(name).symlink_to(volume.loop.node or "")
        return volume

    def by_id(self, name: str = "drive") -> Path:
        return self.dev / "disk/by-id" / name

    def named(self, name: str = "drive", path: Path | None = None) -> PoolDrive:
        return PoolDrive(path or self.by_id(name), self.pool, NamedDrives(self.dev))

    def unmount(self) -> None:
        """Unmount the pool. A mount namespace of another process may keep its filesystem for a moment."""
        shell("umount", str(self.pool))
        device = Path(str(self.drive.loop.node))
        assert Deadline.after(60).wait_until(lambda: not block_devices.is_claimed(device))

    def refuses(self, match: str, drive: PoolDrive | None = None) -> None:
        """The drive is refused, and nothing on it has changed."""
        before = everything(self.drive)
        with pytest.raises(PreconditionFailed, match=match):
            (drive or self.named()).mount()
        assert everything(self.drive) == before
        assert not os.path.ismount(self.pool)

    def records(self) -> UsageRecords:
        return UsageRecords(self.pool)

    def record(self) -> UsageRecord:
        (identity,) = self.records().recorded()
        found = self.records().read(identity)
        assert found is not None
        return found

    def begin(self, identity: str) -> None:
        self.pool.mkdir(exist_ok=True)
        self.records().write(UsageRecord(identity, 1, "xfs"))

    def use(self, identity: str) -> None:
        self.pool.mkdir(exist_ok=True)
        self.records().write(UsageRecord(identity, 1, USED))

    def assert_is_pool(self) -> str:
        """Mounted, able to hold a pool, and recorded; return its uuid."""
        pool = Pool(self.pool, reflinks=ReflinkedFiles())
        assert (pool.why_no_reflinks, pool.block_bytes()) == ("", 4096)
        pool.close()
        node = str(self.drive.loop.node)
        identity = shell("blkid", "-p", "-s", "UUID", "-o", "value", node).strip()
        assert shell("blkid", "-p", "-s", "LABEL", "-o", "value", node).strip() == LABEL
        self.unmount()
        assert self.record() == UsageRecord(identity, 1, USED)
        shell("xfs_repair", "-n", node)
        self.named().mount()
        return identity


def mkfs(identity: str, node: Path | None, *, label: str = LABEL) -> tuple[str, ...]:
    name = ("-L", label) if label else ()
    return ("mkfs.xfs", "-q", "-f", "-K", "-m", f"uuid={identity},reflink=1", *name, str(node))


@pytest.fixture
def machine(tmp_path: Path) -> Iterator[Machine]:
    with host_machine(tmp_path) as host:
        yield Machine(host)


def mounts_of(machine: Machine) -> list[str]:
    """Return the lines of mountinfo for the machine's directory."""
    lines = Path("/proc/self/mountinfo").read_text().splitlines()
    return [line for line in lines if str(machine.host.directory) in line]


def test_a_blank_drive_becomes_a_pool(machine: Machine) -> None:
    machine.named().mount()
    (machine.pool / "file").write_text("data")
    machine.assert_is_pool()
    machine.unmount()
    machine.named().mount()
    assert (machine.pool / "file").read_text() == "data"


def test_one_byte_anywhere_on_a_drive_stops_a_format(machine: Machine) -> None:
    for at in (0, 17 * MIB + 4097, 300 * MIB + 12345, LEAST_BYTES - 1):
        write(machine.drive, at, b"\1")
        machine.refuses("data at byte [0-9]+ that nothing recognises; expected a blank drive or a pool")
        write(machine.drive, at, b"\0")
    assert not machine.records().recorded()


@pytest.mark.parametrize("is_begun", [False, True])
def test_a_drive_with_other_content_is_refused_and_left_as_it_is(machine: Machine, is_begun: bool) -> None:
    if is_begun:
        machine.begin(str(uuid.uuid4()))
    for name, (offset, signature) in SIGNATURES.items():
        at = offset if offset <= END // 2 else LEAST_BYTES - (END - offset)
        write(machine.drive, at, signature)
        machine.refuses("drive .* holds .*; expected a blank drive or a pool .*if its data is worthless, run `wipefs")
        write(machine.drive, at, bytes(len(signature)))
        assert not everything(machine.drive), name
    for argv in (("mkfs.ext4", "-q", "-F"), ("mkfs.btrfs", "-q", "-f"), ("mkfs.xfs", "-q", "-f", "-L", "other")):
        shell(*argv, str(machine.drive.loop.node))
        machine.refuses(f"holds {argv[0].removeprefix('mkfs.')} with the uuid")
        clear(machine.drive)


def test_a_drive_in_use_is_refused(machine: Machine) -> None:
    node = Path(str(machine.drive.loop.node))
    claim = os.open(node, os.O_RDONLY | os.O_EXCL)
    try:
        machine.refuses("is in use by ")
    finally:
        os.close(claim)
    lock = os.open(node, os.O_RDONLY)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX)
        with pytest.raises(OperationPending, match="another program works on it"):
            machine.named().mount()
    finally:
        os.close(lock)
    shell("mkfs.ext4", "-q", str(node))
    elsewhere = machine.host.place("elsewhere")
    shell("mount", str(node), str(elsewhere))
    machine.refuses("holds ext4")


def test_a_pool_that_is_mounted_elsewhere_is_shared_with_the_kernel(machine: Machine) -> None:
    machine.named().mount()
    elsewhere = machine.host.place("elsewhere")
    shell("mount", str(machine.drive.loop.node), str(elsewhere))
    shell("umount", str(machine.pool))
    (elsewhere / "file").write_text("data")
    machine.named().mount()
    assert (machine.pool / "file").read_text() == "data"


def test_a_drive_that_cannot_be_a_pool_is_refused(machine: Machine) -> None:
    small = machine.connect("small", 400 * MIB)
    machine.refuses("has 419430400 bytes, expected at least", machine.named("small"))
    assert not everything(small)
    machine.refuses("expected a block device, got none", machine.named("absent"))
    machine.by_id("file").write_text("")
    machine.refuses("expected a block device, got none", machine.named("file"))
    shell("blockdev", "--setro", str(machine.drive.loop.node))
    machine.refuses("is read-only")


def test_an_unstable_name_of_a_drive_is_refused(machine: Machine) -> None:
    named = re.escape(str(machine.by_id()))
    for name in ("sda", "block/7:0", "disk/by-diskseq/1", "disk/by-id/../../sda"):
        path = machine.dev / name
        path.parent.mkdir(parents=True, exist_ok=True)
        if not path.is_symlink():
            path.symlink_to(machine.drive.loop.node or "")
        machine.refuses(f"a name that means the same drive after a reboot.*use {named}", machine.named(path=path))
    for name in ("mapper/pool", "md/pool", "disk/by-path/pci-1"):
        path = machine.dev / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.symlink_to(machine.drive.loop.node or "")
        machine.named(path=path).mount()
        machine.unmount()


def test_a_logical_volume_is_a_drive_by_its_own_name_alone(machine: Machine, monkeypatch: pytest.MonkeyPatch) -> None:
    """sysfs as a logical volume has it: "my-group-pool" with the dash of the group doubled (lvm(8), VALID NAMES)."""
    number = ioctls.device_number(Path(str(machine.drive.loop.node)).stat().st_rdev)
    text = machine.host.directory / f"sys/{number}/dm/name"
    text.parent.mkdir(parents=True)
    text.write_text("my--group-pool\n")
    monkeypatch.setattr(drives, "SYS_DEV_BLOCK", text.parents[2])
    for name in ("my-group/pool", "my-group/other", "other/pool", "dm-0"):
        path = machine.dev / name
        path.parent.mkdir(exist_ok=True)
        path.symlink_to(machine.drive.loop.node or "")
        if name != "my-group/pool":
            machine.refuses("a name that means the same drive", machine.named(path=path))
    machine.named(path=machine.dev / "my-group/pool").mount()


def test_no_drive_is_formatted_where_a_pool_was(machine: Machine) -> None:
    machine.named().mount()
    first = machine.assert_is_pool()
    machine.unmount()
    exchanged = machine.connect("exchanged")
    machine.refuses(f"holds nothing .*; expected the pool {first}", machine.named("exchanged"))
    shell(*mkfs(str(uuid.uuid4()), exchanged.loop.node))
    machine.refuses(f"holds xfs .*; expected the pool {first}.*name its drive", machine.named("exchanged"))
    clear(machine.drive)
    machine.refuses(f"holds nothing .*; expected the pool {first}")


def test_a_pool_moves_to_another_machine_with_its_drive(machine: Machine) -> None:
    machine.named().mount()
    (machine.pool / "file").write_text("data")
    machine.unmount()
    machine.records().remove(machine.record().volume_uuid)
    machine.named().mount()
    assert (machine.pool / "file").read_text() == "data"
    machine.assert_is_pool()


def test_a_filesystem_that_was_made_by_hand_is_the_pool(machine: Machine) -> None:
    """Also after a format that was begun and refused since."""
    machine.begin(str(uuid.uuid4()))
    by_hand = str(uuid.uuid4())
    shell(*mkfs(by_hand, machine.drive.loop.node))
    machine.named().mount()
    assert machine.assert_is_pool() == by_hand


# --- interrupted ---------------------------------------------------------------------------------------------------


class Killed(BaseException):
    """The manager ends here."""


def killed_before(call: Callable[..., object], count: list[int], at: int) -> Callable[..., object]:
    def counted(*args: object, **more: object) -> object:
        count[0] += 1
        if count[0] == at:
            raise Killed
        return call(*args, **more)

    return counted


def test_a_manager_killed_at_any_step_of_a_format_goes_on(machine: Machine) -> None:
    """Before each look at the directory, record, mkfs and mount."""
    steps = ((UsageRecords, "write"), (LinuxFilesystems, "make"), (LinuxMounts, "mount"), (os, "listdir"))
    at, reached = 0, True
    while reached:
        at, count = at + 1, [0]
        with pytest.MonkeyPatch.context() as patch:
            for owner, name in steps:
                patch.setattr(owner, name, killed_before(getattr(owner, name), count, at))
            try:
                machine.named().mount()
                reached = False
            except Killed:
                pass
        machine.named().mount()
        machine.assert_is_pool()
        machine.unmount()
        for identity in machine.records().recorded():
            machine.records().remove(identity)
        clear(machine.drive)
    assert at > 4


@pytest.mark.skipif(not can_cut_off(), reason="counts system calls of x86-64")
def test_a_format_of_a_drive_cut_off_at_any_write_is_made_again(machine: Machine) -> None:
    node, identity = machine.drive.loop.node, str(uuid.uuid4())
    writes = run_until_write(mkfs(identity, node), 0)
    for number in sorted({*range(1, 9), *range(9, writes, max(1, writes // 8)), writes}):
        clear(machine.drive)
        for each in machine.records().recorded():
            machine.records().remove(each)
        machine.begin(identity)
        run_until_write(mkfs(identity, node), number)
        machine.named().mount()
        machine.assert_is_pool()
        machine.unmount()


@pytest.mark.skipif(not can_cut_off(), reason="counts system calls of x86-64")
def test_a_half_made_filesystem_without_its_record_is_refused(machine: Machine) -> None:
    argv = mkfs(str(uuid.uuid4()), machine.drive.loop.node)
    run_until_write(argv, run_until_write(argv, 0) // 2)
    machine.refuses("no intact superblock|nothing recognises")
    machine.begin(str(uuid.uuid4()))
    machine.refuses("no intact superblock|nothing recognises")


def raid_member() -> bytes:
    """A superblock of md 1.0 (include/uapi/linux/raid/md_p.h, struct mdp_superblock_1), 8 KiB before the end."""
    head = struct.pack("<IIII16s32sQ", 0xA92B4EFC, 1, 0, 0, uuid.uuid4().bytes, b"pool", 0)
    return head.ljust(144, b"\0") + struct.pack("<Q", (LEAST_BYTES - 8192) // 512) + bytes(104)


def volume_of_lvm() -> bytes:
    """A label of LVM2 (lib/label/label.h) in the second sector; the checksum covers all behind it."""
    rest = struct.pack("<I8s32s", 32, b"LVM2 001", uuid.uuid4().hex.encode()).ljust(492, b"\0")
    checksum = ~zlib.crc32(rest, ~0xF597A6CF & 0xFFFFFFFF) & 0xFFFFFFFF
    return b"LABELONE" + struct.pack("<QI", 1, checksum) + rest


@pytest.mark.skipif(not can_cut_off(), reason="counts system calls of x86-64")
def test_content_that_came_after_an_unfinished_format_is_refused(machine: Machine) -> None:
    node, identity = machine.drive.loop.node, str(uuid.uuid4())
    writes = run_until_write(mkfs(identity, node), 0)
    machine.begin(identity)
    for at, data in ((LEAST_BYTES - 8192, raid_member()), (512, volume_of_lvm()), (0, b"precious".ljust(4096))):
        run_until_write(mkfs(identity, node), writes // 2)
        write(machine.drive, at, data)
        machine.refuses("holds (signatures of several|linux_raid_member|LVM2_member|data at byte 0)")
        clear(machine.drive)


# --- starts --------------------------------------------------------------------------------------------------------


def test_a_mounted_pool_is_left_as_it_is(machine: Machine) -> None:
    machine.named().mount()
    before = mounts_of(machine)
    assert len(before) == 1
    machine.named().mount()
    assert mounts_of(machine) == before


CONTAINER = """
import sys; from pathlib import Path
from csi_driver.host import block_devices, drives, ioctls
from csi_driver.host.drives import NamedDrives; from csi_driver.local.pool_drive import PoolDrive
pool = Path(sys.argv[2])
PoolDrive(Path(sys.argv[1]), pool, NamedDrives(Path(sys.argv[3]))).mount()
"""
WRITES = (
    CONTAINER
    + """
from csi_driver.host.connectors.loop import LoopDevices
(pool / "kept").write_bytes(b"kept" * 1024)
print(LoopDevices().attach(pool / "kept", None, label="", read_only=False).number)
"""
)
READS = (
    CONTAINER
    + """
assert (pool / "kept").read_bytes() == b"kept" * 1024
print((pool / "kept").stat().st_dev)
"""
)


def in_container(machine: Machine, program: str) -> int:
    """Run a program in a mount namespace of its own, which ends with it."""
    arguments = (str(machine.by_id()), str(machine.pool), str(machine.dev))
    return int(shell("unshare", "--mount", "--propagation", "private", sys.executable, "-c", program, *arguments))


def sectors_written(volume: Volume) -> int:
    return int(Path(f"/sys/block/loop{volume.loop.number}/stat").read_text().split()[6])


def test_a_restart_finds_the_filesystem_that_the_kernel_still_has(machine: Machine) -> None:
    """Data that is not on the drive yet is there: it is the same filesystem, and its journal is not replayed."""
    loop = in_container(machine, WRITES)
    try:
        assert not os.path.ismount(machine.pool)
        assert NamedDrives(machine.dev).is_in_use(machine.named().drives.named(machine.by_id()))
        first = in_container(machine, READS)
        shell("sync")
        before = sectors_written(machine.drive)
        assert in_container(machine, READS) == first
        assert sectors_written(machine.drive) == before
    finally:
        shell("losetup", "--detach", f"/dev/loop{loop}")


def test_without_its_drive_no_pool_opens(tmp_path: Path) -> None:
    argv = [sys.executable, "-m", "csi_driver", "storage", "--pool", str(tmp_path / "pool")]
    argv += ["--listen", "127.0.0.1:0", "--device-directory", str(tmp_path / "d"), "--status-directory", str(tmp_path)]
    done = subprocess.run([*argv, "--drive", "/dev/disk/by-id/absent"], capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert "drive /dev/disk/by-id/absent: expected a block device, got none" in done.stderr
    assert not (tmp_path / "pool").exists()


def test_a_directory_with_files_is_not_hidden_by_a_drive(machine: Machine) -> None:
    Pool(machine.pool).close()
    machine.refuses(r"has files \(lock, .*\), expected an empty directory.*leave out --drive if they are the pool")


# --- every state ---------------------------------------------------------------------------------------------------

MINE, OTHER = str(uuid.UUID(int=7)), str(uuid.UUID(int=8))
CONTENTS = ("blank", "mine", "other pool", "xfs", "ext4", "gpt", "md", "lvm", "byte", "half mine", "half other")
RECORDED = (None, "begun", "used")


def fill(machine: Machine, content: str) -> None:
    drive, node = machine.drive, machine.drive.loop.node
    clear(drive)
    match content:
        case "mine" | "other pool":
            shell(*mkfs(MINE if content == "mine" else OTHER, node))
        case "xfs":
            shell(*mkfs(MINE, node, label=""))
        case "ext4":
            shell("mkfs.ext4", "-q", "-F", "-U", MINE, "-L", LABEL, str(node))
        case "gpt" | "md" | "lvm":
            write(
                drive,
                *{"gpt": SIGNATURES["GPT"], "md": (LEAST_BYTES - 8192, raid_member()), "lvm": (512, volume_of_lvm())}[
                    content
                ],
            )
        case "byte":
            write(drive, 200 * MIB + 77, b"\1")
        case "half mine" | "half other":
            run_until_write(mkfs(MINE if content == "half mine" else OTHER, node), 12)


def expected(content: str, recorded: str | None) -> str:
    """The rules of docs/data-safety.md once more: the uuid that the pool has then, "any", or "" for a refusal."""
    if recorded == "used":
        return MINE if content == "mine" else ""
    if content == "blank":
        return "any"
    if content == "half mine":
        return MINE if recorded == "begun" else ""
    return {"mine": MINE, "other pool": OTHER}.get(content, "")


@pytest.mark.skipif(not can_cut_off(), reason="counts system calls of x86-64")
@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(st.tuples(st.sampled_from(CONTENTS), st.sampled_from(RECORDED)), min_size=1, max_size=3))
def test_a_drive_is_used_formatted_or_refused_by_its_content_and_record(
    machine: Machine, states: list[tuple[str, str | None]]
) -> None:
    for content, recorded in states:
        for each in machine.records().recorded():
            machine.records().remove(each)
        if recorded is not None:
            (machine.begin if recorded == "begun" else machine.use)(MINE)
        fill(machine, content)
        before = everything(machine.drive)
        right, found = expected(content, recorded), ""
        with contextlib.suppress(DriverError):
            machine.named().mount()
            found = (
                "any"
                if right == "any"
                else shell("blkid", "-p", "-s", "UUID", "-o", "value", str(machine.drive.loop.node)).strip()
            )
        assert found == right, (content, recorded)
        if not found:
            assert everything(machine.drive) == before
        else:
            machine.unmount()
            assert machine.record().filesystem == USED
            machine.named().mount()
            machine.unmount()
