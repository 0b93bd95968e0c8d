# SPDX-License-Identifier: Apache-2.0
"""The only place between gRPC and the driver: log, required fields, locks, handler, status.

Only this module calls `abort`, outside any `try`: it raises a bare Exception (grpc/_server.py, `_Context.abort`).
Sources: CSI specification, "Error Scheme" and the error tables of every RPC; the details of a status stay empty.
"""

from __future__ import annotations

import itertools
import logging
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import TYPE_CHECKING, ClassVar

import grpc
from google.protobuf.descriptor import FileDescriptor
from google.protobuf.message import DecodeError, Message
from google.protobuf.message_factory import GetMessageClass
from grpc import _server

from csi_driver import errors
from csi_driver.deadline import Deadline
from csi_driver.node.concurrency import functions_of
from csi_driver.rpc import validation
from csi_driver.rpc.contract import ADDONS, RPCS, LockKey, Locks, Rpc, ThreadPools, thread_pools
from csi_driver.rpc.pb import csi_pb2
from csi_driver.rpc.redaction import describe
from csi_driver.telemetry import tracing
from csi_driver.telemetry.metrics import rpc_durations, running_calls
from csi_driver.thread_pool import Pool

if TYPE_CHECKING:
    from opentelemetry.trace import Span

    from csi_driver.telemetry.metrics import Metric

_LOG = logging.getLogger(__name__)

_Code = grpc.StatusCode
CODES: Mapping[type[errors.DriverError], grpc.StatusCode] = MappingProxyType(
    {
        errors.InvalidRequest: _Code.INVALID_ARGUMENT,
        errors.NotFound: _Code.NOT_FOUND,
        errors.Incompatible: _Code.ALREADY_EXISTS,
        errors.CapacityOutOfRange: _Code.OUT_OF_RANGE,
        errors.Exhausted: _Code.RESOURCE_EXHAUSTED,
        errors.PreconditionFailed: _Code.FAILED_PRECONDITION,
        errors.OperationPending: _Code.ABORTED,
        errors.StaleToken: _Code.ABORTED,
        errors.Denied: _Code.PERMISSION_DENIED,
        errors.Unauthenticated: _Code.UNAUTHENTICATED,
        errors.StorageUnavailable: _Code.UNAVAILABLE,
        errors.NotOffered: _Code.UNIMPLEMENTED,
        errors.HostFailure: _Code.INTERNAL,
    }
)
"""Family of errors to gRPC code. A test proves that no family is missing."""

_MESSAGE_LIMIT_CHARACTERS = 1000
# A status message travels in a trailer, where clients accept 8 KiB and a non-ASCII byte takes three characters
# (https://github.com/grpc/grpc/blob/master/doc/PROTOCOL-HTTP2.md, "Status-Message").
_NAME_LIMIT_CHARACTERS = 256
_NO_SPAN = nullcontext()
_INTERNAL_ERROR = "internal error in the driver; its log has the details"
_REPLY_MARGIN_S = 0.25
"""A call that hangs is answered this long before its deadline. A use case that waits ends earlier by itself
(`NodeSettings.answer_margin_s`), with a better message."""
_NO_DEADLINE_S = 365 * 24 * 3600.0  # gRPC reports a call without deadline as one far in the future

Handler = Callable[[Message, Deadline], Message]
StreamHandler = Callable[[Message, Deadline], Iterator[Message]]
Late = Callable[["Refusal"], None]
"""Answers a call in place of its thread, which is blocked."""


def code_of(error: errors.DriverError) -> grpc.StatusCode:
    return next((CODES[ancestor] for ancestor in type(error).__mro__ if ancestor in CODES), _Code.INTERNAL)


def message_of(error: errors.DriverError) -> str:
    """Return the status message: never empty, one line, printable, short enough for a trailer."""
    return errors.one_line(" ".join(str(error).split()) or type(error).__name__, _MESSAGE_LIMIT_CHARACTERS)


