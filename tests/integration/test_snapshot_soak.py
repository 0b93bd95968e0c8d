# SPDX-License-Identifier: Apache-2.0
"""Snapshots, groups, restores, clones, expansion and deletion in any order on two nodes, while every role is killed.

What a volume and a snapshot have to hold is known at any time. `NVMESH_CSI_SNAPSHOT_SECONDS=N` lets it go on for so
long, `NVMESH_CSI_SNAPSHOT_SEED=N` in another order.
"""

from __future__ import annotations

import contextlib
import dataclasses
import mmap
import os
import random
import signal
import sqlite3
import subprocess
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeVar

import pytest

from csi_driver.deadline import Deadline
from csi_driver.model import AccessMode, Capability
from csi_driver.rpc.client import CallFailed
from csi_driver.rpc.pb import csi_pb2 as pb
from tests.client import CsiClient
from tests.integration.rig import (
    GIB,
    MIB,
    Rig,
    device_size,
    filesystem,
    loops_over,
    mounts_below,
    processes_of,
    raw_block,
    running,
    wait_for,
)
from tests.integration.test_contention import replaced
from tests.reflink_pool import mounted

pytestmark = pytest.mark.root

SECONDS = float(os.environ.get("NVMESH_CSI_SNAPSHOT_SECONDS", "12"))
SEED = int(os.environ.get("NVMESH_CSI_SNAPSHOT_SEED", "1"))
WORKERS = 3
STUCK_AFTER_S = 240.0
SLOTS, BLOCK_BYTES = 8, 4096
PASSING = ("ABORTED", "UNAVAILABLE", "DEADLINE_EXCEEDED", "CANCELLED", "UNAUTHENTICATED")
"""The last: the manager was killed twice within one call, and had forgotten the login each time."""
READERS = AccessMode.MULTI_NODE_READER_ONLY
OTHER_NODE = "other-node"
ROLES = ("storage", "controller", "node")

T = TypeVar("T")
Content = tuple[frozenset[int], ...]
"""What each slot may hold: a number from which its bytes are made, 0 for never written."""
BLANK: Content = (frozenset((0,)),) * SLOTS


def block_of(number: int) -> bytes:
    return random.Random(number).randbytes(BLOCK_BYTES) if number else bytes(BLOCK_BYTES)


class World:
    """Two nodes over one manager. Every role is killed now and then; calls are repeated as a CO does."""

    def __init__(self, rig: Rig, other: Path) -> None:
        self.rig, self.other = rig, other
        self.paths = rig.directory.with_name(f"{rig.directory.name}.paths")
        self.paths.mkdir()
        self.controller = rig.controller
        self._argv = replaced(
            rig.role_argv("node"),
            {
                "--endpoint": f"unix://{other}/node.sock",
                "--node-name": OTHER_NODE,
                "--state-directory": f"{other}/node",
                "--device-directory": f"{other}/dev",
                "--status-directory": f"{other}/proc",
            },
        )
        self._start_other()
        self.nodes = (rig.node, CsiClient(other / "node.sock", timeout_s=180))
        assert self.nodes[1].wait_ready(Deadline.after(180)) is None
        self.ids = [node.node_info().node_id for node in self.nodes]
        self.devices = (rig.directory / "dev", other / "dev")
        self.over = threading.Event()
        self.changing = threading.Event()
        """A call that makes or removes a volume or snapshot begins."""
        self.kills = 0

    def _start_other(self) -> None:
        self.rig.spawn(*self._argv, log=self.other / "node.log")

    def _kill_other(self) -> None:
        for pid in processes_of(self.other / "node.sock"):
            os.kill(pid, signal.SIGKILL)
        self._start_other()

    def kill_until_over(self, chance: random.Random) -> None:
        """Kill roles in the middle of a call: one and wait until it is back, again in its start, or all at once."""
        while not self.over.wait(chance.uniform(0.1, 0.8)):
            self.changing.clear()
            self.changing.wait(1)
            time.sleep(chance.uniform(0, 0.04))
            roles = chance.choice((*(ROLES[:1],) * 3, ROLES[1:2], ROLES[2:], (), ROLES))
            if not roles:
                self._kill_other()
            # The file of a role that is dead may name a process of somebody else by now.
            own = processes_of(self.rig.directory) if roles else []
            for role in roles:
                with contextlib.suppress(OSError, ValueError):
                    if (pid := self.rig.pid(role)) in own:
                        os.kill(pid, signal.SIGKILL)
            self.kills += 1
            if roles and chance.random() < 0.7:
                with contextlib.suppress(ProcessLookupError):
                    self.rig.kill(roles[0])
        self.rig.kill("storage")

    def files(self) -> dict[str, set[str]]:
        """Return the names of all files that the pool has for volumes, snapshots and readers."""
        pool = self.rig.directory / "pool"
        return {kind: {each.name for each in (pool / kind).glob("*")} for kind in ("volumes", "snapshots", "private")}

    def rows(self) -> int:
        """Count the rows of volumes, snapshots and groups in the manager's database, also of what is in no list."""
        database = f"file:{self.rig.directory}/pool/manager.sqlite?mode=ro"
        kinds = ("volumes", "snapshots", "snapshotGroups", "attachments")
        with contextlib.closing(sqlite3.connect(database, uri=True, timeout=60)) as opened:
            (count,) = opened.execute("SELECT count(*) FROM documents WHERE kind IN (?, ?, ?, ?)", kinds).fetchone()
        return int(count)

    def listed(self) -> dict[str, set[str]]:
        """Return the files that the lists of the driver ask for; there are no readers."""
        volumes = {each.volume.volume_id for each in self.controller.volumes()}
        snapshots = {each.snapshot_id for each in self.controller.snapshots()}
        ids = {"volumes": volumes, "snapshots": snapshots, "private": set[str]()}
        return {kind: {f"{each.split(':')[2]}.img" for each in found} for kind, found in ids.items()}


