# SPDX-License-Identifier: Apache-2.0
"""NodeStageVolume and NodeUnstageVolume.

A filesystem is mounted at the staging path, except for a shared reader (`publish.SharedReaders`). For a raw block
volume the device is only awaited, verified and, if attached read-only, made read-only; its staging path stays empty.
"""

from __future__ import annotations

import errno
import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from csi_driver.deadline import Deadline
from csi_driver.errors import (
    ContentRefused,
    DriverError,
    ExistsDifferently,
    HostFailure,
    InvalidRequest,
    OperationPending,
    PreconditionFailed,
    StorageUnavailable,
    SystemCallFailed,
)
from csi_driver.host_model import Device, Mount, VolumeStatus
from csi_driver.model import MountAccess
from csi_driver.node import StageRequest
from csi_driver.node.encryption import EncryptedVolumes
from csi_driver.node.format import Preparation, Prepared
from csi_driver.node.mount_owner import NodeVolume, Owner, Ownership, VolumeDevice, is_same
from csi_driver.node.ports import Devices, Filesystems, Mounts, Paths, Probes, ReadOnlyDevices
from csi_driver.node.publish import STAGING_PATH, SharedReaders, mount_plan, writes_refused
from csi_driver.node_settings import NodeSettings
from csi_driver.nvme_model import ConnectedVolume
from csi_driver.parameters.connection import connect_options
from csi_driver.parameters.encryption import EncryptionPlan, encrypted_by, passphrase_in, plan_encryption
from csi_driver.parameters.mkfs import MkfsRequest
from csi_driver.parameters.mount_options import MountPlan, differences
from csi_driver.publish_context import Encryption
from csi_driver.reporting import SILENT, EventReason, Reporter, Subject
from csi_driver.storage_model import LUKS_HEADER_BYTES

logger = logging.getLogger(__name__)

_CLOSE_TIMEOUT_S = 20.0
_LOST_CLOSE_TIMEOUT_S = 1.0


