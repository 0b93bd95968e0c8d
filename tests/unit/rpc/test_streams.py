# SPDX-License-Identifier: Apache-2.0
"""Calls that are answered with several messages, over a real socket."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import grpc
import pytest

from csi_driver.errors import SnapshotNotFound
from csi_driver.rpc.contract import thread_pools
from csi_driver.rpc.pb import csi_pb2 as pb
from csi_driver.storage_model import Features
from tests.unit.rpc.fakes import Endpoint, Gate, serving

REQUEST = pb.GetMetadataDeltaRequest(base_snapshot_id="z:a:1", target_snapshot_id="z:b:1")
GIB = 1 << 30


@pytest.fixture
def endpoint(tmp_path: Path) -> Iterator[Endpoint]:
    with serving(tmp_path / "csi.sock") as endpoint:
        yield endpoint


def test_each_page_of_changes_is_a_message_with_the_size(endpoint: Endpoint) -> None:
    request = pb.GetMetadataDeltaRequest(
        base_snapshot_id="z:a:1", target_snapshot_id="z:b:1", starting_offset=4096, max_results=7
    )
    answers = list(endpoint.changed.GetMetadataDelta(request, timeout=20))
    assert endpoint.changed_fake.calls == [("z:a:1", "z:b:1", 4096, 7)]
    assert {(each.block_metadata_type, each.volume_capacity_bytes) for each in answers} == {
        (pb.BlockMetadataType.VARIABLE_LENGTH, GIB)
    }
    assert [[(each.byte_offset, each.size_bytes) for each in answer.block_metadata] for answer in answers] == [
        [(0, 4096), (8192, 4096)],
        [(1 << 20, 1 << 20)],
    ]


def test_a_snapshot_without_data_is_answered_with_its_size(endpoint: Endpoint) -> None:
    answers = list(endpoint.changed.GetMetadataAllocated(pb.GetMetadataAllocatedRequest(snapshot_id="z:a:1")))
    assert [(each.volume_capacity_bytes, len(each.block_metadata)) for each in answers] == [(GIB, 0)]


def test_an_error_in_the_middle_of_a_stream_ends_it_with_its_code(endpoint: Endpoint) -> None:
    endpoint.changed_fake.breaks = SnapshotNotFound("z:a:1")
    answers = iter(endpoint.changed.GetMetadataDelta(REQUEST, timeout=20))
    assert next(answers).block_metadata
    with pytest.raises(grpc.RpcError) as refusal:
        next(answers)
    assert refusal.value.code() is grpc.StatusCode.NOT_FOUND
    assert endpoint.boundary.running.wait_for_none(20) == []


def test_a_bug_in_the_middle_of_a_stream_is_told_without_its_details(endpoint: Endpoint) -> None:
    endpoint.changed_fake.breaks = RuntimeError("secret")
    with pytest.raises(grpc.RpcError) as refusal:
        list(endpoint.changed.GetMetadataDelta(REQUEST, timeout=20))
    assert refusal.value.code() is grpc.StatusCode.INTERNAL
    assert "secret" not in str(refusal.value.details())


@pytest.mark.parametrize("missing", ["base_snapshot_id", "target_snapshot_id"])
def test_a_missing_snapshot_is_named(endpoint: Endpoint, missing: str) -> None:
    request = pb.GetMetadataDeltaRequest()
    request.CopyFrom(REQUEST)
    request.ClearField(missing)
    with pytest.raises(grpc.RpcError) as refusal:
        list(endpoint.changed.GetMetadataDelta(request, timeout=20))
    assert refusal.value.code() is grpc.StatusCode.INVALID_ARGUMENT
    assert missing in str(refusal.value.details())


def test_a_stream_whose_caller_went_away_ends(endpoint: Endpoint) -> None:
    gate = Gate("delta")
    endpoint.trace.hook = gate
    answers = endpoint.changed.GetMetadataDelta(REQUEST, timeout=20)
    gate.wait_for()
    answers.cancel()  # type: ignore[no-untyped-call]
    gate.open()
    assert endpoint.boundary.running.wait_for_none(20) == []


def test_the_service_is_named_where_the_storage_tells_changes(tmp_path: Path) -> None:
    with serving(tmp_path / "csi.sock", offers=Features(changed_blocks=True)) as endpoint:
        answer = endpoint.identity.GetPluginCapabilities(pb.GetPluginCapabilitiesRequest())
    kinds = [each.service.type for each in answer.capabilities]
    assert pb.PluginCapability.Service.SNAPSHOT_METADATA_SERVICE in kinds


def test_an_offset_before_the_start_is_out_of_range(endpoint: Endpoint) -> None:
    with pytest.raises(grpc.RpcError) as refusal:
        list(endpoint.changed.GetMetadataAllocated(pb.GetMetadataAllocatedRequest(snapshot_id="a", starting_offset=-1)))
    assert refusal.value.code() is grpc.StatusCode.OUT_OF_RANGE
    assert "starting_offset" in str(refusal.value.details())


def test_callers_who_take_no_message_delay_no_other_call_and_leave_nothing_behind(tmp_path: Path) -> None:
    with serving(tmp_path / "csi.sock", pools=thread_pools(read=2, stream=2)) as endpoint:
        endpoint.changed_fake.pages = 10_000
        slow = [endpoint.changed.GetMetadataDelta(REQUEST) for _ in range(2)]
        assert [next(iter(call)).volume_capacity_bytes for call in slow] == [GIB, GIB]  # both threads are theirs
        slow += [endpoint.changed.GetMetadataDelta(REQUEST) for _ in range(2)]
        assert endpoint.controller.ListVolumes(pb.ListVolumesRequest(), timeout=120) is not None
        for call in slow:
            call.cancel()  # type: ignore[no-untyped-call]
        assert endpoint.boundary.running.wait_for_none(60) == []
