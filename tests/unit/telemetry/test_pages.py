# SPDX-License-Identifier: Apache-2.0
"""Health pages and metrics over HTTP, and clients that are slow, silent or hostile."""

from __future__ import annotations

import errno
import http.client
import logging
import re
import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing, contextmanager, suppress
from dataclasses import dataclass, field
from functools import partial

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from csi_driver.deadline import Deadline
from csi_driver.errors import PreconditionFailed
from csi_driver.settings import HttpSettings
from csi_driver.telemetry import pages as module
from csi_driver.telemetry.pages import Page, Pages, PageServer, health

PAGES: Pages = {
    "/healthz": lambda: Page(200, "csi: ok\n"),
    "/readyz": lambda: Page(503, "management: away\n"),
}


@contextmanager
def serving(pages: Pages = PAGES, host: str = "127.0.0.1") -> Iterator[PageServer]:
    with PageServer(HttpSettings(host, 0), pages) as server:
        yield server


def connect(server: PageServer, host: str | None = None) -> socket.socket:
    return socket.create_connection((host or server.address.host, server.address.port), timeout=120)


@dataclass
class Reply:
    status: int
    headers: dict[str, str]
    body: str


def ask(server: PageServer, path: str, method: str = "GET", host: str | None = None) -> Reply:
    with closing(http.client.HTTPConnection(host or server.address.host, server.address.port, timeout=120)) as client:
        client.request(method, path)
        answer = client.getresponse()
        return Reply(answer.status, dict(answer.getheaders()), answer.read().decode())


def say(server: PageServer, data: bytes) -> bytes:
    """Send bytes as they are, and return all that comes back."""
    with connect(server) as client:
        with suppress(ConnectionError):
            client.sendall(data)
        return all_of(client)


def all_of(client: socket.socket) -> bytes:
    """Return the bytes until the server closes the connection."""
    parts: list[bytes] = []
    with suppress(ConnectionResetError):
        parts.extend(iter(lambda: client.recv(4096), b""))
    return b"".join(parts)


@dataclass
class Gate:
    """A page that is made when the gate is opened; counts how often."""

    made: int = 0
    entered: threading.Semaphore = field(default_factory=lambda: threading.Semaphore(0))
    opened: threading.Event = field(default_factory=threading.Event)

    def __call__(self) -> Page:
        self.made += 1
        self.entered.release()
        assert self.opened.wait(60)
        return Page(200, f"made {self.made}\n")


class _Shared:
    """One server for all examples of a property."""

    def __init__(self) -> None:
        self._life = ExitStack()
        self._server: PageServer | None = None

    def get(self) -> PageServer:
        if self._server is None:
            self._server = self._life.enter_context(serving())
        return self._server

    def close(self) -> None:
        self._life.close()
        self._server = None


_SHARED = _Shared()


