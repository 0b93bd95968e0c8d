# SPDX-License-Identifier: Apache-2.0
"""Keys of nodes: registered with the join token, kept for their owner alone, and told to nobody."""

from __future__ import annotations

import errno
import json
import logging
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from csi_driver.embedded.settings import StorageSettings
from csi_driver.http_requests import HttpRequest, HttpResponse
from csi_driver.nvme_model import host_nqn, host_uuid, is_dhchap_key, new_dhchap_key, split_path
from tests.fakes.nvme_kernel import Controller
from tests.unit.embedded.fake_loops import FakeLoopDevices
from tests.unit.embedded.manager import Json, Manager, running, settings_in
from tests.unit.embedded.test_nvme_exports import Storage

NODE = "worker-1"
TOKEN = "join-me-with-this-token"
KEY = new_dhchap_key()


@pytest.fixture
def settings(tmp_path: Path) -> StorageSettings:
    token = tmp_path / "token"
    token.write_text(f"{TOKEN}\n")
    return settings_in(tmp_path, authentication="required", join_token_file=token)


@pytest.fixture
def manager(settings: StorageSettings, loops: FakeLoopDevices) -> Iterator[Manager]:
    with running(settings, loops) as made:
        made.server.clients.has_exports = True
        yield made


def respond(manager: Manager, peer: str = "10.0.0.9", **changes: str) -> HttpResponse:
    body = {"client": NODE, "joinToken": TOKEN, "key": KEY} | changes
    headers = {"content-type": "application/json"}
    sent = HttpRequest("POST", "/clients/register", {}, headers, json.dumps(body).encode(), peer)
    return manager.server.api.respond(sent)


def register(manager: Manager, **changes: str) -> tuple[int, Json]:
    response = respond(manager, **changes)
    return response.status, json.loads(response.body)


def controller_key(manager: Manager, **changes: str) -> str:
    status, answer = register(manager, **changes)
    assert status == 200, answer
    return str(answer["payload"]["controllerKey"])


def test_a_node_registers_its_key_and_gets_that_of_the_exports(manager: Manager) -> None:
    status, answer = register(manager)
    assert (status, answer["_id"], answer["uuid"]) == (200, NODE, host_uuid(NODE))
    keys = manager.server.keys.get(NODE)
    assert keys is not None
    assert (keys.host, keys.controller) == (KEY, answer["payload"]["controllerKey"])
    assert is_dhchap_key(keys.controller)
    assert keys.controller != KEY


def test_the_same_registration_gets_the_same_answer_after_a_restart_too(
    settings: StorageSettings, loops: FakeLoopDevices
) -> None:
    answers = set()
    for _ in range(2):
        with running(settings, loops) as manager:
            manager.server.clients.has_exports = True
            answers |= {controller_key(manager), controller_key(manager)}
    assert len(answers) == 1


def test_each_node_has_keys_of_its_own(manager: Manager) -> None:
    assert controller_key(manager) != controller_key(manager, client="worker-2", key=new_dhchap_key())


@pytest.mark.parametrize("token", ["", "x", TOKEN + "x", TOKEN[:-1], "\ud800"])
def test_a_wrong_join_token_registers_nothing(manager: Manager, token: str) -> None:
    assert register(manager, joinToken=token)[0] == 401
    assert manager.server.keys.get(NODE) is None


def test_a_join_token_that_was_replaced_is_refused_and_the_new_one_is_taken(
    manager: Manager, settings: StorageSettings
) -> None:
    assert settings.join_token_file is not None
    settings.join_token_file.write_text("another-token")
    assert register(manager)[0] == 401
    assert register(manager, joinToken="another-token")[0] == 200


def test_guesses_of_the_join_token_are_slowed_down_and_logins_are_not(manager: Manager) -> None:
    statuses = [register(manager, joinToken=str(number))[0] for number in range(12)]
    assert statuses == [401] * 10 + [429] * 2
    refused = respond(manager)
    assert (refused.status, dict(refused.headers)["Retry-After"]) == (429, "1")
    assert respond(manager, peer="10.0.0.10").status == 200
    assert manager.get("/systemInfo")["version"]


