"""What the node's use-cases need from the machine. `csi_driver.host` fits these structurally.

All block; none logs. Failures are leaves of `csi_driver.errors`; a refusal of the kernel is `HostFailure` unless
the text below names another family.
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
    OpenDevice,
    ReadOnlyDevice,
    StorageClient,
    VolumeStatus,
)
from csi_driver.model import Capability, Usage


class Devices(Protocol):
    """Block devices of volumes."""

    def wait_for(self, name: str, uuid: str | None, *, deadline: Deadline) -> Device:
        """Wait until the volume's device is there, has a size, is proven to be who it should be, and carries I/O.

        Raises `DeadlineReached`, or `PreconditionFailed` at once when the device there is another volume.
        """
        ...

    def find(self, name: str, uuid: str | None = None) -> Device | None:
        """Return the volume's device as it is now, without waiting; None when it is absent or has no size yet.

        Its `uuid` is None where nothing proves who it is at this moment: nobody may read or write it then. `uuid` is
        who it should be, for the evidence that can only be compared.
        """
        ...

    def open(
        self, device: Device, *, write: bool = False, exclusive: bool = False
    ) -> AbstractContextManager[OpenDevice]:
        """Hold the device open; name, uuid and size are verified again on the descriptor.

        Raises `PreconditionFailed` when it is not the device that was found, carries no I/O or, with `exclusive`, is
        busy; `OperationPending` while another program works on it, which may be one that a killed driver left;
        `IdentityNotProven` with `write` while nothing proves who it is.
        """
        ...

    def is_claimed(self, device: Device) -> bool | None:
        """Tell whether a mount or a program has the device for itself (O_EXCL); None where that cannot be told now.

        False when it is gone. A mount of it that is alive claims it.
        """
        ...

    def is_open(self, device: Device) -> bool | None:
        """Tell whether anything on this machine has the device open; None where that cannot be told now."""
        ...

    def size_bytes(self, number: DeviceNumber) -> int | None:
        """Return the present size of a device without opening it; None when the device is gone."""
        ...

    def uuid_of(self, number: DeviceNumber) -> str | None:
        """Return the volume uuid that the device itself claims (loop label, SCSI serial); None when it claims none."""
        ...

    def set_read_only(self, device: Device) -> None:
        """Make the kernel refuse writes to the device for everyone on this node (BLKROSET)."""
        ...

    def client(self) -> StorageClient:
        """Return what is known now of this node's storage client. Cheap; touches no device."""
        ...

    def unnamed(self) -> tuple[str, ...]:
        """Return the uuids of attachments that no CSI driver is seen to hold. Touches no device."""
        ...

    def present(self) -> Mapping[str, str] | None:
        """Return the uuid of every volume that this node has, by name; None when one of them cannot be told."""
        ...

    def status(self, name: str) -> VolumeStatus | None:
        """Return what the storage client says of a volume; None while it says nothing. Touches no device."""
        ...

    def reference_ids(self, name: str) -> tuple[str, ...] | None:
        """Return the reference ids under which this node holds the volume; None when that cannot be told."""
        ...

    def name_of(self, number: DeviceNumber) -> str | None:
        """Return the name of the volume whose device has that number now; None when none of ours has."""
        ...

    def path_of(self, name: str) -> Path:
        """Return where the device of a volume appears: what a mount of it names as its source."""
        ...


class Attachments(Protocol):
    """Attachments that a node makes itself, where nobody attaches volumes to it. Both calls may be repeated."""

    def attach(
        self,
        volume_id: str,
        capability: Capability,
        volume_context: Mapping[str, str],
        *,
        is_again: bool = False,
        deadline: Deadline,
    ) -> Mapping[str, str]:
        """Attach the volume to this node, wait until it carries I/O, and return its publish context.

        `is_again`: it was attached before and must still be, or this raises `NotAttached`.
        Raises `VolumeNotFound`, `PreconditionFailed` naming the node that holds it, `DeadlineReached`.
        """
        ...

    def detach(self, volume_id: str, *, deadline: Deadline) -> None:
        """Give up this handle's hold of the volume on this node, and wait until that is so."""
        ...


