# SPDX-License-Identifier: Apache-2.0
"""Volumes and built-in VPGs: create, extend, update and delete volumes; each method raises ApiError.

The row is committed before the file is created or grown, and removed after the file, so that a crash at any point loses
no acknowledged change. The start completes interrupted operations.
"""

from __future__ import annotations

import logging
import uuid
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

from csi_driver.background import Worker
from csi_driver.embedded.allocator import Allocator, NoSpace
from csi_driver.embedded.documents import VOLUME_NOT_FOUND, ApiError, detail
from csi_driver.embedded.encryption import REQUIRED
from csi_driver.embedded.layouts import BLOCK_SIZE, BUILT_IN_GROUPS, LEVELS, PARAMETERS, Layout
from csi_driver.embedded.model import (
    ATTACHMENTS,
    CLIENTS,
    REPORTS,
    SHARED_READ_ONLY,
    VOLUMES,
    Encryption,
    Volume,
)
from csi_driver.embedded.pool import NO_SPACE, Pool, VolumeLocks
from csi_driver.embedded.requests import Extension, NewVolume, VolumeUpdate
from csi_driver.embedded.settings import StorageSettings
from csi_driver.embedded.store import Change, Store
from csi_driver.errors import HostFailure, PreconditionFailed, SystemCallFailed

_log = logging.getLogger(__name__)

_CLASSES = (
    ("disk_classes", "diskClasses", 1512, "Drive class not found"),
    ("server_classes", "serverClasses", 1513, "Target class not found"),
)
_SET_BY_GROUP = ("disk_classes", "server_classes", "limit_by_disks", "limit_by_nodes", "enable_crc_check", "vsgs")


