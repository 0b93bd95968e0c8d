"""What speaks for and against a device being a volume, weighed; a real device with a serial number is not at hand."""

from __future__ import annotations

import pytest

from csi_driver.host.connectors.nvmesh import DeviceEvidence, serial_of
from csi_driver.host_model import VolumeStatus

UUID = "01234567-89ab-cdef-0123-456789abcdef"
OTHER = "11234567-89ab-cdef-0123-456789abcdef"
STATUS = VolumeStatus("csi-1", UUID)


def claims(status: VolumeStatus | None = None, serial: str | None = None) -> DeviceEvidence:
    return DeviceEvidence(status, None, serial, is_loop=False)


@pytest.mark.parametrize(
    ("evidence", "wanted", "uuid", "proven"),
    [
        (claims(), UUID, None, False),
        (claims(), None, None, False),
        (claims(STATUS), UUID, UUID, True),
        (claims(STATUS), None, UUID, True),
        (claims(None, serial_of(UUID)), UUID, UUID, False),
        (claims(None, serial_of(UUID)), None, None, False),
        (claims(STATUS, serial_of(UUID)), UUID, UUID, True),
        (DeviceEvidence(STATUS, None, None, is_loop=True), UUID, None, False),
        (DeviceEvidence(None, UUID, None, is_loop=True), UUID, UUID, True),
    ],
)
def test_a_device_is_who_the_evidence_says(
    evidence: DeviceEvidence, wanted: str | None, uuid: str | None, proven: bool
) -> None:
    assert (evidence.uuid_for(wanted), evidence.proves()) == (uuid, proven)
    assert evidence.against("csi-1", wanted) is None


def test_the_serial_number_of_another_volume_equals_no_uuid() -> None:
    """While the client says nothing, a volume made anew under the same name is known by its serial number alone."""
    evidence = claims(None, serial_of(OTHER))
    assert evidence.uuid_for(UUID) not in (None, UUID, OTHER)
    assert "another volume" in (evidence.against("csi-1", UUID) or "")


@pytest.mark.parametrize(
    ("evidence", "name", "wanted", "why"),
    [
        (claims(STATUS), "csi-2", None, "claims the name"),
        (claims(STATUS, serial_of(OTHER)), "csi-1", UUID, "serial number"),
        (claims(STATUS), "csi-1", OTHER, f"claims {UUID}, expected {OTHER}"),
        (DeviceEvidence(STATUS, OTHER, None, is_loop=True), "csi-1", UUID, f"claims {OTHER}"),
        (claims(VolumeStatus("csi-1", UUID, refusal="it is broken")), "csi-1", UUID, "it is broken"),
    ],
)
def test_contradicting_evidence_is_reported(evidence: DeviceEvidence, name: str, wanted: str | None, why: str) -> None:
    assert why in (evidence.against(name, wanted) or "")


def test_a_device_is_not_usable_unless_its_client_says_that_it_carries_io() -> None:
    for enabled in (False, None):
        off = VolumeStatus("csi-1", UUID, io_enabled=enabled, details="dbg is '0x0'")
        assert "dbg is '0x0'" in (claims(off).unusable("csi-1") or "")
    assert claims(VolumeStatus("csi-1", UUID, io_enabled=True)).unusable("csi-1") is None
    assert claims().unusable("csi-1") is None
