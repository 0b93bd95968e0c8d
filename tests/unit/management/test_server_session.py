# SPDX-License-Identifier: Apache-2.0
"""Login, expiry, deadlines and faults on one server."""

from __future__ import annotations

import logging
import re
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import FrameType

import pytest

from csi_driver.deadline import Deadline
from csi_driver.errors import (
    DeadlineReached,
    Denied,
    DriverError,
    InvalidRequest,
    OutcomeUnknown,
    ServerUnreachable,
    StorageUnavailable,
    Unauthenticated,
)
from csi_driver.management.client import ManagementClient
from csi_driver.storage_model import Volume
from tests.unit.management.conftest import Connect
from tests.unit.management.double import (
    PASSWORD,
    Breaks,
    Drips,
    Hangs,
    ManagementDouble,
    Says,
    SaysRaw,
    Waits,
    closed_port,
    sample,
)

LONG_S = 20.0
"""Far below the limit of a request, and far above the delays of a busy machine."""

INFO = "/systemInfo"
VOLUME = Volume("v1", "74025fd0-e73d-11f1-a2b3-7550e9e5980f", 2441216, 4096, 10.0, "online", "none")
DELETED = Says([{"_id": "v1", "uuid": VOLUME.uuid, "success": True, "error": None, "payload": None}])


def envelope(number: int, status: int = 200) -> Says:
    return Says({"_id": None, "uuid": None, "success": False, "error": {"id": number}, "payload": None}, status)


@pytest.fixture(autouse=True)
def _info(server: ManagementDouble) -> None:
    server.on("GET", INFO, Says(sample("system-info")))


# --- login ----------------------------------------------------------------------------------------------


def test_the_first_request_logs_in(server: ManagementDouble, client: ManagementClient, deadline: Deadline) -> None:
    assert client.system_info(deadline=deadline).api_version == "18.0.0"
    assert len(server.logins) == 1


def test_later_requests_use_the_same_session(
    server: ManagementDouble, client: ManagementClient, deadline: Deadline
) -> None:
    for _ in range(5):
        client.system_info(deadline=deadline)
    assert len(server.logins) == 1


def test_every_request_accepts_json(server: ManagementDouble, client: ManagementClient, deadline: Deadline) -> None:
    client.system_info(deadline=deadline)
    assert server.received[0].headers["Accept"] == "application/json"


@pytest.mark.parametrize("expired", [SaysRaw(b"Found", 302, location="/login"), envelope(1267)], ids=["302", "1267"])
def test_an_expired_session_is_renewed(
    server: ManagementDouble, client: ManagementClient, deadline: Deadline, expired: Says | SaysRaw
) -> None:
    server.expires_as = expired
    client.system_info(deadline=deadline)
    server.expire_sessions()
    client.system_info(deadline=deadline)
    assert len(server.logins) == 2


def test_a_change_in_an_expired_session_is_executed_once(
    server: ManagementDouble, client: ManagementClient, deadline: Deadline
) -> None:
    server.on("POST", "/volumes/update", DELETED)
    client.system_info(deadline=deadline)
    server.expire_sessions()
    client.set_metadata(VOLUME, {}, deadline=deadline)
    assert len(server.seen("/volumes/update")) == 1


def test_a_server_that_forgets_its_sessions_gets_two_logins(
    server: ManagementDouble, client: ManagementClient, deadline: Deadline
) -> None:
    server.on("GET", INFO, SaysRaw(b"", 302, location="/login"))
    with pytest.raises(ServerUnreachable):
        client.system_info(deadline=deadline)
    assert len(server.logins) == 2


def test_many_threads_log_in_once(server: ManagementDouble, client: ManagementClient, deadline: Deadline) -> None:
    with ThreadPoolExecutor(16) as pool:
        list(pool.map(lambda _: client.system_info(deadline=deadline), range(64)))
    assert len(server.logins) == 1


def test_many_threads_renew_an_expired_session_once(
    server: ManagementDouble, client: ManagementClient, deadline: Deadline
) -> None:
    client.system_info(deadline=deadline)
    server.expire_sessions()
    with ThreadPoolExecutor(16) as pool:
        list(pool.map(lambda _: client.system_info(deadline=deadline), range(64)))
    assert len(server.logins) == 2


def test_a_wrong_password_is_reported_with_its_file(
    server: ManagementDouble, client: ManagementClient, deadline: Deadline, password_file: Path
) -> None:
    server.password = "another"
    with pytest.raises(Unauthenticated, match=str(password_file)):
        client.system_info(deadline=deadline)


