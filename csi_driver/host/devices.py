"""Block devices of volumes: found by name, believed only after their identity was proven, opened with proof.

What proves it: the client's `status.json`, and the open device itself (a loop device's label, a SCSI serial number).
All evidence that there is must agree; without any, nothing is written. udev is used as an alarm clock at most: its
database may be older than the device's content and is never read.

The client's status is read before a device is opened, and a device that is not said to carry I/O is not opened: its
open may hang, and cannot be killed then. Where I/O is lost in between, the thread is lost (`node.concurrency`).
"""

from __future__ import annotations

import contextlib
import os
import stat
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

from csi_driver.deadline import SYSTEM_CLOCK, Clock, Deadline
from csi_driver.errors import (
    DeadlineReached,
    IdentityNotProven,
    InvalidField,
    PreconditionFailed,
    SystemCallFailed,
)
from csi_driver.host import block_devices, ioctls
from csi_driver.host.block_devices import NOT_READY, device_events
from csi_driver.host.connectors import device_mapper, loop, nvmesh
from csi_driver.host.connectors.nvmesh import DeviceEvidence
from csi_driver.host_model import Device, DeviceNumber, OpenDevice, StorageClient, VolumeStatus
from csi_driver.model import CSI_NAME_PREFIX, is_uuid, is_volume_name


