# SPDX-License-Identifier: Apache-2.0
"""Zeros given back from files on real filesystems: no byte changes, whoever opens the file and whenever it ends."""

from __future__ import annotations

import fcntl
import os
import random
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest

from csi_driver.deadline import Deadline
from csi_driver.embedded.pool import Pool
from csi_driver.errors import PreconditionFailed, SystemCallFailed
from csi_driver.host import sparse_files
from csi_driver.host.reflink import ReflinkedFiles
from csi_driver.host.sparse_files import SparseFiles
from tests.reflink_pool import BTRFS, EXT4, MIB, XFS, mounted

pytestmark = pytest.mark.root

FILES = SparseFiles()
IDENTITY = "11111111-1111-1111-1111-111111111111"
SIZE = 24 * MIB


@pytest.fixture
def place(tmp_path: Path) -> Iterator[Path]:
    with mounted(tmp_path) as made:
        yield made


def written(directory: Path, content: bytes) -> Path:
    file = directory / "volume.img"
    file.write_bytes(content)
    fd = os.open(file, os.O_RDWR)
    os.fsync(fd)
    os.close(fd)
    return file


def random_content(seed: int) -> bytes:
    """Return data, zeros, and zeros with a single byte among them, in pieces of any length of 4 KiB."""
    source = random.Random(seed)
    content = bytearray()
    while len(content) < SIZE:
        length = source.choice([1, 3, 200, 256, 257, 700, 2048]) * 4096
        kind = source.randrange(3)
        piece = bytearray(source.randbytes(length) if kind == 0 else bytes(length))
        if kind == 1:
            piece[source.randrange(length)] = 1
        content += piece
    return bytes(content[:SIZE])


def taken(file: Path) -> int:
    return file.stat().st_blocks * 512


def give_back(file: Path, most_bytes: int = 1 << 40) -> int:
    """Give back everything; return the number of steps."""
    offset: int | None = 0
    steps = 0
    while offset is not None:
        offset = FILES.give_back_zeros(file, offset, most_bytes)
        steps += 1
        assert steps < 1000
    return steps


@pytest.mark.parametrize("make", [XFS, EXT4, BTRFS], ids=["xfs", "ext4", "btrfs"])
def test_zeros_are_given_back_and_no_byte_changes(tmp_path: Path, make: Sequence[str]) -> None:
    with mounted(tmp_path, make) as place:
        assert FILES.why_not(place) == ""
        for seed in range(3):
            content = random_content(seed)
            file = written(place, content)
            assert give_back(file) == 1
            assert file.read_bytes() == content
        file = written(place, b"x" * MIB + bytes(30 * MIB) + b"y" * MIB)
        before = taken(file)
        give_back(file)
        assert taken(file) <= before - 29 * MIB
        assert file.stat().st_size == 32 * MIB


def test_steps_of_any_length_give_back_the_same(place: Path) -> None:
    content = random_content(7)
    file = written(place, content)
    assert give_back(file, most_bytes=4 * MIB) > 3
    assert file.read_bytes() == content
    in_steps = taken(file)
    give_back(file)
    assert taken(file) == in_steps


def test_short_runs_of_zeros_stay(place: Path) -> None:
    file = written(place, (b"x" * 4096 + bytes(MIB - 4096)) * 8)
    before = taken(file)
    give_back(file)
    assert taken(file) == before


def test_a_snapshot_that_shares_the_blocks_keeps_them(place: Path) -> None:
    pool = Pool(place, reflinks=ReflinkedFiles())
    try:
        content = random_content(3)
        file, snapshot = pool.file(IDENTITY), pool.snapshot_file(IDENTITY)
        file.write_bytes(content)
        pool.sync(file)
        pool.reflink(file, snapshot, SIZE)
        give_back(file)
        assert file.read_bytes() == content
        assert snapshot.read_bytes() == content
    finally:
        pool.close()


def test_a_file_that_another_program_has_open_is_left_alone(place: Path) -> None:
    file = written(place, bytes(8 * MIB))
    before = taken(file)
    for flags in (os.O_RDONLY, os.O_RDWR):
        fd = os.open(file, flags)
        try:
            with pytest.raises(PreconditionFailed, match="another program has"):
                give_back(file)
        finally:
            os.close(fd)
    assert taken(file) == before


def test_a_file_under_a_loop_device_is_left_alone(place: Path) -> None:
    file = written(place, bytes(8 * MIB))
    before = taken(file)
    found = subprocess.run(["losetup", "--find", "--show", file], check=True, capture_output=True, text=True)
    try:
        with pytest.raises(PreconditionFailed, match="another program has"):
            give_back(file)
    finally:
        subprocess.run(["losetup", "--detach", found.stdout.strip()], check=True)
    assert taken(file) == before


