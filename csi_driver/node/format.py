# SPDX-License-Identifier: Apache-2.0
"""Make a device ready to be mounted: refuse, format, or check and grow it.

Everything that overwrites a device before it is mounted goes through `Preparation`, in one order: claim the device,
read it, decide (`format_policy.decide`), prove every block zero where required, write the usage record, make the
filesystem or LUKS header. The device stays claimed throughout. docs/data-safety.md shows why no data is lost.
"""

from __future__ import annotations

import logging
from contextlib import ExitStack
from dataclasses import dataclass, replace

from csi_driver.deadline import Deadline
from csi_driver.errors import ContentRefused, OperationPending, PreconditionFailed
from csi_driver.host_model import GROWTH_THRESHOLD_BYTES, Device, Mount, OpenDevice
from csi_driver.node.concurrency import HeavyOperations
from csi_driver.node.format_policy import (
    ALLOW_FORMAT,
    AnyFormat,
    Evidence,
    Format,
    FormatAgain,
    FormatOver,
    Refuse,
    Use,
    Verdict,
    decide,
)
from csi_driver.node.mount_owner import NodeVolume, VolumeDevice
from csi_driver.node.ports import Devices, Filesystems, Mounts
from csi_driver.node.usage_records import USED, UsageRecord, UsageRecords, earlier_use, record_use
from csi_driver.parameters.mount_options import MountPlan
from csi_driver.publish_context import History

logger = logging.getLogger(__name__)

BUSY_TIMEOUT_S = 2.0
"""A storage client reads the partition table of a new device in a thread of its own."""


@dataclass(frozen=True, slots=True)
class Prepared:
    """A device that may be mounted; `is_new`: made by this call, `grow_mounted`: to be grown."""

    fs_type: str
    grow_mounted: bool = False
    is_new: bool = False


