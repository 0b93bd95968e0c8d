# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import pytest

from csi_driver.errors import StorageUnavailable
from csi_driver.management.codec import (
    decode_client,
    decode_summary,
    decode_system_info,
    decode_volume,
    decode_vpg,
)
from csi_driver.storage_model import ClientStatus, DeviceStatus, RaidLevel, Reservation, ReservationMode
from tests.unit.management.double import sample

VOLUME_UUID = "74025fd0-e73d-11f1-a2b3-7550e9e5980f"
BARE_VOLUME = {"_id": "v", "uuid": VOLUME_UUID, "blocks": 256, "blockSize": 4096}
BARE_CLIENT = {"_id": "n", "uuid": VOLUME_UUID}


def device(**fields: object) -> dict[str, object]:
    return {**BARE_CLIENT, "block_devices": [{"uuid": VOLUME_UUID, "name": "v", "vol_status": 4, **fields}]}


def test_size_of_a_volume_is_blocks_times_block_size() -> None:
    assert decode_volume(sample("volume")).size_bytes == 9_999_220_736


def test_metadata_of_a_volume_is_kept_unchanged() -> None:
    assert decode_volume(sample("volume")).metadata == {"csi_name": "pvc-1", "a.b": "x"}


def test_metadata_of_older_servers_is_read_from_csi_metadata() -> None:
    assert decode_volume({**BARE_VOLUME, "csi_metadata": {"csi_name": "pvc-1"}}).metadata == {"csi_name": "pvc-1"}


def test_reservation_of_a_held_volume_names_its_holder() -> None:
    held = decode_volume(sample("volume-held"))
    assert held.reservation == Reservation(ReservationMode.EXCLUSIVE_READ_WRITE, 2, "node-1", ("node-1",))


def test_a_volume_needs_only_name_uuid_and_size() -> None:
    assert decode_volume(BARE_VOLUME).size_bytes == 1 << 20


@pytest.mark.parametrize("field", sorted(BARE_VOLUME))
def test_a_volume_without_a_required_field_is_invalid(field: str) -> None:
    row = {key: value for key, value in BARE_VOLUME.items() if key != field}
    with pytest.raises(StorageUnavailable):
        decode_volume(row)


@pytest.mark.parametrize("blocks", ["256", None, -1, True, 1.5])
def test_an_invalid_number_of_blocks_is_refused(blocks: object) -> None:
    with pytest.raises(StorageUnavailable):
        decode_volume({**BARE_VOLUME, "blocks": blocks})


def test_metadata_that_is_not_an_object_is_invalid() -> None:
    with pytest.raises(StorageUnavailable):
        decode_volume({**BARE_VOLUME, "metadata": "pvc-1"})


def test_the_text_undefined_is_not_an_id() -> None:
    with pytest.raises(StorageUnavailable):
        decode_volume({**BARE_VOLUME, "uuid": "undefined"})


def test_an_error_shows_the_beginning_of_an_invalid_document() -> None:
    with pytest.raises(StorageUnavailable) as caught:
        decode_volume({"_id": "v", "description": "x" * 10_000})
    assert len(str(caught.value)) < 512


@pytest.mark.parametrize("spelling", ["LVM/JBOD", "Concatenated", "lvm", "JBOD"])
def test_older_names_of_the_concatenated_layout_are_accepted(spelling: str) -> None:
    assert decode_volume({**BARE_VOLUME, "RAIDLevel": spelling}).layout.raid_level is RaidLevel.CONCATENATED


def test_an_unknown_raid_level_is_invalid() -> None:
    with pytest.raises(StorageUnavailable, match="RAID-99"):
        decode_volume({**BARE_VOLUME, "RAIDLevel": "RAID-99"})


def test_an_unknown_raid_level_does_not_hide_a_volume_from_lists() -> None:
    assert decode_summary({**BARE_VOLUME, "RAIDLevel": "RAID-99"}).name == "v"


def test_a_reported_device_carries_status_io_and_references() -> None:
    report = decode_client(sample("client")).devices[VOLUME_UUID]
    assert (report.status, report.io_enabled, report.reference_ids) == (
        DeviceStatus.ATTACHED,
        True,
        frozenset({VOLUME_UUID}),
    )


