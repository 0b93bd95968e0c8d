"""The management client understands what a real management server was recorded to answer."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest

from csi_driver.management.documents import decode_client, decode_volume
from csi_driver.management.failures import CREATE_FAILED, Meaning, Operation, meaning_of, refusal_in
from csi_driver.storage_model import DeviceStatus

RECORDINGS = Path(__file__).parents[1] / "recordings"
OPERATIONS = {
    "/volumes/save": Operation.CREATE,
    "/volumes/extend": Operation.EXTEND,
    "/volumes/delete": Operation.DELETE,
    "/volumes/update": Operation.UPDATE,
    "/clients/attach": Operation.ATTACH,
    "/clients/detach": Operation.DETACH,
}
Exchange = tuple[str, str, object]
"""Method, path without its query, body of the answer."""


def exchanges() -> Iterator[Exchange]:
    for file in sorted(RECORDINGS.glob("*.jsonl")):
        for line in file.read_text().splitlines():
            recorded = json.loads(line)
            path = recorded["request"]["path"].partition("?")[0]
            yield recorded["request"]["method"], path, recorded["response"]["body"]


def found(path_start: str) -> list[dict[str, object]]:
    """Return the documents that were answered to a GET of one object."""
    return [
        body
        for method, path, body in exchanges()
        if method == "GET"
        and path.startswith(path_start)
        and path.count("/") == 2
        and isinstance(body, dict)
        and "success" not in body
    ]


def with_its_text(row: dict[str, object]) -> dict[str, object]:
    """Put back the one text that has a meaning: the recordings carry none."""
    error = row["error"]
    if isinstance(error, dict) and error["id"] == CREATE_FAILED and error.get("innerMessage") == "":
        return {**row, "error": {**error, "innerMessage": "Failed to allocate"}}
    return row


def refusals() -> list[tuple[Operation, dict[str, object]]]:
    """Return the envelopes that carry an error, with the operation that they answer."""
    return [
        (OPERATIONS[path], with_its_text(row))
        for _, path, body in exchanges()
        if path in OPERATIONS
        for row in (body if isinstance(body, list) else [body])
        if isinstance(row, dict) and row.get("error")
    ]


def test_there_are_recordings() -> None:
    assert len(found("/volumes/")) > 10
    assert len(found("/clients/")) > 10
    assert len(refusals()) > 30


def test_every_recorded_volume_is_understood() -> None:
    for row in found("/volumes/"):
        volume = decode_volume(row)
        assert (volume.name, volume.uuid) == (row["_id"], row["uuid"])


def test_every_recorded_client_is_understood() -> None:
    for row in found("/clients/"):
        client = decode_client(row)
        assert set(client.wishes) == set(row["attachments"])  # type: ignore[call-overload]
        assert all(report.status is not DeviceStatus.OTHER for report in client.devices.values())


@pytest.mark.parametrize(("operation", "row"), refusals(), ids=lambda value: str(value) if value is Operation else None)
def test_every_recorded_refusal_has_a_meaning(operation: Operation, row: dict[str, object]) -> None:
    refusal = refusal_in(row)
    assert refusal is not None
    assert meaning_of(operation, refusal)[0] is not Meaning.TROUBLE
