# SPDX-License-Identifier: Apache-2.0
"""Copies of volumes by reflink, as the embedded storage manager makes them, on a node that may have the source too.

The argument that these tests prove is in docs/data-safety.md, sentence 56 on.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import threading
import uuid
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import pytest

from csi_driver.errors import PreconditionFailed, SystemCallFailed
from csi_driver.host import zero_scan
from csi_driver.host.block_devices import sys_number
from csi_driver.host_model import Filesystem, OpenDevice
from csi_driver.model import AccessMode
from csi_driver.publish_context import History
from tests.contract.host_machine import HostMachine, Volume, host_machine, shell
from tests.integration.real_node import SIZES, RealNode, everything, write
from tests.integration.test_data_safety import SOUND, probed
from tests.reflink_pool import mounted

pytestmark = pytest.mark.root

FILESYSTEMS = pytest.mark.parametrize("fs_type", list(SIZES))
_FICLONE = 0x40049409  # include/uapi/linux/fs.h
NO_REPLAY = {"ext4": "noload", "xfs": "norecovery,nouuid", "btrfs": "rescue=nologreplay"}
DATA = b"precious" * 1000


@pytest.fixture
def machine(tmp_path: Path) -> Iterator[HostMachine]:
    """A machine whose volumes lie on a filesystem with reflinks."""
    with mounted(tmp_path, size_mib=3072) as pool:
        (pool / "machine").mkdir()
        with host_machine(pool / "machine") as found:
            yield found


@dataclass
class Copies:
    """A node, its volumes, and copies of them."""

    machine: HostMachine
    node: RealNode

    def source(self, fs_type: str, size_bytes: int = 0) -> Volume:
        return self.machine.volume("csi-source", size_bytes or SIZES[fs_type])

    def used_source(self, fs_type: str, volume_context: dict[str, str] | None = None) -> Volume:
        """Return a volume that is mounted, with one file that was synchronized, by its log alone."""
        source = self.source(fs_type)
        staged = self.node.stage(source, fs_type, volume_context=volume_context)
        os.sync()
        write_file(staged / "data", DATA)
        return source

    def cut(self, source: Volume, name: str = "csi-copy", size_bytes: int = 0, identity: str = "") -> Volume:
        """Attach a copy of the source as it is at this moment."""
        file = self.machine.directory / f"{name}.{len(list(self.machine.directory.iterdir()))}.img"
        reflink(source.file, file)
        return self.attach(file, name, size_bytes, identity)

    def attach(self, file: Path, name: str, size_bytes: int = 0, identity: str = "") -> Volume:
        if size_bytes:
            os.truncate(file, size_bytes)
        identity = identity or str(uuid.uuid4())
        loop = self.machine.loops.attach(
            file, self.machine.device_root / name, label=f"{identity}/test", read_only=False
        )
        self.machine.write_status(name, identity, file.stat().st_size)
        return Volume(name, identity, file, loop)

    def detach(self, volume: Volume) -> None:
        self.machine.loops.detach(volume.loop)

    def stage(self, copy: Volume, source: Volume, fs_type: str, *, private: bool = False) -> Path:
        """Stage a copy as the controller's context of it asks."""
        mode = AccessMode.MULTI_NODE_READER_ONLY if private else AccessMode.SINGLE_NODE_WRITER
        return self.node.stage(
            copy, fs_type, history=History.ATTACHED, attachment=1, inherited=(source.uuid,), private=private, mode=mode
        )

    def fs_uuid(self, volume: Volume) -> str:
        content = probed(self.machine, volume)
        assert isinstance(content, Filesystem)
        return content.uuid

    def without_log(self, volume: Volume, fs_type: str) -> list[str]:
        """Return the names of the files that a mount shows which does not replay the log."""
        place = self.machine.place(f"{volume.name}.without-log")
        shell("mount", "-t", fs_type, "-o", f"ro,{NO_REPLAY[fs_type]}", str(volume.loop.node), str(place))
        names = sorted(path.name for path in place.iterdir())
        shell("umount", str(place))
        return names


@pytest.fixture
def copies(machine: HostMachine) -> Copies:
    return Copies(machine, RealNode(machine))


def reflink(source: Path, target: Path) -> None:
    with source.open("rb") as old, target.open("xb") as new:
        fcntl.ioctl(new.fileno(), _FICLONE, old.fileno())