def until_done(call: Callable[[], T], *refusals: str) -> T:
    """Repeat a call until it is done, or refused in one of the ways that are allowed."""
    end = time.monotonic() + STUCK_AFTER_S
    while True:
        try:
            return call()
        except CallFailed as failure:
            if failure.code in refusals or failure.code not in PASSING or time.monotonic() > end:
                raise
            time.sleep(0.05)


@dataclass
class Volume:
    """A volume and what it has to hold."""

    name: str
    id: str
    capability: Capability
    context: dict[str, str]
    size: int
    content: Content = BLANK
    node: int | None = None
    is_formatted: bool = False

    @property
    def is_block(self) -> bool:
        return self.capability == raw_block()


@dataclass(frozen=True)
class Snapshot:
    """A snapshot and what it has to hold; `source` tells how volumes made of it are used."""

    told: pb.Snapshot
    source: Volume

    @property
    def id(self) -> str:
        return self.told.snapshot_id


@dataclass
class Worker:
    """One of several programs that use the driver at once, each with volumes of its own."""

    world: World
    number: int
    chance: random.Random
    volumes: list[Volume] = field(default_factory=list)
    snapshots: list[Snapshot] = field(default_factory=list)
    groups: list[tuple[pb.VolumeGroupSnapshot, list[Snapshot]]] = field(default_factory=list)
    doing: str = ""
    done: int = 0
    failure: BaseException | None = None
    names: int = 0

    def run(self) -> None:
        try:
            while not self.world.over.is_set():
                self.step()
                self.done += 1
        except BaseException as problem:  # noqa: BLE001  # handed to the test
            self.failure = problem
            self.world.over.set()

    def step(self) -> None:
        steps: dict[Callable[[], None], int] = {
            self.create: 2, self.move: 3, self.write: 8, self.cut: 6, self.cut_while_written: 3, self.cut_group: 3,
            self.restore: 4, self.clone: 3, self.expand: 2, self.fan_out: 2, self.delete_snapshot: 3,
            self.delete_group: 2, self.delete_volume: 3, self.look: 2, self.compare: 3, self.abandon: 4,
        }  # fmt: skip
        step = self.chance.choices(list(steps), list(steps.values()))[0]
        self.doing = step.__name__
        step()

    def name(self, kind: str) -> str:
        self.names += 1
        return f"soak-{self.number}-{kind}-{self.names}"

    def path(self, volume: Volume, kind: str, node: int | None = None) -> Path:
        where = volume.node if node is None else node
        return self.world.paths / f"{volume.id.split(':')[1]}.{where}.{kind}"

    # --- volumes ----------------------------------------------------------------------------------------------

    def create(self) -> None:
        if len(self.volumes) < 4:
            capability = self.chance.choice([raw_block(), filesystem("ext4"), filesystem("xfs")])
            self.volumes.append(self.made(capability, GIB))

    def made(self, capability: Capability, size: int, *, snapshot: str = "", source: str = "") -> Volume:
        name = self.name("volume")

        def create() -> tuple[str, dict[str, str]]:
            self.world.changing.set()
            made = self.world.controller.create_volume(
                name, required_bytes=size, capabilities=[capability], snapshot=snapshot, source=source
            )
            assert made.capacity_bytes == size
            return made.volume_id, dict(made.context)

        made = until_done(create)
        assert until_done(create) == made
        return Volume(name, made[0], capability, made[1], size)

    def any_volume(self) -> Volume | None:
        return self.chance.choice(self.volumes) if self.volumes else None

    def any_in_use(self) -> Volume | None:
        volume = self.any_volume()
        if volume is not None and volume.node is None:
            self.up(volume, self.chance.randrange(2))
        return volume

    def up(self, volume: Volume, node: int, *, read_only: bool = False) -> None:
        self.doing = f"{self.doing}: up {volume.name}"
        controller, client = self.world.controller, self.world.nodes[node]
        staging, target = self.path(volume, "staging", node), self.path(volume, "target", node)
        context = until_done(
            lambda: controller.attach(
                volume.id, self.world.ids[node], volume.capability, volume_context=volume.context, read_only=read_only
            )
        )
        staging.mkdir(exist_ok=True)
        both = {"publish_context": context, "volume_context": volume.context}
        until_done(lambda: client.stage(volume.id, staging, volume.capability, **both))
        until_done(lambda: client.publish(volume.id, staging, target, volume.capability, read_only=read_only, **both))
        volume.node, volume.is_formatted = node, True
        self.verify(volume)

    def down(self, volume: Volume) -> None:
        self.doing = f"{self.doing}: down {volume.name}"
        node = volume.node
        if node is None:
            return
        client = self.world.nodes[node]
        until_done(lambda: client.unpublish(volume.id, self.path(volume, "target")))
        until_done(lambda: client.unstage(volume.id, self.path(volume, "staging")))
        until_done(lambda: self.world.controller.detach(volume.id, self.world.ids[node]))
        volume.node = None

    def move(self) -> None:
        volume = self.any_volume()
        if volume is not None:
            self.down(volume)
            self.up(volume, self.chance.randrange(2))

    def verify(self, volume: Volume) -> None:
        for slot, allowed in enumerate(volume.content):
            found = self.read(volume, slot)
            assert found in {block_of(number) for number in allowed}, f"{volume} slot {slot}: {found[:16]!r}"
        target = self.path(volume, "target")
        if volume.is_block:
            assert device_size(target) == volume.size

    def read(self, volume: Volume, slot: int) -> bytes:
        target = self.path(volume, "target")
        if not volume.is_block:
            with contextlib.suppress(FileNotFoundError):
                return (target / f"slot-{slot}").read_bytes()
            return bytes(BLOCK_BYTES)
        with contextlib.closing(mmap.mmap(-1, BLOCK_BYTES)) as block, opened(target, os.O_RDONLY | os.O_DIRECT) as file:
            os.preadv(file, [block], slot * 8 * MIB)
            return block[:]

    def put(self, volume: Volume, slot: int, number: int) -> None:
        """Write a slot at once and durably: a cut has the one content or the other."""
        target = self.path(volume, "target")
        if volume.is_block:
            with (
                contextlib.closing(mmap.mmap(-1, BLOCK_BYTES)) as block,
                opened(target, os.O_WRONLY | os.O_DIRECT) as file,
            ):
                block[:] = block_of(number)
                os.pwritev(file, [block], slot * 8 * MIB)
                os.fsync(file)
            return
        new = target / f"new-{slot}"
        with opened(new, os.O_WRONLY | os.O_CREAT | os.O_TRUNC) as file:
            os.write(file, block_of(number))
            os.fsync(file)
        new.rename(target / f"slot-{slot}")
        with opened(target, os.O_RDONLY | os.O_DIRECTORY) as directory:
            os.fsync(directory)

    def write(self, volume: Volume | None = None, slot: int | None = None) -> None:
        volume = volume or self.any_in_use()
        if volume is None:
            return
        slot = self.chance.randrange(SLOTS) if slot is None else slot
        number = self.chance.randrange(1, 1 << 60)
        self.put(volume, slot, number)
        volume.content = (*volume.content[:slot], frozenset((number,)), *volume.content[slot + 1 :])

    def expand(self) -> None:
        volume = self.any_volume()
        if volume is None or volume.size >= 4 * GIB:
            return
        if volume.capability == filesystem("ext4"):
            self.down(volume)  # growth of a mounted ext4 needs a right that not every machine has
        volume.size += GIB
        until_done(lambda: self.world.controller.expand_volume(volume.id, volume.size, capability=volume.capability))
        if (node := volume.node) is not None:
            target, staging = self.path(volume, "target"), self.path(volume, "staging")
            until_done(lambda: self.world.nodes[node].expand_on_node(volume.id, target, staging=staging))
            self.verify(volume)

    def delete_volume(self, volume: Volume | None = None) -> None:
        volume = volume or self.any_volume()
        if volume is not None:
            self.down(volume)
            for _ in range(2):
                until_done(lambda: self.world.controller.delete_volume(volume.id))
            self.volumes.remove(volume)

    # --- snapshots --------------------------------------------------------------------------------------------

    def cut(self) -> None:
        volume = self.any_volume()
        if volume is not None and len(self.snapshots) < 8:
            self.snapshots.append(self.cut_of(volume))

    def cut_of(self, volume: Volume) -> Snapshot:
        name, source = self.name("cut"), dataclasses.replace(volume, node=None)
        self.world.changing.set()
        told = until_done(lambda: self.world.controller.cut(name, volume.id))
        assert (told.ready_to_use, told.size_bytes, told.source_volume_id) == (True, volume.size, volume.id)
        assert until_done(lambda: self.world.controller.cut(name, volume.id)) == told
        return Snapshot(told, source)

    def cut_while_written(self) -> None:
        volume = self.any_in_use()
        if volume is None or len(self.snapshots) >= 8:
            return
        before, slot = volume.content, self.chance.randrange(SLOTS)
        writer = threading.Thread(target=self.write, args=(volume, slot))
        writer.start()
        cut = self.cut_of(volume)
        writer.join()
        either = (*before[:slot], before[slot] | volume.content[slot], *before[slot + 1 :])
        self.snapshots.append(Snapshot(cut.told, dataclasses.replace(cut.source, content=either)))

    def cut_group(self) -> None:
        if len(self.volumes) < 2 or len(self.groups) >= 3:
            return
        members, name = self.chance.sample(self.volumes, 2), self.name("group")
        ids = [each.id for each in members]
        sources = {each.id: dataclasses.replace(each, node=None) for each in members}

        def cut() -> pb.VolumeGroupSnapshot:
            self.world.changing.set()
            return self.world.controller.cut_group(name, ids)

        try:
            group = until_done(cut, "FAILED_PRECONDITION")
        except CallFailed as refusal:
            is_expected = any(each.is_block and each.node is not None for each in members)
            if refusal.code != "FAILED_PRECONDITION" or not is_expected:
                raise
            return  # a raw device in use cannot be frozen
        assert group.ready_to_use
        assert until_done(cut) == group
        assert {each.source_volume_id for each in group.snapshots} == set(ids)
        self.groups.append((group, [Snapshot(each, sources[each.source_volume_id]) for each in group.snapshots]))

    def any_snapshot(self) -> Snapshot | None:
        found = self.all_snapshots()
        return self.chance.choice(found) if found else None

    def restore(self) -> None:
        snapshot = self.any_snapshot()
        if snapshot is not None and len(self.volumes) < 6:
            self.volumes.append(self.restored(snapshot))

    def restored(self, snapshot: Snapshot, capability: Capability | None = None) -> Volume:
        source = snapshot.source
        larger = self.chance.choice((0, 0, GIB))
        made = self.made(capability or source.capability, source.size + larger, snapshot=snapshot.id)
        made.content, made.is_formatted = source.content, source.is_formatted
        return made

    def clone(self) -> None:
        volume = self.any_volume()
        if volume is not None and len(self.volumes) < 6:
            made = self.made(volume.capability, volume.size, source=volume.id)
            made.content, made.is_formatted = volume.content, volume.is_formatted
            self.volumes.append(made)

    def fan_out(self) -> None:
        """Read a snapshot on both nodes at once."""
        snapshot = self.any_snapshot()
        if snapshot is None or snapshot.source.is_block or not snapshot.source.is_formatted:
            return
        fs_type = snapshot.source.capability.access.fs_type  # type: ignore[union-attr]
        first = self.restored(snapshot, filesystem(fs_type, READERS))
        second = dataclasses.replace(first)
        self.up(first, 0, read_only=True)
        self.up(second, 1, read_only=True)
        self.down(first)
        self.verify(second)
        self.down(second)
        until_done(lambda: self.world.controller.delete_volume(first.id))

    def delete_snapshot(self) -> None:
        if self.snapshots:
            snapshot = self.snapshots.pop(self.chance.randrange(len(self.snapshots)))
            for _ in range(2):
                until_done(lambda: self.world.controller.delete_snapshot(snapshot.id))

    def delete_group(self) -> None:
        if self.groups:
            group, members = self.groups.pop(self.chance.randrange(len(self.groups)))
            with pytest.raises(CallFailed, match="INVALID_ARGUMENT"):
                until_done(lambda: self.world.controller.delete_snapshot(members[0].id))
            for _ in range(2):
                until_done(lambda: self.world.controller.delete_group(group))

    def all_snapshots(self) -> list[Snapshot]:
        return [*self.snapshots, *(each for _, members in self.groups for each in members)]

    def look(self) -> None:
        """Nothing that is listed is half made, and all that was answered is listed."""
        snapshots = until_done(lambda: list(self.world.controller.snapshots()))
        assert all(each.ready_to_use for each in snapshots)
        assert {each.id for each in self.all_snapshots()} <= {each.snapshot_id for each in snapshots}
        volumes = until_done(lambda: list(self.world.controller.volumes(page=3)))
        assert {each.id for each in self.volumes} <= {each.volume.volume_id for each in volumes}

    def compare(self) -> None:
        """Each block that differs in two snapshots of a raw volume is told as changed."""
        found = [each for each in self.all_snapshots() if each.source.is_block]
        pairs = [(one, two) for one in found for two in found if one.source.id == two.source.id and one is not two]
        if not pairs:
            return
        base, target = self.chance.choice(pairs)
        changed = until_done(lambda: self.world.controller.changed(base.id, target.id))
        for slot, (before, after) in enumerate(zip(base.source.content, target.source.content, strict=True)):
            at = slot * 8 * MIB
            if not before & after:
                assert any(begin <= at and at + BLOCK_BYTES <= begin + length for begin, length in changed), (
                    slot,
                    changed,
                )

    def abandon(self) -> None:
        """Begin something and never ask for it again, whether or not it was made."""
        volume, name = self.any_volume(), self.name("abandoned")
        if volume is None:
            return
        controller = self.world.controller
        calls: list[Callable[[], object]] = [
            lambda: controller.cut(name, volume.id),
            lambda: controller.cut_group(name, [volume.id]),
            lambda: controller.create_volume(
                name, required_bytes=volume.size, capabilities=[volume.capability], source=volume.id
            ),
        ]
        self.world.changing.set()
        with contextlib.suppress(CallFailed):
            self.chance.choice(calls)()

    # --- the end ----------------------------------------------------------------------------------------------

    def verify_all(self) -> None:
        for volume in self.volumes:
            if volume.node is None:
                self.up(volume, self.chance.randrange(2))
            self.verify(volume)
        for snapshot in self.all_snapshots():
            self.doing = f"verify {snapshot.id}"
            volume = self.restored(snapshot)
            self.volumes.append(volume)
            self.up(volume, self.chance.randrange(2))
            self.delete_volume(volume)

    def delete_all(self) -> None:
        acts = [*[self.delete_snapshot] * len(self.snapshots), *[self.delete_group] * len(self.groups)]
        acts += [self.delete_volume] * len(self.volumes)
        self.chance.shuffle(acts)
        for act in acts:
            act()


