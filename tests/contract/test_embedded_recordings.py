# SPDX-License-Identifier: Apache-2.0
"""The embedded storage manager answers the recorded requests as the management server did.

The exchanges are replayed in their order against one manager; where the server was caught between two states, the
manager is held back there. Compared: status, envelope, ids, and every field that the driver or its tools read. The
payload of a change, which is null in the recordings, is the manager's own.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import cast

import pytest
import requests

from csi_driver.embedded.server import StorageServer
from csi_driver.embedded.settings import ClientSettings, StorageSettings
from tests.storage_switches import Switches
from tests.unit.embedded.fake_loops import FakeLoopDevices
from tests.unit.embedded.fake_luks import FakeLuksHeaders

RECORDINGS = Path(__file__).parents[1] / "recordings"
FILES = ("1-session", "2-volumes", "3-attach-extend-delete", "4-reservations-vpg-snapshots")
Key = tuple[int, int]
"""File (1 to 4) and line, from 0."""

NOT_CALLED = "the driver and its tools do not call it, so the manager does not serve it"
LEFT_OUT: dict[Key, str] = {
    (1, 2): "the driver logs in with JSON, not with a form",
    (1, 5): "the manager never demands another password",
    (1, 12): "the driver always sends the header Accept",
    **dict.fromkeys(
        [(1, 6), (1, 9), (1, 11), (2, 19), (4, 51), *((4, line) for line in (*range(59, 70), 71, 72, 73))], NOT_CALLED
    ),
    **dict.fromkeys([(4, 44), (4, 45), (4, 46), (4, 47), (4, 50)], "snapshots are refused"),
    **dict.fromkeys([(4, line) for line in range(54, 59)], "VPGs are built in and have no reserved space"),
}

SHAPE_ONLY: dict[Key, str] = {
    (1, 10): "versions and host are the manager's own",
    (4, 34): "the recorded client reported once, and not again after it was preempted",
    (4, 52): "the snapshots of the recording are missing",
    (4, 70): "the snapshots and the VPG of the recording are missing",
}

# Work that is blocked (True) or released before an exchange, where the server was between two states.
HELD: dict[Key, list[tuple[str, bool]]] = {
    (3, 34): [("slow:node-1", True)],
    (3, 36): [("slow:node-1", False)],
    (3, 40): [("delete", True)],
    (3, 48): [("delete", False)],
    (3, 55): [("slow:node-1", True)],
    (4, 12): [("slow:node-1", True)],
    (4, 15): [("slow:node-1", False)],
    (3, 57): [("slow:node-1", False)],
    (4, 28): [("initialize", True), ("slow:node-1", True)],
    (4, 36): [("initialize", False), ("slow:node-1", False)],
    (4, 42): [("encrypt", True)],
}

# Fields that neither the driver nor its tools read.
NOT_SERVED = {
    "ApiRequestUUID", "attachmentReferenceID", "attachmentsVersion", "bootTime", "clientUUID", "createdBy",
    "dateCreated", "dateModified", "executingTOMA", "force", "hasIoDisabled", "hostname", "io_perm", "ipAddress",
    "is_512B_IO_allowed", "is_hidden", "lastMessageSent", "lastTransitionDate", "managementVersion", "maxReportID",
    "modifiedBy", "reportID", "vol_action", "volumeAction", "volumeID", "volumeUUID", "vpgID",
    "allocatedCapacity", "totalCapacity", "volumesInUse",
    "lastReservationVersionSentToTomaByTargetVersion", "lastVersionSentToTomaViaKafka",
    "lastVersionSentToTomaTopicName", "lastVersionSentToClientViaKafka", "chunks",
    "agentKafkaMessageSequence", "agentOriginID", "bootVersion", "branch", "changeID", "clientOriginID", "clientToken",
    "commit", "commitID", "configProfile", "createdByManagement", "docVersion", "enableNVMf",
    "featureCompatibilityVersion", "handledBy", "hasMongoClusterManagerRole", "hasMongoRootRole", "hasWIPOperations",
    "health_old", "isDev", "isMongoReplicated", "isUmClient", "kafkaMessageSequence", "keepAliveCounter",
    "lastReceivedClientKeepAlive", "lockServer", "managementAgentStatus", "managementAgentToken",
    "managementCompatibilityVersion", "managementId", "mongoVersion", "nodeVersion", "nvmfAttachmentsID",
    "protocolVersion", "rpmVersion", "selectedClientsForNvmf", "topics", "use_debug_di", "volumeVersionsSum",
    "websocketProtocolVersion",
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class Exchange:
    key: Key
    status: int
    recorded: object
    answered_status: int
    answered: object
    location: str | None


DRIVER = "driver/create-extend-modify"
"""The driver's own requests: 57 variants of CreateVolume, sizes of all layouts, expansions and changes."""
OTHER_CLUSTER = {
    "csi-f76f30bc-5ae7-a8e6": "limited to targets of the recorded cluster",
    "csi-28281880-6d7c-7add": "limited to drives of the recorded cluster",
    "csi-eefc0d1e-6f13-f1cd": "the recorded cluster has no domain of that name; the manager has no domains",
    "csi-759e8f2c-7895-173f": "the recorded cluster had too few drives for the extension",
    "csi-0a807393-a8b7-7ced": "as above",
}
"""Volumes that depend on the drives and targets of the recorded cluster."""


