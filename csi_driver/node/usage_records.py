# SPDX-License-Identifier: Apache-2.0
"""Usage records: one small file per volume, the only state that a node keeps.

A record is on disk before mkfs starts, and says "in use" before the first mount: so an unfinished format is known from
data of a user, and nothing is formatted twice under one attachment. A volume may be attached under several handles at
once, so a record of use counts for every attachment up to its own, and no call of another handle removes it.
"""

from __future__ import annotations

import binascii
import errno
import fcntl
import hashlib
import json
import logging
import os
import struct
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path

from csi_driver.deadline import SYSTEM_CLOCK, Clock
from csi_driver.errors import HostFailure, SystemCallFailed
from csi_driver.node.mount_owner import Ownership
from csi_driver.node.ports import Devices, Mounts

logger = logging.getLogger(__name__)

# `UsageRecord.filesystem` while a LUKS header is made, after a publication as raw block, and after a mount.
LUKS, RAW, USED = "luks", "raw", "used"

NEWEST_KEPT = 1024
"""Number of the newest records to keep: as many volumes as a client can attach."""
ABSENT_S = 3600.0
"""Absence after which a record may go; a client shows its volumes within minutes."""
MOST_AT_ONCE = 256  # records that one sweep removes; each waits for the disk

RECORDS = "format-marks"
"""Directory of the records in the state directory."""

_FILE_BYTES = 512
"""Length of a record's file: one sector, which a disk writes as a whole or not at all, also in place."""

_MOST_BYTES = 8 * _FILE_BYTES  # a file that is longer is none of ours; its part is no valid JSON

# struct flock (fcntl(2)): type, whence, start, length, and the process, which is 0 for a lock of a file description.
_FLOCK = struct.Struct("=hhxxxxqqixxxx")


@dataclass(frozen=True, slots=True)
class UsageRecord:
    """Last use of a volume or begun format (`filesystem`), and its attachment (0 = not counted).

    `uncounted`: the last use was under an attachment that is not counted; `attachment` is an earlier one.
    `root_mode_pending`: the filesystem is new and its root directory does not have the requested mode yet.
    """

    volume_uuid: str
    attachment: int
    filesystem: str
    uncounted: bool = False
    root_mode_pending: bool = False

    @property
    def is_use(self) -> bool:
        """Whether the volume may have been written to; otherwise a format was begun."""
        return self.filesystem in (RAW, USED)

    def is_of(self, attachment: int) -> bool:
        """Return whether the record applies to the attachment: use also to earlier ones."""
        if self.is_use:
            return 0 < attachment <= self.attachment
        return attachment > 0 and self.attachment == attachment