@contextlib.contextmanager
def opened(path: Path, flags: int) -> Iterator[int]:
    descriptor = os.open(path, flags, 0o600)
    try:
        yield descriptor
    finally:
        os.close(descriptor)


def thaw_all(world: World) -> list[str]:
    """Thaw what is frozen, so that the test can end; return it."""
    thaw = ("fsfreeze", "--unfreeze")
    places = mounts_below(world.paths)
    return [each for each in places if not subprocess.run([*thaw, each], check=False, capture_output=True).returncode]


def used_mib(place: Path) -> int:
    os.sync()
    view = os.statvfs(place)
    return (view.f_blocks - view.f_bfree) * view.f_frsize // MIB


@pytest.fixture
def world(tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    place = tmp_path_factory.mktemp("soak")
    other = place / "o"
    other.mkdir()
    flags = ("--client", f"{OTHER_NODE}={other}", "--restart-window", "0.05")
    with mounted(place, size_mib=8192) as pool, running(pool / "d", *flags) as rig:
        yield World(rig, other)


def delete_abandoned(world: World, workers: Sequence[Worker]) -> None:
    """Delete what was made and never asked for again; all else is listed."""
    controller = world.controller
    snapshots = {each.snapshot_id: each for each in controller.snapshots()}
    volumes = {each.volume.volume_id for each in controller.volumes()}
    known = {each.id for worker in workers for each in worker.all_snapshots()}
    known_volumes = {each.id for worker in workers for each in worker.volumes}
    assert known <= snapshots.keys()
    assert known_volumes <= volumes
    for identity in snapshots.keys() - known:
        if group := snapshots[identity].group_snapshot_id:
            controller.delete_group(pb.VolumeGroupSnapshot(group_snapshot_id=group, snapshots=[snapshots[identity]]))
        else:
            controller.delete_snapshot(identity)
    for identity in volumes - known_volumes:
        controller.delete_volume(identity)


def test_nothing_is_lost_half_made_or_left_while_every_role_is_killed(world: World) -> None:
    print(f"seed {SEED}, {SECONDS:g} s")
    chance = random.Random(SEED)
    before = world.files(), used_mib(world.rig.directory), world.controller.free_bytes()
    workers = [Worker(world, number, random.Random(chance.random())) for number in range(WORKERS)]
    threads = [threading.Thread(target=each.run, daemon=True) for each in workers]
    killer = threading.Thread(target=world.kill_until_over, args=(random.Random(chance.random()),))
    for thread in (*threads, killer):
        thread.start()
    world.over.wait(SECONDS)
    world.over.set()
    killer.join()
    for worker, thread in zip(workers, threads, strict=True):
        thread.join(STUCK_AFTER_S)
        assert not thread.is_alive(), f"stuck: {worker.doing}; was frozen: {thaw_all(world)}"
    for worker in workers:
        if worker.failure is not None:
            raise AssertionError(f"worker {worker.number}, {worker.doing}: {worker.failure}") from worker.failure
    print(f"{sum(each.done for each in workers)} steps, {world.kills} kills")
    assert thaw_all(world) == []
    for worker in workers:
        worker.verify_all()
    wait_for(lambda: world.files() == world.listed(), "files for what is listed, and for nothing else", 60)
    delete_abandoned(world, workers)
    for worker in workers:
        worker.delete_all()
    wait_for(lambda: world.files() == before[0], f"no files: {world.files()}", 60)
    assert list(world.controller.volumes()) == []
    assert list(world.controller.snapshots()) == []
    wait_for(lambda: world.rows() == 0, "no rows", 60)
    assert loops_over(world.rig.directory) == []
    assert mounts_below(world.paths) == []
    wait_for(lambda: used_mib(world.rig.directory) <= before[1] + 16, "the space to be free again", 60)
    assert world.controller.free_bytes() == before[2]
