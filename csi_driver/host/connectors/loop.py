"""Loop devices: made for the embedded storage manager's files, and over devices that a reader may not write.

The kernel is the only state: what is bound is read from sysfs, who it is from the label given at LOOP_CONFIGURE
(lo_file_name; its first 36 characters are the volume's uuid). Device nodes are files that may be missing, or left over
and point at a number that is now another file's: nodes are compared by number, never believed.
"""

from __future__ import annotations

import contextlib
import errno
import os
import stat
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Protocol

from csi_driver.deadline import SYSTEM_CLOCK, Clock, Deadline
from csi_driver.errors import HostFailure, PreconditionFailed, SystemCallFailed
from csi_driver.host import ioctls
from csi_driver.host_model import DeviceNumber
from csi_driver.model import is_uuid

LOOP_MAJOR = 7
_UUID_LENGTH = 36
_DELETED = " (deleted)"
_SYS_BLOCK = Path("/sys/block")
_SYS_DEV_BLOCK = Path("/sys/dev/block")
_BIND_ATTEMPTS = 64
_GRACE_S = 0.2
_GONE_WITHIN_S = 2.0
_FENCED_BYTES = 512
"""Less than the smallest block that anything here writes, 4096: no request fits, not even one for the first block."""


@dataclass(frozen=True, slots=True)
class LoopDevice:
    """A bound loop device.

    `file` is its file's path as the kernel tells it here and now, which need not be the one that it was opened by: what
    a container bound that is gone has a path below what was mounted there. `identity` is the file's filesystem and
    inode. `file_is_gone`: it was unlinked while it was bound. `backing` is the device under it, where `file` is a
    device node. `fenced`: it carries no I/O any more.
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
        """The volume's uuid as the label has it."""
        return uuid_of_label(self.label)


class Bound(Protocol):
    """What names a bound loop device. The label guards against a number that was bound to another file since."""

    @property
    def number(self) -> int: ...

    @property
    def file(self) -> Path: ...

    @property
    def label(self) -> str: ...

    @property
    def node(self) -> Path | None: ...


def uuid_of_label(label: str) -> str | None:
    """Return the volume uuid at the head of a label; None when the label is not one of ours."""
    head, rest = label[:_UUID_LENGTH], label[_UUID_LENGTH:]
    return head.lower() if is_uuid(head) and rest[:1] in ("", "/") else None


def claimed_uuid(fd: int) -> str | None:
    """Return the volume uuid that an open loop device claims; None when it is unbound or not ours."""
    status = ioctls.loop_status(fd)
    return uuid_of_label(status.label) if status is not None else None


