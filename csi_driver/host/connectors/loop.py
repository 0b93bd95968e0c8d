# SPDX-License-Identifier: Apache-2.0
"""Loop devices: over the files of the embedded storage manager, and read-only ones over block devices.

The kernel holds all state: sysfs tells which loop devices are bound, and the label given at LOOP_CONFIGURE
(lo_file_name; it begins with the volume's uuid) tells for which volume. Device nodes may be missing, or left over with
a number that was bound to another file since: they are compared by number.
"""

from __future__ import annotations

import contextlib
import errno
import logging
import os
import re
import threading
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path

from csi_driver.deadline import Deadline
from csi_driver.errors import HostFailure, NotFreezable, PreconditionFailed, SystemCallFailed
from csi_driver.host import block_devices, ioctls
from csi_driver.host.block_devices import SYS_DEV_BLOCK, node_number
from csi_driver.host.syscalls import closing, open_file, read_file, system_call
from csi_driver.host_model import Device, DeviceNumber, LoopDevice, ReadOnlyDevice, uuid_of_label

_log = logging.getLogger(__name__)

LOOP_MAJOR = 7
_DELETED = " (deleted)"
_SYS_BLOCK, _DEV = Path("/sys/block"), Path("/dev")
_BIND_ATTEMPTS = 64
_GRACE_S = 0.2
_GONE_WITHIN_S = 2.0
_WRITTEN, _DISCARDED = 6, 13
_FENCED_BYTES = 512
"""Less than the smallest block that is written here, 4096: every request is beyond the end of the device."""


def claimed_uuid(fd: int) -> str | None:
    """Return the volume uuid in the label of an open loop device; None when it has none."""
    status = ioctls.loop_status(fd)
    return uuid_of_label(status.label) if status is not None else None


