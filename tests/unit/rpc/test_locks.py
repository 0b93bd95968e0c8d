# SPDX-License-Identifier: Apache-2.0
"""What two calls may not work on at once."""

from __future__ import annotations

from contextlib import ExitStack

import pytest
from google.protobuf.message import Message
from hypothesis import given
from hypothesis import strategies as st

from csi_driver.errors import OperationPending
from csi_driver.model import group_snapshot_name, snapshot_name, volume_name
from csi_driver.rpc.contract import RPCS, LockKey, Locks, lock_key
from csi_driver.rpc.pb import csi_pb2

UUID = "01234567-89ab-cdef-0123-456789abcdef"
NAME, OTHER = volume_name("1"), volume_name("2")

SPELLINGS = [NAME, f"zone-1:{NAME}", f"zone-1:{NAME}:{UUID}", f"zone-1:{NAME}:{UUID}:namespace"]


def conflict(first: LockKey, second: LockKey) -> bool:
    locks = Locks()
    with locks.hold(first):
        try:
            with locks.hold(second):
                return False
        except OperationPending:
            return True


def assert_free(locks: Locks) -> None:
    for name in (NAME, OTHER):
        with locks.hold(lock_key("volume_id", name)):
            pass


@pytest.mark.parametrize("one", SPELLINGS)
@pytest.mark.parametrize("other", SPELLINGS)
def test_all_spellings_of_a_handle_are_one_volume(one: str, other: str) -> None:
    assert conflict(lock_key("volume_id", one), lock_key("volume_id", other))


def test_another_volume_does_not_conflict() -> None:
    assert not conflict(lock_key("volume_id", NAME), lock_key("volume_id", OTHER))


def test_a_renamed_zone_is_the_same_volume() -> None:
    renamed = lock_key("volume_id", f"single-zone-cluster:{NAME}:{UUID}")
    assert conflict(lock_key("volume_id", f"zone-1:{NAME}"), renamed)


@pytest.mark.parametrize("handle", SPELLINGS)
def test_creation_conflicts_with_work_on_its_volume(handle: str) -> None:
    assert conflict(lock_key("name", "1"), lock_key("volume_id", handle))


def test_creation_conflicts_with_work_on_its_volume_in_any_zone() -> None:
    assert conflict(lock_key("volume_id", f"zone-2:{NAME}"), lock_key("name", "1"))


def test_creations_of_one_name_conflict_and_of_two_do_not() -> None:
    assert conflict(lock_key("name", "1"), lock_key("name", "1"))
    assert not conflict(lock_key("name", "1"), lock_key("name", "2"))


def test_shared_locks_exclude_an_exclusive_one() -> None:
    shared, alone = lock_key("volume_id", NAME, shared=True), lock_key("volume_id", NAME)
    assert not conflict(shared, shared)
    assert conflict(shared, alone)
    assert conflict(alone, shared)


def test_all_spellings_of_a_path_are_one_lock() -> None:
    assert conflict(lock_key("target_path", "/a/b"), lock_key("target_path", "/a/./c/../b/"))


def test_an_unknown_handle_conflicts_with_itself() -> None:
    assert conflict(lock_key("volume_id", "no handle\n"), lock_key("volume_id", "no handle\n"))


def test_locks_are_released_when_the_work_fails() -> None:
    locks = Locks()
    with pytest.raises(ZeroDivisionError), locks.hold(lock_key("volume_id", NAME)):
        raise ZeroDivisionError
    assert_free(locks)


def test_a_refused_call_holds_no_lock() -> None:
    locks = Locks()
    with locks.hold(lock_key("target_path", "/a")):
        with pytest.raises(OperationPending), locks.hold(lock_key("volume_id", NAME), lock_key("target_path", "/a")):
            pass
        with locks.hold(lock_key("volume_id", NAME)):
            pass


@given(st.lists(st.tuples(st.sampled_from([NAME, f"z:{NAME}", OTHER]), st.booleans()), max_size=8))
def test_no_lock_is_left_behind(wanted: list[tuple[str, bool]]) -> None:
    locks = Locks()
    with ExitStack() as stack:
        for volume_id, shared in wanted:
            try:
                stack.enter_context(locks.hold(lock_key("volume_id", volume_id, shared=shared)))
            except OperationPending:
                continue
    assert_free(locks)


# --- snapshots --------------------------------------------------------------------------------------------------


def keys(method: str, request: Message) -> tuple[LockKey, ...]:
    return RPCS[f"/csi.v1.{method}"].lock_keys(request)


def cut(name: str, source: str = NAME) -> tuple[LockKey, ...]:
    return keys("Controller/CreateSnapshot", csi_pb2.CreateSnapshotRequest(name=name, source_volume_id=source))


def group(name: str, *sources: str) -> tuple[LockKey, ...]:
    request = csi_pb2.CreateVolumeGroupSnapshotRequest(name=name, source_volume_ids=sources)
    return keys("GroupController/CreateVolumeGroupSnapshot", request)


def clash(ours: tuple[LockKey, ...], theirs: tuple[LockKey, ...]) -> bool:
    """Return whether two calls with these keys exclude each other."""
    locks = Locks()
    with locks.hold(*ours):
        try:
            with locks.hold(*theirs):
                return False
        except OperationPending:
            return True


def test_snapshots_of_one_volume_are_cut_at_once_but_not_two_of_one_name() -> None:
    assert not clash(cut("s1"), cut("s2"))
    assert clash(cut("s1"), cut("s1", OTHER))


def test_a_cut_excludes_all_other_changes_of_its_volume() -> None:
    volume = (lock_key("volume_id", f"z:{NAME}"),)
    assert clash(cut("s1"), volume)
    assert clash(group("g", OTHER, NAME), volume)
    assert not clash(cut("s1", OTHER), volume)


def test_a_snapshot_is_locked_by_its_name_and_by_its_id() -> None:
    delete = csi_pb2.DeleteSnapshotRequest(snapshot_id=f"z:{snapshot_name('s1')}:{UUID}")
    assert clash(cut("s1"), keys("Controller/DeleteSnapshot", delete))


def test_a_group_is_locked_by_its_name_and_by_its_id() -> None:
    group_id = f"z:{group_snapshot_name('g')}:{UUID}"
    request = csi_pb2.DeleteVolumeGroupSnapshotRequest(group_snapshot_id=group_id)
    assert clash(group("g", NAME), keys("GroupController/DeleteVolumeGroupSnapshot", request))


def test_a_volume_named_twice_in_a_group_does_not_exclude_itself() -> None:
    assert not clash(group("g", NAME, NAME), ())
