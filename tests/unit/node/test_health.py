# SPDX-License-Identifier: Apache-2.0
"""NodeGetVolumeHealth and NodeGetStorageHealth: every fault and no other, in time."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from csi_driver.errors import VolumeNotFound
from csi_driver.host_model import Fault, FaultKind, VolumeStatus
from csi_driver.model import Reason, StorageFault, VolumeFault
from csi_driver.node.stats import CONDITIONS
from csi_driver.node_settings import NodeSettings
from tests.fakes.disks import FakeDisk
from tests.fakes.node import BLOCK, NAME, OTHER_UUID, STAGING, TARGET, UUID, VOLUME_ID, FakeNode
from tests.unit.node.encrypted import Locked

NO_PATIENCE = NodeSettings(node_name="n", state_directory=Path("/nowhere"), statistics_timeout_s=0.02)
PATIENCE = NodeSettings(node_name="n", state_directory=Path("/nowhere"), statistics_timeout_s=60)
Found = set[tuple[VolumeFault, Reason]]


def health(node: FakeNode, *, volume_id: str = VOLUME_ID, target: str = "", staging: str = "") -> Found:
    found = node.use.health.volume(volume_id, target, staging, deadline=node.soon())
    assert found.volume_id == volume_id
    listed = [(entry.status, entry.reason) for entry in found.entries]
    assert len(set(listed)) == len(listed)
    assert all(entry.message for entry in found.entries)
    return set(listed)


@pytest.fixture
def published(node: FakeNode) -> FakeNode:
    node.host.attach(NAME, UUID)
    node.stage()
    node.publish()
    return node


@pytest.fixture
def disk(published: FakeNode) -> FakeDisk:
    return published.host.disks[NAME]


PATHS = pytest.mark.parametrize(
    "paths", [{}, {"target": str(TARGET)}, {"staging": str(STAGING)}, {"target": str(TARGET), "staging": str(STAGING)}]
)


@PATHS
def test_a_volume_that_is_well_has_no_entry(published: FakeNode, paths: dict[str, str]) -> None:
    assert health(published, **paths) == set()


def test_a_raw_volume_that_is_well_has_no_entry(node: FakeNode) -> None:
    node.host.attach(NAME, UUID)
    node.stage(access=BLOCK)
    assert health(node) == set()
    node.publish(access=BLOCK)
    assert health(node) == health(node, target=str(TARGET)) == set()


@PATHS
@pytest.mark.parametrize("kind", [kind for kind in FaultKind if kind is not FaultKind.DEVICE_READ_ONLY])
def test_every_fault_is_reported(published: FakeNode, disk: FakeDisk, kind: FaultKind, paths: dict[str, str]) -> None:
    is_of_device = kind in (FaultKind.BACKING_FILE_GONE, FaultKind.BACKING_FILE_CUT_SHORT)
    wrong = published.host.wrong_devices if is_of_device else published.host.wrong_filesystems
    wrong[disk.number] = [Fault(kind, "first"), Fault(kind, "second")]
    assert health(published, **paths) == {CONDITIONS[kind]}
    wrong.clear()
    assert health(published, **paths) == set()


def test_every_fault_has_a_meaning_of_its_own() -> None:
    assert set(CONDITIONS) == set(FaultKind)
    assert len(set(CONDITIONS.values())) == len(FaultKind)


@PATHS
def test_a_device_that_is_gone_is_reported(published: FakeNode, paths: dict[str, str]) -> None:
    published.host.detach(NAME)
    if paths:
        assert (VolumeFault.INACCESSIBLE, Reason.DEVICE_GONE) in health(published, **paths)
    else:
        with pytest.raises(VolumeNotFound):
            health(published)


def test_a_device_that_only_the_client_knows_is_reported(node: FakeNode) -> None:
    disk = node.host.attach(NAME, UUID)
    disk.status, disk.size_bytes = VolumeStatus(NAME, UUID), 0
    assert health(node) == {(VolumeFault.INACCESSIBLE, Reason.DEVICE_GONE)}


def test_a_device_that_refuses_writes_matters_where_it_is_written(published: FakeNode, disk: FakeDisk) -> None:
    disk.read_only = True
    assert health(published, target=str(TARGET)) == {(VolumeFault.DEGRADED, Reason.DEVICE_READ_ONLY)}
    published.unpublish()
    published.unstage()
    assert health(published) == set()


@PATHS
def test_a_filesystem_that_turned_read_only_is_reported(
    published: FakeNode, disk: FakeDisk, paths: dict[str, str]
) -> None:
    disk.superblock_read_only = True
    assert health(published, **paths) == {(VolumeFault.DEGRADED, Reason.FILESYSTEM_READ_ONLY)}


def test_a_full_filesystem_is_reported(published: FakeNode, disk: FakeDisk) -> None:
    published.host.write_file(TARGET, "big", b"x" * (disk.size_bytes - 1))
    assert health(published) == set()
    published.host.write_file(TARGET, "last", b"x")
    assert health(published) == {(VolumeFault.DEGRADED, Reason.FILESYSTEM_FULL)}


def test_a_filesystem_without_free_inodes_is_reported(published: FakeNode) -> None:
    for number in range(1000):
        published.host.write_file(TARGET, str(number), b"")
    assert health(published) == {(VolumeFault.DEGRADED, Reason.INODES_EXHAUSTED)}


def test_faults_of_the_client_are_reported(published: FakeNode, disk: FakeDisk) -> None:
    disk.status = VolumeStatus(NAME, UUID, io_enabled=False, refusal="it does not write", details="dbg is 0")
    assert health(published) == {
        (VolumeFault.INACCESSIBLE, Reason.IO_DISABLED),
        (VolumeFault.DATA_LOSS, Reason.DATA_NOT_WRITTEN),
    }
    disk.status = VolumeStatus(NAME, OTHER_UUID, io_enabled=False, details="of another volume")
    assert health(published) == set()


def test_during_an_upgrade_of_the_client_the_volumes_are_well(published: FakeNode) -> None:
    published.host.upgrade_client()
    assert health(published) == health(published, target=str(TARGET)) == set()


def test_an_encrypted_volume_is_judged_by_what_is_opened_over_it(node: FakeNode) -> None:
    locked = Locked(node)
    locked.up()
    assert health(node) == health(node, target=str(TARGET)) == set()
    assert locked.mapper is not None
    node.host.wrong_filesystems[locked.mapper.number] = [Fault(FaultKind.IO_ERROR, "EIO")]
    assert health(node) == health(node, target=str(TARGET)) == {(VolumeFault.INACCESSIBLE, Reason.IO_ERROR)}
    node.host.wrong_devices[locked.disk.number] = [Fault(FaultKind.BACKING_FILE_GONE, "gone")]
    assert (VolumeFault.DEGRADED, Reason.BACKING_FILE_GONE) in health(node, target=str(TARGET))


def test_the_mount_of_another_volume_says_nothing_of_this_one(published: FakeNode) -> None:
    other = published.host.attach("csi-2", OTHER_UUID)
    other_id = f"single-zone-cluster:csi-2:{OTHER_UUID}"
    published.host.wrong_filesystems[published.host.disks[NAME].number] = [Fault(FaultKind.IO_ERROR, "EIO")]
    assert health(published, volume_id=other_id, target=str(TARGET)) == set()
    assert other.filesystem is None


@pytest.mark.parametrize("volume_id", ["no/such", "csi-none", f"z:{NAME}:{OTHER_UUID}"])
def test_a_volume_that_is_not_on_the_node_is_not_found(published: FakeNode, volume_id: str) -> None:
    with pytest.raises(VolumeNotFound):
        health(published, volume_id=volume_id)


def test_a_volume_that_was_not_mounted_yet_is_judged_by_its_device(node: FakeNode) -> None:
    """The CO may ask about a volume after a failed stage."""
    node.host.attach(NAME, UUID)
    assert health(node, target=str(TARGET), staging=str(STAGING)) == set()


# --- what hangs -------------------------------------------------------------------------------------------------


@pytest.fixture
def hanging(request: pytest.FixtureRequest) -> Iterator[FakeNode]:
    node = FakeNode(settings=getattr(request, "param", NO_PATIENCE))
    node.host.attach(NAME, UUID)
    node.stage()
    node.publish()
    node.host.answers.clear()
    yield node
    node.host.answers.set()


def test_a_filesystem_that_does_not_answer_is_reported_and_costs_one_thread(hanging: FakeNode) -> None:
    silent = {(VolumeFault.INACCESSIBLE, Reason.NOT_RESPONDING)}
    assert health(hanging) == silent
    threads = threading.active_count()
    assert [health(hanging, target=str(TARGET)) for _ in range(20)] == [silent] * 20
    assert threading.active_count() <= threads


def test_faults_of_the_client_are_reported_for_a_hanging_device_too(hanging: FakeNode) -> None:
    hanging.host.disks[NAME].status = VolumeStatus(NAME, UUID, io_enabled=False, details="dbg is 0")
    assert {reason for _, reason in health(hanging)} == {Reason.NOT_RESPONDING, Reason.IO_DISABLED}


@pytest.mark.parametrize("hanging", [PATIENCE], indirect=True)
def test_a_filesystem_that_answers_again_is_well_again(hanging: FakeNode) -> None:
    asked = hanging.use.health
    answered = hanging.write_off(asked.watchdog, lambda limit: asked.volume(VOLUME_ID, "", "", deadline=limit))
    hanging.host.answers.set()
    assert answered.exception(120) is None
    assert health(hanging) == set()


# --- the storage ------------------------------------------------------------------------------------------------


def storage(node: FakeNode) -> set[tuple[StorageFault, Reason]]:
    return {(entry.status, entry.reason) for entry in node.use.health.storage()}


def test_a_node_with_its_client_is_well(node: FakeNode) -> None:
    assert storage(node) == set()


def test_faults_of_the_storage_access_are_reported(node: FakeNode) -> None:
    client, host = node.host.client, node.host
    host.client = None
    assert storage(node) == {(StorageFault.STORAGE_UNREACHABLE, Reason.CLIENT_ABSENT)}
    host.upgrade_client()
    assert storage(node) == {(StorageFault.STORAGE_DEGRADED, Reason.CLIENT_UPGRADING)}
    host.client, host.client_problem = client, "it never registers"
    assert storage(node) == {(StorageFault.STORAGE_UNREACHABLE, Reason.CLIENT_UNUSABLE)}
    host.client_problem, host.present_problems = "", ["mkfs.ext4 is not installed"]
    assert storage(node) == {(StorageFault.STORAGE_DEGRADED, Reason.NODE_NOT_EQUIPPED)}
