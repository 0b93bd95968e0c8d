# SPDX-License-Identifier: Apache-2.0
"""Any order and repetition of node calls, with the driver dying anywhere between two effects, ends as the spec says.

The machine is `FakeHost`; the oracle below knows nothing of the driver's code: it keeps, per path, what the calls that
succeeded should have left there, and per volume, what its device holds.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from csi_driver.errors import DriverError
from csi_driver.model import DEFAULT_DRIVER_NAME, AccessMode, MountAccess
from csi_driver.node.usage_records import RAW, USED
from csi_driver.publish_context import History
from tests.fakes.disks import MIB, FakeDisk, FakeFilesystem
from tests.fakes.node import BLOCK, KUBELET, FakeNode, publish_context

UUIDS = {
    "csi-a": "aaaaaaaa-0000-4000-8000-000000000001",
    "csi-b": "bbbbbbbb-0000-4000-8000-000000000002",
}
TYPES = {"csi-a": "ext4", "csi-b": "btrfs"}
COPY = "csi-copy"
"""The name of a volume that is made again and again, each time with another uuid, as a copy of one of the others."""
STRANGER = "cccccccc-0000-4000-8000-000000000003"
STAGINGS = tuple(
    KUBELET / "plugins/kubernetes.io/csi" / DEFAULT_DRIVER_NAME / (digit * 64) / "globalmount" for digit in "12"
)
"""Where kubelet stages; its records are absent throughout, so that every sweep takes what nothing else shows in use."""
TARGETS = (KUBELET / "pods/1", KUBELET / "pods/2", KUBELET / "pods/3")

volumes = st.sampled_from([*sorted(UUIDS), COPY])
stagings = st.sampled_from(STAGINGS)
targets = st.sampled_from(TARGETS)
# Mostly no death; else at the n-th point between two effects, and whether kubelet repeats the call at once.
deaths = st.one_of(st.just(0), st.integers(1, 14))


class Died(BaseException):
    """The driver's process ends here; nothing may catch it."""


@dataclass
class Life:
    """The true state of one volume. `inherited`: the volumes it may have its content of; None = it is no copy."""

    uuid: str
    fs_type: str
    inherited: tuple[str, ...] | None = None
    was_raw: bool = False
    disk: FakeDisk | None = None
    last: FakeDisk | None = None
    attachment: int = 0
    files: dict[str, bytes] = field(default_factory=dict)
    raw: dict[int, bytes] = field(default_factory=dict)
    holds: str = "blank"
    """blank, filesystem (also one that a user made on the raw device), half (an unfinished filesystem) or raw."""
    begun: int = 0
    """The attachment under which a format was begun and not seen finished; 0 = none."""


@dataclass(frozen=True)
class Place:
    """A mount at a path. `is_filesystem_read_only` is the whole filesystem's, `read_only` this mount's."""

    name: str
    disk: FakeDisk
    block: bool
    read_only: bool
    is_filesystem_read_only: bool = False

    @property
    def is_dead(self) -> bool:
        return self.disk.is_gone


