# SPDX-License-Identifier: Apache-2.0
"""Errors of the disk: each call answers, the same call repeated succeeds, and the manager starts again."""

from __future__ import annotations

import errno
import os
import sqlite3
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import pytest

from csi_driver.embedded.model import FACTS, VOLUMES, Fact
from csi_driver.embedded.store import Store
from csi_driver.errors import HostFailure, StorageUnavailable
from tests.unit.embedded.fake_loops import FakeLoopDevices
from tests.unit.embedded.manager import Json, Manager, running, settings_in

ERRORS = [errno.EMFILE, errno.ENOSPC, errno.EDQUOT, errno.EIO, errno.EROFS, errno.ENOMEM]
RESERVE_FILE = "manager.sqlite.ballast"
RESERVE_BYTES = 1 << 20


def named(number: int) -> str:
    return errno.errorcode[number]


@contextmanager
def refusing(monkeypatch: pytest.MonkeyPatch, function: str, number: int, name: str = "") -> Iterator[None]:
    """Let a function of `os` refuse the paths that end with `name`, or descriptors of such files."""
    real = getattr(os, function)

    def refuse(target: object, *rest: object, **options: object) -> object:
        path = os.readlink(f"/proc/self/fd/{target}") if isinstance(target, int) else str(target)
        if path.removesuffix(" (deleted)").endswith(name):
            raise OSError(number, os.strerror(number))
        return real(target, *rest, **options)

    with monkeypatch.context() as patch:
        patch.setattr(os, function, refuse)
        yield


# --- the reserve file -------------------------------------------------------------------------------------


@pytest.mark.parametrize("number", ERRORS, ids=named)
@pytest.mark.parametrize("function", ["open", "posix_fallocate", "statvfs", "unlink"])
def test_a_change_is_kept_when_the_reserve_file_cannot_be_made_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, function: str, number: int
) -> None:
    store = Store(tmp_path / "s.sqlite")
    (tmp_path / "s.sqlite.ballast").unlink()
    with refusing(monkeypatch, function, number, "" if function == "statvfs" else ".ballast"):
        store.write(lambda view: view.put(FACTS, "a", Fact("1")))
    store.write(lambda view: view.put(FACTS, "b", Fact("2")))
    assert store.all(FACTS) == [Fact("1"), Fact("2")]
    store.close()
    again = Store(tmp_path / "s.sqlite")
    assert again.all(FACTS) == [Fact("1"), Fact("2")]
    again.close()


@pytest.mark.parametrize("number", [errno.EMFILE, errno.EDQUOT], ids=named)
@pytest.mark.parametrize("function", ["open", "posix_fallocate", "statvfs"])
def test_the_manager_keeps_its_account_when_the_reserve_file_cannot_be_made_again(
    tmp_path: Path, loops: FakeLoopDevices, monkeypatch: pytest.MonkeyPatch, function: str, number: int
) -> None:
    with running(settings_in(tmp_path), loops) as manager:
        (tmp_path / "pool" / RESERVE_FILE).unlink()
        with refusing(monkeypatch, function, number, "pool" if function == "statvfs" else ".ballast"):
            manager.save("first")
        assert manager.save("first")["success"] or manager.volume("first")["name"] == "first"
        assert manager.save("second")["success"]
    with running(settings_in(tmp_path), loops) as manager:
        assert [row["_id"] for row in manager.get("/volumes/all/0/0")] == ["first", "second"]
        assert manager.server.allocator.totals.volumes == 2


@pytest.mark.parametrize("left_bytes", [0, 4096])
def test_a_reserve_file_that_was_only_begun_is_made_whole(tmp_path: Path, left_bytes: int) -> None:
    Store(tmp_path / "s.sqlite").close()
    os.truncate(tmp_path / "s.sqlite.ballast", left_bytes)
    store = Store(tmp_path / "s.sqlite")
    store.write(lambda view: view.put(FACTS, "a", Fact("1")))
    store.close()
    assert (tmp_path / "s.sqlite.ballast").stat().st_blocks * 512 == RESERVE_BYTES


def full_once(store: Store, code: int) -> Callable[..., None]:
    real, met = store._write_rows, list[bool]()

    def write(puts: object, gone: object) -> None:
        if not met:
            met.append(True)
            problem = sqlite3.OperationalError("refused")
            problem.sqlite_errorcode = code
            raise problem
        real(puts, gone)  # type: ignore[arg-type]

    return write


