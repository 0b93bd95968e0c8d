# SPDX-License-Identifier: Apache-2.0
"""Snapshots of the management, their groups, and changed blocks. Only the embedded manager has these routes."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from datetime import UTC, datetime, timedelta
from urllib.parse import quote, urlencode

from csi_driver.deadline import Deadline
from csi_driver.errors import SnapshotNotFound
from csi_driver.management import codec
from csi_driver.management.codec import (
    Document,
    as_documents,
    encryption_of,
    invalid_document,
    natural_of,
    object_of,
    text_of,
)
from csi_driver.management.failures import Meaning, Operation, failure_of
from csi_driver.management.requests import SORTED, Change, Requests, payload_of, projection, taken
from csi_driver.storage_model import ChangedRanges, NewMember, Snapshot, SnapshotGroup, Volume

_PROJECTION = projection((
    "_id", "uuid", "volume", "sourceMetadata", "blockSize", "blocks", "created", "isReady", "group", "isEncrypted",
    "encryption", "metadata",
))  # fmt: skip


NOT_CUT = datetime.fromtimestamp(0, UTC)


class SnapshotRequests(Requests):
    """The part of the client for snapshots."""

    def snapshot(self, name: str, *, deadline: Deadline) -> Snapshot | None:
        row = self._read(f"/snapshots/{quote(name, safe='')}", deadline, absent=Meaning.SNAPSHOT_ABSENT)
        return decode_snapshot(row) if row else None

    def snapshots(
        self, *, after: str, limit: int, volume_uuid: str | None = None, deadline: Deadline
    ) -> Iterator[Snapshot]:
        condition: dict[str, object] = {"_id": {"$gt": after}} if after else {}
        if volume_uuid is not None:
            condition["volume.uuid"] = volume_uuid.lower()
        rows = self._list("snapshots", deadline, f"{SORTED}&{_PROJECTION}", condition or None, limit)
        return map(decode_snapshot, taken(rows))

    def create_snapshot(
        self, name: str, volume: Volume, metadata: Mapping[str, object], *, deadline: Deadline
    ) -> Snapshot:
        item = encode_member(NewMember(name, volume, metadata))
        return decode_snapshot(self._cut("snapshot", item, deadline, volume.name))

    def delete_snapshot(self, name: str, uuid: str, *, deadline: Deadline) -> None:
        self._change_snapshot(Operation.REMOVE, "/snapshots/delete", {"_id": name, "uuid": uuid}, deadline)

    def snapshot_group(self, name: str, *, deadline: Deadline) -> SnapshotGroup | None:
        row = self._read(f"/snapshotGroups/{quote(name, safe='')}", deadline, absent=Meaning.SNAPSHOT_ABSENT)
        return decode_group(row) if row else None

    def create_snapshot_group(
        self, name: str, members: Sequence[NewMember], metadata: Mapping[str, object], *, deadline: Deadline
    ) -> SnapshotGroup:
        rows = [encode_member(member) for member in members]
        item = {"name": name, "metadata": dict(metadata), "members": rows}
        return decode_group(self._cut("snapshotGroup", item, deadline, ", ".join(each.volume.name for each in members)))

    def delete_snapshot_group(self, name: str, uuid: str, *, deadline: Deadline) -> None:
        self._change_snapshot(Operation.REMOVE, "/snapshotGroups/delete", {"_id": name, "uuid": uuid}, deadline)

    def changed_ranges(
        self, target: Snapshot, base: Snapshot | None, *, offset: int, count: int, deadline: Deadline
    ) -> ChangedRanges:
        query: dict[str, object] = {"uuid": target.uuid, "offset": offset, "count": count}
        if base is not None:
            query |= {"base": base.name, "baseUuid": base.uuid}
        path = f"/snapshots/changes/{quote(target.name, safe='')}?{urlencode(query)}"
        row = self._read(path, deadline, absent=Meaning.SNAPSHOT_ABSENT)
        if not row:
            either = "" if base is None else f", or its base {base.name},"
            raise SnapshotNotFound(target.name, f"it{either} was deleted")
        return decode_changes(row)

    def _cut(self, key: str, item: Mapping[str, object], deadline: Deadline, volume: str) -> Document:
        """Send a request to cut a snapshot or group, and return its document. `volume`: the names of its sources."""
        envelope = self._change_snapshot(Operation.CUT, f"/{key}s/save", item, deadline, volume)
        return codec.as_document(payload_of(envelope or {}).get(key), f"a request to {Operation.CUT} {item['name']}")

    def _change_snapshot(
        self, operation: Operation, path: str, item: Mapping[str, object], deadline: Deadline, volume: str = ""
    ) -> Document | None:
        """Send a change of a snapshot or group; None if it is to be removed and does not exist.

        After a lost answer it is sent again: the server compares name and source, or the uuid.
        """
        change = Change(path, Meaning.SNAPSHOT_ABSENT if operation is Operation.REMOVE else None, is_repeatable=True)
        envelope, error, meaning = self._send(operation, change, [item], deadline)
        if error is None:
            return envelope
        if meaning is change.accepted:
            return None
        raise failure_of(operation, error, snapshot=str(item.get("name") or item["_id"]), volume=volume)


def decode_snapshot(row: Document) -> Snapshot:
    try:
        volume, group = object_of(row["volume"], "volume"), row.get("group")
        return Snapshot(
            name=text_of(row, "_id", "name"),
            uuid=text_of(row, "uuid"),
            volume_name=text_of(volume, "_id"),
            volume_uuid=text_of(volume, "uuid"),
            size_bytes=natural_of(row, "blocks") * natural_of(row, "blockSize"),
            created=_moment(row),
            is_ready=row.get("isReady") is True,
            group_name=text_of(group, "_id") if group else None,
            group_uuid=text_of(group, "uuid") if group else None,
            source_metadata=object_of(row.get("sourceMetadata") or {}, "sourceMetadata"),
            metadata=object_of(row.get("metadata") or {}, "metadata"),
            encryption=encryption_of(row),
        )
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise invalid_document(row, f"a snapshot document that cannot be read ({error})") from error


def decode_group(row: Document) -> SnapshotGroup:
    try:
        return SnapshotGroup(
            name=text_of(row, "_id", "name"),
            uuid=text_of(row, "uuid"),
            created=_moment(row),
            snapshots=tuple(decode_snapshot(each) for each in as_documents(row.get("snapshots"), "snapshots")),
            is_ready=row.get("isReady") is True,
        )
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise invalid_document(row, f"a document of a snapshot group that cannot be read ({error})") from error


def _moment(row: Document) -> datetime:
    if row.get("isReady") is not True:
        return NOT_CUT
    moment = datetime.fromisoformat(text_of(row, "created"))
    if moment.utcoffset() != timedelta():
        raise ValueError(f"created is {row['created']!r}, not in UTC")
    return moment


def decode_changes(row: Document) -> ChangedRanges:
    try:
        return ChangedRanges(
            ranges=tuple((int(offset), int(length)) for offset, length in row["ranges"]),
            next_offset=None if row.get("next") is None else natural_of(row, "next"),
            size_bytes=natural_of(row, "bytes"),
        )
    except (KeyError, TypeError, ValueError) as error:
        raise invalid_document(row, f"changed ranges that cannot be read ({error})") from error


def encode_member(member: NewMember) -> dict[str, object]:
    """Encode a snapshot to cut."""
    volume = {"_id": member.volume.name, "uuid": member.volume.uuid}
    return {"name": member.name, "volume": volume, "metadata": dict(member.metadata)}
