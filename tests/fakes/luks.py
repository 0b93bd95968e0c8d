# SPDX-License-Identifier: Apache-2.0
"""Encryption of the machine in memory: LUKS headers on its disks, and the opened devices over them.

A header outlives its passphrases and the opened device; data written through that one stays with the header.
A device that is opened exists for a moment without a table, and one that is resized is suspended for a moment.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from csi_driver.errors import Denied, HostFailure, PreconditionFailed
from csi_driver.host_model import (
    LUKS_SUBSYSTEM,
    DamagedHeader,
    Device,
    DeviceNumber,
    LuksHeader,
    LuksMapping,
    LuksSettings,
    OpenDevice,
)

if TYPE_CHECKING:
    from tests.fakes.disks import FakeDisk
    from tests.fakes.host import FakeHost

MAPPER_DIRECTORY = Path("/dev/mapper")
HEADER_BYTES = 16 << 20
_MAPPER_MAJOR = 253
_UUIDS = itertools.count(1)


@dataclass
class FakeLuks:
    """A LUKS header. `inner` is the disk seen through it; `is_complete` is False while it is being made."""

    inner: FakeDisk
    label: str
    keys: list[str] = field(default_factory=list)
    subsystem: str = LUKS_SUBSYSTEM
    settings: LuksSettings = field(default_factory=LuksSettings)
    is_complete: bool = True
    is_damaged: bool = False
    data_offset_bytes: int = HEADER_BYTES
    opened_with_discards: bool = False
    uuid: str = field(default_factory=lambda: f"10000000-0000-4000-8000-{next(_UUIDS):012}")

    @property
    def is_used(self) -> bool:
        """Whether anybody wrote anything through it."""
        inner = self.inner
        return inner.was_used or inner.signature is not None or bool(inner.raw)

    def shown(self) -> LuksHeader:
        return LuksHeader(
            version=2,
            uuid=self.uuid,
            label=self.label,
            subsystem=self.subsystem,
            cipher=self.settings.cipher or "aes-xts-plain64",
            key_bits=self.settings.key_bits or 512,
            key_slots=len(self.keys),
            data_offset_bytes=self.data_offset_bytes,
        )


class FakeEncryption:
    def __init__(self, host: FakeHost) -> None:
        self._host = host
        self.tried: list[str] = []
        """Every passphrase that was tried, in order."""

    # --- headers ---

    def header(self, device: OpenDevice) -> LuksHeader | DamagedHeader | None:
        luks = self._disk(device.device.number).luks
        if luks is None or not luks.is_complete:
            return None
        return DamagedHeader() if luks.is_damaged else luks.shown()

    def format(self, device: OpenDevice, settings: LuksSettings, passphrase: str, *, volume_uuid: str) -> None:
        disk = self._writable(device)
        self._host.step("before luksFormat")
        if disk.was_used or disk.signature or disk.raw or disk.filesystem or (disk.luks and disk.luks.is_used):
            self._host.destroyed.append(disk.uuid)
        inner = self._host.inner_disk(disk, HEADER_BYTES)
        disk.luks = FakeLuks(inner, volume_uuid, settings=settings, is_complete=False)
        self._host.step("halfway luksFormat")
        disk.luks.is_complete = True
        self._host.step("luksFormat without a key")
        disk.luks.keys.append(passphrase)
        self._host.step("after luksFormat")

    def opens(self, device: OpenDevice, passphrase: str) -> bool:
        self.tried.append(passphrase)
        return passphrase in self._luks(device).keys

    def add_key(self, device: OpenDevice, settings: LuksSettings, passphrase: str, new: str) -> None:
        self._writable(device, is_open=self._host.is_mapped(self._disk(device.device.number)))
        luks = self._luks(device)
        if passphrase not in luks.keys:
            raise Denied(f"the passphrase given does not open {device.device.path}")
        self._host.step("before luksAddKey")
        luks.keys.append(new)
        self._host.step("after luksAddKey")

    def remove_key(self, device: OpenDevice, passphrase: str) -> None:
        self._writable(device, is_open=self._host.is_mapped(self._disk(device.device.number)))
        luks = self._luks(device)
        if passphrase not in luks.keys:
            raise Denied(f"the passphrase given does not open {device.device.path}")
        if len(luks.keys) < 2:
            raise PreconditionFailed(f"{device.device.path} has no other key than the one to be removed")
        self._host.step("before luksRemoveKey")
        luks.keys.remove(passphrase)
        self._host.step("after luksRemoveKey")

    # --- opened devices ---

    def why_unusable(self) -> str:
        return self._host.mapper_problem

    def path_of(self, name: str) -> Path:
        return MAPPER_DIRECTORY / name

    def mapping(self, name: str) -> LuksMapping | None:
        mapper = self._host.mappers.get(name)
        if mapper is None:
            return None
        header = mapper.label.removeprefix("luks/").replace("-", "")
        has_table = mapper.size_bytes > 0
        return LuksMapping(
            name=name,
            kernel_uuid=f"CRYPT-LUKS2-{header}-{name}" if mapper.label else "LVM-of-another-program",
            number=mapper.number,
            size_bytes=mapper.size_bytes,
            below=self.below(mapper.number) if has_table else None,
            read_only=mapper.read_only,
            is_suspended=mapper.is_suspended,
        )

    def below(self, number: DeviceNumber) -> DeviceNumber | None:
        mapper = self._host.by_number(number)
        if mapper is None or mapper.below is None or mapper.below.is_gone:
            return None
        return mapper.below.number

    def open(self, device: OpenDevice, passphrase: str, *, read_only: bool, allow_discards: bool) -> None:
        disk, luks, name = self._disk(device.device.number), self._luks(device), device.device.name
        if passphrase not in luks.keys:
            raise Denied(f"the passphrase given does not open {device.device.path}")
        if name in self._host.mappers or self._host.is_mapped(disk) or self._host.is_mounted(disk):
            raise PreconditionFailed(f"{device.device.path} is busy")
        self._host.step("before open")
        inner = luks.inner
        inner.number, inner.label = self._host.next_number(_MAPPER_MAJOR), f"luks/{luks.uuid}"
        inner.size_bytes, inner.below, inner.is_gone = 0, None, False
        self._host.mappers[name] = inner
        self._host.step("halfway open")
        inner.size_bytes, inner.below = disk.size_bytes - luks.data_offset_bytes, disk
        inner.read_only, inner.status = read_only or disk.read_only, disk.status
        luks.opened_with_discards = allow_discards
        self._host.step("after open")

    def device(self, mapping: LuksMapping, uuid: str | None) -> Device:
        mapper = self._host.mappers.get(mapping.name)
        if mapper is None or mapper.number != mapping.number or not mapper.size_bytes:
            raise PreconditionFailed(f"{self.path_of(mapping.name)} is not there or has no size")
        found = mapper.as_device()
        if found.uuid is not None and uuid is not None and found.uuid != uuid:
            raise PreconditionFailed(f"the device below {found.path} claims {found.uuid}, expected {uuid}")
        return found

    def resume(self, mapping: LuksMapping) -> None:
        self._host.step("before resume")
        self._host.mappers[mapping.name].is_suspended = False
        self._host.step("after resume")

    def resize(self, mapping: LuksMapping, passphrase: str | None) -> None:
        mapper = self._host.mappers[mapping.name]
        if mapper.below is None or mapper.below.luks is None:
            raise HostFailure(f"{mapper.path} lies over nothing")
        if passphrase not in mapper.below.luks.keys:
            raise Denied(f"{mapper.path} grows only with its passphrase")
        self._host.step("before resize")
        mapper.is_suspended = True
        self._host.step("halfway resize")
        mapper.size_bytes = mapper.below.size_bytes - mapper.below.luks.data_offset_bytes
        mapper.is_suspended = False
        self._host.step("after resize")

    def close(self, mapping: LuksMapping) -> None:
        mapper = self._host.mappers.get(mapping.name)
        if mapper is None or mapper.number != mapping.number:
            return
        is_read = any(reader.backing is mapper for reader in self._host.readers)
        if self._host.is_mounted(mapper) or mapper.claimed is not None or is_read:
            raise PreconditionFailed(f"{mapper.path} is busy")
        self._host.step("before close")
        del self._host.mappers[mapping.name]
        mapper.below, mapper.is_gone = None, True
        self._host.step("after close")

    def _disk(self, number: DeviceNumber) -> FakeDisk:
        disk = self._host.by_number(number)
        if disk is None or disk.fails_reads:
            raise HostFailure(f"read device {number}: Input/output error (EIO)")
        return disk

    def _luks(self, device: OpenDevice) -> FakeLuks:
        luks = self._disk(device.device.number).luks
        if luks is None or not luks.is_complete or luks.is_damaged:
            raise HostFailure(f"{device.device.path} is no LUKS device")
        return luks

    def _writable(self, device: OpenDevice, *, is_open: bool = False) -> FakeDisk:
        """`is_open`: the opened device over it has the claim."""
        disk = self._disk(device.device.number)
        if disk.claimed != device.fd and not is_open:
            raise AssertionError("a LUKS header is written on a device that was not claimed")
        if disk.read_only:
            raise HostFailure(f"{device.device.path} is read-only")
        return disk