class Service:
    """A service, named as in its file. It has a method for each RPC, which takes the request and the deadline."""

    file: ClassVar[FileDescriptor] = csi_pb2.DESCRIPTOR
    name: ClassVar[str]
    at_once: ClassVar[int] = 2
    """Calls of a thread pool that compute at the same time. More would wait for the interpreter's lock."""


@dataclass(frozen=True, slots=True)
class Unreadable:
    """Replaces a request that is not a valid message."""

    reason: str


@dataclass(frozen=True, slots=True)
class Refusal:
    """A response other than OK."""

    code: grpc.StatusCode
    message: str


@dataclass(slots=True)
class RunningCalls:
    """The calls that are being executed, whether or not their caller still waits."""

    _changed: threading.Condition = field(default_factory=threading.Condition)
    _calls: dict[int, tuple[Rpc, float]] = field(default_factory=dict)
    _seen: dict[str, Rpc] = field(default_factory=dict)

    def begin(self, number: int, rpc: Rpc, began_s: float) -> None:
        with self._changed:
            self._calls[number] = (rpc, began_s)
            self._seen.setdefault(rpc.method, rpc)

    def end(self, number: int) -> None:
        with self._changed:
            del self._calls[number]
            self._changed.notify_all()

    def by_method(self) -> dict[tuple[str, str], tuple[int, float]]:
        """Return the number of running calls and the age of the oldest, for each service and method called so far."""
        with self._changed:
            calls, seen = list(self._calls.values()), list(self._seen.values())
        now_s = time.monotonic()
        found = {(rpc.service, rpc.name): (0, 0.0) for rpc in seen}
        for rpc, began_s in calls:
            count, oldest_s = found[rpc.service, rpc.name]
            found[rpc.service, rpc.name] = count + 1, max(oldest_s, now_s - began_s)
        return found

    def wait_for_none(self, timeout_s: float) -> list[str]:
        """Wait until no call runs; return the names of those that still run after the timeout."""
        with self._changed:
            self._changed.wait_for(lambda: not self._calls, timeout_s)
            return sorted(f"{rpc.name}#{number}" for number, (rpc, _) in self._calls.items())


