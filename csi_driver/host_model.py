"""The nouns of one machine: devices, mounts, and what a device holds.

Values only. `csi_driver.host` makes them, `csi_driver.node` decides by them.
"""

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
    """A block device that was found and whose identity was verified once.

    `uuid` is the volume's as the evidence on this machine says it; None where nothing says it now.
    `read_only`: the kernel refuses writes. `write_refusal`: what the storage client says where writes to it fail,
    whatever the kernel shows; programs then meet I/O errors. `disk_sequence` is what no other disk ever has, also under
    the same number (Linux 5.15); None where the kernel does not tell it.
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
    def takes_writes(self) -> bool:
        """Whether nothing on this machine is known to refuse writes to it."""
        return not (self.read_only or self.write_refusal)


@dataclass(frozen=True, slots=True)
class OpenDevice:
    """A device held open; its identity was verified again on this very descriptor.

    `start_bytes`: where its first byte lies in `fd`; more than 0 only where the device is looked at from below.
    """

    fd: int
    device: Device
    start_bytes: int = 0


@dataclass(frozen=True, slots=True)
class VolumeStatus:
    """What the storage client of this machine says of a volume that is attached here. None = it does not say.

    `refusal`: why the device may not be used although it is there; empty = it may. `io_enabled` is True where the
    client is known to carry I/O for it: only then may the device be opened. False is an attachment that is not
    finished, or one that was fenced, suspended or lost its storage: reading it hangs, or fails after half a minute.
    `refuses_writes`: writes to it fail. `preempted`: the reservation of another client has cut off its I/O for as long
    as this attachment lasts. `words` repeats what the client says where any of these is not as it should be.
    """

    name: str
    uuid: str
    size_bytes: int | None = None
    refusal: str = ""
    io_enabled: bool | None = None
    refuses_writes: bool | None = None
    preempted: bool = False
    words: str = ""


@dataclass(frozen=True, slots=True)
class StorageClient:
    """The storage client of this machine as it shows itself now.

    `uuid` is None while it cannot be read: before the client has started, for the moment of an upgrade under running
    volumes (`is_upgrading`), or for good where there is none. `is_expected`: a client belongs here, so an absent one
    comes back. `problem`: why it is of no use although it is there; empty = it is. `volume_limit`: how many volumes it
    can have attached for use, 0 where it knows no limit.
    """

    uuid: str | None
    is_expected: bool = False
    is_upgrading: bool = False
    problem: str = ""
    volume_limit: int = 0


@dataclass(frozen=True, slots=True)
class RunningRole:
    """A process of this program: which role it is, the arguments behind the role's name, and its environment."""

    pid: int
    role: str
    arguments: tuple[str, ...]
    environ: Mapping[str, str] = field(repr=False)


@dataclass(frozen=True, slots=True)
class LoopDevice:
    """A bound loop device.

    `file` is the path that the kernel shows, which may be valid only in the container that bound it; `identity` is the
    file's device and inode. `label` is lo_file_name: `<volume uuid>/<user>`. `file_is_gone`: the file was deleted.
    `backing`: the device below, where the file is a device node. `fenced`: cut off from its file, carries no I/O.
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
        """Major and minor number."""
        return self.device_number.major, self.device_number.minor

    @property
    def uuid(self) -> str | None:
        """The volume's uuid in the label."""
        return uuid_of_label(self.label)


def uuid_of_label(label: str) -> str | None:
    """Return the volume uuid at the beginning of a loop device's label; None for labels of other programs."""
    uuid, _, _ = label.partition("/")
    return uuid.lower() if is_uuid(uuid) else None


@dataclass(frozen=True, slots=True)
class ReadOnlyDevice:
    """A read-only device that stands over another one for a reader; `over` is that one's node when it was made."""

    number: DeviceNumber
    over: Path