@pytest.mark.parametrize("code", [sqlite3.SQLITE_FULL, sqlite3.SQLITE_IOERR_WRITE, sqlite3.SQLITE_IOERR_FSYNC])
def test_a_full_disk_and_an_exhausted_quota_use_up_the_reserve_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int
) -> None:
    store = Store(tmp_path / "s.sqlite")
    monkeypatch.setattr(store, "_write_rows", full_once(store, code))
    store.write(lambda view: view.put(FACTS, "a", Fact("1")))
    assert not (tmp_path / "s.sqlite.ballast").exists()
    store.close()


@pytest.mark.parametrize("number", [errno.EROFS, errno.EIO], ids=named)
def test_a_reserve_file_that_cannot_be_removed_leaves_the_database_usable(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    store = Store(tmp_path / "s.sqlite")
    with monkeypatch.context() as patch:
        patch.setattr(store, "_write_rows", full_once(store, sqlite3.SQLITE_FULL))
        with refusing(monkeypatch, "unlink", number, ".ballast"), pytest.raises(StorageUnavailable):
            store.write(lambda view: view.put(FACTS, "a", Fact("1")))
    store.write(lambda view: view.put(FACTS, "a", Fact("1")))
    assert store.all(FACTS) == [Fact("1")]
    store.close()


def test_a_record_that_cannot_be_written_down_is_not_the_ground_of_later_changes(tmp_path: Path) -> None:
    with running(settings_in(tmp_path)) as manager:
        manager.save("first")
        first = manager.server.store.get(VOLUMES, "first")
        assert first is not None
        no_json = replace(first, name="other", given={"a": {1}})
        with pytest.raises(TypeError, match="JSON"):
            manager.server.store.write(lambda change: change.put(VOLUMES, "other", no_json))
        assert manager.save("second")["success"]
    with running(settings_in(tmp_path)) as manager:
        assert [row["_id"] for row in manager.get("/volumes/all/0/0")] == ["first", "second"]


def test_a_change_that_ends_in_an_unforeseen_error_leaves_nothing_behind(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def unforeseen(*_: object) -> None:
        raise MemoryError

    with running(settings_in(tmp_path)) as manager:
        with monkeypatch.context() as patch:
            patch.setattr(manager.server.store, "_transact", unforeseen)
            with pytest.raises(MemoryError):
                manager.save("lost")
        assert manager.save("kept")["success"]
    with running(settings_in(tmp_path)) as manager:
        assert [row["_id"] for row in manager.get("/volumes/all/0/0")] == ["kept"]


# --- the start --------------------------------------------------------------------------------------------


def test_a_database_that_is_none_is_named(tmp_path: Path) -> None:
    (tmp_path / "s.sqlite").write_bytes(b"not a database, and longer than a header of a hundred bytes" * 4)
    with pytest.raises(HostFailure, match=r"s\.sqlite cannot be read.*restore"):
        Store(tmp_path / "s.sqlite")


def test_a_record_of_a_newer_version_is_named(tmp_path: Path) -> None:
    Store(tmp_path / "s.sqlite").close()
    database = sqlite3.connect(tmp_path / "s.sqlite")
    database.execute("INSERT INTO documents VALUES ('shelves', '', 'a', '{}')")
    database.commit()
    database.close()
    with pytest.raises(HostFailure, match=r"s\.sqlite.*'shelves'.*newer version"):
        Store(tmp_path / "s.sqlite")


@pytest.mark.parametrize("place", ["pool", "node-1/dev"])
def test_a_directory_that_cannot_be_made_is_named_at_the_start(
    tmp_path: Path, loops: FakeLoopDevices, place: str
) -> None:
    directory = tmp_path / place
    directory.parent.mkdir(exist_ok=True)
    directory.write_text("in the way")
    with pytest.raises(HostFailure, match=f"{directory}.*(EEXIST|ENOTDIR)"), running(settings_in(tmp_path), loops):
        pass


@pytest.mark.parametrize("number", [errno.EMFILE, errno.EROFS], ids=named)
@pytest.mark.parametrize("function", ["mkdir", "open"])
def test_a_pool_that_cannot_be_opened_is_named_at_the_start(
    tmp_path: Path, loops: FakeLoopDevices, monkeypatch: pytest.MonkeyPatch, function: str, number: int
) -> None:
    name = "/volumes" if function == "mkdir" else "/lock"
    with (
        refusing(monkeypatch, function, number, name),
        pytest.raises(HostFailure, match=f"pool.*{named(number)}"),
        running(settings_in(tmp_path), loops),
    ):
        pass
    with running(settings_in(tmp_path), loops) as manager:
        assert manager.save("data")["success"]


def test_a_certificate_that_cannot_be_read_is_named_at_the_start(tmp_path: Path, loops: FakeLoopDevices) -> None:
    settings = settings_in(tmp_path, tls_certificate=tmp_path / "tls.crt", tls_key=tmp_path / "tls.key")
    with pytest.raises(HostFailure, match=r"--tls-certificate .*tls\.crt"), running(settings, loops):
        pass


# --- requests ---------------------------------------------------------------------------------------------


def save(manager: Manager) -> Json:
    return manager.save("data")


def attach(manager: Manager) -> Json:
    return manager.attach("data")


def extend(manager: Manager) -> Json:
    return manager.extend("data", 2)


def detach(manager: Manager) -> Json:
    return manager.detach("data")


def delete(manager: Manager) -> Json:
    return manager.delete("data")


def seen(manager: Manager) -> tuple[float, int]:
    """Return capacity and vol_status of the volume; 0 where it has none."""
    volume, report = manager.volume("data"), manager.report("data")
    return volume.get("capacity", 0), report["vol_status"] if report is not None else 0


STEPS: list[tuple[Callable[[Manager], Json], tuple[float, int]]] = [
    (save, (1, 0)), (attach, (1, 4)), (extend, (2, 4)), (detach, (2, 2)), (delete, (0, 0)),
]  # fmt: skip
FAULTS = [
    ("open", ".img"), ("ftruncate", ".img"), ("fsync", ".img"), ("unlink", ".img"), ("open", "volumes"),
    ("statvfs", "volumes"), ("stat", ".img"), ("open", ".new"), ("replace", ".new"), ("unlink", "status.json"),
    ("mkdir", "data"), ("rmdir", "data"), ("unlink", "dev/data"), ("open", ".ballast"),
]  # fmt: skip


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EIO], ids=named)
@pytest.mark.parametrize(("function", "name"), FAULTS, ids=["-".join(fault) for fault in FAULTS])
def test_every_request_that_met_a_disk_error_succeeds_when_it_is_repeated(
    tmp_path: Path, loops: FakeLoopDevices, monkeypatch: pytest.MonkeyPatch, function: str, name: str, number: int
) -> None:
    with running(settings_in(tmp_path), loops) as manager:
        for act, done in STEPS:
            with refusing(monkeypatch, function, number, name):
                answer = act(manager)
            assert answer["success"] in (True, False)
            if seen(manager) != done:
                act(manager)
            manager.retry("node-1")
            assert seen(manager) == done, f"{act.__name__}, first answered {answer}"
    with running(settings_in(tmp_path), loops) as manager:
        assert manager.server.allocator.totals.allocated == 0


@pytest.mark.parametrize(("function", "name"), FAULTS, ids=["-".join(fault) for fault in FAULTS])
def test_a_disk_error_at_the_start_keeps_no_volume_from_being_attached_afterwards(
    tmp_path: Path, loops: FakeLoopDevices, monkeypatch: pytest.MonkeyPatch, function: str, name: str
) -> None:
    with running(settings_in(tmp_path), loops) as manager:
        manager.save("data")
        manager.attach("data")
        manager.extend("data", 2)
    with refusing(monkeypatch, function, errno.EIO, name), running(settings_in(tmp_path), loops):
        pass
    with running(settings_in(tmp_path), loops) as manager:
        assert seen(manager) == (2, 4)


def test_an_extension_succeeds_where_only_the_status_files_cannot_be_written(
    tmp_path: Path, loops: FakeLoopDevices, monkeypatch: pytest.MonkeyPatch
) -> None:
    with running(settings_in(tmp_path), loops) as manager:
        manager.save("data")
        manager.attach("data")
        with refusing(monkeypatch, "replace", errno.ENOSPC, ".new"):
            assert manager.extend("data", 2)["success"]
        assert loops.size_bytes[0] == manager.volume("data")["blocks"] * 4096
