# SPDX-License-Identifier: Apache-2.0
"""One writer fills a volume, then many read it: in several namespaces of one node, and on several nodes."""

from __future__ import annotations

from pathlib import Path

import pytest

from csi_driver.model import AccessMode, Capability
from csi_driver.rpc.client import CallFailed
from tests.integration.cluster import Cluster, ClusterVolume
from tests.integration.rig import MIB, digest, filesystem, fill, findmnt, in_parallel, raw_block, wait_for
from tests.integration.test_read_only import refusals, write_refused

pytestmark = pytest.mark.root

READERS = AccessMode.MULTI_NODE_READER_ONLY
OPTIONS = {"ext4": ("ro",), "xfs": ("ro", "norecovery", "nouuid")}


def reader_of(fs_type: str) -> Capability:
    return filesystem(fs_type, READERS, *OPTIONS[fs_type])


def filled(cluster: Cluster, capability: Capability) -> tuple[ClusterVolume, str]:
    """Return a volume of namespace team-a that a writer filled on node-1 and gave back."""
    volume = cluster.volume(capability, namespace="team-a")
    target = volume.up("node-1")
    wanted = fill(target if target.is_block_device() else target / "data", MIB)
    volume.down("node-1")
    return volume, wanted


def references(cluster: Cluster, volume: ClusterVolume, node: str) -> set[str]:
    """Return under which references a node holds the volume: as the storage says, and as the node itself does."""
    wish = cluster.api(f"/clients/{node}")["attachments"][volume.uuid]
    blob = (cluster.directory / node / "proc" / "volumes" / volume.name / "blob.txt").read_text().splitlines()
    assert set(blob[2:]) == set(wish["referenceIDs"])
    return set(blob[2:])


@pytest.mark.parametrize("fs_type", ["ext4", "xfs"])
def test_copies_of_a_volume_are_read_from_many_namespaces_on_one_node(cluster: Cluster, fs_type: str) -> None:
    volume, wanted = filled(cluster, filesystem(fs_type))
    first, second = (volume.copy(namespace, reader_of(fs_type)) for namespace in ("team-b", "team-c"))
    targets = [first.up("node-1"), second.up("node-1")]
    assert references(cluster, volume, "node-1") == {"team-b", "team-c"}
    # Kubelet takes neither of two staging paths off a node while one device is mounted at both.
    staged = [mount for copy in (first, second) if (mount := findmnt(copy.staging("node-1"))) is not None]
    assert len(staged) == 1
    assert {findmnt(target)["source"] for target in targets} == {staged[0]["source"]}  # type: ignore[index]
    for target in targets:
        assert digest(target / "data", MIB) == wanted
        assert set(refusals(target).values()) == {"EROFS"}
    first.down("node-1")
    assert digest(targets[1] / "data", MIB) == wanted
    assert first.device("node-1").exists()
    assert references(cluster, volume, "node-1") == {"team-c"}
    with pytest.raises(CallFailed, match=r"FAILED_PRECONDITION.*still attached"):
        volume.delete()
    second.down("node-1")
    assert not first.device("node-1").exists()
    volume.delete()


def test_the_same_volume_becomes_a_readers_volume_on_every_node(cluster: Cluster) -> None:
    volume, wanted = filled(cluster, filesystem())
    volume.capability = reader_of("ext4")
    targets = in_parallel([lambda: volume.up("node-1"), lambda: volume.up("node-2", controller=1)])
    for target in targets:
        assert isinstance(target, Path)
        assert digest(target / "data", MIB) == wanted
        assert set(refusals(target).values()) == {"EROFS"}
    writer = volume.copy("team-a", filesystem())
    with pytest.raises(CallFailed, match=r"FAILED_PRECONDITION.*node-1"):
        writer.attach("node-3")
    volume.down("node-1")
    volume.down("node-2")
    volume.delete()


def test_readers_who_come_at_once_never_meet_an_outdated_version(cluster: Cluster) -> None:
    volume, _ = filled(cluster, filesystem())
    copies = [volume.copy(f"team-{number}", reader_of("ext4")) for number in range(6)]

    def come(number: int) -> None:
        copies[number].attach(("node-1", "node-2", "node-3")[number % 3], controller=number % 2)

    def come_in_the_end(number: int) -> list[str]:
        met = []

        def came() -> bool:
            try:
                come(number)
            except CallFailed as problem:
                # Two calls for one volume at one controller at once: the caller comes again.
                met.append(problem.code)
                return False
            return True

        wait_for(came, "a reader to come")
        return met

    met = in_parallel([lambda number=number: come_in_the_end(number) for number in range(6)])
    assert {code for codes in met if isinstance(codes, list) for code in codes} <= {"ABORTED"}
    for number, copy in enumerate(copies):
        copy.detach(("node-1", "node-2", "node-3")[number % 3])
    volume.delete()


def test_raw_readers_in_two_namespaces_of_one_node_write_nothing(cluster: Cluster) -> None:
    volume, wanted = filled(cluster, raw_block())
    first, second = (volume.copy(namespace, raw_block(READERS)) for namespace in ("team-b", "team-c"))
    targets = [first.up("node-1"), second.up("node-1")]
    for target in targets:
        assert digest(target, MIB) == wanted
        assert write_refused(target)
    first.down("node-1")
    assert digest(targets[1], MIB) == wanted
    second.down("node-1")
    assert digest(volume.file, MIB) == wanted
    volume.delete()


def test_a_writer_comes_back_when_the_last_reader_has_gone(cluster: Cluster) -> None:
    volume, wanted = filled(cluster, filesystem())
    reader = volume.copy("team-b", reader_of("ext4"))
    reader.up("node-2")
    with pytest.raises(CallFailed, match="FAILED_PRECONDITION"):
        volume.attach("node-1")
    reader.down("node-2")
    target = volume.up("node-1")
    assert digest(target / "data", MIB) == wanted
    fill(target / "more", MIB)
    volume.down("node-1")
    volume.delete()