def test_a_rotated_password_is_read_at_the_next_login(
    server: ManagementDouble, client: ManagementClient, deadline: Deadline, password_file: Path
) -> None:
    client.system_info(deadline=deadline)
    server.password = "rotated"
    password_file.write_text("rotated")
    server.expire_sessions()
    assert client.system_info(deadline=deadline).version == "3.5.0-1.local"


@pytest.mark.parametrize("content", [None, b"", b"\xff\xfe"], ids=["missing", "empty", "binary"])
def test_a_password_file_without_a_password_is_named(
    client: ManagementClient, deadline: Deadline, password_file: Path, content: bytes | None
) -> None:
    password_file.unlink()
    if content is not None:
        password_file.write_bytes(content)
    with pytest.raises(Unauthenticated, match=str(password_file)):
        client.system_info(deadline=deadline)


def test_a_forced_password_change_is_explained(
    server: ManagementDouble, client: ManagementClient, deadline: Deadline
) -> None:
    server.on("GET", INFO, envelope(1268))
    with pytest.raises(Unauthenticated, match="changePassword"):
        client.system_info(deadline=deadline)


def test_a_login_without_a_cookie_fails(server: ManagementDouble, client: ManagementClient, deadline: Deadline) -> None:
    server.login_answer = Says({"success": True, "error": None})
    with pytest.raises(StorageUnavailable, match="got HTTP 200 without one"):
        client.system_info(deadline=deadline)


def test_after_a_broken_login_the_change_is_not_sent(
    server: ManagementDouble, client: ManagementClient, deadline: Deadline
) -> None:
    server.login_answer = Breaks()
    with pytest.raises(ServerUnreachable):
        client.set_metadata(VOLUME, {}, deadline=deadline)


def in_login() -> int:
    """Count the threads in a login, or waiting for one."""
    return sum("_open" in names_on_stack(frame) for frame in sys._current_frames().values())


def names_on_stack(frame: FrameType | None) -> set[str]:
    names: set[str] = set()
    while frame is not None:
        names.add(frame.f_code.co_name)
        frame = frame.f_back
    return names


def test_all_waiting_requests_share_a_failed_login(
    server: ManagementDouble, client: ManagementClient, deadline: Deadline
) -> None:
    refusal = Waits(Says({"success": False, "error": "no"}, 401))
    server.login_answer = refusal

    def ask(_: int) -> None:
        with pytest.raises(Unauthenticated):
            client.system_info(deadline=deadline)

    with ThreadPoolExecutor(16) as pool:
        asked = pool.map(ask, range(16))
        assert deadline.wait_until(lambda: in_login() == 16)
        refusal.until.set()
        list(asked)
    assert len(server.logins) == 1


def test_waiting_requests_do_not_get_an_earlier_login_failure(
    server: ManagementDouble, client: ManagementClient, deadline: Deadline
) -> None:
    server.login_answer = Says({"success": False, "error": "no"}, 401)
    with pytest.raises(Unauthenticated):
        client.system_info(deadline=deadline)
    broken = Waits(Says({}, 500))
    server.login_answer = broken
    with ThreadPoolExecutor(4) as pool:
        asked = [pool.submit(client.system_info, deadline=deadline) for _ in range(4)]
        assert deadline.wait_until(lambda: in_login() == 4)
        broken.until.set()
        assert {type(one.exception(10)) for one in asked} == {StorageUnavailable}


# --- what an answer means -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("answer", "family"),
    [
        (Says({"id": 401}, 401), Denied),
        (Says({"id": 403}, 403), Denied),
        (envelope(422, 422), InvalidRequest),
        (SaysRaw(b"<html>bad</html>", 400), InvalidRequest),
        (Says({"success": False, "err": "404"}, 404), StorageUnavailable),
        (SaysRaw(b"<html>oops</html>", 500), StorageUnavailable),
        (SaysRaw(b"<html>oops</html>", 503), StorageUnavailable),
        (envelope(16268, 503), ServerUnreachable),
        (envelope(16269, 503), ServerUnreachable),
        (SaysRaw(b"<html>fine</html>", 200), StorageUnavailable),
        (SaysRaw(b"", 200), StorageUnavailable),
        (SaysRaw(b"[" * 100_000, 200), StorageUnavailable),
        (SaysRaw(b"", 302, location="https://elsewhere/"), StorageUnavailable),
        (Says([1, 2, 3]), StorageUnavailable),
        (Says(None), StorageUnavailable),
        (envelope(999), StorageUnavailable),
    ],
)
def test_an_unusable_response_raises_its_family(
    server: ManagementDouble,
    client: ManagementClient,
    deadline: Deadline,
    answer: Says | SaysRaw,
    family: type[DriverError],
) -> None:
    server.on("GET", INFO, answer)
    with pytest.raises(family):
        client.system_info(deadline=deadline)


