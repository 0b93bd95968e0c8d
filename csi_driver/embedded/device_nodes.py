"""The nodes of a client's devices: files in its device directory, told apart by the numbers they stand for."""

from __future__ import annotations

import contextlib
import os
import stat
from collections.abc import Iterator
from pathlib import Path

from csi_driver.embedded.ports import LoopDevice


def block_nodes(directory: Path) -> Iterator[tuple[Path, int]]:
    """Yield the device nodes in a directory with their numbers; others may come and go meanwhile."""
    for node in directory.iterdir():
        with contextlib.suppress(FileNotFoundError):
            found = node.lstat()
            if stat.S_ISBLK(found.st_mode):
                yield node, found.st_rdev


def ensure_node(node: Path, device: LoopDevice) -> None:
    """Make the device node if it is missing or is another device's (a container's /dev is made anew at its start)."""
    number = os.makedev(*device.device)
    try:
        found = node.lstat()
        if stat.S_ISBLK(found.st_mode) and found.st_rdev == number:
            return
        node.unlink()
    except FileNotFoundError:
        pass
    os.mknod(node, 0o600 | stat.S_IFBLK, number)


def remove_nodes(directory: Path, device: LoopDevice) -> None:
    """Remove every node of a device that was ours and was just taken down."""
    for node, number in block_nodes(directory):
        if number == os.makedev(*device.device):
            node.unlink(missing_ok=True)
