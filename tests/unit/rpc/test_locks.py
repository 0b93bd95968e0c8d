"""What two calls may not work on at once."""

from __future__ import annotations

from contextlib import ExitStack

import pytest
from hypothesis import given
from hypothesis import strategies as st

from csi_driver.errors import OperationPending
from csi_driver.rpc.contract import LockKey, LockKeys, Locks

UUID = "01234567-89ab-cdef-0123-456789abcdef"
KEYS = LockKeys(lambda name: f"csi-{name}")

SPELLINGS = ["csi-1", "zone-1:csi-1", f"zone-1:csi-1:{UUID}", f"zone-1:csi-1:{UUID}:namespace"]


def conflict(first: LockKey, second: LockKey) -> bool:
    locks = Locks()
    with locks.hold(first):
        try:
            with locks.hold(second):
                return False
        except OperationPending:
            return True


@pytest.mark.parametrize("one", SPELLINGS)
@pytest.mark.parametrize("other", SPELLINGS)
def test_all_spellings_of_a_handle_are_one_volume(one: str, other: str) -> None:
    assert conflict(KEYS.volume(one), KEYS.volume(other))


def test_another_volume_does_not_conflict() -> None:
    assert not conflict(KEYS.volume("csi-1"), KEYS.volume("csi-2"))


def test_a_renamed_zone_is_the_same_volume() -> None:
    assert conflict(KEYS.volume("zone-1:csi-1"), KEYS.volume(f"single-zone-cluster:csi-1:{UUID}"))


@pytest.mark.parametrize("handle", SPELLINGS)
def test_creation_conflicts_with_work_on_its_volume(handle: str) -> None:
    assert conflict(KEYS.for_field("name", "1"), KEYS.volume(handle))


def test_creation_conflicts_with_work_on_its_volume_in_any_zone() -> None:
    assert conflict(KEYS.volume("zone-2:csi-1"), KEYS.for_field("name", "1"))


def test_creations_of_one_name_conflict_and_of_two_do_not() -> None:
    assert conflict(KEYS.for_field("name", "1"), KEYS.for_field("name", "1"))
    assert not conflict(KEYS.for_field("name", "1"), KEYS.for_field("name", "2"))


def test_shared_locks_exclude_an_exclusive_one() -> None:
    shared, alone = KEYS.volume("csi-1", shared=True), KEYS.volume("csi-1")
    assert not conflict(shared, shared)
    assert conflict(shared, alone)
    assert conflict(alone, shared)


def test_all_spellings_of_a_path_are_one_lock() -> None:
    assert conflict(KEYS.for_field("target_path", "/a/b"), KEYS.for_field("target_path", "/a/./c/../b/"))


def test_an_unknown_handle_conflicts_with_itself() -> None:
    assert conflict(KEYS.volume("no handle\n"), KEYS.volume("no handle\n"))


def test_locks_are_released_when_the_work_fails() -> None:
    locks = Locks()
    with pytest.raises(ZeroDivisionError), locks.hold(KEYS.volume("csi-1")):
        raise ZeroDivisionError
    assert locks.held() == 0


def test_a_refused_call_holds_no_lock() -> None:
    locks = Locks()
    with locks.hold(KEYS.for_field("target_path", "/a")):
        with pytest.raises(OperationPending), locks.hold(KEYS.volume("csi-1"), KEYS.for_field("target_path", "/a")):
            pass
        with locks.hold(KEYS.volume("csi-1")):
            pass


@given(st.lists(st.tuples(st.sampled_from(["csi-1", "z:csi-1", "csi-2"]), st.booleans()), max_size=8))
def test_no_lock_is_left_behind(wanted: list[tuple[str, bool]]) -> None:
    locks = Locks()
    with ExitStack() as stack:
        for volume_id, shared in wanted:
            try:
                stack.enter_context(locks.hold(KEYS.volume(volume_id, shared=shared)))
            except OperationPending:
                continue
    assert locks.held() == 0
