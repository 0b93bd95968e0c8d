# SPDX-License-Identifier: Apache-2.0
"""A storm of findings costs the API server a bounded number of requests, and equal findings are one event."""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from csi_driver.background import Background
from csi_driver.deadline import Deadline
from csi_driver.kubernetes.api import ApiFailed, ApiServer
from csi_driver.kubernetes.events import BURST, EXPIRY_S, MOST_WAITING, REFILL_S, REPEAT_S, EventRecorder
from csi_driver.model import Claim
from csi_driver.reporting import EventReason, Subject
from csi_driver.settings import ApiSettings
from tests.fakes.clock import FakeClock

UID = "0d7c1f0e-5a3b-4f6d-9c1e-2b7a8d9e0f11"


@dataclass(slots=True)
class Server(ApiServer):
    """Keeps what it is sent, with the time. `status`: of the refusal of every request."""

    clock: FakeClock = field(default_factory=lambda: FakeClock(1000.0))
    status: int | None = 201
    created: list[tuple[float, Mapping[str, Any]]] = field(default_factory=list)
    counted: list[tuple[float, str, int]] = field(default_factory=list)
    expired: set[str] = field(default_factory=set)

    def create_event(self, namespace: str, event: Mapping[str, object]) -> None:
        self.created.append((self.clock.now_s, event))
        self._answer()

    def repeat_event(self, namespace: str, name: str, series: Mapping[str, Any]) -> bool:
        self.counted.append((self.clock.now_s, name, series["count"]))
        self._answer()
        return name not in self.expired

    def _answer(self) -> None:
        if self.status != 201:
            raise ApiFailed("record an event", "no", self.status)


class World:
    """A recorder whose thread is not started: what waits is sent when the time passes."""

    def __init__(self, node_name: str = "") -> None:
        self.clock = FakeClock(1000.0)
        self.server = Server(ApiSettings(), clock=self.clock)
        self.recorder = EventRecorder(self.server, "driver", "pod", node_name, self.clock)
        self.recorder.worker.start = lambda: None  # type: ignore[method-assign]

    def report(self, volume: int = 0, note: str = "busy", reason: EventReason = EventReason.VOLUME_IN_USE) -> None:
        self.recorder.report(Subject(Claim("team-a", f"claim-{volume}", UID)), reason, note)

    def passes(self, seconds: float) -> None:
        self.recorder.worker.run_due()
        self.clock.now_s += seconds
        self.recorder.worker.run_due()

    @property
    def requests(self) -> int:
        return len(self.server.created) + len(self.server.counted)


@given(
    volumes=st.integers(1, 130),
    retries=st.integers(1, 8),
    pauses=st.lists(st.floats(0.0, 400.0), min_size=1, max_size=10),
    status=st.sampled_from([201, 403, 500, None]),
)
def test_a_storm_of_volumes_and_retries_gives_at_most_so_many_requests(
    volumes: int, retries: int, pauses: Sequence[float], status: int | None
) -> None:
    world = World()
    world.server.status = status
    for retry in range(retries):
        for volume in range(volumes):
            world.report(volume)
        world.passes(pauses[retry % len(pauses)])
    took_s = world.clock.now_s - 1000
    assert world.requests <= BURST + took_s / REFILL_S + 1
    assert world.requests <= volumes * (1 + took_s / REPEAT_S)
    assert len(world.recorder._waiting) <= MOST_WAITING


@given(st.lists(st.tuples(st.integers(0, 2), st.sampled_from(["a", "b"]), st.floats(0.0, 1000.0)), max_size=40))
def test_no_event_is_sent_twice_in_five_minutes_and_counts_only_rise(
    findings: Sequence[tuple[int, str, float]],
) -> None:
    world = World()
    for volume, note, pause_s in findings:
        world.report(volume, note)
        world.passes(pause_s)
    sent: dict[object, list[float]] = {}
    names: dict[str, object] = {}
    for at_s, event in world.server.created:
        key = (event["regarding"]["name"], event["note"])
        names[event["metadata"]["name"]] = key
        sent.setdefault(key, []).append(at_s)
    for at_s, name, _ in world.server.counted:
        sent[names[name]].append(at_s)
    for times in map(sorted, sent.values()):
        assert all(after - before >= REPEAT_S for before, after in pairwise(times))
    reports = Counter((f"claim-{volume}", note) for volume, note, _ in findings)
    counts: dict[str, list[int]] = {}
    for _, name, count in world.server.counted:
        counts.setdefault(name, []).append(count)
    for name, series in counts.items():
        assert series == sorted(set(series))
        assert 2 <= series[-1] <= reports[names[name]]  # type: ignore[index]


