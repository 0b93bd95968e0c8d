# SPDX-License-Identifier: Apache-2.0
"""Snapshots on an xfs of this machine: kill -9 at every step, a full pool, many of them, deletion in any order."""

from __future__ import annotations

import fcntl
import itertools
import json
import mmap
import os
import signal
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from urllib.parse import quote

import pytest

from csi_driver.deadline import Deadline
from csi_driver.embedded.settings import StorageSettings
from csi_driver.embedded.store import Store
from csi_driver.host.connectors.loop import LoopDevices
from csi_driver.host.reflink import ReflinkedFiles
from tests.reflink_pool import EXT4, MIB, fill, in_memory, mounted
from tests.unit.embedded.fake_loops import FakeLoopDevices
from tests.unit.embedded.manager import GB, Json, Manager, running, settings_in
from tests.unit.embedded.test_storage_api import SCHEMAS, problems

pytestmark = pytest.mark.root


@pytest.fixture(scope="module")
def disk(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    with mounted(tmp_path_factory.mktemp("xfs"), size_mib=600) as place:
        yield place


@pytest.fixture
def settings(disk: Path, request: pytest.FixtureRequest) -> StorageSettings:
    directory = disk / str(abs(hash(request.node.nodeid)))
    directory.mkdir()
    return settings_in(directory)


def write(manager: Manager, volume: str, text: bytes, offset: int = 0) -> None:
    with manager.server.pool.file(manager.uuid(volume)).open("r+b") as file:
        file.seek(offset)
        file.write(text)


def read(file: Path, count: int) -> bytes:
    with file.open("rb") as opened:
        return opened.read(count)


def content(manager: Manager, snapshot: str, count: int = 5) -> bytes:
    return read(manager.server.pool.snapshot_file(manager.snapshot(snapshot)["uuid"]), count)


def on(settings: StorageSettings, loops: FakeLoopDevices | None = None) -> Json:
    return running(settings, loops, reflinks=ReflinkedFiles())


# --- kill -9 ------------------------------------------------------------------------------------------------------

EFFECTS: list[tuple[object, str]] = [
    (os, "open"), (os, "ftruncate"), (os, "fchmod"), (os, "fsync"), (os, "rename"), (fcntl, "ioctl"),
    (Path, "unlink"), (Store, "_write_rows"),
]  # fmt: skip
"""Calls of a cut that change something, or could: the process is killed before and after each."""


def killed_at(number: int, settings: StorageSettings, act: Callable[[Manager], Json] | None) -> bool:
    """Run a request, or for None the start, of a manager that kills itself at this point; False if that ended."""
    if pid := os.fork():
        _, status = os.waitpid(pid, 0)
        assert os.WIFSIGNALED(status) or os.WEXITSTATUS(status) == 0
        return os.WIFSIGNALED(status)
    try:
        manager = Manager(settings, FakeLoopDevices(), reflinks=ReflinkedFiles()) if act is not None else None
        points = itertools.count()

        def with_points(call: Callable[..., object]) -> Callable[..., object]:
            def pass_points(*arguments: Json, **named: Json) -> object:
                if next(points) == number:
                    os.kill(os.getpid(), signal.SIGKILL)
                result = call(*arguments, **named)
                if next(points) == number:
                    os.kill(os.getpid(), signal.SIGKILL)
                return result

            return pass_points

        for target, name in EFFECTS:
            setattr(target, name, with_points(getattr(target, name)))
        if act is None or manager is None:
            Manager(settings, FakeLoopDevices(), reflinks=ReflinkedFiles())
            os._exit(0)
        os._exit(not act(manager)["success"])
    except BaseException:  # noqa: BLE001  # never into pytest
        os._exit(1)


BEFORE_THE_LAST_COMMIT = 30
"""A point of a cut at which the file is complete and the row says `cutting`."""


def cut(manager: Manager) -> Json:
    return manager.cut("snap-1", "data")


def delete(manager: Manager) -> Json:
    return manager.delete_snapshot("snap-1")


@pytest.mark.parametrize(("act", "least"), [(cut, 28), (delete, 6)])
def test_after_kill_9_at_any_step_nothing_half_made_is_left_and_the_request_succeeds(
    settings: StorageSettings, act: Callable[[Manager], Json], least: int
) -> None:
    with on(settings) as manager:
        manager.save("data", 1)
        write(manager, "data", os.urandom(MIB))
        whole = read(manager.server.pool.file(manager.uuid("data")), MIB)
        if act is delete:
            cut(manager)
    for number in itertools.count():
        if not killed_at(number, settings, act):
            break
        with on(settings) as manager:
            rows = manager.get("/snapshots/all/0/0")
            assert all(row["isReady"] for row in rows)
            assert {file.name for file in manager.server.pool.snapshots.iterdir()} == {f"{r['uuid']}.img" for r in rows}
            assert cut(manager)["success"]
            assert content(manager, "snap-1", MIB) == whole
            if act is cut:
                assert delete(manager)["success"]
                assert manager.server.allocator.totals.shared == 0
    assert number >= least


def test_after_kill_9_in_the_recovery_the_next_one_is_right(settings: StorageSettings) -> None:
    with on(settings) as manager:
        manager.save("data", 1)
        write(manager, "data", b"first")
    for number in itertools.count(0, 4):
        assert killed_at(BEFORE_THE_LAST_COMMIT, settings, cut)
        assert [file.suffix for file in (settings.pool_directory / "snapshots").iterdir()] == [".img"]
        if not killed_at(number, settings, None):
            break
        with on(settings) as manager:
            assert manager.get("/snapshots/all/0/0") == []
            assert not list(manager.server.pool.snapshots.iterdir())
            assert manager.server.allocator.totals.shared == 0
    with on(settings) as manager:
        assert cut(manager)["success"]
        assert content(manager, "snap-1") == b"first"


# --- a running writer ---------------------------------------------------------------------------------------------


def write_on(node: Path, acknowledged: list[int], end: threading.Event) -> None:
    """Write numbered blocks to a device, each after the one before was acknowledged."""
    fd = os.open(node, os.O_RDWR | os.O_DIRECT)
    with mmap.mmap(-1, 4096) as block:
        number = 0
        while not end.is_set() and number < 100_000:
            number += 1
            block[:8] = number.to_bytes(8, "big")
            os.pwrite(fd, block, (number - 1) * 4096)
            acknowledged.append(number)
    os.close(fd)


def numbers_in(file: Path, most: int) -> list[int]:
    with file.open("rb") as opened:
        blocks = opened.read((most + 1) * 4096)
    numbers = [int.from_bytes(blocks[at : at + 8], "big") for at in range(0, len(blocks), 4096)]
    return [number for number in numbers if number]


def test_a_snapshot_of_a_running_writer_has_all_writes_up_to_a_moment_within_its_cut(settings: StorageSettings) -> None:
    loops, end, acknowledged = LoopDevices(), threading.Event(), list[int]()
    with running(settings, loops, reflinks=ReflinkedFiles()) as manager:
        manager.save("data", 1)
        manager.attach("data")
        with ThreadPoolExecutor(1) as threads:
            writer = threads.submit(write_on, settings.clients[0].device_directory / "data", acknowledged, end)
            bounds: list[tuple[int, int]] = []
            try:
                for number in range(5):
                    wanted = len(acknowledged) + 50
                    assert Deadline.after(60).wait_until(lambda wanted=wanted: len(acknowledged) > wanted)  # type: ignore[misc]
                    before = len(acknowledged)
                    assert manager.cut(f"snap-{number}", "data")["success"]
                    bounds.append((before, len(acknowledged) + 1))
            finally:
                end.set()
            writer.result(60)
        for number, (least, most) in enumerate(bounds):
            file = manager.server.pool.snapshot_file(manager.snapshot(f"snap-{number}")["uuid"])
            found = numbers_in(file, len(acknowledged))
            assert found == list(range(1, len(found) + 1))
            assert least <= len(found) <= most
        assert manager.detach("data")["success"]
    assert not loops.bound_to(settings.pool_directory / "volumes")


# --- space --------------------------------------------------------------------------------------------------------


def test_a_cut_on_a_full_filesystem_leaves_nothing_and_succeeds_when_there_is_space(tmp_path: Path) -> None:
    options = {"snapshot_overcommit": 0.0, "reserve_bytes": 4 * MIB}
    with mounted(tmp_path) as place, on(settings_in(place, **options)) as manager:
        manager.save("data", 1)
        write(manager, "data", b"first")
        ballast = fill(place)
        assert manager.cut("snap-1", "data")["error"]["id"] == 91005
        assert manager.get("/snapshots/all/0/0") == []
        assert not list(manager.server.pool.snapshots.iterdir())
        ballast.unlink()
        assert manager.cut("snap-1", "data")["success"]
        fill(place)
        assert content(manager, "snap-1") == b"first"
        assert manager.delete_snapshot("snap-1")["success"]


def test_cuts_that_fill_the_filesystem_end_with_refusals_and_whole_snapshots(tmp_path: Path) -> None:
    with mounted(tmp_path) as place, on(settings_in(place, snapshot_overcommit=0.0)) as manager:
        manager.save("data", 1)
        for number in range(1000):
            write(manager, "data", b"x" * 4096, number * 3 * 4096)
        ballast = fill(place)
        answers = {f"snap-{number}": manager.cut(f"snap-{number}", "data")["success"] for number in range(60)}
        assert not all(answers.values())
        rows = {row["_id"]: row["isReady"] for row in manager.get("/snapshots/all/0/0")}
        assert {name for name, is_ready in rows.items() if is_ready} == {name for name in answers if answers[name]}
        ballast.unlink()
        assert manager.cut("snap-59", "data")["success"]
        assert content(manager, "snap-59") == b"xxxxx"


def test_a_cut_that_would_take_promised_space_is_refused_before_it(tmp_path: Path) -> None:
    with mounted(tmp_path, size_mib=4096) as place:
        options = settings_in(place, size_bytes=1 * GB, overcommit=False, reserve_bytes=16 * MIB)
        with on(options) as manager:
            assert manager.save("data", 1)["success"]
            write(manager, "data", os.urandom(100 * MIB))
            unwritten = manager.volume("data")["blocks"] * 4096 - 100 * MIB
            taken = manager.server.pool.free_bytes() - unwritten - (16 + 80) * MIB
            with (place / "ballast").open("wb") as ballast:
                os.posix_fallocate(ballast.fileno(), 0, taken)
                assert manager.cut("snap-1", "data")["error"]["id"] == 91005
                ballast.truncate(taken - 40 * MIB)
                assert manager.cut("snap-1", "data")["success"]


@pytest.mark.parametrize("place", [lambda path: mounted(path, EXT4), in_memory], ids=["ext4", "tmpfs"])
def test_a_pool_without_reflinks_refuses_and_never_copies(tmp_path: Path, place: Callable[[Path], Json]) -> None:
    with place(tmp_path) as directory, on(settings_in(directory)) as manager:
        features = manager.get("/systemInfo")["features"]
        assert not features["snapshots"]
        assert "has no reflinks" in features["reason"]
        manager.save("data", 1)
        refusal = manager.cut("snap-1", "data")["error"]
        assert (refusal["id"], features["reason"] in refusal["message"]) == (91003, True)
        assert not list(manager.server.pool.snapshots.iterdir())


def test_changes_between_snapshots_are_answered_as_described(settings: StorageSettings) -> None:
    with on(settings) as manager:
        manager.save("data", 1)
        uuids = []
        for number in range(2):
            write(manager, "data", b"%05d" % number, number * MIB)
            uuids.append(manager.cut(f"snap-{number}", "data")["uuid"])
        answer = manager.get(f"/snapshots/changes/snap-1?uuid={uuids[1]}&base=snap-0&baseUuid={uuids[0]}")
        assert list(problems(answer, SCHEMAS["Changes"])) == []
        assert answer["ranges"] == [[MIB, 4096]]


# --- many ---------------------------------------------------------------------------------------------------------


def test_512_snapshots_of_a_volume_differ_and_are_deleted_in_any_order(settings: StorageSettings) -> None:
    with on(settings) as manager:
        manager.save("data", 1)
        for number in range(512):
            write(manager, "data", b"%05d" % number)
            assert manager.cut(f"snap-{number:03}", "data")["success"]
        of_volume = quote(json.dumps({"volume.uuid": manager.uuid("data")}))
        assert len(manager.get(f"/snapshots/all/0/0?filter={of_volume}")) == 512
        order = [number * 211 % 512 for number in range(512)]
        assert sorted(order) == list(range(512))
        for number in order[:256]:
            assert manager.delete_snapshot(f"snap-{number:03}")["success"]
        manager.delete("data")
        for number in order[256:]:
            assert content(manager, f"snap-{number:03}") == b"%05d" % number
            assert manager.delete_snapshot(f"snap-{number:03}")["success"]
        assert not list(manager.server.pool.snapshots.iterdir())


def test_100_cuts_at_once_are_all_made_and_share_their_syncs(
    settings: StorageSettings, monkeypatch: pytest.MonkeyPatch
) -> None:
    with on(settings) as manager:
        for number in range(10):
            manager.save(f"data-{number}", 1)
            write(manager, f"data-{number}", b"%05d" % number)
        commits: list[int] = []
        write_rows = Store._write_rows

        def counted(self: Store, puts: Json, deleted: Json) -> None:
            commits.append(1)
            write_rows(self, puts, deleted)

        monkeypatch.setattr(Store, "_write_rows", counted)
        with ThreadPoolExecutor(100) as threads:
            answers = threads.map(lambda number: manager.cut(f"snap-{number}", f"data-{number % 10}"), range(100))
            assert all(answer["success"] for answer in answers)
        assert len(commits) < 200
        for number in range(100):
            assert content(manager, f"snap-{number}") == b"%05d" % (number % 10)