@dataclass(eq=False)
class Volumes:
    settings: StorageSettings
    store: Store
    allocator: Allocator
    pool: Pool
    locks: VolumeLocks
    worker: Worker
    can_encrypt: bool
    has_device: Callable[[str], bool] = lambda identity: False
    """Return whether a device is bound to the volume's file; set by the attacher."""
    why_other_file: Callable[[str], str] = lambda identity: ""
    """Return why the volume's devices write to another file, "" = they do not; set by the attacher."""

    def create(self, item: NewVolume) -> Volume:
        self.refuse_unsupported(item)
        volume = self.store.write(lambda change: self._record(change, item))
        try:
            with self.locks.hold(volume.uuid):
                current = self.store.get(VOLUMES, volume.name)
                if current is not None and current.uuid == volume.uuid:  # else deleted meanwhile
                    self.pool.make(volume.uuid, volume.bytes)
        except SystemCallFailed as problem:
            # The row goes last, as in a deletion: if the file cannot be removed, the volume stays and is usable.
            self.pool.remove(volume.uuid)
            self.store.write(lambda change: self._forget(change, volume.name, volume.uuid))
            refusal = _not_allocated if problem.errno in NO_SPACE else _not_saved
            raise refusal(str(problem)) from problem
        self.worker.soon(f"finish the creation of {volume.uuid}", lambda: self.finish_creation(volume.name))
        current = self.store.get(VOLUMES, volume.name)
        return current if current is not None and current.uuid == volume.uuid else volume

    def _record(self, change: Change, item: NewVolume) -> Volume:
        volume = self.planned(change, item)
        self.allocator.record(change, volume)
        return volume

    def planned(self, change: Change, item: NewVolume) -> Volume:
        """Return the volume of a request, which is not recorded yet. Raises ApiError."""
        layout, encryption = self._checked(change, item)
        try:
            blocks = self.allocator.allocate(change, layout, item.capacity)
        except NoSpace as problem:
            raise _not_allocated(problem) from problem
        slow = self.settings.preallocate
        return Volume(
            name=item.name,
            uuid=str(uuid.uuid4()),
            capacity=item.capacity,
            extents=(blocks,),
            layout=layout,
            group=item.vpg or None,
            given=item.stored(),
            action="initializing" if slow else "none" if encryption is None else REQUIRED,
            status="unavailable" if slow else "online",
            encryption=encryption,
        )

    def refuse_unsupported(self, item: NewVolume) -> None:
        name = item.name
        if name.endswith("_MD"):
            reason = "Illegal volume name: names that end in _MD belong to the storage"
            raise _not_saved(detail(1552, reason, innerMessage={}))
        for number, message in _absent_classes(item):
            raise _not_saved(detail(number, message))
        if item.vsgs:
            raise _not_saved(detail(1721, f"VSG not found: {item.vsgs}; this pool has none, leave VSGs out"))

    def _checked(self, change: Change, item: NewVolume) -> tuple[Layout, Encryption | None]:
        name = item.name
        refuse_name(change, name)
        if item.vpg and item.vpg not in BUILT_IN_GROUPS:
            reason = f"VPG {item.vpg} not found; expected one of {', '.join(BUILT_IN_GROUPS)}"
            raise _not_saved(detail(1514, reason))
        if not item.vpg and item.raid_level not in LEVELS:
            reason = f"Unknown RAID level {item.raid_level}; expected one of {', '.join(LEVELS)}"
            raise _not_saved(detail(1606, reason))
        if item.is_encrypted and not self.can_encrypt:
            reason = "the storage manager encrypts no volumes: cryptsetup is not installed there; leave isEncrypted out"
            raise _not_saved(detail(16825, reason))
        if item.limit_by_disks:
            raise _not_allocated(f"limitByDisks is {item.limit_by_disks}, and this pool lets no drive be chosen")
        targets = {*self.settings.target_names(), self.settings.host_name}
        if item.limit_by_nodes and targets.isdisjoint(item.limit_by_nodes):
            reason = f"limitByNodes: expected one of {sorted(targets)}, got {item.limit_by_nodes}"
            raise _not_allocated(reason)
        encryption = Encryption(header_mib=item.encryption.header_size) if item.is_encrypted else None
        return BUILT_IN_GROUPS[item.vpg] if item.vpg else item.layout(), encryption

    def finish_creation(self, name: str) -> bool:
        """Set a volume online after its file was created."""
        volume = self.store.get(VOLUMES, name)
        if volume is None or volume.action != "initializing":
            return True

        def online(change: Change) -> None:
            current = change.get(VOLUMES, name)
            if current is not None and current.action == "initializing":
                action = "none" if current.ready else REQUIRED
                change.put(VOLUMES, name, replace(current, action=action, status="online"))

        self.store.write(online)
        return True

    def check_file(self, name: str) -> str:
        """Return why a volume's file cannot be used ("" = it can) and set the volume's status accordingly.

        A volume that lacks data in its file is offline, or degraded while a device still holds the file. It is online
        again when the file is back.
        """
        volume = self.store.get(VOLUMES, name)
        if volume is None or volume.action in ("initializing", "markedForDeletion"):
            return ""
        reason = self.why_lost(volume)
        status = "online" if not reason else "degraded" if self.has_device(volume.uuid) else "offline"
        if status == volume.status:
            return reason

        def update(change: Change) -> None:
            current = change.get(VOLUMES, name)
            if current is not None and current.uuid == volume.uuid:
                change.put(VOLUMES, name, replace(current, status=status, health="critical" if reason else "healthy"))

        self.store.write(update)
        if reason:
            _log.error("volume %s is %s: %s", name, status, reason)
        else:
            _log.info("the file of volume %s is whole again; the volume is online", name)
        return reason

    def secure_file(self, name: str, identity: str) -> bool:
        """Sync the file of a volume that no client had, so that its row may say `made`; False if it has none, or may.

        Raises SystemCallFailed.
        """
        volume = self.store.get(VOLUMES, name)
        if volume is None or volume.made:
            return False
        with self.locks.hold(identity):
            volume = self.store.get(VOLUMES, name)
            if volume is None or volume.uuid != identity or volume.made:
                return False
            self.pool.make(identity, volume.bytes, synced=True)
        return True

    def prepare_file(self, volume: Volume) -> None:
        """Sync the file, and record that it must never be created again, before a client writes to it.

        The caller holds the volume's lock. Raises PreconditionFailed for a file that is lost.
        """
        if volume.made:
            if reason := self.check_file(volume.name):
                raise PreconditionFailed(reason)
            if volume.bytes > volume.least_bytes:
                self.pool.make(volume.uuid, volume.bytes)
            return
        self.pool.make(volume.uuid, volume.bytes, synced=True)

        def made(change: Change) -> None:
            current = change.get(VOLUMES, volume.name)
            if current is not None and current.uuid == volume.uuid:
                change.put(VOLUMES, volume.name, replace(current, made=True))

        self.store.write(made)

    def check_files(self) -> None:
        for volume in self.store.all(VOLUMES):
            self.check_file(volume.name)

    def why_lost(self, volume: Volume) -> str:
        """Return why a volume's file cannot be used; "" when it can, or can be created."""
        if not volume.made:
            return ""
        try:
            if self.pool.has(volume.uuid, volume.least_bytes):
                return ""
        except HostFailure as problem:
            return str(problem)
        file, size_bytes = self.pool.file(volume.uuid), volume.least_bytes
        source = "its attached device" if self.has_device(volume.uuid) else "a backup"
        return (
            f"its file {file} is gone or cut short, expected at least {size_bytes} bytes of data; "
            f"restore it from {source}"
        )

    def extend(self, item: Extension) -> None:
        """Extend a volume and its file; the caller extends its devices."""
        with self.locks.hold(item.uuid):
            before = self.store.get(VOLUMES, item.id)
            lost = self.check_file(item.id)
            volume = self.store.write(lambda change: self._extended(change, item, lost))
            try:
                # Synced: only the latest extension may be in the row and not in the file (see recovery).
                self.pool.make(item.uuid, volume.bytes, synced=True)
            except SystemCallFailed as problem:
                self.store.write(lambda change: self._undo_extension(change, before))
                number = 1675 if problem.errno in NO_SPACE else 500
                raise _not_extended(number, f"extension create failed: {problem}") from problem
        # Its space is recorded, and its file has it: only its action is left to clear.
        self.worker.soon(f"finish the extension of {item.uuid}", lambda: self.finish_extension(item.id))

    def _extended(self, change: Change, item: Extension, lost: str) -> Volume:
        volume, capacity = _found(change, item.id, item.uuid), item.capacity
        _refuse_action(volume, {"initializing": (1572, "extended"), "markedForDeletion": (1581, "deleted")})
        if lost:
            raise _not_extended(1674, lost)
        wanted_gb = capacity - volume.capacity
        if wanted_gb <= 0 or volume.layout.blocks_of(wanted_gb) <= 0:
            # Below a granule the real server never ends, or adds an unaligned tail.
            step = volume.layout.granule_blocks * BLOCK_SIZE
            inner = f"expected at least {step} bytes more than {volume.capacity:g} GB, got {capacity:g} GB"
            raise _not_extended(1673, "its capacity", inner)
        try:
            blocks = self.allocator.allocate(change, volume.layout, wanted_gb)
        except NoSpace as problem:
            raise _not_extended(1675, f"extension create failed: {problem}") from problem
        extended = replace(
            volume,
            action="extending" if volume.action == "none" else volume.action,
            capacity=capacity,
            extents=(*volume.extents, blocks),
        )
        self.allocator.record(change, extended, volume)
        return extended

    def finish_extension(self, name: str) -> bool:
        """Clear the action of a volume after its file has grown."""
        extended = self.store.get(VOLUMES, name)
        if extended is None or extended.action != "extending":
            return True

        def finished(change: Change) -> None:
            volume = change.get(VOLUMES, name)
            if volume is not None and volume.action == "extending":
                change.put(VOLUMES, name, replace(volume, action="none"))

        self.store.write(finished)
        return True

    def _undo_extension(self, change: Change, before: Volume | None) -> None:
        """Free the space of an extension that the file could not get; the caller holds the volume's lock."""
        volume = change.get(VOLUMES, before.name) if before is not None else None
        if before is None or volume is None or volume.uuid != before.uuid:
            return
        action = before.action if volume.action == "extending" else volume.action
        smaller = replace(volume, extents=before.extents, capacity=before.capacity, action=action)
        self.allocator.record(change, smaller, volume)

    def update(self, item: VolumeUpdate) -> None:
        """Replace the fields that the request has."""
        self.store.write(lambda change: self._update(change, item))

    def _update(self, change: Change, item: VolumeUpdate) -> None:
        volume = _found(change, item.id, item.uuid)
        _refuse_action(volume, {"markedForDeletion": (1582, "edited")})
        if item.is_read_only and volume.reservation.mode > SHARED_READ_ONLY:
            holders = ", ".join(volume.reservation.attached)
            raise ApiError(1605, f"isReadOnly cannot be set: the volume is reserved for writing by {holders}")
        locked = [str(VolumeUpdate.model_fields[name].alias) for name in _SET_BY_GROUP if getattr(item, name)]
        if volume.group and locked:
            raise ApiError(168412, f"the volume's VPG {volume.group} sets {', '.join(locked)}; leave them out")
        for number, message in _absent_classes(item):
            raise ApiError(1722, "Failed to update volume", detail(number, message))
        layout = volume.layout
        if "enable_crc_check" in item.model_fields_set and "enableCrcCheck" in PARAMETERS[layout.level]:
            layout = replace(layout, crc=item.enable_crc_check)
        given = {**volume.given, **item.given("id", "uuid", "enable_crc_check")}
        change.put(VOLUMES, item.id, replace(volume, given=given, layout=layout))

    def delete(self, name: str, identity: str) -> None:
        """Mark a volume for deletion and remove it as soon as no device uses its file."""
        self.store.write(lambda change: self._mark(change, name, identity))
        self.remove_soon(name, identity)

    def _mark(self, change: Change, name: str, identity: str) -> None:
        volume = _found(change, name, identity)
        _refuse_action(volume, {"initializing": (1571, "deleted")})
        if volume.action == "markedForDeletion":
            return
        users = [
            client
            for client in volume.reservation.attached
            if (wanted := change.get(ATTACHMENTS, identity, client)) is not None and wanted.is_attaching
        ]
        if users:
            inner = f"The volume is used by: {', '.join(users[:3])}. Please detach"
            raise ApiError(1683, "Volume to delete in use", inner)
        change.put(VOLUMES, name, replace(volume, action="markedForDeletion"))

    def remove_soon(self, name: str, identity: str) -> None:
        """Remove a marked volume now, or retry in the background."""
        self.worker.soon(f"remove {identity}", lambda: self.remove(name, identity))

    def remove(self, name: str, identity: str) -> bool:
        """Remove a marked volume's file, then its row; False while a client has its device."""
        with self.locks.hold(identity):
            volume = self.store.get(VOLUMES, name)
            if volume is None or volume.uuid != identity or volume.action != "markedForDeletion":
                return True
            if volume.reservation.attached or self.has_device(identity):
                return False
            self.pool.remove(identity)
            self.store.write_later(lambda change: self._forget(change, name, identity))
        return True

    def _forget(self, change: Change, name: str, identity: str) -> None:
        volume = change.get(VOLUMES, name)
        if volume is None or volume.uuid != identity:
            return
        self.allocator.record(change, None, volume)
        for client in self.store.all(CLIENTS):
            if change.get(REPORTS, volume.uuid, client.name) is not None:
                change.delete(REPORTS, volume.uuid, client.name)


