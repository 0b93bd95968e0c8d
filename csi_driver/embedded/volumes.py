"""Volumes: save, extend, update, delete. Each returns the API's envelope of one object.

Order of every change, so that a crash at any point loses nothing that was acknowledged: the row is committed before
the file is made or grown, and removed after the file is. What a crash left half done, `Volumes.recover` finishes.
"""

from __future__ import annotations

import errno
import logging
import uuid
from collections.abc import Callable, Mapping
from dataclasses import replace
from datetime import UTC, datetime
from typing import cast

from csi_driver.background import Worker
from csi_driver.embedded.admission import absent_classes, admitted, not_allocated, not_saved, refuse_unsupported
from csi_driver.embedded.encryption import REQUIRED
from csi_driver.embedded.layouts import BLOCK_SIZE, GIGABYTE, PARAMETERS, gigabytes
from csi_driver.embedded.pool import Pool
from csi_driver.embedded.records import ATTACHMENTS, CLIENTS, GROUPS, REPORTS, SHARED_READ_ONLY, VOLUMES, Group, Volume
from csi_driver.embedded.refusals import Document, Refusal, detail, envelope, refused_item, volume_not_found
from csi_driver.embedded.settings import StorageSettings
from csi_driver.embedded.space import NoSpace, Space
from csi_driver.embedded.store import Change, Store
from csi_driver.embedded.work import Holds, Locks
from csi_driver.errors import DriverError, HostFailure, SystemCallFailed

_log = logging.getLogger(__name__)

_LAYOUT_FIELDS = frozenset(
    (
        "RAIDLevel",
        "stripeSize",
        "stripeWidth",
        "numberOfMirrors",
        "protectionLevel",
        "ignoreNodeSeparation",
        "enableCrcCheck",
        "dataBlocks",
        "parityBlocks",
    )
)
_OWN_FIELDS = {"name", "capacity", "VPG", "isEncrypted", "encryption", "sourceID", "sourceUUID", "mdvSpec"}
_NO_SPACE = frozenset((errno.ENOSPC, errno.EDQUOT, errno.EFBIG))
_NOT_KEPT = _LAYOUT_FIELDS | _OWN_FIELDS
_LOCKED_BY_GROUP = ("diskClasses", "serverClasses", "limitByDisks", "limitByNodes", "enableCrcCheck", "VSGs")


