"""The one place between gRPC and the driver: log, required fields, exclusivity, handler, status.

Nothing else calls `abort`, and `abort` is called outside any `try`: it raises a bare Exception
(grpc/_server.py, `_Context.abort`). Status details stay empty (CSI specification, "Error Scheme").
"""

from __future__ import annotations

import itertools
import logging
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import TypeAlias

import grpc
from google.protobuf.message import DecodeError, Message

from csi_driver import errors
from csi_driver.node.questions import NoAnswer, Questions
from csi_driver.rpc import shape
from csi_driver.rpc.contract import CONTRACT, Lane, Row
from csi_driver.rpc.deadlines import Deadlines
from csi_driver.rpc.inflight import Claims, InFlight
from csi_driver.rpc.lanes import WORK_THREADS, Lanes
from csi_driver.rpc.redaction import describe
from csi_driver.rpc.status import code_of, message_of
from csi_driver.telemetry.measured import rpc_durations, work_under_way
from csi_driver.telemetry.metrics import Measurement

_LOG = logging.getLogger(__name__)

_ANSWER_MARGIN_S = 0.25
"""How long before its caller gives up a call is answered that hangs. What waits by itself ends before that
(`NodeSettings.answer_margin_s`) and says better what it waits for."""

_BUG_MESSAGE = "internal error in the driver; its log has the details"

Handler = Callable[[Message, grpc.ServicerContext], Message]
MethodHandler: TypeAlias = "grpc.RpcMethodHandler[Message, Message]"


@dataclass(frozen=True, slots=True)
class Unreadable:
    """Stands for a request whose bytes are not the message that was due."""

    reason: str


@dataclass(frozen=True, slots=True)
class Refusal:
    """An answer other than OK."""

    code: grpc.StatusCode
    message: str


