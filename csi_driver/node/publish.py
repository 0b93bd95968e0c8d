"""Publish a staged volume at a target path, and take it back."""

from __future__ import annotations

import hashlib
from pathlib import Path

from csi_driver.deadline import Deadline
from csi_driver.errors import ExistsDifferently, IdentityNotProven, PreconditionFailed
from csi_driver.host_model import Device, FaultKind, Mount
from csi_driver.model import AccessMode, BlockAccess, MountAccess, VolumeHandle
from csi_driver.node import NodePublishRequest
from csi_driver.node.encryption import EncryptedVolumes
from csi_driver.node.format import Preparation, PreparationTask
from csi_driver.node.mount_owner import NodeVolume, Owner, Ownership, is_same, node_volume, number_of
from csi_driver.node.ports import Devices, Filesystems, Mounts, Paths, Probes, ReadOnlyDevices
from csi_driver.node.usage_records import RAW, UsageRecords, earlier_use, record_use
from csi_driver.parameters.encryption import encrypted_by
from csi_driver.parameters.mkfs import MkfsRequest
from csi_driver.parameters.mount_options import FS_TYPE, MountPlan, check_mount_group, mount_flags, plan_mount
from csi_driver.publish_context import PublishContext

STAGING_PATH, TARGET_PATH = "staging_target_path", "target_path"