@pytest.fixture(autouse=True)
def _stops_soon(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(PageServer, "poll_s", 0.01)


@pytest.fixture(scope="module", autouse=True)
def _nothing_is_served_afterwards() -> Iterator[None]:
    yield
    _SHARED.close()


# --- responses --------------------------------------------------------------------------------------------------


def test_a_page_is_served_with_its_status_and_its_length() -> None:
    with serving() as server:
        fine, away = ask(server, "/healthz"), ask(server, "/readyz")
    assert (fine.status, fine.body) == (200, "csi: ok\n")
    assert (away.status, away.body) == (503, "management: away\n")
    assert fine.headers["Content-Length"] == "8"
    assert fine.headers["Content-Type"] == "text/plain; charset=utf-8"
    assert fine.headers["Connection"] == "close"


def test_head_is_the_answer_without_the_page() -> None:
    with serving() as server:
        head, _, body = say(server, b"HEAD /healthz HTTP/1.1\r\n\r\n").partition(b"\r\n\r\n")
    assert head.startswith(b"HTTP/1.0 200 OK\r\n")
    assert b"Content-Length: 8" in head
    assert body == b""


@pytest.mark.parametrize("target", ["/healthz?verbose", "http://node:9809/healthz", "http://node:9809/healthz?verbose"])
def test_a_query_and_a_whole_url_lead_to_the_same_page(target: str) -> None:
    with serving() as server:
        assert ask(server, target).status == 200


@pytest.mark.parametrize("path", ["/", "/healthz/", "/metrics/../healthz", "*"])
def test_other_paths_are_not_found(path: str) -> None:
    with serving() as server:
        assert ask(server, path).status == 404


@pytest.mark.parametrize("method", ["POST", "PUT", "DELETE", "OPTIONS", "get"])
def test_other_methods_are_refused(method: str) -> None:
    with serving() as server:
        assert ask(server, "/healthz", method).status == 501


def test_a_request_of_bare_newlines_is_understood() -> None:
    with serving() as server:
        assert say(server, b"GET /healthz HTTP/1.0\n\n").startswith(b"HTTP/1.0 200 OK\r\n")


def test_a_page_with_a_bug_is_an_internal_error_without_details(caplog: pytest.LogCaptureFixture) -> None:
    def broken() -> Page:
        raise RuntimeError("secret")

    with serving({"/p": broken}) as server:
        reply = ask(server, "/p")
    assert reply.status == 500
    assert "secret" not in reply.body
    assert [record.levelno for record in caplog.records if record.exc_info] == [logging.ERROR]


def test_a_page_of_any_size_arrives_whole() -> None:
    text = "x" * (8 << 20)
    with serving({"/p": lambda: Page(200, text)}) as server:
        assert ask(server, "/p").body == text


# --- addresses ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("host", "asked"), [("::1", "::1"), ("::", "127.0.0.1"), ("::", "::1"), ("", "127.0.0.1")])
def test_ipv4_and_ipv6_addresses_are_served(host: str, asked: str) -> None:
    with serving(host=host) as server:
        assert ask(server, "/healthz", host=asked).status == 200


def test_all_ipv4_addresses_are_served_without_ipv6(monkeypatch: pytest.MonkeyPatch) -> None:
    make = socket.socket

    def without_ipv6(family: int = -1, *more: int) -> socket.socket:
        if family == socket.AF_INET6:
            raise OSError(errno.EAFNOSUPPORT, "no")
        return make(family, *more)

    monkeypatch.setattr(socket, "socket", without_ipv6)
    with serving(host="") as server:
        monkeypatch.undo()
        assert server.address.host == "0.0.0.0"
        assert ask(server, "/healthz", host="127.0.0.1").status == 200


def test_a_used_address_is_an_error_at_start() -> None:
    with serving() as server, pytest.raises(PreconditionFailed, match=rf"listen on {server.address}: .*in use"):
        PageServer(server.address, PAGES)


def test_a_foreign_address_is_an_error_at_start() -> None:
    with pytest.raises(PreconditionFailed, match=r"cannot listen on 192\.0\.2\.1:0"):
        PageServer(HttpSettings("192.0.2.1", 0), PAGES)


def test_an_address_can_be_reused_at_once() -> None:
    with serving() as server:
        ask(server, "/healthz")
        address = server.address
    with PageServer(address, PAGES) as server:
        assert ask(server, "/healthz").status == 200


# --- hostile clients --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("sent", "status"),
    [
        (b"\x16\x03\x01\x02\x00\x01\x00\r\n\r\n", 400), (b"GET /healthz HTTP/1.1 more\r\n\r\n", 400),
        (b"GET /healthz HTTP/2.0\r\n\r\n", 505), (b"PRI * HTTP/2.0\r\n\r\n", 505),
        (b"GET /\xff\xfe HTTP/1.1\r\n\r\n", 404),
    ],
)  # fmt: skip
def test_invalid_requests_have_their_http_status(sent: bytes, status: int) -> None:
    with serving() as server:
        assert f" {status}".encode() in say(server, sent)
        assert ask(server, "/healthz").status == 200


@settings(max_examples=150, deadline=None)
@given(
    st.lists(
        st.sampled_from(
            [b"GET", b"HEAD", b" ", b"/healthz", b"/", b" HTTP/1.1", b"HTTP/", b"\r\n", b"\n", b"http://", b"?"]
        )
        | st.binary(max_size=20),
        max_size=12,
    ),
    st.booleans(),
)
def test_any_bytes_are_answered_or_closed_and_other_clients_served(parts: list[bytes], hangs_up: bool) -> None:
    server = _SHARED.get()
    with connect(server) as client:
        client.sendall(b"".join(parts))
        if not hangs_up:
            with suppress(OSError):
                client.shutdown(socket.SHUT_WR)
            answer = all_of(client)
            assert answer == b"" or re.search(rb"HTTP/1\.0 [2-5]\d\d |csi: ok|not found|<HTML|<!DOCTYPE", answer)
    assert ask(server, "/healthz").status == 200


def is_closed_after_a_byte(client: socket.socket) -> bool:
    try:
        client.sendall(b"X")
    except OSError:
        return True
    return False


def test_a_slow_request_holds_a_thread_for_a_limited_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "REQUEST_TIME_S", 0.3)
    with serving() as server, connect(server) as silent, connect(server) as slow:
        slow.sendall(b"GET /healthz HTTP/1.1\r\n")
        assert Deadline.after(60).wait_until(partial(is_closed_after_a_byte, slow), most_s=0.02)
        assert all_of(silent) == b""
        assert Deadline.after(60).wait_until(lambda: not server._open)


