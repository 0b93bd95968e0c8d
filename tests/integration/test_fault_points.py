# SPDX-License-Identifier: Apache-2.0
"""kill -9, an I/O error and an expired deadline at every point between two effects of the node's calls.

In the gate each kill happens to a process that makes one call (`ForkedNode`); with NVMESH_CSI_ALL_FAULTS=1 the whole
runs over the program itself as well, which is started again after every kill.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import threading
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import pytest

from csi_driver.model import MIB
from csi_driver.publish_context import Encryption, History
from tests.contract.host_machine import host_machine
from tests.faults import points
from tests.integration.fault_nodes import OPPOSITES, ForkedNode, Node, ServingNode, Subject, World, until_ok
from tests.integration.rig import digest, fill

pytestmark = pytest.mark.root

ALL = os.environ.get("NVMESH_CSI_ALL_FAULTS") == "1"


@dataclass(frozen=True, slots=True)
class Story:
    """The life of one kind of volume, and the points that its requests pass. A fault is injected at each in turn."""

    kind: str
    settings: Mapping[str, object]
    verbs: tuple[str, ...]
    passes: frozenset[str]
    tested: tuple[str, ...] = ("",)
    """Prefixes of the points to test; the others are tested in another story, or with NVMESH_CSI_ALL_FAULTS=1."""


def effects(names: str) -> frozenset[str]:
    """Split names of effects."""
    return frozenset(names.split())


UP, DOWN = ("stage", "publish"), ("unpublish", "unstage")
STORIES = {
    "ext4": Story(
        "ext4",
        {"flags": ("nvmesh:chmod=0750",)},
        (*UP, "write", *DOWN, "reattach", "grow", *UP, "read", *DOWN),
        effects(
            "records.write filesystems.make mounts.mount paths.set_mode paths.make_directory mounts.bind "
            "mounts.unmount paths.remove filesystems.check filesystems.grow_unmounted"
        ),
    ),
    "xfs": Story(
        "xfs",
        {"format_allowed": True},
        (*UP, "write", "grow", "expand", "read", *DOWN, *UP, "read", *DOWN),
        effects(
            "records.write filesystems.wipe filesystems.make mounts.mount paths.make_directory mounts.bind "
            "mounts.unmount paths.remove filesystems.grow_mounted"
        ),
        ("filesystems.",),
    ),
    "copy of a btrfs": Story(
        "btrfs",
        {"is_copy": True, "history": History.ATTACHED},
        (*UP, "write", *DOWN, *UP, "read", *DOWN),
        effects(
            "filesystems.change_btrfs_uuid records.write mounts.mount paths.make_directory "
            "mounts.bind mounts.unmount paths.remove"
        ),
        ("filesystems.change_btrfs_uuid",),
    ),
    "block": Story(
        "block",
        {},
        (*UP, "write", *DOWN, *UP, "read", *DOWN),
        effects("records.write paths.make_file mounts.bind mounts.unmount paths.remove"),
    ),
    "block read-only": Story(
        "block",
        {"read_only": True},
        (*UP, *DOWN),
        effects(
            "paths.make_file read_only_devices.over mounts.bind mounts.unmount read_only_devices.release paths.remove"
        ),
    ),
    "attached read-only": Story(
        "block",
        {"attached_read_only": True, "read_only": True},
        (*UP, *DOWN),
        effects("devices.set_read_only paths.make_file mounts.bind mounts.unmount paths.remove"),
    ),
}
FAST = {"encryption/pbkdf": "pbkdf2", "encryption/pbkdfIterations": "1000"}
ENCRYPTED = {"encryption": Encryption.LUKS, "secrets": {"passphrase": "correct horse"}, "parameters": FAST}
ENCRYPTED_STORIES = {
    "encrypted ext4": Story(
        "ext4",
        ENCRYPTED,
        (*UP, "write", *DOWN, "reattach", "grow", "rekey", *UP, "read", *DOWN),
        effects(
            "records.write records.remove encryption.format encryption.open encryption.add_key encryption.remove_key "
            "encryption.close filesystems.make filesystems.check filesystems.grow_unmounted mounts.mount "
            "paths.make_directory mounts.bind mounts.unmount paths.remove"
        ),
        ("encryption.format", "encryption.add_key", "encryption.remove_key", "filesystems.make"),
    ),
    "encrypted xfs": Story(
        "xfs",
        ENCRYPTED,
        (*UP, "write", "grow", "expand", "read", *DOWN, *UP, "read", *DOWN),
        effects(
            "records.write records.remove encryption.format encryption.open encryption.resize encryption.close "
            "filesystems.make filesystems.grow_mounted mounts.mount paths.make_directory "
            "mounts.bind mounts.unmount paths.remove"
        ),
        ("encryption.resize",),
    ),
    "encrypted block": Story(
        "block",
        ENCRYPTED,
        (*UP, "write", *DOWN, *UP, "read", *DOWN),
        effects(
            "records.write records.remove encryption.format encryption.open encryption.close paths.make_file "
            "mounts.bind mounts.unmount paths.remove"
        ),
        ("encryption.open", "encryption.close"),
    ),
}
"""Tested by `tests/vm/test_encrypted_faults.py`: they need a kernel with device-mapper."""
CONNECTIONS = {"devices.connect", "devices.disconnect", "devices.remove_orphan"}
"""The fake of the kernel's NVMe dies with its process: these kills are in test_nvme_tcp.py and test_connections.py."""
NOT_ON_THE_WAY = {"read_only_devices.release_left_over", "encryption.resume", *CONNECTIONS}
"""Passed only by a request that repairs the leftovers of a crash: `test_a_repairing_request_may_be_killed_as_well`,
`tests/vm/test_encrypted_volumes.py`."""


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    directory = tmp_path_factory.mktemp("f")
    with host_machine(directory) as machine:
        yield World(machine, directory)