class Running:
    """Counts the calls that are being carried out, whether or not their caller still listens."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._calls: dict[int, tuple[Row, float]] = {}
        self._met: dict[str, Row] = {}

    def begin(self, number: int, row: Row, began_s: float) -> None:
        """Note that a call begins."""
        with self._changed:
            self._calls[number] = (row, began_s)
            self._met.setdefault(row.method, row)

    def end(self, number: int) -> None:
        """Note that it has ended."""
        with self._changed:
            del self._calls[number]
            self._changed.notify_all()

    def by_method(self) -> dict[tuple[str, str], tuple[int, float]]:
        """Return how many calls run and the age of the oldest, in seconds, by service and method called so far."""
        with self._changed:
            calls, met = list(self._calls.values()), list(self._met.values())
        now_s = time.monotonic()
        found = {(row.service, row.name): (0, 0.0) for row in met}
        for row, began_s in calls:
            count, oldest_s = found[row.service, row.name]
            found[row.service, row.name] = count + 1, max(oldest_s, now_s - began_s)
        return found

    def wait_for_none(self, timeout_s: float) -> list[str]:
        """Wait until nothing runs, at most so long; return the names of the calls that still do."""
        with self._changed:
            self._changed.wait_for(lambda: not self._calls, timeout_s)
            return sorted(f"{row.name}#{number}" for number, (row, _) in self._calls.items())


class Boundary(grpc.ServerInterceptor):  # type: ignore[type-arg]  # generic in the stubs alone
    """Wraps every handler of a server.

    Work on devices is carried out by a thread that can be lost. Where it does not end in time the call is answered, and
    the thread holds what the call claimed until it ends after all: nobody else works on the volume before that.
    """

    def __init__(
        self,
        claims: Claims,
        lanes: Lanes,
        withheld: frozenset[str] = frozenset(),
        deadlines: Deadlines = Deadlines(),  # noqa: B008  # a value
    ) -> None:
        """`withheld`: methods that are answered UNIMPLEMENTED although they are there."""
        self.running = Running()
        self.durations = rpc_durations()
        self._claims = claims
        self._withheld = withheld
        self._lanes = lanes
        self._deadlines = deadlines
        self._expendable: Questions[Message | Refusal] = Questions("volume-work", WORK_THREADS)
        self._expendable_calls = itertools.count(1)
        self._in_flight = InFlight()
        self._wrapped: dict[str, MethodHandler] = {}
        self._numbers = itertools.count(1)

    def keeping_off(self, name: str) -> AbstractContextManager[None]:
        """Keep every call off the volume of that name inside a block; `OperationPending` while one works on it."""
        return self._in_flight.holding(self._claims.named(name))

    def intercept_service(
        self,
        continuation: Callable[[grpc.HandlerCallDetails], MethodHandler | None],
        handler_call_details: grpc.HandlerCallDetails,
    ) -> MethodHandler | None:
        """Return the wrapped handler of a method; None (UNIMPLEMENTED) where no service has it."""
        method = handler_call_details.method
        if method not in self._wrapped:
            handler = continuation(handler_call_details)
            if handler is None or handler.unary_unary is None or handler.request_deserializer is None:
                return handler
            self._wrapped[method] = self._wrap(method, handler, handler.unary_unary, handler.request_deserializer)
        return self._wrapped[method]

    def _wrap(
        self, method: str, handler: MethodHandler, inner: Handler, parse: Callable[[bytes], Message]
    ) -> MethodHandler:
        row = None if method in self._withheld else CONTRACT.get(method)
        pool = self._lanes.pool(row.lane if row else Lane.ANSWER)
        return grpc.unary_unary_rpc_method_handler(
            _Behaviour(self, row, method, inner, pool),
            request_deserializer=_tolerant(parse),
            response_serializer=handler.response_serializer,
        )

    def measurements(self) -> list[Measurement]:
        """Return what is measured of the calls."""
        return [self.durations, *work_under_way(self.running.by_method)]

    def answer_in_time(
        self, row: Row, inner: Handler, request: Message | Unreadable, context: grpc.ServicerContext
    ) -> Message | Refusal:
        """Carry out one call; one that may hang is answered before its deadline, and goes on then."""
        if not row.may_hang:
            return self.answer(row, inner, request, context)
        remaining_s = self._deadlines.of(context).remaining_s()
        timeout_s = remaining_s - min(_ANSWER_MARGIN_S, remaining_s / 4)
        try:
            return self._expendable.ask(
                str(next(self._expendable_calls)),
                row.name,
                lambda: self.answer(row, inner, request, context),
                timeout_s,
            )
        except NoAnswer as silence:
            volume = errors.shown(getattr(request, "volume_id", ""))
            refusal = Refusal(
                grpc.StatusCode.DEADLINE_EXCEEDED,
                f"{row.name} of volume {volume} has not ended in time: it waits in "
                f"{silence.waits_in or 'a queue'}; it goes on, and the volume is busy (ABORTED) until it ends",
            )
            _LOG.warning("%s", refusal.message)
            return refusal

    def answer(
        self, row: Row, inner: Handler, request: Message | Unreadable, context: grpc.ServicerContext
    ) -> Message | Refusal:
        """Carry out one call; every outcome but OK is a `Refusal`."""
        number, began_s = next(self._numbers), time.monotonic()
        self.running.begin(number, row, began_s)
        try:
            outcome = self._outcome(row, f"{row.name}#{number}", inner, request, context)
        finally:
            self.running.end(number)
        code = outcome.code if isinstance(outcome, Refusal) else grpc.StatusCode.OK
        self.durations.observe(time.monotonic() - began_s, row.service, row.name, code.name)
        return outcome

    def _outcome(
        self, row: Row, name: str, inner: Handler, request: Message | Unreadable, context: grpc.ServicerContext
    ) -> Message | Refusal:
        began_s = time.monotonic()
        try:
            if isinstance(request, Unreadable):
                raise errors.InvalidRequest(request.reason)
            _LOG.log(logging.DEBUG if row.quiet else logging.INFO, "%s %s", name, _Lazy(request))
            shape.check(request, row.required)
            with self._in_flight.holding(row.claims(self._claims, request)):
                response = inner(request, context)
        except errors.DriverError as error:
            refusal = Refusal(code_of(error), message_of(error))
            took_s = time.monotonic() - began_s
            _LOG.warning("%s answers %s after %.3f s: %s", name, refusal.code.name, took_s, refusal.message)
            _LOG.debug("%s was refused here", name, exc_info=error)
            return refusal
        except Exception:  # a bug
            _LOG.exception("%s met a bug in the driver", name)
            return Refusal(grpc.StatusCode.INTERNAL, _BUG_MESSAGE)
        _LOG.debug("%s is done after %.3f s", name, time.monotonic() - began_s)
        return response


class _Lazy:
    """Describes a message only if its log line is written."""

    def __init__(self, message: Message) -> None:
        self._message = message

    def __str__(self) -> str:
        return describe(self._message)


class _Behaviour:
    """A handler as grpcio calls it."""

    def __init__(
        self, boundary: Boundary, row: Row | None, method: str, inner: Handler, pool: ThreadPoolExecutor
    ) -> None:
        self.experimental_thread_pool = pool
        self._boundary = boundary
        self._row = row
        self._method = method
        self._inner = inner

    def __call__(self, request: Message | Unreadable, context: grpc.ServicerContext) -> Message:
        outcome = self._outcome(request, context)
        if isinstance(outcome, Refusal):
            context.abort(outcome.code, outcome.message)
        return outcome

    def _outcome(self, request: Message | Unreadable, context: grpc.ServicerContext) -> Message | Refusal:
        if self._row is None:
            return Refusal(grpc.StatusCode.UNIMPLEMENTED, f"{self._method} is not implemented by this driver")
        return self._boundary.answer_in_time(self._row, self._inner, request, context)


def _tolerant(parse: Callable[[bytes], Message]) -> Callable[[bytes], Message | Unreadable]:
    """Let bytes that cannot be read reach the boundary; grpcio by itself answers INTERNAL."""

    def parse_or_explain(data: bytes) -> Message | Unreadable:
        try:
            return parse(data)
        except DecodeError as error:
            return Unreadable(f"the request cannot be read: {error}")

    return parse_or_explain
