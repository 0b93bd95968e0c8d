"""Answers of the API: envelopes, errors, documents of volumes, clients, VPGs and targets, and lists of them. Pure."""

from __future__ import annotations

import json
import uuid
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

from csi_driver.embedded.layouts import BLOCK_SIZE
from csi_driver.embedded.model import DOWN, READY, Attachment, Client, Document, Encryption, Group, Report, Volume
from csi_driver.embedded.settings import StorageSettings
from csi_driver.errors import DriverError

API_VERSION = "18.0.0"
VERSION = "3.5.0-1.embedded"

VOLUME_NOT_FOUND = 1543
CLIENT_NOT_FOUND = 1608
GROUP_NOT_FOUND = 16220


# --- errors -------------------------------------------------------------------------------------------------


class ApiError(DriverError):
    """A refused operation; the API answers it with HTTP 200, `success: false` and `error.id`.

    `inner` is its innerMessage. `loses_uuid`: the server names the volume's uuid "undefined" in this answer.
    """

    def __init__(
        self,
        number: int,
        message: str,
        keys: Mapping[str, object] | None = None,
        inner: object = None,
        *,
        loses_uuid: bool = False,
    ) -> None:
        self.number = number
        self.message = message
        self.keys = dict(keys or {})
        self.inner = inner
        self.loses_uuid = loses_uuid
        super().__init__(f"{number}: {message}")

    def item(self, key: str, identity: str | None) -> Document:
        """Return the envelope of one object of a mutating request."""
        error: Document = {"message": self.message, "id": self.number, **self.keys}
        if self.loses_uuid:
            identity = "undefined"
            if "volumeUUID" in error:
                error["volumeUUID"] = identity
        error["ApiRequestUUID"] = str(uuid.uuid1())
        if self.inner is not None:
            error["innerMessage"] = self.inner
        return envelope(key, identity, False, error)

    def whole(self) -> Document:
        """Return the envelope of a request that has no list of objects."""
        return failure(self.number, self.message, **self.keys)


def detail(number: int, message: str, **keys: object) -> Document:
    """Return an `innerMessage` object."""
    return {"message": message, "id": number, **keys}


def envelope(
    key: str | None, identity: str | None, success: bool, error: object = None, payload: object = None
) -> Document:
    """Return the five keys of each answer that is neither a list nor a document."""
    return {"_id": key, "uuid": identity, "success": success, "error": error, "payload": payload}


def failure(number: int, message: str, **keys: object) -> Document:
    """Return the envelope of a request that failed as a whole."""
    return envelope(None, None, False, {"message": message, "id": number, **keys})


def volume_not_found(name: str, identity: str) -> ApiError:
    return ApiError(VOLUME_NOT_FOUND, "Volume not found", {"volumeID": name, "volumeUUID": identity})


# --- volumes ------------------------------------------------------------------------------------------------


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
        "createdBy": volume.created_by,
        "modifiedBy": volume.modified_by,
        "dateCreated": volume.created,
        "dateModified": volume.modified,
        "version": volume.version,
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
            "lastTransitionDate": reservation.last_transition,
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
    return document


def _encryption(state: Encryption) -> Document:
    document: Document = {"headerSize": state.header_mib}
    if state.initialized:
        document["isInitialized"] = True
    if state.command:
        document |= {"command": state.command, "lastMessageSent": state.last_message}
    return document


# --- clients ------------------------------------------------------------------------------------------------


def client_document(client: Client, reports: list[Report], attachments: list[Attachment], *, down: bool) -> Document:
    """Return a client's document."""
    return {
        "_id": client.name,
        "clientID": client.name,
        "uuid": client.uuid,
        "health": "critical" if down else "healthy",
        "client_status": DOWN if down else READY,
        "maxReportID": client.report_id,
        "attachmentsVersion": client.attachments_version,
        "block_devices": [_block_device(report) for report in reports],
        "attachments": {attachment.uuid: _attachment(attachment) for attachment in attachments},
        "dateCreated": client.created,
        "dateModified": client.created,
        "version": VERSION,
        "hasIoDisabled": any(report.io_enabled == 0 for report in reports),
    }


def _block_device(report: Report) -> Document:
    return {
        "name": report.volume,
        "uuid": report.uuid,
        "ioEnabled": report.io_enabled,
        "vol_status": report.status,
        "vol_action": 0,
        "version": report.version,
        "reservation": {"is_512B_IO_allowed": 0, **report.reservation},
        "is_hidden": 0,
        "io_perm": 15,
        "attachmentsVersion": report.attachments_version,
        "referenceIDs": list(report.references),
        "reportID": report.report_id,
    }


def _attachment(attachment: Attachment) -> Document:
    document: Document = {
        "uuid": attachment.uuid,
        "name": attachment.volume,
        "action": attachment.action,
        "reservation": attachment.reservation,
        "attachmentsVersion": attachment.attachments_version,
        "referenceIDs": list(attachment.references),
        "version": attachment.version,
    }
    if attachment.force is not None and not attachment.is_attaching:
        document["force"] = attachment.force
    return document