@dataclass(slots=True)
class LoopDevices:
    """The loop devices of this machine."""

    _binding: threading.Lock = field(default_factory=threading.Lock, init=False)

    def attach(
        self, file: Path, node: Path | None, *, label: str, read_only: bool, block_size: int = 4096
    ) -> LoopDevice:
        """Bind a file or block device to a free loop device, by direct I/O where possible; None: /dev/loopN is used."""
        if len(label.encode()) > ioctls.LOOP_LABEL_LIMIT:
            raise HostFailure(f"loop label: expected at most {ioctls.LOOP_LABEL_LIMIT} bytes, got {label!r}")
        with closing(open_file(file, (os.O_RDONLY if read_only else os.O_RDWR) | os.O_NOFOLLOW)) as backing:
            number = self._bind(backing, file, label, ioctls.LOOP_READ_ONLY if read_only else 0, block_size)
            rdev = os.fstat(backing).st_rdev
        under = ioctls.device_number(rdev) if rdev else None
        device = LoopDevice(number, _number_of(number), file, label, read_only, backing=under)
        if node is None:
            return device
        try:
            return self.ensure_node(device, node)
        except BaseException:
            self.detach(device)
            raise

    def ensure_node(self, device: LoopDevice, node: Path) -> LoopDevice:
        block_devices.ensure_node(node, device.device_number)
        return replace(device, node=node)

    def bound_to(self, *directories: Path) -> tuple[LoopDevice, ...]:
        """Return the loop devices over files in these directories, deleted files included, by number.

        Files are compared by inode, because the kernel shows the path in the container that bound the device.
        """
        roots = [directory.resolve() for directory in directories]
        files = (_status(f"{place}/{name}") for root in roots for place, _, names in os.walk(root) for name in names)
        identities = {(status.st_dev, status.st_ino) for status in files if status is not None}
        return tuple(device for device in self.bound() if any(_lies_in(device, root, identities) for root in roots))

    def bound(self, file_name: str | None = None) -> Iterator[LoopDevice]:
        """Yield bound loop devices by number; only those over a file of that name are opened: an open may hang.

        Of these none may be left out: raises HostFailure if one cannot be opened.
        """
        numbers = [int(entry.name[4:]) for entry in _SYS_BLOCK.glob("loop[0-9]*") if entry.name[4:].isdigit()]
        for number in sorted(numbers):
            text = _backing_text(number)
            if text is None or (file_name is not None and Path(text.removesuffix(_DELETED)).name != file_name):
                continue
            device = self._bound_number(number)
            if device is not None:
                yield device
            elif file_name is not None and _backing_text(number) == text:
                raise HostFailure(f"loop device {number} over {text} cannot be opened; retry")

    def bound_as(self, number: DeviceNumber) -> LoopDevice | None:
        try:
            name = (SYS_DEV_BLOCK / str(number)).resolve(strict=True).name
        except OSError:
            return None
        digits = name.removeprefix("loop")
        return self._bound_number(int(digits)) if name != digits and digits.isdigit() else None

    def _bound_number(self, number: int) -> LoopDevice | None:
        text = _backing_text(number)
        if text is None:
            return None
        # Closed before it is returned: the caller may detach it.
        try:
            with self._opened(number) as fd:
                status = ioctls.loop_status(fd)
        except SystemCallFailed:
            return None
        return _described(number, text, status) if status is not None else None

    def has_file(self, device: LoopDevice, file: Path) -> bool:
        found, here = self._bound_number(device.number), _status(file)
        return found is not None and here is not None and found.identity == (here.st_dev, here.st_ino)

    def grow(self, device: LoopDevice) -> None:
        with self._opened(device.number) as fd:
            _require_same(fd, device)
            ioctls.loop_set_capacity(fd)

    def changed_sectors(self, device: LoopDevice) -> int:
        """Return how much all requests so far changed the file of a device; none of them is running.

        Sectors of completed writes and discards, by Documentation/block/stat.rst: a flush is a write of none. For
        running requests the kernel waits when it sets the status.
        """
        root = _SYS_BLOCK / f"loop{device.number}"
        if block_devices.read_text(root / "queue/iostats") != "1":
            raise NotFreezable(f"loop device {device.number} counts no requests; write 1 to {root}/queue/iostats")
        with self._opened(device.number) as fd:
            status = ioctls.loop_status(fd)
            if status is not None:
                ioctls.loop_set(fd, status)
        fields = block_devices.read_text(root / "stat").split()
        return int(fields[_WRITTEN]) + int(fields[_DISCARDED])

    def fence(self, device: LoopDevice) -> LoopDevice | None:
        """Cut a device that may be in use off from its file, until it is unbound; None when the kernel refuses.

        Writes up to now are in the file; later ones fail. Older kernels keep the size of a device with cached pages.
        """
        with self._opened(device.number, os.O_RDWR) as fd:
            _require_same(fd, device)
            status = ioctls.loop_status(fd)
            if status is None:
                return None
            with contextlib.suppress(SystemCallFailed):
                ioctls.loop_set(fd, status, limit_bytes=_FENCED_BYTES)
            if ioctls.size_bytes(fd) != _FENCED_BYTES:
                return None
        found = self._bound_number(device.number)
        return replace(found, node=device.node) if found is not None else None

    def detach(self, device: LoopDevice) -> bool:
        """Unbind the device and remove its node; False when in use, True also when it has another file by now."""
        if not Deadline.after(_GRACE_S).wait_until(lambda: self._unbind(device)):
            return False
        if not Deadline.after(_GONE_WITHIN_S).wait_until(lambda: not self._is_still(device)):
            return False
        if device.node is not None and node_number(device.node) == _number_of(device.number):
            device.node.unlink(missing_ok=True)
        return True

    def _bind(self, backing: int, file: Path, label: str, flags: int, block_bytes: int) -> int:
        with closing(open_file(Path("/dev/loop-control"), os.O_RDWR)) as control:
            for _ in range(_BIND_ATTEMPTS):
                with self._binding:
                    number = ioctls.loop_free_number(control)
                    with self._opened(number, os.O_RDONLY if flags & ioctls.LOOP_READ_ONLY else os.O_RDWR) as fd:
                        if _configure(fd, backing, label, flags | ioctls.LOOP_DIRECT_IO, block_bytes):
                            try:
                                _prepare(fd, number, file, is_read_only=bool(flags & ioctls.LOOP_READ_ONLY))
                            except BaseException:
                                ioctls.loop_clear(fd)
                                raise
                            return number
        raise HostFailure(f"no loop device stayed free long enough to be bound ({_BIND_ATTEMPTS} attempts)")

    def _unbind(self, device: LoopDevice) -> bool:
        # LOOP_CLR_FD of a device that others have open succeeds and unbinds it at the last close (loop(4)): then the
        # AUTOCLEAR flag is cleared again, so that a busy device stays as it was.
        try:
            with self._opened(device.number, os.O_RDONLY | os.O_EXCL) as fd:
                status = ioctls.loop_status(fd)
                if status is None or status.label != device.label:
                    return True
                ioctls.loop_clear(fd)
                after = ioctls.loop_status(fd)
                if after is None:
                    return True
                ioctls.loop_set(fd, after, flags=after.flags & ~ioctls.LOOP_AUTOCLEAR)
                return False
        except SystemCallFailed as failure:
            if failure.errno in (errno.ENXIO, errno.ENOENT, errno.ENODEV):
                return True
            if failure.errno == errno.EBUSY:
                return False
            raise

    def _is_still(self, device: LoopDevice) -> bool:
        found = self._bound_number(device.number)
        return found is not None and found.label == device.label

    @staticmethod
    @contextlib.contextmanager
    def _opened(number: int, flags: int = os.O_RDONLY) -> Iterator[int]:
        wanted = _number_of(number)
        usual = _DEV / f"loop{number}"
        with system_call(f"open loop device {number}"):
            if node_number(usual) == wanted:
                fd = os.open(usual, flags | os.O_CLOEXEC)
            else:
                fd = block_devices.open_temporary_node(_DEV, wanted, flags)
        with closing(fd):
            yield fd