def test_many_nodes_behind_one_address_register_without_a_pause(manager: Manager) -> None:
    names = [f"worker-{number}" for number in range(30)]
    assert {register(manager, client=name, key=new_dhchap_key())[0] for name in names} == {200}


@pytest.mark.parametrize(
    "key",
    ["", "DHHC-1:00:AAAA:", KEY[:-1], KEY.replace("DHHC-1:00", "DHHC-1:02"), KEY[:12] + "AAAA" + KEY[16:], KEY + "\n"],
    ids=["empty", "short", "without-end", "of-another-hash", "wrong-checksum", "with-newline"],
)
def test_a_key_that_the_kernel_would_refuse_is_refused(manager: Manager, key: str) -> None:
    status, answer = register(manager, key=key)
    assert status == 422
    assert not key.strip() or key.strip() not in json.dumps(answer)


@pytest.mark.parametrize("client", ["", "Worker-1", "../../etc", "node-1", "a" * 254])
def test_only_a_node_that_connects_by_itself_registers(manager: Manager, client: str) -> None:
    assert register(manager, client=client)[0] == 422
    assert not list(manager.server.pool.keys.glob("*"))


def test_a_node_that_lost_its_key_registers_a_new_one(manager: Manager) -> None:
    first, new = controller_key(manager), new_dhchap_key()
    assert controller_key(manager, key=new) != first
    keys = manager.server.keys.get(NODE)
    assert keys is not None
    assert keys.host == new


def test_the_key_of_a_node_that_is_connected_is_not_replaced(manager: Manager, monkeypatch: pytest.MonkeyPatch) -> None:
    controller_key(manager)
    monkeypatch.setattr(manager.server.attacher, "is_connected", lambda client: client == NODE)
    assert register(manager, key=new_dhchap_key())[0] == 409
    assert register(manager)[0] == 200
    keys = manager.server.keys.get(NODE)
    assert keys is not None
    assert keys.host == KEY


def test_keys_are_readable_for_their_owner_alone(manager: Manager) -> None:
    controller_key(manager)
    (file,) = manager.server.pool.keys.iterdir()
    assert file.stat().st_mode & 0o777 == 0o600
    assert file.parent.stat().st_mode & 0o777 == 0o700


def test_without_a_key_a_node_gets_no_volume_where_keys_are_required(manager: Manager) -> None:
    manager.save("data")
    refused = manager.attach("data", NODE)
    assert "has not registered its key" in refused["error"]["innerMessage"]["message"]
    assert manager.attachment("data", NODE) is None
    controller_key(manager)
    assert manager.attach("data", NODE)["success"]


def test_a_configured_client_needs_no_key(manager: Manager) -> None:
    manager.save("data")
    assert manager.attach("data", "node-1")["success"]


def test_keys_are_registered_before_they_are_required_and_are_not_used_until_then(
    settings: StorageSettings, loops: FakeLoopDevices
) -> None:
    with running(replace(settings, authentication="off"), loops) as before:
        before.server.clients.has_exports = True
        controller_key(before)
        assert before.server.keys.get(NODE) is None
        assert not before.server.keys.why_refused(NODE)
    with running(settings, loops) as after:
        keys = after.server.keys.get(NODE)
        assert keys is not None
        assert keys.host == KEY


def test_nobody_registers_where_no_join_token_is_configured(tmp_path: Path, loops: FakeLoopDevices) -> None:
    with running(settings_in(tmp_path), loops) as manager:
        manager.server.clients.has_exports = True
        assert register(manager)[0] == 403


@pytest.mark.parametrize("content", ["", "[]", "{}", '{"client": "worker-2", "key": "a", "controllerKey": "b"}', "\0"])
def test_a_file_of_keys_that_cannot_be_read_is_named_and_not_replaced(
    manager: Manager, content: str, caplog: pytest.LogCaptureFixture
) -> None:
    controller_key(manager)
    (file,) = manager.server.pool.keys.iterdir()
    file.write_text(content)
    status, answer = register(manager)
    assert status == 500
    assert str(file) in answer["error"]["message"]
    assert file.read_text() == content


