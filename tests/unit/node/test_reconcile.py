# SPDX-License-Identifier: Apache-2.0
"""Leftovers on a node: found, logged, and removed only after a second proof."""

from __future__ import annotations

import errno
import logging
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from csi_driver.errors import OperationPending, StorageUnavailable, SystemCallFailed
from csi_driver.host_model import Mount, VolumeStatus
from csi_driver.model import DEFAULT_DRIVER_NAME, BlockAccess
from csi_driver.node import reconcile
from csi_driver.node.reconcile import Finding, Kind
from csi_driver.publish_context import Encryption
from tests.fakes.node import NAME, OTHER_UUID, UUID, FakeNode, publish_context

ROOT = Path("/var/lib/kubelet")
CSI = ROOT / "plugins/kubernetes.io/csi"
STAGING = CSI / DEFAULT_DRIVER_NAME / ("ab" * 32) / "globalmount"
STAGING_RECORD = STAGING.parent / "vol_data.json"
TARGET = ROOT / "pods/1/volumes/kubernetes.io~csi/pvc-1/mount"
TARGET_RECORD = TARGET.parent / "vol_data.json"
BLOCK_STAGING = CSI / "volumeDevices/staging/pvc-1"
BLOCK_TARGET = CSI / "volumeDevices/publish/pvc-1/1"
BLOCK_RECORD = CSI / "volumeDevices/pvc-1/data/vol_data.json"


class Kubelet:
    """A node with a volume that kubelet staged and published, and its sweeps."""

    def __init__(self) -> None:
        self.node = FakeNode()
        self.host = self.node.host
        self.claimed: list[str] = []
        self.is_busy = False
        self.host.attach(NAME, UUID)
        for path in (STAGING, TARGET.parent, BLOCK_STAGING, BLOCK_TARGET.parent, BLOCK_RECORD.parent):
            self.host.make_tree(path)

    def stage(self) -> None:
        self.host.tree[STAGING_RECORD] = "file"
        self.node.stage(staging=STAGING)

    def publish(self) -> None:
        self.host.tree[TARGET_RECORD] = "file"
        self.node.publish(TARGET, staging=STAGING)

    def publish_block(self, *, read_only: bool = False) -> None:
        self.host.tree[BLOCK_RECORD] = "file"
        self.node.stage(staging=BLOCK_STAGING, access=BlockAccess())
        self.node.publish(BLOCK_TARGET, staging=BLOCK_STAGING, access=BlockAccess(), read_only=read_only)

    def forget(self, record: Path) -> None:
        del self.host.tree[record]

    def sweep(self) -> list[Kind]:
        return [finding.kind for finding in self.findings()]

    def findings(self) -> list[Finding]:
        return list(self.node.use.reconcile.sweep(self.claim))

    @contextmanager
    def claim(self, name: str) -> Iterator[None]:
        if self.is_busy:
            raise OperationPending("busy")
        self.claimed.append(name)
        yield


@pytest.fixture
def kubelet() -> Kubelet:
    return Kubelet()


# --- no leftovers ----------------------------------------------------------------------------------


def test_a_volume_in_use_is_no_finding(kubelet: Kubelet) -> None:
    kubelet.stage()
    kubelet.publish()
    assert kubelet.sweep() == kubelet.sweep() == []
    assert kubelet.claimed == []


def test_a_staged_volume_that_is_published_nowhere_is_no_finding(kubelet: Kubelet) -> None:
    kubelet.stage()
    assert kubelet.sweep() == kubelet.sweep() == []


def test_a_raw_volume_in_use_is_no_finding(kubelet: Kubelet) -> None:
    kubelet.publish_block()
    assert kubelet.sweep() == kubelet.sweep() == []


def test_a_raw_reader_in_use_is_no_finding(kubelet: Kubelet) -> None:
    kubelet.publish_block(read_only=True)
    assert kubelet.sweep() == kubelet.sweep() == []


