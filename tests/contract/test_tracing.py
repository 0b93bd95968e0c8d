# SPDX-License-Identifier: Apache-2.0
"""Traces of calls, from the sidecar's context through the controller to the embedded manager, at a real collector."""

from __future__ import annotations

import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import closing, contextmanager
from dataclasses import fields
from pathlib import Path
from typing import Any, cast

import grpc
import pytest
from opentelemetry.proto.trace.v1.trace_pb2 import Span

from csi_driver.controller.zones import ZonePool, ask
from csi_driver.deadline import Deadline
from csi_driver.errors import CommandFailed
from csi_driver.host.processes import run
from csi_driver.management.client import ManagementClient
from csi_driver.management.settings import ManagementSettings
from csi_driver.rpc.boundary import Boundary
from csi_driver.rpc.identity import IdentityService
from csi_driver.rpc.pb import csi_pb2 as pb
from csi_driver.rpc.pb import csi_pb2_grpc
from csi_driver.rpc.server import Server
from csi_driver.rpc.services import ControllerService, ControllerUseCases
from csi_driver.settings import EndpointSettings
from csi_driver.telemetry import tracing
from csi_driver.telemetry.tracing import TracingSettings
from tests.collector import ERROR, Collector, attributes, collecting, serving_collector
from tests.contract.two_managements import embedded_storage
from tests.documents import ROOT
from tests.unit.controller.world import World

TRACE, PARENT = "0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331"
SAMPLED = (("traceparent", f"00-{TRACE}-{PARENT}-01"),)
SECRET, PARAMETER = "hush-passphrase", "hush-parameter"
MOUNT = pb.VolumeCapability(
    mount=pb.VolumeCapability.MountVolume(),
    access_mode=pb.VolumeCapability.AccessMode(mode=pb.VolumeCapability.AccessMode.SINGLE_NODE_WRITER),
)
SERVER, CLIENT = Span.SpanKind.SPAN_KIND_SERVER, Span.SpanKind.SPAN_KIND_CLIENT


@contextmanager
def controller(directory: Path) -> Iterator[csi_pb2_grpc.ControllerStub]:
    """Serve a controller on an embedded manager."""
    with embedded_storage(directory) as storage:
        settings = ManagementSettings(
            servers=(storage.server.url,), username=storage.settings.user, password_file=storage.server.password.path
        )
        with closing(ManagementClient(settings)) as client:
            world = World(management=client)
            own: dict[str, Any] = {"create": world.creation, "delete": world.deletion}
            names = [each.name for each in fields(ControllerUseCases)]
            use_cases = ControllerUseCases(**{name: cast("Any", own.get(name)) for name in names})
            identity = IdentityService("csi.example.com", lambda: "1", lambda: True)
            socket = directory / "csi.sock"
            server = Server(EndpointSettings(socket), Boundary(), (identity, ControllerService(use_cases)))
            server.start()
            options = [("grpc.default_authority", "localhost"), ("grpc.use_local_subchannel_pool", 1)]
            with grpc.insecure_channel(f"unix:{socket}", options=options) as channel:
                csi_pb2_grpc.IdentityStub(channel).Probe(pb.ProbeRequest())
                try:
                    yield csi_pb2_grpc.ControllerStub(channel)
                finally:
                    server.drain()


def create(stub: csi_pb2_grpc.ControllerStub, metadata: Any = (), **parameters: str) -> str:
    size = pb.CapacityRange(required_bytes=1 << 30)
    request = pb.CreateVolumeRequest(
        name="pvc-1",
        volume_capabilities=[MOUNT],
        capacity_range=size,
        parameters=parameters,
        secrets={"passphrase": SECRET},
    )
    return str(stub.CreateVolume(request, metadata=metadata).volume.volume_id)


def recorded(collector: Collector) -> str:
    return "".join(request.SerializeToString().decode(errors="replace") for request in collector.received)


def test_a_call_continues_the_trace_of_its_caller_up_to_the_storage_manager(tmp_path: Path) -> None:
    with collecting() as collector, controller(tmp_path) as stub:
        volume_id = create(stub, SAMPLED)
    call = collector.one("csi.v1.Controller/CreateVolume")
    assert (call.trace_id.hex(), call.parent_span_id.hex()) == (TRACE, PARENT)
    asked, answered = collector.one("POST /volumes/save", CLIENT), collector.one("POST /volumes/save", SERVER)
    assert (asked.parent_span_id, answered.parent_span_id) == (call.span_id, asked.span_id)
    assert {span.trace_id.hex() for span in collector.spans} == {TRACE}
    assert attributes(call) == {
        "rpc.system": "grpc", "rpc.service": "csi.v1.Controller", "rpc.method": "CreateVolume",
        "rpc.grpc.status_code": 0, "csi.name": "pvc-1", "csi.volume_id": volume_id,
    }  # fmt: skip
    assert attributes(asked)["http.response.status_code"] == 200
    # The login that the first request needs is a part of the call too.
    assert collector.one("POST /login", CLIENT).parent_span_id == call.span_id
    assert collector.resource() | {"service.instance.id": ""} == collector.resource() | {
        "service.name": "nvmesh-csi-controller", "service.namespace": "csi.example.com", "service.version": "1.2.3",
        "service.instance.id": "",
    }  # fmt: skip