class UsageRecords:
    """Usage records as files, locked during a change, as two drivers may run."""

    def __init__(self, state_directory: Path) -> None:
        self._directory = state_directory / RECORDS
        self._held = threading.local()

    @contextmanager
    def changing(self, *volume_uuids: str) -> Iterator[None]:
        """Lock these records against other threads and processes; may be nested."""
        held: frozenset[str] = getattr(self._held, "uuids", frozenset())
        missing = frozenset(volume_uuids) - held
        if not missing:
            yield
            return
        fd = self._lock(missing)
        try:
            self._held.uuids = held | missing
            yield
        finally:
            self._held.uuids = held
            os.close(fd)

    def _lock(self, volume_uuids: frozenset[str]) -> int:
        with _system_call(f"lock {self._directory / 'lock'}"):
            try:
                fd = self._open_lock()
            except FileNotFoundError:
                self._directory.mkdir(mode=0o700, parents=True, exist_ok=True)
                _sync(self._directory.parent)
                fd = self._open_lock()
            try:
                for offset in sorted(map(_lock_offset, volume_uuids)):
                    fcntl.fcntl(fd, fcntl.F_OFD_SETLKW, _FLOCK.pack(fcntl.F_WRLCK, os.SEEK_SET, offset, 1, 0))
            except OSError:
                os.close(fd)
                raise
        return fd

    def _open_lock(self) -> int:
        return os.open(self._directory / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)

    def recorded(self) -> list[str]:
        """Return the UUIDs of all volumes with a record, the oldest record first."""
        found: list[tuple[float, str]] = []
        with _system_call(f"read the directory {self._directory}"), suppress(FileNotFoundError):
            for entry in os.scandir(self._directory):
                if entry.name.endswith(".mark"):
                    with suppress(FileNotFoundError):  # another process has just removed it
                        found.append((entry.stat().st_mtime, entry.name.removesuffix(".mark")))
        return [uuid for _, uuid in sorted(found)]

    def read(self, volume_uuid: str) -> UsageRecord | None:
        """Return the volume's record. Raises `HostFailure` when it cannot be read or is invalid."""
        try:
            return self._read(volume_uuid)
        except HostFailure:  # another process may be about to replace it
            with self.changing(volume_uuid):
                return self._read(volume_uuid)

    def _read(self, volume_uuid: str) -> UsageRecord | None:
        path = self.path_of(volume_uuid)
        with _system_call(f"read {path}"):
            try:
                with _opened(path, os.O_RDONLY) as file:
                    content = os.read(file, _MOST_BYTES)
            except FileNotFoundError:
                return None
        try:
            fields = json.loads(content)
            check = fields.pop("check", None)  # earlier drivers wrote none
            if check is not None and check != _check(fields):
                raise ValueError("checksum")
            record = UsageRecord(
                str(fields["volume"]),
                int(fields["attachment"]),
                str(fields["filesystem"]),
                uncounted=fields.get("uncounted") is True,
                root_mode_pending=fields.get("rootModePending") is True,
            )
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise HostFailure(f"usage record {path} cannot be read, so the volume is not formatted") from error
        if record.volume_uuid != volume_uuid:
            raise HostFailure(f"usage record {path}: expected volume {volume_uuid}, got {record.volume_uuid}")
        return record

    def write(self, record: UsageRecord) -> None:
        """Replace the record of the volume, in place where there is one: that takes one flush, and not two commits."""
        path = self.path_of(record.volume_uuid)
        draft = path.with_suffix(".draft")
        content = _encoded(record)
        with self.changing(record.volume_uuid), _system_call(f"write {path}"):
            if _is_overwritten(path, content):
                return
            with _opened(draft, os.O_WRONLY | os.O_CREAT | os.O_TRUNC) as file:
                if os.write(file, content) != len(content):
                    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(draft))
                os.fsync(file)
            draft.replace(path)
            _sync(self._directory)

    def remove(self, volume_uuid: str) -> None:
        """Remove the record of the volume; absent is success."""
        path = self.path_of(volume_uuid)
        if not self._directory.is_dir():
            return
        with self.changing(volume_uuid), _system_call(f"remove {path}"), suppress(FileNotFoundError):
            path.unlink()
            _sync(self._directory)

    def path_of(self, volume_uuid: str) -> Path:
        """Return the file of the volume's record."""
        return self._directory / f"{volume_uuid}.mark"


def _encoded(record: UsageRecord) -> bytes:
    fields = {"volume": record.volume_uuid, "attachment": record.attachment, "filesystem": record.filesystem}
    flags = {"uncounted": record.uncounted, "rootModePending": record.root_mode_pending}
    fields |= {key: True for key, value in flags.items() if value}
    return json.dumps({**fields, "check": _check(fields)}).encode().ljust(_FILE_BYTES)


def _check(fields: Mapping[str, object]) -> int:
    return binascii.crc32(json.dumps(fields).encode())


def _is_overwritten(path: Path, content: bytes) -> bool:
    """Write the content to a file of one sector, and to disk; False when there is none."""
    try:
        with _opened(path, os.O_WRONLY) as file:
            if os.fstat(file).st_size != _FILE_BYTES or len(content) != _FILE_BYTES:
                return False
            os.write(file, content)
            os.fdatasync(file)
    except FileNotFoundError:
        return False
    return True


