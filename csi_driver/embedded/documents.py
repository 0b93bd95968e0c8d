# SPDX-License-Identifier: Apache-2.0
"""Answers of the API: envelopes, errors, documents of volumes, clients, VPGs and targets, and lists of them. Pure.

Documents have the fields that the driver and its tools read.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

from csi_driver.embedded.layouts import BLOCK_SIZE, Layout
from csi_driver.embedded.model import (
    DOWN,
    READY,
    Attachment,
    Client,
    Document,
    Encryption,
    Part,
    Report,
    Snapshot,
    SnapshotGroup,
    Volume,
)
from csi_driver.embedded.settings import StorageSettings
from csi_driver.errors import DriverError
from csi_driver.nvme_model import NvmeExport

API_VERSION = "18.0.0"
VERSION = "3.5.0-1.embedded"

VOLUME_NOT_FOUND = 1543
CLIENT_NOT_FOUND = 1608
GROUP_NOT_FOUND = 16220

# Of this manager alone; NVMesh has no such operations.
SNAPSHOT_EXISTS, SNAPSHOT_NOT_FOUND, NOT_SUPPORTED, TOO_MANY_EXTENTS, NO_SNAPSHOT_SPACE = range(91001, 91006)
SOURCE_BUSY, GROUP_MEMBER, NOT_FREEZABLE, SOURCE_NOT_USABLE, SNAPSHOT_GROUP_NOT_FOUND = range(91006, 91011)
SMALLER_THAN_SOURCE, SOURCE_DIFFERS, IN_USE, NO_FREE_PORT = range(91011, 91015)


class ApiError(DriverError):
    """A refused operation; the API answers it with HTTP 200, `success: false` and `error.id`."""

    def __init__(self, number: int, message: str, inner: object = None) -> None:
        self.error = detail(number, message)
        if inner is not None:
            self.error["innerMessage"] = inner
        super().__init__(f"{number}: {message}")


def detail(number: int, message: str, **keys: object) -> Document:
    return {"message": message, "id": number, **keys}


def envelope(
    key: str | None, identity: str | None, success: bool, error: object = None, payload: object = None
) -> Document:
    """Return the five keys of each answer that is neither a list nor a document."""
    return {"_id": key, "uuid": identity, "success": success, "error": error, "payload": payload}


def failure(number: int, message: str, **keys: object) -> Document:
    """Return the envelope of a request that failed as a whole."""
    return envelope(None, None, False, detail(number, message, **keys))


def volume_document(volume: Volume) -> Document:
    """Return a volume's document, without the placement of its blocks."""
    reservation = volume.reservation
    document: Document = {
        "allowAllocationOnOfflineDrives": False,
        "isReadOnly": False,
        "metadata": {},
        **volume.given,
        "_id": volume.name,
        "name": volume.name,
        "uuid": volume.uuid,
        "capacity": volume.capacity,
        "blockSize": BLOCK_SIZE,
        "blocks": volume.blocks,
        "isReserved": False,
        "isReady": volume.ready,
        "status": volume.status,
        "health": volume.health,
        "action": volume.action,
        "reservation": {
            "mode": reservation.mode,
            "version": reservation.version,
            "reservedBy": reservation.reserved_by,
            "attachedClients": list(reservation.attached),
        },
        **replace(volume.layout, stripe_size=volume.layout.whole_stripe).parameters(),
    }
    if not volume.layout.striped and volume.layout.mirrors == 0:
        document["numberOfMirrors"] = 0
    if volume.group is not None:
        document |= {"VPG": volume.group, "diskClasses": [], "serverClasses": [], "allowOverflow": True}
    else:
        document["isEncrypted"] = False
    if volume.encryption is not None:
        document |= {"isEncrypted": True, "encryption": _encryption(volume.encryption)}
    if volume.has_private_readers:
        document["privateReaders"] = True
    return document


def _encryption(state: Encryption) -> Document:
    document: Document = {"headerSize": state.header_mib}
    if state.initialized:
        document["isInitialized"] = True
    if state.command:
        document["command"] = state.command
    return document


def snapshot_document(snapshot: Snapshot) -> Document:
    document: Document = {
        "metadata": {},
        **snapshot.given,
        "_id": snapshot.name,
        "name": snapshot.name,
        "uuid": snapshot.uuid,
        "volume": {"_id": snapshot.volume, "uuid": snapshot.volume_uuid},
        "sourceMetadata": snapshot.source_metadata,
        "blockSize": BLOCK_SIZE,
        "blocks": snapshot.blocks,
        "created": snapshot.created,
        "action": snapshot.action,
        "isReady": snapshot.is_ready,
        "extents": snapshot.extents,
        "group": None if snapshot.group is None else {"_id": snapshot.group, "uuid": snapshot.group_uuid},
        "isEncrypted": snapshot.encryption is not None,
    }
    if snapshot.encryption is not None:
        document["encryption"] = _encryption(snapshot.encryption)
    return document


