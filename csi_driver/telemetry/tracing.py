# SPDX-License-Identifier: Apache-2.0
"""Traces of calls by OpenTelemetry. Without --tracing-endpoint nothing of it is loaded, and every span is one constant.

A CSI call, or a request to the storage manager, begins a trace or continues its caller's. Requests to the management,
programs and mounts are spans inside of one. Names, codes and volume ids are recorded; no parameter, argument or secret.
"""

from __future__ import annotations

import contextvars
import logging
import re
from collections.abc import Callable, Iterable, Iterator, MutableMapping
from concurrent.futures import wait
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, TypeVar, cast

from csi_driver.background import run_detached
from csi_driver.flags import flag, host_name, reader

if TYPE_CHECKING:
    from opentelemetry.context import Context
    from opentelemetry.sdk.trace import ReadableSpan
    from opentelemetry.sdk.trace.export import SpanExporter, SpanExportResult
    from opentelemetry.trace import Span, SpanKind, Tracer

_LOG = logging.getLogger(__name__)

T = TypeVar("T")

QUEUE_LIMIT_SPANS = 2048
"""Spans that wait for the collector; when there are more, the oldest are dropped."""
_EXPORT_LIMIT_S = 5.0
_STOP_LIMIT_S = 2.0
_FIRST_ERROR = 400
_HEADERS = ("traceparent", "tracestate")
"""Of W3C Trace Context; gRPC metadata and HTTP headers have the same names in lower case."""


@reader("URL")
def read_collector(value: str) -> str:
    if not re.fullmatch(r"https?://[^\s/@?#]+/?", value):
        raise ValueError("http://HOST:PORT or https://HOST:PORT")
    return value


@reader("RATIO", "part of all")
def read_ratio(value: str) -> float:
    if not re.fullmatch(r"0(\.[0-9]{1,9})?|1(\.0{1,9})?", value):
        raise ValueError("a number from 0 to 1")
    return float(value)


@dataclass(frozen=True, slots=True)
class TracingSettings:
    endpoint: str = flag(
        "",
        "--tracing-endpoint",
        read_collector,
        "OTLP address (gRPC) of a collector that gets a trace of each call; http is unencrypted.",
        shown="none, disabled",
    )
    sample_ratio: float = flag(
        1.0,
        "--tracing-sample-ratio",
        read_ratio,
        "Part of the traces that are recorded; for a call with a trace context the caller has decided.",
    )

    def problems(self) -> Iterator[str]:
        if not self.endpoint:
            return
        try:
            import opentelemetry.exporter.otlp.proto.grpc.trace_exporter
            import opentelemetry.sdk.trace  # noqa: F401
        except ImportError as error:
            yield (
                f"--tracing-endpoint requires the Python package {error.name}: install nvmesh-csi-driver[tracing], or"
                " leave the flag out"
            )


class _Active:
    tracer: Tracer | None = None
    """None while no traces are recorded."""


_OFF: AbstractContextManager[None] = nullcontext()


class _Collector:
    """Sends spans in the thread of the queue, and logs when the collector fails and when it works again."""

    def __init__(self, endpoint: str) -> None:
        from opentelemetry.exporter.otlp.proto.grpc.trace_exporter import OTLPSpanExporter

        self._endpoint = endpoint
        self._exporter = OTLPSpanExporter(endpoint, timeout=_EXPORT_LIMIT_S)
        self._fails = False

    def export(self, spans: Iterable[ReadableSpan]) -> SpanExportResult:
        from opentelemetry.sdk.trace.export import SpanExportResult

        result = SpanExportResult.FAILURE
        try:
            result = self._exporter.export(list(spans))
        finally:
            self._log(result is SpanExportResult.FAILURE)
        return result

    def _log(self, fails: bool) -> None:
        if fails and not self._fails:
            _LOG.warning("traces are dropped: collector %s does not take them; calls are not affected", self._endpoint)
        elif self._fails and not fails:
            _LOG.info("collector %s takes traces again", self._endpoint)
        self._fails = fails

    def shutdown(self) -> None:
        self._exporter.shutdown()


