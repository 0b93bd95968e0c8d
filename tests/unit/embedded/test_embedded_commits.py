# SPDX-License-Identifier: Apache-2.0
"""How often a request waits for the disk, in which order, and what a change that is written later survives."""

from __future__ import annotations

import errno
import os
import sqlite3
import threading
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from csi_driver.embedded import clients
from csi_driver.embedded.model import FACTS, VOLUMES, Fact
from csi_driver.embedded.store import Store
from csi_driver.errors import StorageUnavailable
from tests.unit.embedded.fake_loops import FakeLoopDevices
from tests.unit.embedded.manager import Json, Manager, running, settings_in
from tests.unit.embedded.test_embedded_disk_errors import refusing


def watched(store: Store, log: list[str]) -> None:
    """Note each commit of a store."""
    real = store._write_rows

    def write(puts: list[tuple[str, str, str, str]], deleted: list[tuple[str, str, str]]) -> None:
        log.append("commit")
        real(puts, deleted)

    store._write_rows = write  # type: ignore[method-assign]


def put(key: str, value: str) -> Callable[[Json], None]:
    return lambda change: change.put(FACTS, key, Fact(value))


def test_each_request_waits_for_one_commit(manager: Manager) -> None:
    commits: list[str] = []
    watched(manager.server.store, commits)
    waited = {}
    for act in (manager.save, manager.attach, manager.detach, manager.delete):
        commits.clear()
        assert act("data")["success"]
        waited[act.__name__] = len(commits)
    assert waited == {"save": 1, "attach": 1, "detach": 1, "delete": 1}


def test_a_second_attachment_syncs_nothing_but_the_database(manager: Manager, monkeypatch: pytest.MonkeyPatch) -> None:
    manager.save("data")
    manager.attach("data")
    manager.detach("data")
    synced: list[int] = []
    monkeypatch.setattr(os, "fsync", synced.append)
    assert manager.attach("data")["success"]
    assert not synced


