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
_NOTHING = frozenset({"defaults", "rw", "suid", "dev", "exec", "atime", "diratime", "async", "nolazytime", "symfollow"})
_NOT_A_MOUNT = frozenset(
    {"bind", "rbind", "move", "remount", "shared", "rshared", "slave", "rslave", "private", "rprivate", "unbindable",
     "runbindable", "loop", "offset", "sizelimit", "source"}
)  # fmt: skip
"""Words that would make mount(8) do something else than mount this device here."""
_MAY_HOLD_COMMAS = frozenset({"context", "fscontext", "defcontext", "rootcontext"})
"""Options of SELinux, whose levels list categories, such as s0:c1,c2 (mount(8))."""


@dataclass(frozen=True, slots=True)
class MountOptions:
    """Options sorted by who takes them. `own` are the filesystem's, `flags` the same generic ones for mount(2)."""

    attributes: int
    superblock: tuple[str, ...]
    own: tuple[str, ...]
    flags: int

    @property
    def data(self) -> str:
        """Join the filesystem's own options for mount(2), where SELinux takes what holds commas in quotes."""
        return ",".join(_quoted(option) for option in self.own)


def _quoted(option: str) -> str:
    name, _, value = option.partition("=")
    return f'{name}="{value}"' if "," in value else option


def sort_options(options: Sequence[str], *, read_only: bool) -> MountOptions:
    """Sort the options of a mount, one by one: a value may hold commas, without quotes. `read_only` adds "ro".

    Raises `InvalidField` for words that are no options of a mount.
    """
    attributes, flags = (syscalls.MOUNT_ATTR_RDONLY, syscalls.MS_RDONLY) if read_only else (0, 0)
    superblock = ["ro"] if read_only or "ro" in options else []
    access_time = (0, 0)
    own = []
    for option in options:
        _require_one(option)
        if option in _ATTRIBUTES:
            attributes |= _ATTRIBUTES[option][0]
            flags |= _ATTRIBUTES[option][1]
        elif option in _ACCESS_TIMES:
            access_time = _ACCESS_TIMES[option]
        elif option in _SUPERBLOCK:
            superblock.append(option)
            flags |= _SUPERBLOCK[option]
        elif option not in _NOTHING:
            own.append(option)
    return MountOptions(attributes | access_time[0], tuple(superblock), tuple(own), flags | access_time[1])


def _require_one(option: str) -> None:
    """Refuse what is no single option, or would be read as several where options are handed over as one text."""
    name, _, value = option.partition("=")
    if name in _NOT_A_MOUNT:
        raise InvalidField(FIELD, option, "an option of the filesystem or of its mount")
    if not name or "," in name or '"' in option or ("," in value and name not in _MAY_HOLD_COMMAS):
        raise InvalidField(FIELD, name, "one option, without commas or quotes but for the commas of an SELinux context")


_SHOWN_ACCESS_TIMES = {0: "relatime", syscalls.MOUNT_ATTR_NOATIME: "noatime"}


def shown_options(attributes: int, superblock_flags: int) -> frozenset[str]:
    """Name what a mount's attributes and its superblock's flags say, as /proc/self/mountinfo would, without "ro"."""
    names = {name for name, (bit, _) in _ATTRIBUTES.items() if attributes & bit}
    names |= {name for name, bit in _SUPERBLOCK.items() if superblock_flags & bit}
    access_time = _SHOWN_ACCESS_TIMES.get(attributes & syscalls.MOUNT_ATTR_ATIME_MASK)
    return frozenset(names | ({access_time} if access_time else set())) - {"ro"}
