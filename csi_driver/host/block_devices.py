"""Block devices without regard to what they are: by number, and who has one for itself.

Whose a device is, is told by `devices`, which decides as well whether it may be opened.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import stat
import threading
from pathlib import Path

from csi_driver.deadline import Clock, Deadline
from csi_driver.errors import OperationPending, PreconditionFailed, SystemCallFailed
from csi_driver.host import ioctls
from csi_driver.host_model import DeviceNumber

NOT_READY = (errno.ENOENT, errno.ENXIO, errno.ENODEV, errno.ENOMEDIUM, errno.ENOTDIR)
_BUSY_GRACE_S = 2.0
_SYS_DEVICES = Path("/sys/dev/block")


# --- by number --------------------------------------------------------------------------------------------------


def size_bytes(number: DeviceNumber) -> int | None:
    """Return the present size of a device without opening it; None when the device is gone."""
    try:
        sectors = int((_SYS_DEVICES / str(number) / "size").read_text())
    except OSError as error:
        if error.errno in NOT_READY:
            return None
        # Not known is not gone: what is gone may be unmounted whoever's it was.
        raise SystemCallFailed(f"read the size of device {number}", error.errno or 0) from error
    return sectors * 512 or None


def sys_number(number: DeviceNumber, attribute: str) -> int | None:
    """Read a number that sysfs shows of a device; None where it shows none."""
    try:
        return int((_SYS_DEVICES / str(number) / attribute).read_text())
    except (OSError, ValueError):
        return None


def open_number(number: DeviceNumber, directory: Path) -> int:
    """Open a device for reading by its number; `OSError` where it is gone.

    In the directory a node is made for a moment where this mount namespace has none.
    """
    path = _kernel_path(number)
    if path is not None:
        with contextlib.suppress(OSError):
            fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
            if ioctls.device_number(os.fstat(fd).st_rdev) == number:
                return fd
            os.close(fd)
    return _open_own_node(directory, number)


def _kernel_path(number: DeviceNumber) -> Path | None:
    """Return where devtmpfs has the device, by the kernel's own name for it."""
    try:
        lines = (_SYS_DEVICES / str(number) / "uevent").read_text().split("\n")
    except OSError:
        return None
    names = [line.removeprefix("DEVNAME=") for line in lines if line.startswith("DEVNAME=")]
    return Path("/dev") / names[0] if names else None


def _open_own_node(directory: Path, number: DeviceNumber) -> int:
    path = directory / f".{number.major}-{number.minor}.{os.getpid()}.{threading.get_ident()}"
    path.unlink(missing_ok=True)
    os.mknod(path, stat.S_IFBLK | 0o600, os.makedev(number.major, number.minor))
    try:
        return os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    finally:
        path.unlink(missing_ok=True)


# --- for oneself ------------------------------------------------------------------------------------------------


def is_claimed(path: Path) -> bool:
    """Tell whether a mount or a program has the device for itself (O_EXCL); one that is gone nobody has."""
    try:
        fd = os.open(path, os.O_RDONLY | os.O_EXCL | os.O_CLOEXEC | os.O_NONBLOCK)
    except OSError as error:
        if error.errno in (errno.EBUSY, *NOT_READY):
            return error.errno == errno.EBUSY
        raise SystemCallFailed(f"claim {path}", error.errno or 0) from error
    os.close(fd)
    return False


def seize(fd: int, path: Path, clock: Clock) -> None:
    """Take the lock of the device that is open, and see that nobody has claimed it; both are waited for a moment.

    Raises `OperationPending` where its lock is held, `PreconditionFailed` where it is claimed.
    """
    if not Deadline.after(_BUSY_GRACE_S, clock).wait_until(lambda: _try_lock(fd)):
        raise OperationPending(f"{path} is busy: another program works on it (its lock is held); retry")
    if not Deadline.after(_BUSY_GRACE_S, clock).wait_until(lambda: not is_claimed(Path(f"/proc/self/fd/{fd}"))):
        raise PreconditionFailed(f"{path} is busy: it is mounted or otherwise in use")


def _try_lock(fd: int) -> bool:
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True
