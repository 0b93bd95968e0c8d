# SPDX-License-Identifier: Apache-2.0
"""Values of one machine: devices, mounts, and the content of devices. Made by `csi_driver.host`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import Enum
from pathlib import Path, PurePath, PurePosixPath

from csi_driver.model import is_uuid


@dataclass(frozen=True, slots=True, order=True)
class DeviceNumber:
    """Major and minor number: the only identity by which devices and mounts are compared."""

    major: int
    minor: int

    def __str__(self) -> str:
        return f"{self.major}:{self.minor}"

    @classmethod
    def parse(cls, text: str) -> DeviceNumber:
        """Read `major:minor`, as sysfs and mountinfo write it. Raises ValueError."""
        major, _, minor = text.strip().partition(":")
        return cls(int(major), int(minor))


@dataclass(frozen=True, slots=True)
class Device:
    """A block device; its `uuid` is the volume's, None without evidence.

    `write_refusal`: why the storage client fails writes, while `read_only` is the kernel's. `disk_sequence` is unique
    to the disk, unlike its number (Linux 5.15; None before).
    """

    name: str
    path: Path
    number: DeviceNumber
    size_bytes: int
    read_only: bool
    uuid: str | None
    block_bytes: int = 4096
    write_refusal: str = ""
    disk_sequence: int | None = None

    @property
    def is_writable(self) -> bool:
        """Whether neither the kernel nor the storage client refuses writes."""
        return not (self.read_only or self.write_refusal)


@dataclass(frozen=True, slots=True)
class OpenDevice:
    """A device, verified on the open descriptor; its first byte is at `start_bytes` of `fd`."""

    fd: int
    device: Device
    start_bytes: int = 0


@dataclass(frozen=True, slots=True)
class VolumeStatus:
    """The storage client's status of a volume attached to this node. None = unknown.

    `refusal`: why the device must not be used. `io_enabled`: only when True may the device be opened, otherwise reads
    hang or fail after 30 s. `preempted`: another client's reservation blocks I/O until the volume is detached.
    `details` repeats the client's fields when something is wrong. `holders`: the staging paths for which this node
    itself connected the volume by NVMe/TCP, to the subsystem `nqn`; None: a storage client attached it.
    """

    name: str
    uuid: str
    size_bytes: int | None = None
    refusal: str = ""
    io_enabled: bool | None = None
    refuses_writes: bool | None = None
    preempted: bool = False
    details: str = ""
    holders: tuple[str, ...] | None = None
    nqn: str = ""


@dataclass(frozen=True, slots=True)
class StorageClient:
    """The storage client of this machine; `uuid` is None while it does not run, also during an upgrade.

    `is_expected`: a client is installed, so it comes back. `problem`: why a running client is unusable.
    `volume_limit`: how many volumes can be attached, 0 = no limit. `connects`: this machine needs no client, as it
    connects its volumes itself by NVMe/TCP; `problem`: why it cannot.
    """

    uuid: str | None
    is_expected: bool = False
    is_upgrading: bool = False
    problem: str = ""
    volume_limit: int = 0
    connects: bool = False


@dataclass(frozen=True, slots=True)
class NvmeOrphan:
    """A connection of this node to one of our subsystems that no record names; `number`: its device, if it has one."""

    nqn: str
    number: DeviceNumber | None


@dataclass(frozen=True, slots=True)
class RunningRole:
    pid: int
    role: str
    arguments: tuple[str, ...]
    environ: Mapping[str, str] = field(repr=False)


@dataclass(frozen=True, slots=True)
class LoopDevice:
    """A bound loop device. `label` is lo_file_name: `<volume uuid>/<user>`.

    `file` is the path that the kernel shows, which may be valid only in the container that bound it; `identity` is the
    file's device and inode. `backing`: the device below, where the file is a device node. `fenced`: carries no I/O.
    """

    number: int
    device_number: DeviceNumber
    file: Path
    label: str
    read_only: bool
    node: Path | None = None
    file_is_gone: bool = False
    backing: DeviceNumber | None = None
    fenced: bool = False
    identity: tuple[int, int] | None = field(default=None, compare=False)

    @property
    def device(self) -> tuple[int, int]:
        return self.device_number.major, self.device_number.minor

    @property
    def uuid(self) -> str | None:
        return uuid_of_label(self.label)


def uuid_of_label(label: str) -> str | None:
    """Return the volume uuid at the beginning of a loop device's label; None for labels of other programs."""
    uuid = label.partition("/")[0]
    return uuid.lower() if is_uuid(uuid) else None


@dataclass(frozen=True, slots=True)
class ReadOnlyDevice:
    """A read-only device over another one; `over` is the node that it was made from."""

    number: DeviceNumber
    over: Path


