# SPDX-License-Identifier: Apache-2.0
"""What HTTP adds: sessions, statuses, cookies, malformed requests."""

from __future__ import annotations

import json
import logging
import os
import re
import socket
import stat
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import pytest
import requests

from csi_driver import http_requests
from csi_driver.embedded import server as embedded
from csi_driver.embedded.pool import Pool
from csi_driver.embedded.server import StorageServer
from csi_driver.embedded.sessions import Password, Sessions
from csi_driver.embedded.settings import StorageSettings
from csi_driver.errors import PreconditionFailed
from csi_driver.http_requests import MAX_BODY_BYTES, HttpRequest, HttpResponse
from tests.fakes.clock import FakeClock
from tests.storage_switches import add_route
from tests.unit.embedded.fake_loops import FakeLoopDevices
from tests.unit.embedded.manager import Json, settings_in


class Caller:
    """A client that speaks to a running server."""

    def __init__(self, server: StorageServer) -> None:
        self.server = server
        self.session = requests.Session()
        self.session.headers["Accept"] = "application/json"

    def call(self, method: str, path: str, **arguments: Json) -> requests.Response:
        return self.session.request(method, self.server.url + path, allow_redirects=False, timeout=120, **arguments)

    def log_in(self, user: str = "admin@nvidia.com", password: str | None = None) -> requests.Response:
        if password is None:
            password = self.server.password.path.read_text().strip()
        return self.call("POST", "/login", json={"username": user, "password": password})


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[StorageServer]:
    running = StorageServer(settings_in(tmp_path_factory.mktemp("http")), FakeLoopDevices())
    add_route(running)
    running.start()
    yield running
    running.stop()


@pytest.fixture
def stranger(server: StorageServer) -> Caller:
    return Caller(server)


@pytest.fixture
def caller(stranger: Caller) -> Caller:
    assert stranger.log_in().json()["success"]
    return stranger


@pytest.mark.parametrize(("method", "path"), [
    ("GET", "/volumes/all/0/0"), ("POST", "/volumes/save"), ("GET", "/systemInfo"), ("GET", "/nothing"),
    ("DELETE", "/volumes/a"), ("GET", "/openapi.json"), ("POST", "/embedded/test/hold"),
])  # fmt: skip
def test_a_stranger_is_sent_to_login(stranger: Caller, method: str, path: str) -> None:
    answer = stranger.call(method, path)
    assert (answer.status_code, answer.headers["Location"]) == (302, "/login")


def test_a_login_gives_a_cookie(stranger: Caller) -> None:
    answer = stranger.log_in()
    assert answer.json()["payload"]["id"] == 1265
    assert "connect.sid=" in answer.headers["Set-Cookie"]
    assert "HttpOnly" in answer.headers["Set-Cookie"]


@pytest.mark.parametrize(("user", "password"), [("admin", "wrong"), ("other", None), ("admin", "")])
def test_wrong_credentials_are_refused(stranger: Caller, user: str, password: str | None) -> None:
    answer = stranger.log_in(user, password)
    assert (answer.status_code, answer.json()["success"]) == (401, False)
    assert stranger.call("GET", "/systemInfo").status_code == 302


def test_unknown_paths_and_methods_are_not_found(caller: Caller) -> None:
    for method, path in (
        ("GET", "/nothing"),
        ("DELETE", "/volumes/save"),
        ("POST", "/snapshots/nothing"),
        ("GET", "/openapi.json"),
    ):
        answer = caller.call(method, path)
        assert (answer.status_code, answer.json()) == (404, {"success": False, "err": "404 (Not Found)"})


@pytest.mark.parametrize("body", ["[{", "[1e999999999", "NaN", '{"a":}', "[" * 100_000, "\xff"])
def test_a_body_that_is_no_json_is_400(caller: Caller, body: str) -> None:
    headers = {"Content-Type": "application/json"}
    assert caller.call("POST", "/volumes/save", data=body.encode("latin-1"), headers=headers).status_code == 400


@pytest.mark.parametrize(("levels", "status"), [(95, 200), (101, 400), (900, 400), (4000, 400)])
def test_a_body_that_is_nested_deeper_than_a_database_takes_is_400(caller: Caller, levels: int, status: int) -> None:
    metadata = '{"a":' * levels + "1" + "}" * levels
    item = f'[{{"name": "deep{levels}", "capacity": 1, "VPG": "DEFAULT_CONCATENATED_VPG", "metadata": {metadata}}}]'
    headers = {"Content-Type": "application/json"}
    assert caller.call("POST", "/volumes/save", data=item, headers=headers).status_code == status