def snapshot_group_document(group: SnapshotGroup, members: Iterable[Snapshot]) -> Document:
    return {
        "metadata": {},
        **group.given,
        "_id": group.name,
        "name": group.name,
        "uuid": group.uuid,
        "created": group.created,
        "action": group.action,
        "isReady": group.is_ready,
        "snapshots": [snapshot_document(member) for member in members],
    }


def client_document(
    client: Client, reports: list[Report], attachments: list[Attachment], *, down: bool, on_demand: bool = False
) -> Document:
    """Return a client's document. `on_demand`: the client is a node's NVMe host, which connects for each volume."""
    document: Document = {
        "_id": client.name,
        "clientID": client.name,
        "uuid": client.uuid,
        "health": "critical" if down else "healthy",
        "client_status": DOWN if down else READY,
        "block_devices": [report.part for report in reports],
        "attachments": {attachment.uuid: attachment.part for attachment in attachments},
    }
    return {**document, "connects": "on-demand"} if on_demand else document


def export_document(export: NvmeExport) -> Document:
    return {"nqn": export.nqn, "paths": list(export.paths), "blockBytes": export.block_bytes}


def client_text(value: object) -> str:
    """Return a client's document, or a value in it, as JSON made of the texts of its parts."""
    # Hundreds of parts: a call for each would take most of the time.
    if isinstance(value, dict) and not isinstance(value, Part):
        texts = [f'"{key}":{each.text if isinstance(each, Part) else client_text(each)}' for key, each in value.items()]
        return "{" + ",".join(texts) + "}"
    if isinstance(value, list):
        return "[" + ",".join([each.text if isinstance(each, Part) else client_text(each) for each in value]) + "]"
    return value.text if isinstance(value, Part) else json.dumps(value)


def group_document(name: str, layout: Layout) -> Document:
    """Return the document of a VPG, which reserves no space."""
    return {"_id": name, "name": name, "capacity": 0, "allowOverflow": True, **layout.parameters()}


GROUP_USAGE: Document = {"allowOverflow": True, "allocatedBlocks": 0, "reservedBlocks": 0, "freeCapacity": None}
"""The use of a VPG's reserved space, which is empty."""


def system_info(
    database_uuid: str, why_no_snapshots: str, why_no_groups: str, why_no_changes: str, *, reclaims_space: bool
) -> Document:
    features = {
        "snapshots": not why_no_snapshots,
        "groupSnapshots": not why_no_groups,
        "changedBlocks": not why_no_changes,
        "reclaimSpace": reclaims_space,
        "reason": why_no_snapshots,
    }
    return {"version": VERSION, "APIVersion": API_VERSION, "dbUUID": database_uuid, "features": features}


def target_documents(settings: StorageSettings, total_blocks: int, available_blocks: int) -> list[Document]:
    """Return the storage targets, each with one drive and an equal share of the pool."""
    names = settings.target_names()
    total, available = total_blocks // len(names), available_blocks // len(names)
    return [_target(name, total, available) for name in names]


def _target(name: str, total_blocks: int, available_blocks: int) -> Document:
    drive: Document = {
        "diskID": f"POOL-{name}.1",
        "status": "Ok",
        "metadata_size": 8,
        "usableBlocks": total_blocks,
        "availableBlocks": available_blocks,
        "largestSegmentAvailable": {"blocks": available_blocks},
    }
    return {"_id": name, "node_id": name, "node_status": 1, "disks": [drive]}


class InvalidQuery(Exception):
    """The request is no valid one: HTTP 422."""


class QueryRefused(Exception):
    """The list cannot be made."""


_MISSING = object()
_Test = Callable[[object], bool]


