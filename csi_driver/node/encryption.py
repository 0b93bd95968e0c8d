# SPDX-License-Identifier: Apache-2.0
"""Encrypted volumes: open, grow and close them, and make LUKS headers.

Only the opened device of an encrypted volume is mounted or published, never the one under it. A LUKS header is made by
the same rules as a filesystem (`format_policy.decide`). A wrong passphrase is refused and never leads to a new header.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from csi_driver.compat.volumes import passphrase_readings
from csi_driver.deadline import Deadline
from csi_driver.errors import (
    ContentRefused,
    Denied,
    GrowsAtNextMount,
    HostFailure,
    MissingField,
    PreconditionFailed,
)
from csi_driver.host_model import LUKS_SUBSYSTEM, DamagedHeader, Device, LuksHeader, LuksMapping, Mount, OpenDevice
from csi_driver.node.concurrency import HeavyOperations
from csi_driver.node.format import Preparation
from csi_driver.node.format_policy import AnyFormat, FormatAgain, FormatOver, Refuse, Use, decide
from csi_driver.node.mount_owner import NodeVolume, VolumeDevice, is_cut_off
from csi_driver.node.ports import Devices, Encryption, Filesystems, Mounts
from csi_driver.node.usage_records import LUKS, UsageRecords
from csi_driver.parameters.encryption import PASSPHRASE_KEYS, PREVIOUS_KEY, EncryptionPlan, passphrase_in
from csi_driver.parameters.mount_options import FilesystemRequest
from csi_driver.publish_context import Encryption as By
from csi_driver.publish_context import History

logger = logging.getLogger(__name__)

SHARED_WAY_OUT = "stage it for one node alone first, or let the storage encrypt it (encryption: native)"


@dataclass(slots=True, kw_only=True)
class EncryptedVolumes:
    """Opens and closes encrypted volumes. Every step can be repeated after a crash."""

    devices: Devices
    encryption: Encryption
    mounts: Mounts
    filesystems: Filesystems
    records: UsageRecords
    heavy: HeavyOperations
    preparation: Preparation

    def in_use(self, volume: NodeVolume, device: Device, by: By) -> Device:
        """Return the device to use of a staged volume: its own or the opened one."""
        opened = self.opened_over(volume, device)
        if by is By.NONE:
            if opened is not None:
                raise PreconditionFailed(f"volume {volume} is not encrypted, but is open as {opened.path}")
            return device
        if opened is None:
            raise PreconditionFailed(
                f"encrypted volume {volume} is not open on this node: stage it before it is published"
            )
        return opened

    def opened_over(self, volume: NodeVolume, device: Device) -> Device | None:
        """Return the opened device over the volume's own; None when it is not open."""
        mapping = self.encryption.mapping(volume.name)
        if mapping is None or not mapping.is_encryption or mapping.below != device.number or not mapping.size_bytes:
            return None
        if self.devices.is_claimed(device) is False:
            return None  # it lies over an earlier disk with the same name and number
        return self.encryption.device(mapping, volume.uuid or device.uuid)

    def is_opened(self, mounted: Mount) -> bool:
        """Return whether a bound device node is that of an opened encrypted device."""
        return mounted.node_number is not None and self.encryption.below(mounted.node_number) is not None

    def require_plain(self, volume: NodeVolume, device: Device) -> None:
        """Refuse to publish a volume raw that has a header of this driver: it would be lost."""
        self.in_use(volume, device, By.NONE)
        with self.devices.open(device) as opened:
            header = self.encryption.header(opened)
        if isinstance(header, LuksHeader) and header.subsystem == LUKS_SUBSYSTEM:
            raise ContentRefused(f"volume {volume} is not encrypted, but holds a LUKS header of this driver")

    def open(self, target: VolumeDevice, plan: EncryptionPlan, *, deadline: Deadline) -> VolumeDevice:
        """Open the volume, with a new header if allowed. Raises `Denied`."""
        volume = target.volume
        # Checked before a header is made: without device-mapper nothing could use it.
        problem = self.encryption.why_unusable()
        if problem:
            raise PreconditionFailed(f"encrypted volume {volume} cannot be opened on this node: {problem}")
        with self.heavy.slot(f"open the encryption of volume {volume}", deadline=deadline):
            mapping = self._usable_mapping(target)
            if mapping is None:
                # After a device was open for writing, udev reads it again: so only where it is likely to be written.
                likely = volume.context.history is History.FIRST or bool(plan.previous)
                write = likely and _may_write_header(target, plan)
                header = self._unlock(target, plan, write=write, deadline=deadline)
            else:
                header = self._join(target, plan, mapping)
        mapping = self.encryption.mapping(volume.name)
        if mapping is None or mapping.below != target.device.number or not mapping.is_of(header):
            raise PreconditionFailed(
                f"{self.encryption.path_of(volume.name)}: expected volume {volume}, got another one"
            )
        inner_bytes = max(0, volume.context.size_bytes - header.data_offset_bytes)
        volume = replace(volume, context=replace(volume.context, size_bytes=inner_bytes))
        return replace(target, volume=volume, device=self.encryption.device(mapping, target.uuid))

    def _usable_mapping(self, target: VolumeDevice) -> LuksMapping | None:
        """Return the opened device if it can be used; close one that is half open or dead."""
        mapping = self.encryption.mapping(target.volume.name)
        if mapping is None:
            return None
        path, device = self.encryption.path_of(target.volume.name), target.device
        if not mapping.is_encryption:
            raise PreconditionFailed(f"{path}: expected an encrypted device, got another mapped device")
        is_dead = not mapping.size_bytes or mapping.below is None or not self.devices.size_bytes(mapping.below)
        if mapping.below == device.number and self.devices.is_claimed(device) is False:
            is_dead = True  # it lies over an earlier disk with the same name and number
        if is_dead:
            self.encryption.close(mapping)
            return None
        if mapping.below != device.number:
            raise PreconditionFailed(f"{path}: expected it over device {device.number}, got {mapping.below}; close it")
        if mapping.is_suspended:
            self.encryption.resume(mapping)
        if mapping.read_only == target.takes_no_writes or self._is_mounted(mapping):
            if mapping.read_only and not target.read_only:
                raise PreconditionFailed(
                    f"encrypted volume {target.volume}: expected write access, it is open read-only"
                )
            return mapping
        self.encryption.close(mapping)
        return None

    def _join(self, target: VolumeDevice, plan: EncryptionPlan, mapping: LuksMapping) -> LuksHeader:
        with self.devices.open(target.device) as opened:
            header = self.encryption.header(opened)
            if not isinstance(header, LuksHeader) or not mapping.is_of(header):
                raise PreconditionFailed(f"volume {target.volume} was opened by another LUKS header than its own")
            passphrase = self._first_right(opened, plan.passphrases)
        if passphrase is None:
            raise _denied(target.volume)
        if mapping.size_bytes + header.data_offset_bytes < target.device.size_bytes and not mapping.read_only:
            self.encryption.resize(mapping, passphrase)
        return header

    def _unlock(self, target: VolumeDevice, plan: EncryptionPlan, *, write: bool, deadline: Deadline) -> LuksHeader:
        """Open the volume's device; without `write` once more if a header is to be made."""
        with self.devices.open(target.device, write=write, exclusive=True) as opened:
            header = self._judge(opened, target, plan, deadline)
            if isinstance(header, Refuse):
                raise ContentRefused(f"volume {target.volume} {header.reason}")
            if write and not isinstance(header, LuksHeader):
                header = self._make(opened, target, plan, header)
            if isinstance(header, LuksHeader):
                self._remove_begun_record(target)
                passphrase = self._right_passphrase(opened, header, target, plan, may_write=write)
                discards = plan.allow_discards
                self.encryption.open(opened, passphrase, read_only=target.takes_no_writes, allow_discards=discards)
                return header
        return self._unlock(target, plan, write=True, deadline=deadline)

    def _judge(
        self, opened: OpenDevice, target: VolumeDevice, plan: EncryptionPlan, deadline: Deadline
    ) -> LuksHeader | AnyFormat | Refuse:
        header = self.encryption.header(opened)
        evidence = self.preparation.evidence(target.volume, target.uuid)
        may_write = _may_write_header(target, plan)
        problem = "a damaged LUKS header" if isinstance(header, DamagedHeader) else "no LUKS header"
        if isinstance(header, LuksHeader):
            problem = _header_problem(header, target, plan)
            if not problem and header.key_slots:
                return header
            if not problem and evidence.begun == LUKS and may_write:
                return FormatAgain(LUKS)
            problem = problem or "a LUKS header without a key, which nothing can open"
        if plan.by is By.NATIVE:
            return Refuse(f"holds {problem}; expected the LUKS header that the storage made with the volume")
        if isinstance(header, LuksHeader):
            if evidence.may_format_over and may_write:
                return FormatOver(LUKS, problem)
            return Refuse(f"holds {problem}; expected its own LUKS header")
        content = self.filesystems.probe(opened, deadline=deadline)
        verdict = decide(content, FilesystemRequest(LUKS, target.read_only), evidence, supported=(LUKS,))
        if target.is_shared and not isinstance(verdict, Refuse):
            return Refuse("has no LUKS header, and gets none while other nodes may write to it: " + SHARED_WAY_OUT)
        return Refuse(f"holds {verdict.fs_type}; expected a LUKS header") if isinstance(verdict, Use) else verdict

    def _make(self, opened: OpenDevice, target: VolumeDevice, plan: EncryptionPlan, verdict: AnyFormat) -> LuksHeader:
        plan.require_good_passphrase()
        uuid = self.preparation.clear(opened, target, verdict, "a LUKS2 header")
        self.encryption.format(opened, plan.settings, plan.passphrase, volume_uuid=uuid)
        logger.info("made a LUKS2 header on volume %s (%s)", target.volume, uuid)
        header = self.encryption.header(opened)
        if not isinstance(header, LuksHeader) or not header.key_slots:
            raise HostFailure(f"the LUKS header just made on {opened.device.path} cannot be read")
        return header

    def _remove_begun_record(self, target: VolumeDevice) -> None:
        """Remove the record of a header that was begun: it has a key, and is used from now on."""
        if target.uuid is None:
            return
        with self.records.changing(target.uuid):
            record = self.records.read(target.uuid)
            if record is not None and record.filesystem == LUKS:
                self.records.remove(target.uuid)

    def _right_passphrase(
        self, opened: OpenDevice, header: LuksHeader, target: VolumeDevice, plan: EncryptionPlan, *, may_write: bool
    ) -> str:
        """Return the right passphrase. A previous one is replaced, but removed last."""
        right = self._first_right(opened, (plan.passphrase, *plan.spelled))
        if right is not None and not (may_write and plan.previous and header.key_slots > 1):
            return right
        previous = self._first_right(opened, plan.previous)
        if right is not None:
            if previous is not None:
                self._remove_key(opened, target, previous)
            return right
        if previous is None:
            raise _denied(target.volume)
        if not may_write:
            return previous
        plan.require_good_passphrase()
        self.encryption.add_key(opened, plan.settings, previous, plan.passphrase)
        if not self.encryption.opens(opened, plan.passphrase):
            raise HostFailure(f"the key added to volume {target.volume} does not open it; the previous one still does")
        self._remove_key(opened, target, previous)
        return plan.passphrase

    def rotate(self, target: VolumeDevice, plan: EncryptionPlan, *, deadline: Deadline) -> None:
        """Replace the previous passphrase of an open volume, as its next stage would. Raises `Denied`."""
        volume, mapping = target.volume, self.encryption.mapping(target.volume.name)
        if mapping is None or self.opened_over(volume, target.device) is None:
            raise PreconditionFailed(f"encrypted volume {volume} is not open on this node: its next stage changes it")
        if mapping.read_only or not _may_write_header(target, plan):
            raise PreconditionFailed(f"volume {volume} is open read-only or shared: its header must not be written")
        slot = self.heavy.slot(f"change the passphrase of volume {volume}", deadline=deadline)
        with slot, self.devices.open(target.device, write=True) as opened:
            header = self.encryption.header(opened)
            if not isinstance(header, LuksHeader) or not mapping.is_of(header):
                raise PreconditionFailed(f"volume {volume} was opened by another LUKS header than its own")
            self._right_passphrase(opened, header, target, plan, may_write=True)

    def _first_right(self, opened: OpenDevice, passphrases: Sequence[str]) -> str | None:
        return next((each for each in passphrases if self.encryption.opens(opened, each)), None)

    def _remove_key(self, opened: OpenDevice, target: VolumeDevice, previous: str) -> None:
        self.encryption.remove_key(opened, previous)
        logger.info("volume %s: its previous passphrase was removed", target.volume)

    def header_bytes(self, volume: NodeVolume, device: Device) -> int:
        """Return the size of the LUKS header of an open volume."""
        with self.devices.open(device) as opened:
            header = self.encryption.header(opened)
        if not isinstance(header, LuksHeader):
            raise PreconditionFailed(f"the LUKS header of volume {volume} is damaged: keep it open and copy its data")
        return header.data_offset_bytes

    def grow(self, volume: NodeVolume, device: Device, used: Device, secrets: Mapping[str, str]) -> Device:
        """Grow the opened device `used` to the device under it; a plain one stays as it is."""
        mapping = self.encryption.mapping(volume.name)
        if used.number == device.number or mapping is None or mapping.number != used.number:
            return used
        if mapping.is_suspended:
            self.encryption.resume(mapping)
        if mapping.size_bytes + self.header_bytes(volume, device) >= device.size_bytes:
            return used
        if mapping.read_only:
            raise GrowsAtNextMount(f"volume {volume} is open read-only; it grows when it is staged writable")
        self._resize(volume, mapping, secrets)
        return self.opened_over(volume, device) or used

    def _resize(self, volume: NodeVolume, mapping: LuksMapping, secrets: Mapping[str, str]) -> None:
        passphrase = passphrase_in(secrets)
        given = (passphrase, secrets.get(PREVIOUS_KEY))
        candidates: list[str | None] = [
            each for text in given if text is not None for each in passphrase_readings(text)
        ]
        for each in candidates or [None]:
            try:
                self.encryption.resize(mapping, each)
            except Denied:
                continue
            return
        if passphrase is None:
            raise MissingField(
                f"secrets.{PASSPHRASE_KEYS[0]} (or secrets.{PASSPHRASE_KEYS[1]}; the StorageClass names it as its "
                f"node-expand secret), without which encrypted volume {volume} grows only when it is staged next,"
            )
        raise _denied(volume)

    def resume(self, volume: NodeVolume) -> None:
        """Resume I/O of a device that an interrupted resize left suspended: unmount would hang."""
        mapping = self.encryption.mapping(volume.name)
        if mapping is not None and mapping.is_encryption and mapping.is_suspended and mapping.size_bytes:
            self.encryption.resume(mapping)

    def close(self, volume: NodeVolume) -> None:
        """Close the volume unless it is mounted. Raises `PreconditionFailed` if it is busy."""
        mapping = self.encryption.mapping(volume.name)
        if mapping is None or not self._is_of(mapping, volume) or self._is_mounted(mapping):
            return
        try:
            self.encryption.close(mapping)
        except PreconditionFailed as busy:
            is_gone = mapping.below is None or not self.devices.size_bytes(mapping.below)
            if not is_gone and not is_cut_off(self.devices, volume.name):
                raise
            logger.warning("volume %s was taken from this node and stays open for now: %s", volume, busy)

    def _is_mounted(self, mapping: LuksMapping) -> bool:
        path = self.encryption.path_of(mapping.name)
        opened = Device(mapping.name, path, mapping.number, mapping.size_bytes, mapping.read_only, None)
        return bool(self.mounts.of_device(opened))

    def _is_of(self, mapping: LuksMapping, volume: NodeVolume) -> bool:
        """Return whether an opened device is the volume's, not only by its name."""
        if not mapping.is_encryption:
            return False
        if mapping.below is None:
            return True
        claimed = self.devices.uuid_of(mapping.number)
        if claimed is not None and volume.uuid is not None:
            return claimed == volume.uuid
        device = self.devices.find(volume.name, volume.uuid)
        return device is not None and device.number == mapping.below


def _may_write_header(target: VolumeDevice, plan: EncryptionPlan) -> bool:
    """Return whether to write a header; two nodes that share a volume would make one each."""
    return plan.by is By.LUKS and not target.read_only and not target.is_shared


def _header_problem(header: LuksHeader, target: VolumeDevice, plan: EncryptionPlan) -> str:
    if header.subsystem == LUKS_SUBSYSTEM and header.label not in (target.uuid, *target.volume.context.inherited_uuids):
        return f"the LUKS header of volume {header.label}"
    is_made_by_driver = target.volume.context.history is not History.UNKNOWN
    if plan.by is By.LUKS and header.subsystem != LUKS_SUBSYSTEM and is_made_by_driver:
        return "a LUKS header that was not made for it (leftover data of another volume)"
    return ""


def _denied(volume: NodeVolume) -> Denied:
    hint = f"; as a copy it has the passphrase of its source: set that as {PREVIOUS_KEY}"
    return Denied(
        f"the passphrase in the secret does not open volume {volume}; nothing was changed"
        f"{hint if volume.context.populated else ''}"
    )
