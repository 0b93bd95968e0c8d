# SPDX-License-Identifier: Apache-2.0
"""Two controllers at once over one storage: no interleaving of their requests harms a volume.

Each controller runs in a thread of its own, but only one moves at a time: before each request it waits until the
drawn schedule names it. So a failing schedule can be repeated and shrunk.
"""

from __future__ import annotations

import threading
from collections.abc import Callable

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from csi_driver.errors import DriverError, OperationPending, PreconditionFailed, VolumeNotFound
from csi_driver.model import GIB, Capability, CapacityRange, ProvisionedVolume
from csi_driver.publish_context import History, PublishContext
from csi_driver.storage_model import Client, ClientStatus
from tests.fakes.management import client_uuid
from tests.unit.controller.world import BLOCK, CLAIM, NODE_1, NODE_2, ROX, RWO, RWX_BLOCK, World, other_reference

Step = Callable[[], object]
NODE_3 = client_uuid("node-3")
SCHEDULES = st.lists(st.integers(0, 1), max_size=40)


class Turns:
    """Runs one of two threads at a time, from one request to the next."""

    def __init__(self, schedule: list[int]) -> None:
        self.schedule = schedule
        self.local = threading.local()
        self.go = [threading.Semaphore(0), threading.Semaphore(0)]
        self.stopped = threading.Semaphore(0)
        self.results: list[object] = [None, None]
        self.done = [False, False]

    def at_request(self, _: str) -> None:
        me: int | None = getattr(self.local, "me", None)
        if me is not None:
            self.stopped.release()
            self.go[me].acquire()

    def work(self, me: int, step: Step) -> None:
        self.local.me = me
        self.go[me].acquire()
        try:
            self.results[me] = step()
        except BaseException as problem:  # noqa: BLE001 - the result of a thread, judged by the test
            self.results[me] = problem
        self.done[me] = True
        self.stopped.release()

    def run(self, *steps: Step) -> tuple[object, object]:
        threads = [threading.Thread(target=self.work, args=item, daemon=True) for item in enumerate(steps)]
        for thread in threads:
            thread.start()
        drawn = iter(self.schedule)
        turn = 1
        while not all(self.done):
            turn = next(drawn, 1 - turn)
            self.go[turn if not self.done[turn] else 1 - turn].release()
            assert self.stopped.acquire(timeout=180), "a controller hangs"
        for thread in threads:
            thread.join(timeout=180)
        first, second = self.results
        for result in (first, second):
            if isinstance(result, BaseException) and not isinstance(result, DriverError):
                raise result
        return first, second


class Two:
    """Two controllers, and a volume that the first one made."""

    def __init__(self) -> None:
        self.one = World()
        self.other = World(beside=self.one)
        self.volume_id = self.one.create("v", parameters=CLAIM).volume_id

    def at_once(self, schedule: list[int], first: Step, second: Step) -> tuple[object, object]:
        turns = Turns(schedule)
        self.one.management.before = turns.at_request
        try:
            return turns.run(first, second)
        finally:
            self.one.management.before = lambda _: None

    def holders(self) -> list[str]:
        return self.one.holders()


def told(result: object) -> PublishContext | None:
    return result if isinstance(result, PublishContext) else None


@settings(max_examples=150, deadline=None)
@given(SCHEDULES)
def test_one_name_made_by_both_is_one_volume_with_one_answer(schedule: list[int]) -> None:
    two = Two()
    first, second = two.at_once(
        schedule,
        lambda: two.one.create("new", parameters=CLAIM),
        lambda: two.other.create("new", parameters=CLAIM),
    )
    assert isinstance(first, ProvisionedVolume)
    assert first == second
    assert len(two.one.management.all_volumes()) == 2


