# SPDX-License-Identifier: Apache-2.0
"""The key of a node: made once, kept for root alone, registered once at the embedded manager over TLS."""

from __future__ import annotations

import contextlib
import errno
import json
import logging
import socket
import ssl
import stat
import threading
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from csi_driver.embedded.settings import StorageSettings
from csi_driver.errors import HostFailure, StorageUnavailable
from csi_driver.host.nvme_keys import NodeKeys, Registration
from csi_driver.http_requests import HttpRequest, HttpResponse, HttpServer
from csi_driver.nvme_model import is_dhchap_key, new_dhchap_key
from tests.contract.pki import Authority
from tests.unit.embedded.manager import Manager, running, settings_in

NODE = "worker-1"
TOKEN = "join-me-with-this-token"


class Service:
    """The manager's API behind TLS, and the requests that it got."""

    def __init__(self, manager: Manager, authority: Authority) -> None:
        self.manager = manager
        self.requests: list[HttpRequest] = []
        pair = authority.issue("storage")
        tls = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        tls.load_cert_chain(pair.certificate, pair.key)
        self.listener = socket.create_server(("127.0.0.1", 0))
        self.url = f"https://127.0.0.1:{self.listener.getsockname()[1]}"
        self.server = HttpServer(self.listener, self.respond, tls, HttpResponse(500), "test-api")
        self.thread = threading.Thread(target=self.server.serve, daemon=True)
        self.thread.start()

    def respond(self, request: HttpRequest) -> HttpResponse:
        self.requests.append(request)
        return self.manager.server.api.respond(request)

    def close(self) -> None:
        self.server.is_ending = True
        with contextlib.suppress(OSError), socket.create_connection(self.listener.getsockname()[:2], 1):
            pass
        self.thread.join()
        self.server.server_close()


@pytest.fixture(scope="module")
def authority(tmp_path_factory: pytest.TempPathFactory) -> Authority:
    return Authority(tmp_path_factory.mktemp("pki") / "ca", "storage CA")


@pytest.fixture
def token(tmp_path: Path) -> Path:
    file = tmp_path / "token"
    file.write_text(f"{TOKEN}\n")
    return file


@pytest.fixture
def settings(tmp_path: Path, token: Path) -> StorageSettings:
    return settings_in(tmp_path, authentication="required", join_token_file=token)


@pytest.fixture
def service(settings: StorageSettings, authority: Authority) -> Iterator[Service]:
    with running(settings) as manager:
        manager.server.clients.has_exports = True
        made = Service(manager, authority)
        yield made
        made.close()


@pytest.fixture
def keys(tmp_path: Path, token: Path, service: Service, authority: Authority) -> NodeKeys:
    return NodeKeys(tmp_path / "state", Registration(service.url, token, authority.certificate), lambda: NODE)


def test_a_node_registers_its_key_and_gets_that_of_the_targets(keys: NodeKeys, service: Service) -> None:
    keys.register()
    at_manager = service.manager.server.keys.get(NODE)
    assert at_manager == keys.get()
    assert is_dhchap_key(keys.get().controller)


def test_a_key_is_registered_once_for_each_start(keys: NodeKeys, service: Service) -> None:
    keys.register()
    keys.register()
    assert len(service.requests) == 1
    again = NodeKeys(keys.directory, keys.registration, lambda: NODE)
    assert again.get() == keys.get()
    again.register()
    assert len(service.requests) == 2
    assert again.get() == keys.get()


def test_a_key_that_a_target_rejected_is_registered_again(keys: NodeKeys, service: Service) -> None:
    keys.register()
    keys.rejected()
    keys.register()
    assert len(service.requests) == 2


def test_the_keys_are_readable_by_root_alone(keys: NodeKeys) -> None:
    keys.register()
    (file,) = [each for each in keys.directory.iterdir() if keys.get().host in each.read_text()]
    assert stat.S_IMODE(file.stat().st_mode) == 0o600
    assert [each.name for each in keys.directory.iterdir()] == [file.name]


