# SPDX-License-Identifier: Apache-2.0
"""A collector of traces: a real OTLP server over gRPC, in the process of the test."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import grpc
from opentelemetry.proto.collector.trace.v1 import trace_service_pb2 as pb
from opentelemetry.proto.collector.trace.v1 import trace_service_pb2_grpc
from opentelemetry.proto.trace.v1.trace_pb2 import Span, Status

from csi_driver.telemetry import tracing
from csi_driver.telemetry.tracing import TracingSettings

ERROR = Status.StatusCode.STATUS_CODE_ERROR


@dataclass(eq=False)
class Collector(trace_service_pb2_grpc.TraceServiceServicer):
    """Keeps what it is sent."""

    received: list[pb.ExportTraceServiceRequest] = field(default_factory=list)
    holds: threading.Event | None = None
    """Answers nothing until this is set."""

    def Export(self, request: pb.ExportTraceServiceRequest, context: Any) -> pb.ExportTraceServiceResponse:
        self.received.append(request)
        if self.holds is not None:
            self.holds.wait()
        return pb.ExportTraceServiceResponse()

    @property
    def spans(self) -> list[Span]:
        return [
            span
            for request in self.received
            for resource in request.resource_spans
            for scope in resource.scope_spans
            for span in scope.spans
        ]

    def one(self, name: str, kind: int | None = None) -> Span:
        found = [span for span in self.spans if span.name == name and kind in (None, span.kind)]
        assert len(found) == 1, f"{len(found)} spans {name}, expected one of {[span.name for span in self.spans]}"
        return found[0]

    def resource(self) -> dict[str, str]:
        """Return the description of the process that sent the latest spans."""
        described = self.received[-1].resource_spans[0].resource
        return {each.key: each.value.string_value for each in described.attributes}


def attributes(span: Span) -> dict[str, str | int]:
    return {each.key: each.value.string_value or each.value.int_value for each in span.attributes}


@contextmanager
def collecting(ratio: float = 1.0, holds: threading.Event | None = None) -> Iterator[Collector]:
    """Run a collector, and record traces inside the block; all of them have arrived after it."""
    with (
        serving_collector(holds) as (collector, url),
        tracing.recording(TracingSettings(url, ratio), "controller", "csi.example.com", "1.2.3"),
    ):
        yield collector


@contextmanager
def serving_collector(holds: threading.Event | None = None, port: int = 0) -> Iterator[tuple[Collector, str]]:
    server, collector = grpc.server(ThreadPoolExecutor(4)), Collector(holds=holds)
    trace_service_pb2_grpc.add_TraceServiceServicer_to_server(collector, server)  # type: ignore[no-untyped-call]
    port = server.add_insecure_port(f"127.0.0.1:{port}")
    server.start()
    try:
        yield collector, f"http://127.0.0.1:{port}"
    finally:
        server.stop(0).wait()