class LoopDevices:
    """The loop devices of this machine.

    `device_directory` is where nodes are made for a moment when udev or devtmpfs makes none.
    """

    def __init__(self, device_directory: Path = Path("/dev"), clock: Clock = SYSTEM_CLOCK) -> None:
        self._directory = device_directory
        self._clock = clock
        self._binding = threading.Lock()

    def attach(
        self, file: Path, node: Path | None, *, label: str, read_only: bool, block_size: int = 4096
    ) -> LoopDevice:
        """Bind `file` (a file or block device) to a free loop device and make its node, mode 0600.

        `label` has at most 63 bytes, the volume's uuid first. Direct I/O where the file's filesystem allows it.
        With no `node` the machine's own node is used and not made.
        """
        if len(label.encode()) > ioctls.LOOP_LABEL_LIMIT:
            raise HostFailure(f"the loop label {label} is longer than {ioctls.LOOP_LABEL_LIMIT} bytes")
        backing = _open_backing(file, read_only)
        try:
            number = self._bind(backing, label, ioctls.LOOP_READ_ONLY if read_only else 0, block_size)
            rdev = os.fstat(backing).st_rdev
        finally:
            os.close(backing)
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
        """Make `node` the device's node, in one step, whatever it was; return the device with it."""
        if _node_number(node) != device.device_number:
            temporary = node.with_name(f".{node.name}.{os.getpid()}.{threading.get_ident()}")
            try:
                _make_node(temporary, device.device_number)
                os.replace(temporary, node)
            except OSError as error:
                raise SystemCallFailed(f"make the device node {node}", error.errno or 0) from error
            finally:
                temporary.unlink(missing_ok=True)
        return replace(device, node=node)

    def bound_to(self, directory: Path, nodes: Path | None = None) -> tuple[LoopDevice, ...]:
        """Return every loop device whose file lies, or lay, under `directory`, lowest number first.

        Files are told apart by inode: their paths are those of whoever bound the device, who may have seen another
        tree (a container). `node` is filled in from the directory `nodes`, None where none there has the device's
        number.
        """
        root = directory.resolve()
        by_number = _nodes_in(nodes) if nodes is not None else {}
        identities = _files_below(root)
        found = [device for device in self.bound() if _lies_in(device, root, identities)]
        return tuple(replace(device, node=by_number.get(device.device_number)) for device in found)

    def bound(self, file_name: str | None = None) -> Iterator[LoopDevice]:
        """Yield every bound loop device of the machine, lowest number first.

        With `file_name`: those whose file has that name in its directory; no other is opened, which may hang.
        """
        numbers = [int(entry.name[4:]) for entry in _SYS_BLOCK.glob("loop[0-9]*") if entry.name[4:].isdigit()]
        for number in sorted(numbers):
            if file_name is not None and _file_name(number) != file_name:
                continue
            device = self._bound_number(number)
            if device is not None:
                yield device

    def bound_as(self, number: DeviceNumber) -> LoopDevice | None:
        """Return the bound loop device that has this device number; None when it is no loop device or unbound."""
        try:
            name = (_SYS_DEV_BLOCK / str(number)).resolve(strict=True).name
        except OSError:
            return None
        digits = name.removeprefix("loop")
        return self._bound_number(int(digits)) if name != digits and digits.isdigit() else None

    def _bound_number(self, number: int) -> LoopDevice | None:
        text = _backing_text(number)
        if text is None:
            return None
        # Closed before it is handed out: the caller may want to detach it.
        try:
            with self._opened(number) as fd:
                status = ioctls.loop_status(fd)
        except SystemCallFailed:
            return None
        return _described(number, text, status) if status is not None else None

    def has_file(self, device: Bound, file: Path) -> bool:
        """Tell whether what is at `file` now is what the device is bound to."""
        found, here = self._bound_number(device.number), _status(file)
        return found is not None and here is not None and found.identity == (here.st_dev, here.st_ino)

    def grow(self, device: Bound) -> None:
        """Let the device take the present size of its file."""
        with self._opened(device.number) as fd:
            _require_same(fd, device)
            ioctls.loop_set_capacity(fd)

    def fence(self, device: Bound) -> LoopDevice | None:
        """Let the device carry no I/O any more, whoever has it mounted or open; return it as it is then.

        What was written to it before is in its file when this returns; what is written afterwards meets an error and
        never reaches the file. It stays so until the device is unbound. None where the kernel refuses: older ones keep
        the size of a device of which they have pages.
        """
        with self._opened(device.number, os.O_RDWR) as fd:
            _require_same(fd, device)
            status = ioctls.loop_status(fd)
            if status is None:
                return None
            with contextlib.suppress(SystemCallFailed):
                ioctls.loop_set_limit(fd, status, _FENCED_BYTES)
            if ioctls.size_bytes(fd) != _FENCED_BYTES:
                return None
        found = self._bound_number(device.number)
        return replace(found, node=device.node) if found is not None else None

    def detach(self, device: Bound) -> bool:
        """Unbind the device and remove its node; False when it is mounted or anybody has it open.

        A program that looks at it for a moment (udev's probe) is waited for. Already unbound is success; a number
        that was bound to another file since is left alone.
        """
        waiting = Deadline.after(_GRACE_S, self._clock)
        if not waiting.wait_until(lambda: self._unbind(device)):
            return False
        gone = Deadline.after(_GONE_WITHIN_S, self._clock).wait_until(
            lambda: _backing_text(device.number) is None or not self._is_still(device)
        )
        if not gone:
            return False
        if device.node is not None and _node_number(device.node) == _number_of(device.number):
            device.node.unlink(missing_ok=True)
        return True

    # --- one device ---

    def _bind(self, backing: int, label: str, flags: int, block_bytes: int) -> int:
        control = _open_control()
        try:
            for _ in range(_BIND_ATTEMPTS):
                with self._binding:
                    number = ioctls.loop_free_number(control)
                    with self._opened(number, os.O_RDONLY if flags & ioctls.LOOP_READ_ONLY else os.O_RDWR) as fd:
                        if _configure(fd, backing, label, flags, block_bytes):
                            if not flags & ioctls.LOOP_READ_ONLY:
                                # A loop device keeps what BLKROSET said of it when it was another file's.
                                ioctls.set_read_only(fd, False)
                            return number
        finally:
            os.close(control)
        raise HostFailure(f"no loop device stayed free long enough to be bound ({_BIND_ATTEMPTS} attempts)")

    def _unbind(self, device: Bound) -> bool:
        """Try once. The kernel, asked to unbind a device that others have open, says yes and does it at their last
        close (loop(4), LOOP_CLR_FD): that promise is taken back, so that a busy device stays as it was."""
        try:
            with self._opened(device.number, os.O_RDONLY | os.O_EXCL) as fd:
                status = ioctls.loop_status(fd)
                if status is None or status.label != device.label:
                    return True
                ioctls.loop_clear(fd)
                after = ioctls.loop_status(fd)
                if after is None:
                    return True
                ioctls.loop_set_flags(fd, after, after.flags & ~ioctls.LOOP_AUTOCLEAR)
                return False
        except SystemCallFailed as failure:
            if failure.errno in (errno.ENXIO, errno.ENOENT, errno.ENODEV):
                return True
            if failure.errno == errno.EBUSY:
                return False
            raise

    def _is_still(self, device: Bound) -> bool:
        try:
            with self._opened(device.number) as fd:
                status = ioctls.loop_status(fd)
        except SystemCallFailed:
            return False
        return status is not None and status.label == device.label

    @contextlib.contextmanager
    def _opened(self, number: int, flags: int = os.O_RDONLY) -> Iterator[int]:
        wanted = _number_of(number)
        usual = Path(f"/dev/loop{number}")
        try:
            if _node_number(usual) == wanted:
                fd = os.open(usual, flags | os.O_CLOEXEC)
            else:
                fd = _open_through_own_node(self._directory, wanted, flags)
        except OSError as error:
            raise SystemCallFailed(f"open loop device {number}", error.errno or 0) from error
        try:
            yield fd
        finally:
            os.close(fd)


