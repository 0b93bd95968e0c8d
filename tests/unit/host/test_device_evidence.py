# SPDX-License-Identifier: Apache-2.0
"""The identity of a device by client status, label and serial number."""

from __future__ import annotations

import pytest

from csi_driver.host.connectors.nvmesh import DeviceEvidence, serial_of
from csi_driver.host_model import VolumeStatus

UUID = "01234567-89ab-cdef-0123-456789abcdef"
OTHER = "11234567-89ab-cdef-0123-456789abcdef"
STATUS = VolumeStatus("csi-1", UUID)


def claims(status: VolumeStatus | None = None, serial: str | None = None) -> DeviceEvidence:
    return DeviceEvidence(status, None, serial, is_labelled=False)


@pytest.mark.parametrize(
    ("evidence", "expected", "uuid", "proven"),
    [
        (claims(), UUID, None, False),
        (claims(), None, None, False),
        (claims(STATUS), UUID, UUID, True),
        (claims(STATUS), None, UUID, True),
        (claims(None, serial_of(UUID)), UUID, UUID, False),
        (claims(None, serial_of(UUID)), None, None, False),
        (claims(STATUS, serial_of(UUID)), UUID, UUID, True),
        (DeviceEvidence(STATUS, None, None, is_labelled=True), UUID, None, False),
        (DeviceEvidence(None, UUID, None, is_labelled=True), UUID, UUID, True),
    ],
)
def test_evidence_gives_the_uuid(
    evidence: DeviceEvidence, expected: str | None, uuid: str | None, proven: bool
) -> None:
    assert (evidence.uuid_for(expected), evidence.proves()) == (uuid, proven)
    assert evidence.against("csi-1", expected) is None


def test_another_serial_number_equals_no_uuid() -> None:
    """Without client status, a new volume under the same name differs only in the serial number."""
    evidence = claims(None, serial_of(OTHER))
    assert evidence.uuid_for(UUID) not in (None, UUID, OTHER)
    assert "another volume" in (evidence.against("csi-1", UUID) or "")


@pytest.mark.parametrize(
    ("evidence", "name", "expected", "why"),
    [
        (claims(STATUS), "csi-2", None, "claims the name"),
        (claims(STATUS, serial_of(OTHER)), "csi-1", UUID, "serial number"),
        (claims(STATUS), "csi-1", OTHER, f"claims {UUID}, expected {OTHER}"),
        (DeviceEvidence(STATUS, OTHER, None, is_labelled=True), "csi-1", UUID, f"claims {OTHER}"),
        (claims(VolumeStatus("csi-1", UUID, refusal="it is broken")), "csi-1", UUID, "it is broken"),
    ],
)
def test_contradictory_evidence_is_reported(
    evidence: DeviceEvidence, name: str, expected: str | None, why: str
) -> None:
    assert why in (evidence.against(name, expected) or "")


def test_a_device_needs_enabled_io() -> None:
    for enabled in (False, None):
        off = VolumeStatus("csi-1", UUID, io_enabled=enabled, details="dbg is '0x0'")
        assert "dbg is '0x0'" in (claims(off).unusable("csi-1") or "")
    assert claims(VolumeStatus("csi-1", UUID, io_enabled=True)).unusable("csi-1") is None
    assert claims().unusable("csi-1") is None