@settings(max_examples=150, deadline=None)
@given(SCHEDULES)
def test_a_volume_made_and_deleted_at_once_ends_made_or_deleted(schedule: list[int]) -> None:
    two = Two()
    two.one.management.delete_s = 0.3
    made, deleted = two.at_once(
        schedule, lambda: two.one.create("v", parameters=CLAIM), lambda: two.other.delete(two.volume_id)
    )
    assert deleted is None
    assert isinstance(made, ProvisionedVolume | OperationPending)
    again = two.one.create("v", parameters=CLAIM)
    if isinstance(made, ProvisionedVolume) and made.volume_id != two.volume_id:
        assert again == made
    assert len(two.one.management.all_volumes()) == 1


@settings(max_examples=300, deadline=None)
@given(SCHEDULES, st.sampled_from([0.0, 0.3]), st.sampled_from([RWO, BLOCK]))
def test_two_nodes_never_get_a_volume_of_one_node(schedule: list[int], slow_s: float, use: Capability) -> None:
    two = Two()
    two.one.management.attach_s = slow_s
    results = two.at_once(
        schedule,
        lambda: two.one.publish(two.volume_id, NODE_1, use),
        lambda: two.other.publish(two.volume_id, NODE_2, use),
    )
    assert sorted(type(result).__name__ for result in results) == ["PreconditionFailed", "PublishContext"]
    assert len(two.holders()) == 1


@settings(max_examples=300, deadline=None)
@given(SCHEDULES, st.sampled_from([RWO, BLOCK]))
def test_a_volume_is_new_for_one_attachment_only(schedule: list[int], use: Capability) -> None:
    two = Two()
    results = two.at_once(
        schedule,
        lambda: two.one.publish(two.volume_id, NODE_1, use),
        lambda: two.other.publish(two.volume_id, NODE_2, use),
    )
    winner = NODE_1 if told(results[0]) is not None else NODE_2
    loser = NODE_2 if winner == NODE_1 else NODE_1
    two.one.unpublish(two.volume_id, winner)
    before = History.WRITTEN if use is BLOCK else History.ATTACHED
    assert two.other.publish(two.volume_id, loser).history is before


@settings(max_examples=300, deadline=None)
@given(SCHEDULES)
def test_a_volume_that_was_attached_and_detached_beside_us_is_not_new(schedule: list[int]) -> None:
    two = Two()

    def use_and_leave() -> History:
        history = two.other.publish(two.volume_id, NODE_2, RWO).history
        two.other.unpublish(two.volume_id, NODE_2)
        return history

    first, second = two.at_once(schedule, lambda: two.one.publish(two.volume_id, NODE_1, RWO), use_and_leave)
    mine = told(first)
    assert [second, mine.history if mine is not None else None].count(History.FIRST) <= 1
    again = two.one.publish(two.volume_id, NODE_1, RWO) if two.holders() != ["node-2"] else None
    if isinstance(second, History) and again is not None:
        assert again.history is History.ATTACHED


@settings(max_examples=150, deadline=None)
@given(SCHEDULES)
def test_one_attachment_asked_of_both_is_one_attachment(schedule: list[int]) -> None:
    two = Two()
    first, second = two.at_once(
        schedule, lambda: two.one.publish(two.volume_id), lambda: two.other.publish(two.volume_id)
    )
    assert isinstance(first, PublishContext)
    assert first == second
    assert (first.attachment, first.history) == (1, History.FIRST)


@pytest.mark.parametrize("use", [ROX, RWX_BLOCK])
@settings(max_examples=100, deadline=None)
@given(schedule=SCHEDULES)
def test_shared_volumes_are_attached_by_both(use: Capability, schedule: list[int]) -> None:
    two = Two()
    results = two.at_once(
        schedule,
        lambda: two.one.publish(two.volume_id, NODE_1, use),
        lambda: two.other.publish(two.volume_id, NODE_2, use),
    )
    assert all(told(result) is not None for result in results)
    assert two.holders() == ["node-1", "node-2"]


@settings(max_examples=300, deadline=None)
@given(SCHEDULES, st.sampled_from([0.0, 0.3]))
def test_nothing_is_deleted_while_it_is_attached(schedule: list[int], slow_s: float) -> None:
    two = Two()
    two.one.management.delete_s = slow_s
    published, deleted = two.at_once(
        schedule, lambda: two.one.publish(two.volume_id), lambda: two.other.delete(two.volume_id)
    )
    if deleted is None:
        assert isinstance(published, VolumeNotFound | OperationPending | PreconditionFailed)
        assert two.one.management.all_volumes() == []
    else:
        assert isinstance(deleted, PreconditionFailed)
        assert isinstance(published, PublishContext)
        assert two.holders() == ["node-1"]


