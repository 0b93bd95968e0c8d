# SPDX-License-Identifier: Apache-2.0
"""The management client logs in to the embedded storage manager, over a real socket, as the written API says.

Their work for the controller is tested in `test_management_port`.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from csi_driver.deadline import Deadline
from csi_driver.embedded.server import StorageServer
from csi_driver.embedded.settings import StorageSettings
from csi_driver.errors import Exhausted, PreconditionFailed, ServerUnreachable, Unauthenticated
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


def test_a_restarted_server_gets_a_new_login(storage: Storage, actor: Actor) -> None:
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
        listen=("127.0.0.1", port),
        pretend_targets=3,
    )
    storage.server = StorageServer(storage.settings, storage.loops)
    storage.server.start()
    assert actor.usable("v1") == volume


# --- reasons, word for word --------------------------------------------------------------------------------


def test_the_error_about_a_lost_file_reaches_the_caller(storage: Storage, actor: Actor) -> None:
    volume = actor.created()
    actor.attach(volume)
    actor.detach(volume)
    file = storage.server.pool.file(volume.uuid)
    file.unlink()
    reason = (
        f"its file {file} is gone or cut short, expected at least {volume.size_bytes} bytes of data; "
        "restore it from a backup"
    )
    with pytest.raises(PreconditionFailed) as attaching:
        actor.attach(volume)
    with pytest.raises(PreconditionFailed) as extending:
        actor.management.extend_volume(volume, 5, deadline=actor.deadline)
    assert reason in str(attaching.value)
    assert reason in str(extending.value)
    assert actor.management.volume("v1", deadline=actor.deadline).status == "offline"  # type: ignore[union-attr]


def test_the_sizes_of_a_full_pool_reach_the_caller(actor: Actor) -> None:
    asked, unallocated = 10**15 // 2**20 * 2**20, POOL_BYTES // 2**20 * 2**20
    numbers = f"asked {asked} bytes; {unallocated} are unallocated in the pool, "
    with pytest.raises(Exhausted, match=numbers) as creating:
        actor.created(capacity_gb=10**6)
    assert "free in its file system: the smaller counts" in str(creating.value)
    volume = actor.created(capacity_gb=2)
    with pytest.raises(Exhausted, match="free in its file system: the smaller counts"):
        actor.management.extend_volume(volume, 10**6, deadline=actor.deadline)


def test_a_layout_that_the_pool_cannot_hold_differs_from_a_full_pool(actor: Actor) -> None:
    with pytest.raises(Exhausted, match="the layout needs 10 targets, this pool has 3"):
        actor.created(vpg="DEFAULT_EC_DUAL_TARGET_REDUNDANCY_VPG")