def test_a_body_above_two_megabytes_is_413(caller: Caller) -> None:
    headers = {"Content-Type": "application/json"}
    assert caller.call("POST", "/volumes/save", data=b"[" + b" " * (2 << 20), headers=headers).status_code == 413


def test_a_body_of_another_type_is_415(caller: Caller) -> None:
    headers = {"Content-Type": "text/plain"}
    assert caller.call("POST", "/volumes/save", data=b"[]", headers=headers).status_code == 415


def test_a_login_whose_password_cannot_be_read_is_500_with_the_reason(caller: Caller) -> None:
    password = caller.server.password.path
    aside = password.rename(password.with_suffix(".aside"))
    answer = requests.post(
        caller.server.url + "/login",
        json={"username": "admin", "password": "x"},
        headers={"Accept": "*/*"},
        timeout=120,
    )
    aside.rename(password)
    assert answer.status_code == 500
    assert "password cannot be read" in answer.json()["error"]["message"]


def test_a_client_can_be_set_down_over_http(caller: Caller) -> None:
    for held, status in ((True, 5), (False, 1)):
        caller.call("POST", "/tests/hold", json={"kind": "client:node-2", "held": held})
        assert caller.call("GET", "/clients/node-2").json()["client_status"] == status


def test_the_password_is_for_its_owner_alone(server: StorageServer) -> None:
    assert stat.S_IMODE(server.password.path.stat().st_mode) == 0o600
    assert len(server.password.path.read_text().strip()) >= 24


def sessions_in(directory: Path, clock: FakeClock) -> Sessions:
    settings = StorageSettings(directory, session_idle_s=60)
    return Sessions(settings, Password.generated(directory / "password"), clock)


def test_a_session_ends_when_it_is_idle_and_not_before(tmp_path: Path) -> None:
    clock = FakeClock()
    sessions = sessions_in(tmp_path, clock)
    session = sessions.open("admin", (tmp_path / "password").read_text().strip())
    for _ in range(5):
        clock.sleep(59)
        assert sessions.known(session)
    clock.sleep(61)
    assert not sessions.known(session)


def test_a_password_file_is_read_again_when_it_changes(tmp_path: Path) -> None:
    path = tmp_path / "given"
    path.write_text("first\n")
    password = Password(path)
    assert password.matches("first")
    replacement = tmp_path / "new"
    replacement.write_text("second\n")
    replacement.rename(path)
    assert password.matches("second")
    assert not password.matches("first")


def test_answers_are_plain_json(caller: Caller) -> None:
    answer = caller.call("GET", "/systemInfo")
    assert answer.headers["Content-Type"] == "application/json; charset=utf-8"
    assert json.loads(answer.text)["APIVersion"] == "18.0.0"


def exchange(server: StorageServer, sent: bytes) -> bytes:
    """Send bytes on a connection, end them, and return all that comes back."""
    with socket.create_connection(server.address) as connection:
        connection.sendall(sent)
        connection.shutdown(socket.SHUT_WR)
        return b"".join(iter(lambda: connection.recv(1 << 16), b""))