def test_a_desired_attachment_has_action_mode_references_and_version() -> None:
    wish = decode_client(sample("client")).desired[VOLUME_UUID]
    assert (wish.action, wish.mode, wish.reference_ids, wish.version) == (
        "attaching",
        ReservationMode.EXCLUSIVE_READ_WRITE,
        frozenset({VOLUME_UUID}),
        2,
    )


@pytest.mark.parametrize(("preempt", "preempts"), [(0, False), (1, False), (2, True), (None, False), ("2", False)])
def test_only_a_full_preempt_counts_as_preemption(preempt: object, *, preempts: bool) -> None:
    """1 is a weak preemption, which yields to reservations."""
    wish = {"action": "attaching", "reservation": {"mode": 3, "version": 3, "preempt": preempt}}
    row = {**sample("client"), "attachments": {VOLUME_UUID: wish}}
    assert decode_client(row).desired[VOLUME_UUID].preempts is preempts


@pytest.mark.parametrize("references", [{}, {"referenceIDs": None}])
def test_absent_references_are_unknown_not_empty(references: dict[str, object]) -> None:
    assert decode_client(device(**references)).devices[VOLUME_UUID].reference_ids is None


def test_an_empty_list_of_references_is_empty() -> None:
    assert decode_client(device(referenceIDs=[])).devices[VOLUME_UUID].reference_ids == frozenset()


@pytest.mark.parametrize("hidden", [1, True])
def test_hidden_devices_are_left_out(hidden: object) -> None:
    assert decode_client(device(is_hidden=hidden)).devices == {}


@pytest.mark.parametrize("status", [42, None, "4"])
def test_an_unknown_device_status_is_other(status: object) -> None:
    assert decode_client(device(vol_status=status)).devices[VOLUME_UUID].status is DeviceStatus.OTHER


@pytest.mark.parametrize("enabled", [0, None, False, "1"])
def test_io_counts_as_enabled_only_when_it_is_reported_so(enabled: object) -> None:
    assert not decode_client(device(ioEnabled=enabled)).devices[VOLUME_UUID].io_enabled


@pytest.mark.parametrize("status", [99, None, "1"])
def test_an_unknown_client_status_is_unknown(status: object) -> None:
    assert decode_client({**BARE_CLIENT, "client_status": status}).status is ClientStatus.UNKNOWN


@pytest.mark.parametrize("broken", [{"block_devices": [None]}, {"attachments": {"u": 1}}, {"uuid": None}])
def test_an_invalid_client_document_is_an_error(broken: dict[str, object]) -> None:
    with pytest.raises(StorageUnavailable):
        decode_client({**BARE_CLIENT, **broken})


def test_capacity_of_a_vpg_is_in_bytes() -> None:
    group = decode_vpg({"_id": "gold", "RAIDLevel": "Mirrored RAID-1", "capacity": 20, "allowOverflow": False})
    assert (group.capacity_bytes, group.allow_overflow) == (20_000_000_000, False)


@pytest.mark.parametrize(("told", "read"), [("18.0.0", "18.0.0"), ("16", "16"), (16, "16"), (None, "")])
def test_the_api_version_may_be_text_or_number(told: object, read: str) -> None:
    assert decode_system_info({"version": "3.5.0", "APIVersion": told}).api_version == read


def test_a_volume_with_a_source_is_a_snapshot() -> None:
    assert decode_volume({**BARE_VOLUME, "sourceID": "golden"}).is_snapshot
    assert not decode_volume({**BARE_VOLUME, "sourceID": None}).is_snapshot
    assert not decode_volume(BARE_VOLUME).is_snapshot


def test_a_group_for_snapshot_metadata_is_recognised_by_its_type() -> None:
    group = {"_id": "g", "RAIDLevel": "Mirrored RAID-1"}
    assert decode_vpg({**group, "type": "METADATA_VOLUME"}).is_for_metadata
    assert not decode_vpg({**group, "type": "NORMAL"}).is_for_metadata
    assert not decode_vpg(group).is_for_metadata
