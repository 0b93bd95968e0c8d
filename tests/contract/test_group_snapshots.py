# SPDX-License-Identifier: Apache-2.0
"""Groups of snapshots of mounted volumes: of one moment, and whole or absent after kill -9."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import pytest

from csi_driver.deadline import Deadline
from csi_driver.embedded.settings import Freezes, StorageSettings
from csi_driver.host.connectors.loop import LoopDevices
from csi_driver.host.freeze import Freezer
from csi_driver.host.reflink import ReflinkedFiles
from tests.contract.test_host_freeze import is_frozen, run, thaw
from tests.reflink_pool import mount_file, mounted
from tests.unit.embedded.fake_freezes import FakeFreezes
from tests.unit.embedded.manager import Manager, running, settings_in

pytestmark = pytest.mark.root
VOLUMES = ("a", "b", "c")
MEMBERS = {f"snap-{volume}": volume for volume in VOLUMES}


@pytest.fixture
def settings(tmp_path: Path) -> Iterator[StorageSettings]:
    """Settings of a pool that has the mounted volumes a, b and c."""
    loops = LoopDevices()
    with mounted(tmp_path, size_mib=2000) as place, contextlib.ExitStack() as stack:
        settings = settings_in(place)
        with running(settings, loops) as manager:
            for volume in VOLUMES:
                manager.save(volume)
                manager.attach(volume)
        stack.callback(detach, loops, place)
        for volume in VOLUMES:
            device, target = settings.clients[0].device_directory / volume, tmp_path / volume
            run("mkfs.ext4", "-q", device)
            target.mkdir()
            run("mount", device, target)
            stack.callback(run, "umount", target)
            stack.callback(thaw, target)
            (target / "count").write_bytes(bytes(8))
        yield settings


def detach(loops: LoopDevices, place: Path) -> None:
    """Detach all devices, at which other programs may just look."""
    assert Deadline.after(30).wait_until(lambda: all(list(map(loops.detach, loops.bound_to(place)))))


def manager_of(settings: StorageSettings) -> contextlib.AbstractContextManager[Manager]:
    return running(settings, LoopDevices(), None, ReflinkedFiles(), Freezer(settings.pool_directory))


WRITE = """
import os, sys
files = [os.open(path + "/count", os.O_RDWR) for path in sys.argv[1:]]
for number in range(1, 10**9):
    for file in files:
        os.pwrite(file, number.to_bytes(8, "little"), 0)
        os.fsync(file)
    if number == 1:
        print("begun", flush=True)
