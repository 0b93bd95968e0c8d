# SPDX-License-Identifier: Apache-2.0
"""Disks, filesystems and mounts of the machine in memory (`tests.fakes.host`)."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING

from csi_driver.host_model import (
    Device,
    DeviceNumber,
    VolumeStatus,
)

if TYPE_CHECKING:
    from tests.fakes.luks import FakeLuks

MIB = 1 << 20


@dataclass
class FakeFilesystem:
    """A filesystem on a disk. `complete` is False while mkfs runs, and stays so when it is interrupted.

    Without a `uuid` it has that of its volume. `root` is the mounted subtree by default. `log`: files that only its log
    has, until a mount replays it.
    """

    fs_type: str
    size_bytes: int
    complete: bool = True
    files: dict[str, bytes] = field(default_factory=dict)
    log: dict[str, bytes] = field(default_factory=dict)
    root_mode: int = 0o755
    options: tuple[str, ...] = ()
    uuid: str = ""
    is_damaged: bool = False
    checks: int = 0
    trims: int = 0
    root: str = "/"


@dataclass
class FakeDisk:
    """A block device. `raw` are bytes written outside of a filesystem, by offset.

    `claims_uuid`: the device itself has the uuid, as in a loop device's label. `status` is the client's.
    """

    name: str
    uuid: str
    number: DeviceNumber
    size_bytes: int
    path: Path
    claims_uuid: bool = True
    read_only: bool = False
    is_gone: bool = False
    filesystem: FakeFilesystem | None = None
    signature: str | None = None
    raw: dict[int, bytes] = field(default_factory=dict)
    was_used: bool = False
    fails_reads: bool = False
    busy_for: int = 0
    """The number of further exclusive opens that find it busy."""
    opened_by_others: int = 0
    """The number of programs that have it open."""
    backing: FakeDisk | None = None
    label: str = ""
    claimed: int | None = None
    superblock_read_only: bool = False
    status: VolumeStatus | None = None
    references: tuple[str, ...] | None = None
    luks: FakeLuks | None = None
    below: FakeDisk | None = None
    """The device below an opened encrypted device."""
    is_suspended: bool = False
    takes_discards: bool = True

    @property
    def ground(self) -> FakeDisk:
        """The disk with the data: itself, or the one below a read-only device."""
        return self.backing.ground if self.backing is not None else self

    def as_device(self) -> Device:
        status = self.status
        claimed = self.uuid if self.claims_uuid else status.uuid if status is not None else None
        device = Device(self.name, self.path, self.number, self.size_bytes, self.read_only, claimed)
        return replace(device, write_refusal=status.details if status is not None and status.refuses_writes else "")

    def cut(self) -> FakeDisk:
        """Return its content at this moment, on a disk of nobody; what was written since its mount is in the log."""
        copied = replace(self, was_used=self.is_written, filesystem=None, luks=None, raw=dict(self.raw))
        if self.filesystem is not None:
            log, uuid = self.filesystem.log | self.filesystem.files, self.filesystem.uuid or self.uuid
            copied.filesystem = replace(self.filesystem, files={}, log=log, uuid=uuid)
        if self.luks is not None:
            inner = replace(self.luks.inner.cut(), is_gone=True, below=None)
            copied.luks = replace(self.luks, inner=inner, keys=list(self.luks.keys))
        return copied

    @property
    def is_written(self) -> bool:
        """Whether any byte is not zero."""
        return any((self.filesystem, self.signature, self.raw, self.luks))

    @property
    def is_usable(self) -> bool:
        return self.status is None or self.status.io_enabled is True


@dataclass
class MountEntry:
    path: Path
    disk: FakeDisk | None
    node: FakeDisk | None
    source: str
    root: str
    fs_type: str
    read_only: bool
    options: frozenset[str]
    in_use: bool = False