def _configure(fd: int, backing: int, label: str, flags: int, block_bytes: int) -> bool:
    """Bind an open loop device; False when another program bound it first."""
    try:
        ioctls.loop_configure(fd, backing, label=label, flags=flags, block_bytes=block_bytes)
    except SystemCallFailed as failure:
        if failure.errno == errno.EBUSY:
            return False
        if failure.errno == errno.EINVAL and flags & ioctls.LOOP_DIRECT_IO:
            # The file's filesystem has no direct I/O in blocks of this size.
            return _configure(fd, backing, label, flags & ~ioctls.LOOP_DIRECT_IO, block_bytes)
        raise
    return True


def _prepare(fd: int, number: int, file: Path, *, is_read_only: bool) -> None:
    """Undo what the previous use of a loop device has set: the kernel keeps BLKROSET and the queue's settings."""
    queue = _SYS_BLOCK / f"loop{number}" / "queue"
    with contextlib.suppress(OSError):
        if "[none]" not in (queue / "scheduler").read_text():
            (queue / "scheduler").write_text("none")
    status = ioctls.loop_status(fd)
    if status is not None and not status.flags & ioctls.LOOP_DIRECT_IO:
        # The kernel drops this flag without an error.
        _log.warning(
            "loop%d over %s: expected direct I/O, which this filesystem does not have; data passes through the page"
            " cache twice: use a pool on ext4 or xfs",
            number,
            file,
        )
    if is_read_only:
        return
    ioctls.set_read_only(fd, False)
    # With "write through" the kernel passes on no flush: an fsync would not reach the file's filesystem and drive.
    with system_call(f"set the write cache of loop device {number}"):
        if (queue / "write_cache").read_text() != "write back\n":
            (queue / "write_cache").write_text("write back")
            found = (queue / "write_cache").read_text().strip()
            if found != "write back":
                raise HostFailure(
                    f"loop device {number} over {file}: expected the write cache 'write back', got {found!r}: an fsync"
                    " of the volume would not reach the drive; use a pool on ext4 or xfs"
                )


def _described(number: int, backing_text: str, status: ioctls.LoopStatus) -> LoopDevice:
    file_is_gone = backing_text.endswith(_DELETED)
    return LoopDevice(
        number=number,
        device_number=_number_of(number),
        file=Path(backing_text.removesuffix(_DELETED) if file_is_gone else backing_text),
        label=status.label,
        read_only=bool(status.flags & ioctls.LOOP_READ_ONLY),
        file_is_gone=file_is_gone,
        backing=status.backing,
        fenced=0 < status.limit_bytes <= _FENCED_BYTES,
        identity=status.file,
    )


