"""The nouns of one machine: devices, mounts, and what a device holds.

Values only. `csi_driver.host` makes them, `csi_driver.node` decides by them.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True, slots=True, order=True)
class DeviceNumber:
    """Major and minor number: the only identity by which devices and mounts are compared."""

    major: int
    minor: int

    def __str__(self) -> str:
        return f"{self.major}:{self.minor}"


@dataclass(frozen=True, slots=True)
class Device:
    """A block device that was found and whose identity was verified once.

    `uuid` is the volume's as the evidence on this machine says it; None where nothing says it now.
    `read_only`: the kernel refuses writes. `client_read_only`: the storage client says that it refuses them, whatever
    the kernel shows.
    """

    name: str
    path: Path
    number: DeviceNumber
    size_bytes: int
    read_only: bool
    uuid: str | None
    block_bytes: int = 4096
    client_read_only: bool = False

    @property
    def takes_writes(self) -> bool:
        """Whether nothing on this machine is known to refuse writes to it."""
        return not (self.read_only or self.client_read_only)


@dataclass(frozen=True, slots=True)
class OpenDevice:
    """A device held open; its identity was verified again on this very descriptor."""

    fd: int
    device: Device


@dataclass(frozen=True, slots=True)
class VolumeStatus:
    """What the storage client of this machine says of a volume that is attached here. None = it does not say.

    `refusal`: why the device may not be used although it is there; empty = it may. `io_enabled` is False where the
    client carries no I/O for it, `words` then repeats what the client says: an attachment that is not finished, or one
    that was fenced, suspended or lost its storage. Reading such a device hangs, or fails after half a minute.
    """

    name: str
    uuid: str
    size_bytes: int | None = None
    refusal: str = ""
    io_enabled: bool | None = None
    refuses_writes: bool | None = None
    words: str = ""


@dataclass(frozen=True, slots=True)
class StorageClient:
    """The storage client of this machine as it shows itself now.

    `uuid` is None while it cannot be read: before the client has started, for the moment of an upgrade under running
    volumes (`is_upgrading`), or for good where there is none. `is_expected`: a client belongs here, so an absent one
    comes back. `problem`: why it is of no use although it is there; empty = it is.
    """

    uuid: str | None
    is_expected: bool = False
    is_upgrading: bool = False
    problem: str = ""


@dataclass(frozen=True, slots=True)
class ReadOnlyDevice:
    """A read-only device that stands over another one for a reader; `over` is that one's node when it was made."""

    number: DeviceNumber
    over: Path


@dataclass(frozen=True, slots=True)
class Mounted:
    """A mount as the kernel shows it at one path (the topmost, where several are stacked).

    `number` is the device of the mounted filesystem, or, for a bind mount of a device node, of the filesystem
    the node lies in; then `node_number` is the device that the node stands for.
    `source` is what the mount was made from, e.g. `/dev/nvmesh/csi-1`. `root` is the path within the filesystem.
    `options` are those of the mount and of the filesystem as the kernel spells them, without `ro` and `rw`.
    """

    path: Path
    number: DeviceNumber
    fs_type: str
    source: str
    root: str
    read_only: bool
    options: frozenset[str]
    node_number: DeviceNumber | None = None


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