def test_redirects_are_not_followed(
    server: ManagementDouble, other_server: ManagementDouble, client: ManagementClient, deadline: Deadline
) -> None:
    server.on("GET", INFO, SaysRaw(b"", 302, location=f"{other_server.url}/systemInfo"))
    with pytest.raises(StorageUnavailable, match="redirect"):
        client.system_info(deadline=deadline)
    assert not other_server.logins


def test_an_error_shows_the_beginning_of_an_undecodable_response(
    server: ManagementDouble, client: ManagementClient, deadline: Deadline
) -> None:
    server.on("GET", INFO, SaysRaw(b"<html>proxy error " + b"x" * 10_000))
    with pytest.raises(StorageUnavailable, match="proxy error") as caught:
        client.system_info(deadline=deadline)
    assert len(str(caught.value)) < 512


# --- broken connections ---------------------------------------------------------------------------------


def test_a_refused_connection_is_unreachable(connect: Connect, deadline: Deadline) -> None:
    with pytest.raises(ServerUnreachable, match="refused"):
        connect(f"http://127.0.0.1:{closed_port()}").system_info(deadline=deadline)


def test_an_unknown_host_name_is_unreachable(connect: Connect, deadline: Deadline) -> None:
    with pytest.raises(ServerUnreachable):
        connect("http://no-such-host.invalid:4000").system_info(deadline=deadline)


def test_a_missing_ca_file_is_named(connect: Connect, deadline: Deadline, tmp_path: Path) -> None:
    with pytest.raises(ServerUnreachable, match=r"absent\.pem"):
        connect("https://127.0.0.1:1", ca_file=tmp_path / "absent.pem").system_info(deadline=deadline)


@pytest.mark.parametrize("fault", [Breaks(), SaysRaw(b"{", promised=100)], ids=["broken", "truncated"])
def test_a_broken_read_is_repeated_once(
    server: ManagementDouble, client: ManagementClient, deadline: Deadline, fault: Breaks | SaysRaw
) -> None:
    server.on("GET", INFO, fault, Says(sample("system-info")))
    assert client.system_info(deadline=deadline).api_version == "18.0.0"


def test_a_read_that_breaks_twice_fails(server: ManagementDouble, client: ManagementClient, deadline: Deadline) -> None:
    server.on("GET", INFO, Breaks())
    with pytest.raises(StorageUnavailable):
        client.system_info(deadline=deadline)
    assert len(server.seen(INFO)) == 2


@pytest.mark.parametrize(
    "fault",
    [Breaks(), SaysRaw(b"[{", promised=100), SaysRaw(b"<html>", 500), SaysRaw(b"<html>", 502), SaysRaw(b"[{")],
    ids=["broken", "truncated", "500", "502", "undecodable"],
)
def test_a_change_without_a_valid_response_is_not_repeated(
    server: ManagementDouble, client: ManagementClient, deadline: Deadline, fault: Breaks | SaysRaw
) -> None:
    server.on("POST", "/volumes/update", fault)
    with pytest.raises(OutcomeUnknown):
        client.set_metadata(VOLUME, {}, deadline=deadline)
    assert len(server.seen("/volumes/update")) == 1


def test_a_deletion_is_repeated_because_it_names_the_uuid(
    server: ManagementDouble, client: ManagementClient, deadline: Deadline
) -> None:
    server.on("POST", "/volumes/delete", Breaks(), DELETED)
    assert client.delete_volume(VOLUME, deadline=deadline)


# --- time -----------------------------------------------------------------------------------------------


def test_a_hanging_server_is_abandoned_at_the_deadline(server: ManagementDouble, client: ManagementClient) -> None:
    server.on("GET", INFO, Hangs())
    deadline = Deadline.after(0.3)
    with pytest.raises(StorageUnavailable):
        client.system_info(deadline=deadline)
    assert deadline.elapsed_s() < LONG_S