class NodeLife(RuleBasedStateMachine):
    def __init__(self) -> None:
        super().__init__()
        self.node = FakeNode()
        self.host = self.node.host
        for path in (*STAGINGS, TARGETS[0].parent):
            self.host.make_tree(path)
        self.lives = {name: Life(uuid, TYPES[name]) for name, uuid in UUIDS.items()}
        self.lives[COPY] = Life("dddddddd-0000-4000-8000-000000000000", "ext4")
        self.copies = 0
        self.places: dict[Path, Place] = {}

    # --- the storage, the users ---

    @initialize(in_use=st.booleans())
    def attach_all(self, in_use: bool) -> None:
        """Half of the lives begin with a volume in use and a copy of it: chance alone comes there too seldom."""
        self.attach()
        if in_use:
            self.stage("csi-b", STAGINGS[1], block=False, read_only=False, death=0, again=False)
            self.write(STAGINGS[1], b"precious")
            self.copy("csi-b")

    @precondition(lambda self: any(life.disk is None for life in self.lives.values()))
    @rule()
    def attach(self) -> None:
        for name, life in self.lives.items():
            if life.disk is None:
                life.attachment += 1
                life.disk = self.host.attach(name, life.uuid, like=life.last)

    @rule(name=volumes)
    def lose_the_device(self, name: str) -> None:
        life = self.lives[name]
        if life.disk is not None:
            life.last, life.disk = self.host.detach(name), None

    @rule(source=st.sampled_from(sorted(UUIDS)))
    def copy(self, source: str) -> None:
        """Replace the copy by one of the source as it is now, which may be mounted, or half formatted."""
        of, old = self.lives[source], self.lives[COPY]
        if of.disk is None or any(place.name == COPY for place in self.places.values()):
            return
        if old.disk is not None:
            self.host.detach(COPY)
        self.copies += 1
        new = Life(
            f"dddddddd-0000-4000-8000-{self.copies:012}", of.fs_type, (of.uuid,), of.was_raw, attachment=1,
            files=dict(of.files), raw=dict(of.raw), holds=of.holds,
        )  # fmt: skip
        new.disk = self.host.attach(COPY, new.uuid, like=of.disk.cut())
        self.lives[COPY] = new

    @rule(path=st.sampled_from(TARGETS))
    def make_a_filesystem_on_the_raw_device(self, path: Path) -> None:
        place = self.places.get(path)
        if place is None or place.is_dead or place.read_only or not place.block or self.elsewhere(place.name):
            return
        life = self.lives[place.name]
        if life.holds in ("blank", "raw"):
            life.holds, life.raw, life.files = "filesystem", {}, {"own": b"precious"}
            place.disk.raw, place.disk.was_used = {}, True
            place.disk.filesystem = FakeFilesystem(
                life.fs_type, place.disk.size_bytes, uuid=STRANGER, files=dict(life.files)
            )

    @rule()
    def reboot(self) -> None:
        self.host.reboot()
        self.node.restart()
        self.places.clear()

    @rule(path=st.sampled_from((*STAGINGS, *TARGETS)), data=st.binary(min_size=1, max_size=3))
    def write(self, path: Path, data: bytes) -> None:
        place = self.places.get(path)
        if place is None or place.is_dead or place.read_only:
            return
        life = self.lives[place.name]
        if not place.block:
            self.host.write_file(path, "a", data)
            life.files["a"] = data
        elif life.holds in ("blank", "raw"):
            self.host.write_raw(path, 32 * MIB, data)
            life.raw[32 * MIB] = data
            life.holds = "raw"

    @rule(name=volumes)
    def grow_the_device(self, name: str) -> None:
        disk = self.lives[name].disk
        if disk is not None and disk.size_bytes < 512 * MIB:
            disk.size_bytes += 64 * MIB

    @rule(death=deaths)
    def sweep_twice(self, death: int) -> None:
        """Unstage unmounts dead mounts, and live ones that are used nowhere else; only these."""
        gone = [path for path in STAGINGS if path in self.places and self.is_in_nobodys_way(path)]
        self.host.step = _dying_at(death)
        try:
            for _ in range(2):
                self.node.use.reconcile.sweep(lambda name: nullcontext())
        except Died:
            self.host.step = lambda point: None
            self.node.restart()
            for _ in range(2):
                self.node.use.reconcile.sweep(lambda name: nullcontext())
        finally:
            self.host.step = lambda point: None
        for path in gone:
            del self.places[path]

    def is_in_nobodys_way(self, path: Path) -> bool:
        place = self.places[path]
        others = [other for at, other in self.places.items() if at != path and other.disk is place.disk]
        return place.is_dead or all(other.block and other.read_only for other in others)

    # --- the calls ---

    @rule(name=volumes, path=stagings, block=st.booleans(), read_only=st.booleans(), death=deaths, again=st.booleans())
    def stage(self, name: str, path: Path, block: bool, read_only: bool, death: int, again: bool) -> None:
        mode = AccessMode.SINGLE_NODE_READER_ONLY if read_only else AccessMode.SINGLE_NODE_WRITER
        has_dead = not block and self.has_dead_filesystem(name, path)
        expected = self.may_stage_block(name, path) if block else self.may_stage(name, path, read_only)
        done = self.call(
            lambda: self.node.stage(
                volume_id=self.id_of(name),
                staging=path,
                access=BLOCK if block else self.access_of(name),
                mode=mode,
                context=self.context_of(name),
            ),
            expected,
            death,
            again,
        )
        life = self.lives[name]
        if has_dead:
            self.look_again(path)
        if done and not block and life.disk is not None:
            if path not in self.places and not self.elsewhere(name):
                life.holds, life.begun = "filesystem", 0
                is_known = life.inherited is None or life.fs_type != "btrfs"
                assert is_known or (life.disk.filesystem and life.disk.filesystem.uuid == life.uuid)
            self.places[path] = Place(name, life.disk, False, read_only, read_only)

    @rule(
        name=volumes, staging=stagings, at=targets, block=st.booleans(), read_only=st.booleans(), death=deaths,
        again=st.booleans(),
    )  # fmt: skip
    def publish(
        self, name: str, staging: Path, at: Path, block: bool, read_only: bool, death: int, again: bool
    ) -> None:
        expected = (self.may_publish_block if block else self.may_publish)(name, staging, at, read_only)
        has_dead = not block and self.has_dead_filesystem(name, at)
        done = self.call(
            lambda: self.node.publish(
                at,
                volume_id=self.id_of(name),
                staging=staging,
                access=BLOCK if block else self.access_of(name),
                read_only=read_only,
                context=self.context_of(name),
            ),
            expected,
            death,
            again,
        )
        life = self.lives[name]
        if has_dead:
            self.look_again(at)
        if done and at not in self.places and life.disk is not None:
            if block and not read_only:
                life.begun, life.was_raw = 0, True
            origin = self.places.get(staging)
            shown = read_only or (origin is not None and origin.read_only)
            whole = origin is not None and origin.is_filesystem_read_only
            self.places[at] = Place(name, life.disk, block, shown, whole)

    @rule(name=volumes, path=stagings, death=deaths, again=st.booleans())
    def unstage(self, name: str, path: Path, death: int, again: bool) -> None:
        if self.call(lambda: self.node.unstage(self.id_of(name), path), True, death, again):
            self.take_off(name, path)

    @rule(name=volumes, path=targets, death=deaths, again=st.booleans())
    def unpublish(self, name: str, path: Path, death: int, again: bool) -> None:
        if self.call(lambda: self.node.unpublish(path, self.id_of(name)), True, death, again):
            self.take_off(name, path)
            assert path in self.places or path not in self.host.tree

    @rule(name=volumes, path=st.sampled_from((*STAGINGS, *TARGETS)), death=deaths, again=st.booleans())
    def expand(self, name: str, path: Path, death: int, again: bool) -> None:
        place = self.places.get(path)
        disk = self.lives[name].disk
        expected = place is not None and place.name == name and disk is not None and not place.is_dead
        if expected and place is not None and not place.block and disk is not None and disk.filesystem is not None:
            is_small = disk.filesystem.size_bytes < disk.size_bytes
            expected = not is_small or any(not p.read_only for p in (place, *self.elsewhere(name)))
        call = lambda: self.node.expand(path, volume_id=self.id_of(name))  # noqa: E731
        if self.call(call, expected, death, again) and place is not None and not place.block and disk is not None:
            assert disk.filesystem is not None
            assert disk.filesystem.size_bytes == disk.size_bytes

    def call(self, act: Callable[[], object], expected: bool, death: int, again: bool) -> bool:
        """Call; if the driver dies, restart it and call `again`, or check the result. True = success."""
        self.host.step = _dying_at(death)
        try:
            return self.outcome(act, expected)
        except Died:
            self.host.step = lambda point: None
            self.node.restart()
            if again:
                return self.outcome(act, expected)
            self.look()
            return False
        finally:
            self.host.step = lambda point: None

    def outcome(self, act: Callable[[], object], expected: bool) -> bool:
        try:
            act()
        except DriverError:
            assert not expected
            return False
        assert expected
        return True

    # --- rules of the specification and the decisions ---

    def may_stage(self, name: str, path: Path, read_only: bool) -> bool:
        life = self.lives[name]
        there = self.places.get(path)
        if life.disk is None:
            return False
        if there is not None and not self.is_outlived(name, path):
            same = there.name == name and not there.is_dead and not there.block
            return same and there.is_filesystem_read_only == read_only
        shared = self.elsewhere(name)
        if shared:
            shown = all(place.read_only for place in shared)
            return shown == read_only and shared[0].is_filesystem_read_only == read_only
        if life.fs_type == "btrfs" and any(self.has_dead_filesystem(name, at) for at in self.places if at != path):
            return False  # the kernel keeps the uuid of a dead btrfs for as long as it is mounted
        unfinished = life.begun == life.attachment
        if life.holds == "filesystem" and read_only and life.inherited and life.fs_type == "btrfs":
            assert life.disk.filesystem is not None
            return not unfinished and life.disk.filesystem.uuid == life.uuid
        if life.holds == "filesystem":
            return not (unfinished and read_only)
        if life.holds == "half":
            return unfinished and not read_only
        return life.holds == "blank" and not read_only

    def is_outlived(self, name: str, path: Path) -> bool:
        """Return whether the path has the dead filesystem of a volume that returned as another device."""
        return self.has_dead_filesystem(name, path) and self.lives[name].disk is not None

    def has_dead_filesystem(self, name: str, path: Path) -> bool:
        there = self.places.get(path)
        return there is not None and there.name == name and there.is_dead and not there.block

    def may_stage_block(self, name: str, path: Path) -> bool:
        return self.lives[name].disk is not None and path not in self.places

    def may_publish(self, name: str, staging: Path, target: Path, read_only: bool) -> bool:
        origin, there = self.places.get(staging), self.places.get(target)
        if self.lives[name].disk is None or origin is None or origin.name != name or origin.is_dead:
            return False
        if origin.read_only and not read_only:
            return False
        if there is None or self.is_outlived(name, target):
            return True
        return self.is_so(there, name, block=False, read_only=read_only)

    def may_publish_block(self, name: str, staging: Path, target: Path, read_only: bool) -> bool:
        there = self.places.get(target)
        if self.lives[name].disk is None or staging in self.places:
            return False
        return there is None or self.is_so(there, name, block=True, read_only=read_only)

    @staticmethod
    def is_so(there: Place, name: str, *, block: bool, read_only: bool) -> bool:
        return there.name == name and not there.is_dead and (there.block, there.read_only) == (block, read_only)

    def take_off(self, name: str, path: Path) -> None:
        there = self.places.get(path)
        if there is None:
            return
        # A read-only device over a lost one stays, with the UUID of its volume.
        tells = there.block and there.read_only
        if there.name == name or (there.is_dead and not tells):
            del self.places[path]

    def elsewhere(self, name: str) -> list[Place]:
        return [place for place in self.places.values() if place.name == name and not (place.block or place.is_dead)]

    def look_again(self, path: Path) -> None:
        """A dead mount at the path may be gone after any result of the call."""
        self.places.pop(path, None)
        self.look()

    def look(self) -> None:
        """After a crash without retry: the next call starts from the present state."""
        for path in (*STAGINGS, *TARGETS):
            entry = self.host.topmost(path)
            if entry is None:
                self.places.pop(path, None)
            elif path not in self.places:
                device = entry.disk or entry.node
                assert device is not None
                disk = device.ground
                self.places[path] = Place(
                    disk.name, disk, entry.node is not None, entry.read_only, disk.superblock_read_only
                )
        for life in self.lives.values():
            mark = self.node.records.kept.get(life.uuid)
            life.begun = mark.attachment if mark is not None and mark.filesystem not in (RAW, USED) else 0
            life.was_raw |= mark is not None and mark.filesystem == RAW
            if life.disk is not None and life.disk.filesystem is not None:
                life.holds = "filesystem" if life.disk.filesystem.complete else "half"

    def id_of(self, name: str) -> str:
        return f"single-zone-cluster:{name}:{self.lives[name].uuid}:ns"

    def access_of(self, name: str) -> MountAccess:
        return MountAccess(self.lives[name].fs_type)

    def context_of(self, name: str) -> dict[str, str]:
        life = self.lives[name]
        history = History.FIRST if life.attachment == 1 and life.inherited is None else History.ATTACHED
        if life.was_raw and (life.attachment > 1 or life.inherited is not None):
            history = History.WRITTEN
        return publish_context(
            name=name, uuid=life.uuid, attachment=life.attachment, history=history, inherited=life.inherited
        )

    # --- what always holds ---

    @invariant()
    def nothing_that_was_written_is_formatted(self) -> None:
        assert self.host.destroyed == []

    @invariant()
    def every_written_byte_is_there(self) -> None:
        for life in self.lives.values():
            disk = life.disk or life.last
            if disk is not None:
                assert disk.raw == life.raw
                assert (disk.filesystem.files | disk.filesystem.log if disk.filesystem else {}) == life.files

    @invariant()
    def every_path_holds_what_it_should_exactly_once(self) -> None:
        for path in (*STAGINGS, *TARGETS):
            assert self.host.mounts_at(path) == (path in self.places), path

    @invariant()
    def every_mount_is_of_the_right_volume_and_access(self) -> None:
        for path, place in self.places.items():
            entry = self.host.topmost(path)
            assert entry is not None
            device = entry.node if place.block else entry.disk
            assert device is not None
            assert device.ground is place.disk
            assert entry.read_only == place.read_only
            if place.block and place.read_only:
                assert device.read_only

    @invariant()
    def nothing_is_held_open_between_calls(self) -> None:
        assert all(disk.claimed is None for disk in self.host.disks.values())

    @precondition(lambda self: bool(self.places))
    @rule(order=st.permutations((*STAGINGS, *TARGETS)))
    def everything_is_taken_down(self, order: list[Path]) -> None:
        for path in order:
            for name in self.lives:
                if path in TARGETS:
                    self.node.unpublish(path, self.id_of(name))
                else:
                    self.node.unstage(self.id_of(name), path)
        assert self.host.table == []
        assert self.host.readers == []
        assert not any(path in self.host.tree for path in TARGETS)
        self.places.clear()


def _dying_at(death: int) -> Callable[[str], None]:
    left = death

    def step(point: str) -> None:
        nonlocal left
        left -= 1
        if left == 0:
            raise Died(point)

    return step


TestNodeLife = NodeLife.TestCase
TestNodeLife.settings = settings(max_examples=200, stateful_step_count=40, deadline=None)
