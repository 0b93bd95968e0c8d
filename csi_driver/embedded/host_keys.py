# SPDX-License-Identifier: Apache-2.0
"""Keys by which nodes and the exports of this manager prove themselves to each other (NVMe in-band authentication).

A node makes its key and registers it with the join token of the cluster; the answer has the key by which the exports
prove themselves to this node. A key belongs to the name of its node, and is of use to the host of that name alone.
"""

from __future__ import annotations

import json
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from csi_driver.embedded.requests import Unusable
from csi_driver.embedded.sessions import Password, write_secret
from csi_driver.errors import HostFailure
from csi_driver.nvme_model import HostKeys, host_uuid, new_dhchap_key


class KeysUnreadable(HostFailure):
    def __init__(self, path: Path, client: str, why: object) -> None:
        super().__init__(
            f"the keys of node {client} in {path} cannot be used: {why}; remove the file, and the node registers again"
        )


@dataclass(eq=False)
class HostKeyStore:
    """The keys, in a file for each node. `join_token`: None = no node can register."""

    directory: Path
    is_required: bool
    join_token: Password | None
    _guard: threading.Lock = field(default_factory=threading.Lock)

    def get(self, client: str) -> HostKeys | None:
        """Return the keys that a node must prove; None: it need not, or has none. Raises KeysUnreadable."""
        return self._read(client) if self.is_required else None

    def why_refused(self, client: str) -> str:
        """Return why a node gets no volume; "" when it may."""
        if not self.is_required or self._read(client) is not None:
            return ""
        return f"node {client} has not registered its key, and --auth is required; its node plugin logs the reason"

    def register(self, client: str, key: str, is_connected: Callable[[str], bool]) -> HostKeys:
        """Keep the key of a node, and return it with the one by which the exports prove themselves.

        The key of a node that is connected is not replaced: Unusable. Raises KeysUnreadable too.
        """
        with self._guard:
            known = self._read(client)
            if known is not None and known.host == key:
                return known
            if known is not None and is_connected(client):
                raise Unusable(409, f"node {client} is connected with another key; drain it, then register the new key")
            keys = HostKeys(key, new_dhchap_key())
            row = {"client": client, "key": keys.host, "controllerKey": keys.controller}
            path = self._path(client)
            try:
                self.directory.mkdir(mode=0o700, exist_ok=True)
                write_secret(path, json.dumps(row))
            except OSError as problem:
                raise KeysUnreadable(path, client, problem) from problem
            return keys

    def _read(self, client: str) -> HostKeys | None:
        path = self._path(client)
        try:
            row = json.loads(path.read_text())
            if row["client"] != client:
                raise ValueError("they are of another node")
            return HostKeys(row["key"], row["controllerKey"])
        except FileNotFoundError:
            return None
        except (OSError, ValueError, TypeError, KeyError) as problem:
            # The text of a decoder's error could quote the file.
            why = problem if isinstance(problem, OSError) else "expected JSON with client, key and controllerKey"
            raise KeysUnreadable(path, client, why) from None

    def _path(self, client: str) -> Path:
        return self.directory / f"{host_uuid(client)}.json"
