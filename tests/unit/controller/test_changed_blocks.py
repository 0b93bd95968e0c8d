# SPDX-License-Identifier: Apache-2.0
"""Offsets of changed blocks: those of the device that a pod sees."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any, cast

import pytest

from csi_driver.controller.changed_blocks import ChangedBlocks
from csi_driver.controller.snapshots import FoundSnapshot
from csi_driver.controller.volume_metadata import Creation, creation_metadata
from csi_driver.deadline import Deadline
from csi_driver.errors import CapacityOutOfRange
from csi_driver.model import GIB, MIB
from csi_driver.storage_model import ChangedRanges, Snapshot, StorageEncryption

UUID = "11111111-1111-1111-1111-111111111111"
HEADER = 16 * MIB


@dataclass
class Storage:
    """Snapshots of one volume, and the pages of its changes."""

    snapshot: Snapshot
    asked: list[tuple[int, int]] = field(default_factory=list)

    def find(self, snapshot_id: str, *, deadline: Deadline) -> FoundSnapshot:
        return FoundSnapshot("z", cast("Any", self), self.snapshot)

    @property
    def features(self) -> Storage:
        return self

    def require(self, zone: str, feature: str, *, deadline: Deadline) -> None:
        assert (zone, feature) == ("z", "changed_blocks")

    def changed_ranges(
        self, target: Snapshot, base: Snapshot | None, *, offset: int, count: int, deadline: Deadline
    ) -> ChangedRanges:
        self.asked.append((offset, count))
        if len(self.asked) == 1:
            return ChangedRanges(((offset, 4096),), offset + MIB, target.size_bytes)
        return ChangedRanges((), None, target.size_bytes)


def storage(encryption: StorageEncryption | None = None, metadata: Mapping[str, object] | None = None) -> Storage:
    now = datetime.now(UTC)
    return Storage(
        Snapshot("s", UUID, "v", UUID, GIB + HEADER, now, source_metadata=metadata or {}, encryption=encryption)
    )


def changed(made: Storage) -> ChangedBlocks:
    return ChangedBlocks(cast("Any", made))


BY_NODE = creation_metadata(Creation(csi_name="pvc", is_ours=True, header_bytes=HEADER))


@pytest.mark.parametrize(
    "made",
    [storage(StorageEncryption(HEADER, is_initialized=True)), storage(metadata=BY_NODE)],
    ids=["storage", "node"],
)
def test_offsets_are_those_behind_a_luks_header(made: Storage) -> None:
    size_bytes, pages = changed(made).delta("a", "b", 8192, 7, deadline=Deadline.after(10))
    assert list(pages) == [[(8192, 4096)]]
    assert size_bytes == GIB
    assert made.asked == [(HEADER + 8192, 7), (HEADER + 8192 + MIB, 7)]


def test_a_stream_is_resumed_at_the_end_and_not_behind_it() -> None:
    made = changed(storage(metadata=BY_NODE))
    assert made.allocated("a", GIB, 0, deadline=Deadline.after(10))[0] == GIB
    with pytest.raises(CapacityOutOfRange):
        made.allocated("a", GIB + 1, 0, deadline=Deadline.after(10))


@pytest.mark.parametrize(("most", "asked"), [(0, 4096), (1_000_000, 4096), (5, 5)])
def test_a_message_has_no_more_ranges_than_asked_for_and_fit(most: int, asked: int) -> None:
    made = storage()
    list(changed(made).allocated("a", 0, most, deadline=Deadline.after(10))[1])
    assert {count for _, count in made.asked} == {asked}
