# SPDX-License-Identifier: Apache-2.0
"""Snapshots of volumes: cut, delete and recover them. Methods raise ApiError.

A cut is one reflink of the volume's file. Its row says `cutting` first, with the space reserved, and `none` when the
file is complete and on disk; nothing is promised before. So a retry, and the start, remove an interrupted cut.

Locks: the snapshot's name, then the volume's uuid. A reflink takes time for each extent, and the volume's writers wait
for it: the file is synced and its extents are counted first, without the volume's lock.
"""

from __future__ import annotations

import datetime as dt
import logging
import uuid
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import TypeVar

from csi_driver.background import Worker
from csi_driver.deadline import SYSTEM_CLOCK, Clock
from csi_driver.embedded import documents
from csi_driver.embedded.allocator import Allocator, NoSpace
from csi_driver.embedded.documents import ApiError
from csi_driver.embedded.model import (
    MARKED_FOR_DELETION,
    NO_ACTION,
    SNAPSHOTS,
    VOLUMES,
    Document,
    Snapshot,
    Volume,
)
from csi_driver.embedded.pool import NO_SPACE, Pool, VolumeLocks
from csi_driver.embedded.requests import NewSnapshot, SourceVolume
from csi_driver.embedded.store import Change, Store
from csi_driver.embedded.volumes import Volumes
from csi_driver.errors import DriverError, HostFailure, NotFreezable, SystemCallFailed
from csi_driver.telemetry.metrics import Cuts

_log = logging.getLogger(__name__)

A = TypeVar("A")
T = TypeVar("T")

REFUSALS: dict[object, str] = {
    documents.NOT_SUPPORTED: "unsupported",
    documents.TOO_MANY_EXTENTS: "extents",
    documents.NO_SNAPSHOT_SPACE: "space",
    documents.SOURCE_BUSY: "busy",
}
"""Errors that the metric of refused cuts tells apart."""


def now() -> str:
    return dt.datetime.now(dt.UTC).isoformat(timespec="microseconds").replace("+00:00", "Z")


def lock_of(snapshot_name: str) -> str:
    return f"snapshot/{snapshot_name}"


