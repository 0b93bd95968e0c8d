# SPDX-License-Identifier: Apache-2.0
"""The start-up taint is removed when the driver is ready, also later; nothing else of the node changes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from csi_driver.background import Backoff
from csi_driver.errors import StorageUnavailable
from csi_driver.kubernetes.api import ApiServer, Conflict, Node
from csi_driver.kubernetes.node_object import STARTING_INTERVAL_S, TAINT_INTERVAL_S, StartupTaint
from csi_driver.settings import ApiSettings
from tests.fakes.clock import FakeClock

KEY = "driver/agent-not-ready"
STARTUP: Mapping[str, object] = {"key": KEY, "effect": "NoSchedule", "value": "any"}
OTHER: Mapping[str, object] = {"key": "other", "effect": "NoSchedule", "timeAdded": "2026-01-01T00:00:00Z"}


@dataclass
class FakeNodes(ApiServer):
    """One node with its taints. `between`: taints set by another client between read and change, once."""

    settings: ApiSettings = field(default_factory=lambda: ApiSettings("host", 443, Path("/absent")))
    taints: list[Mapping[str, object]] = field(default_factory=lambda: [STARTUP, OTHER])
    is_registered: bool = True
    is_down: bool = False
    is_there: bool = True
    between: list[Mapping[str, object]] | None = None
    asked: list[str] = field(default_factory=list)

    def node(self, name: str) -> Node | None:
        self._asked("node")
        return Node(name, taints=tuple(self.taints)) if self.is_there else None

    def node_id(self, node_name: str, driver_name: str) -> str | None:
        self._asked("node_id")
        assert (node_name, driver_name) == ("node-1", "driver")
        return "id" if self.is_registered else None

    def set_taints(self, node: Node, taints: Sequence[Mapping[str, object]]) -> None:
        self._asked("set_taints")
        if self.between is not None:
            self.taints, self.between = self.between, None
        if node.taints != tuple(self.taints):
            raise Conflict("change the taints", "test failed", 422)
        self.taints = list(taints)

    def _asked(self, what: str) -> None:
        self.asked.append(what)
        if self.is_down:
            raise StorageUnavailable("nobody answers")


class Tended:
    """A taint with fakes, checked as by its thread."""

    def __init__(self) -> None:
        self.nodes = FakeNodes()
        self.clock = FakeClock()
        self.reason = ""
        self.loop = StartupTaint(self.nodes, "node-1", "driver", KEY, lambda: self.reason, lambda: 1.0).loop()
        self.loop.backoff = Backoff(TAINT_INTERVAL_S, lambda: 1.0)

    def tend_for(self, seconds: float) -> None:
        until_s = self.clock.monotonic() + seconds
        while self.clock.monotonic() < until_s:
            self.clock.sleep(self.loop.run_once())


@pytest.fixture
def tended() -> Tended:
    return Tended()


def test_only_the_start_up_taint_is_removed_after_the_registration(tended: Tended) -> None:
    tended.nodes.is_registered = False
    tended.tend_for(30)
    assert tended.nodes.taints == [STARTUP, OTHER]
    tended.nodes.is_registered = True
    tended.tend_for(STARTING_INTERVAL_S)
    assert tended.nodes.taints == [OTHER]


def test_while_the_driver_is_not_ready_no_request_is_sent(tended: Tended) -> None:
    tended.reason = "the storage client does not show itself yet"
    tended.tend_for(300)
    assert (tended.nodes.taints, tended.nodes.asked) == ([STARTUP, OTHER], [])
    tended.reason = ""
    tended.tend_for(STARTING_INTERVAL_S)
    assert tended.nodes.taints == [OTHER]


@pytest.mark.parametrize("effect", ["NoSchedule", "PreferNoSchedule", "NoExecute"])
def test_the_taint_is_removed_with_every_effect(tended: Tended, effect: str) -> None:
    tended.nodes.taints = [{"key": KEY, "effect": effect}, STARTUP]
    tended.loop.run_once()
    assert tended.nodes.taints == []


def test_a_taint_that_comes_back_is_removed_again(tended: Tended) -> None:
    tended.tend_for(1000)
    tended.nodes.taints = [STARTUP]
    tended.tend_for(TAINT_INTERVAL_S)
    assert tended.nodes.taints == []


def test_a_concurrent_change_of_the_taints_is_kept(tended: Tended) -> None:
    third: Mapping[str, object] = {"key": "third", "effect": "NoExecute"}
    tended.nodes.between = [third, STARTUP, OTHER]
    tended.tend_for(1)
    assert tended.nodes.taints == [third, OTHER]


def test_the_pause_grows_to_a_minute(tended: Tended) -> None:
    tended.nodes.is_down = True
    pauses = [tended.loop.run_once() for _ in range(12)]
    assert (pauses[0], pauses[-1]) == (1.0, 60.0)
    assert pauses == sorted(pauses)
    tended.nodes.is_down = False
    tended.loop.run_once()
    assert tended.nodes.taints == [OTHER]


def test_a_node_without_the_taint_costs_one_request_a_minute(tended: Tended) -> None:
    tended.nodes.taints = [OTHER]
    tended.tend_for(600)
    assert tended.nodes.asked == ["node"] * 10


def test_an_unknown_node_is_checked_again(tended: Tended) -> None:
    tended.nodes.is_there = False
    tended.tend_for(TAINT_INTERVAL_S)
    tended.nodes.is_there = True
    tended.tend_for(TAINT_INTERVAL_S)
    assert tended.nodes.taints == [OTHER]