def test_a_slow_reader_holds_a_thread_for_a_limited_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "REQUEST_TIME_S", 0.3)
    with serving({"/p": lambda: Page(200, "x" * (64 << 20))}) as server, connect(server) as client:
        client.sendall(b"GET /p HTTP/1.1\r\n\r\n")
        assert Deadline.after(60).wait_until(lambda: bool(server._making))
        assert Deadline.after(60).wait_until(lambda: not server._open)


def test_a_request_that_is_too_large_is_not_read_to_its_end() -> None:
    with serving() as server, connect(server) as client:
        with suppress(OSError):
            client.sendall(b"GET /healthz HTTP/1.1\r\n" + b"X-A: b\r\n" * 100_000)
        with suppress(OSError):
            assert b"200" not in all_of(client)
        assert ask(server, "/healthz").status == 200


def test_silent_clients_do_not_block_others() -> None:
    with serving() as server, ExitStack() as held:
        for _ in range(3 * module.MOST_CONNECTIONS):
            client = held.enter_context(connect(server))
            client.send(b"G")
        assert ask(server, "/healthz").status == 200
        assert Deadline.after(60).wait_until(lambda: len(server._open) <= module.MOST_CONNECTIONS)
        serving_threads = [each for each in threading.enumerate() if each.name == "http-request"]
        assert len(serving_threads) <= module.MOST_CONNECTIONS + 1


def test_a_waiting_client_is_not_dropped_for_silent_ones() -> None:
    gate = Gate()
    with serving({"/p": gate}) as server, ExitStack() as held:
        patient = held.enter_context(connect(server))
        patient.sendall(b"GET /p HTTP/1.1\r\n\r\n")
        assert gate.entered.acquire(timeout=120)
        for _ in range(2 * module.MOST_CONNECTIONS):
            held.enter_context(connect(server))
        gate.opened.set()
        assert b"made 1" in all_of(patient)


def test_concurrent_requests_share_one_execution_of_a_page() -> None:
    gate = Gate()
    with serving({"/p": gate}) as server, ExitStack() as held:
        clients = [held.enter_context(connect(server)) for _ in range(20)]
        for client in clients:
            client.sendall(b"GET /p HTTP/1.1\r\n\r\n")
        assert gate.entered.acquire(timeout=120)
        assert Deadline.after(30).wait_until(lambda: list(server._open.values()).count(True) == len(clients))
        gate.opened.set()
        assert all(b"made 1" in all_of(client) for client in clients)
        assert ask(server, "/p").body == "made 2\n"


def test_a_hanging_page_times_out_and_blocks_no_other(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_PAGE_TIME_S", 0.2)
    gate = Gate()
    with serving({"/p": gate, **PAGES}) as server:
        assert say(server, b"GET /p HTTP/1.1\r\n\r\n").startswith(b"HTTP/1.0 503 ")
        assert ask(server, "/healthz").status == 200
        gate.opened.set()
        monkeypatch.setattr(module, "_PAGE_TIME_S", 30.0)
        assert Deadline.after(30).wait_until(server._making["/p"].done)
        assert ask(server, "/p").body == "made 2\n"


def test_a_client_that_leaves_early_harms_no_other() -> None:
    gate = Gate()
    with serving({"/p": gate, **PAGES}) as server:
        with connect(server) as client:
            client.sendall(b"GET /p HTTP/1.1\r\n\r\n")
            assert gate.entered.acquire(timeout=120)
        gate.opened.set()
        assert ask(server, "/p").status == 200
        assert ask(server, "/healthz").status == 200


def test_the_server_ends_at_once_with_open_connections() -> None:
    gate = Gate()
    with serving({"/p": gate}) as server, connect(server) as client:
        client.sendall(b"GET /p HTTP/1.1\r\n\r\n")
        assert gate.entered.acquire(timeout=120)
        address = server.address
    gate.opened.set()
    with pytest.raises(ConnectionRefusedError):
        socket.create_connection((address.host, address.port))


# --- health -----------------------------------------------------------------------------------------------------


def checks(*results: str) -> dict[str, Callable[[], str]]:
    return {f"check-{number}": (lambda why=why: why) for number, why in enumerate(results)}  # type: ignore[misc]


def test_health_is_ok_when_no_check_fails() -> None:
    assert health(checks("", "")) == Page(200, "check-0: ok\ncheck-1: ok\n")


def test_every_check_has_a_line_with_its_reason() -> None:
    assert health(checks("", "away\nfor good")) == Page(503, "check-0: ok\ncheck-1: away\\nfor good\n")
