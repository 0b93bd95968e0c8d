# SPDX-License-Identifier: Apache-2.0
"""The comparison of two maps, where no filesystem can be made to give them."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from csi_driver.embedded.changed_blocks import ChangedBlocks, differences
from csi_driver.embedded.documents import NOT_SUPPORTED, SOURCE_BUSY, ApiError
from csi_driver.embedded.layouts import Layout
from csi_driver.embedded.model import NO_ACTION, SNAPSHOTS, Snapshot
from csi_driver.embedded.pool import Pool
from csi_driver.embedded.requests import ChangesQuery
from csi_driver.embedded.store import Store
from csi_driver.host_model import Extent
from tests.unit.embedded.fake_reflinks import FakeReflinks

UUIDS = ("11111111-1111-1111-1111-111111111111", "22222222-2222-2222-2222-222222222222")


@dataclass(slots=True)
class Moving(FakeReflinks):
    """Maps that differ from one look to the next, as while a filesystem is defragmented."""

    maps: Callable[[int], Sequence[Extent]] = lambda look: ()
    looks: int = field(default=0)

    def extents(self, fd: int, offset: int, most: int) -> list[Extent]:
        self.looks += 1
        return list(self.maps(self.looks))

    def why_not_comparable(self, fd: int) -> str:
        return ""


def compare(tmp_path: Path, reflinks: FakeReflinks) -> object:
    pool, store = Pool(tmp_path / "pool", reflinks=reflinks), Store(tmp_path / "db")
    try:
        for name, identity in zip("ab", UUIDS, strict=True):
            pool.snapshot_file(identity).write_bytes(os.urandom(16))
            snapshot = Snapshot(name, identity, "v", UUIDS[0], 4, Layout(), {}, action=NO_ACTION)
            store.write(lambda change, name=name, snapshot=snapshot: change.put(SNAPSHOTS, name, snapshot))  # type: ignore[misc]
        query = ChangesQuery.model_validate({"uuid": UUIDS[0], "base": "b", "baseUuid": UUIDS[1]})
        return ChangedBlocks(store, pool, reflinks).page("a", query)["ranges"]
    finally:
        store.close()
        pool.close()


def test_blocks_whose_address_is_unknown_have_changed() -> None:
    unknown, known = [Extent(0, 8, None)], [Extent(0, 8, 100)]
    assert list(differences(unknown, unknown, 0, 8)) == [(0, 8)]
    assert list(differences(known, unknown, 0, 8)) == [(0, 8)]
    assert list(differences(unknown, known, 0, 8)) == [(0, 8)]


def test_maps_that_change_while_they_are_read_are_read_again(tmp_path: Path) -> None:
    before, after = [Extent(0, 4096, 4096)], [Extent(0, 4096, 8192)]
    # Looks at a, b, a: b got the block that a had at the first look, and so they seem to be one.
    looks = {1: before, 2: before, 3: after, 4: after, 5: before, 6: after}
    assert compare(tmp_path, Moving(maps=lambda look: looks[look])) == [[0, 4096]]


def test_blocks_that_never_rest_are_not_compared(tmp_path: Path) -> None:
    with pytest.raises(ApiError) as refusal:
        compare(tmp_path, Moving(maps=lambda look: [Extent(0, 4096, 4096 * look)]))
    assert refusal.value.error["id"] == SOURCE_BUSY


def test_a_filesystem_whose_addresses_prove_nothing_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ApiError, match="the fake's extents have no addresses") as refusal:
        compare(tmp_path, FakeReflinks())
    assert refusal.value.error["id"] == NOT_SUPPORTED