@pytest.fixture(scope="module")
def forked(world: World) -> Iterator[ForkedNode]:
    node = ForkedNode(world.directory)
    yield node
    node.close()


@pytest.fixture(scope="module")
def serving(world: World) -> Iterator[ServingNode]:
    node = ServingNode(world.directory)
    yield node
    node.close()


class Life:
    """Sends the requests of a story for one volume and checks the machine after each."""

    def __init__(self, world: World, node: Node, story: Story) -> None:
        self.world, self.node, self.story = world, node, story
        self.subject: Subject = world.subject(story.kind, **story.settings)
        self._wanted = ""

    def do(self, verb: str) -> None:
        match verb:
            case "write":
                self._wanted = fill(self._data(), MIB)
            case "read":
                assert digest(self._data(), MIB) == self._wanted
            case "grow":
                size = self.subject.loop.file.stat().st_size + 64 * MIB
                self.world.machine.grow(self.subject.loop, size)
            case "reattach":
                self.subject.reattach()
            case "rekey":
                old = self.subject.secrets["passphrase"]
                self.subject.secrets = {"passphrase": "new passphrase", "previousPassphrase": old}
            case _:
                assert self.node.call(verb, self.subject) == "ok", verb
                self.check(verb)

    def _data(self) -> Path:
        return self.subject.target if self.subject.kind == "block" else self.subject.target / "data"

    def check(self, verb: str) -> None:
        """Compare the machine with the expected result of the request."""
        world, subject = self.world, self.subject
        if verb in ("stage", "unstage"):
            assert world.mounted(subject.staging) == (verb == "stage" and subject.kind != "block")
        if verb in ("publish", "unpublish"):
            assert world.mounted(subject.target) == (verb == "publish")
            needs_reader = verb == "publish" and subject.read_only and not subject.attached_read_only
            assert world.readers_over(subject) == needs_reader
        if verb == "unpublish":
            assert not subject.target.exists()
        if verb == "unstage":
            assert list(subject.staging.iterdir()) == []
        if verb == "publish" and self._wanted:
            self.do("read")

    def end(self) -> None:
        """Unpublish and unstage the volume; assert that nothing is left of it."""
        for verb in DOWN:
            self.do(verb)
        # The record that the volume was used is never removed.
        marks = [] if self.subject.read_only else [f"{self.subject.loop.uuid}.mark"]
        assert [mark for mark in self.world.marks() if mark.startswith(self.subject.loop.uuid)] == marks
        self.world.end(self.subject)


def points_by_step(world: World, node: Node, story: Story) -> list[tuple[int, str]]:
    """Return every (step, point) that the story passes without faults, each point of a step once."""
    found: list[tuple[int, str]] = []
    life = Life(world, node, story)
    world.traced()
    for number, verb in enumerate(story.verbs):
        life.do(verb)
        found += [(number, point) for point in dict.fromkeys(world.traced())]
    life.end()
    world.traced()
    return found


