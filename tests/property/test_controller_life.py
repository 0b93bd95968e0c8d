# SPDX-License-Identifier: Apache-2.0
"""Any order and repetition of calls, with the controller dying before or after any request, ends as the spec says.

The oracle is a model of its own: a few sets and numbers per volume, written from the CSI specification's tables.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

from hypothesis import event, given, settings
from hypothesis import strategies as st

from csi_driver.errors import DriverError, ExistsDifferently, PreconditionFailed, VolumeNotFound
from csi_driver.model import GIB, MIB, AccessMode, BlockAccess, Capability, CapacityRange, ProvisionedVolume
from csi_driver.publish_context import History, PublishContext
from tests.unit.controller.world import BLOCK, CLAIM, ROX, RWO, RWX_BLOCK, World

NAMES = ("pvc-00000000-0000-0000-0000-000000000001", "a name of another form")
NODES = ("node-1", "node-2")
USES = {"rwo": RWO, "block": BLOCK, "rox": ROX, "rwx": RWX_BLOCK}


class Crash(BaseException):
    """The controller's process ends here."""


@dataclass(frozen=True)
class Call:
    """One call, and the request at which the controller dies the first time; half steps are after the request."""

    verb: str
    name: str
    node: str = NODES[0]
    use: str = "rwo"
    gib: int = 1
    crash_at: float | None = None


@dataclass
class Expected:
    """The state of one volume by the specification."""

    volume_id: str
    size_bytes: int
    uses: dict[str, str] = field(default_factory=dict)
    sessions: int = 0
    """How often it went from attached nowhere to attached."""
    was_raw: bool = False


CALLS = st.builds(
    Call,
    verb=st.sampled_from(["create", "delete", "publish", "publish", "unpublish", "expand"]),
    name=st.sampled_from(NAMES),
    node=st.sampled_from(NODES),
    use=st.sampled_from(sorted(USES)),
    gib=st.integers(1, 4),
    crash_at=st.none() | st.integers(0, 16).map(lambda half: half / 2),
)


