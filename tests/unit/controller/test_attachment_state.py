# SPDX-License-Identifier: Apache-2.0
"""The state of an attachment in a client's document: missing, detaching, released."""

from __future__ import annotations

import pytest

from csi_driver.controller.fencing import is_detaching, is_release_recorded, is_released, missing
from csi_driver.controller.volume_lookup import Located
from csi_driver.controller.volume_metadata import Creation
from csi_driver.model import VolumeHandle
from csi_driver.storage_model import (
    Client,
    ClientStatus,
    DesiredAttachment,
    DeviceReport,
    DeviceStatus,
    ReservationMode,
    Volume,
)
from tests.fakes.management import FakeManagement

UUID = "11111111-2222-3333-4444-555555555555"
VOLUME = Volume("v", UUID, 262144, 4096, 1.1, "online", "none")
HANDLE = VolumeHandle("v", "z", UUID, "team-a")
LOCATED = Located("z", VOLUME, Creation(), FakeManagement(), HANDLE.format(), HANDLE)
EXCLUSIVE, NONE, READ = (ReservationMode.EXCLUSIVE_READ_WRITE, ReservationMode.NONE, ReservationMode.SHARED_READ_ONLY)
OURS, THEIRS = frozenset({"team-a"}), frozenset({"team-b"})


def report(
    status: DeviceStatus = DeviceStatus.ATTACHED,
    *,
    io: bool = True,
    mode: ReservationMode = EXCLUSIVE,
    references: frozenset[str] | None = OURS,
) -> DeviceReport:
    return DeviceReport(UUID, "v", status, io, mode, references)


def desired(action: str = "attaching", references: frozenset[str] = OURS) -> DesiredAttachment:
    return DesiredAttachment(UUID, "v", action, EXCLUSIVE, references)


def client(
    wanted: DesiredAttachment | None = None, told: DeviceReport | None = None, status: ClientStatus = ClientStatus.READY
) -> Client:
    entries = {UUID: wanted} if wanted is not None else {}
    return Client("node-1", "c", status, entries, {UUID: told} if told is not None else {})


@pytest.mark.parametrize(
    ("found", "reason"),
    [
        (client(told=report()), ""),
        # A report without a reservation or references is accepted.
        (client(told=report(mode=NONE)), ""),
        (client(told=report(references=None)), ""),
        (client(), "the attachment (the client reports no device)"),
        (client(told=report(DeviceStatus.ATTACHING)), "the attachment (device attaching)"),
        (client(told=report(DeviceStatus.ATTACH_FAILED)), "the attachment (device attach_failed)"),
        (
            client(told=report(DeviceStatus.RESERVATION_DENIED)),
            "the reservation (device reservation_denied, held as exclusive_read_write)",
        ),
        (client(told=report(mode=READ)), "the reservation (device attached, held as shared_read_only)"),
        (client(told=report(io=False)), "I/O on the attached device (it is disabled)"),
        (client(told=report(references=THEIRS)), "the reference team-a on the attached device"),
        (client(told=report(), status=ClientStatus.DOWN), "the attachment (the storage client is down)"),
    ],
)
def test_what_an_attachment_lacks_is_named(found: Client, reason: str) -> None:
    assert missing(found, LOCATED, EXCLUSIVE) == reason


@pytest.mark.parametrize(
    ("found", "is_gone"),
    [
        (client(), True),
        (client(told=report(DeviceStatus.DETACHED)), True),
        (client(told=report(DeviceStatus.DETACHED, references=None)), True),
        (client(told=report(DeviceStatus.DETACHED, references=frozenset())), True),
        (client(told=report(DeviceStatus.DETACHED_AFTER_SHUTDOWN)), True),
        (client(told=report(DeviceStatus.RESERVATION_DENIED)), True),
        (client(told=report()), False),
        (client(told=report(DeviceStatus.BUSY, references=None)), False),
        (client(desired("detaching", frozenset()), report(DeviceStatus.DETACHING)), False),
        (client(desired("detaching", frozenset())), False),
        (client(desired(), report()), False),
        # Others on the node still have it: our reference alone has to be gone.
        (client(desired(references=THEIRS), report(references=THEIRS)), True),
        (client(desired(references=THEIRS), report(references=None)), True),
        (client(desired(references=THEIRS), report(references=frozenset())), True),
        (client(desired(references=THEIRS), report(references=OURS | THEIRS)), False),
    ],
)
def test_a_hold_is_over_when_reference_and_device_are_gone(found: Client, is_gone: bool) -> None:
    assert is_released(found, LOCATED) is is_gone


@pytest.mark.parametrize(
    ("wanted", "recorded"),
    [(None, True), (desired("detaching"), True), (desired(references=THEIRS), True), (desired(), False)],
)
def test_a_release_is_recorded_when_the_reference_is_gone(wanted: DesiredAttachment, recorded: bool) -> None:
    assert is_release_recorded(client(wanted, report()), LOCATED) is recorded


@pytest.mark.parametrize(
    ("found", "leaving"),
    [
        (client(), False),
        (client(desired(), report()), False),
        (client(desired("detaching"), report()), True),
        (client(told=report()), True),
        (client(told=report(DeviceStatus.DETACHED)), False),
        (client(told=report(DeviceStatus.ATTACH_FAILED)), False),
    ],
)
def test_a_device_without_a_desired_is_on_its_way_out(found: Client, leaving: bool) -> None:
    assert is_detaching(found, UUID) is leaving
