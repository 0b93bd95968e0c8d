# SPDX-License-Identifier: Apache-2.0
"""Filesystems in a file, for pools with and without reflinks. Needs root."""

from __future__ import annotations

import contextlib
import subprocess
from collections.abc import Iterator, Sequence
from pathlib import Path

MIB = 1 << 20
XFS = ("mkfs.xfs", "-q", "-m", "reflink=1")
BTRFS = ("mkfs.btrfs", "-q")
EXT4 = ("mkfs.ext4", "-q", "-F")


def mount_file(image: Path, place: Path) -> None:
    """Mount a filesystem in a file; its loop device goes with the mount.

    The kernel keeps BLKROSET when a loop device is released, and mount(8) then mounts read-only whatever file is next.
    """
    found = subprocess.run(["losetup", "--find", "--show", image], check=True, capture_output=True, text=True)
    device = found.stdout.strip()
    try:
        subprocess.run(["blockdev", "--setrw", device], check=True)
        subprocess.run(["mount", device, place], check=True)
    finally:
        subprocess.run(["losetup", "--detach", device], check=True)


@contextlib.contextmanager
def mounted(directory: Path, make: Sequence[str] = XFS, *, size_mib: int = 400) -> Iterator[Path]:
    """Return the mount point of a new filesystem in a sparse file in `directory`; unmounted at the end."""
    image, place = directory / f"{make[0]}.img", directory / make[0]
    with image.open("wb") as file:
        file.truncate(size_mib * MIB)
    subprocess.run([*make, image], check=True)
    place.mkdir()
    mount_file(image, place)
    try:
        yield place
    finally:
        subprocess.run(["umount", "--lazy", place], check=True)
        image.unlink()


@contextlib.contextmanager
def in_memory(directory: Path, *, size_mib: int = 64) -> Iterator[Path]:
    """Return the mount point of a tmpfs, which has no reflinks."""
    place = directory / "tmpfs"
    place.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size_mib}m", "none", place], check=True)
    try:
        yield place
    finally:
        subprocess.run(["umount", "--lazy", place], check=True)


def fill(place: Path) -> Path:
    """Write a file until the filesystem is full."""
    file = place / "ballast"
    with file.open("wb", buffering=0) as opened, contextlib.suppress(OSError):
        while opened.write(bytes(MIB)):
            pass
        while opened.write(bytes(4096)):
            pass
    return file