class Life:
    """The calls and their model, side by side."""

    def __init__(self) -> None:
        self.world = World()
        self.expected: dict[str, Expected] = {}
        self.last_id: dict[str, str] = {}

    def run(self, call: Call) -> None:
        if call.crash_at is not None:
            self._crash(call)
        getattr(self, call.verb)(call)
        self.compare()

    def compare(self) -> None:
        """The storage and the model are equal: no volume twice, none lost, no wrong attachment."""
        found = {str(volume.metadata["csi_name"]): volume for volume in self.world.management.all_volumes()}
        assert len(found) == len(self.world.management.all_volumes())
        assert {name: volume.size_bytes for name, volume in found.items()} == {
            name: volume.size_bytes for name, volume in self.expected.items()
        }
        for name, volume in found.items():
            assert sorted(self.world.holders(volume)) == sorted(self.expected[name].uses)

    # --- calls, and their expected effects ---

    def create(self, call: Call) -> None:
        made = self._create(call)
        known = self.expected.setdefault(call.name, Expected(made.volume_id, GIB))
        assert made.volume_id == known.volume_id
        assert made.capacity_bytes == known.size_bytes
        self.last_id[call.name] = made.volume_id

    def delete(self, call: Call) -> None:
        known = self.expected.get(call.name)
        if known is not None and known.uses:
            refused(PreconditionFailed, lambda: self._delete(call))
            return
        self._delete(call)
        self.expected.pop(call.name, None)

    def publish(self, call: Call) -> None:
        known = self.expected.get(call.name)
        if known is None:
            refused(VolumeNotFound, lambda: self._publish(call))
            return
        mode = reservation(call.use)
        if call.node in known.uses:
            if reservation(known.uses[call.node]) != mode:
                refused(ExistsDifferently, lambda: self._publish(call))
                return
        elif known.uses and (mode == "exclusive" or {reservation(use) for use in known.uses.values()} != {mode}):
            refused(PreconditionFailed, lambda: self._publish(call))
            return
        if not known.uses:
            known.sessions += 1
        known.uses[call.node] = call.use
        known.was_raw |= writes_raw(call.use)
        context = self._publish(call)
        is_first = known.sessions == 1 and mode == "exclusive" and not known.was_raw
        event(f"history {context.history}")
        before = History.WRITTEN if known.was_raw else History.ATTACHED
        assert context.history is (History.FIRST if is_first else before)
        assert context == self._publish(call)

    def unpublish(self, call: Call) -> None:
        self._unpublish(call)
        known = self.expected.get(call.name)
        if known is not None:
            known.uses.pop(call.node, None)

    def expand(self, call: Call) -> None:
        known = self.expected.get(call.name)
        if known is None:
            refused(VolumeNotFound, lambda: self._expand(call))
            return
        known.size_bytes = max(known.size_bytes, call.gib * GIB + MIB)
        assert self._expand(call) == known.size_bytes

    # --- the calls themselves ---

    def _create(self, call: Call) -> ProvisionedVolume:
        return self.world.create(call.name, parameters=CLAIM)

    def _delete(self, call: Call) -> None:
        self.world.delete(self.last_id.get(call.name, "none"))

    def _publish(self, call: Call) -> PublishContext:
        return self.world.publish(self.last_id.get(call.name, "none"), call.node, USES[call.use])

    def _unpublish(self, call: Call) -> None:
        self.world.unpublish(self.last_id.get(call.name, "none"), call.node)

    def _expand(self, call: Call) -> int:
        wanted = CapacityRange(call.gib * GIB + MIB)
        volume_id = self.last_id.get(call.name, "none")
        return self.world.expand.expand(volume_id, wanted, None, deadline=self.world.deadline())[0]

    def _crash(self, call: Call) -> None:
        """Begin the call and die at the given request, if the call comes that far."""
        done = 0.0

        def step(_: str) -> None:
            nonlocal done
            if done == call.crash_at:
                raise Crash
            done += 0.5

        management = self.world.management
        management.before = management.after = step
        try:
            getattr(self, f"_{call.verb}")(call)
        except Crash:
            event(f"{call.verb} died at request {call.crash_at}")
        except DriverError:
            pass
        finally:
            management.before = management.after = lambda _: None


def refused(family: type[DriverError], call: Callable[[], object]) -> None:
    try:
        call()
    except family:
        return
    raise AssertionError(f"wanted {family.__name__}")


def reservation(use: str) -> str:
    return {"rwo": "exclusive", "block": "exclusive", "rox": "readers", "rwx": "writers"}[use]


def writes_raw(use: str) -> bool:
    capability: Capability = USES[use]
    return isinstance(capability.access, BlockAccess) and capability.mode is not AccessMode.MULTI_NODE_READER_ONLY


@settings(max_examples=400, deadline=None)
@given(st.lists(CALLS, min_size=1, max_size=25))
def test_any_order_of_calls_with_crashes_ends_as_the_specification_says(calls: list[Call]) -> None:
    life = Life()
    for call in calls:
        life.run(call)


@settings(max_examples=100, deadline=None)
@given(
    st.lists(CALLS, min_size=1, max_size=12),
    st.tuples(*(st.sampled_from([0.0, 0.5, 7.0]) for _ in range(5))),
)
def test_a_slow_storage_changes_nothing_of_it(calls: list[Call], delays: tuple[float, ...]) -> None:
    life = Life()
    management = life.world.management
    management.make_s, management.attach_s, management.io_s, management.detach_s, management.delete_s = delays
    for call in calls:
        life.run(call)


@settings(max_examples=150, deadline=None)
@given(st.integers(0, 12), st.booleans())
def test_a_whole_life_survives_a_crash_at_every_request(step: int, after: bool) -> None:
    life = Life()
    at = step + (0.5 if after else 0.0)
    name = NAMES[0]
    for verb in ("create", "publish", "expand", "unpublish", "publish", "unpublish", "delete"):
        life.run(Call(verb, name, gib=2, crash_at=at))
    assert life.world.management.all_volumes() == []