def write_file(path: Path, data: bytes) -> None:
    """Write a file, and see it and its name on disk."""
    fd = os.open(path, os.O_RDWR | os.O_CREAT, 0o600)
    try:
        os.write(fd, data)
        os.fsync(fd)
    finally:
        os.close(fd)


@FILESYSTEMS
def test_source_and_copy_are_used_on_one_node_at_the_same_time(copies: Copies, fs_type: str) -> None:
    source = copies.used_source(fs_type)
    at_source = copies.node.staging(source)
    copy = copies.cut(source)
    write_file(at_source / "later", b"of the source")
    at_copy = copies.stage(copy, source, fs_type)
    second = copies.cut(source, "csi-second")
    at_second = copies.stage(second, source, fs_type)
    assert (at_copy / "data").read_bytes() == (at_second / "data").read_bytes() == DATA
    assert [(place / "later").exists() for place in (at_source, at_copy, at_second)] == [True, False, True]
    for place in (at_source, at_copy, at_second):
        write_file(place / "own", place.name.encode() * 1000)
    copies.stage(copy, source, fs_type)  # again, as it is
    for volume in (copy, source, second):
        copies.node.unstage(volume)
        shell(*SOUND[fs_type], str(volume.loop.node))
    for volume in (source, second, copy):
        staged = copies.node.stage(volume, fs_type, history=History.ATTACHED, inherited=(source.uuid,))
        assert (staged / "own").read_bytes() == staged.name.encode() * 1000
        assert (staged / "data").read_bytes() == DATA
    is_changed = fs_type == "btrfs"
    assert copies.fs_uuid(copy) == (copy.uuid if is_changed else source.uuid)


@FILESYSTEMS
def test_a_copy_is_used_while_its_source_is_not_mounted_and_then_both(copies: Copies, fs_type: str) -> None:
    source = copies.used_source(fs_type)
    copy = copies.cut(source)
    copies.node.unstage(source)
    at_copy = copies.stage(copy, source, fs_type)
    at_source = copies.node.stage(source, fs_type)
    assert (at_copy / "data").read_bytes() == (at_source / "data").read_bytes() == DATA


@FILESYSTEMS
def test_a_copy_of_a_copy_is_used_beside_both(copies: Copies, fs_type: str) -> None:
    source = copies.used_source(fs_type)
    copy = copies.cut(source)
    at_copy = copies.stage(copy, source, fs_type)
    write_file(at_copy / "more", b"of the copy")
    second = copies.cut(copy, "csi-second")
    inherited = (source.uuid, copy.uuid)
    at_second = copies.node.stage(second, fs_type, history=History.ATTACHED, inherited=inherited)
    assert ((at_second / "data").read_bytes(), (at_second / "more").read_bytes()) == (DATA, b"of the copy")
    copies.node.unstage(second)
    shell(*SOUND[fs_type], str(second.loop.node))


@FILESYSTEMS
def test_a_private_copy_is_mounted_read_only_with_its_log_replayed(copies: Copies, fs_type: str) -> None:
    source = copies.used_source(fs_type)
    other, copy = copies.cut(source, "csi-other"), copies.cut(source)
    copies.node.unstage(source)
    assert "data" not in copies.without_log(other, fs_type)
    copies.detach(other)
    copies.node.stage(source, fs_type)
    for _ in range(2):
        staged = copies.stage(copy, source, fs_type, private=True)
        assert (staged / "data").read_bytes() == DATA
        with pytest.raises(OSError, match="Read-only file system"):
            (staged / "new").touch()
    assert copies.machine.device(copy).read_only is False
    assert sys_number(copy.loop.device_number, "ro") == 0
    published = copies.node.publish(copy, fs_type=fs_type, mode=AccessMode.MULTI_NODE_READER_ONLY, read_only=True)
    assert (published / "data").read_bytes() == DATA
    copies.node.unpublish(copy)
    copies.node.unstage(copy)
    shell(*SOUND[fs_type], str(copy.loop.node))


@FILESYSTEMS
def test_a_private_copy_that_is_made_again_is_mounted_also_on_another_device(copies: Copies, fs_type: str) -> None:
    """The kernel remembers the former one, as udev shows it, with a higher generation after its log was replayed."""
    source = copies.used_source(fs_type)
    first = copies.cut(source)
    copies.stage(first, source, fs_type, private=True)
    copies.node.unstage(first)
    if fs_type == "btrfs":
        shell("btrfs", "device", "scan", str(first.loop.node))
    kept = copies.cut(source, "csi-kept")
    copies.detach(first)
    copies.cut(kept, "csi-takes-its-number")
    again = copies.cut(kept, "csi-copy", identity=first.uuid)
    assert again.loop.device_number != first.loop.device_number
    assert (copies.stage(again, source, fs_type, private=True) / "data").read_bytes() == DATA


