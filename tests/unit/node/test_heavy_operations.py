# SPDX-License-Identifier: Apache-2.0
"""Limits by kind of work: many format one after the other, and none waits for a volume that is read whole."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from csi_driver.deadline import Deadline
from csi_driver.errors import DeadlineReached, HostFailure
from csi_driver.host_model import OpenDevice
from csi_driver.node import concurrency
from csi_driver.node.concurrency import HeavyOperations, _Slots
from csi_driver.publish_context import Encryption, History
from tests.fakes.node import NAME, OTHER_UUID, UUID, FakeNode, publish_context

OTHER = "csi-2"
OTHER_STAGING = Path("/var/lib/kubelet/plugins/other/globalmount")


@pytest.mark.parametrize("encryption", [Encryption.NONE, Encryption.LUKS])
def test_a_scan_of_a_whole_volume_delays_no_other(encryption: Encryption) -> None:
    node = FakeNode(heavy_operations=1)
    node.host.attach(NAME, UUID)
    node.host.attach(OTHER, OTHER_UUID)
    node.host.make_tree(OTHER_STAGING)
    reads, goes_on = threading.Event(), threading.Event()

    def read_on(device: OpenDevice, *, deadline: Deadline | None, progress: Callable[[int, int], None]) -> None:
        reads.set()
        assert goes_on.wait(30)

    node.host.filesystems.first_data = read_on  # type: ignore[method-assign]
    secrets = {"passphrase": "correct horse"}
    old = publish_context(attachment=3, history=History.ATTACHED, encryption=encryption)
    worker = threading.Thread(target=lambda: node.stage(context=old, secrets=secrets))
    worker.start()
    try:
        assert reads.wait(30)
        node.stage(
            volume_id=f"z:{OTHER}:{OTHER_UUID}",
            staging=OTHER_STAGING,
            context=publish_context(name=OTHER, uuid=OTHER_UUID),
        )
        assert node.host.formats == [OTHER_UUID]
    finally:
        goes_on.set()
        worker.join(120)
    assert len(node.host.formats) == 2


def test_only_so_many_volumes_are_read_at_once() -> None:
    heavy = HeavyOperations(1)
    soon = Deadline.after(30)
    second_reads, ended = threading.Event(), threading.Event()

    def second() -> None:
        with heavy.slot("read", deadline=soon), heavy.scan():
            second_reads.set()
        ended.set()

    with heavy.slot("read", deadline=soon), heavy.scan():
        worker = threading.Thread(target=second)
        worker.start()
        assert not second_reads.wait(0.05)
    assert ended.wait(30)
    worker.join()


def test_the_slot_is_held_again_after_a_failed_scan() -> None:
    heavy = HeavyOperations(1)
    with pytest.raises(HostFailure), heavy.slot("read", deadline=Deadline.after(1)), heavy.scan():
        raise HostFailure("no")
    with heavy.slot("format", deadline=Deadline.after(1)), pytest.raises(DeadlineReached):
        heavy.slot("format", deadline=Deadline.after(0)).__enter__()


def test_running_and_waiting_operations_are_counted() -> None:
    heavy = HeavyOperations(1)
    soon = Deadline.after(30)
    entered, leaves = threading.Event(), threading.Event()

    def second() -> None:
        with heavy.slot("check", deadline=soon):
            entered.set()
            assert leaves.wait(30)

    assert heavy.running_and_waiting() == (0, 0)
    with heavy.slot("format", deadline=soon):
        assert heavy.running_and_waiting() == (1, 0)
        worker = threading.Thread(target=second)
        worker.start()
        assert soon.wait_until(lambda: heavy.running_and_waiting() == (1, 1))
        with heavy.scan():
            assert entered.wait(30)
            assert heavy.running_and_waiting() == (2, 0)
            leaves.set()
    worker.join()
    assert heavy.running_and_waiting() == (0, 0)


def test_an_operation_that_timed_out_is_not_counted_as_waiting() -> None:
    heavy = HeavyOperations(1)
    with heavy.slot("format", deadline=Deadline.after(1)):
        with pytest.raises(DeadlineReached):
            heavy.slot("grow", deadline=Deadline.after(0)).__enter__()
        assert heavy.running_and_waiting() == (1, 0)


def test_the_slot_of_a_hanging_operation_is_given_to_others(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(concurrency, "SLOT_TIMEOUT_S", 0.05)
    monkeypatch.setattr(concurrency, "SCAN_TIMEOUT_S", 0.05)
    heavy = HeavyOperations(1)
    soon = Deadline.after(30)
    goes_on = threading.Event()

    def hang() -> None:
        with heavy.slot("format", deadline=soon):
            goes_on.wait(30)

    def hang_reading() -> None:
        with heavy.slot("format", deadline=soon), heavy.scan():
            goes_on.wait(30)

    workers = [threading.Thread(target=work) for work in (hang, hang_reading)]
    for worker in workers:
        worker.start()
        with heavy.slot("format", deadline=soon), heavy.scan():
            pass
    goes_on.set()
    for worker in workers:
        worker.join()
    assert heavy.running_and_waiting() == (0, 0)
    with heavy.slot("format", deadline=soon), pytest.raises(DeadlineReached):
        heavy.slot("format", deadline=Deadline.after(0)).__enter__()


def test_a_slot_given_to_others_is_taken_until_it_is_given_back(monkeypatch: pytest.MonkeyPatch) -> None:
    now_s = 0.0
    monkeypatch.setattr(time, "monotonic", lambda: now_s)
    places = _Slots(2, timeout_s=600.0)
    taken = [places.take(0), places.take(0)]
    assert None not in taken
    assert places.take(0) is None
    now_s = 601.0
    lent = [places.take(0), places.take(0)]
    assert None not in lent
    assert places.take(0) is None
    places.give_back(lent[0])
    assert places.take(0) is not None
    assert places.take(0) is None


def test_a_slot_that_is_given_back_wakes_one_of_those_that_wait(monkeypatch: pytest.MonkeyPatch) -> None:
    places = _Slots(1, timeout_s=600.0)
    wake, woken = places._changed.notify, []

    def counted(n: int = 1) -> None:
        woken.append(min(n, places.waiting))
        wake(n)

    def take_and_give_back() -> None:
        places.give_back(places.take())

    monkeypatch.setattr(places._changed, "notify", counted)
    first = places.take()
    workers = [threading.Thread(target=take_and_give_back) for _ in range(5)]
    for worker in workers:
        worker.start()
    assert Deadline.after(30).wait_until(lambda: places.waiting == 5)
    places.give_back(first)
    for worker in workers:
        worker.join(30)
    assert places.taken_s == {}
    assert woken == [1, 1, 1, 1, 1, 0]
