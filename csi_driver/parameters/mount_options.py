"""Mount options: the options that a user may set, those that are refused, and those that follow from the access. Pure.

An option that passes here and that the filesystem does not know is refused by the kernel when it mounts. Values may be
sensitive (CSI marks mount_flags so): messages show the name alone, but for values on the driver's own list.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass

from csi_driver.errors import InvalidField, InvalidRequest
from csi_driver.host_model import Mount
from csi_driver.model import DEFAULT_FS_TYPE, AccessMode, MountAccess
from csi_driver.parameters.mkfs import MkfsArguments, MkfsRequest, check_fs_type
from csi_driver.parameters.values import Problems

FS_TYPE = "fsType"
"""Key of the volume context that names the filesystem where the capability names none."""
MOUNT_GROUP = "volume_capability.mount.volume_mount_group"

_SHAPE = re.compile(r"[A-Za-z_][A-Za-z0-9_.-]*(?:=[A-Za-z0-9_.:+-]+)?")
_SELINUX = re.compile(r'(context|fscontext|defcontext|rootcontext)=("?)([A-Za-z0-9_.:,-]+)\2')
_ROOT_MODE = re.compile(r"nvmesh:(?:chmod|permissions)=([0-7]{3,4})")
_ROOT_MODE_NAMES = ("nvmesh:chmod", "nvmesh:permissions")

DROPPED = frozenset(
    {"defaults", "_netdev", "nofail", "rw", "silent", "loud", "iversion", "noiversion", "norelatime", "nostrictatime"}
)
"""Accepted and not passed on. mount(8) keeps the first three for itself (fstab(5)); `rw` is the default, and says
nothing of readers: one class serves both; `silent` and `loud` are about messages of the kernel; the others select what
these filesystems do anyway (mount(8))."""

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
"""Clones of a volume carry its uuid, and xfs refuses the second of one uuid on a node (xfs(5), nouuid)."""

_WHEN_READ_ONLY = {
    "ext4": ("noload",),
    "xfs": ("norecovery",),
    # Replays nothing even where the device itself could be written (btrfs(5), rescue).
    "btrfs": ("rescue=nologreplay",),
}


class InvalidMountOption(InvalidRequest):
    """A mount option cannot be used. `option` is its name, or an option of the driver's own list."""

    def __init__(self, option: str, reason: str) -> None:
        super().__init__(f"mount_flags: option {option!a} cannot be used: {reason}")


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
    """A checked request for mount access. `root_mode`: mode of a new filesystem's root directory, None = mkfs's.

    `mkfs_refusal`: why no filesystem can be made as the request says. A volume that has one is mounted all the same:
    its context cannot be changed, and the driver that made the filesystem took what this one refuses.
    """

    request: FilesystemRequest
    flags: tuple[str, ...]
    root_mode: int | None
    mkfs: MkfsArguments
    mkfs_refusal: InvalidRequest | None = None

    @property
    def read_only(self) -> bool:
        return self.request.read_only

    def options_for(self, fs_type: str) -> tuple[str, ...]:
        """Return the options to mount a filesystem of that type with, each once."""
        implied = _ALWAYS.get(fs_type, ()) + (_WHEN_READ_ONLY.get(fs_type, ()) if self.read_only else ())
        return tuple(dict.fromkeys((*self.flags, *implied)))

    def require_mkfs(self) -> None:
        """Raise `InvalidRequest` where no filesystem can be made as the request says."""
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
) -> MountPlan:
    """Check everything that a caller may ask of a filesystem, before any device is touched. Raises `InvalidRequest`.

    A mistake that concerns mkfs alone is kept in the plan.

    `read_only`: the attachment is read-only, whatever the mode and the flags say. `fs_type_of_class`: the parameter
    `fsType`, which counts where the capability names no filesystem.
    """
    if mode in (AccessMode.MULTI_NODE_MULTI_WRITER, AccessMode.MULTI_NODE_SINGLE_WRITER):
        raise InvalidField(
            "volume_capability.access_mode", mode.value, "a mode that writes on one node: filesystems are not shared"
        )
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
    for problem in () if request.read_only else _writing_without_replay(kept):
        problems.add(problem)
    arguments, refusal = MkfsArguments(), None
    try:
        arguments = mkfs.arguments(request.to_make)
    except InvalidRequest as problem:
        refusal = problem
    problems.raise_any(refusal)
    return MountPlan(request, kept, None if request.read_only else root_mode, arguments, refusal)