def inject_at_each(world: World, node: Node, story: Story, action: str, ended: Callable[[str], bool]) -> int:
    """Inject the action at each point of the story, each time for a new volume; return the number of points."""
    steps = points_by_step(world, node, story)
    if not ALL:  # once each, in the first call of its kind that passes it
        once = {(story.verbs[number], point): number for number, point in reversed(steps)}
        steps = [(number, point) for (_, point), number in once.items() if point.startswith(story.tested)]
    injected = sorted(steps)
    for number, point in injected:
        life = Life(world, node, story)
        for verb in story.verbs[:number]:
            life.do(verb)
        verb = story.verbs[number]
        world.plan(point, action)
        outcome = node.call(verb, life.subject)
        assert ended(outcome), f"{verb} at {point}: {outcome}"
        assert not world.planned(), f"{verb} did not meet {point}"
        life.do(verb)
        opposite = OPPOSITES.get(verb)
        if opposite is not None:
            life.do(opposite)
            # Inject it again, and send the opposite request at once.
            world.plan(point, action)
            node.call(verb, life.subject)
            world.cancel()
            life.do(opposite)
            life.do(verb)
        for rest in story.verbs[number + 1 :]:
            life.do(rest)
        life.end()
    return len(injected)


def require_points(world: World, node: Node, story: Story) -> None:
    passed = {point.partition(":")[0] for _, point in points_by_step(world, node, story)}
    assert passed == story.passes


def test_every_point_is_passed_by_some_story() -> None:
    known = {point.partition(":")[0] for point in points()}
    told = STORIES | ENCRYPTED_STORIES
    assert set().union(*(story.passes for story in told.values())) | NOT_ON_THE_WAY == known


@pytest.mark.parametrize("name", STORIES)
def test_the_requests_pass_the_declared_points(world: World, forked: ForkedNode, name: str) -> None:
    require_points(world, forked, STORIES[name])


@pytest.mark.parametrize("name", STORIES)
def test_a_node_killed_at_any_point_continues_or_undoes(world: World, forked: ForkedNode, name: str) -> None:
    assert inject_at_each(world, forked, STORIES[name], "kill", lambda outcome: outcome == "killed")


@pytest.mark.parametrize("name", STORIES if ALL else ["block read-only"])
def test_an_error_at_any_point_is_returned_and_a_retry_succeeds(world: World, forked: ForkedNode, name: str) -> None:
    assert inject_at_each(world, forked, STORIES[name], "fail", lambda outcome: outcome.startswith("SystemCallFailed"))


@pytest.mark.skipif(not ALL, reason="takes minutes: NVMESH_CSI_ALL_FAULTS=1 runs it")
@pytest.mark.parametrize("action", ["kill", "fail"])
@pytest.mark.parametrize("name", STORIES)
def test_the_program_itself_fails_at_any_point(world: World, serving: ServingNode, name: str, action: str) -> None:
    outcome = {"kill": "killed", "fail": "INTERNAL"}[action]
    assert inject_at_each(world, serving, STORIES[name], action, lambda ended: ended.startswith(outcome))


@pytest.mark.parametrize("action", ["kill", "fail"])
@pytest.mark.parametrize("when", ["before", "after"])
def test_a_repairing_request_may_be_killed_as_well(world: World, forked: ForkedNode, when: str, action: str) -> None:
    life = Life(world, forked, STORIES["block read-only"])
    life.do("stage")
    world.plan("mounts.bind:before", "kill")
    assert forked.call("publish", life.subject) == "killed"
    assert world.readers_over(life.subject) == 1
    world.plan(f"read_only_devices.release_left_over:{when}", action)
    assert forked.call("unpublish", life.subject) != "ok"
    assert not world.planned()
    life.do("unpublish")
    life.do("publish")
    life.end()


# --- deadlines ------------------------------------------------------------------------------------------------


DEADLINE_STORIES = {
    "ext4": (("stage", "records.write"), ("stage", "filesystems.make"), ("stage", "mounts.mount"),
             ("publish", "mounts.bind"), ("unpublish", "mounts.unmount"), ("unstage", "mounts.unmount")),
    "block read-only": (("publish", "read_only_devices.over"), ("unpublish", "read_only_devices.release")),
}  # fmt: skip
"""Tested in the gate; the others with NVMESH_CSI_ALL_FAULTS=1."""