def test_a_hanging_server_is_abandoned_at_the_request_timeout(
    server: ManagementDouble, connect: Connect, deadline: Deadline
) -> None:
    server.on("GET", INFO, Hangs())
    with pytest.raises(OutcomeUnknown) as caught:
        connect(server.url, request_timeout_s=0.2).system_info(deadline=deadline)
    assert caught.value.timed_out
    assert deadline.elapsed_s() < LONG_S


def test_a_slow_response_is_abandoned_at_the_deadline(server: ManagementDouble, client: ManagementClient) -> None:
    pause = threading.Event()
    drops = iter(range(1000))
    server.on("GET", INFO, Drips(lambda: next(drops, None) is not None and not pause.wait(0.05)))
    deadline = Deadline.after(0.4)
    try:
        with pytest.raises(StorageUnavailable):
            client.system_info(deadline=deadline)
        assert deadline.elapsed_s() < LONG_S
    finally:
        pause.set()


def test_without_time_left_no_request_is_sent(server: ManagementDouble, client: ManagementClient) -> None:
    with pytest.raises(DeadlineReached):
        client.system_info(deadline=Deadline.after(0))
    assert not server.logins


def test_requests_in_flight_are_limited(server: ManagementDouble, connect: Connect, deadline: Deadline) -> None:
    client = connect(server.url, max_requests_in_flight=1)
    client.system_info(deadline=deadline)
    hanging = Hangs()
    server.on("GET", "/volumes/slow", hanging)
    with ThreadPoolExecutor(1) as pool:
        slow = pool.submit(client.volume, "slow", deadline=deadline)
        assert deadline.wait_until(lambda: bool(server.seen("/volumes/slow")))
        with pytest.raises(DeadlineReached, match="free connection"):
            client.system_info(deadline=Deadline.after(0.1))
        server.on("GET", "/volumes/slow", Says({"success": False, "error": {"id": 1543}}))
        hanging.until.set()
        assert slow.result() is None


# --- secrets --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "login",
    [
        Says({"error": f"wrong: {PASSWORD}"}, 401),
        SaysRaw(f"<html>cannot parse {PASSWORD}</html>".encode(), 400),
        SaysRaw(PASSWORD.encode(), 500),
        Breaks(),
    ],
)
def test_the_password_is_in_no_message_and_no_log(
    server: ManagementDouble,
    client: ManagementClient,
    deadline: Deadline,
    login: Says | SaysRaw | Breaks,
    caplog: pytest.LogCaptureFixture,
) -> None:
    caplog.set_level(logging.DEBUG)
    server.login_answer = login
    with pytest.raises(DriverError) as caught:
        client.system_info(deadline=deadline)
    assert PASSWORD not in str(caught.value) + repr(caught.value) + caplog.text


def test_the_cookie_is_in_no_message_and_no_log(
    server: ManagementDouble, client: ManagementClient, deadline: Deadline, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG)
    server.on("GET", INFO, SaysRaw(b"<html>", 500))
    with pytest.raises(StorageUnavailable) as caught:
        client.system_info(deadline=deadline)
    assert "secretcookie" not in str(caught.value) + caplog.text


# --- what a failure says ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", ["/systemInfo", "/servers/all/0/0"])
def test_a_read_without_a_response_does_not_say_that_it_may_have_been_executed(
    server: ManagementDouble, client: ManagementClient, deadline: Deadline, path: str
) -> None:
    client.system_info(deadline=deadline)
    server.on("GET", path, Breaks())
    with pytest.raises(OutcomeUnknown, match="gave no valid response") as caught:
        client.raw_space(deadline=deadline) if path != "/systemInfo" else client.system_info(deadline=deadline)
    assert "may have been executed" not in str(caught.value)


def test_the_error_of_a_down_server_stays_the_same(connect: Connect) -> None:
    """Kubernetes counts events of one text as one; a text with an age in it makes a new event each time."""
    client = connect(f"http://127.0.0.1:{closed_port()}")
    said = []
    for _ in range(5):
        with pytest.raises(StorageUnavailable) as caught:
            client.system_info(deadline=Deadline.after(1))
        said.append(str(caught.value))
    assert len(set(said)) <= 2, said  # that it cannot be reached, and that it has not been since
    assert not [text for text in said if re.search(r"[0-9] s\b", text)]


def test_a_closed_client_sends_nothing_and_opens_no_connection(
    server: ManagementDouble, client: ManagementClient, deadline: Deadline
) -> None:
    client.system_info(deadline=deadline)
    asked = len(server.received)
    client.close()
    with pytest.raises(StorageUnavailable, match="no longer used"):
        client.system_info(deadline=deadline)
    assert len(server.received) == asked
