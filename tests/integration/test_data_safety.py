# SPDX-License-Identifier: Apache-2.0
"""When a device is formatted, on real devices with real content, real errors and real half-made filesystems.

The argument that these tests prove, sentence by sentence, is docs/data-safety.md.
"""

from __future__ import annotations

import os
import shutil
import struct
import uuid
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from csi_driver.errors import DeadlineReached, DriverError, HostFailure, PreconditionFailed
from csi_driver.host.filesystem import LinuxFilesystems
from csi_driver.host_model import Blank, Content, Filesystem, OpenDevice, OtherContent
from csi_driver.model import GIB, MIB
from csi_driver.node.usage_records import USED, UsageRecord
from csi_driver.publish_context import History
from tests.contract.cut_off import can_cut_off, run_until_write
from tests.contract.host_machine import HostMachine, Volume, host_machine, shell, soon
from tests.integration.real_node import SIZES, RealNode, clear, everything, volumes_with_a_bad_block, write

pytestmark = pytest.mark.root

ALLOWED_OR_NOT = pytest.mark.parametrize("allowed", [False, True], ids=["not allowed", "allowed"])
SOUND = {"ext4": ("e2fsck", "-f", "-n"), "xfs": ("xfs_repair", "-n"), "btrfs": ("btrfs", "check")}


@pytest.fixture
def machine(tmp_path: Path) -> Iterator[HostMachine]:
    with host_machine(tmp_path) as made:
        yield made


@pytest.fixture
def node(machine: HostMachine) -> RealNode:
    return RealNode(machine)


def probed(machine: HostMachine, volume: Volume) -> Content:
    with machine.devices.open(machine.device(volume)) as opened:
        return machine.filesystems.probe(opened, deadline=soon())


# --- unreadable devices ----------------------------------------------------------------------------------------

PROBED = [0, 4 * MIB, 8 * MIB, 24 * MIB, 64 * MIB, 96 * MIB - 4096]
"""Head, LUKS2's last header, copies of ext superblocks (1 KiB blocks, groups 1 and 3), btrfs's, the tail."""
WITHIN = [13 * MIB, 47 * MIB + 8192]


def test_an_input_output_error_anywhere_formats_nothing(machine: HostMachine, node: RealNode) -> None:
    with volumes_with_a_bad_block(machine, [*PROBED, *WITHIN], 96 * MIB) as volumes:
        for offset, volume in volumes.items():
            # In the places of the quick look neither a first attachment nor a permission goes on; within, a full scan.
            tries = [(History.ATTACHED, False)]
            tries += [(History.FIRST, False), (History.ATTACHED, True)] if offset in PROBED else []
            for history, allowed in tries:
                with pytest.raises(HostFailure, match=r"cannot be read at byte [0-9]+ .EIO."):
                    node.stage(volume, history=history, attachment=1, allowed=allowed)
            assert node.record(volume) is None, offset
            assert shell("blkid", "-p", str(volume.file), accept=(0, 2)) == "", offset


@ALLOWED_OR_NOT
def test_a_device_that_lost_its_end_is_not_formatted(machine: HostMachine, node: RealNode, allowed: bool) -> None:
    """The file is cut off under the loop device, which answers reads behind the cut with an error or short."""
    volume = machine.volume()
    os.truncate(volume.file, 32 * MIB)
    with pytest.raises(HostFailure, match=r"cannot be read|ends at"):
        node.stage(volume, allowed=allowed)
    assert (node.record(volume), everything_in(volume.file)) == (None, b"")


def everything_in(file: Path) -> bytes:
    return file.read_bytes().strip(b"\0")


def test_a_device_without_size_is_awaited_and_not_formatted(machine: HostMachine, node: RealNode) -> None:
    volume = machine.volume(size_bytes=0)
    with pytest.raises(DeadlineReached, match="no size"):
        node.stage(volume, within_s=0.8)
    assert node.record(volume) is None


# --- other devices -------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Interrupting(LinuxFilesystems):
    """The real filesystems; `happens` runs after each probe."""

    happens: Callable[[], None]

    def probe(self, device: OpenDevice, **more: object) -> Content:
        content = super().probe(device, **more)  # type: ignore[arg-type]
        self.happens()
        return content


