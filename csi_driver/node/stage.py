"""Stage a volume: bring its device, proven and ready, to where the node's publications start from."""

from __future__ import annotations

import errno
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from csi_driver.deadline import Deadline
from csi_driver.errors import (
    DriverError,
    ExistsDifferently,
    HostFailure,
    InvalidRequest,
    OperationPending,
    PreconditionFailed,
    StorageUnavailable,
    SystemCallFailed,
)
from csi_driver.host_model import Device, Mount
from csi_driver.model import AccessMode, BlockAccess, MountAccess, VolumeHandle
from csi_driver.node import StageRequest
from csi_driver.node.encryption import EncryptedVolumes, LockedVolume
from csi_driver.node.format import Preparation, PreparationTask, Prepared
from csi_driver.node.mount_owner import NodeVolume, Owner, Ownership, node_volume
from csi_driver.node.ports import Devices, Filesystems, Mounts, Paths, Probes, ReadOnlyDevices
from csi_driver.node.publish import STAGING_PATH, SharedReaders
from csi_driver.parameters.encryption import (
    EncryptionPlan,
    encrypted_by,
    passphrase_in,
    plan_encryption,
)
from csi_driver.parameters.mkfs import MkfsRequest
from csi_driver.parameters.mount_options import FS_TYPE, MountPlan, differences, plan_mount
from csi_driver.publish_context import Encryption, PublishContext
from csi_driver.settings import NodeSettings
from csi_driver.storage_model import LUKS_HEADER_BYTES

logger = logging.getLogger(__name__)

_CLOSING_PATIENCE_S = 20.0
_LOST_PATIENCE_S = 1.0