@FILESYSTEMS
def test_a_larger_copy_has_its_size_when_it_is_staged(copies: Copies, fs_type: str) -> None:
    source = copies.used_source(fs_type)
    copy = copies.cut(source, size_bytes=2 * SIZES[fs_type])
    staged = copies.stage(copy, source, fs_type)
    shown = os.statvfs(staged)
    assert shown.f_blocks * shown.f_frsize > 1.5 * SIZES[fs_type]
    assert (staged / "data").read_bytes() == DATA


@FILESYSTEMS
def test_a_filesystem_that_a_backup_program_wrote_to_a_raw_volume_is_used_by_its_copy(
    copies: Copies, fs_type: str
) -> None:
    """Beside the volume that was backed up, whose uuid it has."""
    source = copies.used_source(fs_type)
    copies.node.unstage(source)
    raw = copies.machine.volume("csi-raw", SIZES[fs_type])
    shell("dd", f"if={source.loop.node}", f"of={raw.loop.node}", "bs=1M", "conv=fsync")
    copies.node.stage(source, fs_type)
    copy = copies.cut(raw)
    staged = copies.node.stage(copy, fs_type, history=History.WRITTEN, inherited=(raw.uuid,))
    assert (staged / "data").read_bytes() == DATA
    with pytest.raises(PreconditionFailed, match="UUID mismatch"):
        copies.node.stage(copies.cut(raw, "csi-third"), fs_type, history=History.ATTACHED, inherited=(raw.uuid,))


# --- an unfinished mkfs --------------------------------------------------------------------------------------------


