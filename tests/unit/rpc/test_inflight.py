"""What two calls may not work on at once."""

from __future__ import annotations

from contextlib import ExitStack

import pytest
from hypothesis import given
from hypothesis import strategies as st

from csi_driver.errors import OperationPending
from csi_driver.rpc.inflight import Claim, Claims, InFlight

UUID = "01234567-89ab-cdef-0123-456789abcdef"
CLAIMS = Claims(lambda name: f"csi-{name}")

SPELLINGS = ["csi-1", "zone-1:csi-1", f"zone-1:csi-1:{UUID}", f"zone-1:csi-1:{UUID}:namespace"]


def conflict(first: tuple[Claim, ...], second: tuple[Claim, ...]) -> bool:
    in_flight = InFlight()
    with in_flight.holding(first):
        try:
            with in_flight.holding(second):
                return False
        except OperationPending:
            return True


@pytest.mark.parametrize("one", SPELLINGS)
@pytest.mark.parametrize("other", SPELLINGS)
def test_every_spelling_of_a_handle_is_the_same_volume(one: str, other: str) -> None:
    assert conflict(CLAIMS.volume(one), CLAIMS.volume(other))


def test_another_volume_does_not_conflict() -> None:
    assert not conflict(CLAIMS.volume("csi-1"), CLAIMS.volume("csi-2"))


def test_a_zone_by_another_name_makes_no_other_volume() -> None:
    assert conflict(CLAIMS.volume("zone-1:csi-1"), CLAIMS.volume(f"single-zone-cluster:csi-1:{UUID}"))


@pytest.mark.parametrize("handle", SPELLINGS)
def test_creation_conflicts_with_work_on_the_volume_that_it_makes(handle: str) -> None:
    assert conflict(CLAIMS.creation("1"), CLAIMS.volume(handle))


def test_creation_conflicts_with_work_on_its_volume_in_any_zone() -> None:
    assert conflict(CLAIMS.volume("zone-2:csi-1"), CLAIMS.creation("1"))


def test_creations_of_one_name_conflict_and_of_two_do_not() -> None:
    assert conflict(CLAIMS.creation("1"), CLAIMS.creation("1"))
    assert not conflict(CLAIMS.creation("1"), CLAIMS.creation("2"))


def test_shared_claims_go_together_and_exclude_the_lone_one() -> None:
    shared, alone = CLAIMS.volume("csi-1", shared=True), CLAIMS.volume("csi-1")
    assert not conflict(shared, shared)
    assert conflict(shared, alone)
    assert conflict(alone, shared)


def test_a_path_is_the_same_however_it_is_spelled() -> None:
    assert conflict(CLAIMS.path("/a/b"), CLAIMS.path("/a/./c/../b/"))


def test_a_strange_handle_conflicts_with_itself() -> None:
    assert conflict(CLAIMS.volume("no handle\n"), CLAIMS.volume("no handle\n"))


def test_claims_are_given_back_when_the_work_fails() -> None:
    in_flight = InFlight()
    with pytest.raises(ZeroDivisionError), in_flight.holding(CLAIMS.volume("csi-1")):
        raise ZeroDivisionError
    assert in_flight.held() == 0


def test_a_refused_call_holds_nothing() -> None:
    in_flight = InFlight()
    with in_flight.holding(CLAIMS.path("/a")):
        with pytest.raises(OperationPending), in_flight.holding((*CLAIMS.volume("csi-1"), *CLAIMS.path("/a"))):
            pass
        with in_flight.holding(CLAIMS.volume("csi-1")):
            pass


@given(st.lists(st.tuples(st.sampled_from(["csi-1", "z:csi-1", "csi-2"]), st.booleans()), max_size=8))
def test_whatever_was_taken_nothing_is_left(wanted: list[tuple[str, bool]]) -> None:
    in_flight = InFlight()
    with ExitStack() as stack:
        for volume_id, shared in wanted:
            try:
                stack.enter_context(in_flight.holding(CLAIMS.volume(volume_id, shared=shared)))
            except OperationPending:
                continue
    assert in_flight.held() == 0


@pytest.mark.parametrize("volume_id", ["csi-1", "z1:csi-1", "z2:csi-1:0a6f1c1e-9d1b-4b7e-8f6b-3f1d2c5b7a90"])
@pytest.mark.parametrize("shared", [False, True])
def test_a_name_kept_for_oneself_excludes_every_call_about_it(volume_id: str, shared: bool) -> None:
    claims, in_flight = Claims(lambda name: name), InFlight()
    with in_flight.holding(claims.named("csi-1")), pytest.raises(OperationPending):
        in_flight.holding(claims.volume(volume_id, shared=shared)).__enter__()
    with in_flight.holding(claims.volume(volume_id, shared=shared)), pytest.raises(OperationPending):
        in_flight.holding(claims.named("csi-1")).__enter__()
    with in_flight.holding(claims.named("csi-2")), in_flight.holding(claims.volume(volume_id, shared=shared)):
        assert in_flight.held() > 1