"""


@contextlib.contextmanager
def writing(places: Sequence[Path]) -> Iterator[None]:
    """Write n to the first volume, then to the second, ...: each only when the one before is on disk."""
    with subprocess.Popen([sys.executable, "-c", WRITE, *map(str, places)], stdout=subprocess.PIPE) as writer:
        assert writer.stdout is not None
        assert writer.stdout.readline() == b"begun\n"
        try:
            yield
        finally:
            writer.kill()


def counts(manager: Manager, directory: Path, group: str) -> list[int]:
    """Return what each snapshot of a group has, read through a filesystem whose journal was replayed."""
    found, place = [], directory / "snapshot"
    place.mkdir(exist_ok=True)
    for member in manager.group(group)["snapshots"]:
        copy = manager.server.pool.directory / "copy"
        run("cp", "--reflink=always", manager.server.pool.snapshot_file(member["uuid"]), copy)
        mount_file(copy, place)
        try:
            found.append(int.from_bytes((place / "count").read_bytes(), "little"))
        finally:
            run("umount", place)
    return found


@dataclass(slots=True)
class SlowReflinks(ReflinkedFiles):
    """Lets programs write between two clones, as clones of many extents do, if they can."""

    counted: Path
    patience_s: float

    def clone(self, source_fd: int, target_fd: int) -> None:
        ReflinkedFiles.clone(self, source_fd, target_fd)
        before = self.counted.read_bytes()
        if before == bytes(8):
            return  # nobody writes yet: the start tries a reflink
        Deadline.after(self.patience_s).wait_until(lambda: self.counted.read_bytes() != before)


def cut_while_written(
    settings: StorageSettings, directory: Path, freezes: Freezes, rounds: int, *, patience_s: float
) -> list[bool]:
    """Cut groups while dependent writes go on; tell of each whether no volume is ahead of the one before."""
    results, reflinks = [], SlowReflinks(directory / VOLUMES[-1] / "count", patience_s)
    places = [directory / volume for volume in VOLUMES]
    with running(settings, LoopDevices(), None, reflinks, freezes) as manager, writing(places):
        for number in range(rounds):
            answer = manager.cut_group(f"group-{number}", {f"{name}-{number}": of for name, of in MEMBERS.items()})
            assert answer["success"], answer
            found = counts(manager, directory, f"group-{number}")
            results.append(found == sorted(found, reverse=True) and found[0] - found[-1] <= 1)
            manager.delete_group(f"group-{number}")
    return results


def test_no_cut_has_a_write_without_the_one_that_it_depends_on(settings: StorageSettings, tmp_path: Path) -> None:
    assert all(cut_while_written(settings, tmp_path, Freezer(settings.pool_directory), 6, patience_s=0.3))


def test_without_a_freeze_the_same_writes_are_torn(settings: StorageSettings, tmp_path: Path) -> None:
    """The proof above can fail."""
    assert not all(cut_while_written(settings, tmp_path, FakeFreezes(), 1, patience_s=60))


def test_nothing_is_frozen_after_a_cut(settings: StorageSettings, tmp_path: Path) -> None:
    with manager_of(settings) as manager:
        assert manager.cut_group("group", MEMBERS)["success"]
        assert [is_frozen(tmp_path / volume) for volume in VOLUMES] == [False, False, False]
        assert not list(settings.pool_directory.glob("*frozen*"))


def test_an_open_raw_volume_refuses_its_group_and_leaves_nothing(settings: StorageSettings, tmp_path: Path) -> None:
    with manager_of(settings) as manager:
        manager.save("raw")
        manager.attach("raw")
        raw = settings.clients[0].device_directory / "raw"
        with raw.open("r+b") as device, subprocess.Popen(["sleep", "1000"], stdin=device) as user:
            answer = manager.cut_group("group", {**MEMBERS, "snap-raw": "raw"})
            user.kill()
        assert answer["error"]["id"] == 91008
        assert "(sleep)" in answer["error"]["message"]
        assert manager.get("/snapshots/all/0/0") == []
        assert not list(manager.server.pool.snapshots.iterdir())
        assert manager.cut_group("group", {**MEMBERS, "snap-raw": "raw"})["success"]


KILLED = """
import os, signal, sys
from pathlib import Path
from csi_driver.host.connectors.loop import LoopDevices
from csi_driver.host.freeze import Freezer
from csi_driver.host.reflink import ReflinkedFiles
from tests.storage_switches import add_points
from tests.unit.embedded.manager import Manager, settings_in
settings = settings_in(Path(sys.argv[1]))
manager = Manager(settings, LoopDevices(), None, ReflinkedFiles(), Freezer(settings.pool_directory))
passed = 0
def at_point(point):
    global passed
    passed += 1
    if passed == int(sys.argv[2]):
        if sys.argv[3] == "both":
            children = Path(f"/proc/self/task/{os.getpid()}/children").read_text().split()
            for child in children:
                os.kill(int(child), signal.SIGKILL)
        os.kill(os.getpid(), signal.SIGKILL)
add_points(manager.server, at_point)
assert manager.cut_group("group", dict(each.split("=") for each in sys.argv[4:]))["success"]
"""


@pytest.mark.parametrize("killed", ["manager", "both"])
def test_after_kill_9_at_any_step_nothing_is_frozen_or_half_made_and_the_retry_succeeds(
    settings: StorageSettings, tmp_path: Path, killed: str
) -> None:
    """`both`: the guard too."""
    members = [f"{name}={volume}" for name, volume in MEMBERS.items()]
    statuses: list[int] = []
    while not statuses or statuses[-1]:
        argv = [sys.executable, "-c", KILLED, str(tmp_path / "mkfs.xfs"), str(len(statuses) + 1), killed, *members]
        statuses.append(subprocess.run(argv, cwd=Path(__file__).parents[2], check=False).returncode)
        with manager_of(settings) as manager:
            freezes = Freezer(settings.pool_directory)
            assert Deadline.after(30).wait_until(freezes.recover)
            assert [is_frozen(tmp_path / volume) for volume in VOLUMES] == [False, False, False]
            assert {row["_id"] for row in manager.get("/snapshots/all/0/0")} in (set(), set(MEMBERS))
            files = sorted(file.stem for file in manager.server.pool.snapshots.iterdir())
            assert files == sorted(row["uuid"] for row in manager.get("/snapshots/all/0/0"))
            answer = manager.cut_group("group", MEMBERS)
            assert answer["success"], answer
            assert manager.group("group")["isReady"]
            assert manager.delete_group("group")["success"]
    assert statuses == [-signal.SIGKILL] * (len(statuses) - 1) + [0]
    assert len(statuses) > 8


def test_a_repeated_request_after_a_lost_answer_finds_its_group(settings: StorageSettings) -> None:
    with manager_of(settings) as manager:
        first = manager.cut_group("group", MEMBERS)
    with manager_of(settings) as manager:
        assert manager.cut_group("group", MEMBERS) == first
        assert os.listdir(manager.server.pool.snapshots) != []
