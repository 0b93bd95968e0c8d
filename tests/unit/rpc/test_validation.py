# SPDX-License-Identifier: Apache-2.0
"""Requests against the limits of the specification."""

from __future__ import annotations

import pytest
from google.protobuf.json_format import ParseDict
from google.protobuf.message import Message

from csi_driver.errors import CapacityOutOfRange, DriverError, InvalidRequest
from csi_driver.rpc import validation
from csi_driver.rpc.pb import csi_pb2

MOUNT = {"mount": {"fs_type": "ext4"}, "access_mode": {"mode": "SINGLE_NODE_WRITER"}}


def create(**fields: object) -> Message:
    return ParseDict({"name": "v", "volume_capabilities": [MOUNT], **fields}, csi_pb2.CreateVolumeRequest())


def stage(**fields: object) -> Message:
    base = {"volume_id": "v", "staging_target_path": "/s", "volume_capability": MOUNT}
    return ParseDict({**base, **fields}, csi_pb2.NodeStageVolumeRequest())


def refusal(message: Message) -> str:
    with pytest.raises(InvalidRequest) as refused:
        validation.check(message, ())
    return str(refused.value)


@pytest.mark.parametrize("name", ["v", "x" * 128, "pvc-é世界", "tab\tand\nnewline\r", "a/b:c"])
def test_a_name_of_legal_characters_is_accepted(name: str) -> None:
    validation.check(create(name=name), ())


@pytest.mark.parametrize("code", [*range(0x09), 0x0B, 0x0C, *range(0x0E, 0x20), *range(0x7F, 0xA0)])
def test_a_name_with_a_forbidden_character_is_refused(code: int) -> None:
    assert refusal(create(name=f"a{chr(code)}b")).startswith("name: expected ")


def test_a_name_is_measured_in_bytes() -> None:
    assert refusal(create(name="é" * 65)) == "name: expected at most 128 bytes, got 130"


@pytest.mark.parametrize("volume_id", ["x" * 129, "x" * 100_000, "no such\x00form", "\x7f"])
def test_a_volume_id_is_never_an_invalid_argument(volume_id: str) -> None:
    validation.check(stage(volume_id=volume_id), ())


def test_a_node_id_may_have_256_bytes() -> None:
    validation.check(csi_pb2.ControllerPublishVolumeRequest(node_id="n" * 256), ())
    assert "node_id" in refusal(csi_pb2.ControllerPublishVolumeRequest(node_id="n" * 257))


def test_a_path_may_have_4095_bytes() -> None:
    validation.check(stage(staging_target_path="/" * 4095), ())
    assert "staging_target_path" in refusal(stage(staging_target_path="/" * 4096))


def test_a_map_may_have_4096_bytes_in_all() -> None:
    validation.check(create(parameters={"k": "v" * 4095}), ())
    assert "parameters" in refusal(create(parameters={"k": "v" * 4096}))


def test_a_large_secret_is_refused_without_being_shown() -> None:
    said = refusal(create(secrets={"key": "hidden" * 1000}))
    assert "secrets" in said
    assert "hidden" not in said


@pytest.mark.parametrize("flags", [["x" * 4097], ["ro\nrw"], ["a\x00b"]])
def test_mount_flags_are_refused_without_being_shown(flags: list[str]) -> None:
    capability = {"mount": {"mount_flags": flags}, "access_mode": {"mode": "SINGLE_NODE_WRITER"}}
    said = refusal(stage(volume_capability=capability))
    assert "volume_capability.mount.mount_flags" in said
    assert flags[0] not in said


def test_a_filesystem_with_a_control_character_is_refused() -> None:
    capability = {"mount": {"fs_type": "ext4\n"}, "access_mode": {"mode": "SINGLE_NODE_WRITER"}}
    assert "volume_capability.mount.fs_type" in refusal(stage(volume_capability=capability))


@pytest.mark.parametrize("missing", ["mount", "access_mode"])
def test_a_missing_field_of_a_capability_is_named(missing: str) -> None:
    incomplete = {key: value for key, value in MOUNT.items() if key != missing}
    assert missing in refusal(create(volume_capabilities=[MOUNT, incomplete]))


@pytest.mark.parametrize("mode", [8, -1, 2**31 - 1])
def test_an_unknown_access_mode_is_refused(mode: int) -> None:
    capability = {"mount": {}, "access_mode": {"mode": mode}}
    assert "volume_capabilities[0].access_mode.mode" in refusal(create(volume_capabilities=[capability]))


@pytest.mark.parametrize(
    "capacity", [{"required_bytes": -1}, {"limit_bytes": -1}, {"required_bytes": 5, "limit_bytes": -5}, {}]
)
def test_a_capacity_that_is_negative_or_empty_is_refused(capacity: dict[str, int]) -> None:
    assert "capacity_range" in refusal(create(capacity_range=capacity))


def test_a_limit_below_the_required_bytes_is_out_of_range() -> None:
    with pytest.raises(CapacityOutOfRange):
        validation.check(create(capacity_range={"required_bytes": 2, "limit_bytes": 1}), ())


@pytest.mark.parametrize(
    "capacity", [{"required_bytes": 1}, {"limit_bytes": 1}, {"required_bytes": 1, "limit_bytes": 1}]
)
def test_a_valid_capacity_is_accepted(capacity: dict[str, int]) -> None:
    validation.check(create(capacity_range=capacity), ())


def test_a_negative_number_of_entries_is_refused() -> None:
    assert "max_entries" in refusal(csi_pb2.ListVolumesRequest(max_entries=-1))


def test_a_list_token_is_not_validated() -> None:
    validation.check(csi_pb2.ListVolumesRequest(starting_token="x" * 1000 + "\x00"), ())


def test_a_missing_field_comes_before_everything_else() -> None:
    with pytest.raises(DriverError, match="volume_id is required"):
        validation.check(csi_pb2.NodeStageVolumeRequest(staging_target_path="/" * 5000), ("volume_id",))