@dataclass(frozen=True, slots=True)
class Mount:
    """A mount as the kernel shows it; `options` are those of mount and filesystem without `ro` and `rw`.

    `number` is the device of the mounted filesystem. For a bind mounted device node that is the filesystem of the
    node (/dev), and `node_number` the device of the node. `source` is e.g. `/dev/nvmesh/csi-1`.
    `turned_read_only`: the filesystem is read-only and the mount is not, which errors of the filesystem cause.
    """

    path: Path
    number: DeviceNumber
    fs_type: str
    source: str
    root: str
    read_only: bool
    options: frozenset[str]
    node_number: DeviceNumber | None = None
    turned_read_only: bool = False

    def can_be_of(self, device: Device) -> bool:
        """Tell if this can be a mount of the device, by number and source.

        The number of a device may be reused while mounts of the device remain: a mount made from the node of another
        volume, in the same directory as this one's, is not of the device.
        """
        if self.node_number is None:
            made_from: PurePath = PurePosixPath(self.source)
            is_beside = made_from.parent == device.path.parent
        else:
            made_from = self.root_path
            is_beside = made_from.parts[-2:-1] == device.path.parts[-2:-1]
        number = self.number if self.node_number is None else self.node_number
        return number == device.number and not (is_beside and made_from.name != device.path.name)

    @property
    def root_path(self) -> PurePosixPath:
        """The root; of a bind mounted node the path in /dev, without the //deleted that the kernel appends."""
        return PurePosixPath(self.root.removesuffix("//deleted"))


class FaultKind(Enum):
    DEVICE_READ_ONLY = "the device refuses writes"
    BACKING_FILE_GONE = "the file behind the device was deleted"
    BACKING_FILE_CUT_SHORT = "the file behind the device is shorter than the device"
    SHUT_DOWN = "the filesystem was shut down"
    TURNED_READ_ONLY = "the filesystem turned read-only"
    ERRORS = "the filesystem has recorded errors"
    IO_ERROR = "the filesystem answers with an error"


@dataclass(frozen=True, slots=True)
class Fault:
    kind: FaultKind
    detail: str


@dataclass(frozen=True, slots=True)
class Blank:
    """All probed places were read without error and hold zeroes."""


@dataclass(frozen=True, slots=True)
class Filesystem:
    """A recognised filesystem; `uuid` is the filesystem's own, empty where unknown.

    `is_ready`: it was closed well and is as large as its device: neither a check nor growth is due.
    """

    fs_type: str
    uuid: str = ""
    label: str = ""
    is_ready: bool = field(default=False, compare=False)


@dataclass(frozen=True, slots=True)
class OtherContent:
    """Other content: a partition table, LUKS, LVM, RAID, or unrecognised data.

    `is_complete`: an interrupted mkfs.xfs leaves no such content.
    """

    description: str
    is_complete: bool = field(default=True, compare=False)


Content = Blank | Filesystem | OtherContent

GROWTH_THRESHOLD_BYTES = 8 << 20
"""A filesystem is grown if it is smaller than its device by more than this.

ext4 leaves out a last block group that its tables would fill (at most 6.2 MiB with 4 KiB blocks), xfs a last
allocation group below 64 blocks: with less, both would be grown again at every stage.
"""
UNUSABLE_TAIL_BYTES = 16 << 20
"""A growth may leave so much; more than the threshold, as mkfs options enlarge the tables that ext4 lacks room for."""

LUKS_SUBSYSTEM = "nvmesh-csi"
"""In the header of every volume that this driver encrypted; the label is the volume's uuid."""


@dataclass(frozen=True, slots=True)
class LuksHeader:
    """A LUKS header. `key_slots`: number of passphrases; `label` and `subsystem` are free text (LUKS2)."""

    version: int
    uuid: str
    label: str
    subsystem: str
    cipher: str
    key_bits: int
    key_slots: int
    data_offset_bytes: int


@dataclass(frozen=True, slots=True)
class DamagedHeader:
    """Traces of a LUKS header without an intact copy."""


@dataclass(frozen=True, slots=True)
class LuksSettings:
    """Options of a new LUKS2 header; 0 and empty leave the choice to cryptsetup."""

    cipher: str = ""
    key_bits: int = 0
    pbkdf: str = ""
    pbkdf_memory_kib: int = 0
    pbkdf_iterations: int = 0


@dataclass(frozen=True, slots=True)
class LuksMapping:
    """An opened encrypted device in device-mapper; `kernel_uuid` has kind, LUKS uuid without dashes, and name.

    Without a table, as a killed cryptsetup leaves it, `size_bytes` is 0. `below` is None then, and when it is gone.
    """

    name: str
    kernel_uuid: str
    number: DeviceNumber
    size_bytes: int
    below: DeviceNumber | None
    read_only: bool
    is_suspended: bool

    @property
    def is_encryption(self) -> bool:
        return self.kernel_uuid.startswith("CRYPT-")

    def is_of(self, header: LuksHeader) -> bool:
        """Tell if it was opened with this header, under its own name."""
        return self.kernel_uuid == f"CRYPT-LUKS{header.version}-{header.uuid.replace('-', '')}-{self.name}"


@dataclass(frozen=True, slots=True)
class Extent:
    """A piece of a file, in bytes. `address`: on the device; None = unknown."""

    offset: int
    length: int
    address: int | None

    @property
    def end(self) -> int:
        return self.offset + self.length
