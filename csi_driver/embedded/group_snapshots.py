# SPDX-License-Identifier: Apache-2.0
"""Snapshots of several volumes at one moment: cut, delete and recover groups. Methods raise ApiError.

Writes to all members are held while their blocks are shared, so no snapshot has a write that depends on an acknowledged
one that another snapshot lacks. The rows of the group and of all members say `cutting` in one change, and `none` in one
change, so a crash leaves a whole group or none.

Locks: the group's name, the names of the members, the uuids of their volumes, each kind in its order.
"""

from __future__ import annotations

import uuid
from collections.abc import Callable, Collection, Iterable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, replace

from csi_driver.background import Worker
from csi_driver.embedded import documents
from csi_driver.embedded.documents import ApiError
from csi_driver.embedded.model import (
    CUTTING,
    MARKED_FOR_DELETION,
    NO_ACTION,
    SNAPSHOT_GROUPS,
    SNAPSHOTS,
    Snapshot,
    SnapshotGroup,
)
from csi_driver.embedded.pool import Pool, VolumeLocks
from csi_driver.embedded.requests import NewSnapshot, NewSnapshotGroup
from csi_driver.embedded.settings import Freezes
from csi_driver.embedded.snapshots import Snapshots, lock_of, now, refusal_of
from csi_driver.embedded.store import Change, Store
from csi_driver.errors import DriverError


def _group_lock(name: str) -> str:
    return f"group/{name}"