class Publish:
    """NodePublishVolume and NodeUnpublishVolume. What is published is read off the kernel, never remembered."""

    def __init__(
        self,
        *,
        devices: Devices,
        read_only_devices: ReadOnlyDevices,
        mounts: Mounts,
        paths: Paths,
        probes: Probes,
        records: UsageRecords,
        ownership: Ownership,
        encrypted: EncryptedVolumes,
        joining: SharedReaders,
    ) -> None:
        self._devices = devices
        self._read_only_devices = read_only_devices
        self._mounts = mounts
        self._paths = paths
        self._probes = probes
        self._records = records
        self._ownership = ownership
        self._encrypted = encrypted
        self._joining = joining

    def publish(self, request: NodePublishRequest, *, deadline: Deadline) -> None:
        """Publish the volume at the target path; repeated, it changes nothing.

        Raises `InvalidField`, `VolumeNotFound`, `PreconditionFailed` (not staged there, another volume at the target,
        a second target of a single writer), `ExistsDifferently` (published there otherwise).
        """
        volume, context = node_volume(request.volume_id, request.publish_context)
        if not request.staging_target_path:
            raise PreconditionFailed(f"{STAGING_PATH} is not set: stage volume {volume} before it is published")
        target = self._paths.check(request.target_path, TARGET_PATH)
        staging = self._paths.check(request.staging_target_path, STAGING_PATH)
        device = self._devices.find(volume.name, volume.uuid)
        if device is None:
            raise PreconditionFailed(f"volume {volume} has no device on this node: it is not attached or not ready")
        if not is_same(device.uuid, volume.uuid):
            raise PreconditionFailed(f"the device of {volume} claims {device.uuid}, expected {volume.uuid}")
        # From here on an encrypted volume has no other device than the opened one.
        device = self._encrypted.in_use(volume, device, encrypted_by(context, request.volume_context))
        mode = request.capability.mode
        read_only = request.read_only or mode.is_read_only or (context is not None and context.read_only)
        match request.capability.access:
            case MountAccess() as access:
                check_mount_group(access)
                flags, _ = mount_flags(access.mount_flags)
                earlier = earlier_use(self._records, volume.uuid, context.attachment if context else 0)
                if earlier:
                    raise PreconditionFailed(
                        f"volume {volume} is staged under its attachment {earlier}: expected the present one; it was "
                        "taken from this node in between: unstage it and stage it again"
                    )
                if self._mounts.at(staging) is None and self._joining.is_staged(volume, context, staging):
                    plan = self._joining.plan(access, request)
                    self._publish_joined(PreparationTask(volume, device, plan, context), target, deadline=deadline)
                    return
                self._publish_mount(
                    volume, device, staging, target, access, read_only=read_only or "ro" in flags, mode=mode
                )
            case BlockAccess():
                self._publish_block(volume, device, context, staging, target, read_only=read_only, mode=mode)

    def unpublish(self, volume_id: str, target_path: str, *, deadline: Deadline) -> None:
        """Take the volume off the target path and remove it; nothing of it there is success.

        Mounts are taken off one by one; one of another volume is left alone, with the path. Never removes data: the
        path goes only when it is an empty directory or file.
        """
        target = self._paths.check(target_path, TARGET_PATH, takes_off=True)
        handle = VolumeHandle.parse(volume_id)
        if handle is None:
            return
        volume = NodeVolume(volume_id, handle.name, handle.uuid)
        taken_off, is_clear = self._take_off(volume, target)
        if taken_off == 0:
            # A call is repeated, a crash left it so, or another volume is or was there and took the path with it: the
            # only cases that pay for looking at all loop devices.
            self._release_left_over(volume, target)
        if not is_clear:
            return
        kind = self._paths.kind(target)
        if kind in ("directory", "file"):
            self._paths.remove(target)
        elif kind != "absent":
            raise PreconditionFailed(f"target path {target}: expected a directory or a file, got {kind}")

    def _take_off(self, volume: NodeVolume, target: Path) -> tuple[int, bool]:
        """Take the volume's mounts off the target, one by one.

        Return how many there were, and whether nothing is mounted there now; False = one of another volume is.
        """
        taken_off = 0
        while (mounted := self._mounts.at(target)) is not None:
            if not self._ownership.take_off_one(mounted, target, volume):
                return taken_off, False
            taken_off += 1
            self._release_reader(mounted, volume)
        return taken_off, True

    # --- filesystem ---

    def _publish_mount(
        self,
        volume: NodeVolume,
        device: Device,
        staging: Path,
        target: Path,
        access: MountAccess,
        *,
        read_only: bool,
        mode: AccessMode,
    ) -> None:
        staged = self._staged(volume, device, staging)
        if access.fs_type and access.fs_type != staged.fs_type:
            raise PreconditionFailed(f"volume {volume} at {staging}: expected {access.fs_type}, got {staged.fs_type}")
        if staged.read_only and not read_only:
            raise PreconditionFailed(
                f"volume {volume} at {staging}: expected write access, got a read-only mount; stop its readers"
            )
        published = self._ownership.at(target, volume)
        if published is not None:
            self._accept(published, volume, target, device, staged.root, read_only=read_only)
            return
        self._require_alive(staged, volume, read_only=read_only)
        self._require_single(volume, device, mode, staged.root, {staging, staged.path, target})
        self._make_target_directory(volume, target)
        self._mounts.bind(staging, target, read_only=read_only)
        bound = self._mounts.at(target)
        if bound is None or (bound.number, bound.root) != (staged.number, staged.root):
            # Whoever may write on the way to the staging path has put something else there since it was looked at.
            self._mounts.unmount(target)
            raise PreconditionFailed(f"{staging} changed while volume {volume} was being published from it; retry")

    def _publish_joined(self, task: PreparationTask, target: Path, *, deadline: Deadline) -> None:
        """Publish what was staged without a mount, as it joined other readers: by a mount of its own."""
        published = self._ownership.at(target, task.volume)
        if published is None:
            self._make_target_directory(task.volume, target)
            published = self._joining.mount(task, target, deadline=deadline)
            try:
                if published is not None:
                    self._require_alive(published, task.volume, read_only=True)
            except PreconditionFailed:
                self._mounts.unmount(target)
                raise
        if published is None:
            raise PreconditionFailed(f"target path {target}: expected volume {task.volume}, got no mount; retry")
        # Its root is what the filesystem, or an option, makes it: of btrfs any subvolume.
        self._accept(published, task.volume, target, task.device, published.root, read_only=True)

    def _require_alive(self, mounted: Mount, volume: NodeVolume, *, read_only: bool) -> None:
        """Refuse to hand out a filesystem that takes no writes any more, or, to a reader, one that is shut down."""
        dead = self._probes.dead(mounted)
        if dead is not None and not (read_only and dead.kind is FaultKind.TURNED_READ_ONLY):
            raise PreconditionFailed(f"volume {volume} cannot be published: {dead.detail}")

    def _make_target_directory(self, volume: NodeVolume, target: Path) -> None:
        if self._paths.kind(target) == "file":
            self._release_left_over(volume, target)
            self._paths.remove(target)
        self._paths.make_directory(target)

    def _staged(self, volume: NodeVolume, device: Device, staging: Path) -> Mount:
        staged = self._mounts.at(staging)
        if staged is None:
            raise PreconditionFailed(f"volume {volume} is not staged at {staging}: nothing is mounted there")
        if staged.node_number is not None or not self._ownership.is_live(staged, device):
            raise PreconditionFailed(
                f"staging path {staging}: expected volume {volume}, got {self._ownership.describe(staged)}"
            )
        return staged

    def _accept(
        self, published: Mount, volume: NodeVolume, target: Path, device: Device, root: str, *, read_only: bool
    ) -> None:
        found = [] if published.node_number is None else ["access: expected mount, got block"]
        if not published.can_be_of(device):
            if self._ownership.owner_of(published, volume) is not Owner.OURS:
                raise self._held_by_another(published, volume, target)
            found = found or [f"device: expected {device.number}, got {number_of(published)}"]
        elif not found and published.root != root:
            found.append(f"root: expected {root}, got {published.root}")
        self._conclude(found, published, volume, target, read_only=read_only)

    # --- block ---

    def _publish_block(
        self,
        volume: NodeVolume,
        device: Device,
        context: PublishContext | None,
        staging: Path,
        target: Path,
        *,
        read_only: bool,
        mode: AccessMode,
    ) -> None:
        staged = self._mounts.at(staging)
        if staged is not None:
            raise PreconditionFailed(
                f"staging path {staging}: expected no mount (raw block), got {self._ownership.describe(staged)}"
            )
        if self._paths.kind(staging) != "directory":
            raise PreconditionFailed(f"volume {volume} is not staged at {staging}")
        if not device.is_writable and not read_only:
            why = device.write_refusal or "the kernel has it read-only"
            raise PreconditionFailed(f"the device of volume {volume} refuses writes ({why}), expected write access")
        needs_reader = read_only and not device.read_only
        published = self._mounts.at(target)
        if published is not None:
            self._accept_block(published, volume, target, device, needs_reader=needs_reader, read_only=read_only)
            return
        if device.uuid is None:
            # A mount that was staged proves whose it is; of a raw device nothing else does.
            raise IdentityNotProven(device.path, "its storage client says nothing of it")
        self._require_single(volume, device, mode, None, {target})
        if not read_only:
            self._remember_raw(volume, device, context)
        kind = self._paths.kind(target)
        if kind == "file":
            self._release_left_over(volume, target)
        if kind == "directory":
            self._paths.remove(target)
        self._paths.make_file(target)
        source = read_only_device(self._read_only_devices, volume, device, target) if needs_reader else device
        self._mounts.bind(source.path, target, read_only=read_only)

    def _accept_block(
        self,
        published: Mount,
        volume: NodeVolume,
        target: Path,
        device: Device,
        *,
        needs_reader: bool,
        read_only: bool,
    ) -> None:
        found = ["access: expected block, got mount"] if published.node_number is None else []
        if published.can_be_of(device):
            if not found and needs_reader:
                found.append("device: expected a read-only one, got a writable one")
        elif self._ownership.owner_of(published, volume) is not Owner.OURS:
            raise self._held_by_another(published, volume, target)
        elif not found and not needs_reader:
            found.append(f"device: expected {device.number}, got {number_of(published)}")
        elif not found:
            reader = read_only_device(self._read_only_devices, volume, device, target)
            if reader.number != published.node_number:
                self._read_only_devices.release(reader.number)
                found.append(f"device: expected a read-only one over {device.number}, got {published.node_number}")
        self._conclude(found, published, volume, target, read_only=read_only)

    def _remember_raw(self, volume: NodeVolume, device: Device, context: PublishContext | None) -> None:
        """Put on record, before the device is handed out, that its content is no longer ours to judge.

        A format mark would let the next stage format over what is written now; and a blank head and tail would, where
        another handle of the same volume was told that its attachment is the first one, or that it may format.
        """
        uuid = volume.uuid or device.uuid
        if uuid is not None:
            record_use(self._records, uuid, context.attachment if context else 0, RAW)

    def _release_reader(self, taken_off: Mount, volume: NodeVolume) -> None:
        """Take down the read-only device that a publication had of its own; never the volume's device itself."""
        if taken_off.node_number is None or self._encrypted.is_opened(taken_off.node_number):
            return
        device = self._ownership.device_of(volume)
        if device is None or device.number != taken_off.node_number:
            self._read_only_devices.release(taken_off.node_number)

    def _release_left_over(self, volume: NodeVolume, target: Path) -> None:
        """Take down what a crash left of a read-only publication here: made before its bind mount, or not released
        after it; the volume's device may be gone since, and the target another volume's."""
        self._read_only_devices.release_left_over(reader_id(volume, target), volume.name)

    # --- both ---

    def _require_single(
        self, volume: NodeVolume, device: Device, mode: AccessMode, root: str | None, own: set[Path]
    ) -> None:
        """Refuse a second target of a single writer. Only this mode pays for reading the whole mount table.

        `root`: count mounts of that directory of the filesystem only; kubelet binds others for subPath.
        """
        if mode is not AccessMode.SINGLE_NODE_SINGLE_WRITER:
            return
        mounts = [found for found in self._mounts.of_device(device) if root is None or found.root == root]
        mounts = [found for found in mounts if self._ownership.is_live(found, device)]
        # Where kubelet's directory is a shared bind mount, each of its mounts appears under two paths.
        own = own.union(*map(self._mounts.twins, own)) if any(found.path not in own for found in mounts) else own
        for found in mounts:
            if found.path not in own:
                raise PreconditionFailed(
                    f"volume {volume} is for a single writer and is already published at {found.path}"
                )

    def _held_by_another(self, published: Mount, volume: NodeVolume, target: Path) -> PreconditionFailed:
        return PreconditionFailed(
            f"target path {target}: expected volume {volume}, got {self._ownership.describe(published)}"
        )

    @staticmethod
    def _conclude(found: list[str], published: Mount, volume: NodeVolume, target: Path, *, read_only: bool) -> None:
        """Accept what is published, or say how it differs from what was asked."""
        if published.read_only != read_only:
            access = ("read-write", "read-only")
            found = [*found, f"access: expected {access[read_only]}, got {access[published.read_only]}"]
        if found:
            raise ExistsDifferently(f"the publication of volume {volume} at {target}", found)