# --- on exports -------------------------------------------------------------------------------------------------


@pytest.fixture
def storage(tmp_path: Path, settings: StorageSettings) -> Iterator[Storage]:
    """A manager that exports, with keys that are required."""
    storage = Storage(tmp_path)
    given = replace(storage.settings, authentication="required", join_token_file=settings.join_token_file)
    storage.settings = given
    storage.restart()
    storage.manager.save("data")
    yield storage
    storage.manager.server.stop()


def connect(storage: Storage, key: str) -> Controller:
    export = storage.export(NODE)
    return storage.kernel.connect(export["nqn"], host_nqn(NODE), *split_path(export["paths"][0]), key=key)


def refusal(storage: Storage, key: str) -> int:
    with pytest.raises(OSError) as refused:  # noqa: PT011
        connect(storage, key)
    return refused.value.errno or 0


def test_a_node_connects_with_its_key_alone_and_the_export_has_its_own(storage: Storage) -> None:
    own = controller_key(storage.manager)
    storage.manager.attach("data", NODE)
    assert refusal(storage, "") == errno.ENOKEY
    assert refusal(storage, new_dhchap_key()) == errno.EKEYREJECTED
    assert connect(storage, KEY).is_live
    assert storage.kernel.hosts[host_nqn(NODE)] == {"dhchap_key": KEY, "dhchap_ctrl_key": own}


def test_a_new_key_is_asked_for_from_its_registration_on(storage: Storage) -> None:
    controller_key(storage.manager)
    storage.manager.attach("data", NODE)
    new = new_dhchap_key()
    controller_key(storage.manager, key=new)
    assert refusal(storage, KEY) == errno.EKEYREJECTED
    assert connect(storage, new).is_live


def test_the_key_of_a_node_with_a_connection_stays_until_that_ends(storage: Storage) -> None:
    controller_key(storage.manager)
    storage.manager.attach("data", NODE)
    live, new = connect(storage, KEY), new_dhchap_key()
    assert register(storage.manager, key=new)[0] == 409
    assert live.is_live
    storage.kernel.disconnect(live)
    assert register(storage.manager, key=new)[0] == 200


def test_a_connected_node_that_registers_its_first_key_stays_connected(tmp_path: Path, storage: Storage) -> None:
    required = storage.settings
    storage.restart(replace(required, authentication="off"))
    storage.manager.attach("data", NODE)
    live = connect(storage, "")
    controller_key(storage.manager)
    assert live.is_live
    storage.restart(required)
    assert live.is_live
    assert refusal(storage, "") == errno.ENOKEY
    assert connect(storage, KEY).is_live


def test_a_restart_of_the_machine_exports_to_nobody_without_a_key_where_keys_are_required(storage: Storage) -> None:
    required = storage.settings
    storage.restart(replace(required, authentication="off"))
    storage.manager.attach("data", NODE)
    export = storage.export(NODE)
    storage.settings = required
    storage.reboot()
    assert storage.refused(NODE, export) == errno.ECONNREFUSED
    controller_key(storage.manager)
    assert connect(storage, KEY).is_live


def test_neither_answers_nor_the_log_have_a_secret(manager: Manager, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG)
    manager.save("data")
    told = [controller_key(manager)]
    answers = [register(manager, joinToken="guess-of-a-token")[1], register(manager, key="DHHC-1:00:bm90IGEga2V5:")[1]]
    manager.attach("data", NODE)
    answers += [manager.get(f"/clients/{NODE}"), manager.get("/clients/all/0/0"), manager.get("/volumes/data")]
    (file,) = manager.server.pool.keys.iterdir()
    file.write_text(file.read_text()[:-20])
    answers.append(register(manager)[1])
    text = json.dumps(answers) + caplog.text + repr(manager.server.keys) + repr(manager.server.settings)
    for secret in (*told, KEY, TOKEN, "guess-of-a-token", "bm90IGEga2V5"):
        assert secret not in text
