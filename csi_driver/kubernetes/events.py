# SPDX-License-Identifier: Apache-2.0
"""Record findings as Kubernetes Events (events.k8s.io/v1) on claims, nodes and the CSIDriver object.

Equal findings are one event: the API server gets its count at most once in `REPEAT_S`. A token bucket limits all
events of the process, and a bounded queue holds those that wait. Requests are made in one background thread; a finding
that cannot be recorded is lost. docs/events.md has each reason, and what to do.
"""

from __future__ import annotations

import logging
import threading
import uuid
from collections import OrderedDict, deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Self

from csi_driver.background import Worker
from csi_driver.deadline import SYSTEM_CLOCK, Clock
from csi_driver.errors import one_line
from csi_driver.kubernetes.api import ApiFailed, ApiServer, attachment_name
from csi_driver.model import Claim
from csi_driver.reporting import EventReason, Subject

_LOG = logging.getLogger(__name__)

REPEAT_S = 300.0
"""At most one request for the same event in this time; client-go counts a series as ended after six minutes."""
EXPIRY_S = 3000.0
"""After this time without a report the next one is a new event: API servers keep events for an hour by default."""
BURST = 25
"""Events at once; client-go has the same limit for each source (tools/events, tools/record)."""
REFILL_S = 10.0
"""Then one event in this time."""
MOST_WAITING = 100
MOST_KNOWN = 1000
NOTE_LIMIT_BYTES = 1024  # noteLengthLimit of pkg/apis/core/validation/events.go
_INSTANCE_LIMIT = 128
_CLOSE_S = 1.0
_JOB = "events"


@dataclass(frozen=True, slots=True)
class _Place:
    """One object of a subject. Only a volume's is looked up."""

    claim: Claim | None = None
    node: str = ""
    volume_id: str = ""

    def regarding(self, driver_name: str, driver_uid: str) -> dict[str, str]:
        if self.claim is not None:
            reference = {"kind": "PersistentVolumeClaim", "apiVersion": "v1"}
            return {**reference, "namespace": self.claim.namespace, "name": self.claim.name, "uid": self.claim.uid}
        if self.node:
            # As kubelet does; `kubectl describe node` looks for both its name and its uid.
            return {"kind": "Node", "apiVersion": "v1", "name": self.node, "uid": self.node}
        return {"kind": "CSIDriver", "apiVersion": "storage.k8s.io/v1", "name": driver_name, "uid": driver_uid}


_Key = tuple[_Place, EventReason, str]


@dataclass(slots=True)
class _Series:
    """Equal findings, and namespace and name of their event."""

    event: tuple[str, str] | None = None
    reported: int = 0
    reported_at_s: float = 0.0
    due_at_s: float = 0.0
    is_waiting: bool = False


@dataclass(slots=True)
class _Bucket:
    clock: Clock
    tokens: float = BURST
    filled_at_s: float = field(default=0.0)

    def __post_init__(self) -> None:
        self.filled_at_s = self.clock.monotonic()

    def take(self) -> float:
        """Take a token and return 0, or return the seconds until there is one."""
        now_s = self.clock.monotonic()
        self.tokens = min(BURST, self.tokens + (now_s - self.filled_at_s) / REFILL_S)
        self.filled_at_s = now_s
        if self.tokens < 1:
            return (1 - self.tokens) * REFILL_S
        self.tokens -= 1
        return 0.0


def _utc_now() -> datetime:
    return datetime.now(UTC)


