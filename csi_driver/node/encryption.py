"""Encrypted volumes: which device of one is used, and how it is opened, grown and closed.

What is used of an encrypted volume is the opened device over its own, and no use-case gets any other: the plain device
is neither mounted nor published. A header is made only where a filesystem would be, by the same rules
(`content.decide`); a passphrase that does not open what is there is refused and never answered with a new header.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from csi_driver.compat.volumes import passphrase_readings
from csi_driver.deadline import Deadline
from csi_driver.errors import Denied, HostFailure, MissingField, PreconditionFailed
from csi_driver.host_model import (
    LUKS_SUBSYSTEM,
    DamagedHeader,
    Device,
    DeviceNumber,
    LuksHeader,
    LuksMapping,
    OpenDevice,
)
from csi_driver.node.concurrency import HeavyOperations
from csi_driver.node.format_policy import Evidence, Format, FormatAgain, FormatOver, Refuse, Verdict, decide
from csi_driver.node.mount_owner import NodeVolume, is_cut_off
from csi_driver.node.ports import Devices, Encryption, Filesystems, Mounts
from csi_driver.node.usage_records import LUKS, UsageRecord, UsageRecords
from csi_driver.parameters.encryption import PASSPHRASE_KEYS, PREVIOUS_KEY, EncryptionPlan, passphrase_in
from csi_driver.parameters.mount_options import FilesystemRequest
from csi_driver.publish_context import Encryption as By
from csi_driver.publish_context import History, PublishContext

logger = logging.getLogger(__name__)

SHARED_WAY_OUT = "stage it for one node alone first, or let the storage encrypt it (encryption: native)"
_ONLY_OURS = frozenset(History) - {History.UNKNOWN}
"""What tells that the volume was made by this driver, so that nobody else has put a header on it."""


@dataclass(frozen=True, slots=True)
class LockedVolume:
    """A volume that is to be opened: its own device, who encrypts it and how, and what the controller told of it.

    `is_shared`: other nodes may write to it at the same time, and nothing keeps two of them from making its header.
    """

    volume: NodeVolume
    device: Device
    plan: EncryptionPlan
    context: PublishContext | None
    read_only: bool
    is_shared: bool = False

    @property
    def uuid(self) -> str | None:
        return self.volume.uuid or self.device.uuid

    @property
    def may_write_header(self) -> bool:
        return self.plan.by is By.LUKS and not self.read_only and not self.is_shared


class EncryptedVolumes:
    """Opens and closes. The kernel and the header are the only state; every step may be repeated after a crash."""

    def __init__(
        self,
        *,
        devices: Devices,
        encryption: Encryption,
        mounts: Mounts,
        filesystems: Filesystems,
        records: UsageRecords,
        heavy: HeavyOperations,
    ) -> None:
        self._devices = devices
        self._encryption = encryption
        self._mounts = mounts
        self._filesystems = filesystems
        self._records = records
        self._heavy = heavy

    # --- what is used of a volume ---

    def in_use(self, volume: NodeVolume, device: Device, by: By) -> Device:
        """Return what of a staged volume is used: the device itself, or, of an encrypted volume, the opened one.

        Raises `PreconditionFailed` when an encrypted volume is not open, and when one that nobody encrypts is.
        """
        opened = self.opened_over(volume, device)
        if by is By.NONE:
            if opened is not None:
                raise PreconditionFailed(
                    f"volume {volume} is to be used unencrypted but is open as an encrypted device: {opened.path}"
                )
            return device
        if opened is None:
            raise PreconditionFailed(
                f"encrypted volume {volume} is not open on this node: it must be staged before it is published"
            )
        return opened

    def opened_over(self, volume: NodeVolume, device: Device) -> Device | None:
        """Return the opened device over the volume's own; None when it is not open."""
        mapping = self._encryption.mapping(volume.name)
        if mapping is None or not mapping.is_encryption or mapping.below != device.number or not mapping.size_bytes:
            return None
        if self._devices.is_claimed(device) is False:
            return None  # it lies over a disk that had the device's name and number before
        return self._encryption.device(mapping, volume.uuid or device.uuid)

    def is_opened(self, number: DeviceNumber) -> bool:
        """Tell whether a device is the opened one of some encrypted volume."""
        return self._encryption.below(number) is not None

    def require_plain(self, volume: NodeVolume, device: Device) -> None:
        """Refuse to hand out, as it is, what this driver encrypted: its header would be overwritten."""
        self.in_use(volume, device, By.NONE)
        with self._devices.open(device) as opened:
            header = self._encryption.header(opened)
        if isinstance(header, LuksHeader) and header.subsystem == LUKS_SUBSYSTEM:
            raise PreconditionFailed(
                f"volume {volume} is to be used unencrypted but holds the LUKS header that this driver made"
            )

    # --- opening ---

    def open(self, task: LockedVolume, *, deadline: Deadline) -> tuple[Device, PublishContext | None]:
        """Open the volume, with a new header where it has none and may get one; open already is success.

        Return the opened device, and the context as it holds for that one.
        Raises `Denied` when no passphrase given opens it, `PreconditionFailed` when what it holds, or this machine,
        forbids it.
        """
        # Before a header is made, which takes long: without device-mapper nothing could use it.
        problem = self._encryption.why_unusable()
        if problem:
            raise PreconditionFailed(f"encrypted volume {task.volume} cannot be opened on this node: {problem}")
        with self._heavy.place(f"open the encryption of volume {task.volume}", deadline=deadline):
            mapping = self._present(task)
            if mapping is None:
                # Opening for writing and closing makes udev read the device again: only where it is likely of use.
                is_first = task.context is not None and task.context.history is History.FIRST
                likely = is_first or bool(task.plan.previous)
                header = self._unlock(task, write=likely and task.may_write_header, deadline=deadline)
            else:
                header = self._join(task, mapping)
        mapping = self._encryption.mapping(task.volume.name)
        if mapping is None or mapping.below != task.device.number or not mapping.is_of(header):
            raise PreconditionFailed(
                f"{self._encryption.path_of(task.volume.name)}: expected volume {task.volume}, got another device"
            )
        device = self._encryption.device(mapping, task.uuid)
        if task.context is None:
            return device, None
        inner_bytes = max(0, task.context.size_bytes - header.data_offset_bytes)
        return device, replace(task.context, size_bytes=inner_bytes)

    def _present(self, task: LockedVolume) -> LuksMapping | None:
        """Return what is open under the volume's name, if it can stay; what a crash left half open is taken down."""
        mapping = self._encryption.mapping(task.volume.name)
        if mapping is None:
            return None
        path = self._encryption.path_of(task.volume.name)
        if not mapping.is_encryption:
            raise PreconditionFailed(
                f"{path}: expected the encrypted device of volume {task.volume}, got another mapped device"
            )
        is_dead = not mapping.size_bytes or mapping.below is None or not self._devices.size_bytes(mapping.below)
        if mapping.below == task.device.number and self._devices.is_claimed(task.device) is False:
            is_dead = True  # what it lies over claims nothing: a disk that had its name and number before
        if is_dead:
            self._encryption.close(mapping)
            return None
        if mapping.below != task.device.number:
            raise PreconditionFailed(
                f"{path}: expected it over device {task.device.number}, got {mapping.below}; it is open for another "
                "volume, or left over: close it when nothing uses it"
            )
        if mapping.is_suspended:
            self._encryption.resume(mapping)
        if mapping.read_only == task.read_only or self._is_mounted(mapping):
            self._require_access(mapping, task)
            return mapping
        self._encryption.close(mapping)
        return None

    @staticmethod
    def _require_access(mapping: LuksMapping, task: LockedVolume) -> None:
        if mapping.read_only and not task.read_only:
            raise PreconditionFailed(
                f"volume {task.volume}: expected write access, got an encrypted device that is open read-only"
            )

    def _join(self, task: LockedVolume, mapping: LuksMapping) -> LuksHeader:
        """Use what is open already, when it is this volume and the passphrase is right; let it take a new size."""
        with self._devices.open(task.device) as opened:
            header = self._encryption.header(opened)
            if not isinstance(header, LuksHeader) or not mapping.is_of(header):
                raise PreconditionFailed(
                    f"{self._encryption.path_of(mapping.name)} was not opened by the header of volume {task.volume}"
                )
            passphrase = self._first_fitting(opened, task.plan.passphrases)
        if passphrase is None:
            raise _denied(task.volume)
        if mapping.size_bytes + header.data_offset_bytes < task.device.size_bytes and not mapping.read_only:
            self._encryption.resize(mapping, passphrase)
        return header

    def _unlock(self, task: LockedVolume, *, write: bool, deadline: Deadline) -> LuksHeader:
        """Open the volume's device; without `write`, its device is opened again where a header is to be made."""
        with self._devices.open(task.device, write=write, exclusive=True) as opened:
            header = self._encryption.header(opened)
            verdict = self._judge(opened, header, task, deadline)
            match verdict:
                case Refuse(reason=reason):
                    raise PreconditionFailed(f"volume {task.volume} {reason}")
                case LuksHeader():
                    return self._open_with(opened, verdict, task, may_write=write)
                case _ if write:
                    made = self._make(opened, task, verdict)
                    return self._open_with(opened, made, task, may_write=write)
        return self._unlock(task, write=True, deadline=deadline)

    def _open_with(self, opened: OpenDevice, header: LuksHeader, task: LockedVolume, *, may_write: bool) -> LuksHeader:
        self._forget_half_made(task)
        passphrase = self._fitting(opened, header, task, may_write=may_write)
        discards = task.plan.allow_discards
        self._encryption.open(opened, passphrase, read_only=task.read_only, allow_discards=discards)
        return header

    def _judge(
        self, opened: OpenDevice, header: LuksHeader | DamagedHeader | None, task: LockedVolume, deadline: Deadline
    ) -> LuksHeader | Verdict:
        """Decide what to do with what the device holds: use the header, make one, or refuse."""
        evidence = self._evidence(task)
        refusal = ""
        if isinstance(header, LuksHeader):
            if header.subsystem == LUKS_SUBSYSTEM and header.label != task.uuid:
                refusal = f"the LUKS header of volume {header.label}"
            elif task.plan.by is By.LUKS and header.subsystem != LUKS_SUBSYSTEM and evidence.history in _ONLY_OURS:
                refusal = "a LUKS header that was not made for it (leftover data of another volume)"
            elif header.key_slots:
                return header
            elif evidence.begun == LUKS and task.may_write_header:
                return FormatAgain(LUKS)
            else:
                refusal = "a LUKS header without a key, which nothing can open"
        if task.plan.by is By.NATIVE:
            refusal = refusal or ("a damaged LUKS header" if header is not None else "no LUKS header")
            return Refuse(
                f"holds {refusal}; expected the LUKS header that the storage made when it initialised the volume"
            )
        if refusal:
            may_go = evidence.may_format_over and task.may_write_header
            return FormatOver(LUKS, refusal) if may_go else Refuse(f"holds {refusal}; expected its own LUKS header")
        content = self._filesystems.probe(opened, deadline=deadline)
        verdict = decide(content, FilesystemRequest(LUKS, task.read_only), evidence, supported=(LUKS,))
        if task.is_shared and not isinstance(verdict, Refuse):
            return Refuse("has no LUKS header, and gets none while other nodes may write to it: " + SHARED_WAY_OUT)
        return verdict

    def _evidence(self, task: LockedVolume) -> Evidence:
        context = task.context or PublishContext(task.volume.name, task.uuid or "")
        return Evidence(
            history=context.history,
            attachment=context.attachment,
            mark=self._records.read(task.uuid) if task.uuid else None,
            format_allowed=context.format_allowed,
        )

    # --- headers and keys ---

    def _make(self, opened: OpenDevice, task: LockedVolume, verdict: LuksHeader | Verdict) -> LuksHeader:
        uuid, context = task.uuid, task.context
        task.plan.require_good_passphrase()
        if uuid is None:
            raise PreconditionFailed(
                f"volume {task.volume} is blank and gets no LUKS header: neither its id nor the device tells its uuid"
            )
        have, wanted = task.device.size_bytes, context.size_bytes if context else 0
        if have < wanted:
            raise PreconditionFailed(
                f"volume {task.volume} gets no LUKS header: expected a device of {wanted} bytes, got {have}"
            )
        if isinstance(verdict, Format) and verdict.prove_every_block:
            self._prove_blank(opened, task.volume)
        self._records.write(UsageRecord(uuid, context.attachment if context else 0, LUKS))
        how = "for the first time"
        if not isinstance(verdict, Format):
            how = "again, after one left unfinished"
            if isinstance(verdict, FormatOver):
                how = f"over what was there, which was allowed for this attachment: {verdict.found}"
            logger.warning("volume %s (%s) gets a LUKS2 header %s", task.volume, uuid, how)
            self._filesystems.wipe(opened)
        self._encryption.format(opened, task.plan.settings, task.plan.passphrase, volume_uuid=uuid)
        logger.info("made a LUKS2 header on volume %s (%s) %s", task.volume, uuid, how)
        header = self._encryption.header(opened)
        if not isinstance(header, LuksHeader) or not header.key_slots:
            raise HostFailure(f"the LUKS header just made on {opened.device.path} cannot be read")
        return header

    def _prove_blank(self, opened: OpenDevice, volume: NodeVolume) -> None:
        def log(done_bytes: int, total_bytes: int) -> None:
            logger.info("volume %s: %d of %d bytes read and blank", volume, done_bytes, total_bytes)

        logger.info("reading every block of volume %s before it gets a LUKS header", volume)
        with self._heavy.reading():
            offset = self._filesystems.first_data(opened, deadline=None, progress=log)
        if offset is not None:
            raise PreconditionFailed(
                f"volume {volume} holds unrecognised data, the first at byte {offset}; "
                "it was in use before, and only a device that is zero throughout gets a LUKS header"
            )

    def _forget_half_made(self, task: LockedVolume) -> None:
        """Take the header for finished: it has a key, and is used from now on."""
        if task.uuid is None:
            return
        with self._records.changing(task.uuid):
            mark = self._records.read(task.uuid)
            if mark is not None and mark.filesystem == LUKS:
                self._records.remove(task.uuid)

    def _fitting(self, opened: OpenDevice, header: LuksHeader, task: LockedVolume, *, may_write: bool) -> str:
        """Return the passphrase that opens the volume, after it has replaced the previous one where that is asked.

        In this order, so that at every moment one of the two opens it: add the new one, prove it, remove the old one.
        """
        plan = task.plan
        fitting = self._first_fitting(opened, (plan.passphrase, *plan.spelled))
        if fitting is not None and not (may_write and plan.previous and header.key_slots > 1):
            return fitting
        previous = self._first_fitting(opened, plan.previous)
        if fitting is not None:
            if previous is not None:
                self._remove_key(opened, task, previous)
            return fitting
        if previous is None:
            raise _denied(task.volume)
        if not may_write:
            return previous
        plan.require_good_passphrase()
        self._encryption.add_key(opened, plan.settings, previous, plan.passphrase)
        if not self._encryption.opens(opened, plan.passphrase):
            raise HostFailure(f"the key added to volume {task.volume} does not open it; the previous one still does")
        self._remove_key(opened, task, previous)
        return plan.passphrase

    def _first_fitting(self, opened: OpenDevice, passphrases: Sequence[str]) -> str | None:
        return next((told for told in passphrases if self._encryption.opens(opened, told)), None)

    def _remove_key(self, opened: OpenDevice, task: LockedVolume, previous: str) -> None:
        self._encryption.remove_key(opened, previous)
        logger.info("volume %s: its previous passphrase was removed", task.volume)

    # --- growing and closing ---

    def header_bytes(self, volume: NodeVolume, device: Device) -> int:
        """Return what its header takes of a volume that is open."""
        with self._devices.open(device) as opened:
            header = self._encryption.header(opened)
        if not isinstance(header, LuksHeader):
            raise PreconditionFailed(
                f"volume {volume} is open but its LUKS header is damaged: keep it open and copy its data"
            )
        return header.data_offset_bytes

    def grow(self, volume: NodeVolume, device: Device, used: Device, secrets: Mapping[str, str]) -> Device:
        """Let the opened device over a grown one take its size, and return it as it is then; `used` if it is plain."""
        mapping = self._encryption.mapping(volume.name)
        if used.number == device.number or mapping is None or mapping.number != used.number:
            return used
        if mapping.is_suspended:
            self._encryption.resume(mapping)
        if mapping.size_bytes + self.header_bytes(volume, device) >= device.size_bytes:
            return used
        if mapping.read_only:
            raise PreconditionFailed(f"volume {volume} is open read-only; it grows when it is staged writable")
        self._resize(volume, mapping, secrets)
        return self.opened_over(volume, device) or used

    def _resize(self, volume: NodeVolume, mapping: LuksMapping, secrets: Mapping[str, str]) -> None:
        passphrase = passphrase_in(secrets)
        given = (passphrase, secrets.get(PREVIOUS_KEY))
        told: list[str | None] = [each for text in given if text is not None for each in passphrase_readings(text)]
        for each in told or [None]:
            try:
                self._encryption.resize(mapping, each)
            except Denied:
                continue
            return
        if passphrase is None:
            raise MissingField(
                f"secrets.{PASSPHRASE_KEYS[0]} (or secrets.{PASSPHRASE_KEYS[1]}; the StorageClass names it as its "
                f"node-expand secret), without which encrypted volume {volume} grows only when it is staged next,"
            )
        raise _denied(volume)

    def wake(self, volume: NodeVolume) -> None:
        """Let the opened device carry I/O again where a cut-off resize left it suspended, or an unmount hangs."""
        mapping = self._encryption.mapping(volume.name)
        if mapping is not None and mapping.is_encryption and mapping.is_suspended and mapping.size_bytes:
            self._encryption.resume(mapping)

    def close(self, volume: NodeVolume) -> None:
        """Close the volume when nothing on this node uses it any more; not open is success.

        Raises `PreconditionFailed` when something other than a mount uses it: the same call later will do. One over a
        device that is gone, or was taken from this node, is left to the sweeps then: its last user may hang for long.
        """
        mapping = self._encryption.mapping(volume.name)
        if mapping is None or not self._is_of(mapping, volume) or self._is_mounted(mapping):
            return
        try:
            self._encryption.close(mapping)
        except PreconditionFailed as busy:
            if not self._is_lost(mapping, volume):
                raise
            logger.warning("volume %s is lost to this node and stays open for now: %s", volume, busy)

    def _is_mounted(self, mapping: LuksMapping) -> bool:
        path = self._encryption.path_of(mapping.name)
        opened = Device(mapping.name, path, mapping.number, mapping.size_bytes, mapping.read_only, None)
        return bool(self._mounts.of_device(opened))

    def _is_lost(self, mapping: LuksMapping, volume: NodeVolume) -> bool:
        is_gone = mapping.below is None or not self._devices.size_bytes(mapping.below)
        return is_gone or is_cut_off(self._devices, volume.name)

    def _is_of(self, mapping: LuksMapping, volume: NodeVolume) -> bool:
        """Tell whether an opened device is the volume's; a name alone proves nothing while there is a device below."""
        if not mapping.is_encryption:
            return False
        if mapping.below is None:
            return True
        claimed = self._devices.uuid_of(mapping.number)
        if claimed is not None and volume.uuid is not None:
            return claimed == volume.uuid
        device = self._devices.find(volume.name, volume.uuid)
        return device is not None and device.number == mapping.below


def _denied(volume: NodeVolume) -> Denied:
    return Denied(f"the passphrase in the secret does not open volume {volume}; nothing was changed")
