# SPDX-License-Identifier: Apache-2.0
"""Volumes made from a snapshot or another volume: their file is a reflink of its file.

The row is committed first, as `initializing` and `made`: nothing ever creates an empty file for it, also not an
earlier version after a rollback. Until the file is complete the volume is neither attached, extended, deleted nor
copied. If the copy fails or a crash interrupts it, nothing was promised: the volume is deleted, and a retry makes
another one.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

from csi_driver.embedded.documents import (
    NO_SNAPSHOT_SPACE,
    NOT_SUPPORTED,
    SMALLER_THAN_SOURCE,
    SNAPSHOT_NOT_FOUND,
    SOURCE_BUSY,
    SOURCE_DIFFERS,
    SOURCE_NOT_USABLE,
    TOO_MANY_EXTENTS,
    VOLUME_NOT_FOUND,
    ApiError,
)
from csi_driver.embedded.layouts import BLOCK_SIZE
from csi_driver.embedded.model import SNAPSHOTS, VOLUMES, Encryption, Snapshot, Source, Volume
from csi_driver.embedded.pool import NO_SPACE, Pool, VolumeLocks
from csi_driver.embedded.requests import NewClone
from csi_driver.embedded.store import Change, Store
from csi_driver.embedded.volumes import Volumes
from csi_driver.errors import HostFailure, SystemCallFailed

_log = logging.getLogger(__name__)


@dataclass(eq=False)
class Clones:
    store: Store
    pool: Pool
    locks: VolumeLocks
    volumes: Volumes
    extent_limit: int

    def create(self, item: NewClone) -> Volume:
        """Make a volume with the content that its source has now. Raises ApiError."""
        if self.pool.why_no_reflinks:
            raise ApiError(NOT_SUPPORTED, f"volumes cannot be copied: {self.pool.why_no_reflinks}")
        self.volumes.refuse_unsupported(item)
        source = Source(item.source.kind, item.source.id, item.source.uuid)
        volume = self.store.write(lambda change: self._record(change, item, source))
        try:
            self._copy(volume, source)
        except (ApiError, HostFailure) as problem:
            self._discard(volume)
            if isinstance(problem, SystemCallFailed) and problem.errno in NO_SPACE:
                raise ApiError(NO_SNAPSHOT_SPACE, f"volume {volume.name} is not made: {problem}") from problem
            raise
        current = self.store.get(VOLUMES, volume.name)
        return current if current is not None and current.uuid == volume.uuid else volume

    def _record(self, change: Change, item: NewClone, source: Source) -> Volume:
        found = _present(change, source)
        volume = self.volumes.planned(change, item)
        _check(volume, found)
        inherited = found.encryption and Encryption(found.encryption.header_mib, initialized=True)
        made = replace(
            volume,
            action="initializing",
            status="unavailable",
            made=True,
            encryption=inherited,
            source=source,
            shared_blocks=volume.blocks,  # until it is known
        )
        self.volumes.allocator.record(change, made)
        return made

    def _copy(self, volume: Volume, source: Source) -> None:
        with self._held(source) as (found, file):
            _check(volume, found)  # a volume may have grown
            extents = self.pool.count_extents(file)
            if extents > self.extent_limit:
                raise ApiError(
                    TOO_MANY_EXTENTS,
                    f"{source.kind} {source.name} has {extents} extents, expected at most {self.extent_limit} "
                    "(--snapshot-extent-limit): copying them would stop its writers for seconds; defragment its file "
                    "while it is detached",
                )
            occupied_bytes = self.pool.reflink(file, self.pool.file(volume.uuid), volume.bytes)
            self.store.write(lambda change: self._finish(change, volume, occupied_bytes // BLOCK_SIZE))
        _log.info("volume %s, uuid %s, is a copy of %s %s", volume.name, volume.uuid, source.kind, source.name)

    @contextlib.contextmanager
    def _held(self, source: Source) -> Iterator[tuple[Volume | Snapshot, Path]]:
        """Keep the source as it is. Return it and its file. Raises ApiError where it cannot be copied (any more)."""
        if source.kind == "snapshot":
            with self.locks.hold(f"snapshot/{source.name}"):
                yield _present(self.store, source), self.pool.snapshot_file(source.uuid)
            return
        file = self.pool.file(source.uuid)
        with contextlib.suppress(HostFailure):  # the reflink fails as well, if the source still exists
            self.volumes.secure_file(source.name, source.uuid)
            self.pool.sync(file)
        with self.locks.hold(source.uuid):
            volume = _present(self.store, source)
            if isinstance(volume, Volume) and (lost := self.volumes.why_lost(volume)):
                raise ApiError(SOURCE_NOT_USABLE, f"volume {source.name} cannot be copied: {lost}")
            yield volume, file

    def _finish(self, change: Change, volume: Volume, shared_blocks: int) -> None:
        current = change.get(VOLUMES, volume.name)
        if current is not None and current.uuid == volume.uuid and current.action == "initializing":
            made = replace(current, action="none", status="online", shared_blocks=shared_blocks)
            self.volumes.allocator.record(change, made, current)

    def _discard(self, volume: Volume) -> None:
        self.store.write(lambda change: _mark(change, volume))
        self.volumes.remove_soon(volume.name, volume.uuid)

    def recover(self) -> None:
        """Mark the volumes for deletion that a crash left without their content."""
        for volume in self.store.all(VOLUMES):
            if volume.source is not None and volume.action == "initializing":
                _log.warning("volume %s is deleted: its copy was interrupted and never returned", volume.name)
                self.store.write(lambda change, volume=volume: _mark(change, volume))  # type: ignore[misc]


def _present(view: Change | Store, source: Source) -> Volume | Snapshot:
    """Return the source. Raises ApiError unless it can be copied."""
    if source.kind == "snapshot":
        snapshot = view.get(SNAPSHOTS, source.name)
        if snapshot is None or snapshot.uuid != source.uuid:
            raise ApiError(SNAPSHOT_NOT_FOUND, f"snapshot {source.name} not found")
        if not snapshot.is_ready:
            raise ApiError(SOURCE_BUSY, f"the action of snapshot {source.name} is {snapshot.action}; retry")
        return snapshot
    volume = view.get(VOLUMES, source.name)
    if volume is None or volume.uuid != source.uuid:
        raise ApiError(VOLUME_NOT_FOUND, f"volume {source.name} not found")
    if volume.action != "none":
        raise ApiError(SOURCE_BUSY, f"the action of volume {source.name} is {volume.action}; retry")
    return volume


def _check(volume: Volume, source: Volume | Snapshot) -> None:
    if volume.blocks < source.blocks:
        raise ApiError(
            SMALLER_THAN_SOURCE,
            f"volume {volume.name}: expected at least the {source.bytes} bytes of its source {source.name}, got "
            f"{volume.bytes}; request a larger capacity",
        )
    headers = [each.encryption.header_mib if each.encryption is not None else 0 for each in (volume, source)]
    if headers[0] != headers[1]:
        own, theirs = (f"a header of {size} MiB" if size else "no encryption" for size in headers)
        raise ApiError(
            SOURCE_DIFFERS,
            f"volume {volume.name}: expected {theirs}, as its source {source.name} has, got {own}; "
            "request the encryption of the source",
        )


def _mark(change: Change, volume: Volume) -> None:
    current = change.get(VOLUMES, volume.name)
    if current is not None and current.uuid == volume.uuid:
        change.put(VOLUMES, volume.name, replace(current, action="markedForDeletion"))