def recorded_lines() -> Iterator[tuple[Key, dict[str, dict[str, object]]]]:
    for number, name in enumerate(FILES, 1):
        for line, text in enumerate((RECORDINGS / f"{name}.jsonl").read_text().splitlines()):
            yield (number, line), json.loads(text)


KEYS = [key for key, _ in recorded_lines()]


class Replay:
    """Sends recorded requests, with the manager's uuids in place of the recorded ones."""

    def __init__(self, server: StorageServer) -> None:
        self._server = server
        self._switches = Switches(server)
        self._session = requests.Session()
        self._uuids: dict[str, str] = {}

    def run(self) -> Iterator[Exchange]:
        for key, line in recorded_lines():
            for kind, held in HELD.get(key, []):
                (self._switches.hold if held else self._switches.release)(kind)
            if key in LEFT_OUT:
                continue
            yield self._exchange(key, line)

    def _exchange(self, key: Key, line: dict[str, dict[str, object]]) -> Exchange:
        request, response = line["request"], line["response"]
        headers: dict[str, str | None] = dict.fromkeys(("Accept", "User-Agent", "Accept-Encoding"))
        headers |= cast("dict[str, str]", request["headers"])
        body = request["body"]
        data = None if body is None else body if isinstance(body, str) else self._ours(json.dumps(body))
        answer = self._session.request(
            str(request["method"]), self._server.url + str(request["path"]), headers=headers, data=data,
            allow_redirects=False, timeout=120,
        )  # fmt: skip
        is_json = answer.headers.get("Content-Type", "").startswith("application/json")
        answered = answer.json() if is_json else None
        recorded = response["body"]
        self._learn(recorded, answered)
        recorded = json.loads(self._ours(json.dumps(recorded)))
        return Exchange(
            key, int(str(response["status"])), recorded, answer.status_code, answered, answer.headers.get("Location")
        )

    def _learn(self, recorded: object, answered: object) -> None:
        """Map recorded uuids to ours."""
        if isinstance(recorded, list) and isinstance(answered, list):
            for one, other in zip(recorded, answered, strict=False):
                self._learn(one, other)
        elif isinstance(recorded, dict) and isinstance(answered, dict):
            theirs, ours = recorded.get("uuid"), answered.get("uuid")
            if isinstance(theirs, str) and isinstance(ours, str) and len(theirs) == len(ours) == 36:
                self._uuids.setdefault(theirs, ours)

    def _ours(self, text: str) -> str:
        for theirs, ours in self._uuids.items():
            text = text.replace(theirs, ours)
        return text