@dataclass(eq=False)
class Snapshots:
    extent_limit: int
    store: Store
    allocator: Allocator
    pool: Pool
    locks: VolumeLocks
    volumes: Volumes
    worker: Worker
    clock: Clock = SYSTEM_CLOCK
    cuts: Cuts = field(default_factory=lambda: Cuts(("done", *REFUSALS.values())))

    @property
    def why_none(self) -> str:
        """Why the pool offers no snapshots; "" when it does."""
        return self.pool.why_no_reflinks

    def counted(self, act: Callable[[A], T]) -> Callable[[A], T]:
        """Return the function that carries out a request, and counts the result."""

        def counting(item: A) -> T:
            try:
                done = act(item)
            except ApiError as refusal:
                if result := REFUSALS.get(refusal.error["id"]):
                    self.cuts.results.labels(result).inc()
                raise
            self.cuts.results.labels("done").inc()
            return done

        return counting

    def save(self, item: NewSnapshot) -> Snapshot:
        """Cut a volume; return the snapshot that an earlier request of this name and volume made."""
        self.refuse_unsupported()
        with self.locks.hold(lock_of(item.name)):
            return self.known(item.name, item.volume) or self._cut(item)

    def refuse_unsupported(self) -> None:
        if self.why_none:
            raise ApiError(documents.NOT_SUPPORTED, f"the storage manager offers no snapshots: {self.why_none}")

    def known(self, name: str, source: SourceVolume, group: str | None = None) -> Snapshot | None:
        """Return the ready snapshot of this name, volume and group; the rest of a failed cut is removed.

        The caller holds the lock of the name.
        """
        snapshot = self.store.get(SNAPSHOTS, name)
        if snapshot is None:
            return None
        if (snapshot.volume_uuid, snapshot.group) != (source.uuid, group):
            kind = f"member of the group {snapshot.group}, of volume" if snapshot.group else "snapshot of volume"
            reason = f"a {kind} {snapshot.volume}, uuid {snapshot.volume_uuid}; use another name, or delete it"
            raise ApiError(documents.SNAPSHOT_EXISTS, f"Snapshot {name} already exists: {reason}")
        if snapshot.is_ready:
            if reason := self.why_lost(snapshot):
                raise ApiError(documents.SOURCE_NOT_USABLE, f"Snapshot {name} cannot be used: {reason}")
            return snapshot
        if snapshot.action == MARKED_FOR_DELETION:
            raise ApiError(documents.SOURCE_BUSY, f"Snapshot {name} is being deleted; retry")
        self.remove(snapshot)
        return None

    def _cut(self, item: NewSnapshot) -> Snapshot:
        extents = self.measure(item.volume)
        with self.locks.hold(item.volume.uuid):
            self.verify_file(item.volume)
            given = item.given("name", "volume")
            snapshot = self.store.write(lambda change: self.begin(change, item.name, item.volume, given))
            try:
                cut = self.cut(snapshot, extents)
                return self.store.write(lambda change: self.finish(change, cut))
            except DriverError as problem:
                self.remove_soon(snapshot)
                raise refusal_of(item.name, problem) from problem

    def verify_file(self, source: SourceVolume) -> None:
        """Refuse a volume with devices that write to another file; the caller holds its lock."""
        if reason := self.volumes.why_other_file(source.uuid):
            raise _not_usable(source.id, reason)

    def measure(self, source: SourceVolume) -> int:
        """Sync a volume's file and return its extents. Refused where the volume cannot be cut, or has too many."""
        lost = self.volumes.check_file(source.id)
        volume = usable(self.store.get(VOLUMES, source.id), source)
        if lost:
            raise _not_usable(source.id, lost)
        file = self.pool.file(volume.uuid)
        if not self.volumes.secure_file(volume.name, volume.uuid):
            self.pool.sync(file)
        extents = self.pool.count_extents(file)
        if extents > self.extent_limit:
            reason = (
                f"its file {file} has {extents} extents, at most {self.extent_limit} are allowed "
                "(--snapshot-extent-limit): writes to the volume would be blocked too long; detach it and defragment "
                "the file (xfs_fsr), or raise the limit"
            )
            raise ApiError(documents.TOO_MANY_EXTENTS, f"Volume {volume.name} cannot be cut: {reason}")
        return extents

    def begin(
        self,
        change: Change,
        name: str,
        source: SourceVolume,
        given: Document,
        *,
        group: tuple[str, str] | None = None,
    ) -> Snapshot:
        """Put the row of a snapshot that is being cut, and reserve its space; the caller holds both locks.

        `group`: name and uuid.
        """
        volume = usable(change.get(VOLUMES, source.id), source)
        try:
            self.allocator.reserve(change, volume, self.pool.occupied_bytes(self.pool.file(volume.uuid)))
        except NoSpace as problem:
            raise _no_space(name, problem) from problem
        group_name, group_uuid = group or (None, None)
        snapshot = Snapshot(
            name=name,
            uuid=str(uuid.uuid4()),
            volume=volume.name,
            volume_uuid=volume.uuid,
            blocks=volume.blocks,
            layout=volume.layout,
            given=given,
            group=group_name,
            group_uuid=group_uuid,
            encryption=volume.encryption,
        )
        change.put(SNAPSHOTS, name, snapshot)
        return snapshot

    def cut(self, snapshot: Snapshot, extents: int) -> Snapshot:
        """Make the snapshot's file, and return the snapshot for `finish`."""
        begun_s, created = self.clock.monotonic(), now()
        self.share(snapshot)
        cut = self.complete(snapshot, extents, created)
        self.cuts.last_extents.set(extents)
        self.cuts.last_s.set(self.clock.monotonic() - begun_s)
        return cut

    def share(self, snapshot: Snapshot) -> None:
        """Take the content of the volume at this moment; `complete` must follow."""
        self.pool.begin_reflink(self.pool.file(snapshot.volume_uuid), self.pool.snapshot_file(snapshot.uuid))

    def complete(self, snapshot: Snapshot, extents: int, created: str) -> Snapshot:
        """Complete the snapshot's file, and return the snapshot for `finish`."""
        target = self.pool.snapshot_file(snapshot.uuid)
        self.pool.complete_reflink(target, snapshot.bytes, mode=0o400)
        return replace(snapshot, action=NO_ACTION, created=created, extents=extents)

    def finish(self, change: Change, cut: Snapshot) -> Snapshot:
        """Put the row of a snapshot with a complete file; its volume's metadata is that of after the cut.

        A volume is marked as written before its first write, so the mark covers all that the file holds.
        """
        volume = change.get(VOLUMES, cut.volume)
        metadata: object = None
        if volume is not None and volume.uuid == cut.volume_uuid:  # always so: the caller holds its lock
            metadata = volume.given.get("metadata")
            self.allocator.share(change, volume, self.pool.occupied_bytes(self.pool.snapshot_file(cut.uuid)))
        ready = replace(cut, source_metadata=metadata if isinstance(metadata, dict) else {})
        change.put(SNAPSHOTS, cut.name, ready)
        return ready

    def delete(self, name: str, identity: str) -> None:
        """Delete a snapshot; volumes that were made from it stay."""
        with self.locks.hold(lock_of(name)):
            snapshot = self.store.write(lambda change: self.mark(change, name, identity))
            self.remove_soon(snapshot)

    def mark(self, change: Change, name: str, identity: str, group: str | None = None) -> Snapshot:
        """Mark a snapshot for deletion; only the deletion of its group deletes a member."""
        snapshot = change.get(SNAPSHOTS, name)
        if snapshot is None or snapshot.uuid != identity:
            raise ApiError(documents.SNAPSHOT_NOT_FOUND, f"Snapshot {name} not found")
        if snapshot.group != group:
            reason = f"it is a member of the group {snapshot.group}; delete the group"
            raise ApiError(documents.GROUP_MEMBER, f"Snapshot {name} cannot be deleted alone: {reason}")
        marked = replace(snapshot, action=MARKED_FOR_DELETION)
        change.put(SNAPSHOTS, name, marked)
        return marked

    def remove_soon(self, snapshot: Snapshot) -> None:
        """Remove a snapshot that is marked or was not cut, now or by a retry; the caller holds the lock of its name."""

        def again() -> bool:
            with self.locks.hold(lock_of(snapshot.name)):
                current = self.store.get(SNAPSHOTS, snapshot.name)
                is_left = current is not None and current.uuid == snapshot.uuid and not current.is_ready
                return not is_left or self.remove(snapshot)

        self.worker.soon(f"remove {lock_of(snapshot.name)}", lambda: self.remove(snapshot), again)

    def remove(self, snapshot: Snapshot) -> bool:
        """Remove the file, then the row, which the next start would remove again.

        A commit that failed may be on disk nevertheless, and say that the snapshot is ready: the mark comes first.
        """
        if snapshot.action != MARKED_FOR_DELETION:
            marked = replace(snapshot, action=MARKED_FOR_DELETION)
            self.store.write(lambda change: change.put(SNAPSHOTS, snapshot.name, marked))
        self.pool.remove_snapshot(snapshot.uuid)
        self.store.write_later(lambda change: self.forget(change, snapshot))
        return True

    def forget(self, change: Change, snapshot: Snapshot) -> None:
        """Remove the row of a snapshot without a file."""
        current = change.get(SNAPSHOTS, snapshot.name)
        if current is None or current.uuid != snapshot.uuid:
            return
        change.delete(SNAPSHOTS, snapshot.name)
        volume = change.get(VOLUMES, snapshot.volume)
        if volume is not None and volume.uuid == snapshot.volume_uuid:
            self.allocator.release(change, volume)

    def why_lost(self, snapshot: Snapshot) -> str:
        """Return why a snapshot's file cannot be used; "" when it can."""
        file = self.pool.snapshot_file(snapshot.uuid)
        try:
            if self.pool.has_file(file, snapshot.bytes):
                return ""
        except HostFailure as problem:
            return str(problem)
        return f"its file {file} is gone or cut short, expected {snapshot.bytes} bytes; restore it from a backup"

    def recover(self) -> None:
        """Remove the snapshots that the last run had not cut, or was deleting. Other files are kept."""
        self.pool.remove_unfinished()
        files = self.pool.snapshot_identities()
        for snapshot in self.store.all(SNAPSHOTS):
            files.discard(snapshot.uuid)
            if not snapshot.is_ready:
                self.remove_soon(snapshot)
            elif reason := self.why_lost(snapshot):
                _log.error("snapshot %s cannot be used: %s", snapshot.name, reason)
        for identity in sorted(files):
            _log.warning("the file %s belongs to no snapshot; it is kept", self.pool.snapshot_file(identity))


