"""Publications where kubelet's directory is not a plain one, and of filesystems that died: on real mounts."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from csi_driver.errors import PreconditionFailed
from csi_driver.model import AccessMode
from tests.contract.host_machine import HostMachine, Volume, host_machine, mounts_below, shell
from tests.integration.real_node import SIZES, RealNode

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


def test_a_single_writer_is_published_where_kubelets_directory_is_a_shared_bind_mount(
    node: RealNode, volume: Volume
) -> None:
    twin = share_directory(node)
    staging = node.stage(volume, mode=SINGLE)
    target = node.publish(volume, mode=SINGLE)
    node.publish(volume, mode=SINGLE)
    assert set(map(Path, mounts_below(twin))) == {twin / staging.name, twin / target.name}
    (target / "data").write_text("of the pod")
    with pytest.raises(PreconditionFailed, match="single writer"):
        node.publish(volume, "pod-2", mode=SINGLE)
    node.unpublish(volume)
    node.publish(volume, "pod-2", mode=SINGLE)
    node.unpublish(volume, "pod-2")
    node.unstage(volume)
    assert mounts_below(twin) == []
