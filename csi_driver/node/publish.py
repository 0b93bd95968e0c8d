# SPDX-License-Identifier: Apache-2.0
"""NodePublishVolume and NodeUnpublishVolume, and readers that share one mounted volume."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path

from csi_driver.deadline import Deadline
from csi_driver.errors import ExistsDifferently, IdentityNotProven, PreconditionFailed
from csi_driver.host_model import Device, FaultKind, Mount
from csi_driver.model import AccessMode, BlockAccess, MountAccess
from csi_driver.node import NodePublishRequest, StageRequest
from csi_driver.node.encryption import EncryptedVolumes
from csi_driver.node.format import Preparation
from csi_driver.node.mount_owner import NodeVolume, Owner, Ownership, VolumeDevice, is_same, number_of
from csi_driver.node.ports import Devices, Filesystems, Mounts, Paths, Probes, ReadOnlyDevices
from csi_driver.node.usage_records import RAW, UsageRecords, record_use
from csi_driver.parameters.encryption import encrypted_by
from csi_driver.parameters.mkfs import MkfsRequest
from csi_driver.parameters.mount_options import FS_TYPE, MountPlan, check_mount_group, mount_flags, plan_mount
from csi_driver.reporting import SILENT, EventReason, Reporter, Subject

STAGING_PATH, TARGET_PATH = "staging_target_path", "target_path"
_READER_ID_LENGTH = 16


@dataclass(slots=True, kw_only=True)
class SharedReaders:
    """Readers of one volume under several PersistentVolumes on one node, attached read-only.

    kubelet does not unstage a volume while its filesystem is mounted at a path of another volume (pkg/volume/util
    `HasMountRefs`), so two staging paths over one device would keep each other for ever. Therefore a reader of a
    volume that is mounted on this node already is staged without a mount, and each of its publications is a mount.
    """

    mounts: Mounts
    filesystems: Filesystems
    paths: Paths
    ownership: Ownership
    preparation: Preparation
    records: UsageRecords

    def joins(self, target: VolumeDevice) -> bool:
        """Return whether a volume to be staged is a reader of one that is mounted here."""
        if target.uuid is None or not _is_reader(target.volume):
            return False
        mounts = self.mounts.of_device(target.device)
        return any(found.node_number is None and self.ownership.is_live(found, target.device) for found in mounts)

    def has_joined(self, volume: NodeVolume, staging: Path) -> bool:
        """Return whether the volume is staged without a mount and others still have it mounted."""
        if not self.is_staged(volume, staging):
            return False
        mounts = (found for found in self.mounts.table() if found.node_number is None)
        return any(self.ownership.name_of(found) == volume.name for found in mounts)

    def is_staged(self, volume: NodeVolume, staging: Path) -> bool:
        """Return whether it is staged without a mount, by its directory and usage record."""
        record = self.records.read(volume.uuid) if volume.uuid is not None and _is_reader(volume) else None
        if record is None or record.uncounted:
            return False
        return record.is_use and record.is_of(volume.context.attachment) and self.paths.kind(staging) == "directory"

    def plan(self, access: MountAccess, request: NodePublishRequest, volume: NodeVolume) -> MountPlan:
        """Return how to mount such a publication. Raises `InvalidField`."""
        mkfs = MkfsRequest(request.volume_context)
        return mount_plan(self.filesystems, access, request, volume, mkfs=mkfs, read_only=True)

    def mount(self, target: VolumeDevice, plan: MountPlan, path: Path, *, deadline: Deadline) -> Mount | None:
        """Mount the filesystem read-only and return the mount at the path."""
        prepared = self.preparation.prepare(target, plan, deadline=deadline)
        options = plan.options_for(prepared.fs_type)
        self.mounts.mount(target.device, path, prepared.fs_type, options, read_only=True)
        return self.mounts.at(path)


def mount_plan(
    filesystems: Filesystems,
    access: MountAccess,
    request: StageRequest | NodePublishRequest,
    volume: NodeVolume,
    *,
    mkfs: MkfsRequest,
    read_only: bool,
) -> MountPlan:
    """Return how to mount the volume for a request. Raises `InvalidField`."""
    fs_type_of_class = request.volume_context.get(FS_TYPE, "")
    return plan_mount(
        access,
        request.capability.mode,
        read_only=read_only,
        mkfs=mkfs,
        supported=filesystems.supported(access.fs_type or fs_type_of_class),
        fs_type_of_class=fs_type_of_class,
        private_copy=volume.context.private_copy,
    )


@dataclass(slots=True, kw_only=True)
class Publish:
    """Publishes and unpublishes volumes. Every call can be repeated, also after a crash."""

    devices: Devices
    read_only_devices: ReadOnlyDevices
    mounts: Mounts
    paths: Paths
    probes: Probes
    records: UsageRecords
    ownership: Ownership
    preparation: Preparation
    encrypted: EncryptedVolumes
    shared_readers: SharedReaders
    reporter: Reporter = SILENT

    def publish(self, request: NodePublishRequest, *, deadline: Deadline) -> None:
        """Publish the volume. Raises `PreconditionFailed`, `ExistsDifferently`."""
        volume = NodeVolume.of_request(request.volume_id, request.publish_context)
        if not request.staging_target_path:
            raise PreconditionFailed(f"{STAGING_PATH} is not set: stage volume {volume} before it is published")
        target = self.paths.check(request.target_path, TARGET_PATH)
        staging = self.paths.check(request.staging_target_path, STAGING_PATH)
        device = self.devices.find(volume.name, volume.uuid)
        if device is None:
            raise PreconditionFailed(f"volume {volume} has no device on this node: it is not attached or not ready")
        if not is_same(device.uuid, volume.uuid):
            raise PreconditionFailed(f"the device of volume {volume} claims {device.uuid}, expected {volume.uuid}")
        # From here on only the opened device of an encrypted volume is used.
        device = self.encrypted.in_use(volume, device, encrypted_by(volume.given_context, request.volume_context))
        mode = request.capability.mode
        read_only = request.read_only or mode.is_read_only or volume.context.read_only
        match request.capability.access:
            case MountAccess() as access:
                check_mount_group(access)
                flags, _ = mount_flags(access.mount_flags)
                if outdated := self.preparation.why_outdated(volume):
                    raise PreconditionFailed(outdated)
                staged = self.mounts.at(staging)
                if staged is None and self.shared_readers.is_staged(volume, staging):
                    plan = self.shared_readers.plan(access, request, volume)
                    self._publish_shared(VolumeDevice(volume, device, read_only=True), plan, target, deadline=deadline)
                    return
                use = VolumeDevice(volume, device, read_only or "ro" in flags)
                self._publish_mount(use, staged, staging, target, access, mode)
            case BlockAccess():
                self._publish_block(VolumeDevice(volume, device, read_only), staging, target, mode)

    def unpublish(self, volume_id: str, target_path: str, *, deadline: Deadline) -> None:
        """Unmount the volume and remove the target path if nothing else is mounted there."""
        target = self.paths.check(target_path, TARGET_PATH, takes_off=True)
        volume = NodeVolume.parse(volume_id)
        if volume is None:
            return
        try:
            mounted, was_mounted = self._unmount(volume, target)
        except PreconditionFailed as busy:
            self.reporter.report(Subject(volume_id=volume_id), EventReason.VOLUME_IN_USE, f"volume {volume}: {busy}")
            raise
        if not was_mounted:  # a repeated call, or a crash: only these pay for looking at all loop devices
            self._release_left_over(volume, target)
        if mounted is not None:
            return
        kind = self.paths.kind(target)
        if kind in ("directory", "file"):
            self.paths.remove(target)
        elif kind != "absent":
            raise PreconditionFailed(f"target path {target}: expected a directory or a file, got {kind}")

    def _unmount(self, volume: NodeVolume, target: Path) -> tuple[Mount | None, bool]:
        """Unmount the volume; return the mount of another one there, and whether the volume was mounted."""
        was_mounted = False
        while (mounted := self.mounts.at(target)) is not None and self.ownership.unmount_one(mounted, target, volume):
            self._release_reader(mounted, volume)
            was_mounted = True
        return mounted, was_mounted

    def _publish_mount(
        self,
        use: VolumeDevice,
        staged: Mount | None,
        staging: Path,
        target: Path,
        access: MountAccess,
        mode: AccessMode,
    ) -> None:
        volume, read_only = use.volume, use.read_only
        if staged is None:
            raise PreconditionFailed(f"volume {volume} is not staged at {staging}: nothing is mounted there")
        if staged.node_number is not None or not self.ownership.is_live(staged, use.device):
            raise self.ownership.held_by_another(f"staging path {staging}", volume, staged)
        if access.fs_type and access.fs_type != staged.fs_type:
            raise PreconditionFailed(f"volume {volume} at {staging}: expected {access.fs_type}, got {staged.fs_type}")
        if staged.read_only and not read_only:
            raise PreconditionFailed(
                f"volume {volume} at {staging}: expected write access, got a read-only mount; stop its readers"
            )
        published = self.ownership.at(target, volume)
        if published is not None:
            self._accept(published, use, target, staged.root)
            return
        self._require_alive(staged, use)
        self._require_single(use, mode, staged.root, {staging, staged.path, target})
        self._make_target_directory(volume, target)
        self.mounts.bind(staging, target, read_only=read_only)
        bound = self.mounts.at(target)
        if bound is None or (bound.number, bound.root) != (staged.number, staged.root):
            # A program that may write to a parent directory of the staging path replaced it meanwhile.
            self.mounts.unmount(target)
            raise PreconditionFailed(f"{staging} changed while volume {volume} was being published from it; retry")

    def _publish_shared(self, use: VolumeDevice, plan: MountPlan, target: Path, *, deadline: Deadline) -> None:
        published = self.ownership.at(target, use.volume)
        if published is None:
            self._make_target_directory(use.volume, target)
            published = self.shared_readers.mount(use, plan, target, deadline=deadline)
            try:
                if published is not None:
                    self._require_alive(published, use)
            except PreconditionFailed:
                self.mounts.unmount(target)
                raise
        if published is None:
            raise PreconditionFailed(f"target path {target}: expected volume {use.volume}, got no mount; retry")
        # The filesystem or a mount option chooses its root: for btrfs any subvolume.
        self._accept(published, use, target, published.root)

    def _require_alive(self, mounted: Mount, use: VolumeDevice) -> None:
        """Refuse to publish a filesystem that takes no writes, or is shut down."""
        dead = self.probes.dead(mounted)
        if dead is not None and not (use.read_only and dead.kind is FaultKind.TURNED_READ_ONLY):
            raise PreconditionFailed(f"volume {use.volume} cannot be published: {dead.detail}")

    def _make_target_directory(self, volume: NodeVolume, target: Path) -> None:
        try:
            self.paths.make_directory(target)
        except PreconditionFailed:
            if self.paths.kind(target) != "file":
                raise
            self._release_left_over(volume, target)
            self.paths.remove(target)
            self.paths.make_directory(target)

    def _accept(self, published: Mount, use: VolumeDevice, target: Path, root: str) -> None:
        found = [] if published.node_number is None else ["access: expected mount, got block"]
        if not published.can_be_of(use.device):
            if self.ownership.owner_of(published, use.volume) is not Owner.OURS:
                raise self.ownership.held_by_another(f"target path {target}", use.volume, published)
            found = found or [f"device: expected {use.device.number}, got {number_of(published)}"]
        elif not found and published.root != root:
            found.append(f"root: expected {root}, got {published.root}")
        self._conclude(found, published, use, target)

    def _publish_block(self, use: VolumeDevice, staging: Path, target: Path, mode: AccessMode) -> None:
        volume, device, read_only = use.volume, use.device, use.read_only
        staged = self.mounts.at(staging)
        if staged is not None:
            raise PreconditionFailed(
                f"staging path {staging}: expected no mount, got {self.ownership.describe(staged)}"
            )
        if self.paths.kind(staging) != "directory":
            raise PreconditionFailed(f"volume {volume} is not staged at {staging}")
        if not device.is_writable and not read_only:
            raise writes_refused(volume, device)
        needs_reader = read_only and not device.read_only
        published = self.mounts.at(target)
        if published is not None:
            self._accept_block(published, use, target, needs_reader=needs_reader)
            return
        if device.uuid is None:
            # The mount of a staged filesystem proves its volume; nothing else does that for a raw device.
            raise IdentityNotProven(device.path, "its storage client has no status of it")
        self._require_single(use, mode, None, {target})
        if not read_only and use.uuid is not None:
            # Once the device can be written to, a blank head and tail prove nothing, also under another handle's first
            # attachment, and no begun format may be repeated.
            record_use(self.records, use.uuid, volume.context.attachment, RAW)
        kind = self.paths.kind(target)
        if kind == "file":
            self._release_left_over(volume, target)
        if kind == "directory":
            self.paths.remove(target)
        self.paths.make_file(target)
        source = read_only_device(self.read_only_devices, volume, device, target) if needs_reader else device
        self.mounts.bind(source.path, target, read_only=read_only)

    def _accept_block(self, published: Mount, use: VolumeDevice, target: Path, *, needs_reader: bool) -> None:
        volume, device = use.volume, use.device
        found = ["access: expected block, got mount"] if published.node_number is None else []
        if published.can_be_of(device):
            if not found and needs_reader:
                found.append("device: expected a read-only one, got a writable one")
        elif self.ownership.owner_of(published, volume) is not Owner.OURS:
            raise self.ownership.held_by_another(f"target path {target}", volume, published)
        elif not found and not needs_reader:
            found.append(f"device: expected {device.number}, got {number_of(published)}")
        elif not found:
            reader = read_only_device(self.read_only_devices, volume, device, target)
            if reader.number != published.node_number:
                self.read_only_devices.release(reader.number)
                found.append(f"device: expected a read-only one over {device.number}, got {published.node_number}")
        self._conclude(found, published, use, target)

    def _release_reader(self, unmounted: Mount, volume: NodeVolume) -> None:
        if unmounted.node_number is None or self.encrypted.is_opened(unmounted):
            return
        device = self.ownership.device_of(volume)
        if device is None or device.number != unmounted.node_number:
            self.read_only_devices.release(unmounted.node_number)

    def _release_left_over(self, volume: NodeVolume, target: Path) -> None:
        """Remove a read-only device of this target that a crash left."""
        self.read_only_devices.release_left_over(_reader_id(volume, target), volume.name)

    def _require_single(self, use: VolumeDevice, mode: AccessMode, root: str | None, own: set[Path]) -> None:
        """Refuse a second target of a single writer. `root`: only mounts of this directory."""
        if mode is not AccessMode.SINGLE_NODE_SINGLE_WRITER:
            return
        mounts = [found for found in self.mounts.of_device(use.device) if root is None or found.root == root]
        mounts = [found for found in mounts if self.ownership.is_live(found, use.device)]
        # Where kubelet's directory is a shared bind mount, each of its mounts appears under two paths.
        own = own.union(*map(self.mounts.twins, own)) if any(found.path not in own for found in mounts) else own
        for found in mounts:
            if found.path not in own:
                raise PreconditionFailed(f"single-writer volume {use.volume} is already published at {found.path}")

    @staticmethod
    def _conclude(found: list[str], published: Mount, use: VolumeDevice, target: Path) -> None:
        if published.read_only != use.read_only:
            access = ("read-write", "read-only")
            found = [*found, f"access: expected {access[use.read_only]}, got {access[published.read_only]}"]
        if found:
            raise ExistsDifferently(f"the publication of volume {use.volume} at {target}", found)


def read_only_device(devices: ReadOnlyDevices, volume: NodeVolume, device: Device, target: Path) -> Device:
    """Return the read-only device over a volume's device for one target."""
    uuid = volume.uuid or device.uuid
    if uuid is None:
        raise PreconditionFailed(f"the uuid of volume {volume}, which it needs to be published read-only, is not known")
    return devices.over(device, uuid, _reader_id(volume, target))


def writes_refused(volume: NodeVolume, device: Device) -> PreconditionFailed:
    """Return the error for a device that takes no writes."""
    why = device.write_refusal or "the kernel has it read-only"
    return PreconditionFailed(f"the device of volume {volume} refuses writes ({why}), expected write access")


def _reader_id(volume: NodeVolume, target: Path) -> str:
    text = f"{volume.name}\0{target}"
    return hashlib.sha256(text.encode(errors="surrogateescape")).hexdigest()[:_READER_ID_LENGTH]


def _is_reader(volume: NodeVolume) -> bool:
    return volume.context.read_only and volume.context.attachment > 0
