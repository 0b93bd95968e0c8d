# SPDX-License-Identifier: Apache-2.0
"""The registry of the volumes that this node connects by NVMe/TCP: one file each, in a directory that a reboot empties.

Each change replaces the file, so that readers and a restart find a whole one.
"""

from __future__ import annotations

import fcntl
import json
import logging
import os
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from csi_driver.errors import HostFailure, StorageUnavailable, SystemCallFailed
from csi_driver.host.syscalls import closing, system_call
from csi_driver.model import is_uuid, is_volume_name
from csi_driver.nvme_model import ConnectedVolume, ConnectOptions, NvmeExport

_LOG = logging.getLogger(__name__)
_SUFFIX = ".json"


@dataclass(frozen=True, slots=True)
class Connection(ConnectedVolume):
    """The record of a connection. `holders`: the staging paths that use it. `is_ending`: it is being disconnected.

    `is_refused`: the target does not let this node in any more; it is never connected again.
    """

    holders: frozenset[str] = frozenset()
    is_ending: bool = False
    is_refused: bool = False

    def to_json(self) -> str:
        document = {
            "name": self.name,
            "uuid": self.uuid,
            "nqn": self.export.nqn,
            "paths": list(self.export.paths),
            "blockBytes": self.export.block_bytes,
            "sizeBytes": self.size_bytes,
            "ioQueues": self.options.io_queues,
            "ioTimeoutSeconds": self.options.io_timeout_s,
            "holders": sorted(self.holders),
            "ending": self.is_ending,
            "refused": self.is_refused,
        }
        return json.dumps(document, indent=1) + "\n"

    @classmethod
    def parse(cls, text: str) -> Connection:
        """Read a record. Raises ValueError for one that this driver has not written."""
        try:
            found = json.loads(text)
            record = cls(
                name=str(found["name"]),
                uuid=str(found["uuid"]),
                export=NvmeExport(str(found["nqn"]), tuple(map(str, found["paths"])), int(found["blockBytes"])),
                size_bytes=int(found["sizeBytes"]),
                options=ConnectOptions(int(found["ioQueues"]), int(found["ioTimeoutSeconds"])),
                holders=frozenset(map(str, found["holders"])),
                is_ending=found["ending"] is True,
                is_refused=found["refused"] is True,
            )
        except (TypeError, KeyError) as error:
            raise ValueError(f"expected the record of a connection, got {error!r}") from error
        if record.export.problem or not is_uuid(record.uuid) or not is_volume_name(record.name):
            raise ValueError(record.export.problem or "expected name and uuid of a volume")
        return record


class Records:
    """The records. A file is read again only when it was replaced: drivers of one node share the directory."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._lock = threading.RLock()
        self._found: dict[str, tuple[tuple[int, int], Connection]] = {}
        self.pools: set[str] = set()
        """The pools that records named since the start."""
        self.unreadable: dict[str, str] = {}
        """Why, by volume: the records that `all` could not read at its last call."""

    @contextmanager
    def changing(self) -> Iterator[None]:
        """Keep other threads, and other drivers of this node, from changing a record. Not to be nested."""
        with self._lock:
            with system_call(f"lock {self._directory}"):
                os.makedirs(self._directory, 0o700, exist_ok=True)
                fd = os.open(self._directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
            with closing(fd):
                with system_call(f"lock {self._directory}"):
                    fcntl.flock(fd, fcntl.LOCK_EX)
                yield

    def all(self) -> dict[str, Connection]:
        """Return the records that can be read; the others are logged once."""
        found, unreadable = {}, {}
        for name in self._names():
            try:
                record = self.get(name)
            except HostFailure as failure:
                unreadable[name] = str(failure)
                if name not in self.unreadable:
                    _LOG.error("%s", failure)
                continue
            if record is not None:
                found[name] = record
        self.unreadable = unreadable
        return found

    def _names(self) -> list[str]:
        try:
            files = os.listdir(self._directory)
        except FileNotFoundError:
            return []
        except OSError as error:
            raise SystemCallFailed(f"list {self._directory}", error.errno or 0) from error
        return [file.removesuffix(_SUFFIX) for file in sorted(files) if file.endswith(_SUFFIX) and file[0] != "."]

    def get(self, name: str) -> Connection | None:
        """Return the record of a volume; raises `HostFailure` when there is one that cannot be read."""
        with self._lock:
            return self._read(name)

    def put(self, record: Connection, seen: Connection | None) -> None:
        """Write a record in place of the one that was seen; raises `StorageUnavailable` when that has changed since.

        An equal record in another file is another one: of a connection that was ended and made again.
        """
        with self.changing():
            if self._read(record.name) is not seen:
                raise StorageUnavailable(f"another driver of this node works on volume {record.name}; retry")
            self._write(record)

    def change(self, record: Connection, change: Callable[[Connection], Connection]) -> Connection | None:
        """Change the record of this subsystem as it is now; None when it has gone since."""
        with self.changing():
            now = self._read(record.name)
            if now is None or now.export.nqn != record.export.nqn:
                return None
            changed = change(now)
            self._write(changed)
            return changed

    def remove(self, name: str) -> None:
        with system_call(f"remove the record of the connection of volume {name}"):
            self._path(name).unlink(missing_ok=True)

    def _path(self, name: str) -> Path:
        return self._directory / (name + _SUFFIX)

    def _read(self, name: str) -> Connection | None:
        path = self._path(name)
        try:
            status = os.stat(path)
            stamp = status.st_ino, status.st_mtime_ns
            if name not in self._found or self._found[name][0] != stamp:
                record = Connection.parse(path.read_text())
                if record.name != name:
                    raise ValueError(f"expected volume {name}, got {record.name}")
                self._found[name] = stamp, record
        except FileNotFoundError:
            self._found.pop(name, None)
            return None
        except OSError as error:
            raise SystemCallFailed(f"read {path}", error.errno or 0) from error
        except ValueError as error:
            raise HostFailure(f"{path} cannot be read: {error}; end its connection by hand and remove it") from error
        record = self._found[name][1]
        self.pools.add(record.export.pool)
        return record

    def _write(self, record: Connection) -> None:
        if self._read(record.name) == record:
            return
        draft = self._directory / f".{record.name}.new"
        with system_call(f"write the record of the connection of volume {record.name}"):
            with open(draft, "w", opener=lambda path, flags: os.open(path, flags | os.O_CLOEXEC, 0o600)) as file:
                file.write(record.to_json())
            os.replace(draft, self._path(record.name))
        self._read(record.name)
