"""Mount options as callers write them: what is taken, what is refused, what follows from the access.

The one list of options that are refused is here. What passes it and is unknown to the filesystem is refused by the
kernel when it mounts. Values may be sensitive (CSI marks mount_flags so): messages show an option's name alone.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Sequence
from dataclasses import dataclass

from csi_driver.errors import InvalidField
from csi_driver.machine import Mounted
from csi_driver.model import DEFAULT_FS_TYPE, AccessMode, MountAccess
from csi_driver.parameters.mkfs import MkfsArguments, MkfsRequest

MOUNT_FLAGS = "volume_capability.mount.mount_flags"
FS_TYPE = "fsType"

_SHAPE = re.compile(r"[A-Za-z_][A-Za-z0-9_.-]*(?:=[A-Za-z0-9_.:+-]+)?")
_SELINUX = re.compile(r'(context|fscontext|defcontext|rootcontext)=("?)([A-Za-z0-9_.:,-]+)\2')
_ROOT_MODE = re.compile(r"nvmesh:(?:chmod|permissions)=([0-7]{3,4})")

_MEANINGLESS = frozenset({"defaults", "_netdev", "nofail", "rw"})
"""Taken and dropped: mount(8) keeps them for itself (fstab), the kernel does not know them."""

REFUSED = {
    "another operation than mounting the volume": (
        "bind rbind remount move loop offset sizelimit shared rshared slave rslave private rprivate unbindable "
        "runbindable user users owner group auto noauto helper uhelper source"
    ),
    "another device or place on disk": (
        "device logdev rtdev journal_path journal_dev journal sb subvol subvolid usrjquota grpjquota"
    ),
    "harmful to the machine or to data": (
        "abort debug dev suid test_dummy_encryption data_err clear_cache skip_balance check_int check_int_data"
    ),
}
_REFUSED_BY_NAME = {name: reason for reason, names in REFUSED.items() for name in names.split()}
_REFUSED_WHOLE = {"errors=panic": "harmful to the machine or to data"}
NO_REPLAY = frozenset({"noload", "norecovery", "nologreplay", "rescue"})
"""Leave the journal unread: right for a reader, destructive for a writer."""

_ALWAYS = {"xfs": ("nouuid",)}
"""Clones of a volume carry its uuid, and xfs refuses the second of one uuid on a node (xfs(5), nouuid)."""

_WHEN_READ_ONLY = {
    "ext4": ("noload",),
    "xfs": ("norecovery",),
    # Replays nothing even where the device itself could be written (btrfs(5), rescue).
    "btrfs": ("rescue=nologreplay",),
}


@dataclass(frozen=True, slots=True)
class FilesystemRequest:
    """The filesystem that a request asks for. An empty `fs_type` takes what the device holds, else the default."""

    fs_type: str
    read_only: bool

    @property
    def to_make(self) -> str:
        return self.fs_type or DEFAULT_FS_TYPE


@dataclass(frozen=True, slots=True)
class MountPlan:
    """What a request for mount access comes to. `root_mode`: mode of the root directory, None = leave it."""

    wish: FilesystemRequest
    flags: tuple[str, ...]
    root_mode: int | None
    mkfs: MkfsArguments

    @property
    def read_only(self) -> bool:
        return self.wish.read_only

    def options_for(self, fs_type: str) -> tuple[str, ...]:
        """Return the options to mount a filesystem of that type with, each once."""
        implied = _ALWAYS.get(fs_type, ()) + (_WHEN_READ_ONLY.get(fs_type, ()) if self.read_only else ())
        return tuple(dict.fromkeys((*self.flags, *implied)))


def plan_mount(
    access: MountAccess,
    mode: AccessMode,
    *,
    read_only: bool,
    mkfs: MkfsRequest,
    supported: Sequence[str],
    fs_type_of_class: str = "",
) -> MountPlan:
    """Check everything a caller may ask of a filesystem, before any device is touched. Raises `InvalidField`.

    `read_only`: it is so whatever the mode and the flags say. `fs_type_of_class` is the StorageClass's own, which
    counts where the capability names none (the parameter `fsType` of older drivers).
    """
    if mode in (AccessMode.MULTI_NODE_MULTI_WRITER, AccessMode.MULTI_NODE_SINGLE_WRITER):
        raise InvalidField(
            "volume_capability.access_mode", mode.value, "a mode that writes on one node: filesystems are not shared"
        )
    fs_type = access.fs_type or fs_type_of_class
    if fs_type and fs_type not in supported:
        raise InvalidField("volume_capability.mount.fs_type", fs_type, f"one of {', '.join(supported)}")
    flags, root_mode = mount_flags(access.mount_flags)
    readers = read_only or mode.is_read_only or "ro" in flags
    if readers and "rw" in access.mount_flags:
        raise InvalidField(MOUNT_FLAGS, "rw", "no such option with read-only access")
    kept = tuple(flag for flag in flags if flag != "ro")
    if not readers:
        for flag in kept:
            if _name(flag) in NO_REPLAY:
                raise InvalidField(MOUNT_FLAGS, _name(flag), "no option that leaves the journal unread while writing")
    wish = FilesystemRequest(fs_type, readers)
    return MountPlan(wish, kept, None if readers else root_mode, mkfs.arguments(wish.to_make))


def mount_flags(flags: Sequence[str]) -> tuple[tuple[str, ...], int | None]:
    """Take mount flags apart into kernel options and the mode asked for the root directory."""
    taken: dict[str, None] = {}
    root_mode: int | None = None
    for option in _split(flags):
        mode = _ROOT_MODE.fullmatch(option)
        if mode is not None:
            root_mode = int(mode[1], 8)
            continue
        selinux = _SELINUX.fullmatch(option)
        if selinux is not None:
            taken[f"{selinux[1]}={selinux[3]}"] = None
            continue
        name = _name(option)
        if _SHAPE.fullmatch(option) is None or name.lower().startswith("x-"):
            raise InvalidField(MOUNT_FLAGS, name, "an option of the filesystem, such as noatime or commit=30")
        reason = _REFUSED_WHOLE.get(option) or _REFUSED_BY_NAME.get(name)
        if reason is not None:
            raise InvalidField(MOUNT_FLAGS, name, f"no option that is {reason}")
        if option not in _MEANINGLESS:
            taken[option] = None
    return tuple(taken), root_mode


def _split(flags: Sequence[str]) -> list[str]:
    """Split flags at commas, as mount(8) would, but for SELinux contexts, whose levels hold commas themselves."""
    options: list[str] = []
    for flag in flags:
        options.extend([flag] if _SELINUX.fullmatch(flag) else flag.split(","))
    return options


def _name(option: str) -> str:
    return option.partition("=")[0]


# --- comparing with what the kernel shows -------------------------------------------------------------------

_ALWAYS_SHOWN = frozenset({"nosuid", "nodev", "noexec", "noatime", "nodiratime", "sync", "dirsync", "lazytime"})
"""Options that /proc/self/mountinfo shows exactly when they are set (fs/proc_namespace.c)."""


def differences(mounted: Mounted, plan: MountPlan) -> list[str]:
    """Return how a mount differs from the plan, each as "is X, wanted Y"; empty = it is what is wanted.

    Only what the kernel is known to show counts: it leaves out defaults and respells values, and a mount that is
    right must never be called wrong.
    """
    found: list[str] = []
    if plan.wish.fs_type and mounted.fs_type != plan.wish.fs_type:
        found.append(f"filesystem is {mounted.fs_type}, wanted {plan.wish.fs_type}")
    if mounted.read_only != plan.read_only:
        found.append(f"access is {_access(mounted.read_only)}, wanted {_access(plan.read_only)}")
    wanted = frozenset(plan.options_for(mounted.fs_type))
    for option in sorted(_ALWAYS_SHOWN & (mounted.options ^ wanted)):
        present = option in mounted.options
        found.append(f"option {option} is {'set' if present else 'not set'}, wanted {'not set' if present else 'set'}")
    return found + _differing_values(mounted.options, wanted)


def _differing_values(shown: Collection[str], wanted: Collection[str]) -> list[str]:
    values = dict(option.split("=", 1) for option in shown if "=" in option)
    found: list[str] = []
    for option in sorted(wanted):
        name, has_value, value = option.partition("=")
        # Only plain numbers are spelled alike by everybody.
        if has_value and value.isdigit() and values.get(name, value).isdigit() and values.get(name, value) != value:
            found.append(f"option {name} is {values[name]}, wanted {value}")
    return found


def _access(read_only: bool) -> str:
    return "read-only" if read_only else "read-write"