@dataclass(frozen=True, slots=True)
class Query:
    """Filter, order, fields and page of a list, as `GET /<collection>/all/:page/:count` takes them.

    A filter has equality, $in and $gt, of dotted keys, and $or. Patterns ($regex) are refused: one can block the
    manager.
    """

    filter: Mapping[str, object]
    sort: Mapping[str, object]
    projection: Mapping[str, object]
    page: int
    count: int
    """Documents of a page; 0 = all."""

    @classmethod
    def parse(cls, parameters: Mapping[str, str], page: str, count: str) -> Query:
        """Decode the query string and the path. Raises InvalidQuery."""
        for text in (page, count):
            if not (text.isascii() and text.isdigit()):
                raise InvalidQuery(f"data/params: expected page and count as integers, got {page}/{count}")
        condition, sort, projection = (_json_object(parameters, name) for name in ("filter", "sort", "projection"))
        return cls(condition, sort, projection, int(page), int(count))

    def place(self, index: str = "") -> tuple[str, str] | None:
        """Return where the documents in the order of their ids begin; None for any other query.

        The id above which they begin, and the value that the field `index` must have; "" = any.
        """
        condition, value = self.filter.get("_id"), self.filter.get(index, "") if index else ""
        above = condition.get("$gt") if isinstance(condition, dict) else ""
        if not isinstance(above, str) or not isinstance(value, str):
            return None
        wanted: Document = {}
        if "_id" in self.filter:
            wanted["_id"] = {"$gt": above}
        if value:
            wanted[index] = value
        return (above, value) if self.sort == {"_id": 1} and self.filter == wanted else None

    def select(self, documents: Iterable[Document]) -> list[Document]:
        """Return the filtered and sorted page with the projected fields. Raises QueryRefused."""
        matches, project = _condition(self.filter), self.projector()
        selected = [document for document in documents if matches(document)]
        for key, direction in self.sort.items():
            if key != "_id" or direction not in (1, -1):
                raise QueryRefused(f'sort: expected {{"_id": 1}} or -1, got {key}: {direction}')
            selected.sort(key=lambda document: str(document["_id"]), reverse=direction == -1)
        if self.count:
            selected = selected[self.page * self.count : (self.page + 1) * self.count]
        return [project(document) for document in selected]

    def projector(self) -> Callable[[Document], Document]:
        """Return the function that keeps the projected fields. Raises QueryRefused."""
        if not self.projection:
            return lambda document: document
        if not all(value for key, value in self.projection.items() if key != "_id"):
            raise QueryRefused("projection: expected fields with 1, got a field with 0; name the fields to include")
        names = ["_id", *(key for key, value in self.projection.items() if value and key != "_id")]
        if any("." in name for name in names):
            return lambda document: _with(document, names)
        return lambda document: {name: document[name] for name in names if name in document}


def _json_object(parameters: Mapping[str, str], name: str) -> Mapping[str, object]:
    text = parameters.get(name)
    if not text:
        return {}
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as problem:
        raise InvalidQuery(f'data/query/{name} must match format "json"') from problem
    if not isinstance(value, dict):
        raise InvalidQuery(f"data/query/{name} must be object")
    return value


def _reach(document: object, path: Sequence[str]) -> object:
    """Return the value at a path; of a list the values in its elements, as in MongoDB."""
    for index, step in enumerate(path):
        if isinstance(document, list):
            rest = path[index:]
            if len(rest) == 1 and all(isinstance(each, dict) for each in document):
                return [each[step] for each in document if step in each]
            return [value for each in document if (value := _reach(each, rest)) is not _MISSING]
        if not isinstance(document, dict) or step not in document:
            return _MISSING
        document = document[step]
    return document


def _condition(conditions: Mapping[str, object]) -> Callable[[Document], bool]:
    """Return the test of a whole document."""
    tests = [(key.split("."), _test(wanted)) for key, wanted in conditions.items() if key != "$or"]
    ways = conditions.get("$or", [{}])
    if not isinstance(ways, list) or not ways or not all(isinstance(way, dict) and "$or" not in way for way in ways):
        raise QueryRefused("filter operator: expected $or with a list of filters without $or")
    either = [_condition(way) for way in ways] if "$or" in conditions else [lambda document: True]
    return lambda document: (
        all(test(_reach(document, path)) for path, test in tests) and any(matches(document) for matches in either)
    )


def _test(wanted: object) -> _Test:
    if not isinstance(wanted, dict) or not any(str(key).startswith("$") for key in wanted):
        return lambda value: _equal(value, wanted)
    tests = [_operator(str(name), operand) for name, operand in wanted.items()]
    return lambda value: all(test(value) for test in tests)


def _operator(name: str, operand: object) -> _Test:
    if name == "$in" and isinstance(operand, list):
        return lambda value: any(_equal(value, item) for item in operand)
    if name == "$gt":
        return lambda value: _greater(value, operand)
    raise QueryRefused(f"filter operator: expected $in with a list, $gt, or a plain value, got {name}")


def _equal(value: object, wanted: object) -> bool:
    if value is _MISSING:
        return wanted is None
    if isinstance(value, bool) != isinstance(wanted, bool):
        return False
    if isinstance(value, list) and not isinstance(wanted, list):
        return wanted in value
    return value == wanted


def _greater(value: object, wanted: object) -> bool:
    if isinstance(value, str) and isinstance(wanted, str):
        return value > wanted
    numbers = (int, float)
    if isinstance(value, numbers) and isinstance(wanted, numbers) and not isinstance(value, bool):
        return value > wanted
    return False


def _with(document: Document, names: Sequence[str]) -> Document:
    """Return the named fields; a dotted name reaches into each element of a list, as in MongoDB."""
    rests: dict[str, list[str]] = {}
    for name in names:
        head, _, rest = name.partition(".")
        rests.setdefault(head, []).append(rest)
    kept: Document = {}
    for head, below in rests.items():
        value = document.get(head, _MISSING)
        if "" in below and value is not _MISSING:
            kept[head] = value
        elif isinstance(value, dict):
            if inner := _with(value, below):
                kept[head] = inner
        elif isinstance(value, list):
            kept[head] = [_with(element, below) for element in value if isinstance(element, dict)]
    return kept