class Stage:
    """NodeStageVolume and NodeUnstageVolume.

    A filesystem is mounted at the staging path, but for that of a reader that joins others (`joining`). A block volume
    is only waited for, proven and, where its attachment is read-only, made read-only: its staging directory stays
    empty.
    """

    def __init__(
        self,
        *,
        devices: Devices,
        read_only_devices: ReadOnlyDevices,
        mounts: Mounts,
        filesystems: Filesystems,
        paths: Paths,
        probes: Probes,
        ownership: Ownership,
        preparation: Preparation,
        encrypted: EncryptedVolumes,
        joining: SharedReaders,
        settings: NodeSettings,
    ) -> None:
        self._devices = devices
        self._read_only_devices = read_only_devices
        self._mounts = mounts
        self._filesystems = filesystems
        self._paths = paths
        self._probes = probes
        self._ownership = ownership
        self._preparation = preparation
        self._encrypted = encrypted
        self._joining = joining
        self._settings = settings
        self._has_looked_at_propagation = False

    def stage(self, request: StageRequest, *, deadline: Deadline) -> None:
        """Stage the volume; repeated, it changes nothing, and after a crash it goes on from there.

        Raises `InvalidField`, `VolumeNotFound`, `PreconditionFailed` (what the device holds, or what is mounted
        there, forbids it), `ExistsDifferently` (staged there with another capability), `DeadlineReached`.
        """
        volume, context = node_volume(request.volume_id, request.publish_context)
        path = self._paths.check(request.staging_target_path, STAGING_PATH)
        in_time = deadline.earlier(self._settings.answer_margin_s)
        by = encrypted_by(context, request.volume_context)
        locks = plan_encryption(by, request.volume_context, request.secrets)
        if locks is None and passphrase_in(request.secrets) is not None:
            logger.warning("volume %s has a passphrase but encryption is not enabled", volume)
        match request.capability.access:
            case BlockAccess():
                self._stage_block(volume, context, path, locks, request.capability.mode, deadline=in_time)
            case MountAccess() as access:
                plan = self._plan(access, request, context)
                mounted = self._ownership.at(path, volume)
                outlived = self._preparation.outlived(volume, context.attachment if context else 0)
                if mounted is not None and outlived and self._ownership.take_off(path, volume):
                    logger.warning("%s: it was unmounted at %s", outlived, path)
                    mounted = None
                if mounted is not None and self._is_dead_and_unused(mounted, volume, path):
                    self._ownership.take_off(path, volume)
                    mounted = None
                if mounted is None and self._joining.has_joined(volume, context, path):
                    return
                if mounted is None:
                    self._stage_mount(volume, context, path, plan, locks, deadline=in_time)
                else:
                    self._accept(mounted, volume, context, path, plan, by)

    def unstage(self, volume_id: str, staging_target_path: str, *, deadline: Deadline) -> None:
        """Take the volume off its staging path and leave the directory empty; nothing of it there is success.

        A mount of another volume is left alone. Publications that still exist do not hinder it: the CO unpublishes
        first, a bind mount cannot be told from another staging of the same device, and the device stays in use,
        which whoever detaches it finds out. Without any mount the device must be closed: an unmount leaves the table
        at once, and the kernel may still be writing. Raises `StorageUnavailable` while it is not.
        """
        path = self._paths.check(staging_target_path, STAGING_PATH, takes_off=True)
        handle = VolumeHandle.parse(volume_id)
        if handle is not None:
            volume = NodeVolume(volume_id, handle.name, handle.uuid)
            self._encrypted.wake(volume)
            self._ownership.take_off(path, volume)
            try:
                self._encrypted.close(volume)
            except PreconditionFailed:
                if not self._is_read_raw(volume):
                    raise
            self._require_closed(volume, deadline.earlier(self._settings.answer_margin_s))

    def _require_closed(self, volume: NodeVolume, deadline: Deadline) -> None:
        """Wait until the volume's device is closed; udev, and our own looks at it, hold it open for a moment.

        It may stay open for another staging or publication of the volume, and where it was taken from this node.
        """
        device = self._ownership.device_of(volume)
        if device is None or self._devices.is_open(device) is False or self._is_mounted(volume, device):
            return
        was_lost = self._ownership.is_lost(volume)
        patience = deadline.at_most(_LOST_PATIENCE_S if was_lost else _CLOSING_PATIENCE_S)
        is_closed = patience.wait_until(lambda: self._devices.is_open(device) is False)
        if is_closed or (was_lost and self._ownership.is_lost(volume)):
            return
        if self._devices.is_open(device) is None:
            raise StorageUnavailable(
                f"volume {volume} is unmounted, and whether its device {device.path} is closed cannot be told: its "
                "storage client carries no I/O for it, so it is not opened; retry when I/O is back"
            )
        raise StorageUnavailable(
            f"volume {volume} is unmounted, and its device {device.path} is still open on this node: the kernel is "
            "writing what is left, or a program outside of the mounts uses it; end that program, and retry"
        )

    def _is_mounted(self, volume: NodeVolume, device: Device) -> bool:
        used = (device, self._encrypted.opened_over(volume, device))
        return self._is_read_raw(volume) or any(
            self._ownership.is_live(found, each) for each in used if each for found in self._mounts.of_device(each)
        )

    def _is_read_raw(self, volume: NodeVolume) -> bool:
        """Tell whether the raw volume is published read-only, by a read-only device over its own."""
        readers = {reader.number for reader in self._read_only_devices.present(volume.name)}
        return bool(readers) and any(found.node_number in readers for found in self._mounts.table())

    def is_staged(self, volume_id: str, staging_target_path: str) -> bool:
        """Tell whether a filesystem of the volume is mounted at its staging path, dead or alive."""
        handle = VolumeHandle.parse(volume_id)
        if handle is None:
            return False
        mounted = self._mounts.at(self._paths.check(staging_target_path, STAGING_PATH, takes_off=True))
        volume = NodeVolume(volume_id, handle.name, handle.uuid)
        return mounted is not None and self._ownership.owner_of(mounted, volume) is not Owner.OTHER

    # --- filesystem ---

    def _is_dead_and_unused(self, mounted: Mount, volume: NodeVolume, path: Path) -> bool:
        """Tell whether a filesystem died that is mounted at the staging path and nowhere else; both are logged."""
        dead = self._probes.dead(mounted)
        if dead is None or self._ownership.owner_of(mounted, volume) is not Owner.OURS:
            return False
        own = {path, mounted.path, *self._mounts.twins(path)}
        same = (found for found in self._mounts.table() if found.number == mounted.number)
        used = [found.path for found in same if found.source == mounted.source and found.path not in own]
        if used:
            logger.warning("volume %s is published at %s, and %s", volume, used[0], dead.detail)
            return False
        logger.warning("volume %s is unmounted at %s and mounted again: %s", volume, path, dead.detail)
        return True

    def _plan(self, access: MountAccess, request: StageRequest, context: PublishContext | None) -> MountPlan:
        return plan_mount(
            access,
            request.capability.mode,
            read_only=context is not None and context.read_only,
            mkfs=_mkfs_wish(request, context),
            supported=self._filesystems.supported(),
            fs_type_of_class=request.volume_context.get(FS_TYPE, ""),
        )

    def _stage_mount(
        self,
        volume: NodeVolume,
        context: PublishContext | None,
        path: Path,
        plan: MountPlan,
        locks: EncryptionPlan | None,
        *,
        deadline: Deadline,
    ) -> None:
        device = self._ready_device(volume, context, read_only=plan.read_only, deadline=deadline)
        self._require_directory(path)
        self._warn_once_of_hidden_mounts(path)
        by = Encryption.NONE
        with self._nothing_left(volume):
            if locks is not None:
                by = locks.by
                locked = LockedVolume(volume, device, locks, context, plan.read_only)
                device, context = self._encrypted.open(locked, deadline=deadline)
            task = PreparationTask(volume, device, plan, context)
            prepared = self._preparation.prepare(task, deadline=deadline)
            self._preparation.hand_over(task, prepared)
            mounted = self._mounts.at(path)
            if mounted is None:
                if not self._joining.joins(task):
                    self._mount(task, prepared, path)
                return
            # Another process of ours was quicker: two of them run for a moment while one replaces the other.
            self._accept(mounted, volume, context, path, plan, by)

    def _warn_once_of_hidden_mounts(self, path: Path) -> None:
        """Say at the first stage that pods will not see the volume, where this process's mounts stay its own."""
        if self._has_looked_at_propagation:
            return
        self._has_looked_at_propagation = True
        if not self._mounts.reaches_host(path):
            logger.warning(
                "mounts at %s do not reach other mount namespaces (mount propagation is private): where kubelet runs "
                "in another one, its pods find an empty directory; share the directory (of a container: "
                "mountPropagation Bidirectional), or run in the host's namespace (a systemd unit without "
                "PrivateMounts, PrivateTmp, ProtectSystem and the like)",
                path,
            )

    def _mount(self, task: PreparationTask, prepared: Prepared, path: Path) -> None:
        options = task.plan.options_for(prepared.fs_type)
        try:
            self._mounts.mount(task.device, path, prepared.fs_type, options, read_only=task.plan.read_only)
        except SystemCallFailed as failure:
            if failure.errno == errno.EINVAL and task.plan.mkfs.asked:
                told = " ".join(task.plan.mkfs.asked)
                raise InvalidRequest(
                    f"{failure}; this kernel cannot mount what mkfs made with {told}: change the mkfs options of the "
                    "StorageClass"
                ) from failure
            raise
        with self._nothing_left(task.volume, path):
            if prepared.grow_mounted:
                self._filesystems.grow_mounted(path, task.device, prepared.fs_type)
            self._set_root_mode(path, task.plan, task.uuid, task.context, is_new=prepared.is_new)

    @contextmanager
    def _nothing_left(self, volume: NodeVolume, path: Path | None = None) -> Iterator[None]:
        """Take back what a call opened, or mounted at `path`, when it fails: nobody else would.

        After most errors kubelet takes the volume for not staged, forgets it and lets it be detached (pkg/volume/csi:
        csi_client.go `isFinalError`, csi_attacher.go `MountDevice`). What cannot be taken back is answered with an
        error after which it does unstage; so is what the same call, repeated, goes on from.
        """
        try:
            yield
        except (OperationPending, StorageUnavailable):
            raise
        except DriverError as error:
            try:
                if path is not None:
                    self._mounts.unmount(path)
                self._encrypted.close(volume)
            except DriverError as problem:
                raise StorageUnavailable(f"{error}; and the cleanup after it failed: {problem}") from error
            raise

    def _accept(
        self,
        mounted: Mount,
        volume: NodeVolume,
        context: PublishContext | None,
        path: Path,
        plan: MountPlan,
        by: Encryption,
    ) -> None:
        """Take what is mounted at the staging path for what is wanted, finishing what a crash left, or say why not."""
        device = self._ownership.device_of(volume)
        if device is not None:
            device = self._encrypted.in_use(volume, device, by)
        if device is None or mounted.node_number is not None or not self._ownership.is_live(mounted, device):
            raise PreconditionFailed(
                f"staging path {path}: expected volume {volume}, got {self._ownership.describe(mounted)}"
            )
        if self._probes.dead(mounted) is not None:
            return  # pods have it: as they run on, it stays, and the next publication says what to do
        found = differences(mounted, plan)
        if found:
            raise ExistsDifferently(f"the mount of volume {volume} at {path}", found)
        if not plan.read_only:
            self._finish_growth(volume, device, mounted, path)
        self._set_root_mode(path, plan, volume.uuid or device.uuid, context)

    def _finish_growth(self, volume: NodeVolume, device: Device, mounted: Mount, path: Path) -> None:
        """Grow what a crash left too small. It is staged as asked: that it cannot is NodeExpandVolume's to tell."""
        try:
            if self._preparation.is_too_small(device, mounted.fs_type):
                self._filesystems.grow_mounted(path, device, mounted.fs_type)
        except (PreconditionFailed, HostFailure) as problem:
            logger.warning("volume %s is staged and stays smaller than its device: %s", volume, problem)

    def _set_root_mode(
        self,
        path: Path,
        plan: MountPlan,
        volume_uuid: str | None,
        context: PublishContext | None,
        *,
        is_new: bool = False,
    ) -> None:
        """Give the root directory of a new filesystem the requested mode, once: later its user may change it.

        Kubelet sets group and setgid for fsGroup, and an application may close its data to others.
        """
        attachment = context.attachment if context is not None else 0
        if plan.root_mode is not None and (is_new or self._preparation.root_mode_is_pending(volume_uuid, attachment)):
            self._paths.set_mode(path, plan.root_mode)
            self._preparation.root_mode_is_set(volume_uuid, attachment)

    # --- block ---

    def _stage_block(
        self,
        volume: NodeVolume,
        context: PublishContext | None,
        path: Path,
        locks: EncryptionPlan | None,
        mode: AccessMode,
        *,
        deadline: Deadline,
    ) -> None:
        mounted = self._mounts.at(path)
        if mounted is not None:
            device = self._ownership.device_of(volume)
            if (
                device is not None
                and mounted.node_number is None
                and self._ownership.owner_of(mounted, volume) is Owner.OURS
            ):
                raise ExistsDifferently(
                    f"the staging of volume {volume} at {path}", ["access: expected block, got mount"]
                )
            raise PreconditionFailed(
                f"staging path {path}: expected volume {volume}, got {self._ownership.describe(mounted)}"
            )
        readers = mode.is_read_only or (context is not None and context.read_only)
        device = self._ready_device(volume, context, read_only=readers, deadline=deadline)
        self._require_directory(path)
        if locks is None:
            self._encrypted.require_plain(volume, device)
            return
        locked = LockedVolume(volume, device, locks, context, readers, is_shared=mode.is_multi_node and not readers)
        with self._nothing_left(volume):
            self._encrypted.open(locked, deadline=deadline)

    # --- both ---

    def _ready_device(
        self, volume: NodeVolume, context: PublishContext | None, *, read_only: bool, deadline: Deadline
    ) -> Device:
        """Wait for the volume's device; where its very attachment is read-only, make the kernel keep it so."""
        device = self._devices.wait_for(volume.name, volume.uuid, deadline=deadline)
        if not device.is_writable and not read_only:
            why = device.write_refusal or "the kernel has it read-only"
            raise PreconditionFailed(f"the device of volume {volume} refuses writes ({why}), expected write access")
        if context is not None and context.read_only and not device.read_only:
            writers = (found for found in self._mounts.of_device(device) if not found.read_only)
            writer = next((found for found in writers if self._ownership.is_live(found, device)), None)
            if writer is not None:
                raise PreconditionFailed(
                    f"volume {volume} is attached read-only, but {writer.path} mounts it writable; unmount that"
                )
            self._devices.set_read_only(device)
        return device

    def _require_directory(self, path: Path) -> None:
        kind = self._paths.kind(path)
        if kind == "absent":
            self._paths.make_directory(path)
        elif kind != "directory":
            raise PreconditionFailed(f"staging path {path}: expected a directory, got a {kind}")


def _mkfs_wish(request: StageRequest, context: PublishContext | None) -> MkfsRequest:
    if context is None:
        return MkfsRequest(request.volume_context)
    if context.encryption is not Encryption.NONE and context.stripe_bytes and LUKS_HEADER_BYTES % context.stripe_bytes:
        # Behind the header the filesystem begins in the middle of a stripe.
        return MkfsRequest(request.volume_context, size_bytes=context.size_bytes)
    return MkfsRequest(request.volume_context, context.stripe_unit_bytes, context.stripe_bytes, context.size_bytes)
