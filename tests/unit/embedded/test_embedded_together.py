# SPDX-License-Identifier: Apache-2.0
"""Many callers at once: in the end files, rows, attachments, reports, reservations and devices agree."""

from __future__ import annotations

import random
import threading
from collections import Counter
from pathlib import Path

from csi_driver.embedded.model import TOTALS, VOLUMES, Totals
from tests.unit.embedded.fake_loops import FakeLoopDevices
from tests.unit.embedded.fake_reflinks import FakeReflinks
from tests.unit.embedded.manager import CONCATENATED, Manager, running, settings_in

NAMES = ["a", "b", "c"]
CLIENTS = ["node-1", "node-2"]


def act(manager: Manager, chance: random.Random) -> None:
    name, client = chance.choice(NAMES), chance.choice(CLIENTS)
    volume = manager.volume(name)
    if "blocks" not in volume:
        manager.save(name, chance.choice([1, 2.5]))
        return
    identity = volume["uuid"]
    item = {"name": name, "uuid": identity, "referenceID": chance.choice(["x", "y"])}
    attachment = {"client": client, "clientUUID": identity, "volumes": [item]}
    snapshot = f"snap-{chance.randrange(4)}"
    match chance.randrange(10):
        case 6:
            manager.post("/snapshots/save", [{"name": snapshot, "volume": {"_id": name, "uuid": identity}}])
        case 7:
            manager.delete_snapshot(snapshot, manager.snapshot(snapshot).get("uuid") or identity)
        case 8:
            source = {"kind": "volume", "_id": name, "uuid": identity}
            copy = {"name": chance.choice(NAMES), "capacity": 4, "VPG": CONCATENATED, "source": source}
            manager.post("/clones/save", [copy])
        case 9:
            copied = {"kind": "snapshot", "_id": snapshot, "uuid": manager.snapshot(snapshot).get("uuid") or identity}
            copy = {"name": chance.choice(NAMES), "capacity": 4, "VPG": CONCATENATED, "source": copied}
            manager.post("/clones/save", [copy])
        case 0:
            manager.post("/volumes/delete", [{"_id": name, "uuid": identity}])
        case 1:
            larger = {"_id": name, "uuid": identity, "capacity": volume["capacity"] + 0.5}
            manager.post("/volumes/extend", [larger])
        case 2:
            mode = {"mode": "EXCLUSIVE_READ_WRITE", "version": volume["reservation"]["version"], "preempt": True}
            item["reservation"] = {**mode, "isDetachOthers": chance.random() < 0.5}
            manager.post("/clients/attach", attachment)
        case 3:
            manager.post("/clients/attach", attachment)
        case _:
            manager.post("/clients/detach", attachment)


def contradictions(manager: Manager, loops: FakeLoopDevices) -> list[str]:
    """Return what does not agree, worked out from the documents, the files and the kernel."""
    found = []
    rows = {row["uuid"]: row for row in manager.get("/volumes/all/0/0")}
    pool = manager.server.pool
    if {identity: row["blocks"] * 4096 for identity, row in rows.items()} != {
        identity: pool.file(identity).stat().st_size for identity in pool.identities()
    }:
        found.append("files")
    snapshots = {row["uuid"]: row["blocks"] * 4096 for row in manager.get("/snapshots/all/0/0")}
    if snapshots != {file.stem: file.stat().st_size for file in pool.snapshots.iterdir()}:
        found.append("files of snapshots")
    counted = Counter(row["volume"]["uuid"] for row in manager.get("/snapshots/all/0/0"))
    if any(volume.snapshots != counted[volume.uuid] for volume in manager.server.store.all(VOLUMES)):
        found.append("numbers of snapshots")
    clients = manager.get("/clients/all/0/0")
    desired = {
        (attachment["uuid"], client["_id"]) for client in clients for attachment in client["attachments"].values()
    }
    status = {(row["uuid"], client["_id"]): row["vol_status"] for client in clients for row in client["block_devices"]}
    # Who was preempted before it had its device does not get one.
    entitled = {pair for pair in desired if status[pair] != 17}
    if entitled != {pair for pair in status if status[pair] == 4} or len(loops.bound) != len(entitled):
        found.append(f"desired {desired}, reported {status}, bound {loops.labels()}")
    if desired != {
        (identity, name) for identity, row in rows.items() for name in row["reservation"]["attachedClients"]
    }:
        found.append("reservations")
    if any(loops.size_bytes[device.number] != device.file.stat().st_size for device in loops.bound.values()):
        found.append("sizes of devices")
    totals = Totals()
    for volume in manager.server.store.all(VOLUMES):
        totals = totals.with_volume(volume)
    if totals != manager.server.store.get(TOTALS, "pool"):
        found.append("totals")
    return found


def test_everything_agrees_after_many_callers_at_once(tmp_path: Path) -> None:
    loops = FakeLoopDevices()
    with running(settings_in(tmp_path), loops, reflinks=FakeReflinks()) as manager:
        problems: list[BaseException] = []

        def work(seed: int) -> None:
            chance = random.Random(seed)
            try:
                for _ in range(60):
                    act(manager, chance)
            except BaseException as problem:  # noqa: BLE001 - handed to the test's own thread
                problems.append(problem)

        threads = [threading.Thread(target=work, args=(seed,)) for seed in range(6)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert not problems
        manager.server.worker.stop()
        for client in CLIENTS:
            manager.retry(client)
        for row in manager.get("/volumes/all/0/0"):
            manager.release("delete")
            assert row["status"] == "online"
        assert contradictions(manager, loops) == []