@dataclass(eq=False)
class GroupSnapshots:
    freeze_limit_s: float
    freezes: Freezes | None
    store: Store
    pool: Pool
    locks: VolumeLocks
    snapshots: Snapshots
    worker: Worker
    exports_of: Callable[[str], Collection[str]] = lambda identity: ()
    """Gives the NQNs by which hosts write to the file of a volume, while its lock is held."""

    @property
    def why_none(self) -> str:
        """Why no groups can be cut; "" when they can."""
        return self.snapshots.why_none or ("" if self.freezes else "the storage manager runs without freezes")

    def save(self, item: NewSnapshotGroup) -> SnapshotGroup:
        """Cut volumes at one moment; return the group that an earlier request of this name and members made."""
        if self.freezes is None or self.why_none:
            raise ApiError(documents.NOT_SUPPORTED, f"the storage manager offers no group snapshots: {self.why_none}")
        members = sorted(item.members, key=lambda each: each.name)
        with ExitStack() as held:
            self._hold(held, [_group_lock(item.name), *(lock_of(each.name) for each in members)])
            known = self._known(item, members)
            if known is not None:
                return known
            extents = {each.name: self.snapshots.measure(each.volume) for each in members}
            self._hold(held, sorted(each.volume.uuid for each in members))
            for each in members:
                self.snapshots.verify_file(each.volume)
            group, begun = self.store.write(lambda change: self._begin(change, item, members))
            try:
                cut = self._cut(self.freezes, begun, extents)
                return self.store.write(lambda change: self._finish(change, group, cut))
            except DriverError as problem:
                self._remove_soon(group)
                raise refusal_of(item.name, problem) from problem
            finally:
                self._thaw_soon()

    def _hold(self, held: ExitStack, names: Iterable[str]) -> None:
        for name in names:
            held.enter_context(self.locks.hold(name))

    def _known(self, item: NewSnapshotGroup, members: list[NewSnapshot]) -> SnapshotGroup | None:
        """Return the ready group of this name; the rest of a failed cut is removed."""
        group = self.store.get(SNAPSHOT_GROUPS, item.name)
        if group is not None and group.action == MARKED_FOR_DELETION:
            raise ApiError(documents.SOURCE_BUSY, f"Snapshot group {item.name} is being deleted; retry")
        if group is not None and group.action == CUTTING:
            self._remove(group)
            group = None
        for each in members:
            known = self.snapshots.known(each.name, each.volume, item.name)
            if known is not None and (group is None or known.group_uuid != group.uuid):
                reason = f"snapshot {each.name} is a member of another group of this name; use other names"
                raise ApiError(documents.SNAPSHOT_EXISTS, f"Snapshot group {item.name} cannot be cut: {reason}")
        if group is not None and set(group.members) != {each.name for each in members}:
            reason = f"with the snapshots {', '.join(group.members)}; use another name, or delete it"
            raise ApiError(documents.SNAPSHOT_EXISTS, f"Snapshot group {item.name} already exists: {reason}")
        return group

    def _begin(
        self, change: Change, item: NewSnapshotGroup, members: list[NewSnapshot]
    ) -> tuple[SnapshotGroup, list[Snapshot]]:
        group = SnapshotGroup(
            name=item.name,
            uuid=str(uuid.uuid4()),
            members=tuple(each.name for each in members),
            given=item.given("name", "members"),
            created=now(),
        )
        change.put(SNAPSHOT_GROUPS, group.name, group)
        own = group.name, group.uuid
        begin = self.snapshots.begin
        return group, [
            begin(change, each.name, each.volume, each.given("name", "volume"), group=own) for each in members
        ]

    def _cut(self, freezes: Freezes, begun: list[Snapshot], extents: Mapping[str, int]) -> list[Snapshot]:
        files = [self.pool.file(each.volume_uuid) for each in begun]
        exports = [nqn for each in begun for nqn in self.exports_of(each.volume_uuid)]
        with freezes.held(files, exports, limit_s=self.freeze_limit_s) as end:
            created = now()
            for each in begun:
                self.snapshots.share(each)
            end()
        return [self.snapshots.complete(each, extents[each.name], created) for each in begun]

    def _finish(self, change: Change, group: SnapshotGroup, cut: list[Snapshot]) -> SnapshotGroup:
        for each in cut:
            self.snapshots.finish(change, each)
        ready = replace(group, action=NO_ACTION, created=cut[0].created)
        change.put(SNAPSHOT_GROUPS, group.name, ready)
        return ready

    def members(self, group: SnapshotGroup) -> list[Snapshot]:
        found = (self.store.get(SNAPSHOTS, name) for name in group.members)
        return [each for each in found if each is not None and each.group_uuid == group.uuid]

    def delete(self, name: str, identity: str) -> None:
        """Delete a group with its snapshots; volumes that were made from them stay."""
        with self.locks.hold(_group_lock(name)), ExitStack() as held:
            group = self.store.get(SNAPSHOT_GROUPS, name)
            if group is None or group.uuid != identity:
                raise ApiError(documents.SNAPSHOT_GROUP_NOT_FOUND, f"Snapshot group {name} not found")
            self._hold(held, map(lock_of, group.members))
            self._remove_soon(self.store.write(lambda change: self._mark(change, group)))

    def _mark(self, change: Change, group: SnapshotGroup) -> SnapshotGroup:
        for each in self.members(group):
            self.snapshots.mark(change, each.name, each.uuid, group.name)
        marked = replace(group, action=MARKED_FOR_DELETION)
        change.put(SNAPSHOT_GROUPS, group.name, marked)
        return marked

    def _remove_soon(self, group: SnapshotGroup) -> None:
        """Remove a group that is marked or was not cut, now or by a retry; the caller holds its locks."""

        def again() -> bool:
            with self.locks.hold(_group_lock(group.name)), ExitStack() as held:
                self._hold(held, map(lock_of, group.members))
                current = self.store.get(SNAPSHOT_GROUPS, group.name)
                is_left = current is not None and current.uuid == group.uuid and not current.is_ready
                return not is_left or self._remove(group)

        self.worker.soon(f"remove {_group_lock(group.name)}", lambda: self._remove(group), again)

    def _remove(self, group: SnapshotGroup) -> bool:
        """Remove the files, then all rows in one change.

        A commit that failed may be on disk nevertheless, and say that the group is ready: the mark comes first.
        """
        members = self.members(group)
        if group.action != MARKED_FOR_DELETION:
            self.store.write(lambda change: self._mark(change, group))
        for each in members:
            self.pool.remove_snapshot(each.uuid)

        def forget(change: Change) -> None:
            for each in members:
                self.snapshots.forget(change, each)
            current = change.get(SNAPSHOT_GROUPS, group.name)
            if current is not None and current.uuid == group.uuid:
                change.delete(SNAPSHOT_GROUPS, group.name)

        self.store.write(forget)
        return True

    def _thaw_soon(self) -> None:
        if self.freezes is not None:
            self.worker.soon("thaw filesystems", self.freezes.recover)

    def recover(self) -> None:
        """Thaw the filesystems of the last run; remove groups that were not cut, or were being deleted."""
        self._thaw_soon()
        for group in self.store.all(SNAPSHOT_GROUPS):
            if not group.is_ready:
                self._remove_soon(group)