def usable(volume: Volume | None, source: SourceVolume) -> Volume:
    if volume is None or volume.uuid != source.uuid:
        raise ApiError(documents.VOLUME_NOT_FOUND, f"Volume {source.id} not found")
    if volume.action == "markedForDeletion":
        raise _not_usable(volume.name, "it is being deleted")
    if volume.action not in ("none", "extending") or not volume.ready:
        reason = f"it is not ready, its action is {volume.action}; retry"
        raise ApiError(documents.SOURCE_BUSY, f"Volume {volume.name} cannot be cut now: {reason}")
    return volume


def _not_usable(volume: str, reason: str) -> ApiError:
    return ApiError(documents.SOURCE_NOT_USABLE, f"Volume {volume} cannot be cut: {reason}")


def refusal_of(name: str, problem: DriverError) -> DriverError:
    """Return the error of a cut that failed."""
    if isinstance(problem, SystemCallFailed) and problem.errno in NO_SPACE:
        return _no_space(name, problem)
    if isinstance(problem, NotFreezable):
        return ApiError(documents.NOT_FREEZABLE, f"Snapshot {name} cannot be cut: {problem}")
    return problem


def _no_space(name: str, problem: Exception) -> ApiError:
    return ApiError(documents.NO_SNAPSHOT_SPACE, f"Snapshot {name} cannot be cut: {problem}")