def _lies_in(device: LoopDevice, root: Path, identities: set[tuple[int, int]]) -> bool:
    if not device.file_is_gone:
        # The inode number of a file is not given to another file while a device is bound to it.
        return device.identity in identities
    # Of a deleted file only the path and the filesystem remain to compare.
    here = _status(root)
    on_it = here is not None and device.identity is not None and device.identity[0] == here.st_dev
    return on_it and device.file.is_relative_to(root)


def _status(path: Path | str) -> os.stat_result | None:
    try:
        return os.lstat(path)
    except OSError:
        return None


def _require_same(fd: int, device: LoopDevice) -> None:
    status = ioctls.loop_status(fd)
    label = status.label if status is not None else None
    if label != device.label:
        raise PreconditionFailed(f"loop device {device.number}: expected the label {device.label!r}, got {label!r}")


def _number_of(number: int) -> DeviceNumber:
    with system_call(f"look at loop device {number}"):
        return DeviceNumber.parse(os.fsdecode(read_file(f"{_SYS_BLOCK}/loop{number}/dev", 64)))


def _backing_text(number: int) -> str | None:
    file = f"{_SYS_BLOCK}/loop{number}/loop/backing_file"
    # Most loop devices of a machine are unbound: this check takes a tenth of the time of a failing open.
    return block_devices.read_text(Path(file)) or None if os.path.exists(file) else None


# A read-only bind mount of a device node does not keep a process from writing through it, and BLKROSET also stops the
# existing writers. A loop device opened read-only refuses only the writes of its own readers.

_READER_ID = re.compile(r"[0-9a-f]{16}")
_MARK = "ro-"


@dataclass(frozen=True, slots=True)
class ReadOnlyLoops:
    """Read-only loop devices, labelled `<volume uuid>/ro-<reader id>`, with the nodes /dev/loopN.

    Methods as in `csi_driver.node.ports.ReadOnlyDevices`.
    """

    loops: LoopDevices
    _making: dict[str, threading.Lock] = field(default_factory=lambda: defaultdict(threading.Lock), init=False)

    def over(self, device: Device, uuid: str, reader: str) -> Device:
        if _READER_ID.fullmatch(reader) is None:
            raise HostFailure(f"reader id: expected 16 hexadecimal digits, got {reader!r}")
        label = f"{uuid}/{_MARK}{reader}"
        with self._making[device.name]:
            loop = self._find(device, label)
            if loop is None:
                loop = self.loops.attach(device.path, None, label=label, read_only=True, block_size=device.block_bytes)
            return self._described(device, loop)

    def release(self, number: DeviceNumber) -> bool:
        loop = self.loops.bound_as(number)
        return loop is not None and _reader_of(loop) is not None and self.loops.detach(loop)

    def present(self, name: str | None = None) -> list[ReadOnlyDevice]:
        return [ReadOnlyDevice(loop.device_number, loop.file) for loop in self._ours(name)]

    def release_left_over(self, reader: str, name: str) -> None:
        for loop in self._ours(name):
            if _reader_of(loop) == reader:
                self.loops.detach(loop)

    def _ours(self, name: str | None = None) -> Iterator[LoopDevice]:
        return (loop for loop in self.loops.bound(name) if _reader_of(loop) is not None)

    def _find(self, device: Device, label: str) -> LoopDevice | None:
        same = (loop for loop in self._ours(device.path.name) if loop.label == label)
        return next((loop for loop in same if loop.backing == device.number and not loop.file_is_gone), None)

    def _described(self, device: Device, loop: LoopDevice) -> Device:
        node = _DEV / f"loop{loop.number}"
        self.loops.ensure_node(loop, node)
        self.loops.grow(loop)
        with closing(open_file(node, os.O_RDONLY)) as fd:
            size = ioctls.size_bytes(fd)
            if not ioctls.is_read_only(fd):
                raise PreconditionFailed(
                    f"{node} over {device.path}: expected read-only, got a writable device; attach the volume again"
                )
        return Device(device.name, node, loop.device_number, size, True, device.uuid, device.block_bytes)


def _reader_of(loop: LoopDevice) -> str | None:
    """Return the reader id of a read-only loop device over a block device; None for all other loop devices."""
    if not loop.read_only or loop.backing is None or loop.uuid is None:
        return None
    mark, _, reader = loop.label.partition("/")[2].partition(_MARK)
    return reader if not mark and _READER_ID.fullmatch(reader) is not None else None