def interrupted(machine: HostMachine, happens: Callable[[], None]) -> RealNode:
    machine.filesystems = Interrupting(machine.devices, happens)
    return RealNode(machine)


def test_another_device_that_took_the_name_after_the_probe_is_not_formatted(machine: HostMachine) -> None:
    volume, other = machine.volume("csi-1"), machine.volume("csi-2")
    write(other, 40 * MIB, b"precious")

    def swap() -> None:
        os.replace(machine.device_root / "csi-2", machine.device_root / "csi-1")

    node = interrupted(machine, swap)
    with pytest.raises(PreconditionFailed, match="claims"):
        node.stage(volume)
    assert everything_in(other.file) == b"precious"
    assert everything_in(volume.file) == b""


def test_a_device_that_is_gone_after_the_probe_is_formatted_when_it_is_back(machine: HostMachine) -> None:
    volume = machine.volume("csi-1")
    node_path, away = machine.device_root / "csi-1", machine.directory / "away"
    taken: list[str] = []

    def take() -> None:
        if not taken:
            taken.append("once")
            node_path.rename(away)

    node = interrupted(machine, take)
    with pytest.raises(PreconditionFailed, match="is gone"):
        node.stage(volume)
    assert everything_in(volume.file) == b""
    away.rename(node_path)
    node.stage(volume)
    assert node.record(volume) == UsageRecord(volume.uuid, 1, USED)


@ALLOWED_OR_NOT
def test_another_volume_under_the_same_name_is_not_formatted(
    machine: HostMachine, node: RealNode, allowed: bool
) -> None:
    volume = machine.volume()
    asked = Volume(volume.name, str(uuid.uuid4()), volume.file, volume.loop)
    with pytest.raises(PreconditionFailed, match=f"claims {volume.uuid}, expected {asked.uuid}"):
        node.stage(asked, allowed=allowed)
    assert everything_in(volume.file) == b""


# --- existing content --------------------------------------------------------------------------------------


def gpt_header() -> bytes:
    return b"EFI PART" + struct.pack("<IIII", 0x00010000, 92, 0, 0) + bytes(68)


def mbr() -> bytes:
    entry = bytes((0, 0, 2, 0, 0x83, 0, 0, 0)) + (8).to_bytes(4, "little") + (64).to_bytes(4, "little")
    return bytes(446) + entry + bytes(48) + b"\x55\xaa"


END = 96 * MIB
SIGNATURES: dict[str, tuple[int, bytes]] = {
    # Place of the signature of each format; offsets of the formats' own documents.
    "MBR": (0, mbr()),
    "GPT": (4096, gpt_header()),
    "GPT, the copy alone": (END - 4096, gpt_header()),
    "LUKS1": (0, b"LUKS\xba\xbe\x00\x01"),
    "LUKS2": (0, b"LUKS\xba\xbe\x00\x02"),
    "LUKS2, the second header alone": (16384, b"SKUL\xba\xbe\x00\x02"),
    "LUKS2, the largest second header": (4 * MIB, b"SKUL\xba\xbe\x00\x02"),
    "LVM, in the second sector": (512, b"LABELONE" + b"\1" + bytes(15) + b"LVM2 001"),
    "LVM, in the fourth sector": (1536, b"LABELONE" + b"\1" + bytes(15) + b"LVM2 001"),
    "MD 1.0": (END - 8192, b"\xfc\x4e\x2b\xa9\x01"),
    "MD 1.1": (0, b"\xfc\x4e\x2b\xa9\x01"),
    "MD 1.2": (4096, b"\xfc\x4e\x2b\xa9\x01"),
    "MD 0.90": (END - 65536, b"\xfc\x4e\x2b\xa9"),
    "ZFS label": (128 * 1024, b"\x0c\xb1\xba\x00"),
    "ZFS, the last label alone": (END - 128 * 1024, b"\x0c\xb1\xba\x00"),
    "bcache": (4096 + 24, bytes.fromhex("c68573f64e1a45ca8265f57f48ba6d81")),
    "Ceph BlueStore": (0, b"bluestore block device\n"),
    "NTFS": (3, b"NTFS    "),
    "FAT": (54, b"FAT16   "),
    "ISO 9660": (32769, b"CD001"),
    "F2FS": (1024, b"\x10\x20\xf5\xf2"),
    "VMFS": (2 * MIB, b"\x5e\xf1\xab\x2f"),
    "XFS in a partition at 1 MiB": (MIB, b"XFSB"),
    "btrfs in a partition at 1 MiB": (MIB + 65536 + 64, b"_BHRfS_M"),
    "LVM, the second metadata alone": (END - MIB + 4, b" LVM2 x[5A%r0N*>"),
    "Promise RAID": (END - 3087 * 512, b"Promise Technology, Inc."),
    "one byte": (0, b"\x01"),
}


