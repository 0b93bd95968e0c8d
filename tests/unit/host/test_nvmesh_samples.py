# SPDX-License-Identifier: Apache-2.0
"""Recorded status files of a real client, and every status that its source can print."""

from __future__ import annotations

import json
from pathlib import Path
from typing import cast

import pytest

from csi_driver.host.connectors import nvmesh
from csi_driver.host.connectors.nvmesh import DeviceEvidence
from csi_driver.host_model import Device, StorageClient, VolumeStatus
from csi_driver.model import VolumeHandle
from csi_driver.node.mount_owner import AttachmentState, attachment_state
from csi_driver.node.ports import Devices

SAMPLES = Path(__file__).parents[2] / "recordings/nvmesh-client"
NAME, UUID = "csi-1234567890abcdef12", "7f0e2a10-5b1c-11f1-8a3e-0123456789ab"
WRITES, READS, NOT_READY, FENCED, NO_VOLUME = "ready for writing", "ready for reading", "not ready", "fenced", "none"
STATES = {
    "attaching-no-io": NOT_READY,
    "degraded-read-only": READS,
    "detaching": NOT_READY,
    "hidden-recovery": NO_VOLUME,
    "io-lost": NOT_READY,
    "only-recovery": NOT_READY,
    "preempted": FENCED,
    "ro-attach-live": READS,
    "rw-live": WRITES,
    "rw-unprotected": WRITES,
    "suspended": NOT_READY,
    "suspended-no-topology": NOT_READY,
}
GENERATIONS = ("A", "B")


def status_of(state: str, generation: str) -> VolumeStatus | None:
    return nvmesh.parse_volume_status((SAMPLES / f"volumes/{generation}-{state}.json").read_text())


class Shown:
    """A client with a status, and the reference ids of the sample."""

    def __init__(self, status: VolumeStatus | None) -> None:
        self._status = status

    def client(self) -> StorageClient:
        return StorageClient("c", is_expected=True)

    def status(self, name: str) -> VolumeStatus | None:
        return self._status

    def connection(self, name: str) -> None:
        """Of a storage client's volumes none is connected by the node."""

    def reference_ids(self, name: str) -> tuple[str, ...] | None:
        return nvmesh.parse_reference_ids((SAMPLES / "blob.txt").read_text())

    def find(self, name: str, uuid: str | None = None) -> Device | None:
        raise AssertionError("the device of a volume of which the client shows something need not be looked for")


def judged(status: VolumeStatus | None) -> str:
    if status is None:
        return NO_VOLUME
    assert (status.name, status.uuid, status.size_bytes, status.refusal) == (NAME, UUID, 1 << 30, "")
    state = attachment_state(cast(Devices, Shown(status)), VolumeHandle(NAME, "z", UUID, "team-a"), UUID)
    if state is AttachmentState.FENCED:
        return FENCED
    if DeviceEvidence(status, None, None, is_labelled=False).unusable(NAME) is not None:
        return NOT_READY
    return READS if status.refuses_writes else WRITES


@pytest.mark.parametrize("generation", GENERATIONS)
@pytest.mark.parametrize(("state", "judgement"), STATES.items())
def test_every_sample_has_the_expected_state(state: str, generation: str, judgement: str) -> None:
    assert judged(status_of(state, generation)) == judgement


def test_every_sample_is_covered() -> None:
    assert {path.stem for path in (SAMPLES / "volumes").iterdir()} == {f"{g}-{s}" for g in GENERATIONS for s in STATES}


@pytest.mark.parametrize("generation", GENERATIONS)
@pytest.mark.parametrize(
    "state", [state for state, judgement in STATES.items() if judgement not in (WRITES, NO_VOLUME)]
)
def test_unusable_states_have_details(state: str, generation: str) -> None:
    status = status_of(state, generation)
    assert status is not None
    assert status.details


def test_the_open_count_is_read() -> None:
    text = (SAMPLES / "client_processes").read_text()
    assert nvmesh.parse_opens(text) == 1
    # The process is still listed: closing it takes its entry away later, if at all.
    assert nvmesh.parse_opens(text.replace("opens=1", "opens=0")) == 0
    assert nvmesh.parse_opens("Processes holding handle:\nNum Processes=0, opens=0\n") == 0


def test_a_torn_list_of_openers_has_no_count() -> None:
    text = (SAMPLES / "client_processes").read_text().replace("opens=1", "opens=10")
    assert {nvmesh.parse_opens(text[:length]) for length in range(len(text))} == {None}
    assert nvmesh.parse_opens(text + "format_version: 1\ntime: 28/11/2026-14:51:00\n") == 10