@dataclass(eq=False)
class Boundary:
    """Wraps every RPC of a server.

    Work on devices may hang in the kernel: the call is answered in time, and its thread keeps the locks until it ends.
    """

    disabled: frozenset[str] = frozenset()
    """Methods to answer UNIMPLEMENTED although they exist."""
    default_deadline_s: float = 60.0
    pools: ThreadPools = field(default_factory=thread_pools)
    running: RunningCalls = field(default_factory=RunningCalls)

    def __post_init__(self) -> None:
        self.durations = rpc_durations()
        self._locks = Locks()
        self._numbers = itertools.count(1)

    def lock_volume(self, name: str) -> AbstractContextManager[None]:
        """Lock a volume by its name in the storage against all calls; raises `OperationPending` while one runs."""
        return self._locks.hold(LockKey("volume", name, f"volume {errors.shown(name)}"))

    def measurements(self) -> list[Metric]:
        return [self.durations, *running_calls(self.running.by_method)]

    def handlers(self, service: Service) -> grpc.GenericRpcHandler[Message, Message]:
        """Return the wrapped RPCs of a service for gRPC, which answers UNIMPLEMENTED to all others."""
        descriptor = service.file.services_by_name[service.name]
        handlers = {}
        for method in descriptor.methods:
            path = f"/{descriptor.full_name}/{method.name}"
            rpc = RPCS.get(path) or ADDONS.get(path)
            if rpc is None or rpc.method in self.disabled:
                continue
            request, response = GetMessageClass(method.input_type), GetMessageClass(method.output_type)
            made, is_stream = (self, rpc, getattr(service, method.name), self.pools[rpc.pool]), method.server_streaming
            kind = grpc.unary_stream_rpc_method_handler if is_stream else grpc.unary_unary_rpc_method_handler
            handlers[method.name] = kind(
                _StreamBehaviour(*made) if is_stream else _Behaviour(*made),
                request_deserializer=_tolerant(request.FromString),
                response_serializer=response.SerializeToString,
            )
        return grpc.method_handlers_generic_handler(descriptor.full_name, handlers)

    def answer(
        self, rpc: Rpc, handler: Handler, request: Message | Unreadable, remaining_s: float | None, late: Late
    ) -> Message | Refusal:
        """Execute a call in a thread of its pool.

        One that may hang and is blocked shortly before `remaining_s` ends is answered by `late`, while its work
        continues; `_Answered` is raised in the end.
        """
        number = next(self._numbers)
        remaining_s = self._limited(remaining_s)
        deadline = Deadline.after(remaining_s)
        if not rpc.may_hang:
            return self._execute(number, rpc, handler, request, deadline)
        late_s = deadline.at_s - min(_REPLY_MARGIN_S, remaining_s / 4)
        was_late = self.pools[rpc.pool].when_late(late_s, lambda thread: late(_refuse_late(rpc, request, thread)))
        outcome = self._execute(number, rpc, handler, request, deadline)
        if was_late():
            raise _Answered
        return outcome

    def stream(
        self, rpc: Rpc, handler: StreamHandler, request: Message | Unreadable, remaining_s: float | None
    ) -> Iterator[Message | Refusal]:
        """Execute a call that answers with several messages, each made when the one before was sent."""
        name, deadline = f"{rpc.name}#{(number := next(self._numbers))}", Deadline.after(self._limited(remaining_s))
        with self._measured(number, rpc) as took:
            try:
                with self._admitted(name, rpc, request) as message:
                    yield from handler(message, deadline)
                took.code = _Code.OK
            except Exception as error:
                refusal = took.refused(name, error)
                yield refusal

    def _limited(self, remaining_s: float | None) -> float:
        return self.default_deadline_s if remaining_s is None or remaining_s > _NO_DEADLINE_S else remaining_s

    def _execute(
        self, number: int, rpc: Rpc, handler: Handler, request: Message | Unreadable, deadline: Deadline
    ) -> Message | Refusal:
        name = f"{rpc.name}#{number}"
        with self._measured(number, rpc) as took:
            try:
                with self._admitted(name, rpc, request) as message:
                    response = handler(message, deadline)
            except Exception as error:
                return took.refused(name, error)
            took.code = _Code.OK
            _LOG.debug("%s is done after %.3f s", name, took.seconds)
            return response

    @contextmanager
    def _measured(self, number: int, rpc: Rpc) -> Iterator[_Took]:
        took = _Took()
        self.running.begin(number, rpc, took.began_s)
        try:
            yield took
        finally:
            self.running.end(number)
            self.durations.labels(rpc.service, rpc.name, took.code.name).observe(took.seconds)

    @contextmanager
    def _admitted(self, name: str, rpc: Rpc, request: Message | Unreadable) -> Iterator[Message]:
        """Log and check a request, and hold its locks. Raises leaves of DriverError."""
        if isinstance(request, Unreadable):
            raise errors.InvalidRequest(request.reason)
        level = logging.DEBUG if rpc.quiet else logging.INFO
        if _LOG.isEnabledFor(level):
            _LOG.log(level, "%s %s", name, describe(request))
        validation.check(request, rpc.required)
        with self._locks.hold(*rpc.lock_keys(request)):
            yield request


@dataclass(slots=True)
class _Took:
    """The time of a call, and its outcome: cancelled, where nothing else was said."""

    began_s: float = field(default_factory=time.monotonic)
    code: grpc.StatusCode = _Code.CANCELLED

    @property
    def seconds(self) -> float:
        return time.monotonic() - self.began_s

    def refused(self, name: str, error: Exception) -> Refusal:
        """Log an error, and return the answer to it."""
        if not isinstance(error, errors.DriverError):
            _LOG.error("%s failed by a bug in the driver", name, exc_info=error)
            self.code = _Code.INTERNAL
            return Refusal(self.code, _INTERNAL_ERROR)
        refusal = Refusal(code_of(error), message_of(error))
        self.code = refusal.code
        _LOG.warning("%s answers %s after %.3f s: %s", name, refusal.code.name, self.seconds, refusal.message)
        _LOG.debug("%s was refused here", name, exc_info=error)
        return refusal


