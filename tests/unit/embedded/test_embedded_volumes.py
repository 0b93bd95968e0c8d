# SPDX-License-Identifier: Apache-2.0
"""Refusals of volumes that the recordings do not show, and the store's own rules."""

from __future__ import annotations

import json
import sqlite3
import threading
from pathlib import Path

import pytest

from csi_driver.embedded.allocator import TotalsWrong
from csi_driver.embedded.model import FACTS, Fact
from csi_driver.embedded.pool import PoolInUse
from csi_driver.embedded.store import Change, Store
from csi_driver.errors import StorageUnavailable
from tests.storage_switches import add_points
from tests.unit.embedded.fake_loops import FakeLoopDevices
from tests.unit.embedded.fake_luks import FakeLuksHeaders
from tests.unit.embedded.manager import Json, Manager, calls_of, running, settings_in


def test_a_snapshot_is_refused_and_leaves_its_source_as_it_was(manager: Manager) -> None:
    manager.save("source")
    source = manager.volume("source")
    answer = manager.save("copy", 2, sourceID="source", sourceUUID=source["uuid"])
    assert answer["error"]["id"] == 422
    assert manager.volume("source") == source
    assert manager.extend("source", 2)["success"]


def test_an_encrypted_volume_is_refused(manager: Manager) -> None:
    assert manager.save("data", isEncrypted=True)["error"]["innerMessage"]["id"] == 16825


def test_a_volume_limited_to_an_unknown_target_is_not_allocated(manager: Manager) -> None:
    answer = manager.save("data", VPG=None, RAIDLevel="Concatenated", limitByNodes=["elsewhere"])
    assert answer["error"]["innerMessage"] == "Failed to allocate"


def test_an_unknown_raid_level_has_its_own_id(manager: Manager) -> None:
    assert manager.save("data", VPG=None, RAIDLevel="RAID 9")["error"]["innerMessage"]["id"] == 1606