def test_before_the_registration_a_node_has_its_own_key_alone(keys: NodeKeys) -> None:
    assert is_dhchap_key(keys.get().host)
    assert keys.get().controller == ""


def test_the_token_is_read_again_at_each_attempt(keys: NodeKeys, token: Path, tmp_path: Path) -> None:
    other = tmp_path / "other-token"
    other.write_text("not the token of the manager")
    keys.registration = replace(keys.registration, token_file=other)
    with pytest.raises(StorageUnavailable, match="status 401"):
        keys.register()
    other.write_text(token.read_text())
    keys.register()
    assert keys.get().controller


def test_a_manager_with_a_certificate_of_another_authority_gets_no_key(
    keys: NodeKeys, service: Service, tmp_path: Path
) -> None:
    other = Authority(tmp_path / "other", "another CA")
    keys.registration = replace(keys.registration, ca_file=other.certificate)
    with pytest.raises(StorageUnavailable, match="certificate"):
        keys.register()
    assert service.requests == []


def test_a_manager_that_is_away_is_asked_again(keys: NodeKeys, service: Service) -> None:
    away = keys.registration
    keys.registration = replace(away, url="https://127.0.0.1:1")
    with pytest.raises(StorageUnavailable, match="not registered at https"):
        keys.register()
    keys.registration = away
    keys.register()
    assert len(service.requests) == 1


def test_the_first_retries_of_a_registration_come_soon(keys: NodeKeys, service: Service) -> None:
    away = keys.registration
    keys.registration = replace(away, url="https://127.0.0.1:1")
    loop = keys.loop()
    pauses_s = [loop.run_once() for _ in range(8)]
    longest_s = [1, 2, 4, 8, 16, 30, 30, 30]
    assert all(most_s / 2 <= pause_s <= most_s for pause_s, most_s in zip(pauses_s, longest_s, strict=True))
    keys.registration = away
    assert loop.run_once() == 30
    keys.rejected()
    assert loop.run_once() == 30
    assert len(service.requests) == 2


def test_a_file_of_keys_that_cannot_be_read_is_replaced(keys: NodeKeys) -> None:
    keys.directory.mkdir()
    keys.get()
    (file,) = keys.directory.iterdir()
    file.write_text('{"key": "DHHC-1:00:torn')
    again = NodeKeys(keys.directory, keys.registration, lambda: NODE)
    assert is_dhchap_key(again.get().host)
    assert again.get().host != keys.get().host


def test_a_key_that_cannot_be_read_now_is_not_replaced(keys: NodeKeys, monkeypatch: pytest.MonkeyPatch) -> None:
    own = keys.get()
    again = NodeKeys(keys.directory, keys.registration, lambda: NODE)

    def refuse(file: Path) -> str:
        raise OSError(errno.EMFILE, "too many open files")

    with monkeypatch.context() as patched:
        patched.setattr(Path, "read_text", refuse)
        with pytest.raises(HostFailure, match="Too many open files"):
            again.get()
    assert again.get() == own


@pytest.mark.parametrize("status", [200, 401, 409, 500])
def test_no_key_and_no_token_reaches_an_error_or_a_log(
    status: int, keys: NodeKeys, service: Service, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    caplog.set_level(logging.DEBUG)
    mistaken = json.dumps({"error": "refused", "payload": {"controllerKey": new_dhchap_key()[:-3]}}).encode()
    monkeypatch.setattr(service, "respond", lambda request: HttpResponse(status, mistaken))
    service.server.respond = service.respond
    with pytest.raises(StorageUnavailable) as raised:
        keys.register()
    texts = f"{raised.value} {raised.value.__cause__} {caplog.text} {keys!r}"
    for secret in (TOKEN, keys.get().host, "DHHC-1"):
        assert secret not in texts
