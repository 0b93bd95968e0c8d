"""A storage manager without HTTP for tests: requests are routed, checked and answered as over HTTP."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeAlias
from urllib.parse import parse_qsl, urlsplit

from csi_driver.embedded.api import Call
from csi_driver.embedded.ports import LoopDevices, LuksHeaders
from csi_driver.embedded.refusals import SchemaRefusal
from csi_driver.embedded.server import StorageServer
from csi_driver.embedded.settings import ClientSettings, StorageSettings
from csi_driver.embedded.web import perform
from tests.unit.embedded.fake_loops import FakeLoopDevices

Json: TypeAlias = Any
"""A decoded answer."""
GB = 1_000_000_000
CONCATENATED = "DEFAULT_CONCATENATED_VPG"


def settings_in(directory: Path, **changes: Json) -> StorageSettings:
    """Return settings of a pool of 100 GB with the clients node-1 and node-2."""
    clients = tuple(ClientSettings.under(name, directory / name) for name in ("node-1", "node-2"))
    defaults = StorageSettings(
        directory / "pool", clients=clients, size_bytes=100 * GB, overcommit=True, reserve_bytes=0, listen_port=0
    )
    return replace(defaults, **changes)


class Manager:
    """One manager; `loops` is the kernel, which outlives it."""

    def __init__(self, settings: StorageSettings, loops: LoopDevices, headers: LuksHeaders | None = None) -> None:
        self.server = StorageServer(settings, loops, headers)
        self._routes = self.server.api.routes()

    def request(self, method: str, target: str, body: object = None) -> Json:
        parts = urlsplit(target)
        for route in self._routes:
            pattern = re.sub(r"\{(\w+)\}", r"(?P<\1>[^/]+)", route.path)
            found = re.fullmatch(pattern, parts.path)
            if found is not None and route.method == method:
                call = Call(found.groupdict(), dict(parse_qsl(parts.query)), body)
                try:
                    route.checked(body)
                    return json.loads(bytes(perform(route, call, "volumes").body))
                except SchemaRefusal as refusal:
                    return refusal.envelope()
        raise AssertionError(f"no route {method} {target}")

    def get(self, target: str) -> Json:
        return self.request("GET", target)

    def post(self, target: str, body: object) -> Json:
        return self.request("POST", target, body)

    def _one(self, target: str, item: Mapping[str, object]) -> Json:
        return _envelope(self.post(target, [item]))

    # --- volumes ---

    def save(self, name: str, capacity: float | str = 1, **fields: object) -> Json:
        item: Mapping[str, object] = {"name": name, "capacity": capacity, "VPG": CONCATENATED, **fields}
        return self._one("/volumes/save", {key: value for key, value in item.items() if value is not None})

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

    # --- clients ---

    def attach(self, volume: str, client: str = "node-1", reference: str | None = None, **reservation: object) -> Json:
        item: dict[str, object] = {"name": volume, "uuid": self.uuid(volume)}
        if reservation:
            item["reservation"] = reservation
        return self._wish("attach", client, item, reference)

    def detach(self, volume: str, client: str = "node-1", reference: str | None = None, **fields: object) -> Json:
        return self._wish("detach", client, {"name": volume, "uuid": self.uuid(volume), **fields}, reference)

    def _wish(self, verb: str, client: str, item: dict[str, object], reference: str | None) -> Json:
        if reference is not None:
            item["referenceID"] = reference
        body = {"client": client, "clientUUID": "11111111-1111-1111-1111-111111111111", "volumes": [item]}
        return _envelope(self.post(f"/clients/{verb}", body))

    def report(self, volume: str, client: str = "node-1") -> Json:
        rows = [row for row in self.get(f"/clients/{client}")["block_devices"] if row["name"] == volume]
        return rows[0] if rows else None

    def wish(self, volume: str, client: str = "node-1") -> Json:
        wishes = self.get(f"/clients/{client}")["attachments"].values()
        return next((wish for wish in wishes if wish["name"] == volume), None)

    def hold(self, kind: str) -> None:
        self.server.api.hold(kind, held=True)

    def release(self, kind: str) -> None:
        self.server.api.hold(kind, held=False)

    def die(self) -> None:
        """End as kill -9 does: nothing more is written; the kernel drops locks and descriptors."""
        self.server.store.close()
        self.server.pool.close()
        self.server._listener.close()


def _envelope(answer: Json) -> Json:
    """Return what a request for one object is answered, or what a request that failed as a whole is."""
    return answer[0] if isinstance(answer, list) else answer


@contextmanager
def running(
    settings: StorageSettings, loops: LoopDevices | None = None, headers: LuksHeaders | None = None
) -> Iterator[Manager]:
    manager = Manager(settings, loops or FakeLoopDevices(), headers)
    try:
        yield manager
    finally:
        manager.server.stop()
