# SPDX-License-Identifier: Apache-2.0
"""Many callers at once: in the end files, rows, attachments, reports, reservations and devices agree."""

from __future__ import annotations

import random
import threading
from pathlib import Path

from csi_driver.embedded.model import TOTALS, VOLUMES, Totals
from tests.unit.embedded.fake_loops import FakeLoopDevices
from tests.unit.embedded.manager import Manager, running, settings_in

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
    match chance.randrange(6):
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
    with running(settings_in(tmp_path), loops) as manager:
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
