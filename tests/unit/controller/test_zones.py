# SPDX-License-Identifier: Apache-2.0
"""Requests to several zones at once, and the readiness of the controller."""

from __future__ import annotations

import threading

import pytest

from csi_driver.controller.zones import ZonePool, any_of, ask
from csi_driver.deadline import Deadline
from csi_driver.errors import DeadlineReached, InvalidRequest, PreconditionFailed, StorageUnavailable, Unauthenticated
from tests.unit.controller.world import World


def test_all_zones_are_asked_at_the_same_time() -> None:
    meet = threading.Barrier(3, timeout=180)
    answers = ask(("a", "b", "c"), lambda zone: (meet.wait(), zone)[1], deadline=Deadline.after(30), pool=ZonePool())
    assert answers.all() == {"a": "a", "b": "b", "c": "c"}


def test_a_zone_that_hangs_costs_only_its_own_answer() -> None:
    hung = threading.Event()
    pool = ZonePool(per_zone=1)

    def question(zone: str) -> str:
        if zone == "dead":
            hung.wait(30)
        return zone

    try:
        for _ in range(3):
            answers = ask(("dead", "alive"), question, deadline=Deadline.after(0.05), pool=pool)
            assert answers.given == {"alive": "alive"}
            assert isinstance(answers.missing["dead"], DeadlineReached)
    finally:
        hung.set()


def test_every_request_is_sent_with_few_threads() -> None:
    pool = ZonePool(per_zone=3)
    asked = [pool.submit("few", lambda number=number: number) for number in range(500)]  # type: ignore[misc]
    assert [future.result(180) for future in asked] == list(range(500))
    assert len([each for each in threading.enumerate() if each.name.startswith("zone-few-")]) <= 3


def test_a_request_that_hangs_does_not_delay_the_end_of_the_process() -> None:
    hung = threading.Event()
    try:
        ZonePool().submit("dead", lambda: hung.wait(30))
        assert all(each.daemon for each in threading.enumerate() if each.name.startswith("zone-dead"))
    finally:
        hung.set()


def test_an_optional_zone_is_not_waited_for() -> None:
    hung = threading.Event()
    try:
        answers = ask(
            ("a",), lambda zone: hung.wait(30) if zone == "b" else zone, deadline=Deadline.after(60), optional=("b",),
            pool=ZonePool(),
        )  # fmt: skip
        assert answers.given == {"a": "a"}
    finally:
        hung.set()


def test_an_error_of_a_zone_that_answers_is_raised() -> None:
    def refuse(zone: str) -> None:
        raise InvalidRequest(zone)

    with pytest.raises(InvalidRequest):
        ask(("a", "b"), refuse, deadline=Deadline.after(30), pool=ZonePool())


def test_readiness_does_not_wait_for_a_zone_that_hangs() -> None:
    hung = threading.Event()
    try:
        assert any_of(
            ("dead", "alive"),
            lambda zone: zone == "alive" or hung.wait(30),
            deadline=Deadline.after(60),
            pool=ZonePool(),
        )
    finally:
        hung.set()


def test_the_driver_is_ready_if_one_of_many_zones_answers() -> None:
    zones = [f"old-{number}" for number in range(30)]
    all_refused = threading.Barrier(len(zones) + 1, timeout=180)

    def question(zone: str) -> bool:
        all_refused.wait()
        if zone == "alive":
            return True
        raise PreconditionFailed("its management is too old")

    assert any_of([*zones, "alive"], question, deadline=Deadline.after(180), pool=ZonePool())
    with pytest.raises(StorageUnavailable, match="zone old-1: its management is too old"):
        any_of([*zones, "old-30"], question, deadline=Deadline.after(180), pool=ZonePool())


# --- readiness ------------------------------------------------------------------------------------------------


def test_a_management_that_refuses_the_login_is_not_ready() -> None:
    world = World()

    def refuse(request: str) -> None:
        raise Unauthenticated("user 'csi' with the password in /secret is not accepted")

    world.management.before = refuse
    with pytest.raises(Unauthenticated, match="the password in /secret"):
        world.readiness.any_answers(world.deadline())


def test_zones_without_an_answer_are_named_with_their_errors() -> None:
    world = World(zones=("a", "b"))
    for zone in world.zones.values():
        zone.is_reachable = False
    with pytest.raises(StorageUnavailable, match=r"zone a: .*zone b: "):
        world.readiness.any_answers(world.deadline())