def test_a_program_that_opens_the_file_meanwhile_waits_and_ends_the_step(
    place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The writer comes after zeros were read, and before they would be given back."""
    file = written(place, bytes(16 * MIB))
    order: list[str] = []

    def write() -> None:
        fd = os.open(file, os.O_RDWR)
        order.append("opened")
        os.pwrite(fd, b"x" * 4096, 2 * MIB)
        os.fsync(fd)
        os.close(fd)

    writer, read = threading.Thread(target=write), os.preadv

    def reading(fd: int, *arguments: object) -> int:
        count = read(fd, *arguments)  # type: ignore[arg-type]
        if not writer.ident:
            writer.start()
            assert Deadline.after(30).wait_until(lambda: fcntl.fcntl(fd, fcntl.F_GETLEASE) != fcntl.F_WRLCK)
        return count

    with monkeypatch.context() as patched:
        patched.setattr(os, "preadv", reading)
        following = FILES.give_back_zeros(file, 0, 1 << 40)
    order.append("ended")
    writer.join()
    assert following is not None
    assert taken(file) == 16 * MIB
    assert file.read_bytes() == bytes(2 * MIB) + b"x" * 4096 + bytes(14 * MIB - 4096)


KILLED = """
import os, signal, sys
from pathlib import Path
from csi_driver.host import sparse_files
punch, left = sparse_files.punch_hole, [int(sys.argv[2])]
def killed(*arguments):
    if sys.argv[3] == "before" and not left[0]:
        os.kill(os.getpid(), signal.SIGKILL)
    punch(*arguments)
    if sys.argv[3] == "after" and not left[0]:
        os.kill(os.getpid(), signal.SIGKILL)
    left[0] -= 1
sparse_files.punch_hole = killed
sparse_files.SparseFiles().give_back_zeros(Path(sys.argv[1]), 0, 1 << 40)
"""


@pytest.mark.parametrize("moment", ["before", "after"])
@pytest.mark.parametrize("holes", [0, 1, 5])
def test_after_kill_9_at_any_hole_no_byte_has_changed_and_the_next_run_goes_on(
    place: Path, moment: str, holes: int
) -> None:
    content = random_content(11)
    file = written(place, content)
    ended = subprocess.run([sys.executable, "-c", KILLED, file, str(holes), moment], cwd=Path(__file__).parents[2])
    assert ended.returncode == -signal.SIGKILL
    assert file.read_bytes() == content
    give_back(file)
    assert file.read_bytes() == content
    assert FILES.give_back_zeros(file, 0, 1 << 40) is None


def test_a_read_error_gives_nothing_back(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = written(place, bytes(8 * MIB))
    before = taken(file)

    def short(fd: int, buffers: Sequence[memoryview], offset: int) -> int:
        return 4096

    monkeypatch.setattr(os, "preadv", short)
    with pytest.raises(Exception, match="EIO"):
        give_back(file)
    assert taken(file) == before


def test_unwritten_zeros_are_written_before_they_are_read(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = written(place, b"x" * 4 * MIB)
    file.write_bytes(bytes(4 * MIB))
    order: list[str] = []
    sync, read = os.fsync, os.preadv

    def syncing(fd: int) -> None:
        order.append("sync")
        sync(fd)

    def reading(fd: int, buffers: Sequence[memoryview], offset: int) -> int:
        assert fcntl.fcntl(fd, fcntl.F_GETFL) & os.O_DIRECT, "read from the page cache"
        order.append("read")
        return read(fd, buffers, offset)

    monkeypatch.setattr(os, "fsync", syncing)
    monkeypatch.setattr(os, "preadv", reading)
    give_back(file)
    assert order == ["sync", "read"]


def test_the_end_of_a_file_that_is_no_whole_block_stays(place: Path) -> None:
    content = bytes(8 * MIB) + b"x" * 100
    file = written(place, content)
    give_back(file)
    assert file.read_bytes() == content
    assert taken(file) <= 4096


def test_a_link_is_not_followed(place: Path) -> None:
    file = written(place, bytes(8 * MIB))
    before = taken(file)
    link = place / "link.img"
    link.symlink_to(file)
    with pytest.raises(SystemCallFailed, match="ELOOP"):
        give_back(link)
    assert taken(file) == before


def test_a_filesystem_that_keeps_the_blocks_of_a_hole_is_named(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sparse_files, "punch_hole", lambda *_: None)
    assert "does not give back a hole" in FILES.why_not(place)
