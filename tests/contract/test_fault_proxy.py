# SPDX-License-Identifier: Apache-2.0
"""The proxy does to requests what it says, and the client makes of each fault what its caller can act on."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from csi_driver.deadline import Deadline
from csi_driver.errors import (
    Denied,
    DriverError,
    InvalidRequest,
    OperationPending,
    OutcomeUnknown,
    ServerUnreachable,
)
from csi_driver.management.client import ManagementClient
from csi_driver.management.settings import ManagementSettings
from csi_driver.storage_model import Layout, Volume, VolumeSpec
from tests.contract.two_managements import Actor, Storage, embedded_storage
from tests.fakes.fault_proxy import Drawn, Fault, FaultProxy, Seen

CHANGE = "/volumes/update"
READ = "/volumes/v1"


class Once:
    """Lets the next request for a path meet a fault, or that and all that follow."""

    def __init__(self) -> None:
        self.path = ""
        self.fault: Fault | None = None
        self.lasts = False

    def __call__(self, seen: Seen) -> Fault | None:
        if seen.path != self.path:
            return None
        fault = self.fault
        if not self.lasts:
            self.path = ""
        return fault

    def at(self, path: str, fault: Fault, *, lasts: bool = False) -> None:
        self.path, self.fault, self.lasts = path, fault, lasts


@pytest.fixture
def storage(tmp_path: Path) -> Iterator[Storage]:
    with embedded_storage(tmp_path) as running:
        yield running


@pytest.fixture
def once() -> Once:
    return Once()


@pytest.fixture
def proxy(storage: Storage, once: Once) -> Iterator[FaultProxy]:
    made = FaultProxy(once, hang_s=60.0)
    made.upstream = storage.server.address
    yield made
    made.stop()


@pytest.fixture
def client(storage: Storage, proxy: FaultProxy) -> Iterator[ManagementClient]:
    settings = ManagementSettings(
        servers=(proxy.url,),
        username=storage.settings.user,
        password_file=storage.server.password.path,
    )
    made = ManagementClient(settings)
    yield made
    made.close()


@pytest.fixture
def deadline() -> Deadline:
    return Deadline.after(20)


@pytest.fixture
def volume(client: ManagementClient, deadline: Deadline) -> Volume:
    return Actor(client, deadline).created()


def time_for(fault: Fault) -> Deadline:
    """Return the time of a call that meets this fault: who hangs is left when it is over."""
    return Deadline.after(1.0 if fault.startswith("hang") else 20)


def truth(storage: Storage) -> dict[str, object]:
    """Return the metadata that the storage holds of the only volume, past the proxy."""
    client = storage.connect()
    try:
        (volume,) = client.volumes(after="", limit=0, deadline=Deadline.after(20))
        return dict(volume.metadata)
    finally:
        client.close()


NEVER_SEEN = [
    (Fault.RESET_BEFORE, OutcomeUnknown),
    (Fault.HANG_BEFORE, OutcomeUnknown),
    (Fault.NOT_ADMIN, Denied),
    (Fault.MALFORMED, InvalidRequest),
    (Fault.ERROR_BEFORE, OutcomeUnknown),
    (Fault.GATEWAY_BEFORE, OutcomeUnknown),
    (Fault.UPGRADING, ServerUnreachable),
    (Fault.SHUTTING_DOWN, ServerUnreachable),
    (Fault.OTHER_UUID_ASKED, OperationPending),
]
DONE_BEHIND_OUR_BACK = [
    Fault.RESET_AFTER,
    Fault.RESET_MID_ANSWER,
    Fault.HANG_AFTER,
    Fault.TRUNCATED,
    Fault.NOT_JSON,
    Fault.ERROR_AFTER,
    Fault.GATEWAY_AFTER,
]
LOST_AT_ONCE = [fault for fault in DONE_BEHIND_OUR_BACK if fault is not Fault.HANG_AFTER]
UNNOTICED = [Fault.DELAY, Fault.LOGIN_WANTED, Fault.SESSION_LOST, Fault.OTHER_UUID_ANSWERED, Fault.UNDEFINED]


@pytest.mark.parametrize(("fault", "family"), NEVER_SEEN)
def test_a_change_that_the_server_never_saw_is_not_made(
    storage: Storage,
    client: ManagementClient,
    once: Once,
    volume: Volume,
    fault: Fault,
    family: type[DriverError],
) -> None:
    once.at(CHANGE, fault)
    with pytest.raises(family):
        client.set_metadata(volume, {"csi_name": "changed"}, deadline=time_for(fault))
    assert truth(storage) == {"csi_name": "pvc-v1"}


@pytest.mark.parametrize("fault", DONE_BEHIND_OUR_BACK)
def test_a_change_without_a_readable_answer_is_of_unknown_outcome_and_sent_once(
    storage: Storage,
    client: ManagementClient,
    proxy: FaultProxy,
    once: Once,
    volume: Volume,
    fault: Fault,
) -> None:
    once.at(CHANGE, fault)
    with pytest.raises(OutcomeUnknown):
        client.set_metadata(volume, {"csi_name": "changed"}, deadline=time_for(fault))
    assert truth(storage) == {"csi_name": "changed"}
    assert proxy.forwarded[f"POST {CHANGE}"] == 1


@pytest.mark.parametrize("fault", UNNOTICED)
def test_a_change_that_is_turned_away_or_answered_strangely_is_made_once(
    storage: Storage,
    client: ManagementClient,
    proxy: FaultProxy,
    once: Once,
    volume: Volume,
    deadline: Deadline,
    fault: Fault,
) -> None:
    once.at(CHANGE, fault)
    client.set_metadata(volume, {"csi_name": "changed"}, deadline=deadline)
    assert truth(storage) == {"csi_name": "changed"}


READ_ONCE_MORE = [Fault.RESET_BEFORE, Fault.RESET_AFTER, Fault.RESET_MID_ANSWER, Fault.TRUNCATED]


@pytest.mark.parametrize("fault", [*READ_ONCE_MORE, Fault.DELAY, Fault.LOGIN_WANTED, Fault.SESSION_LOST])
def test_a_read_gets_over_it(
    client: ManagementClient, once: Once, volume: Volume, deadline: Deadline, fault: Fault
) -> None:
    once.at(READ, fault)
    assert client.volume("v1", deadline=deadline) == volume


# The login that follows is not lost; the truth about what is read cannot be done without.
GETS_OVER = (Fault.SESSION_LOST, Fault.DELAY, Fault.OTHER_UUID_ASKED, Fault.OTHER_UUID_ANSWERED)


@pytest.mark.parametrize("fault", [fault for fault in Fault if fault not in GETS_OVER])
def test_a_read_that_never_gets_an_answer_fails_and_takes_nothing_for_absent(
    client: ManagementClient, once: Once, volume: Volume, fault: Fault
) -> None:
    once.at(READ, fault, lasts=True)
    with pytest.raises(DriverError):
        client.volume("v1", deadline=time_for(fault))


@pytest.mark.parametrize("fault", [*LOST_AT_ONCE, Fault.RESET_BEFORE])
def test_a_creation_whose_answer_was_lost_is_looked_up(
    client: ManagementClient, once: Once, volume: Volume, deadline: Deadline, fault: Fault
) -> None:
    once.at("/volumes/save", fault)
    spec = VolumeSpec("v2", 1.0, {}, layout=Layout())
    if fault is Fault.RESET_BEFORE:
        with pytest.raises(OutcomeUnknown):
            client.create_volume(spec, deadline=deadline)
    else:
        assert client.create_volume(spec, deadline=deadline) is None
    assert (client.volume("v2", deadline=deadline) is None) is (fault is Fault.RESET_BEFORE)


# --- servers as wholes ----------------------------------------------------------------------------------


def test_a_dead_server_refuses_connections_and_lives_again(
    client: ManagementClient, proxy: FaultProxy, volume: Volume, deadline: Deadline
) -> None:
    proxy.die()
    with pytest.raises(ServerUnreachable, match="refused"):
        client.volume("v1", deadline=deadline)
    proxy.revive()
    assert client.volume("v1", deadline=deadline) == volume


def test_a_server_that_dies_in_the_middle_of_a_change_leaves_its_outcome_unknown(
    client: ManagementClient, proxy: FaultProxy, volume: Volume, deadline: Deadline
) -> None:
    proxy.hang()
    threading.Timer(0.1, proxy.break_all).start()
    with pytest.raises(OutcomeUnknown):
        client.set_metadata(volume, {"csi_name": "changed"}, deadline=deadline)
    proxy.go_on()


def test_a_request_whose_sender_has_left_does_not_arrive_any_more(
    client: ManagementClient, proxy: FaultProxy, volume: Volume
) -> None:
    proxy.hang()
    with pytest.raises(OutcomeUnknown):
        client.set_metadata(volume, {"csi_name": "changed"}, deadline=Deadline.after(1))
    proxy.go_on()
    assert client.volume("v1", deadline=Deadline.after(20)) == volume
    assert proxy.forwarded[f"POST {CHANGE}"] == 0


def test_of_two_servers_one_may_lie_dead(
    storage: Storage, proxy: FaultProxy, volume: Volume, deadline: Deadline
) -> None:
    dead = FaultProxy(lambda _: None, hang_s=1)
    dead.die()
    settings = ManagementSettings(
        servers=(dead.url, proxy.url), username=storage.settings.user, password_file=storage.server.password.path
    )
    client = ManagementClient(settings)
    try:
        client.set_metadata(volume, {"csi_name": "changed"}, deadline=deadline)
        assert truth(storage) == {"csi_name": "changed"}
    finally:
        client.close()


def test_the_requests_of_one_call_wait_for_a_hanging_server_once(
    storage: Storage, proxy: FaultProxy, deadline: Deadline
) -> None:
    """CreateVolume and ControllerPublish make several requests: the first finds the server to hang, no other does."""
    silent = FaultProxy(lambda _: None, hang_s=1)
    silent.upstream = storage.server.address
    settings = ManagementSettings(
        servers=(silent.url, proxy.url),
        username=storage.settings.user,
        password_file=storage.server.password.path,
        request_timeout_s=2.0,
    )
    client = ManagementClient(settings)
    actor = Actor(client, deadline)
    try:
        actor.node()  # logs in to the first
        silent.hang()
        waited_for = silent.asked.total()
        actor.attach(actor.created("v2"))
        assert actor.holders(actor.usable("v2")) == ["node-1"]
        probes = silent.asked["GET /volumes/count"]
        assert silent.asked.total() - probes - waited_for == 1
    finally:
        client.close()
        silent.stop()


# --- what is drawn --------------------------------------------------------------------------------------


def requests() -> Iterator[Seen]:
    for number in range(2000):
        yield Seen("POST" if number % 2 else "GET", "/volumes/update", f"v{number % 50}", number // 50)


def test_one_seed_draws_the_same_faults_and_another_others() -> None:
    weights = dict.fromkeys(Fault, 1.0)
    one, again, other = ([Drawn(seed, 0.5, weights)(request) for request in requests()] for seed in (1, 1, 2))
    assert one == again != other


def test_the_share_of_faults_is_the_one_asked_for_and_every_fault_is_among_them() -> None:
    drawn = Drawn(1, 0.25, dict.fromkeys(Fault, 1.0))
    faults = [drawn(request) for request in requests()]
    assert 400 < sum(fault is not None for fault in faults) < 600
    assert set(faults) == {None, *Fault}


def test_reads_are_never_told_another_uuid() -> None:
    drawn = Drawn(1, 1.0, {Fault.OTHER_UUID_ANSWERED: 1.0, Fault.DELAY: 0.001})
    assert {drawn(request) for request in requests() if not request.is_change} == {Fault.DELAY}


def test_no_fault_is_left_out_of_these_tests() -> None:
    named = {fault for fault, _ in NEVER_SEEN} | set(DONE_BEHIND_OUR_BACK) | set(UNNOTICED)
    assert named == set(Fault)
