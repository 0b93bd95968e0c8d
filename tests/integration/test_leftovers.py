# SPDX-License-Identifier: Apache-2.0
"""Cleanup of a node by the program: kubelet's lost file, dead devices, readers, stacked mounts."""

from __future__ import annotations

import contextlib
import hashlib
import os
import subprocess
from collections.abc import Iterator

import pytest

from csi_driver.deadline import Deadline
from csi_driver.model import DEFAULT_DRIVER_NAME, MIB
from tests.contract.host_machine import host_machine
from tests.integration.fault_nodes import ServingNode, Subject, World
from tests.integration.rig import digest, fill, findmnt
from tests.reflink_pool import mount_file

pytestmark = pytest.mark.root

INTERVAL_S = 0.2


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    directory = tmp_path_factory.mktemp("l")
    with host_machine(directory) as machine:
        yield World(machine, directory)


@pytest.fixture(scope="module")
def node(world: World) -> Iterator[ServingNode]:
    with contextlib.closing(ServingNode(world.directory, "node.sock", "--reconcile-interval", str(INTERVAL_S))) as node:
        yield node


def kubelets(world: World, kind: str = "ext4", **more: object) -> Subject:
    """Make a volume with kubelet's directory layout and records."""
    number = f"{kind}-{os.urandom(4).hex()}"
    plugins = world.directory / "kubelet" / "plugins/kubernetes.io/csi"
    staging = plugins / DEFAULT_DRIVER_NAME / hashlib.sha256(number.encode()).hexdigest() / "globalmount"
    target = world.directory / "kubelet/pods/1/volumes/kubernetes.io~csi" / number / "mount"
    if kind == "block":
        staging = plugins / "volumeDevices/staging" / number
        target = plugins / "volumeDevices/publish" / number / "1"
        (plugins / "volumeDevices" / number / "data").mkdir(parents=True)
        (plugins / "volumeDevices" / number / "data" / "vol_data.json").write_text("{}")
    subject = world.subject(kind, staging_path=staging, target_path=target, **more)
    target.parent.mkdir(parents=True)
    for record in (staging.parent, target.parent):
        (record / "vol_data.json").write_text("{}")
    return subject


def wait_for(ready: object, what: str) -> None:
    assert callable(ready)
    assert Deadline.after(180).wait_until(lambda: bool(ready()), most_s=0.05), what


def let_it_look_again() -> None:
    """Wait for three more sweeps, after which untouched objects stay."""
    Deadline.after(3 * INTERVAL_S).wait_until(lambda: False)


def test_a_staging_that_kubelet_forgot_is_unmounted_and_said_so(world: World, node: ServingNode) -> None:
    forgotten, kept, not_kubelets = kubelets(world), kubelets(world), world.subject("ext4")
    assert node.call("stage", not_kubelets) == "ok"
    for subject in (forgotten, kept):
        assert node.call("stage", subject) == "ok"
        (subject.staging.parent / "vol_data.json").unlink()
    assert node.call("publish", kept) == "ok"
    wanted = fill(kept.target / "data", MIB)
    wait_for(lambda: findmnt(forgotten.staging) is None, "the forgotten staging to be unmounted")
    assert str(forgotten.staging) in node.log.read_text()
    let_it_look_again()
    assert digest(kept.staging / "data", MIB) == wanted
    world.end(forgotten)
    assert node.call("unstage", not_kubelets) == "ok"
    world.end(not_kubelets)
    for verb in ("unpublish", "unstage"):
        assert node.call(verb, kept) == "ok"
    world.end(kept)


def test_mounts_that_are_not_ours_are_never_touched(world: World, node: ServingNode) -> None:
    """A foreign filesystem, a directory of the host, and a foreign loop device, at the places of ours."""
    ours = kubelets(world)
    foreign, bound, loop = (kubelets(world) for _ in range(3))
    other = world.directory / "other"
    other.mkdir(exist_ok=True)
    image = world.directory / "foreign.img"
    with image.open("wb") as file:
        file.truncate(64 * MIB)
    subprocess.run(["mkfs.ext4", "-q", image], check=True)
    mounted = [foreign.staging, bound.staging, loop.staging]
    subprocess.run(["mount", "-t", "tmpfs", "x", foreign.staging], check=True)
    subprocess.run(["mount", "--bind", other, bound.staging], check=True)
    mount_file(image, loop.staging)
    try:
        assert node.call("stage", ours) == "ok"
        for subject in (ours, foreign, bound, loop):
            (subject.staging.parent / "vol_data.json").unlink()
        wait_for(lambda: findmnt(ours.staging) is None, "ours to be unmounted")
        let_it_look_again()
        assert all(findmnt(path) is not None for path in mounted)
    finally:
        for path in mounted:
            subprocess.run(["umount", path], check=False)
    for subject in (ours, foreign, bound, loop):
        world.end(subject)


