"""The format mark: the only state on a node. It tells a filesystem that we left half made from anybody's data.

It is on disk before mkfs starts and replaced on disk before the first mount, so while it is there, nobody has
used what mkfs left. What replaces it says that the volume is in use: under this attachment nothing is formatted any
more, though the attachment may be told to be the volume's first, or one that may format over old data. A volume that
was handed out raw gets a mark as well: from then on a blank head and tail prove nothing.

One volume may be held under several handles at once, each with what it was told when it was attached. So what says
that a volume is in use is never taken away by another handle's call, and counts for every attachment up to its own.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import logging
import os
import struct
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from csi_driver.deadline import SYSTEM_CLOCK, Clock
from csi_driver.errors import HostFailure, SystemCallFailed
from csi_driver.node.mount_owner import Ownership
from csi_driver.node.ports import Devices, Mounts

LUKS = "luks"
"""Stands in `UsageRecord.filesystem` while a LUKS header is being made, before there is any filesystem."""
RAW = "raw"
"""Stands in `UsageRecord.filesystem` where the volume was handed out as a raw block device."""
USED = "used"
"""Stands in `UsageRecord.filesystem` where the volume was mounted writable, or is about to be."""

# struct flock (fcntl(2)): type, whence, start, length, and the process, which is 0 for a lock of a file description.
_FLOCK = struct.Struct("=hhxxxxqqixxxx")


@dataclass(frozen=True, slots=True)
class UsageRecord:
    """What was begun on a volume, and under which of its attachments (0 = not counted).

    `uncounted`: the volume was put to use last under an attachment that nobody counts; `attachment` is an earlier one.
    `root_mode_pending`: its filesystem is new, and the root directory has not got the mode that was asked for: no
    staging has ended, so no pod had the volume.
    """

    volume_uuid: str
    attachment: int
    filesystem: str
    uncounted: bool = False
    root_mode_pending: bool = False

    @property
    def is_use(self) -> bool:
        """Whether it says that somebody may have written to the volume; else it says what was begun to be made."""
        return self.filesystem in (RAW, USED)

    def is_of(self, attachment: int) -> bool:
        """Tell whether it says something of this attachment; attachments that nobody counts are never the same.

        What was begun was so under one attachment; what was used since is known to no earlier one.
        """
        if self.is_use:
            return 0 < attachment <= self.attachment
        return attachment > 0 and self.attachment == attachment


def record_use(
    records: UsageRecords, volume_uuid: str, attachment: int, how: str, *, root_mode_pending: bool | None = False
) -> None:
    """Put on record that the volume is in use (`how`: RAW or USED) under this attachment, and maybe under earlier ones.

    A format that was begun is over with it. Attachments that nobody counts leave no record of their own, but that
    they came after the one on record. `root_mode_pending`: see `UsageRecord`; None = as recorded.
    """
    with records.changing(volume_uuid):
        mark = records.read(volume_uuid)
        last = max(attachment, mark.attachment if mark is not None else 0)
        if root_mode_pending is None:
            root_mode_pending = mark is not None and mark.root_mode_pending and mark.attachment == attachment
        if last:
            used = UsageRecord(volume_uuid, last, how, attachment == 0, root_mode_pending and attachment == last)
            if mark != used:
                records.write(used)
        elif mark is not None:
            records.remove(volume_uuid)


def earlier_use(records: UsageRecords, volume_uuid: str | None, attachment: int) -> int:
    """Return the attachment under which the volume was put to use, where that is an earlier one than this; else 0.

    What is still mounted of it then belongs to a device that was taken from this node in between. Where it was put to
    use last under an attachment that nobody counts, that may be this very one.
    """
    mark = records.read(volume_uuid) if volume_uuid is not None and attachment > 0 else None
    if mark is None or not mark.is_use or mark.uncounted or mark.attachment >= attachment:
        return 0
    return mark.attachment


class UsageRecords:
    """Marks as small files, one per volume, in a directory that survives a reboot.

    Two drivers use it for a moment while one replaces the other, and two publications of one volume at any time: who
    changes a mark holds the volume's byte of the file `lock`.
    """

    def __init__(self, state_directory: Path) -> None:
        self._directory = state_directory / "format-marks"
        self._held = threading.local()

    @contextmanager
    def changing(self, *volume_uuids: str) -> Iterator[None]:
        """Hold these records against every other thread and process inside the block; held already is success."""
        held: frozenset[str] = getattr(self._held, "uuids", frozenset())
        wanted = frozenset(volume_uuids) - held
        if not wanted:
            yield
            return
        fd = self._lock(wanted)
        try:
            self._held.uuids = held | wanted
            yield
        finally:
            self._held.uuids = held
            os.close(fd)

    def _lock(self, volume_uuids: frozenset[str]) -> int:
        """Return a descriptor that holds the volumes' bytes of the lock file until it is closed."""
        path = self._directory / "lock"
        try:
            self._make_directory()
            fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        except OSError as error:
            raise SystemCallFailed(f"open {path}", error.errno or 0) from error
        try:
            for place in sorted(map(_place, volume_uuids)):
                fcntl.fcntl(fd, fcntl.F_OFD_SETLKW, _FLOCK.pack(fcntl.F_WRLCK, os.SEEK_SET, place, 1, 0))
        except OSError as error:
            os.close(fd)
            raise SystemCallFailed(f"lock {path}", error.errno or 0) from error
        return fd

    def recorded(self) -> list[str]:
        """Return the uuids of all volumes that have a mark, the one that was written first at the head."""
        found: list[tuple[float, str]] = []
        try:
            for entry in os.scandir(self._directory):
                if entry.name.endswith(".mark"):
                    try:
                        found.append((entry.stat().st_mtime, entry.name.removesuffix(".mark")))
                    except FileNotFoundError:
                        continue  # another process has just removed it
        except FileNotFoundError:
            return []
        except OSError as error:
            raise SystemCallFailed(f"read the directory {self._directory}", error.errno or 0) from error
        return [uuid for _, uuid in sorted(found)]

    def read(self, volume_uuid: str) -> UsageRecord | None:
        """Return the volume's mark. Raises `HostFailure` when there is one that cannot be read."""
        path = self.path_of(volume_uuid)
        try:
            text = path.read_text(encoding="utf-8")
        except FileNotFoundError:
            return None
        except OSError as error:
            raise SystemCallFailed(f"read {path}", error.errno or 0) from error
        try:
            fields = json.loads(text)
            mark = UsageRecord(
                str(fields["volume"]),
                int(fields["attachment"]),
                str(fields["filesystem"]),
                uncounted=fields.get("uncounted") is True,
                root_mode_pending=fields.get("rootModePending") is True,
            )
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise HostFailure(f"format mark {path} cannot be read, so the volume is not formatted") from error
        if mark.volume_uuid != volume_uuid:
            raise HostFailure(f"format mark {path}: expected volume {volume_uuid}, got {mark.volume_uuid}")
        return mark

    def write(self, mark: UsageRecord) -> None:
        """Set the mark, replacing an older one of the volume, and see it on disk."""
        path = self.path_of(mark.volume_uuid)
        draft = path.with_suffix(".draft")
        fields = {"volume": mark.volume_uuid, "attachment": mark.attachment, "filesystem": mark.filesystem}
        seldom = {"uncounted": mark.uncounted, "rootModePending": mark.root_mode_pending}
        text = json.dumps({**fields, **{key: True for key, value in seldom.items() if value}})
        with self.changing(mark.volume_uuid):
            try:
                with draft.open("w", encoding="utf-8") as file:
                    file.write(text)
                    file.flush()
                    os.fsync(file.fileno())
                draft.replace(path)
                _sync(self._directory)
            except OSError as error:
                raise SystemCallFailed(f"write {path}", error.errno or 0) from error

    def remove(self, volume_uuid: str) -> None:
        """Remove the mark and see it gone from disk."""
        path = self.path_of(volume_uuid)
        if not self._directory.is_dir():
            return
        with self.changing(volume_uuid):
            try:
                path.unlink()
                _sync(self._directory)
            except FileNotFoundError:
                return
            except OSError as error:
                raise SystemCallFailed(f"remove {path}", error.errno or 0) from error

    def _make_directory(self) -> None:
        if not self._directory.is_dir():
            self._directory.mkdir(mode=0o700, parents=True, exist_ok=True)
            _sync(self._directory.parent)

    def path_of(self, volume_uuid: str) -> Path:
        """Return the file of the volume's record."""
        return self._directory / f"{volume_uuid}.mark"