def record_use(
    records: UsageRecords, volume_uuid: str, attachment: int, how: str, *, root_mode_pending: bool | None = False
) -> None:
    """Record that the volume is in use (`how`: RAW or USED), which ends a begun format.

    Of an attachment that is not counted only an older record is updated. `root_mode_pending`: None = unchanged.
    """
    with records.changing(volume_uuid):
        old = records.read(volume_uuid)
        last = max(attachment, old.attachment if old is not None else 0)
        if root_mode_pending is None:
            root_mode_pending = old is not None and old.root_mode_pending and old.attachment == attachment
        if last:
            # Also an equal one: a failed flush, or a driver that died before it, leaves it in memory and not on disk.
            records.write(
                UsageRecord(volume_uuid, last, how, attachment == 0, root_mode_pending and attachment == last)
            )
        elif old is not None:
            records.remove(volume_uuid)


def earlier_use(records: UsageRecords, volume_uuid: str | None, attachment: int) -> int:
    """Return the earlier attachment of the last use; 0 if there was none."""
    record = records.read(volume_uuid) if volume_uuid is not None and attachment > 0 else None
    if record is None or not record.is_use or record.uncounted or record.attachment >= attachment:
        return 0
    return record.attachment


@contextmanager
def _system_call(call: str) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise SystemCallFailed(call, error.errno or 0) from error


def _lock_offset(volume_uuid: str) -> int:
    return int.from_bytes(hashlib.sha256(volume_uuid.encode()).digest()[:7], "big")


def _sync(directory: Path) -> None:
    """Write a directory's entries to disk: fsync(2) of a file does not."""
    with _opened(directory, os.O_RDONLY | os.O_DIRECTORY) as descriptor:
        os.fsync(descriptor)


@contextmanager
def _opened(path: Path, flags: int) -> Iterator[int]:
    descriptor = os.open(path, flags | os.O_CLOEXEC, 0o666)
    try:
        yield descriptor
    finally:
        os.close(descriptor)


@dataclass(slots=True, kw_only=True)
class RecordCleanup:
    """Removes records of volumes that were absent for an hour, if many others are newer.

    A node is never told that an attachment is over (docs/data-safety.md, "How long a record is kept").
    """

    records: UsageRecords
    devices: Devices
    mounts: Mounts
    ownership: Ownership
    clock: Clock = SYSTEM_CLOCK
    _absent_since: dict[str, float] = field(default_factory=dict, init=False)

    def sweep(self) -> int:
        """Return how many records were removed."""
        recorded = self.records.recorded()
        present = self._present() if len(recorded) > NEWEST_KEPT else None
        if present is None:
            self._absent_since.clear()
            return 0
        now_s = self.clock.monotonic()
        absent = [uuid for uuid in recorded if uuid.lower() not in present]
        self._absent_since = {uuid: self._absent_since.get(uuid, now_s) for uuid in absent}
        old = [
            uuid
            for uuid in recorded[: len(recorded) - NEWEST_KEPT]
            if now_s - self._absent_since.get(uuid, now_s) >= ABSENT_S and self._is_readable(uuid)
        ]
        removed = self._remove(old[:MOST_AT_ONCE])
        if removed:
            logger.info("removed %d usage records of volumes that have been absent for a long time", removed)
        return removed

    def _remove(self, volume_uuids: Sequence[str]) -> int:
        """Remove these records, but not that of a volume that has come back meanwhile."""
        if not volume_uuids:
            return 0
        with self.records.changing(*volume_uuids):
            present = self._present()
            absent = [uuid for uuid in volume_uuids if present is not None and uuid.lower() not in present]
            for uuid in absent:
                self.records.remove(uuid)
        return len(absent)

    def _is_readable(self, volume_uuid: str) -> bool:
        """Return whether a record can be read; the volume's next stage reports one that cannot."""
        try:
            return self.records.read(volume_uuid) is not None
        except HostFailure:
            return False

    def _present(self) -> frozenset[str] | None:
        """Return the UUIDs of the volumes on this node; None when they are not all known."""
        present = self.devices.present()
        if present is None:
            return None
        names = {self.ownership.name_of(mount) for mount in self.mounts.table()} - {None}
        if not names <= present.keys():
            return None  # the UUID of a mount without device is not known
        return frozenset(uuid.lower() for uuid in present.values())
