# SPDX-License-Identifier: Apache-2.0
"""Mount options: sorted for the kernel's interfaces, set on a filesystem, and named when the kernel refuses them.

The names are those of mount(8), "filesystem-independent mount options"; the split into options of the mount, of every
superblock and of the filesystem is the kernel's (include/uapi/linux/mount.h; fs/fs_context.c, common_set_sb_flag).
"""

from __future__ import annotations

import contextlib
import errno
import os
from collections.abc import Sequence
from dataclasses import dataclass

from csi_driver.errors import HostFailure, InvalidField, PreconditionFailed, SystemCallFailed
from csi_driver.host import syscalls
from csi_driver.host_model import Device

FIELD = "mount_flags"
"""The request field of mount options (CSI specification, VolumeCapability.MountVolume)."""

_ATTRIBUTES = {
    "ro": syscalls.MOUNT_ATTR_RDONLY,
    "nosuid": syscalls.MOUNT_ATTR_NOSUID,
    "nodev": syscalls.MOUNT_ATTR_NODEV,
    "noexec": syscalls.MOUNT_ATTR_NOEXEC,
    "nodiratime": syscalls.MOUNT_ATTR_NODIRATIME,
    "nosymfollow": syscalls.MOUNT_ATTR_NOSYMFOLLOW,
}
_ACCESS_TIMES = {
    "relatime": 0,
    "noatime": syscalls.MOUNT_ATTR_NOATIME,
    "strictatime": syscalls.MOUNT_ATTR_STRICTATIME,
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
"""Words with which mount(8) does not mount this device here."""
_MAY_HOLD_COMMAS = frozenset({"context", "fscontext", "defcontext", "rootcontext"})
"""SELinux contexts have categories such as s0:c1,c2 (mount(8))."""


@dataclass(frozen=True, slots=True)
class MountOptions:
    """Options of the mount, of every superblock, and the filesystem's `own`."""

    attributes: int
    superblock: tuple[str, ...]
    own: tuple[str, ...]

    @property
    def read_only(self) -> bool:
        return bool(self.attributes & syscalls.MOUNT_ATTR_RDONLY)


def sort_options(options: Sequence[str], *, read_only: bool) -> MountOptions:
    """Sort options, one by one. Raises `InvalidField` for words of mount(8) that are no options."""
    attributes = syscalls.MOUNT_ATTR_RDONLY if read_only else 0
    superblock = ["ro"] if read_only or "ro" in options else []
    access_time = 0
    own = []
    for option in options:
        _require_one(option)
        if option in _ATTRIBUTES:
            attributes |= _ATTRIBUTES[option]
        elif option in _ACCESS_TIMES:
            access_time = _ACCESS_TIMES[option]
        elif option in _SUPERBLOCK:
            superblock.append(option)
        elif option not in _NOTHING:
            own.append(option)
    return MountOptions(attributes | access_time, tuple(superblock), tuple(own))


def _require_one(option: str) -> None:
    """Refuse a word that is not one option, or that a filesystem would split into several."""
    name, _, value = option.partition("=")
    if name in _NOT_A_MOUNT:
        raise InvalidField(FIELD, option, "an option of the filesystem or of its mount")
    if not name or "," in name or '"' in option or ("," in value and name not in _MAY_HOLD_COMMAS):
        raise InvalidField(FIELD, name, "one option, without commas or quotes but for the commas of an SELinux context")


_SHOWN_ACCESS_TIMES = {0: "relatime", syscalls.MOUNT_ATTR_NOATIME: "noatime"}


def shown_options(attributes: int, superblock_flags: int) -> frozenset[str]:
    """Return the options of a mount and its superblock as in /proc/self/mountinfo, without "ro"."""
    names = {name for name, bit in _ATTRIBUTES.items() if attributes & bit}
    names |= {name for name, bit in _SUPERBLOCK.items() if superblock_flags & bit}
    access_time = _SHOWN_ACCESS_TIMES.get(attributes & syscalls.MOUNT_ATTR_ATIME_MASK)
    return frozenset(names | ({access_time} if access_time else set())) - {"ro"}


_WITHOUT_RECOVERY = {"ext4": "noload", "xfs": "norecovery", "btrfs": "rescue=nologreplay"}


def configure(stack: contextlib.ExitStack, device: Device, fs_type: str, wanted: MountOptions) -> int:
    """Open a filesystem context and set its options. Raises `InvalidField` naming a refused option."""
    try:
        context = stack.enter_context(syscalls.closing(syscalls.fsopen(fs_type)))
    except SystemCallFailed as failure:
        if failure.errno == errno.ENODEV:
            raise HostFailure(f"this kernel has no filesystem {fs_type}") from failure
        raise
    syscalls.fsconfig(context, "source", str(device.path))
    for name in wanted.superblock:
        syscalls.fsconfig(context, name)
    for option in wanted.own:
        key, separator, value = option.partition("=")
        try:
            syscalls.fsconfig(context, key, value if separator else None)
        except SystemCallFailed as failure:
            reason = "; ".join(syscalls.fs_messages(context)) or failure.call
            raise InvalidField(FIELD, option, f"an option that {fs_type} takes ({reason})") from failure
    return context


def mount_error(
    what: str, device: Device, fs_type: str, wanted: MountOptions, context: int, failure: SystemCallFailed
) -> Exception:
    """Make the error of a refused superblock, which names the refused options where they can be found."""
    reason = "; ".join(syscalls.fs_messages(context))
    if failure.errno == errno.EINVAL:
        names = _refused_options(device, fs_type, wanted)
        if names:
            expected = f"options that {fs_type} takes here" + f" ({reason})" * bool(reason)
            return InvalidField(FIELD, ",".join(names), expected, _advice(names, device, fs_type, reason))
    if failure.errno in (errno.EINVAL, errno.EBUSY):
        reason = reason or _see_kernel_log(device)
    return refused(what, failure.errno, reason)


def refused(what: str, errno_number: int, reason: str = "") -> Exception:
    """Make the error of a refused mount call: EBUSY is `PreconditionFailed`."""
    if errno_number == errno.EBUSY:
        return PreconditionFailed(f"{what}: busy, it is in use" + (f": {reason}" if reason else ""))
    return SystemCallFailed(what, errno_number, reason)


def _see_kernel_log(device: Device) -> str:
    try:
        name = os.path.basename(os.readlink(f"/sys/dev/block/{device.number}"))
    except OSError:
        name = device.name
    return f"the kernel's log (dmesg) has the reason, in lines of {name}"


def _advice(names: Sequence[str], device: Device, fs_type: str, reason: str) -> str:
    advice = [] if reason else [_see_kernel_log(device)]
    if fs_type == "ext4" and any(option.endswith("quota") for option in names):
        advice.append("on ext4, project quotas also need mkfsOptions: -O project,quota")
    return "; ".join(advice)


def _refused_options(device: Device, fs_type: str, wanted: MountOptions) -> Sequence[str]:
    """Find the options that only the creation of the superblock refuses, by trying each alone, read-only.

    Nothing is written: no journal is replayed, no mount is made. Empty when the superblock cannot be made without
    options either; all options when each one alone is accepted.
    """
    safe = _WITHOUT_RECOVERY.get(fs_type)
    if not wanted.own or safe is None or not _makes_superblock(device, fs_type, (safe,)):
        return ()
    return [option for option in wanted.own if not _makes_superblock(device, fs_type, (safe, option))] or wanted.own


def _makes_superblock(device: Device, fs_type: str, own: tuple[str, ...]) -> bool:
    with contextlib.ExitStack() as stack:
        try:
            syscalls.fsconfig_create(configure(stack, device, fs_type, MountOptions(0, ("ro",), own)))
        except SystemCallFailed:
            return False
    return True
