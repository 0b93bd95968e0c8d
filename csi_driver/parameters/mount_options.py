# SPDX-License-Identifier: Apache-2.0
"""Mount options: those that a user may set, those that are refused, and those that follow from the access mode.

Values may be sensitive (CSI): messages show the name alone, unless the value is on the driver's own list.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Sequence
from dataclasses import dataclass

from csi_driver.errors import InvalidField, InvalidRequest
from csi_driver.host_model import Mount
from csi_driver.model import DEFAULT_FS_TYPE, AccessMode, MountAccess
from csi_driver.parameters.mkfs import MkfsArguments, MkfsRequest, check_fs_type
from csi_driver.parameters.values import Problems

FS_TYPE = "fsType"
"""Key of the volume context: the filesystem, unless the capability names one."""
MOUNT_GROUP = "volume_capability.mount.volume_mount_group"

_SHAPE = re.compile(r"[A-Za-z_][A-Za-z0-9_.-]*(?:=[A-Za-z0-9_.:+-]+)?")
_SELINUX = re.compile(r'(context|fscontext|defcontext|rootcontext)=("?)([A-Za-z0-9_.:,-]+)\2')
_ROOT_MODE = re.compile(r"nvmesh:(?:chmod|permissions)=([0-7]{3,4})")
_ROOT_MODE_NAMES = ("nvmesh:chmod", "nvmesh:permissions")

DROPPED = frozenset(
    {"defaults", "_netdev", "nofail", "rw", "silent", "loud", "iversion", "noiversion", "norelatime", "nostrictatime"}
)
"""Accepted and not passed on. The first three are for mount(8) itself (fstab(5)); `rw` is the default, and one class
serves readers, too; `silent` and `loud` are about kernel messages; the others are the defaults of these filesystems."""

REFUSED = {
    "another operation than mounting the volume": (
        "bind rbind remount move loop offset sizelimit shared rshared slave rslave private rprivate unbindable "
        "runbindable user users owner group auto noauto helper uhelper source"
    ),
    "another device or place on disk": (
        "device logdev rtdev journal_path journal_dev journal sb subvol subvolid usrjquota grpjquota"
    ),
    "harmful to the machine or to data": (
        "abort debug dev suid test_dummy_encryption clear_cache skip_balance check_int check_int_data"
    ),
}
_REFUSED_BY_NAME = {name: reason for reason, names in REFUSED.items() for name in names.split()}
_REFUSED_WHOLE = {"errors=panic": "harmful to the machine or to data; errors=remount-ro may be used"}
NO_REPLAY = frozenset({"noload", "norecovery", "nologreplay", "rescue"})
"""Leave the journal unread: right for a reader, destructive for a writer."""
_ALWAYS = {"xfs": ("nouuid",)}
"""Clones of a volume have its uuid, and xfs refuses the second of one uuid on a node (xfs(5), nouuid)."""
_WHEN_READ_ONLY = {
    "ext4": ("noload",),
    "xfs": ("norecovery",),
    # Replays nothing even where the device itself could be written (btrfs(5), rescue).
    "btrfs": ("rescue=nologreplay",),
}


class InvalidMountOption(InvalidRequest):
    def __init__(self, option: str, reason: str) -> None:
        super().__init__(f"mount_flags: option {option!a} cannot be used: {reason}")


@dataclass(frozen=True, slots=True)
class FilesystemRequest:
    fs_type: str
    read_only: bool

    @property
    def to_make(self) -> str:
        return self.fs_type or DEFAULT_FS_TYPE


@dataclass(frozen=True, slots=True)
class MountPlan:
    """A checked request for mount access. `root_mode`: of a new filesystem's root directory, None = mkfs's.

    `supported`: the types that the machine can make and mount. `mkfs_refusal`: why no filesystem can be made; one that
    exists can still be mounted. `replays`: a log is replayed, also by a read-only mount.
    """

    request: FilesystemRequest
    flags: tuple[str, ...]
    root_mode: int | None
    mkfs: MkfsArguments
    supported: Sequence[str] = ()
    mkfs_refusal: InvalidRequest | None = None
    replays: bool = False

    @property
    def read_only(self) -> bool:
        return self.request.read_only

    def options_for(self, fs_type: str) -> tuple[str, ...]:
        unread = _WHEN_READ_ONLY.get(fs_type, ()) if self.read_only and not self.replays else ()
        return tuple(dict.fromkeys((*self.flags, *_ALWAYS.get(fs_type, ()), *unread)))

    def require_mkfs(self) -> None:
        if self.mkfs_refusal is not None:
            raise self.mkfs_refusal


def plan_mount(
    access: MountAccess,
    mode: AccessMode,
    *,
    read_only: bool,
    mkfs: MkfsRequest,
    supported: Sequence[str],
    fs_type_of_class: str = "",
    private_copy: bool = False,
) -> MountPlan:
    """Check a request for mount access before any device is touched. A problem of mkfs alone is kept in the plan.

    `read_only`: the attachment is, despite mode and flags. `fs_type_of_class`: the parameter `fsType`. `private_copy`:
    only this node has the device.
    """
    if mode in (AccessMode.MULTI_NODE_MULTI_WRITER, AccessMode.MULTI_NODE_SINGLE_WRITER):
        expected = "a mode that writes on one node: filesystems are not shared"
        raise InvalidField("volume_capability.access_mode", mode.value, expected)
    fs_type = access.fs_type or fs_type_of_class
    named_by = "volume_capability.mount.fs_type" if access.fs_type else f"parameter {FS_TYPE}"
    check_fs_type(named_by, fs_type, supported)
    problems = Problems()
    problems.of(lambda: check_mount_group(access))
    flags, root_mode = problems.of(lambda: mount_flags(access.mount_flags)) or ((), None)
    request = FilesystemRequest(fs_type, read_only or mode.is_read_only or "ro" in flags)
    kept = tuple(flag for flag in flags if flag != "ro")
    if "ro" in flags and "rw" in _split(access.mount_flags):
        problems.add(InvalidMountOption("rw", "the options have ro as well; remove one of them"))
    for flag in () if request.read_only else kept:
        if _name(flag) in NO_REPLAY:
            reason = "it leaves the journal unread, which destroys data while writing; use it with ro alone"
            problems.add(InvalidMountOption(_name(flag), reason))
    arguments, refusal = MkfsArguments(), None
    try:
        arguments = mkfs.arguments(request.to_make)
    except InvalidRequest as problem:
        refusal = problem
    problems.raise_any(refusal)
    root_mode = None if request.read_only else root_mode
    return MountPlan(request, kept, root_mode, arguments, supported, refusal, replays=private_copy)


def check_mount_group(access: MountAccess) -> None:
    if access.mount_group:
        expected, action = "none: VOLUME_MOUNT_GROUP is not offered", "set the group by fsGroup of the pod"
        raise InvalidField(MOUNT_GROUP, access.mount_group, expected, action)


def mount_flags(flags: Sequence[str]) -> tuple[tuple[str, ...], int | None]:
    taken: dict[str, None] = {}
    root_mode: int | None = None
    problems = Problems()
    for option in _split(flags):
        if mode := _ROOT_MODE.fullmatch(option):
            root_mode = int(mode[1], 8)
        elif selinux := _SELINUX.fullmatch(option):
            taken[f"{selinux[1]}={selinux[3]}"] = None
        elif refusal := _refusal(option):
            problems.add(refusal)
        elif option not in DROPPED:
            taken[option] = None
    problems.raise_any()
    return tuple(taken), root_mode


def _refusal(option: str) -> InvalidMountOption | None:
    name = _name(option)
    if option in _REFUSED_WHOLE:
        return InvalidMountOption(option, _REFUSED_WHOLE[option])
    if name in _REFUSED_BY_NAME:
        return InvalidMountOption(name, _REFUSED_BY_NAME[name])
    if name in _ROOT_MODE_NAMES:
        return InvalidMountOption(name, "expected a mode of three or four octal digits, such as nvmesh:chmod=0770")
    if name.lower().startswith("x-"):
        return InvalidMountOption(name, "options that begin with x- are for mount(8) and fstab, which are not used")
    if _SHAPE.fullmatch(option) is None:
        reason = "expected an option of the filesystem, such as noatime or commit=30, without spaces and quotes"
        return InvalidMountOption(name[:64], reason)
    return None


def _split(flags: Sequence[str]) -> list[str]:
    """Split flags at commas as mount(8) does, but not SELinux contexts: their levels contain commas."""
    options: list[str] = []
    for flag in flags:
        options.extend([flag] if _SELINUX.fullmatch(flag) else flag.split(","))
    return [option.strip(" ") for option in options if option.strip(" ")]


def _name(option: str) -> str:
    return option.partition("=")[0]


_ALWAYS_SHOWN = frozenset({"nosuid", "nodev", "noexec", "noatime", "nodiratime", "sync", "dirsync", "lazytime"})
"""Options that /proc/self/mountinfo shows exactly when they are set (fs/proc_namespace.c)."""


def differences(mounted: Mount, plan: MountPlan) -> list[str]:
    """Return the differences of a mount from the plan, each as "NAME: expected X, got Y".

    Only options that the kernel surely shows are compared: a correct mount must not be refused.
    """
    found: list[str] = []
    if plan.request.fs_type and mounted.fs_type != plan.request.fs_type:
        found.append(f"filesystem: expected {plan.request.fs_type}, got {mounted.fs_type}")
    if mounted.read_only != plan.read_only:
        have, want = ("read-only", "read-write") if mounted.read_only else ("read-write", "read-only")
        found.append(f"access: expected {want}, got {have}")
    expected = frozenset(plan.options_for(mounted.fs_type))
    for option in sorted(_ALWAYS_SHOWN & (mounted.options ^ expected)):
        have, want = ("set", "not set") if option in mounted.options else ("not set", "set")
        found.append(f"option {option}: expected {want}, got {have}")
    return found + _differing_values(mounted.options, expected)


def _differing_values(shown: Collection[str], expected: Collection[str]) -> list[str]:
    values = dict(option.split("=", 1) for option in shown if "=" in option)
    found: list[str] = []
    for option in sorted(expected):
        name, has_value, value = option.partition("=")
        # Only plain numbers are spelled alike by the kernel.
        if has_value and value.isdigit() and values.get(name, value).isdigit() and values.get(name, value) != value:
            found.append(f"option {name}: expected {value}, got {values[name]}")
    return found