def test_a_row_says_that_its_file_is_made_only_when_the_file_is_on_disk(
    manager: Manager, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A power cut between the two would otherwise leave a volume without its file, for ever offline."""
    manager.save("data")
    log: list[str] = []
    real = os.fsync

    def sync(descriptor: int) -> None:
        log.append(Path(os.readlink(f"/proc/self/fd/{descriptor}")).suffix or "directory")
        real(descriptor)

    monkeypatch.setattr(os, "fsync", sync)
    watched(manager.server.store, log)
    manager.attach("data")
    volume = manager.server.store.get(VOLUMES, "data")
    assert volume is not None
    assert (log, volume.made) == ([".img", "directory", "commit"], True)


def test_a_change_that_is_written_later_is_seen_at_once_and_on_disk_with_the_next(tmp_path: Path) -> None:
    store, commits = Store(tmp_path / "s.sqlite"), list[str]()
    watched(store, commits)
    store.write_later(put("later", "1"))
    assert (store.get(FACTS, "later"), commits) == (Fact("1"), [])
    store.write(put("next", "2"))
    store._connection.close()  # as a crash does
    again = Store(tmp_path / "s.sqlite")
    assert (again.all(FACTS), commits) == ([Fact("1"), Fact("2")], ["commit"])
    again.close()


def test_the_latest_of_two_changes_of_a_record_counts(tmp_path: Path) -> None:
    store = Store(tmp_path / "s.sqlite")
    store.write(put("a", "1"))
    store.write_later(lambda change: change.delete(FACTS, "a"))
    store.write(put("a", "2"))
    store.write_later(put("a", "3"))
    store.write_later(put("b", "1"))
    store.write_later(lambda change: change.delete(FACTS, "b"))
    seen = store.all(FACTS)
    store.close()
    again = Store(tmp_path / "s.sqlite")
    assert seen == again.all(FACTS) == [Fact("3")]
    again.close()


@pytest.mark.parametrize("by", ["flush", "close", "the next look"])
def test_a_change_that_is_written_later_does_not_wait_for_another_for_ever(
    tmp_path: Path, loops: FakeLoopDevices, by: str
) -> None:
    manager = Manager(settings_in(tmp_path), loops)
    store = manager.server.store
    store.write_later(put("later", "1"))
    if by == "flush":
        store.flush()
    elif by == "the next look":
        manager.server.attacher.check()
    if by != "close":
        store._connection.close()
    else:
        store.close()
    manager.server.pool.close()
    manager.server._http.server_close()
    with running(settings_in(tmp_path), loops) as again:
        assert again.server.store.get(FACTS, "later") == Fact("1")


def test_a_refused_commit_loses_no_change_that_was_seen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise sqlite3.DatabaseError("refused")

    store = Store(tmp_path / "s.sqlite")
    store.write_later(put("later", "1"))
    with monkeypatch.context() as patch:
        patch.setattr(store, "_write_rows", refuse)
        with pytest.raises(StorageUnavailable):
            store.write(put("lost", "2"))
        with pytest.raises(StorageUnavailable):
            store.flush()
    assert store.all(FACTS) == [Fact("1")]
    store.close()
    again = Store(tmp_path / "s.sqlite")
    assert again.all(FACTS) == [Fact("1")]
    again.close()


@pytest.mark.parametrize(("reads", "key"), [(True, "a"), (True, "b"), (False, "a")])
def test_a_change_upon_one_that_the_disk_may_refuse_is_not_seen_before_that_is_decided(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, reads: bool, key: str
) -> None:
    store = Store(tmp_path / "s.sqlite")
    store.write(put("a", "1"))
    runs: list[object] = []
    run_again = threading.Event()
    problems: list[BaseException] = []

    def upon(change: Json) -> None:
        runs.append(change.get(FACTS, "a") if reads else None)
        change.put(FACTS, key, Fact("more"))
        if len(runs) == 2:
            run_again.set()

    def build() -> None:
        try:
            store.write_later(upon)
        except StorageUnavailable as problem:
            problems.append(problem)

    builder = threading.Thread(target=build)

    def refuse(*_: object) -> None:
        # The first commit fails after the other thread has built on what it would commit.
        if not builder.is_alive() and not runs:
            builder.start()
            assert run_again.wait(60)
        raise sqlite3.DatabaseError("refused")

    with monkeypatch.context() as patch:
        patch.setattr(store, "_write_rows", refuse)
        with pytest.raises(StorageUnavailable):
            store.write(put("a", "2"))
        builder.join()
    assert (runs, len(problems), store.all(FACTS)) == ([Fact("2") if reads else None] * 2, 1, [Fact("1")])
    store.close()


def test_an_attachment_waits_for_a_client_that_is_served_no_more_though_a_crash_lost_its_report(
    tmp_path: Path, loops: FakeLoopDevices
) -> None:
    """Its device may be in use still: another client must not get the volume."""
    settings = settings_in(tmp_path)
    manager = Manager(settings, loops)
    manager.save("data")
    manager.attach("data", "node-1")
    manager.die()
    with running(replace(settings, clients=settings.clients[1:]), loops) as manager:
        assert (manager.report("data", "node-1"), len(loops.bound)) == (None, 1)
        assert manager.detach("data", "node-1")["success"]
        assert manager.attachment("data", "node-1")["action"] == "detaching"
        assert not manager.attach("data", "node-2", mode="EXCLUSIVE_READ_WRITE")["success"]


def test_a_device_in_use_is_waited_for_though_a_crash_lost_its_report(
    tmp_path: Path, loops: FakeLoopDevices, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The start can meet an error before it makes the report again, for example a full filesystem."""
    manager = Manager(settings_in(tmp_path), loops)
    manager.save("data")
    manager.attach("data")
    loops.open.update(loops.bound)
    manager.die()
    with refusing(monkeypatch, "replace", errno.ENOSPC, ".new"), running(settings_in(tmp_path), loops) as manager:
        assert (manager.report("data"), len(loops.bound)) == (None, 1)
        manager.detach("data")
        assert manager.attachment("data")["action"] == "detaching"
        loops.open.clear()
        manager.retry("node-1")
        assert (manager.attachment("data"), loops.bound) == (None, {})


def test_a_client_shows_the_volumes_that_it_detached_last_and_not_all_that_it_ever_had(
    manager: Manager, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(clients, "_DETACHED_SHOWN", 1)
    names = ["a", "b", "c", "d", "e"]
    for name in names:
        manager.save(name)
        manager.attach(name)
    for name in names[:4]:
        manager.detach(name)
    shown = {row["name"]: row["vol_status"] for row in manager.get("/clients/node-1")["block_devices"]}
    assert shown == {"c": 2, "d": 2, "e": 4}
    assert manager.attach("a")["success"]
    assert manager.report("a")["vol_status"] == 4
