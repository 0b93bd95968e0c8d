# SPDX-License-Identifier: Apache-2.0
"""Single connections: framing, slow responses, reuse, and independence of the environment."""

from __future__ import annotations

import socket
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import requests

from csi_driver.deadline import Deadline
from csi_driver.errors import OutcomeUnknown, ServerUnreachable
from csi_driver.management.settings import ManagementSettings
from csi_driver.management.transport import Request, Transport
from tests.unit.management.double import closed_port, running

LONG_S = 20.0
"""Far below the limit of a request, and far above the delays of a busy machine."""

LONG = b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nX-Filler: " + b"x" * 20


class RawServer:
    """Sends each connection these pieces, with pauses in between; `ends`: then closes it."""

    def __init__(self, *pieces: bytes, pause_s: float = 0.0, ends: bool = True) -> None:
        self._pieces, self._pause_s, self._ends = pieces, pause_s, ends
        self._listener = socket.create_server(("127.0.0.1", 0))
        self._stopped = threading.Event()
        self.connections = 0
        self.received: list[bytes] = []
        self.closed = threading.Semaphore(0)
        """Counts the connections that this server has closed."""
        self._threads = [threading.Thread(target=self._accept, daemon=True)]
        self._threads[0].start()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self._listener.getsockname()[1]}"

    def _accept(self) -> None:
        while not self._stopped.is_set():
            try:
                connection, _ = self._listener.accept()
            except OSError:
                return
            self.connections += 1
            self._threads.append(threading.Thread(target=self._serve, args=(connection,), daemon=True))
            self._threads[-1].start()

    def _serve(self, connection: socket.socket) -> None:
        self._answer(connection)
        self.closed.release()

    def _answer(self, connection: socket.socket) -> None:
        with connection:
            try:
                while received := connection.recv(65536):
                    self.received.append(received)
                    for piece in self._pieces:
                        connection.sendall(piece)
                        self._stopped.wait(self._pause_s)
                    if self._ends:
                        return
            except OSError:
                return  # the client has left

    def stop(self) -> None:
        self._stopped.set()
        self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        for thread in self._threads:
            thread.join(5)


@pytest.fixture
def made() -> Iterator[list[RawServer | Transport]]:
    """Clients and servers of a test; closed at its end, clients first."""
    things: list[RawServer | Transport] = []
    yield things
    for thing in reversed(things):
        if isinstance(thing, Transport):
            thing.close()
        else:
            thing.stop()


def connected(made: list[RawServer | Transport], server: RawServer) -> Transport:
    transport = Transport(server.url, ManagementSettings(servers=(server.url,)))
    made.extend([server, transport])
    return transport


def asked(transport: Transport, seconds: float = 10.0) -> bytes:
    return transport.exchange(Request("GET", "/"), None, Deadline.after(seconds)).content


@pytest.mark.parametrize(
    "answer",
    [
        b"HTTP/1.1 200 OK\r\nContent-Length: 6\r\n\r\n[1, 2]",
        b"HTTP/1.1 200 OK\r\nContent-Length: 6\r\nConnection: close\r\n\r\n[1, 2]",
        b"HTTP/1.1 200 OK\r\nConnection: close\r\n\r\n[1, 2]",
        b"HTTP/1.0 200 OK\r\n\r\n[1, 2]",
        b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n3\r\n[1,\r\n3\r\n 2]\r\n0\r\n\r\n",
    ],
    ids=["length", "length and close", "until the end", "1.0", "chunked"],
)
@pytest.mark.parametrize("size", [1, 10_000], ids=["byte by byte", "at once"])
def test_a_response_is_read_in_every_framing(made: list[RawServer | Transport], answer: bytes, size: int) -> None:
    pieces = [answer[start : start + size] for start in range(0, len(answer), size)]
    assert asked(connected(made, RawServer(*pieces))) == b"[1, 2]"