class _Answered(BaseException):
    """Ends a call that was answered late. gRPC answers every `Exception`; the thread pool takes this one."""


def _refuse_late(rpc: Rpc, request: Message | Unreadable, thread: int) -> Refusal:
    volume, functions = errors.shown(getattr(request, "volume_id", "")), functions_of(thread)
    message = (
        f"{rpc.name} of volume {volume} did not finish in time: it is blocked in {functions or 'a queue'};"
        " it continues, and other calls for the volume are answered ABORTED until it ends"
    )
    _LOG.warning("%s", message)
    return Refusal(_Code.DEADLINE_EXCEEDED, message)


@dataclass(frozen=True, slots=True)
class _Behaviour:
    """A handler in the form that grpcio calls. `experimental_thread_pool` is grpcio's name."""

    boundary: Boundary
    rpc: Rpc
    handler: Handler
    experimental_thread_pool: Pool

    def __call__(self, request: Message | Unreadable, context: grpc.ServicerContext) -> Message:
        def late(refusal: Refusal) -> None:
            # Only the thread of a call may abort it; this is what gRPC does for a call that has returned nothing.
            context.set_code(refusal.code)
            context.set_details(refusal.message)
            with context._state.condition:  # type: ignore[attr-defined]
                _server._status(context._rpc_event, context._state, None)  # type: ignore[attr-defined]
            _describe(span, self.rpc, request, refusal)

        with _traced(self.rpc, context) as span:
            outcome = self.boundary.answer(self.rpc, self.handler, request, context.time_remaining(), late)
            _describe(span, self.rpc, request, outcome)
        if isinstance(outcome, Refusal):
            context.abort(outcome.code, outcome.message)
        return outcome


@dataclass(frozen=True, slots=True)
class _StreamBehaviour:
    """The same for a call that answers with several messages."""

    boundary: Boundary
    rpc: Rpc
    handler: StreamHandler
    experimental_thread_pool: Pool

    def __call__(self, request: Message | Unreadable, context: grpc.ServicerContext) -> Iterator[Message]:
        refusal: Refusal | None = None
        with _traced(self.rpc, context) as span:
            for outcome in self.boundary.stream(self.rpc, self.handler, request, context.time_remaining()):
                if isinstance(outcome, Refusal):
                    refusal = outcome
                else:
                    yield outcome
            _describe(span, self.rpc, request, refusal)
        if refusal is not None:
            context.abort(refusal.code, refusal.message)


def _traced(rpc: Rpc, context: grpc.ServicerContext) -> AbstractContextManager[Span | None]:
    return tracing.received(rpc.method, context.invocation_metadata) if rpc.is_traced else _NO_SPAN


def _describe(span: Span | None, rpc: Rpc, request: Message | Unreadable, outcome: Message | Refusal | None) -> None:
    """Record names and the code of a call: nothing else of its request and its message."""
    if span is None:
        return
    code = outcome.code if isinstance(outcome, Refusal) else _Code.OK
    span.set_attributes({"rpc.system": "grpc", "rpc.service": rpc.service, "rpc.method": rpc.name})
    span.set_attribute("rpc.grpc.status_code", code.value[0])
    made = getattr(outcome, "volume", None)  # of CreateVolume
    names = {
        "csi.name": getattr(request, "name", ""),
        "csi.volume_id": getattr(request, "volume_id", "") or getattr(made, "volume_id", ""),
    }
    span.set_attributes({key: value[:_NAME_LIMIT_CHARACTERS] for key, value in names.items() if value})
    if code is not _Code.OK:
        tracing.fail(span, code.name)


def _tolerant(parse: Callable[[bytes], Message]) -> Callable[[bytes], Message | Unreadable]:
    """Let a malformed request reach the boundary; grpcio itself would answer INTERNAL."""

    def parse_or_explain(data: bytes) -> Message | Unreadable:
        try:
            return parse(data)
        except DecodeError as error:
            return Unreadable(f"the request is not a valid message: {error}")

    return parse_or_explain