@pytest.mark.parametrize(("line", "header", "status"), [
    ("GET /login HTTP/1.1", "Host: localhost\r\nHost: example.com", 400),
    ("POST /login HTTP/1.1", "Transfer-Encoding: chunked", 411),
    ("POST /login HTTP/1.1", "Content-Length: x", 411),
    ("POST /login HTTP/1.1", "Content-Length: -1", 411),
    ("POST /login HTTP/1.1", "Content-Length: +1", 411),
    ("POST /login HTTP/1.1", "Content-Length: 1, 1", 411),
    ("POST /login HTTP/1.1", "Content-Length: 1\x0b", 411),
    ("POST /login HTTP/1.1", "Content-Length:", 411),
    ("POST /login HTTP/1.1", "Transfer-Encoding: identity\r\nContent-Length: 0", 411),
    ("POST /login HTTP/1.1", f"Content-Length: {'1' * 5000}", 411),
    ("POST /login HTTP/1.1", "Content-Length: 1\r\nContent-Length: 1", 400),
    ("GET /login HTTP/1.1", "Content-Length : 1", 400),
    ("GET /login HTTP/1.1", "Host: x\r\n folded: y", 400),
    ("GET /login HTTP/1.1", "no header", 400),
    ("GET /login HTTP/1.1", "Host: x\rContent-Length: 0", 400),
    ("GET /login HTTP/1.1", "Host: x\0", 400),
    ("GET /login HTTP/1.1", ": no name", 400),
    ("GET /login HTTP/1.1", "From somebody: x", 400),
    ("GET /login HTTP/1.1", " begins: folded", 400),
    ("GET /login HTTP/1.1", "\r\n".join(f"a{number}: x" for number in range(101)), 431),
    ("GET /login HTTP/1.1", f"a: {'x' * (1 << 16)}", 431),
    (f"GET /{'x' * (1 << 16)} HTTP/1.1", "Host: x", 414),
    ("GET /login HTTP/2.0", "Host: x", 505),
    ("GET /login HTTP/01.1", "Host: x", 400),
    ("GET /login\xa0HTTP/1.1", "Host: x", 400),
    ("GET /login x HTTP/1.1", "Host: x", 400),
    ("WALK /login HTTP/1.1", "Host: x", 501),
    ("GET /login", "Host: x", 400),
    ("GET /login HTTP/1.0", "Host: x", 200),
    ("GET /login HTTP/1.1", "Connection: Close", 200),
])  # fmt: skip
def test_after_a_request_that_is_none_the_connection_ends(
    server: StorageServer, line: str, header: str, status: int
) -> None:
    received = exchange(server, f"{line}\r\n{header}\r\n\r\nGET /login HTTP/1.1\r\n\r\n".encode("latin-1"))
    assert re.findall(rb"HTTP/1.1 (\d+)", received) == [str(status).encode()]


def test_a_client_that_waits_before_it_sends_a_body_is_told_to_go_on(server: StorageServer) -> None:
    headers = ("Content-Type: application/json", "Content-Length: 2", "Expect: 100-continue")
    head = "".join(f"{line}\r\n" for line in ("POST /login HTTP/1.1", *headers, "")).encode()
    with socket.create_connection(server.address) as connection:
        connection.sendall(head)
        assert connection.recv(1 << 16) == b"HTTP/1.1 100 Continue\r\n\r\n"
        connection.sendall(b"{}")
        assert connection.recv(1 << 16).startswith(b"HTTP/1.1 422 ")


def test_a_request_that_is_cut_off_is_not_carried_out(server: StorageServer) -> None:
    body = b'{"username": "admin", "password": "x"}   '
    head = f"POST /login HTTP/1.1\r\nContent-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"
    assert exchange(server, head.encode() + body).startswith(b"HTTP/1.1 401 ")
    assert exchange(server, head.encode() + body[:-1]) == b""
    whole = b"GET /login HTTP/1.1\r\nHost: x\r\n\r\n"
    assert all(exchange(server, whole[:length]) == b"" for length in range(len(whole)))


def test_requests_that_are_sent_at_once_on_one_connection_are_answered_in_order(server: StorageServer) -> None:
    requests_sent = b"GET /login HTTP/1.1\r\n\r\nHEAD /login HTTP/1.1\r\n\r\nGET /nothing HTTP/1.1\r\n\r\n"
    received = exchange(server, requests_sent)
    assert re.findall(rb"HTTP/1.1 (\d+)", received) == [b"200", b"200", b"302"]
    assert received.count(b"Please login") == 1


def test_after_a_body_that_is_not_read_to_its_end_the_connection_ends(server: StorageServer) -> None:
    head = f"POST /login HTTP/1.1\r\nContent-Type: application/json\r\nContent-Length: {3 << 20}\r\n\r\n"
    received = exchange(server, head.encode() + b" " * (MAX_BODY_BYTES + 1) + b"GET /login HTTP/1.1\r\n\r\n")
    assert re.findall(rb"HTTP/1.1 (\d+)", received) == [b"413"]