@dataclass(slots=True, kw_only=True)
class Preparation:
    """Brings a device into the state in which it can be mounted as planned."""

    devices: Devices
    mounts: Mounts
    filesystems: Filesystems
    records: UsageRecords
    heavy: HeavyOperations

    def prepare(self, target: VolumeDevice, plan: MountPlan, *, deadline: Deadline) -> Prepared:
        """Make the device ready. Raises `PreconditionFailed` for content that must not be used."""
        volume = target.volume
        # After a device was open for writing, udev reads it again: so only where a format is likely.
        likely = (volume.context.history is History.FIRST or volume.context.format_allowed) and not plan.read_only
        settled = self._settle(target, plan, write=likely, deadline=deadline)
        if isinstance(settled, Prepared):
            return settled
        if plan.read_only or settled.is_ready:
            return Prepared(settled.fs_type)
        return self._check_and_grow(target.device, settled.fs_type, deadline)

    def record_use(self, target: VolumeDevice, plan: MountPlan, prepared: Prepared) -> None:
        """Record use before the mount: nothing is formatted under this attachment any more."""
        if target.uuid is not None:
            pending = plan.root_mode is not None if prepared.is_new else None
            record_use(self.records, target.uuid, target.volume.context.attachment, USED, root_mode_pending=pending)

    def root_mode_is_pending(self, volume_uuid: str | None, attachment: int) -> bool:
        """Return whether the filesystem is new and its root directory lacks the requested mode."""
        record = self.records.read(volume_uuid) if volume_uuid is not None else None
        return record is not None and record.root_mode_pending and 0 < attachment == record.attachment

    def root_mode_is_set(self, volume_uuid: str | None, attachment: int) -> None:
        """Record that the root directory has its mode; later its user may change it."""
        if self.root_mode_is_pending(volume_uuid, attachment) and volume_uuid is not None:
            record_use(self.records, volume_uuid, attachment, USED)

    def why_outdated(self, volume: NodeVolume) -> str:
        """Return why mounts of the volume are outdated: another node may have written to it."""
        earlier = earlier_use(self.records, volume.uuid, volume.context.attachment)
        if not earlier:
            return ""
        return (
            f"volume {volume} is still mounted under its attachment {earlier}, and this is attachment "
            f"{volume.context.attachment}: it was detached from this node in between; unstage it and stage it again"
        )

    def is_too_small(self, device: Device, fs_type: str) -> bool:
        """Return whether the filesystem should grow to its device."""
        return _is_too_small(self.filesystems.recorded_bytes(device, fs_type), device)

    def evidence(self, volume: NodeVolume, uuid: str | None) -> Evidence:
        """Return the history of the volume as this node knows it."""
        return Evidence(volume.context, self.records.read(uuid) if uuid else None)

    def clear(self, opened: OpenDevice, target: VolumeDevice, verdict: AnyFormat, making: str) -> str:
        """Prove the device blank or wipe it, record the format, and return the volume's UUID.

        The caller holds a slot for heavy operations. `making`: the filesystem or header, for the log.
        """
        volume, uuid = target.volume, _require_identity(opened.device, target)
        if isinstance(verdict, Format) and verdict.prove_every_block:
            self._prove_blank(opened, volume, making)
        self.records.write(UsageRecord(uuid, volume.context.attachment, verdict.fs_type))
        if not isinstance(verdict, Format):
            attachment, found = volume.context.attachment, verdict.found
            logger.warning("volume %s (%s), attachment %d: making %s over %s", volume, uuid, attachment, making, found)
            self.filesystems.wipe(opened)
        return uuid

    def _settle(self, target: VolumeDevice, plan: MountPlan, *, write: bool, deadline: Deadline) -> Use | Prepared:
        """Format the device where that is right. Without `write` it is opened again for that."""
        with ExitStack() as stack:
            claim = self._claim(stack, target.device, write=write, deadline=deadline)
            if not isinstance(claim, OpenDevice):
                if outdated := self.why_outdated(target.volume):
                    raise PreconditionFailed(outdated)
                return _share_mount(claim, target.volume, plan)
            verdict = self._judge(claim, target, plan, deadline)
            match verdict:
                case Refuse(reason=reason):
                    raise ContentRefused(f"volume {target.volume} {reason}")
                case Use(new_uuid=""):
                    return verdict
                case Use(new_uuid=new) if write:
                    self.filesystems.change_btrfs_uuid(claim, new)
                    logger.info(
                        "gave the btrfs of volume %s the UUID %s in place of an inherited one", target.volume, new
                    )
                    return verdict
                case Format() | FormatAgain() | FormatOver() if write:
                    self._format(claim, target, plan, verdict, deadline)
                    return Prepared(verdict.fs_type, is_new=True)
        return self._settle(target, plan, write=True, deadline=deadline)

    def _judge(self, opened: OpenDevice, target: VolumeDevice, plan: MountPlan, deadline: Deadline) -> Verdict:
        uuid = target.volume.uuid or opened.device.uuid
        own_uuid = uuid if self.evidence(target.volume, uuid).expects_own else None
        content = self.filesystems.probe(opened, deadline=deadline, own_uuid=own_uuid)
        evidence = replace(self.evidence(target.volume, uuid), own_uuid=uuid)  # it may be published raw meanwhile
        verdict = decide(content, plan.request, evidence, supported=plan.supported)
        if isinstance(verdict, AnyFormat):
            plan.require_mkfs()
        return verdict

    def _format(
        self, opened: OpenDevice, target: VolumeDevice, plan: MountPlan, verdict: AnyFormat, deadline: Deadline
    ) -> None:
        with self.heavy.slot(f"format volume {target.volume}", deadline=deadline):
            uuid = self.clear(opened, target, verdict, verdict.fs_type)
            self.filesystems.make(opened, verdict.fs_type, plan.mkfs.every, uuid=uuid, asked=plan.mkfs.asked)
        logger.info("formatted volume %s (%s) as %s", target.volume, uuid, verdict.fs_type)

    def _claim(self, stack: ExitStack, device: Device, *, write: bool, deadline: Deadline) -> OpenDevice | list[Mount]:
        """Open the device exclusively; if it is mounted already, return its mounts instead."""
        if mounts := self._live_filesystems(device):
            return mounts
        opened: list[OpenDevice] = []
        refusals: list[PreconditionFailed | OperationPending] = []

        def attempt() -> bool:
            try:
                opened.append(stack.enter_context(self.devices.open(device, write=write, exclusive=True)))
            except (PreconditionFailed, OperationPending) as refusal:
                refusals.append(refusal)
                return False
            return True

        if attempt():
            return opened[0]
        if mounts := self._live_filesystems(device):
            return mounts
        patience = Deadline.after(min(BUSY_TIMEOUT_S, deadline.remaining_s()), deadline.clock)
        if patience.wait_until(attempt):
            return opened[0]
        raise refusals[-1]

    def _live_filesystems(self, device: Device) -> list[Mount]:
        """Return the mounts of the device; an unclaimed device has none, only those of an earlier device."""
        if self.devices.is_claimed(device) is False:
            return []
        return [found for found in self.mounts.of_device(device) if found.node_number is None]

    def _prove_blank(self, opened: OpenDevice, volume: NodeVolume, making: str) -> None:
        """Read every block, without deadline: a large volume would never finish."""

        def log(done_bytes: int, total_bytes: int) -> None:
            logger.info("volume %s: %d of %d bytes read and blank", volume, done_bytes, total_bytes)

        logger.info("reading every block of volume %s before making %s", volume, making)
        with self.heavy.scan():
            offset = self.filesystems.first_data(opened, deadline=None, progress=log)
        if offset is not None:
            raise ContentRefused(
                f"volume {volume} holds unrecognised data, the first at byte {offset}; "
                "it may have been in use before, and only a device that is zero throughout is formatted; "
                f"to format over it, run {ALLOW_FORMAT} and attach it again"
            )

    def _check_and_grow(self, device: Device, fs_type: str, deadline: Deadline) -> Prepared:
        with self.heavy.slot(f"check the {fs_type} of {device.name}", deadline=deadline):
            if not _is_too_small(self.filesystems.check(device, fs_type), device):
                return Prepared(fs_type)
            return Prepared(fs_type, grow_mounted=not self.filesystems.grow_unmounted(device, fs_type))


