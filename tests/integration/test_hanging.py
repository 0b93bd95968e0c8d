# SPDX-License-Identifier: Apache-2.0
"""A device that hangs, fails or is frozen under a volume: no call hangs with it, nothing written is lost."""

from __future__ import annotations

import contextlib
import fcntl
import os
import subprocess
import threading
import uuid
from collections.abc import Iterator
from pathlib import Path

import pytest

from csi_driver.host import processes
from csi_driver.model import MIB
from csi_driver.rpc.client import CallFailed
from tests.contract.host_machine import Volume as LoopVolume
from tests.contract.host_machine import host_machine
from tests.integration.fault_nodes import ServingNode, Subject, World, until_ok
from tests.integration.rig import digest, fill, wait_for
from tests.integration.stalling_disk import StallingDisk, stalling_disk

pytestmark = [
    pytest.mark.root,
    pytest.mark.skipif(not Path("/dev/fuse").exists(), reason="needs /dev/fuse for a device that can hang"),
]

SIZE = 64 * MIB
SOON_S = 12.0
PATIENCE_S = 3.0
"""Time limit of a request that has to wait until its time is up."""
_FREEZE, _THAW = 0xC0045877, 0xC0045878
_EXT4_SHUTDOWN = 0x8004587D


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    directory = tmp_path_factory.mktemp("h")
    with host_machine(directory) as machine:
        yield World(machine, directory)


@pytest.fixture(scope="module")
def node(world: World) -> Iterator[ServingNode]:
    with contextlib.closing(ServingNode(world.directory, "node.sock", "--reconcile-interval", "0.2")) as node:
        yield node


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[StallingDisk]:
    with stalling_disk(tmp_path, SIZE) as disk:
        yield disk


def over(world: World, disk: StallingDisk) -> Subject:
    """Make a volume whose device hangs when the disk does."""
    name, identity = f"csi-{uuid.uuid4().hex[:8]}", str(uuid.uuid4())
    loop = world.machine.loops.attach(
        disk.path, world.directory / "dev" / name, label=f"{identity}/test", read_only=False
    )
    world.machine.write_status(name, identity, SIZE)
    volume = LoopVolume(name, identity, disk.path, loop)
    subject = Subject(name, "ext4", volume, world.directory / "kubelet", fixed_size_bytes=SIZE)
    subject.staging.mkdir()
    return subject


def state_of(pid: int) -> str:
    """Return the letter by which the kernel shows what a process does (proc_pid_stat(5))."""
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]


def staged_and_published(world: World, node: ServingNode, disk: StallingDisk) -> Subject:
    subject = over(world, disk)
    for verb in ("stage", "publish"):
        assert node.call(verb, subject) == "ok"
    return subject


def ask_for_statistics(node: ServingNode, subject: Subject) -> str:
    """Ask as kubelet does; return the code of the answer."""
    try:
        node.client.stats(subject.volume_id, subject.target)
    except CallFailed as failure:
        return failure.code
    return "OK"


def test_a_device_that_hangs_delays_its_own_unstage_alone_and_loses_nothing(
    world: World, node: ServingNode, disk: StallingDisk
) -> None:
    subject, other = staged_and_published(world, node, disk), world.subject("ext4")
    wanted = fill(subject.target / "data", MIB)
    (subject.target / "data").rename(subject.target / "renamed")  # in the journal alone: umount has to write it
    disk.stall()
    try:
        assert ask_for_statistics(node, subject) != "DEADLINE_EXCEEDED"
        assert node.call("unpublish", subject, timeout_s=SOON_S) == "ok"
        told = node.call("unstage", subject, timeout_s=PATIENCE_S)
        assert told.startswith("DEADLINE_EXCEEDED")
        assert "blocked in" in told
        assert "syscalls.unmount" in told
        assert node.call("unstage", subject, timeout_s=SOON_S).startswith("ABORTED")
        for verb in ("stage", "publish", "unpublish", "unstage"):
            assert node.call(verb, other, timeout_s=4 * SOON_S) == "ok"
        assert node.client.is_ready()
    finally:
        disk.go_on()
    until_ok(node, "unstage", subject)
    for verb in ("stage", "publish"):
        assert node.call(verb, subject) == "ok"
    assert digest(subject.target / "renamed", MIB) == wanted
    for verb in ("unpublish", "unstage"):
        assert node.call(verb, subject) == "ok"
    assert world.machine.loops.detach(subject.loop.loop)
    world.end(other)


def test_a_device_that_hangs_while_it_is_looked_at_is_told_within_the_deadline(
    world: World, node: ServingNode, disk: StallingDisk
) -> None:
    subject = over(world, disk)
    disk.stall()
    try:
        assert node.call("stage", subject, timeout_s=PATIENCE_S).startswith("DEADLINE_EXCEEDED")
        assert node.call("stage", subject, timeout_s=SOON_S).startswith("ABORTED")
        assert node.call("unstage", subject, timeout_s=SOON_S).startswith("ABORTED")
    finally:
        disk.go_on()
    until_ok(node, "stage", subject)
    until_ok(node, "unstage", subject)
    assert world.machine.loops.detach(subject.loop.loop)