def check_mount_group(access: MountAccess) -> None:
    """Refuse a group for the files: the capability VOLUME_MOUNT_GROUP is not offered, and nobody would set it."""
    if access.mount_group:
        raise InvalidField(
            MOUNT_GROUP,
            access.mount_group,
            "none, as VOLUME_MOUNT_GROUP is not offered",
            "set the group of the files otherwise, such as by fsGroup of the pod",
        )


def _writing_without_replay(flags: Sequence[str]) -> Iterator[InvalidMountOption]:
    for flag in flags:
        if _name(flag) in NO_REPLAY:
            reason = "it leaves the journal unread, which destroys data while writing; use it with ro alone"
            yield InvalidMountOption(_name(flag), reason)


def mount_flags(flags: Sequence[str]) -> tuple[tuple[str, ...], int | None]:
    """Take mount flags apart into kernel options and the mode asked for the root directory."""
    taken: dict[str, None] = {}
    root_mode: int | None = None
    problems = Problems()
    for option in _split(flags):
        mode = _ROOT_MODE.fullmatch(option)
        if mode is not None:
            root_mode = int(mode[1], 8)
            continue
        selinux = _SELINUX.fullmatch(option)
        if selinux is not None:
            taken[f"{selinux[1]}={selinux[3]}"] = None
            continue
        refusal = _refusal(option)
        if refusal is not None:
            problems.add(refusal)
        elif option not in DROPPED:
            taken[option] = None
    problems.raise_any()
    return tuple(taken), root_mode


def _refusal(option: str) -> InvalidMountOption | None:
    """Return why an option is refused. Names are looked up first: the reason of the table beats that of the shape."""
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
    """Split flags at commas as mount(8) does, and leave out blanks around them and empty options.

    SELinux contexts stay whole: their levels hold commas themselves.
    """
    options: list[str] = []
    for flag in flags:
        options.extend([flag] if _SELINUX.fullmatch(flag) else flag.split(","))
    return [option.strip(" ") for option in options if option.strip(" ")]


def _name(option: str) -> str:
    return option.partition("=")[0]


# --- comparing with what the kernel shows -------------------------------------------------------------------

_ALWAYS_SHOWN = frozenset({"nosuid", "nodev", "noexec", "noatime", "nodiratime", "sync", "dirsync", "lazytime"})
"""Options that /proc/self/mountinfo shows exactly when they are set (fs/proc_namespace.c)."""


def differences(mounted: Mount, plan: MountPlan) -> list[str]:
    """Return how a mount differs from the plan, each as "NAME: expected X, got Y"; empty = it does not.

    Only what the kernel is known to show counts: it leaves out defaults and respells values, and a mount that is
    right must never be called wrong.
    """
    found: list[str] = []
    if plan.request.fs_type and mounted.fs_type != plan.request.fs_type:
        found.append(f"filesystem: expected {plan.request.fs_type}, got {mounted.fs_type}")
    if mounted.read_only != plan.read_only:
        found.append(f"access: expected {_access(plan.read_only)}, got {_access(mounted.read_only)}")
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
        # Only plain numbers are spelled alike by everybody.
        if has_value and value.isdigit() and values.get(name, value).isdigit() and values.get(name, value) != value:
            found.append(f"option {name}: expected {value}, got {values[name]}")
    return found


def _access(read_only: bool) -> str:
    return "read-only" if read_only else "read-write"
