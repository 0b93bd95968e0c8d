"""Make a device ready to be mounted: look at what it holds; refuse, format, or check and grow it.

Everything that can destroy data is in this module, in one order: claim the device for ourselves, read it, decide
(`content.decide`), prove it where that is asked, set the mark, make the filesystem. The claim is held throughout.
The argument why nothing is lost by it, sentence by sentence with its tests, is docs/data-safety.md.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass

from csi_driver.deadline import Deadline
from csi_driver.errors import OperationPending, PreconditionFailed
from csi_driver.host_model import Device, Mount, OpenDevice
from csi_driver.node.concurrency import HeavyOperations
from csi_driver.node.format_policy import (
    ALLOW_FORMAT,
    Evidence,
    Format,
    FormatAgain,
    FormatOver,
    Refuse,
    Use,
    Verdict,
    decide,
)
from csi_driver.node.mount_owner import NodeVolume
from csi_driver.node.ports import Devices, Filesystems, Mounts
from csi_driver.node.usage_records import USED, UsageRecord, UsageRecords, earlier_use, record_use
from csi_driver.parameters.mount_options import MountPlan
from csi_driver.publish_context import History, PublishContext

logger = logging.getLogger(__name__)

BUSY_PATIENCE_S = 2.0
"""A storage client reads the partition table of a fresh device in a thread of its own; the claim waits that long."""

GROWTH_SLACK_BYTES = 8 << 20
"""A filesystem is grown when it is smaller than its device by more than this.

ext4 leaves out a last block group that its own tables would fill (at most 6.2 MiB with 4 KiB blocks), xfs a last
allocation group below 64 blocks: without the slack both would be "grown" again at every stage.
"""


@dataclass(frozen=True, slots=True)
class PreparationTask:
    """What is to be prepared: a volume's device, as the plan wants it, with what the controller told of it."""

    volume: NodeVolume
    device: Device
    plan: MountPlan
    context: PublishContext | None

    @property
    def history(self) -> History:
        return self.context.history if self.context else History.UNKNOWN

    @property
    def attachment(self) -> int:
        return self.context.attachment if self.context else 0

    @property
    def format_allowed(self) -> bool:
        return self.context is not None and self.context.format_allowed

    @property
    def uuid(self) -> str | None:
        """The volume's uuid; None where neither its id nor its device tells it."""
        return self.volume.uuid or self.device.uuid


@dataclass(frozen=True, slots=True)
class Prepared:
    """A device that may be mounted. `grow_mounted`: its filesystem is too small and grows only while mounted.

    `is_new`: the filesystem was made by this call.
    """

    fs_type: str
    grow_mounted: bool = False
    is_new: bool = False


