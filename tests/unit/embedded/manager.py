# SPDX-License-Identifier: Apache-2.0
"""A storage manager for tests: requests go to its API, without a socket."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from types import FrameType
from typing import Any, TypeAlias
from urllib.parse import parse_qsl, unquote, urlsplit

from csi_driver.deadline import SYSTEM_CLOCK, Clock
from csi_driver.embedded.http import COOKIE
from csi_driver.embedded.server import StorageServer
from csi_driver.embedded.settings import (
    ClientSettings,
    Freezes,
    LoopDevices,
    LuksHeaders,
    NvmeTarget,
    Reflinks,
    SparseFiles,
    StorageSettings,
)
from csi_driver.http_requests import HttpRequest
from tests.storage_switches import Switches, retry_client
from tests.unit.embedded.fake_loops import FakeLoopDevices

Json: TypeAlias = Any
"""A decoded answer."""
GB = 1_000_000_000
CONCATENATED = "DEFAULT_CONCATENATED_VPG"


def settings_in(directory: Path, **changes: Json) -> StorageSettings:
    """Return settings of a pool of 100 GB with the clients node-1 and node-2."""
    clients = tuple(ClientSettings.under(name, directory / name) for name in ("node-1", "node-2"))
    defaults = StorageSettings(
        directory / "pool",
        clients=clients,
        size_bytes=100 * GB,
        overcommit=True,
        reserve_bytes=0,
        listen=("127.0.0.1", 0),
    )
    return replace(defaults, **changes)


class Manager:
    """One manager; `loops` is the kernel, which outlives it."""

    def __init__(
        self,
        settings: StorageSettings,
        loops: LoopDevices,
        headers: LuksHeaders | None = None,
        reflinks: Reflinks | None = None,
        freezes: Freezes | None = None,
        sparse_files: SparseFiles | None = None,
        target: NvmeTarget | None = None,
        clock: Clock = SYSTEM_CLOCK,
    ) -> None:
        self.server = StorageServer(settings, loops, headers, reflinks, freezes, sparse_files, target, clock)
        self._switches = Switches(self.server)
        self._session = self.server.sessions.open(settings.user, self.server.password.path.read_text().strip())

    def request(self, method: str, target: str, body: object = None) -> Json:
        return self.send(method, target, b"" if body is None else json.dumps(body).encode())

    def send(self, method: str, target: str, sent: bytes) -> Json:
        parts = urlsplit(target)
        query = dict(parse_qsl(parts.query))
        headers = {"cookie": f"{COOKIE}={self._session}", "content-type": "application/json"}
        request = HttpRequest(method, unquote(parts.path), query, headers, sent)
        return json.loads(self.server.api.respond(request).body)

    def get(self, target: str) -> Json:
        return self.request("GET", target)

    def post(self, target: str, body: object) -> Json:
        return self.request("POST", target, body)

    def _one(self, target: str, item: Mapping[str, object]) -> Json:
        return _envelope(self.post(target, [item]))

    # --- volumes ---

    def save(self, name: str, capacity: float | str = 1, **fields: object) -> Json:
        route = str(fields.pop("route", "/volumes/save"))
        item: Mapping[str, object] = {"name": name, "capacity": capacity, "VPG": CONCATENATED, **fields}
        return self._one(route, {key: value for key, value in item.items() if value is not None})

    def clone(self, source: str, name: str, capacity: float | str = 1, **fields: object) -> Json:
        """Make a volume from a volume; `kind`, `uuid`: of another source."""
        identity = fields.pop("uuid", None) or self.uuid(source)
        item = {"kind": fields.pop("kind", "volume"), "_id": source, "uuid": identity}
        return self.save(name, capacity, route="/clones/save", source=item, **fields)

    def volume(self, name: str) -> Json:
        return self.get(f"/volumes/{name}")

    def uuid(self, name: str) -> str:
        return str(self.volume(name)["uuid"])

    def extend(self, name: str, capacity: float | str) -> Json:
        return self._one("/volumes/extend", {"_id": name, "uuid": self.uuid(name), "capacity": capacity})

    def update(self, name: str, **fields: object) -> Json:
        return self._one("/volumes/update", {"_id": name, "uuid": self.uuid(name), **fields})

    def delete(self, name: str) -> Json:
        return self._one("/volumes/delete", {"_id": name, "uuid": self.uuid(name)})

    def reclaim(self, name: str, offset: int = 0) -> Json:
        return self._one("/volumes/reclaimSpace", {"_id": name, "uuid": self.uuid(name), "offset": offset})

    # --- snapshots ---

    def cut(self, name: str, volume: str, **fields: object) -> Json:
        source = {"_id": volume, "uuid": self.uuid(volume)}
        return self._one("/snapshots/save", {"name": name, "volume": source, **fields})

    def snapshot(self, name: str) -> Json:
        return self.get(f"/snapshots/{name}")

    def delete_snapshot(self, name: str, identity: str | None = None) -> Json:
        identity = identity or str(self.snapshot(name)["uuid"])
        return self._one("/snapshots/delete", {"_id": name, "uuid": identity})

    def cut_group(self, name: str, members: Mapping[str, str], **fields: object) -> Json:
        """Cut volumes by the names of their snapshots."""
        rows = [
            {"name": snapshot, "volume": {"_id": volume, "uuid": self.uuid(volume)}, "metadata": {}}
            for snapshot, volume in members.items()
        ]
        return self._one("/snapshotGroups/save", {"name": name, "members": rows, **fields})

    def group(self, name: str) -> Json:
        return self.get(f"/snapshotGroups/{name}")

    def delete_group(self, name: str, identity: str | None = None) -> Json:
        identity = identity or str(self.group(name)["uuid"])
        return self._one("/snapshotGroups/delete", {"_id": name, "uuid": identity})

    # --- clients ---

    def attach(self, volume: str, client: str = "node-1", reference: str | None = None, **reservation: object) -> Json:
        item: dict[str, object] = {"name": volume, "uuid": self.uuid(volume)}
        if reservation:
            item["reservation"] = reservation
        return self._request("attach", client, item, reference)

    def detach(self, volume: str, client: str = "node-1", reference: str | None = None, **fields: object) -> Json:
        return self._request("detach", client, {"name": volume, "uuid": self.uuid(volume), **fields}, reference)

    def _request(self, verb: str, client: str, item: dict[str, object], reference: str | None) -> Json:
        if reference is not None:
            item["referenceID"] = reference
        body = {"client": client, "clientUUID": "11111111-1111-1111-1111-111111111111", "volumes": [item]}
        return _envelope(self.post(f"/clients/{verb}", body))

    def report(self, volume: str, client: str = "node-1") -> Json:
        rows = [row for row in self.get(f"/clients/{client}")["block_devices"] if row["name"] == volume]
        return rows[0] if rows else None

    def attachment(self, volume: str, client: str = "node-1") -> Json:
        attachments = self.get(f"/clients/{client}")["attachments"].values()
        return next((attachment for attachment in attachments if attachment["name"] == volume), None)

    def hold(self, kind: str) -> None:
        self._switches.hold(kind)

    def release(self, kind: str) -> None:
        self._switches.release(kind)

    def retry(self, client: str) -> None:
        """Settle everything of a client now, as retries do later."""
        retry_client(self.server, client)

    def die(self) -> None:
        """End as kill -9 does: nothing more is written; the kernel drops locks and descriptors."""
        self.server.store._connection.close()
        self.server.pool.close()
        self.server._http.server_close()


def _envelope(answer: Json) -> Json:
    """Return the answer to a request for one object, or to a request that failed as a whole."""
    return answer[0] if isinstance(answer, list) else answer


@contextmanager
def calls_of(name: str) -> Iterator[list[str]]:
    """Collect the calls of a function in this thread, which carries out the requests."""
    calls: list[str] = []

    def note(frame: FrameType, event: str, _: object) -> None:
        if event == "call" and frame.f_code.co_name == name:
            calls.append(name)

    sys.setprofile(note)
    try:
        yield calls
    finally:
        sys.setprofile(None)


@contextmanager
def running(
    settings: StorageSettings,
    loops: LoopDevices | None = None,
    headers: LuksHeaders | None = None,
    reflinks: Reflinks | None = None,
    freezes: Freezes | None = None,
    sparse_files: SparseFiles | None = None,
    target: NvmeTarget | None = None,
    clock: Clock = SYSTEM_CLOCK,
) -> Iterator[Manager]:
    manager = Manager(settings, loops or FakeLoopDevices(), headers, reflinks, freezes, sparse_files, target, clock)
    try:
        yield manager
    finally:
        manager.server.stop()
