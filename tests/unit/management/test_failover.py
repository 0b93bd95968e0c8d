# SPDX-License-Identifier: Apache-2.0
"""Several servers: order, failover, and changes that are executed once."""

from __future__ import annotations

import logging
from concurrent.futures import ThreadPoolExecutor

import pytest

from csi_driver.deadline import Deadline
from csi_driver.errors import OutcomeUnknown, ServerUnreachable, StorageUnavailable, Unauthenticated
from csi_driver.management.transport import Request
from csi_driver.storage_model import Volume
from tests.unit.management.conftest import Connect
from tests.unit.management.double import Breaks, Hangs, ManagementDouble, Says, SaysRaw, closed_port, sample

INFO = "/systemInfo"
HANGS_S = 1.0
"""Timeout of requests to hanging servers, which tests count."""
VOLUME = Volume("v1", "74025fd0-e73d-11f1-a2b3-7550e9e5980f", 2441216, 4096, 10.0, "online", "none")
DONE = Says([{"_id": "v1", "uuid": VOLUME.uuid, "success": True, "error": None, "payload": None}])


@pytest.fixture(autouse=True)
def _info(server: ManagementDouble, other_server: ManagementDouble) -> None:
    for double in (server, other_server):
        double.on("GET", INFO, Says(sample("system-info")))
        double.on("POST", "/volumes/update", DONE)


def retired(number: int) -> Says:
    return Says({"_id": None, "uuid": None, "success": False, "error": {"id": number}, "payload": None}, 503)


def test_a_dead_server_is_skipped(other_server: ManagementDouble, connect: Connect, deadline: Deadline) -> None:
    client = connect(f"http://127.0.0.1:{closed_port()}", other_server.url)
    assert client.system_info(deadline=deadline).api_version == "18.0.0"


@pytest.mark.parametrize("number", [16268, 16269])
def test_a_change_goes_to_another_server_when_the_first_is_retired(
    server: ManagementDouble, other_server: ManagementDouble, connect: Connect, deadline: Deadline, number: int
) -> None:
    server.on("POST", "/volumes/update", retired(number))
    connect(server.url, other_server.url).set_metadata(VOLUME, {}, deadline=deadline)
    assert len(other_server.seen("/volumes/update")) == 1


@pytest.mark.parametrize("fault", [Breaks(), SaysRaw(b"<html>", 503)], ids=["broken", "503 without an id"])
def test_a_change_that_may_have_been_executed_goes_to_no_other_server(
    server: ManagementDouble,
    other_server: ManagementDouble,
    connect: Connect,
    deadline: Deadline,
    fault: Breaks | SaysRaw,
) -> None:
    server.on("POST", "/volumes/update", fault)
    with pytest.raises(OutcomeUnknown):
        connect(server.url, other_server.url).set_metadata(VOLUME, {}, deadline=deadline)
    assert not other_server.received


def test_a_read_goes_to_another_server_when_one_hangs(
    server: ManagementDouble, other_server: ManagementDouble, connect: Connect
) -> None:
    server.on("GET", INFO, Hangs())
    deadline = Deadline.after(3)  # far less than a request may take: half of it is the other server's
    assert connect(server.url, other_server.url).system_info(deadline=deadline).api_version == "18.0.0"


def test_a_hanging_server_is_not_used_again_at_once(
    server: ManagementDouble, other_server: ManagementDouble, connect: Connect, deadline: Deadline
) -> None:
    server.on("GET", INFO, Hangs())
    client = connect(server.url, other_server.url, request_timeout_s=HANGS_S)
    for _ in range(5):
        client.system_info(deadline=deadline)
    assert len(server.seen(INFO)) == 1


def test_without_a_working_server_a_request_fails_at_once(connect: Connect, deadline: Deadline) -> None:
    client = connect(f"http://127.0.0.1:{closed_port()}", f"http://localhost:{closed_port()}")
    with pytest.raises(ServerUnreachable):
        client.system_info(deadline=deadline)
    assert not deadline.expired()


def test_a_failed_server_is_tried_when_no_other_works(
    server: ManagementDouble, connect: Connect, deadline: Deadline
) -> None:
    client = connect(server.url, f"http://127.0.0.1:{closed_port()}")
    server.on("GET", INFO, Breaks(), Breaks(), Says(sample("system-info")))
    with pytest.raises(ServerUnreachable):
        client.system_info(deadline=deadline)
    server.on("GET", INFO, Says(sample("system-info")))
    assert client.system_info(deadline=deadline).api_version == "18.0.0"


# --- a server that hangs: its time-out is paid once -----------------------------------------------------