class LinuxDevices:
    """Fits `csi_driver.node.ports.Devices`.

    `device_root` holds a device node for each volume, by name. `status_root` is the client's status directory.
    """

    def __init__(
        self,
        device_root: Path = Path("/dev/nvmesh"),
        status_root: Path = Path("/proc/nvmeibc"),
        *,
        clock: Clock = SYSTEM_CLOCK,
        udev_control: Path = Path("/run/udev/control"),
        status_files: nvmesh.StatusFiles | None = None,
    ) -> None:
        self._root = device_root
        self._status = status_files or nvmesh.StatusFiles(status_root)
        self._clock = clock
        self._udev_control = udev_control

    # --- finding ---

    def path_of(self, name: str) -> Path:
        """Return where the device of a volume appears: what a mount of it names as its source."""
        if not is_volume_name(name):
            raise InvalidField("volume name", name, "the name of a volume")
        return self._root / name

    def find(self, name: str, uuid: str | None = None) -> Device | None:
        """Return the volume's device as it is now; None when it is absent or has no size yet.

        `uuid` is who it should be: where only a serial number speaks, that is all it can be compared with.
        """
        seen = self._look(name)
        return replace(seen[0], uuid=seen[1].uuid_for(uuid)) if seen is not None else None

    def wait_for(self, name: str, uuid: str | None, *, deadline: Deadline) -> Device:
        """Wait until the volume's device is there, has a size, is proven to be who it should be, and carries I/O.

        A device that is clearly another volume is refused at once with `PreconditionFailed`; evidence that does not
        agree with itself is awaited to settle, and so is a client that comes back from an upgrade. Raises
        `DeadlineReached` when time is up, naming what is missing.
        """
        wanted = uuid.lower() if uuid else None
        path = self.path_of(name)
        with device_events(deadline.clock, self._udev_control) as pause:
            while True:
                device, missing = self._ready(name, wanted)
                if device is not None:
                    return device
                left_s = deadline.remaining_s()
                if left_s <= 0:
                    raise DeadlineReached(f"the device {path} ({missing})")
                pause(left_s)

    def _ready(self, name: str, uuid: str | None) -> tuple[Device | None, str]:
        """Return the device when it can be used, else None and what is missing."""
        seen = self._look(name)
        if seen is None:
            return None, self._absence(name)
        device, claims = seen
        unsettled = claims.disagreement(name)
        if unsettled is not None:
            return None, unsettled
        refusal = claims.refusal(name) or claims.mismatch(name, uuid)
        if refusal is not None:
            raise PreconditionFailed(refusal)
        if not claims.proves():
            return None, f"{self._silence()}: nothing on this machine says that it is {uuid or 'a volume at all'}"
        unusable = claims.unusable(name)
        if unusable is not None:
            return None, unusable
        return replace(device, uuid=claims.uuid_for(uuid)), ""

    def _absence(self, name: str) -> str:
        """Say what is missing where there is no device; a node that somebody removed is made by nobody again."""
        status = self._status.volume(name)
        if status is None or os.path.lexists(self.path_of(name)):
            return "it is absent or has no size yet"
        return (
            f"the storage client shows the volume ({status.details}), but its device node is missing: it is not made "
            "yet, or was removed; if it stays so, detach the volume and attach it again"
        )

    def _silence(self) -> str:
        """Say why the client may be saying nothing."""
        client = self.client()
        if client.is_upgrading:
            return "the storage client is being upgraded, or starts"
        return (
            "the storage client runs"
            if client.uuid is not None
            else "the storage client is not running yet (no status files)"
        )

    def device_at(self, name: str, path: Path, uuid: str | None) -> Device | None:
        """Return what is at `path`, such as an opened encrypted device, as the volume's; None when nothing is."""
        seen = self._look_at(name, path)
        return replace(seen[0], uuid=seen[1].uuid_for(uuid)) if seen is not None else None

    def _look(self, name: str) -> tuple[Device, DeviceEvidence] | None:
        return self._look_at(name, self.path_of(name))

    def _look_at(self, name: str, path: Path) -> tuple[Device, DeviceEvidence] | None:
        try:
            node = os.stat(path)
            if not stat.S_ISBLK(node.st_mode):
                return None
            status = self._status.volume(name)
            if status is not None and status.io_enabled is not True:
                return self._unopened(name, path, ioctls.device_number(node.st_rdev), status)
            fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
        except OSError as error:
            if error.errno in NOT_READY:
                return None
            raise SystemCallFailed(f"open {path}", error.errno or 0) from error
        try:
            return self._describe(name, path, fd)
        finally:
            os.close(fd)

    def _unopened(
        self, name: str, path: Path, number: DeviceNumber, status: VolumeStatus
    ) -> tuple[Device, DeviceEvidence] | None:
        """Describe a device that carries no I/O, by what sysfs and the client say of it."""
        size = block_devices.size_bytes(number)
        if not size:
            return None
        claims = DeviceEvidence(status)
        device = Device(
            name,
            path,
            number,
            size,
            read_only=block_devices.sys_number(number, "ro") == 1,
            uuid=status.uuid,
            block_bytes=block_devices.sys_number(number, "queue/logical_block_size") or 4096,
            write_refusal=claims.write_refusal(),
            disk_sequence=block_devices.sys_number(number, "diskseq"),
        )
        return device, claims

    def _describe(self, name: str, path: Path, fd: int) -> tuple[Device, DeviceEvidence] | None:
        status = os.fstat(fd)
        if not stat.S_ISBLK(status.st_mode):
            return None
        size = ioctls.size_bytes(fd)
        if size == 0:
            return None
        number = ioctls.device_number(status.st_rdev)
        with self._speaking(fd, number) as (speaker, is_loop):
            claims = DeviceEvidence(
                status=self._status.volume(name),
                label_uuid=loop.claimed_uuid(speaker) if is_loop else None,
                serial=None if is_loop else nvmesh.read_serial(speaker),
                is_loop=is_loop,
            )
        device = Device(
            name,
            path,
            number,
            size,
            read_only=ioctls.is_read_only(fd),
            uuid=claims.uuid(),
            block_bytes=ioctls.logical_block_bytes(fd),
            write_refusal=claims.write_refusal(),
            disk_sequence=ioctls.disk_sequence(fd),
        )
        return device, claims

    @contextlib.contextmanager
    def _speaking(self, fd: int, number: DeviceNumber) -> Iterator[tuple[int, bool]]:
        """Give the device that says who an open device is, and whether it is a loop device.

        An encrypted device has nothing to say: the one below it does.
        """
        below = device_mapper.below(number)
        if below is None:
            yield fd, number.major == loop.LOOP_MAJOR
            return
        try:
            speaker = self.open_number(below)
        except OSError as error:
            raise SystemCallFailed(f"open the device {below} under {number}", error.errno or 0) from error
        try:
            yield speaker, below.major == loop.LOOP_MAJOR
        finally:
            os.close(speaker)

    # --- opening ---

    @contextlib.contextmanager
    def open(self, device: Device, *, write: bool = False, exclusive: bool = False) -> Iterator[OpenDevice]:
        """Hold the device open, past the page cache (O_DIRECT); it is proven on the descriptor to be the one found.

        `exclusive` also proves that nothing has it mounted or claimed, and holds its lock (flock, as udev and others
        respect it: systemd.io/BLOCK_DEVICE_LOCKING), which a program that inherits the descriptor holds on to.
        It is no claim (O_EXCL) by itself, because mkfs and fsck make that claim.
        Raises `PreconditionFailed` when it is another device, is busy or carries no I/O, `OperationPending` while
        another program holds its lock, and `IdentityNotProven` when it is to be written to and nothing proves now who
        it is.
        """
        self._require_io(device.name)
        flags = (os.O_RDWR if write else os.O_RDONLY) | os.O_CLOEXEC | os.O_DIRECT
        try:
            fd = os.open(device.path, flags)
        except OSError as error:
            if error.errno in NOT_READY:
                raise PreconditionFailed(f"{device.path} is gone, expected {device.number}") from error
            raise SystemCallFailed(f"open {device.path}", error.errno or 0) from error
        try:
            if exclusive:
                block_devices.lock_unclaimed(fd, device.path, self._clock)
            yield OpenDevice(fd, self._proven(fd, device, write=write))
        finally:
            os.close(fd)

    def _require_io(self, name: str) -> None:
        status = self.status(name)
        unusable = DeviceEvidence(status).unusable(name)
        if unusable is not None:
            raise PreconditionFailed(unusable)

    def is_claimed(self, device: Device) -> bool | None:
        """Tell whether a mount, an encrypted device or a program has the device for itself (O_EXCL) at this moment.

        False when it is gone. None where that cannot be told: it carries no I/O, and is not opened.
        """
        status = self.status(device.name)
        if status is not None and status.io_enabled is not True:
            return None
        return block_devices.is_claimed(device.path)

    def is_open(self, device: Device) -> bool | None:
        """Tell whether anything on this machine has the device open; None where that cannot be told now.

        Where the client counts no opens, a device that nothing has for itself is taken for closed.
        """
        opens = self._status.opens(device.name)
        return opens > 0 if opens is not None else self.is_claimed(device)

    def _proven(self, fd: int, device: Device, *, write: bool) -> Device:
        seen = self._describe(device.name, device.path, fd)
        if seen is None:
            raise PreconditionFailed(f"{device.path} has no size now, expected {device.size_bytes} bytes")
        found, claims = seen
        against = claims.against(device.name, device.uuid) or claims.unusable(device.name)
        if against is not None:
            raise PreconditionFailed(against)
        for what, is_now, was in (
            ("the number", found.number, device.number),
            ("the disk sequence number", found.disk_sequence, device.disk_sequence or found.disk_sequence),
            ("the uuid", found.uuid or device.uuid, device.uuid or found.uuid),
            ("a size in bytes of", found.size_bytes, device.size_bytes),
        ):
            if is_now != was:
                raise PreconditionFailed(f"{device.path} claims {what} {is_now}, expected {was}")
        if write and not claims.proves():
            if not claims.is_loop:
                raise IdentityNotProven(device.path, self._silence())
            raise PreconditionFailed(f"{device.path}: nothing on this machine proves which volume it is")
        return found if found.uuid is not None else device

    def set_read_only(self, device: Device) -> None:
        """Make the kernel refuse writes to the device for everyone on this node (BLKROSET)."""
        with self.open(device) as opened:
            ioctls.set_read_only(opened.fd, True)

    # --- facts by number ---

    def size_bytes(self, number: DeviceNumber) -> int | None:
        """Return the present size of a device without opening it; None when the device is gone."""
        return block_devices.size_bytes(number)

    def open_number(self, number: DeviceNumber) -> int:
        """Open a device for reading by its number, whatever nodes there are here; `OSError` where it is gone."""
        return block_devices.open_number(number, self._root)

    def uuid_of(self, number: DeviceNumber) -> str | None:
        """Return the volume uuid that the device itself claims; None when it claims none.

        A serial number holds only a part of the uuid: it is completed by the status of the volume that fits it.
        """
        number = device_mapper.below(number) or number
        status = self.status(self.name_of(number) or "")
        if status is not None and status.io_enabled is not True:
            return None
        try:
            fd = self.open_number(number)
        except OSError:
            return None
        try:
            if number.major == loop.LOOP_MAJOR:
                return loop.claimed_uuid(fd)
            serial = nvmesh.read_serial(fd)
        finally:
            os.close(fd)
        return self._uuid_with_serial(number, serial) if serial is not None else None

    def _uuid_with_serial(self, number: DeviceNumber, serial: str) -> str | None:
        status = self._status.volume(self.name_of(number) or "")
        return status.uuid if status is not None and nvmesh.serial_of(status.uuid) == serial else None

    def name_of(self, number: DeviceNumber) -> str | None:
        """Return the name under which the device root has this device; None when it does not."""
        try:
            nodes = sorted(self._root.iterdir())
        except OSError:
            return None
        for node in nodes:
            with contextlib.suppress(OSError):
                status = os.stat(node)
                if stat.S_ISBLK(status.st_mode) and ioctls.device_number(status.st_rdev) == number:
                    return node.name
        return None

    # --- the client ---

    def client(self) -> StorageClient:
        """Return what is known now of this node's storage client.

        Attachments without a device are the client's own (hidden): they take places that no volume can have.
        """
        client = self._status.client()
        try:
            devices = {entry.name for entry in self._root.iterdir()}
        except OSError:
            devices = set()
        limit = client.volume_limit
        if limit:
            limit = max(1, limit - len(self._status.shown() - devices))
        return replace(client, is_expected=client.is_expected or bool(devices), volume_limit=limit)

    def unnamed(self) -> tuple[str, ...]:
        """Return the uuids of attachments that no CSI driver is seen to hold. Reads a small file or two for each.

        Drivers attach under an id of the handle; whoever names none gets the volume's uuid. So do handles without such
        an id, static ones and those of the drivers up to 1.4: of the latter the volumes are told by their name.
        """
        try:
            names = [entry.name for entry in self._root.iterdir()]
        except OSError:
            return ()
        shown = (self._status.volume(name) for name in names if self._is_unnamed(name))
        return tuple(status.uuid for status in shown if status is not None)

    def present(self) -> dict[str, str] | None:
        """Return the uuid of every volume that this node has, by name; None when one of them cannot be told.

        While the storage client does not run, is upgraded or starts, volumes that are attached may not be shown.
        """
        client = self._status.client()
        if client.uuid is None or client.is_upgrading or client.problem:
            return None
        try:
            nodes = {entry.name for entry in self._root.iterdir()}
        except OSError:
            nodes = set()
        found: dict[str, str] = {}
        for name in filter(is_volume_name, nodes | self._status.shown()):
            status = self._status.volume(name)
            device = self.find(name) if status is None and name in nodes else None
            uuid = status.uuid if status is not None else device.uuid if device is not None else None
            if uuid is not None:
                found[name] = uuid
            elif device is not None:
                return None
        return found

    def _is_unnamed(self, name: str) -> bool:
        ids = self._status.reference_ids(name) if is_volume_name(name) else None
        return bool(ids) and all(map(is_uuid, ids or ())) and not name.startswith(CSI_NAME_PREFIX)

    def status(self, name: str) -> VolumeStatus | None:
        """Return what the client says of a volume; None while it says nothing that can be read."""
        return self._status.volume(name) if is_volume_name(name) else None

    def reference_ids(self, name: str) -> tuple[str, ...] | None:
        """Return the reference ids under which this node holds a volume; None when that cannot be told."""
        return self._status.reference_ids(name) if is_volume_name(name) else None
