# SPDX-License-Identifier: Apache-2.0
"""The limit of failed logins."""

from __future__ import annotations

import pytest

from csi_driver.status_page.login import _MOST_KEYS, LoginLimit, OpenSessions, network_of
from tests.fakes.clock import FakeClock


def test_the_pause_grows_up_to_its_limit_and_ends_with_a_success() -> None:
    clock = FakeClock()
    limit = LoginLimit(free=2, first_s=1.0, longest_s=8.0, clock=clock)
    assert limit.begin("a") == 0
    pauses = []
    for _ in range(6):
        assert limit.begin("a") == 0
        pauses.append(limit.begin("a"))
        clock.now_s += pauses[-1]
    assert pauses == [1, 2, 4, 8, 8, 8]
    limit.succeeded("a")
    assert [limit.begin("a") for _ in range(2)] == [0.0, 0.0]


def test_an_attempt_in_the_pause_does_not_make_it_longer() -> None:
    clock = FakeClock()
    limit = LoginLimit(free=1, clock=clock)
    assert limit.begin("a") == 0
    assert {limit.begin("a") for _ in range(1000)} == {1.0}
    clock.now_s = 1.0
    assert limit.begin("a") == 0


def test_failures_are_forgotten_after_a_time() -> None:
    clock = FakeClock()
    limit = LoginLimit(free=2, forget_s=100, clock=clock)
    limit.begin("a")
    clock.now_s = 101
    assert [limit.begin("a"), limit.begin("a") > 0] == [0.0, False]


def test_the_number_of_keys_is_bounded_and_the_oldest_go() -> None:
    limit = LoginLimit(free=1, clock=FakeClock())
    for number in range(10 * _MOST_KEYS):
        limit.begin(number)
    assert len(limit._failures) == _MOST_KEYS
    assert limit.begin(10 * _MOST_KEYS - 1) > 0


@pytest.mark.parametrize(("one", "other", "same"), [
    ("192.0.2.1", "192.0.2.2", False), ("192.0.2.1", "::ffff:192.0.2.1", True), ("2001:db8::1", "2001:db8::2", True),
    ("2001:db8::1", "2001:db8:0:1::1", False), ("fe80::1%eth0", "fe80::2", True), ("", "x", True),
])  # fmt: skip
def test_the_addresses_of_one_client_count_together(one: str, other: str, same: bool) -> None:
    assert (network_of(one) == network_of(other)) is same


def test_a_login_of_another_zone_does_not_make_the_session_of_the_first_longer() -> None:
    clock = FakeClock()
    sessions = OpenSessions(idle_s=1e9, clock=clock)
    first = sessions.open("zone-1")
    clock.now_s = 11 * 3600.0
    both = sessions.open("zone-2", first)
    assert sessions.find(both) is not None
    clock.now_s = 13 * 3600.0
    assert sessions.find(both) is None