@dataclass(slots=True, kw_only=True)
class Stage:
    """Stages and unstages volumes. Every call can be repeated, also after a crash."""

    devices: Devices
    read_only_devices: ReadOnlyDevices
    mounts: Mounts
    filesystems: Filesystems
    paths: Paths
    probes: Probes
    ownership: Ownership
    preparation: Preparation
    encrypted: EncryptedVolumes
    shared_readers: SharedReaders
    settings: NodeSettings
    reporter: Reporter = SILENT

    def stage(self, request: StageRequest, *, deadline: Deadline) -> None:
        """Stage the volume. Raises `PreconditionFailed`, `ExistsDifferently`, `DeadlineReached`."""
        volume = NodeVolume.of_request(request.volume_id, request.publish_context)
        try:
            self._stage(request, volume, deadline)
        except ContentRefused as refusal:
            self._report(volume, EventReason.CONTENT_REFUSED, refusal)
            raise

    def _report(self, volume: NodeVolume, reason: EventReason, note: object) -> None:
        self.reporter.report(Subject(volume.context.claim, volume_id=volume.volume_id), reason, str(note))

    def _stage(self, request: StageRequest, volume: NodeVolume, deadline: Deadline) -> None:
        path = self.paths.check(request.staging_target_path, STAGING_PATH)
        in_time = deadline.earlier(self.settings.answer_margin_s)
        by = encrypted_by(volume.given_context, request.volume_context)
        locks = plan_encryption(by, request.volume_context, request.secrets)
        if locks is None and passphrase_in(request.secrets) is not None:
            logger.warning("volume %s has a passphrase but encryption is not enabled", volume)
        access, plan, read_only = request.capability.access, None, volume.context.read_only
        if isinstance(access, MountAccess):
            mkfs = _mkfs_request(request, volume)
            plan = mount_plan(self.filesystems, access, request, volume, mkfs=mkfs, read_only=read_only)
        with self._connected(volume, path, request, in_time):
            if plan is None:
                self._stage_block(volume, path, locks, request, deadline=in_time)
            elif (mounted := self._usable_mount(volume, path)) is not None:
                self._accept(mounted, volume, path, plan, by)
            elif not self.shared_readers.has_joined(volume, path):
                self._stage_mount(volume, path, plan, locks, deadline=in_time)

    def unstage(self, volume_id: str, staging_target_path: str, *, deadline: Deadline) -> None:
        """Unmount the volume from its staging path; leaves a mount of another volume alone.

        Raises `StorageUnavailable` while its device is open without another mount: the kernel may still write.
        """
        path = self.paths.check(staging_target_path, STAGING_PATH, takes_off=True)
        volume = NodeVolume.parse(volume_id)
        if volume is None:
            return
        self.encrypted.resume(volume)
        try:
            self.ownership.unmount(path, volume)
            self._close_encryption(volume)
        except PreconditionFailed as busy:
            self._report(volume, EventReason.VOLUME_IN_USE, f"volume {volume}: {busy}")
            raise
        in_time = deadline.earlier(self.settings.answer_margin_s)
        self._require_closed(volume, in_time)
        self._disconnect(volume, path, deadline=in_time)

    def _close_encryption(self, volume: NodeVolume) -> None:
        try:
            self.encrypted.close(volume)
        except PreconditionFailed:
            if not self._is_published_raw(volume):
                raise

    def is_staged(self, volume_id: str, staging_target_path: str) -> bool:
        """Return whether a filesystem of the volume is mounted there, also a dead one."""
        volume = NodeVolume.parse(volume_id)
        if volume is None:
            return False
        mounted = self.mounts.at(self.paths.check(staging_target_path, STAGING_PATH, takes_off=True))
        return mounted is not None and self.ownership.owner_of(mounted, volume) is not Owner.OTHER

    def _require_closed(self, volume: NodeVolume, deadline: Deadline) -> None:
        """Wait until the volume's device is closed, unless it is mounted or lost."""
        device = self.ownership.device_of(volume)
        if device is None or self.devices.is_open(device) is False or self._is_mounted(volume, device):
            return
        was_lost = self.ownership.is_lost(volume)
        in_time = deadline.at_most(_LOST_CLOSE_TIMEOUT_S if was_lost else _CLOSE_TIMEOUT_S)
        is_closed = in_time.wait_until(lambda: self.devices.is_open(device) is False)
        if is_closed or (was_lost and self.ownership.is_lost(volume)):
            return
        if self.devices.is_open(device) is None:
            state = "without I/O, and it is not known whether it is closed; retry when I/O is back"
        else:
            state = "still open: the kernel is writing back data, or a program uses it; end that program, and retry"
        problem = f"volume {volume} is unmounted, but its device {device.path} is {state}"
        if self.reporter is not SILENT:  # the search takes time
            users = self.devices.describe_openers(device)
            self._report(volume, EventReason.VOLUME_IN_USE, f"{problem} (open {users})")
        raise StorageUnavailable(problem)

    def _is_mounted(self, volume: NodeVolume, device: Device) -> bool:
        used = (device, self.encrypted.opened_over(volume, device))
        return self._is_published_raw(volume) or any(
            self.ownership.is_live(found, each) for each in used if each for found in self.mounts.of_device(each)
        )

    def _is_published_raw(self, volume: NodeVolume) -> bool:
        readers = {reader.number for reader in self.read_only_devices.present(volume.name)}
        return bool(readers) and any(found.node_number in readers for found in self.mounts.table())

    @contextmanager
    def _connected(self, volume: NodeVolume, path: Path, request: StageRequest, deadline: Deadline) -> Iterator[None]:
        """Connect a volume that is exported over NVMe/TCP, for the block."""
        context = volume.context
        if context.nvme is None:
            yield
            return
        options = connect_options(request.volume_context)
        connection = self._connection(volume)
        was_held = connection is not None and str(path) in (connection.holders or ())
        if connection is not None and connection.nqn != context.nvme.nqn:
            self._end_earlier(volume, path, connection, deadline)
            connection = None

        def undo() -> None:
            was_staged = was_held and self._is_used(volume)  # by an earlier call
            if not was_staged and not self._disconnect(volume, path, deadline=deadline):
                raise StorageUnavailable("the volume stays connected while its device is used")

        with _undone_on_error(undo):
            if connection is not None and connection.preempted:
                raise PreconditionFailed(
                    f"volume {volume} was taken from this node ({connection.details}); detach it and attach it again"
                )
            exported = ConnectedVolume(volume.name, context.uuid, context.nvme, context.size_bytes, options)
            self.devices.connect(exported, str(path), deadline=deadline)
            yield

    def _disconnect(self, volume: NodeVolume, path: Path, *, deadline: Deadline) -> bool:
        """End the use of the connection for a staging path; the last one ends the connection.

        False when it stays because something uses the device, such as an administrator's mount: the node's cleanup
        ends it later.
        """
        connection = self._connection(volume)
        if connection is None:
            return True
        is_last = {str(path)}.issuperset(connection.holders or ())
        if is_last and not connection.preempted and self._is_used(volume):
            return False
        try:
            in_time = deadline.at_most(_LOST_CLOSE_TIMEOUT_S) if connection.preempted else deadline
            self.devices.disconnect(volume.name, str(path), deadline=in_time)
        except StorageUnavailable as left:
            if not connection.preempted:
                raise
            logger.warning("volume %s was taken from this node, and its device is still open: %s", volume, left)
        return True

    def _end_earlier(self, volume: NodeVolume, path: Path, connection: VolumeStatus, deadline: Deadline) -> None:
        """End the connection of an earlier attachment, and its mount.

        That the attachment is over must be proven by the storage, by the number of this one and a loss of all paths,
        or by a closed device: a request that was delayed may be older than the connection.
        """
        is_lost = connection.io_enabled is not True and self.preparation.why_outdated(volume)
        is_over = connection.preempted or is_lost
        if not is_over and self._is_used(volume):
            raise StorageUnavailable(
                f"volume {volume} is connected under another attachment ({connection.nqn}) and used; retry when its"
                " pods have ended"
            )
        with suppress(StorageUnavailable):  # its device may be mounted: then only the I/O has ended
            for holder in connection.holders or ("",):
                in_time = deadline.at_most(_LOST_CLOSE_TIMEOUT_S)
                self.devices.disconnect(volume.name, holder, is_over=bool(is_lost), deadline=in_time)
        self.ownership.unmount(path, volume)

    def _connection(self, volume: NodeVolume) -> VolumeStatus | None:
        connection = self.devices.connection(volume.name)
        return connection if connection is not None and is_same(connection.uuid, volume.uuid) else None

    def _is_used(self, volume: NodeVolume) -> bool:
        """Return whether anything on this node uses the volume's device; not known counts as used."""
        device = self.ownership.device_of(volume)
        return device is not None and (self.devices.is_open(device) is not False or self._is_mounted(volume, device))

    def _usable_mount(self, volume: NodeVolume, path: Path) -> Mount | None:
        mounted = self.ownership.at(path, volume)
        if mounted is None or self.ownership.was_made_from_another(mounted, volume):
            return mounted
        outdated = self.preparation.why_outdated(volume)
        if outdated and self.ownership.unmount(path, volume):
            logger.warning("%s: it was unmounted at %s", outdated, path)
            return None
        if self._is_dead_and_unused(mounted, volume, path):
            self.ownership.unmount(path, volume)
            return None
        return mounted

    def _is_dead_and_unused(self, mounted: Mount, volume: NodeVolume, path: Path) -> bool:
        dead = self.probes.dead(mounted)
        if dead is None or self.ownership.owner_of(mounted, volume) is not Owner.OURS:
            return False
        own = {path, mounted.path, *self.mounts.twins(path)}
        same = (found for found in self.mounts.table() if found.number == mounted.number)
        used = [found.path for found in same if found.source == mounted.source and found.path not in own]
        if used:
            logger.warning("volume %s is published at %s, and %s", volume, used[0], dead.detail)
            return False
        logger.warning("volume %s is unmounted at %s and mounted again: %s", volume, path, dead.detail)
        return True

    def _stage_mount(
        self, volume: NodeVolume, path: Path, plan: MountPlan, locks: EncryptionPlan | None, *, deadline: Deadline
    ) -> None:
        device = self._ready_device(volume, read_only=plan.read_only, deadline=deadline)
        target = VolumeDevice(volume, device, plan.read_only)
        self._require_directory(path)
        with _undone_on_error(lambda: self.encrypted.close(volume)):
            if locks is not None:
                target = self.encrypted.open(target, locks, deadline=deadline)
            prepared = self.preparation.prepare(target, plan, deadline=deadline)
            self.preparation.record_use(target, plan, prepared)
            mounted = self.mounts.at(path)
            if mounted is not None:
                # Another driver was quicker: two of them run for a moment while one replaces the other.
                self._accept(mounted, volume, path, plan, locks.by if locks is not None else Encryption.NONE)
            elif not self.shared_readers.joins(target):
                self._mount(target, plan, prepared, path)

    def _mount(self, target: VolumeDevice, plan: MountPlan, prepared: Prepared, path: Path) -> None:
        options = plan.options_for(prepared.fs_type)
        try:
            self.mounts.mount(target.device, path, prepared.fs_type, options, read_only=plan.read_only)
        except SystemCallFailed as failure:
            if failure.errno == errno.EINVAL and plan.mkfs.asked:
                asked = " ".join(plan.mkfs.asked)
                raise InvalidRequest(
                    f"{failure}; this kernel cannot mount what mkfs made with {asked}: change the mkfs options of the "
                    "StorageClass"
                ) from failure
            raise
        with _undone_on_error(lambda: self.mounts.unmount(path)):
            if prepared.grow_mounted:
                self.filesystems.grow_mounted(path, target.device, prepared.fs_type)
            self._set_root_mode(path, plan, target.uuid, target.volume.context.attachment, is_new=prepared.is_new)

    def _accept(self, mounted: Mount, volume: NodeVolume, path: Path, plan: MountPlan, by: Encryption) -> None:
        device = self.ownership.device_of(volume)
        if device is not None:
            device = self.encrypted.in_use(volume, device, by)
        if device is None or mounted.node_number is not None or not self.ownership.is_live(mounted, device):
            raise self.ownership.held_by_another(f"staging path {path}", volume, mounted)
        if self.probes.dead(mounted) is not None:
            return  # running pods use it, so it stays; the next publication reports the error
        if found := differences(mounted, plan):
            raise ExistsDifferently(f"the mount of volume {volume} at {path}", found)
        if not plan.read_only:
            self._finish_growth(volume, device, mounted, path)
        self._set_root_mode(path, plan, volume.uuid or device.uuid, volume.context.attachment)

    def _finish_growth(self, volume: NodeVolume, device: Device, mounted: Mount, path: Path) -> None:
        """Finish an interrupted growth; only NodeExpandVolume reports a failure."""
        try:
            if self.preparation.is_too_small(device, mounted.fs_type):
                self.filesystems.grow_mounted(path, device, mounted.fs_type)
        except (PreconditionFailed, HostFailure) as problem:
            self._report(volume, EventReason.GROWS_AT_NEXT_MOUNT, problem)
            logger.warning("volume %s is staged and stays smaller than its device: %s", volume, problem)

    def _set_root_mode(
        self, path: Path, plan: MountPlan, volume_uuid: str | None, attachment: int, *, is_new: bool = False
    ) -> None:
        """Set the requested mode of a new root directory once: later its user may change it."""
        if plan.root_mode is not None and (is_new or self.preparation.root_mode_is_pending(volume_uuid, attachment)):
            self.paths.set_mode(path, plan.root_mode)
            self.preparation.root_mode_is_set(volume_uuid, attachment)

    def _stage_block(
        self, volume: NodeVolume, path: Path, locks: EncryptionPlan | None, request: StageRequest, *, deadline: Deadline
    ) -> None:
        mounted = self.mounts.at(path)
        if mounted is not None:
            device = self.ownership.device_of(volume)
            is_filesystem = device is not None and mounted.node_number is None
            if is_filesystem and self.ownership.owner_of(mounted, volume) is Owner.OURS:
                raise ExistsDifferently(f"staging of volume {volume} at {path}", ["access: expected block, got mount"])
            raise self.ownership.held_by_another(f"staging path {path}", volume, mounted)
        mode = request.capability.mode
        read_only = mode.is_read_only or volume.context.read_only
        device = self._ready_device(volume, read_only=read_only, deadline=deadline)
        self._require_directory(path)
        if locks is None:
            self.encrypted.require_plain(volume, device)
            return
        with _undone_on_error(lambda: self.encrypted.close(volume)):
            target = VolumeDevice(volume, device, read_only, is_shared=mode.is_multi_node and not read_only)
            self.encrypted.open(target, locks, deadline=deadline)

    def _ready_device(self, volume: NodeVolume, *, read_only: bool, deadline: Deadline) -> Device:
        device = self.devices.wait_for(volume.name, volume.uuid, deadline=deadline)
        if not device.is_writable and not read_only:
            raise writes_refused(volume, device)
        if volume.context.read_only and not volume.context.private_copy and not device.read_only:
            writers = (found for found in self.mounts.of_device(device) if not found.read_only)
            writer = next((found for found in writers if self.ownership.is_live(found, device)), None)
            if writer is not None:
                raise PreconditionFailed(f"volume {volume} is attached read-only, but {writer.path} mounts it writable")
            self.devices.set_read_only(device)
        return device

    def _require_directory(self, path: Path) -> None:
        kind = self.paths.kind(path)
        if kind == "absent":
            self.paths.make_directory(path)
        elif kind != "directory":
            raise PreconditionFailed(f"staging path {path}: expected a directory, got a {kind}")


@contextmanager
def _undone_on_error(undo: Callable[[], object]) -> Iterator[None]:
    """Call `undo` when the block fails: kubelet would not unstage the volume.

    After most errors kubelet takes the volume for not staged (pkg/volume/csi, csi_client.go `isFinalError`). It does
    unstage after those that are passed on here, and where the cleanup fails.
    """
    try:
        yield
    except (OperationPending, StorageUnavailable):
        raise
    except DriverError as error:
        try:
            undo()
        except DriverError as problem:
            raise StorageUnavailable(f"{error}; and the cleanup after it failed: {problem}") from error
        raise


def _mkfs_request(request: StageRequest, volume: NodeVolume) -> MkfsRequest:
    context = volume.context
    if context.encryption is not Encryption.NONE and context.stripe_bytes and LUKS_HEADER_BYTES % context.stripe_bytes:
        # Behind the header the filesystem begins in the middle of a stripe.
        return MkfsRequest(request.volume_context, size_bytes=context.size_bytes)
    return MkfsRequest(request.volume_context, context.stripe_unit_bytes, context.stripe_bytes, context.size_bytes)