def now() -> str:
    """Return the time as the API writes it."""
    return datetime.now(UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")


class Volumes:
    """The use-cases on volumes."""

    def __init__(
        self,
        settings: StorageSettings,
        store: Store,
        space: Space,
        pool: Pool,
        locks: Locks,
        worker: Worker,
        holds: Holds,
    ) -> None:
        self._settings = settings
        self._store = store
        self._space = space
        self._pool = pool
        self._locks = locks
        self._worker = worker
        self._holds = holds
        self._fault = settings.test_switches.fault
        self.has_device: Callable[[str], bool] = lambda identity: False
        """Tells whether a device is bound to the volume's file; set by whoever binds devices."""
        self.can_encrypt = False
        """Whether headers can be made; set by whoever makes them."""

    # --- save -------------------------------------------------------------------------------------------

    def save(self, item: Mapping[str, object], user: str) -> Document:
        """Make a volume: space promised, row committed, file made."""
        name = str(item["name"])
        try:
            refuse_unsupported(item, lambda source: self._store.get(VOLUMES, source))
            volume = self._store.write(lambda change: self._promise(change, item, user))
            self._fault("save:row")
            self._make(volume)
        except Refusal as refusal:
            return refused_item(name, None, refusal)
        self._fault("save:file")
        return envelope(name, volume.uuid, True)

    def _promise(self, change: Change, item: Mapping[str, object], user: str) -> Volume:
        name = str(item["name"])
        wanted = admitted(change, item, self._settings, can_encrypt=self.can_encrypt)
        group, layout, encryption = wanted.group, wanted.layout, wanted.encryption
        capacity = cast("float | str", item["capacity"])
        try:
            taken = self._space.take(change, layout, capacity, group)
        except NoSpace as problem:
            raise not_allocated(name, problem) from problem
        moment = now()
        slow = self._settings.preallocate or "initialize" in self._holds
        volume = Volume(
            name=name,
            uuid=str(uuid.uuid4()),
            capacity=capacity if not isinstance(capacity, str) else gigabytes(taken.blocks),
            extents=(taken.blocks,),
            layout=layout,
            group=group.name if group else None,
            given={key: value for key, value in item.items() if key not in _NOT_KEPT},
            created_by=user,
            modified_by=user,
            created=moment,
            modified=moment,
            action="initializing" if slow else "none" if encryption is None else REQUIRED,
            status="unavailable" if slow else "online",
            from_reserved=taken.from_reserved,
            encryption=encryption,
        )
        self._space.record(change, volume)
        if group and taken.from_reserved:
            change.put(GROUPS, group.name, replace(group, used=group.used + taken.from_reserved))
        return volume

    def _make(self, volume: Volume) -> None:
        try:
            with self._locks.hold(volume.uuid):
                current = self._store.get(VOLUMES, volume.name)
                if current is not None and current.uuid == volume.uuid:  # else deleted meanwhile: nobody owns a file
                    self._pool.make(volume.uuid, volume.bytes)
        except SystemCallFailed as problem:
            # As at a deletion, the row goes last: where the file cannot be removed, the volume stays and can be had.
            self._pool.remove(volume.uuid)
            self._store.write(lambda change: self._forget(change, volume.name, volume.uuid))
            refusal = not_allocated if problem.errno in _NO_SPACE else not_saved
            raise refusal(volume.name, str(problem)) from problem
        self.initialize(volume.name)

    def initialize(self, name: str) -> bool:
        """Let a volume whose file is there come online, unless a test holds that back."""
        volume = self._store.get(VOLUMES, name)
        if volume is None or volume.action != "initializing":
            return True
        if "initialize" in self._holds:
            return False

        def online(change: Change) -> None:
            current = change.get(VOLUMES, name)
            if current is not None and current.action == "initializing":
                action = "none" if current.ready else REQUIRED
                change.put(VOLUMES, name, replace(current, action=action, status="online"))

        self._store.write(online)
        return True

    # --- the file -----------------------------------------------------------------------------------------

    def judge_file(self, name: str) -> str:
        """Say why a volume's file cannot be used, empty = it can, and let the volume's status say the same.

        A volume whose file lacks what may be data is offline, or degraded while a device still holds the file; it is
        online again when the file is back.
        """
        volume = self._store.get(VOLUMES, name)
        if volume is None or volume.action in ("initializing", "markedForDeletion"):
            return ""
        reason = self.why_lost(volume)
        status = "online" if not reason else "degraded" if self.has_device(volume.uuid) else "offline"
        if status == volume.status:
            return reason

        def judge(change: Change) -> None:
            current = change.get(VOLUMES, name)
            if current is not None and current.uuid == volume.uuid:
                change.put(VOLUMES, name, replace(current, status=status, health="critical" if reason else "healthy"))

        self._store.write(judge)
        if reason:
            _log.error("volume %s is %s: %s", name, status, reason)
        else:
            _log.info("the file of volume %s is whole again; the volume is online", name)
        return reason

    def judge_files(self) -> None:
        """Judge the files of all volumes."""
        for volume in self._store.all(VOLUMES):
            self.judge_file(volume.name)

    def why_lost(self, volume: Volume) -> str:
        """Say why a volume's file cannot be used; empty = it can, or can be made."""
        if not volume.made:
            return ""
        try:
            if self._pool.has(volume.uuid, volume.least_bytes):
                return ""
        except HostFailure as problem:
            return str(problem)
        file, size_bytes = self._pool.file(volume.uuid), volume.least_bytes
        source = "its attached device" if self.has_device(volume.uuid) else "a backup"
        return (
            f"its file {file} is gone or cut short, expected at least {size_bytes} bytes of data; "
            f"restore it from {source}"
        )

    # --- extend -----------------------------------------------------------------------------------------

    def extend(self, item: Mapping[str, object], user: str) -> Document:
        """Make a volume larger: space promised, row committed, file grown. The caller grows the devices."""
        name, identity = str(item["_id"]), str(item["uuid"])
        capacity = cast("float | str", item["capacity"])
        try:
            with self._locks.hold(identity):
                before = self._store.get(VOLUMES, name)
                lost = self.judge_file(name)
                volume = self._store.write(lambda change: self._extend(change, name, identity, capacity, user, lost))
                self._fault("extend:row")
                try:
                    # Synced: only the latest extension may be on record and not in the file (see recovery).
                    self._pool.make(identity, volume.bytes, synced=True)
                except SystemCallFailed as problem:
                    self._store.write(lambda change: self._shrink_back(change, before))
                    number = 1675 if problem.errno in _NO_SPACE else 500
                    raise _extension_refused(name, identity, number, f"extension create failed: {problem}") from problem
                self._fault("extend:file")
            self.finish_extension(name)
        except Refusal as refusal:
            return refused_item(name, identity, refusal)
        return envelope(name, identity, True)

    def _extend(self, change: Change, name: str, identity: str, capacity: float | str, user: str, lost: str) -> Volume:
        volume = _found(change, name, identity)
        refuse_action(volume, {"initializing": (1572, "extended"), "markedForDeletion": (1581, "deleted")})
        if lost:
            raise _extension_refused(name, identity, 1674, lost)
        group = change.get(GROUPS, volume.group) if volume.group else None
        wanted: float | str = "MAX"
        if not isinstance(capacity, str):
            if capacity <= volume.capacity:
                raise _extension_refused(
                    name,
                    identity,
                    1673,
                    "its capacity",
                    f"capacity is {capacity:g} GB, expected more than the {volume.capacity:g} GB that it has",
                )
            wanted = capacity - volume.capacity
            if volume.layout.blocks_of(wanted) <= 0:
                # The management itself never ends here (or adds an unaligned tail); we say what is missing.
                step = volume.layout.granule_blocks * BLOCK_SIZE
                raise _extension_refused(
                    name, identity, 1673, "its capacity", f"capacity is {capacity:g} GB, expected {step} bytes more"
                )
        try:
            taken = self._space.take(change, volume.layout, wanted, group)
        except NoSpace as problem:
            raise _extension_refused(name, identity, 1675, f"extension create failed: {problem}") from problem
        extended = replace(
            volume,
            action="extending" if volume.action == "none" else volume.action,
            capacity=volume.capacity + gigabytes(taken.blocks) if isinstance(capacity, str) else capacity,
            extents=(*volume.extents, taken.blocks),
            from_reserved=volume.from_reserved + taken.from_reserved,
            version=volume.version + 1,
            modified=now(),
            modified_by=user,
        )
        self._space.record(change, extended, volume)
        if group and taken.from_reserved:
            change.put(GROUPS, group.name, replace(group, used=group.used + taken.from_reserved))
        return extended

    def finish_extension(self, name: str) -> bool:
        """Let an extension whose file has grown be over, unless a test holds that back: the targets have reported."""
        if "extend" in self._holds:
            return False

        def finished(change: Change) -> None:
            volume = change.get(VOLUMES, name)
            if volume is not None and volume.action == "extending":
                change.put(VOLUMES, name, replace(volume, action="none"))

        self._store.write(finished)
        return True

    def _shrink_back(self, change: Change, before: Volume | None) -> None:
        """Take back an extension whose space could not be had; the caller holds the volume's lock."""
        volume = change.get(VOLUMES, before.name) if before is not None else None
        if before is None or volume is None or volume.uuid != before.uuid:
            return
        returned = volume.from_reserved - before.from_reserved
        smaller = replace(
            volume,
            extents=before.extents,
            capacity=before.capacity,
            from_reserved=before.from_reserved,
            action=before.action if volume.action == "extending" else volume.action,
        )
        self._space.record(change, smaller, volume)
        group = change.get(GROUPS, volume.group) if volume.group else None
        if group and returned:
            change.put(GROUPS, group.name, replace(group, used=group.used - returned))

    # --- update -----------------------------------------------------------------------------------------

    def update(self, item: Mapping[str, object], user: str) -> Document:
        """Replace the fields that the request names."""
        name, identity = str(item["_id"]), str(item["uuid"])
        try:
            self._store.write(lambda change: self._update(change, name, identity, item, user))
        except Refusal as refusal:
            return refused_item(name, identity, refusal)
        return envelope(name, identity, True)

    def _update(self, change: Change, name: str, identity: str, item: Mapping[str, object], user: str) -> None:
        volume = _found(change, name, identity)
        refuse_action(volume, {"markedForDeletion": (1582, "edited")})
        keys = {"volumeID": name, "volumeUUID": identity}
        if item.get("isReadOnly") and volume.reservation.mode > SHARED_READ_ONLY:
            holders = ", ".join(volume.reservation.attached)
            raise Refusal(1605, f"isReadOnly cannot be set: the volume is reserved for writing by {holders}", keys)
        if volume.group and any(item.get(field) for field in _LOCKED_BY_GROUP):
            fields = ", ".join(field for field in _LOCKED_BY_GROUP if item.get(field))
            raise Refusal(168412, f"the volume's VPG {volume.group} sets {fields}; leave them out", keys)
        for _, number, message in absent_classes(item):
            raise Refusal(1722, "Failed to update volume", keys, detail(number, message))
        changes = {key: value for key, value in item.items() if key not in ("_id", "uuid", "enableCrcCheck")}
        layout = volume.layout
        if "enableCrcCheck" in item and "enableCrcCheck" in PARAMETERS[layout.level]:
            layout = replace(layout, crc=item["enableCrcCheck"] is True)
        change.put(
            VOLUMES,
            name,
            replace(
                volume,
                given={**volume.given, **changes},
                layout=layout,
                version=volume.version + 1,
                modified=now(),
                modified_by=user,
            ),
        )

    # --- delete -----------------------------------------------------------------------------------------

    def delete(self, item: Mapping[str, object]) -> Document:
        """Mark a volume for deletion and remove it as soon as no device uses its file."""
        name, identity = str(item["_id"]), str(item["uuid"])
        try:
            self._store.write(lambda change: self._mark(change, name, identity))
        except Refusal as refusal:
            return refused_item(name, identity, refusal)
        self._fault("delete:marked")
        self.removal_due(name, identity)
        return envelope(name, identity, True)

    def _mark(self, change: Change, name: str, identity: str) -> None:
        volume = _found(change, name, identity)
        refuse_action(volume, {"initializing": (1571, "deleted")})
        if volume.action == "markedForDeletion":
            return
        users = [
            client
            for client in volume.reservation.attached
            if (wish := change.get(ATTACHMENTS, identity, client)) is not None and wish.action == "attaching"
        ]
        if users:
            raise Refusal(
                1683,
                "Volume to delete in use",
                {"volumeID": name, "volumeUUID": identity},
                f"The volume is used by: {', '.join(users[:3])}. Please detach",
            )
        change.put(VOLUMES, name, replace(volume, action="markedForDeletion", version=volume.version + 1))

    def removal_due(self, name: str, identity: str) -> None:
        """Remove a marked volume now if that can be, else when it can."""
        try:
            removed = self.remove(name, identity)
        except DriverError as problem:
            _log.warning("volume %s could not be removed: %s; tried again", name, problem)
            removed = False
        if not removed:
            self._worker.later(f"remove {identity}", lambda: self.remove(name, identity))

    def remove(self, name: str, identity: str) -> bool:
        """Remove a marked volume's file, then its row; False while a client still has its device."""
        if "delete" in self._holds:
            return False
        with self._locks.hold(identity):
            volume = self._store.get(VOLUMES, name)
            if volume is None or volume.uuid != identity or volume.action != "markedForDeletion":
                return True
            if volume.reservation.attached or self.has_device(identity):
                return False
            self._pool.remove(identity)
            self._fault("delete:file")
            self._store.write(lambda change: self._forget(change, name, identity))
        self._fault("delete:row")
        return True

    def _forget(self, change: Change, name: str, identity: str) -> None:
        volume = change.get(VOLUMES, name)
        if volume is None or volume.uuid != identity:
            return
        self._space.record(change, None, volume)
        group = change.get(GROUPS, volume.group) if volume.group else None
        if group and volume.from_reserved:
            change.put(GROUPS, group.name, replace(group, used=group.used - volume.from_reserved))
        for client in self._store.all(CLIENTS):
            if change.get(REPORTS, volume.uuid, client.name) is not None:
                change.delete(REPORTS, volume.uuid, client.name)


def _found(change: Change, name: str, identity: str) -> Volume:
    volume = change.get(VOLUMES, name)
    if volume is None or volume.uuid != identity:
        raise volume_not_found(name, identity)
    return volume


def refuse_action(volume: Volume, refused: Mapping[str, tuple[int, str]]) -> None:
    """Raise the refusal that belongs to what is being done with the volume, if one does."""
    if volume.action in refused:
        number, verb = refused[volume.action]
        raise Refusal(
            number,
            f"Volume {volume.name} cannot be {verb}: its action is {volume.action}",
            {"volumeAction": volume.action, "volumeID": volume.name, "volumeUUID": volume.uuid},
        )


def _extension_refused(name: str, identity: str, number: int, reason: str, inner: str | None = None) -> Refusal:
    keys = {"volumeID": name, "volumeUUID": identity}
    return Refusal(number, f"Failed to extend volume: {reason}", keys, inner)


def reserved_group(store: Store, name: str) -> Group | None:
    """Return the VPG whose reserved space hides behind a volume of this name, if there is one."""
    group = store.get(GROUPS, name)
    return group if group is not None and group.blocks else None


__all__ = ["GIGABYTE", "Volumes", "now", "refuse_action", "reserved_group"]