@pytest.mark.parametrize("history", [History.FIRST, History.ATTACHED, History.UNKNOWN])
def test_any_signature_at_its_place_is_refused_and_stays(
    machine: HostMachine, node: RealNode, history: History
) -> None:
    volume = machine.volume(size_bytes=END)
    for name, (offset, signature) in SIGNATURES.items():
        write(volume, offset, signature)
        before = everything(volume)
        with pytest.raises(PreconditionFailed, match=r"holds .*; expected ext4"):
            node.stage(volume, history=history)
        assert everything(volume) == before, name
        write(volume, offset, bytes(len(signature)))


FOREIGN: dict[str, tuple[str, ...]] = {
    "ext2": ("mkfs.ext2", "-q", "-F"),
    "ext3": ("mkfs.ext3", "-q", "-F"),
    "swap": ("mkswap",),
    "LUKS": ("cryptsetup", "luksFormat", "--batch-mode", "--pbkdf", "pbkdf2", "--pbkdf-force-iterations", "1000"),
}


@pytest.mark.parametrize("what", FOREIGN)
def test_content_of_other_tools_is_formatted_over_only_with_a_permission(
    machine: HostMachine, node: RealNode, what: str
) -> None:
    argv = FOREIGN[what]
    if shutil.which(argv[0]) is None:
        pytest.skip(f"needs {argv[0]}")
    volume = machine.volume(size_bytes=END)
    key = machine.directory / "key"
    key.write_text("a passphrase")
    shell(*argv, str(volume.loop.node), *([str(key)] if what == "LUKS" else []))
    before = everything(volume)
    for history in History:
        with pytest.raises(PreconditionFailed, match="holds "):
            node.stage(volume, history=history)
    assert everything(volume) == before
    node.stage(volume, history=History.ATTACHED, attachment=3, allowed=True)
    node.unstage(volume)
    assert signatures(volume) == ["ext4"]


def signatures(volume: Volume) -> list[str]:
    """Return every signature that wipefs(8) finds on the device."""
    return shell("wipefs", "--noheadings", "--output", "TYPE", str(volume.loop.node)).split()


@pytest.mark.parametrize("before", list(SIZES))
@pytest.mark.parametrize("after", list(SIZES))
def test_a_filesystem_formatted_over_leaves_no_second_signature(
    machine: HostMachine, node: RealNode, before: str, after: str
) -> None:
    volume = machine.volume(size_bytes=320 * MIB)
    argv = {"ext4": ("-q", "-F"), "xfs": ("-q", "-f"), "btrfs": ("-q", "-f")}[before]
    shell(f"mkfs.{before}", *argv, str(volume.loop.node))
    with pytest.raises(PreconditionFailed, match=f"holds {before}"):
        node.stage(volume, after)
    node.stage(volume, after, history=History.ATTACHED, attachment=3, allowed=True)
    assert set(signatures(volume)) == {after}
    assert probed(machine, volume) == Filesystem(after, volume.uuid)


def test_copies_that_mkfs_itself_would_leave_are_gone_after_a_format_over(machine: HostMachine, node: RealNode) -> None:
    volume = machine.volume(size_bytes=END)
    behind = {name: place for name, place in SIGNATURES.items() if place[0] >= 4 * MIB}
    for offset, signature in behind.values():
        write(volume, offset, signature)
    node.stage(volume, "ext4", history=History.ATTACHED, attachment=3, allowed=True)
    node.unstage(volume)
    found = everything(volume)
    kept = [name for name, (_, signature) in behind.items() if any(signature in piece for piece in found.values())]
    assert (len(behind) > 4, kept) == (True, [])