def _is_too_small(filesystem_bytes: int, device: Device) -> bool:
    return filesystem_bytes + GROWTH_THRESHOLD_BYTES < device.size_bytes


def _share_mount(mounts: list[Mount], volume: NodeVolume, plan: MountPlan) -> Prepared:
    held = next((found for found in mounts if not found.read_only), mounts[0])
    if plan.request.fs_type and held.fs_type != plan.request.fs_type:
        raise PreconditionFailed(f"volume {volume}: expected {plan.request.fs_type}, got {held.fs_type} at {held.path}")
    if held.read_only != plan.read_only:
        have, expected = ("read-only", "read-write") if held.read_only else ("read-write", "read-only")
        raise PreconditionFailed(f"volume {volume}: expected it mounted {expected}, got a {have} mount at {held.path}")
    return Prepared(held.fs_type)


def _require_identity(device: Device, target: VolumeDevice) -> str:
    """Return the volume's UUID. Raises `PreconditionFailed` if identity or size is uncertain."""
    volume = target.volume
    uuid = volume.uuid or device.uuid
    if uuid is None:
        raise PreconditionFailed(f"volume {volume} is not formatted: neither its ID nor its device has its UUID")
    if device.size_bytes < volume.context.size_bytes:
        raise PreconditionFailed(
            f"volume {volume} is not formatted: expected {volume.context.size_bytes} bytes, got {device.size_bytes}"
        )
    return uuid