class Preparation:
    """Brings a device into the state in which it can be mounted as planned."""

    def __init__(
        self,
        *,
        devices: Devices,
        mounts: Mounts,
        filesystems: Filesystems,
        records: UsageRecords,
        heavy: HeavyOperations,
    ) -> None:
        self._devices = devices
        self._mounts = mounts
        self._filesystems = filesystems
        self._records = records
        self._heavy = heavy

    def prepare(self, task: PreparationTask, *, deadline: Deadline) -> Prepared:
        """Return when the device can be mounted. Raises `PreconditionFailed` where it holds what may not be used."""
        # Opening for writing and closing makes udev read the device again: only where a format is likely.
        likely = (task.history is History.FIRST or task.format_allowed) and not task.plan.read_only
        settled = self._settle(task, write=likely, deadline=deadline)
        if isinstance(settled, Prepared):
            return settled
        if task.plan.read_only:
            return Prepared(settled.fs_type)
        return self._check_and_grow(task.device, settled.fs_type, deadline)

    def hand_over(self, task: PreparationTask, prepared: Prepared) -> None:
        """Put on record, before the mount, that what the device holds is its user's from now on.

        Nothing may be formatted under this attachment from here on, and nothing that was mounted under it may be used
        under a later one.
        """
        if task.uuid is not None:
            pending = task.plan.root_mode is not None if prepared.is_new else None
            record_use(self._records, task.uuid, task.attachment, USED, root_mode_pending=pending)

    def root_mode_is_pending(self, volume_uuid: str | None, attachment: int) -> bool:
        """Tell whether the filesystem was made under this attachment, and its root directory still lacks its mode."""
        mark = self._records.read(volume_uuid) if volume_uuid is not None else None
        return mark is not None and mark.root_mode_pending and 0 < attachment == mark.attachment

    def root_mode_is_set(self, volume_uuid: str | None, attachment: int) -> None:
        """Record that the root directory has its mode, which is its user's from now on."""
        if self.root_mode_is_pending(volume_uuid, attachment) and volume_uuid is not None:
            record_use(self._records, volume_uuid, attachment, USED)

    def outlived(self, volume: NodeVolume, attachment: int) -> str:
        """Say why what is mounted of the volume may not be used under this attachment; empty = it may.

        Another node may have written to the volume since, and this kernel may hold back what it wrote before.
        """
        earlier = earlier_use(self._records, volume.uuid, attachment)
        said = f"volume {volume} is still mounted under its attachment {earlier}, and this is attachment {attachment}"
        return f"{said}; it was taken from this node in between: unmount it everywhere first" * bool(earlier)

    def is_too_small(self, device: Device, fs_type: str) -> bool:
        """Tell whether the filesystem leaves so much of its device unused that it is to be grown."""
        return self._filesystems.recorded_bytes(device, fs_type) + GROWTH_SLACK_BYTES < device.size_bytes

    def _settle(self, task: PreparationTask, *, write: bool, deadline: Deadline) -> Use | Prepared:
        """Look at what the device holds and format it where that is right; without `write`, open it again for that."""
        with ExitStack() as stack:
            claim = self._claim(stack, task.device, write=write, deadline=deadline)
            if not isinstance(claim, OpenDevice):
                outlived = self.outlived(task.volume, task.attachment)
                if outlived:
                    raise PreconditionFailed(outlived)
                return _join(claim, task)
            verdict = self._judge(claim, task, deadline)
            match verdict:
                case Refuse(reason=reason):
                    raise PreconditionFailed(f"volume {task.volume} {reason}")
                case Use():
                    return verdict
                case Format() | FormatAgain() | FormatOver() if write:
                    self._format(claim, task, verdict, deadline)
                    return Prepared(verdict.fs_type, is_new=True)
        return self._settle(task, write=True, deadline=deadline)

    def _judge(self, opened: OpenDevice, task: PreparationTask, deadline: Deadline) -> Verdict:
        uuid = task.volume.uuid or opened.device.uuid
        content = self._filesystems.probe(opened, deadline=deadline)
        evidence = Evidence(
            history=task.history,
            attachment=task.attachment,
            mark=self._records.read(uuid) if uuid else None,
            own_uuid=uuid,
            format_allowed=task.format_allowed,
        )
        verdict = decide(content, task.plan.request, evidence, supported=self._filesystems.supported())
        if isinstance(verdict, Format | FormatAgain | FormatOver):
            task.plan.require_mkfs()
        return verdict

    def _format(
        self, opened: OpenDevice, task: PreparationTask, verdict: Format | FormatAgain | FormatOver, deadline: Deadline
    ) -> None:
        uuid = _proven_uuid(opened.device, task)
        how = "for the first time"
        with self._heavy.place(f"format volume {task.volume}", deadline=deadline):
            match verdict:
                case Format(prove_every_block=True):
                    self._prove_blank(opened, task.volume)
                case FormatAgain():
                    how = "again, after one left unfinished"
                case FormatOver(found=found):
                    how = f"over what was there, which was allowed for attachment {task.attachment}: {found}"
            self._records.write(UsageRecord(uuid, task.attachment, verdict.fs_type))
            if not isinstance(verdict, Format):
                logger.warning("volume %s (%s) is now formatted %s", task.volume, uuid, how)
                self._filesystems.wipe(opened)
            mkfs = task.plan.mkfs
            self._filesystems.make(opened, verdict.fs_type, mkfs.every, uuid=uuid, asked=mkfs.asked)
        logger.info("formatted volume %s (%s) as %s %s", task.volume, uuid, verdict.fs_type, how)

    def _claim(self, stack: ExitStack, device: Device, *, write: bool, deadline: Deadline) -> OpenDevice | list[Mount]:
        """Open the device for ourselves alone; where it is mounted already, return its mounts instead.

        Mounts that the table shows of a device that nothing claims are of one that had its number before.
        """
        if mounts := self._filesystems_of(device):
            return mounts
        opened: list[OpenDevice] = []
        refusals: list[PreconditionFailed | OperationPending] = []

        def attempt() -> bool:
            try:
                opened.append(stack.enter_context(self._devices.open(device, write=write, exclusive=True)))
            except (PreconditionFailed, OperationPending) as refusal:
                refusals.append(refusal)
                return False
            return True

        if attempt():
            return opened[0]
        if mounts := self._filesystems_of(device):
            return mounts
        patience = Deadline.after(min(BUSY_PATIENCE_S, deadline.remaining_s()), deadline.clock)
        if patience.wait_until(attempt):
            return opened[0]
        raise refusals[-1]

    def _filesystems_of(self, device: Device) -> list[Mount]:
        mounts = [found for found in self._mounts.of_device(device) if found.node_number is None]
        return mounts if mounts and self._devices.is_claimed(device) is not False else []

    def _prove_blank(self, opened: OpenDevice, volume: NodeVolume) -> None:
        """Read every block. It takes no deadline: a large volume would never be done, and a retry finds it at work."""
        logger.info("reading every block of volume %s before it is formatted", volume)
        with self._heavy.reading():
            offset = self._filesystems.first_data(opened, deadline=None, progress=_progress_of(volume))
        if offset is not None:
            raise PreconditionFailed(
                f"volume {volume} holds unrecognised data, the first at byte {offset}; "
                "it may have been in use before, and only a device that is zero throughout is formatted; "
                f"to format over it, run {ALLOW_FORMAT} and attach it again"
            )

    def _check_and_grow(self, device: Device, fs_type: str, deadline: Deadline) -> Prepared:
        with self._heavy.place(f"check the {fs_type} of {device.name}", deadline=deadline):
            self._filesystems.check(device, fs_type)
            if not self.is_too_small(device, fs_type):
                return Prepared(fs_type)
            return Prepared(fs_type, grow_mounted=not self._filesystems.grow_unmounted(device, fs_type))