def test_the_requests_of_one_call_wait_for_a_hanging_server_once(
    server: ManagementDouble, other_server: ManagementDouble, connect: Connect, deadline: Deadline
) -> None:
    """Like CreateVolume: several requests, each after the end of a pause."""
    server.on("GET", INFO, Hangs())
    server.on("GET", "/volumes/count", Hangs())
    client = connect(server.url, other_server.url, request_timeout_s=HANGS_S)
    for _ in range(4):
        client.system_info(deadline=deadline)
        deadline.clock.sleep(0.4)  # twice is long enough for a probe to be due
    assert len(server.seen("/volumes/count")) == 1
    assert len(server.seen(INFO)) == 1


def test_a_change_does_not_wait_for_a_server_that_hangs(
    server: ManagementDouble, other_server: ManagementDouble, connect: Connect, deadline: Deadline
) -> None:
    server.on("GET", INFO, Hangs())
    server.on("GET", "/volumes/count", Hangs())
    client = connect(server.url, other_server.url, request_timeout_s=HANGS_S)
    client.system_info(deadline=deadline)
    client.set_metadata(VOLUME, {}, deadline=deadline)
    assert not server.seen("/volumes/update")


def test_the_only_server_is_waited_for_once_when_it_hangs(
    server: ManagementDouble, connect: Connect, deadline: Deadline
) -> None:
    server.on("GET", INFO, Hangs())
    server.on("GET", "/volumes/count", Hangs())
    client = connect(server.url, request_timeout_s=HANGS_S)
    with pytest.raises(OutcomeUnknown):
        client.system_info(deadline=deadline)
    for _ in range(3):
        with pytest.raises(ServerUnreachable, match="has not answered a probe since"):
            client.system_info(deadline=deadline)
    assert len(server.seen(INFO)) == 1


def test_each_of_several_hanging_servers_is_waited_for_once(
    server: ManagementDouble, other_server: ManagementDouble, connect: Connect, deadline: Deadline
) -> None:
    for double in (server, other_server):
        double.on("GET", INFO, Hangs())
        double.on("GET", "/volumes/count", Hangs())
    client = connect(server.url, other_server.url, request_timeout_s=HANGS_S)
    for _ in range(10):
        with pytest.raises(StorageUnavailable):
            client.system_info(deadline=deadline)
    assert (len(server.seen(INFO)), len(other_server.seen(INFO))) == (1, 1)


def test_queued_requests_leave_a_hanging_server(
    server: ManagementDouble, other_server: ManagementDouble, connect: Connect, deadline: Deadline
) -> None:
    server.on("GET", INFO, Says(sample("system-info")), Hangs())
    server.on("GET", "/volumes/count", Hangs())
    client = connect(server.url, other_server.url, request_timeout_s=HANGS_S, max_requests_in_flight=2)
    client.system_info(deadline=deadline)
    with ThreadPoolExecutor(20) as pool:
        list(pool.map(lambda _: client.system_info(deadline=deadline), range(20)))
    assert len(server.seen(INFO)) <= 3


def test_a_server_that_hangs_at_the_login_is_skipped(
    server: ManagementDouble, other_server: ManagementDouble, connect: Connect, deadline: Deadline
) -> None:
    server.login_answer = Hangs()
    client = connect(server.url, other_server.url, request_timeout_s=HANGS_S)
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda _: client.set_metadata(VOLUME, {}, deadline=deadline), range(8)))
    assert len(server.logins) == 1
    server.login_answer.until.set()


# --- coming back ----------------------------------------------------------------------------------------


def test_a_recovered_server_is_used_again(
    server: ManagementDouble, other_server: ManagementDouble, connect: Connect, deadline: Deadline
) -> None:
    server.on("GET", INFO, Breaks(), Says(sample("system-info")))
    client = connect(server.url, other_server.url)

    def is_back() -> bool:
        client.system_info(deadline=deadline)
        return len(server.seen(INFO)) > 1

    assert deadline.wait_until(is_back, first_s=0.05, most_s=0.1)


def test_the_only_server_is_used_as_soon_as_a_probe_succeeds(
    server: ManagementDouble, connect: Connect, deadline: Deadline
) -> None:
    hangs = Hangs()
    server.on("GET", INFO, hangs, Says(sample("system-info")))
    client = connect(server.url, request_timeout_s=HANGS_S)
    with pytest.raises(OutcomeUnknown):
        client.system_info(deadline=deadline)
    assert client.system_info(deadline=deadline).api_version == "18.0.0"


def test_a_server_that_answers_only_probes_delays_its_trial_requests_only(
    server: ManagementDouble, other_server: ManagementDouble, connect: Connect
) -> None:
    """It answers probes and no other request, so it gets trial requests only."""
    server.on("GET", INFO, Hangs())
    client = connect(server.url, other_server.url, request_timeout_s=HANGS_S)
    began = Deadline.after(120)
    for _ in range(6):
        client.system_info(deadline=began)
        began.clock.sleep(0.2)
    trials, left_s, rest_s = 1, began.elapsed_s(), 0.5
    while left_s > rest_s:  # the first, after 0.5 s, after another 1 s: a slow machine has time for more
        trials, left_s, rest_s = trials + 1, left_s - rest_s, 2 * rest_s
    assert len(server.seen(INFO)) <= trials


