"""What the storage client's files and the device's serial number say, whole, torn and of other versions."""

from __future__ import annotations

import json

import pytest

from csi_driver.host.connectors import loop, nvmesh

UUID = "01234567-89ab-cdef-0123-456789abcdef"
STATUS = {"name": "csi-1", "uuid": UUID, "type": "visible", "size[blks]": 262144, "block[b]": 4096, "debug_di": 0}


def test_the_status_of_a_volume_is_read() -> None:
    assert nvmesh.parse_volume_status(json.dumps(STATUS)) == nvmesh.VolumeStatus("csi-1", UUID, 1 << 30)


def test_what_other_versions_add_or_change_does_not_matter() -> None:
    text = json.dumps(STATUS | {"dbg": "0x200", "status": 7, "topology": [{}], "size[blks]": "262144"})
    status = nvmesh.parse_volume_status(text)
    assert status is not None
    assert (status.uuid, status.size_bytes) == (UUID, None)


@pytest.mark.parametrize("length", range(len(json.dumps(STATUS))))
def test_a_torn_status_says_nothing(length: int) -> None:
    assert nvmesh.parse_volume_status(json.dumps(STATUS)[:length]) is None


@pytest.mark.parametrize("change", [{"uuid": "x"}, {"uuid": None}, {"name": 1}])
def test_a_status_without_identity_says_nothing(change: dict[str, object]) -> None:
    assert nvmesh.parse_volume_status(json.dumps(STATUS | change)) is None
    assert nvmesh.parse_volume_status("[]") is None


@pytest.mark.parametrize("change", [{"type": "hidden"}, {"debug_di": 1}])
def test_a_device_that_may_not_be_used_is_told(change: dict[str, object]) -> None:
    status = nvmesh.parse_volume_status(json.dumps(STATUS | change))
    assert status is not None
    assert status.refusal


BLOB = (
    "encoding_version = 1\nattach_version_global = 9\nattach_version_pervol = 3\nn_strings = 2\nteam-a\nteam-b\nend\n"
)


def test_reference_ids_are_read() -> None:
    assert nvmesh.parse_reference_ids(BLOB) == ("team-a", "team-b")
    assert nvmesh.parse_reference_ids(BLOB.replace("n_strings = 2", "n_strings = 0")) == ()


@pytest.mark.parametrize(
    "text", ["", "garbage", BLOB[:60], BLOB[:80], BLOB.replace("= 1", "= 2"), BLOB.replace("= 2", "= 9")]
)
def test_reference_ids_that_are_torn_or_of_another_encoding_are_not_known(text: str) -> None:
    assert nvmesh.parse_reference_ids(text) is None


def test_the_uuid_of_the_client_is_read() -> None:
    assert nvmesh.parse_client_uuid(json.dumps({"main": {"uuid": UUID.upper()}})) == UUID
    for text in ("", "{", "[]", "{}", '{"main": []}', '{"main": {"uuid": 7}}'):
        assert nvmesh.parse_client_uuid(text) is None


def test_the_serial_number_of_a_uuid_has_twenty_of_its_digits() -> None:
    assert nvmesh.serial_of(UUID) == "0123456789ab4567cdef"


def test_the_page_of_the_serial_number_is_read() -> None:
    page = bytes((0, 0x80, 0, 20)) + b"0123456789AB4567CDEF" + bytes(72)
    assert nvmesh.parse_serial_page(page) == nvmesh.serial_of(UUID)
    for other in (b"", bytes(96), bytes((0, 0x83)) + page[2:], bytes((0, 0x80, 0, 0)) + bytes(92)):
        assert nvmesh.parse_serial_page(other) is None


@pytest.mark.parametrize(
    ("label", "uuid"),
    [
        (UUID, UUID),
        (f"{UUID.upper()}/0123456789abcdef", UUID),
        (f"{UUID}0", None),
        ("/tmp/01234567-89ab-cdef-0123-456789abcdef", None),
        ("", None),
    ],
)
def test_only_a_label_that_begins_with_a_uuid_names_a_volume(label: str, uuid: str | None) -> None:
    assert loop.uuid_of_label(label) == uuid