def test_parallel_saves_of_one_name_have_one_winner(manager: Manager) -> None:
    answers: list[bool] = []
    threads = [threading.Thread(target=lambda: answers.append(manager.save("data")["success"])) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(answers) == [False] * 7 + [True]
    assert len(manager.server.pool.identities()) == 1


def test_a_volume_deleted_while_it_is_saved_leaves_no_file(tmp_path: Path, loops: FakeLoopDevices) -> None:
    def delete(point: str) -> None:
        if point == "store.write" and not deleted:
            deleted.append(True)
            manager.delete("data")

    deleted: list[bool] = []
    with running(settings_in(tmp_path), loops) as manager:
        add_points(manager.server, delete)
        manager.save("data")
        assert not manager.server.pool.identities()


def test_an_update_replaces_the_metadata_as_a_whole(manager: Manager) -> None:
    manager.save("data", metadata={"a": 1})
    manager.update("data", metadata={"b": 2}, description="text")
    volume = manager.volume("data")
    assert (volume["metadata"], volume["description"]) == ({"b": 2}, "text")


def test_classes_of_a_group_cannot_be_changed_on_the_volume(manager: Manager) -> None:
    manager.save("data")
    assert manager.update("data", limitByNodes=["node-1"])["error"]["id"] == 168412


def test_a_volume_in_use_is_not_deleted(manager: Manager) -> None:
    manager.save("data")
    manager.attach("data")
    assert manager.delete("data")["error"]["id"] == 1683


def test_a_volume_is_deleted_when_its_last_device_has_gone(manager: Manager, loops: FakeLoopDevices) -> None:
    manager.save("data")
    manager.attach("data")
    loops.open.add(0)
    manager.detach("data")
    assert manager.delete("data")["success"]
    assert manager.server.pool.identities()
    loops.open.clear()
    manager.retry("node-1")
    assert not manager.server.pool.identities()
    assert manager.volume("data")["error"]["id"] == 1543


def test_an_extension_is_under_way_until_the_targets_have_reported(manager: Manager) -> None:
    manager.save("data")
    manager.hold("extend")
    assert manager.extend("data", 2)["success"]
    assert (manager.volume("data")["action"], manager.volume("data")["capacity"]) == ("extending", 2)
    assert manager.extend("data", 3)["success"]
    assert manager.attach("data")["success"]
    manager.release("extend")
    assert manager.volume("data")["action"] == "none"


def test_an_extension_leaves_the_action_of_an_encryption_that_is_still_to_come(
    tmp_path: Path, loops: FakeLoopDevices
) -> None:
    with running(settings_in(tmp_path), loops, FakeLuksHeaders()) as manager:
        manager.save("data", isEncrypted=True, VPG=None, RAIDLevel="Concatenated")
        manager.extend("data", 2)
        assert manager.volume("data")["action"] == "initEncryptionRequired"


@pytest.mark.parametrize("grows", [False, True])
def test_a_volume_whose_last_commit_is_refused_is_completed_by_a_retry(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, *, grows: bool
) -> None:
    writes, commits = Store._write_rows, list[str]()

    def refuse_the_second(self: Store, puts: Json, deleted: Json) -> None:
        commits.extend(kind for kind, *_ in puts if kind == "volumes")
        if len(commits) == 2:
            raise sqlite3.DatabaseError("refused")
        writes(self, puts, deleted)

    with running(settings_in(tmp_path, preallocate=not grows, retry_first_s=0.0)) as manager:
        manager.server.pool._preallocate = False  # the file stays sparse
        if grows:
            manager.save("data")
        monkeypatch.setattr(Store, "_write_rows", refuse_the_second)
        assert (manager.extend("data", 2) if grows else manager.save("data"))["success"]
        assert manager.volume("data")["action"] == ("extending" if grows else "initializing")
        manager.server.worker.run_due()
        assert manager.volume("data")["action"] == "none"


def test_one_manager_holds_a_pool(tmp_path: Path) -> None:
    with running(settings_in(tmp_path)), pytest.raises(PoolInUse), running(settings_in(tmp_path)):
        pass


def test_totals_that_are_not_the_sum_stop_the_start(tmp_path: Path) -> None:
    with running(settings_in(tmp_path)) as manager:
        manager.save("data")
    database = sqlite3.connect(tmp_path / "pool" / "manager.sqlite")
    database.execute("""DELETE FROM documents WHERE kind = 'volumes'""")
    database.commit()
    database.close()
    with pytest.raises(TotalsWrong), running(settings_in(tmp_path)):
        pass


def test_a_pool_of_an_earlier_version_is_read(tmp_path: Path) -> None:
    """It may have records of VPGs, and fields that no reader is left for."""
    with running(settings_in(tmp_path)) as manager:
        manager.save("data", VPG="DEFAULT_RAID_0_VPG")
        blocks = manager.volume("data")["blocks"]
    earlier = {
        "volumes": {"from_reserved": blocks, "created_by": "admin", "version": 3},
        "clients": {"created": "2026-01-01T00:00:00.000Z", "report_id": 7},
        "totals": {"reserved": 9, "from_reserved": blocks},
    }
    database = sqlite3.connect(tmp_path / "pool" / "manager.sqlite")
    for kind, fields in earlier.items():
        database.execute(
            "UPDATE documents SET record = json_patch(record, ?) WHERE kind = ?", (json.dumps(fields), kind)
        )
    database.execute("""INSERT INTO documents VALUES ('groups', '', 'gold', '{"name": "gold", "used": 9}')""")
    database.commit()
    database.close()
    with running(settings_in(tmp_path)) as manager:
        assert manager.volume("data")["blocks"] == blocks
        assert manager.save("more", VPG="DEFAULT_RAID_0_VPG")["success"]


def test_metadata_of_any_text_survives_a_restart(tmp_path: Path) -> None:
    """JSON allows half of a surrogate pair, which no other form of the text can hold."""
    with running(settings_in(tmp_path)) as manager:
        assert manager.save("data", metadata={"a": "\ud800"})["success"]
    with running(settings_in(tmp_path)) as manager:
        assert manager.volume("data")["metadata"] == {"a": "\ud800"}


def test_a_pool_can_be_read_by_the_version_before(tmp_path: Path) -> None:
    """It requires these fields; an update may be rolled back."""
    with running(settings_in(tmp_path)) as manager:
        manager.save("data")
        manager.attach("data")
    database = sqlite3.connect(tmp_path / "pool" / "manager.sqlite")
    rows = database.execute("SELECT kind, record FROM documents").fetchall()
    database.close()
    required = {
        "volumes": {"created_by", "modified_by", "created", "modified"},
        "clients": {"created"},
        "attachments": {"attachments_version"},
        "reports": {"attachments_version", "version", "report_id"},
    }
    assert set(required) <= {kind for kind, _ in rows}
    for kind, record in rows:
        assert required.get(kind, set()) <= json.loads(record).keys()


def test_a_change_that_raises_leaves_nothing(tmp_path: Path) -> None:
    store = Store(tmp_path / "s.sqlite")

    def change(view: Change) -> None:
        view.put(FACTS, "a", Fact("1"))
        raise ValueError("no")

    with pytest.raises(ValueError, match="no"):
        store.write(change)
    assert store.get(FACTS, "a") is None
    store.close()


def test_a_change_sees_what_it_has_put(tmp_path: Path) -> None:
    store = Store(tmp_path / "s.sqlite")

    def change(view: Change) -> Fact | None:
        view.put(FACTS, "a", Fact("1"))
        return view.get(FACTS, "a")

    assert store.write(change) == Fact("1")
    store.close()


def test_committed_changes_are_there_after_a_crash(tmp_path: Path) -> None:
    store = Store(tmp_path / "s.sqlite")
    store.write(lambda view: view.put(FACTS, "a", Fact("1")))
    store.write(lambda view: view.put(FACTS, "b", Fact("2")))
    store.write(lambda view: view.delete(FACTS, "a"))
    again = Store(tmp_path / "s.sqlite")
    assert again.all(FACTS) == [Fact("2")]
    store.close()
    again.close()


def test_a_disk_that_refuses_is_reported_and_nothing_is_shown(tmp_path: Path) -> None:
    store = Store(tmp_path / "s.sqlite")
    store._connection.execute("PRAGMA query_only = 1")
    with pytest.raises(StorageUnavailable):
        store.write(lambda view: view.put(FACTS, "a", Fact("1")))
    assert store.get(FACTS, "a") is None
    store._connection.execute("PRAGMA query_only = 0")
    store.write(lambda view: view.put(FACTS, "b", Fact("2")))
    assert store.all(FACTS) == [Fact("2")]
    store.close()


def test_concurrent_changes_are_all_kept(tmp_path: Path) -> None:
    store = Store(tmp_path / "s.sqlite")

    def count_up(view: Change) -> None:
        known = view.get(FACTS, "n") or Fact("0")
        view.put(FACTS, "n", Fact(str(int(known.value) + 1)))

    def work() -> None:
        for _ in range(25):
            store.write(count_up)

    threads = [threading.Thread(target=work) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert store.get(FACTS, "n") == Fact("200")
    store.close()


def test_a_start_runs_no_change_for_each_volume(tmp_path: Path, loops: FakeLoopDevices) -> None:
    changes = []
    for name in ("a", "b", "c"):
        with running(settings_in(tmp_path), loops) as manager:
            manager.save(name)
        with calls_of("write") as calls, running(settings_in(tmp_path), loops):
            changes.append(len(calls))
    assert len(set(changes)) == 1
