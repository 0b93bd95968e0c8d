# SPDX-License-Identifier: Apache-2.0
"""Controllers over several zones: at most one volume of a name is returned, and none is deleted.

As in `test_controller_two`, the schedule decides which controller moves until its next request. Drawn requests are
lost before or after they are carried out, stall, or are the last one of their controller.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from typing import TypeVar

from hypothesis import given, settings
from hypothesis import strategies as st

from csi_driver.controller.ports import TopologyRequirement
from csi_driver.controller.zones import ZonePool
from csi_driver.deadline import Deadline
from csi_driver.errors import DriverError, ExistsDifferently, OperationPending, PreconditionFailed, StorageUnavailable
from csi_driver.model import DEFAULT_TOPOLOGY_KEY, ProvisionedVolume
from csi_driver.storage_model import Volume, VolumeSpec
from tests.fakes.management import FakeManagement
from tests.property.test_controller_two import Turns
from tests.unit.controller.world import CLAIM, World

T = TypeVar("T")
ZONES = ("a", "b", "c")
SCHEDULES = st.lists(st.integers(0, 1), max_size=60)
WHERE = st.sampled_from([("a", "b"), ("b", "a"), ("a", "b", "c"), ("c", "b"), ("a",), ("b",)])


class Killed(DriverError):
    """The controller died here."""


class InTurn(ZonePool):
    """Asks zone by zone, in the caller's own thread."""

    def submit(self, zone: str, request: Callable[[], T]) -> Future[T]:
        future: Future[T] = Future()
        try:
            future.set_result(request())
        except Killed:
            raise
        except DriverError as problem:
            future.set_exception(problem)
        return future


@dataclass(frozen=True)
class Fault:
    """What happens at the n-th request of a controller."""

    controller: int
    request: int
    kind: str
    """lost: not carried out; unanswered: carried out; late: a creation that is carried out after the call has failed;
    killed before or after it; stalled."""
    stall_s: float = 0.0


FAULTS = st.lists(
    st.builds(
        Fault,
        controller=st.integers(0, 1),
        request=st.integers(0, 24),
        kind=st.sampled_from(["lost", "unanswered", "late", "killed before", "killed after", "stalled"]),
        stall_s=st.sampled_from([1.0, 8.0, 12.0, 29.0, 31.0]),
    ),
    max_size=3,
)


class Zoned:
    """Two controllers over three zones, and the faults of their requests."""

    def __init__(self, schedule: Sequence[int], faults: Sequence[Fault]) -> None:
        self.one = World(zones=ZONES, pool=InTurn())
        self.other = World(zones=ZONES, pool=InTurn(), beside=self.one)
        self.turns = Turns(list(schedule))
        self.faults = {(fault.controller, fault.request): fault for fault in faults}
        self.counts = [0, 0]
        for management in self.one.zones.values():
            management.before = self.before
            management.after = self.after
            management.create_volume = self.perhaps_late(management, management.create_volume)  # type: ignore[method-assign]

    def perhaps_late(self, management: FakeManagement, create: Callable[..., str | None]) -> Callable[..., str | None]:
        def create_volume(spec: VolumeSpec, *, deadline: Deadline) -> str | None:
            fault = self._fault()
            if fault is not None and fault.kind == "late":
                self.counts[fault.controller] += 1
                soon = Deadline.after(1e9, self.one.clock)
                management._later(fault.stall_s, lambda: self.unless_it_is_there(lambda: create(spec, deadline=soon)))
                raise StorageUnavailable("still on its way there")
            return create(spec, deadline=deadline)

        return create_volume

    def unless_it_is_there(self, create: Callable[[], object]) -> None:
        before = self.turns.local.__dict__.pop("me", None)  # the server does it, no controller
        create()
        if before is not None:
            self.turns.local.me = before

    def _fault(self) -> Fault | None:
        me: int | None = getattr(self.turns.local, "me", None)
        return None if me is None else self.faults.get((me, self.counts[me]))

    def before(self, request: str) -> None:
        self.turns.at_request(request)
        fault = self._fault()
        if fault is None or fault.kind in ("unanswered", "killed after"):
            return
        self.one.clock.now_s += fault.stall_s if fault.kind == "stalled" else 0
        if fault.kind == "killed before":
            raise Killed
        if fault.kind == "lost" or fault.kind == "late":
            self.counts[fault.controller] += 1
            raise StorageUnavailable("lost on the way there")

    def after(self, _: str) -> None:
        me: int | None = getattr(self.turns.local, "me", None)
        fault = self._fault()
        if me is not None:
            self.counts[me] += 1
        if fault is not None and fault.kind == "killed after":
            raise Killed
        if fault is not None and fault.kind == "unanswered":
            raise StorageUnavailable("lost on the way back")

    def answer(self, world: World, zones: Sequence[str], tries: int) -> ProvisionedVolume | DriverError:
        """Call as an orchestrator does, with retries."""
        wanted = TopologyRequirement(*(tuple({DEFAULT_TOPOLOGY_KEY: zone} for zone in zones),) * 2)
        last: DriverError = OperationPending("never asked")
        for _ in range(tries):
            try:
                return world.create("v", parameters=CLAIM, topology=wanted)
            except (OperationPending, StorageUnavailable) as problem:
                last = problem
                world.clock.sleep(7)
            except (ExistsDifferently, PreconditionFailed) as problem:
                return problem
        return last

    def volumes(self) -> list[Volume]:
        return [volume for management in self.one.zones.values() for volume in management.all_volumes()]