def _open_backing(file: Path, read_only: bool) -> int:
    try:
        return os.open(file, (os.O_RDONLY if read_only else os.O_RDWR) | os.O_CLOEXEC | os.O_NOFOLLOW)
    except OSError as error:
        raise SystemCallFailed(f"open {file}", error.errno or 0) from error


def _open_control() -> int:
    try:
        return os.open("/dev/loop-control", os.O_RDWR | os.O_CLOEXEC)
    except OSError as error:
        raise SystemCallFailed("open /dev/loop-control", error.errno or 0) from error


def _configure(fd: int, backing: int, label: str, flags: int, block_bytes: int) -> bool:
    """Bind an open loop device; False when somebody else was quicker."""
    try:
        ioctls.loop_configure(fd, backing, label=label, flags=flags | ioctls.LOOP_DIRECT_IO, block_bytes=block_bytes)
    except SystemCallFailed as failure:
        if failure.errno == errno.EBUSY:
            return False
        if failure.errno != errno.EINVAL:
            raise
        # The file's filesystem has no direct I/O in such blocks.
        try:
            ioctls.loop_configure(fd, backing, label=label, flags=flags, block_bytes=block_bytes)
        except SystemCallFailed as buffered:
            if buffered.errno == errno.EBUSY:
                return False
            raise
    return True


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


def _files_below(root: Path) -> set[tuple[int, int]]:
    return {
        (status.st_dev, status.st_ino)
        for directory, _, names in os.walk(root)
        for status in (_status(f"{directory}/{name}") for name in names)
        if status is not None
    }


def _lies_in(device: LoopDevice, root: Path, identities: set[tuple[int, int]]) -> bool:
    if not device.file_is_gone:
        # While a device is bound to a file, its inode's number is given to no other.
        return device.identity in identities
    # Nothing is left to compare with but its path, and that it lay on this filesystem.
    here = _status(root)
    on_it = here is not None and device.identity is not None and device.identity[0] == here.st_dev
    return on_it and device.file.is_relative_to(root)


def _status(path: Path | str) -> os.stat_result | None:
    try:
        return os.lstat(path)
    except OSError:
        return None


def _require_same(fd: int, device: Bound) -> None:
    status = ioctls.loop_status(fd)
    label = status.label if status is not None else None
    if label != device.label:
        raise PreconditionFailed(f"loop device {device.number} claims {label or 'nothing'}, expected {device.label}")


def _number_of(number: int) -> DeviceNumber:
    try:
        major, _, minor = (_SYS_BLOCK / f"loop{number}" / "dev").read_text().strip().partition(":")
    except OSError as error:
        raise SystemCallFailed(f"look at loop device {number}", error.errno or 0) from error
    return DeviceNumber(int(major), int(minor))


def _backing_text(number: int) -> str | None:
    file = f"{_SYS_BLOCK}/loop{number}/loop/backing_file"
    # Most of a machine's loop devices are unbound: to see that costs a tenth of an open that fails.
    if not os.path.exists(file):
        return None
    try:
        return Path(file).read_text(errors="surrogateescape")[:-1]
    except OSError:
        return None


def _file_name(number: int) -> str | None:
    text = _backing_text(number)
    return Path(text.removesuffix(_DELETED)).name if text is not None else None


def _node_number(node: Path) -> DeviceNumber | None:
    """Return the device a node file stands for; None when it is absent or no block device."""
    try:
        status = os.lstat(node)
    except OSError:
        return None
    return ioctls.device_number(status.st_rdev) if stat.S_ISBLK(status.st_mode) else None


def _nodes_in(directory: Path) -> dict[DeviceNumber, Path]:
    try:
        names = sorted(directory.iterdir())
    except OSError:
        return {}
    numbered = ((_node_number(node), node) for node in names if not node.name.startswith("."))
    return {number: node for number, node in numbered if number is not None}


def _make_node(path: Path, number: DeviceNumber) -> None:
    os.mknod(path, stat.S_IFBLK | 0o600, os.makedev(number.major, number.minor))


def _open_through_own_node(directory: Path, number: DeviceNumber, flags: int) -> int:
    path = directory / f".nvmesh-csi-{number.major}-{number.minor}.{os.getpid()}.{threading.get_ident()}"
    path.unlink(missing_ok=True)
    _make_node(path, number)
    try:
        return os.open(path, flags | os.O_CLOEXEC)
    finally:
        path.unlink(missing_ok=True)
