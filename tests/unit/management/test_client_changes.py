# SPDX-License-Identifier: Apache-2.0
"""Requests and results of encryption and changes of a volume, and the state in responses."""

from __future__ import annotations

from dataclasses import replace
from typing import cast

import pytest

from csi_driver.deadline import Deadline
from csi_driver.errors import (
    InvalidRequest,
    OperationPending,
    OutcomeUnknown,
    PreconditionFailed,
    StorageUnavailable,
    VolumeNotFound,
)
from csi_driver.management.client import ManagementClient
from csi_driver.management.codec import decode_client
from csi_driver.storage_model import Deletion, Layout, ReservationMode, Volume, VolumeChanges, VolumeOnClient
from tests.unit.management.double import Breaks, ManagementDouble, Says, Step, sample
from tests.unit.management.test_client import CLIENT, SAVE, SPEC, UPDATE, VOLUME, absent, done, refused

INIT = "/volumes/initEncryption"
PASSPHRASE = "correct horse battery"


def begin(client: ManagementClient, deadline: Deadline) -> bool:
    return client.init_encryption(VOLUME, PASSPHRASE, slot=2, key_size_bits=256, deadline=deadline)


def test_the_passphrase_is_sent_with_the_uuid(
    server: ManagementDouble, client: ManagementClient, deadline: Deadline
) -> None:
    server.on("POST", INIT, done())
    assert begin(client, deadline)
    (received,) = server.seen(INIT)
    assert received.body == [
        {"_id": VOLUME.name, "uuid": VOLUME.uuid, "passphrase": PASSPHRASE, "slot": 2, "keySize": 256}
    ]


@pytest.mark.parametrize("number", [16792, 167921, 16794])
def test_an_encryption_that_is_done_or_in_progress_returns_false(
    server: ManagementDouble, client: ManagementClient, deadline: Deadline, number: int
) -> None:
    server.on("POST", INIT, refused(14591, number))
    assert not begin(client, deadline)


@pytest.mark.parametrize(
    ("step", "failure"),
    [
        (refused(14591, 16793, message=PASSPHRASE), PreconditionFailed),
        (refused(14591, 16798, inner=PASSPHRASE), StorageUnavailable),
        (Says({"success": False, "error": {"id": 422, "innerMessage": PASSPHRASE}}, status=422), InvalidRequest),
        (Says({"passphrase": PASSPHRASE}, status=500), OutcomeUnknown),
        (Breaks(), OutcomeUnknown),
    ],
)
def test_an_error_about_a_passphrase_does_not_quote_the_server(
    server: ManagementDouble, client: ManagementClient, deadline: Deadline, step: Step, failure: type[Exception]
) -> None:
    server.on("POST", INIT, step)
    with pytest.raises(failure) as caught:
        begin(client, deadline)
    assert PASSPHRASE not in str(caught.value) + repr(vars(caught.value))
    assert len(server.seen(INIT)) == 1


def test_an_encrypted_volume_is_created_with_its_header_size(
    server: ManagementDouble, client: ManagementClient, deadline: Deadline
) -> None:
    server.on("POST", SAVE, done(), done())
    client.create_volume(replace(SPEC, vpg=None, layout=Layout(), encrypted_header_bytes=32 << 20), deadline=deadline)
    client.create_volume(replace(SPEC, encrypted_header_bytes=16 << 20), deadline=deadline)
    alone, grouped = (cast("list[dict[str, object]]", received.body)[0] for received in server.seen(SAVE))
    assert (alone["isEncrypted"], alone["encryption"]) == (True, {"headerSize": 32})
    assert (grouped["isEncrypted"], "encryption" in grouped) == (True, False)


def test_only_changed_fields_are_sent(server: ManagementDouble, client: ManagementClient, deadline: Deadline) -> None:
    server.on("POST", UPDATE, done())
    changes = VolumeChanges(description="", relative_rebuild_priority=0, target_classes=(), enable_crc_check=False)
    client.update_volume(VOLUME, changes, deadline=deadline)
    wanted = {"description": "", "relativeRebuildPriority": 0, "enableCrcCheck": False, "serverClasses": []}
    assert server.seen(UPDATE)[0].body == [{"_id": VOLUME.name, "uuid": VOLUME.uuid, **wanted}]


@pytest.mark.parametrize(
    ("ids", "failure"),
    [
        ((1677, 168412), InvalidRequest),
        ((1677, 1512), InvalidRequest),
        ((1605,), PreconditionFailed),
        ((1543,), VolumeNotFound),
        ((1582,), OperationPending),
    ],
)
def test_a_failed_change_raises_the_family_of_its_error(
    server: ManagementDouble,
    client: ManagementClient,
    deadline: Deadline,
    ids: tuple[int, ...],
    failure: type[Exception],
) -> None:
    server.on("POST", UPDATE, refused(*ids))
    server.on("GET", f"/volumes/{VOLUME.name}", absent(1543))
    with pytest.raises(failure):
        client.update_volume(VOLUME, VolumeChanges(description="x"), deadline=deadline)


def test_a_warning_with_success_true_is_an_error(
    server: ManagementDouble, client: ManagementClient, deadline: Deadline
) -> None:
    answer = {"_id": VOLUME.name, "uuid": VOLUME.uuid, "success": True, "error": {"id": 1603}, "payload": None}
    server.on("POST", UPDATE, Says([answer]))
    with pytest.raises(PreconditionFailed):
        client.update_volume(VOLUME, VolumeChanges(description="x"), deadline=deadline)


def stated(**state: object) -> Says:
    """Return a success with the state after the change, as the embedded manager answers."""
    return Says([{"_id": VOLUME.name, "uuid": VOLUME.uuid, "success": True, "error": None, "payload": state}])


def attached(client: ManagementClient, deadline: Deadline) -> VolumeOnClient | None:
    mode = ReservationMode.EXCLUSIVE_READ_WRITE
    return client.attach(CLIENT, VOLUME, mode=mode, reference_id=None, deadline=deadline)


def test_the_state_in_the_response_to_a_change_is_returned(
    server: ManagementDouble, client: ManagementClient, deadline: Deadline
) -> None:
    server.on("POST", SAVE, stated(volume=sample("volume")))
    server.on("POST", "/clients/attach", stated(volume=sample("volume"), client=sample("client")))
    server.on("POST", "/volumes/delete", stated(volume=None))
    assert client.create_volume(SPEC, deadline=deadline) == VOLUME
    assert attached(client, deadline) == VolumeOnClient(VOLUME, decode_client(sample("client"), VOLUME.uuid))
    assert client.delete_volume(VOLUME, deadline=deadline) is Deletion.DONE


def test_a_response_to_a_change_without_state_says_that_it_must_be_read(
    server: ManagementDouble, client: ManagementClient, deadline: Deadline
) -> None:
    server.on("POST", SAVE, done())
    server.on("POST", "/clients/attach", done())
    server.on("POST", "/volumes/delete", done())
    assert not isinstance(client.create_volume(SPEC, deadline=deadline), Volume)
    assert attached(client, deadline) is None
    assert client.delete_volume(VOLUME, deadline=deadline) is Deletion.BEGUN


@pytest.mark.parametrize("other", ["volume", "client"])
def test_the_state_of_another_object_is_not_returned(
    server: ManagementDouble, client: ManagementClient, deadline: Deadline, other: str
) -> None:
    state = {name: dict(sample(name)) for name in ("volume", "client")}
    state[other]["uuid"] = "00000000-0000-1000-8000-000000000000"
    server.on("POST", "/clients/attach", stated(**state))
    assert attached(client, deadline) is None