class ReadOnlyDevices(Protocol):
    """Read-only devices over devices that are writable elsewhere on this node (decision on raw block readers)."""

    def over(self, device: Device, uuid: str, reader: str) -> Device:
        """Return a read-only device over `device`, made, or found again by the volume's uuid and the reader's id.

        `reader`: 16 hexadecimal digits, the same for every call about one reader.
        """
        ...

    def release(self, number: DeviceNumber) -> bool:
        """Take down such a device when nothing uses it; False when it is not one of ours or is in use."""
        ...

    def present(self, name: str | None = None) -> Sequence[ReadOnlyDevice]:
        """Return every such device of this machine, also those over devices of others. Looks at all loop devices.

        With `name`, a volume's: those over it; no other device is looked at.
        """
        ...

    def release_left_over(self, reader: str, name: str) -> None:
        """Take down each such device of the reader over the volume of that name that nothing uses.

        Whatever became of the one below.
        """
        ...


class Encryption(Protocol):
    """Encrypted devices: LUKS headers, and the opened device over a volume's own, which has the volume's name."""

    def why_unusable(self) -> str:
        """Say why no encrypted device can be opened on this machine, and what to do; empty = they can."""
        ...

    def header(self, device: OpenDevice) -> LuksHeader | DamagedHeader | None:
        """Return the LUKS header on the device; None when there is no trace of one. Raises `HostFailure` as `probe`."""
        ...

    def format(self, device: OpenDevice, settings: LuksSettings, passphrase: str, *, volume_uuid: str) -> None:
        """Make a LUKS2 header that names the volume, destroying what is there; has a generous time limit of its own.

        Raises `InvalidField` for a cipher or a key size that this machine does not have.
        """
        ...

    def opens(self, device: OpenDevice, passphrase: str) -> bool:
        """Tell whether the passphrase opens the volume; nothing is opened. Takes seconds on purpose."""
        ...

    def add_key(self, device: OpenDevice, settings: LuksSettings, passphrase: str, new: str) -> None:
        """Let a new passphrase open the volume, too. Raises `Denied` when `passphrase` does not."""
        ...

    def remove_key(self, device: OpenDevice, passphrase: str) -> None:
        """Let a passphrase open the volume no more. Raises `PreconditionFailed` when it is the last one."""
        ...

    def open(self, device: OpenDevice, passphrase: str, *, read_only: bool, allow_discards: bool) -> None:
        """Open the volume under its own name. Raises `Denied` when the passphrase does not open it."""
        ...

    def mapping(self, name: str) -> LuksMapping | None:
        """Return what is open under the volume's name; None when nothing is."""
        ...

    def below(self, number: DeviceNumber) -> DeviceNumber | None:
        """Return the device under an opened one; None when `number` is none such, or the one below is gone."""
        ...

    def path_of(self, name: str) -> Path:
        """Return where the opened device of a volume appears: what a mount of it names as its source."""
        ...

    def device(self, mapping: LuksMapping, uuid: str | None) -> Device:
        """Return an opened device as one of the volume. Raises `PreconditionFailed` when it is another volume's."""
        ...

    def resume(self, mapping: LuksMapping) -> None:
        """Let a device carry I/O again that a cut-off change of its table left suspended."""
        ...

    def resize(self, mapping: LuksMapping, passphrase: str | None) -> None:
        """Let an opened device take the present size of the one below.

        Raises `Denied` when the passphrase is wrong, or none is given and the kernel does not grow it without.
        """
        ...

    def close(self, mapping: LuksMapping) -> None:
        """Close an opened device; gone already is success. Raises `PreconditionFailed` while anything uses it."""
        ...


class Mounts(Protocol):
    """The kernel's mounts."""

    def at(self, path: Path) -> Mount | None:
        """Return the topmost mount whose root is `path`; None when no mount begins there. Costs the same always."""
        ...

    def table(self) -> Sequence[Mount]:
        """Return every mount there is, in the kernel's order. Costs time for each of them; touches no filesystem."""
        ...

    def of_device(self, device: Device) -> list[Mount]:
        """Return every mount of the filesystem on that device, and bind mount of its node. Reads the whole table.

        Those made from another volume's node are none: they outlived their device, and its number is this one's now.
        """
        ...

    def twins(self, path: Path) -> Sequence[Path]:
        """Return where else the mount at `path` appears, as the directory that it is on is shared under two paths."""
        ...

    def reaches_host(self, path: Path) -> bool:
        """Tell whether a mount made at `path` is seen by the machine's first process, as far as can be told."""
        ...

    def mount(self, device: Device, target: Path, fs_type: str, options: Sequence[str], *, read_only: bool) -> None:
        """Mount the device; what was made is verified before it becomes visible.

        Raises `InvalidField` naming an option that the kernel does not take.
        """
        ...

    def bind(self, source: Path, target: Path, *, read_only: bool) -> None:
        """Bind a directory, or a device node onto a file; read-only from the first moment where asked."""
        ...

    def unmount(self, path: Path, *, lost: DeviceNumber | None = None) -> None:
        """Take off the topmost mount at `path`; none there is success. Raises `PreconditionFailed` if busy.

        `lost`: the device it is of, where that is gone or was taken from this node. Then it is taken off also where it
        is busy, and nothing that its users still hold back is ever written.
        """
        ...


