# SPDX-License-Identifier: Apache-2.0
"""The preStop hook waits for the volumes of a node that is being drained, else not at all."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from csi_driver.deadline import Deadline
from csi_driver.errors import HostFailure
from csi_driver.kubernetes.api import ApiFailed, ApiServer, Node, attachment_name
from csi_driver.kubernetes.node_object import PreStop
from csi_driver.settings import ApiSettings
from tests.fakes.clock import FakeClock

DRIVER, TIME_S = "driver", 100.0


@dataclass
class FakeCluster(ApiServer):
    """A node and its VolumeAttachments. `..._status`: HTTP status of an error; None = success."""

    settings: ApiSettings = field(default_factory=lambda: ApiSettings("host", 443, Path("/absent")))
    handles: set[str] = field(default_factory=set)
    attachments: set[str] = field(default_factory=set)
    is_cordoned: bool = True
    is_there: bool = True
    is_down: bool = False
    node_status: int | None = None
    attachments_status: int | None = None

    def node(self, name: str) -> Node | None:
        assert name == "node-1"
        if self.is_down:
            raise ApiFailed("tell the node", "nobody answers")
        if self.node_status is not None:
            raise ApiFailed("tell the node", "refused", self.node_status)
        volumes = tuple(f"kubernetes.io/csi/{DRIVER}^{handle}" for handle in self.handles)
        foreign = ("kubernetes.io/csi/other^x",)
        return Node(name, unschedulable=self.is_cordoned, volumes=volumes + foreign) if self.is_there else None

    def has_attachment(self, name: str) -> bool:
        if self.attachments_status is not None:
            raise ApiFailed("tell the attachment", "refused", self.attachments_status)
        return name in {attachment_name(handle, DRIVER, "node-1") for handle in self.attachments}


class Stop:
    """A hook with fakes. `events`: actions by second."""

    def __init__(self) -> None:
        self.cluster = FakeCluster(handles={"a", "b"}, attachments={"a", "b"})
        self.mounted = {"a"}
        self.clock = FakeClock()
        self.events: dict[float, Callable[[], None]] = {}
        self.mounts_fail = False

    def wait(self, cluster: FakeCluster | None = None, *, alone: bool = False) -> tuple[str, float]:
        began_s = self.clock.monotonic()
        hook = PreStop(None if alone else cluster or self.cluster, "node-1", DRIVER, self.held)
        end = hook.wait(Deadline.after(TIME_S, self.clock))
        return end, self.clock.monotonic() - began_s

    def held(self) -> set[str]:
        now_s = self.clock.monotonic()
        for at_s in [at_s for at_s in self.events if at_s <= now_s]:
            self.events.pop(at_s)()
        if self.mounts_fail:
            raise HostFailure("/proc is not mounted")
        return set(self.mounted)

    def later(self, seconds: float, event: Callable[[], None]) -> None:
        self.events[self.clock.monotonic() + seconds] = event


@pytest.fixture
def stop() -> Stop:
    return Stop()


def test_a_node_that_is_not_drained_stops_at_once_with_all_its_volumes(stop: Stop) -> None:
    stop.cluster.is_cordoned = False
    assert stop.wait() == ("node node-1 is not being drained", 0.0)


def test_a_drained_node_without_volumes_stops_at_once(stop: Stop) -> None:
    stop.mounted, stop.cluster = set(), FakeCluster()
    assert stop.wait() == ("it is cordoned, and no volume is left", 0.0)


def test_a_drained_node_waits_for_mounts_then_for_attachments(stop: Stop) -> None:
    stop.later(10, stop.mounted.clear)
    stop.later(20, stop.cluster.handles.clear)
    stop.later(30, lambda: stop.cluster.attachments.remove("a"))
    stop.later(40, lambda: stop.cluster.attachments.remove("b"))
    end, took_s = stop.wait()
    assert (end, took_s) == ("it is cordoned, and no volume is left", 40.0)


def test_a_volume_that_stays_is_waited_for_until_the_deadline(stop: Stop) -> None:
    stop.mounted.clear()
    end, took_s = stop.wait()
    assert end == "timed out: it is cordoned, and a, b are attached"
    assert took_s == TIME_S


def test_a_node_that_is_no_longer_drained_stops(stop: Stop) -> None:
    def uncordon() -> None:
        stop.cluster.is_cordoned = False

    stop.later(6, uncordon)
    assert stop.wait() == ("node node-1 is not being drained", 6.0)


def test_a_node_without_an_object_waits_for_its_mounts(stop: Stop) -> None:
    stop.cluster.is_there = False
    stop.cluster.attachments.clear()
    stop.later(8, stop.mounted.clear)
    end, took_s = stop.wait()
    assert (end, took_s) == ("the node object was deleted, and no volume is left", 8.0)


@pytest.mark.parametrize("alone", [False, True])
def test_without_an_api_server_the_mounts_decide(stop: Stop, alone: bool) -> None:
    stop.cluster.is_down = True
    stop.later(10, stop.mounted.clear)
    end, took_s = stop.wait(alone=alone)
    assert end.startswith("no volume is mounted")
    assert took_s == 10
    stop.mounted.add("a")
    end, took_s = stop.wait(alone=alone)
    assert "a is mounted, and whether the node is being drained is not known" in end
    assert took_s == TIME_S


def test_an_uninstallation_waits_for_nothing(stop: Stop) -> None:
    """It deletes the account before the pod has ended, and the mounts stay."""
    stop.cluster.node_status = 401
    end, took_s = stop.wait()
    assert end.startswith("the service account was deleted")
    assert took_s == 0.0


def test_without_the_right_to_get_nodes_the_mounts_decide(stop: Stop) -> None:
    """The roles may not have this right in a cluster with roles of its own."""
    stop.cluster.node_status = 403
    stop.later(10, stop.mounted.clear)
    assert stop.wait()[1] == 10.0


def test_an_api_server_that_comes_back_decides(stop: Stop) -> None:
    stop.cluster.is_down, stop.cluster.is_cordoned = True, False

    def answer() -> None:
        stop.cluster.is_down = False

    stop.later(4, answer)
    assert stop.wait() == ("node node-1 is not being drained", 4.0)


def test_without_the_right_to_get_attachments_the_node_object_decides(stop: Stop) -> None:
    stop.cluster.attachments_status = 403
    stop.later(10, stop.mounted.clear)
    stop.later(20, stop.cluster.handles.clear)
    assert stop.wait() == ("it is cordoned, and no volume is left", 20.0)


def test_an_attachment_that_cannot_be_read_counts_as_existing(stop: Stop) -> None:
    stop.mounted.clear()
    stop.cluster.handles.clear()
    stop.mounted.add("a")
    stop.later(2, stop.mounted.clear)
    stop.cluster.attachments_status = 500
    end, took_s = stop.wait()
    assert "a is being detached" in end
    assert took_s == TIME_S


def test_unreadable_mounts_do_not_delay_the_stop(stop: Stop) -> None:
    stop.mounts_fail, stop.cluster.is_down = True, True
    assert stop.wait()[1] == 0.0


def test_three_of_many_volumes_are_named(stop: Stop) -> None:
    stop.mounted = {f"v{number}" for number in range(5)}
    assert "v0, v1, v2 and 2 more are mounted" in stop.wait()[0]
