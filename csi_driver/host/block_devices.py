# SPDX-License-Identifier: Apache-2.0
"""Block devices by number: sysfs, device nodes, exclusive use, and waiting for a change.

Which volume a device is, and whether it may be opened, is decided in `devices`.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import importlib
import os
import stat
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

from csi_driver.deadline import SYSTEM_CLOCK, Clock, Deadline
from csi_driver.errors import OperationPending, PreconditionFailed, SystemCallFailed
from csi_driver.host import ioctls
from csi_driver.host.syscalls import fd_path, read_file, system_call
from csi_driver.host_model import DeviceNumber

SYS_DEV_BLOCK = Path("/sys/dev/block")
_SYSFS_BYTES = 4096  # of a file at most (Documentation/filesystems/sysfs.rst)
NOT_READY = (errno.ENOENT, errno.ENXIO, errno.ENODEV, errno.ENOMEDIUM, errno.ENOTDIR)
SECTOR_BYTES = 512
"""Unit of all sizes in sysfs."""
_BUSY_GRACE_S = 2.0
_FIRST_PAUSE_S, _LONGEST_PAUSE_S, _LONGEST_EVENT_WAIT_S = 0.005, 0.1, 0.25


def size_bytes(number: DeviceNumber) -> int | None:
    """Return the size of a device without opening it; None when the device is gone."""
    try:
        with system_call(f"read the size of device {number}"):
            return int(read_file(f"{SYS_DEV_BLOCK}/{number}/size", _SYSFS_BYTES)) * SECTOR_BYTES or None
    except SystemCallFailed as failure:
        if failure.errno in NOT_READY:
            return None
        raise  # "unknown" must not be taken for "gone": mounts of a device that is gone are unmounted


def read_text(file: Path | str) -> str:
    """Return a file of sysfs without its last newline; empty when it cannot be read."""
    try:
        return os.fsdecode(read_file(str(file), _SYSFS_BYTES)).removesuffix("\n")
    except OSError:
        return ""


def sys_number(number: DeviceNumber, attribute: str) -> int | None:
    """Return an integer attribute of a device in sysfs; None when it is absent."""
    text = read_text(f"{SYS_DEV_BLOCK}/{number}/{attribute}")
    return int(text) if text.isascii() and text.isdigit() else None


def node_number(node: Path) -> DeviceNumber | None:
    try:
        status = os.lstat(node)
    except OSError:
        return None
    return ioctls.device_number(status.st_rdev) if stat.S_ISBLK(status.st_mode) else None


def ensure_node(node: Path, number: DeviceNumber) -> None:
    """Make `node` a node of the device, atomically; replaces nodes of other devices, and links, as udev makes them."""
    if node_number(node) == number:
        return
    try:
        os.mknod(node, stat.S_IFBLK | 0o600, os.makedev(number.major, number.minor))
        return
    except OSError:
        pass  # another node is there, as a rule
    draft = node.with_name(f".{node.name}.{os.getpid()}.{threading.get_ident()}")
    try:
        with system_call(f"make the device node {node}"):
            _make_node(draft, number)
            os.replace(draft, node)
    finally:
        draft.unlink(missing_ok=True)


def open_temporary_node(directory: Path, number: DeviceNumber, flags: int) -> int:
    """Open a device through a node that is made in `directory` and removed again. Raises OSError."""
    node = directory / f".nvmesh-csi-{number.major}-{number.minor}.{os.getpid()}.{threading.get_ident()}"
    _make_node(node, number)
    try:
        return os.open(node, flags | os.O_CLOEXEC)
    finally:
        node.unlink(missing_ok=True)


def _make_node(node: Path, number: DeviceNumber) -> None:
    node.unlink(missing_ok=True)
    os.mknod(node, stat.S_IFBLK | 0o600, os.makedev(number.major, number.minor))


def open_number(number: DeviceNumber, directory: Path, flags: int = 0) -> int:
    """Open a device read-only by its number, if need be by a temporary node in `directory`. Raises OSError."""
    flags |= os.O_RDONLY | os.O_NONBLOCK
    for line in read_text(SYS_DEV_BLOCK / str(number) / "uevent").split("\n"):
        if line.startswith("DEVNAME="):
            with contextlib.suppress(OSError):
                fd = os.open(Path("/dev") / line.removeprefix("DEVNAME="), flags | os.O_CLOEXEC)
                if ioctls.device_number(os.fstat(fd).st_rdev) == number:
                    return fd
                os.close(fd)
    return open_temporary_node(directory, number, flags)


def is_claimed(path: Path) -> bool:
    """Tell if a mount or a program has the device open exclusively (O_EXCL); False when the device is gone."""
    return _is_busy(path, lambda: os.open(path, os.O_RDONLY | os.O_EXCL | os.O_NONBLOCK | os.O_CLOEXEC))


def is_number_claimed(number: DeviceNumber, directory: Path) -> bool:
    """As `is_claimed`, for a device that may have no node; one is made in `directory` for a moment."""
    return _is_busy(f"device {number}", lambda: open_number(number, directory, os.O_EXCL))


def _is_busy(what: object, opened: Callable[[], int]) -> bool:
    try:
        with system_call(f"open {what}"):
            os.close(opened())
    except SystemCallFailed as failure:
        if failure.errno in (errno.EBUSY, *NOT_READY):
            return failure.errno == errno.EBUSY
        raise
    return False


def lock_unclaimed(fd: int, path: Path, clock: Clock) -> None:
    """Lock an open device (flock) and check that it is not claimed; waits 2 s for each."""
    if not Deadline.after(_BUSY_GRACE_S, clock).wait_until(lambda: _try_lock(fd)):
        raise OperationPending(f"{path} is busy: another program works on it (its lock is held); retry")
    if not Deadline.after(_BUSY_GRACE_S, clock).wait_until(lambda: not is_claimed(Path(fd_path(fd)))):
        raise PreconditionFailed(f"{path} is busy: it is mounted or otherwise in use")


def _try_lock(fd: int) -> bool:
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


@contextlib.contextmanager
def device_events(clock: Clock, udev_control: Path) -> Iterator[Callable[[float], None]]:
    """Give a function that waits until a block device may have changed, at most the given seconds.

    Each wait is short: the size of a device changes without udev's event, and a container may get none.
    """
    poll: Callable[[float], object] | None = None
    pause_s = _FIRST_PAUSE_S
    tries_udev = clock is SYSTEM_CLOCK  # udev's events come in real time: with another clock nothing waits for them

    def pause(most_s: float) -> None:
        nonlocal poll, pause_s, tries_udev
        if tries_udev and udev_control.exists():
            tries_udev = False
            poll = _start_monitor()
            return  # the caller looks again: an event before this moment was missed
        if poll is not None:
            poll(min(most_s, _LONGEST_EVENT_WAIT_S))
            return
        clock.sleep(min(most_s, pause_s))
        pause_s = min(pause_s * 2, _LONGEST_PAUSE_S)

    yield pause


def _start_monitor() -> Callable[[float], object] | None:
    try:
        pyudev = importlib.import_module("pyudev")
        monitor = pyudev.Monitor.from_netlink(pyudev.Context())
        monitor.filter_by("block")
        monitor.start()
    except (ImportError, OSError):
        return None
    poll: Callable[[float], object] = monitor.poll  # pyudev has no type information
    return poll
