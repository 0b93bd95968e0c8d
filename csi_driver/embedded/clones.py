# SPDX-License-Identifier: Apache-2.0
"""Volumes made from a snapshot or another volume: their file is a reflink of its file.

The row is committed first, as `initializing` and `made`: nothing ever creates an empty file for it, also not an
earlier version after a rollback. Until the file is complete the volume is neither attached, extended, deleted nor
copied. If the copy fails or a crash interrupts it, nothing was promised: the volume is deleted, and a retry makes
another one.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass, replace
from pathlib import Path

from csi_driver.embedded import documents
from csi_driver.embedded.documents import ApiError
from csi_driver.embedded.layouts import BLOCK_SIZE
from csi_driver.embedded.model import SNAPSHOTS, VOLUMES, Encryption, Snapshot, Source, Volume
from csi_driver.embedded.pool import NO_SPACE
from csi_driver.embedded.requests import CloneSource, NewClone
from csi_driver.embedded.snapshots import Snapshots, lock_of, usable
from csi_driver.embedded.store import Change, Store
from csi_driver.embedded.volumes import refuse_name
from csi_driver.errors import DriverError, SystemCallFailed

_log = logging.getLogger(__name__)


@dataclass(eq=False)
class Clones:
    snapshots: Snapshots

    def __post_init__(self) -> None:
        self.store, self.pool, self.volumes = self.snapshots.store, self.snapshots.pool, self.snapshots.volumes

    def create(self, item: NewClone) -> Volume:
        """Make a volume with the content that its source has now. Raises ApiError."""
        self.snapshots.refuse_unsupported()
        self.volumes.refuse_unsupported(item)
        refuse_name(self.store, item.name)
        file = self._checked(item.source)
        volume = self.store.write(lambda change: self._record(change, item, file))
        try:
            return self._copied(volume, item.source, file)
        except DriverError as problem:
            self.volumes.worker.soon(f"remove {volume.uuid}", lambda: self._removed(volume))
            if isinstance(problem, SystemCallFailed) and problem.errno in NO_SPACE:
                reason = f"Volume {volume.name} cannot be made: {problem}"
                raise ApiError(documents.NO_SNAPSHOT_SPACE, reason) from problem
            raise

    def _checked(self, source: CloneSource) -> Path:
        """Return the source's file. Raises ApiError where it cannot be copied; the extents of a snapshot do not count,
        as it has no writers, which a reflink would delay.
        """
        if source.kind == "volume":
            self.snapshots.measure(source)
            return self.pool.file(source.uuid)
        snapshot = _present(self.store, source)
        if isinstance(snapshot, Snapshot) and (lost := self.snapshots.why_lost(snapshot)):
            raise _not_usable(source, lost)
        return self.pool.snapshot_file(source.uuid)

    def _record(self, change: Change, item: NewClone, file: Path) -> Volume:
        source = _present(change, item.source)
        volume = self.volumes.planned(change, item)
        _check(volume, source)
        made = replace(
            volume,
            action="initializing",
            status="unavailable",
            made=True,
            encryption=source.encryption and Encryption(source.encryption.header_mib, initialized=True),
            source=Source(item.source.kind, item.source.id, item.source.uuid),
            shared_blocks=self.pool.occupied_bytes(file) // BLOCK_SIZE,
        )
        self.volumes.allocator.record(change, made)
        return made

    def _copied(self, volume: Volume, source: CloneSource, file: Path) -> Volume:
        with self.snapshots.locks.hold(lock_of(source.id) if source.kind == "snapshot" else source.uuid):
            if reason := source.kind == "volume" and self.volumes.why_other_file(source.uuid):
                raise _not_usable(source, reason)
            _check(volume, _present(self.store, source))  # a volume may have grown
            occupied_bytes = self.pool.reflink(file, self.pool.file(volume.uuid), volume.bytes)
            made = self.store.write(lambda change: self._finish(change, volume, occupied_bytes // BLOCK_SIZE))
        _log.info("volume %s, uuid %s, is a copy of %s %s", volume.name, volume.uuid, source.kind, source.id)
        return made

    def _finish(self, change: Change, volume: Volume, shared_blocks: int) -> Volume:
        current = change.get(VOLUMES, volume.name) or volume  # its metadata may have been updated
        made = replace(current, action="none", status="online", shared_blocks=shared_blocks)
        self.volumes.allocator.record(change, made, current)
        return made

    def _removed(self, volume: Volume) -> bool:
        self.store.write(lambda change: _mark(change, volume))
        return self.volumes.remove(volume.name, volume.uuid)

    def recover(self) -> None:
        """Mark the volumes for deletion that a crash left without their content."""
        for volume in self.store.all(VOLUMES):
            if volume.source is not None and volume.action == "initializing":
                _log.warning("volume %s is deleted: its copy was interrupted and never returned", volume.name)
                self.store.write(lambda change, volume=volume: _mark(change, volume))  # type: ignore[misc]


def _present(view: Change | Store, source: CloneSource) -> Volume | Snapshot:
    """Return the source. Raises ApiError unless it can be copied."""
    if source.kind == "volume":
        return usable(view.get(VOLUMES, source.id), source)
    snapshot = view.get(SNAPSHOTS, source.id)
    if snapshot is None or snapshot.uuid != source.uuid:
        raise ApiError(documents.SNAPSHOT_NOT_FOUND, f"Snapshot {source.id} not found")
    if not snapshot.is_ready:
        reason = f"its action is {snapshot.action}; retry"
        raise ApiError(documents.SOURCE_BUSY, f"Snapshot {source.id} cannot be copied now: {reason}")
    return snapshot


def _not_usable(source: CloneSource, reason: str) -> ApiError:
    return ApiError(documents.SOURCE_NOT_USABLE, f"{source.kind.capitalize()} {source.id} cannot be copied: {reason}")


def _check(volume: Volume, source: Volume | Snapshot) -> None:
    if volume.blocks < source.blocks:
        raise ApiError(
            documents.SMALLER_THAN_SOURCE,
            f"Volume {volume.name}: expected at least the {source.bytes} bytes of its source {source.name}, got "
            f"{volume.bytes}; request a larger capacity",
        )
    headers = [each.encryption.header_mib if each.encryption is not None else 0 for each in (volume, source)]
    if headers[0] != headers[1]:
        own, theirs = (f"a header of {size} MiB" if size else "no encryption" for size in headers)
        raise ApiError(
            documents.SOURCE_DIFFERS,
            f"Volume {volume.name}: expected {theirs}, as its source {source.name} has, got {own}; "
            "request the encryption of the source",
        )


def _mark(change: Change, volume: Volume) -> None:
    current = change.get(VOLUMES, volume.name)
    if current is not None and current.uuid == volume.uuid:
        change.put(VOLUMES, volume.name, replace(current, action="markedForDeletion"))
