# SPDX-License-Identifier: Apache-2.0
"""The node's label: set while the client is usable, removed while it is not, with few requests."""

from __future__ import annotations

import threading
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from csi_driver.background import Backoff
from csi_driver.errors import StorageUnavailable
from csi_driver.kubernetes import node_object
from csi_driver.kubernetes.api import ApiServer
from csi_driver.kubernetes.node_object import LABEL, READY, UNUSABLE_CHECKS, ClientLabel
from csi_driver.settings import ApiSettings
from tests.fakes.clock import FakeClock


@dataclass
class FakeNodes(ApiServer):
    """The labels of one node, and all requested changes."""

    settings: ApiSettings = field(default_factory=lambda: ApiSettings("host", 443, Path("/absent")))
    labels: dict[str, str] = field(default_factory=dict)
    asked: list[str | None] = field(default_factory=list)
    is_down: bool = False
    was_asked: threading.Event = field(default_factory=threading.Event)

    def label_node(self, name: str, labels: Mapping[str, str | None]) -> None:
        assert name == "node-1"
        self.asked.append(labels[LABEL])
        self.was_asked.set()
        if self.is_down:
            raise StorageUnavailable("nobody answers")
        for key, value in labels.items():
            if value is None:
                self.labels.pop(key, None)
            else:
                self.labels[key] = value


class Kept:
    """A label with fakes, checked as by its thread."""

    def __init__(self) -> None:
        self.nodes = FakeNodes(labels={"other": "label"})
        self.clock = FakeClock()
        self.reason = ""
        self.backoff = Backoff(300.0, lambda: 1.0)
        self.restarted()

    def restarted(self) -> None:
        self.loop = ClientLabel(self.nodes, "node-1", lambda: self.reason, self.clock).loop()
        self.loop.backoff = self.backoff

    def look(self, times: int = 1) -> None:
        for _ in range(times):
            self.clock.sleep(self.loop.run_once())

    @property
    def value(self) -> str | None:
        return self.nodes.labels.get(LABEL)


@pytest.fixture
def kept() -> Kept:
    return Kept()


def test_a_usable_client_is_labelled_at_once_and_once(kept: Kept) -> None:
    kept.look(10)
    assert (kept.value, kept.nodes.asked) == (READY, [READY])
    assert kept.nodes.labels["other"] == "label"


def test_an_unusable_client_loses_its_label_at_the_start(kept: Kept) -> None:
    kept.nodes.labels[LABEL] = READY
    kept.reason = "there is none"
    kept.look(10)
    assert (kept.value, kept.nodes.asked) == (None, [None])


def test_a_client_loses_its_label_and_gets_it_back(kept: Kept) -> None:
    kept.look()
    kept.reason = "it does not run"
    kept.look(UNUSABLE_CHECKS)
    assert kept.value is None
    kept.reason = ""
    kept.look()
    assert kept.nodes.asked == [READY, None, READY]
    assert LABEL in kept.nodes.labels


def test_a_client_keeps_its_label_during_an_upgrade(kept: Kept) -> None:
    kept.look()
    for _ in range(5):
        kept.reason = "it is being upgraded"
        kept.look(UNUSABLE_CHECKS - 1)
        assert kept.value == READY
        kept.reason = ""
        kept.look()
    assert kept.nodes.asked == [READY]


def test_a_removed_label_comes_back(kept: Kept) -> None:
    kept.look()
    del kept.nodes.labels[LABEL]
    kept.look(int(node_object.REAPPLY_S / node_object.LABEL_INTERVAL_S) + 1)
    assert (kept.value, len(kept.nodes.asked)) == (READY, 2)


def test_the_pause_grows_while_the_api_server_does_not_answer(kept: Kept) -> None:
    kept.nodes.is_down = True
    pauses = [kept.loop.run_once() for _ in range(14)]
    assert pauses == sorted(pauses)
    assert (pauses[0], pauses[-1]) == (1.0, 300.0)
    kept.nodes.is_down = False
    kept.look()
    assert kept.value == READY
    kept.nodes.is_down, kept.reason = True, "it does not run"
    kept.look(UNUSABLE_CHECKS - 1)
    assert kept.loop.run_once() == 1.0


def test_pauses_have_jitter() -> None:
    kept = Kept()
    kept.nodes.is_down = True
    kept.backoff.jitter = iter((0.0, 0.5, 1.0)).__next__
    assert [kept.loop.run_once() for _ in range(3)] == [0.5, 1.5, 4.0]


def test_the_label_shows_the_present_state_after_an_outage_of_the_api_server(kept: Kept) -> None:
    kept.look()
    kept.nodes.is_down, kept.reason = True, "it does not run"
    kept.look(UNUSABLE_CHECKS + 2)
    kept.reason, kept.nodes.is_down = "", False
    kept.look(50)
    assert kept.value == READY


def test_a_background_thread_keeps_the_label(kept: Kept) -> None:
    with kept.loop:
        assert kept.nodes.was_asked.wait(120)
    assert kept.value == READY