@contextmanager
def recording(settings: TracingSettings, role: str, driver_name: str, version: str) -> Iterator[None]:
    """Record traces inside the block; nothing where no collector is configured."""
    if not settings.endpoint:
        yield
        return
    from opentelemetry.sdk.resources import Resource
    from opentelemetry.sdk.trace import TracerProvider
    from opentelemetry.sdk.trace.export import BatchSpanProcessor
    from opentelemetry.sdk.trace.sampling import ParentBased, TraceIdRatioBased

    # The library logs each attempt; `_Collector` logs the changes.
    logging.getLogger("opentelemetry").setLevel(logging.CRITICAL + 1)
    attributes = {
        "service.name": f"nvmesh-csi-{role}",
        "service.namespace": driver_name,
        "service.version": version,
        "service.instance.id": host_name(),
    }
    sampler = ParentBased(TraceIdRatioBased(settings.sample_ratio))
    provider = TracerProvider(sampler, Resource.create(attributes), shutdown_on_exit=False)
    collector = cast("SpanExporter", _Collector(settings.endpoint))
    provider.add_span_processor(BatchSpanProcessor(collector, max_queue_size=QUEUE_LIMIT_SPANS))
    _Active.tracer = provider.get_tracer("csi_driver", version)
    try:
        yield
    finally:
        _Active.tracer = None
        wait([run_detached("tracing-stop", provider.shutdown)], _STOP_LIMIT_S)


def received(
    name: str, headers: Callable[[], Iterable[tuple[str, str | bytes]]] = tuple, *, method: str = ""
) -> AbstractContextManager[Span | None]:
    """Return the span of a call that this process serves: continues the trace of its headers, or begins one."""
    if _Active.tracer is None:
        return _OFF
    from opentelemetry.trace import SpanKind
    from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

    carrier = {key.lower(): value for key, value in headers() if key.lower() in _HEADERS and isinstance(value, str)}
    parent = TraceContextTextMapPropagator().extract(carrier)
    return _span(_Active.tracer, f"{method} {name}".strip(" /"), SpanKind.SERVER, parent)


def sent(method: str, path: str, headers: MutableMapping[str, str]) -> AbstractContextManager[Span | None]:
    """Return the span of an HTTP request, named without the names of objects; adds its trace context to the headers."""
    if not _is_inside():
        return _OFF
    from opentelemetry.trace import SpanKind

    route = path.partition("?")[0]
    if method == "GET":
        route = "/".join(route.split("/")[:2])
    return _span(_Active.tracer, f"{method} {route}", SpanKind.CLIENT, None, headers)


def step(name: str) -> AbstractContextManager[Span | None]:
    """Return the span of a part of a call."""
    if not _is_inside():
        return _OFF
    from opentelemetry.trace import SpanKind

    return _span(_Active.tracer, name, SpanKind.INTERNAL, None)


def fail(span: Span, why: str) -> None:
    from opentelemetry.trace import Status, StatusCode

    span.set_status(Status(StatusCode.ERROR, why))


def carried(work: Callable[[], T]) -> Callable[[], T]:
    """Return the same work, which belongs to the present span in another thread too."""
    return work if _Active.tracer is None else partial(contextvars.copy_context().run, work)


def _is_inside() -> bool:
    """Return whether a call is being traced here: background work and health checks begin no trace."""
    if _Active.tracer is None:
        return False
    from opentelemetry.trace import get_current_span

    return get_current_span().get_span_context().is_valid


@contextmanager
def _span(
    tracer: Tracer | None,
    name: str,
    kind: SpanKind,
    parent: Context | None,
    headers: MutableMapping[str, str] | None = None,
) -> Iterator[Span | None]:
    if tracer is None:  # tracing was stopped meanwhile
        yield None
        return
    from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

    # The message of an exception is not recorded: it may quote a program or a server.
    with tracer.start_as_current_span(
        name, parent, kind, record_exception=False, set_status_on_exception=False
    ) as span:
        if headers is not None:
            TraceContextTextMapPropagator().inject(headers)
        try:
            yield span
        except BaseException as error:
            fail(span, type(error).__name__)
            raise


def describe(span: Span, *, server: str, status: int) -> None:
    """Record the outcome of an HTTP request."""
    span.set_attributes({"server.address": server, "http.response.status_code": status})
    if status >= _FIRST_ERROR:
        fail(span, str(status))