# --- what kubelet forgot --------------------------------------------------------------------------------------


def test_a_forgotten_staging_is_unmounted_by_the_second_sweep(kubelet: Kubelet) -> None:
    kubelet.stage()
    kubelet.forget(STAGING_RECORD)
    assert kubelet.sweep() == [Kind.FORGOTTEN]
    assert kubelet.host.mounts_at(STAGING) == 1
    assert kubelet.sweep() == []
    assert kubelet.host.mounts_at(STAGING) == 0
    assert kubelet.claimed == [NAME]


def test_a_forgotten_staging_of_an_encrypted_volume_is_closed_as_well(kubelet: Kubelet) -> None:
    kubelet.host.tree[STAGING_RECORD] = "file"
    context = publish_context(encryption=Encryption.LUKS)
    kubelet.node.stage(staging=STAGING, context=context, secrets={"passphrase": "correct horse"})
    kubelet.forget(STAGING_RECORD)
    assert kubelet.sweep() == [Kind.FORGOTTEN]
    assert NAME in kubelet.host.mappers
    assert kubelet.sweep() == []
    assert kubelet.host.mappers == {}


def test_mounts_that_are_stacked_at_a_forgotten_staging_are_all_unmounted(kubelet: Kubelet) -> None:
    kubelet.stage()
    kubelet.host.mounts.bind(STAGING, STAGING, read_only=False)
    kubelet.forget(STAGING_RECORD)
    kubelet.sweep()
    assert kubelet.sweep() == []
    assert kubelet.host.mounts_at(STAGING) == 0


def test_a_forgotten_staging_that_is_published_stays(kubelet: Kubelet) -> None:
    kubelet.stage()
    kubelet.publish()
    kubelet.forget(STAGING_RECORD)
    assert kubelet.sweep() == kubelet.sweep() == []
    assert kubelet.host.mounts_at(STAGING) == 1


def test_a_forgotten_staging_that_is_remembered_meanwhile_stays(kubelet: Kubelet) -> None:
    kubelet.stage()
    kubelet.forget(STAGING_RECORD)
    kubelet.sweep()
    kubelet.host.tree[STAGING_RECORD] = "file"
    assert kubelet.sweep() == []
    kubelet.forget(STAGING_RECORD)
    assert kubelet.sweep() == [Kind.FORGOTTEN]
    assert kubelet.host.mounts_at(STAGING) == 1


def test_what_changes_before_the_claim_is_had_is_seen(kubelet: Kubelet) -> None:
    kubelet.stage()
    kubelet.forget(STAGING_RECORD)
    kubelet.sweep()

    @contextmanager
    def claim(name: str) -> Iterator[None]:
        kubelet.host.tree[STAGING_RECORD] = "file"
        yield

    kubelet.node.use.reconcile.sweep(claim)
    assert kubelet.host.mounts_at(STAGING) == 1


def test_a_volume_that_a_call_works_on_is_left_to_the_next_sweep(kubelet: Kubelet) -> None:
    kubelet.stage()
    kubelet.forget(STAGING_RECORD)
    kubelet.is_busy = True
    assert kubelet.sweep() == kubelet.sweep() == [Kind.FORGOTTEN]
    assert kubelet.host.mounts_at(STAGING) == 1
    kubelet.is_busy = False
    assert kubelet.sweep() == []


