# SPDX-License-Identifier: Apache-2.0
"""The kernel's TCP connections of real sockets."""

from __future__ import annotations

import socket
import time
from collections.abc import Iterator
from contextlib import ExitStack

import pytest

from csi_driver.errors import SystemCallFailed
from csi_driver.host import sock_diag
from csi_driver.nvme_model import Connection, SocketState

CONNECT = bytes(128 + 72 + 1024)


@pytest.fixture(autouse=True)
def _has_sock_diag() -> None:
    try:
        sock_diag.connections((1,))
    except SystemCallFailed as problem:
        pytest.skip(f"the kernel does not tell: {problem}")


class Peers:
    """A listener and a client that is connected to it."""

    def __init__(self, held: ExitStack, bound: str, address: str) -> None:
        family = socket.AF_INET6 if ":" in bound else socket.AF_INET
        self.listener = held.enter_context(socket.socket(family))
        if family == socket.AF_INET6:
            self.listener.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 0)
        self.listener.bind((bound, 0))
        self.listener.listen()
        self.port: int = self.listener.getsockname()[1]
        self.client = held.enter_context(socket.create_connection((address, self.port)))
        self.server = held.enter_context(self.listener.accept()[0])

    @property
    def shown(self) -> Connection:
        (found,) = sock_diag.connections((self.port,))[self.port]
        return found

    def send(self, data: bytes) -> None:
        self.client.sendall(data)
        while self.server.recv(len(data), socket.MSG_PEEK | socket.MSG_WAITALL) != data:
            pass


@pytest.fixture
def held() -> Iterator[ExitStack]:
    with ExitStack() as stack:
        yield stack


@pytest.mark.parametrize(
    ("bound", "address", "peer"),
    [
        ("127.0.0.1", "127.0.0.1", "127.0.0.1"),
        ("::1", "::1", "[::1]"),
        ("::", "127.0.0.1", "[::ffff:127.0.0.1]"),
    ],
)
def test_a_connection_of_each_family_is_shown_to_the_port_and_not_from_it(
    held: ExitStack, bound: str, address: str, peer: str
) -> None:
    peers = Peers(held, bound, address)
    port = peers.client.getsockname()[1]
    assert (peers.shown.peer, peers.shown.state) == (f"{peer}:{port}", SocketState.ESTABLISHED)
    assert peers.shown.is_owned
    assert peers.port in sock_diag.listening((peers.port,))
    assert port not in sock_diag.listening((port,))


def test_a_connection_is_live_from_the_bytes_of_a_connect_on(held: ExitStack) -> None:
    peers = Peers(held, "127.0.0.1", "127.0.0.1")
    assert (peers.shown.received_bytes, peers.shown.is_live) == (0, False)
    peers.send(CONNECT[1:])
    assert (peers.shown.received_bytes, peers.shown.is_live) == (len(CONNECT) - 1, False)
    peers.client.sendall(b"x")
    peers.server.recv(len(CONNECT), socket.MSG_WAITALL)
    assert (peers.shown.received_bytes, peers.shown.is_live) == (len(CONNECT), True)


def test_the_time_since_a_peer_sent_something_grows_until_it_sends_again(held: ExitStack) -> None:
    peers = Peers(held, "127.0.0.1", "127.0.0.1")
    peers.send(b"x")

    def silent_s() -> float:
        assert peers.shown.silent_s is not None
        return peers.shown.silent_s

    while silent_s() < 0.5:
        pass
    sent_s = time.monotonic()
    peers.client.sendall(b"y")
    peers.server.recv(2, socket.MSG_WAITALL)
    assert silent_s() <= time.monotonic() - sent_s + 0.1


def test_a_closed_connection_is_not_live_and_says_who_closed_it(held: ExitStack) -> None:
    ours, theirs = (Peers(held, "127.0.0.1", "127.0.0.1") for _ in range(2))
    for each in (ours, theirs):
        each.send(CONNECT)
    ours.server.shutdown(socket.SHUT_WR)
    theirs.client.shutdown(socket.SHUT_WR)
    assert theirs.server.recv(len(CONNECT), socket.MSG_WAITALL) == CONNECT
    assert theirs.server.recv(1) == b""
    assert (ours.shown.is_live, ours.shown.state in (SocketState.FIN_WAIT1, SocketState.FIN_WAIT2)) == (False, True)
    assert (theirs.shown.is_live, theirs.shown.state) == (False, SocketState.CLOSE_WAIT)


def test_other_ports_are_not_shown(held: ExitStack) -> None:
    peers = [Peers(held, "127.0.0.1", "127.0.0.1") for _ in range(3)]
    asked = {peers[0].port, peers[2].port}
    assert {port: len(found) for port, found in sock_diag.connections(asked).items()} == dict.fromkeys(asked, 1)
    assert sock_diag.connections(()) == {}
