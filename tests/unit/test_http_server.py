# SPDX-License-Identifier: Apache-2.0
"""Bounds of an HTTP server: whose connection is hung up, and what happens when the system has no more of something."""

from __future__ import annotations

import errno
import io
import socket
import socketserver
from collections.abc import Iterator
from contextlib import ExitStack

import pytest

from csi_driver import http_server
from csi_driver.background import run_detached
from csi_driver.http_server import BoundedServer, LimitedHandler, LimitedReader


class Handler(LimitedHandler):
    def setup(self) -> None:
        super().setup()
        reader = LimitedReader(self.connection, 1 << 10)
        reader.begin(60)
        self.rfile = io.BufferedReader(reader)

    def do_GET(self) -> None:
        self.wfile.write(self.path.encode())


class Server(BoundedServer):
    most_connections = 3


@pytest.fixture
def server() -> Iterator[Server]:
    with Server(("127.0.0.1", 0), Handler) as running:
        yield running
        running.hang_up(socket.SHUT_RDWR, 60)


@pytest.fixture
def clients(server: Server) -> Iterator[list[socket.socket]]:
    """As many connections as are served, in the order in which they were accepted."""
    with ExitStack() as stack:
        yield [stack.enter_context(connected(server)) for _ in range(server.most_connections)]


def connected(server: Server) -> socket.socket:
    client = socket.create_connection(server.server_address[:2], timeout=60)  # type: ignore[arg-type]
    server.handle_request()
    return client


def served(server: Server) -> list[socket.socket]:
    return list(server._open)


def test_with_too_many_connections_the_one_that_waits_longest_is_hung_up(
    server: Server, clients: list[socket.socket]
) -> None:
    assert server.awaits_request(served(server)[0])
    with connected(server) as late:
        assert clients[1].recv(1) == b""
        for client in (clients[0], clients[2], late):
            client.sendall(b"GET /x HTTP/1.0\r\n\r\n")
            assert client.recv(100) == b"/x"


def test_a_connection_whose_request_is_carried_out_is_not_hung_up(server: Server, clients: list[socket.socket]) -> None:
    for connection in served(server):
        assert server.begins_request(connection)
    with connected(server) as late:
        assert late.recv(1) == b""
        assert len(served(server)) == len(clients)


def test_a_request_of_a_connection_that_was_hung_up_is_not_carried_out(
    server: Server, clients: list[socket.socket]
) -> None:
    oldest, next_one = served(server)[:2]
    with connected(server):
        assert not server.begins_request(oldest)
        assert not server.awaits_request(oldest)
        assert server.begins_request(next_one)


def test_no_request_begins_after_the_end(server: Server) -> None:
    with connected(server):
        (connection,) = served(server)
        server.hang_up(socket.SHUT_RD)
        assert not server.begins_request(connection)
        assert not server.awaits_request(connection)


@pytest.mark.parametrize("number", [errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM])
def test_a_server_without_free_descriptors_pauses_and_goes_on(
    server: Server, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    pauses = list[Exception]()
    monkeypatch.setattr(http_server, "_pause", pauses.append)
    with socket.create_connection(server.server_address[:2], timeout=60) as client:  # type: ignore[arg-type]
        with monkeypatch.context() as without:
            without.setattr(socketserver.TCPServer, "get_request", refusing(OSError(number, "no more")))
            server.handle_request()
            assert len(pauses) == 1
        server.handle_request()
        client.sendall(b"GET /x HTTP/1.0\r\n\r\n")
        assert client.recv(100) == b"/x"


def test_a_connection_that_its_client_ended_is_no_reason_to_pause(
    server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(http_server, "_pause", refusing(AssertionError()))
    monkeypatch.setattr(socketserver.TCPServer, "get_request", refusing(ConnectionAbortedError()))
    with socket.create_connection(server.server_address[:2]):  # type: ignore[arg-type]
        server.handle_request()


def test_a_connection_for_which_there_is_no_thread_is_closed(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    pauses = list[Exception]()
    monkeypatch.setattr(http_server, "_pause", pauses.append)
    monkeypatch.setattr(http_server, "run_detached", refusing(RuntimeError("can't start new thread")))
    with connected(server) as client:
        assert client.recv(1) == b""
    assert (len(pauses), served(server)) == (1, [])
    monkeypatch.setattr(http_server, "run_detached", run_detached)
    with connected(server) as client:
        client.sendall(b"GET /x HTTP/1.0\r\n\r\n")
        assert client.recv(100) == b"/x"


def refusing(problem: Exception):  # type: ignore[no-untyped-def]  # noqa: ANN201
    def refuse(*_: object) -> None:
        raise problem

    return refuse
