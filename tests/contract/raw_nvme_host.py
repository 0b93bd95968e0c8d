# SPDX-License-Identifier: Apache-2.0
"""A host of NVMe over TCP that is a program, not a kernel: one connection for each queue, one request at a time.

One kernel takes two hosts' connections to a subsystem for two paths of one device; with this host a test has several in
one machine. Formats: NVM Express TCP Transport Specification 1.0; NVM Express over Fabrics 1.1, chapter 3.
"""

from __future__ import annotations

import errno
import os
import socket
import struct
import uuid
from typing import Self

_IC_REQUEST, _COMMAND, _RESPONSE, _DATA = 0, 4, 5, 7
_HEADER = struct.Struct("<BBBBI")
_FABRICS, _CONNECT, _PROPERTY_SET = 0x7F, 1, 0
_IDENTIFY, _OF_CONTROLLER = 6, 1
_WRITE, _READ = 1, 2
_INLINE, _TRANSPORT = 0x01, 0x5A
_CONFIGURATION, _ENABLED = 0x14, 0x460001  # CC.EN, entries of 64 and 16 bytes
_ANY_CONTROLLER = 0xFFFF
BLOCK_BYTES = 4096


def _refuse(number: int, what: str) -> OSError:
    return OSError(number, what)


class Queue:
    """A connection with an admin queue or an I/O queue."""

    def __init__(self, address: str, port: int, timeout_s: float) -> None:
        self._socket = socket.create_connection((address, port), timeout_s)
        self._number = 0
        self._socket.sendall(_HEADER.pack(_IC_REQUEST, 0, 128, 0, 128) + bytes(120))
        self._receive_exactly(128)

    def close(self) -> None:
        self._socket.close()

    def send(self, command: bytes, data: bytes = b"", *, only_bytes: int | None = None) -> None:
        """`only_bytes`: send no more of the data; the rest never comes."""
        head = _HEADER.pack(_COMMAND, 0, 72, 72 if data else 0, 72 + len(data)) + command
        self._socket.sendall(head + data[:only_bytes])

    def answer(self) -> tuple[int, int, bytes]:
        """Return status and result of the request, and its data. Raises OSError after the connection was closed."""
        data = b""
        while True:
            kind, _, header_bytes, _, length = _HEADER.unpack(self._receive_exactly(8))
            body = self._receive_exactly(length - 8)
            if kind == _DATA:
                data += body[header_bytes - 8 :]
            elif kind == _RESPONSE:
                result, status = struct.unpack("<Q6xH", body)
                return status >> 1, result, data
            else:
                raise _refuse(errno.EPROTO, f"unexpected PDU {kind}")

    def ask(self, command: bytes, data: bytes = b"") -> tuple[int, int, bytes]:
        self.send(command, data)
        return self.answer()

    def _receive_exactly(self, length: int) -> bytes:
        received = b""
        while len(received) < length:
            piece = self._socket.recv(length - len(received))
            if not piece:
                raise _refuse(errno.ECONNRESET, "the target closed the connection")
            received += piece
        return received


def _command(opcode: int, first: bytes, last: bytes, *, length: int = 0, is_inline: bool = True) -> bytes:
    """`first`: from byte 4; `last`: from byte 40."""
    place = struct.pack("<QI3xB", 0, length, _INLINE if is_inline else _TRANSPORT)
    return struct.pack("<BBH", opcode, 0x40, 1) + first.ljust(20, b"\0") + place + last.ljust(24, b"\0")


class RawHost:
    """A connected host with one I/O queue."""

    def __init__(self, address: str, port: int, nqn: str, host_nqn: str, *, timeout_s: float = 60.0) -> None:
        """Raises ECONNREFUSED without a listener, EIO where the target refuses."""
        self._names = (nqn, host_nqn)
        self._uuid = uuid.uuid5(uuid.NAMESPACE_DNS, host_nqn)
        self.admin = Queue(address, port, timeout_s)
        try:
            controller = self._connect(self.admin, 0, _ANY_CONTROLLER)
            enable = struct.pack("<IIQ", 0, _CONFIGURATION, _ENABLED)
            self._expect(self.admin.ask(_command(_FABRICS, bytes([_PROPERTY_SET]), enable)))
            identify = struct.pack("<I", _OF_CONTROLLER)
            self._expect(self.admin.ask(_command(_IDENTIFY, b"", identify, length=4096, is_inline=False)))
            self.io = Queue(address, port, timeout_s)
            self._connect(self.io, 1, controller)
        except BaseException:
            self.close()
            raise

    def _connect(self, queue: Queue, number: int, controller: int) -> int:
        data = self._uuid.bytes + struct.pack("<H", controller).ljust(240, b"\0")
        data += b"".join(name.encode().ljust(256, b"\0") for name in self._names) + bytes(256)
        asked = struct.pack("<HHHBxI", 0, number, 31, 0, 0)
        _, result, _ = self._expect(queue.ask(_command(_FABRICS, bytes([_CONNECT]), asked, length=len(data)), data))
        return result & 0xFFFF

    @staticmethod
    def _expect(answer: tuple[int, int, bytes]) -> tuple[int, int, bytes]:
        if answer[0]:
            raise _refuse(errno.EIO, f"status {answer[0]:#x}")
        return answer

    @staticmethod
    def _write_command(offset: int, data: bytes) -> bytes:
        blocks = struct.pack("<QH", offset // BLOCK_BYTES, len(data) // BLOCK_BYTES - 1)
        return _command(_WRITE, struct.pack("<I", 1), blocks, length=len(data))

    def write(self, offset: int, data: bytes) -> None:
        """Write whole blocks. Raises OSError."""
        self._expect(self.io.ask(self._write_command(offset, data), data))

    def begin_write(self, offset: int, data: bytes, *, only_bytes: int | None = None) -> None:
        """Send a write and do not wait for its answer."""
        self.io.send(self._write_command(offset, data), data, only_bytes=only_bytes)

    def read(self, offset: int, length: int) -> bytes:
        blocks = struct.pack("<QH", offset // BLOCK_BYTES, length // BLOCK_BYTES - 1)
        command = _command(_READ, struct.pack("<I", 1), blocks, length=length, is_inline=False)
        return self._expect(self.io.ask(command))[2]

    def close(self) -> None:
        for queue in (self.admin, getattr(self, "io", None)):
            if queue is not None:
                queue.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def block(value: int) -> bytes:
    """Return the content of a block that a test writes."""
    return struct.pack("<Q", value) * (BLOCK_BYTES // 8)


def in_file(path: str | os.PathLike[str], offset: int = 0) -> int:
    """Return the number in the block of a file."""
    with open(path, "rb") as file:
        file.seek(offset)
        return int(struct.unpack("<Q", file.read(8))[0])