@pytest.mark.parametrize("name", STORIES if ALL else DEADLINE_STORIES)
def test_work_continues_under_the_lock_after_its_deadline(world: World, serving: ServingNode, name: str) -> None:
    story = STORIES[name]
    steps = points_by_step(world, serving, story)
    tried = [(number, point) for number, point in steps if ALL or _is_tried(name, story, number, point)]
    for number, point in tried:
        life = Life(world, serving, story)
        for verb in story.verbs[:number]:
            life.do(verb)
        outlive(world, serving, life.subject, story.verbs[number], point)
        life.check(story.verbs[number])
        for rest in story.verbs[number + 1 :]:
            life.do(rest)
        life.end()
    assert tried


def _is_tried(name: str, story: Story, number: int, point: str) -> bool:
    effect, _, when = point.partition(":")
    first = story.verbs.index(story.verbs[number]) == number
    return first and when == "before" and (story.verbs[number], effect) in DEADLINE_STORIES[name]


def outlive(world: World, node: ServingNode, subject: Subject, verb: str, point: str) -> None:
    """Let a deadline pass while the work stalls at a point; a retry is ABORTED until the work is done."""
    release = world.directory / "faults" / "release"
    release.unlink(missing_ok=True)
    world.plan(point, f"stall {release}")
    outcomes = []
    while world.planned():
        # Half a second of the caller's time is kept for the answer: a machine under load needs more than one call.
        outcomes.append(node.call(verb, subject, timeout_s=1.0 if verb == "stage" else 0.2))
    assert any(outcome.startswith("DEADLINE_EXCEEDED") for outcome in outcomes), outcomes
    assert node.call(verb, subject).startswith("ABORTED")
    opposite = OPPOSITES.get(verb)
    if opposite is not None:
        assert node.call(opposite, subject).startswith("ABORTED")
    release.touch()
    until_ok(node, verb, subject)


# --- SIGTERM --------------------------------------------------------------------------------------------------


@pytest.fixture
def own(world: World) -> Iterator[ServingNode]:
    """A node that the test may end."""
    with contextlib.closing(ServingNode(world.directory, "own.sock")) as node:
        yield node


def test_sigterm_lets_running_work_finish(world: World, forked: ForkedNode, own: ServingNode) -> None:
    life = Life(world, forked, STORIES["ext4"])
    release = world.directory / "faults" / "release"
    release.unlink(missing_ok=True)
    world.plan("filesystems.make:before", f"stall {release}")
    outcomes: list[str] = []
    worker = threading.Thread(target=lambda: outcomes.append(own.call("stage", life.subject)))
    worker.start()
    world.wait_for_trigger()
    own.process.terminate()
    with pytest.raises(subprocess.TimeoutExpired):
        own.process.wait(0.5)
    release.touch()
    assert own.process.wait(180) == 0
    worker.join()
    assert outcomes == ["ok"]
    life.check("stage")
    life.end()


def test_requests_are_served_during_the_pre_shutdown_delay(own: ServingNode) -> None:
    own.process.terminate()
    own.process.wait(180)
    own.start("--pre-shutdown-delay", "60")
    own.process.terminate()
    with pytest.raises(subprocess.TimeoutExpired):
        own.process.wait(0.3)
    assert own.client.is_ready()
    own.process.terminate()
    assert own.process.wait(120) == 128 + signal.SIGTERM


def test_a_second_sigterm_ends_it_at_once_and_the_next_start_continues(
    world: World, forked: ForkedNode, own: ServingNode
) -> None:
    life = Life(world, forked, STORIES["ext4"])
    world.plan("filesystems.make:after", f"stall {world.directory / 'never'}")
    first = own.process
    worker = threading.Thread(target=own.call, args=("stage", life.subject))
    worker.start()
    world.wait_for_trigger()
    first.terminate()
    with pytest.raises(subprocess.TimeoutExpired):
        first.wait(0.3)
    first.terminate()
    assert first.wait(120) == 128 + signal.SIGTERM
    worker.join()
    life.do("stage")
    life.end()


def test_work_that_outlasts_the_drain_is_completed_after_the_next_start(
    world: World, forked: ForkedNode, own: ServingNode
) -> None:
    own.process.terminate()
    own.process.wait(180)
    own.start("--drain-seconds", "0.2")
    life = Life(world, forked, STORIES["ext4"])
    world.plan("mounts.mount:before", f"stall {world.directory / 'never'}")
    first = own.process
    worker = threading.Thread(target=own.call, args=("stage", life.subject))
    worker.start()
    world.wait_for_trigger()
    first.terminate()
    assert first.wait(60) == 0
    worker.join()
    life.do("stage")
    life.end()