def test_a_reader_that_a_crash_left_is_taken_down(world: World, node: ServingNode) -> None:
    subject = kubelets(world, "block", read_only=True)
    assert node.call("stage", subject) == "ok"
    world.plan("mounts.bind:before", "kill")
    assert node.call("publish", subject) == "killed"
    assert world.readers_over(subject) == 1
    node.process.kill()
    node.process.wait()
    node.start("--reconcile-interval", str(INTERVAL_S))
    wait_for(lambda: world.readers_over(subject) == 0, "the reader to be taken down")
    for verb in ("unpublish", "unstage"):
        assert node.call(verb, subject) == "ok"
    world.end(subject)


def test_a_dead_device_that_kubelet_forgot_is_taken_off(world: World, node: ServingNode) -> None:
    subject = kubelets(world, "block")
    for verb in ("stage", "publish"):
        assert node.call(verb, subject) == "ok"
    assert world.machine.loops.detach(subject.loop.loop)
    told = "a mount of a device that is gone or was taken from this node; kubelet will unmount it"
    # Not yet while another program of this machine has a loop device of the same number.
    wait_for(lambda: told in node.log.read_text(), "the dead mount to be seen")
    assert world.mounted(subject.target) == 1
    plugins = world.directory / "kubelet" / "plugins/kubernetes.io/csi"
    (plugins / "volumeDevices" / subject.target.parent.name / "data" / "vol_data.json").unlink()
    wait_for(lambda: world.mounted(subject.target) == 0, "the unmount of the dead mount")
    for verb in ("unpublish", "unstage"):
        assert node.call(verb, subject) == "ok"
    assert not subject.target.exists()
    subject.loop.file.unlink()


# --- kubelet's restarts and older drivers -----------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["ext4", "block"])
def test_a_kubelet_that_starts_again_and_republishes_leaves_one_mount(
    world: World, node: ServingNode, kind: str
) -> None:
    subject = kubelets(world, kind)
    for verb in ("stage", "publish", "stage", "publish", "publish"):
        assert node.call(verb, subject) == "ok"
    assert world.mounted(subject.target) == 1
    for verb in ("unpublish", "unstage"):
        assert node.call(verb, subject) == "ok"
    world.end(subject)


def test_stacked_mounts_of_older_drivers_are_taken_off_and_never_walked_into(world: World, node: ServingNode) -> None:
    subject = kubelets(world)
    for verb in ("stage", "publish"):
        assert node.call(verb, subject) == "ok"
    wanted = fill(subject.target / "data", MIB)
    for _ in range(3):
        subprocess.run(["mount", "--bind", subject.staging, subject.target], check=True)
        subprocess.run(["mount", "--bind", subject.staging, subject.staging], check=True)
    assert world.mounted(subject.target) == 4
    assert node.call("unpublish", subject) == "ok"
    assert world.mounted(subject.target) == 0
    assert not subject.target.exists()
    assert digest(subject.staging / "data", MIB) == wanted
    assert node.call("unstage", subject) == "ok"
    assert world.mounted(subject.staging) == 0
    assert list(subject.staging.iterdir()) == []
    for verb in ("stage", "publish"):
        assert node.call(verb, subject) == "ok"
    assert digest(subject.target / "data", MIB) == wanted
    for verb in ("unpublish", "unstage"):
        assert node.call(verb, subject) == "ok"
    world.end(subject)


def test_data_that_lies_under_a_stale_mount_is_never_removed(world: World, node: ServingNode) -> None:
    subject = kubelets(world)
    subject.target.mkdir()
    precious = subject.target / "precious"
    precious.write_text("x")
    for verb in ("stage", "publish"):
        assert node.call(verb, subject) == "ok"
    assert node.call("unpublish", subject).startswith("FAILED_PRECONDITION")
    assert precious.read_text() == "x"
    precious.unlink()
    for verb in ("unpublish", "unstage"):
        assert node.call(verb, subject) == "ok"
    world.end(subject)


def test_after_a_reboot_the_same_calls_bring_everything_back(world: World, node: ServingNode) -> None:
    """Mounts are gone, directories, records and the attachment are still there; kubelet calls stage and publish."""
    subject = kubelets(world)
    for verb in ("stage", "publish"):
        assert node.call(verb, subject) == "ok"
    wanted = fill(subject.target / "data", MIB)
    node.process.kill()
    node.process.wait()
    for path in (subject.target, subject.staging):
        subprocess.run(["umount", path], check=True)
    assert world.machine.loops.detach(subject.loop.loop)
    subject.loop.loop = world.machine.loops.attach(
        subject.loop.file, world.directory / "dev" / subject.name, label=f"{subject.loop.uuid}/test", read_only=False
    )
    node.start("--reconcile-interval", str(INTERVAL_S))
    assert subject.target.is_dir()
    for verb in ("stage", "publish"):
        assert node.call(verb, subject) == "ok"
    assert digest(subject.target / "data", MIB) == wanted
    for verb in ("unpublish", "unstage"):
        assert node.call(verb, subject) == "ok"
    world.end(subject)
