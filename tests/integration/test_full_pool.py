# SPDX-License-Identifier: Apache-2.0
"""Snapshots and copies when the pool has no space for them: they are refused, never the writers of a volume."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import pytest

from csi_driver.rpc.client import CallFailed
from tests.integration.rig import MIB, Rig, Volume, raw_block, wait_for
from tests.reflink_pool import fill, mounted

pytestmark = pytest.mark.root

VOLUME_BYTES = 1_000_341_504
WRITTEN_MIB = 200


@pytest.fixture
def rig(tmp_path: Path) -> Iterator[Rig]:
    """A rig without overcommitment on an xfs of 3 GiB."""
    with mounted(tmp_path, size_mib=3072) as place:
        (place / "d").mkdir()
        rig = Rig(place / "d")
        rig.flags = ()
        try:
            rig.start()
            yield rig
        finally:
            rig.close()


def rewrite(volume: Volume, mib: int = WRITTEN_MIB) -> None:
    """Write the first so many MiB of a raw block volume anew; a full pool would fail it."""
    with volume.target.open("r+b", buffering=0) as device:
        for _ in range(mib):
            device.write(os.urandom(MIB))
        os.fsync(device.fileno())


def refusals(calls: Sequence[Callable[[], object]]) -> list[str]:
    """Return the code of each call, all of which are refused; the messages name what is missing."""
    found = []
    for call in calls:
        with pytest.raises(CallFailed) as refused:
            call()
        assert "bytes" in refused.value.message or "ENOSPC" in refused.value.message, refused.value
        found.append(refused.value.code)
    return found


def if_possible(call: Callable[[], str]) -> str:
    """Return the id that the call returns, "" when there is no space for it."""
    try:
        return call()
    except CallFailed as refusal:
        if refusal.code != "RESOURCE_EXHAUSTED":
            raise
        return ""


def soon(call: Callable[[], str]) -> str:
    """Repeat the call until xfs has freed the blocks of what was removed, which it does in the background."""
    wait_for(lambda: if_possible(call), "space")
    return call()


def cut_of(volume: Volume, name: str) -> str:
    return volume.rig.controller.cut(name, volume.id).snapshot_id


def made_from(volume: Volume, snapshot_id: str, name: str) -> str:
    made = volume.rig.controller.create_volume(
        name, required_bytes=VOLUME_BYTES, capabilities=[volume.capability], snapshot=snapshot_id
    )
    return made.volume_id


def test_cuts_are_refused_before_a_writer_runs_out_of_space(rig: Rig) -> None:
    """All data of the volume is written anew after each cut, which is what the pool keeps space for."""
    volume, cuts = rig.volume(raw_block(), size=VOLUME_BYTES), list[str]()
    other = rig.volume(raw_block(), size=VOLUME_BYTES)
    volume.up()
    rewrite(volume)
    while cut := if_possible(lambda: cut_of(volume, f"cut-{len(cuts)}")):
        cuts.append(cut)
        rewrite(volume)
    assert len(cuts) >= 2
    again = f"cut-{len(cuts)}"
    refused = refusals(
        [
            lambda: rig.controller.cut(again, volume.id),
            lambda: rig.controller.cut_group("group", [volume.id]),
            lambda: made_from(volume, cuts[0], "copy"),
        ]
    )
    assert refused == ["RESOURCE_EXHAUSTED"] * 3
    assert [each.snapshot_id for each in rig.controller.snapshots()] == sorted(cuts)
    rewrite(volume)
    rig.controller.delete_snapshot(cuts.pop())
    cuts.append(soon(lambda: cut_of(volume, again)))
    rewrite(volume)
    other.delete()
    for each in cuts[1:]:
        rig.controller.delete_snapshot(each)
    rig.controller.delete_volume(soon(lambda: made_from(volume, cuts[0], "copy")))
    rewrite(volume)
    rig.controller.delete_snapshot(cuts[0])
    volume.end()


def test_on_a_filesystem_that_others_filled_all_is_refused_until_they_are_gone(rig: Rig) -> None:
    volume = rig.volume(raw_block(), size=VOLUME_BYTES)
    volume.up()
    rewrite(volume)
    first = rig.controller.cut("first", volume.id).snapshot_id
    rewrite(volume)
    ballast = fill(rig.directory.parent)
    refused = refusals(
        [
            lambda: rig.controller.cut("second", volume.id),
            lambda: rig.controller.cut_group("group", [volume.id]),
            lambda: made_from(volume, first, "copy"),
        ]
    )
    assert refused == ["RESOURCE_EXHAUSTED"] * 3
    rewrite(volume)
    rig.controller.delete_snapshot(first)
    rewrite(volume)
    ballast.unlink()
    rig.controller.delete_snapshot(soon(lambda: cut_of(volume, "second")))
    group = rig.controller.cut_group("group", [volume.id])
    copy = soon(lambda: made_from(volume, group.snapshots[0].snapshot_id, "copy"))
    rewrite(volume)
    rig.controller.delete_volume(copy)
    rig.controller.delete_group(group)
    volume.end()