def test_an_unexpected_error_is_logged_and_answered(
    server: StorageServer, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def broken(_: HttpRequest) -> HttpResponse:
        raise ZeroDivisionError("secret")

    monkeypatch.setitem(server.api.public, ("GET", "/broken"), broken)
    answer = Caller(server).call("GET", "/broken")
    assert (answer.status_code, answer.json()["success"], answer.json()["error"]["id"]) == (500, False, 500)
    assert "secret" not in answer.text
    assert [record.levelno for record in caplog.records if record.exc_info] == [logging.ERROR]


def test_a_request_that_is_sent_too_slowly_is_not_carried_out(
    server: StorageServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(http_requests, "_RECEIVE_S", 0.1)
    with socket.create_connection(server.address, timeout=60) as connection:
        connection.sendall(b"GET /login HTTP/1.1\r\n")
        assert connection.recv(1) == b""


def test_a_connection_that_ends_leaves_no_thread(tmp_path: Path) -> None:
    running = StorageServer(settings_in(tmp_path), FakeLoopDevices())
    running.start()
    for _ in range(20):
        exchange(running, b"GET /login HTTP/1.1\r\n\r\n")
    with running._http._changed:
        assert running._http._changed.wait_for(lambda: not running._http._open, 60)
    running.stop()


def test_the_end_waits_for_the_present_request_and_for_no_idle_connection(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    running = StorageServer(settings_in(tmp_path), FakeLoopDevices())
    began, go_on, order = threading.Event(), threading.Event(), list[str]()

    def slow(request: HttpRequest) -> HttpResponse:
        began.set()
        assert go_on.wait(60)
        order.append("answered")
        return HttpResponse(200, request.body)

    def wait_for(*arguments: Json) -> Json:
        go_on.set()
        return real(*arguments)

    def close_store() -> None:
        order.append("closed")
        close()

    running.api.public["POST", "/slow"] = slow
    close, real = running.store.close, running._http._changed.wait_for
    monkeypatch.setattr(running._http._changed, "wait_for", wait_for)
    monkeypatch.setattr(running.store, "close", close_store)
    running.start()
    idle = Caller(running)
    idle.log_in()
    with ThreadPoolExecutor(1) as pool:
        answer = pool.submit(Caller(running).call, "POST", "/slow", data=b"kept")
        assert began.wait(60)
        running.stop()
        go_on.set()
        assert answer.result(60).content == b"kept"
    assert (order, running._http._open) == (["answered", "closed"], {})


# --- health -----------------------------------------------------------------------------------------------------


def test_a_manager_answers_itself(server: StorageServer) -> None:
    assert server.why_silent() == ""
    assert server.why_unusable() == ""


@pytest.mark.parametrize("listens", [True, False], ids=["hangs", "gone"])
def test_an_api_that_does_not_answer_is_told(listens: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(embedded, "_ANSWER_TIME_S", 0.2)
    with socket.create_server(("127.0.0.1", 0)) as silent:
        port = silent.getsockname()[1]
        if not listens:
            silent.close()
        said = embedded.why_silent("0.0.0.0", port, tls=False)
    assert ("timed out" if listens else "refused") in said


def test_an_answer_of_somebody_else_is_told(stranger: Caller, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(embedded, "_PUBLIC_PATH", "/volumes/all/0/0")
    assert stranger.server.why_silent() == "the API answers with HTTP status 302"


def test_a_pool_that_is_gone_cannot_be_used(tmp_path: Path) -> None:
    pool = Pool(tmp_path / "pool")
    assert pool.why_unusable() == ""
    pool.volumes.rmdir()
    assert "No such file" in pool.why_unusable()
    pool.close()


# --- the socket that is inherited -------------------------------------------------------------------------------


def test_an_inherited_socket_is_served_under_its_own_address(tmp_path: Path) -> None:
    with socket.socket() as bound:
        bound.bind(("127.0.0.1", 0))
        settings = replace(settings_in(tmp_path), listen=os.dup(bound.fileno()))
        running = StorageServer(settings, FakeLoopDevices())
        try:
            running.start()
            assert running.address == bound.getsockname()
            assert Caller(running).log_in().status_code == 200
        finally:
            running.stop()


def test_a_descriptor_that_is_no_socket_is_refused(tmp_path: Path) -> None:
    with open(os.devnull) as other, pytest.raises(PreconditionFailed, match=rf"--listen fd:{other.fileno()}: "):
        StorageServer(replace(settings_in(tmp_path), listen=other.fileno()), FakeLoopDevices())