@pytest.fixture(scope="module")
def exchanges(tmp_path_factory: pytest.TempPathFactory) -> dict[Key, Exchange]:
    directory = tmp_path_factory.mktemp("replay")
    pool = directory / "pool"
    pool.mkdir()
    (pool / "password").write_text("admin\n")
    settings = StorageSettings(
        pool,
        clients=(ClientSettings.under("node-1", directory / "1"), ClientSettings.under("node-2", directory / "2")),
        size_bytes=4_791_620_000_000,
        overcommit=True,
        listen=("127.0.0.1", 0),
        pretend_targets=3,
    )
    server = StorageServer(settings, FakeLoopDevices(), FakeLuksHeaders())
    server.start()
    try:
        return {exchange.key: exchange for exchange in Replay(server).run()}
    finally:
        server.stop()


def kind_of(value: object) -> str:
    if isinstance(value, bool):
        return "boolean"
    if isinstance(value, int | float):
        return "number"
    return {str: "text", list: "list", dict: "object", type(None): "null"}[type(value)]


def differences(recorded: object, answered: object, at: str = "", *, values: bool = True) -> Iterator[str]:
    """Yield the differences of the answer from the recording."""
    if kind_of(recorded) != kind_of(answered):
        if values or (recorded is not None and answered is not None):
            yield f"{at}: {answered!r} is no {kind_of(recorded)}"
    elif isinstance(recorded, dict) and isinstance(answered, dict):
        yield from object_differences(recorded, answered, at, values=values)
    elif isinstance(recorded, list) and isinstance(answered, list):
        if values and len(recorded) != len(answered):
            yield f"{at}: {len(answered)} items, expected {len(recorded)}"
        for index, (one, other) in enumerate(zip(recorded, answered, strict=False)):
            yield from differences(one, other, f"{at}/{index}", values=values)
    elif values and recorded not in (answered, "undefined"):
        yield f"{at}: {answered!r}, expected {recorded!r}"


def object_differences(
    recorded: dict[str, object], answered: dict[str, object], at: str, *, values: bool
) -> Iterator[str]:
    for name, value in recorded.items():
        if name in NOT_SERVED or name.startswith(("volumeID(", "volumeUUID(")):
            continue
        if name == "payload" and value is None:
            continue  # the manager answers a change with the state after it
        if (
            name in ("version", "RAIDLevel", "clientID", "VPG")
            and name not in answered
            and is_unread(name, at, recorded)
        ):
            continue
        if name not in answered:
            yield f"{at}/{name}: missing"
        elif name == "message":
            yield from differences("", answered[name], f"{at}/{name}", values=False)
        elif name in ("innerMessage", "err", "error") and value == "":
            yield from differences(value, answered[name], f"{at}/{name}", values=False)
        else:
            release = name == "version" and isinstance(value, str)
            by_value = values and not release
            yield from differences(value, answered[name], f"{at}/{name}", values=by_value)
    if values:
        for name in answered.keys() - recorded.keys():
            yield f"{at}/{name}: not in the recording"


def is_unread(name: str, at: str, recorded: dict[str, object]) -> bool:
    """Return whether nobody reads a field at this place, although a field of this name is read elsewhere."""
    match name:
        case "version":
            return not at.endswith("/reservation")
        case "clientID" | "VPG":
            return "_id" not in recorded
        case "RAIDLevel":
            return "name" not in recorded
    return False


def without_deleted(body: object) -> object:
    """Leave out the reports on vol1: the manager forgets them with the volume, the server never."""
    if isinstance(body, dict) and isinstance(body.get("block_devices"), list):
        rows = [row for row in body["block_devices"] if row["name"] != "vol1"]
        return {**body, "block_devices": rows}
    return body


@pytest.mark.parametrize("key", [key for key in KEYS if key not in LEFT_OUT], ids=lambda key: f"{key[0]}-{key[1]}")
def test_recorded_request_is_answered_as_recorded(exchanges: dict[Key, Exchange], key: Key) -> None:
    exchange = exchanges[key]
    assert exchange.answered_status == exchange.status
    if exchange.status == 302:
        assert exchange.location == "/login"
        return
    if exchange.recorded == "" and exchange.status >= 400:
        return
    recorded = without_deleted(exchange.recorded) if key >= (3, 48) else exchange.recorded
    found = list(differences(recorded, exchange.answered, values=key not in SHAPE_ONLY))
    assert not found, "\n".join(found)