@dataclass(frozen=True, slots=True)
class Mount:
    """A mount as the kernel shows it at one path (the topmost, where several are stacked).

    `number` is the device of the mounted filesystem, or, for a bind mount of a device node, of the filesystem
    the node lies in; then `node_number` is the device that the node stands for.
    `source` is what the mount was made from, e.g. `/dev/nvmesh/csi-1`. `root` is the path within the filesystem.
    `options` are those of the mount and of the filesystem as the kernel spells them, without `ro` and `rw`.
    `turned_read_only`: the filesystem refuses writes although this mount of it does not: it was read-only from the
    first moment where that was wanted of the mount, so this is what its errors did to it.
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
        """Tell whether this can be a mount of the device: by its number, and by what it was made from.

        A mount outlives its device, whose number may be given to another one then. So a mount that was made from the
        node of another volume, which lies beside this one's, is not of the device although it has its number.
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
        """The root; of a bound node the path in /dev's filesystem, to which the kernel appends //deleted at its end."""
        return PurePosixPath(self.root.removesuffix("//deleted"))


class FaultKind(Enum):
    """What can be found wrong with a device or a filesystem by looking at it."""

    DEVICE_READ_ONLY = "the device refuses writes"
    BACKING_FILE_GONE = "the file behind the device was deleted"
    BACKING_FILE_CUT_SHORT = "the file behind the device is shorter than the device"
    SHUT_DOWN = "the filesystem was shut down"
    TURNED_READ_ONLY = "the filesystem turned read-only"
    ERRORS = "the filesystem has recorded errors"
    IO_ERROR = "the filesystem answers with an error"


@dataclass(frozen=True, slots=True)
class Fault:
    """One thing that was found wrong. `detail` says more for people."""

    kind: FaultKind
    detail: str


@dataclass(frozen=True, slots=True)
class Blank:
    """Every place that the probe read was read without error and held only zeroes."""


@dataclass(frozen=True, slots=True)
class Filesystem:
    """A filesystem was recognised. `uuid` is its own, empty where nothing tells it."""

    fs_type: str
    uuid: str = ""
    label: str = ""


@dataclass(frozen=True, slots=True)
class OtherContent:
    """Something else is there: a partition table, LUKS, LVM, RAID, or data that nothing recognises."""

    description: str


Content = Blank | Filesystem | OtherContent


# --- encrypted devices ------------------------------------------------------------------------------------------


LUKS_SUBSYSTEM = "nvmesh-csi"
"""Stands in the header of every volume that this driver encrypted, with the volume's uuid as the label."""


@dataclass(frozen=True, slots=True)
class LuksHeader:
    """A LUKS header as a device holds it. `key_slots`: how many passphrases it has; 0 = nothing opens it any more.

    `label` and `subsystem` are free text (LUKS2). What is encrypted begins at `data_offset_bytes`.
    """

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
    """There is, or was, a LUKS header; no copy of it is whole."""


@dataclass(frozen=True, slots=True)
class LuksSettings:
    """How a LUKS2 header is made. What is 0 or empty is cryptsetup's to choose.

    `pbkdf` and what belongs to it say how costly it is to try a passphrase, and so to open the volume.
    """

    cipher: str = ""
    key_bits: int = 0
    pbkdf: str = ""
    pbkdf_memory_kib: int = 0
    pbkdf_iterations: int = 0


@dataclass(frozen=True, slots=True)
class LuksMapping:
    """An encrypted device as the kernel has it opened.

    `kernel_uuid` tells what it is: kind, LUKS uuid without dashes, name. `size_bytes` is 0 and `below` None while it
    has no table: whoever made it was killed. `below` is None, too, when the device under it is gone.
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
        """Whether it is one of cryptsetup's at all."""
        return self.kernel_uuid.startswith("CRYPT-")

    def is_of(self, header: LuksHeader) -> bool:
        """Tell whether it was opened by this very header, under its own name."""
        return self.kernel_uuid == f"CRYPT-LUKS{header.version}-{header.uuid.replace('-', '')}-{self.name}"
