# SPDX-License-Identifier: Apache-2.0
"""TCP connections to ports of this machine, as the kernel knows them in this network namespace (sock_diag(7)).

The kernel chooses the sockets by the range of their ports, so the answer does not grow with the other connections of
the machine. Structures from include/uapi/linux/inet_diag.h.
"""

from __future__ import annotations

import errno
import ipaddress
import re
import socket
import struct
from collections.abc import Collection, Iterator, Mapping
from contextlib import suppress
from pathlib import Path

from csi_driver.host.syscalls import system_call
from csi_driver.nvme_model import Connection, SocketState

_NETLINK_SOCK_DIAG, _BY_FAMILY, _DUMP_REQUEST = 4, 20, 0x301
_ERROR, _DONE = 2, 3
_HEADER = struct.Struct("=IHHII")
_REQUEST = struct.Struct("=BBBBI48x")
_PORTS, _PEER_AT, _INODE_AT = struct.Struct("!4xHH"), 24, 68
"""Places in struct inet_diag_msg, which begins with the family and the state."""
_MESSAGE_BYTES = 72
_ATTRIBUTE = struct.Struct("=HH")
_INFO, _RECEIVED_AT, _SILENT_AT = 2, 128, 52
"""The attribute with struct tcp_info (include/uapi/linux/tcp.h), and the places of tcpi_bytes_received and
tcpi_last_data_recv in it."""
_BYTECODE = 1
_SOURCE_AT_LEAST, _SOURCE_AT_MOST = 2, 3
_UNCONNECTED = (SocketState.LISTEN, SocketState.CLOSE, SocketState.TIME_WAIT)
_STATES = sum(1 << state.value for state in SocketState if state not in _UNCONNECTED)
_ANSWER_BYTES = 1 << 16


def connections(ports: Collection[int]) -> Mapping[int, tuple[Connection, ...]]:
    """Return the connections to each of these ports. Raises SystemCallFailed."""
    found: dict[int, list[Connection]] = {port: [] for port in ports}
    for each in _sockets(found, _STATES):
        found[each.port].append(each)
    return {port: tuple(each) for port, each in found.items()}


def listening(ports: Collection[int]) -> frozenset[int]:
    """Return those of the ports that are listened on, at any address. Raises SystemCallFailed."""
    return frozenset(each.port for each in _sockets(ports, 1 << SocketState.LISTEN.value))


def addresses(shown_in: Path = Path("/proc/net")) -> list[str]:
    """Return the addresses of this machine by which others may reach it; empty where that is not shown."""
    found = []
    with suppress(OSError):
        found += re.findall(r"-- (\S+)\n +/32 host LOCAL", (shown_in / "fib_trie").read_text())
        found += re.findall(r"^([0-9a-f]{32}) \S+ \S+ 00 ", (shown_in / "if_inet6").read_text(), re.MULTILINE)
    known = {ipaddress.ip_address(each if "." in each else bytes.fromhex(each)) for each in found}
    return [str(each) for each in sorted(known, key=lambda each: each.packed) if not each.is_loopback]


def _sockets(ports: Collection[int], states: int) -> Iterator[Connection]:
    with system_call("ask the kernel for TCP connections (module tcp_diag)"):
        for family in (socket.AF_INET, socket.AF_INET6) if ports else ():
            for each in _dumped(family, min(ports), max(ports), states):
                if each.port in ports:
                    yield each


def _dumped(family: int, lowest: int, highest: int, states: int) -> Iterator[Connection]:
    # Each instruction has the jumps when it holds and when not; a jump behind the end rejects the socket.
    code = struct.pack("=BBHHH", _SOURCE_AT_LEAST, 8, 20, 0, lowest)
    code += struct.pack("=BBHHH", _SOURCE_AT_MOST, 8, 12, 0, highest)
    body = _REQUEST.pack(family, socket.IPPROTO_TCP, 1 << _INFO - 1, 0, states)
    body += struct.pack("=HH", 4 + len(code), _BYTECODE) + code
    with socket.socket(socket.AF_NETLINK, socket.SOCK_RAW | socket.SOCK_CLOEXEC, _NETLINK_SOCK_DIAG) as kernel:
        kernel.send(_HEADER.pack(_HEADER.size + len(body), _BY_FAMILY, _DUMP_REQUEST, 1, 0) + body)
        while True:
            answer = kernel.recv(_ANSWER_BYTES)
            while answer:
                length, kind = _HEADER.unpack_from(answer)[:2]
                if kind in (_ERROR, _DONE):
                    (number,) = struct.unpack_from("=i", answer, _HEADER.size)
                    if number or kind == _ERROR:
                        raise OSError(-number or errno.EIO, "sock_diag")
                    return
                yield _connection(answer[_HEADER.size : length])
                answer = answer[(length + 3) & ~3 :]


def _connection(message: bytes) -> Connection:
    port, peer_port = _PORTS.unpack_from(message)
    (inode,) = struct.unpack_from("=I", message, _INODE_AT)
    if message[0] == socket.AF_INET:
        peer = socket.inet_ntop(socket.AF_INET, message[_PEER_AT : _PEER_AT + 4])
    else:
        peer = f"[{socket.inet_ntop(socket.AF_INET6, message[_PEER_AT : _PEER_AT + 16])}]"
    return Connection(port, f"{peer}:{peer_port}", SocketState(message[1]), inode != 0, *_received(message))


def _received(message: bytes) -> tuple[int | None, float | None]:
    """Return how many bytes came from the peer, and the seconds since the last of them."""
    at = _MESSAGE_BYTES
    while at < len(message):
        length, kind = _ATTRIBUTE.unpack_from(message, at)
        if kind == _INFO and length >= _ATTRIBUTE.size + _RECEIVED_AT + 8:
            (received,) = struct.unpack_from("=Q", message, at + _ATTRIBUTE.size + _RECEIVED_AT)
            (silent_ms,) = struct.unpack_from("=I", message, at + _ATTRIBUTE.size + _SILENT_AT)
            return int(received), silent_ms / 1000
        at += (length + 3) & ~3
    return None, None