class Filesystems(Protocol):
    """What devices hold."""

    def supported(self) -> Sequence[str]:
        """Return the filesystem types that this machine can make and mount, "ext4" first."""
        ...

    def probe(self, device: OpenDevice, *, deadline: Deadline) -> Content:
        """Tell what the device holds, reading past the page cache: head, tail, every place of a superblock.

        Raises `HostFailure` when any read fails or comes back short: then nothing is known.
        """
        ...

    def first_data(
        self, device: OpenDevice, *, deadline: Deadline | None, progress: Callable[[int, int], None]
    ) -> int | None:
        """Read every block; return the offset of the first byte that is not zero, or None when there is none.

        `progress(done_bytes, total_bytes)` is called now and then. Raises `HostFailure` as `probe` does,
        `DeadlineReached` when a deadline was given and passed.
        """
        ...

    def wipe(self, device: OpenDevice) -> None:
        """Write zeroes over all that `probe` reads, so that nothing is recognised there any more."""
        ...

    def make(
        self, device: OpenDevice, fs_type: str, options: Sequence[str], *, uuid: str, asked: Sequence[str] = ()
    ) -> None:
        """Make a filesystem with that uuid, destroying what is there; on disk when the call returns.

        `asked`: what of the options the caller wanted; `InvalidField` names it where it does not do.
        The device's identity is proven once more right before. Has a generous time limit of its own.
        """
        ...

    def check(self, device: Device, fs_type: str) -> None:
        """Repair what can be repaired without a question. Raises `PreconditionFailed` when a person must decide."""
        ...

    def recorded_bytes(self, device: Device, fs_type: str) -> int:
        """Return the size of the filesystem as its superblock records it. Raises `PreconditionFailed` without one."""
        ...

    def grow_unmounted(self, device: Device, fs_type: str) -> bool:
        """Grow an unmounted filesystem to its device. False when this type grows only mounted.

        Raises `PreconditionFailed` when the device is in use.
        """
        ...

    def grow_mounted(self, path: Path, device: Device, fs_type: str) -> None:
        """Grow a mounted filesystem to its device.

        Raises `PreconditionFailed` where this machine does not let it grow while mounted, naming what is missing.
        """
        ...

    def usage(self, path: Path) -> Usage:
        """Return the use of the filesystem at `path` (statfs). May hang on a dead device: call it in a worker."""
        ...


class Probes(Protocol):
    """What can be found wrong by looking. May hang on a dead device, but for `dead`: call them in a worker."""

    def dead(self, mounted: Mount) -> Fault | None:
        """Return why nothing can be written to a filesystem any more; None when it can. Never waits for the device."""
        ...

    def device(self, number: DeviceNumber) -> Sequence[Fault]:
        """Return what the kernel shows to be wrong with a device; it is not opened."""
        ...

    def filesystem(self, mounted: Mount) -> Sequence[Fault]:
        """Return what is wrong with a mounted filesystem: what the kernel shows of it, and how its root answers."""
        ...


class Paths(Protocol):
    """Target and staging paths, below the configured roots; symbolic links on the way are never followed."""

    def check(self, path: str, field: str, *, takes_off: bool = False) -> Path:
        """Return the path when it is absolute, plain (no `..`, no NUL) and below a root. Raises `InvalidField`.

        `takes_off`: nothing is made there, and so a link on the way is followed that leads below a root.
        """
        ...

    def kind(self, path: Path) -> str:
        """Tell what is at the path itself: "directory", "file", "device", "other" or "absent"."""
        ...

    def make_directory(self, path: Path) -> None:
        """Create the directory; there already is success.

        Raises `PreconditionFailed` when its parent is absent, or something else is there.
        """
        ...

    def make_file(self, path: Path) -> None:
        """Create an empty file to bind a device onto; there already is success. Raises as `make_directory`."""
        ...

    def set_mode(self, path: Path, mode: int) -> None:
        """Change the permission bits of the directory at the path."""
        ...

    def remove(self, path: Path) -> None:
        """Remove an empty directory or file; absent is success. Never a tree.

        Raises `PreconditionFailed` when it is anything else, or a mount point.
        """
        ...


class Tools(Protocol):
    """What the machine must have."""

    def problems(self) -> Sequence[str]:
        """Return what keeps this machine from serving volumes, a sentence each; empty = all well. Cheap."""
        ...