def test_one_sector_in_the_middle_stops_every_history_but_a_first(machine: HostMachine, node: RealNode) -> None:
    volume = machine.volume(size_bytes=GIB)
    write(volume, 777 * MIB + 4096, b"x")
    assert probed(machine, volume) == Blank()
    for history in (History.ATTACHED, History.WRITTEN, History.UNKNOWN):
        with pytest.raises(PreconditionFailed, match=f"the first at byte {777 * MIB + 4096}"):
            node.stage(volume, history=history)
    assert everything(volume) == {777 * MIB: (bytes(4096) + b"x").ljust(65536, b"\0")}


@pytest.mark.parametrize("fs_type", list(SIZES))
def test_a_zeroed_head_with_data_behind_is_refused(machine: HostMachine, node: RealNode, fs_type: str) -> None:
    """Also by the quick look: a copy of the superblock is among its places."""
    volume, _ = machine.formatted(fs_type, GIB)
    for at in range(0, 16 * MIB, MIB):
        write(volume, at, bytes(MIB))
    before = everything(volume)
    assert before
    for history in History:
        with pytest.raises(PreconditionFailed, match="nothing recognises"):
            node.stage(volume, fs_type, history=history)
    assert everything(volume) == before


# --- what our own mkfs left half made ---------------------------------------------------------------------------


def mkfs(fs_type: str, identity: str) -> tuple[str, ...]:
    return {
        "ext4": ("mkfs.ext4", "-q", "-F", "-m", "0", "-E", "nodiscard", "-U", identity),
        "xfs": ("mkfs.xfs", "-q", "-f", "-K", "-m", f"uuid={identity}"),
        "btrfs": ("mkfs.btrfs", "-q", "-f", "-K", "-U", identity),
    }[fs_type]