@pytest.mark.parametrize(
    "answer",
    [
        *(b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n[1, 2]" % length for length in (7, 10**18, 10**30)),
        b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n-6\r\n[1, 2]\r\n0\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\nfffffffffffffffff\r\n[1, 2]\r\n0\r\n\r\n",
        b"HTTP/1.1 103 Early Hints\r\n\r\n",
    ],
    ids=["too long", "no memory", "no number", "negative chunk", "huge chunk", "not the response"],
)
def test_a_response_that_cannot_be_read_leaves_the_outcome_unknown(
    made: list[RawServer | Transport], answer: bytes
) -> None:
    server = RawServer(answer)
    transport = connected(made, server)
    for asked_before in range(2):
        with pytest.raises(OutcomeUnknown):
            asked(transport)
        assert server.connections == asked_before + 1


@pytest.mark.parametrize(
    "beginning", [b"", b"HTTP/1.1 200 OK\r\nContent-Length: 10000\r\n\r\n"], ids=["header", "body"]
)
def test_a_slow_response_ends_at_the_deadline(made: list[RawServer | Transport], beginning: bytes) -> None:
    """No single byte is late, but the response never ends."""
    drops = [beginning, *(LONG[start : start + 1] for start in range(len(LONG)))]
    transport = connected(made, RawServer(*drops, pause_s=0.05))
    deadline = Deadline.after(0.4)
    with pytest.raises(OutcomeUnknown) as caught:
        transport.exchange(Request("POST", "/", b"{}"), None, deadline)
    assert caught.value.timed_out
    assert deadline.elapsed_s() < LONG_S


def test_a_hanging_name_lookup_ends_at_the_deadline(monkeypatch: pytest.MonkeyPatch) -> None:
    """The resolver does not answer, so the request was not sent."""
    ended = threading.Event()
    monkeypatch.setattr(socket, "getaddrinfo", lambda *_, **__: ended.wait(120))
    url = "http://slow.example.com:4000"
    transport = Transport(url, ManagementSettings(servers=(url,)))
    deadline = Deadline.after(0.3)
    try:
        with pytest.raises(ServerUnreachable, match="looked up") as caught:
            transport.exchange(Request("POST", "/", b"{}"), None, deadline)
        assert caught.value.timed_out
        assert deadline.elapsed_s() < LONG_S
    finally:
        ended.set()
        transport.close()


def test_the_last_dot_of_an_absolute_name_is_for_the_resolver_only(
    made: list[RawServer | Transport], monkeypatch: pytest.MonkeyPatch
) -> None:
    names, look_up = list[str](), socket.getaddrinfo

    def look_up_here(name: str, *arguments: int, **options: int) -> object:
        names.append(name)
        return look_up("127.0.0.1", *arguments, **options)

    server = RawServer(b"HTTP/1.1 200 OK\r\nContent-Length: 6\r\n\r\n[1, 2]")
    url = server.url.replace("127.0.0.1", "storage.example.com.")
    transport = Transport(url, ManagementSettings(servers=(url,)))
    made.extend([server, transport])
    monkeypatch.setattr(socket, "getaddrinfo", look_up_here)
    assert asked(transport) == b"[1, 2]"
    assert set(names) == {"storage.example.com."}
    assert b"Host: storage.example.com:" in server.received[0]


@pytest.mark.parametrize("host", [".h", "*h", "a b", "[v1.x]"])
def test_a_host_that_cannot_exist_is_unreachable(host: str) -> None:
    url = f"http://{host}:4000"
    transport = Transport(url, ManagementSettings(servers=(url,)))
    with pytest.raises(ServerUnreachable):
        transport.exchange(Request("GET", "/"), None, Deadline.after(30))


def test_one_connection_serves_many_requests(made: list[RawServer | Transport]) -> None:
    server = RawServer(b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\n[]", ends=False)
    transport = connected(made, server)
    assert [asked(transport) for _ in range(20)] == [b"[]"] * 20
    assert server.connections == 1


def test_a_request_and_its_body_are_sent_at_once(made: list[RawServer | Transport]) -> None:
    server = RawServer(b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\n[]", ends=False)
    transport = connected(made, server)
    for _ in range(20):
        transport.exchange(Request("POST", "/", b'{"key": 1}'), None, Deadline.after(10))
    assert [received.partition(b"\r\n\r\n")[2] for received in server.received] == [b'{"key": 1}'] * 20


def test_an_idle_connection_that_the_server_has_closed_is_not_used(made: list[RawServer | Transport]) -> None:
    """The request would be of unknown outcome."""
    server = RawServer(b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\n[]")
    transport = connected(made, server)
    for number in range(1, 4):
        reply = transport.exchange(Request("POST", "/", b"{}"), None, Deadline.after(10))
        assert (reply.status, server.connections) == (200, number)
        assert server.closed.acquire(timeout=LONG_S)


def test_concurrent_requests_use_one_connection_each(
    made: list[RawServer | Transport],
) -> None:
    server = RawServer(b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\n[]", ends=False)
    transport = connected(made, server)
    with ThreadPoolExecutor(8) as pool:
        assert set(pool.map(lambda _: asked(transport), range(200))) == {b"[]"}
    assert server.connections <= 8


def test_cookies_are_returned_without_their_attributes(made: list[RawServer | Transport]) -> None:
    answer = (
        b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\nSet-Cookie: connect.sid=s%3Aa.b; Path=/; HttpOnly\r\n"
        b"Set-Cookie: route=m1; Path=/\r\n\r\n[]"
    )
    transport = connected(made, RawServer(answer))
    reply = transport.exchange(Request("GET", "/"), None, Deadline.after(10))
    assert reply.cookie == "connect.sid=s%3Aa.b; route=m1"


def test_the_environment_does_not_change_a_request(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A session of the HTTP library would use the proxy and the password of the netrc file."""
    proxy = f"http://127.0.0.1:{closed_port()}"
    for name in ("http_proxy", "https_proxy", "all_proxy"):
        monkeypatch.setenv(name, proxy)
        monkeypatch.setenv(name.upper(), proxy)
    monkeypatch.delenv("no_proxy", raising=False)
    monkeypatch.delenv("NO_PROXY", raising=False)
    netrc = tmp_path / "netrc"
    netrc.write_text("machine 127.0.0.1 login somebody password secret\n")
    netrc.chmod(0o600)
    monkeypatch.setenv("NETRC", str(netrc))
    with running() as server:
        server.opens_sessions = True
        with pytest.raises(requests.exceptions.ProxyError):
            requests.get(f"{server.url}/systemInfo", timeout=10)
        requests.get(f"{server.url}/systemInfo", timeout=10, proxies={"no_proxy": "127.0.0.1"}).close()
        transport = Transport(server.url, ManagementSettings(servers=(server.url,), driver_name="csi.example.com"))
        try:
            reply = transport.exchange(Request("GET", "/systemInfo"), "route=m1", Deadline.after(10))
        finally:
            transport.close()
        by_library, ours = server.seen("/systemInfo")
    assert reply.status == 200
    assert "Authorization" in by_library.headers
    assert ours.headers == {
        "Host": server.url.removeprefix("http://"),
        "Accept-Encoding": "identity",
        "Accept": "application/json",
        "User-Agent": "csi.example.com",
        "Cookie": "route=m1",
    }


def test_a_cookie_is_sent_only_where_it_is_passed() -> None:
    with running() as server:
        server.opens_sessions = True
        transport = Transport(server.url, ManagementSettings(servers=(server.url,)))
        try:
            first = transport.exchange(Request("GET", "/systemInfo"), None, Deadline.after(10))
            transport.exchange(Request("GET", "/systemInfo"), None, Deadline.after(10))
            transport.exchange(Request("GET", "/systemInfo"), first.cookie, Deadline.after(10))
        finally:
            transport.close()
        sent = [request.headers.get("Cookie") for request in server.seen("/systemInfo")]
    assert sent == [None, None, "connect.sid=opened"]
