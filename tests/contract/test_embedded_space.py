# SPDX-License-Identifier: Apache-2.0
"""The free space that the embedded manager shows can be allocated, on a filesystem that other programs fill."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from csi_driver.embedded.documents import ApiError
from csi_driver.embedded.requests import NewVolume
from csi_driver.embedded.settings import StorageSettings
from csi_driver.embedded.store import Change
from tests.unit.embedded.fake_loops import FakeLoopDevices
from tests.unit.embedded.manager import GB, Manager, running, settings_in

pytestmark = pytest.mark.root
MIB = 1 << 20
HALF_MIB_GB = MIB / 2 / GB


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    """Return a filesystem of 4 GiB; `resize` shrinks it, as if other programs had filled it."""
    place = tmp_path / "disk"
    place.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=4g", "none", place], check=True)
    yield place
    subprocess.run(["umount", "--lazy", place], check=True)


def resize(disk: Path, mib: int) -> None:
    subprocess.run(["mount", "-o", f"remount,size={mib}m", disk], check=True)


def settings_on(disk: Path, **changes: object) -> StorageSettings:
    defaults = {"size_bytes": 3 << 30, "overcommit": False, "reserve_bytes": 128 * MIB}
    return settings_in(disk, **{**defaults, **changes})


def available_bytes(manager: Manager) -> int:
    """Return the free bytes of the drives of all targets."""
    targets = manager.get("/servers/all/0/0")
    return 4096 * sum(int(drive["availableBlocks"]) for target in targets for drive in target["disks"])


def save(manager: Manager, name: str, size_bytes: int) -> bool:
    """Make a volume of whole MiB."""
    return bool(manager.save(name, size_bytes / GB + HALF_MIB_GB)["success"])


@pytest.mark.parametrize("left_mib", [4096, 3000, 1700, 1300])
def test_a_volume_of_all_that_is_available_can_be_made_and_none_larger(disk: Path, left_mib: int) -> None:
    with running(settings_on(disk), FakeLoopDevices()) as manager:
        assert save(manager, "first", 1000 * MIB)
        resize(disk, left_mib + 1200)
        available = available_bytes(manager) // MIB * MIB
        assert 1000 * MIB < available <= min(left_mib + 1200 - 128 - 1000, 3072 - 1000) * MIB
        assert not save(manager, "larger", available + MIB)
        assert save(manager, "all", available)
        assert not save(manager, "more", 1000 * MIB)


def test_nothing_is_available_on_a_disk_that_others_have_filled(disk: Path) -> None:
    with running(settings_on(disk), FakeLoopDevices()) as manager:
        resize(disk, 100)
        assert available_bytes(manager) == 0
        assert not save(manager, "data", 1000 * MIB)


def test_what_was_promised_and_is_not_written_yet_is_kept_free_for_its_volume(disk: Path) -> None:
    with running(settings_on(disk), FakeLoopDevices()) as manager:
        resize(disk, 2000)
        assert save(manager, "first", 1000 * MIB)
        assert not save(manager, "second", 1000 * MIB)
        assert manager.extend("first", 2)["error"]["id"] == 1675
        file = manager.server.pool.file(manager.uuid("first"))
        before = available_bytes(manager)
        with file.open("r+b") as written:
            os.posix_fallocate(written.fileno(), 0, 200 * MIB)
        assert available_bytes(manager) == pytest.approx(before, abs=MIB), "it counts once: promised or written"
        manager.delete("first")
        assert save(manager, "second", 1000 * MIB)


def test_space_enough_for_unwritten_volumes_is_allocated_without_reading_the_files(
    disk: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with running(settings_on(disk), FakeLoopDevices()) as manager:
        looks = 0
        real = manager.server.pool.allocated_bytes

        def look() -> dict[str, int]:
            nonlocal looks
            looks += 1
            return real()

        monkeypatch.setattr(manager.server.pool, "allocated_bytes", look)
        assert save(manager, "first", 1000 * MIB)
        assert save(manager, "second", 1000 * MIB)
        assert manager.extend("first", 1.2)["success"]
        assert available_bytes(manager) > 0
        assert looks == 0
        resize(disk, 2000)
        assert not save(manager, "third", 1000 * MIB)
        assert looks > 0


def test_two_volumes_of_one_batch_are_not_both_given_the_last_room(disk: Path) -> None:
    """An uncommitted change counts, although it has neither a row nor a file yet."""
    with running(settings_on(disk), FakeLoopDevices()) as manager:
        resize(disk, 2000)
        body = {"capacity": 1, "VPG": "DEFAULT_CONCATENATED_VPG"}
        items = [NewVolume.model_validate({"name": name, **body}) for name in ("first", "second")]
        volumes = manager.server.volumes

        def both(change: Change) -> None:
            for item in items:
                volumes._record(change, item)

        with pytest.raises(ApiError, match="free in its file system"):
            manager.server.store.write(both)
        manager.server.store.write(lambda change: volumes._record(change, items[0]))


@pytest.mark.parametrize(("reserve_mib", "made"), [(100, True), (2500, False)])
def test_with_overcommitment_only_the_reserve_is_kept_free(disk: Path, reserve_mib: int, made: bool) -> None:
    settings = settings_on(disk, overcommit=True, size_bytes=3 << 40, reserve_bytes=reserve_mib * MIB)
    with running(settings, FakeLoopDevices()) as manager:
        resize(disk, 2000)
        assert (available_bytes(manager) > 1 << 40) is made
        assert save(manager, "first", 1 << 40) is made


def test_a_refusal_says_what_was_asked_and_what_there_is(disk: Path) -> None:
    with running(settings_on(disk), FakeLoopDevices()) as manager:
        resize(disk, 1700)
        error = manager.save("data", 2 * GB / GB + HALF_MIB_GB)["error"]
        asked, unallocated = 2 * GB // MIB * MIB, 3 << 30
        free = available_bytes(manager)
        assert error["message"] == (
            f"Failed to save volume: asked {asked} bytes; {unallocated} are unallocated in the pool, "
            f"{free} free in its file system: the smaller counts"
        )
        assert (error["id"], error["innerMessage"]) == (1664, "Failed to allocate")
        assert manager.save("data", 1.1)["success"]
        error = manager.extend("data", 3.5)["error"]
        assert error["id"] == 1675
        assert f"{available_bytes(manager)} free in its file system" in error["message"]
