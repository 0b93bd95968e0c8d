# SPDX-License-Identifier: Apache-2.0
"""Calls over a real socket: order of checks, exclusivity, codes, log, deadlines."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable
from pathlib import Path

import grpc
import pytest
from google.protobuf.json_format import ParseDict
from google.protobuf.message import Message

from csi_driver import errors
from csi_driver.deadline import Deadline
from csi_driver.model import group_snapshot_name, snapshot_name
from csi_driver.rpc.boundary import Boundary, Refusal, _Answered
from csi_driver.rpc.contract import RPCS, Rpc, thread_pools
from csi_driver.rpc.pb import csi_pb2
from csi_driver.telemetry.metrics import exposition
from tests.unit.rpc.fakes import (
    UUID,
    VOLUME_ID,
    ZONE,
    Endpoint,
    Gate,
    code_of,
    create,
    details_of,
    node_publish,
    request_class,
    serving,
    stage,
    status_of,
    trailers_of,
)

Code = grpc.StatusCode


def raising(error: Exception) -> Callable[[str], None]:
    def hook(verb: str) -> None:
        raise error

    return hook


# --- required fields --------------------------------------------------------------------------------------------

REQUIRED = [pytest.param(rpc, field, id=f"{rpc.name}-{field}") for rpc in RPCS.values() for field in rpc.required]


@pytest.mark.parametrize(("rpc", "field"), REQUIRED)
def test_a_missing_field_is_named(endpoint: Endpoint, rpc: Rpc, field: str) -> None:
    request = full(rpc)
    request.ClearField(field)
    with pytest.raises(grpc.RpcError) as refused:
        endpoint.invoke(rpc, request)
    assert status_of(refused.value) is Code.INVALID_ARGUMENT
    assert field in details_of(refused.value)


@pytest.mark.parametrize("rpc", [pytest.param(rpc, id=rpc.name) for rpc in RPCS.values()])
def test_a_request_with_just_the_required_fields_is_served(endpoint: Endpoint, rpc: Rpc) -> None:
    endpoint.controller.CreateVolume(create())
    endpoint.controller.CreateSnapshot(csi_pb2.CreateSnapshotRequest(name="s", source_volume_id=VOLUME_ID))
    endpoint.groups.CreateVolumeGroupSnapshot(
        csi_pb2.CreateVolumeGroupSnapshotRequest(name="g", source_volume_ids=[VOLUME_ID])
    )
    assert code_of(lambda: endpoint.invoke(rpc, full(rpc))) is Code.OK


CAPABILITY = {"mount": {}, "access_mode": {"mode": "SINGLE_NODE_WRITER"}}
SAMPLES: dict[str, object] = {
    "volume_capability": CAPABILITY,
    "volume_capabilities": [CAPABILITY],
    "capacity_range": {"required_bytes": 1},
    "volume_id": VOLUME_ID,
    "node_id": "node-1",
    "source_volume_ids": [VOLUME_ID],
    "snapshot_id": f"{ZONE}:{snapshot_name('s')}:{UUID}",
    "group_snapshot_id": f"{ZONE}:{group_snapshot_name('g')}:{UUID}",
    "snapshot_ids": [f"{ZONE}:{snapshot_name('s')}:{UUID}"],
}


def full(rpc: Rpc) -> Message:
    """Return a request with every required field set, and no other."""
    sample = {field: SAMPLES.get(field, "/x") for field in rpc.required}
    return ParseDict(sample, request_class(rpc)())


# --- exclusivity ------------------------------------------------------------------------------------------------


def test_a_second_call_on_a_busy_volume_is_aborted_at_once(endpoint: Endpoint) -> None:
    gate = endpoint.trace.hook = Gate("stage")
    first = endpoint.node.NodeStageVolume.future(stage())
    gate.wait_for()
    assert code_of(lambda: endpoint.node.NodeStageVolume(stage("csi-1", "/staging/other"))) is Code.ABORTED
    assert endpoint.trace.calls == ["stage"]
    gate.open()
    first.result()
    assert code_of(lambda: endpoint.node.NodeStageVolume(stage())) is Code.OK


def test_publishing_at_two_targets_runs_concurrently(endpoint: Endpoint) -> None:
    gate = endpoint.trace.hook = Gate("publish")
    calls = [endpoint.node.NodePublishVolume.future(node_publish(path=f"/target/{i}")) for i in range(2)]
    gate.wait_for(2)
    gate.open()
    for call in calls:
        call.result()


@pytest.mark.parametrize("first", ["SINGLE_NODE_SINGLE_WRITER", "SINGLE_NODE_WRITER"])
@pytest.mark.parametrize("handle", ["zone-1:csi-1", f"single-zone-cluster:csi-1:{UUID}"])
def test_a_single_writer_publication_excludes_any_other_one(endpoint: Endpoint, first: str, handle: str) -> None:
    mode = csi_pb2.VolumeCapability.AccessMode.Mode
    gate = endpoint.trace.hook = Gate("publish")
    running = endpoint.node.NodePublishVolume.future(node_publish(path="/target/1", mode=mode.Value(first)))
    gate.wait_for()
    second = node_publish(handle, "/target/2", mode.SINGLE_NODE_SINGLE_WRITER)
    assert code_of(lambda: endpoint.node.NodePublishVolume(second)) is Code.ABORTED
    gate.open()
    running.result()
    assert set(endpoint.node_fake.publish.published) == {"/target/1"}


def test_publishing_excludes_staging_and_the_same_target(endpoint: Endpoint) -> None:
    gate = endpoint.trace.hook = Gate("publish")
    first = endpoint.node.NodePublishVolume.future(node_publish())
    gate.wait_for()
    assert code_of(lambda: endpoint.node.NodeStageVolume(stage(path="/staging/2"))) is Code.ABORTED
    assert code_of(lambda: endpoint.node.NodePublishVolume(node_publish())) is Code.ABORTED
    gate.open()
    first.result()


def test_a_volume_stays_locked_while_abandoned_work_runs(endpoint: Endpoint) -> None:
    gate = endpoint.trace.hook = Gate("stage")
    first = endpoint.node.NodeStageVolume.future(stage())
    gate.wait_for()
    first.cancel()  # type: ignore[no-untyped-call]
    assert first.code() is Code.CANCELLED
    assert code_of(lambda: endpoint.node.NodeStageVolume(stage())) is Code.ABORTED
    gate.open()
    assert endpoint.boundary.running.wait_for_none(5) == []


def test_a_hanging_call_is_answered_in_time_and_keeps_its_lock(endpoint: Endpoint) -> None:
    gate = endpoint.trace.hook = Gate("stage", limit_s=60)
    with pytest.raises(grpc.RpcError) as hung:
        endpoint.node.NodeStageVolume(stage(), timeout=5)
    assert status_of(hung.value) is Code.DEADLINE_EXCEEDED
    assert "NodeStageVolume of volume" in details_of(hung.value)
    assert "rpc.services.NodeStageVolume" in details_of(hung.value)
    assert code_of(lambda: endpoint.node.NodeStageVolume(stage())) is Code.ABORTED
    gate.open()
    assert endpoint.boundary.running.wait_for_none(30) == []
    assert code_of(lambda: endpoint.node.NodeStageVolume(stage())) is Code.OK


def test_a_call_that_was_answered_for_its_thread_is_not_answered_again() -> None:
    boundary, rpc = Boundary(), RPCS["/csi.v1.Node/NodeStageVolume"]
    answers: list[Refusal] = []
    answered = threading.Event()

    def hang(request: Message, deadline: Deadline) -> Message:
        assert answered.wait(60)
        return csi_pb2.NodeStageVolumeResponse()

    def late(refusal: Refusal) -> None:
        answers.append(refusal)
        answered.set()

    call = boundary.pools[rpc.pool].submit(boundary.answer, rpc, hang, stage(), 1.0, late)
    assert isinstance(call.exception(60), _Answered)
    assert [answer.code for answer in answers] == [Code.DEADLINE_EXCEEDED]


def test_more_calls_may_hang_than_the_pool_has_threads(tmp_path: Path) -> None:
    with serving(tmp_path / "csi.sock", pools=thread_pools(work=2)) as endpoint:
        gate = endpoint.trace.hook = Gate("stage", limit_s=60)
        for number in range(4):
            hanging = stage(volume_id=f"zone:csi-dead-{number}:{UUID}", path=f"/staging/{number}")
            with pytest.raises(grpc.RpcError) as hung:
                endpoint.node.NodeStageVolume(hanging, timeout=0.5)
            assert status_of(hung.value) is Code.DEADLINE_EXCEEDED
        assert code_of(lambda: endpoint.node.NodePublishVolume(node_publish())) is Code.OK
        gate.open()


@pytest.mark.parametrize("handle", ["csi-1", "z1:csi-1", f"z2:csi-1:{UUID}"])
def test_a_lock_by_name_excludes_only_calls_for_that_volume(endpoint: Endpoint, handle: str) -> None:
    with endpoint.boundary.lock_volume("csi-1"):
        assert code_of(lambda: endpoint.node.NodeStageVolume(stage(handle))) is Code.ABORTED
        assert code_of(lambda: endpoint.node.NodePublishVolume(node_publish(handle))) is Code.ABORTED
        assert code_of(lambda: endpoint.node.NodeStageVolume(stage("z1:csi-2"))) is Code.OK
    gate = endpoint.trace.hook = Gate("publish")
    running = endpoint.node.NodePublishVolume.future(node_publish(handle))
    gate.wait_for()
    with pytest.raises(errors.OperationPending), endpoint.boundary.lock_volume("csi-1"):
        pass
    gate.open()
    running.result()


def test_one_of_many_concurrent_calls_for_a_volume_runs(endpoint: Endpoint) -> None:
    gate = endpoint.trace.hook = Gate("create")
    calls = [endpoint.controller.CreateVolume.future(create()) for _ in range(20)]
    ended = threading.Semaphore(0)
    for call in calls:
        call.add_done_callback(lambda _: ended.release())
    for _ in range(19):
        assert ended.acquire(timeout=120)
    gate.open()
    codes = [code_of(call.result) for call in calls]
    assert codes.count(Code.OK) == 1
    assert codes.count(Code.ABORTED) == 19


def test_the_remaining_time_of_a_caller_is_not_in_an_error() -> None:
    """Kubernetes counts events of one text as one; a limit of our own is worth telling."""
    said = {str(errors.CommandTimedOut(("e2fsck", "/dev/x"), seconds)) for seconds in (37.2193, 12.5, 0.25)}
    assert said == {"e2fsck /dev/x did not finish in time and was killed"}
    assert "within 600 s" in str(errors.CommandTimedOut(("e2fsck", "/dev/x"), 600.0))


# --- codes ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (errors.VolumeNotFound("v"), Code.NOT_FOUND),
        (errors.ExistsDifferently("volume v", ["size is 1, wanted 2"]), Code.ALREADY_EXISTS),
        (errors.Exhausted("the pool is full"), Code.RESOURCE_EXHAUSTED),
        (errors.DeadlineReached("the device"), Code.UNAVAILABLE),
        (errors.StaleToken("not ours"), Code.ABORTED),
        (errors.CommandFailed(["mkfs"], 1, "no"), Code.INTERNAL),
    ],
)
def test_a_failure_is_answered_with_its_code_and_message(
    endpoint: Endpoint, error: errors.DriverError, code: grpc.StatusCode
) -> None:
    endpoint.trace.hook = raising(error)
    with pytest.raises(grpc.RpcError) as refused:
        endpoint.controller.CreateVolume(create())
    assert status_of(refused.value) is code
    assert details_of(refused.value) == str(error)


def test_the_details_of_a_status_stay_empty(endpoint: Endpoint) -> None:
    endpoint.trace.hook = raising(errors.VolumeNotFound("v"))
    with pytest.raises(grpc.RpcError) as refused:
        endpoint.controller.CreateVolume(create())
    assert "grpc-status-details-bin" not in dict(trailers_of(refused.value))


def test_a_bug_is_internal_without_details(endpoint: Endpoint, caplog: pytest.LogCaptureFixture) -> None:
    endpoint.trace.hook = raising(KeyError("a secret detail"))
    with pytest.raises(grpc.RpcError) as refused:
        endpoint.controller.CreateVolume(create())
    assert status_of(refused.value) is Code.INTERNAL
    assert "secret detail" not in details_of(refused.value)
    assert "Traceback" in caplog.text
    assert "a secret detail" in caplog.text


@pytest.mark.parametrize("method", ["Controller/Missing", "Missing/Missing"])
def test_a_missing_rpc_is_unimplemented(endpoint: Endpoint, method: str) -> None:
    assert code_of(lambda: endpoint.send(f"/csi.v1.{method}", b"")) is Code.UNIMPLEMENTED


@pytest.mark.parametrize("data", [b"\x0a\x02\xff\xfe", b"\x0a\x03\xed\xa0\x80", b"\x0a\xff", b"garbage \xff"])
def test_a_malformed_message_is_an_invalid_argument(endpoint: Endpoint, data: bytes) -> None:
    assert code_of(lambda: endpoint.send("/csi.v1.Controller/CreateVolume", data)) is Code.INVALID_ARGUMENT


# --- deadlines --------------------------------------------------------------------------------------------------


def test_a_use_case_gets_the_deadline_of_the_caller(endpoint: Endpoint) -> None:
    endpoint.controller.CreateVolume(create(), timeout=120)
    assert 60 < endpoint.trace.deadlines[0].remaining_s() < 121  # gRPC rounds up on the way


def test_a_call_without_a_deadline_gets_the_default(tmp_path: Path) -> None:
    with serving(tmp_path / "csi.sock", default_deadline_s=33) as endpoint:
        endpoint.controller.CreateVolume(create())
    assert 0 < endpoint.trace.deadlines[0].remaining_s() <= 33


# --- log --------------------------------------------------------------------------------------------------------


def test_a_call_is_logged_with_ids_and_without_secrets(endpoint: Endpoint, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG)
    request = stage("zone-1:csi-77")
    request.secrets["key"] = "hidden-secret"
    request.volume_capability.mount.mount_flags.append("password=hidden-flag")
    endpoint.node.NodeStageVolume(request)
    assert "zone-1:csi-77" in caplog.text
    assert "/staging/1" in caplog.text
    assert "hidden" not in caplog.text


def test_a_failure_is_logged_in_one_line(endpoint: Endpoint, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    endpoint.trace.hook = raising(errors.VolumeNotFound("v"))
    code_of(lambda: endpoint.controller.CreateVolume(create()))
    lines = [record for record in caplog.records if record.name == "csi_driver.rpc.boundary"]
    assert [record.levelname for record in lines] == ["INFO", "WARNING"]
    assert "NOT_FOUND" in lines[1].getMessage()


def test_frequent_calls_are_logged_at_debug(endpoint: Endpoint, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    endpoint.identity.Probe(csi_pb2.ProbeRequest())
    assert not [record for record in caplog.records if record.name == "csi_driver.rpc.boundary"]


# --- pools ------------------------------------------------------------------------------------------------------


def test_health_and_reads_are_answered_while_all_workers_are_busy(tmp_path: Path) -> None:
    with serving(tmp_path / "csi.sock", pools=thread_pools(work=2, read=2, instant=1)) as endpoint:
        gate = endpoint.trace.hook = Gate("stage")
        busy = [endpoint.node.NodeStageVolume.future(stage(f"csi-{i}", f"/staging/{i}")) for i in range(8)]
        gate.wait_for(2)
        assert endpoint.identity.Probe(csi_pb2.ProbeRequest(), timeout=120).ready.value
        stats = csi_pb2.NodeGetVolumeStatsRequest(volume_id="csi-1", volume_path="/mount/x")
        assert endpoint.node.NodeGetVolumeStats(stats, timeout=120).usage
        gate.open()
        for call in busy:
            call.result()


def test_health_is_answered_while_all_readers_are_busy(tmp_path: Path) -> None:
    with serving(tmp_path / "csi.sock", pools=thread_pools(work=2, read=2, instant=1)) as endpoint:
        gate = endpoint.trace.hook = Gate("volumes")
        busy = [endpoint.controller.ListVolumes.future(csi_pb2.ListVolumesRequest()) for _ in range(4)]
        gate.wait_for(2)
        assert endpoint.identity.Probe(csi_pb2.ProbeRequest(), timeout=120).ready.value
        gate.open()
        for call in busy:
            call.result()


def test_probe_is_answered_while_node_info_hangs(tmp_path: Path) -> None:
    with serving(tmp_path / "csi.sock", pools=thread_pools(work=2, read=2, instant=1)) as endpoint:
        gate = endpoint.trace.hook = Gate("info")
        hanging = [endpoint.node.NodeGetInfo.future(csi_pb2.NodeGetInfoRequest()) for _ in range(2)]
        gate.wait_for()
        assert endpoint.identity.Probe(csi_pb2.ProbeRequest(), timeout=120).ready.value
        gate.open()
        for call in hanging:
            call.result()


def test_a_hundred_volumes_are_worked_on_at_once(endpoint: Endpoint) -> None:
    gate = endpoint.trace.hook = Gate("stage")
    calls = [endpoint.node.NodeStageVolume.future(stage(f"csi-{i}", f"/staging/{i}")) for i in range(100)]
    gate.wait_for(100)
    gate.open()
    for call in calls:
        call.result()


# --- metrics ----------------------------------------------------------------------------------------------------


def lines(endpoint: Endpoint, name: str) -> list[str]:
    text = exposition(endpoint.boundary.measurements())
    return [line for line in text.splitlines() if line.startswith(f"nvmesh_csi_{name}")]


def test_every_call_is_counted_by_the_code_of_its_answer(endpoint: Endpoint) -> None:
    endpoint.controller.CreateVolume(create())
    assert code_of(lambda: endpoint.controller.CreateVolume(csi_pb2.CreateVolumeRequest())) is Code.INVALID_ARGUMENT
    endpoint.trace.hook = raising(RuntimeError("x"))
    assert code_of(lambda: endpoint.controller.CreateVolume(create())) is Code.INTERNAL
    assert endpoint.boundary.running.wait_for_none(30) == []
    labels = 'method="CreateVolume",service="csi.v1.Controller"'
    assert sorted(lines(endpoint, "rpc_duration_seconds_count")) == [
        f'nvmesh_csi_rpc_duration_seconds_count{{code="{code}",{labels}}} 1.0'
        for code in ("INTERNAL", "INVALID_ARGUMENT", "OK")
    ]


def test_a_missing_method_has_no_metrics(endpoint: Endpoint) -> None:
    assert code_of(lambda: endpoint.send("/csi.v1.Node/Nonsense", b"")) is Code.UNIMPLEMENTED
    assert code_of(lambda: endpoint.send("/csi.v1.Controller/Nonsense", b"")) is Code.UNIMPLEMENTED
    assert lines(endpoint, "rpc") == []


def test_abandoned_work_counts_as_running_and_its_age_grows(endpoint: Endpoint) -> None:
    gate = Gate("stage")
    endpoint.trace.hook = gate
    left = endpoint.node.NodeStageVolume.future(stage())
    gate.wait_for()
    left.cancel()  # type: ignore[no-untyped-call]
    call = 'method="NodeStageVolume",service="csi.v1.Node"'
    assert lines(endpoint, "rpc_in_flight") == [f"nvmesh_csi_rpc_in_flight{{{call}}} 1.0"]
    first, second = (float(lines(endpoint, "operation_age_seconds")[0].split()[-1]) for _ in range(2))
    assert 0 < first < second
    gate.open()
    assert endpoint.boundary.running.wait_for_none(30) == []
    assert lines(endpoint, "rpc_in_flight") == [f"nvmesh_csi_rpc_in_flight{{{call}}} 0.0"]
    assert lines(endpoint, "operation_age_seconds") == [f"nvmesh_csi_operation_age_seconds{{{call}}} 0.0"]