def _join(mounts: list[Mount], task: PreparationTask) -> Prepared:
    """Decide whether a volume that is mounted on this node can be mounted once more: one filesystem, one access."""
    plan, volume = task.plan, task.volume
    there = next((found for found in mounts if not found.read_only), mounts[0])
    if plan.request.fs_type and there.fs_type != plan.request.fs_type:
        raise PreconditionFailed(
            f"volume {volume}: expected {plan.request.fs_type}, got a mount of {there.fs_type} at {there.path}"
        )
    if there.read_only != plan.read_only:
        have, wanted = ("read-only", "read-write") if there.read_only else ("read-write", "read-only")
        raise PreconditionFailed(f"volume {volume}: expected it mounted {wanted}, got a {have} mount at {there.path}")
    return Prepared(there.fs_type)


def _proven_uuid(device: Device, task: PreparationTask) -> str:
    """Return the uuid under which the device may be formatted; no format without identity and size being sure."""
    uuid = task.volume.uuid or device.uuid
    if uuid is None:
        raise PreconditionFailed(
            f"volume {task.volume} is blank and not formatted: neither its id nor the device tells its uuid"
        )
    wanted = task.context.size_bytes if task.context else 0
    if device.size_bytes < wanted:
        raise PreconditionFailed(
            f"volume {task.volume} is not formatted: expected a device of {wanted} bytes, got {device.size_bytes}"
        )
    return uuid


def _progress_of(volume: NodeVolume) -> Callable[[int, int], None]:
    def log(done_bytes: int, total_bytes: int) -> None:
        logger.info("volume %s: %d of %d bytes read and blank", volume, done_bytes, total_bytes)

    return log
