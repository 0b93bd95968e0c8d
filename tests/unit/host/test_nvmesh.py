# SPDX-License-Identifier: Apache-2.0
"""Parsers of the client's status files and of the serial number: complete, torn, and of other versions."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import threading
from pathlib import Path

import pytest

from csi_driver.host.connectors import nvmesh
from csi_driver.host_model import StorageClient, VolumeStatus, uuid_of_label

UUID = "01234567-89ab-cdef-0123-456789abcdef"
STATUS = {"name": "csi-1", "uuid": UUID, "type": "visible", "size[blks]": 262144, "block[b]": 4096, "debug_di": 0}


def test_the_status_of_a_volume_is_read() -> None:
    assert nvmesh.parse_volume_status(json.dumps(STATUS | {"dbg": 512})) == VolumeStatus(
        "csi-1", UUID, 1 << 30, io_enabled=True
    )


def test_unknown_fields_are_ignored() -> None:
    text = json.dumps(STATUS | {"dbg": "0x200", "status": 7, "topology": [{}], "size[blks]": "262144"})
    status = nvmesh.parse_volume_status(text)
    assert status is not None
    assert (status.uuid, status.size_bytes) == (UUID, None)


@pytest.mark.parametrize("length", range(len(json.dumps(STATUS))))
def test_a_torn_status_is_unknown(length: int) -> None:
    assert nvmesh.parse_volume_status(json.dumps(STATUS)[:length]) is None


@pytest.mark.parametrize(
    "change", [{"uuid": "x"}, {"uuid": None}, {"name": 1}, {"name": "a\nb"}, {"name": ".."}, {"type": "hidden"}]
)
def test_a_status_without_identity_is_unknown(change: dict[str, object]) -> None:
    assert nvmesh.parse_volume_status(json.dumps(STATUS | change)) is None
    assert nvmesh.parse_volume_status("[]") is None


@pytest.mark.parametrize(
    ("debug_di", "refused"),
    [(0, False), (False, False), ("0", False), ("0x0", False), (None, False), (1, True), (True, True), ("1", True),
     ("0x1", True), ("on", True), ([], True), ({"enabled": 0}, True)],
)  # fmt: skip
def test_a_debug_mode_without_writes_is_a_refusal(debug_di: object, refused: bool) -> None:
    status = nvmesh.parse_volume_status(json.dumps(STATUS | {"debug_di": debug_di}))
    assert status is not None
    assert bool(status.refusal) is refused


LIVE, LOST = {"attach_status": "Attached", "dbg": 0x200}, {"attach_status": "Attached", "dbg": 0x2A1}


@pytest.mark.parametrize(
    ("shown", "enabled"),
    [
        ({"dbg": "0x200"}, True),
        ({"dbg": 512, "status": 7}, True),
        ({"io_enabled": 1}, True),
        ({"io_enabled": 1, "attach_status": "Attached"}, True),
        (LIVE | {"io_enabled": 1}, True),
        # ATTACHED stays set after the I/O was lost.
        ({"dbg": "0x201"}, False),
        (LOST, False),
        (LOST | {"io_enabled": 0}, False),
        ({"dbg": "0x0"}, False),
        ({"io_enabled": 0, "attach_status": "Attached"}, False),
        # Suspended further, or detaching.
        ({"attach_status": "Attached"}, False),
        ({"attach_status": "Detaching"}, False),
        ({"attach_status": "???"}, False),
        # io_enabled follows some seconds later.
        (LOST | {"io_enabled": 1}, None),
        (LIVE | {"io_enabled": 0}, None),
        (LIVE | {"attach_status": "Preempted"}, None),
        # Clients older or newer than the known fields.
        ({}, None),
        ({"status": "Live, with IO"}, None),
        ({"status": "Live, with IO", "dbg": "0200"}, None),
        ({"dbg": {"flags": 0}}, None),
        ({"dbg": "0x200", "io_enabled": "yes"}, None),
    ],
)
def test_io_is_known_only_when_all_fields_agree(shown: dict[str, object], enabled: bool | None) -> None:
    status = nvmesh.parse_volume_status(json.dumps(STATUS | shown))
    assert status is not None
    assert status.io_enabled is enabled
    assert bool(status.details) is (enabled is not True)


@pytest.mark.parametrize(
    ("shown", "preempted"),
    [
        ({"attach_status": "Preempted", "dbg": "0x1092"}, True),
        ({"attach_status": "Preempted"}, True),
        ({"dbg": 0x1092, "io_enabled": 0}, True),
        # Until everything that the client shows agrees.
        ({"attach_status": "Preempted", "dbg": 0x1092, "io_enabled": 1}, False),
        ({"attach_status": "Preempted", "dbg": 0x200}, False),
        (LOST, False),
        ({"attach_status": "Detaching", "dbg": "0x400"}, False),
        ({}, False),
    ],
)
def test_a_preempted_attachment_is_recognised(shown: dict[str, object], preempted: bool) -> None:
    status = nvmesh.parse_volume_status(json.dumps(STATUS | shown))
    assert status is not None
    assert status.preempted is preempted


@pytest.mark.parametrize(
    ("shown", "refuses"),
    [
        ({}, None),
        ({"enforce_read_only": 1}, None),
        ({"reservation": "SHARED_READ_ONLY"}, True),
        ({"reservation": "SHARED_READ_ONLY", "enforce_read_only": 0}, True),
        ({"reservation": "EXCLUSIVE_READ_WRITE"}, False),
        ({"reservation": "EXCLUSIVE_READ_WRITE", "enforce_read_only": 1}, False),
        ({"reservation": "EXCLUSIVE_READ_WRITE", "dbg": "0x293"}, True),
        ({"reservation": {"mode": "SHARED_READ_ONLY"}}, None),
        ({"reservation": "Recovery Only"}, None),
    ],
)
def test_writes_are_refused_to_a_read_only_attachment_and_a_degraded_volume(
    shown: dict[str, object], refuses: bool | None
) -> None:
    status = nvmesh.parse_volume_status(json.dumps(STATUS | shown))
    assert status is not None
    assert status.refuses_writes is refuses


@pytest.mark.parametrize("size", [True, -1, 1 << 60, "262144", 1.5, None])
def test_an_invalid_size_is_unknown(size: object) -> None:
    status = nvmesh.parse_volume_status(json.dumps(STATUS | {"size[blks]": size}))
    assert status is not None
    assert status.size_bytes is None


def test_a_key_with_two_values_is_ignored() -> None:
    text = json.dumps(STATUS)
    other = UUID.replace("0", "1")
    assert nvmesh.parse_volume_status(f'{text[:-1]}, "uuid": "{other}"}}') is None
    twice = nvmesh.parse_volume_status(f'{text[:-1]}, "uuid": "{UUID}", "topo": {{"uuid": "{other}"}}}}')
    assert twice is not None
    assert twice.uuid == UUID


def test_deep_nesting_is_unknown() -> None:
    deep = "[" * 200_000 + "]" * 200_000
    assert nvmesh.parse_volume_status(f'{json.dumps(STATUS)[:-1]}, "topo": {deep}}}') is None
    assert nvmesh.parse_client_uuid(deep) is None


BLOB = (
    "encoding_version = 1\nattach_version_global = 9\nattach_version_pervol = 3\nn_strings = 2\nteam-a\nteam-b\nend\n"
)


def test_reference_ids_are_read() -> None:
    assert nvmesh.parse_reference_ids(BLOB) == ("team-a", "team-b")
    assert nvmesh.parse_reference_ids(BLOB.replace("n_strings = 2", "n_strings = 0")) == ()


@pytest.mark.parametrize(
    "text",
    [
        "", "garbage", BLOB[:60], BLOB[:80], BLOB.replace("= 1", "= 2"), BLOB.replace("= 2", "= 9"),
        BLOB.replace("team-b\nend\n", "team"), BLOB.replace("= 2", "= " + "9" * 5000), BLOB.replace("team-a", ""),
        BLOB.replace("n_strings = 2", "n_strings = -1"),
    ],
)  # fmt: skip
def test_torn_reference_ids_are_unknown(text: str) -> None:
    assert nvmesh.parse_reference_ids(text) is None


def test_the_uuid_of_the_client_is_read() -> None:
    assert nvmesh.parse_client_uuid(json.dumps({"main": {"uuid": UUID.upper()}})) == UUID
    for text in ("", "{", "[]", "{}", '{"main": []}', '{"main": {"uuid": 7}}'):
        assert nvmesh.parse_client_uuid(text) is None


def files(root: Path) -> nvmesh.StatusFiles:
    return nvmesh.StatusFiles(root / "nvmeibc", upgrade_marks=[root / "upgrade"], client_signs=[root / "nvmesh.conf"])


def test_a_file_is_read_by_one_call(tmp_path: Path) -> None:
    """A second read may return a newer file, here a second packet of a pipe."""
    path = tmp_path / "nvmeibc/volumes/csi-1/status.json"
    path.parent.mkdir(parents=True)
    os.mkfifo(path)

    def write() -> None:
        with contextlib.suppress(BrokenPipeError), path.open("wb", buffering=0) as pipe:
            fcntl.fcntl(pipe, fcntl.F_SETFL, os.O_DIRECT)
            for _ in range(2):
                pipe.write(json.dumps(STATUS).encode())

    writer = threading.Thread(target=write)
    writer.start()
    status = files(tmp_path).volume("csi-1")
    writer.join()
    assert status is not None


def test_a_status_of_many_pieces_is_read_whole(tmp_path: Path) -> None:
    path = tmp_path / "nvmeibc/volumes/csi-1/status.json"
    path.parent.mkdir(parents=True)
    path.write_text(json.dumps(STATUS | {"pieces": ["piece"] * 100_000}))
    assert files(tmp_path).volume("csi-1") is not None


def test_a_machine_without_a_client_expects_none(tmp_path: Path) -> None:
    assert files(tmp_path).client() == StorageClient(None)


@pytest.mark.parametrize(("sign", "is_upgrading"), [("nvmesh.conf", False), ("upgrade", True), ("nvmeibc", False)])
def test_an_installed_client_is_expected(tmp_path: Path, sign: str, is_upgrading: bool) -> None:
    (tmp_path / sign).mkdir()
    assert files(tmp_path).client() == StorageClient(None, is_expected=True, is_upgrading=is_upgrading)


def test_status_and_version_describe_a_client(tmp_path: Path) -> None:
    root = tmp_path / "nvmeibc"
    root.mkdir()
    (root / "status.json").write_text(json.dumps({"main": {"uuid": UUID}}))
    (tmp_path / "upgrade").touch()
    assert files(tmp_path).client() == StorageClient(UUID, is_expected=True, volume_limit=1024)
    (root / "version").write_text(json.dumps({"module": "nvmeibc", "version": "3.5.0"}))
    assert not files(tmp_path).client().problem
    (root / "version").write_text(json.dumps({"module": "nvmeibc", "version": ""}))
    assert "built wrongly" in files(tmp_path).client().problem
    (root / "version").write_text(json.dumps({"module": "embedded", "version": "3.5.0"}))
    assert files(tmp_path).client() == StorageClient(UUID, is_expected=True)


def test_the_serial_number_of_a_uuid_has_twenty_of_its_digits() -> None:
    assert nvmesh.serial_of(UUID) == "0123456789ab4567cdef"


def test_the_serial_number_page_is_parsed() -> None:
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
def test_only_a_label_with_a_uuid_names_a_volume(label: str, uuid: str | None) -> None:
    assert uuid_of_label(label) == uuid
