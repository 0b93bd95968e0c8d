# SPDX-License-Identifier: Apache-2.0
"""The client decodes recorded responses of a real management server."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from csi_driver.controller.fencing import was_preempted
from csi_driver.controller.volume_metadata import AttachmentRecord, with_attachments
from csi_driver.errors import PreconditionFailed, StorageUnavailable
from csi_driver.management.codec import decode_client, decode_volume, decode_vpg
from csi_driver.management.failures import CREATE_FAILED, Meaning, Operation, error_in, failure_of, meaning_of
from csi_driver.storage_model import Client, ClientStatus, DeviceStatus, Volume

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


def exchanges(name: str = "**/*") -> Iterator[Exchange]:
    for file in sorted(RECORDINGS.glob(f"{name}.jsonl")):
        for line in file.read_text().splitlines():
            recorded = json.loads(line)
            path = recorded["request"]["path"].partition("?")[0]
            yield recorded["request"]["method"], path, recorded["response"]["body"]


def found(path_start: str, name: str = "**/*") -> list[dict[str, object]]:
    """Return the recorded documents of single objects."""
    return [
        body
        for method, path, body in exchanges(name)
        if method == "GET"
        and path.startswith(path_start)
        and path.count("/") == 2
        and isinstance(body, dict)
        and "success" not in body
    ]


def with_its_text(row: dict[str, object]) -> dict[str, object]:
    """Add the one text that has a meaning: the recordings have none."""
    error = row["error"]
    if isinstance(error, dict) and error["id"] == CREATE_FAILED and error.get("innerMessage") == "":
        return {**row, "error": {**error, "innerMessage": "Failed to allocate"}}
    return row


def refusals() -> list[tuple[Operation, dict[str, object]]]:
    """Return the envelopes with an error, and their operations."""
    return [
        (OPERATIONS[path], with_its_text(row))
        for _, path, body in exchanges()
        if path in OPERATIONS
        for row in (body if isinstance(body, list) else [body])
        if isinstance(row, dict) and row.get("error")
    ]


def test_recordings_exist() -> None:
    assert len(found("/volumes/")) > 10
    assert len(found("/clients/")) > 10
    assert len(refusals()) > 30


def test_every_recorded_volume_is_decoded() -> None:
    for row in found("/volumes/"):
        if "uuid" not in row:  # made in a group for metadata
            with pytest.raises(StorageUnavailable):
                decode_volume(row)
            continue
        volume = decode_volume(row)
        assert (volume.name, volume.uuid) == (row["_id"], row["uuid"])


def test_every_recorded_client_is_decoded() -> None:
    for row in found("/clients/"):
        client = decode_client(row)
        assert set(client.desired) == set(row["attachments"])  # type: ignore[call-overload]
        assert all(report.status is not DeviceStatus.OTHER for report in client.devices.values())


@pytest.mark.parametrize(("operation", "row"), refusals(), ids=lambda value: str(value) if value is Operation else None)
def test_every_recorded_error_has_a_meaning(operation: Operation, row: dict[str, object]) -> None:
    refusal = error_in(row)
    assert refusal is not None
    assert meaning_of(operation, refusal)[0] is not Meaning.SERVER_ERROR


# --- what the driver's own requests were answered ---------------------------------------------------------------------


def test_a_group_for_metadata_is_recognised() -> None:
    rows = [row for row in found("/volumeProvisioningGroups/") if "_id" in row]
    groups = {group.name: group for group in map(decode_vpg, rows)}
    assert [name for name, group in groups.items() if group.is_for_metadata] == ["DEFAULT_METADATA_RAID_1_VPG"]
    assert len(groups) > 4


def test_only_snapshots_are_decoded_as_snapshots() -> None:
    volumes = [decode_volume(row) for row in found("/volumes/", "driver/snapshots")]
    assert {volume.name for volume in volumes if volume.is_snapshot} == {"sn280669"}
    assert {volume.name for volume in volumes if not volume.is_snapshot} == {"ro80669", "sn280669_MD", "src80669"}


def test_attaching_a_snapshot_fails_permanently() -> None:
    refused = [
        failure_of(Operation.ATTACH, refusal)
        for _, path, body in exchanges("driver/snapshots")
        if path == "/clients/attach" and isinstance(body, list)
        for row in body
        if (refusal := error_in(row)) is not None and 1607 in refusal.ids
    ]
    assert refused
    assert all(isinstance(failure, PreconditionFailed) for failure in refused)


def test_the_server_reports_no_busy_device() -> None:
    """So a busy one shows as attached, and as being detached: what the driver's answers are made for."""
    clients = [decode_client(row) for row in found("/clients/", "driver/attach-busy-force-denied")]
    stood = [
        (wish.is_detaching, client.devices[uuid].status)
        for client in clients
        for uuid, wish in client.desired.items()
        if uuid in client.devices
    ]
    assert stood.count((True, DeviceStatus.ATTACHED)) > 3
    shown = {report.status for row in found("/clients/") for report in decode_client(row).devices.values()}
    assert shown <= {
        DeviceStatus.DETACHED, DeviceStatus.ATTACHED, DeviceStatus.DETACHED_AFTER_SHUTDOWN,
        DeviceStatus.RESERVATION_DENIED, DeviceStatus.UNKNOWN_VOLUME,
    }  # fmt: skip


def test_a_preempted_node_is_proven_only_after_another_node_released_the_volume() -> None:
    """node-4 had two volumes, died, and was told to give them up; each was taken over, and then given up there.

    ControllerPublishVolume records the version of an attachment that took the volume and has I/O.
    """
    volumes: dict[str, Volume] = {}
    taken: dict[str, int] = {}
    dead: Client | None = None
    proven: dict[str, list[tuple[int, bool]]] = {}
    for _, path, row in exchanges("driver/takeover"):
        if isinstance(row, dict) and path.startswith("/clients/node-") and "client_status" in row:
            client = decode_client(row)
            dead = client if client.id == "node-4" and client.status is ClientStatus.DOWN else dead
            for uuid, wish in client.desired.items():
                if wish.preempts and uuid in client.devices and client.devices[uuid].io_enabled:
                    taken[uuid] = wish.version
        elif isinstance(row, dict) and path.startswith("/volumes/csi-") and "blocks" in row:
            volume = decode_volume(row)
            volumes[volume.name] = volume
        # It came back later; the volumes are judged by its document of the time when it was down.
        if dead is None:
            continue
        for name, volume in volumes.items():
            assert not was_preempted(volume, dead)
            record = with_attachments(volume.metadata, AttachmentRecord(taken=taken.get(volume.uuid, 0)))
            judged = (volume.reservation.version, was_preempted(replace(volume, metadata=record), dead))
            if judged not in proven.setdefault(name, []):
                proven[name].append(judged)
    assert proven["csi-94e8ac28-9b80-a66b"] == [(2, False), (3, False), (4, True)]
    assert proven["csi-ba8fad40-b240-a429"] == [(3, False), (4, True)]
