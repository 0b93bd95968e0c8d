# SPDX-License-Identifier: Apache-2.0
"""NVMe over TCP: exports and connections of volumes, the names of host and subsystem, and their keys."""

from __future__ import annotations

import base64
import binascii
import ipaddress
import re
import secrets
import uuid
import zlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import Enum
from pathlib import Path

BLOCK_BYTES = (512, 4096)
_NQN_LIMIT_BYTES = 223
_NQN = re.compile(r"nqn\.[0-9]{4}-[0-9]{2}\.[A-Za-z0-9.-]+:[A-Za-z0-9.:_-]+")
_PATH = re.compile(r"(?:\[([0-9A-Fa-f:.]+)\]|([0-9.]+)):([1-9][0-9]{0,4})")
_MOST_PATHS = 16
_HOST_NAMESPACE = uuid.UUID("6f6bd3a8-5b0c-4b1e-9a5e-0c2f3d9b7e41")
SUBSYSTEM_PREFIX = "nqn.2026-11.com.excelero.nvmesh-csi"
KEEP_ALIVE_S = 5
"""A node that has sent nothing for this time, or up to twice as long, loses its connections. It sends every 2.5 s."""


@dataclass(frozen=True, slots=True)
class NvmeExport:
    """An exported volume, as a node needs it in order to connect.

    `paths`: the portals in order of preference, as "10.0.0.1:23001" or "[fd00::1]:23001".
    """

    nqn: str
    paths: tuple[str, ...]
    block_bytes: int = 4096

    @property
    def pool(self) -> str:
        """The uuid of the pool; empty when another program exports it."""
        return self._part(0)

    @property
    def volume(self) -> str:
        """The uuid of the volume; empty when another program exports it."""
        return self._part(1)

    def _part(self, number: int) -> str:
        parts = self.nqn.removeprefix(SUBSYSTEM_PREFIX + ":").split(":")
        return parts[number] if len(parts) == 3 and self.nqn.startswith(SUBSYSTEM_PREFIX + ":") else ""

    @property
    def problem(self) -> str:
        """The first wrong value, "" if none. The values become options of one line that the kernel parses."""
        if not is_nqn(self.nqn):
            return f"expected the NQN of a subsystem, got {self.nqn!r:.300}"
        if not 1 <= len(self.paths) <= _MOST_PATHS:
            return f"expected 1 to {_MOST_PATHS} paths, got {len(self.paths)}"
        if wrong := [path for path in self.paths if not is_path(path)]:
            return f"expected paths as ADDRESS:PORT with an IP address, got {wrong[0]!r:.300}"
        if self.block_bytes not in BLOCK_BYTES:
            return f"expected a block size of {' or '.join(map(str, BLOCK_BYTES))}, got {self.block_bytes}"
        return ""


def is_nqn(text: str) -> bool:
    return len(text) <= _NQN_LIMIT_BYTES and _NQN.fullmatch(text) is not None


def is_path(text: str) -> bool:
    found = _PATH.fullmatch(text)
    if found is None or int(found[3]) > 0xFFFF:
        return False
    try:
        return ipaddress.ip_address(found[1] or found[2]).version == (6 if found[1] else 4)
    except ValueError:
        return False


def split_path(path: str) -> tuple[str, int]:
    """Return address and port of a path; an IPv6 address without its brackets."""
    address, _, port = path.rpartition(":")
    return address.strip("[]"), int(port)


def host_uuid(node_id: str) -> str:
    """Return the host ID of a node: it does not depend on /etc/nvme, which images of machines share."""
    return str(uuid.uuid5(_HOST_NAMESPACE, node_id.lower()))


def host_nqn(node_id: str) -> str:
    return f"nqn.2014-08.org.nvmexpress:uuid:{host_uuid(node_id)}"


def subsystem_nqn(pool_uuid: str, volume_uuid: str, token: str) -> str:
    """Return the NQN of one attachment of a volume. No later attachment has its `token`.

    A node that was cut off reconnects by itself when it can, and writes out its queued I/O. It must not reach the
    volume of a later attachment, not even of its own: the volume may have been on another node meanwhile.
    """
    return f"{SUBSYSTEM_PREFIX}:{pool_uuid}:{volume_uuid}:{token}"


def pool_prefix(pool_uuid: str) -> str:
    """Return how the NQNs of all exports of a pool begin."""
    return f"{SUBSYSTEM_PREFIX}:{pool_uuid}:"


