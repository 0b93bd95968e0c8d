# SPDX-License-Identifier: Apache-2.0
"""What a node reports for people beside its answers."""

from __future__ import annotations

from contextlib import nullcontext
from functools import partial
from pathlib import Path

import pytest

from csi_driver.errors import ContentRefused, Denied, DriverError, MissingField, PreconditionFailed, StorageUnavailable
from csi_driver.host_model import VolumeStatus
from csi_driver.model import DEFAULT_DRIVER_NAME, Claim
from csi_driver.publish_context import Encryption
from csi_driver.reporting import SILENT, EventReason, Subject
from tests.fakes.disks import MIB, FakeFilesystem
from tests.fakes.node import KUBELET, NAME, OTHER_UUID, STAGING, TARGET, UUID, VOLUME_ID, FakeNode, publish_context
from tests.unit.node.encrypted import Locked

CLAIM = Claim("team-a", "data", "0d7c1f0e-5a3b-4f6d-9c1e-2b7a8d9e0f11")
CONTEXT = publish_context(claim=CLAIM)
SECRET = "planted-secret-4711"


def staged(node: FakeNode) -> None:
    node.host.attach(NAME, UUID)
    node.stage(context=CONTEXT)


def test_a_volume_that_is_refused_for_its_content_is_reported_on_its_claim(node: FakeNode) -> None:
    disk = node.host.attach(NAME, UUID)
    disk.filesystem = FakeFilesystem("xfs", disk.size_bytes)
    with pytest.raises(ContentRefused):
        node.stage(context=CONTEXT)
    with pytest.raises(ContentRefused) as refused:
        node.stage(context=CONTEXT)
    subject, reason, note = node.reports.one()
    assert (subject.claim, reason, note) == (CLAIM, EventReason.CONTENT_REFUSED, str(refused.value))
    assert "holds xfs; expected ext4" in note


def test_unknown_data_and_a_damaged_filesystem_are_content_too(node: FakeNode) -> None:
    disk = node.host.attach(NAME, UUID)
    disk.filesystem = FakeFilesystem("ext4", disk.size_bytes, uuid=UUID, is_damaged=True)
    with pytest.raises(ContentRefused):
        node.stage(context=CONTEXT)
    assert node.reports.one()[1] is EventReason.CONTENT_REFUSED


def test_other_refusals_of_a_stage_are_not_reported(node: FakeNode) -> None:
    node.host.attach(NAME, OTHER_UUID)
    with pytest.raises(DriverError):
        node.stage(context=CONTEXT)
    assert not node.reports.found


def test_a_device_that_stays_open_is_reported_with_the_program_that_has_it_open(node: FakeNode) -> None:
    staged(node)
    node.host.disks[NAME].opened_by_others = 1
    with pytest.raises(StorageUnavailable):
        node.unstage()
    subject, reason, note = node.reports.one()
    assert (subject, reason) == (Subject(volume_id=VOLUME_ID), EventReason.VOLUME_IN_USE)
    assert "still open" in note
    assert "by pid 4711 (sh)" in note


def test_without_events_nobody_looks_for_the_program(node: FakeNode, monkeypatch: pytest.MonkeyPatch) -> None:
    staged(node)
    node.host.disks[NAME].opened_by_others = 1
    monkeypatch.setattr(node.use.stage, "reporter", SILENT)
    monkeypatch.setattr(node.host.devices, "describe_openers", None)
    with pytest.raises(StorageUnavailable):
        node.unstage()


@pytest.mark.parametrize("path", [STAGING, TARGET])
def test_a_mount_that_is_busy_is_reported(node: FakeNode, path: Path) -> None:
    staged(node)
    node.publish(context=CONTEXT)
    entry = node.host.topmost(path)
    assert entry is not None
    entry.in_use = True
    with pytest.raises(PreconditionFailed, match="in use") as busy:
        node.unpublish() if path == TARGET else node.unstage()
    note = f"volume {NAME}: {busy.value}"
    assert node.reports.one() == (Subject(volume_id=VOLUME_ID), EventReason.VOLUME_IN_USE, note)


