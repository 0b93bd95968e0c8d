"""Which mount options belong to the mount, which to every superblock, and which to the filesystem.

Pure. The names are those of mount(8), "filesystem-independent mount options"; the split is the kernel's
(include/uapi/linux/mount.h; fs/fs_context.c, common_set_sb_flag).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from csi_driver.errors import InvalidField
from csi_driver.host import syscalls

FIELD = "mount_flags"
"""The request field that an option came from (CSI specification, VolumeCapability.MountVolume)."""

_ATTRIBUTES = {
    "ro": (syscalls.MOUNT_ATTR_RDONLY, syscalls.MS_RDONLY),
    "nosuid": (syscalls.MOUNT_ATTR_NOSUID, syscalls.MS_NOSUID),
    "nodev": (syscalls.MOUNT_ATTR_NODEV, syscalls.MS_NODEV),
    "noexec": (syscalls.MOUNT_ATTR_NOEXEC, syscalls.MS_NOEXEC),
    "nodiratime": (syscalls.MOUNT_ATTR_NODIRATIME, syscalls.MS_NODIRATIME),
    "nosymfollow": (syscalls.MOUNT_ATTR_NOSYMFOLLOW, syscalls.MS_NOSYMFOLLOW),
}
_ACCESS_TIMES = {
    "relatime": (0, syscalls.MS_RELATIME),
    "noatime": (syscalls.MOUNT_ATTR_NOATIME, syscalls.MS_NOATIME),
    "strictatime": (syscalls.MOUNT_ATTR_STRICTATIME, syscalls.MS_STRICTATIME),
}
_SUPERBLOCK = {
    "sync": syscalls.MS_SYNCHRONOUS,
    "dirsync": syscalls.MS_DIRSYNC,
    "lazytime": syscalls.MS_LAZYTIME,
}
_NOTHING = frozenset(
    {"", "defaults", "rw", "suid", "dev", "exec", "atime", "diratime", "async", "nolazytime", "symfollow"}
)
_NOT_A_MOUNT = frozenset(
    {"bind", "rbind", "move", "remount", "shared", "rshared", "slave", "rslave", "private", "rprivate", "unbindable",
     "runbindable", "loop", "offset", "sizelimit", "source"}
)  # fmt: skip
"""Words that would make mount(8) do something else than mount this device here."""


@dataclass(frozen=True, slots=True)
class MountOptions:
    """Options sorted by who takes them. `own` are the filesystem's, `flags` the same generic ones for mount(2)."""

    attributes: int
    superblock: tuple[str, ...]
    own: tuple[str, ...]
    flags: int


def sort_options(options: Sequence[str], *, read_only: bool) -> MountOptions:
    """Sort the options of a mount; each may hold several, separated by commas. `read_only` adds "ro".

    Raises `InvalidField` for words that are no options of a mount.
    """
    names = [name for option in options for name in option.split(",")]
    attributes, flags = (syscalls.MOUNT_ATTR_RDONLY, syscalls.MS_RDONLY) if read_only else (0, 0)
    superblock = ["ro"] if read_only or "ro" in names else []
    access_time = (0, 0)
    own = []
    for name in names:
        if name.partition("=")[0] in _NOT_A_MOUNT:
            raise InvalidField(FIELD, name, "an option of the filesystem or of its mount")
        if name in _ATTRIBUTES:
            attributes |= _ATTRIBUTES[name][0]
            flags |= _ATTRIBUTES[name][1]
        elif name in _ACCESS_TIMES:
            access_time = _ACCESS_TIMES[name]
        elif name in _SUPERBLOCK:
            superblock.append(name)
            flags |= _SUPERBLOCK[name]
        elif name not in _NOTHING:
            own.append(name)
    return MountOptions(attributes | access_time[0], tuple(superblock), tuple(own), flags | access_time[1])


_SHOWN_ACCESS_TIMES = {0: "relatime", syscalls.MOUNT_ATTR_NOATIME: "noatime"}


def shown_options(attributes: int, superblock_flags: int) -> frozenset[str]:
    """Name what a mount's attributes and its superblock's flags say, as /proc/self/mountinfo would, without "ro"."""
    names = {name for name, (bit, _) in _ATTRIBUTES.items() if attributes & bit}
    names |= {name for name, bit in _SUPERBLOCK.items() if superblock_flags & bit}
    access_time = _SHOWN_ACCESS_TIMES.get(attributes & syscalls.MOUNT_ATTR_ATIME_MASK)
    return frozenset(names | ({access_time} if access_time else set())) - {"ro"}