def test_a_node_left_over_with_the_devices_number_makes_no_live_mount_a_dead_one(
    kubelet: Kubelet, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The embedded manager's nodes may be left over, and the number of a loop device is soon another volume's."""
    kubelet.stage()
    monkeypatch.setattr(kubelet.host.devices, "name_of", lambda number: "csi-0-left-over")
    kubelet.forget(STAGING_RECORD)
    kubelet.host.table[0].in_use = True
    assert kubelet.sweep() == kubelet.sweep() == [Kind.FORGOTTEN]
    assert kubelet.host.mounts_at(STAGING) == 1


def test_a_forgotten_staging_in_use_is_never_detached_lazily(kubelet: Kubelet) -> None:
    kubelet.stage()
    kubelet.forget(STAGING_RECORD)
    entry = kubelet.host.topmost(STAGING)
    assert entry is not None
    entry.in_use = True
    kubelet.sweep()
    assert kubelet.sweep() == [Kind.FORGOTTEN]
    assert kubelet.host.mounts_at(STAGING) == 1


def test_a_staging_outside_kubelets_layout_is_never_forgotten(kubelet: Kubelet) -> None:
    kubelet.node.stage()
    assert kubelet.sweep() == kubelet.sweep() == []


def test_a_staging_of_another_driver_is_never_forgotten(kubelet: Kubelet) -> None:
    theirs = CSI / "other.driver" / ("cd" * 32) / "globalmount"
    kubelet.host.make_tree(theirs)
    kubelet.node.stage(staging=theirs)
    assert kubelet.sweep() == kubelet.sweep() == []


def test_a_mount_of_a_foreign_device_at_our_path_is_never_touched(kubelet: Kubelet) -> None:
    disk = kubelet.host.attach("sda", "99999999-0000-4000-8000-000000000000")
    disk.path = Path("/dev/sda")
    kubelet.stage()
    entry = kubelet.host.topmost(STAGING)
    assert entry is not None
    entry.disk, entry.source = disk, "/dev/sda"
    kubelet.forget(STAGING_RECORD)
    kubelet.host.detach("sda")
    assert kubelet.sweep() == kubelet.sweep() == []
    assert kubelet.host.mounts_at(STAGING) == 1


def test_a_mount_that_cannot_be_judged_hinders_no_other(
    kubelet: Kubelet, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    other = CSI / DEFAULT_DRIVER_NAME / ("00" * 32) / "globalmount"
    kubelet.host.make_tree(other)
    kubelet.host.attach("csi-0", OTHER_UUID)
    context = publish_context(name="csi-0", uuid=OTHER_UUID)
    kubelet.node.stage(volume_id=f"z:csi-0:{OTHER_UUID}", staging=other, context=context)
    kubelet.stage()
    kubelet.forget(STAGING_RECORD)
    kind = kubelet.host.paths.kind

    def refuse(path: Path) -> str:
        if path.is_relative_to(other.parent):
            raise SystemCallFailed(f"open {path}", errno.EIO)
        return kind(path)

    monkeypatch.setattr(kubelet.host.paths, "kind", refuse)
    assert kubelet.sweep() == [Kind.FORGOTTEN]
    assert "csi-0" in caplog.text
    assert kubelet.sweep() == []


# --- looking may hang -----------------------------------------------------------------------------------------


def test_a_look_that_hangs_gives_the_volume_back_and_the_next_sweep_says_so(
    kubelet: Kubelet, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Claimed for ever, the volume would be answered ABORTED for as long as some other device hangs."""
    answers, table = threading.Event(), kubelet.host.mounts.table
    answers.set()
    given_back: list[str] = []

    def slow() -> list[Mount]:
        answers.wait()
        return table()

    @contextmanager
    def claim(name: str) -> Iterator[None]:
        answers.clear()
        monkeypatch.setattr(reconcile, "SEARCH_TIMEOUT_S", 0.01)
        try:
            yield
        finally:
            given_back.append(name)

    monkeypatch.setattr(kubelet.host.mounts, "table", slow)
    kubelet.stage()
    kubelet.forget(STAGING_RECORD)
    sweep = kubelet.node.use.reconcile.sweep
    sweep(claim)
    try:
        assert [finding.kind for finding in sweep(claim)] == [Kind.FORGOTTEN]
        assert (given_back, kubelet.host.mounts_at(STAGING)) == ([NAME], 1)
        with pytest.raises(StorageUnavailable, match="does not respond"):
            sweep(claim)
    finally:
        answers.set()


# --- dead devices ---------------------------------------------------------------------------------------------


def test_a_dead_mount_that_kubelet_knows_is_reported_once_and_left_alone(
    kubelet: Kubelet, caplog: pytest.LogCaptureFixture
) -> None:
    kubelet.stage()
    kubelet.host.detach(NAME)
    with caplog.at_level(logging.WARNING):
        assert kubelet.sweep() == kubelet.sweep() == kubelet.sweep() == [Kind.BROKEN]
    assert len(caplog.records) == 1
    assert NAME in caplog.text
    assert kubelet.host.mounts_at(STAGING) == 1


@pytest.mark.parametrize("in_use", [False, True])
def test_a_dead_mount_that_kubelet_forgot_is_unmounted_even_in_use(kubelet: Kubelet, in_use: bool) -> None:
    kubelet.stage()
    entry = kubelet.host.topmost(STAGING)
    assert entry is not None
    entry.in_use = in_use
    kubelet.host.detach(NAME)
    kubelet.forget(STAGING_RECORD)
    assert kubelet.sweep() == [Kind.DEAD]
    assert kubelet.sweep() == []
    assert kubelet.host.mounts_at(STAGING) == 0


@pytest.mark.parametrize("name", [NAME, "csi-other"])
def test_a_forgotten_mount_whose_number_is_another_devices_is_unmounted_even_in_use(
    kubelet: Kubelet, name: str
) -> None:
    kubelet.stage()
    kubelet.forget(STAGING_RECORD)
    (entry,) = kubelet.host.table
    entry.in_use = True
    kubelet.host.attach(name, UUID, number=kubelet.host.detach(NAME).number)
    assert kubelet.sweep() == [Kind.DEAD]
    assert kubelet.sweep() == []
    assert kubelet.host.table == []


def test_dead_publications_that_kubelet_forgot_are_unmounted(kubelet: Kubelet) -> None:
    kubelet.stage()
    kubelet.publish()
    kubelet.forget(TARGET_RECORD)
    kubelet.host.detach(NAME)
    assert sorted(kubelet.sweep(), key=str) == [Kind.BROKEN, Kind.DEAD]
    assert kubelet.sweep() == [Kind.BROKEN]
    assert kubelet.host.mounts_at(TARGET) == 0
    assert kubelet.host.mounts_at(STAGING) == 1


@pytest.mark.parametrize("in_use", [False, True])
@pytest.mark.parametrize(("preempted", "references"), [(False, ()), (True, (UUID,))])
def test_a_mount_of_a_volume_that_was_taken_away_is_dead(
    kubelet: Kubelet, in_use: bool, preempted: bool, references: tuple[str, ...]
) -> None:
    kubelet.stage()
    entry = kubelet.host.topmost(STAGING)
    assert entry is not None
    entry.in_use = in_use
    disk = kubelet.host.disks[NAME]
    disk.status = VolumeStatus(NAME, UUID, io_enabled=False, preempted=preempted)
    disk.references = references
    assert kubelet.sweep() == [Kind.BROKEN]
    kubelet.forget(STAGING_RECORD)
    assert kubelet.sweep() == [Kind.DEAD]
    assert kubelet.sweep() == []
    assert kubelet.host.mounts_at(STAGING) == 0


def test_a_mount_of_a_volume_whose_io_is_off_for_a_while_is_no_finding(kubelet: Kubelet) -> None:
    kubelet.stage()
    disk = kubelet.host.disks[NAME]
    disk.status, disk.references = VolumeStatus(NAME, UUID, io_enabled=False), (UUID,)
    assert kubelet.sweep() == kubelet.sweep() == []


def test_a_device_that_came_back_is_another_one_to_its_old_mount(kubelet: Kubelet) -> None:
    kubelet.stage()
    kubelet.host.attach(NAME, UUID, like=kubelet.host.detach(NAME))
    assert kubelet.sweep() == [Kind.BROKEN]


# --- encrypted volumes ---


@pytest.fixture
def locked(kubelet: Kubelet) -> Kubelet:
    """A volume that is opened and staged."""
    kubelet.host.tree[STAGING_RECORD] = "file"
    context = publish_context(encryption=Encryption.LUKS)
    kubelet.node.stage(staging=STAGING, context=context, secrets={"passphrase": "correct horse"})
    return kubelet


def test_an_encrypted_volume_in_use_is_no_finding(locked: Kubelet) -> None:
    assert locked.sweep() == locked.sweep() == []


def test_a_forgotten_encrypted_staging_is_unmounted_and_closed(locked: Kubelet) -> None:
    locked.forget(STAGING_RECORD)
    assert locked.sweep() == [Kind.FORGOTTEN]
    assert locked.sweep() == []
    assert locked.host.mounts_at(STAGING) == 0
    assert locked.host.mappers == {}


@pytest.mark.parametrize("is_forgotten", [False, True])
def test_an_opened_device_over_one_that_is_gone_is_dead(locked: Kubelet, is_forgotten: bool) -> None:
    locked.host.detach(NAME)
    if is_forgotten:
        locked.forget(STAGING_RECORD)
    assert locked.sweep() == [Kind.DEAD if is_forgotten else Kind.BROKEN]
    assert locked.sweep() == ([] if is_forgotten else [Kind.BROKEN])
    assert (locked.host.mappers == {}) == is_forgotten


def test_an_opened_device_that_the_kernel_still_has_is_not_detached_lazily(locked: Kubelet) -> None:
    locked.host.detach(NAME)
    locked.forget(STAGING_RECORD)
    entry = locked.host.topmost(STAGING)
    assert entry is not None
    entry.in_use = True
    locked.sweep()
    assert locked.sweep() == [Kind.DEAD]
    assert locked.host.mounts_at(STAGING) == 1


def test_an_opened_device_over_another_device_is_not_ours(locked: Kubelet) -> None:
    locked.host.attach(NAME, UUID)
    locked.forget(STAGING_RECORD)
    assert locked.sweep() == locked.sweep() == []
    assert locked.host.mounts_at(STAGING) == 1


# --- readers --------------------------------------------------------------------------------------------------


def test_a_reader_without_a_publication_is_taken_down_by_the_second_sweep(kubelet: Kubelet) -> None:
    kubelet.publish_block(read_only=True)
    kubelet.host.table.clear()
    assert kubelet.sweep() == [Kind.READER]
    assert len(kubelet.host.readers) == 1
    assert kubelet.sweep() == []
    assert kubelet.host.readers == []


def test_a_reader_that_is_open_stays(kubelet: Kubelet) -> None:
    kubelet.publish_block(read_only=True)
    kubelet.host.table.clear()
    kubelet.host.readers[0].claimed = 1
    kubelet.sweep()
    assert kubelet.sweep() == [Kind.READER]
    assert len(kubelet.host.readers) == 1


def test_a_reader_over_another_drivers_device_is_never_touched(kubelet: Kubelet) -> None:
    kubelet.publish_block(read_only=True)
    kubelet.host.table.clear()
    kubelet.host.disks[NAME].path = Path("/elsewhere") / NAME
    assert kubelet.sweep() == kubelet.sweep() == []
    assert len(kubelet.host.readers) == 1


def test_every_cleanup_is_logged(kubelet: Kubelet, caplog: pytest.LogCaptureFixture) -> None:
    kubelet.stage()
    kubelet.forget(STAGING_RECORD)
    with caplog.at_level(logging.INFO):
        kubelet.sweep()
        kubelet.sweep()
    assert [record.levelno for record in caplog.records if str(STAGING) in record.getMessage()] == [
        logging.WARNING,
        logging.INFO,
    ]