def test_every_recorded_exchange_is_replayed_or_left_out_for_a_reason(exchanges: dict[Key, Exchange]) -> None:
    assert len(KEYS) == 167
    assert set(KEYS) == set(exchanges) | set(LEFT_OUT)
    assert not set(exchanges) & set(LEFT_OUT)
    assert all(LEFT_OUT.values())
    assert all(SHAPE_ONLY.values())


@pytest.fixture(scope="module")
def driver(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[StorageServer, requests.Session]]:
    """Return a manager as large as the recorded cluster, and a session on it."""
    pool = tmp_path_factory.mktemp("driver")
    (pool / "password").write_text("admin\n")
    settings = StorageSettings(
        pool, clients=(ClientSettings.under("node-1", pool / "client"),), size_bytes=400_000_000_000_000,
        overcommit=True, listen=("127.0.0.1", 0), pretend_targets=20,
    )  # fmt: skip
    server = StorageServer(settings, FakeLoopDevices(), FakeLuksHeaders())
    server.start()
    session = requests.Session()
    session.headers["Accept"] = "application/json"
    session.post(f"{server.url}/login", json={"username": "admin@nvidia.com", "password": "admin"}, timeout=120)
    yield server, session
    server.stop()


def error_ids(envelope: object) -> list[object]:
    """Return the ids of an envelope's error, outermost first."""
    ids, link = [], envelope.get("error") if isinstance(envelope, dict) else None
    while isinstance(link, dict):
        ids.append(link.get("id"))
        link = link.get("innerMessage")
    return ids


def test_the_drivers_requests_get_the_recorded_volumes_and_refusals(
    driver: tuple[StorageServer, requests.Session],
) -> None:
    server, session = driver
    ours: dict[str, str] = {}
    found: list[str] = []
    compared = 0
    for text in (RECORDINGS / f"{DRIVER}.jsonl").read_text().splitlines():
        line = json.loads(text)
        request, recorded = line["request"], line["response"]["body"]
        if any(name in json.dumps(request) for name in OTHER_CLUSTER):
            continue
        sent = json.dumps(request["body"])
        for theirs, uuid in ours.items():
            sent = sent.replace(theirs, uuid)
        answer = session.request(
            request["method"], server.url + request["path"], data=sent if request["body"] else None, timeout=120,
            headers={"Content-Type": "application/json"},
        )  # fmt: skip
        answered = answer.json()
        rows = zip(recorded, answered, strict=True) if isinstance(recorded, list) else [(recorded, answered)]
        for one, other in rows:
            if isinstance(one.get("uuid"), str) and isinstance(other.get("uuid"), str):
                ours.setdefault(one["uuid"], other["uuid"])
            keys = (
                ("success",) if "success" in one else ("blocks", "capacity", "RAIDLevel", "stripeWidth", "stripeSize")
            )
            pairs = [(one.get(key), other.get(key)) for key in keys] + [(error_ids(one), error_ids(other))]
            compared += 1
            if any(theirs != mine for theirs, mine in pairs):
                found.append(f"{request['method']} {request['path']} {sent}: {pairs}")
    assert not found, "\n".join(found)
    assert compared > 200


def test_every_volume_that_is_left_out_is_in_the_recording() -> None:
    text = (RECORDINGS / f"{DRIVER}.jsonl").read_text()
    assert all(name in text and reason for name, reason in OTHER_CLUSTER.items())


def test_no_message_text_is_kept_in_the_recordings() -> None:
    def texts(value: object) -> Iterator[object]:
        if isinstance(value, dict):
            if "message" in value:
                yield value["message"]
            for inner in value.values():
                yield from texts(inner)
        elif isinstance(value, list):
            for inner in value:
                yield from texts(inner)

    lines = [json.loads(line) for file in RECORDINGS.rglob("*.jsonl") for line in file.read_text().splitlines()]
    assert len(lines) > 600
    assert {text for line in lines for text in texts(line["response"]["body"])} == {""}
