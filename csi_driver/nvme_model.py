# SPDX-License-Identifier: Apache-2.0
"""NVMe over TCP: how a node reaches an exported volume, the names of host and subsystem, and their keys."""

from __future__ import annotations

import base64
import binascii
import ipaddress
import re
import secrets
import uuid
import zlib
from dataclasses import dataclass

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
    """A volume that is exported over NVMe/TCP: what a node needs in order to connect.

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
        """What is wrong with the values, "" if nothing. They become options of one line that the kernel parses."""
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

    A node that was cut off reconnects by itself when it can, and writes out what it has queued. It must not reach the
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
