# SPDX-License-Identifier: Apache-2.0
"""Protocols of the adapters that the node's use cases call; `csi_driver.host` implements them.

Methods block and do not log. They raise leaves of `csi_driver.errors`: `HostFailure` where the kernel refuses, unless
another family is named.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Protocol

from csi_driver.deadline import Deadline
from csi_driver.host_model import (
    Content,
    DamagedHeader,
    Device,
    DeviceNumber,
    Fault,
    LuksHeader,
    LuksMapping,
    LuksSettings,
    Mount,
    NvmeOrphan,
    OpenDevice,
    ReadOnlyDevice,
    StorageClient,
    VolumeStatus,
)
from csi_driver.model import Capability, Usage
from csi_driver.nvme_model import ConnectedVolume


class Devices(Protocol):
    """Block devices of volumes, and status files of the storage client."""

    def client(self) -> StorageClient: ...
    def status(self, name: str) -> VolumeStatus | None: ...
    def name_of(self, number: DeviceNumber) -> str | None: ...
    def path_of(self, name: str) -> Path: ...

    def wait_for(self, name: str, uuid: str | None, *, deadline: Deadline) -> Device:
        """Wait until the device has a size, carries I/O and is proven to be the volume's."""

    def find(self, name: str, uuid: str | None = None) -> Device | None:
        """Return the present device, its `uuid` only if proven; None if absent or empty."""

    def open(
        self, device: Device, *, write: bool = False, exclusive: bool = False
    ) -> AbstractContextManager[OpenDevice]:
        """Open the device and verify name, UUID and size again on the descriptor.

        Raises `PreconditionFailed` for another device than the given one, one without I/O or, with `exclusive`, a busy
        one; `OperationPending` while another program works on it; `IdentityNotProven` with `write` without identity.
        """

    def is_claimed(self, device: Device) -> bool | None:
        """Return whether the device is open exclusively (O_EXCL); None = not known now."""

    def is_open(self, device: Device) -> bool | None:
        """Return whether anything on this machine has the device open; None = not known now."""

    def describe_openers(self, device: Device) -> str:
        """Name up to three users of an open device: "by " devices over it, mounts, processes."""

    def size_bytes(self, number: DeviceNumber) -> int | None:
        """Return the size of a device without opening it; None when the device is gone."""

    def uuid_of(self, number: DeviceNumber) -> str | None:
        """Return the volume UUID of the device itself (loop label, SCSI serial number)."""

    def set_read_only(self, device: Device) -> None:
        """Make the kernel refuse writes to the device for everyone on this node (BLKROSET)."""

    def unnamed(self) -> tuple[str, ...]:
        """Return the UUIDs of volumes with an attachment that names no CSI driver."""

    def present(self) -> Mapping[str, str] | None:
        """Return the UUID of every volume on this node, by name; None if not all are known."""

    def reference_ids(self, name: str) -> tuple[str, ...] | None:
        """Return the reference IDs of this node for the volume; None = not known now."""

    def connect(self, volume: ConnectedVolume, holder: str, *, deadline: Deadline) -> None:
        """Connect the volume by NVMe/TCP, prove its namespace and make its device; may be repeated.

        `holder`: the staging path, kept in the status of the volume until `disconnect`. Raises `PreconditionFailed` for
        another namespace and where the target refuses, and `StorageUnavailable`.
        """

    def disconnect(self, name: str, holder: str, *, is_over: bool = False, deadline: Deadline) -> None:
        """Remove the holder, and the connection with the last one. Raises `StorageUnavailable` while that remains.

        `is_over`: the attachment is, so that no write arrives. Else a device that may be in use stays connected.
        """

    def connection(self, name: str) -> VolumeStatus | None:
        """Return the status of a volume that this node connected; None for all others."""

    def connected(self) -> frozenset[str]:
        """Return the names of the volumes that this node connected."""

    def orphans(self) -> Sequence[NvmeOrphan]: ...

    def remove_orphan(self, orphan: NvmeOrphan, *, deadline: Deadline) -> bool:
        """End such a connection; False while its device is claimed, or when a record names it by now."""