@settings(max_examples=200, deadline=None)
@given(SCHEDULES, st.sampled_from([0.0, 0.3]))
def test_a_pod_that_moves_ends_on_its_new_node(schedule: list[int], slow_s: float) -> None:
    two = Two()
    two.one.publish(two.volume_id, NODE_1)
    two.one.management.detach_s = slow_s
    left, _ = two.at_once(
        schedule,
        lambda: two.one.unpublish(two.volume_id, NODE_1),
        lambda: two.other.publish(two.volume_id, NODE_2),
    )
    assert left is None
    assert two.other.publish(two.volume_id, NODE_2).history is History.ATTACHED
    assert two.holders() == ["node-2"]


@settings(max_examples=200, deadline=None)
@given(SCHEDULES, st.integers(1, 4), st.integers(1, 4))
def test_a_volume_grown_by_both_ends_as_large_as_the_larger(schedule: list[int], one: int, other: int) -> None:
    two = Two()

    def grow(world: World, gib: int) -> int:
        wanted = CapacityRange((1 + gib) * GIB)
        return world.expand.expand(two.volume_id, wanted, None, deadline=world.deadline())[0]

    two.at_once(schedule, lambda: grow(two.one, one), lambda: grow(two.other, other))
    assert max(grow(two.one, one), grow(two.other, other)) >= (1 + max(one, other)) * GIB
    (volume,) = two.one.management.all_volumes()
    assert volume.size_bytes <= (1 + max(one, other)) * GIB + (1 << 20)


# --- lost nodes and several references ------------------------------------------------------------------------


@settings(max_examples=300, deadline=None)
@given(SCHEDULES, st.sampled_from([0.0, 0.3]), st.sampled_from([RWO, BLOCK]))
def test_a_lost_nodes_volume_goes_to_one_of_those_who_ask(schedule: list[int], slow_s: float, use: Capability) -> None:
    two = Two()
    two.one.publish(two.volume_id, NODE_1, use)
    two.one.management.set_status("node-1", ClientStatus.DOWN)
    two.one.unpublish(two.volume_id, NODE_1)
    two.one.management.attach_s = slow_s
    results = two.at_once(
        schedule,
        lambda: two.one.publish(two.volume_id, NODE_2, use),
        lambda: two.other.publish(two.volume_id, NODE_3, use),
    )
    (winner,) = [node for node, result in zip((NODE_2, NODE_3), results, strict=True) if told(result) is not None]
    wishing = [c for c in two.one.management.clients(deadline=two.one.deadline()) if any(_wanted(c))]
    assert [c.uuid for c in wishing] == [winner]
    assert two.one.stored().reservation.reserved_by == wishing[0].id


@settings(max_examples=200, deadline=None)
@given(SCHEDULES, st.sampled_from([0.0, 0.3]))
def test_one_namespace_leaves_a_node_while_another_comes(schedule: list[int], slow_s: float) -> None:
    two = Two()
    other_id = other_reference(two.volume_id, "team-b")
    two.one.publish(two.volume_id, NODE_1, ROX)
    two.one.management.detach_s = slow_s
    left, came = two.at_once(
        schedule,
        lambda: two.one.unpublish(two.volume_id, NODE_1),
        lambda: two.other.publish(other_id, NODE_1, ROX),
    )
    assert left is None
    assert told(came) is not None or isinstance(came, OperationPending)
    two.other.publish(other_id, NODE_1, ROX)
    (holder,) = two.one.management.clients_holding(two.one.stored().uuid, deadline=two.one.deadline())
    assert holder.desired[two.one.stored().uuid].reference_ids == {"team-b"}


def _wanted(client: Client) -> list[bool]:
    return [True for wish in client.desired.values() if not wish.is_detaching]