def _place(volume_uuid: str) -> int:
    """Return the byte of the lock file that is the volume's."""
    return int.from_bytes(hashlib.sha256(volume_uuid.encode()).digest()[:7], "big")


def _sync(directory: Path) -> None:
    """Write a directory's entries to disk (fsync(2): a file's own fsync does not cover them)."""
    descriptor = os.open(directory, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


logger = logging.getLogger(__name__)

NEWEST_KEPT = 1024
"""As many volumes as a node can have at once (the limit of the storage client)."""
ABSENT_S = 3600.0
"""Far longer than a storage client takes to show its volumes again after a reboot or an upgrade."""
MOST_AT_ONCE = 256
"""Records that one look removes; each waits for the disk."""


class RecordCleanup:
    """Looks which volumes are here, and removes records of those that were not, at any look, for an hour."""

    def __init__(
        self,
        *,
        records: UsageRecords,
        devices: Devices,
        mounts: Mounts,
        ownership: Ownership,
        clock: Clock = SYSTEM_CLOCK,
    ) -> None:
        self._records = records
        self._devices = devices
        self._mounts = mounts
        self._ownership = ownership
        self._clock = clock
        self._absent_since: dict[str, float] = {}

    def sweep(self) -> int:
        """Look once; return how many records were removed. Raises `HostFailure` where the records cannot be read."""
        recorded = self._records.recorded()
        here = self._here() if len(recorded) > NEWEST_KEPT else None
        if here is None:
            self._absent_since.clear()
            return 0
        now_s = self._clock.monotonic()
        self._absent_since = {
            uuid: self._absent_since.get(uuid, now_s) for uuid in recorded if uuid.lower() not in here
        }
        old = [
            uuid
            for uuid in recorded[: max(0, len(recorded) - NEWEST_KEPT)]
            if now_s - self._absent_since.get(uuid, now_s) >= ABSENT_S and self._is_readable(uuid)
        ]
        removed = self._remove(old[:MOST_AT_ONCE])
        if removed:
            logger.info("removed %d usage records of volumes that this node has not had for a long time", removed)
        return removed

    def _remove(self, volume_uuids: Sequence[str]) -> int:
        """Remove these records, unless a volume has come back: a stage then waits, and writes its record anew."""
        if not volume_uuids:
            return 0
        with self._records.changing(*volume_uuids):
            here = self._here()
            going = [uuid for uuid in volume_uuids if here is not None and uuid.lower() not in here]
            for uuid in going:
                self._records.remove(uuid)
        return len(going)

    def _is_readable(self, volume_uuid: str) -> bool:
        """Tell whether a record can be read; one that cannot stops the volume's next stage, which names it."""
        try:
            return self._records.read(volume_uuid) is not None
        except HostFailure:
            return False

    def _here(self) -> frozenset[str] | None:
        """Return the uuids of the volumes that have a device or a mount here; None when that cannot be told."""
        present = self._devices.present()
        if present is None:
            return None
        names = {self._ownership.name_of(mounted) for mounted in self._mounts.table()} - {None}
        if not names <= present.keys():
            return None  # a mount whose device is gone: nothing tells which volume it was
        return frozenset(uuid.lower() for uuid in present.values())
