# SPDX-License-Identifier: Apache-2.0
"""The key by which this node proves itself to NVMe targets, and its registration at the embedded storage manager.

The node makes its key once and keeps it in a file that root alone can read. It is sent once, with the join token, over
TLS; the answer has the key by which the targets prove themselves to this node. No key reaches a log, an error or a
publish context.
"""

from __future__ import annotations

import contextlib
import http.client
import json
import logging
import os
import ssl
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from urllib.parse import urlsplit

from csi_driver.background import Backoff, SelfPaced
from csi_driver.errors import StorageUnavailable, SystemCallFailed, shown
from csi_driver.host.syscalls import closing, system_call
from csi_driver.nvme_model import HostKeys, is_dhchap_key, new_dhchap_key

_LOG = logging.getLogger(__name__)
_FILE = "nvme-keys.json"
_REQUEST_TIMEOUT_S = 10.0
_INTERVAL_S = 30.0
_ANSWER_LIMIT_BYTES = 1 << 16


@dataclass(frozen=True, slots=True)
class Registration:
    """Where and how a node registers its key. `ca_file`: None = the machine's certificate authorities."""

    url: str
    token_file: Path
    ca_file: Path | None = None


@dataclass(slots=True)
class NodeKeys:
    """The keys of this node, in `directory`."""

    directory: Path
    registration: Registration
    node_id: Callable[[], str]
    _lock: threading.Lock = field(default_factory=threading.Lock, init=False)
    _keys: HostKeys | None = field(default=None, init=False)
    _is_registered: bool = field(default=False, init=False)

    def get(self) -> HostKeys:
        """Return the keys, made at the first call; without the targets' one before the first registration."""
        with self._lock:
            if self._keys is None:
                self._keys = self._read() or self._kept(HostKeys(new_dhchap_key()))
            return self._keys

    def rejected(self) -> None:
        """A target did not accept the keys: register them again."""
        self._is_registered = False

    def loop(self) -> SelfPaced:
        """Register the key soon, also after a failure: before it, no volume is attached where keys are required."""
        return SelfPaced("nvme-key", self._look, _INTERVAL_S, backoff=Backoff(_INTERVAL_S))

    def _look(self) -> float:
        self.register()
        return _INTERVAL_S

    def register(self) -> None:
        """Register the key, once for each start of the program. Raises `StorageUnavailable`: retry."""
        if self._is_registered:
            return
        keys = self.get()
        controller = self._ask(keys.host)
        with self._lock:
            if controller != keys.controller:
                self._keys = self._kept(HostKeys(keys.host, controller))
        self._is_registered = True
        _LOG.info("the NVMe key of this node is registered at %s", self.registration.url)

    def _ask(self, key: str) -> str:
        try:
            token = self.registration.token_file.read_text().strip()
        except OSError as error:
            raise StorageUnavailable(f"the join token cannot be read: {error}") from error
        body = json.dumps({"client": self.node_id(), "joinToken": token, "key": key})
        try:
            status, answer = self._post(body)
        except (OSError, http.client.HTTPException) as error:
            raise self._failure(str(error) or type(error).__name__) from error
        try:
            document = json.loads(answer)
            controller = document["payload"]["controllerKey"] if status == http.client.OK else None
            reason = document["error"]
        except (ValueError, TypeError, KeyError):
            controller, reason = None, "it has no answer that this driver understands"
        if not isinstance(controller, str) or not is_dhchap_key(controller):
            raise self._failure(f"status {status}, {shown(reason)}")
        return controller

    def _post(self, body: str) -> tuple[int, bytes]:
        """Send the request; no redirect and no proxy gets the key."""
        url = urlsplit(self.registration.url)
        connection: http.client.HTTPConnection
        if url.scheme == "https":
            ca_file = str(self.registration.ca_file) if self.registration.ca_file is not None else None
            context = ssl.create_default_context(cafile=ca_file)
            connection = http.client.HTTPSConnection(
                url.hostname or "", url.port, timeout=_REQUEST_TIMEOUT_S, context=context
            )
        else:
            connection = http.client.HTTPConnection(url.hostname or "", url.port, timeout=_REQUEST_TIMEOUT_S)
        with contextlib.closing(connection):
            path = f"{url.path.rstrip('/')}/clients/register"
            connection.request("POST", path, body, {"Content-Type": "application/json"})
            response = connection.getresponse()
            return response.status, response.read(_ANSWER_LIMIT_BYTES)

    def _failure(self, why: str) -> StorageUnavailable:
        return StorageUnavailable(
            f"the NVMe key of this node is not registered at {self.registration.url}: {why}; retried until it is"
        )

    def _read(self) -> HostKeys | None:
        try:
            row = json.loads((self.directory / _FILE).read_text())
            keys = HostKeys(row["key"], row["controllerKey"])
            if not all(is_dhchap_key(each) for each in (keys.host, keys.controller) if each) or not keys.host:
                raise ValueError
        except FileNotFoundError:
            return None
        except OSError as error:  # the targets know this node's connections by the present key
            raise SystemCallFailed(f"read {self.directory / _FILE}", error.errno or 0) from error
        except (ValueError, TypeError, KeyError):  # its text could quote a key
            _LOG.error("%s cannot be read: this node makes a new key", self.directory / _FILE)
            return None
        return keys

    def _kept(self, keys: HostKeys) -> HostKeys:
        draft = self.directory / f".{_FILE}.new"
        with system_call(f"write {self.directory / _FILE}"):
            self.directory.mkdir(parents=True, exist_ok=True)
            flags = os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC | os.O_NOFOLLOW
            with closing(os.open(draft, flags, 0o600)) as fd:
                os.fchmod(fd, 0o600)
                os.write(fd, json.dumps({"key": keys.host, "controllerKey": keys.controller}).encode())
                os.fsync(fd)
            os.replace(draft, self.directory / _FILE)
            with closing(os.open(self.directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)) as fd:
                os.fsync(fd)
        return keys