def test_the_programs_that_have_the_device_open_are_named() -> None:
    text = (SAMPLES / "client_processes").read_text()
    assert nvmesh.parse_openers(text) == ("pid 4711 (mount)",)
    assert nvmesh.parse_openers("Processes holding handle:\n  0) 7 [a] b], mode=0x1f\n 1) 8 [") == ("pid 7 (a] b)",)


def test_a_program_named_like_the_count_is_ignored() -> None:
    named = "Processes holding handle:\n  0) 7 [Num Processes=0], mode=0x1f\nNum Processes=1, opens=3\n"
    assert nvmesh.parse_opens(named) == 3


def test_the_open_count_of_a_volume_is_read_from_its_directory(tmp_path: Path) -> None:
    files = nvmesh.StatusFiles(tmp_path)
    assert files.opens(NAME) is None
    (tmp_path / "volumes" / NAME).mkdir(parents=True)
    (tmp_path / "volumes" / NAME / "client_processes").write_bytes((SAMPLES / "client_processes").read_bytes())
    assert files.opens(NAME) == 1


@pytest.mark.parametrize("release", ["1", "12", "empty"])
def test_inquiry_data_identify_an_nvmesh_device(release: str) -> None:
    standard = (SAMPLES / f"client/inquiry-standard-release-{release}.bin").read_bytes()
    assert nvmesh.is_nvmesh(standard + bytes(96 - len(standard)))
    assert nvmesh.is_nvmesh(standard[:8] + b"NVMesh  " + standard[16:])
    assert not nvmesh.is_nvmesh(standard[:8] + b"ATA     " + standard[16:])
    assert not nvmesh.is_nvmesh(standard[:16] + b"Virtual disk    " + standard[32:])


def test_the_sample_serial_number_is_of_the_volume() -> None:
    page = (SAMPLES / "client/inquiry-vpd80.bin").read_bytes()
    assert nvmesh.parse_serial_page(page + bytes(96 - len(page))) == nvmesh.serial_of(UUID)


def test_the_client_samples_have_a_uuid_and_no_problem() -> None:
    assert nvmesh.parse_client_uuid((SAMPLES / "client/status.json").read_text()) == (
        "0d4c3b2a-1f0e-11f1-9abc-0123456789ab"
    )
    version = (SAMPLES / "client/version").read_text()
    assert (nvmesh.parse_client_problem(version), nvmesh.parse_volume_limit(version)) == ("", 1024)


def test_a_client_that_exits_shows_no_uuid() -> None:
    exiting = json.loads((SAMPLES / "client/status.json").read_text())
    del exiting["main"]
    assert nvmesh.parse_client_uuid(json.dumps(exiting)) is None


STATUSES = {"Attaching": 0x1, "Attached": 0x2, "Detaching": 0x4, "DetUpging": 0xC, "Preempted": 0x10}
CARRIES = {0x00: True, 0x93: True} | dict.fromkeys((0x82, 0x83, 0x84, 0x85, 0x86, 0x91, 0x92, 0xA1, 0xB1, 0xB2), False)
"""The low byte of `dbg`: no error, degraded, five steps of a restart, and the kinds of loss."""


def printed(status: str, low: int, generation: str, *, told_late: bool) -> dict[str, object]:
    """Print all fields about I/O as the client does; with `told_late` io_enabled is some seconds late."""
    shown: dict[str, object] = {"name": "csi-1", "uuid": UUID, "type": "visible"}
    if STATUSES[status] & STATUSES["Detaching"]:
        return shown
    state = (STATUSES[status] << 8) + low
    shown |= {"attach_status": status, "dbg": hex(state) if generation == "A" else state}
    if generation == "B":
        shown["io_enabled"] = int(status == "Attached" and CARRIES[low] is not told_late)
    return shown


@pytest.mark.parametrize("told_late", [False, True])
@pytest.mark.parametrize("generation", GENERATIONS)
@pytest.mark.parametrize("status", STATUSES)
def test_no_printable_status_is_read_as_its_opposite(status: str, generation: str, told_late: bool) -> None:
    for low, io in CARRIES.items():
        text = json.dumps(printed(status, low, generation, told_late=told_late))
        read, carries = nvmesh.parse_volume_status(text), status == "Attached" and io
        assert read is not None
        assert read.io_enabled in (carries, None), text
        assert told_late or "dbg" not in text or read.io_enabled is carries, text
        assert read.preempted is (status == "Preempted"), text
        assert bool(read.refuses_writes) is (status == "Attached" and low == 0x93), text