_ID_LENGTH = 16


def reader_id(volume: NodeVolume, target: Path) -> str:
    """Return the id of the volume's reader at that target. It can be told without the device and without its uuid."""
    told = f"{volume.name}\0{target}"
    return hashlib.sha256(told.encode(errors="surrogateescape")).hexdigest()[:_ID_LENGTH]


def read_only_device(devices: ReadOnlyDevices, volume: NodeVolume, device: Device, target: Path) -> Device:
    """Return the read-only device of one target, which claims the volume's uuid as the volume's own device does."""
    uuid = volume.uuid or device.uuid
    if uuid is None:
        raise PreconditionFailed(
            f"volume {volume} cannot be published read-only: neither its id nor the device tells its uuid"
        )
    return devices.over(device, uuid, reader_id(volume, target))


class SharedReaders:
    """Knows which readers join, and mounts the filesystem for their publications. Only read-only attachments do."""

    def __init__(
        self,
        *,
        mounts: Mounts,
        filesystems: Filesystems,
        paths: Paths,
        ownership: Ownership,
        preparation: Preparation,
        records: UsageRecords,
    ) -> None:
        self._mounts = mounts
        self._filesystems = filesystems
        self._paths = paths
        self._ownership = ownership
        self._preparation = preparation
        self._records = records

    def joins(self, task: PreparationTask) -> bool:
        """Tell whether a volume that is to be staged joins what is mounted of it on this node."""
        if task.uuid is None or not _is_for_readers(task.context):
            return False
        mounts = self._mounts.of_device(task.device)
        return any(found.node_number is None and self._ownership.is_live(found, task.device) for found in mounts)

    def has_joined(self, volume: NodeVolume, context: PublishContext | None, staging: Path) -> bool:
        """Tell whether it was staged as one that joins, and others still have it mounted; no device is touched."""
        if not self.is_staged(volume, context, staging):
            return False
        mounts = (found for found in self._mounts.table() if found.node_number is None)
        return any(self._ownership.name_of(found) == volume.name for found in mounts)

    def is_staged(self, volume: NodeVolume, context: PublishContext | None, staging: Path) -> bool:
        """Tell whether it was staged under its present attachment as one that joins.

        Nothing is mounted there then: the proof is the directory, and the record of use that staging leaves.
        """
        mark = self._records.read(volume.uuid) if volume.uuid is not None else None
        if context is None or not _is_for_readers(context) or mark is None or mark.uncounted:
            return False
        return mark.is_use and mark.is_of(context.attachment) and self._paths.kind(staging) == "directory"

    def plan(self, access: MountAccess, request: NodePublishRequest) -> MountPlan:
        """Return how such a publication is mounted: as its staging was asked for. Raises `InvalidField`."""
        return plan_mount(
            access,
            request.capability.mode,
            read_only=True,
            mkfs=MkfsRequest(request.volume_context),
            supported=self._filesystems.supported(),
            fs_type_of_class=request.volume_context.get(FS_TYPE, ""),
        )

    def mount(self, task: PreparationTask, target: Path, *, deadline: Deadline) -> Mount | None:
        """Mount the filesystem at the target, read-only, and return what is mounted there then."""
        prepared = self._preparation.prepare(task, deadline=deadline)
        options = task.plan.options_for(prepared.fs_type)
        self._mounts.mount(task.device, target, prepared.fs_type, options, read_only=True)
        return self._mounts.at(target)


def _is_for_readers(context: PublishContext | None) -> bool:
    return context is not None and context.read_only and context.attachment > 0