def test_a_node_that_hangs_can_be_stopped_and_the_next_one_serves_other_volumes(
    world: World, disk: StallingDisk
) -> None:
    """A thread in the kernel keeps the process as a zombie, whatever anybody does; nothing else of it is left."""
    old = ServingNode(world.directory, "stopped.sock", "--drain-seconds", "1")
    subject, other = over(world, disk), world.subject("ext4")
    disk.stall()
    try:
        assert old.call("stage", subject, timeout_s=PATIENCE_S).startswith("DEADLINE_EXCEEDED")
        old.process.terminate()
        wait_for(lambda: state_of(old.process.pid) in "ZX", "the process to end as far as the kernel lets it", 30)
        with contextlib.closing(ServingNode(world.directory, "stopped.sock")) as new:
            for verb in ("stage", "publish", "unpublish", "unstage"):
                assert new.call(verb, other, timeout_s=4 * SOON_S) == "ok"
    finally:
        disk.go_on()
        old.close()
    world.end(other)
    assert world.machine.loops.detach(subject.loop.loop)


def test_a_device_without_io_is_not_opened(world: World, node: ServingNode, disk: StallingDisk) -> None:
    """A reader that was killed while I/O was held has locked the device: every open of it hangs, for as long."""
    subject = over(world, disk)
    disk.stall()
    try:
        with subprocess.Popen(
            ("dd", f"if={subject.loop.loop.node}", "of=/dev/null", "count=1"), stderr=subprocess.DEVNULL
        ) as reader:
            wait_for(lambda: state_of(reader.pid) == "D", "a buffered reader to wait for its device", 30)
            reader.kill()
            lost = {"status": "Live, no IO, partial Error (storage lost)", "dbg": "0x2a1"}
            world.machine.write_status(subject.name, subject.loop.uuid, SIZE, **lost)
            files = world.directory / "proc" / "volumes" / subject.name
            for verb, opens, told, timeout_s in (
                ("stage", 0, "has not enabled I/O", PATIENCE_S),
                ("publish", 0, "FAILED_PRECONDITION", SOON_S),
                ("unstage", 1, "is still open", PATIENCE_S),
                ("unstage", 0, "ok", SOON_S),
            ):
                (files / "client_processes").write_text(
                    f"Processes holding handle:\nNum Processes={opens}, opens={opens}\n"
                )
                assert told in node.call(verb, subject, timeout_s=timeout_s)
            (files / "client_processes").unlink()
            disk.go_on()
    finally:
        disk.go_on()
    world.machine.write_status(subject.name, subject.loop.uuid, SIZE)
    until_ok(node, "stage", subject)
    until_ok(node, "unstage", subject, passing=("ABORTED", "UNAVAILABLE"))
    assert world.machine.loops.detach(subject.loop.loop)


def test_a_tool_that_reads_a_dead_device_is_left_alone_and_locks_nobody_out(world: World, disk: StallingDisk) -> None:
    subject = over(world, disk)
    argv = ("blkid", "-p", str(subject.loop.loop.node))
    answers: list[int] = []
    disk.stall()
    try:
        reader = threading.Thread(
            target=lambda: answers.append(processes.run(argv, timeout_s=0.2, accept=(0, 2), on_device=True).status)
        )
        reader.start()
        reader.join(1.0)
        assert reader.is_alive()
        opener = threading.Thread(target=lambda: os.close(os.open(argv[-1], os.O_RDONLY)))
        opener.start()
        opener.join(10)
        assert not opener.is_alive()
    finally:
        disk.go_on()
    reader.join(30)
    assert answers == [2]
    assert world.machine.loops.detach(subject.loop.loop)


def test_a_device_that_fails_every_write_is_taken_back(world: World, node: ServingNode, disk: StallingDisk) -> None:
    subject = staged_and_published(world, node, disk)
    fill(subject.target / "data", MIB)
    (subject.target / "data").rename(subject.target / "renamed")
    disk.die()
    assert ask_for_statistics(node, subject) != "DEADLINE_EXCEEDED"
    for verb in ("unpublish", "unstage"):
        assert node.call(verb, subject, timeout_s=4 * SOON_S) == "ok"
    assert world.mounted(subject.target) == world.mounted(subject.staging) == 0
    assert world.machine.loops.detach(subject.loop.loop)


def test_a_filesystem_that_was_shut_down_is_taken_back(world: World, node: ServingNode) -> None:
    subject = world.subject("ext4")
    for verb in ("stage", "publish"):
        assert node.call(verb, subject) == "ok"
    fd = os.open(subject.target, os.O_RDONLY)
    fcntl.ioctl(fd, _EXT4_SHUTDOWN, (2).to_bytes(4, "little"))
    os.close(fd)
    assert ask_for_statistics(node, subject) != "DEADLINE_EXCEEDED"
    for verb in ("unpublish", "unstage"):
        assert node.call(verb, subject) == "ok"
    world.end(subject)


def test_a_frozen_filesystem_is_answered_for_and_taken_back_when_it_thaws(world: World, node: ServingNode) -> None:
    subject = world.subject("ext4")
    for verb in ("stage", "publish"):
        assert node.call(verb, subject) == "ok"
    fd = os.open(subject.staging, os.O_RDONLY)
    fcntl.ioctl(fd, _FREEZE, 0)
    try:
        assert ask_for_statistics(node, subject) != "DEADLINE_EXCEEDED"
        assert node.call("unpublish", subject, timeout_s=SOON_S) == "ok"
    finally:
        fcntl.ioctl(fd, _THAW, 0)
        os.close(fd)
    until_ok(node, "unstage", subject)
    world.end(subject)