_KEY = re.compile(r"DHHC-1:0([0-3]):([A-Za-z0-9+/]+={0,2}):")
_KEY_BYTES = {"0": (32, 48, 64), "1": (32,), "2": (48,), "3": (64,)}
"""Lengths of a secret by the hash that transforms it; 0 = none (NVMe TCP transport specification, 8.13.5.8)."""
_CRC_BYTES = 4


def new_dhchap_key() -> str:
    """Return a new random key for DH-HMAC-CHAP."""
    secret = secrets.token_bytes(32)
    return f"DHHC-1:00:{base64.b64encode(secret + _crc(secret)).decode()}:"


def is_dhchap_key(text: str) -> bool:
    """Return whether the kernel accepts the text as a key: form, length and checksum."""
    found = _KEY.fullmatch(text)
    if found is None:
        return False
    try:
        content = base64.b64decode(found[2], validate=True)
    except binascii.Error:
        return False
    secret, crc = content[:-_CRC_BYTES], content[-_CRC_BYTES:]
    return len(secret) in _KEY_BYTES[found[1]] and crc == _crc(secret)


def _crc(secret: bytes) -> bytes:
    return zlib.crc32(secret).to_bytes(_CRC_BYTES, "little")


@dataclass(frozen=True, slots=True)
class ConnectOptions:
    """How this node connects a volume by NVMe/TCP; 0 = the connector's default.

    `io_timeout_s`: for so long I/O waits for a storage machine without any path, then it fails.
    """

    io_queues: int = 0
    io_timeout_s: int = 0


@dataclass(frozen=True, slots=True)
class ConnectedVolume:
    """A volume that this node connects by NVMe/TCP. `size_bytes`: at its attachment, 0 = unknown."""

    name: str
    uuid: str
    export: NvmeExport
    size_bytes: int = 0
    options: ConnectOptions = ConnectOptions()


@dataclass(frozen=True, slots=True)
class NvmeStates:
    """Figures of the volumes that this node connects by NVMe/TCP; the last three count since the start.

    `volumes`: ready, no_path (I/O waits), fenced. `paths`: by the kernel's state, or missing where there is none.
    """

    volumes: Mapping[str, int]
    paths: Mapping[str, int]
    orphans: int
    reconnects: int
    failovers: int
    requeued_io: int


@dataclass(frozen=True, slots=True)
class TargetExport:
    """A file that the kernel's NVMe target offers as namespace 1 of a subsystem; equal when nothing is to be done.

    `port` is a TCP port of this export alone, at each of `addresses` in order of preference. `hosts`: NQNs of those
    that may connect. `is_enabled`: the namespace is; `is_linked`: hosts can connect. In another ANA group than 1 its
    I/O is held.
    """

    nqn: str
    uuid: str
    file: Path
    port: int
    addresses: tuple[str, ...]
    hosts: frozenset[str]
    is_enabled: bool = True
    is_linked: bool = True
    group: int = 1


@dataclass(frozen=True, slots=True)
class ExportCounts:
    """`waiting`: exports that attachments lack. `connections`: of nodes; `ports_free`: for new attachments."""

    exported: int
    waiting: int
    connections: int
    ports_free: int


@dataclass(frozen=True, slots=True)
class HostKeys:
    """DH-HMAC-CHAP keys of a host, as `DHHC-1:...`: its own one, and the one by which the target proves itself."""

    host: str = field(repr=False)
    controller: str = field(default="", repr=False)


class SocketState(Enum):
    """State of a TCP connection; the numbers are the kernel's (include/net/tcp_states.h)."""

    ESTABLISHED = 1
    SYN_SENT = 2
    SYN_RECEIVED = 3
    FIN_WAIT1 = 4
    FIN_WAIT2 = 5
    TIME_WAIT = 6
    CLOSE = 7
    CLOSE_WAIT = 8
    LAST_ACK = 9
    LISTEN = 10
    CLOSING = 11
    NEW_SYN_RECEIVED = 12


_CONNECT_BYTES = 128 + 72 + 1024
"""A host sends at least so much before it can do I/O: the opening of the connection, and the Connect command."""


@dataclass(frozen=True, slots=True)
class Connection:
    """A TCP connection to a local port. `is_owned`: the target has not given its socket back, so I/O may be running.

    `received_bytes`: from the peer, and `silent_s`: the time since; None = unknown.
    """

    port: int
    peer: str
    state: SocketState
    is_owned: bool = True
    received_bytes: int | None = None
    silent_s: float | None = None

    @property
    def is_live(self) -> bool:
        """Whether a host has it. The target keeps one that sends nothing for ever: a monitor's, or a dead machine's."""
        is_host = self.received_bytes is None or self.received_bytes >= _CONNECT_BYTES
        return self.state is SocketState.ESTABLISHED and is_host
