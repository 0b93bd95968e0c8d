# SPDX-License-Identifier: Apache-2.0
"""Publications where kubelet's directory is not a plain one, and of filesystems that died: on real mounts."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from csi_driver.deadline import Deadline
from csi_driver.errors import InvalidField, PreconditionFailed
from csi_driver.host.mount_table import read_table
from csi_driver.model import MIB, AccessMode, CapacityRange
from csi_driver.node import NodeExpandRequest
from tests.contract.host_machine import HostMachine, Volume, host_machine, mounts_below, shell
from tests.contract.test_host_probes import shut_down
from tests.integration.real_node import SIZES, RealNode, volume_id

pytestmark = pytest.mark.root

SINGLE = AccessMode.SINGLE_NODE_SINGLE_WRITER


@pytest.fixture
def machine(tmp_path: Path) -> Iterator[HostMachine]:
    with host_machine(tmp_path) as made:
        yield made


@pytest.fixture
def node(machine: HostMachine) -> RealNode:
    return RealNode(machine)


@pytest.fixture
def volume(machine: HostMachine) -> Volume:
    return machine.volume(size_bytes=SIZES["ext4"])


def share_directory(node: RealNode) -> Path:
    """Let the node's directory be a shared bind mount of one that lies on a shared mount; return that one."""
    disk = node.machine.place("disk")
    shell("mount", "--bind", str(disk), str(disk))
    shell("mount", "--make-shared", str(disk))
    elsewhere = disk / "kubelet"
    elsewhere.mkdir()
    shell("mount", "--bind", str(elsewhere), str(node.root))
    return elsewhere


def test_a_single_writer_is_published_in_a_shared_bind_mounted_kubelet_directory(
    node: RealNode, volume: Volume
) -> None:
    twin = share_directory(node)
    staging = node.stage(volume, mode=SINGLE)
    target = node.publish(volume, mode=SINGLE)
    node.publish(volume, mode=SINGLE)
    assert set(map(Path, mounts_below(twin))) == {twin / staging.name, twin / target.name}
    (target / "data").write_text("of the pod")
    with pytest.raises(PreconditionFailed, match="single-writer"):
        node.publish(volume, "pod-2", mode=SINGLE)
    node.unpublish(volume)
    node.publish(volume, "pod-2", mode=SINGLE)
    node.unpublish(volume, "pod-2")
    node.unstage(volume)
    assert mounts_below(twin) == []


def test_a_pod_of_before_its_directory_became_a_link_ends(node: RealNode, volume: Volume) -> None:
    pods, moved = node.root / "pods", node.root / "disk"
    pods.mkdir()
    node.stage(volume)
    target = node.publish(volume, "pods/1")
    pods.rename(moved)
    pods.symlink_to(moved)
    assert (target.is_mount(), (moved / "1").is_mount()) == (True, True)
    with pytest.raises(InvalidField, match=f"{pods} is a link to {moved}"):
        node.publish(volume, "pods/2")
    node.unpublish(volume, "pods/1")
    assert list(moved.iterdir()) == []
    node.unstage(volume)


# --- filesystems that died ---


def meet_an_error(staging: Path) -> None:
    """Let ext4 find an error, as errors=remount-ro was asked for; it counts it a moment later."""
    device = shell("findmnt", "-no", "SOURCE", str(staging)).strip()
    number = os.stat(staging).st_dev
    name = Path(f"/sys/dev/block/{os.major(number)}:{os.minor(number)}").resolve().name
    Path("/sys/fs/ext4", name, "trigger_fs_error").write_text(f"made by a test on {device}")
    counted = Path("/sys/fs/ext4", name, "errors_count")
    assert Deadline.after(120).wait_until(lambda: int(counted.read_text()) > 0, most_s=0.01)


DEATHS = [("ext4", meet_an_error), ("ext4", shut_down), ("xfs", shut_down)]


def stage_with_data(node: RealNode, machine: HostMachine, fs_type: str) -> tuple[Volume, Path]:
    if fs_type not in machine.filesystems.supported():
        pytest.skip(f"mkfs.{fs_type} is not installed")
    volume = machine.volume(size_bytes=SIZES[fs_type])
    flags = ("errors=remount-ro",) if fs_type == "ext4" else ()
    staging = node.stage(volume, fs_type, flags=flags)
    (staging / "data").write_text("of the pod")
    shell("sync", "--file-system", str(staging))
    return volume, staging


@pytest.mark.parametrize(("fs_type", "die"), DEATHS)
def test_a_dead_filesystem_is_not_published_and_a_stage_makes_it_live_again(
    node: RealNode, machine: HostMachine, fs_type: str, die: Callable[[Path], None]
) -> None:
    volume, staging = stage_with_data(node, machine, fs_type)
    target = node.publish(volume, fs_type=fs_type)
    die(staging)
    flags = ("errors=remount-ro",) if fs_type == "ext4" else ()
    before = [entry for entry in read_table() if entry.path in (staging, target)]
    node.stage(volume, fs_type, flags=flags)
    # In the order in which they were made: a pod has the filesystem, and nothing is mounted anew.
    assert [entry for entry in read_table() if entry.path in (staging, target)] == before
    with pytest.raises(PreconditionFailed, match=f"its {fs_type} .* after an error; .* delete these pods"):
        node.publish(volume, "pod-2", fs_type)
    node.publish(volume, fs_type=fs_type)
    node.unpublish(volume)
    node.stage(volume, fs_type, flags=flags)
    target = node.publish(volume, fs_type=fs_type)
    assert (target / "data").read_text() == "of the pod"
    (target / "more").write_text("written")
    node.unpublish(volume)
    node.unstage(volume)
    if fs_type == "ext4":
        shell("e2fsck", "-f", "-n", str(volume.loop.node))


def test_a_dead_filesystem_is_remounted_in_a_shared_kubelet_directory(node: RealNode, machine: HostMachine) -> None:
    share_directory(node)
    volume, staging = stage_with_data(node, machine, "ext4")
    shut_down(staging)
    node.stage(volume, flags=("errors=remount-ro",))
    (staging / "more").write_text("written")
    node.unstage(volume)


def test_a_filesystem_that_turned_read_only_is_published_to_a_reader(node: RealNode, machine: HostMachine) -> None:
    volume, staging = stage_with_data(node, machine, "ext4")
    meet_an_error(staging)
    target = node.publish(volume, read_only=True)
    assert (target / "data").read_text() == "of the pod"


def test_an_xfs_that_was_shut_down_has_no_statistics_and_says_what_to_do(node: RealNode, machine: HostMachine) -> None:
    volume, staging = stage_with_data(node, machine, "xfs")
    shut_down(staging)
    with pytest.raises(PreconditionFailed, match=r"its xfs was shut down after an error; .* delete these pods"):
        node.use.statistics.usage(volume_id(volume), str(staging), "", deadline=Deadline.after(60))


@pytest.mark.parametrize(("fs_type", "die"), DEATHS)
def test_a_dead_filesystem_is_not_grown_and_says_what_to_do(
    node: RealNode, machine: HostMachine, fs_type: str, die: Callable[[Path], None]
) -> None:
    volume, staging = stage_with_data(node, machine, fs_type)
    die(staging)
    size_bytes = SIZES[fs_type] + 128 * MIB
    machine.grow(volume, size_bytes)
    request = NodeExpandRequest(volume_id(volume), str(staging), CapacityRange(size_bytes))
    with pytest.raises(PreconditionFailed, match=f"its {fs_type} .* after an error"):
        node.use.expand.expand(request, deadline=Deadline.after(60))