def test_equal_findings_are_one_event_with_their_count() -> None:
    world = World()
    for _ in range(10):
        world.report()
        world.passes(40)
    ((_, event),) = world.server.created
    assert world.server.counted == [(1320.0, event["metadata"]["name"], 9)]


def test_a_machine_without_threads_delays_an_event_and_disturbs_no_caller(monkeypatch: pytest.MonkeyPatch) -> None:
    world = World()
    world.recorder.worker.start = lambda: Background.start(world.recorder.worker)  # type: ignore[method-assign]

    def refuse(_: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    with world.recorder:
        with monkeypatch.context() as patched:
            patched.setattr(threading.Thread, "start", refuse)
            world.report(1)
        world.report(2)
        assert Deadline.after(30).wait_until(lambda: len(world.server.created) == 2)


def test_what_finds_the_queue_full_is_not_kept() -> None:
    world = World()
    for volume in range(3 * MOST_WAITING):
        world.report(volume)
    assert len(world.recorder._series) == MOST_WAITING
    world = World()
    for volume in range(MOST_WAITING + 30):  # all of them are known, and their events are due again
        world.report(volume)
        world.passes(20)
    world.clock.now_s += REPEAT_S
    for volume in range(MOST_WAITING + 30):
        world.report(volume)
    assert len(world.recorder._waiting) == MOST_WAITING


def test_another_note_is_another_event() -> None:
    world = World()
    world.report(note="busy: pid 7")
    world.report(note="busy: pid 8")
    world.passes(0)
    assert [event["note"] for _, event in world.server.created] == ["busy: pid 7", "busy: pid 8"]


def test_an_event_that_expired_in_the_api_server_is_created_again() -> None:
    world = World()
    world.report()
    world.passes(0)
    world.server.expired = {world.server.created[0][1]["metadata"]["name"]}
    world.clock.now_s += REPEAT_S
    world.report()
    world.passes(0)
    assert len({event["metadata"]["name"] for _, event in world.server.created}) == 2
    assert [count for _, _, count in world.server.counted] == [2]


def test_a_finding_after_a_long_time_is_a_new_event() -> None:
    world = World()
    world.report()
    world.passes(EXPIRY_S + 1)
    world.report()
    world.passes(0)
    assert (len(world.server.created), world.server.counted) == (2, [])


def test_a_lost_event_is_created_when_the_api_server_is_back() -> None:
    world = World()
    world.server.status = None
    world.report()
    world.passes(0)
    world.server.status = 201
    for _ in range(3):
        world.clock.now_s += REPEAT_S
        world.report()
        world.passes(0)
    assert len(world.server.created) == 2
    assert [count for _, _, count in world.server.counted] == [3, 4]


def test_findings_that_find_the_queue_full_are_dropped() -> None:
    world = World()
    for volume in range(MOST_WAITING + 7):
        world.report(volume)
    assert world.requests == 0
    for _ in range(2 * MOST_WAITING):
        world.passes(REFILL_S)
    assert world.requests == MOST_WAITING


def test_nothing_is_kept_of_volumes_that_are_long_gone() -> None:
    world = World()
    for volume in range(3000):
        world.report(volume)
        world.passes(REFILL_S)
    assert len(world.recorder._series) <= 1000


def test_nothing_is_sent_after_the_end() -> None:
    world = World()
    world.report()
    with world.recorder:
        pass
    world.report(1)
    world.passes(0)
    assert world.requests == 0