def refuse_name(view: Change | Store, name: str) -> None:
    if view.get(VOLUMES, name) is not None:
        raise ApiError(1523, "Volume name already exists")


def _found(change: Change, name: str, identity: str) -> Volume:
    volume = change.get(VOLUMES, name)
    if volume is None or volume.uuid != identity:
        raise ApiError(VOLUME_NOT_FOUND, "Volume not found")
    return volume


def _refuse_action(volume: Volume, refused: Mapping[str, tuple[int, str]]) -> None:
    if volume.action in refused:
        number, verb = refused[volume.action]
        raise ApiError(number, f"Volume {volume.name} cannot be {verb}: its action is {volume.action}")


def _absent_classes(item: NewVolume | VolumeUpdate) -> list[tuple[int, str]]:
    """Return the errors for the classes that a request names: this manager has none."""
    return [
        (number, f"{message}: {names}; this pool has none, leave {alias} out")
        for field, alias, number, message in _CLASSES
        if (names := getattr(item, field))
    ]


def _not_saved(inner: object) -> ApiError:
    return ApiError(1664, "Failed to save volume", inner)


def _not_allocated(reason: object) -> ApiError:
    """Return the error of a volume that does not fit: its inner message is a bare text."""
    return ApiError(1664, f"Failed to save volume: {reason}", "Failed to allocate")


def _not_extended(number: int, reason: str, inner: str | None = None) -> ApiError:
    return ApiError(number, f"Failed to extend volume: {reason}", inner)