class Attachments(Protocol):
    """Attachments that the node makes itself (--attach-by node). Both methods may be repeated."""

    def attach(
        self,
        volume_id: str,
        capability: Capability,
        volume_context: Mapping[str, str],
        *,
        is_again: bool = False,
        deadline: Deadline,
    ) -> Mapping[str, str]:
        """Attach the volume, wait until it carries I/O, and return its publish context.

        `is_again`: raise `NotAttached` unless it is still attached. Raises `VolumeNotFound`, `PreconditionFailed`
        naming the node that has it, `DeadlineReached`.
        """

    def detach(self, volume_id: str, *, deadline: Deadline) -> None: ...


class ReadOnlyDevices(Protocol):
    """Read-only loop devices over devices that are writable elsewhere on this node."""

    def over(self, device: Device, uuid: str, reader: str) -> Device:
        """Return the reader's device over `device`, made if absent. `reader`: 16 hex digits."""

    def release(self, number: DeviceNumber) -> bool:
        """Remove such a device; False when it is not one of this driver or is in use."""

    def present(self, name: str | None = None) -> Sequence[ReadOnlyDevice]:
        """Return all such devices, or those of one volume without looking at other devices."""

    def release_left_over(self, reader: str, name: str) -> None:
        """Remove each unused device of the reader over that volume."""


class Encryption(Protocol):
    """LUKS headers, and opened encrypted devices, which have the volume's name."""

    def mapping(self, name: str) -> LuksMapping | None: ...
    def path_of(self, name: str) -> Path: ...
    def add_key(self, device: OpenDevice, settings: LuksSettings, passphrase: str, new: str) -> None: ...

    def why_unusable(self) -> str:
        """Return why this machine cannot open encrypted devices, and what to do; empty = it can."""

    def header(self, device: OpenDevice) -> LuksHeader | DamagedHeader | None:
        """Return the LUKS header; None without a trace of one. Raises as `Filesystems.probe`."""

    def format(self, device: OpenDevice, settings: LuksSettings, passphrase: str, *, volume_uuid: str) -> None:
        """Make a LUKS2 header that names the volume; `InvalidField` for an unknown cipher."""

    def opens(self, device: OpenDevice, passphrase: str) -> bool:
        """Test a passphrase without opening the volume; takes seconds by design."""

    def remove_key(self, device: OpenDevice, passphrase: str) -> None:
        """Remove a passphrase. Raises `PreconditionFailed` for the last one."""

    def open(self, device: OpenDevice, passphrase: str, *, read_only: bool, allow_discards: bool) -> None:
        """Open the volume under its own name. Raises `Denied` when the passphrase is wrong."""

    def below(self, number: DeviceNumber) -> DeviceNumber | None:
        """Return the device under an opened one; None if it is gone or `number` is none."""

    def device(self, mapping: LuksMapping, uuid: str | None) -> Device:
        """Return an opened device; `PreconditionFailed` if it is another volume's."""

    def resume(self, mapping: LuksMapping) -> None:
        """Resume I/O of a device that an interrupted resize left suspended."""

    def resize(self, mapping: LuksMapping, passphrase: str | None) -> None:
        """Grow an opened device to the device under it; `Denied` without its passphrase."""

    def close(self, mapping: LuksMapping) -> None:
        """Close an opened device; closed is success. `PreconditionFailed` while in use."""


class Mounts(Protocol):
    """The kernel's mounts."""

    def at(self, path: Path) -> Mount | None:
        """Return the topmost mount at `path`; None without one. Does not read the mount table."""

    def table(self) -> Sequence[Mount]:
        """Return all mounts in the kernel's order; touches no filesystem."""

    def of_device(self, device: Device) -> list[Mount]:
        """Return all mounts and bind mounts of the device, not those of another volume."""

    def twins(self, path: Path) -> Sequence[Path]:
        """Return the other paths of a mount in a shared bind mount."""

    def mount(self, device: Device, target: Path, fs_type: str, options: Sequence[str], *, read_only: bool) -> None:
        """Mount the device, verified before it is visible; `InvalidField` names an option."""

    def bind(self, source: Path, target: Path, *, read_only: bool) -> None:
        """Bind-mount a directory, or a device node onto a file."""

    def unmount(self, path: Path, *, lost: DeviceNumber | None = None) -> None:
        """Unmount the topmost mount at `path`; none is success. `PreconditionFailed` if busy.

        `lost`: its device, if that is gone or was detached. A busy mount is then detached, its pending writes are lost.
        """