@dataclass(eq=False)
class EventRecorder:
    """Reporter of a controller, or of the node `node_name`, in a with-block. `instance`: of this process."""

    server: ApiServer
    driver_name: str
    instance: str
    node_name: str = ""
    clock: Clock = SYSTEM_CLOCK
    now: Callable[[], datetime] = _utc_now
    _lock: threading.Lock = field(default_factory=threading.Lock, init=False)
    _series: OrderedDict[_Key, _Series] = field(default_factory=OrderedDict, init=False)
    _waiting: deque[_Key] = field(default_factory=deque, init=False)
    _problems: set[int | None] = field(default_factory=set, init=False)
    _driver_uid: str = field(default="", init=False)
    _state: bool | None = field(default=None, init=False)
    """None before the first finding, which starts the thread; False after the end."""

    def __post_init__(self) -> None:
        self.worker = Worker(_JOB, first_s=REFILL_S, most_s=REFILL_S, clock=self.clock)
        self._bucket = _Bucket(self.clock)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        """End without waiting for a request that hangs; what waits is lost."""
        with self._lock:
            self._state = False
            self._waiting.clear()
        self.worker.stop(_CLOSE_S)

    def report(self, subject: Subject, reason: EventReason, note: str) -> None:
        text = _shortened(note)
        with self._lock:
            if self._state is False:
                return
            added = [self._add((place, reason, text)) for place in self._places(subject)]
            if not any(added):
                return
            if self._state is None:
                try:
                    self.worker.start()
                except RuntimeError as error:  # no thread can be started now
                    _LOG.warning("an event waits: %s", error)
                    return
                self._state = True
        self.worker.later(_JOB, self.send_waiting, 0)

    def _places(self, subject: Subject) -> list[_Place]:
        node = subject.node or self.node_name
        places = [_Place(node=node)] if node else []
        if subject.claim is not None:
            places.insert(0, _Place(claim=subject.claim))
        elif subject.volume_id and self.node_name:
            places.insert(0, _Place(volume_id=subject.volume_id))
        return places or [_Place()]

    def _add(self, key: _Key) -> bool:
        """Count a finding; return whether its event waits to be sent."""
        now_s = self.clock.monotonic()
        series = self._series.pop(key, None)
        if series is None or (not series.is_waiting and now_s - series.reported_at_s > EXPIRY_S):
            if len(self._waiting) >= MOST_WAITING:
                return False
            series = _Series()
        self._series[key] = series  # the latest last
        while len(self._series) > MOST_KNOWN:
            self._series.popitem(last=False)
        series.reported += 1
        series.reported_at_s = now_s
        if series.is_waiting or now_s < series.due_at_s or len(self._waiting) >= MOST_WAITING:
            return False
        series.is_waiting = True
        self._waiting.append(key)
        return True

    def send_waiting(self) -> bool:
        """Send what waits, as far as the bucket allows; always True, for the worker."""
        while (due := self._next()) is not None:
            if isinstance(due, float):
                self.worker.later(_JOB, self.send_waiting, due)
                break
            self._send(*due)
        return True

    def _next(self) -> tuple[_Key, _Series, int] | float | None:
        """Return an event to send with the count of its findings, else the seconds until one may be sent."""
        with self._lock:
            if not self._waiting:
                return None
            if wait_s := self._bucket.take():
                return wait_s
            key = self._waiting.popleft()
            series = self._series.get(key) or _Series(reported=1)
            series.is_waiting = False
            series.due_at_s = self.clock.monotonic() + REPEAT_S
            return key, series, series.reported

    def _send(self, key: _Key, series: _Series, reported: int) -> None:
        place, reason, note = key
        try:
            if series.event is not None:
                repeated = {"count": reported, "lastObservedTime": self._moment()}
                if self.server.repeat_event(*series.event, repeated):
                    self._problems.clear()
                    return
            regarding = self._regarding(place)
            if regarding is None:
                return
            # Of an object without a namespace, in "default" (pkg/apis/core/validation/events.go).
            namespace, name = regarding.get("namespace", "default"), f"nvmesh-csi.{uuid.uuid4().hex}"
            self.server.create_event(namespace, self._event(namespace, name, regarding, reason, note))
        except ApiFailed as error:
            self._failed(error)
            return
        self._problems.clear()
        series.event = namespace, name

    def _regarding(self, place: _Place) -> dict[str, str] | None:
        if place.volume_id:
            name = attachment_name(place.volume_id, self.driver_name, self.node_name)
            claim = Claim.parse(self.server.attachment_metadata(name).get("claim", ""))
            if claim is None:
                return None
            place = _Place(claim=claim)
        elif place == _Place() and not self._driver_uid:
            self._driver_uid = self.server.driver_uid(self.driver_name)
        return place.regarding(self.driver_name, self._driver_uid)

    def _event(
        self, namespace: str, name: str, regarding: Mapping[str, str], reason: EventReason, note: str
    ) -> dict[str, object]:
        return {
            "apiVersion": "events.k8s.io/v1",
            "kind": "Event",
            "metadata": {"namespace": namespace, "name": name},
            "eventTime": self._moment(),
            "reportingController": self.driver_name,
            "reportingInstance": self.instance[:_INSTANCE_LIMIT],
            "action": reason.action,
            "reason": reason.value,
            "regarding": {key: text for key, text in regarding.items() if text},
            "note": note,
            "type": reason.type,
        }

    def _moment(self) -> str:
        return self.now().astimezone(UTC).strftime("%Y-%m-%dT%H:%M:%S.%fZ")  # MicroTime needs all six digits

    def _failed(self, error: ApiFailed) -> None:
        """Log a failure once, and again after a success."""
        level = logging.DEBUG if error.status in self._problems else logging.WARNING
        self._problems.add(error.status)
        _LOG.log(level, "an event is lost: %s", error)


def _shortened(note: str) -> str:
    return one_line(note).encode(errors="replace")[:NOTE_LIMIT_BYTES].decode(errors="ignore")