def cuts_of(copies: Copies, source: Volume, fs_type: str) -> Sequence[Path]:
    """Make the filesystem, and copies all the time; return six, spread over it."""
    device = copies.machine.device(source)
    found: list[Path] = []

    def make() -> None:
        with copies.machine.devices.open(device, write=True, exclusive=True) as opened:
            copies.machine.filesystems.make(opened, fs_type, (), uuid=source.uuid)

    maker = threading.Thread(target=make)
    maker.start()
    while maker.is_alive():
        found.append(copies.machine.directory / f"cut-{len(found)}.img")
        reflink(source.file, found[-1])
    maker.join()
    kept = {found[len(found) * part // 6] for part in range(6)}
    for file in set(found) - kept:
        file.unlink()
    return sorted(kept)


@FILESYSTEMS
def test_a_cut_in_the_middle_of_mkfs_is_never_taken_for_a_whole_filesystem(copies: Copies, fs_type: str) -> None:
    source = copies.source(fs_type)
    cuts = cuts_of(copies, source, fs_type)
    assert cuts
    for number, file in enumerate(cuts):
        copy = copies.attach(file, f"csi-{number}")
        before = everything(copy)
        try:
            copies.stage(copy, source, fs_type)
        except PreconditionFailed:
            assert everything(copy) == before
        else:
            copies.node.unstage(copy)
            assert not before or isinstance(probed(copies.machine, copy), Filesystem)
            shell(*SOUND[fs_type], str(copy.loop.node))
        copies.detach(copy)


# --- the uuid of btrfs ----------------------------------------------------------------------------------------------


class Cut(Exception):
    """The driver ends here."""


@contextlib.contextmanager
def ending_before_write(number: int, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    write, left = zero_scan.write_through, [number]

    def counted(device: OpenDevice, offset: int, data: bytes) -> None:
        left[0] -= 1
        if not left[0]:
            raise Cut
        write(device, offset, data)

    with monkeypatch.context() as patch:
        patch.setattr(zero_scan, "write_through", counted)
        yield


def uuids(volume: Volume) -> list[str]:
    """Return the uuid in each copy of the superblock."""
    shown = shell("btrfs", "inspect-internal", "dump-super", "--all", str(volume.loop.node))
    return [line.split()[1] for line in shown.splitlines() if line.startswith("fsid")]


@pytest.mark.parametrize("number", [1, 2, 3])
def test_a_change_of_uuid_cut_off_at_any_write_is_finished_by_the_next(
    copies: Copies, number: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = copies.used_source("btrfs")
    copy = copies.cut(source)
    with ending_before_write(number, monkeypatch), contextlib.suppress(Cut):
        copies.stage(copy, source, "btrfs")
        copies.node.unstage(copy)
    changed = [copy.uuid if at >= 3 - number else source.uuid for at in range(2)]
    assert uuids(copy) == changed
    copies.node.unstage(source)
    state = copies.cut(copy, "csi-state")
    place = copies.machine.place()
    shell("mount", str(state.loop.node), str(place))
    assert (place / "data").read_bytes() == DATA
    shell("umount", str(place))
    copies.detach(state)
    copies.node.stage(source, "btrfs")
    assert (copies.stage(copy, source, "btrfs") / "data").read_bytes() == DATA
    copies.node.unstage(copy)
    assert uuids(copy) == [copy.uuid] * 2
    shell(*SOUND["btrfs"], str(copy.loop.node))


def test_the_uuid_of_a_btrfs_in_use_is_not_changed(copies: Copies) -> None:
    """Another program may mount it between the decision and the write."""
    source = copies.used_source("btrfs")
    with (
        pytest.raises(SystemCallFailed, match="EBUSY"),
        copies.machine.devices.open(copies.machine.device(source), write=True) as opened,
    ):
        copies.machine.filesystems.change_btrfs_uuid(opened, str(uuid.uuid4()))
    assert uuids(source) == [source.uuid] * 2


@pytest.mark.parametrize("checksum", ["crc32c", "xxhash", "sha256", "blake2"])
def test_what_was_synchronized_is_there_after_the_uuid_was_changed(copies: Copies, checksum: str) -> None:
    """With each kind of checksum, after a crash of the source: its log is replayed."""
    source = copies.used_source("btrfs", {"mkfsOptions": f"--csum {checksum}"})
    copy = copies.cut(source)
    shown = shell("btrfs", "inspect-internal", "dump-super", str(copy.loop.node))
    fields = dict(line.split(maxsplit=1) for line in shown.splitlines() if len(line.split()) > 1)
    assert (fields["log_root"] != "0", checksum in fields["csum_type"]) == (True, True)
    assert (copies.stage(copy, source, "btrfs") / "data").read_bytes() == DATA
    copies.node.unstage(copy)
    assert uuids(copy) == [copy.uuid] * 2
    shell(*SOUND["btrfs"], str(copy.loop.node))


@pytest.mark.parametrize("place", [64 << 10, 64 << 20], ids=["of another place", "of an earlier filesystem"])
def test_what_is_no_copy_of_the_superblock_is_left_as_it_is(copies: Copies, place: int) -> None:
    source, second_at = copies.used_source("btrfs"), 64 << 20
    earlier, _ = copies.machine.formatted("btrfs", SIZES["btrfs"], "csi-earlier")
    copy = copies.cut(source)
    with (copy if place < second_at else earlier).file.open("rb") as file:
        other = os.pread(file.fileno(), 4096, place)
    write(copy, second_at, other)
    with copies.machine.devices.open(copies.machine.device(copy), write=True) as opened:
        copies.machine.filesystems.change_btrfs_uuid(opened, copy.uuid)
    assert copies.fs_uuid(copy) == copy.uuid
    with copy.file.open("rb") as file:
        assert os.pread(file.fileno(), 4096, second_at) == other
    assert (copies.stage(copy, source, "btrfs") / "data").read_bytes() == DATA


def test_a_superblock_that_cannot_be_changed_is_left_as_it_is(copies: Copies) -> None:
    source = copies.source("btrfs")
    second = copies.machine.volume("csi-second", SIZES["btrfs"])
    shell("mkfs.btrfs", "-q", "-f", "-U", source.uuid, str(source.loop.node), str(second.loop.node))
    seeding, _ = copies.machine.formatted("btrfs", SIZES["btrfs"], "csi-seeding")
    shell("btrfstune", "-f", "-S", "1", str(seeding.loop.node))
    sound, _ = copies.machine.formatted("btrfs", SIZES["btrfs"], "csi-sound")
    for number, volume in enumerate((source, seeding, sound)):
        copy = copies.cut(volume, f"csi-copy-{number}")
        if volume is sound:
            write(copy, 65536 + 72, b"damage")
        before = everything(copy)
        with pytest.raises(PreconditionFailed, match=r"cannot get a uuid of its own|nothing recognises"):
            copies.stage(copy, volume, "btrfs")
        assert everything(copy) == before