def test_a_refused_call_has_its_code_and_neither_parameters_nor_secrets_nor_its_message(tmp_path: Path) -> None:
    with collecting() as collector, controller(tmp_path) as stub, pytest.raises(grpc.RpcError, match=PARAMETER):
        create(stub, unknown=PARAMETER, **{PARAMETER: "x"})
    call = collector.one("csi.v1.Controller/CreateVolume")
    assert (call.status.code, call.status.message) == (ERROR, "INVALID_ARGUMENT")
    assert attributes(call)["rpc.grpc.status_code"] == grpc.StatusCode.INVALID_ARGUMENT.value[0]
    assert PARAMETER not in recorded(collector)
    assert SECRET not in recorded(collector)


def test_probes_and_requests_that_belong_to_no_call_begin_no_trace(tmp_path: Path) -> None:
    with collecting() as collector, controller(tmp_path) as stub:  # which is probed first
        with embedded_storage(tmp_path / "other") as storage, closing(storage.connect()) as client:
            client.system_info(deadline=Deadline.after(60))
        assert collector.spans == []
        create(stub)
    roots = [span.name for span in collector.spans if not span.parent_span_id]
    assert roots == ["GET /systemInfo", "csi.v1.Controller/CreateVolume"]


def test_a_caller_that_does_not_record_its_trace_is_followed(tmp_path: Path) -> None:
    with collecting() as collector, controller(tmp_path) as stub:
        create(stub, (("traceparent", f"00-{TRACE}-{PARENT}-00"),))
    assert collector.spans == []


@pytest.mark.parametrize("text", ["", "00-x-y-01", "ff" * 4000])
def test_an_invalid_trace_context_begins_a_trace_of_its_own(tmp_path: Path, text: str) -> None:
    with collecting() as collector, controller(tmp_path) as stub:
        create(stub, (("traceparent", text),))
    assert not collector.one("csi.v1.Controller/CreateVolume").parent_span_id


def test_with_a_ratio_of_0_only_traces_of_callers_are_recorded(tmp_path: Path) -> None:
    with collecting(ratio=0.0) as collector, controller(tmp_path) as stub:
        volume_id = create(stub)
        stub.DeleteVolume(pb.DeleteVolumeRequest(volume_id=volume_id), metadata=SAMPLED)
    assert [span.name for span in collector.spans if span.name.startswith("csi.")] == ["csi.v1.Controller/DeleteVolume"]


def test_a_program_is_a_step_of_its_call_without_its_arguments() -> None:
    with collecting() as collector:
        run(["true", PARAMETER], timeout_s=60)
        with tracing.received("call"):
            run(["true", PARAMETER], timeout_s=60)
    call, program = collector.one("call"), collector.one("true")
    assert program.parent_span_id == call.span_id
    assert PARAMETER not in recorded(collector)


def test_requests_to_several_zones_at_once_belong_to_their_call() -> None:
    def answer(zone: str) -> str:
        with tracing.step(zone):
            return zone

    with collecting() as collector, tracing.received("call"):
        ask(("east", "west"), answer, deadline=Deadline.after(60), pool=ZonePool())
    parents = {span.name: span.parent_span_id for span in collector.spans}
    assert parents["east"] == parents["west"] == collector.one("call").span_id


def test_a_failed_step_has_the_kind_of_its_error_and_not_its_message() -> None:
    with collecting() as collector, pytest.raises(CommandFailed), tracing.received("call"):
        run(["false", PARAMETER], timeout_s=60)
    assert collector.one("false").status.message == "CommandFailed"
    assert PARAMETER not in recorded(collector)


def test_a_collector_that_is_away_is_logged_once_and_once_when_it_is_back(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tracing, "_EXPORT_LIMIT_S", 2.0)
    caplog.set_level("DEBUG")
    with serving_collector() as (_, url):
        port = int(url.rpartition(":")[2])
        sender = tracing._Collector(url)
        sender.export([])
    with tracing.recording(TracingSettings(url), "node", "", ""):
        for _ in range(2):
            sender.export([])
    with serving_collector(port=port):
        sender.export([])
    sender.shutdown()
    lines = [(record.levelname, record.getMessage()) for record in caplog.records if record.levelname != "DEBUG"]
    assert lines == [
        ("WARNING", f"traces are dropped: collector {url} does not take them; calls are not affected"),
        ("INFO", f"collector {url} takes traces again"),
    ]


def test_a_collector_that_hangs_blocks_no_call_and_the_queue_is_bounded() -> None:
    holds = threading.Event()
    made = 3 * tracing.QUEUE_LIMIT_SPANS
    try:
        with collecting(holds=holds) as collector:
            for _ in range(made):
                with tracing.received("call"):
                    pass
    finally:
        holds.set()
    # One batch was under way; the rest was dropped when the process ended.
    assert len(collector.spans) < made


def test_a_call_loads_nothing_of_opentelemetry_where_it_is_off(tmp_path: Path) -> None:
    script = (
        "import sys, pathlib\n"
        "from tests.unit.rpc.fakes import serving\n"
        "from csi_driver.rpc.pb import csi_pb2 as pb\n"
        f"with serving(pathlib.Path({str(tmp_path / 's')!r})) as endpoint:\n"
        "    endpoint.controller.DeleteVolume(pb.DeleteVolumeRequest(volume_id='z:v'))\n"
        "print([name for name in sys.modules if name.startswith('opentelemetry')])\n"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True, cwd=ROOT)
    assert done.stdout == "[]\n"