def test_a_busy_mount_of_a_volume_that_was_taken_from_the_node_is_reported(node: FakeNode) -> None:
    staged(node)
    entry = node.host.topmost(STAGING)
    assert entry is not None
    entry.in_use = True
    node.host.disks[NAME].status = VolumeStatus(NAME, UUID, io_enabled=False, preempted=True)
    node.unstage()
    subject, reason, _ = node.reports.one()
    assert (subject, reason) == (Subject(volume_id=VOLUME_ID), EventReason.MOUNT_LOST)


def test_an_expansion_that_waits_for_the_next_mount_is_reported(node: FakeNode) -> None:
    staged(node)
    node.publish(context=CONTEXT)
    node.host.disks[NAME].size_bytes = 128 * MIB
    node.host.can_grow_mounted_ext4 = False
    with pytest.raises(PreconditionFailed, match="CAP_SYS_RESOURCE"):
        node.expand(required_bytes=128 * MIB)
    assert node.reports.one()[:2] == (Subject(volume_id=VOLUME_ID), EventReason.GROWS_AT_NEXT_MOUNT)
    node.reports.found.clear()
    node.stage(context=CONTEXT)
    assert node.reports.one()[:2] == (Subject(CLAIM, volume_id=VOLUME_ID), EventReason.GROWS_AT_NEXT_MOUNT)


def test_a_lost_mount_is_reported_after_two_sweeps_and_a_removed_one_once(node: FakeNode) -> None:
    staging = KUBELET / "plugins/kubernetes.io/csi" / DEFAULT_DRIVER_NAME / ("ab" * 32) / "globalmount"
    record = staging.parent / "vol_data.json"
    node.host.make_tree(staging)
    node.host.tree[record] = "file"
    node.host.attach(NAME, UUID)
    node.stage(staging=staging)
    node.host.detach(NAME)
    sweep = partial(node.use.reconcile.sweep, lambda _: nullcontext())
    sweep()
    assert not node.reports.found
    sweep()
    assert node.reports.one()[:2] == (Subject(), EventReason.MOUNT_LOST)
    node.reports.found.clear()
    del node.host.tree[record]
    for _ in range(3):
        sweep()
    ((subject, reason, note),) = node.reports.found
    assert (subject, reason) == (Subject(), EventReason.MOUNT_CLEANED_UP)
    assert str(staging) in note


def test_no_report_has_a_secret(locked: Locked) -> None:
    """A passphrase is in the request of every call that is refused here."""
    node, secrets = locked.node, {"passphrase": SECRET, "previousPassphrase": f"{SECRET}-before"}
    encrypted = publish_context(encryption=Encryption.LUKS, claim=CLAIM)
    node.stage(context=encrypted, secrets=secrets)
    node.publish(context=encrypted)
    locked.disk.size_bytes = 128 * MIB
    with pytest.raises(MissingField):
        node.expand(required_bytes=128 * MIB, staging=STAGING)
    with pytest.raises(Denied):
        node.expand(required_bytes=128 * MIB, staging=STAGING, secrets={"passphrase": f"{SECRET}-wrong"})
    node.unpublish()
    locked.disk.opened_by_others = 1
    with pytest.raises(StorageUnavailable):
        node.unstage()
    locked.disk.opened_by_others = 0
    locked.luks.label = OTHER_UUID
    with pytest.raises(ContentRefused):
        node.stage(context=encrypted, secrets=secrets)
    reasons = {reason for _, reason, _ in node.reports.found}
    assert reasons == {EventReason.GROWS_AT_NEXT_MOUNT, EventReason.VOLUME_IN_USE, EventReason.CONTENT_REFUSED}
    assert SECRET not in repr(node.reports.found)