# --- VPGs ---------------------------------------------------------------------------------------------------


def group_document(group: Group) -> Document:
    """Return a VPG's document. It has no reserved space."""
    return {
        "_id": group.name,
        "name": group.name,
        "uuid": group.uuid,
        "capacity": 0,
        "allowOverflow": True,
        "isDefault": group.built_in,
        "diskClasses": [],
        "serverClasses": [],
        "dateCreated": group.created,
        "dateModified": group.modified,
        "version": group.version,
        **group.given,
        **group.layout.parameters(),
    }


def group_usage(group: Group, volumes: Iterable[Volume]) -> Document:
    """Return the use of a VPG's reserved space, which is empty; `volumes` are all of the pool."""
    return {
        "allowOverflow": True,
        "allocatedCapacity": 0,
        "allocatedBlocks": 0,
        "reservedBlocks": 0,
        "freeCapacity": None,
        "volumesInUse": [{"name": each.name, "uuid": each.uuid} for each in volumes if each.group == group.name],
        "VPG": group.name,
        "totalCapacity": 0,
    }


# --- the cluster --------------------------------------------------------------------------------------------


def system_info(settings: StorageSettings, database_uuid: str) -> Document:
    return {
        "version": VERSION,
        "managementVersion": VERSION,
        "APIVersion": API_VERSION,
        "hostname": settings.host_name,
        "ipAddress": "" if isinstance(settings.listen, int) else settings.listen[0],
        "dbUUID": database_uuid,
    }


def target_documents(settings: StorageSettings, total_blocks: int, available_blocks: int) -> list[Document]:
    """Return the storage targets, each with one drive and an equal share of the pool."""
    names = settings.target_names()
    total, available = total_blocks // len(names), available_blocks // len(names)
    return [_target(name, f"POOL-{name}.1", total, available) for name in names]


def _target(name: str, drive_id: str, total_blocks: int, available_blocks: int) -> Document:
    identity = str(uuid.uuid5(uuid.NAMESPACE_DNS, name))
    drive: Document = {
        "diskID": drive_id,
        "uuid": identity,
        "nodeID": name,
        "status": "Ok",
        "health": "healthy",
        "isExcluded": False,
        "isOutOfService": False,
        "isPendingFormat": False,
        "block_size": BLOCK_SIZE,
        "metadata_size": 8,
        "blocks": total_blocks,
        "usableBlocks": total_blocks,
        "availableBlocks": available_blocks,
        "largestSegmentAvailable": {"blocks": available_blocks},
    }
    return {
        "_id": name,
        "node_id": name,
        "uuid": identity,
        "node_status": 1,
        "health": "healthy",
        "isPending": False,
        "version": VERSION,
        "disks": [drive],
    }


# --- lists --------------------------------------------------------------------------------------------------


class InvalidQuery(Exception):
    """The request is no valid one: HTTP 422."""


class QueryRefused(Exception):
    """The list cannot be made."""


_MISSING = object()
_Test = Callable[[object], bool]


@dataclass(frozen=True, slots=True)
class Query:
    """Filter, order, fields and page of a list, as `GET /<collection>/all/:page/:count` takes them.

    A filter has equality, $in and $gt, of dotted keys. Patterns ($regex) are refused: one can block the manager.
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

    def select(self, documents: Iterable[Document]) -> list[Document]:
        """Return the filtered and sorted page with the projected fields. Raises QueryRefused."""
        tests = [(key.split("."), _test(wanted)) for key, wanted in self.filter.items()]
        project = self._projector()
        selected = [document for document in documents if all(test(_reach(document, path)) for path, test in tests)]
        for key, direction in self.sort.items():
            if key != "_id" or direction not in (1, -1):
                raise QueryRefused(f'sort: expected {{"_id": 1}} or -1, got {key}: {direction}')
            selected.sort(key=lambda document: str(document["_id"]), reverse=direction == -1)
        if self.count:
            selected = selected[self.page * self.count : (self.page + 1) * self.count]
        return selected if project is None else [project(document) for document in selected]

    def with_field(self, name: str) -> Query:
        """Return the query with a further projected field."""
        return Query(self.filter, self.sort, {**self.projection, name: 1}, self.page, self.count)

    def _projector(self) -> Callable[[Document], Document] | None:
        if not self.projection:
            return None
        if not all(value for key, value in self.projection.items() if key != "_id"):
            raise QueryRefused("projection: expected fields with 1, got a field with 0; name the fields to include")
        names = [key for key, value in self.projection.items() if value]
        if self.projection.get("_id", 1) and "_id" not in names:
            names.append("_id")
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
            return [value for each in document if (value := _reach(each, path[index:])) is not _MISSING]
        if not isinstance(document, dict) or step not in document:
            return _MISSING
        document = document[step]
    return document


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
