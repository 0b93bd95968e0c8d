"""End the writing of a filesystem whose device is lost, while programs still hold on to it."""

from __future__ import annotations

import os
from pathlib import Path

from csi_driver.errors import SystemCallFailed
from csi_driver.host import ioctls
from csi_driver.host_model import DeviceNumber


def shut_down(path: Path, number: DeviceNumber) -> bool:
    """Let the filesystem of that device, mounted at `path`, write nothing any more, not even its log.

    What its users have still to write is lost, and they meet errors. False where there is something else at the path,
    where it went down before, and for filesystems that have no way to (btrfs, which shows a device of its own, too).
    """
    try:
        fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC | os.O_NONBLOCK)
    except OSError:
        return False
    try:
        if ioctls.device_number(os.fstat(fd).st_dev) != number:
            return False
        ioctls.shut_down(fd)
    except (OSError, SystemCallFailed):
        return False
    finally:
        os.close(fd)
    return True