@settings(max_examples=600, deadline=None)
@given(SCHEDULES, FAULTS, WHERE, WHERE, st.sampled_from([0.0, 0.5]))
def test_one_name_is_returned_as_at_most_one_volume_and_nothing_is_deleted(
    schedule: list[int], faults: list[Fault], here: tuple[str, ...], there: tuple[str, ...], slow_s: float
) -> None:
    if any(fault.kind in ("lost", "late", "unanswered") for fault in faults) and set(here) != set(there):
        # A zone that a call does not allow is asked too, but only its answer counts, not its silence.
        there = here[::-1]
    zoned = Zoned(schedule, faults)
    for management in zoned.one.zones.values():
        management.make_s = slow_s
    results = zoned.turns.run(lambda: zoned.answer(zoned.one, here, 3), lambda: zoned.answer(zoned.other, there, 3))
    fresh = World(zones=ZONES, pool=InTurn(), beside=zoned.one)
    later = [zoned.answer(world, where, 9) for world, where in ((fresh, there), (zoned.one, here))]
    told = {result.volume_id for result in (*results, *later) if isinstance(result, ProvisionedVolume)}
    assert len(told) <= 1, (results, later)
    present = {f"{volume.metadata['zone']}:{volume.name}:{volume.uuid}:team-a" for volume in zoned.volumes()}
    assert told <= present
    # While two volumes exist, neither is returned, and neither is deleted.
    assert told or len(present) == 2, (results, later)
    assert not any("delete_volume" in management.requests for management in zoned.one.zones.values())


@settings(max_examples=300, deadline=None)
@given(FAULTS, WHERE, st.sets(st.sampled_from(ZONES)))
def test_a_controller_that_dies_leaves_no_second_volume(
    faults: list[Fault], where: tuple[str, ...], full: set[str]
) -> None:
    zoned = Zoned([], [fault for fault in faults if fault.controller == 0 and fault.kind != "late"])
    for zone in full - {where[-1]}:
        zoned.one.zones[zone].raw_bytes = 0
    zoned.turns.run(lambda: zoned.answer(zoned.one, where, 2), lambda: None)
    for management in zoned.one.zones.values():
        management.raw_bytes = 1 << 40  # room comes, or goes, between the calls
    again = zoned.answer(World(zones=ZONES, pool=InTurn(), beside=zoned.one), tuple(reversed(where)), 9)
    assert isinstance(again, ProvisionedVolume)
    assert [volume.uuid for volume in zoned.volumes()] == [again.volume_id.split(":")[2]]
