# SPDX-License-Identifier: Apache-2.0
"""Records of volumes that a node no longer has go; all others stay."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from csi_driver.node.mount_owner import Ownership
from csi_driver.node.usage_records import (
    ABSENT_S,
    MOST_AT_ONCE,
    NEWEST_KEPT,
    RAW,
    USED,
    RecordCleanup,
    UsageRecord,
    UsageRecords,
)
from tests.fakes.clock import FakeClock
from tests.fakes.node import NAME, UUID, FakeNode, FakeUsageRecords


@pytest.fixture
def node() -> FakeNode:
    node = FakeNode()
    node.host.attach(NAME, UUID)
    return node


@pytest.fixture
def clock() -> FakeClock:
    return FakeClock()


@pytest.fixture
def cleanup(node: FakeNode, clock: FakeClock) -> RecordCleanup:
    host = node.host
    ownership = Ownership(devices=host.devices, encryption=host.encryption, mounts=host.mounts)
    return RecordCleanup(
        records=node.records, devices=host.devices, mounts=host.mounts, ownership=ownership, clock=clock
    )


def churn(node: FakeNode, count: int = NEWEST_KEPT) -> None:
    """Let as many volumes come, be used and go."""
    for _ in range(count):
        uuid = f"gone-{len(node.records.kept)}"
        node.records.kept[uuid] = UsageRecord(uuid, 1, USED)


def after_long(cleanup: RecordCleanup, clock: FakeClock) -> int:
    """Look now, and once more when an hour has passed."""
    cleanup.sweep()
    clock.now_s += ABSENT_S
    return cleanup.sweep()


def test_the_oldest_records_of_volumes_long_gone_are_removed(
    node: FakeNode, cleanup: RecordCleanup, clock: FakeClock
) -> None:
    churn(node, NEWEST_KEPT + 7)
    assert after_long(cleanup, clock) == 7
    assert next(iter(node.records.kept)) == "gone-7"
    assert cleanup.sweep() == 0


@pytest.mark.parametrize("word", [USED, RAW])
def test_a_volume_whose_device_is_here_is_remembered(
    node: FakeNode, cleanup: RecordCleanup, clock: FakeClock, word: str
) -> None:
    node.records.kept[UUID] = UsageRecord(UUID, 1, word)
    churn(node)
    after_long(cleanup, clock)
    assert UUID in node.records.kept


def test_a_volume_that_is_mounted_is_remembered_also_when_its_device_is_gone(
    node: FakeNode, cleanup: RecordCleanup, clock: FakeClock
) -> None:
    node.stage()
    churn(node)
    node.host.detach(NAME)
    after_long(cleanup, clock)
    assert UUID in node.records.kept


def test_a_volume_that_was_here_at_one_look_of_the_hour_is_remembered(
    node: FakeNode, cleanup: RecordCleanup, clock: FakeClock
) -> None:
    node.records.kept[UUID] = UsageRecord(UUID, 1, USED)
    churn(node)
    disk = node.host.disks.pop(NAME)
    cleanup.sweep()
    clock.now_s += ABSENT_S / 2
    node.host.disks[NAME] = disk
    cleanup.sweep()
    del node.host.disks[NAME]
    clock.now_s += ABSENT_S / 2
    cleanup.sweep()
    assert UUID in node.records.kept
    assert after_long(cleanup, clock) == 1


def test_nothing_is_forgotten_while_the_storage_client_says_nothing(
    node: FakeNode, cleanup: RecordCleanup, clock: FakeClock
) -> None:
    churn(node, NEWEST_KEPT + 1)
    cleanup.sweep()
    client, node.host.client = node.host.client, None
    clock.now_s += ABSENT_S
    cleanup.sweep()
    node.host.client = client
    cleanup.sweep()
    assert len(node.records.kept) == NEWEST_KEPT + 1


def test_a_record_that_cannot_be_read_stays(node: FakeNode, clock: FakeClock, tmp_path: Path) -> None:
    host, marks = node.host, UsageRecords(tmp_path)
    torn = marks.path_of("torn")
    torn.parent.mkdir()
    torn.write_text("{")
    os.utime(torn, (1, 1))
    for number in range(NEWEST_KEPT + 1):
        marks.path_of(f"{number}").write_text(f'{{"volume": "{number}", "attachment": 1, "filesystem": "ext4"}}')
    ownership = Ownership(devices=host.devices, encryption=host.encryption, mounts=host.mounts)
    cleanup = RecordCleanup(records=marks, devices=host.devices, mounts=host.mounts, ownership=ownership, clock=clock)
    assert after_long(cleanup, clock) == 1
    assert marks.recorded()[0] == "torn"


def test_one_look_removes_a_bounded_number(node: FakeNode, cleanup: RecordCleanup, clock: FakeClock) -> None:
    churn(node, NEWEST_KEPT + MOST_AT_ONCE + 5)
    assert after_long(cleanup, clock) == MOST_AT_ONCE
    assert cleanup.sweep() == 5


class MarksOfAVolumeThatComesBack(FakeUsageRecords):
    @contextmanager
    def changing(self, *volume_uuids: str) -> Iterator[None]:
        self.host.attach(NAME, UUID)
        with super().changing(*volume_uuids):
            yield


def test_a_volume_that_comes_back_while_its_record_is_removed_keeps_it(node: FakeNode, clock: FakeClock) -> None:
    host, marks = node.host, MarksOfAVolumeThatComesBack(node.host, node.records.kept)
    ownership = Ownership(devices=host.devices, encryption=host.encryption, mounts=host.mounts)
    cleanup = RecordCleanup(records=marks, devices=host.devices, mounts=host.mounts, ownership=ownership, clock=clock)
    marks.kept[UUID] = UsageRecord(UUID, 1, USED)
    churn(node)
    host.detach(NAME)
    assert after_long(cleanup, clock) == 0
    assert UUID in marks.kept