class Filesystems(Protocol):
    """Content of devices."""

    def supported(self, wanted: str = "") -> Sequence[str]:
        """Return the types that this machine can make and mount, "ext4" first; only `wanted` if it is given."""

    def probe(self, device: OpenDevice, *, deadline: Deadline, own_uuid: str | None = None) -> Content:
        """Read head, tail and superblock locations from the disk; `HostFailure` if short.

        `own_uuid`: a filesystem with this uuid is expected, and needs no other look when its superblock is certain.
        """

    def first_data(
        self, device: OpenDevice, *, deadline: Deadline | None, progress: Callable[[int, int], None]
    ) -> int | None:
        """Read every block; return the offset of the first byte that is not zero."""

    def wipe(self, device: OpenDevice) -> None:
        """Write zeroes to every location that `probe` reads."""

    def make(
        self, device: OpenDevice, fs_type: str, options: Sequence[str], *, uuid: str, asked: Sequence[str] = ()
    ) -> None:
        """Make a filesystem with that UUID, destroying the content; has a long timeout of its own.

        `asked`: options of the user, named by `InvalidField` when mkfs refuses them.
        """

    def change_btrfs_uuid(self, device: OpenDevice, uuid: str) -> None:
        """Give an unmounted btrfs another UUID. Raises `PreconditionFailed` where it cannot, and changes nothing."""

    def check(self, device: Device, fs_type: str) -> int:
        """Check and repair; return the size as `recorded_bytes`. `PreconditionFailed` when it needs manual repair."""

    def recorded_bytes(self, device: Device, fs_type: str) -> int:
        """Return the size in the superblock. Raises `PreconditionFailed` without one."""

    def grow_unmounted(self, device: Device, fs_type: str) -> bool:
        """Grow an unmounted filesystem; False when the type grows only mounted."""

    def grow_mounted(self, path: Path, device: Device, fs_type: str) -> None:
        """Grow a mounted filesystem. Raises `PreconditionFailed` where it cannot."""

    def trim(self, path: Path, device: Device, fs_type: str, *, deadline: Deadline) -> int:
        """Discard the free blocks of a mounted filesystem and return their bytes, also if discarded before.

        Raises `SystemCallFailed` with EOPNOTSUPP or ENOTTY where it or its device takes no discards, `DeadlineReached`.
        """

    def usage(self, path: Path) -> Usage:
        """Return statfs(2) of the filesystem. May hang: call it in a `Watchdog`."""


class Probes(Protocol):
    """Health of devices and filesystems. All but `dead` may hang: call them in a `Watchdog`."""

    def dead(self, mounted: Mount) -> Fault | None:
        """Return why a filesystem takes no writes any more. Never waits for the device."""

    def device(self, number: DeviceNumber) -> Sequence[Fault]:
        """Return the faults of a device that the kernel shows; does not open it."""

    def filesystem(self, mounted: Mount) -> Sequence[Fault]:
        """Return the faults of a mounted filesystem."""


class Paths(Protocol):
    """Target and staging paths below the configured roots. Symbolic links are not followed."""

    def check(self, path: str, field: str, *, takes_off: bool = False) -> Path:
        """Return an absolute, plain path (no `..`, no NUL) below a root. Raises `InvalidField`.

        `takes_off`: for an unmount; follows links that lead below a root.
        """

    def kind(self, path: Path) -> str:
        """Return "directory", "file", "device", "other" or "absent"."""

    def make_directory(self, path: Path) -> None:
        """Create the directory if needed; `PreconditionFailed` for another kind."""

    def make_file(self, path: Path) -> None:
        """Create an empty file if needed, to bind a device to. Raises as `make_directory`."""

    def set_mode(self, path: Path, mode: int) -> None: ...

    def remove(self, path: Path) -> None:
        """Remove an empty directory or file; `PreconditionFailed` for anything else."""


class Tools(Protocol):
    """Requirements of the machine."""

    def problems(self) -> Sequence[str]: ...
