"""The management client logs in to the embedded storage manager, over a real socket, as the written API says.

What the two do together for the controller is in `test_management_port`.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from csi_driver.deadline import Deadline
from csi_driver.embedded.server import StorageServer
from csi_driver.embedded.settings import StorageSettings, TestSwitches
from csi_driver.errors import ServerUnreachable, Unauthenticated
from tests.contract.two_managements import POOL_BYTES, Actor, Storage, embedded_storage


@pytest.fixture
def storage(tmp_path: Path) -> Iterator[Storage]:
    with embedded_storage(tmp_path) as running:
        yield running


@pytest.fixture
def deadline() -> Deadline:
    return Deadline.after(20)


@pytest.fixture
def actor(storage: Storage, deadline: Deadline) -> Iterator[Actor]:
    client = storage.connect()
    yield Actor(client, deadline)
    client.close()


def test_a_wrong_password_is_unauthenticated(storage: Storage, tmp_path: Path, deadline: Deadline) -> None:
    (tmp_path / "wrong").write_text("wrong")
    client = storage.connect(tmp_path / "wrong")
    with pytest.raises(Unauthenticated):
        client.system_info(deadline=deadline)
    client.close()


def test_a_forced_password_change_is_unauthenticated(tmp_path: Path, deadline: Deadline) -> None:
    storage = Storage.start(tmp_path, switches=TestSwitches(must_change_password=True))
    client = storage.connect()
    try:
        with pytest.raises(Unauthenticated, match="changePassword"):
            client.system_info(deadline=deadline)
    finally:
        client.close()
        storage.server.stop()


def test_a_restarted_server_has_forgotten_the_session_and_is_logged_in_to_again(storage: Storage, actor: Actor) -> None:
    volume = actor.created()
    port = storage.server.address[1]
    storage.server.stop()
    with pytest.raises(ServerUnreachable):
        actor.usable("v1")
    storage.settings = StorageSettings(
        storage.settings.pool_directory,
        clients=storage.settings.clients,
        size_bytes=POOL_BYTES,
        overcommit=True,
        listen_port=port,
        pretend_targets=3,
    )
    storage.server = StorageServer(storage.settings, storage.loops)
    storage.server.start()
    assert actor.usable("v1") == volume