def test_a_failed_server_is_probed_when_the_other_one_fails(
    server: ManagementDouble, other_server: ManagementDouble, connect: Connect, deadline: Deadline
) -> None:
    """In the same request that finds the other one failed, although no probe was due yet."""
    server.on("GET", INFO, Hangs(), Says(sample("system-info")))
    client = connect(server.url, other_server.url, request_timeout_s=HANGS_S)
    client.system_info(deadline=deadline)
    other_server.on("GET", INFO, retired(16268))
    assert client.system_info(deadline=deadline).api_version == "18.0.0"


def test_a_change_is_never_the_trial_of_a_half_open_server(
    server: ManagementDouble, other_server: ManagementDouble, connect: Connect, deadline: Deadline
) -> None:
    server.on("GET", "/volumes/v1", Hangs())
    other_server.on("GET", "/volumes/v1", Says(sample("volume")))
    client = connect(server.url, other_server.url, request_timeout_s=HANGS_S)
    client.system_info(deadline=deadline)
    client.volume("v1", deadline=deadline)
    breaker = client._servers._servers[0].breaker

    def shows_life() -> bool:
        client._servers._servers[0].probe()
        return breaker.wait_for_probe(deadline)

    assert deadline.wait_until(shows_life)
    client.set_metadata(VOLUME, {}, deadline=Deadline.after(10))
    assert not server.seen("/volumes/update")


def test_a_trial_is_limited_to_seconds_while_other_servers_work(
    server: ManagementDouble, other_server: ManagementDouble, connect: Connect
) -> None:
    session = connect(server.url, other_server.url)._servers
    first = session._servers[0]
    deadline = Deadline.after(100)
    assert session._limit(first, deadline, has_others=True).remaining_s() > 25
    first.breaker.failed(0.01, timed_out=False)
    assert session._limit(first, deadline, has_others=True).remaining_s() < 6
    assert session._limit(first, deadline, has_others=False).remaining_s() > 25


def test_a_request_that_waited_gives_the_server_less_time_and_no_trial(
    server: ManagementDouble, other_server: ManagementDouble, connect: Connect
) -> None:
    session = connect(server.url, other_server.url)._servers
    first, second = session._servers
    made_wait = Deadline.after(100)
    first.breaker.failed(30, timed_out=True)
    assert first.breaker.take_probe(urgent=True)
    first.breaker.probe_ended(succeeded=True)
    assert session._limit(first, made_wait, has_others=False).remaining_s() < 11
    assert session._in_order(Request("GET", INFO), made_wait) == [second, first]
    later = Deadline.after(100)
    assert session._limit(first, later, has_others=False).remaining_s() > 25
    assert session._in_order(Request("GET", INFO), later) == [first, second]


def test_a_refused_login_closes_the_breaker(server: ManagementDouble, connect: Connect, deadline: Deadline) -> None:
    client = connect(server.url)
    breaker = client._servers._servers[0].breaker
    breaker.failed(0.01, timed_out=False)
    server.password = "another"
    with pytest.raises(Unauthenticated):
        client.system_info(deadline=deadline)
    assert breaker.is_closed()


def test_a_failure_and_its_end_are_logged_once(
    server: ManagementDouble, connect: Connect, deadline: Deadline, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "csi_driver")
    client = connect(server.url)
    client.system_info(deadline=deadline)
    caplog.clear()
    server.on("GET", INFO, Breaks())
    for _ in range(3):
        with pytest.raises(StorageUnavailable):
            client.system_info(deadline=deadline)
    server.on("GET", INFO, Says(sample("system-info")))
    for _ in range(3):
        client.system_info(deadline=deadline)
    told = [(record.levelname, record.getMessage()) for record in caplog.records]
    assert [level for level, _ in told] == ["WARNING", "INFO"]
    assert "failed, requests go to other servers" in told[0][1]
    assert "works again" in told[1][1]


@pytest.mark.parametrize("answer", [SaysRaw(b"<html>", 500), SaysRaw(b"<html>", 502), SaysRaw(b"<html>", 200)])
def test_a_read_with_an_invalid_response_goes_to_another_server(
    server: ManagementDouble, other_server: ManagementDouble, connect: Connect, deadline: Deadline, answer: SaysRaw
) -> None:
    server.on("GET", "/volumes/v1", answer)
    other_server.on("GET", "/volumes/v1", Says(sample("volume")))
    assert connect(server.url, other_server.url).volume("v1", deadline=deadline) is not None