def cut_off_points(writes: int) -> list[int]:
    """Return where to cut: before anything, after the first superblock of xfs, in the middle, before the last write."""
    return [1, 4, writes // 2, writes]


@pytest.mark.skipif(not can_cut_off(), reason="counts system calls of x86-64")
@pytest.mark.parametrize("fs_type", list(SIZES))
def test_a_filesystem_cut_off_at_any_write_is_never_taken_for_a_whole_one(
    machine: HostMachine, node: RealNode, fs_type: str
) -> None:
    """On another node, or without the mark: refused, or whole, or every block of it is zero."""
    volume = machine.volume(size_bytes=SIZES[fs_type])
    argv = (*mkfs(fs_type, volume.uuid), str(volume.loop.node))
    writes = run_until_write(argv, 0)
    assert writes > 20
    for number in cut_off_points(writes):
        clear(volume)
        run_until_write(argv, number)
        before = everything(volume)
        try:
            node.stage(volume, fs_type, history=History.ATTACHED, attachment=3)
        except PreconditionFailed:
            assert everything(volume) == before, number
            continue
        node.unstage(volume)
        assert not before or probed(machine, volume) == Filesystem(fs_type, volume.uuid), number
        shell(*SOUND[fs_type], str(volume.loop.node))
        node.records.remove(volume.uuid)


@pytest.mark.skipif(not can_cut_off(), reason="counts system calls of x86-64")
@pytest.mark.parametrize("fs_type", list(SIZES))
def test_a_filesystem_cut_off_at_any_write_is_made_again_under_its_record(
    machine: HostMachine, node: RealNode, fs_type: str
) -> None:
    volume = machine.volume(size_bytes=SIZES[fs_type])
    argv = (*mkfs(fs_type, volume.uuid), str(volume.loop.node))
    for number in cut_off_points(run_until_write(argv, 0)):
        clear(volume)
        node.records.write(UsageRecord(volume.uuid, 3, fs_type))
        run_until_write(argv, number)
        node.stage(volume, fs_type, history=History.ATTACHED, attachment=3)
        node.unstage(volume)
        shell(*SOUND[fs_type], str(volume.loop.node))
        assert node.record(volume) == UsageRecord(volume.uuid, 3, USED), number


@pytest.mark.skipif(not can_cut_off(), reason="counts system calls of x86-64")
@pytest.mark.parametrize("fs_type", list(SIZES))
def test_an_interrupted_foreign_format_is_refused_under_another_attachment(
    machine: HostMachine, node: RealNode, fs_type: str
) -> None:
    volume = machine.volume(size_bytes=SIZES[fs_type])
    argv = (*mkfs(fs_type, str(uuid.uuid4())), str(volume.loop.node))
    run_until_write(argv, run_until_write(argv, 0) // 2)
    node.records.write(UsageRecord(volume.uuid, 1, fs_type))
    before = everything(volume)
    with pytest.raises(PreconditionFailed):
        node.stage(volume, fs_type, history=History.ATTACHED, attachment=3)
    assert everything(volume) == before


# --- own filesystems -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("fs_type", list(SIZES))
def test_old_data_of_another_volume_is_not_published(machine: HostMachine, node: RealNode, fs_type: str) -> None:
    volume = machine.volume(size_bytes=SIZES[fs_type])
    foreign = str(uuid.uuid4())
    shell(*mkfs(fs_type, foreign), str(volume.loop.node))
    before = everything(volume)
    for history in (History.FIRST, History.ATTACHED):
        with pytest.raises(PreconditionFailed, match=f"{fs_type} with the uuid {foreign}.*set its UUID"):
            node.stage(volume, fs_type, history=history)
    assert everything(volume) == before


ADOPT: dict[str, Callable[[str], tuple[str, ...]]] = {
    "ext4": lambda identity: ("tune2fs", "-U", identity),
    "xfs": lambda identity: ("xfs_admin", "-U", identity),
    "btrfs": lambda identity: ("btrfstune", "-f", "-U", identity),
}


@pytest.mark.parametrize("fs_type", list(SIZES))
def test_a_filesystem_is_adopted_by_giving_it_the_volumes_uuid(
    machine: HostMachine, node: RealNode, fs_type: str
) -> None:
    """The tools named in the refusal have the described effect."""
    volume = machine.volume(size_bytes=SIZES[fs_type])
    shell(*mkfs(fs_type, str(uuid.uuid4())), str(volume.loop.node))
    target = machine.place()
    shell("mount", str(volume.loop.node), str(target))
    (target / "a").write_text("precious")
    shell("umount", str(target))
    if fs_type == "ext4":  # tune2fs wants a check that is newer than the last mount
        shell("e2fsck", "-f", "-p", str(volume.loop.node))
    shell(*ADOPT[fs_type](volume.uuid), str(volume.loop.node))
    staged = node.stage(volume, fs_type, history=History.ATTACHED, attachment=3)
    assert (staged / "a").read_text() == "precious"


@pytest.mark.parametrize("fs_type", list(SIZES))
def test_a_used_device_that_reads_as_zeroes_is_not_formatted_under_its_attachment(
    machine: HostMachine, node: RealNode, fs_type: str
) -> None:
    volume = machine.volume(size_bytes=SIZES[fs_type])
    (node.stage(volume, fs_type) / "a").write_text("precious")
    node.unstage(volume)
    clear(volume)
    with pytest.raises(PreconditionFailed, match="is blank now"):
        node.stage(volume, fs_type)
    assert everything(volume) == {}


def test_nothing_is_formatted_while_somebody_has_it_mounted(machine: HostMachine, node: RealNode) -> None:
    volume, device = machine.formatted("ext4", SIZES["ext4"])
    target = machine.place()
    machine.mounts.mount(device, target, "ext4", [], read_only=False)
    (target / "a").write_text("precious")
    with pytest.raises(DriverError):
        node.stage(volume, "xfs", history=History.ATTACHED, attachment=3, allowed=True)
    assert (target / "a").read_text() == "precious"
    assert node.record(volume) is None


def test_what_is_blank_by_the_quick_look_is_so_after_old_data_was_wiped(machine: HostMachine) -> None:
    volume = machine.volume(size_bytes=END)
    for offset, signature in SIGNATURES.values():
        write(volume, offset, signature)
    assert isinstance(probed(machine, volume), OtherContent)
    with machine.devices.open(machine.device(volume), write=True, exclusive=True) as opened:
        machine.filesystems.wipe(opened)
    assert (probed(machine, volume), signatures(volume)) == (Blank(), [])
