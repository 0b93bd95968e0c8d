"""What is sent for encryption and for changes of a volume, and what is made of the answers."""

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
from csi_driver.storage_model import Layout, VolumeChanges
from tests.unit.management.double import Breaks, ManagementDouble, Says, Step
from tests.unit.management.test_client import SAVE, SPEC, UPDATE, VOLUME, absent, done, refused

INIT = "/volumes/initEncryption"
PASSPHRASE = "correct horse battery"


def begin(client: ManagementClient, deadline: Deadline) -> bool:
    return client.init_encryption(VOLUME, PASSPHRASE, slot=2, key_size_bits=256, deadline=deadline)


def test_the_passphrase_goes_to_this_very_volume(
    server: ManagementDouble, client: ManagementClient, deadline: Deadline
) -> None:
    server.on("POST", INIT, done())
    assert begin(client, deadline)
    (received,) = server.seen(INIT)
    assert received.body == [
        {"_id": VOLUME.name, "uuid": VOLUME.uuid, "passphrase": PASSPHRASE, "slot": 2, "keySize": 256}
    ]


@pytest.mark.parametrize("number", [16792, 167921, 16794])
def test_an_encryption_that_is_done_or_under_way_is_not_begun_again(
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
def test_what_a_server_says_of_a_passphrase_is_not_passed_on(
    server: ManagementDouble, client: ManagementClient, deadline: Deadline, step: Step, failure: type[Exception]
) -> None:
    server.on("POST", INIT, step)
    with pytest.raises(failure) as caught:
        begin(client, deadline)
    assert PASSPHRASE not in str(caught.value) + repr(vars(caught.value))
    assert len(server.seen(INIT)) == 1


def test_an_encrypted_volume_is_asked_for_with_its_header(
    server: ManagementDouble, client: ManagementClient, deadline: Deadline
) -> None:
    server.on("POST", SAVE, done(), done())
    client.create_volume(replace(SPEC, vpg=None, layout=Layout(), encrypted_header_bytes=32 << 20), deadline=deadline)
    client.create_volume(replace(SPEC, encrypted_header_bytes=16 << 20), deadline=deadline)
    alone, grouped = (cast("list[dict[str, object]]", received.body)[0] for received in server.seen(SAVE))
    assert (alone["isEncrypted"], alone["encryption"]) == (True, {"headerSize": 32})
    assert (grouped["isEncrypted"], "encryption" in grouped) == (True, False)


def test_only_what_is_to_be_changed_is_sent(
    server: ManagementDouble, client: ManagementClient, deadline: Deadline
) -> None:
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
def test_a_change_that_is_refused_says_what_kind_of_refusal_it_is(
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


def test_a_warning_that_comes_as_success_is_a_refusal_too(
    server: ManagementDouble, client: ManagementClient, deadline: Deadline
) -> None:
    answer = {"_id": VOLUME.name, "uuid": VOLUME.uuid, "success": True, "error": {"id": 1603}, "payload": None}
    server.on("POST", UPDATE, Says([answer]))
    with pytest.raises(PreconditionFailed):
        client.update_volume(VOLUME, VolumeChanges(description="x"), deadline=deadline)
