"""Several servers: who is asked, who rests, and that no change is made twice."""

from __future__ import annotations

import pytest

from csi_driver.deadline import Deadline
from csi_driver.errors import OutcomeUnknown, ServerUnreachable
from csi_driver.management.server import Server
from csi_driver.management.settings import ManagementSettings
from csi_driver.model import Volume
from tests.unit.management.conftest import Connect
from tests.unit.management.double import Breaks, Hangs, ManagementDouble, Says, SaysRaw, closed_port, sample

INFO = "/systemInfo"
VOLUME = Volume("v1", "74025fd0-e73d-11f1-a2b3-7550e9e5980f", 2441216, 4096, 10.0, "online", "none")
DONE = Says([{"_id": "v1", "uuid": VOLUME.uuid, "success": True, "error": None, "payload": None}])


class HandClock:
    """A clock that stands still until it is moved."""

    def __init__(self) -> None:
        self.now_s = 1000.0

    def monotonic(self) -> float:
        return self.now_s

    def sleep(self, seconds: float) -> None:
        self.now_s += seconds


@pytest.fixture(autouse=True)
def _info(server: ManagementDouble, other_server: ManagementDouble) -> None:
    for double in (server, other_server):
        double.on("GET", INFO, Says(sample("system-info")))
        double.on("POST", "/volumes/update", DONE)


def retired(number: int) -> Says:
    return Says({"_id": None, "uuid": None, "success": False, "error": {"id": number}, "payload": None}, 503)


def test_a_dead_server_is_passed_over(other_server: ManagementDouble, connect: Connect, deadline: Deadline) -> None:
    client = connect(f"http://127.0.0.1:{closed_port()}", other_server.url)
    assert client.system_info(deadline=deadline).api_version == "18.0.0"


@pytest.mark.parametrize("number", [16268, 16269])
def test_a_change_goes_to_another_server_when_the_first_retires(
    server: ManagementDouble, other_server: ManagementDouble, connect: Connect, deadline: Deadline, number: int
) -> None:
    server.on("POST", "/volumes/update", retired(number))
    connect(server.url, other_server.url).set_metadata(VOLUME, {}, deadline=deadline)
    assert len(other_server.seen("/volumes/update")) == 1


@pytest.mark.parametrize("fault", [Breaks(), SaysRaw(b"<html>", 503)], ids=["broken", "503 without an id"])
def test_a_change_that_may_have_been_made_goes_to_no_other_server(
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


def test_a_read_goes_on_elsewhere_when_a_server_hangs(
    server: ManagementDouble, other_server: ManagementDouble, connect: Connect
) -> None:
    server.on("GET", INFO, Hangs())
    deadline = Deadline.after(0.6)
    assert connect(server.url, other_server.url).system_info(deadline=deadline).api_version == "18.0.0"


def test_a_server_that_hung_is_not_asked_again_at_once(
    server: ManagementDouble, other_server: ManagementDouble, connect: Connect, deadline: Deadline
) -> None:
    server.on("GET", INFO, Hangs())
    client = connect(server.url, other_server.url, request_timeout_s=0.2)
    for _ in range(5):
        client.system_info(deadline=deadline)
    assert len(server.seen(INFO)) == 1


def test_all_servers_dead_is_told_at_once(connect: Connect, deadline: Deadline) -> None:
    client = connect(f"http://127.0.0.1:{closed_port()}", f"http://localhost:{closed_port()}")
    with pytest.raises(ServerUnreachable):
        client.system_info(deadline=deadline)
    assert deadline.elapsed_s() < 2


def test_a_resting_server_is_asked_when_no_other_answers(
    server: ManagementDouble, connect: Connect, deadline: Deadline
) -> None:
    client = connect(server.url, f"http://127.0.0.1:{closed_port()}")
    server.on("GET", INFO, Breaks(), Breaks(), Says(sample("system-info")))
    with pytest.raises(ServerUnreachable):
        client.system_info(deadline=deadline)
    server.on("GET", INFO, Says(sample("system-info")))
    assert client.system_info(deadline=deadline).api_version == "18.0.0"


@pytest.fixture
def resting() -> tuple[Server, HandClock]:
    clock = HandClock()
    server = Server("http://127.0.0.1:1", ManagementSettings(servers=("http://127.0.0.1:1",)), clock)
    server.failed()
    return server, clock


def test_a_server_that_failed_rests(resting: tuple[Server, HandClock]) -> None:
    assert not resting[0].is_due()


def test_one_caller_probes_a_rested_server_and_the_others_wait(resting: tuple[Server, HandClock]) -> None:
    server, clock = resting
    clock.sleep(1)
    assert [server.is_due() for _ in range(3)] == [True, False, False]


def test_a_server_that_answered_is_asked_by_all_again(resting: tuple[Server, HandClock]) -> None:
    server, _ = resting
    server.answered()
    assert [server.is_due() for _ in range(3)] == [True, True, True]


def test_a_server_that_goes_on_failing_rests_longer_but_is_never_given_up(resting: tuple[Server, HandClock]) -> None:
    server, clock = resting
    for _ in range(50):
        server.failed()
    clock.sleep(29)
    assert not server.is_due()
    clock.sleep(2)
    assert server.is_due()
